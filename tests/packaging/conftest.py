"""The agent's packages, machines that have nothing of the agent but them, and a mesh to join."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import vmmesh_agent
from lab import image
from lab.built import Built, Manager, agent_packages, copy_sources
from lab.image import Family
from lab.machine import Machine
from lab.network import Network
from lab.run import Run
from standins.packages import build, build_fixture_rpms
from system.joining import Mesh, running_mesh

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder, so that `scripts/test --fast` can leave them out."""
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.system)


@pytest.fixture(scope="session")
def built() -> Built:
    """The packages of the working tree."""
    return agent_packages()


@pytest.fixture(scope="session")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The same agent, called version 9.9.9."""
    copy = copy_sources(tmp_path_factory.mktemp("newer") / "copy")
    module = copy / "agent/vmmesh_agent/__init__.py"
    old = module.read_text()
    new = old.replace(f'"{vmmesh_agent.__version__}"', '"9.9.9"')
    assert new != old
    module.write_text(new)
    return agent_packages(copy)


@pytest.fixture(scope="module")
def mesh(network: Network, run: Run) -> Iterator[Mesh]:
    """A cluster with its stand-in istiod and its endpoint, which has the sidecar's packages."""
    with running_mesh(build(run.folder / "packages"), network=network, run=run) as mesh:
        yield mesh


@pytest.fixture(params=["deb", "rpm"])
def manager(request: pytest.FixtureRequest, network: Network, run: Run) -> Iterator[Manager]:
    """The package manager of a fresh machine of each family, without the agent."""
    family: Family = request.param
    fixture_rpms = build_fixture_rpms(run.folder / "fixture-rpms") if family == "rpm" else ()
    layers = image.layers(family, fixture_rpms=fixture_rpms, with_agent=False)
    with Machine(f"{family}1", layers=layers, network=network, run=run) as machine:
        yield Manager(family, machine)


@pytest.fixture
def machine(manager: Manager) -> Machine:
    """The machine of `manager`; a failed test shows its journal."""
    return manager.machine
