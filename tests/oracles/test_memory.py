"""Convert's peak memory, measured: at most 200 MB and four times the largest tensor in float32."""

from __future__ import annotations

import json
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest

from converters import plan
from tests.converters import tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's; ru_maxrss counts the parent's memory too"),
]

# VmHWM begins anew with the program, unlike ru_maxrss, which a child inherits from the test process
CHILD = """
import sys
from edgellm.cli.main import run_command
code = run_command(sys.argv[1:])
status = open("/proc/self/status").read().split()
print(int(status[status.index("VmHWM:") + 1]) * 1024, file=sys.stderr)
sys.exit(code)
"""


def peak(source: Path, out: Path, quant: str) -> int:
    """Bytes that `edgellm convert` had resident at most, in a process of its own."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD, "convert", source, "-o", out, "-q", quant, "--force"],
        capture_output=True,
        check=True,
    )
    return int(child.stderr.splitlines()[-1])


def bound(source: Path) -> int:
    return 200_000_000 + 4 * max(4 * prod(tensor.shape) for tensor in plan(source).tensors)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 layers whose weights, 286 MB of bfloat16, are more than the bound allows to be held."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("deep") / "model"
    folder.mkdir()
    n, ff, kv, vocab = 512, 1792, 256, 1000
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=n, intermediate_size=ff, num_hidden_layers=40, num_attention_heads=8,
        num_key_value_heads=4, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    shapes = {"self_attn.q_proj": (n, n), "self_attn.k_proj": (kv, n), "self_attn.v_proj": (kv, n),
              "self_attn.o_proj": (n, n), "mlp.gate_proj": (ff, n), "mlp.up_proj": (ff, n), "mlp.down_proj": (n, ff),
              "input_layernorm": (n,), "post_attention_layernorm": (n,)}  # fmt: skip
    every = {f"model.layers.{i}.{name}.weight": shape for i in range(40) for name, shape in shapes.items()}
    every |= {"model.embed_tokens.weight": (vocab, n), "lm_head.weight": (vocab, n), "model.norm.weight": (n,)}
    random = torch.Generator().manual_seed(0)
    state = {name: (0.05 * torch.randn(shape, generator=random)).bfloat16() for name, shape in every.items()}
    save_file(state, folder / "model.safetensors")
    tiny.add_tokenizer(folder)
    return folder


@pytest.mark.parametrize("quant", ["F32", "Q4_K_M"])
def test_deep_model(deep: Path, quant: str, tmp_path: Path) -> None:
    size = (deep / "model.safetensors").stat().st_size
    assert size > bound(deep)
    used = peak(deep, tmp_path / "out.gguf", quant)
    print(f"{quant}: {used / 1e6:.0f} MB; bound {bound(deep) / 1e6:.0f} MB, weights {size / 1e6:.0f} MB")
    assert used <= bound(deep)
    assert used <= plan(deep, quant=quant).peak_memory


@pytest.mark.parametrize("quant", ["F32", "Q4_0"])
def test_smollm2(smollm2_folder: Path, quant: str, tmp_path: Path) -> None:
    used = peak(smollm2_folder, tmp_path / "out.gguf", quant)
    print(f"{quant}: {used / 1e6:.0f} MB; bound {bound(smollm2_folder) / 1e6:.0f} MB")
    assert used <= bound(smollm2_folder)
    assert used <= plan(smollm2_folder, quant=quant).peak_memory


def test_smollm2_from_the_gguf(smollm2: Path, tmp_path: Path) -> None:
    used = peak(smollm2, tmp_path / "out.gguf", "Q8_0")
    print(f"{used / 1e6:.0f} MB; bound {bound(smollm2) / 1e6:.0f} MB")
    assert used <= bound(smollm2)
    assert used <= plan(smollm2, quant="Q8_0").peak_memory
