# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import cv2
import numpy as np
import pytest
from matplotlib.text import Text

from clp_ros.report.heatmaps import DPI, HEIGHT_IN, WIDTH_IN, colour_floor, draw_heatmap, format_threshold, heatmap_rgb

WIDTH, HEIGHT = round(WIDTH_IN * DPI), round(HEIGHT_IN * DPI)


def plateaus(num_layers: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    steps = rng.exponential(0.01, num_layers) + rng.uniform(0.05, 0.2, num_layers) * (rng.random(num_layers) < 0.3)
    position = np.cumsum(steps)
    return np.exp(-np.abs(position[:, None] - position[None]))


def axes_of(figure, label: str):
    return next(axes for axes in figure.axes if axes.get_label() == label)


def pixel(figure, image: np.ndarray, column: float, row: float) -> np.ndarray:
    """The colour in the written picture where the matrix's cell (row, column) has its centre."""
    x, y = axes_of(figure, "matrix").transData.transform((column, row))
    return image[HEIGHT - 1 - int(y), int(x)].astype(int)


def is_dark_red(bgr: np.ndarray) -> bool:
    return bgr[2] > 80 and bgr[0] < 60 and bgr[1] < 30


def test_png_opens_with_the_promised_size(tmp_path):
    path = tmp_path / "heatmap_vlm.png"
    draw_heatmap(plateaus(18), module="vlm", threshold=0.98, blocks=[[3, 4]], removed=[4], path=path)
    assert cv2.imread(str(path)).shape == (HEIGHT, WIDTH, 3)


def test_row_is_vertical_and_zero_is_at_the_top_left(tmp_path):
    matrix = np.full((10, 10), 0.2)
    matrix[2, 7] = 1.0  # deliberately not symmetric: only this tells rows from columns
    path = tmp_path / "hot.png"
    figure = draw_heatmap(matrix, module="m", threshold=None, blocks=[], removed=[], path=path)
    image = cv2.imread(str(path))
    hot = [(r, c) for r in range(10) for c in range(10) if is_dark_red(pixel(figure, image, c, r))]
    assert hot == [(2, 7)]
    rows, columns = np.nonzero((image[..., 2] > 80) & (image[..., 0] < 60) & (image[..., 1] < 30))
    matrix_only = columns < axes_of(figure, "matrix").bbox.x1  # right of it stands the colour bar
    # In the picture itself: high up (row 2 of 10) and far right (column 7 of 10).
    assert rows[matrix_only].mean() < HEIGHT * 0.35
    assert columns[matrix_only].mean() > WIDTH * 0.5


@pytest.mark.parametrize("num_layers", [1, 2, 4, 12, 16, 18, 28, 36])
def test_every_layer_is_labelled_and_removed_ones_are_marked_without_colour_too(num_layers):
    removed = set(range(1, num_layers, 3))
    figure = draw_heatmap(plateaus(num_layers), module="m", threshold=0.9, blocks=[], removed=removed, path=None)
    figure.canvas.draw()
    matrix, scores = axes_of(figure, "matrix"), axes_of(figure, "scores")
    for labels in (matrix.get_xticklabels(), matrix.get_yticklabels(), scores.get_xticklabels()):
        assert [int(label.get_text().replace("×", "")) for label in labels] == list(range(num_layers))
        for layer, label in enumerate(labels):
            assert ("×" in label.get_text()) == (layer in removed)
            assert (label.get_fontweight() == "bold") == (layer in removed)
    hatched = {tuple(patch.get_xy()) for patch in matrix.patches if patch.get_hatch()}
    assert hatched == {(layer - 0.5, layer - 0.5) for layer in removed}


@pytest.mark.parametrize("spread", [1, 1e-5])
@pytest.mark.parametrize("num_layers", [1, 4, 18, 36])
def test_no_text_is_cut_off_and_layer_labels_do_not_run_into_each_other(num_layers, spread):
    figure = draw_heatmap(
        plateaus(num_layers) ** spread,
        module="vl_self_attention",
        threshold=0.99995,
        blocks=[list(range(num_layers))],
        removed=range(1, num_layers),
        scores=np.linspace(0.5, 1, num_layers - 1) ** spread,
        path=None,
    )
    figure.canvas.draw()
    page = figure.bbox
    texts = list(figure.texts) + list(figure.legends[0].get_texts())
    for axes in figure.axes:
        texts += [axes.xaxis.label, axes.yaxis.label, axes.title, *axes.texts]
        texts += [text for text in axes.findobj(Text) if text.get_text() == axes.get_title(loc="left")]
        texts += [*axes.get_xticklabels(), *axes.get_yticklabels()]
    for text in filter(lambda text: text.get_text(), texts):
        box = text.get_window_extent()
        assert box.x0 >= page.x0, text
        assert box.x1 <= page.x1, text
        assert box.y0 >= page.y0, text
        assert box.y1 <= page.y1, text
    labels = [label.get_window_extent() for label in axes_of(figure, "matrix").get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(labels))


def test_blocks_are_outlined_where_they_are(tmp_path):
    path = tmp_path / "blocks.png"
    blocks = [[0], [1, 2, 3], [4], [5, 6], [7]]
    figure = draw_heatmap(np.full((8, 8), 0.3), module="m", threshold=0.9, blocks=blocks, removed=[], path=path)
    image = cv2.imread(str(path))
    outlines = {
        (tuple(patch.get_xy()), patch.get_width(), patch.get_height()) for patch in axes_of(figure, "matrix").patches
    }
    assert outlines == {((0.5, 0.5), 3, 3), ((4.5, 4.5), 2, 2)}
    for x, y in [(0.5, 2), (3.5, 2), (2, 0.5), (2, 3.5), (4.5, 6), (6.5, 6)]:
        assert pixel(figure, image, x, y).max() < 40, "black on the border"
    for x, y in [(6.5, 1), (1.5, 2), (4, 0.5)]:
        assert pixel(figure, image, x, y).max() > 60, "no border here"


def test_scores_strip_shows_each_score_at_its_own_layer_with_tau():
    matrix = plateaus(12, seed=3)
    figure = draw_heatmap(matrix, module="m", threshold=0.97, blocks=[], removed=[3, 5], path=None)
    lines = {line.get_gid(): line for line in axes_of(figure, "scores").lines}
    shown = {}
    for gid in ("kept scores", "removed scores"):
        shown |= dict(zip(*(np.asarray(data).tolist() for data in lines[gid].get_data()), strict=True))
    assert shown == {layer: matrix[layer - 1, layer] for layer in range(1, 12)}
    assert list(lines["removed scores"].get_xdata()) == [3, 5]
    assert set(lines["threshold"].get_ydata()) == {0.97}
    low, high = axes_of(figure, "scores").get_ylim()
    assert low < min(shown.values())
    assert high > max(shown.values())


def test_scores_near_one_are_told_apart_beside_one_far_from_it():
    matrix = np.ones((5, 5))
    scores = np.array([0.3, 0.9990, 0.9999, 1.0])
    matrix[range(4), range(1, 5)] = scores
    figure = draw_heatmap(matrix, module="m", threshold=0.9995, blocks=[], removed=[3, 4], path=None)
    figure.canvas.draw()
    axes = axes_of(figure, "scores")
    height = axes.transData.transform(np.column_stack([range(1, 5), np.minimum(scores, 1 - 1e-7)]))[:, 1]
    assert (np.diff(height) > 0.08 * axes.bbox.height).all()
    assert axes.bbox.y0 < height.min()
    assert height.max() < axes.bbox.y1
    ticks = axes.get_yticks()
    assert len(ticks) >= 3
    for tick, label in zip(ticks, axes.get_yticklabels(), strict=True):
        assert float(label.get_text()) == pytest.approx(tick, abs=2e-7)


def test_group_scores_are_the_ones_marked_and_the_module_own_stay_visible():
    matrix, scores = plateaus(6), np.array([0.9, 0.8, np.nan, 0.95, 0.7])
    figure = draw_heatmap(matrix, module="m", threshold=0.9, blocks=[], removed=[4], path=None, scores=scores)
    lines = axes_of(figure, "scores").lines
    marked = next(line for line in lines if line.get_gid() == "removed scores")
    assert list(marked.get_ydata()) == [0.95]
    assert any(np.array_equal(line.get_ydata(), np.diag(matrix, 1)) for line in lines)


@pytest.mark.parametrize(
    ("smallest", "floor"),
    [
        *[(0.0, 0.0), (0.29, 0.2), (0.3, 0.3), (0.35, 0.3), (0.9, 0.9), (0.94, 0.94), (0.957, 0.95), (0.9984, 0.998)],
        *[(0.99995, 0.999), (1, 0.999), (1 + 1e-12, 0.999)],
    ],
)
def test_colours_span_from_the_smallest_value_to_one(smallest, floor):
    matrix = np.ones((3, 3))
    matrix[0, 2] = smallest
    assert colour_floor(matrix) == pytest.approx(floor)
    image = axes_of(
        draw_heatmap(matrix, module="m", threshold=None, blocks=[], removed=[], path=None), "matrix"
    ).images[0]
    assert image.get_clim() == pytest.approx((floor, 1.0))


def test_rgb_is_the_written_picture(tmp_path):
    story = {"module": "dit", "threshold": 0.95, "blocks": [[1, 2, 3]], "removed": [2]}
    path = tmp_path / "dit.png"
    draw_heatmap(plateaus(9), path=path, **story)
    rgb = heatmap_rgb(plateaus(9), **story)
    assert rgb.dtype == np.uint8
    assert rgb.flags.c_contiguous
    np.testing.assert_array_equal(rgb, cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB))


def test_equal_input_gives_equal_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        draw_heatmap(plateaus(16), module="vlm", threshold=0.97, blocks=[[1, 2]], removed={2, 5}, path=tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert b"Matplotlib" not in (tmp_path / "a.png").read_bytes()


def test_drawing_in_several_threads_gives_the_same_pictures():
    def draw(num_layers: int) -> np.ndarray:
        return heatmap_rgb(plateaus(num_layers), module="m", threshold=0.9, blocks=[[1, 2]], removed=[2])

    alone = {num_layers: draw(num_layers) for num_layers in (4, 16, 36)}
    with ThreadPoolExecutor(4) as pool:
        for num_layers, together in zip([4, 16, 36] * 3, pool.map(draw, [4, 16, 36] * 3), strict=True):
            np.testing.assert_array_equal(together, alone[num_layers])


def test_a_module_name_is_text_and_not_a_formula(tmp_path):
    figure = draw_heatmap(
        plateaus(3), module="a$_b$ \\frac", threshold=None, blocks=[], removed=[], path=tmp_path / "x.png"
    )
    assert figure.texts[0].get_text() == "a$_b$ \\frac"


def test_threshold_near_one_is_told_from_one():
    assert format_threshold(0.99996) == "0.999960"
    assert format_threshold(0.98765) == "0.9877"


@pytest.mark.parametrize(
    "fault",
    [
        {"matrix": np.ones((3, 4))},
        {"matrix": np.ones((0, 0))},
        {"matrix": np.array([[1, np.nan], [np.nan, 1]])},
        {"removed": [4]},
        {"removed": [-1]},
        {"blocks": [[1, 3]]},
        {"blocks": [[3, 4]]},
        {"scores": [1.0]},
    ],
)
def test_what_cannot_be_drawn_is_refused(fault):
    story = {"matrix": plateaus(4), "blocks": [], "removed": [], "scores": None} | fault
    with pytest.raises(ValueError, match=r"CKA|layer"):
        draw_heatmap(story.pop("matrix"), module="m", threshold=None, path=None, **story)


def test_importing_the_reports_loads_no_plotting_library():
    code = (
        "import sys, clp_ros.report.heatmaps, clp_ros.report.tables, clp_ros.report.page, "
        "clp_ros.report.calibration_report\n"
        "assert not {'matplotlib', 'jinja2', 'torch', 'cv2'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_drawing_leaves_pyplot_alone():
    code = (
        "import sys, numpy\nfrom clp_ros.report.heatmaps import heatmap_rgb\n"
        "heatmap_rgb(numpy.eye(3), module='m', threshold=None, blocks=[], removed=[])\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
