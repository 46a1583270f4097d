# ruff: noqa: E501 - a line of a log is one line
"""Whole stories of a sidecar, told in its own formats, and what an operator would say at the end of each."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from vmmesh_agent.diagnosis import Diagnosis
from vmmesh_agent.health import Health, Severity, State
from vmmesh_agent.records import Stream

MIDNIGHT = datetime(2025, 3, 4, tzinfo=UTC)
HOUR, DAY = 3600, 86400


# --- telling a story ----------------------------------------------------------
#
# A line of a story is `SECONDS LEVEL SCOPE MESSAGE` (scope `-` for the agent's default), or `SECONDS STEP [RELEASE]`
# with a step of STEPS, or `SECONDS traffic`.

STEPS = {
    "START": (
        'info - FLAG: --domain=""',
        'info - FLAG: --proxyLogLevel="warning"',
        "info - Version {release}.1-0f1e2d3c4b5a69788796a5b4c3d2e1f001234567-Clean",
        "info - Proxy role\tips=[10.1.2.3] type=sidecar id=db-1.shop domain=shop.svc.cluster.local",
        "info - Opening status port 15020",
        "info - Starting proxy agent",
        "info - Envoy command: [-c etc/istio/proxy/envoy-rev.json --drain-time-s 45 --parent-shutdown-time-s 60 -l warning "
        "--component-log-level misc:error]",
    ),
    "CERTIFICATE": ("info cache generated new workload certificate\tlatency=101.2ms ttl=23h59m59.2s",),
    "CONNECTED": ("info xdsproxy connected to upstream XDS server: istiod.istio-system.svc:15012",),
    "DELTA": ("info xdsproxy connected to delta upstream XDS server: istiod.istio-system.svc:15012\tid=7",),
    "WORKING": (
        "info ads ADS: new connection for node:db-1.shop-1",
        "info cache returned workload certificate from cache\tttl=23h59m58.1s",
        "info ads SDS: PUSH request for node:db-1.shop resources:1 size:4.0kB resource:default",
    ),
    "STOP": (
        "info - Status server has successfully terminated",
        "info - Agent draining Proxy for termination",
        "info - Graceful termination period is 5s, starting...",
        "warn - Aborting proxy",
        "info - Envoy aborted normally",
        "warn - Aborted proxy instance",
        "info - Agent has successfully terminated",
    ),
    "RETRIES": tuple(f"warn ca ca request failed, starting attempt {n} in {n}00.5ms" for n in (1, 2, 3, 4)),
}

TRAFFIC = (
    '[{time}] "GET /failed/fatal?error=panic HTTP/1.1" 503 UF upstream_reset_before_response_started{{connection_refused}} '
    '- "-" 0 91 1 - "-" "curl/8" "9c0f" "shop:80" "127.0.0.1:80" inbound|80|| - 10.1.2.3:80 10.1.9.9:4711 - default'
)


def stamp(seconds: float) -> str:
    return (MIDNIGHT + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def expand(story: str) -> list[tuple[float, str, str, str]]:
    """Return (seconds, level, scope, message) for each line; level `traffic` for the access log."""
    told: list[tuple[float, str, str, str]] = []
    for line in filter(None, map(str.strip, story.splitlines())):
        seconds, word, *rest = line.split(" ", 2)
        if word in STEPS:
            for offset, step in enumerate(STEPS[word]):
                level, scope, message = step.replace("{release}", rest[0] if rest else "1.24").split(" ", 2)
                told.append((float(seconds) + offset / 1000, level, scope, message))
        elif word == "traffic":
            told.append((float(seconds), "traffic", "", ""))
        else:
            scope, message = rest[0].split(" ", 1)
            told.append((float(seconds), word, scope, message))
    return told


def as_text(story: str, tab: str = "\t") -> str:
    lines = []
    for seconds, level, scope, message in expand(story):
        if level == "traffic":
            lines.append(TRAFFIC.format(time=stamp(seconds)[:-4] + "Z"))
        else:
            columns = [stamp(seconds), level, *([] if scope == "-" else [scope]), *message.split("\t")]
            lines.append(tab.join(columns))
    return "\n".join(lines) + "\n"


def as_columns(story: str) -> str:
    return as_text(story).expandtabs(8)


def as_single_blanks(story: str) -> str:
    return as_text(story, tab=" ")


def as_json(story: str) -> str:
    lines = []
    for seconds, level, scope, message in expand(story):
        if level == "traffic":
            lines.append(json.dumps({"authority": "shop", "start_time": stamp(seconds), "response_flags": "UF"}))
            continue
        text, *labels = message.split("\t")
        fields = {"level": level, "time": stamp(seconds)} | ({} if scope == "-" else {"scope": scope}) | {"msg": text}
        fields |= dict(label.split("=", 1) for part in labels for label in part.split(" ") if "=" in label)
        lines.append(json.dumps(fields))
    return "\n".join(lines) + "\n"


STYLES = {"tabs": as_text, "columns": as_columns, "blanks": as_single_blanks, "json": as_json}


def judge(text: str | bytes, stream: str = "log", now: float | None = None) -> Health:
    diagnosis = Diagnosis()
    diagnosis.feed(text if isinstance(text, bytes) else text.encode(), Stream(stream))
    diagnosis.end()
    return diagnosis.health(None if now is None else MIDNIGHT + timedelta(seconds=now))


def verdict(text: str | bytes, stream: str = "log", now: float | None = None) -> tuple[str, str]:
    health = judge(text, stream, now)
    return str(health.state), health.cause


# --- istio.log ----------------------------------------------------------------

RPC = "rpc error: code ="
WARM = "failed to warm certificate: failed to generate workload certificate: create certificate:"
DIAL = f'{RPC} Unavailable desc = connection error: desc = "transport: Error while dialing:'
HANDSHAKE = f'{RPC} Unavailable desc = connection error: desc = "transport: authentication handshake failed:'

HEALTHY, STARTING, STOPPED = ("healthy", "none"), ("starting", "none"), ("stopped", "stopped")


def failed(cause: str) -> tuple[str, str]:
    return "failed", cause


def degraded(cause: str) -> tuple[str, str]:
    return "degraded", cause


SERVING = "0 START\n1 CERTIFICATE\n1.1 CONNECTED\n1.2 WORKING\n"


def signing_fails(reason: str, release: str = "1.24") -> str:
    """A start whose certificate requests fail for one reason, round after round."""
    return "\n".join(
        [f"0 START {release}"]
        + [f"{at} RETRIES\n{at + 1.6} error cache resource:default failed to sign: create certificate: {reason}\n"
           f"{at + 1.7} warn sds {WARM} {reason}" for at in (1, 7, 20)]
    )  # fmt: skip


STORIES: dict[str, tuple[tuple[str, str], str]] = {
    # Nothing is wrong.
    "a run that serves": (HEALTHY, SERVING),
    "a run that serves, then only traffic": (HEALTHY, SERVING + "\n".join(f"{t} traffic" for t in range(60, 9000, 900))),
    "nothing but traffic": (HEALTHY, "1 traffic\n2 traffic"),
    "a certificate and a delta stream, no more": (HEALTHY, "0 START 1.29\n1 CERTIFICATE\n1.1 DELTA"),
    "a reconnect each half hour": (HEALTHY, SERVING + "1800 CONNECTED\n3570 CONNECTED"),
    "a rotation at half of the life": (HEALTHY, SERVING + "43200 CERTIFICATE"),
    "1.6 pushed its key": (
        HEALTHY,
        "0 START 1.6\n1 info cache GenerateSecret default\n1.1 info sds resource:default pushed key/cert pair to proxy",
    ),
    "1.8 with its two streams": (
        HEALTHY,
        "0 START 1.8\n1 info cache GenerateSecret default\n1.1 info sds resource:default pushed key/cert pair to proxy\n"
        "1.2 info xdsproxy connecting to upstream XDS server: istiod.istio-system.svc:15012\n"
        "1.3 info xdsproxy Envoy ADS stream established",
    ),
    "1.10 with a push by name": (HEALTHY, "0 START 1.10\n1 CERTIFICATE\n1.1 CONNECTED\n2 info sds SDS: PUSH\tresource=default"),
    "errors that are none": (
        HEALTHY,
        "0 START 1.18\n0.5 error citadelclient Failed to load key pair open etc/certs/cert-chain.pem: no such file or directory\n"
        "1 CERTIFICATE\n1.1 CONNECTED\n1.2 WORKING\n1800 error citadelclient recreated connection\n"
        "2000 error - failed scraping application metrics: error scraping http://localhost:9100/metrics: dial tcp "
        "127.0.0.1:9100: connect: connection refused\n"
        "2100 warn xdsproxy downstream terminated with unexpected error rpc error: code = Canceled desc = context canceled",
    ),
    "warnings that are none": (
        HEALTHY,
        "0 START 1.13\n0.5 warn citadelclient cannot parse the cert chain, using token instead: failed to read the cert, "
        "error is open etc/certs/cert-chain.pem: no such file or directory\n1 CERTIFICATE\n1.1 CONNECTED\n1.2 WORKING\n"
        "1.3 warn - Using deprecated JWT policy 'first-party-jwt'; treating as 'third-party-jwt'",
    ),
    "a token that was not needed: the old certificate served": (
        HEALTHY,
        "0 START 1.20\n0.4 warn - failed to fetch token from file: open ./var/run/secrets/tokens/istio-token: no such file "
        "or directory\n1 CERTIFICATE\n1.1 CONNECTED\n1.2 WORKING",
    ),
    "a token that is not needed at each reconnect": (
        HEALTHY,
        SERVING + "1800 warn - failed to fetch token from file: open ./var/run/secrets/tokens/istio-token: no such file or "
        "directory\n1800.1 CONNECTED",
    ),
    "an own certificate that had expired, and a token that worked": (
        HEALTHY, "0 START 1.20\n0.4 warn - cert expired, using token instead\n1 CERTIFICATE\n1.1 CONNECTED\n1.2 WORKING",
    ),
    "istiod goes away gently and comes back": (
        HEALTHY,
        SERVING + f"1700 warn xdsproxy upstream [1] terminated with unexpected error {RPC} Unavailable desc = closing transport "
        'due to: connection error: desc = "error reading from server: EOF", received prior goaway: code: NO_ERROR',
    ),
    "an application that was not up at first": (
        HEALTHY,
        SERVING + "3 info healthcheck failure threshold hit, marking as unhealthy: Get \"http://localhost:80/\": dial tcp "
        "127.0.0.6:0->127.0.0.1:80: connect: connection refused\n20 info healthcheck success threshold hit, marking as healthy",
    ),
    "an application that is not up in the first seconds": (
        HEALTHY, SERVING + "3 info healthcheck failure threshold hit, marking as unhealthy: exit status 7",
    ),
    "1.9 says connection terminated when Envoy leaves": (
        HEALTHY,
        "0 START 1.7\n1 info sds resource:default pushed key/cert pair to proxy\n2 info sds resource:default connection is "
        "terminated: rpc error: code = Canceled desc = context canceled\n2.1 error sds Remote side closed connection",
    ),
    # Recovered.
    "istiod came up late": (HEALTHY, signing_fails(DIAL + ' dial tcp 10.9.0.1:15012: connect: connection refused"')
                            + "\n40 CERTIFICATE\n40.2 CONNECTED\n40.3 WORKING"),
    "a refused token was replaced": (
        HEALTHY, signing_fails(f"{RPC} Unauthenticated desc = request authenticate failure")
        + f"\n21 CONNECTED\n21.01 warn xdsproxy upstream terminated with unexpected error {RPC} Unauthenticated desc = "
        "authentication failure\n60 CERTIFICATE\n61 DELTA\n75 traffic\n100 info cache Root cert has changed, start rotating",
    ),
    "a failing run, a restart, a good run": (
        HEALTHY, signing_fails(HANDSHAKE + ' x509: certificate signed by unknown authority"') + "\n100 START\n101 CERTIFICATE\n101.1 CONNECTED\n101.2 WORKING",
    ),
    "not ready for a while, then ready": (
        HEALTHY, "0 START\n1 CERTIFICATE\n1.1 CONNECTED\n90 warn - Envoy proxy is NOT ready: config not received from XDS "
        "server (is Istiod running?): cds updates: 0 successful, 0 rejected\n120 info - Envoy proxy is ready",
    ),
    # Starting.
    "flags only": (STARTING, "0 START 1.30"),
    "the CA does not answer at once": (STARTING, "0 START\n1 RETRIES"),
    "not ready in the first seconds": (
        STARTING, "0 START 1.11\n2 warn - Envoy proxy is NOT ready: config not received from Pilot (is Pilot running?): cds "
        "updates: 0 successful, 0 rejected; lds updates: 0 successful, 0 rejected",
    ),
    "connected a moment ago": (STARTING, "0 START\n1 CONNECTED"),
    "one crash and a new start": (
        STARTING, "0 START\n1 error - Envoy exited with error: signal: segmentation fault (core dumped)\n11 START",
    ),
    "stopped, then started": (STARTING, SERVING + "100 STOP\n120 START"),
    # Stopped and stopping.
    "a clean stop": (STOPPED, SERVING + "500 STOP"),
    "a clean stop of a run that failed": (STOPPED, signing_fails(f"{RPC} Unauthenticated desc = request authenticate failure") + "\n90 STOP"),
    "a clean stop of 1.9": (
        STOPPED,
        "0 START 1.9\n1 CERTIFICATE\n2 CONNECTED\n300 info - Agent draining Proxy\n300.1 info - Graceful termination period is "
        "5s, starting...\n305 warn - Aborting epoch 0\n305.1 info - Epoch 0 aborted normally\n305.2 warn - Aborted all epochs\n"
        "305.3 info - Agent has successfully terminated",
    ),
    "Envoy killed while stopping": (
        STOPPED, SERVING + "500 info - Agent draining Proxy for termination\n505 error - Envoy exited with error: signal: killed\n"
        "505.1 info - Agent has successfully terminated",
    ),
    "draining": (degraded("stopping"), SERVING + "500 info - Agent draining Proxy for termination\n501 traffic\n502 traffic"),
    "draining, as the probe sees it": (
        degraded("stopping"), "500 warn - Envoy proxy is NOT ready: server is not live, current state is: DRAINING\n501 traffic",
    ),
    # No token, a bad token, another identity.
    "no token after a reboot": (
        failed("token_missing"),
        "0 START 1.28\n0.5 warn - failed to fetch token from file: open ./var/run/secrets/tokens/istio-token: no such file or "
        f"directory\n1 error citadelclient failed to sign CSR: create certificate: {RPC} Unauthenticated desc = request "
        f"authenticate failure\n1.1 warn sds {WARM} {RPC} Unauthenticated desc = request authenticate failure",
    ),
    "no token in 1.8": (
        failed("token_missing"),
        '0 START 1.8\n1 error xdsproxy failed to read token file "./var/run/secrets/tokens/istio-token": open '
        "./var/run/secrets/tokens/istio-token: no such file or directory",
    ),
    "no token in 1.6": (
        failed("token_missing"), "0 START 1.6\n1 fatal - Missing JWT, can't authenticate with control plane. Try using plain text (15010)",
    ),
    "a token that only root may read": (
        failed("permission_denied"),
        "0 START 1.21\n0.5 warn - failed to fetch token from file: open ./var/run/secrets/tokens/istio-token: permission denied\n"
        f"1 warn sds {WARM} {RPC} Unauthenticated desc = request authenticate failure",
    ),
    "an expired token": (failed("token_rejected"), signing_fails(f"{RPC} Unauthenticated desc = request authenticate failure", "1.14")),
    "a refused stream, again and again": (
        failed("token_rejected"),
        "\n".join(f"{t} CONNECTED\n{t}.01 warn xdsproxy upstream [{t}] terminated with unexpected error {RPC} Unauthenticated "
                  "desc = authentication failure" for t in (10, 30, 60)) + "\n90 CONNECTED",
    ),
    "a refused token in 1.7": (
        failed("token_rejected"),
        "0 START 1.7\n2 error cache resource:default request:0a1b CSR hit non-retryable error (HTTP code: 0). Error: "
        f"{RPC} Unauthenticated desc = request authenticate failure",
    ),
    "a token refused at the rotation": (
        degraded("token_rejected"),
        SERVING + f"43200 RETRIES\n43202 warn sds {WARM} {RPC} Unauthenticated desc = request authenticate failure",
    ),
    "a token refused until the certificate ran out": (
        failed("token_rejected"),
        SERVING + "\n".join(f"{at} warn sds {WARM} {RPC} Unauthenticated desc = request authenticate failure"
                            for at in (43200, 60000, 86000, 90000)),
    ),
    "an own certificate that has expired, and a token that has too": (
        failed("token_rejected"),
        f"0 START 1.22\n0.4 warn - cert expired, using token instead\n1 warn sds {WARM} {RPC} Unauthenticated desc = request "
        "authenticate failure",
    ),
    "another service account": (
        failed("identity_mismatch"),
        "0 START 1.19\n1 CERTIFICATE\n1.1 CONNECTED\n1.2 warn xdsproxy upstream [1] terminated with unexpected error "
        f"{RPC} PermissionDenied desc = authorization failed: no identities ([spiffe://cluster.local/ns/a/sa/b]) matched c/d",
    ),
    "a service account that is gone, said aloud": (
        failed("service_account_missing"),
        signing_fails(f'{RPC} Unauthenticated desc = request authenticate failure: serviceaccounts "db" not found'),
    ),
    "a cluster that istiod does not know, said aloud": (
        failed("cluster_id_mismatch"),
        signing_fails(f"{RPC} Unauthenticated desc = request authenticate failure: could not get cluster edge's kube client"),
    ),
    "no WorkloadGroup": (
        failed("autoregistration_failed"),
        "\n".join(["0 START 1.30", "1 CERTIFICATE"] + [
            f"{t} DELTA\n{t}.01 warn xdsproxy upstream terminated with unexpected error {RPC} FailedPrecondition desc = "
            "auto-registration WorkloadEntry of db-1.shop failed: cannot find WorkloadGroup shop/db\tid=3" for t in (2, 8, 20, 45)]),
    ),
    "a WorkloadEntry of another account": (
        failed("autoregistration_failed"),
        "0 START 1.23\n1 CERTIFICATE\n2 DELTA\n2.01 warn xdsproxy upstream terminated with unexpected error "
        f"{RPC} PermissionDenied desc = auto-registration WorkloadEntry of db-1.shop failed: registration of WorkloadEntry "
        "service account mismatch",
    ),
    # The way to istiod.
    "a name without an address": (
        failed("dns_unresolved"), signing_fails(DIAL + ' dial tcp: lookup istiod.istio-system.svc on 127.0.0.53:53: server misbehaving"'),
    ),
    "a name server that is silent: not istiod": (
        failed("dns_unresolved"),
        signing_fails(DIAL + ' dial tcp: lookup istiod.istio-system.svc on 10.0.0.2:53: read udp 10.1.2.3:41000->10.0.0.2:53: i/o timeout"'),
    ),
    "a closed port": (failed("istiod_unreachable"), signing_fails(DIAL + ' dial tcp 10.9.0.1:15012: connect: connection refused"', "1.9")),
    "a silent firewall": (failed("istiod_unreachable"), signing_fails(DIAL + ' dial tcp 10.9.0.1:15012: i/o timeout"')),
    "no route": (failed("istiod_unreachable"), signing_fails(DIAL + ' dial tcp 10.9.0.1:15012: connect: no route to host"')),
    "the wrong kind of port": (failed("istiod_unreachable"), signing_fails(HANDSHAKE + ' tls: first record does not look like a TLS handshake"')),
    "the name first, then the port": (
        failed("istiod_unreachable"),
        signing_fails(DIAL + ' dial tcp: lookup istiod.istio-system.svc on 10.0.0.2:53: no such host"') + "\n"
        + "\n".join(f"{at} warn sds {WARM} {DIAL} dial tcp 10.9.0.1:15012: connect: connection refused\"" for at in (60, 90, 120)),
    ),
    "the token for long, then one refused dial": (
        failed("token_rejected"),
        signing_fails(f"{RPC} Unauthenticated desc = request authenticate failure")
        + f'\n60 warn sds {WARM} {DIAL} dial tcp 10.9.0.1:15012: connect: connection refused"',
    ),
    "a network that breaks later": (
        degraded("istiod_unreachable"),
        SERVING + f"3600 warn xdsproxy upstream terminated with unexpected error {RPC} Unavailable desc = keepalive ping failed "
        "to receive ACK within timeout\tid=1",
    ),
    "a network that breaks later, at the rotation": (
        degraded("istiod_unreachable"), SERVING + f'43200 RETRIES\n43210 warn sds {WARM} {DIAL} dial tcp 10.9.0.1:15012: i/o timeout"',
    ),
    "a CSR of 1.6 that is not answered": (
        failed("istiod_unreachable"),
        '1 warn cache resource:default request:0a1b CSR failed with error: rpc error: code = Unavailable desc = connection error: '
        'desc = "transport: Error while dialing dial tcp 10.9.0.1:15012: connect: connection refused", retry in 3200 millisec',
    ),
    # Trust.
    "another root": (failed("root_cert_mismatch"), signing_fails(
        HANDSHAKE + ' tls: failed to verify certificate: x509: certificate signed by unknown authority"', "1.22")),
    "another name": (failed("san_mismatch"), signing_fails(
        HANDSHAKE + ' x509: certificate is valid for istiod.istio-system.svc, not istiod.example.org"', "1.17")),
    "istiod's certificate is too old": (failed("cert_expired"), signing_fails(
        HANDSHAKE + ' x509: certificate has expired or is not yet valid: current time 2025-03-04T00:00:02Z is after 2025-03-03T00:00:00Z"')),
    "a clock that is behind": (failed("clock_skew"), signing_fails(
        HANDSHAKE + ' x509: certificate has expired or is not yet valid: current time 2025-03-04T00:00:02Z is before 2025-03-05T00:00:00Z"')),
    "no root certificate": (
        failed("root_cert_missing"),
        "0 START 1.26\n0.5 fatal - invalid config - istiod.istio-system.svc:15012 missing a root certificate ./etc/certs/root-cert.pem",
    ),
    "no root certificate in 1.15": (failed("root_cert_missing"), "0 START 1.15\n1 error - failed to start xds proxy: failed to find "
                                    "root CA cert for XDS: root CA file for XDS does not exist ./etc/certs/root-cert.pem"),
    "a root certificate that is none": (
        failed("root_cert_invalid"),
        "0 START 1.14\n1 error - failed to start xds proxy: failed to build TLS dial option to talk to upstream: failed to create TLS "
        "dial option with root certificates",
    ),
    # Files, ports, disk.
    "a mesh file that is none": (
        failed("bad_mesh_config"),
        '0 START 1.24\n0.2 error - failed to get proxy config: failed to unmarshal mesh config from file [defaultConfig: x]: '
        'error converting YAML to JSON: yaml: line 2: mapping values are not allowed in this context',
    ),
    "a label that is not JSON": (
        degraded("bad_cluster_env"),
        SERVING + "2 warn - Env variable ISTIO_METAJSON_LABELS [{app:db] failed json unmarshal: invalid character 'a'",
    ),
    "a socket that may not be made, though all else succeeds": (
        failed("permission_denied"),
        "0 START 1.12\n0.5 error sds SDS grpc server for workload proxies failed to set up UDS: failed to listen on unix socket "
        '"./etc/istio/proxy/SDS": listen unix ./etc/istio/proxy/SDS: bind: permission denied\n1 CERTIFICATE\n1.1 CONNECTED',
    ),
    "a bootstrap that may not be written": (
        failed("permission_denied"),
        "0 START 1.16\n0.5 error - failed to generate bootstrap config: open etc/istio/proxy/envoy-rev.json: permission denied",
    ),
    "a key that may not be written": (
        failed("permission_denied"),
        "0 START\n1 error cache error when output the resource: failed to write data to file key.pem: open etc/certs/key.pem: permission denied",
    ),
    "the DNS port is taken": (
        failed("port_conflict"),
        "0 START 1.13\n0.5 error dns Failed to listen on udp port 127.0.0.1:15053: listen udp 127.0.0.1:15053: bind: address already in "
        "use\n0.6 error - failed to start local DNS server: listen udp 127.0.0.1:15053: bind: address already in use",
    ),
    "the status port is taken": (
        degraded("port_conflict"),
        "0 START\n0.5 error - Error listening on status port: listen tcp :15020: bind: address already in use\n1 CERTIFICATE\n1.1 DELTA\n1.2 WORKING",
    ),
    "the disk is full at the start": (
        failed("disk_full"),
        "0 START\n1 error - failed to generate bootstrap config: write etc/istio/proxy/envoy-rev.json: no space left on device",
    ),
    "the disk is full at the rotation": (
        degraded("disk_full"), SERVING + "43200 error cache error when output the resource: failed to write data to file key.pem: "
        "write etc/certs/key.pem: no space left on device",
    ),
    # Processes.
    "Envoy dies of a signal": (failed("envoy_crashed"), SERVING + "900 error - Envoy exited with error: signal: aborted"),
    "Envoy dies in 1.12": (
        failed("envoy_crashed"),
        "0 START 1.12\n1 CERTIFICATE\n2 CONNECTED\n900 error - Epoch 0 exited with error: signal: illegal instruction\n"
        "900.1 info - No more active epochs, terminating",
    ),
    "Envoy dies and the agent says farewell": (
        failed("envoy_crashed"),
        SERVING + "900 error - Envoy exited with error: exit status 1\n900.1 info - Status server has successfully terminated\n"
        "900.2 info - Agent has successfully terminated",
    ),
    "Envoy dies in each run": (
        failed("envoy_crashed"), "\n".join(f"{t} START\n{t + 1} error - Envoy exited with error: exit status 1" for t in (0, 11, 22)) + "\n33 START",
    ),
    "memory runs out": (
        failed("out_of_memory"),
        SERVING + "900 warn - Envoy may have been out of memory killed. Check memory usage and limits.\n900.1 error - Envoy exited "
        "with error: signal: killed",
    ),
    # Readiness.
    "never ready": (
        failed("not_ready_no_config"),
        "0 START\n1 CERTIFICATE\n1.1 CONNECTED\n" + "\n".join(
            f"{t} warn - Envoy proxy is NOT ready: config not fully received from XDS server: cds updates: 1 successful, 0 rejected; "
            "lds updates: 0 successful, 0 rejected" for t in range(5, 125, 15)),
    ),
    "never ready, in JSON's or anyone's words": (
        failed("not_ready_no_config"), "0 START\n1 CERTIFICATE\n" + "\n".join(
            f"{t} warn - Envoy proxy is NOT ready: server is not live, current state is: PRE_INITIALIZING" for t in range(5, 125, 15)),
    ),
    "never ready, since istiod is not there": (
        failed("istiod_unreachable"),
        signing_fails(DIAL + ' dial tcp 10.9.0.1:15012: connect: connection refused"') + "\n90 warn - Envoy proxy is NOT ready: config "
        "not received from XDS server (is Istiod running?): cds updates: 0 successful, 0 rejected",
    ),
    "a start that goes nowhere, silently": (failed("not_ready_no_config"), "0 START\n1 CERTIFICATE\n300 info cache returned workload trust anchor from cache"),
    "a start that nobody tells of, but it serves traffic": (HEALTHY, "0 START\n1 CERTIFICATE\n300 traffic"),
    "no table of names": (
        degraded("dns_table_not_ready"),
        SERVING + "120 warn - Envoy proxy is NOT ready: istio DNS capture is turned ON and DNS lookup table is not ready yet",
    ),
    "all of it rejected": (
        failed("config_rejected"),
        "0 START\n1 CERTIFICATE\n1.1 DELTA\n" + "\n".join(
            f"{t} warn - Envoy proxy is NOT ready: config received from XDS server, but was rejected: cds updates: 0 successful, 1 "
            "rejected" for t in range(5, 125, 15)),
    ),
    "a stream that istiod ends for its own reason": (
        failed("xds_rejected"),
        "0 START\n1 CERTIFICATE\n1.1 DELTA\n1.2 warn xdsproxy upstream terminated with unexpected error "
        f"{RPC} InvalidArgument desc = missing node information\tid=1",
    ),
    # The application.
    "an application that goes down": (
        degraded("app_probe_failing"),
        SERVING + "7200 info healthcheck failure threshold hit, marking as unhealthy: command timeout exceeded: signal: killed",
    ),
    "an application that never came up": (
        degraded("app_probe_failing"),
        SERVING + "3 info healthcheck failure threshold hit, marking as unhealthy: Get \"http://localhost:80/\": context deadline "
        "exceeded\n1800 CONNECTED",
    ),
}  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", STORIES)
def test_a_story_in_istio_log_is_judged_as_an_operator_would(name: str, style: str) -> None:
    expected, story = STORIES[name]
    assert verdict(STYLES[style](story)) == expected


# --- one line alone: a failure that is the last word is a failure ----------------

LONE_LINES: dict[str, tuple[str, str]] = {
    f"1 warn sds {WARM} {RPC} Unauthenticated desc = request authenticate failure": failed("token_rejected"),
    f"1 error cache resource:default failed to sign: create certificate: {DIAL} dial tcp 10.9.0.1:15012: i/o timeout\"": failed("istiod_unreachable"),
    "1 warn - failed to fetch token from file: open ./var/run/secrets/tokens/istio-token: no such file or directory": failed("token_missing"),
    "1 error - Envoy exited with error: signal: killed": failed("out_of_memory"),
    "1 error - Epoch 0 exited with error: exit status 1": failed("envoy_crashed"),
    "1 warn - Envoy proxy is NOT ready: config not received from XDS server (is Istiod running?): cds updates: 0 successful, 0 rejected": failed("not_ready_no_config"),
    "1 info - Envoy proxy is NOT ready: config not received from Pilot (is Pilot running?): cds updates: 0 successful, 0 rejected": failed("not_ready_no_config"),
    "1 warn - Envoy proxy is NOT ready: server is not live, current state is: INITIALIZING": failed("not_ready_no_config"),
    "1 warn - Envoy proxy is NOT ready: failed to get readiness stats: Get \"http://127.0.0.1:15000/stats\": connection refused": failed("not_ready_no_config"),
    "1 error - failed to get proxy config: failed to read mesh config file ./etc/istio/config/mesh: no such file": failed("bad_mesh_config"),
    "1 fatal - invalid config - port 15012 missing a root certificate": failed("root_cert_missing"),
    "1 error - failed to start local DNS server: listen udp 127.0.0.1:15053: bind: address already in use": failed("port_conflict"),
    "1 info healthcheck failure threshold hit, marking as unhealthy: dial tcp 127.0.0.1:80: i/o timeout": degraded("app_probe_failing"),
    "1 info healthcheck success threshold hit, marking as healthy": HEALTHY,
    "1 info - Envoy proxy is ready": HEALTHY,
    "1 info - Agent has successfully terminated": STOPPED,
    "1 CONNECTED": HEALTHY,
    "1 CERTIFICATE": HEALTHY,
    f"1 warn xdsproxy upstream terminated with unexpected error {RPC} Unavailable desc = transport is closing": HEALTHY,
    f"1 warn xdsproxy upstream terminated with unexpected error {RPC} PermissionDenied desc = authorization failed: no identities ([spiffe://x]) matched a/b": failed("identity_mismatch"),
}  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("line", LONE_LINES)
def test_a_line_alone_is_judged_by_what_it_says(line: str, style: str) -> None:
    assert verdict(STYLES[style](line)) == LONE_LINES[line]


@pytest.mark.parametrize("line", LONE_LINES)
@pytest.mark.parametrize(
    "head", ["", "warn\t", "20XX-03-04T00:00:01.000000Z     warn    ", "xxxx-xx-xxTxx:xx:xx.xxxxxxZ\twarn\t"]
)
def test_a_line_whose_time_is_masked_or_gone_says_the_same(line: str, head: str) -> None:
    [(_, _, scope, message), *_] = expand(line)
    text = head + message if scope == "-" else f"{head}{scope}\t{message}" if head else message
    assert verdict(text) == LONE_LINES[line]


# --- istio.err.log --------------------------------------------------------------

STREAM_TO_ISTIOD = "DeltaAggregatedResources gRPC config stream to xds-grpc closed"
GENERATIONS = {
    "1.14": "{time}\twarning\tenvoy config\t{message}",
    "1.20": "{time}\twarning\tenvoy config external/envoy/source/common/config/grpc_stream.h:163\t{message}\tthread=31",
    "json": '{{"time":"{time}","level":"warning","scope":"envoy config","msg":{quoted},"caller":"grpc_stream.h:152","thread":"31"}}',
    "1.4": "[2025-03-04 00:00:01.417][160][warning][config] [bazel-out/k8-opt/bin/grpc_stream.h:86] {message}",
    "blanks": "warning envoy config external/envoy/source/common/config/grpc_stream.h:163 {message}",
}
ENVOY_LINES: dict[str, tuple[str, str]] = {
    f'{STREAM_TO_ISTIOD} since 42s ago: 14, connection error: desc = "transport: Error while dialing: dial tcp 10.9.0.1:15012: connect: no route to host"': failed("istiod_unreachable"),
    f'{STREAM_TO_ISTIOD} since 90s ago: 14, connection error: desc = "transport: Error while dialing: dial tcp: lookup istiod.istio-system.svc on 10.0.0.2:53: server misbehaving"': failed("dns_unresolved"),
    f'{STREAM_TO_ISTIOD} since 90s ago: 14, connection error: desc = "transport: authentication handshake failed: x509: certificate is valid for a, not b"': failed("san_mismatch"),
    f"{STREAM_TO_ISTIOD}: 16, authentication failure": failed("token_rejected"),
    f"{STREAM_TO_ISTIOD} since 600s ago: 16, authentication failure": failed("token_rejected"),
    f"{STREAM_TO_ISTIOD}: 7, authorization failed: no identities ([spiffe://x]) matched a/b": failed("identity_mismatch"),
    f"{STREAM_TO_ISTIOD}: 9, auto-registration WorkloadEntry of a.b failed: cannot find WorkloadGroup b/a": failed("autoregistration_failed"),
    f"{STREAM_TO_ISTIOD}: 3, invalid node": failed("xds_rejected"),
    f"{STREAM_TO_ISTIOD}: 0, ": HEALTHY,
    f"{STREAM_TO_ISTIOD}: 13, ": HEALTHY,
    f"{STREAM_TO_ISTIOD}: 14, transport is closing": HEALTHY,
    f'{STREAM_TO_ISTIOD}: 14, closing transport due to: connection error: desc = "error reading from server: EOF", received prior goaway: code: NO_ERROR': HEALTHY,
    f'StreamSecrets gRPC config stream to sds-grpc closed: 2, failed to generate secret for ROOTCA: failed to generate workload certificate: create certificate: {HANDSHAKE} x509: certificate has expired or is not yet valid: current time 2025-03-04T00:00:00Z is before 2025-03-05T00:00:00Z"': failed("clock_skew"),
    "gRPC config for type.googleapis.com/envoy.config.cluster.v3.Cluster rejected: Error adding/updating cluster(s) outbound|80||x: bad": degraded("config_rejected"),
    "delta config for type.googleapis.com/envoy.config.route.v3.RouteConfiguration rejected: no such cluster": degraded("config_rejected"),
    "gRPC config for type.googleapis.com/envoy.config.listener.v3.Listener rejected: Error adding/updating listener(s) virtualOutbound: cannot bind '0.0.0.0:15001': Address already in use": failed("port_conflict"),
    "gRPC config: initial fetch timed out for type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret": failed("sds_timeout"),
    "gRPC config: initial fetch timed out for type.googleapis.com/envoy.config.cluster.v3.Cluster": failed("not_ready_no_config"),
    "assert failure: SOCKET_VALID(result.return_value_). Details: socket(2) failed, got error: Too many open files": failed("fd_limit"),
    "Caught Segmentation fault, suspect faulting address 0x10": failed("envoy_crashed"),
    "there is no configured limit to the number of allowed active connections. Set a limit via the runtime key": HEALTHY,
    "mTLS PERMISSIVE mode is used, connection can be either plaintext or TLS": HEALTHY,
}  # fmt: skip


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("message", ENVOY_LINES)
def test_an_envoy_line_is_judged_alike_in_each_generation(message: str, generation: str) -> None:
    text = GENERATIONS[generation].format(time=stamp(1), message=message, quoted=json.dumps(message))
    assert verdict(text, "err") == ENVOY_LINES[message]


def envoy(seconds: float, message: str, level: str = "warning", component: str = "config") -> str:
    return f"{stamp(seconds)}\t{level}\tenvoy {component} source/common/x.cc:7\t{message}\tthread=31\n"


REFUSED = '14, connection error: desc = "transport: Error while dialing: dial tcp 10.9.0.1:15012: connect: connection refused"'

ERR_STORIES: dict[str, tuple[tuple[str, str], str]] = {
    "an outage after hours of work": (
        degraded("istiod_unreachable"),
        envoy(1800, f"{STREAM_TO_ISTIOD}: 13, ") + envoy(3600, f"{STREAM_TO_ISTIOD}: {REFUSED}")
        + envoy(3642, f"{STREAM_TO_ISTIOD} since 42s ago: {REFUSED}"),
    ),
    "an outage that is over, for Envoy repeats it while it lasts": (
        HEALTHY, envoy(3600, f"{STREAM_TO_ISTIOD}: {REFUSED}") + envoy(9000, "mTLS PERMISSIVE mode is used", component="filter"),
    ),
    "Envoy is quicker than the agent": (
        HEALTHY,
        envoy(1, "Unable to use runtime singleton for feature x", component="runtime")
        + envoy(1.1, f"{STREAM_TO_ISTIOD}: 14, no healthy upstream") + envoy(1.2, "Unable to establish new stream"),
    ),
    "Envoy crashes after it refused a listener": (
        failed("envoy_crashed"),
        envoy(1, "gRPC config for type.googleapis.com/envoy.config.listener.v3.Listener rejected: Error adding/updating listener(s) a: b")
        + envoy(2, "Caught Aborted, suspect faulting address 0x53900000042", "critical", "backtrace"),
    ),
    "Envoy crashed and came back": (
        HEALTHY,
        envoy(2, "Caught Segmentation fault, suspect faulting address 0x0", "critical", "backtrace")
        + envoy(14, "Usage of the deprecated runtime key overload.global_downstream_max_connections", component="main"),
    ),
    "the reason of a rejection on the lines below": (
        failed("port_conflict"),
        "2025-03-04T00:00:01.000000Z\twarning\tenvoy config\tgRPC config for type.googleapis.com/envoy.config.listener.v3.Listener "
        "rejected: Error adding/updating listener(s)\nvirtualInbound: cannot bind '0.0.0.0:15006': Address already in use\n\n\tthread=14\n",
    ),
    "an admin port that is taken": (
        failed("port_conflict"),
        envoy(1, "error initializing configuration 'etc/istio/proxy/envoy-rev.json': cannot bind '127.0.0.1:15000': Address already in use",
              "critical", "main") + "cannot bind '127.0.0.1:15000': Address already in use\n",
    ),
    "another listener's port": (
        degraded("port_conflict"),
        envoy(1, "gRPC config for type.googleapis.com/envoy.config.listener.v3.Listener rejected: Error adding/updating listener(s) "
              "127.0.0.1_9090: cannot bind '127.0.0.1:9090': Address already in use"),
    ),
    "a C library that is too old": (
        failed("glibc_mismatch"), "/usr/local/bin/envoy: /lib64/libc.so.6: version `GLIBC_2.28' not found (required by /usr/local/bin/envoy)\n" * 2,
    ),
    "a Go panic": (
        failed("agent_crashed"),
        envoy(1, f"{STREAM_TO_ISTIOD}: 13, ") + "panic: runtime error: invalid memory address or nil pointer dereference\n"
        "[signal SIGSEGV: segmentation violation code=0x1 addr=0x18 pc=0x2f]\n\ngoroutine 55 [running]:\nmain.f(0x1)\n\tmain.go:7 +0x1d\n",
    ),
    "Go without memory": (failed("out_of_memory"), "fatal error: runtime: out of memory\n\nruntime stack:\nruntime.throw(0x1)\n"),
    "tcmalloc gives up": (
        failed("envoy_crashed"),
        "7 external/com_github_google_tcmalloc/tcmalloc/arena.cc:56] CHECK in Alloc: FATAL ERROR: Out of memory trying to allocate "
        "internal tcmalloc data (bytes, object-size)\n",
    ),
    "an exception that nobody caught": (failed("envoy_crashed"), "terminate called after throwing an instance of 'std::bad_alloc'\n"),
    "log lines lost on a full disk": (
        degraded("disk_full"),
        "2025-03-04 00:10:44.118209312 +0000 UTC m=+903.402 log write error: write /dev/stdout: no space left on device\n",
    ),
    "a header dump of a user's words": (
        HEALTHY, f"{stamp(1)}\tdebug\tenvoy http source/x.cc:9\t[C1] request headers complete:\n':path', '/x509: Unauthenticated'\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERR_STORIES)
def test_a_story_in_istio_err_log_is_judged_as_an_operator_would(name: str) -> None:
    expected, text = ERR_STORIES[name]
    assert verdict(text, "err") == expected


# --- the journal ------------------------------------------------------------------

STARTED = "systemd[1]: Started istio-sidecar: The Istio sidecar."
EXITED = "systemd[1]: istio.service: Main process exited, code=exited, status={0}/FAILURE"
RESULT = "systemd[1]: istio.service: Failed with result 'exit-code'."
AGAIN = "systemd[1]: istio.service: Scheduled restart job, restart counter is at 3."
RESTORE = (
    "istio-start.sh[812]: 2025-03-04T00:00:02.1Z\tinfo\tRunning command: iptables-restore --noflush /tmp/rules.txt"
)

JOURNAL_STORIES: dict[str, tuple[tuple[str, str], tuple[str, ...]]] = {
    "a start": (HEALTHY, (STARTED, "istio-start.sh[812]: iptables: No chain/target/match by that name.", RESTORE)),
    "a start in another language": (HEALTHY, (STARTED, "istio-start.sh[812]: # Completed on Tue Mar  4 00:00:02 2025")),
    "iptables is not installed": (failed("iptables_failed"), (
        STARTED, 'istio-start.sh[812]: 2025-03-04T00:00:02.1Z\terror\tfailed to execute iptables-save: exec: "iptables-save": executable file not found in $PATH',
        EXITED.format(1), RESULT, AGAIN)),
    "a chain is left over": (failed("iptables_failed"), (
        STARTED, RESTORE, "istio-start.sh[812]: xtables other problem: line 5 failed: Chain already exists.", EXITED.format(1), RESULT)),
    "the kernel has no nat table": (failed("iptables_failed"), (
        STARTED, "istio-start.sh[812]: iptables-restore v1.8.4 (legacy): can't initialize iptables table `nat': Permission denied (you must be root)", RESULT)),
    "sudo is not installed": (failed("sudo_missing"), (
        STARTED, RESTORE, "istio-start.sh[812]: /usr/local/bin/istio-start.sh: line 119: exec: sudo: not found", EXITED.format(127), RESULT)),
    "sudo wants a terminal": (failed("sudo_missing"), (STARTED, "sudo[813]: sorry, you must have a tty to run sudo", EXITED.format(1))),
    "the user is gone": (failed("user_missing"), (STARTED, RESTORE, "istio-start.sh[812]: sudo: unknown user: istio-proxy", EXITED.format(1), RESULT)),
    "su does not know the user": (failed("user_missing"), (STARTED, "istio-start.sh[812]: su: user istio-proxy does not exist", EXITED.format(1))),
    "the log folder belongs to root": (failed("permission_denied"), (
        STARTED, RESTORE, "istio-start.sh[812]: /bin/bash: line 1: ./var/log/istio/istio.log: Permission denied", EXITED.format(1), RESULT, AGAIN)),
    "cluster.env is cut off": (failed("bad_cluster_env"), (
        STARTED, "istio-start.sh[812]: /var/lib/istio/envoy/cluster.env: line 9: unexpected EOF while looking for matching `''", EXITED.format(1), RESULT)),
    "the agent ends with 255": (failed("agent_crashed"), (STARTED, RESTORE, EXITED.format(255), RESULT, AGAIN)),
    "the kernel kills it": (failed("out_of_memory"), (
        STARTED, RESTORE, "systemd[1]: istio.service: A process of this unit has been killed by the OOM killer.",
        "systemd[1]: istio.service: Failed with result 'oom-kill'.")),
    "the disk is full": (degraded("disk_full"), (STARTED, RESTORE, "istio-start.sh[812]: tee: /tmp/x: No space left on device")),
    "stopped": (STOPPED, (STARTED, RESTORE, "systemd[1]: Stopping istio-sidecar: The Istio sidecar...",
                          "systemd[1]: istio.service: Succeeded.", "systemd[1]: Stopped istio-sidecar: The Istio sidecar.")),
    "stopped and started": (HEALTHY, (STARTED, RESTORE, "systemd[1]: Stopping istio-sidecar: The Istio sidecar...",
                                      "systemd[1]: Stopped istio-sidecar: The Istio sidecar.", STARTED, RESTORE)),
    "being stopped": (degraded("stopping"), (STARTED, RESTORE, "systemd[1]: Stopping istio-sidecar: The Istio sidecar...")),
    "a failed start, then a good one": (HEALTHY, (STARTED, "istio-start.sh[7]: iptables-restore: line 5 failed", EXITED.format(1), RESULT, AGAIN,
                                                  "systemd[1]: Stopped istio-sidecar: The Istio sidecar.", STARTED, RESTORE)),
    "failed again and again, just started": (failed("sudo_missing"), (
        *((STARTED, "istio-start.sh[812]: line 9: exec: sudo: not found", EXITED.format(127), RESULT, AGAIN) * 2), STARTED)),
}  # fmt: skip

JOURNAL_HEADS = {
    "short": "Mar 04 00:00:02 db-1 ",
    "chinese": "3月 04 00:00:02 db-1.localdomain ",
    "short-iso": "2025-03-04T00:00:02+0000 db-1 ",
    "short-precise": "Mar 04 00:00:02.123456 db-1 ",
    "none": "",
}


@pytest.mark.parametrize("head", JOURNAL_HEADS)
@pytest.mark.parametrize("name", JOURNAL_STORIES)
def test_a_story_in_the_journal_is_judged_as_an_operator_would(name: str, head: str) -> None:
    expected, lines = JOURNAL_STORIES[name]
    assert verdict("\n".join(JOURNAL_HEADS[head] + line for line in lines), "journal") == expected


# --- damage -----------------------------------------------------------------------


def wrapped(text: str, width: int) -> str:
    return "\n".join(line[at : at + width] for line in text.splitlines() for at in range(0, max(len(line), 1), width))


@pytest.mark.parametrize("width", [80, 100, 132])
def test_lines_that_a_terminal_wrapped_are_read_as_one(width: int) -> None:
    story = signing_fails(DIAL + ' dial tcp: lookup istiod.istio-system.svc on 10.0.0.2:53: no such host"')
    assert verdict(wrapped(as_columns(story), width)) == failed("dns_unresolved")
    assert verdict(wrapped(as_columns(SERVING), width)) == HEALTHY


def test_a_hole_of_nul_bytes_and_bytes_that_are_no_text_do_not_hide_a_line() -> None:
    text = b"\0" * 100_000 + as_text("1 error - Envoy exited with error: exit status 1").encode() + b"\xff\xfe\n"
    assert verdict(text) == failed("envoy_crashed")


def test_fragments_of_an_overwritten_access_log_say_nothing() -> None:
    fragment = 'cted: connection refused HTTP/1.1" 503 UF x509 - "-" 0 91 1 - "-" "curl/8"\n'
    assert verdict(as_text(SERVING) + fragment) == HEALTHY


def test_an_overwritten_line_of_the_access_log_after_a_hole_says_nothing() -> None:
    words = '[2025-03-04T00:00:01.000Z] "GET /x509:%20Unauthenticated%20upstream HTTP/1.1" 503 UF - "-"\n'
    assert verdict(as_text(SERVING).encode() + b"\0" * 100 + words.encode()) == HEALTHY


def test_a_prefix_before_the_time_is_passed_over() -> None:
    line = as_text("1 error - Envoy exited with error: exit status 1")
    assert verdict("[vm/db-1] istio-proxy " + line) == failed("envoy_crashed")


def test_a_line_of_megabytes_is_read_by_its_head() -> None:
    assert verdict(
        as_text("1 warn - Envoy proxy is NOT ready: config not received from XDS server " + "x" * 3_000_000)
    ) == failed("not_ready_no_config")


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_pieces_of_any_size_are_read_as_the_whole(size: int) -> None:
    text = as_text(
        signing_fails(HANDSHAKE + ' x509: certificate signed by unknown authority"') + "\n30 traffic"
    ).encode()
    diagnosis = Diagnosis()
    for at in range(0, len(text), size):
        diagnosis.feed(text[at : at + size], Stream.LOG)
    diagnosis.end()
    assert diagnosis.health(None).cause == "root_cert_mismatch"


@pytest.mark.parametrize(
    "line",
    [
        '{"msg":' + "[" * 9000,
        f"{STREAM_TO_ISTIOD} since 99999999999999999999s ago: 14, transport: dial tcp",
        "generated new workload certificate\tttl=99999999999999h",
        "0001-01-01T00:00:00.000000+05:00\twarn\tx",
    ],
)
@pytest.mark.parametrize("stream", Stream)
def test_an_absurd_line_does_not_end_the_reading(line: str, stream: Stream) -> None:
    diagnosis = Diagnosis()
    diagnosis.read(line, stream)
    diagnosis.read(as_text("1 error - Envoy exited with error: exit status 1"), stream)
    assert "envoy_crashed" in {condition.code for condition in diagnosis.health(None).conditions}


def test_nothing_read_is_nothing_known() -> None:
    assert judge(b"").state is State.UNKNOWN
    assert judge(b"\n\n").state is State.UNKNOWN


# --- over time: what the daemon sees ------------------------------------------------


def test_a_broken_stream_is_a_blip_first_and_a_condition_when_it_lasts() -> None:
    broke = (
        SERVING
        + f"3600 warn xdsproxy upstream terminated with unexpected error {RPC} Unavailable desc = keepalive ping failed"
    )
    assert verdict(as_text(broke), now=3605) == HEALTHY
    assert verdict(as_text(broke), now=3700) == degraded("istiod_unreachable")
    assert verdict(as_text(broke + "\n3610 CONNECTED"), now=3700) == HEALTHY


def test_the_journal_says_no_more_after_a_start_that_went_well() -> None:
    started = f"2025-03-04T00:00:02+0000 db-1 {STARTED}"
    assert verdict(started, "journal", now=10) == STARTING
    assert verdict(started, "journal", now=900) == HEALTHY


def test_silence_is_normal() -> None:
    assert verdict(as_text(SERVING), now=40 * 60) == HEALTHY


def test_a_start_may_take_a_minute() -> None:
    assert verdict(as_text("0 START"), now=30) == STARTING
    assert verdict(as_text("0 START"), now=90) == failed("not_ready_no_config")


def test_an_application_that_stays_down_after_the_start_is_reported() -> None:
    down = SERVING + "3 info healthcheck failure threshold hit, marking as unhealthy: exit status 7"
    assert verdict(as_text(down), now=20) == HEALTHY
    assert verdict(as_text(down), now=90) == degraded("app_probe_failing")


def test_admission_is_proven_by_a_stream_that_lives_on() -> None:
    refused = f"5.01 warn xdsproxy upstream [1] terminated with unexpected error {RPC} Unauthenticated desc = authentication failure"
    story = as_text(f"0 START\n1 CERTIFICATE\n5 CONNECTED\n{refused}\n20 CONNECTED")
    assert verdict(story, now=21) == failed("token_rejected")
    assert verdict(story, now=45) == HEALTHY


def test_the_streams_are_judged_together() -> None:
    diagnosis = Diagnosis()
    diagnosis.read(as_text(SERVING), Stream.LOG)
    diagnosis.read(envoy(3600, f"{STREAM_TO_ISTIOD} since 60s ago: {REFUSED}"), Stream.ERR)
    health = diagnosis.health(MIDNIGHT + timedelta(seconds=3610))
    assert (health.state, health.cause) == (State.DEGRADED, "istiod_unreachable")


def test_what_another_file_tells_of_an_older_run_is_not_of_this_one() -> None:
    diagnosis = Diagnosis()
    diagnosis.read(as_text("500 START\n501 CERTIFICATE\n502 CONNECTED\n503 WORKING"), Stream.LOG)
    diagnosis.read(envoy(100, f"{STREAM_TO_ISTIOD}: 16, authentication failure"), Stream.ERR)
    assert diagnosis.health(MIDNIGHT + timedelta(seconds=510)) == Health(State.HEALTHY)


def test_the_journal_of_a_start_read_after_its_log_does_not_reset_the_run() -> None:
    diagnosis = Diagnosis()
    diagnosis.read(as_text("10 START\n11 CERTIFICATE\n12 CONNECTED\n13 WORKING"), Stream.LOG)
    diagnosis.read(f"2025-03-04T00:00:09+0000 db-1 {STARTED}", Stream.JOURNAL)
    diagnosis.read("2025-03-04T00:00:09+0000 db-1 istio-start.sh[9]: iptables-restore --noflush /tmp/r", Stream.JOURNAL)
    assert diagnosis.health(MIDNIGHT + timedelta(seconds=20)) == Health(State.HEALTHY)


def test_the_start_script_does_not_speak_for_the_agent() -> None:
    diagnosis = Diagnosis()
    diagnosis.read(as_text("10 START"), Stream.LOG)
    diagnosis.read(
        "2025-03-04T00:00:11+0000 db-1 sudo[9]: session opened for user istio-proxy by (uid=0)", Stream.JOURNAL
    )
    assert diagnosis.health(MIDNIGHT + timedelta(seconds=12)).state is State.STARTING


def test_the_end_of_a_run_that_only_the_journal_tells() -> None:
    diagnosis = Diagnosis()
    diagnosis.read(as_text(SERVING), Stream.LOG)
    diagnosis.read(f"2025-03-04T01:00:00+0000 db-1 {EXITED.format(255)}", Stream.JOURNAL)
    assert diagnosis.health(MIDNIGHT + timedelta(seconds=3605)).cause == "agent_crashed"


def test_judging_twice_changes_nothing() -> None:
    diagnosis = Diagnosis()
    diagnosis.read(as_text(signing_fails(f"{RPC} Unauthenticated desc = request authenticate failure")), Stream.LOG)
    assert diagnosis.health(None) == diagnosis.health(None)


def test_an_unfinished_line_waits_for_its_rest() -> None:
    diagnosis = Diagnosis()
    text = as_text(SERVING + "900 error - Envoy exited with error: exit status 1").encode()
    diagnosis.feed(text[:-20], Stream.LOG)
    assert diagnosis.health(None).state is State.HEALTHY
    diagnosis.feed(text[-20:], Stream.LOG)
    assert diagnosis.health(None).cause == "envoy_crashed"


# --- what a condition says --------------------------------------------------------


def test_a_condition_names_its_first_moment_its_line_and_what_to_do() -> None:
    health = judge(as_text(signing_fails(f"{RPC} Unauthenticated desc = request authenticate failure", "1.14")))
    [condition] = health.conditions
    assert condition.code == "token_rejected"
    assert condition.severity is Severity.FAILED
    assert condition.since == MIDNIGHT + timedelta(seconds=2.6)
    assert "Unauthenticated" in condition.evidence
    assert "vmmesh-agent bootstrap" in condition.remedy


def test_a_stated_duration_dates_the_outage_back() -> None:
    [condition] = judge(envoy(100, f"{STREAM_TO_ISTIOD} since 42s ago: {REFUSED}"), "err").conditions
    assert condition.since == MIDNIGHT + timedelta(seconds=58)


def test_the_evidence_of_a_novel_is_its_beginning() -> None:
    [condition] = judge(envoy(1, "config for type.googleapis.com/x rejected: " + "x" * 9000), "err").conditions
    assert len(condition.evidence) == 1000


def test_a_consequence_is_hidden_and_an_independent_fault_is_not() -> None:
    story = signing_fails(DIAL + ' dial tcp 10.9.0.1:15012: i/o timeout"') + (
        "\n80 warn - Envoy proxy is NOT ready: config not received from XDS server (is Istiod running?)"
        "\n90 error - Error listening on status port: listen tcp :15020: bind: address already in use"
    )
    assert [condition.code for condition in judge(as_text(story)).conditions] == ["istiod_unreachable", "port_conflict"]
