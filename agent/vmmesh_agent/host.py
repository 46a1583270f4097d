"""The machine: its files, its users, its commands. THE seam: nothing else of the agent reaches the machine.

Every path of the machine is a `PurePosixPath` and is looked up below the root prefix, links included, so that
`--root DIR` works on another tree as in rpm and systemctl.

Some of the folders belong to istio-proxy, a lesser user. So each path is walked by directory descriptors, a
link is followed only where root (or the caller) owns it, and what is there is replaced, never written into.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import stat
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from vmmesh_agent.errors import HostError, NotPermittedError

_MAX_LINKS = 40  # as the kernel
_OPEN_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_TEMPORARY = ".vmmesh"  # how the names of files end that are not yet, or no longer, in their place
_LEFT_OVER = re.compile(rf"\..+\.(?:new|old)\.[0-9a-f]{{8}}\.(\d+){re.escape(_TEMPORARY)}")  # and whose they are
_BEAT_SECONDS = 1.0
_FLOCK = "hhqqi0q"  # struct flock of 64-bit Linux: type, whence, start, length, process
_SYSTEMD = Path("/run/systemd/system")  # is there where systemd is PID 1: sd_booted(3)
_STOP_SECONDS = 100.0  # systemd's own patience with what it ends is 90 s


Child: TypeAlias = "subprocess.Popen[bytes]"


@dataclass(frozen=True, slots=True)
class Account:
    """A user of the machine by numbers."""

    uid: int
    gid: int


ROOT = Account(0, 0)


@dataclass(frozen=True, slots=True)
class Status:
    """What is at a path: kind and mode (permission bits), owner, size in bytes, inode."""

    is_directory: bool
    is_file: bool
    mode: int
    owner: Account
    size: int
    inode: int


@dataclass(frozen=True, slots=True)
class Completed:
    """How a command ended; the output is text."""

    argv: tuple[str, ...]
    status: int
    stdout: str
    stderr: str

    @property
    def last_words(self) -> str:
        """What it said last, in up to six lines: the reason, where it failed."""
        lines = [line for line in (self.stderr or self.stdout).splitlines() if line.strip()]
        return "\n".join(lines[-6:])


class Host:
    """One machine, at `root` as seen from this process."""

    def __init__(self, root: Path = Path("/"), beat: Callable[[], None] = lambda: None) -> None:
        """`beat` is called about once a second while something else is waited for."""
        self.root = root
        self._beat = beat

    @property
    def is_running(self) -> bool:
        """Is this the machine that we run on, rather than an image tree?"""
        return self.root == Path("/")

    # --- users and names ---

    @property
    def is_root(self) -> bool:
        return os.geteuid() == 0

    def require_root(self, purpose: str) -> None:
        """Raise `NotPermittedError` (exit 77) unless we are root."""
        if not self.is_root:
            raise NotPermittedError(f"{purpose} needs root", code="not-root", hint="run it with sudo, or as root")

    def account(self, name: str) -> Account | None:
        """Return the user's numbers, None where there is no such user."""
        if self.is_running:
            try:
                entry = pwd.getpwnam(name)
            except KeyError:
                return None
            return Account(entry.pw_uid, entry.pw_gid)
        for line in (self.read(PurePosixPath("/etc/passwd")) or b"").decode(errors="replace").splitlines():
            fields = line.split(":")
            if fields[0] == name and len(fields) > 3:
                return Account(int(fields[2]), int(fields[3]))
        return None

    def addresses(self, name: str, timeout: float, services: str = "") -> tuple[str, ...] | None:
        """Return what the machine's resolver (hosts file, DNS, whatever it has) finds, the first choice first.

        None where it does not answer within `timeout` seconds, which getaddrinfo(3) itself cannot promise. `services`
        are those of nsswitch.conf(5) to ask in place of its own.
        """
        chosen = [f"--service=hosts:{services}"] if services else []
        try:
            found = self.run(["getent", *chosen, "ahosts", "--", name], timeout=timeout, check=False)
        except HostError:
            return None
        return tuple(dict.fromkeys(line.split()[0] for line in found.stdout.splitlines() if line.strip()))

    def answers(self, port: int, path: str, timeout: float) -> bool:
        """Does an HTTP server on the loopback interface answer, whatever it says?

        A connection alone would not tell: the kernel accepts it for a process that hangs.
        """
        return bool(self.ask(port, path, timeout, limit=1))

    def ask(self, port: int, path: str, timeout: float, limit: int) -> bytes:
        """Return up to `limit` bytes of what an HTTP server on the loopback interface says, head and all.

        Nothing where nobody answers; what came within `timeout` seconds, where more was to come.
        """
        if not self.is_running:  # the loopback interface is another machine's
            return b""
        said = bytearray()
        deadline = time.monotonic() + timeout
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout) as connection:
            connection.sendall(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
            while len(said) < limit and time.monotonic() < deadline:
                chunk = connection.recv(min(64 * 1024, limit - len(said)))
                if not chunk:
                    break
                said += chunk
        return bytes(said)

    def exchange(self, port: int, datagram: bytes, timeout: float) -> bytes | None:
        """Send a datagram to a UDP port of the loopback interface; return the answer, None where there is none."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
            connection.settimeout(timeout)
            try:
                connection.connect(("127.0.0.1", port))
                connection.send(datagram)
                return connection.recv(65536)
            except OSError:
                return None

    @property
    def name(self) -> str:
        """The machine's host name; in an image tree the one that it would boot with, empty where that comes later."""
        if not self.is_running:
            return (self.read(PurePosixPath("/etc/hostname")) or b"").decode(errors="replace").strip()
        return socket.gethostname()

    # --- files ---

    def read(self, path: PurePosixPath, limit: int = 16 * 1024**2) -> bytes | None:
        """Return the content of a plain file, None where there is none. Raise `HostError` beyond `limit` bytes."""
        with _explained(path):
            try:
                with self._parent(path) as (folder, name):
                    descriptor = os.open(
                        name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder
                    )
            except (FileNotFoundError, NotADirectoryError):
                return None
            with open(descriptor, "rb") as file:  # noqa: PTH123  # a descriptor, not a path
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise HostError(f"{path} is not a plain file", code="not-a-file", hint="look at what put it there")
                content = file.read(limit + 1)
        if len(content) > limit:
            raise HostError(f"{path} is larger than {limit} bytes", code="file-too-large")
        return content

    def chunks(self, path: PurePosixPath, size: int = 1024**2) -> Iterator[bytes]:
        """Yield a file of any size in pieces of `size` bytes."""
        with _explained(path), self._parent(path) as (folder, name):
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            with open(descriptor, "rb") as file:  # noqa: PTH123  # a descriptor, not a path
                while chunk := file.read(size):
                    yield chunk

    def sha256(self, path: PurePosixPath) -> str:
        """Return the hex digest of a file of any size."""
        with _explained(path), self._parent(path) as (folder, name):
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            with open(descriptor, "rb") as file:  # noqa: PTH123  # a descriptor, not a path
                return hashlib.file_digest(file, "sha256").hexdigest()

    def status(self, path: PurePosixPath) -> Status | None:
        """Return what is at the path (a link at its end is not followed), None where there is nothing."""
        with _explained(path):
            try:
                with self._parent(path) as (folder, name):
                    found = os.stat(name, dir_fd=folder, follow_symlinks=False)
            except (FileNotFoundError, NotADirectoryError):
                return None
        return Status(
            is_directory=stat.S_ISDIR(found.st_mode),
            is_file=stat.S_ISREG(found.st_mode),
            mode=stat.S_IMODE(found.st_mode),
            owner=Account(found.st_uid, found.st_gid),
            size=found.st_size,
            inode=found.st_ino,
        )

    def names_in(self, path: PurePosixPath) -> list[str]:
        """Return the names in a folder, sorted; none where there is no such folder."""
        with _explained(path):
            try:
                with self._folder(path) as folder, _readable(folder) as descriptor:
                    return sorted(os.listdir(descriptor))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def write(self, path: PurePosixPath, content: bytes, owner: Account, mode: int) -> None:
        """Put a file there whole: whoever looks sees the old content or the new one, also after a power cut."""
        with self.staged([NewContent(path, content, owner, mode)]) as staged:
            staged.commit()

    @contextlib.contextmanager
    def staged(self, contents: Sequence["NewContent"]) -> Iterator["Staged"]:
        """Write new content beside the files that it is for; nothing is in its place until `commit`."""
        with Staged() as staged:
            for each in contents:
                with _explained(each.path), self._parent(each.path) as (folder, name):
                    staged.add(each, os.dup(folder), name)
            yield staged

    def sweep(self, folder: PurePosixPath) -> None:
        """Remove what a process left in the folder that was killed while it wrote there."""
        for name in self.names_in(folder):
            owner = _LEFT_OVER.fullmatch(name)
            if owner and not Path("/proc", owner[1]).exists():
                self.remove(folder / name)

    def make_folder(self, path: PurePosixPath, owner: Account, mode: int) -> None:
        """Make a folder, its parents too (those as root's, 0755), or give an existing one this owner and mode."""
        with _explained(path):
            for parent in reversed(path.parents[:-1]):
                self._make_one(parent, ROOT, 0o755)
            self._make_one(path, owner, mode)
            self.set_owner(path, owner, mode)

    def _make_one(self, path: PurePosixPath, owner: Account, mode: int) -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), self._folder(path):
            return
        with self._parent(path) as (folder, name):
            os.mkdir(name, 0o700, dir_fd=folder)
            _sync(folder)
        self.set_owner(path, owner, mode)

    def set_owner(self, path: PurePosixPath, owner: Account, mode: int) -> None:
        """Give a plain file or a folder this owner and mode; what is inside a folder stays as it is."""
        with _explained(path), self._parent(path) as (folder, name):
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            try:
                _own(descriptor, owner)
                os.fchmod(descriptor, mode)
            finally:
                os.close(descriptor)

    def give(self, path: PurePosixPath, owner: Account) -> None:
        """Give whatever is at the path (a link itself, not what it leads to) to this owner."""
        with _explained(path), self._parent(path) as (folder, name):
            os.chown(name, owner.uid, owner.gid, dir_fd=folder, follow_symlinks=False)

    def rename(self, path: PurePosixPath, name: str) -> None:
        """Give what is at the path another name in the same folder; what had that name is gone."""
        with _explained(path), self._parent(path) as (folder, old):
            os.rename(old, name, src_dir_fd=folder, dst_dir_fd=folder)

    def remove(self, path: PurePosixPath) -> None:
        """Remove a file; nothing happens where there is none."""
        gone = contextlib.suppress(FileNotFoundError, NotADirectoryError)
        with _explained(path), gone, self._parent(path) as (folder, name):
            os.unlink(name, dir_fd=folder)
            _sync(folder)

    def remove_folder(self, path: PurePosixPath) -> bool:
        """Remove a folder if nothing is in it; say whether it is gone."""
        try:
            with _explained(path), self._parent(path) as (folder, name):
                os.rmdir(name, dir_fd=folder)
                _sync(folder)
        except HostError as error:
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                return True
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in {errno.ENOTEMPTY, errno.EBUSY}:
                return False
            raise
        return True

    def walk(self, path: PurePosixPath) -> Iterator[tuple[PurePosixPath, Status]]:
        """Yield what is at the path and below it, the deepest first; no link is followed, none is missed."""
        found = self.status(path)
        if found is None:
            return
        if found.is_directory:
            for name in self.names_in(path):
                yield from self.walk(path / name)
        yield path, found

    def free_bytes(self, path: PurePosixPath) -> int:
        """Return the space that root may still use where the path is, or where it would be made."""
        with _explained(path):
            for candidate in (path, *path.parents):
                with (
                    contextlib.suppress(FileNotFoundError, NotADirectoryError),
                    self._folder(candidate) as folder,
                ):
                    found = os.statvfs(folder)
                    return found.f_bfree * found.f_frsize
        return 0

    def outside(self, path: PurePosixPath) -> Path:
        """Return the path for a program that is run from outside the tree, such as `rpm --root`."""
        try:
            with self._parent(path) as (folder, name):
                return Path(f"/proc/self/fd/{folder}").readlink() / name  # no link on the way leads out of the tree
        except (FileNotFoundError, NotADirectoryError):
            return self.root / path.relative_to("/")

    def create(self, path: PurePosixPath) -> "NewFile":
        """Make a new file of our own, replacing one that is there, for a child to write and us to read."""
        self.remove(path)
        with _explained(path), self._parent(path) as (folder, name):
            return NewFile(os.open(name, os.O_RDWR | _CREATE, 0o600, dir_fd=folder), path)

    @contextlib.contextmanager
    def _parent(self, path: PurePosixPath) -> Iterator[tuple[int, str]]:
        """Open the folder that holds the path's last component."""
        with self._folder(path.parent) as folder:
            yield folder, path.name

    @contextlib.contextmanager
    def _folder(self, path: PurePosixPath) -> Iterator[int]:
        """Open a folder, walking component by component below the root."""
        descriptor = self._walk(path)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _walk(self, path: PurePosixPath) -> int:
        pending = list(reversed(path.parts[1:]))
        trail = [os.open(self.root, _OPEN_FOLDER & ~os.O_NOFOLLOW)]
        links = 0
        try:
            while pending:
                part = pending.pop()
                if part == "..":  # only a link's target has it
                    if len(trail) > 1:
                        os.close(trail.pop())
                    continue
                try:
                    trail.append(os.open(part, _OPEN_FOLDER, dir_fd=trail[-1]))
                except OSError as error:
                    if error.errno not in {errno.ELOOP, errno.ENOTDIR}:
                        raise
                    target = PurePosixPath(_trusted_link(part, trail[-1]))
                    links += 1
                    if links > _MAX_LINKS:
                        raise
                    if target.is_absolute():
                        while len(trail) > 1:
                            os.close(trail.pop())
                    pending.extend(reversed([piece for piece in target.parts if piece != "/"]))
            return os.dup(trail[-1])
        finally:
            for descriptor in trail:
                os.close(descriptor)

    def is_locked(self, path: PurePosixPath) -> bool:
        """Does another process hold a lock on the file, of the kind that package managers take (fcntl(2))?"""
        try:
            with _explained(path), self._parent(path) as (folder, name):
                descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        except HostError:
            return False
        with open(descriptor, "rb") as file:  # noqa: PTH123  # a descriptor, not a path
            # Asked, not tried: whoever begins just then must not find it taken by us. l_type comes first.
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            (kind, *_) = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
        return bool(kind != fcntl.F_UNLCK)

    def rest(self, seconds: float) -> None:
        """Wait for somebody else, about a second at most."""
        self._beat()
        time.sleep(seconds)

    # --- commands ---

    def has_program(self, name: str) -> bool:
        """Is the program on the PATH of this machine?"""
        return shutil.which(name) is not None

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout: float = 60,
        check: bool = True,
        environment: Mapping[str, str] | None = None,
        input: bytes = b"",  # noqa: A002  # the name that subprocess.run gave it
        output_limit: int = 16 * 1024**2,
    ) -> Completed:
        """Run a command to its end. `timeout` in seconds; `check` makes a non-zero status a `HostError`.

        `input` is its standard input: empty, it is at its end at once.
        """
        try:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # so that it can be ended with all that it started
                env={**os.environ, "LC_ALL": "C.UTF-8", **(environment or {})},
            )
        except FileNotFoundError:
            raise HostError(
                f"{argv[0]} is not installed", code="program-missing", hint=f"install the package that has {argv[0]}"
            ) from None
        except OSError as error:
            code = "permission-denied" if isinstance(error, PermissionError) else "program-unusable"
            raise HostError(f"{argv[0]} cannot be run: {error.strerror}", code=code) from None
        with child:
            try:
                stdout, stderr = self._communicate(child, input, timeout)
            except BaseException as error:
                os.killpg(child.pid, signal.SIGKILL)
                if isinstance(error, subprocess.TimeoutExpired):
                    raise HostError(
                        f"`{' '.join(argv)}` did not end within {timeout:.0f} s", code="command-timeout", retry=True
                    ) from None
                raise
        completed = Completed(
            tuple(argv),
            child.returncode,
            stdout[:output_limit].decode(errors="replace"),
            stderr[:output_limit].decode(errors="replace"),
        )
        if check and completed.status != 0:
            raise HostError(
                f"`{' '.join(argv)}` failed with status {completed.status}: {completed.last_words}",
                code="command-failed",
                retry=True,
            )
        return completed

    def _communicate(self, child: Child, sent: bytes, timeout: float) -> tuple[bytes, bytes]:
        deadline = time.monotonic() + timeout
        pending: bytes | None = sent
        while True:
            left = deadline - time.monotonic()
            try:
                return child.communicate(pending, max(0.0, min(_BEAT_SECONDS, left)))
            except subprocess.TimeoutExpired:
                if left <= 0:
                    raise
                pending = None  # it is on its way: communicate() goes on with it
                self._beat()

    def run_on(
        self, argv: Sequence[str], *, log: PurePosixPath, timeout: float, environment: Mapping[str, str] | None = None
    ) -> Completed:
        """Run a command that must not be torn: it goes on when we end, whatever ends us. All it says is in `log`.

        It is a service of its own: systemd ends what is in a service's cgroup together with the service, and what
        the service may not do (vmmesh-agent.service), its children may not either. Only `timeout` seconds end it.
        """
        given = {"LC_ALL": "C.UTF-8", **(environment or {})}
        own_service = self.is_running and _SYSTEMD.exists()
        output = self.create(log)
        try:
            with _explained(PurePosixPath(argv[0])):
                child = subprocess.Popen(
                    _as_service(argv, given, timeout) if own_service else argv,
                    stdin=subprocess.DEVNULL,
                    stdout=output.descriptor,
                    stderr=output.descriptor,
                    start_new_session=True,
                    env={**os.environ, **given},
                )
            deadline = time.monotonic() + timeout
            while True:
                self._beat()
                try:
                    status = child.wait(_BEAT_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    # systemd counts by itself, and goes on where we do not.
                    if time.monotonic() >= deadline + (_STOP_SECONDS if own_service else 0):
                        os.killpg(child.pid, signal.SIGKILL)
                        status = child.wait()
                        break
            if status != 0 and time.monotonic() >= deadline:
                raise HostError(
                    f"`{' '.join(argv)}` did not end within {timeout:.0f} s", code="command-timeout", retry=True
                )
            said = output.read_at(0).decode(errors="replace")
        finally:
            output.close()
        return Completed(tuple(argv), status, said, "")

    def start(self, argv: Sequence[str], *, pass_descriptors: Sequence[int] = ()) -> Child:
        """Start a child in a session of its own, with pipes to its standard input, output and error."""
        with _explained(PurePosixPath(argv[0])):
            return subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd="/",
                start_new_session=True,
                pass_fds=pass_descriptors,
            )

    @staticmethod
    @contextlib.contextmanager
    def uninterrupted() -> Iterator[None]:
        """Let SIGTERM, SIGINT and SIGHUP wait for the end of the block, which must be short."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @contextlib.contextmanager
    def lock(
        self, path: PurePosixPath, patience: float = 0, on_wait: Callable[[str], None] = lambda _: None
    ) -> Iterator[None]:
        """Hold the lock file for as long as the block lasts.

        Raise `HostError` (code `locked`) where another process has it and keeps it for `patience` seconds; `on_wait` is
        told, once, who it is.
        """
        self.make_folder(path.parent, ROOT, 0o755)
        with _explained(path), self._parent(path) as (folder, name):
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
        try:
            deadline = time.monotonic() + patience
            holder = ""
            while not _locked(descriptor):
                if not holder:
                    holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another vmmesh-agent"
                    on_wait(f"{holder} is at work on this machine; waiting for it")
                if time.monotonic() >= deadline:
                    raise HostError(
                        f"{holder} is at work on this machine", code="locked", hint="wait for it to end", retry=True
                    )
                self.rest(0.1)
            with contextlib.suppress(OSError):  # who holds it is a courtesy: a full disk has no room for it
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"vmmesh-agent (process {os.getpid()})\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class NewContent:
    """What shall be in a file: content, owner and mode (permission bits)."""

    path: PurePosixPath
    content: bytes
    owner: Account
    mode: int


@dataclass(frozen=True, slots=True)
class _StagedFile:
    path: PurePosixPath
    folder: int
    name: str
    new: str  # the name that the new content has until it is in its place
    old: str  # the second name that the old content has from then on

    def keep_old(self) -> None:
        """Give the old content, where there is any, its second name, from which it can be put back."""
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISDIR(os.stat(self.name, dir_fd=self.folder, follow_symlinks=False).st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self.name)
            os.link(self.name, self.old, src_dir_fd=self.folder, dst_dir_fd=self.folder, follow_symlinks=False)

    def put(self) -> None:
        os.rename(self.new, self.name, src_dir_fd=self.folder, dst_dir_fd=self.folder)

    def put_back(self) -> None:
        """Undo what was done since `keep_old`."""
        try:
            os.rename(self.old, self.name, src_dir_fd=self.folder, dst_dir_fd=self.folder)
        except FileNotFoundError:  # there was none
            os.unlink(self.name, dir_fd=self.folder)
        _sync(self.folder)

    def clean_up(self) -> None:
        for name in (self.new, self.old):
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=self.folder)
        os.close(self.folder)


class Staged:
    """New content of some files, whole and synced beside the old: what takes space is done, what is left is renames.

    Whatever is not committed leaves no trace.
    """

    def __init__(self) -> None:
        self._files: list[_StagedFile] = []

    def __enter__(self) -> "Staged":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.clean_up()

    def add(self, content: NewContent, folder: int, name: str) -> None:
        """Write the content under a name of its own; `folder` is ours from now on."""
        suffix = f"{secrets.token_hex(4)}.{os.getpid()}{_TEMPORARY}"
        staged = _StagedFile(content.path, folder, name, new=f".{name}.new.{suffix}", old=f".{name}.old.{suffix}")
        self._files.append(staged)
        with open(os.open(staged.new, os.O_WRONLY | _CREATE, 0o600, dir_fd=folder), "wb") as file:  # noqa: PTH123
            file.write(content.content)
            file.flush()
            _own(file.fileno(), content.owner)
            os.fchmod(file.fileno(), content.mode)
            os.fsync(file.fileno())

    def commit(self) -> None:
        """Put all of it in place. Where one file cannot be, the others get their old content back: no space is needed.

        A power cut in between leaves some old and some new: that is for a journal to know. One file alone is either
        in its place or not; there is nothing to take back.
        """
        done: list[_StagedFile] = []
        with Host.uninterrupted():
            for file in self._files:
                try:
                    if len(self._files) > 1:
                        file.keep_old()
                        done.append(file)
                    file.put()
                    _sync(file.folder)
                except OSError as error:
                    for each in reversed(done):
                        with contextlib.suppress(OSError):  # the journal knows; the first reason is the one to tell
                            each.put_back()
                    raise meaning_of(error, file.path) from error


class NewFile:
    """A file that somebody else writes through the same descriptor: its position is theirs, we read past it."""

    def __init__(self, descriptor: int, path: PurePosixPath) -> None:
        self.descriptor = descriptor
        self._path = path

    @property
    def size(self) -> int:
        return os.fstat(self.descriptor).st_size

    def read_at(self, position: int, limit: int = 1024**2) -> bytes:
        return os.pread(self.descriptor, limit, position)

    def append(self, data: bytes) -> None:
        """Write at the descriptor's position: for a file that nobody else writes."""
        try:
            with open(self.descriptor, "ab", closefd=False) as file:  # a descriptor, not a path
                file.write(data)
        except OSError as error:
            raise meaning_of(error, self._path) from error

    def close(self) -> None:
        os.close(self.descriptor)


class LogFile:
    """New bytes of a log file from a position on, through its creation, truncation and rotation.

    A file that was truncated and has already outgrown the old position is told by its first bytes; a hole of
    NUL bytes, left by truncating under a writer with a position of its own, is skipped without being read.
    """

    _HEAD = 64

    def __init__(self, host: Host, path: PurePosixPath, *, tail: int | None = None) -> None:
        """Begin at the file's start, or `tail` bytes before its end."""
        self._host = host
        self._path = path
        self._descriptor: int | None = None
        self._position = 0
        self._head = b""
        self._open()
        if self._descriptor is not None and tail is not None:
            self._position = max(0, os.fstat(self._descriptor).st_size - tail)

    def skip_to_end(self) -> None:
        """Leave out what is there now."""
        if self._descriptor is not None:
            self._position = os.fstat(self._descriptor).st_size
            self._head = os.pread(self._descriptor, self._HEAD, 0)

    def read(self, limit: int = 1024**2) -> bytes:
        """Return up to `limit` new bytes, none where there are no more."""
        if self._descriptor is None:
            self._open()
        if self._descriptor is None:
            return b""
        self._notice_truncation(self._descriptor)
        data = self._read_on(self._descriptor, limit)
        if not data and self._was_replaced(self._descriptor):
            self.close()
            self._open()
            return b"" if self._descriptor is None else self._read_on(self._descriptor, limit)
        return data

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None
        self._position = 0
        self._head = b""

    def _open(self) -> None:
        """Open the file; what is missing, not a plain file or not for us has no lines."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with contextlib.suppress(OSError, HostError), self._host._parent(self._path) as (folder, name):  # noqa: SLF001
            descriptor = os.open(name, flags, dir_fd=folder)
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                self._descriptor = descriptor
                self._head = os.pread(descriptor, self._HEAD, 0)
            else:
                os.close(descriptor)

    def _notice_truncation(self, descriptor: int) -> None:
        head = os.pread(descriptor, self._HEAD, 0)
        if os.fstat(descriptor).st_size < self._position or not head.startswith(self._head):
            self._position = 0
        self._head = head

    def _read_on(self, descriptor: int, limit: int) -> bytes:
        try:
            self._position = os.lseek(descriptor, self._position, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole follows, or the end
            return b""
        data = os.pread(descriptor, limit, self._position)
        self._position += len(data)
        return data

    def _was_replaced(self, descriptor: int) -> bool:
        found = self._host.status(self._path)
        return found is not None and found.inode != os.fstat(descriptor).st_ino


@contextlib.contextmanager
def _readable(folder: int) -> Iterator[int]:
    """Open anew a folder that was only walked through: listing and syncing need the right to read it."""
    descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _sync(folder: int) -> None:
    """Make the names in a folder survive a power cut."""
    with _readable(folder) as descriptor:
        os.fsync(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _own(descriptor: int, owner: Account) -> None:
    found = os.fstat(descriptor)
    if (found.st_uid, found.st_gid) != (owner.uid, owner.gid):
        os.fchown(descriptor, owner.uid, owner.gid)


def _trusted_link(name: str, folder: int) -> str:
    """Return where a link leads, where its owner may be trusted; a lesser user's link could lead root astray."""
    found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if not stat.S_ISLNK(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), name)
    if found.st_uid not in {0, os.geteuid()}:
        raise HostError(
            f"the link {name!r} belongs to user {found.st_uid} and is not followed",
            code="foreign-link",
            hint="see who made it and remove it",
        )
    return os.readlink(name, dir_fd=folder)


def _as_service(argv: Sequence[str], environment: Mapping[str, str], seconds: float) -> list[str]:
    """Return the command line that has systemd run `argv` as a service, and ends as that does."""
    # Debian's rpm has its database in HOME. What else is in our environment is ours alone.
    handed_on = {
        name: value
        for name, value in os.environ.items()
        if name in {"PATH", "HOME"} or name.lower().endswith("_proxy")
    }  # fmt: skip
    return [
        *("systemd-run", "--quiet", "--collect", "--wait", "--pipe", f"--property=RuntimeMaxSec={seconds:.0f}"),
        *(f"--setenv={name}={value}" for name, value in {**handed_on, **environment}.items()),
        "--",
        *(part.replace("$", "$$") for part in argv),  # systemd.service(5) has variables in command lines
    ]


_MEANINGS = {
    errno.ENOSPC: ("disk-full", "no space is left on the disk", "make room, then try again"),
    errno.EDQUOT: ("disk-full", "the disk quota is used up", "make room, then try again"),
    errno.EROFS: ("disk-read-only", "the disk is mounted read-only", "see why (dmesg), mount it for writing"),
    errno.EISDIR: ("not-a-file", "it is a folder", "look at what put it there"),
    errno.ELOOP: ("foreign-link", "it is a link", "see who made it and remove it"),
    errno.EMFILE: ("too-many-open-files", "too many files are open", "raise the limit (LimitNOFILE)"),
    errno.ENFILE: ("too-many-open-files", "too many files are open on this machine", ""),
}


@contextlib.contextmanager
def _explained(path: PurePosixPath) -> Iterator[None]:
    """Turn an OSError into an `AgentError` that names the path."""
    try:
        yield
    except OSError as error:
        raise meaning_of(error, path) from error


def meaning_of(error: OSError, path: PurePosixPath) -> HostError | NotPermittedError:
    """Say what an error of the kernel means for what was done with `path`."""
    if isinstance(error, PermissionError):
        return NotPermittedError(f"{path}: {error.strerror}", code="permission-denied", hint="run it as root")
    code, meaning, hint = _MEANINGS.get(error.errno or 0, ("disk-error", error.strerror or str(error), ""))
    return HostError(f"{path}: {meaning}", code=code, hint=hint, retry=True)
