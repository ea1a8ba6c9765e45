# SPDX-License-Identifier: Apache-2.0
import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from clp_ros.report.heatmaps import draw_heatmap
from clp_ros.report.page import write_report

SCRIPT = "<script>alert('x')</script> & \"q\""
META = {
    "schema_version": 1,
    "checkpoint": {"path": "/models/smolvla", "fingerprint": "sha256:0a1b"},
    "family": "smolvla",
    "bags": [
        {"path": "rosbags/aloha", "topics": {"/cam_high/image": {"type": "Image", "count": 3}}},
        {"path": SCRIPT, "topics": []},
    ],
    "embodiment": "aloha_bimanual",
    "task": SCRIPT,
    "samples": 64,
    "tokens": {"vlm": 11520},
    "seed": 0,
    "dtype": "float32",
    "device": None,
    "versions": {"torch": "2.11.0"},
    "modules": {"vlm": "shown elsewhere"},
}
COMMAND = "clp prune --checkpoint '/models/a & <b>' --calibration out --output pruned"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What a browser would see: tags that close, text, attributes, the rows of each table."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.tables: list[list[list[str]]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data.strip()


@pytest.fixture
def report(tmp_path):
    rng = np.random.default_rng(0)
    modules = []
    for name, num_layers in (("vlm", 16), ("dit", 5)):
        matrix = rng.uniform(0.4, 1, (num_layers, num_layers))
        story = {"threshold": 0.9, "blocks": [[0], [1, 2, 3], [4]], "removed": [2]}
        draw_heatmap(matrix, module=name, path=tmp_path / f"heatmap_{name}.png", **story)
        modules.append({"name": name, "adjacent": np.diag(matrix, 1), "group": "both", **story})
    modules[0] |= {"mse": rng.random(15), "cosine": rng.random(15), "scores": rng.random(15)}
    return {"meta": META, "modules": modules, "command": COMMAND}


def test_page_shows_every_layer_with_its_scores_and_fate(tmp_path, report):
    page = Page(write_report(tmp_path, report).read_text(encoding="utf-8"))
    vlm, dit = page.tables[1], page.tables[2]
    assert vlm[0] == ["layer", "", "block", "CKA", "group mean", "MSE", "cosine"]
    assert dit[0] == ["layer", "", "block", "CKA"]
    assert [row[0] for row in vlm[1:]] == [str(layer) for layer in range(16)]
    assert [row[0] for row in dit[1:]] == [str(layer) for layer in range(5)]
    module = report["modules"][0]
    for layer, row in enumerate(vlm[1:]):
        if layer == 0:
            assert row[3:] == ["–"] * 4
            continue
        assert float(row[3]) == pytest.approx(module["adjacent"][layer - 1], abs=1e-6)
        assert float(row[4]) == pytest.approx(module["scores"][layer - 1], abs=1e-6)
        assert float(row[5]) == pytest.approx(module["mse"][layer - 1], rel=5e-3)
        assert float(row[6]) == pytest.approx(module["cosine"][layer - 1], abs=1e-6)
    assert [row[1] for row in dit[1:]] == ["stays", "stays", "× removed", "candidate, stays", "stays"]
    assert page.tables[0][1:] == [["vlm", "16", "2", "15", "0.9000"], ["dit", "5", "2", "4", "0.9000"]]


def test_page_says_what_was_calibrated_what_to_type_and_the_limits(tmp_path, report):
    page = Page(write_report(tmp_path, report).read_text(encoding="utf-8"))
    rows = {row[0]: row[1] for row in page.tables[-1]}
    assert rows["family"] == "smolvla"
    assert rows["samples"] == "64"
    assert rows["seed"] == "0"
    assert rows["device"] == "–"
    assert "/models/smolvla" in rows["checkpoint"]
    assert "sha256:0a1b" in rows["checkpoint"]
    assert "rosbags/aloha" in rows["bags"]
    assert "/cam_high/image" in rows["bags"], "names keep their underscores"
    assert "type: Image, count: 3" in " ".join(rows["bags"].split())
    assert "modules" not in rows
    assert COMMAND in page.text
    assert "Fine-tune the pruned checkpoint, and then test it" in " ".join(page.text.split())


def test_text_from_outside_is_escaped(tmp_path, report):
    html = write_report(tmp_path, report).read_text(encoding="utf-8")
    assert "<script" not in html
    assert SCRIPT in Page(html).text


def test_page_is_one_file_that_asks_no_other_machine(tmp_path, report):
    html = write_report(tmp_path, report).read_text(encoding="utf-8")
    page = Page(html)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r"base64,[A-Za-z0-9+/=]+", "", html))
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == 2
    for source, name in zip(sources, ("vlm", "dit"), strict=True):
        kind, data = source.split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) == (tmp_path / f"heatmap_{name}.png").read_bytes()
    assert "prefers-color-scheme: dark" in html


def test_equal_input_gives_equal_bytes(tmp_path, report):
    first = write_report(tmp_path, report).read_bytes()
    assert write_report(tmp_path, report).read_bytes() == first


def test_coupled_modules_are_said_to_be_and_single_ones_are_not(tmp_path, report):
    text = " ".join(Page(write_report(tmp_path, report).read_text(encoding="utf-8")).text.split())
    assert "It loses the same layers as dit, by the mean of their scores." in text
    assert "It loses the same layers as vlm, by the mean of their scores." in text
    report["modules"][0]["dead_last"] = True
    report["modules"][1]["group"] = "alone"
    text = " ".join(Page(write_report(tmp_path, report).read_text(encoding="utf-8")).text.split())
    assert "It loses" not in text
    for module in report["modules"]:
        del module["group"]
    assert "It loses" not in Page(write_report(tmp_path, report).read_text(encoding="utf-8")).text


def test_alternating_kinds_are_explained_where_there_are_any(tmp_path, report):
    assert "alternate" not in Page(write_report(tmp_path, report).read_text(encoding="utf-8")).text
    report["modules"][0]["period"] = 2
    text = Page(write_report(tmp_path, report).read_text(encoding="utf-8")).text
    assert text.count("Its layers are of 2 kinds that alternate") == 1


def test_without_a_plan_the_page_claims_none(tmp_path, report):
    bare = [{"name": module["name"], "adjacent": module["adjacent"]} for module in report["modules"]]
    page = Page(write_report(tmp_path, {"meta": {}, "modules": bare}).read_text(encoding="utf-8"))
    assert "pre" not in page.tags
    assert "None of the 16 layers would be removed" in page.text
    assert {row[1] for row in page.tables[1][1:]} == {"stays"}


def test_a_missing_picture_is_an_error_and_leaves_no_page(tmp_path, report):
    (tmp_path / "heatmap_dit.png").unlink()
    with pytest.raises(FileNotFoundError, match="heatmap_dit"):
        write_report(tmp_path, report)
    assert not (tmp_path / "report.html").exists()
