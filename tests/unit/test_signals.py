"""What the machine shows, judged; and the sidecar's own certificate, judged by OpenSSL itself."""

from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from factories import CLUSTER, MOMENT, STRANGER
from lab.cluster import private_pem
from vmmesh_agent import x509
from vmmesh_agent.health import Condition, Severity
from vmmesh_agent.signals import (
    Expected,
    OwnCertificate,
    Signals,
    captures_by_itself,
    conditions,
    own_certificate,
    sharpened,
)

ISTIOD = "istiod.istio-system.svc"
HOUR = timedelta(hours=1)
SOUND = Signals(
    certificate=OwnCertificate(MOMENT - HOUR, MOMENT + 23 * HOUR, is_trusted=True),
    certificate_not_after=MOMENT + 23 * HOUR,
    token=CLUSTER.token().encode(),
    is_captured=True,
    envoy_answers=True,
    agent_answers=True,
    istiod_addresses=("192.0.2.1",),
    log_space=10**10,
    log_size=10**6,
)
EXPECTED = Expected(ISTIOD, ("192.0.2.1",), timedelta(seconds=1))


def changed(**changes: object) -> Signals:
    fields = {name: getattr(SOUND, name) for name in SOUND.__slots__}
    return Signals(**(fields | changes))


def codes(signals: Signals, expected: Expected = EXPECTED, *, is_running: bool = True) -> dict[str, Severity]:
    return {each.code: each.severity for each in conditions(signals, expected, is_running=is_running, now=MOMENT)}


def certificate(*, begins: timedelta, ends: timedelta, trusted: bool = True) -> dict[str, object]:
    own = OwnCertificate(MOMENT + begins, MOMENT + ends, is_trusted=trusted)
    return {"certificate": own, "certificate_not_after": own.not_after}


def test_of_a_sound_machine_nothing_is_said() -> None:
    assert codes(SOUND) == {}


def test_what_could_not_be_seen_is_no_failure() -> None:
    assert codes(Signals()) == {}


@pytest.mark.parametrize(
    ("changes", "code", "severity"),
    [
        ({"token": b""}, "token_missing", Severity.DEGRADED),
        ({"is_captured": False}, "iptables_failed", Severity.DEGRADED),
        ({"envoy_answers": False}, "envoy_silent", Severity.FAILED),
        ({"agent_answers": False}, "agent_silent", Severity.DEGRADED),
        ({"istiod_addresses": ()}, "dns_unresolved", Severity.DEGRADED),
        ({"istiod_addresses": ("192.0.2.1", "203.0.113.9")}, "istiod_address_mismatch", Severity.DEGRADED),
        ({"log_space": 10**6}, "disk_full", Severity.DEGRADED),
        ({"log_size": 2 * 1024**3}, "logs_large", Severity.NOTE),
        (certificate(begins=-25 * HOUR, ends=-HOUR), "cert_expired", Severity.FAILED),
        (certificate(begins=-HOUR, ends=HOUR * 23, trusted=False), "root_cert_mismatch", Severity.DEGRADED),
        (certificate(begins=-20 * HOUR, ends=4 * HOUR), "renewal_overdue", Severity.DEGRADED),
        ({"certificate": None, "certificate_not_after": MOMENT - HOUR}, "cert_expired", Severity.FAILED),
    ],
)
def test_each_fault_is_said_alone(changes: dict[str, object], code: str, severity: Severity) -> None:
    assert codes(changed(**changes)) == {code: severity}


def test_a_certificate_that_is_renewed_in_time_is_not_overdue() -> None:
    assert codes(changed(**certificate(begins=-12 * HOUR, ends=12 * HOUR))) == {}
    # istiod lets certificates begin two minutes ago, which short ones feel
    assert codes(changed(**certificate(begins=-timedelta(minutes=2), ends=timedelta(seconds=16)))) == {}


def test_the_forecast_says_when_the_vm_drops_out_and_that_the_token_is_dead() -> None:
    signals = changed(
        **certificate(begins=-20 * HOUR, ends=4 * HOUR),
        token=CLUSTER.token(issued_at=MOMENT - 2 * HOUR).encode(),
    )
    (overdue,) = conditions(signals, EXPECTED, is_running=True, now=MOMENT)
    assert f"drops out at {MOMENT + 4 * HOUR:%Y-%m-%d %H:%M:%SZ}" in overdue.message
    assert "the token expired at" in overdue.message


def test_capture_is_missed_while_it_should_be_there_and_found_where_it_should_not() -> None:
    assert codes(changed(is_captured=False, captures_by_itself=False)) == {}
    assert codes(changed(is_captured=True), is_running=False) == {"capture_left_behind": Severity.DEGRADED}
    assert codes(changed(is_captured=False), is_running=False) == {}


@pytest.mark.parametrize("seconds", [-120, 120])
def test_a_clock_that_differs_is_said(seconds: int) -> None:
    expected = Expected(ISTIOD, ("192.0.2.1",), timedelta(seconds=seconds))
    (skew,) = conditions(SOUND, expected, is_running=True, now=MOMENT)
    assert skew.code == "clock_skew"
    assert ("behind" if seconds > 0 else "ahead of") in skew.message


def test_why_istiod_refuses_a_token_is_read_from_the_token() -> None:
    rejected = Condition("token_rejected", Severity.FAILED, "istiod refuses the token.")
    foreign = changed(token=CLUSTER.token(audience="vault").encode())
    assert "'vault'" in sharpened(rejected, foreign, MOMENT).message
    assert sharpened(rejected, SOUND, MOMENT) == rejected


@pytest.mark.parametrize(
    ("text", "by_itself"),
    [
        (b"", True),
        (b"# ISTIO_CUSTOM_IP_TABLES=true\n", True),
        (b"ISTIO_CUSTOM_IP_TABLES=false\n", True),
        (b"A=1\nISTIO_CUSTOM_IP_TABLES=true\n", False),
        (b"export ISTIO_CUSTOM_IP_TABLES='true'\n", False),
    ],
)
def test_the_machines_owner_may_do_the_iptables_himself(text: bytes, by_itself: bool) -> None:
    assert captures_by_itself(text) == by_itself


# --- the certificate itself ---


def issued(not_after: datetime) -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    chain = CLUSTER.workload_certificate(
        key.public_key(),
        namespace="vm",
        service_account="vm",
        not_before=datetime.now(UTC) - timedelta(minutes=5),
        not_after=not_after,
    )
    return chain, private_pem(key)


def test_a_certificate_that_the_root_signed_is_trusted() -> None:
    end = (datetime.now(UTC) + HOUR).replace(microsecond=0)
    own = own_certificate(*issued(end), CLUSTER.root_pem)
    assert (own.is_trusted, own.not_after) == (True, end)


def test_a_certificate_of_another_mesh_or_with_another_key_is_not() -> None:
    chain, key = issued(datetime.now(UTC) + HOUR)
    assert not own_certificate(chain, key, STRANGER.pem).is_trusted
    assert not own_certificate(chain, issued(datetime.now(UTC) + HOUR)[1], CLUSTER.root_pem).is_trusted
    assert not own_certificate(chain, key, b"").is_trusted


def test_an_expired_certificate_is_expired_and_not_foreign() -> None:
    own = own_certificate(*issued(datetime.now(UTC) - timedelta(minutes=1)), CLUSTER.root_pem)
    assert own.is_trusted


def test_what_is_no_certificate_is_said_to_be_none() -> None:
    with pytest.raises(x509.CertificateError):
        own_certificate(b"nothing", b"", b"")
