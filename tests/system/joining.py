"""What the tests of the join share: a mesh to join, and the agent's commands on a machine."""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from lab.cluster import Cluster
from lab.cluster import Files as BundleFiles
from lab.machine import Machine
from lab.network import Network
from lab.run import Run
from lab.services import Endpoint, Istiod
from standins.packages import Packages

TOKEN = "/var/run/secrets/tokens/istio-token"
ROOT_CERT = "/etc/certs/root-cert.pem"
CLUSTER_ENV = "/var/lib/istio/envoy/cluster.env"
MESH_YAML = "/etc/istio/config/mesh"
PLACED = {"root-cert.pem": ROOT_CERT, "istio-token": TOKEN, "cluster.env": CLUSTER_ENV, "mesh.yaml": MESH_YAML}

# What changes by itself, or by being looked at: rpm writes to the shared memory and the journal of its database even
# when it is only asked, the log-in prompt is told of new addresses, and what a package manager said last is a log.
NOISE = ["/root/.rpmdb/*-shm", "/root/.rpmdb/*-wal", "/run/agetty.reload", "/run/vmmesh-agent/package-manager.log"]


class Runs(Protocol):
    """A machine on which commands can be run, whatever it is made of."""

    def run(self, argv: Sequence[str], *, check: bool = ..., timeout: float = ...) -> subprocess.CompletedProcess[str]:
        """Run one to its end."""


@dataclass(frozen=True)
class Mesh:
    """A cluster with its running stand-in istiod and its running endpoint."""

    cluster: Cluster
    istiod: Istiod
    endpoint: Endpoint

    def publish(self, files: BundleFiles) -> None:
        """Let the endpoint hand out these files from now on."""
        self.endpoint.publish(files)
        time.sleep(1.2)  # it serves a new set of files when nobody has written to it for a second


@contextmanager
def running_mesh(packages: Packages, *, network: Network, run: Run, kind: type[Endpoint] = Endpoint) -> Iterator[Mesh]:
    """Start the cluster's side for as long as the block lasts. All meshes of a run have the same addresses."""
    with Istiod(Cluster.create(), network=network, run=run) as istiod:
        files = istiod.cluster.bundle()
        with kind(files, [packages.rpm, packages.deb], network=network, run=run) as endpoint:
            yield Mesh(istiod.cluster, istiod, endpoint)


def configure(machine: Machine, document: Mapping[str, Any]) -> None:
    """Write config.yaml."""
    machine.write("/etc/vmmesh-agent/config.yaml", yaml.safe_dump(dict(document), sort_keys=False))


def copy_to(machine: Machine, file: Path, target: str) -> None:
    """Copy a large file onto a machine."""
    inside = machine.root / target.lstrip("/")
    inside.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, inside)


def bootstrap(
    machine: Machine, *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `vmmesh-agent bootstrap` to its end, which comes within a minute, with an error where it is not done."""
    return machine.run(["vmmesh-agent", "bootstrap", "--timeout=60", *arguments], check=False, timeout=90, env=env)


def join(machine: Machine, *arguments: str, env: Mapping[str, str] | None = None) -> str:
    """Run `vmmesh-agent bootstrap`, see that it ends healthy, and return what it said."""
    done = bootstrap(machine, *arguments, env=env)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def status(machine: Runs) -> dict[str, Any]:
    """Return what `vmmesh-agent status --output json` says."""
    document: dict[str, Any] = json.loads(
        machine.run(["vmmesh-agent", "status", "--output", "json"], check=False).stdout
    )
    return document


def unit(machine: Runs, name: str = "istio.service") -> dict[str, str]:
    """Return the properties of a unit by their names."""
    shown = machine.run(["systemctl", "show", name]).stdout
    return dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)


def run_of_sidecar(machine: Runs) -> tuple[str, str, str]:
    """Return what changes whenever istio.service is started: its process, its invocation, systemd's own restarts."""
    shown = unit(machine)
    return shown["MainPID"], shown["InvocationID"], shown["NRestarts"]


def requests(endpoint: Endpoint) -> list[dict[str, Any]]:
    """Return the lines of the endpoint's log that are requests, health checks left out."""
    lines = [json.loads(line) for line in endpoint.output().splitlines() if line.startswith("{")]
    return [line for line in lines if "status" in line and line.get("path") != "/healthz"]
