"""The packages beside the bundle: real ones, made by rpmbuild and dpkg-deb."""

import hashlib
import subprocess
from pathlib import Path

import httpx
import pytest

from endpoint.serving import Setup, error_of, eventually

SPEC = """
Name: {name}
Version: {version}
Release: 1
Epoch: 1
Summary: test
License: none
BuildArch: {arch}
%description
test
%files
"""
CONTROL = """Package: {name}
Version: {version}
Architecture: {arch}
Maintainer: nobody <nobody@example.com>
Description: test
"""


def build_rpm(
    folder: Path, target: Path, *, name: str = "istio-sidecar", version: str = "1.12.2", arch: str = "noarch"
) -> Path:
    """Build an empty rpm package; real packages of Istio are named without version too."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = folder / "package.spec"
    spec.write_text(SPEC.format(name=name, version=version, arch=arch))
    command: list[str | Path] = ["rpmbuild", "-bb", "--quiet", "--target", arch, "--define", f"_topdir {folder}", spec]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = (folder / "RPMS").glob("*/*.rpm")
    target.parent.mkdir(exist_ok=True)
    return built.rename(target)


def build_deb(
    folder: Path,
    target: Path,
    *,
    name: str = "istio-sidecar",
    version: str = "1.12.2",
    arch: str = "amd64",
    compression: str = "gzip",
    payload: bytes = b"",
) -> Path:
    """Build a deb package of one file."""
    control = folder / "tree" / "DEBIAN" / "control"
    control.parent.mkdir(parents=True, exist_ok=True)
    control.write_text(CONTROL.format(name=name, version=version, arch=arch))
    (control.parents[1] / "payload").write_bytes(payload)
    target.parent.mkdir(exist_ok=True)
    command: list[str | Path] = ["dpkg-deb", "--root-owner-group", f"-Z{compression}", "-b", control.parents[1], target]
    subprocess.run(command, check=True, capture_output=True)
    return target


def sidecar(answer: httpx.Response) -> dict[str, object]:
    content = answer.json()["sidecar"]
    assert isinstance(content, dict)
    return content


def described(server_base: str, package: Path, **values: str) -> dict[str, object]:
    """What the bundle has to say of a package."""
    return {
        **values,
        "version": "1.12.2",
        "url": f"{server_base}/v1/packages/{package.name}",
        "sha256": hashlib.sha256(package.read_bytes()).hexdigest(),
        "size": package.stat().st_size,
    }


@pytest.mark.parametrize("compression", ["gzip", "xz"])
def test_packages_are_described_by_their_own_headers_and_served_with_a_digest(setup: Setup, compression: str) -> None:
    rpm = build_rpm(setup.folder / "rpm", setup.packages / "istio-sidecar.rpm", arch="x86_64")
    deb = build_deb(
        setup.folder / "deb", setup.packages / "istio-sidecar.deb", version="1:1.12.2-3", compression=compression
    )
    asked = subprocess.run(
        ["rpm", "-qp", "--qf", "%{ARCH} %{VERSION}", rpm], capture_output=True, text=True, check=True
    )
    assert asked.stdout == "x86_64 1.12.2"
    token = setup.token()
    with setup.serving() as server:
        answer = server.get(token=token)
        assert sidecar(answer) == {
            "version": "1.12.2",
            "packages": [
                described(server.base, deb, format="deb", arch="amd64"),
                described(server.base, rpm, format="rpm", arch="x86_64"),
            ],
        }
        fetched = server.get("/v1/packages/istio-sidecar.rpm", token=token)
        assert (fetched.status_code, fetched.content) == (200, rpm.read_bytes())
        assert int(fetched.headers["content-length"]) == rpm.stat().st_size
        etag = fetched.headers["etag"]
        assert server.get("/v1/packages/istio-sidecar.rpm", token=token, if_none_match=etag).status_code == 304
        part = server.get("/v1/packages/istio-sidecar.rpm", token=token, range="bytes=10-19")
        assert (part.status_code, part.content) == (206, rpm.read_bytes()[10:20])
        head = server.get("/v1/packages/istio-sidecar.rpm", token=token, method="HEAD")
        assert (head.status_code, head.content) == (200, b"")


def test_the_address_of_a_package_is_that_which_the_machine_used(setup: Setup) -> None:
    build_deb(setup.folder / "deb", setup.packages / "istio-sidecar.deb")
    token = setup.token()
    with setup.serving() as server:
        packages = sidecar(server.get(token=token, host="mesh.example.com:15443"))["packages"]
    assert isinstance(packages, list)
    assert packages[0]["url"] == "https://mesh.example.com:15443/v1/packages/istio-sidecar.deb"


def test_a_package_needs_a_credential_and_a_name_that_is_there(setup: Setup) -> None:
    build_deb(setup.folder / "deb", setup.packages / "istio-sidecar.deb")
    (setup.bundle_dir / "packages" / "notes.txt").write_text("not for you")
    token = setup.token()
    with setup.serving() as server:
        assert error_of(server.get("/v1/packages/istio-sidecar.deb")) == (401, "credential-missing")
        for name in ("other.deb", "notes.txt", "..%2fistio-token", "%2e%2e%2fistio-token"):
            answer = server.get(f"/v1/packages/{name}", token=token)
            assert error_of(answer)[0] == 404


def test_a_package_uses_up_no_token_and_a_revoked_one_does_not_get_it(setup: Setup) -> None:
    build_deb(setup.folder / "deb", setup.packages / "istio-sidecar.deb")
    token = setup.token()
    with setup.serving() as server:
        path = "/v1/packages/istio-sidecar.deb"
        assert server.get(path, authorization=f"Bearer {token}").status_code == 200
        assert "0/1" in setup.run("token", "list", "--state-dir", setup.state).stdout
        setup.run("token", "revoke", token.split(".")[1], "--state-dir", setup.state)
        assert error_of(server.get(path, token=token)) == (410, "token-revoked")


def test_what_is_no_package_of_the_sidecar_is_left_out_and_logged(setup: Setup) -> None:
    build_deb(setup.folder / "a", setup.packages / "other.deb", name="other")
    build_deb(setup.folder / "b", setup.packages / "zstd.deb", compression="zstd")
    good = build_rpm(setup.folder / "c", setup.packages / "istio-sidecar.rpm")
    (setup.packages / "cut.rpm").write_bytes(good.read_bytes()[:200])
    (setup.packages / "cut.deb").write_bytes((setup.packages / "other.deb").read_bytes()[:100])
    (setup.packages / "text.rpm").write_text("<html>not found</html>")
    (setup.packages / "folder.deb").mkdir()
    token = setup.token()
    with setup.serving() as server:
        packages = sidecar(server.get(token=token))["packages"]
        left_out = {line["file"] for line in server.log_lines("package left out")}
    assert isinstance(packages, list)
    assert [package["format"] for package in packages] == ["rpm"]
    assert left_out == {"other.deb", "zstd.deb", "cut.rpm", "cut.deb", "text.rpm", "folder.deb"}


def test_only_the_newest_version_is_offered_and_a_new_one_needs_no_restart(setup: Setup) -> None:
    build_deb(setup.folder / "a", setup.packages / "a.deb", version="1.9.9")
    build_deb(setup.folder / "b", setup.packages / "b.deb", version="1.20.0~rc.1")
    token = setup.token()
    with setup.serving() as server:
        first = server.get(token=token)
        assert sidecar(first)["version"] == "1.20.0~rc.1"
        build_deb(setup.folder / "c", setup.packages / "c.deb", version="1.20.0")
        second = eventually(
            lambda: server.get(token=token, if_none_match=first.headers["etag"]),
            lambda answer: answer.status_code == 200,
        )
        assert sidecar(second)["version"] == "1.20.0"
        assert server.get("/v1/packages/a.deb", token=token).status_code == 200
