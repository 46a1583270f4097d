"""The user-data examples, on machines with Debian's cloud-init: what a VM is after its first boot, and after the next.

A machine is up when cloud-init is done with it: systemd counts cloud-final.service as part of the boot.
"""

import base64
import hashlib
import json
from pathlib import Path
from shutil import copy
from typing import Any

import pytest

from cloudinit.conftest import Boot
from cloudinit.examples import EXAMPLES, example, invitation
from cloudinit.repository import Mirror, publish, publish_rpms
from lab.built import agent_packages, distribution_rpm
from lab.cluster import as_tar
from lab.image import Family
from lab.machine import Machine
from standins.packages import Packages
from system.joining import Mesh, status

JOIN_TOKEN = "/etc/vmmesh-agent/join-token"
KEPT = "/var/lib/vmmesh-agent/join-token"


def assert_set_up(machine: Machine) -> None:
    """cloud-init is done without an error, and the machine is in the mesh."""
    done = machine.run(["cloud-init", "status", "--long"], check=False)
    said = json.loads(machine.read("/run/cloud-init/status.json"))["v1"]
    assert done.returncode == 0, f"{done.stdout}\n{said}"
    assert "status: done" in done.stdout
    waited = machine.run(["vmmesh-agent", "wait", "--for", "healthy", "--timeout", "60"], check=False, timeout=90)
    assert waited.returncode == 0, machine.run(["vmmesh-agent", "status"], check=False).stdout


def written(machine: Machine) -> dict[str, Any]:
    """What is in the agent's configuration, and when each file was written."""
    return {path: entry for path, entry in machine.snapshot().items() if path.startswith("/etc/vmmesh-agent")}


def assert_back_after_a_reboot(machine: Machine) -> None:
    before = written(machine)
    machine.reboot()
    assert_set_up(machine)
    assert written(machine) == before


@pytest.mark.parametrize("family", ["deb", "rpm"])
def test_a_repository_a_configuration_and_a_token_make_a_vm_of_the_mesh(
    family: Family, boot: Boot, mesh: Mesh, mirror: Mirror
) -> None:
    if family == "deb":
        key = publish([agent_packages().deb], mirror.files)
        address = {"repository": mirror.url}
    else:
        rpm = agent_packages().rpm
        distribution_rpm(rpm, mirror.folder)
        key = publish_rpms([rpm, *mirror.folder.glob("*.rpm")], mirror.files)
        address = {"rpm_repository": mirror.url}
    indented = "".join(f"      {line}\n" for line in key.splitlines())
    user_data = example("repository.yaml", key=indented, **address, **invitation(mesh))

    machine = boot(user_data, family=family, with_agent=False)

    assert_set_up(machine)
    assert_only_the_kept_token_is_left(machine)
    assert_back_after_a_reboot(machine)


def test_a_package_from_a_web_server_will_do(boot: Boot, mesh: Mesh, mirror: Mirror) -> None:
    deb = agent_packages().deb
    copy(deb, mirror.files / "vmmesh-agent.deb")
    digest = f'"{hashlib.sha256(deb.read_bytes()).hexdigest()} '
    user_data = example("package.yaml", package=f"{mirror.url}/vmmesh-agent.deb", digest=digest, **invitation(mesh))

    machine = boot(user_data, with_agent=False)

    assert_set_up(machine)
    assert_only_the_kept_token_is_left(machine)
    assert_back_after_a_reboot(machine)


def test_a_package_that_was_exchanged_on_its_way_is_not_installed(boot: Boot, mesh: Mesh, mirror: Mirror) -> None:
    copy(agent_packages().deb, mirror.files / "vmmesh-agent.deb")
    user_data = example("package.yaml", package=f"{mirror.url}/vmmesh-agent.deb", **invitation(mesh))

    machine = boot(user_data, with_agent=False)

    assert machine.run(["cloud-init", "status"], check=False).returncode == 1
    assert machine.run(["dpkg-query", "-W", "vmmesh-agent"], check=False).returncode == 1


def test_an_image_that_has_all_needs_no_network(boot: Boot, mesh: Mesh, packages: Packages, tmp_path: Path) -> None:
    sidecars = tmp_path / "files/opt/istio-sidecar"
    sidecars.mkdir(parents=True)
    copy(packages.deb, sidecars)
    bundle = base64.b64encode(as_tar(mesh.cluster.bundle(), folder="demo")).decode()

    machine = boot(example("air-gapped.yaml", bundle=bundle), files=tmp_path / "files")

    assert_set_up(machine)
    assert status(machine)["sidecar"]["version"]
    assert_back_after_a_reboot(machine)


@pytest.mark.parametrize("name", [path.name for path in sorted(EXAMPLES.glob("*.yaml"))])
def test_cloud_init_finds_nothing_wrong_with_an_example(name: str, plain: Machine) -> None:
    plain.write(f"/tmp/{name}", (EXAMPLES / name).read_text())
    judged = plain.run(["cloud-init", "schema", "--config-file", f"/tmp/{name}"], check=False)
    assert (judged.returncode, judged.stdout.strip(), judged.stderr) == (0, f"Valid cloud-config: /tmp/{name}", "")


def assert_only_the_kept_token_is_left(machine: Machine) -> None:
    assert machine.run(["ls", JOIN_TOKEN], check=False).returncode == 2
    assert machine.run(["stat", "--format=%a %U", KEPT]).stdout == "600 root\n"
