"""A report as text: for a person, for Nagios, for Prometheus. Pure."""

import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from vmmesh_agent import __version__
from vmmesh_agent.health import Condition, Health, Severity, State
from vmmesh_agent.report import FRESH_SECONDS, Report
from vmmesh_agent.text import printable

_COLOURS = {
    State.HEALTHY: "32",
    State.STARTING: "33",
    State.DEGRADED: "33",
    State.FAILED: "31",
    State.STOPPED: "33",
    State.NOT_JOINED: "33",
    State.UNKNOWN: "35",
}
_MARKS = {State.HEALTHY: "●", State.FAILED: "✗"}
_LABEL = 13  # columns of a fact's name


def human(report: Report, now: datetime, *, width: int = 80, colour: bool = False) -> str:
    """Return a screen that leads with the answer."""
    lines = [*_health_lines(report.health, report.known.workload, now, width, colour), ""]
    for label, fact in _facts(report, now):
        lines += _wrapped(fact, f"  {label:<{_LABEL}}", " " * (_LABEL + 2), width)
    return "\n".join(lines) + "\n"


def human_health(health: Health, *, width: int = 80, colour: bool = False) -> str:
    """Return state, cause and conditions alone, as `explain` prints them."""
    return "\n".join(_health_lines(health, "", None, width, colour)) + "\n"


def _health_lines(health: Health, subject: str, now: datetime | None, width: int, colour: bool) -> Iterator[str]:
    head = f"{_MARKS.get(health.state, '○')} {subject + ': ' if subject else ''}"
    cause = "" if health.cause == "none" else f" ({health.cause})"
    if colour:  # a terminal wraps by itself
        yield f"{head}\x1b[1;{_COLOURS[health.state]}m{health.state}\x1b[0m{cause}"
    else:
        yield from _wrapped(f"{head}{health.state}{cause}", "", "  ", width)
    for condition in health.conditions:
        yield ""
        yield from _condition_lines(condition, now, width)


def _condition_lines(condition: Condition, now: datetime | None, width: int) -> Iterator[str]:
    since = ""
    if condition.since:
        ago = f", {_span((now - condition.since).total_seconds())} ago" if now else ""
        since = f" (since {condition.since.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}{ago})"
    yield from _wrapped(condition.message + since, "  ", "  ", width)
    if condition.evidence:
        yield from _wrapped(" ".join(condition.evidence.split()), "    evidence  ", " " * 14, width, most=6)
    if condition.remedy:
        for number, line in enumerate(condition.remedy.splitlines()):
            yield from _wrapped(line, "    to do     " if number == 0 else " " * 14, " " * 14, width)


def _wrapped(text: str, first: str, rest: str, width: int, most: int = 40) -> list[str]:
    return textwrap.wrap(
        printable(text, limit=4000),
        width,
        initial_indent=first,
        subsequent_indent=rest,
        break_on_hyphens=False,
        max_lines=most,
        placeholder=" …",
    )


def _facts(report: Report, now: datetime) -> Iterator[tuple[str, str]]:
    if report.known.token_expires_at:
        yield "token", _until(report.known.token_expires_at, now)
    if report.certificate_not_after:
        yield "certificate", _until(report.certificate_not_after, now)
    if report.unit.active:
        restarts = f", {report.unit.restarts} restarts" if report.unit.restarts else ""
        process = f", process {report.unit.main_pid}" if report.unit.main_pid else ""
        version = f"{report.known.sidecar_version}, " if report.known.sidecar_version else ""
        yield "sidecar", f"{version}istio.service {report.unit.active} ({report.unit.sub}){process}{restarts}"
    if report.unseen:
        yield "not seen", f"{', '.join(report.unseen)}: that takes root"
    age = (now - report.updated_at).total_seconds()
    seen = "just now" if age < 2 else f"{_span(age)} ago"
    yield "seen", f"{seen}, by the daemon" if report.by_daemon else f"{seen}; the daemon is not running"


def _until(moment: datetime, now: datetime) -> str:
    seconds = (moment - now).total_seconds()
    when = f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"
    return f"valid for {_span(seconds)}, until {when}" if seconds > 0 else f"expired {_span(-seconds)} ago, at {when}"


def _span(seconds: float) -> str:
    """Return a length of time as a person says it: its two largest units."""
    seconds = max(0, int(seconds))
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"


# --- Nagios ---

_NAGIOS = {State.HEALTHY: (0, "OK"), State.STARTING: (1, "WARNING"), State.DEGRADED: (1, "WARNING")}
_NAGIOS |= {State.FAILED: (2, "CRITICAL"), State.STOPPED: (2, "CRITICAL"), State.NOT_JOINED: (2, "CRITICAL")}
_NAGIOS |= {State.UNKNOWN: (3, "UNKNOWN")}


def nagios(report: Report, now: datetime) -> tuple[str, int]:
    """Return the plugin's one line and its exit status (0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN)."""
    status, word = _NAGIOS[report.health.state]
    worst = report.health.conditions[0].message if report.health.conditions else str(report.health.state)
    subject = report.known.workload or "this VM"
    text = printable(f"VMMESH {word} - {subject}: {worst}").replace("|", "/")
    data = [
        f"{label}={max(0, int((moment - now).total_seconds()))}s;;;0;"
        for label, moment in (("token", report.known.token_expires_at), ("certificate", report.certificate_not_after))
        if moment
    ]
    return (f"{text} | {' '.join(data)}" if data else text), status


# --- Prometheus ---


@dataclass(slots=True)
class Activity:
    """What a daemon has done and seen since it began: its counters start at 0 with it.

    When each step last succeeded by its name (aware times), how many attempts of fetching failed by the error's
    code, how many conditions have begun by their code, and how many messages of the sidecar's logs named a cause.
    """

    succeeded: dict[str, datetime] = field(default_factory=dict)
    fetch_failures: Counter[str] = field(default_factory=Counter)
    conditions: Counter[str] = field(default_factory=Counter)
    log_events: Counter[str] = field(default_factory=Counter)


def prometheus(report: Report, activity: Activity | None = None) -> str:
    """Return the report in the text exposition format, for node_exporter's textfile collector.

    What only a running daemon knows is left out where there is no `activity`.
    """
    activity = activity or Activity()
    lines: list[str] = []

    def metric(name: str, help_text: str, samples: list[tuple[str, float]], kind: str = "gauge") -> None:
        if samples:
            lines.extend([f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"])
            lines.extend(
                f"{name}{labels} {value:g}" if value < 1e6 else f"{name}{labels} {value:.0f}"
                for labels, value in samples
            )

    def counter(name: str, help_text: str, counts: Counter[str]) -> None:
        metric(name, help_text, [(_labels(code=code), float(n)) for code, n in sorted(counts.items())], "counter")

    namespace, _, group = report.known.workload.partition("/")
    metric(
        "vmmesh_agent_info",
        "Versions and the WorkloadGroup of this VM; always 1.",
        [
            (
                _labels(
                    version=__version__,
                    istio_version=report.known.sidecar_version,
                    namespace=namespace,
                    workload_group=group,
                ),
                1.0,
            )
        ],
    )
    metric(
        "vmmesh_agent_state",
        "The state of this VM in the mesh: 1 for the one it is in.",
        [(_labels(state=state), float(state is report.health.state)) for state in State],
    )
    worst = {condition.code: condition.severity for condition in reversed(report.health.conditions)}
    metric(
        "vmmesh_agent_condition",
        "What is wrong, by code: 1 degraded, 2 failed.",
        [(_labels(code=code), float(severity)) for code, severity in worst.items() if severity > Severity.NOTE],
    )
    for name, what, moment in (
        ("token", "the token", report.known.token_expires_at),
        ("cert", "the sidecar's certificate", report.certificate_not_after),
    ):
        stamps = [("", moment.timestamp())] if moment else []
        metric(f"vmmesh_agent_{name}_expiry_timestamp_seconds", f"When {what} expires, as a Unix time.", stamps)
    metric(
        "vmmesh_agent_istio_restarts",
        "How often systemd has restarted istio.service by itself since it was last started by hand.",
        [("", float(report.unit.restarts))],
    )
    metric(
        "vmmesh_agent_last_success_timestamp_seconds",
        "When the daemon last ended a step of joining without failure, as a Unix time.",
        [(_labels(operation=step), moment.timestamp()) for step, moment in activity.succeeded.items()],
    )
    counter(
        "vmmesh_agent_fetch_failures_total",
        "Failed attempts to get the bundle or the package, by the error's code, since the daemon began.",
        activity.fetch_failures,
    )
    counter(
        "vmmesh_agent_conditions_total",
        "Conditions that have begun since the daemon began, by their code.",
        activity.conditions,
    )
    counter(
        "vmmesh_agent_log_events_total",
        "Messages of the sidecar's logs that name a cause, by its code, since the daemon began.",
        activity.log_events,
    )
    metric(
        "vmmesh_agent_updated_timestamp_seconds",
        f"When this was last seen, as a Unix time; stale after {FRESH_SECONDS} s.",
        [("", report.updated_at.timestamp())],
    )
    return "\n".join(lines) + "\n"


def _labels(**labels: str) -> str:
    escaped = (f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{','.join(escaped)}}}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
