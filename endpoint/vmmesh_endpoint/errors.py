"""Every error the endpoint raises on purpose.

EndpointError              ends the command: what happened, what to do, an exit status
├── UsageError             the command line makes no sense                              64
├── NotPermittedError      a file or port that this user may not use                    77
└── ConfigurationError     an option, a file or a credential is not fit to serve with   78
Refusal                    ends one request: an HTTP status and a sentence for the one who asked
"""

from collections.abc import Mapping


class EndpointError(Exception):
    """Something the command can explain; `hint` says what to do, or is empty."""

    exit_status = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(EndpointError):
    """The command line makes no sense."""

    exit_status = 64


class NotPermittedError(EndpointError):
    """A file or a port is not this user's to use."""

    exit_status = 77


class ConfigurationError(EndpointError):
    """An option, a file or a credential is not fit to serve with."""

    exit_status = 78


class Refusal(Exception):  # noqa: N818  # it is an answer, not a fault of the program
    """The answer to a request that gets nothing: `code` is kebab-case and stable, `message` one sentence.

    The message goes to whoever asked, so it names no path and no secret of this machine.
    """

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = dict(headers or {})


def unavailable(code: str, message: str, *, retry_after: int = 60) -> Refusal:
    """A 503 that says when to come back, in seconds."""
    return Refusal(503, code, message, {"Retry-After": str(retry_after)})
