"""A throw-away machine with real systemd: a container booted from an overlay over the image's layers.

    with Machine("vm1", layers=image.layers(), network=network, run=run) as machine:
        machine.run(["systemctl", "status"])

A machine that nothing was asked of yet is up in well under a second, so a test takes a fresh one. What the
test changes lands in a folder of its own, and ends with it.
"""

import hashlib
import os
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType
from typing import Self

from lab.image import overlay_options
from lab.network import CLUSTER_IPV4, Network
from lab.run import LabError, Run

# What a snapshot leaves out: it changes on an idle machine, or is not the machine's own.
LEFT_OUT = {
    "/proc": "the kernel's",
    "/sys": "the kernel's",
    "/dev": "the kernel's",
    "/run/host": "the container manager's",
    "/run/systemd": "systemd's run-time state; what matters of it, `systemctl show` says",
    "/run/credentials": "systemd's, mounted for a moment for each service",
    "/run/crond.*": "the process number of cron",
    "/run/agetty.reload": "the log-in prompt's, made whenever an address changes",
    "/run/udev": "the device manager's run-time state",
    "/run/dbus": "sockets",
    "/run/log": "the journal",
    "/run/user": "the run-time folders of log-in sessions",
    "/run/sudo": "when somebody used sudo last",
    "/run/utmp": "who is logged in",
    "/var/log/journal": "the journal",
    "/var/log/wtmp": "who was logged in",
    "/var/lib/systemd": "stamps of timers, the random seed",
    "/tmp/systemd-private-*": "private /tmp of a running service",
    "/var/tmp/systemd-private-*": "private /var/tmp of a running service",
}

_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
}
_REBOOT = 133  # what systemd-nspawn ends with when the container asked for a reboot
_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "folder",
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


@dataclass(frozen=True)
class Entry:
    """One file, folder, link, … of a machine.

    `content` is the SHA-256 of a file, the target of a link, else empty. `size` (bytes) and `written`
    (modification time, nanoseconds) are those of files, else 0: a folder's change with what is in it.
    """

    kind: str
    mode: str
    uid: int
    gid: int
    size: int
    content: str
    written: int


class Machine:
    """A context manager; off at its end as if the power had failed."""

    def __init__(
        self, name: str, *, layers: Sequence[Path], network: Network, run: Run, disk: Path | None = None
    ) -> None:
        """`disk` is that of another machine, which is off: this one starts with a copy, and is told nothing else."""
        self.name = name
        self._origin = disk
        self.link = network.attach(name)
        self._run = run
        self._layers = layers
        self._folder = run.folder / name
        self._console = self._folder / "console.log"
        self._nspawn: subprocess.Popen[bytes] | None = None
        self.leader = 0  # the number that its PID 1 has on the host; 0 while it is off

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.power_off()
        self.link.remove()

    # --- power --------------------------------------------------------------

    def start(self) -> None:
        """Boot it for the first time, with nothing but its layers and its name."""
        self._prepare()
        self.boot()

    def boot(self) -> None:
        """Switch the machine on and wait until systemd has started everything that it could."""
        self.link.renew()
        upper, work, root = (self._folder / part for part in ("upper", "work", "root"))
        # The overlay is mounted in a mount namespace of its own and so cannot outlive its machine.
        script = 'mount -t overlay overlay -o "$1" "$2"; shift 2; exec "$@"'
        argv = [
            *("unshare", "--mount", "--propagation=slave", "/bin/sh", "-ec", script, "sh"),
            *(overlay_options(self._layers, upper=upper, work=work), str(root)),
            *("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--boot", "--console=read-only"),
            *(f"--directory={root}", f"--machine={self._run.name}-{self.name}", f"--hostname={self.name}"),
            *(f"--network-namespace-path={self.link.namespace}", "--resolv-conf=off", "--timezone=off"),
            # nspawn gives it only to machines whose network it made itself: without it, no iptables.
            *("--capability=CAP_NET_ADMIN", "--link-journal=no"),
            # Landlock, as a real machine has it
            "--system-call-filter=landlock_create_ruleset landlock_restrict_self",
        ]
        with self._console.open("ab") as console:
            self._nspawn = self._run.spawn(self.name, argv, output=console)
        self.leader = self._wait_for_leader()
        self._wait_for_systemd()

    def reboot(self) -> None:
        """Let systemd reboot: services are stopped, what was only in memory is gone, all else stays."""
        self._end("reboot", expected=_REBOOT)
        self.boot()

    def stop(self) -> None:
        """Let systemd power the machine off."""
        self._end("poweroff", expected=0)

    def power_off(self) -> None:
        """Pull the plug: every process is killed where it stands."""
        if self._nspawn is not None:
            self._run.kill(self.name)
            self._nspawn.wait()
            self._nspawn = None
            self.leader = 0

    def crash(self) -> None:
        """Pull the plug and switch on again. The disk keeps what was written, synced or not."""
        self.power_off()
        self.boot()

    def reset(self) -> None:
        """Throw away everything that ever changed, and boot as on the first day."""
        self.power_off()
        self.start()

    # --- commands -----------------------------------------------------------

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float = 60,
        input: str | None = None,  # noqa: A002  the name that subprocess.run gave it
        user: str = "root",
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the machine with a log-in's plain environment and `env`.

        Raises `subprocess.CalledProcessError` (with `check`; both outputs are in its notes) and
        `subprocess.TimeoutExpired`, after which the command and its children are dead.
        """
        done = self._communicate(argv, (input or "").encode(), timeout=timeout, user=user, env=env)
        text = subprocess.CompletedProcess(
            done.args,
            done.returncode,
            done.stdout.decode(errors="replace"),
            done.stderr.decode(errors="replace"),
        )
        if check and text.returncode != 0:
            error = subprocess.CalledProcessError(text.returncode, list(argv), text.stdout, text.stderr)
            error.add_note(f"stdout:\n{text.stdout}\nstderr:\n{text.stderr}")
            raise error
        return text

    def spawn(
        self,
        argv: Sequence[str],
        *,
        user: str = "root",
        env: Mapping[str, str] | None = None,
        stdout: int | None = subprocess.PIPE,
        stderr: int | None = subprocess.STDOUT,
    ) -> subprocess.Popen[str]:
        """Start a command on the machine; it ends with the machine at the latest."""
        return subprocess.Popen(
            self.command(argv, user=user),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            env=_ENVIRONMENT | dict(env or {}),
            start_new_session=True,
        )

    def command(self, argv: Sequence[str], *, user: str = "root") -> list[str]:
        """The command line that, on the host, runs `argv` on the machine."""
        if user != "root":
            argv = ["runuser", "-u", user, "--", *argv]
        # Only what PID 1 of the machine may do: with the host's CAP_SYS_TIME a test could set its clock.
        bounds = f"--bounding-set={self._capabilities()}"
        enter = ["nsenter", f"--target={self.leader}", "--all", "setpriv", bounds, "--", *argv]
        return self._run.inside(f"{self.name}/visitors", enter)

    # --- files --------------------------------------------------------------

    @property
    def disk(self) -> Path:
        """What was ever written on top of the layers; another machine may start with a copy while this one is off."""
        return self._folder / "upper"

    @property
    def root(self) -> Path:
        """The running machine's tree, /run and /tmp included, as the host sees it.

        Absolute links in it lead to the host's own files: follow none of them; `read` and `write` do right.
        """
        return Path(f"/proc/{self.leader}/root")

    def read(self, path: str) -> bytes:
        """The content of a file; raises `FileNotFoundError` where there is none."""
        done = self._communicate(["cat", path], b"", timeout=60)
        if done.returncode != 0:
            raise FileNotFoundError(done.stderr.decode(errors="replace").strip())
        return done.stdout

    def write(self, path: str, data: bytes | str, mode: int = 0o644, owner: str = "root") -> None:
        """Write a file, with the folders above it (root, 0755) where they are missing."""
        content = data.encode() if isinstance(data, str) else data
        script = 'install -D --mode="$1" --owner="$2" --group="$(id -g "$2")" /dev/stdin "$3"'
        done = self._communicate(["sh", "-ec", script, "sh", f"{mode:o}", owner, path], content, timeout=60)
        if done.returncode != 0:
            raise LabError(f"{self.name}: cannot write {path}: {done.stderr.decode(errors='replace')}")

    def journal(self, unit: str = "") -> str:
        """The journal of a unit, or the whole of it, also of a machine that is off."""
        if self.leader:
            self._communicate(["journalctl", "--sync"], b"", timeout=60)
        argv = ["journalctl", "--no-pager", "--output=short-precise", "--quiet"]
        argv += [
            f"--directory={self._folder / 'upper/var/log/journal'}",
            *([f"--unit={unit}"] if unit else []),
        ]
        return subprocess.run(argv, check=True, text=True, stdout=subprocess.PIPE).stdout

    def console(self) -> str:
        """What was written to the console, without the terminal's control sequences."""
        text = self._console.read_text(errors="replace") if self._console.exists() else ""
        return re.sub(r"\n+", "\n", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", text))

    def snapshot(self) -> dict[str, Entry]:
        """Every file, folder and link of the running machine by its path, but for what LEFT_OUT names."""
        found: dict[str, Entry] = {}
        folders = ["/"]
        while folders:
            folder = folders.pop()
            with suppress(FileNotFoundError), os.scandir(f"{self.root}{folder}") as listing:
                for item in listing:
                    path = f"{folder.rstrip('/')}/{item.name}"
                    if any(fnmatch(path, pattern) for pattern in LEFT_OUT):
                        continue
                    with suppress(FileNotFoundError):
                        found[path] = _entry(Path(item.path), path)
                        if item.is_dir(follow_symlinks=False):
                            folders.append(path)
        return found

    # --- inside -------------------------------------------------------------

    def _prepare(self) -> None:
        if self._folder.exists():
            shutil.rmtree(self._folder)
        for folder in (self._folder / "work", self._folder / "root"):
            folder.mkdir(parents=True)
        if self._origin:
            subprocess.run(["cp", "--archive", self._origin, self.disk], check=True)
            return
        etc = self.disk / "etc"
        etc.mkdir(parents=True)
        (etc / "machine-id").write_text(hashlib.sha256(str(self._folder).encode()).hexdigest()[:32] + "\n")
        (etc / "hostname").write_text(f"{self.name}\n")
        names = f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n::1 localhost ip6-localhost ip6-loopback\n"
        (etc / "hosts").write_text(names)
        (etc / "resolv.conf").write_text(f"nameserver {CLUSTER_IPV4}\n")

    def _communicate(
        self,
        argv: Sequence[str],
        data: bytes,
        *,
        timeout: float,
        user: str = "root",
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        with subprocess.Popen(
            self.command(argv, user=user),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_ENVIRONMENT | dict(env or {}),
            start_new_session=True,
        ) as process:
            try:
                stdout, stderr = process.communicate(data, timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # nsenter alone would leave the command running
                stdout, stderr = process.communicate()
                raise subprocess.TimeoutExpired(list(argv), timeout, stdout, stderr) from None
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(list(argv), process.returncode, stdout, stderr)

    def _capabilities(self) -> str:
        status = Path(f"/proc/{self.leader}/status").read_text()
        bounds = int(status.partition("CapBnd:")[2].split()[0], 16)
        return ",".join(["-all", *(f"+cap_{bit}" for bit in range(64) if bounds >> bit & 1)])

    def _wait_for_leader(self) -> int:
        """The machine's PID 1, as the host numbers it."""
        assert self._nspawn is not None
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self._nspawn.poll() is None:
            with suppress(FileNotFoundError, ProcessLookupError):
                for child in children.read_text().split():
                    status = Path(f"/proc/{child}/status").read_text()
                    # Earlier children only prepare: they are not the first process of a PID namespace.
                    if status.startswith("Name:\tsystemd\n") and status.partition("NSpid:")[2].split("\n")[0].endswith(
                        "\t1"
                    ):
                        return int(child)
            time.sleep(0.01)
        raise LabError(f"{self.name} does not start:\n{self.console()}")

    def _wait_for_systemd(self) -> None:
        deadline = time.monotonic() + 120
        state = ""
        while time.monotonic() < deadline and self._nspawn is not None and self._nspawn.poll() is None:
            asked = self._communicate(["systemctl", "is-system-running", "--wait"], b"", timeout=120)
            state = asked.stdout.decode().strip()
            if state in {"running", "degraded"}:
                return
            time.sleep(0.02)  # systemd does not answer yet
        raise LabError(f"{self.name} does not come up, systemd says {state!r}:\n{self.console()}")

    def _end(self, verb: str, *, expected: int) -> None:
        assert self._nspawn is not None, f"{self.name} is off"
        self._communicate(["systemctl", verb], b"", timeout=60)
        status = self._nspawn.wait(timeout=120)
        self._run.kill(self.name)
        self._nspawn = None
        self.leader = 0
        if status != expected:
            raise LabError(f"{self.name}: {verb} ended with {status}, not {expected}:\n{self.console()}")


def difference(before: Mapping[str, Entry], after: Mapping[str, Entry], *, ignore: Iterable[str] = ()) -> list[str]:
    """Say in words what changed between two snapshots, one line each; no line means nothing.

    `ignore` are patterns of paths, `/var/log/*` for example.
    """
    lines = []
    patterns = list(ignore)
    for path in sorted(before.keys() | after.keys()):
        if any(fnmatch(path, pattern) for pattern in patterns):
            continue
        old, new = before.get(path), after.get(path)
        if old == new:
            continue
        if old is None and new is not None:
            lines.append(f"{path}: new {new.kind}, mode {new.mode}, owner {new.uid}:{new.gid}")
        elif new is None and old is not None:
            lines.append(f"{path}: {old.kind} removed")
        elif old is not None and new is not None:
            lines.append(f"{path}: {', '.join(_changes(old, new))}")
    return lines


def _changes(old: Entry, new: Entry) -> list[str]:
    # A file that was only touched is worth a word; beside another change its time says nothing more.
    names = [field.name for field in fields(Entry) if field.name != "written"]
    differing = [name for name in names if getattr(old, name) != getattr(new, name)]
    if not differing:
        return ["written again with the same content"]
    return [
        "other content"
        if name == "content" and new.kind == "file"
        else f"{name} {getattr(old, name)} is now {getattr(new, name)}"
        for name in differing
    ]


def _entry(file: Path, path: str) -> Entry:
    status = file.lstat()
    kind = _KINDS[stat.S_IFMT(status.st_mode)]
    is_file = kind == "file"
    content = ""
    if is_file:
        content = _sha256(file, path, status)
    elif kind == "link":
        content = str(file.readlink())
    return Entry(
        kind=kind,
        mode=f"{stat.S_IMODE(status.st_mode):04o}",
        uid=status.st_uid,
        gid=status.st_gid,
        size=status.st_size if is_file else 0,
        content=content,
        written=status.st_mtime_ns if is_file else 0,
    )


_digests: dict[tuple[str, int, int, int, int], str] = {}


def _sha256(file: Path, path: str, status: os.stat_result) -> str:
    # Most of a tree is the same in every machine. No program can set a change time (ctime), so a file with
    # the same inode and times as before has the same content.
    known_by = (path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if known_by not in _digests:
        with file.open("rb") as opened:
            _digests[known_by] = hashlib.file_digest(opened, "sha256").hexdigest()
    return _digests[known_by]
