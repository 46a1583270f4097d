"""The configuration: /etc/vmmesh-agent/config.yaml, then config.d/*.yaml, later wins, nothing is guessed.

`parse` is pure: texts in, a `Config` out, or one `ConfigurationError` that lists every mistake with its file,
its key and what is allowed there. The settings are one table, `SETTINGS`; docs/configuration.md prints it.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import SplitResult, urlsplit

from vmmesh_agent import strict
from vmmesh_agent.bundle import Workload
from vmmesh_agent.errors import ConfigurationError
from vmmesh_agent.text import printable, shown

FILE = PurePosixPath("/etc/vmmesh-agent/config.yaml")
FOLDER = PurePosixPath("/etc/vmmesh-agent/config.d")

_PIN = re.compile(r"sha256:[0-9a-f]{64}")
_HEX_DIGEST = re.compile(r"(sha256:)?[0-9a-f]{64}")
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """Where the certificate and its key are, PEM both."""

    certificate: PurePosixPath
    key: PurePosixPath


@dataclass(frozen=True, slots=True)
class Credential:
    """How the machine proves who it is: at most one of these is set, by configuration."""

    join_token_file: PurePosixPath | None = None
    bearer_token_file: PurePosixPath | None = None
    client_certificate: ClientCertificate | None = None
    exec: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the bundle comes from and how the endpoint is trusted. `timeout` is of one attempt, in seconds."""

    url: str
    ca_file: PurePosixPath | None = None
    ca_pins: tuple[str, ...] = ()
    credential: Credential = Credential()
    timeout: float = 30.0


@dataclass(frozen=True, slots=True)
class SidecarSettings:
    """Which package to install, where it is not the one that the bundle names."""

    package: str = ""
    sha256: str = ""
    allow_downgrade: bool = False


@dataclass(frozen=True, slots=True)
class Metrics:
    """Where the daemon writes its metrics, for node_exporter's textfile collector."""

    textfile: PurePosixPath | None = None


class FirstJoin(StrEnum):
    """What becomes of a first join that does not come to be healthy in time."""

    UNDO = "undo"  # the machine is left as it was found
    KEEP = "keep"  # all stays as it is, to be looked at


class Joined(StrEnum):
    """What becomes of this VM's own traffic while the sidecar of a VM that was once healthy fails."""

    CLOSED = "closed"  # captured, as ever: nothing leaves past the mesh
    OPEN = "open"  # the sidecar is stopped, which ends the capture, and started again now and then


@dataclass(frozen=True, slots=True)
class OnFailure:
    """What to do where the sidecar is not healthy within `healthy_within`."""

    first_join: FirstJoin = FirstJoin.UNDO
    joined: Joined = Joined.CLOSED


@dataclass(frozen=True, slots=True)
class Config:
    """The configuration in force."""

    endpoint: Endpoint
    workload_group: Workload | None = None
    sidecar: SidecarSettings = SidecarSettings()
    healthy_within: float = 180.0
    on_failure: OnFailure = OnFailure()
    metrics: Metrics = Metrics()


class _WrongError(ValueError):
    """What is allowed instead. What was found is not shown where it `is_secret`."""

    def __init__(self, allowed: str, *, is_secret: bool = False) -> None:
        super().__init__(allowed)
        self.is_secret = is_secret


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _WrongError("text")
    return value


def _url(value: Any) -> SplitResult:
    """Take an address apart; urlsplit itself looks at the host and the port only when asked."""
    try:
        url = urlsplit(_text(value))
        _ = url.hostname, url.port
    except ValueError:
        raise _WrongError("an address with a sound host and port") from None
    return url


def _endpoint_url(value: Any) -> str:
    url = _url(value)
    if url.username or url.password:
        raise _WrongError("an address without a password in it (use endpoint.credential)", is_secret=True)
    if url.scheme == "http":
        raise _WrongError("https:// or file:// (plain http would show the token to the network)")
    if url.scheme == "file":
        if url.netloc or not url.path.startswith("/"):
            raise _WrongError("file:/// and an absolute path")
    elif url.scheme != "https" or not url.hostname:
        raise _WrongError("https://host[:port]/path or file:///path")
    return str(value)


def _path(value: Any) -> PurePosixPath:
    path = PurePosixPath(_text(value))
    if not path.is_absolute() or ".." in path.parts:
        raise _WrongError("an absolute path")
    return path


def _textfile(value: Any) -> PurePosixPath:
    path = _path(value)
    if path.suffix != ".prom":
        raise _WrongError("an absolute path that ends in .prom, as node_exporter looks for")
    return path


def _pins(value: Any) -> tuple[str, ...]:
    pins = [value] if isinstance(value, str) else value
    if (
        not isinstance(pins, list)
        or not pins
        or not all(isinstance(p, str) and _PIN.fullmatch(p.lower()) for p in pins)
    ):
        raise _WrongError("a list of sha256:<64 hex digits>, of the public key (SubjectPublicKeyInfo)")
    return tuple(pin.lower() for pin in pins)


def _command(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(word, str) and word for word in value):
        raise _WrongError("a list: the program's absolute path, then its arguments")
    if not value[0].startswith("/"):
        raise _WrongError("a list whose first word is an absolute path")
    return tuple(value)


def _package(value: Any) -> str:
    text = _text(value)
    if text.startswith("/") or (_url(text).scheme == "https" and _url(text).hostname):
        return text
    raise _WrongError("https://…, or the absolute path of a file or folder")


def _digest(value: Any) -> str:
    if not isinstance(value, str) or not _HEX_DIGEST.fullmatch(value.lower()):
        raise _WrongError("64 hex digits (SHA-256)")
    return value.lower().removeprefix("sha256:")


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise _WrongError("a Kubernetes name (lower case letters, digits, - and .)")
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _WrongError("true or false")
    return value


def _one_of(choices: type[StrEnum]) -> Callable[[Any], StrEnum]:
    def check(value: Any) -> StrEnum:
        try:
            return choices(value)
        except ValueError:
            raise _WrongError(" or ".join(choices)) from None

    return check


def _seconds(low: float, high: float) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise _WrongError(f"seconds, from {low:g} to {high:g}")
        return float(value)

    return check


# Every setting: its place in the file → how it is read. What is not here is an unknown key.
SETTINGS: Mapping[str, Callable[[Any], Any]] = {
    "endpoint.url": _endpoint_url,
    "endpoint.ca_file": _path,
    "endpoint.ca_pins": _pins,
    "endpoint.timeout": _seconds(1, 600),
    "endpoint.credential.join_token_file": _path,
    "endpoint.credential.bearer_token_file": _path,
    "endpoint.credential.client_certificate.certificate": _path,
    "endpoint.credential.client_certificate.key": _path,
    "endpoint.credential.exec": _command,
    "workload_group.namespace": _name,
    "workload_group.name": _name,
    "sidecar.package": _package,
    "sidecar.sha256": _digest,
    "sidecar.allow_downgrade": _truth,
    "healthy_within": _seconds(5, 3600),
    "on_failure.first_join": _one_of(FirstJoin),
    "on_failure.joined": _one_of(Joined),
    "metrics.textfile": _textfile,
}
_SECTIONS = {key.rpartition(".")[0] for key in SETTINGS} | {"endpoint"}


def parse(documents: Iterable[tuple[PurePosixPath, bytes]]) -> Config:
    """Read the files in their order, later wins key by key. Raise `ConfigurationError` with every mistake."""
    settings: dict[str, Any] = {}
    origins: dict[str, PurePosixPath] = {}  # of what is there, right or wrong
    mistakes: list[str] = []
    for path, content in documents:
        try:
            document = strict.load_yaml(content.decode())
        except UnicodeDecodeError:
            mistakes.append(f"{path}: it is not UTF-8 text")
            continue
        except strict.MalformedError as error:
            mistakes.append(f"{path}: {error}")
            continue
        if document is not None:
            for key, value in _leaves(document, "", path, mistakes):
                origins[key] = path
                if value is not None:
                    settings[key] = value
    mistakes.extend(_contradictions(settings, origins))
    if mistakes:
        raise ConfigurationError(
            "\n".join(mistakes),
            code="configuration-invalid",
            hint="mend it; vmmesh-agent check-config judges it again",
        )
    return _config(settings)


def _leaves(document: Any, prefix: str, path: PurePosixPath, mistakes: list[str]) -> Iterable[tuple[str, Any]]:
    """Yield each known key with its checked value, None where it is wrong; note what is unknown or wrong."""
    if not isinstance(document, dict):
        found = "" if prefix.startswith("endpoint.credential") else f", found {shown(document)}"
        mistakes.append(f"{path}: {prefix or 'the file'}: expected keys and values{found}")
        return
    for name, value in document.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if "." in str(name):
            mistakes.append(f"{path}: {printable(key)}: unknown key; write one level a line")
        elif key in SETTINGS:
            try:
                yield key, SETTINGS[key](value)
            except _WrongError as error:
                # A token where the name of its file belongs must not end up in a log.
                is_secret = error.is_secret or key.startswith("endpoint.credential.")
                found = "" if is_secret else f", found {shown(value)}"
                mistakes.append(f"{path}: {key}: expected {error}{found}")
                yield key, None
        elif key in _SECTIONS:
            yield from _leaves(value, key, path, mistakes)
        else:
            mistakes.append(f"{path}: {printable(key)}: unknown key{_nearest(key)}")


def _nearest(key: str) -> str:
    """Name the known key that comes nearest, comparing last words too: a key may stand in the wrong section."""
    close = difflib.get_close_matches(key, [*SETTINGS, *_SECTIONS], n=1, cutoff=0.6)
    last = key.rpartition(".")[2]
    close = close or [known for known in SETTINGS if known.rpartition(".")[2] == last][:1]
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(SETTINGS)}"


def _contradictions(settings: Mapping[str, Any], origins: Mapping[str, PurePosixPath]) -> Iterable[str]:
    """Yield what is wrong with settings taken together."""
    if "endpoint.url" not in origins:
        yield f"{FILE}: endpoint.url: it is required; https://host[:port]/path or file:///path"
    kinds = sorted(
        {".".join(key.split(".")[:3]) for key in origins if key.startswith("endpoint.credential.")},
    )
    if len(kinds) > 1:
        yield f"{origins[next(key for key in origins if key.startswith(kinds[1]))]}: {' and '.join(kinds)}: at most one"
    for first, second in (
        ("endpoint.credential.client_certificate.certificate", "endpoint.credential.client_certificate.key"),
        ("workload_group.namespace", "workload_group.name"),
    ):
        for present, absent in ((first, second), (second, first)):
            if present in origins and absent not in origins:
                yield f"{origins[present]}: {absent}: it is required beside {present}"
    if str(settings.get("sidecar.package", "")).startswith("https:") and "sidecar.sha256" not in origins:
        yield f"{origins['sidecar.package']}: sidecar.sha256: it is required for a package from a URL"


def _config(settings: Mapping[str, Any]) -> Config:
    def section(prefix: str) -> dict[str, Any]:
        """The leaves directly below a section, as keyword arguments."""
        return {
            key.removeprefix(prefix): value
            for key, value in settings.items()
            if key.startswith(prefix) and "." not in key.removeprefix(prefix)
        }

    certificate = section("endpoint.credential.client_certificate.")
    credential = Credential(
        **section("endpoint.credential."),
        client_certificate=ClientCertificate(**certificate) if certificate else None,
    )
    workload = section("workload_group.")
    return Config(
        endpoint=Endpoint(**section("endpoint."), credential=credential),
        workload_group=Workload(**workload) if workload else None,
        sidecar=SidecarSettings(**section("sidecar.")),
        on_failure=OnFailure(**section("on_failure.")),
        metrics=Metrics(**section("metrics.")),
        **{key: value for key, value in settings.items() if "." not in key},
    )
