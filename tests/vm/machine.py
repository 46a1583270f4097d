"""A virtual machine: qemu with an emulated processor, on the run's network, configured by a NoCloud seed.

    with VirtualMachine("vm1", image, seed, network=network, run=run) as machine:
        machine.run(["systemctl", "status"])

It is spoken to over its second serial port, as over the console of a cloud; the first one is the log of kernel and
systemd. A boot takes most of a minute, so tests share a machine.
"""

import base64
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from lab.image import quietly
from lab.network import CLUSTER_IPV4, CLUSTER_IPV6, Network
from lab.run import LabError, Run
from vm.image import Image

_BOOT = 900.0  # seconds until it counts as hanging; alone on a core a boot takes 40
_MEMORY = 1024  # MiB
_KERNEL = (
    "root=/dev/vda rw net.ifnames=0 console=ttyS0 loglevel=4 systemd.show_status=yes "
    # What makes an emulated processor slow: a new address space at each system call, and drivers that nothing uses.
    "mitigations=off modprobe.blacklist=ata_piix,button,psmouse,i2c_piix4"
)


@dataclass(frozen=True)
class Seed:
    """What a cloud tells a machine about itself: its identity, and the user-data."""

    instance_id: str
    user_data: str


class Console:
    """The shell on a machine's second serial port; its other end is files/usr/local/lib/lab-console."""

    def __init__(self, path: Path) -> None:
        self._port = socket.socket(socket.AF_UNIX)
        try:
            self._port.connect(str(path))
        except OSError:
            self._port.close()
            raise
        self._received = b""
        self._number = 0

    def close(self) -> None:
        """Let go of the port."""
        self._port.close()

    def wait_until_ready(self, *, timeout: float) -> None:
        """Wait for what the shell says first, once in each boot."""
        self._wait_for("ready", timeout)

    def run(self, script: str, *, timeout: float) -> subprocess.CompletedProcess[str]:
        """Run a shell script; `timeout` is kept by the machine, which then answers with status 124."""
        self._number += 1
        self._port.sendall(f"{self._number} {timeout:g} {base64.b64encode(script.encode()).decode()}\n".encode())
        answer = self._wait_for(f"{self._number} ", timeout + 60)
        _, status, output, errors = answer.split(" ")
        return subprocess.CompletedProcess(script, int(status), _decoded(output), _decoded(errors))

    def _wait_for(self, beginning: str, timeout: float) -> str:
        """The next line that begins so; what else there is on the port is passed over."""
        deadline = time.monotonic() + timeout
        while True:
            line, newline, rest = self._received.partition(b"\n")
            if newline:
                self._received = rest
                text = line.decode(errors="replace").strip()
                if text.startswith(beginning):
                    return text
                continue
            self._port.settimeout(max(0.001, deadline - time.monotonic()))
            received = self._port.recv(65536)
            if not received:
                raise ConnectionResetError("the machine is off")
            self._received += received


class VirtualMachine:
    """A context manager; off at its end as if the power had failed."""

    def __init__(self, name: str, image: Image, seed: Seed, *, network: Network, run: Run) -> None:
        self.name = name
        link = network.attach(name)  # its addresses only: the cable of a virtual machine is a tap device
        self.ipv4, self.ipv6 = link.ipv4, link.ipv6
        self._image = image
        self._seed = seed
        self._network = network
        self._run = run
        self._folder = run.folder / name
        self._disk = self._folder / "disk.qcow2"
        self._log = self._folder / "console.log"
        self._qemu: subprocess.Popen[bytes] | None = None
        self._console: Console | None = None

    def __enter__(self) -> Self:
        self.start()
        self.wait_until_up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.power_off()

    # --- power --------------------------------------------------------------

    def start(self) -> None:
        """Switch it on, with a new disk over its image, and return while it boots."""
        self._folder.mkdir()
        _overlay(self._image.disk, self._disk)
        self._write_seed()
        port, mac = f"tap-{self.name}", f"52:54:00:00:00:{int(self.ipv4.rpartition('.')[2]):02x}"
        cluster = ("ip", "-n", self._network.cluster)
        quietly([*cluster, "tuntap", "add", "dev", port, "mode", "tap"])
        quietly([*cluster, "link", "set", port, "master", "br0", "up"])
        shell = self._folder / "shell.socket"
        argv = [
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"),
            *("-accel", "tcg", "-cpu", "Nehalem", "-smp", "1", "-m", str(_MEMORY)),
            *("-kernel", str(self._image.kernel), "-initrd", str(self._image.initrd)),
            *("-append", _KERNEL),
            *("-drive", f"file={self._disk},if=virtio,format=qcow2,cache=unsafe"),
            *("-drive", f"file={self._folder / 'seed.iso'},if=virtio,format=raw,readonly=on"),
            *("-netdev", f"tap,id=net,ifname={port},script=no,downscript=no"),
            *("-device", f"virtio-net-pci,netdev=net,mac={mac},romfile="),
            *("-device", "virtio-rng-pci"),
            *("-serial", f"file:{self._log}"),
            *("-chardev", f"socket,id=shell,path={shell},server=on,wait=off", "-serial", "chardev:shell"),
        ]
        with (self._folder / "qemu.log").open("wb") as log:
            self._qemu = self._run.spawn(self.name, self._network.in_cluster(argv), output=log)
        self._console = self._connect(shell)

    def wait_until_up(self) -> None:
        """Wait until systemd has started everything that it could, cloud-init's last stage included."""
        try:
            self._shell.wait_until_ready(timeout=_BOOT)
        except (TimeoutError, ConnectionResetError) as error:
            raise self._failed("does not come up") from error
        state = self.run(["systemctl", "is-system-running", "--wait"], check=False, timeout=_BOOT).stdout.strip()
        if state not in {"running", "degraded"}:
            raise self._failed(f"does not come up, systemd says {state!r}")

    def reboot(self) -> None:
        """Let systemd reboot, and wait until the machine is up again."""
        self.run(["systemctl", "--no-block", "reboot"])
        self.wait_until_up()

    def stop(self) -> Image:
        """Let systemd power the machine off, and return its disk as an image for others."""
        self.run(["systemctl", "--no-block", "poweroff"])
        assert self._qemu is not None
        try:
            self._qemu.wait(timeout=_BOOT)
        except subprocess.TimeoutExpired as error:
            raise self._failed("does not power off") from error
        self.power_off()
        return replace(self._image, disk=self._disk)

    def power_off(self) -> None:
        """Pull the plug."""
        if self._console is not None:
            self._console.close()
            self._console = None
        if self._qemu is not None:
            self._run.kill(self.name)
            self._qemu.wait()
            self._qemu = None
            quietly(["ip", "-n", self._network.cluster, "link", "delete", f"tap-{self.name}"])

    # --- commands -----------------------------------------------------------

    def run(self, argv: Sequence[str], *, check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command as root over the serial console.

        Raises `subprocess.CalledProcessError` (with `check`; both outputs are in its notes) and
        `subprocess.TimeoutExpired`, after which the command is dead.
        """
        try:
            done = self._shell.run(shlex.join(argv), timeout=timeout)
        except (TimeoutError, ConnectionResetError) as error:
            raise self._failed(f"does not answer to {shlex.join(argv)}") from error
        if done.returncode == _TIMED_OUT:
            raise subprocess.TimeoutExpired(list(argv), timeout, done.stdout, done.stderr)
        if check and done.returncode != 0:
            failed = subprocess.CalledProcessError(done.returncode, list(argv), done.stdout, done.stderr)
            failed.add_note(f"stdout:\n{done.stdout}\nstderr:\n{done.stderr}")
            raise failed
        return done

    def journal(self, unit: str = "") -> str:
        """The journal of a unit since the boot, or the whole of it; nothing where the machine does not answer."""
        chosen = [f"--unit={unit}"] if unit else []
        with suppress(LabError):
            return self.run(["journalctl", "--boot", "--no-pager", "--output=short-monotonic", *chosen]).stdout
        return ""

    def console(self) -> str:
        """What kernel and systemd wrote to the first serial port, without the terminal's control sequences."""
        text = self._log.read_text(errors="replace") if self._log.exists() else ""
        text = re.sub(r"\x1b(\[[0-9;?]*)?[0-9A-Za-z]|\r", "", text)
        return re.sub(r"(\n(\[[* ]+\] Job .*)?)+", "\n", text)  # systemd's moving stars, while it waits for a job

    # --- inside -------------------------------------------------------------

    @property
    def _shell(self) -> Console:
        if self._console is None:
            raise LabError(f"{self.name} is off")
        return self._console

    def _write_seed(self) -> None:
        folder = self._folder / "seed"
        folder.mkdir()
        (folder / "user-data").write_text(self._seed.user_data)
        metadata = {"instance-id": self._seed.instance_id, "local-hostname": self.name}
        (folder / "meta-data").write_text(yaml.safe_dump(metadata))
        (folder / "network-config").write_text(yaml.safe_dump(self._network_configuration()))
        label = ("-quiet", "-volid", "cidata", "-joliet", "-rational-rock")
        quietly(["genisoimage", *label, "-output", str(self._folder / "seed.iso"), str(folder)])

    def _network_configuration(self) -> dict[str, Any]:
        interface = {
            "addresses": [f"{self.ipv4}/24", f"{self.ipv6}/64"],
            "gateway4": CLUSTER_IPV4,
            "gateway6": CLUSTER_IPV6,
        }
        return {"version": 2, "ethernets": {"eth0": interface}}

    def _connect(self, path: Path) -> Console:
        assert self._qemu is not None
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self._qemu.poll() is None:
            with suppress(FileNotFoundError, ConnectionRefusedError):
                return Console(path)
            time.sleep(0.02)
        raise self._failed("does not start")

    def _failed(self, what: str) -> LabError:
        return LabError(f"{self.name} {what}:\n{(self._folder / 'qemu.log').read_text()}\n{self.console()}")


_TIMED_OUT = 124  # timeout(1)


def _overlay(below: Path, disk: Path) -> None:
    quietly(["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(below), "-F", "qcow2", str(disk)])


def _decoded(field: str) -> str:
    return base64.b64decode(field.removeprefix("=")).decode(errors="replace")
