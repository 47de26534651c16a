"""Weights that don't have the usual file names: one file with a config beside it, or whatever a script saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from converters.sources import Source, SourceTensor
from converters.sources.safetensors_file import read_tensors
from edgellm.errors import CheckpointError

_ZIP = b"PK\x03\x04"  # torch has written zip files since 1.6
# what trainers leave beside the weights
_NO_WEIGHTS = ("adapter_model", "training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states")
# put before every name by DistributedDataParallel, torch.compile and Lightning
_WRAPPERS = ("module.", "_orig_mod.")


def open_weight_file(path: Path) -> Source:
    """A .safetensors or torch file; config.json (or params.json) and the tokenizer lie beside it."""
    from converters.sources.huggingface import make_source

    return make_source(path.parent, *_read(path))


def find_weights(folder: Path) -> tuple[str, dict[str, SourceTensor]] | None:
    """The kind and tensors of all weight files of a folder that has none of the usual names; None if there are none."""
    for endings in ((".safetensors",), (".bin", ".pt", ".pth")):
        candidates = sorted(p for p in folder.iterdir() if p.suffix in endings and p.is_file())
        files = [p for p in candidates if not p.name.startswith(_NO_WEIGHTS)]
        if files:
            return _read(*files)
    return None


def _read(*files: Path) -> tuple[str, dict[str, SourceTensor]]:
    tensors: dict[str, SourceTensor] = {}
    origin: dict[str, Path] = {}
    kinds = []
    for path in files:
        kind, found = _read_file(path)
        twice = found.keys() & tensors.keys()
        if twice:
            name = min(twice)
            raise CheckpointError(
                f"tensor {name} is in {origin[name].name} and in {path.name}; give the one file to convert"
            )
        tensors |= found
        origin |= dict.fromkeys(found, path)
        kinds.append(kind)
    return kinds[0], tensors


def _read_file(path: Path) -> tuple[str, dict[str, SourceTensor]]:
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(_ZIP):
        from converters.sources.pickled import read_pickled

        return "torch", read_pickled(path)
    if start[8:] == b"{":
        return "safetensors", read_tensors(path)
    raise CheckpointError(
        f"{path} is neither a checkpoint folder nor a GGUF, and no file of weights either (safetensors, or torch's "
        "format since 1.6); give the folder that holds config.json and the weights"
    )


def unwrap(tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """Without the prefix that a training wrapper put before every name."""
    found = dict(tensors)
    prefix = _wrapper(found)
    while prefix:
        found = {
            name.removeprefix(prefix): replace(tensor, name=name.removeprefix(prefix)) for name, tensor in found.items()
        }
        prefix = _wrapper(found)
    return found


def _wrapper(names: Mapping[str, Any] | Sequence[str]) -> str:
    for prefix in _WRAPPERS:
        if names and all(name.startswith(prefix) for name in names):
            return prefix
    # a Lightning module holds the model as `self.model`, whose own names mostly begin with `model.` too
    doubled = any(name.startswith(("model.model.", "model.lm_head.")) for name in names)
    return "model." if doubled and all(name.startswith("model.") for name in names) else ""
