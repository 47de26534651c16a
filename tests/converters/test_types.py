"""The tables of types against gguf's own."""

from __future__ import annotations

import ctypes

import gguf
import pytest

from converters.quantize.types import ALIASES, FILE_TYPES, WEIGHT_TYPES, find_file_type, tensor_bytes
from edgellm.gguf_header import GGML_TYPES
from edgellm.native import ggml

SHARED = sorted(set(GGML_TYPES) & {int(t) for t in gguf.GGML_QUANT_SIZES})
Q8_1 = 9  # a type of activations, never in a file: gguf 0.19 says 40 bytes a block, ggml has 36


def test_every_type_has_ggmls_own_name_and_sizes() -> None:
    library = ggml.base_library()
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_type_size.restype = ctypes.c_size_t
    library.ggml_blck_size.restype = ctypes.c_int64
    theirs = {
        number: (
            library.ggml_type_name(number).decode().upper(),
            library.ggml_blck_size(number),
            library.ggml_type_size(number),
        )
        for number in GGML_TYPES
    }
    assert theirs == GGML_TYPES


def test_every_type_has_ggufs_name_and_sizes() -> None:
    ours = {number: GGML_TYPES[number] for number in SHARED if number != Q8_1}
    theirs = {
        number: (gguf.GGMLQuantizationType(number).name, *gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)])
        for number in SHARED
        if number != Q8_1
    }
    assert ours == theirs


def test_no_weight_type_is_outside_the_comparison() -> None:
    names = {GGML_TYPES[number][0] for number in SHARED}
    assert set(WEIGHT_TYPES) <= names
    assert len(SHARED) >= 28


@pytest.mark.parametrize("name", FILE_TYPES)
def test_file_type_numbers_are_llama_cpps(name: str) -> None:
    theirs = {f"MOSTLY_{name}", f"ALL_{name}"}
    number = next(int(t) for t in gguf.LlamaFileType if t.name in theirs)
    assert FILE_TYPES[name].number == number


def test_names_are_found_in_any_case() -> None:
    assert find_file_type("q4_k_m") is FILE_TYPES["Q4_K_M"]
    assert {alias: find_file_type(alias).name for alias in ALIASES} == dict(ALIASES)
    with pytest.raises(ValueError, match=r"unknown quant 'Q9'; choose one of F32, F16, .*Q6_K"):
        find_file_type("Q9")


def test_tensor_bytes() -> None:
    assert tensor_bytes((3, 256), "Q4_K") == 3 * 144
    assert tensor_bytes((3, 96), "Q4_0") == 3 * 3 * 18
    assert tensor_bytes((7,), "F32") == 28
