"""The agent's own log: structured, one line an event, to standard error, where the journal takes it up."""

import sys
from typing import Protocol

import structlog


class Logger(Protocol):
    """What is used of structlog."""

    def info(self, event: str, **values: object) -> object: ...
    def warning(self, event: str, **values: object) -> object: ...


def logger() -> Logger:
    """Return the log. Under systemd the journal adds the time; a prefix tells it the severity (sd-daemon(3))."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            _rendered,
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    log: Logger = structlog.get_logger()
    return log


_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3}


_as_logfmt = structlog.processors.LogfmtRenderer(key_order=["event"])


def _rendered(logger: object, method: str, event: structlog.typing.EventDict) -> str:
    """Write one line such as `<6>event=place detail="nothing to change"`."""
    return f"<{_PRIORITIES[event.pop('level')]}>{_as_logfmt(logger, method, event)}"
