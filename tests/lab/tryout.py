"""What `scripts/try` does: a machine, a cluster, one join, and its status, shown live.

All of it is what the tests use as well; the sidecar and istiod are the stand-ins, the rest is real.
"""

import argparse
import signal
import subprocess
import sys
import time

from lab import image
from lab.cluster import Cluster
from lab.image import Family
from lab.machine import Machine
from lab.network import Network
from lab.run import LabError, Run, sweep
from lab.services import Endpoint, Istiod
from standins.packages import build, build_fixture_rpms


def main() -> int:
    """Run the command line and return its exit status: that of `status` on the machine, 0 for healthy."""
    parser = argparse.ArgumentParser(prog="scripts/try", description="join a throw-away machine to a mesh")
    parser.add_argument("--deb", action="store_true", help="dpkg and a deb instead of rpm and an rpm")
    parser.add_argument("--keep", action="store_true", help="leave all running, and say how to get in")
    parser.add_argument("--stop", action="store_true", help="end what --keep left, and do nothing else")
    options = parser.parse_args()
    # SIGTERM as Ctrl-C: both leave through the context managers, which clean up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if options.stop:
            _say(f"stopped: {', '.join(sweep(kept=True)) or 'there was nothing'}")
            return 0
        with Run() as run:
            return _join("deb" if options.deb else "rpm", run, keep=options.keep)
    except LabError as error:
        sys.stderr.write(f"scripts/try: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("scripts/try: interrupted; everything is cleaned up\n")
        return 130


def _join(family: Family, run: Run, *, keep: bool) -> int:
    packages = build(run.folder / "packages")
    fixtures = build_fixture_rpms(run.folder / "fixture-rpms") if family == "rpm" else ()
    layers = image.layers(family, fixture_rpms=fixtures)
    network = Network(run)
    istiod = Istiod(Cluster.create(), network=network, run=run)
    istiod.start()
    endpoint = Endpoint(istiod.cluster.bundle(), [packages.rpm, packages.deb], network=network, run=run)
    endpoint.start()
    machine = Machine("vm1", layers=layers, network=network, run=run)
    started = time.monotonic()
    machine.start()
    _say(f"machine {machine.name} with {family} at {machine.link.ipv4}: up in {time.monotonic() - started:.1f} s")
    endpoint.invite(machine)
    _say(f"endpoint {endpoint.url}, {endpoint.pin}")
    _shown(machine, "vmmesh-agent", "bootstrap")
    status = _shown(machine, "vmmesh-agent", "status")
    if keep:
        run.keep()
        _say(f"\nThe machine is left running. A shell on it:\n  {_shell(machine)}")
        _say("Its end, and that of all that belongs to it:\n  scripts/try --stop")
    return status


def _shown(machine: Machine, *argv: str) -> int:
    """Run a command on the machine with its output as it comes, and return its exit status."""
    _say(f"\n[{machine.name}] # {' '.join(argv)}")
    process = machine.spawn(argv, stdout=None, stderr=None)
    try:
        return process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise


def _shell(machine: Machine) -> str:
    return subprocess.list2cmdline(["nsenter", f"--target={machine.leader}", "--all", "--", "bash", "--login"])


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
