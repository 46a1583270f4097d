"""The agent needs the sidecar for nothing: all traffic captured, Envoy dead or frozen, it still reaches its mesh.

The endpoint has a name here that only a DNS server knows, and DNS is captured too.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab.machine import Machine
from lab.network import CLUSTER_IPV4, Network
from lab.run import Run
from lab.services import ENDPOINT_PORT, Endpoint, Service
from standins.packages import Packages
from system.faults import Vm
from system.joining import TOKEN, join, run_of_sidecar, running_mesh, unit
from system.stories import chains, tries

NAME = "mesh.example.com"
URL = f"https://{NAME}:{ENDPOINT_PORT}/healthz"
CALL = ["curl", "--silent", "--insecure", "--max-time", "5"]
DEAD = "/run/systemd/system/istio.service.d/dead.conf"

# Answers each question about the name with the address, and all others with "no such name".
DNS = f"""
import socket
server = socket.socket(type=socket.SOCK_DGRAM)
server.bind(("{CLUSTER_IPV4}", 53))
print("ready", flush=True)
while True:
    asked, client = server.recvfrom(512)
    end = asked.index(0, 12) + 5
    name, kind = asked[12 : end - 4], asked[end - 4 : end - 2]
    known = name == b"".join(bytes([len(part)]) + part for part in b"{NAME}.".split(b"."))
    found = known and kind == b"\\0\\1"
    head = asked[:2] + bytes([0x81, 0x80 if known else 0x83, 0, 1, 0, found, 0, 0, 0, 0])
    record = b"\\xc0\\x0c\\0\\1\\0\\1\\0\\0\\0\\1\\0\\4" + socket.inet_aton("{CLUSTER_IPV4}")
    server.sendto(head + asked[12:end] + found * record, client)
"""


class Named(Endpoint):
    """The endpoint as everybody knows it: by its name."""

    def argv(self) -> list[str]:
        """The command line, after `python`."""
        self.url = f"https://{NAME}:{ENDPOINT_PORT}/v1/bundle"
        return [*super().argv(), f"--name={NAME}"]


class Dns(Service):
    """The DNS server that the machines ask."""

    def argv(self) -> list[str]:
        """The command line, after `python`."""
        return ["-c", DNS]


@pytest.fixture(scope="module")
def vm(shared_machine: Machine, packages: Packages, network: Network, run: Run) -> Iterator[Vm]:
    """A healthy machine with the daemon at work, whose endpoint is found by name."""
    with (
        running_mesh(packages, network=network, run=run, kind=Named) as mesh,
        Dns("dns", ready="ready", network=network, run=run),
    ):
        mesh.endpoint.url = f"https://{NAME}:{ENDPOINT_PORT}/v1/bundle"
        vm = Vm(shared_machine, mesh, CLUSTER_IPV4, network, run, threading.Event())
        vm.begin("the agent is independent")
        vm.join()
        yield vm


@pytest.mark.parametrize("signal", ["KILL", "STOP"])
def test_a_renewal_goes_through_while_nothing_else_leaves_the_machine(signal: str, vm: Vm) -> None:
    before = run_of_sidecar(vm.machine)
    with _without_sidecar(vm, signal):
        assert chains(vm)
        assert vm.machine.run(["getent", "hosts", NAME], check=False).returncode != 0
        for address in (NAME, CLUSTER_IPV4):  # neither by name nor past the DNS
            refused = vm.machine.run([*CALL, URL.replace(NAME, address)], check=False)
            assert refused.returncode != 0, address
        assert vm.machine.run([*CALL, URL], user="istio-proxy").stdout == '{"status":"ok"}'

        bundle = vm.cluster.bundle()
        vm.mesh.publish(bundle)
        tries(vm)

        assert vm.machine.read(TOKEN) == bundle["istio-token"]
        if signal == "STOP":  # a frozen one is not restarted for a token
            assert run_of_sidecar(vm.machine) == before
    vm.is_healthy()
    assert unit(vm.machine)["ActiveState"] == "active"
    assert "ok" in vm.machine.run([*CALL, URL]).stdout  # everybody has the network again


def test_a_machine_joins_again_whose_sidecar_is_dead(vm: Vm) -> None:
    vm.does("systemctl stop vmmesh-agent")
    try:
        with _without_sidecar(vm, "KILL"):
            assert vm.machine.run([*CALL, URL], check=False).returncode != 0
            join(vm.machine)
    finally:
        vm.does("systemctl start vmmesh-agent")
    vm.is_healthy()


def test_envoy_may_have_all_the_connections_that_the_machine_allows(vm: Vm) -> None:
    soft, hard = (
        vm.machine.read(f"/proc/{vm.process('envoy')}/limits").decode().partition("Max open files")[2].split()[:2]
    )
    assert soft == hard  # a container may have less than it asks for
    assert unit(vm.machine)["LimitNOFILE"] == "1048576"


@contextmanager
def _without_sidecar(vm: Vm, signal: str) -> Iterator[None]:
    """Let the sidecar die where it stands, or freeze, with its capture left in place."""
    vm.machine.write(DEAD, "[Service]\nExecStopPost=\nRestart=no\n")
    vm.does(f"systemctl daemon-reload; systemctl kill --signal={signal} istio")
    try:
        if signal == "KILL":
            vm.seen("a dead sidecar", lambda: vm.run("pgrep envoy").returncode == 1)
        yield
    finally:
        vm.does(f"rm {DEAD}; systemctl daemon-reload")
        vm.run("systemctl kill --signal=CONT istio")
