"""What is in a checkpoint or adapter, from headers alone, as plain data for `edgellm inspect`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from converters.adapters.read import read_weights
from converters.damage import blamed_on
from converters.sources import SourceTensor
from converters.sources.huggingface import open_folder, read_json_object
from converters.sources.safetensors_file import read_tensors


def describe(path: str | Path) -> dict[str, Any]:
    """`kind`, `metadata` and `tensors` (name, shape, type, n_bytes) of a folder or a .safetensors file.

    CheckpointError where it is none of those or damaged.
    """
    path = Path(path)
    with blamed_on(path):
        return _describe(path)


def _describe(path: Path) -> dict[str, Any]:
    if path.is_file():
        return {"kind": "safetensors file", "metadata": {}, "tensors": _rows(read_tensors(path).values())}
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        config = read_json_object(path / "adapter_config.json")
        kind = f"adapter ({config.get('peft_type') or config.get('fine_tune_type') or 'unknown method'})"
        return {"kind": kind, "metadata": config, "tensors": _rows(read_weights(path).values())}
    source = open_folder(path)
    return {
        "kind": f"checkpoint ({source.kind})",
        "metadata": dict(source.config),
        "tensors": _rows(source.tensors.values()),
    }


def _rows(tensors: Iterable[SourceTensor]) -> list[dict[str, Any]]:
    return [{"name": t.name, "shape": list(t.shape), "type": t.dtype, "n_bytes": t.n_bytes} for t in tensors]
