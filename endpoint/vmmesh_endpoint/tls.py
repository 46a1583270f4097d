"""The endpoint's identity: its own authority, or a certificate that the administrator gives.

The own authority lasts ten years and is what machines pin; the server certificate under it lasts ninety days
and is replaced when a third of that is left, without a restart and without a change of the pin.
"""

import hashlib
import socket
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from vmmesh_endpoint import log
from vmmesh_endpoint.errors import ConfigurationError
from vmmesh_endpoint.files import Fingerprint, fingerprint, locked, private_directory, write

CA_LIFETIME = timedelta(days=3650)
SERVER_LIFETIME = timedelta(days=90)
RENEW_BEFORE = timedelta(days=30)
BACKDATED = timedelta(hours=1)  # a machine's clock may be behind before it has been set


def pin(certificate: x509.Certificate) -> str:
    """Return `sha256:` and the hex SHA-256 of the SubjectPublicKeyInfo (RFC 7469, written as kubeadm does)."""
    public = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return f"sha256:{hashlib.sha256(public).hexdigest()}"


def default_names(listen_address: str) -> list[str]:
    """Return the host's name, its full name, and the address listened on unless that is a wildcard."""
    names = [socket.getfqdn(), socket.gethostname()]
    if not ip_address(listen_address).is_unspecified:
        names.append(listen_address)
    return list(dict.fromkeys(names))


class OwnAuthority:
    """The certificate authority and the server certificate in the state directory, made when missing.

    `ca.key` and `ca.pem` are the authority; `server.pem` holds the server's key, its certificate and the
    authority's, in one file, so that it is replaced in one step.
    """

    def __init__(self, state: Path, names: Sequence[str] = ()) -> None:
        self._state = state
        self._names = [_general_name(name) for name in names]
        self.ca_file = state / "ca.pem"
        self._ca_key = state / "ca.key"
        self._server = state / "server.pem"

    @property
    def files(self) -> tuple[Path, Path]:
        """What to load as certificate and as key."""
        return self._server, self._server

    def pins(self) -> list[str]:
        """Return the authority's pin. Raise `ConfigurationError` before the first start."""
        if not self.ca_file.exists():
            raise ConfigurationError(
                f"there is no authority in {self._state} yet", "vmmesh-endpoint serve makes it at its first start"
            )
        return [pin(certificate) for certificate in _certificates(self.ca_file)]

    def ensure(self) -> datetime:
        """Make what is missing or due, and return when the server certificate is to be renewed."""
        private_directory(self._state)
        with locked(self._server):
            key = self._authority_key()
            authority = self._authority(key)
            current = self._current(authority)
            if current is None:
                current = self._issue(key, authority)
            return current.not_valid_after_utc - RENEW_BEFORE

    def _authority_key(self) -> ec.EllipticCurvePrivateKey:
        if not self._ca_key.exists():
            write(self._ca_key, _key_pem(ec.generate_private_key(ec.SECP256R1())))
        try:
            key = serialization.load_pem_private_key(self._ca_key.read_bytes(), password=None)
        except (ValueError, TypeError) as error:
            raise ConfigurationError(f"{self._ca_key} is not a private key in PEM: {error}") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigurationError(f"{self._ca_key} is not an elliptic curve key")
        return key

    def _authority(self, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
        # Made from the key where it is missing: the pin is the key's, so a crash between the two files,
        # or the loss of this one, changes nothing for the machines.
        if not self.ca_file.exists():
            name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "vmmesh-endpoint CA")])
            now = datetime.now(UTC)
            certificate = (
                _certificate(name, name, key.public_key(), now - BACKDATED, now + CA_LIFETIME)
                .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
                .add_extension(_key_usage(signs_certificates=True), critical=True)
                .sign(key, hashes.SHA256())
            )
            write(self.ca_file, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
        authority = _certificates(self.ca_file)[0]
        if authority.public_key() != key.public_key():
            raise ConfigurationError(f"{self.ca_file} does not belong to {self._ca_key}")
        return authority

    def _current(self, authority: x509.Certificate) -> x509.Certificate | None:
        """Return the server certificate if it may stay: ours, for these names, and not due for renewal."""
        try:
            certificate = _certificates(self._server)[0]
            certificate.verify_directly_issued_by(authority)
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (OSError, ConfigurationError, ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
            return None
        due = certificate.not_valid_after_utc - RENEW_BEFORE <= datetime.now(UTC)
        return None if due or list(names) != self._names else certificate

    def _issue(self, ca_key: ec.EllipticCurvePrivateKey, authority: x509.Certificate) -> x509.Certificate:
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "vmmesh-endpoint")])
        certificate = (
            _certificate(subject, authority.subject, key.public_key(), now - BACKDATED, now + SERVER_LIFETIME)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName(self._names), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
            .sign(ca_key, hashes.SHA256())
        )
        # The authority goes along in the chain: a client that knows only the pin finds it there.
        chain = [certificate, authority]
        pem = b"".join(entry.public_bytes(serialization.Encoding.PEM) for entry in chain)
        write(self._server, _key_pem(key) + pem)
        log.info("server certificate issued", not_after=f"{certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}")
        return certificate


class GivenCertificate:
    """A certificate chain and its key, renewed by somebody else and loaded anew when the files change."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self.files = (certificate, key)

    def pins(self) -> list[str]:
        """Return the pins of the authorities in the chain, or of the certificate where it stands alone."""
        leaf, *authorities = _certificates(self.files[0])
        return [pin(certificate) for certificate in authorities or [leaf]]

    def ensure(self) -> datetime:
        """Nothing to make, and never due: the files are renewed by whoever wrote them."""
        return datetime.max.replace(tzinfo=UTC)


class ServerContext:
    """The TLS context that the server listens with; `refresh` puts a new certificate into it."""

    def __init__(self, identity: OwnAuthority | GivenCertificate, client_ca: Path | None = None) -> None:
        self._identity = identity
        self._seen: list[Fingerprint | None] = []
        self._due = datetime.min.replace(tzinfo=UTC)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        if client_ca:
            try:
                self.context.load_verify_locations(client_ca)
            except ssl.SSLError:
                raise ConfigurationError(f"{client_ca} holds no certificate in PEM") from None
            self.context.verify_mode = ssl.CERT_OPTIONAL
        try:
            self._load()
        except ssl.SSLError as error:
            names = " and ".join(map(str, identity.files))
            raise ConfigurationError(f"{names} are not a certificate and its key: {error.reason}") from None

    def refresh(self) -> None:
        """Renew and load what is due or has changed; called for each connection, and cheap when nothing is.

        Where that fails, the certificate that was loaded stays in use.
        """
        if self._fingerprints() == self._seen and datetime.now(UTC) < self._due:
            return
        try:
            self._load()
        except (OSError, ValueError, ConfigurationError) as error:  # SSLError is an OSError
            self._seen = self._fingerprints()
            self._due = datetime.now(UTC) + timedelta(minutes=1)
            log.warning("certificate not renewed, the former one stays", reason=str(error))

    def _load(self) -> None:
        due = self._identity.ensure()
        seen = self._fingerprints()
        # Tried on a context that nobody uses: a key that does not belong leaves one half loaded.
        for context in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self.context):
            context.load_cert_chain(*self._identity.files, _no_password)
        self._seen, self._due = seen, due

    def _fingerprints(self) -> list[Fingerprint | None]:
        return [fingerprint(path) for path in self._identity.files]


def _no_password() -> str:
    # Without this OpenSSL asks for one at the terminal.
    raise ConfigurationError("the private key is encrypted", "openssl pkey -in KEY -out KEY.plain")


def _certificates(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except ValueError as error:
        raise ConfigurationError(f"{path} holds no certificate in PEM: {error}") from None


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, start: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        try:
            return x509.DNSName(name)
        except ValueError:
            raise ConfigurationError(f"{name!r} is neither an address nor a DNS name") from None
