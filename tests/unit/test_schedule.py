"""When the next attempt is due, with a clock that is set by hand."""

from datetime import datetime, timedelta

import pytest

from factories import MOMENT
from vmmesh_agent.clock import Clock
from vmmesh_agent.errors import AgentError, FetchError
from vmmesh_agent.schedule import LONGEST_WAIT, Schedule

HOUR = timedelta(hours=1)


class Hands:
    """A clock's hands: the wall's, and those that only go forward."""

    def __init__(self) -> None:
        self.wall: datetime = MOMENT
        self.seconds = 1000.0
        self.clock = Clock(now=lambda: self.wall, seconds=lambda: self.seconds)

    def pass_by(self, seconds: float) -> None:
        self.wall += timedelta(seconds=seconds)
        self.seconds += seconds


@pytest.fixture
def hands() -> Hands:
    return Hands()


def waited(hands: Hands, schedule: Schedule, *, is_urgent: bool = False) -> float:
    """Let time pass until an attempt is due, and say how much."""
    begin = hands.seconds
    while not schedule.is_due(is_urgent=is_urgent):
        hands.pass_by(1)
    return hands.seconds - begin


def test_the_first_attempt_is_due_at_once(hands: Hands) -> None:
    assert Schedule(hands.clock, lambda: 0.5).is_due(is_urgent=False)


@pytest.mark.parametrize(("chance", "share"), [(0.0, 0.5), (0.5, 0.6), (1.0, 0.7)])
def test_a_token_is_renewed_when_half_of_its_life_and_some_more_is_over(
    chance: float, share: float, hands: Hands
) -> None:
    schedule = Schedule(hands.clock, lambda: chance)
    schedule.succeeded(MOMENT, MOMENT + HOUR)
    assert waited(hands, schedule) == pytest.approx(3600 * share, abs=1)


def test_an_endpoint_without_a_newer_token_is_asked_now_and_then(hands: Hands) -> None:
    schedule = Schedule(hands.clock, lambda: 0.5)
    asked = 0
    while hands.wall < MOMENT + HOUR:
        schedule.succeeded(MOMENT, MOMENT + HOUR)
        waited(hands, schedule)
        asked += 1
    assert 5 < asked < 25


def test_a_clock_that_was_set_forward_makes_it_due(hands: Hands) -> None:
    schedule = Schedule(hands.clock, lambda: 0.5)
    schedule.succeeded(MOMENT, MOMENT + HOUR)
    hands.wall += timedelta(days=1)
    assert schedule.is_due(is_urgent=False)


def test_a_clock_that_was_set_back_does_not_put_it_off(hands: Hands) -> None:
    schedule = Schedule(hands.clock, lambda: 0.5)
    schedule.succeeded(MOMENT, MOMENT + HOUR)
    hands.wall -= timedelta(days=1)
    assert waited(hands, schedule) == pytest.approx(3600 * 0.6, abs=1)


@pytest.mark.parametrize(("retry", "least"), [(True, 10), (False, 60)])
def test_failures_are_ever_further_apart_up_to_a_limit(retry: bool, least: float, hands: Hands) -> None:
    schedule = Schedule(hands.clock, lambda: 1.0)
    trouble = AgentError("no", code="no", retry=retry)
    waits = [schedule.failed(trouble) for _ in range(12)]
    assert waits == sorted(waits)
    assert (waits[0], waits[-1]) == (least + 20, least + LONGEST_WAIT)
    schedule.forgive()
    assert schedule.failed(trouble) == waits[0]


def test_an_endpoint_that_says_when_to_come_again_is_left_alone_until_then(hands: Hands) -> None:
    schedule = Schedule(hands.clock, lambda: 0.0)
    busy = FetchError("busy", code="busy", retry=True)
    busy.retry_after = 900.0
    assert schedule.failed(busy) == waited(hands, schedule) == 900


def test_what_is_urgent_waits_less_but_is_not_hammered(hands: Hands) -> None:
    schedule = Schedule(hands.clock, lambda: 0.5)
    schedule.begins()
    schedule.succeeded(MOMENT, MOMENT + 10 * HOUR)
    assert waited(hands, schedule, is_urgent=True) == pytest.approx(LONGEST_WAIT, abs=1)
