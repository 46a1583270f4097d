"""What cloud-init's files say of it, as `cloud-init status` reads them."""

import json
from pathlib import Path

import pytest

from vmmesh_agent import cloudinit
from vmmesh_agent.host import Host

STATUS = "var/lib/cloud/data/status.json"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "run/cloud-init").mkdir(parents=True)
    (tmp_path / "var/lib/cloud/data").mkdir(parents=True)
    return tmp_path


def stands(tree: Path, *names: str) -> Host:
    """Make what cloud-init leaves in /run: status and result are links to what it keeps elsewhere."""
    for name in names:
        mark = tree / "run/cloud-init" / name
        if name.endswith(".json"):
            mark.symlink_to(f"../../var/lib/cloud/data/{name}")
        else:
            mark.touch()
    return Host(tree)


@pytest.mark.parametrize(
    ("there", "is_at_work"),
    [
        ([], False),  # not there, or of a release without a generator, before its first stage
        (["enabled"], True),  # before its first stage
        (["enabled", "status.json"], True),
        (["status.json"], True),  # of a release without a generator
        (["enabled", "status.json", "result.json"], False),
        (["disabled"], False),
        (["disabled", "status.json"], False),  # switched off later, after a boot with it
    ],
    ids=lambda there: "+".join(there) or "nothing" if isinstance(there, list) else "",
)
def test_cloud_init_is_at_work_from_the_generator_to_the_last_stage(
    tree: Path, there: list[str], is_at_work: bool
) -> None:
    assert cloudinit.is_at_work(stands(tree, *there)) is is_at_work


def test_a_machine_without_cloud_init_has_nothing_to_wait_for(tmp_path: Path) -> None:
    assert not cloudinit.is_at_work(Host(tmp_path))
    assert cloudinit.complaint(Host(tmp_path)) == ""


def test_the_errors_of_all_stages_are_told_on_one_line(tree: Path) -> None:
    stage = {"errors": [], "start": 1.0, "finished": 2.0}
    final = stage | {"errors": ["('scripts-user', RuntimeError('Runparts: 1 failures (runcmd)\nin 1 attempted'))"]}
    stages = {"datasource": "NoCloud", "stage": None, "init": stage | {"errors": ["no seed"]}, "modules-final": final}
    (tree / STATUS).write_text(json.dumps({"v1": stages}))

    complaint = cloudinit.complaint(stands(tree, "enabled", "status.json", "result.json"))

    assert "no seed; ('scripts-user', RuntimeError('Runparts: 1 failures (runcmd) in 1 attempted'))" in complaint
    assert complaint.isprintable()


def test_the_errors_of_an_earlier_boot_are_not_told(tree: Path) -> None:
    (tree / STATUS).write_text(json.dumps({"v1": {"init": {"errors": ["no seed"]}}}))
    assert cloudinit.complaint(stands(tree, "disabled")) == ""


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"v1": []}', '{"v1": {"init": {}}}', '{"v1": {"init": []}}', "\xff"]
)
def test_what_cannot_be_read_says_nothing(tree: Path, content: str) -> None:
    (tree / STATUS).write_bytes(content.encode("latin-1"))
    assert cloudinit.complaint(stands(tree, "status.json")) == ""
