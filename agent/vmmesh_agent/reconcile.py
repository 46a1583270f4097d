"""THE flow: fetch → verify → install → place → start, and then watch.

Each step compares first and says what it changed. Until the bundle is verified and the package is judged, nothing
on the machine is touched; the sidecar is stopped only if something beneath it changes, and it is never running
while cluster.env changes, for its start script undoes the traffic capture from that very file.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Protocol

from vmmesh_agent import install, place, store
from vmmesh_agent.bundle import Bundle, Sidecar
from vmmesh_agent.config import Config
from vmmesh_agent.errors import AgentError, InstallError
from vmmesh_agent.fetch import Download, fetch
from vmmesh_agent.health import Health, State
from vmmesh_agent.host import Host
from vmmesh_agent.packages import managers
from vmmesh_agent.report import Known
from vmmesh_agent.store import Stored
from vmmesh_agent.units import ISTIO, Units
from vmmesh_agent.verify import VerifiedBundle, verify
from vmmesh_agent.watch import Watch

LOCK = PurePosixPath("/run/vmmesh-agent/lock")  # whoever changes the machine holds it
_POLL_SECONDS = 0.25
_LAST_WORD_SECONDS = {State.DEGRADED: 10.0, State.FAILED: 45.0}  # one that stays so long the same is the answer


class Step(Protocol):
    """One step on its way."""

    def says(self, detail: str) -> None:
        """What came of it, in a few words."""

    def progress(self, done: int, total: int | None) -> None:
        """How many bytes are through."""


class Progress(Protocol):
    """Whoever wants to see the steps: a terminal, the daemon's log."""

    def step(self, name: str) -> AbstractContextManager[Step]:
        """A step begins; it ends with the block."""

    def retrying(self, trouble: AgentError) -> None:
        """An attempt failed and another will follow."""

    def note(self, text: str) -> None:
        """Something worth knowing, nothing is wrong."""

    def waiting(self) -> None:
        """Called several times a second while a step waits for somebody else."""


@dataclass(frozen=True, slots=True)
class World:
    """What the flow works on, passed in: the machine, the configuration, the clock, who looks on."""

    host: Host
    config: Config
    progress: Progress
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    patience: float | None = None  # seconds for the whole; None: as long as it takes
    began: float = field(default_factory=time.monotonic)

    @property
    def units(self) -> Units:
        return Units(self.host)

    def left(self) -> float | None:
        """Return how many seconds of the patience are left."""
        return None if self.patience is None else max(0.0, self.began + self.patience - time.monotonic())


@dataclass(frozen=True, slots=True)
class Joined:
    """What the flow found and did: the bundle in force, the installed version, the names of what changed."""

    bundle: VerifiedBundle
    sidecar_version: str
    changed: tuple[str, ...]
    clock_offset: float | None  # the endpoint's clock less ours, in seconds

    @property
    def known(self) -> Known:
        """What the status record shows of it."""
        istiod = self.bundle.discovery.rpartition(":")[0].strip("[]")
        return Known(
            workload=str(self.bundle.workload),
            token_expires_at=self.bundle.token_expires_at,
            sidecar_version=self.sidecar_version,
            istiod=istiod,
            istiod_addresses=tuple(line.address for line in self.bundle.hosts if istiod in line.names),
            clock_offset=self.clock_offset,
        )


def reconcile(world: World, watch: Watch) -> Joined:
    """Bring the machine to what the cluster says and see that the sidecar runs; how it does is `watch`'s to say."""
    world.host.require_root("joining the mesh")
    with _Package(world) as package:
        if world.config.sidecar.package:
            package.choose(None)  # known already: its download goes on beside the fetching and verifying
        fetched, clock_offset = _fetch(world)
        bundle = _verify(world, fetched.bundle)
        package.choose(bundle.sidecar)
        version, installed = _install(world, package)
    placed = _place(world, bundle)
    store.save(world.host, fetched)
    started = _start(world, watch)
    return Joined(bundle, version, (*installed, *placed, *started), clock_offset)


def settle(world: World, watch: Watch, known: Known) -> Health:
    """Wait until the sidecar is in the mesh, is past hope, or the time is up. Return how it is then."""
    with world.progress.step("watch") as step:
        limit = world.config.healthy_within
        deadline = time.monotonic() + (limit if world.patience is None else min(limit, world.left() or 0.0))
        lasting = _Lasting()
        while True:
            health = watch.observe(world.now(), known).health
            step.says(str(health.state) if health.cause == "none" else f"{health.state}: {health.cause}")
            if health.state is State.HEALTHY or lasting.long_enough(health) or time.monotonic() >= deadline:
                return health
            time.sleep(_POLL_SECONDS)


def preview(world: World) -> tuple[VerifiedBundle, install.Plan, tuple[place.Change, ...]]:
    """Say what `reconcile` would change, and change nothing."""
    fetched, _ = _fetch(world)
    bundle = _verify(world, fetched.bundle)
    package = install.plan(world.host, world.config, bundle.sidecar, managers(world.host))
    return bundle, package, place.plan(world.host, bundle, _previous_root(world.host), world.now())


def restore(host: Host, progress: Progress, moment: datetime) -> None:
    """Put the files of the last verified bundle back, without network and without configuration.

    A token that expired while the machine was off is put back all the same: with a certificate that is still
    valid the sidecar does not need it, and without one nothing is lost.
    """
    host.require_root("restoring the files")
    with progress.step("restore") as step:
        stored = store.load(host)
        if stored is None:
            step.says("there is no verified bundle yet")
            return
        bundle = verify(stored.bundle, stored.verified_at, resolves=lambda _: True)
        changes = place.plan(host, bundle, bundle.root_cert, moment)
        place.apply(host, changes)
        step.says(_listed(changes) or "nothing was missing")


# --- the steps ---


def _fetch(world: World) -> tuple[Stored, float | None]:
    """Return the bundle in force, and the endpoint's clock less ours in seconds."""
    stored = store.load(world.host)
    source = world.config.endpoint.url
    known = stored if stored and stored.source == source else None
    with world.progress.step("fetch") as step:
        answer = fetch(
            world.host,
            world.config,
            etag=known.etag if known else "",
            patience=world.left(),
            on_retry=world.progress.retrying,
            idle=world.progress.waiting,
        )
        if answer.bundle is None and known:
            step.says("unchanged")
            return known, answer.clock_offset
        assert answer.bundle is not None  # noqa: S101  # "unchanged" answers only a known etag
        step.says(source.partition("?")[0])  # a presigned address has its credential in the query
        return Stored(answer.bundle, answer.etag, source, world.now()), answer.clock_offset


def _verify(world: World, bundle: Bundle) -> VerifiedBundle:
    with world.progress.step("verify") as step:
        verified = verify(
            bundle,
            world.now(),
            resolves=world.host.resolves,
            expected=world.config.workload_group,
            host_name=world.host.name,
        )
        step.says(f"{verified.workload}, token until {verified.token_expires_at:%H:%M:%SZ}")
    for note in verified.notes:
        world.progress.note(note)
    return verified


class _Package:
    """The sidecar package of one reconciliation, chosen once; a download ends with the block, finished or not."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._download: Download | None = None
        self.plan: install.Plan | None = None

    def __enter__(self) -> "_Package":
        return self

    def __exit__(self, *_: object) -> None:
        if self._download:
            self._download.discard()

    def choose(self, named: Sidecar | None) -> None:
        """Choose the package, where that is not done, and begin to download it, where it has to be."""
        if self.plan is None:
            host, config = self._world.host, self._world.config
            self.plan = install.plan(host, config, named, managers(host, self._world.progress.note))
            source = self.plan.source
            if source and source.url:
                into = install.destination(host, source)
                self._download = Download(host, config, url=source.url, sha256=source.sha256, into=into)

    def file(self, source: install.Source, step: Step) -> PurePosixPath:
        """Return the package file, once it is all there."""
        if source.path:
            return source.path
        assert self._download is not None  # noqa: S101  # a source is a path or an address
        return self._download.finish(
            patience=self._world.left(),
            on_retry=self._world.progress.retrying,
            on_progress=lambda received: self._show(step, received, source.size),
        )

    def _show(self, step: Step, received: int, size: int | None) -> None:
        step.progress(received, size)
        self._world.progress.waiting()


def _install(world: World, package: _Package) -> tuple[str, list[str]]:
    """Return the installed version and what was changed.

    The package comes before the files: it makes the user that owns them, and the link /etc/istio.
    """
    assert package.plan is not None  # noqa: S101  # chosen by now
    source = package.plan.source
    with world.progress.step("install") as step:
        step.says(str(package.plan))
        if source is None:
            return package.plan.installed or "", []
        path = package.file(source, step)
        judged = install.judge(world.host, source, path, world.config.sidecar)
        _stop(world)
        install.apply(world.host, source, path, judged)
        if world.host.is_running:
            world.units.reload()
        step.says(f"{judged.name} {judged.version}")
        return judged.version, [f"{judged.name} {judged.version}"]


def _place(world: World, bundle: VerifiedBundle) -> list[str]:
    with world.progress.step("place") as step:
        changes = place.plan(world.host, bundle, _previous_root(world.host), world.now())
        if any(change.restarts for change in changes):
            _stop(world)
        place.apply(world.host, changes)
        step.says(_listed(changes) or "nothing to change")
    return [str(change.path) for change in changes]


def _stop(world: World) -> None:
    if world.host.is_running and world.units.state(ISTIO).active not in {"inactive", "failed"}:
        world.units.stop(ISTIO)


def _start(world: World, watch: Watch) -> list[str]:
    units = world.units
    with world.progress.step("start") as step:
        if not units.exists(ISTIO):
            raise InstallError(
                f"the package brought no {ISTIO}", code="unit-missing", hint="see that it is an istio-sidecar package"
            )
        done = []
        if not units.is_enabled(ISTIO):
            units.enable(ISTIO)
            done.append(f"{ISTIO} enabled")
        if world.host.is_running and units.state(ISTIO).active in {"inactive", "failed", "activating"}:
            watch.begin_anew()
            units.start(ISTIO)
            done.append(f"{ISTIO} started")
        step.says(", ".join(done) or f"{ISTIO} is running")
    return done


class _Lasting:
    """Notices trouble that stays the same: waiting longer would only keep a person from the reason."""

    def __init__(self) -> None:
        self._trouble = (State.STARTING, "")
        self._since = 0.0

    def long_enough(self, health: Health) -> bool:
        """Has it been this trouble, for this cause, for long enough to be the last word?"""
        trouble = (health.state, health.cause)
        if trouble != self._trouble:
            self._trouble, self._since = trouble, time.monotonic()
        limit = _LAST_WORD_SECONDS.get(health.state)
        return limit is not None and time.monotonic() - self._since >= limit


def _previous_root(host: Host) -> bytes:
    stored = store.load(host)
    return stored.bundle.files.get("root-cert.pem", b"") if stored else b""


def _listed(changes: tuple[place.Change, ...]) -> str:
    """Name the files that change; the folders around them go without saying."""
    return ", ".join(change.path.name for change in changes if change.content is not None) or (
        "owners of folders" if changes else ""
    )
