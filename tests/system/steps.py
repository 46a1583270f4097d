"""A machine that can be met in the middle of each step of a join, by the daemon or by hand."""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lab.cluster import Authority, as_json
from lab.cluster import Files as BundleFiles
from lab.faulty import Answer, Faulty, http
from lab.machine import Machine
from lab.network import CLUSTER_IPV4
from system.joining import PLACED, ROOT_CERT, Mesh, configure, copy_to, status, unit
from system.web import pin

AGENT = "vmmesh-agent.service"
BEGIN = b"# BEGIN vmmesh-agent\n"
END = b"# END vmmesh-agent\n"

# How each step is made long enough to be met in its middle: what strace delays, and for how long (microseconds). It
# is in a drop-in that a boot forgets. Each command that the agent runs makes four pipes (pipe2). The bundle comes in
# one-second bytes where the step is fetch; useradd hangs a bit where it is install.
SLOW = {
    "fetch": [],
    "verify": ["-P", "/var/lib/vmmesh-agent", "-e", "trace=openat", "-e", "inject=openat:delay_enter=500000"],
    "install": [],
    "place": ["-e", "trace=renameat", "-e", "inject=renameat:delay_enter=250000"],
    "start": ["-e", "trace=pipe2", "-e", "inject=pipe2:delay_enter=100000"],
    "watch": [],
}
STEPS = list(SLOW)


def _slowly(step: str) -> list[str]:
    """What goes before a command that shall be slow in a step; the process stays its own, strace is beside it."""
    return ["/usr/bin/strace", "-D", "-o", "/dev/null", *SLOW[step]]


class Subject:
    """A machine whose endpoint gives out what it is told, and its last two bundles."""

    def __init__(self, machine: Machine, mesh: Mesh, faulty: Faulty) -> None:
        self.machine, self.cluster, self.faulty = machine, mesh.cluster, faulty
        (self._rpm,) = (mesh.endpoint.bundle_folder / "packages").glob("*.rpm")
        leaf, key = self.cluster.server_certificate([CLUSTER_IPV4])
        self._identity = leaf + self.cluster.root_pem, key
        self._generation = 0

    def bundle(self) -> BundleFiles:
        """Each is new in all its files."""
        self._generation += 1
        name = f"istiod-{self._generation}.istio-system.svc"
        files = self.cluster.bundle(environment={"CANONICAL_REVISION": f"v{self._generation}"})
        return files | {
            "root-cert.pem": self.cluster.root_pem + Authority.create(f"Generation {self._generation}").pem,
            "mesh.yaml": files["mesh.yaml"] + f"# {self._generation}\n".encode(),
            "hosts": f"{CLUSTER_IPV4} istiod.istio-system.svc {name}\n".encode(),
        }

    def serve(self, files: BundleFiles, *, slowly: bool = False) -> None:
        """Give out a bundle from now on."""
        self.faulty.show([http(body=as_json(files), slow="body" if slowly else "")], self._identity)

    def refuse(self) -> None:
        """Reset each connection from now on."""
        self.faulty.show([Answer(end="reset")], self._identity)

    def begin_anew(self) -> None:
        """Make it a machine that never joined, with all that it takes to join."""
        self.machine.reset()
        copy_to(self.machine, self._rpm, "/srv/istio-sidecar.rpm")
        endpoint = {"url": self.faulty.url, "ca_pins": [pin(self.cluster.root_pem)]}
        configure(self.machine, {"endpoint": endpoint, "sidecar": {"package": "/srv/istio-sidecar.rpm"}})

    def slow_down(self, step: str) -> None:
        """Let a step of the daemon take long, until the next boot."""
        if step == "install":
            self.slow_useradd(4)
        if SLOW[step]:
            start = f"ExecStart=\nExecStart={shlex.join(_slowly(step))} /usr/bin/vmmesh-agent run\n"
            text = f"[Service]\n{start}SystemCallFilter=@debug\n"  # ptrace, for strace
            self.machine.write(f"/run/systemd/system/{AGENT}.d/slow.conf", text)
            self.machine.run(["systemctl", "daemon-reload"])

    def slow_useradd(self, seconds: int) -> None:
        """Let the package's script hang for some seconds where it makes the user, until the next boot."""
        # Bind-mounted over the real one, which gets another name.
        self.machine.run(["cp", "/usr/sbin/useradd", "/run/useradd"])
        self.machine.write("/run/slow", f'#!/bin/sh\nsleep {seconds}\nexec /run/useradd "$@"\n', mode=0o755)
        self.machine.run(["mount", "--bind", "/run/slow", "/usr/sbin/useradd"])

    def start_and_meet(self, step: str, files: BundleFiles) -> None:
        """Start the daemon and return when it is in the middle of the step."""
        self.machine.run(["systemctl", "stop", AGENT])
        mark = self.machine.run(["date", "+@%s.%N"]).stdout.strip()
        self.machine.run(["systemctl", "enable", "--now", AGENT])
        follow = ["journalctl", "--follow", f"--unit={AGENT}", f"--since={mark}", "--output=cat", "--no-tail"]
        with self.machine.spawn(follow) as journal:
            self._meet(step, files, journal, "event={} ")
            os.killpg(journal.pid, signal.SIGKILL)

    @contextmanager
    def bootstrap_in(self, step: str, files: BundleFiles) -> Iterator[tuple[subprocess.Popen[str], str]]:
        """Run `bootstrap` until it is in the middle of the step. Give it, and its number on the machine."""
        argv = [*(_slowly(step) if SLOW[step] else []), "vmmesh-agent", "bootstrap"]
        self.machine.run(["rm", "-f", "/run/bootstrap.pid"])
        with self.machine.spawn(["sh", "-c", 'echo $$ >/run/bootstrap.pid; exec "$@"', "sh", *argv]) as process:
            self._meet(step, files, process, "{} ")
            try:
                yield process, self.machine.read("/run/bootstrap.pid").decode().strip()
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)

    def _meet(self, step: str, files: BundleFiles, told: subprocess.Popen[str], done: str) -> None:
        """Return when a run whose lines are told is in the middle of the step: when the one before it is done."""
        if step == "fetch":
            until("the endpoint is asked", lambda: self.faulty.heard("request"))
            return
        before = done.format(STEPS[STEPS.index(step) - 1])
        assert told.stdout
        assert any(line.startswith(before) for line in told.stdout), f"it never said {before}"
        if step == "place":
            root_cert = self.machine.root / ROOT_CERT.lstrip("/")
            until(
                "the first file is placed",
                lambda: root_cert.exists() and root_cert.read_bytes() == files["root-cert.pem"],
            )

    def sets(self, **bundles: BundleFiles) -> set[str]:
        """To which bundles the files that are there belong."""
        there = {name: self._read(path) for name, path in PLACED.items()}
        if there["root-cert.pem"] == self.cluster.root_pem:  # as pilot-agent writes it, with istiod's root alone
            del there["root-cert.pem"]
        there["hosts"] = self.machine.read("/etc/hosts").partition(BEGIN)[2].partition(END)[0]
        return {
            next((which for which, files in bundles.items() if files.get(name, b"") == content), f"neither: {name}")
            for name, content in there.items()
        }

    def settled(self, **bundles: BundleFiles) -> set[str]:
        """`sets`, once they are one: while they are several the agent is at it, and no sidecar runs on them."""
        deadline = time.monotonic() + 30
        while True:
            is_stopped = unit(self.machine)["ActiveState"] == "inactive"
            if len(there := self.sets(**bundles)) == 1:
                return there
            assert is_stopped, f"the sidecar runs on {there}"
            assert time.monotonic() < deadline, f"30 s, and still of several sets: {there}"

    def _read(self, path: str) -> bytes:
        try:
            return self.machine.read(path)
        except FileNotFoundError:
            return b""


def until(what: str, look: Callable[[], object]) -> None:
    """Wait until it can be seen."""
    deadline = time.monotonic() + 30
    while not look():
        assert time.monotonic() < deadline, f"30 s, and not yet: {what}"
        time.sleep(0.02)


def is_healthy(machine: Machine) -> None:
    """Wait until it is."""
    waited = machine.run(["vmmesh-agent", "wait", "--for", "healthy", "--timeout", "60"], check=False, timeout=90)
    assert waited.returncode == 0, status(machine)


def left_over(machine: Machine) -> str:
    """What an interrupted agent left beside the files that it was writing."""
    return machine.run(["find", "/etc", "/var/lib", "/run", "-xdev", "-name", "*.vmmesh"]).stdout
