# SPDX-License-Identifier: Apache-2.0
import io

import pytest
from rich.console import Console

from clp_ros.report.tables import (
    benchmark_setting,
    comparison_table,
    format_bytes,
    format_count,
    inspection_table,
    layers_table,
    paper_table,
    to_markdown,
)


def shown(table, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(table)
    return console.file.getvalue()


def body(markdown: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in markdown.splitlines()[2:]]


BASE = {
    "path": "/models/smolvla",
    "parameters": 450_046_176,
    "gflops": 598.4,
    "latency_ms": 200.0,
    "bytes": 907_000_000,
}
PRUNED = {
    "path": "/models/pruned",
    "parameters": 354_000_000,
    "gflops": None,
    "latency_ms": 137.0,
    "bytes": 712_345_678,
}


def test_layers_table_tells_each_layer_its_score_block_and_fate():
    table = layers_table(
        "vlm", [0.5, 0.99, 0.999, float("nan"), 0.98], blocks=[[0], [1, 2, 3], [4, 5]], removed=(3, 5), threshold=0.97
    )
    assert body(to_markdown(table)) == [
        ["0", "–", "–", "stays"],
        ["1", "0.500000", "1–3 anchor", "stays"],
        ["2", "0.990000", "1–3", "candidate, stays"],
        ["3", "0.999000", "1–3", "× removed"],
        ["4", "–", "4–5 anchor", "stays"],
        ["5", "0.980000", "4–5", "× removed"],
    ]
    assert "vlm  τ = 0.970000" in shown(table)


def test_layers_table_with_scores_alone():
    assert [row[0] for row in body(to_markdown(layers_table("dit", [0.1, 0.2])))] == ["0", "1", "2"]


def test_comparison_puts_base_beside_pruned_with_ratios_to_the_first():
    rows = body(to_markdown(comparison_table([BASE, PRUNED])))
    assert rows == [
        ["parameters", "450.0 M", "354.0 M  (1.27× smaller)"],
        ["GFLOPs a chunk", "598.4", "–"],
        ["latency of a chunk, ms", "200.0", "137.0  (1.46× faster)"],
        ["checkpoint", "907.0 MB", "712.3 MB  (1.27× smaller)"],
    ]


def test_a_base_without_a_figure_gives_no_ratio():
    rows = body(to_markdown(comparison_table([PRUNED, BASE, {"path": "x", "gflops": float("nan")}])))
    assert rows[1] == ["GFLOPs a chunk", "–", "598.4", "–"]
    assert rows[0][3] == "–"


def test_ratios_say_which_way_they_go():
    rows = [{"path": str(i), "latency_ms": value} for i, value in enumerate((100.0, 100.3, 150.0, 40.0, 0.0))]
    cells = body(to_markdown(comparison_table(rows)))[0][1:]
    assert cells == ["100.0", "100.3  (same)", "150.0  (1.50× slower)", "40.0  (2.50× faster)", "0"]


def test_each_kind_of_measure_has_its_own_words():
    measures = ("parameters", "gflops", "train_step_ms", "bytes")
    rows = [dict.fromkeys(measures, value) | {"path": str(value)} for value in (100, 50, 200)]
    words = [[cell.split("× ")[1].rstrip(")") for cell in row[2:]] for row in body(to_markdown(comparison_table(rows)))]
    assert words == [["smaller", "larger"], ["less", "more"], ["faster", "slower"], ["smaller", "larger"]]


def test_a_small_figure_does_not_read_zero():
    rows = body(to_markdown(comparison_table([{"path": "tiny", "gflops": 0.0312, "latency_ms": 4.567}])))
    assert [row[1] for row in rows] == ["0.0312", "4.57"]


def test_folders_called_alike_are_told_apart_by_their_paths():
    header = to_markdown(comparison_table([{"path": "/a/model"}, {"path": "/b/model"}])).splitlines()[0]
    assert "/a/model" in header
    assert "/b/model" in header
    named = to_markdown(comparison_table([{"path": "/a/model", "name": "base"}])).splitlines()[0]
    assert "base" in named
    assert "model" not in named


def test_names_are_text_and_never_markup():
    rows = [{"name": "[red]x[/red]", "parameters": 1}, {"name": "[/oops]", "parameters": 2}]
    terminal = shown(comparison_table(rows, title="[bold]t"))
    assert "[red]x[/red]" in terminal
    assert "[/oops]" in terminal
    assert "[bold]t" in terminal
    assert "[/m]" in shown(layers_table("[/m]", [0.5]))


def test_markdown_escapes_what_would_end_a_cell():
    table = comparison_table([{"path": "/m/a|b", "parameters": 1}])
    lines = to_markdown(table).splitlines()
    assert lines[0] == "|  | a\\|b |"
    assert lines[1] == "| --- | ---: |"


def test_a_papers_table_has_a_column_of_ratios_after_each_but_the_first():
    base = {**BASE, "parameters": 3_501_372_176, "trainable": 99_880_992, "peak_memory": None}
    pruned = {**base, "path": "/m/pruned", "parameters": 2_736_923_408, "trainable": 63_040_992, "latency_ms": None}
    lines = to_markdown(paper_table([base, pruned, base])).splitlines()
    first = "/models/smolvla"
    assert lines[0] == f"|  | {first} | /m/pruned | {first} ÷ /m/pruned | {first} | {first} ÷ {first} |"
    cells = {row[0]: row[1:] for row in body("\n".join(lines))}
    assert cells["parameters"] == ["3.501 B", "2.737 B", "1.28", "3.501 B", "1.00"]
    assert cells["trainable"] == ["99.88 M", "63.04 M", "1.58", "99.88 M", "1.00"]
    assert cells["latency of a chunk, ms"] == ["200.0", "–", "–", "200.0", "1.00"]
    assert cells["peak memory"] == ["–", "–", "–", "–", "–"]
    with pytest.raises(ValueError, match="nothing to compare"):
        paper_table([])


def test_the_setting_names_device_threads_and_dtype_once():
    row = {"device": "cpu", "device_name": "EPYC", "threads": 2, "dtype": "float32", "compile_s": None}
    assert benchmark_setting([row, row]) == "EPYC, cpu, 2 threads, float32"
    on_gpu = {**row, "device": "cuda", "device_name": "H200", "threads": None, "compile_s": 31.0}
    assert benchmark_setting([on_gpu]) == "H200, cuda, float32, denoising step compiled"
    assert benchmark_setting([{"dtype": "bfloat16"}]) == "bfloat16"


def test_fits_a_terminal_of_80_columns():
    row = {**BASE, "parameters_tied": 450_000_000, "trainable": 99_880_992, "train_step_ms": 1234.5}
    lines = shown(comparison_table([row, {**row, "path": "/m/smolvla_pruned"}]), width=80).splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)


RECORD = {"original_layers": 18, "removed": [1, 2], "kept": [0, *range(3, 18)], "scores": None}
CHECKPOINT = {
    "path": "/m/[b]pruned",
    "family": "smolvla",
    "modules": [
        {"name": "vlm", "group": "g", "layers": 16, "period": 2, "parameters": 690_176},
        {"name": "expert", "group": "g", "layers": 16, "period": 2, "parameters": 730_624},
        {"name": "dit", "group": "alone", "layers": 4, "period": 1, "parameters": 10},
    ],
    "parameters": 1_550_720,
    "bytes": 6_264_757,
    "fingerprint": "40e718",
    "manifest": None,
}


def test_inspecting_a_checkpoint_shows_its_modules_and_size():
    text = shown(inspection_table(CHECKPOINT))
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert [cell.strip() for cell in lines["vlm"].split("│")[1:-1]] == ["vlm", "expert", "16", "2", "690.2 k"]
    assert [cell.strip() for cell in lines["dit"].split("│")[1:-1]] == ["dit", "–", "4", "1", "10"]
    assert "1.6 M (1550720)" in text
    assert "6.3 MB (6264757)" in text
    assert "/m/[b]pruned" in text
    assert "removed" not in text


def test_inspecting_a_pruned_checkpoint_shows_what_it_lost():
    manifest = {
        "source": {"path": "/m/base", "fingerprint": "ab12"},
        "criterion": "cka",
        "parameters": {"before": 2_000_000, "after": 1_550_720},
        "modules": {"vlm": RECORD, "expert": RECORD},
    }
    text = shown(inspection_table({**CHECKPOINT, "manifest": manifest}))
    assert text.count("1, 2 of 18") == 2
    assert "/m/base (ab12)" in text
    assert "2.0 M (2000000)" in text


def test_inspecting_a_calibration_shows_every_score():
    module = {"name": "vlm", "layers": 3, "adjacent": [0.5, 0.99], "mse": [1.23456, 1e-7], "cosine": [0.25, 0.75]}
    found = {
        "path": "/c",
        "checkpoint": {"path": "/m/base", "fingerprint": "ab12"},
        "bags": [{"path": "/b/one", "samples": 40}, {"path": "/b/two", "samples": 24}],
        "tokens": {"vlm": 100},
        "device": None,
        "modules": [module],
    }
    text = shown(inspection_table(found))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert rows == [["1", "0.500000", "1.23", "0.250000"], ["2", "0.990000", "1e-07", "0.750000"]]
    for fact in ("/m/base (ab12)", "/b/two (24 samples)", "vlm 100"):
        assert fact in text


def test_nothing_to_compare_is_refused():
    with pytest.raises(ValueError, match="nothing to compare"):
        comparison_table([])


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1500, "1.5 k"),
        (999_960, "1.0 M"),
        (450_046_176, "450.0 M"),
        (999_949_000, "999.9 M"),
        (999_960_000, "1.00 B"),
        (3_501_372_176, "3.50 B"),
    ],
)
def test_counts_read_as_papers_give_them(count, text):
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_960, "1.0 MB"),
        (907_100_000, "907.1 MB"),
        (7.0021e9, "7.00 GB"),
        (1.5e12, "1500.00 GB"),
    ],
)
def test_bytes_read_as_disks_give_them(size, text):
    assert format_bytes(size) == text
