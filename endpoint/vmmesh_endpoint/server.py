"""The server: one socket, TLS, uvicorn's HTTP, and limits for whoever is slow or asks for too much."""

import asyncio
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from ipaddress import IPv6Address, ip_address
from types import FrameType
from typing import Any, NoReturn

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from vmmesh_endpoint import log
from vmmesh_endpoint.app import client_address, refusal_response
from vmmesh_endpoint.errors import EndpointError, NotPermittedError, unavailable
from vmmesh_endpoint.tls import ServerContext

HANDSHAKE_SECONDS = 10
REQUEST_SECONDS = 10  # from the handshake, or the answer before, until the headers are complete
SEND_SECONDS = 30  # until a piece of an answer has been taken
STOP_SECONDS = 1
MAX_CONNECTIONS = 500
MAX_HEADER_BYTES = 16 * 1024


def listen(address: str, port: int) -> socket.socket:
    """Bind and listen; `::` takes IPv4 too."""
    version_6 = isinstance(ip_address(address), IPv6Address)
    try:
        return socket.create_server(
            (address, port),
            family=socket.AF_INET6 if version_6 else socket.AF_INET,
            dualstack_ipv6=version_6 and address == "::" and socket.has_dualstack_ipv6(),
            backlog=256,
        )
    except PermissionError:
        raise NotPermittedError(f"port {port} is not this user's to listen on") from None
    except OSError as error:
        raise EndpointError(f"cannot listen on {address} port {port}: {error.strerror}") from None


def serve(application: ASGIApp, context: ServerContext, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT; then give the answers under way a second and exit with status 0.

    `ready` is called when requests are answered.
    """
    # While it runs, uvicorn handles both; when it has stopped it raises what it caught again.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit)
    config = uvicorn.Config(
        application,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,  # there is one of our own
        proxy_headers=False,  # nobody may say that he is somebody else
        server_header=False,
        timeout_keep_alive=REQUEST_SECONDS,
        timeout_graceful_shutdown=STOP_SECONDS + 1,  # by then there is nobody left
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
    )
    asyncio.run(Server(config, context, ready).serve(sockets=[listener]))


class Server(uvicorn.Server):
    """uvicorn, listening with a TLS context of ours and with limits on the handshake."""

    def __init__(self, config: uvicorn.Config, context: ServerContext, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._context = context
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on the sockets given."""
        await super().startup(sockets=[])
        loop = asyncio.get_running_loop()
        for listener in sockets or []:
            server = await loop.create_server(
                partial(Connection, self._context, self.config, self.server_state, {}),
                sock=listener,
                ssl=self._context.context,
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
                ssl_shutdown_timeout=STOP_SECONDS,
            )
            self.servers.append(server)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Give the answers under way a moment, then break them off."""
        asyncio.get_running_loop().call_later(STOP_SECONDS, self._break_off)
        await super().shutdown(sockets)

    def _break_off(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


class Connection(H11Protocol):
    """One connection: refreshes the certificate before its handshake, and ends when the client dawdles."""

    _patience: asyncio.TimerHandle | None = None

    def __init__(self, context: ServerContext, *arguments: Any, **options: Any) -> None:
        context.refresh()
        super().__init__(*arguments, **options)
        self._serve = self.app
        self.app = self._request

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The handshake is done; the first request has to come soon."""
        super().connection_made(transport)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """The next request on this connection has to come soon, too."""
        self._await_request()
        super().on_response_complete()

    def _await_request(self) -> None:
        self._stop_waiting()
        self._patience = self.loop.call_later(REQUEST_SECONDS, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._patience:
            self._patience.cancel()

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._stop_waiting()
        peer = self.transport.get_extra_info("peercert")
        if peer:  # the ASGI TLS extension's name for it
            scope["extensions"] = {"tls": {"client_cert_name": _distinguished_name(peer)}}

        async def send_in_time(message: Message) -> None:
            deadline = self.loop.call_later(SEND_SECONDS, self.transport.abort)
            try:
                await send(message)
            finally:
                deadline.cancel()

        if len(self.connections) > MAX_CONNECTIONS:
            log.warning("too many connections", client=client_address(scope))
            response = refusal_response(unavailable("busy", "The endpoint is busy.", retry_after=5))
            await response(scope, receive, send_in_time)
        else:
            await self._serve(scope, receive, send_in_time)


def _exit(number: int, _: FrameType | None) -> NoReturn:
    log.info("stopped", signal=signal.Signals(number).name)
    sys.exit(0)


def _distinguished_name(certificate: dict[str, Any]) -> str:
    parts = (attribute for relative in certificate.get("subject", ()) for attribute in relative)
    return ",".join(f"{name}={value}" for name, value in parts) or f"serial {certificate['serialNumber']}"
