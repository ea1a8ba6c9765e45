# SPDX-License-Identifier: Apache-2.0
"""GR00T N1.5's facts against lerobot 0.5.1's real classes: its layers, both layouts, its processors, strict loading."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_tools import remove_in_memory, run_without_network
from hidden_state_tools import plugin_policy, random_sample, states_and_masks
from safetensors.torch import load_file, save_file

from clp_ros.cli import main
from clp_ros.core.errors import ClpError
from clp_ros.policies.base import Modality
from clp_ros.policies.checkpoint import Checkpoint
from clp_ros.policies.family import check_lerobot
from clp_ros.policies.lerobot_policy import LeRobotPolicy
from clp_ros.policies.loading import load_policy
from clp_ros.policies.patched import patched
from clp_ros.policies.quiet import quiet
from clp_ros.policies.registry import family_named, family_of
from clp_ros.pruning.surgery import prune_checkpoint

ROOT = Path(__file__).resolve().parents[2]
REMOVAL = {"llm": (2, 4), "vl_self_attention": (1,), "dit": (1, 2, 3, 4)}
TABLE_5 = {"llm": (3, 4, 5, 6, 7, 8, 9), "vl_self_attention": (2,), "dit": (1, 2, 4, 5, 6, 7, 10, 11)}
FAMILY = family_named("groot")

try:
    check_lerobot(FAMILY)
    OTHER_LEROBOT = ""
except ClpError as error:
    OTHER_LEROBOT = str(error)
needs_lerobot = pytest.mark.skipif(bool(OTHER_LEROBOT), reason=OTHER_LEROBOT)


# What config.json says

LEROBOT = {"type": "groot", "tokenizer_assets_repo": "lerobot/eagle2hg-processor-groot-n1p5", "chunk_size": 50}
NVIDIA = {
    "model_type": "gr00t_n1_5",
    "architectures": ["GR00T_N1_5"],
    "backbone_cfg": {"eagle_path": "NVEagle/eagle_er-qwen3_1_7B", "select_layer": 12},
    "action_head_cfg": {
        "diffusion_model_cfg": {"num_layers": 16, "interleave_self_attention": True},
        "vl_self_attention_cfg": {"num_layers": 4},
    },
}


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (LEROBOT, "groot"),
        (NVIDIA, "groot"),
        ({**NVIDIA, "model_type": None}, "groot"),
        ({"type": "clp_groot"}, "groot"),
        ({"type": "groot", "tokenizer_assets_repo": None, "tune_vlln": True}, "groot_n1_7"),
        ({"model_type": "Gr00tN1d7", "select_layer": 16}, "groot_n1_7"),
        ({"type": "clp_groot_n1_7"}, "groot_n1_7"),
    ],
)
def test_the_two_gr00ts_are_told_apart(config, family):
    assert family_of(config, "config.json").name == family


@pytest.mark.parametrize("config", [LEROBOT, NVIDIA, {"type": "clp_groot"}])
def test_modules_are_those_of_the_paper(config):
    modules = FAMILY.layer_stacks(config)
    assert {module.name: module.layers for module in modules} == {"llm": 12, "vl_self_attention": 4, "dit": 16}
    assert {module.name: module.pattern_period for module in modules} == {"llm": 1, "vl_self_attention": 1, "dit": 2}
    assert {module.group for module in modules} == {"llm", "vl_self_attention", "dit"}
    assert FAMILY.default_budget(config) == {"llm": 7, "vl_self_attention": 1, "dit": 8}


def test_depths_are_written_where_each_layout_has_them():
    depths, before = {"llm": 5, "vl_self_attention": 3, "dit": 8}, copy.deepcopy((LEROBOT, NVIDIA))
    changed = FAMILY.with_depths(LEROBOT, depths)
    layers = {"llm_layers": 5, "vl_self_attention_layers": 3, "dit_layers": 8}
    assert changed == LEROBOT | {"type": "clp_groot"} | layers
    nvidia = FAMILY.with_depths(NVIDIA, depths)
    assert nvidia["backbone_cfg"] == NVIDIA["backbone_cfg"] | {"select_layer": 5}
    head = nvidia["action_head_cfg"]
    assert head["diffusion_model_cfg"] == {"num_layers": 8, "interleave_self_attention": True}
    assert head["vl_self_attention_cfg"] == {"num_layers": 3}
    for config in (changed, nvidia):
        assert {module.name: module.layers for module in FAMILY.layer_stacks(config)} == depths
    assert before == (LEROBOT, NVIDIA)
    assert FAMILY.with_depths(LEROBOT, {"llm": 12, "vl_self_attention": 4, "dit": 16}) == LEROBOT


@pytest.mark.parametrize(
    "config",
    [
        {"type": "clp_groot", "llm_layers": 0},
        {"type": "clp_groot", "dit_layers": True},
        {**NVIDIA, "backbone_cfg": {}},
        {**NVIDIA, "action_head_cfg": [4]},
    ],
)
def test_configs_without_a_depth_are_refused(config):
    with pytest.raises(ClpError, match="the number of layers of"):
        FAMILY.layer_stacks(config)


def test_stock_processors_get_steps_that_work():
    names = ["rename_observations_processor", "groot_pack_inputs_v3", "groot_eagle_encode_v3", "groot_eagle_collate_v3"]
    steps = [{"registry_name": name, "config": {}} for name in [*names, "device_processor"]]
    steps[1]["state_file"] = "policy_preprocessor_step_1.safetensors"
    last = {"registry_name": "groot_action_unpack_unnormalize_v1", "config": {"env_action_dim": 7}}
    documents = {
        "policy_preprocessor.json": {"steps": steps},
        "policy_postprocessor.json": {"steps": [last, {"registry_name": "device_processor", "config": {}}]},
    }
    for _ in range(2):  # a second time changes nothing
        FAMILY.rewrite_local_paths(documents, Path("/there"), Path("/there"))
        before, after = (document["steps"] for document in documents.values())
        assert [step["registry_name"] for step in before] == [*names[:2], "clp_groot_eagle", "device_processor"]
        assert before[1]["state_file"] == "policy_preprocessor_step_1.safetensors"
        chunk = [{"registry_name": "clp_groot_chunk", "config": {"fold": fold}} for fold in (True, False)]
        assert after[:3] == [chunk[0], last, chunk[1]]


@pytest.mark.skipif(not OTHER_LEROBOT, reason="this lerobot has GR00T N1.5")
def test_with_another_lerobot_it_says_which_one_is_needed(tmp_path, capsys):
    assert main(["make-checkpoint", "--family", "groot", "--size", "tiny", "--output", str(tmp_path / "tiny")]) == 1
    assert "groot needs lerobot >=0.5.1,<0.6" in capsys.readouterr().err


# The real classes


@pytest.fixture(scope="module")
def checkpoint(family_checkpoint: Callable[..., Path], one_thread: None) -> Path:
    return family_checkpoint("groot", "aloha_bimanual")


@pytest.fixture(scope="module")
def policy(checkpoint: Path) -> LeRobotPolicy:
    return load_policy(checkpoint, "cpu")


@pytest.fixture(scope="module")
def sample(policy: LeRobotPolicy) -> dict[str, Any]:
    return random_sample(policy)


@pytest.fixture(scope="module")
def batch(policy: LeRobotPolicy, sample: dict[str, Any]) -> dict[str, Any]:
    actions = np.random.default_rng(2).uniform(-1, 1, (policy.chunk_size, policy.action_size))
    return policy.batch(**sample, actions=actions, action_is_pad=np.arange(policy.chunk_size) > 10)


@pytest.fixture(scope="module")
def nvidia(checkpoint: Path, policy: LeRobotPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as NVIDIA lays them out: without lerobot's prefix, in two shards, with its config."""
    from lerobot_policy_clp.modeling_clp_groot import _action_head_config

    folder = tmp_path_factory.mktemp("nvidia")
    weights = load_file(checkpoint / "model.safetensors")
    names, index = sorted(weights), {}
    for shard, file in enumerate(("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")):
        part = {name.removeprefix("_groot_model."): weights[name] for name in names[shard::2]}
        save_file(part, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    head = _action_head_config(policy.policy.config)
    config = {**NVIDIA, "backbone_cfg": NVIDIA["backbone_cfg"] | {"select_layer": 6}, "action_head_cfg": head}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def noise() -> torch.Tensor:
    return torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))


def without(policy: LeRobotPolicy, removal: dict[str, tuple[int, ...]]) -> LeRobotPolicy:
    return replace(policy, policy=remove_in_memory(policy.policy, policy.layer_stacks, removal))


@needs_lerobot
def test_tiny_is_small_and_points_nowhere(checkpoint):
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 20e6
    text = "".join(path.read_text() for path in checkpoint.glob("*.json"))
    assert '"/' not in text  # no path but relative ones and ids on the hub
    assert [path for path in checkpoint.iterdir() if path.is_dir()] == []


@needs_lerobot
def test_a_pruned_checkpoint_is_the_model_without_the_layers(checkpoint, policy, sample, tmp_path):
    from lerobot.policies.factory import make_pre_post_processors

    prune_checkpoint(checkpoint, tmp_path / "pruned", REMOVAL)
    shutil.move(tmp_path / "pruned", tmp_path / "elsewhere")
    pruned = load_policy(tmp_path / "elsewhere", "cpu")
    expected = without(policy, REMOVAL).predict_chunk(**sample, noise=noise())
    assert expected.shape == (16, 14)
    np.testing.assert_array_equal(pruned.predict_chunk(**sample, noise=noise()), expected)
    assert not np.array_equal(policy.predict_chunk(**sample, noise=noise()), expected)

    # lerobot's own way, its overrides of a GR00T's settings included.
    stock = plugin_policy(tmp_path / "elsewhere")
    with quiet():
        before, after = make_pre_post_processors(stock.config, pretrained_path=str(tmp_path / "elsewhere"))
    images = {key: torch.from_numpy(image).permute(2, 0, 1) / 255 for key, image in sample["images"].items()}
    batch = before({**images, "observation.state": torch.from_numpy(sample["state"]), "task": sample["task"]})
    with torch.inference_mode():
        chunk = after(stock.predict_action_chunk(batch, noise=noise()))
    np.testing.assert_array_equal(chunk[0].numpy(), expected)


@needs_lerobot
def test_the_postprocessor_gives_every_action_of_a_chunk(policy, batch):
    with torch.inference_mode():
        chunk = policy.policy.predict_action_chunk(batch, noise=noise())
        whole = policy.postprocessor(chunk)
        # As lerobot-eval does it: one action at a time.
        single = [policy.postprocessor(chunk[:, step]) for step in range(chunk.shape[1])]
    assert chunk.shape == whole.shape == (1, 16, 14)
    torch.testing.assert_close(whole, torch.stack(single, dim=1), rtol=0, atol=0)
    # The actions' statistics are those of the joints: what is normalised lies a deviation off the mean at 1.
    step = policy.postprocessor.steps[1]
    low, high = step.stats["action"]["min"], step.stats["action"]["max"]
    torch.testing.assert_close(whole, (chunk + 1) / 2 * (high - low) + low)


@needs_lerobot
def test_hidden_states_are_what_the_layers_give(policy, batch):
    seen: dict[str, list[torch.Tensor]] = {module.name: [] for module in policy.layer_stacks}
    handles = []
    for module in policy.layer_stacks:
        for layer in policy.policy.get_submodule(module.layers_path):

            def keep(_: Any, __: Any, output: Any, name: str = module.name) -> None:
                seen[name].append((output[0] if isinstance(output, tuple) else output).clone())

            handles.append(layer.register_forward_hook(keep))
    generator = torch.random.get_rng_state()
    states, masks = states_and_masks(policy, batch, 3)
    for handle in handles:
        handle.remove()
    assert torch.equal(torch.random.get_rng_state(), generator)
    for module in policy.layer_stacks:
        assert len(states[module.name]) == module.layers
        assert all(map(torch.equal, states[module.name], seen[module.name]))
        assert states[module.name][0].shape[:2] == masks[module.name].shape
    assert masks["llm"].all()
    assert torch.equal(masks["llm"], masks["vl_self_attention"])
    # A state, 32 tokens for what is to come, 16 actions, of which the last five are padding.
    assert masks["dit"].tolist() == [[True] * (1 + 32 + 11) + [False] * 5]

    again, _ = states_and_masks(policy, batch, 3)
    other, _ = states_and_masks(policy, batch, 4)
    assert torch.equal(again["dit"][-1], states["dit"][-1])
    assert not torch.equal(other["dit"][-1], states["dit"][-1])


@needs_lerobot
def test_padded_instructions_take_no_part(policy, sample, batch):
    # A shorter instruction in a batch with a longer one: padded on the left, and each sample keeps its own.
    images = {key: torch.stack([torch.from_numpy(image)] * 2) for key, image in sample["images"].items()}
    images = {key: stack.permute(0, 3, 1, 2) / 255 for key, stack in images.items()}
    state = torch.from_numpy(np.stack([sample["state"]] * 2))
    both = policy.preprocessor({**images, "observation.state": state, "task": ["Fold.", "Fold the shorts."]})
    lengths = both["eagle_attention_mask"].sum(dim=1)
    assert lengths[1] - lengths[0] == len(" the shorts")
    assert torch.equal(both["eagle_input_ids"][1:], batch["eagle_input_ids"])
    assert not both["eagle_attention_mask"][0, : lengths[1] - lengths[0]].any()
    assert torch.equal(both["eagle_pixel_values"][3:], batch["eagle_pixel_values"])
    actions = {"action": torch.zeros(2, 16, 32), "action_mask": torch.ones(2, 16, 32, dtype=torch.bool)}
    modalities = FAMILY.forward(policy.policy, both | actions, np.random.default_rng(0))
    assert torch.equal(modalities["llm"] != Modality.PADDING, both["eagle_attention_mask"].bool())


@needs_lerobot
def test_eagles_files_are_taken_as_they_are_published(policy, batch, sample, tmp_path):
    # The hub's repository: a Qwen tokenizer in its old files, and settings that name Python files, which are not run.
    from lerobot_policy_clp.processor_clp_groot import ClpGrootEagleStep
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    named = ["<IMG_CONTEXT>", "<img>", "</img>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    letters = list(bytes_to_unicode().values())
    code = {"AutoProcessor": "processing_eagle2_5_vl.Eagle25VLProcessor", "AutoImageProcessor": "harm.Harm"}
    files = {
        "vocab.json": {letter: index for index, letter in enumerate(letters)},
        "added_tokens.json": {name: len(letters) + index for index, name in enumerate(named)},
        "special_tokens_map.json": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "processor_class": "Eagle25VLProcessor",
            "auto_map": code,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "added_tokens_decoder": {
                str(len(letters) + index): {"content": name, "special": True} for index, name in enumerate(named)
            },
        },
        "config.json": {"model_type": "eagle_2_5_vl", "auto_map": code},
        "chat_template.json": {"chat_template": "{% for part in messages[0].content %}" + (
            "{% if part.type == 'image' %}<image-{{ loop.index }}>{% else %}{{ part.text }}{% endif %}{% endfor %}"
        )},
        "processor_config.json": {"auto_map": code, "image_token": "<IMG_CONTEXT>", "tokens_per_tile": 16},
        "preprocessor_config.json": {
            "auto_map": code,
            "image_processor_type": "Eagle25VLImageProcessorFast",
            "do_pad": False,
            "do_resize": False,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "max_dynamic_tiles": 12,
            "resample": 3,
            "return_tensors": None,
            "size": {"height": 56, "width": 56},
            "use_thumbnail": True,
        },
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "harm.py").write_text("raise SystemExit('run')\n")

    step = ClpGrootEagleStep(str(tmp_path))
    moved = ClpGrootEagleStep("nowhere/at-all")
    moved.load_state_dict(step.state_dict())
    assert "harm.py" not in step.state_dict()
    for used in (step, moved):
        with patched(policy.preprocessor, steps=[*policy.preprocessor.steps[:3], used]):
            theirs = policy.batch(**sample)
        tokens = used.processor.tokenizer.decode(theirs["eagle_input_ids"][0])
        pictures = "".join(f"<image {n}><img>{'<IMG_CONTEXT>' * 16}</img>" for n in (1, 2, 3))
        assert tokens == pictures + "['Fold the shorts.']"
        assert torch.equal(theirs["eagle_pixel_values"], batch["eagle_pixel_values"])


@needs_lerobot
def test_pictures_that_do_not_match_their_tokens_are_refused(policy, batch):
    short = batch | {"eagle_pixel_values": batch["eagle_pixel_values"][1:]}
    with pytest.raises(ValueError, match="32 image features do not fit 48 image tokens"):
        policy.policy.predict_action_chunk(short)


@needs_lerobot
def test_the_plugin_saves_what_it_loaded(checkpoint, tmp_path):
    prune_checkpoint(checkpoint, tmp_path / "pruned", REMOVAL)
    loaded, ours = plugin_policy(tmp_path / "pruned"), load_policy(tmp_path / "pruned", "cpu")
    loaded.save_pretrained(tmp_path / "saved")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert plugin_policy(tmp_path / "saved").config == loaded.config
    assert Checkpoint.open(tmp_path / "saved").layers == {"llm": 4, "vl_self_attention": 3, "dit": 4}
    # The processors too: the tokenizer is among what they save.
    ours.preprocessor.save_pretrained(tmp_path / "saved", config_filename="policy_preprocessor.json")
    name = "policy_preprocessor_step_3_clp_groot_eagle.safetensors"
    assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "pruned" / name).read_bytes()


@needs_lerobot
@pytest.mark.parametrize("damage", ["missing", "extra", "misshaped"])
def test_the_plugin_loads_strictly_or_not_at_all(checkpoint, tmp_path, damage):
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    name = "_groot_model.action_head.model.transformer_blocks.3.attn1.to_k.weight"
    if damage == "missing":
        del weights[name]
    elif damage == "extra":
        weights[name.replace(".3.", ".8.")] = weights[name]
    else:
        weights[name] = weights[name.replace(".3.", ".2.")]
    save_file({key: tensor.clone() for key, tensor in weights.items()}, folder / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"transformer_blocks\.[38]\.attn1\.to_k"):
        plugin_policy(folder)


@needs_lerobot
@pytest.mark.parametrize("removed", [(1,), (2,), (1, 3), (1, 2, 3)])
def test_a_block_of_the_other_kind_does_not_fit(policy, removed):
    config = copy.deepcopy(policy.policy.config)
    config.dit_layers = 8 - len(removed)
    with quiet():
        shorter = type(policy.policy)(config)
    state = without(policy, {"dit": removed}).policy.state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for .*transformer_blocks\.\d+\.attn1\.to_k"):
        shorter.load_state_dict(state, strict=True)


@needs_lerobot
def test_nvidias_own_layout_is_pruned_and_becomes_lerobots(nvidia, policy, sample, tmp_path):
    from lerobot_policy_clp.modeling_clp_groot import ClpGrootPolicy

    prune_checkpoint(nvidia, tmp_path / "pruned", REMOVAL)
    pruned = Checkpoint.open(tmp_path / "pruned")
    assert pruned.layers == {"llm": 4, "vl_self_attention": 3, "dit": 4}
    assert not any(name.startswith("_groot_model.") for name in pruned.tensors)
    with pytest.raises(ClpError, match="no cameras and no lerobot processors"):
        load_policy(tmp_path / "pruned", "cpu")

    # As README.md of the plugin shows it.
    config = copy.deepcopy(policy.policy.config)
    with quiet():
        ClpGrootPolicy.from_pretrained(tmp_path / "pruned", config=config).save_pretrained(tmp_path / "lerobot")
    policy.preprocessor.save_pretrained(tmp_path / "lerobot", config_filename="policy_preprocessor.json")
    policy.postprocessor.save_pretrained(tmp_path / "lerobot", config_filename="policy_postprocessor.json")
    chunk = load_policy(tmp_path / "lerobot", "cpu").predict_chunk(**sample, noise=noise())
    np.testing.assert_array_equal(chunk, without(policy, REMOVAL).predict_chunk(**sample, noise=noise()))


@needs_lerobot
@pytest.mark.parametrize(("removal", "sizes"), [({}, (2.724e9, 1.069e9)), (TABLE_5, (2.051e9, 0.748e9))])
def test_full_size_has_the_published_models_parameters(removal, sizes):
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot_policy_clp.configuration_clp_groot import ClpGrootConfig
    from lerobot_policy_clp.modeling_clp_groot import ClpGrootPolicy

    from clp_ros.policies.empty_weights import empty_weights

    layers = {module.name: module.layers for module in FAMILY.layer_stacks(LEROBOT)}
    fields = {f"{name}_layers": count - len(removal.get(name, ())) for name, count in layers.items()}
    camera = {"observation.images.image": PolicyFeature(FeatureType.VISUAL, (3, 256, 256))}
    with quiet(), empty_weights():
        policy = ClpGrootPolicy(ClpGrootConfig(**fields, input_features=camera, output_features={}, device="cpu"))
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
    counts = [sum(p.numel() for p in policy.parameters() if p.requires_grad or not only) for only in (False, True)]
    assert counts == pytest.approx(sizes, abs=0.5e6)


LOAD_AND_PREDICT = """
import torch
import lerobot_policy_clp
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors

folder = sys.argv[1]
config = PreTrainedConfig.from_pretrained(folder)
policy = get_policy_class(config.type).from_pretrained(folder)
before, after = make_pre_post_processors(policy.config, pretrained_path=folder)
sample = {key: torch.rand(1, *feature.shape) for key, feature in config.image_features.items()}
batch = before({**sample, "observation.state": torch.zeros(1, 14), "task": ["Fold the shorts."]})
chunk = after(policy.predict_action_chunk(batch))
assert chunk.shape == (1, 16, 14) and torch.isfinite(chunk).all(), chunk.shape
assert "flash_attn" not in sys.modules
"""


@needs_lerobot
def test_lerobot_and_the_plugin_ask_no_model_hub(checkpoint, tmp_path):
    run_without_network(LOAD_AND_PREDICT, checkpoint, tmp_path)


@needs_lerobot
def test_verify_takes_it(checkpoint, tmp_path, capsys):
    prune_checkpoint(checkpoint, tmp_path / "pruned", REMOVAL)
    assert main(["verify", str(tmp_path / "pruned")]) == 0
