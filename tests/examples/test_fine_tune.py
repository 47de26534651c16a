"""The example's adapter does what its README says, and its script trains one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import edgellm
from converters import convert, export_adapter, to_checkpoint
from edgellm.gguf_header import read_header

EXAMPLE = Path(__file__).parents[2] / "examples" / "fine_tune"
ADAPTER = EXAMPLE / "adapter"
DIALOGUES = [json.loads(line)["messages"] for line in (EXAMPLE / "held_out.jsonl").read_text("utf-8").splitlines()]


def n_right(model: edgellm.Model) -> int:
    answers = [
        "".join(chunk.text for chunk in model.chat([question], edgellm.SamplingParams(max_tokens=60)))
        for question, _ in DIALOGUES
    ]
    return sum(answer.strip() == wanted["content"] for answer, (_, wanted) in zip(answers, DIALOGUES, strict=True))


@pytest.mark.slow
def test_before_and_after(model_path: Path, tmp_path: Path) -> None:
    params = edgellm.LoadParams(n_ctx=512)
    export_adapter(model_path, [(ADAPTER, 1.0)], tmp_path / "lora.gguf")
    with edgellm.load(model_path, params, lora=[tmp_path / "lora.gguf"]) as model:
        assert n_right(model) >= 9
        model.set_lora()
        assert n_right(model) == 0
    convert(model_path, tmp_path / "merged.gguf", quant="Q4_K_M", adapters=[ADAPTER])
    with edgellm.load(tmp_path / "merged.gguf", params) as model:
        assert n_right(model) >= 9


def test_held_out_sentences_are_not_in_the_training_data() -> None:
    learned = (EXAMPLE / "dialogues.jsonl").read_text("utf-8")
    assert not [question for question, _ in DIALOGUES if question["content"] in learned]


def test_the_adapter_is_small_and_names_no_machine() -> None:
    assert sum(path.stat().st_size for path in ADAPTER.iterdir()) < 5_000_000
    config = json.loads((ADAPTER / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == "SmolLM2-135M-Instruct"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_script_trains_an_adapter(model_path: Path, tmp_path: Path) -> None:
    to_checkpoint(model_path, tmp_path / "base")
    command = [sys.executable, EXAMPLE / "train.py", tmp_path / "base", "--out", tmp_path / "adapter", "--epochs", "2"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in done.stdout.splitlines()]
    assert losses[1] < 0.3 * losses[0]
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {path.name for path in ADAPTER.iterdir()}
    export_adapter(tmp_path / "base", [(tmp_path / "adapter", 1.0)], tmp_path / "lora.gguf")
    assert len(read_header(tmp_path / "lora.gguf").tensors) == 420
