"""Endpoints that fail, refuse, stall or lie: each is explained, none harms the machine, none is hammered.

The endpoint is a server that sends exactly the bytes it is told to. All of it happens on one machine with real
systemd, which has no package to install: a bundle that is accepted ends there, with `no-package`.
"""

import email.utils
import gzip
import json
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import pytest

from lab.cluster import Authority, Cluster, as_json, now
from lab.faulty import Answer, Faulty, http
from lab.machine import Machine
from lab.network import CLUSTER_IPV4, Network
from lab.run import Run
from system.refusal import Refusal, Trial, assert_refused
from system.web import pin

TOKEN = "abc123.the-secret-of-this-machine"
ACCEPTED = "no-package"
WILD = "\x1b]0;owned\x07\x1b[2J\x1b[31m\u202edlo"


class Stage:
    """An endpoint with its own authority, and the machine that asks it."""

    def __init__(self, trial: Trial, faulty: Faulty) -> None:
        self.trial = trial
        self.faulty = faulty
        self.cluster = Cluster.create()
        self.authority = self.cluster.root
        self.identity = self.certificate()

    def certificate(
        self,
        name: str = CLUSTER_IPV4,
        *,
        ca: Authority | None = None,
        before: timedelta = timedelta(hours=-1),
        after: timedelta = timedelta(days=1),
    ) -> tuple[bytes, bytes]:
        """A chain for the endpoint and its key; `before` and `after` bound its validity, from now on."""
        signer = ca or self.authority
        leaf, key = self.cluster.server_certificate(
            [name], ca=signer, not_before=now() + before, not_after=now() + after
        )
        return leaf + signer.pem, key

    def bundle(self) -> Answer:
        """The right answer."""
        return http(body=as_json(self.cluster.bundle()))

    def ask(
        self,
        answers: Sequence[Answer],
        *,
        identity: tuple[bytes, bytes] | None = None,
        plain: bool = False,
        pins: Sequence[str] | None = None,
        timeout: float = 20,
        attempt: float = 10,
        url: str = "",
    ) -> Refusal:
        """Have the machine ask for its bundle, trusting by pin unless `pins` is empty: then by the CA file."""
        self.faulty.show(answers, None if plain else identity or self.identity)
        token = self.trial.give("token", TOKEN, mode=0o600)
        ca = self.trial.give("ca.pem", self.authority.pem)
        wanted = [pin(self.authority.pem)] if pins is None else list(pins)
        endpoint = {
            **({"ca_pins": wanted} if wanted else {"ca_file": ca}),
            "credential": {"join_token_file": token},
            "timeout": attempt,
        }
        return self.trial.bootstrap(url or self.faulty.url, timeout=timeout, endpoint=endpoint)


@pytest.fixture(scope="module")
def stage(shared_machine: Machine, network: Network, run: Run) -> Iterator[Stage]:
    """The endpoint and the machine of all these tests."""
    with Faulty(network=network, run=run) as faulty:
        yield Stage(Trial(shared_machine), faulty)


# --- who is it? ---------------------------------------------------------------

Ask = Callable[[Stage], Refusal]
STRANGERS: dict[str, tuple[Ask, str, tuple[str, ...]]] = {
    "an expired certificate": (
        lambda s: s.ask([s.bundle()], identity=s.certificate(before=-timedelta(days=3), after=-timedelta(days=1))),
        "endpoint-certificate-expired",
        ("has expired", "renew it", "timedatectl"),
    ),
    "a certificate that is not valid yet": (
        lambda s: s.ask([s.bundle()], identity=s.certificate(before=timedelta(days=1), after=timedelta(days=2))),
        "endpoint-certificate-not-yet-valid",
        ("not valid yet", "timedatectl"),
    ),
    "an expired certificate of an authority from the CA file": (
        lambda s: s.ask(
            [s.bundle()], pins=[], identity=s.certificate(before=-timedelta(days=3), after=-timedelta(days=1))
        ),
        "endpoint-certificate-expired",
        ("has expired",),
    ),
    "an unknown authority": (
        lambda s: s.ask([s.bundle()], pins=[], identity=s.certificate(ca=Authority.create("Somebody"))),
        "endpoint-unknown-ca",
        ("not signed by a CA", "endpoint.ca_file"),
    ),
    "a certificate for another host": (
        lambda s: s.ask([s.bundle()], identity=s.certificate("mesh.example.com")),
        "endpoint-wrong-name",
        (CLUSTER_IPV4, "endpoint.url"),
    ),
    "a certificate for another host, by the CA file": (
        lambda s: s.ask([s.bundle()], pins=[], identity=s.certificate("mesh.example.com")),
        "endpoint-wrong-name",
        (CLUSTER_IPV4,),
    ),
    # The pinned authority is public: whoever shows it without having its key gains nothing.
    "the pinned authority shown beside a leaf that it did not sign": (
        lambda s: s.ask([s.bundle()], identity=_pretending(s)),
        "endpoint-unknown-ca",
        ("not signed by a CA",),
    ),
    "plain HTTP on the port": (
        lambda s: s.ask([Answer(b"HTTP/1.1 400 Bad Request\r\n\r\n")], plain=True),
        "endpoint-not-tls",
        ("does not speak TLS", "endpoint.url"),
    ),
}


def _pretending(stage: Stage) -> tuple[bytes, bytes]:
    chain, key = stage.certificate(ca=Authority.create("Somebody"))
    leaf = chain[: chain.index(b"-----END CERTIFICATE-----") + 26]
    return leaf + stage.authority.pem, key


@pytest.mark.parametrize("who", STRANGERS)
def test_a_server_that_cannot_prove_who_it_is_gets_no_request(who: str, stage: Stage) -> None:
    ask, code, fragments = STRANGERS[who]
    refusal = ask(stage)
    assert_refused(refusal, code, *fragments)
    assert stage.faulty.heard("connection")
    assert not any(TOKEN in request["head"] or "GET" in request["head"] for request in stage.faulty.heard("request"))
    assert stage.trial.changes() == []


def test_a_wrong_pin_shows_the_pins_seen_and_sends_nothing(stage: Stage) -> None:
    identity = stage.certificate(ca=(impostor := Authority.create("Somebody")))
    refusal = stage.ask([stage.bundle()], identity=identity)
    assert_refused(refusal, "endpoint-pin-mismatch", pin(identity[0]), pin(impostor.pem), "nothing was sent", "ca_pins")
    assert stage.faulty.heard("connection")
    assert stage.faulty.heard("request") == []
    assert stage.trial.changes() == []


def test_an_http_address_in_the_configuration_is_refused_before_anything_is_sent(stage: Stage) -> None:
    refusal = stage.ask([stage.bundle()], url=f"http://{stage.faulty.address}/v1/bundle")
    assert_refused(refusal, "configuration-invalid", "endpoint.url", "https://", "token", status=78)
    assert stage.faulty.heard("connection") == []
    assert stage.trial.changes() == []


# --- what it refuses ----------------------------------------------------------

STATUSES = {
    401: "endpoint-unauthorized",
    403: "endpoint-forbidden",
    404: "endpoint-not-found",
    410: "endpoint-gone",
    400: "endpoint-refused",
}
# In which form the server says why → content type, body, and what is shown of it.
REASONS: dict[str, tuple[str, bytes, str]] = {
    "JSON": (
        "application/json",
        b'{"error": {"code": "used", "message": "token 4711 was used"}}',
        "token 4711 was used",
    ),
    "flat JSON": ("application/json", b'{"error": "token 4711 was used"}', "token 4711 was used"),
    "text": ("text/plain; charset=utf-8", b"token 4711 was used\n", "token 4711 was used"),
    "XML": (
        "application/xml",
        b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>token 4711 was used</Message></Error>",
        "token 4711 was used",
    ),
    "hostile JSON": ("application/json", json.dumps({"error": {"message": f"no {WILD}"}}).encode(), "no "),
    "hostile text": ("text/plain", f"no {WILD}\r\n[fake] all is well".encode(), "no "),
    "nested JSON": ("application/json", b'{"error": ' + b"[" * 10000, ""),
    "nothing": ("text/plain", b"", ""),
}


@pytest.mark.parametrize(
    ("status", "form"),
    [
        *((403, form) for form in REASONS),
        *((status, form) for status in STATUSES if status != 403 for form in ("JSON", "text", "XML", "hostile text")),
    ],
)
def test_a_refusal_is_told_with_the_reason_of_the_server(status: int, form: str, stage: Stage) -> None:
    kind, body, shown = REASONS[form]
    refusal = stage.ask([http(status, body, headers={"Content-Type": kind})])
    assert_refused(refusal, STATUSES[status], str(status), shown, hinted=status != 400)
    assert TOKEN not in refusal.output
    assert len(stage.faulty.heard("request")) == 1
    assert stage.trial.changes() == []


def test_ten_megabytes_of_reason_are_cut_short(stage: Stage) -> None:
    refusal = stage.ask([http(403, b"no entry " * 1024, times=1100, headers={"Content-Type": "text/plain"})])
    assert_refused(refusal, "endpoint-forbidden", "no entry")
    assert len(refusal.output) < 2000
    assert stage.trial.changes() == []


def test_a_redirection_is_not_followed(stage: Stage) -> None:
    refusal = stage.ask([http(302, headers={"Location": f"https://{stage.faulty.address}/elsewhere"}), stage.bundle()])
    assert_refused(refusal, "endpoint-redirects", "/elsewhere", "endpoint.url")
    assert len(stage.faulty.heard("request")) == 1
    assert stage.trial.changes() == []


# --- what may pass by itself --------------------------------------------------


def _request_times(stage: Stage) -> list[float]:
    return [request["time"] for request in stage.faulty.heard("request")]


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_what_may_pass_is_tried_again_and_then_goes_on(status: int, stage: Stage) -> None:
    refusal = stage.ask([http(status, b"busy"), stage.bundle()])
    assert_refused(refusal, ACCEPTED)
    assert "trying again" in refusal.stdout
    assert len(stage.faulty.heard("request")) == 2
    assert stage.trial.changes() == []


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_in_seconds_is_honoured(status: int, stage: Stage) -> None:
    refusal = stage.ask([http(status, headers={"Retry-After": "3"}), stage.bundle()])
    assert_refused(refusal, ACCEPTED)
    first, second = _request_times(stage)
    assert second - first >= 3


def test_retry_after_as_a_date_is_honoured(stage: Stage) -> None:
    moment = int(time.time()) + 5
    refusal = stage.ask(
        [http(503, headers={"Retry-After": email.utils.formatdate(moment, usegmt=True)}), stage.bundle()]
    )
    assert_refused(refusal, ACCEPTED)
    _, second = _request_times(stage)
    assert second >= moment


@pytest.mark.parametrize("value", ["soon", "-5", "1e9", "Mon, 01 Jan 2026 00:00:00 +99999999999999999999", "\xb2"])
def test_a_retry_after_that_makes_no_sense_is_as_none(value: str, stage: Stage) -> None:
    refusal = stage.ask([http(503, headers={"Retry-After": value}), stage.bundle()])
    assert_refused(refusal, ACCEPTED)
    assert stage.trial.changes() == []


def test_an_endpoint_that_fails_for_long_is_not_hammered(stage: Stage) -> None:
    refusal = stage.ask([http(500, b'{"error": "database is gone"}')], timeout=6)
    assert_refused(refusal, "endpoint-failing", "500", "database is gone", hinted=False)
    # Waits grow by chance and twofold; nine waits within six seconds do not happen in a lifetime.
    assert 1 <= len(stage.faulty.heard("request")) < 10
    assert stage.trial.changes() == []


# --- what breaks --------------------------------------------------------------

# Inside TLS a reset looks like an end to the ssl module of most Pythons (OpenSSL 3 says of both: no more to read).
BROKEN: dict[str, tuple[Callable[[Stage], Answer], str]] = {
    "a reset before the answer": (lambda _: Answer(end="reset"), "endpoint-broke-off"),
    "a close before the answer": (lambda _: Answer(), "endpoint-broke-off"),
    "a reset in the middle": (
        lambda s: http(body=s.bundle().body[:500], length=5000, end="reset"),
        "endpoint-broke-off",
    ),
    "fewer bytes than Content-Length says": (
        lambda s: http(body=s.bundle().body, length=len(s.bundle().body) + 100),
        "endpoint-broke-off",
    ),
    "a body of one byte a second": (lambda s: http(body=s.bundle().body, slow="body"), "endpoint-too-slow"),
    "headers of one byte a second": (lambda s: http(body=s.bundle().body, slow="head"), "endpoint-too-slow"),
    "no answer at all": (lambda _: Answer(end="hang"), "endpoint-too-slow"),
    "half an answer and silence": (
        lambda s: http(body=s.bundle().body[:500], length=5000, end="hang"),
        "endpoint-too-slow",
    ),
    "headers without end": (
        lambda _: Answer(b"HTTP/1.1 200 OK\r\n", b"X-More: and more\r\n", times=100_000),
        "endpoint-broke-off",
    ),
    "what is no HTTP": (lambda _: Answer(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), "endpoint-broke-off"),
    "two contradicting lengths": (
        lambda _: http(body=b"{}", headers={"Content-Length": "77"}),
        "endpoint-broke-off",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_answer_is_tried_again_until_patience_ends(how: str, stage: Stage) -> None:
    answer, code = BROKEN[how]
    refusal = stage.ask([answer(stage)], timeout=2.5, attempt=1.5)
    codes = {code, "endpoint-reset"} if "reset" in how else {code}
    assert_refused(refusal, refusal.code, CLUSTER_IPV4 if code != "endpoint-too-slow" else "", hinted=False)
    assert refusal.code in codes
    assert len(stage.faulty.heard("request")) >= 1
    assert stage.trial.changes() == []


def test_a_reset_in_the_handshake_is_tried_again_until_patience_ends(stage: Stage) -> None:
    refusal = stage.ask([Answer(end="reset")], plain=True, timeout=2)
    assert_refused(refusal, "endpoint-reset", CLUSTER_IPV4, hinted=False)
    assert stage.trial.changes() == []


@pytest.mark.parametrize("how", ["a reset in the middle", "a close before the answer"])
def test_after_a_broken_answer_a_whole_one_is_taken(how: str, stage: Stage) -> None:
    refusal = stage.ask([BROKEN[how][0](stage), stage.bundle()])
    assert_refused(refusal, ACCEPTED)
    assert stage.trial.changes() == []


# --- answers that are no bundle -----------------------------------------------

_GZIPPED = {"Content-Encoding": "gzip"}
ANSWERS: dict[str, tuple[Callable[[Stage], Answer], str, tuple[str, ...]]] = {
    "more bytes than Content-Length says": (
        lambda s: http(body=s.bundle().body, length=100),
        "bundle-malformed",
        ("line",),
    ),
    "5 MiB by Content-Length": (lambda _: http(body=b"x" * 1024, times=5 * 1024), "endpoint-sent-too-much", ("4 MiB",)),
    "5 MiB without Content-Length": (
        lambda _: http(body=b"x" * 1024, times=5 * 1024, length=-1),
        "endpoint-sent-too-much",
        ("4 MiB",),
    ),
    "a promise of a terabyte": (lambda _: http(body=b"x", length=1024**4), "endpoint-sent-too-much", ("4 MiB",)),
    "gzip unasked": (
        lambda s: http(body=gzip.compress(s.bundle().body), headers=_GZIPPED),
        "endpoint-malformed-answer",
        ("compressed",),
    ),
    "what is no JSON": (lambda _: http(body=b"hello"), "bundle-unknown-format", ("neither JSON nor a tar",)),
    "a login page": (
        lambda _: http(body=b"<!DOCTYPE html><form>Log in", headers={"Content-Type": "text/html"}),
        "bundle-unknown-format",
        ("login",),
    ),
    "nothing": (lambda _: http(), "bundle-unknown-format", ()),
    "204": (lambda _: http(204, length=-1), "endpoint-refused", ("204",)),
    "304 unasked": (lambda _: http(304, length=-1), "endpoint-malformed-answer", ("not modified",)),
    "version 2": (lambda _: http(body=b'{"version": 2}'), "bundle-unknown-version", ("2",)),
    "nested JSON": (lambda _: http(body=b'{"a":' + b"[" * 100_000), "bundle-malformed", ("nested",)),
    "a key twice": (lambda _: http(body=b'{"version": 1, "version": 1}'), "bundle-malformed", ("'version'",)),
    "a number of 5000 digits": (lambda _: http(body=b'{"version": ' + b"1" * 5000 + b"}"), "bundle-malformed", ()),
    "a gzip bomb": (
        lambda _: http(body=gzip.compress(b"\0" * (64 * 1024**2))),
        "bundle-too-large",
        ("4 MiB",),
    ),
    "control sequences": (lambda _: http(body=WILD.encode()), "bundle-unknown-format", ()),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_an_answer_that_is_no_bundle_is_refused_and_not_asked_for_again(what: str, stage: Stage) -> None:
    answer, code, fragments = ANSWERS[what]
    refusal = stage.ask([answer(stage)])
    assert_refused(refusal, code, *fragments, hinted=not code.startswith("endpoint-"))
    assert len(stage.faulty.heard("request")) == 1
    assert stage.trial.changes() == []


def test_odd_headers_do_not_keep_a_sound_bundle_out(stage: Stage) -> None:
    odd = {"ETag": '"\xe9\xff"', "Date": "yesterday", "X-Empty": "", "Set-Cookie": "a=b"}
    refusal = stage.ask([http(body=stage.bundle().body, headers=odd)])
    assert_refused(refusal, ACCEPTED)
    assert stage.trial.changes() == []


# --- where nobody is ----------------------------------------------------------


def test_an_address_where_nobody_is_ends_with_the_patience(stage: Stage) -> None:
    began = time.monotonic()
    refusal = stage.ask([stage.bundle()], url="https://192.0.2.99/v1/bundle", timeout=3, attempt=2)
    assert_refused(refusal, "endpoint-unreachable", "192.0.2.99", hinted=False)
    assert time.monotonic() - began < 20  # --timeout 3, not the default of five minutes
    assert stage.trial.changes() == []


def test_a_port_where_nobody_listens_is_named(stage: Stage) -> None:
    refusal = stage.ask([stage.bundle()], url=f"https://{CLUSTER_IPV4}:9/v1/bundle", timeout=2)
    assert_refused(refusal, "endpoint-refuses-connections", f"{CLUSTER_IPV4}:9", hinted=False)
    assert stage.trial.changes() == []


def test_a_name_that_nobody_knows_is_named(stage: Stage) -> None:
    stage.trial.machine.write("/etc/resolv.conf", "")  # nobody to ask: the answer comes at once
    stage.trial.changes()
    refusal = stage.ask([stage.bundle()], url="https://mesh.invalid/v1/bundle", timeout=3)
    assert_refused(refusal, "endpoint-name-not-found", "mesh.invalid", "DNS")
    assert stage.trial.changes() == []


def test_a_stopped_network_child_does_not_hold_the_agent(stage: Stage) -> None:
    """Whoever has the child's user may stop it, for the signal needs no more than the same user."""
    machine = stage.trial.machine
    stage.faulty.show([Answer(end="hang")], stage.identity)
    token = stage.trial.give("token", TOKEN, mode=0o600)
    endpoint = {"ca_pins": [pin(stage.authority.pem)], "credential": {"join_token_file": token}, "timeout": 30}
    argv = [*stage.trial.configure(stage.faulty.url, endpoint=endpoint), "bootstrap", "--timeout=6"]
    with machine.spawn(argv) as process:
        child = _network_child(machine)
        machine.run(["kill", "-STOP", child], user="nobody")
        assert process.wait(timeout=60) == 1
    assert machine.run(["test", "-e", f"/proc/{child}"], check=False).returncode == 1
    assert stage.trial.changes() == []


@pytest.mark.parametrize("secret", ["mem", "environ", "fd", "maps"])
def test_the_user_of_the_network_child_cannot_look_into_it(secret: str, stage: Stage) -> None:
    """It holds the credential, and runs as a user that others have too."""
    machine = stage.trial.machine
    stage.faulty.show([Answer(end="hang")], stage.identity)
    token = stage.trial.give("token", TOKEN, mode=0o600)
    endpoint = {"ca_pins": [pin(stage.authority.pem)], "credential": {"join_token_file": token}, "timeout": 30}
    argv = [*stage.trial.configure(stage.faulty.url, endpoint=endpoint), "bootstrap", "--timeout=8"]
    with machine.spawn(argv) as process:
        child = _network_child(machine)
        look = ["ls"] if secret == "fd" else ["head", "--bytes=1"]
        looked = machine.run([*look, f"/proc/{child}/{secret}"], user="nobody", check=False)
        traced = machine.run(["strace", "-p", child, "-e", "trace=read"], user="nobody", check=False, timeout=20)
        commands = machine.run(["ps", "-ww", "-eo", "args"], user="nobody").stdout
        machine.run(["pkill", "-INT", "-f", "bootstrap --timeout=8"])
        process.wait(timeout=60)
    assert looked.returncode != 0
    assert "Permission denied" in looked.stderr
    assert traced.returncode != 0
    assert "Operation not permitted" in traced.stderr
    assert "bootstrap --timeout=8" in commands
    assert TOKEN not in commands
    assert stage.trial.changes() == []


def _network_child(machine: Machine) -> str:
    """The process number of the child, once it has shed its rights."""
    wait = "for i in $(seq 500); do pgrep -u nobody -f vmmesh_agent.network && exit; sleep 0.02; done; exit 1"
    return machine.run(["sh", "-c", wait]).stdout.split()[0]
