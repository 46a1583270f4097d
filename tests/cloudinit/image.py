"""Debian's cloud-init over the layers of the lab's machines, and a seed for it (NoCloud, in the tree)."""

from collections.abc import Sequence
from pathlib import Path

from lab import cache, image
from lab.image import Family

# Its generator and its units as Debian ships them. What a machine in a box has not (disks to grow, a network to set
# up, a mirror to fetch from) it is told to leave alone.
_SETTINGS = """\
datasource_list: [NoCloud]
network: {config: disabled}
locale: false
apt: {preserve_sources_list: true}
"""
# The lab's machines with rpm are built from Debian: there cloud-init is told which family it is, and which of its
# modules that family has in the config stage.
_RPM_SETTINGS = """\
system_info: {distro: rhel}
cloud_config_modules: [yum-add-repo, runcmd]
preserve_hostname: true
"""


def layers(family: Family, *, with_agent: bool, fixture_rpms: Sequence[Path] = ()) -> list[Path]:
    """A machine of this family with cloud-init, the lowest layer first."""
    base, *above = image.layers(family, with_agent=with_agent, fixture_rpms=fixture_rpms)
    # Below what makes it a machine of one family, for it is a deb.
    return [base, layer([base], _SETTINGS + (_RPM_SETTINGS if family == "rpm" else "")), *above]


def layer(below: Sequence[Path], settings: str = _SETTINGS) -> Path:
    """cloud-init with all that it requires, installed by dpkg in the tree made of the layers `below`."""
    debs = cache.entry("cloud-init-debs", [below[0].name], lambda out: _download(below[0], out))

    def build(layer: Path) -> None:
        image.in_chroot(below, layer, ["/bin/sh", "-ec", "dpkg --install /mnt/*.deb >&2"], mount=debs)
        (layer / "etc/cloud/cloud.cfg.d/90_lab.cfg").write_text(settings)
        (layer / "etc/apt").mkdir(exist_ok=True)
        (layer / "etc/apt/sources.list").write_text("")  # machines have no way to a mirror

    return cache.entry("cloud-init", [*(each.name for each in below), debs.name, settings], build)


def seed(folder: Path, user_data: str, *, instance: str = "first") -> Path:
    """A layer with the seed from which cloud-init takes this user-data, for an instance of this ID."""
    place = folder / "var/lib/cloud/seed/nocloud"
    place.mkdir(parents=True)
    (place / "meta-data").write_text(f"instance-id: {instance}\n")
    (place / "user-data").write_text(user_data)
    return folder


def _download(base: Path, out: Path) -> None:
    """Let this host's apt fetch what the tree lacks for cloud-init."""
    options = (
        f"Dir::State::status={base}/var/lib/dpkg/status",
        f"Dir::Cache::archives={out}",
        "APT::Sandbox::User=root",
    )
    argv = ["apt-get", *(f"--option={option}" for option in options)]
    image.quietly([*argv, "install", "--yes", "--no-install-recommends", "--download-only", "cloud-init"])
    (out / "lock").unlink()
    (out / "partial").rmdir()
