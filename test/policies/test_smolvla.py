# SPDX-License-Identifier: Apache-2.0
"""SmolVLA's facts against lerobot's real classes: building offline, its layers, its dtypes."""

import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_tools import run_without_network

from clp_ros.cli import main
from clp_ros.core.errors import ClpError
from clp_ros.policies.features import LIBERO, PolicyFeatures
from clp_ros.policies.loading import load_policy
from clp_ros.policies.quiet import quiet
from clp_ros.policies.smolvla import family as smolvla
from clp_ros.policies.smolvla import synthetic
from clp_ros.pruning.surgery import prune_checkpoint

ROOT = Path(__file__).resolve().parents[2]
TOWER = "model.vlm_with_expert."


def make(folder: Path, *more: str) -> Path:
    arguments = ["make-checkpoint", "--family", "smolvla", "--size", "tiny", "--json", "--overwrite", "--output"]
    assert main([*arguments, str(folder), *more]) == 0
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_seed_gives_the_same_bytes_and_another_seed_other_weights(tmp_path, capsys):
    first = digests(make(tmp_path / "made", "--seed", "3"))
    torch.rand(7)  # whatever the generator's state
    assert digests(make(tmp_path / "made", "--seed", "3")) == first
    other = digests(make(tmp_path / "made", "--seed", "4"))
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors"}
    assert list(tmp_path.iterdir()) == [tmp_path / "made"]


def test_making_leaves_torchs_generator_as_it_was(tmp_path, capsys):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make(tmp_path / "made")
    assert torch.equal(torch.rand(3), expected)


def test_tiny_is_small_and_points_only_into_itself(tiny_checkpoint):
    assert sum(path.stat().st_size for path in tiny_checkpoint.rglob("*") if path.is_file()) < 20e6
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    assert config["vlm_model_name"] == str(tiny_checkpoint / "vlm")
    assert str(tiny_checkpoint / "vlm") in (tiny_checkpoint / "policy_preprocessor.json").read_text()
    assert ".partial" not in "".join(path.read_text() for path in tiny_checkpoint.rglob("*.json"))


LOAD_AND_PREDICT = """
import numpy as np
import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

folder = sys.argv[1]
policy = SmolVLAPolicy.from_pretrained(folder, strict=True)
before, after = make_pre_post_processors(policy.config, pretrained_path=folder)
cameras = ("cam_high", "cam_left_wrist", "cam_right_wrist")
sample = {f"observation.images.{camera}": torch.rand(1, 3, 480, 640) for camera in cameras}
batch = before({**sample, "observation.state": torch.zeros(1, 14), "task": ["Fold the shorts."]})
chunk = after(policy.predict_action_chunk(batch, noise=torch.zeros(1, 50, 32)))
assert chunk.shape == (1, 50, 14) and torch.isfinite(chunk).all(), chunk.shape

from clp_ros.evaluation.verify import verify
verify(folder)
"""


def test_a_robot_may_have_more_joints_than_lerobot_pads_to(tmp_path):
    many = (0.0,) * 40
    features = PolicyFeatures({"observation.image": (48, 64)}, 40, 40, many, (1.0,) * 40, many, (1.0,) * 40)
    smolvla.FAMILY.make_checkpoint("tiny", tmp_path, tmp_path, features, 0)
    policy = load_policy(tmp_path, "cpu")
    image = np.zeros((48, 64, 3), dtype=np.uint8)
    chunk = policy.predict_chunk({"observation.image": image}, np.zeros(40, dtype=np.float32), "Wave.")
    assert chunk.shape == (50, 40)
    assert np.isfinite(chunk).all()


def test_small_is_made_to_be_trained_from_nothing(tmp_path, capsys):
    from transformers import AutoTokenizer

    folder = make(tmp_path / "small", "--size", "small", "--embodiment", "ur5")
    assert json.loads(capsys.readouterr().out)["parameters"] < 3e6
    with quiet():
        policy = load_policy(folder).policy
    assert {feature.shape for feature in policy.config.image_features.values()} == {(3, 96, 96)}
    # lerobot never trains these: their outputs are not used. 0.5 trains the last layer and the norm nevertheless.
    unused = ["lm_head"]
    if not version("lerobot").startswith("0.5."):
        unused += ["text_model.norm", "text_model.layers.11."]
    frozen = {name for name, weight in policy.named_parameters() if not weight.requires_grad}
    assert frozen == {name for name, _ in policy.named_parameters() if any(part in name for part in unused)}
    # Unlike those of a tiny checkpoint, the layers begin alike.
    layers = policy.model.vlm_with_expert.lm_expert.layers
    spread = [layer.mlp.down_proj.weight.std().item() for layer in layers]
    assert max(spread) < 1.1 * min(spread)
    tokenizer = AutoTokenizer.from_pretrained(folder / "vlm")
    assert len(tokenizer.tokenize("Put the blue cube into the bin.")) == 8
    assert tokenizer.decode(tokenizer.encode("Überall 3 Schrauben!")) == "Überall 3 Schrauben!"


def test_a_size_that_a_family_lacks_is_refused(tmp_path, capsys):
    assert main(["make-checkpoint", "--family", "pi0", "--size", "small", "--output", str(tmp_path / "pi0")]) == 1
    assert "choose one of tiny, full" in capsys.readouterr().err
    assert not (tmp_path / "pi0").exists()


def test_stock_lerobot_and_verify_ask_no_model_hub(tiny_checkpoint, tmp_path):
    run_without_network(LOAD_AND_PREDICT, tiny_checkpoint, tmp_path)


@pytest.mark.parametrize("removed", [(1,), (2,), (1, 2, 3), (1, 3)])
def test_lerobots_model_refuses_a_set_that_breaks_the_alternation(tiny_policy, removed):
    kept = [layer for layer in range(16) if layer not in removed]
    state = {}
    for name, tensor in tiny_policy.policy.state_dict().items():
        for module in tiny_policy.layer_stacks:
            head = module.layer_prefix.partition("{layer}")[0]
            if name.startswith(head):
                layer, _, rest = name.removeprefix(head).partition(".")
                name = f"{head}{kept.index(int(layer))}.{rest}" if int(layer) in kept else ""
        if name:
            state[name] = tensor
    config = tiny_policy.policy.config
    before = config.num_vlm_layers
    try:
        config.num_vlm_layers = len(kept)
        with quiet():
            shorter = type(tiny_policy.policy)(config)
    finally:
        config.num_vlm_layers = before
    with pytest.raises(RuntimeError, match=r"size mismatch for .*lm_expert\.layers\.\d+\.self_attn\.k_proj"):
        shorter.load_state_dict(state, strict=True)


@pytest.mark.parametrize(("layers", "expected"), [(16, 450_046_176), (10, 354.21e6)])
def test_full_size_has_the_parameters_of_smolvla_base_and_of_table_5(tmp_path, layers, expected):
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    with quiet():
        synthetic._write_vlm(synthetic._SIZES["full"], tmp_path)
        inputs, outputs = LIBERO.lerobot_features()
        config = SmolVLAConfig(
            input_features=inputs,
            output_features=outputs,
            vlm_model_name=str(tmp_path),
            num_vlm_layers=layers,
            num_expert_layers=0,
            load_vlm_weights=False,
            device="cpu",
        )
        with torch.device("meta"):
            policy = SmolVLAPolicy(config)
    assert sum(weight.numel() for weight in policy.parameters()) == pytest.approx(
        expected, rel=0 if layers == 16 else 2e-5
    )


def test_dtypes_are_those_lerobot_gives_a_policy_whose_vlm_it_loads_first(tiny_checkpoint, tmp_path):
    # As with lerobot/smolvla_base: its config says load_vlm_weights, its VLM comes in bfloat16.
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    from transformers import AutoConfig, SmolVLMForConditionalGeneration

    folder = shutil.copytree(tiny_checkpoint, tmp_path / "base")
    with quiet():
        vlm = SmolVLMForConditionalGeneration(AutoConfig.from_pretrained(folder / "vlm")).to(torch.bfloat16)
        vlm.save_pretrained(folder / "vlm")
        config = PreTrainedConfig.from_pretrained(folder)
        config.vlm_model_name, config.load_vlm_weights, config.device = str(folder / "vlm"), True, "cpu"
        SmolVLAPolicy(config).save_pretrained(folder)
        stock = SmolVLAPolicy.from_pretrained(folder, strict=True).state_dict()
    ours = load_policy(folder, "cpu").policy.state_dict()
    assert {str(tensor.dtype) for tensor in stock.values()} == {"torch.float32", "torch.bfloat16"}
    assert {name: tensor.dtype for name, tensor in ours.items()} == {name: t.dtype for name, t in stock.items()}
    assert all(torch.equal(ours[name], stock[name]) for name in stock)
    single = load_policy(folder, "cpu", "float32").policy
    assert {weight.dtype for weight in single.parameters()} == {torch.float32}


def test_a_checkpoint_that_lerobot_trained_further_loads_and_prunes(tiny_checkpoint, tiny_policy, tmp_path, capsys):
    # lerobot-train saves config, weights and processors; the VLM's folder stays with the checkpoint it came from.
    trained = tmp_path / "trained"
    tiny_policy.policy.save_pretrained(trained)
    tiny_policy.preprocessor.save_pretrained(trained, config_filename="policy_preprocessor.json")
    tiny_policy.postprocessor.save_pretrained(trained, config_filename="policy_postprocessor.json")
    assert not (trained / "vlm").exists()
    load_policy(trained, "cpu")
    prune_checkpoint(trained, tmp_path / "pruned", {"vlm": (1, 2)})
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert config["vlm_model_name"] == str(tiny_checkpoint / "vlm")
    assert main(["verify", str(tmp_path / "pruned")]) == 0


CONFIG = {"type": "smolvla", "num_vlm_layers": 16}


@pytest.mark.parametrize(
    ("more", "period"),
    [
        ({}, 2),
        ({"self_attn_every_n_layers": 4}, 4),
        ({"self_attn_every_n_layers": -1}, 1),
        ({"self_attn_every_n_layers": 0}, 1),
        ({"attention_mode": "self_attn"}, 1),
        ({"num_expert_layers": 16}, 2),
        ({"num_expert_layers": 0}, 2),
    ],
)
def test_period_follows_from_the_config(more, period):
    assert {module.pattern_period for module in smolvla.FAMILY.layer_stacks(CONFIG | more)} == {period}


@pytest.mark.parametrize(
    "more",
    [
        {"num_vlm_layers": 0},
        {"num_vlm_layers": None},
        {"num_expert_layers": 8},
        {"self_attn_every_n_layers": 2.5},
        {"self_attn_every_n_layers": True},
    ],
)
def test_configs_that_cannot_be_pruned_are_refused(more):
    with pytest.raises(ClpError, match=next(iter(more))):
        smolvla.FAMILY.layer_stacks(CONFIG | more)


def test_depths_are_rewritten_for_both_towers_and_the_config_is_left_alone():
    config = CONFIG | {"num_expert_layers": 16, "chunk_size": 50}
    changed = smolvla.FAMILY.with_depths(config, {"vlm": 10, "expert": 10})
    assert changed == config | {"num_vlm_layers": 10, "num_expert_layers": 10}
    assert config["num_vlm_layers"] == 16
    with pytest.raises(ValueError, match="equally deep"):
        smolvla.FAMILY.with_depths(config, {"vlm": 10, "expert": 9})


def test_default_budget_is_the_papers_share():
    assert smolvla.FAMILY.default_budget(CONFIG) == {"vlm+expert": 6}
