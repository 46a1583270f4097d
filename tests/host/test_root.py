"""A tree that is not the machine we run on: nothing of ours is taken for its own, and no program is led out of it."""

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from vmmesh_agent import place, signals
from vmmesh_agent.host import Host
from vmmesh_agent.units import Units

PATH = PurePosixPath


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with a sidecar that is installed, and beside it what must never be reached."""
    root = tmp_path / "root"
    for folder in ("etc", "opt", "usr/lib/systemd/system"):
        (root / folder).mkdir(parents=True)
    (root / "usr/lib/systemd/system/istio.service").touch()
    (tmp_path / "packages").mkdir()
    return root


@pytest.fixture
def host(tree: Path) -> Host:
    return Host(tree)


@pytest.fixture
def port() -> Iterator[int]:
    """The port of an HTTP server on the loopback interface, which is ours and not the tree's."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_a_program_gets_a_path_on_which_no_link_leads_out(host: Host, tree: Path) -> None:
    (tree / "srv/packages").mkdir(parents=True)
    (tree / "opt/absolute").symlink_to("/srv/packages")
    (tree / "opt/upwards").symlink_to("../../../srv/packages")
    for name in ("absolute", "upwards"):
        assert host.outside(PATH(f"/opt/{name}/a.rpm")) == tree / "srv/packages/a.rpm"
    (tree / "opt/away").symlink_to(tree.parent / "packages")
    assert not host.outside(PATH("/opt/away/a.rpm")).exists()


def test_its_units_are_down_whatever_runs_here(host: Host) -> None:
    units = Units(host)
    shown = units.state("istio.service")
    assert (shown.is_loaded, shown.is_down, shown.is_running) == (True, True, False)
    assert not units.state("dbus.service").is_loaded
    assert not units.state("absent.service").is_loaded


def test_nobody_answers_for_it(host: Host, port: int) -> None:
    assert Host().answers(port, "/", 5)
    assert not host.answers(port, "/", 5)


def test_the_rules_of_this_network_are_not_its_own(host: Host) -> None:
    assert signals.is_captured(host) is None


def test_what_its_resolver_will_find_is_not_known_here(host: Host) -> None:
    assert place.resolves(host, "istiod.example.invalid")


def test_its_name_is_the_one_that_it_boots_with(host: Host, tree: Path) -> None:
    assert host.name == ""
    (tree / "etc/hostname").write_text("vm7\n")
    assert host.name == "vm7"


def test_its_users_are_not_ours(host: Host, tree: Path) -> None:
    assert host.account("root") is None
    (tree / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nistio-proxy:x:1234:5678::/var/lib/istio:/bin/sh\n")
    found = host.account("istio-proxy")
    assert found
    assert (found.uid, found.gid) == (1234, 5678)
