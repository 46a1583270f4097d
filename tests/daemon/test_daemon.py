"""The daemon as a child process: what it tells systemd, what it records, and how it ends.

It works on a tree, so it starts no sidecar; the bundle comes from a folder of that tree.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from factories import CLUSTER, a_bundle
from lab.cluster import write_directory

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the daemon runs as root")

COMMAND = Path(sys.executable).with_name("vmmesh-agent")


class Running:
    """A daemon, and what it told systemd so far."""

    def __init__(self, process: subprocess.Popen[str], notifications: socket.socket, tree: Path) -> None:
        self.process = process
        self.told = ""
        self._notifications = notifications
        self._tree = tree

    def hears(self, text: str) -> None:
        """Wait until systemd was told this."""
        while text not in self.told:
            self.told += self._notifications.recv(4096).decode() + "\n"

    def record(self, fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait for a status record that fits."""
        deadline = time.monotonic() + 120
        while True:
            try:
                record: dict[str, Any] = json.loads((self._tree / "run/vmmesh-agent/status.json").read_text())
                if fits(record):
                    return record
            except FileNotFoundError:
                record = {}
            assert time.monotonic() < deadline, record
            time.sleep(0.05)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        _, log = self.process.communicate(timeout=120)
        return self.process.returncode, log


@contextmanager
def running(tree: Path) -> Iterator[Running]:
    address = tree.parent / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifications:
        address.unlink(missing_ok=True)
        notifications.bind(str(address))
        notifications.settimeout(120)
        process = subprocess.Popen(
            [COMMAND, "--root", tree, "run"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={"PATH": os.environ["PATH"], "NOTIFY_SOCKET": str(address)},
        )
        try:
            yield Running(process, notifications, tree)
        finally:
            process.kill()
            process.communicate()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "etc/vmmesh-agent").mkdir(parents=True)
    (root / "run").mkdir()
    (root / "etc/vmmesh-agent/config.yaml").write_text("endpoint: {url: 'file:///srv/bundle'}\n")
    return root


def codes(record: dict[str, Any]) -> list[str]:
    return [condition["code"] for condition in record["conditions"]]


def test_trouble_becomes_a_condition_and_the_daemon_goes_on(tree: Path) -> None:
    with running(tree) as daemon:
        daemon.hears("READY=1")
        record = daemon.record(lambda record: "bundle_not_found" in codes(record))
        assert record["daemon"] is True
        assert daemon.process.poll() is None
        status, log = daemon.end()
    assert status == 0
    assert "code=bundle-not-found" in log
    assert "Traceback" not in log


def test_every_reason_against_a_bundle_is_recorded_and_no_secret(tree: Path) -> None:
    token = CLUSTER.token(audience="other")
    write_directory(dict(a_bundle(token=token).files), tree / "srv/bundle")
    with running(tree) as daemon:
        record = daemon.record(lambda record: "token_wrong_audience" in codes(record))
        status, log = daemon.end()
    assert status == 0
    assert token.split(".")[1] not in json.dumps(record) + log
    assert not (tree / "etc/certs").exists()
    assert not (tree / "etc/hosts").exists()


def test_systemd_is_told_that_it_ends(tree: Path) -> None:
    with running(tree) as daemon:
        daemon.hears("READY=1")
        daemon.hears("WATCHDOG=1")
        assert daemon.end()[0] == 0
        daemon.hears("STOPPING=1")


def test_only_one_works_on_a_machine(tree: Path) -> None:
    with running(tree) as daemon:
        daemon.hears("READY=1")
        second = subprocess.run(
            [COMMAND, "--root", tree, "run"], capture_output=True, text=True, timeout=20, check=False
        )
        assert (second.returncode, "[locked]" in second.stderr) == (1, True)
        assert daemon.process.poll() is None


def test_after_a_sudden_end_the_next_one_works(tree: Path) -> None:
    with running(tree) as daemon:
        daemon.hears("READY=1")
        daemon.end(signal.SIGKILL)
    with running(tree) as daemon:
        daemon.hears("READY=1")
        assert daemon.end()[0] == 0


def test_a_wrong_configuration_ends_it_with_78(tree: Path) -> None:
    (tree / "etc/vmmesh-agent/config.yaml").write_text("endpoint: {url: 'http://mesh.example.com/'}\n")
    with running(tree) as daemon:
        _, log = daemon.process.communicate(timeout=120)
    assert daemon.process.returncode == 78
    assert "endpoint.url" in log


def test_a_damaged_record_of_before_is_no_hindrance(tree: Path) -> None:
    (tree / "run/vmmesh-agent").mkdir()
    (tree / "run/vmmesh-agent/status.json").write_text('{"half": ')
    (tree / "var/lib/vmmesh-agent").mkdir(parents=True)
    (tree / "var/lib/vmmesh-agent/state.json").write_text("[]")
    with running(tree) as daemon:
        daemon.hears("READY=1")
        assert daemon.end()[0] == 0
