"""The same weights in every container give the same GGUF: shards, pickles, odd strides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from converters import convert
from tests.converters import reference, tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.make_model(tmp_path_factory.mktemp("model"), vocab_size=1000)


@pytest.fixture(scope="module")
def expected(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, reference.Stored]:
    root = tmp_path_factory.mktemp("single")
    model.save_pretrained(root / "model")
    tiny.add_tokenizer(root / "model")
    convert(root / "model", root / "out.gguf", quant="Q8_0")
    return reference.tensors(root / "out.gguf")


def _config_only(model: Any, folder: Path) -> Path:
    folder.mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tiny.add_tokenizer(folder)
    return folder


def _converted(folder: Path, name: str = "out.gguf") -> dict[str, reference.Stored]:
    out = folder.parent / name
    convert(folder, out, quant="Q8_0")
    return reference.tensors(out)


def test_sharded_safetensors(model: Any, expected: dict[str, reference.Stored], tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model", max_shard_size="300KB")
    tiny.add_tokenizer(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) >= 4
    assert _converted(tmp_path / "model") == expected


def test_one_bin_file(model: Any, expected: dict[str, reference.Stored], tmp_path: Path) -> None:
    import torch

    folder = _config_only(model, tmp_path / "model")
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert _converted(folder) == expected


def test_sharded_bin_files(model: Any, expected: dict[str, reference.Stored], tmp_path: Path) -> None:
    import torch

    folder = _config_only(model, tmp_path / "model")
    weight_map = {}
    state = list(model.state_dict().items())
    for i in range(3):
        name = f"pytorch_model-{i + 1:05d}-of-00003.bin"
        part = dict(state[i::3])
        torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert _converted(folder) == expected


def test_bin_with_shared_and_transposed_storage(
    model: Any, expected: dict[str, reference.Stored], tmp_path: Path
) -> None:
    """Views into one storage, a transposed tensor and a state dict inside a training checkpoint."""
    import torch

    folder = _config_only(model, tmp_path / "model")
    state = dict(model.state_dict())
    gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    both = torch.cat([state[gate], state[up]])
    n = len(state[gate])
    state[gate], state[up] = both[:n], both[n:]
    down = "model.layers.1.mlp.down_proj.weight"
    state[down] = state[down].t().contiguous().t()
    assert not state[down].is_contiguous()
    torch.save({"state_dict": state}, folder / "pytorch_model.bin")
    assert _converted(folder) == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_bin_of_other_number_types(model: Any, dtype: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    state = {name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in model.state_dict().items()}
    pickled, safe = (_config_only(model, tmp_path / kind) for kind in ("pickled", "safe"))
    torch.save(state, pickled / "pytorch_model.bin")
    save_file(state, safe / "model.safetensors")
    assert _converted(pickled, "pickled.gguf") == _converted(safe, "safe.gguf")


def test_tied_model_that_stores_its_head(tmp_path: Path) -> None:
    """A head that repeats the embedding isn't written twice; one that differs is kept, whatever the config says."""
    import torch
    from safetensors.torch import load_file, save_file

    tiny.make_model(tmp_path / "model", vocab_size=1000, tie_word_embeddings=True)
    file = tmp_path / "model" / "model.safetensors"
    state = load_file(file)
    embedding = state["model.embed_tokens.weight"]
    save_file(state | {"lm_head.weight": embedding.clone()}, file)
    convert(tmp_path / "model", tmp_path / "same.gguf", quant="F32")
    assert "output.weight" not in reference.tensors(tmp_path / "same.gguf")
    head = torch.randn_like(embedding)
    save_file(state | {"lm_head.weight": head}, file)
    convert(tmp_path / "model", tmp_path / "other.gguf", quant="F32")
    assert reference.tensors(tmp_path / "other.gguf")["output.weight"][2] == head.numpy().tobytes()


def test_old_buffers_are_ignored(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tiny.make_model(tmp_path / "model", vocab_size=1000)
    convert(tmp_path / "model", tmp_path / "without.gguf", quant="F32")
    file = tmp_path / "model" / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}, file)
    convert(tmp_path / "model", tmp_path / "with.gguf", quant="F32")
    assert reference.tensors(tmp_path / "with.gguf") == reference.tensors(tmp_path / "without.gguf")
