"""What the sidecar's messages mean: the one table of rules, and the causes that they raise.

A rule names a message by a literal part of it (`anchors`, of which one must occur: cheap to refuse) and,
where that is not enough, by a regular expression. Rules are tried in order and the first that matches
decides, so what is benign stands before what it resembles, and a reason stands before a mere symptom.

A failure is *about* one aspect of the sidecar, and only a success that proves this very aspect clears it:
a certificate does not prove that the files are writable, and a connection does not prove admission.
`first` and `last` are the Istio releases that print the message (None: as far as is known).
"""

import re
from dataclasses import dataclass
from enum import Enum, auto

from vmmesh_agent.health import Severity
from vmmesh_agent.records import Record, Stream


class Aspect(Enum):
    """What can be right or wrong independently of the rest."""

    TOKEN = auto()  # it can be read
    CERTIFICATE = auto()  # istiod signs one
    CONNECTION = auto()  # istiod is found, reached and trusted
    ADMISSION = auto()  # istiod lets this workload in
    READINESS = auto()  # Envoy has what it needs to serve
    CONFIGURATION = auto()  # Envoy accepts what istiod sends
    DNS = auto()  # the table of the local DNS server is loaded
    PROBE = auto()  # the application answers
    ENVOY = auto()  # the process lives
    AGENT = auto()  # pilot-agent and the unit live
    MACHINE = auto()  # files, ports, disk, descriptors: no later success proves them
    CAPTURE = auto()  # iptables redirect traffic


class Effect(Enum):
    """What a message does to the picture of the sidecar."""

    RUN_BEGINS = auto()  # everything known so far is of an older process
    ENVOY_BEGINS = auto()  # an older Envoy, and what it died of, are gone
    STARTING = auto()  # a step of the start: nothing is proven yet
    PROVES = auto()  # what `proves` names is right
    CONNECTS = auto()  # a stream opened; whether istiod lets it live shows a moment later
    FAILS = auto()
    DISTURBS = auto()  # a failure only if it lasts
    STOPPING = auto()
    STOPPED = auto()
    NOTHING = auto()  # looks like something, is nothing


@dataclass(frozen=True, slots=True)
class Cause:
    """A slug's sentence, what to do on a VM, and the causes that follow from it and need no word."""

    message: str
    remedy: str
    hides: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Rule:
    """One row. `about` None: the aspect is the operation that the message names, see `operation`."""

    name: str
    anchors: tuple[str, ...]
    meaning: str
    effect: Effect
    pattern: str = ""
    cause: str = ""
    severity: Severity = Severity.FAILED
    about: Aspect | None = None
    proves: frozenset[Aspect] = frozenset()
    streams: frozenset[Stream] = frozenset(Stream)
    first: str | None = None
    last: str | None = None

    def matches(self, record: Record) -> bool:
        """Tell whether a record in which an anchor occurs is this message.

        The pattern is compiled when it is first needed: `status` starts fast.
        """
        if record.stream not in self.streams:
            return False
        if self.pattern and not re.search(self.pattern, record.message, re.DOTALL):
            return False
        return not self.cause or self.aspect(record) is not None

    def aspect(self, record: Record) -> Aspect | None:
        """Return what the failure is about; None where the reason is given for something else than istiod."""
        if self.about:
            return self.about
        aspect = operation(record.message)
        return Aspect.ADMISSION if aspect is Aspect.CONNECTION and self.cause in _AFTER_TRUST else aspect


# --- causes -------------------------------------------------------------------

_UNREACHED = frozenset({"not_ready_no_config", "sds_timeout", "dns_table_not_ready", "agent_crashed"})
_ENVOY_GONE = frozenset({"envoy_crashed", "agent_crashed", "not_ready_no_config", "config_rejected"})
_NO_START = frozenset({"agent_crashed", "not_ready_no_config", "sds_timeout"})

_REJOIN = "Run `vmmesh-agent bootstrap` to fetch and place a fresh bundle."
_FETCH_AND_RESTART = f"{_REJOIN} If it comes back, have the endpoint's bundle for this workload corrected."

CAUSES: dict[str, Cause] = {
    "agent_crashed": Cause(
        "pilot-agent ended by itself.",
        "Read the lines before the end in /var/log/istio/istio.err.log and `journalctl -u istio`; "
        "systemd starts it "
        "again each 10 s. If it keeps ending, install another release of istio-sidecar with "
        "`vmmesh-agent bootstrap` "
        "and send the archive of `vmmesh-agent collect-logs` to support.",
    ),
    "app_probe_failing": Cause(
        "The application does not pass the health probe of its WorkloadGroup, so it gets no traffic.",
        "Start or repair the application, then ask it by hand as the probe in the WorkloadGroup does, on "
        "the port that "
        "the evidence names. The sidecar itself needs nothing.",
    ),
    "autoregistration_failed": Cause(
        "istiod could not register this VM as a WorkloadEntry.",
        "Compare the WorkloadGroup (`kubectl get workloadgroup -A`) with ISTIO_META_AUTO_REGISTER_GROUP, "
        "POD_NAMESPACE "
        "and SERVICE_ACCOUNT in /var/lib/istio/envoy/cluster.env; create or correct the group, then run "
        "`vmmesh-agent bootstrap`. If the entry's name is invalid, set ISTIO_SVC_IP to this VM's "
        "routable address.",
        _UNREACHED,
    ),
    "bad_cluster_env": Cause(
        "cluster.env cannot be read as the environment of the sidecar.",
        f"Look for the line named in the evidence in /var/lib/istio/envoy/cluster.env. {_FETCH_AND_RESTART}",
        _NO_START | {"iptables_failed"},
    ),
    "bad_mesh_config": Cause(
        "The mesh configuration of the bundle cannot be understood.",
        f"Look for the error of the evidence in /etc/istio/config/mesh. {_FETCH_AND_RESTART}",
        _NO_START,
    ),
    "cert_expired": Cause(
        "A certificate on the way to istiod has expired.",
        "Compare `date -u` with the two times in the evidence. If the clock is right and the certificate "
        "is istiod's or "
        "the gateway's, it must be renewed in the cluster; if it is this VM's own, run `vmmesh-agent "
        "bootstrap`.",
        _UNREACHED | {"istiod_unreachable"},
    ),
    "clock_skew": Cause(
        "The clock of this VM is behind: a certificate is not valid yet.",
        "Run `timedatectl`, repair time synchronisation (`systemctl restart systemd-timesyncd` or "
        "chronyd), wait until it "
        "says synchronized, then `systemctl restart istio`.",
        _UNREACHED | {"istiod_unreachable", "cert_expired", "token_rejected"},
    ),
    "cluster_id_mismatch": Cause(
        "istiod does not know the cluster that this VM says it belongs to.",
        "Compare ISTIO_META_CLUSTER_ID in /var/lib/istio/envoy/cluster.env with the cluster's name in istiod "
        f"(global.multiCluster.clusterName). {_FETCH_AND_RESTART}",
        _UNREACHED | {"token_rejected"},
    ),
    "config_rejected": Cause(
        "Envoy refused a part of the configuration that istiod sent and goes on with the last good one.",
        "Find the resource that the evidence names: an EnvoyFilter, a Gateway or a certificate in the "
        "cluster does not "
        "suit this Envoy. Correct it there (`istioctl analyze -A`, `istioctl proxy-status`); nothing on "
        "the VM helps.",
        frozenset({"not_ready_no_config"}),
    ),
    "disk_full": Cause(
        "The disk is full: the sidecar cannot write.",
        "Run `df -h /var/log /etc /var/lib`, free space (old files in /var/log first), then `systemctl restart istio`.",
        frozenset({"agent_crashed", "envoy_crashed"}),
    ),
    "dns_table_not_ready": Cause(
        "The sidecar captures DNS but has not received its table of names, so names do not resolve.",
        "Run `vmmesh-agent doctor`. If istiod is reachable, `systemctl restart istio`; if it stays so, set "
        "ISTIO_META_DNS_CAPTURE to false in the WorkloadGroup's bundle.",
        frozenset({"not_ready_no_config"}),
    ),
    "dns_unresolved": Cause(
        "The name of istiod does not resolve.",
        "Run `getent hosts istiod.istio-system.svc`. The address belongs in the vmmesh-agent block of "
        "/etc/hosts: "
        "run `vmmesh-agent bootstrap`. If the bundle's hosts file is empty, the endpoint must be given "
        "the address of "
        "the east-west gateway.",
        _UNREACHED | {"istiod_unreachable"},
    ),
    "envoy_crashed": Cause(
        "Envoy ended by itself, and with it the sidecar.",
        "Read the end of /var/log/istio/istio.err.log: the lines before the exit say why. If nothing is "
        "there, run "
        "`/usr/local/bin/envoy --version`; if it keeps ending, install another release of istio-sidecar.",
        frozenset({"not_ready_no_config", "config_rejected", "agent_crashed", "sds_timeout"}),
    ),
    "fd_limit": Cause(
        "The sidecar has used up its file descriptors.",
        "Run `systemctl edit istio`, add `[Service]` and `LimitNOFILE=1048576`, then `systemctl restart istio`.",
        _ENVOY_GONE,
    ),
    "glibc_mismatch": Cause(
        "This Envoy needs a newer C library than this system has.",
        "Compare `getconf GNU_LIBC_VERSION` with the version in the evidence. Name a package of "
        "istio-sidecar built for "
        "this system in sidecar.package, or move the VM to a newer release of its system.",
        _ENVOY_GONE,
    ),
    "identity_mismatch": Cause(
        "istiod knows this VM under another identity than the one it asks for.",
        "Compare POD_NAMESPACE and SERVICE_ACCOUNT in /var/lib/istio/envoy/cluster.env with the identity "
        "in the "
        f"evidence: they must name the token's service account. {_REJOIN}",
        _UNREACHED,
    ),
    "iptables_failed": Cause(
        "The redirection of traffic could not be set up, so the sidecar does not start.",
        "Run `iptables -t nat -S` as root: if it is missing, install the package iptables; if chains "
        "named ISTIO_ are "
        "left, run `systemctl stop istio` and `/usr/local/bin/istio-start.sh clean`, then `systemctl "
        "start istio`.",
        _NO_START | {"permission_denied"},
    ),
    "istiod_unreachable": Cause(
        "istiod cannot be reached.",
        "Run `vmmesh-agent doctor`: it names the address and the port and tries them. Check the route, "
        "the firewall and "
        "that the east-west gateway offers port 15012 with TLS.",
        _UNREACHED,
    ),
    "not_ready_no_config": Cause(
        "Envoy has not got the configuration that it needs to serve.",
        "Run `vmmesh-agent doctor`, then in the cluster `istioctl proxy-status`: this VM must be listed "
        "and synced. "
        "If it is not, `systemctl restart istio`.",
    ),
    "out_of_memory": Cause(
        "The kernel killed the sidecar because memory ran out.",
        "Run `free -m` and `journalctl -k | grep -i oom`. Give the VM or the unit more memory, or limit "
        "what Envoy gets "
        "with a Sidecar resource; systemd starts it again by itself.",
        _ENVOY_GONE,
    ),
    "permission_denied": Cause(
        "The sidecar may not read or write a file that it needs.",
        "Run `namei -l` on the path in the evidence: it must belong to istio-proxy. `vmmesh-agent "
        "bootstrap` puts owners "
        "and modes right; on SELinux also run `restorecon -Rv` on it.",
        _NO_START | {"token_rejected", "token_missing", "istiod_unreachable"},
    ),
    "port_conflict": Cause(
        "Another process holds a port that the sidecar needs.",
        "Run `ss -lntup` and look for the port of the evidence; stop that process or move it, then "
        "`systemctl restart istio`.",
        _ENVOY_GONE,
    ),
    "root_cert_invalid": Cause(
        "The mesh's root certificate on this VM is not a certificate.",
        f"Run `openssl x509 -in /etc/certs/root-cert.pem -noout -text`. {_FETCH_AND_RESTART}",
        _UNREACHED | {"istiod_unreachable"},
    ),
    "root_cert_mismatch": Cause(
        "istiod's certificate is not signed by the root that this VM trusts.",
        "Run `vmmesh-agent bootstrap` to fetch the mesh's current root, then `systemctl restart istio`. "
        "If it stays so, "
        "something between here and istiod ends TLS: the gateway must pass port 15012 through.",
        _UNREACHED | {"istiod_unreachable"},
    ),
    "root_cert_missing": Cause(
        "The mesh's root certificate is not on this VM.",
        f"{_REJOIN} It belongs to /etc/certs/root-cert.pem, owned by istio-proxy.",
        _UNREACHED | {"istiod_unreachable", "root_cert_mismatch", "root_cert_invalid"},
    ),
    "san_mismatch": Cause(
        "istiod's certificate is for another name than the one this VM calls.",
        "Compare the names in the evidence with discoveryAddress in /etc/istio/config/mesh and CA_ADDR in "
        f"/var/lib/istio/envoy/cluster.env. {_FETCH_AND_RESTART}",
        _UNREACHED | {"istiod_unreachable"},
    ),
    "sds_timeout": Cause(
        "Envoy waits for its certificate and does not get it from pilot-agent.",
        "Run `ls -l /etc/istio/proxy`: the sockets must belong to istio-proxy. Then `systemctl restart istio`.",
        frozenset({"not_ready_no_config"}),
    ),
    "service_account_missing": Cause(
        "The service account of this VM does not exist in the cluster any more.",
        "Create the service account that SERVICE_ACCOUNT in /var/lib/istio/envoy/cluster.env names, in "
        "that namespace, "
        f"then get a new token. {_REJOIN}",
        _UNREACHED | {"token_rejected"},
    ),
    "stopped": Cause("The sidecar was stopped.", "Run `systemctl start istio` when it should serve again."),
    "stopping": Cause(
        "The sidecar is going down: it drains its connections and takes no new ones.",
        "Wait for the end. If nobody stopped it on purpose, look at `journalctl -u istio` and run "
        "`systemctl start istio`.",
    ),
    "sudo_missing": Cause(
        "istio-start.sh cannot use sudo to become istio-proxy.",
        "Install the package sudo and check that `sudo -n -u istio-proxy true` works as root, then "
        "`systemctl restart istio`.",
        _NO_START,
    ),
    "token_missing": Cause(
        "There is no token to get a certificate with: /var/run is emptied at each boot.",
        "Run `vmmesh-agent restore`, and if that token has expired `vmmesh-agent bootstrap`.",
        _UNREACHED | {"token_rejected", "cert_expired"},
    ),
    "token_rejected": Cause(
        "istiod refuses the token: it has expired, or its audience, cluster or service account is wrong.",
        "Run `vmmesh-agent status` to see when the token expires, then `vmmesh-agent bootstrap` for a "
        "new one. If that one "
        "is refused too, compare ISTIO_META_CLUSTER_ID and SERVICE_ACCOUNT with the cluster; istiod's "
        "log has the reason.",
        _UNREACHED | {"cert_expired"},
    ),
    "user_missing": Cause(
        "The user istio-proxy does not exist.",
        "Install istio-sidecar again (`vmmesh-agent bootstrap`): its package creates the user.",
        _NO_START | {"permission_denied", "sudo_missing"},
    ),
    "xds_rejected": Cause(
        "istiod ends the configuration stream for a reason of its own.",
        "Read the reason in the evidence and istiod's log at that time (`kubectl -n istio-system logs "
        "deploy/istiod`); "
        "`istioctl version` shows whether sidecar and istiod are too far apart.",
        _UNREACHED,
    ),
}


# --- what a line is about ------------------------------------------------------

_SIGNING = re.compile(
    r"failed to (?:warm|sign)|CSR|[Cc]reate certificate|workload certificate|StreamSecrets|sds-grpc|generate secret"
    r"|[Gg]et secret for proxy|resource:\w+ |Failed to (?:re)?connect"
)
_STREAMING = re.compile(
    r"AggregatedResources|gRPC config|upstream|xds-grpc|XDS|istiod|:1501[02]\b|transport: |fetch CA TLS root cert"
)


# Reasons that istiod gives once the connection stands.
_AFTER_TRUST = frozenset({"token_rejected", "identity_mismatch", "service_account_missing", "cluster_id_mismatch"})


def operation(message: str) -> Aspect | None:
    """Return what was being done when a reason was given: signing, or connecting; None for neither.

    A refused connection to the application or to a metrics port is no word about istiod.
    """
    if _SIGNING.search(message):
        return Aspect.CERTIFICATE
    return Aspect.CONNECTION if _STREAMING.search(message) else None


# --- the table ------------------------------------------------------------------

_LOG, _ERR, _JOURNAL = (frozenset({stream}) for stream in Stream)
_FILES = _LOG | _ERR
_LIVES = frozenset({Aspect.ENVOY, Aspect.AGENT})
_SERVES = _LIVES | {Aspect.CONNECTION, Aspect.ADMISSION}
_SIGNED = frozenset({Aspect.CERTIFICATE, Aspect.TOKEN})
# A stream that istiod closed in Envoy's words: the status code is a number.
_CLOSED = r"gRPC config stream (?:to \S+ )?closed(?: since \d+s ago)?: "
_NOTHING, _FAILS, _PROVES = Effect.NOTHING, Effect.FAILS, Effect.PROVES
_DEGRADED = Severity.DEGRADED

RULES: tuple[Rule, ...] = (
    # A new process: reset.
    Rule("flag", ("FLAG: --",), "pilot-agent begins.", Effect.RUN_BEGINS, r"^FLAG: --", streams=_LOG),
    Rule("version", ("Version ",), "pilot-agent begins.", Effect.RUN_BEGINS, r"^Version \d\S*-\w+", streams=_LOG),
    Rule("unit-started", ("Started istio", "Starting istio"), "systemd starts the unit.", Effect.RUN_BEGINS,
         r"^Start(?:ed|ing) istio", streams=_JOURNAL),
    # Steps of the start. Envoy's command line holds words like drain, shutdown and error.
    Rule("envoy-command", ("Envoy command:",), "Envoy is launched.", Effect.STARTING),
    Rule("start-step", ("Starting proxy agent", "Proxy role", "Opening status port", "Apply mesh config",
                        "Apply proxy config", "Effective config", "JWT policy is", "Epoch 0 starting"),
         "pilot-agent starts.", Effect.STARTING,
         r"^(?:Starting proxy agent|Proxy role|Opening status port|Apply |Effective config|JWT policy is|Epoch 0)"),

    # Looks bad and is not.
    Rule("recreated", ("recreated connection",), "The CA client dials anew.", _NOTHING, first="1.9"),
    Rule("no-key-pair", ("Failed to load key pair", "cannot load key pair", "cannot parse the cert chain"),
         "There is no certificate yet, so the token is used.", _NOTHING,
         r"Failed to load key pair|using token instead", first="1.7"),
    Rule("scrape", ("scrap", "write agent metrics", "write application metrics", "write envoy metrics",
                    "writing application metrics"),
         "Metrics of another process were not read.", _NOTHING, r"scraping|writ\w+ \w+ metrics|^scrape target"),
    Rule("app-http-probe", ("Request to probe app", "grpc probe failed", "create request to probe",
                            "connection to probe app"),
         "A kubelet-style probe of the application failed once.", _NOTHING),
    Rule("remote-closed", ("Remote side closed connection",), "Envoy left the SDS stream.", _NOTHING, last="1.8"),
    Rule("sds-cancelled", ("connection is terminated",), "Envoy left the SDS stream.", _NOTHING,
         r"connection is terminated: rpc error: code = Canceled", last="1.8"),
    Rule("downstream", ("downstream",), "Envoy left the agent's XDS stream.", _NOTHING,
         r"downstream (?:\[\d+\] )?(?:terminated with|send error|dropped)"),
    Rule("capacity-warning", ("Usage of the deprecated runtime", "runtime singleton", "no configured limit"),
         "Envoy has begun.", Effect.ENVOY_BEGINS, streams=_FILES),
    Rule("deprecation", ("Using deprecated", "mTLS PERMISSIVE", "deprecated option"), "A warning of old age.",
         _NOTHING),
    Rule("retrying-ca", ("ca request failed, starting attempt",),
         "The CA did not answer at once.", Effect.DISTURBS, cause="istiod_unreachable",
         about=Aspect.CERTIFICATE, first="1.9"),

    # Success, and what it proves.
    Rule("certificate", ("generated new workload certificate", "read certificate from file",
                         "GenerateSecret", "CSR is approved successfully"),
         "istiod signed a certificate.", _PROVES, r"^(?!.*fail)", proves=_SIGNED),
    Rule("secret-pushed", ("SDS: PUSH", "pushed key/cert pair to proxy"),
         "Envoy, having its configuration, asked for its certificate and got it.", _PROVES,
         r"resource[:=]default\b", proves=_SERVES | _SIGNED),
    Rule("secret-cached", ("returned workload certificate from cache", "returned delayed workload certificate"),
         "Envoy, having its configuration, asked for its certificate.", _PROVES, proves=_SERVES, first="1.9"),
    Rule("ready", ("Envoy proxy is ready", "Readiness succeeded", "Initialization took", "Envoy is ready!"),
         "Envoy serves.", _PROVES, proves=_SERVES | {Aspect.READINESS, Aspect.DNS}),
    Rule("connected", ("connected to upstream XDS server", "connected to delta upstream XDS server",
                       "Envoy ADS stream established"),
         "A stream to istiod opened.", Effect.CONNECTS, r"^(?:connected to |Envoy ADS)", first="1.8"),
    Rule("probe-passes", ("marking as healthy",), "The application answers.", _PROVES,
         proves=frozenset({Aspect.PROBE}), first="1.9"),
    Rule("captured", ("iptables-restore --noflush", "# Completed on", "session opened for user istio-proxy",
                      "USER=istio-proxy ; COMMAND="),
         "The redirection is in place.", _PROVES, r"^(?!.*(?:rror|ailed|xit status))",
         proves=frozenset({Aspect.CAPTURE}), streams=_JOURNAL),

    # The end, asked for. Envoy's exit while stopping is part of it (see Diagnosis).
    Rule("draining", ("Agent draining", "Graceful termination period", "Aborting proxy", "Aborting epoch",
                      "Status server has successfully terminated", "notifying pilot-agent to exit",
                      "current state is: DRAINING", "server is terminated: received signal", "starting drain",
                      "There are still", "no more active connections", "Checking for active connections"),
         "The sidecar goes down.", Effect.STOPPING),
    Rule("unit-stopping", ("Stopping istio",), "systemd stops the unit.", Effect.STOPPING, r"^Stopping istio",
         streams=_JOURNAL),
    Rule("stopped", ("Agent has successfully terminated", "Envoy aborted normally", "Aborted proxy instance",
                     "Aborted all epochs", "aborted normally"),
         "The sidecar has ended.", Effect.STOPPED),
    Rule("unit-stopped", ("Stopped istio", "Deactivated successfully", "istio.service: Succeeded"),
         "systemd has stopped the unit.", Effect.STOPPED, r"^Stopped istio|istio\.service: (?:Deact|Succ)",
         streams=_JOURNAL),

    # The application.
    Rule("probe-fails-envoy", ("marking as unhealthy",), "The first check asks an Envoy that is not ready yet.",
         Effect.DISTURBS,
         r"unhealthy: .*(?:config (?:not|received)|server is not live|workers have not|readiness stats)",
         cause="app_probe_failing", severity=_DEGRADED, about=Aspect.PROBE, first="1.9"),
    Rule("probe-fails", ("marking as unhealthy",), "The application does not answer.", _FAILS,
         cause="app_probe_failing", severity=_DEGRADED, about=Aspect.PROBE, first="1.9"),

    # The machine: what is written or opened.
    Rule("log-disk-full", ("log write error",), "A log line was lost.", _FAILS,
         r"No space left|no space left|quota exceeded", cause="disk_full", severity=_DEGRADED, about=Aspect.MACHINE),
    Rule("disk-full-start", ("no space left on device", "disk quota exceeded"), "The start cannot write its files.",
         _FAILS, r"failed to (?:start|generate bootstrap|initialize)|Failed to generate bootstrap", cause="disk_full",
         about=Aspect.AGENT),
    Rule("disk-full", ("no space left on device", "No space left on device", "disk quota exceeded"),
         "A file was not written.", _FAILS, cause="disk_full", severity=_DEGRADED, about=Aspect.MACHINE),
    Rule("descriptors-fatal", ("Too many open files",), "Envoy died for want of a descriptor.", _FAILS,
         r"assert failure|SOCKET_VALID|critical|Aborted", cause="fd_limit", about=Aspect.ENVOY),
    Rule("descriptors", ("Too many open files", "too many open files"), "No descriptor was left.", _FAILS,
         cause="fd_limit", severity=_DEGRADED, about=Aspect.MACHINE),
    Rule("journal-permission", ("ermission denied",), "The start script was refused a file.", _FAILS,
         r"^(?!.*(?:iptables|ip6tables)).*[Pp]ermission denied", cause="permission_denied", about=Aspect.MACHINE,
         streams=_JOURNAL),
    Rule("token-permission", ("failed to fetch token from file", "credential token", "failed to read token file"),
         "The token may not be read.", _FAILS, r"permission denied", cause="permission_denied", about=Aspect.TOKEN),
    Rule("token-not-found", ("failed to fetch token from file", "the token for XDS token exchange is empty",
                             "the JWTPath is not set", "the JWT token for XDS token exchange"),
         "The token is not there; a valid certificate may make it needless.", _FAILS,
         cause="token_missing", about=Aspect.TOKEN, first="1.9"),
    Rule("token-missing", ("credential token", "failed to read token file", "read empty token", "Missing JWT"),
         "The token is not there, and nothing else is tried.", _FAILS,
         r"ailed to get credential token|read token file|empty token|Missing JWT|no credential token",
         cause="token_missing", about=Aspect.CERTIFICATE, last="1.9"),
    Rule("status-port", ("Error listening on status port",), "The agent's status port is taken; it goes on.", _FAILS,
         cause="port_conflict", severity=_DEGRADED, about=Aspect.MACHINE),
    Rule("file-permission", ("permission denied", "Permission denied", "operation not permitted",
                             "read-only file system"),
         "A file or socket was refused.", _FAILS,
         r"unix socket|UDS|\.sock|directory|bootstrap|output the (?:resource|key)|write|open |listen unix|mkdir|bind"
         r"|log |chmod|rename|remove",
         cause="permission_denied", about=Aspect.MACHINE),
    Rule("listener-port", ("ddress already in use",), "One listener cannot bind; the others serve.", _FAILS,
         r"listener(?:\(s\))? '?(?!virtual(?:In|Out)bound)[\w.:\[\]-]+'?[: ](?!.*virtual(?:In|Out)bound)"
         r"(?!.*:15(?:000|001|006|021|090)\b)",
         cause="port_conflict", severity=_DEGRADED, about=Aspect.MACHINE),
    Rule("port", ("ddress already in use",), "A port that the sidecar cannot do without is taken.", _FAILS,
         r"^(?!.*(?:probe|unhealthy))", cause="port_conflict", about=Aspect.MACHINE),
    Rule("socket", ("failed to set up UDS", "Failed to set up UDS path", "SDS grpc server could not be started",
                    "Failed to listen on unix socket", "failed to listen on unix socket",
                    "SDS grpc server for workload proxies failed to start"),
         "The agent's own sockets could not be made.", _FAILS, cause="permission_denied", about=Aspect.MACHINE),

    # The start script, in the journal.
    Rule("no-user", ("istio-proxy", "status=217/USER"), "The user is not there.", _FAILS,
         r"unknown user|[Uu]ser istio-proxy does not exist|invalid user|status=217/USER",
         cause="user_missing", about=Aspect.AGENT),
    Rule("no-sudo", ("sudo",), "sudo is not there or refuses.", _FAILS,
         r"sudo: (?:command )?not found|must have a tty|sudo: No such file|sudo: account validation|sudo: PAM"
         r"|sudo: unable to|not in the sudoers|not allowed to execute",
         cause="sudo_missing", about=Aspect.AGENT),
    Rule("cluster-env", ("cluster.env", "sidecar.env"), "bash cannot read the environment.", _FAILS,
         r"(?:cluster|sidecar)\.env: (?:line \d+|[Nn]o such file|syntax)", cause="bad_cluster_env",
         about=Aspect.AGENT, streams=_JOURNAL),
    Rule("env-refused", ("ISTIO_META",), "A value of the environment keeps the agent from starting.", _FAILS,
         r"failed (?:generating|to generate|extracting).*ISTIO_META", cause="bad_cluster_env", about=Aspect.AGENT),
    Rule("env-json", ("failed json unmarshal",), "A value of the environment is not the JSON it should be.", _FAILS,
         cause="bad_cluster_env", severity=_DEGRADED, about=Aspect.MACHINE),
    Rule("iptables-cleaning", ("No chain/target/match by that name", "does a matching rule exist", "does not exist"),
         "Cleaning what was not there.", _NOTHING,
         r"No chain/target/match|matching rule exist|[Cc]hain '?\w+'? does not exist", streams=_JOURNAL | _LOG),
    Rule("iptables", ("iptables", "ip6tables", "xtables", "Chain already exists", "nf_tables",
                      "Command error output"),
         "The redirection was refused.", _FAILS,
         r"failed|Failed|not found|[Cc]an't|Could not|exit status [1-9]|already exists|other problem|parameter problem"
         r"|holding the xtables lock|Permission denied|[Oo]peration not permitted|RULE_\w+ failed|error output: \S"
         r"|[Nn]o such file",
         cause="iptables_failed", about=Aspect.CAPTURE, streams=_JOURNAL | _LOG),
    Rule("oom-unit", ("oom-kill", "killed by the OOM killer", "Out of memory: Kill"), "The kernel killed it.", _FAILS,
         r"istio|envoy|pilot-agent", cause="out_of_memory", about=Aspect.ENVOY, streams=_JOURNAL),
    Rule("unit-ended", ("istio.service: Main process exited", "istio.service: Failed with result",
                        "istio.service: Control process exited", "Failed to start istio"),
         "The unit ended by itself.", _FAILS, r"^(?!.*status=0/SUCCESS)", cause="agent_crashed", about=Aspect.AGENT,
         streams=_JOURNAL),

    # What keeps pilot-agent from starting.
    Rule("no-root", ("missing a root certificate", "root CA file for", "failed to find root CA cert",
                     "failed to find root XDS CA", "Failed to load root cert"),
         "There is no root certificate.", _FAILS, cause="root_cert_missing", about=Aspect.AGENT),
    Rule("root-file-missing", ("root cert", "root-cert.pem"), "There is no root certificate.", _FAILS,
         r"(?:root-cert\S*|root cert).*(?:no such file|does not exist)", cause="root_cert_missing",
         about=Aspect.CERTIFICATE),
    Rule("bad-root", ("TLS dial option", "failed to append certificates", "failed to parse root certs",
                      "failed to decode certificate", "CA TLS root cert: ", "failed to parse some certs",
                      "TLS options to talk to upstream"),
         "The root certificate cannot be parsed.", _FAILS,
         r"dial option|append certificates|parse (?:root|some) certs|decode|TLS options", cause="root_cert_invalid",
         about=Aspect.CERTIFICATE),
    Rule("mesh-file", ("mesh config", "failed to get proxy config", "Invalid discovery address"),
         "The mesh configuration cannot be read.", _FAILS,
         r"failed to (?:unmarshal|read|get proxy|parse)|Invalid discovery", cause="bad_mesh_config",
         about=Aspect.AGENT),

    # Processes.
    Rule("go-memory", ("runtime: out of memory", "cannot allocate memory"), "pilot-agent got no memory.", _FAILS,
         r"fatal error: runtime: out of memory|cannot allocate memory", cause="out_of_memory", about=Aspect.AGENT),
    Rule("go-panic", ("panic: ", "fatal error: ", "goroutine ", "SIGSEGV: "), "pilot-agent panicked.", _FAILS,
         r"^(?:panic: |(?:fatal )?error: (?:concurrent|all goroutines|unexpected signal|runtime|fault|found|s\w+ )"
         r"|goroutine \d+ \[running|SIG[A-Z]+: )",
         cause="agent_crashed", about=Aspect.AGENT),
    Rule("glibc", ("GLIBC", "error while loading shared libraries"), "The loader refuses Envoy.", _FAILS,
         r"GLIBC(?:XX)?_[\d.]+'? not found|loading shared libraries", cause="glibc_mismatch", about=Aspect.ENVOY),
    Rule("oom", ("Envoy may have been out of memory killed",), "Envoy was killed, most likely by the kernel.", _FAILS,
         cause="out_of_memory", about=Aspect.ENVOY),
    Rule("envoy-killed", ("xited with error: signal: killed",), "Envoy was killed, most likely by the kernel.",
         _FAILS, cause="out_of_memory", about=Aspect.ENVOY),
    Rule("envoy-exit", ("exited with error", "Envoy exited with status", "terminated with an error"),
         "Envoy ended.", _FAILS,
         r"(?:Envoy|Epoch \d+) (?:exited with (?:error|status [1-9])|terminated with an error)", cause="envoy_crashed",
         about=Aspect.ENVOY),
    Rule("envoy-backtrace", ("Caught ", "Backtrace (use tools", "assert failure", "FATAL ERROR", "terminate called",
                             "std::bad_alloc", "initializing configuration", "SIGABRT", "Aborted (core dumped)"),
         "Envoy died.", _FAILS,
         r"Caught (?!exception)[A-Z]\w+|Backtrace \(use tools|assert failure|FATAL ERROR|terminate called|bad_alloc"
         r"|^(?:error )?initializing configuration|SIGABRT|core dumped", cause="envoy_crashed", about=Aspect.ENVOY),

    # Readiness, printed only where somebody asks for it.
    Rule("not-ready-dns", ("DNS lookup table is not ready", "before lookup table is loaded"),
         "The names have not come.", Effect.DISTURBS, cause="dns_table_not_ready", severity=_DEGRADED,
         about=Aspect.DNS, first="1.11"),
    Rule("not-ready-rejected", ("but was rejected",), "Envoy has refused all of it.", Effect.DISTURBS,
         r"config received from XDS server, but was rejected", cause="config_rejected", about=Aspect.READINESS,
         first="1.12"),
    Rule("not-ready", ("Envoy proxy is NOT ready", "config not received from", "config not fully received",
                       "server is not live", "workers have not yet started", "failed to get readiness stats",
                       "waiting for Envoy proxy to become ready", "envoy not live"),
         "Envoy waits.", Effect.DISTURBS, cause="not_ready_no_config", about=Aspect.READINESS),
    Rule("secret-timeout", ("initial fetch timed out",), "Envoy waits for its certificate.", Effect.DISTURBS,
         r"tls\.v\d\w*\.Secret|auth\.Secret", cause="sds_timeout", about=Aspect.READINESS),
    Rule("fetch-timeout", ("initial fetch timed out",), "Envoy waits for its configuration.", Effect.DISTURBS,
         cause="not_ready_no_config", about=Aspect.READINESS),

    # Envoy refuses.
    Rule("nack", ("config for type.googleapis.com", "rejected: Error adding/updating"), "Envoy refused a resource.",
         _FAILS, r"rejected: ", cause="config_rejected", severity=_DEGRADED, about=Aspect.CONFIGURATION),

    # istiod, and why not. Names before addresses: the words of a failed look-up are also those of a failed dial.
    Rule("dns", ("lookup ", "no such host", "server misbehaving", "DNS resolution failed",
                 "produced zero addresses"),
         "The name does not resolve.", _FAILS,
         r"lookup \S{1,255}.{0,255}(?:no such host|misbehaving|timeout|refused|unreachable|temporary failure|canceled)"
         r"|no such host|DNS resolution failed|produced zero addresses", cause="dns_unresolved"),
    Rule("clock", ("x509: ", "token"), "The certificate lies in the future.", _FAILS,
         r"not yet valid: current time \S+ is before|before issued|token is not valid yet", cause="clock_skew"),
    Rule("expired", ("has expired or is not yet valid", "certificate has expired", "CERTIFICATE_EXPIRED",
                     "certificate expired", "expired certificate"),
         "A certificate is too old.", _FAILS, cause="cert_expired"),
    Rule("unknown-authority", ("certificate signed by unknown authority", "CERTIFICATE_VERIFY_FAILED",
                               "unknown certificate authority", "unable to verify"),
         "The root does not fit.", _FAILS, cause="root_cert_mismatch"),
    Rule("wrong-name", ("x509: certificate is valid for", "x509: certificate is not valid for any names",
                        "doesn't contain any IP SANs", "relies on legacy Common Name", "x509: cannot validate"),
         "The name does not fit.", _FAILS, cause="san_mismatch"),
    Rule("other-tls", ("x509: ", "remote error: tls: "), "The certificate does not verify.", _FAILS,
         cause="root_cert_mismatch"),
    Rule("service-account-gone", ("serviceaccount",), "The account is gone.", _FAILS,
         r"serviceaccounts? \S+ not found", cause="service_account_missing"),
    Rule("unknown-cluster", ("kube client", "cluster"), "The cluster is unknown to istiod.", _FAILS,
         r"could not get cluster \S+ kube client|unknown cluster(?: ID)?\b", cause="cluster_id_mismatch"),
    Rule("registration", ("WorkloadEntry", "WorkloadGroup"), "istiod does not register this VM.", _FAILS,
         r"registration|cannot find WorkloadGroup|creating WorkloadEntry", cause="autoregistration_failed",
         about=Aspect.ADMISSION, first="1.9"),
    Rule("identity", ("PermissionDenied", "authorization failed", "closed"), "The identity does not fit.", _FAILS,
         rf"code = PermissionDenied|authorization failed|{_CLOSED}7\b", cause="identity_mismatch"),
    Rule("refused-token", ("Unauthenticated", "authenticate failure", "authentication failure", "closed",
                           "hit non-retryable error"),
         "istiod does not believe who we are.", _FAILS,
         rf"code = Unauthenticated|authenticat\w+ failure|{_CLOSED}16\b|non-retryable error \(HTTP code: (?:0|401)\)",
         cause="token_rejected"),
    Rule("own-cert-expired", ("cert expired, using token instead",), "This VM's certificate is too old.",
         Effect.DISTURBS, cause="cert_expired", severity=_DEGRADED, about=Aspect.CERTIFICATE, first="1.11"),

    # A closed stream is everyday; one that stays closed is not.
    Rule("sds-everyday-close", ("StreamSecrets",), "Envoy left the SDS stream.", _NOTHING,
         rf"StreamSecrets {_CLOSED}(?:0,|1,|13,|14, .*(?:closing|EOF|goaway|NO_ERROR))"),
    Rule("everyday-close", ("closed", "terminated with unexpected error", "disconnected from XDS server",
                            "loopyWriter"),
         "istiod ends each stream after half an hour or so.", _PROVES,
         rf"{_CLOSED}(?:0,|1,|13,|14, (?!.*(?:dial|connect error|no healthy)).*(?:closing|EOF|goaway|NO_ERROR))"
         r"|terminated with.*(?:transport is closing|EOF|goaway|NO_ERROR|code = Canceled|max_age)"
         r"|^disconnected from|loopyWriter", proves=frozenset({Aspect.CONNECTION, Aspect.ADMISSION})),
    Rule("sds-closed", ("StreamSecrets",), "The agent's own SDS stream closed.", Effect.DISTURBS,
         rf"StreamSecrets {_CLOSED}14", cause="sds_timeout", about=Aspect.READINESS),
    Rule("not-yet-open", ("closed",), "Envoy was quicker than the agent.",
         Effect.DISTURBS, rf"{_CLOSED}14, (?:no healthy upstream|upstream connect error|$|\s)",
         cause="istiod_unreachable", about=Aspect.CONNECTION),
    Rule("dial", ("Error while dialing", "dial tcp", "connection refused", "no route to host",
                  "network is unreachable", "server preface", "first record does not look like",
                  "authentication handshake failed",
                  "code = DeadlineExceeded", "context deadline exceeded", "i/o timeout", "retrial timed out"),
         "istiod does not answer.", _FAILS, cause="istiod_unreachable"),
    Rule("stream-broke", ("terminated with unexpected error", "closed"), "The stream broke.", Effect.DISTURBS,
         rf"code = (?:Unavailable|Unknown|Internal)|{_CLOSED}(?:14|2|13)\b", cause="istiod_unreachable"),
    Rule("stream-refused", ("terminated with unexpected error", "closed"), "istiod ended the stream.", _FAILS,
         rf"code = \w+|{_CLOSED}(?:[3-9]|1[0-25])\b", cause="xds_rejected", about=Aspect.ADMISSION),
    Rule("upstream-down", ("failed to connect to upstream", "failed to create upstream grpc client",
                           "Unable to fetch CA TLS root cert", "exhausted all the retries"),
         "istiod does not answer.", _FAILS, cause="istiod_unreachable", about=Aspect.CONNECTION),
    Rule("unsigned", ("failed to warm certificate", "failed to sign", "failed to generate secret",
                      "Failed to create certificate", "CSR failed with error", "CSR signing failed"),
         "No certificate was signed.", _FAILS, cause="istiod_unreachable", about=Aspect.CERTIFICATE),

    # Any other error with which pilot-agent ends while it starts.
    Rule("start-failed", ("failed to start", "failed to initialize envoy agent", "failed to generate bootstrap",
                          "failed generating", "Agent start up error", "Failed to start in-process SDS",
                          "invalid options:", "not registered", "failed to create credential fetcher",
                          "Invalid proxy Type", "Invalid role Type", "invalid proxy Type",
                          "Failed to generate bootstrap"),
         "pilot-agent ends while it starts.", _FAILS, cause="agent_crashed", about=Aspect.AGENT, streams=_FILES),
)  # fmt: skip


# Nearly every line is refused by these literals alone.
_ANCHORS = tuple((anchor, rule) for rule in RULES for anchor in rule.anchors)


def rule_for(record: Record) -> Rule | None:
    """Return the rule that decides what a record means; None where it means nothing."""
    message = record.message
    for anchor, rule in _ANCHORS:
        if anchor in message and rule.matches(record):
            return rule
    return None
