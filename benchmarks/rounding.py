"""What else could lower the rounding error beside the compensation that is built in: three published ways, tried.

    python benchmarks/rounding.py --checkpoint FOLDER --calibration FILE --test FILE [--block 12] [--types Q4_0,Q4_K]

For each kind of matrix of one block, tr(ΔW H ΔWᵀ) on inputs that nothing was fitted to, as a ratio to the compensated
matrix's own: more sweeps; columns rescaled by the inputs' size to a power (AWQ, Lin et al. 2023); the inputs rotated
at random, with the norm's weights folded in (QuaRot, Ashkboos et al. 2024; only of what reads the residual stream);
rounding learned from there by signed gradients (SignRound, Cheng et al. 2023). Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import converters
from converters.quantize.compensate import compensated, error_of, fit, unpacked
from converters.quantize.gram import Gram, collect_gram
from converters.quantize.grids import GRIDS, values_of
from converters.quantize.types import block_size
from converters.sources.gguf_file import read_tensor
from edgellm.gguf_header import read_header
from edgellm.measure.texts import read_samples

Array = NDArray[np.float32]

KINDS = "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"
READS_RESIDUAL = {"attn_q": "attn_norm", "attn_k": "attn_norm", "attn_v": "attn_norm"} | dict.fromkeys(
    ("ffn_gate", "ffn_up"), "ffn_norm"
)
_POWERS = 0.1, 0.25, 0.5
_N_SWEEPS = 8
_STEPS, _RATES = 200, (5e-3, 1e-3, 2e-4)  # SignRound's 200 steps of 1 / 200, in steps of the grid; and smaller ones


def left(weights: Array, type_name: str, h: Array, h_test: Array, n_sweeps: int = 2) -> tuple[float, Array]:
    """The error on the test inputs after compensation on the others, and the rounded weights."""
    packed = compensated(weights, type_name, fit(h), n_sweeps=n_sweeps)
    rounded = unpacked(type_name, packed, weights.shape[1])
    return error_of(weights, rounded, h_test), rounded


def rescaled(weights: Array, type_name: str, h: Array, h_test: Array, power: float) -> float:
    """Columns times s, inputs by s: s = E[x²] ** (power / 2)."""
    s = np.diagonal(h).clip(1e-12) ** (power / 2)
    s = (s / np.exp(np.log(s).mean())).astype(np.float32)
    both = np.outer(s, s)
    return left(weights * s, type_name, h / both, h_test / both)[0]


def rotated(weights: Array, type_name: str, h: Array, h_test: Array, norm: Array) -> float:
    """The norm's weights in the matrix, and both turned at random."""
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=h.shape))[0].astype(np.float32)
    both = np.outer(norm, norm)
    turned = np.ascontiguousarray((weights * norm) @ turn)
    return left(turned, type_name, turn.T @ (h / both) @ turn, turn.T @ (h_test / both) @ turn)[0]


def learned(weights: Array, type_name: str, h: Array, h_test: Array) -> float:
    """From the compensated codes on, by the sign of the error's gradient; the best codes on the way are kept."""
    packed = compensated(weights, type_name, fit(h))
    n_block = block_size(type_name)
    blocks = packed.reshape(-1, packed.shape[1] * n_block // weights.shape[1])
    found = values_of(type_name, blocks)
    base, scale = (part.reshape(weights.shape) for part in (found.base, found.scale))
    scale = np.where(scale == 0, 1, scale)
    rounded = unpacked(type_name, packed, weights.shape[1])
    codes = (rounded - base) / scale
    best, best_error = rounded, error_of(weights, rounded, h)
    for rate in _RATES:
        place = codes + np.clip((weights - rounded) / scale, -0.49, 0.49)  # rounds to the same code
        for step in range(_STEPS):
            now = base + scale * np.rint(place).clip(0, GRIDS[type_name].n_codes - 1)
            error = error_of(weights, now, h)
            if error < best_error:
                best, best_error = now, error
            place -= rate * (1 - step / _STEPS) * np.sign(((now - weights) @ h) * scale)
    return error_of(weights, best, h_test)


def trials(weights: Array, type_name: str, h: Array, h_test: Array, norm: Array | None) -> Iterator[tuple[str, float]]:
    """Way → error on the test inputs, over that of compensation alone."""
    own = left(weights, type_name, h, h_test)[0]
    yield f"{_N_SWEEPS} sweeps", left(weights, type_name, h, h_test, _N_SWEEPS)[0] / own
    for power in _POWERS:
        yield f"rescaled, power {power}", rescaled(weights, type_name, h, h_test, power) / own
    if norm is not None:
        yield "rotated", rotated(weights, type_name, h, h_test, norm) / own
    if GRIDS[type_name].levels is None:
        yield "learned", learned(weights, type_name, h, h_test) / own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "calibration", "test"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--block", type=int, default=12)
    parser.add_argument("--types", default="Q4_0,Q4_K")
    parser.add_argument("--rows", type=int, default=256, help="of each matrix")
    options = parser.parse_args()
    ratios: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        exact = Path(name) / "exact.gguf"
        converters.convert(options.checkpoint, exact, quant="F32", receipt="off")
        grams: list[Gram] = []
        for part, n in (("calibration", 16), ("test", 12)):
            samples = read_samples(getattr(options, part), exact, n_ctx=512, n_chunks=n)
            grams.append(collect_gram(exact, samples, Path(name) / part))
        infos = read_header(exact).tensors.items()
        tensors = {key: read_tensor(exact, info) for key, info in infos if key.startswith(f"blk.{options.block}.")}
        for kind in KINDS:
            place = f"blk.{options.block}.{kind}.weight"
            h, h_test = (gram.matrix(place) for gram in grams)
            weights = np.ascontiguousarray(tensors[place][: options.rows])
            norm = tensors.get(f"blk.{options.block}.{READS_RESIDUAL.get(kind)}.weight")
            for type_name in options.types.split(","):
                if weights.shape[1] % block_size(type_name):
                    continue
                found = ratios[f"{kind} {type_name}"] = dict(trials(weights, type_name, h, h_test, norm))
                line = "  ".join(f"{way} {ratio:.3f}" for way, ratio in found.items())
                print(f"{kind:<12} {type_name:<5} {line}", flush=True)
    print(json.dumps({"benchmark": "rounding", "ratios": ratios}))


if __name__ == "__main__":
    main()
