"""The status record: what is saved is what is loaded, and it tells no secret."""

import json
import os
from datetime import timedelta
from pathlib import Path, PurePosixPath

import pytest

from factories import EVENING, a_condition, a_report, a_unit
from vmmesh_agent import report
from vmmesh_agent.errors import FetchError
from vmmesh_agent.health import Health, Severity, State
from vmmesh_agent.host import Host
from vmmesh_agent.report import Known, from_dict, keeping_since, with_trouble

TROUBLE = FetchError(
    "mesh.example.com refuses connections", code="endpoint-refuses-connections", hint="see it", retry=True
)
EARLIER = EVENING - timedelta(hours=1)


@pytest.mark.parametrize(
    "record",
    [
        a_report(),
        a_report(State.FAILED, a_condition(since=EARLIER, evidence="a line\twith 'quotes'"), a_condition("other")),
        a_report(State.NOT_JOINED, known=Known(), certificate_not_after=None, unit=a_unit("inactive", "dead")),
        a_report(State.UNKNOWN, by_daemon=False),
    ],
    ids=str,
)
def test_a_record_survives_its_json(record: report.Report) -> None:
    assert from_dict(json.loads(json.dumps(record.as_dict()))) == record


def test_the_json_has_the_documented_keys() -> None:
    document = a_report(State.DEGRADED, a_condition(severity=Severity.DEGRADED, since=EARLIER)).as_dict()
    assert document["schema"] == "vmmesh.status/v1"
    assert {"state", "cause", "conditions", "workload", "bundle", "certificate", "sidecar", "updated_at"} < set(
        document
    )
    assert (document["state"], document["cause"]) == ("degraded", "cert_expired")
    (condition,) = document["conditions"]
    assert {"code", "severity", "message", "remedy", "since"} <= set(condition)
    assert (condition["severity"], condition["since"]) == ("degraded", "2026-03-04T19:15:30Z")
    assert document["workload"] == {"namespace": "vm", "name": "demo"}
    assert document["bundle"]["token_expires_at"] == "2026-03-04T21:07:37Z"
    assert document["certificate"]["not_after"] == "2026-03-05T19:19:30Z"
    assert document["sidecar"]["version"] == "1.28.2"
    assert document["updated_at"] == "2026-03-04T20:15:30Z"


def a_tree(tmp_path: Path, content: bytes) -> Host:
    (tmp_path / "run/vmmesh-agent").mkdir(parents=True)
    (tmp_path / "run/vmmesh-agent/status.json").write_bytes(content)
    return Host(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"null",
        b"\xff",
        b"{}",
        json.dumps(a_report().as_dict() | {"schema": "vmmesh.status/v2"}).encode(),
        json.dumps(a_report().as_dict() | {"state": "splendid"}).encode(),
        json.dumps(a_report().as_dict() | {"updated_at": None}).encode(),
        json.dumps(a_report().as_dict() | {"updated_at": "yesterday"}).encode(),
        json.dumps(a_report().as_dict() | {"conditions": [7]}).encode(),
        json.dumps(a_report().as_dict() | {"conditions": None}).encode(),
        json.dumps(a_report().as_dict() | {"sidecar": {"version": "1", "unit": {"speed": 1}}}).encode(),
        json.dumps(a_report().as_dict() | {"workload": ["vm"]}).encode(),
        json.dumps(a_report().as_dict() | {"bundle": {"token_expires_at": 7}}).encode(),
    ],
    ids=lambda content: content[:20].decode(errors="replace") + str(len(content)),
)
def test_a_record_that_cannot_be_read_is_none(content: bytes, tmp_path: Path) -> None:
    assert report.load(a_tree(tmp_path, content)) is None


def test_a_record_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert report.load(Host(tmp_path)) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="makes files of root's")
def test_a_saved_record_is_for_every_user(tmp_path: Path) -> None:
    host = Host(tmp_path)
    report.save(host, a_report())
    assert report.load(host) == a_report()
    folder, file = host.status(report.FILE.parent), host.status(report.FILE)
    assert folder
    assert file
    assert (folder.mode, file.mode) == (0o755, 0o644)
    assert host.names_in(PurePosixPath("/run/vmmesh-agent")) == ["status.json"]


# --- trouble ---


def test_without_trouble_health_is_what_the_sidecar_says() -> None:
    health = Health(State.HEALTHY)
    assert with_trouble(health, None, EVENING) is health


@pytest.mark.parametrize(
    ("state", "becomes", "severity"),
    [
        (State.HEALTHY, State.DEGRADED, Severity.DEGRADED),
        (State.DEGRADED, State.DEGRADED, Severity.DEGRADED),
        (State.UNKNOWN, State.FAILED, Severity.FAILED),
        (State.FAILED, State.FAILED, Severity.FAILED),
    ],
)
def test_trouble_becomes_a_condition(state: State, becomes: State, severity: Severity) -> None:
    health = with_trouble(Health(state), TROUBLE, EVENING)
    assert health.state is becomes
    assert health.cause == "endpoint_refuses_connections"
    (condition,) = health.conditions
    assert (condition.severity, condition.message, condition.remedy) == (severity, TROUBLE.message, "see it")


def test_a_machine_that_cannot_join_has_failed() -> None:
    assert with_trouble(Health(State.NOT_JOINED), TROUBLE, EVENING).state.exit_status != 0
    assert with_trouble(Health(State.NOT_JOINED), TROUBLE, EVENING).cause == "endpoint_refuses_connections"


def test_the_worst_leads() -> None:
    failed = Health(State.FAILED, "cert_expired", (a_condition(),))
    assert with_trouble(failed, TROUBLE, EVENING).conditions[0].severity is Severity.FAILED
    degraded = Health(State.DEGRADED, "app", (a_condition("app", Severity.NOTE),))
    assert with_trouble(degraded, TROUBLE, EVENING).cause == "endpoint_refuses_connections"


# --- since ---


def test_a_condition_keeps_the_time_at_which_it_began() -> None:
    before = Health(State.FAILED, "cert_expired", (a_condition(since=EARLIER),))
    now = Health(
        State.FAILED,
        "cert_expired",
        (a_condition(since=EVENING), a_condition("new"), a_condition("known", since=EARLIER)),
    )
    since = [condition.since for condition in keeping_since(now, before, EVENING).conditions]
    assert since == [EARLIER, EVENING, EARLIER]


def test_a_condition_that_comes_back_begins_anew() -> None:
    after = keeping_since(Health(State.FAILED, "cert_expired", (a_condition(),)), Health(State.HEALTHY), EVENING)
    assert after.conditions[0].since == EVENING
    assert keeping_since(after, None, EVENING) == after
