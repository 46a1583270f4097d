"""The few facts of an X.509 certificate that the agent needs, by the standard library alone.

`ssl` says whether a certificate parses and is a CA; it does not give a leaf's dates or its public key, so those
are read from the DER: Certificate → TBSCertificate → [version] serial algorithm issuer validity subject
subjectPublicKeyInfo (RFC 5280, section 4.1).
"""

import hashlib
import os
import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

_PEM = re.compile(r"-----BEGIN CERTIFICATE-----\s.*?-----END CERTIFICATE-----", re.DOTALL)
_PEM_LABEL = re.compile(r"-----BEGIN ([^-]*)-----")
_UTC_TIME, _VERSION_0 = 0x17, 0xA0


class CertificateError(ValueError):
    """The text or bytes are not a certificate; the message says why."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """One certificate. The times are aware and in UTC; `pin` is `sha256:<hex>` of its SubjectPublicKeyInfo."""

    der: bytes
    not_before: datetime
    not_after: datetime
    pin: str
    is_ca: bool

    @property
    def pem(self) -> str:
        return ssl.DER_cert_to_PEM_cert(self.der)


def read_pem(text: str) -> list[Certificate]:
    """Return the certificates of a PEM text in their order; anything else between the marks is an error."""
    labels = _PEM_LABEL.findall(text)
    if foreign := [label for label in labels if label != "CERTIFICATE"]:
        raise CertificateError(f"it holds a block {foreign[0]!r}; only certificates belong there")
    blocks = _PEM.findall(text)
    if not blocks:
        raise CertificateError("no PEM certificate is in it")
    if len(blocks) != len(labels):
        raise CertificateError("a certificate in it has no end")
    return list(_certificates(blocks))


def _certificates(blocks: list[str]) -> Iterator[Certificate]:
    for number, block in enumerate(blocks, start=1):
        try:
            yield read_der(ssl.PEM_cert_to_DER_cert(block))
        except ValueError as error:
            raise CertificateError(f"certificate {number} of {len(blocks)} does not parse: {error}") from None


def read_der(der: bytes) -> Certificate:
    """Read one certificate from its DER."""
    store = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        store.load_verify_locations(cadata=der)
    except (ssl.SSLError, ValueError) as error:  # ValueError: nothing at all
        raise CertificateError(getattr(error, "reason", "") or "not a certificate") from None
    try:
        return _read_fields(der, is_ca=store.cert_store_stats()["x509_ca"] == 1)
    except (ValueError, IndexError) as error:
        raise CertificateError(f"its fields are not those of a certificate: {error}") from None


def _read_fields(der: bytes, *, is_ca: bool) -> Certificate:
    begin, end = _content(der, 0)
    if end != len(der):
        raise ValueError("bytes follow it")
    fields = _children(der, *_content(der, begin))
    if der[fields[0][0]] == _VERSION_0:
        del fields[0]
    _serial, _algorithm, _issuer, validity, _subject, public_key = fields[:6]
    not_before, not_after = _children(der, *_content(der, validity[0]))
    return Certificate(
        der=der,
        not_before=_time(der, not_before[0]),
        not_after=_time(der, not_after[0]),
        pin="sha256:" + hashlib.sha256(der[public_key[0] : public_key[1]]).hexdigest(),
        is_ca=is_ca,
    )


def load_chain(context: ssl.SSLContext, *pem: bytes) -> None:
    """Give a context a certificate chain and its key, PEM. Raise `ssl.SSLError` where they do not fit.

    OpenSSL takes them from a file alone: one in memory, which ends with this call.
    """
    descriptor = os.memfd_create("chain")
    try:
        os.write(descriptor, b"\n".join(pem))
        context.load_cert_chain(f"/proc/self/fd/{descriptor}", password=lambda: "")
    finally:
        os.close(descriptor)


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext) -> None:
    """Let two contexts agree on a connection in memory. Raise `ssl.SSLError` where one distrusts the other."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    while ends:
        for end in list(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue  # the other end speaks next
            ends.remove(end)


def _content(der: bytes, start: int) -> tuple[int, int]:
    """Return where the content of the element at `start` begins and ends. OpenSSL has parsed it before."""
    length = der[start + 1]
    begin = start + 2
    if length & 0x80:
        begin += length & 0x7F
        length = int.from_bytes(der[start + 2 : begin], "big")
    return begin, begin + length


def _children(der: bytes, begin: int, end: int) -> list[tuple[int, int]]:
    """Return where each element between `begin` and `end` starts and ends."""
    elements = []
    while begin < end:
        _, after = _content(der, begin)
        elements.append((begin, after))
        begin = after
    return elements


def _time(der: bytes, start: int) -> datetime:
    begin, end = _content(der, start)
    text = der[begin:end].decode("ascii")
    if der[start] == _UTC_TIME:  # two digits of the year: 50 and above are the last century's
        text = ("19" if int(text[:2]) >= 50 else "20") + text
    year, month, day = int(text[:4]), int(text[4:6]), int(text[6:8])
    # DER has always the seconds, and always Zulu.
    return datetime(year, month, day, int(text[8:10]), int(text[10:12]), int(text[12:14]), tzinfo=UTC)
