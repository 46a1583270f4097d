"""Bad input on a real machine: what the agent says to it, and that nothing on the machine changed.

All that a test gives the agent lies in one folder of the machine, which is left out of the comparison. The state of
the machine after one test is the state before the next, so each test takes one snapshot.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from lab.cluster import Files
from lab.machine import Machine, difference

FOLDER = "/root/input"
BUNDLE = f"{FOLDER}/bundle"
CONFIG = f"{FOLDER}/config.yaml"
# What a refusal may leave behind: the status record and the lock, and the empty folder for packages.
ALLOWED = (
    "/run/vmmesh-agent/package-manager.log",
    f"{FOLDER}*",
    "/run/vmmesh-agent",
    "/run/vmmesh-agent/status.json",
    "/run/vmmesh-agent/lock",
    "/var/lib/vmmesh-agent",
    "/var/lib/vmmesh-agent/packages",
    # Not the agent's: rpm's index of its own locks, and the mark of a log-in prompt that noticed the network.
    "/root/.rpmdb/rpmdb.sqlite-shm",
    "/root/.rpmdb/rpmdb.sqlite-wal",
    "/run/agetty.reload",
)

_COMPLAINT = re.compile(r"^vmmesh-agent: (?P<message>.*) \[(?P<code>[a-z0-9-]+)\]\n(?P<hints>(  → .*\n)*)\Z", re.DOTALL)


@dataclass(frozen=True)
class Refusal:
    """How the agent ended: what it printed, and its complaint taken apart (empty where it has another shape)."""

    status: int
    stdout: str
    stderr: str
    message: str
    code: str
    hint: str
    problems: frozenset[str]  # the code of each problem that the message lists

    @property
    def output(self) -> str:
        """All that it printed."""
        return self.stdout + self.stderr


class Trial:
    """One machine, and what it is tried with."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._before = machine.snapshot()

    def give(self, name: str, content: bytes | str, mode: int = 0o644) -> str:
        """Put a file into the folder of the input and return its path."""
        path = f"{FOLDER}/{name}"
        self.machine.write(path, content, mode=mode)
        return path

    def give_bundle(self, files: Files) -> str:
        """Put the five files, or as many as there are, into a new folder and return the folder's address."""
        self.machine.run(["rm", "-rf", BUNDLE])
        self.machine.run(["mkdir", "-p", BUNDLE])
        for name, content in files.items():
            self.machine.write(f"{BUNDLE}/{name}", content)
        return f"file://{BUNDLE}"

    def configure(self, url: str, *, endpoint: Mapping[str, Any] | None = None, **sections: Any) -> list[str]:
        """Write a configuration and return the beginning of the command line that uses it."""
        document = {"endpoint": {"url": url, **(endpoint or {})}, **sections}
        self.give("config.yaml", yaml.safe_dump(document))
        return ["vmmesh-agent", f"--config={CONFIG}"]

    def bootstrap(
        self,
        url: str,
        *,
        timeout: float = 60,
        limit: float = 60,
        endpoint: Mapping[str, Any] | None = None,
        **sections: Any,
    ) -> Refusal:
        """Try to join with a configuration of this address; `timeout` is the agent's, `limit` is ours."""
        argv = [*self.configure(url, endpoint=endpoint, **sections), "bootstrap", f"--timeout={timeout:g}"]
        return self.run(argv, limit=limit)

    def run(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, limit: float = 60, user: str = "root"
    ) -> Refusal:
        """Run a command that shall refuse, and take its complaint apart.

        It is ended after `limit` seconds, and may have 2 GiB of memory.
        """
        bounded = ["prlimit", f"--as={2 * 1024**3}", "--core=0", "--", *argv]
        done = self.machine.run(bounded, check=False, timeout=limit, env=env, user=user)
        found = _COMPLAINT.match(done.stderr)
        message = found["message"] if found else ""
        return Refusal(
            status=done.returncode,
            stdout=done.stdout,
            stderr=done.stderr,
            message=message,
            code=found["code"] if found else "",
            hint="\n".join(line.removeprefix("  → ") for line in found["hints"].splitlines()) if found else "",
            problems=frozenset(re.findall(r"\[([a-z0-9-]+)\]$", message, re.MULTILINE)),
        )

    def changes(self) -> list[str]:
        """What changed since the last look, in words, but for what may: a download left behind is told as well."""
        before, self._before = self._before, self.machine.snapshot()
        return difference(before, self._before, ignore=ALLOWED)


def assert_refused(refusal: Refusal, code: str, *fragments: str, status: int = 1, hinted: bool = True) -> None:
    """Hold a complaint to its form: the code, the exit status, what it names, a remedy, fit for a terminal."""
    shown = f"\n--- status {refusal.status}, stderr:\n{refusal.stderr}\n--- stdout:\n{refusal.stdout}"
    assert refusal.code == code, shown
    assert refusal.status == status, shown
    for fragment in fragments:
        assert fragment in refusal.message + refusal.hint, f"{fragment!r} is missing{shown}"
    if hinted:
        assert refusal.hint, f"no hint{shown}"
    assert_fit_for_a_terminal(refusal.output)


def assert_fit_for_a_terminal(text: str) -> None:
    """No text of a stranger may steer the terminal of root: colours, cursor, title, direction of writing."""
    wild = sorted({character for character in text if not character.isprintable() and character not in "\n\t"})
    assert not wild, f"{wild} in {text!r}"
    assert "Traceback" not in text
