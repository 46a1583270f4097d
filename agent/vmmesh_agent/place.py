"""The table of files, and the putting of them.

`plan` compares and changes nothing; `staged` writes what is new beside what is there, and its `commit` puts all of it
in place, or none of it. A second plan after it is empty.
"""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import PurePosixPath

from vmmesh_agent import clusterenv, hosts, ssh, x509
from vmmesh_agent.errors import PlaceError
from vmmesh_agent.host import ROOT, Account, Host, NewContent
from vmmesh_agent.host import Staged as StagedFiles
from vmmesh_agent.verify import VerifiedBundle

USER = "istio-proxy"

ROOT_CERT = PurePosixPath("/etc/certs/root-cert.pem")
TOKEN = PurePosixPath("/var/run/secrets/tokens/istio-token")
CLUSTER_ENV = PurePosixPath("/var/lib/istio/envoy/cluster.env")
MESH = PurePosixPath("/etc/istio/config/mesh")
ETC_HOSTS = PurePosixPath("/etc/hosts")

_RESOLVER_SECONDS = 20

# Folders that belong to istio-proxy. Their content is left alone: a recursive chown, as root, of a folder that a
# lesser user owns could be led anywhere. (/etc/istio is the package's link to /var/lib/istio.)
FOLDERS = (
    PurePosixPath("/var/lib/istio"),
    PurePosixPath("/var/lib/istio/envoy"),
    PurePosixPath("/etc/certs"),
    PurePosixPath("/etc/istio/config"),
    PurePosixPath("/etc/istio/proxy"),
    PurePosixPath("/var/run/secrets"),
    PurePosixPath("/var/run/secrets/tokens"),
)


# pilot-agent writes the roots of its last certificate, which may be fewer than the cluster has: nobody's mistake.
FEWER_ROOTS = "fewer roots"

# What a change is → what somebody found who did not expect to have to make it.
_FOUND = {
    "new folder": "was gone",
    "owner": "belonged to another user",
    "new": "was gone",
    "content": "had other content",
    "owner or mode": "had another owner or mode",
    FEWER_ROOTS: "lacked roots that the cluster has",
    "block": "had lost or altered the agent's lines",
}

_WRITTEN_BY_SIDECAR = {PurePosixPath("/etc/certs"), PurePosixPath("/etc/istio/proxy")}


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the table. Other `modes` than the first are tolerated on a file that has the right content."""

    path: PurePosixPath
    modes: tuple[int, ...]
    restarts: bool  # does the sidecar read it only when it starts?
    is_secret: bool = False


# Owner istio-proxy throughout; modes as pilot-agent needs them. pilot-agent reads the token anew at each
# certificate request, and writes a new root-cert.pem itself, with mode 0600.
TABLE = {
    "root-cert.pem": Entry(ROOT_CERT, (0o644, 0o600), restarts=True),
    "istio-token": Entry(TOKEN, (0o600,), restarts=False, is_secret=True),
    "cluster.env": Entry(CLUSTER_ENV, (0o644,), restarts=True),
    "mesh.yaml": Entry(MESH, (0o644,), restarts=True),
}

# The mesh configuration has two names: /etc/istio is the package's link to /var/lib/istio.
PLACED = frozenset(entry.path for entry in TABLE.values()) | {PurePosixPath("/var/lib/istio/config/mesh")}


@dataclass(frozen=True, slots=True)
class Change:
    """One thing to do. `before` is None where nothing is there, `content` is None for a folder.

    `owner` is a user's name, for the user may be made only by the package. None keeps what is there.
    """

    path: PurePosixPath
    what: str
    before: bytes | None = field(repr=False)  # perhaps a secret
    content: bytes | None = field(repr=False)
    owner: str | None
    mode: int
    restarts: bool
    is_secret: bool = False

    @property
    def found(self) -> str:
        """What was found in place of what should be, as a sentence."""
        return f"{self.path} {_FOUND[self.what]}"

    def diff(self) -> str:
        """Show the change as a unified diff, a secret masked; empty where only owner or mode change."""
        if self.content is None or self.before == self.content:
            return ""
        name = str(self.path).lstrip("/")
        if self.is_secret:
            before, after = (
                ["(the secret that is there)"] if self.before else [],
                [f"(a secret of {len(self.content)} bytes)"],
            )
        else:
            before, after = (text.decode(errors="replace").splitlines() for text in (self.before or b"", self.content))
        return "\n".join(difflib.unified_diff(before, after, f"a/{name}", f"b/{name}", lineterm=""))


def plan(
    host: Host, bundle: VerifiedBundle, previous_root: bytes, moment: datetime, ssh_ports: Sequence[int] = ()
) -> tuple[Change, ...]:
    """Compare the machine with the bundle.

    `previous_root` is the root certificate file of the bundle before this one, empty where there was none: it
    tells roots that the cluster dropped from those that pilot-agent itself brought since. Connections to
    `ssh_ports`, and to 22, are never captured, whatever the bundle says.
    """
    owner = host.account(USER)
    variables = clusterenv.excluding_inbound(bundle.variables, [ssh.ALWAYS, *ssh_ports])
    contents = {
        "root-cert.pem": merged_roots(bundle.root_cert, previous_root, host.read(ROOT_CERT) or b"", moment),
        "istio-token": bundle.token.reveal().encode(),
        "cluster.env": clusterenv.render(variables).encode(),
        "mesh.yaml": bundle.mesh,
    }
    folders = (_folder_change(host, path, owner) for path in FOLDERS)
    files = (_file_change(host, TABLE[name], content, owner) for name, content in contents.items())
    if bundle.root_cert == previous_root:
        # No news from the cluster: the sidecar runs on these roots, whatever became of the file since.
        files = (_without_restart(change) if change and change.path == ROOT_CERT else change for change in files)
    return tuple(change for change in (*folders, *files, _hosts_change(host, bundle.hosts)) if change)


@contextmanager
def staged(host: Host, changes: Sequence[Change]) -> Iterator["Staged"]:
    """Make the folders, and write all new content beside the files that it is for: what can fail has not yet."""
    owner = host.account(USER)
    if owner is None:
        raise PlaceError(
            f"there is no user {USER}", code="user-missing", hint="the istio-sidecar package makes it: install that"
        )
    for folder in (*FOLDERS, ETC_HOSTS.parent):
        host.sweep(folder)  # what a process left there that was killed
    for change in changes:
        if change.content is None:
            host.make_folder(change.path, owner, change.mode)
    contents = [
        NewContent(
            change.path, change.content, owner if change.owner else _owner_of(host, change.path), change.mode
        )
        for change in changes
        if change.content is not None
    ]  # fmt: skip
    with host.staged(contents) as files:
        yield Staged(host, changes, files)


@dataclass(frozen=True, slots=True)
class Staged:
    """Changes that are all on the disk, and not yet in place."""

    _host: Host
    _changes: Sequence[Change]
    _files: StagedFiles

    def commit(self) -> None:
        """Put all of them in place; where one cannot be, the others get back what was there."""
        self._files.commit()
        _restore_labels(self._host, [change.path for change in self._changes])


def apply(host: Host, changes: Sequence[Change]) -> None:
    """Make the changes, all or none."""
    with staged(host, changes) as ready:
        ready.commit()


def resolves(host: Host, name: str) -> bool:
    """Does this machine find an address for the name, without the agent's own lines in /etc/hosts?

    Of an image tree that is not known: its resolver will be another one than ours.
    """
    if not host.is_running:
        return True
    content = host.read(ETC_HOSTS) or b""
    others = hosts.with_block(content, ())
    if others == content:
        return bool(host.addresses(name, _RESOLVER_SECONDS))
    lines, _ = hosts.parse(others.decode(errors="replace"))
    return any(name in line.names for line in lines) or bool(host.addresses(name, _RESOLVER_SECONDS, "resolve dns"))


def rewrite(host: Host, path: PurePosixPath, content: bytes) -> None:
    """Put this into a file that is not the agent's alone; its owner, mode and SELinux label stay."""
    found = host.status(path)
    host.write(path, content, found.owner if found else ROOT, found.mode if found else 0o644)
    _restore_labels(host, [path])


def merged_roots(new: bytes, previous: bytes, current: bytes, moment: datetime) -> bytes:
    """Return the root certificates to have: the bundle's, and what the sidecar learned and the bundle lacks.

    A root that is in the file but was not in the bundle before came from istiod: trust is not rolled back to the
    bundle's, which may be older. A root that was in the bundle before and is not in this one was dropped by the
    cluster; one that has expired is of no use.
    """
    if not previous or new == current:
        return new
    try:
        there = x509.read_pem(current.decode())
        gone = {certificate.der for certificate in x509.read_pem(previous.decode())}
    except (x509.CertificateError, UnicodeDecodeError):
        return new
    wanted = x509.read_pem(new.decode())
    known = {certificate.der for certificate in wanted}
    learned = [
        certificate
        for certificate in there
        if certificate.der not in known | gone and certificate.is_ca and certificate.not_after > moment
    ]
    if known | {certificate.der for certificate in learned} == {certificate.der for certificate in there}:
        return current
    return new + "".join(certificate.pem for certificate in learned).encode()


def _folder_change(host: Host, path: PurePosixPath, owner: Account | None) -> Change | None:
    found = host.status(path)
    if found and not found.is_directory:
        raise PlaceError(f"{path} is no folder", code="not-a-folder", hint="look at what put it there and remove it")
    if found and found.owner.uid == (owner.uid if owner else None):
        return None
    what = "owner" if found else "new folder"
    # What pilot-agent could not write it tries again only when it renews its certificate, half a day later.
    restarts = found is not None and path in _WRITTEN_BY_SIDECAR
    return Change(path, what, None, None, USER, found.mode if found else 0o755, restarts)


def _file_change(host: Host, entry: Entry, content: bytes, owner: Account | None) -> Change | None:
    before = host.read(entry.path)
    found = host.status(entry.path)
    is_right = found and found.owner.uid == (owner.uid if owner else None) and found.mode in entry.modes
    if before == content and is_right:
        return None
    what = "new" if before is None else "content" if before != content else "owner or mode"
    restarts = entry.restarts and before != content
    return Change(entry.path, what, before, content, USER, entry.modes[0], restarts, entry.is_secret)


def _hosts_change(host: Host, lines: Sequence[hosts.HostsLine]) -> Change | None:
    before = host.read(ETC_HOSTS)
    content = hosts.with_block(before or b"", lines)
    if content == (before or b""):
        return None
    found = host.status(ETC_HOSTS)
    mode = found.mode if found else 0o644
    return Change(ETC_HOSTS, "block", before, content, None, mode, restarts=False)


def _without_restart(change: Change) -> Change:
    before, wanted = _roots(change.before or b""), _roots(change.content or b"")
    is_fewer = bool(before) and before < wanted
    return replace(change, what=FEWER_ROOTS if is_fewer else change.what, restarts=False)


def _roots(content: bytes) -> set[bytes]:
    """Return the certificates in a file; none where it is no certificate file."""
    try:
        return {certificate.der for certificate in x509.read_pem(content.decode())}
    except (x509.CertificateError, UnicodeDecodeError):
        return set()


def _owner_of(host: Host, path: PurePosixPath) -> Account:
    found = host.status(path)
    return found.owner if found else ROOT


def _restore_labels(host: Host, paths: Sequence[PurePosixPath]) -> None:
    """Give what was written its SELinux labels; a file that was renamed into place keeps those of its old name."""
    if paths and host.is_running and host.status(PurePosixPath("/sys/fs/selinux/enforce")):
        host.run(["restorecon", "-F", *map(str, paths)], check=False)  # a wrong label is nothing to go back for
