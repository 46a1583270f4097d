"""systemctl: a unit's state, starting, stopping and enabling it."""

from dataclasses import dataclass
from pathlib import PurePosixPath

from vmmesh_agent.host import Host

ISTIO = "istio.service"

# The start script may wait for the iptables lock, and stopping drains for up to TimeoutStopSec=30.
_SECONDS = 120


@dataclass(frozen=True, slots=True)
class UnitState:
    """What systemd says of a unit. `restarts` counts automatic ones since it was last started by hand."""

    is_loaded: bool
    active: str  # active, activating, deactivating, inactive, failed
    sub: str  # running, auto-restart, dead, …
    main_pid: int
    restarts: int
    invocation: str  # changes with every start

    @property
    def is_running(self) -> bool:
        return self.active == "active"

    @property
    def is_down(self) -> bool:
        return self.active in {"inactive", "failed"}


class Units:
    """The units of one machine; on an image tree they can be enabled but not started."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._root = [] if host.is_running else [f"--root={host.root}"]

    def state(self, unit: str) -> UnitState:
        """Ask systemd; any user may. Where it does not answer, `active` is `unknown`. In an image tree nothing runs."""
        if not self._host.is_running:
            return UnitState(self.exists(unit), "inactive", "dead", main_pid=0, restarts=0, invocation="")
        names = ("LoadState", "ActiveState", "SubState", "MainPID", "NRestarts", "InvocationID")
        asked = self._host.run(["systemctl", "show", unit, f"--property={','.join(names)}"], timeout=10, check=False)
        shown = dict(line.split("=", 1) for line in asked.stdout.splitlines() if "=" in line)
        return UnitState(
            is_loaded=shown.get("LoadState") == "loaded",
            active=shown.get("ActiveState", "unknown"),
            sub=shown.get("SubState", "unknown"),
            main_pid=int(shown.get("MainPID") or 0),
            restarts=int(shown.get("NRestarts") or 0),
            invocation=shown.get("InvocationID", ""),
        )

    def is_enabled(self, unit: str) -> bool:
        return self._host.run(["systemctl", *self._root, "is-enabled", unit], check=False).stdout.strip() == "enabled"

    def enable(self, unit: str) -> None:
        self._host.run(["systemctl", *self._root, "enable", unit], timeout=_SECONDS)

    def disable(self, unit: str) -> None:
        self._host.run(["systemctl", *self._root, "disable", unit], timeout=_SECONDS)

    def reload(self) -> None:
        """Let systemd read the unit files anew, after a package changed them."""
        self._host.run(["systemctl", "daemon-reload"], timeout=_SECONDS)

    def start(self, unit: str) -> None:
        """Start the unit and wait for it; network-online.target, which it may wait for, may take two minutes."""
        self._host.run(["systemctl", "start", unit], timeout=2.5 * _SECONDS)

    def stop(self, unit: str) -> None:
        self._host.run(["systemctl", "stop", unit], timeout=_SECONDS)

    def request_start(self, unit: str) -> None:
        """Let systemd start the unit, and do not wait for it."""
        self._host.run(["systemctl", "start", "--no-block", unit], timeout=10)

    def request_stop(self, unit: str) -> None:
        """Let systemd stop the unit, and do not wait for it."""
        self._host.run(["systemctl", "stop", "--no-block", unit], timeout=10)

    def exists(self, unit: str) -> bool:
        """Is there a unit file, or a drop-in (`istio.service.d/…`), of this name?"""
        folders = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
        return any(self._host.status(PurePosixPath(folder) / unit) for folder in folders)
