"""Time, passed in: what the flow and the daemon know of it, so that a test can let a week go by in a minute."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime


@dataclass(frozen=True, slots=True)
class Clock:
    """The moment (aware, in UTC), seconds that only go forward, and waiting so many seconds.

    The seconds go on while the machine is suspended (CLOCK_BOOTTIME): one that slept for a day is late, and knows it.
    """

    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    seconds: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME)
    sleep: Callable[[float], None] = time.sleep


SYSTEM = Clock()  # the machine's own
