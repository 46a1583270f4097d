"""What is put where: owners and modes beside a join by hand, /etc/hosts, the traffic capture, and the dry run."""

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from lab import image
from lab.cluster import write_directory
from lab.machine import LEFT_OUT, Machine, difference
from lab.network import CLUSTER_IPV4, Network
from lab.run import Run
from system.joining import (
    NOISE,
    TOKEN,
    Mesh,
    bootstrap,
    configure,
    copy_to,
    join,
    requests,
    run_of_sidecar,
    status,
    unit,
)

BLOCK = f"# BEGIN vmmesh-agent\n{CLUSTER_IPV4} istiod.istio-system.svc\n# END vmmesh-agent\n".encode()


# --- the dry run, before anything is there ---


@pytest.fixture(scope="module")
def fresh(network: Network, run: Run, fixture_rpms: tuple[Path, ...], mesh: Mesh) -> Iterator[Machine]:
    """A machine that was invited and never joins."""
    layers = image.layers("rpm", fixture_rpms=fixture_rpms)
    with Machine("vm5", layers=layers, network=network, run=run) as machine:
        mesh.endpoint.invite(machine)
        bundle = mesh.cluster.bundle()
        for name, content in bundle.items():
            machine.write(f"/srv/bundle/{name}", content)
        copy_to(machine, mesh.endpoint.bundle_folder / "packages" / _rpm_of(mesh), "/srv/istio-sidecar.rpm")
        configure(
            machine, {"endpoint": {"url": "file:///srv/bundle"}, "sidecar": {"package": "/srv/istio-sidecar.rpm"}}
        )
        yield machine


def test_a_dry_run_shows_what_would_change_and_changes_nothing(fresh: Machine) -> None:
    token = fresh.read("/srv/bundle/istio-token").decode()
    before = fresh.snapshot()

    done = bootstrap(fresh, "--dry-run")

    assert done.returncode == 0, done.stderr
    assert difference(before, fresh.snapshot(), ignore=NOISE) == []
    assert "install istio-sidecar" in done.stdout
    for line in ("+ISTIO_SERVICE='demo.vm'", "+defaultConfig:", f"+{CLUSTER_IPV4} istiod.istio-system.svc"):
        assert f"\n{line}\n" in done.stdout
    assert f"\n+++ b{TOKEN}\n" in done.stdout
    for part in token.split("."):
        assert part not in done.stdout + done.stderr


def test_a_dry_run_of_a_refused_bundle_ends_with_1_and_changes_nothing(fresh: Machine) -> None:
    sound = fresh.read("/srv/bundle/cluster.env")
    fresh.write("/srv/bundle/cluster.env", sound + b"LD_PRELOAD='/tmp/mine.so'\n")
    before = fresh.snapshot()

    for arguments in (["--dry-run"], []):
        refused = bootstrap(fresh, *arguments)
        assert refused.returncode == 1
        assert "LD_PRELOAD" in refused.stderr
        assert "[cluster-env-refused]" in refused.stderr
        ignored = NOISE if arguments else [*NOISE, "/run/vmmesh-agent", "/run/vmmesh-agent/*"]
        assert difference(before, fresh.snapshot(), ignore=ignored) == []
    fresh.write("/srv/bundle/cluster.env", sound)


def test_a_dry_run_on_a_joined_machine_shows_the_difference_alone(joined: Machine, mesh: Mesh) -> None:
    token = mesh.cluster.token()
    mesh.publish(mesh.cluster.bundle(token=token, inbound_ports="8080"))
    before = joined.snapshot()

    done = bootstrap(joined, "--dry-run")

    assert done.returncode == 0, done.stderr
    assert difference(before, joined.snapshot(), ignore=[*NOISE, "/var/log/*"]) == []
    assert "\n-ISTIO_INBOUND_PORTS='*'\n+ISTIO_INBOUND_PORTS='8080'\n" in done.stdout
    assert "/etc/hosts" not in done.stdout
    old = joined.read(TOKEN).decode()
    for part in (*token.split(".")[1:], *old.split(".")[1:]):
        assert part not in done.stdout + done.stderr


# --- /etc/hosts ---

HOSTS = {
    "empty": b"",
    "a comment without a newline at its end": b"127.0.0.1 localhost\n# the end",
    "odd whitespace": b"\n\n \t127.0.0.1\t\tlocalhost   \n\t# indented\n\n\n",
    "CRLF": b"127.0.0.1 localhost\r\n192.0.2.9 printer\r\n",
    "what ends a line elsewhere": b"127.0.0.1 a\rb\n# \x0c \x0b \x1c \x85\n",
    "bytes that are no UTF-8": b"127.0.0.1 localhost\n# caf\xe9 \xff\xfe\n192.0.2.9 printer\n",
    "a line of our own that somebody else wrote": b"127.0.0.1 localhost\n192.0.2.200 istiod.istio-system.svc\n",
    "a NUL": b"127.0.0.1 localhost\n# \x00\n",
}


@pytest.mark.parametrize("foreign", HOSTS)
def test_foreign_lines_of_etc_hosts_stay_byte_for_byte(foreign: str, joined: Machine) -> None:
    content = HOSTS[foreign]
    joined.write("/etc/hosts", content, mode=0o664, owner="daemon")

    done = bootstrap(joined)

    # Another line that names istiod is not ours to remove, but it is said.
    rivals = b"istiod" in content
    assert (done.returncode, "istiod_address_mismatch" in done.stdout) == (2 if rivals else 0, rivals), done.stdout
    newline = b"" if content.endswith(b"\n") or not content else b"\n"
    assert joined.read("/etc/hosts") == content + newline + BLOCK
    assert joined.run(["stat", "--format=%a %U %G", "/etc/hosts"]).stdout == "664 daemon daemon\n"

    inode = joined.run(["stat", "--format=%i %z", "/etc/hosts"]).stdout
    bootstrap(joined)
    assert joined.run(["stat", "--format=%i %z", "/etc/hosts"]).stdout == inode


def test_lines_around_the_block_stay_when_it_changes(joined: Machine) -> None:
    stale = BLOCK.replace(CLUSTER_IPV4.encode(), b"192.0.2.250")
    joined.write("/etc/hosts", b"first\r\n" + stale + b"\tlast \xff")

    join(joined)

    assert joined.read("/etc/hosts") == b"first\r\n" + BLOCK + b"\tlast \xff"


# --- owners and modes, beside a join by hand ---

BY_HAND = """\
rpm -i /srv/istio-sidecar.rpm
cd /root/vmintegration
mkdir -p /etc/certs
cp root-cert.pem /etc/certs/root-cert.pem
mkdir -p /var/run/secrets/tokens
cp istio-token /var/run/secrets/tokens/istio-token
cp cluster.env /var/lib/istio/envoy/cluster.env
cp mesh.yaml /etc/istio/config/mesh
cat hosts >> /etc/hosts
mkdir -p /etc/istio/proxy
chown -R istio-proxy /var/lib/istio /etc/certs /etc/istio/proxy /etc/istio/config /var/run/secrets \
    /etc/certs/root-cert.pem
systemctl start istio
"""

# Each difference that a join by the agent makes on purpose: the path, by hand and by the agent, and why.
DIFFERENCES = {
    "/etc/certs/root-cert.pem": (
        ("file", "0744", "istio-proxy"),
        ("file", "0644", "istio-proxy"),
        "it is data: nobody has to execute it",
    ),
    "/run/secrets/tokens/istio-token": (
        ("file", "0744", "istio-proxy"),
        ("file", "0600", "istio-proxy"),
        "whoever can read the token can have a certificate in this workload's name",
    ),
    "/var/lib/istio/envoy/cluster.env": (
        ("file", "0744", "istio-proxy"),
        ("file", "0644", "istio-proxy"),
        "it is data: nobody has to execute it",
    ),
    "/var/lib/istio/envoy/sidecar.env": (
        ("file", "0644", "istio-proxy"),
        ("file", "0644", "root"),
        "the start script runs it as root: what the package gave to root stays root's, no chown -R",
    ),
    "/var/lib/istio/envoy/envoy_bootstrap_tmpl.json": (
        ("file", "0644", "istio-proxy"),
        ("file", "0644", "root"),
        "the package's file stays the package's, no chown -R",
    ),
    "/etc/systemd/system/multi-user.target.wants/istio.service": (
        None,
        ("link", "0777", "root"),
        "the sidecar comes back after a reboot",
    ),
}
# The agent's own, which has no counterpart by hand.
AGENTS_OWN = {
    "/run/vmmesh-agent": ("folder", "0755", "root"),
    "/run/vmmesh-agent/lock": ("file", "0600", "root"),
    "/run/vmmesh-agent/status.json": ("file", "0644", "root"),
    "/var/lib/vmmesh-agent": ("folder", "0700", "root"),
    "/var/lib/vmmesh-agent/state.json": ("file", "0600", "root"),
    "/var/lib/vmmesh-agent/found.json": ("file", "0600", "root"),
    "/run/vmmesh-agent/package-manager.log": ("file", "0600", "root"),
    "/var/lib/vmmesh-agent/installed.json": ("file", "0600", "root"),
    "/var/lib/vmmesh-agent/packages": ("folder", "0700", "root"),
    "/var/lib/vmmesh-agent/join-token": ("file", "0600", "root"),
}
# The database of rpm is written in another order, the agent's Python and its libraries are the same on both.
LEFT_OUT_OF_ALL = [*LEFT_OUT, *(f"{path}/*" for path in LEFT_OUT)]
NOT_COMPARED = ["/root/vmintegration*", "/srv*", "/root/.rpmdb*", "/var/lib/rpm*", "/etc/vmmesh-agent*", "/var/cache*"]


def test_owners_and_modes_are_those_of_a_join_by_hand_but_for_a_justified_few(
    mesh: Mesh, machine: Machine, network: Network, run: Run, fixture_rpms: tuple[Path, ...]
) -> None:
    layers = image.layers("rpm", fixture_rpms=fixture_rpms)
    with Machine("vm6", layers=layers, network=network, run=run) as other:
        mesh.publish(mesh.cluster.bundle())
        bare = _owned(other)
        _join_by_hand(other, mesh)
        by_hand = _owned(other)

        mesh.endpoint.invite(machine)
        machine.write("/etc/vmmesh-agent/join-token", mesh.endpoint.create_token(), mode=0o600)
        join(machine)
        by_agent = _owned(machine)

    touched = {path for path in by_hand.keys() | by_agent.keys() if bare.get(path) != by_hand.get(path)}
    touched |= {path for path in by_agent if bare.get(path) != by_agent[path]}
    assert {"/etc/certs/root-cert.pem", "/var/lib/istio/config/mesh", "/run/secrets", "/etc/istio"} <= touched
    differing = {
        path: (by_hand.get(path), by_agent.get(path)) for path in touched if by_hand.get(path) != by_agent.get(path)
    }
    expected = {path: (hand, agent) for path, (hand, agent, _) in DIFFERENCES.items()}
    assert differing == expected | {path: (None, agent) for path, agent in AGENTS_OWN.items()}


def _join_by_hand(machine: Machine, mesh: Mesh) -> None:
    write_directory(mesh.cluster.bundle(), machine.root / "root/vmintegration")
    copy_to(machine, mesh.endpoint.bundle_folder / "packages" / _rpm_of(mesh), "/srv/istio-sidecar.rpm")
    machine.run(["sh", "-ec", BY_HAND])
    machine.run(["vmmesh-agent", "wait", "--for", "healthy", "--timeout", "60"])


def _owned(machine: Machine) -> dict[str, tuple[str, str, str]]:
    """Kind, mode and owner by path. The owner by name: two machines need not give out the same number."""
    kinds = {"f": "file", "d": "folder", "l": "link"}
    found: dict[str, tuple[str, str, str]] = {}
    for line in machine.run(["find", "/", "/run", "-xdev", "-printf", r"%p\t%y\t%m\t%u\n"]).stdout.splitlines():
        path, kind, mode, owner = line.split("\t")
        if kind in kinds and not any(fnmatch(path, pattern) for pattern in (*LEFT_OUT_OF_ALL, *NOT_COMPARED)):
            found[path] = (kinds[kind], mode.zfill(4), owner)
    return found


def _rpm_of(mesh: Mesh) -> str:
    return next(file.name for file in (mesh.endpoint.bundle_folder / "packages").glob("*.rpm"))


# --- the traffic capture ---


@pytest.mark.parametrize("program", ["iptables", "ip6tables"])
def test_after_a_join_the_chains_are_there_for_both_families(program: str, joined: Machine) -> None:
    join(joined)
    rules = joined.run([f"{program}-save", "--table", "nat"]).stdout
    for chain in ("ISTIO_INBOUND", "ISTIO_IN_REDIRECT", "ISTIO_OUTPUT", "ISTIO_REDIRECT"):
        assert f":{chain} - " in rules
    assert "-A OUTPUT -j ISTIO_OUTPUT" in rules
    assert "-A PREROUTING -p tcp -j ISTIO_INBOUND" in rules


@pytest.mark.parametrize("address", [CLUSTER_IPV4, "[2001:db8::1]"])
def test_an_ordinary_user_goes_through_envoy_and_the_sidecar_itself_does_not(address: str, joined: Machine) -> None:
    join(joined)
    # Nothing listens there: without capture the answer is a refusal, which curl tells as 7.
    call = ["curl", "--silent", "--noproxy", "*", "--max-time", "5", f"http://{address}:9/"]
    program = "ip6tables" if ":" in address else "iptables"

    before = _redirected(joined, program)
    own = joined.run(call, check=False, user="istio-proxy").returncode
    assert own == 7
    assert _redirected(joined, program) == before

    captured = joined.run(call, check=False, user="nobody").returncode
    assert captured not in {0, 7}  # Envoy takes the connection, and ends it when it gets none itself
    assert _redirected(joined, program) == before + 1


def test_the_agent_reaches_its_endpoint_though_the_sidecar_is_dead_and_capture_is_on(
    joined: Machine, mesh: Mesh
) -> None:
    join(joined)
    joined.run(["systemctl", "stop", "istio"])
    joined.run(["/usr/local/bin/istio-start.sh", "init"])  # the capture alone
    assert _redirected(joined, "iptables") == 0
    url = mesh.endpoint.url.replace("/v1/bundle", "/healthz")
    call = ["curl", "--silent", "--insecure", "--max-time", "5", url]
    assert joined.run(call, check=False).returncode == 7
    assert joined.run(call, user="istio-proxy").stdout == '{"status":"ok"}'
    asked = len(requests(mesh.endpoint))

    done = bootstrap(joined, "--dry-run")

    assert done.returncode == 0, done.stderr
    assert len(requests(mesh.endpoint)) == asked + 1
    join(joined)
    assert unit(joined)["ActiveState"] == "active"


def test_a_hung_sidecar_does_not_keep_the_agent_from_its_endpoint(joined: Machine, mesh: Mesh) -> None:
    join(joined)
    before = run_of_sidecar(joined)
    joined.run(["systemctl", "kill", "--signal=STOP", "istio"])
    try:
        asked = len(requests(mesh.endpoint))
        assert bootstrap(joined, "--dry-run").returncode == 0
        assert len(requests(mesh.endpoint)) == asked + 1
    finally:
        joined.run(["systemctl", "kill", "--signal=CONT", "istio"])
    assert run_of_sidecar(joined) == before
    assert status(joined)["state"] == "healthy"


def _redirected(machine: Machine, program: str) -> int:
    """How many connections were redirected to Envoy's outbound port since the chains were made."""
    listing = machine.run([program, "-t", "nat", "-L", "ISTIO_REDIRECT", "-v", "-x", "-n"]).stdout
    found = re.search(r"^\s*(\d+)\s+\d+\s+REDIRECT", listing, re.MULTILINE)
    assert found, listing
    return int(found[1])
