"""An archive for support: everything that helps, nothing that is secret, and bounded."""

import base64
import gzip
import hashlib
import io
import json
import secrets
import string
import tarfile
from pathlib import Path
from typing import Any

import pytest

from factories import CLUSTER, EVENING
from vmmesh_agent.host import Host
from vmmesh_agent.support import Collected, archive_name, collect, packed

CONFIG = """\
# the join token is {join_token}
endpoint:
  url: https://mesh.example.com/v1/bundle?signature={query}
  ca_file: /etc/vmmesh-agent/endpoint-ca.pem
  credential: {{exec: [/usr/local/bin/get-token, --password, {password}]}}
healthy_within: 60
"""
DROP_IN = "endpoint: {{credential: {{bearer_token_file: {bearer}}}}}\nunknown_setting: {unknown}\n"


def random_text(length: int = 40) -> str:
    return "".join(secrets.choice(string.ascii_letters + string.digits + "_-") for _ in range(length))


class Machine:
    """A tree (not the running machine: no command is run) full of secrets."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self.host = Host(tree)
        self.token = CLUSTER.token()
        self.key = CLUSTER.server_certificate(["vm1"])[1]
        self.secrets = {
            name: random_text() for name in ("join_token", "query", "password", "bearer", "unknown", "file")
        }
        self.write("/var/run/secrets/tokens/istio-token", self.token)
        self.write("/etc/certs/key.pem", self.key)
        self.write("/etc/certs/root-cert.pem", CLUSTER.bundle()["root-cert.pem"])
        self.write("/etc/vmmesh-agent/config.yaml", CONFIG.format(**self.secrets))
        self.write("/etc/vmmesh-agent/config.d/10-more.yaml", DROP_IN.format(**self.secrets))
        self.write("/etc/vmmesh-agent/join-token", self.secrets["join_token"] + "\n")
        self.write("/var/lib/istio/envoy/cluster.env", "ISTIO_NAMESPACE='vm'\n")

    def write(self, path: str, content: str | bytes) -> Path:
        file = self.tree / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    def collect(self) -> Collected:
        return collect(self.host)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def everything(collected: Collected) -> bytes:
    """All that the archive holds, in plain."""
    archive = packed("a", collected, EVENING)
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as opened:
        return b"".join(file.read() for member in opened if (file := opened.extractfile(member)))


def forms(secret: str) -> dict[bytes, bytes]:
    """A secret as programs write it → the part of it that must not be found.

    Plain, and in base64 behind nothing, one and two bytes of something else, of which the digits at both ends may be
    anything.
    """
    encoded = [
        (encode(b"x" * before + secret.encode() + b"x" * after), before)
        for before in range(3)
        for after in range(3)
        for encode in (base64.b64encode, base64.urlsafe_b64encode)
    ]
    return {secret.encode(): secret.encode()} | {text: text[4 if before else 0 : -4] for text, before in encoded}


def test_the_archive_holds_the_facts_and_says_what_it_lacks(machine: Machine) -> None:
    collected = machine.collect()
    assert collected.members["sidecar/cluster.env"] == b"ISTIO_NAMESPACE='vm'\n"
    assert b"BEGIN CERTIFICATE" in collected.members["sidecar/root-cert.pem"]
    assert collected.missing["sidecar/cert-chain.pem"] == "it is not there"
    assert "network/iptables-save.txt" in collected.missing  # a tree is no running machine
    assert not set(collected.members) & set(collected.missing)


def test_the_token_is_told_by_its_claims_alone(machine: Machine) -> None:
    told = json.loads(machine.collect().members["sidecar/token.json"])
    assert told["claims"]["aud"] == ["istio-ca"]
    assert machine.token.rpartition(".")[2].encode() not in everything(machine.collect())


def test_the_configuration_is_shown_setting_by_setting_with_secrets_masked(machine: Machine) -> None:
    collected = machine.collect()
    shown: dict[str, Any] = json.loads(collected.members["configuration/config.yaml.json"])
    assert shown["endpoint.url"] == "https://mesh.example.com/v1/bundle?(secret)"
    assert shown["endpoint.credential.exec"] == ["/usr/local/bin/get-token", "(secret)", "(secret)"]
    assert shown["healthy_within"] == 60
    drop_in = json.loads(collected.members["configuration/config.d/10-more.yaml.json"])
    assert drop_in == {"endpoint.credential.bearer_token_file": "(secret)", "unknown_setting": "(secret)"}


def test_a_configuration_that_cannot_be_read_is_left_out(machine: Machine) -> None:
    machine.write("/etc/vmmesh-agent/config.yaml", f"endpoint: [{machine.secrets['password']}\n")
    collected = machine.collect()
    assert "sound YAML" in collected.missing["configuration/config.yaml.json"]
    assert machine.secrets["password"].encode() not in everything(collected)


def test_a_secret_that_got_into_a_log_does_not_get_into_the_archive(machine: Machine) -> None:
    known = [machine.token, machine.key.decode().strip(), *machine.secrets.values()]
    known.remove(machine.secrets["unknown"])
    known.remove(machine.secrets["file"])
    every = {form: core for secret in known for form, core in forms(secret).items()}
    leaked = b"".join(b"leaked %s here\n" % form for form in every)
    leaked += json.dumps({"key": machine.key.decode()}).encode() + b"\n"
    machine.write("/var/log/istio/istio.log", leaked)
    written = everything(machine.collect())
    assert b"leaked (secret)" in written
    assert [core for core in every.values() if core in written] == []
    body = [line for line in machine.key.splitlines() if not line.startswith(b"-----")]
    assert [line for line in body if len(line) > 30 and line in written] == []


@pytest.mark.parametrize("what", ["bearer_token_file", "client_certificate.key"])
def test_the_files_that_the_configuration_names_are_secret(machine: Machine, what: str) -> None:
    path = "/srv/credentials/secret"
    machine.write(path, machine.secrets["file"] + "\n")
    credential: object = {what: path}
    if "." in what:
        credential = {"client_certificate": {"key": path, "certificate": "/srv/cert.pem"}}
    machine.write(
        "/etc/vmmesh-agent/config.yaml", json.dumps({"endpoint": {"url": "https://x/", "credential": credential}})
    )
    machine.write("/var/log/istio/istio.log", f"sent {machine.secrets['file']}\n")
    collected = machine.collect()
    assert collected.members["logs/istio.log"] == b"sent (secret)\n"
    assert path.encode() in collected.members["configuration/config.yaml.json"]


def test_what_looks_like_a_secret_of_somebody_else_is_masked(machine: Machine) -> None:
    stranger = CLUSTER.token(service_account="somebody")
    key = CLUSTER.server_certificate(["other"])[1]
    text = f"Authorization: Bearer {random_text()}\n{stranger}\nhttps_proxy=http://user:hunter22@proxy:3128\n".encode()
    machine.write("/var/log/istio/istio.log", text + key)
    log = machine.collect().members["logs/istio.log"]
    assert stranger.rpartition(".")[2].encode() not in log
    assert b"hunter22" not in log
    assert b"PRIVATE KEY" not in log
    assert b"Authorization: Bearer (secret)\n" in log


def test_only_certificates_are_taken_from_the_certificate_files(machine: Machine) -> None:
    chain, key = CLUSTER.server_certificate(["vm1"])
    machine.write("/etc/certs/cert-chain.pem", key + chain)
    content = machine.collect().members["sidecar/cert-chain.pem"]
    assert content.startswith(b"-----BEGIN CERTIFICATE-----")
    assert b"PRIVATE" not in content


def test_of_a_large_log_the_end_is_kept_from_the_beginning_of_a_line_on(machine: Machine) -> None:
    lines = b"".join(b"line %08d\n" % number for number in range(400_000))
    machine.write("/var/log/istio/istio.log", lines)
    collected = machine.collect()
    kept = collected.members["logs/istio.log"]
    assert kept.startswith(b"line ")
    assert kept.endswith(b"line 00399999\n")
    assert len(kept) <= 2 * 1024**2
    assert collected.facts["logs/istio.log"] == {"cut_from": len(lines)}


def test_the_whole_is_bounded(machine: Machine) -> None:
    for number in range(40):
        machine.write(f"/var/log/istio/istio.log.{number}", secrets.token_bytes(64).hex().encode() * 20_000)
    collected = machine.collect()
    assert sum(map(len, collected.members.values())) <= 32 * 1024**2
    assert [name for name in collected.missing if name.startswith("logs/")]


def test_links_and_pipes_in_the_log_folder_lead_nowhere(machine: Machine) -> None:
    log = machine.write("/var/log/istio/istio.log", "fine\n")
    secret = machine.write("/etc/shadow", "root:hash")
    (log.parent / "istio.err.log").symlink_to(secret)
    collected = machine.collect()
    assert "logs/istio.err.log" in collected.missing
    assert b"root:hash" not in everything(collected)


def test_the_manifest_lists_every_member_with_its_digest(machine: Machine) -> None:
    collected = machine.collect()
    archive = packed("vmmesh-vm1", collected, EVENING)
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as opened:
        contents = {entry.name: opened.extractfile(entry) for entry in opened}
        assert {entry.mode for entry in opened} == {0o600}
        read = {name.removeprefix("vmmesh-vm1/"): file.read() for name, file in contents.items() if file}
    manifest = json.loads(read.pop("manifest.json"))
    assert manifest["schema"] == "vmmesh.support/v1"
    assert {each["name"]: (each["size"], each["sha256"]) for each in manifest["members"]} == {
        name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in read.items()
    }
    assert {each["name"] for each in manifest["missing"]} == set(collected.missing)
    assert gzip.decompress(archive)


def test_the_archive_is_named_by_host_and_time(machine: Machine) -> None:
    assert archive_name(machine.host, EVENING).endswith("-20260304T201530Z")
