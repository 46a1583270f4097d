"""New lines of the sidecar's logs, and what systemd says of its unit → health."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath

from vmmesh_agent import report, x509
from vmmesh_agent.diagnosis import Diagnosis
from vmmesh_agent.errors import AgentError
from vmmesh_agent.health import Condition, Health, Severity, State
from vmmesh_agent.host import Host, LogFile
from vmmesh_agent.records import Stream
from vmmesh_agent.report import Known, Report
from vmmesh_agent.units import ISTIO, Units, UnitState

LOGS = {
    Stream.LOG: PurePosixPath("/var/log/istio/istio.log"),
    Stream.ERR: PurePosixPath("/var/log/istio/istio.err.log"),
}
_CERT_CHAIN = PurePosixPath("/etc/certs/cert-chain.pem")
_TAIL = 8 * 1024**2  # bytes of an existing log that are read back to find the run's start
_CURSOR = "-- cursor: "


@dataclass(frozen=True, slots=True)
class Observation:
    """The sidecar at one moment. `certificate_not_after` is of its own certificate, None where none can be read."""

    health: Health
    unit: UnitState
    certificate_not_after: datetime | None


class Watch:
    """Follows one sidecar. Begins with what its logs hold already; `begin_anew` leaves that out."""

    def __init__(self, host: Host, units: Units, *, known: tuple[str, Health] | None = None) -> None:
        """`known` is a unit's invocation and its health as last recorded: a log that was rotated is silent."""
        self._host = host
        self._units = units
        self._known = known
        self._diagnosis = Diagnosis()
        self._files = {stream: LogFile(host, path, tail=_TAIL) for stream, path in LOGS.items()}
        self._cursor = ""
        self._restarts = 0
        self._is_new_run = False

    def begin_anew(self) -> None:
        """Forget what was read and leave out what is there: only the run that starts now counts."""
        self._diagnosis = Diagnosis()
        self._known = None
        self._restarts = 0
        self._is_new_run = True
        for file in self._files.values():
            file.skip_to_end()
        if self._host.is_root:
            self._read_journal()
            self._diagnosis = Diagnosis()

    def observe(self, now: datetime) -> Observation:
        """Read on and judge."""
        for stream, file in self._files.items():
            while chunk := file.read():
                self._diagnosis.feed(chunk, stream)
        unit = self._units.state(ISTIO)
        if not unit.is_running or unit.restarts > self._restarts:
            # What goes wrong before the logs are opened (iptables, sudo) is told to the journal alone.
            self._read_journal()
        self._restarts = unit.restarts
        return Observation(self._health(unit, now), unit, self._certificate_end())

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _health(self, unit: UnitState, now: datetime) -> Health:
        if unit.active == "unknown":
            return Health(State.UNKNOWN, "none", (_NO_SYSTEMD,))
        if not unit.is_loaded:
            return Health(State.NOT_JOINED)
        logs = self._diagnosis.health(now)
        if unit.active == "inactive":
            return Health(State.STOPPED, "stopped", (_STOPPED,))
        if not unit.is_running and logs.state is not State.FAILED:
            return Health(State.FAILED, "agent_crashed", (_ENDS_AGAIN,))
        if logs.state is not State.UNKNOWN:
            return logs
        if self._known and self._known[0] == unit.invocation:
            return self._known[1]
        return Health(State.STARTING) if self._is_new_run else Health(State.UNKNOWN, "none", (_SILENT,))

    def _certificate_end(self) -> datetime | None:
        """Only root and istio-proxy may read the sidecar's certificate."""
        try:
            content = self._host.read(_CERT_CHAIN)
            return x509.read_pem(content.decode())[0].not_after if content else None
        except (AgentError, x509.CertificateError, UnicodeDecodeError):
            return None

    def _read_journal(self) -> None:
        """Read what the journal has of the unit since the last time."""
        since = f"--after-cursor={self._cursor}" if self._cursor else "--lines=200"
        argv = ["journalctl", "--unit", ISTIO, "--output=short-iso", "--no-pager", "--quiet", "--show-cursor", since]
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
    "Start it with: systemctl start istio",
)
_ENDS_AGAIN = Condition(
    "agent_crashed",
    Severity.FAILED,
    "The sidecar ends again and again, and its logs do not say why.",
    "Read what the start script said: journalctl -u istio -n 50",
)
_SILENT = Condition(
    "logs_silent",
    Severity.NOTE,
    "The sidecar runs, and its logs hold nothing about this run (they may have been rotated).",
    "Restart it to see it start: systemctl restart istio",
)
_NO_SYSTEMD = Condition(
    "systemd_silent",
    Severity.NOTE,
    "systemd does not say how istio.service is.",
    "See what this prints: systemctl status istio",
)


def describe(
    observation: Observation,
    *,
    known: Known | None,
    before: Report | None,
    trouble: AgentError | None,
    moment: datetime,
    by_daemon: bool,
) -> Report:
    """Put together what is known of this VM; `before` is the last record, which fills in what was known earlier."""
    health = report.with_trouble(observation.health, trouble, moment)
    return Report(
        health=report.keeping_since(health, before.health if before else None, moment),
        unit=observation.unit,
        updated_at=moment,
        known=known or (before.known if before else Known()),
        certificate_not_after=observation.certificate_not_after or (before.certificate_not_after if before else None),
        by_daemon=by_daemon,
    )
