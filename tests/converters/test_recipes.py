"""Every recipe: the type of every tensor and its bytes as `llama_model_quantize` makes them from our F32 file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from converters import convert, plan
from converters.produce import produce
from converters.quantize.types import FILE_TYPES
from tests.converters import reference, tiny

BASE = {"num_hidden_layers": 9, "hidden_size": 256, "intermediate_size": 256, "vocab_size": 1000}
MODELS: dict[str, dict[str, Any]] = {
    # 17 layers: the recipes' n/16 and n/8 are then not zero and not equal
    "untied": BASE | {"num_hidden_layers": 17, "head_dim": 32},
    # the recipes ask for at least 4 query heads per key head
    "gqa 8": BASE | {"num_attention_heads": 8, "num_key_value_heads": 1},
    "gqa 4, tied": BASE | {"num_key_value_heads": 1, "tie_word_embeddings": True},
    # whole blocks of 32 only: fallbacks
    "rows of 96, tied, gqa 4": BASE | {"hidden_size": 96, "num_key_value_heads": 1, "tie_word_embeddings": True},
    # not even that: F16
    "rows of 80": BASE | {"hidden_size": 80, "intermediate_size": 96},
}
ONE_LAYER = BASE | {"num_hidden_layers": 1, "attention_bias": True, "mlp_bias": True}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] if i > 1 else []) for i, name in enumerate(MODELS)],
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint folder, its F32 GGUF)."""
    return _make(MODELS[request.param], tmp_path_factory.mktemp("recipes"))


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return _make(ONE_LAYER, tmp_path_factory.mktemp("recipes"))


def _make(config: dict[str, Any], root: Path) -> tuple[Path, Path]:
    tiny.make_model(root / "model", **config)
    convert(root / "model", root / "f32.gguf", quant="F32", receipt="off")
    return root / "model", root / "f32.gguf"


def _planned(folder: Path, quant: str, types: tuple[tuple[str, str], ...] = ()) -> dict[str, reference.Stored]:
    planned = plan(folder, quant=quant, types=types)
    return {
        t.name: (t.type_name, t.shape, b"".join(piece.tobytes() for piece in pieces))
        for t, pieces in produce(planned.tensors, planned.sizes)
    }


def _assert_equal(ours: dict[str, reference.Stored], theirs: dict[str, reference.Stored]) -> None:
    assert {name: t[:2] for name, t in ours.items()} == {name: t[:2] for name, t in theirs.items()}
    assert [name for name in theirs if ours[name][2] != theirs[name][2]] == []


@pytest.mark.parametrize("quant", FILE_TYPES)
def test_types_and_bytes_equal_llama_model_quantize(model: tuple[Path, Path], quant: str, tmp_path: Path) -> None:
    folder, f32 = model
    reference.llama_quantize(f32, tmp_path / "theirs.gguf", FILE_TYPES[quant].number)
    _assert_equal(_planned(folder, quant), reference.tensors(tmp_path / "theirs.gguf"))


@pytest.mark.parametrize("quant", FILE_TYPES)
def test_files_equal_llama_model_quantize(one_layer: tuple[Path, Path], quant: str, tmp_path: Path) -> None:
    """The same through the whole of `convert`, file against file, metadata included."""
    folder, f32 = one_layer
    convert(folder, tmp_path / "ours.gguf", quant=quant, receipt="off")
    reference.llama_quantize(f32, tmp_path / "theirs.gguf", FILE_TYPES[quant].number)
    _assert_equal(*(reference.tensors(tmp_path / f"{who}.gguf") for who in ("ours", "theirs")))
    ours, theirs = (reference.metadata(tmp_path / f"{who}.gguf") for who in ("ours", "theirs"))
    assert ours == theirs


OVERRIDES = {
    "Q4_K_M": (("attn_v", "Q8_0"), (r"blk\.[0-3]\.ffn_down", "Q6_K"), ("token_embd", "Q5_1")),
    "Q4_0": (("ffn_(up|gate)", "IQ4_NL"), ("ffn", "Q5_0"), (r"^output\.weight", "F16")),
    "Q8_0": (("attn", "Q2_K"), (r"blk\.0\.", "Q3_K")),
    "IQ4_XS": (("norm", "Q8_0"), (r"\d\.attn_output", "BF16")),
}


@pytest.mark.parametrize("quant", OVERRIDES)
def test_type_overrides_equal_llama_cpps(quant: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The first pattern found in a name decides, and the recipe's counters go on as they would without it."""
    root = tmp_path_factory.mktemp("overrides")
    folder, f32 = _make(BASE | {"num_hidden_layers": 4}, root)
    overrides = OVERRIDES[quant]
    reference.llama_quantize(f32, root / "theirs.gguf", FILE_TYPES[quant].number, overrides=overrides)
    _assert_equal(_planned(folder, quant, overrides), reference.tensors(root / "theirs.gguf"))


def test_overrides_that_name_nothing_known(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="unknown tensor type 'Q9'"):
        plan(tiny_llama, types=(("attn", "Q9"),))
    with pytest.raises(ValueError, match="is no regular expression"):
        plan(tiny_llama, types=(("attn(", "Q8_0"),))
