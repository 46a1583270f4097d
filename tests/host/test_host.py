"""The machine below a root prefix: nothing leads out of it, nothing is ever half written."""

import contextlib
import os
import socket
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from vmmesh_agent.errors import AgentError, HostError, NotPermittedError
from vmmesh_agent.host import Account, Host

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users")

ME = Account(os.geteuid(), os.getegid())
SOMEBODY = Account(65534, 65534)
PATH = PurePosixPath


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A machine's tree, and beside it what must never be reached."""
    root = tmp_path / "root"
    for folder in ("etc", "var/lib/istio/config", "run/secrets"):
        (root / folder).mkdir(parents=True)
    (root / "etc/hosts").write_bytes(b"127.0.0.1 localhost\n")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/secret").write_bytes(b"outside")
    (tmp_path / "var/lib/istio").mkdir(parents=True)
    return root


@pytest.fixture
def host(tree: Path) -> Host:
    return Host(tree)


def everything(root: Path) -> dict[str, tuple[int, bytes | None]]:
    """Return all that is in a tree, to see that nothing changed."""
    return {
        str(path.relative_to(root)): (path.lstat().st_mode, path.read_bytes() if path.is_file() else None)
        for path in sorted(root.rglob("*"))
        if not path.is_symlink()
    }


# --- the prefix and links ---


def test_a_path_is_below_the_root(host: Host, tree: Path) -> None:
    assert host.read(PATH("/etc/hosts")) == b"127.0.0.1 localhost\n"
    assert host.read(PATH("/etc/secret")) is None
    host.write(PATH("/etc/new"), b"x", ME, 0o640)
    assert (tree / "etc/new").read_bytes() == b"x"
    assert host.outside(PATH("/etc/new")) == tree / "etc/new"


@pytest.mark.parametrize(
    "target", ["/var/lib/istio", "../var/lib/istio", "../../../../../../var/lib/istio", "/../var/lib/istio"]
)
def test_a_link_inside_the_tree_is_followed_inside_the_tree(host: Host, tree: Path, target: str) -> None:
    (tree / "etc/istio").symlink_to(target)
    host.write(PATH("/etc/istio/config/mesh"), b"defaultConfig: {}\n", ME, 0o644)
    assert (tree / "var/lib/istio/config/mesh").read_bytes() == b"defaultConfig: {}\n"
    assert host.read(PATH("/etc/istio/config/mesh")) == b"defaultConfig: {}\n"
    assert host.names_in(PATH("/etc/istio/config")) == ["mesh"]
    assert not (tree.parent / "var/lib/istio/config").exists()


def test_links_that_would_lead_out_lead_nowhere(host: Host, tree: Path) -> None:
    (tree / "etc/up").symlink_to("../../etc")
    (tree / "etc/away").symlink_to(tree.parent / "etc")
    (tree / "etc/dots").symlink_to("../../../../../../../../../../etc")
    before = everything(tree.parent / "etc")
    paths = [PATH("/etc") / name / "secret" for name in ("up", "away", "dots")]
    assert [host.read(path) or host.status(path) for path in paths] == [None, None, None]
    for path in paths:
        with contextlib.suppress(AgentError):
            host.write(path, b"changed", ME, 0o644)
    assert everything(tree.parent / "etc") == before


def test_links_in_a_circle_end(host: Host, tree: Path) -> None:
    (tree / "etc/a").symlink_to("b")
    (tree / "etc/b").symlink_to("a")
    assert host.read(PATH("/etc/a/x")) is None
    with pytest.raises(HostError):
        host.write(PATH("/etc/a/x"), b"", ME, 0o644)


def test_a_long_chain_of_links_is_followed(host: Host, tree: Path) -> None:
    for number in range(30):
        (tree / f"etc/{number}").symlink_to(f"/etc/{number + 1}")
    (tree / "etc/30").mkdir()
    host.write(PATH("/etc/0/x"), b"x", ME, 0o600)
    assert (tree / "etc/30/x").read_bytes() == b"x"


@needs_root
def test_a_link_of_a_lesser_user_is_not_followed(host: Host, tree: Path) -> None:
    (tree / "var/lib/istio/envoy").symlink_to("/etc")
    os.chown(tree / "var/lib/istio/envoy", 65534, 65534, follow_symlinks=False)
    before = everything(tree)
    path = PATH("/var/lib/istio/envoy/hosts")
    for attempt in (
        lambda: host.write(path, b"evil", ME, 0o777),
        lambda: host.read(path),
        lambda: host.status(path),
        lambda: host.remove(path),
        lambda: host.set_owner(path, SOMEBODY, 0o777),
        lambda: host.make_folder(path, SOMEBODY, 0o777),
        lambda: host.create(path),
        lambda: host.sha256(path),
        lambda: host.names_in(path.parent),
    ):
        with pytest.raises(HostError) as caught:
            attempt()
        assert caught.value.code == "foreign-link"
    assert everything(tree) == before


def test_a_link_at_the_end_is_replaced_and_its_target_left_alone(host: Host, tree: Path) -> None:
    (tree / "etc/link").symlink_to("hosts")
    host.write(PATH("/etc/link"), b"new", ME, 0o644)
    assert not (tree / "etc/link").is_symlink()
    assert (tree / "etc/hosts").read_bytes() == b"127.0.0.1 localhost\n"


@needs_root
def test_a_lesser_users_link_at_the_end_changes_no_owner_elsewhere(host: Host, tree: Path) -> None:
    (tree / "run/secrets/tokens").symlink_to("/etc")
    os.chown(tree / "run/secrets/tokens", 65534, 65534, follow_symlinks=False)
    with pytest.raises(HostError):
        host.make_folder(PATH("/run/secrets/tokens"), SOMEBODY, 0o777)
    with pytest.raises(HostError):
        host.set_owner(PATH("/run/secrets/tokens"), SOMEBODY, 0o777)
    assert (tree / "etc").stat().st_uid == os.geteuid()


# --- reading ---


def test_what_is_not_there_is_none(host: Host) -> None:
    for path in (PATH("/nothing"), PATH("/nothing/below"), PATH("/etc/hosts/below")):
        assert host.read(path) is None
        assert host.status(path) is None
        assert host.names_in(path) == []
        host.remove(path)


def test_what_is_no_plain_file_is_not_read(host: Host, tree: Path) -> None:
    os.mkfifo(tree / "etc/pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        folder = os.open(tree, os.O_PATH)
        listener.bind(f"/proc/self/fd/{folder}/etc/socket")
        os.close(folder)
        for name in ("pipe", "socket", ""):
            with pytest.raises(HostError):
                host.read(PATH("/etc") / name)


def test_a_file_beyond_the_limit_is_refused(host: Host, tree: Path) -> None:
    (tree / "etc/big").write_bytes(b"x" * 11)
    assert host.read(PATH("/etc/big"), 11) == b"x" * 11
    with pytest.raises(HostError) as caught:
        host.read(PATH("/etc/big"), 10)
    assert caught.value.code == "file-too-large"


def test_a_status_tells_kind_mode_owner_and_size(host: Host, tree: Path) -> None:
    (tree / "etc/hosts").chmod(0o640)
    found = host.status(PATH("/etc/hosts"))
    assert found
    assert (found.is_file, found.is_directory, found.mode, found.owner, found.size) == (True, False, 0o640, ME, 20)
    folder = host.status(PATH("/etc"))
    assert folder
    assert folder.is_directory


def test_a_digest_is_of_the_whole_file(host: Host, tree: Path) -> None:
    (tree / "etc/abc").write_bytes(b"abc")
    assert host.sha256(PATH("/etc/abc")).startswith("ba7816bf8f01cfea")


# --- writing ---


def test_a_file_gets_its_mode_whatever_the_umask(host: Host, tree: Path) -> None:
    before = os.umask(0o077)
    try:
        host.write(PATH("/etc/a"), b"", ME, 0o644)
        host.make_folder(PATH("/etc/folder/below"), ME, 0o755)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tree / "etc/a").stat().st_mode) == 0o644
    assert stat.S_IMODE((tree / "etc/folder/below").stat().st_mode) == 0o755


@needs_root
def test_owners_and_modes_are_as_asked_and_parents_are_roots(host: Host, tree: Path) -> None:
    host.make_folder(PATH("/var/a/b/c"), SOMEBODY, 0o700)
    owners = {
        path: ((tree / path).stat().st_uid, stat.S_IMODE((tree / path).stat().st_mode))
        for path in ("var/a", "var/a/b", "var/a/b/c")
    }
    assert owners == {"var/a": (0, 0o755), "var/a/b": (0, 0o755), "var/a/b/c": (65534, 0o700)}
    host.write(PATH("/var/a/b/c/token"), b"x", SOMEBODY, 0o600)
    found = host.status(PATH("/var/a/b/c/token"))
    assert found
    assert (found.owner, found.mode) == (SOMEBODY, 0o600)
    host.set_owner(PATH("/var/a/b/c/token"), ME, 0o640)
    assert (tree / "var/a/b/c/token").stat().st_uid == 0


@needs_root
def test_making_a_folder_that_is_there_leaves_what_is_in_it(host: Host, tree: Path) -> None:
    (tree / "etc/hosts").chmod(0o604)
    host.make_folder(PATH("/etc"), SOMEBODY, 0o711)
    assert (tree / "etc").stat().st_uid == 65534
    assert stat.S_IMODE((tree / "etc/hosts").stat().st_mode) == 0o604
    assert (tree / "etc/hosts").stat().st_uid == 0


def test_no_temporary_file_is_left_behind(host: Host, tree: Path) -> None:
    host.write(PATH("/etc/a"), b"1", ME, 0o644)
    (tree / "etc/b").mkdir()
    (tree / "etc/b/c").touch()
    with pytest.raises(HostError):  # a folder with something in it cannot be replaced by a file
        host.write(PATH("/etc/b"), b"1", ME, 0o644)
    assert sorted(os.listdir(tree / "etc")) == ["a", "b", "hosts"]


def test_a_reader_never_sees_half_a_file(host: Host, tree: Path) -> None:
    contents = [bytes([65 + number]) * size for number, size in enumerate((1, 70_000, 300_000, 5))]
    host.write(PATH("/etc/a"), contents[0], ME, 0o644)
    torn: list[bytes] = []
    reads = 0
    done = threading.Event()

    def read() -> None:
        nonlocal reads
        while not done.is_set():
            seen = (tree / "etc/a").read_bytes()
            reads += 1
            if seen not in contents:
                torn.append(seen)

    reader = threading.Thread(target=read)
    reader.start()
    rounds = 0
    while rounds < 60 or reads < 60:
        host.write(PATH("/etc/a"), contents[rounds % 4], ME, 0o644)
        rounds += 1
    done.set()
    reader.join()
    assert torn == []


def test_a_new_file_is_not_the_old_one(host: Host, tree: Path) -> None:
    with (tree / "etc/hosts").open("rb") as old:
        host.write(PATH("/etc/hosts"), b"new", ME, 0o644)
        assert old.read() == b"127.0.0.1 localhost\n"
    os.link(tree / "etc/hosts", tree / "etc/hard")
    host.write(PATH("/etc/hosts"), b"newer", ME, 0o644)
    assert (tree / "etc/hard").read_bytes() == b"new"


def test_a_file_of_our_own_replaces_whatever_was_there(host: Host, tree: Path) -> None:
    (tree / "etc/target").write_bytes(b"theirs")
    (tree / "etc/new").symlink_to("target")
    file = host.create(PATH("/etc/new"))
    try:
        os.write(file.descriptor, b"package")
        assert (file.size, file.read_at(3)) == (7, b"kage")
    finally:
        file.close()
    assert (tree / "etc/target").read_bytes() == b"theirs"
    assert stat.S_IMODE((tree / "etc/new").stat().st_mode) == 0o600


# --- what the machine refuses ---


@pytest.fixture
def small_disk(tree: Path) -> Iterator[Path]:
    """A folder of the tree on a disk of 64 KiB."""
    folder = tree / "var/small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "small", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@needs_root
def test_a_full_disk_leaves_the_old_file_whole(host: Host, small_disk: Path) -> None:
    path = PATH("/var/small/file")
    host.write(path, b"old", ME, 0o644)
    with pytest.raises(HostError) as caught:
        host.write(path, b"x" * 200_000, ME, 0o644)
    assert (caught.value.code, caught.value.retry) == ("disk-full", True)
    assert host.read(path) == b"old"
    assert os.listdir(small_disk) == ["file"]
    assert host.free_bytes(path) < 64 * 1024
    assert host.free_bytes(PATH("/var/small/not/there/yet")) < 64 * 1024


@needs_root
def test_a_read_only_disk_is_named(host: Host, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(HostError) as caught:
        host.write(PATH("/var/small/file"), b"x", ME, 0o644)
    assert caught.value.code == "disk-read-only"


@needs_root
def test_what_only_root_may_do_is_said_so(tree: Path) -> None:
    (tree / "etc/closed").mkdir(mode=0o700)
    tree.parent.chmod(0o755)
    script = (
        "import os, sys; from pathlib import *; from vmmesh_agent.host import *\n"
        "host = Host(Path(sys.argv[1])); os.setresuid(65534, 65534, 65534)\n"
        "try: host.read(PurePosixPath('/etc/closed/x'))\n"
        "except Exception as error: print(type(error).__name__, error.code, error.exit_status, host.is_root)\n"
    )
    with os_open(tree) as folder:  # the folders above belong to pytest's user alone
        asked = subprocess.run(
            [*python(), script, f"/proc/self/fd/{folder}"],
            capture_output=True,
            text=True,
            pass_fds=[folder],
            check=True,
        )
    assert asked.stdout == "NotPermittedError permission-denied 77 False\n"


def python() -> list[str]:
    import sys  # noqa: PLC0415  # only this helper needs it

    return [sys.executable, "-c"]


@contextlib.contextmanager
def os_open(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


# --- users and commands ---


def test_an_account_is_looked_up_in_the_tree(host: Host, tree: Path) -> None:
    (tree / "etc/passwd").write_text(
        "root:x:0:0::/root:/bin/sh\nistio-proxy:x:997:996::/var/lib/istio:/bin/false\nbroken\n"
    )
    assert host.account("istio-proxy") == Account(997, 996)
    assert host.account("nobody-here") is None
    assert host.account("broken") is None
    assert Host().account("root") == Account(0, 0)
    assert Host().account("no-such-user") is None


def test_a_tree_is_not_the_running_machine(host: Host) -> None:
    assert not host.is_running
    assert Host().is_running


def test_a_command_tells_how_it_ended(host: Host) -> None:
    done = host.run(["sh", "-c", "echo out; echo err >&2; exit 3"], check=False)
    assert (done.status, done.stdout, done.stderr, done.last_words) == (3, "out\n", "err\n", "err")
    with pytest.raises(HostError, match="status 3: err") as caught:
        host.run(["sh", "-c", "echo err >&2; exit 3"])
    assert caught.value.code == "command-failed"


def test_a_command_that_is_not_there_is_named(host: Host, tree: Path) -> None:
    with pytest.raises(HostError, match="no-such-program is not installed") as caught:
        host.run(["no-such-program"])
    assert caught.value.code == "program-missing"
    (tree / "etc/no-program").write_text("")
    with pytest.raises(HostError) as caught:
        host.run([str(tree / "etc/no-program")])
    assert caught.value.code == "permission-denied"


def test_a_command_that_hangs_is_ended(host: Host) -> None:
    with pytest.raises(HostError) as caught:
        host.run(["sleep", "60"], timeout=0.2)
    assert (caught.value.code, caught.value.retry) == ("command-timeout", True)


def test_a_command_reads_nothing_and_speaks_english(host: Host) -> None:
    done = host.run(["sh", "-c", "cat; echo $LC_ALL $MORE"], environment={"MORE": "more"})
    assert done.stdout == "C.UTF-8 more\n"
    assert host.run(["printf", "\\377"]).stdout == "\ufffd"
    assert host.run(["echo", "12345"], output_limit=3).stdout == "123"


def test_names_are_resolved_by_this_machine(host: Host) -> None:
    assert host.addresses("localhost", 20)
    assert not host.addresses("no-such-host.invalid", 20)
    assert not host.addresses("a" * 300, 20)
    assert not host.addresses("..", 20)
    assert Host().name


# --- the lock ---


@needs_root
def test_only_one_may_hold_the_lock(host: Host) -> None:
    path = PATH("/run/vmmesh-agent/lock")
    with host.lock(path):
        with pytest.raises(HostError) as caught, host.lock(path):
            pass
        assert (caught.value.code, caught.value.retry) == ("locked", True)
        assert str(os.getpid()) in caught.value.message
    with host.lock(path):
        pass


@needs_root
def test_the_lock_leaves_the_status_record_readable_for_every_user(host: Host) -> None:
    with host.lock(PATH("/run/vmmesh-agent/lock")):
        folder = host.status(PATH("/run/vmmesh-agent"))
        assert folder
        assert folder.mode & 0o005 == 0o005


@needs_root
def test_the_lock_file_may_not_be_a_link(host: Host, tree: Path) -> None:
    (tree / "run/vmmesh-agent").mkdir()
    (tree / "run/vmmesh-agent/lock").symlink_to("/etc/hosts")
    with pytest.raises(AgentError), host.lock(PATH("/run/vmmesh-agent/lock")):
        pass
    assert (tree / "etc/hosts").read_bytes() == b"127.0.0.1 localhost\n"


def test_who_is_not_root_is_told(host: Host) -> None:
    if host.is_root:
        host.require_root("this")
    else:
        with pytest.raises(NotPermittedError):
            host.require_root("this")
