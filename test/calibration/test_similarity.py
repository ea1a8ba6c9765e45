# SPDX-License-Identifier: Apache-2.0
"""Streamed CKA and distances against plain formulas over all tokens at once."""

import itertools
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from clp_ros.calibration.distances import AdjacentDistances
from clp_ros.calibration.similarity import LinearCKA
from clp_ros.core.compat.torch import TorchDispatchMode
from clp_ros.core.errors import ClpError

# Buffered (Gram matrices), folded from the first full buffer on (cross products), folded into a file.
WAYS = ["buffered", "folded", "scratch"]
EXACT = {"rtol": 0, "atol": 1e-9}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def accumulator(way, num_layers, tmp_path, **options):
    if way == "folded":
        options["buffer_bytes"] = 0
    if way == "scratch":
        options |= {"buffer_bytes": 0, "scratch": tmp_path}
    return LinearCKA(num_layers, **options)


def is_folded(cka):
    return bool(cka._products)


def reference(states):
    """CKA by its definition, all tokens at once: numpy, float64."""
    centred = []
    for state in states:
        x = state.double().cpu().numpy()
        x = x - x[:1]
        centred.append(x - x.mean(axis=0))
    norms = np.array([[np.linalg.norm(y.T @ x) for x in centred] for y in centred])
    return norms**2 / np.outer(np.diagonal(norms), np.diagonal(norms))


def residual_stream(seed, tokens, widths=(24, 24, 24, 24), dtype=torch.float32):
    """States that resemble their predecessors, as a transformer's do."""
    generator = torch.Generator().manual_seed(seed)
    states = []
    for width in widths:
        state = torch.randn(tokens, width, generator=generator)
        if states:
            common = min(width, states[-1].shape[1])
            state[:, :common] += states[-1][:, :common]
        states.append(state)
    return [state.to(dtype) for state in states]


def ragged(states, seed):
    """The same tokens in batches of random length, from 0 up."""
    tokens = len(states[0])
    rng = np.random.default_rng(seed)
    cuts = [0, *sorted(rng.integers(0, tokens + 1, rng.integers(1, 9)).tolist()), tokens]
    return [[state[a:b] for state in states] for a, b in itertools.pairwise(cuts)]


def test_both_ways_are_under_test(tmp_path):
    states = residual_stream(0, 3000)
    for way, folded in (("buffered", False), ("folded", True), ("scratch", True)):
        cka = accumulator(way, 4, tmp_path)
        cka.update([state[:900] for state in states])
        assert not is_folded(cka)
        if folded:
            cka.update([state[900:] for state in states])
            assert is_folded(cka)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_formula_on_ragged_batches(way, dtype, seed, tmp_path):
    tokens = 1500 + 301 * seed if way != "buffered" else 700 + 77 * seed
    states = residual_stream(seed, tokens, widths=(24, 24, 31, 12), dtype=dtype)
    cka = accumulator(way, 4, tmp_path)
    for batch in ragged(states, seed):
        cka.update(batch)
    assert cka.tokens == tokens
    assert is_folded(cka) == (way != "buffered")
    matrix = cka.matrix()
    assert matrix.dtype == np.float64
    np.testing.assert_allclose(matrix, reference(states), **EXACT)
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_array_equal(np.diagonal(matrix), 1)
    np.testing.assert_array_equal(cka.adjacent(), np.diagonal(matrix, 1))


@pytest.mark.parametrize("tokens", [2, 3, 511, 512, 513, 1025])
def test_blocks_of_gram_matrices_fit_together(tokens):
    states = residual_stream(tokens, tokens, widths=(300, 300, 300))
    cka = LinearCKA(3)
    cka.update(states)
    assert not is_folded(cka)
    np.testing.assert_allclose(cka.matrix(), reference(states), **EXACT)


@pytest.mark.parametrize("way", WAYS)
def test_adjacent_only_is_the_same_for_fewer_sums(way, tmp_path):
    states = residual_stream(5, 1000 if way == "buffered" else 2500, widths=(24, 30, 24, 24, 20))
    some, every = accumulator(way, 5, tmp_path, pairs="adjacent"), accumulator(way, 5, tmp_path)
    for batch in ragged(states, 5):
        some.update(batch)
        every.update(batch)
    np.testing.assert_allclose(some.adjacent(), every.adjacent(), **EXACT)
    np.testing.assert_allclose(some.adjacent(), np.diagonal(reference(states), 1), **EXACT)
    with pytest.raises(ValueError, match="adjacent"):
        some.matrix()
    if way != "buffered":
        assert some.held_bytes < every.held_bytes


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_means_far_above_the_deviations_cost_nothing(way, dtype, tmp_path):
    """Massive activations: some channels sit at 10 000 deviations, and a few tokens are outliers in them."""
    states = residual_stream(1, 1000 if way == "buffered" else 2000, dtype=torch.float64)
    for i, state in enumerate(states):
        state[:, i] += 1e4
        state[:, 10] -= 3e4 + i
        state[::97, 11] += 1e2
        state += 1e4
    states = [state.to(dtype) for state in states]
    cka = accumulator(way, 4, tmp_path)
    for batch in ragged(states, 1):
        cka.update(batch)
    np.testing.assert_allclose(cka.matrix(), reference(states), **EXACT)


@pytest.mark.parametrize("way", WAYS)
def test_a_first_token_unlike_all_others(way, tmp_path):
    """The attention sink: the token that all else is measured from is the outlier."""
    states = residual_stream(2, 1000 if way == "buffered" else 2000)
    for state in states:
        state[0, 3] = 5e3
    cka = accumulator(way, 4, tmp_path)
    for batch in ragged(states, 2):
        cka.update(batch)
    np.testing.assert_allclose(cka.matrix(), reference(states), **EXACT)


@pytest.mark.parametrize("ways", itertools.product(WAYS, repeat=2), ids="-".join)
@pytest.mark.parametrize("pairs", ["all", "adjacent"])
def test_merging_is_one_pass_in_any_order(ways, pairs, tmp_path):
    states = residual_stream(3, 4300)
    for state in states[1:]:
        state += 50
        state[2000:] -= 20  # the two halves have different means
    parts = [[state[:2000] for state in states], [state[2000:] for state in states]]
    for order in ((0, 1), (1, 0)):
        ckas = [
            accumulator(way, 4, tmp_path, pairs=pairs, **({} if way != "buffered" else {"buffer_bytes": 2**40}))
            for way in ways
        ]
        for cka, part in zip(ckas, [parts[i] for i in order], strict=True):
            step = 500 if is_folded(cka) else 1000
            for start in range(0, 2300, step):
                cka.update([x[start : start + step] for x in part])
        before = ckas[1].adjacent()
        assert ckas[0].merge(ckas[1]) is ckas[0]
        assert ckas[0].tokens == 4300
        np.testing.assert_allclose(ckas[0].adjacent(), np.diagonal(reference(states), 1), **EXACT)
        np.testing.assert_array_equal(ckas[1].adjacent(), before)
        ckas[0].update([state[:1] for state in states])  # and it goes on
        assert ckas[0].tokens == 4301


def test_merging_buffered_accumulators_of_few_tokens():
    states = residual_stream(4, 600)
    cka = LinearCKA(4)
    for start in range(0, 600, 100):
        part = LinearCKA(4)
        part.update([state[start : start + 100] for state in states])
        cka.merge(part)
    assert not is_folded(cka)
    cka.merge(LinearCKA(4))
    np.testing.assert_allclose(cka.matrix(), reference(states), **EXACT)


def test_what_cannot_be_merged():
    cka = LinearCKA(2)
    cka.update([torch.randn(5, 3), torch.randn(5, 3)])
    other = LinearCKA(2)
    other.update([torch.randn(5, 4), torch.randn(5, 4)])
    for stranger in (cka, other, LinearCKA(3), LinearCKA(2, pairs="adjacent")):
        with pytest.raises(ValueError, match="merge"):
            cka.merge(stranger)
    assert cka.tokens == 5


@pytest.mark.parametrize("way", WAYS)
def test_the_order_of_tokens_does_not_matter(way, tmp_path):
    states = residual_stream(6, 900 if way == "buffered" else 2000)
    order = torch.randperm(len(states[0]), generator=torch.Generator().manual_seed(0))
    forwards, shuffled = accumulator(way, 4, tmp_path), accumulator(way, 4, tmp_path)
    for batch in ragged(states, 6):
        forwards.update(batch)
    for batch in ragged([state[order] for state in states], 7):
        shuffled.update(batch)
    np.testing.assert_allclose(forwards.matrix(), shuffled.matrix(), **EXACT)


@pytest.mark.parametrize("way", WAYS)
def test_rotating_scaling_and_shifting_a_state_change_nothing(way, tmp_path):
    states = residual_stream(8, 900 if way == "buffered" else 2000, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64)).Q
    turned = [states[0], -1e-3 * states[1] @ rotation + 7, states[2] * 1e6, states[3]]
    plain, moved = accumulator(way, 4, tmp_path), accumulator(way, 4, tmp_path)
    plain.update(states)
    moved.update(turned)
    np.testing.assert_allclose(plain.matrix(), moved.matrix(), **EXACT)


def test_independent_states_have_the_biased_value():
    """What peers get wrong: the value over all tokens at once, not a mean over batches (0.67, not 0.97)."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(512, 1024, generator=generator) for _ in range(2)]
    cka = LinearCKA(2)
    for start in range(0, 512, 32):
        cka.update([state[start : start + 32] for state in states])
    assert cka.adjacent()[0] == pytest.approx(0.668, abs=0.005)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [0.0, 1 / 3, 12345.678])
def test_constant_states(way, dtype, value, tmp_path):
    tokens = 900 if way == "buffered" else 3000
    states = residual_stream(9, tokens, dtype=dtype)
    states[1] = torch.full((tokens, 24), value, dtype=dtype)
    states[2] = torch.arange(24).to(dtype).expand(tokens, 24) / 7
    cka, late = accumulator(way, 4, tmp_path), accumulator(way, 4, tmp_path)
    for target, part in ((cka, slice(0, tokens // 2 + 3)), (late, slice(tokens // 2 + 3, tokens))):
        for batch in ragged([state[part] for state in states], 9):
            target.update(batch)
    cka.merge(late)
    matrix = cka.matrix()
    np.testing.assert_array_equal(matrix[1:3, 1:3], 1)
    np.testing.assert_array_equal(matrix[1:3, [0, 3]], 0)
    np.testing.assert_allclose(matrix[0, 3], reference([states[0], states[3]])[0, 1], **EXACT)


@pytest.mark.parametrize("way", WAYS)
def test_a_constant_feature_adds_nothing(way, tmp_path):
    states = residual_stream(10, 900 if way == "buffered" else 2000, dtype=torch.float64)
    with_constant = [torch.cat([state, torch.full((len(state), 1), 1e8 / 3)], dim=1) for state in states]
    plain, widened = accumulator(way, 4, tmp_path), accumulator(way, 4, tmp_path)
    plain.update(states)
    widened.update(with_constant)
    np.testing.assert_allclose(plain.matrix(), widened.matrix(), **EXACT)


@pytest.mark.parametrize("kind", [LinearCKA, AdjacentDistances])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nan_and_infinity_name_the_layer(kind, bad, dtype):
    sums = kind(12, name="vlm")
    good = residual_stream(11, 20, widths=(8,) * 12, dtype=dtype)
    sums.update(good)
    states = [state.clone() for state in good]
    states[7][13, 2] = bad
    with pytest.raises(ClpError, match="vlm layer 7: "):
        sums.update(states)
    assert sums.tokens == 20
    sums.update(good)
    assert sums.tokens == 40


def test_states_changed_afterwards_do_not_matter():
    states = residual_stream(12, 50)
    expected = reference(states)
    cka = LinearCKA(4)
    cka.update(states)
    for state in states:
        state += torch.randn_like(state)
    np.testing.assert_allclose(cka.matrix(), expected, **EXACT)


def test_states_with_a_graph_and_views_of_a_batch():
    cka = LinearCKA(2)
    batch = torch.randn(3, 2, 50, 6, requires_grad=True)
    states = [batch[:, i].reshape(-1, 6) * 1.0 for i in range(2)]
    cka.update([states[0], states[1].T.contiguous().T])
    np.testing.assert_allclose(cka.matrix(), reference([state.detach() for state in states]), **EXACT)


@pytest.mark.parametrize("pairs", ["all", "adjacent"])
@pytest.mark.parametrize("way", WAYS)
def test_memory_does_not_grow_with_the_tokens(way, pairs, tmp_path):
    cka = accumulator(way, 4, tmp_path, pairs=pairs)
    states = residual_stream(13, 1024, widths=(64,) * 4)
    pairs_kept = 10 if pairs == "all" else 7
    products = 8 * pairs_kept * 64 * 64
    rows = 4 * 64 * 4 * (max(1024, cka_fold_rows(4 * 64)) + 1024)
    for _ in range(200):
        cka.update(states)
        assert cka.held_bytes <= products + rows + 2 * 8 * 4 * 64
    assert is_folded(cka)
    assert cka.tokens == 200 * 1024


def cka_fold_rows(width):
    """Rows of float64 in the 128 MiB of workspace that the class documents."""
    return 128 * 2**20 // (8 * width)


def test_the_buffer_is_bounded_by_its_bytes():
    cka = LinearCKA(2, buffer_bytes=2 * 2**20)
    for _ in range(40):
        cka.update([torch.randn(100, 512), torch.randn(100, 512)])
        assert is_folded(cka) or cka.held_bytes <= 2 * 1024 * 512 * 4 + 2 * 8 * 1024
    assert is_folded(cka)


def test_wrong_input_is_refused():
    cka = LinearCKA(2)
    cka.update([torch.randn(5, 3), torch.randn(5, 4)])
    for hidden in (
        [torch.randn(5, 3)],
        [torch.randn(5, 3), torch.randn(4, 4)],
        [torch.randn(5, 4), torch.randn(5, 4)],
        [torch.randn(5, 3), torch.randn(1, 5, 4)],
        [torch.randn(5, 3), torch.ones(5, 4, dtype=torch.int64)],
    ):
        with pytest.raises(ValueError, match=r"expected|widths"):
            cka.update(hidden)
    assert cka.tokens == 5
    with pytest.raises(ValueError, match="at least 1"):
        LinearCKA(0)
    with pytest.raises(ValueError, match="pairs"):
        LinearCKA(2, pairs="some")


class RoundedProducts(TorchDispatchMode):
    """A processor that rounds the factors of float32 products to bfloat16, where torch is allowed to: as with AMX."""

    rounded = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        if func in products and torch.get_float32_matmul_precision() != "highest":
            self.rounded += 1
            args = [x.to(torch.bfloat16).to(torch.float32) if x.dtype == torch.float32 else x for x in args]
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[False, True], ids=["this processor", "rounding"])
def allowed_rounding(request):
    """The caller has allowed faster products; on either processor. It stays allowed for others."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with RoundedProducts() if request.param else nullcontext():
            yield request.param
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_rounding_processor_rounds():
    states = residual_stream(21, 3000)
    x, y = (state - state.mean(dim=0) for state in states[:2])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with RoundedProducts() as processor:
            found = ((y.T @ x).norm() ** 2 / (x.T @ x).norm() / (y.T @ y).norm()).item()
    finally:
        torch.set_float32_matmul_precision(before)
    assert processor.rounded == 3
    assert abs(found - reference(states)[0, 1]) > 1e-6


HALF_CASES = {
    # tokens, widths, mean, deviation of what a layer adds, what is put on top
    "plain": (6100, (300, 300, 520), 0, 1, {}),  # widths above and across the blocks of the triangle, two folds
    "nearly equal": (3000, (200, 200), 0, 0.003, {}),
    "wide": (1100, (1500, 1500), 3, 0.3, {}),  # fewer tokens than features
    "narrow": (9000, (70, 24), 0, 0.3, {}),
    "coarse": (6100, (300, 300), 300, 0.1, {}),  # bfloat16 has numbers 2 apart there: states of three values
    "coarser": (4096, (300, 300), 1000, 1, {}),
    "sink": (6100, (300, 300), 0, 1, {"outlier": 3e3}),
    "massive channels": (6100, (300, 300), 0, 0.3, {"channels": 3}),
    # Massive activations, as large language models have them: one token, two features, other sizes in each layer.
    "massive features of one token": (6100, (40,) * 12, 0, 0.3, {"token": (1500, -700)}),
    "two values": (4096, (300, 300), 0, 0.1, {"binary": True}),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", HALF_CASES)
def test_float32_products_of_half_precision_are_exact_to_1e_7(case, dtype, allowed_rounding):
    tokens, widths, mean, step, on_top = HALF_CASES[case]
    generator = torch.Generator().manual_seed(21)
    base = torch.randn(tokens, max(widths), generator=generator, dtype=torch.float64)
    states = [base[:, : widths[0]]]
    for width in widths[1:]:
        new = step * torch.randn(tokens, width, generator=generator, dtype=torch.float64)
        common = min(width, states[-1].shape[1])
        new[:, :common] += states[-1][:, :common]
        states.append(new)
    for state in states:
        for feature, size in enumerate(on_top.get("token", ())):
            state[2000, feature] += size * (1 + 0.3 * torch.randn((), generator=generator, dtype=torch.float64))
        if "binary" in on_top:
            state.copy_(1.1 * (state > 0.5))
        state[0, 3] += on_top.get("outlier", 0)
        state[:, : on_top.get("channels", 0)] *= 300
    states = [(state + mean).to(dtype) for state in states]
    pairs = "all" if dtype == torch.bfloat16 else "adjacent"
    cka = LinearCKA(len(states), pairs=pairs, products="float32", buffer_bytes=0)
    for batch in ragged(states, 21):
        cka.update(batch)
    found = cka.adjacent()
    assert is_folded(cka)
    np.testing.assert_allclose(found, np.diagonal(reference(states), 1), rtol=0, atol=1e-7)


def test_float32_products_have_no_bias():
    errors = []
    for seed in range(12):
        states = residual_stream(seed, 1300, widths=(100, 100), dtype=torch.bfloat16)
        cka = LinearCKA(2, products="float32", buffer_bytes=0)
        cka.update(states)
        errors.append(cka.adjacent()[0] - reference(states)[0, 1])
    assert abs(np.mean(errors)) < 2e-8
    assert min(errors) < 0 < max(errors)


def test_float32_products_are_for_half_precision_only():
    states = residual_stream(22, 3000)
    cka = LinearCKA(4, products="float32", buffer_bytes=0)
    for batch in ragged(states, 22):
        cka.update(batch)
    cka._fold()
    np.testing.assert_allclose(cka.matrix(), reference(states), **EXACT)
    with pytest.raises(ValueError, match="products"):
        LinearCKA(2, products="bfloat16")


def test_float32_products_of_constant_states():
    states = residual_stream(23, 3000, dtype=torch.bfloat16)
    states[1] = torch.full((3000, 24), 1 / 3, dtype=torch.bfloat16)
    cka = LinearCKA(4, products="float32", buffer_bytes=0)
    for batch in ragged(states, 23):
        cka.update(batch)
    cka._fold()
    np.testing.assert_array_equal(cka.matrix()[1], [0, 1, 0, 0])


def test_a_finite_state_whose_sum_is_not_finite_is_taken():
    sums = AdjacentDistances(2)
    sums.update([torch.full((4, 3), 3e38), torch.full((4, 3), 3e38)])
    assert sums.mse().tolist() == [0]


def test_too_few_tokens():
    cka = LinearCKA(2, name="vlm")
    for count in (0, 1):
        with pytest.raises(ClpError, match=f"vlm: .*not {count}"):
            cka.matrix()
        cka.update([torch.randn(1, 3)] * 2)
    assert cka.matrix()[0, 1] == pytest.approx(1, abs=1e-12)  # the norms are rounded
    assert LinearCKA(1).tokens == 0


def test_one_layer():
    cka = LinearCKA(1)
    cka.update([torch.randn(5, 3)])
    assert cka.matrix().tolist() == [[1.0]]
    assert cka.adjacent().shape == (0,)


def test_states_too_large_for_float64_sums_are_refused():
    cka = LinearCKA(2, name="vlm")
    cka.update([torch.randn(5, 3, dtype=torch.float64) * 1e100] * 2)
    with pytest.raises(ClpError, match="too large"):
        cka.matrix()


def distances(states):
    """Mean squared error and cosine of neighbours by torch's own functions, all tokens at once."""
    pairs = [(a.double(), b.double()) for a, b in itertools.pairwise(states)]
    mse = [torch.nn.functional.mse_loss(a, b).item() for a, b in pairs]
    return mse, [torch.cosine_similarity(a, b, dim=1, eps=0).mean().item() for a, b in pairs]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_distances_equal_the_formulas_in_one_pass_and_merged(dtype):
    states = [state + 3 for state in residual_stream(14, 1003, dtype=dtype)]
    mse, cosine = distances(states)
    whole, merged = AdjacentDistances(4), AdjacentDistances(4)
    for batch in ragged(states, 14):
        whole.update(batch)
        part = AdjacentDistances(4)
        part.update(batch)
        assert merged.merge(part) is merged
    for sums in (whole, merged):
        assert sums.tokens == 1003
        np.testing.assert_allclose(sums.mse(), mse, rtol=1e-12)
        np.testing.assert_allclose(sums.cosine(), cosine, rtol=1e-12)


def test_the_cosine_of_zero_vectors():
    zero, one = torch.zeros(1, 3), torch.tensor([[1.0, 2.0, 2.0]])
    sums = AdjacentDistances(4)
    sums.update([zero, zero, one, -1e-100 * one.double()])
    np.testing.assert_allclose(sums.cosine(), [1, 0, -1], atol=1e-15)
    np.testing.assert_allclose(sums.mse(), [0, 3, 3])


def test_distances_of_nothing_and_of_unequal_widths():
    with pytest.raises(ClpError, match="no tokens"):
        AdjacentDistances(2).mse()
    with pytest.raises(ValueError, match="one shape"):
        AdjacentDistances(2).update([torch.randn(5, 3), torch.randn(5, 4)])
    with pytest.raises(ValueError, match="merge"):
        AdjacentDistances(2).merge(AdjacentDistances(3))


WORKER = """
import sys
import numpy as np, torch
import torch.distributed as dist
from clp_ros.calibration.distances import AdjacentDistances
from clp_ros.calibration.similarity import LinearCKA
rank, folder, way = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=3)
states = [torch.from_numpy(x) for x in np.load(f"{folder}/states.npy")]
part = [slice(0), slice(0, 700), slice(700, None)][rank]
options = {"buffer_bytes": 0} if way == "folded" else {}
cka, distances = LinearCKA(len(states), device="cpu", **options), AdjacentDistances(len(states), device="cpu")
nothing = LinearCKA(len(states), device="cpu").all_reduce()
assert nothing.tokens == 0
for sums in (cka, distances):
    if rank:
        sums.update([x[part] for x in states])
    sums.all_reduce()
assert bool(cka._products) == (way == "folded")
np.savez(f"{folder}/{rank}.npz", matrix=cka.matrix(), mse=distances.mse(), tokens=[cka.tokens, distances.tokens])
dist.destroy_process_group()
"""


@pytest.mark.parametrize(("way", "tokens"), [("buffered", 1000), ("folded", 1900)])
def test_three_processes_of_which_one_saw_nothing_reduce_to_what_one_gives(tmp_path, way, tokens):
    states = [state + 100 for state in residual_stream(15, tokens)]
    states[2] = torch.full_like(states[2], 1 / 3)  # stays constant, whoever saw it
    np.save(tmp_path / "states.npy", torch.stack(states).numpy())
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path), way]) for rank in range(3)]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0, 0]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    cka, plain = LinearCKA(4), AdjacentDistances(4)
    cka.update(states)
    plain.update(states)
    for rank in range(3):
        got = np.load(tmp_path / f"{rank}.npz")
        assert got["tokens"].tolist() == [tokens, tokens]
        np.testing.assert_allclose(got["matrix"], cka.matrix(), **EXACT)
        np.testing.assert_array_equal(got["matrix"][2], [0, 0, 1, 0])
        np.testing.assert_allclose(got["mse"], plain.mse(), rtol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("way", ["buffered", "folded"])
def test_cuda_equals_the_formula(way, tmp_path):
    states = residual_stream(16, 900 if way == "buffered" else 3000, dtype=torch.bfloat16)
    cka, plain = accumulator(way, 4, tmp_path), AdjacentDistances(4)
    for batch in ragged([state.cuda() for state in states], 16):
        cka.update(batch)
        plain.update(batch)
    np.testing.assert_allclose(cka.matrix(), reference(states), **EXACT)
    np.testing.assert_allclose(plain.mse(), distances(states)[0], rtol=1e-12)
    on_cpu = accumulator(way, 4, tmp_path)
    on_cpu.merge(cka)
    np.testing.assert_allclose(on_cpu.matrix(), cka.matrix(), **EXACT)
