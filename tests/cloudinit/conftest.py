"""Machines that cloud-init sets up at their first boot, and the mesh that they join."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cloudinit import image as cloud
from cloudinit.repository import Mirror
from lab.image import Family
from lab.machine import Machine
from lab.network import Network
from lab.run import Run
from standins.packages import Packages, build, build_fixture_rpms
from system.joining import Mesh, running_mesh

_HERE = Path(__file__).parent

Boot = Callable[..., Machine]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder, so that `scripts/test --fast` can leave them out."""
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.system)


@pytest.fixture(scope="session")
def packages(run: Run) -> Packages:
    """The stand-in istio-sidecar as rpm and as deb."""
    return build(run.folder / "packages")


@pytest.fixture(scope="module")
def mesh(packages: Packages, network: Network, run: Run) -> Iterator[Mesh]:
    """A cluster with its stand-in istiod and its endpoint, for all tests of a module."""
    with running_mesh(packages, network=network, run=run) as mesh:
        yield mesh


@pytest.fixture
def mirror(network: Network, run: Run) -> Iterator[Mirror]:
    with Mirror(network=network, run=run) as mirror:
        yield mirror


@pytest.fixture
def boot(network: Network, run: Run, tmp_path: Path) -> Iterator[Boot]:
    """Boot a machine with this user-data, and return it when cloud-init is done with it.

    `with_agent` says whether its image has the agent; `files` is a layer with more that is in the image.
    """
    with ExitStack() as machines:

        def boot(
            user_data: str, *, family: Family = "deb", with_agent: bool = True, files: Path | None = None
        ) -> Machine:
            fixture_rpms = build_fixture_rpms(run.folder / "fixture-rpms") if family == "rpm" else ()
            layers = cloud.layers(family, with_agent=with_agent, fixture_rpms=fixture_rpms)
            layers += [*([files] if files else []), cloud.seed(tmp_path / "seed", user_data)]
            return machines.enter_context(Machine("vm1", layers=layers, network=network, run=run))

        yield boot


@pytest.fixture(scope="module")
def plain(network: Network, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine on which cloud-init was given nothing to do."""
    seed = cloud.seed(tmp_path_factory.mktemp("plain"), "#cloud-config\n{}\n")
    layers = [*cloud.layers("deb", with_agent=True), seed]
    with Machine("vm2", layers=layers, network=network, run=run) as machine:
        yield machine
