"""What the machine itself shows of the sidecar, beside its logs: certificates, capture, ports, names, disk.

`gather` looks, each look bounded in time; `conditions` judges what was seen, and is pure. What could not be seen
(it is not there, or it takes root) is None and is named in `Signals.unseen`: absence of evidence is said, never
taken for health or for a failure.
"""

import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath

from vmmesh_agent import x509
from vmmesh_agent.errors import AgentError
from vmmesh_agent.health import Condition, Severity
from vmmesh_agent.host import Host
from vmmesh_agent.verify import token_fault

CERT_CHAIN = PurePosixPath("/etc/certs/cert-chain.pem")
KEY = PurePosixPath("/etc/certs/key.pem")
ROOT_CERT = PurePosixPath("/etc/certs/root-cert.pem")
TOKEN = PurePosixPath("/var/run/secrets/tokens/istio-token")
SIDECAR_ENV = PurePosixPath("/var/lib/istio/envoy/sidecar.env")
LOG_FOLDER = PurePosixPath("/var/log/istio")

_CUSTOM_RULES = re.compile(rb"""^\s*(?:export\s+)?ISTIO_CUSTOM_IP_TABLES=["']?true\b""", re.MULTILINE)
STATUS_PORT = 15020  # pilot-agent's: probes, and the metrics of both
_METRICS_LIMIT = 8 * 1024**2  # bytes; Envoy's part may have megabytes
_CERT_EXPIRY = re.compile(rb'^istio_agent_cert_expiry_seconds\{resource_name="default"\} ([0-9.e+]+)$', re.MULTILINE)
READY_PORT = 15021  # Envoy's own listener: answers as long as Envoy does, whatever it says
_LEGACY_TABLES = PurePosixPath("/proc/net/ip_tables_names")
_LEGACY_TABLES_6 = PurePosixPath("/proc/net/ip6_tables_names")
_CHAIN = "ISTIO_OUTPUT"  # the chain of the nat table that is there whenever traffic is captured
_SECONDS = 2.0  # for a look that asks the network
_LOCAL_SECONDS = 1.0  # for one that does not leave the machine

_LOW_SPACE = 32 * 1024**2  # bytes left in the log folder's file system
_LARGE_LOGS = 1024**3  # bytes that the logs may take up before a word is said
SKEW = timedelta(seconds=60)
_BACKDATED = timedelta(minutes=2)  # istiod lets certificates begin so long ago, for clocks that are behind
_OVERDUE = 0.25  # of a certificate's life: pilot-agent renews at about half


@dataclass(frozen=True, slots=True)
class OwnCertificate:
    """The sidecar's own certificate; `is_trusted` says whether the root certificate on disk signed it."""

    not_before: datetime
    not_after: datetime
    is_trusted: bool


@dataclass(frozen=True, slots=True)
class Signals:
    """One look at the machine. Times are aware and in UTC, sizes in bytes; None is what could not be seen."""

    certificate: OwnCertificate | None = None
    certificate_not_after: datetime | None = None  # from the certificate, or as pilot-agent tells any user
    token: bytes | None = None  # None: not seen; empty: not there
    is_captured: bool | None = None
    captures_by_itself: bool = True  # unless the machine's own sidecar.env says that iptables are somebody else's
    envoy_answers: bool | None = None
    agent_answers: bool | None = None
    istiod_addresses: tuple[str, ...] | None = None
    log_space: int | None = None
    log_size: int | None = None
    unseen: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Expected:
    """What should be: istiod's name and the addresses that the bundle's hosts give it, and the clock."""

    istiod: str = ""
    addresses: tuple[str, ...] = ()
    clock_offset: timedelta | None = None  # the endpoint's clock less ours


def gather(host: Host, istiod: str, now: datetime) -> Signals:
    """Look at everything once. `istiod` is the name to resolve, empty where none is known."""
    is_root = host.is_root
    certificate = _certificate(host) if is_root else None
    return Signals(
        certificate=certificate,
        certificate_not_after=certificate.not_after if certificate else None if is_root else _told_end(host, now),
        token=(_read(host, TOKEN) or b"") if is_root else None,
        is_captured=is_captured(host) if is_root else None,
        captures_by_itself=captures_by_itself(_read(host, SIDECAR_ENV) or b""),
        # Not /healthz/ready, which Envoy hands to pilot-agent, which logs each time that it is not ready.
        envoy_answers=host.answers(READY_PORT, "/", _LOCAL_SECONDS),
        agent_answers=host.answers(STATUS_PORT, "/", _LOCAL_SECONDS),
        istiod_addresses=_addresses(host, istiod) if istiod and host.is_running else None,
        log_space=_or_none(host, LOG_FOLDER),
        log_size=_size_of_logs(host),
        unseen=() if is_root else ("who signed the certificate", "the token", "traffic capture"),
    )


def conditions(signals: Signals, expected: Expected, *, is_running: bool, now: datetime) -> Iterator[Condition]:
    """Yield what is wrong with what was seen; `is_running` says whether istio.service should be at work."""
    if is_running:
        yield from _certificate_conditions(signals, now)
        if signals.is_captured is False and signals.captures_by_itself:
            yield _NOT_CAPTURED
        if signals.envoy_answers is False:
            yield _ENVOY_SILENT
        if signals.agent_answers is False:
            yield _AGENT_SILENT
        yield from _name_conditions(signals, expected)
    elif signals.is_captured:
        yield _LEFT_BEHIND
    if expected.clock_offset is not None and abs(expected.clock_offset) > SKEW:
        seconds = expected.clock_offset.total_seconds()
        yield Condition(
            "clock_skew",
            Severity.DEGRADED,
            f"The clock of this VM is {abs(seconds):.0f} s {'behind' if seconds > 0 else 'ahead of'} the endpoint's.",
            "Run `timedatectl`, and repair time synchronisation.",
        )
    if signals.log_space is not None and signals.log_space < _LOW_SPACE:
        yield Condition(
            "disk_full",
            Severity.DEGRADED,
            f"Only {signals.log_space // 1024**2} MiB are left where the sidecar writes its logs ({LOG_FOLDER}).",
            f"Make room: `df -h {LOG_FOLDER}`, `du -sh {LOG_FOLDER}/*`.",
        )
    if signals.log_size is not None and signals.log_size > _LARGE_LOGS:
        yield Condition(
            "logs_large",
            Severity.NOTE,
            f"The sidecar's logs take up {signals.log_size // 1024**2} MiB.",
            "Rotate them with copytruncate (the agent's package brings a rule for logrotate).",
        )


def sharpened(condition: Condition, signals: Signals, now: datetime) -> Condition:
    """Say more of a cause that the logs can only name: why istiod may have refused the token."""
    fault = token_fault(signals.token, now) if condition.code == "token_rejected" and signals.token else ""
    return replace(condition, message=f"istiod refuses the token: it {fault}.") if fault else condition


def _certificate_conditions(signals: Signals, now: datetime) -> Iterator[Condition]:
    certificate = signals.certificate
    if signals.token == b"":
        yield Condition(
            "token_missing",
            Severity.DEGRADED,
            f"The token is not in its place ({TOKEN}).",
            "Run `vmmesh-agent restore`; it also runs at each boot, as vmmesh-agent-restore.service.",
        )
    if signals.certificate_not_after and signals.certificate_not_after <= now:
        yield Condition(
            "cert_expired",
            Severity.FAILED,
            f"The sidecar's certificate expired at {_utc(signals.certificate_not_after)}; no peer accepts it any more.",
            "Run `vmmesh-agent bootstrap` for a new token, then `systemctl restart istio`.",
        )
        return
    if certificate is None:
        return
    if not certificate.is_trusted:
        yield Condition(
            "root_cert_mismatch",
            Severity.DEGRADED,
            f"The sidecar's certificate is not signed by the root in {ROOT_CERT}: one of the two is another mesh's.",
            "Run `vmmesh-agent bootstrap` for the mesh's root, then `systemctl restart istio`.",
        )
    life = certificate.not_after - certificate.not_before - _BACKDATED
    fault = token_fault(signals.token, now) if signals.token else ""
    if certificate.not_after - now < life * _OVERDUE:
        dead = f", and the token {fault}" if fault else ""
        yield Condition(
            "renewal_overdue",
            Severity.DEGRADED,
            f"The sidecar's certificate was not renewed{dead}: this VM drops out at {_utc(certificate.not_after)}.",
            "Run `vmmesh-agent bootstrap` for a new token, then `systemctl restart istio`; then see what still fails.",
        )
    elif fault:
        # pilot-agent renews with the certificate itself, half-way through its life: no harm is done yet.
        yield Condition(
            "renewal_at_risk",
            Severity.NOTE,
            f"The token {fault}, and the certificate expires in {_hours(certificate.not_after - now)}: if neither is"
            f" renewed, this VM drops out at {_utc(certificate.not_after)}.",
            "See why no newer token came: `vmmesh-agent doctor`, `vmmesh-agent bootstrap`.",
        )


def _name_conditions(signals: Signals, expected: Expected) -> Iterator[Condition]:
    found = signals.istiod_addresses
    if found is None or not expected.istiod:
        return
    if not found:
        yield Condition(
            "dns_unresolved",
            Severity.DEGRADED,
            f"This machine finds no address for {expected.istiod}.",
            "Run `vmmesh-agent bootstrap`: it writes the bundle's address into /etc/hosts. Where the bundle has none,"
            " repair this machine's DNS.",
        )
    elif expected.addresses and (foreign := [address for address in found if address not in expected.addresses]):
        yield Condition(
            "istiod_address_mismatch",
            Severity.DEGRADED,
            f"{expected.istiod} leads to {foreign[0]}; the bundle says {', '.join(expected.addresses)}.",
            f"Look for another line that names it, and remove it: `grep -n {expected.istiod} /etc/hosts`.",
        )


_NOT_CAPTURED = Condition(
    "iptables_failed",
    Severity.DEGRADED,
    "The sidecar runs, but no traffic is redirected to it: its iptables chains are gone.",
    "Run `systemctl restart istio`, which sets them; then find out what flushed them (firewalld, docker, a script).",
)
_LEFT_BEHIND = Condition(
    "capture_left_behind",
    Severity.DEGRADED,
    "The sidecar does not run, but traffic is still redirected to it: connections of this machine go nowhere.",
    "Run `/usr/local/bin/istio-start.sh clean`, or start the sidecar: `systemctl start istio`.",
)
_ENVOY_SILENT = Condition(
    "envoy_silent",
    Severity.FAILED,
    f"Envoy does not answer on its health port {READY_PORT}, although the sidecar runs.",
    "Run `systemctl restart istio`; if it stays so, read /var/log/istio/istio.err.log.",
)

_AGENT_SILENT = Condition(
    "agent_silent",
    Severity.DEGRADED,
    f"pilot-agent does not answer on its status port {STATUS_PORT}, although the sidecar runs.",
    "Run `systemctl restart istio`; if it stays so, read /var/log/istio/istio.log.",
)


# --- looking ---


def own_certificate(chain: bytes, key: bytes, roots: bytes) -> OwnCertificate:
    """Read the chain and let OpenSSL itself judge, in a handshake in memory, whether these roots signed it.

    Raise `CertificateError` where the chain is none.
    """
    leaf = x509.read_pem(chain.decode(errors="replace"))[0]
    return OwnCertificate(leaf.not_before, leaf.not_after, _is_signed(chain, key, roots))


def _is_signed(chain: bytes, key: bytes, roots: bytes) -> bool:
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname = False  # a workload's name is a URI, its SPIFFE ID
    presenting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        trusting.load_verify_locations(cadata=roots.decode())
        x509.load_chain(presenting, chain, key)
        x509.shake_hands(trusting, presenting)
    except ssl.SSLCertVerificationError as error:
        return error.verify_code in _ABOUT_TIME
    except (ssl.SSLError, ValueError):
        return False
    except OSError:  # nothing was found out: no descriptor is left, say
        return True
    return True


_ABOUT_TIME = {9, 10}  # OpenSSL: not yet valid, expired; that is judged by the dates, not here


def is_certificate_dead(host: Host, now: datetime) -> bool:
    """Has the sidecar a certificate, and did it expire?"""
    chain = _read(host, CERT_CHAIN)
    try:
        return chain is not None and x509.read_pem(chain.decode(errors="replace"))[0].not_after <= now
    except x509.CertificateError:
        return False


def _certificate(host: Host) -> OwnCertificate | None:
    chain, key, roots = (_read(host, path) for path in (CERT_CHAIN, KEY, ROOT_CERT))
    if chain is None:
        return None
    try:
        return own_certificate(chain, key or b"", roots or b"")
    except x509.CertificateError:
        return None


def captures_by_itself(sidecar_env: bytes) -> bool:
    """Does the start script set the iptables chains, as it does unless the machine's owner says otherwise?

    sidecar.env is read as text: what else is in it is a shell's business, and cluster.env may not have it.
    """
    return not _CUSTOM_RULES.search(sidecar_env)


def _told_end(host: Host, now: datetime) -> datetime | None:
    """Ask pilot-agent's metrics, which any user may read, when the certificate ends."""
    found = _CERT_EXPIRY.search(host.ask(STATUS_PORT, "/stats/prometheus", _SECONDS, _METRICS_LIMIT))
    try:
        return now + timedelta(seconds=float(found[1])) if found else None
    except (ValueError, OverflowError):
        return None


def _addresses(host: Host, name: str) -> tuple[str, ...]:
    """Resolve the name. A DNS that does not answer in time finds nothing, as far as the sidecar is concerned."""
    return host.addresses(name, _SECONDS) or ()


def is_captured(host: Host) -> bool | None:
    """Does a nat table lead outgoing traffic to the sidecar? An emptied chain leads nowhere.

    pilot-agent chooses between the two backends of iptables by itself, so the machine's default is not the last word.
    The legacy one is asked only where it has a nat table: merely asking would make one.
    """
    if not host.is_running:
        return None
    captured = _captures(host, "iptables")
    if captured or b"nat" not in (_read(host, _LEGACY_TABLES) or b"").split():
        return captured
    return _captures(host, "iptables-legacy")


def is_capture_left(host: Host) -> bool:
    """Does any nat table, of either family or backend, still lead connections to the sidecar, in or out?"""
    programs = ["iptables", "ip6tables"]
    programs += [
        f"{program}-legacy"
        for program, tables in zip(programs, (_LEGACY_TABLES, _LEGACY_TABLES_6), strict=True)
        if b"nat" in (_read(host, tables) or b"").split()
    ]
    return any(
        "-j ISTIO_" in (_rules(host, program, chain) or "")
        for program in programs
        for chain in ("PREROUTING", "OUTPUT")
    )


def _captures(host: Host, program: str) -> bool | None:
    jumps = _rules(host, program, "OUTPUT")
    redirects = _rules(host, program, _CHAIN) if jumps else jumps
    if jumps is None or redirects is None:
        return None
    return f"-j {_CHAIN}" in jumps and "-A " in redirects


def _rules(host: Host, program: str, chain: str) -> str | None:
    """Return a chain's rules as text, empty where there is no such chain, None where iptables does not say."""
    try:
        done = host.run([program, "--wait", "2", "--table", "nat", "--list-rules", chain], timeout=5, check=False)
    except AgentError:
        return None
    if done.status == 0:
        return done.stdout
    return "" if "No chain" in done.stderr or "does not exist" in done.stderr else None


def _read(host: Host, path: PurePosixPath) -> bytes | None:
    try:
        return host.read(path, 1024**2)
    except AgentError:
        return None


def _or_none(host: Host, folder: PurePosixPath) -> int | None:
    try:
        return host.free_bytes(folder)
    except AgentError:
        return None


def _size_of_logs(host: Host) -> int | None:
    try:
        found = [host.status(LOG_FOLDER / name) for name in host.names_in(LOG_FOLDER)]
    except AgentError:
        return None
    return sum(entry.size for entry in found if entry and entry.is_file)


def _hours(left: timedelta) -> str:
    minutes = int(left.total_seconds()) // 60
    return f"{minutes // 60} h" if minutes >= 120 else f"{minutes} min"


def _utc(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")
