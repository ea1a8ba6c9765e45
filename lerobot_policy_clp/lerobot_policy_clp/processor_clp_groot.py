# SPDX-License-Identifier: Apache-2.0
"""Processors of GR00T N1.5 that are saved with all their files, and that accept action chunks.

LeRobot's processors run Python files from a cache folder. These files do not work with the version of transformers that
LeRobot 0.5.1 requires. Here, Eagle's processor is built from LeRobot's classes, and its tokenizer is saved with the
checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from lerobot.policies.groot.eagle2_hg_model.image_processing_eagle2_5_vl_fast import Eagle25VLImageProcessorFast
from lerobot.policies.groot.eagle2_hg_model.processing_eagle2_5_vl import Eagle25VLProcessor
from lerobot.policies.groot.processor_groot import DEFAULT_TOKENIZER_ASSETS_REPO, make_groot_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline, ProcessorStep, ProcessorStepRegistry
from lerobot.types import EnvTransition, TransitionKey
from lerobot.utils.constants import HF_LEROBOT_HOME
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer

from .configuration_clp_groot import ClpGrootConfig

# Eagle's files that hold settings; its Python files are never run.
_ASSETS = ("*.json", "*.txt", "*.jinja")
# One image is one tile of 224 pixels, as in LeRobot's GR00T.
_ONE_TILE = {"min_dynamic_tiles": 1, "max_dynamic_tiles": 1, "use_thumbnail": False}


@dataclass
@ProcessorStepRegistry.register(name="clp_groot_eagle")
class ClpGrootEagleStep(ProcessorStep):
    """Converts images and instructions to Eagle's inputs. It replaces LeRobot's encoding step and collating step.

    The files of Eagle's tokenizer and processor are the state of this step, so that they are saved with every
    checkpoint. Unlike in LeRobot's steps, each sample of a batch keeps its own instruction.

    Attributes:
        tokenizer_assets_repo: Folder or Hub repository from which these files are read if there is no state.
        max_task_tokens: Maximum number of tokens of an instruction. None: no maximum, as in LeRobot.
    """

    tokenizer_assets_repo: str = DEFAULT_TOKENIZER_ASSETS_REPO
    max_task_tokens: int | None = None
    _files: dict[str, bytes] = field(default_factory=dict, init=False, repr=False)
    _processor: Eagle25VLProcessor | None = field(default=None, init=False, repr=False)

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        """Adds ``eagle_input_ids``, ``eagle_attention_mask``, ``eagle_pixel_values`` and ``eagle_image_sizes``."""
        observation = transition.get(TransitionKey.OBSERVATION) or {}
        extra = transition.get(TransitionKey.COMPLEMENTARY_DATA) or {}
        if "video" not in observation:
            return transition
        video = observation.pop("video")  # (batch, time, cameras, 3, height, width) uint8
        tasks = extra.get("task")
        if not isinstance(tasks, list) or len(tasks) != len(video):
            tasks = [extra["language"]] * len(video)
        texts, pictures = [], []
        for frames, task in zip(video, tasks, strict=True):
            images = [Image.fromarray(np.moveaxis(frame, 0, -1)) for frame in frames.reshape(-1, *frames.shape[2:])]
            content = [{"type": "image", "image": image} for image in images]
            content.append({"type": "text", "text": str([self._cut(task or extra["language"])])})
            chat = [{"role": "user", "content": content}]
            texts.append(self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
            pictures += images
        inputs = self.processor(
            text=texts, images=pictures, images_kwargs=dict(_ONE_TILE), return_tensors="pt", padding=True
        )
        extra |= {f"eagle_{key}": value for key, value in inputs.items()}
        transition[TransitionKey.OBSERVATION] = observation
        transition[TransitionKey.COMPLEMENTARY_DATA] = extra
        return transition

    def _cut(self, task: str) -> str:
        if self.max_task_tokens is None:
            return task
        encoded = self.processor.tokenizer(task, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"][: self.max_task_tokens]]
        return task[: ends[-1]] if ends else task

    @property
    def processor(self) -> Eagle25VLProcessor:
        """Eagle's processor, built from LeRobot's classes with the settings in the files."""
        if self._processor is None:
            if not self._files:
                self._files = _read(_asset_folder(self.tokenizer_assets_repo))
            with TemporaryDirectory() as folder:
                for name, content in self._files.items():
                    (Path(folder) / name).write_bytes(content)
                self._processor = _eagle_processor(Path(folder))
        return self._processor

    def get_config(self) -> dict[str, Any]:
        """Returns the attributes."""
        return {"tokenizer_assets_repo": self.tokenizer_assets_repo, "max_task_tokens": self.max_task_tokens}

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the content of the files by name, as uint8."""
        if not self._files:
            self._files = _read(_asset_folder(self.tokenizer_assets_repo))
        return {name: torch.frombuffer(bytearray(content), dtype=torch.uint8) for name, content in self._files.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Sets the content of the files.

        Raises:
            ValueError: A name is not the name of one of Eagle's files.
        """
        for name in state:
            if Path(name).name != name or not any(Path(name).match(pattern) for pattern in _ASSETS):
                raise ValueError(f"{name!r} is not one of Eagle's files")
        self._files = {name: content.numpy().tobytes() for name, content in state.items()}
        self._processor = None

    def transform_features(self, features: Any) -> Any:
        """Returns the features unchanged, as LeRobot's steps do."""
        return features


@dataclass
@ProcessorStepRegistry.register(name="clp_groot_chunk")
class ClpGrootChunkStep(ProcessorStep):
    """Makes LeRobot's postprocessing step process all actions of a chunk. By itself, it keeps only the last.

    Attributes:
        fold: Whether this step is before LeRobot's, and reshapes (batch, time, size) to (batch · time, size). The step
            after LeRobot's has False, and reshapes the action back.
    """

    fold: bool = True

    def __call__(self, transition: EnvTransition) -> EnvTransition:
        """Reshapes the action. A single action, (batch, size), is not changed."""
        action = transition.get(TransitionKey.ACTION)
        extra = transition.get(TransitionKey.COMPLEMENTARY_DATA) or {}
        if self.fold and action.dim() == 3:
            extra["clp_groot_chunk"] = action.shape[:2]
            transition[TransitionKey.ACTION] = action.flatten(0, 1)
        elif not self.fold and "clp_groot_chunk" in extra:
            transition[TransitionKey.ACTION] = action.unflatten(0, extra.pop("clp_groot_chunk"))
        transition[TransitionKey.COMPLEMENTARY_DATA] = extra
        return transition

    def get_config(self) -> dict[str, Any]:
        """Returns the attribute."""
        return {"fold": self.fold}

    def transform_features(self, features: Any) -> Any:
        """Returns the features unchanged, as LeRobot's steps do."""
        return features


def make_clp_groot_pre_post_processors(
    config: ClpGrootConfig, dataset_stats: dict[str, dict[str, Tensor]] | None = None
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """Returns LeRobot's processors of GR00T, with this module's steps instead of those that do not work.

    LeRobot's other steps stay, because LeRobot overrides their settings by name whenever it loads a GR00T.
    """
    before, after = make_groot_pre_post_processors(config, dataset_stats)
    before.steps[3:5] = [ClpGrootEagleStep(config.tokenizer_assets_repo)]
    after.steps[:1] = [ClpGrootChunkStep(fold=True), after.steps[0], ClpGrootChunkStep(fold=False)]
    return before, after


def _asset_folder(repo: str) -> Path:
    """Returns the folder with Eagle's files: the given folder, LeRobot's, or a snapshot of the Hub repository."""
    for folder in (Path(repo), HF_LEROBOT_HOME / repo):
        if (folder / "processor_config.json").is_file():
            return folder
    return Path(snapshot_download(repo, allow_patterns=list(_ASSETS)))


def _read(folder: Path) -> dict[str, bytes]:
    files = (path for pattern in _ASSETS for path in sorted(folder.glob(pattern)))
    # These two belong to the model. transformers would run code that they name.
    return {
        path.name: path.read_bytes() for path in files if path.name not in ("config.json", "generation_config.json")
    }


def _eagle_processor(folder: Path) -> Eagle25VLProcessor:
    settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    names = ("image_token", "video_token", "tokens_per_tile", "image_start_token", "image_end_token")
    template = folder / "chat_template.jinja"
    if template.is_file():
        chat = template.read_text(encoding="utf-8")
    else:
        chat = json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))["chat_template"]
    # Eagle's processor needs tensors, but does not request them.
    images = Eagle25VLImageProcessorFast.from_pretrained(folder, return_tensors="pt")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    return Eagle25VLProcessor(
        images, tokenizer, chat_template=chat, **{name: settings[name] for name in names if name in settings}
    )
