"""Two small servers on the cluster's side, for what vmmesh-endpoint does not do: files over TLS, and a proxy.

    python -m system.web files --listen ADDRESS:PORT --log FILE --folder DIR --certificate FILE
    python -m system.web proxy --listen ADDRESS:PORT --log FILE

Each writes down all that it hears, a JSON object a line: `event` is `connection`, `handshake` (with `error` where it
failed), or `request` with the `head` as it came. The file server keeps what it heard inside TLS even where it is no
request, so its silence shows that nothing was sent. Neither is fit for more than tests.
"""

import argparse
import hashlib
import json
import select
import socket
import socketserver
import ssl
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from lab.network import CLUSTER_IPV4, Network
from lab.run import Run
from lab.services import Service

FILES_PORT = 8443
PROXY_PORT = 3128

_MAX_HEAD = 64 * 1024


def pin(certificate: bytes) -> str:
    """Return `sha256:<hex>` of the public key (SubjectPublicKeyInfo) of the first certificate in a PEM text."""
    key = x509.load_pem_x509_certificate(certificate).public_key()
    info = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return f"sha256:{hashlib.sha256(info).hexdigest()}"


class Listener(Service):
    """One of the two servers, and what it heard."""

    def __init__(self, name: str, port: int, *, network: Network, run: Run) -> None:
        super().__init__(name, ready="listening", network=network, run=run)
        self.address = f"{CLUSTER_IPV4}:{port}"
        self._log_file = self.folder / "heard.jsonl"

    def common(self) -> list[str]:
        """The options that both have."""
        return [f"--listen={self.address}", f"--log={self._log_file}"]

    def heard(self, event: str) -> list[dict[str, Any]]:
        """All that it noted of one kind since the beginning."""
        if not self._log_file.exists():
            return []
        lines = [json.loads(line) for line in self._log_file.read_text().splitlines()]
        return [line for line in lines if line["event"] == event]


class Files(Listener):
    """A folder over TLS: `publish` a file, and it is there at once."""

    def __init__(self, certificate: bytes, key: bytes, *, network: Network, run: Run) -> None:
        """`certificate` is the chain that is shown (PEM), the leaf first; `key` is the leaf's."""
        super().__init__("files", FILES_PORT, network=network, run=run)
        self.certificate = certificate
        self._identity = self.folder / "identity.pem"
        self._identity.write_bytes(key + certificate)
        self._published = self.folder / "published"
        self._published.mkdir()

    def argv(self) -> list[str]:
        """The command line, after `python`."""
        content = [f"--folder={self._published}", f"--certificate={self._identity}"]
        return ["-m", "system.web", "files", *self.common(), *content]

    def publish(self, name: str, content: bytes | Path) -> str:
        """Serve these bytes, or this file, under a name and return the address."""
        target = self._published / name
        target.unlink(missing_ok=True)
        if isinstance(content, Path):
            target.symlink_to(content.resolve())
        else:
            target.write_bytes(content)
        return f"https://{self.address}/{name}"


class Proxy(Listener):
    """A proxy that knows CONNECT and nothing else."""

    def __init__(self, *, network: Network, run: Run) -> None:
        super().__init__("proxy", PROXY_PORT, network=network, run=run)

    @property
    def url(self) -> str:
        """What belongs into `https_proxy`."""
        return f"http://{self.address}"

    def argv(self) -> list[str]:
        """The command line, after `python`."""
        return ["-m", "system.web", "proxy", *self.common()]


# --- the programs -----------------------------------------------------------


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], handler: type[socketserver.BaseRequestHandler], options: argparse.Namespace
    ) -> None:
        super().__init__(address, handler)
        self.folder: Path | None = options.folder
        self.context: ssl.SSLContext | None = None
        if options.certificate:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(options.certificate)
        self._log: Path = options.log

    def note(self, event: str, **fields: Any) -> None:
        # One write of one line: threads and readers never see half of it.
        with self._log.open("a") as log:
            log.write(json.dumps({"event": event, **fields}) + "\n")


class _FileHandler(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        self.server.note("connection")
        assert self.server.context
        assert self.server.folder
        try:
            connection = self.server.context.wrap_socket(self.request, server_side=True)
        except OSError as error:
            self.server.note("handshake", error=str(error))
            return
        with connection:
            self.server.note("handshake")
            head = _read_head(connection)
            if not head:
                return
            self.server.note("request", head=head)
            file = self.server.folder / head.split()[1].lstrip("/")
            if not file.is_file():
                connection.sendall(_head("404 Not Found", {"Content-Length": "0"}))
                return
            length = {"Content-Length": str(file.stat().st_size), "Content-Type": "application/octet-stream"}
            connection.sendall(_head("200 OK", length))
            with file.open("rb") as content:
                while chunk := content.read(256 * 1024):
                    connection.sendall(chunk)


class _ProxyHandler(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        self.server.note("connection")
        head = _read_head(self.request)
        self.server.note("request", head=head)
        method, target, *_ = head.split()
        if method != "CONNECT":
            self.request.sendall(_head("405 Method Not Allowed", {"Content-Length": "0"}))
            return
        host, _, port = target.rpartition(":")
        with socket.create_connection((host.strip("[]"), int(port))) as onward:
            self.request.sendall(_head("200 Connection established", {}))
            _pump(self.request, onward)


def _pump(one: socket.socket, other: socket.socket) -> None:
    """Pass bytes both ways until either side ends."""
    partner = {one: other, other: one}
    while True:
        readable, _, _ = select.select([one, other], [], [])
        for source in readable:
            try:
                chunk = source.recv(64 * 1024)
                partner[source].sendall(chunk)
            except OSError:
                return
            if not chunk:
                return


def _read_head(connection: socket.socket) -> str:
    head = b""
    try:
        while b"\r\n\r\n" not in head and len(head) < _MAX_HEAD and (chunk := connection.recv(4096)):
            head += chunk
    except OSError:
        pass  # what came before counts all the same
    return head.decode("latin-1")


def _head(status: str, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers.items())]
    if not status.startswith("200 Connection"):
        lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode()


def main() -> int:
    """Serve until the process is killed."""
    parser = argparse.ArgumentParser(prog="system.web")
    parser.add_argument("kind", choices=["files", "proxy"])
    parser.add_argument("--listen", required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--certificate", type=Path)
    options = parser.parse_args()
    host, _, port = options.listen.rpartition(":")
    handler = _FileHandler if options.kind == "files" else _ProxyHandler
    with _Server((host, int(port)), handler, options) as server:
        sys.stdout.write("listening\n")
        sys.stdout.flush()
        server.serve_forever()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
