"""What is in a checkpoint or adapter, from headers alone, as plain data for `edgellm inspect`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from converters.sources import SourceTensor
from converters.sources.huggingface import open_folder, read_json_object
from converters.sources.safetensors_file import read_tensors


def describe(path: str | Path) -> dict[str, Any]:
    """`kind`, `metadata` and `tensors` (name, shape, type, n_bytes) of a folder or a .safetensors file.

    CheckpointError where it is none of those or damaged.
    """
    path = Path(path)
    if path.is_file():
        return {"kind": "safetensors file", "metadata": {}, "tensors": _rows(read_tensors(path).values())}
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        config = read_json_object(path / "adapter_config.json")
        file = path / "adapter_model.safetensors"
        tensors = read_tensors(file) if file.exists() else _pickled(path / "adapter_model.bin")
        kind = f"adapter ({config.get('peft_type', 'unknown method')})"
        return {"kind": kind, "metadata": config, "tensors": _rows(tensors.values())}
    source = open_folder(path)
    return {
        "kind": f"checkpoint ({source.kind})",
        "metadata": dict(source.config),
        "tensors": _rows(source.tensors.values()),
    }


def _pickled(path: Path) -> dict[str, SourceTensor]:
    from converters.sources.pickled import read_pickled

    return read_pickled(path) if path.exists() else {}


def _rows(tensors: Iterable[SourceTensor]) -> list[dict[str, Any]]:
    return [{"name": t.name, "shape": list(t.shape), "type": t.dtype, "n_bytes": t.n_bytes} for t in tensors]
