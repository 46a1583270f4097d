"""One tree of errors; each says what happened, what to do, and how a command ends."""

import re

import pytest

from vmmesh_agent import errors
from vmmesh_agent.bundle import BundleRefusedError, Problem
from vmmesh_agent.errors import AgentError, ConfigurationError, NotPermittedError, UsageError
from vmmesh_agent.health import State


def everything_below(kind: type[AgentError]) -> list[type[AgentError]]:
    return [kind, *(deeper for child in kind.__subclasses__() for deeper in everything_below(child))]


def test_the_exit_statuses_are_those_of_sysexits() -> None:
    special = {UsageError: 64, NotPermittedError: 77, ConfigurationError: 78}
    for kind in everything_below(AgentError):
        assert kind.exit_status == special.get(kind, 1), kind


def test_the_drawn_tree_is_the_tree() -> None:
    drawn = set(re.findall(r"\b\w+Error\b", errors.__doc__ or ""))
    public = {kind.__name__ for kind in everything_below(AgentError) if not kind.__name__.startswith("_")}
    assert drawn == public


@pytest.mark.parametrize("kind", [kind for kind in everything_below(AgentError) if kind.__module__ == errors.__name__])
def test_an_error_carries_what_a_person_and_a_program_need(kind: type[AgentError]) -> None:
    error = kind("it is broken", code="a-code", hint="mend it", retry=True)
    assert (str(error), error.message, error.code, error.hint, error.retry) == (
        "it is broken", "it is broken", "a-code", "mend it", True,
    )  # fmt: skip
    assert not kind("x", code="y").retry


def test_a_refused_bundle_may_be_mended_where_it_is_made() -> None:
    error = BundleRefusedError(Problem("token-expired", "istio-token", "it expired"))
    assert error.retry
    assert error.hint


def test_a_state_ends_a_command_with_its_status() -> None:
    statuses = {str(state): state.exit_status for state in State}
    assert statuses == {
        "healthy": 0, "failed": 1, "degraded": 2, "starting": 3, "stopped": 3, "not-joined": 3, "unknown": 4,
    }  # fmt: skip
