"""The flow on a machine of real files with a pretended systemd: what it does, in which order, and what it leaves."""

import os
from datetime import timedelta
from pathlib import Path, PurePosixPath

import pytest

from factories import CLUSTER, DEMO, STRANGER, a_config
from fakes import FakeMachine, write_package
from reconcile.ready import PACKAGE, Machine
from vmmesh_agent import place
from vmmesh_agent.config import Config, SidecarSettings
from vmmesh_agent.errors import AgentError, FetchError
from vmmesh_agent.reconcile import preview, restore

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to istio-proxy")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_fresh_machine_is_joined_in_order(machine: Machine) -> None:
    joined = machine.join()
    assert machine.changes == ["apt-get install", "systemctl enable", "systemctl start"]
    assert joined.bundle.workload == DEMO
    assert joined.sidecar_version == machine.version == "1.28.2"
    assert machine.environments[-1] == joined.bundle.cluster_env  # in place before the sidecar starts
    assert {"istio-sidecar 1.28.2", "/etc/hosts", "istio.service enabled", "istio.service started"} <= set(
        joined.changed
    )
    assert list(machine.onlooker.said) == ["fetch", "verify", "install", "place", "start"]
    assert machine.read(place.TOKEN) == machine.token.encode()


def test_a_second_time_changes_nothing_at_all(machine: Machine) -> None:
    machine.join()
    before = machine.everything()
    machine.changes.clear()
    assert machine.join().changed == ()
    assert machine.changes == []
    assert machine.everything() == before


def test_a_new_token_is_placed_under_a_running_sidecar(machine: Machine) -> None:
    machine.join()
    machine.changes.clear()
    machine.deliver(token=CLUSTER.token(lifetime=timedelta(hours=2)))
    assert machine.join().changed == (str(place.TOKEN),)
    assert machine.changes == []


def test_the_sidecar_does_not_run_while_cluster_env_changes(machine: Machine) -> None:
    before = machine.join().bundle.cluster_env
    machine.changes.clear()
    machine.environments.clear()
    machine.deliver(environment={"ISTIO_INBOUND_PORTS": "8080"})
    joined = machine.join()
    assert machine.changes == ["systemctl stop", "systemctl start"]
    assert machine.environments == [before, joined.bundle.cluster_env]


def test_a_new_package_is_installed_under_a_stopped_sidecar(machine: Machine) -> None:
    machine.join()
    machine.changes.clear()
    write_package(machine.root / "opt/istio-sidecar.deb", version="1.29.0")
    assert machine.join().sidecar_version == "1.29.0"
    assert machine.changes == ["systemctl stop", "apt-get install", "systemctl start"]


def test_a_sidecar_that_somebody_stopped_is_started_again(machine: Machine) -> None:
    machine.join()
    machine.active = "inactive"
    assert machine.join().changed == ("istio.service started",)


def test_a_root_that_istiod_brought_survives_the_next_token(machine: Machine) -> None:
    machine.join()
    (machine.root / "etc/certs/root-cert.pem").write_bytes(CLUSTER.root_pem + STRANGER.pem)
    machine.changes.clear()
    machine.deliver(token=CLUSTER.token(lifetime=timedelta(hours=2)))
    assert machine.join().changed == (str(place.TOKEN),)
    assert machine.changes == []


# --- what must not be touched ---


def refused(machine: Machine, config: Config | None = None) -> AgentError:
    """Join in vain, and see that nothing on the machine changed."""
    before, changes = machine.everything(), list(machine.changes)
    with pytest.raises(AgentError) as caught:
        machine.join(config)
    assert machine.everything() == before
    assert machine.changes == changes
    return caught.value


@pytest.mark.parametrize("joined", [False, True], ids=["fresh", "joined"])
def test_a_bundle_that_is_refused_touches_nothing(machine: Machine, joined: bool) -> None:
    if joined:
        machine.join()
    machine.deliver(token=CLUSTER.token(audience="other"), environment={"LD_PRELOAD": "/tmp/x"})
    assert refused(machine).code == "bundle-refused"


def test_a_bundle_that_is_not_there_touches_nothing(machine: Machine) -> None:
    machine.join()
    error = refused(machine, a_config("file:///srv/nowhere", sidecar=PACKAGE))
    assert isinstance(error, FetchError)


@pytest.mark.parametrize(
    ("package", "code"),
    [
        ({"name": "nginx", "version": "1.29.0"}, "package-invalid"),
        ({"arch": "arm64", "version": "1.29.0"}, "package-wrong-architecture"),
        ({"version": "1.27.0"}, "downgrade-refused"),
        ({"version": "1.29.0", "size": 2**40}, "disk-full"),
    ],
)
def test_a_package_that_does_not_fit_touches_nothing(machine: Machine, package: dict[str, object], code: str) -> None:
    machine.join()
    write_package(machine.root / "opt/istio-sidecar.deb", **package)  # type: ignore[arg-type]
    assert refused(machine).code == code


def test_a_package_with_another_digest_touches_nothing(machine: Machine) -> None:
    settings = SidecarSettings(package="/opt/istio-sidecar.deb", sha256="ab" * 32)
    assert refused(machine, a_config(sidecar=settings)).code == "package-wrong-digest"


def test_looking_ahead_says_what_would_change_and_changes_nothing(machine: Machine) -> None:
    before = machine.everything()
    bundle, package, changes = preview(machine.world())
    assert bundle.workload == DEMO
    assert package.source
    assert place.CLUSTER_ENV in {change.path for change in changes}
    assert machine.everything() == before
    assert machine.changes == []
    machine.join()
    _, package, changes = preview(machine.world())
    assert (package.source, changes) == (None, ())


# --- after a reboot ---


def test_after_a_reboot_the_token_is_put_back_without_the_cluster(machine: Machine) -> None:
    machine.join()
    machine.reboot()
    assert machine.read(place.TOKEN) is None
    for file in (machine.root / "srv/bundle").iterdir():
        file.unlink()
    restore(machine, machine.onlooker)
    assert machine.read(place.TOKEN) == machine.token.encode()
    found = machine.status(place.TOKEN)
    assert found
    assert (found.owner.uid, found.mode) == (FakeMachine.UID, 0o600)
    before = machine.everything()
    restore(machine, machine.onlooker)
    assert machine.everything() == before


def test_what_the_sidecar_learned_is_not_rolled_back_by_a_restore(machine: Machine) -> None:
    machine.join()
    both = CLUSTER.root_pem + STRANGER.pem
    (machine.root / "etc/certs/root-cert.pem").write_bytes(both)
    restore(machine, machine.onlooker)
    assert machine.read(place.ROOT_CERT) == both


def test_without_a_bundle_there_is_nothing_to_restore(machine: Machine) -> None:
    before = machine.everything()
    restore(machine, machine.onlooker)
    assert machine.everything() == before
    machine.join()
    (machine.root / "var/lib/vmmesh-agent/state.json").write_bytes(b'{"half": ')
    before = machine.everything()
    restore(machine, machine.onlooker)
    assert machine.everything() == before


def test_the_kept_bundle_is_for_root_alone(machine: Machine) -> None:
    machine.join()
    for path, mode in (("/var/lib/vmmesh-agent", 0o700), ("/var/lib/vmmesh-agent/state.json", 0o600)):
        found = machine.status(PurePosixPath(path))
        assert found
        assert (found.mode, found.owner.uid) == (mode, 0)
