"""Random models of every kind this family has: transformers' logits against llama.cpp's on the converted file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import convert, to_checkpoint
from edgellm.errors import CheckpointError
from tests.converters import reference, tiny

N_TOKENS = 200
# in units of the logits' standard deviation; measured 2.4e-5 at most over all cases
BOUND = 1e-4

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
# so that with head_dim 32 and 200 tokens all three ranges of frequencies act
LLAMA3_SHORT = LLAMA3 | {"rope_theta": 10000.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "attention bias only": ("llama", {"attention_bias": True}),
    "head_dim 48 of 128/4": ("llama", {"head_dim": 48}),
    "multi-head": ("llama", {"num_key_value_heads": 4}),
    "one key head": ("llama", {"num_key_value_heads": 1, "num_attention_heads": 8}),
    "theta and eps": ("llama", {"rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "linear": ("llama", {"rope_parameters": LINEAR}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama3, factor 32, head_dim 64": ("llama", {"rope_parameters": LLAMA3 | {"factor": 32.0}, "head_dim": 64}),
    "llama3, short": ("llama", {"rope_parameters": LLAMA3_SHORT}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "yarn, attention_factor": ("llama", {"rope_parameters": YARN | {"attention_factor": 0.7}}),
    "yarn, mscale": ("llama", {"rope_parameters": YARN | {"mscale": 0.8, "mscale_all_dim": 0.4}}),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", {"sliding_window": 256}),
    "mistral, head_dim 16, tied": ("mistral", {"sliding_window": None, "head_dim": 16, "tie_word_embeddings": True}),
}
# a GGUF holds the factors only; they are recognized for the context lengths models were trained with
NO_WAY_BACK = ("llama3, short",)


def _tokens(n_vocab: int = 1024) -> list[int]:
    return np.random.default_rng(3).integers(0, n_vocab, N_TOKENS).tolist()


def _transformers_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return np.asarray(model(torch.tensor([_tokens()])).logits[0].float())


def _assert_close(ours: np.ndarray, expected: np.ndarray) -> None:
    assert expected.std() > 0.1
    error = np.abs(ours - expected).max(axis=1) / expected.std()  # of each position
    wrong = np.flatnonzero(~(error < BOUND))
    assert wrong.size == 0, f"{wrong.size} positions from {wrong[0]} on differ, by up to {error.max():.3g}"


@pytest.mark.parametrize("case", CASES)
def test_logits_and_way_back(case: str, tmp_path: Path) -> None:
    """Forward: the same logits. Back: the checkpoint we make of the GGUF gives the same GGUF and the same logits."""
    from transformers import AutoModelForCausalLM

    family, config = CASES[case]
    model = tiny.make_model(tmp_path / "model", family, **config)
    expected = _transformers_logits(model)
    receipt = convert(tmp_path / "model", tmp_path / "f32.gguf", quant="F32", receipt="off")
    _assert_close(reference.llama_logits(tmp_path / "f32.gguf", _tokens()), expected)
    assert receipt.n_parameters - _rope_tensor(tmp_path / "f32.gguf") == sum(p.numel() for p in model.parameters())

    if case in NO_WAY_BACK:
        with pytest.raises(CheckpointError, match="rope_freqs don't come from a known llama3 scaling"):
            to_checkpoint(tmp_path / "f32.gguf", tmp_path / "back")
        assert not (tmp_path / "back").exists()
        return
    to_checkpoint(tmp_path / "f32.gguf", tmp_path / "back")
    convert(tmp_path / "back", tmp_path / "again.gguf", quant="F32", receipt="off")
    assert reference.tensors(tmp_path / "again.gguf") == reference.tensors(tmp_path / "f32.gguf")
    first, second = (reference.metadata(tmp_path / name) for name in ("f32.gguf", "again.gguf"))
    assert {k: v for k, v in second.items() if k != "general.name"} == {
        k: v for k, v in first.items() if k != "general.name"
    }
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert np.abs(_transformers_logits(back) - expected).max() / expected.std() < BOUND


def _rope_tensor(path: Path) -> int:
    stored = reference.tensors(path).get("rope_freqs.weight")
    return len(stored[2]) // 4 if stored else 0


@pytest.mark.parametrize(
    "case", ["linear", "llama3", "llama3, short", "yarn", "dynamic", "theta and eps", "mistral, window"]
)
def test_config_in_the_words_of_transformers_4(case: str, tmp_path: Path) -> None:
    """rope_theta and rope_scaling (with the key "type", as before 4.45) give the file that rope_parameters gives."""
    family, config = CASES[case]
    tiny.make_model(tmp_path / "model", family, **config)
    convert(tmp_path / "model", tmp_path / "five.gguf", quant="F32")
    path = tmp_path / "model" / "config.json"
    written = json.loads(path.read_text())
    params = written.pop("rope_parameters")
    written["rope_theta"] = params.pop("rope_theta")
    kind = params.pop("rope_type")
    written["rope_scaling"] = None if kind == "default" else {"type": kind, **params}
    written["torch_dtype"] = written.pop("dtype", "float32")
    path.write_text(json.dumps(written))
    convert(tmp_path / "model", tmp_path / "four.gguf", quant="F32")
    assert reference.tensors(tmp_path / "four.gguf") == reference.tensors(tmp_path / "five.gguf")
    assert reference.metadata(tmp_path / "four.gguf") == reference.metadata(tmp_path / "five.gguf")


def test_sliding_window_limits_the_context(tmp_path: Path) -> None:
    """Up to the window both compute the same; the GGUF says no more than that."""
    tiny.make_model(tmp_path / "model", "mistral", sliding_window=64)
    receipt = convert(tmp_path / "model", tmp_path / "out.gguf", quant="F32")
    assert reference.metadata(tmp_path / "out.gguf")["llama.context_length"] == 64
    assert any("limited to the sliding window of 64" in note for note in receipt.notes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoints(dtype: str, tmp_path: Path) -> None:
    """What is stored in 16 bits goes into F32 exactly, and into the same 16 bits unchanged."""
    import torch
    from transformers import AutoModelForCausalLM

    tiny.make_model(tmp_path / "wide").to(getattr(torch, dtype)).save_pretrained(tmp_path / "model")
    tiny.add_tokenizer(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    expected = _transformers_logits(model)
    convert(tmp_path / "model", tmp_path / "f32.gguf", quant="F32", receipt="off")
    _assert_close(reference.llama_logits(tmp_path / "f32.gguf", _tokens()), expected)
    same = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    convert(tmp_path / "model", tmp_path / "half.gguf", quant=same)
    wide, half = reference.float_tensors(tmp_path / "f32.gguf"), reference.float_tensors(tmp_path / "half.gguf")
    assert all(np.array_equal(wide[name], half[name]) for name in wide)
