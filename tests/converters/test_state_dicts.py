"""Weights under other names: single files, scripts' pickles, wrapper prefixes, Mistral's own format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from converters import convert
from converters.describe import describe
from converters.sources import open_source
from edgellm.errors import CheckpointError
from tests.converters.reference import float_tensors, llama_logits
from tests.converters.tiny import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the usual names and, beside it, the F32 GGUF it gives."""
    folder = tmp_path_factory.mktemp("states") / "model"
    make_model(folder, "mistral", rope_theta=10000.0, sliding_window=None)
    convert(folder, folder.parent / "expected.gguf", quant="F32")
    return folder


def without_weights(model: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Copy the small files; returns the weights."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return load_file(model / "model.safetensors")


def check(path: Path, model: Path, out: Path) -> None:
    convert(path, out, quant="F32")
    ours, expected = float_tensors(out), float_tensors(model.parent / "expected.gguf")
    assert ours.keys() == expected.keys()
    assert all(np.array_equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
@pytest.mark.parametrize("nested", ["", "state_dict", "model"])
def test_pickles_of_scripts(model: Path, tmp_path: Path, prefix: str, nested: str) -> None:
    weights: Any = {f"{prefix}{name}": t for name, t in without_weights(model, tmp_path / "m").items()}
    content = {"epoch": 3, "optimizer": {"lr": 0.1}, nested: weights} if nested else weights
    torch.save(content, tmp_path / "m" / "best.pt")
    torch.save({"step": 1}, tmp_path / "m" / "optimizer.pt")
    source = open_source(tmp_path / "m")
    assert source.kind == "torch"
    assert source.tensors.keys() == open_source(model).tensors.keys()
    if (prefix, nested) == ("module._orig_mod.", "model"):
        check(tmp_path / "m" / "best.pt", model, tmp_path / "out.gguf")


def test_a_single_safetensors_file_of_any_name(model: Path, tmp_path: Path) -> None:
    weights = without_weights(model, tmp_path / "m")
    save_file(weights, tmp_path / "m" / "merged-final.safetensors")
    check(tmp_path / "m" / "merged-final.safetensors", model, tmp_path / "a.gguf")
    check(tmp_path / "m", model, tmp_path / "b.gguf")
    assert describe(tmp_path / "m")["kind"] == "checkpoint (safetensors)"


def test_several_files_join_but_two_versions_of_a_tensor_do_not(model: Path, tmp_path: Path) -> None:
    weights = without_weights(model, tmp_path / "m")
    names = sorted(weights)
    save_file({name: weights[name] for name in names[:5]}, tmp_path / "m" / "a.safetensors")
    save_file({name: weights[name] for name in names[5:]}, tmp_path / "m" / "b.safetensors")
    check(tmp_path / "m", model, tmp_path / "out.gguf")
    save_file({names[7]: weights[names[7]]}, tmp_path / "m" / "c.safetensors")
    with pytest.raises(CheckpointError, match=r"b\.safetensors and in c\.safetensors"):
        open_source(tmp_path / "m")


def test_files_that_hold_no_weights(model: Path, tmp_path: Path) -> None:
    without_weights(model, tmp_path / "m")
    (tmp_path / "m" / "notes.pt").write_bytes(b"hello, this is text")
    with pytest.raises(CheckpointError, match="nor a GGUF, and no file of weights"):
        open_source(tmp_path / "m" / "notes.pt")
    (tmp_path / "m" / "notes.pt").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_source(tmp_path / "m")
    torch.save({"step": torch.zeros(1), "args": {"lr": 0.1}}, tmp_path / "m" / "log.pt")
    with pytest.raises(CheckpointError, match="no table of tensors"):
        open_source(tmp_path / "m")
    save_file({"x": torch.zeros(2)}, tmp_path / "alone.safetensors")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_source(tmp_path / "alone.safetensors")


def to_mistral(name: str) -> str:
    """Hugging Face's name → Mistral's, written down independently of the reader."""
    for theirs, ours in (
        ("model.embed_tokens", "tok_embeddings"), ("lm_head", "output"),
        ("model.norm", "norm"), ("model.layers", "layers"),
        ("self_attn.q_proj", "attention.wq"), ("self_attn.k_proj", "attention.wk"),
        ("self_attn.v_proj", "attention.wv"), ("self_attn.o_proj", "attention.wo"),
        ("mlp.gate_proj", "feed_forward.w1"), ("mlp.down_proj", "feed_forward.w2"),
        ("mlp.up_proj", "feed_forward.w3"), ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ):  # fmt: skip
        name = name.replace(theirs, ours)
    return name


PARAMS = {
    "dim": 128, "n_layers": 2, "head_dim": 32, "hidden_dim": 256, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-6,
    "vocab_size": 1024, "rope_theta": 10000.0, "max_seq_len": 512,
}  # fmt: skip


def write_mistral(model: Path, folder: Path) -> dict[str, torch.Tensor]:
    """q and k with neighbouring rows as pairs: row 2i is Hugging Face's row i of a head, row 2i+1 its row i + d/2."""
    weights = {}
    for name, t in without_weights(model, folder).items():
        if "q_proj" in name or "k_proj" in name:
            d = 32
            order = [head + (i // 2 + i % 2 * d // 2) for head in range(0, len(t), d) for i in range(d)]
            t = t[order].contiguous()
        weights[to_mistral(name)] = t
    (folder / "config.json").unlink()
    (folder / "params.json").write_text(json.dumps(PARAMS))
    return weights


def test_mistral_consolidated(model: Path, tmp_path: Path) -> None:
    """Equal to the Hugging Face checkpoint's GGUF in every weight, and q/k are as stored: nothing is permuted."""
    weights = write_mistral(model, tmp_path / "m")
    save_file(weights, tmp_path / "m" / "consolidated.safetensors")
    check(tmp_path / "m", model, tmp_path / "out.gguf")
    ours = float_tensors(tmp_path / "out.gguf")
    for i in range(2):
        assert np.array_equal(ours[f"blk.{i}.attn_q.weight"], weights[f"layers.{i}.attention.wq.weight"].numpy())
        assert np.array_equal(ours[f"blk.{i}.attn_k.weight"], weights[f"layers.{i}.attention.wk.weight"].numpy())
    ids = list(range(3, 60))
    assert np.array_equal(llama_logits(tmp_path / "out.gguf", ids), llama_logits(model.parent / "expected.gguf", ids))
    q = open_source(tmp_path / "m").tensors["model.layers.0.self_attn.q_proj.weight"]
    assert np.array_equal(np.concatenate([q.read(0, 2), q.read(1, 2)]), q.read())


def test_mistral_consolidated_fp8(model: Path, tmp_path: Path) -> None:
    weights = write_mistral(model, tmp_path / "m")
    stored: dict[str, torch.Tensor] = {}
    for name, t in weights.items():
        stored[name] = t
        if ".attention." in name or ".feed_forward." in name:
            stored[name] = t.to(torch.float8_e4m3fn)
            stored[name.replace(".weight", ".qscale_weight")] = torch.tensor(0.5)
            stored[name.replace(".weight", ".qscale_act")] = torch.tensor(1.0)
    save_file(stored, tmp_path / "m" / "consolidated.safetensors")
    (tmp_path / "m" / "params.json").write_text(json.dumps(PARAMS | {"quantization": {"qformat_weight": "fp8_e4m3"}}))
    receipt = convert(tmp_path / "m", tmp_path / "out.gguf", quant="F32")
    assert any("already quantized (FP8 F8_E4M3; 14 tensors)" in note for note in receipt.notes)
    expected = stored["layers.1.attention.wq.weight"].float().numpy() * 0.5
    assert np.array_equal(float_tensors(tmp_path / "out.gguf")["blk.1.attn_q.weight"], expected)


def test_mistral_params(model: Path, tmp_path: Path) -> None:
    weights = write_mistral(model, tmp_path / "m")
    save_file(weights, tmp_path / "m" / "consolidated.safetensors")
    yarn = {"original_max_position_embeddings": 256, "factor": 4, "apply_scale": False, "beta": 32, "alpha": 1}
    more = {"yarn": yarn, "llama_4_scaling": {"original_max_position_embeddings": 256, "beta": 0.1}}
    (tmp_path / "m" / "params.json").write_text(json.dumps(PARAMS | more))
    config = open_source(tmp_path / "m").config
    assert config["architectures"] == ["Ministral3ForCausalLM"]
    assert config["rope_parameters"]["factor"] == 4.0
    assert config["rope_parameters"]["llama_4_scaling_beta"] == 0.1
    (tmp_path / "m" / "params.json").write_text(json.dumps(PARAMS | {"n_heads": 5}))
    with pytest.raises(CheckpointError, match="heads don't divide"):
        open_source(tmp_path / "m")
    (tmp_path / "m" / "params.json").write_text(json.dumps({"dim": 128}))
    with pytest.raises(CheckpointError, match=r"params\.json lacks n_layers"):
        open_source(tmp_path / "m")
    (tmp_path / "m" / "params.json").write_text(json.dumps(PARAMS | {"yarn": {"factor": 4}}))
    with pytest.raises(CheckpointError, match="yarn"):
        open_source(tmp_path / "m")
