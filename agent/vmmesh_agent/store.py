"""The last verified bundle, kept by root alone: what `restore` puts back, and what a new bundle is compared with."""

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath

from vmmesh_agent import bundle as bundles
from vmmesh_agent.bundle import Bundle, BundleRefusedError
from vmmesh_agent.host import ROOT, Host

FOLDER = PurePosixPath("/var/lib/vmmesh-agent")
_FILE = FOLDER / "bundle.json"


@dataclass(frozen=True, slots=True)
class Stored:
    """A verified bundle, the endpoint's name for it (`etag`), the address it came from, and when it was judged."""

    bundle: Bundle
    etag: str
    source: str
    verified_at: datetime


def load(host: Host) -> Stored | None:
    """Return the last verified bundle, None where there is none or it cannot be read any more."""
    content = host.read(_FILE, 4 * bundles.MAX_BYTES)
    try:
        document = json.loads(content or b"{}")
        return Stored(
            bundle=bundles.from_json(document["bundle"]),
            etag=str(document["etag"]),
            source=str(document["source"]),
            verified_at=datetime.fromisoformat(document["verified_at"]),
        )
    except (ValueError, KeyError, TypeError, BundleRefusedError):
        return None


def save(host: Host, stored: Stored) -> None:
    """Keep the bundle; one that is kept already stays as it is."""
    known = load(host)
    if known and (known.bundle, known.etag, known.source) == (stored.bundle, stored.etag, stored.source):
        return
    document = {
        "source": stored.source,
        "etag": stored.etag,
        "verified_at": stored.verified_at.isoformat(),
        "bundle": stored.bundle.as_json(),
    }
    host.make_folder(FOLDER, ROOT, 0o700)
    host.write(_FILE, json.dumps(document).encode(), ROOT, 0o600)
