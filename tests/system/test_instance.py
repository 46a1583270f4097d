"""Images without cloud-init: the configuration comes from the cloud's metadata service or the kernel command line."""

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from lab.machine import Machine
from lab.network import Network
from lab.run import Run
from lab.services import Endpoint, Service
from system.joining import join, status

FILE = "/etc/vmmesh-agent/config.d/50-instance.yaml"
LINK_LOCAL = "169.254.169.254"


class MetadataService(Service):
    """The stand-in metadata service, on the link of the run's machines."""

    def __init__(self, user_data: dict[str, Any], *, network: Network, run: Run) -> None:
        super().__init__("metadata", ready="listening", network=network, run=run)
        self.user_data = self.folder / "user-data"
        self.user_data.write_text(json.dumps(user_data))

    def argv(self) -> list[str]:
        return ["-m", "standins.metadata", LINK_LOCAL, str(self.user_data)]


@pytest.fixture
def given(endpoint: Endpoint) -> dict[str, Any]:
    """What an instance is given to join with: the configuration, with the token itself in the place of its file."""
    given = endpoint.configuration()
    return given | {
        "endpoint": {key: value for key, value in given["endpoint"].items() if key != "credential"},
        "join_token": endpoint.token,
    }


@pytest.fixture
def metadata(given: dict[str, Any], network: Network, run: Run) -> Iterator[MetadataService]:
    address = ["ip", "-n", network.cluster, "address"]
    subprocess.run([*address, "add", f"{LINK_LOCAL}/32", "dev", "br0"], check=True)
    try:
        with MetadataService({"vmmesh": given, "other": 1}, network=network, run=run) as service:
            yield service
    finally:
        subprocess.run([*address, "del", f"{LINK_LOCAL}/32", "dev", "br0"], check=True)


def test_an_instance_joins_by_its_user_data_at_its_first_boot(machine: Machine, metadata: MetadataService) -> None:
    machine.run(["systemctl", "enable", "vmmesh-agent", "vmmesh-agent-configure@ec2"])
    machine.reboot()
    machine.run(["vmmesh-agent", "wait", "--timeout=60"], timeout=90)
    assert machine.run(["stat", "--format=%a %U", FILE]).stdout == "644 root\n"
    shown = machine.run(["journalctl", "--output=cat", "--unit=vmmesh-agent-configure@ec2"]).stdout
    assert f"wrote {FILE}" in shown

    metadata.stop()  # once is enough
    machine.reboot()
    machine.run(["vmmesh-agent", "wait", "--timeout=60"], timeout=90)


def test_an_instance_that_was_given_nothing_has_not_joined_and_says_so(
    machine: Machine, metadata: MetadataService
) -> None:
    metadata.user_data.unlink()
    done = machine.run(["vmmesh-agent", "configure", "ec2"])
    assert done.stdout == "nothing for vmmesh-agent was given to this instance (ec2)\n"
    assert not (machine.root / FILE.lstrip("/")).exists()
    assert status(machine)["state"] == "not-joined"


def test_an_instance_joins_by_the_kernel_command_line(machine: Machine, given: dict[str, Any]) -> None:
    words = [f"vmmesh.{name}={value}" for name, value in settings(given)]
    machine.write("/run/cmdline", f"root=/dev/vda1 {' '.join(words)} quiet\n")
    machine.run(["mount", "--bind", "/run/cmdline", "/proc/cmdline"])  # the container has its host's
    machine.run(["vmmesh-agent", "configure", "kernel"])
    join(machine)


def settings(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from settings(value, f"{prefix}{name}.")
        else:
            yield (
                f"{prefix}{name}",
                value if isinstance(value, str) else json.dumps(value).replace('"', "'").replace(" ", ""),
            )
