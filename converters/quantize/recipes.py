"""Which type each tensor of a model gets under llama.cpp's standard recipes.

The rules are llama.cpp's (src/llama-quant.cpp: `llama_tensor_get_type_impl`, `tensor_type_fallback`,
`tensor_allows_quantization`), written as data where they are data; the tests compare every tensor's type and
bytes with what `llama_model_quantize` makes of the same file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from converters.quantize.types import FileType, block_size

# never quantized, whatever the recipe: small, or sensitive, or not a matrix product's weight
_KEPT = (
    "_norm.weight", "ffn_gate_inp.weight", "altup", "laurel", "per_layer_model_proj", "ssm_conv1d",
    "shortconv.conv.weight", "attn_rel_b.weight", ".position_embd", "position_embd.weight",
    "token_types.weight",
)  # fmt: skip

# a row that is no whole number of blocks gets the type on the right, and F16 if that doesn't fit either
_FALLBACK: Mapping[str, str] = {
    "IQ4_XS": "IQ4_NL", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip

# by order of test: a name holding the text on the left is of the kind on the right
_KINDS = (
    ("attn_qkv.weight", "v"),
    ("attn_kv_b.weight", "v"),
    ("attn_v.weight", "v"),
    ("attn_k.weight", "k"),
    ("attn_q.weight", "q"),
    ("attn_output.weight", "attn_output"),
    ("ffn_up", "ffn_up"),
    ("ffn_gate", "ffn_gate"),
    ("ffn_down", "ffn_down"),
)


@dataclass(frozen=True)
class ModelShape:
    """What the recipes ask about a model besides the names of its tensors."""

    architecture: str
    n_layer: int
    n_head: int
    n_head_kv: int
    n_expert: int = 0

    @property
    def n_gqa(self) -> int:
        return self.n_head // self.n_head_kv if self.n_head_kv else 0


@dataclass(frozen=True)
class Choice:
    """The type a tensor gets, and the type the recipe wanted where the row length forbade that."""

    type_name: str
    wanted: str


def choose_types(
    shapes: Mapping[str, tuple[int, ...]],
    file_type: FileType,
    model: ModelShape,
    overrides: Sequence[tuple[re.Pattern[str], str]] = (),
    with_importance: bool = False,
) -> dict[str, Choice]:
    """A type for every tensor of `shapes` (GGUF name → shape, rows first).

    with_importance: the quantizers will be given an importance matrix, and some recipes then choose otherwise.

    overrides: (pattern, type) pairs; the first whose pattern is found in the name decides, as with llama.cpp's
    --tensor-type. They count for tensors that may be quantized at all.
    """
    counters = {"v": 0, "ffn_down": 0}
    n_value_tensors = sum(_kind(name) == "v" for name in shapes)
    tied = "output.weight" not in shapes
    chosen: dict[str, Choice] = {}
    for name in _llama_order(shapes):
        shape = shapes[name]
        if not may_be_quantized(name, shape):
            chosen[name] = Choice("F32", "F32")
            continue
        manual = next((type_name for pattern, type_name in overrides if pattern.search(name)), None)
        wanted = manual or file_type.base
        if manual is None and block_size(file_type.base) > 1:
            wanted = _recipe_type(name, shape, file_type, model, tied, counters, n_value_tensors, with_importance)
        chosen[name] = Choice(_fitting(wanted, shape[-1]), wanted)
    return chosen


def may_be_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Whether any recipe touches this tensor: matrices called "…weight", without the small sensitive ones."""
    outer = shape[:-1]  # ggml doesn't count leading dimensions of 1
    return any(size > 1 for size in outer) and name.endswith("weight") and not any(part in name for part in _KEPT)


def _fitting(type_name: str, n_per_row: int) -> str:
    for candidate in (type_name, _FALLBACK.get(type_name, type_name)):
        if n_per_row % block_size(candidate) == 0:
            return candidate
    return "F16"


def _kind(name: str) -> str:
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "token_embd"
    return next((kind for text, kind in _KINDS if text in name), "other")


def layer_of(name: str) -> int:
    """The block a tensor belongs to, -1 for those outside the blocks."""
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _llama_order(names: Iterable[str]) -> list[str]:
    """llama.cpp's order of tensors: by block, then by name; its running counters depend on it."""
    return sorted(names, key=lambda name: (layer_of(name), name))


def _more_bits(i: int, n: int) -> bool:
    """The first and last eighth of the blocks and every third between them."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _recipe_type(
    name: str,
    shape: tuple[int, ...],
    file_type: FileType,
    model: ModelShape,
    tied: bool,
    counters: dict[str, int],
    n_value_tensors: int,
    with_importance: bool,
) -> str:
    kind = _kind(name)
    if kind == "output" or (tied and kind == "token_embd"):
        return _head_type(shape[-1], file_type, model)
    if kind == "v":
        i = counters["v"]
        counters["v"] += 1
        return _value_type(i, n_value_tensors, file_type, model)
    if kind == "k" and model.n_expert == 8:
        return "Q8_0"
    if kind == "ffn_down":
        i = layer_of(name) if model.n_expert > 1 else counters["ffn_down"]
        counters["ffn_down"] += 1
        return _ffn_down_type(i, file_type, model, with_importance)
    if kind == "attn_output":
        return _attn_output_type(file_type, model)
    return file_type.base


def _head_type(n_per_row: int, file_type: FileType, model: ModelShape) -> str:
    if model.architecture == "falcon" or n_per_row % block_size(file_type.base):
        return "Q8_0"
    return "Q8_0" if file_type.base == "Q8_0" else "Q6_K"


def _value_type(i: int, n: int, file_type: FileType, model: ModelShape) -> str:
    chosen = file_type.base
    match file_type.name:
        case "Q2_K":
            chosen = "Q4_K" if model.n_gqa >= 4 else "Q3_K"
        case "Q3_K_M":
            chosen = "Q5_K" if i < 2 else "Q4_K"
        case "Q3_K_L":
            chosen = "Q5_K"
        case "IQ4_NL" | "IQ4_XS" if model.n_gqa >= 4:
            chosen = "Q5_K"
        case "Q4_K_M" | "Q5_K_M" if _more_bits(i, n):
            chosen = "Q6_K"
        case "Q4_K_S" if i < 4:
            chosen = "Q5_K"
    is_70b = model.architecture == "llama" and model.n_layer == 80 and model.n_head != model.n_head_kv
    if is_70b and chosen in ("Q3_K", "Q4_K"):
        chosen = "Q5_K"  # eight heads share these weights there: more bits cost next to nothing
    return "Q8_0" if model.n_expert == 8 else chosen


def _ffn_down_type(i: int, file_type: FileType, model: ModelShape, with_importance: bool) -> str:
    n, falcon = model.n_layer, model.architecture == "falcon"
    more_bits = _more_bits(i, n)
    match file_type.name:
        case "Q2_K":
            return "Q3_K"
        case "Q3_K_M":
            if i < n // 16:
                return "Q5_K"
            return "Q4_K" if not falcon or more_bits else "Q3_K"
        case "Q3_K_L":
            return "Q4_K" if falcon else "Q5_K"
        case "Q4_K_M" if falcon:
            return "Q6_K" if i < n // 16 else "Q5_K" if more_bits else "Q4_K"
        case "Q4_K_M" | "Q5_K_M" if more_bits:
            return "Q6_K"
        case "IQ4_NL" | "IQ4_XS" if i < n // 8 and not with_importance:
            return "Q5_K"
        case "Q4_0" | "Q5_0" if i < n // 8 and with_importance:
            return file_type.base.replace("_0", "_1")
        case "Q4_K_S" if not falcon and i < n // 8:
            return "Q5_K"
    return file_type.base


def _attn_output_type(file_type: FileType, model: ModelShape) -> str:
    if model.architecture == "falcon":
        return "Q4_K" if file_type.name == "Q3_K_L" else file_type.base
    if model.n_expert == 8:
        eight_experts = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ4_XS")
        return "Q5_K" if file_type.name in eight_experts else file_type.base
    return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(file_type.name, file_type.base)
