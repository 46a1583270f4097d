"""This machine's membership in the mesh: the generation in force, the last good one, and what is not done yet.

One file, root's alone, replaced whole: so it is also the journal. It says what shall be before the first file is
changed (`unfinished`), and that it is done after the sidecar was started on it; whoever finds it unfinished brings
the files to what it says.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

from vmmesh_agent import bundle as bundles
from vmmesh_agent.bundle import Bundle, BundleRefusedError
from vmmesh_agent.errors import FetchError
from vmmesh_agent.fetch import machine_id
from vmmesh_agent.host import ROOT, Host

FOLDER = PurePosixPath("/var/lib/vmmesh-agent")
FILE = FOLDER / "state.json"

_MAX_BYTES = 16 * bundles.MAX_BYTES  # two bundles in JSON


@dataclass(frozen=True, slots=True)
class Generation:
    """A verified bundle, the endpoint's name for it (`etag`), the address it came from, and when it was judged."""

    bundle: Bundle
    etag: str
    source: str
    verified_at: datetime

    @property
    def fingerprint(self) -> str:
        """What tells one generation from another: all but the token, which changes every half hour."""
        document = self.bundle.as_json()
        document["files"].pop(bundles.TOKEN, None)
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

    def with_token_of(self, other: "Generation") -> "Generation":
        """Return these files with the other's token. The endpoint has no name for that."""
        files = {**self.bundle.files, bundles.TOKEN: other.bundle.files[bundles.TOKEN]}
        return replace(self, bundle=replace(self.bundle, files=files), etag="", verified_at=other.verified_at)


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A generation on which the sidecar did not become healthy, so that the last good one was put back.

    `is_confirmed`: on that one it did. Until then the fault may be elsewhere.
    """

    fingerprint: str
    cause: str
    message: str
    at: datetime
    is_confirmed: bool = False


@dataclass(frozen=True, slots=True)
class Membership:
    """What this machine joined with. `machine` is whose membership it is: a copied disk is another machine."""

    machine: str
    current: Generation
    good: Generation | None = None  # the last one on which the sidecar was healthy
    previous_root: bytes = b""  # the root certificates of the generation before the current one
    ssh_ports: tuple[int, ...] = ()  # where sshd was seen to listen
    unfinished: bool = False  # the files may be some old, some new, and the sidecar may be stopped for it
    given_up: GivenUp | None = None

    @property
    def is_on_trial(self) -> bool:
        """Has the sidecar still to become healthy on the current generation?"""
        return self.good is None or self.good.fingerprint != self.current.fingerprint

    @property
    def is_open(self) -> bool:
        """Is it still to be seen which generation is good?"""
        return self.is_on_trial or (self.given_up is not None and not self.given_up.is_confirmed)

    @property
    def roots_before(self) -> bytes:
        """The roots that the cluster had told before, where the files may still be those: see `place.plan`."""
        return self.previous_root if self.unfinished else self.current.bundle.files[bundles.ROOT_CERT]

    def followed_by(self, generation: Generation, ssh_ports: tuple[int, ...]) -> "Membership":
        """Return the membership with another generation begun; where only the token differs, it is as good."""
        if generation == self.current:
            return replace(self, ssh_ports=ssh_ports)
        is_same = self.good is not None and self.good.fingerprint == generation.fingerprint
        return replace(
            self,
            current=generation,
            good=generation if is_same else self.good,
            previous_root=self.current.bundle.files[bundles.ROOT_CERT],
            ssh_ports=ssh_ports,
            unfinished=True,
        )


def begun(host: Host, generation: Generation, ssh_ports: tuple[int, ...]) -> Membership:
    """Return the membership of a machine that joins for the first time."""
    return Membership(machine(host), generation, ssh_ports=ssh_ports, unfinished=True)


def machine(host: Host) -> str:
    """Return what tells this machine from a copy of its disk; empty in a tree that is no machine yet."""
    try:
        return machine_id(host)
    except FetchError:
        return ""


def load(host: Host) -> Membership | None:
    """Return the membership, None where there is none or it cannot be read any more."""
    content = host.read(FILE, _MAX_BYTES)
    try:
        document = json.loads(content or b"{}")
        good, given_up = document.get("good"), document.get("given_up")
        return Membership(
            machine=str(document["machine"]),
            current=_generation(document["current"]),
            good=_generation(good) if good else None,
            previous_root=str(document.get("previous_root", "")).encode("utf-8", "surrogateescape"),
            ssh_ports=tuple(map(int, document.get("ssh_ports", ()))),
            unfinished=bool(document.get("unfinished")),
            given_up=GivenUp(**given_up | {"at": datetime.fromisoformat(given_up["at"])}) if given_up else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError, BundleRefusedError):
        return None


def save(host: Host, membership: Membership) -> None:
    """Keep the membership; one that is kept already stays as it is."""
    if load(host) == membership:
        return
    given_up = membership.given_up
    document = {
        "machine": membership.machine,
        "unfinished": membership.unfinished,
        "current": _as_json(membership.current),
        "good": _as_json(membership.good) if membership.good else None,
        "previous_root": membership.previous_root.decode("utf-8", "surrogateescape"),
        "ssh_ports": list(membership.ssh_ports),
        "given_up": {
            "fingerprint": given_up.fingerprint,
            "cause": given_up.cause,
            "message": given_up.message,
            "at": given_up.at.isoformat(),
            "is_confirmed": given_up.is_confirmed,
        }
        if given_up
        else None,
    }
    host.make_folder(FOLDER, ROOT, 0o700)
    host.write(FILE, json.dumps(document).encode(), ROOT, 0o600)


def forget(host: Host) -> None:
    """Remove the membership: tokens and all."""
    host.remove(FILE)


def _generation(document: dict[str, Any]) -> Generation:
    return Generation(
        bundle=bundles.from_json(document["bundle"]),
        etag=str(document["etag"]),
        source=str(document["source"]),
        verified_at=datetime.fromisoformat(document["verified_at"]),
    )


def _as_json(generation: Generation) -> dict[str, Any]:
    return {
        "source": generation.source,
        "etag": generation.etag,
        "verified_at": generation.verified_at.isoformat(),
        "bundle": generation.bundle.as_json(),
    }
