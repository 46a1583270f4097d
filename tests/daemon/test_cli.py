"""The installed command as a child process: what it prints, and how it ends."""

import json
import os
import re
import stat
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from factories import CLUSTER, MOMENT, a_bundle, a_condition, a_report
from lab.cluster import as_json, as_secret, as_tar, now, write_directory
from vmmesh_agent.health import State
from vmmesh_agent.report import Report

COMMAND = Path(sys.executable).with_name("vmmesh-agent")
COMMANDS = "run bootstrap verify restore status wait explain check-config".split()
CONTENTS = dict(a_bundle().files)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")


def agent(*arguments: str | Path, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    done = subprocess.run(
        [COMMAND, *arguments],
        input=stdin,
        capture_output=True,
        timeout=200,
        check=False,
        env={"PATH": os.environ["PATH"], "COLUMNS": "80", **environment},
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in err, err
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


# --- the command line ---


def test_every_command_has_help() -> None:
    overview = agent("--help").stdout
    for command in COMMANDS:
        assert re.search(rf"^ +{command}\s", overview, re.MULTILINE), command
        done = agent(command, "--help")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"usage: vmmesh-agent {command}")


def test_the_version_is_told() -> None:
    assert re.fullmatch(r"vmmesh-agent \d+\.\d+\S*\n", agent("--version").stdout)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no-such-command"],
        ["status", "--output", "xml"],
        ["status", "extra"],
        ["verify"],
        ["explain"],
        ["wait", "--for", "splendid"],
        ["wait", "--timeout", "soon"],
        ["bootstrap", "--timeout", "-1"],
        ["--nonsense"],
    ],
    ids=" ".join,
)
def test_a_command_line_that_makes_no_sense_ends_with_64(arguments: list[str]) -> None:
    done = agent(*arguments)
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr.startswith("vmmesh-agent: ")
    assert "[usage]" in done.stderr
    assert " _" not in done.stderr  # no name of ours


# --- verify ---


@pytest.mark.parametrize("form", ["folder", "tar.gz", "tar", "json", "secret", "-"])
def test_each_form_of_a_bundle_is_judged(form: str, tmp_path: Path) -> None:
    forms = {
        "tar.gz": as_tar(CONTENTS),
        "tar": as_tar(CONTENTS, gz=False, folder="demo"),
        "json": as_json(CONTENTS),
        "secret": as_secret(CONTENTS),
    }
    if form == "folder":
        done = agent("verify", write_directory(CONTENTS, tmp_path / "bundle"))
    elif form == "-":
        done = agent("verify", "-", stdin=forms["json"])
    else:
        (tmp_path / "bundle").write_bytes(forms[form])
        done = agent("verify", tmp_path / "bundle")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("accepted\n")
    assert "vm/demo" in done.stdout
    assert CONTENTS["istio-token"].decode() not in done.stdout


def test_everything_that_is_wrong_is_listed(tmp_path: Path) -> None:
    bundle = a_bundle(
        token=CLUSTER.token(audience="other"),
        hosts=b"192.0.2.1 istiod.istio-system.svc example.com\n",
        environment={"LD_PRELOAD": "/tmp/x.so"},
    )
    files = dict(bundle.files)
    done = agent("verify", write_directory(files, tmp_path / "bundle"))
    assert (done.returncode, done.stdout) == (1, "")
    for code in ("token-wrong-audience", "hosts-foreign-name", "cluster-env-refused"):
        assert code in done.stderr
    assert "  → " in done.stderr


def test_the_judgement_in_json_has_stable_keys(tmp_path: Path) -> None:
    folder = write_directory(CONTENTS, tmp_path / "bundle")
    document = json.loads(agent("verify", "--output", "json", folder).stdout)
    assert (document["schema"], document["accepted"], document["problems"]) == ("vmmesh.verify/v1", True, [])
    assert {"workload", "discovery", "hosts", "token_expires_at", "sidecar", "notes"} < set(document)
    (folder / "hosts").unlink()
    done = agent("verify", "--output", "json", folder)
    document = json.loads(done.stdout)
    assert (done.returncode, done.stderr, document["accepted"]) == (1, "", False)
    assert [set(problem) for problem in document["problems"]] == [{"code", "file", "message", "remedy"}]
    assert (document["problems"][0]["code"], document["problems"][0]["file"]) == ("file-missing", "hosts")


@pytest.mark.parametrize("stdin", [b"", b"<html>", b"{", b"\x1f\x8b", b" " * 5 * 1024**2], ids=len)
def test_what_is_no_bundle_is_refused(stdin: bytes) -> None:
    for output in ("human", "json"):
        assert agent("verify", "--output", output, "-", stdin=stdin).returncode == 1


def test_a_bundle_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = agent("verify", tmp_path / "nowhere")
    assert done.returncode == 1
    assert "nowhere" in done.stderr


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000])
def test_the_files_can_be_written_as_they_would_be_placed(tmp_path: Path, mask: int) -> None:
    (tmp_path / "bundle").write_bytes(
        as_tar({name: content.replace(b"\n", b"\r\n") for name, content in CONTENTS.items()})
    )
    before = os.umask(mask)
    try:
        assert agent("verify", "--write", tmp_path / "new/folder", tmp_path / "bundle").returncode == 0
    finally:
        os.umask(before)
    written = {file.name: file for file in (tmp_path / "new/folder").iterdir()}
    assert {name: stat.S_IMODE(file.stat().st_mode) for name, file in written.items()} == {
        "root-cert.pem": 0o644, "istio-token": 0o600, "cluster.env": 0o644, "mesh.yaml": 0o644, "hosts": 0o644,
    }  # fmt: skip
    assert written["cluster.env"].read_bytes() == CONTENTS["cluster.env"]
    assert agent("verify", tmp_path / "new/folder").returncode == 0


def test_files_are_never_written_over_others(tmp_path: Path) -> None:
    folder = write_directory(CONTENTS, tmp_path / "bundle")
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for target in (folder, tmp_path / "mine", tmp_path / "link", tmp_path / "bundle/hosts"):
        done = agent("verify", "--write", target, folder)
        assert (done.returncode, "[folder-not-written]" in done.stderr) == (1, True), target
    assert list((tmp_path / "mine").iterdir()) == []
    assert not (tmp_path / "nowhere").exists()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == CONTENTS


def test_a_refused_bundle_is_not_written(tmp_path: Path) -> None:
    folder = write_directory({**CONTENTS, "mesh.yaml": b"["}, tmp_path / "bundle")
    assert agent("verify", "--write", tmp_path / "new", folder).returncode == 1
    assert not (tmp_path / "new").exists()


# --- explain ---

STARTED = "2026-03-04T18:15:30.000000Z\tinfo\tVersion 1.28.1-0f1e2d3c4b5a69788796a5b4c3d2e1f001234567-Clean\n"


def test_a_log_on_standard_input_is_explained() -> None:
    done = agent("explain", "-", stdin=STARTED.encode())
    assert done.returncode in {0, 1, 2, 3, 4}
    assert done.stdout
    document = json.loads(agent("explain", "--output", "json", "-", stdin=STARTED.encode()).stdout)
    assert set(document) == {"schema", "state", "cause", "conditions"}
    assert State(document["state"]).exit_status == done.returncode


def test_an_empty_log_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "istio.log").touch()
    assert agent("explain", tmp_path / "istio.log").returncode == 4
    assert agent("explain", "-", stdin=os.urandom(10_000)).returncode == 4


def test_a_log_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = agent("explain", tmp_path / "istio.log")
    assert done.returncode != 0
    assert "istio.log" in done.stderr


# --- check-config ---


def test_the_configuration_in_force_is_printed(tmp_path: Path) -> None:
    (tmp_path / "etc/vmmesh-agent/config.d").mkdir(parents=True)
    (tmp_path / "etc/vmmesh-agent/config.yaml").write_text(
        "endpoint: {url: 'file:///srv/bundle'}\nhealthy_within: 60\n"
    )
    (tmp_path / "etc/vmmesh-agent/config.d/10.yaml").write_text("healthy_within: 90\n")
    (tmp_path / "etc/vmmesh-agent/config.d/20.yaml.bak").write_text("healthy_within: 99\n")
    done = agent("--root", tmp_path, "check-config")
    assert (done.returncode, done.stderr) == (0, "")
    assert {"endpoint.url: file:///srv/bundle", "healthy_within: 90.0"} <= set(done.stdout.splitlines())


def test_a_wrong_configuration_ends_every_command_that_reads_it_with_78(tmp_path: Path) -> None:
    (tmp_path / "etc/vmmesh-agent").mkdir(parents=True)
    (tmp_path / "etc/vmmesh-agent/config.yaml").write_text("endpoint: {urll: x}\n")
    for command in ("check-config", "run", "bootstrap"):
        done = agent("--root", tmp_path, command)
        expected = 78 if os.geteuid() == 0 or command == "check-config" else 77
        assert done.returncode == expected, command
        assert "did you mean endpoint.url?" in done.stderr or expected == 77


def test_a_configuration_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = agent("--root", tmp_path, "check-config")
    assert (done.returncode, "/etc/vmmesh-agent/config.yaml is not there" in done.stderr) == (78, True)


def test_a_presigned_address_is_not_printed_whole(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("endpoint: {url: 'https://bucket.example.com/bundle?X-Amz-Signature=hunter2'}\n")
    done = agent("--config", tmp_path / "c.yaml", "check-config")
    assert done.returncode == 0
    assert "hunter2" not in done.stdout


@needs_root
@pytest.mark.parametrize("command", ["run", "bootstrap", "restore"])
def test_what_needs_root_ends_with_77_for_others(command: str, tmp_path: Path) -> None:
    script = "import os, sys; os.setresuid(65534, 65534, 65534); sys.exit(vmmesh_agent.cli.main(sys.argv[1:]))"
    (tmp_path / "etc/vmmesh-agent").mkdir(parents=True)
    (tmp_path / "etc/vmmesh-agent/config.yaml").write_text("endpoint: {url: 'file:///srv/bundle'}\n")
    root = os.open(tmp_path, os.O_RDONLY)
    imports = (
        "import vmmesh_agent.cli, vmmesh_agent.config, vmmesh_agent.daemon, vmmesh_agent.reconcile, vmmesh_agent.log; "
    )
    done = subprocess.run(
        [sys.executable, "-c", imports + script, "--root", f"/proc/self/fd/{root}", command],
        capture_output=True, text=True, pass_fds=[root], check=False,
    )  # fmt: skip
    os.close(root)
    assert done.returncode == 77, done.stderr


# --- status, of a tree in which the daemon left its record ---


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "run/vmmesh-agent").mkdir(parents=True)
    return tmp_path


def leave(tree: Path, record: Report) -> None:
    (tree / "run/vmmesh-agent/status.json").write_text(json.dumps(record.as_dict()))


def fresh(state: State = State.HEALTHY, *conditions: Any) -> Report:
    return a_report(state, *conditions, updated_at=now(), certificate_not_after=now() + timedelta(hours=3))


@pytest.mark.parametrize("state", list(State))
def test_status_ends_as_the_state_says(tree: Path, state: State) -> None:
    leave(tree, fresh(state))
    done = agent("--root", tree, "status")
    assert (done.returncode, done.stderr) == (state.exit_status, "")
    assert f"vm/demo: {state}" in done.stdout.splitlines()[0]
    assert "\x1b" not in done.stdout


def test_status_in_json_is_the_record(tree: Path) -> None:
    record = fresh(State.FAILED, a_condition(since=MOMENT))
    leave(tree, record)
    done = agent("--root", tree, "status", "--output", "json")
    assert (done.returncode, json.loads(done.stdout)) == (1, record.as_dict())


def test_status_for_nagios_has_its_own_exit_status(tree: Path) -> None:
    leave(tree, fresh(State.FAILED, a_condition()))
    done = agent("--root", tree, "status", "--output", "nagios")
    assert (done.returncode, done.stdout.startswith("VMMESH CRITICAL - vm/demo: "), done.stdout.count("\n")) == (
        2,
        True,
        1,
    )


def test_status_for_prometheus_is_text(tree: Path) -> None:
    leave(tree, fresh())
    assert 'vmmesh_agent_state{state="healthy"} 1\n' in agent("--root", tree, "status", "--output", "prometheus").stdout


def test_waiting_ends_when_the_state_is_there_and_gives_up_in_time(tree: Path) -> None:
    leave(tree, fresh())
    assert agent("--root", tree, "wait").returncode == 0
    leave(tree, fresh(State.FAILED))
    done = agent("--root", tree, "wait", "--timeout", "0.2")
    assert (done.returncode, "still failed" in done.stderr) == (1, True)
    assert agent("--root", tree, "wait", "--for", "failed").returncode == 0


def test_a_reader_that_goes_away_is_no_error(tree: Path) -> None:
    leave(tree, fresh())
    pipeline: list[str | Path] = ["sh", "-c", '"$0" --root "$1" status | true', COMMAND, tree]
    assert subprocess.run(pipeline, capture_output=True, text=True, check=False).stderr == ""
