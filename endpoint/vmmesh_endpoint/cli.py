"""The command line of vmmesh-endpoint: the only print, the only exit status."""

import argparse
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import NoReturn

from vmmesh_endpoint import log
from vmmesh_endpoint.app import Endpoint
from vmmesh_endpoint.bundle import BundleFolder
from vmmesh_endpoint.credentials import MAX_COMMENT, JoinToken, SharedSecrets, TokenFile
from vmmesh_endpoint.errors import ConfigurationError, EndpointError, NotPermittedError, Refusal, UsageError
from vmmesh_endpoint.files import private_directory
from vmmesh_endpoint.packages import PackageFolder
from vmmesh_endpoint.server import listen, serve
from vmmesh_endpoint.tls import GivenCertificate, OwnAuthority, ServerContext, default_names

STATE = Path("/var/lib/vmmesh-endpoint")
LISTEN = "[::]:15443"

_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_WORKLOAD = re.compile(rf"{_LABEL}/[a-z0-9]([a-z0-9.-]{{0,251}}[a-z0-9])?")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, 1, 64 usage, 77 not permitted, 78 configuration."""
    log.setup()
    try:
        options = parser().parse_args(arguments)
        options.command(options)
    except EndpointError as error:
        return _explain(error)
    except PermissionError as error:
        return _explain(NotPermittedError(f"{error.filename}: {error.strerror}", "run it as the owner of it"))
    except OSError as error:
        return _explain(EndpointError(f"{error.filename}: {error.strerror}"))
    return 0


def _explain(error: EndpointError) -> int:
    print(f"vmmesh-endpoint: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"  {error.hint}", file=sys.stderr)
    return error.exit_status


# --- commands ---------------------------------------------------------------


def _serve(options: argparse.Namespace) -> None:
    address, port = options.listen
    if not options.bundle_dir.is_dir():
        raise ConfigurationError(f"--bundle-dir {options.bundle_dir} is not a directory")
    state = private_directory(options.state_dir)
    tokens = TokenFile(_credentials_file(options))
    shared_secrets = SharedSecrets(options.shared_secret_file) if options.shared_secret_file else None
    _require_a_credential(options, tokens, shared_secrets)
    names = options.name or default_names(address)
    identity = GivenCertificate(options.certificate, options.key) if options.certificate else OwnAuthority(state, names)
    context = ServerContext(identity, options.client_ca)
    bundles = BundleFolder(options.bundle_dir)
    endpoint = Endpoint(bundles, PackageFolder(options.bundle_dir / "packages"), tokens, shared_secrets)
    with listen(address, port) as listener:
        url = f"https://{_in_url(names[0])}:{listener.getsockname()[1]}/v1/bundle"
        introduction = _introduction(url, identity, bundles)
        serve(endpoint.application(), context, listener, partial(print, introduction, flush=True))


def _require_a_credential(options: argparse.Namespace, tokens: TokenFile, shared_secrets: SharedSecrets | None) -> None:
    if shared_secrets:
        shared_secrets.digests()  # read now, so that a wrong file is told at the start
    usable = [token for token in tokens.tokens().values() if not token.revoked_at]
    if not (usable or shared_secrets or options.client_ca):
        raise ConfigurationError(
            "there is no credential that a machine could show",
            f"vmmesh-endpoint token create --credentials {tokens.path} (or --shared-secret-file, or --client-ca)",
        )


def _introduction(url: str, identity: OwnAuthority | GivenCertificate, bundles: BundleFolder) -> str:
    pins = identity.pins()
    lines = [f"bundle: {url}", *(f"pin:    {pin}" for pin in pins)]
    if isinstance(identity, OwnAuthority):
        lines.append(f"CA:     {identity.ca_file.absolute()}")
    quoted = ", ".join(f'"{pin}"' for pin in pins)
    lines += [
        "",
        "# /etc/vmmesh-agent/config.yaml",
        "endpoint:",
        f"  url: {url}",
        f"  ca_pins: [{quoted}]",
        "  credential:",
        "    join_token_file: /etc/vmmesh-agent/join-token",
    ]
    try:
        workload = bundles.current().workload
    except Refusal:
        pass  # logged; it may come later
    else:
        lines.append(f"workload_group: {{namespace: {workload.namespace}, name: {workload.name}}}")
    return "\n".join([*lines, ""])


def _pin(options: argparse.Namespace) -> None:
    identity = (
        GivenCertificate(options.certificate, options.certificate)
        if options.certificate
        else OwnAuthority(options.state_dir)
    )
    print("\n".join(identity.pins()))


def _token_create(options: argparse.Namespace) -> None:
    path = _credentials_file(options)
    if not options.credentials:
        private_directory(options.state_dir)
    text, token = TokenFile(path).create(
        options.expires, machines=options.machines, workload=options.workload or "", comment=options.comment
    )
    print(text)
    machines = "1 machine" if token.machines_allowed == 1 else f"{token.machines_allowed} machines"
    print(
        f"token {token.id} admits {machines} until {token.expires_at:%Y-%m-%d %H:%M:%S} UTC"
        f"{f' to {token.workload}' if token.workload else ''}; it is not shown again",
        file=sys.stderr,
    )


def _token_list(options: argparse.Namespace) -> None:
    tokens = TokenFile(_credentials_file(options)).tokens().values()
    rows = [("ID", "CREATED", "EXPIRES", "MACHINES", "STATE", "WORKLOAD", "COMMENT")]
    rows += [
        (
            token.id,
            f"{token.created_at:%Y-%m-%dT%H:%M:%SZ}",
            f"{token.expires_at:%Y-%m-%dT%H:%M:%SZ}",
            f"{len(token.machines)}/{token.machines_allowed}",
            _state(token),
            token.workload or "any",
            token.comment,
        )
        for token in sorted(tokens, key=lambda token: token.created_at)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _state(token: JoinToken) -> str:
    if token.revoked_at:
        return "revoked"
    if len(token.machines) >= token.machines_allowed:
        return "used-up"
    return "expired" if token.expires_at <= datetime.now(UTC) else "open"


def _token_revoke(options: argparse.Namespace) -> None:
    path = _credentials_file(options)
    try:
        if not path.exists():
            raise KeyError(options.id)
        token = TokenFile(path).revoke(options.id)
    except KeyError:
        raise UsageError(f"there is no token {options.id!r}", "vmmesh-endpoint token list") from None
    print(f"token {token.id} is revoked; machines that it admitted: {len(token.machines)}", file=sys.stderr)


def _credentials_file(options: argparse.Namespace) -> Path:
    chosen: Path | None = options.credentials
    state: Path = options.state_dir
    return chosen or state / "credentials.json"


# --- options ----------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"{self.prog} --help")


def parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vmmesh-endpoint", description="Hands the bootstrap bundle to machines that may have it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    state = _Parser(add_help=False)
    state.add_argument(
        "--state-dir", type=Path, default=STATE, metavar="DIR", help="keys and credentials (default: %(default)s)"
    )
    certificate = _Parser(add_help=False)
    certificate.add_argument(
        "--certificate", type=Path, metavar="FILE", help="the chain in PEM, instead of an authority of its own"
    )
    credentials = _Parser(add_help=False)
    credentials.add_argument(
        "--credentials", type=Path, metavar="FILE", help="the join tokens (default: credentials.json in --state-dir)"
    )

    serving = commands.add_parser(
        "serve", parents=[state, certificate, credentials], help="serve the bundle over HTTPS"
    )
    serving.set_defaults(command=_checked_serve)
    serving.add_argument("--listen", type=_listen, default=LISTEN, metavar="ADDRESS:PORT", help="default: %(default)s")
    serving.add_argument(
        "--bundle-dir", type=Path, required=True, metavar="DIR", help="the five files as istioctl writes them"
    )
    serving.add_argument("--key", type=Path, metavar="FILE", help="the key of --certificate")
    serving.add_argument(
        "--name", action="append", metavar="NAME", help="name or address in the certificate; may be repeated"
    )
    serving.add_argument(
        "--client-ca", type=Path, metavar="FILE", help="client certificates signed by it are a credential"
    )
    serving.add_argument(
        "--shared-secret-file", type=Path, metavar="FILE", help="secrets, one per line, that any machine may show"
    )

    pin = commands.add_parser("pin", parents=[state, certificate], help="print the pin that machines check")
    pin.set_defaults(command=_pin)

    token = commands.add_parser("token", help="join tokens").add_subparsers(required=True, metavar="COMMAND")
    create = token.add_parser("create", parents=[state, credentials], help="make a token and print it once")
    create.set_defaults(command=_token_create)
    create.add_argument(
        "--expires", type=_lifetime, default="24h", metavar="TIME", help="30m, 24h, 7d (default: %(default)s)"
    )
    create.add_argument(
        "--machines", type=_count, default=1, metavar="N", help="how many it admits (default: %(default)s)"
    )
    create.add_argument("--workload", type=_workload, metavar="NAMESPACE/NAME", help="only for this workload group")
    create.add_argument("--comment", type=_comment, default="", metavar="TEXT", help="shown by list")
    listing = token.add_parser("list", parents=[state, credentials], help="list the tokens, without secrets")
    listing.set_defaults(command=_token_list)
    revoke = token.add_parser(
        "revoke", parents=[state, credentials], help="refuse a token and the machines it admitted"
    )
    revoke.set_defaults(command=_token_revoke)
    revoke.add_argument("id", metavar="ID")
    return parser


def _checked_serve(options: argparse.Namespace) -> None:
    if bool(options.certificate) != bool(options.key):
        raise UsageError("--certificate and --key go together")
    _serve(options)


def _listen(text: str) -> tuple[str, int]:
    address, _, port = text.rpartition(":")
    address = address.removeprefix("[").removesuffix("]")
    try:
        ip_address(address)
        number = int(port)
    except ValueError:
        number = -1
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not ADDRESS:PORT, such as 0.0.0.0:15443 or [::]:15443")
    return address, number


def _lifetime(text: str) -> timedelta:
    match = re.fullmatch(r"([1-9][0-9]{0,4})([smhd])", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 30m, 24h or 7d")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _workload(text: str) -> str:
    if not _WORKLOAD.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAMESPACE/NAME")
    return text


def _comment(text: str) -> str:
    if len(text) > MAX_COMMENT or not text.isprintable():
        raise argparse.ArgumentTypeError(f"a comment is one line of at most {MAX_COMMENT} characters")
    return text


def _in_url(name: str) -> str:
    return f"[{name}]" if ":" in name else name


if __name__ == "__main__":
    sys.exit(main())
