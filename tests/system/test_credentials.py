"""How the machine proves who it is, how it knows the endpoint, and what a stranger in between gets to see: nothing."""

import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from lab.cluster import Authority, private_pem
from lab.cluster import Files as BundleFiles
from lab.machine import Machine
from lab.network import CLUSTER_IPV4, Network
from lab.run import Run
from lab.services import ENDPOINT_PORT, Endpoint
from standins.packages import Packages
from system.joining import TOKEN, Mesh, bootstrap, configure, join, requests, run_of_sidecar, running_mesh
from system.web import Files, Proxy, pin

SHARED_SECRET = uuid.uuid4().hex
SECRETS = "/etc/vmmesh-agent"
SOMEBODY_ELSE = f"sha256:{'5' * 64}", f"sha256:{'a' * 64}"


class OpenToAll(Endpoint):
    """An endpoint that takes every kind of credential."""

    def __init__(self, files: BundleFiles, packages: Any, *, network: Network, run: Run) -> None:
        super().__init__(files, packages, network=network, run=run)
        self.machines = Authority.create("Machines of this house")
        (self.folder / "machines.pem").write_bytes(self.machines.pem)
        secret = self.folder / "shared-secret"
        secret.touch(mode=0o600)
        secret.write_text(f"{SHARED_SECRET}\n")

    def argv(self) -> list[str]:
        more = [f"--client-ca={self.folder / 'machines.pem'}", f"--shared-secret-file={self.folder / 'shared-secret'}"]
        return [*super().argv(), *more]

    def certificate_for(self, name: str) -> tuple[bytes, bytes]:
        """A client certificate and its key, in PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self.machines.issue(key.public_key(), [x509.DNSName(name)], common_name=name)
        return certificate, private_pem(key)

    @property
    def ca(self) -> bytes:
        """Its own authority's certificate, in PEM."""
        return (self.folder / "state/ca.pem").read_bytes()

    @property
    def leaf(self) -> bytes:
        """The certificate that it shows, in PEM."""
        content = (self.folder / "state/server.pem").read_bytes()
        return content[content.index(b"-----BEGIN CERTIFICATE") :]


@pytest.fixture(scope="module")
def mesh(packages: Packages, network: Network, run: Run) -> Iterator[Mesh]:
    with running_mesh(packages, network=network, run=run, kind=OpenToAll) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def endpoint(mesh: Mesh) -> OpenToAll:
    assert isinstance(mesh.endpoint, OpenToAll)
    return mesh.endpoint


@pytest.fixture(scope="module")
def joined(shared_machine: Machine, endpoint: OpenToAll) -> Machine:
    """Joined with its join token; every credential that a test may name lies there, root's alone."""
    endpoint.invite(shared_machine)
    join(shared_machine)
    shared_machine.write(f"{SECRETS}/bearer", f"{SHARED_SECRET}\n", mode=0o600)
    certificate, key = endpoint.certificate_for("vm3")
    shared_machine.write(f"{SECRETS}/client.pem", certificate, mode=0o600)
    shared_machine.write(f"{SECRETS}/client.key", key, mode=0o600)
    shared_machine.write(f"{SECRETS}/get-token", f'#!/bin/sh\necho "$1{SHARED_SECRET[16:]}"\n', mode=0o700)
    shared_machine.write(f"{SECRETS}/endpoint-ca.pem", endpoint.ca)
    return shared_machine


CREDENTIALS: dict[str, tuple[Mapping[str, Any], str]] = {
    "join token": ({"join_token_file": f"{SECRETS}/join-token"}, "join token"),
    "bearer token": ({"bearer_token_file": f"{SECRETS}/bearer"}, "shared secret"),
    "client certificate": (
        {"client_certificate": {"certificate": f"{SECRETS}/client.pem", "key": f"{SECRETS}/client.key"}},
        "certificate commonName=vm3",
    ),
    "exec": ({"exec": [f"{SECRETS}/get-token", SHARED_SECRET[:16]]}, "shared secret"),
}


@pytest.mark.parametrize("credential", CREDENTIALS)
def test_each_credential_opens_the_endpoint(credential: str, joined: Machine, endpoint: OpenToAll) -> None:
    settings, known_as = CREDENTIALS[credential]
    _use(joined, endpoint, credential=settings)

    join(joined)

    answered = requests(endpoint)[-1]
    assert answered["status"] in {200, 304}
    assert answered["credential"] == known_as


def test_a_credential_that_the_endpoint_does_not_know_is_told_and_changes_nothing(
    joined: Machine, endpoint: OpenToAll
) -> None:
    joined.write(f"{SECRETS}/other", uuid.uuid4().hex, mode=0o600)
    _use(joined, endpoint, credential={"bearer_token_file": f"{SECRETS}/other"})
    before = run_of_sidecar(joined), joined.read(TOKEN)

    refused = bootstrap(joined)

    assert refused.returncode == 1
    assert "[endpoint-unauthorized]" in refused.stderr
    assert (run_of_sidecar(joined), joined.read(TOKEN)) == before


@pytest.mark.parametrize("trust", ["ca_file", "pin of the CA", "pin of the leaf", "one pin of several", "CA and pin"])
def test_the_endpoint_is_known_by_what_the_configuration_says(trust: str, joined: Machine, endpoint: OpenToAll) -> None:
    of_ca, of_leaf = pin(endpoint.ca), pin(endpoint.leaf)
    assert of_ca == endpoint.pin
    settings: dict[str, Any] = {
        "ca_file": {"ca_file": f"{SECRETS}/endpoint-ca.pem"},
        "pin of the CA": {"ca_pins": [of_ca]},
        "pin of the leaf": {"ca_pins": [of_leaf]},
        "one pin of several": {"ca_pins": [SOMEBODY_ELSE[0], of_ca, SOMEBODY_ELSE[1]]},
        "CA and pin": {"ca_file": f"{SECRETS}/endpoint-ca.pem", "ca_pins": [of_leaf]},
    }
    before = len(requests(endpoint))
    configure(joined, _configuration(endpoint, **settings[trust]))

    join(joined)

    assert len(requests(endpoint)) == before + 1


def test_the_endpoint_is_known_by_the_trust_store_of_the_system_where_nothing_else_is_said(
    joined: Machine, endpoint: OpenToAll
) -> None:
    configure(joined, _configuration(endpoint))
    stranger = bootstrap(joined)
    assert stranger.returncode == 1
    assert "[endpoint-unknown-ca]" in stranger.stderr

    joined.write("/usr/local/share/ca-certificates/endpoint.crt", endpoint.ca)
    joined.run(["update-ca-certificates"])
    join(joined)


@pytest.fixture
def impostor(mesh: Mesh, network: Network, run: Run) -> Iterator[Files]:
    """A server for the right name, with a certificate of an authority of its own, that writes down all it hears."""
    authority = Authority.create("An impostor")
    certificate, key = mesh.cluster.server_certificate([CLUSTER_IPV4], ca=authority)
    with Files(certificate + authority.pem, key, network=network, run=run) as impostor:
        yield impostor


@pytest.mark.parametrize("credential", CREDENTIALS)
def test_a_server_with_another_key_hears_no_request_and_no_credential(
    credential: str, joined: Machine, endpoint: OpenToAll, impostor: Files
) -> None:
    settings, _ = CREDENTIALS[credential]
    url = impostor.publish("bundle", b"")
    configure(joined, _configuration(endpoint, url=url, ca_pins=[endpoint.pin], credential=settings))

    refused = bootstrap(joined)

    assert refused.returncode == 1
    assert "[endpoint-pin-mismatch]" in refused.stderr
    # The message names the keys that were shown, so that a pin can be compared.
    assert pin(impostor.certificate) in refused.stderr
    assert impostor.heard("connection")
    assert impostor.heard("request") == []
    assert "error" not in impostor.heard("handshake")[0]  # it could have heard: the handshake came about
    # The same server is heard from once it is the one that is meant.
    trusted = _configuration(endpoint, url=url, ca_pins=[pin(impostor.certificate)], credential=settings)
    configure(joined, trusted)
    bootstrap(joined)
    assert len(impostor.heard("request")) == 1


def test_a_stolen_certificate_of_the_authority_is_no_use_without_its_key(
    joined: Machine, endpoint: OpenToAll, mesh: Mesh, network: Network, run: Run
) -> None:
    """The pinned CA's certificate is public: a server that shows it behind a leaf of its own is not trusted."""
    certificate, key = mesh.cluster.server_certificate([CLUSTER_IPV4], ca=Authority.create("An impostor"))
    with Files(certificate + endpoint.ca, key, network=network, run=run) as impostor:
        url = impostor.publish("bundle", b"")
        configure(joined, _configuration(endpoint, url=url, ca_pins=[endpoint.pin]))

        refused = bootstrap(joined)

        assert refused.returncode == 1
        assert impostor.heard("connection")
        assert impostor.heard("request") == []


@pytest.fixture
def proxy(network: Network, run: Run) -> Iterator[Proxy]:
    with Proxy(network=network, run=run) as proxy:
        yield proxy


def test_the_endpoint_is_reached_through_a_proxy_that_sees_no_credential(
    joined: Machine, endpoint: OpenToAll, proxy: Proxy
) -> None:
    _use(joined, endpoint)

    join(joined, env={"https_proxy": proxy.url})

    heads = [entry["head"] for entry in proxy.heard("request")]
    assert heads
    for head in heads:
        assert head.startswith(f"CONNECT {CLUSTER_IPV4}:{ENDPOINT_PORT} HTTP/1.1\r\n")
        assert "authorization" not in head.lower()
    assert endpoint.token not in "".join(heads)
    assert requests(endpoint)[-1]["client"] == CLUSTER_IPV4  # the proxy's own address


def test_the_proxy_is_passed_by_for_hosts_that_no_proxy_names(
    joined: Machine, endpoint: OpenToAll, proxy: Proxy
) -> None:
    _use(joined, endpoint)

    join(joined, env={"https_proxy": proxy.url, "no_proxy": f"localhost,{CLUSTER_IPV4}"})

    assert proxy.heard("connection") == []
    assert requests(endpoint)[-1]["client"] == joined.link.ipv4


def test_no_credential_is_left_where_others_may_read_it(joined: Machine, endpoint: OpenToAll) -> None:
    places = ["/run", "/tmp", "/var/tmp", "/var/log", "/var/lib", "/etc"]
    for secret in (endpoint.token, SHARED_SECRET, joined.read(TOKEN).decode()):
        found = joined.run(["grep", "-rlF", "--binary-files=text", secret, *places], check=False).stdout.split()
        for file in found:
            path = Path(joined.root / file.lstrip("/"))
            assert path.stat().st_mode & 0o077 == 0, file


def _use(machine: Machine, endpoint: Endpoint, **settings: Any) -> None:
    configure(machine, _configuration(endpoint, ca_pins=[endpoint.pin], **settings))


def _configuration(endpoint: Endpoint, **settings: Any) -> dict[str, Any]:
    credential = {"join_token_file": f"{SECRETS}/join-token"}
    return {"endpoint": {"url": endpoint.url, "credential": credential} | settings}
