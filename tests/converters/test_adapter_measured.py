"""What a cut adapter costs is measured: less at a higher rank, nothing at full rank, and said where it can't be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from converters import convert, export_adapter
from edgellm.measure.evaluate import evaluate
from edgellm.measure.texts import read_samples
from tests.converters.command import run


@pytest.fixture(scope="module")
def dora(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dora") / "adapter"
    torch.manual_seed(0)
    config = LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def test_the_measured_divergence_falls_with_the_rank(tiny_llama: Path, dora: Path, tmp_path: Path) -> None:
    receipts = {
        rank: export_adapter(tiny_llama, [(dora, 1.0)], tmp_path / f"{rank}.gguf", rank=rank) for rank in (2, 32, 256)
    }
    kld = {rank: receipt.kld.value for rank, receipt in receipts.items() if receipt.kld}
    kept = {rank: receipt.approximation.kept for rank, receipt in receipts.items() if receipt.approximation}
    assert kld[2] > 2 * kld[32] > 0
    assert kld[32] > 2 * kld[256]
    assert kld[256] < 1e-4 < kld[2]
    assert kept[2] < kept[32] < kept[256] <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.gguf", "256.gguf", "32.gguf"]


def test_the_figure_is_that_of_the_two_models(tiny_llama: Path, dora: Path, tmp_path: Path) -> None:
    receipt = export_adapter(tiny_llama, [(dora, 1.0)], tmp_path / "lora.gguf", rank=2)
    convert(tiny_llama, tmp_path / "plain.gguf", quant="F32")
    convert(tiny_llama, tmp_path / "merged.gguf", quant="F32", adapters=[dora])
    samples = read_samples("self", tmp_path / "merged.gguf", n_ctx=256, n_chunks=4, seed=5)
    found = evaluate(
        tmp_path / "plain.gguf", samples, reference=tmp_path / "merged.gguf", lora=[tmp_path / "lora.gguf"]
    )
    assert found.divergence is not None
    assert receipt.kld is not None
    assert receipt.kld.value == pytest.approx(found.divergence.kld_mean.value, rel=0.2)
    without = evaluate(tmp_path / "plain.gguf", samples, reference=tmp_path / "merged.gguf").divergence
    assert without is not None
    assert without.kld_mean.value > receipt.kld.value


def test_what_is_printed(tiny_llama: Path, dora: Path, tmp_path: Path) -> None:
    arguments = ("convert", tiny_llama, "--adapter", dora, "--adapter-only", "--rank", "2", "-o")
    printed = run(*arguments, tmp_path / "lora.gguf")
    assert "cut to rank 2, which keeps" in printed.stdout
    assert "measured  KLD from the merged model 0." in printed.stdout
    found = json.loads(run(*arguments, tmp_path / "again.gguf", "--json").stdout)
    assert found["kld"]["value"] > 0
    assert np.isfinite(found["kld"]["error"])


def test_no_room_to_measure(tiny_llama: Path, dora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        free = 10

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Full)
    from converters.adapters.measured import measure_adapter

    kld, why_not = measure_adapter(tiny_llama, [(dora, 1.0)], tmp_path / "lora.gguf")
    assert kld is None
    assert "0.0 GB are free" in why_not
