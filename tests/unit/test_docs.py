"""The pages say what the program says."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

from vmmesh_agent import cli
from vmmesh_agent.config import SETTINGS, parse
from vmmesh_agent.errors import ConfigurationError, UsageError

_REPOSITORY = Path(__file__).parents[2]
_PAGES = sorted([_REPOSITORY / "README.md", *(_REPOSITORY / "docs").rglob("*.md")])
_README = (_REPOSITORY / "README.md").read_text()
_CONFIGURATION = (_REPOSITORY / "docs/configuration.md").read_text()
_MINIMUM = (PurePosixPath("/minimum.yaml"), b"endpoint: {url: https://mesh.example.com/v1/bundle}")
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^    .*\n)+", re.MULTILINE)


def test_the_tables_of_troubleshooting_are_what_the_sources_say() -> None:
    argv = [sys.executable, str(_REPOSITORY / "scripts/docs"), "--check"]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- commands ---


def _blocks(page: str) -> Iterator[tuple[str, str]]:
    """Yield each block of code of a page, with its language."""
    yield from _FENCED.findall(page)
    for block in _INDENTED.findall(_FENCED.sub("", page)):
        yield "", re.sub("^    ", "", block, flags=re.MULTILINE)


def _command_lines() -> Iterator[tuple[str, str]]:
    """Yield each `vmmesh-agent …` of the pages: lines of blocks, with a prompt or without, and code within a text."""
    for path in _PAGES:
        page = path.read_text()
        lines = [line for language, block in _blocks(page) if language != "text" for line in block.splitlines()]
        spans = re.findall(r"`(vmmesh-agent [^`]+)`", _FENCED.sub("", page))
        for line in (*lines, *spans):
            words = re.sub(r"^(\[\w+\] )?[#$] |\s+# .*", "", line).partition(" | ")[0]
            if re.match(r"(sudo )?vmmesh-agent ", words):
                yield path.name, words.removeprefix("sudo ")


@pytest.mark.parametrize(("page", "line"), sorted(set(_command_lines())))
def test_a_command_on_a_page_is_one_that_the_program_takes(page: str, line: str) -> None:
    try:
        cli.parser().parse_args(shlex.split(line)[1:])
    except UsageError as error:
        pytest.fail(f"{page}: {line}: {error}")


def test_the_readme_lists_every_command() -> None:
    table = _README.partition("## Commands")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `([a-z-]+)", table, re.MULTILINE)
    assert sorted(listed) == sorted(re.findall(r"^    ([a-z-]+)(?= |$)", cli.parser().format_help(), re.MULTILINE))


# --- configuration ---


def _sections() -> dict[str, str]:
    """Return what the page says of each setting."""
    parts = re.split(r"^### `(.*)`\n", _CONFIGURATION.partition("## Settings")[2], flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_setting_has_a_section_with_its_type() -> None:
    assert list(_sections()) == list(SETTINGS)
    assert [key for key, text in _sections().items() if not re.match(r"\nType: .*\. (Default: |Required)", text)] == []


@pytest.mark.parametrize("key", SETTINGS)
def test_a_settings_default_is_the_one_on_the_page(key: str) -> None:
    said = re.search(r"Default: (?:`(.+?)`|none\b)", _sections()[key])
    if said is None:
        with pytest.raises(ConfigurationError, match=f"{key}: it is required"):
            parse([])
    else:
        default = _default(key)
        assert (None if default in {"", ()} else default) == (yaml.safe_load(said[1]) if said[1] else None)


def _default(key: str) -> Any:
    value: Any = parse([_MINIMUM])
    for name in key.split("."):
        value = getattr(value, name, None)
    return value


def _configurations() -> Iterator[tuple[str, str]]:
    """Yield each example of the configuration, and each that a user-data writes."""
    for path in _PAGES:
        for language, block in _blocks(path.read_text()):
            if language != "yaml" or "apiVersion:" in block:
                continue
            document = yaml.safe_load(block)
            if not block.startswith("#cloud-config"):
                yield path.name, block
                continue
            for file in document.get("write_files", []):
                if file["path"].startswith("/etc/vmmesh-agent/") and file["path"].endswith(".yaml"):
                    yield path.name, file["content"]


@pytest.mark.parametrize(("page", "text"), list(_configurations()))
def test_an_example_of_the_configuration_is_one_that_the_program_takes(page: str, text: str) -> None:
    parse([_MINIMUM, (PurePosixPath(page), text.replace("…", "0" * 64).encode())])


# --- names ---


def test_a_unit_on_a_page_is_one_that_there_is() -> None:
    there = {path.name for path in (_REPOSITORY / "systemd").iterdir()}
    named = {name for path in _PAGES for name in re.findall(r"\bvmmesh-[a-z@-]+\.(?:service|target)", path.read_text())}
    assert len(named) > 2, "the units are not found any more: this test has gone blind"
    assert named - there == set()


@pytest.mark.parametrize("path", _PAGES, ids=lambda path: path.name)
def test_a_file_that_a_page_leads_to_is_there(path: Path) -> None:
    page = _FENCED.sub("", path.read_text())
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page) if "://" not in link]
    assert [link for link in links if not _leads_somewhere(path, *link.partition("#")[::2])] == []
    named = re.findall(r"`((?:agent|docs|packaging|scripts|systemd|tests)/[\w./@-]+)", page)
    assert [name for name in named if not (_REPOSITORY / name).exists()] == []


def _leads_somewhere(page: Path, file: str, heading: str) -> bool:
    target = page.parent / file if file else page
    if not heading:
        return target.exists()
    headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
    return heading in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("path", _PAGES, ids=lambda path: path.name)
def test_the_rows_of_a_table_have_as_many_cells_as_its_head(path: Path) -> None:
    tables = re.findall(r"(?:^\|.*\n)+", _FENCED.sub("", path.read_text()), re.MULTILINE)
    assert [
        table for table in tables if len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) > 1
    ] == []
