"""May this bundle be trusted? Bytes and a moment in, a `VerifiedBundle` or every reason against it out.

Pure: no file, no clock, no network. What changes the machine accepts only what `verify` returned.
"""

import base64
import binascii
import ipaddress
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

from vmmesh_agent import bundle as bundles
from vmmesh_agent import clusterenv, hosts, strict, x509
from vmmesh_agent.bundle import Bundle, BundleRefusedError, Package, Problem, Sidecar, Workload
from vmmesh_agent.secret import Secret
from vmmesh_agent.text import shown

AUDIENCE = "istio-ca"
DEFAULT_DISCOVERY = "istiod.istio-system.svc:15012"  # the ProxyConfig's own default

# Two clocks that are synchronised well may still differ by this much.
CLOCK_TOLERANCE = timedelta(seconds=60)

_LIMITS = {  # bytes; a ConfigMap or a Secret as a whole holds 1 MiB at most
    bundles.ROOT_CERT: 1024**2,
    bundles.TOKEN: 64 * 1024,
    bundles.CLUSTER_ENV: 256 * 1024,
    bundles.MESH: 1024**2,
    bundles.HOSTS: 64 * 1024,
}
_JWT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_.-]+):([0-9]{1,5})")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CLOCK_HINT = "see that this machine's clock is right (timedatectl)"

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class VerifiedBundle:
    """A bundle that was judged sound. Made by `verify` alone.

    `root_cert`, `cluster_env` and `mesh` are the bytes to place, `variables` is cluster.env read; the times are
    aware and in UTC; `notes` are sentences about what was accepted but is worth knowing.
    """

    workload: Workload
    root_cert: bytes
    token: Secret
    token_issued_at: datetime | None
    token_expires_at: datetime
    cluster_env: bytes
    variables: Mapping[str, str] = field(repr=False)
    mesh: bytes
    discovery: str
    hosts: tuple[hosts.HostsLine, ...]
    sidecar: Sidecar | None
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class _Findings:
    """What the judging of one bundle brought to light so far."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def refuse(self, code: str, file: str, message: str, hint: str = "") -> None:
        self.problems.append(Problem(code, file, message, hint))


class _RefusedError(Exception):
    """One file cannot be read any further."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint


def verify(
    bundle: Bundle,
    moment: datetime,
    *,
    resolves: Callable[[str], bool],
    expected: Workload | None = None,
    host_name: str = "",
) -> VerifiedBundle:
    """Judge the bundle as of `moment` and return what may be placed.

    `resolves` says whether this machine finds an address for a name without the bundle's hosts;
    `expected` is the WorkloadGroup that the configuration names; `host_name` is this machine's own.
    Raise `BundleRefusedError` with all problems at once.
    """
    findings = _Findings()
    root_cert = _read(bundle, bundles.ROOT_CERT, lambda text: _root_cert(text, moment, findings), findings)
    token = _read(bundle, bundles.TOKEN, lambda text: _token(text, moment, findings), findings)
    variables = _read(bundle, bundles.CLUSTER_ENV, lambda text: _variables(text, findings), findings)
    discovery = _read(bundle, bundles.MESH, _discovery, findings)
    lines = _read(bundle, bundles.HOSTS, lambda text: _hosts(text, findings), findings)

    workload = None if variables is None else _workload(variables, bundle.workload, expected, findings)
    if token and variables and workload:
        _token_is_for(token, workload, variables, findings)
    if discovery and lines is not None:
        istiod_names = {_host_of(discovery), _host_of((variables or {}).get("CA_ADDR", ""))}
        _only_istiod_is_named(lines, istiod_names, host_name, findings)
        if not any(problem.file == bundles.HOSTS for problem in findings.problems):
            _istiod_is_found(_host_of(discovery), lines, resolves, findings)
    for package in bundle.sidecar.packages if bundle.sidecar else ():
        _package(package, findings)

    if not findings.problems and root_cert and token and variables and workload and discovery and lines is not None:
        return VerifiedBundle(
            workload=workload,
            root_cert=root_cert,
            token=token.text,
            token_issued_at=token.issued_at,
            token_expires_at=token.expires_at,
            cluster_env=clusterenv.render(variables).encode(),
            variables=variables,
            mesh=bundle.files[bundles.MESH],
            discovery=discovery,
            hosts=lines,
            sidecar=bundle.sidecar,
            notes=tuple(findings.notes),
        )
    raise BundleRefusedError(*findings.problems)


def _read(bundle: Bundle, name: str, parse: Callable[[str], _T], findings: _Findings) -> _T | None:
    """Return what `parse` makes of one file, None where the file is refused as a whole."""
    try:
        content = bundle.files.get(name)
        if content is None:
            raise _RefusedError("file-missing", "it is not in the bundle", f"a bundle has {', '.join(bundles.FILES)}")
        if len(content) > _LIMITS[name]:
            raise _RefusedError("file-too-large", f"it is larger than {_LIMITS[name] // 1024} KiB")
        if not content.strip() and name != bundles.HOSTS:
            raise _RefusedError("file-empty", "it is empty")
        try:
            return parse(content.decode())
        except UnicodeDecodeError:
            raise _RefusedError("file-not-text", "it is not UTF-8 text") from None
    except _RefusedError as refused:
        findings.refuse(refused.code, name, refused.message, refused.hint)
        return None


# --- root-cert.pem ---


def _root_cert(text: str, moment: datetime, findings: _Findings) -> bytes:
    try:
        certificates = x509.read_pem(text)
    except x509.CertificateError as error:
        raise _RefusedError("root-cert-invalid", str(error)) from None
    current = 0
    for number, certificate in enumerate(certificates, start=1):
        which = f"certificate {number} of {len(certificates)}"
        if not certificate.is_ca:
            findings.refuse(
                "root-cert-not-ca",
                bundles.ROOT_CERT,
                f"{which} is no CA certificate",
                "give the mesh's root certificate, not a workload's or a server's",
            )
        if certificate.not_after <= moment:
            findings.notes.append(f"root-cert.pem: {which} expired at {_utc(certificate.not_after)}")
        elif certificate.not_before > moment + CLOCK_TOLERANCE:
            findings.notes.append(f"root-cert.pem: {which} is valid only from {_utc(certificate.not_before)}")
        else:
            current += 1
    if not current:
        reason = findings.notes[-1].removeprefix("root-cert.pem: ")
        raise _RefusedError("root-cert-not-in-date", f"{reason}; it is now {_utc(moment)}", _CLOCK_HINT)
    return "".join(certificate.pem for certificate in certificates).encode()


# --- istio-token ---


@dataclass(frozen=True, slots=True)
class _Token:
    text: Secret
    issued_at: datetime | None
    expires_at: datetime
    namespace: str
    service_account: str


def _token(text: str, moment: datetime, findings: _Findings) -> _Token:
    token = text.strip()
    if not _JWT.fullmatch(token):
        raise _RefusedError("token-not-jwt", "it is not a JWT (three parts joined by dots)")
    header, claims = (_jwt_part(part) for part in token.split(".")[:2])
    if str(header.get("alg", "none")).lower() == "none":
        findings.refuse("token-not-signed", bundles.TOKEN, "it is not signed")

    audiences = _audiences(claims)
    if AUDIENCE not in audiences:
        findings.refuse(
            "token-wrong-audience",
            bundles.TOKEN,
            f"its audience is {shown(audiences)}, not {AUDIENCE!r}",
            f"request it for the audience {AUDIENCE}, as istioctl x workload entry configure does",
        )
    expires_at = _claimed_time(claims, "exp")
    if expires_at is None:
        raise _RefusedError("token-without-expiry", "it has no expiry (exp)")
    if expires_at <= moment:
        findings.refuse(
            "token-expired",
            bundles.TOKEN,
            f"it expired at {_utc(expires_at)}; it is now {_utc(moment)}",
            f"have the bundle made anew; where it is new, {_CLOCK_HINT}",
        )
    not_before = _claimed_time(claims, "nbf")
    if not_before and not_before > moment + CLOCK_TOLERANCE:
        findings.refuse(
            "token-not-yet-valid",
            bundles.TOKEN,
            f"it is valid only from {_utc(not_before)}; it is now {_utc(moment)}",
            _CLOCK_HINT,
        )
    namespace, service_account = _kubernetes_identity(claims)
    return _Token(Secret(token), _claimed_time(claims, "iat"), expires_at, namespace, service_account)


def _jwt_part(part: str) -> dict[str, Any]:
    try:
        content = strict.load_json(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    except (binascii.Error, strict.MalformedError):
        raise _RefusedError("token-not-jwt", "its parts are not base64 of JSON") from None
    if not isinstance(content, dict):
        raise _RefusedError("token-not-jwt", "its parts are not JSON objects")  # input, not a bug
    return content


def _audiences(claims: Mapping[str, Any]) -> list[object]:
    audiences = claims.get("aud", [])
    return audiences if isinstance(audiences, list) else [audiences]


def token_fault(content: bytes, moment: datetime) -> str:
    """Say what is wrong with a token that lies on the machine, in words that follow "the token"; empty if nothing."""
    try:
        claims = _jwt_part(content.decode("ascii", "replace").strip().split(".")[1])
        expires_at = _claimed_time(claims, "exp")
    except (_RefusedError, IndexError):
        return "is no JWT"
    if AUDIENCE not in _audiences(claims):
        return f"is for {shown(_audiences(claims))}, not for {AUDIENCE!r}"
    if expires_at is None or expires_at <= moment:
        return f"expired at {_utc(expires_at)}" if expires_at else "has no expiry"
    return ""


def _claimed_time(claims: Mapping[str, Any], name: str) -> datetime | None:
    seconds = claims.get(name)
    if seconds is None:
        return None
    try:
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            raise ValueError  # noqa: TRY004  # input, not a bug
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        raise _RefusedError("token-not-jwt", f"its {name} is not a time") from None


def _kubernetes_identity(claims: Mapping[str, Any]) -> tuple[str, str]:
    """Return namespace and service account, empty where the token does not come from Kubernetes."""
    bound = claims.get("kubernetes.io")
    if isinstance(bound, dict):
        account = bound.get("serviceaccount")
        return str(bound.get("namespace", "")), str(account.get("name", "")) if isinstance(account, dict) else ""
    subject = str(claims.get("sub", "")).split(":")
    if subject[:2] == ["system", "serviceaccount"] and len(subject) == 4:
        return subject[2], subject[3]
    return "", ""


def _token_is_for(token: _Token, workload: Workload, variables: Mapping[str, str], findings: _Findings) -> None:
    if token.namespace and token.namespace != workload.namespace:
        findings.refuse(
            "token-wrong-namespace",
            bundles.TOKEN,
            f"it is for namespace {shown(token.namespace)}, cluster.env for {workload.namespace!r}",
        )
    account = variables.get("SERVICE_ACCOUNT", "")
    if token.service_account and account and token.service_account != account:
        findings.refuse(
            "token-wrong-service-account",
            bundles.TOKEN,
            f"it is for service account {shown(token.service_account)}, cluster.env for {account!r}",
        )


# --- cluster.env ---


def _variables(text: str, findings: _Findings) -> dict[str, str]:
    variables, problems = clusterenv.parse(text)
    for problem in problems:
        findings.refuse("cluster-env-refused", bundles.CLUSTER_ENV, problem)
    return variables


def _workload(
    variables: Mapping[str, str], delivered: Workload | None, expected: Workload | None, findings: _Findings
) -> Workload | None:
    """Return the WorkloadGroup that cluster.env is for, which must be the one delivered and the one expected."""
    namespaces = {variables[key] for key in ("ISTIO_NAMESPACE", "POD_NAMESPACE") if key in variables}
    name = variables.get("ISTIO_META_WORKLOAD_NAME") or variables.get("ISTIO_SERVICE", "").partition(".")[0]
    if len(namespaces) != 1 or not name:
        findings.refuse(
            "cluster-env-incomplete",
            bundles.CLUSTER_ENV,
            f"ISTIO_NAMESPACE and POD_NAMESPACE contradict each other: {sorted(namespaces)}"
            if len(namespaces) > 1
            else "it does not say which workload it is for (POD_NAMESPACE, ISTIO_META_WORKLOAD_NAME)",
        )
        return None
    workload = Workload(namespaces.pop(), name)
    claims = (("the bundle says it is for", delivered), ("the configuration asks for", expected))
    if others := [f"{whose} {wanted}" for whose, wanted in claims if wanted and wanted != workload]:
        findings.refuse(
            "wrong-workload",
            bundles.CLUSTER_ENV,
            f"it is for {workload}, but {' and '.join(others)}",
            "see workload_group in the configuration, and what the endpoint serves",
        )
    return workload


# --- mesh.yaml and hosts ---


def _discovery(text: str) -> str:
    try:
        mesh = strict.load_yaml(text)
    except strict.MalformedError as error:
        raise _RefusedError("mesh-malformed", f"it is not plain YAML: {error}") from None
    config = mesh.get("defaultConfig") if isinstance(mesh, dict) else None
    if not isinstance(config, dict):
        raise _RefusedError("mesh-malformed", "it has no mapping 'defaultConfig'")
    discovery = config.get("discoveryAddress", DEFAULT_DISCOVERY)
    match = _ADDRESS.fullmatch(discovery) if isinstance(discovery, str) else None
    if not match or not 0 < int(match[2]) < 65536:
        raise _RefusedError("mesh-malformed", f"its discoveryAddress {shown(discovery)} is not host:port")
    return str(discovery)


def _hosts(text: str, findings: _Findings) -> tuple[hosts.HostsLine, ...]:
    lines, problems = hosts.parse(text)
    for problem in problems:
        findings.refuse("hosts-malformed", bundles.HOSTS, problem)
    return lines


def _only_istiod_is_named(
    lines: tuple[hosts.HostsLine, ...], istiod_names: Collection[str], host_name: str, findings: _Findings
) -> None:
    for name in dict.fromkeys(name for line in lines for name in line.names):
        if not _may_be_named(name, istiod_names, host_name):
            findings.refuse(
                "hosts-foreign-name",
                bundles.HOSTS,
                f"it names {name!r}; it may name istiod alone (istiod[-<revision>].<namespace>.svc)",
                "a bundle that redirects other names is not istioctl's; find out who made it",
            )


def _istiod_is_found(
    istiod: str, lines: tuple[hosts.HostsLine, ...], resolves: Callable[[str], bool], findings: _Findings
) -> None:
    """An empty hosts file is istioctl's where the gateway has only a DNS name: then that must lead somewhere."""
    if _is_address(istiod) or any(istiod in line.names for line in lines):
        return
    if resolves(istiod):
        findings.notes.append(f"hosts does not name {istiod}; this machine resolves it by other means")
    else:
        findings.refuse(
            "istiod-not-found",
            bundles.HOSTS,
            f"it does not name {istiod!r}, where mesh.yaml says istiod is, and this machine cannot resolve that",
            "give istioctl the gateway's address with --ingressIP, or make the name known to this machine's DNS",
        )


def _may_be_named(name: str, allowed: Collection[str], host_name: str) -> bool:
    own = {
        "localhost",
        "ip6-localhost",
        "ip6-loopback",
        host_name.lower(),
        host_name.lower().partition(".")[0],
    }
    if name in own or name.endswith((".localhost", ".localdomain")):
        return False
    # istiod's name in the cluster; or another where mesh.yaml says it is, as long as it is called so.
    return bool(hosts.ISTIOD_NAME.fullmatch(name)) or (name in allowed and name.startswith(("istiod.", "istiod-")))


def _host_of(address: str) -> str:
    return address.rpartition(":")[0].strip("[]").rstrip(".").lower()


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


# --- packages ---


def _package(package: Package, findings: _Findings) -> None:
    if not _SHA256.fullmatch(package.sha256):
        findings.refuse("package-without-digest", "", f"the package {shown(package.url)} has no SHA-256 digest")
    if not _is_https(package.url):
        findings.refuse("package-not-https", "", f"the package's address {shown(package.url)} is not https://…")


def _is_https(address: str) -> bool:
    try:
        url = urlsplit(address)
        return url.scheme == "https" and bool(url.hostname) and url.port != 0
    except ValueError:  # a host or a port that is none
        return False


def _utc(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
