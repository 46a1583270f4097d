"""The loop: reconcile, watch, tell systemd and the status record, wait, until SIGTERM.

The daemon dies only of a wrong configuration and of bugs. Any other trouble becomes a condition in the status
record; the last good state stays in force and another attempt follows.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from vmmesh_agent import notify, report
from vmmesh_agent.config import Config
from vmmesh_agent.errors import AgentError, ConfigurationError
from vmmesh_agent.host import Host
from vmmesh_agent.log import Logger
from vmmesh_agent.reconcile import LOCK, Joined, Step, World, reconcile
from vmmesh_agent.report import Known, Report
from vmmesh_agent.units import Units
from vmmesh_agent.watch import Watch, describe

_OBSERVE_SECONDS = 2.0
_SAVE_SECONDS = 20.0  # well within report.FRESH_SECONDS
_ATTEMPT_SECONDS = 60.0  # of fetching; then the loop looks how the sidecar is before it tries again
_FIRST_WAIT, _LONGEST_WAIT = 10.0, 600.0  # between attempts that failed
_REFRESH = (0.5, 0.7)  # of the token's life; where in between is chance, so that a fleet does not come at once


@dataclass
class Daemon:
    """One run of the daemon. `now` is the clock, `chance` gives numbers from 0 to 1."""

    host: Host
    config: Config
    log: Logger
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    chance: Callable[[], float] = random.random

    joined: Joined | None = field(default=None, init=False)
    trouble: AgentError | None = field(default=None, init=False)
    failures: int = field(default=0, init=False)
    reported: Report | None = field(default=None, init=False)
    watch: Watch = field(init=False)
    looked: float = field(default=0.0, init=False)

    def run(self) -> None:
        """Work until the process is told to end; only an exception leaves the loop."""
        self.host.require_root("the daemon")
        with self.host.lock(LOCK):
            self.reported = report.load(self.host)
            known = (self.reported.unit.invocation, self.reported.health) if self.reported else None
            self.watch = Watch(self.host, Units(self.host), known=known)
            notify.ready("at work")
            next_attempt = time.monotonic()
            while True:
                if time.monotonic() >= next_attempt:
                    next_attempt = time.monotonic() + self._attempt()
                self._look()
                time.sleep(_OBSERVE_SECONDS)

    def _attempt(self) -> float:
        """Reconcile once. Return for how many seconds to leave it at that."""
        progress = _Logged(self.log, self._look)
        world = World(self.host, self.config, progress, now=self.now, patience=_ATTEMPT_SECONDS)
        try:
            self.joined = reconcile(world, self.watch)
        except ConfigurationError:
            raise
        except AgentError as error:
            self.trouble = error
            self.failures += 1
            wait = self._back_off()
            self.log.warning("attempt failed", code=error.code, message=error.message, next_attempt_seconds=round(wait))
            return wait
        self.trouble = None
        self.failures = 0
        if self.joined.changed:
            self.log.info("changed", what=list(self.joined.changed))
        return self._until_refresh(self.joined)

    def _back_off(self) -> float:
        """Exponential with full jitter; a refusal is not hammered."""
        floor = _FIRST_WAIT if self.trouble and self.trouble.retry else _FIRST_WAIT * 6
        return floor + self.chance() * min(_LONGEST_WAIT, _FIRST_WAIT * 2.0 ** min(self.failures, 10))

    def _until_refresh(self, joined: Joined) -> float:
        """Return the seconds until the token has used up half of its life and some more."""
        low, high = _REFRESH
        now = self.now()
        begin = joined.bundle.token_issued_at or now
        life = (joined.bundle.token_expires_at - begin).total_seconds()
        share = low + (high - low) * self.chance()
        return max(_FIRST_WAIT, (begin - now).total_seconds() + life * share)

    def _look(self) -> None:
        """See how the sidecar is, also while an attempt waits for the network; not more often than is of use."""
        if time.monotonic() - self.looked >= _OBSERVE_SECONDS * 0.9:
            self.looked = time.monotonic()
            self._report()

    def _report(self) -> None:
        """Tell the status record and systemd; write only what is new, or old enough to look stale."""
        moment = self.now()
        before = self.reported
        known = self.joined.known if self.joined else before.known if before else Known()
        current = describe(
            self.watch.observe(moment, known),
            known=known,
            before=before,
            trouble=self.trouble,
            moment=moment,
            by_daemon=True,
        )
        notify.status(_one_line(current))
        is_news = before is None or replace(current, updated_at=before.updated_at) != before
        if before and before.health.state != current.health.state:
            self.log.info("state", state=str(current.health.state), cause=current.health.cause)
        if is_news or before is None or (moment - before.updated_at).total_seconds() >= _SAVE_SECONDS:
            report.save(self.host, current)
            self.reported = current


def _one_line(current: Report) -> str:
    health = current.health
    return str(health.state) if health.cause == "none" else f"{health.state}: {health.cause}"


class _Logged:
    """The steps as log lines."""

    def __init__(self, log: Logger, look: Callable[[], None]) -> None:
        self._log = log
        self._look = look

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        notify.alive()
        begin = time.monotonic()
        step = _LoggedStep()
        yield step
        self._log.info(name, detail=step.detail, seconds=round(time.monotonic() - begin, 2))

    def retrying(self, trouble: AgentError) -> None:
        notify.alive()
        self._log.warning("retrying", code=trouble.code, message=trouble.message)

    def note(self, text: str) -> None:
        self._log.info("note", text=text)

    def waiting(self) -> None:
        self._look()


class _LoggedStep:
    def __init__(self) -> None:
        self.detail = ""

    def says(self, detail: str) -> None:
        self.detail = detail

    def progress(self, _done: int, _total: int | None) -> None:
        notify.alive()
