"""Gram matrices against hooks on transformers' linear layers, in one pass or several, whole or in blocks."""

from __future__ import annotations

import gc
import weakref
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import converters.quantize.gram as gram
from converters import convert, to_checkpoint
from converters.calibrate import calibrate_gram
from converters.original import Original
from converters.prepare import open_inputs
from converters.quantize.gram import Gram, collect_gram, read_gram
from converters.quantize.importance import collect_importance
from edgellm.cli.options import n_bytes
from edgellm.errors import CheckpointError
from edgellm.measure.scoring import Sample
from edgellm.measure.texts import read_samples
from edgellm.measure.watching import watch_inputs
from tests.converters import tiny
from tests.converters.command import refused, run

RNG = np.random.default_rng(0)
SAMPLES = [Sample([int(t) for t in RNG.integers(6, 1000, n)], range(1)) for n in (96, 40)]
NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
         "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a checkpoint; model.gguf beside it."""
    root = tmp_path_factory.mktemp("gram")
    tiny.make_model(root / "model", vocab_size=1000)
    convert(root / "model", root / "model.gguf", quant="F32")
    return root / "model"


@pytest.fixture(scope="module")
def collected(model: Path) -> Gram:
    return collect_gram(model.with_suffix(".gguf"), SAMPLES, model.parent / "gram")


def torchs(folder: Path, samples: list[Sample]) -> dict[str, Any]:
    """E[x xᵀ] of every linear layer of the blocks, float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sums: dict[str, Any] = {}
    for path, module in model.named_modules():
        parts = path.split(".")
        if parts[-1] in NAMES:

            def add(_: Any, inputs: Any, name: str = f"blk.{parts[2]}.{NAMES[parts[-1]]}.weight") -> None:
                x = inputs[0][0].double()
                sums[name] = sums.get(name, 0) + (x.T @ x).numpy()

            module.register_forward_pre_hook(add)
    with torch.no_grad():
        for sample in samples:
            model(torch.tensor([sample.tokens]))
    n_tokens = sum(len(sample.tokens) for sample in samples)
    return {name: total / n_tokens for name, total in sums.items()}


def error(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_matrices_are_torchs(model: Path, collected: Gram) -> None:
    expected = torchs(model, SAMPLES)
    assert collected.inputs.keys() == expected.keys()
    for name, matrix in expected.items():
        assert error(collected.matrix(name), matrix) < 1e-3, name
    assert set(collected.counts.values()) == {(136,)}
    for i in range(2):
        shared = [f"blk.{i}.attn_{kind}.weight" for kind in "qkv"]
        assert len({collected.inputs[name] for name in shared}) == 1
        assert collected.inputs[f"blk.{i}.ffn_up.weight"] == collected.inputs[f"blk.{i}.ffn_gate.weight"]


def test_the_diagonal_is_the_importance(model: Path, collected: Gram) -> None:
    importance = collect_importance(model.with_suffix(".gguf"), SAMPLES, "")
    for name, entry in importance.entries.items():
        assert np.allclose(np.diag(collected.matrix(name)), entry.means()[0], rtol=1e-5)


def test_several_passes_give_the_same(model: Path, collected: Gram, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    small = collect_gram(
        model.with_suffix(".gguf"),
        SAMPLES,
        tmp_path,
        memory=650_000,
        on_progress=lambda what, done, total: seen.append((done, total)),
    )
    assert len(seen) >= 6
    assert {total for _, total in seen} == {136 * len(seen) // 2}
    assert seen == sorted(seen)
    for name in collected.inputs:
        assert np.array_equal(small.matrix(name), collected.matrix(name))
    assert read_gram(tmp_path) == small
    with pytest.raises(CheckpointError, match=r"takes 0\.0 GB to collect, more than"):
        collect_gram(model.with_suffix(".gguf"), SAMPLES, tmp_path, memory=1000)


def test_a_watch_lets_go_at_once(model: Path) -> None:
    """Not when garbage is collected: the matrices of one pass would still be there in the next."""

    class Held:
        pass

    held = Held()
    seen = weakref.ref(held)
    gc.disable()
    try:
        watch_inputs(model.with_suffix(".gguf"), SAMPLES[:1], {"blk.0.attn_q.weight"}, lambda *_, held=held: None)
        del held
        assert seen() is None
    finally:
        gc.enable()


def test_experts_bring_rows_more_than_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a batch leaves is counted: a token's inputs for each expert it uses."""
    header = SimpleNamespace(metadata={"mixtral.expert_used_count": 3})
    monkeypatch.setattr(gram, "read_header", lambda path: header)
    assert [gram._rows_kept(model, SAMPLES, n_experts) for n_experts in (1, 8)] == [96, 3 * 96]


def test_wide_inputs_in_blocks(model: Path, collected: Gram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "MAX_WIDTH", 100)
    found = collect_gram(model.with_suffix(".gguf"), SAMPLES, tmp_path)
    name = "blk.1.ffn_down.weight"
    whole, blocks = collected.matrix(name), found.blocks(name)
    assert sum(len(block[0]) for block in blocks) == len(whole)
    assert max(len(block[0]) for block in blocks) <= 100
    at = 0
    for block in blocks:
        end = at + len(block[0])
        assert np.allclose(block[0], whole[at:end, at:end], rtol=1e-5, atol=1e-6 * np.abs(whole).max())
        at = end
    assert found.matrix(name)[0, -1] == 0


def test_experts_have_matrices_of_their_own(tmp_path: Path) -> None:
    from tests.oracles.families import make_reference
    from tests.oracles.family_cases import CASES

    make_reference(next(case for case in CASES if case.name.startswith("qwen3moe")), tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "model.gguf", quant="F32")
    found = collect_gram(tmp_path / "model.gguf", SAMPLES, tmp_path / "gram")
    importance = collect_importance(tmp_path / "model.gguf", SAMPLES, "")
    name = "blk.0.ffn_down_exps.weight"
    (block,) = found.blocks(name)
    entry = importance.entries[name]
    assert found.counts[found.inputs[name]] == tuple(entry.counts)
    assert entry.counts.sum() == 2 * 136
    for e, count in enumerate(entry.counts):
        if count:
            assert np.allclose(np.diag(block[e]), entry.means()[e], rtol=1e-5)
            assert np.linalg.matrix_rank(block[e], tol=1e-4 * np.abs(block[e]).max()) <= count
    assert found.inputs["blk.0.ffn_up_exps.weight"] == found.inputs["blk.0.ffn_gate_exps.weight"]


def test_an_unfinished_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="collect them again"):
        read_gram(tmp_path)
    (tmp_path / "gram.json").write_text("[]", encoding="utf-8")
    with pytest.raises(CheckpointError, match="collect them again"):
        read_gram(tmp_path)


def test_the_cache(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Collected once for a model, its adapters and a text; an interrupted collection leaves nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = Path(__file__).parents[2] / "LICENSE"
    inputs = open_inputs(model)

    def stop(what: str, done: int, total: int) -> None:
        if what == "watching" and done:
            raise KeyboardInterrupt

    with closing(Original(inputs, tmp_path / "out.gguf")) as original:
        with pytest.raises(KeyboardInterrupt):
            calibrate_gram(inputs, original, text, on_progress=stop)
        assert list((tmp_path / "cache" / "edgellm" / "statistics").iterdir()) == []
        first, cached = calibrate_gram(inputs, original, text)
        assert not cached
        again, cached = calibrate_gram(inputs, original, text, memory=1)
        assert cached
        assert again == first
        (tmp_path / "other.txt").write_text("Some other words. " * 60, encoding="utf-8")
        assert not calibrate_gram(inputs, original, tmp_path / "other.txt")[1]
    assert list(tmp_path.glob("out.gguf*")) == []


@pytest.mark.slow
def test_smollm2(model_path: Path, tmp_path: Path) -> None:
    folder = to_checkpoint(model_path, tmp_path / "checkpoint")
    convert(folder, tmp_path / "f32.gguf", quant="F32")
    samples = read_samples(Path(__file__).parents[2] / "LICENSE", tmp_path / "f32.gguf", n_ctx=512, n_chunks=2)
    found = collect_gram(tmp_path / "f32.gguf", samples, tmp_path / "gram")
    errors = {name: error(found.matrix(name), matrix) for name, matrix in torchs(folder, samples).items()}
    assert len(errors) == 210
    assert max(errors.values()) < 1e-3


def test_convert_saves_them(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("Some words to read. " * 60, encoding="utf-8")
    options = ("-q", "Q8_0", "--calibrate", tmp_path / "text.txt", "--memory", "4 MB")
    run("convert", model, "-o", tmp_path / "a.gguf", *options, "--save-gram", tmp_path / "gram")
    saved = read_gram(tmp_path / "gram")
    assert saved.matrix("blk.0.ffn_down.weight").shape == (256, 256)
    refused(run("convert", model, "-o", tmp_path / "b.gguf", *options, "--save-gram", tmp_path / "gram"), 1, "empty")
    for options, what in ((("--save-gram", tmp_path / "x"), "calibrate"), (("--memory", "4 apples"), "no size")):
        ended = run("convert", model, "-o", tmp_path / "b.gguf", *options)
        assert (ended.code, what in ended.stderr) == (2, True)
    assert not (tmp_path / "b.gguf").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("85MB", 85_000_000), ("2.5 GB", 2_500_000_000), ("1gib", 1 << 30), ("512", 512), ("3k", 3000), ("1.B", 1)],
)
def test_sizes(text: str, expected: int) -> None:
    assert n_bytes(text) == expected
