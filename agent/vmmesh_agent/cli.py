"""vmmesh-agent on the command line: the only print, the only exit code.

What a command needs is imported by it, so that `status` starts as fast as Python itself allows.
"""

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NoReturn

from vmmesh_agent import __version__
from vmmesh_agent.errors import AgentError, UsageError
from vmmesh_agent.health import State
from vmmesh_agent.host import Host, meaning_of

if TYPE_CHECKING:
    from vmmesh_agent.bundle import Bundle
    from vmmesh_agent.config import Config
    from vmmesh_agent.report import Report
    from vmmesh_agent.verify import VerifiedBundle
    from vmmesh_agent.world import World

_DEFAULT_TIMEOUT = 300.0  # of a join, until the sidecar starts
_SOURCES = ("kernel", "ec2", "aliyun", "gce", "azure")  # as in instance.CLOUDS, which `status` need not import
_JOIN_UNDONE = "join_undone"  # the condition that outlives the command which told it
_RESTORE_SECONDS = 30.0  # its unit has a minute
_LOOK_SECONDS = 0.5
_LOCK_SECONDS = 70.0  # the daemon has the lock during an attempt, which asks the endpoint for up to a minute


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGHUP, _end)  # the terminal is gone; the daemon takes another meaning
    try:
        options = parser().parse_args(argv)
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except AgentError as error:
        _complain(error)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # what no step could foresee: no descriptor left to load a module with, say
        _complain(meaning_of(error, PurePosixPath(error.filename or "this machine")))
        return 1


def _end(number: int, _frame: object) -> NoReturn:
    """End at once, children with us but for a package manager; what was begun, the next start finishes."""
    raise SystemExit(128 + number)


# --- commands ---


def _run(options: argparse.Namespace) -> int:
    from vmmesh_agent import log, notify
    from vmmesh_agent.daemon import Daemon, wait_for_configuration

    host = Host(options.root, beat=notify.alive)
    logger = log.logger()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # there is nothing to reload yet
    try:
        daemon = Daemon(host, wait_for_configuration(host, lambda: _config(options, host), logger), logger)

        def reload(_signal: int, _frame: object) -> None:
            try:
                daemon.reload(_config(options, host))
            except AgentError as error:
                logger.warning("the configuration was not reloaded", code=error.code, message=error.message)

        signal.signal(signal.SIGHUP, reload)
        daemon.run()
    except SystemExit:  # SIGTERM: what a daemon is asked to do is no failure
        notify.stopping()
    return 0


def _bootstrap(options: argparse.Namespace) -> int:
    from vmmesh_agent import report, trial
    from vmmesh_agent.reconcile import reconcile, settle
    from vmmesh_agent.report import Known
    from vmmesh_agent.watch import Watch, describe
    from vmmesh_agent.world import LOCK, World

    host, terminal, patience = Host(options.root), _Terminal(), options.timeout or _DEFAULT_TIMEOUT
    config = _config(options, host)
    if options.dry_run:
        return _preview(World(host, config, terminal, patience=patience))
    host.require_root("joining the mesh")
    with host.lock(LOCK, min(_LOCK_SECONDS, patience), terminal.note):
        world = World(host, config, terminal, patience=patience)
        watch = Watch(host, world.units)
        trouble: AgentError | None = None
        joined = None
        try:
            joined = reconcile(world, watch, again=options.again)
            if host.is_running:
                # A wait that a person cut short proves nothing against what is on trial.
                limit = world.config.healthy_within
                time_left = limit if options.timeout is None else min(limit, world.left() or 0.0)
                health = settle(world, watch, joined.known, time_left)
                if trial.conclude(world, watch, health, is_time_up=time_left >= limit):
                    trial.conclude(world, watch, settle(world, watch, joined.known, limit), is_time_up=True)
        except AgentError as error:
            trouble = error
            with suppress(AgentError):  # the first reason is the one to tell; the journal has the rest
                trial.undo_half_done(world)
        before = report.load(host)
        known = joined.known if joined else before.known if before else Known()
        current = describe(
            watch.observe(_now(), known),
            known=known,
            before=before,
            also=trial.standing(host),
            trouble=trouble,
            moment=_now(),
            by_daemon=False,
        )
        if not _is_fresh(before, _now()):  # the daemon's record, where there is one, is the daemon's to write
            report.save(host, current)
    if trouble:
        raise trouble
    print()
    if not host.is_running:
        print(f"All is in place in {host.root}; the sidecar starts on the machine that boots from it.")
        return 0
    _show(current)
    return current.health.state.exit_status


def _preview(world: "World") -> int:
    from vmmesh_agent.reconcile import preview

    bundle, package, changes = preview(world)
    print(f"\nThe bundle for {bundle.workload} is sound. `bootstrap` would:")
    print(f"  {package}" if package.source else f"  leave the package alone: {package}")
    for change in changes:
        print(f"  {change.path}: {change.what}")
    for change in changes:
        if diff := change.diff():
            print(f"\n{diff}")
    if not changes:
        print("  change no file")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from vmmesh_agent import place
    from vmmesh_agent.bundle import BundleRefusedError
    from vmmesh_agent.verify import verify

    _refuse_tree(options)
    host = Host()
    try:
        bundle = verify(
            _read_bundle(host, options.bundle),
            _now(),
            resolves=lambda name: place.resolves(host, name),
            host_name=host.name,
        )
    except BundleRefusedError as refused:
        if options.output == "json":
            _print_json(
                {
                    "schema": "vmmesh.verify/v1",
                    "accepted": False,
                    "problems": [
                        {"code": each.code, "file": each.file, "message": each.message, "remedy": each.hint}
                        for each in refused.problems
                    ],
                }
            )
            return refused.exit_status
        raise
    if options.write:
        _write_files(options.write, bundle)
    if options.output == "json":
        _print_json({"schema": "vmmesh.verify/v1", "accepted": True, "problems": [], **_described(bundle)})
    else:
        print("accepted")
        for name, fact in _described(bundle).items():
            print(f"  {name:<18}{', '.join(fact) if isinstance(fact, list) else fact}")
    return 0


def _restore(options: argparse.Namespace) -> int:
    from vmmesh_agent.reconcile import is_whole, restore
    from vmmesh_agent.world import LOCK, STARTING

    host = Host(options.root)
    host.require_root("restoring the files")
    patience = time.monotonic() + _RESTORE_SECONDS
    while True:
        try:
            with host.lock(LOCK, _LOOK_SECONDS):
                restore(host, _Terminal())
                return 0
        except AgentError as error:
            if error.code != "locked" or time.monotonic() >= patience:
                raise
            # It precedes each start of the sidecar, those of `bootstrap` and of the daemon too, which wait for it with
            # the files in place. Who is still at them, or failed at them, lets go of the lock soon.
            if host.status(STARTING) or is_whole(host):
                print(f"vmmesh-agent: {error.message}, and has seen to the files itself", file=sys.stderr)
                return 0


def _leave(options: argparse.Namespace) -> int:
    from vmmesh_agent import report
    from vmmesh_agent.leave import leave, stop_daemon
    from vmmesh_agent.world import LOCK

    host, progress = Host(options.root), _Terminal()
    host.require_root("leaving the mesh")
    stop_daemon(host, progress, for_good=True)
    with host.lock(LOCK, _LOCK_SECONDS, progress.note):
        leave(host, progress, purge=options.purge)
        if not options.purge:
            host.remove(report.FILE)
    again = "Give it a new join token; then " if options.purge else ""
    print(f"\nThis VM has left the mesh. {again}`systemctl enable --now vmmesh-agent` joins it again.")
    return 0


def _image_clean(options: argparse.Namespace) -> int:
    from vmmesh_agent import image
    from vmmesh_agent.leave import stop_daemon
    from vmmesh_agent.world import LOCK

    host, progress = Host(options.root), _Terminal()
    host.require_root("cleaning a machine for an image")
    image.refuse_a_chroot(host)
    _, documents = _documents(options, host)
    named = image.named(documents)
    stop_daemon(host, progress, for_good=False)
    with host.lock(LOCK, _LOCK_SECONDS, progress.note):
        image.clean(host, named, progress)
    print("\nA machine that boots from this disk joins as itself, once it is configured and has a credential.")
    if others := list(image.others(host)):
        print("Not the agent's, and left to whoever makes the image:")
        for each in others:
            print(f"  {each}")
    return 0


def _status(options: argparse.Namespace) -> int:
    host = Host(options.root)
    while True:
        current = _current(host)
        if options.watch:
            print("\x1b[H\x1b[J" if sys.stdout.isatty() else "", end="")
        status = _print_status(current, options.output)
        if not options.watch:
            return status
        sys.stdout.flush()
        time.sleep(2)


def _print_status(current: "Report", output: str) -> int:
    from vmmesh_agent import render

    if output == "json":
        _print_json(current.as_dict())
    elif output == "prometheus":
        print(render.prometheus(current), end="")
    elif output == "nagios":
        line, status = render.nagios(current, _now())
        print(line)
        return status
    else:
        _show(current)
    return current.health.state.exit_status


def _wait(options: argparse.Namespace) -> int:
    host = Host(options.root)
    deadline = None if options.timeout is None else time.monotonic() + options.timeout
    while True:
        current = _current(host)
        if current.health.state == options.state:
            return 0
        if not (host.is_running or _is_fresh(current, _now())):
            raise UsageError(
                f"nothing runs in {host.root}: it will stay {current.health.state}",
                code="not-running",
                hint="ask on the machine that boots from it",
            )
        if deadline is not None and time.monotonic() >= deadline:
            print(f"vmmesh-agent: still {current.health.state} after {options.timeout:g} s", file=sys.stderr)
            return current.health.state.exit_status or 1
        time.sleep(0.5)


def _explain(options: argparse.Namespace) -> int:
    from vmmesh_agent import render, report
    from vmmesh_agent.diagnosis import Diagnosis
    from vmmesh_agent.records import Stream

    _refuse_tree(options)
    diagnosis = Diagnosis()
    for name in options.files:
        stream = Stream(options.stream or ("err" if name.endswith("err.log") else "log"))
        for chunk in _chunks(name):
            diagnosis.feed(chunk, stream)
        diagnosis.end()
    health = diagnosis.health(None)
    if options.output == "json":
        _print_json({"schema": report.SCHEMA, **report.health_as_dict(health)})
    else:
        print(render.human_health(health, width=_width(), colour=_in_colour()), end="")
    return health.state.exit_status


def _logs(options: argparse.Namespace) -> int:
    from collections import deque

    from vmmesh_agent import follow
    from vmmesh_agent.records import Stream

    host = Host(options.root)
    streams = list(Stream) if options.stream == "all" else [Stream(options.stream)]
    if Stream.JOURNAL in streams and not host.is_root:
        print("vmmesh-agent: the journal shows what it has of istio.service to root only", file=sys.stderr)
    draw = follow.painted if _in_colour() else (lambda line: line.text)
    logs, story = follow.Logs(host, streams), follow.Story(_width())
    past = [*story.tell(logs.read(_now()))]
    if logs.trouble:
        print(f"vmmesh-agent: without the journal: {logs.trouble}", file=sys.stderr)
    past += story.pause(_now()) if options.follow else story.end(_now())
    if not past and not options.follow:
        print("vmmesh-agent: these logs hold nothing of note", file=sys.stderr)
    for line in deque(past, options.lines):
        print(draw(line))
    while options.follow:
        sys.stdout.flush()
        time.sleep(0.5)
        for line in (*story.tell(logs.read(_now())), *story.pause(_now())):
            print(draw(line))
    logs.close()
    return 0


def _collect_logs(options: argparse.Namespace) -> int:
    from vmmesh_agent import support

    host = Host(options.root)
    host.require_root("collecting what support needs")
    moment = _now()
    name = support.archive_name(host, moment)
    target = options.tarfile or Path(f"{name}.tar.gz")
    # Before anything is collected: a file that is there, or a link, is left alone.
    descriptor = _new_private_file(target)
    try:
        collected = support.collect(host, PurePosixPath(options.config.absolute()) if options.config else None)
        with open(descriptor, "wb") as file:  # noqa: PTH123  # a descriptor, not a path
            file.write(support.packed(name, collected, moment))
    except BaseException:
        target.unlink()
        raise
    print(f"wrote {target}: {len(collected.members)} files, secrets left out")
    for missing, reason in collected.missing.items():
        print(f"  without {missing}: {reason}")
    return 0


def _new_private_file(path: Path) -> int:
    from vmmesh_agent.errors import HostError

    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(
            f"{path}: {error.strerror}", code="file-not-written", hint="name a file that does not exist yet: --tarfile"
        ) from None


def _doctor(options: argparse.Namespace) -> int:
    from vmmesh_agent import doctor

    host = Host(options.root)
    config, trouble = None, None
    try:
        config = _config(options, host)
    except AgentError as error:  # a row among the others
        trouble = error
    rows = []
    for row in doctor.examine(doctor.Patient(host, config, trouble, _now())):
        rows.append(row)
        if options.output == "human" and row.result is not doctor.Result.NOT_APPLICABLE:
            print(doctor.human(row, width=_width(), colour=_in_colour()), flush=True)
    if options.output == "json":
        _print_json({"schema": doctor.SCHEMA, "checks": [row.as_dict() for row in rows]})
    else:
        print(f"\n{doctor.summary(rows)}")
    return doctor.exit_status(rows, trouble)


def _check_config(options: argparse.Namespace) -> int:
    from dataclasses import fields, is_dataclass

    def settings(value: object, prefix: str) -> Iterator[str]:
        if is_dataclass(value):
            for field in fields(value):
                yield from settings(getattr(value, field.name), f"{prefix}.{field.name}" if prefix else field.name)
        elif value not in (None, "", ()):
            shown = list(value) if isinstance(value, tuple) else value
            # A presigned address has its credential in the query.
            address, query, _ = str(shown).partition("?")
            yield f"{prefix}: {str(shown).lower() if isinstance(shown, bool) else address + ('?…' if query else '')}"

    for line in settings(_config(options, Host(options.root)), ""):
        print(line)
    return 0


def _configure(options: argparse.Namespace) -> int:
    from vmmesh_agent import instance

    host = Host(options.root)
    _, documents = _documents(options, host)
    others = [(path, content) for path, content in documents if path != instance.FILE]
    if instance.configure(host, instance.CLOUDS.get(options.source), others):
        print(f"wrote {instance.FILE}")
    else:
        print(f"nothing for vmmesh-agent was given to this instance ({options.source})")
    return 0


# --- what several commands need ---


def _refuse_tree(options: argparse.Namespace) -> None:
    """Refuse --root where a command has nothing to do with another tree."""
    if options.root != Path("/"):
        raise UsageError(
            "this command works on the running machine alone", code="root-not-possible", hint="leave --root out"
        )


def _config(options: argparse.Namespace, host: Host) -> "Config":
    from vmmesh_agent import config
    from vmmesh_agent.errors import ConfigurationError

    paths, documents = _documents(options, host)
    if not documents:
        raise ConfigurationError(
            f"{paths[0]} is not there", code="configuration-missing", hint="write it; it needs at least endpoint.url"
        )
    return config.parse(documents)


def _documents(
    options: argparse.Namespace, host: Host
) -> tuple[list[PurePosixPath], list[tuple[PurePosixPath, bytes]]]:
    """Return where the configuration may be, and those of its files that are there."""
    from vmmesh_agent import config

    if options.config:
        paths = [PurePosixPath(options.config.absolute())]
    else:
        drop_ins = [config.FOLDER / name for name in host.names_in(config.FOLDER) if name.endswith(".yaml")]
        paths = [config.FILE, *drop_ins]
    contents = [(path, host.read(path)) for path in paths]
    return paths, [(path, content) for path, content in contents if content is not None]


def _current(host: Host) -> "Report":
    """Return the daemon's record where it is fresh, else look for ourselves."""
    from vmmesh_agent import report

    before = report.load(host)
    moment = _now()
    if before and _is_fresh(before, moment):
        return before
    from vmmesh_agent.units import Units
    from vmmesh_agent.watch import Watch, describe

    last = (before.unit.invocation, before.health) if before else None
    known = before.known if before else report.Known()
    observation = Watch(host, Units(host), known=last, follows=False).observe(moment, known)
    is_out = observation.health.state is State.NOT_JOINED
    last_word = [each for each in before.health.conditions if each.code == _JOIN_UNDONE] if before and is_out else []
    return describe(
        observation, known=known, before=before, also=last_word, trouble=None, moment=moment, by_daemon=False
    )


def _is_fresh(record: "Report | None", moment: datetime) -> bool:
    """Is this the record of a daemon that runs?"""
    from vmmesh_agent import report

    age = (moment - record.updated_at).total_seconds() if record and record.by_daemon else -1.0
    return 0 <= age < report.FRESH_SECONDS


def _show(current: "Report") -> None:
    from vmmesh_agent import render

    print(render.human(current, _now(), width=_width(), colour=_in_colour()), end="")


def _read_bundle(host: Host, name: str) -> "Bundle":
    from vmmesh_agent import bundle
    from vmmesh_agent.fetch import read_bundle

    if name == "-":
        return bundle.unpack(sys.stdin.buffer.read(bundle.MAX_BYTES + 1))
    return read_bundle(host, PurePosixPath(Path(name).resolve()))


def _write_files(folder: Path, bundle: "VerifiedBundle") -> None:
    from vmmesh_agent.errors import HostError

    contents = {
        "root-cert.pem": (bundle.root_cert, 0o644),
        "istio-token": (bundle.token.reveal().encode(), 0o600),
        "cluster.env": (bundle.cluster_env, 0o644),
        "mesh.yaml": (bundle.mesh, 0o644),
        "hosts": ("".join(f"{line}\n" for line in bundle.hosts).encode(), 0o644),
    }
    try:
        folder.mkdir(parents=True)
        for name, (content, mode) in contents.items():
            file = folder / name
            file.touch(0o600, exist_ok=False)
            file.write_bytes(content)
            file.chmod(mode)
    except OSError as error:
        raise HostError(
            f"{folder}: {error.strerror}", code="folder-not-written", hint="name a folder that does not exist yet"
        ) from None


def _described(bundle: "VerifiedBundle") -> dict[str, str | list[str]]:
    return {
        "workload": str(bundle.workload),
        "discovery": bundle.discovery,
        "hosts": [str(line) for line in bundle.hosts],
        "token_expires_at": f"{bundle.token_expires_at:%Y-%m-%dT%H:%M:%SZ}",
        "sidecar": bundle.sidecar.version if bundle.sidecar else "",
        "notes": list(bundle.notes),
    }


def _chunks(name: str) -> Iterator[bytes]:
    from vmmesh_agent.errors import HostError

    try:
        with sys.stdin.buffer if name == "-" else Path(name).open("rb") as file:
            while chunk := file.read(1024**2):
                yield chunk
    except OSError as error:
        raise HostError(f"{name}: {error.strerror}", code="file-unreadable") from None


class _Terminal:
    """The steps as a person at a terminal wants to see them, each with its time."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()

    @contextmanager
    def step(self, name: str) -> "Iterator[_TerminalStep]":
        begin = time.monotonic()
        step = _TerminalStep(name, begin, self._is_terminal)
        step.draw("…")
        try:
            yield step
        except BaseException:
            step.end("failed")
            raise
        step.end(step.detail)

    def retrying(self, trouble: AgentError) -> None:
        self.note(f"{trouble.message}; trying again")

    def waiting(self) -> None:
        """A person sees that already."""

    def note(self, text: str) -> None:
        _say(f"\r\x1b[K         {text}\n" if self._is_terminal else f"         {text}\n")


class _TerminalStep:
    def __init__(self, name: str, begin: float, is_terminal: bool) -> None:
        self.detail = ""
        self._name = name
        self._begin = begin
        self._is_terminal = is_terminal

    def says(self, detail: str) -> None:
        self.detail = detail
        self.draw(detail)

    def progress(self, done: int, total: int | None) -> None:
        if total:
            filled = min(20, 20 * done // total)
            self.draw(f"[{'#' * filled}{'.' * (20 - filled)}] {done // 1024**2} of {total // 1024**2} MiB")
        else:
            self.draw(f"{done // 1024**2} MiB")

    def draw(self, text: str) -> None:
        """Show what is going on, where there is a terminal to redraw."""
        if self._is_terminal:
            _say(f"\r\x1b[K{self._line(text)[: _width() - 1]}")

    def end(self, text: str) -> None:
        _say(f"\r\x1b[K{self._line(text)}\n" if self._is_terminal else f"{self._line(text)}\n")

    def _line(self, text: str) -> str:
        return f"{self._name:<8} {time.monotonic() - self._begin:5.1f} s  {text}"


def _say(text: str) -> None:
    """Write to the terminal. That nobody reads it, or that its file is full, is no reason to stop half-way."""
    with suppress(OSError):
        print(text, end="", flush=True)


def _complain(error: AgentError) -> None:
    print(f"vmmesh-agent: {error.message} [{error.code}]", file=sys.stderr)
    for line in error.hint.splitlines():
        print(f"  → {line}", file=sys.stderr)


def _print_json(document: object) -> None:
    import json

    print(json.dumps(document, indent=2, ensure_ascii=True))


def _now() -> datetime:
    return datetime.now(UTC)


def _width() -> int:
    return max(40, min(120, shutil.get_terminal_size((80, 24)).columns))


def _in_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


# --- the command line ---


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, code="usage", hint=f"see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """The whole command line; the man page and the completions are made of it."""
    program = _Parser(
        prog="vmmesh-agent",
        description="Puts this virtual machine into an Istio mesh and keeps it there.",
        epilog="Exit status of status, bootstrap, wait and explain: 0 healthy, 1 failed, 2 degraded, 3 starting,"
        " stopped or not joined, 4 unknown. All commands: 64 usage, 77 not permitted, 78 configuration.",
    )
    program.add_argument("--version", action="version", version=f"vmmesh-agent {__version__}")
    program.add_argument("--root", type=Path, default=Path("/"), metavar="DIR", help="work on another tree")
    program.add_argument(
        "--config", type=Path, metavar="FILE", help="read this file (in DIR) instead of /etc/vmmesh-agent"
    )
    commands = program.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[argparse.Namespace], int], help_text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help_text, description=help_text)
        added.set_defaults(command=function)
        return added

    command("run", _run, "the daemon: join the mesh and stay in it")
    bootstrap = command("bootstrap", _bootstrap, "join the mesh once, in the foreground")
    bootstrap.add_argument("--dry-run", action="store_true", help="show what would change, and change nothing")
    bootstrap.add_argument(
        "--timeout",
        type=_seconds,
        metavar="S",
        help="for all of it (default: 300 until the sidecar starts, and then healthy_within)",
    )
    bootstrap.add_argument("--again", action="store_true", help="try a bundle again that was given up")
    verify = command("verify", _verify, "judge a bundle without touching the machine")
    verify.add_argument("--output", choices=["human", "json"], default="human")
    verify.add_argument("--write", type=Path, metavar="DIR", help="put the files into this new folder")
    verify.add_argument("bundle", metavar="BUNDLE", help="a folder, an archive, a JSON or Secret file, or -")
    command("restore", _restore, "put the files of the last verified bundle back, without network")
    status = command("status", _status, "say how this VM is, and why")
    status.add_argument("--output", choices=["human", "json", "prometheus", "nagios"], default="human")
    status.add_argument("--watch", action="store_true", help="show it again and again")
    wait = command("wait", _wait, "wait until a state is reached")
    wait.add_argument("--for", dest="state", type=State, choices=list(State), default=State.HEALTHY, metavar="STATE")
    wait.add_argument("--timeout", type=_seconds, metavar="S", help="give up after so many seconds")
    explain = command("explain", _explain, "say what sidecar logs mean")
    explain.add_argument("--stream", choices=["log", "err", "journal"], help="what the files are (default: by name)")
    explain.add_argument("--output", choices=["human", "json"], default="human")
    explain.add_argument("files", nargs="+", metavar="FILE", help="log files, or - for standard input")
    logs = command("logs", _logs, "show the lines of the sidecar's logs that matter, each condition explained")
    logs.add_argument("--follow", action="store_true", help="go on with what is written from now on")
    logs.add_argument("--lines", type=_count, default=200, metavar="N", help="of the past (default: 200)")
    logs.add_argument("--stream", choices=["log", "err", "journal", "all"], default="all")
    collect = command("collect-logs", _collect_logs, "write an archive for support, without secrets")
    collect.add_argument("--tarfile", type=Path, metavar="FILE", help="a new file (default: here, by host and time)")
    doctor = command("doctor", _doctor, "check this machine, its endpoint and its sidecar; changes nothing")
    doctor.add_argument("--output", choices=["human", "json"], default="human")
    leave = command("leave", _leave, "take this VM out of the mesh, and leave it as it was found")
    leave.add_argument("--purge", action="store_true", help="the package that the agent installed, and its state, too")
    command("image-clean", _image_clean, "make this machine fit to become an image: no identity, no token, no state")
    command("check-config", _check_config, "validate the configuration and print what is in force")
    configure = command("configure", _configure, "take the configuration from the kernel command line or the cloud")
    configure.add_argument("source", metavar="SOURCE", choices=_SOURCES, help=f"one of {', '.join(_SOURCES)}")
    return program


def _count(text: str) -> int:
    count = int(text)
    if not 0 <= count < 1_000_000:
        raise ValueError
    return count


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise argparse.ArgumentTypeError(f"expected seconds, found {text!r}")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
