"""The Ansible role, run by ansible-playbook over ssh (ansible-core's own connection plugin) on machines with sshd."""

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab import cache, image
from lab.built import agent_packages
from lab.image import REPOSITORY
from lab.machine import Machine
from lab.network import Network
from lab.run import Run
from standins.packages import Packages
from system.joining import TOKEN, Mesh, status, unit

AGENT = "vmmesh-agent.service"
PLAYBOOKS = REPOSITORY / "packaging/ansible"
JOIN_TOKEN = "/etc/vmmesh-agent/join-token"
Play = Callable[..., str]
_REQUIREMENTS = ("ansible-core==2.19.14", "ansible-lint==26.10.1")

pytestmark = pytest.mark.timeout(600)  # each task of a playbook is a connection


@pytest.fixture(scope="module")
def ansible() -> Path:
    """The folder with Ansible's programs."""

    def build(out: Path) -> None:
        final = str(out).removesuffix(".partial")  # scripts name the folder that they are run from
        subprocess.run(["/usr/bin/python3", "-m", "venv", out], check=True)
        subprocess.run([f"{out}/bin/python", "-m", "pip", "install", "--quiet", *_REQUIREMENTS], check=True)
        for script in (out / "bin").glob("ansible*"):
            script.write_text(script.read_text().replace(str(out), final))

    return cache.entry("ansible", _REQUIREMENTS, build) / "bin"


@pytest.fixture
def managed(network: Network, run: Run, tmp_path: Path) -> Iterator[Machine]:
    """A machine with sshd and nothing of the agent, and an inventory with it in `tmp_path`."""
    layers = [*image.layers("deb", with_agent=False), image.debian(image.base_tree(), "openssh-server", "python3-apt")]
    with Machine("managed", layers=layers, network=network, run=run) as machine:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
        machine.write("/root/.ssh/authorized_keys", (tmp_path / "key.pub").read_bytes(), mode=0o600)
        kind, key, *_ = machine.read("/etc/ssh/ssh_host_ed25519_key.pub").decode().split()
        (tmp_path / "known_hosts").write_text(f"{machine.link.ipv4} {kind} {key}\n")
        variables = {
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(tmp_path / "key"),
            "ansible_ssh_common_args": f"-o UserKnownHostsFile={tmp_path / 'known_hosts'} -o ControlMaster=no",
            "ansible_python_interpreter": "/usr/bin/python3",
        }
        hosts = {machine.link.ipv4: variables}
        (tmp_path / "inventory.yml").write_text(yaml.safe_dump({"all": {"hosts": hosts}}))
        yield machine


@pytest.fixture
def play(ansible: Path, network: Network, tmp_path: Path) -> Play:
    """Run one of the example playbooks with these variables in place of its own, and return all that it said."""

    def run(playbook: str, variables: Mapping[str, Any], *arguments: str, expect: int = 0) -> str:
        (tmp_path / "variables.yml").write_text(yaml.safe_dump(dict(variables)))
        argv = [
            *(str(ansible / "ansible-playbook"), f"--inventory={tmp_path / 'inventory.yml'}"),
            *(f"--extra-vars=@{tmp_path / 'variables.yml'}", *arguments, str(PLAYBOOKS / playbook)),
        ]
        done = subprocess.run(
            network.in_cluster(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment(ansible, tmp_path),
            cwd=tmp_path,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == expect, done.stdout
        return done.stdout

    return run


def test_the_example_puts_a_machine_into_the_mesh_and_a_second_run_changes_nothing(
    managed: Machine, mesh: Mesh, packages: Packages, play: Play
) -> None:
    token = mesh.endpoint.create_token()
    variables = {
        **_package_files(packages),
        "vmmesh_agent_config": mesh.endpoint.configuration(),
        "join_token": token,
    }

    said = play("site.yml", variables, "--diff", "-vvv")

    _wait_until_healthy(managed)
    assert managed.read(TOKEN)
    assert token not in said
    assert (unit(managed, AGENT)["UnitFileState"], unit(managed)["UnitFileState"]) == ("enabled", "enabled")
    before = unit(managed)["InvocationID"], unit(managed, AGENT)["InvocationID"]

    again = play("site.yml", variables)

    assert _changed(again) == 0, again
    assert (unit(managed)["InvocationID"], unit(managed, AGENT)["InvocationID"]) == before
    assert managed.run(["test", "-e", JOIN_TOKEN], check=False).returncode == 1

    changed = {**variables, "vmmesh_agent_config": {**mesh.endpoint.configuration(), "healthy_within": 99}}
    assert _changed(play("site.yml", changed)) == 2
    assert "healthy_within: 99" in managed.run(["vmmesh-agent", "check-config"]).stdout
    assert unit(managed, AGENT)["InvocationID"] == before[1]  # reloaded
    assert status(managed)["state"] == "healthy"

    wrong = {**variables, "vmmesh_agent_config": {"endpoint": {"urll": "x"}}}
    refused = play("site.yml", wrong, expect=2)
    assert "did you mean endpoint.url?" in refused
    assert "healthy_within: 99" in managed.run(["vmmesh-agent", "check-config"]).stdout


def test_the_example_makes_an_image_and_a_second_run_changes_nothing(
    managed: Machine, mesh: Mesh, packages: Packages, play: Play
) -> None:
    variables: dict[str, Any] = {**_package_files(packages), "vmmesh_agent_config": mesh.endpoint.configuration()}
    with_token = {**variables, "vmmesh_agent_join_token": "a-token"}
    refused = play("image.yml", with_token, expect=2)
    assert managed.run(["test", "-e", "/usr/bin/vmmesh-agent"], check=False).returncode == 1, refused

    said = play("image.yml", variables)

    assert _changed(said) > 0
    assert managed.read("/etc/machine-id") == b""
    managed.run(["dpkg-query", "--show", "istio-sidecar"])
    assert (unit(managed, AGENT)["UnitFileState"], unit(managed, AGENT)["ActiveState"]) == ("enabled", "inactive")
    assert unit(managed)["UnitFileState"] == "disabled"
    assert f"endpoint.url: {mesh.endpoint.url}" in managed.run(["vmmesh-agent", "check-config"]).stdout

    again = play("image.yml", variables)

    assert _changed(again) == 0, again


def test_role_and_playbooks_are_clean_by_ansible_lints_strictest_profile(ansible: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [ansible / "ansible-lint", "--offline", "--strict", "--profile=production", "--project-dir=.", "."],
        cwd=PLAYBOOKS,
        env=_environment(ansible, tmp_path),
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


# --- steps -----------------------------------------------------------------------------------


def _package_files(packages: Packages) -> dict[str, str]:
    return {
        "vmmesh_agent_package_file": str(agent_packages().deb),
        "vmmesh_agent_sidecar_package_file": str(packages.deb),
    }


def _environment(ansible: Path, folder: Path) -> dict[str, str]:
    return {
        "PATH": f"{ansible}:{os.environ['PATH']}",
        "HOME": str(folder),
        "LC_ALL": "C.UTF-8",
        "ANSIBLE_HOME": str(folder / ".ansible"),
        "ANSIBLE_PIPELINING": "true",
        "ANSIBLE_SSH_ARGS": "-o ControlMaster=no",  # the path of its socket would be too long
    }


def _changed(said: str) -> int:
    (recap,) = re.findall(r"changed=(\d+) .*failed=0", said)
    return int(recap)


def _wait_until_healthy(machine: Machine) -> None:
    waited = machine.run(["vmmesh-agent", "wait", "--timeout", "90"], check=False, timeout=120)
    assert waited.returncode == 0, f"{status(machine)}\n{machine.journal(AGENT)}"
