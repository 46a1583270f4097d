"""The daemon under systemd, and what it left behind after a reboot."""

import json
from collections.abc import Iterator
from datetime import timedelta

import pytest

from lab.cluster import Files as BundleFiles
from lab.cluster import now
from lab.machine import Machine
from lab.network import Network
from lab.run import Run
from standins.packages import Packages
from system.joining import TOKEN, Mesh, configure, run_of_sidecar, running_mesh, status, unit

AGENT = "vmmesh-agent.service"
RESTORE = "vmmesh-agent-restore.service"


@pytest.fixture(scope="module")
def mesh(packages: Packages, network: Network, run: Run) -> Iterator[Mesh]:
    with running_mesh(packages, network=network, run=run) as mesh:
        mesh.publish(_to_be_renewed_soon(mesh))
        yield mesh


@pytest.fixture(scope="module")
def served(shared_machine: Machine, mesh: Mesh) -> Machine:
    """A machine that was joined by nothing but the start of the daemon."""
    mesh.endpoint.invite(shared_machine)
    shared_machine.run(["systemctl", "start", AGENT])
    _wait_for("healthy", shared_machine)
    return shared_machine


@pytest.fixture(autouse=True)
def _daemon_runs(served: Machine, mesh: Mesh) -> None:
    """Each test finds the endpoint up, the sidecar healthy and the daemon at work."""
    mesh.endpoint.invite(served)
    served.run(["systemctl", "reset-failed"])
    served.run(["systemctl", "start", AGENT])
    _wait_for("healthy", served)


def test_the_start_of_the_daemon_joins_and_the_status_is_its_own(served: Machine) -> None:
    shown = unit(served, AGENT)
    assert (shown["ActiveState"], shown["SubState"], shown["NRestarts"]) == ("active", "running", "0")
    assert "healthy" in shown["StatusText"]
    assert unit(served)["ActiveState"] == "active"
    document = status(served)
    assert (document["state"], document["daemon"]) == ("healthy", True)
    assert "by the daemon" in served.run(["vmmesh-agent", "status"], user="nobody").stdout
    assert json.loads(served.read("/run/vmmesh-agent/status.json")) == document | {
        "updated_at": json.loads(served.read("/run/vmmesh-agent/status.json"))["updated_at"]
    }


def test_sigterm_ends_the_daemon_and_leaves_the_sidecar_running(served: Machine) -> None:
    before, mark = run_of_sidecar(served), len(served.journal())

    served.run(["systemctl", "stop", AGENT])

    told = served.journal()[mark:]
    assert f"{AGENT}: Deactivated successfully" in told
    assert "SIGKILL" not in told  # what systemd sends when its patience ends
    assert unit(served, AGENT)["ActiveState"] == "inactive"
    assert run_of_sidecar(served) == before
    assert status(served)["state"] == "healthy"


def test_a_daemon_that_is_killed_comes_back_and_leaves_the_sidecar_alone(served: Machine) -> None:
    before, process = run_of_sidecar(served), unit(served, AGENT)["MainPID"]

    served.run(["systemctl", "kill", "--signal=KILL", AGENT])

    served.run(["sh", "-ec", f'until [ "$(systemctl show -P NRestarts {AGENT})" = 1 ]; do sleep 0.2; done'])
    served.run(["systemctl", "start", AGENT])  # waits until it says that it is ready
    assert unit(served, AGENT)["MainPID"] not in {"0", process}
    assert run_of_sidecar(served) == before


def test_an_endpoint_that_is_down_degrades_and_harms_nothing_and_is_forgotten_when_it_is_back(
    served: Machine, mesh: Mesh
) -> None:
    before = run_of_sidecar(served)
    mesh.endpoint.stop()
    try:
        _wait_for("degraded", served)
        document = status(served)
        assert document["cause"] == "endpoint_refuses_connections"
        assert document["conditions"][0]["severity"] == "degraded"
        assert mesh.endpoint.url.split("/")[2] in document["conditions"][0]["message"]
        assert served.run(["vmmesh-agent", "status"], check=False).returncode == 2
        nagios = served.run(["vmmesh-agent", "status", "--output", "nagios"], check=False)
        assert (nagios.returncode, nagios.stdout[:15]) == (1, "VMMESH WARNING ")
        assert run_of_sidecar(served) == before
    finally:
        mesh.endpoint.start()
    mesh.publish(_to_be_renewed_soon(mesh))

    _wait_for("healthy", served)
    assert run_of_sidecar(served) == before


def test_a_token_that_the_cluster_renewed_is_fetched_before_the_old_one_ends(served: Machine, mesh: Mesh) -> None:
    before = run_of_sidecar(served)
    bundle = _to_be_renewed_soon(mesh)
    mesh.publish(bundle)

    same = f'until [ "$(cat {TOKEN})" = "$1" ]; do sleep 0.2; done'
    served.run(["sh", "-ec", same, "sh", bundle["istio-token"].decode()], timeout=60)

    assert run_of_sidecar(served) == before


def test_a_wrong_configuration_ends_the_daemon_with_78_for_good(served: Machine, mesh: Mesh) -> None:
    before = run_of_sidecar(served)
    served.run(["systemctl", "stop", AGENT])
    configure(served, mesh.endpoint.configuration(worklod_group={"namespace": "vm", "name": "demo"}))

    started = served.run(["systemctl", "start", AGENT], check=False)

    assert started.returncode != 0
    shown = unit(served, AGENT)
    assert (shown["ExecMainStatus"], shown["Result"]) == ("78", "exit-code")
    # Where systemd meant to start it again it would be "activating", until the next start.
    assert (shown["ActiveState"], shown["SubState"], shown["NRestarts"]) == ("failed", "failed", "0")
    assert "workload_group" in served.journal(AGENT).rpartition("worklod_group")[2]  # the nearest known key
    assert run_of_sidecar(served) == before


def test_after_a_reboot_the_token_is_back_before_the_sidecar_starts_without_any_endpoint(
    served: Machine, mesh: Mesh
) -> None:
    token = served.read(TOKEN)
    served.run(["systemctl", "stop", AGENT])
    mesh.endpoint.stop()
    try:
        served.reboot()

        assert served.read(TOKEN) == token
        shown = served.run(["stat", "--format=%a %U", TOKEN]).stdout
        assert shown == "600 istio-proxy\n"
        restored, istio = unit(served, RESTORE), unit(served)
        assert (restored["Result"], restored["ExecMainStatus"]) == ("success", "0")
        assert int(restored["ExecMainExitTimestampMonotonic"]) <= int(istio["ExecMainStartTimestampMonotonic"])
        order = [line for line in _since_boot(served) if "restore" in line.lower() or "istio.service" in line]
        finished = next(number for number, line in enumerate(order) if f"Finished {RESTORE}" in line)
        started = next(number for number, line in enumerate(order) if "Started istio.service" in line)
        assert finished < started
        _wait_for("healthy", served)
        assert unit(served)["NRestarts"] == "0"
    finally:
        mesh.endpoint.start()


def _to_be_renewed_soon(mesh: Mesh) -> BundleFiles:
    """A bundle whose token is good for two minutes more and has most of its life behind it: the daemon comes soon."""
    age = timedelta(minutes=58)
    return mesh.cluster.bundle(token=mesh.cluster.token(issued_at=now() - age, lifetime=timedelta(hours=1)))


def _wait_for(state: str, machine: Machine) -> None:
    machine.run(["vmmesh-agent", "wait", "--for", state, "--timeout", "60"], timeout=90)


def _since_boot(machine: Machine) -> list[str]:
    return machine.run(["journalctl", "--boot", "--output=short-monotonic", "--no-pager"]).stdout.splitlines()
