"""`evaluate` on the real model: llama-perplexity's own figures, transformers' logits, files, dialogues, own text."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgellm
from converters import convert, to_checkpoint
from edgellm.errors import EdgeLLMError
from edgellm.gguf_header import read_header
from edgellm.measure.evaluate import evaluate
from edgellm.measure.texts import read_samples
from tests.converters import tiny
from tests.converters.command import refused, run

ROOT = Path(__file__).parent.parent.parent
LICENSE = ROOT / "LICENSE"  # the Apache licence, as everybody has it
HELD_OUT = ROOT / "examples" / "fine_tune" / "held_out.jsonl"
# llama-perplexity of the llama.cpp in llama-cpp-python 0.3.36: -f LICENSE -c 256, on our F16 as the base:
# mean KLD, median, 95 %, 99 %, same top, PPL(Q), PPL ratio. Its file of the base has 16 bits a figure.
THEIRS = {
    "Q4_0": (0.347390, 0.266583, 0.941000, 1.594194, 0.64764, 22.802169, 1.287406),
    "Q4_K_M": (0.092419, 0.062358, 0.271995, 0.521418, 0.82480, 19.431585, 1.097103),
    "Q8_0": (0.005333, 0.003981, 0.015524, 0.026459, 0.95669, 17.922357, 1.011892),
}


@pytest.fixture(scope="module")
def folder(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_checkpoint(model_path, tmp_path_factory.mktemp("measure") / "checkpoint")


@pytest.fixture(scope="module")
def f16(folder: Path) -> Path:
    convert(folder, folder.parent / "f16.gguf", quant="F16")
    return folder.parent / "f16.gguf"


@pytest.fixture(scope="module")
def q4_0(folder: Path) -> Path:
    convert(folder, folder.parent / "q4_0.gguf", quant="Q4_0")
    return folder.parent / "q4_0.gguf"


def compare(model: Path, reference: Path, n_chunks: int | None = None, **options: Any) -> dict[str, Any]:
    samples = read_samples(LICENSE, reference, n_ctx=256, n_chunks=n_chunks)
    return evaluate(model, samples, reference=reference, **options).as_dict()


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["Q4_0", "Q4_K_M", "Q8_0"])
def test_figures_are_llama_perplexitys(quant: str, folder: Path, f16: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "quantized.gguf", quant=quant)
    found = compare(tmp_path / "quantized.gguf", f16)
    kld, median, p95, p99, same, ppl, ratio = THEIRS[quant]
    assert found["n_tokens"] == 8 * 127
    assert found["perplexity"] == pytest.approx(ppl, rel=4e-3)  # other CPUs and thread counts differ by .0022
    assert found["reference_perplexity"] == pytest.approx(17.7389, rel=1e-3)
    assert found["kld"]["mean"] == pytest.approx(kld, abs=5.5e-4)
    assert [found["kld"][name] for name in ("median", "p95", "p99")] == pytest.approx([median, p95, p99], rel=0.01)
    assert found["same_top"] == pytest.approx(same, abs=3e-3)
    assert found["ppl_ratio"] == pytest.approx(ratio, rel=4e-3)
    error = {"Q4_0": 0.010506, "Q4_K_M": 0.003145, "Q8_0": 0.000185}[quant]
    assert found["errors"]["kld"]["mean"] == pytest.approx(error, rel=0.03)


def test_perplexity_is_that_of_transformers(folder: Path, f16: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    sample = read_samples(LICENSE, f16, n_ctx=256, n_chunks=1)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(torch.tensor([sample[0].tokens])).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[128:255], torch.tensor(sample[0].targets))
    assert list(sample[0].positions) == list(range(128, 255))
    assert evaluate(f16, sample).perplexity.value == pytest.approx(float(losses.exp()), rel=2e-3)


def test_the_chunks_cover_the_text_and_begin_with_bos(f16: Path, model: edgellm.Model) -> None:
    tokens = model.tokenize(LICENSE.read_text(encoding="utf-8"))
    samples = read_samples(LICENSE, f16, n_ctx=100)
    tokens = [model.bos, *tokens] if model.bos is not None else tokens
    assert len(samples) == len(tokens) // 100
    for i, sample in enumerate(samples):
        assert sample.tokens[1:] == tokens[100 * i + 1 : 100 * (i + 1)]
        assert sample.tokens[0] == (model.bos if model.bos is not None else tokens[100 * i])
    assert len(read_samples(LICENSE, f16, n_ctx=100, n_chunks=2)) == 2
    (short,) = read_samples(HELD_OUT.with_name("README.md"), f16, n_ctx=2048)[:1]
    assert len(short.tokens) <= 2048


def test_answers_alone_are_scored(f16: Path, model: edgellm.Model) -> None:
    samples = read_samples(HELD_OUT, f16, n_ctx=512)
    records = [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    assert len(samples) == len(records)
    for sample, record in zip(samples, records, strict=True):
        answer = record["messages"][-1]["content"]
        assert model.detokenize(sample.targets, special=True) == f"{answer}<|im_end|>"


def test_every_answer_of_a_dialogue_is_scored(f16: Path, model: edgellm.Model, tmp_path: Path) -> None:
    turns = [("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", "Goodbye.")]
    lines = [
        {"messages": [{"role": role, "content": text} for role, text in turns]},
        {"prompt": "One?", "completion": "Two <|im_end|> three."},
        {"text": "No roles at all here."},
    ]
    path = tmp_path / "dialogues.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    dialogue, pair, text = read_samples(path, f16)
    assert model.detokenize(dialogue.targets, special=True) == "Hello!<|im_end|>Goodbye.<|im_end|>"
    assert model.detokenize(pair.targets, special=True) == "Two <|im_end|> three.<|im_end|>"
    assert model.detokenize(text.tokens) == "No roles at all here."
    assert evaluate(f16, [dialogue, pair, text]).n_tokens == sum(len(s.targets) for s in (dialogue, pair, text))


def test_own_text_is_the_same_for_the_same_seed(q4_0: Path) -> None:
    first, again, other = (read_samples("self", q4_0, n_ctx=64, n_chunks=2, seed=seed) for seed in (1, 1, 2))
    assert [s.tokens for s in first] == [s.tokens for s in again] != [s.tokens for s in other]
    assert [len(s.tokens) for s in first] == [64, 64]


def test_kept_log_probabilities(q4_0: Path, f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = compare(q4_0, f16, 2)
    assert compare(q4_0, f16, 2, keep=tmp_path / "kept") == plain
    (kept,) = (tmp_path / "kept").iterdir()
    assert np.load(kept, mmap_mode="r").shape == (2 * 127, 49152)
    with monkeypatch.context() as patch:
        opened: list[Path] = []
        from edgellm.measure import reference

        patch.setattr(reference, "Scorer", lambda path, *_: opened.append(path))
        assert compare(q4_0, f16, 2, keep=tmp_path / "kept") == plain
        assert opened == []
    kept.write_bytes(kept.read_bytes()[:1000])
    with pytest.raises(EdgeLLMError, match=r"another folder|delete it"):
        compare(q4_0, f16, 2, keep=tmp_path / "kept")


def test_an_interrupted_run_keeps_nothing(q4_0: Path, f16: Path, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(q4_0, f16, 2, keep=tmp_path / "kept", on_progress=stop)
    assert list((tmp_path / "kept").iterdir()) == []


def test_adapters(model_path: Path, f16: Path, tmp_path: Path) -> None:
    """The fine-tune knows the answers better than its base."""
    from converters import export_adapter

    export_adapter(model_path, [(ROOT / "examples" / "fine_tune" / "adapter", 1.0)], tmp_path / "lora.gguf")
    samples = read_samples(HELD_OUT, f16)
    assert evaluate(f16, samples, lora=[tmp_path / "lora.gguf"]).perplexity.value < 1.5
    assert evaluate(f16, samples).perplexity.value > 5


def test_command(q4_0: Path, f16: Path) -> None:
    result = run("eval", q4_0, "--text", LICENSE, "--reference", f16, "--n-ctx", "256", "--chunks", "1", "--json")
    found = json.loads(result.stdout)
    assert (result.code, found["n_tokens"], found["n_samples"]) == (0, 127, 1)
    assert found["kld"]["mean"] == pytest.approx(0.35, abs=0.1)
    table = run("eval", q4_0, "--text", LICENSE, "--reference", f16, "--n-ctx", "256", "--chunks", "1")
    assert f"KLD mean      {found['kld']['mean']:.5f}" in table.stdout
    assert "times in 100" in table.stdout


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "line 1: no JSON"),
        ('{"a": 1}', "line 1: 'prompt' is missing"),
        ("\n3", "line 2: it is no JSON object"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no answers to score"),
        ('{"messages": [{"role": "assistant", "content": 4}]}', "line 1: message 0 .* has no text"),
        ('{"messages": 4}', "line 1: messages must be a list"),
        ('{"text": 4}', "line 1: text must be a string"),
        ("", "no answers to score"),
    ],
)
def test_bad_dialogues(content: str, said: str, model_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(EdgeLLMError, match=said):
        read_samples(path, model_path)


def test_bad_input(model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("few", encoding="utf-8")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    refused(run("eval", model_path, "--text", tmp_path / "short.txt"), 3, "longer text")
    refused(run("eval", model_path, "--text", tmp_path / "bytes.txt"), 3, "no UTF-8")
    refused(run("eval", model_path, "--text", tmp_path / "nothing.txt"), 3, "check the path")
    refused(run("eval", tmp_path / "nothing.gguf", "--text", LICENSE), 3, "no such file")


def test_what_does_not_fit_the_model(model_path: Path, tmp_path: Path) -> None:
    tiny.make_model(tmp_path / "tiny", vocab_size=1000, max_position_embeddings=128)
    convert(tmp_path / "tiny", tmp_path / "tiny.gguf", quant="F16")
    found = run("eval", tmp_path / "tiny.gguf", "--text", LICENSE, "--n-ctx", "1000", "--chunks", "2", "--json")
    assert json.loads(found.stdout)["n_ctx"] == 128
    ended = run("eval", tmp_path / "tiny.gguf", "--text", LICENSE, "--keep", tmp_path)
    assert (ended.code, "--reference" in ended.stderr) == (2, True)


def test_a_vocabulary_of_the_same_size(tmp_path: Path) -> None:
    """Tokens of other texts under the same numbers can't be compared; those that no text has don't matter."""
    tiny.make_model(tmp_path / "a", vocab_size=1000)
    convert(tmp_path / "a", tmp_path / "a.gguf", quant="F16")
    samples = read_samples(LICENSE, tmp_path / "a.gguf", n_ctx=64, n_chunks=1)
    tokens = read_header(tmp_path / "a.gguf").metadata["tokenizer.ggml.tokens"]
    read, unread = (
        next(
            i
            for i in range(400, 1000)
            if len(tokens[i]) > 2 and tokens[i].isascii() and (i in samples[0].tokens) == is_in
        )
        for is_in in (True, False)
    )
    for token in (unread, read):
        text = tokens[token].encode()
        stored = (tmp_path / "a.gguf").read_bytes()
        renamed = stored.replace(
            struct.pack("<Q", len(text)) + text, struct.pack("<Q", len(text)) + b"~" * len(text), 1
        )
        (tmp_path / f"{token}.gguf").write_bytes(renamed)
    assert evaluate(tmp_path / f"{unread}.gguf", samples, reference=tmp_path / "a.gguf").divergence
    with pytest.raises(EdgeLLMError, match=f"token {read} is '~+' in"):
        evaluate(tmp_path / f"{read}.gguf", samples, reference=tmp_path / "a.gguf")


def test_another_vocabulary(model_path: Path, tmp_path: Path) -> None:
    tiny.make_model(tmp_path / "tiny", vocab_size=1000)
    convert(tmp_path / "tiny", tmp_path / "tiny.gguf", quant="F16")
    with pytest.raises(EdgeLLMError, match="only models of one vocabulary"):
        evaluate(model_path, read_samples(LICENSE, model_path, n_ctx=64, n_chunks=1), reference=tmp_path / "tiny.gguf")
