"""Names of tensor types and of whole-file types ("quants"), with llama.cpp's numbers for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgellm.gguf_header import GGML_TYPES

TYPE_IDS: Mapping[str, int] = {name: number for number, (name, _, _) in GGML_TYPES.items()}


@dataclass(frozen=True)
class FileType:
    """A recipe by its public name: `number` is llama.cpp's LLAMA_FTYPE, `base` the type most weights get."""

    name: str
    number: int
    base: str


FILE_TYPES: Mapping[str, FileType] = {
    name: FileType(name, number, base)
    for name, number, base in (
        ("F32", 0, "F32"),
        ("F16", 1, "F16"),
        ("BF16", 32, "BF16"),
        ("Q8_0", 7, "Q8_0"),
        ("Q4_0", 2, "Q4_0"),
        ("Q4_1", 3, "Q4_1"),
        ("Q5_0", 8, "Q5_0"),
        ("Q5_1", 9, "Q5_1"),
        ("IQ4_NL", 25, "IQ4_NL"),
        ("IQ4_XS", 30, "IQ4_XS"),
        ("Q2_K", 10, "Q2_K"),
        ("Q3_K_S", 11, "Q3_K"),
        ("Q3_K_M", 12, "Q3_K"),
        ("Q3_K_L", 13, "Q3_K"),
        ("Q4_K_S", 14, "Q4_K"),
        ("Q4_K_M", 15, "Q4_K"),
        ("Q5_K_S", 16, "Q5_K"),
        ("Q5_K_M", 17, "Q5_K"),
        ("Q6_K", 18, "Q6_K"),
    )
}

# what people type for the medium mixes
ALIASES: Mapping[str, str] = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

# types a tensor may be given by hand; the others need an importance matrix or hold no weights
WEIGHT_TYPES: tuple[str, ...] = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip


def find_file_type(name: str) -> FileType:
    """The recipe called `name`, in any case; ValueError lists the names there are."""
    key = name.upper()
    key = ALIASES.get(key, key)
    if key not in FILE_TYPES:
        raise ValueError(f"unknown quant {name!r}; choose one of {', '.join(FILE_TYPES)}")
    return FILE_TYPES[key]


def block_size(type_name: str) -> int:
    """Weights in one block of a type: a row must hold a whole number of them."""
    return GGML_TYPES[TYPE_IDS[type_name]][1]


def tensor_bytes(shape: tuple[int, ...], type_name: str) -> int:
    """Bytes of a tensor of this shape and type; the last dimension must be a whole number of blocks."""
    n = 1
    for size in shape:
        n *= size
    _, block, n_block_bytes = GGML_TYPES[TYPE_IDS[type_name]]
    return n // block * n_block_bytes
