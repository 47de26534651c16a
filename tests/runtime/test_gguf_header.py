"""Headers on which llama.cpp would abort the process: refused in pure Python, with the key that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from edgellm.errors import ModelFileError
from edgellm.gguf_header import GGML_TYPES, check_loadable

MOE = {"expert_count": 8, "expert_used_count": 2}


def write(path: Path, tokens: list[bytes], **numbers: Any) -> Path:
    """A file with one small tensor and the given `llama.*` numbers (the key's dots as double underscores)."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in numbers.items():
        name = f"llama.{key.replace('__', '.')}"
        writer.add_string(name, value) if isinstance(value, str) else writer.add_uint32(name, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    sizes = {t.value: (t.name, *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    sizes[9] = ("Q8_1", 32, 36)  # ggml's own block: two half floats and 32 bytes; the package says 40
    assert {number: sizes[number] for number in GGML_TYPES} == dict(GGML_TYPES)


@pytest.mark.parametrize(
    "numbers",
    [
        {},
        {"block_count": 512},
        {"block_count": 2, "nextn_predict_layers": 1},
        MOE,
        MOE | {"expert_group_count": 4, "expert_group_used_count": 2},
        {"rope__scaling__type": "yarn"},
    ],
)
def test_sizes_llama_cpp_takes(tmp_path: Path, numbers: dict[str, Any]) -> None:
    check_loadable(write(tmp_path / "good.gguf", [b"a", b"b", b"ab"], **({"block_count": 2} | numbers)))


@pytest.mark.parametrize(
    ("numbers", "key"),
    [
        ({"block_count": 0}, "block_count"),
        ({"block_count": 513}, "block_count"),
        ({"nextn_predict_layers": 3}, "nextn_predict_layers"),
        ({"expert_count": 1025, "expert_used_count": 1}, "expert_count"),
        ({"expert_count": 8, "expert_used_count": 9}, "expert_used_count"),
        ({"expert_count": 8, "expert_used_count": 0}, "expert_used_count"),
        ({"expert_used_count": 2}, "expert_used_count"),
        (MOE | {"expert_group_count": 8}, "expert_group_count"),
        (MOE | {"expert_group_count": 3, "expert_group_used_count": 1}, "expert_group_used_count"),
        (MOE | {"expert_group_count": 4, "expert_group_used_count": 4}, "expert_group_used_count"),
        ({"rope__scaling__type": "cubic"}, "rope.scaling.type"),
    ],
)
def test_sizes_llama_cpp_aborts_on(tmp_path: Path, numbers: dict[str, Any], key: str) -> None:
    path = write(tmp_path / "bad.gguf", [b"a", b"b", b"ab"], **({"block_count": 2} | numbers))
    with pytest.raises(ModelFileError, match=rf"bad\.gguf is damaged: llama\.{key} = "):
        check_loadable(path)


@pytest.mark.parametrize(
    "tokens",
    [
        [b"a", b"b", b"a"],
        [b"a", b"b", b"a\0tail"],  # C strings end at a zero byte
        [b"", b"b", b"[EMPTY_0]"],  # the name llama.cpp gives to an empty token
    ],
)
def test_tokens_llama_cpp_takes_for_the_same(tmp_path: Path, tokens: list[bytes]) -> None:
    with pytest.raises(ModelFileError, match="more than once"):
        check_loadable(write(tmp_path / "bad.gguf", tokens, block_count=2))


def test_two_empty_tokens_get_different_names(tmp_path: Path) -> None:
    check_loadable(write(tmp_path / "good.gguf", [b"", b"", b"ab"], block_count=2))
