"""rpm and dpkg behind one small protocol.

Dependencies are always checked. Where they are all there, the file is installed by rpm or dpkg alone, so that a
machine that reaches no repository joins too; where one is missing, dnf, yum or apt-get may supply it.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol

from vmmesh_agent.errors import HostError, InstallError
from vmmesh_agent.host import ROOT, Completed, Host

OnWait = Callable[[str], None]

LOG = PurePosixPath("/run/vmmesh-agent/package-manager.log")  # what it said last
LOCK_SECONDS = 600  # how long another user of the package manager is waited for
_INSTALL_SECONDS = 1800
_ANY_ARCH = {"all", "noarch"}


@dataclass(frozen=True, slots=True)
class PackageFile:
    """What a package file says of itself. `installed_bytes` is what it takes up on disk."""

    name: str
    version: str
    arch: str
    installed_bytes: int


class PackageManager(Protocol):
    """One of the machine's package managers."""

    format: str

    def is_there(self) -> bool:
        """Does this machine have it?"""

    def is_native(self) -> bool:
        """Is the machine itself made of its packages?"""

    def architecture(self) -> str:
        """The machine's architecture in this format's own words."""

    def installed(self, name: str) -> str | None:
        """The installed version, None where the package is absent or only half there."""

    def inspect(self, path: PurePosixPath) -> PackageFile:
        """Read a package file's own description. Raise `InstallError` where it is none of this format."""

    def check(self, path: PurePosixPath) -> None:
        """Read the package file to its end. Raise `InstallError` where it is damaged, or cannot be installed here."""

    def wait(self) -> None:
        """Wait until no other program is installing. Raise `InstallError` where one is for very long."""

    def is_newer(self, version: str, than: str) -> bool:
        """Compare two versions by the format's own rules."""

    def install(self, path: PurePosixPath) -> None:
        """Install the file, or change to its version; the machine's edited config files stay."""

    def remove(self, name: str) -> None:
        """Remove an installed package, its config files too."""


class Rpm:
    """rpm, with dnf or yum for what is missing."""

    format = "rpm"

    def __init__(self, host: Host, on_wait: OnWait = lambda _: None) -> None:
        self._host = host
        self._on_wait = on_wait
        self._root = [] if host.is_running else ["--root", str(host.root)]

    def is_there(self) -> bool:
        return self._host.has_program("rpm")

    def is_native(self) -> bool:
        return self._query("-q", "rpm").status == 0

    def architecture(self) -> str:
        return self._host.run(["rpm", "--eval", "%{_arch}"]).stdout.strip()

    def installed(self, name: str) -> str | None:
        found = self._query("-q", "--queryformat", "%{VERSION}-%{RELEASE}\n", name)
        return found.stdout.split()[-1] if found.status == 0 else None

    def inspect(self, path: PurePosixPath) -> PackageFile:
        form = "%{NAME}\n%{VERSION}-%{RELEASE}\n%{ARCH}\n%{LONGSIZE}\n"
        file = str(self._host.outside(path))
        # What is no package would be read as a manifest: a list of paths and addresses that rpm opens.
        query = ["rpm", "-q", "--nomanifest", "--nosignature", "--queryformat", form, "-p", file]
        found = self._host.run(query, check=False)
        _succeed_in_reading(path, "rpm", found)
        name, version, arch, size = found.stdout.split()[-4:]
        return PackageFile(name, version, arch, int(size))

    def check(self, path: PurePosixPath) -> None:
        digests = ["rpm", "--checksig", "--nosignature", str(self._host.outside(path))]
        _succeed_in_reading(path, "rpm", self._host.run(digests, timeout=300, check=False))
        trial = _patiently(self._host, [*self._upgrade, "--test", str(self._host.outside(path))], self._on_wait)
        if not self._may_resolve(trial):
            _succeed(trial)

    def wait(self) -> None:
        folder = self._host.run(["rpm", "--eval", "%{_dbpath}"]).stdout.strip()
        _wait_for(self._host, PurePosixPath(folder) / ".rpm.lock", self._on_wait)

    def is_newer(self, version: str, than: str) -> bool:
        compare = f'%{{lua: print(rpm.vercmp("{_plain(version)}", "{_plain(than)}"))}}'
        return self._host.run(["rpm", "--eval", compare]).stdout.strip() == "1"

    def install(self, path: PurePosixPath) -> None:
        file = str(self._host.outside(path))
        done = _patiently(self._host, [*self._upgrade, file], self._on_wait)
        if self._may_resolve(done):
            root = [] if self._host.is_running else [f"--installroot={self._host.root}"]
            done = _patiently(self._host, [str(self._resolver()), *root, "install", "-y", file], self._on_wait)
        _succeed(done)

    def remove(self, name: str) -> None:
        _succeed(_patiently(self._host, ["rpm", *self._root, "--erase", name], self._on_wait))

    @property
    def _upgrade(self) -> list[str]:
        return ["rpm", *self._root, "-U", "--oldpackage", "--replacepkgs"]

    def _may_resolve(self, done: Completed) -> bool:
        """Did it fail for what dnf or yum may supply?"""
        return "Failed dependencies" in done.stdout and self._resolver() is not None

    def _resolver(self) -> str | None:
        return next((program for program in ("dnf", "yum") if self._host.has_program(program)), None)

    def _query(self, *arguments: str) -> Completed:
        return self._host.run(["rpm", *self._root, *arguments], check=False)


class Deb:
    """dpkg, with apt-get for what is missing."""

    format = "deb"

    def __init__(self, host: Host, on_wait: OnWait = lambda _: None) -> None:
        self._host = host
        self._on_wait = on_wait
        self._root = [] if host.is_running else [f"--root={host.root}"]
        # Where dpkg writes what it does is not below its root by itself.
        self._log = [] if host.is_running else [f"--log={host.outside(PurePosixPath('/var/log/dpkg.log'))}"]

    def is_there(self) -> bool:
        return self._host.has_program("dpkg") and self._host.has_program("dpkg-deb")

    def is_native(self) -> bool:
        return self.installed("dpkg") is not None

    def architecture(self) -> str:
        return self._host.run(["dpkg", "--print-architecture"]).stdout.strip()

    def installed(self, name: str) -> str | None:
        form = "--showformat=${db:Status-Status} ${Version}\n"
        found = self._host.run(["dpkg-query", *self._root, "--show", form, name], check=False)
        status, _, version = found.stdout.strip().partition(" ")
        return version if status == "installed" else None

    def inspect(self, path: PurePosixPath) -> PackageFile:
        form = "--showformat=${Package}\n${Version}\n${Architecture}\n${Installed-Size}\n"
        file = str(self._host.outside(path))
        found = self._host.run(["dpkg-deb", "--show", form, file], check=False)
        _succeed_in_reading(path, "deb", found)
        name, version, arch, *size = found.stdout.split()
        return PackageFile(name, version, arch, int(size[0]) * 1024 if size else 0)

    def check(self, path: PurePosixPath) -> None:
        # Listing unpacks it all in passing; dpkg itself would find the damage when half of it is in place.
        listing = ["dpkg-deb", "--contents", str(self._host.outside(path))]
        _succeed_in_reading(path, "deb", self._host.run(listing, timeout=300, check=False))

    def wait(self) -> None:
        _wait_for(self._host, PurePosixPath("/var/lib/dpkg/lock-frontend"), self._on_wait)

    def is_newer(self, version: str, than: str) -> bool:
        return self._host.run(["dpkg", "--compare-versions", version, "gt", than], check=False).status == 0

    def install(self, path: PurePosixPath) -> None:
        file = str(self._host.outside(path))
        if self._host.is_running and self._host.has_program("apt-get"):
            self._apt_get(file)
        else:
            self._dpkg(file)

    def remove(self, name: str) -> None:
        _succeed(_patiently(self._host, ["dpkg", *self._root, *self._log, "--purge", name], self._on_wait))

    def _apt_get(self, file: str) -> None:
        """apt-get needs no repository where nothing is missing; where something is, its lists may be old."""
        install = [
            "apt-get", "install", "--yes", "--no-install-recommends", "--allow-downgrades", "--reinstall", "--quiet",
            "-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold",
            file,
        ]  # fmt: skip
        done = _patiently(self._host, install, self._on_wait)
        if done.status != 0 and _MISSING.search(done.stdout):
            _patiently(self._host, ["apt-get", "update", "--quiet"], self._on_wait)
            done = _patiently(self._host, install, self._on_wait)
        _succeed(done)

    def _dpkg(self, file: str) -> None:
        """dpkg alone unpacks before it looks at dependencies, so they are looked at first."""
        depends = self._host.run(["dpkg-deb", "--field", file, "Pre-Depends", "Depends"]).stdout
        missing = [
            clause.strip()
            for line in depends.splitlines()
            for clause in line.partition(":")[2].split(",")
            if clause.strip() and not any(self._has(alternative) for alternative in clause.split("|"))
        ]
        if missing:
            raise _missing_dependency(", ".join(missing))
        install = ["dpkg", *self._root, *self._log, "--force-confdef", "--force-confold", "--install", file]
        _succeed(_patiently(self._host, install, self._on_wait))

    def _has(self, dependency: str) -> bool:
        """Is a dependency such as `iptables` or `libc6 (>= 2.31)` there?"""
        match = re.fullmatch(r"\s*([a-z0-9.+-]+)(?::\w+)?\s*(?:\(\s*([<>=]+)\s*(\S+?)\s*\))?\s*", dependency)
        version = self.installed(match[1]) if match else None
        if not match or version is None:
            return False
        return not match[2] or self._host.run(
            ["dpkg", "--compare-versions", version, match[2], match[3]], check=False
        ).status == 0  # fmt: skip


def managers(host: Host, on_wait: OnWait = lambda _: None) -> list[PackageManager]:
    """Return the package managers that this machine has, its own first. `on_wait` is told when a lock is waited for."""
    known = (Deb(host, on_wait), Rpm(host, on_wait))
    there: Sequence[PackageManager] = [manager for manager in known if manager.is_there()]
    return sorted(there, key=lambda manager: not manager.is_native())


def fits(arch: str, manager: PackageManager) -> bool:
    """Does a package of this architecture fit the machine?"""
    return arch in _ANY_ARCH or arch == manager.architecture()


_MISSING = re.compile(r"unmet dependencies|Failed dependencies|nothing provides|not installable|is not going to be")
_NAMES_MISSING = re.compile(r"Depends: |is needed by|nothing provides")
_NO_SPACE = re.compile(r"No space left on device|needs? \d+\w+ (more space )?on the|don't have enough free space")
_WAITING = "another program holds the package manager's lock; waiting for it"
_LOCKED = re.compile(r"Could not get lock|is locked by another process|transaction lock")


def _wait_for(host: Host, lock: PurePosixPath, on_wait: OnWait) -> None:
    deadline = time.monotonic() + LOCK_SECONDS
    if host.is_locked(lock):
        on_wait(_WAITING)
    while host.is_locked(lock):
        if time.monotonic() >= deadline:
            raise _locked(str(lock))
        host.rest(1)


def _patiently(host: Host, argv: Sequence[str], on_wait: OnWait) -> Completed:
    """Run an installation or removal, again while somebody else holds the package manager's lock.

    It is never torn: it ends by itself even where we are ended.
    """
    host.make_folder(LOG.parent, ROOT, 0o755)
    deadline = time.monotonic() + LOCK_SECONDS
    is_told = False
    while True:
        done = host.run_on(argv, log=LOG, timeout=_INSTALL_SECONDS, environment={"DEBIAN_FRONTEND": "noninteractive"})
        if done.status == 0 or not _LOCKED.search(done.stdout) or time.monotonic() >= deadline:
            return done
        if not is_told:
            on_wait(_WAITING)
            is_told = True
        host.rest(1)


def _succeed(done: Completed) -> None:
    """Raise what a package manager's failure means."""
    if done.status == 0:
        return
    said = done.stdout
    if _NO_SPACE.search(said):
        raise HostError(
            f"no space is left for the sidecar package: {done.last_words}", code="disk-full", hint="make room"
        )
    if _MISSING.search(said):
        named = [line.strip() for line in said.splitlines() if _NAMES_MISSING.search(line)]
        raise _missing_dependency("; ".join(named) or done.last_words)
    if _LOCKED.search(said):
        raise _locked(done.last_words)
    raise InstallError(
        f"`{' '.join(done.argv)}` failed with status {done.status}: {done.last_words}",
        code="install-failed",
        hint="run the command by hand to see all that it says",
        retry=True,
    )


def _locked(what: str) -> InstallError:
    return InstallError(
        f"another program holds the package manager's lock: {what}",
        code="package-manager-locked",
        hint="wait for it to end, or end it",
        retry=True,
    )


def _missing_dependency(what: str) -> InstallError:
    return InstallError(
        f"the sidecar package needs what is not on this machine, and no repository supplies it: {what}",
        code="missing-dependency",
        hint="install what is missing, put it into the image, or configure a repository that has it",
        retry=True,
    )


def _succeed_in_reading(path: PurePosixPath, format_: str, found: Completed) -> None:
    """Raise what it means that a package file cannot be read to its end."""
    if found.status != 0:
        # Debian's rpm begins with a word of advice on each call.
        said = [line for line in found.last_words.splitlines() if not line.startswith("rpm: ")]
        raise InstallError(
            f"{path} is not a sound {format_} package: {' '.join(said)}",
            code="package-invalid",
            hint="it was damaged where it is kept or on its way; nothing was installed",
        )


def _plain(version: str) -> str:
    """Keep a version from meaning anything to the macro that compares it."""
    return re.sub(r"[^A-Za-z0-9.~^+_-]", "", version)
