"""The man pages are sound, and the shells complete what the program takes."""

import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path

import pytest

from vmmesh_agent import cli
from vmmesh_agent.config import SETTINGS
from vmmesh_agent.health import State

_REPOSITORY = Path(__file__).parents[2]
_PAGES = ["vmmesh-agent.1", "vmmesh-agent-config.5"]
_COMMANDS = re.findall(r"^    ([a-z-]+)(?= |$)", cli.parser().format_help(), re.MULTILINE)


def _make(folder: Path, **environment: str) -> Path:
    argv = [sys.executable, str(_REPOSITORY / "packaging/manual.py"), str(folder)]
    subprocess.run(argv, check=True, env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000", **environment})
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make(tmp_path_factory.mktemp("manual"))


# --- man pages ---


def _shown(page: Path) -> str:
    argv = ["man", "--warnings", "--local-file", str(page)]
    done = subprocess.run(
        argv, check=True, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C.UTF-8", "MANWIDTH": "100"}
    )
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("page", _PAGES)
def test_a_page_gives_no_warning(made: Path, page: str) -> None:
    assert _shown(made / page)
    done = subprocess.run(["mandoc", "-T", "lint", "-W", "warning", made / page], check=False, capture_output=True)
    assert (done.stdout, done.returncode) == (b"", 0)


def test_the_page_of_the_commands_has_each_with_its_options(made: Path) -> None:
    page = _shown(made / "vmmesh-agent.1")
    for name in _COMMANDS:
        assert f"\n   {name}\n       vmmesh-agent {name}" in page
    for words in ("--dry-run", "--tarfile FILE", "--for STATE", "--output {human,json,prometheus,nagios}", "77", "78"):
        assert words in page


def test_the_page_of_the_configuration_has_each_setting_with_its_example(made: Path) -> None:
    page = _shown(made / "vmmesh-agent-config.5")
    for key in SETTINGS:
        assert f"\n   {key}\n       Type: " in page
    assert "\n           endpoint:\n             credential:\n               join_token_file: " in page


def test_what_is_made_is_the_same_each_time_and_has_the_date_that_it_is_given(made: Path, tmp_path: Path) -> None:
    again = _make(tmp_path / "again", COLUMNS="40", PYTHONHASHSEED="7", TZ="Asia/Tokyo", LC_ALL="C")
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in made.iterdir()
    }
    assert b'"2023-11-14"' in (made / "vmmesh-agent.1").read_bytes()
    later = _make(tmp_path / "later", SOURCE_DATE_EPOCH="1800000000")
    assert b'"2027-01-15"' in (later / "vmmesh-agent.1").read_bytes()


# --- completions ---

# What is typed before the tabulator → the arguments that the command then gets.
_TYPED = {
    "image": "image-clean",
    "bootstrap --dry": "bootstrap --dry-run",
    "status --output prom": "status --output prometheus",
    "wait --for not": "wait --for not-joined",
    "verify bun": "verify bundle.tar",
    "--root a-tr": "--root a-tree/",
}
_SHELLS = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "--no-rcs", "--interactive"],
}
# A shell that shows its prompt has taken over the terminal; what is typed earlier, the terminal itself would edit.
_SET_UP = {
    "bash": """. /usr/share/bash-completion/bash_completion
        vmmesh-agent() { echo "it got: <$*>"; }; PS1='rea''dy> '\n""",
    "zsh": """fpath=($COMPLETIONS $fpath); autoload -Uz compinit; compinit -u -D; setopt no_auto_remove_slash
        vmmesh-agent() { echo "it got: <$*>"; }; PS1='rea''dy> '\n""",
}


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    """Return a folder with something to be named; what was made lies where the shells look for it."""
    folder = tmp_path / "here"
    (folder / "a-tree").mkdir(parents=True)
    (folder / "a-trap").touch()
    (folder / "bundle.tar").touch()
    (tmp_path / "completions").mkdir()
    (tmp_path / "completions/vmmesh-agent").write_bytes((made / "vmmesh-agent.bash").read_bytes())
    (tmp_path / "completions/_vmmesh-agent").write_bytes((made / "_vmmesh-agent").read_bytes())
    return folder


def _type(shell: str, keys: str, here: Path) -> str:
    """Type keys into an interactive shell at a terminal of its own, and return what it shows from then on."""
    ours, its = pty.openpty()
    environment = {
        **os.environ,
        "TERM": "dumb",
        "HOME": str(here),
        "BASH_COMPLETION_USER_DIR": str(here.parent),
        "COMPLETIONS": str(here.parent / "completions"),
    }
    with subprocess.Popen(
        _SHELLS[shell], stdin=its, stdout=its, stderr=its, cwd=here, env=environment, start_new_session=True
    ):
        os.close(its)
        with open(ours, "r+b", buffering=0) as terminal:  # noqa: PTH123  # a descriptor, not a path
            terminal.write(_SET_UP[shell].encode())
            shown = b"".join(_read_until(terminal, b"ready> "))
            terminal.write(f"{keys}exit\n".encode())
            shown = b"".join(_read_until(terminal, None))
    return shown.decode(errors="replace")


def _read_until(terminal: FileIO, mark: bytes | None) -> Iterator[bytes]:
    shown = b""
    with suppress(OSError):  # the shell has ended, and its terminal with it
        while chunk := terminal.read(4096):
            shown += chunk
            yield chunk
            if mark and mark in shown:
                return


@pytest.mark.parametrize("shell", _SHELLS)
def test_a_shell_completes_what_was_begun(here: Path, shell: str) -> None:
    shown = _type(shell, "".join(f"vmmesh-agent {typed}\t\n" for typed in _TYPED), here)
    assert re.findall("it got: <(.*)>", shown) == list(_TYPED.values())


@pytest.mark.parametrize("shell", _SHELLS)
def test_a_shell_offers_every_command_and_every_state(here: Path, shell: str) -> None:
    clear_line = "\x15"
    shown = _type(shell, f"vmmesh-agent \t\t{clear_line}vmmesh-agent wait --for \t\t{clear_line}", here)
    assert [word for word in (*_COMMANDS, *State) if word not in shown] == []
