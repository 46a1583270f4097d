"""The stand-in packages: what is in them, without installing them."""

import hashlib
import subprocess
from pathlib import Path

import pytest

from lab.cluster import Release
from standins import packages

FILES = {
    "/lib/systemd/system/istio.service",
    "/usr/local/bin/istio-start.sh",
    "/usr/local/bin/pilot-agent",
    "/var/lib/istio/envoy/envoy_bootstrap_tmpl.json",
    "/var/lib/istio/envoy/sidecar.env",
}


def output_of(*command: str | Path) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize(("behaves_as", "hostname"), [("1.12", set()), ("newest", {"hostname"})])
def test_both_formats_have_the_files_and_the_dependencies_of_their_release(
    tmp_path: Path, behaves_as: Release, hostname: set[str]
) -> None:
    built = packages.build(tmp_path, behaves_as=behaves_as, with_envoy=False)

    assert set(output_of("rpm", "-qpl", built.rpm)) == FILES
    requires = {line for line in output_of("rpm", "-qp", "--requires", built.rpm) if not line.startswith("rpmlib")}
    assert requires == {"iproute", "iptables", "sudo", "/bin/sh"} | hostname
    contents = {line.split()[-1].lstrip(".") for line in output_of("dpkg-deb", "-c", built.deb)}
    assert {name for name in contents if not name.endswith("/")} == FILES
    (depends,) = output_of("dpkg-deb", "-f", built.deb, "Depends")
    assert set(depends.split(", ")) == {"iproute2", "iptables", "sudo"} | hostname


def test_the_files_that_an_operator_may_edit_are_configuration_files(tmp_path: Path) -> None:
    built = packages.build(tmp_path, with_envoy=False)
    assert set(output_of("rpm", "-qp", "--configfiles", built.rpm)) == set(packages.CONFIG_FILES)
    control = tmp_path / "control"
    subprocess.run(["dpkg-deb", "-e", built.deb, control], check=True)
    assert set((control / "conffiles").read_text().split()) == set(packages.CONFIG_FILES)


def test_the_digest_beside_a_package_is_its_own(tmp_path: Path) -> None:
    built = packages.build(tmp_path, version="1.27.0", with_envoy=False)
    for file in (built.rpm, built.deb):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert file.with_name(f"{file.name}.sha256").read_text() == f"{digest} {file.name}\n"


@pytest.mark.parametrize(("behaves_as", "redirection"), [("1.12", "2> /var/log"), ("newest", "2>> ./var/log")])
def test_up_to_1_12_a_start_empties_the_logs_and_later_it_appends(
    tmp_path: Path, behaves_as: Release, redirection: str
) -> None:
    built = packages.build(tmp_path, behaves_as=behaves_as, with_envoy=False)
    subprocess.run(["dpkg-deb", "-x", built.deb, tmp_path / "tree"], check=True)
    script = (tmp_path / "tree/usr/local/bin/istio-start.sh").read_text()
    assert "@" not in script.replace("${flags[@]}", "")
    folder = redirection.split()[1]
    assert f"ISTIO_LOG_DIR:-{folder}/istio" in script
    assert f" {redirection.split(maxsplit=1)[0]} $ISTIO_LOG_DIR/istio.err.log" in script


def test_the_fixtures_provide_what_the_package_requires(tmp_path: Path) -> None:
    built = packages.build(tmp_path, with_envoy=False)
    fixtures = packages.build_fixture_rpms(tmp_path)
    provided = {line.split()[0] for line in output_of("rpm", "-qp", "--provides", *fixtures)}
    requires = {line for line in output_of("rpm", "-qp", "--requires", built.rpm) if not line.startswith("rpmlib")}
    assert requires <= provided
