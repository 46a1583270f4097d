"""The network child: the only part that speaks to the network, in a process of its own without privileges.

    python -m vmmesh_agent.network UID GID < request

Privileges go once the modules are loaded and before a byte of the request is read.

The request is one JSON document on standard input, credentials included; nothing secret is in an argument, in
the environment or on disk. The answer is JSON lines on standard output, each an object with the key `event`:

    retry         an attempt failed and another will follow: code, message, hint, wait (seconds)
    bundle        bundle (version 1 of the format), etag, clock_offset (the endpoint's less ours, in seconds, or null)
    not-modified  etag still stands: clock_offset
    stored        a package was written to standard output's neighbour, the descriptor `request.descriptor`
    trusted       a probe's handshake was made and verified, and nothing was sent
    failed        code, message, hint, retry

Every attempt is made anew from the start. What can pass by itself (the network, 5xx, 429) is tried for ever with
exponential back-off and full jitter, `Retry-After` honoured; the parent ends the child when its patience ends.
"""

import _ssl  # for the one constant that `ssl` does not pass on
import contextlib
import email.utils
import json
import os
import re
import resource
import signal
import socket
import ssl
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, BinaryIO, NoReturn

import httpcore  # noqa: F401  # httpx loads it when it is first needed, which is after privileges are gone
import httpx
import tenacity

from vmmesh_agent import __version__, bundle, x509
from vmmesh_agent.errors import AgentError, FetchError
from vmmesh_agent.text import printable

_CHUNK = 256 * 1024
_MAX_WAIT = 60.0  # seconds between attempts, unless the server asks for more
_MAX_RETRY_AFTER = 3600.0
_MAX_PACKAGE_SECONDS = 3600.0
_MAX_REDIRECTS = 5

_XML_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")

# OpenSSL's verification results (x509_vfy.h) that deserve words of their own.
_NOT_YET_VALID, _EXPIRED, _WRONG_NAME = 9, 10, 62


_TRIED_AGAIN = "it is tried again by itself; see that the endpoint runs, and that no firewall stands between"


class _PassingError(FetchError):
    """Trouble that may pass by itself. `retry_after` is what the server asked for, in seconds."""

    def __init__(self, message: str, *, code: str, hint: str = _TRIED_AGAIN, retry_after: float = 0) -> None:
        super().__init__(message, code=code, hint=hint, retry=True)
        self.retry_after = min(retry_after, _MAX_RETRY_AFTER)


class _ChainSeen(BaseException):  # ends the probe on purpose, and no handler of httpx may catch it
    """Carries the certificates that the server showed, leaf first, out of a handshake."""

    def __init__(self, chain: list[bytes]) -> None:
        super().__init__()
        self.chain = chain


def main() -> int:
    """Answer one request. The exit status says nothing; the last line does."""
    _drop_privileges(int(sys.argv[1]), int(sys.argv[2]))
    request = json.loads(sys.stdin.buffer.read())
    try:
        answer = _tried(request)
    except AgentError as error:
        answer = _described("failed", error)
    _say(answer)
    return 0


def _drop_privileges(uid: int, gid: int) -> None:
    """Become the user for good. Without root there is nothing to drop."""
    "".encode("idna")  # loaded now, as httpcore is: the folder may be closed to the user
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold the credential


def _tried(request: Mapping[str, Any]) -> dict[str, Any]:
    """Make attempts until one is answered or refused."""
    attempt = {"bundle": _bundle, "package": _package, "probe": _probe}[request["kind"]]
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(_PassingError),
        wait=_wait,
        before_sleep=_announce,
        reraise=True,
    )
    return retrying(attempt, request)


_full_jitter = tenacity.wait_random_exponential(multiplier=1, max=_MAX_WAIT)


def _wait(state: tenacity.RetryCallState) -> float:
    error = _error_of(state)
    return max(_full_jitter(state), error.retry_after if isinstance(error, _PassingError) else 0)


def _announce(state: tenacity.RetryCallState) -> None:
    error = _error_of(state)
    if isinstance(error, AgentError):
        _say(_described("retry", error) | {"wait": round(state.upcoming_sleep, 1), "attempt": state.attempt_number})


def _error_of(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _described(event: str, error: AgentError) -> dict[str, Any]:
    return {"event": event, "code": error.code, "message": error.message, "hint": error.hint, "retry": error.retry}


def _say(answer: Mapping[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


# --- what is asked for ---


def _bundle(request: Mapping[str, Any]) -> dict[str, Any]:
    headers = {
        "Accept": f"{bundle.MEDIA_TYPE}, application/json, application/gzip;q=0.9, application/x-tar;q=0.9",
        **request["headers"],
    }
    with _within(request["timeout"], request["url"]), _response(request, headers, follow_redirects=False) as response:
        seen = {
            "etag": response.headers.get("ETag", ""),
            "clock_offset": _seconds_until(response.headers.get("Date", "")),
        }
        if response.status_code == httpx.codes.NOT_MODIFIED:
            if "If-None-Match" not in headers:
                raise FetchError("the endpoint says 'not modified' unasked", code="endpoint-malformed-answer")
            return {"event": "not-modified", **seen}
        content = bytearray()
        for chunk in _body(response, limit=bundle.MAX_BYTES):
            content += chunk
    return {"event": "bundle", "bundle": bundle.unpack(bytes(content)).as_json(), **seen}


def _package(request: Mapping[str, Any]) -> dict[str, Any]:
    """Write the package to the descriptor that the parent opened; the parent computes the digest itself."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
    with (
        _within(_MAX_PACKAGE_SECONDS, request["url"]),
        open(request["descriptor"], "wb", closefd=False) as file,  # a descriptor, not a path
        _response(request, request["headers"], follow_redirects=True) as response,
    ):
        file.seek(0)
        file.truncate()
        for chunk in _body(response, limit=request["limit"]):
            _store(file, chunk)
    return {"event": "stored"}


def _probe(request: Mapping[str, Any]) -> dict[str, Any]:
    """Shake hands, as for a bundle, and end there: what would be sent, the credential too, never is."""
    context = _trusting_pins(request) if request["pins"] else _trusting(request)
    _present_client_certificate(context, request)
    _chain(request, context)
    return {"event": "trusted"}


def _store(file: BinaryIO, chunk: bytes) -> None:
    try:
        file.write(chunk)
    except OSError as error:
        raise FetchError(
            f"the package could not be stored: {error.strerror}", code="disk-full", hint="make room"
        ) from error


@contextlib.contextmanager
def _within(seconds: float, address: str) -> Iterator[None]:
    """Bound one attempt as a whole: a byte now and then keeps every single read within its time."""

    host = httpx.URL(address).netloc.decode()

    def too_late(_signal: int, _frame: object) -> NoReturn:
        raise _PassingError(f"{host} did not finish within {seconds:g} s", code="endpoint-too-slow")

    signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _body(response: httpx.Response, *, limit: int) -> Iterator[bytes]:
    """Yield the body as it comes, within its limit of size."""
    too_large = FetchError(f"the endpoint sent more than {limit // 1024**2} MiB", code="endpoint-sent-too-much")
    if (response.headers.get("Content-Encoding") or "identity") != "identity":
        raise FetchError("the endpoint compressed its answer unasked", code="endpoint-malformed-answer")
    if int(response.headers.get("Content-Length") or 0) > limit:
        raise too_large
    received = 0
    with _understood(response.request):
        for chunk in response.iter_raw(_CHUNK):
            received += len(chunk)
            if received > limit:
                raise too_large
            yield chunk


@contextlib.contextmanager
def _response(
    request: Mapping[str, Any], headers: Mapping[str, str], *, follow_redirects: bool
) -> Iterator[httpx.Response]:
    """Send the request over a verified connection and yield an answer that is no refusal."""
    context = _trusting_pins(request) if request["pins"] else _trusting(request)
    _present_client_certificate(context, request)
    outgoing = {"User-Agent": f"vmmesh-agent/{__version__}", "Accept-Encoding": "identity", **headers}
    if request["bearer"]:
        outgoing["Authorization"] = f"Bearer {request['bearer']}"
    with _client(request, context) as client:
        target = client.build_request("GET", request["url"], headers=outgoing)
        with _understood(target):
            response = client.send(target, stream=True)
            if follow_redirects:
                response = _redirected(client, response)
        try:
            _refuse_errors(response)
            yield response
        finally:
            response.close()


def _client(request: Mapping[str, Any], context: ssl.SSLContext) -> httpx.Client:
    try:
        return httpx.Client(
            verify=context,
            timeout=_timeouts(request["timeout"]),
            follow_redirects=False,
            trust_env=not request.get("direct", False),
        )
    except (ValueError, httpx.InvalidURL) as error:
        raise FetchError(
            f"the proxy variables make no sense: {printable(str(error))}", code="proxy-invalid", hint="see https_proxy"
        ) from None


def _timeouts(seconds: float) -> httpx.Timeout:
    """Give the connection less than the attempt, so that an address where nobody answers is told as such."""
    return httpx.Timeout(min(seconds, 30.0), connect=min(seconds * 0.8, 10.0))


def _redirected(client: httpx.Client, response: httpx.Response) -> httpx.Response:
    """Follow redirections, to https only; httpx leaves the credential out for another host."""
    for _ in range(_MAX_REDIRECTS):
        onward = response.next_request
        if onward is None:
            return response
        response.close()
        if onward.url.scheme != "https":
            break
        response = client.send(onward, stream=True)
    where = printable(response.headers.get("Location", ""))
    raise FetchError(f"redirected to {where!r}, which is not followed", code="endpoint-redirects")


# --- trust ---


def _trusting(request: Mapping[str, Any]) -> ssl.SSLContext:
    """Trust the CA file where one is configured, else the system's store."""
    try:
        return ssl.create_default_context(cadata=request["ca"] or None)
    except ssl.SSLError as error:
        raise FetchError(
            f"endpoint.ca_file holds no usable certificate: {error.reason}", code="ca-file-invalid"
        ) from None


def _trusting_pins(request: Mapping[str, Any]) -> ssl.SSLContext:
    """Trust only the pinned keys.

    A first handshake, in which nothing is sent, shows the server's chain (verified by the CA file where there is
    one); the certificates whose keys are pinned become the only trust anchors of the real connection. So a
    pinned certificate that is merely shown, without the key that signed the rest, gains nothing.
    """
    probe = _trusting(request)
    if not request["ca"]:
        probe.check_hostname = False
        probe.verify_mode = ssl.CERT_NONE
    _present_client_certificate(probe, request)
    shown = [x509.read_der(der) for der in _chain(request, probe)]
    anchors = [certificate for certificate in shown if certificate.pin in request["pins"]]
    if not anchors:
        seen = ", ".join(f"{certificate.pin} ({'CA' if certificate.is_ca else 'leaf'})" for certificate in shown)
        raise FetchError(
            f"the endpoint's certificate chain has none of the pinned keys; it has {seen}",
            code="endpoint-pin-mismatch",
            hint="nothing was sent. If the endpoint's CA was changed on purpose, put its new pin into"
            " endpoint.ca_pins; otherwise somebody stands between this machine and the endpoint",
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # an anchor may be an intermediate or the leaf
    context.load_verify_locations(cadata="".join(certificate.pem for certificate in anchors))
    return context


def _chain(request: Mapping[str, Any], context: ssl.SSLContext) -> list[bytes]:
    """Return the DER of the certificates that the server shows, and of the root that OpenSSL found to them."""

    is_connected = False

    def look(event: str, info: Mapping[str, Any]) -> None:
        nonlocal is_connected
        is_connected = is_connected or event.endswith(".connect_tcp.complete")
        if event.endswith(".start_tls.complete"):
            connection = info["return_value"].get_extra_info("ssl_object")
            raise _ChainSeen(_certificates_of(connection))

    with _client(request, context) as client:
        target = client.build_request("GET", request["url"], extensions={"trace": look})
        try:
            with _understood(target):
                client.send(target, stream=True)
        except _ChainSeen as seen:
            return seen.chain
        except _PassingError as error:
            if is_connected and error.code == "endpoint-unreachable":
                raise _PassingError(
                    f"{target.url.host}:{target.url.port or 443} accepts connections, and does not answer in the TLS"
                    " handshake",
                    code="endpoint-handshake-silent",
                    hint="see what stands between (a proxy, a gateway without this name), and the path's MTU",
                ) from error
            raise
    raise FetchError("the endpoint did not speak TLS", code="endpoint-not-tls")


def _certificates_of(connection: Any) -> list[bytes]:
    """Return the DER of the shown and of the verified chain, each certificate once.

    `connection` is the interpreter's own TLS object, as httpcore hands it out (a wrapper of it, inside a TLS
    connection to a proxy). Its chains have no public name before Python 3.13, and are the same objects since.
    """
    inner = getattr(connection, "_sslobj", connection)
    chains = (*(inner.get_unverified_chain() or ()), *(inner.get_verified_chain() or ()))
    return list(dict.fromkeys(certificate.public_bytes(_ssl.ENCODING_DER) for certificate in chains))


def _present_client_certificate(context: ssl.SSLContext, request: Mapping[str, Any]) -> None:
    if request["client_certificate"]:
        try:
            x509.load_chain(context, request["client_certificate"].encode())
        except ssl.SSLError as error:
            raise FetchError(
                f"the client certificate and its key do not fit: {error.reason}", code="client-certificate-invalid"
            ) from None


# --- what went wrong ---

_REFUSALS = {
    401: (
        "endpoint-unauthorized",
        "did not accept the credential",
        "give this machine a valid join token or credential",
    ),
    403: (
        "endpoint-forbidden",
        "knows this machine but does not allow it this workload",
        "ask the cluster's administrator",
    ),
    404: ("endpoint-not-found", "has no such bundle", "see endpoint.url and workload_group"),
    410: ("endpoint-gone", "says that this credential is used up or the bundle is withdrawn", "get a new join token"),
}


def _refuse_errors(response: httpx.Response) -> None:
    """Raise what an answer other than 200 and 304 means."""
    status = response.status_code
    if status in {200, 304}:
        return
    reason = _reason(response)
    said = f" ({status}{': ' + reason if reason else ''})"
    if status in _REFUSALS:
        code, meaning, hint = _REFUSALS[status]
        raise FetchError(f"the endpoint {meaning}{said}", code=code, hint=hint)
    if status == 429 or status >= 500:
        code = "endpoint-busy" if status == 429 else "endpoint-failing"
        raise _PassingError(f"the endpoint cannot answer now{said}", code=code, retry_after=_retry_after(response))
    if response.is_redirect:
        where = printable(response.headers.get("Location", ""))
        raise FetchError(
            f"the endpoint redirects to {where!r}, which is not followed",
            code="endpoint-redirects",
            hint="see endpoint.url",
        )
    raise FetchError(f"the endpoint gave an answer that makes no sense here{said}", code="endpoint-refused")


def _reason(response: httpx.Response) -> str:
    """Return the server's own words: the message of a JSON or XML error, or the beginning of a plain text."""
    try:
        body = bytearray()
        for chunk in response.iter_raw(4096):
            body += chunk
            if len(body) >= 16 * 1024:
                break
    except httpx.HTTPError:
        return ""
    with contextlib.suppress(ValueError, RecursionError):
        document = json.loads(body)
        error = document.get("error", document) if isinstance(document, dict) else None
        message = error.get("message") if isinstance(error, dict) else error
        if isinstance(message, str):
            return printable(message)
    text = body.decode(errors="replace")
    if message_element := _XML_MESSAGE.search(text):  # object stores answer so
        return printable(message_element[1])
    is_plain = response.headers.get("Content-Type", "text/plain").startswith("text/plain")
    return printable(text) if is_plain else ""


def _retry_after(response: httpx.Response) -> float:
    """Return the server's Retry-After in seconds, 0 where it gave none (RFC 9110, section 10.2.3)."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdecimal():
        return float(value[:9])
    return max(0.0, _seconds_until(value) or 0.0)


def _seconds_until(date: str) -> float | None:
    """Return how far ahead of our clock an HTTP date is, None where it is none."""
    try:
        moment = email.utils.parsedate_to_datetime(date)
        return (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    except (ValueError, OverflowError):
        return None


@contextlib.contextmanager
def _understood(request: httpx.Request) -> Iterator[None]:
    """Turn what the transport raises into what it means."""
    where = f"{request.url.host}:{request.url.port or 443}"
    try:
        yield
    except httpx.HTTPError as error:
        _explain(error, where)
    except httpx.InvalidURL as error:
        raise FetchError(f"the address makes no sense: {error}", code="endpoint-address-invalid") from None


def _explain(error: httpx.HTTPError, where: str) -> NoReturn:
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise _distrust(cause, where) from error
        if isinstance(cause, ssl.SSLError):
            raise _handshake_failed(cause, where) from error
        if isinstance(cause, socket.gaierror):
            raise _PassingError(
                f"the name {where.rpartition(':')[0]!r} cannot be resolved: {cause.strerror}",
                code="endpoint-name-not-found",
                hint="see endpoint.url and this machine's DNS",
            ) from error
        if isinstance(cause, ConnectionRefusedError):
            raise _PassingError(f"{where} refuses connections", code="endpoint-refuses-connections") from error
        if isinstance(cause, ConnectionResetError):
            raise _PassingError(f"{where} reset the connection", code="endpoint-reset") from error
    said = printable(str(error))
    if isinstance(error, httpx.TimeoutException):
        code = "endpoint-unreachable" if isinstance(error, httpx.ConnectTimeout) else "endpoint-too-slow"
        raise _PassingError(f"{where} does not answer in time", code=code) from error
    if isinstance(error, httpx.ProxyError):
        raise _PassingError(f"the proxy refused: {said}", code="proxy-refused", hint="see https_proxy") from error
    if isinstance(error, httpx.RemoteProtocolError):
        raise _PassingError(f"{where} broke off its answer: {said}", code="endpoint-broke-off") from error
    raise _PassingError(f"{where} cannot be reached: {said}", code="endpoint-unreachable") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _distrust(error: ssl.SSLCertVerificationError, where: str) -> FetchError:
    detail = error.verify_message
    if error.verify_code == _EXPIRED:
        return FetchError(
            f"the certificate of {where} has expired",
            code="endpoint-certificate-expired",
            hint="renew it at the endpoint; or this machine's clock is wrong (timedatectl)",
        )
    if error.verify_code == _NOT_YET_VALID:
        return FetchError(
            f"the certificate of {where} is not valid yet",
            code="endpoint-certificate-not-yet-valid",
            hint="see that this machine's clock is right (timedatectl)",
        )
    if error.verify_code == _WRONG_NAME or "match" in detail:
        return FetchError(
            f"the certificate is not for {where}: {printable(detail)}",
            code="endpoint-wrong-name",
            hint="see the host in endpoint.url, and the names in the endpoint's certificate",
        )
    return FetchError(
        f"the certificate of {where} is not signed by a CA that is trusted here: {printable(detail)}",
        code="endpoint-unknown-ca",
        hint="set endpoint.ca_file or endpoint.ca_pins",
    )


def _handshake_failed(error: ssl.SSLError, where: str) -> FetchError:
    reason = (error.reason or str(error)).replace("_", " ").lower()
    if error.reason in {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"}:
        return FetchError(
            f"{where} does not speak TLS ({reason})", code="endpoint-not-tls", hint="see the port in endpoint.url"
        )
    if "certificate required" in reason or "bad certificate" in reason:
        return FetchError(
            f"{where} wants a client certificate that it trusts ({reason})",
            code="endpoint-unauthorized",
            hint="see endpoint.credential.client_certificate",
        )
    return _PassingError(f"the TLS handshake with {where} failed: {reason}", code="endpoint-handshake-failed")


if __name__ == "__main__":
    sys.exit(main())
