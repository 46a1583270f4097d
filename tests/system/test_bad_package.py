"""Packages that must not be installed, and machines that cannot take one: told before anything is changed."""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab import image
from lab.cluster import Cluster, as_json
from lab.faulty import Faulty, http
from lab.machine import Machine
from lab.network import CLUSTER_IPV4, Network
from lab.run import Run
from standins.packages import Packages, build
from system.refusal import FOLDER, Refusal, Trial, assert_refused
from system.web import pin

CACHE = "/var/lib/vmmesh-agent/packages"
# What dnf, apt-get and dpkg keep for themselves when they try; none of it says that something is installed.
RESOLVERS_OWN = (
    *("/var/cache/dnf", "/var/lib/dnf", "/var/log/dnf", "/var/log/hawkey", "/var/cache/apt", "/var/lib/apt"),
    *("/var/log/apt", "/var/log/dpkg.log", "/var/lib/dpkg/lock", "/var/lib/dpkg/triggers/Lock", "/var/cache/debconf"),
    "/var/lib/vmmesh-agent/found.json",
)
QUERIES = {"rpm": ["rpm", "-q", "istio-sidecar"], "deb": ["dpkg-query", "--show", "istio-sidecar"]}


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    """One mesh for all."""
    return Cluster.create()


@pytest.fixture(scope="module")
def trial(shared_machine: Machine) -> Trial:
    """A machine with rpm."""
    return Trial(shared_machine)


@pytest.fixture(scope="module")
def deb_trial(network: Network, run: Run) -> Iterator[Trial]:
    """A machine with dpkg."""
    with Machine("vm5", layers=image.layers("deb"), network=network, run=run) as machine:
        yield Trial(machine)


@pytest.fixture(scope="module")
def faulty(network: Network, run: Run) -> Iterator[Faulty]:
    """A server that sends what it is told to."""
    with Faulty(network=network, run=run) as faulty:
        yield faulty


@pytest.fixture(scope="module")
def small(run: Run) -> Packages:
    """The sidecar package without the 100 MB of Envoy: good enough to be refused."""
    return build(run.folder / "small", with_envoy=False)


def bootstrap(
    trial: Trial, cluster: Cluster, package: str, *, timeout: float = 30, limit: float = 60, **settings: Any
) -> Refusal:
    """Join with a sound bundle and this package; what is installed stays, although there is no sidecar in it."""
    sections = {"sidecar": {"package": package, **settings}, "on_failure": {"first_join": "keep"}}
    return trial.bootstrap(trial.give_bundle(cluster.bundle()), timeout=timeout, limit=limit, **sections)


def give(trial: Trial, file: Path, name: str = "") -> str:
    """Copy a package into the folder of the input and return its path."""
    path = f"{FOLDER}/{name or file.name}"
    trial.machine.run(["mkdir", "-p", FOLDER])
    shutil.copyfile(file, trial.machine.root / path.lstrip("/"))
    return path


def _but_for_resolvers(changes: list[str]) -> list[str]:
    """Leave out what dnf and apt keep for themselves, dnf's bytecode among it, and the agent's note of what was."""
    return [change for change in changes if not change.startswith(RESOLVERS_OWN) and "/__pycache__/" not in change]


# --- what the package is ------------------------------------------------------


def test_a_file_of_another_digest_is_not_installed(trial: Trial, cluster: Cluster, small: Packages) -> None:
    refusal = bootstrap(trial, cluster, give(trial, small.rpm), sha256="0" * 64)
    assert_refused(refusal, "package-wrong-digest", hashlib.sha256(small.rpm.read_bytes()).hexdigest(), "0" * 64)
    assert trial.changes() == []


def test_a_package_for_another_architecture_is_not_installed(trial: Trial, cluster: Cluster, run: Run) -> None:
    foreign = build(run.folder / "foreign", arch="aarch64", with_envoy=False)
    refusal = bootstrap(trial, cluster, give(trial, foreign.rpm))
    assert_refused(refusal, "package-wrong-architecture", "aarch64", "x86_64")
    assert trial.changes() == []


def test_a_bundle_with_packages_for_other_machines_alone_is_refused(trial: Trial, cluster: Cluster) -> None:
    package = {"format": "rpm", "arch": "s390x", "url": "https://192.0.2.1/a.rpm", "sha256": "0" * 64}
    path = trial.give("bundle.json", as_json(cluster.bundle(), {"version": "1.28.2", "packages": [package]}))
    refusal = trial.bootstrap(f"file://{path}")
    assert_refused(refusal, "package-wrong-architecture", "rpm for s390x", "rpm for x86_64")
    assert trial.changes() == []


def test_another_package_than_the_sidecar_is_not_installed(
    trial: Trial, cluster: Cluster, fixture_rpms: tuple[Path, ...]
) -> None:
    refusal = bootstrap(trial, cluster, give(trial, fixture_rpms[0]))
    assert_refused(refusal, "package-invalid", "'iproute'", "'istio-sidecar'", hinted=False)
    assert trial.changes() == []


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "text": lambda _: b"<html>log in</html>",
    "control sequences": lambda _: b"\x1b[31m\x1b]0;owned\x07",
    "cut in its header": lambda whole: whole[:300],
    "cut in its content": lambda whole: whole[: len(whole) // 2],
    "altered in its content": lambda whole: whole[:-200] + bytes(byte ^ 0xFF for byte in whole[-200:]),
}


@pytest.mark.parametrize(("family", "how"), [(family, how) for family in ("rpm", "deb") for how in DAMAGED])
def test_a_damaged_package_is_not_installed(
    family: str, how: str, cluster: Cluster, small: Packages, request: pytest.FixtureRequest
) -> None:
    tried: Trial = request.getfixturevalue("trial" if family == "rpm" else "deb_trial")
    file = small.rpm if family == "rpm" else small.deb
    path = tried.give(f"damaged.{family}", DAMAGED[how](file.read_bytes()))
    refusal = bootstrap(tried, cluster, path)
    assert_refused(refusal, "package-invalid", f"damaged.{family}")
    assert tried.machine.run(QUERIES[family], check=False).returncode == 1
    assert _but_for_resolvers(tried.changes()) == []


def test_a_package_of_another_family_is_refused(trial: Trial, cluster: Cluster, small: Packages) -> None:
    refusal = bootstrap(trial, cluster, give(trial, small.deb))
    assert_refused(refusal, "package-wrong-format", small.deb.name, "rpm for x86_64")
    assert trial.changes() == []


def test_a_package_that_is_not_there_is_named(trial: Trial, cluster: Cluster) -> None:
    refusal = bootstrap(trial, cluster, "/root/input/nothing.rpm")
    assert_refused(refusal, "package-missing", "/root/input/nothing.rpm", hinted=False)
    assert trial.changes() == []


def test_a_folder_without_a_package_is_named(trial: Trial, cluster: Cluster) -> None:
    refusal = bootstrap(trial, cluster, "/srv")
    assert_refused(refusal, "package-missing", "/srv", "rpm for x86_64", hinted=False)
    assert trial.changes() == []


@pytest.mark.parametrize("make", ["mkfifo", "ln -s /etc/shadow"])
def test_a_package_that_is_no_plain_file_is_refused_at_once(make: str, trial: Trial, cluster: Cluster) -> None:
    path = f"{FOLDER}/odd.rpm"
    trial.machine.run(["sh", "-ec", f"mkdir -p {FOLDER}; rm -f {path}; {make} {path}"])
    refusal = bootstrap(trial, cluster, path, timeout=5, limit=20)
    assert_refused(refusal, refusal.code, "odd.rpm", hinted=False)
    assert refusal.code in {"not-a-file", "package-invalid", "foreign-link"}
    assert trial.changes() == []


@pytest.mark.parametrize("family", ["rpm", "deb"])
def test_a_missing_dependency_is_named_and_nothing_is_half_installed(
    family: str, trial: Trial, deb_trial: Trial, cluster: Cluster, run: Run
) -> None:
    needy = build(run.folder / "needy", with_envoy=False, extra_requires=["nobody-has-this"])
    tried, file = (trial, needy.rpm) if family == "rpm" else (deb_trial, needy.deb)
    refusal = bootstrap(tried, cluster, give(tried, file))
    assert_refused(refusal, "missing-dependency", "nobody-has-this", "repository")
    assert tried.machine.run(QUERIES[family], check=False).returncode == 1
    assert _but_for_resolvers(tried.changes()) == []


# --- what is downloaded -------------------------------------------------------


def serve(faulty: Faulty, cluster: Cluster, content: bytes, *, sha256: str = "", url: str = "") -> dict[str, Any]:
    """Serve a bundle that names a package, then the package; return the endpoint's part of the configuration."""
    leaf, key = cluster.server_certificate([CLUSTER_IPV4])
    package = {
        "format": "rpm",
        "arch": "x86_64",
        "url": url or f"https://{faulty.address}/istio-sidecar.rpm",
        "sha256": sha256 or hashlib.sha256(content).hexdigest(),
    }
    bundle = as_json(cluster.bundle(), {"version": "1.28.2", "packages": [package]})
    faulty.show([http(body=bundle), http(body=content)], (leaf + cluster.root_pem, key))
    return {"ca_pins": [pin(cluster.root_pem)]}


def test_a_download_of_another_digest_is_thrown_away(trial: Trial, cluster: Cluster, faulty: Faulty) -> None:
    endpoint = serve(faulty, cluster, b"something else", sha256="0" * 64)
    refusal = trial.bootstrap(faulty.url, endpoint=endpoint, timeout=20)
    assert_refused(refusal, "package-wrong-digest", "0" * 64, "nothing was installed")
    assert trial.changes() == []


def test_a_download_that_is_no_package_is_thrown_away(trial: Trial, cluster: Cluster, faulty: Faulty) -> None:
    refusal = trial.bootstrap(faulty.url, endpoint=serve(faulty, cluster, b"no package"), timeout=20)
    assert_refused(refusal, "package-invalid", hinted=False)
    assert trial.changes() == []


def test_a_download_that_is_not_there_is_named(trial: Trial, cluster: Cluster, faulty: Faulty) -> None:
    endpoint = serve(faulty, cluster, b"")
    missing = http(404, b"no such package", headers={"Content-Type": "text/plain"})
    leaf, key = cluster.server_certificate([CLUSTER_IPV4])
    package = {"format": "rpm", "arch": "x86_64", "url": f"https://{faulty.address}/a.rpm", "sha256": "0" * 64}
    bundle = as_json(cluster.bundle(), {"version": "1.28.2", "packages": [package]})
    faulty.show([http(body=bundle), missing], (leaf + cluster.root_pem, key))
    refusal = trial.bootstrap(faulty.url, endpoint=endpoint, timeout=20)
    assert_refused(refusal, "package-missing", "no such package")
    assert trial.changes() == []


# --- where there is no room ---------------------------------------------------


@contextmanager
def mounted(machine: Machine, folder: str, options: str) -> Iterator[None]:
    """Have a tmpfs over a folder for as long as the block lasts."""
    machine.run(["mkdir", "-p", folder])
    machine.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder])
    try:
        yield
    finally:
        machine.run(["umount", folder])


def test_a_full_disk_under_the_downloads_is_told(trial: Trial, cluster: Cluster, faulty: Faulty) -> None:
    endpoint = serve(faulty, cluster, b"x" * (3 * 1024**2))
    with mounted(trial.machine, CACHE, "size=1m"):
        refusal = trial.bootstrap(faulty.url, endpoint=endpoint, timeout=20)
        assert trial.machine.run(["ls", "-A", CACHE]).stdout == ""
    assert_refused(refusal, "disk-full", "make room")
    assert trial.changes() == []


def test_a_read_only_disk_under_the_downloads_is_told(trial: Trial, cluster: Cluster, faulty: Faulty) -> None:
    endpoint = serve(faulty, cluster, b"x")
    with mounted(trial.machine, "/var/lib/vmmesh-agent", "ro"):
        refusal = trial.bootstrap(faulty.url, endpoint=endpoint, timeout=20)
    assert_refused(refusal, "disk-read-only", "/var/lib/vmmesh-agent", "dmesg")
    assert trial.changes() == []


@pytest.mark.parametrize("family", ["rpm", "deb"])
def test_too_little_room_for_the_programs_is_told_before_they_are_unpacked(
    family: str, trial: Trial, deb_trial: Trial, cluster: Cluster, small: Packages
) -> None:
    tried, file = (trial, small.rpm) if family == "rpm" else (deb_trial, small.deb)
    tried.changes()
    with mounted(tried.machine, "/usr/local/bin", "size=8m"):
        refusal = bootstrap(tried, cluster, give(tried, file))
    assert_refused(refusal, "disk-full", "8 MiB", "make room")
    assert tried.changes() == []


# --- when somebody else is at it ----------------------------------------------

_HOLD = """
import fcntl, sys, time
with open(sys.argv[1], "a") as lock:
    fcntl.lockf(lock, fcntl.LOCK_EX)
    open("/run/held", "w").close()
    time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("family", ["rpm", "deb"])
def test_a_held_lock_of_the_package_manager_is_waited_for_and_told(
    family: str, trial: Trial, deb_trial: Trial, cluster: Cluster, small: Packages
) -> None:
    """The last of its machine: the package is installed at the end."""
    tried, file = (trial, small.rpm) if family == "rpm" else (deb_trial, small.deb)
    machine = tried.machine
    lock = (
        machine.run(["rpm", "--eval", "%{_dbpath}/.rpm.lock"]).stdout.strip()
        if family == "rpm"
        else "/var/lib/dpkg/lock-frontend"
    )
    with machine.spawn(["python3", "-c", _HOLD, lock, "6"]) as holder:
        machine.run(["sh", "-c", "until test -e /run/held; do sleep 0.05; done"])
        refusal = bootstrap(tried, cluster, give(tried, file), timeout=15)
        assert holder.wait(timeout=60) == 0
    assert machine.run(QUERIES[family], check=False).returncode == 0, refusal.output
    assert "lock" in refusal.stdout, refusal.output
