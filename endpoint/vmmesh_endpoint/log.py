"""The endpoint's own log: one JSON object per line on standard error, never a secret."""

import json
import logging
import re
from datetime import UTC, datetime
from typing import Any

_log = logging.getLogger("vmmesh_endpoint")
_JOIN_TOKEN = re.compile(r"(VM1\.[A-Za-z0-9]*\.)[^/\s]+")


def setup() -> None:
    """Send the log of this process, libraries included, to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    _log.setLevel(logging.INFO)


def info(event: str, **fields: Any) -> None:
    """Log what happened."""
    _log.info(event, extra={"fields": fields})


def warning(event: str, **fields: Any) -> None:
    """Log what somebody should look at."""
    _log.warning(event, extra={"fields": fields})


def masked(text: str) -> str:
    """Hide the secret half of a join token that somebody put where it does not belong, such as a path."""
    return _JOIN_TOKEN.sub(r"\1…", text)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": moment.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": record.getMessage().strip(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
