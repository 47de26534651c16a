"""A real model: GGUF → checkpoint → GGUF, bit for bit; and its quantizations as llama.cpp makes them."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from converters import convert, to_checkpoint
from converters.quantize.types import FILE_TYPES
from tests.converters import reference


@pytest.mark.slow
def test_every_tensor_is_the_dequantized_source(smollm2: Path, smollm2_f32: Path) -> None:
    ours = {t.name: t for t in gguf.GGUFReader(smollm2_f32).tensors}
    source = gguf.GGUFReader(smollm2).tensors
    assert len(source) == len(ours) == 272
    for theirs in source:
        values = gguf.quants.dequantize(theirs.data, theirs.tensor_type).reshape(theirs.data.shape[0], -1)
        assert ours[theirs.name].tensor_type == gguf.GGMLQuantizationType.F32
        assert list(ours[theirs.name].shape) == list(theirs.shape)
        written = ours[theirs.name].data.reshape(values.shape)
        assert np.array_equal(written.view(np.uint32), values.view(np.uint32)), theirs.name


@pytest.mark.slow
def test_metadata_that_llama_cpp_computes_with_is_the_sources(smollm2: Path, smollm2_f32: Path) -> None:
    source, ours = reference.metadata(smollm2), reference.metadata(smollm2_f32)
    compared = [key for key in source if key.startswith(("llama.", "tokenizer."))]
    assert len(compared) >= 20
    assert {key: ours.get(key) for key in compared} == {key: source[key] for key in compared}
    assert ours["general.file_type"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["Q4_0", "Q4_K_M", "Q6_K", "IQ4_XS"])
def test_quantized_as_llama_model_quantize_does(
    smollm2_folder: Path, smollm2_f32: Path, quant: str, tmp_path: Path
) -> None:
    receipt = convert(smollm2_folder, tmp_path / "ours.gguf", quant=quant)
    reference.llama_quantize(smollm2_f32, tmp_path / "theirs.gguf", FILE_TYPES[quant].number)
    ours, theirs = (gguf.GGUFReader(tmp_path / f"{who}.gguf").tensors for who in ("ours", "theirs"))
    assert {t.name: t.tensor_type.name for t in ours} == {t.name: t.tensor_type.name for t in theirs}
    by_name = {t.name: t.data for t in theirs}
    assert [t.name for t in ours if not np.array_equal(t.data, by_name[t.name])] == []
    assert len(by_name) == 272
    assert receipt.output_bytes == (tmp_path / "ours.gguf").stat().st_size
    assert sum(n for n, _ in receipt.types.values()) == 272


@pytest.mark.slow
def test_second_round_trip_keeps_the_small_files(smollm2_folder: Path, tmp_path: Path) -> None:
    convert(smollm2_folder, tmp_path / "half.gguf", quant="BF16")
    again = to_checkpoint(tmp_path / "half.gguf", tmp_path / "again", dtype="bf16")
    names = {path.name for path in smollm2_folder.iterdir()}
    assert {path.name for path in again.iterdir()} == names
    for name in names - {"model.safetensors", "config.json"}:
        assert (again / name).read_bytes() == (smollm2_folder / name).read_bytes(), name
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (smollm2_folder, again))
    assert second.pop("torch_dtype") == "bfloat16"
    assert first.pop("torch_dtype") == "float32"
    assert second == first
    convert(again, tmp_path / "again.gguf", quant="BF16")
    first_half, second_half = (gguf.GGUFReader(tmp_path / f"{n}.gguf").tensors for n in ("half", "again"))
    assert [t.name for t in first_half] == [t.name for t in second_half]
    assert all(np.array_equal(a.data, b.data) for a, b in zip(first_half, second_half, strict=True))
