"""What the flow works on, and who looks on."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Protocol

from vmmesh_agent import clock as clocks
from vmmesh_agent.clock import Clock
from vmmesh_agent.config import Config
from vmmesh_agent.errors import AgentError
from vmmesh_agent.host import Host
from vmmesh_agent.units import Units

LOCK = PurePosixPath("/run/vmmesh-agent/lock")  # whoever changes the machine holds it
STARTING = PurePosixPath(
    "/run/vmmesh-agent/starting"
)  # is there while who holds the lock waits for the sidecar's start


class Step(Protocol):
    """One step on its way."""

    def says(self, detail: str) -> None:
        """What came of it, in a few words."""

    def progress(self, done: int, total: int | None) -> None:
        """How many bytes are through."""


class Progress(Protocol):
    """Whoever wants to see the steps: a terminal, the daemon's log."""

    def step(self, name: str) -> AbstractContextManager[Step]:
        """A step begins; it ends with the block."""

    def retrying(self, trouble: AgentError) -> None:
        """An attempt failed and another will follow."""

    def note(self, text: str) -> None:
        """Something worth knowing, nothing is wrong."""

    def waiting(self) -> None:
        """Called several times a second while a step waits for somebody else."""


@dataclass(slots=True)
class World:
    """Passed in: the machine, the configuration, the clock, who looks on."""

    host: Host
    config: Config
    progress: Progress
    clock: Clock = clocks.SYSTEM
    contested: frozenset[PurePosixPath] = frozenset()  # files that somebody else writes again and again
    patience: float | None = None  # seconds for the whole; None: as long as it takes
    _began: float = field(init=False)

    def __post_init__(self) -> None:
        self._began = self.clock.seconds()

    @property
    def units(self) -> Units:
        return Units(self.host)

    def left(self) -> float | None:
        """Return how many seconds of the patience are left."""
        return None if self.patience is None else max(0.0, self._began + self.patience - self.clock.seconds())
