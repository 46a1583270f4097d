"""The agent beside cloud-init at work: nobody waits for whom waits for him, and what goes wrong is told."""

import json
from pathlib import Path

import pytest
import yaml

from cloudinit.conftest import Boot
from cloudinit.test_examples import KEPT, assert_only_the_kept_token_is_left, assert_set_up
from lab.machine import Machine
from system.joining import Mesh, unit

AGENT = "vmmesh-agent.service"
CONFIG = "/etc/vmmesh-agent/config.d/50-cloud-init.yaml"


def user_data(mesh: Mesh, runcmd: list[str], *, defer: bool = False, **config: object) -> str:
    """Write configuration and token as the examples do, or as late as cloud-init can, and run these commands."""
    configuration = yaml.safe_dump(mesh.endpoint.configuration(**config))
    files = [
        {"path": CONFIG, "content": configuration, "defer": defer},
        {
            "path": "/etc/vmmesh-agent/join-token",
            "content": mesh.endpoint.create_token(),
            "permissions": "0600",
            "defer": defer,
        },
    ]
    return "#cloud-config\n" + yaml.safe_dump({"write_files": files, "runcmd": runcmd})


@pytest.fixture
def enabled(tmp_path: Path) -> Path:
    """What makes the agent start with the image's first boot."""
    wants = tmp_path / "enabled/etc/systemd/system/multi-user.target.wants"
    wants.mkdir(parents=True)
    (wants / AGENT).symlink_to(f"/usr/lib/systemd/system/{AGENT}")
    return tmp_path / "enabled"


def test_an_agent_that_the_image_starts_waits_for_what_cloud_init_writes_last(
    boot: Boot, mesh: Mesh, enabled: Path
) -> None:
    machine = boot(user_data(mesh, [], defer=True), files=enabled)

    assert_set_up(machine)
    assert 'event="waiting for cloud-init"' in machine.journal(AGENT)
    assert unit(machine, AGENT)["NRestarts"] == "0"
    assert_only_the_kept_token_is_left(machine)


def test_cloud_init_may_wait_for_the_agent_which_waits_for_it(boot: Boot, mesh: Mesh) -> None:
    """The agent is started before its configuration is written, by the commands that write it afterwards."""
    late = "\n".join(["cat > " + CONFIG + " <<'EOF'", yaml.safe_dump(mesh.endpoint.configuration()), "EOF"])
    machine = boot(
        user_data(mesh, [f"rm {CONFIG}", f"systemctl enable --now {AGENT}", "vmmesh-agent status > /root/said", late])
    )

    assert_set_up(machine)
    said = machine.read("/root/said").decode()
    assert "starting" in said
    assert "Waiting for cloud-init to write the configuration" in said


def test_bootstrap_in_user_data_does_not_wait_for_cloud_init(boot: Boot, mesh: Mesh) -> None:
    machine = boot(user_data(mesh, ["vmmesh-agent bootstrap > /root/said 2>&1"]))

    assert_set_up(machine)
    assert "healthy" in machine.read("/root/said").decode()
    assert_only_the_kept_token_is_left(machine)


def test_user_data_without_a_configuration_ends_the_agent_with_the_reason(boot: Boot, enabled: Path) -> None:
    machine = boot("#cloud-config\nruncmd: [exit 3]\n", files=enabled)

    machine.run(["sh", "-c", f"while systemctl --quiet is-active {AGENT}; do sleep 0.2; done"], timeout=60)
    shown = unit(machine, AGENT)
    assert (shown["ActiveState"], shown["ExecMainStatus"], shown["NRestarts"]) == ("failed", "78", "0")
    journal = machine.journal(AGENT)
    assert "[configuration-missing]" in journal
    assert "cloud-init had errors" in journal
    assert "scripts-user" in journal
    assert json.loads(machine.read("/run/cloud-init/result.json"))["v1"]["errors"]


def test_a_token_file_that_cannot_be_removed_is_told_once_and_hinders_nothing(boot: Boot, mesh: Mesh) -> None:
    read_only = "mount --bind /etc/vmmesh-agent /etc/vmmesh-agent && mount -o remount,bind,ro /etc/vmmesh-agent"
    machine = boot(user_data(mesh, [read_only, "vmmesh-agent bootstrap > /root/said 2>&1"]))

    assert_set_up(machine)
    assert machine.read("/root/said").decode().count(KEPT) == 1
    assert machine.read("/etc/vmmesh-agent/join-token") == machine.read(KEPT).rstrip()
    again = machine.run(["vmmesh-agent", "bootstrap"])
    assert KEPT not in again.stdout


def test_what_looks_at_the_configuration_does_not_miss_a_token_that_is_kept(boot: Boot, mesh: Mesh) -> None:
    machine = boot(user_data(mesh, [f"systemctl enable --now {AGENT}"]))
    assert_set_up(machine)
    assert_only_the_kept_token_is_left(machine)

    assert "join-token" in machine.run(["vmmesh-agent", "check-config"]).stdout
    for command in (["status"], ["doctor"]):
        said = machine.run(["vmmesh-agent", *command], check=False).stdout
        assert "join-token" not in said
        assert "credential" not in said
    assert_joins_again(machine, "leave")
    machine.run(["vmmesh-agent", "leave", "--purge"], timeout=120)
    assert machine.run(["ls", KEPT], check=False).returncode == 2


def assert_joins_again(machine: Machine, command: str) -> None:
    machine.run(["vmmesh-agent", command], timeout=120)
    machine.run(["systemctl", "enable", "--now", AGENT])
    machine.run(["vmmesh-agent", "wait", "--for", "healthy", "--timeout", "60"], timeout=90)
