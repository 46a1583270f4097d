"""What comes of a new generation: it is kept, or the last good one is put back, or a first join is undone.

A generation is on trial from the start of the sidecar on it until the sidecar is healthy. One that is not within the
limit is given up, and is not tried again unless somebody asks for it; if the sidecar is not healthy on the last good
one either, the generation was not to blame, and is tried again.
"""

from dataclasses import replace

from vmmesh_agent import bundle as bundles
from vmmesh_agent import credential, install, store
from vmmesh_agent.config import FirstJoin
from vmmesh_agent.errors import HostError
from vmmesh_agent.health import Condition, Health, Severity, State
from vmmesh_agent.host import Host
from vmmesh_agent.leave import undo
from vmmesh_agent.reconcile import go_back
from vmmesh_agent.store import Generation, GivenUp, Membership
from vmmesh_agent.watch import Watch
from vmmesh_agent.world import World

_SERVES = frozenset({State.HEALTHY, State.DEGRADED})
_IS_OUT = frozenset({State.FAILED, State.STARTING})  # one that somebody stopped says nothing of its generation


def conclude(world: World, watch: Watch, health: Health, *, is_time_up: bool) -> bool:
    """Draw the conclusion that `health` allows. Return whether the sidecar was started anew on the last good one.

    Raise `HostError` (join-undone) where a first join came to nothing and was undone.
    """
    membership = store.load(world.host)
    if membership is None or not membership.is_open:
        return False
    if health.state is State.HEALTHY or (is_time_up and health.state in _SERVES):
        _accept(world, membership)
    elif is_time_up and health.state in _IS_OUT:
        return _give_up(world, watch, membership, health)
    return False


def acquit(host: Host) -> bool:
    """Let a generation be tried again that was given up: the last good one does no good any more. Was there one?"""
    membership = store.load(host)
    if membership is None or membership.given_up is None:
        return False
    store.save(host, replace(membership, given_up=None))
    return True


def undo_half_done(world: World) -> None:
    """Undo a first join that failed after the first file was placed, and before the sidecar was started on all."""
    membership = store.load(world.host)
    is_half_done = membership is not None and membership.good is None and membership.unfinished
    if is_half_done and world.config.on_failure.first_join is FirstJoin.UNDO:
        undo(world.host, world.progress, with_package=True, resumes=True)


def standing(host: Host) -> list[Condition]:
    """Return what is to be said of a generation that was given up."""
    membership = store.load(host)
    given_up = membership.given_up if membership else None
    if given_up is None:
        return []
    return [
        Condition(
            "bundle_given_up",
            Severity.DEGRADED,
            f"The sidecar did not become healthy on the newest bundle ({given_up.cause}): {given_up.message}"
            " The last good one is in force.",
            "Correct the bundle where it is made: another one is tried at once. To try this one again:"
            " `vmmesh-agent bootstrap --again`.",
            since=given_up.at,
        )
    ]


def _accept(world: World, membership: Membership) -> None:
    """Keep the current generation as the last good one; what was given up for it was to blame."""
    given_up = replace(membership.given_up, is_confirmed=True) if membership.given_up else None
    if membership.is_on_trial:
        given_up = None  # another generation came after it, and is good
    store.save(world.host, replace(membership, good=membership.current, given_up=given_up))
    install.clear_cache(world.host)
    trouble = credential.retire(world.host, world.config.endpoint.credential)
    if trouble and membership.good is None:  # the later ones are `reconcile`'s to tell
        world.progress.note(trouble)


def _give_up(world: World, watch: Watch, membership: Membership, health: Health) -> bool:
    waited = f"{world.config.healthy_within:g} s"
    reason = health.conditions[0].message if health.conditions else f"It was still {health.state} after {waited}."
    if not membership.is_on_trial:  # not healthy on the last good one either
        store.save(world.host, replace(membership, given_up=None))
        return False
    if membership.good is None:
        if world.config.on_failure.first_join is FirstJoin.UNDO:
            _undo_join(world, health, reason)
        return False
    if health.cause == "istiod_unreachable" and _lead_to_the_same(membership.good, membership.current):
        return False  # the way to istiod is what it was: going back would lead nowhere else
    world.progress.note(f"not healthy on the new bundle ({_named(health)}): going back to the last good one")
    given_up = GivenUp(membership.current.fingerprint, _named(health), reason, world.clock.now())
    go_back(world, watch, replace(membership, given_up=given_up))
    return True


def _lead_to_the_same(one: Generation, other: Generation) -> bool:
    return all(one.bundle.files[name] == other.bundle.files[name] for name in (bundles.MESH, bundles.HOSTS))


def _named(health: Health) -> str:
    return str(health.state) if health.cause == "none" else health.cause


def _undo_join(world: World, health: Health, reason: str) -> None:
    undo(world.host, world.progress, with_package=True, resumes=True)
    hints = [condition.remedy for condition in health.conditions[:1] if condition.remedy]
    raise HostError(
        f"the sidecar did not become healthy, and the machine was left as it was found ({_named(health)}): {reason}",
        code="join-undone",
        hint="\n".join(
            [
                *hints,
                "To look at it as it fails, set on_failure.first_join: keep, and run `vmmesh-agent bootstrap` again.",
            ]
        ),
    )
