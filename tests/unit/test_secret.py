"""A secret cannot be logged by accident."""

import copy
import json
import logging
import traceback
from dataclasses import dataclass

import pytest

from vmmesh_agent.secret import Secret

TEXT = "hunter2"


@dataclass
class Holder:
    token: Secret


@pytest.mark.parametrize(
    "shown",
    [
        str(Secret(TEXT)),
        repr(Secret(TEXT)),
        f"{Secret(TEXT)} {Secret(TEXT)!r} {Secret(TEXT)!s}",
        "%s %r" % (Secret(TEXT), Secret(TEXT)),  # noqa: UP031  # this too must not show it
        "{} {!r}".format(Secret(TEXT), Secret(TEXT)),  # noqa: UP032
        str(Holder(Secret(TEXT))),
        str([Secret(TEXT)]),
        str({"token": Secret(TEXT)}),
        str(ValueError(Secret(TEXT))),
        "".join(traceback.format_exception(ValueError("no", Secret(TEXT)))),
        str(copy.deepcopy(Secret(TEXT))),
    ],
)
def test_a_secret_is_masked_however_it_is_shown(shown: str) -> None:
    assert TEXT not in shown
    assert shown


def test_a_secret_is_masked_in_a_log(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("test").warning("token %s %r", Secret(TEXT), Holder(Secret(TEXT)))
    assert caplog.messages
    assert TEXT not in caplog.text


def test_a_secret_does_not_go_into_json_unseen() -> None:
    with pytest.raises(TypeError):
        json.dumps({"token": Secret(TEXT)})


def test_only_revealing_gives_the_text() -> None:
    assert Secret(TEXT).reveal() == TEXT


def test_equal_secrets_are_equal() -> None:
    assert Secret(TEXT) == Secret(TEXT)
    assert Secret(TEXT) != Secret("hunter3")
    assert Secret(TEXT) != TEXT
    assert len({Secret(TEXT), Secret(TEXT), Secret("ä")}) == 2
