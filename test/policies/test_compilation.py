# SPDX-License-Identifier: Apache-2.0
"""A compiled policy acts as the eager one, or says why it cannot be compiled."""

import shutil

import pytest
import torch

from clp_ros.core.compat.torch import compiled_graphs
from clp_ros.core.errors import ClpError
from clp_ros.evaluation.verify import COMPILED_TOLERANCE, verify
from clp_ros.policies.compilation import compile_policy
from clp_ros.policies.loading import load_policy
from clp_ros.pruning.surgery import prune_checkpoint


@pytest.fixture(scope="module")
def shallow(tiny_checkpoint, tmp_path_factory):
    """Two layers a tower, which compile in seconds."""
    folder = tmp_path_factory.mktemp("compilation") / "shallow"
    prune_checkpoint(tiny_checkpoint, folder, {"vlm": tuple(range(2, 16))})
    return folder


_NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")


# Most of the time is the C++ compiler's. What torch captures and rewrites of the step is the same without it.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, _NEEDS_COMPILER])])
def test_compiled_actions_are_the_eager_ones(shallow, monkeypatch, backend):
    if backend != "inductor":
        compiled = torch.compile
        monkeypatch.setattr(torch, "compile", lambda step, mode: compiled(step, backend=backend))
    compiled_graphs(reset=True)
    found = verify(shallow, compiled=True)
    assert found["compiled_tolerance"] == COMPILED_TOLERANCE["float32"] == 1e-4
    assert 0 <= found["compiled_difference"] <= 1e-4
    assert compiled_graphs() > 0  # it was compiled, not run as ever


def test_a_step_that_cannot_be_compiled_is_told_and_stays_eager(shallow, monkeypatch):
    policy = load_policy(shallow, "cpu")

    def fails(graph, inputs):
        raise RuntimeError("no such kernel\nand more lines")

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, mode: compiled(step, backend=fails))
    with pytest.raises(ClpError, match=r"torch\.compile fails on smolvla's denoising step") as reported:
        compile_policy(policy, "Pick up the cube.")
    assert "without compiling" in reported.value.hint
    monkeypatch.undo()
    policy.warm_up()
