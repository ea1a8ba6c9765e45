# SPDX-License-Identifier: Apache-2.0
"""Loaded policies: strict loading, chunks as stock lerobot gives them, hidden states against other ways to get them."""

import copy
import dataclasses
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_tools import edit_json
from hidden_state_tools import states_and_masks
from safetensors.torch import load_file, save_file

from clp_ros.core.errors import ClpError
from clp_ros.policies.checkpoint import Checkpoint
from clp_ros.policies.loading import load_policy, resolve_device
from clp_ros.policies.quiet import quiet

TASK = "Fold the shorts."


@pytest.fixture
def sample(tiny_policy):
    rng = np.random.default_rng(1)
    return {
        "images": {key: rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for key in tiny_policy.image_features},
        "state": rng.standard_normal(tiny_policy.state_size).astype(np.float32),
        "task": TASK,
    }


@pytest.fixture
def batch(tiny_policy, sample):
    actions = np.random.default_rng(2).standard_normal((tiny_policy.chunk_size, tiny_policy.action_size))
    return tiny_policy.batch(**sample, actions=actions)


@pytest.fixture
def copied(tiny_checkpoint, tmp_path) -> Path:
    return shutil.copytree(tiny_checkpoint, tmp_path / "a copy")


def states_of(policy, batch, seed=0):
    return states_and_masks(policy, batch, seed)


# Chunks


def test_chunk_equals_stock_lerobots_bit_for_bit(tiny_checkpoint, tiny_policy, sample):
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    noise = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(0))
    with quiet():
        stock = SmolVLAPolicy.from_pretrained(tiny_checkpoint, strict=True)
        before, after = make_pre_post_processors(stock.config, pretrained_path=str(tiny_checkpoint))
    images = {key: torch.from_numpy(image).permute(2, 0, 1).float() / 255 for key, image in sample["images"].items()}
    observation = {**images, "observation.state": torch.from_numpy(sample["state"]), "task": TASK}
    with torch.inference_mode():
        actions = [after(stock.select_action(before(observation), noise=noise))[0] for _ in range(50)]
    chunk = tiny_policy.predict_chunk(**sample, noise=noise)
    assert chunk.dtype == np.float32
    np.testing.assert_array_equal(chunk, torch.stack(actions).numpy())
    np.testing.assert_array_equal(chunk, tiny_policy.predict_chunk(**sample, noise=noise))


def test_a_missing_camera_is_named(tiny_policy, sample):
    del sample["images"]["observation.images.cam_high"]
    with pytest.raises(ClpError, match=r"no image for observation\.images\.cam_high"):
        tiny_policy.predict_chunk(**sample)


def test_features_are_checked_in_both_directions(tiny_policy):
    features = tiny_policy.image_features
    assert tiny_policy.check_features(features, 14, "my robot") == []
    extra = "observation.images.extra"
    for wrong in ((*features, extra), (*features[1:], extra), ()):
        with pytest.raises(ClpError, match=r"the policy's cameras are .*; my robot has"):
            tiny_policy.check_features(wrong, 14, "my robot")
    for size in (13, 15):
        with pytest.raises(ClpError, match=f"my robot has {size} joints"):
            tiny_policy.check_features(features, size, "my robot")


# Hidden states


def test_hidden_states_are_those_of_transformers_own_model_and_of_shorter_towers(tiny_policy, batch, monkeypatch):
    towers = tiny_policy.policy.model.vlm_with_expert
    forward, calls = towers.forward, []
    monkeypatch.setattr(towers, "forward", lambda **inputs: calls.append(inputs) or forward(**inputs))
    states, _ = states_of(tiny_policy, batch)
    monkeypatch.undo()
    (inputs,) = calls
    text = towers.get_vlm_model().text_model
    with torch.no_grad():
        # The VLM never looks at the actions: transformers' own forward over the prefix is the same computation.
        prefix = inputs["inputs_embeds"][0]
        length = prefix.shape[1]
        allowed = inputs["attention_mask"][:, None, :length, :length]
        reference = text(
            inputs_embeds=prefix,
            attention_mask=torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min),
            position_ids=inputs["position_ids"][:, :length],
            output_hidden_states=True,
        ).hidden_states
        for layer in range(15):
            torch.testing.assert_close(states["vlm"][layer], reference[layer + 1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(text.norm(states["vlm"][15]), reference[16], rtol=1e-4, atol=1e-4)
        # Towers cut off after a layer give its output, through their final norms.
        for layer in range(16):
            monkeypatch.setattr(towers, "num_vlm_layers", layer + 1)
            monkeypatch.setattr(towers, "num_expert_layers", layer + 1)
            (vlm, expert), _ = towers.forward(**inputs)
            assert torch.equal(text.norm(states["vlm"][layer]), vlm)
            assert torch.equal(towers.lm_expert.norm(states["expert"][layer]), expert)


def test_hidden_states_are_the_training_graphs_at_seeded_noise_and_time(tiny_policy, batch):
    first, _ = states_of(tiny_policy, batch)
    again, _ = states_of(tiny_policy, batch)
    other, _ = states_of(tiny_policy, batch, seed=1)
    for name in ("vlm", "expert"):
        assert all(torch.equal(x, y) for x, y in zip(first[name], again[name], strict=True))
        assert len({state.data_ptr() for state in first[name]}) == 16
    # Noise and time reach the actions' stream alone.
    assert all(torch.equal(x, y) for x, y in zip(first["vlm"], other["vlm"], strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(first["expert"], other["expert"], strict=True))
    # The last expert state gives lerobot's loss at that noise and time.
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.standard_normal((1, 50, 32), dtype="float32"))
    time = torch.tensor([rng.beta(1.5, 1.0) * 0.999 + 0.001], dtype=torch.float32)
    model = tiny_policy.policy.model
    with torch.no_grad():
        loss, _ = tiny_policy.policy.forward(batch, noise=noise, time=time)
        velocity = model.action_out_proj(model.vlm_with_expert.lm_expert.norm(first["expert"][15]))
        target = noise - torch.nn.functional.pad(batch["action"], (0, 18))
    torch.testing.assert_close(((target - velocity)[..., :14] ** 2).mean(), loss)


def test_padding_takes_no_part(tiny_policy, batch):
    states, masks = states_of(tiny_policy, batch)
    language = batch["observation.language.tokens"].shape[1]
    images = 3 * 4
    assert masks["vlm"].shape == (1, images + language + 1)
    assert masks["vlm"].all()
    assert masks["expert"].shape == (1, 50)
    assert masks["expert"].all()

    padded = dict(batch)
    padded["observation.language.tokens"] = torch.nn.functional.pad(
        batch["observation.language.tokens"], (0, 5), value=2
    )
    padded["observation.language.attention_mask"] = torch.nn.functional.pad(
        batch["observation.language.attention_mask"].bool(), (0, 5), value=False
    )
    padded["action_is_pad"] = torch.arange(50)[None] >= 30
    more, mask = states_of(tiny_policy, padded)
    expected = [True] * (images + language) + [False] * 5 + [True]
    assert mask["vlm"][0].tolist() == expected
    assert mask["expert"][0].tolist() == [True] * 30 + [False] * 20
    for layer in range(16):
        torch.testing.assert_close(more["vlm"][layer][mask["vlm"]], states["vlm"][layer][0], rtol=1e-4, atol=1e-4)


def test_an_absent_camera_takes_no_part(tiny_policy, batch, monkeypatch):
    monkeypatch.setattr(tiny_policy.policy.config, "empty_cameras", 1)
    language = batch["observation.language.tokens"].shape[1]
    del batch["observation.images.cam_left_wrist"]
    _, masks = states_of(tiny_policy, batch)
    assert masks["vlm"][0].tolist() == [True] * 8 + [False] * 4 + [True] * (language + 1)


def test_hidden_states_leave_the_policy_as_it_was(tiny_policy, batch):
    weights = {name: tensor.clone() for name, tensor in tiny_policy.policy.state_dict().items()}
    states_of(tiny_policy, batch)
    del batch["observation.language.tokens"]
    with pytest.raises(KeyError):
        states_of(tiny_policy, batch)
    assert "embed_prefix" not in vars(tiny_policy.policy.model)
    assert not any(module._forward_pre_hooks for module in tiny_policy.policy.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tiny_policy.policy.state_dict().items())


# Loading


def test_weights_replaced_while_the_policy_is_loaded_are_refused(tiny_checkpoint, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    weights, opened = folder / "model.safetensors", Checkpoint.open(folder)
    (tmp_path / "new").write_bytes(weights.read_bytes())
    (tmp_path / "new").replace(weights)
    monkeypatch.setattr(Checkpoint, "open", lambda _: opened)
    with pytest.raises(ClpError, match="changed while it was read"):
        load_policy(folder, "cpu")


def test_a_moved_checkpoint_loads_and_verify_says_what_stock_lerobot_cannot(tiny_checkpoint, tmp_path, sample):
    from clp_ros.cli import main
    from clp_ros.evaluation.verify import verify
    from clp_ros.pruning.surgery import prune_checkpoint

    home = tmp_path / "home"
    assert main(["make-checkpoint", "--family", "smolvla", "--size", "tiny", "--json", "--output", str(home)]) == 0
    moved = home.rename(tmp_path / "moved")
    assert load_policy(moved, "cpu").image_features == ("observation.images.image", "observation.images.image2")
    with pytest.raises(
        ClpError, match=r"stock lerobot does not load the checkpoint .*clp prune.*--policy\.vlm_model_name"
    ):
        verify(moved)
    prune_checkpoint(moved, tmp_path / "pruned", {"expert": (1, 2)})  # the cure that the message names
    assert verify(tmp_path / "pruned")["layers"] == {"vlm": 14, "expert": 14}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config: config.update(output_features={}), "output_features has no action"),
        (lambda config: config.update(num_steps=0), r"fails to predict \(ZeroDivisionError"),
        (lambda config: config.update(input_features={}), r"fails to predict \(ValueError: All image features are"),
    ],
)
def test_verify_says_what_a_config_lacks(tiny_checkpoint, tmp_path, change, words):
    from clp_ros.evaluation.verify import verify

    folder = shutil.copytree(tiny_checkpoint, tmp_path / "changed")
    edit_json("config.json", change)(folder)
    with pytest.raises(ClpError, match=words):
        verify(folder)


def test_shards_are_not_blamed_on_the_vlm(tiny_checkpoint, tmp_path):
    from clp_ros.evaluation.verify import verify

    folder = shutil.copytree(tiny_checkpoint, tmp_path / "shards")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = load_file(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ClpError, match=r"it reads one model\.safetensors, not shards.*clp prune"):
        verify(folder)


@pytest.mark.parametrize("family", ["smolvla", "pi0"])
def test_nothing_is_compiled_though_the_config_asks_for_it(family_checkpoint, tmp_path, monkeypatch, family):
    """Compiling takes minutes, and layers of a compiled model cannot be read."""
    from clp_ros.evaluation.verify import verify

    folder = shutil.copytree(family_checkpoint(family), tmp_path / "compiled")
    edit_json("config.json", lambda config: config.update(compile_model=True))(folder)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("it compiles"))
    assert verify(folder)["chunk"]


def _is_registered(step: str) -> bool:
    from lerobot.processor import ProcessorStepRegistry

    return step in ProcessorStepRegistry.list()


# One of the two is the other's name in lerobot 0.5 and 0.6.
(_ANOTHER_VERSIONS,) = (
    step for step in ("delta_actions_processor", "relative_actions_processor") if not _is_registered(step)
)


def edited(change):
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edited(lambda t: t.pop("model.state_proj.bias")), r"tensor 'model\.state_proj\.bias' is missing \(1 in all\)"),
        (edited(lambda t: t.update({"model.extra": torch.zeros(2)})), r"the model has no tensor 'model\.extra'"),
        (
            edited(lambda t: t.update({"model.state_proj.bias": torch.zeros(2)})),
            r"tensor 'model\.state_proj\.bias' has shape \(2,\), the model's has \(64,\)",
        ),
        (edit_json("config.json", lambda c: c.update(chunk_size="long")), r"lerobot cannot build the model"),
        (edit_json("config.json", lambda c: c.update(unheard_of=1)), r"lerobot cannot build the model"),
        (lambda f: shutil.rmtree(f / "vlm"), r"lerobot cannot build the model .*config\.json"),
        (lambda f: (f / "vlm" / "config.json").write_text("{"), r"lerobot cannot build the model"),
        (lambda f: (f / "policy_preprocessor.json").unlink(), r"policy_preprocessor\.json is missing"),
        (lambda f: (f / "policy_postprocessor.json").unlink(), r"policy_postprocessor\.json is missing"),
        (edit_json("policy_preprocessor.json", lambda d: d.pop("steps")), r"the processors do not load"),
        (
            edit_json("policy_preprocessor.json", lambda d: d["steps"][0].update(registry_name="unheard_of")),
            r"policy_preprocessor\.json: the installed lerobot .* has no processor step unheard_of",
        ),
        (
            edit_json("policy_preprocessor.json", lambda d: d["steps"][0].update(registry_name=_ANOTHER_VERSIONS)),
            rf"the processor step {_ANOTHER_VERSIONS} needs lerobot [^,]+,?[^,]*, but .* is installed",
        ),
        (
            edit_json("config.json", lambda c: c.update(self_attn_every_n_layers=2.5)),
            r"self_attn_every_n_layers is 2\.5",
        ),
    ],
)
def test_faults_of_a_checkpoint_are_told(copied, damage, message):
    # A copy whose VLM is its own, also where its config still names the original's.
    edit_json("config.json", lambda c: c.update(vlm_model_name=str(copied / "vlm")))(copied)
    damage(copied)
    with pytest.raises(ClpError, match=message) as reported:
        load_policy(copied, "cpu")
    assert "\n" not in str(reported.value)
    assert str(copied) in str(reported.value)


@pytest.mark.parametrize("name", ["policy_preprocessor.json", "policy_postprocessor.json"])
def test_a_checkpoint_cannot_choose_the_code_that_runs(copied, name, tmp_path):
    from lerobot.processor import PolicyProcessorPipeline

    # Any callable will do for lerobot, which calls it with the step's config and only then complains of the result.
    ran = tmp_path / "ran"
    step = {"class": "os.mkdir", "config": {"path": str(ran)}}
    edit_json(name, lambda d: d["steps"].append(step))(copied)
    with pytest.raises(ClpError, match=rf"{name}.*: .*would import and run the class 'os\.mkdir'"):
        load_policy(copied, "cpu")
    assert not ran.exists()
    with pytest.raises(TypeError):
        PolicyProcessorPipeline.from_pretrained(copied, config_filename=name)
    assert ran.is_dir()  # so the refusal is needed


@pytest.mark.parametrize("config", [{}, {"trust_remote_code": True}])
def test_a_tokenizer_that_brings_its_own_code_is_refused(copied, config):
    step = {"registry_name": "action_tokenizer_processor", "config": config}
    edit_json("policy_preprocessor.json", lambda d: d["steps"].append(step))(copied)
    with pytest.raises(ClpError, match="would run code that comes with its tokenizer"):
        load_policy(copied, "cpu")


@pytest.mark.parametrize("name", ["policy_preprocessor.json", "policy_postprocessor.json"])
@pytest.mark.parametrize("step", ["reward_classifier_processor", "groot_n1_7_vlm_encode_v1", "groot_eagle_encode_v3"])
def test_a_step_that_loads_a_model_by_name_is_refused(copied, name, step):
    from lerobot.processor import ProcessorStepRegistry

    if step not in ProcessorStepRegistry.list():
        pytest.skip("this lerobot does not have the step")
    edit_json(name, lambda d: d["steps"].append({"registry_name": step, "config": {}}))(copied)
    with pytest.raises(ClpError, match=f"{name}.*: smolvla does not use the step {step}"):
        load_policy(copied, "cpu")


def test_tied_tensors_are_loaded_under_each_of_their_names(copied):
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    def tie(config):
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True

    edit_json("vlm/config.json", tie)(copied)
    with quiet():
        config = PreTrainedConfig.from_pretrained(copied)
        config.vlm_model_name = str(copied / "vlm")
        stock = SmolVLAPolicy(config)
        vlm = stock.model.vlm_with_expert.vlm
        vlm.lm_head.weight = vlm.model.text_model.embed_tokens.weight
        stock.save_pretrained(copied)
    ours = load_policy(copied, "cpu")
    assert len(ours.checkpoint.tensors) == len(stock.state_dict()) - 1
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, ours.policy.state_dict()[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("policy_preprocessor_step_5_normalizer_processor", "observation.state.mean"),
        ("policy_preprocessor_step_5_normalizer_processor", "action.std"),
        ("policy_postprocessor_step_0_unnormalizer_processor", "action.mean"),
    ],
)
def test_statistics_that_are_not_finite_are_refused(copied, file, key, value):
    path = copied / f"{file}.safetensors"
    statistics = load_file(path)
    statistics[key][3] = value
    save_file(statistics, path)
    with pytest.raises(ClpError, match=rf"the statistic '{key}' is not finite"):
        load_policy(copied, "cpu")


def test_statistics_that_nothing_is_normalised_by_may_be_anything(copied, sample):
    for file in copied.glob("policy_*.safetensors"):
        statistics = load_file(file)
        statistics["action.q01"][0] = np.nan  # the mode is MEAN_STD
        statistics["observation.images.cam_high.mean"] = torch.full((3, 1, 1), np.nan)  # and that of images IDENTITY
        save_file(statistics, file)
    assert np.isfinite(load_policy(copied, "cpu").predict_chunk(**sample)).all()


def test_float32_is_float32(copied):
    edited(lambda t: t.update({name: tensor.to(torch.float16) for name, tensor in t.items()}))(copied)
    policy = load_policy(copied, "cpu", "float32").policy
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}
    with pytest.raises(ClpError, match="unknown dtype 'float8'"):
        load_policy(copied, "cpu", "float8")


@pytest.mark.parametrize("device", ["", "tpu", "meta", "mps", "cuda:x", "cuda:99", "cpu,cuda"])
def test_devices_that_are_not_there_are_told(device):
    with pytest.raises(ClpError, match="device"):
        resolve_device(device)
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") in ("cpu", "cuda")


@pytest.mark.parametrize("fails", [False, True])
def test_quiet_puts_everything_back(fails, capsys, monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    before = (root.level, root.manager.disable, sys.stdout, copy.copy(warnings.filters))

    def chatter():
        with quiet():
            print("chatter")  # noqa: T201
            logging.warning("chatter")
            logging.getLogger("transformers").warning("chatter")
            warnings.warn("chatter", stacklevel=1)
            if fails:
                raise ArithmeticError

    with pytest.raises(ArithmeticError) if fails else nullcontext():
        chatter()
    assert (root.level, root.manager.disable, sys.stdout, warnings.filters) == before
    assert root.handlers == []
    assert capsys.readouterr() == ("", "")


def test_mapped_weights_take_no_memory_of_their_own(tiny_checkpoint, sample, tiny_policy):
    mapped = load_policy(tiny_checkpoint, "cpu", mapped=True)
    weights = Path("/proc/self/maps").read_text()
    assert str(tiny_checkpoint / "model.safetensors") in weights
    regions = [
        range(*(int(x, 16) for x in line.split()[0].split("-")))
        for line in weights.splitlines()
        if line.endswith("model.safetensors")
    ]
    for name, weight in mapped.policy.named_parameters():
        assert any(weight.data_ptr() in region for region in regions), name
    noise = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(
        mapped.predict_chunk(**sample, noise=noise), tiny_policy.predict_chunk(**sample, noise=noise), atol=1e-5
    )


def test_real_time_chunking_continues_the_last_chunk(tiny_checkpoint, sample):
    policy = load_policy(tiny_checkpoint, "cpu")
    noise = [torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    apart = policy.predict_chunk(**sample, noise=noise[1])
    policy.enable_rtc(horizon=20)
    first = policy.predict_chunk(**sample, noise=noise[0])
    np.testing.assert_array_equal(policy.predict_chunk(**sample, noise=noise[1]), apart)  # not unless asked to
    policy.predict_chunk(**sample, noise=noise[0])
    second = policy.predict_chunk(**sample, noise=noise[1], elapsed_steps=10, delay_steps=5)
    # Step i of it is for the time of step i + 10 of the first: the kept ones agree, those beyond the horizon do not.
    kept = np.abs(second[:5] - first[10:15]).mean()
    assert kept < 0.2 * np.abs(apart[:5] - first[10:15]).mean()
    free = np.abs(second[30:40] - first[40:50]).mean()
    assert free > 5 * kept
    policy.predict_chunk(**sample, elapsed_steps=50)  # nothing of the last is left


def test_a_policy_without_real_time_chunking_says_so(tiny_policy):
    class Plain(torch.nn.Module):
        pass

    with pytest.raises(ClpError, match="no real-time chunking for smolvla"):
        dataclasses.replace(tiny_policy, policy=Plain()).enable_rtc(10)


@pytest.mark.parametrize("family", ["smolvla", "pi0", "pi05", "groot", "groot_n1_7"])
def test_chunks_of_several_robots_are_those_of_each(
    family: str, family_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instructions of different lengths, and the same noise for all."""
    import torch

    draw, normal = torch.randn, torch.normal
    monkeypatch.setattr(torch, "randn", lambda *size, **given: torch.zeros_like(draw(*size, **given)))
    monkeypatch.setattr(torch, "normal", lambda *given, **named: torch.zeros_like(normal(*given, **named)))
    policy = load_policy(family_checkpoint(family), "cpu", dtype="float32")
    rng = np.random.default_rng(0)
    observations = [
        (
            {name: rng.integers(0, 256, (*policy.camera_sizes[name], 3), dtype=np.uint8) for name in policy.cameras},
            rng.normal(size=policy.state_size).astype(np.float32),
            task,
        )
        for task in ("lift it", "put the red cube into the bin beside the arm", "push")
    ]
    together = policy.predict_chunks(observations)
    alone = np.stack([policy.predict_chunk(*one) for one in observations])
    assert together.shape == (3, policy.chunk_size, policy.action_size)
    assert np.abs(alone[0] - alone[1]).max() > 1e-3
    np.testing.assert_allclose(together, alone, atol=2e-4)
