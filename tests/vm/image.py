"""The disk of a virtual machine as clouds have it: Debian with its own kernel, cloud-init, and nothing of the agent.

Made once and kept in the cache; a machine writes into an overlay of it.
"""

import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lab import cache, image

_FILES = Path(__file__).with_name("files")
_PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "udev", "kmod", "iproute2", "procps", "logrotate"),
    *("linux-image-cloud-amd64", "initramfs-tools"),
    *("cloud-init", "python3-cffi-backend"),  # the second by name: debootstrap knows nothing of virtual packages
    # what the packages of the agent and of the sidecar depend on: the machine has no way to a mirror
    *("python3", "ca-certificates", "openssl", "iptables", "sudo", "hostname"),
    "curl",
)
_ENABLED_UNITS = ("lab-console.service", "systemd-networkd.service")
# Each of them costs an emulated processor seconds, and nothing here needs it.
_MASKED_UNITS = (
    *image.MASKED_UNITS,
    *("e2scrub_reap.service", "cron.service", "getty@tty1.service", "serial-getty@ttyS0.service"),
    *("modprobe@dm_mod.service", "modprobe@drm.service", "modprobe@efi_pstore.service", "modprobe@loop.service"),
    *("modprobe@fuse.service", "sys-kernel-debug.mount", "sys-kernel-tracing.mount", "dev-hugepages.mount"),
)
_SIZE = "3G"  # what is not written takes no room


@dataclass(frozen=True)
class Image:
    """A disk, and the kernel with which qemu boots it: a boot loader would only take time."""

    disk: Path
    kernel: Path
    initrd: Path


def cloud_image() -> Image:
    """Debian with cloud-init and with the console that `machine.Console` speaks to.

    It takes some minutes where it is not in the cache.
    """
    tree = cache.entry("vm-tree", [image.SUITE, *_PACKAGES, platform.machine()], _install)
    inputs: list[str | bytes] = [tree.name, *_ENABLED_UNITS, *_MASKED_UNITS, _SIZE, *cache.contents(_FILES)]
    made = cache.entry("vm-disk", inputs, lambda folder: _make_disk(tree, folder))
    return Image(made / "disk.qcow2", made / "vmlinuz", made / "initrd.img")


def _install(tree: Path) -> None:
    image.debootstrap(tree, _PACKAGES)


def _make_disk(installed: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        tree, raw = Path(scratch, "tree"), Path(scratch, "disk.img")
        image.quietly(["cp", "--archive", "--reflink=auto", str(installed), str(tree)])
        shutil.copytree(_FILES, tree, dirs_exist_ok=True)
        (tree / "etc/apt/sources.list").write_text("")
        image.quietly(["systemctl", f"--root={tree}", "enable", *_ENABLED_UNITS])
        image.quietly(["systemctl", f"--root={tree}", "mask", *_MASKED_UNITS])
        image.quietly(["systemctl", f"--root={tree}", "set-default", "multi-user.target"])
        image.quietly(["chroot", str(tree), "update-initramfs", "-u"])
        for name in ("vmlinuz", "initrd.img"):
            shutil.copy(tree / name, folder / name)
        image.quietly(["mkfs.ext4", "-q", "-d", str(tree), str(raw), _SIZE])
        image.quietly(["qemu-img", "convert", "-O", "qcow2", str(raw), str(folder / "disk.qcow2")])
