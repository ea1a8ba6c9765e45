# SPDX-License-Identifier: Apache-2.0
"""Every layout of a checkpoint that stock lerobot (or a hub, or a trainer) writes, through every command.

Each is built small, by lerobot's own classes wherever they can write it.
The result of each command is what doc/reference/checkpoint-layouts.md says.
"""

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import published
import pytest
import torch
import yaml
from checkpoint_tools import put_into_hub_cache
from safetensors.torch import load_file, save_file

from clp_ros.cli import main
from clp_ros.core.errors import ClpError
from clp_ros.policies.family import check_lerobot
from clp_ros.policies.loading import load_policy
from clp_ros.policies.plugin import register_plugin
from clp_ros.policies.quiet import quiet
from clp_ros.policies.registry import family_named

ROOT = Path(__file__).resolve().parents[1]
ROBOT = "ur5"
TASK = "Pick up the cube."
COMMANDS = ("inspect", "calibrate", "prune", "verify", "LeRobot")
REPOSITORY = "someone/fine_tuned"

pytestmark = pytest.mark.usefixtures("one_thread")


# What stock lerobot writes


def stock_policy(folder: Path, change: Callable[[Any], None] = lambda config: None) -> tuple[Any, Any, Any]:
    """lerobot's policy of a checkpoint, with its config changed, and its processors."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    register_plugin()
    with quiet():
        config = PreTrainedConfig.from_pretrained(folder)
        config.device, config.pretrained_path = "cpu", str(folder)
        change(config)
        policy = get_policy_class(config.type).from_pretrained(folder, config=config, strict=True)
        processors = make_pre_post_processors(
            config, pretrained_path=str(folder), preprocessor_overrides={"device_processor": {"device": "cpu"}}
        )
    return policy, *processors


def save_training(base: Path, folder: Path, change: Callable[[Any], None] = lambda config: None) -> Path:
    """What ``lerobot-train`` saves at a step: its own function, with a train config and an optimizer's state."""
    from lerobot.configs.default import DatasetConfig
    from lerobot.configs.train import TrainPipelineConfig

    try:
        from lerobot.common.train_utils import save_checkpoint
    except ModuleNotFoundError:  # 0.5
        from lerobot.utils.train_utils import save_checkpoint

    policy, preprocessor, postprocessor = stock_policy(base, change)
    optimizer = torch.optim.AdamW(list(policy.parameters())[:1])
    config = TrainPipelineConfig(dataset=DatasetConfig(repo_id="someone/data"), policy=policy.config)
    with quiet():
        save_checkpoint(
            folder / "checkpoints" / "000010",
            10,
            config,
            policy,
            optimizer,
            preprocessor=preprocessor,
            postprocessor=postprocessor,
        )
    return folder / "checkpoints" / "000010" / "pretrained_model"


def save_with_fewer_steps(base: Path, folder: Path) -> Path:
    def change(config: Any) -> None:
        config.n_action_steps = 10
        assert config.n_action_steps < config.chunk_size

    return save_training(base, folder, change)


def save_with_an_empty_camera(base: Path, folder: Path) -> Path:
    return save_training(base, folder, lambda config: setattr(config, "empty_cameras", 1))


def save_with_renamed_cameras(base: Path, folder: Path) -> Path:
    """As ``lerobot-train --rename_map`` does: the map stands in the saved preprocessor."""
    saved = save_training(base, folder)
    document = json.loads((saved / "policy_preprocessor.json").read_text())
    (step,) = (one for one in document["steps"] if one["registry_name"] == "rename_observations_processor")
    cameras = [name for name in json.loads((saved / "config.json").read_text())["input_features"] if "images" in name]
    step["config"]["rename_map"] = {f"observation.images.dataset_{i}": name for i, name in enumerate(cameras)}
    (saved / "policy_preprocessor.json").write_text(json.dumps(document))
    return saved


def save_in_shards(base: Path, folder: Path) -> Path:
    """As NVIDIA's and transformers' trainers do; lerobot itself does not load such a folder."""
    from huggingface_hub import save_torch_state_dict

    saved = save_training(base, folder)
    weights = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    save_torch_state_dict(weights, saved, max_shard_size="1MB")
    assert (saved / "model.safetensors.index.json").is_file()
    return saved


def save_with_a_trainers_files(base: Path, folder: Path) -> Path:
    """What transformers' Trainer leaves beside the weights."""
    saved = save_training(base, folder)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.zeros(3)}, saved / name)
    (saved / "trainer_state.json").write_text(json.dumps({"global_step": 10}))
    return saved


def save_as_fsdp(base: Path, folder: Path) -> Path:
    """As from a training in several processes, which gathers the weights first (lerobot 0.6)."""
    saved = save_training(base, folder)
    policy, _, _ = stock_policy(saved)
    if "state_dict" not in policy.save_pretrained.__code__.co_varnames:
        pytest.skip("this lerobot cannot")
    (saved / "model.safetensors").unlink()
    policy.save_pretrained(saved, state_dict=policy.state_dict())
    return saved


def put_on_the_hub(base: Path, folder: Path, cache: Path) -> str:
    put_into_hub_cache(save_training(base, folder), cache, REPOSITORY)
    return f"{REPOSITORY}@main"


HEAD = "model.paligemma_with_expert.paligemma.lm_head.weight"
EMBEDDING = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"


def save_tied(base: Path, folder: Path) -> Path:
    """lerobot 0.4's models had one matrix for both, of which safetensors stores the first name and notes the other."""
    saved = save_training(base, folder)
    weights = load_file(saved / "model.safetensors")
    del weights[EMBEDDING]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt", EMBEDDING: HEAD})
    return saved


def save_as_published(base: Path, folder: Path) -> Path:
    """lerobot/pi0_base and pi05_base: no prefix, the head alone."""
    saved = save_tied(base, folder)
    weights = {name.removeprefix("model."): one for name, one in load_file(saved / "model.safetensors").items()}
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    return saved


def fine_tune_another_robots(base: Path, folder: Path) -> Path:
    """What ``lerobot-train --policy.path=BASE`` keeps of a base made for another robot: its ``input_features``."""

    def change(config: Any) -> None:
        config.input_features["observation.state"].shape = (6,)
        cameras = [feature for name, feature in config.input_features.items() if "images" in name]
        config.input_features["observation.images.of_the_base"] = cameras[0]

    return save_training(base, folder, change)


def publish_smolvla_base(_: Path, folder: Path) -> Path:
    return published.smolvla_base(folder)


def publish_pi0_base(_: Path, folder: Path) -> Path:
    return save_as_published(published.pi_base("pi0", folder / "made"), folder)


def publish_pi05_base(_: Path, folder: Path) -> Path:
    return save_as_published(published.pi_base("pi05", folder / "made"), folder)


@dataclass(frozen=True)
class Layout:
    """A row of the table.

    Attributes:
        family: The policy.
        name: What it is.
        make: Makes it, of the family's tiny checkpoint for the robot.
        features: The features that the robot's two cameras feed, where they are not its own: a base model's. It is
            calibrated by the bags' statistics.
    """

    family: str
    name: str
    make: Callable[..., Path | str]
    features: tuple[str, ...] = ()


LAYOUTS = [
    *(Layout(name, "saved by `lerobot-train`", save_training) for name in ("smolvla", "pi0", "pi05")),
    *(Layout(name, "saved by `lerobot-train`", save_training) for name in ("groot", "groot_n1_7")),
    Layout("smolvla", "saved by `lerobot-train` under FSDP", save_as_fsdp),
    Layout("smolvla", "`n_action_steps` below the chunk", save_with_fewer_steps),
    Layout("smolvla", "`empty_cameras`", save_with_an_empty_camera),
    Layout("pi05", "`empty_cameras`", save_with_an_empty_camera),
    Layout("smolvla", "trained with `--rename_map`", save_with_renamed_cameras),
    Layout("smolvla", "fine-tuned from a base with another state and one more camera", fine_tune_another_robots),
    Layout("smolvla", "as `lerobot/smolvla_base`", publish_smolvla_base, ("camera1", "camera2")),
    Layout("pi0", "as `lerobot/pi0_base`", publish_pi0_base, ("base_0_rgb", "left_wrist_0_rgb")),
    Layout("pi05", "as `lerobot/pi05_base`", publish_pi05_base, ("base_0_rgb", "left_wrist_0_rgb")),
    Layout("smolvla", "a repository in the hub's cache", put_on_the_hub),
    Layout("smolvla", "shards with an index", save_in_shards),
    Layout("smolvla", "a trainer's pickle files beside the weights", save_with_a_trainers_files),
    *(Layout(name, "saved by LeRobot 0.4", save_tied) for name in ("pi0", "pi05")),
]


# The commands


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A hub cache of this module's own, and no network."""
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("hub")
        patch.setattr(constants, "HF_HUB_CACHE", str(folder))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield folder


@pytest.fixture(params=LAYOUTS, ids=lambda layout: f"{layout.family}: {layout.name}")
def layout(request: pytest.FixtureRequest) -> Layout:
    try:
        check_lerobot(family_named(request.param.family))
    except ClpError as error:
        pytest.skip(str(error))
    return request.param


def stock_chunk(folder: Path, size: int, cameras: Collection[str]) -> torch.Tensor:
    """A chunk by stock lerobot's own way, loading and processors too, of a robot's state and cameras."""
    policy, preprocessor, postprocessor = stock_policy(folder)
    sample: dict[str, Any] = {"task": [TASK], "observation.state": torch.zeros(1, size)}
    for name in cameras:
        sample[name] = torch.full((1, *policy.config.image_features[name].shape), 0.5)
    with torch.inference_mode(), quiet():
        return postprocessor(policy.predict_action_chunk(preprocessor(sample)))[0].float()


def test_every_command_takes_what_lerobot_saves(
    layout: Layout, cache: Path, family_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base = family_checkpoint(layout.family, ROBOT)
    make = partial(layout.make, cache=cache) if layout.make is put_on_the_hub else layout.make
    given = str(make(base, tmp_path / "run"))
    calibration, pruned = tmp_path / "calibration", tmp_path / "pruned"
    bag = ["--bag", str(ROOT / "rosbags" / ROBOT), "--task", TASK, "--samples", "1", "--embodiment"]
    if layout.features:
        bag += [robot(tmp_path, layout.features), "--statistics", "bags"]
    else:
        bag.append(ROBOT)
    arguments = {
        "inspect": ["inspect", given],
        "calibrate": ["calibrate", "--checkpoint", given, *bag, "--device", "cpu", "--output", str(calibration)],
        "prune": ["prune", "--checkpoint", given, "--calibration", str(calibration), "--output", str(pruned)],
        "verify": ["verify", str(pruned)],
    }
    capsys.readouterr()
    seen, reported = {}, {}
    for command, words in arguments.items():
        seen[command] = "yes" if main([*words, "--json"]) == 0 else "no"
        out, reported[command] = capsys.readouterr()
        if command == "inspect":
            assert json.loads(out)["family"] == layout.family
        elif command == "prune":
            result = json.loads(out)
            assert result["unchecked"] is None
            assert sum(map(len, result["removed"].values())) > 0
            assert not [
                path for path in pruned.rglob("*") if path.is_symlink() or path.suffix in (".bin", ".pt", ".pth")
            ]
        elif command == "verify":
            assert json.loads(out)["source"] == "unchanged"
    ours = load_policy(pruned, "cpu")
    chunk = stock_chunk(pruned, ours.state_size, ours.image_features)
    assert chunk.shape == (ours.chunk_size, ours.action_size)
    seen["LeRobot"] = "yes" if torch.isfinite(chunk).all() else "no"
    row = f"| `{layout.family}` | {layout.name} | {' | '.join(seen[command] for command in COMMANDS)} |"
    assert row in table_rows(), (row, reported)


def robot(folder: Path, features: tuple[str, ...]) -> str:
    """The robot's own file, its cameras feeding these features."""
    document = yaml.safe_load((ROOT / "config" / "embodiments" / f"{ROBOT}.yaml").read_text())
    for camera, key in zip(document["cameras"].values(), features, strict=True):
        camera["feature"] = f"observation.images.{key}"
    path = folder / "robot.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return str(path)


def table_rows() -> list[str]:
    page = (ROOT / "doc" / "reference" / "checkpoint-layouts.md").read_text(encoding="utf-8")
    start = page.index("| policy | layout |")
    return page[start : page.index("\n\n", start)].splitlines()


def test_the_table_has_a_row_a_layout_and_no_other() -> None:
    heading, _, *rows = table_rows()
    assert heading == f"| policy | layout | {' | '.join(COMMANDS)} |"
    assert [tuple(row.split(" | ")[:2]) for row in rows] == [(f"| `{one.family}`", one.name) for one in LAYOUTS]


# What has to be converted first


def test_lerobots_migration_of_old_statistics_gives_what_works(
    family_checkpoint: Callable[..., Path],
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command that the refusal names is run as it stands there."""
    from huggingface_hub import ModelCard
    from lerobot.processor import migrate_policy_normalization

    old = save_training(family_checkpoint("smolvla", ROBOT), tmp_path / "run")
    weights = load_file(old / "model.safetensors")
    for file, prefix in (("pre", "normalize_inputs"), ("post", "unnormalize_outputs")):
        (statistics,) = old.glob(f"policy_{file}processor_step_*_*normalizer_processor.safetensors")
        for key, value in load_file(statistics).items():
            feature, _, statistic = key.rpartition(".")
            if statistic in ("mean", "std") and feature in ("observation.state", "action"):
                weights[f"{prefix}.buffer_{feature.replace('.', '_')}.{statistic}"] = value
    for file in old.glob("policy_*processor*"):
        file.unlink()
    save_file(weights, old / "model.safetensors", metadata={"format": "pt"})
    assert main(["inspect", str(old)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    command = re.search(r"python -m lerobot\.processor\.migrate_policy_normalization (.+)$", line)[1].split()
    monkeypatch.setattr("sys.argv", ["migrate", *command])
    monkeypatch.setattr(ModelCard, "validate", lambda card: None)  # it asks the hub
    with quiet():
        migrate_policy_normalization.main()
    new = Path(command[-1])
    shutil.copytree(family_checkpoint("smolvla", ROBOT) / "vlm", new / "vlm", dirs_exist_ok=True)
    document = json.loads((new / "policy_preprocessor.json").read_text())
    for step in document["steps"]:  # the hub's name of the tiny one's tokenizer
        if step["registry_name"] == "tokenizer_processor":
            step["config"]["tokenizer_name"] = str(new / "vlm")
    (new / "policy_preprocessor.json").write_text(json.dumps(document))
    capsys.readouterr()
    assert main(["verify", str(new)]) == 0, capsys.readouterr().err


def test_an_adapter_is_merged_as_the_page_shows(
    family_checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peft = pytest.importorskip("peft")
    base = family_checkpoint("smolvla", ROBOT)
    saved = save_training(base, tmp_path / "run")
    policy, _, _ = stock_policy(saved)
    targets = r".*lm_expert\.layers\.\d+\.self_attn\.(q|v)_proj"
    adapted = peft.get_peft_model(policy, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapter = tmp_path / "outputs/train/run/checkpoints/last/pretrained_model"
    shutil.copytree(saved, adapter)
    (adapter / "model.safetensors").unlink()
    with quiet():
        adapted.save_pretrained(adapter)
    assert main(["inspect", str(adapter)]) == 1
    reported = capsys.readouterr().err
    assert f"a PEFT adapter of {base}" in reported
    assert "doc/how-to/checkpoints.md" in reported
    (program,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "doc/how-to/checkpoints.md").read_text(), re.DOTALL | re.MULTILINE
    )
    monkeypatch.chdir(tmp_path)
    with quiet():
        exec(compile(program, "doc/how-to/checkpoints.md", "exec"), {})
    before, merged = (load_file(folder / "model.safetensors") for folder in (saved, tmp_path / "merged"))
    assert merged.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert changed == {name for name in merged if re.fullmatch(targets + r"\.weight", name)}
    assert main(["verify", str(tmp_path / "merged")]) == 0, capsys.readouterr().err
