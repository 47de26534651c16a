"""The timed graphs compute the right products in llama.cpp's own memory, and their times add up. No time is judged."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from converters import convert
from edgellm.gguf_header import GGML_TYPES, read_header
from edgellm.measure import kernels as measure
from edgellm.measure.kernels import SpeedModel, calibrate_overhead, decode_seconds, products_of
from edgellm.native import kernels, undisturbed
from edgellm.native.ggml import quantize_rows, row_bytes
from edgellm.native.kernels import Weight, check_weight, products, seconds_per_product
from edgellm.native.model import NativeModel
from tests.converters.tiny import make_model

ROWS, COLUMNS = 48, 512
SLOW = ("IQ1_S", "IQ1_M", "IQ2_XS")  # ggml makes tables for these: 12 s
WEIGHT_TYPES = [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name, _, _ in GGML_TYPES.values()
    if name not in kernels._NO_WEIGHTS
]
RANDOM = np.random.default_rng(3)
X = RANDOM.standard_normal(COLUMNS, np.float32)
Shape = tuple[int, ...]


def weight_of(type_name: str, rows: int = ROWS) -> Weight:
    values = RANDOM.standard_normal((rows, COLUMNS), np.float32)
    ggml_type = check_weight(type_name, values.shape)
    return Weight(ggml_type, COLUMNS, quantize_rows(values, ggml_type, importance=np.ones(COLUMNS, np.float32)))


def dequantized(weight: Weight) -> NDArray[np.float32]:
    values = gguf.quants.dequantize(weight.data, gguf.GGMLQuantizationType(weight.ggml_type))
    return np.asarray(values, np.float32)


@pytest.mark.parametrize("repack", [True, False])
@pytest.mark.parametrize("type_name", WEIGHT_TYPES)
def test_products_are_numpys(type_name: str, repack: bool) -> None:
    weight = weight_of(type_name)
    with products(weight, X, 11, repack=repack) as graphs:
        found = graphs.run_all()
        assert graphs.run_all().tobytes() == found.tobytes()
    matrix = dequantized(weight)
    # ggml rounds the vector to 8 bits; a mistake in the layout would make the error as large as the norm
    allowed = 0.02 * np.linalg.norm(matrix, axis=1) * np.linalg.norm(X) / np.sqrt(COLUMNS) + 1e-3
    assert found.shape == (8, ROWS)
    assert (np.abs(found - matrix @ X) < 4 * allowed).all()


@pytest.mark.parametrize("n_threads", [1, 3])
def test_threads_share_the_rows(n_threads: int) -> None:
    weight = weight_of("F32", rows=101)
    with products(weight, X, 2, n_threads=n_threads) as graphs:
        assert np.allclose(graphs.run_all(), dequantized(weight) @ X, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("type_name", "shape"),
    [
        ("Q4_9", (8, 512)),
        ("Q8_K", (8, 512)),
        ("I32", (8, 512)),
        ("Q4_K", (8, 128)),
        ("Q4_0", (8, 33)),
        ("Q4_0", (512,)),
        ("Q4_0", (2, 8, 512)),
        ("Q4_0", (0, 512)),
        ("F32", (8, -1)),
    ],
)
def test_what_ggml_would_abort_on_is_refused(type_name: str, shape: Shape) -> None:
    with pytest.raises(ValueError, match=r"weight|blocks"):
        seconds_per_product(type_name, shape)


def test_nothing_is_left_behind() -> None:
    weight = Weight(check_weight("Q4_0", (2048, 512)), 512, np.tile(weight_of("Q4_0", 16).data, (128, 1)))

    def run(times: int) -> int:
        for i in range(times):
            with products(weight, X, 20, repack=i % 2 == 0) as graphs:  # 12 MB
                graphs.run_all()
        return int(psutil.Process().memory_info().rss)

    before = run(5)
    assert run(50) - before < 24 << 20


def test_a_large_weight_is_timed_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []
    monkeypatch.setattr(kernels, "_working_set", lambda: 1 << 20)
    monkeypatch.setattr(kernels, "_MAX_WEIGHT", 4 << 20)
    monkeypatch.setattr(kernels, "_random_weight", spy(kernels._random_weight, lambda args: timed.append(args[1])))
    monkeypatch.setattr(kernels, "undisturbed", lambda timing: 2.0 if timing() > 0 else 0.0)
    rows = 151_936 + 3  # a head; the odd rows decide whether it can be repacked
    assert seconds_per_product("Q8_0", (rows, 512)) == pytest.approx(2.0 * rows / timed[0])
    assert timed[0] * row_bytes(8, 512) <= 4 << 20
    assert (rows - timed[0]) % 1024 == 0
    assert seconds_per_product("Q8_0", (64, 512)) == 2.0


def spy(function: Any, see: Any) -> Any:
    def called(*args: Any) -> Any:
        see(args)
        return function(*args)

    return called


@pytest.mark.parametrize("repack", [True, False])
def test_weights_lie_where_llama_cpp_puts_them(tmp_path: Path, caplog: Any, repack: bool) -> None:
    make_model(tmp_path / "model", hidden_size=256, intermediate_size=512, tie_word_embeddings=True)
    path = tmp_path / "model.gguf"
    convert(tmp_path / "model", path, quant="Q4_0", types=[("token_embd", "Q4_0"), ("ffn_down", "Q4_1")])
    with caplog.at_level("DEBUG", logger="edgellm"):
        NativeModel(path, load_mode="repack" if repack else "mmap", n_gpu_layers=0).close()
    theirs = {
        found[1]: float(found[2])
        for record in caplog.records
        if (found := re.search(r"(\S+) model buffer size = +([\d.]+) MiB", record.getMessage()))
    }
    ours: dict[str, float] = {}
    tensors = {name: (info.type_name, info.shape) for name, info in read_header(path).tensors.items()}
    for (type_name, shape), times in products_of(tensors).items():
        ggml_type = check_weight(type_name, shape)
        weight = Weight(ggml_type, shape[1], np.zeros((shape[0], row_bytes(ggml_type, shape[1])), np.uint8))
        with products(weight, np.zeros(shape[1], np.float32), 1, repack=repack) as graphs:
            ours[graphs.buffer_type] = ours.get(graphs.buffer_type, 0) + times * weight.data.nbytes / 2**20
    plain = {"CPU", "CPU_Mapped"}  # there, llama.cpp has the norms and the embeddings as well
    assert set(theirs) - plain == set(ours) - plain
    for name in set(ours) - plain:
        assert ours[name] == pytest.approx(theirs[name], abs=0.011)


TENSORS: dict[str, tuple[str, Shape]] = {
    "token_embd.weight": ("Q8_0", (1000, 64)),
    "output_norm.weight": ("F32", (64,)),
    "rope_freqs.weight": ("F32", (16,)),
    "position_embd.weight": ("F32", (128, 64)),
    "blk.0.attn_norm.weight": ("F32", (64,)),
    "blk.0.attn_q.weight": ("Q4_0", (64, 64)),
    "blk.0.attn_q.bias": ("F32", (64,)),
    "blk.0.attn_output.weight": ("Q4_0", (64, 64)),
    "blk.0.ssm_norm.weight": ("F32", (2, 32)),
    "blk.0.ssm_conv1d.weight": ("F32", (64, 4)),
    "blk.0.ssm_a": ("F32", (64, 16)),
    "blk.0.ffn_gate_inp.weight": ("F32", (8, 64)),
    "blk.0.ffn_up_exps.weight": ("Q4_0", (8, 128, 64)),
    "blk.0.ffn_up_exps.bias": ("F32", (8, 128)),
    "blk.0.attn_k_b.weight": ("Q8_0", (4, 16, 64)),
}


def test_what_a_token_is_multiplied_with() -> None:
    assert products_of(TENSORS, n_expert_used=2) == {
        ("Q8_0", (1000, 64)): 1,
        ("Q4_0", (64, 64)): 2,
        ("F32", (8, 64)): 1,
        ("Q4_0", (128, 64)): 2,
        ("Q8_0", (16, 64)): 4,
    }
    own_head = {**TENSORS, "output.weight": ("Q6_K", (1000, 256))}
    assert ("Q8_0", (1000, 64)) not in products_of(own_head)
    assert products_of(own_head)["Q6_K", (1000, 256)] == 1


def a_nanosecond_a_weight(type_name: str, shape: Shape, **options: object) -> float:
    assert options == {"n_threads": 2, "repack": False}
    return shape[0] * shape[1] * (1e-9 if type_name == "Q4_0" else 2e-9)


def test_products_add_up() -> None:
    seconds = decode_seconds(TENSORS, n_expert_used=2, n_threads=2, repack=False, timing=a_nanosecond_a_weight)
    weights_4, weights_8 = 2 * 64 * 64 + 2 * 128 * 64, 1000 * 64 + 8 * 64 + 4 * 16 * 64
    assert seconds == pytest.approx((weights_4 + 2 * weights_8) * 1e-9)


def test_speed_of_other_types() -> None:
    shapes = {name: shape for name, (_, shape) in TENSORS.items()}
    types = {name: type_name for name, (type_name, _) in TENSORS.items()}
    model = SpeedModel(shapes, 1e-3, 2, 2, False, a_nanosecond_a_weight)
    small = {**types, "token_embd.weight": "Q4_0"}
    saved = model.seconds_per_token(types) - model.seconds_per_token(small)
    assert saved == pytest.approx(1000 * 64 * 1e-9)
    assert model.tokens_per_second(small) == pytest.approx(1 / model.seconds_per_token(small))
    with pytest.raises(KeyError):
        model.tokens_per_second({})


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Shape]]]:
    """Which products were timed: each takes a microsecond, and a decoded token 3 ms, or 4 when others disturb."""
    asked: list[tuple[str, Shape]] = []

    def a_microsecond(type_name: str, shape: Shape, **_: object) -> float:
        asked.append((type_name, shape))
        return 1e-6

    monkeypatch.setattr(measure, "seconds_per_product", a_microsecond)
    decoded = itertools.cycle([4e-3, 3e-3])
    monkeypatch.setattr(measure, "decode_seconds_per_token", lambda *_, **__: next(decoded))
    measure._seconds_per_product.cache_clear()
    yield asked
    measure._seconds_per_product.cache_clear()


def test_a_file_tells_the_overhead(model_path: Path, timed: list[tuple[str, Shape]]) -> None:
    tensors = {name: (info.type_name, info.shape) for name, info in read_header(model_path).tensors.items()}
    n_products = products_of(tensors).total()
    assert n_products == 30 * 7 + 1
    assert calibrate_overhead(model_path) == pytest.approx(3e-3 - n_products * 1e-6)
    n_timed = len(timed)
    model = SpeedModel.of(model_path)
    assert model.tokens_per_second({name: kind for name, (kind, _) in tensors.items()}) == pytest.approx(1 / 3e-3)
    assert len(timed) == n_timed == len(set(timed))  # each once a process


def test_overhead_is_never_negative(model_path: Path, monkeypatch: pytest.MonkeyPatch, timed: Any) -> None:
    monkeypatch.setattr(measure, "decode_seconds_per_token", lambda *_, **__: 1e-9)
    assert calibrate_overhead(model_path) == 0


def test_a_decoded_token_takes_time(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(undisturbed, "_ENOUGH", 40)  # beyond the short context
    assert measure.decode_seconds_per_token(model_path, n_threads=1, repack=False) > 0


def test_disturbed_rounds_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = iter([9.0, 1.0, 2.0, 9.0, 3.0, 0.5, 4.0])
    preemptions = iter([0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3])
    monkeypatch.setattr(undisturbed, "_preemptions", lambda: next(preemptions))
    monkeypatch.setattr(undisturbed, "_ENOUGH", 4)
    assert undisturbed.undisturbed(lambda: next(rounds)) == pytest.approx(1.25)  # quartile of 1 2 3 4


def test_the_fastest_where_all_are_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    preemptions = iter(range(100))
    rounds = iter([3.0, 2.0, 5.0])
    clock = iter([0.0, 0.1, 0.2, 9.9, 10.1])
    monkeypatch.setattr(undisturbed, "_preemptions", lambda: next(preemptions))
    monkeypatch.setattr(undisturbed.time, "perf_counter", lambda: next(clock))
    assert undisturbed.undisturbed(lambda: next(rounds)) == 2.0
