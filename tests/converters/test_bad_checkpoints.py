"""Damaged, dangerous and foreign checkpoints, each made for real and given to the command line.

Every one must be refused with exit code 3 and one line, an earlier output staying as it was.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converters import convert, plan
from edgellm.errors import CheckpointError, UnsupportedArchitecture
from tests.converters import tiny
from tests.converters.command import refused, run

Copy = Callable[[Path], Path]
EARLIER = b"an earlier output that must survive"


def refuse(source: Path, *said: str) -> None:
    """Convert with --force over an earlier output."""
    out = source.parent / "out.gguf"
    out.write_bytes(EARLIER)
    refused(run("convert", source, "-o", out, "-q", "Q8_0", "--force"), 3, *said)
    assert out.read_bytes() == EARLIER
    assert not out.with_name("out.gguf.partial").exists()
    assert sorted(path.name for path in out.parent.iterdir()) == sorted({source.name, "out.gguf"} - {"nowhere"})


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def shard(folder: Path, n: int = 3) -> dict[str, str]:
    """Split the weights into n files with an index; returns its weight map."""
    from safetensors.torch import load_file, save_file

    state = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(n):
        name = f"model-{i + 1:05d}-of-{n:05d}.safetensors"
        save_file(dict(state[i::n]), folder / name)
        weight_map |= {key: name for key, _ in state[i::n]}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_no_such_path(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "no such file or folder", "nowhere", "check the path")


def test_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"\xff\xd8")
    refuse(tmp_path / "photos", "photos is no checkpoint folder", "no config.json")


def test_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    refuse(tmp_path / "notes.txt", "neither a checkpoint folder nor a GGUF")


def test_folder_without_weights(tiny_llama: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_llama)
    (folder / "model.safetensors").unlink()
    refuse(folder, "holds no weights", "no model.safetensors")


@pytest.mark.parametrize("with_config", [True, False])
def test_adapter_folder(tiny_llama: Path, copy_of: Copy, with_config: bool) -> None:
    folder = copy_of(tiny_llama)
    (folder / "model.safetensors").unlink()
    if not with_config:
        (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refuse(folder, "holds an adapter, not a model")


def test_unsupported_architecture(tiny_llama: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_llama)
    change_config(folder, architectures=["MambaForCausalLM"])
    refuse(folder, "MambaForCausalLM isn't supported", "LlamaForCausalLM", "MistralForCausalLM")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False},
        {"rope_type": "spiral", "factor": 4.0},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
    ],
)
def test_unsupported_rope(tiny_llama: Path, copy_of: Copy, rope: dict[str, Any]) -> None:
    folder = copy_of(tiny_llama)
    change_config(folder, rope_parameters={"rope_theta": 10000.0, **rope})
    with pytest.raises(UnsupportedArchitecture, match=r"beta_fast|truncate=false|'spiral' isn't supp|partial rotary"):
        plan(folder)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"hidden_act": "gelu"}, UnsupportedArchitecture, "hidden_act = 'gelu' isn't supported"),
        ({"num_hidden_layers": 600}, UnsupportedArchitecture, "600 layers; llama.cpp takes 512"),
        ({"partial_rotary_factor": 0.5}, UnsupportedArchitecture, "partial rotary"),
        ({"hidden_size": None}, CheckpointError, "hidden_size = None, expected a positive whole number"),
        ({"hidden_size": "128"}, CheckpointError, "hidden_size = '128', expected"),
        ({"hidden_size": -128}, CheckpointError, "hidden_size = -128, expected"),
        ({"num_key_value_heads": 3}, CheckpointError, "4 heads of 32 over 3 key-value heads"),
        ({"rms_norm_eps": "tiny"}, CheckpointError, "rms_norm_eps = 'tiny', expected a number"),
        ({"rope_parameters": {"rope_theta": -1.0}}, CheckpointError, "rope_theta = -1.0"),
        ({"rope_parameters": {"rope_type": "linear"}}, CheckpointError, "factor = None"),
        ({"rope_parameters": "none"}, CheckpointError, "rope"),
        ({"architectures": []}, CheckpointError, "names no architecture"),
        ({"architectures": ...}, CheckpointError, "names no architecture"),
        ({"num_hidden_layers": 3}, CheckpointError, r"lacks model.layers.2.*and 6 more"),
        ({"num_hidden_layers": 1}, CheckpointError, r"model.layers.1.*config.json has 1 layers"),
        ({"intermediate_size": 512}, CheckpointError, r"has shape \[256, 128\], but config.json makes it \[512, 128\]"),
        ({"attention_bias": True}, CheckpointError, r"lacks .*q_proj.bias"),
        ({"vocab_size": 900}, CheckpointError, r"embed_tokens.weight has shape \[1000, 128\]"),
    ],
)
def test_config_that_does_not_fit(
    tiny_llama: Path, copy_of: Copy, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    folder = copy_of(tiny_llama)
    change_config(folder, **changes)
    with pytest.raises(error, match=said):
        plan(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"a": NaN', "\ufeff{}", "[" * 100_000])
def test_config_that_is_no_json_object(tiny_llama: Path, copy_of: Copy, text: str) -> None:
    folder = copy_of(tiny_llama)
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json (is no valid JSON|holds a)"):
        plan(folder)


def test_config_in_another_encoding(tiny_llama: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_llama)
    (folder / "config.json").write_bytes(b"\xff\xfe{\x00}\x00")
    refuse(folder, "config.json is no valid JSON")


def test_missing_shard(tiny_llama: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_llama)
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refuse(folder, "lacks 1 of 3 shards: model-00002-of-00003.safetensors", "copy them there")


@pytest.mark.parametrize(
    "where", ["../outside.safetensors", "{tmp}/outside.safetensors", "sub/../../outside.safetensors"]
)
def test_index_that_points_outside(tiny_llama: Path, copy_of: Copy, where: str, tmp_path: Path) -> None:
    folder = copy_of(tiny_llama)
    weight_map = shard(folder)
    outside = where.format(tmp=tmp_path / "elsewhere")
    write_index(folder, weight_map | {"lm_head.weight": outside})
    refuse(folder, "outside the checkpoint's folder", "don't use this checkpoint")


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, "x"])
def test_index_without_a_map(tiny_llama: Path, copy_of: Copy, weight_map: Any) -> None:
    folder = copy_of(tiny_llama)
    shard(folder)
    write_index(folder, weight_map)
    with pytest.raises(CheckpointError, match="no weight_map"):
        plan(folder)


def test_index_and_shards_that_disagree(tiny_llama: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_llama)
    weight_map = shard(folder)
    first = weight_map["lm_head.weight"]
    write_index(folder, {name: where for name, where in weight_map.items() if name != "lm_head.weight"})
    with pytest.raises(CheckpointError, match=r"also has lm_head\.weight"):
        plan(folder)
    write_index(folder, weight_map | {"more.weight": first})
    with pytest.raises(CheckpointError, match=r"lacks more\.weight"):
        plan(folder)


class _Dangerous:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("how", ["torch", "plain pickle"])
def test_pickle_that_would_run_code(tiny_llama: Path, copy_of: Copy, tmp_path_factory: Any, how: str) -> None:
    import torch

    folder = copy_of(tiny_llama)
    (folder / "model.safetensors").unlink()
    marker = tmp_path_factory.mktemp("marker") / "ran"
    content = {"model.norm.weight": torch.ones(4), "payload": _Dangerous(marker)}
    if how == "torch":
        torch.save(content, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content))
    refuse(folder, "is not a weights-only pickle", "save the model as safetensors")
    assert not marker.exists()


def test_pickles_that_hold_something_else(tiny_llama: Path, copy_of: Copy) -> None:
    import torch

    folder = copy_of(tiny_llama)
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save([torch.ones(3)], path)
    with pytest.raises(CheckpointError, match="holds no table of tensors"):
        plan(folder)
    torch.save({"lr": 0.1}, path)
    with pytest.raises(CheckpointError, match="holds no table of tensors"):
        plan(folder)
    torch.save({"weight": torch.ones(300, 300)}, path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match="cannot be read by torch"):
        plan(folder)


@pytest.mark.parametrize(
    ("value", "name"), [("nan", "model.norm.weight"), ("-inf", "model.layers.1.mlp.up_proj.weight")]
)
def test_weights_that_are_not_finite(tiny_llama: Path, copy_of: Copy, value: str, name: str) -> None:
    folder = copy_of(tiny_llama)

    def spoil(state: dict[str, Any]) -> None:
        state[name].view(-1)[7:9] = float(value)

    change_tensors(folder, spoil)
    refuse(folder, f"tensor {name} has 2 values that are not finite")


def test_values_beyond_f16(tiny_llama: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_llama)
    change_tensors(folder, lambda state: state["lm_head.weight"][0, :1].fill_(-1e5))
    with pytest.raises(CheckpointError, match=r"lm_head.weight has values up to 1e\+05, beyond F16; use BF16"):
        convert(folder, folder.parent / "out.gguf", quant="F16")
    assert not (folder.parent / "out.gguf").exists()
    convert(folder, folder.parent / "out.gguf", quant="BF16")


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "merge the adapter first"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight", "merge the adapter first"),
        ("model.vision_tower.weight", "is it another model's?"),
        ("model.layers.2.mlp.up_proj.weight", "config.json has 2 layers"),
        ("model.layers.00.mlp.up_proj.weight", "doesn't know"),
        ("model.layers.0.self_attn.q_proj.weight.absmax", "doesn't know"),
    ],
)
def test_tensor_too_many(tiny_llama: Path, copy_of: Copy, added: str, said: str) -> None:
    import torch

    folder = copy_of(tiny_llama)
    change_tensors(folder, lambda state: state.update({added: torch.ones(4, 128)}))
    refuse(folder, added, said)


def test_bias_the_config_denies(tiny_llama: Path, copy_of: Copy) -> None:
    import torch

    folder = copy_of(tiny_llama)
    change_tensors(folder, lambda state: state.update({"model.layers.0.mlp.up_proj.bias": torch.ones(256)}))
    refuse(folder, "mlp_bias is off", "model.layers.0.mlp.up_proj.bias")


def test_tensor_missing(tiny_llama: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_llama)
    change_tensors(folder, lambda state: state.pop("model.layers.1.mlp.down_proj.weight"))
    refuse(folder, "lacks model.layers.1.mlp.down_proj.weight", "save or copy it again")


def test_tensor_of_the_wrong_shape(tiny_llama: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_llama)
    name = "model.layers.1.mlp.down_proj.weight"
    change_tensors(folder, lambda state: state.update({name: state[name].t().contiguous()}))
    refuse(folder, f"tensor {name} has shape [256, 128], but config.json makes it [128, 256]")


def test_model_whose_logits_are_all_equal(tmp_path: Path) -> None:
    """A dead checkpoint loads but says nothing; the check after writing finds it and nothing is left."""
    tiny.make_model(tmp_path / "dead", vocab_size=1000)
    change_tensors(tmp_path / "dead", lambda state: [tensor.zero_() for tensor in state.values()])
    refuse(tmp_path / "dead", "logits that are not finite or all equal")
