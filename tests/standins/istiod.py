"""A stand-in for istiod: the CA and the XDS server that a sidecar talks to.

    python -m standins.istiod --cluster DIR --listen 127.0.0.1:15012 [--behaviour FILE] [--journal FILE]

Real: TLS with a certificate of the mesh root, the checks of the token (signature, audience, expiry,
cluster ID), of the client certificate, of the CSR and of the identity, and the status codes and texts of
the refusals. A simplification: istiod speaks gRPC; this speaks JSON over HTTP, with the names of the gRPC
methods as paths, to the stand-in pilot-agent only.

    POST /istio.v1.auth.IstioCertificateService/CreateCertificate
        {"csr": PEM} -> {"cert_chain": [leaf PEM, root PEM]} or {"code": "Unauthenticated", "message": …}
    POST /envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources
        {"node": {"id": …, "metadata": {…}}} -> lines of JSON, as long as the stream lives:
        {} (a keepalive), {"clusters": […], "listeners": […], "names": {…}}, {"code": …, "message": …}

The behaviour file is JSON and read anew at each request; see `Behaviour`. The journal gets one JSON object
a line for each request: time, method, peer, node, identity, code.
"""

import argparse
import json
import signal
import socket
import ssl
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any, Self, cast

import jwt
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from lab.cluster import Authority, Cluster, now

CREATE_CERTIFICATE = "/istio.v1.auth.IstioCertificateService/CreateCertificate"
DISCOVERY = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
NAMES = ("istiod.istio-system.svc", "istiod.istio-system.svc.cluster.local")
KEEPALIVE = 5.0  # seconds between two keepalives on a discovery stream


@dataclass(frozen=True)
class Behaviour:
    """What this istiod does wrong, and how it configures proxies; a well-behaved one by default."""

    refuse: str = ""
    """`unauthenticated`, `permission-denied`, `no-workload-group` or `invalid-workload-entry`."""

    hang: bool = False
    """Accept requests and never answer them."""

    reset: bool = False
    """Reset each connection once a request comes in."""

    reject_config: bool = False
    """Send a listener that Envoy refuses."""

    server_certificate: str = ""
    """`expired`, `not-yet-valid`, `foreign` (another mesh's root) or `wrong-name`."""

    certificate_lifetime: float = 86400.0
    """Seconds that a workload certificate lives."""

    connection_age: float = 1800.0
    """Seconds after which a discovery stream is closed, as istiod does about each half hour."""

    service_accounts: Sequence[str] | None = None
    """The `namespace/name` that exist; None is all."""

    workload_groups: Sequence[str] | None = None
    """The `namespace/name` that exist; None is all."""

    access_log: bool = False
    """Whether proxies write access logs (mesh configuration, off in Istio's default profile)."""

    inbound_port: int = 15006
    outbound_port: int = 15001
    names: Mapping[str, list[str]] = field(default_factory=dict)
    """Addresses of the mesh's services, for the DNS server of the sidecar."""

    @classmethod
    def read(cls, file: Path | None) -> Self:
        """Read the behaviour of this moment; an unknown key is an error (TypeError)."""
        if file is None or not file.exists():
            return cls()
        document: dict[str, Any] = json.loads(file.read_text() or "{}")
        return cls(**document)

    def write(self, file: Path) -> None:
        """Write what differs from a well-behaved istiod, atomically, because it is read at any moment."""
        document = {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if getattr(self, each.name) != getattr(Behaviour(), each.name)
        }
        scratch = file.with_suffix(".new")
        scratch.write_text(json.dumps(document))
        scratch.replace(file)


class Refusal(Exception):  # noqa: N818 - a refusal is what gRPC calls a status, not a fault of this program
    """A gRPC status other than OK."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True)
class Caller:
    """Who sent a request: its token, its certificate's identity, and where it comes from."""

    cluster_id: str
    token: str
    certificate_identity: str


class Istiod(ThreadingTCPServer):
    """The server; `serve_forever` until `shutdown`. (HTTPServer would ask DNS for this machine's name.)"""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        cluster: Cluster,
        listen: tuple[str, int],
        *,
        behaviour_file: Path | None = None,
        journal_file: Path | None = None,
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in listen[0] else socket.AF_INET
        super().__init__(listen, _Handler)
        self.cluster = cluster
        self._behaviour_file = behaviour_file
        self._journal_file = journal_file
        self._journal_lock = threading.Lock()
        self._foreign = Cluster.create(trust_domain=cluster.trust_domain)
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._contexts_lock = threading.Lock()

    @property
    def behaviour(self) -> Behaviour:
        """How to behave now."""
        return Behaviour.read(self._behaviour_file)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Shake hands in the connection's own thread, so that a slow client blocks nobody."""
        behaviour = self.behaviour
        request.settimeout(20)
        try:
            connection = self._context(behaviour.server_certificate).wrap_socket(request, server_side=True)
        except OSError:  # the client did not like the certificate, or went away
            return
        if behaviour.reset:
            connection.recv(1)  # the proxy waits for an answer by now
            # Linger of zero makes close() send RST.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
            return
        try:
            super().finish_request(cast("Any", connection), client_address)
        except OSError:  # the client went away
            return
        finally:
            connection.close()

    def write_journal(self, **entry: object) -> None:
        """Add one line to the journal."""
        if self._journal_file is None:
            return
        line = json.dumps({"time": datetime.now(UTC).isoformat(), **entry}) + "\n"
        with self._journal_lock, self._journal_file.open("a") as journal:
            journal.write(line)

    def _context(self, flaw: str) -> ssl.SSLContext:
        with self._contexts_lock:
            if flaw not in self._contexts:
                self._contexts[flaw] = self._make_context(flaw)
            return self._contexts[flaw]

    def _make_context(self, flaw: str) -> ssl.SSLContext:
        authority: Authority = self._foreign.root if flaw == "foreign" else self.cluster.root
        names = ("istiod.elsewhere.svc",) if flaw == "wrong-name" else NAMES
        start = now() + timedelta(days=1) if flaw == "not-yet-valid" else now() - timedelta(hours=2)
        end = now() - timedelta(hours=1) if flaw == "expired" else now() + timedelta(days=2)
        certificate, key = self.cluster.server_certificate(names, not_before=start, not_after=end, ca=authority)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # A client certificate is verified if it is given, as istiod does.
        context.verify_mode = ssl.CERT_OPTIONAL
        context.load_verify_locations(cadata=self.cluster.root_pem.decode())
        with tempfile.TemporaryDirectory() as folder:
            pair = Path(folder, "pair.pem")
            pair.write_bytes(key + certificate)
            context.load_cert_chain(pair)
        return context


class _Handler(BaseHTTPRequestHandler):
    server: Istiod
    protocol_version = "HTTP/1.0"  # a response ends with its connection

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers.get("Content-Length", "0"))))
        behaviour = self.server.behaviour
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if behaviour.hang:
            self._keep_alive(behaviour)
        elif self.path == CREATE_CERTIFICATE:
            self._create_certificate(request, behaviour)
        elif self.path == DISCOVERY:
            self._discover(request["node"], behaviour)
        else:
            self._send({"code": "Unimplemented", "message": f"unknown method {self.path}"})

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Say nothing: the journal has it."""

    def _create_certificate(self, request: Mapping[str, str], behaviour: Behaviour) -> None:
        identity = ""
        try:
            identity = self._authenticate(behaviour, failure="request authenticate failure")
            csr = x509.load_pem_x509_csr(request["csr"].encode())
            _check_csr(csr)
        except Refusal as refusal:
            self._refuse("CreateCertificate", refusal, identity=identity)
            return
        except (ValueError, InvalidSignature):
            malformed = Refusal("InvalidArgument", "CSR signing error (failed to parse the CSR)")
            self._refuse("CreateCertificate", malformed, identity=identity)
            return
        _, namespace, service_account = _parts(identity)
        leaf = self.server.cluster.workload_certificate(
            cast("ec.EllipticCurvePublicKey | rsa.RSAPublicKey", csr.public_key()),
            namespace=namespace,
            service_account=service_account,
            not_after=now() + timedelta(seconds=behaviour.certificate_lifetime),
        )
        self._journal("CreateCertificate", "OK", identity=identity)
        self._send({"cert_chain": [leaf.decode(), self.server.cluster.root_pem.decode()]})

    def _discover(self, node: Mapping[str, Any], behaviour: Behaviour) -> None:
        identity = entry = ""
        try:
            identity = self._authenticate(behaviour, failure="authentication failure")
            _authorize(identity, node, behaviour)
            entry = _register(node, behaviour)
        except Refusal as refusal:
            self._refuse("StreamAggregatedResources", refusal, node=node["id"], identity=identity)
            return
        self._journal("StreamAggregatedResources", "OK", node=node["id"], identity=identity, entry=entry)
        self._send(
            {
                "clusters": list(_clusters()),
                "listeners": list(_listeners(behaviour, dual_stack="DUAL_STACK" in node["metadata"])),
                "names": dict(behaviour.names),
            }
        )
        self._keep_alive(behaviour)
        self._journal("StreamAggregatedResources", "closed", node=node["id"], entry=entry)

    def _authenticate(self, behaviour: Behaviour, *, failure: str) -> str:
        """Return the caller's identity, by certificate or by token, as istiod's authenticators do."""
        caller = self._caller()
        if behaviour.refuse == "unauthenticated" or caller.cluster_id != self.server.cluster.cluster_id:
            raise Refusal("Unauthenticated", failure)
        if caller.certificate_identity:
            return caller.certificate_identity
        try:
            claims = self.server.cluster.verify_token(caller.token)
        except jwt.InvalidTokenError as error:
            raise Refusal("Unauthenticated", failure) from error
        namespace, _, account = claims["sub"].removeprefix("system:serviceaccount:").partition(":")
        accounts = behaviour.service_accounts
        if accounts is not None and f"{namespace}/{account}" not in accounts:
            raise Refusal("Unauthenticated", failure)
        return f"spiffe://{self.server.cluster.trust_domain}/ns/{namespace}/sa/{account}"

    def _caller(self) -> Caller:
        # getpeercert() of a verified certificate; empty where the client gave none.
        certificate = cast("ssl.SSLSocket", self.connection).getpeercert() or {}
        names = cast("tuple[tuple[str, str], ...]", certificate.get("subjectAltName", ()))
        return Caller(
            cluster_id=self.headers.get("ClusterID", ""),
            token=self.headers.get("Authorization", "").removeprefix("Bearer "),
            certificate_identity=next((value for kind, value in names if kind == "URI"), ""),
        )

    def _refuse(self, method: str, refusal: Refusal, **more: str) -> None:
        self._journal(method, refusal.code, message=refusal.message, **more)
        self._send({"code": refusal.code, "message": refusal.message})

    def _journal(self, method: str, code: str, **more: str) -> None:
        self.server.write_journal(method=method, peer=self.client_address[0], code=code, **more)

    def _keep_alive(self, behaviour: Behaviour) -> None:
        end = time.monotonic() + behaviour.connection_age
        while (left := end - time.monotonic()) > 0:
            try:
                self._send({})
            except OSError:  # the proxy is gone
                return
            time.sleep(min(KEEPALIVE, left))

    def _send(self, message: Mapping[str, Any]) -> None:
        self.wfile.write(json.dumps(message).encode() + b"\n")
        self.wfile.flush()


def _check_csr(csr: x509.CertificateSigningRequest) -> None:
    if not csr.is_signature_valid:
        raise Refusal("InvalidArgument", "CSR signing error (CSR signature check failed)")


def _parts(identity: str) -> tuple[str, str, str]:
    """Split spiffe://<trust domain>/ns/<namespace>/sa/<service account>."""
    trust_domain, _, namespace, _, account = identity.removeprefix("spiffe://").split("/")
    return trust_domain, namespace, account


def _authorize(identity: str, node: Mapping[str, Any], behaviour: Behaviour) -> None:
    # Where from: pilot/pkg/xds/auth.go, authorize.
    metadata = node["metadata"]
    wanted = (metadata.get("NAMESPACE", ""), metadata.get("SERVICE_ACCOUNT", ""))
    if _parts(identity)[1:] != wanted or behaviour.refuse == "permission-denied":
        message = f"authorization failed: no identities ([{identity}]) matched {wanted[0]}/{wanted[1]}"
        raise Refusal("PermissionDenied", message)


def _register(node: Mapping[str, Any], behaviour: Behaviour) -> str:
    """Return the name of the WorkloadEntry that is made for the proxy; empty without auto-registration."""
    # Where from: pilot/pkg/autoregistration/controller.go.
    metadata = node["metadata"]
    group, namespace = metadata.get("AUTO_REGISTER_GROUP", ""), metadata.get("NAMESPACE", "")
    if not group:
        return ""
    _, address, name, _ = node["id"].split("~")
    failed = f"auto-registration WorkloadEntry of {name} failed: "
    groups = behaviour.workload_groups
    missing = groups is not None and f"{namespace}/{group}" not in groups
    if behaviour.refuse == "no-workload-group" or missing:
        message = failed + f"cannot find WorkloadGroup {namespace}/{group}"
        raise Refusal("FailedPrecondition", message)
    network = metadata.get("NETWORK", "")
    entry = "-".join(part for part in (group, address.replace(":", "-"), network) if part)
    if behaviour.refuse == "invalid-workload-entry":
        reason = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.'"
        message = (
            f'{failed}error creating WorkloadEntry: WorkloadEntry.networking.istio.io "{entry}" is invalid: '
            f'metadata.name: Invalid value: "{entry}": {reason}'
        )
        raise Refusal("FailedPrecondition", message)
    return entry


# --- what a proxy is configured with ----------------------------------------

_TYPES = "type.googleapis.com/envoy"


def _clusters() -> Iterator[dict[str, Any]]:
    common = {"type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "connect_timeout": "10s"}
    yield {"name": "PassthroughCluster", **common}
    # The source address tells traffic that came in through the sidecar from all else (iptables skips it).
    bind = {
        "source_address": {"address": "127.0.0.6", "port_value": 0},
        "extra_source_addresses": [{"address": {"address": "::6", "port_value": 0}}],
    }
    yield {"name": "InboundPassthroughCluster", **common, "upstream_bind_config": bind}
    yield {"name": "BlackHoleCluster", "type": "STATIC", "connect_timeout": "10s"}


def _listeners(behaviour: Behaviour, *, dual_stack: bool) -> Iterator[dict[str, Any]]:
    hosts = ("0.0.0.0", "::") if dual_stack else ("0.0.0.0",)
    yield _listener("virtualOutbound", hosts, behaviour.outbound_port, "PassthroughCluster", behaviour)
    mutual_tls = {
        "name": "virtualInbound-tls",
        "filter_chain_match": {
            "transport_protocol": "tls",
            "application_protocols": ["istio", "istio-peer-exchange", "istio-http/1.1", "istio-h2"],
        },
        "filters": [_tcp_proxy("InboundPassthroughCluster", behaviour)],
        "transport_socket": {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": f"{_TYPES}.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
                "require_client_certificate": True,
                "common_tls_context": {
                    "alpn_protocols": ["istio", "h2", "http/1.1"],
                    "tls_certificate_sds_secret_configs": [{"name": "default", "sds_config": SDS}],
                    "validation_context_sds_secret_config": {"name": "ROOTCA", "sds_config": SDS},
                },
            },
        },
    }
    port, cluster = behaviour.inbound_port, "InboundPassthroughCluster"
    yield _listener("virtualInbound", hosts, port, cluster, behaviour, chains=[mutual_tls])
    if behaviour.reject_config:
        yield {
            "name": "0.0.0.0_8443",
            "address": {"socket_address": {"address": "0.0.0.0", "port_value": 8443}},
        }


SDS = {
    "resource_api_version": "V3",
    "initial_fetch_timeout": "0s",
    "api_config_source": {
        "api_type": "REST",
        "transport_api_version": "V3",
        "cluster_names": ["sds-grpc"],
        "refresh_delay": "0.1s",
        "request_timeout": "86400s",
    },
}


def _listener(
    name: str,
    hosts: Sequence[str],
    port: int,
    cluster: str,
    behaviour: Behaviour,
    *,
    chains: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    addresses = [{"socket_address": {"address": host, "port_value": port}} for host in hosts]
    # A connection to the listener's own port would be proxied to itself without end.
    own_port = {
        "name": f"{name}-blackhole",
        "filter_chain_match": {"destination_port": port},
        "filters": [_tcp_proxy("BlackHoleCluster", behaviour)],
    }
    inspector = {
        "name": "envoy.filters.listener.tls_inspector",
        "typed_config": {"@type": f"{_TYPES}.extensions.filters.listener.tls_inspector.v3.TlsInspector"},
    }
    original = {
        "name": "envoy.filters.listener.original_dst",
        "typed_config": {"@type": f"{_TYPES}.extensions.filters.listener.original_dst.v3.OriginalDst"},
    }
    return {
        "name": name,
        "address": addresses[0],
        "additional_addresses": [{"address": address} for address in addresses[1:]],
        "listener_filters": [original, inspector] if chains else [original],
        "listener_filters_timeout": "0s",
        "continue_on_listener_filters_timeout": True,
        "filter_chains": [own_port, *chains],
        "default_filter_chain": {"filters": [_tcp_proxy(cluster, behaviour)]},
    }


def _tcp_proxy(cluster: str, behaviour: Behaviour) -> dict[str, Any]:
    line = (
        '[%START_TIME%] "- - -" 0 %RESPONSE_FLAGS% - - "-" %BYTES_RECEIVED% %BYTES_SENT% %DURATION% - "-" "-" '
        '"-" "-" "%UPSTREAM_HOST%" %UPSTREAM_CLUSTER% %UPSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS% '
        "%DOWNSTREAM_REMOTE_ADDRESS% - -\n"
    )
    log = {
        "name": "envoy.access_loggers.file",
        "typed_config": {
            "@type": f"{_TYPES}.extensions.access_loggers.file.v3.FileAccessLog",
            "path": "/dev/stdout",
            "log_format": {"text_format_source": {"inline_string": line}},
        },
    }
    return {
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": {
            "@type": f"{_TYPES}.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": cluster,
            "cluster": cluster,
            "access_log": [log] if behaviour.access_log else [],
        },
    }


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="standins.istiod", description="a stand-in for istiod")
    parser.add_argument("--cluster", type=Path, required=True, help="a folder that Cluster.save wrote")
    parser.add_argument("--listen", required=True, help="address:port; port 0 takes a free one")
    parser.add_argument("--behaviour", type=Path)
    parser.add_argument("--journal", type=Path)
    options = parser.parse_args(arguments)
    host, _, port = options.listen.rpartition(":")
    server = Istiod(
        Cluster.load(options.cluster),
        (host.strip("[]"), int(port)),
        behaviour_file=options.behaviour,
        journal_file=options.journal,
    )
    # shutdown() waits for serve_forever to end, so it cannot be called by the thread that is in it.
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    sys.stdout.write(f"listening on {host}:{server.server_address[1]}\n")
    sys.stdout.flush()
    server.serve_forever(poll_interval=0.1)
    server.server_close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
