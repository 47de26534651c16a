"""A Hugging Face checkpoint folder: config.json and safetensors or .bin weights, whole or in shards."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from converters.sources import Source, SourceTensor
from converters.sources.mistral import read_params, rename_tensors, to_halves
from converters.sources.prequantized import restore_weights
from converters.sources.safetensors_file import read_tensors
from converters.sources.sentence_transformers import read_modules
from converters.sources.state_dict import find_weights, unwrap
from edgellm.errors import CheckpointError

# in order of preference, as transformers looks for them: (index or single file, kind)
_LAYOUTS = (
    ("model.safetensors", "safetensors"),
    ("model.safetensors.index.json", "safetensors"),
    ("pytorch_model.bin", "torch"),
    ("pytorch_model.bin.index.json", "torch"),
    ("consolidated.safetensors.index.json", "safetensors"),
)


def open_folder(folder: Path) -> Source:
    """Names, shapes and types of every tensor, from headers; nothing is loaded but pickles' skeletons."""
    if not (folder / "params.json").exists():
        read_config(folder)  # its message fits a folder without a config better than what comes below
    for name, kind in _LAYOUTS:
        path = folder / name
        if not path.exists():
            continue
        reader = read_tensors if kind == "safetensors" else _torch_reader()
        tensors = _read_shards(path, reader) if name.endswith(".json") else reader(path)
        if not tensors:
            raise CheckpointError(f"{path} holds no tensors; save the model again")
        return make_source(folder, kind, tensors)
    found = find_weights(folder)
    if found:
        return make_source(folder, *found)
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder} holds an adapter, not a model; convert the base model it was trained on")
    raise CheckpointError(f"{folder} holds no weights (no {', no '.join(name for name, _ in _LAYOUTS)})")


def make_source(folder: Path, kind: str, stored: Mapping[str, SourceTensor]) -> Source:
    """The checkpoint with usual names and float weights, whatever wrote it; CheckpointError says what it lacks."""
    tensors = unwrap(stored)
    if "tok_embeddings.weight" in tensors and (folder / "params.json").exists():
        config = read_params(read_json_object(folder / "params.json"))
        renamed, notes = restore_weights(config, rename_tensors(tensors))
        return Source(folder, kind, config, to_halves(renamed, config), notes=notes)
    config = read_config(folder)
    tensors, notes = restore_weights(config, tensors)
    fields, dense = read_modules(folder)
    return Source(folder, kind, config | fields, tensors | dense, notes=notes)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder; CheckpointError where it is missing or no JSON object."""
    path = folder / "config.json"
    if not path.exists():
        if (folder / "adapter_config.json").exists():
            raise CheckpointError(f"{folder} holds an adapter, not a model; convert the base model it was trained on")
        raise CheckpointError(f"{folder} is no checkpoint folder: it has no config.json; give the model's own folder")
    return read_json_object(path)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object; CheckpointError says what is wrong with it."""
    content = _read_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected an object; save the checkpoint again")
    return content


def read_json_list(path: Path) -> list[dict[str, Any]]:
    """A JSON file that must hold a list of objects; CheckpointError as above."""
    content = _read_json(path)
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise CheckpointError(f"{path} isn't a list of objects; save the checkpoint again")
    return content


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise CheckpointError(f"cannot read {path}: {exc.strerror or exc}") from exc
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(
            f"{path} is no valid JSON: {str(exc).splitlines()[0]}; save the checkpoint again"
        ) from exc


def _torch_reader() -> Callable[[Path], dict[str, SourceTensor]]:
    from converters.sources.pickled import read_pickled

    return read_pickled


def _read_shards(index_path: Path, reader: Callable[[Path], dict[str, SourceTensor]]) -> dict[str, SourceTensor]:
    """All shards of an index, which must agree with it in both directions."""
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index_path} has no weight_map of tensor to shard file; save the checkpoint again")
    shards = sorted(set(weight_map.values()))
    paths = {shard: _inside(index_path, shard) for shard in shards}
    missing = [shard for shard, path in paths.items() if not path.exists()]
    if missing:
        raise CheckpointError(
            f"{index_path.parent} lacks {len(missing)} of {len(shards)} shards: {', '.join(missing)}; copy them there"
        )
    tensors: dict[str, SourceTensor] = {}
    for shard, path in paths.items():
        found = reader(path)
        _compare_with_index(shard, found, weight_map)
        twice = found.keys() & tensors.keys()
        if twice:
            raise CheckpointError(f"tensor {min(twice)} stands in {shard} and in another shard; save it again")
        tensors.update(found)
    return tensors


def _inside(index_path: Path, shard: str) -> Path:
    """The path of a shard; the index of a downloaded model must not name files outside its folder."""
    name = Path(shard)
    if name.is_absolute() or ".." in name.parts or "\\" in shard or ":" in shard:
        raise CheckpointError(
            f"{index_path} names {shard!r}, outside the checkpoint's folder; don't use this checkpoint"
        )
    return index_path.parent / name


def _compare_with_index(shard: str, found: Mapping[str, SourceTensor], weight_map: Mapping[str, str]) -> None:
    announced = {name for name, where in weight_map.items() if where == shard}
    lacking, extra = sorted(announced - found.keys()), sorted(found.keys() - announced)
    if lacking or extra:
        what = [
            f"lacks {', '.join(lacking[:3])}" if lacking else "",
            f"also has {', '.join(extra[:3])}" if extra else "",
        ]
        raise CheckpointError(f"{shard} and the index disagree: it {' and '.join(filter(None, what))}; save it again")
