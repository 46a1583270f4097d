"""THE flow: fetch → verify → install → place → start, and then watch.

Each step compares first and says what it changed. Until the bundle is verified and the package is judged, nothing
on the machine is touched; the sidecar is stopped only if something beneath it changes, and it is never running
while cluster.env changes, for its start script undoes the traffic capture from that very file.

What is begun is in the journal (`store`), and is finished by whoever comes next: `recover`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from vmmesh_agent import bundle as bundles
from vmmesh_agent import credential, found, install, place, signals, ssh, store
from vmmesh_agent.bundle import Bundle, BundleRefusedError, Sidecar
from vmmesh_agent.errors import AgentError, InstallError
from vmmesh_agent.fetch import Download, Fetched, fetch
from vmmesh_agent.found import Found
from vmmesh_agent.health import Health, State
from vmmesh_agent.host import ROOT, Host
from vmmesh_agent.leave import is_half_way, undo
from vmmesh_agent.packages import managers
from vmmesh_agent.report import Known
from vmmesh_agent.store import Generation, Membership
from vmmesh_agent.units import ISTIO
from vmmesh_agent.verify import VerifiedBundle, verify
from vmmesh_agent.watch import Watch
from vmmesh_agent.world import LOCK, STARTING, Progress, Step, World

_NAMES = {place.ETC_HOSTS: bundles.HOSTS, **{entry.path: name for name, entry in place.TABLE.items()}}  # in a bundle
_POLL_SECONDS = 0.25
_LAST_WORD_SECONDS = {State.DEGRADED: 10.0, State.FAILED: 45.0}  # one that stays so long the same is the answer


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


def reconcile(world: World, watch: Watch, *, again: bool = False) -> Joined:
    """Bring the machine to what the cluster says and see that the sidecar runs; how it does is `watch`'s to say.

    A generation that was given up is tried only `again`.
    """
    world.host.require_root("joining the mesh")
    recover(world, watch)
    with _Package(world) as package:
        if world.config.sidecar.package:
            package.choose(None)  # known already: its download goes on beside the fetching and verifying
        fetched, answer = _fetch(world)
        generation = fetched if again else _worth_trying(world, fetched)
        bundle = _verify(world, generation.bundle)
        package.choose(bundle.sidecar)
        was_running = _is_running(world)
        version, installed = _install(world, package)
    with _running_again(world, was_running):
        membership = _following(world.host, generation)
        if generation is fetched:  # what was given up is not handed out any more, or is tried again on purpose
            membership = replace(membership, given_up=None)
        placed = _place(world, membership, bundle)
        started = _start(world, watch)
    _keep_join_token(world, answer)
    return Joined(bundle, version, (*installed, *placed, *started), answer.clock_offset)


def settle(world: World, watch: Watch, known: Known, limit: float) -> Health:
    """Wait until the sidecar is in the mesh, or `limit` seconds are over. Return how it is then.

    What is wrong with a sidecar that is not on trial is said as soon as it lasts.
    """
    clock = world.clock
    with world.progress.step("watch") as step:
        deadline = clock.seconds() + limit
        membership = store.load(world.host)
        lasting = None if membership and membership.is_open else _Lasting()
        while True:
            health = watch.observe(clock.now(), known).health
            step.says(str(health.state) if health.cause == "none" else f"{health.state}: {health.cause}")
            moment = clock.seconds()
            is_last_word = lasting is not None and lasting.long_enough(health, moment)
            if health.state is State.HEALTHY or is_last_word or moment >= deadline:
                return health
            clock.sleep(_POLL_SECONDS)


def preview(world: World) -> tuple[VerifiedBundle, install.Plan, tuple[place.Change, ...]]:
    """Say what `reconcile` would change, and change nothing."""
    fetched, _ = _fetch(world)
    bundle = _verify(world, fetched.bundle)
    package = install.plan(world.host, world.config, bundle.sidecar, managers(world.host))
    membership = _following(world.host, fetched)
    changes = place.plan(world.host, bundle, membership.roots_before, world.clock.now(), membership.ssh_ports)
    return bundle, package, changes


def restore(host: Host, progress: Progress) -> None:
    """Put the files of the membership back, without network and without configuration; it precedes each start.

    A token that expired while the machine was off is put back all the same: with a certificate that is still
    valid the sidecar does not need it, and without one nothing is lost. On a copied disk there is nothing to put
    back: what the origin had is taken away.
    """
    host.require_root("restoring the files")
    if is_half_way(host):
        progress.note("`vmmesh-agent leave` was not finished: run it again")
        return
    membership = store.load(host)
    if membership and not _is_ours(host, membership):
        _become_oneself(host, progress)
        return
    with progress.step("restore") as step:
        if membership is None:
            step.says("this machine has not joined")
            return
        changes = plan_of(host, membership)
        place.apply(host, changes)
        step.says(_listed(changes) or "nothing was missing")


def is_whole(host: Host) -> bool:
    """Would `restore` find nothing that the sidecar needs? What cannot be judged just now is not whole."""
    with suppress(AgentError):
        membership = store.load(host)
        if membership is None:
            return True
        is_ours = _is_ours(host, membership)
        return is_ours and all(change.what == place.FEWER_ROOTS for change in plan_of(host, membership))
    return False


def recover(world: World, watch: Watch) -> None:
    """Finish what somebody began and did not end, also where the endpoint is not reached: files first, then the start.

    A copied disk begins as a machine that never joined.
    """
    host = world.host
    host.sweep(store.FOLDER)
    host.sweep(LOCK.parent)
    host.remove(STARTING)
    if is_half_way(host):
        undo(host, world.progress, with_package=False)
    membership = store.load(host)
    if membership and not membership.machine:  # made in a tree that was no machine yet
        store.save(host, membership := replace(membership, machine=store.machine(host)))
    if membership and not _is_ours(host, membership):
        _become_oneself(host, world.progress)
    elif membership and membership.unfinished:
        with world.progress.step("recover") as step:
            changes = plan_of(host, membership)
            with _running_again(world, host.is_running):
                _exchange(world, changes)
            step.says(f"finished what was interrupted: {_listed(changes) or 'all files were in place'}")
        try:
            with _running_again(world, host.is_running):
                _start(world, watch)
        except AgentError as error:  # what comes from the endpoint may mend it
            world.progress.note(error.message)


def plan_of(host: Host, membership: Membership) -> tuple[place.Change, ...]:
    """Compare the machine with its membership, as of the moment when that was judged: at boot a clock may be wrong."""
    generation = membership.current
    bundle = verify(generation.bundle, generation.verified_at, resolves=lambda _: True)
    return place.plan(host, bundle, membership.roots_before, generation.verified_at, membership.ssh_ports)


def restart_on(world: World, watch: Watch, changes: Sequence[place.Change]) -> None:
    """Put files back, and start the sidecar on them."""
    with _running_again(world, _is_running(world)):
        _exchange(world, changes)
        _start(world, watch)


def begin(host: Host) -> None:
    """Tell the journal that the sidecar is about to be stopped: whoever comes next starts it."""
    membership = store.load(host)
    if membership:
        store.save(host, replace(membership, unfinished=True, previous_root=membership.roots_before))


def go_back(world: World, watch: Watch, membership: Membership) -> None:
    """Put the last good generation back, with the newest token: `membership` says which one, and what was given up."""
    assert membership.good is not None  # noqa: S101  # the caller's reason to go back
    back = membership.good.with_token_of(membership.current)
    bundle = verify(back.bundle, back.verified_at, resolves=lambda _: True)
    with _running_again(world, _is_running(world)):
        _place(world, membership.followed_by(back, membership.ssh_ports), bundle)
        _start(world, watch)


# --- the steps ---


def _fetch(world: World) -> tuple[Generation, Fetched]:
    """Return the generation in force, and what the endpoint answered."""
    membership = store.load(world.host)
    source = world.config.endpoint.url
    known = membership.current if membership and membership.current.source == source else None
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
            return known, answer
        assert answer.bundle is not None  # noqa: S101  # "unchanged" answers only a known etag
        step.says(source.partition("?")[0])  # a presigned address has its credential in the query
        return Generation(answer.bundle, answer.etag, source, world.clock.now()), answer


def _worth_trying(world: World, fetched: Generation) -> Generation:
    """Return the last good generation, with the new token, in place of one that was given up."""
    membership = store.load(world.host)
    given_up = membership.given_up if membership else None
    if not (membership and membership.good and given_up and given_up.fingerprint == fetched.fingerprint):
        return fetched
    good = membership.good.with_token_of(fetched)
    try:
        verify(good.bundle, world.clock.now(), resolves=lambda _: True)
    except BundleRefusedError as refused:
        world.progress.note(
            f"the bundle that was given up is tried again, for the last good one will not do: {refused}"
        )
        return fetched
    world.progress.note("the endpoint still hands out the bundle that was given up; the last good one stays")
    return good


def _verify(world: World, bundle: Bundle) -> VerifiedBundle:
    with world.progress.step("verify") as step:
        verified = verify(
            bundle,
            world.clock.now(),
            resolves=lambda name: place.resolves(world.host, name),
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
            if source and source.url and install.cached(host, source) is None:
                into = install.destination(host, source)
                self._download = Download(host, config, url=source.url, sha256=source.sha256, into=into)

    def file(self, source: install.Source, step: Step) -> PurePosixPath:
        """Return the package file, once it is all there."""
        if path := source.path or install.cached(self._world.host, source):
            return path
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
    host, source = world.host, package.plan.source
    with world.progress.step("install") as step:
        step.says(str(package.plan))
        if source is None:
            if store.load(host) is None:
                found.note_package(host, place.PLACED)  # where the agent was ended while it was being installed
            return package.plan.installed or "", []
        path = package.file(source, step)
        try:
            judged = install.judge(host, source, path, world.config.sidecar)
        except AgentError:
            install.clear_cache(host)
            raise
        source.manager.wait()  # while the sidecar still serves
        was_running = _is_running(world)
        _note_as_found(world, has_sidecar=source.manager.installed(install.NAME) is not None)
        with _running_again(world, was_running):
            begin(host)
            _stop(world)
        try:
            install.apply(host, source, path, judged)
        except AgentError:  # not where we are told to end: then the package manager is still at work
            if was_running:
                world.units.request_start(ISTIO)
            raise
        found.note_package(host, place.PLACED)
        if host.is_running:
            world.units.reload()
        step.says(f"{judged.name} {judged.version}")
        return judged.version, [f"{judged.name} {judged.version}"]


def _place(world: World, membership: Membership, bundle: VerifiedBundle) -> list[str]:
    """Put the files of a membership in place. It is in the journal before the first of them changes."""
    host = world.host
    with world.progress.step("place") as step:
        before = store.load(host)
        planned = place.plan(host, bundle, membership.roots_before, world.clock.now(), membership.ssh_ports)
        changes = _worth_placing(world, planned, before, membership)
        restarts = any(change.restarts for change in changes)
        _note_as_found(world, has_sidecar=True)
        with place.staged(host, changes) as staged:
            is_begun = bool(changes) or (before is not None and before.unfinished)
            store.save(host, replace(membership, unfinished=is_begun))
            try:
                if restarts:
                    _stop(world)
                staged.commit()
            except AgentError:
                if before:  # without it the journal says what to finish, or to undo
                    store.save(host, replace(before, unfinished=True))
                raise
        if restarts:
            _stop(world)  # should somebody have started it meanwhile, it has read half of the old files
        step.says(_listed(changes) or "nothing to change")
    return [str(change.path) for change in changes]


def _exchange(world: World, changes: Sequence[place.Change]) -> None:
    """Put files of this very generation back, under a stopped sidecar where it reads them only when it starts."""
    with place.staged(world.host, changes) as staged:
        if any(change.restarts for change in changes):
            begin(world.host)
            _stop(world)
        staged.commit()


def _worth_placing(
    world: World, changes: tuple[place.Change, ...], before: Membership | None, membership: Membership
) -> tuple[place.Change, ...]:
    """Leave out the files that somebody else writes again and again, unless the cluster has news for them."""
    old = before.current.bundle.files if before else {}
    new = membership.current.bundle.files
    return tuple(
        change
        for change in changes
        if change.path not in world.contested
        or old.get(_NAMES.get(change.path, "")) != new.get(_NAMES.get(change.path, ""))
    )


def _start(world: World, watch: Watch) -> list[str]:
    units, host = world.units, world.host
    with world.progress.step("start") as step:
        if not units.exists(ISTIO):
            raise InstallError(
                f"the package brought no {ISTIO}", code="unit-missing", hint="see that it is an istio-sidecar package"
            )
        done = []
        if not units.is_enabled(ISTIO):
            units.enable(ISTIO)
            done.append(f"{ISTIO} enabled")
        if host.is_running:
            if _is_running(world) and signals.is_certificate_dead(host, world.clock.now()):
                # pilot-agent asks for a new one by itself only before the old one ends.
                begin(host)
                _stop(world)
                done.append("certificate had expired")
            if units.state(ISTIO).active in {"inactive", "failed", "activating"}:
                watch.begin_anew()
                with _starting(host):
                    units.start(ISTIO)
                done.append(f"{ISTIO} started")
        step.says(", ".join(done) or f"{ISTIO} is running")
    membership = store.load(host)
    if membership:
        store.save(host, replace(membership, unfinished=False))
    return done


def _keep_join_token(world: World, answer: Fetched) -> None:
    """Keep the join token that the endpoint took. Before the machine was healthy once, `trial` retires its file."""
    if answer.join_token:
        is_new = credential.keep(world.host, answer.join_token)
        membership = store.load(world.host)
        if membership and membership.good:
            trouble = credential.retire(world.host, world.config.endpoint.credential)
            if trouble and is_new:  # it is tried at each renewal, and told once
                world.progress.note(trouble)


# --- what the steps share ---


def _following(host: Host, generation: Generation) -> Membership:
    """Return the membership that this machine has with the generation."""
    before = store.load(host)
    ports = ssh.listening_ports(host) if host.is_running else ()
    if before is None:
        return store.begun(host, generation, ports)
    return before.followed_by(generation, ports or before.ssh_ports)


def _is_ours(host: Host, membership: Membership) -> bool:
    """Is it this machine's, and not that of one whose disk was copied?"""
    machine = store.machine(host)
    return not membership.machine or not machine or membership.machine == machine


def _become_oneself(host: Host, progress: Progress) -> None:
    progress.note("this disk was copied from another machine; that one's identity is taken away, this one joins anew")
    undo(host, progress, with_package=False)


def _note_as_found(world: World, *, has_sidecar: bool) -> None:
    """Note how the machine is, before the first change; what is noted already stays."""
    host = world.host
    if found.load(host) is None and store.load(host) is None:
        found.note(
            host,
            Found(
                has_sidecar=has_sidecar,
                has_user=host.account(place.USER) is not None,
                is_enabled=has_sidecar and world.units.is_enabled(ISTIO),
                was_running=_is_running(world),
                hosts_end_open=not (host.read(place.ETC_HOSTS) or b"\n").endswith(b"\n"),
                bare=found.look(host, place.PLACED),
            ),
        )


def _is_running(world: World) -> bool:
    return world.host.is_running and not world.units.state(ISTIO).is_down


def _stop(world: World) -> None:
    if _is_running(world):
        world.units.stop(ISTIO)


@contextmanager
def _starting(host: Host) -> Iterator[None]:
    """Tell `restore`, which comes before the sidecar, not to wait for us: the files are as they shall be."""
    host.make_folder(STARTING.parent, ROOT, 0o755)
    host.write(STARTING, b"", ROOT, 0o600)
    try:
        yield
    finally:
        host.remove(STARTING)


@contextmanager
def _running_again(world: World, was_running: bool) -> Iterator[None]:
    """See that a sidecar that ran runs again where the block does not get to its end."""
    try:
        yield
    except BaseException:
        if was_running:  # also where it is just being stopped: systemd starts it after that
            world.units.request_start(ISTIO)
        raise


class _Lasting:
    """Notices trouble that stays the same: waiting longer would only keep a person from the reason."""

    def __init__(self) -> None:
        self._trouble = (State.STARTING, "")
        self._since = 0.0

    def long_enough(self, health: Health, moment: float) -> bool:
        """Has it been this trouble, for this cause, for long enough to be the last word?"""
        trouble = (health.state, health.cause)
        if trouble != self._trouble:
            self._trouble, self._since = trouble, moment
        limit = _LAST_WORD_SECONDS.get(health.state)
        return limit is not None and moment - self._since >= limit


def _listed(changes: tuple[place.Change, ...]) -> str:
    """Name the files that change; the folders around them go without saying."""
    return ", ".join(change.path.name for change in changes if change.content is not None) or (
        "owners of folders" if changes else ""
    )
