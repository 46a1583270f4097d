"""A package's life on a machine: installed, joined, upgraded, removed, purged."""

import pytest

import vmmesh_agent
from lab.built import Built, Manager
from lab.machine import Entry, Machine, difference
from system.joining import CLUSTER_ENV, TOKEN, Mesh, run_of_sidecar, status, unit

AGENT = "vmmesh-agent.service"
# Below /usr these are the sidecar's package's and what installing it sets off.
SIDECARS = ("/usr/local/bin", "/usr/local/bin/*", "/usr/lib/systemd/system/istio.service")


@pytest.fixture
def member(manager: Manager, built: Built, mesh: Mesh) -> Machine:
    """A healthy member with the package, its daemon enabled and running."""
    manager.install(built)
    _join(manager.machine, mesh)
    return manager.machine


def test_installed_it_waits_for_its_configuration_and_then_joins(
    manager: Manager, machine: Machine, built: Built, mesh: Mesh
) -> None:
    manager.install(built)

    shown = unit(machine, AGENT)
    assert (shown["LoadState"], shown["ActiveState"], shown["UnitFileState"]) == ("loaded", "inactive", "disabled")
    assert machine.run(["vmmesh-agent", "status"], check=False).returncode == 3
    user = machine.run(["getent", "passwd", "istio-proxy"]).stdout
    assert user.split(":")[5] == "/var/lib/istio"
    # The rules for the sidecar's logs are sound before there are any.
    assert "error" not in machine.run(["logrotate", "--debug", "/etc/logrotate.d/vmmesh-agent"]).stderr
    before = _below_usr(machine)

    _join(machine, mesh)

    assert status(machine)["state"] == "healthy"
    assert difference(before, _below_usr(machine), ignore=SIDECARS) == []
    assert manager.changed() == []


def test_an_upgrade_restarts_the_daemon_and_not_the_sidecar(manager: Manager, member: Machine, newer: Built) -> None:
    sidecar, daemon = run_of_sidecar(member), unit(member, AGENT)["MainPID"]
    configuration = member.read("/etc/vmmesh-agent/config.yaml")
    assert manager.version() == vmmesh_agent.__version__

    manager.upgrade(newer)

    assert manager.version() == "9.9.9"
    shown = unit(member, AGENT)
    assert shown["MainPID"] != daemon
    assert (shown["ActiveState"], shown["UnitFileState"], shown["NeedDaemonReload"]) == ("active", "enabled", "no")
    assert run_of_sidecar(member) == sidecar
    assert member.read("/etc/vmmesh-agent/config.yaml") == configuration
    member.run(["vmmesh-agent", "wait", "--for", "healthy", "--timeout", "30"])
    assert member.run(["vmmesh-agent", "--version"]).stdout.strip().endswith("9.9.9")


def test_removed_it_leaves_the_sidecar_running_and_its_state_behind(manager: Manager, member: Machine) -> None:
    sidecar = run_of_sidecar(member)
    placed = {path: member.read(path) for path in (CLUSTER_ENV, TOKEN)}

    manager.remove()

    assert manager.version() == ""
    assert unit(member, AGENT)["ActiveState"] == "inactive"
    shown = unit(member)
    assert run_of_sidecar(member) == sidecar
    # Neither its start nor its stop needs anything of what is gone.
    assert (shown["ActiveState"], shown.get("DropInPaths"), shown["NeedDaemonReload"]) == ("active", None, "no")
    assert "vmmesh" not in f"{shown.get('Wants')} {shown['After']}"
    member.run(["systemctl", "restart", "istio.service"])
    assert {path: member.read(path) for path in placed} == placed
    assert member.run(["test", "-d", "/var/lib/vmmesh-agent"]).returncode == 0
    assert b"ca_pins" in _configuration(manager)
    assert member.run(["find", "/usr/lib/vmmesh-agent", "/usr/bin/vmmesh-agent"], check=False).stdout == ""

    if manager.family == "deb":
        manager.purge()

        gone = ["/etc/vmmesh-agent", "/var/lib/vmmesh-agent", "/run/vmmesh-agent", "/etc/logrotate.d/vmmesh-agent"]
        assert member.run(["find", *gone], check=False).stdout == ""
        assert member.run(["find", "/etc/systemd", "-name", "*vmmesh*"]).stdout == ""
        assert {path: member.read(path) for path in placed} == placed
        assert unit(member)["ActiveState"] == "active"


def _join(machine: Machine, mesh: Mesh) -> None:
    mesh.endpoint.invite(machine)
    machine.write("/etc/vmmesh-agent/join-token", mesh.endpoint.create_token(), mode=0o600)
    machine.run(["systemctl", "enable", "--now", AGENT])
    machine.run(["vmmesh-agent", "wait", "--for", "healthy", "--timeout", "60"], timeout=90)


def _below_usr(machine: Machine) -> dict[str, Entry]:
    return {path: entry for path, entry in machine.snapshot().items() if path.startswith("/usr/")}


def _configuration(manager: Manager) -> bytes:
    """The configuration after a removal: rpm keeps a changed one under another name."""
    suffix = ".rpmsave" if manager.family == "rpm" else ""
    return manager.machine.read(f"/etc/vmmesh-agent/config.yaml{suffix}")
