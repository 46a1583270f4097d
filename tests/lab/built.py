"""The agent's own packages, as `scripts/build-packages` makes them of the working tree, and how a machine gets them."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lab import cache
from lab.image import REPOSITORY, Family
from lab.machine import Machine
from lab.run import LabError

# All that goes into them.
SOURCES = ("agent", "docs", "packaging", "scripts", "systemd", "CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml")

_FOLDER = "srv/packages"
_PORT = "8000"
_YUM_REPO = f"[lab]\nname=lab\nbaseurl=http://127.0.0.1:{_PORT}\ngpgcheck=0\n"
# Provided by rpm itself, by the machine's image and by the package.
_PROVIDED = ("rpmlib(", "/bin/sh", "config(", "/usr/lib/vmmesh-agent/")


@dataclass(frozen=True)
class Built:
    """The same agent in both formats."""

    deb: Path
    rpm: Path


def agent_packages(source: Path = REPOSITORY) -> Built:
    """Return the packages of the working tree in `source`; they are built once for each state of its files."""

    def build(out: Path) -> None:
        build_packages(source, out)

    contents = cache.contents(*(source / name for name in SOURCES))
    return _built_in(cache.entry("packages", contents, build))


def build_packages(source: Path, out: Path, *, env: Mapping[str, str] | None = None) -> Built:
    """Build the packages of the working tree in `source` into `out`."""
    done = subprocess.run(
        [source / "scripts/build-packages", "--output", out],
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | dict(env or {}),
    )
    if done.returncode != 0:
        raise LabError(f"{source}/scripts/build-packages ended with {done.returncode}:\n{done.stdout}")
    return _built_in(out)


def copy_sources(folder: Path) -> Path:
    """Copy all that the packages are built from into a new folder; its files are as old as the copy."""
    folder.mkdir()
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / name, copy_function=shutil.copy, ignore=ignore)
        else:
            shutil.copy(source, folder / name)
    return folder


def _built_in(folder: Path) -> Built:
    (deb,) = folder.glob("*.deb")
    (rpm,) = folder.glob("*.rpm")
    return Built(deb=deb, rpm=rpm)


@dataclass(frozen=True)
class Manager:
    """The package manager of one family, at work on a machine that has nothing of the agent but its package."""

    family: Family
    machine: Machine

    def install(self, built: Built) -> None:
        """Install the deb as a file, the rpm by its name from a repository that the machine serves to itself."""
        if self.family == "deb":
            self._apt("install", self._copied(built.deb))
            return
        with tempfile.TemporaryDirectory() as repository:
            shutil.copy(built.rpm, repository)
            distribution_rpm(built.rpm, Path(repository))
            subprocess.run(["createrepo_c", "--quiet", repository], check=True)
            shutil.copytree(repository, self.machine.root / _FOLDER)
        serve = ["python3", "-m", "http.server", "--bind=127.0.0.1", f"--directory=/{_FOLDER}", _PORT]
        self.machine.run(["systemd-run", "--quiet", "--unit=repository", *serve])
        patiently = ["curl", "--silent", "--show-error", "--retry", "20", "--retry-connrefused"]
        self.machine.run([*patiently, f"http://127.0.0.1:{_PORT}/repodata/repomd.xml"])
        self.machine.write("/etc/yum.repos.d/lab.repo", _YUM_REPO)
        self.machine.run(["dnf", "--assumeyes", "install", "vmmesh-agent"], timeout=120)

    def upgrade(self, built: Built) -> None:
        """Install a newer package over the old one."""
        if self.family == "deb":
            self._apt("install", self._copied(built.deb))
        else:
            self.machine.run(["rpm", "--upgrade", self._copied(built.rpm)])

    def remove(self) -> None:
        """Remove the package and keep its configuration."""
        if self.family == "deb":
            self._apt("remove", "vmmesh-agent")
        else:
            self.machine.run(["dnf", "--assumeyes", "remove", "vmmesh-agent"], timeout=120)

    def purge(self) -> None:
        """Remove the configuration too; for debs only."""
        self._apt("purge", "vmmesh-agent")

    def version(self) -> str:
        """The installed version; empty where there is none."""
        query = ["rpm", "--query", "--queryformat=installed %{VERSION}", "vmmesh-agent"]
        if self.family == "deb":
            query = ["dpkg-query", "--show", "--showformat=${db:Status-Status} ${Version}", "vmmesh-agent"]
        state, _, version = self.machine.run(query, check=False).stdout.partition(" ")
        return version if state == "installed" else ""

    def changed(self) -> list[str]:
        """What is not as the package brought it, by the manager's own verification; configuration files left out."""
        verify = "dpkg --verify vmmesh-agent" if self.family == "deb" else "rpm --verify vmmesh-agent"
        lines = self.machine.run(verify.split(), check=False).stdout.splitlines()
        return [line for line in lines if " c /etc/" not in line]

    def _copied(self, package: Path) -> str:
        folder = self.machine.root / _FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(package, folder)
        return f"/{_FOLDER}/{package.name}"

    def _apt(self, *arguments: str) -> None:
        environment = {"DEBIAN_FRONTEND": "noninteractive"}
        self.machine.run(["apt-get", "--quiet", "--yes", *arguments], env=environment, timeout=120)


def distribution_rpm(package: Path, out: Path) -> None:
    """Build an empty rpm that provides what `package` requires: the rpm database of a Debian tree is empty."""
    query = ["rpm", "--query", "--requires", "--package", str(package)]
    required = subprocess.run(query, check=True, text=True, stdout=subprocess.PIPE).stdout.splitlines()
    lines = [
        *("Name: distribution", "Version: 1", "Release: 1", "BuildArch: noarch"),
        *("Summary: Stands for what a distribution has", "License: Apache-2.0"),
        *(f"Provides: {name}" for name in sorted(set(required)) if not name.startswith(_PROVIDED)),
        *("%description", "Empty.", "%files"),
    ]
    with tempfile.TemporaryDirectory() as scratch:
        spec = Path(scratch, "distribution.spec")
        spec.write_text("\n".join(lines) + "\n")
        command = [
            "rpmbuild",
            "-bb",
            "--quiet",
            f"--define=_topdir {scratch}",
            f"--define=_rpmdir {scratch}",
            str(spec),
        ]
        subprocess.run(command, check=True, capture_output=True)
        (rpm,) = Path(scratch).rglob("*.rpm")
        shutil.copy(rpm, out)
