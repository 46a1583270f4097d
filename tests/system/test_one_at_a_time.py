"""One agent at a time changes the machine, and each ends when it is told to: soon, and with nothing half done."""

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from lab.faulty import Faulty
from lab.machine import Machine
from lab.network import Network
from lab.run import Run
from system.joining import PLACED, TOKEN, Mesh, join, run_of_sidecar, unit
from system.steps import AGENT, STEPS, Subject, is_healthy, left_over, until

_END_SECONDS = 2.0  # within which it has to end; a promise of the agent's, and no measure


@pytest.fixture(scope="module")
def subject(shared_machine: Machine, mesh: Mesh, network: Network, run: Run) -> Iterator[Subject]:
    """A machine that each test makes anew, or takes as a member."""
    with Faulty(network=network, run=run) as faulty:
        subject = Subject(shared_machine, mesh, faulty)
        subject.begin_anew()
        yield subject


# --- the lock ---------------------------------------------------------------------


@pytest.mark.parametrize("holder", ["bootstrap", "the daemon"])
def test_whoever_comes_second_waits_for_the_one_at_work_and_restore_says_who_that_is(
    holder: str, subject: Subject
) -> None:
    machine = _member(subject)
    before = run_of_sidecar(machine)
    files = subject.bundle()
    subject.refuse()
    with ExitStack() as stack:
        if holder == "bootstrap":
            first, number = stack.enter_context(subject.bootstrap_in("fetch", files))
        else:
            subject.start_and_meet("fetch", files)
            number = unit(machine, AGENT)["MainPID"]
        second = stack.enter_context(machine.spawn(["vmmesh-agent", "bootstrap"]))
        restored = machine.run(["vmmesh-agent", "restore"])
        assert restored.returncode == 0
        assert f"process {number}" in restored.stderr
        assert second.poll() is None
        assert run_of_sidecar(machine) == before

        subject.serve(files)

        said, _ = second.communicate(timeout=90)
        assert second.returncode == 0, said
        if holder == "bootstrap":
            assert first.wait(timeout=60) == 0
    assert subject.sets(new=files) == {"new"}


def test_the_sidecar_is_not_started_on_files_that_somebody_is_still_at(subject: Subject) -> None:
    machine = _member(subject)
    machine.run(["systemctl", "stop", "istio"])
    with machine.spawn(["flock", "/run/vmmesh-agent/lock", "sh", "-c", "echo held; sleep 3"]) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        machine.run(["rm", TOKEN])

        machine.run(["systemctl", "start", "istio"])

        assert holder.poll() == 0
    assert (machine.root / "run/secrets/tokens/istio-token").exists()
    is_healthy(machine)


def test_leaving_does_not_wait_for_the_daemons_attempt(subject: Subject) -> None:
    machine = _member(subject)
    files = subject.bundle()
    subject.refuse()
    subject.start_and_meet("fetch", files)

    left = machine.run(["vmmesh-agent", "leave"], check=False)

    assert left.returncode == 0, left.stderr
    assert unit(machine, AGENT)["ActiveState"] == "inactive"
    assert unit(machine)["ActiveState"] == "inactive"


# --- told to end --------------------------------------------------------------------


@pytest.mark.parametrize("step", [step for step in STEPS if step != "install"])
def test_sigterm_ends_a_bootstrap_in_each_step_soon_and_the_sidecar_runs_on_one_whole_set(
    step: str, subject: Subject
) -> None:
    machine = _member(subject)
    old = {name: machine.read(path) for name, path in PLACED.items()}
    old["hosts"] = machine.read("/etc/hosts").partition(b"agent\n")[2].partition(b"# END")[0]
    new = subject.bundle()
    subject.serve(new, slowly=step == "fetch")

    with subject.bootstrap_in(step, new) as (process, number):
        began = time.monotonic()
        machine.run(["kill", "-TERM", number])
        process.wait(timeout=60)
        assert time.monotonic() - began < _END_SECONDS
        assert process.returncode == 143

    assert len(subject.sets(old=old, new=new)) == 1, subject.sets(old=old, new=new)
    assert left_over(machine) == ""
    until("the sidecar runs", lambda: unit(machine)["ActiveState"] == "active")
    _ends_well(subject)


@pytest.mark.parametrize("step", ["fetch", "place", "start"])
def test_stopping_the_daemon_in_a_step_is_soon_and_leaves_one_whole_set(step: str, subject: Subject) -> None:
    machine = _member(subject)
    old = {name: machine.read(path) for name, path in PLACED.items()}
    old["hosts"] = machine.read("/etc/hosts").partition(b"agent\n")[2].partition(b"# END")[0]
    new = subject.bundle()
    subject.slow_down(step)
    subject.serve(new, slowly=step == "fetch")
    subject.start_and_meet(step, new)

    began = time.monotonic()
    machine.run(["systemctl", "stop", AGENT])
    assert time.monotonic() - began < _END_SECONDS

    assert len(subject.sets(old=old, new=new)) == 1, subject.sets(old=old, new=new)
    assert left_over(machine) == ""
    until("the sidecar runs", lambda: unit(machine)["ActiveState"] == "active")
    machine.run(["rm", "-rf", f"/run/systemd/system/{AGENT}.d"])
    machine.run(["systemctl", "daemon-reload"])
    _ends_well(subject)


@pytest.mark.parametrize("who", ["bootstrap", "the daemon"])
def test_a_package_manager_goes_on_and_ends_well_though_the_agent_is_ended(who: str, subject: Subject) -> None:
    subject.begin_anew()
    machine, files = subject.machine, subject.bundle()
    subject.serve(files)
    subject.slow_useradd(5)
    if who == "bootstrap":
        with subject.bootstrap_in("install", files) as (process, number):
            _script_hangs(machine)
            began = time.monotonic()
            machine.run(["kill", "-TERM", number])
            process.wait(timeout=60)
            assert time.monotonic() - began < _END_SECONDS
    else:
        subject.start_and_meet("install", files)
        _script_hangs(machine)
        began = time.monotonic()
        machine.run(["systemctl", "stop", AGENT])
        assert time.monotonic() - began < _END_SECONDS

    assert machine.run(["pgrep", "--exact", "rpm"]).stdout.strip()
    assert machine.run(["id", "istio-proxy"], check=False).returncode == 1
    until("rpm is done", lambda: machine.run(["pgrep", "--exact", "rpm"], check=False).returncode == 1)
    assert machine.run(["rpm", "--verify", "--nomode", "istio-sidecar"], check=False).stdout == ""
    assert machine.run(["readlink", "/etc/istio"]).stdout == "/var/lib/istio\n"  # what the script does after useradd
    _ends_well(subject)


def test_an_agent_that_is_started_while_the_package_manager_of_the_last_one_is_at_work_ends_healthy(
    subject: Subject,
) -> None:
    subject.begin_anew()
    machine, files = subject.machine, subject.bundle()
    subject.serve(files)
    subject.slow_useradd(5)
    subject.start_and_meet("install", files)
    _script_hangs(machine)

    machine.run(["systemctl", "restart", AGENT])

    is_healthy(machine)
    assert unit(machine, AGENT)["NRestarts"] == "0"
    assert machine.run(["rpm", "--verify", "--nomode", "istio-sidecar"], check=False).stdout == ""


def _script_hangs(machine: Machine) -> None:
    until("useradd is called", lambda: machine.run(["pgrep", "-f", "sbin/useradd"], check=False).stdout)


# --- told something else ----------------------------------------------------------------


def test_another_configuration_is_taken_over_while_the_daemon_waits_for_the_network(subject: Subject) -> None:
    machine = _member(subject)
    sound = machine.read("/etc/vmmesh-agent/config.yaml")
    dead = re.sub(rb"192\.0\.2\.1:\d+", b"192.0.2.1:9", sound)
    machine.write("/etc/vmmesh-agent/config.yaml", dead)
    machine.run(["systemctl", "restart", AGENT])
    machine.run(["vmmesh-agent", "wait", "--for", "degraded", "--timeout", "60"], timeout=90)
    process = unit(machine, AGENT)["MainPID"]
    files = subject.bundle()
    subject.serve(files)

    machine.write("/etc/vmmesh-agent/config.yaml", sound)
    machine.run(["systemctl", "reload", AGENT])

    until("the new bundle is in force", lambda: subject.sets(new=files) == {"new"})
    is_healthy(machine)
    assert unit(machine, AGENT)["MainPID"] == process


def test_a_daemon_that_hangs_is_killed_and_started_again_by_systemd(subject: Subject) -> None:
    machine = _member(subject)
    _impatient(machine, 3)
    before, process = run_of_sidecar(machine), unit(machine, AGENT)["MainPID"]

    machine.run(["systemctl", "kill", "--kill-whom=main", "--signal=STOP", AGENT])

    until("systemd starts it again", lambda: unit(machine, AGENT)["MainPID"] not in {"0", process})
    assert "Watchdog timeout" in machine.journal(AGENT)
    assert run_of_sidecar(machine) == before
    is_healthy(machine)


def test_a_step_that_takes_long_is_no_hang(subject: Subject) -> None:
    subject.begin_anew()
    machine = subject.machine
    files = subject.bundle()
    subject.serve(files)
    subject.slow_useradd(9)
    _impatient(machine, 6)

    is_healthy(machine)

    assert unit(machine, AGENT)["NRestarts"] == "0"
    assert "Watchdog timeout" not in machine.journal(AGENT)


def _impatient(machine: Machine, seconds: int) -> None:
    """Start the daemon with a watchdog of some seconds; until the next boot."""
    text = f"[Service]\nWatchdogSec={seconds}\nTimeoutStopSec=2\nTimeoutAbortSec=2\nRestartSec=1\n"
    machine.write(f"/run/systemd/system/{AGENT}.d/impatient.conf", text)
    machine.run(["systemctl", "daemon-reload"])
    machine.run(["systemctl", "restart", AGENT])


# --- steps -------------------------------------------------------------------------------


def _member(subject: Subject) -> Machine:
    """The machine as a healthy member, without a daemon."""
    machine, files = subject.machine, subject.bundle()
    subject.serve(files)
    machine.run(["rm", "-rf", f"/run/systemd/system/{AGENT}.d"])
    machine.run(["systemctl", "daemon-reload"])
    machine.run(["systemctl", "stop", AGENT])
    join(machine)
    assert subject.sets(new=files) == {"new"}
    return machine


def _ends_well(subject: Subject) -> None:
    """A new start, with an endpoint that is sound again, ends healthy with all files of one bundle."""
    _member(subject)
    assert left_over(subject.machine) == ""
