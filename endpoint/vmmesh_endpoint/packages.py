"""The istio-sidecar packages beside the bundle: what they are, read from their own headers.

Istio publishes every version under the same file name, so the name says nothing. Both headers are read here
rather than by rpm and dpkg-deb, so that a small image without either can serve both formats.
"""

import email
import hashlib
import io
import lzma
import re
import stat
import struct
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vmmesh_endpoint import log
from vmmesh_endpoint.files import Fingerprint, Watched, fingerprint

NAME = "istio-sidecar"
SUFFIXES = {".rpm": "rpm", ".deb": "deb"}
MAX_HEADER_BYTES = 16 * 1024 * 1024


class PackageError(ValueError):
    """Why a file is not a package that can be offered."""


@dataclass(frozen=True, slots=True)
class Package:
    """A package file; `arch` in the format's own words, `version` without epoch and package revision."""

    path: Path
    name: str
    format: str
    version: str
    arch: str
    sha256: str
    size: int


class PackageFolder:
    """The folder `packages/`; it may be missing. A file's digest is computed once per change of the file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, tuple[Fingerprint | None, Package | None]] = {}
        self._watched = Watched(lambda: [folder, *self._paths()], self._load)

    def current(self) -> tuple[Package, ...]:
        """Return every istio-sidecar package that is here, by file name."""
        return self._watched.current()

    def _paths(self) -> list[Path]:
        try:
            return sorted(path for path in self._folder.iterdir() if path.suffix in SUFFIXES)
        except OSError:
            return []

    def _load(self) -> tuple[Package, ...]:
        self._read = {path: self._once(path) for path in self._paths()}
        return tuple(package for _, package in self._read.values() if package)

    def _once(self, path: Path) -> tuple[Fingerprint | None, Package | None]:
        before = fingerprint(path)
        known = self._read.get(path)
        if known and known[0] == before:
            return known
        try:
            return before, read(path)
        except (PackageError, OSError) as error:
            log.warning("package left out", file=path.name, reason=str(error))
            return before, None


def offered(packages: tuple[Package, ...]) -> tuple[Package, ...]:
    """Return those of the newest version, one per format and architecture (the first by file name)."""
    newest = max((version_key(package.version) for package in packages), default=None)
    chosen: dict[tuple[str, str], Package] = {}
    for package in packages:
        if version_key(package.version) == newest:
            chosen.setdefault((package.format, package.arch), package)
    return tuple(chosen.values())


def version_key(version: str) -> tuple[list[int], bool, list[int]]:
    """Order versions as Istio counts them: a suffix such as -rc.1 or ~beta.0 comes before the release."""
    release = re.match(r"[0-9.]*", version)
    assert release is not None  # noqa: S101  # the pattern matches the empty string too
    suffix = version[release.end() :]
    return _numbers(release.group()), not suffix, _numbers(suffix)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def read(path: Path) -> Package:
    """Read a package's header and digest. Raise `PackageError` where it is not an istio-sidecar package."""
    with path.open("rb") as file:
        if not stat.S_ISREG(path.stat().st_mode):
            raise PackageError("it is not a plain file")
        format_ = SUFFIXES[path.suffix]
        try:
            name, version, arch = _rpm(file) if format_ == "rpm" else _deb(file)
        except (struct.error, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, KeyError, ValueError) as error:
            raise PackageError(f"its {format_} header cannot be read: {error}") from None
        if name != NAME:
            raise PackageError(f"it is a package of {name!r}, not of {NAME!r}")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256")
        return Package(path, path.name, format_, version, arch, digest.hexdigest(), file.tell())


def _rpm(file: BinaryIO) -> tuple[str, str, str]:
    # rpm's file format (docs/manual/format_v4.md): a lead of 96 bytes, the signature header padded to
    # eight bytes, then the header with the tags NAME 1000, VERSION 1001 and ARCH 1022.
    if file.read(96)[:4] != b"\xed\xab\xee\xdb":
        raise PackageError("it is not an rpm package")
    _, signature = _rpm_header(file)
    file.seek(-len(signature) % 8, io.SEEK_CUR)
    entries, header = _rpm_header(file)
    values: dict[int, str] = {}
    for position in range(entries):
        tag, _, offset, _ = struct.unpack_from(">IIiI", header, 16 * position)
        if tag in {1000, 1001, 1022}:
            begin = 16 * entries + offset
            values[tag] = header[begin : header.index(b"\0", begin)].decode()
    return values[1000], values[1001], values[1022]


def _rpm_header(file: BinaryIO) -> tuple[int, bytes]:
    """Return the number of index entries, and the index (16 bytes each) with the data behind it."""
    magic, entries, data_bytes = struct.unpack(">4s4xII", file.read(16))
    size = 16 * int(entries) + int(data_bytes)
    if magic != b"\x8e\xad\xe8\x01" or size > MAX_HEADER_BYTES:
        raise PackageError("it is damaged")
    return int(entries), file.read(size)


def _deb(file: BinaryIO) -> tuple[str, str, str]:
    # deb(5): an ar archive of debian-binary, control.tar[.gz|.xz] and the data, in this order.
    if file.read(8) != b"!<arch>\n":
        raise PackageError("it is not a deb package")
    for name, content in _ar_members(file):
        if name.startswith("control.tar"):
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                for entry in archive:
                    if entry.name.removeprefix("./") == "control" and (member := archive.extractfile(entry)):
                        control = dict(email.message_from_bytes(member.read(MAX_HEADER_BYTES)))
                        version = control["Version"].rpartition(":")[2]
                        upstream = version.rpartition("-")[0] or version
                        return control["Package"], upstream, control["Architecture"]
    raise PackageError("it has no control file")


def _ar_members(file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    while header := file.read(60):
        size = int(header[48:58])
        if size > MAX_HEADER_BYTES:
            raise PackageError("its control archive is too large, or does not come before the data")
        yield header[:16].decode().strip().rstrip("/"), file.read(size + size % 2)[:size]
