"""What the network child gives up, tried by real processes: what works without the sandbox fails in it."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmmesh_agent.fetch import NOBODY
from vmmesh_agent.host import Host

USER = NOBODY.uid if os.geteuid() == 0 else os.geteuid()
GROUP = NOBODY.gid if os.geteuid() == 0 else os.getegid()

# Run with what to try, its folder, and whether the sandbox is entered first. It has all modules before that: the
# environment of the tests may be closed to the user.
TRY = f"""
import os, signal, socket, sys
"".encode("idna")
from vmmesh_agent import sandbox
what, folder, sandboxed = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
pipe = os.open(f"{{folder}}/given", os.O_WRONLY)
if sandboxed:
    sandbox.enter({USER}, {GROUP})
elif os.geteuid() == 0:
    os.setgroups([])
    os.setresgid({GROUP}, {GROUP}, {GROUP})
    os.setresuid({USER}, {USER}, {USER})
os.chdir(folder)
print("ready", flush=True)
try:
    exec(what)
except OSError as error:
    print("refused", error.errno, error.strerror, flush=True)
else:
    print("done", flush=True)
"""

FORBIDDEN = {
    "write to a file of its own": 'open("own", "r+")',
    "empty a file of its own": 'os.truncate("own", 0)',
    "make a file": 'open("new", "x")',
    "make a folder": 'os.mkdir("new")',
    "make a link": 'os.symlink("own", "new")',
    "rename a file of its own": 'os.rename("own", "new")',
    "remove a file of its own": 'os.unlink("own")',
    "open up a file of its own": 'os.chmod("own", 0o666)',
    "touch a file of its own": 'os.utime("own")',
    "start a process": "os.fork() or os._exit(0)",
    "run a program": 'os.execv("/bin/echo", ["echo", "done"])',
    "make a namespace to be root in": "import ctypes; ctypes.CDLL(None).unshare(0x10000000) and exec('raise OSError')",
    "signal a process of the same user": "os.kill(os.getpid(), signal.SIGCONT)",
    "listen": 'socket.create_server(("127.0.0.1", 0))',
}
ALLOWED = {
    "read what everybody may": 'open("/etc/passwd").read()',
    "resolve a name": 'socket.getaddrinfo("localhost", 443)',
    "connect": "socket.socket().connect_ex(('127.0.0.1', 1))",
    "connect by IPv6": "socket.socket(socket.AF_INET6)",
    "ask systemd-resolved or nscd": "socket.socket(socket.AF_UNIX)",
    "write to what it was given": 'os.write(pipe, b"x")',
}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of the user's, which the user can reach, with a file that is the user's and one that is handed over."""
    with tempfile.TemporaryDirectory() as name:  # those of pytest are closed to others
        folder = Path(name)
        (folder / "own").write_text("content")
        (folder / "given").touch()
        for path in (folder, folder / "own"):
            os.chown(path, USER, GROUP)
        yield folder


def outcome(what: str, folder: Path, *, sandboxed: bool) -> str:
    argv = [sys.executable, "-P", "-c", TRY, what, str(folder), str(sandboxed)]
    done = subprocess.run(argv, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    ready, _, rest = done.stdout.partition("\n")
    assert ready == "ready", done.stdout
    return rest.strip()


@pytest.mark.parametrize("what", FORBIDDEN)
def test_in_the_sandbox_the_child_can_not(what: str, folder: Path) -> None:
    assert outcome(FORBIDDEN[what], folder, sandboxed=True).startswith("refused ")
    assert (folder / "own").read_text() == "content"
    assert sorted(path.name for path in folder.iterdir()) == ["given", "own"]
    if "namespace" not in what:  # the machine may have closed these to everybody
        assert outcome(FORBIDDEN[what], folder, sandboxed=False) == "done"


@pytest.mark.parametrize("what", ALLOWED)
def test_in_the_sandbox_the_child_can(what: str, folder: Path) -> None:
    assert outcome(ALLOWED[what], folder, sandboxed=True) == "done"


def test_no_other_kind_of_socket_is_to_be_had(folder: Path) -> None:
    attempt = """
for family in range(1, 70):
    try:
        socket.socket(family, socket.SOCK_DGRAM)
    except OSError as error:
        if error.errno == 1:
            continue
    print(family)
"""
    left = outcome(attempt, folder, sandboxed=True).split()
    assert left == ["1", "2", "10", "16", "done"]  # AF_UNIX, AF_INET, AF_INET6, AF_NETLINK


@pytest.fixture
def child() -> Iterator[int]:
    """The network child as `fetch` starts it, before it is told anything."""
    argv = [sys.executable, "-P", "-m", "vmmesh_agent.network", str(USER), str(GROUP)]
    process = Host().start(argv)
    deadline = time.monotonic() + 60
    while "Seccomp:\t2" not in Path(f"/proc/{process.pid}/status").read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield process.pid
    process.kill()
    process.communicate()


def test_the_network_child_is_in_the_sandbox_before_it_is_told_anything(child: int) -> None:
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{child}/status").read_text().splitlines() if ":\t" in line
    )
    assert status["Uid"].split() == [str(USER)] * 4
    assert status["Gid"].split() == [str(GROUP)] * 4
    assert status["NoNewPrivs"] == "1"
    assert {name: int(status[name], 16) for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")} == dict.fromkeys(
        ("CapPrm", "CapEff", "CapInh", "CapAmb"), 0
    )
    if os.geteuid() == 0:
        assert status["Groups"].split() == []
        assert int(status["CapBnd"], 16) == 0
    limits = Path(f"/proc/{child}/limits").read_text()
    for name in ("Max processes", "Max core file size"):
        assert limits.partition(name)[2].split()[:2] == ["0", "0"]
