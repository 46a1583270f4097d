"""The endpoint as it looks to a machine whose clock is wrong: the same answers, with another moment in `Date`.

    python -m system.skewed --listen ADDRESS:PORT --endpoint ADDRESS:PORT --identity FILE --offset FILE

Machines of the lab share the clock of their host, so not the machine's clock is wrong but the one it is compared
with. `--offset` names a file with seconds, read anew at each request; `--identity` holds key and chain in PEM.
"""

import argparse
import http.client
import http.server
import ssl
import time
from email.utils import formatdate
from pathlib import Path

from lab.cluster import Authority, Cluster
from lab.network import Network
from lab.run import Run
from lab.services import Service
from system.web import pin

PORT = 15444


class Skewed(Service):
    """The program below, in front of the endpoint at `address`; its clock is right until `runs` says otherwise."""

    def __init__(self, address: str, endpoint_port: int, *, network: Network, run: Run) -> None:
        super().__init__("skewed", ready="listening", network=network, run=run)
        authority = Authority.create("A clock that is wrong")
        certificate, key = Cluster.create().server_certificate([address], ca=authority)
        self._identity = self.folder / "identity.pem"
        self._identity.write_bytes(key + certificate + authority.pem)
        self._offset = self.folder / "offset"
        self._addresses = (f"{address}:{PORT}", f"{address}:{endpoint_port}")
        self.url = f"https://{address}:{PORT}/v1/bundle"
        self.pin = pin(authority.pem)
        self.runs(0)

    def argv(self) -> list[str]:
        """The command line, after `python`."""
        listen, endpoint = self._addresses
        files = [f"--identity={self._identity}", f"--offset={self._offset}"]
        return ["-m", "system.skewed", f"--listen={listen}", f"--endpoint={endpoint}", *files]

    def runs(self, seconds: float) -> None:
        """Let its clock be ahead by so many seconds from now on."""
        self._offset.write_text(str(seconds))


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, options: argparse.Namespace) -> None:
        address, _, port = options.listen.rpartition(":")
        super().__init__((address, int(port)), _Handler)
        self.endpoint: str = options.endpoint
        self.offset: Path = options.offset
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(options.identity)
        self.socket = self._context.wrap_socket(self.socket, server_side=True)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # it is on this very machine
        context.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection(self.server.endpoint, context=context, timeout=20)
        connection.request("GET", self.path, headers=dict(self.headers.items()))
        answer = connection.getresponse()
        body = answer.read()
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in {"date", "transfer-encoding", "connection"}:
                self.send_header(name, value)
        self.send_header("Date", formatdate(time.time() + float(self.server.offset.read_text()), usegmt=True))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
        """Say nothing."""


def main() -> int:
    """Serve until the process is killed."""
    parser = argparse.ArgumentParser(prog="system.skewed")
    parser.add_argument("--listen", required=True)
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--identity", type=Path, required=True)
    parser.add_argument("--offset", type=Path, required=True)
    server = _Server(parser.parse_args())
    print("listening", flush=True)  # noqa: T201  the lab waits for it
    server.serve_forever()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
