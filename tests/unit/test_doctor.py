"""Each check on a machine that is a folder, a table of what its programs say, and nothing else."""

import json
import socket
import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path, PurePosixPath

import pytest

from factories import CLUSTER, MOMENT, a_config, a_report
from vmmesh_agent import doctor, report
from vmmesh_agent.config import Config
from vmmesh_agent.doctor import CHECKS, Check, Finding, Patient, Result, Row
from vmmesh_agent.errors import AgentError, ConfigurationError, FetchError, HostError, NotPermittedError
from vmmesh_agent.host import Account, Completed, Host
from vmmesh_agent.report import Known

ISTIO_PROXY = Account(998, 998)
UNIT = "LoadState=loaded\nActiveState={active}\nSubState={sub}\nMainPID=42\nNRestarts=0\nInvocationID=ab\n"
CHAINS = ("ISTIO_INBOUND", "ISTIO_IN_REDIRECT", "ISTIO_OUTPUT", "ISTIO_REDIRECT")


class FakeHost(Host):
    """A machine below a folder. `says` are the outputs of its commands, told by their first words."""

    def __init__(self, root: Path, *, is_root: bool = True) -> None:
        super().__init__(root)
        self.may_all = is_root
        self.accounts: dict[str, Account] = {"istio-proxy": ISTIO_PROXY}
        self.known: dict[str, tuple[str, ...]] = {}
        self.says: dict[str, str | AgentError] = {
            "uname -m": "x86_64\n",
            "getconf GNU_LIBC_VERSION": "glibc 2.31\n",
            "iptables -V": "iptables v1.8.9 (nf_tables)\n",
            "systemctl show": UNIT.format(active="active", sub="running"),
            "systemctl is-enabled": "enabled\n",
            "timedatectl": "yes\n",
            "ip -oneline address": "1: lo    inet 127.0.0.1/8\n2: eth0    inet 192.0.2.11/24\n"
            "3: docker0    inet 172.17.0.1/16\n",
            "ip -oneline route": "192.0.2.1 dev eth0 src 192.0.2.11 uid 0 \\    cache \n",
            "hostname": "192.0.2.11 172.17.0.1 \n",
        }

    @property
    def is_running(self) -> bool:
        return True

    @property
    def is_root(self) -> bool:
        return self.may_all

    @property
    def name(self) -> str:
        return "vm1.example.com"

    def account(self, name: str) -> Account | None:
        return self.accounts.get(name)

    def addresses(self, name: str, timeout: float, services: str = "") -> tuple[str, ...] | None:  # noqa: ARG002  # a fake takes no time
        return self.known.get(name, ())

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout: float = 60,  # noqa: ARG002
        check: bool = True,  # noqa: ARG002
        environment: Mapping[str, str] | None = None,  # noqa: ARG002
        input: bytes = b"",  # noqa: A002, ARG002  # as subprocess calls it
        output_limit: int = 16 * 1024**2,  # noqa: ARG002
    ) -> Completed:
        line = " ".join(argv)
        said = next((said for start, said in self.says.items() if line.startswith(start)), "")
        if isinstance(said, AgentError):
            raise said
        return Completed(tuple(argv), 0, said, "")

    def put(self, path: str, content: bytes | str = b"", mode: int = 0o644) -> None:
        """Write a file of the machine."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        file.chmod(mode)

    def join(self, **variables: str) -> None:
        """Make it one that has joined."""
        self.put("/usr/lib/systemd/system/istio.service")
        self.put("/var/lib/istio/envoy/cluster.env", "".join(f"{k}='{v}'\n" for k, v in variables.items()))
        self.put("/etc/istio/config/mesh", "defaultConfig:\n  discoveryAddress: istiod.istio-system.svc:15012\n")
        self.known["istiod.istio-system.svc"] = ("192.0.2.1",)


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path)


def row(host: Host, check: str, config: Config | None = None, trouble: AgentError | None = None) -> Row:
    """Make one check."""
    return row_of(Patient(host, config or a_config(), trouble, MOMENT), check)


def row_of(patient: Patient, check: str) -> Row:
    (found,) = doctor.examine(patient, [each for each in CHECKS if each.name == check])
    return found


# --- the machine ---


@pytest.mark.parametrize(("machine", "result"), [("x86_64", "ok"), ("aarch64", "ok"), ("armv7l", "failed")])
def test_only_architectures_that_istio_is_published_for_will_do(machine: str, result: str, host: FakeHost) -> None:
    host.says["uname -m"] = f"{machine}\n"
    assert row(host, "architecture").result == result


@pytest.mark.parametrize(
    ("symbols", "result"),
    [(b"\0GLIBC_2.17\0GLIBC_2.31\0", "ok"), (b"\0GLIBC_2.32\0GLIBC_2.4\0", "failed"), (b"GLIBC_2.99 in a text", "ok")],
)
def test_the_newest_symbol_version_of_envoy_counts_by_number(symbols: bytes, result: str, host: FakeHost) -> None:
    host.put("/usr/local/bin/envoy", b"\x7fELF" + symbols)
    assert row(host, "c-library").result == result


def test_a_symbol_version_that_lies_across_two_pieces_of_the_file_is_read(host: FakeHost) -> None:
    for offset in range(1, 12):
        host.put("/usr/local/bin/envoy", b"x" * (1024**2 - offset) + b"\0GLIBC_2.99\0")
        assert "2.99" in row(host, "c-library").note


def test_a_machine_without_envoy_is_fine_for_its_c_library(host: FakeHost) -> None:
    assert row(host, "c-library").result == Result.OK


def test_missing_programs_are_named_with_their_packages(host: FakeHost) -> None:
    for name in ("bash", "hostname", "ip"):
        host.put(f"/usr/bin/{name}")
    host.put("/usr/sbin/iptables")
    found = row(host, "programs")
    assert (found.result, found.note, found.fix) == ("failed", "missing: ip6tables, sudo", "Install iptables, sudo.")


HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def a_socket(port: int, uid: int, state: str = "0A") -> str:
    return f"   0: 0100007F:{port:04X} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000 {uid:5d}  0 77 1\n"


@pytest.mark.parametrize(
    ("table", "line", "active", "result"),
    [
        ("tcp", a_socket(15001, 33), "inactive", "failed"),
        ("tcp", a_socket(15001, 33), "active", "failed"),
        ("tcp", a_socket(15001, ISTIO_PROXY.uid), "active", "ok"),
        ("tcp", a_socket(15001, ISTIO_PROXY.uid), "inactive", "failed"),
        ("tcp", a_socket(15001, 33, state="01"), "inactive", "ok"),
        ("tcp", a_socket(8080, 33), "inactive", "ok"),
        ("tcp6", a_socket(15090, 0), "inactive", "failed"),
        ("udp", a_socket(15053, 0, state="07"), "inactive", "failed"),
        ("udp", a_socket(15001, 0, state="07"), "inactive", "ok"),
    ],
)
def test_a_port_is_taken_when_somebody_but_the_running_sidecar_listens(
    table: str, line: str, active: str, result: str, host: FakeHost
) -> None:
    host.join()
    host.says["systemctl show"] = UNIT.format(active=active, sub="dead")
    host.put(f"/proc/net/{table}", HEAD + line)
    assert row(host, "ports").result == result


def test_who_has_the_port_is_named_where_ss_knows(host: FakeHost) -> None:
    host.put("/proc/net/tcp", HEAD + a_socket(15021, 33))
    host.put("/usr/bin/ss")
    host.says["ss "] = 'tcp LISTEN 0 511 0.0.0.0:15021 0.0.0.0:* users:(("nginx",pid=123,fd=6))\n'
    assert row(host, "ports").note == "taken: 15021 (health) by nginx, process 123"


def test_a_second_iptables_backend_with_rules_is_a_warning(host: FakeHost) -> None:
    host.put("/proc/net/ip_tables_names", "filter\n")
    assert row(host, "iptables").result == Result.OK
    host.put("/proc/net/ip_tables_names", "nat\n")
    assert row(host, "iptables").result == Result.WARNING
    host.says["iptables -V"] = "iptables v1.8.9 (legacy)\n"
    assert row(host, "iptables").result == Result.OK
    host.put("/usr/sbin/iptables-nft-save")
    host.says["iptables-nft-save"] = "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -j DOCKER\nCOMMIT\n"
    assert row(host, "iptables").result == Result.WARNING


def test_docker_before_the_sidecar_is_a_warning_and_after_it_is_none(host: FakeHost) -> None:
    docker, istio = "-A PREROUTING -m addrtype -j DOCKER\n", "-A PREROUTING -p tcp -j ISTIO_INBOUND\n"
    host.says["iptables --wait"] = docker + istio
    assert "Docker's rules come before" in row(host, "iptables").note
    host.says["iptables --wait"] = istio + docker
    assert row(host, "iptables").result == Result.OK
    host.says["iptables --wait"] = docker
    assert row(host, "iptables").result == Result.OK


@pytest.mark.parametrize(
    ("offset", "synchronised", "result"),
    [
        (None, "yes", "ok"),
        (None, "no", "warning"),
        (None, "", "unknown"),
        (3.0, "no", "ok"),
        (300.0, "yes", "failed"),
        (-300.0, "no", "failed"),
    ],
)
def test_a_clock_is_judged_by_the_endpoints_before_its_own_word(
    offset: float | None, synchronised: str, result: str, host: FakeHost
) -> None:
    record = a_report(known=Known(clock_offset=offset))
    host.put(str(report.FILE), json.dumps(record.as_dict()))
    host.says["timedatectl"] = f"{synchronised}\n"
    assert row(host, "clock").result == result


@pytest.mark.parametrize(
    ("mode", "denied", "result"),
    [(None, "", "not-applicable"), (b"0", "", "ok"), (b"1", "", "ok"), (b"1", "avc: denied envoy\n", "warning")],
)
def test_selinux_matters_where_it_denied_something(
    mode: bytes | None, denied: str, result: str, host: FakeHost
) -> None:
    if mode is not None:
        host.put("/sys/fs/selinux/enforce", mode)
    host.says["journalctl"] = denied
    assert row(host, "selinux").result == result


# --- names and addresses ---


@pytest.mark.parametrize(
    ("files", "is_put_back", "result"),
    [
        ({}, False, "ok"),
        ({"cloud.cfg": "manage_etc_hosts: true\n"}, False, "failed"),
        ({"cloud.cfg": "manage_etc_hosts: true\n"}, True, "warning"),
        ({"cloud.cfg": "manage_etc_hosts: localhost\n"}, False, "ok"),
        ({"cloud.cfg": "#manage_etc_hosts: true\n"}, False, "ok"),
        ({"cloud.cfg": "manage_etc_hosts: 'template'\n"}, False, "failed"),
        ({"cloud.cfg": "manage_etc_hosts: true\n", "cloud.cfg.d/9.cfg": "manage_etc_hosts: false\n"}, False, "ok"),
        ({"cloud.cfg.d/9.bak": "manage_etc_hosts: true\n"}, False, "ok"),
    ],
)
def test_cloud_init_rewrites_etc_hosts_as_its_last_setting_says(
    files: dict[str, str], is_put_back: bool, result: str, host: FakeHost
) -> None:
    for name, text in files.items():
        host.put(f"/etc/cloud/{name}", text)
    if is_put_back:
        host.put("/usr/lib/systemd/system/istio.service.d/10-vmmesh-agent.conf", "")
    assert row(host, "cloud-init").result == result


@pytest.mark.parametrize(
    ("kept", "pinned", "result"),
    [("vm1", "", "ok"), ("vm1.example.com", "", "ok"), ("vm2", "", "warning"), ("vm2", "localhost", "failed")],
)
def test_a_host_name_has_to_be_its_own_and_to_last(kept: str, pinned: str, result: str, host: FakeHost) -> None:
    host.put("/etc/hostname", f"{kept}\n")
    host.put("/var/lib/istio/envoy/cluster.env", f"POD_NAME='{pinned}'\n" if pinned else "")
    assert row(host, "host-name").result == result


@pytest.mark.parametrize(
    ("listed", "pinned", "result"),
    [
        ("192.0.2.11 172.17.0.1", "", "ok"),
        ("172.17.0.1 192.0.2.11", "", "failed"),
        ("172.17.0.1 192.0.2.11", "192.0.2.11", "ok"),
        ("198.51.100.4 192.0.2.11", "", "warning"),
        ("fe80::1 192.0.2.11", "", "failed"),
        ("169.254.7.7", "", "failed"),
        ("192.0.2.11", "203.0.113.9", "warning"),
        ("", "", "failed"),
    ],
)
def test_the_address_that_is_announced_is_the_one_that_speaks_to_the_mesh(
    listed: str, pinned: str, result: str, host: FakeHost
) -> None:
    host.join(**({"ISTIO_SVC_IP": pinned} if pinned else {}))
    host.says["hostname"] = f"{listed} \n"
    found = row(host, "address")
    assert found.result == result
    assert result == "ok" or "192.0.2.11" in found.fix or not listed


BLOCK = "# BEGIN vmmesh-agent\n192.0.2.1 istiod.istio-system.svc\n# END vmmesh-agent\n"


@pytest.mark.parametrize(
    ("content", "result"),
    [
        (BLOCK, "ok"),
        (f"127.0.0.1 localhost\n{BLOCK}", "ok"),
        (f"192.0.2.9 istiod.istio-system.svc\n{BLOCK}", "failed"),
        (f"192.0.2.9 other Istiod.istio-system.svc # old\n{BLOCK}", "failed"),
        (f"192.0.2.1 istiod.istio-system.svc\n{BLOCK}", "warning"),
        (f"{BLOCK}192.0.2.9 istiod.istio-system.svc\n", "warning"),
        (f"# 192.0.2.9 istiod.istio-system.svc\n{BLOCK}", "ok"),
        (f"192.0.2.9 istiod-canary.istio-system.svc\n{BLOCK}", "failed"),
    ],
)
def test_a_foreign_line_that_names_istiod_matters_by_its_place_and_address(
    content: str, result: str, host: FakeHost
) -> None:
    host.join()
    host.put("/etc/hosts", content)
    assert row(host, "hosts-file").result == result


@pytest.mark.parametrize(
    ("sshd_config", "environment", "result"),
    [
        ("", {"ISTIO_INBOUND_PORTS": "*", "ISTIO_LOCAL_EXCLUDE_PORTS": "22,15090"}, "ok"),
        ("", {"ISTIO_INBOUND_PORTS": "*", "ISTIO_LOCAL_EXCLUDE_PORTS": "15090"}, "warning"),
        ("Port 2222\n", {"ISTIO_INBOUND_PORTS": "*", "ISTIO_LOCAL_EXCLUDE_PORTS": "22,15090"}, "warning"),
        ("#Port 2222\n", {"ISTIO_INBOUND_PORTS": "*", "ISTIO_LOCAL_EXCLUDE_PORTS": "22,15090"}, "ok"),
        ("Port 22\nport=2222\n", {"ISTIO_INBOUND_PORTS": "8080,9090"}, "ok"),
        ("Port 22\nport=2222\n", {"ISTIO_INBOUND_PORTS": "2222,9090"}, "warning"),
    ],
)
def test_an_ssh_port_that_is_captured_is_a_warning(
    sshd_config: str, environment: dict[str, str], result: str, host: FakeHost
) -> None:
    host.put("/usr/sbin/sshd")
    host.put("/etc/ssh/sshd_config.d/10.conf", sshd_config)
    host.join(**environment)
    assert row(host, "ssh").result == result


def test_a_resolver_that_is_not_captured_fails_and_systemd_resolved_is_named(host: FakeHost) -> None:
    host.join(ISTIO_META_DNS_CAPTURE="true")
    rule = "-A ISTIO_OUTPUT -d 127.0.0.53/32 -p udp -m udp --dport 53 -j REDIRECT --to-ports 15053\n"
    host.says["iptables --wait"] = rule
    host.says["cat /etc/resolv.conf"] = "nameserver 127.0.0.53\n"
    assert row(host, "dns-servers").note == "127.0.0.53 (systemd-resolved): captured"
    host.says["cat /etc/resolv.conf"] = "nameserver 127.0.0.53\nnameserver 198.51.100.53\n"
    assert row(host, "dns-servers").result == Result.FAILED
    host.says["cat /etc/resolv.conf"] = "# none\n"
    assert row(host, "dns-servers").result == Result.WARNING


# --- the endpoint ---


@pytest.mark.parametrize(
    ("code", "results"),
    [
        (None, ("ok", "ok", "ok")),
        ("endpoint-name-not-found", ("failed", "unknown", "unknown")),
        ("endpoint-refuses-connections", ("ok", "failed", "unknown")),
        ("endpoint-unreachable", ("ok", "failed", "unknown")),
        ("proxy-refused", ("ok", "failed", "unknown")),
        ("endpoint-unknown-ca", ("ok", "ok", "failed")),
        ("endpoint-pin-mismatch", ("ok", "ok", "failed")),
        ("endpoint-handshake-silent", ("ok", "ok", "failed")),
        ("ca-file-invalid", ("ok", "unknown", "failed")),
    ],
)
def test_what_stops_a_connection_fails_at_its_own_stage_alone(
    code: str | None, results: tuple[str, str, str], host: FakeHost
) -> None:
    patient = Patient(host, a_config("https://mesh.example.com/v1/bundle"), None, MOMENT)
    patient.endpoint_trouble = FetchError("it did not work", code=code) if code else None
    if code != "endpoint-name-not-found":
        host.known["mesh.example.com"] = ("192.0.2.1",)
    stages = ("endpoint-name", "endpoint-port", "endpoint-certificate")
    assert tuple(row_of(patient, stage).result for stage in stages) == results


def test_a_bundle_on_the_disk_has_to_be_there(host: FakeHost) -> None:
    assert row(host, "endpoint-files", a_config("file:///srv/bundle")).result == Result.FAILED
    host.put("/srv/bundle/hosts")
    assert row(host, "endpoint-files", a_config("file:///srv/bundle")).result == Result.OK
    assert row(host, "endpoint-port", a_config("file:///srv/bundle")).result == Result.NOT_APPLICABLE


# --- the sidecar ---


@pytest.mark.parametrize(
    ("token", "result"),
    [
        (CLUSTER.token(), "ok"),
        (CLUSTER.token(issued_at=MOMENT - timedelta(hours=3)), "warning"),
        (CLUSTER.token(audience="somebody-else"), "failed"),
        ("no token at all", "failed"),
        ("a.b.c", "failed"),
    ],
)
def test_a_token_is_judged_by_what_it_says(token: str, result: str, host: FakeHost) -> None:
    host.join()
    host.put("/var/run/secrets/tokens/istio-token", token)
    found = row(host, "token")
    assert found.result == result
    assert token not in found.note


@pytest.mark.parametrize(
    ("active", "chains", "jump", "result"),
    [
        ("active", CHAINS, True, "ok"),
        ("active", CHAINS[1:], True, "failed"),
        ("active", CHAINS, False, "failed"),
        ("active", (), False, "failed"),
        ("inactive", (), False, "ok"),
        ("inactive", CHAINS[:1], False, "failed"),
    ],
)
def test_capture_has_to_be_as_the_sidecar_is(
    active: str, chains: tuple[str, ...], jump: bool, result: str, host: FakeHost
) -> None:
    host.join()
    host.says["systemctl show"] = UNIT.format(active=active, sub="dead")
    rules = [f"-N {chain}" for chain in chains] + ["-A OUTPUT -p tcp -j ISTIO_OUTPUT"] * jump
    host.says["iptables --wait"] = host.says["ip6tables --wait"] = "\n".join(rules)
    assert row(host, "capture").result == result


class Answering(FakeHost):
    """One with somebody on its loopback interface, who answers each datagram with its beginning."""

    def exchange(self, port: int, datagram: bytes, timeout: float) -> bytes | None:  # noqa: ARG002  # it takes no time
        return datagram[:12] if port == 15053 else None


class Silent(FakeHost):
    """One on which nobody answers."""

    def exchange(self, port: int, datagram: bytes, timeout: float) -> bytes | None:  # noqa: ARG002
        return None


def test_a_dns_proxy_that_is_not_there_is_told_from_one_that_is_silent(tmp_path: Path) -> None:
    answering, silent = Answering(tmp_path / "answering"), Silent(tmp_path / "silent")
    for host in (answering, silent):
        host.join(ISTIO_META_DNS_CAPTURE="true")
    assert row(answering, "dns-proxy").result == Result.OK
    assert "nobody listens" in row(silent, "dns-proxy").note
    silent.put("/proc/net/udp", HEAD + a_socket(15053, ISTIO_PROXY.uid, state="07"))
    assert "no answer" in row(silent, "dns-proxy").note
    silent.join(ISTIO_META_DNS_CAPTURE="false")
    assert row(silent, "dns-proxy").result == Result.NOT_APPLICABLE


def test_rules_that_are_somebody_elses_are_not_missed(host: FakeHost) -> None:
    host.join()
    host.put("/var/lib/istio/envoy/sidecar.env", "# ISTIO_CUSTOM_IP_TABLES=true\n")
    assert row(host, "capture").result == Result.FAILED
    host.put("/var/lib/istio/envoy/sidecar.env", 'ISTIO_CUSTOM_IP_TABLES="true"\n')
    assert row(host, "capture").result == Result.NOT_APPLICABLE


# --- the table and its walk ---


def test_each_check_has_a_name_of_its_own() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)


def test_a_check_that_cannot_be_made_says_why_and_stops_no_other(host: FakeHost) -> None:
    host.says["uname -m"] = HostError("`uname -m` did not end within 4 s", code="command-timeout")
    host.put("/var/lib/istio/envoy/cluster.env", b"\xff\xfe")
    host.put("/usr/lib/systemd/system/istio.service")
    host.put("/etc/istio/config/mesh", "discovery: [")
    rows = {row.check: row for row in doctor.examine(Patient(host, a_config(), None, MOMENT))}
    assert list(rows) == [check.name for check in CHECKS]
    assert rows["architecture"].result == Result.UNKNOWN
    assert "did not end within" in rows["architecture"].note
    assert rows["istiod-name"].result == Result.UNKNOWN
    assert rows["host-name"].result == Result.UNKNOWN
    assert rows["ports"].result == Result.OK


def test_without_root_what_takes_root_is_unknown_and_says_so(tmp_path: Path) -> None:
    host = FakeHost(tmp_path, is_root=False)
    host.join()
    for check in (check for check in CHECKS if check.root):
        found = row(host, check.name)
        assert (found.result, found.note) == (Result.UNKNOWN, "it takes root")
    denied = NotPermittedError("/etc/vmmesh-agent/config.yaml: Permission denied", code="permission-denied")
    assert row(host, "configuration", trouble=denied).result == Result.UNKNOWN


def test_on_an_image_only_its_files_are_examined(tmp_path: Path) -> None:
    rows = list(doctor.examine(Patient(Host(tmp_path), a_config(), None, MOMENT)))
    assert {row.check for row in rows if row.result is Result.FAILED} == {"programs", "endpoint-files"}
    alive = {check.name for check in CHECKS if check.live}
    assert {row.result for row in rows if row.check in alive} == {Result.NOT_APPLICABLE}


@pytest.mark.parametrize(
    ("results", "trouble", "status"),
    [
        ("ok warning unknown not-applicable", None, 0),
        ("ok failed", None, 1),
        ("ok", ConfigurationError("no", code="configuration-missing"), 78),
        ("ok", NotPermittedError("no", code="permission-denied"), 0),
    ],
)
def test_the_exit_status_says_whether_something_failed(results: str, trouble: AgentError | None, status: int) -> None:
    rows = [Row("a-check", Result(result), "", "") for result in results.split()]
    assert doctor.exit_status(rows, trouble) == status


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_row_keeps_within_the_screen_and_loses_no_word(width: int) -> None:
    note, fix = "many words " * 20, "and a fix of many words " * 10
    shown = doctor.human(Row("endpoint-certificate", Result.FAILED, note.strip(), fix.strip()), width=width)
    assert max(map(len, shown.splitlines())) <= width
    assert shown.split() == ["FAILED", "endpoint-certificate", *note.split(), "→", *fix.split()]


def test_the_summary_counts() -> None:
    rows = [Row("a", Result(result), "", "") for result in ("ok", "failed", "ok", "not-applicable")]
    assert doctor.summary(rows) == "2 ok, 1 failed, 1 not applicable"


def test_a_check_of_ones_own_gets_the_machine(host: FakeHost) -> None:
    own = Check("own", lambda patient: Finding(Result.WARNING, patient.host.name, "do it"))
    (found,) = doctor.examine(Patient(host, None, None, MOMENT), [own])
    assert found.as_dict() == {"check": "own", "result": "warning", "note": "vm1.example.com", "fix": "do it"}


# --- what the machine's seam got for it ---


def test_a_file_of_any_size_comes_in_pieces(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abcdefg")
    assert list(Host(tmp_path).chunks(PurePosixPath("/file"), 3)) == [b"abc", b"def", b"g"]
    with pytest.raises(HostError):
        list(Host(tmp_path).chunks(PurePosixPath("/gone")))


def test_a_datagram_gets_its_answer_and_silence_is_none(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        assert Host(tmp_path).exchange(port, b"anybody?", 0.05) is None
        server.recv(100)

        def answer() -> None:
            question, caller = server.recvfrom(100)
            server.sendto(question.upper(), caller)

        thread = threading.Thread(target=answer)
        thread.start()
        assert Host(tmp_path).exchange(port, b"hello", 5) == b"HELLO"
        thread.join()
    assert Host(tmp_path).exchange(port, b"nobody", 0.05) is None
