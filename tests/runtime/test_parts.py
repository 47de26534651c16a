"""A model in several files, as llama-gguf-split makes them, does what it does in one."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

import converters
import edgellm
from edgellm import LoadParams, ModelFileError
from tests.converters import tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    tiny.make_model(folder / "checkpoint", vocab_size=1000)
    converters.convert(folder / "checkpoint", folder / "whole.gguf", quant="F32")
    return folder / "whole.gguf"


def split(path: Path, out: Path, *, first_without_tensors: bool = False) -> Path:
    """The same metadata and tensors, at most 8 in a file; returns the first file."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, "llama", split_max_tensors=8, small_first_shard=first_without_tensors)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(out.parent.glob(f"{out.stem}-00001-of-*.gguf"))


@pytest.mark.parametrize("first_without_tensors", [False, True])
def test_its_logits_are_those_of_the_whole(whole: Path, tmp_path: Path, first_without_tensors: bool) -> None:
    first = split(whole, tmp_path / "parts.gguf", first_without_tensors=first_without_tensors)
    assert len(list(tmp_path.iterdir())) > 2
    params = LoadParams(n_ctx=64, n_threads=1)
    with edgellm.load(whole, params) as one, edgellm.load(first, params) as several:
        tokens = one.tokenize("Once upon a time")
        np.testing.assert_array_equal(several.logits(tokens), one.logits(tokens))
    with pytest.raises(ModelFileError, match="give the first: parts-00001-of"):
        edgellm.load(tmp_path / first.name.replace("00001", "00002", 1), params)


def test_a_part_that_is_cut_off_is_refused_before_native_code(whole: Path, tmp_path: Path) -> None:
    first = split(whole, tmp_path / "parts.gguf")
    second = tmp_path / first.name.replace("00001", "00002", 1)
    second.write_bytes(second.read_bytes()[:-500])
    with pytest.raises(ModelFileError, match=r"parts-00002-of-.* is damaged: it is cut off"):
        edgellm.load(first, LoadParams(n_ctx=64))
