"""Reads an adapter folder: PEFT's, in its old and new key layouts, or mlx-lm's, shown in PEFT's words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.sources import SourceTensor
from converters.sources.safetensors_file import read_tensors
from edgellm.errors import AdapterError, CheckpointError

Parts = dict[str, SourceTensor]

# what PEFT appends to a module's path, then the adapter's name in some layouts, then the parameter's
_PARTS = (
    "lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_ranknum",
    "ranknum", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a",
    "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "vera_lambda_b", "vera_lambda_d", "ia3_l",
    "trainable_tokens_delta",
)  # fmt: skip
_KEY = re.compile(
    rf"(?P<module>.+?)\.(?:token_adapter\.)?(?P<part>{'|'.join(_PARTS)})(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?"
    r"(?:\.(?P<leaf>weight|bias))?"
)
# a parameter saved whole, wherever PEFT had wrapped it
_WHOLE = re.compile(
    r"(?P<module>.+?)(?:\.(?:modules_to_save|ln_tuning_layers)(?:\.[^.]+)??)?(?:\.base_layer)?\.(?P<leaf>weight|bias)"
)
_MLX_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_a|lora_b|m)")


@dataclass(frozen=True)
class Adapter:
    """An adapter, opened and checked for itself; `weight` is how much of it the user wants.

    modules: the path of a module in the model it was trained on → the parts stored for it, under PEFT's names
    ("lora_A" …, "weight" and "bias" for parameters saved whole). A path may end in ".base_layer" where several
    parameters of one module were trained. shared: tensors that belong to no module.
    """

    path: Path
    config: Mapping[str, Any]
    modules: Mapping[str, Parts]
    shared: Parts = field(default_factory=dict)
    weight: float = 1.0

    @property
    def method(self) -> str:
        return str(self.config.get("peft_type", "")).upper()


def read_adapter(path: str | Path, weight: float = 1.0) -> Adapter:
    """Open an adapter folder (or the weights file in one); AdapterError says what is wrong with it."""
    path = Path(path)
    folder = path.parent if path.is_file() else path
    if path.is_file() and path.suffix not in (".safetensors", ".bin", ".pt"):
        raise AdapterError(f"{path} is no adapter folder; a GGUF adapter is used at run time, with --lora")
    if not folder.is_dir():
        raise AdapterError(f"no such adapter folder: {path}; check the path")
    if not np.isfinite(weight):
        raise AdapterError(f"the weight of adapter {path} is {weight}; give a number")
    try:
        config = _read_config(folder)
        stored = read_weights(folder)
    except AdapterError:
        raise
    except CheckpointError as exc:
        raise AdapterError(str(exc)) from exc
    if "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config):
        return _from_mlx(folder, config, stored, weight)
    if not config.get("peft_type"):
        raise AdapterError(f"{folder}/adapter_config.json names no peft_type; save the adapter again with peft")
    modules, shared = _group(stored, folder)
    return Adapter(folder, config, modules, shared, weight)


def _read_config(folder: Path) -> dict[str, Any]:
    from converters.sources.huggingface import read_json_object

    if not (folder / "adapter_config.json").is_file():
        what = "a whole model: give it as SOURCE" if (folder / "config.json").is_file() else "not an adapter folder"
        raise AdapterError(f"{folder} has no adapter_config.json; it is {what}")
    return read_json_object(folder / "adapter_config.json")


def read_weights(folder: Path) -> dict[str, SourceTensor]:
    """What is stored in an adapter folder, under the names it has there."""
    for name in ("adapter_model.safetensors", "adapters.safetensors"):
        if (folder / name).is_file():
            return read_tensors(folder / name)
    if (folder / "adapter_model.bin").is_file():
        from converters.sources.pickled import read_pickled

        return read_pickled(folder / "adapter_model.bin")
    raise AdapterError(f"{folder} has an adapter_config.json but no adapter_model.safetensors or .bin; copy it there")


def _group(stored: Mapping[str, SourceTensor], folder: Path) -> tuple[dict[str, Parts], Parts]:
    modules: dict[str, Parts] = {}
    shared: Parts = {}
    for key, tensor in stored.items():
        name = key.removeprefix("base_model.").removeprefix("model.") if key.startswith("base_model.") else key
        if key.startswith("base_model.vera_"):
            shared[key.removeprefix("base_model.").split(".")[0]] = tensor
            continue
        module, part = _parse(name)
        if not module:
            shared[name] = tensor
            continue
        if part in modules.setdefault(module, {}):
            raise AdapterError(f"{folder}: two tensors for {part} of {module}; save the adapter again")
        modules[module][part] = tensor
    return modules, shared


def _parse(name: str) -> tuple[str, str]:
    """(module, part) of a key without PEFT's prefix; an empty module for what belongs to none."""
    if match := _KEY.fullmatch(name):
        part = match["part"]
        return match["module"], f"{part}.bias" if match["leaf"] == "bias" else part
    if ".original_module." in name:  # the base's own, beside the trained copy
        return "", name
    if match := _WHOLE.fullmatch(name):
        return match["module"], match["leaf"]
    return "", name


def _from_mlx(folder: Path, config: Mapping[str, Any], stored: Mapping[str, SourceTensor], weight: float) -> Adapter:
    """mlx-lm stores both factors transposed, and its scale is the whole factor."""
    settings = config.get("lora_parameters")
    settings = settings if isinstance(settings, dict) else {}
    modules: dict[str, Parts] = {}
    names = {"lora_a": "lora_A", "lora_b": "lora_B", "m": "lora_magnitude_vector"}
    rank = 0
    for key, tensor in stored.items():
        if (match := _MLX_PART.fullmatch(key)) and len(tensor.shape) == 3:
            for e in range(tensor.shape[0]):
                modules.setdefault(_expert_module(match["module"], e), {})[names[match["part"]]] = _one_of(tensor, e)
            rank = tensor.shape[1] if match["part"] == "lora_a" else rank
        elif match:
            part = names[match["part"]]
            embedding = match["module"].endswith("embed_tokens") and part != "lora_magnitude_vector"
            factor = tensor if len(tensor.shape) != 2 or part == "lora_magnitude_vector" else _transposed(tensor)
            if embedding:
                part = part.replace("lora_", "lora_embedding_")
            modules.setdefault(match["module"], {})[part] = factor
            rank = factor.shape[0] if part in ("lora_A", "lora_embedding_A") else rank
        else:
            module, part = _parse(key)
            modules.setdefault(module, {})[part] = tensor
    scale = settings.get("scale", 20.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise AdapterError(f"{folder}/adapter_config.json has scale = {scale!r}, expected a number")
    words = {
        "peft_type": "LORA",
        "lora_alpha": scale * (rank or 1),
        "r": rank or 1,
        "use_dora": config.get("fine_tune_type") == "dora",
        "base_model_name_or_path": config.get("model"),
    }
    return Adapter(folder, words, modules, weight=weight)


def _expert_module(module: str, e: int) -> str:
    """mlx-lm has all experts in one switch_mlp, checkpoints each by itself; Mixtral's have names of their own."""
    path, _, projection = module.rpartition(".")
    if ".block_sparse_moe." in module:
        projection = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}.get(projection, projection)
    return f"{path.replace('.switch_mlp', '.experts')}.{e}.{projection}"


def _one_of(stacked: SourceTensor, e: int) -> SourceTensor:
    """One expert's factor; theirs aren't transposed."""

    def read(k: int = 0, n: int = 1) -> NDArray[np.float32]:
        values = stacked.read(e, stacked.shape[0])[0]
        return values if n == 1 else np.split(values, n)[k]

    return replace(
        stacked,
        name=f"{stacked.name}[{e}]",
        shape=stacked.shape[1:],
        n_bytes=stacked.n_bytes // stacked.shape[0],
        read=read,
        read_stored=None,
    )


def _transposed(tensor: SourceTensor) -> SourceTensor:
    def read(stored: SourceTensor, k: int = 0, n: int = 1) -> NDArray[np.float32]:
        values = np.ascontiguousarray(stored.read().T)
        return values if n == 1 else np.split(values, n)[k]

    return replace(tensor, shape=tensor.shape[::-1], read=partial(read, tensor), read_stored=None)
