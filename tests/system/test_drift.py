"""A placed file that somebody changes is put back once, with a note; what is changed again is told, not fought for.

Each story is told on a machine with a mesh of its own, several machines side by side: see `system.faults`.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from lab.cluster import Authority
from lab.network import Network
from lab.run import Run
from standins.packages import Packages
from system.faults import Scenario, Vm, played
from system.joining import CLUSTER_ENV, MESH_YAML, PLACED, ROOT_CERT, run_of_sidecar, status
from system.stories import HOSTS, bundle, codes, placed, tries

LOST = "had lost or altered the agent's lines"
ELSEWHERE = "echo \"ISTIO_META_CLUSTER_ID='Elsewhere'\""
BLOCK = "/^# BEGIN vmmesh-agent$/,/^# END vmmesh-agent$/"  # as sed names lines
MINE = "# mine"
RESTORE = "vmmesh-agent-restore.service"
FILES = sorted(PLACED.values())

STORIES: list[Scenario] = []


def story(scenario: Scenario) -> Scenario:
    """Count the function among the stories."""
    STORIES.append(scenario)
    return scenario


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, packages: Packages, network: Network, run: Run, fixture_rpms: tuple[Path, ...]
) -> Iterator[dict[str, Future[None]]]:
    """What came of each story."""
    with played(request, "told", packages=packages, network=network, run=run, fixture_rpms=fixture_rpms) as outcomes:
        yield outcomes


# --- what is no drift ----------------------------------------------------------------------------


@story
def roots_that_the_sidecar_wrote_itself_are_no_drift(vm: Vm) -> None:
    """pilot-agent writes what istiod trusts, in a file of its own making: 0600, in another order, fewer or more."""
    ours = vm.cluster.root_pem
    next_one, another = (Authority.create(f"root {number}").pem for number in (2, 3))
    _begin(vm, root_cert_pem=ours + next_one)
    run = run_of_sidecar(vm.machine)
    more = another + next_one + ours
    assert _rewritten(vm, more) == (more, "600\n")
    fewer, _ = _rewritten(vm, ours)
    assert ours in fewer
    assert next_one in fewer  # the cluster's own are complete again, and nobody is told
    assert run_of_sidecar(vm.machine) == run


# --- once: it is put back, and the sidecar, which did not read it, runs on ---------------------


@story
def files_that_were_edited_are_put_back(vm: Vm) -> None:
    _is_put_back(vm, dict.fromkeys(FILES, "echo X=1 > {}"), "had other content")


@story
def files_that_were_deleted_are_put_back(vm: Vm) -> None:
    _is_put_back(vm, dict.fromkeys(FILES, "rm {}"), "was gone")


@story
def owners_and_modes_are_put_back(vm: Vm) -> None:
    _is_put_back(
        vm,
        {path: ("chown root" if number % 2 else "chmod 666") + " {}" for number, path in enumerate(FILES)},
        "had another owner or mode",
    )


@story
def the_block_of_etc_hosts_is_put_back(vm: Vm) -> None:
    _is_put_back(vm, {HOSTS: f"sed -i '{BLOCK}d' {{}}; echo '{MINE}' >> {{}}"}, LOST)
    assert f"\n{MINE}\n" in vm.machine.read(HOSTS).decode()
    _is_put_back(vm, {HOSTS: f"sed -n '{BLOCK}p' {{}} >/run/block; cat /run/block >> {{}}"}, LOST)
    vm.does(f"sed -i '/{MINE}/d' {HOSTS}")


@story
def a_sidecar_that_is_restarted_reads_what_it_should(vm: Vm) -> None:
    """The files are put back before each start, whoever starts it."""
    _begin(vm)
    right = placed(vm)
    vm.does(f"{ELSEWHERE} >> {CLUSTER_ENV}; systemctl restart istio")
    assert placed(vm) == right
    vm.is_healthy()


@story
def what_a_restarted_sidecar_has_read_all_the_same_is_put_back_with_another_restart(vm: Vm) -> None:
    """Somebody keeps the files from being put back before the start."""
    _begin(vm)
    right = placed(vm)
    vm.does(f"systemctl mask --runtime {RESTORE}; {ELSEWHERE} >> {CLUSTER_ENV}; systemctl restart istio")
    run = run_of_sidecar(vm.machine)

    vm.mentions("file_put_back")

    assert placed(vm) == right
    assert run_of_sidecar(vm.machine)[1] != run[1]
    vm.seen("the sidecar in the mesh", lambda: status(vm.machine)["state"] == "healthy")
    vm.does(f"systemctl unmask --runtime {RESTORE}")
    _forget(vm)


# --- again: it is told, and left ----------------------------------------------------------------


@story
def a_file_that_is_changed_again_is_told_and_left_until_somebody_says_so(vm: Vm) -> None:
    right, theirs = _contested(vm)
    run = run_of_sidecar(vm.machine)

    for _ in range(2):
        tries(vm)
        assert vm.machine.read(MESH_YAML) == theirs
    vm.mentions("file_contested")
    assert vm.run("vmmesh-agent status").returncode == 2

    vm.does("vmmesh-agent bootstrap")  # what the remedy says

    assert vm.machine.read(MESH_YAML) == right
    vm.seen("no contest", lambda: "file_contested" not in codes(status(vm.machine)))
    assert status(vm.machine)["state"] == "healthy"
    assert run_of_sidecar(vm.machine) != run  # it is read at the start only
    _forget(vm)


@story
def what_the_cluster_has_new_is_placed_over_what_somebody_else_wrote(vm: Vm) -> None:
    right, _ = _contested(vm)
    new = right.replace(b"defaultConfig:\n", b"defaultConfig:\n  concurrency: 1\n")
    vm.mesh.publish(bundle(vm, mesh_yaml=new))

    tries(vm)

    assert vm.machine.read(MESH_YAML) == new
    vm.seen("no contest", lambda: "file_contested" not in codes(status(vm.machine)))
    _forget(vm)


@pytest.mark.parametrize("told", STORIES, ids=lambda told: told.__name__)
def test_drift(told: Scenario, outcomes: Mapping[str, Future[None]]) -> None:
    outcomes[told.__name__].result()


# --- steps ------------------------------------------------------------------------------------


def _begin(vm: Vm, **different: bytes) -> None:
    """Begin with a bundle that no other story changed, and a daemon that has no memory of them."""
    vm.mesh.publish(bundle(vm, **different))
    _forget(vm)
    tries(vm)
    vm.is_healthy()
    vm.stop.wait(11)  # it has compared since: only so it knows on which files the sidecar was started


def _forget(vm: Vm) -> None:
    """Let the daemon forget what it put back; it would speak of it for an hour."""
    vm.does("systemctl restart vmmesh-agent")


def _is_put_back(vm: Vm, changes: Mapping[str, str], found: str) -> None:
    """Change files while the sidecar serves; see that they are put back, and told as they were found."""
    _begin(vm)
    before, run = _with_owners(vm), run_of_sidecar(vm.machine)

    vm.does("; ".join(change.replace("{}", path) for path, change in changes.items()))

    vm.mentions("file_put_back")
    vm.seen("all notes", lambda: len(_notes(vm)) >= len(changes))
    assert _notes(vm) == [f"{path} {found}" for path in sorted(changes)]
    assert _with_owners(vm) == before
    assert run_of_sidecar(vm.machine) == run
    shown = status(vm.machine)
    assert (shown["state"], shown["cause"]) == ("healthy", "none")
    _forget(vm)


def _contested(vm: Vm) -> tuple[bytes, bytes]:
    """Change a file, and again when it was put back. Return what belongs there and what is there."""
    _begin(vm)
    right = vm.machine.read(MESH_YAML)
    vm.does(f"echo '# once' >> {MESH_YAML}")
    vm.mentions("file_put_back")
    assert vm.machine.read(MESH_YAML) == right
    vm.does(f"echo '# twice' >> {MESH_YAML}")
    condition = vm.says("degraded", "file_contested")
    assert MESH_YAML in condition["message"]
    assert "vmmesh-agent bootstrap" in condition["remedy"]
    theirs = vm.machine.read(MESH_YAML)
    assert theirs.endswith(b"# twice\n")
    return right, theirs


def _rewritten(vm: Vm, roots: bytes) -> tuple[bytes, str]:
    """Write the root certificates as the sidecar does; return what is there after a while in which nothing is told."""
    vm.machine.write(ROOT_CERT, roots, mode=0o600, owner="istio-proxy")
    with vm.undisturbed(rest=13) as said:
        pass
    assert not [code for shown in said for code in codes(shown)]
    return vm.machine.read(ROOT_CERT), vm.does(f"stat --format=%a {ROOT_CERT}")


def _with_owners(vm: Vm) -> dict[str, tuple[bytes, str]]:
    """Return what is placed, with owners and modes; lines of somebody else are left out."""
    return {
        path: (content.replace(f"{MINE}\n".encode(), b""), vm.does(f"stat --format='%U %a' {path}"))
        for path, content in placed(vm, but=()).items()
    }


def _notes(vm: Vm) -> list[str]:
    """Return what was found, as the notes say, without when it was put back."""
    shown: list[dict[str, Any]] = status(vm.machine)["conditions"]
    return sorted(
        each["message"].partition(" and was put back")[0] for each in shown if each["code"] == "file_put_back"
    )
