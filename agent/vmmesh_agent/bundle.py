"""The bootstrap bundle as a value, and its four forms told apart by content.

`unpack` turns bytes of whatever form into a `Bundle`; nothing in it is believed yet (verify does that).
A form that cannot be read at all is refused here; what is missing or wrong inside is verify's to say.
"""

import base64
import binascii
import io
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vmmesh_agent import strict
from vmmesh_agent.errors import AgentError
from vmmesh_agent.text import shown

MEDIA_TYPE = "application/vnd.vmmesh.bundle.v1+json"
VERSION = 1
MAX_BYTES = 4 * 1024 * 1024  # of a bundle, packed or unpacked; a Kubernetes Secret holds 1 MiB at most

ROOT_CERT = "root-cert.pem"
TOKEN = "istio-token"  # noqa: S105  # a file's name
CLUSTER_ENV = "cluster.env"
MESH = "mesh.yaml"
HOSTS = "hosts"
_WORD = re.compile(r"[!-~]{1,2048}")

FILES = (ROOT_CERT, TOKEN, CLUSTER_ENV, MESH, HOSTS)


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason to refuse a bundle: a stable kebab-case code, the file, a sentence, and what to do."""

    code: str
    file: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        where = f"{self.file}: " if self.file else ""
        return f"{where}{self.message}"


class BundleRefusedError(AgentError):
    """The bundle may not be trusted. `problems` holds every reason, not just the first."""

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        if len(problems) == 1:
            message, code = f"the bundle was refused: {problems[0]}", problems[0].code
        else:
            reasons = "".join(f"\n  {problem} [{problem.code}]" for problem in problems)
            codes = {problem.code for problem in problems}
            message = f"the bundle was refused for {len(problems)} reasons:{reasons}"
            code = codes.pop() if len(codes) == 1 else "bundle-refused"
        hints = dict.fromkeys(problem.hint for problem in problems if problem.hint)
        super().__init__(message, code=code, hint="\n".join(hints) or "mend the bundle where it is made", retry=True)


@dataclass(frozen=True, slots=True)
class Workload:
    """The WorkloadGroup that a machine belongs to."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Package:
    """A published istio-sidecar package; `format` is rpm or deb, `arch` in that format's own words."""

    format: str
    arch: str
    url: str
    sha256: str
    size: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "arch": self.arch,
            "url": self.url,
            "sha256": self.sha256,
            "size": self.size,
        }


@dataclass(frozen=True, slots=True)
class Sidecar:
    """Which sidecar the cluster wants: its version, and the packages that carry it."""

    version: str = ""
    packages: tuple[Package, ...] = ()


@dataclass(frozen=True, slots=True)
class Bundle:
    """What was delivered: as many of the five files as there were, and what came with them."""

    files: Mapping[str, bytes] = field(repr=False)
    workload: Workload | None = None
    sidecar: Sidecar | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the first form (version 1) of this bundle; the child process answers in it."""
        document: dict[str, Any] = {
            "version": VERSION,
            "files": {name: content.decode("utf-8", "surrogateescape") for name, content in self.files.items()},
        }
        if self.workload:
            document["workload"] = {"namespace": self.workload.namespace, "name": self.workload.name}
        if self.sidecar:
            document["sidecar"] = {
                "version": self.sidecar.version,
                "packages": [package.as_dict() for package in self.sidecar.packages],
            }
        return document


def unpack(data: bytes) -> Bundle:
    """Read a bundle of any form but a directory. Raise `BundleRefusedError` where it cannot be read."""
    if len(data) > MAX_BYTES:
        raise too_large()
    if data.startswith(b"\x1f\x8b"):
        return Bundle(files=dict(_tar_files(_gunzip(data))))
    if data[257:262] == b"ustar":
        return Bundle(files=dict(_tar_files(data)))
    if data.lstrip()[:1] == b"{":
        return _from_document(data)
    raise _unreadable(
        "bundle-unknown-format",
        f"it is neither JSON nor a tar archive; it begins with {bytes(data[:24])!r}" if data else "it is empty",
        hint="see that endpoint.url leads to a bundle and not to a login or error page",
    )


def _from_document(data: bytes) -> Bundle:
    try:
        document = strict.load_json(data)
    except strict.MalformedError as error:
        raise _unreadable("bundle-malformed", f"it is not sound JSON: {error}") from None
    if document.get("kind") == "Secret":
        return Bundle(files=dict(_secret_files(document)))
    if "kind" in document:
        raise _unreadable(
            "bundle-unknown-format", f"it is a Kubernetes {shown(document['kind'])}; only a Secret is known"
        )
    return from_json(document)


def from_json(document: Mapping[str, Any]) -> Bundle:
    """Read the first form; unknown keys are left alone."""
    version = document.get("version")
    if version != VERSION or isinstance(version, bool):
        raise _unreadable(
            "bundle-unknown-version",
            f"its version is {shown(version)}; this agent knows {VERSION}",
            hint="update the agent, or let the endpoint serve version 1",
        )
    files = _mapping(document, "files")
    workload = document.get("workload")
    return Bundle(
        files={name: _content(files, name) for name in FILES if name in files},
        workload=None if workload is None else _workload(_mapping(document, "workload")),
        sidecar=None if document.get("sidecar") is None else _sidecar(_mapping(document, "sidecar")),
    )


def _workload(document: Mapping[str, Any]) -> Workload:
    return Workload(_word(document, "namespace", "workload."), _word(document, "name", "workload."))


def _sidecar(document: Mapping[str, Any]) -> Sidecar:
    packages = document.get("packages", [])
    if not isinstance(packages, list) or not all(isinstance(package, dict) for package in packages):
        raise _unreadable("bundle-malformed", "its sidecar.packages must be a list of objects")
    version = _word(document, "version", "sidecar.") if document.get("version") else ""
    return Sidecar(version, tuple(_package(package) for package in packages))


def _package(document: Mapping[str, Any]) -> Package:
    size = document.get("size")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 0):
        raise _unreadable("bundle-malformed", "a size in sidecar.packages must be a number of bytes")
    format_, arch, url = (_word(document, key, "sidecar.packages.") for key in ("format", "arch", "url"))
    sha256 = _text(document, "sha256", "sidecar.packages.")
    return Package(format_, arch, url, sha256.removeprefix("sha256:").lower(), size)


def _mapping(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = document.get(key)
    if not isinstance(value, dict):
        raise _unreadable("bundle-malformed", f"its {key!r} must be an object")
    return value


def _text(document: Mapping[str, Any], key: str, prefix: str) -> str:
    value = document.get(key)
    if not isinstance(value, str):
        raise _unreadable("bundle-malformed", f"its {prefix}{key} must be text")
    return value


def _word(document: Mapping[str, Any], key: str, prefix: str) -> str:
    """Return a short text that is shown to people and given to programs: no blank, no escape sequence."""
    value = _text(document, key, prefix)
    if not _WORD.fullmatch(value):
        raise _unreadable("bundle-malformed", f"its {prefix}{key} is {shown(value)}, not a plain word")
    return value


def _content(files: Mapping[str, Any], name: str) -> bytes:
    try:
        # Bytes that are not UTF-8 pass through JSON as lone surrogates, so that verify can name the file.
        return _text(files, name, "files.").encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise _unreadable("bundle-malformed", f"its files.{name} is not text") from None


def _secret_files(document: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    data = _mapping(document, "data")
    for name in FILES:
        if name in data:
            try:
                yield name, base64.b64decode(_text(data, name, "data."), validate=True)
            except (binascii.Error, ValueError):
                raise _unreadable("bundle-malformed", f"its data.{name} is not base64") from None


def _gunzip(data: bytes) -> bytes:
    inflate = zlib.decompressobj(wbits=31)
    try:
        content = inflate.decompress(data, MAX_BYTES + 1)
    except zlib.error as error:
        raise _unreadable("bundle-malformed", f"its gzip layer is damaged: {error}") from None
    if len(content) > MAX_BYTES:
        raise _unreadable("bundle-too-large", f"it unpacks to more than {MAX_BYTES // 1024**2} MiB")
    if not inflate.eof:
        raise _unreadable("bundle-truncated", "its gzip layer ends too early", hint="transfer it again")
    return content


def _tar_files(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the five files that a tar holds, flat or in one folder; other plain files are left alone.

    The archive is read in memory and its names are only compared, never used as paths; a name or an entry
    that would be dangerous to somebody who extracts it refuses the whole archive all the same.
    """
    folders: set[str] = set()
    seen: set[str] = set()
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for entry in archive:
                parts = [part for part in entry.name.split("/") if part not in {"", "."}]
                if entry.name.startswith("/") or ".." in parts:
                    raise _unreadable(
                        "bundle-hostile-archive", f"its entry {shown(entry.name)} leads out of the archive"
                    )
                if entry.isdir():
                    continue
                if not entry.isreg():
                    kind = "a link" if entry.issym() or entry.islnk() else "a device or pipe"
                    raise _unreadable("bundle-hostile-archive", f"its entry {shown(entry.name)} is {kind}, not a file")
                if not parts or parts[-1] not in FILES or len(parts) > 2:
                    continue
                name = parts[-1]
                folders.add("/".join(parts[:-1]))
                if name in seen or len(folders) > 1:
                    raise _unreadable("bundle-ambiguous", f"it holds more than one {name!r} or more than one folder")
                seen.add(name)
                if entry.size > MAX_BYTES:  # a sparse entry claims what the archive does not hold
                    raise _unreadable("bundle-too-large", f"its {name!r} is larger than {MAX_BYTES // 1024**2} MiB")
                content = archive.extractfile(entry)
                assert content is not None  # noqa: S101  # a regular file always has content
                yield name, content.read()
            if data[archive.offset : archive.offset + 512] != bytes(512):  # tarfile takes a cut header for the end
                raise tarfile.ReadError("it ends without its end mark")
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise _unreadable(
            "bundle-truncated", f"its tar archive is damaged: {error}", hint="transfer it again"
        ) from None


def too_large() -> BundleRefusedError:
    return _unreadable(
        "bundle-too-large",
        f"it is larger than {MAX_BYTES // 1024**2} MiB",
        hint="see that endpoint.url leads to a bundle, not to something else",
    )


def _unreadable(code: str, message: str, hint: str = "") -> BundleRefusedError:
    return BundleRefusedError(Problem(code, "", message, hint))
