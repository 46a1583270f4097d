# ruff: noqa: E501 - a line of a log is one line
"""Each row of the table against a line in the form in which the sidecar writes it."""

import re

import pytest

from vmmesh_agent.records import Reader, Record, Stream
from vmmesh_agent.rules import CAUSES, RULES, Aspect, Effect, operation, rule_for

# Stable: `status`, `explain` and docs/troubleshooting.md name them.
VOCABULARY = (
    "agent_crashed app_probe_failing autoregistration_failed bad_cluster_env bad_mesh_config cert_expired clock_skew "
    "cluster_id_mismatch config_rejected disk_full dns_table_not_ready dns_unresolved envoy_crashed fd_limit "
    "glibc_mismatch identity_mismatch iptables_failed istiod_unreachable not_ready_no_config out_of_memory "
    "permission_denied port_conflict root_cert_invalid root_cert_mismatch root_cert_missing san_mismatch sds_timeout "
    "service_account_missing stopped stopping sudo_missing token_missing token_rejected user_missing xds_rejected"
).split()

# The causes that say how a run ends are no failures: Diagnosis gives them.
ENDINGS = {"stopped", "stopping"}

SIGN = "failed to warm certificate: failed to generate workload certificate: create certificate: rpc error: code ="
UPSTREAM = "upstream [3] terminated with unexpected error rpc error: code ="
CLOSED = "StreamAggregatedResources gRPC config stream to xds-grpc closed:"

# name of the rule → lines that it decides, after the head; `err:` and `journal:` name another stream than istio.log.
SAMPLES: dict[str, tuple[str, ...]] = {
    "flag": ('FLAG: --domain=""',),
    "version": ("Version 1.24.2-0a1b2c3d-Clean", "Version 1.6.14-0a1b2c-Clean"),
    "unit-started": ("journal:Started istio-sidecar: The Istio sidecar.",),
    "envoy-command": ("Envoy command: [-c etc/istio/proxy/envoy-rev.json --drain-time-s 45 --component-log-level misc:error]",),
    "start-step": ("Starting proxy agent", "Opening status port 15020", "Proxy role\tips=[10.1.2.3] type=sidecar id=a.b"),
    "recreated": ("recreated connection",),
    "no-key-pair": (
        "Failed to load key pair open etc/certs/cert-chain.pem: no such file or directory",
        "cannot load key pair, using token instead: open etc/certs/key.pem: no such file or directory",
        "cannot parse the cert chain, using token instead: failed to read the cert, error is open x: no such file",
    ),
    "scrape": (
        "failed scraping envoy metrics: error scraping http://localhost:15090/stats/prometheus: connect: connection refused",
        "failed to scraping and writing application metrics: error scraping http://localhost:9/metrics: i/o timeout",
        "failed to write agent metrics: write tcp 127.0.0.1:15020: broken pipe",
    ),
    "app-http-probe": ("Request to probe app failed: Get http://localhost:80/: connect: connection refused, original URL path = /",),
    "remote-closed": ("Remote side closed connection",),
    "sds-cancelled": ("resource:default connection is terminated: rpc error: code = Canceled desc = context canceled",),
    "downstream": ("downstream [4] terminated with unexpected error rpc error: code = Canceled desc = context canceled",),
    "capacity-warning": (
        "err:there is no configured limit to the number of allowed active connections.",
        "err:Usage of the deprecated runtime key overload.global_downstream_max_connections",
        "err:Unable to use runtime singleton for feature envoy.reloadable_features.x",
    ),
    "deprecation": ("Using deprecated JWT policy 'first-party-jwt'; treating as 'third-party-jwt'", "err:mTLS PERMISSIVE mode is used"),
    "retrying-ca": ("ca request failed, starting attempt 2 in 203.5ms",),
    "certificate": (
        "generated new workload certificate\tresourceName=default latency=120ms ttl=23h59m59.8s",
        "GenerateSecret default", "GenerateSecret from file default", "read certificate from file",
    ),
    "secret-pushed": (
        "SDS: PUSH request for node:a.b resources:1 size:4.0kB resource:default", "SDS: PUSH\tresource=default",
        "resource:default pushed key/cert pair to proxy",
    ),
    "secret-cached": ("returned workload certificate from cache\tttl=23h59m59.1s",),
    "ready": ("Envoy proxy is ready", "Readiness succeeded in 1.2s", "Initialization took 1.2s"),
    "connected": (
        "connected to upstream XDS server: istiod.istio-system.svc:15012", "connected to upstream XDS server[2]: istiod:15012",
        "connected to delta upstream XDS server: istiod.istio-system.svc:15012\tid=4", "Envoy ADS stream established",
    ),
    "probe-passes": ("success threshold hit, marking as healthy",),
    "captured": (
        "journal:2025-03-04T00:00:02.1Z\tinfo\tRunning command: iptables-restore --noflush /tmp/rules.txt",
        "journal:# Completed on Tue Mar  4 00:00:02 2025", "journal:pam_unix(sudo:session): session opened for user istio-proxy by (uid=0)",
    ),
    "draining": (
        "Agent draining Proxy", "Graceful termination period is 5s, starting...", "Aborting proxy", "Aborting epoch 0",
        "Status server has successfully terminated", "handling /quitquitquit, notifying pilot-agent to exit",
        "Envoy proxy is NOT ready: server is not live, current state is: DRAINING",
        "Envoy proxy is NOT ready: server is terminated: received signal: terminated",
    ),
    "unit-stopping": ("journal:Stopping istio-sidecar: The Istio sidecar...",),
    "stopped": ("Agent has successfully terminated", "Envoy aborted normally", "Aborted proxy instance", "Aborted all epochs"),
    "unit-stopped": ("journal:Stopped istio-sidecar: The Istio sidecar.", "journal:istio.service: Deactivated successfully."),
    "probe-fails-envoy": ("failure threshold hit, marking as unhealthy: config not received from XDS server (is Istiod running?): cds",),
    "probe-fails": (
        'failure threshold hit, marking as unhealthy: Get "http://localhost:80/": dial tcp 127.0.0.1:80: connect: connection refused',
        "failure threshold hit, marking as unhealthy: command timeout exceeded: signal: killed",
        "failure threshold hit, marking as unhealthy: status code was not from [200,400), bad code 503",
    ),
    "log-disk-full": ("err:2025-03-04 00:10:44.11 +0000 UTC m=+9.4 log write error: write /dev/stdout: no space left on device",),
    "disk-full-start": ("failed to generate bootstrap config: write etc/istio/proxy/envoy-rev.json: no space left on device",),
    "disk-full": ("error when output the resource: failed to write data to file key.pem: write x: no space left on device",),
    "descriptors-fatal": ("err:assert failure: SOCKET_VALID(x). Details: socket(2) failed, got error: Too many open files",),
    "descriptors": ("failed to accept downstream gRPC connection accept4: too many open files",),
    "journal-permission": ("journal:/bin/bash: line 1: ./var/log/istio/istio.log: Permission denied",),
    "token-permission": ("failed to fetch token from file: open ./var/run/secrets/tokens/istio-token: permission denied",),
    "token-not-found": ("failed to fetch token from file: open ./var/run/secrets/tokens/istio-token: no such file or directory",),
    "token-missing": (
        "Failed to get credential token: open ./var/run/secrets/tokens/istio-token: no such file or directory",
        'failed to read token file "./var/run/secrets/tokens/istio-token": open x: no such file or directory',
        "Missing JWT, can't authenticate with control plane. Try using plain text (15010)",
    ),
    "status-port": ("Error listening on status port: listen tcp :15020: bind: address already in use",),
    "file-permission": (
        'failed to start xds proxy: failed to listen on unix socket "./etc/istio/proxy/XDS": bind: permission denied',
        "error when output the resource: failed to write data to file key.pem: open etc/certs/key.pem: permission denied",
        "failed to generate bootstrap config: open etc/istio/proxy/envoy-rev0.json: permission denied",
    ),
    "listener-port": (
        "err:gRPC config for type.googleapis.com/envoy.config.listener.v3.Listener rejected: Error adding/updating listener(s) "
        "0.0.0.0_8080: cannot bind '0.0.0.0:8080': Address already in use",
    ),
    "port": (
        "Failed to listen on udp port 127.0.0.1:15053: listen udp 127.0.0.1:15053: bind: address already in use",
        "err:listener 'virtualInbound' failed to bind or apply socket options: cannot bind '0.0.0.0:15006': Address already in use",
        "err:error initializing configuration 'x.json': cannot bind '127.0.0.1:15000': Address already in use",
    ),
    "socket": ("SDS grpc server for workload proxies failed to set up UDS: listen unix ./etc/istio/proxy/SDS: bind: invalid argument",),
    "no-user": ("journal:sudo: unknown user: istio-proxy", "journal:su: user istio-proxy does not exist"),
    "no-sudo": ("journal:/usr/local/bin/istio-start.sh: line 119: exec: sudo: not found", "journal:sudo: sorry, you must have a tty to run sudo"),
    "cluster-env": (
        "journal:/usr/local/bin/istio-start.sh: line 25: /var/lib/istio/envoy/cluster.env: line 3: syntax error near unexpected token `('",
    ),
    "env-refused": ("failed to generate bootstrap config: failed generating node metadata: ISTIO_METAJSON_LABELS: unexpected end",),
    "env-json": ("Env variable ISTIO_METAJSON_LABELS [{a] failed json unmarshal: invalid character 'a'",),
    "iptables-cleaning": (
        "journal:iptables: No chain/target/match by that name.",
        "journal:iptables: Bad rule (does a matching rule exist in that chain?).",
    ),
    "iptables": (
        'journal:2025-03-04T00:00:02Z\terror\tfailed to execute iptables-save: exec: "iptables-save": executable file not found in $PATH',
        "journal:iptables-restore: line 5 failed", "journal:xtables other problem: line 5 failed: Chain already exists.",
        "journal:Another app is currently holding the xtables lock.",
        "journal:2025-03-04T00:00:02Z\terror\tCommand error output: xtables parameter problem: invalid port/service `x' specified",
    ),
    "oom-unit": ("journal:istio.service: Failed with result 'oom-kill'.", "journal:Out of memory: Killed process 812 (envoy) total-vm:1kB"),
    "unit-ended": ("journal:istio.service: Main process exited, code=exited, status=255/EXCEPTION", "journal:istio.service: Failed with result 'exit-code'."),
    "no-root": (
        "invalid config - istiod.istio-system.svc:15012 missing a root certificate ./etc/certs/root-cert.pem",
        "failed to start xds proxy: root CA file for XDS does not exist ./etc/certs/root-cert.pem",
    ),
    "root-file-missing": (
        "failed to connect to upstream istiod:15012: failed to create TLS dial option with root certificates: open "
        "./etc/certs/root-cert.pem: no such file or directory",
    ),
    "bad-root": ("failed to start xds proxy: failed to build TLS dial option to talk to upstream: failed to append certificates",),
    "mesh-file": (
        "failed to get proxy config: failed to unmarshal mesh config from file [defaultConfig: x]: yaml: line 2",
        "failed to read mesh config file ./etc/istio/config/mesh: open x: no such file or directory",
    ),
    "go-memory": ("err:fatal error: runtime: out of memory",),
    "go-panic": (
        "err:panic: runtime error: index out of range [3] with length 2", "err:fatal error: all goroutines are asleep - deadlock!",
        "err:goroutine 12 [running]:",
    ),
    "glibc": (
        "err:/usr/local/bin/envoy: /lib64/libm.so.6: version `GLIBC_2.29' not found (required by /usr/local/bin/envoy)",
        "err:/usr/local/bin/envoy: error while loading shared libraries: libx.so: cannot open shared object file",
    ),
    "oom": ("Envoy may have been out of memory killed. Check memory usage and limits.",),
    "envoy-killed": ("Envoy exited with error: signal: killed", "Epoch 0 exited with error: signal: killed"),
    "envoy-exit": ("Envoy exited with error: exit status 1", "Epoch 0 exited with error: signal: aborted (core dumped)"),
    "envoy-backtrace": (
        "err:Caught Segmentation fault, suspect faulting address 0x0", "err:terminate called after throwing an instance of 'std::bad_alloc'",
        "err:14 external/tcmalloc/arena.cc:56] CHECK in Alloc: FATAL ERROR: Out of memory trying to allocate internal data",
        "err:error initializing configuration 'etc/istio/proxy/envoy-rev.json': Protobuf message has unknown fields",
    ),
    "not-ready-dns": ("Envoy proxy is NOT ready: istio DNS capture is turned ON and DNS lookup table is not ready yet",),
    "not-ready-rejected": ("Envoy proxy is NOT ready: config received from XDS server, but was rejected: cds updates: 0 successful, 1 rejected",),
    "not-ready": (
        "Envoy proxy is NOT ready: config not received from Pilot (is Pilot running?): cds updates: 0 successful, 0 rejected",
        "Envoy proxy is NOT ready: workers have not yet started",
        "timeout waiting for Envoy proxy to become ready. Last error: HTTP status code 503",
    ),
    "secret-timeout": ("err:gRPC config: initial fetch timed out for type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",),
    "fetch-timeout": ("err:gRPC config: initial fetch timed out for type.googleapis.com/envoy.config.listener.v3.Listener",),
    "nack": (
        "err:gRPC config for type.googleapis.com/envoy.config.cluster.v3.Cluster rejected: Error adding/updating cluster(s) a: b",
        "err:delta config for type.googleapis.com/envoy.config.listener.v3.Listener rejected: Error adding/updating listener(s) a: b",
    ),
    "dns": (
        f'{SIGN} Unavailable desc = connection error: desc = "transport: Error while dialing: dial tcp: lookup istiod.istio-system.svc '
        'on 10.0.0.2:53: read udp 10.1.2.3:4->10.0.0.2:53: i/o timeout"',
        f'err:{CLOSED} 14, connection error: desc = "transport: Error while dialing: dial tcp: lookup istiod on 10.0.0.2:53: no such host"',
    ),
    "clock": (f'{SIGN} Unavailable desc = "x509: certificate has expired or is not yet valid: current time 2025-01-01T00:00:00Z is before 2025-01-02T00:00:00Z"',),
    "expired": (f'{SIGN} Unavailable desc = "x509: certificate has expired or is not yet valid: current time 2025-01-03T00:00:00Z is after 2025-01-02T00:00:00Z"',),
    "unknown-authority": (f'{SIGN} Unavailable desc = "x509: certificate signed by unknown authority"',),
    "wrong-name": (f'{SIGN} Unavailable desc = "x509: certificate is valid for a, not b"', f'{UPSTREAM} Unavailable desc = "x509: cannot validate certificate for 10.9.0.1 because it doesn\'t contain any IP SANs"'),
    "other-tls": (f'{SIGN} Unavailable desc = "x509: certificate specifies an incompatible key usage"',),
    "service-account-gone": (f'{SIGN} Unauthenticated desc = serviceaccounts "db" not found',),
    "unknown-cluster": (f"{SIGN} Unauthenticated desc = could not get cluster edge's kube client",),
    "registration": (
        f"{UPSTREAM} FailedPrecondition desc = auto-registration WorkloadEntry of a.b failed: cannot find WorkloadGroup b/c",
        f'{UPSTREAM} Unknown desc = auto-registration WorkloadEntry of a.b failed: error creating WorkloadEntry: "c" is invalid: metadata.name',
        f"err:{CLOSED} 9, auto-registration WorkloadEntry of a.b failed: cannot find WorkloadGroup b/c",
    ),
    "identity": (f"{UPSTREAM} PermissionDenied desc = authorization failed: no identities ([spiffe://a]) matched b/c", f"err:{CLOSED} 7, authorization failed"),
    "refused-token": (
        f"{SIGN} Unauthenticated desc = request authenticate failure", f"{UPSTREAM} Unauthenticated desc = authentication failure",
        f"err:{CLOSED} 16, authentication failure", "resource:default request:0a CSR hit non-retryable error (HTTP code: 0). Error: x",
    ),
    "own-cert-expired": ("cert expired, using token instead",),
    "sds-everyday-close": ("err:StreamSecrets gRPC config stream to sds-grpc closed: 13, ",),
    "everyday-close": (
        f"err:{CLOSED} 0, ", f"err:{CLOSED} 13, ", f"err:{CLOSED} 14, transport is closing",
        f'{UPSTREAM} Unavailable desc = closing transport due to: connection error: desc = "error reading from server: EOF", received prior goaway: code: NO_ERROR',
        "disconnected from XDS server: istiod.istio-system.svc:15012",
    ),
    "sds-closed": ("err:StreamSecrets gRPC config stream to sds-grpc closed: 14, upstream connect error",),
    "not-yet-open": (f"err:{CLOSED} 14, no healthy upstream", f"err:{CLOSED} 14, upstream connect error or disconnect/reset before headers."),
    "dial": (
        f'{SIGN} Unavailable desc = connection error: desc = "transport: Error while dialing dial tcp 10.9.0.1:15012: i/o timeout"',
        f'{SIGN} Unavailable desc = connection error: desc = "error reading server preface: EOF"',
        f"{SIGN} DeadlineExceeded desc = context deadline exceeded",
        f'err:{CLOSED} 14, connection error: desc = "transport: Error while dialing: dial tcp 10.9.0.1:15012: connect: connection refused"',
    ),
    "stream-broke": (f"{UPSTREAM} Unavailable desc = keepalive ping failed to receive ACK within timeout", f"{UPSTREAM} Unavailable desc = read: connection timed out"),
    "stream-refused": (f"{UPSTREAM} InvalidArgument desc = missing node", f"err:{CLOSED} 3, missing node"),
    "upstream-down": ("failed to connect to upstream istiod.istio-system.svc:15012: no transport security set",),
    "unsigned": (f"{SIGN} Internal desc = CSR signing error",),
    "start-failed": ("failed to start workload secret manager x", "CA provider \"x\" not registered", "failed generating node metadata: x"),
}  # fmt: skip


def record(sample: str) -> Record:
    prefix, _, message = sample.partition(":")
    stream = Stream(prefix) if prefix in {"err", "journal"} else Stream.LOG
    text = message if stream is not Stream.LOG else sample
    reader = Reader(stream)
    [read] = [*reader.feed(f"{text}\n".encode()), *reader.end()]
    return read


@pytest.mark.parametrize(
    ("name", "sample"), [(name, sample) for name, samples in SAMPLES.items() for sample in samples]
)
def test_a_line_is_decided_by_its_rule(name: str, sample: str) -> None:
    rule = rule_for(record(sample))
    assert rule is not None
    assert rule.name == name


def test_each_rule_has_a_sample_and_a_name_of_its_own() -> None:
    names = [rule.name for rule in RULES]
    assert sorted(names) == sorted(SAMPLES)


def test_the_causes_are_the_vocabulary() -> None:
    assert sorted(CAUSES) == sorted(VOCABULARY)
    assert {rule.cause for rule in RULES if rule.cause} == set(VOCABULARY) - ENDINGS


def test_a_cause_hides_only_causes_that_there_are_and_never_itself() -> None:
    for slug, cause in CAUSES.items():
        assert cause.hides <= set(VOCABULARY)
        assert slug not in cause.hides


def test_no_two_causes_hide_each_other() -> None:
    assert not [(one, other) for one in CAUSES for other in CAUSES[one].hides if one in CAUSES[other].hides]


def test_a_cause_says_what_is_wrong_in_a_sentence_and_what_to_do() -> None:
    for cause in CAUSES.values():
        assert re.fullmatch(r"\w[^\n]*\.", cause.message)
        assert cause.remedy.endswith(".")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_row_is_whole(rule: object) -> None:
    [row] = [each for each in RULES if each is rule]
    assert row.meaning.endswith(".")
    assert bool(row.cause) == (row.effect in {Effect.FAILS, Effect.DISTURBS})
    assert bool(row.proves) == (row.effect is Effect.PROVES)
    assert all(row.anchors)
    for release in filter(None, (row.first, row.last)):
        assert re.fullmatch(r"1\.\d+", release)


# --- what looks like something and is nothing -------------------------------------

NOTHING = (
    'ads\tXDS: Incremental Pushing ConnectedEndpoints:2 Version:',
    "cache\tRoot cert has changed, start rotating root cert",
    "xdsproxy\tInitializing with upstream address \"istiod.istio-system.svc:15012\" and cluster \"Kubernetes\"",
    "xdsproxy\tconnecting to upstream XDS server: istiod.istio-system.svc:15012",
    "Using CA istiod.istio-system.svc:15012 cert with certs: ./etc/certs/root-cert.pem",
    "sds\tSDS server for workload certificates started, listening on \"etc/istio/proxy/SDS\"",
    "sds\tresource:default new connection",
    "ads\tADS: new connection for node:db-1.shop-1",
    "xdsproxy\tregistered overlapping stream; closing previous",
    "cache\tslow generate secret lock: 1.2s",
    "wasm\tcannot fetch Wasm module http://x/y.wasm: dial tcp 10.9.9.9:80: connect: connection refused",
    "resolve StatsdUdpAddress failed: lookup statsd on 10.0.0.2:53: no such host",
)  # fmt: skip


@pytest.mark.parametrize("line", NOTHING)
def test_an_everyday_line_means_nothing(line: str) -> None:
    assert rule_for(record(f"2025-03-04T00:00:01.000000Z\twarn\t{line}")) is None


def test_a_reason_is_about_the_operation_that_gave_it() -> None:
    assert operation(f"{SIGN} Unavailable") is Aspect.CERTIFICATE
    assert operation(f"{UPSTREAM} Unavailable") is Aspect.CONNECTION
    assert operation("error scraping http://localhost:80/metrics: connection refused") is None


def test_who_is_refused_has_been_heard() -> None:
    refused = record(f"{UPSTREAM} Unauthenticated desc = authentication failure")
    rule = rule_for(refused)
    assert rule is not None
    assert rule.aspect(refused) is Aspect.ADMISSION
