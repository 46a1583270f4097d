"""Reboots of a member: with nothing to reach, with a hosts file that is new at each boot, and after a long time."""

import json
import time
from datetime import timedelta

import pytest

from lab.cluster import now
from lab.machine import Machine
from lab.network import CLUSTER_IPV4
from system.joining import TOKEN, Mesh, status, unit
from system.steps import AGENT, BEGIN, END, is_healthy

RESTORE = "vmmesh-agent-restore.service"


@pytest.fixture(scope="module")
def settled(shared_machine: Machine, mesh: Mesh) -> Machine:
    """A member for good: the daemon is enabled."""
    mesh.endpoint.invite(shared_machine)
    shared_machine.run(["systemctl", "enable", "--now", AGENT])
    is_healthy(shared_machine)
    return shared_machine


def test_a_reboot_without_any_endpoint_ends_in_the_mesh_with_the_files_there_before_the_sidecar(
    settled: Machine, mesh: Mesh
) -> None:
    token = settled.read(TOKEN)
    mesh.endpoint.stop()
    try:
        settled.reboot()

        # The endpoint that is down is told, and the sidecar serves all the same.
        settled.run(["vmmesh-agent", "wait", "--for", "degraded", "--timeout", "60"], timeout=90)
        shown = status(settled)
        assert [condition["code"] for condition in shown["conditions"]] == ["endpoint_refuses_connections"]
        istio = unit(settled)
        assert (istio["ActiveState"], istio["NRestarts"]) == ("active", "0")
        assert settled.read(TOKEN) == token
        assert settled.run(["stat", "--format=%a %U", TOKEN]).stdout == "600 istio-proxy\n"
        restored = unit(settled, RESTORE)
        assert restored["Result"] == "success"
        assert 0 < int(restored["ExecMainExitTimestampMonotonic"]) <= int(istio["ExecMainStartTimestampMonotonic"])
        finished, started = _told(settled, RESTORE, "Finished"), _told(settled, "istio.service", "Started")
        assert finished <= started
        written = settled.run(["stat", "--format=%.6Z", TOKEN]).stdout  # when it came to be what it is
        assert float(written) * 1e6 <= started
        assert "failed to fetch token" not in _sidecar_log_since_boot(settled)
    finally:
        mesh.endpoint.start()
    is_healthy(settled)


def test_a_reboot_without_network_ends_in_the_mesh_when_the_network_comes(settled: Machine) -> None:
    token = settled.read(TOKEN)
    settled.link.cut()
    try:
        settled.reboot()

        assert settled.read(TOKEN) == token
        assert unit(settled)["ActiveState"] == "active"
        assert status(settled)["state"] != "healthy"
    finally:
        settled.link.restore()
    is_healthy(settled)
    assert unit(settled)["NRestarts"] == "0"


def test_the_units_are_sound_and_form_no_cycle(settled: Machine) -> None:
    complaints = [
        line
        for line in settled.journal().splitlines()
        if "ordering cycle" in line or "Found dependency" in line or ("/systemd/system/" in line and "vmmesh" in line)
    ]
    assert complaints == []
    units = settled.run(["sh", "-ec", "ls -d /usr/lib/systemd/system/vmmesh*"]).stdout.split()
    assert len(units) >= 4
    verified = settled.run(["systemd-analyze", "verify", "--man=no", *units, "istio.service"], check=False)
    assert "vmmesh" not in verified.stdout + verified.stderr
    assert verified.returncode == 0, verified.stderr


def test_etc_hosts_that_is_rewritten_at_each_boot_has_the_block_once_each_time(settled: Machine) -> None:
    """As cloud-init does with manage_etc_hosts."""
    cloud = b"127.0.0.1 localhost\n# Your system has configured 'manage_etc_hosts' as True.\n"
    settled.write("/etc/hosts.cloud", cloud)
    settled.write(
        "/etc/systemd/system/manage-hosts.service",
        "[Unit]\nDefaultDependencies=no\nAfter=local-fs.target\nBefore=sysinit.target\n"
        "[Service]\nType=oneshot\nExecStart=/bin/sh -ec 'cat /etc/hosts.cloud >/etc/hosts; date >>/run/managed'\n"
        "[Install]\nWantedBy=sysinit.target\n",
    )
    settled.run(["systemctl", "enable", "manage-hosts.service"])
    try:
        for _ in range(3):
            settled.reboot()

            is_healthy(settled)
            assert len(settled.read("/run/managed").splitlines()) == 1
            content = settled.read("/etc/hosts")
            assert content == cloud + BEGIN + f"{CLUSTER_IPV4} istiod.istio-system.svc\n".encode() + END
            assert unit(settled)["NRestarts"] == "0"
    finally:
        settled.run(["systemctl", "disable", "manage-hosts.service"])


def test_a_machine_that_was_off_for_longer_than_its_token_lives_fetches_another(settled: Machine, mesh: Mesh) -> None:
    short = mesh.cluster.token(issued_at=now() - timedelta(minutes=5), lifetime=timedelta(minutes=5, seconds=12))
    ends = time.time() + 12
    mesh.publish(mesh.cluster.bundle(token=short))
    settled.run(["systemctl", "restart", AGENT])
    settled.run(["sh", "-ec", f'until [ "$(cat {TOKEN})" = "$1" ]; do sleep 0.2; done', "sh", short])
    settled.stop()
    mesh.endpoint.stop()
    time.sleep(max(0.0, ends + 1 - time.time()))

    settled.boot()

    assert settled.read(TOKEN).decode() == short
    assert unit(settled)["ActiveState"] == "active"
    fresh = mesh.cluster.bundle()
    mesh.publish(fresh)
    mesh.endpoint.start()
    settled.run(["systemctl", "reload", AGENT])
    is_healthy(settled)
    assert settled.read(TOKEN) == fresh["istio-token"]


def _told(machine: Machine, name: str, verb: str) -> int:
    """When the journal of this boot says that a unit was started or is done, in microseconds."""
    entries = machine.run(["journalctl", "--boot", "--output=json", "--no-pager", f"--unit={name}"]).stdout
    for entry in map(json.loads, entries.splitlines()):
        if entry["MESSAGE"].startswith(f"{verb} {name}"):
            return int(entry["__REALTIME_TIMESTAMP"])
    raise AssertionError(f"{name} was not {verb}:\n{entries}")


def _sidecar_log_since_boot(machine: Machine) -> str:
    boot = machine.run(["date", "--utc", "--date=" + machine.run(["uptime", "--since"]).stdout.strip(), "+%FT%T"])
    lines = machine.read("/var/log/istio/istio.log").decode(errors="replace").splitlines()
    return "\n".join(line for line in lines if line >= boot.stdout.strip())
