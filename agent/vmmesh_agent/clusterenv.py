"""cluster.env as data.

The sidecar's start script sources this file as root, with every variable exported, and splices some of its
values into a `bash -c` line. So it is read here without a shell, judged, and written anew with every value in
single quotes; a name that would steer the shell, the loader or the start script is refused.

The line of division: cluster.env, which the cluster writes, carries what the mesh knows of this workload.
What changes how the sidecar is started belongs into sidecar.env, the machine's own file beside it.
"""

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from vmmesh_agent.text import shown

# Names are those of environment variables; what istioctl writes is upper case, proxyMetadata may be anything.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# One piece of a value, as a shell reads it, of the forms that cannot expand to anything else.
# (An assignment is not subject to pathname or brace expansion, so a bare `*` is only a star.)
_PIECE = re.compile(r"""'([^']*)'|"([^"$`\\]*)"|([A-Za-z0-9_@%+=:,./\[\]{}*?-]+)""")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

# Some of bash's own variables are integers: merely assigning them evaluates `a[$(command)]`.
_SHELL = """
    _ AUTO_RESUME CDPATH COLUMNS COPROC DIRSTACK EDITOR EMACS ENV EUID EXECIGNORE FCEDIT FIGNORE FUNCNEST FUNCNAME
    GLOBIGNORE GLOBSORT GROUPS HOME HOSTFILE HOSTNAME HOSTTYPE IFS IGNOREEOF INPUTRC INSIDE_EMACS LANG LANGUAGE
    LINENO LINES LOGNAME MACHTYPE MAIL MAILCHECK MAILPATH MAPFILE NS OLDPWD OPTARG OPTERR OPTIND OSTYPE PAGER PATH
    PIPESTATUS POSIXLY_CORRECT PPID PROMPT_COMMAND PROMPT_DIRTRIM PS0 PS1 PS2 PS3 PS4 PWD RANDOM REPLY SECONDS
    SHELL SHELLOPTS SHLVL SRANDOM SVC TERM TIMEFORMAT TMOUT TMPDIR TZ TZDIR UID USER VISUAL
""".split()
_LOADER = """
    GCONV_PATH GETCONF_DIR GLIBC_TUNABLES HOSTALIASES LOCALDOMAIN LOCPATH MALLOC_TRACE NIS_PATH NLSPATH
    RESOLV_HOST_CONF RES_OPTIONS
""".split()
_RUNTIME = """
    GODEBUG GOTRACEBACK GOCOVERDIR SSLKEYLOGFILE SSL_CERT_DIR SSL_CERT_FILE OPENSSL_CONF OPENSSL_MODULES
    ALL_PROXY FTP_PROXY HTTPS_PROXY HTTP_PROXY NO_PROXY NOTIFY_SOCKET LISTEN_FDS LISTEN_PID
    GRPC_DEFAULT_SSL_ROOTS_FILE_PATH
""".split()
_START_SCRIPT = """
    EXEC_USER INSTANCE_IP ISTIO_AGENT_FLAGS ISTIO_AGENT_FLAGS_ARRAY ISTIO_BIN_BASE ISTIO_CLUSTER_CONFIG
    ISTIO_CUSTOM_IP_TABLES ISTIO_LOG_DIR ISTIO_SIDECAR_CONFIG ENVOY_USER PROXY_CONFIG PROXY_GID PROXY_UID currentLimit
""".split()
_REFUSED = {name.casefold() for name in (*_SHELL, *_LOADER, *_RUNTIME, *_START_SCRIPT)}
_REFUSED_PREFIXES = tuple(
    "bash child_max comp_ compreply dyld_ epoch hist ld_ lc_ malloc_ perl python readline_ sudo_ xtables_".split()
)

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_DNS_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,251}[a-z0-9])?")
_PORTS = re.compile(r"[0-9]{1,5}(,[0-9]{1,5})*")
_EXCLUDED = "ISTIO_LOCAL_EXCLUDE_PORTS"


class ClusterEnvError(ValueError):
    """Why a line, a name or a value is not acceptable; the message names it."""


def parse(text: str) -> tuple[dict[str, str], list[str]]:
    """Return the variables, and every problem as a sentence. Nothing in the text is ever expanded."""
    variables: dict[str, str] = {}
    problems: list[str] = []
    for number, line in _logical_lines(text):
        try:
            name, value = _assignment(line)
            if name in variables:
                raise ClusterEnvError(f"{name} is set twice")
            _judge(name, value)
        except ClusterEnvError as error:
            problems.append(f"line {number}: {error}")
        else:
            variables[name] = value
    return variables, problems


def render(variables: Mapping[str, str]) -> str:
    """Write the variables as istioctl does: sorted, each value in single quotes, a newline at the end."""
    return "".join(f"{name}={_quote(value)}\n" for name, value in sorted(variables.items()))


def excluding_inbound(variables: Mapping[str, str], ports: Iterable[int]) -> dict[str, str]:
    """Return the variables with these ports among those whose incoming connections are not captured.

    1.12 and later take the SSH port from this variable alone: a cluster.env without it locks everybody out.
    """
    excluded = [port for port in variables.get(_EXCLUDED, "").split(",") if port]
    more = [str(port) for port in ports if str(port) not in excluded]
    return {**variables, _EXCLUDED: ",".join([*excluded, *more])}


def _quote(value: str) -> str:
    return "'" + value.replace("'", "'\"'\"'") + "'"


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        stripped = line.removesuffix("\r").strip(" \t")
        if stripped and not stripped.startswith("#"):
            yield number, stripped


def _assignment(line: str) -> tuple[str, str]:
    name, equals, rest = line.partition("=")
    if not equals or not _NAME.fullmatch(name):
        raise ClusterEnvError(f"expected KEY='value', found {shown(line)}")
    value = ""
    position = 0
    while position < len(rest):
        piece = _PIECE.match(rest, position)
        if not piece:
            raise ClusterEnvError(
                f"the value of {name} is not plain text in quotes: {shown(rest[position:])} would mean something"
                " to a shell, or its quote is never closed"
            )
        value += next(part for part in piece.groups() if part is not None)
        position = piece.end()
    if _CONTROL.search(value):
        raise ClusterEnvError(f"the value of {name} has a control character")
    return name, value


def _judge(name: str, value: str) -> None:
    folded = name.casefold()
    if folded in _REFUSED or folded.startswith(_REFUSED_PREFIXES):
        raise ClusterEnvError(
            f"{name} would change how the sidecar is started as root; the cluster may not set it"
            " (the machine's own sidecar.env may)"
        )
    rule = _VALUES.get(name)
    if rule:
        allowed, accepts = rule
        if not accepts(value):
            raise ClusterEnvError(f"{name} must be {allowed}, found {shown(value)}")


def _is_address(value: str) -> bool:
    """Is it an address, without a zone? A zone may be any text, a shell command included."""
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return False
    return "%" not in value


def _are_ports(value: str) -> bool:
    return bool(_PORTS.fullmatch(value)) and all(0 < int(port) < 65536 for port in value.split(","))


def _are_networks(value: str) -> bool:
    try:
        return "%" not in value and all(ipaddress.ip_network(part, strict=False) for part in value.split(","))
    except ValueError:
        return False


def _empty_or(accepts: Callable[[str], bool]) -> Callable[[str], bool]:
    return lambda value: not value or accepts(value)


def _star_or(accepts: Callable[[str], bool]) -> Callable[[str], bool]:
    return lambda value: value in {"", "*"} or accepts(value)


def _is_label(value: str) -> bool:
    return bool(_LABEL.fullmatch(value))


def _is_dns_name(value: str) -> bool:
    return bool(_DNS_NAME.fullmatch(value))


def _is_address_and_port(value: str) -> bool:
    host, colon, port = value.rpartition(":")
    return (
        bool(colon) and _are_ports(port) and "," not in port and (_is_dns_name(host) or _is_address(host.strip("[]")))
    )


def _is_truth(value: str) -> bool:
    return value in {"true", "false"}


# What the start script splices into a command line or hands to iptables: name → (what is allowed, the check).
_VALUES: dict[str, tuple[str, Callable[[str], bool]]] = {
    "CA_ADDR": ("a host and port", _empty_or(_is_address_and_port)),
    # TPROXY runs the whole sidecar as root.
    "ISTIO_INBOUND_INTERCEPTION_MODE": ("REDIRECT or NONE", lambda value: value in {"", "NONE", "REDIRECT"}),
    "ISTIO_INBOUND_PORTS": ("'*' or ports joined with commas", _star_or(_are_ports)),
    _EXCLUDED: ("ports joined with commas", _empty_or(_are_ports)),
    "ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE": ("ports joined with commas", _empty_or(_are_ports)),
    "ISTIO_META_DNS_CAPTURE": ("true or false", _empty_or(_is_truth)),
    "ISTIO_NAMESPACE": ("a namespace name", _is_label),
    "ISTIO_OUTBOUND_PORTS": ("'*' or ports joined with commas", _star_or(_are_ports)),
    "ISTIO_PILOT_PORT": ("a port", _empty_or(_are_ports)),
    "ISTIO_SERVICE": ("a service name", _empty_or(_is_dns_name)),
    "ISTIO_SERVICE_CIDR": ("'*' or networks joined with commas", _star_or(_are_networks)),
    "ISTIO_SERVICE_EXCLUDE_CIDR": ("networks joined with commas", _star_or(_are_networks)),
    "ISTIO_SVC_IP": ("an address", _empty_or(_is_address)),
    "ISTIO_SYSTEM_NAMESPACE": ("a namespace name", _empty_or(_is_label)),
    "OUTPUT_CERTS": ("/etc/certs", lambda value: value == "/etc/certs"),
    "POD_NAME": ("a host name", _empty_or(_is_dns_name)),
    "POD_NAMESPACE": ("a namespace name", _is_label),
    "PROV_CERT": ("/etc/certs", lambda value: value == "/etc/certs"),
    "SERVICE_ACCOUNT": ("a service account name", _is_dns_name),
    "TRUST_DOMAIN": ("a domain name", _empty_or(_is_dns_name)),
}
