"""The configuration: every setting right and wrong, and every mistake at once."""

from pathlib import PurePosixPath
from typing import Any

import pytest
import yaml

from factories import CONFIG_FILE
from vmmesh_agent.bundle import Workload
from vmmesh_agent.config import SETTINGS, ClientCertificate, Config, Credential, FirstJoin, Joined, parse
from vmmesh_agent.errors import ConfigurationError

DROP_IN = PurePosixPath("/etc/vmmesh-agent/config.d/50-site.yaml")
PIN = "sha256:" + "0f" * 32
MINIMAL = "endpoint: {url: 'https://mesh.example.com:15443/v1/bundle'}\n"
PATH = PurePosixPath


def config(*texts: str) -> Config:
    return parse(zip((CONFIG_FILE, DROP_IN), (text.encode() for text in texts), strict=False))


def mistakes(*texts: str | bytes) -> list[str]:
    contents = (text if isinstance(text, bytes) else text.encode() for text in texts)
    with pytest.raises(ConfigurationError) as caught:
        parse(zip((CONFIG_FILE, DROP_IN), contents, strict=False))
    assert caught.value.exit_status == 78
    assert caught.value.code == "configuration-invalid"
    return caught.value.message.splitlines()


def with_setting(key: str, value: Any) -> str:
    """Return a sound configuration with this setting, and what it needs beside it."""
    beside = {
        "endpoint.credential.client_certificate.certificate": {"endpoint.credential.client_certificate.key": "/k"},
        "endpoint.credential.client_certificate.key": {"endpoint.credential.client_certificate.certificate": "/c"},
        "workload_group.namespace": {"workload_group.name": "demo"},
        "workload_group.name": {"workload_group.namespace": "vm"},
        "sidecar.package": {"sidecar.sha256": "ab" * 32},
    }
    settings = {"endpoint.url": "https://mesh.example.com/", **beside.get(key, {}), key: value}
    document: dict[str, Any] = {}
    for dotted, setting in settings.items():
        *sections, last = dotted.split(".")
        place = document
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = setting
    return yaml.safe_dump(document, allow_unicode=True)


def value_of(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


URLS = (
    "https://mesh.example.com:15443/v1/bundle",
    "https://192.0.2.1/",
    "https://[2001:db8::1]:15443/v1/bundle",
    "file:///srv/bundle",
    "file:///srv/a%20bundle.tar.gz",
    "https://bucket.example.com/bundle?signature=abc",
)
FOLDERS = {"/etc/vmmesh-agent/x": PATH("/etc/vmmesh-agent/x")}
RIGHT: dict[str, dict[Any, Any]] = {
    "endpoint.url": {url: url for url in URLS},
    "endpoint.ca_file": FOLDERS,
    "endpoint.timeout": {1: 1.0, 30: 30.0, 0.5e3: 500.0, 600: 600.0},
    "endpoint.credential.join_token_file": FOLDERS,
    "endpoint.credential.bearer_token_file": FOLDERS,
    "endpoint.credential.client_certificate.certificate": FOLDERS,
    "endpoint.credential.client_certificate.key": FOLDERS,
    "workload_group.namespace": {"vm": "vm", "a-1": "a-1"},
    "workload_group.name": {"demo": "demo", "a.b": "a.b"},
    "sidecar.package": {
        "/opt/istio-sidecar.rpm": "/opt/istio-sidecar.rpm",
        "https://example.com/istio-sidecar.deb": "https://example.com/istio-sidecar.deb",
    },
    "sidecar.sha256": {"ab" * 32: "ab" * 32, "AB" * 32: "ab" * 32, "sha256:" + "ab" * 32: "ab" * 32},
    "sidecar.allow_downgrade": {True: True, False: False},
    "metrics.textfile": {"/var/lib/node/vmmesh.prom": PATH("/var/lib/node/vmmesh.prom")},
    "healthy_within": {5: 5.0, 3600: 3600.0},
    "on_failure.first_join": {"undo": FirstJoin.UNDO, "keep": FirstJoin.KEEP},
    "on_failure.joined": {"closed": Joined.CLOSED, "open": Joined.OPEN},
}
PATHS_THAT_ARE_NONE = ("relative", "", "/a/../b", 7, None, ["/a"])
WRONG: dict[str, tuple[Any, ...]] = {
    "endpoint.url": (
        "http://mesh.example.com/",
        "ftp://mesh.example.com/",
        "mesh.example.com",
        "https://",
        "https:///path",
        "https://[x",
        "https://host:99999/",
        "https://host:port/",
        "file://host/path",
        "file:relative",
        "",
        7,
        None,
        ["https://mesh.example.com"],
    ),
    "endpoint.ca_file": PATHS_THAT_ARE_NONE,
    "endpoint.ca_pins": ([], "", ["sha256:"], ["0f" * 32], [PIN[:-1]], [7], {"a": PIN}, "sha1:" + "0f" * 20),
    "endpoint.timeout": (0, 0.9, 601, -1, "30", True, None, float("nan"), float("inf")),
    "endpoint.credential.join_token_file": PATHS_THAT_ARE_NONE,
    "endpoint.credential.bearer_token_file": PATHS_THAT_ARE_NONE,
    "endpoint.credential.client_certificate.certificate": PATHS_THAT_ARE_NONE,
    "endpoint.credential.client_certificate.key": PATHS_THAT_ARE_NONE,
    "endpoint.credential.exec": ([], ["get-token"], "/usr/local/bin/get-token", ["/bin/x", 7], ["/bin/x", ""]),
    "workload_group.namespace": ("VM", "-vm", "a b", "", 7, "x" * 254),
    "workload_group.name": ("Demo", "", None, "a/b"),
    "sidecar.package": ("http://example.com/a.rpm", "istio.rpm", "", "https://", "https://[x", "https://h:1x/", 7),
    "sidecar.sha256": ("ab" * 31, "ab" * 32 + "\n", "xy" * 32, "", 7, "md5:" + "ab" * 32),
    "sidecar.allow_downgrade": ("yes please", 1, 0, None, "true"),
    "metrics.textfile": PATHS_THAT_ARE_NONE,
    "healthy_within": (4, 3601, "60", None, True),
    "on_failure.first_join": ("UNDO", "back", True, None, [], {}),
    "on_failure.joined": ("Open", "on", False, 1),
}


def test_every_setting_is_tested_here() -> None:
    tested = set(RIGHT) | {"endpoint.ca_pins", "endpoint.credential.exec"}
    assert tested == set(SETTINGS) == set(WRONG)


@pytest.mark.parametrize("key", RIGHT)
def test_a_right_value_is_taken(key: str) -> None:
    for written, meant in RIGHT[key].items():
        assert value_of(config(with_setting(key, written)), key) == meant, written


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_value_is_refused_with_its_file_and_its_key(key: str) -> None:
    for wrong in WRONG[key]:
        lines = mistakes(with_setting(key, wrong))
        assert lines[0].startswith(f"{CONFIG_FILE}: {key}: expected "), wrong
        assert all(line.isprintable() for line in lines)


def test_pins_may_be_one_or_several_in_any_case() -> None:
    for written in (PIN, [PIN], [PIN.upper().replace("SHA", "sha")]):
        assert value_of(config(with_setting("endpoint.ca_pins", written)), "endpoint.ca_pins") == (PIN,)
    two = [PIN, "sha256:" + "a0" * 32]
    assert config(with_setting("endpoint.ca_pins", two)).endpoint.ca_pins == tuple(two)


def test_a_command_keeps_its_arguments() -> None:
    written = ["/usr/local/bin/get-token", "--audience", "vm mesh"]
    assert config(with_setting("endpoint.credential.exec", written)).endpoint.credential.exec == tuple(written)


def test_what_is_not_configured_has_its_default() -> None:
    minimal = config(MINIMAL)
    assert minimal.endpoint.credential == Credential()
    assert (minimal.endpoint.ca_file, minimal.endpoint.ca_pins, minimal.endpoint.timeout) == (None, (), 30.0)
    assert minimal.workload_group is None
    assert (minimal.sidecar.package, minimal.sidecar.allow_downgrade) == ("", False)


def test_a_whole_configuration_is_read() -> None:
    text = f"""
endpoint:
  url: https://mesh.example.com:15443/v1/bundle
  ca_file: /etc/vmmesh-agent/endpoint-ca.pem
  ca_pins: ["{PIN}"]
  credential:
    client_certificate: {{certificate: /etc/pki/vm.pem, key: /etc/pki/vm.key}}
workload_group: {{namespace: vm, name: demo}}
"""
    read = config(text)
    assert read.workload_group == Workload("vm", "demo")
    assert read.endpoint.credential.client_certificate == ClientCertificate(
        PATH("/etc/pki/vm.pem"), PATH("/etc/pki/vm.key")
    )
    assert read.endpoint.ca_pins == (PIN,)


# --- several files ---


def test_the_later_file_wins_key_by_key() -> None:
    first = MINIMAL + "healthy_within: 60\nworkload_group: {namespace: vm, name: demo}\n"
    read = config(first, "healthy_within: 90\nworkload_group: {name: other}\n")
    assert read.healthy_within == 90
    assert read.workload_group == Workload("vm", "other")
    assert read.endpoint.url == "https://mesh.example.com:15443/v1/bundle"


def test_an_empty_file_says_nothing() -> None:
    assert config(MINIMAL, "# later\n") == config(MINIMAL)
    assert config("", MINIMAL) == config(MINIMAL)


def test_a_url_may_come_from_a_drop_in_alone() -> None:
    assert config("healthy_within: 60\n", MINIMAL).healthy_within == 60


# --- mistakes ---


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("endpoint: {urll: x}", "endpoint.urll: unknown key; did you mean endpoint.url?"),
        ("endpiont: {url: x}", "endpiont: unknown key; did you mean endpoint?"),
        ("sidecar: {sha265: x}", "sidecar.sha265: unknown key; did you mean sidecar.sha256?"),
        ("ca_pins: []", "ca_pins: unknown key; did you mean endpoint.ca_pins?"),
        ("endpoint: {join_token_file: /x}", "did you mean endpoint.credential.join_token_file?"),
        ("workload_group: {Name: x}", "workload_group.Name: unknown key; did you mean workload_group.name?"),
        ("zzzzz: 1", "zzzzz: unknown key; known are endpoint.url, "),
        ("1: 1", "1: unknown key"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(key: str, nearest: str) -> None:
    (line,) = (line for line in mistakes(MINIMAL, key) if "unknown" in line)
    assert line.startswith(f"{DROP_IN}: ")
    assert nearest in line


def test_a_key_with_dots_is_no_other_spelling() -> None:
    assert "unknown key" in mistakes(MINIMAL, "healthy_within: 60\nendpoint.url: https://other.example.com/\n")[0]


def test_a_key_that_stands_there_twice_is_refused() -> None:
    (line,) = mistakes(MINIMAL, "healthy_within: 60\nhealthy_within: 90\n")
    assert line == f"{DROP_IN}: line 2: the key 'healthy_within' stands there twice"


@pytest.mark.parametrize("content", ["- a\n", "text\n", "endpoint: https://mesh.example.com\n", "endpoint: [url]\n"])
def test_a_file_without_keys_and_values_is_refused(content: str) -> None:
    assert "expected keys and values" in mistakes(content)[0]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: [", b"a: !!python/object:os.x {}", b"\x00", b"[" * 40_000])
def test_a_file_that_is_no_plain_yaml_is_refused(content: bytes) -> None:
    lines = mistakes(MINIMAL, content)
    assert len(lines) == 1
    assert lines[0].startswith(f"{DROP_IN}: ")


def test_the_address_of_the_endpoint_is_required() -> None:
    assert mistakes("healthy_within: 60\n")[0].startswith(f"{CONFIG_FILE}: endpoint.url: it is required")
    assert mistakes("")[0].startswith(f"{CONFIG_FILE}: endpoint.url: it is required")


def test_credentials_exclude_each_other_over_all_files() -> None:
    first = MINIMAL + "workload_group: {namespace: vm, name: demo}\n"
    (line,) = mistakes(
        first.replace("}\n", ", credential: {join_token_file: /a}}\n", 1), "endpoint: {credential: {exec: [/b]}}\n"
    )
    assert line.endswith("endpoint.credential.exec and endpoint.credential.join_token_file: at most one")


@pytest.mark.parametrize(
    ("text", "required"),
    [
        ("workload_group: {name: demo}", "workload_group.namespace: it is required beside workload_group.name"),
        ("workload_group: {namespace: vm}", "workload_group.name: it is required beside"),
        ("endpoint: {credential: {client_certificate: {key: /k}}}", "client_certificate.certificate: it is required"),
        ("endpoint: {credential: {client_certificate: {certificate: /k}}}", "client_certificate.key: it is required"),
        ("sidecar: {package: 'https://example.com/a.rpm'}", "sidecar.sha256: it is required for a package from a URL"),
    ],
)
def test_what_belongs_together_is_required_together(text: str, required: str) -> None:
    (line,) = mistakes(MINIMAL, text)
    assert line.startswith(f"{DROP_IN}: ")
    assert required in line


def test_every_mistake_is_said_at_once_with_its_file() -> None:
    lines = mistakes(
        "endpoint: {url: 'http://x', timeout: soon}\nhealthy_withn: 3\n",
        "sidecar: {package: rel.rpm, sha256: x}\nworkload_group: {name: demo}\n",
    )
    starts = [": ".join(line.split(": ")[:2]) for line in lines]
    assert starts[:5] == [
        f"{CONFIG_FILE}: endpoint.url",
        f"{CONFIG_FILE}: endpoint.timeout",
        f"{CONFIG_FILE}: healthy_withn",
        f"{DROP_IN}: sidecar.package",
        f"{DROP_IN}: sidecar.sha256",
    ]
    assert f"{DROP_IN}: workload_group.namespace" in starts


def test_a_wrong_address_is_not_said_to_be_missing_too() -> None:
    assert len(mistakes("endpoint: {url: 'http://x'}\n")) == 1


@pytest.mark.parametrize(
    "text",
    [
        "endpoint: {url: 'https://user:hunter2@mesh.example.com/'}",
        "endpoint: {url: 'http://user:hunter2@mesh.example.com/'}",
        "endpoint: {credential: {join_token_file: hunter2}}",
        "endpoint: {credential: {bearer_token_file: [hunter2]}}",
        "endpoint: {credential: {bearer_token: hunter2}}",
        "endpoint: {credential: {exec: [get-token, hunter2]}}",
        "endpoint: {credential: {client_certificate: hunter2}}",
        "endpoint: {credential: hunter2}",
    ],
)
def test_a_secret_in_the_wrong_place_is_not_printed(text: str) -> None:
    assert "hunter2" not in "\n".join(mistakes(MINIMAL, text))
