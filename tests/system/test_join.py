"""From nothing but the agent and its configuration to healthy, with every source of the package."""

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import image
from lab.cluster import Authority, Cluster
from lab.machine import Machine
from lab.network import CLUSTER_IPV4, Network
from lab.run import Run
from lab.services import Endpoint, Istiod
from standins.packages import Packages, build
from system.joining import CLUSTER_ENV, bootstrap, configure, copy_to, join, requests, run_of_sidecar, status, unit
from system.web import Files

SIDECAR_ENV = "/var/lib/istio/envoy/sidecar.env"
FOLDER = "/srv/packages"


@pytest.fixture(scope="session")
def old_packages(run: Run) -> Packages:
    """The package of release 1.12, as far as it behaves in another way."""
    return build(run.folder / "packages-1.12", version="1.12.2", behaves_as="1.12")


@pytest.fixture
def authority() -> Authority:
    """Somebody's public authority, as far as a machine trusts it."""
    return Authority.create("A public authority")


@pytest.fixture
def files(authority: Authority, cluster: Cluster, network: Network, run: Run) -> Iterator[Files]:
    """A server of packages that is not the endpoint."""
    certificate, key = cluster.server_certificate([CLUSTER_IPV4], ca=authority)
    with Files(certificate + authority.pem, key, network=network, run=run) as files:
        yield files


@pytest.mark.parametrize("kind", ["machine", "deb_machine"])
def test_a_machine_with_nothing_but_agent_and_configuration_joins(
    kind: str, endpoint: Endpoint, istiod: Istiod, request: pytest.FixtureRequest
) -> None:
    machine: Machine = request.getfixturevalue(kind)
    endpoint.invite(machine)
    before = machine.run(["vmmesh-agent", "status"], check=False)
    assert before.returncode == 3
    assert "not-joined" in before.stdout

    said = join(machine)

    steps = re.findall(r"^(\w+) +\d+\.\d s ", said, re.MULTILINE)
    assert steps == ["fetch", "verify", "install", "place", "start", "watch"]
    shown = unit(machine)
    assert (shown["ActiveState"], shown["UnitFileState"], shown["NRestarts"]) == ("active", "enabled", "0")
    asked = istiod.requests()
    assert {(entry["peer"], entry["code"]) for entry in asked} == {(machine.link.ipv4, "OK")}
    assert {"CreateCertificate"} < {entry["method"].rpartition("/")[2] for entry in asked}
    assert [entry["status"] for entry in requests(endpoint)] == [200, 200]  # the bundle, the package
    _assert_all_say_healthy(machine)


def _assert_all_say_healthy(machine: Machine) -> None:
    human = machine.run(["vmmesh-agent", "status"])
    assert human.stdout.startswith("● vm/demo: healthy\n")

    document = status(machine)
    assert (document["schema"], document["state"], document["cause"]) == ("vmmesh.status/v1", "healthy", "none")
    assert document["conditions"] == []
    assert document["workload"] == {"namespace": "vm", "name": "demo"}
    assert document["sidecar"]["version"].startswith("1.28.2")
    assert document["sidecar"]["unit"]["active"] == "active"
    assert str(document["sidecar"]["unit"]["main_pid"]) == unit(machine)["MainPID"]
    for moment in (
        document["updated_at"],
        document["bundle"]["token_expires_at"],
        document["certificate"]["not_after"],
    ):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", moment)

    nagios = machine.run(["vmmesh-agent", "status", "--output", "nagios"]).stdout
    assert re.fullmatch(r"VMMESH OK - vm/demo: healthy \| token=\d+s;;;0; certificate=\d+s;;;0;\n", nagios)

    metrics = machine.run(["vmmesh-agent", "status", "--output", "prometheus"]).stdout
    assert 'vmmesh_agent_state{state="healthy"} 1\n' in metrics
    assert 'vmmesh_agent_state{state="failed"} 0\n' in metrics
    described = set(re.findall(r"^# TYPE (\w+) gauge$", metrics, re.MULTILINE))
    assert described == set(re.findall(r"^(\w+)", metrics, re.MULTILINE))

    machine.run(["vmmesh-agent", "wait", "--for", "healthy", "--timeout", "5"])
    # Nobody special: `su` needs no password for it, the record and the logs are world-readable or not needed.
    as_user = machine.run(["vmmesh-agent", "status", "--output", "json"], user="nobody")
    assert json.loads(as_user.stdout)["state"] == "healthy"


def test_the_package_may_come_from_a_folder_an_address_and_a_file_in_their_versions(  # noqa: PLR0917  # pytest passes by name
    machine: Machine,
    cluster: Cluster,
    istiod: Istiod,
    files: Files,
    authority: Authority,
    packages: Packages,
    old_packages: Packages,
    network: Network,
    run: Run,
) -> None:
    """Folder: 1.12. Address: newer, an upgrade. The same again: left alone. File: older, refused unless allowed."""
    assert istiod.requests() == []
    with Endpoint(cluster.bundle(as_of="1.12"), [], network=network, run=run) as endpoint:
        copy_to(machine, old_packages.rpm, f"{FOLDER}/{old_packages.rpm.name}")
        endpoint.invite(machine, sidecar={"package": FOLDER})
        join(machine)
        assert _installed(machine) == "1.12.2-1"
        kept = f"{machine.read(SIDECAR_ENV).decode()}\nSET_BY_ADMINISTRATOR='kept'\n"
        machine.write(SIDECAR_ENV, kept)

        _trust_system_wide(machine, authority)
        from_address = {"package": files.publish("istio-sidecar.rpm", packages.rpm), "sha256": _digest(packages.rpm)}
        configure(machine, endpoint.configuration(sidecar=from_address))
        join(machine)
        assert _installed(machine) == "1.28.2-1"
        assert machine.read(SIDECAR_ENV).decode() == kept
        assert status(machine)["sidecar"]["version"].startswith("1.28.2")
        # The address is not the endpoint's: it gets no credential.
        heads = [entry["head"] for entry in files.heard("request")]
        assert len(heads) == 1
        assert "authorization" not in heads[0].lower()

        before = run_of_sidecar(machine)
        join(machine)
        assert run_of_sidecar(machine) == before
        assert len(files.heard("request")) == 1

        configure(machine, endpoint.configuration(sidecar={"package": f"{FOLDER}/{old_packages.rpm.name}"}))
        refused = bootstrap(machine)
        assert refused.returncode == 1
        assert "[downgrade-refused]" in refused.stderr
        assert (_installed(machine), run_of_sidecar(machine)) == ("1.28.2-1", before)

        older = {"package": f"{FOLDER}/{old_packages.rpm.name}", "allow_downgrade": True}
        configure(machine, endpoint.configuration(sidecar=older))
        join(machine)
        assert _installed(machine) == "1.12.2-1"
        assert machine.read(SIDECAR_ENV).decode() == kept


def test_a_sidecar_that_empties_its_logs_at_each_start_is_followed_all_the_same(
    deb_machine: Machine, cluster: Cluster, istiod: Istiod, old_packages: Packages
) -> None:
    assert istiod.requests() == []
    machine = deb_machine
    copy_to(machine, old_packages.deb, f"{FOLDER}/sidecar.deb")
    bundle = "/srv/bundle"
    _write_bundle(machine, bundle, cluster, inbound_ports="*")
    sidecar = {"package": f"{FOLDER}/sidecar.deb", "sha256": _digest(old_packages.deb)}
    configure(machine, {"endpoint": {"url": f"file://{bundle}"}, "sidecar": sidecar})
    join(machine)
    first = machine.read("/var/log/istio/istio.log")

    _write_bundle(machine, bundle, cluster, inbound_ports="8080")
    join(machine)

    assert b"ISTIO_INBOUND_PORTS='8080'" in machine.read(CLUSTER_ENV)
    assert not machine.read("/var/log/istio/istio.log").startswith(first[:200])
    assert status(machine)["state"] == "healthy"


def test_a_missing_dependency_comes_from_the_distribution(  # noqa: PLR0917  # pytest passes by name
    cluster: Cluster,
    istiod: Istiod,
    packages: Packages,
    fixture_rpms: tuple[Path, ...],
    network: Network,
    run: Run,
    tmp_path: Path,
) -> None:
    assert istiod.requests() == []
    with Machine("vm4", layers=image.layers("rpm"), network=network, run=run) as machine:
        assert machine.run(["rpm", "-q", "iproute"], check=False).returncode == 1
        copy_to(machine, packages.rpm, f"{FOLDER}/sidecar.rpm")
        _write_bundle(machine, "/srv/bundle", cluster)
        configure(machine, {"endpoint": {"url": "file:///srv/bundle"}, "sidecar": {"package": f"{FOLDER}/sidecar.rpm"}})
        without = bootstrap(machine)
        assert without.returncode == 1
        assert "[missing-dependency]" in without.stderr

        for rpm in fixture_rpms:
            shutil.copy(rpm, tmp_path)
        subprocess.run(["createrepo_c", "--quiet", str(tmp_path)], check=True)
        shutil.copytree(tmp_path, machine.root / "srv/repository")
        repository = "[fixture]\nname=fixture\nbaseurl=file:///srv/repository\nenabled=1\ngpgcheck=0\n"
        machine.write("/etc/yum.repos.d/fixture.repo", repository)
        join(machine)
        assert machine.run(["rpm", "-q", "iproute", "sudo"]).stdout == "iproute-1-1.noarch\nsudo-1-1.noarch\n"


# --- steps ---


def _installed(machine: Machine) -> str:
    return machine.run(["rpm", "-q", "--queryformat", "%{VERSION}-%{RELEASE}", "istio-sidecar"]).stdout


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _trust_system_wide(machine: Machine, authority: Authority) -> None:
    machine.write("/usr/local/share/ca-certificates/public.crt", authority.pem)
    machine.run(["update-ca-certificates"])


def _write_bundle(machine: Machine, folder: str, cluster: Cluster, *, inbound_ports: str = "*") -> None:
    for name, content in cluster.bundle(inbound_ports=inbound_ports).items():
        machine.write(f"{folder}/{name}", content, mode=0o600)
