"""Out of the mesh: the sidecar stopped, its capture, files and unit changes gone, the machine as it was found.

A mark is made first and goes last. Whatever interrupts it, running it again goes on with it.
"""

from pathlib import PurePosixPath

from vmmesh_agent import found, hosts, install, place, signals, store
from vmmesh_agent.errors import HostError
from vmmesh_agent.events import READY, READY_MARK
from vmmesh_agent.found import Found
from vmmesh_agent.host import ROOT, Account, Host, Status
from vmmesh_agent.packages import managers
from vmmesh_agent.units import ISTIO, Units
from vmmesh_agent.world import Progress

_AGENT = "vmmesh-agent.service"
_CLEAN = ["/usr/local/bin/istio-start.sh", "clean"]
_LOGS = PurePosixPath("/var/log/istio")
_LEFT = ".left"
_LEAVING = store.FOLDER / "leaving"  # is there while it is not known whether all is as it was found
_DONE = b"all is as it was found\n"  # in that mark, when only it and the note of what was found have to go
_PROGRAMS = PurePosixPath("/usr/local/bin")
RUN = PurePosixPath("/run/vmmesh-agent")

_IDENTITY = frozenset({signals.CERT_CHAIN, signals.KEY})


def stop_daemon(host: Host, progress: Progress, *, for_good: bool) -> None:
    """Stop the daemon, which would join again; `for_good` it does not come with the next boot either.

    Call it without the lock, which the daemon may hold.
    """
    units = Units(host)
    with progress.step("agent") as step:
        is_enabled = units.is_enabled(_AGENT)
        if is_enabled and for_good:
            units.disable(_AGENT)
        if host.is_running and not units.state(_AGENT).is_down:
            units.stop(_AGENT)
        step.says(f"{_AGENT} is stopped and {'enabled' if is_enabled and not for_good else 'disabled'}")


def leave(host: Host, progress: Progress, *, purge: bool) -> None:
    """Leave the mesh; with `purge` take the package that the agent installed, and its state, along."""
    host.require_root("leaving the mesh")
    undo(host, progress, with_package=purge)
    if purge:
        with progress.step("state") as step:
            for folder in (store.FOLDER, RUN):
                remove_all(host, folder)
            step.says("nothing of the agent's is left but its package and its configuration")


def is_half_way(host: Host) -> bool:
    """Was an `undo` begun and not ended?"""
    return host.status(_LEAVING) is not None


def undo(host: Host, progress: Progress, *, with_package: bool, resumes: bool = False) -> bool:
    """Put the machine back to how it was found; the daemon, if one runs, is the caller's. Was there anything to undo?

    `resumes` lets a sidecar run again that ran before the join. From the first to the last line of it nothing can start
    the sidecar (istio.service.d/10-vmmesh-agent.conf), and whoever comes next goes on with it.
    """
    if host.read(_LEAVING) == _DONE:
        _forget(host)
    noted = found.load(host)
    if noted is None and host.status(store.FILE) is None and not is_half_way(host):
        progress.note("this machine has not joined, or has left: there is nothing to undo")
        return False
    for folder in (store.FOLDER, RUN):
        host.sweep(folder)
    host.make_folder(store.FOLDER, ROOT, 0o700)
    host.write(_LEAVING, b"", ROOT, 0o600)
    stop_sidecar(host, noted, progress)
    store.forget(host)  # from here on nobody puts the files back
    host.remove(install.RECORD)
    with progress.step("files") as step:
        sidecar_user = host.account(place.USER)
        left = _files(host, noted, sidecar_user)
        step.says("as they were found" + (f"; left are {', '.join(left)}, which are somebody else's" if left else ""))
    if with_package and noted and not noted.has_sidecar:
        with progress.step("package") as step:
            step.says(_package(host, noted, sidecar_user))
    _forget(host)
    if resumes and noted and noted.was_running and host.is_running:
        Units(host).request_start(ISTIO)
    return True


def _forget(host: Host) -> None:
    """Remove the notes. Without the first of them an undo that goes on would take what it put back for the agent's."""
    host.write(_LEAVING, _DONE, ROOT, 0o600)
    found.forget(host)
    host.remove(_LEAVING)


def stop_sidecar(host: Host, noted: Found | None, progress: Progress) -> None:
    """Stop it as systemd does, which gives it time to let its connections end, and see that nothing is captured."""
    units = Units(host)
    with progress.step("sidecar") as step:
        if host.is_running:
            if units.exists(ISTIO):
                units.stop(ISTIO)  # also where it is down: a start that waits is taken back
            host.remove(READY_MARK)
            if units.exists(READY):
                units.request_stop(READY)
            if signals.is_capture_left(host):
                host.run_on(_CLEAN, log=RUN / "clean.log", timeout=60)
            if signals.is_capture_left(host):
                raise HostError(
                    "traffic of this machine is still redirected to the sidecar",
                    code="capture-left-behind",
                    hint=f"see what `{' '.join(_CLEAN)}` says, then run this command again",
                    retry=True,
                )
        if units.is_enabled(ISTIO) and not (noted and noted.is_enabled):
            units.disable(ISTIO)
        step.says("stopped; istiod takes this VM out of the mesh some seconds after")


def _files(host: Host, noted: Found | None, sidecar_user: Account | None) -> list[str]:
    for folder in (*place.FOLDERS, place.ETC_HOSTS.parent):
        host.sweep(folder)
    content = host.read(place.ETC_HOSTS) or b""
    without = hosts.with_block(content, ())
    if noted and noted.hosts_end_open and without != content:
        without = without.removesuffix(b"\n")
    if without != content:
        place.rewrite(host, place.ETC_HOSTS, without)
    if noted is None:  # nothing is known of before: what is the agent's and the sidecar's identity goes, no more
        for path in place.PLACED | _IDENTITY:
            host.remove(path)
        return []
    return found.put_back(host, noted.tree, place.PLACED, _IDENTITY, sidecar_user)


def _package(host: Host, noted: Found, sidecar_user: Account | None) -> str:
    """Remove the package that the agent installed, and what its script made: the user, the folders, the link."""
    removed = ""
    for manager in managers(host):
        manager.wait()  # one that a daemon began, which was ended since
        if (version := manager.installed(install.NAME)) is not None:
            programs = host.status(_PROGRAMS)
            manager.remove(install.NAME)
            if programs and not host.status(_PROGRAMS):  # dpkg takes a folder along that it made empty
                _make_again(host, _PROGRAMS, programs)
            removed = f"{install.NAME} {version} removed"
    left = found.put_back(host, noted.bare, place.PLACED, _IDENTITY, sidecar_user)
    if not noted.has_user and sidecar_user:
        for path, status in (each for tree in (*found.TREES, _LOGS) for each in host.walk(tree)):
            if status.owner == sidecar_user:
                host.give(path, ROOT)  # what stays shall not be somebody's who comes to have the user's number
        for name in host.names_in(_LOGS):  # a sidecar that comes later cannot write into root's files
            if not name.endswith(_LEFT):
                host.rename(_LOGS / name, f"{name}{_LEFT}")
        root = [] if host.is_running else ["--root", str(host.root)]
        host.run(["userdel", *root, place.USER])
    if host.is_running:
        Units(host).reload()
    return (removed or "there was none") + (f"; left are {', '.join(left)}" if left else "")


def _make_again(host: Host, folder: PurePosixPath, was: Status) -> None:
    """Make a folder below /usr, where the daemon itself may not write."""
    owner = [f"--owner={was.owner.uid}", f"--group={was.owner.gid}"]
    install = ["install", "--directory", f"--mode={was.mode:o}", *owner, str(host.outside(folder))]
    host.run_on(install, log=RUN / "install.log", timeout=60)


def remove_all(host: Host, folder: PurePosixPath) -> None:
    """Remove a folder and all that is in it; a file, or a link itself, in the same way."""
    for path, status in host.walk(folder):
        if status.is_directory:
            host.remove_folder(path)
        else:
            host.remove(path)
