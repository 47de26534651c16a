"""Error-compensated rounding against plainer formulas, ggml's own bytes and gguf's dequantizers."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from converters.quantize.compensate import can_compensate, compensated, error_of, fit, unpacked
from converters.quantize.grids import GRIDS, SCALES, decoded, scale_of, set_scale, unit_of, values_of
from converters.quantize.types import FILE_TYPES, TYPE_IDS, block_size
from edgellm.native.ggml import quantize_rows

Array = NDArray[np.float32]


def correlated(n: int, n_columns: int, seed: int = 0) -> Array:
    """Inputs as a network has them: few directions, columns of very different size."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, n_columns // 4)) @ rng.standard_normal((n_columns // 4, n_columns))
    x = (x + 2 * rng.standard_normal((n, n_columns))) * np.exp(rng.standard_normal(n_columns))
    return x.astype(np.float32)


def gram_of(x: Array) -> Array:
    return x.T @ x / np.float32(len(x))


def weights_of(n_rows: int, n_columns: int) -> Array:
    return np.random.default_rng(1).standard_normal((n_rows, n_columns), np.float32) * np.float32(0.05)


@pytest.mark.parametrize("type_name", GRIDS)
def test_grid_reproduces_what_ggml_packed(type_name: str) -> None:
    weights = weights_of(24, 512)
    packed = quantize_rows(weights, TYPE_IDS[type_name], importance=np.ones(512, np.float32))
    blocks = packed.reshape(-1, packed.shape[1] * block_size(type_name) // 512)
    grid, values, wanted = GRIDS[type_name], values_of(type_name, blocks), decoded(type_name, blocks)
    levels = np.arange(grid.n_codes, dtype=np.float32) if grid.levels is None else grid.levels
    all_values = values.base[..., None] + values.scale[..., None] * levels
    codes = np.abs(all_values - wanted[..., None]).argmin(-1).astype(np.uint8)
    other = blocks.copy()
    grid.insert(other, np.random.default_rng(0).integers(0, grid.n_codes, codes.shape).astype(np.uint8))
    assert not np.array_equal(other, blocks)
    grid.insert(other, codes)
    assert np.array_equal(decoded(type_name, other), wanted)
    assert (other != blocks).mean() < 1e-3  # only where a scale of zero leaves the code open


@pytest.mark.parametrize("type_name", GRIDS)
def test_loses_less_than_ggmls_own(type_name: str) -> None:
    weights, gram = weights_of(40, 512), gram_of(correlated(3000, 512))
    plain = quantize_rows(weights, TYPE_IDS[type_name], importance=np.diagonal(gram).copy())
    packed = compensated(weights, type_name, fit(gram))
    assert packed.shape == plain.shape
    row = dequantize(packed[:1], GGMLQuantizationType(TYPE_IDS[type_name]))
    assert np.array_equal(unpacked(type_name, packed, 512)[:1], row)
    errors = [error_of(weights, unpacked(type_name, p, 512), gram) for p in (packed, plain)]
    assert errors[0] < 0.75 * errors[1]
    delta = (weights - unpacked(type_name, packed, 512)).astype(np.float64)
    assert errors[0] == pytest.approx(np.trace(delta @ gram @ delta.T), rel=1e-4)


@pytest.mark.parametrize("type_name", ["Q4_0", "Q5_1", "IQ4_NL"])
def test_codes_are_those_of_optimal_brain_quantization(type_name: str) -> None:
    """The same greedy choice by the inverse of what is left of H, without Cholesky factors, panels or spans."""
    weights, gram = weights_of(16, 192), gram_of(correlated(2000, 192))
    found = unpacked(type_name, compensated(weights, type_name, fit(gram), n_sweeps=0), 192)
    left = weights.astype(np.float64)
    h = gram + 0.01 * np.diagonal(gram).mean() * np.eye(192)
    expected = np.empty_like(left)
    for j in range(192):
        if j % 32 == 0:
            part = np.ascontiguousarray(left[:, j : j + 32], np.float32)
            costs = [
                1 / np.linalg.inv(h[k:, k:])[0, 0] for k in range(j, j + 32)
            ]  # of an error that all later ones share
            blocks = quantize_rows(part, TYPE_IDS[type_name], importance=np.array(costs, np.float32))
            values, levels = values_of(type_name, blocks), GRIDS[type_name].levels
            levels = np.arange(GRIDS[type_name].n_codes, dtype=np.float32) if levels is None else levels
        choices = values.base[:, j % 32, None] + values.scale[:, j % 32, None] * levels
        expected[:, j] = np.take_along_axis(choices, np.abs(choices - left[:, j, None]).argmin(1)[:, None], 1)[:, 0]
        inverse = np.linalg.inv(h[j:, j:])
        left[:, j:] -= np.outer((left[:, j] - expected[:, j]) / inverse[0, 0], inverse[0])
    # rows whole, because a tie broken otherwise, which sums in another order do, changes all the rest of its row
    assert np.isclose(found, expected, atol=1e-6).all(axis=1).mean() > 0.8


@pytest.mark.parametrize(
    "type_name",
    [pytest.param(name, marks=[] if name in ("Q4_0", "Q4_K", "IQ4_NL") else [pytest.mark.slow]) for name in GRIDS],
)
def test_sweeps_never_lose_and_end_where_no_step_gains(type_name: str) -> None:
    weights, fitted = weights_of(24, 512), fit(gram_of(correlated(3000, 512)))
    packed = [compensated(weights, type_name, fitted, n_sweeps=n) for n in (0, 1, 2, 60)]
    values = [unpacked(type_name, p, 512).astype(np.float64) for p in packed]
    errors = [np.trace((weights - v) @ fitted.gram @ (weights - v).T) for v in values]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.99 * errors[0]
    # at the end another code for any one weight, with the scales as they are, is no better
    blocks = packed[-1].reshape(-1, packed[-1].shape[1] * block_size(type_name) // 512)
    grid, now = GRIDS[type_name], values_of(type_name, blocks)
    levels = np.arange(grid.n_codes, dtype=np.float32) if grid.levels is None else grid.levels
    choices = (now.base[..., None] + now.scale[..., None] * levels).reshape(24, 512, -1)
    pull = (weights - values[-1]) @ fitted.gram
    step = choices - values[-1][..., None]
    gain = 2 * step * pull[..., None] - step**2 * np.diagonal(fitted.gram)[:, None]
    assert (gain.max(axis=-1) > 1e-3 * errors[-1] / weights.size).mean() < 0.02


@pytest.mark.parametrize("type_name", GRIDS)
def test_weights_are_linear_in_the_scales(type_name: str) -> None:
    packed = quantize_rows(weights_of(8, 512), TYPE_IDS[type_name], importance=np.ones(512, np.float32))
    blocks = packed.reshape(-1, packed.shape[1] * block_size(type_name) // 512)
    parts = [unit_of(type_name, blocks, at) * scale_of(blocks, at)[:, None] for at in SCALES[type_name]]
    assert np.allclose(sum(parts), decoded(type_name, blocks), atol=1e-6)
    other = blocks.copy()
    for at in SCALES[type_name]:
        set_scale(other, at, scale_of(blocks, at) * 2)
    assert np.allclose(decoded(type_name, other), 2 * decoded(type_name, blocks), rtol=1e-3)


def test_what_is_missing_is_made_up_for() -> None:
    """min |W x_f + e - W' x_q|² + λ |W - W'|² with what the outputs shall have besides, as numpy's solver has it."""
    exact = correlated(800, 64)
    seen = exact + correlated(800, 64, seed=2) * np.float32(0.1)
    weights, gram = weights_of(10, 64), gram_of(seen)
    missing = seen[:, :10] * np.float32(0.01) + correlated(800, 12, seed=3)[:, :10] * np.float32(0.002)
    found = fit(gram, exact.T @ seen / np.float32(800), missing.T @ seen / np.float32(800))
    assert found.moved is not None
    assert found.added is not None
    strength = np.sqrt(0.05 * np.diagonal(gram).mean() * 800)
    left = np.concatenate([seen, strength * np.eye(64)]).astype(np.float64)
    right = np.concatenate([exact @ weights.T + missing, strength * weights.T])
    expected = np.linalg.lstsq(left, right, rcond=None)[0].T
    assert np.abs(weights @ found.moved + found.added - expected).max() < 1e-3 * np.abs(expected).max()


def test_moved_weights_solve_the_least_squares() -> None:
    """min |W x_f - W' x_q|² + λ |W - W'|², as numpy's solver of least squares has it."""
    exact = correlated(800, 64)
    seen = exact + correlated(800, 64, seed=2) * np.float32(0.1)
    weights, gram = weights_of(10, 64), gram_of(seen)
    moved = fit(gram, exact.T @ seen / np.float32(800)).moved
    assert moved is not None
    strength = np.sqrt(0.05 * np.diagonal(gram).mean() * 800)
    left = np.concatenate([seen, strength * np.eye(64)]).astype(np.float64)
    right = np.concatenate([exact, strength * np.eye(64)]) @ weights.T
    expected = np.linalg.lstsq(left, right, rcond=None)[0].T
    assert np.abs(weights @ moved - expected).max() < 1e-3 * np.abs(expected).max()


def test_inputs_that_never_vary() -> None:
    """Columns that are always zero, and no inputs at all: nothing infinite, and the weights stay what they were."""
    weights, gram = weights_of(8, 64), gram_of(correlated(500, 64))
    gram[:, 5] = gram[5] = 0
    for h in (gram, np.zeros_like(gram)):
        found = unpacked("Q8_0", compensated(weights, "Q8_0", fit(h, h)), 64)
        assert np.abs(found - weights).max() < 0.05 * np.abs(weights).max() + 1e-3


def test_threads_change_nothing() -> None:
    weights, fitted = weights_of(1300, 96), fit(gram_of(correlated(500, 96)))
    assert np.array_equal(compensated(weights, "Q4_0", fitted, 1), compensated(weights, "Q4_0", fitted, 3))


def test_every_recipe_is_covered() -> None:
    assert {recipe.base for recipe in FILE_TYPES.values() if not can_compensate(recipe.base)} == {"F32", "F16", "BF16"}
