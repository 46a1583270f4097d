"""A join that is repeated changes what changed in the cluster and nothing else; one that is killed can be repeated."""

import os
import random
import re
import signal
import time
from collections.abc import Mapping
from contextlib import suppress

import pytest

from lab.cluster import Files as BundleFiles
from lab.machine import Machine, difference
from lab.network import CLUSTER_IPV4, CLUSTER_IPV6
from system.joining import (
    CLUSTER_ENV,
    MESH_YAML,
    NOISE,
    PLACED,
    TOKEN,
    Mesh,
    join,
    requests,
    run_of_sidecar,
    status,
    unit,
)

# What lives on while the sidecar runs, and the record of each run of the agent.
LIVELY = [*NOISE, "/var/log/*", "/run/vmmesh-agent/status.json", "/run/vmmesh-agent/lock"]
BLOCK = re.compile(rb"# BEGIN vmmesh-agent\n(.*)# END vmmesh-agent\n", re.DOTALL)


def test_a_second_run_changes_nothing(joined: Machine, mesh: Mesh) -> None:
    join(joined)
    before, snapshot, inodes = run_of_sidecar(joined), joined.snapshot(), _inodes(joined)

    said = join(joined)

    assert run_of_sidecar(joined) == before
    assert difference(snapshot, joined.snapshot(), ignore=LIVELY) == []
    assert _inodes(joined) == inodes
    assert requests(mesh.endpoint)[-1]["status"] == 304
    assert re.search(r"^fetch .* unchanged$", said, re.MULTILINE)
    assert re.search(r"^place .* nothing to change$", said, re.MULTILINE)


def test_a_new_token_replaces_one_file_and_restarts_nothing(joined: Machine, mesh: Mesh) -> None:
    join(joined)
    before, snapshot = run_of_sidecar(joined), joined.snapshot()
    token = mesh.cluster.token()
    mesh.publish(_with(joined, mesh, token=token))

    join(joined)

    assert joined.read(TOKEN).decode() == token
    assert run_of_sidecar(joined) == before
    assert _paths_of(difference(snapshot, joined.snapshot(), ignore=LIVELY)) == [
        "/run/secrets/tokens/istio-token",  # /var/run is a link to it
        "/var/lib/vmmesh-agent/state.json",
    ]


def test_a_new_cluster_env_restarts_once_and_the_capture_follows_it(joined: Machine, mesh: Mesh) -> None:
    mesh.publish(_with(joined, mesh, inbound_ports="*"))
    join(joined)
    assert _starts(joined)
    starts, snapshot, mark = len(_starts(joined)), joined.snapshot(), len(joined.journal("istio"))
    mesh.publish(_with(joined, mesh, inbound_ports="8080,9090"))

    join(joined)

    assert len(_starts(joined)) == starts + 1
    assert unit(joined)["NRestarts"] == "0"
    assert b"ISTIO_INBOUND_PORTS='8080,9090'\n" in joined.read(CLUSTER_ENV)
    changed = _paths_of(difference(snapshot, joined.snapshot(), ignore=LIVELY))
    assert "/var/lib/istio/envoy/cluster.env" in changed
    assert "/etc/hosts" not in changed
    assert "/run/secrets/tokens/istio-token" not in changed

    # The start script takes away what the environment of that moment would have set: at the stop it must still
    # have been the old one, at the start it was the new one, and nothing of the old is left over.
    told = joined.journal("istio")[mark:].splitlines()
    stop = next(number for number, line in enumerate(told) if "Stopped istio.service" in line)
    removing = [number for number, line in enumerate(told) if re.search(r"-t nat -D PREROUTING", line)]
    old = [number for number, line in enumerate(told) if "-A ISTIO_INBOUND -p tcp --dport 15021 -j RETURN" in line]
    new = [number for number, line in enumerate(told) if "-A ISTIO_INBOUND -p tcp --dport 8080" in line]
    assert removing
    assert removing[0] < stop < new[0]
    assert old == []
    rules = _nat_rules(joined)
    for program, text in rules.items():
        assert "--dport 8080 -j ISTIO_IN_REDIRECT" in text, program
        assert "--dport 15021" not in text, program


def test_capture_that_only_the_old_environment_knows_is_taken_away(joined: Machine, mesh: Mesh) -> None:
    """Without any inbound port the clean-up of the new environment would leave the jump from PREROUTING behind."""
    mesh.publish(_with(joined, mesh, inbound_ports="*"))
    join(joined)
    for text in _nat_rules(joined).values():
        assert "-A PREROUTING -p tcp -j ISTIO_INBOUND" in text
    mesh.publish(_with(joined, mesh, environment={"ISTIO_INBOUND_PORTS": ""}))

    join(joined)

    for program, text in _nat_rules(joined).items():
        assert "PREROUTING -p tcp" not in text, program
        assert "-A OUTPUT -j ISTIO_OUTPUT" in text, program


def test_other_hosts_change_the_block_alone(joined: Machine, mesh: Mesh) -> None:
    own = joined.read("/etc/hosts")
    joined.write("/etc/hosts", b"# first\n" + own + b"192.0.2.77 last\n")
    mesh.publish(_with(joined, mesh))
    join(joined)
    before, run, snapshot = joined.read("/etc/hosts"), run_of_sidecar(joined), joined.snapshot()
    mesh.publish(_with(joined, mesh, address=CLUSTER_IPV6))

    join(joined)

    after = joined.read("/etc/hosts")
    assert BLOCK.sub(b"", after) == BLOCK.sub(b"", before)
    assert _block(after) == f"{CLUSTER_IPV6} istiod.istio-system.svc\n".encode()
    assert run_of_sidecar(joined) == run
    changed = _paths_of(difference(snapshot, joined.snapshot(), ignore=LIVELY))
    assert changed == ["/etc/hosts", "/var/lib/vmmesh-agent/state.json"]

    mesh.publish(_with(joined, mesh, address=CLUSTER_IPV4))
    join(joined)
    assert joined.read("/etc/hosts") == before


def test_another_mesh_configuration_restarts_once(joined: Machine, mesh: Mesh) -> None:
    mesh.publish(_with(joined, mesh))
    join(joined)
    starts = len(_starts(joined))
    mesh_yaml = joined.read(MESH_YAML).replace(b"defaultConfig:\n", b"defaultConfig:\n  concurrency: 1\n")
    mesh.publish(_with(joined, mesh, mesh_yaml=mesh_yaml))

    join(joined)

    assert joined.read(MESH_YAML) == mesh_yaml
    assert len(_starts(joined)) == starts + 1


def test_a_stopped_sidecar_is_started_again(joined: Machine, mesh: Mesh) -> None:
    assert mesh.endpoint.url
    joined.run(["systemctl", "stop", "istio"])
    assert status(joined)["state"] == "stopped"

    join(joined)

    assert unit(joined)["ActiveState"] == "active"


# --- killed on the way ---

STEPS = ("fetch", "verify", "install")  # a join is killed in what comes after


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_killed_join_leaves_whole_files_and_the_next_one_ends_healthy(
    name: str, shared_machine: Machine, mesh: Mesh
) -> None:
    machine = shared_machine
    machine.reset()
    # A token of the endpoint admits one machine, and this one was admitted when it was joined before.
    mesh.endpoint.invite(machine)
    bundle = _with(machine, mesh)
    mesh.publish(bundle)
    hosts = machine.read("/etc/hosts")

    for step in STEPS:
        _kill_bootstrap(machine, signal.Signals[name], after=step)
        _assert_whole(machine, bundle, hosts)

    join(machine)
    _assert_whole(machine, bundle, hosts)
    assert all(machine.read(path) == bundle[file] for file, path in PLACED.items())
    left = machine.run(["find", "/etc", "/var/lib", "/run", "-xdev", "-name", "*.vmmesh"]).stdout
    assert left == ""
    assert machine.run(["ls", "/var/lib/vmmesh-agent/packages"]).stdout == ""
    assert machine.run(["rpm", "--verify", "--nomode", "--nouser", "--nogroup", "istio-sidecar"]).stdout == ""


def _kill_bootstrap(machine: Machine, how: signal.Signals, *, after: str) -> None:
    """Start a join and end it at some moment soon after a step of it is done."""
    process = machine.spawn(["sh", "-c", "echo $$ >/run/bootstrap.pid; exec vmmesh-agent bootstrap"])
    assert process.stdout
    for line in process.stdout:
        if line.startswith(after):
            break
    time.sleep(random.uniform(0, 0.4))  # noqa: S311  # any moment will do
    assert process.poll() is None, "the join ended before it was killed"
    if how is signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does: to every process in the foreground
    else:
        number = machine.read("/run/bootstrap.pid").decode().strip()
        machine.run(["kill", f"-{how.value}", number])
    process.communicate(timeout=60)


def _assert_whole(machine: Machine, bundle: BundleFiles, hosts: bytes) -> None:
    """Each file is not there, or is as the package brought it, or is as the bundle has it."""
    for name, path in PLACED.items():
        with suppress(FileNotFoundError):
            assert machine.read(path) in {bundle[name], b""}, path  # the package touches the mesh configuration
    block = b"# BEGIN vmmesh-agent\n" + bundle["hosts"] + b"# END vmmesh-agent\n"
    assert machine.read("/etc/hosts") in {hosts, hosts + block}


# --- steps ---


def _with(machine: Machine, mesh: Mesh, **overrides: object) -> BundleFiles:
    """A bundle with the token that the machine has already, where it has one."""
    if "token" not in overrides:
        with suppress(FileNotFoundError):
            overrides["token"] = machine.read(TOKEN).decode()
    return mesh.cluster.bundle(**overrides)  # type: ignore[arg-type]


def _inodes(machine: Machine) -> Mapping[str, str]:
    """Inode and the time of its last change (which no program can set) for all that a join puts there."""
    places = ["/etc/certs", "/etc/hosts", "/etc/vmmesh-agent", "/var/lib/istio", "/var/lib/vmmesh-agent"]
    places += ["/run/secrets", "/etc/systemd/system", "/usr/local/bin", "/lib/systemd/system/istio.service"]
    found = machine.run(["find", *places, "-xdev", "-printf", r"%p\t%i %C@\n"]).stdout
    return dict(line.split("\t") for line in found.splitlines())


def _paths_of(lines: list[str]) -> list[str]:
    return [line.partition(":")[0] for line in lines]


def _starts(machine: Machine) -> list[str]:
    return [line for line in machine.journal("istio").splitlines() if "Started istio.service" in line]


def _nat_rules(machine: Machine) -> Mapping[str, str]:
    return {program: machine.run([program, "--table", "nat"]).stdout for program in ("iptables-save", "ip6tables-save")}


def _block(hosts: bytes) -> bytes:
    found = BLOCK.search(hosts)
    assert found
    return found[1]
