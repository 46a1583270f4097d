"""Active checks of the machine, its endpoint and its sidecar, before joining and after.

`examine` goes through CHECKS, one row each. A check looks and never changes anything, takes a few seconds at most,
and knows nothing of the others: one that cannot be made is a row that says why. What takes root is said to take root.
"""

import base64
import binascii
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from vmmesh_agent import clusterenv, hosts, place, report, signals, store, strict, x509
from vmmesh_agent.config import Config
from vmmesh_agent.errors import AgentError, ConfigurationError, NotPermittedError
from vmmesh_agent.fetch import SIDECAR_USER, probe, probe_endpoint
from vmmesh_agent.health import Health, Severity, State
from vmmesh_agent.host import Host
from vmmesh_agent.packages import managers
from vmmesh_agent.report import Known
from vmmesh_agent.text import shown
from vmmesh_agent.units import ISTIO, Units, UnitState
from vmmesh_agent.verify import AUDIENCE, CLOCK_TOLERANCE, DEFAULT_DISCOVERY
from vmmesh_agent.watch import Watch

SCHEMA = "vmmesh.doctor/v1"

_SECONDS = 6.0  # for each look
_DROP_IN = "istio.service.d/10-vmmesh-agent.conf"  # lets the files be put back before each start
_ENVOY = PurePosixPath("/usr/local/bin/envoy")
_RESOLV_CONF = "/etc/resolv.conf"
_MIB = 1024**2


class Result(StrEnum):
    """How a check ended. `unknown` could not be made, `not-applicable` has nothing to say on this machine."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    UNKNOWN = "unknown"
    NOT_APPLICABLE = "not-applicable"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found: `note` is what was seen or why nothing was, `fix` what to do about it."""

    result: Result
    note: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the answer; `check` is stable and kebab-case."""

    check: str
    result: Result
    note: str
    fix: str

    def as_dict(self) -> dict[str, str]:
        return {"check": self.check, "result": str(self.result), "note": self.note, "fix": self.fix}


def _ok(note: str) -> Finding:
    return Finding(Result.OK, note)


def _warning(note: str, fix: str) -> Finding:
    return Finding(Result.WARNING, note, fix)


def _failed(note: str, fix: str) -> Finding:
    return Finding(Result.FAILED, note, fix)


def _unknown(note: str) -> Finding:
    return Finding(Result.UNKNOWN, note)


def _not_applicable(note: str) -> Finding:
    return Finding(Result.NOT_APPLICABLE, note)


class Patient:
    """The machine under examination; what several checks look at is looked at once.

    `config` is None where `trouble` says why there is none.
    """

    def __init__(self, host: Host, config: Config | None, trouble: AgentError | None, now: datetime) -> None:
        self.host = host
        self.config = config
        self.trouble = trouble
        self.now = now
        self.units = Units(host)
        self._rules: dict[str, tuple[str, ...]] = {}
        self._addresses: dict[str, tuple[str, ...]] = {}

    @cached_property
    def is_joined(self) -> bool:
        """Is there a sidecar, and has somebody told it which mesh it belongs to?"""
        return self.units.exists(ISTIO) and self.host.status(place.CLUSTER_ENV) is not None

    @cached_property
    def unit(self) -> UnitState:
        return self.units.state(ISTIO)

    @cached_property
    def is_running(self) -> bool:
        return self.is_joined and self.unit.is_running

    @cached_property
    def known(self) -> Known:
        """What joining told, as the status record has it."""
        record = report.load(self.host)
        return record.known if record else Known()

    @cached_property
    def health(self) -> Health:
        """What logs, unit and machine say together, as in `status`."""
        record = report.load(self.host)
        last = (record.unit.invocation, record.health) if record else None
        watch = Watch(self.host, self.units, known=last, follows=False)
        try:
            return watch.observe(self.now, self.known).health
        finally:
            watch.close()

    @cached_property
    def variables(self) -> dict[str, str]:
        """The environment of the start script: sidecar.env, which the machine owns, then cluster.env."""
        texts = (self.host.read(path) or b"" for path in (signals.SIDECAR_ENV, place.CLUSTER_ENV))
        return {name: value for text in texts for name, value in clusterenv.parse(text.decode())[0].items()}

    @property
    def captures_by_itself(self) -> bool:
        """Does the start script set the iptables chains, as it does unless the machine's owner says otherwise?"""
        return signals.captures_by_itself(self.host.read(signals.SIDECAR_ENV) or b"")

    @property
    def captures_dns(self) -> bool:
        return self.variables.get("ISTIO_META_DNS_CAPTURE") == "true"

    @cached_property
    def discovery(self) -> tuple[str, int]:
        """The name and port at which the sidecar looks for istiod."""
        mesh = strict.load_yaml((self.host.read(place.MESH) or b"").decode())
        settings = mesh.get("defaultConfig") if isinstance(mesh, dict) else None
        address = settings.get("discoveryAddress", DEFAULT_DISCOVERY) if isinstance(settings, dict) else ""
        name, _, port = str(address or DEFAULT_DISCOVERY).rpartition(":")
        return name.strip("[]"), int(port)

    @cached_property
    def endpoint_trouble(self) -> AgentError | None:
        """Why the endpoint cannot be spoken to, None where it can."""
        config = self.config
        assert config is not None  # noqa: S101  # a check of the network asks only where there is one
        return _trouble(lambda: probe_endpoint(self.host, config, _SECONDS))

    @cached_property
    def istiod_trouble(self) -> AgentError | None:
        """Why istiod cannot be spoken to with the root certificate on disk, None where it can."""
        name, port = self.discovery
        address = f"https://{f'[{name}]' if ':' in name else name}:{port}/"
        roots = (self.host.read(place.ROOT_CERT) or b"").decode(errors="replace")
        return _trouble(lambda: probe(self.host, address, patience=_SECONDS, ca=roots, direct=True))

    def addresses(self, name: str) -> tuple[str, ...]:
        """Return what a name leads to, none where the resolver finds nothing in time."""
        if name not in self._addresses:
            self._addresses[name] = self.host.addresses(name, _SECONDS) or ()
        return self._addresses[name]

    def rules(self, program: str) -> tuple[str, ...]:
        """Return the rules of the nat table as `iptables -S` writes them. Raise `HostError` where it cannot say."""
        if program not in self._rules:
            listed = self.said(program, "--wait", "2", "--table", "nat", "--list-rules")
            self._rules[program] = tuple(listed.splitlines())
        return self._rules[program]

    def said(self, *argv: str) -> str:
        """Run a command that changes nothing and return what it printed. Raise `HostError` where it failed."""
        return self.host.run(argv, timeout=_SECONDS).stdout

    def has_program(self, name: str) -> bool:
        """Is the program where root finds it, whoever asks? The path is systemd's own for services."""
        return any(self.host.status(PurePosixPath(folder) / name) for folder in _PATH)


_PATH = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")


def _trouble(attempt: Callable[[], None]) -> AgentError | None:
    try:
        attempt()
    except AgentError as error:
        return error
    return None


# --- the configuration ---


def _configuration(patient: Patient) -> Finding:
    if isinstance(patient.trouble, NotPermittedError):
        return _unknown(f"{patient.trouble.message}: it takes root")
    if patient.trouble:
        return _failed(patient.trouble.message, patient.trouble.hint or "See docs/configuration.md.")
    assert patient.config is not None  # noqa: S101  # there is one or trouble
    return _ok(patient.config.endpoint.url.partition("?")[0])


# --- the machine ---


def _architecture(patient: Patient) -> Finding:
    machine = patient.said("uname", "-m").strip()
    if machine in {"x86_64", "aarch64"}:
        return _ok(machine)
    return _failed(f"there is no sidecar for {machine}", "Istio publishes it for x86_64 and aarch64 alone.")


def _c_library(patient: Patient) -> Finding:
    """Is the C library as new as the installed Envoy wants it? No package declares that."""
    said = patient.said("getconf", "GNU_LIBC_VERSION").split()
    ours = _version(said[-1]) if len(said) == 2 else (0, 0)
    if patient.host.status(_ENVOY) is None:
        return _ok(f"glibc {_dotted(ours)}; what the sidecar wants is seen when it is installed")
    wanted = max((_version(name) for name in _symbol_versions(patient.host)), default=(0, 0))
    if wanted > ours:
        return _failed(
            f"Envoy wants glibc {_dotted(wanted)}, this machine has {_dotted(ours)}",
            "Install a sidecar built for older systems (sidecar.package), or bring this machine to a newer release.",
        )
    return _ok(f"glibc {_dotted(ours)}; Envoy wants {_dotted(wanted)}")


_SYMBOL_VERSION = re.compile(rb"\0GLIBC_(2\.\d+(?:\.\d+)?)(?=\0)")


def _symbol_versions(host: Host) -> set[str]:
    found: set[str] = set()
    end = b""
    for chunk in host.chunks(_ENVOY):
        found.update(version.decode() for version in _SYMBOL_VERSION.findall(end + chunk))
        end = chunk[-32:]
    return found


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


_LOCKS = {  # what rpm, dpkg and apt-get hold while they work (fcntl(2) locks)
    "rpm": (PurePosixPath("/var/lib/rpm/.rpm.lock"), PurePosixPath("/usr/lib/sysimage/rpm/.rpm.lock")),
    "deb": (PurePosixPath("/var/lib/dpkg/lock-frontend"), PurePosixPath("/var/lib/dpkg/lock")),
}


def _package_manager(patient: Patient) -> Finding:
    found = managers(patient.host)
    if not found:
        return _failed("there is neither rpm nor dpkg", "Install one: the sidecar comes as a package.")
    for path in _LOCKS[found[0].format]:
        if process := _holder(patient.host, path):
            return _warning(
                f"process {process} holds {path}",
                f"An installation waits for it up to ten minutes. See what it is: ps -fp {process}",
            )
    return _ok(f"{found[0].format} for {found[0].architecture()}")


def _holder(host: Host, path: PurePosixPath) -> str:
    """Return the process that has a lock on the file, empty where nobody has (proc(5), /proc/locks)."""
    found = host.status(path)
    locks = (host.read(PurePosixPath("/proc/locks")) or b"").decode()
    # 1: POSIX  ADVISORY  WRITE 1234 fd:01:5678 0 EOF; a waiting one has "->" after the number
    held = re.findall(r"^\d+: \w+ +\w+ +\w+ (\d+) [0-9a-f]+:[0-9a-f]+:(\d+) ", locks, re.MULTILINE)
    return next((process for process, inode in held if found and int(inode) == found.inode), "")


_PROGRAMS = {  # what the start script runs → the package that has it, on both families
    "bash": "bash",
    "hostname": "hostname",
    "ip": "iproute2 (Debian) or iproute",
    "iptables": "iptables",
    "ip6tables": "iptables",
    "sudo": "sudo",
}


def _programs(patient: Patient) -> Finding:
    missing = [name for name in _PROGRAMS if not patient.has_program(name)]
    if missing:
        return _failed(
            f"missing: {', '.join(missing)}",
            f"Install {', '.join(dict.fromkeys(_PROGRAMS[name] for name in missing))}.",
        )
    return _ok(", ".join(_PROGRAMS))


def _sudo(patient: Patient) -> Finding:
    """The start script becomes istio-proxy in just this way."""
    if patient.host.account(SIDECAR_USER) is None:
        return _not_applicable(f"there is no user {SIDECAR_USER} yet; the sidecar's package makes it")
    argv = ["sudo", "-n", "-E", "-u", SIDECAR_USER, "-s", "/bin/bash", "-c", "true"]
    done = patient.host.run(argv, timeout=_SECONDS, check=False)
    if done.status == 0:
        return _ok(f"root may become {SIDECAR_USER}")
    return _failed(
        f"root cannot become {SIDECAR_USER}: {done.last_words or f'status {done.status}'}",
        "Allow it in /etc/sudoers (`root ALL=(ALL:ALL) ALL`), and see PAM and requiretty.",
    )


_PORTS = {
    15000: "Envoy's admin",
    15001: "outbound traffic",
    15006: "inbound traffic",
    15020: "agent status",
    15021: "health",
    15053: "DNS",
    15090: "Envoy's metrics",
}
_LISTENING = {"tcp": "0A", "tcp6": "0A", "udp": "07", "udp6": "07"}  # of the kernel's states; UDP has but one


def _ports(patient: Patient) -> Finding:
    account = patient.host.account(SIDECAR_USER)
    taken = []
    for port, uid in sorted(set(_listeners(patient.host))):
        is_sidecar = account is not None and uid == account.uid
        if port in _PORTS and not (is_sidecar and patient.is_running):
            taken.append(port)
    if taken:
        what = ", ".join(f"{port} ({_PORTS[port]}){_user_of(patient, port)}" for port in dict.fromkeys(taken))
        return _failed(f"taken: {what}", "Give the program another port, or stop it. See who it is: ss -ltnup")
    held = "held by the sidecar" if patient.is_running else "free"
    return _ok(f"{', '.join(map(str, _PORTS))}: {held}")


def _listeners(host: Host) -> Iterator[tuple[int, int]]:
    """Yield the port and the user's number of each listening socket; DNS alone uses UDP (proc(5), /proc/net/tcp)."""
    for table, listening in _LISTENING.items():
        lines = (host.read(PurePosixPath("/proc/net") / table) or b"").decode().splitlines()[1:]
        for fields in (line.split() for line in lines):
            port = int(fields[1].rpartition(":")[2], 16)
            if fields[3] == listening and (table.startswith("tcp") or port == 15053):
                yield port, int(fields[7])


def _user_of(patient: Patient, port: int) -> str:
    """Name the program that has a port, as far as we may know."""
    if not patient.has_program("ss"):
        return ""
    said = patient.host.run(["ss", "-Hltnup", f"sport = :{port}"], timeout=_SECONDS, check=False).stdout
    found = re.search(r'users:\(\("([^"]*)",pid=(\d+)', said)
    return f" by {found[1]}, process {found[2]}" if found else ""


def _iptables(patient: Patient) -> Finding:
    """Which of the two backends is in use, is the other one too, and does Docker come before the sidecar?"""
    said = patient.said("iptables", "-V").strip()
    other = "legacy" if "nf_tables" in said else "nft"
    if other == "legacy":
        is_mixed = b"nat" in (patient.host.read(PurePosixPath("/proc/net/ip_tables_names")) or b"").split()
    else:
        saved = patient.has_program("iptables-nft-save") and patient.said("iptables-nft-save", "--table", "nat")
        is_mixed = "\n-A " in (saved or "")
    if is_mixed:
        return _warning(
            f"{said}, and the {other} backend has a nat table too: both work on the same traffic",
            f"Empty the other one (iptables-{other} -t nat -S shows it), or use one backend for all"
            " (update-alternatives --config iptables).",
        )
    jumps = [rule for rule in patient.rules("iptables") if rule.startswith("-A PREROUTING ")]
    docker, istio = (
        next((number for number, rule in enumerate(jumps) if f"-j {chain}" in rule), -1)
        for chain in ("DOCKER", "ISTIO_INBOUND")
    )
    if 0 <= docker < istio:
        return _warning(
            f"{said}; Docker's rules come before the sidecar's: connections to published ports are not captured",
            "Start Docker first and then restart the sidecar: systemctl restart istio; or publish no ports here.",
        )
    return _ok(said)


def _clock(patient: Patient) -> Finding:
    offset = patient.known.clock_offset
    if offset is not None and abs(offset) > CLOCK_TOLERANCE.total_seconds():
        direction = "behind" if offset > 0 else "ahead of"
        return _failed(
            f"{abs(offset):.0f} s {direction} the endpoint's clock, when it was last asked",
            "Set the clock and repair time synchronisation: timedatectl, chronyc tracking.",
        )
    argv = ["timedatectl", "show", "--property=NTPSynchronized", "--value"]
    is_synchronised = patient.host.run(argv, timeout=_SECONDS, check=False).stdout.strip()  # empty without systemd
    measured = "" if offset is None else f"{abs(offset):.0f} s from the endpoint's"
    if is_synchronised == "yes":
        return _ok(f"synchronised{', ' * bool(measured)}{measured}")
    if measured:
        return _ok(measured)
    if not is_synchronised:
        return _unknown("timedatectl does not say, and it was not compared with the endpoint's yet")
    return _warning(
        "not synchronised, and not compared with the endpoint's yet: certificates and tokens have dates",
        "Enable time synchronisation: timedatectl set-ntp true, or chronyd.",
    )


# An unpacked sidecar is some 200 MiB, and a downloaded package stands beside it for a while.
_NEEDED_TO_INSTALL = 384 * _MIB
_NEEDED_TO_RUN = {signals.LOG_FOLDER: 32 * _MIB, store.FOLDER: 8 * _MIB}


def _disk(patient: Patient) -> Finding:
    needs = dict(_NEEDED_TO_RUN)
    if not patient.is_joined:
        needs[_ENVOY.parent] = _NEEDED_TO_INSTALL
    free = {folder: patient.host.free_bytes(folder) for folder in needs}
    short = [folder for folder, needed in needs.items() if free[folder] < needed]
    if short:
        folder = short[0]
        return _failed(
            f"{folder} has {free[folder] // _MIB} MiB left, {needs[folder] // _MIB} are wanted",
            f"Make room: df -h {' '.join(map(str, short))}",
        )
    return _ok(", ".join(f"{folder} {amount // _MIB} MiB" for folder, amount in free.items()))


def _selinux(patient: Patient) -> Finding:
    mode = patient.host.read(PurePosixPath("/sys/fs/selinux/enforce"))
    if mode is None:
        return _not_applicable("SELinux is off")
    if mode.strip() == b"0":
        return _ok("permissive")
    if not patient.host.is_root:
        return _ok("enforcing; what it denied takes root to see")
    denied = patient.host.run(
        ["journalctl", "--quiet", "--no-pager", "--boot", "--lines=1", "--output=cat", f"--grep={_DENIED}"],
        timeout=_SECONDS,
        check=False,
    ).stdout
    if denied.strip():
        return _warning(
            f"enforcing, and it denied: {denied.strip()}",
            "Restore the labels: restorecon -Rv /etc/certs /var/lib/istio /var/log/istio; else allow it: audit2allow.",
        )
    return _ok("enforcing; it denied the sidecar nothing since the machine started")


_DENIED = r"avc:\s+denied .*(envoy|pilot-agent|istio|vmmesh)"


# --- names and addresses ---


def _dns_servers(patient: Patient) -> Finding:
    """Capture is for the servers that resolv.conf named when the sidecar started: are they the same today?"""
    # Read as any program reads it, through the link that it often is.
    said = patient.host.run(["cat", _RESOLV_CONF], timeout=_SECONDS, check=False).stdout
    servers = re.findall(r"^\s*nameserver\s+(\S+)", said, re.MULTILINE)
    if not servers:
        return _warning(
            f"{_RESOLV_CONF} names no server; names outside the mesh have nobody to be asked of",
            f"Put a nameserver line into {_RESOLV_CONF}, then: systemctl restart istio",
        )
    note = ", ".join(f"{server} (systemd-resolved)" if server == "127.0.0.53" else server for server in servers)
    is_captured = patient.is_running and patient.captures_dns and patient.captures_by_itself and patient.host.is_root
    if not is_captured:
        return _ok(note)
    captured = {
        found[1]
        for program in ("iptables", "ip6tables")
        for rule in patient.rules(program)
        if "--to-ports 15053" in rule and (found := re.search(r"-d (\S+?)/\d+ ", rule))
    }
    if lost := [server for server in servers if ":" not in server and server not in captured]:
        return _failed(
            f"{_RESOLV_CONF} changed since the sidecar started: what is asked of {', '.join(lost)} goes past it",
            "Let the sidecar read it anew: systemctl restart istio",
        )
    return _ok(f"{note}: captured")


def _cloud_init(patient: Patient) -> Finding:
    folder = PurePosixPath("/etc/cloud/cloud.cfg.d")
    drop_ins = [folder / name for name in patient.host.names_in(folder) if name.endswith(".cfg")]
    where = None
    for path in (PurePosixPath("/etc/cloud/cloud.cfg"), *drop_ins):
        text = (patient.host.read(path) or b"").decode(errors="replace")
        for value in re.findall(r"""^\s*manage_etc_hosts:\s*["']?(\w+)""", text, re.MULTILINE):
            where = path if value.lower() in {"true", "template"} else None  # the last one counts
    if where is None:
        return _ok("nothing rewrites /etc/hosts")
    fix = f"Set manage_etc_hosts: false in {where}."
    if patient.units.exists(_DROP_IN):
        return _warning(f"{where} lets it rewrite /etc/hosts at each boot; the agent puts its block back", fix)
    return _failed(
        f"{where} lets it rewrite /etc/hosts at each boot, and istiod's name with it",
        f"{fix} Or let the agent put it back: install {_DROP_IN}, which its package brings.",
    )


_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def _host_name(patient: Patient) -> Finding:
    """The sidecar's name in the mesh is `<hostname -s>.<namespace>`, worked out at each start."""
    name = patient.variables.get("POD_NAME") or patient.host.name.partition(".")[0]
    kept = (patient.host.read(PurePosixPath("/etc/hostname")) or b"").decode(errors="replace").strip()
    fix = "Give the machine a name of its own: hostnamectl set-hostname NAME"
    if name == "localhost":
        return _failed("it is called localhost, as others may be: sidecars of one name displace each other", fix)
    if not _LABEL.fullmatch(name.lower()):
        return _failed(f"{shown(name)} is no name for a workload (letters, digits and -)", fix)
    if kept and kept.partition(".")[0] != patient.host.name.partition(".")[0]:
        return _warning(
            f"{name} now, but /etc/hostname says {kept}: the name changes at the next boot",
            f"{fix}, then: systemctl restart istio",
        )
    return _ok(name)


def _address(patient: Patient) -> Finding:
    """The sidecar announces the first address of `hostname --all-ip-addresses` unless ISTIO_SVC_IP names one."""
    links = _links(patient)
    listed = patient.said("hostname", "--all-ip-addresses").split()
    named = patient.variables.get("ISTIO_SVC_IP", "")
    announced = named or (listed[0] if listed else "")
    route = _source_towards_mesh(patient)
    fix = f"Name the right one in {signals.SIDECAR_ENV}: ISTIO_SVC_IP={route or 'ADDRESS'}; then restart istio."
    if not announced:
        return _failed("this machine has no address", "Give it one: ip address")
    if announced.lower().startswith("fe80:") or announced.startswith("169.254."):
        return _failed(f"it would announce {announced}, which is this link's alone", fix)
    if links.get(announced, "").startswith(_BRIDGES):
        return _failed(f"it would announce {announced}, the address of {links[announced]} within this machine", fix)
    if named and links and named not in links:
        return _warning(f"ISTIO_SVC_IP is {named}, which is none of this machine's own addresses", fix)
    if route and route != announced:
        return _warning(f"it announces {announced}, but speaks to the mesh from {route}", fix)
    return _ok(f"{announced}{', from where it speaks to the mesh' if route else ''}")


_BRIDGES = ("docker", "br-", "virbr", "cni", "podman", "lo")


def _links(patient: Patient) -> dict[str, str]:
    """Return each address of this machine with the link that has it."""
    listed = patient.said("ip", "-oneline", "address")
    found = re.findall(r"^\d+: (\S+) +inet6? ([^/ ]+)", listed, re.MULTILINE)
    return {address: link for link, address in found}


def _source_towards_mesh(patient: Patient) -> str:
    """Return the address from which this machine speaks to istiod, or to the endpoint; empty where not known."""
    name = patient.discovery[0] if patient.is_joined else _endpoint_host(patient)
    addresses = patient.addresses(name) if name else ()
    if not addresses:
        return ""
    said = patient.host.run(["ip", "-oneline", "route", "get", addresses[0]], timeout=_SECONDS, check=False).stdout
    found = re.search(r" src (\S+)", said)
    return found[1] if found else ""


def _hosts_file(patient: Patient) -> Finding:
    """Does a line that is not the agent's name istiod? The first line wins."""
    content = patient.host.read(place.ETC_HOSTS) or b""
    istiod = patient.discovery[0] if patient.is_joined else ""
    ours = {line.address for line in hosts.parse(_block_of(content))[0]} | set(patient.known.istiod_addresses)
    for line in hosts.with_block(content, ()).decode(errors="replace").splitlines():
        address, *names = line.partition("#")[0].split() or [""]
        if not any(name.lower() == istiod or hosts.ISTIOD_NAME.fullmatch(name.lower()) for name in names):
            continue
        fix = f"Remove the line: grep -n {istiod or 'istiod'} {place.ETC_HOSTS}"
        if patient.is_joined and address not in ours and line.encode() in content.partition(hosts.BEGIN)[0]:
            return _failed(f"`{line.strip()}` comes before the agent's line: the first one wins", fix)
        return _warning(f"`{line.strip()}` is not the agent's; a join by hand may have left it", fix)
    return _ok("istiod is named by the agent alone" if ours else "nobody names istiod")


def _block_of(content: bytes) -> str:
    return content.partition(hosts.BEGIN)[2].partition(hosts.END)[0].decode(errors="replace")


_SSH_PORT = re.compile(r"^\s*Port[\s=]+(\d+)", re.MULTILINE | re.IGNORECASE)


def _ssh(patient: Patient) -> Finding:
    """A captured SSH port is lost with Envoy: whoever would repair the machine is locked out."""
    if not patient.has_program("sshd"):
        return _not_applicable("there is no sshd")
    folder = PurePosixPath("/etc/ssh/sshd_config.d")
    paths = [PurePosixPath("/etc/ssh/sshd_config"), *(folder / name for name in patient.host.names_in(folder))]
    texts = [(patient.host.read(path) or b"").decode(errors="replace") for path in paths]
    ports = {port for text in texts for port in _SSH_PORT.findall(text)} or {"22"}
    listed = ", ".join(sorted(ports))
    inbound = patient.variables.get("ISTIO_INBOUND_PORTS", "*")
    if not patient.is_joined:
        return _ok(f"port {listed}; the bundle has to exclude it from capture (ISTIO_LOCAL_EXCLUDE_PORTS)")
    captured = ports if inbound == "*" else ports & set(inbound.split(","))
    if lost := sorted(captured - set(patient.variables.get("ISTIO_LOCAL_EXCLUDE_PORTS", "").split(","))):
        return _warning(
            f"port {', '.join(lost)} of sshd is captured: without Envoy nobody gets in",
            f"Add {', '.join(lost)} to ISTIO_LOCAL_EXCLUDE_PORTS in the bundle's cluster.env.",
        )
    return _ok(f"port {listed} is not captured")


# --- the endpoint and istiod ---

# A connection is made in stages, and the code of a failure says which one it came to. Any other code is of a failure
# before there was anything to try: a file that cannot be read, a proxy variable that makes no sense.
_NAME = frozenset({"endpoint-name-not-found"})
_PORT = frozenset(
    {
        *("endpoint-refuses-connections", "endpoint-reset", "endpoint-unreachable", "endpoint-too-slow"),
        *("endpoint-broke-off", "proxy-refused"),
    }
)
_HANDSHAKE = frozenset(
    {
        *("endpoint-unknown-ca", "endpoint-wrong-name", "endpoint-pin-mismatch", "endpoint-not-tls"),
        *("endpoint-certificate-expired", "endpoint-certificate-not-yet-valid", "endpoint-unauthorized"),
        *("endpoint-handshake-failed", "endpoint-handshake-silent"),
    }
)


def _endpoint_host(patient: Patient) -> str:
    return (urlsplit(patient.config.endpoint.url).hostname or "") if patient.config else ""


def _of_network(check: Callable[[Patient], Finding]) -> Callable[[Patient], Finding]:
    """Make the check only where the endpoint is known, and is on the network."""

    def checked(patient: Patient) -> Finding:
        if patient.config is None:
            return _unknown("the configuration does not say where it is")
        if patient.config.endpoint.url.startswith("file:"):
            return _not_applicable("the bundle comes from this machine's disk")
        return check(patient)

    return checked


def _endpoint_files(patient: Patient) -> Finding:
    """A bundle on this machine's own disk has to be there."""
    url = urlsplit(patient.config.endpoint.url) if patient.config else None
    if url is None or url.scheme != "file":
        return _not_applicable("the bundle does not come from this machine's disk")
    path = PurePosixPath(unquote(url.path))
    if patient.host.status(path) is None:
        return _failed(f"{path} is not there", "Put the bundle there, or change endpoint.url.")
    return _ok(str(path))


@_of_network
def _endpoint_name(patient: Patient) -> Finding:
    name = _endpoint_host(patient)
    trouble = patient.endpoint_trouble
    fix = "See endpoint.url and this machine's DNS: getent ahosts " + name
    return _name_finding(patient, name, trouble, fix)


def _name_finding(patient: Patient, name: str, trouble: AgentError | None, fix: str) -> Finding:
    if _is_address(name):
        return _not_applicable(f"{name} is an address")
    found = patient.addresses(name)
    if found:
        return _ok(f"{name} leads to {', '.join(found)}")
    if trouble is None:
        return _ok(f"{name} is found by the proxy")
    return _failed(f"this machine finds no address for {name}", fix)


def _is_address(name: str) -> bool:
    return ":" in name or re.fullmatch(r"[0-9.]+", name) is not None


@_of_network
def _endpoint_port(patient: Patient) -> Finding:
    fix = "See that it runs, and the route, proxy and firewall to it; `curl -v` of endpoint.url shows how far one gets."
    return _port_finding(patient, patient.endpoint_trouble, fix)


def _port_finding(patient: Patient, trouble: AgentError | None, fix: str) -> Finding:
    if trouble is None or trouble.code in _HANDSHAKE:
        return _ok("accepts connections")
    if trouble.code in _NAME:
        return _unknown("not tried: its name was not found")
    if trouble.code not in _PORT:
        return _unknown("not tried; the row of the certificate says why")
    if not patient.host.is_root and patient.is_joined:
        return _unknown(f"{trouble.message}; only root can go past the sidecar, which stands between")
    return _failed(trouble.message, trouble.hint if trouble.code == "proxy-refused" else fix)


@_of_network
def _endpoint_certificate(patient: Patient) -> Finding:
    trouble = patient.endpoint_trouble
    if trouble is None:
        trust = "pinned" if patient.config and patient.config.endpoint.ca_pins else "trusted"
        return _ok(f"the TLS handshake succeeds, its certificate is {trust}")
    if trouble.code in _NAME | _PORT or isinstance(trouble, NotPermittedError):
        return _unknown("not seen: no connection was made")
    return _failed(trouble.message, trouble.hint or "See endpoint.url, endpoint.ca_file and endpoint.ca_pins.")


def _istiod_name(patient: Patient) -> Finding:
    name, _ = patient.discovery
    fix = (
        "Run `vmmesh-agent bootstrap`: it writes the bundle's address into /etc/hosts. Else repair this machine's DNS."
    )
    found = _name_finding(patient, name, patient.istiod_trouble, fix)
    expected = patient.known.istiod_addresses
    address = next(iter(patient.addresses(name)), "")
    if found.result is Result.OK and expected and name == patient.known.istiod and address not in expected:
        return _failed(
            f"{name} leads to {address}; the bundle says {', '.join(expected)}",
            f"Look for another line that names it: grep -n {name} {place.ETC_HOSTS}; the first one wins.",
        )
    return found


def _istiod_port(patient: Patient) -> Finding:
    name, port = patient.discovery
    fix = (
        f"Open TCP {port} from this machine to the mesh's gateway (security groups, firewalls), and see in the cluster"
        " that the east-west gateway and istiod run."
    )
    found = _port_finding(patient, patient.istiod_trouble, fix)
    return _ok(f"{name}:{port} accepts connections") if found.result is Result.OK else found


def _istiod_certificate(patient: Patient) -> Finding:
    if patient.host.read(place.ROOT_CERT) is None:
        return _failed(f"{place.ROOT_CERT} is missing: nothing to know istiod by", "Run `vmmesh-agent restore`.")
    trouble = patient.istiod_trouble
    if trouble is None:
        return _ok(f"the TLS handshake succeeds with {place.ROOT_CERT}")
    if trouble.code in _NAME | _PORT:
        return _unknown("not seen: no connection was made")
    fixes = {
        "endpoint-unknown-ca": "Run `vmmesh-agent bootstrap` for the mesh's root certificate, then restart istio.",
        "ca-file-invalid": "Run `vmmesh-agent restore`: the root certificate on disk is none.",
        "endpoint-wrong-name": "The name in mesh.yaml's discoveryAddress is none of istiod's; see the revision in it.",
        "endpoint-not-tls": "See the address and port in mesh.yaml's discoveryAddress.",
    }
    what = f"{place.ROOT_CERT} holds no usable certificate" if trouble.code == "ca-file-invalid" else trouble.message
    return _failed(what, fixes.get(trouble.code) or trouble.hint or "See what answers there instead of istiod.")


# --- the sidecar ---


def _unit(patient: Patient) -> Finding:
    unit = patient.unit
    if unit.active == "unknown":
        return _unknown("systemd does not say")
    if not unit.is_running:
        return _failed(
            f"istio.service is {unit.active} ({unit.sub}), {unit.restarts} restarts",
            "systemctl start istio; where it ends again: journalctl -u istio -n 50",
        )
    if not patient.units.is_enabled(ISTIO):
        return _failed("it runs, and would not after a boot", "systemctl enable istio")
    restarts = f", {unit.restarts} restarts" if unit.restarts else ""
    return _ok(f"enabled and running, process {unit.main_pid}{restarts}")


_VOLATILE = PurePosixPath("/var/run")  # in memory: an image has nothing there


def _files(patient: Patient) -> Finding:
    account = patient.host.account(place.USER)
    if account is None:
        return _failed(f"there is no user {place.USER}", "Install the sidecar again: vmmesh-agent bootstrap")
    wrong = []
    for path in place.FOLDERS:
        if path.is_relative_to(_VOLATILE) and not patient.host.is_running:
            continue
        found = patient.host.status(path)
        if found is None or not found.is_directory:
            wrong.append(f"{path} is no folder")
        elif found.owner.uid != account.uid:
            wrong.append(f"{path} belongs to user {found.owner.uid}")
    for entry in place.TABLE.values():
        found = patient.host.status(entry.path)
        if found is None and entry.path != place.TOKEN:  # that has a row of its own
            wrong.append(f"{entry.path} is missing")
        elif found and found.owner.uid != account.uid:
            wrong.append(f"{entry.path} belongs to user {found.owner.uid}")
        elif found and found.mode not in entry.modes:
            wrong.append(f"{entry.path} has mode {found.mode:04o}, not {entry.modes[0]:04o}")
    if wrong:
        return _failed("; ".join(wrong), "Run `vmmesh-agent restore`: it puts files, owners and modes right.")
    return _ok(f"all there, owned by {place.USER}")


def _token(patient: Patient) -> Finding:
    fresh = "Run `vmmesh-agent bootstrap` for a new one"
    content = patient.host.read(place.TOKEN)
    if content is None:
        return _failed(f"{place.TOKEN} is missing", "Run `vmmesh-agent restore`; it also runs at each boot.")
    claims = _claims(content)
    expires = claims.get("exp")
    audience = claims.get("aud")
    if not isinstance(expires, int | float):
        return _failed(f"{place.TOKEN} holds no token", f"{fresh}.")
    if AUDIENCE not in (audience if isinstance(audience, list) else [audience]):
        return _failed(f"it is for {shown(audience)}, not for {AUDIENCE}", f"{fresh}; see who makes the bundle.")
    until = datetime.fromtimestamp(expires, UTC)
    rejected = next((each for each in patient.health.conditions if each.code == "token_rejected"), None)
    if rejected:
        return _failed(rejected.message, rejected.remedy)
    if until <= patient.now:
        # A sidecar renews its certificate by the certificate itself, as long as that is valid.
        return _warning(f"expired at {until:%Y-%m-%d %H:%M:%SZ}", f"{fresh}, and see that the daemon runs.")
    return _ok(f"for {claims.get('sub', 'nobody')}, until {until:%Y-%m-%d %H:%M:%SZ}; no refusal in the logs")


def _claims(token: bytes) -> dict[str, Any]:
    """Return what a JWT says, nothing where it is none. Who signed it is for istiod to say."""
    parts = token.strip().split(b".")
    try:
        claims = strict.load_json(base64.urlsafe_b64decode(parts[1] + b"=" * (-len(parts[1]) % 4)))
    except (IndexError, binascii.Error, strict.MalformedError):
        return {}
    return claims if isinstance(claims, dict) else {}


def _certificate(patient: Patient) -> Finding:
    chain, key, roots = (patient.host.read(path) for path in (signals.CERT_CHAIN, signals.KEY, signals.ROOT_CERT))
    if chain is None:
        return _failed("istiod has given none yet", "The rows of istiod and of the token say why.")
    try:
        found = signals.own_certificate(chain, key or b"", roots or b"")
    except x509.CertificateError as error:
        return _failed(f"{signals.CERT_CHAIN}: {error}", "Have it made anew: systemctl restart istio")
    until = f"{found.not_after:%Y-%m-%d %H:%M:%SZ}"
    fix = "Run `vmmesh-agent bootstrap` for token and root, then `systemctl restart istio`."
    if found.not_after <= patient.now:
        return _failed(f"expired at {until}", fix)
    if found.not_before > patient.now + CLOCK_TOLERANCE:
        return _failed(f"valid only from {found.not_before:%Y-%m-%d %H:%M:%SZ}", "Set the clock: timedatectl")
    if not found.is_trusted:
        return _failed(f"{signals.ROOT_CERT} did not sign it, or its key is another's", fix)
    return _ok(f"signed by the root, until {until}")


_CHAINS = ("ISTIO_INBOUND", "ISTIO_IN_REDIRECT", "ISTIO_OUTPUT", "ISTIO_REDIRECT")


def _capture(patient: Patient) -> Finding:
    if not patient.captures_by_itself:
        return _not_applicable("ISTIO_CUSTOM_IP_TABLES: the rules are somebody else's")
    there = {
        program: [chain for chain in _CHAINS if f"-N {chain}" in patient.rules(program)]
        for program in ("iptables", "ip6tables")
    }
    if not patient.is_running:
        left = [program for program, chains in there.items() if chains]
        if left:
            return _failed(
                f"left behind in {' and '.join(left)}: connections are redirected to an Envoy that does not run",
                "Remove it: /usr/local/bin/istio-start.sh clean; or start the sidecar: systemctl start istio",
            )
        return _ok("off, as the sidecar is")
    missing = [chain for chain in _CHAINS if chain not in there["iptables"]]
    fix = "systemctl restart istio sets them; then find out who flushed them (firewalld, Docker, a script)."
    if missing:
        return _failed(f"the chains {', '.join(missing)} are gone: traffic goes past the sidecar", fix)
    if not _is_jumped_to(patient.rules("iptables")):
        return _failed("the chains are there, and no rule leads to them", fix)
    if len(there["ip6tables"]) < len(_CHAINS):
        return _ok("on for IPv4; IPv6 goes past the sidecar")
    return _ok("on, for IPv4 and IPv6")


def _is_jumped_to(rules: Iterable[str]) -> bool:
    return any(rule.startswith("-A OUTPUT ") and rule.endswith("-j ISTIO_OUTPUT") for rule in rules)


def _envoy(patient: Patient) -> Finding:
    if not patient.is_running:
        return _not_applicable("the sidecar does not run")
    if patient.host.answers(signals.READY_PORT, "/healthz/ready", _SECONDS):
        return _ok(f"answers on {signals.READY_PORT}")
    return _failed(f"silent on its health port {signals.READY_PORT}", "Read /var/log/istio/istio.err.log.")


def _dns_proxy(patient: Patient) -> Finding:
    if not patient.is_running or not patient.captures_dns:
        return _not_applicable("the sidecar does not run" if patient.captures_dns else "DNS is not captured")
    # An answer of whatever kind will do: which names there are is the mesh's business.
    query = _dns_query(patient.discovery[0])
    answer = patient.host.exchange(15053, query, _SECONDS)
    if answer is not None and answer[:2] == query[:2]:
        return _ok("answers on 15053")
    if 15053 not in {port for port, _ in _listeners(patient.host)}:
        return _failed(
            "nobody listens on 15053, where this machine's DNS questions are redirected to",
            "systemctl restart istio; where it stays so, set ISTIO_META_DNS_CAPTURE to false in the bundle.",
        )
    return _failed(
        f"no answer on 15053 within {_SECONDS:.0f} s: the sidecar hangs, or the servers that it asks do not answer",
        "See the row dns-servers, and ask each of them as istio-proxy, which is not captured. Where they answer:"
        " systemctl restart istio",
    )


def _dns_query(name: str) -> bytes:
    """Ask for the IPv4 address of a name, recursion desired (RFC 1035, section 4.1)."""
    labels = b"".join(bytes([len(label)]) + label for label in name.encode().split(b".") if 0 < len(label) < 64)
    return b"vm\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00" + labels + b"\x00\x00\x01\x00\x01"


def _status(patient: Patient) -> Finding:
    health = patient.health
    if health.state in {State.HEALTHY, State.STARTING}:
        return _ok(str(health.state))
    told = health.conditions[0] if health.conditions else None
    note = f"{health.state}: {told.message}" if told else str(health.state)
    if health.state is State.UNKNOWN or told is None:
        return _unknown(note)
    grave = health.state is State.FAILED or told.severity is Severity.FAILED
    return _failed(note, told.remedy) if grave else _warning(note, told.remedy)


# --- the table ---


@dataclass(frozen=True, slots=True)
class Check:
    """A row to be; what it needs beside a machine: that it runs (rather than an image), root, a sidecar that joined."""

    name: str
    look: Callable[[Patient], Finding]
    live: bool = True
    root: bool = False
    joined: bool = False


CHECKS = (
    Check("configuration", _configuration, live=False),
    Check("architecture", _architecture),
    Check("c-library", _c_library),
    Check("package-manager", _package_manager),
    Check("programs", _programs, live=False),
    Check("sudo", _sudo, root=True),
    Check("ports", _ports),
    Check("iptables", _iptables, root=True),
    Check("clock", _clock),
    Check("disk", _disk, live=False),
    Check("selinux", _selinux),
    Check("dns-servers", _dns_servers),
    Check("cloud-init", _cloud_init, live=False),
    Check("host-name", _host_name),
    Check("address", _address),
    Check("hosts-file", _hosts_file, live=False),
    Check("ssh", _ssh, live=False),
    Check("endpoint-files", _endpoint_files, live=False),
    Check("endpoint-name", _endpoint_name),
    Check("endpoint-port", _endpoint_port),
    Check("endpoint-certificate", _endpoint_certificate),
    Check("istiod-name", _istiod_name, joined=True),
    Check("istiod-port", _istiod_port, joined=True),
    Check("istiod-certificate", _istiod_certificate, joined=True),
    Check("unit", _unit, joined=True),
    Check("files", _files, live=False, joined=True),
    Check("token", _token, root=True, joined=True),
    Check("certificate", _certificate, root=True, joined=True),
    Check("capture", _capture, root=True, joined=True),
    Check("envoy", _envoy, joined=True),
    Check("dns-proxy", _dns_proxy, joined=True),
    Check("status", _status, joined=True),
)


def examine(patient: Patient, checks: Iterable[Check] = CHECKS) -> Iterator[Row]:
    """Make the checks one after the other, and yield each row as it is known."""
    for check in checks:
        found = _made(check, patient)
        yield Row(check.name, found.result, found.note, found.fix)


def _made(check: Check, patient: Patient) -> Finding:
    try:
        if check.live and not patient.host.is_running:
            return _not_applicable("this is not the machine that runs")
        if check.joined and not patient.is_joined:
            return _not_applicable("this machine has not joined")
        if check.root and not patient.host.is_root:
            return _unknown("it takes root")
        return check.look(patient)
    except NotPermittedError as error:
        return _unknown(f"it takes root: {error.message}")
    except AgentError as error:
        return _unknown(error.message)
    except ValueError as error:  # of a file that somebody mangled: no YAML, no text, no number
        return _unknown(f"what was read makes no sense: {error}")


def exit_status(rows: Iterable[Row], trouble: AgentError | None) -> int:
    """Return 0 where nothing failed, 1 where something did; a wrong configuration has its own status."""
    if isinstance(trouble, ConfigurationError):
        return trouble.exit_status
    return int(any(row.result is Result.FAILED for row in rows))


# --- showing ---

_WORDS = {Result.FAILED: "FAILED", Result.NOT_APPLICABLE: "n/a"}
_COLOURS = {Result.OK: "32", Result.WARNING: "33", Result.FAILED: "1;31", Result.UNKNOWN: "35"}
_INDENT = 32


def human(row: Row, *, width: int = 80, colour: bool = False) -> str:
    """Return a row for a person: result, check and note, and below it what to do."""
    word = f"{_WORDS.get(row.result, str(row.result)):<8}"
    first = f"{word} {row.check:<{_INDENT - 10}} "
    lines = textwrap.wrap(
        row.note, width, initial_indent=first, subsequent_indent=" " * _INDENT, break_on_hyphens=False
    ) or [first.rstrip()]
    if row.fix:
        lines += textwrap.wrap(
            row.fix, width, initial_indent=" " * 9 + "→ ", subsequent_indent=" " * 11, break_on_hyphens=False
        )
    if colour and row.result in _COLOURS:
        lines[0] = f"\x1b[{_COLOURS[row.result]}m{word}\x1b[0m{lines[0][len(word) :]}"
    return "\n".join(lines)


def summary(rows: Iterable[Row]) -> str:
    """Count the results in a line."""
    results = [row.result for row in rows]
    counted = [f"{results.count(result)} {result.replace('-', ' ')}" for result in Result if result in results]
    return ", ".join(counted)
