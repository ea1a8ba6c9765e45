# SPDX-License-Identifier: Apache-2.0
"""Switching between two task heads of a loaded base against loading a whole checkpoint: time and memory.

    python benchmarks/head_switch.py [CHECKPOINT] [--family smolvla] [--layers 2] [--switches 10] [--scratch FOLDER]

Without a checkpoint, a full-size one of the family with random weights is made first. Two fine-tuned checkpoints are
made of it: other values in the last layers of each stack and in the output projections. Their heads are extracted.
Then:
  load    a whole checkpoint, as the policy node loads it, with the files in the page cache
  heads   both heads, into the loaded base
  switch  from one head to the other; a chunk is not predicted
Memory is the growth of the process's resident set.
"""

import argparse
import gc
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from results import Table, add_output_argument, write_results

from clp_ros.checkpoints.layer_keys import LayerKeys
from clp_ros.core.files import atomic_folder
from clp_ros.policies.checkpoint import Checkpoint
from clp_ros.policies.loading import load_policy
from clp_ros.training.heads import extract_head
from clp_ros.training.task_heads import load_task_heads

TASKS = ("Pick up the cube.", "Open the drawer.")


def _resident_mib() -> float:
    gc.collect()
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024


def _make_checkpoint(family: str, folder: Path) -> None:
    from clp_ros.policies.features import LIBERO
    from clp_ros.policies.registry import family_named

    with atomic_folder(folder) as temporary:
        family_named(family).make_checkpoint("full", temporary, folder, LIBERO, 0)


def _make_finetuned(base: Path, folder: Path, layers: int, seed: int) -> None:
    """Copies a checkpoint, with other values in the last layers and the output projections."""
    import torch
    from safetensors.torch import load_file, save_file

    checkpoint = Checkpoint.open(base)
    keys = LayerKeys(checkpoint.layer_stacks, base)
    generator = torch.Generator().manual_seed(seed)
    shutil.copytree(base, folder)
    weights = load_file(base / "model.safetensors")
    for name, tensor in weights.items():
        key = keys.split(name)
        if key is None:
            is_trained = name.startswith(checkpoint.family.output_projections)
        else:
            is_trained = key.layer >= checkpoint.layers[key.module] - layers
        if is_trained:
            weights[name] = tensor + 0.01 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def measure(base: Path, scratch: Path, layers: int, switches: int) -> Table:
    """Measures loading and switching.

    Args:
        base: A checkpoint.
        scratch: An empty folder.
        layers: Number of layers of each stack that differ.
        switches: How often the head is exchanged.

    Returns:
        Seconds, MiB, and the ratio to loading a whole checkpoint.
    """
    heads = {}
    for seed, task in enumerate(TASKS, 1):
        _make_finetuned(base, scratch / f"finetuned{seed}", layers, seed)
        heads[task] = scratch / f"head{seed}"
        found = extract_head(base, scratch / f"finetuned{seed}", heads[task])
    load_policy(scratch / "finetuned1", "cpu")  # imports, and the page cache
    before = _resident_mib()
    start = time.perf_counter()
    policy = load_policy(base, "cpu")
    load_s = time.perf_counter() - start
    load_mib = _resident_mib() - before
    before = _resident_mib()
    start = time.perf_counter()
    both = load_task_heads(policy, heads, TASKS[0])
    heads_s = time.perf_counter() - start
    heads_mib = _resident_mib() - before
    before = _resident_mib()
    seconds = []
    for number in range(1, switches + 1):
        start = time.perf_counter()
        both.switch(TASKS[number % 2])
        seconds.append(time.perf_counter() - start)
    table = Table(
        "what is done",
        {"time": "ms", "time / load": None, "memory": "MiB", "tensors": "MiB"},
    )
    nbytes = Checkpoint.open(base).nbytes / 2**20
    head_mib = both.heads[TASKS[0]].nbytes / 2**20
    for row, one_s, memory, size in (
        ("load a whole checkpoint", load_s, load_mib, nbytes),
        ("add both heads", heads_s, heads_mib, 2 * head_mib),
        ("switch", statistics.median(seconds), _resident_mib() - before, head_mib),
        ("slowest switch", max(seconds), None, head_mib),
    ):
        table.rows[row] = {
            "time": round(1e3 * one_s, 2),
            "time / load": round(one_s / load_s, 5),
            "memory": None if memory is None else round(memory, 1),
            "tensors": round(size, 1),
        }
    table.rows["load a whole checkpoint"] |= {"time / load": 1.0}
    share = found.parameters / found.total
    print(f"a head has {100 * share:.1f} % of the parameters")
    return table


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--family", default="smolvla")
    parser.add_argument("--layers", type=int, default=2, help="layers of each stack that differ")
    parser.add_argument("--switches", type=int, default=10)
    parser.add_argument("--scratch", type=Path, help="folder for the checkpoints (default: a temporary one)")
    add_output_argument(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        base = options.checkpoint
        if base is None:
            base = Path(scratch, "base")
            _make_checkpoint(options.family, base)
        table = measure(base.absolute(), Path(scratch), options.layers, options.switches)
    for row, values in table.rows.items():
        print(row, values)
    notes = [f"The last {options.layers} layers of each stack and the output projections differ from the base."]
    write_results(options.output, [table], notes)


if __name__ == "__main__":
    main()
