"""One run of the lab: its own name, its folder, and a cgroup that holds every process it starts.

Nothing may outlive a run, however it ends. All it makes carries its name, which carries the number of the
process that owns it; the next run removes what belongs to an owner that is gone.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from lab import cache

_NAME = re.compile(r"vmmesh-(\d+)")
_NAMESPACES = Path("/run/netns")


class LabError(Exception):
    """The lab itself failed; says nothing about the agent."""


class Run:
    """A context manager; everything started within it is gone when it ends, unless `keep` was called."""

    def __init__(self) -> None:
        if os.geteuid() != 0:
            raise LabError("machines need root; `scripts/test --fast` leaves out the tests that need them")
        self.name = f"vmmesh-{os.getpid()}"
        self.folder = _folders() / self.name
        self._kept = False

    def __enter__(self) -> Self:
        sweep()
        self.folder.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._kept:
            _remove(self.name)

    def keep(self) -> None:
        """Leave all as it is when this process ends, until `sweep(kept=True)`."""
        (self.folder / "keep").touch()
        self._kept = True

    def inside(self, group: str, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` in the cgroup `group` of this run (`vm1`, `vm1/visitors`)."""
        joins = []
        for hierarchy in _hierarchies():
            path = hierarchy / self.name / group
            path.mkdir(parents=True, exist_ok=True)
            joins.append(f'echo $$ > "{path}/cgroup.procs"')
        return ["/bin/sh", "-ec", "; ".join([*joins, 'exec "$@"']), "sh", *argv]

    def spawn(
        self,
        group: str,
        argv: Sequence[str],
        *,
        output: IO[bytes] | int,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a process of this run with nothing to read and both its outputs in `output`."""
        return subprocess.Popen(
            self.inside(group, argv),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )

    def kill(self, group: str) -> None:
        """Kill every process in `group` and below, and wait until they are gone."""
        _kill(f"{self.name}/{group}")


def sweep(*, kept: bool = False) -> list[str]:
    """Remove the runs whose owners are gone, the kept ones only if asked to; return their names."""
    names = {path.name for path in _folders().glob("vmmesh-*")}
    names |= {path.name for hierarchy in _hierarchies() for path in hierarchy.glob("vmmesh-*")}
    names |= {found[0] for path in _NAMESPACES.glob("vmmesh-*") if (found := _NAME.match(path.name))}
    stale = sorted(
        name
        for name in names
        if (owner := _NAME.fullmatch(name))
        and not Path("/proc", owner[1]).exists()
        and (kept or not (_folders() / name / "keep").exists())
    )
    for name in stale:
        _remove(name)
    return stale


def _remove(name: str) -> None:
    _kill(name)
    for namespace in _NAMESPACES.glob(f"{name}-*"):
        subprocess.run(["ip", "netns", "delete", namespace.name], check=True)
    if (_folders() / name).exists():
        shutil.rmtree(_folders() / name)


def _folders() -> Path:
    # Not in /tmp: that is often a tmpfs, and the file system below an overlay must be able to hold one.
    return cache.folder() / "runs"


def _hierarchies() -> list[Path]:
    """The cgroup hierarchies in which systemd keeps account of processes: v2, `name=systemd` of v1, or both.

    Machines must not share a cgroup: the systemd of one would take the processes of the other for its own.
    """
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup2" or (kind == "cgroup" and "name=systemd" in options.split(",")):
            found.append(Path(where))
    if not found:
        raise LabError("this machine has no cgroup hierarchy that systemd could use")
    return found


def _kill(group: str) -> None:
    """Kill what is in the group until the group can be removed: a process may only just be joining it."""
    groups = [hierarchy / group for hierarchy in _hierarchies()]
    deadline = time.monotonic() + 30
    while any(path.exists() for path in groups):
        processes = {number for path in groups for number in _processes(path)}
        for number in processes:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        if not processes:
            for path in groups:
                _remove_group(path)
        if time.monotonic() > deadline:
            raise LabError(f"processes of {group} do not end: {sorted(processes)}")
        time.sleep(0.005)


def _processes(group: Path) -> set[int]:
    numbers: set[int] = set()
    for listing in group.rglob("cgroup.procs"):
        with suppress(OSError):  # groups come and go while we look
            numbers |= {int(line) for line in listing.read_text().split()}
    return {number for number in numbers if not _is_zombie(number)}


def _is_zombie(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _remove_group(group: Path) -> None:
    for path, _, _ in os.walk(group, topdown=False):
        with suppress(OSError):  # somebody is in it: the caller tries again
            Path(path).rmdir()
