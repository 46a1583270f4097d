"""The loop: reconcile, watch, tell systemd and the status record, wait, until SIGTERM.

The daemon dies only of a wrong configuration and of bugs. Any other trouble becomes a condition in the status
record; the last good state stays in force and another attempt follows.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from vmmesh_agent import clock as clocks
from vmmesh_agent import cloudinit, credential, notify, render, report, store, trial
from vmmesh_agent import config as configuration
from vmmesh_agent.clock import Clock
from vmmesh_agent.config import Config
from vmmesh_agent.drift import Drift
from vmmesh_agent.errors import AgentError, ConfigurationError, FetchError
from vmmesh_agent.events import Events
from vmmesh_agent.health import Condition, Health, Severity, State, worst_first
from vmmesh_agent.host import ROOT, Host
from vmmesh_agent.log import Logger
from vmmesh_agent.reconcile import Joined, begin, reconcile
from vmmesh_agent.render import Activity
from vmmesh_agent.report import Known, Report
from vmmesh_agent.schedule import LONGEST_WAIT, Schedule
from vmmesh_agent.signals import SKEW
from vmmesh_agent.store import Generation
from vmmesh_agent.units import ISTIO, Units
from vmmesh_agent.watch import Observation, Watch, describe
from vmmesh_agent.world import LOCK, Step, World

_ONE_DAEMON = PurePosixPath("/run/vmmesh-agent/daemon.lock")

_OBSERVE_SECONDS = 2.0
_DRIFT_SECONDS = 10.0
_SAVE_SECONDS = 20.0  # well within report.FRESH_SECONDS
_ATTEMPT_SECONDS = 60.0  # of fetching; then the loop looks how the sidecar is before it tries again
_CONCLUDE_AGAIN_SECONDS = 60.0  # after a way back that failed
_LOOK_AT_CLOCK_SECONDS = 60.0  # until the next request, while ours and the endpoint's clock differ

# What a new token, or the sidecar's start on it, may mend: worth an attempt before its time, now and then.
_URGENT = frozenset({"cert_expired", "token_missing", "token_rejected", "root_cert_mismatch"})


class _ReloadedError(Exception):
    """Ends an attempt that waits for the network: another configuration is in force."""


def wait_for_configuration(host: Host, load: Callable[[], Config], log: Logger, clock: Clock = clocks.SYSTEM) -> Config:
    """Load the configuration. One that is not there or wrong may still become right while cloud-init is at work."""
    told = ""
    with closing(Watch(host, Units(host))) as watch:
        while True:
            is_at_work = cloudinit.is_at_work(host)  # looked at first: what it writes last is read below
            try:
                return load()
            except ConfigurationError as error:
                if not is_at_work:
                    error.hint = "\n".join(filter(None, [error.hint, cloudinit.complaint(host)]))
                    raise
                trouble = error.message.replace("\n", "; ")
            host.require_root("the daemon")
            if trouble != told:
                notify.ready("at work")  # cloud-init itself may wait for that
                log.info("waiting for cloud-init", message=trouble)
                told = trouble
            before, moment = report.load(host), clock.now()
            known = before.known if before else Known()
            current = describe(
                _waiting(watch.observe(moment, known), _awaited(f"the configuration ({trouble})")),
                known=known,
                before=before,
                trouble=None,
                moment=moment,
                by_daemon=True,
            )
            report.save(host, current)
            notify.status(_one_line(current))
            clock.sleep(_OBSERVE_SECONDS)


@dataclass
class Daemon:
    """One run of the daemon. `chance` gives numbers from 0 to 1."""

    host: Host
    config: Config
    log: Logger
    clock: Clock = clocks.SYSTEM
    chance: Callable[[], float] = random.random

    joined: Joined | None = field(default=None, init=False)
    trouble: AgentError | None = field(default=None, init=False)
    reported: Report | None = field(default=None, init=False)
    seen: Health | None = field(default=None, init=False)  # of the sidecar alone
    activity: Activity = field(default_factory=Activity, init=False)
    metrics_trouble: str = field(default="", init=False)
    watch: Watch = field(init=False)
    events: Events = field(init=False)
    drift: Drift = field(default_factory=Drift, init=False)
    looked: float = field(default=float("-inf"), init=False)
    is_hurried: bool = field(default=True, init=False)

    _schedule: Schedule = field(init=False)
    _blind: str = field(default="", init=False)  # the code of what keeps the state from being seen or told
    _trial_since: float | None = field(default=None, init=False)
    _out_since: float | None = field(default=None, init=False)
    _conclude_at: float = field(default=0.0, init=False)
    _awaited: Condition | None = field(default=None, init=False)  # what cloud-init has to write before an attempt
    _opened: Condition | None = field(default=None, init=False)
    _generation: Generation | None = field(default=None, init=False)  # in force, as far as we know
    _unmended: str = field(default="", init=False)  # the code of what keeps files from being put back
    _compared: float = field(default=0.0, init=False)

    def reload(self, config: Config) -> None:
        """Take over another configuration, and try at once what it says; for a signal handler, so it only notes."""
        self.config = config
        self._schedule.forgive()
        self.is_hurried = True

    def run(self) -> None:
        """Work until the process is told to end; only an exception leaves the loop."""
        self.host.require_root("the daemon")
        with self.host.lock(_ONE_DAEMON):
            self.begin()
            notify.ready("at work")
            while True:
                self.turn()
                self._rest()

    def begin(self) -> None:
        """Take up what was known when the last daemon ended."""
        self._schedule = Schedule(self.clock, self.chance)
        self.reported = report.load(self.host)
        known = (self.reported.unit.invocation, self.reported.health) if self.reported else None
        self.watch = Watch(self.host, Units(self.host), known=known)
        self.events = Events(self.host, Units(self.host), self.log)

    def turn(self) -> None:
        """Do what is due."""
        is_urgent = self.seen is not None and self.seen.cause in _URGENT
        if self.is_hurried or self._schedule.is_due(is_urgent=is_urgent):
            self.is_hurried = False
            self._await_cloud_init()
            if not self._awaited:
                self._attempt()
        self.look()
        self._conclude()
        self._act_on_long_failure()
        self._mend_drift()

    def _rest(self) -> None:
        """Wait a little, unless a signal said that there is something to do: sleeping itself goes on after one."""
        deadline = self.clock.seconds() + _OBSERVE_SECONDS
        while not self.is_hurried and self.clock.seconds() < deadline:
            self.clock.sleep(_OBSERVE_SECONDS / 4)

    # --- joining, and staying joined ---

    def _await_cloud_init(self) -> None:
        """See whether a file that a first join needs is still to be written by cloud-init."""
        awaited = None
        with suppress(AgentError):  # the attempt tells it better
            is_expected = store.load(self.host) is None and cloudinit.is_at_work(self.host)
            if is_expected and (missing := credential.missing(self.host, self.config)):
                awaited = _awaited(str(missing))
        if awaited != self._awaited:
            self._awaited = awaited
            self.looked = float("-inf")
            if awaited:
                self.log.info("waiting for cloud-init", message=awaited.message)

    def _attempt(self) -> None:
        """Reconcile once, and say when to do it again."""
        self._schedule.begins()
        try:
            with self.host.lock(LOCK, _ATTEMPT_SECONDS):  # a person's `bootstrap` goes first
                self.joined = reconcile(self._world(_ATTEMPT_SECONDS), self.watch)
        except ConfigurationError:
            raise
        except _ReloadedError:
            return
        except AgentError as error:
            self._undo_half_done()
            self._note_failure(error)
            self._note_trial(is_new=False)
            return
        self.tell(None)
        self._opened = None
        is_started = any(ISTIO in change for change in self.joined.changed)
        if self.joined.changed:
            self.log.info("changed", what=list(self.joined.changed))
        if is_started:  # what was seen of the run before says nothing of this one
            self.seen, self.looked = None, float("-inf")
        self._note_trial(is_new=is_started)
        self._schedule.succeeded(self.joined.bundle.token_issued_at, self.joined.bundle.token_expires_at)
        if abs(self.joined.clock_offset or 0.0) > SKEW.total_seconds():
            self._schedule.wait(_LOOK_AT_CLOCK_SECONDS)

    def _world(self, patience: float | None = None) -> World:
        return World(
            self.host,
            self.config,
            _Logged(self),
            clock=self.clock,
            contested=self.drift.contested,
            patience=patience,
        )

    def tell(self, trouble: AgentError | None) -> None:
        """Note what keeps the agent from its work, or that nothing does; what is new is reported at the next look."""
        if (trouble and trouble.code) != (self.trouble and self.trouble.code):
            self.looked = float("-inf")
        self.trouble = trouble

    def _note_failure(self, error: AgentError) -> None:
        self.tell(error)
        if isinstance(error, FetchError) and not error.retry:  # the others were counted at each retry
            self.activity.fetch_failures[error.code] += 1
        wait = self._schedule.failed(error)
        self.log.warning("attempt failed", code=error.code, message=error.message, next_attempt_seconds=round(wait))

    # --- what comes of it ---

    def _undo_half_done(self) -> None:
        try:
            with self.host.lock(LOCK):
                trial.undo_half_done(self._world())
        except AgentError as error:
            self.log.warning("not undone", code=error.code, message=error.message)

    def _note_trial(self, *, is_new: bool) -> None:
        """Remember which generation is in force, and since when it is on trial."""
        membership = store.load(self.host)
        self._generation = membership.current if membership else None
        if membership is None or not membership.is_open:
            self._trial_since = None
        elif is_new or self._trial_since is None:
            self._trial_since = self.clock.seconds()

    def _conclude(self) -> None:
        """Keep a generation that proved good; go back from one that did not."""
        if self._trial_since is None or self.seen is None or self.clock.seconds() < self._conclude_at:
            return
        if self.seen.state in {State.STOPPED, State.NOT_JOINED, State.UNKNOWN}:  # a time that does not count
            self._trial_since = self.clock.seconds()
        is_time_up = self.clock.seconds() - self._trial_since >= self.config.healthy_within
        if self.seen.state is not State.HEALTHY and not is_time_up:
            return
        try:
            with self.host.lock(LOCK):
                went_back = trial.conclude(self._world(), self.watch, self.seen, is_time_up=is_time_up)
        except AgentError as error:
            if error.code == "locked":  # somebody is at work who draws the conclusion himself
                return
            self._note_trial(is_new=False)
            if self._trial_since is None:  # a first join was undone
                self._note_failure(error)
            else:
                self.tell(error)
                self._conclude_at = self.clock.seconds() + _CONCLUDE_AGAIN_SECONDS
                self.log.warning("not concluded", code=error.code, message=error.message)
            return
        self.is_hurried = self.is_hurried or went_back
        self._note_trial(is_new=went_back or is_time_up)  # a verdict that was put off has all its time again

    def _act_on_long_failure(self) -> None:
        """Where the last good generation does no good any more, try what was given up; open the capture if wanted."""
        if self._opened and self.seen and self.seen.state is not State.STOPPED:
            self._opened = None
        if self.seen is None or self.seen.state is not State.FAILED or self._trial_since is not None:
            self._out_since = None
            return
        self._out_since = self._out_since or self.clock.seconds()
        if self.clock.seconds() - self._out_since < self.config.healthy_within:
            return
        try:
            with self.host.lock(LOCK):
                self.is_hurried = trial.acquit(self.host) or self.is_hurried
        except AgentError as error:
            self.log.warning("not acquitted", code=error.code, message=error.message)
        if self.config.on_failure.joined is configuration.Joined.OPEN:
            self._open(self.seen)

    def _open(self, seen: Health) -> None:
        self._opened = Condition(
            "capture_opened",
            Severity.FAILED,
            f"The sidecar failed ({seen.cause}) and was stopped, so that this VM has its network; it is started"
            f" again within {LONGEST_WAIT / 60:.0f} min.",
            "See why it failed: `vmmesh-agent logs`. (on_failure.joined: open)",
        )
        try:
            with self.host.lock(LOCK):
                begin(self.host)
                Units(self.host).stop(ISTIO)
        except AgentError as error:
            self.log.warning("not stopped", unit=ISTIO, code=error.code, message=error.message)
            return
        self.log.warning("opened", unit=ISTIO, cause=seen.cause)
        self._schedule.wait(LONGEST_WAIT)

    def _mend_drift(self) -> None:
        if self.clock.seconds() - self._compared < _DRIFT_SECONDS:
            return
        self._compared = self.clock.seconds()
        try:
            with self.host.lock(LOCK):
                for found in self.drift.mend(self._world(), self.watch):
                    self.log.warning("put back", found=found)
                membership = store.load(self.host)
        except AgentError as error:
            if error.code not in {"locked", self._unmended}:  # whoever is at work changes these very files
                self.log.warning("not put back", code=error.code, message=error.message)
                self._unmended = error.code
            return
        self._unmended = ""
        is_news = membership is not None and membership.current != self._generation
        is_left = membership is not None and membership.unfinished and not self._opened and not self.trouble
        if is_news or is_left:  # a person's `bootstrap` brought another, or did not come to its end
            self.is_hurried = True

    def look(self) -> None:
        """See how the sidecar is, also while an attempt waits for the network; not more often than is of use."""
        if self.clock.seconds() - self.looked >= _OBSERVE_SECONDS * 0.9:
            self.looked = self.clock.seconds()
            try:
                self._report()
                self._blind = ""
            except AgentError as error:
                if error.code != self._blind:
                    self.log.warning("not seen or not told", code=error.code, message=error.message)
                self._blind = error.code

    def _report(self) -> None:
        """Tell the status record and systemd; write only what is new, or old enough to look stale."""
        moment = self.clock.now()
        before = self.reported
        known = self.joined.known if self.joined else before.known if before else Known()
        observation = self.watch.observe(moment, known)
        self.seen = observation.health
        current = describe(
            _waiting(observation, self._awaited) if self._awaited else observation,
            known=known,
            before=before,
            also=[*trial.standing(self.host), *self.drift.conditions(), *([self._opened] if self._opened else [])],
            trouble=self.trouble,
            moment=moment,
            by_daemon=True,
        )
        notify.status(_one_line(current))
        is_news = before is None or replace(current, updated_at=before.updated_at) != before
        known_codes = {condition.code for condition in before.health.conditions} if before else set()
        self.activity.log_events = self.watch.log_events
        self.activity.conditions.update({condition.code for condition in current.health.conditions} - known_codes)
        if is_news or before is None or abs((moment - before.updated_at).total_seconds()) >= _SAVE_SECONDS:
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


def _awaited(what: str) -> Condition:
    return Condition(
        "cloud_init_at_work",
        Severity.NOTE,
        f"Waiting for cloud-init to write {what}.",
        "It goes on by itself as soon as that is there. See how far cloud-init is: `cloud-init status --long`.",
    )


def _waiting(observation: Observation, awaited: Condition) -> Observation:
    """Add what is waited for. A machine that has not joined is on its way; a sidecar that is there is as it is."""
    health = observation.health
    if health.state is State.NOT_JOINED:
        health = Health(State.STARTING, awaited.code)
    return replace(observation, health=replace(health, conditions=worst_first((*health.conditions, awaited))))


def _one_line(current: Report) -> str:
    health = current.health
    if health.cause == "cloud_init_at_work":  # what is waited for says more
        return f"{health.state}: {health.conditions[0].message}"
    return str(health.state) if health.cause == "none" else f"{health.state}: {health.cause}"


class _Logged:
    """The steps as log lines."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._log = daemon.log

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        notify.alive()
        begin = self._daemon.clock.seconds()
        step = _LoggedStep()
        yield step
        self._daemon.activity.succeeded[name] = self._daemon.clock.now()
        self._log.info(name, detail=step.detail, seconds=round(self._daemon.clock.seconds() - begin, 2))

    def retrying(self, trouble: AgentError) -> None:
        notify.alive()
        self._daemon.tell(trouble)
        self._daemon.activity.fetch_failures[trouble.code] += 1
        self._log.warning("retrying", code=trouble.code, message=trouble.message)

    def note(self, text: str) -> None:
        self._log.info("note", text=text)

    def waiting(self) -> None:
        self._daemon.look()
        if self._daemon.is_hurried:
            raise _ReloadedError


class _LoggedStep:
    def __init__(self) -> None:
        self.detail = ""

    def says(self, detail: str) -> None:
        self.detail = detail

    def progress(self, _done: int, _total: int | None) -> None:
        notify.alive()
