"""What is kept between runs is complete, and is what was asked for."""

from pathlib import Path

import pytest

from lab import cache


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMMESH_CACHE", str(tmp_path / "cache"))


def test_an_entry_is_built_once() -> None:
    built: list[Path] = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "result").write_text("done")

    first = cache.entry("thing", ["a", b"b"], build)
    second = cache.entry("thing", ["a", b"b"], build)

    assert first == second
    assert (first / "result").read_text() == "done"
    assert len(built) == 1


def test_another_input_makes_another_entry() -> None:
    first = cache.entry("thing", ["ab", "c"], lambda _: None)
    assert cache.entry("thing", ["a", "bc"], lambda _: None) != first


def test_an_interrupted_build_is_never_taken_for_a_complete_one() -> None:
    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.entry("thing", ["a"], interrupted)
    entry = cache.entry("thing", ["a"], lambda folder: (folder / "whole").touch())

    assert [path.name for path in entry.iterdir()] == ["whole"]


def test_contents_change_with_a_name_a_byte_or_a_new_file_and_not_with_the_place(tmp_path: Path) -> None:
    def tree(name: str, files: dict[str, str]) -> list[bytes]:
        for file, text in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(text)
        return cache.contents(tmp_path / name)

    original = tree("one", {"a": "1", "b/c": "2"})

    assert tree("two", {"a": "1", "b/c": "2", "__pycache__/a.pyc": "x"}) == original
    assert tree("three", {"a": "1", "b/c": "3"}) != original
    assert tree("four", {"a": "1", "b/d": "2"}) != original
    assert tree("five", {"a": "1", "b/c": "2", "e": ""}) != original
