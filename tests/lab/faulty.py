"""A faulty HTTPS server on the cluster's side: sends exactly the bytes that a test gives it, as slowly as it says.

    python -m lab.faulty --listen ADDRESS:PORT --script FILE --log FILE

The script says what the server shows and answers; it is read anew for each connection, so a test changes it while the
server runs. What the server heard it writes down, a JSON object a line, with the time and the number of the script:
`connection`, then `handshake` or `no-handshake` (with the reason), then `request` with all that came before its end.
"""

import argparse
import base64
import json
import select
import socket
import socketserver
import ssl
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lab.network import CLUSTER_IPV4, Network
from lab.run import Run
from lab.services import Service

PORT = 16443
_PATIENCE = 60.0  # seconds after which a connection is dropped, whatever the script says


@dataclass(frozen=True)
class Answer:
    """What is sent for one request: `head`, then `body` as often as `times` says, then the `end` of the connection.

    `pause` is slept before each byte of the part that is `slow`. Without a byte to send and with `reset`, the
    connection is reset before the answer; with `hang` it is never answered.
    """

    head: bytes = b""
    body: bytes = b""
    times: int = 1
    slow: Literal["", "head", "body"] = ""
    pause: float = 1.0
    end: Literal["close", "reset", "hang"] = "close"


def http(
    status: int = 200,
    body: bytes = b"",
    *,
    headers: Mapping[str, str] | None = None,
    times: int = 1,
    length: int | None = None,
    slow: Literal["", "head", "body"] = "",
    end: Literal["close", "reset", "hang"] = "close",
) -> Answer:
    """An HTTP answer that is sound but for what is asked for.

    `length` is a Content-Length in place of the right one; -1 leaves it out. Header names and values are sent as
    they are, in Latin-1.
    """
    declared = len(body) * times if length is None else length
    lines = [f"HTTP/1.1 {status} Told", "Connection: close"]
    lines += [] if declared < 0 else [f"Content-Length: {declared}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    head = "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1")
    return Answer(head, body, times, slow=slow, end=end)


class Faulty(Service):
    """The server, at `url`; a context manager."""

    def __init__(self, *, network: Network, run: Run) -> None:
        super().__init__("faulty", ready="listening", network=network, run=run)
        self.address = f"{CLUSTER_IPV4}:{PORT}"
        self.url = f"https://{self.address}/v1/bundle"
        self._script = self.folder / "script.json"
        self._heard = self.folder / "heard.jsonl"
        self._number = 0

    def argv(self) -> list[str]:
        """The command line, after `python`."""
        return ["-m", "lab.faulty", f"--listen={self.address}", f"--script={self._script}", f"--log={self._heard}"]

    def show(self, answers: Sequence[Answer], identity: tuple[bytes, bytes] | None) -> None:
        """Give these answers from now on, one after the other, the last one again and again.

        `identity` is the certificate chain and the key (PEM); without it the port speaks plain HTTP.
        """
        self._number += 1
        identity_file = self.folder / f"identity-{self._number}.pem"
        identity_file.write_bytes(b"".join(reversed(identity or (b"", b""))))
        document = {
            "number": self._number,
            "identity": str(identity_file) if identity else "",
            "answers": [
                {name: _packed(value) for name, value in asdict(answer).items()} for answer in answers
            ],
        }  # fmt: skip
        fresh = self._script.with_suffix(".new")
        fresh.write_text(json.dumps(document))
        fresh.rename(self._script)

    def heard(self, event: str) -> list[dict[str, Any]]:
        """What it noted of one kind since the last `show`."""
        if not self._heard.exists():
            return []
        lines = [json.loads(line) for line in self._heard.read_text().splitlines()]
        return [line for line in lines if line["event"] == event and line["number"] == self._number]


def _packed(value: object) -> object:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


# --- the program ------------------------------------------------------------


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], script: Path, log: Path) -> None:
        super().__init__(address, _Connection)
        self._script = script
        self._log = log
        self._asked: dict[int, int] = {}

    def script(self) -> dict[str, Any]:
        return dict(json.loads(self._script.read_text()))

    def note(self, event: str, number: int, **more: Any) -> None:
        # One write of one line: threads and readers never see half of it.
        with self._log.open("a") as log:
            log.write(json.dumps({"event": event, "number": number, "time": time.time(), **more}) + "\n")

    def answer(self, script: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to the next request of this script."""
        turn = self._asked.get(script["number"], 0)
        self._asked[script["number"]] = turn + 1
        answers: list[dict[str, Any]] = script["answers"]
        return answers[min(turn, len(answers) - 1)]


class _Connection(socketserver.BaseRequestHandler):
    server: _Server
    request: socket.socket

    def handle(self) -> None:
        script = self.server.script()
        number: int = script["number"]
        self.server.note("connection", number)
        self.request.settimeout(_PATIENCE)
        connection = self.request
        if script["identity"]:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(script["identity"])
            try:
                connection = context.wrap_socket(self.request, server_side=True)
            except OSError as error:
                self.server.note("no-handshake", number, reason=str(error))
                return
            self.server.note("handshake", number)
        try:
            # What comes without TLS is most likely a handshake: a server of plain HTTP answers that at once.
            head = _until_empty_line(connection) if script["identity"] else connection.recv(64 * 1024)
            if head:
                self.server.note("request", number, head=head.decode("latin-1"))
            if head.endswith(b"\r\n\r\n") or not script["identity"]:
                _play(connection, self.server.answer(script))
        except OSError as error:  # the other side has had enough
            self.server.note("gone", number, reason=str(error))
        finally:
            connection.close()


def _until_empty_line(connection: socket.socket) -> bytes:
    head = b""
    while not head.endswith(b"\r\n\r\n") and (more := connection.recv(64 * 1024)):
        head += more
    return head


def _play(connection: socket.socket, answer: Mapping[str, Any]) -> None:
    for part, times in (("head", 1), ("body", answer["times"])):
        content = base64.b64decode(answer[part])
        for _ in range(times):
            if answer["slow"] == part:
                for position in range(len(content)):
                    time.sleep(answer["pause"])
                    connection.sendall(content[position : position + 1])
            else:
                connection.sendall(content)
    if answer["end"] == "hang":
        select.select([connection], [], [], _PATIENCE)
    elif answer["end"] == "reset":
        # Closed while it lingers for no time at all: the kernel sends RST in place of FIN (socket(7)).
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    elif isinstance(connection, ssl.SSLSocket):
        connection.unwrap()


def main() -> int:
    """Serve until killed."""
    parser = argparse.ArgumentParser(prog="lab.faulty", description="a faulty HTTPS server for tests")
    parser.add_argument("--listen", required=True)
    parser.add_argument("--script", required=True, type=Path)
    parser.add_argument("--log", required=True, type=Path)
    options = parser.parse_args()
    address, _, port = options.listen.rpartition(":")
    with _Server((address, int(port)), options.script, options.log) as server:
        sys.stdout.write("listening\n")
        sys.stdout.flush()
        server.serve_forever()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
