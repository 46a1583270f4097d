"""Steps of the stories that take the daemon or a limit: what several test files tell of in the same way."""

import subprocess
from collections.abc import Iterable, Mapping
from typing import Any

from lab.cluster import Files as BundleFiles
from system.faults import Vm
from system.joining import PLACED, TOKEN, requests

LIMIT = 20  # seconds of `healthy_within`, in place of three minutes
LONG = 150.0  # a limit or two, with a stop and a start of the sidecar each, on a busy machine
HOSTS = "/etc/hosts"


def limited(vm: Vm, **settings: Any) -> None:
    """Begin healthy, on a bundle that proved good, with a limit that is short enough to wait for."""
    vm.mesh.endpoint.invite(vm.machine, healthy_within=LIMIT, **settings)
    vm.mesh.publish(bundle(vm))
    tries(vm)
    vm.is_healthy()


def bundle(vm: Vm, **different: Any) -> BundleFiles:
    """Make a bundle for this machine; two of them differ in the token, and in what is asked for."""
    return vm.cluster.bundle(address=vm.address, **different)


def tries(vm: Vm) -> None:
    """Make the daemon try at once, and wait until it has: whoever tries holds the lock meanwhile."""
    before = len(requests(vm.mesh.endpoint))
    vm.does("systemctl reload vmmesh-agent")
    vm.seen("a request", lambda: len(requests(vm.mesh.endpoint)) > before)
    vm.does("flock /run/vmmesh-agent/lock true")


def placed(vm: Vm, *, but: Iterable[str] = (TOKEN,)) -> dict[str, bytes]:
    """Return what the agent put in place, by path: the token, which changes all the time, is left out."""
    return {path: vm.machine.read(path) for path in {*PLACED.values(), HOSTS} - {*but}}


def codes(shown: Mapping[str, Any]) -> list[str]:
    """Return the codes of all conditions."""
    return [condition["code"] for condition in shown["conditions"]]


def chains(vm: Vm) -> str:
    """Return the rules of the sidecar's traffic capture, of both families; empty where nothing is captured."""
    return vm.run("iptables-save -t nat | grep ISTIO; ip6tables-save -t nat | grep ISTIO").stdout


def answer(vm: Vm, port: int) -> str:
    """Return what a server of the machine says to the cluster's side, empty where it cannot be reached."""
    call = ["timeout", "5", "bash", "-c", f"exec 3<>/dev/tcp/{vm.machine.link.ipv4}/{port}; head -n 1 <&3"]
    return subprocess.run(vm.network.in_cluster(call), check=False, text=True, capture_output=True).stdout.strip()
