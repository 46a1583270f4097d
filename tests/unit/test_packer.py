"""The Packer example: it is HCL, all that it names is there, and what it ends with leaves nobody's identity."""

import re
from pathlib import PurePosixPath

from system.packer import FOLDER, Script, Upload, provisioners, template
from vmmesh_agent import config

STEPS = provisioners()
LINES = [line for step in STEPS if isinstance(step, Script) for line in step.lines]


def test_each_source_that_is_built_is_there() -> None:
    document = template()
    (build,) = document["build"]
    sources = {f"source.{kind}.{name}" for each in document["source"] for kind, named in each.items() for name in named}
    assert set(build["sources"]) == sources
    (packer,) = document["packer"]
    assert set(packer["required_plugins"][0]) == {"amazon"}


def test_each_variable_that_is_used_is_declared() -> None:
    declared = {name for variable in template()["variable"] for name in variable}
    assert set(re.findall(r"\bvar\.(\w+)", (FOLDER / "vmmesh.pkr.hcl").read_text())) == declared


def test_each_file_that_comes_with_the_example_is_there_and_each_that_a_command_names_is_uploaded() -> None:
    uploads = [step for step in STEPS if isinstance(step, Upload)]
    own = [upload.source.removeprefix("${path.root}/") for upload in uploads if "path.root" in upload.source]
    assert own == ["config.yaml"]
    assert all((FOLDER / name).is_file() for name in own)
    used = {path for line in LINES for path in re.findall(r"/tmp/\S+", line)}
    assert used == {upload.destination for upload in uploads}


def test_the_configuration_in_the_image_is_sound() -> None:
    content = (FOLDER / "config.yaml").read_bytes()
    assert config.parse([(PurePosixPath("config.yaml"), content)]).endpoint.url.startswith("https://")


def test_image_clean_is_the_last_step_and_nothing_starts_the_agent_before_it() -> None:
    assert LINES[-1] == "vmmesh-agent image-clean"
    assert "systemctl enable vmmesh-agent.service" in LINES
    assert not [line for line in LINES if re.search(r"systemctl (re)?start|--now|vmmesh-agent (run|bootstrap)", line)]
