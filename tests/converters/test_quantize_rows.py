"""`quantize_rows` byte for byte: against gguf's numpy quantizers, and against one call of ggml over all rows."""

from __future__ import annotations

import ctypes

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from converters.quantize.types import TYPE_IDS, WEIGHT_TYPES
from edgellm.native import ggml

N_PER_ROW = 512
# more than one slab, and a last one that is not full
N_ROWS = 2 * ggml._SLAB_WEIGHTS // N_PER_ROW + 37

# In a block of zeros where some are negative, numpy and ggml choose scales of zero with different signs. ggml decides
# (see test_equals_one_call_of_ggml, which has these rows); here the values must agree.
NEGATIVE_ZEROS = slice(1, 3)
SIGNED_ZERO_DIFFERS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")


def _gguf_can_quantize(name: str) -> bool:
    try:
        gguf.quants.quantize(np.ones((1, 256), dtype=np.float32), gguf.GGMLQuantizationType[name])
    except NotImplementedError:
        return False
    return True


BY_NUMPY = [name for name in WEIGHT_TYPES if _gguf_can_quantize(name)]


@pytest.fixture(scope="module")
def weights() -> NDArray[np.float32]:
    """Rows of every kind: normal, zeros, signed zeros, subnormal, large, constant, one outlier, wide range."""
    random = np.random.default_rng(7)
    rows = random.standard_normal((N_ROWS, N_PER_ROW)).astype(np.float32)
    rows[0] = 0.0
    rows[1] = -0.0
    rows[2, ::2], rows[2, 1::2] = 0.0, -0.0
    rows[3] = np.float32(1e-40) * random.standard_normal(N_PER_ROW).astype(np.float32)
    rows[4] *= 1e4
    rows[5] = 0.37
    rows[6] = -0.37
    rows[7] *= 1e-7
    rows[8, :] = 0.0
    rows[8, 100] = -5.0
    rows[9] = np.exp(random.uniform(-20, 5, N_PER_ROW)).astype(np.float32)
    rows[10, :32] = 0.0
    rows[11] = np.round(rows[11] * 4) / 4  # ties
    rows[-1] *= 1e-3
    return rows


def test_gguf_still_quantizes_what_it_used_to() -> None:
    assert {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"} <= set(BY_NUMPY)


@pytest.mark.parametrize("name", BY_NUMPY)
@pytest.mark.filterwarnings("ignore::RuntimeWarning:gguf.quants")  # it divides by subnormal scales and clips later
def test_equals_gguf_quants(name: str, weights: NDArray[np.float32]) -> None:
    ggml_type = gguf.GGMLQuantizationType[name]
    expected = gguf.quants.quantize(weights, ggml_type).view(np.uint8)
    ours = ggml.quantize_rows(weights, TYPE_IDS[name])
    if name in SIGNED_ZERO_DIFFERS:
        assert not gguf.quants.dequantize(expected[NEGATIVE_ZEROS], ggml_type).any()
        assert not gguf.quants.dequantize(ours[NEGATIVE_ZEROS], ggml_type).any()
        ours[NEGATIVE_ZEROS] = expected[NEGATIVE_ZEROS]
    assert np.array_equal(ours, expected)


@pytest.mark.parametrize("name", [name for name in WEIGHT_TYPES if name != "F32"])
def test_equals_one_call_of_ggml(name: str, weights: NDArray[np.float32]) -> None:
    rows = weights[: 600 if name.startswith(("IQ", "Q2", "Q3")) else N_ROWS]  # the slow types
    rows = np.concatenate([rows] * (-(-N_ROWS // len(rows))))[:N_ROWS]
    expected = np.empty((len(rows), ggml.row_bytes(TYPE_IDS[name], N_PER_ROW)), dtype=np.uint8)
    n = ggml.base_library().ggml_quantize_chunk(
        TYPE_IDS[name], rows.ctypes.data, expected.ctypes.data, 0, len(rows), N_PER_ROW, ctypes.c_void_p(0)
    )
    assert n == expected.nbytes
    for n_threads in (0, 1, 3):
        assert np.array_equal(ggml.quantize_rows(rows, TYPE_IDS[name], n_threads=n_threads), expected)


@pytest.mark.parametrize("name", ["Q4_K", "Q4_0", "IQ4_NL"])
def test_importance_reaches_ggml(name: str, weights: NDArray[np.float32]) -> None:
    rows = np.ascontiguousarray(weights[12:80])
    importance = np.random.default_rng(1).uniform(0.01, 9, N_PER_ROW).astype(np.float32)
    expected = np.empty((len(rows), ggml.row_bytes(TYPE_IDS[name], N_PER_ROW)), dtype=np.uint8)
    ggml.base_library().ggml_quantize_chunk(
        TYPE_IDS[name], rows.ctypes.data, expected.ctypes.data, 0, len(rows), N_PER_ROW, importance.ctypes.data
    )
    assert np.array_equal(ggml.quantize_rows(rows, TYPE_IDS[name], importance=importance), expected)
    assert not np.array_equal(ggml.quantize_rows(rows, TYPE_IDS[name]), expected)


def test_views_and_leading_dimensions(weights: NDArray[np.float32]) -> None:
    cube = weights[12:72].reshape(3, 20, N_PER_ROW)
    swapped = cube.swapaxes(0, 1)  # not contiguous
    expected = gguf.quants.quantize(np.ascontiguousarray(swapped), gguf.GGMLQuantizationType.Q8_0)
    ours = ggml.quantize_rows(swapped, TYPE_IDS["Q8_0"])
    assert ours.shape == (20, 3, N_PER_ROW // 32 * 34)
    assert ours.tobytes() == expected.tobytes()
    one = ggml.quantize_rows(weights[0], TYPE_IDS["F16"])
    assert one.tobytes() == weights[0].astype(np.float16).tobytes()


def test_rows_that_are_no_whole_number_of_blocks() -> None:
    with pytest.raises(ValueError, match="288 weights a row are no whole number of Q4_K blocks"):
        ggml.quantize_rows(np.zeros((2, 288), dtype=np.float32), TYPE_IDS["Q4_K"])
    with pytest.raises(ValueError, match="importance has shape"):
        ggml.quantize_rows(
            np.zeros((2, 256), dtype=np.float32), TYPE_IDS["Q4_K"], importance=np.ones(255, dtype=np.float32)
        )
