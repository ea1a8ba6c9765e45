# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints of SmolVLA's layout, written by the safetensors library, and every way to damage one."""

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from clp_ros.checkpoints.layer_stack import LayerStack

ROOT = Path(__file__).resolve().parents[1]
TOWERS = {
    "vlm": "model.vlm_with_expert.vlm.model.text_model.layers.",
    "expert": "model.vlm_with_expert.lm_expert.layers.",
}
LAYERS = 6
_SHARD_OF = "model-{}-of-00002.safetensors"


def layer_key(module: str, layer: int, rest: str = "mlp.weight") -> str:
    return f"{TOWERS[module]}{layer}.{rest}"


def synthetic_tensors(layers: int = LAYERS, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors: float16 towers (the expert's odd layers of another shape) amid float32 projections."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(layers):
        for module, width in (("vlm", 6), ("expert", 4)):
            keys = 6 if module == "expert" and layer % 2 else width
            shapes = {"mlp.weight": (width, 2 * width), "self_attn.k_proj.weight": (3, keys), "norm.weight": (width,)}
            for rest, shape in shapes.items():
                tensors[layer_key(module, layer, rest)] = rng.standard_normal(shape).astype(np.float16)
    tensors["model.state_proj.weight"] = rng.standard_normal((5, 3)).astype(np.float32)
    tensors["model.vlm_with_expert.vlm.model.embed.weight"] = rng.standard_normal((70, 70)).astype(np.float16)
    tensors["model.scale"] = np.array(rng.standard_normal(), np.float32)
    tensors["model.nothing"] = np.zeros((0, 4), np.float16)
    return tensors


def write_synthetic(folder: Path, layers: int = LAYERS, shards: int = 1, seed: int = 0) -> Path:
    """Writes a checkpoint with all that a real one has: processors, their statistics, a VLM folder, a card."""
    folder.mkdir(parents=True)
    config = {
        "type": "smolvla",
        "num_vlm_layers": layers,
        "num_expert_layers": 0,
        "vlm_model_name": str(folder / "vlm"),
        "optimizer_lr": 1e-4,
    }
    (folder / "config.json").write_text(json.dumps(config))
    steps = [{"registry_name": "tokenizer_processor", "config": {"tokenizer_name": str(folder / "vlm")}}]
    (folder / "policy_preprocessor.json").write_text(json.dumps({"name": "policy_preprocessor", "steps": steps}))
    (folder / "notes.json").write_text("[1, 2]")
    (folder / "README.md").write_text("A card.\n")
    (folder / "vlm").mkdir()
    (folder / "vlm" / "tokenizer.json").write_text('{"model": {}}')
    save_file({"observation.state.mean": np.zeros(3, np.float32)}, folder / "policy_preprocessor_step_5.safetensors")
    write_weights(folder, synthetic_tensors(layers, seed), shards)
    return folder


def write_weights(
    folder: Path, tensors: Mapping[str, np.ndarray], shards: int = 1, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes the weights into one file, or into shards with their index."""
    notes = {"format": "pt", **(metadata or {})}
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata=notes)
        return
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata=notes)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def split_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join_file(path: Path, header: Any, data: bytes) -> None:
    """Writes a safetensors file of any header, JSON text or an object, and any data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def edit_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A damage that edits the header of the weights in place."""

    def damage(folder: Path) -> None:
        header, data = split_file(weights(folder))
        change(header)
        join_file(weights(folder), header, data)

    return damage


def edit_tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    """A damage that edits the tensors, in a file that is otherwise sound."""

    def damage(folder: Path) -> None:
        tensors = synthetic_tensors()
        change(tensors)
        write_weights(folder, tensors)

    return damage


def edit_json(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        document = json.loads((folder / name).read_text())
        change(document)
        (folder / name).write_text(json.dumps(document))

    return damage


def _shards(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    """A damage to the same checkpoint in two shards."""

    def damage(folder: Path) -> None:
        weights(folder).unlink()
        write_weights(folder, synthetic_tensors(), shards=2)
        change(folder)

    return damage


def _edit_map(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    return _shards(edit_json("model.safetensors.index.json", lambda index: change(index["weight_map"])))


def _truncate(folder: Path, size: int) -> None:
    os.truncate(weights(folder), size)


def _set_length(folder: Path, length: int) -> None:
    raw = weights(folder).read_bytes()
    weights(folder).write_bytes(length.to_bytes(8, "little") + raw[8:])


def _rename_key(old: str, new: str) -> Callable[[Path], None]:
    return edit_header(lambda header: header.__setitem__(new, header.pop(old)))


def _repeat_key(folder: Path) -> None:
    header, data = split_file(weights(folder))
    text = json.dumps(header)
    twice = json.dumps({"model.scale": header["model.scale"]})[1:-1]
    join_file(weights(folder), (text[:-1] + ", " + twice + "}").encode(), data)


def _shift(name: str, start: int, end: int) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        offsets = header[name]["data_offsets"]
        header[name]["data_offsets"] = [offsets[0] + start, offsets[1] + end]

    return change


def _forget_first(header: dict[str, Any]) -> None:
    del header[min(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])]


def _set(name: str, field: str, value: Any) -> Callable[[Path], None]:
    return edit_header(lambda header: header[name].__setitem__(field, value))


def _link_loop(folder: Path) -> None:
    (folder / "vlm" / "again").symlink_to(folder, target_is_directory=True)


def _drop_layer(layer: int) -> Callable[[Path], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.startswith(f"{TOWERS['vlm']}{layer}.")]:
            del tensors[name]

    return edit_tensors(change)


def _set_config(**fields: Any) -> Callable[[Path], None]:
    return edit_json("config.json", lambda config: config.update(fields))


def _earlier_step(folder: Path) -> None:
    shutil.copytree(folder / "checkpoints" / "000020", folder / "checkpoints" / "000010")


def _make_adapter(folder: Path, base: str | None) -> None:
    weights(folder).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))


def _move_into(folder: Path, name: str) -> None:
    inside = folder.parent / "inside"
    folder.rename(inside)
    (folder / name).parent.mkdir(parents=True)
    inside.rename(folder / name)


LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 906712520\n"
EMBED = "model.vlm_with_expert.vlm.model.embed.weight"
K5 = layer_key("expert", 5, "self_attn.k_proj.weight")

# name: (damage to the folder that write_synthetic wrote, what the error must say)
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "folder missing": (shutil.rmtree, "does not exist"),
    "folder is a file": (lambda f: (shutil.rmtree(f), f.write_text("")), "is not a folder"),
    "folder empty": (lambda f: (shutil.rmtree(f), f.mkdir()), "no config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{type: smolvla"), "not valid JSON"),
    "config is no UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"\xff": 1}'), "not valid JSON"),
    "config nested absurdly": (lambda f: (f / "config.json").write_text("[" * 200_000), "not valid JSON"),
    "config holds an absurd number": (lambda f: (f / "config.json").write_text('{"a": ' + "9" * 5000 + "}"), "JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "config repeats a key": (
        lambda f: (f / "config.json").write_text('{"type": "smolvla", "type": "act"}'),
        "'type' occurs twice",
    ),
    "config is a folder": (lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), "no config.json"),
    "unknown family": (_set_config(type="act"), "no known family"),
    "no family": (_set_config(type=None), "no known family"),
    "family of a wrong type": (_set_config(type=["smolvla"]), "no known family"),
    "depth missing": (edit_json("config.json", lambda config: config.pop("num_vlm_layers")), "num_vlm_layers"),
    "depth is text": (_set_config(num_vlm_layers="6"), "num_vlm_layers"),
    "depth is true": (_set_config(num_vlm_layers=True), "num_vlm_layers"),
    "depth is 0": (_set_config(num_vlm_layers=0), "num_vlm_layers"),
    "depth too small": (_set_config(num_vlm_layers=5), "hold layer 5 of vlm, but config.json gives it 5"),
    "depth too large": (_set_config(num_vlm_layers=7), "gives vlm 7 layers, but the weights hold 6"),
    "depth absurd": (_set_config(num_vlm_layers=10**15), "the weights hold 6"),
    "towers of two depths": (_set_config(num_expert_layers=3), "num_expert_layers"),
    "kinds of a wrong type": (_set_config(self_attn_every_n_layers="2"), "config.json"),
    "no weights": (lambda f: weights(f).unlink(), "neither model.safetensors nor"),
    "weights are a folder": (lambda f: (weights(f).unlink(), weights(f).mkdir()), "neither model.safetensors nor"),
    "weights are a FIFO": (lambda f: (weights(f).unlink(), os.mkfifo(weights(f))), "neither a file nor a folder"),
    "weights are a dangling link": (lambda f: (weights(f).unlink(), weights(f).symlink_to("gone")), "leads nowhere"),
    "a link in a circle": (_link_loop, "leads back"),
    "weights empty": (lambda f: _truncate(f, 0), "truncated"),
    "truncated in the length": (lambda f: _truncate(f, 7), "truncated"),
    "truncated in the header": (lambda f: _truncate(f, 500), "truncated"),
    "truncated by one byte": (lambda f: _truncate(f, weights(f).stat().st_size - 1), "truncated"),
    "truncated by half": (lambda f: _truncate(f, weights(f).stat().st_size // 2), "truncated"),
    "trailing byte": (lambda f: weights(f).open("ab").write(b"\0"), "1 bytes belong to no tensor"),
    "header length 0": (lambda f: _set_length(f, 0), "not valid JSON"),
    "header length too small": (lambda f: _set_length(f, 100), "not valid JSON"),
    "header length beyond the file": (lambda f: _set_length(f, 10**7), "its header 10000000"),
    "header length absurd": (lambda f: _set_length(f, 2**64 - 1), "more than 100000000"),
    "header no JSON": (lambda f: join_file(weights(f), b"{]", b""), "not valid JSON"),
    "header a list": (lambda f: join_file(weights(f), b"[]", b""), "not a JSON object"),
    "header without tensors": (lambda f: join_file(weights(f), {}, b""), "the weights hold 0"),
    "header repeats a tensor": (_repeat_key, "'model.scale' occurs twice"),
    "metadata is a list": (edit_header(lambda h: h.update(__metadata__=[])), "expected a map"),
    "metadata holds a number": (edit_header(lambda h: h.update(__metadata__={"a": 1})), "expected a string"),
    "tensor is a number": (edit_header(lambda h: h.update({EMBED: 1})), "expected struct TensorInfo"),
    "tensor without dtype": (edit_header(lambda h: h[EMBED].pop("dtype")), "missing field `dtype`"),
    "tensor with a further field": (_set(EMBED, "more", 1), "has more fields"),
    "dtype unknown": (_set(EMBED, "dtype", "F17"), "unknown variant `F17`"),
    "dtype a list": (_set(EMBED, "dtype", ["F16"]), "invalid type: sequence"),
    "dtype of another size": (_set(EMBED, "dtype", "F32"), "invalid shape, data type, or offset"),
    "shape of another size": (_set(EMBED, "shape", [70, 71]), "invalid shape, data type, or offset"),
    "shape negative": (_set(EMBED, "shape", [-70, -70]), "invalid value: integer `-70`"),
    "shape of floats": (_set(EMBED, "shape", [70.0, 70.0]), "floating point `70.0`"),
    "shape of a truth value": (_set("model.scale", "shape", [True]), "boolean `true`"),
    "shape text": (_set(EMBED, "shape", "70x70"), "expected a sequence"),
    "shape absurd": (_set(EMBED, "shape", [2**40] * 64), "overflow computing buffer size"),
    "shape beyond 64 bits": (_set(EMBED, "shape", [2**64]), "expected usize"),
    "offsets negative": (_set(EMBED, "data_offsets", [-9800, 0]), "invalid value: integer `-9800`"),
    "offsets reversed": (_set(EMBED, "data_offsets", [9800, 0]), f"invalid offset for tensor `{EMBED}`"),
    "offsets of truth values": (_set("model.nothing", "data_offsets", [False, False]), "boolean `false`"),
    "offsets three": (_set(EMBED, "data_offsets", [0, 9800, 9800]), "expected 2 elements"),
    "offsets of floats": (_set(EMBED, "data_offsets", [0.0, 9800.0]), "floating point `0.0`"),
    "offsets out of the file": (edit_header(_shift(EMBED, 10**6, 10**6)), "invalid offset for tensor"),
    "tensors overlap": (edit_header(_shift(EMBED, -2, -2)), "invalid offset for tensor"),
    "tensors leave a hole": (edit_header(lambda h: h.pop(layer_key("vlm", 2))), "invalid offset for tensor"),
    "data does not start at 0": (edit_header(_forget_first), "invalid offset for tensor"),
    "name with a slash": (_rename_key(EMBED, "model/embed"), "looks like a path"),
    "name with a backslash": (_rename_key(EMBED, "model\\embed"), "looks like a path"),
    "name with two dots": (_rename_key(EMBED, "..embed"), "looks like a path"),
    "name with a NUL": (_rename_key(EMBED, "model\0embed"), "looks like a path"),
    "name empty": (_rename_key(EMBED, ""), "looks like a path"),
    "name with half a surrogate pair": (_rename_key(EMBED, "a\ud800"), "invalid JSON in header"),
    "layer number with a zero": (
        _rename_key(layer_key("vlm", 3), f"{TOWERS['vlm']}03.mlp.weight"),
        "has no layer number",
    ),
    "layer number negative": (_rename_key(layer_key("vlm", 3), f"{TOWERS['vlm']}-3.mlp.weight"), "has no layer number"),
    "layer number Arabic-Indic": (
        _rename_key(layer_key("vlm", 3), f"{TOWERS['vlm']}٣.mlp.weight"),
        "has no layer number",
    ),
    "layer number absurd": (_rename_key(layer_key("vlm", 3), f"{TOWERS['vlm']}{'9' * 5000}.mlp.weight"), "no layer"),
    "first layer missing": (_drop_layer(0), "layer 0 of vlm is missing"),
    "middle layer missing": (_drop_layer(3), "layer 3 of vlm is missing"),
    "last layer missing": (_drop_layer(5), "gives vlm 6 layers, but the weights hold 5"),
    "extra layer": (
        edit_tensors(lambda t: t.update({layer_key("vlm", 6): t[layer_key("vlm", 5)]})),
        "the weights hold layer 6 of vlm, but config.json gives it 6",
    ),
    "extra layer far away": (
        edit_tensors(lambda t: t.update({layer_key("expert", 999): t[layer_key("expert", 5)]})),
        "hold layer 999 of expert",
    ),
    "tensor missing in a layer": (
        edit_tensors(lambda t: t.pop(layer_key("vlm", 3))),
        "layer 3 of vlm lacks mlp.weight",
    ),
    "tensor extra in a layer": (
        edit_tensors(lambda t: t.update({layer_key("vlm", 3, "extra"): np.zeros(2)})),
        "layer 3 of vlm holds extra",
    ),
    "layer of the other kind": (
        edit_tensors(lambda t: t.update({K5: t[layer_key("expert", 4, "self_attn.k_proj.weight")]})),
        "layer 5 of expert has self_attn.k_proj.weight of shape [3, 4], the other layers [3, 6]",
    ),
    "weights in a pickle": (lambda f: weights(f).rename(f / "pytorch_model.bin"), "pytorch_model.bin: "),
    "weights in a pickle in capitals": (lambda f: weights(f).rename(f / "MODEL.PT"), "the weights are in a pickle"),
    "weights are a Git LFS pointer": (lambda f: weights(f).write_text(LFS_POINTER), "a Git LFS pointer"),
    "config is a Git LFS pointer": (lambda f: (f / "config.json").write_text(LFS_POINTER), "a Git LFS pointer"),
    "a PEFT adapter": (lambda f: _make_adapter(f, "lerobot/smolvla_base"), "a PEFT adapter of lerobot/smolvla_base"),
    "a PEFT adapter of nothing": (lambda f: _make_adapter(f, None), "an unnamed base model"),
    "a PEFT adapter alone": (
        lambda f: (_make_adapter(f, "lerobot/smolvla_base"), (f / "config.json").unlink()),
        "a PEFT adapter of lerobot/smolvla_base",
    ),
    "a tokenizer is a Git LFS pointer": (
        lambda f: ((f / "vlm").mkdir(exist_ok=True), (f / "vlm" / "tokenizer.json").write_text(LFS_POINTER)),
        "vlm/tokenizer.json: the file is a Git LFS pointer",
    ),
    "a training's output without its link": (
        lambda f: (_move_into(f, "checkpoints/000020/pretrained_model"), _earlier_step(f)),
        "checkpoints/000020/pretrained_model)",
    ),
    "a step of a training": (lambda f: _move_into(f, "pretrained_model"), "give "),
    "a training's checkpoints": (lambda f: _move_into(f, "last/pretrained_model"), "last/pretrained_model"),
    "a training's output": (
        lambda f: _move_into(f, "checkpoints/last/pretrained_model"),
        "checkpoints/last/pretrained_model",
    ),
    "statistics among the weights": (
        edit_tensors(lambda t: t.update({"normalize_inputs.buffer_observation_state.mean": np.zeros(3)})),
        "python -m lerobot.processor.migrate_policy_normalization --pretrained-path",
    ),
    "processor settings damaged": (lambda f: (f / "policy_preprocessor.json").write_text("{"), "not valid JSON"),
    "processor statistics missing": (
        edit_json("policy_preprocessor.json", lambda d: d["steps"].append({"state_file": "step_6.safetensors"})),
        "policy_preprocessor.json names 'step_6.safetensors', which is not in the folder",
    ),
    "processor statistics elsewhere": (
        edit_json("policy_preprocessor.json", lambda d: d["steps"].append({"state_file": "../gone.safetensors"})),
        "which is not in the folder",
    ),
    "processor statistics damaged": (lambda f: os.truncate(f / "policy_preprocessor_step_5.safetensors", 80), "trunc"),
    "shard missing": (_shards(lambda f: (f / _SHARD_OF.format("00001")).unlink()), "shard"),
    "shard without index": (_shards(lambda f: (f / "model.safetensors.index.json").unlink()), "neither"),
    "shard beside the single file": (
        lambda f: shutil.copy(weights(f), f / _SHARD_OF.format("00001")),
        "a shard without an index",
    ),
    "single file beside the index": (
        _shards(lambda f: write_weights(f, synthetic_tensors())),
        "more weights than the index names",
    ),
    "shard of another split": (
        _shards(lambda f: shutil.copy(f / _SHARD_OF.format("00001"), f / "model-00003-of-00009.safetensors")),
        "more weights than the index names",
    ),
    "index no JSON": (_shards(lambda f: (f / "model.safetensors.index.json").write_text("{")), "not valid JSON"),
    "index without a map": (
        _shards(lambda f: (f / "model.safetensors.index.json").write_text("{}")),
        "weight_map is not",
    ),
    "index lacks a tensor": (_edit_map(lambda m: m.pop(EMBED)), "not where the index says (nowhere)"),
    "index names a tensor too many": (_edit_map(lambda m: m.update(more=m[EMBED])), "the index names more"),
    "index names the other shard": (
        _edit_map(lambda m: m.update({EMBED: next(file for file in m.values() if file != m[EMBED])})),
        "not where the index says",
    ),
    "index names a path": (_edit_map(lambda m: m.update({EMBED: "../model.safetensors"})), "no plain file name"),
    "index names a sub-folder": (_edit_map(lambda m: m.update({EMBED: "vlm/m.safetensors"})), "no plain file name"),
    "index names an absolute path": (_edit_map(lambda m: m.update({EMBED: "/m.safetensors"})), "no plain file name"),
    "index names a Windows path": (_edit_map(lambda m: m.update({EMBED: "C:m.safetensors"})), "no plain file name"),
    "index names a pickle": (_edit_map(lambda m: m.update({EMBED: "model.bin"})), "no safetensors file"),
    "index names a number": (_edit_map(lambda m: m.update({EMBED: 1})), "no plain file name"),
    "tensor in two shards": (
        _shards(lambda f: save_file(synthetic_tensors(), f / _SHARD_OF.format("00002"))),
        "is in model-00001-of-00002.safetensors too",
    ),
    "manifest no JSON": (lambda f: (f / "clp.json").write_text("{"), "not valid JSON"),
    "manifest of something else": (lambda f: (f / "clp.json").write_text('{"schema_version": 1}'), "not a manifest"),
}


def remove_in_memory(policy: Any, modules: Sequence[LayerStack], removal: Mapping[str, Collection[int]]) -> Any:
    """A copy of a policy without some of its layers: what a checkpoint without them must act like.

    Nothing of surgery's is used: layers are taken out of their ``nn.ModuleList``, and whatever the model's own classes
    remember of depths and of a layer's place is set anew.

    Args:
        policy: lerobot's policy. It stays as it is.
        modules: Its family's modules.
        removal: 0-based layers that go, by module; a module that is not in it keeps its layers.
    """
    policy = copy.deepcopy(policy)
    depths = {}
    for module in modules:
        stack = policy.get_submodule(module.layers_path)
        for layer in sorted(removal.get(module.name, ()), reverse=True):
            del stack[layer]
        for place, layer in enumerate(stack):
            for part in layer.modules():
                if hasattr(part, "layer_idx"):
                    part.layer_idx = place
        config = getattr(policy.get_submodule(module.layers_path.rpartition(".")[0]), "config", None)
        for field in ("num_hidden_layers", "num_layers"):
            if hasattr(config, field):
                setattr(config, field, len(stack))
        depths[module.name] = len(stack)
    _set_depths(policy, depths)
    return policy


def _set_depths(policy: Any, depths: Mapping[str, int]) -> None:
    """Sets the depths that a model keeps besides those of its stacks' configs."""
    towers = getattr(getattr(policy, "model", None), "vlm_with_expert", None)
    if towers is not None:  # SmolVLA
        towers.num_vlm_layers, towers.num_expert_layers = depths["vlm"], depths["expert"]
    for part in policy.modules():
        if getattr(part, "select_layer", -1) > 0:  # GR00T: the hidden state it takes from the language model
            part.select_layer = depths["llm"]


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_into_hub_cache(folder: Path, cache: Path, repository: str, branch: str = "main") -> Path:
    """Lays a folder out as huggingface_hub's cache does: a snapshot of links to blobs, and a branch's commit."""
    place = cache / f"models--{repository.replace('/', '--')}"
    snapshot = place / "snapshots" / COMMIT
    (place / "blobs").mkdir(parents=True, exist_ok=True)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / branch).write_text(COMMIT)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            blob = place / "blobs" / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            link = snapshot / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


# Any try to reach a network fails, and is remembered.
_NO_NETWORK = """
import socket, sys

asked = []

def refuse(*arguments, **_):
    asked.append(arguments)
    raise OSError("no network here")

class Socket(socket.socket):
    connect = connect_ex = sendto = refuse

socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refuse
socket.socket = Socket
"""


def run_without_network(program: str, folder: Path, home: Path) -> None:
    """Runs a program, whose argument is ``folder``, that nothing tells to stay offline; it must not even try.

    Args:
        program: Python.
        folder: A checkpoint.
        home: Where a model hub's client would keep what it fetched.
    """
    env = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    env |= {"HF_HOME": str(home / "hub"), "HF_LEROBOT_HOME": str(home / "lerobot"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _NO_NETWORK + program + "\nassert not asked, asked\n", str(folder)]
    done = subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
