"""Signed repositories, as small as they can be, and a web server for them on the cluster's side."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from shutil import copy

from lab.network import CLUSTER_IPV4, Network
from lab.run import Run
from lab.services import Service

_PORT = 8000
_SIGNER = "packages@example.com"


class Mirror(Service):
    """A web server without TLS, for files whose digest or signature is checked by who fetches them."""

    def __init__(self, *, network: Network, run: Run) -> None:
        super().__init__("mirror", ready="Serving HTTP", network=network, run=run)
        self.files = self.folder / "files"
        self.files.mkdir()
        self.url = f"http://{CLUSTER_IPV4}:{_PORT}"

    def argv(self) -> list[str]:
        """The command line, after `python`."""
        return ["-m", "http.server", f"--bind={CLUSTER_IPV4}", f"--directory={self.files}", str(_PORT)]


def publish(packages: Sequence[Path], folder: Path) -> str:
    """Make `folder` a flat apt repository of these debs, and return the public key that it is signed with."""
    _copy(packages, folder)
    (folder / "Packages").write_text(_said(["apt-ftparchive", "packages", "."], folder))
    (folder / "Release").write_text(_said(["apt-ftparchive", "release", "."], folder))
    home, key = _new_key(folder)
    _said(["gpg", f"--homedir={home}", "--batch", "--clearsign", "--output=InRelease", "Release"], folder)
    _end_agent(home)
    return key


def publish_rpms(packages: Sequence[Path], folder: Path) -> str:
    """Make `folder` a yum repository of these rpms, and return the public key that each of them is signed with."""
    copies = _copy(packages, folder)
    home, key = _new_key(folder)
    macros = {"__gpg": "/usr/bin/gpg", "_gpg_path": home, "_gpg_name": _SIGNER}
    _said(["rpmsign", *(f"--define={name} {value}" for name, value in macros.items()), "--addsign", *copies], folder)
    _said(["createrepo_c", "--quiet", "."], folder)
    _end_agent(home)
    return key


def _copy(packages: Sequence[Path], folder: Path) -> list[str]:
    return [Path(copy(package, folder)).name for package in packages]


def _new_key(folder: Path) -> tuple[Path, str]:
    """Make a key without a passphrase beside `folder`; return where gpg has it, and its public half."""
    home = folder.with_name(f"{folder.name}.gnupg")
    home.mkdir(mode=0o700)
    gpg = ["gpg", f"--homedir={home}", "--batch", "--quiet"]
    _said([*gpg, "--pinentry-mode=loopback", "--passphrase=", "--quick-generate-key", _SIGNER, "rsa3072"], folder)
    return home, _said([*gpg, "--armor", "--export"], folder)


def _end_agent(home: Path) -> None:
    subprocess.run(["gpgconf", f"--homedir={home}", "--kill", "all"], check=True)


def _said(argv: Sequence[str], folder: Path) -> str:
    return subprocess.run(argv, check=True, text=True, capture_output=True, cwd=folder).stdout
