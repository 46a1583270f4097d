"""The daemon that is started while cloud-init is at work: it waits for what cloud-init may still write, and no longer.

It works on a tree, where the test is cloud-init.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon.test_daemon import Running, codes, running
from factories import a_bundle
from lab.cluster import write_directory

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the daemon runs as root")

CONFIG = "endpoint: {url: 'file:///srv/bundle'}\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree on which cloud-init is at work, and has written nothing yet."""
    root = tmp_path / "tree"
    for folder in ("etc/vmmesh-agent", "run/cloud-init", "var/lib/cloud/data"):
        (root / folder).mkdir(parents=True)
    (root / "run/cloud-init/enabled").touch()
    (root / "run/cloud-init/status.json").symlink_to("../../var/lib/cloud/data/status.json")
    return root


@pytest.fixture
def daemon(tree: Path) -> Iterator[Running]:
    with running(tree) as daemon:
        yield daemon


def configure(tree: Path, text: str = CONFIG) -> None:
    (tree / "etc/vmmesh-agent/config.yaml").write_text(text)


def end_cloud_init(tree: Path, *errors: str) -> None:
    (tree / "var/lib/cloud/data/status.json").write_text(json.dumps({"v1": {"modules-final": {"errors": errors}}}))
    (tree / "run/cloud-init/result.json").symlink_to("../../var/lib/cloud/data/result.json")


def waits(record: dict[str, Any]) -> bool:
    return "cloud_init_at_work" in codes(record)


def exit_of(daemon: Running) -> tuple[int, str]:
    _, log = daemon.process.communicate(timeout=120)
    return daemon.process.returncode, log


def test_without_a_configuration_it_is_ready_and_waits_and_goes_on_with_it(tree: Path, daemon: Running) -> None:
    daemon.hears("READY=1")
    daemon.hears("STATUS=starting: Waiting for cloud-init to write the configuration")
    record = daemon.record(waits)
    assert (record["state"], record["cause"], record["daemon"]) == ("starting", "cloud_init_at_work", True)
    assert "config.yaml is not there" in record["conditions"][0]["message"]

    configure(tree)
    write_directory(dict(a_bundle().files), tree / "srv/bundle")

    daemon.record(lambda record: not waits(record))
    assert daemon.end()[0] == 0


def test_a_configuration_that_is_half_written_gets_its_time(tree: Path, daemon: Running) -> None:
    configure(tree, "endpoint:\n")
    daemon.record(waits)
    configure(tree)
    record = daemon.record(lambda record: "/srv/bundle" in record["conditions"][0]["message"])
    assert waits(record)  # for the next thing: the bundle that it names
    assert daemon.end()[0] == 0


def test_when_cloud_init_is_done_without_a_configuration_it_fails_and_tells_what_cloud_init_said(
    tree: Path, daemon: Running
) -> None:
    daemon.record(waits)

    end_cloud_init(tree, "write-files-deferred: no such user")

    status, log = exit_of(daemon)
    assert status == 78
    assert "config.yaml is not there [configuration-missing]" in log
    assert "write-files-deferred: no such user" in log


def test_a_file_that_the_configuration_names_is_waited_for_and_not_counted_as_failure(
    tree: Path, daemon: Running
) -> None:
    configure(
        tree, "endpoint: {url: 'https://127.0.0.1:9/', credential: {join_token_file: /etc/vmmesh-agent/join-token}}\n"
    )
    daemon.record(lambda record: waits(record) and "join-token" in record["conditions"][0]["message"])
    for _ in range(3):  # turns of the loop, in each of which it could try
        daemon.told = ""
        daemon.hears("STATUS=starting: Waiting for cloud-init to write /etc/vmmesh-agent/join-token")

    (tree / "etc/vmmesh-agent/join-token").write_text("VM1.00000000.secret\n")

    daemon.record(lambda record: "machine_id_missing" in codes(record))  # it tries: what this tree lacks next
    _, log = daemon.end()
    assert log.count("attempt failed") == 1
    assert "credential-missing" not in log


def test_when_cloud_init_is_done_without_that_file_the_attempt_fails_as_ever(tree: Path, daemon: Running) -> None:
    (tree / "etc/machine-id").write_text("0f" * 16 + "\n")
    configure(tree, "endpoint: {url: 'https://127.0.0.1:9/', credential: {bearer_token_file: /run/token}}\n")
    daemon.record(waits)

    end_cloud_init(tree, "('scripts-user', 'runcmd failed')")

    record = daemon.record(lambda record: "credential_missing" in codes(record))
    assert "runcmd failed" in record["conditions"][0]["remedy"]
    assert daemon.process.poll() is None


@pytest.mark.parametrize("mark", ["disabled", "result.json"])
def test_where_cloud_init_is_disabled_or_done_nothing_is_waited_for(tree: Path, mark: str) -> None:
    (tree / "run/cloud-init" / mark).touch()
    with running(tree) as daemon:
        assert exit_of(daemon)[0] == 78
        assert "READY=1" not in daemon.told


def test_it_ends_when_it_is_told_to_while_it_waits(daemon: Running) -> None:
    daemon.hears("READY=1")
    assert daemon.end()[0] == 0
    daemon.hears("STOPPING=1")
