"""What runs on the cluster's side of a run's network: the stand-in istiod, and the real endpoint."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from lab.cluster import Cluster, Files, write_directory
from lab.image import REPOSITORY
from lab.machine import Machine
from lab.network import CLUSTER_IPV4, CLUSTER_IPV6, Network
from lab.run import LabError, Run
from standins.istiod import Behaviour

ISTIOD_PORT = 15012
ENDPOINT_PORT = 15443


class Service:
    """A program of this repository's environment on the cluster's side; a context manager."""

    def __init__(self, name: str, *, ready: str, network: Network, run: Run) -> None:
        self.folder = _new_folder(run.folder, name)
        self._ready = ready
        self._network = network
        self._run = run
        self._process: subprocess.Popen[bytes] | None = None
        self._log = self.folder / "output.log"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def argv(self) -> list[str]:
        """The command line, after `python`."""
        raise NotImplementedError

    def start(self) -> None:
        """Start it and wait until it says that it is ready."""
        with self._log.open("wb") as log:
            argv = self._network.in_cluster([sys.executable, *self.argv()])
            self._process = self._run.spawn(self.folder.name, argv, output=log, env=_environment())
        deadline = time.monotonic() + 60
        while self._ready not in self.output():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise LabError(f"{self.folder.name} does not start:\n{self.output()}")
            time.sleep(0.02)

    def stop(self) -> None:
        """End it, if it runs; its port refuses connections from then on."""
        if self._process is not None:
            self._run.kill(self.folder.name)
            self._process.wait()
            self._process = None

    def output(self) -> str:
        """What it wrote since it was last started."""
        return self._log.read_text(errors="replace")


class Istiod(Service):
    """The stand-in istiod of one cluster."""

    def __init__(self, cluster: Cluster, *, network: Network, run: Run) -> None:
        super().__init__("istiod", ready="listening", network=network, run=run)
        self.cluster = cluster
        self._behaviour = self.folder / "behaviour.json"
        self._journal = self.folder / "journal.jsonl"
        cluster.save(self.folder / "cluster")

    def argv(self) -> list[str]:
        """The command line, after `python`."""
        return [
            *("-m", "standins.istiod", f"--cluster={self.folder / 'cluster'}"),
            *(f"--listen={CLUSTER_IPV4}:{ISTIOD_PORT}",),
            *(f"--behaviour={self._behaviour}", f"--journal={self._journal}"),
        ]

    def behave(self, behaviour: Behaviour) -> None:
        """Change what it does from now on; `Behaviour()` is a well-behaved one."""
        behaviour.write(self._behaviour)

    def requests(self) -> list[dict[str, Any]]:
        """What it was asked since the beginning: time, method, peer, code, …"""
        if not self._journal.exists():
            return []
        return [json.loads(line) for line in self._journal.read_text().splitlines()]


class Endpoint(Service):
    """vmmesh-endpoint over a bundle folder, with its own authority and a join token for one machine."""

    def __init__(self, files: Files, packages: Iterable[Path], *, network: Network, run: Run) -> None:
        super().__init__("endpoint", ready="pin:", network=network, run=run)
        self.bundle_folder = self.folder / "bundle"
        self._state = self.folder / "state"
        self.publish(files)
        (self.bundle_folder / "packages").mkdir()
        for package in packages:
            (self.bundle_folder / "packages" / package.name).symlink_to(package.resolve())
        self.url = f"https://{CLUSTER_IPV4}:{ENDPOINT_PORT}/v1/bundle"
        self.token = self.create_token()

    def argv(self) -> list[str]:
        """The command line, after `python`."""
        return [
            *("-m", "vmmesh_endpoint.cli", "serve", f"--listen=[::]:{ENDPOINT_PORT}"),
            *(f"--bundle-dir={self.bundle_folder}", f"--state-dir={self._state}"),
            *(f"--name={CLUSTER_IPV4}", f"--name={CLUSTER_IPV6}"),
        ]

    @property
    def pin(self) -> str:
        """`sha256:<hex>` of its authority's key, as it prints it."""
        found = re.search(r"^pin:\s+(sha256:[0-9a-f]{64})$", self.output(), re.MULTILINE)
        if found is None:
            raise LabError(f"the endpoint printed no pin:\n{self.output()}")
        return found[1]

    def publish(self, files: Files) -> None:
        """Put these files into the bundle folder, in place of those that were there."""
        write_directory(files, self.bundle_folder)

    def create_token(self, *arguments: str) -> str:
        """Make a join token; `arguments` are those of `vmmesh-endpoint token create`."""
        argv = [
            *(sys.executable, "-m", "vmmesh_endpoint.cli", "token", "create"),
            *(f"--state-dir={self._state}", *arguments),
        ]
        done = subprocess.run(argv, check=True, text=True, capture_output=True, env=_environment())
        return done.stdout.strip()

    def configuration(self, **overrides: Any) -> dict[str, Any]:
        """What belongs into config.yaml of a machine that joins here; `overrides` replace whole sections."""
        endpoint = {
            "url": self.url,
            "ca_pins": [self.pin],
            "credential": {"join_token_file": "/etc/vmmesh-agent/join-token"},
        }
        return {"endpoint": endpoint, "workload_group": {"namespace": "vm", "name": "demo"}} | overrides

    def invite(self, machine: Machine, **overrides: Any) -> None:
        """Write the configuration and the join token onto a machine, as an administrator does."""
        text = yaml.safe_dump(self.configuration(**overrides), sort_keys=False)
        machine.write("/etc/vmmesh-agent/config.yaml", text)
        machine.write("/etc/vmmesh-agent/join-token", self.token, mode=0o600)


def _environment() -> dict[str, str]:
    path = os.pathsep.join(str(REPOSITORY / root) for root in ("agent", "endpoint", "tests"))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def _new_folder(parent: Path, name: str) -> Path:
    number = 1
    while (folder := parent / f"{name}-{number}").exists():
        number += 1
    folder.mkdir()
    return folder
