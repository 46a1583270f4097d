"""New lines of the sidecar's logs, and what systemd says of its unit → health."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath

from vmmesh_agent import report, signals
from vmmesh_agent.diagnosis import Diagnosis
from vmmesh_agent.errors import AgentError
from vmmesh_agent.health import Condition, Health, Severity, State, worst_first
from vmmesh_agent.host import Host, LogFile
from vmmesh_agent.records import Stream
from vmmesh_agent.report import Known, Report
from vmmesh_agent.signals import Expected, Signals
from vmmesh_agent.units import ISTIO, Units, UnitState

LOGS = {
    Stream.LOG: PurePosixPath("/var/log/istio/istio.log"),
    Stream.ERR: PurePosixPath("/var/log/istio/istio.err.log"),
}
CLUSTER_ENV = PurePosixPath("/var/lib/istio/envoy/cluster.env")
_TAIL = 8 * 1024**2  # bytes of an existing log that are read back to find the run's start
_CURSOR = "-- cursor: "
_SILENCE = timedelta(seconds=30)  # of systemd's, before it is said
_LOOP = timedelta(seconds=30)  # between two ends of a crash loop: RestartSec=10, and what a start takes
_START = timedelta(seconds=60)  # what a start may take before its silence means something
_GRACE = timedelta(seconds=20)  # after a start, before ports, certificate and capture are missed

# What a failed sidecar brings with it: no news beside the cause.
_CONSEQUENCES = frozenset({"agent_silent", "envoy_silent", "iptables_failed", "renewal_overdue"})


@dataclass(frozen=True, slots=True)
class Observation:
    """The sidecar at one moment: what follows from all signals, and what the record shows of them."""

    health: Health
    unit: UnitState
    certificate_not_after: datetime | None
    unseen: tuple[str, ...]


class Watch:
    """Follows one sidecar. Begins with what its logs hold already; `begin_anew` leaves that out."""

    def __init__(
        self, host: Host, units: Units, *, known: tuple[str, Health] | None = None, follows: bool = True
    ) -> None:
        """`known` is a unit's invocation and its health as last recorded: a log that was rotated is silent.

        One that `follows` looks again and again, and reports of the machine only what it saw twice.
        """
        self._host = host
        self._units = units
        self._known = known
        self._diagnosis = Diagnosis()
        self._files = {stream: LogFile(host, path, tail=_TAIL) for stream, path in LOGS.items()}
        self._cursor = ""
        self._restarts = 0
        self._is_following = follows
        self._invocation: str | None = None
        self._running_since = datetime.min.replace(tzinfo=UTC)
        self._seen: dict[str, datetime] = {}
        self._loop: tuple[datetime, Health] | None = None
        self._judged: tuple[datetime, Health] | None = None
        self._has_looked = False
        self.log_events: Counter[str] = Counter()  # messages by the cause that they name, since the first look

    def begin_anew(self) -> None:
        """Forget what was read and leave out what is there: only the run that starts now counts."""
        self._diagnosis = Diagnosis()
        self._known = None
        self._restarts = 0
        self._invocation = ""  # whatever starts now is new
        for file in self._files.values():
            file.skip_to_end()
        if self._host.is_root:
            self._read_journal()
            self._diagnosis = Diagnosis()

    def observe(self, now: datetime, known: Known) -> Observation:
        """Read on, look at the machine, and judge; `known` is what joining told."""
        raised = self._diagnosis.raised.copy()
        for stream, file in self._files.items():
            while chunk := file.read():
                self._diagnosis.feed(chunk, stream)
        unit = self._units.state(ISTIO)
        if not unit.is_running or unit.restarts > self._restarts:
            # What goes wrong before the logs are opened (iptables, sudo) is told to the journal alone.
            self._read_journal()
        self._restarts = unit.restarts
        if self._has_looked:
            self.log_events += self._diagnosis.raised - raised
        self._has_looked = True
        self._note_start(unit, now)
        seen = signals.gather(self._host, known.istiod, now)
        health = self._combined(self._health(unit, seen, now), unit, seen, known, now)
        if unit.active != "unknown":
            self._judged = (now, health)
        return Observation(
            health,
            unit,
            seen.certificate_not_after,
            seen.unseen,
        )

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _health(self, unit: UnitState, seen: Signals, now: datetime) -> Health:
        """Judge by unit and logs; the unit says which run the logs may speak of."""
        logs = self._diagnosis.health(now)
        match unit.active, unit.sub:
            case "unknown", _:  # while it reads its units anew it answers nobody for some seconds
                lately = self._judged and now - self._judged[0] < _SILENCE
                return self._judged[1] if self._judged and lately else Health(State.UNKNOWN, "none", (_NO_SYSTEMD,))
            case _ if not unit.is_loaded:
                return Health(State.NOT_JOINED)
            case "inactive", _ if self._host.status(CLUSTER_ENV) is None:  # the package alone is no membership
                return Health(State.NOT_JOINED)
            case "inactive", _:
                return Health(State.STOPPED, "stopped", (_STOPPED,))
            case "deactivating", _:  # somebody stops or restarts it; draining takes up to TimeoutStopSec=30
                return Health(State.DEGRADED, "stopping", (_STOPPING,))
            case ("failed", _) | ("activating", "auto-restart"):
                return self._keeping_cause(logs if logs.state is State.FAILED else _ENDS_AGAIN, now)
            case "activating", _:
                return Health(State.STARTING)
        if logs.state in {State.UNKNOWN, State.STOPPED}:  # nothing of this run: rotated, or no line could be written
            return self._without_logs(unit, seen, now)
        if logs.state is State.HEALTHY and seen.envoy_answers is False and now - self._running_since < _GRACE:
            return Health(State.STARTING)
        return self._keeping_cause(logs, now)

    def _without_logs(self, unit: UnitState, seen: Signals, now: datetime) -> Health:
        if self._known and self._known[0] == unit.invocation:
            return self._known[1]
        if now - self._running_since < _START:
            return Health(State.STARTING)
        state = State.HEALTHY if seen.envoy_answers else State.UNKNOWN
        return Health(state, "none", (_SILENT,))

    def _keeping_cause(self, health: Health, now: datetime) -> Health:
        """In a crash loop the reason comes a few seconds after the end: until then the last run's stands."""
        if health.cause == "agent_crashed" and self._loop and now - self._loop[0] < _LOOP:
            return self._loop[1]
        self._loop = (now, health) if health.state is State.FAILED else None
        return health

    def _note_start(self, unit: UnitState, now: datetime) -> None:
        """Remember since when this start of the unit is known: what it has not done yet is no failure at first."""
        if unit.invocation != self._invocation:
            # A unit that ran before we looked has had its time; one that changes under our eyes has it before it.
            self._running_since = now if self._invocation is not None else now - _START
            self._invocation = unit.invocation

    def _combined(self, logs: Health, unit: UnitState, seen: Signals, known: Known, now: datetime) -> Health:
        """Add what the machine shows to what logs and unit say. A word of the logs goes before the same of others."""
        expected = Expected(
            known.istiod,
            known.istiod_addresses,
            None if known.clock_offset is None else timedelta(seconds=known.clock_offset),
        )
        is_changing = unit.active in {"activating", "deactivating"}
        if (
            logs.state is State.NOT_JOINED
            or unit.active == "unknown"
            or is_changing
            or (unit.is_running and now - self._running_since < _GRACE)
        ):
            return logs
        logs = replace(logs, conditions=tuple(signals.sharpened(each, seen, now) for each in logs.conditions))
        causes = {condition.code for condition in logs.conditions}
        found = [
            condition
            for condition in signals.conditions(seen, expected, is_running=unit.is_running, now=now)
            if condition.code not in causes and not (logs.state is State.FAILED and condition.code in _CONSEQUENCES)
        ]
        return _with_conditions(logs, self._lasting(found, now))

    def _lasting(self, found: list[Condition], now: datetime) -> list[Condition]:
        """Leave out what was seen only once: one look may fall into a restart or a rotation."""
        before = self._seen
        self._seen = {condition.code: before.get(condition.code, now) for condition in found}
        if not self._is_following:
            return found
        return [condition for condition in found if condition.code in before]

    def _read_journal(self) -> None:
        """Read what the journal has of the unit since the last time."""
        since = f"--after-cursor={self._cursor}" if self._cursor else "--lines=200"
        tree = [] if self._host.is_running else [f"--root={self._host.root}"]
        form = ["--output=short-iso", "--no-pager", "--quiet", "--show-cursor"]
        argv = ["journalctl", *tree, "--unit", ISTIO, *form, since]
        lines = self._host.run(argv, timeout=10, check=False).stdout.splitlines(keepends=True)
        for line in lines:
            if line.startswith(_CURSOR):
                self._cursor = line.removeprefix(_CURSOR).strip()
            else:
                self._diagnosis.feed(line.encode(), Stream.JOURNAL)


_STOPPED = Condition(
    "stopped",
    Severity.NOTE,
    "The sidecar is stopped: istio.service is not running.",
    "Start it: `systemctl start istio`.",
)
_STOPPING = Condition(
    "stopping",
    Severity.DEGRADED,
    "The sidecar is being stopped; it lets its connections end first.",
    "Wait half a minute, then see `systemctl status istio`.",
)
_ENDS_AGAIN = Health(
    State.FAILED,
    "agent_crashed",
    (
        Condition(
            "agent_crashed",
            Severity.FAILED,
            "The sidecar ends again and again, and its logs do not say why.",
            "Read what the start script said: `journalctl -u istio -n 50`.",
        ),
    ),
)
_SILENT = Condition(
    "logs_silent",
    Severity.NOTE,
    "The sidecar runs, and its logs hold nothing about this run (they may have been rotated).",
    "Restart it to see it start: `systemctl restart istio`.",
)
_NO_SYSTEMD = Condition(
    "systemd_silent",
    Severity.NOTE,
    "systemd does not say how istio.service is.",
    "See what `systemctl status istio` prints.",
)


def _with_conditions(health: Health, found: Sequence[Condition]) -> Health:
    if not found:
        return health
    conditions = worst_first((*health.conditions, *found))
    worst = conditions[0]
    if worst.severity is Severity.NOTE:
        return replace(health, conditions=conditions)
    state = State.FAILED if worst.severity is Severity.FAILED else State.DEGRADED
    # A sidecar that is stopped or starting does not become "degraded" by what else is wrong.
    keeps = health.state in {State.STOPPED, State.STARTING, State.FAILED, State.NOT_JOINED}
    return Health(health.state if keeps else state, health.cause if keeps else worst.code, conditions)


def describe(
    observation: Observation,
    *,
    known: Known,
    before: Report | None,
    trouble: AgentError | None,
    moment: datetime,
    by_daemon: bool,
    also: Sequence[Condition] = (),
) -> Report:
    """Put together what is known of this VM.

    `before` is the last record, which fills in what was known earlier; `also` is what the agent itself has to say.
    """
    health = report.with_trouble(_with_conditions(observation.health, also), trouble, moment)
    return Report(
        health=report.keeping_since(health, before.health if before else None, moment),
        unit=observation.unit,
        updated_at=moment,
        known=known,
        certificate_not_after=observation.certificate_not_after,
        unseen=observation.unseen,
        by_daemon=by_daemon,
    )
