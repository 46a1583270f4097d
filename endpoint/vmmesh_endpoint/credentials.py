"""What a machine may show to be let in: join tokens in a file, shared secrets, and how failing is slowed down.

A join token is `VM1.<id>.<secret>`. The id is public and names it in lists and logs; of the secret (256 random
bits) only the SHA-256 is kept, which is enough for a secret that nobody can guess.
"""

import hashlib
import hmac
import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from vmmesh_endpoint.errors import ConfigurationError, Refusal
from vmmesh_endpoint.files import Watched, locked, require_private, write

MAX_COMMENT = 200
MIN_SHARED_SECRET = 32

_JOIN_TOKEN = re.compile(r"VM1\.([0-9a-z]{4,32})\.([0-9a-f]{64})")
_VERSION = 1


@dataclass(frozen=True, slots=True)
class JoinToken:
    """What is kept of a join token. `machines` maps each admitted machine to the time of its admission."""

    id: str
    secret_sha256: str = field(repr=False)
    created_at: datetime
    expires_at: datetime
    machines_allowed: int = 1
    machines: Mapping[str, datetime] = field(default_factory=dict)
    workload: str = ""  # namespace/name, or empty for any
    comment: str = ""
    revoked_at: datetime | None = None

    def require_usable(self, machine: str, now: datetime) -> None:
        """Raise a `Refusal` (410) where the token does not admit this machine, or no longer does.

        A machine that was admitted once may come back after the token has expired, until it is revoked.
        """
        self.require_not_revoked()
        if machine in self.machines:
            return
        if now >= self.expires_at:
            raise Refusal(410, "token-expired", f"Join token {self.id} expired at {_text(self.expires_at)}.")
        if len(self.machines) >= self.machines_allowed:
            raise Refusal(
                410,
                "token-used-up",
                f"Join token {self.id} has admitted as many machines as it may ({self.machines_allowed}).",
            )

    def require_not_revoked(self) -> None:
        """Raise a `Refusal` (410) where the token has been revoked."""
        if self.revoked_at:
            raise Refusal(410, "token-revoked", f"Join token {self.id} has been revoked.")


class TokenFile:
    """The file of join tokens, mode 0600. Any number of processes and threads may use it at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._watched = Watched(lambda: [path], self._load, atomic=True)

    def tokens(self) -> dict[str, JoinToken]:
        """Return the tokens by id as of now. Raise `ConfigurationError` where the file is not to be used."""
        return self._watched.current()

    def create(
        self, lifetime: timedelta, *, machines: int = 1, workload: str = "", comment: str = ""
    ) -> tuple[str, JoinToken]:
        """Make a token; return its text, which is not kept anywhere, and what is kept of it."""
        now = datetime.now(UTC).replace(microsecond=0)
        secret = secrets.token_hex(32)
        token = JoinToken(
            id=secrets.token_hex(4),
            secret_sha256=_digest(secret),
            created_at=now,
            expires_at=now + lifetime,
            machines_allowed=machines,
            workload=workload,
            comment=comment,
        )
        self._change(lambda tokens: {**tokens, token.id: token})
        return f"VM1.{token.id}.{secret}", token

    def revoke(self, token_id: str) -> JoinToken:
        """Revoke a token for new machines and for those that it has admitted. `KeyError` where there is none."""
        now = datetime.now(UTC).replace(microsecond=0)

        def revoked(tokens: Mapping[str, JoinToken]) -> dict[str, JoinToken]:
            token = tokens[token_id]
            return {**tokens, token_id: replace(token, revoked_at=token.revoked_at or now)}

        return self._change(revoked)[token_id]

    def admit(self, token_id: str, machine: str) -> None:
        """Write down that the token has admitted this machine. Raise a `Refusal` (410) where it may not."""
        now = datetime.now(UTC).replace(microsecond=0)

        def admitted(tokens: Mapping[str, JoinToken]) -> dict[str, JoinToken]:
            token = tokens.get(token_id)
            if token is None:  # taken out of the file since it was recognized
                raise Refusal(410, "token-revoked", f"Join token {token_id} has been revoked.")
            token.require_usable(machine, now)
            return {**tokens, token_id: replace(token, machines={machine: now, **token.machines})}

        self._change(admitted)

    def recognize(self, text: str) -> JoinToken | None:
        """Return the token that `text` is, usable or not; None where it is none of ours."""
        match = _JOIN_TOKEN.fullmatch(text)
        token = self.tokens().get(match[1]) if match else None
        if match and token and hmac.compare_digest(_digest(match[2]), token.secret_sha256):
            return token
        return None

    def _change(self, change: Callable[[Mapping[str, JoinToken]], dict[str, JoinToken]]) -> dict[str, JoinToken]:
        with locked(self.path):
            tokens = change(self._load())
            document = {"version": _VERSION, "join_tokens": [_as_json(token) for token in tokens.values()]}
            write(self.path, json.dumps(document, indent=2).encode() + b"\n")
        return tokens

    def _load(self) -> dict[str, JoinToken]:
        try:
            require_private(self.path)
            document = json.loads(self.path.read_bytes())
            if document["version"] != _VERSION:
                raise ConfigurationError(f"{self.path} has version {document['version']!r}; {_VERSION} is known")
            return {entry["id"]: _from_json(entry) for entry in document["join_tokens"]}
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(f"{self.path} is not a file of join tokens: {error!r}") from None


class SharedSecrets:
    """A file with one secret per line, mode 0600; two lines while one is being replaced by another."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._watched = Watched(lambda: [path], self._load)

    def digests(self) -> tuple[str, ...]:
        """Return the SHA-256 of each secret. Raise `ConfigurationError` where the file is not to be used."""
        return self._watched.current()

    def recognize(self, text: str) -> bool:
        """Is this one of the secrets? All are compared, so the time taken does not say which came near."""
        presented = _digest(text)
        return any([hmac.compare_digest(presented, digest) for digest in self.digests()])  # noqa: C419

    def _load(self) -> tuple[str, ...]:
        try:
            require_private(self._path)
            lines = [line.strip() for line in self._path.read_text("ascii").splitlines()]
        except FileNotFoundError:
            raise ConfigurationError(f"{self._path} is missing") from None
        except UnicodeDecodeError:
            raise ConfigurationError(f"{self._path} is not ASCII text") from None
        found = [line for line in lines if line]
        if not found or min(map(len, found)) < MIN_SHARED_SECRET:
            raise ConfigurationError(
                f"{self._path} needs secrets of at least {MIN_SHARED_SECRET} characters, one per line",
                f"openssl rand -hex 32 > {self._path}",
            )
        return tuple(map(_digest, found))


class Throttle:
    """Counts failed authentications per address; after `limit` within `window` seconds it says to wait.

    Only failures are slowed down. Behind a gateway or a NAT many machines share an address, and one that
    holds a wrong secret must not keep the others out.
    """

    def __init__(self, *, limit: int = 10, window: float = 60, addresses: int = 10_000) -> None:
        self._limit = limit
        self._window = window
        self._addresses = addresses
        self._lock = threading.Lock()
        self._failures: dict[str, list[float]] = {}

    def failed(self, address: str) -> int:
        """Count one failure; return the seconds to wait, or 0 while there were few."""
        now = time.monotonic()
        with self._lock:
            recent = [moment for moment in self._failures.pop(address, []) if now - moment < self._window]
            if len(recent) < self._limit:
                recent.append(now)
                wait = 0.0
            else:
                wait = self._window - (now - recent[0])
            self._failures[address] = recent  # the last key is the latest; the first goes when there are too many
            if len(self._failures) > self._addresses:
                del self._failures[next(iter(self._failures))]
        return -int(-wait // 1)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _as_json(token: JoinToken) -> dict[str, Any]:
    return {
        "id": token.id,
        "secret_sha256": token.secret_sha256,
        "created_at": _text(token.created_at),
        "expires_at": _text(token.expires_at),
        "machines_allowed": token.machines_allowed,
        "machines": {machine: _text(moment) for machine, moment in token.machines.items()},
        "workload": token.workload,
        "comment": token.comment,
        "revoked_at": _text(token.revoked_at) if token.revoked_at else None,
    }


def _from_json(entry: Mapping[str, Any]) -> JoinToken:
    return JoinToken(
        id=entry["id"],
        secret_sha256=entry["secret_sha256"],
        created_at=_time(entry["created_at"]),
        expires_at=_time(entry["expires_at"]),
        machines_allowed=int(entry["machines_allowed"]),
        machines={machine: _time(moment) for machine, moment in entry["machines"].items()},
        workload=entry["workload"],
        comment=entry["comment"],
        revoked_at=_time(entry["revoked_at"]) if entry["revoked_at"] else None,
    )


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _time(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    return moment
