"""mlx-lm's LoRA on all experts at once (LoRASwitchLinear): lora_a (experts, r, in), lora_b (experts, out, r)."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from converters import convert, export_adapter
from converters.sources import open_source
from tests.oracles.families import make_reference
from tests.oracles.family_cases import CASES

SCALE, RANK = 2.5, 3


@pytest.mark.parametrize("family", ["qwen3moe", "mixtral"])
def test_switch_mlp(family: str, tmp_path: Path) -> None:
    """Qwen's experts, and Mixtral's with names of their own."""
    kind = {"qwen3moe": "Qwen3MoeConfig", "mixtral": "MixtralConfig"}[family]
    case = next(c for c in CASES if kind in str(c))
    make_reference(case, tmp_path / "model")
    stored = open_source(tmp_path / "model").tensors
    where, names = (
        ("mlp", {n: n for n in ("gate_proj", "up_proj", "down_proj")})
        if family == "qwen3moe"
        else ("block_sparse_moe", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"})
    )
    rng, tensors, expected = np.random.default_rng(0), {}, {}
    for mlx, own in names.items():
        experts = [name for name in stored if f"layers.1.{where}.experts." in name and f".{own}." in name]
        n_out, n_in = stored[experts[0]].shape
        a = rng.normal(size=(len(experts), RANK, n_in)).astype(np.float32)
        b = rng.normal(size=(len(experts), n_out, RANK)).astype(np.float32)
        tensors[f"model.layers.1.{where}.switch_mlp.{mlx}.lora_a"] = a
        tensors[f"model.layers.1.{where}.switch_mlp.{mlx}.lora_b"] = b
        kind = mlx.removesuffix("_proj")
        weights = np.stack([stored[f"model.layers.1.{where}.experts.{e}.{own}.weight"].read() for e in range(len(a))])
        expected[f"blk.1.ffn_{kind}_exps.weight"] = weights + SCALE * b @ a
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "lora_parameters": {"scale": SCALE, "rank": RANK, "dropout": 0.0}}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    convert(tmp_path / "model", tmp_path / "merged.gguf", quant="F32", adapters=[tmp_path / "adapter"])
    convert(tmp_path / "model", tmp_path / "plain.gguf", quant="F32")
    merged, plain = (
        {t.name: t.data for t in gguf.GGUFReader(tmp_path / f"{n}.gguf").tensors} for n in ("merged", "plain")
    )
    for name, values in merged.items():
        assert np.allclose(values, expected.get(name, plain[name]), rtol=1e-5, atol=1e-5), name
    export_adapter(tmp_path / "model", [(tmp_path / "adapter", 1.0)], tmp_path / "lora.gguf")
    pairs = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "lora.gguf").tensors}
    for name, values in expected.items():
        assert np.allclose(
            plain[name] + pairs[f"{name}.lora_b"] @ pairs[f"{name}.lora_a"], values, rtol=1e-4, atol=1e-4
        )
