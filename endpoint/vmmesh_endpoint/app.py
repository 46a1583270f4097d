"""The HTTP side: who asks, what they may have, and what they are told when they may not.

    GET /v1/bundle           the bundle, format 1
    GET /v1/packages/NAME    a package that the bundle names
    GET /healthz             is the server there? (no credential)

A request is judged in this order: the credential (401, 410), whether there is anything to serve (503), whether
this caller may have it (403, 404), and last the admission of a new machine, which uses the join token up.
"""

import hashlib
import json
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from ipaddress import IPv6Address, ip_address
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vmmesh_endpoint import log
from vmmesh_endpoint.bundle import Bundle, BundleFolder
from vmmesh_endpoint.credentials import JoinToken, SharedSecrets, Throttle, TokenFile
from vmmesh_endpoint.errors import ConfigurationError, Refusal, unavailable
from vmmesh_endpoint.packages import Package, PackageFolder, offered

MEDIA_TYPE = "application/vnd.vmmesh.bundle.v1+json"

_HOST = re.compile(r"([A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?")
_MACHINE = re.compile(r"[0-9a-f]{1,64}")
_REFUSED_BY_ROUTER = {
    404: ("not-found", "There is nothing at this address; the bundle is at /v1/bundle."),
    405: ("method-not-allowed", "Only GET and HEAD are answered here."),
}


class Endpoint:
    """What is served and to whom."""

    def __init__(
        self,
        bundles: BundleFolder,
        packages: PackageFolder,
        tokens: TokenFile,
        shared_secrets: SharedSecrets | None = None,
    ) -> None:
        self._bundles = bundles
        self._packages = packages
        self._tokens = tokens
        self._shared_secrets = shared_secrets
        self._throttle = Throttle()

    def application(self) -> ASGIApp:
        """Return the ASGI application; its routes run in threads, so reading a file holds up nobody."""
        application = Starlette(
            routes=[
                Route("/v1/bundle", self.bundle, methods=["GET"]),
                Route("/v1/packages/{name}", self.package, methods=["GET"]),
                Route("/healthz", self.healthz, methods=["GET"]),
            ],
            exception_handlers={
                Refusal: _refused,
                HTTPException: _refused_by_router,
                ConfigurationError: _misconfigured,
                PermissionError: _misconfigured,
                500: _failed,
            },
        )
        application.router.redirect_slashes = False
        return AccessLog(application)

    def healthz(self, _: Request) -> Response:
        """Say that the server is there, and nothing about what it serves."""
        return JSONResponse({"status": "ok"}, headers={"Cache-Control": "no-store"})

    def bundle(self, request: Request) -> Response:
        """Answer the bundle, or 304 where the caller has it already."""
        base = _base_url(request)
        bundle = self._admit(request)
        packages = offered(self._packages.current())
        etag = _etag(bundle.digest, base, *(f"{package.name} {package.sha256}" for package in packages))
        headers = {"ETag": etag, "Cache-Control": "no-store"}
        if _has(request, etag):
            return Response(status_code=304, headers=headers)
        document = bundle_document(bundle, packages, base)
        return Response(json.dumps(document, indent=2), headers=headers, media_type=MEDIA_TYPE)

    def package(self, request: Request) -> Response:
        """Answer a package file, whole or in part.

        It is no secret: any credential that has not been revoked will do, and no machine is admitted by it.
        """
        token = self._identify(request)
        if token:
            token.require_not_revoked()
        name = request.path_params["name"]
        package = next((package for package in self._packages.current() if package.name == name), None)
        if package is None:
            raise Refusal(404, "package-not-found", "There is no such istio-sidecar package here.")
        headers = {"ETag": f'"{package.sha256}"', "Cache-Control": "private, no-cache"}
        if _has(request, headers["ETag"]):
            return Response(status_code=304, headers=headers)
        return FileResponse(package.path, headers=headers, media_type="application/octet-stream")

    def _admit(self, request: Request) -> Bundle:
        """Return the bundle that this caller may have, or raise the `Refusal`."""
        token = self._identify(request)
        machine = _machine(request)
        if token:
            if not machine:
                message = "A join token admits machines by their Vmmesh-Machine header, and there was none."
                raise Refusal(400, "machine-missing", message)
            token.require_usable(machine, datetime.now(UTC))
        bundle = self._bundles.current()
        served = str(bundle.workload)
        if token and token.workload not in {"", served}:
            raise Refusal(403, "workload-not-permitted", "This join token is for another workload group.")
        if request.headers.get("vmmesh-workload-group", served) != served:
            message = f"The workload group asked for is not served here; served is {served}."
            raise Refusal(404, "workload-not-served", message)
        if token and machine not in token.machines:
            self._tokens.admit(token.id, machine)
            log.info("machine admitted", token_id=token.id, machine=machine)
        return bundle

    def _identify(self, request: Request) -> JoinToken | None:
        """Recognize the credential, or raise the `Refusal`; return the token where it is a join token.

        A bearer token is judged where there is one, else the client's certificate.
        """
        authorization = request.headers.get("authorization")
        certificate = request.scope.get("extensions", {}).get("tls", {}).get("client_cert_name")
        if authorization is None and certificate is not None:
            request.state.credential = f"certificate {certificate}"
            return None
        scheme, _, secret = (authorization or "").partition(" ")
        secret = secret.strip() if scheme.lower() == "bearer" else ""
        if self._shared_secrets and secret and self._shared_secrets.recognize(secret):
            request.state.credential = "shared secret"
            return None
        token = self._tokens.recognize(secret)
        if token is None:
            raise self._unauthenticated(request, given=authorization is not None)
        request.state.credential = "join token"
        request.state.token_id = token.id
        return token

    def _unauthenticated(self, request: Request, *, given: bool) -> Refusal:
        wait = self._throttle.failed(_network(client_address(request.scope)))
        if wait:
            message = f"Too many failed attempts from this address; try again in {wait} s."
            return Refusal(429, "too-many-failures", message, {"Retry-After": str(wait)})
        code, message = (
            ("credential-unknown", "The credential is not known here.")
            if given
            else ("credential-missing", "A credential is needed: Authorization: Bearer, or a client certificate.")
        )
        return Refusal(401, code, message, {"WWW-Authenticate": 'Bearer realm="vmmesh"'})


def bundle_document(bundle: Bundle, packages: tuple[Package, ...], base_url: str) -> dict[str, Any]:
    """Return format 1 of the bundle; without packages there is no `sidecar`."""
    document: dict[str, Any] = {
        "version": 1,
        "workload": {"namespace": bundle.workload.namespace, "name": bundle.workload.name},
        "files": dict(bundle.files),
    }
    if packages:
        document["sidecar"] = {
            "version": packages[0].version,
            "packages": [
                {
                    "format": package.format,
                    "arch": package.arch,
                    "version": package.version,
                    "url": f"{base_url}/v1/packages/{package.name}",
                    "sha256": package.sha256,
                    "size": package.size,
                }
                for package in packages
            ],
        }
    return document


class AccessLog:
    """One line per request. What the routes found out about the caller is in the request's state."""

    def __init__(self, application: ASGIApp) -> None:
        self._application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and log it when it has been answered or broken off."""
        state: dict[str, Any] = {}
        scope["state"] = state
        started = time.monotonic()
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._application(scope, receive, noted)
        finally:
            known = {key: state.get(key, "") for key in ("machine", "credential", "token_id", "reason")}
            log.info(
                "request",
                client=client_address(scope),
                method=scope["method"],
                path=log.masked(scope["path"][:200]),
                status=status,
                seconds=round(time.monotonic() - started, 3),
                **{key: value for key, value in known.items() if value},
            )


def refusal_response(refusal: Refusal) -> Response:
    """Return the JSON that every refusal is told in."""
    content = {"error": {"code": refusal.code, "message": refusal.message}}
    headers = {"Cache-Control": "no-store", **refusal.headers}
    return JSONResponse(content, status_code=refusal.status, headers=headers)


def client_address(scope: Mapping[str, Any]) -> str:
    """Return the address of the other side; an IPv4 address as such also on a socket for both."""
    address = ip_address(scope["client"][0].partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address)


def _machine(request: Request) -> str:
    machine = request.headers.get("vmmesh-machine", "").lower()
    if machine and not _MACHINE.fullmatch(machine):
        raise Refusal(400, "machine-invalid", "Vmmesh-Machine must be 1 to 64 hexadecimal digits.")
    request.state.machine = machine
    return machine


def _network(address: str) -> str:
    # Whoever has one IPv6 address has its /64.
    parsed = ip_address(address)
    return parsed.exploded[:19] if isinstance(parsed, IPv6Address) else address


def _refused(request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)  # noqa: S101  # registered for it
    request.state.reason = refusal.code
    return refusal_response(refusal)


def _refused_by_router(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101  # registered for it
    code, message = _REFUSED_BY_ROUTER.get(error.status_code, ("bad-request", "The request makes no sense."))
    return _refused(request, Refusal(error.status_code, code, message, error.headers))


def _misconfigured(request: Request, error: Exception) -> Response:
    # A file of credentials was spoilt while serving; it may be mended while serving, too.
    log.warning("credentials cannot be read", reason=str(error))
    message = "The endpoint cannot read its credentials; its log says why."
    return _refused(request, unavailable("credentials-unreadable", message))


def _failed(request: Request, _: Exception) -> Response:
    # The traceback goes to the log; nothing of it goes out.
    return _refused(request, Refusal(500, "internal-error", "The endpoint failed; its log says why."))


def _base_url(request: Request) -> str:
    host = request.headers.get("host", "")
    if not _HOST.fullmatch(host):
        raise Refusal(400, "host-invalid", "The Host header is not a name or address with an optional port.")
    return f"https://{host}"


def _etag(*parts: str) -> str:
    return '"' + hashlib.sha256("\n".join(parts).encode()).hexdigest() + '"'


def _has(request: Request, etag: str) -> bool:
    tags = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    return etag in tags or tags == ["*"]
