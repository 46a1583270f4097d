"""The units: how narrow their sandboxes are, that the documentation says so, and what goes on outside of them."""

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

import pytest

from lab.image import REPOSITORY
from lab.machine import Machine, difference
from lab.services import Endpoint, Istiod
from system.joining import unit

AGENT = "vmmesh-agent.service"
# Overall exposure, from 0 to 10, as docs/security.md states it.
EXPOSURES = {
    AGENT: 3.3,
    "vmmesh-agent-restore.service": 1.6,
    "vmmesh-agent-configure@ec2.service": 2.1,
    "vmmesh-ready.service": 0.2,
}
UNITS = sorted(path.name.replace("@", "@ec2") for path in (REPOSITORY / "systemd").glob("vmmesh*"))

# The order of Debian 12's cloud-init (22.4.2), stages and target; its generator wants the target at boot.
CLOUD_INIT = {
    "cloud-init-local.service": """
        DefaultDependencies=no
        Wants=network-pre.target
        After=systemd-remount-fs.service
        Before=network-pre.target shutdown.target sysinit.target
        Conflicts=shutdown.target
    """,
    "cloud-init.service": """
        DefaultDependencies=no
        Wants=cloud-init-local.service
        After=cloud-init-local.service systemd-networkd-wait-online.service networking.service
        Before=network-online.target sysinit.target shutdown.target systemd-user-sessions.service
        Conflicts=shutdown.target
    """,
    "cloud-config.service": """
        After=network-online.target cloud-config.target
        Wants=network-online.target cloud-config.target
    """,
    "cloud-final.service": """
        After=network-online.target cloud-config.service rc-local.service multi-user.target
        Before=apt-daily.service
        Wants=network-online.target cloud-config.service
    """,
    "cloud-config.target": """
        Wants=cloud-init-local.service cloud-init.service
        After=cloud-init-local.service cloud-init.service
    """,
    "cloud-init.target": "After=multi-user.target",
}
STAGE = "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n[Install]\nWantedBy=cloud-init.target\n"


# --- how narrow they are ---


@pytest.mark.parametrize("name", EXPOSURES)
def test_the_exposure_of_a_unit_is_what_the_documentation_says(name: str, shared_machine: Machine) -> None:
    said = shared_machine.run(["systemd-analyze", "security", "--no-pager", name]).stdout
    found = re.search(r"Overall exposure level for \S+: ([\d.]+) ", said)
    assert found, said
    assert float(found[1]) <= EXPOSURES[name]
    assert f"| {name} | {EXPOSURES[name]} |" in _security()


@pytest.mark.parametrize("name", EXPOSURES)
def test_what_a_unit_leaves_open_has_its_reason_in_the_documentation(name: str, shared_machine: Machine) -> None:
    said = shared_machine.run(["systemd-analyze", "security", "--no-pager", "--json=short", name]).stdout
    checks: list[dict[str, Any]] = json.loads(said)
    assert {check["name"] for check in checks if check["set"] is False} == _documented(name)


def test_systemd_has_nothing_to_say_against_the_units(shared_machine: Machine) -> None:
    done = shared_machine.run(["systemd-analyze", "verify", "--man=no", *UNITS], check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_refused_system_call_kills(shared_machine: Machine) -> None:
    for name in EXPOSURES:
        assert unit(shared_machine, name)["SystemCallErrorNumber"] == "1", name  # EPERM


def _security() -> str:
    return (REPOSITORY / "docs/security.md").read_text()


def _documented(name: str) -> set[str]:
    """The checks in the table of a unit."""
    table = _security().partition(f"\n### {name}\n")[2].partition("\n\n##")[0]
    return {cell.replace("\\|", "|") for cell in re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)}


def test_the_network_child_narrows_itself_in_the_sandbox_of_the_daemon_too(machine: Machine) -> None:
    # Each is left open by the unit, and by the rights of the user.
    attempts = """
import os
from vmmesh_agent import sandbox
sandbox.enter(65534, 65534)
for what, attempt in {"files": lambda: os.mkdir("/tmp/new"), "calls": lambda: os.kill(os.getpid(), 0)}.items():
    try:
        attempt()
        print(what, "open")
    except PermissionError:
        print(what, "closed")
"""
    machine.write("/srv/attempts.py", attempts)
    ours = "[Service]\nType=oneshot\nExecStart=\nExecStart=/usr/lib/vmmesh-agent/bin/python -P /srv/attempts.py\n"
    machine.write(f"/run/systemd/system/{AGENT}.d/attempts.conf", ours)
    machine.run(["systemctl", "daemon-reload"])
    machine.run(["systemctl", "start", AGENT])
    said = machine.run(["journalctl", f"--unit={AGENT}", "--output=cat", "--no-pager"]).stdout
    assert {line for line in said.splitlines() if line.startswith(("files", "calls"))} == {
        "files closed",
        "calls closed",
    }


# --- at boot ---


def test_the_units_and_those_of_cloud_init_have_an_order(machine: Machine) -> None:
    for name, order in CLOUD_INIT.items():
        lines = "\n".join(line.strip() for line in order.strip().splitlines())
        machine.write(f"/etc/systemd/system/{name}", f"[Unit]\n{lines}\n" + (STAGE if ".service" in name else ""))
    services = [name for name in CLOUD_INIT if name.endswith(".service")]
    machine.run(["systemctl", "enable", AGENT, *services])
    machine.run(["systemctl", "add-wants", "multi-user.target", "cloud-init.target"])
    machine.write("/etc/vmmesh-agent/config.yaml", "endpoint: {url: file:///nothing}\n")
    machine.write("/etc/systemd/system/istio.service", "[Service]\nExecStart=/bin/sleep 1000\n")
    machine.run(["systemctl", "add-wants", "multi-user.target", "istio.service"])

    machine.reboot()

    assert "ordering cycle" not in machine.journal()
    for name in (AGENT, "istio.service", *services):
        assert unit(machine, name)["ActiveState"] == "active", name
    assert _verified(machine) == ""

    # That it would be seen: a unit of multi-user.target cannot wait for the last stage.
    machine.write(f"/etc/systemd/system/{AGENT}.d/cycle.conf", "[Unit]\nAfter=cloud-final.service\n")
    machine.run(["systemctl", "daemon-reload"])
    assert "ordering cycle" in _verified(machine)


def _verified(machine: Machine) -> str:
    done = machine.run(["systemd-analyze", "verify", "--man=no", "default.target"], check=False)
    return "\n".join(line for line in done.stderr.splitlines() if "cycle" in line or "vmmesh" in line)


# --- outside the sandbox ---


def test_what_the_package_does_is_done_as_on_a_shell_and_a_hook_is_in_the_sandbox(
    machine: Machine, endpoint: Endpoint
) -> None:
    look = "#!/bin/sh\ngrep -E 'NoNewPrivs|CapBnd|Seccomp' /proc/self/status"
    machine.run(["mv", "/usr/bin/chown", "/usr/bin/chown.real"])  # which the package's script uses, and the agent not
    machine.write("/usr/bin/chown", f'{look} >/usr/installed\nexec chown.real "$@"\n', mode=0o755)
    hook = f"{look} >/run/hooked\ntouch /usr/hooked\nsystemd-run --no-block --quiet touch /usr/hooked-by-a-unit\n"
    machine.write("/etc/vmmesh-agent/hooks.d/50-look", hook, mode=0o755)
    endpoint.invite(machine)

    machine.run(["systemctl", "start", AGENT])
    machine.run(["vmmesh-agent", "wait", "--timeout", "60"], timeout=90)

    on_a_shell = machine.run(["grep", "-E", "NoNewPrivs|CapBnd|Seccomp", "/proc/1/status"]).stdout
    assert machine.read("/usr/installed").decode() == on_a_shell
    assert "NoNewPrivs:\t0\n" in on_a_shell
    machine.run(["sh", "-ec", "until test -e /usr/hooked-by-a-unit; do sleep 0.2; done"])
    assert "NoNewPrivs:\t1\nSeccomp:\t2\n" in machine.read("/run/hooked").decode()
    assert machine.run(["test", "-e", "/usr/hooked"], check=False).returncode == 1


def test_the_daemon_undoes_a_first_join_whole_from_within_the_sandbox(
    deb_machine: Machine, endpoint: Endpoint, istiod: Istiod
) -> None:
    istiod.stop()
    before = deb_machine.snapshot()
    endpoint.invite(deb_machine, healthy_within=5)

    deb_machine.run(["systemctl", "start", AGENT])
    told = ["sh", "-ec", f"until journalctl -u {AGENT} | grep -q join-undone; do sleep 0.5; done"]
    deb_machine.run(told, timeout=120)
    deb_machine.run(["systemctl", "stop", AGENT])

    assert unit(deb_machine)["LoadState"] == "not-found"
    left = "/var/lib/istio* /etc/istio* /etc/certs* /run/secrets* /usr/local/* /etc/hosts".split()
    changes = difference(before, deb_machine.snapshot())
    assert [line for line in changes if any(fnmatch(line.partition(":")[0], path) for path in left)] == [
        "/etc/hosts: written again with the same content"
    ]


# What a test runs on the machine: `run_on`, and what came of it.
RUN_ON = """
import json, sys
from pathlib import PurePosixPath
from vmmesh_agent.errors import HostError
from vmmesh_agent.host import Host
argv, timeout, environment = json.loads(sys.argv[1])
try:
    done = Host().run_on(argv, log=PurePosixPath("/run/log-of-it"), timeout=timeout, environment=environment)
    print(json.dumps([done.status, done.stdout]))
except HostError as error:
    print(json.dumps([error.code, error.message]))
"""


def test_a_service_of_its_own_ends_as_the_command_and_all_it_says_is_in_the_log(shared_machine: Machine) -> None:
    script = "echo out; echo err >&2; exit 7"
    assert _run_on(shared_machine, ["sh", "-c", script]) == [7, "out\nerr\n"]
    assert shared_machine.read("/run/log-of-it") == b"out\nerr\n"
    assert shared_machine.run(["stat", "--format=%a", "/run/log-of-it"]).stdout == "600\n"
    status, said = _run_on(shared_machine, ["no-such-program"])
    assert (status, "no-such-program" in said) == (1, True)


def test_its_arguments_are_taken_as_they_are(shared_machine: Machine) -> None:
    arguments = ["$HOME", "${HOME}", "$$", "%n", "100%", "a b", "", "\\n", "'\"", ";"]
    assert _run_on(shared_machine, ["printf", "<%s>", *arguments]) == [0, "".join(f"<{each}>" for each in arguments)]


def test_it_has_the_environment_of_a_shell_and_nothing_of_ours(shared_machine: Machine) -> None:
    given = {"https_proxy": "http://proxy:3128", "NOTIFY_SOCKET": "/run/ours", "STATE_DIRECTORY": "/var/lib/ours"}
    _, said = _run_on(shared_machine, ["env"], environment={"DEBIAN_FRONTEND": "noninteractive"}, env=given)
    there = dict(line.split("=", 1) for line in said.splitlines())
    for name, value in {
        "HOME": "/root",
        "DEBIAN_FRONTEND": "noninteractive",
        "https_proxy": "http://proxy:3128",
    }.items():
        assert there[name] == value
    assert "/usr/sbin" in there["PATH"].split(":")
    assert not there.keys() & {"NOTIFY_SOCKET", "STATE_DIRECTORY"}


def test_only_its_time_limit_ends_it(shared_machine: Machine) -> None:
    code, message = _run_on(shared_machine, ["sh", "-c", "sleep 4321; true"], timeout=2)
    assert (code, message) == ("command-timeout", "`sh -c sleep 4321; true` did not end within 2 s")
    assert shared_machine.run(["pgrep", "-f", "sleep 4321"], check=False).returncode == 1


@pytest.fixture
def service(shared_machine: Machine) -> Iterator[str]:
    """A service in which we run a command on that takes some seconds; it is stopped while that is at work."""
    request = json.dumps([["sh", "-c", "touch /run/began; sleep 3; touch /run/ended"], 60, {}])
    argv = ["systemd-run", "--quiet", "--unit=ours", "/usr/lib/vmmesh-agent/bin/python", "-c", RUN_ON, request]
    shared_machine.run(argv)
    shared_machine.run(["sh", "-ec", "until test -e /run/began; do sleep 0.1; done"])
    yield "ours.service"
    shared_machine.run(["rm", "-f", "/run/began", "/run/ended"])


@pytest.mark.parametrize("how", [["stop"], ["kill", "--signal=KILL"]])
def test_it_goes_on_when_we_are_ended(how: list[str], service: str, shared_machine: Machine) -> None:
    shared_machine.run(["systemctl", *how, service])
    assert shared_machine.run(["test", "-e", "/run/ended"], check=False).returncode == 1
    shared_machine.run(["sh", "-ec", "until test -e /run/ended; do sleep 0.1; done"], timeout=30)
    shared_machine.run(["systemctl", "reset-failed"])


def _run_on(
    machine: Machine,
    argv: list[str],
    *,
    timeout: float = 60,
    environment: dict[str, str] | None = None,
    env: dict[str, str] | None = None,
) -> Any:
    request = json.dumps([argv, timeout, environment or {}])
    return json.loads(machine.run(["/usr/lib/vmmesh-agent/bin/python", "-c", RUN_ON, request], env=env).stdout)
