"""The pages say what the program says."""

import ast
import re
from pathlib import Path

from vmmesh_agent.config import SETTINGS
from vmmesh_agent.rules import CAUSES

_REPOSITORY = Path(__file__).parents[2]
_AGENT = _REPOSITORY / "agent/vmmesh_agent"
_TROUBLESHOOTING = (_REPOSITORY / "docs/troubleshooting.md").read_text()

# Calls whose first argument is the code of an error.
_CODE = re.compile(r"[a-z]+(-[a-z]+)*")
_RAISERS = {"refuse", "Problem", "_RefusedError", "_unreadable"}


def _error_codes() -> set[str]:
    """Every code that the agent's sources give to an error: the keyword `code`, or a raiser's first argument."""
    codes: set[str] = set()
    for path in _AGENT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            arguments = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            arguments += node.args[:1] if name in _RAISERS else []
            leaves = [leaf for argument in arguments for leaf in ast.walk(argument) if isinstance(leaf, ast.Constant)]
            codes |= {leaf.value for leaf in leaves if isinstance(leaf.value, str) and _CODE.fullmatch(leaf.value)}
    return codes - {"code"}  # the argument itself, handed on


def test_every_error_code_is_explained() -> None:
    codes = _error_codes()
    assert len(codes) > 50, "the codes are not found any more: this test has gone blind"
    assert [code for code in sorted(codes) if f"| `{code}` |" not in _TROUBLESHOOTING] == []


def test_every_cause_is_explained_with_the_remedy_that_status_prints() -> None:
    for slug, cause in CAUSES.items():
        row = f"| `{slug}` | {cause.message} | {cause.remedy} |".replace("|", "¦")
        assert row in _TROUBLESHOOTING.replace("\\|", "¦").replace("|", "¦"), slug


def test_every_condition_of_the_machine_is_explained() -> None:
    codes: set[str] = set()
    for module in _AGENT.glob("*.py"):
        codes |= set(re.findall(r'Condition\(\s*"([a-z_]+)"', module.read_text()))
    assert len(codes) > 8, "the codes are not found any more: this test has gone blind"
    assert [code for code in sorted(codes) if f"| `{code}` |" not in _TROUBLESHOOTING] == []


def test_every_setting_is_in_the_table() -> None:
    page = (_REPOSITORY / "docs/configuration.md").read_text()
    for key in SETTINGS:
        section = key.rpartition(".")[0]
        assert f"`{key}`" in page or f"`{section}`" in page, key
