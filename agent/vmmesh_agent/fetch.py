"""Bytes from the cluster: the bundle, and the package that it names.

The network itself is `network`'s, a child process without privileges: it runs as istio-proxy, which is exempt
from traffic capture, so that the endpoint is reached even when the sidecar is dead; before there is such a user
it runs as nobody. What it answers is read here as a stranger's: bounded in size, and judged by `verify` after.
"""

import base64
import binascii
import hashlib
import hmac
import json
import math
import re
import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from vmmesh_agent import bundle as bundles
from vmmesh_agent import credential
from vmmesh_agent.bundle import Bundle
from vmmesh_agent.config import Config
from vmmesh_agent.errors import AgentError, FetchError
from vmmesh_agent.host import Account, Child, Host
from vmmesh_agent.secret import Secret
from vmmesh_agent.strict import MalformedError, load_json
from vmmesh_agent.text import printable, shown

SIDECAR_USER = "istio-proxy"
NOBODY = Account(65534, 65534)

MAX_PACKAGE_BYTES = 1024**3
_MAX_ANSWER = 8 * bundles.MAX_BYTES  # a byte of a file may take six in JSON
_MAX_COMPLAINT = 256 * 1024
_LONGEST_WAIT = 3600.0
_START_SECONDS = 3.0  # in which the child has loaded its modules, on a slow machine

_MACHINE_ID = re.compile(rb"[0-9a-f]{32}")
_ETAG = re.compile(r'(W/)?"[!#-~]{0,200}"')  # RFC 9110, section 8.8.3, without what is not ASCII

OnRetry = Callable[[AgentError], None]


@dataclass(frozen=True, slots=True)
class Fetched:
    """An answer of the endpoint: `bundle` is None where the one with our `etag` still stands.

    `clock_offset` is the endpoint's clock less ours in seconds, None where it did not say; `join_token` the one that it
    took, where it was one.
    """

    bundle: Bundle | None
    etag: str = ""
    clock_offset: float | None = None
    join_token: Secret | None = None


def fetch(
    host: Host,
    config: Config,
    *,
    etag: str = "",
    patience: float | None = None,
    on_retry: OnRetry = lambda _: None,
    idle: Callable[[], None] = lambda: None,
) -> Fetched:
    """Get the bundle from wherever the configuration says.

    Passing trouble is retried for `patience` seconds (None: for ever) and told to `on_retry`; `idle` is called
    several times a second meanwhile. A refusal is raised at once as `FetchError`, what cannot be read as
    `BundleRefusedError`.
    """
    if config.endpoint.url.startswith("file:"):
        return _from_disk(host, PurePosixPath(unquote(urlsplit(config.endpoint.url).path)))
    request = _request(host, config, config.endpoint.url, patience) | {
        "kind": "bundle",
        "headers": _headers(host, config, etag),
    }
    with _child(host, request) as child:
        answer = _last_event(child, _Patience(patience), on_retry, idle)
    join_token = Secret(request["bearer"]) if config.endpoint.credential.join_token_file else None
    offset = answer.get("clock_offset")
    if not isinstance(offset, float):
        offset = None
    if answer["event"] == "not-modified" and etag:
        return Fetched(None, etag, offset, join_token)
    if answer["event"] != "bundle" or not isinstance(answer.get("bundle"), dict):
        raise _broken("an answer that is none")
    etag = str(answer.get("etag", ""))
    return Fetched(bundles.from_json(answer["bundle"]), etag if _ETAG.fullmatch(etag) else "", offset, join_token)


def probe(
    host: Host, url: str, *, patience: float, ca: str = "", pins: Sequence[str] = (), direct: bool = False
) -> None:
    """Shake hands with whoever serves `url`, verified as for a bundle; nothing is sent, no credential either.

    One attempt of at most `patience` seconds; raise `FetchError` where it fails. `direct` goes past a proxy.
    """

    def give_up(trouble: AgentError) -> None:
        raise trouble

    request = {"kind": "probe", "url": url, "timeout": patience, "ca": ca, "pins": list(pins), "direct": direct}
    with _child(host, request | {"bearer": "", "client_certificate": ""}) as child:
        _last_event(child, _Patience(patience + _START_SECONDS), give_up)


def probe_endpoint(host: Host, config: Config, patience: float) -> None:
    """Shake hands with the endpoint as `fetch` would. A client certificate is not shown: it is a credential."""
    endpoint = config.endpoint
    ca = credential.read(host, endpoint.ca_file, "endpoint.ca_file") if endpoint.ca_file else ""
    probe(host, endpoint.url, patience=patience, ca=ca, pins=endpoint.ca_pins)


@dataclass(frozen=True, slots=True)
class Metadata:
    """Where a cloud has an instance's user-data: what to ask for, and first for what session, where it has those."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    session: str = ""
    session_header: str = ""
    is_base64: bool = False  # the content itself, once more than what it says


def user_data(host: Host, cloud: Metadata, patience: float) -> bytes | None:
    """Return what this instance was given by its cloud, None where that is nothing.

    Passing trouble is retried for `patience` seconds; then, or on a refusal, raise `FetchError`.
    """
    request = {"kind": "user-data", "url": cloud.url, "headers": dict(cloud.headers), "timeout": 10.0}
    request |= {"session": cloud.session, "session_header": cloud.session_header}
    try:
        with _child(host, request) as child:
            answer = _last_event(child, _Patience(patience), lambda _: None)
    except FetchError as error:
        if not error.code.startswith("endpoint-"):
            raise
        raise FetchError(
            f"no user-data: {error.message}",
            code="metadata-service-failed",
            hint="see that this machine runs in the cloud that was named, and that its metadata service is switched on",
            retry=error.retry,
        ) from None
    content = answer.get("content")
    if answer["event"] != "user-data" or not isinstance(content, str | None):
        raise _broken("an answer that is none")
    try:
        return None if content is None else base64.b64decode(content, validate=True)
    except binascii.Error:
        raise _broken("an answer that is none") from None


def read_bundle(host: Host, path: PurePosixPath) -> Bundle:
    """Read a bundle from this machine: a directory with the five files, an archive, a JSON or Secret file."""
    found = host.status(path)
    if found and found.is_directory:
        limit = bundles.MAX_BYTES
        contents = {name: host.read(path / name, limit) for name in bundles.FILES}
        return Bundle({name: content for name, content in contents.items() if content is not None})
    if found and found.size > bundles.MAX_BYTES:
        raise bundles.too_large()
    content = host.read(path)
    if content is None:
        raise FetchError(f"{path} is not there", code="bundle-not-found", hint="see endpoint.url", retry=True)
    return bundles.unpack(content)


def _from_disk(host: Host, path: PurePosixPath) -> Fetched:
    bundle = read_bundle(host, path)
    etag = hashlib.sha256(json.dumps(bundle.as_json(), sort_keys=True).encode()).hexdigest()
    return Fetched(bundle, etag)


# --- the package ---


class Download:
    """A package on its way, while the caller does other things.

    The child writes a file that it shares with us. When it is done its bytes are copied, and the digest computed over
    them on their way, into a file that no child ever had open: that one is installed, and is kept for the case that the
    join is undone and tried again.
    """

    def __init__(self, host: Host, config: Config, *, url: str, sha256: str, into: PurePosixPath) -> None:
        self._host = host
        self._into = into
        self._expected = sha256
        self._arriving = into.with_name(f"{into.name}.part")
        self._file = host.create(self._arriving)
        request = _request(host, config, url) | {
            "kind": "package",
            "headers": {},
            "descriptor": self._file.descriptor,
            "limit": MAX_PACKAGE_BYTES,
        }
        if not _is_same_origin(url, config.endpoint.url):
            # Somebody else's server: it gets no credential of ours, and is trusted as any server is.
            request |= {"bearer": "", "client_certificate": "", "pins": [], "ca": ""}
        self._context = _child(host, request, self._file.descriptor)
        self._child = self._context.__enter__()

    def finish(
        self,
        *,
        patience: float | None = None,
        on_retry: OnRetry = lambda _: None,
        on_progress: Callable[[int], None] = lambda _: None,
    ) -> PurePosixPath:
        """Wait for the end and return the path, the digest checked. `on_progress` gets the bytes so far.

        `patience` is for what does not come: it begins anew with each byte that does.
        """
        waiting, arrived = _Patience(patience), 0

        def look() -> None:
            nonlocal arrived
            if self._file.size > arrived:
                waiting.renew()
            arrived = self._file.size
            on_progress(arrived)

        _last_event(self._child, waiting, on_retry, idle=look)
        digest = self._copy()
        if digest != self._expected:
            self._host.remove(self._into)
            raise FetchError(
                f"the package has the digest {digest}, expected {self._expected}",
                code="package-wrong-digest",
                hint="it was altered on its way or replaced where it is kept; nothing was installed",
            )
        return self._into

    def discard(self) -> None:
        """End the child and remove what it was writing, whatever became of it."""
        self._context.__exit__(None, None, None)
        self._file.close()
        self._host.remove(self._arriving)

    def _copy(self) -> str:
        """Copy what arrived and return its SHA-256."""
        digest = hashlib.sha256()
        copy = self._host.create(self._into)
        try:
            position = 0
            while chunk := self._file.read_at(position):
                digest.update(chunk)
                copy.append(chunk)
                position += len(chunk)
        finally:
            copy.close()
        return digest.hexdigest()


def _is_same_origin(first: str, second: str) -> bool:
    with suppress(ValueError):  # an address that makes no sense is nobody's, as the child will say
        one, other = urlsplit(first), urlsplit(second)
        return (one.scheme, one.hostname, one.port or 443) == (other.scheme, other.hostname, other.port or 443)
    return False


# --- what the child is told ---


def _request(host: Host, config: Config, url: str, patience: float | None = None) -> dict[str, Any]:
    endpoint = config.endpoint
    certificate = endpoint.credential.client_certificate
    bearer = credential.bearer(host, endpoint.credential, patience)
    return {
        "url": url,
        "timeout": endpoint.timeout,
        "ca": credential.read(host, endpoint.ca_file, "endpoint.ca_file") if endpoint.ca_file else "",
        "pins": list(endpoint.ca_pins),
        "bearer": bearer.reveal() if bearer else "",
        "client_certificate": credential.read(host, certificate.certificate, "endpoint.credential.client_certificate")
        + "\n"
        + credential.read(host, certificate.key, "endpoint.credential.client_certificate")
        if certificate
        else "",
    }


def _headers(host: Host, config: Config, etag: str) -> dict[str, str]:
    headers = {"Vmmesh-Machine": machine_id(host)}
    if config.workload_group:
        headers["Vmmesh-Workload-Group"] = str(config.workload_group)
    if etag:
        headers["If-None-Match"] = etag
    return headers


def machine_id(host: Host) -> str:
    """Return what the endpoint knows this machine by: stable, and of no use elsewhere.

    machine-id(5) asks that the ID itself is not shown to the network but a keyed hash of it.
    """
    own = (host.read(PurePosixPath("/etc/machine-id")) or b"").strip()
    if not _MACHINE_ID.fullmatch(own):
        raise FetchError(
            "this machine has no ID of its own (/etc/machine-id)",
            code="machine-id-missing",
            hint="run systemd-machine-id-setup; on a machine made from an image it happens at the first boot",
            retry=True,
        )
    return hmac.new(own, b"vmmesh-agent", hashlib.sha256).hexdigest()


# --- the child ---


@contextmanager
def _child(host: Host, request: Mapping[str, Any], *descriptors: int) -> Iterator[Child]:
    """Run the network child and give it its request; end it with the block, whatever happens."""
    account = host.account(SIDECAR_USER) or NOBODY
    argv = [sys.executable, "-P", "-m", "vmmesh_agent.network", str(account.uid), str(account.gid)]
    child = host.start(argv, pass_descriptors=descriptors)
    try:
        assert child.stdin is not None  # noqa: S101  # started with pipes
        with suppress(BrokenPipeError):  # it died at once; what it said tells why
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.flush()  # and it stays open: where it closes, we are gone, and the child goes too
        yield child
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout, child.stderr):
            with suppress(BrokenPipeError):
                if pipe:
                    pipe.close()


def _last_event(
    child: Child,
    patience: "_Patience",
    on_retry: OnRetry,
    idle: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Read the child's events until it is done; raise what failed, or the last trouble when patience ends."""
    trouble: FetchError | None = None
    for line in _lines(child, patience, idle):
        event = _event(line)
        if event["event"] not in {"retry", "failed"}:
            return event
        message, code, hint = (printable(str(event.get(key)), 2000) for key in ("message", "code", "hint"))
        error = FetchError(message, code=code, hint=hint, retry=event.get("retry") is True)
        if event["event"] == "failed":
            raise error
        error.retry_after = _seconds(event.get("wait"))
        if error.retry_after > patience.left():  # nobody is served by waiting for less than the endpoint wants
            raise error
        trouble = error
        on_retry(trouble)
    if patience.left() <= 0:
        raise trouble or FetchError(
            f"no answer within {patience}", code="endpoint-unreachable", hint="see endpoint.url", retry=True
        )
    raise _broken(_last_words(child))


class _Patience:
    """The seconds that somebody waits; None is for ever."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = math.inf if seconds is None else seconds
        self.renew()

    def __str__(self) -> str:
        return f"{self._seconds:g} s"

    def renew(self) -> None:
        """Begin anew."""
        self._end = time.monotonic() + self._seconds

    def left(self) -> float:
        return self._end - time.monotonic()


def _seconds(value: object) -> float:
    """Return a number of seconds that the child names, within reason."""
    return min(max(0.0, float(value)), _LONGEST_WAIT) if isinstance(value, int | float) else 0.0


def _event(line: bytes) -> dict[str, Any]:
    """Read one line of the child's, which may have been taken over by whom it spoke to."""
    try:
        event = load_json(line)
    except MalformedError:
        raise _broken(shown(line)) from None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise _broken(shown(line))
    return event


def _lines(child: Child, patience: _Patience, idle: Callable[[], None]) -> Iterator[bytes]:
    assert child.stdout is not None  # noqa: S101  # started with pipes
    pending: list[bytes] = []
    while patience.left() > 0:
        readable, _, _ = select.select([child.stdout], [], [], 0.2)
        idle()
        if not readable:
            continue
        chunk = child.stdout.read1(64 * 1024)  # type: ignore[attr-defined]  # the pipe is a BufferedReader
        if not chunk:
            return
        pending.append(chunk)
        if b"\n" in chunk:
            *lines, rest = b"".join(pending).split(b"\n")
            pending = [rest]
            yield from lines
        elif sum(map(len, pending)) > _MAX_ANSWER:
            raise _broken("an answer without end")


def _last_words(child: Child) -> str:
    assert child.stderr is not None  # noqa: S101  # started with pipes
    return child.stderr.read(_MAX_COMPLAINT).decode(errors="replace").strip().rpartition("\n")[2] or "nothing"


def _broken(answer: str) -> FetchError:
    return FetchError(
        f"the network child broke; it said {answer}",
        code="network-child-broken",
        hint="it is tried again by itself; if it stays so, send the archive of `vmmesh-agent collect-logs` to support",
        retry=True,
    )
