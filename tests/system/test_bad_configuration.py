"""Mistakes of the administrator: in the configuration, the credential, the command line. Each is named with its place.

All on one machine with real systemd, which stays as it is.
"""

import time
from collections.abc import Mapping
from typing import Any

import pytest
import yaml

from lab.cluster import Cluster
from lab.machine import Machine
from system.refusal import BUNDLE, CONFIG, FOLDER, Trial, assert_refused

TOKEN = "abc123.the-secret-of-this-machine"
HTTPS = "https://192.0.2.1:9/v1/bundle"


@pytest.fixture(scope="module")
def trial(shared_machine: Machine) -> Trial:
    """The machine that all mistakes are made on."""
    return Trial(shared_machine)


# The mistake → the file's text, and what the complaint must name.
MISTAKES: dict[str, tuple[str, tuple[str, ...]]] = {
    "no endpoint": ("healthy_within: 60\n", ("endpoint.url", "required")),
    "an empty file": ("", ("endpoint.url", "required")),
    "plain http": ("endpoint: {url: 'http://192.0.2.1/v1/bundle'}\n", ("endpoint.url", "https://", "token")),
    "an unknown scheme": ("endpoint: {url: 'ftp://192.0.2.1/'}\n", ("endpoint.url", "https://")),
    "a password in the address": ("endpoint: {url: 'https://me:hunter2@192.0.2.1/'}\n", ("endpoint.url", "credential")),
    "an unknown key": (
        "endpoint: {url: 'file:///a', ca_pin: x}\n",
        ("endpoint.ca_pin", "did you mean endpoint.ca_pins?"),
    ),
    "an unknown section": ("endpoints: {url: 'file:///a'}\n", ("endpoints", "did you mean endpoint")),
    "a key of nothing known": ("endpoint: {url: 'file:///a'}\nzzz: 1\n", ("zzz", "unknown key")),
    "a pin that is none": ("endpoint: {url: 'file:///a', ca_pins: [abc]}\n", ("endpoint.ca_pins", "sha256:")),
    "a timeout that is text": (
        "endpoint: {url: 'file:///a', timeout: soon}\n",
        ("endpoint.timeout", "seconds", "'soon'"),
    ),
    "a relative path": ("endpoint: {url: 'file:///a', ca_file: ca.pem}\n", ("endpoint.ca_file", "absolute path")),
    "a name that is none": (
        "endpoint: {url: 'file:///a'}\nworkload_group: {namespace: VM_1, name: demo}\n",
        ("workload_group.namespace", "'VM_1'"),
    ),
    "half a workload": ("endpoint: {url: 'file:///a'}\nworkload_group: {name: demo}\n", ("workload_group.namespace",)),
    "a package without digest": (
        "endpoint: {url: 'file:///a'}\nsidecar: {package: 'https://192.0.2.1/a.rpm'}\n",
        ("sidecar.sha256", "required"),
    ),
    "a package over http": (
        "endpoint: {url: 'file:///a'}\nsidecar: {package: 'http://192.0.2.1/a.rpm'}\n",
        ("sidecar.package", "https://"),
    ),
    "two credentials": (
        "endpoint:\n  url: file:///a\n  credential: {join_token_file: /a, exec: [/b]}\n",
        ("join_token_file", "exec", "at most one"),
    ),
    "half a client certificate": (
        "endpoint:\n  url: file:///a\n  credential: {client_certificate: {certificate: /a}}\n",
        ("client_certificate.key", "required"),
    ),
    "an exec that is a line": (
        "endpoint:\n  url: file:///a\n  credential: {exec: get-token --now}\n",
        ("endpoint.credential.exec", "list"),
    ),
    "a tab": ("endpoint:\n\turl: file:///a\n", ("line 2",)),
    "an open bracket": ("endpoint: {url: 'file:///a'\n", ("line",)),
    "a key twice": ("endpoint: {url: 'file:///a'}\nendpoint: {url: 'file:///b'}\n", ("line 2", "'endpoint'")),
    "a list": ("- endpoint\n", ("keys and values",)),
    "a tag": ("endpoint: !!python/object/apply:os.system [id]\n", ("line 1",)),
    "an alias": ("a: &a {url: 'file:///a'}\nendpoint: *a\n", ("line 2",)),
    "control sequences": ('endpoint: {url: "file:///a", "\\e[31m": 1}\n', ("unknown key",)),
    "a key that is a number": ("endpoint: {url: 'file:///a'}\n1: 2\n", ("1: unknown key",)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_configuration_is_named_with_its_file(mistake: str, trial: Trial) -> None:
    text, fragments = MISTAKES[mistake]
    trial.give("config.yaml", text)
    refusal = trial.run(["vmmesh-agent", f"--config={CONFIG}", "bootstrap"])
    where = "config.yaml" if text else "endpoint.url"  # an empty file is no place: the main file is named
    assert_refused(refusal, "configuration-invalid", where, *fragments, status=78)
    assert "hunter2" not in refusal.output
    assert trial.changes() == []


def test_every_mistake_is_told_at_once(trial: Trial) -> None:
    trial.give("config.yaml", "endpoint: {url: 'http://a', timeout: 0, pins: []}\nworkload_group: {name: demo}\n")
    refusal = trial.run(["vmmesh-agent", f"--config={CONFIG}", "check-config"])
    told = ("endpoint.url", "endpoint.timeout", "endpoint.pins", "workload_group.namespace")
    assert_refused(refusal, "configuration-invalid", *told, status=78)


def test_a_configuration_that_is_no_text_is_refused(trial: Trial) -> None:
    trial.give("config.yaml", b"\xff\xfe\x00endpoint")
    refusal = trial.run(["vmmesh-agent", f"--config={CONFIG}", "bootstrap"])
    assert_refused(refusal, "configuration-invalid", "config.yaml", "UTF-8", status=78)


@pytest.mark.parametrize("command", ["bootstrap", "run", "check-config"])
def test_without_a_configuration_nothing_is_guessed(command: str, trial: Trial) -> None:
    refusal = trial.run(["vmmesh-agent", command])
    assert_refused(refusal, "configuration-missing", "/etc/vmmesh-agent/config.yaml", "endpoint.url", status=78)
    assert trial.changes() == []


@pytest.mark.parametrize(("kind", "make"), {"a folder": "mkdir", "a pipe": "mkfifo"}.items())
def test_a_configuration_that_is_no_file_is_refused_at_once(kind: str, make: str, trial: Trial) -> None:
    trial.machine.run([make, f"{FOLDER}/odd.yaml"])
    refusal = trial.run(["vmmesh-agent", f"--config={FOLDER}/odd.yaml", "bootstrap"], limit=10)
    trial.machine.run(["rm", "-r", f"{FOLDER}/odd.yaml"])
    assert_refused(refusal, "not-a-file", "odd.yaml", status=refusal.status)
    assert refusal.status in {1, 78}, kind
    assert trial.changes() == []


# --- the credential -----------------------------------------------------------


def _bootstrap(trial: Trial, credential: Mapping[str, Any], **more: Any) -> Any:
    return trial.bootstrap(HTTPS, endpoint={"credential": credential}, timeout=3, **more)


def test_a_credential_file_that_is_missing_is_named(trial: Trial) -> None:
    refusal = _bootstrap(trial, {"join_token_file": "/root/input/nothing"})
    assert_refused(refusal, "credential-missing", "/root/input/nothing", "endpoint.credential")
    assert trial.changes() == []


def test_a_ca_file_that_is_missing_is_named(trial: Trial) -> None:
    refusal = trial.bootstrap(HTTPS, endpoint={"ca_file": "/root/input/nothing.pem"}, timeout=3)
    assert_refused(refusal, "credential-missing", "/root/input/nothing.pem", "endpoint.ca_file")
    assert trial.changes() == []


def test_a_ca_file_of_garbage_is_named(trial: Trial) -> None:
    path = trial.give("garbage.pem", "hello")
    refusal = trial.bootstrap(HTTPS, endpoint={"ca_file": path}, timeout=3)
    assert_refused(refusal, "ca-file-invalid", "endpoint.ca_file", hinted=False)
    assert trial.changes() == []


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"two words", b"line\nand line", b"a\x1b[31mb", "tök".encode()], ids=repr
)
def test_a_credential_that_is_no_single_word_is_refused(content: bytes, trial: Trial) -> None:
    path = trial.give("token", content, mode=0o600)
    refusal = _bootstrap(trial, {"join_token_file": path})
    assert_refused(refusal, "credential-invalid", path, hinted=False)
    assert trial.changes() == []


def test_a_credential_that_is_no_text_is_refused(trial: Trial) -> None:
    path = trial.give("token", b"\xff\xfe", mode=0o600)
    refusal = _bootstrap(trial, {"bearer_token_file": path})
    assert_refused(refusal, "configuration-invalid", path, status=78)
    assert trial.changes() == []


@pytest.mark.parametrize("make", ["mkdir", "mkfifo"])
def test_a_credential_that_is_no_file_is_refused_at_once(make: str, trial: Trial) -> None:
    trial.machine.run([make, f"{FOLDER}/odd"])
    refusal = _bootstrap(trial, {"join_token_file": f"{FOLDER}/odd"})
    trial.machine.run(["rm", "-r", f"{FOLDER}/odd"])
    assert_refused(refusal, "not-a-file", f"{FOLDER}/odd")
    assert trial.changes() == []


def test_a_client_certificate_and_a_key_that_do_not_fit_are_refused(trial: Trial) -> None:
    cluster = Cluster.create()
    certificate = trial.give("client.pem", cluster.server_certificate(["vm"])[0])
    key = trial.give("client.key", cluster.server_certificate(["vm"])[1], mode=0o600)
    refusal = _bootstrap(trial, {"client_certificate": {"certificate": certificate, "key": key}})
    assert_refused(refusal, "client-certificate-invalid", "do not fit", hinted=False)
    assert trial.changes() == []


@pytest.mark.parametrize(
    ("script", "code", "fragment"),
    [
        ("exit 7", "credential-exec-failed", "7"),
        ("echo no-identity >&2; exit 1", "credential-exec-failed", "no-identity"),
        ("true", "credential-invalid", "get-token"),
        ("echo two words", "credential-invalid", "get-token"),
        (f"echo {TOKEN}; exit 1", "credential-exec-failed", "get-token"),
        ("printf 'no \\033[31m\\033]0;owned\\007' >&2; exit 1", "credential-exec-failed", "no"),
        ("head -c 100000000 /dev/zero | tr '\\0' a", "credential-invalid", "get-token"),
    ],
)
def test_an_exec_credential_that_fails_is_told_and_its_token_is_not(
    script: str, code: str, fragment: str, trial: Trial
) -> None:
    path = trial.give("get-token", f"#!/bin/sh\n{script}\n", mode=0o755)
    refusal = _bootstrap(trial, {"exec": [path]})
    assert_refused(refusal, code, fragment, hinted=False)
    assert TOKEN not in refusal.output
    assert TOKEN.encode() not in trial.machine.read("/run/vmmesh-agent/status.json")
    assert trial.changes() == []


@pytest.mark.parametrize(
    ("path", "code"), [("/root/input/nothing", "program-missing"), ("/etc/passwd", "permission-denied")]
)
def test_an_exec_credential_that_cannot_be_run_is_named(path: str, code: str, trial: Trial) -> None:
    refusal = _bootstrap(trial, {"exec": [path]})
    assert_refused(refusal, code, path, hinted=False)
    assert trial.changes() == []


def test_an_exec_credential_that_hangs_does_not_outlast_the_timeout(trial: Trial) -> None:
    path = trial.give("get-token", "#!/bin/sh\nsleep 4711\n", mode=0o755)
    began = time.monotonic()
    refusal = _bootstrap(trial, {"exec": [path]})
    assert_refused(refusal, "command-timeout", "get-token", hinted=False)
    assert time.monotonic() - began < 20  # --timeout was 3
    assert trial.machine.run(["pgrep", "-f", "sleep 4711"], check=False).returncode == 1, "its child lives on"
    assert trial.changes() == []


# --- the command line ---------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["jion"],
        ["bootstrap", "--timeout=soon"],
        ["bootstrap", "--timeout=-1"],
        ["bootstrap", "--timeout=nan"],
        ["bootstrap", "--force"],
        ["bootstrap", "now"],
        ["verify"],
        ["verify", "--output=xml", "x"],
        ["explain"],
        ["wait", "--for=happiness"],
        ["status", "--output=\x1b[31m"],
    ],
    ids=" ".join,
)
def test_a_mistake_on_the_command_line_is_64(arguments: list[str], trial: Trial) -> None:
    refusal = trial.run(["vmmesh-agent", *arguments])
    assert_refused(refusal, "usage", "--help", status=64)
    assert trial.changes() == []


@pytest.mark.parametrize("command", [["bootstrap"], ["bootstrap", "--dry-run"], ["restore"], ["run"]])
def test_a_user_who_is_not_root_gets_77(command: list[str], trial: Trial) -> None:
    trial.machine.write("/run/input.yaml", yaml.safe_dump({"endpoint": {"url": "file:///nothing"}}))
    trial.changes()
    refusal = trial.run(["vmmesh-agent", "--config=/run/input.yaml", *command], user="nobody")
    if command == ["bootstrap", "--dry-run"]:  # looks only; what it may not read it says
        assert refusal.status in {1, 77}
        assert refusal.code
    else:
        assert_refused(refusal, "not-root", "sudo", status=77)
    assert trial.changes() == []


def test_a_configuration_that_only_root_may_read_is_77_for_others(trial: Trial) -> None:
    trial.machine.write("/run/secret.yaml", "endpoint: {url: 'file:///nothing'}\n", mode=0o600)
    trial.changes()
    refusal = trial.run(["vmmesh-agent", "--config=/run/secret.yaml", "check-config"], user="nobody")
    assert_refused(refusal, "permission-denied", "/run/secret.yaml", status=77)
    assert trial.changes() == []


@pytest.mark.parametrize("path", ["/nothing", "/etc", "/dev/null", "/dev/zero"])
def test_verify_of_what_is_no_bundle_ends_with_1(path: str, trial: Trial) -> None:
    refusal = trial.run(["vmmesh-agent", "verify", path])
    assert refusal.status == 1
    assert refusal.code
    assert trial.changes() == []


def test_verify_does_not_write_into_a_folder_that_is_there(trial: Trial) -> None:
    trial.give_bundle(Cluster.create().bundle())
    refusal = trial.run(["vmmesh-agent", "verify", "--write=/etc", BUNDLE])
    assert refusal.status == 1
    assert "/etc" in refusal.message
    assert trial.changes() == []


# --- two at once --------------------------------------------------------------


def test_a_second_bootstrap_says_who_holds_the_lock(trial: Trial) -> None:
    machine = trial.machine
    path = trial.give("get-token", "#!/bin/sh\ntouch /root/input/asked\nsleep 20\n", mode=0o755)
    first = [*trial.configure(HTTPS, endpoint={"credential": {"exec": [path]}}), "bootstrap", "--timeout=25"]
    with machine.spawn(first) as process:
        machine.run(["sh", "-c", "until test -e /root/input/asked; do sleep 0.05; done"])
        holder = machine.run(["pgrep", "-o", "-f", "bootstrap --timeout=25"]).stdout.strip()
        refusal = trial.run([*first[:-1], "--timeout=2"])
        machine.run(["pkill", "-INT", "-f", "bootstrap --timeout=25"])
        process.wait(timeout=60)
    assert_refused(refusal, "locked", f"process {holder}", "wait for it")
    assert trial.changes() == []
    after = trial.bootstrap(HTTPS, timeout=2)
    assert_refused(after, "endpoint-refuses-connections", hinted=False)
