"""A pretend mesh: the keys, certificates, tokens and bundles that a real cluster would hand out.

Everything is valid by default and can be overridden, so that a test says only what is wrong:

    cluster = Cluster.create()
    cluster.bundle(token=cluster.token(audience="somebody-else"))

The keys, certificates and signatures are real. What `istioctl x workload entry configure` writes is
taken from Istio's source (istioctl/pkg/workload), as of release 1.12 and of the newest one.
"""

import base64
import hashlib
import io
import json
import re
import tarfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal, Self, cast

import jwt
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Files = dict[str, bytes]
Release = Literal["1.12", "newest"]

FILE_NAMES = ("root-cert.pem", "istio-token", "cluster.env", "mesh.yaml", "hosts")
ISSUER = "https://kubernetes.default.svc.cluster.local"
JSON_MEDIA_TYPE = "application/vnd.vmmesh.bundle.v1+json"


def now() -> datetime:
    """The moment, aware, without the fraction of a second that certificates and tokens cannot hold."""
    return datetime.now(UTC).replace(microsecond=0)


@dataclass(frozen=True)
class Authority:
    """A certificate with its key, able to sign others (or pretending that it is)."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def create(
        cls,
        organization: str = "cluster.local",
        *,
        is_ca: bool = True,
        not_before: datetime | None = None,
        not_after: datetime | None = None,
    ) -> Self:
        """Make a self-signed root as istiod does: an organization, no common name, ten years."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization)])
        start = not_before or now() - timedelta(days=1)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(not_after or start + timedelta(days=3650))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=is_ca), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        return cls(builder.sign(key, hashes.SHA256()), key)

    @property
    def pem(self) -> bytes:
        """The certificate in PEM."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """The private key in PEM (PKCS #8)."""
        return private_pem(self.key)

    def issue(
        self,
        public_key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey,
        names: Sequence[x509.GeneralName],
        *,
        common_name: str = "",
        not_before: datetime | None = None,
        not_after: datetime | None = None,
    ) -> bytes:
        """Sign a leaf certificate for `names` and return it in PEM; a day by default."""
        start = not_before or now() - timedelta(minutes=2)
        subject = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else []
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name(subject))
            .issuer_name(self.certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(not_after or now() + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            # RFC 5280, 4.2.1.6: critical where the subject is empty.
            .add_extension(x509.SubjectAlternativeName(names), critical=not subject)
        )
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@dataclass(frozen=True)
class Cluster:
    """One mesh: its root, the key that signs its service account tokens, and its names."""

    root: Authority
    token_key: rsa.RSAPrivateKey
    cluster_id: str = "Kubernetes"
    trust_domain: str = "cluster.local"
    mesh_id: str = "mesh1"
    network: str = ""
    moment: datetime | None = None  # where its clock stands still, for tests that judge at one moment

    @classmethod
    def create(
        cls,
        *,
        root: Authority | None = None,
        cluster_id: str = "Kubernetes",
        trust_domain: str = "cluster.local",
        mesh_id: str = "mesh1",
        network: str = "",
    ) -> Self:
        """Make a mesh with new keys."""
        return cls(
            root=root or Authority.create(trust_domain),
            token_key=rsa.generate_private_key(public_exponent=65537, key_size=2048),
            cluster_id=cluster_id,
            trust_domain=trust_domain,
            mesh_id=mesh_id,
            network=network,
        )

    def save(self, folder: Path) -> Path:
        """Write the keys and names into `folder`, for a stand-in that runs as another process."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "root-cert.pem").write_bytes(self.root.pem)
        (folder / "root-key.pem").write_bytes(self.root.key_pem)
        (folder / "token-key.pem").write_bytes(private_pem(self.token_key))
        names = {
            "cluster_id": self.cluster_id,
            "trust_domain": self.trust_domain,
            "mesh_id": self.mesh_id,
            "network": self.network,
        }
        (folder / "cluster.json").write_text(json.dumps(names, indent=2) + "\n")
        return folder

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        root_key = serialization.load_pem_private_key((folder / "root-key.pem").read_bytes(), None)
        token_key = serialization.load_pem_private_key((folder / "token-key.pem").read_bytes(), None)
        certificate = x509.load_pem_x509_certificate((folder / "root-cert.pem").read_bytes())
        return cls(
            root=Authority(certificate, cast("ec.EllipticCurvePrivateKey", root_key)),
            token_key=cast("rsa.RSAPrivateKey", token_key),
            **json.loads((folder / "cluster.json").read_text()),
        )

    # --- certificates -------------------------------------------------------

    @property
    def root_pem(self) -> bytes:
        """The mesh root in PEM."""
        return self.root.pem

    def server_certificate(
        self,
        names: Sequence[str],
        *,
        not_before: datetime | None = None,
        not_after: datetime | None = None,
        ca: Authority | None = None,
    ) -> tuple[bytes, bytes]:
        """Make a server's certificate and key (PEM) for DNS names and addresses, signed by the root."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (ca or self.root).issue(
            key.public_key(),
            [_server_name(name) for name in names],
            common_name=names[0],
            not_before=not_before,
            not_after=not_after,
        )
        return certificate, private_pem(key)

    def workload_certificate(
        self,
        public_key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey,
        *,
        namespace: str = "vm",
        service_account: str = "vm",
        not_before: datetime | None = None,
        not_after: datetime | None = None,
    ) -> bytes:
        """Sign a workload's certificate (PEM): a SPIFFE identity, no subject, 24 hours."""
        identity = f"spiffe://{self.trust_domain}/ns/{namespace}/sa/{service_account}"
        names = [x509.UniformResourceIdentifier(identity)]
        return self.root.issue(public_key, names, not_before=not_before, not_after=not_after)

    # --- tokens -------------------------------------------------------------

    def token(
        self,
        *,
        audience: str = "istio-ca",
        lifetime: timedelta = timedelta(hours=1),
        issued_at: datetime | None = None,
        namespace: str = "vm",
        service_account: str = "vm",
        claims: Mapping[str, Any] | None = None,
    ) -> str:
        """Make a service account token as the TokenRequest API does (RS256).

        `claims` are laid over the usual ones; a claim of `None` is left out.
        """
        issued = int((issued_at or self.moment or now()).timestamp())
        usual: dict[str, Any] = {
            "aud": [audience],
            "exp": issued + int(lifetime.total_seconds()),
            "iat": issued,
            "iss": ISSUER,
            "jti": str(uuid.uuid4()),
            "kubernetes.io": {
                "namespace": namespace,
                "serviceaccount": {"name": service_account, "uid": str(uuid.uuid4())},
            },
            "nbf": issued,
            "sub": f"system:serviceaccount:{namespace}:{service_account}",
        }
        payload = {name: value for name, value in (usual | dict(claims or {})).items() if value is not None}
        return jwt.encode(payload, self.token_key, algorithm="RS256", headers={"kid": self._key_id})

    def verify_token(self, token: str, *, audience: str = "istio-ca") -> dict[str, Any]:
        """Return the claims of a token of this cluster, or raise `jwt.InvalidTokenError`."""
        return jwt.decode(token, self.token_key.public_key(), algorithms=["RS256"], audience=audience, issuer=ISSUER)

    @property
    def _key_id(self) -> str:
        # The API server names a key by the hash of its public half.
        public = self.token_key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return base64.urlsafe_b64encode(hashlib.sha256(public).digest()).decode().rstrip("=")

    # --- the bundle ---------------------------------------------------------

    def bundle(
        self,
        *,
        token: str | None = None,
        address: str = "192.0.2.1",
        workload: str = "demo",
        namespace: str = "vm",
        service_account: str = "vm",
        revision: str = "",
        inbound_ports: str = "*",
        auto_register: bool = False,
        as_of: Release = "newest",
        environment: Mapping[str, str | None] | None = None,
        **overrides: bytes | None,
    ) -> Files:
        """Make the five files as istioctl writes them for one WorkloadGroup.

        `environment` is laid over cluster.env (`None` leaves a variable out). `overrides` replace whole
        files, named as they are or as identifiers (`root_cert_pem=b""`, `istio_token=…`); `None` leaves
        a file out. An empty `address` is the load balancer that has only a DNS name: `hosts` is empty.
        """
        istiod = f"istiod-{revision}" if revision else "istiod"
        metadata = self._proxy_metadata(workload, namespace, service_account)
        if auto_register:
            metadata["ISTIO_META_AUTO_REGISTER_GROUP"] = workload
        default_config: dict[str, Any] = {
            "discoveryAddress": f"{istiod}.istio-system.svc:15012",
            "meshId": self.mesh_id,
            "proxyMetadata": metadata,
        }
        if as_of == "1.12":  # the mesh's default configuration had a tracer until 1.21
            default_config["tracing"] = {"zipkin": {"address": "zipkin.istio-system:9411"}}
        variables: dict[str, str | None] = {
            **metadata,
            "ISTIO_INBOUND_PORTS": inbound_ports,
            "ISTIO_LOCAL_EXCLUDE_PORTS": "15090,15021,15020" if as_of == "1.12" else "22,15090,15021,15020",
            "ISTIO_NAMESPACE": namespace,
            "ISTIO_SERVICE": f"{workload}.{namespace}",
            "ISTIO_SERVICE_CIDR": "*",
            "SERVICE_ACCOUNT": service_account,
        }
        if revision:
            variables["CA_ADDR"] = default_config["discoveryAddress"]
        variables |= environment or {}
        host_name = f"{istiod}.istio-system.svc"
        files: dict[str, bytes | None] = {
            "root-cert.pem": self.root_pem,
            "istio-token": (token or self.token(namespace=namespace, service_account=service_account)).encode(),
            "cluster.env": environment_file(variables),
            "mesh.yaml": _yaml({"defaultConfig": default_config}),
            "hosts": f"{address} {host_name}\n".encode() if address else b"",
        }
        identifiers = {name.replace("-", "_").replace(".", "_"): name for name in FILE_NAMES}
        files |= {identifiers.get(name, name): content for name, content in overrides.items()}
        return {name: content for name, content in files.items() if content is not None}

    def _proxy_metadata(self, workload: str, namespace: str, service_account: str) -> dict[str, str]:
        labels = {
            "app": workload,
            "service.istio.io/canonical-name": workload,
            "service.istio.io/canonical-revision": "latest",
        }
        return {
            "CANONICAL_REVISION": "latest",
            "CANONICAL_SERVICE": workload,
            "ISTIO_METAJSON_LABELS": json.dumps(labels, separators=(",", ":"), sort_keys=True),
            "ISTIO_META_CLUSTER_ID": self.cluster_id,
            "ISTIO_META_DNS_CAPTURE": "true",
            "ISTIO_META_MESH_ID": self.mesh_id,
            "ISTIO_META_NETWORK": self.network,
            "ISTIO_META_WORKLOAD_NAME": workload,
            "POD_NAMESPACE": namespace,
            "SERVICE_ACCOUNT": service_account,
            "TRUST_DOMAIN": self.trust_domain,
        }


# --- the forms in which a bundle is delivered -------------------------------


def write_directory(files: Files, folder: Path) -> Path:
    """Write the files into `folder` as istioctl leaves them, the token's mode included: 0744."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o744)
    return folder


def as_json(
    files: Files,
    sidecar: Mapping[str, Any] | None = None,
    *,
    namespace: str = "vm",
    name: str = "demo",
    version: int = 1,
    **more: Any,
) -> bytes:
    """Wrap the files in one JSON document (media type `JSON_MEDIA_TYPE`); `more` become further keys."""
    document: dict[str, Any] = {
        "version": version,
        "workload": {"namespace": namespace, "name": name},
        "files": {file: content.decode() for file, content in files.items()},
    }
    if sidecar is not None:
        document["sidecar"] = dict(sidecar)
    return json.dumps(document | more, indent=2).encode()


def as_tar(files: Files, *, gz: bool = True, folder: str = "") -> bytes:
    """Pack the files as `tar czf` does, flat or inside one `folder`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if gz else "w") as archive:
        if folder:
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{folder}/{name}" if folder else name)
            entry.size, entry.mode = len(content), 0o744
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def as_secret(files: Files, *, namespace: str = "vm", name: str = "demo-bundle") -> bytes:
    """Put the files into a Secret as the API server prints it in JSON."""
    document = {
        "kind": "Secret",
        "apiVersion": "v1",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": str(uuid.uuid4()),
            "resourceVersion": "4711",
            "creationTimestamp": now().strftime("%Y-%m-%dT%H:%M:%SZ"),
        },
        "data": {file: base64.b64encode(content).decode() for file, content in files.items()},
        "type": "Opaque",
    }
    return json.dumps(document).encode()


def environment_file(variables: Mapping[str, str | None]) -> bytes:
    """Write sorted, shell-quoted `KEY='value'` lines; a value of `None` is left out."""
    lines = [
        "{}='{}'\n".format(key, value.replace("'", "'\"'\"'"))
        for key, value in sorted(variables.items())
        if value is not None
    ]
    return "".join(lines).encode()


def private_pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    """A private key in PEM (PKCS #8), not encrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


_PLAIN = re.compile(r"[\w.+-]+")  # what could be a bool, a number or a date without quotes


class _GoYamlDumper(yaml.SafeDumper):
    """Quotes as Go's yaml does: double quotes where a string would be read as something else."""


def _represent_string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    reads_as_text = isinstance(yaml.safe_load(text), str) if _PLAIN.fullmatch(text) else bool(text)
    style = None if reads_as_text else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_GoYamlDumper.add_representer(str, _represent_string)


def _yaml(document: Mapping[str, Any]) -> bytes:
    ordered = _in_go_order(document)
    text = yaml.dump(ordered, Dumper=_GoYamlDumper, sort_keys=False, default_flow_style=False, width=10000)
    return text.encode()


def _in_go_order(value: Any) -> Any:
    # Go's yaml puts letters after all else, so ISTIO_META_… comes before ISTIO_METAJSON_… here but not
    # in cluster.env, which is sorted by bytes.
    if not isinstance(value, Mapping):
        return value
    keys = sorted(value, key=lambda key: [(letter.isalpha(), letter) for letter in key])
    return {key: _in_go_order(value[key]) for key in keys}


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_encipherment=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        content_commitment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _server_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)
