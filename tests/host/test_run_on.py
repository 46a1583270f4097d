"""A command that must not be torn, where no systemd could take it over; as a service: tests/system/test_units.py."""

import subprocess
from pathlib import Path, PurePosixPath

import pytest

from vmmesh_agent.errors import HostError
from vmmesh_agent.host import Host

LOG = PurePosixPath("/log")


def test_it_ends_as_the_command_and_all_it_says_is_in_the_log(tmp_path: Path) -> None:
    done = Host(tmp_path).run_on(["sh", "-c", "echo out; echo err >&2; exit 7"], log=LOG, timeout=60)
    assert (done.status, done.stdout) == (7, "out\nerr\n")
    assert (tmp_path / "log").read_text() == "out\nerr\n"
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_it_has_what_it_is_given_of_an_environment(tmp_path: Path) -> None:
    environment = {"DEBIAN_FRONTEND": "noninteractive"}
    done = Host(tmp_path).run_on(["env"], log=LOG, timeout=60, environment=environment)
    assert {"DEBIAN_FRONTEND=noninteractive", "LC_ALL=C.UTF-8"} <= set(done.stdout.splitlines())


def test_only_its_time_limit_ends_it_and_what_it_started(tmp_path: Path) -> None:
    beats: list[None] = []
    host = Host(tmp_path, beat=lambda: beats.append(None))
    with pytest.raises(HostError) as caught:
        host.run_on(["sh", "-c", "sleep 98765; true"], log=LOG, timeout=2)
    assert (caught.value.code, caught.value.retry) == ("command-timeout", True)
    assert len(beats) > 1
    assert subprocess.run(["pgrep", "-f", "^sleep 98765"], check=False, stdout=subprocess.DEVNULL).returncode == 1


def test_a_program_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(HostError) as caught:
        Host(tmp_path).run_on(["no-such-program"], log=LOG, timeout=60)
    assert "no-such-program" in caught.value.message
