"""Stateful stand-ins for what a fast test cannot have: they are passed in, and they remember.

`Endpoint` is a real HTTPS server on loopback with faults; `FakeMachine` is a real tree of files whose package
manager and systemd are pretended: installing makes the user and the folders, starting writes the log.
"""

import json
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from lab.cluster import Authority, Cluster
from vmmesh_agent.errors import AgentError, HostError, InstallError
from vmmesh_agent.host import Account, Completed, Host
from vmmesh_agent.packages import PackageFile

Answer = bytes | Callable[[socket.socket], None]


def http(status: str, body: bytes = b"", **headers: str) -> bytes:
    """Put an HTTP answer together; `headers` with _ for -."""
    lines = [f"HTTP/1.1 {status}", "Connection: close", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Endpoint:
    """A server that gives its answers one after the other, the last one for ever; it keeps what it was asked."""

    def __init__(self, context: ssl.SSLContext | None, answers: Sequence[Answer]) -> None:
        self._context = context
        self._answers = list(answers)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.requests: list[str] = []
        self.done = threading.Event()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}/v1/bundle"

    def header(self, name: str, number: int = 0) -> str | None:
        """Return a header of one request."""
        for line in self.requests[number].splitlines():
            key, _, value = line.partition(": ")
            if key.lower() == name.lower():
                return value
        return None

    @contextmanager
    def serving(self) -> Iterator["Endpoint"]:
        thread = threading.Thread(target=self._accept)
        thread.start()
        try:
            yield self
        finally:
            self.done.set()
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            thread.join()

    def _accept(self) -> None:
        workers = []
        while not self.done.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                break
            workers.append(threading.Thread(target=self._serve, args=(connection,)))
            workers[-1].start()
        for worker in workers:
            worker.join()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(120)
        with connection, suppress(OSError):
            secured = self._context.wrap_socket(connection, server_side=True) if self._context else connection
            with secured:
                request = b""
                while b"\r\n\r\n" not in request:
                    chunk = secured.recv(4096)
                    if not chunk:
                        return
                    request += chunk
                    if not self._context and not chunk.isascii():
                        break  # a TLS greeting, which a plain server answers at once
                self.requests.append(request.decode(errors="replace"))
                answer = self._answers[min(len(self.requests), len(self._answers)) - 1]
                if callable(answer):
                    answer(secured)
                else:
                    secured.sendall(answer)


def tls_of(
    cluster: Cluster,
    folder: Path,
    *,
    names: Sequence[str] = ("127.0.0.1",),
    shown: bytes = b"",
    ca: Authority | None = None,
    client_ca: bytes = b"",
    **dates: object,
) -> ssl.SSLContext:
    """Return a server's TLS: a certificate for `names`, `shown` behind it; clients of `client_ca` alone."""
    certificate, key = cluster.server_certificate(names, ca=ca, **dates)  # type: ignore[arg-type]  # dates are its own
    file = folder / "server.pem"
    file.write_bytes(certificate + shown + key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    if client_ca:
        context.load_verify_locations(cadata=client_ca.decode())
        context.verify_mode = ssl.CERT_REQUIRED
    return context


class Onlooker:
    """Sees the steps, and remembers what each said last."""

    def __init__(self) -> None:
        self.said: dict[str, str] = {}
        self.notes: list[str] = []
        self._step = ""

    @contextmanager
    def step(self, name: str) -> Iterator["Onlooker"]:
        self._step = name
        yield self

    def says(self, detail: str) -> None:
        self.said[self._step] = detail

    def progress(self, done: int, total: int | None) -> None:
        assert total is None or done <= total

    def retrying(self, trouble: AgentError) -> None:
        raise trouble

    def note(self, text: str) -> None:
        self.notes.append(text)

    def waiting(self) -> None:
        pass


def write_package(
    file: Path, *, name: str = "istio-sidecar", version: str = "1.28.2", arch: str = "amd64", size: int = 1
) -> Path:
    """Write a package that the pretended package managers understand; `size` in KiB."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"name": name, "version": version, "arch": arch, "size": size}))
    return file


class FakeManager:
    """A package manager that keeps what is installed, and whose package makes its user and a folder.

    Versions are compared number by number.
    """

    def __init__(
        self, host: Host, format_: str = "deb", *, architecture: str = "amd64", installed: str | None = None
    ) -> None:
        self.format = format_
        self.installations: list[PurePosixPath] = []
        self._host = host
        self._architecture = architecture
        self._installed: str | None = None
        if installed:
            self._set(installed)

    def _set(self, version: str) -> None:
        self._installed = version
        passwd = self._host.outside(PurePosixPath("/etc/passwd"))
        passwd.parent.mkdir(exist_ok=True)
        passwd.write_text("root:x:0:0::/root:/bin/sh\nistio-proxy:x:997:997::/var/lib/istio:/bin/sh\n")
        self._host.outside(PurePosixPath("/var/lib/istio/proxy")).mkdir(parents=True, exist_ok=True)

    def is_there(self) -> bool:
        return True

    def is_native(self) -> bool:
        return True

    def architecture(self) -> str:
        return self._architecture

    def installed(self, name: str) -> str | None:
        return self._installed if name == "istio-sidecar" else None

    def inspect(self, path: PurePosixPath) -> PackageFile:
        try:
            said = json.loads(self._host.read(path) or b"")
        except ValueError:
            raise InstallError(f"{path} is not a sound package", code="package-invalid") from None
        return PackageFile(said["name"], said["version"], said["arch"], said["size"] * 1024)

    def check(self, path: PurePosixPath) -> None:
        self.inspect(path)

    def is_newer(self, version: str, than: str) -> bool:
        return _numbers(version) > _numbers(than)

    def install(self, path: PurePosixPath) -> None:
        self.installations.append(path)
        self._set(self.inspect(path).version)

    def wait(self) -> None:
        pass

    def remove(self, name: str) -> None:
        assert self.installed(name)
        self._installed = None


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.replace("-", ".").split(".")]


class FakeMachine(Host):
    """A running machine: its files are real, in a tree; its dpkg and systemd are pretended, and keep their state."""

    UID = 997

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.version = ""
        self.active = "inactive"
        self.enabled = False
        self.starts = 0
        self.changes: list[str] = []  # the commands that changed something, and cluster.env as it was then
        self.environments: list[bytes | None] = []
        for folder in ("etc/certs", "run", "var/lib", "var/log", "usr/local/bin"):
            (root / folder).mkdir(parents=True)
        (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
        (root / "etc/hosts").write_text("127.0.0.1 localhost\n")
        (root / "var/run").symlink_to("/run")

    @property
    def is_running(self) -> bool:
        return True

    def account(self, name: str) -> Account | None:
        return Host(self.root).account(name)

    def has_program(self, name: str) -> bool:
        return name in {"dpkg", "dpkg-deb", "apt-get"}

    def answers(self, port: int, path: str, timeout: float) -> bool:
        return port > 0 and path.startswith("/") and timeout > 0 and self.active == "active"

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout: float = 60,
        check: bool = True,
        environment: Mapping[str, str] | None = None,
        input: bytes = b"",  # noqa: A002  # the name that Host gives it
        output_limit: int = 16 * 1024**2,
    ) -> Completed:
        assert timeout > 0
        assert output_limit > 0
        assert input == b""  # no command of the flow is told anything
        assert not environment or "LC_ALL" not in environment
        status, output = self._answer(list(argv))
        if check and status:
            raise HostError(f"`{' '.join(argv)}` failed with status {status}", code="command-failed", retry=True)
        return Completed(tuple(argv), status, output, "")

    def run_on(
        self, argv: Sequence[str], *, log: PurePosixPath, timeout: float, environment: Mapping[str, str] | None = None
    ) -> Completed:
        assert self.status(log.parent)
        return self.run(argv, timeout=timeout, check=False, environment=environment)

    def reboot(self) -> None:
        """Start anew: /run is empty, and istio.service starts where it is enabled."""
        for path in sorted((self.root / "run").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        self.active = "inactive"

    def _answer(self, argv: list[str]) -> tuple[int, str]:
        match argv:
            case ["dpkg", "--print-architecture"]:
                return 0, "amd64\n"
            case ["dpkg", "--compare-versions", one, "gt", other]:
                return int(_numbers(one) <= _numbers(other)), ""
            case ["dpkg-query", *_, "dpkg"]:
                return 0, "installed 1.21\n"
            case ["dpkg-query", *_, "istio-sidecar"]:
                return (0, f"installed {self.version}\n") if self.version else (1, "")
            case ["dpkg-deb", "--show", _, file]:
                said = json.loads(Path(file).read_text())
                return 0, f"{said['name']}\n{said['version']}\n{said['arch']}\n{said['size']}\n"
            case ["dpkg-deb", "--contents", file]:
                json.loads(Path(file).read_text())
                return 0, ""
            case ["apt-get", "install", *_, file]:
                return self._changed(argv[:2], self._install, json.loads(Path(file).read_text())["version"])
            case ["systemctl", "show", *_]:
                loaded = "loaded" if self.version else "not-found"
                sub = "running" if self.active == "active" else "dead"
                return 0, (
                    f"LoadState={loaded}\nActiveState={self.active}\nSubState={sub}\nMainPID=0\nNRestarts=0\n"
                    f"InvocationID={self.starts:032x}\n"
                )
            case ["systemctl", "is-enabled", _]:
                return (0, "enabled\n") if self.enabled else (1, "disabled\n")
            case ["systemctl", "daemon-reload"]:
                return 0, ""
            case ["systemctl", "start" | "stop", "--no-block", "vmmesh-ready.target"]:
                return 0, ""
            case ["systemctl", "enable" | "disable" | "start" | "stop" as verb, *_]:
                return self._changed(argv[:2], self._do, verb)
            case ["dpkg", "--purge", "istio-sidecar"]:
                return self._changed(argv[:2], self._remove, "")
            case ["userdel", "istio-proxy"]:
                return self._changed(argv[:2], self._remove_user, "istio-proxy")
            case ["journalctl", *_]:
                return 0, "-- cursor: s=1\n"
            case ["getent" | "iptables" | "ip6tables" | "timedatectl" | "ss", *_]:
                return 2, ""
        raise AssertionError(f"the fake machine does not know {argv}")

    def _changed(self, words: list[str], do: Callable[[str], None], what: str) -> tuple[int, str]:
        self.changes.append(" ".join(words))
        self.environments.append(self.read(PurePosixPath("/var/lib/istio/envoy/cluster.env")))
        do(what)
        return 0, ""

    def _install(self, version: str) -> None:
        self.version = version
        tree = self.root
        if "istio-proxy" not in (tree / "etc/passwd").read_text():
            with (tree / "etc/passwd").open("a") as file:
                file.write(f"istio-proxy:x:{self.UID}:{self.UID}::/var/lib/istio:/bin/false\n")
        for folder in ("var/lib/istio/envoy", "var/lib/istio/proxy", "var/lib/istio/config", "var/log/istio"):
            (tree / folder).mkdir(parents=True, exist_ok=True)
            os.chown(tree / folder, self.UID, self.UID)
        if not (tree / "etc/istio").is_symlink():
            (tree / "etc/istio").symlink_to("/var/lib/istio")
        (tree / "lib/systemd/system").mkdir(parents=True, exist_ok=True)
        (tree / "lib/systemd/system/istio.service").touch()

    def _remove(self, _: str) -> None:
        self.version = ""
        (self.root / "lib/systemd/system/istio.service").unlink()

    def _remove_user(self, name: str) -> None:
        passwd = self.root / "etc/passwd"
        kept = [line for line in passwd.read_text().splitlines(keepends=True) if not line.startswith(f"{name}:")]
        passwd.write_text("".join(kept))

    def _do(self, verb: str) -> None:
        if verb in {"enable", "disable"}:
            self.enabled = verb == "enable"
        elif verb == "stop":
            self.active = "inactive"
        else:
            self.active = "active"
            self.starts += 1
