"""Kills the agent, and fails it, at each of its system calls, and judges what it leaves behind.

    PYTHONPATH=tests python -m system.sweep --all --json figures.json
    PYTHONPATH=tests python -m system.sweep --only 'renewal renameat 3' 'renewal write 4 ENOSPC+'

A point is an operation, a system call, and which one of these calls, counted from the agent's start: there strace
kills the agent before the call is made, or lets this call (`ENOSPC`), or this one and all later ones (`ENOSPC+`), fail.
Only the agent's own process is traced, not the commands that it runs: those live on when it is killed, as they would.
The state of the disk changes only by the traced calls, so a kill before each of them is a kill in each state.

After a kill the set of files is judged before anything else may happen to it; then `systemctl start istio`, where the
set is mixed (every other point), and the same command again, which must end well.
"""

import argparse
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar

from cryptography import x509

from lab import image
from lab.cluster import Authority, Cluster
from lab.cluster import Files as BundleFiles
from lab.machine import Entry, Machine, difference
from lab.network import Network
from lab.run import LabError, Run
from standins.packages import Packages, build, build_fixture_rpms
from system.faults import OwnEndpoint, OwnIstiod
from system.joining import NOISE, Mesh, copy_to, unit

LANES = 3  # machines side by side: most of a point is waiting
PLACES = {  # below the root, where no link is on the way
    "root-cert.pem": "etc/certs/root-cert.pem",
    "istio-token": "run/secrets/tokens/istio-token",
    "cluster.env": "var/lib/istio/envoy/cluster.env",
    "mesh.yaml": "var/lib/istio/config/mesh",
    "hosts": "etc/hosts",
}
STATE = "var/lib/vmmesh-agent/state.json"  # the journal
LEAVING = "var/lib/vmmesh-agent/leaving"  # is there while `leave` is half-way
# What others wrote into /etc/hosts, before the join and after it.
BEFORE = b"127.0.0.1\tlocalhost sweep0 sweep1 sweep2 sweep3\n\n# a comment  \n::1 v6\n198.51.100.7   db  db.example\n"
AFTER = b"# last\n198.51.100.8 cache.example"

CALLS = {
    "rename": "rename renameat renameat2 link linkat".split(),
    "fsync": "fsync fdatasync".split(),
    "unlink": "unlink unlinkat rmdir".split(),
    "write": "write pwrite64 ftruncate".split(),
    "mode": "mkdir mkdirat fchown fchownat fchmod fchmodat".split(),
    "network": "connect sendto".split(),
    "command": "vfork fork clone clone3".split(),
    "open": "openat socket pipe2".split(),
}
CLASS_OF = {call: name for name, calls in CALLS.items() for call in calls}
# What the kernel may answer.
ERRORS = {
    "rename": "ENOSPC EIO EROFS".split(),
    "fsync": "ENOSPC EIO".split(),
    "unlink": "EIO EROFS".split(),
    "write": "ENOSPC EIO".split(),
    "mode": "ENOSPC EIO EROFS".split(),
    "open": ["EMFILE"],
}
KILL = "kill"
_TRACE = "/run/sweep.trace"
# What the interpreter opens for itself.
_INTERPRETER = re.compile(r'"(/usr|/lib|/proc|/dev|/etc/(ld\.so|localtime|passwd|group|nsswitch|ssl))|ENOENT')
# What says why: the complaint, and the status of a sidecar that is not healthy after all was done.
_COMPLAINT = re.compile(r"^vmmesh-agent: .*? \[[a-z0-9-]+\]$|^[^ ] vm/demo: ", re.MULTILINE | re.DOTALL)
# What the agent and the sidecar may leave: the logs, the agent's own folders, and /etc/hosts is judged by itself.
_STAYS = [
    *("/var/log/*", "/run/vmmesh-agent*", "/var/lib/vmmesh-agent*", "/etc/vmmesh-agent/join-token"),
    *("/etc/hosts", "/run/sweep.trace"),
]
_BOOTSTRAP = ("vmmesh-agent", "bootstrap", "--timeout=90")

# --- the judge --------------------------------------------------------------

Item = TypeVar("Item")
Key = TypeVar("Key")

# What may be in each place; None is no file.
Set = Mapping[str, frozenset[bytes | None]]
Kind = Literal["old", "new", "back", "begun", "torn"]


@dataclass(frozen=True)
class Judgement:
    """What a set of files is.

    `kind` is `begun` for a mixed set that the journal knows of and no sidecar runs on, and `back` for the old set with
    the new token, after the new one was given up because the sidecar did not become healthy on it. `ages` says for each
    place what is in it: `old`, `new`, `both` where they are the same, `neither`. `lost` counts lines of others in
    /etc/hosts.
    """

    kind: Kind
    ages: Mapping[str, str]
    lost: int

    def __str__(self) -> str:
        return f"{self.kind} ({', '.join(f'{name} {age}' for name, age in self.ages.items())})"


def judge(root: Path, old: Set, new: Set, *, running: bool) -> Judgement:
    """Judge the set below `root`, with the sidecar `running` or not, while it should go from `old` to `new`."""
    contents = {name: _read(root / place) for name, place in PLACES.items()}
    ages = {name: _age(name, content, old[name], new[name]) for name, content in contents.items()}
    found = set(ages.values())
    newer = {name for name, age in ages.items() if age == "new"}
    kind: Kind = "torn"
    if found <= {"new", "both"}:
        kind = "new"
    elif found <= {"old", "both"}:
        kind = "old"
    elif "neither" not in found and is_unfinished(root):
        kind = "torn" if running else "begun"
    elif "neither" not in found and _journal(root).get("given_up") and newer == {"istio-token"}:
        kind = "back"
    there = Counter((contents["hosts"] or b"").splitlines())
    lost = min((Counter(_foreign(hosts)) - there).total() for hosts in old["hosts"] if hosts is not None)
    return Judgement(kind, ages, lost)


def placed(bundle: BundleFiles | None, *, after: bytes, root: bytes) -> Set:
    """Return what a bundle comes to on a machine, or what is there without any.

    `after` is what others wrote into /etc/hosts since the first join, `root` is what istiod hands out.
    """
    if bundle is None:
        # The package makes an empty mesh configuration. A last line without an end gets one when a block follows it.
        others: Set = {
            "mesh.yaml": frozenset({None, b""}),
            "hosts": frozenset({BEFORE + after, BEFORE + after + b"\n" * bool(after)}),
        }
        return {name: others.get(name, frozenset({None})) for name in PLACES}
    block = b"# BEGIN vmmesh-agent\n" + bundle["hosts"] + b"# END vmmesh-agent\n"
    others = {
        # The sidecar writes the root there that came with its certificate.
        "root-cert.pem": frozenset({bundle["root-cert.pem"], root}),
        # The block stays where it is; one that was taken away comes back at the end.
        "hosts": frozenset({BEFORE + block + after, BEFORE + after + b"\n" * bool(after) + block}),
    }
    return {name: others.get(name, frozenset({bundle[name]})) for name in PLACES}


def _age(name: str, content: bytes | None, old: frozenset[bytes | None], new: frozenset[bytes | None]) -> str:
    fits = _holds_roots if name == "root-cert.pem" else lambda content, wanted: content in wanted
    is_old, is_new = fits(content, old), fits(content, new)
    return {(True, True): "both", (True, False): "old", (False, True): "new"}.get((is_old, is_new), "neither")


def _holds_roots(content: bytes | None, wanted: frozenset[bytes | None]) -> bool:
    """Is it one of the wanted files, or certificates that are at least those of one? Roots are merged."""
    if content is None or None in wanted:
        return content in wanted
    try:
        there = {*x509.load_pem_x509_certificates(content)}
    except ValueError:
        return False
    return content in wanted or there >= {
        each for file in wanted if file for each in x509.load_pem_x509_certificates(file)
    }


def _foreign(hosts: bytes) -> list[bytes]:
    return re.sub(rb"# BEGIN vmmesh-agent\n.*# END vmmesh-agent\n", b"", hosts, flags=re.DOTALL).splitlines()


def is_unfinished(root: Path) -> bool:
    """Does the agent know that it is not done: does its journal say so, or has it begun to leave?"""
    return (root / LEAVING).exists() or _journal(root).get("unfinished") is True


def _journal(root: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(_read(root / STATE) or b"{}")
    except ValueError:
        return {}
    return document


def _read(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def leftovers(root: Path) -> list[str]:
    """Return the temporary files of the agent below `root`."""
    folders = ("etc", "var/lib/istio", "run/secrets", "run/vmmesh-agent", "var/lib/vmmesh-agent")
    found = (Path(path, name) for folder in folders for path, _, names in os.walk(root / folder) for name in names)
    return sorted(f"/{file.relative_to(root)}" for file in found if re.fullmatch(r"\..*\.vmmesh", file.name))


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Return the items under their keys, both in the order of their first coming."""
    groups: dict[Key, list[Item]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


# --- points -----------------------------------------------------------------


class Point(NamedTuple):
    """Where something happens to the agent: before its `number`-th `call`; `fault` is KILL, `EIO` or `EIO+`."""

    operation: str
    call: str
    number: int
    fault: str = KILL

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` wrote."""
        operation, call, number, *fault = text.split()
        return cls(operation, call, int(number), *fault)

    def __str__(self) -> str:
        return f"{self.operation} {self.call} {self.number}{'' if self.fault == KILL else f' {self.fault}'}"

    @property
    def kind(self) -> str:
        """The class of its system call."""
        return CLASS_OF[self.call]

    @property
    def lasts(self) -> bool:
        """Does the fault stay until the agent's end?"""
        return self.fault.endswith("+")

    @property
    def injection(self) -> str:
        """The argument of strace."""
        what = "signal=KILL" if self.fault == KILL else f"error={self.fault.rstrip('+')}"
        return f"inject={self.call}:{what}:when={self.number}{'+' if self.lasts else ''}"


def points(operation: str, trace: str) -> Iterator[Point]:
    """Yield each point of an operation, from strace's account of a run that nothing happened to."""
    counted = Counter[str]()
    for line in trace.splitlines():
        call = line.partition("(")[0]
        if call not in CLASS_OF:
            continue
        counted[call] += 1
        kind = CLASS_OF[call]
        if kind != "open":
            yield Point(operation, call, counted[call])
        if call == "openat" and _INTERPRETER.search(line):
            continue
        for error in ERRORS.get(kind, ()):
            yield Point(operation, call, counted[call], error)
            yield Point(operation, call, counted[call], f"{error}+")


def spread(found: Sequence[Point], limit: int) -> list[Point]:
    """Return at most `limit` of them, evenly spread."""
    if len(found) <= limit:
        return [*found]
    return [found[round(index * (len(found) - 1) / max(1, limit - 1))] for index in range(limit)]


# --- one machine ------------------------------------------------------------


@dataclass
class Lane:
    """A machine and its mesh, with two bundles of which everything differs."""

    machine: Machine
    mesh: Mesh
    bundles: tuple[BundleFiles, BundleFiles]
    published: int = 0
    state: Literal["spoilt", "outside", "member"] = "spoilt"
    holds: int | None = None  # the bundle that the machine has
    after: bytes = b""  # what somebody wrote into /etc/hosts behind the block
    found: Mapping[str, Entry] = field(default_factory=dict)  # the machine before it joined

    @property
    def root(self) -> Path:
        return self.machine.root

    def set_of(self, number: int | None) -> Set:
        """Return what the machine has with this bundle, or without any."""
        bundle = None if number is None else self.bundles[number]
        return placed(bundle, after=self.after, root=self.mesh.cluster.root_pem)

    def fresh(self) -> None:
        """Make the machine one that was invited and has not joined."""
        self.machine.reset()
        self.mesh.endpoint.invite(self.machine)
        self.state, self.holds, self.after, self.found = "outside", None, b"", {}
        (self.root / "etc/hosts").write_bytes(BEFORE)

    def member(self) -> None:
        """Make the machine one that is in the mesh, where it is not."""
        if self.state == "spoilt":
            self.fresh()
            self.found = self.machine.snapshot()
        if self.state == "outside":
            self.mesh.endpoint.invite(self.machine)  # purging took the token
            self.command(*_BOOTSTRAP, check=True)
            self.joined()
        if not self.after:
            self.after = AFTER
            with (self.root / "etc/hosts").open("ab") as file:
                file.write(AFTER)

    def joined(self) -> None:
        """Take note that the machine has what is published."""
        self.state, self.holds = "member", self.published

    def left(self) -> None:
        """Take note that the machine has left the mesh."""
        self.state, self.holds = "outside", None

    def publish_other(self) -> None:
        """Let the endpoint hand out the bundle that the machine does not have."""
        if self.published == self.holds:
            self.published = 1 - self.published
            self.mesh.publish(self.bundles[self.published])

    def command(self, *argv: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        return self.machine.run(argv, check=check, timeout=140)

    def traced(self, argv: Sequence[str], *options: str) -> subprocess.CompletedProcess[str]:
        return self.command("strace", "-y", "-o", _TRACE, *options, *argv)

    def trace(self) -> str:
        """Return strace's account of the last traced run."""
        return (_read(self.root / _TRACE.lstrip("/")) or b"").decode(errors="replace")

    def differences(self) -> list[str]:
        """Say what is not as it was before the join."""
        found = difference(self.found, self.machine.snapshot(), ignore=[*NOISE, *_STAYS])
        return [line for line in found if not line.endswith("written again with the same content")]

    def is_running(self) -> bool:
        """Does systemd have a process of the sidecar?"""
        return unit(self.machine)["MainPID"] != "0"

    def comes_back(self) -> bool:
        """Does the sidecar run, or soon? Who asks systemd for it does not wait."""
        deadline = time.monotonic() + 20
        while not (runs := self.is_running()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return runs

    def judged(self, old: Set, new: Set) -> Judgement:
        # The files first: nothing on the machine runs before they are judged.
        found = judge(self.root, old, new, running=False)
        return judge(self.root, old, new, running=True) if found.kind == "begun" and self.is_running() else found


@dataclass(frozen=True)
class Operation:
    """What the agent is disturbed in: `prepare` makes the machine ready and returns the old and the new set."""

    prepare: Callable[[Lane], tuple[Set, Set]]
    argv: Sequence[str] = (*_BOOTSTRAP, "--timeout=20")
    has_package: bool = True  # is the sidecar's package installed beforehand?

    @property
    def leaves(self) -> bool:
        """Is it the way out of the mesh?"""
        return "leave" in self.argv


def _first_join(lane: Lane) -> tuple[Set, Set]:
    lane.fresh()
    return lane.set_of(None), lane.set_of(lane.published)


def _renewal(lane: Lane) -> tuple[Set, Set]:
    lane.member()
    lane.publish_other()
    return lane.set_of(lane.holds), lane.set_of(lane.published)


def _leaving(lane: Lane) -> tuple[Set, Set]:
    if not lane.found:
        lane.state = "spoilt"
    lane.member()
    return lane.set_of(lane.holds), lane.set_of(None)


OPERATIONS = {
    "bootstrap": Operation(_first_join),
    "renewal": Operation(_renewal),
    "leave": Operation(_leaving, ("vmmesh-agent", "leave")),
    "purge": Operation(_leaving, ("vmmesh-agent", "leave", "--purge")),
    "install": Operation(_first_join, has_package=False),
}


@dataclass
class Result:
    """What came of one point; `wrong` says what should not have been, a sentence each."""

    point: Point
    reached: bool = False
    judgement: Judgement | None = None
    ended: str = ""
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def lost(self) -> int:
        return self.judgement.lost if self.judgement else 0

    @property
    def is_torn(self) -> bool:
        return self.judgement is not None and self.judgement.kind == "torn"


def play(lane: Lane, point: Point) -> Result:
    """Let it happen, judge, and see that the machine gets well."""
    result = Result(point)
    began = time.monotonic()
    try:
        _play(lane, point, result)
    except (subprocess.SubprocessError, OSError, LabError, AssertionError) as error:
        result.wrong.append(f"{type(error).__name__}: {error} {' '.join(getattr(error, '__notes__', []))}")
    if result.wrong:
        lane.state = "spoilt"
    result.seconds = time.monotonic() - began
    return result


def _play(lane: Lane, point: Point, result: Result) -> None:
    operation = OPERATIONS[point.operation]
    old, new = operation.prepare(lane)
    ran_before = lane.is_running()
    done = lane.traced(operation.argv, "-e", f"trace={point.call}", "-e", point.injection)
    result.judgement = seen = lane.judged(old, new)
    trace = lane.trace()
    killed = done.returncode in {-signal.SIGKILL, 128 + signal.SIGKILL}
    result.reached = killed if point.fault == KILL else "(INJECTED)" in trace
    hit = next((line for line in trace.splitlines() if "(INJECTED)" in line), "") or trace[-300:]
    result.ended = f"{hit}\nended with {done.returncode}: {done.stdout[-1500:]}{done.stderr[-1500:]}"
    if seen.kind == "torn" or seen.lost:
        result.wrong.append(f"{seen}, {seen.lost} lines of others lost")
    if point.fault != KILL:
        result.wrong += _complaints(point, done, seen)
        # Without a descriptor no command can be run, and so no unit started: the journal says what is to be done.
        is_helpless = point.kind == "open" and point.lasts and is_unfinished(lane.root)
        is_down_on_purpose = seen.kind == "begun" or is_helpless or operation.leaves
        if ran_before and not is_down_on_purpose and not lane.comes_back():
            result.wrong.append("the sidecar ran before and does not now")
    elif not killed and done.returncode != 0:
        result.wrong.append("it was not killed, and failed")
    if seen.kind == "begun" and point.number % 2:
        lane.command("systemctl", "start", "istio")
        started = judge(lane.root, old, new, running=lane.is_running())
        if started.kind == "torn":
            result.wrong.append(f"systemctl start istio: {started}")
    _mend(lane, point, old, result)


def _complaints(point: Point, done: subprocess.CompletedProcess[str], seen: Judgement) -> list[str]:
    """Say what is wrong with how the agent took an error."""
    wrong = []
    if "Traceback" in done.stderr:
        wrong.append(f"a traceback: {done.stderr[-1500:]}")
    # What cannot be written cannot be read.
    elif done.returncode and point.call != "write" and not _COMPLAINT.search(done.stderr + done.stdout):
        wrong.append(f"ended with {done.returncode} and no reason: {done.stderr!r}")
    if done.returncode == 0 and seen.kind != "new":
        wrong.append(f"ended well, with {seen}")
    # What lasts is in the way of putting the old set back, too; and who leaves goes on with it, not back.
    if seen.kind == "begun" and not point.lasts and not OPERATIONS[point.operation].leaves:
        wrong.append(f"one error, and left {seen}")
    return wrong


def _mend(lane: Lane, point: Point, old: Set, result: Result) -> None:
    """Run the command again, undisturbed, and see that all is well. What left half joins again, every third time."""
    operation = OPERATIONS[point.operation]
    joins = not operation.leaves or point.number % 3 == 0
    if joins and operation.leaves:
        lane.mesh.endpoint.invite(lane.machine)  # purging took the token
    done = lane.command(*(_BOOTSTRAP if joins else operation.argv))
    if done.returncode != 0:
        result.wrong.append(f"the next run ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-1500:]}")
    running = lane.is_running()
    seen = judge(lane.root, old, lane.set_of(lane.published if joins else None), running=running)
    if seen.kind != "new":
        result.wrong.append(f"after the next run: {seen}")
    if running != joins:
        result.wrong.append(f"after the next run the sidecar {'runs' if running else 'does not run'}")
    if is_unfinished(lane.root):
        result.wrong.append("after the next run the journal says unfinished")
    if found := leftovers(lane.root):
        result.wrong.append(f"left over: {', '.join(found)}")
    if joins:
        lane.joined()
    else:
        lane.left()
        result.wrong += lane.differences()


# --- many machines ----------------------------------------------------------


@dataclass(frozen=True)
class Lab:
    """What machines and meshes are made from."""

    packages: Packages
    network: Network
    run: Run
    fixture_rpms: tuple[Path, ...]


@contextmanager
def lanes(lab: Lab, number: int, *, has_package: bool) -> Iterator[list[Lane]]:
    """Give machines, with the sidecar's package installed or without, each with a mesh of its own."""
    network, run = lab.network, lab.run
    layers = [*image.layers("rpm", fixture_rpms=lab.fixture_rpms)]
    if has_package:
        layers.append(_with_package(layers, lab))
    with ExitStack() as stack:
        made = []
        for index in range(number):
            address = f"192.0.2.{100 + index}"
            where = ["ip", "-n", network.cluster, "address"]
            subprocess.run([*where, "add", f"{address}/24", "dev", "br0"], check=True)
            stack.callback(subprocess.run, [*where, "delete", f"{address}/24", "dev", "br0"], check=True)
            cluster = Cluster.create()
            bundles = _bundle(cluster, address, 0), _bundle(cluster, address, 1)
            istiod = stack.enter_context(OwnIstiod(address, cluster, network=network, run=run))
            endpoint = stack.enter_context(OwnEndpoint(address, bundles[0], lab.packages, network=network, run=run))
            machine = stack.enter_context(Machine(f"sweep{index}", layers=layers, network=network, run=run))
            made.append(Lane(machine, Mesh(cluster, istiod, endpoint), bundles))
        yield made


def _bundle(cluster: Cluster, address: str, number: int) -> BundleFiles:
    # Without draining a stop of the sidecar takes no time.
    settings = b"defaultConfig:\n  concurrency: %d\n  terminationDrainDuration: 0s\n" % (number + 2)
    usual = cluster.bundle(
        token=cluster.token(lifetime=timedelta(hours=12)), address=address, inbound_ports=("8080", "9090")[number]
    )
    return usual | {
        "root-cert.pem": cluster.root_pem + Authority.create(f"next root {number}").pem,
        "mesh.yaml": usual["mesh.yaml"].replace(b"defaultConfig:\n", settings),
        "hosts": usual["hosts"] + f"{address} istiod-r{number}.istio-system.svc\n".encode(),
    }


def _with_package(layers: Sequence[Path], lab: Lab) -> Path:
    """Return one more layer: what the installation of the sidecar's package changes."""
    with Machine("package", layers=layers, network=lab.network, run=lab.run) as machine:
        copy_to(machine, lab.packages.rpm, "/root/sidecar.rpm")
        machine.run(["rpm", "--install", "/root/sidecar.rpm"])
        machine.run(["rm", "/root/sidecar.rpm"])
    layer = lab.run.folder / "with-package"
    subprocess.run(["cp", "--archive", lab.run.folder / "package/upper", layer], check=True)
    shutil.rmtree(layer / "var/log/journal")
    return layer


def all_points(lane: Lane, operations: Iterable[str]) -> list[Point]:
    """Return every point of the operations, by a run of each under strace."""
    found: list[Point] = []
    for name in operations:
        operation = OPERATIONS[name]
        operation.prepare(lane)
        done = lane.traced(operation.argv, "-e", f"trace={','.join(CLASS_OF)}")
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
        lane.left() if operation.leaves else lane.joined()
        found += points(name, lane.trace())
    return found


def sample(found: Iterable[Point], kills: int, errors: int) -> list[Point]:
    """Return an even spread over each operation's kills, its errors of the disk, and (a third) its want of files."""
    groups = grouped(found, lambda point: (point.operation, point.fault == KILL, point.kind == "open"))
    limits = {(True, False): kills, (False, False): errors, (False, True): errors // 3}
    return [point for (_, *kind), group in groups.items() for point in spread(group, limits[kind[0], kind[1]])]


def whole(found: Iterable[Point], opens: int = 40) -> list[Point]:
    """Return all of them; of those that open something only `opens` of each kind, for these are many and alike."""
    groups = grouped(found, lambda point: (point.operation, point.call, point.fault))
    return [
        point
        for group in groups.values()
        for point in (spread(group, opens) if group[0].kind == "open" else group)
    ]  # fmt: skip


def sweep(made: Sequence[Lane], chosen: Sequence[Point], tell: Callable[[Result], None]) -> list[Result]:
    """Play the points on the lanes, in their order."""
    free: queue.SimpleQueue[Lane] = queue.SimpleQueue()
    for lane in made:
        free.put(lane)

    def turn(point: Point) -> Result:
        lane = free.get()
        try:
            result = play(lane, point)
            tell(result)
            return result
        finally:
            free.put(lane)

    with ThreadPoolExecutor(len(made)) as pool:
        return [*pool.map(turn, chosen)]


def sweep_all(
    lab: Lab,
    operations: Sequence[str],
    choose: Callable[[list[Point]], Sequence[Point]],
    *,
    number: int = LANES,
    tell: Callable[[Result], None] = lambda _: None,
) -> list[Result]:
    """Find the points of the operations, and play those of them that are chosen, on `number` machines."""
    results: list[Result] = []
    for has_package, names in grouped(operations, lambda name: OPERATIONS[name].has_package).items():
        with lanes(lab, number, has_package=has_package) as made:
            results += sweep(made, choose(all_points(made[0], names)), tell)
    return results


# --- what came of it --------------------------------------------------------


def figures(results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """Return what there is to say, for JSON."""
    kinds = Counter(result.judgement.kind if result.judgement else "unknown" for result in results)
    return {
        "points": len(results),
        "kills": sum(result.point.fault == KILL for result in results),
        "reached": sum(result.reached for result in results),
        "left": dict(kinds),
        "torn_sets": kinds["torn"],
        "hosts_lines_lost": sum(result.lost for result in results),
        "failures": {str(result.point): result.wrong for result in results if result.wrong},
        "seconds": round(seconds, 1),
    }


def table(results: Sequence[Result]) -> str:
    """Return the figures as a table, a line for each operation, class of calls and kind of fault."""
    faults = {True: "lasting", False: "error"}
    rows = grouped(
        results,
        lambda result: (
            result.point.operation,
            result.point.kind,
            KILL if result.point.fault == KILL else faults[result.point.lasts],
        ),
    )
    kinds: tuple[Kind, ...] = ("old", "new", "back", "begun", "torn")
    lines = [["operation", "calls", "fault", "points", "reached", *kinds, "lost", "failed"]]
    for key, group in rows.items():
        left = Counter(result.judgement.kind for result in group if result.judgement)
        counts = [len(group), sum(result.reached for result in group), *(left[kind] for kind in kinds)]
        counts += [sum(result.lost for result in group), sum(bool(result.wrong) for result in group)]
        lines.append([*key, *map(str, counts)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n" for line in lines
    )


def account(results: Sequence[Result], seconds: float) -> str:
    """Return the table, the failures with how to see them again, and the sum."""
    lines = [table(results)]
    for result in results:
        if result.wrong:
            lines.append(f"FAILED  {result.point}  (again alone: python -m system.sweep --only '{result.point}')")
            lines += [f"  {what}" for what in (*result.wrong, result.ended)]
    told = figures(results, seconds)
    lines.append(
        f"{told['points']} points, {told['reached']} of them reached, in {seconds:.0f} s: "
        f"{told['torn_sets']} torn sets, {told['hosts_lines_lost']} lines of others lost, "
        f"{len(told['failures'])} failures"
    )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Sweep from the command line; the exit status is 0 if all is well."""
    parser = argparse.ArgumentParser(prog="system.sweep", description="kill and fail the agent at its system calls")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--all", action="store_true", help="every point; the default")
    what.add_argument("--sample", type=int, metavar="N", help="some N kills and N/2 errors of each operation")
    what.add_argument(
        "--only", nargs="+", type=Point.parse, metavar="POINT", help="these, such as 'renewal write 3 EIO+'"
    )
    what.add_argument("--list", action="store_true", help="name the points, and do nothing to them")
    parser.add_argument("--fault", choices=["kill", "error"], help="kills alone, or errors alone")
    parser.add_argument("--kind", choices=CALLS, help="system calls of this kind alone")
    parser.add_argument("--operation", nargs="+", choices=OPERATIONS, default=[*OPERATIONS])
    parser.add_argument("--lanes", type=int, default=LANES, help="machines side by side (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()

    def choose(found: list[Point]) -> Sequence[Point]:
        if options.only:
            return [point for point in options.only if point.operation in {each.operation for each in found}]
        chosen = [point for point in whole(found) if options.kind in {None, point.kind}]
        chosen = [point for point in chosen if options.fault in {None, "kill" if point.fault == KILL else "error"}]
        if options.sample:
            chosen = sample(chosen, options.sample, options.sample // 2)
        if not options.list:
            return chosen
        sys.stdout.write("".join(f"{point}\n" for point in chosen))
        return []

    with Run() as run:
        fixtures = build_fixture_rpms(run.folder / "fixture-rpms")
        lab = Lab(build(run.folder / "packages"), Network(run), run, fixtures)
        operations = [*dict.fromkeys(point.operation for point in options.only or ())] or options.operation
        number = min(options.lanes, len(options.only or range(options.lanes)))
        results = sweep_all(lab, operations, choose, number=number, tell=_tell)
    seconds = time.monotonic() - began
    if not options.list:
        sys.stdout.write(account(results, seconds))
    if options.json:
        options.json.write_text(json.dumps(figures(results, seconds), indent=2) + "\n")
    return 1 if any(result.wrong for result in results) else 0


def _tell(result: Result) -> None:
    kind = result.judgement.kind if result.judgement else "?"
    sys.stderr.write(f"{result.point!s:<40} {kind:<6} {result.seconds:5.1f} s {'FAILED' if result.wrong else ''}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    raise SystemExit(main())
