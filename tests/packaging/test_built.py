"""What is in the packages: the same in both, nothing too much, the same each time, and clean."""

import io
import subprocess
import tarfile
from pathlib import Path, PurePosixPath

import pytest

from lab.built import Built, build_packages, copy_sources
from lab.image import REPOSITORY

ENVIRONMENT = "usr/lib/vmmesh-agent/"
MIB = 1024**2


@pytest.fixture(scope="module")
def deb(built: Built) -> dict[str, bytes]:
    """The files in the deb by their paths."""
    command = ["dpkg-deb", "--fsys-tarfile", str(built.deb)]
    return _files(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


@pytest.fixture(scope="module")
def rpm(built: Built) -> dict[str, bytes]:
    """The files in the rpm by their paths."""
    with built.rpm.open("rb") as package:
        return _files(subprocess.run(["rpm2archive", "-"], stdin=package, check=True, stdout=subprocess.PIPE).stdout)


def test_deb_and_rpm_hold_the_same(deb: dict[str, bytes], rpm: dict[str, bytes]) -> None:
    owns = ("usr/share/doc/", "usr/share/licenses/", "usr/share/lintian/", "usr/share/zsh/")
    in_deb = {path.removeprefix("usr/") for path in deb if not path.startswith(owns)}
    in_rpm = {path.removeprefix("usr/") for path in rpm if not path.startswith(owns)}
    assert in_deb == in_rpm
    assert {path.name for path in map(PurePosixPath, deb)} >= {
        *("config.yaml", "10-vmmesh-agent.conf", "vmmesh-agent.1.gz", "vmmesh-agent-config.5.gz", "_vmmesh-agent"),
        *(path.name for path in (REPOSITORY / "systemd").glob("*.*") if path.is_file()),
    }


def test_the_environment_holds_the_agent_and_its_libraries_alone(deb: dict[str, bytes]) -> None:
    programs = {path for path in deb if path.startswith(f"{ENVIRONMENT}bin/")}
    assert programs == {f"{ENVIRONMENT}bin/vmmesh-agent"}
    packages = {PurePosixPath(path).parts[6] for path in deb if "/site-packages/" in path}
    names = {name.partition("-")[0].removesuffix(".py").lower() for name in packages if not name.startswith("_")}
    assert names == {
        *("anyio", "certifi", "h11", "httpcore", "httpx", "idna", "pyyaml", "structlog", "systemd"),
        *("systemd_python", "tenacity", "typing_extensions", "vmmesh_agent", "yaml"),
    }
    assert [path for path in deb if {"test", "tests"} & set(PurePosixPath(path).parts)] == []


def test_every_module_has_bytecode_that_is_never_written_anew(deb: dict[str, bytes]) -> None:
    modules = {path for path in deb if path.endswith(".py")}
    bytecode = {path: content for path, content in deb.items() if path.endswith(".pyc")}
    assert {_module(path) for path in bytecode} == modules
    # PEP 552: the second word of flags says that it is found by a hash, and that nobody compares it.
    assert {int.from_bytes(content[4:8], "little") for content in bytecode.values()} == {0b01}


def test_nothing_says_where_it_was_built(deb: dict[str, bytes], rpm: dict[str, bytes]) -> None:
    traces = (b"/vendor/", b"/build/builder", b"rpmbuild", b"BUILDROOT", b"debian/vmmesh-agent", bytes(REPOSITORY))
    for files in (deb, rpm):
        assert [path for path, content in files.items() if any(trace in content for trace in traces)] == []


def test_they_are_small(built: Built, deb: dict[str, bytes]) -> None:
    assert built.deb.stat().st_size < 2 * MIB
    assert built.rpm.stat().st_size < 2 * MIB
    assert sum(map(len, deb.values())) < 8 * MIB


def test_a_build_in_another_folder_at_another_time_gives_the_same_bytes(built: Built, tmp_path: Path) -> None:
    query = ["rpm", "--query", "--queryformat=%{BUILDTIME}", "--package", str(built.rpm)]
    moment = subprocess.run(query, check=True, text=True, stdout=subprocess.PIPE).stdout
    elsewhere = {"SOURCE_DATE_EPOCH": moment, "TZ": "Asia/Kathmandu", "LANG": "C", "PYTHONHASHSEED": "7"}

    again = build_packages(copy_sources(tmp_path / "another folder"), tmp_path / "out", env=elsewhere)

    assert (again.deb.name, again.rpm.name) == (built.deb.name, built.rpm.name)
    assert again.deb.read_bytes() == built.deb.read_bytes()
    assert again.rpm.read_bytes() == built.rpm.read_bytes()


def test_lintian_finds_nothing_that_is_not_excused(built: Built) -> None:
    strict = ["--display-info", "--pedantic", "--fail-on=error,warning,info,pedantic", "--tag-display-limit=0"]
    done = subprocess.run(
        ["lintian", "--allow-root", *strict, str(built.deb)], check=False, text=True, capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_rpmlint_finds_nothing_that_is_not_excused(built: Built) -> None:
    command = ["rpmlint", f"--config={REPOSITORY}/packaging/rpmlint.toml", str(built.rpm)]
    done = subprocess.run(command, check=False, text=True, capture_output=True)
    assert "0 errors, 0 warnings" in done.stdout, done.stdout
    assert done.returncode == 0


def _files(archive: bytes) -> dict[str, bytes]:
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        for member in opened:
            if file := opened.extractfile(member) if member.isfile() else None:
                found[member.name.removeprefix("./")] = file.read()
    return found


def _module(bytecode: str) -> str:
    path = PurePosixPath(bytecode)
    return str(path.parent.parent / f"{path.name.partition('.')[0]}.py")
