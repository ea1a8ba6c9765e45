# SPDX-License-Identifier: Apache-2.0
"""π0's and π0.5's facts against lerobot's real classes: their layers, hidden states, tokens that count, sizes."""

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hidden_state_tools import states_and_masks
from safetensors.torch import load_file, save_file
from torch import nn

from clp_ros.cli import main
from clp_ros.core.errors import ClpError
from clp_ros.policies.checkpoint import Checkpoint, model_names
from clp_ros.policies.features import LIBERO
from clp_ros.policies.loading import load_policy
from clp_ros.policies.plugin import register_plugin
from clp_ros.policies.quiet import quiet
from clp_ros.policies.registry import families, family_of
from clp_ros.pruning.surgery import prune_checkpoint

NAMES = ("pi0", "pi05")
LAYERS = 8
IMAGE_TOKENS = (56 // 14) ** 2
CAMERAS = tuple(LIBERO.cameras)


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def policy(name, family_checkpoint):
    return load_policy(family_checkpoint(name), "cpu")


@pytest.fixture
def sample(policy):
    rng = np.random.default_rng(1)
    return {
        "images": {key: rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for key in policy.image_features},
        "state": rng.uniform(-1, 1, policy.state_size).astype(np.float32),
        "task": "Open the drawer.",
    }


@pytest.fixture
def batch(policy, sample):
    actions = np.random.default_rng(2).standard_normal((policy.chunk_size, policy.action_size))
    return policy.batch(**sample, actions=actions)


def states_of(policy, batch, seed=0):
    return states_and_masks(policy, batch, seed)


# Checkpoints made at random


def test_a_seed_gives_the_same_bytes_and_tiny_points_only_into_itself(name, tmp_path, capsys):
    digests = []
    for seed in ("3", "3", "4"):
        arguments = ["make-checkpoint", "--family", name, "--size", "tiny", "--json", "--overwrite", "--seed", seed]
        torch.manual_seed(5)
        assert main([*arguments, "--output", str(tmp_path / "made")]) == 0
        assert torch.initial_seed() == 5
        files = [path for path in sorted((tmp_path / "made").rglob("*")) if path.is_file()]
        digests.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files})
    assert digests[0] == digests[1]
    assert {file for file in digests[0] if digests[0][file] != digests[2][file]} == {"model.safetensors"}
    assert sum(path.stat().st_size for path in files) < 20e6
    preprocessor = (tmp_path / "made" / "policy_preprocessor.json").read_text()
    assert json.dumps(str(tmp_path / "made" / "tokenizer")) in preprocessor
    assert "partial" not in "".join(path.read_text() for path in (tmp_path / "made").glob("*.json"))
    assert "google/" not in preprocessor
    # A copy of it finds its own tokenizer again.
    (tmp_path / "made").rename(tmp_path / "moved")
    moved = load_policy(tmp_path / "moved", "cpu")
    images = {key: np.zeros((8, 8, 3), dtype=np.uint8) for key in moved.image_features}
    assert np.isfinite(moved.predict_chunk(images, np.zeros(8, dtype=np.float32), "Wave.")).all()


@pytest.mark.parametrize(
    ("name", "layers", "parameters", "tied", "trainable"),
    [
        # Table 1: 3.5 B -> 2.7 B parameters, of which 3.1 B -> 2.3 B are trained.
        ("pi0", 18, 4_028_019_472, 3_501_372_176, 3_088_929_824),
        ("pi0", 12, 3_263_570_704, 2_736_923_408, 2_324_481_056),
        ("pi05", 18, 4_143_404_816, 3_616_757_520, 3_204_315_168),
        ("pi05", 12, 3_341_182_736, 2_814_535_440, 2_402_093_088),
    ],
)
def test_full_size_has_the_parameters_of_the_released_models_and_of_table_5(name, layers, parameters, tied, trainable):
    from lerobot.policies.factory import get_policy_class, make_policy_config

    from clp_ros.policies.pi0 import synthetic

    register_plugin()
    inputs, outputs = LIBERO.lerobot_features()
    depth = {} if layers == 18 else {"num_layers": layers}
    more = {"input_features": inputs, "output_features": outputs, "device": "cpu"}
    config = make_policy_config(f"clp_{name}" if depth else name, **synthetic._SIZES["full"], **depth, **more)
    config.device = "meta"
    with quiet(), torch.device("meta"):
        policy = get_policy_class(config.type)(config)
    weights = dict(policy.named_parameters())
    untied = {key: weight for key, weight in weights.items() if key not in families()[name].tied}
    assert sum(weight.numel() for weight in weights.values()) == parameters
    assert sum(weight.numel() for weight in untied.values()) == tied
    assert sum(weight.numel() for weight in untied.values() if weight.requires_grad) == trainable


# Hidden states


@contextmanager
def cut_off(towers: nn.Module, layers: int):
    """Both towers without the layers from this one on."""
    text, expert = towers.paligemma.model.language_model, towers.gemma_expert.model
    whole = text.layers, expert.layers
    try:
        text.layers, expert.layers = whole[0][:layers], whole[1][:layers]
        text.config.num_hidden_layers = expert.config.num_hidden_layers = layers
        yield
    finally:
        text.layers, expert.layers = whole
        text.config.num_hidden_layers = expert.config.num_hidden_layers = len(whole[0])


def test_hidden_states_are_those_of_shorter_towers_and_of_the_language_model_alone(policy, batch, monkeypatch):
    towers = policy.policy.model.paligemma_with_expert
    forward, calls = towers.forward, []
    monkeypatch.setattr(towers, "forward", lambda **inputs: calls.append(inputs) or forward(**inputs))
    states, masks = states_of(policy, batch)
    monkeypatch.undo()
    (inputs,) = calls
    text, expert = towers.paligemma.model.language_model, towers.gemma_expert.model
    condition = inputs["adarms_cond"][1]
    assert (condition is not None) == (policy.family.name == "pi05")
    with torch.no_grad():
        for layer in range(LAYERS):
            with cut_off(towers, layer + 1):
                (prefix, suffix), _ = towers.forward(**inputs)
            assert torch.equal(text.norm(states["vlm"][layer])[0], prefix)
            assert torch.equal(expert.norm(states["expert"][layer], condition)[0], suffix)
        # The language model never looks at the actions: its own forward over the prefix is the same computation.
        length = inputs["inputs_embeds"][0].shape[1]
        reference = text(
            inputs_embeds=inputs["inputs_embeds"][0],
            attention_mask=inputs["attention_mask"][:, :, :length, :length],
            position_ids=inputs["position_ids"][:, :length],
            use_cache=False,
            output_hidden_states=True,
        ).hidden_states
    for layer in range(LAYERS - 1):
        # A padding token looks at everything alike, so also at the actions.
        mine, own = (states["vlm"][layer][masks["vlm"]], reference[layer + 1][masks["vlm"]])
        torch.testing.assert_close(mine, own, rtol=1e-4, atol=1e-4)


def test_hidden_states_are_the_training_graphs_at_seeded_noise_and_time(policy, batch, monkeypatch):
    model = policy.policy.model
    first, masks = states_of(policy, batch)
    again, _ = states_of(policy, batch)
    other, _ = states_of(policy, batch, seed=1)
    for module in ("vlm", "expert"):
        assert all(torch.equal(x, y) for x, y in zip(first[module], again[module], strict=True))
        assert len({state.data_ptr() for state in first[module]}) == LAYERS
    # Noise and time reach the actions' stream alone.
    words = masks["vlm"]
    assert all(torch.equal(x[words], y[words]) for x, y in zip(first["vlm"], other["vlm"], strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(first["expert"], other["expert"], strict=True))
    assert not {"sample_noise", "sample_time", "embed_prefix", "embed_suffix"} & vars(model).keys()
    # The last expert state gives lerobot's loss at that noise and time.
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.standard_normal((1, 50, 32), dtype="float32"))
    time = torch.tensor([rng.beta(1.5, 1.0) * 0.999 + 0.001], dtype=torch.float32)
    monkeypatch.setattr(model, "sample_noise", lambda shape, device: noise)
    monkeypatch.setattr(model, "sample_time", lambda size, device: time)
    conditions = []
    norm = model.paligemma_with_expert.gemma_expert.model.norm
    hook = norm.register_forward_pre_hook(
        lambda _, args, kwargs: conditions.append(kwargs.get("cond")), with_kwargs=True
    )
    with torch.no_grad():
        loss, _ = policy.policy.forward(batch)
        hook.remove()
        velocity = model.action_out_proj(norm(first["expert"][-1], conditions[0])[0][:, -50:])
        target = noise - torch.nn.functional.pad(batch["action"], (0, 25))
    torch.testing.assert_close(((target - velocity)[..., :7] ** 2).mean(), loss)


def test_times_are_spread_as_lerobots(policy, batch, monkeypatch):
    class SeenError(Exception):
        pass

    model, times = policy.policy.model, []

    def noted(self, *args):
        times.append(args[-1])
        raise SeenError

    monkeypatch.setattr(type(model), "embed_suffix", noted)
    wide = {key: value.repeat(256, *[1] * (value.ndim - 1)) for key, value in batch.items() if torch.is_tensor(value)}
    with pytest.raises(SeenError):
        policy.family.forward(policy.policy, wide, np.random.default_rng(0))
    (ours,), lerobots = times, model.sample_time(4096, torch.device("cpu"))
    levels = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    torch.testing.assert_close(ours.quantile(levels), lerobots.quantile(levels), rtol=0, atol=0.08)


def test_padding_absent_cameras_and_padded_actions_do_not_count(policy, batch):
    batch["action_is_pad"] = torch.arange(50)[None] >= 30
    del batch[CAMERAS[0]]  # lerobot puts absent cameras last
    _, masks = states_of(policy, batch)
    words = batch["observation.language.attention_mask"][0].bool()
    assert 0 < words.sum() < len(words)
    seen, absent = torch.ones(IMAGE_TOKENS, dtype=torch.bool), torch.zeros(IMAGE_TOKENS, dtype=torch.bool)
    assert torch.equal(masks["vlm"][0], torch.cat([seen, absent, words]))
    state = torch.ones(1 if policy.family.name == "pi0" else 0, dtype=torch.bool)
    assert torch.equal(masks["expert"][0], torch.cat([state, torch.arange(50) < 30]))


def test_what_does_not_count_changes_nothing_that_does(policy, batch):
    del batch[CAMERAS[0]]
    before, masks = states_of(policy, batch)
    words = batch["observation.language.attention_mask"]
    batch["observation.language.tokens"][~words.bool()] = 7
    after, _ = states_of(policy, batch)
    for module in ("vlm", "expert"):
        for x, y in zip(before[module], after[module], strict=True):
            torch.testing.assert_close(x[masks[module]], y[masks[module]], rtol=1e-5, atol=1e-5)
    assert not torch.equal(before["vlm"][0], after["vlm"][0])


def test_the_last_vlm_layer_reaches_nothing(policy, batch):
    policy.policy.zero_grad()
    loss, _ = policy.policy.forward(batch)
    loss.backward()
    for module in policy.layer_stacks:
        layers = policy.policy.get_submodule(module.layers_path)
        assert module.last_output_unused == (layers[-1].mlp.down_proj.weight.grad is None)
        assert layers[-2].mlp.down_proj.weight.grad is not None
    policy.policy.zero_grad()


# Calibrating, pruning, running


def test_a_bag_becomes_a_pruned_policy(name, recording, tmp_path, capsys):
    made, calibrated, pruned = tmp_path / "made", tmp_path / "calibrated", tmp_path / "pruned"
    make = ["make-checkpoint", "--family", name, "--size", "tiny", "--embodiment", "aloha_bimanual", "--json"]
    assert main([*make, "--output", str(made)]) == 0
    robot = ["--embodiment", "aloha_bimanual", "--task", "transfer_cube", "--samples", "2", "--device", "cpu", "--json"]
    files = ["--checkpoint", str(made), "--bag", str(recording), "--output", str(calibrated)]
    assert main(["calibrate", *files, *robot]) == 0
    capsys.readouterr()
    assert main(["prune", "--checkpoint", str(made), "--calibration", str(calibrated), "--output", str(pruned)]) == 0
    assert main(["verify", str(pruned)]) == 0
    config = json.loads((pruned / "config.json").read_text())
    assert (config["type"], config["num_layers"]) == (f"clp_{name}", LAYERS - 2)
    scores = json.loads((calibrated / "calibration.json").read_text())["modules"]
    assert set(scores) == {"vlm", "expert"} if isinstance(scores, dict) else {m["name"] for m in scores}


# Weights as they were published: named as in the model that lerobot wraps, the two tied matrices stored once

HEAD = "paligemma_with_expert.paligemma.lm_head.weight"
EMBEDDING = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"


def rewrite(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    shutil.copytree(source, folder)
    save_file(change(load_file(source / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load_with_the_plugin(folder: Path) -> nn.Module:
    from lerobot.policies.factory import get_policy_class

    register_plugin()
    with quiet():
        return get_policy_class(json.loads((folder / "config.json").read_text())["type"]).from_pretrained(folder)


@pytest.mark.parametrize("without", [EMBEDDING, HEAD])
def test_published_weights_load_and_prune(name, policy, sample, family_checkpoint, without, tmp_path):
    def publish(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert torch.equal(weights[f"model.{HEAD}"], weights[f"model.{EMBEDDING}"])
        return {
            key: value for key, value in ((k.removeprefix("model."), v) for k, v in weights.items()) if key != without
        }

    noise = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(0))
    made = family_checkpoint(name)
    published = rewrite(made, tmp_path / "published", publish)
    whole = load_policy(published, "cpu")
    np.testing.assert_array_equal(
        whole.predict_chunk(**sample, noise=noise), policy.predict_chunk(**sample, noise=noise)
    )
    prune_checkpoint(published, tmp_path / "pruned", {"vlm": (1, 4)})
    prune_checkpoint(made, tmp_path / "expected", {"vlm": (1, 4)})
    expected = load_policy(tmp_path / "expected", "cpu").predict_chunk(**sample, noise=noise)
    pruned = load_policy(tmp_path / "pruned", "cpu")
    np.testing.assert_array_equal(pruned.predict_chunk(**sample, noise=noise), expected)
    pruned.policy = load_with_the_plugin(tmp_path / "pruned")
    np.testing.assert_array_equal(pruned.predict_chunk(**sample, noise=noise), expected)


def test_weights_as_lerobot_0_4_tied_them_load_and_prune(name, policy, sample, family_checkpoint, tmp_path, capsys):
    """The two matrices were one: safetensors stored the first of their names, and noted the other."""
    tied = {f"model.{EMBEDDING}": f"model.{HEAD}"}
    folder = shutil.copytree(family_checkpoint(name), tmp_path / "tied")
    weights = load_file(folder / "model.safetensors")
    del weights[f"model.{EMBEDDING}"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"} | tied)
    noise = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(0))
    expected = policy.predict_chunk(**sample, noise=noise)
    whole = load_policy(folder, "cpu")
    np.testing.assert_array_equal(whole.predict_chunk(**sample, noise=noise), expected)
    whole.policy = load_with_the_plugin(folder)
    np.testing.assert_array_equal(whole.predict_chunk(**sample, noise=noise), expected)
    output = tmp_path / "pruned"
    prune = ["prune", "--checkpoint", str(folder), "--remove", "vlm=1,4", "--output", str(output), "--json"]
    assert main(prune) == 0
    assert json.loads(capsys.readouterr().out)["unchecked"] is None
    assert main(["verify", str(output)]) == 0
    prune_checkpoint(family_checkpoint(name), tmp_path / "expected", {"vlm": (1, 4)})
    expected = load_policy(tmp_path / "expected", "cpu").predict_chunk(**sample, noise=noise)
    pruned = load_policy(output, "cpu")
    np.testing.assert_array_equal(pruned.predict_chunk(**sample, noise=noise), expected)


def test_an_embedding_that_lies_before_the_head_in_the_file_is_not_replaced_by_it(name, family_checkpoint, tmp_path):
    """They differ after a fine-tuning; lerobot's own loading depends on their order."""
    folder = shutil.copytree(family_checkpoint(name), tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    weights[f"model.{HEAD}"] = weights[f"model.{HEAD}"] + 1
    # Wider elements are stored first: the head, in half precision, now comes last.
    weights[f"model.{HEAD}"] = weights[f"model.{HEAD}"].bfloat16()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for loaded in (load_policy(folder, "cpu").policy, load_with_the_plugin(folder)):
        state = loaded.state_dict()
        assert torch.equal(state[f"model.{EMBEDDING}"], weights[f"model.{EMBEDDING}"])
        assert torch.equal(state[f"model.{HEAD}"], weights[f"model.{HEAD}"].float())


def test_names_without_a_prefix_are_read_as_lerobot_reads_them(name, policy):
    weights = dict.fromkeys(policy.policy.state_dict(), torch.zeros(()))
    stored = {key.removeprefix("model."): value for key, value in weights.items()}
    expert = "paligemma_with_expert.gemma_expert.model."
    for more in (
        *(f"{time}mlp_{side}.{part}" for time in ("time_", "action_time_") for side in ("in", "out") for part in "wb"),
        *("state_proj.weight", "state_proj.bias", expert + "norm.weight"),
        *(f"{expert}layers.3.{norm}_layernorm.weight" for norm in ("input", "post_attention")),
    ):
        stored[more] = torch.zeros(())
    with quiet():
        fixed = policy.policy._fix_pytorch_state_dict_keys(stored, policy.policy.config)
    expected = {key if key.startswith("model.") else f"model.{key}" for key in fixed}
    assert model_names(policy.family, stored).keys() == expected


def test_the_head_alone_may_stand_for_both_of_the_tied_matrices(name, family_checkpoint, tmp_path):
    def damage(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value for name, value in weights.items() if name != f"model.{HEAD}"}

    folder = rewrite(family_checkpoint(name), tmp_path / "damaged", damage)
    with pytest.raises(ClpError, match=HEAD):
        load_policy(folder, "cpu")
    with pytest.raises(RuntimeError, match=HEAD):
        load_with_the_plugin(folder)


def test_weights_from_before_lerobot_0_4_are_refused_by_their_names(name, family_checkpoint, tmp_path):
    """transformers has since put its `model.` between PaliGemma and the towers."""

    def rename(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        old = {"paligemma.model.language_model.": "paligemma.language_model.model.", "paligemma.model.": "paligemma."}
        for now, before in old.items():
            weights = {key.replace(now, before): value for key, value in weights.items()}
        return weights

    folder = rewrite(family_checkpoint(name), tmp_path / "old", rename)
    with pytest.raises(ClpError, match=rf"names of lerobot before 0\.4.*start from lerobot/{name}_base") as caught:
        Checkpoint.open(folder)
    assert caught.value.where == str(folder)


def test_what_would_not_load_is_not_written(name, family_checkpoint, tmp_path, capsys):
    """Nothing but the tensors of the layers is known without lerobot's model."""

    def damage(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: value for key, value in weights.items() if key != "model.action_out_proj.bias"}

    folder = rewrite(family_checkpoint(name), tmp_path / "damaged", damage)
    output = tmp_path / "pruned"
    assert main(["prune", "--checkpoint", str(folder), "--remove", "vlm=1,4", "--output", str(output)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the result would not load" in line
    assert "action_out_proj.bias" in line
    assert not output.exists()


def test_empty_cameras_are_not_the_robots(name, family_checkpoint, sample, tmp_path):
    folder = shutil.copytree(family_checkpoint(name), tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"empty_cameras": 1}))
    policy = load_policy(folder, "cpu")
    assert policy.image_features == CAMERAS
    assert np.isfinite(policy.predict_chunk(**sample)).all()
    _, masks = states_of(policy, policy.batch(**sample, actions=np.zeros((50, 7))))
    assert masks["vlm"][0, : 3 * IMAGE_TOKENS].tolist() == [True] * 2 * IMAGE_TOKENS + [False] * IMAGE_TOKENS


# The config


@pytest.mark.parametrize("name", NAMES)
def test_configs_of_lerobot_and_of_the_plugin_are_recognised(name):
    for config in ({"type": name}, {"type": f"clp_{name}", "num_layers": 12}):
        family = family_of(config, "config.json")
        assert family.name == name
        assert {module.layers for module in family.layer_stacks(config)} == {config.get("num_layers", 18)}
        assert {module.pattern_period for module in family.layer_stacks(config)} == {1}
        assert [module.last_output_unused for module in family.layer_stacks(config)] == [True, False]
    for other in ({"type": f"{name}_fast"}, {"type": None}, {"type": [name]}, {}):
        assert not families()[name].recognises(other)


@pytest.mark.parametrize("layers", [0, -1, 2.5, True, "18", None])
def test_depths_that_are_none_are_refused(layers):
    with pytest.raises(ClpError, match="num_layers"):
        families()["pi0"].layer_stacks({"type": "clp_pi0", "num_layers": layers})


def test_a_pruned_config_gets_the_plugins_type_and_a_whole_one_keeps_its_own():
    family = families()["pi0"]
    config = {"type": "pi0", "chunk_size": 50}
    pruned = family.with_depths(config, {"vlm": 12, "expert": 12})
    assert pruned == {"type": "clp_pi0", "chunk_size": 50, "num_layers": 12}
    assert family.with_depths(config, {"vlm": 18, "expert": 18}) == config == {"type": "pi0", "chunk_size": 50}
    assert family.with_depths(pruned, {"vlm": 10, "expert": 10})["num_layers"] == 10
    with pytest.raises(ValueError, match="equally deep"):
        family.with_depths(config, {"vlm": 12, "expert": 11})


@pytest.mark.parametrize("name", NAMES)
def test_default_budget_is_the_papers_share(name):
    assert families()[name].default_budget({"type": name}) == {"vlm+expert": 6}


def test_removal_of_one_tower_takes_the_other_along(name, family_checkpoint, tmp_path):
    prune_checkpoint(family_checkpoint(name), tmp_path / "pruned", {"expert": (3, 1)})
    assert Checkpoint.open(tmp_path / "pruned").layers == {"vlm": LAYERS - 2, "expert": LAYERS - 2}
    assert (tmp_path / "pruned" / "tokenizer" / "tokenizer.json").is_file()
    pointed = json.loads((tmp_path / "pruned" / "policy_preprocessor.json").read_text())["steps"]
    names = [step["config"]["tokenizer_name"] for step in pointed if step["registry_name"] == "tokenizer_processor"]
    assert names == [str(Path(tmp_path / "pruned" / "tokenizer"))]
