"""Parsers that refuse rather than guess.

PyYAML and json both take the last of two equal keys in silence, and both end a deeply nested document with a
RecursionError; input that decides what runs as root deserves an answer instead.
"""

import json
from collections.abc import Hashable
from typing import Any

import yaml

# The C loader is some twenty times faster; wheels and distributions carry it, a build from source may not.
_SafeLoader: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


_MAX_DEPTH = 100  # levels; what is written by people or by Kubernetes has ten


class MalformedError(ValueError):
    """The text is not what it says it is; the message names the place."""


class _StrictLoader(_SafeLoader):  # type: ignore[misc, valid-type]  # the base is chosen at run time
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise MalformedError(f"line {key_node.start_mark.line + 1}: a key must be text")
            if key in seen:
                raise MalformedError(f"line {key_node.start_mark.line + 1}: the key {key!r} stands there twice")
            seen.add(key)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def load_yaml(text: str) -> Any:
    """Load one YAML document without tags, aliases, twice-given keys or bottomless nesting."""
    try:
        _refuse_bombs(text)
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506  # derived from the safe loader
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise MalformedError(f"{line}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise MalformedError(str(error).partition("\n")[0]) from None
    except RecursionError:
        raise MalformedError("it is nested too deeply") from None
    except ValueError as error:  # a timestamp such as 2026-99-99
        raise error if isinstance(error, MalformedError) else MalformedError(str(error)) from None


def _refuse_bombs(text: str) -> None:
    """Look at the events before anything is built of them.

    libyaml's builder overflows the stack of the process at some ten thousand levels, and a few aliases make a small
    text a huge document as soon as somebody prints it. What istioctl and people write here has neither.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise MalformedError(f"{_line_of(event)}aliases (*{event.anchor}) are not accepted; write it out")
        if isinstance(event, yaml.NodeEvent) and getattr(event, "tag", None) is not None:
            raise MalformedError(f"{_line_of(event)}tags (!…) are not accepted")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            raise MalformedError(f"{_line_of(event)}it is nested too deeply")


def _line_of(event: yaml.Event) -> str:
    return f"line {event.start_mark.line + 1}: " if event.start_mark else ""


def load_json(text: str | bytes) -> Any:
    """Load one JSON document without twice-given keys or bottomless nesting."""
    try:
        return json.loads(text, object_pairs_hook=_no_key_twice)
    except json.JSONDecodeError as error:
        raise MalformedError(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except UnicodeDecodeError:
        raise MalformedError("it is not UTF-8 text") from None
    except RecursionError:
        raise MalformedError("it is nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise error if isinstance(error, MalformedError) else MalformedError(str(error)) from None


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise MalformedError(f"the key {twice!r} stands there twice")
    return mapping
