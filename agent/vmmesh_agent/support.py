"""An archive for support: what a stranger needs to understand this machine, and no secret.

Secrets are kept out three times. What is known to hold one is read for something else (the token for its claims) or
not at all (keys); configuration is shown setting by setting; and whatever is written is searched for the exact
secrets of this machine, in the encodings that programs give them, and for what looks like one.

Everything is bounded: each command in time, each member and the whole in size.
"""

import base64
import gzip
import hashlib
import io
import json
import platform
import re
import ssl
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any, ParamSpec
from urllib.parse import urlsplit, urlunsplit

from vmmesh_agent import __version__, config, credential, store, strict
from vmmesh_agent.bundle import TOKEN as TOKEN_FILE
from vmmesh_agent.errors import AgentError
from vmmesh_agent.host import Host, LogFile
from vmmesh_agent.secret import Secret
from vmmesh_agent.signals import CERT_CHAIN, KEY, LOG_FOLDER, ROOT_CERT, SIDECAR_ENV, TOKEN
from vmmesh_agent.units import ISTIO

_P = ParamSpec("_P")

SCHEMA = "vmmesh.support/v1"

_MEMBER_BYTES = 2 * 1024**2  # a longer one is cut: logs keep their end, all else its beginning
_TOTAL_BYTES = 32 * 1024**2  # before compression
_COMMAND_SECONDS = 10
_ALL_SECONDS = 120  # then the commands that are left are left out
_JOURNAL_LINES = 5000
_LOG_FILES = 12

_MASK = b"(secret)"
_SHORTEST_SECRET = 6  # characters; to look for less would mask half of the archive

_AGENT = "vmmesh-agent.service"
_RESTORE = "vmmesh-agent-restore.service"
_PACKAGES = ("istio-sidecar", "vmmesh-agent")
_SELF = (sys.executable, "-P", "-m", "vmmesh_agent.cli")
_JOURNAL = ("journalctl", f"--lines={_JOURNAL_LINES}", "--no-pager", "--quiet", "--output=short-iso-precise", "--unit")

# Member → command; its standard output, then what it said of errors.
_COMMANDS: Mapping[str, tuple[str, ...]] = {
    "status.json": (*_SELF, "status", "--output", "json"),
    "doctor.json": (*_SELF, "doctor", "--output", "json"),
    "systemd/version.txt": ("systemctl", "--version"),
    "systemd/units.txt": ("systemctl", "cat", "--no-pager", ISTIO, _AGENT, _RESTORE, "vmmesh-ready.target"),
    "systemd/show.txt": ("systemctl", "show", "--no-pager", ISTIO, _AGENT, _RESTORE, "vmmesh-ready.target"),
    "systemd/status.txt": ("systemctl", "status", "--no-pager", "--full", "--lines=20", ISTIO, _AGENT, _RESTORE),
    "systemd/failed.txt": ("systemctl", "list-units", "--failed", "--no-pager", "--plain"),
    "journal/istio.txt": (*_JOURNAL, ISTIO),
    "journal/vmmesh-agent.txt": (*_JOURNAL, _AGENT),
    "journal/vmmesh-agent-restore.txt": (*_JOURNAL, _RESTORE),
    "network/iptables-save.txt": ("iptables-save",),
    "network/ip6tables-save.txt": ("ip6tables-save",),
    "network/addresses.txt": ("ip", "address"),
    "network/routes.txt": ("ip", "route", "show", "table", "all"),
    "network/routes-v6.txt": ("ip", "-6", "route", "show", "table", "all"),
    "network/sockets.txt": ("ss", "--listening", "--tcp", "--udp", "--numeric", "--processes"),
    "machine/kernel.txt": ("uname", "-a"),
    "machine/time.txt": ("timedatectl", "show"),
    "machine/disks.txt": ("df", "-h"),
    "machine/memory.txt": ("free", "-m"),
    "packages/rpm.txt": ("rpm", "-qi", *_PACKAGES),
    "packages/rpm-changed.txt": ("rpm", "-V", *_PACKAGES),
    "packages/dpkg.txt": ("dpkg", "--status", *_PACKAGES),
    "packages/dpkg-changed.txt": ("dpkg", "--verify", *_PACKAGES),
}
_ENDS = ("journal/", "logs/")  # members of which the end counts

# Member → where it may be: the first of these that is a plain file. Distributions make links of some.
_FILES: Mapping[str, tuple[str, ...]] = {
    "machine/os-release": ("/etc/os-release", "/usr/lib/os-release"),
    "machine/hosts": ("/etc/hosts",),
    "machine/resolv.conf": (
        "/etc/resolv.conf",
        "/run/systemd/resolve/stub-resolv.conf",
        "/run/systemd/resolve/resolv.conf",
        "/run/NetworkManager/resolv.conf",
        "/run/resolvconf/resolv.conf",
    ),
    "machine/nsswitch.conf": ("/etc/nsswitch.conf",),
    "sidecar/cluster.env": ("/var/lib/istio/envoy/cluster.env",),
    "sidecar/sidecar.env": (str(SIDECAR_ENV),),
    "sidecar/mesh.yaml": ("/etc/istio/config/mesh",),
    "agent/status-record.json": ("/run/vmmesh-agent/status.json",),
}


@dataclass(slots=True)
class Collected:
    """Members by their name, what could not be had (by name, with the reason), and facts about members."""

    members: dict[str, bytes] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)


def archive_name(host: Host, moment: datetime) -> str:
    """Return the name of the archive without its suffix: host and time."""
    name = re.sub(r"[^A-Za-z0-9.-]", "_", host.name)
    return f"vmmesh-{name}-{moment.astimezone(UTC):%Y%m%dT%H%M%SZ}"


def collect(host: Host, config_file: PurePosixPath | None = None) -> Collected:
    """Collect everything. `config_file` is read in place of those in /etc/vmmesh-agent.

    Never raises because something cannot be had: that is what `Collected.missing` is for.
    """
    files = _config_files(host, config_file)
    return _Collector(host, files, _Scrubber(_secrets(host, files))).collect()


def packed(name: str, collected: Collected, moment: datetime) -> bytes:
    """Return the tar.gz: one folder of this name, with manifest.json in it."""
    manifest = {
        "schema": SCHEMA,
        "created_at": f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "members": [
            {
                "name": member,
                "size": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                **collected.facts.get(member, {}),
            }
            for member, content in sorted(collected.members.items())
        ],
        "missing": [{"name": member, "reason": reason} for member, reason in sorted(collected.missing.items())],
    }
    contents = {"manifest.json": _as_json(manifest), **dict(sorted(collected.members.items()))}
    target = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=target, mode="wb", mtime=moment.timestamp()) as compressed,
        tarfile.open(fileobj=compressed, mode="w") as archive,
    ):
        for member, content in contents.items():
            entry = tarfile.TarInfo(f"{name}/{member}")
            entry.size, entry.mode, entry.mtime = len(content), 0o600, int(moment.timestamp())
            archive.addfile(entry, io.BytesIO(content))
    return target.getvalue()


class _Collector:
    def __init__(self, host: Host, config_files: Mapping[PurePosixPath, bytes], scrubber: "_Scrubber") -> None:
        self._host = host
        self._config_files = config_files
        self._scrubber = scrubber
        self._collected = Collected()
        self._total = 0
        self._deadline = time.monotonic() + _ALL_SECONDS

    def collect(self) -> Collected:
        self._add("versions.json", _as_json(_versions()))
        for path, content in self._config_files.items():
            folder = "configuration/config.d" if path.parent == config.FOLDER else "configuration"
            self._try(f"{folder}/{path.name}.json", _shown_config, content)
        for member, paths in _FILES.items():
            self._try(member, self._first_of, *paths)
        self._try("sidecar/token.json", self._claims)
        for member, path in (("sidecar/root-cert.pem", ROOT_CERT), ("sidecar/cert-chain.pem", CERT_CHAIN)):
            self._try(member, self._certificates, path)
        for path in self._logs():
            self._try(f"logs/{path.name}", self._tail, path)
        for member, argv in _COMMANDS.items():
            if self._host.is_running:
                self._try(member, self._run, member, *argv)
            else:
                self._miss(member, "this tree is not the machine that we run on")
        return self._collected

    def _try(self, member: str, get: Callable[_P, bytes], *what: _P.args, **named: _P.kwargs) -> None:
        try:
            content = get(*what, **named)
        except AgentError as error:
            self._miss(member, error.message)
        except _NotToBeHadError as error:
            self._miss(member, str(error))
        else:
            self._add(member, content)

    def _miss(self, member: str, reason: str) -> None:
        self._collected.missing[member] = self._scrubber.scrub(reason.encode()).decode(errors="replace")

    def _add(self, member: str, content: bytes) -> None:
        """Take a member, scrubbed first and then cut: half a secret would not be found."""
        content = self._scrubber.scrub(content)
        if len(content) > _MEMBER_BYTES:
            self._collected.facts.setdefault(member, {})["cut_from"] = len(content)
            content = content[-_MEMBER_BYTES:] if member.startswith(_ENDS) else content[:_MEMBER_BYTES]
        if self._total + len(content) > _TOTAL_BYTES:
            self._miss(member, f"the archive would hold more than {_TOTAL_BYTES // 1024**2} MiB")
            return
        self._total += len(content)
        self._collected.members[member] = content

    def _run(self, member: str, *argv: str) -> bytes:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise _NotToBeHadError(f"collecting took more than {_ALL_SECONDS} s")
        done = self._host.run(argv, timeout=min(_COMMAND_SECONDS, left), check=False)
        if done.status != 0:
            self._collected.facts[member] = {"exit_status": done.status}
        errors = done.stderr if not member.endswith(".json") or not done.stdout else ""
        if not done.stdout + errors:
            raise _NotToBeHadError(f"{argv[0]} prints nothing (status {done.status})")
        return (done.stdout + errors).encode()

    def _first_of(self, *paths: str) -> bytes:
        """Return the first of these that is a plain file; a link is none."""
        reason = "it is not there"
        for path in paths:
            try:
                content = self._host.read(PurePosixPath(path), _MEMBER_BYTES)
            except AgentError as error:
                reason = error.message
                continue
            if content is not None:
                return content
        raise _NotToBeHadError(reason)

    def _claims(self) -> bytes:
        """Return what the token says, without the part that makes it valid."""
        parts = self._first_of(str(TOKEN)).strip().split(b".")
        if len(parts) != 3:
            raise _NotToBeHadError("it is not a JWT")
        return _as_json({"header": _jwt_part(parts[0]), "claims": _jwt_part(parts[1])})

    def _certificates(self, path: PurePosixPath) -> bytes:
        """Return the certificates of a PEM file and nothing else that may be in it."""
        return b"".join(_CERTIFICATE.findall(self._first_of(str(path))))

    def _logs(self) -> list[PurePosixPath]:
        """Return the log files, the newest generation first; compressed ones are old and left out."""
        try:
            names = [name for name in self._host.names_in(LOG_FOLDER) if not name.endswith((".gz", ".xz", ".zst"))]
        except AgentError as error:
            self._miss("logs", error.message)
            return []
        names.sort(key=lambda name: (not name.endswith(".log"), name))
        for name in names[_LOG_FILES:]:
            self._miss(f"logs/{name}", f"more than {_LOG_FILES} files are there")
        return [LOG_FOLDER / name for name in names[:_LOG_FILES] if re.fullmatch(r"[\w.@-]{1,100}", name)]

    def _tail(self, path: PurePosixPath) -> bytes:
        """Return the end of a log from the beginning of a line on: the rest of a cut secret would not be found."""
        file = LogFile(self._host, path, tail=_MEMBER_BYTES)
        try:
            content = file.read(_MEMBER_BYTES)
        finally:
            file.close()
        found = self._host.status(path)
        if found is None or not found.is_file:
            raise _NotToBeHadError("it is not a plain file")
        if found.size > len(content):
            self._collected.facts[f"logs/{path.name}"] = {"cut_from": found.size}
            return content.partition(b"\n")[2]
        return content


class _NotToBeHadError(Exception):
    """Why a member is not in the archive."""


def _as_json(document: object) -> bytes:
    return json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"


def _versions() -> dict[str, str]:
    return {
        "vmmesh-agent": __version__,
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
        "machine": platform.machine(),
        "kernel": platform.release(),
    }


_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----\n?")


def _jwt_part(part: bytes) -> Any:
    try:
        return strict.load_json(base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4)))
    except ValueError:
        raise _NotToBeHadError("it is not a JWT") from None


# --- configuration ---


def _config_files(host: Host, config_file: PurePosixPath | None) -> dict[PurePosixPath, bytes]:
    paths = [config_file] if config_file else [config.FILE, *(config.FOLDER / name for name in _drop_ins(host))]
    found = {}
    for path in paths:
        try:
            content = host.read(path, 1024**2)
        except AgentError:
            continue
        if content is not None:
            found[path] = content
    return found


def _drop_ins(host: Host) -> list[str]:
    try:
        return [name for name in host.names_in(config.FOLDER) if name.endswith(".yaml")]
    except AgentError:
        return []


def _settings(content: bytes) -> Iterator[tuple[str, Any]]:
    """Yield every setting of a configuration file, known or not. Raise `strict.MalformedError` where it is none."""

    def leaves(document: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if isinstance(document, dict):
            for name, value in document.items():
                yield from leaves(value, f"{prefix}.{name}" if prefix else str(name))
        else:
            yield prefix, document

    yield from leaves(strict.load_yaml(content.decode(errors="replace")), "")


def _shown_config(content: bytes) -> bytes:
    """Return the settings without what may be secret in them: arguments, queries, whatever is not known."""
    try:
        return _as_json({key: _shown(key, value) for key, value in _settings(content)})
    except strict.MalformedError:
        # Where nobody can tell what is what, a token may be anywhere.
        raise _NotToBeHadError("it is not sound YAML; vmmesh-agent check-config says where") from None


def _shown(key: str, value: Any) -> Any:
    if key not in config.SETTINGS:
        return str(Secret(str(value)))
    if key == "endpoint.credential.exec" and isinstance(value, list):
        return [*value[:1], *(str(Secret(str(word))) for word in value[1:])]
    if key.startswith("endpoint.credential.") and not str(value).startswith("/"):
        return str(Secret(str(value)))  # a token in the place of its file's name
    if key in {"endpoint.url", "sidecar.package"}:
        return _without_query(str(value))
    return value


def _without_query(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        return str(Secret(url))
    address = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, address, parts.path, str(Secret(parts.query)) if parts.query else "", ""))


# --- secrets ---


def _secrets(host: Host, config_files: Mapping[PurePosixPath, bytes]) -> list[Secret]:
    """Return every secret that this machine has. A program that would print one is not run."""
    files = [TOKEN, KEY, credential.KEPT, PurePosixPath("/etc/vmmesh-agent/join-token")]
    texts: list[str] = []
    for content in config_files.values():
        try:
            settings = list(_settings(content))
        except strict.MalformedError:
            continue
        for key, value in settings:
            if key in {"endpoint.url", "sidecar.package"} and "?" in str(value):
                query = str(value).partition("?")[2]
                texts += [query, *(part.partition("=")[2] for part in query.split("&"))]
            elif key.startswith("endpoint.credential.") and key != "endpoint.credential.exec":
                if str(value).startswith("/"):
                    files.append(PurePosixPath(str(value)))
                else:
                    texts.append(str(value))
            elif key == "endpoint.credential.exec" and isinstance(value, list):
                texts += [str(word) for word in value[1:]]
    for path in files:
        try:
            texts.append((host.read(path, 1024**2) or b"").decode(errors="replace"))
        except AgentError:
            continue  # what we cannot read cannot get into the archive through us
    texts.extend(_stored(host))
    return [Secret(text.strip()) for text in texts if len(text.strip()) >= _SHORTEST_SECRET]


def _stored(host: Host) -> list[str]:
    """Return the tokens that the agent keeps."""
    try:
        membership = store.load(host)
    except AgentError:
        return []
    kept = [membership.current, membership.good] if membership else []
    return [each.bundle.files.get(TOKEN_FILE, b"").decode(errors="replace") for each in kept if each]


class _Scrubber:
    """Takes secrets out of bytes: the known ones in the encodings that programs give them, and what looks like one."""

    def __init__(self, secrets: Iterable[Secret]) -> None:
        needles = {needle for secret in secrets for needle in _needles(secret)}
        # Longest first: a whole secret before the parts of it.
        self._known = sorted(needles, key=lambda needle: (-len(needle), needle))

    def scrub(self, content: bytes) -> bytes:
        for pattern, replacement in _LOOKS_SECRET:
            content = pattern.sub(replacement, content)
        for needle in self._known:
            content = content.replace(needle, _MASK)
        return content


_LOOKS_SECRET = (
    # a JWT's signature: what it claims is no secret
    (re.compile(rb"\b(eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.)[\w-]{8,}"), rb"\1(secret)"),
    (re.compile(rb"-----BEGIN ([A-Z ]*PRIVATE KEY)-----.*?(?:-----END \1-----|\Z)", re.DOTALL), _MASK),
    (re.compile(rb"(?i)\b(bearer|basic)(\s+)[\w.~+/=-]{8,}"), rb"\1\2(secret)"),
    (re.compile(rb"(://)[^/@\s:\"']+:[^/@\s\"']+@"), rb"\1(secret)@"),  # a proxy's user and password
)


def _needles(secret: Secret) -> Iterator[bytes]:
    """Yield a secret as it may turn up: plain, its telling parts, quoted for JSON, and within base64 of a text."""
    text = secret.reveal()
    pieces = [text]
    if text.startswith("-----BEGIN"):
        pieces += [line for line in text.splitlines() if not line.startswith("-----") and len(line) >= 32]
    elif text.count(".") == 2:
        pieces += [part for part in text.rsplit(".", 1)[1:] if len(part) >= 32]  # the signature of a JWT
    for piece in pieces:
        plain = piece.encode()
        yield plain
        yield json.dumps(piece)[1:-1].encode()
        yield from _in_base64(plain)


def _in_base64(plain: bytes) -> Iterator[bytes]:
    """Yield what base64 makes of it wherever it begins: three alignments, less the digits that it shares."""
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + plain)
        first = (before * 8 + 5) // 6
        last = (before + len(plain)) * 8 // 6
        core = encoded[first:last]
        if len(core) >= _SHORTEST_SECRET:
            yield core
            yield core.replace(b"+", b"-").replace(b"/", b"_")
