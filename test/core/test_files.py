# SPDX-License-Identifier: Apache-2.0
"""Output that is either whole or not there."""

import json
import os
from pathlib import Path

import pytest

from clp_ros.core.errors import ClpError
from clp_ros.core.files import (
    atomic_folder,
    check_apart,
    check_output_folder,
    clear_leftovers,
    is_temporary,
    rewrite_json,
)


def content(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("empty_before", [False, True])
def test_a_folder_appears_when_it_is_whole(tmp_path: Path, empty_before: bool) -> None:
    target = tmp_path / "a" / "b" / "out"
    if empty_before:
        target.mkdir(parents=True)
    with atomic_folder(target) as folder:
        (folder / "x").write_text("1")
        assert content(target) == {} if empty_before else not target.exists()
    assert content(tmp_path) == {"a/b/out/x": "1"}


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_output_has_the_umasks_mode(tmp_path: Path, umask: int, overwrite: bool) -> None:
    target = tmp_path / "out"
    if overwrite:
        target.mkdir(mode=0o700)
        (target / "old").touch()
    before = os.umask(umask)
    try:
        with atomic_folder(target, overwrite) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "plain").touch()
            (folder / "private").touch(mode=0o600)  # as safetensors writes
            (folder / "program").touch(mode=0o700)
    finally:
        os.umask(before)
    modes = {path.relative_to(tmp_path).as_posix(): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    wanted = 0o777 & ~umask
    assert modes == {
        "out": wanted,
        "out/sub": wanted,
        "out/sub/plain": wanted & 0o666,
        "out/private": wanted & 0o666,
        "out/program": wanted & 0o666 | 0o700,
    }


def test_an_output_is_apart_from_its_inputs(tmp_path: Path) -> None:
    bag, links = tmp_path / "bag", tmp_path / "links"
    bag.mkdir()
    links.mkdir()
    (links / "to the bag").symlink_to(bag)
    check_apart(tmp_path / "bag_calibration", [bag, links])
    for output, given in (
        (bag, bag),
        (bag / "new", bag),
        (tmp_path, bag),
        (links / ".." / "bag", bag),
        (links / "to the bag" / "new", bag),
        (bag, links / "to the bag"),
        (links, links / "to the bag"),
    ):
        with pytest.raises(ClpError, match="or contains it"):
            check_apart(output, [tmp_path / "another", given])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [False, True])
def test_nothing_is_left_of_a_folder_that_fails(tmp_path: Path, error: type[BaseException], old: bool) -> None:
    target = tmp_path / "out"
    if old:
        target.mkdir()
        (target / "kept").write_text("old")
    with pytest.raises(error), atomic_folder(target, overwrite=True) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "x").write_text("new")
        raise error
    assert content(tmp_path) == ({"out/kept": "old"} if old else {})
    assert sorted(path.name for path in tmp_path.iterdir()) == (["out"] if old else [])


def test_overwriting_keeps_the_old_folder_until_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("new")
        assert content(target) == {"old": "old"}
    assert content(tmp_path) == {"out/new": "new"}


def test_a_failing_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "kept").write_text("old")
    rename = Path.replace

    def fail_for_the_new(path: Path, to: Path) -> Path:
        if path.suffix == ".partial":
            raise OSError("no space left")
        return rename(path, to)

    monkeypatch.setattr(Path, "replace", fail_for_the_new)
    with pytest.raises(OSError, match="no space left"), atomic_folder(target, overwrite=True) as folder:
        (folder / "x").write_text("new")
    assert content(tmp_path) == {"out/kept": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_of_another_process_is_overwritten_without_being_asked(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(ClpError, match="not empty"), atomic_folder(target) as folder:
        (folder / "x").write_text("mine")
        target.mkdir()
        (target / "x").write_text("theirs")
    assert content(tmp_path) == {"out/x": "theirs"}


@pytest.mark.parametrize("kind", ["file", "link to a folder", "dangling link", "mount point", "folder with a file"])
def test_targets_that_are_refused(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "file":
        target.write_text("kept")
    elif kind == "link to a folder":
        (tmp_path / "elsewhere").mkdir()
        target.symlink_to("elsewhere")
    elif kind == "dangling link":
        target.symlink_to("nowhere")
    elif kind == "mount point":
        target = Path("/dev/shm")
        if not target.is_mount():
            pytest.skip("/dev/shm is no mount point here")
    else:
        target.mkdir()
        (target / "x").write_text("kept")
    before = content(tmp_path)
    overwrite = kind not in ("folder with a file",)
    for refuse in (lambda: check_output_folder(target, overwrite), atomic_folder(target, overwrite).__enter__):
        with pytest.raises(ClpError) as fault:
            refuse()
        assert fault.value.where == str(target)
        assert fault.value.hint
    assert content(tmp_path) == before


def test_a_parent_that_is_a_file_is_the_users_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ClpError, match="the folder cannot be written"), atomic_folder(tmp_path / "file" / "out"):
        pass
    with pytest.raises(ClpError, match="the folder cannot be written"), atomic_folder(tmp_path / ("n" * 250)):
        pass


@pytest.mark.parametrize("target", ["out", "./out", "missing/../out", "link/out", "out/"])
def test_any_way_to_write_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    with atomic_folder(target) as folder:
        (folder / "x").write_text("1")
        os.chdir("/")  # a relative path means what it meant at the start
    assert content(tmp_path) == {("real/out/x" if "link" in target else "out/x"): "1"}


def test_the_folder_one_stands_in_can_be_named_by_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    with atomic_folder(".") as folder:
        (folder / "x").write_text("1")
    assert content(tmp_path) == {"here/below/x": "1"}
    monkeypatch.chdir(tmp_path / "here" / "below")
    with pytest.raises(ClpError, match="not empty"), atomic_folder(".."):
        pass
    with atomic_folder("..", overwrite=True) as folder:
        (folder / "y").write_text("2")
    assert content(tmp_path) == {"here/y": "2"}


def test_folders_in_folders(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as outer, atomic_folder(outer / "inner") as inner:
        (inner / "x").write_text("1")
    assert content(tmp_path) == {"out/inner/x": "1"}


def test_rewriting_leaves_what_did_not_change(tmp_path: Path) -> None:
    (tmp_path / "same.json").write_text('{"b":   1,"a": [1.0]}')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "other.json").write_text('{"depth": 3}')
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "other.json").write_text('{"depth": 3}')

    def change(documents: dict[str, dict]) -> None:
        assert sorted(documents) == ["other.json", "same.json"]
        documents["other.json"]["depth"] = 2

    rewrite_json(tmp_path, change)
    assert (tmp_path / "same.json").read_text() == '{"b":   1,"a": [1.0]}'
    assert json.loads((tmp_path / "other.json").read_text()) == {"depth": 2}
    assert json.loads((tmp_path / "below" / "other.json").read_text()) == {"depth": 3}


def test_what_killed_processes_left_is_cleared_away_and_nothing_else(tmp_path: Path) -> None:
    def make(name: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)

    others = [".other.abcd1234.partial", ".out.abcd.partial", ".out.abcd1234.new", "out.abcd1234.partial", "out2"]
    for name in (*others, ".out.abcd1234.partial", ".out.12345678.partial"):
        make(name)
    (tmp_path / ".out.aaaaaaaa.partial").write_text("a file")
    (tmp_path / ".out.bbbbbbbb.partial").symlink_to("out2")
    with atomic_folder(tmp_path / "out") as live:
        (live / "x").write_text("out")
        clear_leftovers(tmp_path / "out")
        assert live.is_dir()  # its process lives
    left = {*others, "out", ".out.aaaaaaaa.partial", ".out.bbbbbbbb.partial"}
    assert {path.name for path in tmp_path.iterdir()} == left
    assert (tmp_path / "out2" / "x").read_text() == "out2"


@pytest.mark.parametrize("stands", [False, True])
def test_an_old_folder_that_was_moved_aside_comes_back_unless_its_place_is_taken(tmp_path: Path, stands: bool) -> None:
    for name in (".out.abcd1234.old", ".out.abcd1234.partial", *(["out"] if stands else [])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    clear_leftovers(tmp_path / "out")
    assert content(tmp_path) == {"out/x": "out" if stands else ".out.abcd1234.old"}


def test_temporary_folders_are_known_by_their_names(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / ".a.b") as folder:
        assert is_temporary(folder)
    assert not is_temporary(tmp_path / ".a.b")
    clear_leftovers(tmp_path / "not" / "there")
