"""Wherever the agent is killed or failed: no torn set of files, no line of others lost, and the next run ends well.

A sample of the points here; `scripts/bench --faults` takes them all.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from lab.cluster import Cluster
from lab.network import Network
from lab.run import Run
from standins.packages import Packages
from system.sweep import (
    BEFORE,
    KILL,
    LEAVING,
    PLACES,
    STATE,
    Lab,
    Point,
    Result,
    Set,
    account,
    judge,
    leftovers,
    placed,
    points,
    sample,
    spread,
    sweep_all,
)

KILLS, ERRORS = 12, 6  # of each operation, and two errors more: no descriptor left

pytestmark = pytest.mark.timeout(900)  # two minutes on two idle cores


# --- on machines ------------------------------------------------------------


@pytest.fixture(scope="module")
def results(
    packages: Packages, network: Network, run: Run, fixture_rpms: tuple[Path, ...], request: pytest.FixtureRequest
) -> Sequence[Result]:
    """What came of the sample; it is printed whether it is well or not."""
    began = time.monotonic()
    lab = Lab(packages, network, run, fixture_rpms)
    found = sweep_all(lab, ["bootstrap", "renewal", "leave"], lambda every: sample(every, KILLS, ERRORS))
    found += sweep_all(lab, ["install"], lambda every: sample(every, KILLS // 3, 0))
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    assert capture is not None
    with capture.global_and_fixture_disabled():
        sys.stdout.write(f"\n{account(found, time.monotonic() - began)}")
    return found


def test_no_kill_and_no_error_leaves_a_torn_set(results: Sequence[Result]) -> None:
    assert [str(result.point) for result in results if result.is_torn] == []
    assert sum(result.reached for result in results) > 0.9 * len(results)


def test_no_kill_and_no_error_costs_a_line_of_others_in_the_hosts_file(results: Sequence[Result]) -> None:
    assert {str(result.point): result.lost for result in results if result.lost} == {}


def test_whatever_happened_the_reason_is_told_and_the_next_run_ends_well(results: Sequence[Result]) -> None:
    assert {str(result.point): [*result.wrong, result.ended] for result in results if result.wrong} == {}


# --- the judge, on folders that are made up ----------------------------------

CLUSTER = Cluster.create()
OLD, NEW = (CLUSTER.bundle(inbound_ports=port) | {"mesh.yaml": port.encode()} for port in ("8080", "9090"))
OLD_SET, NEW_SET, NONE = (placed(bundle, after=b"", root=CLUSTER.root_pem) for bundle in (OLD, NEW, None))
JOURNAL = {STATE: b'{"unfinished": true}'}


@pytest.mark.parametrize(("there", "kind"), [(OLD_SET, "old"), (NEW_SET, "new")])
@pytest.mark.parametrize("running", [True, False])
def test_a_set_of_one_age_is_whole_whatever_runs(tmp_path: Path, there: Set, kind: str, running: bool) -> None:
    assert judge(_machine(tmp_path, there), OLD_SET, NEW_SET, running=running).kind == kind


@pytest.mark.parametrize("name", ["istio-token", "cluster.env", "mesh.yaml"])
def test_one_new_file_among_old_ones_is_torn(tmp_path: Path, name: str) -> None:
    mixed = _machine(tmp_path, {**OLD_SET, name: NEW_SET[name]})

    judgement = judge(mixed, OLD_SET, NEW_SET, running=False)

    assert judgement.kind == "torn"
    assert [each for each, age in judgement.ages.items() if age == "new"] == [name]


@pytest.mark.parametrize(
    ("journal", "running", "kind"),
    [
        (JOURNAL, False, "begun"),
        (JOURNAL, True, "torn"),
        ({STATE: b'{"unfinished": false}'}, False, "torn"),
        ({STATE: b"{}", LEAVING: b""}, False, "begun"),
        ({STATE: b'{"unfin'}, False, "torn"),
        ({LEAVING: b""}, False, "begun"),
        ({}, False, "torn"),
    ],
)
def test_a_mixed_set_is_begun_only_where_the_journal_knows_and_no_sidecar_runs(
    tmp_path: Path, journal: dict[str, bytes], running: bool, kind: str
) -> None:
    mixed = _machine(tmp_path, {**OLD_SET, "mesh.yaml": NEW_SET["mesh.yaml"]}, journal)
    assert judge(mixed, OLD_SET, NEW_SET, running=running).kind == kind


@pytest.mark.parametrize("name", PLACES)
def test_half_a_file_is_torn_even_with_a_journal(tmp_path: Path, name: str) -> None:
    (whole,) = NEW_SET[name]
    assert whole
    machine = _machine(tmp_path, {**NEW_SET, name: frozenset({whole[: len(whole) // 2]})}, JOURNAL)

    judgement = judge(machine, OLD_SET, NEW_SET, running=False)

    assert (judgement.kind, judgement.ages[name]) == ("torn", "neither")


def test_a_file_that_is_gone_is_torn(tmp_path: Path) -> None:
    machine = _machine(tmp_path, {**NEW_SET, "istio-token": frozenset({None})}, JOURNAL)
    assert judge(machine, OLD_SET, NEW_SET, running=False).kind == "torn"


@pytest.mark.parametrize(
    ("journal", "kind"),
    [(b'{"given_up": {"cause": "x"}}', "back"), (b'{"given_up": null}', "torn"), (b"{}", "torn")],
)
def test_the_new_token_beside_old_files_is_the_way_back_where_the_journal_says_so(
    tmp_path: Path, journal: bytes, kind: str
) -> None:
    there = _machine(tmp_path, {**OLD_SET, "istio-token": NEW_SET["istio-token"]}, {STATE: journal})
    assert judge(there, OLD_SET, NEW_SET, running=True).kind == kind


def test_a_first_join_goes_from_nothing_to_all(tmp_path: Path) -> None:
    assert judge(_machine(tmp_path, NONE), NONE, NEW_SET, running=False).kind == "old"
    (tmp_path / PLACES["istio-token"]).parent.mkdir(parents=True)
    (tmp_path / PLACES["istio-token"]).write_bytes(NEW["istio-token"])
    assert judge(tmp_path, NONE, NEW_SET, running=False).kind == "torn"


def test_roots_that_the_sidecar_learned_make_no_other_set(tmp_path: Path) -> None:
    learned = NEW["root-cert.pem"] + Cluster.create().root_pem
    machine = _machine(tmp_path, {**NEW_SET, "root-cert.pem": frozenset({learned})})
    assert judge(machine, OLD_SET, NEW_SET, running=True).kind == "new"


def test_lines_of_others_that_are_lost_are_counted(tmp_path: Path) -> None:
    hosts = b"".join(BEFORE.splitlines(keepends=True)[:-2])
    machine = _machine(tmp_path, {**NEW_SET, "hosts": frozenset({hosts})})

    judgement = judge(machine, OLD_SET, NEW_SET, running=False)

    assert (judgement.kind, judgement.lost) == ("torn", 2)


def test_temporary_files_are_found_where_the_agent_writes(tmp_path: Path) -> None:
    _machine(tmp_path, NEW_SET)
    assert leftovers(tmp_path) == []
    (tmp_path / "etc/certs/.root-cert.pem.new.0123.vmmesh").touch()
    assert leftovers(tmp_path) == ["/etc/certs/.root-cert.pem.new.0123.vmmesh"]


def test_a_point_is_named_so_that_it_can_be_run_again() -> None:
    for name in ("renewal renameat 3", "bootstrap write 12 ENOSPC", "leave fsync 1 EIO+"):
        assert str(Point.parse(name)) == name
    assert Point.parse("renewal renameat 3").injection == "inject=renameat:signal=KILL:when=3"
    assert Point.parse("renewal renameat 3 EIO+").injection == "inject=renameat:error=EIO:when=3+"


def test_points_are_the_calls_of_the_agent_itself() -> None:
    trace = """\
openat(AT_FDCWD</>, "/usr/lib/python3.11/os.py", O_RDONLY|O_CLOEXEC) = 3</usr/lib/python3.11/os.py>
openat(AT_FDCWD</>, "/", O_RDONLY|O_CLOEXEC|O_PATH|O_DIRECTORY) = 3</>
renameat(9</etc/certs>, ".a", 9</etc/certs>, "a") = 0
--- SIGCHLD {si_signo=SIGCHLD, si_code=CLD_EXITED} ---
renameat(9</etc>, ".b", 9</etc>, "b") = 0
"""
    found = [*points("renewal", trace)]
    assert {str(point) for point in found if point.call == "openat"} == {
        "renewal openat 2 EMFILE",
        "renewal openat 2 EMFILE+",
    }
    assert [str(point) for point in found if point.fault == KILL] == ["renewal renameat 1", "renewal renameat 2"]


def test_a_sample_has_the_first_and_the_last_point() -> None:
    found = [Point("renewal", "fsync", number) for number in range(1, 100)]
    assert [point.number for point in spread(found, 3)] == [1, 50, 99]
    assert spread(found[:2], 3) == found[:2]


def _machine(root: Path, there: Set, more: dict[str, bytes] | None = None) -> Path:
    """Make up a folder with this set."""
    for name, contents in there.items():
        content = max(contents, key=lambda each: each or b"")
        if content is not None:
            _put(root / PLACES[name], content)
    for path, content in (more or {}).items():
        _put(root / path, content)
    return root


def _put(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
