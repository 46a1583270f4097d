"""Who is told when the state changes: the journal, the target, the hooks."""

import json
import os
from datetime import timedelta
from pathlib import Path, PurePosixPath

import pytest

from factories import EVENING, a_condition, a_report
from vmmesh_agent.errors import HostError
from vmmesh_agent.events import HOOKS, MESSAGE_ID, READY, READY_MARK, Events
from vmmesh_agent.health import Severity, State
from vmmesh_agent.host import Host
from vmmesh_agent.report import Report
from vmmesh_agent.units import Units

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="hooks and their folder belong to root")


class FakeUnits(Units):
    """A systemd that keeps which units were asked to run."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.running: set[str] = set()
        self.asked: list[str] = []
        self.is_broken = False

    def request_start(self, unit: str) -> None:
        self._asked("start", unit)
        self.running.add(unit)

    def request_stop(self, unit: str) -> None:
        self._asked("stop", unit)
        self.running.discard(unit)

    def _asked(self, verb: str, unit: str) -> None:
        self.asked.append(f"{verb} {unit}")
        if self.is_broken:
            raise HostError("systemd does not answer", code="command-timeout")


class Log:
    """A log that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, object]]] = []

    def info(self, event: str, **values: object) -> None:
        self.lines.append((event, values))

    warning = info

    def values(self, event: str, key: str) -> list[object]:
        return [values.get(key) for name, values in self.lines if name == event]


class World:
    """A machine with its daemon's events; reports follow each other two seconds apart."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self.host = Host(tree)
        self.units = FakeUnits(self.host)
        self.log = Log()
        self.journal: list[tuple[str, dict[str, str]]] = []
        self.events = self.new_daemon()
        self.before: Report | None = None
        self.moment = EVENING
        (tree / "run/vmmesh-agent").mkdir(parents=True)

    def new_daemon(self) -> Events:
        return Events(self.host, self.units, self.log, lambda message, fields: self.journal.append((message, fields)))

    def is_now(self, state: State, *codes: str, seconds: float = 2) -> None:
        self.moment += timedelta(seconds=seconds)
        conditions = [a_condition(code, Severity.FAILED) for code in codes]
        current = a_report(state, *conditions, updated_at=self.moment)
        self.events.note(self.before, current)
        self.before = current

    @property
    def is_reached(self) -> bool:
        marked = (self.tree / READY_MARK.relative_to("/")).exists()
        assert marked == (READY in self.units.running)
        return marked

    def hook(self, name: str, script: str, mode: int = 0o755) -> Path:
        path = self.tree / HOOKS.relative_to("/") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(mode)
        return path


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# --- the journal ---


def test_each_change_of_state_or_cause_is_one_entry_with_fields(world: World) -> None:
    world.is_now(State.HEALTHY)
    world.is_now(State.HEALTHY)
    world.is_now(State.FAILED, "token_rejected")
    world.is_now(State.FAILED, "istiod_unreachable", "token_rejected")
    assert [fields["VMMESH_STATE"] for _, fields in world.journal] == ["healthy", "failed", "failed"]
    assert [fields["VMMESH_CAUSE"] for _, fields in world.journal] == ["none", "token_rejected", "istiod_unreachable"]
    assert {fields["MESSAGE_ID"] for _, fields in world.journal} == {MESSAGE_ID}
    assert world.journal[1][1]["VMMESH_PREVIOUS_STATE"] == "healthy"
    assert world.journal[2][1]["VMMESH_CONDITIONS"] == "istiod_unreachable token_rejected"
    assert world.journal[1][0].startswith("vm/demo is failed (token_rejected), was healthy: ")


def test_a_daemon_that_starts_again_does_not_tell_what_was_told(world: World) -> None:
    world.is_now(State.HEALTHY)
    world.events = world.new_daemon()
    world.is_now(State.HEALTHY)
    assert len(world.journal) == 1


# --- the target ---


def test_the_target_is_reached_when_the_sidecar_serves_and_not_before(world: World) -> None:
    for state in (State.NOT_JOINED, State.STARTING, State.FAILED, State.STARTING):
        world.is_now(state)
        assert not world.is_reached
    world.is_now(State.HEALTHY)
    assert world.is_reached
    assert world.units.asked == [f"start {READY}"]


def test_an_application_that_waits_for_the_target_may_be_the_one_whose_probe_fails(world: World) -> None:
    world.is_now(State.DEGRADED, "app_probe_failing")
    assert world.is_reached


def test_a_sidecar_that_is_going_down_does_not_reach_the_target(world: World) -> None:
    world.is_now(State.DEGRADED, "stopping")
    assert not world.is_reached


@pytest.mark.parametrize("state", [State.FAILED, State.STOPPED, State.NOT_JOINED])
def test_the_target_is_given_up_when_the_sidecar_stays_out(world: World, state: State) -> None:
    world.is_now(State.HEALTHY)
    world.is_now(state)
    world.is_now(state, seconds=10)
    assert world.is_reached
    world.is_now(state, seconds=10)
    assert not world.is_reached
    world.is_now(State.HEALTHY)
    assert world.is_reached


def test_a_restart_of_the_sidecar_does_not_stop_the_applications(world: World) -> None:
    world.is_now(State.HEALTHY)
    for _ in range(10):
        world.is_now(State.STOPPED, seconds=10)
        world.is_now(State.STARTING, seconds=10)
    assert world.is_reached
    assert world.units.asked == [f"start {READY}"]


def test_an_application_that_waits_for_its_first_time_is_not_refused_by_a_failure(world: World) -> None:
    for _ in range(20):
        world.is_now(State.FAILED)
    assert world.units.asked == []  # stopping the target would end the wait of those that want it


def test_a_daemon_that_starts_again_leaves_the_target_as_it_is(world: World) -> None:
    world.is_now(State.HEALTHY)
    world.events = world.new_daemon()
    world.is_now(State.UNKNOWN)
    world.is_now(State.HEALTHY)
    assert world.is_reached
    assert world.units.asked == [f"start {READY}"]


def test_a_systemd_that_does_not_answer_is_a_line_in_the_log(world: World) -> None:
    world.units.is_broken = True
    world.hook("told", "true")
    world.is_now(State.HEALTHY)
    assert world.log.values("target", "code") == ["command-timeout"]
    assert len(world.log.values("hook", "path")) == 1


# --- hooks ---


def test_hooks_run_on_a_change_of_state_in_the_order_of_their_names_with_the_status(world: World) -> None:
    seen = world.tree / "seen"
    for name in ("20-second", "10-first.sh", "30_third"):
        world.hook(name, f"echo {name} >> {seen}; cat >> {seen}")
    world.is_now(State.HEALTHY)
    world.is_now(State.HEALTHY)
    lines = seen.read_text().splitlines()
    assert lines[::2] == ["10-first.sh", "20-second", "30_third"]
    documents = [json.loads(line) for line in lines[1::2]]
    assert {(each["schema"], each["state"]) for each in documents} == {("vmmesh.status/v1", "healthy")}


def test_a_hook_that_fails_stops_nothing_and_its_output_is_in_the_log(world: World) -> None:
    world.hook("10-bad", "echo the reason; echo details >&2; exit 3")
    world.hook("20-good", "echo done")
    world.is_now(State.HEALTHY)
    assert world.log.values("hook failed", "reason") == ["status 3"]
    assert world.log.values("hook failed", "output") == ["the reason\ndetails"]
    assert world.log.values("hook", "output") == ["done"]


def test_a_hook_that_does_not_read_its_input_is_a_good_hook(world: World) -> None:
    world.hook("closes", "exec 0<&-; exit 0")
    world.is_now(State.HEALTHY)
    assert world.log.values("hook", "output") == [""]


def test_a_hook_that_hangs_is_ended_with_its_children(world: World) -> None:
    marks = world.tree / "marks"
    world.hook("10-hangs", f"sleep 300 & echo $! > {marks}; wait")
    world.hook("20-good", "true")
    world.is_now(State.HEALTHY)
    assert "within 10 s" in str(world.log.values("hook failed", "reason"))
    assert len(world.log.values("hook", "path")) == 1
    child = Path("/proc") / marks.read_text().strip() / "stat"
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_what_another_than_root_may_write_is_not_run(world: World) -> None:
    seen = world.tree / "seen"
    for name in ("group", "others", "foreign", "fine"):
        world.hook(name, f"echo {name} >> {seen}")
    folder = world.tree / HOOKS.relative_to("/")
    (folder / "group").chmod(0o775)
    (folder / "others").chmod(0o757)
    os.chown(folder / "foreign", 12345, 0)
    (folder / "link").symlink_to(folder / "fine")
    world.is_now(State.HEALTHY)
    assert seen.read_text().split() == ["fine"]
    refused = {PurePosixPath(str(path)).name for path in world.log.values("hook refused", "path")}
    assert refused == {"group", "others", "foreign", "link"}


@pytest.mark.parametrize("fault", ["mode", "owner"])
@pytest.mark.parametrize("above", [0, 1])
def test_a_folder_that_another_than_root_may_write_has_no_hooks(world: World, fault: str, above: int) -> None:
    folder = world.hook("fine", "true").parents[above]
    if fault == "mode":
        folder.chmod(0o777)
    else:
        os.chown(folder, 12345, 0)
    world.is_now(State.HEALTHY)
    assert world.log.values("hook", "path") == []
    assert len(world.log.values("hooks refused", "path")) == 1


def test_what_is_no_hook_is_passed_over_in_silence(world: World) -> None:
    for name in ("README", "notes.txt"):
        world.hook(name, "true", mode=0o644)
    for name in (".hidden", "old.dpkg-old", "old.rpmsave", "edited~", "off.disabled"):
        world.hook(name, "true")
    world.is_now(State.HEALTHY)
    assert world.log.lines == []


def test_a_change_of_cause_alone_runs_no_hook(world: World) -> None:
    world.hook("told", "true")
    world.is_now(State.FAILED, "token_rejected")
    world.is_now(State.FAILED, "istiod_unreachable")
    assert len(world.log.values("hook", "path")) == 1
