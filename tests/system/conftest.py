"""Machines with real systemd, and the cluster that they join.

Each test has its own machine, stand-in istiod and endpoint unless it asks for `shared_machine`; the network
and the built packages are the session's.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import image
from lab.cluster import Cluster
from lab.machine import Machine
from lab.network import Network
from lab.run import Run
from lab.services import Endpoint, Istiod
from standins.packages import Packages, build, build_fixture_rpms
from system.joining import Mesh, join, running_mesh

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder, so that `scripts/test --fast` can leave them out."""
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.system)


@pytest.fixture(scope="session")
def packages(run: Run) -> Packages:
    """The stand-in istio-sidecar as rpm and as deb."""
    return build(run.folder / "packages")


@pytest.fixture(scope="session")
def fixture_rpms(run: Run) -> tuple[Path, ...]:
    """What a distribution with rpm would have installed; the rpm machines have it already."""
    return build_fixture_rpms(run.folder / "fixture-rpms")


@pytest.fixture
def machine(network: Network, run: Run, fixture_rpms: tuple[Path, ...]) -> Iterator[Machine]:
    """A fresh machine with rpm as its package manager, and the agent installed."""
    layers = image.layers("rpm", fixture_rpms=fixture_rpms)
    with Machine("vm1", layers=layers, network=network, run=run) as machine:
        yield machine


@pytest.fixture
def deb_machine(network: Network, run: Run) -> Iterator[Machine]:
    """A fresh machine with dpkg as its package manager, and the agent installed."""
    with Machine("vm2", layers=image.layers("deb"), network=network, run=run) as machine:
        yield machine


@pytest.fixture(scope="module")
def shared_machine(network: Network, run: Run, fixture_rpms: tuple[Path, ...]) -> Iterator[Machine]:
    """One machine with rpm for all tests of a module that leave it as they found it."""
    layers = image.layers("rpm", fixture_rpms=fixture_rpms)
    with Machine("vm3", layers=layers, network=network, run=run) as machine:
        yield machine


@pytest.fixture
def istiod(network: Network, run: Run) -> Iterator[Istiod]:
    """The running stand-in istiod of a new cluster."""
    with Istiod(Cluster.create(), network=network, run=run) as istiod:
        yield istiod


@pytest.fixture
def cluster(istiod: Istiod) -> Cluster:
    """The cluster that `istiod` speaks for."""
    return istiod.cluster


@pytest.fixture
def endpoint(cluster: Cluster, packages: Packages, network: Network, run: Run) -> Iterator[Endpoint]:
    """The running vmmesh-endpoint with a valid bundle of `cluster` and both packages."""
    files = cluster.bundle()
    with Endpoint(files, [packages.rpm, packages.deb], network=network, run=run) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def mesh(packages: Packages, network: Network, run: Run) -> Iterator[Mesh]:
    """A cluster with its stand-in istiod and its endpoint, for all tests of a module."""
    with running_mesh(packages, network=network, run=run) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def joined(shared_machine: Machine, mesh: Mesh) -> Machine:
    """A healthy member of `mesh`; each test mends what it broke."""
    mesh.endpoint.invite(shared_machine)
    join(shared_machine)
    return shared_machine
