"""Makes the man pages and the completions of bash and zsh from what the agent says of itself.

    python packaging/manual.py FOLDER

writes vmmesh-agent.1 and the completions from the command line's own parser, and vmmesh-agent-config.5 from
docs/configuration.md. It needs the agent, shtab and mistune. The only date is that of SOURCE_DATE_EPOCH.
"""

import argparse
import os
import re
import textwrap
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mistune
import shtab

from vmmesh_agent import __version__, cli, config, errors, events, hosts, place, report, store, watch
from vmmesh_agent.health import State

_DOCS = Path(__file__).parents[1] / "docs"
_ENVIRONMENT = {
    "https_proxy, all_proxy, no_proxy": "the way to the endpoint and to the package's server",
    "NO_COLOR": "if it is set, nothing is shown in colour",
}
_SEE_ALSO = ("vmmesh-agent-config(5)", "systemd(1)", "journalctl(1)", "hosts(5)", "logrotate(8)")

# What argparse was told it keeps in private attributes only; whoever makes man pages or completions looks there.
_Commands = argparse._SubParsersAction  # noqa: SLF001


def main() -> None:
    """Write the four files into the folder."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("folder", type=Path, metavar="FOLDER")
    folder = options.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    program = completable(cli.parser())
    for name, text in {
        "vmmesh-agent.1": "\n".join(commands_page(program)) + "\n",
        "vmmesh-agent-config.5": "\n".join(configuration_page((_DOCS / "configuration.md").read_text())) + "\n",
        "vmmesh-agent.bash": shtab.complete(program, "bash"),
        "_vmmesh-agent": shtab.complete(program, "zsh"),
    }.items():
        (folder / name).write_text(text)


def completable(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Tell shtab, by their names in the help, which arguments are files and folders."""
    kinds = {"FILE": shtab.FILE, "BUNDLE": shtab.FILE, "DIR": shtab.DIRECTORY}
    for each in (parser, *_commands(parser).values()):
        for action in each._actions:  # noqa: SLF001
            if action.metavar in kinds:
                action.complete = kinds[action.metavar]  # type: ignore[attr-defined]  # shtab looks for it
    return parser


# --- vmmesh-agent(1) ---


def commands_page(program: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the lines of vmmesh-agent(1)."""
    yield from _title("vmmesh-agent", 1)
    yield from [".SH NAME", rf"vmmesh\-agent \- {_summary(program)}"]
    yield from [".SH SYNOPSIS", *_usage(program)]
    yield from [".SH DESCRIPTION", *_filled(program.description or "")]
    yield from [".PP", "Its configuration is described in", r".BR vmmesh\-agent\-config (5)."]
    yield from [".SH OPTIONS", *_options(program)]
    yield ".SH COMMANDS"
    for name, command in _commands(program).items():
        yield from [f".SS {_escaped(name)}", *_usage(command), ".PP", *_filled(_sentence(command.description or ""))]
        yield from _options(command)
    yield from [".SH EXIT STATUS", *_exit_statuses()]
    yield ".SH ENVIRONMENT"
    for name, meaning in _ENVIRONMENT.items():
        yield from [".TP", _bold(name), *_filled(meaning)]
    yield ".SH FILES"
    for path, meaning in _files():
        yield from [".TP", rf"\fI{_escaped(str(path))}\fR", *_filled(meaning)]
    pages = [f".BR {_escaped(page[:-3])} {page[-3:]}" for page in _SEE_ALSO]
    yield from [".SH SEE ALSO", ",\n".join(pages)]


def _summary(program: argparse.ArgumentParser) -> str:
    text = (program.description or "").partition(".")[0]
    return _escaped(text[0].lower() + text[1:])


def _usage(parser: argparse.ArgumentParser) -> list[str]:
    """Return the usage in one line: where argparse breaks it depends on the terminal."""
    words = parser.format_usage().removeprefix("usage: ").replace("[-h] ", "").replace(" [-h]", "").split()
    return [re.sub(r"(?<![\w.])(vmmesh\\-agent|\\-\\-[\w\\-]+)", r"\\fB\1\\fR", _escaped(" ".join(words)))]


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:  # noqa: SLF001
        if action.dest == "help" or isinstance(action, _Commands):
            continue
        name = ", ".join(rf"\fB{_escaped(option)}\fR" for option in action.option_strings)
        value = "" if action.nargs == 0 else rf"\fI{_escaped(_value(action))}\fR"
        yield from [".TP", f"{name} {value}".strip(), *_filled(_meaning(action))]


def _value(action: argparse.Action) -> str:
    choices = f"{{{','.join(map(str, action.choices or ()))}}}"
    return str(action.metavar or choices)


def _meaning(action: argparse.Action) -> str:
    parts = [action.help or ""]
    choices = f"one of {', '.join(map(str, action.choices or ()))}"
    if action.choices and action.metavar and choices != action.help:
        parts.append(choices)
    if action.choices and action.default is not None:
        parts.append(f"default: {action.default}")
    return _sentence("; ".join(part for part in parts if part)).replace("program's", "the program's")


def _exit_statuses() -> Iterator[str]:
    yield from _filled("Of bootstrap, explain, status and wait:")
    meanings: dict[int, list[str]] = {}
    for state in State:
        meanings.setdefault(state.exit_status, []).append(state)
    for status, states in sorted(meanings.items()):
        yield from [".TP", rf"\fB{status}\fR", *_filled(", ".join(states))]
    yield from [".PP", *_filled("Of all commands:")]
    for status, meaning in {
        0: "done; of verify: the bundle is accepted; of doctor: no check failed",
        errors.AgentError.exit_status: "failed; the message says why, and ends with a code",
        errors.UsageError.exit_status: "the command line makes no sense",
        errors.NotPermittedError.exit_status: "this user may not do that",
        errors.ConfigurationError.exit_status: "the configuration is wrong",
    }.items():
        yield from [".TP", rf"\fB{status}\fR", *_filled(meaning)]
    yield from [".PP", *_filled("Of status with --output nagios: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN.")]


def _files() -> list[tuple[object, str]]:
    return [
        (config.FILE, "the configuration"),
        (config.FOLDER / "*.yaml", "more of it; what comes later wins"),
        (events.HOOKS, "programs that the daemon runs when the state changes"),
        (report.FILE, "the daemon's last record, which status shows"),
        (store.FOLDER, "the last verified bundle, for root only"),
        *((entry.path, "placed by the agent") for entry in place.TABLE.values()),
        (place.ETC_HOSTS, f"the lines between “{hosts.BEGIN.decode()}” and “{hosts.END.decode()}” are the agent's"),
        *((path, "log of the sidecar") for path in watch.LOGS.values()),
    ]


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next(dict(action.choices) for action in parser._actions if isinstance(action, _Commands))  # noqa: SLF001


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text else ""


# --- vmmesh-agent-config(5) ---


def configuration_page(markdown: str) -> Iterator[str]:
    """Yield the lines of vmmesh-agent-config(5): the page of the docs as it is, headings as sections."""
    parse = mistune.create_markdown(renderer="ast")
    yield from _title("vmmesh-agent-config", 5)
    yield from [".SH NAME", rf"vmmesh\-agent\-config \- configuration of {_bold('vmmesh-agent')}"]
    section = ""
    for line in _blocks(parse(markdown)):  # type: ignore[arg-type]  # the renderer makes tokens, not text
        if not (section and line == ".PP"):  # a section begins a paragraph by itself
            yield line
        section = line if line.startswith((".SH", ".SS")) else ""
    yield from [".SH SEE ALSO", r".BR vmmesh\-agent (1)"]


def _blocks(tokens: Iterable[dict[str, Any]]) -> Iterator[str]:
    for token in tokens:
        match token["type"]:
            case "heading":
                words = "".join(child["raw"] for child in token["children"])
                section, subsection = f".SH {_escaped(words.upper())}", f".SS {_escaped(words)}"
                yield (".SH DESCRIPTION", section, subsection)[token["attrs"]["level"] - 1]
            case "paragraph" | "block_text":
                yield from [".PP", *map(_protected, _inline(token["children"]).split("\n"))]
            case "block_code":
                code = _escaped(token["raw"].rstrip("\n")).split("\n")
                yield from [".PP", ".RS 4", ".EX", *map(_protected, code), ".EE", ".RE"]
            case "list":
                for item in token["children"]:
                    first, *rest = _blocks(item["children"])
                    yield from [r".IP \(bu 2", *rest] if first == ".PP" else [first, *rest]
            case "blank_line" | "block_html":
                pass
            case unknown:
                raise ValueError(f"configuration.md has a {unknown}, for which there is no man page form here")


def _inline(tokens: Iterable[dict[str, Any]]) -> str:
    return "".join(_span(token) for token in tokens)


def _span(token: dict[str, Any]) -> str:
    match token["type"]:
        case "text":
            return _escaped(token["raw"])
        case "codespan":
            return _bold(token["raw"])
        case "softbreak":
            return "\n"
        case "emphasis":
            return rf"\fI{_inline(token['children'])}\fR"
        case "strong":
            return rf"\fB{_inline(token['children'])}\fR"
        case "link":
            return _inline(token["children"])
        case unknown:
            raise ValueError(f"configuration.md has a {unknown}, for which there is no man page form here")


# --- roff ---

_GLYPHS = {"\\": r"\e", "-": r"\-", "'": r"\(aq", "`": r"\(ga", "^": r"\(ha", "~": r"\(ti", '"': r"\(dq"}


def _title(name: str, section: int) -> list[str]:
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    date = f"{datetime.fromtimestamp(int(epoch), UTC):%Y-%m-%d}" if epoch else ""
    return [f'.TH "{_escaped(name.upper())}" {section} "{date}" "vmmesh\\-agent {__version__}"']


def _escaped(text: str) -> str:
    return "".join(_GLYPHS.get(c, c if c.isascii() else rf"\[u{ord(c):04X}]") for c in text)


def _bold(text: str) -> str:
    return rf"\fB{_escaped(text)}\fR"


def _filled(text: str) -> list[str]:
    return [_protected(_escaped(line)) for line in textwrap.wrap(text, 76, break_on_hyphens=False)]


def _protected(line: str) -> str:
    """Let no line of text begin like a request."""
    return rf"\&{line}" if line.startswith(".") else line


if __name__ == "__main__":
    main()
