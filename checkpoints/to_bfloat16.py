# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint again with bfloat16 weights: ``python to_bfloat16.py CHECKPOINT OUTPUT``. Half the bytes."""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from clp_ros.core.files import atomic_folder, rewrite_json
from clp_ros.policies.checkpoint import Checkpoint

WEIGHTS = "model.safetensors"


def main(source: Path, output: Path) -> None:
    """Casts the weights, and copies all else."""
    checkpoint = Checkpoint.open(source)
    with atomic_folder(output, overwrite=False) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        weights = {
            name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
            for name, tensor in load_file(source / WEIGHTS).items()
        }
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        rewrite_json(
            folder, lambda documents: checkpoint.family.rewrite_local_paths(documents, output.absolute(), folder)
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
