"""What a model family is, as data: metadata keys, tensor names, and linear maps on weights.

One spec drives both directions: checkpoint → GGUF runs the maps forwards, GGUF → checkpoint runs them backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgellm.errors import CheckpointError, UnsupportedArchitecture

Array = NDArray[np.float32]
Config = Mapping[str, Any]
Sizes = Mapping[str, Any]  # whole numbers that shapes are made of, and the factors of `ops.scale`
Shape = tuple[int, ...]


def _same_shape(shape: Shape, sizes: Sizes) -> Shape:
    return shape


@dataclass(frozen=True)
class Op:
    """A map from a stored tensor to the one in the GGUF, and back.

    axis: "rows" acts along axis 0 (the outputs) only and so, in a low-rank pair B·A, on B; "columns" on A.
    stored_shape: the shape in the checkpoint for a shape in the GGUF. affine: not linear, so illegal on low-rank
    pairs. part: (k, n) when the result is the k-th of n parts, which `join` puts together again.
    """

    name: str
    forward: Callable[[Array, Sizes], Array]
    inverse: Callable[[Array, Sizes], Array]
    axis: Literal["rows", "columns", "both"] = "rows"
    stored_shape: Callable[[Shape, Sizes], Shape] = _same_shape
    affine: bool = False
    part: tuple[int, int] | None = None
    join: Callable[[list[Array]], Array] | None = None


@dataclass(frozen=True)
class KV:
    """One GGUF metadata entry taken from one field of config.json; `{arch}` stands for the architecture."""

    key: str
    field: str
    kind: Literal["uint32", "float32", "bool"] = "uint32"
    optional: bool = False


@dataclass(frozen=True)
class Weight:
    """One kind of tensor: its name in the checkpoint and in the GGUF, `{i}` being the block.

    `{e}` in hf: one tensor for each expert, stacked along a new first axis. shape: names of sizes (or numbers), as
    in the GGUF, rows first. ops run in order from checkpoint to GGUF, on each expert alone.
    flag: a boolean of config.json that says whether the model has it. optional: it may be missing. tied: it is the
    output head, which a model with tied embeddings doesn't store. layers: which blocks have it.
    Several entries with one gguf name are alternatives; the first that is there counts.
    """

    hf: str
    gguf: str
    shape: tuple[str, ...]
    ops: tuple[Op, ...] = ()
    flag: str = ""
    optional: bool = False
    tied: bool = False
    layers: Callable[[Config, int], bool] | None = None


@dataclass(frozen=True)
class Arch:
    """A family. `defaults` are the config classes' own defaults, which checkpoints may omit.

    check raises UnsupportedArchitecture on what llama.cpp computes otherwise and returns notes. extra gives
    metadata that isn't one field's value; tensors gives tensors computed from the config; config_from is extra's
    inverse. rope: the scalings that llama.cpp's graph computes, none for a model without rope. head: whether a tied
    model's head is left out, must be written again ("copy"), or can only be tied.
    renames: (prefix, replacement) for other ways the same tensors are called. module_names: (part of a name in
    transformers' model, what stands for it in the checkpoint), where adapters say the former. ignored: regular
    expressions of tensors that carry nothing.
    """

    name: str  # general.architecture
    model_types: Mapping[str, str]  # model class → config.json's model_type; the first is written back
    defaults: Mapping[str, Mapping[str, Any]]
    metadata: tuple[KV, ...]
    weights: tuple[Weight, ...]
    sizes: Callable[[Config], dict[str, int]]
    check: Callable[[Config], list[str]] = lambda config: []
    context_length: Callable[[Config], tuple[int, list[str]]] = lambda config: (
        config_int(config, "max_position_embeddings"),
        [],
    )
    rope: tuple[str, ...] = ("default", "linear", "yarn", "dynamic")
    extra: Callable[[Config, Sizes], dict[str, Any]] = lambda config, sizes: {}
    tensors: Callable[[Config, Sizes], dict[str, Array]] = lambda config, sizes: {}
    config_from: Callable[[Mapping[str, Any], Sizes], dict[str, Any]] = lambda metadata, sizes: {}
    head: Literal["omit", "copy", "tied only"] = "omit"
    renames: tuple[tuple[str, str], ...] = ()
    module_names: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)  # this family's name of a field → the usual one

    @property
    def hf_classes(self) -> tuple[str, ...]:
        return tuple(self.model_types)

    def complete_config(self, config: Config) -> dict[str, Any]:
        """`config` with the class defaults filled in for what is absent; an explicit null stays.

        The text part of a multimodal config is lifted out, and fields get their usual names.
        """
        text = config.get("text_config")
        flat = {**config, **text} if isinstance(text, dict) else dict(config)
        named = {self.aliases.get(key, key): value for key, value in flat.items()}
        return {**self.defaults.get(hf_class(config), {}), **named, "architectures": config["architectures"]}


def hf_class(config: Config) -> str:
    """The model class a config.json names; CheckpointError where it names none."""
    classes = config.get("architectures")
    if not isinstance(classes, list) or not classes or not isinstance(classes[0], str):
        raise CheckpointError("config.json names no architecture (its architectures list is missing or empty)")
    return classes[0]


def has_head(config: Config) -> bool:
    """Whether the class has an output head at all: a bare "…Model", as embedding models are, has none."""
    name = hf_class(config)
    return not name.endswith("Model") or name.endswith("LMHeadModel")


def weight_shape(weight: Weight, sizes: Sizes) -> Shape:
    """The shape in the GGUF."""
    return tuple(sizes[size] if size in sizes else int(size) for size in weight.shape)


def stored_shape(weight: Weight, sizes: Sizes) -> Shape:
    """The shape of each stored tensor: without the experts' axis, and before the ops."""
    shape = weight_shape(weight, sizes)
    if "{e}" in weight.hf:
        shape = shape[1:]
    for op in reversed(weight.ops):
        shape = op.stored_shape(shape, sizes)
    return shape


def blocks(weight: Weight, config: Config, sizes: Sizes) -> list[int]:
    """The blocks that have this tensor; [0] for one outside the blocks."""
    if "{i}" not in weight.gguf:
        return [0]
    return [i for i in range(sizes["n_layer"]) if weight.layers is None or weight.layers(config, i)]


def hf_names(weight: Weight, i: int, sizes: Sizes) -> list[str]:
    """The stored names of a tensor of block `i`: one, or one for each expert."""
    name = weight.hf.replace("{i}", str(i))
    if "{e}" not in name:
        return [name]
    return [name.replace("{e}", str(e)) for e in range(sizes["n_expert"])]


def gguf_name(weight: Weight, i: int) -> str:
    return weight.gguf.replace("{i}", str(i))


def config_int(config: Config, name: str) -> int:
    """A positive whole number out of config.json; CheckpointError otherwise."""
    value = config.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise CheckpointError(f"config.json has {name} = {value!r}, expected a positive whole number")
    return value


def config_float(config: Config, name: str) -> float:
    """A finite number out of config.json; CheckpointError otherwise."""
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise CheckpointError(f"config.json has {name} = {value!r}, expected a number")
    return float(value)


def require(config: Config, name: str, *allowed: Any) -> None:
    """UnsupportedArchitecture unless a field has one of the values llama.cpp computes with."""
    value = config.get(name)
    if value not in allowed:
        expected = " or ".join(map(repr, allowed))
        raise UnsupportedArchitecture(f"{name} = {value!r} isn't supported here: llama.cpp computes with {expected}")
