"""Files: private ones are written all or nothing, watched ones are read when they have changed."""

import fcntl
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

from vmmesh_endpoint.errors import ConfigurationError

SETTLED_SECONDS = 1.0

Fingerprint = tuple[int, int, int, int]

T = TypeVar("T")


def private_directory(path: Path) -> Path:
    """Make `path` with mode 0700 where it is missing, and take it away from others where it is not."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_mode & 0o077:
        path.chmod(0o700)
    return path


def require_private(path: Path) -> None:
    """Raise `ConfigurationError` where anybody but the owner may read or write the file."""
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise ConfigurationError(f"{path} has mode {mode:04o}; others can reach it", f"chmod 0600 {path}")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep every other process and thread out of `path` while it is rewritten.

    The lock is a file beside it, because `path` itself is replaced and a lock on it would go with the old one.
    """
    lock = path.with_name(f"{path.name}.lock")
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(lock, flags | os.O_CREAT | os.O_EXCL, 0o600)
        _give_to_owner_of(path.parent, descriptor)
    except FileExistsError:
        descriptor = os.open(lock, flags)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Replace `path` all or nothing. The new file has its mode before it has any content."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            _give_to_owner_of(path.parent, descriptor)
            os.fchmod(descriptor, mode)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _give_to_owner_of(directory: Path, descriptor: int) -> None:
    """Let the server's user keep the use of its directory when root runs a command on it.

    For files that were created exclusively only: another's could be a link to something of root's.
    """
    if os.geteuid() == 0:
        owner = directory.stat()
        os.fchown(descriptor, owner.st_uid, owner.st_gid)


def fingerprint(path: Path) -> Fingerprint | None:
    """What changes when the file does: inode, size, and the times of content and inode in nanoseconds."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class Watched(Generic[T]):
    """A value read from files, and read anew only when one of them has changed.

    Files that changed less than `SETTLED_SECONDS` ago may still be being written. While there is an earlier
    value, that one stands until they have settled, so a reader never sees half of a change. Files that are
    only ever replaced whole (`atomic`) need no such wait.
    """

    def __init__(self, paths: Callable[[], Iterable[Path]], load: Callable[[], T], *, atomic: bool = False) -> None:
        self._paths = paths
        self._load = load
        self._atomic = atomic
        self._lock = threading.Lock()
        self._value: T | None = None
        self._seen: dict[Path, Fingerprint | None] | None = None

    def current(self) -> T:
        """Return the value as of now; raises what `load` raises."""
        with self._lock:
            found = {path: fingerprint(path) for path in self._paths()}
            if self._value is not None and (found == self._seen or not (self._atomic or _settled(found.values()))):
                return self._value
            self._value = self._load()
            self._seen = found
            return self._value


def _settled(found: Iterable[Fingerprint | None]) -> bool:
    # The inode's time, because the content's is kept by `cp -p`. A time in the future counts as settled.
    now = time.time()
    return not any(entry and 0 <= now - entry[3] / 1e9 < SETTLED_SECONDS for entry in found)
