"""The named sidecar version is the installed one.

Where the package comes from, in this order: `sidecar.package` of the configuration (a URL, a file, a folder baked
into the image), then what the bundle names; with neither, an installed one is left as it is.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from vmmesh_agent.bundle import Sidecar
from vmmesh_agent.config import Config, SidecarSettings
from vmmesh_agent.errors import HostError, InstallError
from vmmesh_agent.host import ROOT, Host
from vmmesh_agent.packages import PackageFile, PackageManager, fits

NAME = "istio-sidecar"
USER = "istio-proxy"  # made by the package's own script, and by our own package
CACHE = PurePosixPath("/var/lib/vmmesh-agent/packages")
RECORD = PurePosixPath("/var/lib/vmmesh-agent/installed.json")  # which digest gave which version
_MADE_BY_SCRIPT = PurePosixPath("/var/lib/istio/proxy")
_TARGET = PurePosixPath("/usr/local/bin")
_RESERVE = 64 * 1024**2  # bytes that an installation must leave free


@dataclass(frozen=True, slots=True)
class Source:
    """A package that was chosen: a file that is there, or an address with its digest."""

    manager: PackageManager
    path: PurePosixPath | None = None
    url: str = ""
    sha256: str = ""
    version: str = ""  # where it is known without the file
    size: int | None = None  # bytes to download, where known


@dataclass(frozen=True, slots=True)
class Plan:
    """What installing would do. `source` is None where there is nothing to do."""

    installed: str | None
    source: Source | None = None

    def __str__(self) -> str:
        if self.source is None:
            return f"{NAME} {self.installed} is installed" if self.installed else f"{NAME} is not installed"
        what = self.source.version or self.source.url or str(self.source.path)
        return f"{NAME} {self.installed} → {what}" if self.installed else f"install {NAME} {what}"


def plan(host: Host, config: Config, sidecar: Sidecar | None, managers: Sequence[PackageManager]) -> Plan:
    """Choose the package and compare it with what is installed; nothing is changed or downloaded."""
    source = _configured(host, config.sidecar, managers) if config.sidecar.package else _named(sidecar, managers)
    if source is None:
        installed = next((version for manager in managers if (version := _installed(host, manager))), None)
        if installed is None:
            raise InstallError(
                f"{NAME} is not installed, and neither the bundle nor the configuration names a package",
                code="no-package",
                hint="set sidecar.package, or let the endpoint serve the package with the bundle",
            )
        return Plan(installed)
    installed = _installed(host, source.manager)
    wanted = source.version or _recorded(host, source.sha256)
    if installed and wanted and _is_same(installed, wanted):
        return Plan(installed)
    if installed and wanted:
        _refuse_downgrade(source.manager, wanted, installed, config.sidecar)
    return Plan(installed, source)


def destination(host: Host, source: Source) -> PurePosixPath:
    """Return where a package that comes from a URL is downloaded to."""
    host.make_folder(CACHE, ROOT, 0o700)
    return _cached_path(source)


def cached(host: Host, source: Source) -> PurePosixPath | None:
    """Return the package where it was downloaded before and is still what was meant."""
    path = _cached_path(source)
    return path if host.status(path) and host.sha256(path) == source.sha256 else None


def judge(host: Host, source: Source, path: PurePosixPath, settings: SidecarSettings) -> PackageFile:
    """Look into the package before anything is changed: is it ours, for this machine, and is there room?"""
    if source.path and source.sha256 and (digest := host.sha256(source.path)) != source.sha256:
        raise InstallError(
            f"{source.path} has the digest {digest}, sidecar.sha256 says {source.sha256}",
            code="package-wrong-digest",
            hint="it is not the file that was meant; nothing was installed",
        )
    package = source.manager.inspect(path)
    if package.name != NAME:
        raise InstallError(f"the package is {package.name!r}, not {NAME!r}", code="package-invalid")
    if not fits(package.arch, source.manager):
        raise InstallError(
            f"the package is for {package.arch}, this machine is {source.manager.architecture()}",
            code="package-wrong-architecture",
            hint="name a package for this machine's architecture",
        )
    installed = _installed(host, source.manager)
    if installed and not _is_same(installed, package.version):
        _refuse_downgrade(source.manager, package.version, installed, settings)
    source.manager.check(path)
    free = host.free_bytes(_TARGET)
    if free < package.installed_bytes + _RESERVE:
        raise HostError(
            f"the package takes {package.installed_bytes // 1024**2} MiB and {free // 1024**2} MiB are free",
            code="disk-full",
            hint="make room",
        )
    return package


def apply(host: Host, source: Source, path: PurePosixPath, package: PackageFile) -> None:
    """Install the package that was judged, unless it is the installed one."""
    installed = _installed(host, source.manager)
    if not (installed and _is_same(installed, package.version)):
        source.manager.install(path)
    if source.sha256:
        record = json.dumps({"sha256": source.sha256, "version": package.version}).encode()
        host.make_folder(RECORD.parent, ROOT, 0o700)
        host.write(RECORD, record, ROOT, 0o600)


def clear_cache(host: Host) -> None:
    """Remove downloaded packages: what is installed works."""
    for name in host.names_in(CACHE):
        host.remove(CACHE / name)


def _cached_path(source: Source) -> PurePosixPath:
    return CACHE / f"{NAME}-{source.sha256[:16]}.{source.manager.format}"


def _installed(host: Host, manager: PackageManager) -> str | None:
    """Return the installed version; it counts as absent, and is put anew, without what its script makes.

    rpm notes a package as installed before it runs that script. The user alone proves nothing: ours makes it too.
    """
    is_whole = host.account(USER) is not None and host.status(_MADE_BY_SCRIPT) is not None
    return manager.installed(NAME) if is_whole else None


def _configured(host: Host, settings: SidecarSettings, managers: Sequence[PackageManager]) -> Source:
    if urlsplit(settings.package).scheme == "https":
        manager = _manager_of(PurePosixPath(urlsplit(settings.package).path), managers)
        return Source(manager, url=settings.package, sha256=settings.sha256)
    path = PurePosixPath(settings.package)
    found = host.status(path)
    if found is None:
        raise InstallError(f"sidecar.package: {path} is not there", code="package-missing")
    if found.is_directory:
        return _newest(path, host.names_in(path), managers)
    if not found.is_file:
        raise InstallError(
            f"sidecar.package: {path} is not a plain file", code="not-a-file", hint="name the file itself"
        )
    manager = _manager_of(path, managers)
    return Source(manager, path=path, sha256=settings.sha256, version=manager.inspect(path).version)


def _manager_of(path: PurePosixPath, managers: Iterable[PackageManager]) -> PackageManager:
    for manager in managers:
        if path.suffix == f".{manager.format}":
            return manager
    raise InstallError(
        f"{path.name} cannot be installed here: this machine has {_formats(managers)}",
        code="package-wrong-format",
        hint="name a package of a format that this machine installs",
    )


def _newest(folder: PurePosixPath, names: Iterable[str], managers: Sequence[PackageManager]) -> Source:
    """Choose the newest package in a folder that fits the machine."""
    best: Source | None = None
    for manager in managers:
        for name in names:
            if not (name.startswith(NAME) and name.endswith(f".{manager.format}")):
                continue
            package = manager.inspect(folder / name)
            is_better = best is None or manager.is_newer(package.version, best.version)
            if package.name == NAME and fits(package.arch, manager) and is_better:
                best = Source(manager, path=folder / name, version=package.version)
        if best:
            return best
    raise InstallError(
        f"sidecar.package: {folder} has no {NAME} package for this machine ({_formats(managers)})",
        code="package-missing",
    )


def _named(sidecar: Sidecar | None, managers: Sequence[PackageManager]) -> Source | None:
    """Choose among the packages that the bundle names: this machine's own format first."""
    if sidecar is None or not sidecar.packages:
        return None
    for manager in managers:
        for package in sidecar.packages:
            if package.format == manager.format and fits(package.arch, manager):
                return Source(
                    manager, url=package.url, sha256=package.sha256, version=sidecar.version, size=package.size
                )
    offered = ", ".join(f"{package.format} for {package.arch}" for package in sidecar.packages)
    raise InstallError(
        f"the bundle offers {offered}; this machine takes {_formats(managers)}",
        code="package-wrong-architecture",
        hint="let the endpoint serve a package for this machine",
    )


def _formats(managers: Iterable[PackageManager]) -> str:
    return " or ".join(f"{manager.format} for {manager.architecture()}" for manager in managers) or "no packages at all"


def _refuse_downgrade(manager: PackageManager, wanted: str, installed: str, settings: SidecarSettings) -> None:
    if manager.is_newer(installed, wanted) and not settings.allow_downgrade:
        raise InstallError(
            f"{NAME} {installed} is installed, and {wanted} is older",
            code="downgrade-refused",
            hint="set sidecar.allow_downgrade: true to go back on purpose",
        )


def _is_same(installed: str, wanted: str) -> bool:
    """Is this the version? One named without a release, such as 1.28.2, means each release of it."""
    return installed == wanted or installed.rpartition("-")[0] == wanted


def _recorded(host: Host, sha256: str) -> str:
    """Return the version that this digest was last installed as, empty where it is not known."""
    content = host.read(RECORD) if sha256 else None
    if content is None:
        return ""
    try:
        record = json.loads(content)
        return str(record["version"]) if record["sha256"] == sha256 else ""
    except (ValueError, KeyError, TypeError):
        return ""  # damaged: worth a download, not a failure
