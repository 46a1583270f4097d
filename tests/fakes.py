"""Stateful stand-ins for what a fast test cannot have: they are passed in, and they remember.

`Endpoint` is a real HTTPS server on loopback with faults; `FakeMachine` is a real tree of files whose package
manager and systemd are pretended: installing makes the user and the folders, starting writes the log.
"""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lab.cluster import Authority, Cluster

Answer = bytes | Callable[[socket.socket], None]


def http(status: str, body: bytes = b"", **headers: str) -> bytes:
    """Put an HTTP answer together; `headers` with _ for -."""
    lines = [f"HTTP/1.1 {status}", "Connection: close", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Endpoint:
    """A server that gives its answers one after the other, the last one for ever; it keeps what it was asked."""

    def __init__(self, context: ssl.SSLContext | None, answers: Sequence[Answer]) -> None:
        self._context = context
        self._answers = list(answers)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.requests: list[str] = []
        self.done = threading.Event()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}/v1/bundle"

    def header(self, name: str, number: int = 0) -> str | None:
        """Return a header of one request."""
        for line in self.requests[number].splitlines():
            key, _, value = line.partition(": ")
            if key.lower() == name.lower():
                return value
        return None

    @contextmanager
    def serving(self) -> Iterator["Endpoint"]:
        thread = threading.Thread(target=self._accept)
        thread.start()
        try:
            yield self
        finally:
            self.done.set()
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            thread.join()

    def _accept(self) -> None:
        workers = []
        while not self.done.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                break
            workers.append(threading.Thread(target=self._serve, args=(connection,)))
            workers[-1].start()
        for worker in workers:
            worker.join()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(20)
        with connection, suppress(OSError):
            secured = self._context.wrap_socket(connection, server_side=True) if self._context else connection
            with secured:
                request = b""
                while b"\r\n\r\n" not in request:
                    chunk = secured.recv(4096)
                    if not chunk:
                        return
                    request += chunk
                    if not self._context and not chunk.isascii():
                        break  # a TLS greeting, which a plain server answers at once
                self.requests.append(request.decode(errors="replace"))
                answer = self._answers[min(len(self.requests), len(self._answers)) - 1]
                if callable(answer):
                    answer(secured)
                else:
                    secured.sendall(answer)


def tls_of(
    cluster: Cluster,
    folder: Path,
    *,
    names: Sequence[str] = ("127.0.0.1",),
    shown: bytes = b"",
    ca: Authority | None = None,
    client_ca: bytes = b"",
    **dates: object,
) -> ssl.SSLContext:
    """Return a server's TLS: a certificate for `names`, `shown` behind it in the chain, clients of `client_ca` alone."""
    certificate, key = cluster.server_certificate(names, ca=ca, **dates)  # type: ignore[arg-type]  # dates are its own
    file = folder / "server.pem"
    file.write_bytes(certificate + shown + key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    if client_ca:
        context.load_verify_locations(cadata=client_ca.decode())
        context.verify_mode = ssl.CERT_REQUIRED
    return context
