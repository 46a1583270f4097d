"""The five files that `istioctl x workload entry configure` wrote into a folder, as one bundle."""

import base64
import binascii
import hashlib
import json
import shlex
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from vmmesh_endpoint import log
from vmmesh_endpoint.errors import Refusal, unavailable
from vmmesh_endpoint.files import Watched

FILES = ("root-cert.pem", "istio-token", "cluster.env", "mesh.yaml", "hosts")
MAY_BE_EMPTY = ("hosts",)  # istioctl leaves it empty where the gateway has only a DNS name
MAX_FILE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Workload:
    """The WorkloadGroup that a bundle is for; as text `namespace/name`."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A complete set of the five files. `digest` is the hex SHA-256 over all of them."""

    workload: Workload
    files: Mapping[str, str] = field(repr=False)
    token_expires_at: datetime
    digest: str


class BundleFolder:
    """The folder that istioctl writes into; read anew when it changes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._watched = Watched(lambda: [folder, *(folder / name for name in FILES)], self._load)
        self._reported = ""

    def current(self) -> Bundle:
        """Return the bundle to hand out now. Raise a `Refusal` (503) where there is none that is fit."""
        bundle = self._watched.current()
        if isinstance(bundle, Refusal):
            self._report(bundle.code, bundle.message)
            raise Refusal(bundle.status, bundle.code, bundle.message, bundle.headers)
        if bundle.token_expires_at <= datetime.now(UTC):
            refusal = unavailable(
                "bundle-expired",
                f"The istio-token served here expired at {bundle.token_expires_at:%Y-%m-%dT%H:%M:%SZ}; "
                "renew it with istioctl x workload entry configure.",
            )
            self._report(refusal.code, refusal.message)
            raise refusal
        self._report(bundle.digest, "")
        return bundle

    def _load(self) -> Bundle | Refusal:
        # A refusal is a value here: it stands, like a bundle, until the files change.
        try:
            return parse({name: _read(self._folder / name) for name in FILES})
        except Refusal as refusal:
            return refusal

    def _report(self, outcome: str, message: str) -> None:
        """Log what is served, or why nothing is, once each time it changes."""
        if outcome == self._reported:
            return
        self._reported = outcome
        if message:
            log.warning("nothing to serve", reason=outcome, message=message)
        else:
            log.info("serving a new bundle", digest=outcome)


def parse(files: Mapping[str, bytes]) -> Bundle:
    """Make a bundle of the five files. Raise a `Refusal` (503) that names the file that is not fit.

    The agent judges each value; this looks only for what a write in progress, or a slip, leaves behind.
    """
    texts = {name: _text(name, content) for name, content in files.items()}
    try:
        x509.load_pem_x509_certificates(files["root-cert.pem"])
    except ValueError:
        raise _incomplete("root-cert.pem", "holds no complete PEM certificate") from None
    if "defaultConfig" not in texts["mesh.yaml"]:
        raise _incomplete("mesh.yaml", "has no defaultConfig")
    digest = hashlib.sha256()
    for name in FILES:
        digest.update(hashlib.sha256(files[name]).digest())
    return Bundle(
        workload=_workload(texts["cluster.env"]),
        files=texts,
        token_expires_at=_expiry(texts["istio-token"]),
        digest=digest.hexdigest(),
    )


def _read(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
            raise _incomplete(path.name, f"is not a plain file of at most {MAX_FILE_BYTES} bytes")
        return path.read_bytes()
    except FileNotFoundError:
        raise _incomplete(path.name, "is missing") from None
    except OSError:
        raise _incomplete(path.name, "cannot be read") from None


def _text(name: str, content: bytes) -> str:
    if not content.strip() and name not in MAY_BE_EMPTY:
        raise _incomplete(name, "is empty")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise _incomplete(name, "is not UTF-8 text") from None


def _workload(cluster_env: str) -> Workload:
    # istioctl writes ISTIO_SERVICE as group.namespace; a namespace has no dots.
    for line in cluster_env.splitlines():
        key, _, value = line.partition("=")
        if key == "ISTIO_SERVICE":
            try:
                service = "".join(shlex.split(value))
            except ValueError:
                break
            name, _, namespace = service.rpartition(".")
            if name and namespace:
                return Workload(namespace, name)
    raise _incomplete("cluster.env", "has no ISTIO_SERVICE='group.namespace'")


def _expiry(token: str) -> datetime:
    # Only the time is read; whether istiod would believe the token is not ours to say.
    try:
        _, payload, _ = token.strip().split(".")
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return datetime.fromtimestamp(claims["exp"], UTC)
    except (ValueError, binascii.Error, KeyError, TypeError, OverflowError, OSError):
        raise _incomplete("istio-token", "is not a complete JWT with a time of expiry") from None


def _incomplete(name: str, what: str) -> Refusal:
    return unavailable(
        "bundle-incomplete",
        f"The bundle served here is not complete: {name} {what}; write it anew with istioctl.",
        retry_after=10,
    )
