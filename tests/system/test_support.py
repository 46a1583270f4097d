"""The tools for the night on a machine with real systemd: logs, the archive, metrics, events, rotation."""

import base64
import io
import json
import re
import socket
import subprocess
import tarfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from factories import EVENING, a_condition, a_report
from lab.image import REPOSITORY
from lab.machine import Machine
from lab.services import Endpoint, Istiod
from system.joining import TOKEN, join, status
from vmmesh_agent.events import MESSAGE_ID
from vmmesh_agent.health import State
from vmmesh_agent.render import Activity, prometheus
from vmmesh_agent.report import Known

LOG = "/var/log/istio/istio.log"
TARGET = "vmmesh-ready.target"
APPLICATION = """\
[Unit]
Description=An application of the mesh
{dependency}={target}
After={target}
[Service]
ExecStart=/bin/sleep infinity
[Install]
WantedBy={wanted_by}
"""


@pytest.fixture
def joined(machine: Machine, endpoint: Endpoint, istiod: Istiod) -> Machine:
    """A machine that is in the mesh."""
    assert istiod.requests() == []
    endpoint.invite(machine)
    join(machine)
    return machine


@pytest.fixture
def served(machine: Machine, endpoint: Endpoint, istiod: Istiod) -> Machine:
    """A machine whose daemon has brought it into the mesh and writes metrics."""
    assert istiod.requests() == []
    machine.run(["mkdir", "-p", "/var/lib/prometheus/node-exporter"])
    endpoint.invite(machine, metrics={"textfile": "/var/lib/prometheus/node-exporter/vmmesh.prom"})
    machine.run(["systemctl", "start", "vmmesh-agent"])
    until(lambda: status(machine)["state"] == "healthy")
    return machine


def until(holds: Callable[[], bool], seconds: float = 90) -> None:
    """Wait until something holds; fail where it does not."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.2)


def is_active(machine: Machine, unit: str) -> bool:
    return machine.run(["systemctl", "is-active", unit], check=False).stdout.strip() == "active"


# --- collect-logs ---


def test_the_archive_holds_the_machine_and_none_of_its_secrets(joined: Machine) -> None:
    token = joined.read(TOKEN).decode().strip()
    known = {
        "token": token,
        "signature": token.rpartition(".")[2],
        "join token": joined.read("/var/lib/vmmesh-agent/join-token").decode().strip(),
        "key": joined.read("/etc/certs/key.pem").decode().strip(),
    }
    for number, line in enumerate(known["key"].splitlines()[1:-1]):
        known[f"key, line {number}"] = line
    # What a careless program might have done with them:
    joined.run(["sh", "-ec", f"(cat {TOKEN}; echo; cat /etc/certs/key.pem) >> {LOG}"])
    joined.run(["sh", "-ec", f"base64 -w0 {TOKEN} >> {LOG}; echo >> {LOG}"])
    joined.run(["systemd-cat", "--identifier=careless", "echo", known["join token"]])

    said = joined.run(["vmmesh-agent", "collect-logs", "--tarfile", "/root/support.tar.gz"]).stdout
    assert said.startswith("wrote /root/support.tar.gz: ")
    assert joined.run(["stat", "--format=%a %U", "/root/support.tar.gz"]).stdout == "600 root\n"
    members = _members(joined, "/root/support.tar.gz")

    manifest = json.loads(members["manifest.json"])
    assert {each["name"] for each in manifest["members"]} == set(members) - {"manifest.json"}
    wanted = {
        "versions.json", "status.json", "systemd/units.txt", "systemd/show.txt", "systemd/status.txt",
        "journal/istio.txt", "logs/istio.log", "logs/istio.err.log", "network/iptables-save.txt",
        "network/ip6tables-save.txt", "network/addresses.txt", "network/routes.txt", "machine/resolv.conf",
        "machine/hosts", "machine/os-release", "packages/rpm.txt", "sidecar/cluster.env", "sidecar/mesh.yaml",
        "sidecar/token.json", "sidecar/root-cert.pem", "sidecar/cert-chain.pem", "configuration/config.yaml.json",
    }  # fmt: skip
    assert wanted - set(members) == set(), said
    assert json.loads(members["status.json"])["state"] == "healthy"
    assert b"ISTIO_OUTPUT" in members["network/iptables-save.txt"]
    assert json.loads(members["sidecar/token.json"])["claims"]["aud"] == ["istio-ca"]

    everything = b"\n".join(members.values())
    for name, secret in known.items():
        assert secret.encode() not in everything, name
        for before in range(3):
            encoded = base64.b64encode(b"x" * before + secret.encode())
            assert encoded[4 if before else 0 : -4] not in everything, f"{name} in base64"


def test_an_archive_overwrites_nothing_and_follows_no_link(joined: Machine) -> None:
    joined.write("/root/there.tar.gz", "precious")
    joined.run(["ln", "-s", "/root/elsewhere", "/root/link.tar.gz"])
    for name in ("there", "link"):
        done = joined.run(["vmmesh-agent", "collect-logs", "--tarfile", f"/root/{name}.tar.gz"], check=False)
        assert done.returncode == 1
        assert "[file-not-written]" in done.stderr
    assert joined.read("/root/there.tar.gz") == b"precious"
    assert joined.run(["test", "-e", "/root/elsewhere"], check=False).returncode == 1
    as_user = joined.run(["vmmesh-agent", "collect-logs", "--tarfile", "/tmp/x"], user="nobody", check=False)
    assert as_user.returncode == 77
    joined.run(["sh", "-ec", "mkdir /root/here; cd /root/here; vmmesh-agent collect-logs"])
    assert re.fullmatch(r"vmmesh-vm1-\d{8}T\d{6}Z\.tar\.gz\n", joined.run(["ls", "/root/here"]).stdout)


def test_commands_that_hang_or_are_missing_are_told_in_the_manifest(joined: Machine) -> None:
    joined.write("/usr/local/sbin/iptables-save", "#!/bin/sh\nexec sleep 600\n", mode=0o755)
    joined.run(["mv", "/usr/bin/df", "/usr/bin/df-away"])
    joined.run(["vmmesh-agent", "collect-logs", "--tarfile", "/root/a.tar.gz"], timeout=60)
    manifest = json.loads(_members(joined, "/root/a.tar.gz")["manifest.json"])
    missing = {each["name"]: each["reason"] for each in manifest["missing"]}
    assert "did not end within" in missing["network/iptables-save.txt"]
    assert "not installed" in missing["machine/disks.txt"]


def _members(machine: Machine, path: str) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(machine.read(path)), mode="r:gz") as archive:
        opened = {entry.name.partition("/")[2]: archive.extractfile(entry) for entry in archive}
        return {name: file.read() for name, file in opened.items() if file}


# --- logs ---


def test_the_logs_of_a_join_are_told_in_a_screen(joined: Machine) -> None:
    lines = joined.run(["vmmesh-agent", "logs"]).stdout.splitlines()
    assert 3 < len(lines) < 60
    assert [line for line in lines if "generated new workload certificate" in line]
    assert [line for line in lines if "  journal  " in line]
    assert [line for line in lines if "\x1b" in line] == []
    as_user = joined.run(["vmmesh-agent", "logs", "--stream", "log", "--lines", "2"], user="nobody")
    assert len(as_user.stdout.splitlines()) == 2


def test_following_shows_what_fails_and_what_recovers_and_ends_with_the_keyboard(
    joined: Machine, istiod: Istiod
) -> None:
    follower = joined.spawn(["vmmesh-agent", "logs", "--follow", "--lines", "0"])
    time.sleep(2)
    istiod.stop()
    joined.run(["systemctl", "restart", "istio"])
    until(lambda: status(joined)["cause"] == "istiod_unreachable", 150)
    time.sleep(3)
    istiod.start()
    until(lambda: status(joined)["state"] == "healthy", 150)
    time.sleep(3)
    joined.run(["pkill", "--signal", "INT", "--full", "vmmesh-agent logs --follow"])
    output, _ = follower.communicate(timeout=20)
    assert output.count("↳ istiod_unreachable: ") == 1
    assert output.count("↳ recovered: istiod_unreachable") == 1
    assert "Traceback" not in output


# --- metrics ---


@pytest.fixture
def exporter(tmp_path: Path) -> Iterator[Callable[[], str]]:
    """The real node_exporter over a folder, on loopback; call it for what it exposes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    argv = [
        "prometheus-node-exporter", "--collector.disable-defaults", "--collector.textfile",
        f"--collector.textfile.directory={tmp_path}", f"--web.listen-address={address}",
    ]  # fmt: skip
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def scrape() -> str:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    def is_up() -> bool:
        try:
            return bool(scrape())
        except OSError:
            return False

    until(is_up, 20)
    yield scrape
    process.kill()
    process.wait()


def test_node_exporter_reads_every_metric_whatever_the_words_in_it(exporter: Callable[[], str], tmp_path: Path) -> None:
    hostile = 'a"b\\c\nd{e}=f,g é'
    activity = Activity({"fetch": EVENING}, *(Counter({hostile: 3, "b": 2_000_000}) for _ in range(3)))
    known = Known(f"vm/{hostile}", EVENING, hostile)
    report = a_report(State.FAILED, a_condition("disk_full"), a_condition("disk_full"), known=known)
    (tmp_path / "vmmesh.prom").write_text(prometheus(report, activity))
    exposed = exporter()
    assert "node_textfile_scrape_error 0\n" in exposed
    escaped = 'a\\"b\\\\c\\nd{e}=f,g é'
    assert f'vmmesh_agent_fetch_failures_total{{code="{escaped}"}} 3\n' in exposed
    assert 'vmmesh_agent_log_events_total{code="b"} 2e+06\n' in exposed
    assert f'vmmesh_agent_info{{istio_version="{escaped}",namespace="vm"' in exposed
    assert "vmmesh_agent_conditions_total" in exposed


def test_node_exporter_reads_the_metrics_that_the_daemon_writes(
    served: Machine, exporter: Callable[[], str], tmp_path: Path
) -> None:
    path = "/var/lib/prometheus/node-exporter/vmmesh.prom"
    assert served.run(["stat", "--format=%a %U", path]).stdout == "644 root\n"
    (tmp_path / "vmmesh.prom").write_bytes(served.read(path))
    exposed = exporter()
    assert "node_textfile_scrape_error 0\n" in exposed
    assert 'vmmesh_agent_state{state="healthy"} 1\n' in exposed
    assert re.search(r'^vmmesh_agent_info\{.*namespace="vm".*workload_group="demo"\} 1$', exposed, re.MULTILINE)
    for operation in ("fetch", "verify", "install", "place", "start"):
        assert f'vmmesh_agent_last_success_timestamp_seconds{{operation="{operation}"}}' in exposed
    assert served.run(["ls", "-A", "/var/lib/prometheus/node-exporter"]).stdout == "vmmesh.prom\n"
    served.run(["systemctl", "stop", "vmmesh-agent"])
    assert served.read(path)


def test_failed_fetches_are_counted_by_their_code(served: Machine, endpoint: Endpoint) -> None:
    endpoint.stop()
    served.run(["systemctl", "restart", "vmmesh-agent"])
    counted = r"^vmmesh_agent_fetch_failures_total\{code=\"endpoint-[a-z-]+\"\} [1-9]"
    path = "/var/lib/prometheus/node-exporter/vmmesh.prom"
    until(lambda: re.search(counted, served.read(path).decode(), re.MULTILINE) is not None)


# --- events ---


def test_a_state_change_is_in_the_journal_with_fields_of_its_own(served: Machine) -> None:
    served.run(["systemctl", "stop", "istio"])
    until(lambda: status(served)["state"] == "stopped")
    served.run(["journalctl", "--sync"])
    found = served.run(["journalctl", "--output=json", f"MESSAGE_ID={MESSAGE_ID}"]).stdout
    entries: list[dict[str, Any]] = [json.loads(line) for line in found.splitlines()]
    states = [entry["VMMESH_STATE"] for entry in entries]
    assert "healthy" in states
    assert states[-1] == "stopped"
    assert {entry["_SYSTEMD_UNIT"] for entry in entries} == {"vmmesh-agent.service"}


def test_a_restart_by_hand_pages_nobody(served: Machine) -> None:
    served.run(["systemctl", "restart", "istio"])
    until(lambda: status(served)["state"] == "healthy")
    time.sleep(3)
    served.run(["journalctl", "--sync"])
    assert served.run(["journalctl", "--output=cat", "VMMESH_STATE=failed"], check=False).stdout == ""


@pytest.mark.parametrize("dependency", ["Requires", "BindsTo"])
def test_an_application_starts_after_the_mesh_and_stops_without_it(
    dependency: str, machine: Machine, endpoint: Endpoint, istiod: Istiod
) -> None:
    assert istiod.requests() == []
    for name, wanted_by in (("early", "multi-user.target"), ("mesh", TARGET)):
        text = APPLICATION.format(dependency=dependency, target=TARGET, wanted_by=wanted_by)
        machine.write(f"/etc/systemd/system/{name}.service", text)
    machine.run(["systemctl", "daemon-reload"])
    machine.run(["systemctl", "enable", "early", "mesh"])
    machine.run(["systemctl", "start", "--no-block", "early"])
    time.sleep(2)
    assert not is_active(machine, TARGET)
    assert not is_active(machine, "early")

    endpoint.invite(machine)
    machine.run(["systemctl", "start", "vmmesh-agent"])
    until(lambda: all(is_active(machine, unit) for unit in (TARGET, "early", "mesh")))
    assert status(machine)["state"] == "healthy"

    machine.run(["systemctl", "restart", "istio"])  # a moment without it stops nobody
    machine.run(["systemctl", "restart", "vmmesh-agent"])
    time.sleep(5)
    assert is_active(machine, "mesh")

    machine.run(["systemctl", "stop", "istio"])
    until(lambda: not any(is_active(machine, unit) for unit in (TARGET, "early", "mesh")))
    machine.run(["systemctl", "start", "istio"])
    until(lambda: is_active(machine, TARGET) and is_active(machine, "mesh"))


def test_a_hook_runs_on_the_machine_and_one_of_a_user_does_not(served: Machine) -> None:
    hooks = "/etc/vmmesh-agent/hooks.d"
    served.write(f"{hooks}/10-told", "#!/bin/sh\ncat >> /run/told\n", mode=0o755)
    served.write(f"{hooks}/20-foreign", "#!/bin/sh\ntouch /run/foreign\n", mode=0o755, owner="istio-proxy")
    served.run(["systemctl", "stop", "istio"])
    until(lambda: served.run(["test", "-e", "/run/told"], check=False).returncode == 0)
    until(lambda: [json.loads(line)["state"] for line in served.read("/run/told").splitlines()][-1] == "stopped")
    assert served.run(["test", "-e", "/run/foreign"], check=False).returncode == 1
    assert "hook refused" in served.journal("vmmesh-agent")


# --- rotation ---

# Lines of the agent's form without end; each has a word of its own, for what differs by digits only is folded.
WRITER = """
exec >> /var/log/istio/istio.log
number=0
while [ -e /run/write ]; do
    number=$((number + 1))
    printf '%s\twarn\tword-%s\n' "$(date -u +%Y-%m-%dT%H:%M:%S.%6NZ)" "$(echo $number | tr 0-9 a-j)"
    sleep 0.05
done
"""


def test_a_log_that_is_written_all_the_time_is_followed_through_rotations(served: Machine) -> None:
    rule = REPOSITORY / "packaging/logrotate/vmmesh-agent"
    served.write("/etc/logrotate.d/vmmesh-agent", rule.read_bytes())
    before = served.read(LOG)
    served.write("/run/write", "")
    writer = served.spawn(["sh", "-c", WRITER], user="istio-proxy", stdout=subprocess.DEVNULL)
    follower = served.spawn(["vmmesh-agent", "logs", "--follow", "--stream", "log"])
    until(lambda: b"word-" in served.read(LOG))
    for _ in range(3):
        time.sleep(2)
        served.run(["logrotate", "--force", "/etc/logrotate.d/vmmesh-agent"])
    until(lambda: b"word-" in served.read(LOG))
    time.sleep(3)
    served.run(["rm", "/run/write"])
    assert writer.wait(20) == 0
    time.sleep(3)
    last = re.findall(rb"word-([a-j]+)\n", served.read(LOG))[-1].decode()
    served.run(["pkill", "--signal", "INT", "--full", "vmmesh-agent logs --follow"])
    output, _ = follower.communicate(timeout=20)
    assert re.search(rf"word-{last}$", output, re.MULTILINE), "what came after the last rotation was not shown"

    assert b"\0" not in served.read(LOG)
    assert served.run(["sh", "-ec", f"zcat {LOG}.3.gz"]).stdout.encode().startswith(before)
    assert served.run(["stat", "--format=%U", f"{LOG}.1.gz", f"{LOG}.3.gz"]).stdout == "istio-proxy\nistio-proxy\n"
    assert status(served)["state"] == "healthy"
    assert [
        line for line in served.run(["vmmesh-agent", "logs", "--stream", "log"]).stdout.splitlines() if last in line
    ]
    explained = served.run(["vmmesh-agent", "explain", "--output", "json", LOG], check=False)
    assert json.loads(explained.stdout)["state"] in {"healthy", "unknown"}  # the start of the run was rotated away
    served.run(["sh", "-ec", f"zcat {LOG}.3.gz | vmmesh-agent explain -"])

    served.run(["systemctl", "restart", "istio"])
    until(lambda: status(served)["state"] == "healthy")
