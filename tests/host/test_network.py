"""The network child against a real HTTPS server on loopback, with every fault that a server can have."""

import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pytest

from factories import CLUSTER, MOMENT, STRANGER, a_bundle, a_config
from fakes import Answer, Endpoint, http, tls_of
from lab.cluster import Authority, as_json, as_tar
from vmmesh_agent import bundle as bundles
from vmmesh_agent.config import ClientCertificate, Config, Credential
from vmmesh_agent.errors import AgentError, FetchError
from vmmesh_agent.fetch import Fetched, fetch
from vmmesh_agent.host import Host
from vmmesh_agent.x509 import read_pem

PATH = PurePosixPath
CONTENTS = dict(a_bundle().files)
GOOD = http("200 OK", as_json(CONTENTS), Content_Type=bundles.MEDIA_TYPE, ETag='"one"')
CA_PIN = read_pem(CLUSTER.root_pem.decode())[0].pin
STRANGER_PIN = read_pem(STRANGER.pem.decode())[0].pin
K = TypeVar("K")
Serve = Callable[..., Endpoint]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/machine-id").write_text("0f" * 16 + "\n")
    (tree / "ca.pem").write_bytes(CLUSTER.root_pem)
    (tree / "token").write_text("join-me\n")
    return Host(tree)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start a server: its answers, and what is special about its TLS."""
    with ExitStack() as stack:

        def start(*answers: Answer, tls: ssl.SSLContext | None = None, plain: bool = False, **special: Any) -> Endpoint:
            context = None if plain else tls or tls_of(CLUSTER, tmp_path, **special)
            return stack.enter_context(Endpoint(context, answers or (GOOD,)).serving())

        yield start


def trusting(endpoint: Endpoint, **settings: Any) -> Config:
    return a_config(endpoint.url, **{"ca_file": PATH("/ca.pem"), "timeout": 60.0, **settings})


def trouble_of(host: Host, config: Config) -> FetchError:
    """Return the first trouble: a refusal, or what would be retried."""

    def enough(error: AgentError) -> None:
        raise error

    with pytest.raises(FetchError) as caught:
        fetch(host, config, patience=200, on_retry=enough)
    assert caught.value.message.isprintable()
    assert caught.value.hint
    return caught.value


def at_once(tasks: Mapping[K, Callable[[], FetchError]]) -> dict[K, FetchError]:
    """Do several things side by side, for most of a fetch is the start of its child."""
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(tasks, pool.map(lambda task: task(), tasks.values()), strict=True))


def all_of(fetched: Fetched) -> dict[str, bytes]:
    assert fetched.bundle
    return dict(fetched.bundle.files)


# --- what is well ---


def test_a_bundle_arrives(host: Host, serve: Serve) -> None:
    endpoint = serve()
    fetched = fetch(host, trusting(endpoint), patience=200)
    assert all_of(fetched) == CONTENTS
    assert fetched.etag == '"one"'
    assert endpoint.requests[0].startswith("GET /v1/bundle HTTP/1.1\r\n")
    assert bundles.MEDIA_TYPE in (endpoint.header("Accept") or "")
    assert (endpoint.header("User-Agent") or "").startswith("vmmesh-agent/")
    assert endpoint.header("Authorization") is None


def test_an_archive_arrives_too(host: Host, serve: Serve) -> None:
    endpoint = serve(http("200 OK", as_tar(CONTENTS), Content_Type="application/gzip"))
    assert all_of(fetch(host, trusting(endpoint), patience=200)) == CONTENTS


def test_a_chunked_answer_arrives(host: Host, serve: Serve) -> None:
    body = as_json(CONTENTS)
    pieces = b"".join(
        f"{len(body[n : n + 100]):x}\r\n".encode() + body[n : n + 100] + b"\r\n" for n in range(0, len(body), 100)
    )
    endpoint = serve(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n")
    assert all_of(fetch(host, trusting(endpoint), patience=200)) == CONTENTS


def test_the_machine_and_the_workload_are_named_and_the_token_sent(host: Host, serve: Serve) -> None:
    endpoint = serve()
    fetch(host, trusting(endpoint, credential=Credential(join_token_file=PATH("/token"))), patience=200)
    assert endpoint.header("Authorization") == "Bearer join-me"
    machine = endpoint.header("Vmmesh-Machine") or ""
    assert len(machine) == 64
    assert "0f" * 16 not in machine


def test_what_has_not_changed_is_not_sent_again(host: Host, serve: Serve) -> None:
    endpoint = serve(http("304 Not Modified"))
    fetched = fetch(host, trusting(endpoint), etag='"one"', patience=200)
    assert (fetched.bundle, fetched.etag) == (None, '"one"')
    assert endpoint.header("If-None-Match") == '"one"'


@pytest.mark.parametrize("etag", ['"one"', 'W/"one"'])
def test_a_proxy_may_have_weakened_the_etag_of_what_has_not_changed(host: Host, serve: Serve, etag: str) -> None:
    endpoint = serve(http("304 Not Modified", ETag=etag))
    assert fetch(host, trusting(endpoint), etag='"one"', patience=200).bundle is None


def test_another_bundle_than_ours_has_not_changed_is_no_answer(host: Host, serve: Serve) -> None:
    endpoint = serve(http("304 Not Modified", ETag='"two"'))
    with pytest.raises(FetchError) as caught:
        fetch(host, trusting(endpoint), etag='"one"', patience=200)
    assert (caught.value.code, caught.value.retry) == ("endpoint-malformed-answer", True)
    assert len(endpoint.requests) == 1  # the same question again would have the same answer


def test_an_etag_that_could_not_be_sent_back_is_not_kept(host: Host, serve: Serve) -> None:
    endpoint = serve(GOOD.replace(b'"one"', 'W/"é"'.encode()))
    assert fetch(host, trusting(endpoint), patience=200).etag == ""


# --- trust ---


def test_a_pinned_ca_is_enough(host: Host, serve: Serve) -> None:
    endpoint = serve(shown=CLUSTER.root_pem)
    for pins in ((CA_PIN,), (STRANGER_PIN, CA_PIN)):
        fetched = fetch(host, trusting(endpoint, ca_file=None, ca_pins=pins), patience=200)
        assert all_of(fetched) == CONTENTS


def test_a_pinned_leaf_is_enough(host: Host, serve: Serve, tmp_path: Path) -> None:
    endpoint = serve()
    leaf = read_pem((tmp_path / "server.pem").read_text().partition("-----BEGIN PRIVATE")[0])[0]
    assert all_of(fetch(host, trusting(endpoint, ca_file=None, ca_pins=(leaf.pin,)), patience=200)) == CONTENTS


def test_a_pin_of_the_root_in_the_ca_file_is_enough(host: Host, serve: Serve) -> None:
    endpoint = serve()  # the root itself is not shown
    assert all_of(fetch(host, trusting(endpoint, ca_pins=(CA_PIN,)), patience=200)) == CONTENTS


def test_none_of_the_pins_means_that_nothing_is_sent(host: Host, serve: Serve) -> None:
    endpoint = serve(shown=CLUSTER.root_pem)
    settings = {"ca_file": None, "ca_pins": (STRANGER_PIN,), "credential": Credential(join_token_file=PATH("/token"))}
    error = trouble_of(host, trusting(endpoint, **settings))
    assert (error.code, error.retry) == ("endpoint-pin-mismatch", False)
    assert f"{CA_PIN} (CA)" in error.message
    assert endpoint.requests == []


@pytest.mark.parametrize("name", ["cluster.local", "another name"])
def test_showing_the_genuine_ca_without_its_key_gains_nothing(host: Host, serve: Serve, name: str) -> None:
    """The CA's certificate is public: an attacker can put it behind a certificate of their own making."""
    attacker = Authority.create(name)
    endpoint = serve(shown=CLUSTER.root_pem, ca=attacker)
    settings = {"ca_file": None, "ca_pins": (CA_PIN,), "credential": Credential(join_token_file=PATH("/token"))}
    error = trouble_of(host, trusting(endpoint, **settings))
    assert error.code == "endpoint-unknown-ca" or error.code.startswith("endpoint-handshake"), error.message
    assert endpoint.requests == []


def test_a_pinned_ca_does_not_make_another_name_right(host: Host, serve: Serve) -> None:
    endpoint = serve(shown=CLUSTER.root_pem, names=["other.example.com"])
    error = trouble_of(host, trusting(endpoint, ca_file=None, ca_pins=(CA_PIN,)))
    assert error.code == "endpoint-wrong-name"
    assert endpoint.requests == []


UNTRUSTED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown CA": ({"ca": STRANGER}, "endpoint-unknown-ca"),
    "another name": ({"names": ["other.example.com"]}, "endpoint-wrong-name"),
    "another address": ({"names": ["127.0.0.2"]}, "endpoint-wrong-name"),
    "expired": (
        {"not_before": MOMENT.replace(year=2001), "not_after": MOMENT.replace(year=2002)},
        "endpoint-certificate-expired",
    ),
    "not yet valid": (
        {"not_before": MOMENT.replace(year=2090), "not_after": MOMENT.replace(year=2091)},
        "endpoint-certificate-not-yet-valid",
    ),
    "wants a certificate": ({"client_ca": CLUSTER.root_pem}, "endpoint-unauthorized"),
    "plain HTTP": ({"plain": True}, "endpoint-not-tls"),
}


def test_a_server_that_is_not_trusted_is_told_nothing(host: Host, serve: Serve) -> None:
    endpoints = {name: serve(http("400 Bad Request"), **special) for name, (special, _) in UNTRUSTED.items()}
    credential = Credential(join_token_file=PATH("/token"))
    found = at_once(
        {name: partial(trouble_of, host, trusting(e, credential=credential)) for name, e in endpoints.items()}
    )
    assert {name: (error.code, error.retry) for name, error in found.items()} == {
        name: (code, False) for name, (_, code) in UNTRUSTED.items()
    }
    assert not [request for endpoint in endpoints.values() for request in endpoint.requests if "join-me" in request]


def test_an_expired_ca_is_not_told_as_the_servers_own_certificate(host: Host, serve: Serve) -> None:
    ca = Authority.create("Old", not_before=MOMENT.replace(year=2001), not_after=MOMENT.replace(year=2002))
    endpoint = serve(ca=ca, shown=ca.pem)
    pin = read_pem(ca.pem.decode())[0].pin
    error = trouble_of(host, trusting(endpoint, ca_file=None, ca_pins=(pin,)))
    assert error.code == "endpoint-certificate-expired"
    assert "or its CA's" in error.message


# What a server sends instead of its part of the handshake → what the remedy speaks of.
HANDSHAKES = {
    "an alert: no common cipher": (b"\x15\x03\x03\0\2\2\x28", "TLS 1.2"),
    "an alert: no common version": (b"\x15\x03\x03\0\2\2\x46", "TLS 1.2"),
    "the end of the connection": (b"", "firewall"),
}


def test_a_handshake_that_fails_is_told_in_words(host: Host, serve: Serve) -> None:
    endpoints = {name: serve(answer, plain=True) for name, (answer, _) in HANDSHAKES.items()}
    found = at_once({name: partial(trouble_of, host, trusting(endpoint)) for name, endpoint in endpoints.items()})
    for name, (_, remedy) in HANDSHAKES.items():
        assert (found[name].code, found[name].retry) == ("endpoint-handshake-failed", True), name
        assert remedy in found[name].hint, name
        assert "_ssl.c" not in found[name].message


@pytest.mark.parametrize("pins", [(), (CA_PIN,)], ids=["by CA file", "by pin"])
def test_silence_in_the_handshake_is_not_told_as_a_host_that_is_down(
    host: Host, serve: Serve, pins: tuple[str, ...]
) -> None:
    enough = threading.Event()
    endpoint = serve(lambda _: enough.wait(120), plain=True)
    assert trouble_of(host, trusting(endpoint, timeout=2.0, ca_pins=pins)).code == "endpoint-handshake-silent"
    enough.set()


def test_a_ca_file_without_a_certificate_is_named(host: Host, serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "tree/ca.pem").write_text("hello\n")
    assert trouble_of(host, trusting(serve())).code == "ca-file-invalid"


def test_a_client_certificate_is_shown(host: Host, serve: Serve, tmp_path: Path) -> None:
    certificate, key = CLUSTER.server_certificate(["vm.example.com"])
    (tmp_path / "tree/vm.pem").write_bytes(certificate)
    (tmp_path / "tree/vm.key").write_bytes(key)
    endpoint = serve(client_ca=CLUSTER.root_pem, shown=CLUSTER.root_pem)
    credential = Credential(client_certificate=ClientCertificate(PATH("/vm.pem"), PATH("/vm.key")))
    for trust in ({}, {"ca_file": None, "ca_pins": (CA_PIN,)}):
        assert all_of(fetch(host, trusting(endpoint, credential=credential, **trust), patience=200)) == CONTENTS


def test_a_key_that_does_not_fit_its_certificate_is_named(host: Host, serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "tree/vm.pem").write_bytes(CLUSTER.server_certificate(["vm.example.com"])[0])
    (tmp_path / "tree/vm.key").write_bytes(STRANGER.key_pem)
    credential = Credential(client_certificate=ClientCertificate(PATH("/vm.pem"), PATH("/vm.key")))
    error = trouble_of(host, trusting(serve(), credential=credential))
    assert error.code == "client-certificate-invalid"
    assert "PRIVATE" not in error.message


# --- what a server may answer ---


ANSWERS: list[tuple[bytes, str, bool]] = [
    (http("401 Unauthorized", b'{"error": {"code": "x", "message": "who are you"}}'), "endpoint-unauthorized", False),
    (http("403 Forbidden", b"not for you", Content_Type="text/plain"), "endpoint-forbidden", False),
    (http("404 Not Found"), "endpoint-not-found", False),
    (http("410 Gone"), "endpoint-gone", False),
    (http("400 Bad Request"), "endpoint-refused", False),
    (http("204 No Content"), "endpoint-refused", False),
    (http("408 Request Timeout"), "endpoint-failing", True),
    (http("429 Too Many Requests"), "endpoint-busy", True),
    (http("500 Internal Server Error"), "endpoint-failing", True),
    (http("503 Service Unavailable", b"\x1b[2J" * 5000), "endpoint-failing", True),
    (http("302 Found", Location="https://127.0.0.1/elsewhere"), "endpoint-redirects", False),
    (http("304 Not Modified"), "endpoint-malformed-answer", False),
    (http("200 OK", b"x", Content_Encoding="gzip"), "endpoint-malformed-answer", False),
    (http("200 OK", b"<html>log in</html>"), "bundle-unknown-format", True),
    (http("200 OK"), "bundle-unknown-format", True),
    (http("200 OK", b"x" * (bundles.MAX_BYTES + 1)), "endpoint-sent-too-much", False),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nhello", "endpoint-broke-off", True),
    (b"", "endpoint-broke-off", True),
    (b"SSH-2.0-OpenSSH_9.2\r\n", "endpoint-broke-off", True),
    (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 100_000, "endpoint-broke-off", True),
    (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n", "endpoint-broke-off", True),
]


def test_an_answer_that_is_no_bundle_is_told_by_its_code(host: Host, serve: Serve) -> None:
    endpoints = [serve(answer) for answer, _, _ in ANSWERS]
    found = at_once({n: partial(trouble_of, host, trusting(endpoint)) for n, endpoint in enumerate(endpoints)})
    assert [(answer[:40], found[n].code, found[n].retry) for n, (answer, _, _) in enumerate(ANSWERS)] == [
        (answer[:40], code, retry) for answer, code, retry in ANSWERS
    ]
    assert [error.message for error in found.values() if len(error.message) > 600] == []


def test_the_servers_own_words_are_passed_on(host: Host, serve: Serve) -> None:
    body = b'{"error": {"code": "x", "message": "the token was used at another machine"}}'
    assert "the token was used at another machine" in trouble_of(host, trusting(serve(http("410 Gone", body)))).message


def test_an_answer_without_end_is_cut_off(host: Host, serve: Serve) -> None:
    def endless(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(10_000):
            connection.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")

    assert trouble_of(host, trusting(serve(endless))).code == "endpoint-sent-too-much"


def test_a_byte_now_and_then_does_not_keep_us_for_ever(host: Host, serve: Serve) -> None:
    def dripping(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        for _ in range(400):
            connection.sendall(b" ")
            time.sleep(0.05)

    error = trouble_of(host, trusting(serve(dripping), timeout=1.0))
    assert (error.code, error.retry) == ("endpoint-too-slow", True)


def test_a_server_that_says_nothing_is_too_slow(host: Host, serve: Serve) -> None:
    enough = threading.Event()

    def silent(_: socket.socket) -> None:
        enough.wait(120)

    endpoint = serve(silent)
    assert trouble_of(host, trusting(endpoint, timeout=1.0)).code == "endpoint-too-slow"
    enough.set()


def test_nobody_at_the_port(host: Host) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    error = trouble_of(host, a_config(f"https://127.0.0.1:{port}/", timeout=60.0))
    assert (error.code, error.retry) == ("endpoint-refuses-connections", True)


def test_nobody_of_that_name(host: Host) -> None:
    error = trouble_of(host, a_config("https://no-such-host.invalid/", timeout=60.0))
    assert (error.code, error.retry) == ("endpoint-name-not-found", True)


# --- trying again ---


def test_what_can_pass_is_tried_again_and_told(host: Host, serve: Serve) -> None:
    endpoint = serve(b"", http("503 Service Unavailable"), GOOD)
    told: list[str] = []
    fetched = fetch(host, trusting(endpoint), patience=200, on_retry=lambda error: told.append(error.code))
    assert all_of(fetched) == CONTENTS
    assert told == ["endpoint-broke-off", "endpoint-failing"]


def test_a_server_that_asks_for_more_time_than_there_is_is_left_alone_at_once(host: Host, serve: Serve) -> None:
    endpoint = serve(http("429 Too Many Requests", Retry_After="3600"), GOOD)
    with pytest.raises(FetchError) as caught:
        fetch(host, trusting(endpoint), patience=200)
    assert (caught.value.code, caught.value.retry) == ("endpoint-busy", True)
    assert caught.value.retry_after >= 600
    assert len(endpoint.requests) == 1


def test_a_server_that_asks_for_time_gets_it(host: Host, serve: Serve) -> None:
    endpoint = serve(http("429 Too Many Requests", Retry_After="60"), GOOD)
    told: list[AgentError] = []

    def look(pauses: Iterator[int]) -> None:
        if told and next(pauses) == 10:  # longer than any first back-off
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fetch(host, trusting(endpoint), patience=200, on_retry=told.append, idle=partial(look, count()))
    assert [error.code for error in told] == ["endpoint-busy"]
    assert len(endpoint.requests) == 1


def test_the_last_trouble_is_told_when_patience_ends(host: Host, serve: Serve) -> None:
    with pytest.raises(FetchError) as caught:
        fetch(host, trusting(serve(http("500 Oops"))), patience=1)
    assert caught.value.code in {"endpoint-failing", "endpoint-unreachable"}
    assert caught.value.retry


# --- proxies ---


def test_a_proxy_of_the_environment_is_used(host: Host, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = serve(http("407 Proxy Authentication Required"), plain=True)
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setenv("no_proxy", "")
    error = trouble_of(host, a_config("https://mesh.example.com/v1/bundle", timeout=60.0, ca_file=PATH("/ca.pem")))
    assert (error.code, error.retry) == ("proxy-refused", True)
    assert proxy.requests[0].startswith("CONNECT mesh.example.com:443 ")


def test_a_proxy_that_cannot_be_reached_is_not_told_as_the_endpoint(
    host: Host, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nobody = f"127.0.0.1:{listener.getsockname()[1]}"
    mute = f"127.0.0.1:{serve(b'', plain=True).port}"
    config = a_config("https://mesh.example.com/v1/bundle", timeout=60.0, ca_file=PATH("/ca.pem"))
    for proxy in (nobody, "proxy.invalid:3128", mute):
        monkeypatch.setenv("https_proxy", f"http://{proxy}")
        error = trouble_of(host, config)
        assert (error.code, error.retry) == ("proxy-refused", True), proxy
        assert proxy in error.message
        assert "mesh.example.com" not in error.message
        assert "https_proxy" in error.hint


def test_beyond_a_proxy_it_is_the_endpoint_again(host: Host, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    good, wrong = serve(shown=CLUSTER.root_pem), serve(names=["other.example.com"])

    def tunnel(onward: int, connection: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", onward)) as other:
            connection.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
            while True:
                for end in select.select([connection, other], [], [], 120)[0]:
                    chunk = end.recv(65536)
                    (other if end is connection else connection).sendall(chunk)
                    if not chunk:
                        return

    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{serve(partial(tunnel, good.port), plain=True).port}")
    for trust in ({}, {"ca_pins": (CA_PIN,)}):
        assert all_of(fetch(host, trusting(good, **trust), patience=200)) == CONTENTS
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{serve(partial(tunnel, wrong.port), plain=True).port}")
    error = trouble_of(host, trusting(wrong))
    assert error.code == "endpoint-wrong-name"
    assert f"127.0.0.1:{wrong.port}" in error.message


def test_a_host_may_be_exempt_from_the_proxy(host: Host, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert all_of(fetch(host, trusting(serve()), patience=200)) == CONTENTS


# --- who it is that speaks to the network ---


def process_at_the_other_end(endpoint: Endpoint, connection: socket.socket) -> int:
    """Return the process that holds the client's end of a connection, as /proc tells."""
    port = connection.getpeername()[1]
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(f":{port:04X}") and fields[2].endswith(f":{endpoint.port:04X}"):
            inode = fields[9]
            break
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(file.readlink()) == f"socket:[{inode}]" for file in (folder / "fd").iterdir()):
                return int(folder.name)
        except OSError:
            continue
    raise AssertionError("nobody")


@pytest.mark.skipif(os.geteuid() != 0, reason="drops the rights of root")
@pytest.mark.parametrize("uid", [65534, 997])
def test_the_child_has_no_privileges_and_shows_no_credential(
    host: Host, serve: Serve, tmp_path: Path, uid: int
) -> None:
    if uid != 65534:
        (tmp_path / "tree/etc/passwd").write_text(f"istio-proxy:x:{uid}:{uid}::/var/lib/istio:/bin/false\n")
    seen: dict[str, str] = {}

    def look(connection: socket.socket) -> None:
        child = Path("/proc") / str(process_at_the_other_end(endpoint, connection))
        seen.update({name: (child / name).read_text() for name in ("status", "cmdline", "environ", "limits")})
        connection.sendall(GOOD)

    endpoint = serve(look)
    fetch(host, trusting(endpoint, credential=Credential(join_token_file=PATH("/token"))), patience=200)
    status = dict(line.split(":\t", 1) for line in seen["status"].splitlines() if ":\t" in line)
    assert status["Uid"].split() == status["Gid"].split() == [str(uid)] * 4
    assert status["Groups"].split() == []
    assert {name: int(status[name], 16) for name in ("CapPrm", "CapEff", "CapInh")} == {
        "CapPrm": 0,
        "CapEff": 0,
        "CapInh": 0,
    }
    assert [line.split()[4:6] for line in seen["limits"].splitlines() if "core file" in line] == [["0", "0"]]
    assert "vmmesh_agent.network" in seen["cmdline"]
    assert "join-me" not in seen["cmdline"] + seen["environ"]
    assert "-----BEGIN" not in seen["cmdline"] + seen["environ"]
