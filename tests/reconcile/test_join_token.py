"""The join token after the join: kept by the agent, and gone from where it was handed over."""

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from factories import CLUSTER, a_bundle, a_config
from fakes import Endpoint, http, tls_of
from reconcile.ready import PACKAGE, Machine
from vmmesh_agent import credential, leave, trial
from vmmesh_agent.config import Config, Credential
from vmmesh_agent.errors import AgentError
from vmmesh_agent.health import Health, State
from vmmesh_agent.host import ROOT

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to istio-proxy")

JOIN_TOKEN = PurePosixPath("/etc/vmmesh-agent/join-token")
FIRST, SECOND = "VM1.11111111.first", "VM1.22222222.second"
HEALTHY = Health(State.HEALTHY)
REFUSED = http("401 Unauthorized", b'{"code": "credential-unknown"}')


def answer() -> bytes:
    return http("200 OK", json.dumps(a_bundle().as_json()).encode(), ETag='"1"')


class Invited(Machine):
    """A machine with a join token for an endpoint."""

    def __init__(self, root: Path, endpoint: Endpoint) -> None:
        super().__init__(root)
        self.endpoint = endpoint
        (root / "etc/vmmesh-agent").mkdir()
        (root / "ca.pem").write_bytes(CLUSTER.root_pem)
        self.write(PurePosixPath("/etc/machine-id"), b"0f" * 16 + b"\n", ROOT, 0o444)
        self.hand_over(FIRST)

    @property
    def config(self) -> Config:
        settings = {"ca_file": PurePosixPath("/ca.pem"), "credential": Credential(join_token_file=JOIN_TOKEN)}
        return a_config(self.endpoint.url, sidecar=PACKAGE, **settings)

    def hand_over(self, token: str) -> None:
        self.write(JOIN_TOKEN, f"{token}\n".encode(), ROOT, 0o600)

    def join_as_configured(self) -> None:
        self.join(self.config)

    def conclude(self, health: Health = HEALTHY) -> None:
        trial.conclude(self.world(self.config), self.watch(), health, is_time_up=True)

    @property
    def kept(self) -> str:
        return (self.read(credential.KEPT) or b"").decode().strip()

    @property
    def used(self) -> str | None:
        return self.endpoint.header("authorization", -1)


@pytest.fixture
def answers() -> list[bytes]:
    """What the endpoint answers to one request after the other, the last one for ever."""
    return [answer()]


@pytest.fixture
def machine(tmp_path: Path, answers: list[bytes]) -> Iterator[Invited]:
    with Endpoint(tls_of(CLUSTER, tmp_path), answers).serving() as endpoint:
        yield Invited(tmp_path / "tree", endpoint)


def test_the_file_stays_until_the_machine_was_healthy(machine: Invited) -> None:
    machine.join_as_configured()
    assert machine.status(JOIN_TOKEN)

    machine.conclude()

    assert machine.status(JOIN_TOKEN) is None
    assert machine.kept == FIRST
    machine.join_as_configured()
    assert machine.used == f"Bearer {FIRST}"


def test_a_join_that_does_not_become_healthy_leaves_the_file(machine: Invited) -> None:
    machine.join_as_configured()
    with pytest.raises(AgentError, match="left as it was found"):
        machine.conclude(Health(State.FAILED, "istiod_unreachable"))
    assert (machine.read(JOIN_TOKEN) or b"").strip() == FIRST.encode()


def test_a_later_token_goes_first_and_is_adopted_when_it_was_taken(machine: Invited) -> None:
    machine.join_as_configured()
    machine.conclude()
    machine.hand_over(SECOND)

    machine.join_as_configured()

    assert machine.used == f"Bearer {SECOND}"
    assert machine.status(JOIN_TOKEN) is None
    assert machine.kept == SECOND


@pytest.mark.parametrize("answers", [[answer(), REFUSED, answer()]])
def test_a_later_token_that_is_refused_is_left_for_whoever_put_it_there(machine: Invited) -> None:
    machine.join_as_configured()
    machine.conclude()
    machine.hand_over(SECOND)

    with pytest.raises(AgentError) as caught:
        machine.join_as_configured()

    assert caught.value.code == "endpoint-unauthorized"
    assert machine.status(JOIN_TOKEN)
    assert machine.kept == FIRST
    machine.remove(JOIN_TOKEN)
    machine.join_as_configured()
    assert machine.used == f"Bearer {FIRST}"


def test_a_token_that_somebody_exchanged_during_the_trial_is_not_lost(machine: Invited) -> None:
    machine.join_as_configured()
    machine.hand_over(SECOND)
    machine.conclude()
    assert (machine.read(JOIN_TOKEN) or b"").strip() == SECOND.encode()
    assert machine.kept == FIRST


def test_what_was_cut_off_between_keeping_and_removing_is_ended_by_the_next_renewal(machine: Invited) -> None:
    machine.join_as_configured()
    machine.conclude()
    machine.hand_over(FIRST)  # as if the power had failed before it was removed
    machine.join_as_configured()
    assert machine.status(JOIN_TOKEN) is None


def test_a_file_that_cannot_be_removed_is_told_once(machine: Invited) -> None:
    machine.join_as_configured()
    machine.remove(JOIN_TOKEN)
    machine.outside(JOIN_TOKEN).mkdir()
    machine.conclude()
    for _ in range(2):
        with pytest.raises(AgentError):  # a folder is no token
            machine.join_as_configured()
    told = [note for note in machine.onlooker.notes if "join token" in note]
    assert len(told) == 1
    assert str(credential.KEPT) in told[0]


@pytest.mark.parametrize("purge", [False, True])
def test_leaving_keeps_the_token_for_the_next_join_and_purging_does_not(machine: Invited, purge: bool) -> None:
    machine.join_as_configured()
    machine.conclude()
    leave.leave(machine, machine.onlooker, purge=purge)
    assert machine.kept == ("" if purge else FIRST)
