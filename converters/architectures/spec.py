"""What a model family is, as data: metadata keys, tensor names, and linear maps on rows.

One spec drives both directions: checkpoint → GGUF runs the maps forwards, GGUF → checkpoint runs them backwards.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgellm.errors import CheckpointError

Array = NDArray[np.float32]
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Op:
    """An invertible linear map along axis 0 (the output rows) of a weight or a bias.

    Both functions take the array and the model's sizes. As it acts on rows only, it may equally be applied to
    the B factor of a low-rank pair B·A.
    """

    name: str
    forward: Callable[[Array, Mapping[str, int]], Array]
    inverse: Callable[[Array, Mapping[str, int]], Array]


@dataclass(frozen=True)
class KV:
    """One GGUF metadata entry taken from one field of config.json; `{arch}` stands for the architecture."""

    key: str
    field: str
    kind: Literal["uint32", "float32"] = "uint32"
    optional: bool = False


@dataclass(frozen=True)
class Weight:
    """One kind of tensor: its name in the checkpoint and in the GGUF, `{i}` being the block.

    shape: names of sizes (see `Arch.sizes`), rows first. ops run in order from checkpoint to GGUF.
    flag: a boolean of config.json that says whether the model has it. tied: it is the output head, which a model
    with tied embeddings doesn't store.
    """

    hf: str
    gguf: str
    shape: tuple[str, ...]
    ops: tuple[Op, ...] = ()
    flag: str = ""
    tied: bool = False


@dataclass(frozen=True)
class Arch:
    """A family. `defaults` are the config classes' own defaults, which checkpoints may omit."""

    name: str  # general.architecture
    hf_classes: tuple[str, ...]
    defaults: Mapping[str, Mapping[str, Any]]  # by model class
    metadata: tuple[KV, ...]
    weights: tuple[Weight, ...]
    sizes: Callable[[Config], dict[str, int]]
    check: Callable[[Config], None]  # raises UnsupportedArchitecture on what llama.cpp computes otherwise
    context_length: Callable[[Config], tuple[int, list[str]]]  # tokens, and notes where fewer than trained
    model_types: Mapping[str, str] = field(default_factory=dict)  # config.json's model_type, by model class
    ignored: tuple[str, ...] = ()  # regular expressions of tensors that carry nothing

    def complete_config(self, config: Config) -> dict[str, Any]:
        """`config` with the class defaults filled in for what is absent; an explicit null stays."""
        return {**self.defaults[hf_class(config)], **config}


def hf_class(config: Config) -> str:
    """The model class a config.json names; CheckpointError where it names none."""
    classes = config.get("architectures")
    if not isinstance(classes, list) or not classes or not isinstance(classes[0], str):
        raise CheckpointError("config.json names no architecture (its architectures list is missing or empty)")
    return classes[0]


@cache
def name_pattern(template: str) -> re.Pattern[str]:
    """A regular expression for the names a template stands for; group `i` is the block number."""
    return re.compile(re.escape(template).replace(r"\{i\}", r"(?P<i>0|[1-9]\d*)"))


def match_name(template: str, name: str) -> int | None:
    """The block number when `name` is an instance of `template` (0 for one without blocks), else None."""
    found = name_pattern(template).fullmatch(name)
    if found is None:
        return None
    return int(found["i"]) if "i" in found.groupdict() else 0


def is_block_tensor(weight: Weight) -> bool:
    return "{i}" in weight.gguf


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
