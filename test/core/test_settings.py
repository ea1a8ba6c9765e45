# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a YAML file is said in one line that names the file, the key and what to do."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import Field
from robot_tools import document

from clp_ros.core.errors import ClpError
from clp_ros.core.resources import resource_path
from clp_ros.core.settings import Settings, find_settings, load_settings
from clp_ros.robots.embodiment import Embodiment


class Inner(Settings):
    rate: float
    count: int = 0
    name: str = ""
    loud: bool = False


class Outer(Settings):
    inner: Inner
    by_name: dict[str, Inner] = Field(default_factory=dict)
    listed: list[Inner] = Field(default_factory=list)


def load(tmp_path: Path, text: str | bytes, schema: type[Settings] = Outer) -> Any:
    path = tmp_path / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_settings(path, schema)


def refusal(tmp_path: Path, text: str | bytes, schema: type[Settings] = Outer) -> str:
    with pytest.raises(ClpError) as fault:
        load(tmp_path, text, schema)
    message = str(fault.value)
    assert "\n" not in message
    assert str(tmp_path / "mine.yaml") in message
    assert fault.value.hint
    return message


def misspellings(value: Any, place: tuple = ()) -> Any:
    """Every key of a document: (where it is, the document's part with that key misspelt by one letter)."""
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if isinstance(key, str) and len(key) > 3:
            yield (*place, key)
        yield from misspellings(child, (*place, key))


def test_a_misspelt_key_is_named_at_any_depth(tmp_path: Path) -> None:
    robot = document(eye={"policy": "asof", "tolerance_ms": 5, "stamp": "header"})
    free = {"cameras", "joint_states", "controllers"}  # the names in these are the user's own
    places = [p for p in misspellings(robot) if len(p) == 1 or p[-2] not in free]
    assert ("cameras", "eye", "sync", "policy") in places
    assert ("controllers", "arm", "joints", 1, "velocity") in places
    for place in places:
        broken = yaml.safe_load(yaml.safe_dump(robot))
        holder = broken
        for part in place[:-1]:
            holder = holder[part]
        typo = place[-1][:-3] + place[-1][-2:]
        holder[typo] = holder.pop(place[-1])
        message = refusal(tmp_path, yaml.safe_dump(broken), Embodiment)
        assert f"unknown key '{'.'.join(map(str, (*place[:-1], typo)))}'" in message
        assert f"did you mean {place[-1]!r}?" in message


def test_an_unknown_key_unlike_any_lists_those_there_are(tmp_path: Path) -> None:
    assert "known: count, loud, name, rate" in refusal(tmp_path, "inner: {rate: 1, zzzzzz: 2}")
    assert "known: by_name, inner, listed" in refusal(tmp_path, "inner: {rate: 1}\nzzzzzz: 2")


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ('"50"', "not '50'"),
        ("1e2", "not '1e2'"),  # YAML 1.1: a number needs its dot
        ("true", "not True"),
        ("null", "not None"),
        (".nan", "finite"),
        (".inf", "finite"),
        ("-.inf", "finite"),
        ("[1]", "number"),
        ("{a: 1}", "number"),
        ("1" * 400, "number"),
    ],
)
def test_numbers_are_numbers(tmp_path: Path, value: str, what: str) -> None:
    message = refusal(tmp_path, f"inner: {{rate: {value}}}")
    assert "key 'inner.rate'" in message
    assert what in message


def test_no_type_is_guessed(tmp_path: Path) -> None:
    assert load(tmp_path, "inner: {rate: 2}").inner.rate == 2.0
    assert isinstance(load(tmp_path, "inner: {rate: 2}").inner.rate, float)
    for text, key in (("count: 1.0", "count"), ("count: true", "count"), ("name: 1", "name"), ("loud: 1", "loud")):
        assert f"'inner.{key}'" in refusal(tmp_path, f"inner: {{rate: 1, {text}}}")
    assert "key 'inner': must be a mapping" in refusal(tmp_path, "inner: hold")
    assert "key 'by_name': must be a mapping" in refusal(tmp_path, "inner: {rate: 1}\nby_name: [1]")
    assert "key 'inner': is missing" in refusal(tmp_path, "listed: []")
    assert "key 'listed.1.rate': is missing" in refusal(tmp_path, "inner: {rate: 1}\nlisted: [{rate: 1}, {count: 1}]")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing but a comment\n",
        "- 1",
        "word",
        "inner: {rate: 1}\ninner: {rate: 2}",
        "inner: {rate: 1, rate: 2}",
        "listed: [{rate: 1, rate: 1}]",
        "? [a, b]\n: 1",
        "? {a: b}\n: 1",
        "{[a]: 1}",
        "1: 2\ninner: {rate: 1}",
        "~: 2\ninner: {rate: 1}",
        "inner:\n\t- 1",
        "inner: [1",
        "inner: {rate: 1}\n---\ninner: {rate: 1}",
        "inner: *nowhere",
        "inner: &x {rate: 1, by: *x}",
        "inner: !!python/object/apply:os.system [echo]",
        "inner: {rate: 1, name: 2020-13-45}",
        "inner: {rate: 1, name: 2020-01-01}",
        "<<: 3\ninner: {rate: 1}",
        "a: " + "[" * 5000,
        b"inner: \x00",
        b"inner: \xff\xfe\xff",
    ],
    ids=lambda text: repr(text)[:30],
)
def test_what_is_no_settings_file(tmp_path: Path, text: str | bytes) -> None:
    refusal(tmp_path, text)


def test_a_key_twice_is_named_with_its_line(tmp_path: Path) -> None:
    assert "line 3: the key 'count' is there twice" in refusal(tmp_path, "inner:\n  count: 1\n  count: 2\n  rate: 1")


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    text = """
    inner: &one {rate: 1, count: 7}
    by_name:
      same: *one
      more: &two {<<: *one, count: 8, name: x}
      both: {<<: [*two, *one], loud: true}
    """
    settings = load(tmp_path, text)
    assert settings.by_name["same"] == settings.inner
    assert settings.by_name["more"] == Inner(rate=1, count=8, name="x")
    assert settings.by_name["both"] == Inner(rate=1, count=8, name="x", loud=True)
    assert "did you mean 'count'?" in refusal(tmp_path, "inner: {<<: {rate: 1, cuont: 2}}")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ClpError, match="no such file"):
        load_settings(tmp_path / "none.yaml", Outer)
    with pytest.raises(ClpError, match="cannot be read"):
        load_settings(tmp_path, Outer)


def test_names_and_paths(tmp_path: Path) -> None:
    shipped = resource_path("config/embodiments/aloha_bimanual.yaml")
    assert find_settings("aloha_bimanual", "embodiments", "embodiment") == shipped
    for path in ("mine.yaml", "mine.yml", "./mine", "a/b"):
        assert find_settings(path, "embodiments", "embodiment") == Path(path)
    assert find_settings("~/mine.yaml", "embodiments", "embodiment") == Path.home() / "mine.yaml"
    assert find_settings(shipped, "embodiments", "embodiment") == shipped
    with pytest.raises(ClpError, match=r"did you mean 'aloha_bimanual'\?, or give a \.yaml file"):
        find_settings("aloha_bimanul", "embodiments", "embodiment")
    with pytest.raises(ClpError, match=r"known: .*fold_shorts"):
        find_settings("zzz", "tasks", "task")


def test_settings_do_not_change(tmp_path: Path) -> None:
    settings = load(tmp_path, "inner: {rate: 1}")
    with pytest.raises(ValueError, match="frozen"):
        settings.inner.rate = 2
