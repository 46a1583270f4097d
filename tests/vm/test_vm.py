"""A booted virtual machine: from an image and a user-data into the mesh, there again after a reboot, and as an image.

The tests are one story and share its machines: a boot takes a minute of an emulated processor.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from cloudinit.examples import example, invitation
from cloudinit.repository import Mirror, publish
from lab.built import agent_packages
from lab.network import Network
from lab.run import Run
from standins.packages import build
from system.joining import TOKEN, Mesh, requests, running_mesh, status, unit
from vm.image import Image, cloud_image
from vm.machine import Seed, VirtualMachine

pytestmark = pytest.mark.timeout(1800)

Record = Callable[[str, object], None]

AGENT = "vmmesh-agent.service"
RESTORE = "vmmesh-agent-restore.service"
KEY = "/etc/certs/key.pem"
JOIN_TOKEN = "/etc/vmmesh-agent/join-token"
USER_DATA_OF_A_COPY = """\
#cloud-config
write_files:
  - path: /etc/vmmesh-agent/join-token
    permissions: "0600"
    content: {token}
"""


@pytest.fixture(scope="module")
def mesh(network: Network, run: Run) -> Iterator[Mesh]:
    """The cluster that all machines of the story join."""
    with running_mesh(build(run.folder / "packages"), network=network, run=run) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def user_data(mesh: Mesh, network: Network, run: Run) -> Iterator[str]:
    """What the documentation shows for a repository, with what an administrator replaces in it."""
    with Mirror(network=network, run=run) as mirror:
        key = publish([agent_packages().deb], mirror.files)
        indented = "".join(f"      {line}\n" for line in key.splitlines())
        yield example("repository.yaml", repository=mirror.url, key=indented, **invitation(mesh))


@pytest.fixture(scope="module")
def member(user_data: str, network: Network, run: Run) -> Iterator[VirtualMachine]:
    """A machine after its first boot, from an image that has nothing of the agent."""
    with VirtualMachine("booted1", cloud_image(), Seed("i-member", user_data), network=network, run=run) as machine:
        yield machine


@pytest.fixture(scope="module")
def rebooted(member: VirtualMachine) -> VirtualMachine:
    """The same machine after its second boot."""
    _is_healthy(member)
    member.reboot()
    return member


@dataclasses.dataclass(frozen=True)
class Golden:
    """An image made of a member, and what the member was known by."""

    image: Image
    names: set[str]


@pytest.fixture(scope="module")
def golden(rebooted: VirtualMachine, mesh: Mesh) -> Golden:
    """The member's disk, made fit to become an image."""
    _is_healthy(rebooted)
    names = _names(rebooted, mesh)
    rebooted.run(["vmmesh-agent", "image-clean"], timeout=300)
    rebooted.run(["cloud-init", "clean", "--logs"])
    return Golden(rebooted.stop(), names)


@pytest.fixture(scope="module")
def copies(golden: Golden, mesh: Mesh, network: Network, run: Run) -> Iterator[list[VirtualMachine]]:
    """Two machines of the image, each with a token and an identity of its own, at their first boot."""
    with ExitStack() as stack:
        machines = []
        for name in ("booted2", "booted3"):
            seed = Seed(f"i-{name}", USER_DATA_OF_A_COPY.format(token=mesh.endpoint.create_token()))
            machine = VirtualMachine(name, golden.image, seed, network=network, run=run)
            stack.callback(machine.power_off)
            machine.start()
            machines.append(machine)
        for machine in machines:
            machine.wait_until_up()
        yield machines


def test_a_first_boot_with_the_user_data_of_the_documentation_ends_in_the_mesh(
    member: VirtualMachine, mesh: Mesh, record_property: Record
) -> None:
    done = member.run(["cloud-init", "status", "--long"], check=False)
    assert done.returncode == 0, done.stdout
    assert "status: done" in done.stdout
    _is_healthy(member)
    shown = member.run(["vmmesh-agent", "status"])
    assert "healthy" in shown.stdout
    assert member.run(["systemctl", "is-system-running"], check=False).stdout == "running\n"
    assert _streams_from(member, mesh)
    assert member.run(["test", "-e", JOIN_TOKEN], check=False).returncode == 1
    record_property("measured", f"first boot: {_times(member)}")
    modules = member.run(["cloud-init", "analyze", "blame"]).stdout.splitlines()
    record_property("measured", "\n".join(line for line in modules if "package" in line or "scripts" in line))


def test_the_units_form_no_cycle_with_those_of_cloud_init(rebooted: VirtualMachine) -> None:
    assert "ordering cycle" not in rebooted.journal()


def test_a_reboot_ends_in_the_mesh_with_the_files_there_before_the_sidecar(
    rebooted: VirtualMachine, record_property: Record
) -> None:
    boots = rebooted.run(["journalctl", "--list-boots", "--no-pager"]).stdout.splitlines()
    assert [line.split()[0] for line in boots[-2:]] == ["-1", "0"]
    assert rebooted.run(["cloud-init", "status"]).stdout == "status: done\n"
    _is_healthy(rebooted)
    assert rebooted.run(["vmmesh-agent", "status"]).returncode == 0
    assert rebooted.run(["stat", "--format=%a %U", TOKEN]).stdout == "600 istio-proxy\n"
    istio, restored = unit(rebooted), unit(rebooted, RESTORE)
    assert (istio["ActiveState"], istio["NRestarts"], restored["Result"]) == ("active", "0", "success")
    assert 0 < int(restored["ExecMainExitTimestampMonotonic"]) <= int(istio["ExecMainStartTimestampMonotonic"])
    record_property("measured", f"reboot: {_times(rebooted)}")


def test_two_machines_of_one_image_join_as_themselves(copies: list[VirtualMachine], golden: Golden, mesh: Mesh) -> None:
    known = set(golden.names)
    assert len(known) == _NAMES
    for copy in copies:
        done = copy.run(["cloud-init", "status", "--long"], check=False)
        assert "status: done" in done.stdout, done.stdout
        _is_healthy(copy)
        assert copy.run(["vmmesh-agent", "status"]).returncode == 0
        assert copy.run(["hostname"]).stdout.strip() == copy.name
        assert _streams_from(copy, mesh)
        names = _names(copy, mesh)
        assert len(names) == _NAMES
        assert not known & names
        known |= names


def _is_healthy(machine: VirtualMachine) -> None:
    waited = machine.run(["vmmesh-agent", "wait", "--for", "healthy", "--timeout", "900"], check=False, timeout=960)
    assert waited.returncode == 0, (status(machine), machine.journal(AGENT))


_NAMES = 4  # a machine that is one and the same to all has no more


def _names(machine: VirtualMachine, mesh: Mesh) -> set[str]:
    """By what this machine is told from others: its ID, its key, and what the endpoint and istiod call it."""
    files = machine.run(["sha256sum", "/etc/machine-id", KEY]).stdout.split()[::2]
    asked = [each for each in requests(mesh.endpoint) if each["client"] == machine.ipv4]
    known_as = {each["machine"] for each in asked if "machine" in each}
    return {*files, *known_as, *_streams_from(machine, mesh)}


def _streams_from(machine: VirtualMachine, mesh: Mesh) -> set[str]:
    """As which nodes istiod served this machine's sidecar."""
    streams = [each for each in mesh.istiod.requests() if each["method"] == "StreamAggregatedResources"]
    return {each["node"] for each in streams if each["peer"] == machine.ipv4 and each["code"] == "OK"}


def _times(machine: VirtualMachine) -> str:
    """How long the boot took, and the agent's part in it; for people, who know how fast an emulated processor is."""
    total = machine.run(["systemd-analyze", "time"]).stdout.partition("\n")[0]
    agent, restore, ready = (unit(machine, name) for name in (AGENT, RESTORE, "vmmesh-ready.target"))
    blame = machine.run(["systemd-analyze", "blame", "--no-pager"]).stdout.splitlines()
    return "\n".join(
        [
            total,
            f"in the mesh {_seconds(ready, 'ActiveEnter')} s after the kernel's start",
            f"{AGENT} started at {_seconds(agent, 'InactiveExit')} s, ready at {_seconds(agent, 'ActiveEnter')} s, "
            f"{int(agent['CPUUsageNSec']) / 1e9:.1f} s of the processor until now",
            f"{RESTORE} from {_seconds(restore, 'ExecMainStart')} s to {_seconds(restore, 'ExecMainExit')} s",
            *(line for number, line in enumerate(blame) if number < 5 or "vmmesh" in line),
        ]
    )


def _seconds(properties: dict[str, str], event: str) -> str:
    return f"{int(properties[f'{event}TimestampMonotonic']) / 1e6:.1f}"
