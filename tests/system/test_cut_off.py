"""Power cuts and reboots in the middle of each step, of a first join and of a renewal.

Some machines are cut off side by side: most of it is waiting.
"""

import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from lab import image
from lab.faulty import PORT, Faulty
from lab.machine import Machine
from lab.network import CLUSTER_IPV4, Network
from lab.run import Run
from system.joining import Mesh, join, unit
from system.steps import AGENT, STEPS, Subject, is_healthy, left_over, until

LANES = 3
UPSET = {"a power cut": Machine.crash, "a reboot": Machine.reboot}
RENEWING = [step for step in STEPS if step != "install"]  # the package stays


def first_join(step: str, upset: str, subject: Subject) -> None:
    subject.begin_anew()
    machine, files = subject.machine, subject.bundle()
    subject.slow_down(step)
    subject.serve(files, slowly=step == "fetch")
    subject.start_and_meet(step, files)
    subject.refuse()

    UPSET[upset](machine)

    # Nothing before the first start of a sidecar waits for the files: the daemon may still be at them.
    subject.settled(none={}, new=files)
    subject.serve(files)
    is_healthy(machine)
    assert subject.sets(new=files) == {"new"}
    assert left_over(machine) == ""
    assert machine.run(["rpm", "--verify", "--nomode", "--nouser", "--nogroup", "istio-sidecar"]).stdout == ""


def renewal(step: str, upset: str, subject: Subject) -> None:
    machine, old, new = subject.machine, subject.bundle(), subject.bundle()
    subject.serve(old)
    machine.run(["systemctl", "stop", AGENT])
    join(machine)
    assert subject.sets(old=old) == {"old"}
    subject.slow_down(step)
    subject.serve(new, slowly=step == "fetch")
    subject.start_and_meet(step, new)
    subject.refuse()

    UPSET[upset](machine)

    expected = {"fetch": "old", "verify": "old"}.get(step, "new")
    assert subject.sets(old=old, new=new) == {expected}
    until("the sidecar runs", lambda: unit(machine)["ActiveState"] == "active")  # without any endpoint
    subject.serve(new)
    until("the new set is in place", lambda: subject.sets(new=new) == {"new"})
    is_healthy(machine)
    assert left_over(machine) == ""


@pytest.mark.parametrize("upset", UPSET)
@pytest.mark.parametrize("step", STEPS)
def test_a_first_join_that_is_cut_off_in_a_step_ends_healthy_after_the_boot(
    step: str, upset: str, outcomes: "Outcomes"
) -> None:
    outcomes[first_join, step, upset].result()


@pytest.mark.parametrize("upset", UPSET)
@pytest.mark.parametrize("step", RENEWING)
def test_a_renewal_of_all_files_that_is_cut_off_in_a_step_leaves_one_whole_set_and_ends_healthy(
    step: str, upset: str, outcomes: "Outcomes"
) -> None:
    outcomes[renewal, step, upset].result()


# --- side by side -----------------------------------------------------------------


class FaultyAt(Faulty):
    """One at a port of its own."""

    def __init__(self, port: int, *, network: Network, run: Run) -> None:
        super().__init__(network=network, run=run)
        self.address = f"{CLUSTER_IPV4}:{port}"
        self.url = f"https://{self.address}/v1/bundle"


Scenario = Callable[[str, str, Subject], None]
Outcomes = dict[tuple[Scenario, str, str], Future[None]]
_OF_TEST: dict[str, Scenario] = {"test_a_first_join": first_join, "test_a_renewal": renewal}


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest,
    mesh: Mesh,
    network: Network,
    run: Run,
    fixture_rpms: tuple[Path, ...],
) -> Iterator[Outcomes]:
    """What came of each case that this session was asked for."""
    cases = [
        (scenario, str(item.callspec.params["step"]), str(item.callspec.params["upset"]))
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == request.path
        for beginning, scenario in _OF_TEST.items()
        if item.name.startswith(beginning)
    ]
    free: queue.SimpleQueue[Subject] = queue.SimpleQueue()
    with ExitStack() as stack:
        for number in range(min(LANES, len(cases))):
            faulty = stack.enter_context(FaultyAt(PORT + number, network=network, run=run))
            layers = image.layers("rpm", fixture_rpms=fixture_rpms)
            machine = stack.enter_context(Machine(f"cut{number}", layers=layers, network=network, run=run))
            free.put(Subject(machine, mesh, faulty))
        pool = ThreadPoolExecutor(LANES)
        try:
            yield {case: pool.submit(_played, *case, free) for case in cases}
        finally:
            pool.shutdown(cancel_futures=True)


def _played(scenario: Scenario, step: str, upset: str, free: "queue.SimpleQueue[Subject]") -> None:
    subject = free.get()
    try:
        if scenario is renewal and not (subject.machine.root / "srv/istio-sidecar.rpm").exists():
            subject.begin_anew()
        scenario(step, upset, subject)
    except BaseException as error:
        error.add_note(subject.machine.journal())
        subject.begin_anew()
        raise
    finally:
        free.put(subject)
