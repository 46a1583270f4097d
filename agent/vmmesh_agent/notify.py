"""Tell systemd how the daemon is (sd_notify(3), sd_journal_send(3)); nothing happens where systemd does not ask."""

from systemd.daemon import notify as _notify
from systemd.journal import send as _send


def ready(status: str) -> None:
    """The daemon is at work."""
    _notify(f"READY=1\nSTATUS={status}")


def status(text: str) -> None:
    """One line for `systemctl status`, and a sign of life for the watchdog."""
    _notify(f"STATUS={text}\nWATCHDOG=1")


def alive() -> None:
    """A sign of life for the watchdog."""
    _notify("WATCHDOG=1")


def stopping() -> None:
    """The daemon is about to end."""
    _notify("STOPPING=1")


def event(message: str, fields: dict[str, str]) -> None:
    """Put one entry with these fields of its own into the journal (systemd.journal-fields(7))."""
    _send(message, **fields)
