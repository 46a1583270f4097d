"""When the daemon asks the endpoint: before the token is old, soon after what may pass, rarely where it is refused."""

from collections.abc import Callable
from datetime import datetime, timedelta

from vmmesh_agent.clock import Clock
from vmmesh_agent.errors import AgentError, FetchError

LONGEST_WAIT = 600.0  # seconds between attempts that failed, at most
_FIRST_WAIT = 10.0
_REFUSED_WAIT = 60.0  # a refusal is not hammered
_REFRESH = (0.5, 0.7)  # of the token's life; where in between is chance, so that a fleet does not come at once
_LATE_REFRESH = 0.2  # of what is left of it: an endpoint that has no newer token yet is asked now and then


class Schedule:
    """The moment of the next attempt, at first now. `chance` gives numbers from 0 to 1."""

    def __init__(self, clock: Clock, chance: Callable[[], float]) -> None:
        self._clock = clock
        self._chance = chance
        self._failures = 0
        self._attempted = clock.seconds()
        self._due = clock.seconds()
        self._due_at: datetime | None = None

    def is_due(self, *, is_urgent: bool) -> bool:
        """Is it time? A clock that was set forward makes a token old at once; what is urgent waits less."""
        seconds = self._clock.seconds()
        return (
            seconds >= self._due
            or (self._due_at is not None and self._clock.now() >= self._due_at)
            or (is_urgent and seconds >= self._attempted + LONGEST_WAIT)
        )

    def begins(self) -> None:
        """An attempt begins."""
        self._attempted = self._clock.seconds()

    def forgive(self) -> None:
        """Forget the failures: what they were about has changed."""
        self._failures = 0

    def failed(self, error: AgentError) -> float:
        """Wait exponentially longer, with full jitter, and as long as the endpoint asked. Return how many seconds."""
        self._failures += 1
        growth = min(LONGEST_WAIT, _FIRST_WAIT * 2.0 ** min(self._failures, 10))
        seconds = (_FIRST_WAIT if error.retry else _REFUSED_WAIT) + self._chance() * growth
        return self.wait(max(seconds, error.retry_after if isinstance(error, FetchError) else 0.0))

    def succeeded(self, issued_at: datetime | None, expires_at: datetime) -> None:
        """Wait until the token has used up half of its life and some more."""
        self._failures = 0
        low, high = _REFRESH
        now = self._clock.now()
        issued_at = issued_at or now
        share = low + (high - low) * self._chance()
        fresh = (issued_at - now + (expires_at - issued_at) * share).total_seconds()
        seconds = max(_FIRST_WAIT, fresh, (expires_at - now).total_seconds() * _LATE_REFRESH)
        self.wait(seconds)
        self._due_at = now + timedelta(seconds=seconds)

    def wait(self, seconds: float) -> float:
        """Make the next attempt after so many seconds, whatever the clock says meanwhile."""
        self._due = self._clock.seconds() + seconds
        self._due_at = None
        return seconds
