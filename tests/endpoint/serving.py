"""The installed vmmesh-endpoint as a child process, and a client that speaks real TLS to it."""

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx

from lab.cluster import Cluster, Files, write_directory

COMMAND = Path(sys.executable).with_name("vmmesh-endpoint")
MACHINE = "0f" * 16

T = TypeVar("T")


class Running:
    """A server that is up."""

    def __init__(self, process: subprocess.Popen[str], introduction: str, log_file: Path, ca_file: Path) -> None:
        self.process = process
        self.introduction = introduction
        self.ca_file = ca_file
        self._log_file = log_file
        port = re.search(r"^bundle: https://\S+:([0-9]+)/v1/bundle$", introduction, re.MULTILINE)
        assert port
        self.port = int(port[1])
        self.base = f"https://127.0.0.1:{self.port}"

    def get(
        self,
        path: str = "/v1/bundle",
        *,
        token: str = "",
        machine: str = MACHINE,
        method: str = "GET",
        certificate: tuple[Path, Path] | None = None,
        **headers: str,
    ) -> httpx.Response:
        """Ask on a connection of its own; `headers` with _ for -."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if token:
            sent |= {"authorization": f"Bearer {token}", "vmmesh-machine": machine}
        context = ssl.create_default_context(cafile=self.ca_file)
        if certificate:
            context.load_cert_chain(*certificate)
        with httpx.Client(verify=context, trust_env=False, timeout=30) as client:
            return client.request(method, self.base + path, headers=sent)

    def connect(self) -> ssl.SSLSocket:
        """A connection whose handshake is done."""
        context = ssl.create_default_context(cafile=self.ca_file)
        return context.wrap_socket(self.dial(), server_hostname="127.0.0.1")

    def dial(self) -> socket.socket:
        """A connection without a handshake."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def log(self) -> str:
        """The log so far."""
        return self._log_file.read_text()

    def log_lines(self, event: str) -> list[dict[str, Any]]:
        """The lines about `event` so far."""
        lines = [json.loads(line) for line in self.log().splitlines()]
        return [line for line in lines if line["event"] == event]

    def requests(self, number: int) -> list[dict[str, Any]]:
        """The lines about the requests, of which there are to be so many; each is written after its answer."""
        return eventually(lambda: self.log_lines("request"), lambda lines: len(lines) >= number)


class Setup:
    """A folder with a sound bundle, a state directory, and the commands on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cluster = Cluster.create()
        self.bundle_dir = folder / "bundle"
        self.packages = self.bundle_dir / "packages"
        self.state = folder / "state"
        self.put(self.cluster.bundle())

    def put(self, files: Files) -> None:
        """Write files into the folder that is served."""
        write_directory(files, self.bundle_dir)

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run([COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False)

    def token(self, *options: str) -> str:
        """Make a join token."""
        made = self.run("token", "create", "--state-dir", self.state, *options)
        assert made.returncode == 0, made.stderr
        return made.stdout.strip()

    @contextmanager
    def serving(
        self, *options: str | Path, ca_file: Path | None = None, through: Sequence[str | Path] = ()
    ) -> Iterator[Running]:
        """Serve on a free port of the loopback until the block ends; then the server has to stop well.

        `through` is a command to run it under, such as strace.
        """
        folder = self.folder / f"run-{time.monotonic_ns()}"
        folder.mkdir()
        arguments: list[str | Path] = [
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--bundle-dir",
            self.bundle_dir,
            "--state-dir",
            self.state,
        ]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [*through, COMMAND, *arguments, *options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # Nothing of what is made may depend on a friendly umask.
                preexec_fn=lambda: os.umask(0) and None,  # noqa: PLW1509
            )
        assert process.stdout
        with process, process.stdout:
            introduction = "".join(iter(process.stdout.readline, "\n"))
            introduction += "".join(iter(process.stdout.readline, "\n"))
            try:
                assert process.poll() is None, (folder / "log").read_text()
                yield Running(process, introduction, folder / "log", ca_file or self.state / "ca.pem")
            finally:
                process.send_signal(signal.SIGTERM)
                try:
                    status = process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    raise
        assert status == 0


def eventually(ask: Callable[[], T], fits: Callable[[T], bool]) -> T:
    """Ask until the answer fits, and return it; the last answer after ten seconds."""
    deadline = time.monotonic() + 10
    while not fits(answer := ask()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return answer


def error_of(response: httpx.Response) -> tuple[int, str]:
    """The status and the code of a refusal, which has to be of the documented shape."""
    error = response.json()["error"]
    assert set(error) == {"code", "message"}
    assert error["message"].endswith(".")
    assert "/" not in error["message"].replace("/v1/bundle", "").replace("vm/demo", "")  # no path of the server
    return response.status_code, error["code"]
