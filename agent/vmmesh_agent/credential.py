"""How this machine proves who it is: what the configuration names, read anew for each request; a join token, kept.

The secret of a join token is what the machine renews with as well. Once the endpoint took it, it is kept where only
root looks; when the machine is healthy with it, the file that the configuration names is removed, for that one came by
user-data, by an image or by hand. The kept one is on the disk before the other goes. A new file there goes first.
"""

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from vmmesh_agent import cloudinit
from vmmesh_agent.config import Config, Credential
from vmmesh_agent.errors import AgentError, ConfigurationError, FetchError
from vmmesh_agent.host import ROOT, Host
from vmmesh_agent.secret import Secret
from vmmesh_agent.text import shown

KEPT = PurePosixPath("/var/lib/vmmesh-agent/join-token")

_MAX_BYTES = 64 * 1024
_EXEC_SECONDS = 30


def bearer(host: Host, credential: Credential, patience: float | None) -> Secret | None:
    """Return what goes with a request as `Authorization: Bearer`, None where the configuration names nothing."""
    if credential.exec:
        token, source = _executed(host, credential.exec, patience), credential.exec[0]
    elif path := credential.join_token_file or credential.bearer_token_file:
        path = _in_force(host, credential) or path
        token, source = read(host, path, "endpoint.credential").strip(), str(path)
    else:
        return None
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise FetchError(
            f"{source} gave no usable token (one word of text)",
            code="credential-invalid",
            hint="see endpoint.credential",
            retry=True,
        )
    return Secret(token)


def read(host: Host, path: PurePosixPath, key: str) -> str:
    """Return the text of a file that the configuration names."""
    content = host.read(path, _MAX_BYTES)
    if content is None:
        raise FetchError(
            f"{key}: {path} is not there",
            code="credential-missing",
            hint="\n".join(filter(None, ["put it there", cloudinit.complaint(host)])),
            retry=True,
        )
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ConfigurationError(
            f"{key}: {path} is not text", code="configuration-invalid", hint="see that it is the file that was meant"
        ) from None


def missing(host: Host, config: Config) -> PurePosixPath | None:
    """Return the first of the files that a request needs and that is not there, None where all are."""
    return next((path for path in _needed(host, config) if host.status(path) is None), None)


def keep(host: Host, token: Secret) -> bool:
    """Keep a join token that the endpoint took, beside the membership. Is it another one than was kept?"""
    content = f"{token.reveal()}\n".encode()
    if host.read(KEPT, _MAX_BYTES) == content:
        return False
    host.write(KEPT, content, ROOT, 0o600)
    return True


def retire(host: Host, credential: Credential) -> str:
    """Remove the configured join token where it is the kept one. Return why it could not be, empty where it could."""
    path = credential.join_token_file
    if path is None or path == KEPT:
        return ""
    try:
        kept, configured = (host.read(each, _MAX_BYTES) for each in (KEPT, path))
        if kept and configured and kept.strip() == configured.strip():
            host.remove(path)
    except AgentError as error:
        return f"the join token could not be removed, {KEPT} holds it now: {error.message}"
    return ""


def _in_force(host: Host, credential: Credential) -> PurePosixPath | None:
    """Return the kept join token, where it stands for a configured one that is not there."""
    path = credential.join_token_file
    return KEPT if path and host.status(path) is None and host.status(KEPT) else None


def _needed(host: Host, config: Config) -> Iterator[PurePosixPath]:
    endpoint = config.endpoint
    if endpoint.url.startswith("file:"):
        yield PurePosixPath(unquote(urlsplit(endpoint.url).path))
        return
    if endpoint.ca_file:
        yield endpoint.ca_file
    credential = endpoint.credential
    if path := credential.join_token_file or credential.bearer_token_file:
        yield _in_force(host, credential) or path
    if credential.client_certificate:
        yield credential.client_certificate.certificate
        yield credential.client_certificate.key
    if credential.exec:
        yield PurePosixPath(credential.exec[0])


def _executed(host: Host, argv: Sequence[str], patience: float | None) -> str:
    """Return what the credential program printed. What it printed before it failed may be a secret: never shown."""
    timeout = _EXEC_SECONDS if patience is None else min(_EXEC_SECONDS, patience)
    done = host.run(argv, timeout=timeout, check=False)
    if done.status != 0:
        complaint = shown(done.stderr.strip().rpartition("\n")[2])
        raise FetchError(
            f"endpoint.credential.exec: {argv[0]} failed with status {done.status}: {complaint}",
            code="credential-exec-failed",
            hint="run it by hand, as root",
            retry=True,
        )
    if len(done.stdout) > _MAX_BYTES:
        raise FetchError(
            f"{argv[0]} printed more than a credential",
            code="credential-invalid",
            hint="run it by hand, as root",
            retry=True,
        )
    return done.stdout.strip()
