"""Tell systemd how the daemon is (sd_notify(3)); nothing happens where systemd does not ask."""

from systemd.daemon import notify as _notify


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
