"""The machines of the lab do what tests rely on."""

import subprocess
from collections.abc import Iterator

import pytest

from lab import image
from lab.machine import Entry, Machine, difference
from lab.network import CLUSTER_IPV4, CLUSTER_IPV6, Network
from lab.run import Run

_FILE = Entry("file", mode="0644", uid=0, gid=0, size=1, content="aa", written=1)


@pytest.fixture
def machine(network: Network, run: Run) -> Iterator[Machine]:
    with Machine("lab1", layers=[image.base_tree()], network=network, run=run) as machine:
        yield machine


def _is_reachable(machine: Machine, address: str) -> bool:
    # Nothing listens there: a host that is up refuses (curl's status 7), without one curl gives up (28).
    asked = machine.run(["curl", "--silent", "--max-time", "3", f"http://{address}:9/"], check=False)
    return asked.returncode == 7


@pytest.mark.system
def test_a_machine_is_fully_up_when_it_is_handed_out(machine: Machine) -> None:
    assert machine.run(["systemctl", "is-system-running"]).stdout == "running\n"
    assert machine.run(["hostname"]).stdout == "lab1\n"


@pytest.mark.system
def test_two_machines_have_their_own_names_identities_processes_and_networks(
    machine: Machine, network: Network, run: Run
) -> None:
    def identities(machine: Machine) -> list[str]:
        asked = machine.run(["sh", "-ec", "hostname; cat /etc/machine-id; cat /proc/sys/kernel/random/boot_id"])
        return asked.stdout.split()

    with Machine("lab2", layers=[image.base_tree()], network=network, run=run) as other:
        machine.run(["systemd-run", "--unit=mine", "sleep", "1000"])
        assert not set(identities(machine)) & set(identities(other))
        assert other.run(["pgrep", "sleep"], check=False).returncode == 1
        other.run(["iptables", "--table=nat", "--new-chain=MINE"])
        assert "MINE" not in machine.run(["iptables-save"]).stdout
        assert _is_reachable(machine, other.link.ipv4)
    assert machine.run(["systemctl", "is-active", "mine"]).stdout == "active\n"


@pytest.mark.system
def test_a_unit_of_the_machine_may_set_packet_filters(machine: Machine) -> None:
    rule = "iptables -t nat -A OUTPUT -p tcp -m owner ! --uid-owner 0 -j REDIRECT --to-ports 15001"
    machine.run(["systemd-run", "--wait", "--quiet", "sh", "-ec", f"{rule}; ip6{rule.removeprefix('ip')}"])
    assert "--to-ports 15001" in machine.run(["iptables-save"]).stdout
    assert "--to-ports 15001" in machine.run(["ip6tables-save"]).stdout


@pytest.mark.system
def test_a_reboot_keeps_the_disk_and_forgets_the_rest(machine: Machine) -> None:
    before = machine.read("/proc/sys/kernel/random/boot_id")
    machine.write("/var/lib/kept", "kept")
    machine.write("/run/forgotten", "forgotten")
    machine.run(["iptables", "--table=nat", "--new-chain=FORGOTTEN"])

    machine.reboot()

    assert machine.read("/proc/sys/kernel/random/boot_id") != before
    assert machine.read("/var/lib/kept") == b"kept"
    with pytest.raises(FileNotFoundError):
        machine.read("/run/forgotten")
    assert "FORGOTTEN" not in machine.run(["iptables-save"]).stdout


@pytest.mark.system
def test_a_reset_machine_is_as_on_its_first_day(machine: Machine) -> None:
    first = machine.snapshot()
    machine.write("/etc/new/file", "new")
    machine.run(["rm", "/etc/motd", "/usr/bin/less"])

    machine.reset()

    # Files that each start writes differ in their times only.
    assert {line for line in difference(first, machine.snapshot()) if "written again" not in line} == set()


@pytest.mark.system
def test_snapshots_of_an_idle_machine_are_equal(machine: Machine) -> None:
    first = machine.snapshot()
    machine.run(["sudo", "--user=nobody", "true"])
    assert difference(first, machine.snapshot()) == []
    assert first["/etc/passwd"].kind == "file"
    assert first["/etc/os-release"].content == "../usr/lib/os-release"


@pytest.mark.system
def test_a_snapshot_sees_every_kind_of_change(machine: Machine) -> None:
    first = machine.snapshot()
    machine.write("/etc/hosts", "127.0.0.1 localhost\n")
    machine.write("/run/secret/token", "t", mode=0o600, owner="nobody")
    machine.run(["sh", "-ec", "chmod 600 /etc/issue; touch /etc/passwd; rm /etc/motd; chown 1:2 /srv"])

    changes = "\n".join(difference(first, machine.snapshot()))

    assert "/etc/hosts: size" in changes
    assert "/run/secret: new folder, mode 0755, owner 0:0" in changes
    assert "/run/secret/token: new file, mode 0600, owner 65534:65534" in changes
    assert "/etc/issue: mode 0644 is now 0600" in changes
    assert "/etc/passwd: written again with the same content" in changes
    assert "/etc/motd: file removed" in changes
    assert "/srv: uid 0 is now 1, gid 0 is now 2" in changes


@pytest.mark.system
def test_a_cut_link_is_silent_until_it_is_restored(machine: Machine) -> None:
    assert _is_reachable(machine, CLUSTER_IPV4)
    assert _is_reachable(machine, f"[{CLUSTER_IPV6}]")
    machine.link.cut()
    assert not _is_reachable(machine, CLUSTER_IPV4)
    machine.reboot()
    assert not _is_reachable(machine, CLUSTER_IPV4)
    machine.link.restore()
    assert _is_reachable(machine, CLUSTER_IPV4)


@pytest.mark.system
def test_a_command_that_takes_too_long_is_ended_with_its_children(machine: Machine) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        machine.run(["sh", "-c", "sleep 1000; true"], timeout=0.5)
    assert machine.run(["pgrep", "sleep"], check=False).returncode == 1


@pytest.mark.system
def test_a_command_may_not_do_more_than_the_machine_itself(machine: Machine) -> None:
    done = machine.run(["date", "--set=12:00"], check=False)
    assert "Operation not permitted" in done.stderr
    assert machine.run(["id", "--user", "--name"], user="nobody").stdout == "nobody\n"


@pytest.mark.system
def test_the_journal_outlives_the_machine(machine: Machine) -> None:
    machine.run(["systemd-run", "--wait", "--quiet", "--unit=said", "echo", "last words"])
    machine.crash()
    machine.stop()
    assert "last words" in machine.journal("said")


def test_no_difference_is_no_line() -> None:
    assert difference({"/a": _FILE}, {"/a": _FILE}) == []


def test_what_is_ignored_is_not_told() -> None:
    assert difference({}, {"/var/log/a": _FILE, "/etc/b": _FILE}, ignore=["/var/log/*"]) == [
        "/etc/b: new file, mode 0644, owner 0:0"
    ]
