"""From lines to health: what a competent operator would say at a given moment.

Pure: lines and a moment in, `Health` out. The daemon feeds it as the files grow, `explain` feeds it whole
files. How it judges:

- A new run forgets the old one, but remembers that it died: twice is a crash loop, not a start.
- A success clears what it proves and nothing else. "Connected" proves that istiod is reached and trusted;
  that it lets us in shows when the stream lives on.
- Persistence is time, never a count: retries go on for ever and their pace changes.
- Of several causes of one thing the newest that persists is right; a cause hides its consequences.
- Once it has served, a sidecar that loses istiod goes on with its last good configuration: degraded, and
  failed when its certificate has run out.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from vmmesh_agent.health import Condition, Health, Severity, State, worst_first
from vmmesh_agent.records import Reader, Record, Stream
from vmmesh_agent.rules import CAUSES, Aspect, Effect, Rule, rule_for

_STARTING = timedelta(seconds=60)  # a start that takes longer is one that fails
_LASTING = timedelta(seconds=10)  # a stream that lived this long was let in: refusals come within milliseconds
_PERSISTENT = timedelta(seconds=5)  # shorter than any gap between two rounds of retries
_BLIP = timedelta(seconds=30)  # a disturbance is reported when it outlives this
_STOPPING = timedelta(seconds=40)  # TimeoutStopSec is 30: then systemd kills
_REPEATED = timedelta(minutes=3)  # Envoy says at least each minute that its stream is still closed
_EVIDENCE = 1_000  # characters of a line: a rejected listener can be a novel
_CRASH_LOOP = 2  # runs that died in a row

_NO_TIME = timedelta(0)

# One thing can fail for one reason at a time: the newest cause replaces the older.
_EXCLUSIVE = frozenset({Aspect.CERTIFICATE, Aspect.CONNECTION, Aspect.ADMISSION})
# What a sidecar that has served survives without.
_SURVIVED = _EXCLUSIVE | {Aspect.TOKEN}
# What need not be right yet in the first minute.
_EARLY = frozenset({Aspect.READINESS, Aspect.DNS, Aspect.PROBE})
_PROCESSES = frozenset({Aspect.ENVOY, Aspect.AGENT})
# A run that another follows without a stop has died, if one of these was wrong.
_DEADLY = _PROCESSES | {Aspect.MACHINE, Aspect.CAPTURE}

_SINCE = re.compile(r"closed since (\d{1,9})s ago")
_TTL = re.compile(r"\bttl=(?:(\d{1,6})h)?(?:(\d{1,2})m(?!s))?(?:(\d{1,2})(?:\.\d+)?s)?")


@dataclass(frozen=True, slots=True)
class _Failure:
    """A cause at work: raised when, last seen when (and as the how-manieth record)."""

    rule: Rule
    aspect: Aspect
    stream: Stream
    line: str
    since: datetime | None
    last: datetime | None
    order: int
    stated: timedelta = _NO_TIME  # how long the line itself says that it lasts

    def lasted(self, moment: datetime | None) -> timedelta | None:
        """Return for how long it has been so, None where no time is known."""
        if self.since is None or moment is None:
            return self.stated or None
        return max(moment - self.since, self.stated)


class _Run:
    """What is known of one run of the sidecar, from its start (if that was seen) to now."""

    def __init__(self, began: Record | None = None) -> None:
        self.began = began
        self.since = began.moment if began else None
        self.serves = False  # it has had a configuration and a certificate
        self.signed = False
        self.signed_until: datetime | None = None
        self.connected = False  # a stream opened and nothing was said against it since
        self.connected_since: datetime | None = None
        self.connected_stream: Stream | None = None
        self.admitted = False  # such a stream lived on
        self.envoy_since: datetime | None = None
        self.stopping: _Failure | None = None
        self.stopped: _Failure | None = None
        self.failures: dict[tuple[Aspect, str, Effect], _Failure] = {}

    def died_of(self, aspects: frozenset[Aspect]) -> bool:
        """Tell whether one of these ended the run, rather than somebody who asked."""
        return not (self.stopping or self.stopped) and any(
            failure.aspect in aspects and failure.rule.severity is Severity.FAILED for failure in self.failures.values()
        )

    def age(self, moment: datetime | None) -> timedelta | None:
        return moment - self.since if moment and self.since else None

    def is_young(self, moment: datetime | None) -> bool:
        age = self.age(moment)
        return self.began is not None and (age is None or age < _STARTING)

    def has_young_envoy(self, moment: datetime | None) -> bool:
        return bool(moment and self.envoy_since and moment - self.envoy_since < _STARTING)

    def fails_at(self, *aspects: Aspect) -> bool:
        return any(aspect in aspects for aspect, _, _ in self.failures)

    @property
    def seems_to_serve(self) -> bool:
        """A certificate and a stream are all that a log shows where nobody asks whether Envoy is ready."""
        likely = self.connected and (self.signed or self.admitted)
        return (self.serves or likely) and not self.fails_at(Aspect.READINESS, Aspect.DNS)

    def clear(self, aspects: Iterable[Aspect]) -> None:
        for key in [key for key in self.failures if key[0] in aspects]:
            del self.failures[key]

    def _forget_rejections(self, connected_since: datetime) -> None:
        """On a new stream istiod sends everything anew: what Envoy did not refuse again by now, it has accepted."""
        for key, failure in list(self.failures.items()):
            if key[0] is Aspect.CONFIGURATION and failure.last and failure.last < connected_since:
                del self.failures[key]

    def settle(self, moment: datetime | None) -> None:
        """Believe in a stream that has lived long enough."""
        if self.connected and moment and self.connected_since and moment - self.connected_since >= _LASTING:
            self.clear({Aspect.ADMISSION, Aspect.TOKEN})
            self._forget_rejections(self.connected_since)
            self.admitted = True
            self.serves = self.serves or self.signed or self.began is None


class Diagnosis:
    """The running judgement of one sidecar."""

    def __init__(self) -> None:
        self._readers = {stream: Reader(stream) for stream in Stream}
        self._run = _Run()
        self._dead: list[tuple[_Failure, ...]] = []  # the failures of runs that died in a row
        self._last: datetime | None = None
        self._count = 0
        self.raised: Counter[str] = Counter()  # how many messages named each cause

    # --- reading ------------------------------------------------------------

    def feed(self, piece: bytes, stream: Stream) -> None:
        """Read a piece of a file; an unfinished line waits for its rest."""
        self._take(self._readers[stream].feed(piece))

    def read(self, line: str | bytes, stream: Stream) -> None:
        """Read a line, or several, with or without the last end."""
        lines = line if isinstance(line, bytes) else line.encode(errors="replace")
        self.feed(lines if lines.endswith(b"\n") else lines + b"\n", stream)

    def end(self) -> None:
        """Say that nothing more comes: a last line without its end is a line."""
        for reader in self._readers.values():
            self._take(reader.end())

    # --- judging ------------------------------------------------------------

    def health(self, now: datetime | None) -> Health:
        """Judge at `now` (aware); None means the moment of the last line: the end of an excerpt."""
        for reader in self._readers.values():
            self._take(reader.end_record())
        traffic = max(filter(None, (reader.traffic_moment for reader in self._readers.values())), default=None)
        if not self._count and not traffic:
            return Health(State.UNKNOWN)
        moment = now or max(filter(None, (self._last, traffic)), default=None)
        run = self._run
        run.settle(moment)
        # An Envoy that writes an access log has listeners, so it has got its configuration.
        run.serves = run.serves or bool(run.signed and traffic and run.since and traffic > run.since)
        if ended := self._ended(moment):
            return ended
        conditions = self._conditions(run.failures.values(), moment, at_end=now is None)
        if not conditions and run.began and not run.seems_to_serve:
            conditions = self._unfinished(moment)
            if not conditions and run.is_young(moment):
                return Health(State.STARTING)
        if not conditions:
            return Health(State.HEALTHY)
        worst = conditions[0]
        return Health(State.FAILED if worst.severity is Severity.FAILED else State.DEGRADED, worst.code, conditions)

    def _ended(self, moment: datetime | None) -> Health | None:
        """Judge a sidecar that was asked to stop."""
        run = self._run
        ended = run.stopped or run.stopping
        if ended is None:
            return None
        lasted = ended.lasted(moment)
        if run.stopped or (lasted is not None and lasted > _STOPPING and self._last == ended.last):
            return Health(State.STOPPED, "stopped", (_condition(ended, "stopped", Severity.NOTE),))
        return Health(State.DEGRADED, "stopping", (_condition(ended, "stopping", Severity.DEGRADED),))

    def _unfinished(self, moment: datetime | None) -> tuple[Condition, ...]:
        """Judge a start in which nothing failed and that has not come to serve: empty while it may."""
        run = self._run
        if len(self._dead) >= _CRASH_LOOP:
            return self._conditions(self._dead[-1], moment, at_end=True)
        # The journal falls silent when the agent has begun: no news is good news there.
        if run.is_young(moment) or run.began is None or run.began.stream is Stream.JOURNAL:
            return ()
        cause = CAUSES["not_ready_no_config"]
        return (
            Condition(
                "not_ready_no_config", Severity.FAILED, cause.message, cause.remedy, run.began.line, run.began.moment
            ),
        )

    def _conditions(
        self, failures: Iterable[_Failure], moment: datetime | None, *, at_end: bool
    ) -> tuple[Condition, ...]:
        run = self._run
        reported: list[_Failure] = []
        by_aspect: dict[Aspect, list[_Failure]] = {}
        for failure in failures:
            if self._counts(failure, moment, at_end=at_end):
                by_aspect.setdefault(failure.aspect, []).append(failure)
        for aspect, found in by_aspect.items():
            reported += [_newest_that_persists(found, moment)] if aspect in _EXCLUSIVE else found
        hidden = frozenset[str]().union(*(CAUSES[failure.rule.cause].hides for failure in reported))
        told: dict[str, Condition] = {}
        for failure in sorted(reported, key=lambda each: _rank(each, moment), reverse=True):
            cause = failure.rule.cause
            if cause not in hidden and cause not in told:
                told[cause] = _condition(failure, cause, _severity(failure, run, moment))
        return worst_first(told.values())

    def _counts(self, failure: _Failure, moment: datetime | None, *, at_end: bool) -> bool:
        """Tell whether a failure is worth a word at this moment, or may still pass by itself."""
        run = self._run
        young = run.is_young(moment) or (failure.aspect in _EXCLUSIVE and run.has_young_envoy(moment))
        if failure.aspect in _EARLY and young:
            return False
        if failure.stream is Stream.ERR and failure.aspect in {Aspect.CONNECTION, Aspect.ADMISSION}:
            silent = moment - failure.last if moment and failure.last else _NO_TIME
            if silent > _REPEATED:
                return False
        if failure.rule.effect is not Effect.DISTURBS:
            # The token is looked for before the certificate is used that makes it needless.
            return failure.aspect is not Aspect.TOKEN or not self._token_may_be_needless(failure, moment)
        lasted = failure.lasted(moment)
        if lasted is not None and lasted >= _BLIP:
            return True
        return at_end and not young

    def _token_may_be_needless(self, failure: _Failure, moment: datetime | None) -> bool:
        """Tell whether a certificate may do without the token: nobody has refused it so far."""
        run = self._run
        just_looked = run.is_young(moment) and (failure.lasted(moment) or _NO_TIME) < _LASTING
        return (just_looked or run.connected) and not run.fails_at(*_EXCLUSIVE)

    # --- taking in ----------------------------------------------------------

    def _take(self, records: Iterable[Record]) -> None:
        for record in records:
            rule = rule_for(record)
            # A line without a head that no rule knows is not the sidecar's: it is no sign of anything.
            self._count += bool(rule or record.moment or record.level)
            if self._is_of_an_older_run(record):
                continue
            if record.moment:
                self._last = record.moment
                self._run.settle(record.moment)
            # Envoy's debug lines dump headers: a user's words.
            dump = record.scope.startswith("envoy") and record.level in {"debug", "trace"}
            if rule and not dump:
                self._apply(rule, record)

    def _is_of_an_older_run(self, record: Record) -> bool:
        """Tell a line that another file had in store from before this run; one file is in order by itself."""
        began = self._run.began
        return (
            began is not None
            and began.moment is not None
            and record.moment is not None
            and record.stream is not began.stream
            and record.moment <= began.moment
        )

    def _is_of_an_older_stream(self, record: Record) -> bool:
        """Tell how a stream ended that has a successor by now, in a line that another file had in store."""
        run = self._run
        return (
            run.connected
            and record.stream is not run.connected_stream
            and record.moment is not None
            and run.connected_since is not None
            and record.moment < run.connected_since
        )

    def _apply(self, rule: Rule, record: Record) -> None:
        run = self._run
        match rule.effect:
            case Effect.RUN_BEGINS:
                self._begin(record)
            case Effect.STARTING:
                if run.began is None and not run.serves:
                    run.began, run.since = record, record.moment
            case Effect.ENVOY_BEGINS:
                run.envoy_since = record.moment
                run.clear({Aspect.ENVOY, Aspect.AGENT})
            case Effect.PROVES:
                self._prove(rule, record)
            case Effect.CONNECTS:
                run.clear({Aspect.CONNECTION})
                run.connected, run.connected_since = True, record.moment
                run.connected_stream = record.stream
            case Effect.STOPPING:
                if not run.stopping and not run.died_of(_PROCESSES):
                    run.stopping = self._failure(rule, Aspect.AGENT, record)
                elif run.stopping:
                    run.stopping = replace(run.stopping, last=record.moment)
            case Effect.STOPPED:
                if not run.died_of(_PROCESSES):
                    run.stopped = run.stopped or self._failure(rule, Aspect.AGENT, record)
            case Effect.FAILS | Effect.DISTURBS:
                self._fail(rule, record)

    def _begin(self, record: Record) -> None:
        if self._run.died_of(_DEADLY):
            self._dead.append(tuple(self._run.failures.values()))
        elif self._run.stopped or self._run.serves:
            self._dead.clear()
        self._run = _Run(record)

    def _prove(self, rule: Rule, record: Record) -> None:
        run = self._run
        run.clear(rule.proves)
        if Aspect.CERTIFICATE in rule.proves:
            run.stopping = run.stopped = None
            run.signed = True
            run.signed_until = _valid_until(record) or run.signed_until
        # The journal alone cannot tell more than that the start script has done its part.
        script_done = Aspect.CAPTURE in rule.proves and (not run.began or run.began.stream is Stream.JOURNAL)
        if script_done or Aspect.ADMISSION in rule.proves:
            run.serves = True
            self._dead.clear()

    def _fail(self, rule: Rule, record: Record) -> None:
        run = self._run
        aspect = rule.aspect(record)
        if aspect is None or (run.stopping and aspect is not Aspect.MACHINE) or run.stopped:
            return
        if aspect in {Aspect.CONNECTION, Aspect.ADMISSION}:
            if self._is_of_an_older_stream(record):
                return
            run.connected = False
        self.raised[rule.cause] += 1
        if aspect is Aspect.ADMISSION:
            run.clear({Aspect.CONNECTION})  # who is refused has been heard
        failure = self._failure(rule, aspect, record)
        key = (aspect, rule.cause, rule.effect)
        if known := run.failures.get(key):
            since = min(filter(None, (known.since, failure.since)), default=None)
            worst = max(rule, known.rule, key=lambda each: each.severity)
            failure = replace(failure, since=since, rule=worst)
        run.failures[key] = failure

    def _failure(self, rule: Rule, aspect: Aspect, record: Record) -> _Failure:
        found = _SINCE.search(record.message)
        stated = timedelta(seconds=int(found[1])) if found else _NO_TIME
        since = record.moment - stated if record.moment else None
        return _Failure(rule, aspect, record.stream, record.line, since, record.moment, self._count, stated)


def _newest_that_persists(failures: list[_Failure], moment: datetime | None) -> _Failure:
    return max(failures, key=lambda each: _rank(each, moment))


def _rank(failure: _Failure, moment: datetime | None) -> tuple[bool, bool, int]:
    """Order failures: a real one before a disturbance, one that persists before a blip, the newest last."""
    lasted = failure.lasted(moment)
    return failure.rule.effect is Effect.FAILS, lasted is None or lasted >= _PERSISTENT, failure.order


def _severity(failure: _Failure, run: _Run, moment: datetime | None) -> Severity:
    expired = run.signed_until is not None and moment is not None and moment > run.signed_until
    if failure.aspect in _SURVIVED and run.serves and not expired:
        return Severity.DEGRADED
    return failure.rule.severity


def _condition(failure: _Failure, cause: str, severity: Severity) -> Condition:
    told = CAUSES[cause]
    return Condition(cause, severity, told.message, told.remedy, failure.line.strip()[:_EVIDENCE], failure.since)


def _valid_until(record: Record) -> datetime | None:
    found = _TTL.search(record.message)
    if found is None or record.moment is None:
        return None
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return record.moment + timedelta(hours=hours, minutes=minutes, seconds=seconds)
