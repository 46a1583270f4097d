"""`vmmesh-agent doctor` on machines that are well, and on machines that were made ill: each fault is real."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab import image
from lab.cluster import Cluster
from lab.machine import Machine, difference
from lab.network import CLUSTER_IPV4, Network
from lab.run import Run
from lab.services import ISTIOD_PORT, Service
from system.joining import ROOT_CERT, TOKEN, Mesh, configure, join, requests

DROP_IN = "/usr/lib/systemd/system/istio.service.d/10-vmmesh-agent.conf"
READERS = ["*/rpmdb.sqlite-shm"]  # the index that rpm's readers share

Rows = dict[str, dict[str, str]]


def examine(machine: Machine, *, user: str = "root") -> Rows:
    """Return the rows of `doctor` by their checks; its exit status has to say the same as they do."""
    done = machine.run(["vmmesh-agent", "doctor", "--output", "json"], check=False, user=user)
    document = json.loads(done.stdout)
    assert document["schema"] == "vmmesh.doctor/v1"
    rows = {row["check"]: row for row in document["checks"]}
    assert done.returncode == int(any(row["result"] == "failed" for row in rows.values())), done.stderr
    return rows


def invite(mesh: Mesh, machine: Machine) -> None:
    """Let one more machine join: a join token is for one alone."""
    mesh.endpoint.invite(machine)
    machine.write("/etc/vmmesh-agent/join-token", mesh.endpoint.create_token(), mode=0o600)


def failed(rows: Rows) -> set[str]:
    return {name for name, row in rows.items() if row["result"] == "failed"}


def shown(rows: Rows) -> str:
    return "\n".join(f"{row['result']:<15}{name}: {row['note']} → {row['fix']}" for name, row in rows.items())


def assert_fails(machine: Machine, check: str, *, note: str, fix: str) -> Rows:
    """See that this check fails with these words, and return all rows."""
    rows = examine(machine)
    assert rows[check]["result"] == "failed", shown(rows)
    assert note in rows[check]["note"], shown(rows)
    assert fix in rows[check]["fix"], shown(rows)
    return rows


# --- machines that are well ---


def test_a_fresh_machine_is_fit_to_join_and_nothing_is_changed_or_spent(machine: Machine, mesh: Mesh) -> None:
    invite(mesh, machine)
    before = machine.snapshot()
    asked = len(requests(mesh.endpoint))

    rows = examine(machine)

    assert failed(rows) == set(), shown(rows)
    assert rows["endpoint-certificate"]["result"] == "ok"
    assert rows["istiod-port"]["result"] == "not-applicable"
    assert len(requests(mesh.endpoint)) == asked
    assert difference(before, machine.snapshot(), ignore=READERS) == []
    join(machine)  # the token of the invitation is as good as before


def test_a_healthy_joined_machine_has_no_failed_row_and_nothing_is_changed(joined: Machine) -> None:
    before = joined.snapshot()

    rows = examine(joined)

    assert failed(rows) == set(), shown(rows)
    expected_ok = [
        *("configuration", "architecture", "c-library", "package-manager", "programs", "sudo", "ports", "iptables"),
        *("disk", "dns-servers", "cloud-init", "host-name", "address", "hosts-file", "endpoint-port"),
        *("endpoint-certificate", "istiod-name", "istiod-port", "istiod-certificate", "unit", "files", "token"),
        *("certificate", "capture", "envoy", "dns-proxy", "status"),
    ]
    assert [name for name in expected_ok if rows[name]["result"] != "ok"] == [], shown(rows)
    assert difference(before, joined.snapshot(), ignore=[*READERS, "/var/log/istio/*"]) == []


def test_a_machine_with_dpkg_is_well_too(deb_machine: Machine, mesh: Mesh) -> None:
    invite(mesh, deb_machine)
    assert failed(examine(deb_machine)) == set()
    join(deb_machine)
    rows = examine(deb_machine)
    assert failed(rows) == set(), shown(rows)
    assert rows["package-manager"]["note"].startswith("deb for ")


def test_nobody_special_may_ask_and_is_told_what_takes_root(joined: Machine) -> None:
    rows = examine(joined, user="nobody")
    assert failed(rows) == set(), shown(rows)
    for check in ("sudo", "iptables", "token", "certificate", "capture"):
        assert rows[check]["result"] == "unknown"
        assert "root" in rows[check]["note"]
    assert rows["unit"]["result"] == "ok"


def test_the_screen_keeps_within_80_columns(joined: Machine) -> None:
    said = joined.run(["vmmesh-agent", "doctor"]).stdout
    assert max(len(line) for line in said.splitlines()) <= 80
    assert "FAILED" not in said
    assert said.splitlines()[0].startswith("ok       configuration")


# --- machines that are ill before they join ---


def test_without_a_configuration_all_else_is_examined_and_the_status_is_78(shared_machine: Machine) -> None:
    with hidden(shared_machine, "/etc/vmmesh-agent/config.yaml"):
        done = shared_machine.run(["vmmesh-agent", "doctor", "--output", "json"], check=False)
    assert done.returncode == 78
    rows = {row["check"]: row for row in json.loads(done.stdout)["checks"]}
    assert rows["configuration"]["result"] == "failed"
    assert rows["endpoint-port"]["result"] == "unknown"
    assert rows["programs"]["result"] == "ok"


def test_an_endpoint_that_is_down_is_told_from_one_that_is_not_trusted(joined: Machine, mesh: Mesh) -> None:
    mesh.endpoint.stop()
    try:
        rows = assert_fails(joined, "endpoint-port", note="refuses connections", fix="firewall")
    finally:
        mesh.endpoint.start()
    assert rows["endpoint-certificate"]["result"] == "unknown"
    assert failed(rows) == {"endpoint-port"}

    wrong = mesh.endpoint.configuration()
    wrong["endpoint"] |= {"ca_pins": ["sha256:" + "ab" * 32]}
    configure(joined, wrong)
    try:
        rows = assert_fails(joined, "endpoint-certificate", note="none of the pinned keys", fix="endpoint.ca_pins")
    finally:
        configure(joined, mesh.endpoint.configuration())
    assert rows["endpoint-port"]["result"] == "ok"
    assert failed(rows) == {"endpoint-certificate"}


def test_an_endpoint_whose_name_nobody_knows_is_said_to_have_no_address(joined: Machine, mesh: Mesh) -> None:
    lost = mesh.endpoint.configuration()
    lost["endpoint"] |= {"url": "https://mesh.invalid:15443/v1/bundle"}
    configure(joined, lost)
    try:
        rows = assert_fails(joined, "endpoint-name", note="mesh.invalid", fix="getent")
    finally:
        configure(joined, mesh.endpoint.configuration())
    assert rows["endpoint-port"]["result"] == "unknown"


def test_a_port_that_somebody_has_is_named_with_its_owner(machine: Machine, mesh: Mesh) -> None:
    invite(mesh, machine)
    with listening(machine, 15021):
        assert_fails(machine, "ports", note="15021 (health) by python3", fix="ss -ltnup")
    assert examine(machine)["ports"]["result"] == "ok"


@pytest.mark.parametrize("program", ["iptables", "ip6tables", "sudo", "hostname"])
def test_a_program_that_is_not_there_is_named_with_its_package(program: str, joined: Machine) -> None:
    with hidden(joined, joined.run(["which", program]).stdout.strip()):
        rows = assert_fails(joined, "programs", note=program, fix={"ip6tables": "iptables"}.get(program, program))
        assert len(rows) == len(examine(joined)), "a check that cannot be made stops no other"
    assert examine(joined)["programs"]["result"] == "ok"


def test_a_sudo_that_forbids_root_is_seen(joined: Machine) -> None:
    with hidden(joined, "/etc/sudoers"):
        joined.write("/etc/sudoers", "nobody ALL=(ALL:ALL) ALL\n", mode=0o440)
        assert_fails(joined, "sudo", note="cannot become istio-proxy", fix="/etc/sudoers")


@pytest.mark.parametrize("folder", ["/var/log/istio", "/var/lib/vmmesh-agent"])
def test_a_disk_that_is_nearly_full_is_named(folder: str, joined: Machine) -> None:
    joined.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder])
    try:
        assert_fails(joined, "disk", note=f"{folder} has ", fix=f"df -h {folder}")
    finally:
        joined.run(["umount", folder])


def test_a_cloud_init_that_rewrites_etc_hosts_is_found_whoever_set_it_last(joined: Machine) -> None:
    setting = "/etc/cloud/cloud.cfg.d/50-hosts.cfg"
    joined.write(setting, "manage_etc_hosts: true\n")
    try:
        assert examine(joined)["cloud-init"]["result"] == "warning"  # the agent puts it back before each start
        joined.run(["mv", DROP_IN, f"{DROP_IN}.away"])
        assert_fails(joined, "cloud-init", note=setting, fix="manage_etc_hosts: false")
        joined.write("/etc/cloud/cloud.cfg.d/90-hosts.cfg", "manage_etc_hosts: false\n")
        assert examine(joined)["cloud-init"]["result"] == "ok"
    finally:
        joined.run(["mv", f"{DROP_IN}.away", DROP_IN])
        joined.run(["rm", "-r", "/etc/cloud"])


def test_a_package_manager_at_work_is_named(deb_machine: Machine, mesh: Mesh) -> None:
    invite(mesh, deb_machine)
    script = (
        "import fcntl,time; f=open('/var/lib/dpkg/lock-frontend','w'); fcntl.lockf(f,fcntl.LOCK_EX); time.sleep(60)"
    )
    process = deb_machine.spawn(["python3", "-c", script])
    try:
        row = wait_for(deb_machine, "package-manager", "warning")
    finally:
        end(process)
    assert "lock-frontend" in row["note"]
    assert "ps -fp" in row["fix"]


# --- machines that fell ill after they joined ---


def test_istiod_that_is_down_is_told_from_one_that_has_no_address(joined: Machine, mesh: Mesh) -> None:
    mesh.istiod.stop()
    try:
        rows = assert_fails(joined, "istiod-port", note="15012 refuses connections", fix="Open TCP 15012")
    finally:
        mesh.istiod.start()
    assert rows["istiod-name"]["result"] == "ok"
    assert rows["istiod-certificate"]["result"] == "unknown"
    assert rows["endpoint-port"]["result"] == "ok"

    with hidden(joined, "/etc/hosts"):
        joined.write("/etc/hosts", "127.0.0.1 localhost\n127.0.1.1 vm3\n")
        rows = assert_fails(joined, "istiod-name", note="no address", fix="bootstrap")
    assert rows["istiod-port"]["result"] == "unknown"


def test_a_firewall_that_drops_what_goes_to_istiod_is_found_in_time(joined: Machine) -> None:
    rule = ["OUTPUT", "-p", "tcp", "--dport", "15012", "-j", "DROP"]
    joined.run(["iptables", "-I", *rule])
    try:
        rows = assert_fails(joined, "istiod-port", note="does not answer in time", fix="firewalls")
    finally:
        joined.run(["iptables", "-D", *rule])
    assert rows["istiod-certificate"]["result"] == "unknown"


def test_a_root_certificate_that_is_none_is_said_where_it_matters(joined: Machine) -> None:
    with hidden(joined, ROOT_CERT):
        rows = assert_fails(joined, "istiod-certificate", note=f"{ROOT_CERT} is missing", fix="vmmesh-agent restore")
        assert f"{ROOT_CERT} is missing" in rows["files"]["note"]
        joined.write(ROOT_CERT, "no certificate\n", owner="istio-proxy")
        rows = assert_fails(joined, "istiod-certificate", note="no usable certificate", fix="vmmesh-agent restore")
        assert rows["istiod-port"]["result"] == "unknown"


def test_an_istiod_that_is_mute_in_the_handshake_is_told_from_one_that_is_not_reached(
    joined: Machine, mesh: Mesh, network: Network, run: Run
) -> None:
    mesh.istiod.stop()
    try:
        with Mute("mute", ready="listening", network=network, run=run):
            rows = assert_fails(joined, "istiod-certificate", note="does not answer in the TLS handshake", fix="MTU")
    finally:
        mesh.istiod.start()
    assert rows["istiod-port"]["result"] == "ok"


def test_the_root_certificate_of_another_mesh_is_found_by_shaking_hands(joined: Machine) -> None:
    with hidden(joined, ROOT_CERT):
        joined.write(ROOT_CERT, Cluster.create().root_pem, owner="istio-proxy")
        rows = assert_fails(joined, "istiod-certificate", note="not signed by a CA", fix="bootstrap")
    assert rows["istiod-port"]["result"] == "ok"
    assert rows["certificate"]["result"] == "failed"
    assert "did not sign it" in rows["certificate"]["note"]


def test_a_foreign_line_that_leads_istiod_astray_is_shown(joined: Machine) -> None:
    ours = joined.read("/etc/hosts")
    joined.write("/etc/hosts", b"192.0.2.200 istiod.istio-system.svc\n" + ours)
    try:
        rows = assert_fails(joined, "hosts-file", note="192.0.2.200 istiod.istio-system.svc", fix="/etc/hosts")
        assert "192.0.2.200" in rows["istiod-name"]["note"]
    finally:
        joined.write("/etc/hosts", ours)


def test_capture_that_was_flushed_is_missed(joined: Machine) -> None:
    joined.run(["iptables", "-t", "nat", "-F"])
    joined.run(["iptables", "-t", "nat", "-X"])
    try:
        assert_fails(joined, "capture", note="ISTIO_OUTPUT", fix="systemctl restart istio")
    finally:
        restart(joined)


def test_a_chain_that_no_rule_leads_to_is_no_capture(joined: Machine) -> None:
    joined.run(["iptables", "-t", "nat", "-F", "OUTPUT"])
    try:
        assert_fails(joined, "capture", note="no rule leads to them", fix="systemctl restart istio")
    finally:
        restart(joined)


@pytest.mark.parametrize("program", ["iptables", "ip6tables"])
def test_capture_that_a_dead_sidecar_left_behind_is_found(program: str, joined: Machine) -> None:
    joined.run(["systemctl", "stop", "istio"])
    joined.run([program, "-t", "nat", "-N", "ISTIO_OUTPUT"])
    try:
        rows = assert_fails(joined, "capture", note=f"left behind in {program}", fix="istio-start.sh clean")
        assert rows["unit"]["result"] == "failed"
        assert "systemctl start istio" in rows["unit"]["fix"]
        joined.run([program, "-t", "nat", "-X", "ISTIO_OUTPUT"])
        assert examine(joined)["capture"]["result"] == "ok"
    finally:
        restart(joined)


def test_a_unit_that_a_boot_would_not_start_fails(joined: Machine) -> None:
    joined.run(["systemctl", "disable", "--quiet", "istio"])
    try:
        assert_fails(joined, "unit", note="not after a boot", fix="systemctl enable istio")
    finally:
        joined.run(["systemctl", "enable", "--quiet", "istio"])


def test_a_token_that_is_gone_is_missed_and_its_fix_works(joined: Machine) -> None:
    joined.run(["rm", TOKEN])
    rows = assert_fails(joined, "token", note=TOKEN, fix="vmmesh-agent restore")
    assert rows["files"]["result"] == "ok"
    joined.run(["vmmesh-agent", "restore"])
    assert examine(joined)["token"]["result"] == "ok"


@pytest.mark.parametrize(
    ("broken", "note"),
    [
        (["chown", "root", TOKEN], f"{TOKEN} belongs to user 0"),
        (["chmod", "0644", TOKEN], f"{TOKEN} has mode 0644, not 0600"),
        (["chown", "root", "/etc/certs"], "/etc/certs belongs to user 0"),
    ],
)
def test_an_owner_or_a_mode_that_is_wrong_is_named_and_the_fix_works(
    broken: list[str], note: str, joined: Machine
) -> None:
    joined.run(broken)
    assert_fails(joined, "files", note=note, fix="vmmesh-agent restore")
    joined.run(["vmmesh-agent", "restore"])
    assert examine(joined)["files"]["result"] == "ok"


def test_a_resolver_that_changed_after_the_start_is_missed_by_capture(joined: Machine) -> None:
    joined.write("/etc/resolv.conf", "nameserver 198.51.100.53\n")
    try:
        assert_fails(joined, "dns-servers", note="198.51.100.53", fix="systemctl restart istio")
    finally:
        joined.write("/etc/resolv.conf", f"nameserver {CLUSTER_IPV4}\n")


def test_a_frozen_sidecar_is_silent_on_dns_and_health(joined: Machine) -> None:
    joined.run(["systemctl", "kill", "--signal=STOP", "istio"])
    try:
        rows = assert_fails(joined, "dns-proxy", note="no answer on 15053", fix="systemctl restart istio")
        assert rows["unit"]["result"] == "ok"
    finally:
        joined.run(["systemctl", "kill", "--signal=CONT", "istio"])


def test_a_c_library_that_is_too_old_for_envoy_is_found_without_running_it(
    network: Network, run: Run, fixture_rpms: tuple[object, ...], mesh: Mesh
) -> None:
    layers = image.layers("rpm", fixture_rpms=fixture_rpms)  # type: ignore[arg-type]
    with Machine("vm6", layers=layers, network=network, run=run) as machine:
        mesh.endpoint.invite(machine)
        machine.write("/usr/local/bin/envoy", b"\x7fELF\0GLIBC_2.17\0GLIBC_2.99\0", mode=0o755)
        assert_fails(machine, "c-library", note="Envoy wants glibc 2.99", fix="sidecar.package")


# --- making machines ill ---


class Mute(Service):
    """Accepts connections where istiod should be, and says nothing."""

    def argv(self) -> list[str]:
        script = (
            f"import socket, time; server = socket.create_server(({CLUSTER_IPV4!r}, {ISTIOD_PORT}));"
            " print('listening', flush=True); time.sleep(600)"
        )
        return ["-c", script]


@contextmanager
def hidden(machine: Machine, path: str) -> Iterator[None]:
    """Move a file away for a while."""
    machine.run(["mv", path, f"{path}.hidden"])
    try:
        yield
    finally:
        machine.run(["mv", f"{path}.hidden", path])


@contextmanager
def listening(machine: Machine, port: int) -> Iterator[None]:
    script = f"import socket,time; s=socket.create_server(('', {port})); print('ready', flush=True); time.sleep(60)"
    process = machine.spawn(["python3", "-c", script])
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    try:
        yield
    finally:
        end(process)


def end(process: subprocess.Popen[str]) -> None:
    """End a command and its children, which `spawn` put into a session of their own."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def restart(machine: Machine) -> None:
    machine.run(["systemctl", "restart", "istio"])
    machine.run(["vmmesh-agent", "wait", "--for", "healthy", "--timeout", "60"])


def wait_for(machine: Machine, check: str, result: str) -> dict[str, str]:
    deadline = time.monotonic() + 20
    while (row := examine(machine)[check])["result"] != result:
        assert time.monotonic() < deadline, row
    return row
