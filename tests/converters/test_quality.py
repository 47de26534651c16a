"""The measured receipt: what it says of a good conversion, where it stands, and that it stops a broken one."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import converters.original
import converters.prepare
import converters.produce
from converters import convert, to_checkpoint
from converters.forward import can_run, forward
from converters.plan import Plan
from converters.sources import open_source
from edgellm.errors import CheckpointError, EngineCrashed
from edgellm.gguf_header import read_header
from edgellm.measure.evaluate import evaluate
from edgellm.measure.texts import read_samples
from tests.converters import tiny
from tests.converters.command import refused, run


@pytest.fixture(scope="module")
def real(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_checkpoint(model_path, tmp_path_factory.mktemp("quality") / "checkpoint")


@pytest.mark.slow
def test_full_receipt(real: Path, tmp_path: Path) -> None:
    receipt = convert(real, tmp_path / "out.gguf", quant="Q4_K_M", receipt="full")
    measured = receipt.quality["measured"]
    assert receipt.quality["forward_kld"] < 1e-4
    assert any("our own forward pass" in check for check in receipt.checks)
    assert any(check.startswith("chat template") for check in receipt.checks)
    convert(real, tmp_path / "f16.gguf", quant="F16")
    from converters.quality import TEXT

    samples = read_samples(TEXT, tmp_path / "f16.gguf", n_ctx=256, n_chunks=4)
    assert measured == evaluate(tmp_path / "out.gguf", samples, reference=tmp_path / "f16.gguf").as_dict()
    metadata = read_header(tmp_path / "out.gguf").metadata
    assert metadata["edgellm.receipt.kld_mean"] == pytest.approx(measured["kld"]["mean"])
    assert metadata["edgellm.receipt.same_top"] == pytest.approx(measured["same_top"])
    assert metadata["edgellm.receipt.level"] == "full"
    assert json.loads(metadata["edgellm.receipt.json"])["quality"]["measured"] == measured
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f16.gguf", "out.gguf"]
    n_same = round(100 * measured["same_top"])
    shown = run("inspect", tmp_path / "out.gguf").stdout
    assert f"picks the same next word {n_same} times in 100" in shown


def test_levels(tiny_llama: Path, tmp_path: Path) -> None:
    def level(**options: Any) -> tuple[Any, ...]:
        receipt = convert(tiny_llama, tmp_path / "out.gguf", quant="Q8_0", force=True, **options)
        metadata = read_header(tmp_path / "out.gguf").metadata
        return receipt.quality["level"], metadata.get("edgellm.receipt.level"), metadata.get("edgellm.receipt.kld_mean")

    assert level(receipt="off") == ("off", None, None)
    made = level(receipt="fast")
    assert made[:2] == ("fast", "fast")
    assert made[2] == -1
    made = level(receipt="auto")
    assert made[:2] == ("full", "full")
    assert 0 < made[2] < 0.1
    with pytest.raises(ValueError, match="unknown receipt"):
        level(receipt="some")


def test_auto_says_why_it_does_not_measure(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import converters.quality as quality

    monkeypatch.setattr(quality, "_SECONDS", 0)
    receipt = convert(tiny_llama, tmp_path / "slow.gguf", quant="Q8_0", receipt="auto")
    assert (receipt.quality["level"], receipt.quality["measured"]) == ("fast", None)
    assert "it would take some" in receipt.quality["reason"]
    assert receipt.quality["forward_kld"] < 1e-4  # but it answers as the checkpoint does
    assert any("our own forward pass" in check for check in receipt.checks)
    other_theta(monkeypatch)
    with pytest.raises(CheckpointError, match="computes something else"):
        convert(tiny_llama, tmp_path / "wrong.gguf", quant="Q8_0", receipt="auto")
    assert [path.name for path in tmp_path.iterdir()] == ["slow.gguf"]
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, 900_000))
    receipt = convert(tiny_llama, tmp_path / "full.gguf", quant="Q4_0", receipt="auto")
    assert "GB are free" in receipt.quality["reason"]


def test_a_killed_measurement(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a system short of memory: a conversion that didn't ask to be measured goes on, one that did fails."""
    import edgellm.measure.asked as asked

    run_child = asked.subprocess.run

    def killed(command: list[str], **options: Any) -> Any:
        if "edgellm.measure.child" in command:
            command = ["sh", "-c", "kill -9 $$"]
        return run_child(command, **options)

    monkeypatch.setattr(asked.subprocess, "run", killed)
    receipt = convert(tiny_llama, tmp_path / "auto.gguf", quant="Q8_0", receipt="auto")
    assert receipt.quality["level"] == "fast"
    assert "killed by signal 9" in receipt.quality["reason"]
    with pytest.raises(EngineCrashed, match="enough memory"):
        convert(tiny_llama, tmp_path / "full.gguf", quant="Q8_0", receipt="full")
    assert [path.name for path in tmp_path.iterdir()] == ["auto.gguf"]


def test_a_lossless_file_is_not_compared_with_itself(tiny_llama: Path, tmp_path: Path) -> None:
    receipt = convert(tiny_llama, tmp_path / "out.gguf", quant="F16", receipt="full")
    assert "kld" not in receipt.quality["measured"]
    assert receipt.quality["forward_kld"] < 1e-4


def test_own_text(tiny_llama: Path, tmp_path: Path) -> None:
    receipt = convert(tiny_llama, tmp_path / "a.gguf", quant="Q8_0", receipt="full", receipt_text="self")
    assert receipt.quality["text"] == "self"
    (tmp_path / "text.txt").write_text("Some words of another text. " * 90, encoding="utf-8")
    receipt = convert(tiny_llama, tmp_path / "b.gguf", quant="Q8_0", receipt="full", receipt_text=tmp_path / "text.txt")
    assert receipt.quality["text"] == "text.txt"
    ended = run(
        "convert",
        tiny_llama,
        "-o",
        tmp_path / "c.gguf",
        "--receipt",
        "full",
        "--receipt-text",
        tmp_path / "nothing.txt",
    )
    refused(ended, 3, "check the path")
    assert not (tmp_path / "c.gguf").exists()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tie_word_embeddings": False, "num_key_value_heads": 4, "rope_theta": 5e5},
        {"attention_bias": True, "head_dim": 64},
    ],
)
def test_forward_pass_is_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tiny.make_model(tmp_path, vocab_size=1000, **config)
    source = open_source(tmp_path)
    tokens = [int(token) for token in np.random.default_rng(0).integers(0, 1000, 40)]
    assert can_run(source, len(tokens))
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(forward(source, tokens) - expected).max() < 1e-4 * expected.std()


def loads(change: Callable[[str, Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `change(name of the GGUF tensor, values)` applied to every tensor on its way to the file."""
    original = converters.produce.load

    def changed(tensor: Any, k: int, sizes: Any) -> Any:
        return change(tensor.name, original(tensor, k, sizes))

    monkeypatch.setattr(converters.produce, "load", changed)


def plans(change: Callable[[Plan], Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    original = converters.prepare.make_plan
    monkeypatch.setattr(converters.prepare, "make_plan", lambda *arguments: change(original(*arguments)))


def entries(change: Callable[[dict[str, Any]], dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all metadata changed on its way to the file."""
    import sys

    for module in (sys.modules["converters.convert"], converters.original):
        original = module.metadata_of  # type: ignore[attr-defined]

        def changed(*arguments: Any, original: Any = original) -> Any:
            metadata, notes = original(*arguments)
            return change(metadata), notes

        monkeypatch.setattr(module, "metadata_of", changed)


def without_permutation(patch: pytest.MonkeyPatch) -> None:
    def back(name: str, weights: Any) -> Any:
        if "attn_q." not in name and "attn_k." not in name:
            return weights
        return np.ascontiguousarray(weights.reshape(-1, 32, 2, weights.shape[-1]).swapaxes(1, 2).reshape(weights.shape))

    loads(back, patch)


def other_theta(patch: pytest.MonkeyPatch) -> None:
    plans(lambda plan: dataclasses.replace(plan, metadata={**plan.metadata, "llama.rope.freq_base": 20000.0}), patch)


def other_pre_tokenizer(patch: pytest.MonkeyPatch) -> None:
    entries(lambda metadata: {**metadata, "tokenizer.ggml.pre": "llama-bpe"}, patch)


def swapped_gate_and_up(patch: pytest.MonkeyPatch) -> None:
    def swap(plan: Plan) -> Plan:
        sources = {tensor.name: tensor.sources for tensor in plan.tensors}
        other = {"ffn_gate": "ffn_up", "ffn_up": "ffn_gate"}
        return dataclasses.replace(
            plan,
            tensors=tuple(
                dataclasses.replace(tensor, sources=sources[tensor.name.replace(kind, other[kind])])
                if (kind := tensor.name.split(".")[2] if tensor.name.startswith("blk.") else "") in other
                else tensor
                for tensor in plan.tensors
            ),
        )

    plans(swap, patch)


def dropped_template(patch: pytest.MonkeyPatch) -> None:
    entries(lambda metadata: {k: v for k, v in metadata.items() if k != "tokenizer.chat_template"}, patch)


NAMED = [
    {"name": "default", "template": tiny.CHATML},
    {"name": "tool_use", "template": "{{ tools|tojson }}" + tiny.CHATML},
]
_TEMPLATE, _EOS = "tokenizer.chat_template", "tokenizer.ggml.eos_token_id"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({f"{_TEMPLATE}.tool_use": tiny.CHATML}, "tool_use.* renders another prompt"),
        ({f"{_TEMPLATE}.tool_use": None}, "tool_use.* didn't get into the file"),
        ({_TEMPLATE: tiny.CHATML.replace("['role']", "['role']|replace('system', 'user')")}, "renders another prompt"),
        ({_EOS: 7}, "eos token is 7, the checkpoint's '<|im_end|>'"),
    ],
)
def test_what_only_some_dialogues_would_show(
    changed: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.make_model(tmp_path / "model", vocab_size=1000)
    tiny.add_tokenizer(tmp_path / "model", chat_template=NAMED)
    receipt = convert(tmp_path / "model", tmp_path / "good.gguf", quant="Q8_0")
    assert "chat template: renders the checkpoint's prompts, and 1 more by name" in receipt.checks
    entries(lambda metadata: {k: v for k, v in (metadata | changed).items() if v is not None}, monkeypatch)
    with pytest.raises(CheckpointError, match=re.escape(said) if "|" in said else said):
        convert(tmp_path / "model", tmp_path / "bad.gguf", quant="Q8_0", receipt="auto")
    assert not list(tmp_path.glob("bad.gguf*"))


def norm_off_by_one(patch: pytest.MonkeyPatch) -> None:
    loads(lambda name, weights: weights + 1 if name == "blk.7.ffn_norm.weight" else weights, patch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (without_permutation, "computes something else"),
        (other_theta, "computes something else"),
        (other_pre_tokenizer, "llama.cpp tokenizes"),
        (swapped_gate_and_up, "computes something else"),
        (dropped_template, "chat template of the checkpoint"),
        (norm_off_by_one, "computes something else"),
    ],
)
def test_a_broken_conversion_is_caught(
    fault: Callable[[pytest.MonkeyPatch], None],
    said: str,
    real: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    with pytest.raises(CheckpointError, match=said) as caught:
        convert(real, tmp_path / "out.gguf", quant="Q8_0", receipt="full")
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []
