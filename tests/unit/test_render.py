"""A report as text, to the letter."""

import re
from datetime import timedelta

import pytest

from factories import EVENING, a_condition, a_report, a_unit
from vmmesh_agent.health import Health, Severity, State
from vmmesh_agent.render import human, human_health, nagios, prometheus
from vmmesh_agent.report import Known, Report

LATER = EVENING + timedelta(seconds=4)
ESCAPE = "\x1b"

HEALTHY = """\
● vm/demo: healthy

  token        valid for 52 min 3 s, until 2026-03-04 21:07:37Z
  certificate  valid for 23 h 3 min, until 2026-03-05 19:19:30Z
  sidecar      1.28.2, istio.service active (running), process 4711
  seen         4 s ago, by the daemon
"""
EXPIRED = """\
✗ vm/demo: failed (cert_expired)

  The certificate has expired. (since 2026-03-04 18:15:30Z, 2 h 0 min ago)
    evidence  2026-03-04T18:15:30.000000Z warn cert expired, using token instead
    to do     Have a new token made.
              Then restart the sidecar: systemctl restart istio

  The token has expired.
    to do     Have a new token made.

  token        expired 1 h 0 min ago, at 2026-03-04 19:15:30Z
  sidecar      istio.service activating (auto-restart), 12 restarts
  seen         4 s ago; the daemon is not running
"""


def an_expired_report() -> Report:
    return a_report(
        State.FAILED,
        a_condition(
            since=EVENING - timedelta(hours=2),
            evidence="2026-03-04T18:15:30.000000Z\twarn\tcert expired, using token instead\n",
            remedy="Have a new token made.\nThen restart the sidecar: systemctl restart istio",
        ),
        a_condition("token_expired", message="The token has expired."),
        known=Known("vm/demo", EVENING - timedelta(hours=1)),
        certificate_not_after=None,
        unit=a_unit("activating", "auto-restart", main_pid=0, restarts=12),
        by_daemon=False,
    )


def test_a_healthy_machine_is_told_in_six_lines() -> None:
    assert human(a_report(), LATER) == HEALTHY


def test_a_failed_machine_is_told_with_cause_evidence_and_remedy() -> None:
    assert human(an_expired_report(), LATER) == EXPIRED


def test_health_alone_is_what_explain_prints() -> None:
    health = Health(State.FAILED, "cert_expired", (a_condition(),))
    assert human_health(health) == (
        "✗ failed (cert_expired)\n\n  The certificate has expired.\n    to do     Have a new token made.\n"
    )
    assert human_health(Health(State.HEALTHY)) == "● healthy\n"


@pytest.mark.parametrize(
    ("ago", "said"),
    [
        (timedelta(0), "just now"),
        (timedelta(seconds=-3), "just now"),
        (timedelta(seconds=59), "59 s ago"),
        (timedelta(minutes=3), "3 min 0 s ago"),
        (timedelta(hours=26), "1 d 2 h ago"),
    ],
)
def test_lengths_of_time_are_said_in_their_two_largest_units(ago: timedelta, said: str) -> None:
    assert f"  seen         {said}, by the daemon\n" in human(a_report(), EVENING + ago)


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_line_is_longer_than_the_terminal_is_wide(width: int) -> None:
    long = "word " * 100 + "x" * 300 + " http://" + "y" * 150
    report = a_report(
        State.FAILED,
        a_condition("autoregistration_failed", message=long, evidence=long, remedy=f"{long}\n{long}", since=EVENING),
        known=Known("production/payments-backend", None, "1.28.2"),
        unit=a_unit(restarts=100_000),
    )
    for text in (human(report, LATER, width=width), human_health(report.health, width=width)):
        assert [line for line in text.splitlines() if len(line) > width] == []
        assert [line for line in text.splitlines() if line != line.rstrip()] == []


def test_colour_is_added_only_where_it_is_asked_for() -> None:
    for state in State:
        plain = human(a_report(state), LATER)
        coloured = human(a_report(state), LATER, colour=True)
        assert ESCAPE not in plain
        assert ESCAPE in coloured
        assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain


def test_what_a_log_says_cannot_steer_the_terminal() -> None:
    hostile = f"a{ESCAPE}[2Jb\x07\x9b2J\rc\u202e"
    report = a_report(State.FAILED, a_condition(message=hostile, evidence=hostile, remedy=hostile))
    for text in (human(report, LATER), human_health(report.health), nagios(report, LATER)[0]):
        assert [letter for letter in text if not letter.isprintable() and letter != "\n"] == []


# --- Nagios ---


@pytest.mark.parametrize(
    ("state", "status", "word"),
    [
        (State.HEALTHY, 0, "OK"),
        (State.DEGRADED, 1, "WARNING"),
        (State.STARTING, 1, "WARNING"),
        (State.FAILED, 2, "CRITICAL"),
        (State.STOPPED, 2, "CRITICAL"),
        (State.NOT_JOINED, 2, "CRITICAL"),
        (State.UNKNOWN, 3, "UNKNOWN"),
    ],
)
def test_nagios_gets_one_line_and_its_status(state: State, status: int, word: str) -> None:
    line, exit_status = nagios(a_report(state), LATER)
    assert exit_status == status
    assert line == f"VMMESH {word} - vm/demo: {state} | token=3123s;;;0; certificate=83036s;;;0;"


def test_nagios_gets_the_worst_of_what_is_wrong() -> None:
    line, _ = nagios(a_report(State.FAILED, a_condition(message="It is\nbroken | badly"), a_condition("b")), LATER)
    assert line.startswith("VMMESH CRITICAL - vm/demo: It is broken / badly | token=")
    assert line.count("|") == 1


def test_nagios_gets_no_data_where_there_is_none() -> None:
    line, _ = nagios(a_report(State.NOT_JOINED, known=Known(), certificate_not_after=None), LATER)
    assert line == "VMMESH CRITICAL - this VM: not-joined"


def test_an_expired_token_has_no_seconds_left() -> None:
    assert " | token=0s;;;0;" in nagios(an_expired_report(), LATER)[0]


# --- Prometheus ---

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
SAMPLE = re.compile(rf"({NAME})(?:\{{({LABEL}(?:,{LABEL})*)\}})? (-?[0-9.]+(?:e[+-]?[0-9]+)?)")
PREAMBLE = re.compile(rf"# (HELP|TYPE) ({NAME}) (.+)")


def metrics(text: str) -> dict[str, dict[str, float]]:
    """Read the text exposition format as strictly as its definition allows; return name → labels → value."""
    assert text.endswith("\n")
    found: dict[str, dict[str, float]] = {}
    current = ""
    expected = "HELP"
    for line in text.splitlines():
        if preamble := PREAMBLE.fullmatch(line):
            kind, name, rest = preamble.groups()
            assert kind == expected
            if kind == "HELP":
                assert name not in found
                found[name] = {}
                current, expected = name, "TYPE"
            else:
                assert (name, rest) == (current, "gauge")
                expected = "HELP"
            continue
        sample = SAMPLE.fullmatch(line)
        assert sample, line
        name, labels, value = sample.groups()
        assert (name, expected) == (current, "HELP")
        assert (labels or "") not in found[name], line
        found[name][labels or ""] = float(value)
    assert all(found.values())
    return found


def test_prometheus_gets_well_formed_text_of_documented_names() -> None:
    read = metrics(prometheus(a_report(State.DEGRADED, a_condition(severity=Severity.DEGRADED))))
    states = read["vmmesh_agent_state"]
    assert {labels for labels, value in states.items() if value == 1} == {'state="degraded"'}
    assert len(states) == len(State)
    assert read["vmmesh_agent_condition"] == {'code="cert_expired"': 1}
    assert read["vmmesh_agent_token_expiry_timestamp_seconds"] == {"": (EVENING + timedelta(seconds=3127)).timestamp()}
    assert read["vmmesh_agent_updated_timestamp_seconds"] == {"": EVENING.timestamp()}
    assert all(name.startswith("vmmesh_agent_") for name in read)


def test_prometheus_gets_nothing_for_what_is_not_known() -> None:
    read = metrics(prometheus(a_report(State.NOT_JOINED, known=Known(), certificate_not_after=None)))
    assert not [name for name in read if "expiry" in name]
    assert "vmmesh_agent_condition" not in read


def test_prometheus_gets_each_series_once_though_two_say_the_same() -> None:
    twice = (a_condition("disk_full"), a_condition("disk_full", Severity.DEGRADED), a_condition("note", Severity.NOTE))
    assert metrics(prometheus(a_report(State.FAILED, *twice)))["vmmesh_agent_condition"] == {'code="disk_full"': 2}


def test_many_restarts_stay_a_plain_number() -> None:
    read = metrics(prometheus(a_report(unit=a_unit(restarts=123_456_789))))
    assert 123_456_789 in [value for samples in read.values() for value in samples.values()]
