"""Clients that are slow, greedy or rude do not keep the others waiting, nor the server from stopping."""

import os
import signal
from contextlib import ExitStack, suppress

from endpoint.serving import Setup, error_of, eventually
from endpoint.test_packages import build_deb


def test_handshakes_that_never_finish_hold_up_nobody(setup: Setup) -> None:
    token = setup.token()
    with setup.serving() as server, ExitStack() as stack:
        dawdlers = [stack.enter_context(server.dial()) for _ in range(50)]
        dawdlers[0].sendall(b"\x16\x03\x01\x02\x00\x01")
        assert server.get(token=token).status_code == 200
        assert dawdlers[0].recv(1) == b""  # given up by the server, not by this side's time limit


def test_a_request_that_never_ends_is_given_up(setup: Setup) -> None:
    token = setup.token()
    with setup.serving() as server, server.connect() as slow:
        slow.sendall(b"GET /v1/bundle HTTP/1.1\r\nHost: x\r\nX-Slow:")
        assert server.get(token=token).status_code == 200
        with suppress(ConnectionResetError):  # as good
            assert slow.recv(1) == b""


def test_headers_without_end_are_refused(setup: Setup) -> None:
    token = setup.token()
    with setup.serving() as server, server.connect() as greedy:
        greedy.sendall(b"GET /v1/bundle HTTP/1.1\r\nHost: x\r\nX-Much: " + b"a" * 20_000)
        assert greedy.recv(100).startswith(b"HTTP/1.1 400 ")
        assert server.get(token=token).status_code == 200


def test_a_body_is_never_read(setup: Setup) -> None:
    token = setup.token()
    with setup.serving() as server, server.connect() as greedy:
        greedy.sendall(b"POST /v1/bundle HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
        assert greedy.recv(100).startswith(b"HTTP/1.1 405 ")
        assert server.get(token=token).status_code == 200


def test_the_server_stops_although_clients_hang_on(setup: Setup) -> None:
    setup.token()
    with setup.serving() as server, server.dial(), server.connect() as idle, server.connect() as half:
        half.sendall(b"GET /v1/bundle HTTP/1.1\r\n")
        idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle.recv(100).startswith(b"HTTP/1.1 200 ")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=15) == 0


def test_a_download_that_nobody_takes_does_not_keep_the_server_from_stopping(setup: Setup) -> None:
    build_deb(setup.folder / "deb", setup.packages / "istio-sidecar.deb", payload=os.urandom(40_000_000))
    token = setup.token()
    with setup.serving() as server, server.connect() as lazy:
        request = f"GET /v1/packages/istio-sidecar.deb HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n"
        lazy.sendall(request.encode())
        assert lazy.recv(12) == b"HTTP/1.1 200"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=15) == 0
        assert {line["level"] for line in server.log_lines("stopped")} == {"info"}
        assert "exception" not in server.log()


def test_more_connections_than_it_has_room_for_are_told_to_come_back(setup: Setup) -> None:
    token = setup.token()
    with setup.serving() as server:
        with ExitStack() as stack:
            for _ in range(500):
                stack.enter_context(server.connect())
            answer = server.get(token=token)
            assert error_of(answer) == (503, "busy")
            assert answer.headers["retry-after"] == "5"
        later = eventually(lambda: server.get(token=token), lambda answer: answer.status_code == 200)
        assert later.status_code == 200
