"""Lines of the sidecar's logs as records: when, how loud, who, what.

Three streams, and every form in which a line reaches us:

    log      pilot-agent's lines (tabs, or JSON) and Envoy's access log, in istio.log
    err      Envoy's own lines (three generations, or JSON), Go panics, the loader, in istio.err.log
    journal  istio-start.sh, iptables, sudo and systemd, behind the prefix that journalctl prints

A paste turns tabs into blanks, wraps lines and masks times; a rotation leaves a hole of NUL bytes. What has
no head of its own belongs to the record before it, unless its form stands alone (a panic, the loader).
Times are aware and in UTC; None where the line has none that can be believed.
"""

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

_LONGEST = 8_192  # characters of one record that are looked at: a listener dump may have megabytes
_LONGEST_UNFINISHED = 65_536  # bytes kept of a line whose end has not come


class Stream(StrEnum):
    """Which of the sidecar's outputs a line was read from."""

    LOG = "log"
    ERR = "err"
    JOURNAL = "journal"


@dataclass(frozen=True, slots=True)
class Record:
    """One message. `scope` is the agent's scope, or `envoy COMPONENT`, or the journal's identifier."""

    stream: Stream
    message: str
    moment: datetime | None = None
    level: str = ""
    scope: str = ""
    line: str = ""  # as it was read, for evidence


def read_record(line: str, stream: Stream) -> Record | None:
    """Read the head of a line; None where it has none and continues what came before."""
    line = line[:_LONGEST]
    if stream is Stream.JOURNAL:
        return _journal_record(line)
    if line.startswith("{"):
        return _json_record(line, stream)
    if _STANDS_ALONE.match(line):
        found = _GO_TIME.match(line)
        return Record(stream, line, _moment(found[1] + "Z") if found else None, line=line)
    if found := _AGENT_HEAD.match(line):
        scope, message = _scope_and_message(found["rest"])
        return Record(stream, message, _moment(found["time"]), found["level"], scope, line)
    if found := _HIDDEN_HEAD.search(line, 0, 300):  # behind a prefix, or over the start of an older line
        return read_record(line[found.start() :], stream)
    if found := _OLD_ENVOY_HEAD.match(line):
        moment, component = _moment(found["time"] + "Z"), found["component"]
        return Record(stream, found["rest"], moment, found["level"], f"envoy {component}", line)
    return None


class Reader:
    """Reads one stream in pieces: a record ends where the next begins."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._rest = b"\n"  # of the last piece: an end of line and what follows it
        self._traffic = b""
        self._open: Record | None = None
        self._more: list[str] = []
        self._length = 0

    def feed(self, piece: bytes) -> list[Record]:
        """Take a piece of the file; return the records that it completes.

        The access log is left out: traffic says nothing about the sidecar. It is nearly all of a busy file, so
        its lines are passed over without making an object of each.
        """
        # Truncating a file that is written without O_APPEND leaves a hole of NUL bytes, as long as the file was.
        lines = self._rest + piece.replace(b"\0", b"")
        end = lines.rfind(b"\n")
        self._rest = lines[end : end + _LONGEST_UNFINISHED]
        last = lines.rfind(b"\n", 0, end) + 1
        if lines[last : last + 1] not in b"[{":
            last = max(lines.rfind(b"\n[", 0, end), lines.rfind(b"\n{", 0, end)) + 1
        if traffic := _TRAFFIC_TIME.match(lines, last, end):
            self._traffic = traffic[1]
        return [record for line in _NOT_TRAFFIC.findall(lines, 0, end) for record in self._add(line)]

    def end_record(self) -> list[Record]:
        """Return the record that is still open, if any: nothing is known to follow it."""
        record, more = self._open, self._more
        self._open, self._more, self._length = None, [], 0
        if record is None:
            return []
        if more:
            message = "".join([record.message, *more])[:_LONGEST]
            record = Record(record.stream, message, record.moment, record.level, record.scope, record.line)
        return [record]

    def end(self) -> list[Record]:
        """Say that nothing more comes: a last line without its end is a line."""
        return [*self.feed(b"\n"), *self.end_record()]

    @property
    def traffic_moment(self) -> datetime | None:
        """When the request of the last access-log line began."""
        return _moment(self._traffic.decode())

    def _add(self, raw: bytes) -> list[Record]:
        line = raw.strip(b"\r").decode(errors="replace")
        record = read_record(line, self._stream)
        if record is None and (line.startswith("{") or _TRAFFIC_FRAGMENT.search(line)):
            return []  # up to 1.12 the agent overwrites lines of the access log: a user's words without their head
        if record is None and self._open is not None:
            # What a terminal wrapped and what Envoy or YAML continued are joined alike, without a blank.
            if self._length < _LONGEST:
                self._more.append(line)
                self._length += len(line)
            return []
        complete = self.end_record()
        if record is None:  # a paste that lost its head: judged by itself
            return [*complete, Record(self._stream, line, line=line)] if line.strip() else complete
        self._open = record
        return complete


# --- heads --------------------------------------------------------------------

_LEVELS = "trace|debug|info|warning|warn|error|critical|fatal"

# The time may be masked (20XX-12-25T…) or gone; what stands before the level has no small letters but an x.
_AGENT_HEAD = re.compile(
    rf"(?P<time>[^a-wyz\"\[\]]{{0,60}}?)\s*\b(?P<level>{_LEVELS})(?:\s+(?P<rest>\S.*)|\s*$)", re.DOTALL
)
_HIDDEN_HEAD = re.compile(rf"(?<=[^\[])\d{{4}}-\d\d-\d\dT[\d:.]{{8,}}Z\s+(?:{_LEVELS})\s")
_OLD_ENVOY_HEAD = re.compile(
    rf"\[(?P<time>[\dXx-]+ [\d:.]+)\]\[\d+\]\[(?P<level>{_LEVELS})\]\[(?P<component>\w+)\]\s*"
    r"(?:\[[^\]\s]+:\d+\]\s*)?(?P<rest>.*)",
    re.DOTALL,
)
_JOURNAL_HEAD = re.compile(
    r"(?P<time>.{0,60}?)\b(?P<identifier>[A-Za-z_][\w.@/-]*)(?:\[\d+\]:|(?<=kernel):)\s?(?P<rest>.*)",
    re.DOTALL,
)
_STANDS_ALONE = re.compile(
    r"panic: |fatal error: |goroutine \d+ \[|SIG[A-Z]+: |runtime: |unexpected fault address"
    r"|\d+ \S+:\d+\] |\S+\.cc:\d+\] "  # tcmalloc and absl
    r"|\S{0,200}(?:envoy|pilot-agent|bash|sudo)\S{0,200}: |\S{1,200}: \S{1,200}: version `|terminate called "
    r"|\d{4}-\d\d-\d\d [\d:.]+ \S+ \S+(?: m=\S+)? log write error:"
)
_GO_TIME = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:\.\d+)? \+0000 UTC")
_ISO_TIME = re.compile(r"(?:19|20)\d\d-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:?\d\d)")
# The access log begins `[2024-08-01T10:01:12.310Z]`, where the oldest Envoy log has a blank for the T; as JSON it
# begins with another key than the records of the agent and of Envoy do.
_NOT_TRAFFIC = re.compile(rb'\n(?!\[\d{4}-\d\d-\d\dT|\{(?!\s*"(?:level|time|scope|msg)"))([^\n]*)')
_TRAFFIC_FRAGMENT = re.compile(r'\[\d{4}-\d\d-\d\dT[\d:.]+Z\] "|HTTP/\d(?:\.\d)?" \d|"- - -" \d')
_TRAFFIC_TIME = re.compile(rb'(?:\[|\{[^\n]*?"start_time":\s*")(\d{4}-\d\d-\d\dT[\d:.]+Z)')

_SCOPES = frozenset(
    "ads ca cache citadelclient dns gcecred grpc healthcheck iptables klog model monitoring sds secretcache "
    "security spiffe token trustBundle util validation wasm xdsproxy".split()
)
_ENVOY_SCOPE = re.compile(r"envoy (?P<component>\w+)(?: \S+:\d+)?\s+(?:\[\S+:\d+\]\s+)?(?P<message>.*)", re.DOTALL)
_CALLER = re.compile(r"\w[\w./-]*\.go:\d+\s+")


def _moment(text: str) -> datetime | None:
    found = _ISO_TIME.search(text)
    if found is None:
        return None
    try:
        return datetime.fromisoformat(found[0]).astimezone(UTC)
    except ValueError:
        return None


def _scope_and_message(rest: str | None) -> tuple[str, str]:
    if not rest:
        return "", ""
    if found := _ENVOY_SCOPE.match(rest):
        return f"envoy {found['component']}", found["message"]
    word, _, after = rest.partition("\t") if "\t" in rest else rest.partition(" ")
    scope, message = (word, after.lstrip()) if word in _SCOPES else ("", rest)
    return scope, _CALLER.sub("", message, count=1) if _CALLER.match(message) else message


def _json_record(line: str, stream: Stream) -> Record | None:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        # Cut off by a paste or a full disk: what is there still says something.
        fields = {key: _unescaped(value) for key, value in _JSON_FIELD.findall(line)}
    if not isinstance(fields, dict) or "msg" not in fields:
        return None
    known = {key: str(fields.pop(key, "")) for key in ("time", "level", "scope", "msg")}
    labels = " ".join(f"{key}={value}" for key, value in fields.items())
    message = f"{known['msg']}\t{labels}" if labels else known["msg"]
    return Record(stream, message, _moment(known["time"]), known["level"], known["scope"], line)


_JSON_FIELD = re.compile(r'"(level|time|scope|msg)":\s*"((?:[^"\\]|\\.)*)')


def _unescaped(text: str) -> str:
    return text.replace('\\"', '"').replace("\\n", "\n").replace("\\t", "\t").replace("\\\\", "\\")


def _journal_record(line: str) -> Record | None:
    found = _JOURNAL_HEAD.match(line)
    # journalctl's short form has neither year nor zone, so it has no moment that can be believed.
    identifier, rest = (found["identifier"], found["rest"]) if found else ("", line)
    moment = _moment(found["time"]) if found else None
    if not rest.strip():
        return None
    inner = _AGENT_HEAD.match(rest)
    if inner is not None and (own := _moment(inner["time"])):
        return Record(Stream.JOURNAL, _scope_and_message(inner["rest"])[1], own, inner["level"], identifier, line)
    return Record(Stream.JOURNAL, rest, moment, "", identifier, line)
