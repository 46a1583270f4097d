"""The stand-in's chains, set and removed by the real iptables in a network namespace of their own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.cluster import Release
from standins import packages

CAPTURE = {
    "ISTIO_INBOUND_PORTS": "*",
    "ISTIO_LOCAL_EXCLUDE_PORTS": "22,15090,15021,15020",
    "ISTIO_SERVICE_CIDR": "*",
    "ISTIO_META_DNS_CAPTURE": "true",
}

pytestmark = pytest.mark.system


@pytest.fixture
def namespace() -> Iterator[str]:
    name = f"standins-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
    yield name
    subprocess.run(["ip", "netns", "del", name], check=True)


class Machine:
    """A namespace with a root folder that has a resolv.conf."""

    def __init__(self, namespace: str, root: Path, behaves_as: Release) -> None:
        self._enter = ["ip", "netns", "exec", namespace]
        self._root = root
        (root / "etc").mkdir()
        (root / "etc/resolv.conf").write_text("nameserver 192.0.2.53\nnameserver 2001:db8::53\n")
        (root / "pilot-agent").write_text(packages.pilot_agent(behaves_as=behaves_as))

    def pilot_agent(self, *arguments: str) -> None:
        command = [*self._enter, sys.executable, "pilot-agent", *arguments]
        environment = {"PATH": os.environ["PATH"], **CAPTURE}
        subprocess.run(command, cwd=self._root, env=environment, check=True, capture_output=True)

    def rules(self, program: str) -> list[str]:
        saved = subprocess.run([*self._enter, f"{program}-save"], capture_output=True, text=True, check=True)
        return [line for line in saved.stdout.splitlines() if "ISTIO" in line or "-A " in line]

    def addresses(self) -> str:
        shown = subprocess.run([*self._enter, "ip", "-o", "address"], capture_output=True, text=True, check=True)
        return shown.stdout


@pytest.mark.parametrize("behaves_as", ["1.12", "newest"])
def test_all_chains_are_set_for_both_protocols_and_cleaning_leaves_nothing(
    namespace: str, tmp_path: Path, behaves_as: Release
) -> None:
    machine = Machine(namespace, tmp_path, behaves_as)
    before = machine.addresses()
    machine.pilot_agent("istio-clean-iptables")  # of nothing, as at the first start
    machine.pilot_agent("istio-iptables")
    for program, server in (("iptables", "192.0.2.53/32"), ("ip6tables", "2001:db8::53/128")):
        rules = machine.rules(program)
        assert "-A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001" in rules
        assert "-A ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports 15006" in rules
        assert "-A ISTIO_INBOUND -p tcp -m tcp --dport 22 -j RETURN" in rules
        assert any(f"-d {server} -p udp -m udp --dport 53 -j REDIRECT --to-ports 15053" in rule for rule in rules)
        assert any(rule.startswith("-A ISTIO_OUTPUT -m owner --uid-owner") for rule in rules)

    machine.pilot_agent("istio-iptables", "--cleanup-only")
    assert machine.rules("iptables") == []
    assert machine.rules("ip6tables") == []
    assert machine.addresses() == before
