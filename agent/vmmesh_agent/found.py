"""The machine as it was found, noted before the first change, so that `leave` can put it back.

Noted are the package, its user, the unit, the end of /etc/hosts, and what was in the sidecar's folders: once without
the package, and once as the package made them. Contents are kept of the files alone that the agent replaces.
"""

import base64
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from vmmesh_agent.host import ROOT, Account, Host, Status
from vmmesh_agent.store import FOLDER

FILE = FOLDER / "found.json"

TREES = (
    PurePosixPath("/var/lib/istio"),
    PurePosixPath("/etc/istio"),  # a link to the first, which the package's script makes where nothing is there
    PurePosixPath("/etc/certs"),
    PurePosixPath("/var/run/secrets"),
)
_MAX_BYTES = 64 * 1024**2


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing in a tree: `content` in base64 of a file that the agent replaces, else empty."""

    kind: str  # folder, file or other
    uid: int
    gid: int
    mode: int
    content: str = ""


Tree = Mapping[str, Entry]


@dataclass(frozen=True, slots=True)
class Found:
    """How the machine was. `packaged` is set where the agent installed the package."""

    has_sidecar: bool
    has_user: bool
    is_enabled: bool
    was_running: bool
    hosts_end_open: bool  # /etc/hosts had no newline at its end
    bare: Tree
    packaged: Tree | None = None

    @property
    def tree(self) -> Tree:
        """What was in the sidecar's folders before the first join, with the package that is there now."""
        return self.bare if self.packaged is None else self.packaged


def load(host: Host) -> Found | None:
    """Return what was noted, None where nothing was or it cannot be read any more."""
    content = host.read(FILE, _MAX_BYTES)
    try:
        document = json.loads(content or b"{}")
        return Found(
            has_sidecar=bool(document["has_sidecar"]),
            has_user=bool(document["has_user"]),
            is_enabled=bool(document["is_enabled"]),
            was_running=bool(document["was_running"]),
            hosts_end_open=bool(document["hosts_end_open"]),
            bare=_read_tree(document["bare"]),
            packaged=_read_tree(document["packaged"]) if document["packaged"] is not None else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def note(host: Host, found: Found) -> None:
    """Keep what was found."""
    host.make_folder(FOLDER, ROOT, 0o700)
    host.write(FILE, json.dumps(asdict(found)).encode(), ROOT, 0o600)


def note_package(host: Host, files: Collection[PurePosixPath]) -> None:
    """Note how the package left its folders, where the agent brought it and had not placed anything yet."""
    found = load(host)
    if found and not found.has_sidecar and found.packaged is None:
        note(host, replace(found, packaged=look(host, files)))


def look(host: Host, files: Collection[PurePosixPath]) -> dict[str, Entry]:
    """Return what is in the sidecar's folders, with the contents of `files`."""
    return {
        str(path): Entry(
            _kind(status),
            status.owner.uid,
            status.owner.gid,
            status.mode,
            base64.b64encode(host.read(path) or b"").decode() if path in files and status.is_file else "",
        )
        for tree in TREES
        for path, status in host.walk(tree)
    }


def put_back(
    host: Host,
    tree: Tree,
    files: Collection[PurePosixPath],
    identity: Collection[PurePosixPath],
    sidecar_user: Account | None,
) -> list[str]:
    """Bring the sidecar's folders to what they were. Return the paths that were left because they are somebody else's.

    Removed is what the agent placed (`files`), the sidecar's `identity` and what belongs to its user; root's own files
    that came later are an administrator's. An identity that was there before stays: it is no content of ours.
    """
    left = []
    for path, status in [each for root in TREES for each in host.walk(root)]:
        if str(path) in tree:
            continue
        if path not in {*files, *identity, *TREES} and status.owner != sidecar_user:
            left.append(str(path))
        elif not status.is_directory:
            host.remove(path)
        elif not host.remove_folder(path):
            left.append(str(path))
    for name, entry in sorted(tree.items()):
        path, owner = PurePosixPath(name), Account(entry.uid, entry.gid)
        there = host.status(path)
        if entry.kind == "folder" and (there is None or (there.owner, there.mode) != (owner, entry.mode)):
            host.make_folder(path, owner, entry.mode)
        elif entry.kind == "file" and path in files:
            content = base64.b64decode(entry.content)
            if there is None or (there.owner, there.mode, host.read(path)) != (owner, entry.mode, content):
                host.write(path, content, owner, entry.mode)
    return left


def forget(host: Host) -> None:
    """Remove the note: the machine is as it was found."""
    host.remove(FILE)


def _kind(status: Status) -> str:
    return "folder" if status.is_directory else "file" if status.is_file else "other"


def _read_tree(document: Mapping[str, Any]) -> Tree:
    return {str(path): Entry(**entry) for path, entry in document.items()}
