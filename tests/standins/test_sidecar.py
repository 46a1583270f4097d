"""The stand-ins against each other: pilot-agent, with the real Envoy, and istiod on the loopback."""

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from lab.cluster import Cluster, Files, Release, now, private_pem
from standins import packages
from standins.istiod import Behaviour


def free_ports(names: Sequence[str]) -> dict[str, int]:
    """Choose a port for each name, below the range from which the kernel takes those of outgoing connections."""
    found: dict[str, int] = {}
    while len(found) < len(names):
        port = 20000 + secrets.randbelow(12768)
        with socket.socket() as stream, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram:
            try:
                stream.bind(("", port))
                datagram.bind(("", port))
            except OSError:
                continue
        if port not in found.values():
            found[names[len(found)]] = port
    return found


def wait_until(holds: Callable[[], bool], what: str, *, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)


@dataclass
class ControlPlane:
    """A running istiod."""

    folder: Path
    cluster: Cluster
    port: int
    process: "subprocess.Popen[str]"

    def behave(self, behaviour: Behaviour) -> None:
        behaviour.write(self.folder / "behaviour.json")

    def journal(self) -> list[dict[str, str]]:
        file = self.folder / "journal"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@dataclass
class Machine:
    """A folder that is the root of a machine as far as pilot-agent can see, with ports of its own."""

    root: Path
    control_plane: ControlPlane
    behaves_as: Release = "newest"
    ports: dict[str, int] = field(
        default_factory=lambda: free_ports(["admin", "status", "health", "metrics", "dns", "inbound", "outbound"])
    )
    process: "subprocess.Popen[bytes] | None" = None
    more: dict[str, str] = field(default_factory=dict)

    def place(self, files: Files) -> None:
        places = {
            "root-cert.pem": "etc/certs/root-cert.pem",
            "istio-token": "var/run/secrets/tokens/istio-token",
            "cluster.env": "var/lib/istio/envoy/cluster.env",
            "mesh.yaml": "etc/istio/config/mesh",
            "hosts": "etc/hosts",
        }
        for name, content in files.items():
            file = self.root / places[name]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        settings = {
            "discoveryAddress": f"istiod.istio-system.svc:{self.control_plane.port}",
            "proxyAdminPort": str(self.ports["admin"]),
            "statusPort": str(self.ports["status"]),
            "terminationDrainDuration": "1s",
        }
        mesh = self.root / places["mesh.yaml"]
        kept = [line for line in mesh.read_text().splitlines() if "discoveryAddress" not in line]
        mesh.write_text("\n".join([*kept, *(f"  {key}: {value}" for key, value in settings.items()), ""]))

    def start(self, *flags: str) -> None:
        program = self.root / "usr/local/bin/pilot-agent"
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(packages.pilot_agent(behaves_as=self.behaves_as))
        (self.root / "etc/istio/proxy").mkdir(parents=True, exist_ok=True)
        environment = {
            "PATH": os.environ["PATH"],
            "ISTIO_BIN_BASE": str(packages.envoy().parent),
            "INSTANCE_IP": "192.0.2.10",
            "POD_NAME": "vm-1",
            "POD_NAMESPACE": "vm",
            "PROV_CERT": "./etc/certs",
            "OUTPUT_CERTS": "./etc/certs",
            "DNS_PROXY_ADDR": f"127.0.0.1:{self.ports['dns']}",
            "ENVOY_STATUS_PORT": str(self.ports["health"]),
            "ENVOY_PROMETHEUS_PORT": str(self.ports["metrics"]),
            "ISTIO_META_DNS_CAPTURE": "true",
            "ISTIO_META_CLUSTER_ID": "Kubernetes",
            "SERVICE_ACCOUNT": "vm",
            **self.more,
        }
        with (self.root / "istio.log").open("ab") as out, (self.root / "istio.err.log").open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, program, "proxy", *flags],
                cwd=self.root,
                env=environment,
                stdout=out,
                stderr=errors,
                start_new_session=True,
            )

    def log(self, name: str = "istio.log") -> str:
        return (self.root / name).read_text()

    def wait_for(self, text: str, name: str = "istio.log") -> None:
        try:
            wait_until(lambda: text in self.log(name), text)
        except AssertionError:
            sys.stdout.write(self.log() + self.log("istio.err.log"))
            raise

    def ended(self) -> int:
        assert self.process is not None
        return self.process.wait(timeout=30)

    def get(self, port: str, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[port]}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def behaviour(self, **more: object) -> Behaviour:
        listeners = {"inbound_port": self.ports["inbound"], "outbound_port": self.ports["outbound"]}
        return Behaviour(**{**listeners, **more})  # type: ignore[arg-type]  # names are the test's


@pytest.fixture
def cluster() -> Cluster:
    return Cluster.create()


@pytest.fixture
def control_plane(tmp_path: Path, cluster: Cluster) -> Iterator[ControlPlane]:
    folder = cluster.save(tmp_path / "cluster")
    command = [sys.executable, "-m", "standins.istiod", "--cluster", str(folder), "--listen", "127.0.0.1:0"]
    files = ["--behaviour", str(folder / "behaviour.json"), "--journal", str(folder / "journal")]
    tests = Path(__file__).parents[1]
    with subprocess.Popen([*command, *files], cwd=tests, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(":")[2])
        yield ControlPlane(folder, cluster, port, process)
        process.terminate()


@pytest.fixture(params=["newest", "1.12"])
def machine(
    request: pytest.FixtureRequest, tmp_path: Path, control_plane: ControlPlane, cluster: Cluster
) -> Iterator[Machine]:
    machine = Machine(tmp_path / "root", control_plane, behaves_as=request.param)
    machine.place(cluster.bundle(address="127.0.0.1", as_of=request.param))
    control_plane.behave(machine.behaviour())
    yield machine
    if machine.process is not None:
        with contextlib.suppress(ProcessLookupError):  # all have ended, Envoy too
            os.killpg(machine.process.pid, signal.SIGKILL)
        machine.process.wait()


def test_a_joined_machine_gets_its_certificate_and_its_configuration(machine: Machine, cluster: Cluster) -> None:
    machine.start()
    machine.wait_for("generated new workload certificate")
    machine.wait_for("connected to upstream XDS" if machine.behaves_as == "1.12" else "connected to delta upstream")
    machine.wait_for("returned workload certificate from cache")

    certs = machine.root / "etc/certs"
    leaf = x509.load_pem_x509_certificate((certs / "cert-chain.pem").read_bytes())
    leaf.verify_directly_issued_by(cluster.root.certificate)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://cluster.local/ns/vm/sa/vm"]
    assert (certs / "root-cert.pem").read_bytes() == cluster.root_pem
    assert stat.S_IMODE((certs / "key.pem").stat().st_mode) == 0o600
    accepted = [entry["method"] for entry in machine.control_plane.journal() if entry["code"] == "OK"]
    assert sorted(accepted) == ["CreateCertificate", "StreamAggregatedResources"]


def test_a_joined_machine_is_ready_on_every_port(machine: Machine) -> None:
    machine.start()
    wait_until(lambda: "Envoy command" in machine.log() if (machine.root / "istio.log").exists() else False, "start")
    machine.wait_for("returned workload certificate from cache")

    wait_until(lambda: machine.get("status", "/healthz/ready")[0] == 200, "readiness")
    assert machine.get("health", "/healthz/ready")[0] == 200
    assert "istio_agent_cert_expiry_seconds" in machine.get("status", "/stats/prometheus")[1]
    assert "envoy_server_live" in machine.get("metrics", "/stats/prometheus")[1]
    for port in ("inbound", "outbound"):
        socket.create_connection(("127.0.0.1", machine.ports[port]), timeout=5).close()
    assert "Envoy proxy is ready" in machine.log()


def test_the_certificate_is_renewed_at_half_its_life_with_the_certificate_alone(machine: Machine) -> None:
    machine.control_plane.behave(machine.behaviour(certificate_lifetime=6))
    machine.start()
    machine.wait_for("generated new workload certificate")
    (machine.root / "var/run/secrets/tokens/istio-token").unlink()
    wait_until(lambda: machine.log().count("generated new workload certificate") > 1, "the second certificate")
    assert "failed to fetch token from file: open ./var/run/secrets/tokens/istio-token" in machine.log()


def test_sigterm_drains_and_ends_cleanly(machine: Machine) -> None:
    machine.start()
    machine.wait_for("returned workload certificate from cache")
    assert machine.process is not None
    machine.process.terminate()
    assert machine.ended() == 0
    order = ["Status server has successfully", "Graceful termination period is 1s", "Agent has successfully"]
    positions = [machine.log().find(text) for text in order]
    assert positions == sorted(positions)
    assert min(positions) > 0


def test_every_line_of_the_json_log_is_json(machine: Machine) -> None:
    machine.start("--log_as_json")
    machine.wait_for("returned workload certificate from cache")
    for line in machine.log().splitlines():
        assert {"level", "time", "msg"} <= json.loads(line).keys()


CA_UNAUTHENTICATED = "create certificate: rpc error: code = Unauthenticated desc = request authenticate failure"


@pytest.mark.parametrize(
    "token",
    [
        pytest.param({"lifetime": timedelta(minutes=10), "issued_at": now() - timedelta(hours=1)}, id="expired"),
        pytest.param({"audience": "kubernetes"}, id="for another audience"),
    ],
)
def test_a_bad_token_is_refused_by_the_ca_and_by_xds(
    machine: Machine, cluster: Cluster, token: dict[str, timedelta]
) -> None:
    bad = cluster.token(**token)  # type: ignore[arg-type]  # the parameters are token's
    machine.place(cluster.bundle(address="127.0.0.1", token=bad))
    machine.start()
    machine.wait_for(f"failed to warm certificate: failed to generate workload certificate: {CA_UNAUTHENTICATED}")
    machine.wait_for("rpc error: code = Unauthenticated desc = authentication failure")
    machine.wait_for("closed: 16, authentication failure", "istio.err.log")
    assert not (machine.root / "etc/certs/cert-chain.pem").exists()


def test_a_token_of_another_cluster_is_refused(machine: Machine) -> None:
    machine.more["ISTIO_META_CLUSTER_ID"] = "elsewhere"
    machine.start()
    machine.wait_for(CA_UNAUTHENTICATED)


def test_a_missing_token_is_a_warning_and_then_a_refusal(machine: Machine) -> None:
    (machine.root / "var/run/secrets/tokens/istio-token").unlink()
    machine.start()
    open_failed = "open ./var/run/secrets/tokens/istio-token: no such file or directory"
    machine.wait_for(f"\twarn\tfailed to fetch token from file: {open_failed}")
    machine.wait_for(CA_UNAUTHENTICATED)


@pytest.mark.parametrize(
    ("refuse", "text", "status"),
    [
        (
            "permission-denied",
            "code = PermissionDenied desc = authorization failed: no identities "
            "([spiffe://cluster.local/ns/vm/sa/vm]) matched vm/vm",
            "closed: 7, authorization failed",
        ),
        (
            "no-workload-group",
            "code = FailedPrecondition desc = auto-registration WorkloadEntry of vm-1.vm failed: "
            "cannot find WorkloadGroup vm/demo",
            "closed: 9, auto-registration",
        ),
        (
            "invalid-workload-entry",
            'error creating WorkloadEntry: WorkloadEntry.networking.istio.io "demo-192.0.2.10" is invalid',
            "closed: 9, auto-registration",
        ),
    ],
)
def test_refusals_of_xds_carry_istiods_words(machine: Machine, refuse: str, text: str, status: str) -> None:
    machine.more["ISTIO_META_AUTO_REGISTER_GROUP"] = "demo"
    machine.control_plane.behave(machine.behaviour(refuse=refuse))
    machine.start()
    machine.wait_for(text)
    machine.wait_for(status, "istio.err.log")
    machine.control_plane.behave(machine.behaviour())
    machine.wait_for("returned workload certificate from cache")


@pytest.mark.parametrize(
    ("flaw", "text"),
    [
        ("foreign", "x509: certificate signed by unknown authority"),
        ("wrong-name", "x509: certificate is valid for istiod.elsewhere.svc, not istiod.istio-system.svc"),
        ("expired", "x509: certificate has expired or is not yet valid: current time"),
        ("not-yet-valid", "is before"),
    ],
)
def test_a_bad_server_certificate_is_refused_in_gos_words(machine: Machine, flaw: str, text: str) -> None:
    machine.control_plane.behave(machine.behaviour(server_certificate=flaw))
    machine.start()
    machine.wait_for("ca request failed, starting attempt 4 in")
    machine.wait_for("failed to warm certificate: ")
    prefix = "" if machine.behaves_as == "1.12" else "tls: failed to verify certificate: "
    assert f'"transport: authentication handshake failed: {prefix}x509: ' in machine.log()
    assert text in machine.log()


def test_an_istiod_that_is_not_there_refuses_the_connection(machine: Machine) -> None:
    machine.control_plane.process.terminate()
    machine.control_plane.process.wait()
    machine.start()
    colon = "" if machine.behaves_as == "1.12" else ":"
    where = f"dial tcp 127.0.0.1:{machine.control_plane.port}: connect: connection refused"
    machine.wait_for(f'desc = "transport: Error while dialing{colon} {where}"')
    assert "connected to" not in machine.log()


def test_an_unknown_name_is_looked_up_at_the_name_server(machine: Machine) -> None:
    (machine.root / "etc/hosts").write_text("")
    (machine.root / "etc/resolv.conf").write_text("nameserver 127.0.0.1\n")
    machine.start()
    machine.wait_for("dial tcp: lookup istiod.istio-system.svc on 127.0.0.1:53: ")


@pytest.mark.parametrize(("flaw", "text"), [("reset", "connection reset by peer"), ("hang", "DeadlineExceeded")])
def test_an_istiod_that_breaks_off_or_never_answers_is_told(machine: Machine, flaw: str, text: str) -> None:
    machine.control_plane.behave(machine.behaviour(**{flaw: True}))
    machine.start()
    machine.wait_for(text)


def test_a_rejected_configuration_shows_in_envoys_log(machine: Machine) -> None:
    machine.control_plane.behave(machine.behaviour(reject_config=True))
    machine.start()
    flavour = "gRPC" if machine.behaves_as == "1.12" else "delta"
    listener = "type.googleapis.com/envoy.config.listener.v3.Listener"
    machine.wait_for(f"{flavour} config for {listener} rejected: Error adding/updating listener(s)", "istio.err.log")


def test_a_missing_root_certificate_is_fatal(machine: Machine) -> None:
    (machine.root / "etc/certs/root-cert.pem").unlink()
    machine.start()
    assert machine.ended() == 255
    assert "\tfatal\tinvalid config - istiod.istio-system.svc:" in machine.log()
    assert "missing a root certificate ./etc/certs/root-cert.pem" in machine.log()


def test_a_root_certificate_that_is_no_certificate_ends_the_agent(machine: Machine) -> None:
    (machine.root / "etc/certs/root-cert.pem").write_text("no certificate\n")
    machine.start()
    assert machine.ended() == 255
    assert "failed to append certificates" in machine.log()


def test_a_bad_mesh_file_ends_the_agent(machine: Machine) -> None:
    (machine.root / "etc/istio/config/mesh").write_text("defaultConfig:\n  discoveryAddress istiod\n")
    machine.start()
    assert machine.ended() == 255
    assert "\terror\tfailed to get proxy config: failed to unmarshal mesh config from file [" in machine.log()
    assert "yaml: line 2: could not find expected ':'" in machine.log()


def test_a_taken_dns_port_ends_the_agent_and_a_taken_status_port_does_not(machine: Machine) -> None:
    with socket.socket() as status, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as dns:
        status.bind(("", machine.ports["status"]))
        status.listen()
        dns.bind(("127.0.0.1", machine.ports["dns"]))
        machine.start()
        assert machine.ended() == 255
    port = machine.ports["status"]
    assert f"Error listening on status port: listen tcp :{port}: bind: address already in use" in machine.log()
    assert "failed to start local DNS server: listen udp 127.0.0.1:" in machine.log()


def test_a_taken_admin_port_ends_envoy_and_so_the_agent(machine: Machine) -> None:
    with socket.socket() as admin:
        admin.bind(("127.0.0.1", machine.ports["admin"]))
        admin.listen()
        machine.start()
        machine.ended()
    assert "exited with error: exit status 1" in machine.log()
    assert "Address already in use" in machine.log("istio.err.log")


def test_a_killed_envoy_looks_like_out_of_memory(machine: Machine) -> None:
    machine.start()
    machine.wait_for("returned workload certificate from cache")
    assert machine.process is not None
    children = Path(f"/proc/{machine.process.pid}/task/{machine.process.pid}/children").read_text().split()
    envoy = next(int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text().startswith("envoy"))
    os.kill(envoy, signal.SIGKILL)
    machine.ended()
    assert "Envoy may have been out of memory killed" in machine.log()
    assert "exited with error: signal: killed" in machine.log()


def test_names_of_the_mesh_are_answered_by_the_sidecar(machine: Machine) -> None:
    names = {"helloworld.sample.svc": ["240.240.0.1"]}
    machine.control_plane.behave(machine.behaviour(names=names))
    machine.start()
    machine.wait_for("returned workload certificate from cache")
    question = b"\x12\x34\x01\x00\x00\x01" + bytes(6) + b"\x0ahelloworld\x06sample\x03svc\x00\x00\x01\x00\x01"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(5)
        client.sendto(question, ("127.0.0.1", machine.ports["dns"]))
        answer = client.recv(512)
    assert answer[:2] == question[:2]
    assert answer.endswith(socket.inet_aton("240.240.0.1"))


def place_own_certificate(machine: Machine, issuer: Cluster, *, not_after: datetime) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    chain = issuer.workload_certificate(key.public_key(), not_before=now() - timedelta(days=1), not_after=not_after)
    certs = machine.root / "etc/certs"
    (certs / "cert-chain.pem").write_bytes(chain + issuer.root_pem)
    (certs / "key.pem").write_bytes(private_pem(key))


def test_an_expired_certificate_of_its_own_is_replaced_with_the_token(machine: Machine, cluster: Cluster) -> None:
    place_own_certificate(machine, cluster, not_after=now() - timedelta(minutes=1))
    machine.start()
    machine.wait_for("cert expired, using token instead")
    machine.wait_for("generated new workload certificate")


def test_a_certificate_of_its_own_from_another_mesh_is_refused(machine: Machine) -> None:
    place_own_certificate(machine, Cluster.create(), not_after=now() + timedelta(hours=1))
    machine.start()
    machine.wait_for('desc = "error reading server preface: remote error: tls: unknown certificate authority"')


def test_a_proxy_folder_that_cannot_be_written_ends_the_agent(machine: Machine) -> None:
    (machine.root / "etc/istio/proxy").mkdir(parents=True)
    (machine.root / "etc/istio/proxy/XDS").mkdir()  # root may write anywhere, but not over a directory
    machine.start()
    assert machine.ended() == 255
    assert (
        '\terror\tfailed to start xds proxy: failed to listen on unix socket "./etc/istio/proxy/XDS"' in machine.log()
    )


def test_both_logs_of_a_joined_machine_have_the_columns_of_the_real_ones(machine: Machine) -> None:
    machine.control_plane.behave(machine.behaviour(reject_config=True))
    machine.start()
    machine.wait_for("config.listener.v3.Listener rejected", "istio.err.log")
    moment = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"
    lines = [line for line in machine.log().splitlines() if re.match(moment, line)]
    assert all(re.fullmatch(rf"{moment}\t(info|warn|error|fatal)\t.+", line) for line in lines)
    entries = [line for line in machine.log("istio.err.log").splitlines() if "Listener rejected" in line]
    assert entries[0].split("\t")[1] == "warning"
    assert entries[0].split("\t")[2].startswith("envoy config")
    assert ("\tthread=" in machine.log("istio.err.log")) == (machine.behaves_as == "newest")
