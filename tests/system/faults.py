"""Scenarios on joined machines, several machines side by side, and what `status` says meanwhile.

A scenario is a function that gets a `Vm`: a machine that is healthy in a mesh of its own, with the daemon at work.
It breaks something for real, and leaves the machine healthy by what `status` told it to do. Machines are shared: one
scenario follows the other on each of them, and a machine on which one failed is thrown away.

Most of a scenario is waiting (systemd starts the sidecar again after 10 s, Envoy says after 30 s that a stream is
closed), so some machines at a time cost little more than one.
"""

import fcntl
import itertools
import json
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest

from lab import image
from lab.cluster import Cluster
from lab.cluster import Files as BundleFiles
from lab.machine import Machine
from lab.network import Network
from lab.run import Run
from lab.services import ENDPOINT_PORT, ISTIOD_PORT, Endpoint, Istiod
from standins.istiod import Behaviour
from standins.packages import Packages
from system.joining import Mesh, status

LANES = 7
LOG = "/var/log/istio/istio.log"
ERR = "/var/log/istio/istio.err.log"
RECORD = "/run/vmmesh-agent/status.json"
LOCK = "/run/vmmesh-agent/lock"
JOURNAL = "journal"

_PATIENCE = 75.0  # seconds for anything that has to come; none is a measure of the agent
_POLL = 0.2
# What a remedy says about other machines than this one.
_ELSEWHERE = ("kubectl ", "istioctl ")
# What a remedy says for machines of another kind: those with SELinux, those that set their own clock.
_NOT_HERE = ("restorecon ", "systemctl restart systemd-timesyncd")
# What may be enough by itself: what follows it in a remedy is for the case that it is not.
_MENDS = ("vmmesh-agent restore", "vmmesh-agent bootstrap")
# What only looks. It may end with any status but "no such command".
_LOOKS = re.compile(
    r"(?:df|du|free|getconf|getent|date|grep|iptables -t nat -S|journalctl|ls|namei|openssl|ss|timedatectl"
    r"|systemctl status|vmmesh-agent (?:status|doctor)|/usr/local/bin/envoy --version)\b"
)


class OwnIstiod(Istiod):
    """An istiod at an address of its own, so that one machine's trouble is not another's."""

    def __init__(self, address: str, cluster: Cluster, *, network: Network, run: Run) -> None:
        super().__init__(cluster, network=network, run=run)
        self.address = address

    def argv(self) -> list[str]:
        """The command line, after `python`."""
        listen = f"--listen={self.address}:{ISTIOD_PORT}"
        return [listen if part.startswith("--listen=") else part for part in super().argv()]


class OwnEndpoint(Endpoint):
    """An endpoint at an address of its own."""

    def __init__(self, address: str, files: BundleFiles, packages: Packages, *, network: Network, run: Run) -> None:
        super().__init__(files, [packages.rpm], network=network, run=run)
        self.address = address
        self.url = f"https://{address}:{ENDPOINT_PORT}/v1/bundle"

    def argv(self) -> list[str]:
        """The command line, after `python`."""
        kept = [part for part in super().argv() if not part.startswith(("--listen=", "--name="))]
        return [*kept, f"--listen={self.address}:{ENDPOINT_PORT}", f"--name={self.address}"]


@dataclass
class Measured:
    """What came of one scenario: seconds from the evidence to `status`, and from the remedy to healthy."""

    scenario: str
    said: str = ""
    told_after: float | None = None
    healthy_after: float | None = None
    seconds: float = 0.0
    outcome: str = ""


@dataclass
class Vm:
    """A machine in its mesh, and what a scenario does with it."""

    machine: Machine
    mesh: Mesh
    address: str
    network: Network
    run_of_lab: Run
    stop: threading.Event
    measured: list[Measured] = field(default_factory=list)
    _marks: dict[str, int] = field(default_factory=dict)
    _lock: BinaryIO | None = None
    _began: float = 0.0
    _evident: float = 0.0

    @property
    def cluster(self) -> Cluster:
        return self.mesh.cluster

    @property
    def istiod(self) -> Istiod:
        return self.mesh.istiod

    # --- before and after -----------------------------------------------------

    def join(self) -> None:
        """Let the daemon bring the machine into the mesh."""
        self.mesh.endpoint.invite(self.machine)
        self.run("systemctl start vmmesh-agent")
        self.is_healthy()

    def begin(self, scenario: str) -> None:
        """Take note of where the logs end."""
        self.measured.append(Measured(scenario))
        self._began = self._evident = time.monotonic()
        self._marks = {path: self._size(path) for path in (LOG, ERR)}
        self._marks[JOURNAL] = int(self.run("date +%s").stdout)

    def hinder(self) -> None:
        """Keep the agent from mending placed files, which it does within seconds (test_drift.py): hold its lock."""
        self._lock = self._file(LOCK).open("rb+")
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def unhinder(self) -> None:
        """Let the agent mend what it likes."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def end(self) -> None:
        """See that all is well."""
        self.unhinder()
        self.is_healthy()
        self.measured[-1].outcome = "ok"
        self.measured[-1].seconds = time.monotonic() - self._began

    def mend(self) -> None:
        """Begin again with a new machine."""
        self.unhinder()
        self.istiod.behave(Behaviour())
        for service in (self.istiod, self.mesh.endpoint):
            service.stop()
            service.start()
        self.mesh.publish(self.cluster.bundle(address=self.address))
        self.machine.link.restore()
        self.machine.reset()
        self.join()

    def protocol(self) -> str:
        """Return what helps to understand a scenario that failed."""
        shown = self.run(
            "vmmesh-agent status --output json; systemctl status --no-pager --lines=0 istio vmmesh-agent"
        ).stdout
        logs = self.run(
            f"tail -n 15 {LOG} {ERR} | cut -c -400 | cat -v;"
            " journalctl --no-pager -n 200 -u istio | grep -v 'Running command' | tail -n 20;"
            " journalctl --no-pager -n 15 -u vmmesh-agent"
        )
        return f"{shown}\n{logs.stdout}"

    # --- commands -------------------------------------------------------------

    def run(self, command: str, *, timeout: float = 90) -> subprocess.CompletedProcess[str]:
        """Run a line of shell on the machine, whatever its exit status is."""
        return self.machine.run(["bash", "-c", command], check=False, timeout=timeout)

    def does(self, command: str, *, timeout: float = 90) -> str:
        """Run a line of shell on the machine that has to succeed."""
        return self.machine.run(["bash", "-ec", command], timeout=timeout).stdout

    def restart(self) -> None:
        """Restart the sidecar; one that cannot start is no error of this command."""
        self.run("systemctl restart istio")

    def without_certificate(self) -> None:
        """Restart the sidecar as after a day without power: its certificate is of no use any more."""
        self.does("rm -f /etc/certs/cert-chain.pem /etc/certs/key.pem")
        self.restart()

    def settled(self, seconds: float) -> None:
        """Wait until the sidecar runs for this long: some things are not expected of one that has just started."""

        def age() -> float:
            entered = self.does("systemctl show istio --property=ActiveEnterTimestampMonotonic --value")
            return time.monotonic() - int(entered) / 1e6

        self._until(f"a sidecar of {seconds:.0f} s", lambda: age() >= seconds, _PATIENCE + seconds)

    def in_cluster(self, command: str) -> None:
        """Run a command on the cluster's side of the network."""
        subprocess.run(self.network.in_cluster(command.split()), check=True)

    @contextmanager
    def memory_limit(self, process: int, limit: int) -> Iterator[None]:
        """Let a process of the machine have no more than `limit` bytes of new memory: the kernel kills it then."""
        group = Path(f"/sys/fs/cgroup/memory/{self.run_of_lab.name}-{self.machine.name}")
        assert group.parent.is_dir(), "this host has no memory controller of cgroup v1"
        group.mkdir()
        try:
            (group / "memory.limit_in_bytes").write_text(str(limit))
            (group / "cgroup.procs").write_text(str(self._number_on_host(process)))
            yield
        finally:
            parent = group.parent / "cgroup.procs"
            for number in (group / "cgroup.procs").read_text().split():
                parent.write_text(number)
            group.rmdir()

    def _number_on_host(self, process: int) -> int:
        namespace = Path(f"/proc/{self.machine.leader}/ns/pid").readlink()
        for status_file in Path("/proc").glob("[0-9]*/status"):
            with suppress(OSError):
                numbers = status_file.read_text().partition("NSpid:")[2].split("\n")[0].split()
                if numbers[-1] == str(process) and (status_file.parent / "ns/pid").readlink() == namespace:
                    return int(numbers[0])
        raise AssertionError(f"process {process} is not on {self.machine.name}")

    def process(self, name: str) -> int:
        """Return the number, on the machine, of the sidecar's process of this name."""
        return int(self.does(f"pgrep --oldest --exact {name}").split()[0])

    # --- evidence -------------------------------------------------------------

    def seen(self, what: str, look: Callable[[], object], within: float = _PATIENCE) -> None:
        """Wait until it can be seen; from this moment on `status` has no excuse."""
        self._until(what, look, within)
        self._evident = time.monotonic()

    def writes(self, path: str, text: str, within: float = _PATIENCE) -> str:
        """Wait for a new line with this text in a log, or in the unit's journal."""
        self.seen(f"{text!r} in {path}", lambda: text in self.new_lines(path), within)
        return text

    def new_lines(self, path: str) -> str:
        """Return what was written since the scenario began."""
        if path == JOURNAL:
            return self.run(f"journalctl --no-pager --quiet --unit=istio --since=@{self._marks[JOURNAL]}").stdout
        content = self._file(path).read_bytes() if self._file(path).exists() else b""
        mark = self._marks.get(path, 0)
        return content[mark if mark <= len(content) else 0 :].decode(errors="replace")

    # --- what the agent says ----------------------------------------------------

    def record(self) -> dict[str, Any] | None:
        """Return the daemon's record, which `status` shows while it is fresh: to look at it costs no process."""
        try:
            document: dict[str, Any] = json.loads(self._file(RECORD).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return document

    def says(self, state: str, cause: str, *, evidence: str = "", within: float = _PATIENCE) -> dict[str, Any]:
        """Wait until `status` has this state and cause; return the condition of the cause.

        `evidence` is a regular expression that the line shown has to match.
        """
        shown = self._shows(
            f"{state} ({cause})", lambda shown: (shown["state"], shown["cause"]) == (state, cause), within
        )
        return self._told(shown, cause, evidence)

    def mentions(self, code: str, *, evidence: str = "", within: float = _PATIENCE) -> dict[str, Any]:
        """Wait until `status` has this condition, whatever the state is; return it."""
        shown = self._shows(code, lambda shown: code in [each["code"] for each in shown["conditions"]], within)
        return self._told(shown, code, evidence)

    def is_healthy(self, within: float = _PATIENCE) -> None:
        """Wait until the machine is healthy and nothing is said against it."""
        began = time.monotonic()
        self._shows("healthy", _is_well, within)
        if self.measured and not self.measured[-1].outcome:
            self.measured[-1].healthy_after = time.monotonic() - began

    @contextmanager
    def undisturbed(self, *allowed: str, rest: float = 6.0) -> Iterator[list[dict[str, Any]]]:
        """See that the daemon's record and `status` raise no alarm in the block and for `rest` seconds after it.

        `allowed` are causes that may be named meanwhile, and states other than healthy. Gives all that was said.
        """
        samples: list[dict[str, Any]] = []
        over = threading.Event()

        def ask() -> None:
            for turn in itertools.count():
                if over.wait(0.5):
                    return
                samples.extend(filter(None, [status(self.machine) if turn % 4 == 0 else self.record()]))

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            yield samples
            self.stop.wait(rest)
        finally:
            over.set()
            asking.join()
        alarms = [
            f"{sample['state']} ({sample['cause']}): {json.dumps(sample['conditions'], indent=1)}"
            for sample in samples
            if not {sample["state"], sample["cause"]} & {*allowed} and not _is_quiet(sample)
        ]
        assert samples
        assert not alarms, f"{len(alarms)} of {len(samples)} answers were alarms, the first:\n{alarms[0]}"

    def appends(self, path: str, *lines: str) -> None:
        """Write lines at the end of a log, as another writer of the file does; `{now}` becomes the moment."""
        moment = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        text = "".join(f"{line}\n" for line in lines).replace("{now}", moment)
        with self._file(path).open("ab") as file:
            file.write(text.encode("utf-8", "surrogateescape"))

    def follow(self, condition: Mapping[str, Any]) -> list[str]:
        """Do what the remedy says: run each command in it, in its order. Return what the commands printed.

        A command about the cluster is not for this machine. One that only looks may find what it likes.
        """
        self.unhinder()
        printed = []
        for command in commands(str(condition["remedy"])):
            path = re.search(r"(/[\w./-]+)", str(condition["evidence"]) or str(condition["message"]))
            line = f"{command} {path[1]}" if command == "namei -l" and path else command
            done = self.run(line, timeout=170)
            if _LOOKS.match(command):
                fine = done.returncode not in {64, 127}
            else:  # bootstrap ends with 2 where the sidecar is degraded at that moment
                fine = done.returncode == 0 or (command == "vmmesh-agent bootstrap" and done.returncode == 2)
            assert fine, f"the remedy `{line}` ended with {done.returncode}:\n{done.stdout}{done.stderr}"
            printed.append(done.stdout)
            if command in _MENDS and self._is_soon_well():
                break
        return printed

    def _is_soon_well(self) -> bool:
        deadline = time.monotonic() + 12
        while time.monotonic() < deadline:
            if (record := self.record()) and _is_well(record):
                return True
            time.sleep(_POLL)
        return False

    # --- details ----------------------------------------------------------------

    def _shows(self, what: str, fits: Callable[[dict[str, Any]], bool], within: float) -> dict[str, Any]:
        """Look at the record until it fits, and then at what `status` itself says."""
        shown: dict[str, Any] = {}

        def look() -> bool:
            nonlocal shown
            if (record := self.record()) is None or not fits(record):
                shown = record or {}
                return False
            shown = status(self.machine)
            return fits(shown)

        self._until(f"{what} in status", look, within, lambda: f"status: {json.dumps(shown, indent=1)}")
        return shown

    def _told(self, shown: Mapping[str, Any], code: str, evidence: str) -> dict[str, Any]:
        measured = self.measured[-1]
        if measured.told_after is None:
            measured.told_after = time.monotonic() - self._evident
            measured.said = f"{shown['state']} ({code})"
        condition: dict[str, Any] = next(each for each in shown["conditions"] if each["code"] == code)
        assert re.search(evidence, condition["evidence"]), f"{evidence!r} is not the evidence of {condition}"
        assert condition["message"]
        assert condition["remedy"]
        assert condition["since"]
        return condition

    def _until(
        self, what: str, look: Callable[[], object], within: float, explain: Callable[[], str] = lambda: ""
    ) -> None:
        deadline = time.monotonic() + within
        while not look():
            if self.stop.is_set():
                raise InterruptedError(f"the session ends before {what}")
            assert time.monotonic() < deadline, f"{within:.0f} s without {what}. {explain()}"
            time.sleep(_POLL)

    def _file(self, path: str) -> Path:
        return self.machine.root / path.lstrip("/")

    def _size(self, path: str) -> int:
        return self._file(path).stat().st_size if self._file(path).exists() else 0


Scenario = Callable[[Vm], None]


def _is_quiet(shown: Mapping[str, Any]) -> bool:
    # A note is worth knowing, and no alarm.
    severities = {condition["severity"] for condition in shown["conditions"]}
    return (shown["state"], shown["cause"]) == ("healthy", "none") and severities <= {"note"}


def _is_well(shown: Mapping[str, Any]) -> bool:
    # That a scenario changed a file is noted for an hour.
    codes = {condition["code"] for condition in shown["conditions"]}
    return (shown["state"], shown["cause"]) == ("healthy", "none") and codes <= {"file_put_back"}


def commands(remedy: str) -> list[str]:
    """Return the commands in a remedy that are for this machine: what stands in backquotes, in its order."""
    return [
        command for command in re.findall(r"`([^`]+)`", remedy) if not command.startswith((*_ELSEWHERE, *_NOT_HERE))
    ]


# --- side by side ---------------------------------------------------------------


@contextmanager
def side_by_side(
    scenarios: Sequence[Scenario], *, packages: Packages, network: Network, run: Run, fixture_rpms: tuple[Path, ...]
) -> Iterator[tuple[dict[str, Future[None]], list[Measured]]]:
    """Run the scenarios on some machines at once. Give the outcome of each by its name, and what was measured."""
    layers = image.layers("rpm", fixture_rpms=fixture_rpms)
    stop = threading.Event()
    free: queue.SimpleQueue[Vm] = queue.SimpleQueue()
    with ExitStack() as stack:
        vms = []
        for number in range(min(LANES, len(scenarios))):
            address = f"192.0.2.{100 + number}"
            subprocess.run(["ip", "-n", network.cluster, "address", "add", f"{address}/24", "dev", "br0"], check=True)
            stack.callback(
                subprocess.run,
                ["ip", "-n", network.cluster, "address", "delete", f"{address}/24", "dev", "br0"],
                check=True,
            )
            cluster = Cluster.create()
            istiod = stack.enter_context(OwnIstiod(address, cluster, network=network, run=run))
            files = cluster.bundle(address=address)
            endpoint = stack.enter_context(OwnEndpoint(address, files, packages, network=network, run=run))
            machine = stack.enter_context(Machine(f"lane{number}", layers=layers, network=network, run=run))
            vms.append(Vm(machine, Mesh(cluster, istiod, endpoint), address, network, run, stop))
        pool = stack.enter_context(ThreadPoolExecutor(len(vms)))
        joins = [pool.submit(_joined, vm, free) for vm in vms]
        outcomes = {scenario.__name__: pool.submit(_play, scenario, free) for scenario in scenarios}
        measured: list[Measured] = []
        try:
            yield outcomes, measured
        finally:  # a session that ends early does not wait for the rest
            stop.set()
            pool.shutdown(cancel_futures=True)
        for join in joins:
            join.result()
        measured += [each for vm in vms for each in vm.measured]


def _joined(vm: Vm, free: "queue.SimpleQueue[Vm]") -> None:
    try:
        vm.join()
    finally:
        free.put(vm)


def _play(scenario: Scenario, free: "queue.SimpleQueue[Vm]") -> None:
    vm = free.get()
    try:
        vm.begin(scenario.__name__)
        scenario(vm)
        vm.end()
    except BaseException as error:
        if not vm.stop.is_set():
            error.add_note(vm.protocol())
            vm.measured[-1].outcome = "FAILED"
            vm.mend()
        raise
    finally:
        free.put(vm)


@contextmanager
def played(
    request: pytest.FixtureRequest,
    parameter: str,
    *,
    packages: Packages,
    network: Network,
    run: Run,
    fixture_rpms: tuple[Path, ...],
) -> Iterator[dict[str, Future[None]]]:
    """Run a module's scenarios, those that `parameter` of its tests names, and print what was measured."""
    scenarios = selected(request, parameter)
    with side_by_side(scenarios, packages=packages, network=network, run=run, fixture_rpms=fixture_rpms) as (
        outcomes,
        measured,
    ):
        yield outcomes
    show(request, measured)


def selected(request: pytest.FixtureRequest, parameter: str) -> list[Scenario]:
    """Return the scenarios that this session was asked for (`-k`), in their order."""
    return [
        cast("Scenario", item.callspec.params[parameter])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == request.path and parameter in item.callspec.params
    ]


def show(request: pytest.FixtureRequest, measured: Sequence[Measured]) -> None:
    """Print what was measured on the terminal, whether tests failed or not."""
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    assert capture is not None
    lines = [f"{'scenario':<62} {'said':<40} {'told':>6} {'healthy':>8} {'whole':>6}"]
    for each in sorted(measured, key=lambda each: each.scenario):
        told, healthy = (f"{value:.1f}" if value is not None else "" for value in (each.told_after, each.healthy_after))
        lines.append(f"{each.scenario:<62} {each.said:<40} {told:>6} {healthy:>8} {each.seconds:>6.1f}  {each.outcome}")
    with capture.global_and_fixture_disabled():
        sys.stdout.write("\n" + "\n".join(lines) + "\n")
