"""Every form of a bundle, from an https address and from the machine's own disk."""

import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.cluster import Cluster, as_json, as_secret, as_tar, write_directory
from lab.cluster import Files as BundleFiles
from lab.machine import Machine
from lab.network import CLUSTER_IPV4, Network
from lab.run import Run
from system.joining import PLACED, Mesh, configure, join, run_of_sidecar
from system.web import Files, pin

Form = Callable[[BundleFiles, Path], bytes]


def _packed_by_tar(files: BundleFiles, scratch: Path) -> bytes:
    """What `tar czf` makes of istioctl's folder, seen from within: names begin with `./`."""
    folder = write_directory(files, scratch / "istioctl")
    command = ["tar", "--create", "--gzip", f"--directory={folder}", "."]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout


FORMS: dict[str, Form] = {
    "json": lambda files, _: as_json(files),
    "tar": lambda files, _: as_tar(files, gz=False),
    "tar.gz": lambda files, _: as_tar(files),
    "tar.gz in one folder": lambda files, _: as_tar(files, folder="vmintegration"),
    "tar.gz by tar itself": _packed_by_tar,
    "Secret": lambda files, _: as_secret(files),
}


@pytest.fixture(scope="module")
def files(mesh: Mesh, network: Network, run: Run) -> Iterator[Files]:
    """A server that knows nothing of bundles, trusted by its certificate."""
    certificate, key = mesh.cluster.server_certificate([CLUSTER_IPV4])
    with Files(certificate, key, network=network, run=run) as files:
        yield files


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", ["https", "file"])
def test_a_bundle_of_any_form_is_joined_with(  # noqa: PLR0917  # pytest passes by name
    form: str, way: str, joined: Machine, mesh: Mesh, files: Files, tmp_path: Path
) -> None:
    expected, label = _new_bundle(mesh.cluster)
    content = FORMS[form](expected, tmp_path)
    if way == "https":
        # The name says nothing: forms are told apart by content.
        endpoint = {"url": files.publish(label, content), "ca_pins": [pin(files.certificate)]}
    else:
        joined.write(f"/srv/{label}", content, mode=0o600)
        endpoint = {"url": f"file:///srv/{label}"}
    before = run_of_sidecar(joined)

    configure(joined, {"endpoint": endpoint, "workload_group": {"namespace": "vm", "name": "demo"}})
    join(joined)

    _assert_is_placed(expected, joined)
    assert run_of_sidecar(joined) == before  # only the token is another


def test_a_folder_with_the_five_files_is_joined_with(joined: Machine, mesh: Mesh) -> None:
    expected, label = _new_bundle(mesh.cluster)
    for name, content in expected.items():
        joined.write(f"/srv/{label}/{name}", content, mode=0o744)

    configure(joined, {"endpoint": {"url": f"file:///srv/{label}"}})
    join(joined)

    _assert_is_placed(expected, joined)


def test_a_folder_whose_name_is_escaped_in_the_address_is_found(joined: Machine, mesh: Mesh) -> None:
    expected, label = _new_bundle(mesh.cluster)
    for name, content in expected.items():
        joined.write(f"/srv/{label} 100%/{name}", content)

    configure(joined, {"endpoint": {"url": f"file:///srv/{label}%20100%25"}})
    join(joined)

    _assert_is_placed(expected, joined)


def _new_bundle(cluster: Cluster) -> tuple[BundleFiles, str]:
    """A bundle with a token of its own, and a name that no other has."""
    return cluster.bundle(token=cluster.token()), f"bundle-{uuid.uuid4().hex[:8]}"


def _assert_is_placed(expected: BundleFiles, machine: Machine) -> None:
    for name, path in PLACED.items():
        assert machine.read(path) == expected[name], name
    assert expected["hosts"] in machine.read("/etc/hosts")
