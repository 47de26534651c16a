"""The receipts' own forward pass against transformers, on every model of the families it knows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from converters.drafts.student import Student
from converters.forward import can_run, forward
from converters.sources import open_source
from edgellm.errors import UnsupportedArchitecture
from tests.converters import tiny
from tests.oracles.families import FIRST_TOKEN, make_reference, outputs
from tests.oracles.family_cases import CASES, Case

UNKNOWN = ("gpt2", "gpt-oss", "falcon-h1", "qwen35", "gemma4")
TRAINABLE = {
    *("llama-1", "llama-2", "llama-3", "llama-4", "llama-5", "smollm3-1", "smollm3-2", "qwen2-1", "qwen2-2", "qwen3-1"),
    *("qwen3-2", "gemma-1", "gemma-2", "phi3-1", "phi3-2", "starcoder2-1", "starcoder2-2", "stablelm-1", "stablelm-2"),
    *("granite-1", "granite-2", "glm4-1", "glm4-2", "mistral3-1", "mistral3-2", "arcee-1", "arcee-2"),
}
DECODERS = [case for case in CASES if not case.pooling]
TOKENS = [int(token) for token in np.random.default_rng(0).integers(FIRST_TOKEN, 1000, 100)]
BOUND = 5e-5  # of max |Δ| over the logits' standard deviation; measured 1.1e-5 at most


@pytest.mark.parametrize("case", DECODERS, ids=lambda case: f"{case.name} {case.what}")
def test_forward_pass_is_transformers(case: Case, tmp_path: Path) -> None:
    model = make_reference(case, tmp_path)
    source = open_source(tmp_path)
    assert can_run(source, len(TOKENS)) == (case.family not in UNKNOWN)
    if case.family not in UNKNOWN:
        expected = outputs(model, TOKENS)
        assert np.abs(forward(source, TOKENS) - expected).max() < BOUND * expected.std()


def test_a_text_part_under_another_name(tmp_path: Path) -> None:
    """As in checkpoints with images: the settings under text_config, the tensors behind a prefix, fields left out."""
    from safetensors.numpy import load_file, save_file

    case = next(case for case in CASES if case.name == "gemma3-1")
    expected = outputs(make_reference(case, tmp_path), TOKENS)
    (path,) = tmp_path.glob("*.safetensors")
    tensors = load_file(path)
    save_file({f"language_model.{name}": values for name, values in tensors.items()}, path)
    text = json.loads((tmp_path / "config.json").read_text())
    for name in ("hidden_activation", "rms_norm_eps", "attn_logit_softcapping", "final_logit_softcapping"):
        del text[name]  # those are the class's own values
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    source = open_source(tmp_path)
    assert can_run(source, len(TOKENS))
    assert np.abs(forward(source, TOKENS) - expected).max() < BOUND * expected.std()


def test_a_window_of_every_block_must_hold_the_text(tmp_path: Path) -> None:
    tiny.make_model(tmp_path, "mistral", sliding_window=64)
    source = open_source(tmp_path)
    assert [can_run(source, n) for n in (64, 65)] == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("case", DECODERS, ids=lambda case: case.name)
def test_the_forward_pass_for_training_is_the_same(case: Case, tmp_path: Path) -> None:
    """Where a family's blocks can be trained as a draft; else it is refused with the reason."""
    import torch

    make_reference(case, tmp_path)
    source = open_source(tmp_path)
    if case.name not in TRAINABLE:
        with pytest.raises(UnsupportedArchitecture, match="make a draft from text instead"):
            Student(source)
        return
    student = Student(source)
    with torch.no_grad():
        logits = student.logits(student.hidden(torch.tensor([TOKENS])))[0].numpy()
    expected = forward(source, TOKENS)
    assert np.abs(logits - expected).max() < BOUND * expected.std()
