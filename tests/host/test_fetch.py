"""The parent of the network child, which believes nothing that it hears; and bundles from this machine."""

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from factories import CLUSTER, a_bundle, a_config
from fakes import Endpoint, http, tls_of
from lab.cluster import as_secret, as_tar, write_directory
from vmmesh_agent.bundle import BundleRefusedError
from vmmesh_agent.config import Credential
from vmmesh_agent.errors import AgentError, FetchError
from vmmesh_agent.fetch import Download, fetch, machine_id, read_bundle
from vmmesh_agent.host import Child, Host

PATH = PurePosixPath
CONTENTS = dict(a_bundle().files)
PACKAGE = os.urandom(300_000)
DIGEST = hashlib.sha256(PACKAGE).hexdigest()
INTO = PATH("/var/cache/package.deb")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes files of root's")


class TakenOver(Host):
    """A machine whose network child was taken over: it does what `script` says."""

    def __init__(self, root: Path, script: str) -> None:
        super().__init__(root)
        self._script = script

    def start(self, argv: Sequence[str], *, pass_descriptors: Sequence[int] = ()) -> Child:
        assert argv[3] == "vmmesh_agent.network"
        return super().start([sys.executable, "-c", self._script], pass_descriptors=pass_descriptors)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tree/var/cache").mkdir(parents=True)
    (tmp_path / "tree/etc").mkdir()
    (tmp_path / "tree/etc/machine-id").write_text("0f" * 16 + "\n")
    (tmp_path / "tree/ca.pem").write_bytes(CLUSTER.root_pem)
    return tmp_path / "tree"


def refusal(host: Host, **settings: Any) -> AgentError:
    with pytest.raises(AgentError) as caught:
        fetch(host, a_config("https://mesh.example.com/", **settings), patience=100)
    assert caught.value.message.isprintable()
    assert caught.value.hint
    return caught.value


# --- a child that was taken over ---


@pytest.mark.parametrize(
    "words",
    [
        "",
        "hello",
        "[]",
        "7",
        "{}",
        '{"event": 7}',
        '{"event": "party"}',
        '{"event": "bundle"}',
        '{"event": "bundle", "bundle": []}',
        '{"event": "stored"}',
        '{"event": "not-modified"}',
        '{"event": "failed"}',
        '{"event": "failed", "message": ["\\u001b[2J"], "code": 7, "hint": null}',
        '{"event": "bundle", "bundle": {"version": 2}}',
        "[" * 50_000,
        "\x1b[2J",
    ],
    ids=lambda words: words[:40],
)
def test_whatever_the_child_says_the_daemon_gets_an_error_it_can_explain(tree: Path, words: str) -> None:
    error = refusal(TakenOver(tree, f"print({words!r})"))
    assert isinstance(error, FetchError | BundleRefusedError)
    assert error.code
    assert len(error.message) < 2500


def test_what_the_child_complained_of_last_is_told(tree: Path) -> None:
    error = refusal(TakenOver(tree, "import sys; sys.exit('first\\nlast words')"))
    assert error.code == "network-child-broken"
    assert "last words" in error.message


def test_an_answer_without_end_is_cut_off(tree: Path) -> None:
    script = "import sys\nwhile True: sys.stdout.write('x' * 1000000)"
    assert refusal(TakenOver(tree, script)).code == "network-child-broken"


def test_a_child_that_says_nothing_is_left_when_patience_ends(tree: Path) -> None:
    with pytest.raises(FetchError) as caught:
        fetch(TakenOver(tree, "import time; time.sleep(60)"), a_config("https://mesh.example.com/"), patience=0.5)
    assert (caught.value.code, caught.value.retry) == ("endpoint-unreachable", True)


@needs_root
def test_a_child_that_changes_what_was_judged_changes_nothing_that_is_installed(tree: Path) -> None:
    """It writes what is expected, lets us look, and writes something else, as long as it lives."""
    (tree / "package").write_bytes(PACKAGE)
    script = f"""
import json, os, sys, time
descriptor = json.loads(sys.stdin.readline())["descriptor"]
good = open({str(tree / "package")!r}, "rb").read()
os.pwrite(descriptor, good, 0)
time.sleep(0.5)
print('{{"event": "stored"}}', flush=True)
while True:
    os.pwrite(descriptor, b"evil", 0)
    os.pwrite(descriptor, good[:4], 0)
"""
    host = TakenOver(tree, script)
    for _ in range(5):
        download = Download(
            host, a_config("https://mesh.example.com/"), url="https://mesh.example.com/p", sha256=DIGEST, into=INTO
        )
        try:
            with contextlib.suppress(FetchError):
                assert host.sha256(download.finish(patience=200)) == DIGEST
                time.sleep(0.05)
                assert host.sha256(INTO) == DIGEST
        finally:
            download.discard()
        host.remove(INTO)


# --- packages ---


def download(host: Host, endpoint: Endpoint, url: str = "", sha256: str = DIGEST, **settings: Any) -> bytes | None:
    config = a_config(endpoint.url, ca_file=PATH("/ca.pem"), timeout=60.0, **settings)
    loading = Download(host, config, url=url or endpoint.url, sha256=sha256, into=INTO)
    seen: list[int] = []

    def enough(error: AgentError) -> None:
        raise error

    try:
        arrived = host.read(loading.finish(patience=200, on_retry=enough, on_progress=seen.append))
    except AgentError:
        assert host.read(INTO) is None  # what was refused is of no use any more
        raise
    finally:
        loading.discard()
    assert host.names_in(INTO.parent) == [INTO.name]
    assert seen == sorted(seen)
    return arrived


def test_a_package_arrives_with_its_digest(tree: Path, tmp_path: Path) -> None:
    with Endpoint(tls_of(CLUSTER, tmp_path), [http("200 OK", PACKAGE)]).serving() as endpoint:
        assert download(Host(tree), endpoint) == PACKAGE
    assert os.listdir(tree / "var/cache") == [INTO.name]  # kept for another attempt, and nothing else


def test_a_package_with_another_digest_is_refused_and_removed(tree: Path, tmp_path: Path) -> None:
    with (
        Endpoint(tls_of(CLUSTER, tmp_path), [http("200 OK", PACKAGE + b"x")]).serving() as endpoint,
        pytest.raises(FetchError) as caught,
    ):
        download(Host(tree), endpoint)
    assert (caught.value.code, caught.value.retry) == ("package-wrong-digest", False)
    assert os.listdir(tree / "var/cache") == []


def test_a_redirected_package_is_followed_without_the_token(tree: Path, tmp_path: Path) -> None:
    (tree / "token").write_text("join-me")
    context = tls_of(CLUSTER, tmp_path, names=["127.0.0.1", "localhost"])
    with Endpoint(context, [http("200 OK", PACKAGE)]).serving() as store:
        onward = http("302 Found", Location=f"https://localhost:{store.port}/p")
        with Endpoint(context, [onward]).serving() as endpoint:
            assert download(Host(tree), endpoint, credential=Credential(join_token_file=PATH("/token"))) == PACKAGE
        assert endpoint.header("Authorization") == "Bearer join-me"
        assert store.header("Authorization") is None


@pytest.mark.parametrize("target", ["", "http://127.0.0.1:9/p", "file:///etc/passwd"])
def test_a_redirection_in_circles_or_to_plain_http_is_refused(tree: Path, tmp_path: Path, target: str) -> None:
    answers = [http("302 Found", Location=target or "/v1/bundle")]
    with Endpoint(tls_of(CLUSTER, tmp_path), answers).serving() as endpoint, pytest.raises(FetchError) as caught:
        download(Host(tree), endpoint)
    assert caught.value.code == "endpoint-redirects"
    assert "sidecar.package" in caught.value.hint
    assert len(endpoint.requests) < 10
    assert os.listdir(tree / "var/cache") == []


def test_somebody_elses_server_gets_no_credential_and_no_trust(tree: Path, tmp_path: Path) -> None:
    (tree / "token").write_text("join-me")
    with Endpoint(tls_of(CLUSTER, tmp_path), [http("200 OK", PACKAGE)]).serving() as store:
        with Endpoint(tls_of(CLUSTER, tmp_path), [b""]).serving() as endpoint, pytest.raises(FetchError) as caught:
            download(Host(tree), endpoint, url=store.url, credential=Credential(join_token_file=PATH("/token")))
        assert caught.value.code == "endpoint-unknown-ca"  # the CA of the endpoint is not the world's
        assert "endpoint.ca" not in caught.value.hint
        assert store.requests == []


@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden", "404 Not Found", "410 Gone"])
def test_a_package_that_is_not_handed_out_is_not_told_as_the_bundle(tree: Path, tmp_path: Path, status: str) -> None:
    answers = [http(status, b"never heard of it", Content_Type="text/plain")]
    with Endpoint(tls_of(CLUSTER, tmp_path), answers).serving() as endpoint, pytest.raises(FetchError) as caught:
        download(Host(tree), endpoint, url=f"https://127.0.0.1:{endpoint.port}/a.rpm?signature=4711")
    assert (caught.value.code, caught.value.retry) == ("package-missing", False)
    assert f"https://127.0.0.1:{endpoint.port}/a.rpm has no" in caught.value.message
    assert f"({status[:3]}: never heard of it)" in caught.value.message
    assert "4711" not in caught.value.message
    assert "sidecar.package" in caught.value.hint


def test_a_package_cannot_be_unchanged(tree: Path, tmp_path: Path) -> None:
    answers = [http("304 Not Modified")]
    with Endpoint(tls_of(CLUSTER, tmp_path), answers).serving() as endpoint, pytest.raises(FetchError) as caught:
        download(Host(tree), endpoint)
    assert caught.value.code == "endpoint-malformed-answer"


def test_an_address_of_a_package_that_makes_no_sense_is_told_as_such(tree: Path, tmp_path: Path) -> None:
    with Endpoint(tls_of(CLUSTER, tmp_path), []).serving() as endpoint, pytest.raises(FetchError) as caught:
        download(Host(tree), endpoint, url="https://[::1/a.rpm")
    assert caught.value.code == "endpoint-address-invalid"
    assert "sidecar.package" in caught.value.hint


# --- credentials ---


def token_sent(tree: Path, tmp_path: Path, credential: Credential) -> str | None:
    with Endpoint(tls_of(CLUSTER, tmp_path), [http("304 Not Modified")]).serving() as endpoint:
        fetch(
            Host(tree), a_config(endpoint.url, ca_file=PATH("/ca.pem"), credential=credential), etag='"1"', patience=200
        )
        return endpoint.header("Authorization")


def test_a_program_may_give_the_token(tree: Path, tmp_path: Path) -> None:
    assert token_sent(tree, tmp_path, Credential(exec=("/bin/echo", "from-a-program"))) == "Bearer from-a-program"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "credential-missing"),
        (b"", "credential-invalid"),
        (b"two words", "credential-invalid"),
        (b"a\nb: c", "credential-invalid"),
        ("é".encode(), "credential-invalid"),
    ],
)
def test_a_token_that_is_none_is_named_and_not_shown(tree: Path, content: bytes | None, code: str) -> None:
    if content is not None:
        (tree / "token").write_bytes(content)
    error = refusal(Host(tree), credential=Credential(join_token_file=PATH("/token")))
    assert error.code == code
    assert "words" not in error.message


def test_a_program_that_fails_shows_nothing_that_it_printed(tree: Path) -> None:
    error = refusal(Host(tree), credential=Credential(exec=("/bin/sh", "-c", "echo hunter2; echo why >&2; exit 3")))
    assert error.retry
    assert "why" in error.message
    assert "hunter2" not in error.message


def test_a_machine_is_known_by_a_hash_of_its_id(tree: Path) -> None:
    known = machine_id(Host(tree))
    assert known == machine_id(Host(tree))
    (tree / "etc/machine-id").write_text("f0" * 16)
    assert machine_id(Host(tree)) != known


# --- bundles of this machine ---


def test_a_bundle_on_disk_is_read_in_each_form(tree: Path) -> None:
    write_directory(CONTENTS, tree / "srv/a bundle")
    (tree / "srv/archive").write_bytes(as_tar(CONTENTS))
    (tree / "srv/secret").write_bytes(as_secret(CONTENTS))
    for url in ("file:///srv/a%20bundle", "file:///srv/archive", "file:///srv/secret"):
        fetched = fetch(Host(tree), a_config(url))
        assert fetched.bundle
        assert fetched.bundle.files == CONTENTS
        assert fetched.etag


def test_a_folder_is_known_again_until_a_file_in_it_changes(tree: Path) -> None:
    write_directory(CONTENTS, tree / "srv/bundle")
    first = fetch(Host(tree), a_config("file:///srv/bundle")).etag
    assert fetch(Host(tree), a_config("file:///srv/bundle")).etag == first
    (tree / "srv/bundle/hosts").write_text("")
    assert fetch(Host(tree), a_config("file:///srv/bundle")).etag != first


def test_a_bundle_that_is_not_there_may_come_yet(tree: Path) -> None:
    with pytest.raises(FetchError) as caught:
        read_bundle(Host(tree), PATH("/srv/bundle"))
    assert (caught.value.code, caught.value.retry) == ("bundle-not-found", True)


# --- the end of the parent ---


def test_a_child_whose_parent_was_killed_ends_in_the_middle_of_an_answer(tree: Path, tmp_path: Path) -> None:
    script = """
import sys; from pathlib import *; sys.path.insert(0, sys.argv[3])
from factories import a_config; from vmmesh_agent.fetch import fetch; from vmmesh_agent.host import Host
fetch(Host(Path(sys.argv[1])), a_config(sys.argv[2], ca_file=PurePosixPath("/ca.pem"), timeout=300.0))
"""

    def drip(connection: socket.socket) -> None:
        """Keep whoever listens from ever having something to say."""
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while not endpoint.done.wait(0.5):
            connection.sendall(b" ")

    with Endpoint(tls_of(CLUSTER, tmp_path), [drip]).serving() as endpoint:
        argv: list[str | Path] = [sys.executable, "-c", script, tree, endpoint.url, Path(__file__).parents[1]]
        parent = subprocess.Popen(argv)
        eventually(lambda: len(endpoint.requests) > 0)
        (child,) = (int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split())
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        eventually(lambda: not Path(f"/proc/{child}/fd/0").exists())


def eventually(happens: Any) -> None:
    deadline = time.monotonic() + 30
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.05)
