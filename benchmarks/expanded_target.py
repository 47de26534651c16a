"""Makes a larger model that computes the same function: a synthetic target where no real one can be had.

Each of SmolLM2's 30 blocks is followed by copies whose o_proj and down_proj are zero, which add nothing to the residual
stream. The compute is real, the function is the small model's: 6 blocks for each make 666 million parameters. Label
every figure from it as synthetic.

    python benchmarks/expanded_target.py OUT [--blocks 6] [--dtype bf16]
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import converters
from converters.safetensors_writer import DTYPES, OutTensor, write_shards
from converters.sources import open_source
from edgellm.catalog.cards import resolve

_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)")
_SILENT = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def expand(base: Path, out: Path, n_blocks: int, dtype: str = "bf16", noise: float = 0.0) -> Path:
    """Write the checkpoint `base` with n_blocks for each of its own as the folder `out`.

    noise: standard deviation of what stands in the silent matrices instead of zeros, which quantizers are done with
    sooner; the function is another one then.
    """
    source = open_source(base)
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"), dirs_exist_ok=True)
    config = dict(source.config) | {"num_hidden_layers": source.config["num_hidden_layers"] * n_blocks}
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tensors = []
    for name, tensor in source.tensors.items():
        match = _BLOCK.fullmatch(name)
        if not match:
            tensors.append(OutTensor(name, tensor.shape, tensor.read))
            continue
        for k in range(n_blocks):
            read = tensor.read if k == 0 or match[2] not in _SILENT else _silent(tensor.shape, noise)
            tensors.append(OutTensor(f"model.layers.{int(match[1]) * n_blocks + k}.{match[2]}", tensor.shape, read))
    write_shards(out, tensors, dtype)
    return out


def _silent(shape: tuple[int, ...], noise: float) -> Callable[[], NDArray[np.float32]]:
    return lambda: np.float32(noise) * np.random.default_rng(0).standard_normal(shape, np.float32)


def expanded_smollm2(out: Path, n_blocks: int, dtype: str = "bf16", noise: float = 0.0) -> Path:
    """`expand` of the model that `edgellm[demo]` brings along."""
    with tempfile.TemporaryDirectory() as folder:
        base = converters.to_checkpoint(resolve(None), Path(folder) / "base", dtype=dtype)
        return expand(base, out, n_blocks, dtype, noise)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    options = parser.parse_args()
    print(expanded_smollm2(options.out, options.blocks, options.dtype))
