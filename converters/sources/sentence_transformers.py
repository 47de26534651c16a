"""The modules sentence-transformers puts around a model: how token embeddings are pooled, and dense layers after."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from converters.sources import SourceTensor
from converters.sources.safetensors_file import read_tensors
from edgellm.errors import CheckpointError, UnsupportedArchitecture

# sentence-transformers' names, old and new, of what llama.cpp can do
_POOLINGS = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "lasttoken"}
# llama.cpp's enum llama_pooling_type
POOLING_NAMES = {1: "mean", 2: "cls", 3: "lasttoken"}


def read_modules(folder: Path) -> tuple[dict[str, Any], dict[str, SourceTensor]]:
    """Fields to add to the config (`sentence_pooling`, `dense_features`) and the dense layers' tensors.

    Both are empty for a folder without modules.json. CheckpointError or UnsupportedArchitecture for what can't be
    converted.
    """
    from converters.sources.huggingface import read_json_list, read_json_object

    fields: dict[str, Any] = {}
    tensors: dict[str, SourceTensor] = {}
    if not (folder / "modules.json").exists():
        return fields, tensors
    for module in read_json_list(folder / "modules.json"):
        kind, where = str(module.get("type", "")).rpartition(".")[2], Path(str(module.get("path", "")))
        if where.is_absolute() or ".." in where.parts:
            raise CheckpointError(f"modules.json names {str(where)!r}, outside the checkpoint's folder")
        if kind == "Pooling":
            fields["sentence_pooling"] = _pooling(read_json_object(folder / where / "config.json"))
        elif kind == "Dense":
            config = read_json_object(folder / where / "config.json")
            if config.get("bias") or not str(config.get("activation_function", "")).endswith("Identity"):
                raise UnsupportedArchitecture(f"a dense layer with bias or activation ({where}) isn't supported")
            stored = read_tensors(folder / where / "model.safetensors")
            tensors |= {f"{where}.{name}": replace(tensor, name=f"{where}.{name}") for name, tensor in stored.items()}
            fields.setdefault("dense_features", config.get("out_features"))
        elif kind not in ("Transformer", "Normalize"):
            raise UnsupportedArchitecture(f"sentence-transformers module {kind!r} isn't supported by llama.cpp")
    return fields, tensors


def write_modules(folder: Path, pooling: str) -> None:
    """modules.json and the pooling's config for a checkpoint made from a GGUF."""
    from converters.tokenizers.tokenizer_json import dump_json

    kinds = (("Transformer", ""), ("Pooling", "1_Pooling"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2), encoding="utf-8")
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {f"pooling_mode_{key}": name == pooling for key, name in _POOLINGS.items()}
    dump_json(folder / "1_Pooling" / "config.json", modes)


def _pooling(config: dict[str, Any]) -> str:
    modes = [key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on]
    named = config.get("pooling_mode")
    found = [_POOLINGS.get(mode, mode) for mode in modes] or [str(named)]
    if len(found) != 1 or found[0] not in _POOLINGS.values():
        raise UnsupportedArchitecture(
            f"pooling {' + '.join(found)} isn't supported: llama.cpp has mean, cls, last token"
        )
    return found[0]
