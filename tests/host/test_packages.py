"""The real dpkg and rpm, on small packages made here, below a root of their own."""

import os
import shutil
import subprocess
from pathlib import Path, PurePosixPath

import pytest

from vmmesh_agent.errors import InstallError
from vmmesh_agent.host import Host
from vmmesh_agent.packages import Deb, Rpm, fits, managers

PATH = PurePosixPath
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="dpkg and rpm install as root alone")


def a_deb(tree: Path, version: str = "1.28.2", *, depends: str = "", name: str = "istio-sidecar") -> PurePosixPath:
    source = tree.parent / f"deb-{version}"
    (source / "DEBIAN").mkdir(parents=True)
    (source / "usr/local/bin").mkdir(parents=True)
    (source / "usr/local/bin/envoy").write_text(version)
    control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: a\n"
    control += "Installed-Size: 7\n"
    (source / "DEBIAN/control").write_text(control + (f"Depends: {depends}\n" if depends else ""))
    file = tree / f"opt/{name}-{version}.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-Znone", "--build", source, file], check=True, capture_output=True
    )
    return PATH("/opt") / file.name


def an_rpm(tree: Path, version: str = "1.28.2", *, requires: str = "") -> PurePosixPath:
    top = tree.parent / f"rpm-{version}"
    top.mkdir()
    (top / "a.spec").write_text(
        f"Name: istio-sidecar\nVersion: {version}\nRelease: 1\n"
        "Summary: a\nLicense: a\nBuildArch: noarch\nAutoReqProv: no\n"
        + (f"Requires: {requires}\n" if requires else "")
        + "%description\na\n%install\n"
        + f"mkdir -p %{{buildroot}}/usr/local/bin; echo {version} > %{{buildroot}}/usr/local/bin/envoy\n"
        + "%files\n/usr/local/bin/envoy\n"
    )
    subprocess.run(["rpmbuild", "-bb", "--define", f"_topdir {top}", top / "a.spec"], check=True, capture_output=True)
    (built,) = top.rglob("*.rpm")
    shutil.copy(built, tree / "opt")
    return PATH("/opt") / built.name


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A machine with empty databases of both."""
    root = tmp_path / "root"
    for folder in ("opt", "etc", "tmp", "var/lib/dpkg/info", "var/lib/dpkg/updates", "var/log"):
        (root / folder).mkdir(parents=True)
    (root / "var/lib/dpkg/status").touch()
    (root / "var/lib/dpkg/available").touch()
    return root


# --- dpkg ---


def test_a_deb_tells_what_it_is(tree: Path) -> None:
    package = Deb(Host(tree)).inspect(a_deb(tree))
    assert (package.name, package.version, package.arch, package.installed_bytes) == (
        "istio-sidecar",
        "1.28.2",
        "all",
        7 * 1024,
    )
    assert fits(package.arch, Deb(Host(tree)))


@needs_root
def test_a_deb_is_installed_changed_and_seen(tree: Path) -> None:
    deb = Deb(Host(tree))
    assert deb.installed("istio-sidecar") is None
    deb.install(a_deb(tree))
    assert deb.installed("istio-sidecar") == "1.28.2"
    deb.install(a_deb(tree, "1.29.0"))
    assert deb.installed("istio-sidecar") == "1.29.0"
    assert (tree / "usr/local/bin/envoy").read_text() == "1.29.0"


@needs_root
@pytest.mark.parametrize("depends", ["no-such-package", "iptables (>= 99), sudo", "a | b"])
def test_a_deb_that_needs_what_is_not_there_leaves_nothing_behind(tree: Path, depends: str) -> None:
    deb = Deb(Host(tree))
    with pytest.raises(InstallError) as caught:
        deb.install(a_deb(tree, depends=depends))
    assert (caught.value.code, caught.value.retry) == ("missing-dependency", True)
    assert depends.split(",", maxsplit=1)[0] in caught.value.message
    assert deb.installed("istio-sidecar") is None
    assert not (tree / "usr/local/bin/envoy").exists()


@needs_root
def test_a_deb_finds_the_alternatives_and_versions_that_it_needs(tree: Path) -> None:
    (tree / "var/lib/dpkg/status").write_text(
        "Package: iptables\nStatus: install ok installed\nVersion: 1.8.9-2\n"
        "Architecture: all\nMaintainer: a <a@b.c>\nDescription: a\n"
    )
    deb = Deb(Host(tree))
    deb.install(a_deb(tree, depends="nftables | iptables (>= 1.8), iptables"))
    assert deb.installed("istio-sidecar") == "1.28.2"


def test_debs_versions_are_compared_by_dpkgs_rules(tree: Path) -> None:
    deb = Deb(Host(tree))
    assert deb.is_newer("1.28.10", "1.28.9")
    assert deb.is_newer("1.28.0", "1.28.0~rc.1")
    assert not deb.is_newer("1.28.2", "1.28.2")


# --- rpm ---


def test_an_rpm_tells_what_it_is(tree: Path) -> None:
    rpm = Rpm(Host(tree))
    package = rpm.inspect(an_rpm(tree))
    assert (package.name, package.version, package.arch) == ("istio-sidecar", "1.28.2-1", "noarch")
    assert package.installed_bytes > 0
    assert fits(package.arch, rpm)


@needs_root
def test_an_rpm_is_installed_changed_and_seen(tree: Path) -> None:
    rpm = Rpm(Host(tree))
    assert rpm.installed("istio-sidecar") is None
    for version in ("1.28.2", "1.29.0"):
        rpm.install(an_rpm(tree, version))
        assert rpm.installed("istio-sidecar") == f"{version}-1"
        assert (tree / "usr/local/bin/envoy").read_text() == f"{version}\n"


def test_rpms_versions_are_compared_by_rpms_rules(tree: Path) -> None:
    rpm = Rpm(Host(tree))
    assert rpm.is_newer("1.28.10-1", "1.28.9-1")
    assert rpm.is_newer("1.28.0", "1.28.0~rc.1")
    assert not rpm.is_newer("1.28.2-1", "1.28.2-1")
    assert not rpm.is_newer('1")os.exit(1)--', "1.28")


def test_a_list_of_packages_is_no_rpm(tree: Path) -> None:
    """rpm would open what such a list names, as root: files, and addresses too."""
    (tree / "opt/list.rpm").write_text(f"{tree}{an_rpm(tree)}\n")
    with pytest.raises(InstallError) as caught:
        Rpm(Host(tree)).inspect(PATH("/opt/list.rpm"))
    assert caught.value.code == "package-invalid"


# --- both ---


@pytest.mark.parametrize("content", [b"", b"hello", b"!<arch>\n", b"\xed\xab\xee\xdb" + bytes(200)])
def test_what_is_no_package_is_named(tree: Path, content: bytes) -> None:
    for manager in (Deb(Host(tree)), Rpm(Host(tree))):
        file = tree / f"opt/a.{manager.format}"
        file.write_bytes(content)
        with pytest.raises(InstallError) as caught:
            manager.inspect(PATH("/opt") / file.name)
        assert caught.value.code == "package-invalid"


def test_a_package_for_another_architecture_does_not_fit(tree: Path) -> None:
    for manager in (Deb(Host(tree)), Rpm(Host(tree))):
        assert fits(manager.architecture(), manager)
        assert not fits("s390x", manager)


def test_this_machines_own_format_comes_first() -> None:
    assert [manager.format for manager in managers(Host())][:1] == ["deb"]
