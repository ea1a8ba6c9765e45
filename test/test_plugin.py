# SPDX-License-Identifier: Apache-2.0
"""The LeRobot plugin: its types load pruned checkpoints in stock lerobot, strictly, and save what they loaded."""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import warm_processes
from safetensors.torch import load_file, save_file
from torch import nn

from clp_ros.core.errors import ClpError
from clp_ros.policies.checkpoint import Checkpoint
from clp_ros.policies.family import check_lerobot
from clp_ros.policies.lerobot_policy import LeRobotPolicy
from clp_ros.policies.loading import load_policy
from clp_ros.policies.plugin import PLUGIN, register_plugin
from clp_ros.policies.quiet import quiet
from clp_ros.policies.registry import family_named
from clp_ros.pruning.surgery import prune_checkpoint

FAMILIES = ("pi0", "pi05", "groot", "groot_n1_7")
TASK = "Open the drawer."


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, family_checkpoint) -> Path:
    """A family's tiny checkpoint."""
    return family_checkpoint(request.param)


@pytest.fixture(scope="module")
def removed(made) -> dict[str, tuple[int, ...]]:
    """One run of layers a module: the first that may go."""
    sets = {}
    for module in Checkpoint.open(made).layer_stacks:
        runs = [
            range(start, start + module.pattern_period) for start in range(1, module.layers - module.pattern_period)
        ]
        sets[module.name] = tuple(next(run for run in runs if not set(run) & module.protected_layers))
    return sets


@pytest.fixture(scope="module")
def pruned(made, removed, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pruned") / "checkpoint"
    prune_checkpoint(made, folder, removed)
    return folder


@pytest.fixture(scope="module")
def observation(made) -> dict[str, np.ndarray]:
    """A picture a camera, and a state, by the policy's names."""
    rng = np.random.default_rng(0)
    features = json.loads((made / "config.json").read_text())["input_features"]
    return {
        key: rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        if feature["type"] == "VISUAL"
        else rng.uniform(-1, 1, feature["shape"]).astype(np.float32)
        for key, feature in features.items()
    }


def chunk_of(policy: LeRobotPolicy, observation: dict[str, np.ndarray]) -> np.ndarray:
    images = {key: value for key, value in observation.items() if value.ndim == 3}
    torch.manual_seed(0)  # not every policy lets its noise be given
    return policy.predict_chunk(images, observation["observation.state"], TASK)


def remove_layers(policy: LeRobotPolicy, removed: dict[str, tuple[int, ...]]) -> None:
    for module in policy.layer_stacks:
        path, _, name = module.layers_path.rpartition(".")
        stack = policy.policy.get_submodule(path)
        layers = [layer for index, layer in enumerate(getattr(stack, name)) if index not in removed[module.name]]
        for index, layer in enumerate(layers):
            for part in layer.modules():
                if hasattr(part, "layer_idx"):
                    part.layer_idx = index
        setattr(stack, name, nn.ModuleList(layers))
        if hasattr(getattr(stack, "config", None), "num_hidden_layers"):
            stack.config.num_hidden_layers = len(layers)
        if module.name == "llm":  # GR00T N1.5 takes the state after so many layers
            for part in policy.policy.modules():
                if getattr(part, "select_layer", None) == module.layers:
                    part.select_layer = len(layers)


@pytest.fixture(scope="module")
def expected(made, removed, observation) -> np.ndarray:
    """The chunk of the whole checkpoint with the layers removed in memory."""
    policy = load_policy(made, "cpu")
    before = chunk_of(policy, observation)
    remove_layers(policy, removed)
    after = chunk_of(policy, observation)
    assert not np.array_equal(before, after)
    return after


def plugin_class(folder: Path) -> type:
    from lerobot.policies.factory import get_policy_class

    register_plugin()
    return get_policy_class(json.loads((folder / "config.json").read_text())["type"])


# Loading


def test_our_loader_gives_what_removal_in_memory_gives(pruned, observation, expected):
    policy = load_policy(pruned, "cpu")
    np.testing.assert_array_equal(chunk_of(policy, observation), expected)
    for module in policy.layer_stacks:
        layers = policy.policy.get_submodule(module.layers_path)
        assert len(layers) == module.layers
        numbers = [part.layer_idx for layer in layers for part in layer.modules() if hasattr(part, "layer_idx")]
        assert numbers in ([], list(range(module.layers)))  # sampling finds its cached keys and values by them


def test_the_plugins_own_loading_gives_the_same_and_saves_what_it_loaded(pruned, observation, expected, tmp_path):
    ours = load_policy(pruned, "cpu")
    with quiet():
        ours.policy = plugin_class(pruned).from_pretrained(pruned)
        np.testing.assert_array_equal(chunk_of(ours, observation), expected)
        ours.policy.save_pretrained(tmp_path / "saved")
        ours.policy = plugin_class(pruned).from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(chunk_of(ours, observation), expected)
    before, after = load_file(pruned / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]) for key in before)
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (pruned, tmp_path / "saved"))
    assert second == first | {"device": "cpu"}


DISCOVERED = """
import sys
import numpy as np
import torch
from lerobot.utils.import_utils import register_third_party_plugins

sys.modules["lerobot_env_clp"] = None  # the other plugin, which needs clp_ros
register_third_party_plugins()
assert not [name for name in sys.modules if name.startswith("lerobot_policy_clp.modeling_")]

from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors

folder, observation, task, chunk = sys.argv[1:]
config = PreTrainedConfig.from_pretrained(folder)
config.device = "cpu"
policy = get_policy_class(config.type).from_pretrained(folder, config=config)
before, after = make_pre_post_processors(config, pretrained_path=folder)
sample = {"task": [task]}
for name, value in np.load(observation).items():
    tensor = torch.from_numpy(value)[None]
    sample[name] = tensor.permute(0, 3, 1, 2).float() / 255 if tensor.ndim == 4 else tensor
torch.manual_seed(0)
with torch.inference_mode():
    np.save(chunk, after(policy.predict_action_chunk(before(sample)))[0].float().numpy())
assert not [name for name in sys.modules if name.partition(".")[0] == "clp_ros"]
"""


def test_stock_lerobot_finds_the_plugin_by_itself(pruned, observation, expected, tmp_path):
    np.savez(tmp_path / "observation.npz", **observation)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    files = [str(pruned), str(tmp_path / "observation.npz"), TASK, str(tmp_path / "chunk.npy")]
    done = warm_processes.run(["-c", DISCOVERED, *files], env, tmp_path)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "chunk.npy"), expected)


def layer_tensors(folder: Path) -> list[str]:
    module = Checkpoint.open(folder).layer_stacks[0]
    return sorted(key for key in Checkpoint.open(folder).tensors if key.startswith(module.layer_prefix.format(layer=1)))


def drop_a_tensor(folder: Path, weights: dict[str, torch.Tensor]) -> str:
    key = next(key for key in sorted(weights) if key not in layer_tensors(folder))
    del weights[key]
    return key


def drop_a_layers_tensor(folder: Path, weights: dict[str, torch.Tensor]) -> str:
    key = layer_tensors(folder)[0]
    del weights[key]
    return key


def add_a_tensor(_: Path, weights: dict[str, torch.Tensor]) -> str:
    weights["model.more.weight"] = torch.zeros(3)
    return "model.more.weight"


def add_a_layer(folder: Path, weights: dict[str, torch.Tensor]) -> str:
    module = Checkpoint.open(folder).layer_stacks[0]
    last, another = (module.layer_prefix.format(layer=module.layers - 1 + more) for more in (0, 1))
    added = {another + key.removeprefix(last): value for key, value in weights.items() if key.startswith(last)}
    weights |= {key: value.clone() for key, value in added.items()}
    return next(iter(added))


def reshape_a_tensor(folder: Path, weights: dict[str, torch.Tensor]) -> str:
    key = next(key for key in layer_tensors(folder) if weights[key].ndim == 2)
    weights[key] = weights[key][:, :-1].contiguous()
    return key


@pytest.mark.parametrize(
    "damage",
    [drop_a_tensor, drop_a_layers_tensor, add_a_tensor, add_a_layer, reshape_a_tensor],
    ids=lambda f: f.__name__,
)
def test_weights_that_do_not_fit_are_refused(pruned, damage, tmp_path):
    folder = shutil.copytree(pruned, tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    key = damage(folder, weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError) as refused, quiet():
        plugin_class(folder).from_pretrained(folder, strict=False)  # whatever is asked for
    assert key in str(refused.value)
    with pytest.raises(ClpError):
        load_policy(folder, "cpu")


def test_no_weights_at_all_are_refused(pruned, tmp_path):
    folder = shutil.copytree(pruned, tmp_path / "damaged")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError), quiet():
        plugin_class(folder).from_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        *((kind, field) for kind in ("pi0", "pi05") for field in ("num_layers", "vision_layers", "expert_width")),
        *(
            (kind, field)
            for kind in ("groot", "groot_n1_7")
            for field in ("llm_layers", "vl_self_attention_layers", "dit_layers")
        ),
    ],
)
def test_a_policy_of_no_layers_is_refused(kind, field):
    if kind.startswith("groot"):
        try:
            check_lerobot(family_named(kind))
        except ClpError as error:
            pytest.skip(str(error))
    from lerobot.configs.policies import PreTrainedConfig

    register_plugin()
    config = PreTrainedConfig.get_choice_class(f"clp_{kind}")
    config()
    for size in (0, -1):
        with pytest.raises(ValueError, match="at least"):
            config(**{field: size})


# Finding the plugin


def test_a_missing_plugin_is_told_with_what_to_do(pruned, monkeypatch):
    monkeypatch.setitem(sys.modules, PLUGIN, None)  # as if there were none
    with pytest.raises(ClpError, match=rf"pip install \./{PLUGIN}"):
        load_policy(pruned, "cpu")


def test_the_checkouts_folder_of_the_same_name_is_not_the_plugin(tmp_path, monkeypatch):
    (tmp_path / PLUGIN).mkdir()
    for name in [name for name in sys.modules if name.partition(".")[0] == PLUGIN]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    with pytest.raises(ClpError, match="is not installed"):
        register_plugin()
    sys.modules.pop(PLUGIN)
