"""A log file is followed through everything that happens to log files."""

import os
from pathlib import Path, PurePosixPath

import pytest

from vmmesh_agent.host import Host, LogFile

LOG = PurePosixPath("/var/log/istio/istio.log")


class Followed:
    """A log in a tree, the program that writes it, and who follows it."""

    def __init__(self, tree: Path) -> None:
        self.path = tree / "var/log/istio/istio.log"
        self.path.parent.mkdir(parents=True)
        self.host = Host(tree)

    def follow(self, tail: int | None = None) -> LogFile:
        return LogFile(self.host, LOG, tail=tail)

    def append(self, text: bytes) -> None:
        with self.path.open("ab") as file:
            file.write(text)


@pytest.fixture
def log(tmp_path: Path) -> Followed:
    return Followed(tmp_path)


def all_of(file: LogFile) -> bytes:
    """Read as the watch does: until there is nothing more, twice, for a replaced file tells so at its end."""
    pieces = []
    for _ in range(2):
        while piece := file.read():
            pieces.append(piece)
    return b"".join(pieces)


def test_new_bytes_are_read_once(log: Followed) -> None:
    log.append(b"one\n")
    file = log.follow()
    assert file.read() == b"one\n"
    assert file.read() == b""
    log.append(b"two")
    log.append(b" three\n")
    assert file.read() == b"two three\n"
    file.close()


def test_a_long_log_comes_in_pieces(log: Followed) -> None:
    log.append(b"x" * 25)
    file = log.follow()
    assert [len(file.read(10)) for _ in range(4)] == [10, 10, 5, 0]
    file.close()


def test_following_begins_near_the_end_where_that_is_enough(log: Followed) -> None:
    log.append(b"0123456789")
    file = log.follow(tail=4)
    assert all_of(file) == b"6789"
    file.close()
    file = log.follow(tail=400)
    assert all_of(file) == b"0123456789"
    file.close()


def test_what_is_there_may_be_left_out(log: Followed) -> None:
    log.append(b"old\n")
    file = log.follow()
    file.skip_to_end()
    log.append(b"new\n")
    assert all_of(file) == b"new\n"
    file.close()


def test_a_log_that_is_made_later_is_found(log: Followed) -> None:
    file = log.follow()
    file.skip_to_end()
    assert file.read() == b""
    log.append(b"one\n")
    assert all_of(file) == b"one\n"
    file.close()


def test_a_log_whose_folder_is_made_later_is_found(tmp_path: Path) -> None:
    file = LogFile(Host(tmp_path), LOG)
    assert file.read() == b""
    log = Followed(tmp_path)
    log.append(b"one\n")
    assert all_of(file) == b"one\n"
    file.close()


def test_a_truncated_log_is_read_from_its_start(log: Followed) -> None:
    log.append(b"a long first run\n")
    file = log.follow()
    all_of(file)
    os.truncate(log.path, 0)
    assert file.read() == b""
    log.append(b"second\n")
    assert all_of(file) == b"second\n"
    file.close()


def test_a_log_that_was_truncated_and_outgrew_its_old_length_is_read_from_its_start(log: Followed) -> None:
    log.append(b"first run\n")
    file = log.follow()
    all_of(file)
    os.truncate(log.path, 0)
    log.append(b"second run, which has said much more already\n")
    assert all_of(file) == b"second run, which has said much more already\n"
    file.close()


def test_a_log_that_was_truncated_to_the_same_length_is_read_from_its_start(log: Followed) -> None:
    log.append(b"first\n")
    file = log.follow()
    all_of(file)
    os.truncate(log.path, 0)
    log.append(b"secnd\n")
    assert all_of(file) == b"secnd\n"
    file.close()


def test_a_truncated_log_is_noticed_after_following_began_at_its_end(log: Followed) -> None:
    log.append(b"first run\n" * 100)
    file = log.follow(tail=5)
    all_of(file)
    os.truncate(log.path, 0)
    log.append(b"second run\n" * 100)
    assert all_of(file) == b"second run\n" * 100
    file.close()


def test_a_truncated_log_is_noticed_after_its_content_was_left_out(log: Followed) -> None:
    log.append(b"first run\n")
    file = log.follow()
    file.skip_to_end()
    os.truncate(log.path, 0)
    log.append(b"second run, which has said much more already\n")
    assert all_of(file) == b"second run, which has said much more already\n"
    file.close()


def test_a_renamed_log_is_read_to_its_end_and_then_the_new_one(log: Followed) -> None:
    log.append(b"one\n")
    file = log.follow()
    all_of(file)
    log.append(b"two\n")
    log.path.rename(log.path.with_suffix(".log.1"))
    log.append(b"three\n")
    assert all_of(file) == b"two\nthree\n"
    file.close()


def test_a_renamed_log_that_is_still_written_to_is_still_read(log: Followed) -> None:
    """pilot-agent does not reopen its log: what it says goes on to the old file."""
    with log.path.open("ab", buffering=0) as writer:
        writer.write(b"one\n")
        file = log.follow()
        all_of(file)
        log.path.rename(log.path.with_suffix(".log.1"))
        writer.write(b"two\n")
        assert all_of(file) == b"two\n"
    file.close()


def test_copying_and_truncating_under_a_writer_leaves_a_hole_that_is_skipped(log: Followed) -> None:
    with log.path.open("wb", buffering=0) as writer:  # not appending: it keeps a position of its own
        writer.write(b"x" * 200_000 + b"\n")
        file = log.follow()
        assert len(all_of(file)) == 200_001
        os.truncate(log.path, 0)
        writer.write(b"after\n")
        assert all_of(file).strip(b"\0") == b"after\n"
        writer.write(b"more\n")
        assert all_of(file) == b"more\n"
    file.close()


def test_copying_and_truncating_under_an_appending_writer_loses_nothing(log: Followed) -> None:
    with log.path.open("ab", buffering=0) as writer:
        writer.write(b"before\n")
        file = log.follow()
        assert all_of(file) == b"before\n"
        os.truncate(log.path, 0)
        writer.write(b"after\n")
        assert all_of(file) == b"after\n"
    file.close()


def test_a_log_that_vanishes_is_silent_until_it_comes_back(log: Followed) -> None:
    log.append(b"one\n")
    file = log.follow()
    all_of(file)
    log.path.unlink()
    assert all_of(file) == b""
    log.append(b"two\n")
    assert all_of(file) == b"two\n"
    file.close()


def test_a_new_log_with_the_old_content_is_a_new_log(log: Followed) -> None:
    log.append(b"one\n")
    file = log.follow()
    all_of(file)
    log.path.unlink()
    (log.path.parent / "takes-the-inode").touch()
    log.append(b"one\n")
    assert all_of(file) == b"one\n"
    file.close()


def test_a_log_that_is_a_link_has_no_lines(log: Followed) -> None:
    """istio-proxy owns the folder: a link there could show root's files to whoever reads `status`."""
    (log.path.parent / "secret").write_bytes(b"root's own\n")
    log.path.symlink_to("secret")
    file = log.follow()
    assert all_of(file) == b""
    log.path.unlink()
    log.append(b"one\n")
    assert all_of(file) == b"one\n"
    file.close()


def test_a_log_that_is_a_pipe_or_a_folder_has_no_lines(log: Followed) -> None:
    os.mkfifo(log.path)
    file = log.follow()
    assert all_of(file) == b""
    log.path.unlink()
    log.path.mkdir()
    assert all_of(file) == b""
    file.close()
