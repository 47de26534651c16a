"""NF4 rounding against bitsandbytes' own quantizer, and `--merge-base`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from converters import convert
from converters.adapters.nf4 import rounded_to_nf4
from tests.converters import reference, tiny
from tests.converters.command import run


@pytest.mark.parametrize("shape", [(64, 64), (48, 40), pytest.param((7, 33), marks=pytest.mark.slow)])
def test_nf4_is_bitsandbytes_own(shape: tuple[int, int]) -> None:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weights = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    packed, state = quantize_4bit(torch.from_numpy(weights), blocksize=64, quant_type="nf4")
    expected = dequantize_4bit(packed, state).numpy()
    np.testing.assert_allclose(rounded_to_nf4(weights), expected, rtol=0, atol=1e-6)


def test_merge_base(tmp_path: Path) -> None:
    """`dequant` is the rounded base plus the adapter's product; embedding, head and norms stay."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    tiny.make_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["down_proj"]))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    convert(tmp_path / "base", tmp_path / "plain.gguf", quant="F32")
    convert(tmp_path / "base", tmp_path / "fp16.gguf", quant="F32", adapters=[tmp_path / "adapter"])
    shown = run("convert", tmp_path / "base", "--adapter", tmp_path / "adapter", "--merge-base", "dequant",
                "-q", "F32", "-o", tmp_path / "dequant.gguf")  # fmt: skip
    assert shown.code == 0, shown.stderr
    assert "rounded to NF4" in shown.stdout
    plain, fp16, dequant = (reference.float_tensors(tmp_path / f"{n}.gguf") for n in ("plain", "fp16", "dequant"))
    for name, values in plain.items():
        linear = name.startswith("blk.") and values.ndim == 2 and "norm" not in name
        if "attn_q" in name or "attn_k" in name:  # blocks run along rows before they are permuted, and rows stay whole
            assert not np.array_equal(dequant[name], values)
            continue
        base = rounded_to_nf4(values) if linear else values
        np.testing.assert_allclose(dequant[name], base + (fp16[name] - values), atol=1e-5, err_msg=name)
    refused = run("convert", tmp_path / "base", "--merge-base", "dequant", "-o", tmp_path / "x.gguf")
    assert refused.code == 2
