"""What is read of a certificate by hand, against what a full library reads."""

import ssl
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509 as full
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from factories import CLUSTER, MOMENT, STRANGER
from lab.cluster import Authority
from vmmesh_agent.x509 import CertificateError, read_der, read_pem

LEAF, _ = CLUSTER.server_certificate(["mesh.example.com"])


def der(authority: Authority) -> bytes:
    return authority.certificate.public_bytes(Encoding.DER)


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        (datetime(1950, 1, 1, tzinfo=UTC), datetime(1999, 12, 31, 23, 59, 59, tzinfo=UTC)),
        (datetime(2000, 1, 1, tzinfo=UTC), datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC)),
        (datetime(2050, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)),
        (MOMENT, MOMENT + timedelta(seconds=1)),
    ],
)
def test_the_dates_are_read_in_both_notations(begin: datetime, end: datetime) -> None:
    certificate = read_der(der(Authority.create(not_before=begin, not_after=end)))
    assert (certificate.not_before, certificate.not_after) == (begin, end)


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP521R1()),
        rsa.generate_private_key(65537, 2048),
        ed25519.Ed25519PrivateKey.generate(),
    ],
    ids=["P-256", "P-521", "RSA", "Ed25519"],
)
def test_the_pin_is_the_digest_of_the_public_key(key: ec.EllipticCurvePrivateKey) -> None:
    certificate = (
        full.CertificateBuilder()
        .subject_name(full.Name([]))
        .issuer_name(CLUSTER.root.certificate.subject)
        .public_key(key.public_key())
        .serial_number(2**150)
        .not_valid_before(MOMENT)
        .not_valid_after(MOMENT + timedelta(days=1))
        .sign(CLUSTER.root.key, hashes.SHA256())
    )
    digest = hashes.Hash(hashes.SHA256())
    digest.update(key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    read = read_der(certificate.public_bytes(Encoding.DER))
    assert read.pin == f"sha256:{digest.finalize().hex()}"
    assert not read.is_ca


def test_a_ca_is_told_from_a_leaf() -> None:
    assert read_der(der(CLUSTER.root)).is_ca
    assert not read_pem(LEAF.decode())[0].is_ca
    assert not read_der(der(Authority.create(is_ca=False))).is_ca


def test_certificates_keep_their_order_and_their_bytes() -> None:
    text = CLUSTER.root_pem + LEAF + STRANGER.pem
    read = read_pem(text.decode())
    assert "".join(certificate.pem for certificate in read).encode() == text
    assert read[0].der == der(CLUSTER.root)


def test_crlf_and_words_between_are_no_matter() -> None:
    text = ("root:\n" + CLUSTER.root_pem.decode() + "\n# more\n" + STRANGER.pem.decode()).replace("\n", "\r\n")
    assert [certificate.der for certificate in read_pem(text)] == [der(CLUSTER.root), der(STRANGER)]


def pem(content: bytes) -> str:
    return ssl.DER_cert_to_PEM_cert(content)


BROKEN = {
    "nothing": "",
    "words": "hello",
    "a key": CLUSTER.root.key_pem.decode(),
    "a key beside it": CLUSTER.root_pem.decode() + CLUSTER.root.key_pem.decode(),
    "no end": CLUSTER.root_pem.decode().partition("-----END")[0],
    "one without an end before one with": CLUSTER.root_pem.decode().partition("-----END")[0] + STRANGER.pem.decode(),
    "trusted of OpenSSL's own kind": CLUSTER.root_pem.decode().replace("CERTIFICATE", "TRUSTED CERTIFICATE"),
    "no base64": "-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n",
    "nothing inside": "-----BEGIN CERTIFICATE-----\n\n-----END CERTIFICATE-----\n",
    "no DER": pem(b"hello"),
    "cut DER": pem(der(CLUSTER.root)[:-20]),
    "two in one block": pem(read_pem(LEAF.decode())[0].der + der(CLUSTER.root)),
    "a surrogate": "-----BEGIN CERTIFICATE-----\n\ud800\n-----END CERTIFICATE-----\n",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=list(BROKEN))
def test_what_is_no_certificate_is_said_to_be_none(text: str) -> None:
    with pytest.raises(CertificateError) as caught:
        read_pem(text)
    assert str(caught.value).isprintable()
    assert "PRIVATE KEY-----" not in str(caught.value)


def test_the_second_of_three_is_named() -> None:
    text = CLUSTER.root_pem.decode() + pem(b"hello") + STRANGER.pem.decode()
    with pytest.raises(CertificateError, match="certificate 2 of 3"):
        read_pem(text)


def test_a_damaged_certificate_is_refused_or_read_but_never_a_crash() -> None:
    whole = der(CLUSTER.root)
    for position in range(len(whole)):
        for flip in (0x01, 0x80):
            damaged = whole[:position] + bytes([whole[position] ^ flip]) + whole[position + 1 :]
            try:
                assert read_der(damaged).pin.startswith("sha256:")
            except CertificateError as error:
                assert str(error)  # noqa: PT017  # most bytes are the signature's, some are structure
