"""What takes long to build is built once and kept outside the repository.

An entry is a folder named by a hash of everything that went into it: it never changes, and another input
makes another entry. It is built under a temporary name and renamed when complete, so that an interrupted
build never looks finished; a lock makes a second run wait instead of building the same again.
"""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_UNUSED_FOR = 14 * 24 * 3600  # seconds after which an entry that nobody asked for is removed


def folder() -> Path:
    """The cache folder: `$VMMESH_CACHE`, else the place that the XDG base directories name."""
    chosen = os.environ.get("VMMESH_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmmesh-agent"


def entry(name: str, inputs: Sequence[str | bytes], build: Callable[[Path], None]) -> Path:
    """Return the folder of this entry, calling `build(folder)` first where it does not exist yet.

    `inputs` is all that the result depends on. `build` gets a new, empty folder; what it raises is passed
    on, and nothing is kept.
    """
    complete = folder() / f"{name}-{digest(inputs)[:16]}"
    complete.parent.mkdir(parents=True, exist_ok=True)
    with _locked(complete):
        if not complete.exists():
            _remove_unused(name, keep=complete)
            partial = complete.with_name(f"{complete.name}.partial")
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir()
            build(partial)
            partial.rename(complete)
        os.utime(complete)
    return complete


def digest(inputs: Sequence[str | bytes]) -> str:
    """Hash a sequence, hexadecimal; the border between two items counts."""
    total = hashlib.sha256()
    for item in inputs:
        content = item.encode() if isinstance(item, str) else item
        total.update(f"{len(content)}:".encode() + content)
    return total.hexdigest()


def contents(*roots: Path) -> list[bytes]:
    """The names and contents of all files below `roots`, as inputs of an entry; caches of Python left out."""
    found: list[bytes] = []
    for root in roots:
        files = sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root]
        for path in files:
            if "__pycache__" not in path.parts:
                found += [str(path.relative_to(root)).encode(), path.read_bytes()]
    return found


@contextmanager
def _locked(complete: Path) -> Iterator[None]:
    with complete.with_name(f"{complete.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_unused(name: str, *, keep: Path) -> None:
    for old in folder().glob(f"{name}-????????????????"):
        if old != keep and time.time() - old.stat().st_mtime > _UNUSED_FOR:
            with _locked(old):
                # Renamed first: half of an entry must not look like an entry.
                leftover = old.rename(old.with_name(f"{old.name}.partial"))
                shutil.rmtree(leftover)
