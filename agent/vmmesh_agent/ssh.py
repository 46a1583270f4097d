"""Where sshd listens: those ports are never captured, so that a sidecar that is dead locks nobody out."""

import re

from vmmesh_agent.errors import HostError
from vmmesh_agent.host import Host

ALWAYS = 22

_SERVER = re.compile(r'\(\("(?:sshd|dropbear)"')
_SOCKETS = ("ssh.socket", "sshd.socket")  # where systemd listens in sshd's place: Debian's name, Red Hat's
_LISTENS = re.compile(r"^Listen=(?:.*:)?(\d+) \(Stream\)$", re.MULTILINE)


def listening_ports(host: Host) -> tuple[int, ...]:
    """Return the TCP ports of the SSH servers that run, sorted; none where none is seen, as early in a boot."""
    return tuple(sorted({*_of_processes(host), *_of_sockets(host)}))


def _of_processes(host: Host) -> set[int]:
    try:
        listed = host.run(["ss", "--no-header", "--tcp", "--listening", "--numeric", "--processes"], check=False).stdout
    except HostError:  # no ss here: what is known of it from before goes on
        return set()
    fields = [line.split() for line in listed.splitlines() if _SERVER.search(line)]
    return {int(port) for field in fields if (port := field[3].rpartition(":")[2]).isdecimal()}


def _of_sockets(host: Host) -> set[int]:
    shown = [
        host.run(["systemctl", "show", "--property=ActiveState", "--property=Listen", socket], timeout=10, check=False)
        for socket in _SOCKETS
    ]
    return {
        int(port) for done in shown if "ActiveState=active" in done.stdout for port in _LISTENS.findall(done.stdout)
    }
