"""A copy of a member's disk is another machine: it never speaks in the origin's name, and joins as itself.

The copy is the same disk in a machine with another ID, as virtualizers and clouds give it.
"""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab.machine import Machine
from lab.services import Endpoint
from system.joining import CLUSTER_ENV, TOKEN, Mesh, join, requests, run_of_sidecar, status, unit

AGENT = "vmmesh-agent.service"
KEY = "/etc/certs/key.pem"
IDENTITY = (KEY, "/etc/certs/cert-chain.pem", TOKEN, CLUSTER_ENV)


@pytest.fixture
def origin(machine: Machine, mesh: Mesh) -> Machine:
    """A member with a join token that is used up by itself."""
    mesh.endpoint.invite(machine)
    machine.write("/etc/vmmesh-agent/join-token", mesh.endpoint.create_token(), mode=0o600)
    join(machine)
    return machine


@contextmanager
def _copied(machine: Machine) -> Iterator[None]:
    """Go on as a copy of this machine; the block is run before it is switched on."""
    machine.write("/etc/machine-id", f"{uuid.uuid4().hex}\n", mode=0o444)
    yield
    machine.crash()


def test_an_origin_that_reboots_keeps_its_identity(origin: Machine) -> None:
    origin.run(["systemctl", "enable", "--now", AGENT])
    before = {path: origin.read(path) for path in (TOKEN, CLUSTER_ENV, "/etc/hosts")}

    origin.reboot()

    _wait_for("healthy", origin)
    assert {path: origin.read(path) for path in before} == before
    assert all(origin.read(path) for path in IDENTITY)
    assert _starts(origin) == 1
    assert unit(origin)["NRestarts"] == "0"


@pytest.mark.parametrize("daemon", ["with the daemon", "without the daemon"])
def test_a_copy_without_a_token_of_its_own_stays_out_and_says_what_it_needs(
    daemon: str, origin: Machine, mesh: Mesh
) -> None:
    if daemon == "with the daemon":
        origin.run(["systemctl", "enable", AGENT])
    mark = len(mesh.istiod.requests())
    with _copied(origin):
        mark = len(mesh.istiod.requests())
    copy = origin

    for path in IDENTITY:
        with pytest.raises(FileNotFoundError):
            copy.read(path)
    assert b"vmmesh" not in copy.read("/etc/hosts")
    keys = ["grep", "-rl", "PRIVATE KEY", "/etc/certs", "/var/lib/vmmesh-agent"]
    assert copy.run(keys, check=False).stdout == ""
    # Not for a moment did the sidecar run with what was the origin's.
    assert _starts(copy) == 0
    assert [each for each in mesh.istiod.requests()[mark:] if each["code"] != "closed"] == []
    if daemon == "with the daemon":
        copy.run(["sh", "-ec", "until vmmesh-agent status --output=json | grep -q endpoint_gone; do sleep 0.5; done"])
        shown = status(copy)
        assert shown["state"] == "not-joined", shown
        told = next(each for each in shown["conditions"] if each["code"] == "endpoint_gone")
        assert "join token" in told["remedy"]
    else:
        assert copy.run(["vmmesh-agent", "status"], check=False).returncode == 3
        refused = copy.run(["vmmesh-agent", "bootstrap"], check=False)
        assert refused.returncode == 1
        assert "[endpoint-gone]" in refused.stderr

    copy.write("/etc/vmmesh-agent/join-token", mesh.endpoint.create_token(), mode=0o600)
    if daemon == "with the daemon":
        copy.run(["systemctl", "reload", AGENT])
        _wait_for("healthy", copy)
    else:
        join(copy)
    assert copy.read(KEY)


def test_a_copy_with_a_token_that_is_good_for_it_joins_as_itself(origin: Machine, mesh: Mesh) -> None:
    origin.write("/etc/vmmesh-agent/join-token", mesh.endpoint.create_token("--machines", "3"), mode=0o600)
    origin.run(["systemctl", "enable", "--now", AGENT])
    _wait_for("healthy", origin)
    key, token, run, machine_id = origin.read(KEY), origin.read(TOKEN), run_of_sidecar(origin), _known_as(mesh.endpoint)
    mesh.publish(mesh.cluster.bundle())

    with _copied(origin):
        pass

    copy = origin
    _wait_for("healthy", copy)
    assert copy.read(KEY) != key
    assert copy.read(TOKEN) != token
    assert run_of_sidecar(copy) != run
    assert _known_as(mesh.endpoint) != machine_id
    assert _starts(copy) == 1  # with its own files, and not before
    assert copy.read("/etc/hosts").count(b"# BEGIN vmmesh-agent") == 1


def test_a_copy_of_a_copy_is_another_machine_again(origin: Machine, mesh: Mesh) -> None:
    origin.write("/etc/vmmesh-agent/join-token", mesh.endpoint.create_token("--machines", "3"), mode=0o600)
    origin.run(["systemctl", "enable", AGENT])
    keys, names = [origin.read(KEY)], []
    for _ in range(2):
        with _copied(origin):
            pass
        _wait_for("healthy", origin)
        keys.append(origin.read(KEY))
        names.append(_known_as(mesh.endpoint))
    assert len(set(keys)) == 3
    assert len(set(names)) == 2


def _starts(machine: Machine) -> int:
    """How often the sidecar was started since the boot."""
    return machine.run(["journalctl", "--boot", "--no-pager"]).stdout.count("Started istio.service")


def _known_as(endpoint: Endpoint) -> str:
    """By which name the endpoint knows whoever asked last."""
    return str(next(each["machine"] for each in reversed(requests(endpoint)) if each.get("machine")))


def _wait_for(state: str, machine: Machine) -> None:
    waited = machine.run(["vmmesh-agent", "wait", "--for", state, "--timeout", "60"], check=False, timeout=90)
    assert waited.returncode == 0, status(machine)
