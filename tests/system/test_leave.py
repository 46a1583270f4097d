"""`vmmesh-agent leave`: the machine as it was found, compared file by file, and what stands in its way."""

import time
from collections.abc import Callable, Mapping

import pytest

from lab.machine import Entry, Machine, difference
from system.joining import NOISE, ROOT_CERT, Mesh, copy_to, join, status, unit

AGENT = "vmmesh-agent.service"
RPM = "/srv/istio-sidecar.rpm"
CLEAN = "/usr/local/bin/istio-start.sh"
KEPT = "/var/lib/vmmesh-agent/join-token"

# What `leave --purge` does not put back, and why.
STAYS = {
    "/etc/vmmesh-agent/join-token": "the agent took it over when the machine was healthy, and purging removes that",
    "/var/log/*": "logs are for whoever wants to know what was",
    "/etc/passwd-": "useradd and userdel keep what was before them",
    "/etc/group-": "as passwd-",
    "/etc/shadow-": "as passwd-",
    "/etc/gshadow-": "as passwd-",
    "/etc/subuid-": "as passwd-",
    "/etc/subgid-": "as passwd-",
    "/root/.rpmdb*": "rpm's own database: the package is not in it any more, which a test looks at",
    "/var/lib/dpkg/*": "dpkg's own database, likewise",
    "/var/lib/apt/*": "apt's own",
    "/var/cache/*": "caches of package managers and of the dynamic linker",
    "*/__pycache__*": "Python's own cache",
    "/run/lock/*": "locks of package managers",
}


@pytest.fixture(params=["rpm", "deb"])
def invited(request: pytest.FixtureRequest, mesh: Mesh) -> Machine:
    """A fresh machine of each family that is ready to join."""
    machine: Machine = request.getfixturevalue("machine" if request.param == "rpm" else "deb_machine")
    return _invite(machine, mesh)


@pytest.fixture
def member(joined: Machine, mesh: Mesh) -> Machine:
    """A healthy member, without a daemon."""
    mesh.endpoint.invite(joined)
    join(joined)
    return joined


# --- as it was found -----------------------------------------------------------------


def test_purged_a_machine_is_file_by_file_as_before_its_join(invited: Machine, mesh: Mesh) -> None:
    before = invited.snapshot()
    for way in ("bootstrap", "daemon"):
        _invite(invited, mesh)
        if way == "bootstrap":
            join(invited)
        else:
            invited.run(["systemctl", "enable", "--now", AGENT])
            invited.run(["vmmesh-agent", "wait", "--for", "healthy", "--timeout", "60"], timeout=90)

        _leave(invited, "--purge")

        assert _changes(before, invited) == [], way
        _assert_out(invited)
        assert unit(invited)["LoadState"] == "not-found"
        shown = unit(invited, AGENT)
        assert (shown["ActiveState"], shown["UnitFileState"]) == ("inactive", "disabled")
        installed = invited.run(["sh", "-c", "rpm -q istio-sidecar || dpkg-query -W istio-sidecar"], check=False)
        assert installed.returncode != 0
        assert invited.run(["id", "istio-proxy"], check=False).returncode == 1


def test_left_without_purge_a_machine_is_as_the_package_leaves_it(machine: Machine, mesh: Mesh) -> None:
    _invite(machine, mesh)
    copy_to(machine, next((mesh.endpoint.bundle_folder / "packages").glob("*.rpm")), RPM)
    machine.run(["rpm", "-U", RPM])
    machine.run(["systemctl", "daemon-reload"])
    bare = machine.snapshot()
    token = machine.read("/etc/vmmesh-agent/join-token")
    machine.reset()
    mesh.endpoint.invite(machine)
    machine.write("/etc/vmmesh-agent/join-token", token, mode=0o600)
    join(machine)

    _leave(machine)

    kept = ["/var/lib/vmmesh-agent*", "/run/vmmesh-agent*", RPM]
    assert _changes(bare, machine, *kept) == []
    # The token for the next join, and nothing else.
    assert machine.run(["find", "/var/lib/vmmesh-agent", "-type", "f"]).stdout == f"{KEPT}\n"
    assert machine.read(KEPT).strip() == token
    _assert_out(machine)
    assert unit(machine)["UnitFileState"] == "disabled"
    assert machine.run(["rpm", "--verify", "--nomode", "istio-sidecar"], check=False).stdout == ""


def test_what_was_there_before_comes_back_byte_for_byte(machine: Machine, mesh: Mesh) -> None:
    """A root certificate by hand, a user, and a hosts file without a newline at its end."""
    _invite(machine, mesh)
    machine.run(["useradd", "--system", "--user-group", "--home-dir", "/nowhere", "istio-proxy"])
    machine.write("/etc/certs/root-cert.pem", mesh.cluster.root_pem + b"# by hand\n", mode=0o640)
    machine.write("/etc/certs/legacy.pem", "somebody's own\n", mode=0o604, owner="daemon")
    machine.write("/etc/hosts", machine.read("/etc/hosts").rstrip(b"\n"))
    before = machine.snapshot()
    join(machine)

    _leave(machine, "--purge")

    assert _changes(before, machine) == []
    assert machine.run(["id", "istio-proxy"]).returncode == 0
    _assert_out(machine)


def test_a_sidecar_that_was_there_before_stays(machine: Machine, mesh: Mesh) -> None:
    _invite(machine, mesh)
    copy_to(machine, next((mesh.endpoint.bundle_folder / "packages").glob("*.rpm")), RPM)
    machine.run(["rpm", "-U", RPM])
    machine.run(["systemctl", "enable", "istio.service"])
    before = machine.snapshot()
    join(machine)

    _leave(machine, "--purge")

    assert _changes(before, machine) == []
    _assert_out(machine)
    assert unit(machine)["UnitFileState"] == "enabled"
    assert machine.run(["rpm", "-q", "istio-sidecar"]).returncode == 0


def test_an_administrators_own_files_are_left_and_named(machine: Machine, mesh: Mesh) -> None:
    _invite(machine, mesh)
    before = machine.snapshot()
    join(machine)
    own = {"/etc/certs/mine.pem": b"my own\n", "/var/lib/istio/notes/a": b"my notes\n"}
    for path, content in own.items():
        machine.write(path, content, mode=0o600)

    said = _leave(machine, "--purge")

    for path, content in own.items():
        assert machine.read(path) == content
        assert path in said
    there = {*own, "/etc/certs", "/var/lib/istio", "/var/lib/istio/notes"}
    assert {line.partition(":")[0] for line in _changes(before, machine)} == there
    owners = machine.run(["stat", "--format=%U", *sorted(there)]).stdout.split()
    assert set(owners) == {"root"}  # nobody who gets the number of the user that is gone shall own them


# --- after it ----------------------------------------------------------------------


def test_whoever_left_is_out_for_good_until_the_next_join(member: Machine, mesh: Mesh) -> None:
    peer = member.link.ipv4
    member.run(["systemctl", "enable", "--now", AGENT])

    _leave(member)

    told = member.run(["vmmesh-agent", "status"], check=False)
    assert (told.returncode, status(member)["state"]) == (3, "not-joined"), told.stdout
    _until("istiod sees the stream's end", lambda: _streams(mesh, peer)[-1:] == ["closed"])
    asked = len(_streams(mesh, peer))

    member.reboot()

    assert status(member)["state"] == "not-joined"
    _assert_out(member)
    assert unit(member, AGENT)["ActiveState"] == "inactive"
    assert len(_streams(mesh, peer)) == asked
    join(member)
    assert _streams(mesh, peer)[-1] == "OK"


def test_leaving_twice_is_leaving_once(member: Machine, mesh: Mesh) -> None:
    for arguments in ([], ["--purge"]):
        _leave(member, *arguments)
        before = member.snapshot()
        _leave(member, *arguments)
        assert _changes(before, member, "/run/vmmesh-agent*") == []
    assert status(member)["state"] == "not-joined"
    mesh.endpoint.invite(member)  # purging took the token
    join(member)


def test_leaving_without_ever_having_joined_changes_nothing(machine: Machine) -> None:
    before = machine.snapshot()
    for arguments in ([], ["--purge"]):
        _leave(machine, *arguments)
        assert _changes(before, machine, "/run/vmmesh-agent*", "/var/lib/vmmesh-agent") == []


def test_only_root_may_leave(member: Machine) -> None:
    refused = member.run(["vmmesh-agent", "leave"], check=False, user="nobody")
    assert refused.returncode == 77
    assert unit(member)["ActiveState"] == "active"


# --- what stands in its way -----------------------------------------------------------


def test_a_sidecar_that_hangs_does_not_keep_the_machine_in(member: Machine) -> None:
    member.write("/run/systemd/system/istio.service.d/patience.conf", "[Service]\nTimeoutStopSec=3\n")
    member.run(["systemctl", "daemon-reload"])
    member.run(["systemctl", "kill", "--signal=STOP", "istio.service"])

    _leave(member)

    _assert_out(member)
    assert unit(member)["ActiveState"] in {"inactive", "failed"}
    member.run(["rm", "-r", "/run/systemd/system/istio.service.d"])
    member.run(["systemctl", "daemon-reload"])
    join(member)


def test_capture_that_cannot_be_removed_is_told_and_the_next_leave_goes_on(member: Machine) -> None:
    member.run(["mount", "--bind", "/bin/false", CLEAN])
    try:
        refused = member.run(["vmmesh-agent", "leave"], check=False, timeout=120)

        assert refused.returncode == 1
        assert "[capture-left-behind]" in refused.stderr
        assert CLEAN in refused.stderr
        assert "ISTIO_OUTPUT" in member.run(["iptables-save"]).stdout
        assert member.read(ROOT_CERT)  # with its files gone the clean-up would not know what to take away
    finally:
        member.run(["umount", CLEAN])

    _leave(member)

    _assert_out(member)
    join(member)


def test_capture_of_ipv6_that_was_left_behind_is_capture(member: Machine) -> None:
    member.run(["mount", "--bind", "/bin/false", CLEAN])
    try:
        member.run(["systemctl", "stop", "istio.service"], check=False)
        for table in ("nat", "mangle", "raw"):
            member.run(["iptables", "-t", table, "-F"])
            member.run(["iptables", "-t", table, "-X"])
        refused = member.run(["vmmesh-agent", "leave"], check=False, timeout=120)

        assert "ISTIO_OUTPUT" in member.run(["ip6tables-save"]).stdout
        assert refused.returncode == 1
        assert "[capture-left-behind]" in refused.stderr
    finally:
        member.run(["umount", CLEAN])

    _leave(member)

    _assert_out(member)
    join(member)


# --- steps ---------------------------------------------------------------------------


def _invite(machine: Machine, mesh: Mesh) -> Machine:
    mesh.endpoint.invite(machine)
    machine.write("/etc/vmmesh-agent/join-token", mesh.endpoint.create_token(), mode=0o600)
    return machine


def _leave(machine: Machine, *arguments: str) -> str:
    done = machine.run(["vmmesh-agent", "leave", *arguments], check=False, timeout=120)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def _changes(before: Mapping[str, Entry], machine: Machine, *ignore: str) -> list[str]:
    """What differs, but for what stays and for files that have the same content as before at another time."""
    lines = difference(before, machine.snapshot(), ignore=[*NOISE, *STAYS, *ignore])
    return [line for line in lines if not line.endswith(": written again with the same content")]


def _assert_out(machine: Machine) -> None:
    assert unit(machine)["ActiveState"] in {"inactive", "failed"}
    for program in ("iptables-save", "ip6tables-save"):
        assert "ISTIO" not in machine.run([program]).stdout
    assert b"vmmesh" not in machine.read("/etc/hosts")
    assert machine.run(["find", "/run/secrets", "/etc/certs", "-type", "f"], check=False).stdout.count("token") == 0


def _streams(mesh: Mesh, peer: str) -> list[str]:
    """What became of the discovery streams of one machine, in their order."""
    asked = [each for each in mesh.istiod.requests() if each["method"] == "StreamAggregatedResources"]
    return [each["code"] for each in asked if each["peer"] == peer]


def _until(what: str, look: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not look():
        assert time.monotonic() < deadline, f"30 s, and not yet: {what}"
        time.sleep(0.1)
