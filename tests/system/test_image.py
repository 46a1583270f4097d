"""Golden images: what `image-clean` takes away, what it leaves, and what becomes of machines made from the image."""

import json
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from cloudinit.image import layer as cloud_init_layer
from lab import image
from lab.built import agent_packages
from lab.machine import Entry, Machine, difference
from lab.network import Network
from lab.run import Run
from standins.packages import Packages
from system import packer
from system.joining import (
    CLUSTER_ENV,
    MESH_YAML,
    NOISE,
    ROOT_CERT,
    TOKEN,
    Mesh,
    copy_to,
    join,
    requests,
    run_of_sidecar,
    status,
    unit,
)

AGENT = "vmmesh-agent.service"
KEY = "/etc/certs/key.pem"
CHAIN = "/etc/certs/cert-chain.pem"
JOIN_TOKEN = "/etc/vmmesh-agent/join-token"
TREE = "/mnt/tree"
PACKAGE = {"rpm": "/srv/istio-sidecar.rpm", "deb": "/srv/istio-sidecar.deb"}

# What differs from a machine that never joined, and why.
STAYS = {
    "/etc/machine-id": "empty, so that systemd makes another one",
    "/var/lib/dbus/machine-id": "made of the other by systemd-tmpfiles",
    "/run/vmmesh-agent*": "made by the unit",
    "/var/lib/vmmesh-agent": "the state directory, which is empty",
    "/root/.rpmdb*": "rpm's own database",
    "*/__pycache__*": "Python's own cache",
}


@pytest.fixture(params=["rpm", "deb"])
def member(request: pytest.FixtureRequest, mesh: Mesh) -> Machine:
    """A member of each family whose daemon runs, with the sidecar's package in the image."""
    machine: Machine = request.getfixturevalue("machine" if request.param == "rpm" else "deb_machine")
    return _join(machine, mesh, request.param)


@pytest.fixture
def rpm_member(machine: Machine, mesh: Mesh) -> Machine:
    """A member whose daemon runs."""
    return _join(machine, mesh, "rpm")


# --- what is gone, and what stays ------------------------------------------------------------


def test_nothing_of_the_member_is_left_but_the_package_and_the_enabled_agent(member: Machine, mesh: Mesh) -> None:
    member.write(JOIN_TOKEN, mesh.endpoint.create_token(), mode=0o600)
    secrets = _secrets(member)
    configuration = member.read("/etc/vmmesh-agent/config.yaml")

    said = _clean(member)

    for path in (KEY, CHAIN, ROOT_CERT, TOKEN, CLUSTER_ENV, JOIN_TOKEN, MESH_YAML):
        assert member.run(["test", "-s", path], check=False).returncode == 1, path
    assert member.read("/etc/machine-id") == b""
    assert b"vmmesh" not in member.read("/etc/hosts")
    for folder in ("/var/lib/vmmesh-agent", "/run/vmmesh-agent", "/var/log/istio", "/etc/istio/proxy/", "/etc/certs"):
        assert member.run(["find", folder, "-type", "f"], check=False).stdout == "", folder
    assert _found_in(member, secrets) == {}
    for program in ("iptables-save", "ip6tables-save"):
        assert "ISTIO" not in member.run([program]).stdout
    assert (unit(member)["ActiveState"], unit(member)["UnitFileState"]) == ("inactive", "disabled")
    assert (unit(member, AGENT)["ActiveState"], unit(member, AGENT)["UnitFileState"]) == ("inactive", "enabled")
    assert member.read("/etc/vmmesh-agent/config.yaml") == configuration
    assert member.run(["sh", "-c", "rpm -q istio-sidecar || dpkg-query -W istio-sidecar"]).returncode == 0
    assert JOIN_TOKEN in said
    assert "/etc/machine-id" in said
    assert "the journal: /var/log/journal" in said


def test_a_cleaned_machine_is_file_by_file_as_before_its_join(machine: Machine, mesh: Mesh) -> None:
    _install_sidecar(machine, mesh, "rpm")
    mesh.endpoint.invite(machine)
    machine.run(["systemctl", "enable", AGENT])
    machine.run(["rm", JOIN_TOKEN])
    before = machine.snapshot()
    mesh.endpoint.invite(machine)
    machine.write(JOIN_TOKEN, mesh.endpoint.create_token(), mode=0o600)
    join(machine)

    _clean(machine)

    assert _changes(before, machine) == []


def test_cleaning_twice_is_cleaning_once(rpm_member: Machine) -> None:
    _clean(rpm_member)
    before = rpm_member.snapshot()

    said = _clean(rpm_member)

    assert difference(before, rpm_member.snapshot(), ignore=NOISE) == []
    assert said.count("removed: nothing") == 2


def test_a_machine_that_never_joined_and_has_no_configuration_can_be_cleaned(machine: Machine) -> None:
    said = _clean(machine)
    assert machine.read("/etc/machine-id") == b""
    assert "there is nothing to undo" in said


def test_what_was_joined_by_hand_is_taken_away_too(machine: Machine, mesh: Mesh) -> None:
    _install_sidecar(machine, mesh, "rpm")
    _join_by_hand(machine, mesh)
    secrets = _secrets(machine)

    _clean(machine)

    assert _found_in(machine, secrets) == {}
    assert (unit(machine)["ActiveState"], unit(machine)["UnitFileState"]) == ("inactive", "disabled")


def test_a_token_by_hand_that_the_agent_found_does_not_come_back(machine: Machine, mesh: Mesh) -> None:
    """`leave` puts back what was there before the join; an image has no use for it."""
    _install_sidecar(machine, mesh, "rpm")
    _join_by_hand(machine, mesh)
    token = machine.read(TOKEN)
    mesh.endpoint.invite(machine)
    machine.write(JOIN_TOKEN, mesh.endpoint.create_token(), mode=0o600)
    join(machine)
    secrets = {**_secrets(machine), "the token by hand": token.strip()}

    _clean(machine)

    assert _found_in(machine, secrets) == {}
    assert unit(machine)["UnitFileState"] == "disabled"


def test_credentials_that_the_configuration_names_go_if_they_are_the_agents_own(machine: Machine) -> None:
    certificate = "{certificate: /etc/vmmesh-agent/own.pem, key: /etc/pki/shared.key}"
    machine.write(
        "/etc/vmmesh-agent/config.yaml",
        f"endpoint:\n  credential:\n    client_certificate: {certificate}\nmetrics: {{textfile: /srv/vmmesh.prom}}\n",
    )
    machine.write("/etc/vmmesh-agent/config.d/10.yaml", "endpoint: {credential: {join_token_file: /root/token}}\n")
    machine.write("/etc/vmmesh-agent/config.d/50-instance.yaml", "healthy_within: 60\n")
    files = ["/etc/vmmesh-agent/own.pem", "/root/token", "/srv/vmmesh.prom"]
    for path in (*files, "/etc/pki/shared.key"):
        machine.write(path, "secret\n", mode=0o600)

    said = _clean(machine)

    for path in (*files, "/etc/vmmesh-agent/config.d/50-instance.yaml"):
        assert machine.run(["test", "-e", path], check=False).returncode == 1, path
    assert machine.read("/etc/pki/shared.key") == b"secret\n"
    assert "left to you: /etc/pki/shared.key" in said


def test_an_administrators_own_files_are_left_and_named(rpm_member: Machine) -> None:
    rpm_member.write("/etc/certs/mine.pem", "my own\n")
    said = _clean(rpm_member)
    assert rpm_member.read("/etc/certs/mine.pem") == b"my own\n"
    assert "/etc/certs/mine.pem" in said


# --- machines made from the image ----------------------------------------------------------------


def test_two_machines_made_from_the_image_join_as_themselves(
    rpm_member: Machine, mesh: Mesh, network: Network, run: Run, fixture_rpms: tuple[Path, ...]
) -> None:
    origin = rpm_member
    secrets = _secrets(origin)
    known = {_machine_id(origin), _known_as(mesh)}
    _clean(origin)
    origin.run(["rm", "/etc/hostname"])  # the image builder's part
    origin.stop()  # with all that systemd writes on its way down
    mark = len(mesh.istiod.requests())

    layers = image.layers("rpm", fixture_rpms=fixture_rpms)
    with ExitStack() as stack:
        names = ("image1", "image2")
        copies = [
            stack.enter_context(Machine(name, layers=layers, network=network, run=run, disk=origin.disk))
            for name in names
        ]
        assert _streams(mesh, mark) == []
        keys = set()
        for copy in copies:
            assert unit(copy, AGENT)["ActiveState"] == "active"
            assert status(copy)["state"] == "not-joined"
            assert _found_in(copy, secrets) == {}

            copy.write(JOIN_TOKEN, mesh.endpoint.create_token(), mode=0o600)
            copy.run(["systemctl", "reload", AGENT])
            _wait_until_healthy(copy)

            assert _found_in(copy, {what: secrets[what] for what in ("the key", "the certificate")}) == {}
            keys.add(copy.read(KEY))
            known |= {_machine_id(copy), _known_as(mesh)}
        assert len(keys) == 2
        assert len(known) == 6
        assert {each["node"].split("~")[2] for each in _streams(mesh, mark)} == {f"{name}.vm" for name in names}
        for copy in copies:
            copy.reboot()
        for copy in copies:
            _wait_until_healthy(copy)
            assert _machine_id(copy) in known


def test_the_commands_of_the_packer_example_make_an_image(network: Network, run: Run, packages: Packages) -> None:
    uploads = {"${var.agent_package}": agent_packages().deb, "${var.sidecar_package}": packages.deb}
    below = image.layers("deb", with_agent=False)
    layers = [*below, cloud_init_layer(below)]
    with Machine("packer", layers=layers, network=network, run=run) as machine:
        for number, step in enumerate(packer.provisioners()):
            if isinstance(step, packer.Upload):
                source = uploads.get(step.source, packer.FOLDER / Path(step.source).name)
                copy_to(machine, source, step.destination)
            else:
                script = f"/tmp/script_{number}.sh"
                machine.write(script, "#!/bin/sh -e\n" + "".join(f"{line}\n" for line in step.lines))
                said = machine.run(["sh", "-c", step.command(script)], timeout=180).stdout
        assert "joins as itself" in said
        assert machine.read("/etc/machine-id") == b""
        machine.run(["dpkg-query", "--show", "istio-sidecar", "vmmesh-agent"])
        agent = unit(machine, AGENT)
        assert (agent["ActiveState"], agent["UnitFileState"]) == ("inactive", "enabled")
        assert machine.run(["ls", "/tmp"]).stdout.count("vmmesh-agent.deb") == 0
        assert "mesh.example.com" in machine.run(["vmmesh-agent", "check-config"]).stdout


# --- when it cannot do it all -------------------------------------------------------------------


def test_only_root_may_clean(shared_machine: Machine) -> None:
    refused = shared_machine.run(["vmmesh-agent", "image-clean"], check=False, user="nobody")
    assert (refused.returncode, "[not-root]" in refused.stderr) == (77, True)


def test_a_configuration_that_cannot_be_read_is_refused_before_anything_is_done(rpm_member: Machine) -> None:
    rpm_member.write("/etc/vmmesh-agent/config.d/10.yaml", "endpoint: {credential: {join_token_file: /root/tok")
    refused = rpm_member.run(["vmmesh-agent", "image-clean"], check=False)
    assert (refused.returncode, "[configuration-invalid]" in refused.stderr) == (78, True)
    assert "/etc/vmmesh-agent/config.d/10.yaml" in refused.stderr
    assert unit(rpm_member, AGENT)["ActiveState"] == "active"
    assert status(rpm_member)["state"] == "healthy"


def test_a_chroot_is_refused_for_it_shares_the_network_of_another_machine(rpm_member: Machine) -> None:
    script = "mount --bind / /mnt && mount --make-private /mnt && exec chroot /mnt vmmesh-agent image-clean"
    refused = rpm_member.run(["unshare", "--mount", "sh", "-ec", script], check=False)
    assert (refused.returncode, "[not-booted]" in refused.stderr) == (1, True), refused.stderr
    assert "--root" in refused.stderr
    assert status(rpm_member)["state"] == "healthy"


def test_a_clean_that_fails_says_so_and_the_next_one_ends_it(rpm_member: Machine) -> None:
    secrets = _secrets(rpm_member)
    rpm_member.run(["mount", "--bind", "/etc/machine-id", "/etc/machine-id"])
    try:
        refused = rpm_member.run(["vmmesh-agent", "image-clean"], check=False)
        assert refused.returncode == 1
        assert "/etc/machine-id" in refused.stderr
        assert "joins as itself" not in refused.stdout
    finally:
        rpm_member.run(["umount", "/etc/machine-id"])

    _clean(rpm_member)

    assert _found_in(rpm_member, secrets) == {}


# --- from outside -------------------------------------------------------------------------------


def test_a_members_tree_is_cleaned_from_outside_and_the_member_itself_stays_one(member: Machine) -> None:
    secrets, run = _secrets(member), run_of_sidecar(member)
    before = member.snapshot()

    with _tree_of(member):
        _clean(member, "--root", TREE)

        for what, secret in secrets.items():
            assert _files_with(member, secret, f"{TREE}/etc", f"{TREE}/var", f"{TREE}/run") == [], what
        assert member.read(f"{TREE}/etc/machine-id") == b""
        assert b"vmmesh" not in member.read(f"{TREE}/etc/hosts")
        enabled = member.run(["ls", f"{TREE}/etc/systemd/system/multi-user.target.wants"]).stdout.split()
        assert (AGENT in enabled, "istio.service" in enabled) == (True, False)
        first = _changed_files(member)
        said = _clean(member, "--root", TREE)
        assert said.count("removed: nothing") == 2
        assert _changed_files(member) == first

    assert _changes(before, member, "/var/log/istio/*") == []
    assert run_of_sidecar(member) == run
    assert status(member)["state"] == "healthy"


def test_each_command_works_on_a_tree_or_says_that_it_cannot(member: Machine, mesh: Mesh) -> None:
    member.run(["systemctl", "stop", AGENT])
    before, run = member.snapshot(), run_of_sidecar(member)
    asked = len(requests(mesh.endpoint))

    with _tree_of(member):
        # A member's disk, switched off.
        shown = json.loads(_on_tree(member, "status", "--output", "json", expect=3))
        assert shown["state"] == "stopped"
        assert _on_tree(member, "check-config") == member.run(["vmmesh-agent", "check-config"]).stdout
        _on_tree(member, "restore")
        assert member.read(f"{TREE}{TOKEN}") == member.read(TOKEN)
        rows = {row["check"]: row for row in json.loads(_on_tree(member, "doctor", "--output", "json"))["checks"]}
        assert rows["files"]["result"] == "ok", rows["files"]
        assert {rows[name]["result"] for name in ("envoy", "capture", "ports", "sudo")} == {"not-applicable"}
        _on_tree(member, "collect-logs", "--tarfile", f"{TREE}/support.tar.gz")
        assert "istiod" in _on_tree(member, "logs", "--stream", "log")

        # What takes a machine that runs.
        for arguments in (["wait"], ["verify", "/srv"], ["explain", "/var/log/istio/istio.log"]):
            assert _on_tree(member, *arguments, expect=64) == ""

        # Out of the mesh, and in again.
        _on_tree(member, "leave", "--purge")
        assert b"istio-proxy" in member.read(f"{TREE}/etc/passwd")  # the package was there before the join
        assert json.loads(_on_tree(member, "status", "--output", "json", expect=3))["state"] == "not-joined"
        assert len(requests(mesh.endpoint)) == asked
        member.write(f"{TREE}{JOIN_TOKEN}", mesh.endpoint.create_token(), mode=0o600)
        difference_shown = _on_tree(member, "bootstrap", "--dry-run")
        assert "/etc/hosts" in difference_shown
        said = _on_tree(member, "bootstrap")
        assert f"All is in place in {TREE}" in said
        assert member.read(f"{TREE}{TOKEN}").count(b".") == 2
        assert member.read(f"{TREE}{CLUSTER_ENV}") == member.read(CLUSTER_ENV)
        enabled = member.run(["ls", f"{TREE}/etc/systemd/system/multi-user.target.wants"]).stdout.split()
        assert "istio.service" in enabled

    assert _changes(before, member, "/var/log/istio/*", "/run/vmmesh-agent/status.json") == []
    assert run_of_sidecar(member) == run


@pytest.mark.parametrize("family", ["rpm", "deb"])
def test_the_sidecar_is_installed_into_a_tree_and_removed_from_it(
    family: str, request: pytest.FixtureRequest, mesh: Mesh
) -> None:
    outside: Machine = request.getfixturevalue("machine" if family == "rpm" else "deb_machine")
    mesh.endpoint.invite(outside)
    outside.write(JOIN_TOKEN, mesh.endpoint.create_token(), mode=0o600)
    before = outside.snapshot()

    with _tree_of(outside):
        outside.write(f"{TREE}/etc/machine-id", f"{uuid.uuid4().hex}\n")

        assert "All is in place" in _on_tree(outside, "bootstrap")

        outside.run(["chroot", TREE, "id", "istio-proxy"])
        outside.run(["chroot", TREE, "/usr/local/bin/envoy", "--version"])
        assert _installed(outside, family, TREE)
        assert not _installed(outside, family, "/")

        _on_tree(outside, "leave", "--purge")

        assert not _installed(outside, family, TREE)
        assert outside.run(["chroot", TREE, "id", "istio-proxy"], check=False).returncode == 1

    assert _changes(before, outside) == []


def test_a_tree_without_a_machine_id_does_not_join_in_the_name_of_another_machine(machine: Machine, mesh: Mesh) -> None:
    mesh.endpoint.invite(machine)
    with _tree_of(machine):
        machine.write(f"{TREE}/etc/machine-id", "")
        refused = machine.run(["vmmesh-agent", "--root", TREE, "bootstrap"], check=False)
    assert (refused.returncode, "[machine-id-missing]" in refused.stderr) == (1, True)


def test_links_in_a_tree_lead_nowhere_else(machine: Machine) -> None:
    """What image-clean removes is inside, wherever a link in the tree points to."""
    machine.run(["mkdir", "-p", "/var/log/istio", "/etc/certs"])
    for path in ("/var/log/istio/istio.log", "/etc/certs/key.pem", "/etc/vmmesh-agent/join-token"):
        machine.write(path, "the outer one\n")
    before = machine.snapshot()
    with _tree_of(machine):
        for path, file in (
            ("/var/log/istio", "istio.log"),
            ("/etc/certs", "key.pem"),
            ("/etc/vmmesh-agent", "join-token"),
        ):
            machine.run(["rm", "-r", f"{TREE}{path}"])
            machine.run(["ln", "-s", f"{path}-inside", f"{TREE}{path}"])
            machine.write(f"{TREE}{path}-inside/{file}", "the inner one\n")
            machine.run(["ln", "-s", f"{path}/{file}", f"{TREE}{path}-inside/link"])

        _clean(machine, "--root", TREE)

        assert (
            machine.run(["find", f"{TREE}/var/log/istio-inside", f"{TREE}/etc/certs-inside", "-type", "f"]).stdout == ""
        )
        assert machine.run(["test", "-e", f"{TREE}/etc/vmmesh-agent-inside/join-token"], check=False).returncode == 1
    assert _changes(before, machine) == []


# --- steps -------------------------------------------------------------------------------------


def _install_sidecar(machine: Machine, mesh: Mesh, family: str) -> None:
    """As an image builder does: the package, and nothing else."""
    package = next((mesh.endpoint.bundle_folder / "packages").glob(f"*.{family}"))
    copy_to(machine, package, PACKAGE[family])
    machine.run(["rpm", "-U", PACKAGE[family]] if family == "rpm" else ["dpkg", "-i", PACKAGE[family]])
    machine.run(["systemctl", "daemon-reload"])


def _join(machine: Machine, mesh: Mesh, family: str) -> Machine:
    _install_sidecar(machine, mesh, family)
    mesh.endpoint.invite(machine)
    machine.write(JOIN_TOKEN, mesh.endpoint.create_token(), mode=0o600)
    machine.run(["systemctl", "enable", "--now", AGENT])
    _wait_until_healthy(machine)
    return machine


def _machine_id(machine: Machine) -> str:
    return machine.read("/etc/machine-id").decode().strip()


def _known_as(mesh: Mesh) -> str:
    """By which name the endpoint knows whoever asked last."""
    return str(next(each["machine"] for each in reversed(requests(mesh.endpoint)) if each.get("machine")))


def _streams(mesh: Mesh, mark: int) -> list[dict[str, str]]:
    """The discovery streams that were opened since."""
    asked = mesh.istiod.requests()[mark:]
    return [each for each in asked if each["method"] == "StreamAggregatedResources" and each["code"] == "OK"]


def _join_by_hand(machine: Machine, mesh: Mesh) -> None:
    """As the article does it: five files, and a start."""
    files = mesh.cluster.bundle()
    for name, path in (
        ("root-cert.pem", ROOT_CERT),
        ("istio-token", TOKEN),
        ("cluster.env", CLUSTER_ENV),
        ("mesh.yaml", MESH_YAML),
    ):
        machine.write(path, files[name], mode=0o640, owner="istio-proxy")
    machine.write("/etc/hosts", machine.read("/etc/hosts") + files["hosts"])
    machine.run(["systemctl", "enable", "--now", "istio.service"])
    machine.run(["timeout", "60", "sh", "-c", f"until test -s {KEY}; do sleep 0.2; done"], timeout=90)


def _wait_until_healthy(machine: Machine) -> None:
    waited = machine.run(["vmmesh-agent", "wait", "--timeout", "90"], check=False, timeout=120)
    assert waited.returncode == 0, f"{status(machine)}\n{machine.journal(AGENT)}"


def _clean(machine: Machine, *arguments: str) -> str:
    done = machine.run(["vmmesh-agent", *arguments, "image-clean"], check=False, timeout=120)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def _secrets(machine: Machine) -> dict[str, bytes]:
    """What no copy of this machine may have, by what it is: the middle of a key, for its first lines are no secret."""
    found = {
        "the token": machine.read(TOKEN).strip(),
        "the key": machine.read(KEY).splitlines()[2],
        "the certificate": machine.read(CHAIN).splitlines()[5],
    }
    if machine.run(["test", "-e", JOIN_TOKEN], check=False).returncode == 0:
        found["the join token"] = machine.read(JOIN_TOKEN).strip()
    return found


def _found_in(machine: Machine, secrets: dict[str, bytes]) -> dict[str, list[str]]:
    """Search every file of a machine's tree, those in memory too."""
    folders = ["/etc", "/var", "/root", "/run", "/srv", "/tmp", "/opt", "/home", "/usr/local"]
    found = {what: _files_with(machine, secret, *folders) for what, secret in secrets.items()}
    return {what: paths for what, paths in found.items() if paths}


def _files_with(machine: Machine, secret: bytes, *folders: str) -> list[str]:
    argv = ["grep", "-rlF", "--binary-files=text", "-e", secret.decode()]
    return machine.run([*argv, *folders], check=False).stdout.split()


@contextmanager
def _tree_of(machine: Machine) -> Iterator[None]:
    """At TREE the disk of this machine as an image tree of its own: what is changed there is changed there alone."""
    memory = "/mnt"
    overlay = f"lowerdir=/,upperdir={memory}/upper,workdir={memory}/work"
    script = f"mount -t tmpfs tmpfs {memory}; mkdir {memory}/upper {memory}/work {TREE}"
    machine.run(["sh", "-ec", f"{script}; mount -t overlay overlay -o {overlay} {TREE}"])
    try:
        yield
    finally:
        machine.run(["umount", TREE, memory])


def _changed_files(machine: Machine) -> str:
    """What differs between the tree and the machine that it is made of, with sizes and times."""
    return machine.run(["find", "/mnt/upper", "!", "-type", "d", "-printf", "%p %y %s %T@ %m %U\n"]).stdout


def _on_tree(machine: Machine, *arguments: str, expect: int = 0) -> str:
    done = machine.run(["vmmesh-agent", "--root", TREE, *arguments], check=False, timeout=120)
    assert done.returncode == expect, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _installed(machine: Machine, family: str, root: str) -> bool:
    argv = {
        "rpm": ["rpm", "--root", root, "-q", "istio-sidecar"],
        "deb": ["dpkg-query", f"--root={root}", "--show", "--showformat=${db:Status-Abbrev}", "istio-sidecar"],
    }[family]
    done = machine.run(argv, check=False)
    return done.returncode == 0 and not done.stdout.startswith("un")


def _changes(before: dict[str, Entry], machine: Machine, *ignore: str) -> list[str]:
    lines = difference(before, machine.snapshot(), ignore=[*NOISE, *STAYS, *ignore])
    return [line for line in lines if not line.endswith(": written again with the same content")]
