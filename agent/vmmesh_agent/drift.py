"""Placed files that somebody changed: put back once, with a note; what is changed again is reported, not fought for."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import PurePosixPath

from vmmesh_agent import place, store
from vmmesh_agent.health import Condition, Severity
from vmmesh_agent.place import Change
from vmmesh_agent.reconcile import plan_of, restart_on
from vmmesh_agent.units import ISTIO
from vmmesh_agent.watch import Watch
from vmmesh_agent.world import World

_MEMORY = timedelta(hours=1)  # for so long a change of the same file is the same somebody's


@dataclass(frozen=True, slots=True)
class _PutBack:
    at: datetime
    found: str


class Drift:
    """Remembers what was put back since the daemon began."""

    def __init__(self) -> None:
        self._put_back: dict[PurePosixPath, _PutBack] = {}
        self._again: dict[PurePosixPath, Change] = {}
        self._run = ""  # the sidecar's, while all files were as they should be

    @property
    def contested(self) -> frozenset[PurePosixPath]:
        """The files that somebody else writes again and again."""
        return frozenset(self._again)

    def mend(self, world: World, watch: Watch) -> list[str]:
        """Put back what was changed for the first time. Return what was found, a sentence each."""
        membership = store.load(world.host)
        if membership is None or membership.unfinished:
            return []
        now = world.clock.now()
        planned = plan_of(world.host, membership)
        if fewer_roots := [change for change in planned if change.what == place.FEWER_ROOTS]:
            place.apply(world.host, fewer_roots)
        changes = [change for change in planned if change.what != place.FEWER_ROOTS]
        deviant = {change.path for change in changes}
        self._put_back = {
            path: put for path, put in self._put_back.items() if path in deviant or now - put.at < _MEMORY
        }
        self._again = {change.path: change for change in changes if change.path in self._put_back}
        fresh = [change for change in changes if change.path not in self._put_back]
        run = world.units.state(ISTIO).invocation if world.host.is_running else ""
        if fresh and self._run != run and any(change.restarts for change in fresh):
            restart_on(world, watch, fresh)  # it was started on what somebody else wrote
        elif fresh:
            place.apply(world.host, fresh)
        self._run = run
        self._put_back |= {change.path: _PutBack(now, change.found) for change in fresh}
        return [change.found for change in fresh]

    def conditions(self) -> Iterator[Condition]:
        """Yield what is to be said of it."""
        for path, put in self._put_back.items():
            if change := self._again.get(path):
                yield Condition(
                    "file_contested",
                    Severity.DEGRADED,
                    f"{change.found} again, after it was put back at {put.at:%H:%M:%SZ}: somebody else writes it, and"
                    " it is left as it is.",
                    f"Find who writes {path} (configuration management, cloud-init, a script) and stop it; then run"
                    " `vmmesh-agent bootstrap`.",
                )
            else:
                yield Condition(
                    "file_put_back",
                    Severity.NOTE,
                    f"{put.found} and was put back at {put.at:%H:%M:%SZ}.",
                    f"If it was not you, find who writes {path}.",
                )
