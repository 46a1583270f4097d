"""Bundles that must not be trusted: each is refused with its reason, and nothing on the machine changes.

All are given to `bootstrap` on one machine with real systemd, as files on its disk, so that nothing but the bundle is
judged. The machine has no sidecar package to install: a bundle that is accepted ends there, with `no-package`.
"""

import base64
import gzip
import io
import json
import re
import tarfile
import zlib
from collections.abc import Callable
from datetime import timedelta

import pytest

from lab.cluster import Authority, Cluster, Files, as_json, as_secret, as_tar, now
from lab.machine import Machine
from system.refusal import BUNDLE, Trial, assert_fit_for_a_terminal, assert_refused

ACCEPTED = "no-package"
MARKER = "/tmp/marker"
# Makes the marker without a slash or a space in it, which some values may not have anyway.
PAYLOAD = "$(cd${IFS}..;cd${IFS}tmp;touch${IFS}marker)"
Maker = Callable[[Cluster], Files]
Packer = Callable[[Cluster], bytes]


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    """One mesh for all: making keys takes longer than refusing a bundle."""
    return Cluster.create()


@pytest.fixture(scope="module")
def trial(shared_machine: Machine) -> Trial:
    """The machine that all bundles are tried on."""
    return Trial(shared_machine)


def env(**variables: str | None) -> Maker:
    """A bundle whose cluster.env has these variables besides the usual ones."""
    return lambda cluster: cluster.bundle(environment=variables)


def env_lines(text: str) -> Maker:
    """A bundle whose cluster.env ends with this text."""

    def make(cluster: Cluster) -> Files:
        files = cluster.bundle()
        return files | {"cluster.env": files["cluster.env"] + text.encode()}

    return make


def mesh(text: str) -> Maker:
    """A bundle with this mesh.yaml."""
    return lambda cluster: cluster.bundle(mesh_yaml=text.encode())


def hosts(text: str, mesh_yaml: str = "") -> Maker:
    """A bundle with this hosts file, and perhaps another mesh.yaml."""

    def make(cluster: Cluster) -> Files:
        files = cluster.bundle(hosts=text.encode())
        return files | ({"mesh.yaml": mesh_yaml.encode()} if mesh_yaml else {})

    return make


def hosts_beside(text: str) -> Maker:
    """A bundle whose hosts file says where istiod is, and then this."""
    return hosts(f"192.0.2.1 istiod.istio-system.svc\n{text}\n")


def raw_token(header: str, claims: str) -> Maker:
    """A bundle whose token has these parts and a signature that nobody checks here."""
    parts = [base64.urlsafe_b64encode(part.encode()).decode().rstrip("=") for part in (header, claims)]
    return lambda cluster: cluster.bundle(token=".".join([*parts, "c2lnbmF0dXJl"]))


def _discovery(address: str) -> str:
    return f"defaultConfig:\n  discoveryAddress: {address}\n"


def _merge_bomb() -> str:
    levels = (f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
    return "a0: &a0 {k: v}\n" + "".join(levels) + "defaultConfig: {}\n"


def _billion_laughs() -> str:
    levels = (f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
    return "a0: &a0 lol\n" + "".join(levels) + "defaultConfig: {proxyMetadata: *a9}\n"


# What is wrong → the bundle, the code, and what the message or the hint must name.
FILES: dict[str, tuple[Maker, str, tuple[str, ...]]] = {
    # --- the token
    "token that expired": (
        lambda c: c.bundle(token=c.token(issued_at=now() - timedelta(hours=3))),
        "token-expired",
        ("istio-token", "expired at", "timedatectl"),
    ),
    "token not yet valid": (
        lambda c: c.bundle(token=c.token(issued_at=now() + timedelta(hours=3))),
        "token-not-yet-valid",
        ("istio-token", "valid only from", "timedatectl"),
    ),
    "token for another audience": (
        lambda c: c.bundle(token=c.token(audience="kubernetes")),
        "token-wrong-audience",
        ("kubernetes", "istio-ca"),
    ),
    "token without expiry": (
        lambda c: c.bundle(token=c.token(claims={"exp": None})),
        "token-without-expiry",
        ("istio-token", "exp"),
    ),
    "token without signature": (
        raw_token('{"alg":"none"}', '{"aud":["istio-ca"],"exp":9999999999}'),
        "token-not-signed",
        ("istio-token", "not signed"),
    ),
    "token for another namespace": (
        lambda c: c.bundle(token=c.token(namespace="other")),
        "token-wrong-namespace",
        ("'other'", "'vm'"),
    ),
    "token for another service account": (
        lambda c: c.bundle(token=c.token(service_account="admin")),
        "token-wrong-service-account",
        ("'admin'", "'vm'"),
    ),
    "token that is no JWT": (lambda c: c.bundle(token="hunter2"), "token-not-jwt", ("istio-token", "three parts")),
    "token that is no base64": (lambda c: c.bundle(token="a.b.c"), "token-not-jwt", ("istio-token",)),
    "token with a number of 5000 digits": (
        raw_token('{"alg":"RS256"}', f'{{"aud":["istio-ca"],"exp":{"9" * 5000}}}'),
        "token-not-jwt",
        ("istio-token",),
    ),
    "token nested deeply": (raw_token('{"alg":"RS256"}', "[" * 40000), "token-not-jwt", ("istio-token",)),
    # --- the root certificate
    "root certificate that is no CA": (
        lambda c: c.bundle(root_cert_pem=Authority.create(is_ca=False).pem),
        "root-cert-not-ca",
        ("root-cert.pem", "no CA"),
    ),
    "server certificate as root": (
        lambda c: c.bundle(root_cert_pem=c.server_certificate(["istiod.istio-system.svc"])[0]),
        "root-cert-not-ca",
        ("root-cert.pem", "no CA"),
    ),
    "root that expired": (
        lambda c: c.bundle(
            root_cert_pem=Authority.create(
                not_before=now() - timedelta(days=9), not_after=now() - timedelta(days=2)
            ).pem
        ),
        "root-cert-not-in-date",
        ("root-cert.pem", "expired at", "timedatectl"),
    ),
    "root not yet valid": (
        lambda c: c.bundle(root_cert_pem=Authority.create(not_before=now() + timedelta(days=2)).pem),
        "root-cert-not-in-date",
        ("root-cert.pem", "valid only from"),
    ),
    "root that is no PEM": (lambda c: c.bundle(root_cert_pem=b"hello"), "root-cert-invalid", ("root-cert.pem",)),
    "root of garbage in PEM": (
        lambda c: c.bundle(root_cert_pem=b"-----BEGIN CERTIFICATE-----\nZ2FyYmFnZQ==\n-----END CERTIFICATE-----\n"),
        "root-cert-invalid",
        ("root-cert.pem", "certificate 1 of 1"),
    ),
    "root cut off": (lambda c: c.bundle(root_cert_pem=c.root_pem[:-40]), "root-cert-invalid", ("root-cert.pem",)),
    "root of bytes that are no text": (lambda c: c.bundle(root_cert_pem=b"\xff\xfe"), "file-not-text", ("UTF-8",)),
    "private key in the root file": (
        lambda c: c.bundle(root_cert_pem=c.root_pem + c.root.key_pem),
        "root-cert-invalid",
        ("root-cert.pem", "PRIVATE KEY"),
    ),
    # --- the files as such
    "token missing": (lambda c: c.bundle(istio_token=None), "file-missing", ("istio-token",)),
    "cluster.env empty": (lambda c: c.bundle(cluster_env=b"\n"), "file-empty", ("cluster.env",)),
    "cluster.env of a megabyte": (
        lambda c: c.bundle(cluster_env=b"A='" + b"x" * 1024**2 + b"'\n"),
        "file-too-large",
        ("cluster.env", "KiB"),
    ),
    # --- mesh.yaml
    "mesh.yaml with a tag of Python": (
        mesh(f"defaultConfig: !!python/object/apply:os.system ['touch {MARKER}']\n"),
        "mesh-malformed",
        ("mesh.yaml", "line 1"),
    ),
    "mesh.yaml with a tag of its own": (mesh("defaultConfig: !thing {}\n"), "mesh-malformed", ("mesh.yaml", "line 1")),
    **{
        f"mesh.yaml with the tag {tag}": (mesh(f"defaultConfig:\n  a: {tag}\n"), "mesh-malformed", ("mesh.yaml",))
        for tag in ('!!int ""', '!!float ""', '!!bool "x"', '!!timestamp "x"', "!!str {a: b}", "!%1b[31mred")
    },
    "mesh.yaml of two documents": (
        mesh("defaultConfig: {}\n---\ndefaultConfig: {}\n"),
        "mesh-malformed",
        ("mesh.yaml",),
    ),
    "mesh.yaml of a billion laughs": (mesh(_billion_laughs()), "mesh-malformed", ("mesh.yaml",)),
    "mesh.yaml with a bomb of merges": (mesh(_merge_bomb()), "mesh-malformed", ("mesh.yaml",)),
    "mesh.yaml of nested lists": (mesh("[" * 100_000), "mesh-malformed", ("mesh.yaml",)),
    "mesh.yaml of nested mappings": (mesh("defaultConfig: " + "{a: " * 100_000), "mesh-malformed", ("mesh.yaml",)),
    "mesh.yaml with a key twice": (
        mesh("defaultConfig: {}\ndefaultConfig: {}\n"),
        "mesh-malformed",
        ("mesh.yaml", "line 2", "defaultConfig"),
    ),
    "mesh.yaml that is no mapping": (mesh("- a\n- b\n"), "mesh-malformed", ("mesh.yaml", "defaultConfig")),
    "mesh.yaml without defaultConfig": (mesh("mesh: {}\n"), "mesh-malformed", ("mesh.yaml", "defaultConfig")),
    "mesh.yaml with a tab": (mesh("defaultConfig:\n\ta: b\n"), "mesh-malformed", ("mesh.yaml", "line 2")),
    **{
        f"discoveryAddress {address}": (mesh(_discovery(address)), "mesh-malformed", ("mesh.yaml", "host:port"))
        for address in ("istiod.istio-system.svc", "istiod:99999", "istiod:0", '""', "[1]", "'$(id):15012'", "'a b:1'")
    },
    # --- hosts
    **{
        f"hosts naming {name}": (hosts_beside(f"192.0.2.1 {name}"), "hosts-foreign-name", ("hosts", repr(name)))
        for name in ("localhost", "vm3", "www.example.com", "ip6-localhost", "sub.localhost", "istiod.example.com")
    },
    "hosts naming what mesh.yaml calls istiod": (
        hosts("192.0.2.1 updates.example.com\n", _discovery("updates.example.com:15012")),
        "hosts-foreign-name",
        ("hosts", "'updates.example.com'"),
    ),
    **{
        f"hosts with the address {address!r}": (
            hosts_beside(f"{address} istiod.istio-system.svc"),
            "hosts-malformed",
            ("hosts: line 2",),
        )
        for address in ("mesh", "0.0.0.0", "::", "224.0.0.1", "fe80::1", "2001:db8::1%\x1b[31m", "fe80::1%\x1b[31m")
    },
    "hosts with an address alone": (hosts_beside("192.0.2.1"), "hosts-malformed", ("hosts: line 2",)),
    "hosts with a name of no resolver": (hosts_beside("192.0.2.1 a/b"), "hosts-malformed", ("hosts: line 2",)),
    "hosts empty and istiod unknown": (
        hosts(""),
        "istiod-not-found",
        ("istiod.istio-system.svc", "--ingressIP"),
    ),
}

# What a shell would do with it → a bundle with it in cluster.env. Each would make the marker, sooner or later.
HOSTILE: dict[str, Maker] = {
    "a substitution without quotes": env_lines(f"A={PAYLOAD}\n"),
    "a substitution in double quotes": env_lines(f'A="{PAYLOAD}"\n'),
    "backquotes": env_lines(f"A=`touch {MARKER}`\n"),
    "backquotes in double quotes": env_lines(f'A="`touch {MARKER}`"\n'),
    "a second command": env_lines(f"A='x'; touch {MARKER}\n"),
    "a second command behind a quote": env_lines(f"A='x';touch${{IFS}}{MARKER}\n"),
    "a command in place of a variable": env_lines(f"touch {MARKER}\n"),
    "a prefix of a command": env_lines(f"A='x' touch {MARKER}\n"),
    "a value over two lines": env_lines(f"A='x\ntouch {MARKER}\n'\n"),
    "an unclosed quote": env_lines("A='x\n"),
    "a process substitution": env_lines(f"A=<(touch {MARKER})\n"),
    "ANSI quotes": env_lines("A=$'\\x24\\x28id\\x29'\n"),
    "an array": env_lines(f"A[$(touch {MARKER})]='x'\n"),
    "an appended value": env_lines("ISTIO_SERVICE+='x'\n"),
    "export": env_lines("export A='x'\n"),
    "a carriage return": env_lines("A='x\ry'\n"),
    "a NUL": env_lines("A='x\0y'\n"),
    "a function for bash": env_lines(f"BASH_FUNC_hostname%%='() {{ touch {MARKER}; }}'\n"),
    "a key twice": env_lines("ISTIO_NAMESPACE='vm'\n"),
    **{
        f"{name}={value}": env(**{name: value})
        for name, value in {
            "LD_PRELOAD": "/tmp/evil.so",
            "ld_preload": "/tmp/evil.so",
            "LD_AUDIT": "/tmp/evil.so",
            "PATH": "/tmp:/usr/bin",
            "Path": "/tmp:/usr/bin",
            "BASH_ENV": "/tmp/evil.sh",
            "ENV": "/tmp/evil.sh",
            "PS4": PAYLOAD,
            "SHELLOPTS": "xtrace",
            "IFS": "/",
            "EXEC_USER": "root",
            "USER": "istio-proxy",
            "ISTIO_AGENT_FLAGS": f"; touch {MARKER}",
            "ISTIO_BIN_BASE": "/tmp",
            "ISTIO_LOG_DIR": "/etc",
            "ISTIO_SIDECAR_CONFIG": "/tmp/evil.env",
            "ISTIO_CUSTOM_IP_TABLES": "true",
            "PYTHONSTARTUP": "/tmp/evil.py",
            "SUDO_ASKPASS": "/tmp/evil",
            "GCONV_PATH": "/tmp",
            "XTABLES_LIBDIR": "/tmp",
            "http_proxy": "http://192.0.2.66:3128",
            "HTTPS_PROXY": "http://192.0.2.66:3128",
            "all_proxy": "http://192.0.2.66:3128",
            "SSL_CERT_FILE": "/tmp/evil.pem",
            "ISTIO_INBOUND_INTERCEPTION_MODE": "TPROXY",
            "ISTIO_SVC_IP": f"192.0.2.11{PAYLOAD}",
            "ISTIO_SVC_IP ": "192.0.2.11",
            "CA_ADDR": f"[fe80::1%{PAYLOAD}]:15012",
            "ISTIO_SERVICE_CIDR": f"*;{PAYLOAD}",
            "ISTIO_INBOUND_PORTS": f"80{PAYLOAD}",
            "ISTIO_LOCAL_EXCLUDE_PORTS": "22,99999",
            "ISTIO_SERVICE": f"demo.vm{PAYLOAD}",
            "PROV_CERT": "/tmp",
            "OUTPUT_CERTS": "/etc",
            "PROXY_UID": "0",
        }.items()
    },
    # An IPv6 address may name a zone, and a zone may be any text.
    "shell in the zone of ISTIO_SVC_IP": env(ISTIO_SVC_IP=f"fe80::1%{PAYLOAD}"),
    "shell in ISTIO_NAMESPACE": env(ISTIO_NAMESPACE=f"vm{PAYLOAD}", POD_NAMESPACE=f"vm{PAYLOAD}"),
    "shell in POD_NAME": env(POD_NAME=f"vm1{PAYLOAD}"),
    "shell in TRUST_DOMAIN": env(TRUST_DOMAIN=PAYLOAD),
}


@pytest.mark.parametrize("wrong", FILES)
def test_a_bundle_with_one_fault_is_refused_and_changes_nothing(wrong: str, cluster: Cluster, trial: Trial) -> None:
    make, code, fragments = FILES[wrong]
    refusal = trial.bootstrap(trial.give_bundle(make(cluster)))
    assert_refused(refusal, code, "the bundle was refused", *fragments)
    assert trial.changes() == []


@pytest.mark.parametrize("wrong", HOSTILE)
def test_a_cluster_env_that_would_run_something_is_refused_and_runs_nothing(
    wrong: str, cluster: Cluster, trial: Trial
) -> None:
    refusal = trial.bootstrap(trial.give_bundle(HOSTILE[wrong](cluster)))
    assert_refused(refusal, refusal.code, "cluster.env: line")
    assert "cluster-env-refused" in {refusal.code, *refusal.problems}
    assert trial.changes() == []
    assert trial.machine.run(["test", "-e", MARKER], check=False).returncode == 1


def test_the_payload_of_these_tests_does_make_the_marker_where_a_shell_reads_it(shared_machine: Machine) -> None:
    shared_machine.run(["bash", "-c", f"A={PAYLOAD}"])
    assert shared_machine.run(["rm", MARKER]).returncode == 0


def test_text_that_only_looks_like_shell_is_taken_as_text(cluster: Cluster, trial: Trial) -> None:
    labels = '{"app":"demo","note":"it\'s `$HOME` & $(id); \\"so\\""}'
    refusal = trial.bootstrap(trial.give_bundle(cluster.bundle(environment={"ISTIO_METAJSON_LABELS": labels})))
    assert_refused(refusal, ACCEPTED)
    assert trial.changes() == []


def test_all_problems_of_a_bundle_are_told_at_once(cluster: Cluster, trial: Trial) -> None:
    files = cluster.bundle(
        token=cluster.token(audience="kubernetes", issued_at=now() - timedelta(hours=3)),
        environment={"LD_PRELOAD": "/tmp/evil.so", "ISTIO_SVC_IP": "x"},
        root_cert_pem=b"hello",
        mesh_yaml=b"[]",
        hosts=b"192.0.2.1 localhost\nmesh\n",
    )
    refusal = trial.bootstrap(trial.give_bundle(files))
    assert_refused(refusal, "bundle-refused", "LD_PRELOAD", "ISTIO_SVC_IP")
    assert refusal.problems >= {
        "root-cert-invalid",
        "token-wrong-audience",
        "token-expired",
        "cluster-env-refused",
        "mesh-malformed",
        "hosts-malformed",
    }
    assert trial.changes() == []


def test_a_bundle_for_another_workload_than_configured_is_refused(cluster: Cluster, trial: Trial) -> None:
    url = trial.give_bundle(cluster.bundle())
    refusal = trial.bootstrap(url, workload_group={"namespace": "vm", "name": "other"})
    assert_refused(refusal, "wrong-workload", "vm/demo", "vm/other", "workload_group")
    assert trial.changes() == []


@pytest.mark.parametrize("address", ["192.0.2.1:15012", "'[2001:db8::1]:15012'"])
def test_an_empty_hosts_file_is_accepted_where_istiod_has_an_address(
    address: str, cluster: Cluster, trial: Trial
) -> None:
    refusal = trial.bootstrap(trial.give_bundle(hosts("", _discovery(address))(cluster)))
    assert_refused(refusal, ACCEPTED)
    assert trial.changes() == []


def test_an_empty_hosts_file_is_accepted_with_a_note_where_this_machine_finds_istiod(
    cluster: Cluster, trial: Trial
) -> None:
    # Its own name is one that each machine resolves without DNS.
    refusal = trial.bootstrap(trial.give_bundle(hosts("", _discovery("localhost:15012"))(cluster)))
    assert_refused(refusal, ACCEPTED)
    assert "hosts does not name localhost" in refusal.stdout
    assert trial.changes() == []


# --- the forms in which a bundle comes ---------------------------------------


def _tar_with(name: str, kind: bytes = tarfile.REGTYPE, *, size: int = 0, target: str = "") -> Packer:
    """A sound tar, and one entry more."""

    def pack(cluster: Cluster) -> bytes:
        buffer = io.BytesIO(as_tar(cluster.bundle(), gz=False))
        with tarfile.open(fileobj=buffer, mode="a") as archive:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.size = kind, target, size
            archive.addfile(entry, io.BytesIO(b"\0" * size))
        return buffer.getvalue()

    return pack


def _sparse_giant(cluster: Cluster) -> bytes:
    """A tar whose entry claims a terabyte of holes (PAX, GNU.sparse 1.0) and holds a block."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        entry = tarfile.TarInfo("GNUSparseFile.0/cluster.env")
        entry.pax_headers = {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": "cluster.env",
            "GNU.sparse.realsize": str(1024**4),
        }
        content = b"1\n0\n512\n".ljust(512, b"\0") + b"x" * 512
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue() + as_tar(cluster.bundle(), gz=False)


def _gzip_bomb(_cluster: Cluster) -> bytes:
    return gzip.compress(b"\0" * (64 * 1024**2), 9)


def _document(**changes: object) -> Packer:
    return lambda cluster: json.dumps(json.loads(as_json(cluster.bundle())) | changes).encode()


def _secret(change: Callable[[dict[str, str]], object]) -> Packer:
    def pack(cluster: Cluster) -> bytes:
        document = json.loads(as_secret(cluster.bundle()))
        change(document["data"])
        return json.dumps(document).encode()

    return pack


def _packages(**changes: object) -> Packer:
    package = {"format": "rpm", "arch": "x86_64", "url": "https://192.0.2.1/a.rpm", "sha256": "0" * 64}
    return _document(sidecar={"version": "1.28.2", "packages": [package | changes]})


# What is wrong → the bytes, the code, and what the message must name.
FORMS: dict[str, tuple[Packer, str, tuple[str, ...]]] = {
    "nothing": (lambda _: b"", "bundle-unknown-format", ("it is empty",)),
    "a login page": (lambda _: b"<!DOCTYPE html><title>Log in</title>", "bundle-unknown-format", ("login",)),
    "control sequences": (lambda _: b"\x1b]0;owned\x07\x1b[2J", "bundle-unknown-format", ()),
    "a list": (lambda _: b"[1, 2]", "bundle-unknown-format", ()),
    "half a document": (lambda c: as_json(c.bundle())[:500], "bundle-malformed", ("line",)),
    "version 2": (_document(version=2), "bundle-unknown-version", ("2", "update the agent")),
    "version true": (_document(version=True), "bundle-unknown-version", ()),
    "a version of 5000 digits": (lambda _: b'{"version": ' + b"1" * 5000 + b"}", "bundle-malformed", ()),
    "files that are a list": (_document(files=[]), "bundle-malformed", ("files",)),
    "a file that is a number": (_document(files={"hosts": 1}), "bundle-malformed", ("hosts",)),
    "lone surrogates": (_document(files={"hosts": "\ud800"}), "bundle-malformed", ("hosts",)),
    "a document nested deeply": (lambda _: b'{"a": ' + b"[" * 200_000, "bundle-malformed", ("nested",)),
    "a key twice": (lambda _: b'{"version": 1, "version": 1, "files": {}}', "bundle-malformed", ("'version'",)),
    "5 MiB": (lambda _: b'{"a": "' + b"x" * (5 * 1024**2) + b'"}', "bundle-too-large", ("4 MiB",)),
    "another workload than it says": (
        _document(workload={"namespace": "vm", "name": "other"}),
        "wrong-workload",
        ("vm/demo", "vm/other"),
    ),
    "a ConfigMap": (
        lambda c: json.dumps(json.loads(as_secret(c.bundle())) | {"kind": "ConfigMap"}).encode(),
        "bundle-unknown-format",
        ("ConfigMap", "Secret"),
    ),
    "a Secret without a token": (_secret(lambda data: data.pop("istio-token")), "file-missing", ("istio-token",)),
    "a Secret with bad base64": (
        _secret(lambda data: data.update({"hosts": "%%%"})),
        "bundle-malformed",
        ("hosts", "base64"),
    ),
    "a tar cut off in a file": (lambda c: as_tar(c.bundle(), gz=False)[:1000], "bundle-truncated", ()),
    "a tar cut off between two files": (lambda c: as_tar(c.bundle(), gz=False)[:1536], "bundle-truncated", ()),
    "a gzip cut off": (lambda c: as_tar(c.bundle())[:-20], "bundle-truncated", ("too early",)),
    "a gzip that is damaged": (lambda c: as_tar(c.bundle())[:60] + b"\xff" * 60, "bundle-malformed", ("gzip",)),
    "a gzip of no tar": (lambda _: gzip.compress(b"hello"), "bundle-truncated", ()),
    "a gzip bomb": (_gzip_bomb, "bundle-too-large", ("4 MiB",)),
    "a gzip bomb in a gzip bomb": (
        lambda c: zlib.compress(gzip.compress(_gzip_bomb(c)), wbits=31),
        "bundle-truncated",
        (),
    ),
    "a tar that leads out": (_tar_with("../hosts"), "bundle-hostile-archive", ("'../hosts'",)),
    "a tar that leads out in the middle": (_tar_with("a/../../hosts"), "bundle-hostile-archive", ()),
    "a tar with an absolute name": (_tar_with("/etc/passwd"), "bundle-hostile-archive", ("'/etc/passwd'",)),
    "a tar with a symbolic link": (
        _tar_with("x", tarfile.SYMTYPE, target="/etc/shadow"),
        "bundle-hostile-archive",
        ("link",),
    ),
    "a tar with a hard link": (
        _tar_with("x", tarfile.LNKTYPE, target="hosts"),
        "bundle-hostile-archive",
        ("link",),
    ),
    "a tar with a device": (_tar_with("x", tarfile.CHRTYPE), "bundle-hostile-archive", ("device",)),
    "a tar with a block device": (_tar_with("x", tarfile.BLKTYPE), "bundle-hostile-archive", ("device",)),
    "a tar with a pipe": (_tar_with("x", tarfile.FIFOTYPE), "bundle-hostile-archive", ("pipe",)),
    "a tar with a file twice": (_tar_with("hosts", size=3), "bundle-ambiguous", ("'hosts'",)),
    "a tar with a file in another folder": (_tar_with("other/hosts", size=3), "bundle-ambiguous", ()),
    "a tar with a sparse giant": (_sparse_giant, "bundle-too-large", ("cluster.env",)),
    "a tar with control sequences in a name": (_tar_with("../\x1b[31m"), "bundle-hostile-archive", ()),
    "a package without digest": (_packages(sha256=""), "package-without-digest", ()),
    "a package over http": (_packages(url="http://192.0.2.1/a.rpm"), "package-not-https", ("http://192.0.2.1",)),
    "a package of negative size": (_packages(size=-1), "bundle-malformed", ("size",)),
}


@pytest.mark.parametrize("wrong", FORMS)
def test_what_is_no_sound_bundle_is_refused_and_changes_nothing(wrong: str, cluster: Cluster, trial: Trial) -> None:
    pack, code, fragments = FORMS[wrong]
    path = trial.give("bundle.file", pack(cluster))
    refusal = trial.bootstrap(f"file://{path}")
    assert_refused(refusal, code, "the bundle was refused", *fragments)
    assert trial.changes() == []


# Where an endpoint may put text of its own: none of it may reach root's terminal as it is.
WILD = "\x1b]0;owned\x07\x1b[31m\u202e"
DECORATED: dict[str, Packer] = {
    "workload": _document(workload={"namespace": WILD, "name": WILD}),
    "sidecar version": _document(
        sidecar={
            "version": WILD,
            "packages": [{"format": "rpm", "arch": "x86_64", "url": "https://192.0.2.1/a", "sha256": "0" * 64}],
        }
    ),
    "package format": _packages(format=WILD),
    "package architecture": _packages(arch=WILD),
    "package address": _packages(url=f"https://192.0.2.1/{WILD}", arch="s390x"),
    "kind": _document(kind=WILD),
}


@pytest.mark.parametrize("where", DECORATED)
def test_control_sequences_of_the_endpoint_never_reach_the_terminal(where: str, cluster: Cluster, trial: Trial) -> None:
    path = trial.give("bundle.file", DECORATED[where](cluster))
    refusal = trial.bootstrap(f"file://{path}", timeout=3)
    assert_fit_for_a_terminal(refusal.output)
    assert refusal.status == 1
    assert refusal.code
    assert trial.changes() == []


def test_verify_says_the_same_and_names_all_problems_in_json(cluster: Cluster, trial: Trial) -> None:
    trial.give_bundle(cluster.bundle(root_cert_pem=b"hello", hosts=b"192.0.2.1 istiod.istio-system.svc\nmesh\n"))
    said = trial.run(["vmmesh-agent", "verify", "--output=json", BUNDLE])
    document = json.loads(said.stdout)
    assert said.status == 1
    assert document["accepted"] is False
    assert {problem["code"] for problem in document["problems"]} == {"root-cert-invalid", "hosts-malformed"}
    assert trial.changes() == []


def test_a_token_never_shows_in_what_is_said_about_it(cluster: Cluster, trial: Trial) -> None:
    token = cluster.token(issued_at=now() - timedelta(hours=3))
    refusal = trial.bootstrap(trial.give_bundle(cluster.bundle(token=token)))
    assert_refused(refusal, "token-expired")
    for part in re.split(r"\.", token):
        assert part not in refusal.output
        assert part.encode() not in trial.machine.read("/run/vmmesh-agent/status.json")
