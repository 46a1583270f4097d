"""A bundle on which the sidecar does not become healthy is given up: the last good one is back, and nobody has to come.

Each story is told on a machine with a mesh of its own, several machines side by side: see `system.faults`.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from lab.cluster import Cluster
from lab.cluster import Files as BundleFiles
from lab.network import Network
from lab.run import Run
from standins.istiod import Behaviour
from standins.packages import Packages
from system.faults import Scenario, Vm, played
from system.joining import CLUSTER_ENV, MESH_YAML, TOKEN, run_of_sidecar, status
from system.stories import LIMIT, LONG, bundle, codes, limited, placed, tries

GIVEN_UP = "bundle_given_up"

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


@story
def the_root_of_another_mesh_is_given_up_by_the_daemon(vm: Vm) -> None:
    limited(vm)
    _is_given_up_by_the_daemon(vm, root_cert_pem=Cluster.create().root_pem)


@story
def a_wrong_cluster_id_is_given_up_by_the_daemon(vm: Vm) -> None:
    limited(vm)
    _is_given_up_by_the_daemon(vm, environment={"ISTIO_META_CLUSTER_ID": "Elsewhere"})


@story
def a_dead_discovery_address_is_given_up_by_bootstrap_and_tried_again_on_demand(vm: Vm) -> None:
    limited(vm)
    vm.does("systemctl stop vmmesh-agent")
    good = placed(vm)
    bad = bundle(vm, mesh_yaml=vm.machine.read(MESH_YAML).replace(b".svc:15012", b".svc:15999"))
    vm.mesh.publish(bad)

    _bootstrap_ends_with(vm, 2, GIVEN_UP)

    _is_back(vm, good, bad)
    run = run_of_sidecar(vm.machine)
    _bootstrap_ends_with(vm, 2, "the last good one stays")
    assert run_of_sidecar(vm.machine) == run

    _bootstrap_ends_with(vm, 2, "going back to the last good one", "--again")
    assert run_of_sidecar(vm.machine) != run
    _is_back(vm, good, bad)

    vm.mesh.publish(bundle(vm))
    _bootstrap_ends_with(vm, 0, "healthy")
    vm.does("systemctl start vmmesh-agent")


@story
def an_istiod_that_is_down_is_not_blamed_on_a_bundle_that_leads_to_it_as_before(vm: Vm) -> None:
    limited(vm)
    vm.istiod.stop()
    vm.mesh.publish(bundle(vm, environment={"ISTIO_META_NEW": "true"}))
    tries(vm)
    vm.says("failed", "istiod_unreachable")
    vm.stop.wait(LIMIT * 1.5)
    assert GIVEN_UP not in codes(status(vm.machine))

    vm.istiod.start()

    vm.is_healthy(within=LONG)
    assert b"ISTIO_META_NEW" in vm.machine.read(CLUSTER_ENV)


@story
def a_new_way_to_an_istiod_that_is_down_has_another_chance(vm: Vm) -> None:
    """The last good bundle does not get the sidecar into the mesh either, so the new one is not to blame."""
    limited(vm)
    old = vm.machine.read(MESH_YAML)
    new = old.replace(b"defaultConfig:\n", b"defaultConfig:\n  concurrency: 1\n")
    vm.istiod.stop()
    vm.mesh.publish(bundle(vm, mesh_yaml=new))
    tries(vm)
    assert vm.machine.read(MESH_YAML) == new
    vm.mentions(GIVEN_UP, within=LONG)
    assert vm.machine.read(MESH_YAML) == old
    vm.seen("nobody to blame", lambda: GIVEN_UP not in codes(status(vm.machine)), within=LONG)
    vm.says("failed", "istiod_unreachable")

    vm.istiod.start()
    tries(vm)

    vm.is_healthy(within=LONG)
    assert vm.machine.read(MESH_YAML) == new


@story
def a_sidecar_that_somebody_stopped_says_nothing_of_its_bundle(vm: Vm) -> None:
    """Nor does it when it is started again: it has the whole limit from then on."""
    limited(vm)
    vm.istiod.behave(Behaviour(hang=True))
    vm.without_certificate()
    vm.mesh.publish(bundle(vm, environment={"ISTIO_META_NEW": "true"}))
    tries(vm)
    vm.does("systemctl stop istio")
    with vm.undisturbed("stopped", "stopping", "starting", rest=LIMIT * 1.5) as said:
        pass
    assert not [GIVEN_UP for shown in said if GIVEN_UP in codes(shown)]
    assert b"ISTIO_META_NEW" in vm.machine.read(CLUSTER_ENV)

    vm.istiod.behave(Behaviour())
    vm.does("systemctl start istio")

    vm.is_healthy()
    assert b"ISTIO_META_NEW" in vm.machine.read(CLUSTER_ENV)


@pytest.mark.parametrize("told", STORIES, ids=lambda told: told.__name__)
def test_the_way_back(told: Scenario, outcomes: Mapping[str, Future[None]]) -> None:
    outcomes[told.__name__].result()


# --- steps ----------------------------------------------------------------------------


def _is_given_up_by_the_daemon(vm: Vm, **flaw: Any) -> None:
    good = placed(vm)
    bad = bundle(vm, **flaw)
    vm.mesh.publish(bad)
    tries(vm)

    condition = vm.says("degraded", GIVEN_UP, within=LONG)

    assert "vmmesh-agent bootstrap --again" in condition["remedy"]
    assert vm.run("vmmesh-agent status").returncode == 2
    _is_back(vm, good, bad)
    vm.seen("the sidecar in the mesh", lambda: codes(status(vm.machine)) == [GIVEN_UP])

    run = run_of_sidecar(vm.machine)
    for _ in range(3):
        bad = bad | {"istio-token": vm.cluster.token().encode()}
        vm.mesh.publish(bad)
        tries(vm)
        _is_back(vm, good, bad)
    assert run_of_sidecar(vm.machine) == run
    assert codes(status(vm.machine)) == [GIVEN_UP]

    vm.mesh.publish(bundle(vm, environment={"ISTIO_META_NEW": "true"}))
    tries(vm)
    vm.is_healthy()
    assert b"ISTIO_META_NEW" in vm.machine.read(CLUSTER_ENV)


def _bootstrap_ends_with(vm: Vm, exit_status: int, text: str, *arguments: str) -> None:
    done = vm.run(f"vmmesh-agent bootstrap --timeout=120 {' '.join(arguments)}", timeout=170)
    assert (done.returncode, text in done.stdout) == (exit_status, True), f"{done.stdout}\n{done.stderr}"


def _is_back(vm: Vm, good: Mapping[str, bytes], bad: BundleFiles) -> None:
    """See that the files are those of the good bundle, byte for byte, and the token is the newest."""
    assert placed(vm) == good
    assert vm.machine.read(TOKEN) == bad["istio-token"]
