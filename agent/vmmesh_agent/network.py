"""The network child: the only part that speaks to the network, in a process of its own without privileges.

    python -m vmmesh_agent.network UID GID

Privileges go (`sandbox`) once the modules are loaded and before a byte of the request is read.

The request is one line of JSON on standard input, credentials included; nothing secret is in an argument, in the
environment or on disk. The parent keeps that pipe open: where it closes, the parent is gone, and so is the child. The
answer is JSON lines on standard output, each an object with the key `event`:

    retry         an attempt failed and another will follow: code, message, hint, wait (seconds)
    bundle        bundle (version 1 of the format), etag, clock_offset (the endpoint's less ours, in seconds, or null)
    not-modified  etag still stands: clock_offset
    stored        a package was written to standard output's neighbour, the descriptor `request.descriptor`
    trusted       a probe's handshake was made and verified, and nothing was sent
    user-data     content (base64) of what this instance was given by its cloud, null where that is nothing
    failed        code, message, hint, retry

Every attempt is made anew from the start. What can pass by itself (the network, 5xx, 429) is tried for ever with
exponential back-off and full jitter, `Retry-After` honoured; the parent ends the child when its patience ends.
"""

import _ssl  # for the one constant that `ssl` does not pass on
import base64
import contextlib
import email.utils
import fcntl
import json
import os
import re
import resource
import select
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

from vmmesh_agent import __version__, bundle, sandbox, x509
from vmmesh_agent.errors import AgentError, FetchError
from vmmesh_agent.text import printable

_CHUNK = 256 * 1024
_MAX_WAIT = 60.0  # seconds between attempts, unless the server asks for more
_MAX_RETRY_AFTER = 3600.0
_MAX_PACKAGE_SECONDS = 3600.0
_MAX_REDIRECTS = 5
_MAX_USER_DATA = 1024**2

_XML_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")
_SOURCE_LINE = re.compile(r" ?\(_ssl\.c:\d+\)")  # where in the interpreter OpenSSL was called

# OpenSSL's verification results (x509_vfy.h) that deserve words of their own.
_NOT_YET_VALID, _EXPIRED, _WRONG_NAME = 9, 10, 62


_TRIED_AGAIN = "it is tried again by itself; see that the server runs, and that no firewall stands between"


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
    "".encode("idna")  # loaded now, as httpcore is: the folder may be closed to the user
    sandbox.enter(int(sys.argv[1]), int(sys.argv[2]))
    request = json.loads(sys.stdin.buffer.readline())
    _end_with_parent()
    try:
        answer = _tried(request)
    except AgentError as error:
        answer = _described("failed", error)
    _say(answer)
    return 0


def _end_with_parent() -> None:
    """Be ended by SIGIO once standard input is closed: the parent alone holds its other end."""
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, os.O_ASYNC)
    if select.select([0], [], [], 0)[0]:  # it was closed already
        sys.exit()


def _tried(request: Mapping[str, Any]) -> dict[str, Any]:
    """Make attempts until one is answered or refused."""
    attempt = {"bundle": _bundle, "package": _package, "probe": _probe, "user-data": _user_data}[request["kind"]]
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(_PassingError),
        wait=_wait,
        before_sleep=_announce,
        reraise=True,
    )
    try:
        return retrying(attempt, request)
    except httpx.InvalidURL as error:
        raise FetchError(
            f"the address makes no sense: {printable(str(error))}",
            code="endpoint-address-invalid",
            hint=f"see {_setting(request['kind'])}",
        ) from None


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


def _user_data(request: Mapping[str, Any]) -> dict[str, Any]:
    """Ask the cloud's metadata service: plain HTTP, for it is on this machine's own link, and past any proxy."""
    headers = dict(request["headers"])
    trusts_nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # httpx would load certificates that are not needed
    with (
        _within(request["timeout"], request["url"]),
        httpx.Client(verify=trusts_nobody, timeout=_timeouts(request["timeout"]), trust_env=False) as client,
    ):
        if request["session"]:
            wanted = {f"{request['session_header']}-ttl-seconds": "60"}
            answer = _send(client, client.build_request("PUT", request["session"], headers=wanted), request["kind"])
            if answer.status_code == httpx.codes.OK:  # an older service has no sessions, and asks for none
                headers[request["session_header"]] = b"".join(_body(answer, limit=_MAX_USER_DATA)).decode("ascii")
            elif answer.status_code in {408, 429} or answer.status_code >= 500:  # it may have, later
                _refuse_errors(answer)
            answer.close()
        response = _send(client, client.build_request("GET", request["url"], headers=headers), request["kind"])
        if response.status_code == httpx.codes.NOT_FOUND:
            return {"event": "user-data", "content": None}
        _refuse_errors(response)
        content = b"".join(_body(response, limit=_MAX_USER_DATA))
    return {"event": "user-data", "content": base64.b64encode(content).decode()}


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
    way = _way_of(response)
    too_large = FetchError(
        f"{way.who} sent more than {limit // 1024**2} MiB",
        code="endpoint-sent-too-much",
        hint=f"see that {way.setting} leads to a {way.kind}",
    )
    if (response.headers.get("Content-Encoding") or "identity") != "identity":
        raise _malformed(f"{way.who} compressed its answer unasked")
    if int(response.headers.get("Content-Length") or 0) > limit:
        raise too_large
    received = 0
    with _understood(way):
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
        response = _send(client, client.build_request("GET", request["url"], headers=outgoing), request["kind"])
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
        if onward is None or onward.url.scheme != "https":
            break
        response.close()
        response = _send(client, onward, _way_of(response).kind)
    return response


# --- the way there ---


class _Way:
    """What a request is for, and how far it got: httpcore calls it, as the extension `trace`, with all that it does."""

    def __init__(self, url: httpx.URL, kind: str) -> None:
        self.kind = kind
        self.who = {"package": "the package's server", "user-data": "the metadata service"}.get(kind, "the endpoint")
        self.setting = _setting(kind)
        self.target = f"{url.raw_host.decode()}:{url.port or (80 if url.scheme == 'http' else 443)}"
        self.peer = self.target  # whom it speaks to: a proxy, where there is one, until that has opened its tunnel
        self.is_connected = False

    def __call__(self, event: str, info: Mapping[str, Any]) -> None:
        by, _, what = event.partition(".")
        if what == "connect_tcp.started":
            self.peer = f"{info['host']}:{info['port']}"
        elif what == "connect_tcp.complete":
            self.is_connected = True
        elif what == "start_tls.started" and by != "connection":
            self.peer = self.target


class _Probe(_Way):
    """Ends the request at the handshake: what would be sent never is."""

    def __call__(self, event: str, info: Mapping[str, Any]) -> None:
        super().__call__(event, info)
        if event.endswith(".start_tls.complete") and self.peer == self.target:
            raise _ChainSeen(_certificates_of(info["return_value"].get_extra_info("ssl_object")))


def _setting(kind: str) -> str:
    """Say where the address comes from."""
    sources = {
        "package": "the package's address (in the bundle, or sidecar.package)",
        "user-data": "the cloud that `vmmesh-agent configure` was told",
    }
    return sources.get(kind, "endpoint.url")


def _send(client: httpx.Client, request: httpx.Request, kind: str, trace: type[_Way] = _Way) -> httpx.Response:
    """Send the request and return the head of the answer."""
    way = request.extensions["trace"] = trace(request.url, kind)
    with _understood(way):
        return client.send(request, stream=True)


def _way_of(response: httpx.Response) -> _Way:
    way: _Way = response.request.extensions["trace"]
    return way


# --- trust ---


def _trusting(request: Mapping[str, Any]) -> ssl.SSLContext:
    """Trust the CA file where one is configured, else the system's store."""
    try:
        return ssl.create_default_context(cadata=request["ca"] or None)
    except ssl.SSLError as error:
        raise FetchError(
            f"endpoint.ca_file holds no usable certificate: {error.reason}",
            code="ca-file-invalid",
            hint="put the PEM of the endpoint's CA there",
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
    with _client(request, context) as client:
        try:
            _send(client, client.build_request("GET", request["url"]), request["kind"], _Probe)
        except _ChainSeen as seen:
            return seen.chain
    raise FetchError("the endpoint did not speak TLS", code="endpoint-not-tls", hint="see the port in endpoint.url")


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
                f"the client certificate and its key do not fit: {error.reason}",
                code="client-certificate-invalid",
                hint="see endpoint.credential.client_certificate",
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
    """Raise what an answer means that is neither 200 nor the 304 that was asked for."""
    status, way = response.status_code, _way_of(response)
    if status == 200:
        return
    if status == 304:
        _refuse_wrong_304(response)
        return
    reason = _reason(response)
    said = f" ({status}{': ' + reason if reason else ''})"
    if status in _REFUSALS and way.kind == "package":
        address = printable(f"https://{response.url.netloc.decode()}{response.url.path}")
        raise FetchError(f"{address} has no package for us{said}", code="package-missing", hint=f"see {way.setting}")
    if status in _REFUSALS:
        code, meaning, hint = _REFUSALS[status]
        raise FetchError(f"the endpoint {meaning}{said}", code=code, hint=hint)
    if status in {408, 429} or status >= 500:
        code = "endpoint-busy" if status == 429 else "endpoint-failing"
        raise _PassingError(f"{way.who} cannot answer now{said}", code=code, retry_after=_retry_after(response))
    if response.is_redirect:
        where = printable(response.headers.get("Location", ""))
        raise FetchError(
            f"{way.who} redirects to {where!r}, which is not followed",
            code="endpoint-redirects",
            hint=f"see {way.setting}",
        )
    raise FetchError(
        f"{way.who} gave an answer that makes no sense here{said}",
        code="endpoint-refused",
        hint=f"see {way.setting}, and the server's log",
    )


def _refuse_wrong_304(response: httpx.Response) -> None:
    """Raise if a 304 is not about the bundle that we have; without an ETag it can only be about that."""
    ours = response.request.headers.get("If-None-Match")
    theirs = response.headers.get("ETag", ours)
    if ours is None:
        raise _malformed("the endpoint says 'not modified' unasked")
    if theirs.removeprefix("W/") != ours.removeprefix("W/"):
        raise _malformed("the endpoint says 'not modified' of another bundle than ours", retry=True)


def _malformed(message: str, *, retry: bool = False) -> FetchError:
    return FetchError(
        message,
        code="endpoint-malformed-answer",
        hint="see what stands between (a proxy or CDN that compresses or caches), and the server itself",
        retry=retry,
    )


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
def _understood(way: _Way) -> Iterator[None]:
    """Turn what the transport raises into what it means."""
    try:
        yield
    except httpx.HTTPError as error:
        is_proxys = isinstance(error, httpx.ProxyError) or way.peer != way.target
        raise (_proxy_failed(error, way) if is_proxys else _explained(error, way)) from error


def _proxy_failed(error: httpx.HTTPError, way: _Way) -> FetchError:
    what = "refused" if isinstance(error, httpx.ProxyError) else "cannot be reached"
    return _PassingError(
        f"the proxy {way.peer} {what}: {_words(error)}",
        code="proxy-refused",
        hint="see https_proxy, and that the proxy runs",
    )


def _explained(error: httpx.HTTPError, way: _Way) -> FetchError:
    where = way.target
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _distrust(cause, way)
        if isinstance(cause, ssl.SSLError):
            return _handshake_failed(cause, way)
        if isinstance(cause, socket.gaierror):
            return _PassingError(
                f"the name {where.rpartition(':')[0]!r} cannot be resolved: {cause.strerror}",
                code="endpoint-name-not-found",
                hint=f"see {way.setting} and this machine's DNS",
            )
        if isinstance(cause, ConnectionRefusedError):
            return _PassingError(f"{where} refuses connections", code="endpoint-refuses-connections")
        if isinstance(cause, ConnectionResetError):
            return _PassingError(f"{where} reset the connection", code="endpoint-reset")
    if isinstance(error, httpx.ConnectTimeout) and way.is_connected:
        return _PassingError(
            f"{where} accepts connections, and does not answer in the TLS handshake",
            code="endpoint-handshake-silent",
            hint="see what stands between (a proxy, a gateway without this name), and the path's MTU",
        )
    if isinstance(error, httpx.TimeoutException):
        code = "endpoint-unreachable" if isinstance(error, httpx.ConnectTimeout) else "endpoint-too-slow"
        return _PassingError(f"{where} does not answer in time", code=code)
    if isinstance(error, httpx.RemoteProtocolError):
        return _PassingError(f"{where} broke off its answer: {_words(error)}", code="endpoint-broke-off")
    return _PassingError(f"{where} cannot be reached: {_words(error)}", code="endpoint-unreachable")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _words(error: BaseException) -> str:
    return printable(_SOURCE_LINE.sub("", str(error)))


def _distrust(error: ssl.SSLCertVerificationError, way: _Way) -> FetchError:
    detail = printable(error.verify_message)
    if error.verify_code == _EXPIRED:
        return FetchError(
            f"a certificate of {way.target} (its own, or its CA's) has expired",
            code="endpoint-certificate-expired",
            hint="renew it there; or this machine's clock is wrong (timedatectl)",
        )
    if error.verify_code == _NOT_YET_VALID:
        return FetchError(
            f"a certificate of {way.target} (its own, or its CA's) is not valid yet",
            code="endpoint-certificate-not-yet-valid",
            hint="see that this machine's clock is right (timedatectl)",
        )
    if error.verify_code == _WRONG_NAME or "match" in detail:
        return FetchError(
            f"the certificate is not for {way.target}: {detail}",
            code="endpoint-wrong-name",
            hint=f"see the host in {way.setting}, and the names in the certificate",
        )
    return FetchError(
        f"the certificate of {way.target} is not signed by a CA that is trusted here: {detail}",
        code="endpoint-unknown-ca",
        hint="the package's server needs a certificate that this system trusts; or let the endpoint serve the package"
        if way.kind == "package"
        else "set endpoint.ca_file or endpoint.ca_pins",
    )


def _handshake_failed(error: ssl.SSLError, way: _Way) -> FetchError:
    reason = error.reason.replace("_", " ").lower() if error.reason else _words(error)
    if error.reason in {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"}:
        return FetchError(
            f"{way.target} does not speak TLS ({reason})",
            code="endpoint-not-tls",
            hint=f"see the port in {way.setting}",
        )
    if "certificate required" in reason or "bad certificate" in reason:
        return FetchError(
            f"{way.target} wants a client certificate that it trusts ({reason})",
            code="endpoint-unauthorized",
            hint="see endpoint.credential.client_certificate",
        )
    is_closed = isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)
    return _PassingError(
        f"the TLS handshake with {way.target} failed: {reason}",
        code="endpoint-handshake-failed",
        hint=_TRIED_AGAIN if is_closed else "see that the server speaks TLS 1.2 or later",
    )


if __name__ == "__main__":
    sys.exit(main())
