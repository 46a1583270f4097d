"""What the user istio-proxy could do to a root program: it owns the folders that the agent writes into.

Everything is planted as that user, on one machine with real systemd on which the sidecar package is installed. The
agent must neither follow what was planted nor end in a traceback, and nothing outside that user's own folders may
change. Disks that take no file are here as well.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab import image
from lab.cluster import Cluster, as_json
from lab.faulty import Faulty, http
from lab.machine import Machine, difference
from lab.network import CLUSTER_IPV4, Network
from lab.run import Run
from standins.packages import build
from system.refusal import Trial, assert_fit_for_a_terminal, assert_refused
from system.web import pin

USER = "istio-proxy"
OWN = ("/var/lib/istio/*", "/var/log/istio/*", "/etc/certs/*", "/run/secrets/*")
LOG = "/var/log/istio/istio.log"
SECRET = "/root/only-root-knows"


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    """One mesh for all."""
    return Cluster.create()


@pytest.fixture(scope="module")
def trial(network: Network, run: Run, fixture_rpms: tuple[Path, ...]) -> Iterator[Trial]:
    """A machine with the installed package and the folders of istio-proxy, but no sidecar that runs."""
    layers = image.layers("rpm", fixture_rpms=fixture_rpms)
    package = build(run.folder / "small", with_envoy=False).rpm
    with Machine("vm6", layers=layers, network=network, run=run) as machine:
        machine.write("/root/istio-sidecar.rpm", package.read_bytes())
        machine.run(["rpm", "-i", "/root/istio-sidecar.rpm"])
        machine.run(["systemctl", "mask", "--runtime", "istio.service"])
        machine.run(["chown", USER, "/var/lib/istio"])  # as the agent leaves it
        machine.run(["install", "-d", "-o", USER, "/run/secrets", "/run/secrets/tokens", "/etc/certs"])
        machine.write(SECRET, "the password of root\n", mode=0o600)
        yield Trial(machine)


@contextmanager
def planted(machine: Machine, place: str, command: str) -> Iterator[None]:
    """Put something at a place, as istio-proxy, for as long as the block lasts."""
    machine.run(["sh", "-ec", f"if test -e {place}; then mv {place} {place}.away; fi; {command}"], user=USER)
    try:
        yield
    finally:
        restore = f"rm -rf {place}; if test -e {place}.away; then mv {place}.away {place}; fi"
        machine.run(["sh", "-ec", restore], user=USER)


# Where the agent writes, and what may be planted there.
PLACES = (
    "/etc/certs/root-cert.pem",
    "/run/secrets/tokens/istio-token",
    "/var/lib/istio/envoy/cluster.env",
    "/var/lib/istio/config/mesh",
)
FOLDERS = ("/var/lib/istio/envoy", "/var/lib/istio/config", "/var/lib/istio/proxy", "/run/secrets/tokens")


@pytest.mark.parametrize("place", [*PLACES, *FOLDERS])
def test_a_link_of_a_lesser_user_is_never_followed(place: str, cluster: Cluster, trial: Trial) -> None:
    target = SECRET if place in PLACES else "/etc"
    with planted(trial.machine, place, f"ln -s {target} {place}"):
        refusal = trial.bootstrap(trial.give_bundle(cluster.bundle()), timeout=5)
        assert_refused(refusal, refusal.code)
        assert refusal.code in {"foreign-link", "not-a-folder"}
        assert place.rpartition("/")[2] in refusal.message
        assert "password" not in refusal.output
    assert trial.changes() == []


@pytest.mark.parametrize("make", ["mkfifo", "mkdir"])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_file_where_a_file_belongs_is_told_at_once(
    place: str, make: str, cluster: Cluster, trial: Trial
) -> None:
    with planted(trial.machine, place, f"{make} {place}"):
        refusal = trial.bootstrap(trial.give_bundle(cluster.bundle()), timeout=5)
        assert_refused(refusal, "not-a-file", place.rpartition("/")[2])
    assert trial.changes() == []


@pytest.mark.parametrize("place", FOLDERS)
def test_a_file_where_a_folder_belongs_is_told(place: str, cluster: Cluster, trial: Trial) -> None:
    with planted(trial.machine, place, f"touch {place}"):
        refusal = trial.bootstrap(trial.give_bundle(cluster.bundle()), timeout=5)
        assert_refused(refusal, "not-a-folder", place.rpartition("/")[2])
    assert trial.changes() == []


READ = (LOG, "/var/log/istio/istio.err.log", "/etc/certs/cert-chain.pem")
ODDITIES = {
    "a pipe": "mkfifo {place}",
    "a folder": "mkdir {place}",
    "a link to a secret": f"ln -s {SECRET} {{place}}",
    "a link to an endless device": "ln -s /dev/zero {place}",
    "a link to itself": "ln -s {place} {place}",
    "a file that nobody may read": "touch {place}; chmod 0 {place}",
    "a terabyte of holes": "truncate --size=1T {place}",
    "bytes of chance": "head --bytes=300000 /dev/urandom > {place}",
    "a line without end": "head --bytes=30000000 /dev/zero | tr '\\0' x > {place}",
}


@pytest.mark.parametrize("oddity", ODDITIES)
@pytest.mark.parametrize("place", READ)
def test_status_outlives_whatever_stands_in_for_a_file_of_the_sidecar(place: str, oddity: str, trial: Trial) -> None:
    with planted(trial.machine, place, ODDITIES[oddity].format(place=place)):
        said = trial.run(["vmmesh-agent", "status", "--output=json"], limit=20)
        assert_fit_for_a_terminal(said.output)
        assert said.status in {0, 1, 2, 3}, said.output
        assert "password" not in said.output
    assert trial.changes() == []


@pytest.mark.parametrize("place", READ)
@pytest.mark.parametrize("oddity", ["a pipe", "a folder", "a link to a secret"])
def test_a_refused_bootstrap_is_told_all_the_same_then(place: str, oddity: str, cluster: Cluster, trial: Trial) -> None:
    with planted(trial.machine, place, ODDITIES[oddity].format(place=place)):
        refusal = trial.bootstrap(trial.give_bundle(cluster.bundle(root_cert_pem=b"hello")), timeout=5)
        assert_refused(refusal, "root-cert-invalid")
    assert trial.changes() == []


HOSTILE_LINES = (
    "2026-01-01T00:00:00.000000Z\terror\tcitadelclient\tFailed to create certificate: \x1b]0;owned\x07\u202edlo",
    "2026-01-01T00:00:00.000000Z\twarn\tca\tca request failed: dial tcp: lookup \x1b[2J on 1.1.1.1:53: no such host",
    "2026-01-01T00:00:00.000000Z\terror\tfailed to start proxy: \x1b[8mhidden\r\x1b[1A",
    "Error: \x1b[31munknown flag: \x9b31m--x",
)


@pytest.mark.parametrize("output", ["human", "nagios"])
@pytest.mark.parametrize("command", ["status", "explain"])
def test_control_sequences_in_a_log_never_reach_the_terminal(command: str, output: str, trial: Trial) -> None:
    if command == "explain" and output == "nagios":
        output = "json"
    trial.machine.write("/run/hostile.log", "\n".join(HOSTILE_LINES) + "\n")
    trial.changes()
    with planted(trial.machine, LOG, f"cp /run/hostile.log {LOG}"):
        argv = ["vmmesh-agent", command, f"--output={output}", *([LOG] if command == "explain" else [])]
        said = trial.run(argv, limit=20)
        assert said.stdout
        assert_fit_for_a_terminal(said.output)
    assert trial.changes() == []


@pytest.mark.parametrize("folder", ["/var/lib/istio/envoy", "/etc/certs", "/var/lib/istio/config"])
@pytest.mark.parametrize(("options", "code"), [("size=4k", "disk-full"), ("ro", "disk-read-only")])
def test_a_disk_that_takes_no_file_is_told_and_no_half_of_one_is_left(
    folder: str, options: str, code: str, cluster: Cluster, trial: Trial
) -> None:
    machine = trial.machine
    before = machine.snapshot()
    user = machine.run(["id", "--user", USER]).stdout.strip()
    machine.run(["mount", "-t", "tmpfs", "-o", f"{options},uid={user},mode=755", "tmpfs", folder])
    if code == "disk-full":
        machine.run(["sh", "-c", f"head --bytes=4096 /dev/zero > {folder}/filler"])
    try:
        refusal = trial.bootstrap(trial.give_bundle(cluster.bundle()), timeout=5)
        left = machine.run(["ls", "-A", folder]).stdout.split()
    finally:
        machine.run(["umount", folder])
    assert_refused(refusal, code, folder.rpartition("/")[2])
    assert left in ([], ["filler"])
    # What lies on other disks may be placed already, whole; what lies below this one is as it was.
    assert not [line for line in difference(before, machine.snapshot()) if line.startswith(f"{folder}/")]
    trial.changes()


def test_an_odd_etag_does_not_poison_the_fetches_after_it(
    cluster: Cluster, trial: Trial, network: Network, run: Run
) -> None:
    leaf, key = cluster.server_certificate([CLUSTER_IPV4])
    with Faulty(network=network, run=run) as faulty:
        for etag in ('"\xe9\xff"', '"' + "x" * 60_000 + '"', "a\tb"):
            odd = http(body=as_json(cluster.bundle()), headers={"ETag": etag})
            faulty.show([odd], (leaf + cluster.root_pem, key))
            for _ in range(2):
                said = trial.bootstrap(faulty.url, endpoint={"ca_pins": [pin(cluster.root_pem)]}, timeout=5)
                assert_fit_for_a_terminal(said.output)
                assert not said.code.startswith(("network-", "endpoint-")), said.output
            assert len(faulty.heard("request")) == 2
    trial.changes()


_SWAP = """
import os, shutil
place = "/var/lib/istio/envoy"
open("/run/secrets/ready", "w").close()
while True:  # as fast as it goes: a folder of its own, a link to /etc, and back
    try:
        os.rename(place, place + ".own")
        os.symlink("/etc", place)
        os.unlink(place)
        os.rename(place + ".own", place)
    except OSError:  # the agent made the folder anew while it was away
        shutil.rmtree(place, ignore_errors=True)
        os.makedirs(place + ".own", exist_ok=True)
        if not os.path.lexists(place):
            os.rename(place + ".own", place)
"""


def test_a_folder_that_turns_into_a_link_at_any_moment_leads_nowhere(cluster: Cluster, trial: Trial) -> None:
    """The classic race against a root program; the agent holds folders by descriptor and so cannot lose it."""
    machine = trial.machine
    before = machine.snapshot()
    with machine.spawn(["python3", "-c", _SWAP], user=USER) as swapper:
        machine.run(["sh", "-c", "until test -e /run/secrets/ready; do sleep 0.05; done"])
        statuses = set()
        for turn in range(12):
            files = cluster.bundle(environment={"CANONICAL_REVISION": f"v{turn}"})
            statuses.add(trial.bootstrap(trial.give_bundle(files), timeout=1).status)
        assert swapper.poll() is None
        machine.run(["pkill", "-KILL", "-u", USER, "-f", "os.symlink"])
        swapper.wait(timeout=60)
    allowed = (*OWN, "/root/*", "/run/vmmesh-agent*", "/var/lib/vmmesh-agent*", "/etc/hosts", "/run/agetty.reload")
    assert difference(before, machine.snapshot(), ignore=allowed) == []
    assert statuses <= {0, 1, 2, 3}
