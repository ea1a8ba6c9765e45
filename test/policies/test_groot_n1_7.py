# SPDX-License-Identifier: Apache-2.0
"""GR00T N1.7's facts against lerobot's real classes: its layers, its roles, both layouts, strict loading, no hub."""

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_tools import remove_in_memory, run_without_network
from hidden_state_tools import plugin_policy, random_sample, states_and_masks
from safetensors.torch import load_file, save_file

from clp_ros.calibration.calibrate import calibrate_bags
from clp_ros.cli import main
from clp_ros.core.errors import ClpError
from clp_ros.evaluation.verify import verify
from clp_ros.jobs.prune import plan_from_calibration
from clp_ros.policies.checkpoint import Checkpoint
from clp_ros.policies.family import check_lerobot
from clp_ros.policies.lerobot_policy import LeRobotPolicy
from clp_ros.policies.loading import load_policy
from clp_ros.policies.quiet import quiet
from clp_ros.policies.registry import families, family_named
from clp_ros.pruning.surgery import plan_surgery, prune_checkpoint
from clp_ros.robots.embodiment import load_embodiment

ROOT = Path(__file__).resolve().parents[2]
REMOVAL = {"llm": (2, 4), "vl_self_attention": (1,), "dit": (1, 2, 3, 4)}

FAMILY = family_named("groot_n1_7")
try:
    check_lerobot(FAMILY)
except ClpError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def checkpoint(family_checkpoint: Callable[..., Path], one_thread: None) -> Path:
    return family_checkpoint("groot_n1_7", "aloha_bimanual")


@pytest.fixture(scope="module")
def policy(checkpoint: Path) -> LeRobotPolicy:
    return load_policy(checkpoint, "cpu")


@pytest.fixture(scope="module")
def nvidia(checkpoint: Path, policy: LeRobotPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as NVIDIA lays them out: transformers' save_pretrained of the model that lerobot wraps."""
    folder = tmp_path_factory.mktemp("nvidia") / "GR00T-N1.7-tiny"
    model = copy.deepcopy(policy.policy._groot_model)
    model.config.model_name = str(folder / "backbone")
    model.backbone.model.config.save_pretrained(folder / "backbone")
    with quiet():
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sample(policy: LeRobotPolicy) -> dict[str, Any]:
    return random_sample(policy)


@pytest.fixture(scope="module")
def batch(policy: LeRobotPolicy, sample: dict[str, Any]) -> dict[str, Any]:
    actions = np.random.default_rng(2).uniform(-1, 1, (policy.chunk_size, policy.action_size))
    return policy.batch(**sample, actions=actions)


def noise() -> torch.Tensor:
    return torch.randn(1, 16, 132, generator=torch.Generator().manual_seed(0))


# Removing layers


def test_a_pruned_checkpoint_is_the_model_without_the_layers(checkpoint, policy, sample, tmp_path):
    from lerobot.policies.factory import make_pre_post_processors

    prune_checkpoint(checkpoint, tmp_path / "pruned", REMOVAL)
    shutil.move(tmp_path / "pruned", tmp_path / "elsewhere")
    pruned = load_policy(tmp_path / "elsewhere", "cpu")
    expected = LeRobotPolicy(
        policy.checkpoint,
        remove_in_memory(policy.policy, policy.layer_stacks, REMOVAL),
        policy.preprocessor,
        policy.postprocessor,
        "cpu",
    ).predict_chunk(**sample, noise=noise())
    assert expected.shape == (16, 14)
    np.testing.assert_array_equal(pruned.predict_chunk(**sample, noise=noise()), expected)
    assert not np.array_equal(policy.predict_chunk(**sample, noise=noise()), expected)

    stock = plugin_policy(tmp_path / "elsewhere")
    config = json.loads((tmp_path / "elsewhere" / "config.json").read_text())
    assert (config["llm_layers"], config["vl_self_attention_layers"], config["dit_layers"]) == (4, 3, 4)
    # lerobot reads the processors' paths as they are written: they lead to where surgery wrote them.
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "pruned")
    with quiet():
        before, after = make_pre_post_processors(stock.config, pretrained_path=str(tmp_path / "pruned"))
    images = {key: torch.from_numpy(image).permute(2, 0, 1) / 255 for key, image in sample["images"].items()}
    batch = before({**images, "observation.state": torch.from_numpy(sample["state"]), "task": sample["task"]})
    with torch.inference_mode():
        chunk = after(stock.predict_action_chunk(batch, noise=noise()))
    np.testing.assert_array_equal(chunk[0].numpy(), expected)


def test_the_plugin_saves_what_it_loaded(checkpoint, tmp_path):
    prune_checkpoint(checkpoint, tmp_path / "pruned", REMOVAL)
    loaded = plugin_policy(tmp_path / "pruned")
    loaded.save_pretrained(tmp_path / "saved")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = plugin_policy(tmp_path / "saved")
    assert again.config == loaded.config
    # The plugin's config says all: nothing of the checkpoint it came from is needed to build the model.
    assert Checkpoint.open(tmp_path / "saved").layers == {"llm": 4, "vl_self_attention": 3, "dit": 4}


def roles(policy: Any, batch: Mapping[str, Any]) -> list[str]:
    """What each block of the diffusion transformer attends to, by the masks that it is called with."""
    dit, found = policy._groot_model.action_head.model, []
    image = batch["input_ids"] == policy._groot_model.backbone.model.config.image_token_id

    def look(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        mask = inputs["encoder_attention_mask"]
        if inputs["encoder_hidden_states"] is None:
            found.append("actions")
        else:
            found.append("image" if torch.equal(mask, image) else "text" if torch.equal(mask, ~image) else "?")

    handles = [block.register_forward_pre_hook(look, with_kwargs=True) for block in dit.transformer_blocks]
    try:
        with torch.inference_mode():
            policy.predict_action_chunk(batch, noise=noise())
    finally:
        for handle in handles:
            handle.remove()
    return found[: len(dit.transformer_blocks)]


def test_the_period_keeps_every_blocks_role_and_shapes_alone_do_not(policy, batch, checkpoint):
    whole = roles(policy.policy, batch)
    assert whole == ["text", "actions", "image", "actions"] * 2
    dit = policy.policy._groot_model.action_head.model.transformer_blocks
    shapes = [tuple(block.attn1.to_k.weight.shape) for block in dit]
    source, silent = Checkpoint.open(checkpoint), 0
    for size in range(1, 6):
        for removed in combinations(range(8), size):
            kept = [layer for layer in range(8) if layer not in removed]
            alike = all(whole[layer] == whole[place] for place, layer in enumerate(kept))
            try:
                plan_surgery(source, {"dit": removed})
            except ClpError:
                # Shapes that fit, roles that do not: lerobot would load these and say nothing.
                silent += not alike and all(shapes[layer] == shapes[place] for place, layer in enumerate(kept))
            else:
                assert alike
    assert silent
    # The rule by the model itself, for one of each.
    for removed in ((4, 5, 6, 7), (1, 2, 3, 4), (2, 3), (1, 2, 4, 5)):
        shorter = remove_in_memory(policy.policy, policy.layer_stacks, {"dit": removed})
        before = [role for layer, role in enumerate(whole) if layer not in removed]
        assert (roles(shorter, batch) == before) == (removed != (2, 3))


@pytest.mark.parametrize("removed", [(2, 3), (1,), (4, 5), (1, 2, 4, 5), (6, 7, 1)])
def test_a_set_that_swaps_text_and_image_is_refused_with_those_that_do_not(checkpoint, removed, tmp_path):
    with pytest.raises(ClpError, match=r"module dit: .* its 4 kinds of layers") as caught:
        prune_checkpoint(checkpoint, tmp_path / "pruned", {"dit": removed})
    assert not (tmp_path / "pruned").exists()
    for allowed in caught.value.hint.removeprefix("remove ").split(" or "):
        plan_surgery(Checkpoint.open(checkpoint), {"dit": tuple(map(int, allowed.split(",")))})


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_that_image_features_are_added_behind_stays(checkpoint, layer):
    with pytest.raises(ClpError, match=f"module llm: layers {layer} cannot be removed"):
        plan_surgery(Checkpoint.open(checkpoint), {"llm": (layer,)})


def test_image_features_are_added_by_place_so_that_without_a_layer_they_reach_others(policy, batch):
    """Why those layers stay. Behind the last layer that is left they would reach nothing."""

    def added(policy: Any) -> list[bool]:
        llm, given, taken = policy._groot_model.backbone.model.model.language_model, {}, {}
        handles = []
        for place, layer in enumerate(llm.layers):

            def gives(_: Any, __: Any, output: torch.Tensor, place: int = place) -> None:
                given[place] = output.clone()

            def takes(_: Any, inputs: tuple[torch.Tensor, ...], place: int = place) -> None:
                taken[place] = inputs[0].clone()

            handles += [layer.register_forward_hook(gives), layer.register_forward_pre_hook(takes)]
        with torch.inference_mode():
            policy.predict_action_chunk(batch, noise=noise())
        for handle in handles:
            handle.remove()
        return [not torch.equal(given[place], taken[place + 1]) for place in range(len(llm.layers) - 1)]

    assert added(policy.policy) == [True, True, False, False, False]
    assert added(remove_in_memory(policy.policy, policy.layer_stacks, {"llm": (1,)})) == [True, True, False, False]


def test_image_features_may_not_be_left_without_a_layer_behind_them(checkpoint, tmp_path):
    with pytest.raises(ClpError, match="leave at least 3"):
        prune_checkpoint(checkpoint, tmp_path / "pruned", {"llm": (2, 3, 4, 5)})
    assert not (tmp_path / "pruned").exists()
    prune_checkpoint(checkpoint, tmp_path / "pruned", {"llm": (2, 3, 4)})
    # Nor again, of one that is as short as can be.
    with pytest.raises(ClpError, match="leave at least 3"):
        prune_checkpoint(tmp_path / "pruned", tmp_path / "again", {"llm": (2,)})


# Hidden states


def test_hidden_states_are_what_lerobots_and_transformers_models_report(policy, batch, monkeypatch):
    model = policy.policy._groot_model
    qwen, dit, attention = model.backbone.model, model.action_head.model, model.action_head.vl_self_attention
    seen: dict[str, Any] = {}

    def watch(module: torch.nn.Module, name: str) -> None:
        forward = module.forward

        def watched(*inputs: Any, **named: Any) -> Any:
            seen[name] = (inputs, named, forward(*inputs, **named))
            return seen[name][-1]

        monkeypatch.setattr(module, "forward", watched)

    for name, module in {"llm": qwen, "dit": dit, "vl_self_attention": attention, "images": qwen.model.visual}.items():
        watch(module, name)
    states, masks = states_and_masks(policy, batch, 0)
    monkeypatch.undo()
    again, _ = states_and_masks(policy, batch, 0)
    other, _ = states_and_masks(policy, batch, 1)
    for name, layers in states.items():
        assert all(torch.equal(x, y) for x, y in zip(layers, again[name], strict=True))
        # Noise and time reach the actions alone.
        assert all(torch.equal(x, y) == (name != "dit") for x, y in zip(layers, other[name], strict=True))

    # transformers reports a layer's own output; the next layer takes it with the image features added.
    hidden, features = seen["llm"][-1].hidden_states, seen["images"][-1].deepstack_features
    image = batch["input_ids"] == qwen.config.image_token_id
    for layer in range(5):
        expected = hidden[layer + 1].clone()
        if layer < 2:
            expected[image] += features[layer]
        assert torch.equal(states["llm"][layer], expected)
    with torch.no_grad():
        assert torch.equal(qwen.model.language_model.norm(states["llm"][5]), hidden[6])
        # The action head takes the last layer's output as it is, not after the final norm.
        (projected,), _, _ = seen["vl_self_attention"]
        assert torch.equal(projected, model.action_head.vlln(states["llm"][5]))
        _, reported = attention(projected, return_all_hidden_states=True)
    assert all(torch.equal(x, y) for x, y in zip(states["vl_self_attention"], reported[1:], strict=True))
    _, inputs, (_, blocks) = seen["dit"]
    assert all(torch.equal(x, y) for x, y in zip(states["dit"], blocks[1:], strict=True))
    assert torch.equal(inputs["encoder_hidden_states"], states["vl_self_attention"][-1])

    # Noise and time are those of the generator: the diffusion transformer's input, made again by hand.
    rng = np.random.default_rng(0)
    drawn = torch.from_numpy(rng.standard_normal((1, 16, 132), dtype="float32"))
    time = np.float32((1 - rng.beta(1.5, 1.0, 1)) * 0.999)[0]
    head, embodiment = model.action_head, batch["embodiment_id"]
    with torch.no_grad():
        noisy = (1 - time) * drawn + time * batch["action"]
        actions = head.action_encoder(noisy, torch.tensor([int(time * 1000)]), embodiment)
        actions = actions + head.position_embedding(torch.arange(16))
        made = torch.cat((head.state_encoder(batch["state"], embodiment), actions), dim=1)
    torch.testing.assert_close(made, blocks[0])

    for name, tokens in (("llm", batch["input_ids"].shape[1]), ("vl_self_attention", hidden[0].shape[1]), ("dit", 17)):
        assert masks[name].shape == (1, tokens)
        assert masks[name].all()


def test_padding_takes_no_part(policy, sample):
    actions = np.ones((16, 14))
    padded = np.arange(16) >= 11
    states, masks = states_and_masks(policy, policy.batch(**sample, actions=actions, action_is_pad=padded))
    assert masks["dit"].tolist() == [[True] * 12 + [False] * 5]  # the state first
    # What stands in the padding reaches nothing: lerobot trains with zeros there.
    actions[padded] = 0.3
    others, _ = states_and_masks(policy, policy.batch(**sample, actions=actions, action_is_pad=padded))
    assert all(torch.equal(x, y) for x, y in zip(states["dit"], others["dit"], strict=True))
    # Instructions of two lengths, batched: the shorter one is padded on the left, and told.
    image = torch.zeros(2, 3, 48, 64)
    batch = policy.preprocessor(
        dict.fromkeys(policy.image_features, image)
        | {"observation.state": torch.zeros(2, 14), "action": torch.zeros(2, 16, 14), "task": ["Fold.", "Fold it now."]}
    )
    _, masks = states_and_masks(policy, batch, 0)
    short, long = masks["llm"]
    assert long.all()
    assert not short[:7].any()
    assert short[7:].all()


def test_calibrates_on_the_recorded_demonstration(checkpoint, policy, recording, tmp_path):
    robot = load_embodiment("aloha_bimanual")
    calibration = calibrate_bags(policy, [recording], robot, "Fold the shorts.", samples=3)
    calibration.save(tmp_path)
    assert {name: matrix.shape for name, matrix in calibration.matrices.items()} == {
        "llm": (6, 6),
        "vl_self_attention": (4, 4),
        "dit": (8, 8),
    }
    assert calibration.meta["tokens"]["llm"] == calibration.meta["tokens"]["vl_self_attention"] > 3 * 12
    assert calibration.meta["tokens"]["dit"] == 3 * 17
    # The paper's shares; the first two layers of llm stay, the blocks of dit go by fours.
    removal = plan_from_calibration(checkpoint, tmp_path).removal
    assert {name: len(layers) for name, layers in removal.items()} == {"llm": 3, "vl_self_attention": 1, "dit": 4}
    assert not {0, 1} & set(removal["llm"])


# Processors


def test_actions_that_count_from_the_state_are_decoded_with_the_state_seen(checkpoint, policy, sample, tmp_path):
    """NVIDIA's checkpoints for some robots have such actions; lerobot joins the two processors for them."""
    folder = shutil.copytree(checkpoint, tmp_path / "relative")
    group = {"min": [-1.0] * 14, "max": [1.0] * 14, "mean": [0.0] * 14}
    settings = {
        "raw_stats": {"state": {"joints": group}, "action": {"joints": group}, "relative_action": {"joints": group}},
        "modality_config": {
            "state": {"modality_keys": ["joints"]},
            "action": {
                "modality_keys": ["joints"],
                "action_configs": [{"rep": "relative", "type": "non_eef", "format": "default"}],
            },
        },
    }
    before = json.loads((folder / "policy_preprocessor.json").read_text())
    for step in before["steps"]:
        if step["registry_name"] == "groot_n1_7_pack_inputs_v1":
            step["config"] |= settings
    (folder / "policy_preprocessor.json").write_text(json.dumps(before))
    after = json.loads((folder / "policy_postprocessor.json").read_text())
    decode = {"env_action_dim": 14, "use_percentiles": False, "use_relative_action": True, **settings}
    after["steps"][0] = {"registry_name": "groot_n1_7_action_decode_v1", "config": decode}
    (folder / "policy_postprocessor.json").write_text(json.dumps(after))
    with torch.inference_mode():
        steps = policy.policy.predict_action_chunk(policy.batch(**sample), noise=noise())[0].numpy()
    np.testing.assert_allclose(
        load_policy(folder, "cpu").predict_chunk(**sample, noise=noise()),
        steps.clip(-1, 1) + sample["state"],
        rtol=0,
        atol=1e-5,
    )


def test_a_checkpoint_without_its_tokenizer_is_refused_when_it_is_loaded(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "bare")
    (folder / "vlm_processor" / "tokenizer.json").unlink()
    with pytest.raises(ClpError, match="the processors do not load"):
        load_policy(folder, "cpu")


# Strictness


def _drop(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def _add(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name + "_too"] = torch.zeros(2)


def _reshape(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name][:-1].clone()


@pytest.mark.parametrize("damage", [_drop, _add, _reshape])
@pytest.mark.parametrize(
    "name", ["action_head.vlln.weight", "backbone.model.model.visual.pos_embed.weight", "backbone.model.lm_head.weight"]
)
def test_no_tensor_may_be_missing_extra_or_misshaped(
    checkpoint: Path, tmp_path: Path, name: str, damage: Callable[[dict[str, torch.Tensor], str], None]
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    damage(tensors, "_groot_model." + name)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ClpError, match="tensor"):
        load_policy(folder, "cpu")
    with pytest.raises(RuntimeError, match="_groot_model"):
        plugin_policy(folder)


def test_a_depth_that_the_weights_do_not_have_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "changed")
    for field, layers in {"llm_layers": 5, "vl_self_attention_layers": 3, "dit_layers": 12}.items():
        document = json.loads((checkpoint / "config.json").read_text()) | {field: layers}
        (folder / "config.json").write_text(json.dumps(document))
        with pytest.raises(ClpError, match="layer"):
            load_policy(folder, "cpu")
        with pytest.raises(RuntimeError, match=r"blocks|layers"):
            plugin_policy(folder)


def test_a_folder_without_weights_is_not_taken_for_nvidias_base_model(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "empty", ignore=shutil.ignore_patterns("model.safetensors"))
    with pytest.raises(FileNotFoundError):
        plugin_policy(folder)


def test_no_code_comes_with_a_checkpoint(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "foreign")
    tokenizer = folder / "vlm_processor" / "tokenizer_config.json"
    safe = json.loads(tokenizer.read_text())
    tokenizer.write_text(json.dumps(safe | {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}))
    (folder / "vlm_processor" / "code.py").write_text("raise SystemExit('run')")
    with pytest.raises(ClpError, match="would run the code named in this file"):
        load_policy(folder, "cpu")
    tokenizer.write_text(json.dumps(safe))
    preprocessor = json.loads((folder / "policy_preprocessor.json").read_text())
    for step in preprocessor["steps"]:
        if "model_name" in step["config"]:
            step["config"]["model_name"] = "someone/their-tokenizer"
    (folder / "policy_preprocessor.json").write_text(json.dumps(preprocessor))
    with pytest.raises(ClpError, match="run code of the Hub repository someone/their-tokenizer"):
        load_policy(folder, "cpu")


# Layouts


def test_configs_are_told_apart():
    from lerobot.policies.groot.configuration_groot import GrootConfig

    n1_7 = {"type": "groot", **{name: getattr(GrootConfig(), name) for name in ("tokenizer_assets_repo", "tune_vlln")}}
    n1_5 = {"type": "groot", "tokenizer_assets_repo": "lerobot/eagle2hg-processor-groot-n1p5", "max_state_dim": 64}
    nvidia_n1_5 = {"model_type": "gr00t_n1_5", "architectures": ["GR00T_N1_5"], "backbone_cfg": {"eagle_path": "x"}}
    nvidia_n1_7 = {"model_type": "Gr00tN1d7", "architectures": ["Gr00tN1d7"], "model_name": "nvidia/Cosmos-Reason2-2B"}
    for config in (n1_7, nvidia_n1_7, {"type": "clp_groot_n1_7"}):
        assert [name for name, family in families().items() if family.recognises(config)] == ["groot_n1_7"]
    for config in (n1_5, nvidia_n1_5, {"type": "clp_groot"}, {"type": "smolvla"}, {}):
        assert not FAMILY.recognises(config)


def test_published_depths_are_lerobots():
    from lerobot.policies.groot.groot_n1_7 import GR00T_N1_7_DEFAULTS, _cosmos_reason2_qwen3_vl_config

    llm, attention, dit = FAMILY.layer_stacks({"type": "groot", "tune_vlln": True})
    assert llm.layers == GR00T_N1_7_DEFAULTS["select_layer"] == 16
    assert attention.layers == GR00T_N1_7_DEFAULTS["vl_self_attention_cfg"]["num_layers"] == 4
    assert dit.layers == GR00T_N1_7_DEFAULTS["diffusion_model_cfg"]["num_layers"] == 32
    assert dit.pattern_period == 2 * GR00T_N1_7_DEFAULTS["attend_text_every_n_blocks"] == 4
    assert (
        len(llm.protected_layers) == len(_cosmos_reason2_qwen3_vl_config().vision_config.deepstack_visual_indexes) == 3
    )
    assert FAMILY.default_budget({"type": "groot", "tune_vlln": True}) == {"llm": 9, "vl_self_attention": 1, "dit": 16}


def stock_config(policy: LeRobotPolicy, base_model: Path) -> Any:
    from dataclasses import fields

    from lerobot.policies.groot.configuration_groot import GrootConfig

    same = {field.name: getattr(policy.policy.config, field.name) for field in fields(GrootConfig)}
    return GrootConfig(**same | {"base_model_path": str(base_model)})


def test_nvidias_layout_prunes_and_lerobot_takes_it_as_a_base_model(nvidia, policy, batch, tmp_path):
    from lerobot.policies.groot.modeling_groot import GrootPolicy

    source = Checkpoint.open(nvidia)
    assert source.layers == {"llm": 6, "vl_self_attention": 4, "dit": 8}
    assert [module.protected_layers for module in source.layer_stacks] == [{0, 1}, set(), set()]
    prune_checkpoint(nvidia, tmp_path / "pruned", REMOVAL)
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert config["select_layer"] == 4
    assert config["vl_self_attention_cfg"]["num_layers"] == 3
    assert config["diffusion_model_cfg"]["num_layers"] == 4
    with quiet():
        # Copied, since weights mapped from a file lie elsewhere in memory, and the last bits depend on that.
        fresh = copy.deepcopy(GrootPolicy(stock_config(policy, tmp_path / "pruned"))).eval()
    shorter = remove_in_memory(policy.policy, policy.layer_stacks, REMOVAL)
    with torch.inference_mode():
        torch.manual_seed(0)
        expected = shorter.predict_action_chunk(batch)
        torch.manual_seed(0)
        assert torch.equal(fresh.predict_action_chunk(batch), expected)
    with pytest.raises(ClpError, match=r"only after fine-tuning.*policy\.base_model_path"):
        load_policy(tmp_path / "pruned", "cpu")


@pytest.fixture(scope="module")
def stock(checkpoint: Path, nvidia: Path, policy: LeRobotPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as stock lerobot saves it after fine-tuning NVIDIA's: depths and widths stand in the base model."""
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("stock") / "checkpoint")
    (folder / "config.json").unlink()
    stock_config(policy, nvidia).save_pretrained(folder)
    return folder


def test_a_checkpoint_that_stock_lerobot_saved_loads_and_prunes(stock, policy, sample, tmp_path):
    config = json.loads((stock / "config.json").read_text())
    assert config["type"] == "groot"
    expected = policy.predict_chunk(**sample, noise=noise())
    np.testing.assert_array_equal(load_policy(stock, "cpu").predict_chunk(**sample, noise=noise()), expected)
    assert FAMILY.with_depths(config, {"llm": 6, "vl_self_attention": 4, "dit": 8}) == config
    verify(stock)  # stock lerobot reads the base model's folder and comes to the same weights
    prune_checkpoint(stock, tmp_path / "pruned", REMOVAL)
    shorter = remove_in_memory(policy.policy, policy.layer_stacks, REMOVAL)
    in_memory = LeRobotPolicy(policy.checkpoint, shorter, policy.preprocessor, policy.postprocessor, "cpu")
    np.testing.assert_array_equal(
        load_policy(tmp_path / "pruned", "cpu").predict_chunk(**sample, noise=noise()),
        in_memory.predict_chunk(**sample, noise=noise()),
    )
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["type"] == "clp_groot_n1_7"
    plugin_policy(tmp_path / "pruned")


def test_a_base_model_that_is_not_here_is_asked_for():
    with pytest.raises(ClpError, match=r"someone/GR00T-N1\.7-mine, which is not a local folder"):
        FAMILY.layer_stacks({"type": "groot", "tune_vlln": True, "base_model_path": "someone/GR00T-N1.7-mine"})


def test_no_model_hub_is_asked(checkpoint, tmp_path):
    run_without_network("from clp_ros.evaluation.verify import verify; verify(sys.argv[1])", checkpoint, tmp_path)


# Making one


def test_tiny_is_small_and_points_only_into_itself(checkpoint):
    assert sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()) < 20e6
    text = "".join(path.read_text() for path in checkpoint.rglob("*.json"))
    assert str(checkpoint / "vlm_processor") in text
    assert ".partial" not in text


def test_a_seed_gives_the_same_weights_and_another_seed_others(checkpoint, tmp_path):
    made = {}
    for seed in (0, 1):
        arguments = "make-checkpoint --family groot_n1_7 --size tiny --embodiment aloha_bimanual --json --seed"
        assert main([*arguments.split(), str(seed), "--output", str(tmp_path / str(seed))]) == 0
        made[seed] = (tmp_path / str(seed) / "model.safetensors").read_bytes()
    assert made[0] == (checkpoint / "model.safetensors").read_bytes()
    assert made[0] != made[1]


@pytest.mark.parametrize(("depths", "expected"), [((16, 4, 32), 3_144_016_000), ((7, 3, 16), 2_099_298_176)])
def test_full_size_has_the_published_parameters(policy, depths, expected):
    from lerobot_policy_clp.configuration_clp_groot_n1_7 import ClpGrootN17Config
    from lerobot_policy_clp.modeling_clp_groot_n1_7 import ClpGrootN17Policy

    llm, attention, dit = depths
    with quiet(), torch.device("meta"):
        full = ClpGrootN17Policy(
            ClpGrootN17Config(
                llm_layers=llm,
                vl_self_attention_layers=attention,
                dit_layers=dit,
                model_params_fp32=False,
                input_features=policy.policy.config.input_features,
                output_features=policy.policy.config.output_features,
                device="cpu",
            )
        )
    assert sum(weight.numel() for weight in full.parameters()) == expected
    assert {weight.dtype for weight in full.parameters()} == {torch.bfloat16}
    # Rotary frequencies in bfloat16 would put tokens elsewhere.
    assert {buffer.dtype for buffer in full.buffers()} == {torch.float32}


def test_real_time_chunking_is_its_own(checkpoint, sample):
    policy = load_policy(checkpoint, "cpu")
    apart = policy.predict_chunk(**sample)
    policy.enable_rtc(horizon=6)
    first = policy.predict_chunk(**sample)
    second = policy.predict_chunk(**sample, elapsed_steps=2, delay_steps=4)
    np.testing.assert_allclose(second[:4], first[2:6], atol=1e-4)  # what will have been executed is kept as it is
    assert np.abs(apart[:4] - first[2:6]).max() > 1e-2
