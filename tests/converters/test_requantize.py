"""A GGUF as the source: other types, the same metadata, as llama.cpp does it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from converters import convert, plan, to_checkpoint
from converters.quantize.types import FILE_TYPES, TYPE_IDS
from edgellm.errors import CheckpointError, ModelFileError, UnsupportedArchitecture
from edgellm.native.ggml import quantize_rows
from tests.converters import reference, tiny
from tests.converters.command import refused, run


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model (rows of 256, tied) as GGUFs of several types."""
    root = tmp_path_factory.mktemp("sources")
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    tiny.make_model(root / "model", vocab_size=1000, hidden_size=256, tie_word_embeddings=True, rope_parameters=rope)
    for quant in ("F32", "F16", "BF16", "Q4_1", "Q8_0", "Q6_K"):
        convert(root / "model", root / f"{quant}.gguf", quant=quant, receipt="off")
    return {quant: root / f"{quant}.gguf" for quant in ("F32", "F16", "BF16", "Q4_1", "Q8_0", "Q6_K")}


@pytest.mark.parametrize("source", ["F32", *(pytest.param(name, marks=pytest.mark.slow) for name in ("F16", "BF16"))])
@pytest.mark.parametrize("quant", ["F16", "Q4_0", "Q4_K_M", "IQ4_XS"])
def test_unquantized_source_as_llama_model_quantize(
    sources: dict[str, Path], source: str, quant: str, tmp_path: Path
) -> None:
    receipt = convert(sources[source], tmp_path / "ours.gguf", quant=quant, receipt="off")
    reference.llama_quantize(sources[source], tmp_path / "theirs.gguf", FILE_TYPES[quant].number, allow_requantize=True)
    ours, theirs = (reference.tensors(tmp_path / f"{who}.gguf") for who in ("ours", "theirs"))
    assert ours == theirs
    assert list(ours) == list(reference.tensors(sources[source]))
    assert receipt.notes == ()
    ours_meta, theirs_meta = (reference.metadata(tmp_path / f"{who}.gguf") for who in ("ours", "theirs"))
    theirs_meta.pop("general.name"), ours_meta.pop("general.name")
    assert ours_meta == theirs_meta


@pytest.mark.parametrize("source", ["Q4_1", "Q8_0", "Q6_K"])
@pytest.mark.parametrize("quant", ["F32", "Q4_0", "Q8_0"])
def test_quantized_source(sources: dict[str, Path], source: str, quant: str, tmp_path: Path) -> None:
    """Quantizing gguf's exact dequantization. llama.cpp's own multiplies and adds in one rounding there."""
    receipt = convert(sources[source], tmp_path / "ours.gguf", quant=quant)
    reference.llama_quantize(sources[source], tmp_path / "theirs.gguf", FILE_TYPES[quant].number, allow_requantize=True)
    ours, theirs = (reference.tensors(tmp_path / f"{who}.gguf") for who in ("ours", "theirs"))
    assert {name: t[:2] for name, t in ours.items()} == {name: t[:2] for name, t in theirs.items()}
    for name, values in reference.float_tensors(sources[source]).items():
        type_name, _, data = ours[name]
        assert data == quantize_rows(values, TYPE_IDS[type_name]).tobytes(), name
    assert any(f"already quantized ({source}" in note for note in receipt.notes)


def test_same_type_again_changes_next_to_nothing(sources: dict[str, Path], tmp_path: Path) -> None:
    """Values on a Q8_0 grid stay on it but for the rounding of the scales to F16."""
    convert(sources["Q8_0"], tmp_path / "again.gguf", quant="Q8_0")
    first, again = (reference.float_tensors(path) for path in (sources["Q8_0"], tmp_path / "again.gguf"))
    for name, values in first.items():
        assert np.abs(values - again[name]).max() <= 1e-3 * np.abs(values).max(), name


def test_type_overrides_and_dry_run(sources: dict[str, Path], tmp_path: Path) -> None:
    overrides = (("ffn_down", "Q8_0"), ("attn_(q|k)", "Q5_K"))
    convert(sources["F32"], tmp_path / "ours.gguf", quant="Q4_K_M", types=overrides)
    reference.llama_quantize(sources["F32"], tmp_path / "theirs.gguf", FILE_TYPES["Q4_K_M"].number, overrides=overrides)
    ours = reference.tensors(tmp_path / "ours.gguf")
    assert ours == reference.tensors(tmp_path / "theirs.gguf")
    planned = plan(sources["F32"], quant="Q4_K_M", types=overrides)
    assert {t.name: (t.type_name, t.n_bytes) for t in planned.tensors} == {
        name: (type_name, len(data)) for name, (type_name, _, data) in ours.items()
    }


def test_onto_itself(sources: dict[str, Path], tmp_path: Path) -> None:
    """--force with the source's own name replaces it when all is done."""
    path = tmp_path / "model.gguf"
    path.write_bytes(sources["F32"].read_bytes())
    convert(sources["F32"], tmp_path / "other.gguf", quant="Q8_0")
    refused(run("convert", path, "-o", path, "-q", "Q8_0"), 1, "exists; add --force")
    assert run("convert", path, "-o", path, "-q", "Q8_0", "--force").code == 0
    assert reference.tensors(path) == reference.tensors(tmp_path / "other.gguf")


def _write(path: Path, arch: str, tensors: dict[str, np.ndarray], **keys: int) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        writer.add_uint32(key.replace("__", "."), value)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_ggufs_that_cannot_be_sources(sources: dict[str, Path], tmp_path: Path) -> None:
    good = sources["F32"].read_bytes()
    (tmp_path / "cut.gguf").write_bytes(good[: len(good) // 2])
    refused(run("convert", tmp_path / "cut.gguf", "-o", tmp_path / "o.gguf"), 3, "cut.gguf is damaged", "cut off")
    weights = {"token_embd.weight": np.ones((4, 32), dtype=np.float32)}
    empty = _write(tmp_path / "empty.gguf", "llama", {})
    with pytest.raises(ModelFileError, match="no architecture or no weights"):
        convert(empty, tmp_path / "o.gguf")
    part = _write(tmp_path / "part.gguf", "llama", weights, split__count=3)
    with pytest.raises(CheckpointError, match="one part of a split GGUF; merge"):
        convert(part, tmp_path / "o.gguf")
    table = _write(tmp_path / "table.gguf", "llama", weights | {"table": np.ones((4, 32), dtype=np.int32)})
    with pytest.raises(CheckpointError, match=r"integer tensors \(table\)"):
        convert(table, tmp_path / "o.gguf")
    other = _write(tmp_path / "other.gguf", "mamba", weights)
    with pytest.raises(UnsupportedArchitecture, match="'mamba' can't be written as a checkpoint; supported: llama"):
        to_checkpoint(other, tmp_path / "folder")
    # no vocabulary, no shapes llama.cpp knows: it is llama.cpp's verdict that counts, given in another process
    with pytest.raises(ModelFileError, match=r"llama.cpp can't use"):
        convert(_write(tmp_path / "bare.gguf", "llama", weights), tmp_path / "o.gguf", quant="F16")
    assert not list(tmp_path.glob("o.gguf*"))
    assert not (tmp_path / "folder").exists()


def test_nan_in_a_gguf(tmp_path: Path) -> None:
    weights = {"token_embd.weight": np.full((4, 32), np.nan, dtype=np.float32)}
    source = _write(tmp_path / "nan.gguf", "llama", weights)
    refused(
        run("convert", source, "-o", tmp_path / "o.gguf"), 3, "token_embd.weight has 128 values that are not finite"
    )
