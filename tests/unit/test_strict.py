"""Parsers that refuse rather than guess."""

import pytest

from vmmesh_agent.strict import MalformedError, load_json, load_yaml
from vmmesh_agent.text import shown

DEEP = 100_000


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' stands there twice"),
        ("x:\n  a: 1\n  a: 1\n", "line 3: the key 'a' stands there twice"),
        ("? [a]\n: 1\n", "line 1: a key must be text"),
        ("? {a: 1}\n: 1\n", "line 1: a key must be text"),
        ("a: [\n", "line 2: "),
        ("a: 1\n---\nb: 2\n", "line 2: "),
        ("a: !!python/object/apply:os.getpid []\n", "tag"),
        ("a: !own 1\n", "tag"),
        ("a: &x 1\nb: *x\n", "x"),
        ("a: &x [*x]\n", "x"),
        ("a: *nowhere\n", "nowhere"),
        ("a: \x00\n", ""),
        ("a: \x1b[2J\n", ""),
        ("a: 2026-99-99\n", ""),
        ("a: !!int many\n", ""),
        ("a: !!float many\n", ""),
        ("a: !!binary '&'\n", ""),
        ("a: " + "1" * 5000, ""),
        ("[" * DEEP, "it is nested too deeply"),
        ("[" * DEEP + "]" * DEEP, "it is nested too deeply"),
        ("{a: " * DEEP, "it is nested too deeply"),
        ("- " * DEEP, "it is nested too deeply"),
        ("a: &a [x]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]\n", ""),
    ],
    ids=lambda text: text[:40],
)
def test_yaml_that_could_be_taken_in_two_ways_is_refused(text: str, place: str) -> None:
    with pytest.raises(MalformedError) as caught:
        load_yaml(text)
    assert place in str(caught.value)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


def test_plain_yaml_is_read() -> None:
    text = 'a: {b: [1, true, null, "x"]}\n# comment\nc: |\n  two\n  lines\n'
    assert load_yaml(text) == {"a": {"b": [1, True, None, "x"]}, "c": "two\nlines\n"}
    assert load_yaml("") is None
    assert load_yaml("[" * 50 + "]" * 50) is not None


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' stands there twice"),
        ('{"x": [{"a": 1, "a": 1}]}', "the key 'a' stands there twice"),
        ("{", "line 1, column 2"),
        ('{"a": 1} more', "line 1, column 10"),
        ("", "line 1, column 1"),
        (b"\xff", "not UTF-8"),
        ("[" * DEEP, "it is nested too deeply"),
        ('{"a":' * DEEP, "it is nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", ""),
    ],
    ids=lambda text: str(text)[:40],
)
def test_json_that_could_be_taken_in_two_ways_is_refused(text: str | bytes, place: str) -> None:
    with pytest.raises(MalformedError) as caught:
        load_json(text)
    assert place in str(caught.value)
    assert len(str(caught.value)) < 300


def test_plain_json_is_read() -> None:
    assert load_json(b'{"a": [1, true, null, "\xc3\xa9"]}') == {"a": [1, True, None, "é"]}


@pytest.mark.parametrize("value", ["\x1b[2J", "a\nb", "x" * 10_000, {"a": "\r"}, "'", "é", "\u202e"])
def test_a_strangers_value_is_shown_on_one_short_line(value: object) -> None:
    assert shown(value).isprintable()
    assert len(shown(value)) <= 80
