"""Importance matrices: collected like torch's sums, llama.cpp's files both ways, what quantizers make of them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from converters import convert
from converters.quantize.importance import Importance, collect_importance, read_importance, write_importance
from edgellm.errors import CheckpointError
from edgellm.measure.scoring import Sample
from tests.converters import reference, tiny
from tests.converters.command import refused, run

RNG = np.random.default_rng(0)
SAMPLES = [Sample([int(t) for t in RNG.integers(6, 1000, n)], range(1)) for n in (96, 96, 40)]
TEXT = " ".join(f"Sentence number {i} of a text to calibrate on, with some words." for i in range(150))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("importance")
    tiny.make_model(root / "model", vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=8)
    convert(root / "model", root / "f32.gguf", quant="F32", receipt="off")
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def collected(folder: Path) -> Importance:
    return collect_importance(folder / "f32.gguf", SAMPLES, "random tokens")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


def test_sums_are_torchs(folder: Path, collected: Importance) -> None:
    """Hooks on transformers' linear layers see the same inputs."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip
    sums: dict[str, Any] = {}
    for path, module in model.named_modules():
        parts = path.split(".")
        if parts[-1] in names:
            name = f"blk.{parts[2]}.{names[parts[-1]]}.weight"

            def add(_: Any, inputs: Any, name: str = name) -> None:
                sums[name] = sums.get(name, 0) + inputs[0][0].double().square().sum(0).numpy()

            module.register_forward_pre_hook(add)
    with torch.no_grad():
        for sample in SAMPLES:
            model(torch.tensor([sample.tokens]))
    assert collected.entries.keys() == sums.keys()
    for name, entry in collected.entries.items():
        # llama.cpp keeps keys and values in F16
        assert np.linalg.norm(entry.sums[0] - sums[name]) < 2e-3 * np.linalg.norm(sums[name]), name
        assert entry.counts.tolist() == [96 + 96 + 40]


@pytest.mark.parametrize("file", ["matrix.gguf", "matrix.dat"])
def test_files_come_back(collected: Importance, file: str, tmp_path: Path) -> None:
    if file.endswith(".dat"):
        write_dat(collected, tmp_path / file)
    else:
        write_importance(collected, tmp_path / file)
    found = read_importance(tmp_path / file)
    assert (found.dataset, found.n_chunks) == ("random tokens", 3)
    assert found.entries.keys() == collected.entries.keys()
    for name, entry in found.entries.items():
        assert np.allclose(entry.means(), collected.entries[name].means(), rtol=1e-6)


def write_dat(importance: Importance, path: Path) -> None:
    """llama-imatrix' older format, as its save_imatrix_legacy writes it."""
    data = struct.pack("<i", len(importance.entries))
    for name, entry in importance.entries.items():
        values = (entry.means() * 3).astype(np.float32).ravel()
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 3, len(values)) + values.tobytes()
    path.write_bytes(data + struct.pack("<ii", 3, len(importance.dataset)) + importance.dataset.encode())


def test_the_file_has_llama_imatrix_form(collected: Importance, tmp_path: Path) -> None:
    write_importance(collected, tmp_path / "matrix.gguf")
    reader = gguf.GGUFReader(tmp_path / "matrix.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        "general.type": "imatrix",
        "imatrix.datasets": ["random tokens"],
        "imatrix.chunk_count": 3,
        "imatrix.chunk_size": 96,
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert list(tensors["blk.0.ffn_down.weight.in_sum2"].shape) == [512, 1]
    assert tensors["blk.0.ffn_down.weight.counts"].data.tolist() == [[232.0]]


SLOW = "Q5_0", "Q4_1", "Q3_K_M", "IQ4_XS", "IQ4_NL", "Q2_K"


@pytest.mark.parametrize("quant", ["Q4_0", "Q4_K_M", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_bytes_are_llama_cpps_with_the_same_matrix(
    folder: Path, collected: Importance, quant: str, tmp_path: Path
) -> None:
    write_importance(collected, tmp_path / "matrix.gguf")
    convert(folder / "model", tmp_path / "ours.gguf", quant=quant, imatrix=tmp_path / "matrix.gguf")
    means = {name: entry.means() for name, entry in collected.entries.items()}
    from converters.quantize.types import FILE_TYPES

    reference.llama_quantize(folder / "f32.gguf", tmp_path / "theirs.gguf", FILE_TYPES[quant].number, means)
    ours, theirs = (reference.tensors(tmp_path / f"{who}.gguf") for who in ("ours", "theirs"))
    assert {n: t[:2] for n, t in ours.items()} == {n: t[:2] for n, t in theirs.items()}
    assert [name for name in theirs if ours[name][2] != theirs[name][2]] == []
    convert(folder / "model", tmp_path / "plain.gguf", quant=quant)
    assert reference.tensors(tmp_path / "plain.gguf") != ours


def test_calibrate_collects_once(
    folder: Path, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("converters.calibrate._SELF_CHUNKS", 4)

    def made(name: str, **options: Any) -> Any:
        text = options.pop("text", folder / "text.txt")
        options["compensate"] = False
        receipt = convert(folder / "model", tmp_path / name, quant="Q4_0", calibrate=text, **options)
        return receipt, reference.tensors(tmp_path / name)

    first, tensors = made("first.gguf", save_imatrix=tmp_path / "saved.gguf")
    assert "text.txt" in first.calibration
    assert first.run_notes == ()
    again, same = made("again.gguf")
    assert any("earlier conversion" in note for note in again.run_notes)
    assert same == tensors
    assert len(list((own_cache / "edgellm" / "statistics").iterdir())) == 1
    convert(folder / "model", tmp_path / "read.gguf", quant="Q4_0", imatrix=tmp_path / "saved.gguf")
    assert reference.tensors(tmp_path / "read.gguf") == tensors
    metadata = reference.metadata(tmp_path / "first.gguf")
    assert metadata["quantize.imatrix.dataset"] == "text.txt"
    assert metadata["quantize.imatrix.entries_count"] == 8 * 7
    (tmp_path / "other.txt").write_text(TEXT[:2000] * 3, encoding="utf-8")
    other, different = made("other.gguf", text=tmp_path / "other.txt")
    assert other.run_notes == ()
    assert different != tensors
    own, _ = made("self.gguf", text="self")
    assert "of self" in own.calibration


def test_bad_files(folder: Path, collected: Importance, tmp_path: Path) -> None:
    model = folder / "model"
    (tmp_path / "nonsense").write_bytes(b"nonsense" * 10)
    refused(run("convert", model, "--imatrix", tmp_path / "nonsense", "-o", tmp_path / "o.gguf"), 3, "no importance")
    refused(run("convert", model, "--imatrix", tmp_path / "nothing", "-o", tmp_path / "o.gguf"), 3, "check the path")
    refused(
        run("convert", model, "--imatrix", folder / "f32.gguf", "-o", tmp_path / "o.gguf"), 3, "no importance matrix"
    )
    other = Importance({"blk.0.ffn_up.weight": collected.entries["blk.0.ffn_down.weight"]}, "", 1, 1)
    write_importance(other, tmp_path / "other.gguf")
    refused(run("convert", model, "--imatrix", tmp_path / "other.gguf", "-o", tmp_path / "o.gguf"), 3, "another model")
    strange = Importance({"blk.0.ffn_up_exps.weight": collected.entries["blk.0.ffn_up.weight"]}, "", 1, 1)
    write_importance(strange, tmp_path / "strange.gguf")
    ended = run("convert", model, "--imatrix", tmp_path / "strange.gguf", "-o", tmp_path / "o.gguf")
    refused(ended, 3, "another model: it has blk.0.ffn_up_exps.weight")
    data = (tmp_path / "other.gguf").read_bytes()
    for end in range(0, len(data), 97):
        (tmp_path / "cut.gguf").write_bytes(data[:end])
        with pytest.raises(CheckpointError):
            read_importance(tmp_path / "cut.gguf")
    write_dat(other, tmp_path / "other.dat")
    data = (tmp_path / "other.dat").read_bytes()
    for end in range(0, len(data) - 40, 97):
        (tmp_path / "cut.dat").write_bytes(data[:end])
        with pytest.raises(CheckpointError):
            read_importance(tmp_path / "cut.dat")
    refused(run("convert", model, "--calibrate", tmp_path / "nothing", "-o", tmp_path / "o.gguf"), 3, "check the path")
    both = run("convert", model, "--calibrate", "self", "--imatrix", tmp_path / "other.gguf", "-o", tmp_path / "o.gguf")
    assert both.code == 2
    assert not (tmp_path / "o.gguf").exists()
