"""Which package, from where, and whether it may be installed."""

import os
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from factories import a_config, a_package
from fakes import FakeManager, write_package
from vmmesh_agent import install
from vmmesh_agent.bundle import Sidecar
from vmmesh_agent.config import SidecarSettings
from vmmesh_agent.errors import AgentError, InstallError
from vmmesh_agent.host import ROOT, Host

PATH = PurePosixPath
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes files of root's")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "usr/local/bin").mkdir(parents=True)
    return tmp_path


def plan(tree: Path, manager: FakeManager, sidecar: Sidecar | None = None, **settings: Any) -> install.Plan:
    return install.plan(Host(tree), a_config(sidecar=SidecarSettings(**settings)), sidecar, [manager])


def refusal(tree: Path, manager: FakeManager, sidecar: Sidecar | None = None, **settings: Any) -> str:
    with pytest.raises(AgentError) as caught:
        plan(tree, manager, sidecar, **settings)
    assert manager.installations == []
    return caught.value.code


def test_what_is_installed_stays_where_nobody_names_a_package(tree: Path) -> None:
    planned = plan(tree, FakeManager(Host(tree), installed="1.28.2"))
    assert (planned.installed, planned.source, str(planned)) == ("1.28.2", None, "istio-sidecar 1.28.2 is installed")


def test_a_package_whose_script_did_not_run_is_installed_anew(tree: Path) -> None:
    manager = FakeManager(Host(tree), installed="1.28.2")
    (tree / "var/lib/istio/proxy").rmdir()
    planned = plan(tree, manager, Sidecar("1.28.2", (a_package(),)))
    assert planned.source is not None


def test_where_nothing_is_installed_and_nobody_names_a_package_it_is_said(tree: Path) -> None:
    assert refusal(tree, FakeManager(Host(tree))) == "no-package"
    assert refusal(tree, FakeManager(Host(tree)), Sidecar("1.28.2")) == "no-package"


def test_the_bundle_names_the_package(tree: Path) -> None:
    sidecar = Sidecar("1.28.2", (a_package(format="rpm", arch="x86_64"), a_package(arch="arm64"), a_package(size=7)))
    source = plan(tree, FakeManager(Host(tree)), sidecar).source
    assert source
    assert (source.url, source.sha256, source.version, source.size) == (a_package().url, "ab" * 32, "1.28.2", 7)


@pytest.mark.parametrize("installed", ["1.28.2", "1.28.2-1"])
def test_the_named_version_is_not_installed_twice(tree: Path, installed: str) -> None:
    sidecar = Sidecar("1.28.2", (a_package(),))
    assert plan(tree, FakeManager(Host(tree), installed=installed), sidecar).source is None


def test_a_bundle_for_other_machines_is_refused(tree: Path) -> None:
    assert (
        refusal(tree, FakeManager(Host(tree)), Sidecar("1", (a_package(arch="arm64"),))) == "package-wrong-architecture"
    )


def test_the_configuration_goes_before_the_bundle(tree: Path) -> None:
    write_package(tree / "opt/mine.deb", version="1.27.0")
    source = plan(tree, FakeManager(Host(tree)), Sidecar("1.28.2", (a_package(),)), package="/opt/mine.deb").source
    assert source
    assert (source.path, source.version) == (PATH("/opt/mine.deb"), "1.27.0")


def test_the_newest_fitting_package_of_a_folder_is_chosen(tree: Path) -> None:
    for name, changes in {
        "istio-sidecar-1.9.deb": {"version": "1.9.9"},
        "istio-sidecar-1.28.deb": {"version": "1.28.2"},
        "istio-sidecar-1.30-arm.deb": {"version": "1.30.0", "arch": "arm64"},
        "istio-sidecar-other.deb": {"version": "1.31.0", "name": "other"},
        "nginx.deb": {"version": "9"},
        "istio-sidecar-1.40.rpm": {"version": "1.40"},
    }.items():
        write_package(tree / "opt" / name, **changes)  # type: ignore[arg-type]
    source = plan(tree, FakeManager(Host(tree)), package="/opt").source
    assert source
    assert source.path == PATH("/opt/istio-sidecar-1.28.deb")


@pytest.mark.parametrize(
    ("package", "code"),
    [
        ("/opt/none.deb", "package-missing"),
        ("/opt", "package-missing"),
        ("/opt/a.rpm", "package-wrong-format"),
        ("/opt/broken.deb", "package-invalid"),
    ],
)
def test_a_configured_package_that_cannot_be_used_is_named(tree: Path, package: str, code: str) -> None:
    write_package(tree / "opt/a.rpm")
    (tree / "opt/broken.deb").write_text("half")
    assert refusal(tree, FakeManager(Host(tree)), package=package) == code


def test_an_older_package_is_installed_only_on_purpose(tree: Path) -> None:
    write_package(tree / "opt/a.deb", version="1.27.0")
    manager = FakeManager(Host(tree), installed="1.28.2")
    assert refusal(tree, manager, package="/opt/a.deb") == "downgrade-refused"
    assert plan(tree, manager, package="/opt/a.deb", allow_downgrade=True).source


def judged(tree: Path, manager: FakeManager, sha256: str = "", **package: Any) -> str:
    """Return the code with which a package is refused, empty where it is taken."""
    write_package(tree / "opt/a.deb", **package)
    source = install.Source(manager, path=PATH("/opt/a.deb"), sha256=sha256)
    try:
        install.judge(Host(tree), source, PATH("/opt/a.deb"), SidecarSettings())
    except AgentError as error:
        return error.code
    return ""


def test_a_package_is_looked_into_before_anything_is_changed(tree: Path) -> None:
    manager = FakeManager(Host(tree), installed="1.28.2")
    assert judged(tree, manager) == ""
    assert judged(tree, manager, arch="all") == ""
    assert judged(tree, manager, name="nginx") == "package-invalid"
    assert judged(tree, manager, arch="arm64") == "package-wrong-architecture"
    assert judged(tree, manager, version="1.27.0") == "downgrade-refused"
    assert judged(tree, manager, size=2**40) == "disk-full"
    assert judged(tree, manager, sha256="ab" * 32) == "package-wrong-digest"
    assert manager.installations == []


@needs_root
def test_a_digest_that_was_installed_before_is_not_downloaded_again(tree: Path) -> None:
    host, manager = Host(tree), FakeManager(Host(tree))
    url, digest = "https://example.com/a.deb", "cd" * 32
    source = plan(tree, manager, package=url, sha256=digest).source
    assert source
    path = install.destination(host, source)
    write_package(host.outside(path))
    install.apply(host, source, path, install.judge(host, source, path, SidecarSettings()))
    assert manager.installations == [path]
    assert plan(tree, manager, package=url, sha256=digest).source is None
    assert plan(tree, manager, package=url, sha256="ef" * 32).source


@needs_root
def test_a_damaged_record_costs_a_download_and_no_more(tree: Path) -> None:
    host = Host(tree)
    for content in (b"", b"{", b"\xff", b"[]", b"7"):
        host.make_folder(install.RECORD.parent, ROOT, 0o700)
        host.write(install.RECORD, content, ROOT, 0o600)
        manager = FakeManager(host, installed="1.28.2")
        assert plan(tree, manager, package="https://example.com/a.deb", sha256="cd" * 32).source


def test_a_plan_says_what_it_would_do(tree: Path) -> None:
    sidecar = Sidecar("1.29.0", (a_package(),))
    assert str(plan(tree, FakeManager(Host(tree)), sidecar)) == "install istio-sidecar 1.29.0"
    assert str(plan(tree, FakeManager(Host(tree), installed="1.28.2"), sidecar)) == "istio-sidecar 1.28.2 → 1.29.0"
    assert str(install.Plan(None)) == "istio-sidecar is not installed"


def test_a_machine_without_a_package_manager_is_told(tree: Path) -> None:
    with pytest.raises(InstallError, match="no packages at all"):
        install.plan(Host(tree), a_config(), Sidecar("1", (a_package(),)), [])


def test_a_package_whose_user_is_gone_is_installed_again(tree: Path) -> None:
    manager = FakeManager(Host(tree), installed="1.28.2")
    (tree / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    assert plan(tree, manager, Sidecar("1.28.2", (a_package(),))).source
