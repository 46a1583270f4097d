"""A first join that comes to nothing is undone, SSH is never captured, and what fails later fails as it was asked to.

Each story is told on a machine with a mesh of its own, several machines side by side: see `system.faults`.
"""

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from lab.machine import Entry, difference
from lab.network import Network
from lab.run import Run
from standins.istiod import Behaviour
from standins.packages import Packages
from system.faults import Scenario, Vm, played
from system.joining import CLUSTER_ENV, MESH_YAML, NOISE, copy_to, requests, run_of_sidecar, status, unit
from system.stories import HOSTS, LIMIT, LONG, answer, bundle, chains, codes, limited, tries

# What may differ from the machine as it was found.
LEFT = (
    *NOISE,
    *("/var/lib/vmmesh-agent*", "/run/vmmesh-agent*"),  # the agent's own
    *("/root/.rpmdb*", "/var/lib/rpm*"),  # the database of the package manager
    "/var/log/*",
    *(f"/etc/{name}" for name in ("passwd-", "shadow-", "group-", "gshadow-", "subuid-", "subgid-")),  # useradd's
)
# Written anew, by useradd and userdel the most of them: only what is in them is compared.
WRITTEN = (
    HOSTS,
    MESH_YAML.replace("/etc/istio", "/var/lib/istio"),  # where the link leads to
    *(f"/etc/{name}" for name in ("passwd", "shadow", "group", "gshadow", "subuid", "subgid")),
)
UNDONE = "join_undone"

LISTENER = """
import socket, sys, threading
def serve(port):
    with socket.create_server(("", port)) as server:
        while True:
            with server.accept()[0] as connection:
                connection.sendall(b"SSH-2.0-here\\n")
for port in sys.argv[1:]:
    threading.Thread(target=serve, args=(int(port),)).start()
"""
SSHD = "/usr/local/sbin/sshd"
APPLICATION = 8080

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


# --- a machine that was never healthy ------------------------------------------------------


@story
def bootstrap_undoes_a_first_join_that_comes_to_nothing(vm: Vm) -> None:
    before = _fresh(vm)

    done = vm.run("vmmesh-agent bootstrap --timeout=120", timeout=170)

    assert done.returncode == 1, done.stdout
    assert "[join-undone]" in done.stderr
    assert "istiod cannot be reached" in done.stderr
    assert "on_failure.first_join: keep" in done.stderr
    _is_as_found(vm, before)
    assert vm.run("rpm -q istio-sidecar; id istio-proxy; systemctl cat istio").stdout.count("\n") == 1  # not installed
    assert status(vm.machine)["state"] == "not-joined"
    assert vm.run("vmmesh-agent status").returncode == 3

    vm.istiod.start()
    vm.does("vmmesh-agent bootstrap --timeout=120", timeout=170)
    assert _downloads(vm) == 1
    vm.does("systemctl start vmmesh-agent")


@story
def the_daemon_undoes_a_first_join_and_joins_when_istiod_is_back(vm: Vm) -> None:
    before = _fresh(vm)

    vm.does("systemctl start vmmesh-agent")

    condition = vm.says("not-joined", UNDONE, within=LONG)
    assert "istiod cannot be reached" in condition["message"]
    assert "on_failure.first_join: keep" in condition["remedy"]
    assert vm.run("vmmesh-agent status").returncode == 3
    _is_as_found(vm, before)

    vm.istiod.start()
    tries(vm)

    vm.is_healthy()
    assert _downloads(vm) == 1
    assert unit(vm.machine)["UnitFileState"] == "enabled"


@story
def a_first_join_is_kept_as_it_fails_where_that_is_asked_for(vm: Vm) -> None:
    _fresh(vm, on_failure={"first_join": "keep"})

    done = vm.run("vmmesh-agent bootstrap --timeout=120", timeout=170)

    assert done.returncode == 1, done.stdout
    assert "istiod_unreachable" in done.stdout
    assert chains(vm)
    assert vm.machine.read(CLUSTER_ENV)
    assert unit(vm.machine)["ActiveState"] == "active"

    vm.istiod.start()
    vm.does("systemctl start vmmesh-agent")
    vm.is_healthy()


@story
def a_package_that_was_there_before_stays_where_istiod_refuses_the_machine(vm: Vm) -> None:
    rpm = next((vm.mesh.endpoint.bundle_folder / "packages").glob("*.rpm"))
    vm.machine.reset()
    copy_to(vm.machine, rpm, f"/root/{rpm.name}")
    vm.does(f"rpm -i /root/{rpm.name}")
    before = _fresh(vm, reset=False)
    vm.istiod.start()
    vm.istiod.behave(Behaviour(refuse="unauthenticated"))

    vm.does("systemctl start vmmesh-agent")

    condition = vm.says("not-joined", UNDONE, within=LONG)
    assert "token_rejected" in condition["message"]
    _is_as_found(vm, before)
    vm.does("rpm -q istio-sidecar")

    vm.istiod.behave(Behaviour())
    tries(vm)
    vm.is_healthy()
    assert _downloads(vm) == 0


# --- SSH ------------------------------------------------------------------------------------


@story
def nobody_is_locked_out_by_a_bundle_that_forgot_port_22(vm: Vm) -> None:
    _ssh_is_not_captured(vm, "15090,15021,15020")


@story
def nobody_is_locked_out_by_a_bundle_that_excludes_no_port_at_all(vm: Vm) -> None:
    _ssh_is_not_captured(vm, "")


# --- a machine that was healthy once ----------------------------------------------------------


@story
def the_traffic_of_a_sidecar_that_fails_later_stays_captured(vm: Vm) -> None:
    limited(vm)
    vm.istiod.stop()
    vm.without_certificate()
    vm.says("failed", "istiod_unreachable")
    run = run_of_sidecar(vm.machine)

    vm.stop.wait(LIMIT * 1.5)

    assert chains(vm)
    assert run_of_sidecar(vm.machine) == run
    assert "capture_opened" not in codes(status(vm.machine))
    vm.istiod.start()
    vm.is_healthy(within=LONG)


@story
def the_traffic_of_a_sidecar_that_fails_for_long_is_let_go_where_that_is_asked_for(vm: Vm) -> None:
    limited(vm, on_failure={"joined": "open"})
    health = f"curl --silent --insecure --max-time 5 {vm.mesh.endpoint.url.replace('/v1/bundle', '/healthz')}"
    vm.istiod.stop()
    vm.without_certificate()
    vm.says("failed", "istiod_unreachable")
    assert chains(vm)
    assert vm.run(health).returncode != 0

    condition = vm.mentions("capture_opened", within=LONG)

    assert "istiod_unreachable" in condition["message"]
    vm.seen("nothing captured", lambda: not chains(vm))
    vm.seen("the endpoint", lambda: "ok" in vm.run(health).stdout)
    assert unit(vm.machine)["ActiveState"] == "inactive"

    vm.istiod.start()
    tries(vm)
    vm.is_healthy(within=LONG)
    assert chains(vm)


@pytest.mark.parametrize("told", STORIES, ids=lambda told: told.__name__)
def test_a_failed_join_locks_nobody_out(told: Scenario, outcomes: Mapping[str, Future[None]]) -> None:
    outcomes[told.__name__].result()


# --- steps ------------------------------------------------------------------------------------


def _fresh(vm: Vm, *, reset: bool = True, **settings: object) -> dict[str, Entry]:
    """Begin with a machine that never joined and an istiod that is down; return how the machine is."""
    if reset:
        vm.machine.reset()
    vm.istiod.stop()
    vm.mesh.endpoint.invite(vm.machine, healthy_within=LIMIT, **settings)
    vm.mesh.endpoint.stop()
    vm.mesh.endpoint.start()  # and with it its log
    return vm.machine.snapshot()


def _is_as_found(vm: Vm, before: Mapping[str, Entry]) -> None:
    assert chains(vm) == ""
    after = vm.machine.snapshot()
    there = [path for path in WRITTEN if path in before and path in after]
    whole = [path for path in there if replace(before[path], written=0) == replace(after[path], written=0)]
    changes = difference(before, after, ignore=[*LEFT, *whole])
    assert not changes, "\n".join(changes)


def _downloads(vm: Vm) -> int:
    return len([each for each in requests(vm.mesh.endpoint) if each["path"].endswith(".rpm")])


def _ssh_is_not_captured(vm: Vm, excluded: str) -> None:
    """Let three kinds of SSH server and an application listen, capture all that comes in, and let the sidecar die."""
    vm.machine.reset()
    vm.does(f"cp /usr/bin/python3 {SSHD}")
    _socket_unit(vm, "ssh.socket", 2022)
    vm.does("systemctl daemon-reload; systemctl start ssh.socket")
    with _listening(vm, SSHD, 22, 2222), _listening(vm, "python3", APPLICATION):
        vm.mesh.publish(bundle(vm, environment={"ISTIO_LOCAL_EXCLUDE_PORTS": excluded}))
        vm.join()

        names = dict(line.split("=", 1) for line in vm.machine.read(CLUSTER_ENV).decode().splitlines())
        ports = names["ISTIO_LOCAL_EXCLUDE_PORTS"].strip("'").split(",")
        assert {"22", "2022", "2222"} <= {*ports}
        assert {*excluded.split(",")} - {""} <= {*ports}

        vm.machine.write("/run/systemd/system/istio.service.d/dead.conf", "[Service]\nExecStopPost=\nRestart=no\n")
        vm.does("systemctl daemon-reload; systemctl kill --signal=KILL istio")
        vm.seen("a dead sidecar", lambda: vm.run("pgrep envoy").returncode == 1)
        assert chains(vm)
        assert {port: answer(vm, port) for port in (22, 2022, 2222, APPLICATION)} == {
            **dict.fromkeys((22, 2022, 2222), "SSH-2.0-here"),
            APPLICATION: "",
        }
        vm.does("rm /run/systemd/system/istio.service.d/dead.conf; systemctl daemon-reload; systemctl restart istio")
        vm.is_healthy()


@contextmanager
def _listening(vm: Vm, program: str, *ports: int) -> Iterator[None]:
    argv = [program, "-c", LISTENER, *map(str, ports)]
    process = vm.machine.spawn(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        vm.seen("listeners", lambda: all(f":{port} " in vm.does("ss -lnt") for port in ports))
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _socket_unit(vm: Vm, name: str, port: int) -> None:
    folder = "/etc/systemd/system"
    vm.machine.write(f"{folder}/{name}", f"[Socket]\nListenStream={port}\nAccept=yes\n")
    serves = "[Service]\nExecStart=-/bin/echo SSH-2.0-here\nStandardInput=socket\nStandardOutput=socket\n"
    vm.machine.write(f"{folder}/{name.replace('.socket', '@.service')}", serves)
