"""The network of a run: one network namespace for the cluster's side and one for each machine.

Machines hang on a bridge in the cluster's namespace. Nothing of it exists in the host's own network. All
addresses are from the documentation ranges (RFC 5737, RFC 3849). What a machine sends elsewhere is
answered at once with "network unreachable", as by a router without a way out.
"""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from lab.run import Run

CLUSTER_IPV4 = "192.0.2.1"
CLUSTER_IPV6 = "2001:db8::1"


class Link:
    """A machine's cable: its namespace, its addresses, and the means to pull it."""

    def __init__(self, *, number: int, cluster: str, namespace: str) -> None:
        self.namespace = Path("/run/netns", namespace)
        self.ipv4 = f"192.0.2.{10 + number}"
        self.ipv6 = f"2001:db8::{10 + number:x}"
        self._cluster = ("-n", cluster)
        self._machine = ("-n", namespace)
        self._port = f"port{number}"
        self._is_cut = False

    def renew(self) -> None:
        """Make the machine's namespace anew, as at power-on: packet filters and connections do not last."""
        self.remove()
        name, ip = self.namespace.name, self._machine
        _ip("netns", "add", name)
        _ip(*self._cluster, "link", "add", self._port, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip(*self._cluster, "link", "set", self._port, "master", "br0", "down" if self._is_cut else "up")
        _ip(*ip, "link", "set", "lo", "up")
        _ip(*ip, "link", "set", "eth0", "up")
        _ip(*ip, "address", "add", f"{self.ipv4}/24", "dev", "eth0")
        _ip(*ip, "address", "add", f"{self.ipv6}/64", "dev", "eth0", "nodad")
        _ip(*ip, "-4", "route", "add", "default", "via", CLUSTER_IPV4)
        _ip(*ip, "-6", "route", "add", "default", "via", CLUSTER_IPV6)

    def remove(self) -> None:
        """Remove the machine's namespace, if there is one."""
        if self.namespace.exists():
            # The pair goes at once with one end of it, but only some time after its namespace.
            _ip(*self._cluster, "link", "delete", self._port)
            _ip("netns", "delete", self.namespace.name)

    def cut(self) -> None:
        """Pull the cable: the machine loses its carrier, packets are lost without an answer."""
        self._is_cut = True
        _ip(*self._cluster, "link", "set", self._port, "down")

    def restore(self) -> None:
        """Plug the cable in again."""
        self._is_cut = False
        _ip(*self._cluster, "link", "set", self._port, "up")


class Network:
    """The cluster's side, ready at once; its namespaces go when the run ends."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._links = 0
        self.cluster = f"{run.name}-cluster"
        _ip("netns", "add", self.cluster)
        ip = ("-n", self.cluster)
        _ip(*ip, "link", "set", "lo", "up")
        _ip(*ip, "link", "add", "br0", "type", "bridge")
        # Without an address of its own a bridge takes the lowest of its ports', another one with each machine that
        # comes or goes, and the others' ARP entries lead nowhere for half a minute.
        _ip(*ip, "link", "set", "br0", "address", "02:00:00:00:00:01")
        _ip(*ip, "link", "set", "br0", "up")
        # nodad: an IPv6 address is otherwise not usable for a second or two.
        _ip(*ip, "address", "add", f"{CLUSTER_IPV4}/24", "dev", "br0")
        _ip(*ip, "address", "add", f"{CLUSTER_IPV6}/64", "dev", "br0", "nodad")
        for family, switch in (("-4", "net.ipv4.ip_forward"), ("-6", "net.ipv6.conf.all.forwarding")):
            self._in_cluster("sysctl", "-q", "-w", f"{switch}=1")
            _ip(*ip, family, "route", "add", "unreachable", "default")

    def attach(self, name: str) -> Link:
        """Give the machine `name` its addresses; `Link.renew` makes its namespace and the `eth0` in it."""
        self._links += 1
        return Link(number=self._links, cluster=self.cluster, namespace=f"{self._run.name}-{name}")

    def in_cluster(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` on the cluster's side."""
        return ["nsenter", f"--net=/run/netns/{self.cluster}", "--", *argv]

    def _in_cluster(self, *argv: str) -> None:
        subprocess.run(self.in_cluster(argv), check=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
