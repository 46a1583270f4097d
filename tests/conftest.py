"""For all tests: the run of the lab, and what a failed test shows of its machines."""

from collections.abc import Generator, Iterator

import pytest

from lab.machine import Machine
from lab.network import Network
from lab.run import Run
from lab.services import Service
from vm.machine import VirtualMachine


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to the report of a failure what the machines and the services of the test have to say."""
    report = yield
    if report.failed and call.when != "teardown" and isinstance(item, pytest.Function):
        for name, value in item.funcargs.items():
            if isinstance(value, Machine | VirtualMachine):
                report.sections.append((f"journal of {name}", value.journal()))
                report.sections.append((f"console of {name}", value.console()))
            elif isinstance(value, Service):
                report.sections.append((f"output of {name}", value.output()))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests measured and did not judge (`record_property("measured", …)`)."""
    reports = [each for outcome in ("passed", "failed") for each in terminalreporter.getreports(outcome)]
    measured = [text for report in reports for name, text in report.user_properties if name == "measured"]
    if measured:
        terminalreporter.section("measured")
        for text in measured:
            terminalreporter.write_line(str(text))


@pytest.fixture(scope="session")
def run() -> Iterator[Run]:
    """Everything that this session starts; gone with it."""
    with Run() as run:
        yield run


@pytest.fixture(scope="session")
def network(run: Run) -> Network:
    """The cluster's side of the network; machines hang on it by `machine.link`."""
    return Network(run)
