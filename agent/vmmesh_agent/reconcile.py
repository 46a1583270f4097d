"""THE flow: fetch → verify → install → place → start → watch.

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

from vmmesh_agent import install, place, report, store, x509
from vmmesh_agent.bundle import Bundle
from vmmesh_agent.config import Config
from vmmesh_agent.errors import AgentError, InstallError
from vmmesh_agent.fetch import Download, fetch
from vmmesh_agent.health import Health, State
from vmmesh_agent.host import Host
from vmmesh_agent.packages import managers
from vmmesh_agent.report import Report, Unit
from vmmesh_agent.store import Stored
from vmmesh_agent.units import ISTIO, Units
from vmmesh_agent.verify import VerifiedBundle, verify
from vmmesh_agent.watch import Observation, Watch

LOCK = PurePosixPath("/run/vmmesh-agent/lock")
_CERT_CHAIN = PurePosixPath("/etc/certs/cert-chain.pem")
_SETTLED = {State.HEALTHY, State.DEGRADED}
_POLL_SECONDS = 0.25


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
    """What the flow found and did: the bundle in force, the names of what changed, the sidecar at the end."""

    bundle: VerifiedBundle
    sidecar_version: str
    changed: tuple[str, ...]
    health: Health


def reconcile(world: World, watch: Watch) -> Joined:
    """Bring the machine to what the cluster says, and wait until the sidecar is in the mesh or patience ends."""
    world.host.require_root("joining the mesh")
    fetched = _fetch(world)
    bundle = _verify(world, fetched.bundle)
    version, installed = _install(world, bundle)
    placed = _place(world, bundle)
    store.save(world.host, fetched)
    started = _start(world, watch)
    health = _watch(world, watch) if world.host.is_running else Health(State.STOPPED)
    return Joined(bundle, version, (*installed, *placed, *started), health)


def preview(world: World) -> tuple[VerifiedBundle, install.Plan, tuple[place.Change, ...]]:
    """Say what `reconcile` would change, and change nothing."""
    fetched = _fetch(world)
    bundle = _verify(world, fetched.bundle)
    package = install.plan(world.host, world.config, bundle.sidecar, managers(world.host))
    return bundle, package, place.plan(world.host, bundle, _previous_root(world.host), world.now())


def restore(world: World) -> tuple[str, ...]:
    """Put the files of the last verified bundle back, without network. Return what was put back.

    A token that expired while the machine was off is put back all the same: with a certificate that is still
    valid the sidecar does not need it, and without one nothing is lost.
    """
    world.host.require_root("restoring the files")
    stored = store.load(world.host)
    if stored is None or world.host.account(place.USER) is None:
        return ()
    with world.progress.step("restore") as step:
        bundle = verify(stored.bundle, stored.verified_at, resolves=lambda _: True)
        changes = place.plan(world.host, bundle, bundle.root_cert, world.now())
        place.apply(world.host, changes)
        step.says(_listed(changes) or "nothing was missing")
    return tuple(str(change.path) for change in changes)


# --- the steps ---


def _fetch(world: World) -> Stored:
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
        )
        if answer.bundle is None and known:
            step.says("unchanged")
            return known
        assert answer.bundle is not None  # noqa: S101  # "unchanged" answers only a known etag
        step.says(source)
        return Stored(answer.bundle, answer.etag, source, world.now())


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


def _install(world: World, bundle: VerifiedBundle) -> tuple[str, list[str]]:
    """Return the installed version and what was changed.

    The package comes before the files: it makes the user that owns them, and the link /etc/istio.
    """
    host = world.host
    with world.progress.step("install") as step:
        planned = install.plan(host, world.config, bundle.sidecar, managers(host))
        step.says(str(planned))
        if planned.source is None:
            return planned.installed or "", []
        path = planned.source.path or _download(world, planned.source, step)
        package = install.judge(host, planned.source, path, world.config.sidecar)
        _stop(world)
        install.apply(host, planned.source, path, package)
        step.says(f"{package.name} {package.version}")
        return package.version, [f"{package.name} {package.version}"]


def _download(world: World, source: install.Source, step: Step) -> PurePosixPath:
    download = Download(
        world.host,
        world.config,
        url=source.url,
        sha256=source.sha256,
        into=install.destination(world.host, source),
    )
    try:
        return download.finish(
            patience=world.left(),
            on_retry=world.progress.retrying,
            on_progress=lambda received: step.progress(received, source.size),
        )
    finally:
        download.stop()


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
        if world.host.is_running and not units.state(ISTIO).is_running:
            watch.begin_anew()
            units.start(ISTIO)
            done.append(f"{ISTIO} started")
        step.says(", ".join(done) or f"{ISTIO} is running")
    return done


def _watch(world: World, watch: Watch) -> Health:
    """Wait until the sidecar has settled; what it says on its way is not the last word before the time is up."""
    with world.progress.step("watch") as step:
        limit = world.config.healthy_within if world.patience is None else world.left() or 0.0
        deadline = time.monotonic() + limit
        health = watch.observe(world.now()).health
        while health.state not in _SETTLED and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            health = watch.observe(world.now()).health
        step.says(str(health.state) if health.cause == "none" else f"{health.state}: {health.cause}")
    return health


# --- what is reported ---


def describe(
    host: Host,
    observation: Observation,
    *,
    joined: Joined | None,
    before: Report | None,
    trouble: AgentError | None,
    moment: datetime,
    by_daemon: bool,
) -> Report:
    """Put together what is known; `before` fills in what was known earlier."""
    health = report.with_trouble(observation.health, trouble, moment)
    unit = observation.unit
    return Report(
        health=report.keeping_since(health, before.health if before else None, moment),
        updated_at=moment,
        workload=str(joined.bundle.workload) if joined else before.workload if before else "",
        token_expires_at=joined.bundle.token_expires_at if joined else before.token_expires_at if before else None,
        certificate_not_after=_certificate_end(host),
        sidecar_version=joined.sidecar_version if joined else before.sidecar_version if before else "",
        unit=Unit(unit.active, unit.sub, unit.main_pid, unit.restarts, unit.invocation),
        by_daemon=by_daemon,
    )


def _certificate_end(host: Host) -> datetime | None:
    """Return when the sidecar's own certificate ends, None where there is none to read."""
    try:
        content = host.read(_CERT_CHAIN)
        return x509.read_pem(content.decode())[0].not_after if content else None
    except (AgentError, x509.CertificateError, UnicodeDecodeError):
        return None


def _previous_root(host: Host) -> bytes:
    stored = store.load(host)
    return stored.bundle.files.get("root-cert.pem", b"") if stored else b""


def _listed(changes: tuple[place.Change, ...]) -> str:
    return ", ".join(f"{change.path} ({change.what})" for change in changes)
