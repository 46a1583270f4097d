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
from pathlib import PurePosixPath

from vmmesh_agent import notify, render, report
from vmmesh_agent.config import Config
from vmmesh_agent.errors import AgentError, ConfigurationError, FetchError
from vmmesh_agent.events import Events
from vmmesh_agent.host import ROOT, Host
from vmmesh_agent.log import Logger
from vmmesh_agent.reconcile import LOCK, Joined, Step, World, reconcile
from vmmesh_agent.render import Activity
from vmmesh_agent.report import Known, Report
from vmmesh_agent.signals import SKEW
from vmmesh_agent.units import Units
from vmmesh_agent.watch import Watch, describe

_ONE_DAEMON = PurePosixPath("/run/vmmesh-agent/daemon.lock")

_OBSERVE_SECONDS = 2.0
_SAVE_SECONDS = 20.0  # well within report.FRESH_SECONDS
_ATTEMPT_SECONDS = 60.0  # of fetching; then the loop looks how the sidecar is before it tries again
_FIRST_WAIT, _LONGEST_WAIT = 10.0, 600.0  # between attempts that failed
_LOOK_AT_CLOCK_SECONDS = 60.0  # until the next request, while ours and the endpoint's clock differ
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
    activity: Activity = field(default_factory=Activity, init=False)
    metrics_trouble: str = field(default="", init=False)
    watch: Watch = field(init=False)
    events: Events = field(init=False)
    looked: float = field(default=0.0, init=False)
    is_hurried: bool = field(default=False, init=False)

    def reload(self, config: Config) -> None:
        """Take over another configuration, and try at once what it says; for a signal handler, so it only notes."""
        self.config = config
        self.is_hurried = True

    def run(self) -> None:
        """Work until the process is told to end; only an exception leaves the loop."""
        self.host.require_root("the daemon")
        with self.host.lock(_ONE_DAEMON):
            self.reported = report.load(self.host)
            known = (self.reported.unit.invocation, self.reported.health) if self.reported else None
            self.watch = Watch(self.host, Units(self.host), known=known)
            self.events = Events(self.host, Units(self.host), self.log)
            notify.ready("at work")
            next_attempt = time.monotonic()
            while True:
                if self.is_hurried or time.monotonic() >= next_attempt:
                    self.is_hurried = False
                    next_attempt = time.monotonic() + self._attempt()
                self.look()
                time.sleep(_OBSERVE_SECONDS)

    def _attempt(self) -> float:
        """Reconcile once. Return for how many seconds to leave it at that."""
        progress = _Logged(self)
        world = World(self.host, self.config, progress, now=self.now, patience=_ATTEMPT_SECONDS)
        try:
            with self.host.lock(LOCK, _ATTEMPT_SECONDS):  # a person's `bootstrap` goes first
                self.joined = reconcile(world, self.watch)
        except ConfigurationError:
            raise
        except AgentError as error:
            self.trouble = error
            self.failures += 1
            if isinstance(error, FetchError) and not error.retry:  # the others were counted at each retry
                self.activity.fetch_failures[error.code] += 1
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
        if joined.clock_offset is not None and abs(joined.clock_offset) > SKEW.total_seconds():
            return _LOOK_AT_CLOCK_SECONDS
        return max(_FIRST_WAIT, (begin - now).total_seconds() + life * share)

    def look(self) -> None:
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
        known_codes = {condition.code for condition in before.health.conditions} if before else set()
        self.activity.log_events = self.watch.log_events
        self.activity.conditions.update({condition.code for condition in current.health.conditions} - known_codes)
        if is_news or before is None or (moment - before.updated_at).total_seconds() >= _SAVE_SECONDS:
            report.save(self.host, current)
            self.reported = current
            self._write_metrics(current)
        self.events.note(before, current)

    def _write_metrics(self, current: Report) -> None:
        """Write the textfile, where one is wanted; trouble is told once, and ends the daemon no more than other."""
        path = self.config.metrics.textfile
        if path is None:
            return
        trouble = ""
        try:
            self.host.write(path, render.prometheus(current, self.activity).encode(), ROOT, 0o644)
        except AgentError as error:
            trouble = error.message
        if trouble and trouble != self.metrics_trouble:
            self.log.warning("metrics not written", path=str(path), message=trouble)
        self.metrics_trouble = trouble


def _one_line(current: Report) -> str:
    health = current.health
    return str(health.state) if health.cause == "none" else f"{health.state}: {health.cause}"


class _Logged:
    """The steps as log lines."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._log = daemon.log

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        notify.alive()
        begin = time.monotonic()
        step = _LoggedStep()
        yield step
        self._daemon.activity.succeeded[name] = self._daemon.now()
        self._log.info(name, detail=step.detail, seconds=round(time.monotonic() - begin, 2))

    def retrying(self, trouble: AgentError) -> None:
        notify.alive()
        self._daemon.trouble = trouble
        self._daemon.activity.fetch_failures[trouble.code] += 1
        self._log.warning("retrying", code=trouble.code, message=trouble.message)

    def note(self, text: str) -> None:
        self._log.info("note", text=text)

    def waiting(self) -> None:
        self._daemon.look()


class _LoggedStep:
    def __init__(self) -> None:
        self.detail = ""

    def says(self, detail: str) -> None:
        self.detail = detail

    def progress(self, _done: int, _total: int | None) -> None:
        notify.alive()
