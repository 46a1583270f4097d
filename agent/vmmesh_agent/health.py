"""Health as values: states, conditions, and how conditions become one state.

A condition is something that is wrong and that somebody can act on. Absence means healthy.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum, StrEnum


class State(StrEnum):
    """What a competent operator would say of this VM, in one word."""

    HEALTHY = "healthy"
    STARTING = "starting"
    DEGRADED = "degraded"
    FAILED = "failed"
    STOPPED = "stopped"
    NOT_JOINED = "not-joined"
    UNKNOWN = "unknown"

    @property
    def exit_status(self) -> int:
        """The exit status of `status`, `bootstrap`, `wait` and `explain`."""
        return _EXIT_STATUS[self]


_EXIT_STATUS = {
    State.HEALTHY: 0,
    State.FAILED: 1,
    State.DEGRADED: 2,
    State.STARTING: 3,
    State.STOPPED: 3,
    State.NOT_JOINED: 3,
    State.UNKNOWN: 4,
}


class Severity(IntEnum):
    """How much a condition takes away; ordered, so that `max` finds the worst."""

    NOTE = 0  # worth knowing, nothing is lost
    DEGRADED = 1  # still serving on the last good configuration
    FAILED = 2  # out of the mesh, or about to stay out

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Condition:
    """One thing that is wrong.

    `code` is stable and snake_case (docs/troubleshooting.md lists them); `message` is one sentence;
    `evidence` is the line it was read from, where there is one; `since` is aware and in UTC.
    """

    code: str
    severity: Severity
    message: str
    remedy: str = ""
    evidence: str = ""
    since: datetime | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """A state, its cause (`none` where nothing is wrong) and every condition, the worst first."""

    state: State
    cause: str = "none"
    conditions: tuple[Condition, ...] = ()


def worst_first(conditions: Iterable[Condition]) -> tuple[Condition, ...]:
    """Order conditions by severity; the given order is kept among equals."""
    return tuple(sorted(conditions, key=lambda condition: -condition.severity))
