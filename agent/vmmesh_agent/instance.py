"""The configuration that was given to this very instance: on the kernel command line, or as its cloud's user-data.

For images without cloud-init, and off unless an image enables `vmmesh-agent-configure@SOURCE.service`. What is given is
judged with all else that is configured before a byte of it is written. Whoever may run a program on the machine can
read either source, so what suits them as a credential is a join token for one machine.
"""

import base64
import binascii
import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from vmmesh_agent import config, strict
from vmmesh_agent.errors import AgentError, ConfigurationError
from vmmesh_agent.fetch import Metadata, user_data
from vmmesh_agent.host import ROOT, Host

FILE = config.FOLDER / "50-instance.yaml"
JOIN_TOKEN = PurePosixPath("/etc/vmmesh-agent/join-token")
# Where each kind of cloud has its user-data, as its own documentation says.
CLOUDS: Mapping[str, Metadata] = {
    # Amazon's IMDSv2; clouds that only have the older version (OpenStack) refuse the token and need none.
    "ec2": Metadata(
        "http://169.254.169.254/latest/user-data",
        session="http://169.254.169.254/latest/api/token",
        session_header="X-aws-ec2-metadata-token",
    ),
    "aliyun": Metadata(
        "http://100.100.100.200/latest/user-data",
        session="http://100.100.100.200/latest/api/token",
        session_header="X-aliyun-ecs-metadata-token",
    ),
    "gce": Metadata(
        "http://169.254.169.254/computeMetadata/v1/instance/attributes/user-data",
        headers={"Metadata-Flavor": "Google"},
    ),
    "azure": Metadata(
        "http://169.254.169.254/metadata/instance/compute/userData?api-version=2021-01-01&format=text",
        headers={"Metadata": "true"},
        is_base64=True,
    ),
}

_COMMAND_LINE = PurePosixPath("/proc/cmdline")
_PREFIX = "vmmesh."
_TOKEN = "join_token"  # noqa: S105  # beside the settings: the token itself
_PATIENCE = 60.0  # seconds: at boot the network may only be coming


def configure(
    host: Host, cloud: Metadata | None, others: Iterable[tuple[PurePosixPath, bytes]]
) -> config.Config | None:
    """Write what this instance was given by its `cloud`, or on the kernel command line, into `FILE`.

    A join token goes into a file of its own. `others` are the other files of the configuration, which is returned; None
    where nothing was given. Raise `ConfigurationError` where they and this make no sense together, `FetchError` where
    the cloud does not answer; nothing is written then.
    """
    host.require_root("configuring this instance")
    given = _in_user_data(host, cloud) if cloud else _on_command_line(host)
    if given is None:
        return None
    token = given.pop(_TOKEN, None)
    if token is not None:
        if not isinstance(token, str):
            raise _malformed(f"{_TOKEN} is no text")
        _put(given, "endpoint.credential.join_token_file", str(JOIN_TOKEN))
    content = f"# Written by `vmmesh-agent configure`.\n{json.dumps(given, indent=2)}\n".encode()
    configured = config.parse(sorted([*others, (FILE, content)], key=_in_order))
    host.make_folder(config.FOLDER, ROOT, 0o755)
    if token is not None:
        host.write(JOIN_TOKEN, f"{token}\n".encode(), ROOT, 0o600)
    host.write(FILE, content, ROOT, 0o644)
    return configured


def _in_order(document: tuple[PurePosixPath, bytes]) -> tuple[bool, PurePosixPath]:
    path, _ = document
    return path != config.FILE, path


def _on_command_line(host: Host) -> dict[str, Any] | None:
    """Read `vmmesh.SETTING=VALUE`, the setting's full name and its value as in YAML: vmmesh.endpoint.url=https://…"""
    given: dict[str, Any] = {}
    line = (host.read(_COMMAND_LINE) or b"").decode(errors="replace")
    try:
        words = shlex.split(line)
    except ValueError as error:  # a quotation mark without its other half
        raise _malformed(f"{_COMMAND_LINE}: {error}") from None
    for name, _, value in (word.partition("=") for word in words if word.startswith(_PREFIX)):
        setting = name.removeprefix(_PREFIX)
        try:
            _put(given, setting, value if setting == _TOKEN else strict.load_yaml(value))
        except strict.MalformedError as error:
            raise _malformed(f"{_COMMAND_LINE}: {name}: {error}") from None
    return given or None


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    """Set a.b.c in a tree of sections."""
    *sections, last = name.split(".")
    for section in sections:
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict):
            raise _malformed(f"{name}: {section} is a setting and no section")
        tree = inner
    tree[last] = value


def _in_user_data(host: Host, cloud: Metadata) -> dict[str, Any] | None:
    """Read the object `vmmesh` of the user-data, which is JSON."""
    content = user_data(host, cloud, _PATIENCE)
    if content is None:
        return None
    try:
        document = strict.load_json(base64.b64decode(content, validate=True) if cloud.is_base64 else content)
    except (strict.MalformedError, binascii.Error) as error:
        raise _malformed(f"the user-data of this instance is no JSON: {error}") from None
    given = document.get("vmmesh") if isinstance(document, dict) else None
    if given is None:
        return None
    if not isinstance(given, dict):
        raise _malformed("vmmesh in the user-data of this instance is no object")
    return given


def _malformed(what: str) -> AgentError:
    return ConfigurationError(what, code="instance-data-invalid", hint="docs/instance-data.md shows its form")
