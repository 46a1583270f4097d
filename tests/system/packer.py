"""The Packer example as python-hcl2 reads it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hcl2

from lab.image import REPOSITORY

FOLDER = REPOSITORY / "packaging/packer"


@dataclass(frozen=True)
class Upload:
    """A file of the computer that Packer runs on, and where it comes to be on the machine."""

    source: str
    destination: str


@dataclass(frozen=True)
class Script:
    """Commands, and the command line that runs them in a file."""

    lines: tuple[str, ...]
    execute_command: str

    def command(self, path: str) -> str:
        """The command line that runs the script, which is in this file."""
        return self.execute_command.replace("{{ .Path }}", path)


def template(file: Path = FOLDER / "vmmesh.pkr.hcl") -> dict[str, Any]:
    """Return the whole file; raises what the parser raises where it is no HCL."""
    with file.open() as opened:
        document = _plain(hcl2.load(opened))
    assert isinstance(document, dict)
    return document


def provisioners() -> list[Upload | Script]:
    """Return the steps of the build in their order."""
    (build,) = template()["build"]
    steps: list[Upload | Script] = []
    for ((kind, step),) in (each.items() for each in build["provisioner"]):
        if kind == "file":
            steps.append(Upload(step["source"], step["destination"]))
        else:
            assert kind == "shell"
            steps.append(Script(tuple(step["inline"]), step["execute_command"]))
    return steps


def _plain(value: Any) -> Any:
    """Take away the parser's own marks, and the quotation marks that it leaves around strings since release 8."""
    if isinstance(value, dict):
        return {_plain(key): _plain(each) for key, each in value.items() if not key.startswith("__")}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value.removeprefix('"').removesuffix('"') if isinstance(value, str) else value
