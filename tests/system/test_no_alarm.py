"""What happens every day and is no failure: `status` says healthy all the while, asked each second.

Where the sidecar starts anew, it may say so (`starting`), and while somebody stops it on purpose, that it is going
down. Everything is done for real, but for lines of programs that are not to be had here, which are written into the
sidecar's logs in the form that they have.
"""

import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path

import pytest

from lab.network import Network
from lab.run import Run
from lab.services import ENDPOINT_PORT
from standins.istiod import Behaviour
from standins.packages import Packages
from system.faults import ERR, LOG, Scenario, Vm, played
from system.joining import TOKEN, bootstrap, configure, run_of_sidecar, status, unit
from system.skewed import Skewed

SIDECAR_ENV = "/var/lib/istio/envoy/sidecar.env"
STARTS = ("starting", "stopping", "stopped")

QUIET: list[Scenario] = []


def quiet(scenario: Scenario) -> Scenario:
    """Count the function among what is no failure."""
    QUIET.append(scenario)
    return scenario


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, packages: Packages, network: Network, run: Run, fixture_rpms: tuple[Path, ...]
) -> Iterator[dict[str, Future[None]]]:
    """What came of each: they are played side by side, on several machines."""
    with played(request, "happens", packages=packages, network=network, run=run, fixture_rpms=fixture_rpms) as outcomes:
        yield outcomes


@pytest.mark.parametrize("happens", QUIET, ids=lambda happens: happens.__name__)
def test_status_stays_healthy(happens: Scenario, outcomes: Mapping[str, Future[None]]) -> None:
    outcomes[happens.__name__].result()


# --- istiod -----------------------------------------------------------------------


@quiet
def the_certificate_is_renewed(vm: Vm) -> None:
    vm.istiod.behave(Behaviour(certificate_lifetime=16))
    with vm.undisturbed(*STARTS, rest=26):
        vm.without_certificate()
    assert vm.new_lines(LOG).count("generated new workload certificate") >= 3
    vm.istiod.behave(Behaviour())
    vm.without_certificate()


@quiet
def istiod_restarts(vm: Vm) -> None:
    with vm.undisturbed(rest=12):
        vm.istiod.stop()
        vm.istiod.start()


@quiet
def istiod_is_down_for_ten_seconds(vm: Vm) -> None:
    with vm.undisturbed(rest=25):
        vm.istiod.stop()
        time.sleep(10)
        vm.istiod.start()


@quiet
def istiod_ends_each_stream_after_some_time(vm: Vm) -> None:
    vm.istiod.behave(Behaviour(connection_age=4))
    vm.istiod.stop()
    vm.istiod.start()
    with vm.undisturbed(rest=20):
        pass
    assert vm.new_lines(LOG).count("connected to delta upstream XDS server") >= 2
    vm.istiod.behave(Behaviour())


@quiet
def the_cable_is_out_for_five_seconds(vm: Vm) -> None:
    with vm.undisturbed(rest=12):
        vm.machine.link.cut()
        time.sleep(5)
        vm.machine.link.restore()


# --- logs ---------------------------------------------------------------------------


@quiet
def logrotate_copies_and_truncates(vm: Vm) -> None:
    rule = "/var/log/istio/*.log {\n copytruncate\n rotate 2\n su istio-proxy istio-proxy\n}\n"
    vm.machine.write("/root/rotate", rule)
    with vm.undisturbed():
        for _ in range(2):
            vm.does("logrotate --force /root/rotate")
            time.sleep(3)
    assert vm.does(f"ls {LOG}.1 {ERR}.1")


@quiet
def the_logs_are_emptied(vm: Vm) -> None:
    with vm.undisturbed():
        vm.does(f": > {LOG}; : > {ERR}")


@quiet
def the_logs_are_renamed(vm: Vm) -> None:
    """Both processes go on writing to the renamed files; the daemon is asked to look at the silent place anew."""
    with vm.undisturbed(rest=4):
        vm.does(f"mv {LOG} {LOG}.old; mv {ERR} {ERR}.old")
    with vm.undisturbed():
        vm.does("systemctl restart vmmesh-agent")
    vm.restart()


@quiet
def the_access_log_is_full_of_bad_words(vm: Vm) -> None:
    with vm.undisturbed():
        for path in (
            *("/failed", "/error?code=503", "/panic:%20runtime%20error", "/connection%20refused"),
            *("/FLAG:%20--x", "/address%20already%20in%20use", "/x509:%20certificate%20has%20expired"),
        ):
            vm.appends(
                LOG,
                f'[{{now}}] "GET {path} HTTP/1.1" 503 UF,URX upstream_reset{{connection_refused}}'
                f' - "-" 0 91 4 - "10.0.0.9" "panic: failed (error) fatal" "b1f6" "shop.vm.svc:8080" "10.0.0.7:8080"'
                " outbound|8080||shop.vm.svc.cluster.local - 10.0.0.7:8080 10.0.0.9:4711 - default",
                f'[{{now}}] "- - -" 0 UF,URX - - "connect failed: Connection refused" 0 0 1 - "-" "-" "-" "-"'
                f' "192.0.2.77:5432" PassthroughCluster - 192.0.2.77:5432 192.0.2.12:{len(path)}234 - -',
                f'[{{now}}] "POST {path} HTTP/2" 403 - rbac_access_denied_matched_policy[none] - "-" 0 19 0 -'
                ' "-" "Envoy exited with error: signal: killed" "b1f6" "shop" "-" - - - - - -',
            )
            time.sleep(1)


@quiet
def the_access_log_is_json(vm: Vm) -> None:
    entry = (
        '{"start_time":"{now}","method":"GET","path":"/failed?error=panic","response_code":503,"response_flags":"UF",'
        '"response_code_details":"upstream_reset_before_response_started{connection_refused}",'
        '"upstream_transport_failure_reason":"TLS_error: CERTIFICATE_VERIFY_FAILED","user_agent":"fatal error: panic:",'
        '"upstream_cluster":"outbound|8080||shop.vm.svc.cluster.local","authority":"shop.vm.svc"}'
    )
    with vm.undisturbed():
        vm.appends(LOG, *[entry] * 20)


@quiet
def a_hundred_thousand_requests_are_logged(vm: Vm) -> None:
    line = '[{now}] "GET /failed HTTP/1.1" 503 UF - - "-" 0 91 4 - "-" "curl" "b1f6" "shop" "10.0.0.7:80" - - - - - -'
    with vm.undisturbed():
        for _ in range(10):
            vm.appends(LOG, *[line] * 10_000)
            time.sleep(0.3)


@quiet
def envoy_writes_the_warnings_that_it_always_writes(vm: Vm) -> None:
    with vm.undisturbed():
        vm.appends(
            ERR,
            "{now}\twarning\tenvoy main external/envoy/source/server/server.cc:843\tUsage of the deprecated runtime key"
            " overload.global_downstream_max_connections, consider switching to overload limits\tthread=71",
            "{now}\twarning\tenvoy main external/envoy/source/server/server.cc:936\tThere is no configured limit to the"
            " number of allowed active downstream connections.\tthread=71",
            "{now}\twarning\tenvoy config external/envoy/source/extensions/config_subscription/grpc/grpc_stream.h:191"
            "\tDeltaAggregatedResources gRPC config stream to xds-grpc closed: 13, \tthread=71",
            "{now}\twarning\tenvoy config external/envoy/source/extensions/config_subscription/grpc/grpc_stream.h:191"
            "\tDeltaAggregatedResources gRPC config stream to xds-grpc closed: 14, received prior goaway: NO_ERROR"
            "\tthread=71",
            "{now}\twarning\tenvoy jwt external/envoy/source/extensions/filters/http/jwt_authn/jwks_async_fetcher.cc:87"
            "\tJwks async fetching url=https://login/keys: failed\tthread=80",
            "{now}\twarning\tenvoy filter external/envoy/source/extensions/filters/network/rbac.cc:22\tmTLS PERMISSIVE"
            " mode is used, connection can be either plaintext or TLS\tthread=80",
        )


@quiet
def envoy_says_more_than_usual(vm: Vm) -> None:
    with vm.undisturbed(*STARTS, rest=12):
        vm.does(f"echo ISTIO_AGENT_FLAGS='\"--proxyLogLevel info\"' >> {SIDECAR_ENV}")
        vm.restart()
    assert "\tinfo\tenvoy" in vm.new_lines(ERR)
    vm.does(f"sed -i /^ISTIO_AGENT_FLAGS/d {SIDECAR_ENV}")
    vm.restart()


@quiet
def pilot_agent_logs_in_json(vm: Vm) -> None:
    with vm.undisturbed(*STARTS, rest=12):
        vm.does(f"echo ISTIO_AGENT_FLAGS=--log_as_json >> {SIDECAR_ENV}")
        vm.restart()
        vm.is_healthy()
    vm.does(f"sed -i /^ISTIO_AGENT_FLAGS/d {SIDECAR_ENV}")
    vm.restart()


@quiet
def pilot_agent_writes_errors_that_mean_nothing(vm: Vm) -> None:
    with vm.undisturbed():
        vm.appends(
            LOG,
            "{now}\terror\tcitadelclient\tFailed to load key pair open etc/certs/cert-chain.pem: no such file",
            "{now}\terror\tcitadelclient\trecreated connection",
            "{now}\twarn\tcitadelclient\tcannot load key pair, using token instead: open key.pem: no such file",
            "{now}\twarn\tcitadelclient\tcannot parse the cert chain, using token instead: x509: malformed certificate",
            '{now}\terror\tfailed scraping application metrics: error scraping http://localhost:8080/metrics: Get "http://'
            'localhost:8080/metrics": dial tcp 127.0.0.1:8080: connect: connection refused',
            "{now}\terror\tfailed scraping envoy metrics: error scraping http://localhost:15090/stats/prometheus: EOF",
            '{now}\terror\tRequest to probe app failed: Get "http://10.0.0.7:8080/healthz": dial tcp 10.0.0.7:8080:'
            " connect: connection refused, original URL path = /app-health/shop/readyz\napp URL path = /healthz",
        )


@quiet
def somebody_writes_rubbish_into_the_log(vm: Vm) -> None:
    rubbish = bytes(range(256)).decode("utf-8", "surrogateescape") * 40
    with vm.undisturbed():
        vm.appends(LOG, "", "", "\0" * 5000, rubbish, "\t\t\t", "{", "x" * 200_000, "\x1b[31merror\x1b[0m failed")
        vm.appends(ERR, "", rubbish, "\0" * 5000, "")


@quiet
def the_clock_steps_by_ten_seconds(vm: Vm) -> None:
    """The lab's machines share their host's clock, so the lines before and after the step are written as they look."""
    line = "\tinfo\txdsproxy\tconnected to delta upstream XDS server: istiod.istio-system.svc:15012\tid=9"
    with vm.undisturbed():
        for offset in (10, -10, 0):
            vm.appends(LOG, time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime(time.time() + offset)) + line)
            time.sleep(3)


# --- what an operator does -----------------------------------------------------------


@quiet
def somebody_restarts_the_sidecar(vm: Vm) -> None:
    with vm.undisturbed(*STARTS, rest=25):
        vm.does("systemctl restart istio")
    vm.is_healthy()


@quiet
def the_daemon_restarts(vm: Vm) -> None:
    with vm.undisturbed():
        before = run_of_sidecar(vm.machine)
        vm.does("systemctl restart vmmesh-agent")
    assert run_of_sidecar(vm.machine) == before


@quiet
def the_daemon_restarts_while_something_is_wrong(vm: Vm) -> None:
    """What is wrong stays as it is, since when it was wrong included."""
    vm.settled(25)
    vm.hinder()
    vm.does(f"mv {TOKEN} {TOKEN}.away")
    since = vm.says("degraded", "token_missing")["since"]
    vm.machine.run(["systemctl", "stop", "vmmesh-agent"])
    with vm.undisturbed("token_missing"):
        assert vm.mentions("token_missing")["since"] == since
    vm.unhinder()
    vm.does(f"mv {TOKEN}.away {TOKEN}; systemctl start vmmesh-agent")


@quiet
def the_daemon_is_told_to_hang_up(vm: Vm) -> None:
    with vm.undisturbed(rest=10):
        vm.does("systemctl kill --signal=HUP --kill-whom=main vmmesh-agent")
    assert unit(vm.machine, "vmmesh-agent.service")["ActiveState"] == "active"


@quiet
def the_daemon_is_stopped(vm: Vm) -> None:
    """Then `status` looks for itself."""
    with vm.undisturbed(rest=10):
        vm.does("systemctl kill --signal=TERM --kill-whom=main vmmesh-agent")
    assert unit(vm.machine, "vmmesh-agent.service")["Result"] == "success"
    vm.does("systemctl start vmmesh-agent")


@quiet
def the_daemon_is_killed(vm: Vm) -> None:
    with vm.undisturbed(rest=10):
        vm.does("systemctl kill --signal=KILL --kill-whom=main vmmesh-agent")
    assert unit(vm.machine, "vmmesh-agent.service")["ActiveState"] == "active"


@quiet
def the_endpoint_is_down(vm: Vm) -> None:
    """The agent's own trouble is said, and the sidecar is not blamed for it."""
    vm.mesh.endpoint.stop()
    vm.does("systemctl restart vmmesh-agent")
    vm.says("degraded", "endpoint_refuses_connections")
    with vm.undisturbed("endpoint_refuses_connections") as samples:
        pass
    assert {condition["code"] for sample in samples for condition in sample["conditions"]} == {
        "endpoint_refuses_connections"
    }
    vm.mesh.endpoint.start()
    vm.does("systemctl restart vmmesh-agent")


@quiet
def the_token_is_replaced(vm: Vm) -> None:
    with vm.undisturbed():
        vm.machine.write(TOKEN, vm.cluster.token(), mode=0o600, owner="istio-proxy")


@quiet
def somebody_joins_again_by_hand(vm: Vm) -> None:
    with vm.undisturbed(*STARTS):
        before = run_of_sidecar(vm.machine)
        done = bootstrap(vm.machine)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert run_of_sidecar(vm.machine) == before


@quiet
def systemd_reads_its_units_anew(vm: Vm) -> None:
    with vm.undisturbed():
        vm.does("systemctl daemon-reload; systemctl daemon-reexec; systemctl daemon-reload")


@quiet
def the_journal_restarts(vm: Vm) -> None:
    with vm.undisturbed():
        vm.does("systemctl restart systemd-journald; journalctl --rotate; journalctl --vacuum-size=1K")


@quiet
def the_sidecars_user_is_locked(vm: Vm) -> None:
    """sudo as root needs no password of the user that it becomes."""
    vm.does("usermod --lock --expiredate 1 istio-proxy")
    with vm.undisturbed(*STARTS, rest=12):
        vm.restart()
    vm.is_healthy()
    vm.does("usermod --unlock --expiredate '' istio-proxy || usermod --expiredate '' istio-proxy")


@quiet
def others_add_rules_to_iptables(vm: Vm) -> None:
    with vm.undisturbed():
        vm.does(
            "iptables -t nat -N DOCKER; iptables -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER;"
            "iptables -t nat -I OUTPUT 1 -d 198.51.100.0/24 -j RETURN; iptables -A INPUT -p tcp --dport 22 -j ACCEPT"
        )
    vm.does("iptables -t nat -D PREROUTING -m addrtype --dst-type LOCAL -j DOCKER; iptables -t nat -X DOCKER")


# --- the machine ----------------------------------------------------------------------


@quiet
def somebody_asks_whether_the_sidecar_is_ready(vm: Vm) -> None:
    """From the first moment of its start, as a load balancer does."""
    ask = "for n in $(seq 120); do curl -s -m 1 -o /dev/null 127.0.0.1:{15021,15020}/healthz/ready; sleep 0.2; done"
    with vm.undisturbed(*STARTS):
        asking = vm.machine.spawn(["bash", "-c", ask], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        vm.restart()
        asking.wait()
    assert "Envoy proxy is NOT ready" in vm.new_lines(LOG)


@quiet
def the_machine_is_busy(vm: Vm) -> None:
    with vm.undisturbed():
        vm.run("for n in 1 2 3; do timeout 10 bash -c 'while :; do :; done' & done; wait")


@quiet
def the_disk_is_slow(vm: Vm) -> None:
    """Somebody else writes and waits for the disk, over and over, where the logs are as well."""
    writes = "while :; do dd if=/dev/zero of=/var/log/storm bs=64k count=64 oflag=dsync status=none; sync; done"
    with vm.undisturbed():
        vm.run(f"timeout 10 bash -c '{writes}'")
    vm.does("rm /var/log/storm")


@quiet
def there_are_many_connections(vm: Vm) -> None:
    program = (
        "import socket, time\n"
        f"held = [socket.create_connection(({vm.address!r}, {ENDPOINT_PORT})) for _ in range(300)]\n"
        "held += [socket.create_connection(('127.0.0.1', 15021)) for _ in range(300)]\n"
        "time.sleep(6)\n"
    )
    with vm.undisturbed():
        vm.machine.run(["python3", "-c", program])


@quiet
def the_endpoints_clock_is_twenty_seconds_ahead(vm: Vm) -> None:
    with Skewed(vm.address, ENDPOINT_PORT, network=vm.network, run=vm.run_of_lab) as skewed, vm.undisturbed(rest=1):
        skewed.runs(20)
        document = vm.mesh.endpoint.configuration()
        endpoint = document["endpoint"] | {"url": skewed.url, "ca_pins": [skewed.pin]}
        configure(vm.machine, document | {"endpoint": endpoint})
        vm.does("systemctl restart vmmesh-agent")
        vm.seen("the clock's offset", lambda: round(status(vm.machine)["clock_offset_seconds"] or 0) in range(15, 26))
        time.sleep(6)
    vm.mesh.endpoint.invite(vm.machine)
    vm.does("systemctl restart vmmesh-agent")


@quiet
def the_time_of_status_is_in_utc_and_moves_on(vm: Vm) -> None:
    with vm.undisturbed(rest=25) as samples:
        pass
    moments = [sample["updated_at"] for sample in samples]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", moment) for moment in moments)
    assert moments == sorted(moments)
    assert len(set(moments)) > 1
