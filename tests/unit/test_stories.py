"""Each story of docs/stories.md is told by tests that there are."""

import ast
import re
from pathlib import Path

_REPOSITORY = Path(__file__).parents[2]
_ROWS = re.findall(r"^\| \d+ \|.*$", (_REPOSITORY / "docs/stories.md").read_text(), re.MULTILINE)
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_the_stories_are_all_there() -> None:
    assert [int(row.split("|")[1]) for row in _ROWS] == list(range(1, 27))


def test_each_story_is_told_by_tests_that_there_are() -> None:
    """A scenario, too, is a function of its file: a parametrized test runs it under its name."""
    for row in _ROWS:
        told = _TEST.findall(row)
        assert told, row
        assert [name for file, name in told if name not in _runs(file)] == [], row


def _runs(file: str) -> set[str]:
    """Return the names of the tests of a file, and of the scenarios that they run."""
    functions = [node for node in ast.parse((_REPOSITORY / file).read_text()).body if isinstance(node, ast.FunctionDef)]
    return {node.name for node in functions if node.name.startswith("test_") or node.decorator_list}
