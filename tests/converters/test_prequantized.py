"""Pre-quantized checkpoints: values equal the formats' definitions, and the libraries' own where they are installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from converters import convert
from converters.convert import plan
from converters.sources import Source, open_source
from converters.sources.safetensors_file import read_tensors, to_float32
from edgellm.errors import CheckpointError
from edgellm.native.ggml import quantize_rows
from tests.converters import packing
from tests.converters.reference import float_tensors
from tests.converters.reference import tensors as stored_tensors
from tests.converters.tiny import SMALL, add_tokenizer, make_model

RNG = np.random.default_rng(0)
CT: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


def weight(n_out: int = 64, n_in: int = 128) -> NDArray[np.float32]:
    return (RNG.standard_normal((n_out, n_in)) * 0.1 + 0.02).astype(np.float32)


def save(folder: Path, layers: dict[str, Any], quantization: dict[str, Any] | None, **config: Any) -> Path:
    """A folder with tensors given by full name and a config."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(t)) if isinstance(t, np.ndarray) else t.contiguous()
               for name, t in layers.items()}  # fmt: skip
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return folder


def layer_of(folder: Path, layer: dict[str, Any], quantization: dict[str, Any]) -> Source:
    return open_source(save(folder, {f"l.{name}": t for name, t in layer.items()}, quantization))


def check(source: Source, expected: NDArray[np.float32], name: str = "l.weight") -> None:
    tensor = source.tensors[name]
    assert source.tensors.keys() == {name}
    assert tensor.shape == expected.shape
    values = tensor.read()
    assert values.dtype == np.float32
    assert np.array_equal(values, expected)
    assert np.array_equal(np.concatenate([tensor.read(k, 4) for k in range(4)]), expected)
    assert "already quantized" in source.notes[0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group_size", "shuffled"), [(32, False), (-1, False), (32, True)])
@pytest.mark.parametrize("v2", [False, True])
def test_gptq(tmp_path: Path, bits: int, group_size: int, shuffled: bool, v2: bool) -> None:
    layer, values = packing.gptq(weight(), bits, group_size, v2=v2, shuffled=shuffled)
    said = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": shuffled}
    check(layer_of(tmp_path, layer, said | {"checkpoint_format": "gptq_v2" if v2 else "gptq"}), values)


def test_gptq_crops_padding_finds_single_layers_bits_and_does_without_g_idx(tmp_path: Path) -> None:
    layer, values = packing.gptq(weight(20, 84), 4, 32)  # no whole number of words either way
    said = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    check(layer_of(tmp_path, layer, said), values)
    layer, values = packing.gptq(weight(), 8, 32)
    del layer["g_idx"]
    check(layer_of(tmp_path, layer, said), values)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_zero_points_of_zero_borrow_from_their_neighbours(tmp_path: Path, bits: int) -> None:
    """All weights of every other row are positive, so its zero point is 0, which v1 stores as a word-wide -1."""
    mixed = weight()
    mixed[::2] = np.abs(mixed[::2]) + 0.5
    layer, values = packing.gptq(mixed, bits, 32)
    check(layer_of(tmp_path, layer, {"quant_method": "gptq", "bits": bits}), values)


def test_a_large_gptq_layer_is_read_slab_by_slab(tmp_path: Path) -> None:
    layer, values = packing.gptq(weight(520, 4096), 4, 128)
    check(layer_of(tmp_path, layer, {"quant_method": "gptq", "bits": 4}), values)


@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_awq_gemm(tmp_path: Path, group_size: int) -> None:
    layer, values = packing.awq_gemm(weight(72, 128), group_size)
    check(layer_of(tmp_path, layer, {"quant_method": "awq", "bits": 4, "group_size": group_size}), values)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_awq_gemv(tmp_path: Path, group_size: int) -> None:
    layer, values = packing.awq_gemv(weight(64, 384), group_size)
    said = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "GEMV"}
    check(layer_of(tmp_path, layer, said), values)


def scheme(bits: int, group_size: int | None, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "group_size": group_size, **more}
    return CT | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


@pytest.mark.parametrize("bits", [4, 8, 3])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("shape", "group_size", "shuffled"), [((64, 128), 32, False), ((20, 70), -1, False),
                                                                ((64, 128), 32, True)])  # fmt: skip
def test_pack_quantized(
    tmp_path: Path, bits: int, symmetric: bool, shape: tuple[int, int], group_size: int, shuffled: bool
) -> None:
    layer, values = packing.pack_quantized(weight(*shape), bits, group_size, symmetric=symmetric, shuffled=shuffled)
    check(layer_of(tmp_path, layer, scheme(bits, None if group_size == -1 else group_size)), values)


def test_fp8_values_are_torchs() -> None:
    bits = np.arange(256, dtype=np.uint8)
    for name, dtype in (
        ("F8_E4M3", torch.float8_e4m3fn),
        ("F8_E5M2", torch.float8_e5m2),
        ("F8_E8M0", torch.float8_e8m0fnu),
    ):
        expected = torch.from_numpy(bits).view(dtype).float().numpy()
        assert np.array_equal(to_float32(bits, name), expected, equal_nan=True), name


@pytest.mark.parametrize(("scale_shape", "block"), [((2, 3), [128, 128]), ((200, 1), None), ((200,), None),
                                                     ((1,), None), ((), None)])  # fmt: skip
def test_fp8(tmp_path: Path, scale_shape: tuple[int, ...], block: list[int] | None) -> None:
    codes = torch.from_numpy(weight(200, 300)).to(torch.float8_e4m3fn)
    scale = torch.rand(scale_shape) + 0.5
    wide = scale.reshape(-1, 1) if len(scale_shape) < 2 else scale
    if block:
        wide = wide.repeat_interleave(128, 0).repeat_interleave(128, 1)[:200, :300]
    said = {"quant_method": "fp8", "weight_block_size": block}
    layer = {"weight": codes, "weight_scale_inv" if block else "weight_scale": scale, "input_scale": torch.ones(())}
    check(layer_of(tmp_path, layer, said), (codes.float() * wide).numpy())


def test_fp8_experts_in_one_tensor(tmp_path: Path) -> None:
    codes, scale = torch.randn(4, 40, 64).to(torch.float8_e5m2), torch.rand(4, 2, 2)
    wide = scale.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :40]
    said = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    tensors = {"l.gate_up_proj": codes, "l.gate_up_proj_scale_inv": scale}
    check(open_source(save(tmp_path, tensors, said)), (codes.float() * wide).numpy(), "l.gate_up_proj")


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_compressed_int_quantized(tmp_path: Path, groups: int, asymmetric: bool) -> None:
    q = RNG.integers(-128, 128, (64, 128)).astype(np.int8)
    scale, zero = RNG.random((64, groups), np.float32), RNG.integers(-9, 9, (64, groups)).astype(np.int8)
    wide = np.repeat(scale, 128 // groups, 1)
    values = (q - np.repeat(zero, 128 // groups, 1).astype(np.float32) * asymmetric) * wide
    layer = {"weight": q, "weight_scale": scale} | ({"weight_zero_point": zero} if asymmetric else {})
    check(layer_of(tmp_path, layer, scheme(8, None) | {"format": "int-quantized"}), values)


def bnb_state(layer: torch.Tensor, kind: str, nested: bool, block: int = 64) -> tuple[dict[str, Any], Any]:
    """A 4-bit layer packed by hand: random codes, all parts as bitsandbytes names them."""
    n = layer.numel()
    codes = RNG.integers(0, 16, n).astype(np.uint8)
    code_values = np.sort(RNG.standard_normal(16)).astype(np.float32)
    absmax = RNG.random(-(-n // block), np.float32) + 0.1
    said: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(layer.shape)}
    parts: dict[str, Any] = {"weight.quant_map": code_values}
    if nested:
        eight, table = RNG.integers(0, 256, absmax.size).astype(np.uint8), RNG.random(256, np.float32)
        outer = RNG.random(-(-absmax.size // 256), np.float32)
        said |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
        parts |= {"weight.absmax": eight, "weight.nested_absmax": outer, "weight.nested_quant_map": table}
        absmax = table[eight] * outer[np.arange(eight.size) // 256] + np.float32(0.25)
    else:
        parts["weight.absmax"] = absmax
    padded = np.append(codes, np.uint8(0)) if n % 2 else codes
    parts["weight"] = (padded[::2] << 4 | padded[1::2]).reshape(-1, 1)
    parts[f"weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(json.dumps(said).encode(), np.uint8).copy()
    return parts, (code_values[codes] * absmax[np.arange(n) // block]).reshape(layer.shape)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("shape", "nested"), [((64, 128), False), ((256, 160), True), ((12, 75), True)])
def test_bitsandbytes_4bit(tmp_path: Path, kind: str, shape: tuple[int, int], nested: bool) -> None:
    layer, values = bnb_state(torch.empty(shape), kind, nested)
    check(layer_of(tmp_path, layer, {"quant_method": "bitsandbytes", "load_in_4bit": True}), values)


def test_bitsandbytes_8bit(tmp_path: Path) -> None:
    q, scb = RNG.integers(-127, 128, (64, 96)).astype(np.int8), RNG.random(64, np.float32)
    layer = {"weight": q, "SCB": scb, "weight_format": np.array(0, np.uint8)}
    check(layer_of(tmp_path, layer, {"load_in_8bit": True}), q * scb[:, None] * np.float32(7.874015718698502e-3))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_4bit_against_the_library(tmp_path: Path, kind: str, nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes").functional
    data, state = functional.quantize_4bit(
        torch.from_numpy(weight(96, 200)), quant_type=kind, compress_statistics=nested, blocksize=64
    )
    layer = {"weight": data} | {f"weight.{key}": t for key, t in state.as_dict(packed=True).items()}
    values = functional.dequantize_4bit(data, state).numpy()
    source = layer_of(tmp_path, layer, {"quant_method": "bitsandbytes"})
    # where factors are nested the library fuses product and sum, we round in between: one unit of the factor
    assert np.allclose(source.tensors["l.weight"].read(), values, rtol=2**-22 if nested else 0, atol=0)


def test_bitsandbytes_8bit_against_the_library(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes").functional
    q = torch.from_numpy(RNG.integers(-127, 128, (64, 96)).astype(np.int8))
    scb = torch.rand(64)
    source = layer_of(tmp_path, {"weight": q, "SCB": scb}, {"quant_method": "bitsandbytes"})
    check(source, functional.int8_vectorwise_dequant(q, scb).numpy())


@pytest.mark.parametrize(("bits", "group_size", "symmetric", "kind"), [
    (4, 32, True, "pack"), (4, 32, False, "pack"), (8, None, True, "pack"), (3, 32, False, "pack"),
    (8, None, True, "naive"), (8, None, False, "naive"), (8, None, True, "float"),
])  # fmt: skip
def test_compressed_tensors_against_the_library(
    tmp_path: Path, bits: int, group_size: int | None, symmetric: bool, kind: str
) -> None:
    library = pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    from compressed_tensors.compressors import BaseCompressor

    args = library.quantization.QuantizationArgs(
        num_bits=bits, type="float" if kind == "float" else "int", symmetric=symmetric, group_size=group_size,
        strategy="group" if group_size else "channel",
    )  # fmt: skip
    layer_scheme = library.quantization.QuantizationScheme(targets=["Linear"], weights=args)
    stored_as = {"pack": "pack-quantized", "naive": "int-quantized", "float": "float-quantized"}[kind]
    compressor = BaseCompressor.get_value_from_registry(stored_as)
    values = torch.from_numpy(weight(64, 128))
    n_groups = 128 // group_size if group_size else 1
    scale = torch.rand(64, n_groups) * 0.02 + 0.01
    half = 0 if symmetric else 1 << (bits - 2)
    zero = torch.randint(-half, half + 1, (64, n_groups)).to(torch.int8)
    state = {"weight": values, "weight_scale": scale, "weight_zero_point": zero}
    packed = compressor.compress(state, layer_scheme)
    expected = compressor.decompress(dict(packed), layer_scheme)["weight"].float().numpy()
    said = scheme(bits, group_size, type=args.type) | {"format": stored_as}
    check(layer_of(tmp_path, dict(packed), said), expected)


def mxfp4(n_out: int = 6, n_groups: int = 3) -> tuple[dict[str, torch.Tensor], NDArray[np.float32]]:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.from_numpy(RNG.integers(0, 256, (4, n_out, n_groups, 16)).astype(np.uint8))
    scales = torch.from_numpy(RNG.integers(100, 140, (4, n_out, n_groups)).astype(np.uint8))
    values = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).numpy()
    return {"l.gate_up_proj_blocks": blocks, "l.gate_up_proj_scales": scales}, values


def test_mxfp4(tmp_path: Path) -> None:
    tensors, values = mxfp4()
    check(open_source(save(tmp_path, tensors, {"quant_method": "mxfp4"})), values, "l.gate_up_proj")


def test_ggml_mxfp4_holds_every_mxfp4_block_without_loss(tmp_path: Path) -> None:
    """Including blocks that use a few small codes only, whose exponent ggml chooses differently."""
    import gguf

    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    for largest in range(1, 8):
        codes = RNG.integers(0, largest + 1, (64, 32))
        codes[:, 5] = largest
        exponents = np.linspace(-100, 100, 64).astype(int)[:, None]
        values = np.ldexp(grid[codes] * RNG.choice([-1, 1], codes.shape), exponents).astype(np.float32)
        back = gguf.quants.dequantize(quantize_rows(values, 39), gguf.GGMLQuantizationType.MXFP4)
        assert np.array_equal(back, values), largest


def test_gpt_oss_experts_stay_mxfp4_without_loss(tmp_path: Path) -> None:
    """Q8_0 keeps the experts in MXFP4, every value as the F32 conversion of the unpacked checkpoint has it."""
    from transformers import GptOssConfig, GptOssForCausalLM
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model = GptOssForCausalLM(GptOssConfig(**SMALL, head_dim=32, num_local_experts=4, num_experts_per_tok=2))
    model.save_pretrained(tmp_path / "float")
    floats: dict[str, Any] = load_file(tmp_path / "float" / "model.safetensors")
    packed = dict(floats)
    for name in [n for n in floats if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        n_experts, n_in, n_out = packed.pop(name).shape
        blocks = torch.from_numpy(RNG.integers(0, 256, (n_experts, n_out, n_in // 32, 16)).astype(np.uint8))
        scales = torch.from_numpy(RNG.integers(117, 122, blocks.shape[:3]).astype(np.uint8))
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        floats[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    for folder, tensors, said in (("packed", packed, {"quant_method": "mxfp4"}), ("float", floats, None)):
        add_tokenizer(save(tmp_path / folder, tensors, said, **config))
    receipt = convert(tmp_path / "packed", tmp_path / "packed.gguf", quant="Q8_0")
    assert any("(MXFP4; 4 tensors)" in note for note in receipt.notes)
    convert(tmp_path / "float", tmp_path / "float.gguf", quant="F32")
    ours, expected = float_tensors(tmp_path / "packed.gguf"), float_tensors(tmp_path / "float.gguf")
    types = {name: kind for name, (kind, _, _) in stored_tensors(tmp_path / "packed.gguf").items()}
    experts = [name for name in types if name.endswith("_exps.weight")]
    assert len(experts) == 6
    assert {types[name] for name in experts} == {"MXFP4"}
    assert all(np.array_equal(ours[name], expected[name]) for name in experts)
    chosen = {t.name: t.type_name for t in plan(tmp_path / "packed", types=[("ffn_down_exps", "Q5_0")]).tensors}
    assert (chosen["blk.0.ffn_down_exps.weight"], chosen["blk.0.ffn_up_exps.weight"]) == ("Q5_0", "MXFP4")


PACKERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gptq": (lambda w: packing.gptq(w, 4, 32, shuffled=True), {"quant_method": "gptq", "bits": 4}),
    "awq": (lambda w: packing.awq_gemm(w, 32), {"quant_method": "awq", "bits": 4}),
    "pack": (lambda w: packing.pack_quantized(w, 4, 32, symmetric=False), scheme(4, 32)),
    "nf4": (lambda w: bnb_state(torch.from_numpy(w), "nf4", True), {"quant_method": "bitsandbytes"}),
}


@pytest.mark.parametrize("method", PACKERS)
def test_a_packed_llama_converts_to_its_values(tmp_path: Path, method: str) -> None:
    """Packed and float checkpoint of the same values give equal F32 GGUFs, and the receipt says what it was."""
    make_model(tmp_path / "packed")
    make_model(tmp_path / "float")
    pack, said = PACKERS[method]
    packed: dict[str, Any] = {}
    floats: dict[str, Any] = {}
    for name, t in load_file(tmp_path / "float" / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            packed[name] = floats[name] = t
            continue
        layer, values = pack(t.numpy())
        packed |= {f"{name.removesuffix('weight')}{part}": p for part, p in layer.items()}
        floats[name] = values
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    save(tmp_path / "packed", packed, said, **config)
    save(tmp_path / "float", floats, None, **config)
    receipt = convert(tmp_path / "packed", tmp_path / "packed.gguf", quant="F32")
    convert(tmp_path / "float", tmp_path / "float.gguf", quant="F32")
    assert any("already quantized" in note and "14 tensors" in note for note in receipt.notes)
    ours, expected = float_tensors(tmp_path / "packed.gguf"), float_tensors(tmp_path / "float.gguf")
    assert ours.keys() == expected.keys()
    assert all(np.array_equal(ours[name], expected[name]) for name in expected)
    assert plan(tmp_path / "packed").source_bytes < 0.8 * plan(tmp_path / "float").source_bytes


@pytest.mark.parametrize(("method", "part"), [
    ("gptq", "scales"), ("gptq", "qzeros"), ("awq", "scales"), ("awq", "qzeros"), ("pack", "weight_scale"),
    ("pack", "weight_shape"), ("nf4", "weight.absmax"), ("nf4", "weight.nested_absmax"), ("nf4", "weight.quant_map"),
    ("nf4", "weight.quant_state.bitsandbytes__nf4"),
])  # fmt: skip
def test_missing_or_misshapen_companions_are_named(tmp_path: Path, method: str, part: str) -> None:
    pack, said = PACKERS[method]
    layer, _ = pack(weight())
    whole = layer[part]
    with pytest.raises(CheckpointError, match=rf"l\.{part}"):
        layer_of(tmp_path, {name: t for name, t in layer.items() if name != part}, said)
    layer[part] = np.repeat(whole, 3, axis=-1)
    with pytest.raises(CheckpointError, match=r"l\."):
        layer_of(tmp_path, layer, said)


def test_unknown_methods_and_variants_are_named(tmp_path: Path) -> None:
    layer, _ = packing.gptq(weight(), 4, 32)
    for said, named in (
        ({"quant_method": "hqq"}, "'hqq'.*gptq, awq"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "awq", "version": "gemv_fast"}, "gemv_fast"),
        (CT | {"format": "nvfp4-pack-quantized"}, "nvfp4"),
    ):
        with pytest.raises(CheckpointError, match=named):
            layer_of(tmp_path, layer, said)
    layer["g_idx"][3] = 99
    with pytest.raises(CheckpointError, match=r"g_idx.*99"):
        layer_of(tmp_path, layer, {"quant_method": "gptq"}).tensors["l.weight"].read()


def test_a_config_that_still_speaks_of_a_merged_quantization_changes_nothing(tmp_path: Path) -> None:
    source = layer_of(tmp_path, {"weight": weight()}, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert source.notes == ()
    assert source.tensors["l.weight"].dtype == "F32"
    assert read_tensors(tmp_path / "model.safetensors")["l.weight"].read_stored is not None
