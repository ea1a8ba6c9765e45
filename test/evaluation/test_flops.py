# SPDX-License-Identifier: Apache-2.0
"""Parameters and work of a chunk, against counts of other origin; and that they take no memory for the weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
import warm_processes
from safetensors.torch import load_file

from clp_ros.evaluation.flops import count_gflops, describe, needed_bytes, random_observation
from clp_ros.policies.loading import load_policy
from clp_ros.policies.registry import families
from clp_ros.pruning.surgery import prune_checkpoint


@pytest.mark.parametrize("name", list(families()))
def test_without_weights_the_count_is_the_same(family_checkpoint, name):
    folder = family_checkpoint(name)
    empty, full = load_policy(folder, weights=False), load_policy(folder, "cpu")
    assert describe(empty) == describe(full)
    assert count_gflops(empty) > 0
    assert all(type(weight.data).__name__ == "FakeTensor" for weight in empty.policy.parameters())


def test_counts_are_those_of_the_files_and_of_lerobots_model(tiny_checkpoint, tmp_path):
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    pruned = tmp_path / "pruned"
    prune_checkpoint(tiny_checkpoint, pruned, {"vlm": (1, 2, 5, 6, 14, 15)})
    for folder, layers in ((tiny_checkpoint, 16), (pruned, 10)):
        found = describe(load_policy(folder, weights=False))
        stock = SmolVLAPolicy.from_pretrained(folder, strict=True)
        stored = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
        assert found["parameters"] == sum(weight.numel() for weight in stock.parameters()) == stored
        assert found["parameters_tied"] == stored
        assert found["trainable"] == sum(weight.numel() for weight in stock.parameters() if weight.requires_grad)
        assert found["bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert found["layers"] == {"vlm": layers, "expert": layers}
        assert (found["path"], found["family"], found["dtype"]) == (str(folder), "smolvla", "float32")


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_matrices_that_the_published_model_ties_count_once(family_checkpoint, name):
    policy = load_policy(family_checkpoint(name), weights=False)
    found, (tied,) = describe(policy), policy.family.tied
    embedding = policy.policy.get_parameter(tied).numel()
    embedded = [
        m.num_embeddings * m.embedding_dim for m in policy.policy.modules() if isinstance(m, torch.nn.Embedding)
    ]
    assert embedding in embedded
    assert found["parameters_tied"] == found["parameters"] - embedding


def test_memory_needed_is_that_of_weights_gradients_and_two_moments(tiny_checkpoint):
    policy = load_policy(tiny_checkpoint, weights=False)
    found = describe(policy)
    assert needed_bytes(policy, train=False) == 4 * found["parameters"]
    assert needed_bytes(policy, train=True) == 4 * found["parameters"] + 12 * found["trainable"]


def test_gflops_are_two_a_multiplication_of_every_matrix_product(tiny_policy, monkeypatch):
    # Counted where the products are called instead of where they are dispatched.
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    total = 0
    linear, matmul, convolution = functional.linear, torch.matmul, functional.conv2d
    attention = functional.scaled_dot_product_attention

    def add(result, inner):
        nonlocal total
        total += 2 * result.numel() * inner
        return result

    monkeypatch.setattr(functional, "linear", lambda x, w, b=None: add(linear(x, w, b), w.shape[1]))
    monkeypatch.setattr(torch, "matmul", lambda x, y: add(matmul(x, y), x.shape[-1]))

    def counted_convolution(x, weight, *more):
        return add(convolution(x, weight, *more), weight[0].numel())

    def counted_attention(query, key, value, *more, **options):
        result = attention(query, key, value, *more, **options)
        add(torch.empty(*query.shape[:-1], key.shape[-2], device="meta"), query.shape[-1])
        return add(result, key.shape[-2])

    monkeypatch.setattr(functional, "conv2d", counted_convolution)
    for module in (functional, torch._C._nn):
        monkeypatch.setattr(module, "scaled_dot_product_attention", counted_attention)
    with sdpa_kernel(SDPBackend.MATH):
        tiny_policy.predict_chunk(**random_observation(tiny_policy))
    monkeypatch.undo()
    assert count_gflops(tiny_policy) * 1e9 == pytest.approx(total, rel=1e-3)


MEMORY = """
import json, sys
from pathlib import Path
from clp_ros.evaluation.flops import describe
from clp_ros.policies.loading import load_policy

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "VmHWM"))}

describe(load_policy(sys.argv[1], weights=False))  # imports
Path("/proc/self/clear_refs").write_text("5")
before = resident()["VmHWM"]
found = describe(load_policy(sys.argv[2], weights=False))
print(json.dumps({"grown": (resident()["VmHWM"] - before) * 1024, "gflops": found["gflops"]}))
"""


def test_counting_takes_no_memory_for_the_weights(tiny_checkpoint, tmp_path):
    """A checkpoint of 0.45 billion parameters, of which no byte is there: its weight file is a hole."""
    import json
    import shutil
    import struct

    full = tmp_path / "full"
    shutil.copytree(tiny_checkpoint, full)
    config = json.loads((full / "vlm" / "config.json").read_text())
    wide = {"hidden_size": 960, "intermediate_size": 2560, "num_attention_heads": 15, "num_key_value_heads": 5}
    config["text_config"] |= wide | {"head_dim": 64, "vocab_size": 49280}
    (full / "vlm" / "config.json").write_text(json.dumps(config))
    shapes = _shapes(full)
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    with (full / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)
    assert end > 1e9
    done = warm_processes.run(["-c", MEMORY, str(tiny_checkpoint), str(full)])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["gflops"] > 30
    assert found["grown"] < 0.3e9


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    from clp_ros.policies.empty_weights import empty_weights
    from clp_ros.policies.quiet import quiet
    from clp_ros.policies.registry import family_named

    with quiet(), empty_weights():
        policy = family_named("smolvla").build(folder, "cpu")
    return {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}


def test_the_observation_fits_the_policy_and_fills_its_tokens(tiny_policy):
    observation = random_observation(tiny_policy)
    batch = tiny_policy.batch(**observation)
    assert batch["observation.language.tokens"].shape == (1, 48)
    assert {image.shape for image in observation["images"].values()} == {(480, 640, 3)}
    again = random_observation(tiny_policy)
    assert all(np.array_equal(image, again["images"][key]) for key, image in observation["images"].items())
