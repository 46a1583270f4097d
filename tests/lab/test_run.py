"""Nothing outlives a run, however it ends."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lab import run as lab_run
from lab.image import REPOSITORY
from lab.run import Run

_PROGRAM = textwrap.dedent(
    """
    import subprocess, sys, time
    from lab import image
    from lab.machine import Machine
    from lab.network import Network
    from lab.run import Run

    with Run() as run:
        run.spawn("service", ["sleep", "1000"], output=subprocess.DEVNULL)
        with Machine("lost", layers=[image.base_tree()], network=Network(run), run=run) as machine:
            print(run.name, run.folder, machine.leader, flush=True)
            time.sleep(1000)
    """
)


@pytest.mark.system
def test_what_a_killed_run_left_is_removed_by_the_next_one() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM], cwd=REPOSITORY / "tests", stdout=subprocess.PIPE, text=True
    ) as lost:
        assert lost.stdout is not None
        name, folder, leader = lost.stdout.readline().split()
        lost.send_signal(signal.SIGKILL)
    assert _runs(leader)

    assert name in lab_run.sweep()

    assert not _runs(leader)
    assert not Path(folder).exists()
    assert not list(Path("/run/netns").glob(f"{name}*"))
    assert not list(Path("/sys/fs/cgroup").glob(f"**/{name}"))


@pytest.mark.system
def test_killing_a_group_leaves_the_others(run: Run) -> None:
    first = run.spawn("first", ["sh", "-c", "setsid sleep 1000 & echo up; sleep 1000"], output=subprocess.PIPE)
    second = run.spawn("second", ["sh", "-c", "echo up; sleep 1000"], output=subprocess.PIPE)
    for process in (first, second):
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
    run.kill("first")
    # A shell whose sleep dies before it ends by itself, and says so.
    assert first.wait() in {-signal.SIGKILL, 128 + signal.SIGKILL}
    assert first.stdout is not None
    assert first.stdout.read() == b""  # nobody is left who could write, the other session included
    assert second.poll() is None
    run.kill("second")
    assert second.wait() in {-signal.SIGKILL, 128 + signal.SIGKILL}
    for process in (first, second):
        process.communicate()  # closes the pipe


def _runs(number: str) -> bool:
    # A zombie waits for its parent only, which may be an init that is not ours.
    try:
        return "State:\tZ" not in Path("/proc", number, "status").read_text()
    except FileNotFoundError:
        return False
