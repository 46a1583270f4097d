"""The fault matrix: what an endpoint, or the way to it, can do wrong, and what `status` says of each.

One healthy machine with the daemon at work; its endpoint is switched to one that is broken in one way after the
other. Each kind is told with its code, and none touches the sidecar, its files or the capture of traffic.
"""

import gzip
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from lab.cluster import FILE_NAMES, Authority, as_json, as_tar, now
from lab.cluster import Files as BundleFiles
from lab.faulty import PORT, Answer, Faulty, http
from lab.machine import Machine
from lab.network import CLUSTER_IPV4, Network
from lab.run import Run
from lab.services import ENDPOINT_PORT
from system.joining import PLACED, Mesh, status
from system.refusal import assert_fit_for_a_terminal
from system.web import pin

AGENT = "vmmesh-agent.service"
RETRIED, REFUSED = "retrying", "attempt failed"  # again within seconds; or the attempt ends, and the next has time

_DROP_IN = "/etc/vmmesh-agent/config.d/endpoint.yaml"
_CA_FILE = "/etc/vmmesh-agent/endpoint-ca.pem"
_PATIENCE = 60.0  # seconds for anything that has to come; none is a measure of the agent
_TROUBLESHOOTING = Path(__file__).parents[2] / "docs/troubleshooting.md"

# Records of TLS: an alert that ends the handshake (with its number), and what a server of TLS 1.0 says first.
_NO_CIPHER, _NO_CERTIFICATE = (Answer(b"\x15\x03\x03\x00\x02\x02" + number) for number in (b"\x28", b"\x74"))
_TLS_1_0 = Answer(b"\x16\x03\x01\0\x31\x02\0\0\x2d\x03\x01" + bytes(33) + b"\0\x2f\0\0\x05\xff\x01\0\x01\0")
_FORBIDDEN = "--reject-with=icmp-admin-prohibited"
_CHUNKED = b"HTTP/1.1 200 Told\r\nTransfer-Encoding: chunked\r\n\r\n"


class Stage:
    """The machine, and an endpoint that is as good or as bad as it is told to be."""

    def __init__(self, machine: Machine, mesh: Mesh, faulty: Faulty, network: Network) -> None:
        self.machine = machine
        self.cluster = mesh.cluster
        self.faulty = faulty
        self.authority = Authority.create("Endpoint")
        self.files: BundleFiles = {name: (mesh.endpoint.bundle_folder / name).read_bytes() for name in FILE_NAMES}
        self.needs_reload = False  # before the daemon hears the endpoint again
        self._network = network
        self._broken = ExitStack()
        machine.write(_CA_FILE, self.authority.pem)

    def mend(self) -> None:
        """Let all be well, from the next connection on."""
        self._broken.close()
        self.configure()
        self.shows()

    def reload(self) -> None:
        self.machine.run(["systemctl", "reload", AGENT])

    # --- what can be broken -----------------------------------------------------

    def goes_down(self) -> None:
        self.faulty.stop()
        self._broken.callback(self.faulty.start)

    def is_behind_firewall(self, *target: str) -> None:
        """Have what is sent to the endpoint's port treated so."""
        rule = ["INPUT", "-p", "tcp", f"--dport={PORT}", "-j", *target]
        subprocess.run(self._network.in_cluster(["iptables", "-A", *rule]), check=True)
        self._broken.callback(subprocess.run, self._network.in_cluster(["iptables", "-D", *rule]), check=True)
        self.configure(timeout=1.5)

    def is_behind_proxy(self, address: str, *answers: bytes) -> None:
        """Have the daemon ask this proxy."""
        self.shows(*map(Answer, answers), plain=bool(answers))
        self.machine.run(["systemctl", "set-environment", f"https_proxy=http://{address}"])
        self._restart()
        self._broken.callback(self._restart)
        self._broken.callback(self.machine.run, ["systemctl", "unset-environment", "https_proxy"])

    def _restart(self) -> None:
        """Restart the daemon, more often than systemd has patience with a service."""
        self.machine.run(["systemctl", "reset-failed", AGENT])
        self.machine.run(["systemctl", "restart", AGENT])

    def configure(self, **endpoint: Any) -> None:
        """Write the drop-in, with these settings over the right ones."""
        right = {"url": self.faulty.url, "ca_pins": [pin(self.authority.pem)], "timeout": 10}
        self.machine.write(_DROP_IN, yaml.safe_dump({"endpoint": right | endpoint}))
        self.needs_reload = "url" in endpoint

    def shows(
        self, *answers: Answer, identity: tuple[bytes, bytes] | None = None, plain: bool = False, **endpoint: Any
    ) -> None:
        """Give these answers (a sound one, if none), with this chain and key, or without TLS."""
        if endpoint:
            self.configure(**endpoint)
        self.faulty.show(answers or [self.bundle()], None if plain else identity or self.certificate())

    def dawdles(self, answer: Answer, *, plain: bool = False) -> None:
        """Answer so that one has to give up, which the machine then does soon."""
        self.shows(answer, plain=plain, timeout=1.5)

    def says(self, code: int, **how: Any) -> None:
        """Answer with this status and a reason."""
        self.shows(http(code, b'{"error": {"message": "because"}}', **how))

    def serves(self, **files: bytes | str | None) -> None:
        """Serve the machine's own bundle, but for these files, named as identifiers; None leaves one out."""
        self.shows(self.bundle(**files))

    def names_package(self, *answers: Answer, version: str = "99.0.0", **package: str) -> None:
        """Serve a bundle that names another package than the installed one, and this to whoever asks for that."""
        usual = {"format": "rpm", "arch": "x86_64", "url": f"https://{self.faulty.address}/a.rpm", "sha256": "0" * 64}
        self.shows(http(body=as_json(self.files, {"version": version, "packages": [usual | package]})), *answers)
        self.needs_reload = True  # what named the package was heard already

    # --- its parts ----------------------------------------------------------------

    def bundle(self, **files: bytes | str | None) -> Answer:
        """The sound answer, but for these files."""
        names = {re.sub(r"\W", "_", name): name for name in FILE_NAMES}
        other = {names[name]: text.encode() if isinstance(text, str) else text for name, text in files.items()}
        return http(body=as_json({name: text for name, text in (self.files | other).items() if text is not None}))

    def cut(self, **how: Any) -> Answer:
        """The first half of the sound answer."""
        body = self.bundle().body
        return http(body=body[: len(body) // 2], **({"length": len(body)} | how))

    def certificate(
        self, name: str = CLUSTER_IPV4, *, ca: Authority | None = None, since: float = -1, until: float = 1
    ) -> tuple[bytes, bytes]:
        """A chain and its key; `since` and `until` are days from now."""
        signer = ca or self.authority
        leaf, key = self.cluster.server_certificate([name], ca=signer, not_before=_days(since), not_after=_days(until))
        return leaf + signer.pem, key

    def leaf_alone(self) -> tuple[bytes, bytes]:
        chain, key = self.certificate()
        return chain.removesuffix(self.authority.pem), key

    def changed(self, name: str, old: str, new: str) -> str:
        """One of the files with a part replaced."""
        text = self.files[name].decode()
        assert old in text
        return text.replace(old, new)


def _days(number: float) -> datetime:
    return now() + timedelta(days=number)


def _stranger(**how: Any) -> Authority:
    return Authority.create("Somebody", **how)


def _self_signed() -> tuple[bytes, bytes]:
    own = _stranger(is_ca=False)
    return own.pem, own.key_pem


_EXPIRED = _stranger(not_before=_days(-9), not_after=_days(-1))


# --- the table ------------------------------------------------------------------


class Fault(NamedTuple):
    """The code that `status` shows, what the daemon does then, and how the endpoint is broken."""

    code: str
    follows: str
    breaks: Callable[[Stage], None]


FAULTS = {
    name: Fault(*row)
    for name, row in {
        # the way there
        "nobody listens": ("endpoint_refuses_connections", RETRIED, lambda s: s.goes_down()),
        "firewall says no": ("endpoint_unreachable", RETRIED, lambda s: s.is_behind_firewall("REJECT", _FORBIDDEN)),
        "firewall says nothing": ("endpoint_unreachable", RETRIED, lambda s: s.is_behind_firewall("DROP")),
        "no route": ("endpoint_unreachable", RETRIED, lambda s: s.configure(url="https://198.51.100.1/v1/bundle")),
        "unknown name": ("endpoint_name_not_found", RETRIED, lambda s: s.configure(url="https://mesh.invalid/v1")),
        "proxy refuses": (
            "proxy_refused",
            RETRIED,
            lambda s: s.is_behind_proxy(s.faulty.address, b"HTTP/1.1 403 Forbidden\r\n\r\n"),
        ),
        "proxy is down": ("proxy_refused", RETRIED, lambda s: s.is_behind_proxy(f"{CLUSTER_IPV4}:9")),
        "unknown proxy": ("proxy_refused", RETRIED, lambda s: s.is_behind_proxy("proxy.invalid:3128")),
        # TLS
        "silence in handshake": (
            "endpoint_handshake_silent",
            RETRIED,
            lambda s: s.dawdles(Answer(end="hang"), plain=True),
        ),
        "reset in handshake": ("endpoint_reset", RETRIED, lambda s: s.shows(Answer(end="reset"), plain=True)),
        "end in handshake": ("endpoint_handshake_failed", RETRIED, lambda s: s.shows(Answer(), plain=True)),
        "no common cipher": ("endpoint_handshake_failed", RETRIED, lambda s: s.shows(_NO_CIPHER, plain=True)),
        "TLS 1.0": ("endpoint_handshake_failed", RETRIED, lambda s: s.shows(_TLS_1_0, plain=True)),
        "client certificate wanted": (
            "endpoint_unauthorized",
            REFUSED,
            lambda s: s.shows(_NO_CERTIFICATE, plain=True),
        ),
        "plain HTTP": ("endpoint_not_tls", REFUSED, lambda s: s.shows(http(400), plain=True)),
        "SSH": ("endpoint_not_tls", REFUSED, lambda s: s.shows(Answer(b"SSH-2.0-OpenSSH_9.2\r\n"), plain=True)),
        # who is it?
        "wrong pin": ("endpoint_pin_mismatch", REFUSED, lambda s: s.shows(ca_pins=["sha256:" + "0" * 64])),
        "leaf without its CA": ("endpoint_pin_mismatch", REFUSED, lambda s: s.shows(identity=s.leaf_alone())),
        "self-signed": ("endpoint_unknown_ca", REFUSED, lambda s: s.shows(identity=_self_signed(), ca_file=_CA_FILE)),
        "wrong CA": (
            "endpoint_unknown_ca",
            REFUSED,
            lambda s: s.shows(identity=s.certificate(ca=_stranger()), ca_file=_CA_FILE),
        ),
        "expired certificate": (
            "endpoint_certificate_expired",
            REFUSED,
            lambda s: s.shows(identity=s.certificate(since=-3, until=-1)),
        ),
        "expired CA": (
            "endpoint_certificate_expired",
            REFUSED,
            lambda s: s.shows(identity=s.certificate(ca=_EXPIRED), ca_pins=[pin(_EXPIRED.pem)]),
        ),
        "certificate of tomorrow": (
            "endpoint_certificate_not_yet_valid",
            REFUSED,
            lambda s: s.shows(identity=s.certificate(since=1, until=2)),
        ),
        "another's certificate": (
            "endpoint_wrong_name",
            REFUSED,
            lambda s: s.shows(identity=s.certificate("mesh.example.com")),
        ),
        # what it answers
        "301": ("endpoint_redirects", REFUSED, lambda s: s.says(301, headers={"Location": "https://192.0.2.1/new"})),
        "400": ("endpoint_refused", REFUSED, lambda s: s.says(400)),
        "302": ("endpoint_redirects", REFUSED, lambda s: s.says(302, headers={"Location": "/login"})),
        "401": ("endpoint_unauthorized", REFUSED, lambda s: s.says(401)),
        "403": ("endpoint_forbidden", REFUSED, lambda s: s.says(403)),
        "404": ("endpoint_not_found", REFUSED, lambda s: s.says(404)),
        "409": ("endpoint_refused", REFUSED, lambda s: s.says(409)),
        "410": ("endpoint_gone", REFUSED, lambda s: s.says(410)),
        "413": ("endpoint_refused", REFUSED, lambda s: s.says(413)),
        "204": ("endpoint_refused", REFUSED, lambda s: s.shows(http(204, length=-1))),
        "304 unasked": ("endpoint_malformed_answer", REFUSED, lambda s: s.shows(http(304, length=-1))),
        "429": ("endpoint_busy", RETRIED, lambda s: s.says(429, headers={"Retry-After": "1"})),
        "500": ("endpoint_failing", RETRIED, lambda s: s.says(500)),
        "502": ("endpoint_failing", RETRIED, lambda s: s.says(502)),
        "503": ("endpoint_failing", RETRIED, lambda s: s.says(503, headers={"Retry-After": "1"})),
        "504": ("endpoint_failing", RETRIED, lambda s: s.says(504)),
        # how it answers
        "silence": ("endpoint_too_slow", RETRIED, lambda s: s.dawdles(Answer(end="hang"))),
        "slow head": ("endpoint_too_slow", RETRIED, lambda s: s.dawdles(http(body=b"{}", slow="head"))),
        "slow body": ("endpoint_too_slow", RETRIED, lambda s: s.dawdles(http(body=b"{ }", slow="body"))),
        "silence in the body": ("endpoint_too_slow", RETRIED, lambda s: s.dawdles(s.cut(end="hang"))),
        "end before the answer": ("endpoint_broke_off", RETRIED, lambda s: s.shows(Answer())),
        "reset before the answer": ("endpoint_broke_off", RETRIED, lambda s: s.shows(Answer(end="reset"))),
        "end in the body": ("endpoint_broke_off", RETRIED, lambda s: s.shows(s.cut())),
        "end in a chunk": ("endpoint_broke_off", RETRIED, lambda s: s.shows(Answer(_CHUNKED + b"fff\r\n{"))),
        "no chunk": ("endpoint_broke_off", RETRIED, lambda s: s.shows(Answer(_CHUNKED + b"garbage\r\n"))),
        "no HTTP": ("endpoint_broke_off", RETRIED, lambda s: s.shows(Answer(b"220 smtp.example.com ESMTP\r\n"))),
        "headers without end": (
            "endpoint_broke_off",
            RETRIED,
            lambda s: s.shows(Answer(b"HTTP/1.1 200 OK\r\n", b"X-More: and more\r\n", times=100_000)),
        ),
        "end in a body of no length": ("bundle_malformed", REFUSED, lambda s: s.shows(s.cut(length=-1))),
        "body without end": (
            "endpoint_sent_too_much",
            REFUSED,
            lambda s: s.shows(http(body=b"x" * 1024, times=8 * 1024, length=-1)),
        ),
        "compressed unasked": (
            "endpoint_malformed_answer",
            REFUSED,
            lambda s: s.shows(http(body=gzip.compress(s.bundle().body), headers={"Content-Encoding": "gzip"})),
        ),
        "a terabyte": ("endpoint_sent_too_much", REFUSED, lambda s: s.shows(http(body=b"x", length=1024**4))),
        # whether it is a bundle
        "nothing": ("bundle_unknown_format", REFUSED, lambda s: s.shows(http())),
        "half of JSON": ("bundle_malformed", REFUSED, lambda s: s.shows(http(body=b'{"version": 1,'))),
        "log-in page": ("bundle_unknown_format", REFUSED, lambda s: s.shows(http(body=b"<!DOCTYPE html><form>"))),
        "another object of Kubernetes": (
            "bundle_unknown_format",
            REFUSED,
            lambda s: s.shows(http(body=b'{"kind": "ConfigMap", "data": {}}')),
        ),
        "version 2": ("bundle_unknown_version", REFUSED, lambda s: s.shows(http(body=b'{"version": 2}'))),
        "gzip bomb": ("bundle_too_large", REFUSED, lambda s: s.shows(http(body=gzip.compress(bytes(64 * 1024**2))))),
        "half of a tar.gz": ("bundle_truncated", REFUSED, lambda s: s.shows(http(body=as_tar(s.files)[:1000]))),
        # whether it can be trusted
        "no root-cert.pem": ("file_missing", REFUSED, lambda s: s.serves(root_cert_pem=None)),
        "root of garbage": ("root_cert_invalid", REFUSED, lambda s: s.serves(root_cert_pem="garbage")),
        "no istio-token": ("file_missing", REFUSED, lambda s: s.serves(istio_token=None)),
        "a leaf as root": ("root_cert_not_ca", REFUSED, lambda s: s.serves(root_cert_pem=s.leaf_alone()[0])),
        "no cluster.env": ("file_missing", REFUSED, lambda s: s.serves(cluster_env=None)),
        "root of yesterday": (
            "root_cert_not_in_date",
            REFUSED,
            lambda s: s.serves(root_cert_pem=_EXPIRED.pem),
        ),
        "no mesh.yaml": ("file_missing", REFUSED, lambda s: s.serves(mesh_yaml=None)),
        "expired token": (
            "token_expired",
            REFUSED,
            lambda s: s.serves(istio_token=s.cluster.token(issued_at=_days(-1))),
        ),
        "no hosts": ("file_missing", REFUSED, lambda s: s.serves(hosts=None)),
        "token of tomorrow": (
            "token_not_yet_valid",
            REFUSED,
            lambda s: s.serves(istio_token=s.cluster.token(issued_at=_days(1))),
        ),
        "empty token": ("file_empty", REFUSED, lambda s: s.serves(istio_token="")),
        "token that is none": ("token_not_jwt", REFUSED, lambda s: s.serves(istio_token="secret")),
        "token for another audience": (
            "token_wrong_audience",
            REFUSED,
            lambda s: s.serves(istio_token=s.cluster.token(audience="vault")),
        ),
        "token of another namespace": (
            "token_wrong_namespace",
            REFUSED,
            lambda s: s.serves(istio_token=s.cluster.token(namespace="prod")),
        ),
        "token of another account": (
            "token_wrong_service_account",
            REFUSED,
            lambda s: s.serves(istio_token=s.cluster.token(service_account="admin")),
        ),
        "cluster.env with shell": (
            "cluster_env_refused",
            REFUSED,
            lambda s: s.serves(cluster_env=s.files["cluster.env"] + b"A=$(reboot)\n"),
        ),
        "another's bundle": (
            "wrong_workload",
            REFUSED,
            lambda s: s.serves(cluster_env=s.changed("cluster.env", "demo", "shop")),
        ),
        "mesh.yaml of garbage": ("mesh_malformed", REFUSED, lambda s: s.serves(mesh_yaml="a: [b")),
        "hosts with another name": (
            "hosts_foreign_name",
            REFUSED,
            lambda s: s.serves(hosts=s.files["hosts"] + b"192.0.2.66 bank.example.com\n"),
        ),
        "hosts of garbage": ("hosts_malformed", REFUSED, lambda s: s.serves(hosts="istiod is there\n")),
        "two things at once": ("bundle_refused", REFUSED, lambda s: s.serves(hosts=None, istio_token="")),
        # the package that it names
        "package by http": ("package_not_https", REFUSED, lambda s: s.names_package(url="http://192.0.2.1/a.rpm")),
        "package without digest": ("package_without_digest", REFUSED, lambda s: s.names_package(sha256="")),
        "package for another machine": ("package_wrong_architecture", REFUSED, lambda s: s.names_package(arch="s390x")),
        "older package": ("downgrade_refused", REFUSED, lambda s: s.names_package(version="0.1-1")),
        "package altered": ("package_wrong_digest", REFUSED, lambda s: s.names_package(http(body=b"altered"))),
        "package that is none": (
            "package_invalid",
            REFUSED,
            lambda s: s.names_package(http(body=b"<html>"), sha256=sha256(b"<html>").hexdigest()),
        ),
        "package gone": ("package_missing", REFUSED, lambda s: s.names_package(http(404))),
        "package by http in the end": (
            "endpoint_redirects",
            REFUSED,
            lambda s: s.names_package(http(302, headers={"Location": "http://192.0.2.1/a.rpm"})),
        ),
        "package of a stranger": (
            "endpoint_unknown_ca",
            REFUSED,
            lambda s: s.names_package(url=f"https://{CLUSTER_IPV4}:{ENDPOINT_PORT}/a.rpm"),
        ),
        "half of a package": ("endpoint_broke_off", RETRIED, lambda s: s.names_package(http(body=b"half", length=8))),
        # the last, for one who took it would lose istiod: /etc/hosts knows the name, but from the bundle before
        "empty hosts": ("istiod_not_found", REFUSED, lambda s: s.serves(hosts="")),
    }.items()
}


# --- the tests ------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage(joined: Machine, mesh: Mesh, network: Network, run: Run) -> Iterator[Stage]:
    """A healthy machine whose daemon asks an endpoint that is still good."""
    with Faulty(network=network, run=run) as faulty:
        stage = Stage(joined, mesh, faulty, network)
        stage.mend()
        joined.run(["systemctl", "start", AGENT])
        _is_healthy(stage)
        yield stage
        stage.mend()


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_of_the_endpoint_is_told_and_the_machine_stays_in_the_mesh(kind: str, stage: Stage) -> None:
    code, follows, breaks = FAULTS[kind]
    stage.mend()
    before, mark = _footprint(stage.machine), len(stage.machine.journal(AGENT))

    breaks(stage)
    stage.reload()

    _until(lambda: [code] == _codes(stage.machine) and _logged(stage, mark, follows, code), stage)
    document = status(stage.machine)
    assert (document["state"], document["cause"]) == ("degraded", code)
    (condition,) = document["conditions"]
    assert condition["message"]
    assert condition["remedy"]
    assert_fit_for_a_terminal("".join(condition.values()))
    assert _footprint(stage.machine) == before
    if follows == RETRIED:  # and so it is over as soon as it is mended; after what is refused comes the next kind
        needs_reload = stage.needs_reload
        stage.mend()
        if needs_reload:
            stage.reload()
        _is_healthy(stage)
        assert _footprint(stage.machine) == before


def test_the_last_fault_is_forgotten_too_when_the_endpoint_is_good(stage: Stage) -> None:
    stage.shows(http(401))
    stage.reload()
    _until(lambda: _codes(stage.machine) == ["endpoint_unauthorized"], stage)

    stage.mend()
    stage.reload()

    _is_healthy(stage)
    assert "Traceback" not in stage.machine.journal(AGENT)


def test_the_matrix_is_large_and_each_code_in_it_is_explained() -> None:
    page = _TROUBLESHOOTING.read_text()
    codes = {fault.code for fault in FAULTS.values()}
    assert [code for code in sorted(codes) if f"`{code.replace('_', '-')}`" not in page] == []
    assert len(FAULTS) >= 40
    assert len(codes) >= 40


# --- details --------------------------------------------------------------------


def _is_healthy(stage: Stage) -> None:
    """Wait until nothing is said against the machine."""
    _until(lambda: _codes(stage.machine) == [], stage)
    assert status(stage.machine)["state"] == "healthy"


def _codes(machine: Machine) -> Sequence[str] | None:
    """What the daemon's record says, which costs no process to read."""
    try:
        record = json.loads((machine.root / "run/vmmesh-agent/status.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return [condition["code"] for condition in record["conditions"]]


def _logged(stage: Stage, mark: int, event: str, code: str) -> bool:
    """Did the daemon say this since then? The kind before may have had the same code."""
    said = stage.machine.journal(AGENT)[mark:]
    return re.search(rf'event="?{event}"? code={code.replace("_", "-")}\b', said) is not None


def _footprint(machine: Machine) -> str:
    """What changes when the sidecar is started, one of its files is written, or the capture of traffic is touched."""
    look = """systemctl show istio.service --property=ActiveState,MainPID,InvocationID
        iptables -t nat -S; stat --dereference --format='%n %i %a %U' "$@"; sha256sum "$@" """
    return machine.run(["sh", "-ec", look, "sh", "/etc/hosts", *PLACED.values()]).stdout


def _until(look: Callable[[], bool], stage: Stage) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not look():
        assert time.monotonic() < deadline, f"{status(stage.machine)}\n{stage.machine.journal(AGENT)[-2000:]}"
        time.sleep(0.1)
