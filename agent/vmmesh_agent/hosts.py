"""The bundle's hosts lines, and the agent's block in /etc/hosts.

Everything outside the block is somebody else's and stays byte for byte as it was.
"""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

BEGIN = b"# BEGIN vmmesh-agent"
END = b"# END vmmesh-agent"

# What a resolver takes for a host name; an underscore is not legal there but is seen.
_NAME = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?)*\.?"
)

# The name under which istiod is known in a cluster: istiod[-<revision>].<istio namespace>.svc[.<domain>].
ISTIOD_NAME = re.compile(r"istiod(-[a-z0-9-]+)?\.[a-z0-9-]+\.svc(\.[a-z0-9.-]+)?")


@dataclass(frozen=True, slots=True)
class HostsLine:
    """An address (v4 or v6, in its shortest form) and the names that shall lead to it."""

    address: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.address} {' '.join(self.names)}"


def parse(text: str) -> tuple[tuple[HostsLine, ...], list[str]]:
    """Return the lines and every problem as a sentence."""
    lines: list[HostsLine] = []
    problems: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        address, names = words[0], words[1:]
        try:
            parsed = ipaddress.ip_address(address)
            if "%" in address:  # a zone: it is this link's alone, and may be any text
                raise ValueError
        except ValueError:
            problems.append(f"line {number}: {address[:60]!r} is not an address")
            continue
        if parsed.is_unspecified or parsed.is_multicast or (parsed.version == 6 and parsed.is_link_local):
            problems.append(f"line {number}: {address} is not the address of a machine")
        elif not names:
            problems.append(f"line {number}: {address} has no name beside it")
        elif wrong := [name for name in names if not _NAME.fullmatch(name)]:
            problems.append(f"line {number}: {wrong[0][:60]!r} is not a host name")
        else:
            lines.append(HostsLine(str(parsed), tuple(name.rstrip(".").lower() for name in names)))
    return tuple(lines), problems


def with_block(content: bytes, lines: Iterable[HostsLine]) -> bytes:
    """Return the content of /etc/hosts with the block holding just these lines, where it was or at the end.

    No lines, no block. A marker without its partner (somebody edited the block) is dropped alone, so that no
    line of theirs is ever taken for one of ours.
    """
    block = b"".join(str(line).encode() + b"\n" for line in lines)
    if block:
        block = BEGIN + b"\n" + block + END + b"\n"
    before, after = _around_block(content)
    if block and before and not before.endswith(b"\n"):
        before += b"\n"
    return before + block + after


def _around_block(content: bytes) -> tuple[bytes, bytes]:
    """Split into what stands before and after the first whole block; further blocks and lone markers go."""
    lines = content.splitlines(keepends=True)
    ours: set[int] = set()
    place: int | None = None
    begin: int | None = None
    for index, line in enumerate(lines):
        marker = line.strip()
        if marker == BEGIN:
            if begin is not None:
                ours.add(begin)
            begin = index
        elif marker == END:
            ours.update(range(begin, index + 1) if begin is not None else [index])
            place = begin if place is None else place
            begin = None
    if begin is not None:
        ours.add(begin)
    if place is None:
        place = len(lines)
    before = b"".join(line for index, line in enumerate(lines[:place]) if index not in ours)
    after = b"".join(line for index, line in enumerate(lines) if index >= place and index not in ours)
    return before, after
