"""Generations: what is journaled and finished, what proves good, what is given up, and what leaving leaves."""

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path, PurePosixPath

import pytest

from factories import CLUSTER, MOMENT, STRANGER, a_config
from reconcile.ready import PACKAGE, Machine
from vmmesh_agent import found, place, store, trial
from vmmesh_agent.config import FirstJoin, OnFailure
from vmmesh_agent.drift import Drift
from vmmesh_agent.errors import AgentError
from vmmesh_agent.health import Condition, Health, Severity, State
from vmmesh_agent.host import ROOT, NewContent
from vmmesh_agent.leave import leave
from vmmesh_agent.reconcile import recover, restore
from vmmesh_agent.store import Membership

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to istio-proxy")

HEALTHY = Health(State.HEALTHY)
FAILED = Health(
    State.FAILED,
    "cluster_id_mismatch",
    (Condition("cluster_id_mismatch", Severity.FAILED, "istiod does not know it.", "Look at the gateway."),),
)
UNREACHABLE = Health(State.FAILED, "istiod_unreachable")
BAD = {"ISTIO_META_CLUSTER_ID": "nowhere"}
MACHINE_ID = PurePosixPath("/etc/machine-id")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path)
    machine.write(MACHINE_ID, b"0123456789abcdef0123456789abcdef\n", ROOT, 0o444)
    return machine


def conclude(machine: Machine, health: Health, *, is_time_up: bool = True) -> bool:
    return trial.conclude(machine.world(), machine.watch(), health, is_time_up=is_time_up)


def membership(machine: Machine) -> Membership:
    kept = store.load(machine)
    assert kept
    return kept


def placed(machine: Machine) -> dict[str, bytes | None]:
    paths = [entry.path for entry in place.TABLE.values()] + [place.ETC_HOSTS]
    return {path.name: machine.read(path) for path in paths}


# --- the way back ---


def test_a_generation_is_good_once_the_sidecar_was_healthy_on_it(machine: Machine) -> None:
    machine.join()
    assert membership(machine).good is None
    assert conclude(machine, FAILED, is_time_up=False) is False
    assert conclude(machine, HEALTHY, is_time_up=False) is False
    kept = membership(machine)
    assert kept.good == kept.current
    assert not membership(machine).is_open


def test_the_last_good_generation_comes_back_with_the_newest_token(machine: Machine) -> None:
    machine.join()
    conclude(machine, HEALTHY)
    before = placed(machine)
    newest = CLUSTER.token(lifetime=timedelta(hours=2))
    machine.deliver(token=newest, environment=BAD)
    machine.join()
    assert placed(machine)["cluster.env"] != before["cluster.env"]
    machine.changes.clear()
    assert conclude(machine, FAILED) is True
    assert placed(machine) == before | {"istio-token": newest.encode()}
    assert machine.changes == ["systemctl stop", "systemctl start"]
    (condition,) = trial.standing(machine)
    assert (condition.code, "cluster_id_mismatch" in condition.message) == ("bundle_given_up", True)


def given_up(machine: Machine) -> None:
    machine.join()
    conclude(machine, HEALTHY)
    machine.deliver(environment=BAD)
    machine.join()
    assert conclude(machine, FAILED)
    conclude(machine, HEALTHY)
    machine.changes.clear()


def test_what_was_given_up_is_not_tried_again_but_its_token_is_taken(machine: Machine) -> None:
    given_up(machine)
    before = placed(machine)
    token = CLUSTER.token(lifetime=timedelta(hours=3))
    machine.deliver(token=token, environment=BAD)
    assert machine.join().changed == (str(place.TOKEN),)
    assert placed(machine) == before | {"istio-token": token.encode()}
    assert machine.changes == []
    assert trial.standing(machine) != []


def test_it_is_tried_again_when_somebody_asks(machine: Machine) -> None:
    given_up(machine)
    machine.join(again=True)
    assert b"nowhere" in (placed(machine)["cluster.env"] or b"")
    assert conclude(machine, HEALTHY) is False
    assert trial.standing(machine) == []


def test_another_bundle_is_tried_at_once(machine: Machine) -> None:
    given_up(machine)
    machine.deliver(environment={"ISTIO_META_CLUSTER_ID": "somewhere"})
    machine.join()
    conclude(machine, HEALTHY)
    assert b"somewhere" in (placed(machine)["cluster.env"] or b"")
    assert trial.standing(machine) == []


def test_handing_out_the_last_good_one_again_is_a_correction(machine: Machine) -> None:
    given_up(machine)
    machine.deliver()
    machine.join()
    assert trial.standing(machine) == []


def test_a_new_bundle_is_not_blamed_for_a_way_that_it_did_not_change(machine: Machine) -> None:
    machine.join()
    conclude(machine, HEALTHY)
    machine.deliver(environment=BAD)
    machine.join()
    before = placed(machine)
    assert conclude(machine, UNREACHABLE) is False
    assert placed(machine) == before
    assert membership(machine).is_open


def test_what_fails_on_the_old_generation_too_is_not_the_fault_of_the_new_one(machine: Machine) -> None:
    machine.join()
    conclude(machine, HEALTHY)
    machine.deliver(environment=BAD)
    machine.join()
    assert conclude(machine, FAILED)
    conclude(machine, FAILED)
    assert trial.standing(machine) == []
    machine.join()
    assert b"nowhere" in (placed(machine)["cluster.env"] or b"")


def test_a_sidecar_that_somebody_stopped_says_nothing_of_its_generation(machine: Machine) -> None:
    machine.join()
    conclude(machine, HEALTHY)
    machine.deliver(environment=BAD)
    machine.join()
    before = placed(machine)
    assert conclude(machine, Health(State.STOPPED, "stopped")) is False
    assert placed(machine) == before
    assert membership(machine).is_open


def test_a_first_join_that_fails_leaves_nothing_behind(machine: Machine) -> None:
    before = {name: entry[1:] for name, entry in machine.everything().items()}
    machine.join()
    with pytest.raises(AgentError) as caught:
        conclude(machine, FAILED)
    assert caught.value.code == "join-undone"
    assert "istiod does not know it" in caught.value.message
    after = {name: entry[1:] for name, entry in machine.everything().items()}
    # The log folder of the package stays, and the agent's own is empty.
    ours = ("var/log/istio", "var/lib/vmmesh-agent", "lib", "run/vmmesh-agent")
    assert {name: entry for name, entry in after.items() if not name.startswith(ours)} == before
    assert not (machine.root / "var/lib/vmmesh-agent/state.json").exists()


def test_a_first_join_is_kept_where_that_is_wanted(machine: Machine) -> None:
    machine.join()
    before = placed(machine)
    config = replace(a_config(sidecar=PACKAGE), on_failure=OnFailure(first_join=FirstJoin.KEEP))
    assert trial.conclude(machine.world(config), machine.watch(), FAILED, is_time_up=True) is False
    assert placed(machine) == before


# --- the journal ---


def interrupted(machine: Machine) -> dict[str, bytes | None]:
    """Leave the machine as a power cut in the middle of a change does; return what should be there in the end."""
    machine.join()
    conclude(machine, HEALTHY)
    before = placed(machine)
    machine.deliver(token=CLUSTER.token(lifetime=timedelta(hours=2)), environment=BAD)
    machine.join()
    after = placed(machine)
    store.save(machine, replace(membership(machine), unfinished=True))
    owner = machine.account("istio-proxy")
    assert owner
    machine.write(place.CLUSTER_ENV, before["cluster.env"] or b"", owner, 0o644)
    machine.active = "inactive"
    return after


def test_what_was_interrupted_is_finished_without_the_endpoint(machine: Machine) -> None:
    after = interrupted(machine)
    recover(machine.world(), machine.watch())
    assert placed(machine) == after
    assert machine.active == "active"
    assert not membership(machine).unfinished


def test_the_files_are_whole_before_the_sidecar_starts(machine: Machine) -> None:
    after = interrupted(machine)
    restore(machine, machine.onlooker)
    assert placed(machine) == after
    assert machine.active == "inactive"


def test_files_are_exchanged_all_or_none(machine: Machine) -> None:
    paths = [PurePosixPath("/etc/one"), PurePosixPath("/etc/two"), PurePosixPath("/etc/three")]
    for path in paths[:2]:
        machine.write(path, b"old", ROOT, 0o644)
    (machine.root / "etc/three").mkdir()
    contents = [NewContent(path, b"new", ROOT, 0o644) for path in paths]
    with pytest.raises(AgentError), machine.staged(contents) as staged:
        staged.commit()
    assert [machine.read(path) for path in paths[:2]] == [b"old", b"old"]
    assert not [name for name in machine.names_in(PurePosixPath("/etc")) if name.endswith(".vmmesh")]


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_writes_is_not(machine: Machine) -> None:
    dead, alive = ".one.new.00c0ffee.4194304.vmmesh", f".one.old.00c0ffee.{os.getpid()}.vmmesh"
    for name in (dead, alive, ".one.vmmesh"):
        (machine.root / "etc" / name).touch()
    machine.sweep(PurePosixPath("/etc"))
    assert [name for name in machine.names_in(PurePosixPath("/etc")) if name.endswith(".vmmesh")] == sorted(
        [alive, ".one.vmmesh"]
    )


# --- copies and leaving ---


def test_a_copied_disk_has_no_identity(machine: Machine) -> None:
    machine.join()
    conclude(machine, HEALTHY)
    owner = machine.account("istio-proxy")
    assert owner
    machine.write(PurePosixPath("/etc/certs/key.pem"), b"secret", owner, 0o600)
    machine.write(MACHINE_ID, b"f" * 32 + b"\n", ROOT, 0o444)
    restore(machine, machine.onlooker)
    assert machine.read(place.TOKEN) is None
    assert machine.read(place.CLUSTER_ENV) is None
    assert machine.names_in(PurePosixPath("/etc/certs")) == []
    assert store.load(machine) is None
    assert not machine.enabled
    machine.join()
    assert membership(machine).machine == store.machine(machine)


def test_leaving_gives_back_what_was_there(machine: Machine) -> None:
    hosts, root_cert = b"127.0.0.1 localhost", b"made by hand"  # no newline at the end
    machine.write(place.ETC_HOSTS, hosts, ROOT, 0o640)
    machine.write(place.ROOT_CERT, root_cert, ROOT, 0o600)
    machine.join()
    assert machine.read(place.ROOT_CERT) != root_cert
    own = PurePosixPath("/etc/certs/notes.txt")
    machine.write(own, b"an administrator's", ROOT, 0o644)
    leave(machine, machine.onlooker, purge=True)
    assert machine.read(place.ETC_HOSTS) == hosts
    assert machine.read(place.ROOT_CERT) == root_cert
    status = machine.status(place.ROOT_CERT)
    assert status
    assert (status.owner, status.mode) == (ROOT, 0o600)
    assert machine.names_in(PurePosixPath("/etc/certs")) == ["notes.txt", "root-cert.pem"]
    assert "notes.txt" in machine.onlooker.said["files"]
    assert (machine.version, machine.active, machine.enabled) == ("", "inactive", False)
    assert machine.account("istio-proxy") is None
    assert not (machine.root / "var/lib/vmmesh-agent").exists()
    assert not (machine.root / "etc/istio").is_symlink()


def test_leaving_keeps_a_package_that_was_there_before(machine: Machine) -> None:
    machine.run(["apt-get", "install", "/opt/istio-sidecar.deb".replace("/opt", f"{machine.root}/opt")])
    machine.join()
    leave(machine, machine.onlooker, purge=True)
    assert machine.version == "1.28.2"
    assert machine.account("istio-proxy") is not None
    assert (machine.root / "etc/istio").is_symlink()


def test_a_leave_that_was_cut_off_at_its_very_end_takes_nothing_that_it_put_back(machine: Machine) -> None:
    root_cert = b"made by hand"
    machine.write(place.ROOT_CERT, root_cert, ROOT, 0o644)
    machine.join()
    leave(machine, machine.onlooker, purge=False)
    machine.write(PurePosixPath("/var/lib/vmmesh-agent/leaving"), b"all is as it was found\n", ROOT, 0o600)
    leave(machine, machine.onlooker, purge=False)
    assert machine.read(place.ROOT_CERT) == root_cert
    assert machine.names_in(PurePosixPath("/var/lib/vmmesh-agent")) == []


def test_a_machine_that_never_joined_is_left_alone(machine: Machine) -> None:
    before = machine.everything()
    leave(machine, machine.onlooker, purge=False)
    assert machine.everything() == before
    assert machine.changes == []


def test_the_first_look_counts(machine: Machine) -> None:
    machine.join()
    noted = found.load(machine)
    machine.deliver(environment=BAD)
    machine.join()
    assert found.load(machine) == noted


# --- drift ---


def test_a_changed_file_is_put_back_once_and_then_reported(machine: Machine) -> None:
    machine.join()
    drift = Drift()
    assert drift.mend(machine.world(), machine.watch()) == []
    before = placed(machine)
    machine.changes.clear()
    machine.write(place.ETC_HOSTS, b"127.0.0.1 localhost\n", ROOT, 0o644)
    (found_,) = drift.mend(machine.world(), machine.watch())
    assert found_ == "/etc/hosts had lost or altered the agent's lines"
    assert placed(machine) == before
    assert [condition.code for condition in drift.conditions()] == ["file_put_back"]
    machine.write(place.ETC_HOSTS, b"127.0.0.1 localhost\n", ROOT, 0o644)
    assert drift.mend(machine.world(), machine.watch()) == []
    assert [condition.code for condition in drift.conditions()] == ["file_contested"]
    assert drift.contested == {place.ETC_HOSTS}
    assert machine.read(place.ETC_HOSTS) == b"127.0.0.1 localhost\n"
    assert machine.changes == []


def test_roots_that_the_sidecar_left_out_are_added_again_and_again_without_a_word(machine: Machine) -> None:
    both = CLUSTER.root_pem + STRANGER.pem
    machine.deliver(root_cert=both)
    machine.join()
    drift = Drift()
    owner = machine.account("istio-proxy")
    assert owner
    machine.changes.clear()
    for _ in range(3):
        machine.write(place.ROOT_CERT, CLUSTER.root_pem, owner, 0o600)
        assert drift.mend(machine.world(), machine.watch()) == []
        assert machine.read(place.ROOT_CERT) == both
    assert [*drift.conditions()] == []
    assert machine.changes == []


def test_after_an_hour_of_peace_it_is_news_again(machine: Machine) -> None:
    machine.join()
    drift = Drift()
    for hours in (0, 2):
        world = machine.world(moment=MOMENT + timedelta(hours=hours))
        assert drift.mend(world, machine.watch()) == []
        machine.remove(place.TOKEN)
        assert drift.mend(world, machine.watch()) == [f"{place.TOKEN} was gone"]


def test_a_sidecar_that_was_started_on_somebody_elses_file_is_started_again(machine: Machine) -> None:
    machine.join()
    drift = Drift()
    drift.mend(machine.world(), machine.watch())
    owner = machine.account("istio-proxy")
    assert owner
    machine.write(place.CLUSTER_ENV, b"EVIL='yes'\n", owner, 0o644)
    machine.run(["systemctl", "stop", "istio.service"])
    machine.run(["systemctl", "start", "istio.service"])
    machine.changes.clear()
    drift.mend(machine.world(), machine.watch())
    assert machine.changes == ["systemctl stop", "systemctl start"]
    assert b"EVIL" not in (machine.read(place.CLUSTER_ENV) or b"")
