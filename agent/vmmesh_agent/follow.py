"""The sidecar's logs as a person wants them: the lines that matter, in their order in time, each explained once.

`Logs` reads the streams, `Story` makes lines of text of them and is pure. The judgement is `Diagnosis`'s own, asked
after each line that means something; so a condition is explained here where `status` would begin to show it.
"""

import re
import textwrap
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from vmmesh_agent.diagnosis import Diagnosis
from vmmesh_agent.errors import AgentError
from vmmesh_agent.health import Condition, Health, Severity, State
from vmmesh_agent.host import Host, LogFile
from vmmesh_agent.records import Reader, Record, Stream
from vmmesh_agent.rules import Effect, rule_for
from vmmesh_agent.text import printable
from vmmesh_agent.units import ISTIO
from vmmesh_agent.watch import LOGS

_TAIL = 8 * 1024**2  # bytes of an existing log that are read back
_JOURNAL_LINES = 2000  # of the past
_JOURNAL_SECONDS = timedelta(seconds=2)  # between two looks at the journal: each one is a process
_CURSOR = "-- cursor: "

_AGAIN = timedelta(minutes=10)  # a message that goes on is shown again after this
_TRAFFIC = timedelta(seconds=60)  # the access log is told no more often while lines are followed
_LONGEST = 600  # characters of a line that are shown
_LONGEST_UNFINISHED = 65_536  # bytes kept of an access-log line whose end has not come

_EPOCH = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Some lines of the access log: requests, of these answers with a status of 500 or more, when the first began."""

    moment: datetime | None
    requests: int
    errors: int


@dataclass(frozen=True, slots=True)
class Line:
    """One line to show. `tone` is what it is about: a level, a state, `traffic`, `day` or empty."""

    text: str
    tone: str = ""


class Logs:
    """New records of the chosen streams, merged by time."""

    def __init__(self, host: Host, streams: Collection[Stream]) -> None:
        self._host = host
        self._files = {stream: LogFile(host, path, tail=_TAIL) for stream, path in LOGS.items() if stream in streams}
        self._readers = {stream: Reader(stream) for stream in streams}
        self._access = {stream: _AccessLog() for stream in self._files}
        self._cursor = ""
        self._journal_read = _EPOCH
        self.trouble = ""  # why the journal cannot be read

    def read(self, now: datetime) -> list[Record | Traffic]:
        """Return what came since the last time, in order; the journal is asked every other second only."""
        found: list[tuple[datetime, Record | Traffic]] = []
        for stream, reader in self._readers.items():
            # What has no time of its own happened when what stands before it happened.
            moment = _EPOCH
            for item in self._items(stream, reader, now):
                if isinstance(item, Record):
                    moment = max(moment, item.moment or moment)
                    found.append((moment, item))
                else:
                    found.append((item.moment or moment, item))
        found.sort(key=lambda pair: pair[0])
        return [item for _, item in found]

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _items(self, stream: Stream, reader: Reader, now: datetime) -> Iterator[Record | Traffic]:
        if stream is Stream.JOURNAL:
            if now - self._journal_read >= _JOURNAL_SECONDS:
                self._journal_read = now
                yield from reader.feed(self._read_journal())
        else:
            while chunk := self._files[stream].read():
                yield from reader.feed(chunk)
                yield from self._access[stream].feed(chunk)
        yield from reader.end_record()

    def _read_journal(self) -> bytes:
        since = f"--after-cursor={self._cursor}" if self._cursor else f"--lines={_JOURNAL_LINES}"
        tree = [] if self._host.is_running else [f"--root={self._host.root}"]
        output = ["--output=short-iso-precise", "--no-pager", "--quiet", "--show-cursor"]
        argv = ["journalctl", *tree, "--unit", ISTIO, *output, since]
        try:
            lines = self._host.run(argv, timeout=20, check=False).stdout.splitlines(keepends=True)
        except AgentError as error:  # an image may have no journal; the files still have their lines
            self.trouble = error.message
            return b""
        for line in lines:
            if line.startswith(_CURSOR):
                self._cursor = line.removeprefix(_CURSOR).strip()
        return "".join(line for line in lines if not line.startswith(_CURSOR)).encode()


# Envoy's two forms of the access log; what a request says of itself comes after the time and cannot fake a line.
_ACCESS_TEXT = re.compile(rb'^\[(\d{4}-\d\d-\d\dT[\d:.]+Z)\] "[^"\n]*" (\d{1,3}) ', re.MULTILINE)
_ACCESS_JSON = re.compile(rb'^\{(?!\s*"(?:level|time|scope|msg)")[^\n]*\}\s*$', re.MULTILINE)
_JSON_STATUS = re.compile(rb'"response_code":\s*"?(\d{1,3})')
_JSON_TIME = re.compile(rb'"start_time":\s*"([^"\n]{20,40})"')


class _AccessLog:
    """Counts the requests of a log that is read in pieces; lines of other kinds may stand in between."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> Iterator[Traffic]:
        """Yield the requests of the lines that the piece completes, summed up for each minute."""
        lines = self._rest + piece.replace(b"\0", b"")
        end = lines.rfind(b"\n") + 1
        self._rest = lines[end : end + _LONGEST_UNFINISHED]
        sums: dict[bytes, list[int]] = {}
        first: dict[bytes, bytes] = {}  # of each minute
        for time, status in _requests(lines[:end]):
            minute = time[:16]
            first.setdefault(minute, time)
            found = sums.setdefault(minute, [0, 0])
            found[0] += 1
            found[1] += status >= b"500" and len(status) == 3
        for minute, (requests, errors) in sums.items():
            yield Traffic(_moment(first[minute]), requests, errors)


def _requests(lines: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield time and status of each."""
    for text in _ACCESS_TEXT.finditer(lines):
        yield text[1], text[2]
    for line in _ACCESS_JSON.findall(lines):
        time, status = _JSON_TIME.search(line), _JSON_STATUS.search(line)
        if time and status:
            yield time[1], status[1]


def _moment(text: bytes) -> datetime | None:
    try:
        return datetime.fromisoformat(text.decode()).astimezone(UTC)
    except ValueError:
        return None


_SHOWN = frozenset(
    {Effect.RUN_BEGINS, Effect.PROVES, Effect.CONNECTS, Effect.FAILS, Effect.DISTURBS, Effect.STOPPING, Effect.STOPPED}
)
_LOUD = frozenset({"warn", "warning", "error", "fatal", "critical"})
_SETTLED = frozenset({State.HEALTHY, State.DEGRADED})


@dataclass(slots=True)
class _Folded:
    """What was not shown since the last line about it."""

    requests: int = 0
    errors: int = 0
    repeated: int = 0
    since: datetime | None = None


@dataclass(slots=True)
class Story:
    """Makes lines of records. `width` is the terminal's, in columns."""

    width: int = 100
    _diagnosis: Diagnosis = field(default_factory=Diagnosis)
    _open: dict[str, datetime | None] = field(default_factory=dict)  # what was explained and is not over
    _last_shown: dict[str, datetime] = field(default_factory=dict)  # by kind of message
    _folded: _Folded = field(default_factory=_Folded)
    _last: datetime = _EPOCH
    _day: str = ""

    def tell(self, items: Iterable[Record | Traffic]) -> Iterator[Line]:
        """Yield the lines that these make."""
        for item in items:
            if isinstance(item, Traffic):
                self._fold(item)
            else:
                yield from self._record(item)

    def pause(self, now: datetime) -> Iterator[Line]:
        """Yield what time itself brings: that something lasts, that something is over, how much traffic there was."""
        if (since := self._folded.since) is None or now - since >= _TRAFFIC:
            yield from self._unfold(now)
        yield from self._explained(now)

    def end(self, now: datetime) -> Iterator[Line]:
        """Yield what is left when nothing follows."""
        yield from self._unfold(now)
        yield from self._explained(now)

    def _record(self, record: Record) -> Iterator[Line]:
        moment = record.moment or self._last
        self._last = max(self._last, moment)
        rule = rule_for(record)
        self._diagnosis.read(record.line, record.stream)
        # What proves traffic capture in the journal is sudo's line: it says nothing to a person.
        matters = rule.effect in _SHOWN and rule.name != "captured" if rule else record.level in _LOUD
        if matters and not record.message.startswith("FLAG:"):
            kind = rule.name if rule else re.sub(r"\d+", "#", record.message)[:80]
            before = self._last_shown.get(kind)
            if before is not None and moment - before < _AGAIN and not (rule and rule.effect is Effect.RUN_BEGINS):
                self._folded.repeated += 1
                self._folded.since = self._folded.since or moment
            else:
                self._last_shown[kind] = moment
                yield from self._unfold(moment)
                yield from self._dated(moment, _line(record, moment))
        if rule:
            yield from self._explained(moment)

    def _explained(self, moment: datetime) -> Iterator[Line]:
        """Yield what has begun, with sentence and remedy, and what is over."""
        if moment == _EPOCH:
            return
        health = self._diagnosis.health(moment)
        for condition in health.conditions:
            if condition.code not in self._open:
                self._open[condition.code] = condition.since or moment
                yield from self._condition(condition)
        for code in self._over(health):
            began = self._open.pop(code)
            self._last_shown.clear()  # if it comes back, its lines are news
            if code not in {"stopped", "stopping"}:
                took = f", after {_span(moment - began)}" if began and moment > began else ""
                yield Line(f"{_INDENT}↳ recovered: {code}{took}", "healthy")

    def _over(self, health: Health) -> list[str]:
        """A failed sidecar may hide one condition behind another, and a new run has proven nothing yet."""
        if health.state not in _SETTLED:
            return []
        current = {condition.code for condition in health.conditions}
        return [code for code in self._open if code not in current]

    def _condition(self, condition: Condition) -> Iterator[Line]:
        tone = {Severity.FAILED: "failed", Severity.DEGRADED: "degraded", Severity.NOTE: ""}[condition.severity]
        yield from self._wrapped(f"↳ {condition.code}: ", condition.message, tone)
        for line in condition.remedy.splitlines():
            yield from self._wrapped("  to do: ", line, tone)

    def _wrapped(self, first: str, text: str, tone: str) -> Iterator[Line]:
        for line in textwrap.wrap(
            printable(text, _LONGEST),
            max(self.width, 40),
            initial_indent=_INDENT + first,
            subsequent_indent=_INDENT + "    ",
            break_on_hyphens=False,
        ):
            yield Line(line, tone)

    def _fold(self, traffic: Traffic) -> None:
        self._folded.requests += traffic.requests
        self._folded.errors += traffic.errors
        self._folded.since = self._folded.since or traffic.moment
        self._last = max(self._last, traffic.moment or self._last)

    def _unfold(self, moment: datetime) -> Iterator[Line]:
        folded, self._folded = self._folded, _Folded()
        parts = []
        if folded.requests:
            bad = f", {folded.errors} answered with 5xx" if folded.errors else ", none answered with 5xx"
            parts.append(f"{folded.requests} {'request' if folded.requests == 1 else 'requests'}{bad}")
        if folded.repeated:
            parts.append(f"{folded.repeated} {'line' if folded.repeated == 1 else 'lines'} like those above")
        if parts:
            text = f"{_clock(folded.since or moment)}  … {'; '.join(parts)}"
            yield from self._dated(folded.since or moment, Line(text, "traffic"))

    def _dated(self, moment: datetime, line: Line) -> Iterator[Line]:
        day = f"{moment:%Y-%m-%d} UTC" if moment != _EPOCH else ""
        if day and day != self._day:
            self._day = day
            yield Line(f"— {day} —", "day")
        yield line


_INDENT = " " * 11


def _line(record: Record, moment: datetime) -> Line:
    text = printable(record.message, _LONGEST)
    time = _clock(moment) if record.moment else " " * 9
    return Line(f"{time}  {record.stream:<7}  {printable(record.level):<8}  {text}", record.level)


def _clock(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%H:%M:%S}Z" if moment != _EPOCH else " " * 9


def _span(length: timedelta) -> str:
    seconds = int(length.total_seconds())
    if seconds < 60:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 7200 else f"{seconds // 3600} h {seconds // 60 % 60} min"


_COLOURS = {
    "day": "1",
    "traffic": "2",
    "healthy": "32",
    "warn": "33",
    "warning": "33",
    "degraded": "33",
    "error": "31",
    "fatal": "31",
    "critical": "31",
    "failed": "31",
}


def painted(line: Line) -> str:
    """Return the line as a terminal shows it in colour."""
    colour = _COLOURS.get(line.tone)
    return f"\x1b[{colour}m{line.text}\x1b[0m" if colour else line.text
