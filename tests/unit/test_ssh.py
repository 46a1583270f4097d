"""The ports of SSH servers, read from what `ss` and systemd say."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from vmmesh_agent import clusterenv, ssh
from vmmesh_agent.errors import HostError
from vmmesh_agent.host import Completed, Host

SS = """\
LISTEN 0      128          0.0.0.0:2222       0.0.0.0:*    users:(("sshd",pid=400,fd=3))
LISTEN 0      128             [::]:2222          [::]:*    users:(("sshd",pid=400,fd=4))
LISTEN 0      128        127.0.0.1:2200       0.0.0.0:*    users:(("dropbear",pid=402,fd=4))
LISTEN 0      4096       127.0.0.1:15000      0.0.0.0:*    users:(("envoy",pid=500,fd=20))
LISTEN 0      4096         0.0.0.0:80         0.0.0.0:*
"""
SOCKET = "Listen=[::]:22022 (Stream)\nListen=/run/ssh (Stream)\nActiveState={state}\n"


class Saying(Host):
    """A host whose `ss` and systemctl say what they are told to."""

    def __init__(self, ss: str | None, sockets: Mapping[str, str]) -> None:
        super().__init__(Path("/nonexistent"))
        self._ss = ss
        self._sockets = sockets

    def run(self, argv: Sequence[str], **_: object) -> Completed:
        if argv[0] == "ss" and self._ss is None:
            raise HostError("ss is not installed", code="program-missing")
        said = (self._ss or "") if argv[0] == "ss" else self._sockets.get(argv[-1], "ActiveState=inactive\n")
        return Completed(tuple(argv), 0, said, "")


@pytest.mark.parametrize(
    ("ss", "sockets", "ports"),
    [
        (SS, {}, (2200, 2222)),
        (SS, {"ssh.socket": SOCKET.format(state="active")}, (2200, 2222, 22022)),
        ("", {"sshd.socket": SOCKET.format(state="active")}, (22022,)),
        ("", {"ssh.socket": SOCKET.format(state="inactive")}, ()),
        (None, {}, ()),
    ],
)
def test_the_ports_are_those_that_are_listened_on(
    ss: str | None, sockets: Mapping[str, str], ports: tuple[int, ...]
) -> None:
    assert ssh.listening_ports(Saying(ss, sockets)) == ports


@pytest.mark.parametrize(
    ("told", "excluded"),
    [(None, "22,2222"), ("", "22,2222"), ("15090,22", "15090,22,2222"), ("2222,22", "2222,22")],
)
def test_they_are_excluded_whatever_the_bundle_says(told: str | None, excluded: str) -> None:
    name = "ISTIO_LOCAL_EXCLUDE_PORTS"
    variables = {"NAME": "value"} | ({name: told} if told is not None else {})
    assert clusterenv.excluding_inbound(variables, [22, 2222]) == {"NAME": "value", name: excluded}
