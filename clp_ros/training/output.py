# SPDX-License-Identifier: Apache-2.0
"""Makes a whole checkpoint of what lerobot's training saves, which leaves out some files of the checkpoint before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clp_ros.checkpoints.folder import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE
from clp_ros.core.errors import ClpError
from clp_ros.core.files import rewrite_json

if TYPE_CHECKING:
    from clp_ros.policies.checkpoint import Checkpoint

RECORD_FILE, PAGE_FILE = "training.json", "training.html"
"""What was trained and how, and the page with the loss curve."""
ADAPTER_CONFIG = "adapter_config.json"


def assemble(checkpoint: Checkpoint, saved: Path, folder: Path, target: Path, restored: tuple[str, ...] = ()) -> None:
    """Fills an empty folder with a checkpoint that lerobot's training saved.

    Files of the source that lerobot does not save are copied: its manifest (clp.json), the VLM's tokenizer.

    Args:
        checkpoint: The checkpoint that was fine-tuned.
        saved: lerobot's ``pretrained_model`` folder.
        folder: The empty folder.
        target: What the folder will be renamed to.
        restored: Fields of config.json that get the source's values.

    Raises:
        ClpError: The saved folder is an adapter that cannot be merged.
    """
    if (saved / ADAPTER_CONFIG).is_file():
        merge_adapter(checkpoint, saved, folder)
    for path in sorted(saved.iterdir()):
        if path.name not in (ADAPTER_CONFIG, "adapter_model.safetensors", "README.md", CONFIG_FILE) or (
            path.name == CONFIG_FILE and not (folder / CONFIG_FILE).exists()
        ):
            shutil.copy2(path, folder / path.name)
    weights = {WEIGHTS_FILE, INDEX_FILE, *checkpoint.weight_files}
    old_states = {name for name in checkpoint.files if "/" not in name and name.endswith(".safetensors")}
    for name in checkpoint.files.keys() - weights - old_states - {RECORD_FILE, PAGE_FILE}:
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(checkpoint.path / name, folder / name)

    def change(documents: dict[str, dict[str, Any]]) -> None:
        config = documents[CONFIG_FILE]
        for name in ("device", *restored):
            if name in checkpoint.config:
                config[name] = checkpoint.config[name]
        checkpoint.family.rewrite_local_paths(documents, target.resolve(), folder)

    rewrite_json(folder, change)


def merge_adapter(checkpoint: Checkpoint, saved: Path, folder: Path) -> None:
    """Adds an adapter to the weights of its checkpoint, and saves config.json and the weights into ``folder``."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class
    from peft import PeftModel

    from clp_ros.policies.quiet import quiet

    with quiet():
        config = PreTrainedConfig.from_pretrained(saved)
        config.use_peft = False
        config.device = "cpu"
        policy = get_policy_class(config.type).from_pretrained(checkpoint.path, config=config, strict=True)
        merged = PeftModel.from_pretrained(policy, str(saved)).merge_and_unload()
        merged.save_pretrained(folder)


def copy_adapter(saved: Path, folder: Path) -> None:
    """Fills an empty folder with an adapter, as stock lerobot loads it with ``--policy.path``."""
    shutil.copytree(saved, folder, dirs_exist_ok=True)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes ``training.json``."""
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def check_source(checkpoint: Checkpoint) -> None:
    """Refuses a checkpoint that lerobot's training does not load.

    Raises:
        ClpError: It is a base model of another layout, or its weights are in several files.
    """
    if not checkpoint.family.loads(checkpoint.config):
        family = checkpoint.family.name
        raise ClpError(
            "lerobot loads this layout only as the base model of a new policy",
            where=checkpoint.path,
            hint=f"run `lerobot-train --policy.type={family} --policy.base_model_path={checkpoint.path} …`",
        )
    if WEIGHTS_FILE not in checkpoint.files:
        raise ClpError(
            f"lerobot reads one {WEIGHTS_FILE}, not shards",
            where=checkpoint.path,
            hint="merge the shards into one file, or prune the checkpoint with `clp prune`, which merges them",
        )
