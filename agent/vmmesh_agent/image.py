"""A machine made fit to become an image: no identity, no token, no state; whoever boots from it joins as itself.

The sidecar's package, the configuration and the enabled agent stay. Each step looks for itself what is there, so
that a clean that was interrupted is finished by the next.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from vmmesh_agent import hosts, instance, leave, place, signals, store, strict
from vmmesh_agent.config import FILE
from vmmesh_agent.errors import ConfigurationError, HostError
from vmmesh_agent.host import Host
from vmmesh_agent.units import ISTIO, Units
from vmmesh_agent.world import Progress

_CONFIGURATION = FILE.parent
_MACHINE_ID = PurePosixPath("/etc/machine-id")
_DBUS_MACHINE_ID = PurePosixPath("/var/lib/dbus/machine-id")
_RANDOM_SEED = PurePosixPath("/var/lib/systemd/random-seed")
_RANDOM_SEED_SERVICE = "systemd-random-seed.service"
_NO_IDS = (b"", b"uninitialized")  # machine-id(5)
_SYSTEMD = PurePosixPath("/run/systemd/system")  # is there where systemd is PID 1: sd_booted(3)

# What pilot-agent and Envoy write, beside what the agent places.
_WRITTEN_BY_SIDECAR = (
    PurePosixPath("/etc/certs"),
    PurePosixPath("/etc/istio/proxy"),
    PurePosixPath("/var/run/secrets"),
)


@dataclass(frozen=True, slots=True)
class Named:
    """The files of this very machine that its configuration names."""

    join_tokens: frozenset[PurePosixPath]
    credentials: frozenset[PurePosixPath]
    metrics: frozenset[PurePosixPath]


def named(documents: Iterable[tuple[PurePosixPath, bytes]]) -> Named:
    """Read what the configuration names, also where it is not complete, or a later file says otherwise.

    Raise `ConfigurationError` where it cannot be read: a credential that nobody knows of would stay.
    """
    join_tokens, credentials, metrics = {instance.JOIN_TOKEN}, set(), set()
    for path, content in documents:
        try:
            document = strict.load_yaml(content.decode())
        except (UnicodeDecodeError, strict.MalformedError) as error:
            raise ConfigurationError(
                f"{path}: {error}",
                code="configuration-invalid",
                hint="mend it, or remove it: it may name a credential that must not stay",
            ) from None
        join_tokens |= _paths(document, "endpoint", "credential", "join_token_file")
        credentials |= _paths(document, "endpoint", "credential", "bearer_token_file")
        for part in ("certificate", "key"):
            credentials |= _paths(document, "endpoint", "credential", "client_certificate", part)
        metrics |= _paths(document, "metrics", "textfile")
    return Named(frozenset(join_tokens), frozenset(credentials), frozenset(metrics))


def clean(host: Host, named: Named, progress: Progress) -> None:
    """Take away all that a copy of this machine must not have. The daemon is the caller's: it would join again."""
    host.require_root("cleaning a machine for an image")
    if not leave.undo(host, progress, with_package=False):
        leave.stop_sidecar(host, None, progress)  # joined by hand, perhaps
    units = Units(host)
    if units.is_enabled(ISTIO):  # it was before the join; the agent enables it when it joins
        units.disable(ISTIO)
    with progress.step("identity") as step:
        left = _remove_identity(host)
        step.says("nothing is left" + (f" but {_listed(left)}, which are somebody else's" if left else ""))
    with progress.step("tokens") as step:
        removed, left = _remove_credentials(host, named)
        step.says(f"removed: {_listed(removed)}" + (f"; left to you: {_listed(left)}" if left else ""))
    with progress.step("state") as step:
        for folder in (store.FOLDER, signals.LOG_FOLDER):  # themselves they stay, and may be links
            for name in host.names_in(folder):
                leave.remove_all(host, folder / name)
        for path in (*named.metrics, instance.FILE):
            host.remove(path)
        leave.remove_all(host, leave.RUN)
        step.says("the agent remembers nothing, and the sidecar's logs are gone")
    with progress.step("machine") as step:
        step.says(f"removed: {_listed(_forget_machine(host, units))}")


def refuse_a_chroot(host: Host) -> None:
    """Raise `HostError` where systemd does not run: what would be looked at is another machine's network."""
    if host.is_running and not host.status(_SYSTEMD):
        raise HostError(
            "systemd does not run here: this is the tree of a machine rather than a machine",
            code="not-booted",
            hint="from outside: vmmesh-agent --root DIR image-clean",
        )


def others(host: Host) -> Iterator[str]:
    """Yield what a copy should not have either, and which belongs to whoever makes the image."""
    if any(name.startswith("ssh_host_") for name in host.names_in(PurePosixPath("/etc/ssh"))):
        yield "the SSH host keys: /etc/ssh/ssh_host_*"
    if host.names_in(PurePosixPath("/var/lib/cloud/instances")):
        yield "cloud-init's state, user-data and all: cloud-init clean --logs --seed"
    if host.names_in(PurePosixPath("/var/log/journal")):
        yield "the journal: /var/log/journal"
    if host.status(PurePosixPath("/etc/hostname")):
        yield "the host name: /etc/hostname"


def _paths(document: Any, *keys: str) -> set[PurePosixPath]:
    """Return what is at this place of a document, where it is a path."""
    for key in keys:
        document = document.get(key) if isinstance(document, dict) else None
    return {PurePosixPath(document)} if isinstance(document, str) and document.startswith("/") else set()


def _remove_identity(host: Host) -> list[PurePosixPath]:
    """Remove what was placed and what the sidecar got for it. Return the paths that are somebody else's."""
    for folder in place.FOLDERS:
        host.sweep(folder)
    for path in place.PLACED:
        found = host.status(path)
        if found and found.size:  # the package makes an empty mesh file
            host.remove(path)
    sidecar_user = host.account(place.USER)
    left = []
    entries = [folder / name for folder in _WRITTEN_BY_SIDECAR for name in host.names_in(folder)]
    for path, found in [each for entry in entries for each in host.walk(entry)]:
        if found.is_directory:
            continue
        if path in {signals.CERT_CHAIN, signals.KEY} or found.owner == sidecar_user:
            host.remove(path)
        else:
            left.append(path)
    content = host.read(place.ETC_HOSTS) or b""
    without = hosts.with_block(content, ())
    if without != content:
        place.rewrite(host, place.ETC_HOSTS, without)
    return left


def _remove_credentials(host: Host, named: Named) -> tuple[list[PurePosixPath], list[PurePosixPath]]:
    """Remove what this machine shows to the endpoint. Return what was, and what is there and not the agent's own."""
    for folder in {_CONFIGURATION, instance.FILE.parent, *(path.parent for path in named.join_tokens)}:
        host.sweep(folder)
    there = sorted(path for path in named.join_tokens | named.credentials if host.status(path))
    own = [path for path in there if path in named.join_tokens or path.is_relative_to(_CONFIGURATION)]
    for path in own:
        host.remove(path)
    return own, [path for path in there if path not in own]


def _forget_machine(host: Host, units: Units) -> list[PurePosixPath]:
    """Take away what tells this machine from others. Return what was there.

    /etc/machine-id is made empty, not removed: without it, or with "uninitialized" in it, the next boot counts as the
    first one, and systemd enables units by its presets, whatever was enabled in the image.
    """
    gone = []
    if (host.read(_MACHINE_ID) or b"").strip() not in _NO_IDS:
        place.rewrite(host, _MACHINE_ID, b"")
        gone.append(_MACHINE_ID)
    if host.is_running and units.exists(_RANDOM_SEED_SERVICE):
        units.stop(_RANDOM_SEED_SERVICE)  # otherwise it is saved anew when this machine is switched off
    for path in (_DBUS_MACHINE_ID, _RANDOM_SEED):
        found = host.status(path)
        if found and found.is_file:  # a link leads to /etc/machine-id
            host.remove(path)
            gone.append(path)
    return gone


def _listed(paths: Iterable[PurePosixPath]) -> str:
    return ", ".join(map(str, paths)) or "nothing"
