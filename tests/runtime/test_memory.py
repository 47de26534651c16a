"""What a model is expected to take, against what llama.cpp then takes."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest

import edgellm
from edgellm.config import LoadParams
from edgellm.engine import memory
from edgellm.engine.memory import Memory, available_memory, check_fits, kv_bytes, memory_need
from edgellm.errors import GenerationError
from edgellm.gguf_header import GGUFHeader, TensorInfo, read_header

MB, GB = 10**6, 10**9


class Sizes(logging.Handler):
    """The buffers that llama.cpp says it makes, by name, in MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if line := re.search(r"(KV|compute|model) buffer size = +([\d.]+) MiB", record.getMessage()):
            self.found[line[1]] = self.found.get(line[1], 0.0) + float(line[2])


@pytest.mark.parametrize(
    "params",
    [
        LoadParams(n_ctx=2048),
        LoadParams(n_ctx=1000, n_batch=64, flash_attn=False),
        LoadParams(n_ctx=2048, n_batch=1024, kv_type="q8_0", load_mode="mmap"),
        LoadParams(n_ctx=600, kv_type="f32", flash_attn=False),
        LoadParams(n_ctx=0, n_batch=256, kv_type="bf16", flash_attn=False),
    ],
)
def test_the_estimate_is_what_llama_cpp_reports(model_path: Path, params: LoadParams) -> None:
    sizes, logger = Sizes(), logging.getLogger("edgellm.native.library")
    logger.addHandler(sizes)
    logger.setLevel(logging.DEBUG)
    try:
        edgellm.load(model_path, params).close()
    finally:
        logger.removeHandler(sizes)
        logger.setLevel(logging.NOTSET)
    need = memory_need(read_header(model_path), params)
    assert need.kv / 2**20 == pytest.approx(sizes.found["KV"], abs=0.01)
    assert (need.mapped + need.copied) / 2**20 == pytest.approx(sizes.found["model"], abs=0.01)
    assert 0.9 < need.compute / 2**20 / sizes.found["compute"] < 2.2  # rough, and rather too much


def header(metadata: dict[str, Any], n_bytes: int = 0, type_name: int = 2) -> GGUFHeader:
    """Of a llama-like file with one weight of so many bytes, Q4_0 unless said otherwise."""
    shape = (n_bytes // 18, 32)
    weight = TensorInfo("blk.0.ffn_up.weight", shape, type_name, 0, n_bytes)
    described = {"general.architecture": "x", **{f"x.{key}": value for key, value in metadata.items()}}
    return GGUFHeader(Path("made-up.gguf"), 3, described, {weight.name: weight}, n_bytes, {})


LLAMA_8B = {
    "block_count": 32,
    "context_length": 131072,
    "embedding_length": 4096,
    "feed_forward_length": 14336,
    "attention.head_count": 32,
    "attention.head_count_kv": 8,
}


def test_keys_and_values_of_kinds_of_models() -> None:
    assert kv_bytes(header(LLAMA_8B), 8192, "f16") == 2**30
    assert kv_bytes(header(LLAMA_8B), 8192, "q8_0") == 2**30 * 34 // 64
    assert kv_bytes(header(LLAMA_8B), 1, "f16") == 2**30 // 32  # a whole number of 256 cells
    assert kv_bytes(header({**LLAMA_8B, "attention.causal": False}), 8192, "f16") == 0
    some = {**LLAMA_8B, "attention.head_count_kv": [8, 0, 0, 0] * 8}
    assert kv_bytes(header(some), 8192, "f16") == 2**28
    assert kv_bytes(header({**LLAMA_8B, "full_attention_interval": 4}), 8192, "f16") == 2**28
    assert kv_bytes(header({**LLAMA_8B, "attention.shared_kv_layers": 16}), 8192, "f16") == 2**29
    wide = {**LLAMA_8B, "attention.key_length": 256, "attention.value_length": 256}
    assert kv_bytes(header(wide), 8192, "f16") == 2**31
    sliding = {
        **wide,
        "attention.key_length_swa": 128,
        "attention.value_length_swa": 128,
        "attention.sliding_window_pattern": [True, False] * 16,
    }
    assert kv_bytes(header(sliding), 8192, "f16") == 2**30 + 2**29


def test_what_fits_is_loaded_and_what_does_not_is_refused_with_advice() -> None:
    model = header(LLAMA_8B, 4_500 * MB)
    check_fits(model, LoadParams(), Memory(8 * GB, 16 * GB))
    check_fits(model, LoadParams(load_mode="mmap"), Memory(2 * GB, 16 * GB))  # pages of the file can come and go
    with pytest.raises(GenerationError, match=r"free of 16 GB; load with n_ctx 32768 \(--n-ctx\), which fits$"):
        check_fits(model, LoadParams(n_ctx=131072), Memory(10 * GB, 16 * GB))
    with pytest.raises(GenerationError, match=r"4\.50 GB weights.*2\.00 GB free.*; load with load_mode mmap"):
        check_fits(model, LoadParams(), Memory(2 * GB, 16 * GB))
    with pytest.raises(GenerationError, match=r"n_ctx \d+ \(--n-ctx\) and load_mode mmap"):
        check_fits(model, LoadParams(n_ctx=65536), Memory(3 * GB, 16 * GB))
    with pytest.raises(GenerationError, match=r"smaller type \(edgellm convert --max-size\)") as caught:
        check_fits(model, LoadParams(), Memory(2 * GB, 3 * GB))
    assert "\n" not in str(caught.value)


def test_loading_what_does_not_fit_is_refused_before_anything_is_loaded(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: Memory(200 * MB, 400 * MB))
    with pytest.raises(GenerationError, match=r"n_ctx 4096 \(--n-ctx\), which fits"):
        edgellm.load(model_path, LoadParams(n_ctx=8192))
    edgellm.load(model_path, LoadParams(n_ctx=512)).close()


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    free = available_memory()
    assert 0 < free.available <= free.total
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory().total == free.total
    (tmp_path / "memory.max").write_text(f"{100 * MB}\n")
    (tmp_path / "memory.current").write_text(f"{70 * MB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {50 * MB}\nfile {20 * MB}\n")
    assert available_memory() == Memory(50 * MB, 100 * MB)
