"""A week in minutes: the real daemon, network child and HTTPS on a driven clock, while nearly all goes wrong in turn.

The machine's files are real; its dpkg, its systemd and its sidecar are pretended. The sidecar asks for a certificate
of 24 h at each start and at half of its life: by mTLS while it has a valid one, else with the token.

The network child retries by itself, in real time. Where a fault is to last, its first retry is taken for the end of
the attempt, and the 60 s that the daemon would have waited for more of them pass on the driven clock alone; where
there is no network at all, a child that only says so stands in for it. So what is counted in such faults is attempts,
each of which would be some requests.
"""

import hashlib
import json
import os
import random
import socket
import struct
import threading
import time as real_time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import IO, Self

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from factories import CLUSTER, STRANGER, a_bundle, a_config
from fakes import Endpoint, FakeMachine, http, tls_of, write_package
from lab.cluster import JSON_MEDIA_TYPE, Authority, Files, as_json, now, private_pem
from vmmesh_agent import place, store
from vmmesh_agent.clock import Clock
from vmmesh_agent.config import SidecarSettings
from vmmesh_agent.daemon import Daemon
from vmmesh_agent.events import Events
from vmmesh_agent.health import Health, State
from vmmesh_agent.host import Account, Child
from vmmesh_agent.records import Stream
from vmmesh_agent.signals import CERT_CHAIN, KEY
from vmmesh_agent.units import Units
from vmmesh_agent.watch import LOGS

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="gives files to istio-proxy"),
    pytest.mark.timeout(1800),  # the week is one test's
]

HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)
TOKEN_LIFE = HOUR
CERTIFICATE_LIFE = 24 * HOUR
ATTEMPT = MINUTE  # that the daemon gives the network child for retries
LONGEST_BACK_OFF = 21 * MINUTE
LONGEST_REFRESH = 0.7 * TOKEN_LIFE


class Time:
    """The true time, which goes on when it is told to, and how wrong the machine's clock is."""

    def __init__(self) -> None:
        self.begin = self.true = now()
        self.wrong = timedelta(0)

    @property
    def wall(self) -> datetime:
        return self.true + self.wrong

    @property
    def elapsed(self) -> timedelta:
        return self.true - self.begin

    def advance(self, length: timedelta) -> None:
        self.true += length

    def seconds(self) -> float:
        return (self.true - self.begin).total_seconds()

    @property
    def clock(self) -> Clock:
        """The machine's."""
        return Clock(lambda: self.wall, self.seconds, lambda seconds: self.advance(timedelta(seconds=seconds)))


# --- the cluster --------------------------------------------------------------------------------------------------

# What the endpoint answers in place of a bundle.
ANSWERS: Mapping[str, bytes] = {
    "401": http("401 Unauthorized"),
    "403": http("403 Forbidden"),
    "404": http("404 Not Found"),
    "429": http("429 Too Many Requests", Retry_After="90"),
    "500": http("500 Internal Server Error"),
    "503": http("503 Service Unavailable", Retry_After="600"),
    "garbage": http("200 OK", b"\x89PNG\r\n\x1a\n" + bytes(4000)),
    "broken off": http("200 OK", bytes(4000))[:-3000],
}
CERTIFICATES = ("unknown CA", "expired certificate", "wrong name")  # of the endpoint
BUNDLES = ("other audience", "expired token", "forbidden variable", "no token")
FAULTS = (*ANSWERS, "reset", "slow", *CERTIFICATES, *BUNDLES, "stale")


def _reset(connection: socket.socket) -> None:
    """Close while it lingers for no time at all: the kernel sends RST in place of FIN (socket(7))."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _trickle(connection: socket.socket) -> None:
    """Send a byte now and then, longer than the agent has patience."""
    with suppress(OSError):
        for byte in http("200 OK", bytes(4000)):
            connection.sendall(bytes([byte]))
            real_time.sleep(0.2)


class Cluster:
    """The endpoint and istiod. The endpoint makes a new token where the newest is older than five minutes."""

    def __init__(self, time: Time, folder: Path) -> None:
        self._time = time
        self._folder = folder
        dates = {"not_before": now() - 3 * HOUR, "not_after": now() - HOUR}
        for kind, name, ca, more in (
            ("unknown CA", "127.0.0.1", STRANGER, {}),
            ("expired certificate", "127.0.0.1", None, dates),
            ("wrong name", "192.0.2.7", None, {}),
        ):
            certificate, key = CLUSTER.server_certificate([name], ca=ca, **more)
            (folder / f"{kind}.pem").write_bytes(certificate + key)
        self._tls = tls_of(CLUSTER, folder)
        self.endpoint = Endpoint(self._tls, [self._answer])
        self.fault = ""
        self.is_cut_off = False  # nobody reaches the endpoint, nor istiod
        self.is_stale = False  # no new token is made
        self.roots = CLUSTER.root_pem
        self.environment: dict[str, str | None] = {}
        self.mesh_note = b""
        self.expiry: dict[str, datetime] = {}  # of each sound token that was made
        self.requests: list[tuple[datetime, str]] = []  # when, and which status or fault
        self._made = time.begin - HOUR
        self._body = b""

    def fails_by(self, fault: str) -> None:
        """From now on, this is wrong; nothing, where it is empty."""
        self.fault = fault
        self.is_cut_off = fault == "no network"
        self.is_stale = fault == "stale"
        self._tls.load_cert_chain(self._folder / (f"{fault}.pem" if fault in CERTIFICATES else "server.pem"))

    @property
    def lasts(self) -> bool:
        """Is the fault one that the network child would retry?"""
        return self.fault in {"429", "500", "503", "reset", "slow", "broken off"}

    def renew(self) -> None:
        """Make the bundle anew, with a new token."""
        self._made = self._time.true.replace(microsecond=0)
        token = CLUSTER.token(issued_at=self._made, lifetime=TOKEN_LIFE)
        self.expiry[token] = self._made + TOKEN_LIFE
        self._body = as_json(self._files(token))

    def _files(self, token: str, **environment: str) -> Files:
        mesh = a_bundle().files["mesh.yaml"] + self.mesh_note
        variables = self.environment | environment
        return dict(a_bundle(token=token, environment=variables, root_cert_pem=self.roots, mesh_yaml=mesh).files)

    def _answer(self, connection: socket.socket) -> None:
        if self.fault in {"reset", "slow"}:
            self.requests.append((self._time.true, self.fault))
            {"reset": _reset, "slow": _trickle}[self.fault](connection)
            return
        status, answer = self._told(self.endpoint.header("If-None-Match", -1))
        self.requests.append((self._time.true, status))
        connection.sendall(answer)

    def _told(self, known: str | None) -> tuple[str, bytes]:
        if self.fault in ANSWERS:
            return self.fault, ANSWERS[self.fault]
        if self.fault in BUNDLES:
            return self.fault, http("200 OK", as_json(self._spoilt()), Content_Type=JSON_MEDIA_TYPE)
        if not self.is_stale and self._time.true - self._made >= 5 * MINUTE:
            self.renew()
        etag = f'"{hashlib.sha256(self._body).hexdigest()[:16]}"'
        # The child compares with the real clock: what it is to see is how wrong the machine's is.
        date = format_datetime(datetime.now(UTC) - self._time.wrong, usegmt=True)
        if known == etag:
            return "304", http("304 Not Modified", ETag=etag, Date=date)
        return "200", http("200 OK", self._body, ETag=etag, Date=date, Content_Type=JSON_MEDIA_TYPE)

    def _spoilt(self) -> Files:
        true = self._time.true
        match self.fault:
            case "other audience":
                return self._files(CLUSTER.token(issued_at=true, audience="other"))
            case "expired token":
                return self._files(CLUSTER.token(issued_at=true - 2 * HOUR))
            case "forbidden variable":
                return self._files(CLUSTER.token(issued_at=true), LD_PRELOAD="/tmp/x.so")
        return {name: content for name, content in self._files(CLUSTER.token()).items() if name != "istio-token"}


# --- the machine --------------------------------------------------------------------------------------------------

START = (
    'info\tFLAG: --domain=""',
    "info\tVersion 1.28.2-0f1e2d3c4b5a69788796a5b4c3d2e1f001234567-Clean",
    "info\tProxy role\tips=[10.1.2.3] type=sidecar id=vm-1.vm domain=vm.svc.cluster.local",
    "info\tOpening status port 15020",
    "info\tStarting proxy agent",
)
SIGNED = "info\tcache\tgenerated new workload certificate\tlatency=101.2ms ttl=23h59m59.2s"
CONNECTED = "info\txdsproxy\tconnected to delta upstream XDS server: istiod.istio-system.svc:15012\tid=1"
WORKING = (
    "info\tads\tADS: new connection for node:vm-1.vm-1",
    "info\tcache\treturned workload certificate from cache\tttl=23h59m58.1s",
    "info\tads\tSDS: PUSH request for node:vm-1.vm resources:1 size:4.0kB resource:default",
)
STOP = ("info\tStatus server has successfully terminated", "info\tAgent has successfully terminated")
UNSIGNED = "warn\tsds\tfailed to warm certificate: failed to generate workload certificate: create certificate: "
UNREACHED = (
    'rpc error: code = Unavailable desc = connection error: desc = "transport: Error while dialing: dial tcp'
    ' 192.0.2.1:15012: i/o timeout"'
)
REFUSED = "rpc error: code = Unauthenticated desc = request authenticate failure"
CLOSED = (
    "warning\tenvoy config external/envoy/source/extensions/config_subscription/grpc/grpc_stream.h:226\t"
    "DeltaAggregatedResources gRPC config stream to xds-grpc closed since {seconds:.0f}s ago: 14, connection error:"
    ' desc = "transport: Error while dialing: dial tcp 192.0.2.1:15012: i/o timeout"\tthread=14'
)


class Machine(FakeMachine):
    """A machine whose sidecar needs certificate, token and istiod."""

    def __init__(self, root: Path, time: Time, cluster: Cluster) -> None:
        super().__init__(root)
        self._time = time
        self._cluster = cluster
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._is_signed = False  # in this run
        self._lost_since: datetime | None = None  # the stream to istiod
        self.valid_from = self.valid_until = time.begin
        self.expired: set[datetime] = set()  # the ends of certificates that ran out under a running sidecar
        self.learned = b""  # root certificates that istiod hands out with the next certificate
        self.attempts: list[datetime] = []
        write_package(root / "opt/istio-sidecar.deb")
        (root / "etc/machine-id").write_text("1234567890abcdef" * 2 + "\n")
        (root / "etc/ca.pem").write_bytes(CLUSTER.root_pem)

    @property
    def token(self) -> str:
        return (self.read(place.TOKEN) or b"").decode()

    # --- its network ---

    def start(self, argv: Sequence[str], *, pass_descriptors: Sequence[int] = ()) -> Child:
        """Start the network child; one that would retry for a minute ends at once, and a minute has gone by."""
        self.attempts.append(self._time.true)
        if self._cluster.is_cut_off:
            self._time.advance(ATTEMPT)
            failed = {"event": "failed", "code": "endpoint-unreachable", "message": "no answer", "retry": True}
            return super().start(["sh", "-c", 'read -r _; echo "$1"', "-", json.dumps(failed)])
        child = super().start(argv, pass_descriptors=pass_descriptors)
        if self._cluster.lasts:
            assert child.stdout
            ours, theirs = os.pipe()
            threading.Thread(target=self._relay, args=(child.stdout, os.fdopen(theirs, "wb"))).start()
            child.stdout = os.fdopen(ours, "rb")
        return child

    def _relay(self, said: IO[bytes], heard: IO[bytes]) -> None:
        """Pass on what the child says, and that it failed after its first retry."""
        with said, suppress(BrokenPipeError), heard:
            for line in said:
                heard.write(line)
                event = json.loads(line)
                if event["event"] == "retry":
                    self._time.advance(ATTEMPT)
                    heard.write(json.dumps(event | {"event": "failed"}).encode() + b"\n")
                heard.flush()

    def _answer(self, argv: list[str]) -> tuple[int, str]:
        if argv[0] == "getent":
            lines = (self.root / "etc/hosts").read_text().splitlines()
            found = [line.split()[0] for line in lines if argv[-1] in line.split()[1:]]
            return (0, f"{found[0]} STREAM {argv[-1]}\n") if found else (2, "")
        return super()._answer(argv)

    # --- its sidecar ---

    def _do(self, verb: str) -> None:
        was_active = self.active == "active"
        super()._do(verb)
        if verb == "stop" and was_active:
            self._write(Stream.LOG, *STOP)
        elif verb == "start":
            self._is_signed, self._lost_since = False, self._time.wall
            self._write(Stream.LOG, *START)
            self.live()

    def live(self) -> None:
        """Let the sidecar do what is due at this moment. One whose certificate ran out asks for no other."""
        if self.active != "active":
            return
        if self._is_signed and self._time.wall >= self.valid_until:
            self.expired.add(self.valid_until)
        elif not self._is_signed or self._time.wall >= self.valid_from + CERTIFICATE_LIFE / 2:
            self._ask_for_certificate()
        is_admitted = not self._cluster.is_cut_off and self._is_signed and self._time.wall < self.valid_until
        if is_admitted and self._lost_since:
            self._lost_since = None
            self._write(Stream.LOG, CONNECTED, *WORKING)
        elif not is_admitted:
            self._lost_since = self._lost_since or self._time.wall
            lost = (self._time.wall - self._lost_since).total_seconds()
            self._write(Stream.ERR, CLOSED.format(seconds=max(0, lost)))

    def _ask_for_certificate(self) -> None:
        """Ask istiod, which judges by the true time; what it signed is kept in files as pilot-agent does."""
        has_certificate = max(self._time.wall, self._time.true) < self.valid_until
        has_token = self._time.true < self._cluster.expiry.get(self.token, self._time.begin)
        if self._cluster.is_cut_off:
            self._write(Stream.LOG, UNSIGNED + UNREACHED)
            return
        if not has_certificate and not has_token:
            self._write(Stream.LOG, UNSIGNED + REFUSED)
            return
        self._is_signed = True
        self.valid_from, self.valid_until = self._time.true, self._time.true + CERTIFICATE_LIFE
        leaf = CLUSTER.workload_certificate(
            self._key.public_key(), not_before=self.valid_from - 2 * MINUTE, not_after=self.valid_until
        )
        roots = self.read(place.ROOT_CERT) or b""
        owner = Account(self.UID, self.UID)
        self.write(CERT_CHAIN, leaf + CLUSTER.root_pem, owner, 0o600)
        self.write(KEY, private_pem(self._key), owner, 0o600)
        if self.learned not in roots:
            self.write(place.ROOT_CERT, roots + self.learned, owner, 0o600)
        self._write(Stream.LOG, SIGNED)

    def _write(self, stream: Stream, *lines: str) -> None:
        with self.outside(LOGS[stream]).open("a") as log:
            for line in lines:
                log.write(f"{self._time.wall:%Y-%m-%dT%H:%M:%S.%fZ}\t{line}\n")


# --- the two together ---------------------------------------------------------------------------------------------


class Log:
    """The daemon's log, to be read when something went wrong."""

    def __init__(self, time: Time) -> None:
        self.lines: list[str] = []
        self._time = time

    def info(self, event: str, **values: object) -> None:
        said = " ".join(f"{name}={value}" for name, value in values.items())
        self.lines.append(f"{self._time.elapsed} {event} {said}")

    warning = info


@dataclass(frozen=True)
class Sample:
    """How things were after one turn of the daemon."""

    at: datetime
    health: Health
    token_life: timedelta  # that is left of the one on the disk, if it is a sound one
    roots: frozenset[bytes]  # on the disk, beside the cluster's first


class World:
    """A daemon on its machine, in its cluster; a context manager."""

    def __init__(self, folder: Path, chance: Callable[[], float]) -> None:
        folder.mkdir(exist_ok=True)
        self.time = Time()
        self.cluster = Cluster(self.time, folder)
        self.machine = Machine(folder / "tree", self.time, self.cluster)
        self.log = Log(self.time)
        self.samples: list[Sample] = []
        self.tokens: list[str] = []  # each that was on the disk
        self._unsettled_until = self.time.true
        ca = PurePosixPath("/etc/ca.pem")
        package = SidecarSettings(package="/opt/istio-sidecar.deb")
        config = a_config(self.cluster.endpoint.url, ca_file=ca, timeout=5.0, sidecar=package)
        self.daemon = Daemon(
            self.machine, replace(config, healthy_within=180.0), self.log, clock=self.time.clock, chance=chance
        )

    def __enter__(self) -> Self:
        self._serving = self.cluster.endpoint.serving()
        self._serving.__enter__()
        self.daemon.begin()
        # The journal of whoever runs the tests is not this machine's.
        self.daemon.events = Events(self.machine, Units(self.machine), self.log, tell=lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        self._serving.__exit__(None, None, None)

    def turn(self) -> Sample:
        """Let sidecar and daemon do what is due."""
        self.machine.live()
        self.daemon.turn()
        assert self.daemon.reported
        token = self.machine.token
        if token and token not in self.tokens[-1:]:
            self.tokens.append(token)
        left = self.cluster.expiry.get(token, self.time.begin) - self.time.true
        before = self.samples[-1] if self.samples else None
        on_disk = self.machine.read(place.ROOT_CERT) or b""
        roots = frozenset(root.pem for root in (ADDED, LEARNED) if root.pem in on_disk)
        self.samples.append(Sample(self.time.true, self.daemon.reported.health, left, roots))
        if before is None or before.health.state != self.samples[-1].health.state:
            self.stir()
        return self.samples[-1]

    def stir(self) -> None:
        """Look more often for a while: something happened."""
        self._unsettled_until = self.time.true + 3 * MINUTE

    def live(self, until: datetime, step: timedelta = MINUTE) -> None:
        """Turn and turn until then; so far apart where all is quiet."""
        while self.time.true < until:
            self.turn()
            length = timedelta(seconds=15) if self.time.true < self._unsettled_until else step
            self.time.advance(min(length, max(until - self.time.true, timedelta(seconds=1))))


# --- the week -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """Something that is wrong from an hour of the week on, for some hours; the daemon may be made to see it at once."""

    kind: str
    begins: float
    lasts: float
    at_once: bool = False

    @property
    def ends(self) -> float:
        return self.begins + self.lasts

    def begin(self, world: World) -> None:
        """Let it happen."""
        match self.kind.split():
            case ["clock", number, unit, direction]:
                length = int(number) * {"h": HOUR, "min": MINUTE}[unit]
                world.time.wrong = length if direction == "ahead" else -length
            case ["suspend"]:
                world.time.advance(self.lasts * HOUR)
            case _:
                world.cluster.fails_by(self.kind)
        if self.at_once:
            world.daemon.reload(world.daemon.config)

    def end(self, world: World) -> None:
        """Let all be well again."""
        world.time.wrong = timedelta(0)
        world.cluster.fails_by("")


FAULTLESS = ((0.1, 24), (48, 72), (145, 168))  # hours
LASTING = (
    Fault("clock 5 h ahead", 72, 0.5),
    Fault("clock 10 min ahead", 74, 0.5),
    Fault("clock 3 h behind", 76, 0.5),
    Fault("suspend", 78, 3),
    Fault("no network", 83, 2),
    Fault("503", 87, 2),
    Fault("no network", 91, 30),  # longer than the certificate lives
)


def _faults(chance: random.Random) -> list[Fault]:
    """Each kind once on the second day, then what lasts for hours, then any of them on the sixth."""
    each = [Fault(kind, 24 + number * 24 / len(FAULTS), 1 / 3, at_once=True) for number, kind in enumerate(FAULTS)]
    mixed = [Fault(chance.choice(FAULTS), 124 + number * 1.25, chance.uniform(0.02, 0.5)) for number in range(16)]
    return [*each, *LASTING, *mixed]


def _roots(*roots: Authority) -> Callable[[World], None]:
    def change(world: World) -> None:
        world.cluster.roots = b"".join(root.pem for root in (CLUSTER.root, *roots))
        world.cluster.renew()

    return change


def _environment(world: World) -> None:
    world.cluster.environment = {"ISTIO_INBOUND_PORTS": "8080"}
    world.cluster.renew()


def _mesh(world: World) -> None:
    world.cluster.mesh_note = b"# changed\n"
    world.cluster.renew()


def _learn(world: World) -> None:
    world.machine.learned = LEARNED.pem


def _reload(world: World) -> None:
    """Somebody reloads the daemon, and once more a moment later: then the bundle is the same."""
    for _ in range(2):
        world.daemon.reload(world.daemon.config)
        world.turn()
        world.time.advance(timedelta(seconds=2))


ADDED, LEARNED = Authority.create("a second root"), Authority.create("a root that istiod brings")
# What the daemon has to take notice of and is no fault, by the hour: first what the sidecar must be started on.
CHANGES = ((50, _roots(ADDED)), (55, _environment), (60, _roots()), (65, _mesh))
RELOADS = (5, 15, 69, 160)


@dataclass(frozen=True)
class Figures:
    """What came of it."""

    renewals: int
    attempts: int
    requests: int
    not_modified: int
    on_faultless_days: int
    ideal: float  # requests on the faultless days
    most_attempts_in_an_hour: int
    faults: Mapping[str, int]
    longest_recovery: float  # minutes
    starts: int
    starts_needed: int
    expired_certificates: int

    def __str__(self) -> str:
        kinds = ", ".join(f"{number} {kind}" for kind, number in self.faults.items())
        shown = vars(self) | {"faults": f"{sum(self.faults.values())} ({kinds})"}
        return "; ".join(
            f"{name.replace('_', ' ')}: {f'{value:.1f}' if isinstance(value, float) else value}"
            for name, value in shown.items()
        )


@dataclass(frozen=True)
class Week:
    """A week that was lived through."""

    world: World
    script: Sequence[Fault]

    @property
    def begin(self) -> datetime:
        return self.world.time.begin

    def samples(self, since: float, until: float) -> list[Sample]:
        """Return how it was between two hours."""
        return [each for each in self.world.samples if since <= (each.at - self.begin) / HOUR < until]

    def recovery(self, fault: Fault) -> timedelta:
        """Return how long after its end, and before the next fault, it was last seen to be anything but healthy."""
        # A second less: a moment is rounded to microseconds, and what the next fault does is not this one's.
        until = min([168, *(other.begins for other in self.script if other.begins >= fault.ends)]) - 1 / 3600
        unwell = [each.at for each in self.samples(fault.ends, until) if each.health.state is not State.HEALTHY]
        return max(unwell, default=self.begin + fault.ends * HOUR) - (self.begin + fault.ends * HOUR)

    @property
    def figures(self) -> Figures:
        machine = self.world.machine
        statuses = [status for _, status in self.world.cluster.requests]
        hours = [(at - self.begin) / HOUR for at, _ in self.world.cluster.requests]
        attempts = Counter(int((at - self.begin) / HOUR) for at in machine.attempts)
        return Figures(
            renewals=len(self.world.tokens) - 1,
            attempts=len(machine.attempts),
            requests=len(statuses),
            not_modified=statuses.count("304"),
            on_faultless_days=sum(since <= hour < until for hour in hours for since, until in FAULTLESS),
            ideal=sum(until - since for since, until in FAULTLESS) * HOUR / (0.6 * TOKEN_LIFE),
            most_attempts_in_an_hour=max(attempts.values()),
            faults=Counter(fault.kind for fault in self.script),
            longest_recovery=max(map(self.recovery, self.script)) / MINUTE,
            starts=machine.starts,
            starts_needed=1 + len(CHANGES) + len(machine.expired),
            expired_certificates=len(machine.expired),
        )


def a_week(folder: Path, seed: int = 7) -> Week:
    """Live through it."""
    chance = random.Random(seed)  # noqa: S311  # no secret
    script = _faults(chance)
    moments: list[tuple[float, Callable[[World], None]]] = [
        *((fault.begins, fault.begin) for fault in script),
        *((fault.ends, fault.end) for fault in script),
        *CHANGES,
        *((hour, _reload) for hour in RELOADS),
        (10, _learn),
    ]
    with World(folder, chance.random) as world:
        for hour, happen in sorted(moments, key=lambda moment: moment[0]):
            world.live(world.time.begin + hour * HOUR, 2 * MINUTE)
            happen(world)
            world.stir()
        world.live(world.time.begin + 168 * HOUR, 2 * MINUTE)
    return Week(world, script)


# --- what the week shows ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def week(tmp_path_factory: pytest.TempPathFactory) -> Week:
    week = a_week(tmp_path_factory.mktemp("week") / "world")
    print(f"\n{week.figures}")  # noqa: T201  # for `pytest -s`, and beside whatever fails
    return week


@pytest.mark.long
def test_it_renews_through_the_week_and_ends_healthy(week: Week) -> None:
    assert week.figures.renewals >= 200
    assert week.world.samples[-1].health.state is State.HEALTHY


@pytest.mark.long
def test_on_days_without_faults_there_is_nothing_but_health(week: Week) -> None:
    days = [week.samples(since, until) for since, until in FAULTLESS]
    unwell = [each for day in days for each in day if each.health.state is not State.HEALTHY]
    assert [(each.at - week.begin, each.health.state, each.health.cause) for each in unwell] == []


@pytest.mark.long
def test_after_each_fault_it_is_healthy_within_the_longest_back_off(week: Week) -> None:
    late = {
        (fault.kind, round(fault.begins, 2)): recovery / MINUTE
        for fault in week.script
        if (recovery := week.recovery(fault)) > LONGEST_BACK_OFF
    }
    assert late == {}


@pytest.mark.long
def test_days_without_faults_cost_no_more_requests_than_the_tokens_need(week: Week) -> None:
    figures = week.figures
    assert figures.on_faultless_days <= figures.ideal * 1.2
    assert figures.on_faultless_days >= figures.ideal * 0.8


@pytest.mark.long
def test_an_endpoint_in_trouble_is_not_hammered(week: Week) -> None:
    # Once a minute, while the two clocks differ, is the most.
    assert week.figures.most_attempts_in_an_hour <= 65


@pytest.mark.long
def test_a_bundle_that_stays_the_same_is_one_request_that_is_answered_with_304(week: Week) -> None:
    for hour in RELOADS:
        again = week.begin + hour * HOUR + timedelta(seconds=1)
        asked = [status for at, status in week.world.cluster.requests if again < at < again + 5 * MINUTE]
        assert asked == ["304"]


@pytest.mark.long
def test_the_sidecar_starts_exactly_as_often_as_changes_and_dead_certificates_need(week: Week) -> None:
    assert week.figures.starts == week.figures.starts_needed
    assert week.figures.expired_certificates == 1  # in the outage that is longer than its life


@pytest.mark.long
def test_the_token_on_the_disk_is_dead_in_outages_alone(week: Week) -> None:
    spells = [
        (week.begin + fault.begins * HOUR, week.begin + fault.ends * HOUR + LONGEST_BACK_OFF) for fault in week.script
    ]
    dead = [sample.at for sample in week.world.samples if sample.token_life <= timedelta(0)]
    assert dead
    assert [at - week.begin for at in dead if not any(begin <= at <= end for begin, end in spells)] == []


@pytest.mark.long
def test_roots_come_and_go_as_the_cluster_says_and_what_the_sidecar_learned_stays(week: Week) -> None:
    hours = LONGEST_REFRESH / HOUR + 0.1
    for since, until, roots in (
        (0, 10, set()),
        (13, 50, {LEARNED}),  # with the certificate that was due after half a day
        (50 + hours, 60, {LEARNED, ADDED}),
        (60 + hours, 168, {LEARNED}),
    ):
        assert {sample.roots for sample in week.samples(since, until)} == {frozenset(root.pem for root in roots)}


# --- one thing at a time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chance", "share"), [(0.0, 0.5), (0.5, 0.6), (1.0, 0.7)])
def test_where_in_the_tokens_life_it_is_refreshed_is_chance(tmp_path: Path, chance: float, share: float) -> None:
    with World(tmp_path / "world", lambda: chance) as world:
        world.live(world.time.begin + 2.2 * HOUR)
    moments = [at for at, _ in world.cluster.requests]
    ages = [after - before for before, after in pairwise(moments)]
    assert len(ages) >= 3
    assert all(share * TOKEN_LIFE - MINUTE <= age <= share * TOKEN_LIFE + 2 * MINUTE for age in ages)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A machine that joined three minutes ago."""
    with World(tmp_path / "world", lambda: 0.5) as world:
        world.live(world.time.begin + 3 * MINUTE)
        assert world.samples[-1].health.state is State.HEALTHY
        assert len(world.cluster.requests) == 1
        yield world


def test_a_clock_that_is_set_forward_by_a_day_makes_it_ask_at_once(world: World) -> None:
    world.time.wrong = timedelta(days=1)
    world.turn()
    assert len(world.cluster.requests) == 2
    world.time.wrong = timedelta(0)
    world.live(world.time.true + LONGEST_BACK_OFF)
    assert world.turn().health.state is State.HEALTHY
    assert world.machine.starts == 1


def test_after_a_day_of_sleep_it_asks_at_once_and_starts_the_sidecar_on_the_new_token(world: World) -> None:
    world.time.advance(25 * HOUR)
    world.turn()
    assert len(world.cluster.requests) == 2
    assert world.machine.starts == 2
    world.live(world.time.true + MINUTE)
    assert world.turn().health.state is State.HEALTHY


def test_an_endpoint_without_a_newer_token_is_asked_now_and_then(world: World) -> None:
    world.cluster.fails_by("stale")
    world.live(world.time.begin + TOKEN_LIFE)
    asked = [status for _, status in world.cluster.requests[1:]]
    assert set(asked) == {"304"}
    assert 3 <= len(asked) <= 25
    assert world.machine.starts == 1
    world.cluster.fails_by("")
    world.live(world.time.true + LONGEST_BACK_OFF)
    assert world.turn().health.state is State.HEALTHY
    assert world.samples[-1].token_life > timedelta(0)


def test_an_endpoint_that_says_when_to_ask_again_is_not_asked_before(world: World) -> None:
    world.cluster.fails_by("503")  # Retry-After: 600
    world.live(world.time.begin + 1.3 * HOUR)
    moments = [at for at, status in world.cluster.requests if status == "503"]
    assert len(moments) >= 3
    assert min(after - before for before, after in pairwise(moments)) >= 10 * MINUTE


def test_a_bundle_that_is_the_same_costs_one_request_and_changes_nothing(world: World) -> None:
    def files() -> dict[Path, int]:
        folders = [world.machine.root / folder for folder in ("etc", "var/lib", "run/secrets")]
        return {path: path.stat().st_ino for folder in folders for path in folder.rglob("*") if path.is_file()}

    before, changes = files(), list(world.machine.changes)
    membership = store.load(world.machine)
    assert membership
    world.daemon.reload(world.daemon.config)
    world.turn()
    assert [status for _, status in world.cluster.requests] == ["200", "304"]
    assert world.cluster.endpoint.header("If-None-Match", -1) == membership.current.etag != ""
    assert (files(), world.machine.changes) == (before, changes)
    assert world.turn().health.state is State.HEALTHY


def test_a_long_outage_is_told_with_the_moment_at_which_the_machine_drops_out(world: World) -> None:
    world.cluster.fails_by("no network")
    world.live(world.time.begin + 2 * HOUR, 5 * MINUTE)
    end = world.machine.valid_until
    told = [each.message for each in world.turn().health.conditions]
    assert len([message for message in told if f"this VM drops out at {end:%Y-%m-%d %H:%M:%SZ}" in message]) == 1
    world.live(end, 15 * MINUTE)
    assert "cert_expired" not in {each.code for sample in world.samples for each in sample.health.conditions}
    world.live(end + 2 * MINUTE)
    health = world.turn().health
    assert health.state is State.FAILED
    assert "cert_expired" in {each.code for each in health.conditions}
    world.cluster.fails_by("")
    world.live(end + LONGEST_BACK_OFF)
    assert world.turn().health.state is State.HEALTHY
    assert world.machine.starts == 2
