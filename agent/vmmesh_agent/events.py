"""Who is told when the state of this VM changes: the journal, vmmesh-ready.target, the administrator's hooks.

None of them can stop the daemon: what goes wrong here is a line in the log.
"""

import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from pathlib import PurePosixPath

from vmmesh_agent import notify
from vmmesh_agent.errors import AgentError
from vmmesh_agent.health import State
from vmmesh_agent.host import ROOT, Host
from vmmesh_agent.log import Logger
from vmmesh_agent.report import Report
from vmmesh_agent.units import Units

MESSAGE_ID = "c53d9e337295407d80dc471150b047c1"  # of every state change in the journal; never changes

READY = "vmmesh-ready.target"
# vmmesh-ready.service waits for this file, so that the target is reached only while we say so, whoever asks for it.
READY_MARK = PurePosixPath("/run/vmmesh-agent/ready")
_PATIENCE = timedelta(seconds=15)  # longer than systemd takes to start a sidecar that crashed (RestartSec=10)

HOOKS = PurePosixPath("/etc/vmmesh-agent/hooks.d")
_HOOK_SECONDS = 10
_HOOK_NAME = re.compile(r"\w[\w.-]*")
_LEFT_OVER = (".dpkg-old", ".dpkg-dist", ".dpkg-new", ".rpmsave", ".rpmnew", ".rpmorig", ".bak", ".disabled")
_HOOK_OUTPUT = 4096  # characters of it that go into the log

_WARNING, _NOTICE = "4", "5"  # priorities of the journal (syslog(3))
_SERVES = frozenset({State.HEALTHY, State.DEGRADED})
_IS_OUT = frozenset({State.FAILED, State.STOPPED, State.NOT_JOINED})


class Events:
    """Notices what changes from report to report, and tells it. `tell` puts a message with fields into the journal."""

    def __init__(
        self, host: Host, units: Units, log: Logger, tell: Callable[[str, dict[str, str]], None] = notify.event
    ) -> None:
        self._host = host
        self._units = units
        self._log = log
        self._tell = tell
        self._out_since: datetime | None = None

    def note(self, before: Report | None, current: Report) -> None:
        """Compare two reports that follow each other; `before` is None where nothing was known."""
        previous = before.health if before else None
        if previous is None or (previous.state, previous.cause) != (current.health.state, current.health.cause):
            self._tell(_message(before, current), _fields(before, current))
        try:
            self._keep_target(current)
        except AgentError as error:
            self._log.warning("target", unit=READY, code=error.code, message=error.message)
        if previous is None or previous.state != current.health.state:
            self._run_hooks(current)

    # --- vmmesh-ready.target ---

    def _keep_target(self, current: Report) -> None:
        """Reach the target as soon as the sidecar serves; give it up when the sidecar has been out for a while.

        A degraded sidecar serves: an application that is started after the target may be the one whose probe
        fails until then. What is out only for a moment, as in a restart, must not stop the applications.
        """
        health = current.health
        if health.state not in _IS_OUT:
            self._out_since = None
        if health.state in _SERVES and health.cause != "stopping":
            if not self._is_reached():
                self._host.write(READY_MARK, b"", ROOT, 0o644)
                self._units.request_start(READY)
        elif health.state in _IS_OUT and self._is_reached():
            self._out_since = self._out_since or current.updated_at
            if current.updated_at - self._out_since >= _PATIENCE:
                self._host.remove(READY_MARK)
                self._units.request_stop(READY)

    def _is_reached(self) -> bool:
        return self._host.status(READY_MARK) is not None

    # --- hooks ---

    def _run_hooks(self, current: Report) -> None:
        document = json.dumps(current.as_dict()).encode() + b"\n"
        try:
            for path in self._hooks():
                self._run_hook(path, document)
        except AgentError as error:
            self._log.warning("hooks", code=error.code, message=error.message)

    def _hooks(self) -> list[PurePosixPath]:
        """Return the hooks in the order of their names, those left out that somebody else than root may write."""
        names = [
            name for name in self._host.names_in(HOOKS) if _HOOK_NAME.fullmatch(name) and not name.endswith(_LEFT_OVER)
        ]
        for folder in (HOOKS.parent, HOOKS) if names else ():
            if fault := self._fault(folder):
                self._log.warning("hooks refused", path=str(folder), reason=fault)
                return []
        hooks = []
        for path in (HOOKS / name for name in names):
            if fault := self._fault(path):
                self._log.warning("hook refused", path=str(path), reason=fault)
            elif (found := self._host.status(path)) and found.is_file and found.mode & 0o100:
                hooks.append(path)
        return hooks

    def _fault(self, path: PurePosixPath) -> str:
        """Say why root may not run what is there; empty where it may."""
        found = self._host.status(path)
        if found is None or not (found.is_file or found.is_directory):
            return "it is not a plain file"
        if found.owner.uid != 0:
            return f"it belongs to user {found.owner.uid}, not to root"
        return "its group or others may write to it" if found.mode & 0o022 else ""

    def _run_hook(self, path: PurePosixPath, document: bytes) -> None:
        notify.alive()
        # timeout(1) ends the children of the hook too.
        argv = ["timeout", "--signal=KILL", str(_HOOK_SECONDS), str(self._host.outside(path))]
        try:
            done = self._host.run(argv, input=document, timeout=_HOOK_SECONDS + 2, check=False)
        except AgentError as error:
            self._log.warning("hook failed", path=str(path), reason=error.message)
            return
        output = (done.stdout + done.stderr).strip()[:_HOOK_OUTPUT]
        if done.status == 0:
            self._log.info("hook", path=str(path), output=output)
        else:
            killed = done.status in {-9, 137}  # timeout(1), where the signal is KILL
            reason = f"it did not end within {_HOOK_SECONDS} s" if killed else f"status {done.status}"
            self._log.warning("hook failed", path=str(path), reason=reason, output=output)


def _message(before: Report | None, current: Report) -> str:
    health = current.health
    cause = "" if health.cause == "none" else f" ({health.cause})"
    was = f", was {before.health.state}" if before and before.health.state != health.state else ""
    sentence = f": {health.conditions[0].message}" if health.conditions else ""
    return f"{current.known.workload or 'This VM'} is {health.state}{cause}{was}{sentence}"


def _fields(before: Report | None, current: Report) -> dict[str, str]:
    health = current.health
    fields: Mapping[str, str] = {
        "MESSAGE_ID": MESSAGE_ID,
        "PRIORITY": _WARNING if health.state in {State.FAILED, State.DEGRADED} else _NOTICE,
        "SYSLOG_IDENTIFIER": "vmmesh-agent",
        "VMMESH_STATE": str(health.state),
        "VMMESH_CAUSE": health.cause,
        "VMMESH_PREVIOUS_STATE": str(before.health.state) if before else "",
        "VMMESH_CONDITIONS": " ".join(condition.code for condition in health.conditions),
        "VMMESH_WORKLOAD": current.known.workload,
    }
    return {name: value for name, value in fields.items() if value}
