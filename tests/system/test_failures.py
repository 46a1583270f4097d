"""Each failure is made for real on a joined machine; `status` names it, and what its remedy says repairs it.

A scenario breaks something, waits until the evidence is there (a line of a log, a file that is gone, the state of a
process), then until `status` has state and cause, follows the remedy to the letter, and the machine is healthy again.
What the remedy says about the world outside (the cluster, the disk, another program) is repaired before.

The times are measured, not asserted; the table at the end shows them.
"""

import re
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from lab.cluster import Authority, Cluster, now
from lab.network import Network
from lab.run import Run
from lab.services import ENDPOINT_PORT, ISTIOD_PORT, Service
from standins.istiod import Behaviour
from standins.packages import Packages
from system.faults import ERR, JOURNAL, LOG, Scenario, Vm, played
from system.joining import CLUSTER_ENV, MESH_YAML, ROOT_CERT, TOKEN, configure
from system.skewed import Skewed

ENVOY = "/usr/local/bin/envoy"
HOSTS = "/etc/hosts"
ISTIOD = "istiod.istio-system.svc"
REFUSED = "authenticat(?:e|ion) failure"  # by the authority, or on the stream

# Each costs Envoy some 20 KB.
MANY_CONNECTIONS = """
import socket, time
held = [socket.create_connection(("127.0.0.1", 15021), 2) for _ in range(900)]
for each in held:
    each.sendall(b"GET / HTTP/1.1\\r\\nHost: x\\r\\nX: " + 4000 * b"x")
time.sleep(2)
"""

FAILURES: list[Scenario] = []


def failure(scenario: Scenario) -> Scenario:
    """Count the function among the failures."""
    FAILURES.append(scenario)
    return scenario


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, packages: Packages, network: Network, run: Run, fixture_rpms: tuple[Path, ...]
) -> Iterator[dict[str, Future[None]]]:
    """What came of each failure: they are made side by side, on several machines."""
    with played(request, "made", packages=packages, network=network, run=run, fixture_rpms=fixture_rpms) as outcomes:
        yield outcomes


# --- long ones first: others are made meanwhile -----------------------------------


@failure
def istiod_falls_silent_while_the_sidecar_serves(vm: Vm) -> None:
    """The cable is pulled: nothing is refused, nothing answers. Envoy gives up after a minute or so."""
    vm.machine.link.cut()
    vm.writes(ERR, "gRPC config stream to xds-grpc closed since", within=150)
    condition = vm.says("degraded", "istiod_unreachable", evidence="closed since|keepalive ping failed")
    vm.machine.link.restore()
    vm.follow(condition)
    vm.is_healthy(within=120)


@failure
def the_clock_differs_from_the_endpoints(vm: Vm) -> None:
    """The endpoint's clock is the one that is wrong here; see `system.skewed`."""
    with Skewed(vm.address, ENDPOINT_PORT, network=vm.network, run=vm.run_of_lab) as skewed:
        skewed.runs(600)
        document = vm.mesh.endpoint.configuration()
        configure(
            vm.machine, document | {"endpoint": document["endpoint"] | {"url": skewed.url, "ca_pins": [skewed.pin]}}
        )
        vm.does("systemctl restart vmmesh-agent")
        vm.seen("an answer with the wrong time", lambda: vm.run("systemctl is-active vmmesh-agent").returncode == 0)
        condition = vm.says("degraded", "clock_skew")
        assert re.search(r"\b(59|60)\d s behind", str(condition["message"]))
        skewed.runs(0)
        vm.follow(condition)
        vm.is_healthy(within=120)
        vm.mesh.endpoint.invite(vm.machine)
        vm.does("systemctl restart vmmesh-agent")


@failure
def istiod_is_stopped_while_the_sidecar_serves(vm: Vm) -> None:
    """Envoy speaks of it after half a minute."""
    vm.istiod.stop()
    text = vm.writes(ERR, "gRPC config stream to xds-grpc closed since")
    condition = vm.says("degraded", "istiod_unreachable", evidence=text)
    vm.istiod.start()
    vm.follow(condition)


@failure
def a_certificate_runs_out_because_istiod_refuses_to_renew_it(vm: Vm) -> None:
    """Degraded while the old certificate is good, failed from the moment that it is not."""
    vm.istiod.behave(Behaviour(certificate_lifetime=40))
    vm.without_certificate()
    vm.writes(LOG, "generated new workload certificate")
    vm.is_healthy()
    vm.istiod.behave(Behaviour(certificate_lifetime=40, refuse="unauthenticated"))
    vm.writes(LOG, "request authenticate failure")
    vm.says("degraded", "token_rejected", evidence=REFUSED)
    vm.seen(
        "an expired certificate",
        lambda: vm.run("openssl x509 -noout -checkend 0 -in /etc/certs/cert-chain.pem").returncode,
    )
    condition = vm.says("failed", "token_rejected", evidence=REFUSED)
    vm.mentions("cert_expired")
    vm.istiod.behave(Behaviour())
    vm.follow(condition)


@failure
def the_application_fails_its_probe(vm: Vm) -> None:
    """The stand-in has no prober, so the lines are written into its log as a real one writes them."""
    vm.settled(65)  # before, it is asked of an Envoy that may not be ready
    vm.appends(
        LOG, '{now}\tinfo\thealthcheck\tfailure threshold hit, marking as unhealthy: Get "http://127.0.0.1:8080/": EOF'
    )
    text = vm.writes(LOG, "marking as unhealthy")
    condition = vm.says("degraded", "app_probe_failing", evidence=text)
    vm.follow(condition)
    vm.appends(LOG, "{now}\tinfo\thealthcheck\tsuccess threshold hit, marking as healthy")


@failure
def istiod_hangs(vm: Vm) -> None:
    vm.istiod.behave(Behaviour(hang=True))
    vm.without_certificate()
    text = vm.writes(LOG, "code = DeadlineExceeded")
    condition = vm.says("failed", "istiod_unreachable", evidence=text)
    vm.istiod.behave(Behaviour())
    vm.istiod.stop()  # and with it the streams on which nothing comes
    vm.istiod.start()
    vm.follow(condition)


# --- the token ----------------------------------------------------------------------


@failure
def the_token_is_deleted_while_the_sidecar_serves(vm: Vm) -> None:
    """Nothing is lost before the certificate has to be renewed."""
    vm.hinder()
    vm.settled(25)
    vm.does(f"rm {TOKEN}")
    vm.seen("no token", lambda: vm.run(f"test ! -e {TOKEN}").returncode == 0)
    condition = vm.says("degraded", "token_missing")
    vm.follow(condition)
    vm.does(f"test -e {TOKEN}")


@failure
def the_sidecar_starts_without_token_and_certificate(vm: Vm) -> None:
    vm.hinder()
    vm.does(f"rm {TOKEN}")
    vm.without_certificate()
    text = vm.writes(LOG, "failed to fetch token from file")
    vm.follow(vm.says("failed", "token_missing", evidence=text))


@failure
def the_token_expired(vm: Vm) -> None:
    token = vm.cluster.token(issued_at=now() - timedelta(hours=2))
    condition = _refused(vm, token)
    assert "expired" in str(condition["message"])
    vm.follow(condition)


@failure
def the_token_is_for_another_audience(vm: Vm) -> None:
    vm.follow(_refused(vm, vm.cluster.token(audience="somebody-else")))


@failure
def the_token_is_another_clusters(vm: Vm) -> None:
    vm.follow(_refused(vm, Cluster.create().token()))


@failure
def the_service_account_is_gone(vm: Vm) -> None:
    """istiod's answer is that to any bad token, so the cause is not told apart."""
    vm.istiod.behave(Behaviour(service_accounts=[]))
    vm.without_certificate()
    vm.writes(LOG, "request authenticate failure")
    condition = vm.says("failed", "token_rejected", evidence=REFUSED)
    vm.istiod.behave(Behaviour())
    vm.follow(condition)


@failure
def the_token_may_not_be_read(vm: Vm) -> None:
    vm.hinder()
    vm.does(f"chown root {TOKEN}; chmod 600 {TOKEN}")
    vm.without_certificate()
    text = vm.writes(LOG, "istio-token: permission denied")
    vm.follow(vm.says("failed", "permission_denied", evidence=text))


# --- trust ----------------------------------------------------------------------------


@failure
def the_root_certificate_is_another_meshs(vm: Vm) -> None:
    vm.hinder()
    vm.machine.write(ROOT_CERT, Authority.create().pem, owner="istio-proxy")
    vm.without_certificate()
    text = vm.writes(LOG, "certificate signed by unknown authority")
    vm.follow(vm.says("failed", "root_cert_mismatch", evidence=text))


@failure
def the_root_certificate_is_deleted(vm: Vm) -> None:
    vm.hinder()
    vm.does(f"rm {ROOT_CERT}")
    vm.restart()
    text = vm.writes(LOG, "missing a root certificate")
    vm.follow(vm.says("failed", "root_cert_missing", evidence=text))


@failure
def the_root_certificate_is_no_certificate(vm: Vm) -> None:
    vm.hinder()
    vm.machine.write(ROOT_CERT, "no certificate\n", owner="istio-proxy")
    vm.restart()
    text = vm.writes(LOG, "failed to append certificates")
    vm.follow(vm.says("failed", "root_cert_invalid", evidence=text))


@failure
def the_root_certificate_may_not_be_read(vm: Vm) -> None:
    vm.hinder()
    vm.does(f"chown root {ROOT_CERT}; chmod 600 {ROOT_CERT}")
    vm.restart()
    text = vm.writes(LOG, "permission denied")
    vm.follow(vm.says("failed", "permission_denied", evidence=text))


@failure
def the_folder_of_the_certificates_may_not_be_written(vm: Vm) -> None:
    vm.hinder()
    vm.does("chown root /etc/certs; chmod 755 /etc/certs")
    vm.without_certificate()
    text = vm.writes(LOG, "permission denied")
    vm.follow(vm.says("failed", "permission_denied", evidence=text))


@failure
def istiod_shows_a_certificate_of_another_mesh(vm: Vm) -> None:
    _flawed(vm, "foreign", "certificate signed by unknown authority", "root_cert_mismatch")


@failure
def istiod_shows_a_certificate_for_another_name(vm: Vm) -> None:
    _flawed(vm, "wrong-name", "x509: certificate is valid for", "san_mismatch")


@failure
def istiod_shows_an_expired_certificate(vm: Vm) -> None:
    _flawed(vm, "expired", "has expired or is not yet valid", "cert_expired")


@failure
def istiod_shows_a_certificate_of_tomorrow(vm: Vm) -> None:
    """What a machine sees whose clock is behind: machines of the lab share the clock of their host."""
    _flawed(vm, "not-yet-valid", "is before", "clock_skew")


# --- the way to istiod --------------------------------------------------------------------


@failure
def istiod_refuses_connections_when_the_sidecar_starts(vm: Vm) -> None:
    vm.istiod.stop()
    vm.without_certificate()
    text = vm.writes(LOG, "connect: connection refused")
    condition = vm.says("failed", "istiod_unreachable", evidence=text)
    vm.istiod.start()
    vm.follow(condition)


@failure
def a_firewall_is_in_the_way_of_istiod(vm: Vm) -> None:
    """It answers as a firewall does that rejects: there is no route."""
    rule = f"INPUT -s {vm.machine.link.ipv4} -p tcp --dport {ISTIOD_PORT} -j REJECT --reject-with icmp-host-unreachable"
    vm.in_cluster(f"iptables -I {rule}")
    try:
        vm.without_certificate()
        text = vm.writes(LOG, "no route to host")
        condition = vm.says("failed", "istiod_unreachable", evidence=text)
    finally:
        vm.in_cluster(f"iptables -D {rule}")
    vm.follow(condition)


@failure
def istiod_resets_its_connections(vm: Vm) -> None:
    vm.istiod.behave(Behaviour(reset=True))
    vm.without_certificate()
    text = vm.writes(LOG, "connection reset by peer")
    condition = vm.says("failed", "istiod_unreachable", evidence=text)
    vm.istiod.behave(Behaviour())
    vm.follow(condition)


@failure
def istiods_port_speaks_plain_text(vm: Vm) -> None:
    """Another program has the port: a web server without TLS."""
    vm.istiod.stop()
    with PlainText(vm):
        vm.without_certificate()
        text = vm.writes(LOG, "first record does not look like a TLS handshake")
        condition = vm.says("failed", "istiod_unreachable", evidence=text)
    vm.istiod.start()
    vm.follow(condition)


@failure
def istiods_name_is_lost_while_the_sidecar_serves(vm: Vm) -> None:
    vm.settled(25)
    vm.hinder()
    vm.does(f"sed -i /{ISTIOD}/d {HOSTS}")
    vm.seen("no such name", lambda: vm.run(f"getent hosts {ISTIOD}").returncode == 2)
    condition = vm.says("degraded", "dns_unresolved")
    vm.follow(condition)


@failure
def istiods_name_does_not_resolve_when_the_sidecar_starts(vm: Vm) -> None:
    vm.hinder()
    vm.does(f"sed -i /{ISTIOD}/d {HOSTS}")
    vm.without_certificate()
    text = vm.writes(LOG, f"lookup {ISTIOD}")
    vm.follow(vm.says("failed", "dns_unresolved", evidence=text))


@failure
def a_foreign_line_leads_istiods_name_elsewhere(vm: Vm) -> None:
    """To an address that is nearer than istiod's: of several addresses the resolver prefers such a one."""
    vm.settled(25)
    vm.does(f"sed -i '1i 192.0.2.9 {ISTIOD}' {HOSTS}")
    vm.seen("another address", lambda: "192.0.2.9" in vm.run(f"getent hosts {ISTIOD}").stdout)
    condition = vm.says("degraded", "istiod_address_mismatch")
    found = vm.follow(condition)
    line = re.search(r"^(\d+):192\.0\.2\.9", "".join(found), re.MULTILINE)
    assert line, f"the remedy does not find the line: {condition['remedy']}"
    vm.does(f"sed -i {line[1]}d {HOSTS}")


# --- admission and configuration ---------------------------------------------------------


@failure
def istiod_knows_the_machine_by_another_identity(vm: Vm) -> None:
    vm.istiod.behave(Behaviour(refuse="permission-denied"))
    vm.restart()
    text = vm.writes(LOG, "code = PermissionDenied")
    condition = vm.says("failed", "identity_mismatch", evidence="authorization failed")
    assert text
    vm.istiod.behave(Behaviour())
    vm.follow(condition)


@failure
def there_is_no_workload_group_to_register_with(vm: Vm) -> None:
    vm.istiod.behave(Behaviour(workload_groups=[]))
    vm.mesh.publish(vm.cluster.bundle(address=vm.address, auto_register=True))
    vm.does("systemctl restart vmmesh-agent")
    text = vm.writes(LOG, "cannot find WorkloadGroup")
    condition = vm.says("failed", "autoregistration_failed", evidence=text)
    vm.istiod.behave(Behaviour())
    vm.follow(condition)


@failure
def the_machine_names_a_cluster_that_istiod_does_not_know(vm: Vm) -> None:
    """istiod's answer is that to any bad token."""
    vm.hinder()
    vm.does(f"sed -i s/^ISTIO_META_CLUSTER_ID=.*/ISTIO_META_CLUSTER_ID=elsewhere/ {CLUSTER_ENV}")
    vm.without_certificate()
    vm.writes(LOG, "request authenticate failure")
    vm.follow(vm.says("failed", "token_rejected", evidence=REFUSED))


@failure
def envoy_refuses_a_listener(vm: Vm) -> None:
    vm.istiod.behave(Behaviour(reject_config=True))
    vm.restart()
    text = vm.writes(ERR, "rejected: ")
    condition = vm.says("degraded", "config_rejected", evidence=text)
    vm.istiod.behave(Behaviour())
    vm.istiod.stop()  # a real one pushes what was corrected; this one tells it to who asks again
    vm.istiod.start()
    vm.follow(condition)


# --- ports --------------------------------------------------------------------------------


@failure
def another_program_has_envoys_admin_port(vm: Vm) -> None:
    _port_taken(vm, 15000, "failed", ERR)


@failure
def another_program_has_the_outbound_port(vm: Vm) -> None:
    _port_taken(vm, 15001, "failed", ERR)


@failure
def another_program_has_the_inbound_port(vm: Vm) -> None:
    _port_taken(vm, 15006, "failed", ERR)


@failure
def another_program_has_the_health_port(vm: Vm) -> None:
    _port_taken(vm, 15021, "failed", ERR)


@failure
def another_program_has_the_status_port(vm: Vm) -> None:
    """pilot-agent goes on without it."""
    _port_taken(vm, 15020, "degraded", LOG)


@failure
def another_program_has_the_port_of_the_dns_server(vm: Vm) -> None:
    _port_taken(vm, 15053, "failed", LOG)


# --- processes ------------------------------------------------------------------------------


@failure
def envoy_is_killed(vm: Vm) -> None:
    """pilot-agent takes it for want of memory, as the kernel does it in no other way; systemd starts it again."""
    vm.does(f"kill -KILL {vm.process('envoy')}")
    text = vm.writes(LOG, "signal: killed")
    condition = vm.says("failed", "out_of_memory")
    assert "killed" in condition["evidence"]
    assert text
    vm.follow(condition)


@failure
def envoy_runs_out_of_the_memory_it_is_given(vm: Vm) -> None:
    """By a memory cgroup of the host around Envoy alone: machines of the lab have no memory controller."""
    with vm.memory_limit(vm.process("envoy"), 2 * 1024**2):
        vm.run(f"python3 -c '{MANY_CONNECTIONS}'")
        text = vm.writes(LOG, "Envoy may have been out of memory killed")
        condition = vm.says("failed", "out_of_memory")
    assert "killed" in condition["evidence"]
    assert text
    vm.follow(condition)


@failure
def envoy_crashes(vm: Vm) -> None:
    vm.does(f"kill -SEGV {vm.process('envoy')}")
    vm.writes(LOG, "Envoy exited with error: signal: segmentation fault")
    vm.follow(vm.says("failed", "envoy_crashed"))


@failure
def envoy_hangs(vm: Vm) -> None:
    vm.settled(25)
    number = vm.process("envoy")
    vm.does(f"kill -STOP {number}")
    vm.seen("a stopped process", lambda: "T" in vm.does(f"ps -o state= -p {number}"))
    vm.follow(vm.says("failed", "envoy_silent"))


@failure
def envoy_is_not_there(vm: Vm) -> None:
    vm.does(f"mv {ENVOY} {ENVOY}.away")
    vm.restart()
    text = vm.writes(LOG, "no such file or directory")
    condition = vm.says("failed", "envoy_crashed", evidence=text)
    vm.does(f"mv {ENVOY}.away {ENVOY}")
    vm.follow(condition)


@failure
def envoy_wants_a_newer_c_library(vm: Vm) -> None:
    """The loader's words come from a script: an Envoy that does not fit this system is not to be had."""
    said = f"{ENVOY}: /lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.99' not found (required by {ENVOY})"
    vm.does(f"mv {ENVOY} {ENVOY}.away")
    vm.machine.write(ENVOY, f'#!/bin/sh\necho "{said.replace("`", chr(92) + "`")}" >&2\nexit 1\n', mode=0o755)
    vm.restart()
    text = vm.writes(ERR, "version `GLIBC_2.99' not found")
    condition = vm.says("failed", "glibc_mismatch", evidence=text)
    vm.does(f"mv {ENVOY}.away {ENVOY}")
    vm.follow(condition)


@failure
def pilot_agent_is_killed(vm: Vm) -> None:
    vm.does(f"kill -KILL {vm.process('pilot-agent')}")
    vm.writes(JOURNAL, "Main process exited")
    vm.follow(vm.says("failed", "agent_crashed"))


@failure
def the_sidecar_is_stopped(vm: Vm) -> None:
    vm.does("systemctl stop istio")
    vm.seen("a stopped unit", lambda: vm.run("systemctl is-active istio").stdout == "inactive\n")
    vm.follow(vm.says("stopped", "stopped"))


# --- the machine ------------------------------------------------------------------------------


@failure
def the_disk_of_the_logs_is_full(vm: Vm) -> None:
    vm.does("mount -t tmpfs -o size=64M tmpfs /var/log/istio && chown istio-proxy: /var/log/istio")
    vm.restart()
    vm.is_healthy()
    vm.settled(25)
    vm.run("dd if=/dev/zero of=/var/log/istio/old.log bs=1M count=100")
    vm.seen(
        "no space",
        lambda: re.search(r"\b0 100%", vm.does("df --output=avail,pcent -BM /var/log/istio").replace("M", "")),
    )
    condition = vm.says("degraded", "disk_full")
    found = "".join(vm.follow(condition))
    assert re.search(r"^64M\s+/var/log/istio/old\.log$", found, re.MULTILINE), found
    vm.does("rm /var/log/istio/old.log")
    vm.is_healthy()
    vm.does("systemctl stop istio; umount --lazy /var/log/istio; systemctl start istio")


@failure
def the_sidecar_starts_on_a_full_disk(vm: Vm) -> None:
    """Nothing can be logged, so there is no line to show; the machine itself shows it."""
    vm.does("mount -t tmpfs -o size=64M tmpfs /var/log/istio && chown istio-proxy: /var/log/istio")
    vm.run("dd if=/dev/zero of=/var/log/istio/old.log bs=1M count=100")
    vm.restart()
    vm.seen("no space", lambda: vm.run("systemctl is-active istio").returncode == 0)
    vm.mentions("disk_full")  # `starting` for the first minute
    vm.says("degraded", "disk_full")
    vm.does("rm /var/log/istio/old.log; systemctl stop istio; umount --lazy /var/log/istio; systemctl start istio")


@failure
def iptables_is_not_installed(vm: Vm) -> None:
    vm.does("mkdir /root/away; mv /usr/sbin/iptables* /usr/sbin/ip6tables* /root/away/")
    vm.restart()
    text = vm.writes(JOURNAL, "failed to execute iptables-save")
    condition = vm.says("failed", "iptables_failed", evidence=text)
    vm.does("mv /root/away/* /usr/sbin/; rmdir /root/away")
    vm.follow(condition)


@failure
def sudo_is_not_installed(vm: Vm) -> None:
    vm.does("mv /usr/bin/sudo /usr/bin/sudo.away")
    vm.restart()
    text = vm.writes(JOURNAL, "sudo: not found")
    condition = vm.says("failed", "sudo_missing", evidence=text)
    vm.does("mv /usr/bin/sudo.away /usr/bin/sudo")
    vm.follow(condition)


@failure
def the_user_of_the_sidecar_is_gone(vm: Vm) -> None:
    vm.does("systemctl stop istio; userdel istio-proxy")
    vm.run("systemctl start istio")
    vm.writes(JOURNAL, "invalid user")
    vm.follow(vm.says("failed", "user_missing", evidence="invalid user|unknown user"))


@failure
def the_sockets_cannot_be_made(vm: Vm) -> None:
    vm.hinder()
    vm.does("chown -R root /etc/istio/proxy/; chmod 755 /etc/istio/proxy/; rm -f /etc/istio/proxy/*")
    vm.restart()
    text = vm.writes(LOG, "permission denied")
    vm.follow(vm.says("failed", "permission_denied", evidence=text))


@failure
def the_mesh_file_is_broken(vm: Vm) -> None:
    vm.hinder()
    vm.machine.write(MESH_YAML, "defaultConfig: {broken\n", owner="istio-proxy")
    vm.restart()
    text = vm.writes(LOG, "failed to unmarshal mesh config")
    vm.follow(vm.says("failed", "bad_mesh_config", evidence=text))


@failure
def cluster_env_is_no_shell(vm: Vm) -> None:
    vm.hinder()
    vm.does(f'echo "FOO=\'open" >> {CLUSTER_ENV}')
    vm.restart()
    text = vm.writes(JOURNAL, "cluster.env: line")
    vm.follow(vm.says("failed", "bad_cluster_env", evidence=text))


@failure
def the_capture_is_flushed(vm: Vm) -> None:
    vm.settled(25)
    vm.does("iptables -t nat -F")
    vm.seen("no rules", lambda: "-j REDIRECT" not in vm.does("iptables -t nat -S"))
    vm.follow(vm.says("degraded", "iptables_failed"))


@failure
def the_capture_is_left_behind(vm: Vm) -> None:
    """The sidecar was killed, and what should clean up after it does not: systemd is told to do neither."""
    drop_in = "/run/systemd/system/istio.service.d/crash.conf"
    vm.machine.write(drop_in, "[Service]\nExecStopPost=\nRestart=no\n")
    vm.does("systemctl daemon-reload")
    vm.does(f"kill -KILL {vm.process('pilot-agent')}")
    vm.seen("a failed unit", lambda: vm.run("systemctl is-failed istio").returncode == 0)
    vm.does("iptables -t nat -S ISTIO_OUTPUT")
    vm.says("failed", "agent_crashed")
    condition = vm.mentions("capture_left_behind")
    vm.does(f"rm {drop_in}; systemctl daemon-reload")
    vm.follow(condition)


# --- joining ------------------------------------------------------------------------------------


@failure
def istiod_does_not_answer_a_machine_that_joins(vm: Vm) -> None:
    vm.machine.reset()
    vm.istiod.stop()
    vm.mesh.endpoint.invite(vm.machine)
    vm.does("systemctl start vmmesh-agent")
    text = vm.writes(LOG, "connect: connection refused")
    condition = vm.says("failed", "istiod_unreachable", evidence=text)
    vm.istiod.start()
    vm.follow(condition)


# --- the tests ----------------------------------------------------------------------------------


@pytest.mark.parametrize("made", FAILURES, ids=lambda made: made.__name__)
def test_status_names_the_failure_and_its_remedy_repairs_it(
    made: Scenario, outcomes: Mapping[str, Future[None]]
) -> None:
    outcomes[made.__name__].result()


# --- steps --------------------------------------------------------------------------------------


class PlainText(Service):
    """A web server without TLS in istiod's place."""

    def __init__(self, vm: Vm) -> None:
        super().__init__("plain-text", ready="Serving HTTP", network=vm.network, run=vm.run_of_lab)
        self._address = vm.address

    def argv(self) -> list[str]:
        """The command line, after `python`."""
        return ["-m", "http.server", "--bind", self._address, "--directory", str(self.folder), str(ISTIOD_PORT)]


def _refused(vm: Vm, token: str) -> dict[str, object]:
    """Put a token into place that istiod refuses, and start the sidecar with it."""
    vm.hinder()
    vm.machine.write(TOKEN, token, mode=0o600, owner="istio-proxy")
    vm.without_certificate()
    vm.writes(LOG, "request authenticate failure")
    return vm.says("failed", "token_rejected", evidence=REFUSED)


def _flawed(vm: Vm, certificate: str, text: str, cause: str) -> None:
    """Let istiod show a bad certificate to a sidecar that starts."""
    vm.istiod.behave(Behaviour(server_certificate=certificate))
    vm.without_certificate()
    vm.writes(LOG, text)
    condition = vm.says("failed", cause, evidence=text)
    vm.istiod.behave(Behaviour())
    vm.follow(condition)


def _port_taken(vm: Vm, port: int, state: str, log: str) -> None:
    """Let another program have the port when the sidecar starts; find it with what the remedy says, and end it."""
    vm.does("systemctl stop istio")
    with _squatter(vm, port):
        vm.run("systemctl start istio")
        text = vm.writes(log, "ddress already in use")
        condition = vm.says(state, "port_conflict", evidence=text)
        assert str(port) in condition["evidence"]
        found = re.search(rf":{port}\s.*pid=(\d+)", vm.does("ss -lntup"))
        assert found
        vm.does(f"kill {found[1]}")
        vm.follow(condition)


@contextmanager
def _squatter(vm: Vm, port: int) -> Iterator[None]:
    program = (
        "import socket, time\n"
        f"tcp = socket.create_server(('', {port}))\n"
        f"udp = socket.socket(type=socket.SOCK_DGRAM); udp.bind(('', {port}))\n"
        "time.sleep(600)\n"
    )
    process = vm.machine.spawn(["python3", "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        vm.seen(f"a listener at {port}", lambda: f":{port} " in vm.does("ss -lnt"))
        yield
    finally:
        process.kill()
        process.wait()
