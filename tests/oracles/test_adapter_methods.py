"""Every adapter method of peft's, with random values, on three families: merged weights against peft's own merge.

llama is the plain one, phi3 has fused projections, gemma3 norms of its own and a tied head, gpt2 weights stored inputs
first (for which peft has no LoHa and LoKr). Where peft
doesn't merge, or its merge changes the function, the merged GGUF's logits are compared with the adapted model's.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from converters import convert
from edgellm.errors import AdapterError
from tests.converters import reference
from tests.oracles.families import FIRST_TOKEN, make_reference
from tests.oracles.family_cases import CASES

FAMILIES = ("llama", "phi3", "gemma3", "gpt2")
TOKENS = [int(token) for token in np.random.default_rng(0).integers(FIRST_TOKEN, 1000, 96)]
RELATIVE = 1e-5
pytestmark = pytest.mark.slow

# the same places in each family
PLACES = {
    "llama": {"qkv": ["q_proj", "v_proj"], "up": "up_proj", "down": "down_proj", "embed": "embed_tokens",
              "norm": "input_layernorm", "head": "lm_head", "layers": "layers"},
    "phi3": {"qkv": ["qkv_proj"], "up": "gate_up_proj", "down": "down_proj", "embed": "embed_tokens",
             "norm": "input_layernorm", "head": "lm_head", "layers": "layers"},
    "gemma3": {"qkv": ["q_proj", "v_proj"], "up": "up_proj", "down": "down_proj", "embed": "embed_tokens",
               "norm": "input_layernorm", "head": "lm_head", "layers": "layers"},
    "gpt2": {"qkv": ["c_attn"], "up": "c_fc", "down": "mlp.c_proj", "embed": "wte", "norm": "ln_1", "head": "lm_head",
             "layers": "h"},
}  # fmt: skip
Places = dict[str, Any]


def linear(at: Places) -> list[str]:
    return [*at["qkv"], at["up"], at["down"]]


@dataclass(frozen=True)
class Method:
    """options: of the config class, from the family's places. forward: compare the function instead of the weights."""

    name: str
    config: str
    options: Callable[[Places], dict[str, Any]]
    forward: bool = False
    save: dict[str, Any] = field(default_factory=dict)


METHODS = [
    Method("lora", "LoraConfig", lambda at: {"r": 4, "lora_alpha": 6, "target_modules": linear(at)}),
    Method("lora all", "LoraConfig", lambda at: {"r": 2, "lora_alpha": 2, "target_modules": "all-linear"}),
    Method("lora patterns", "LoraConfig", lambda at: {
        "r": 4, "lora_alpha": 6, "target_modules": linear(at),
        "rank_pattern": {at["down"]: 7, rf"{at['layers']}\.0\..*{at['up']}": 3},
        "alpha_pattern": {at["up"]: 32, rf"{at['layers']}\.1\..*{at['down']}": 1}}),
    Method("lora some layers", "LoraConfig", lambda at: {
        "target_modules": linear(at), "layers_to_transform": [1], "layers_pattern": at["layers"]}),
    Method("lora bias all", "LoraConfig", lambda at: {"target_modules": at["qkv"], "bias": "all"}),
    Method("lora bias only", "LoraConfig", lambda at: {"target_modules": at["qkv"], "bias": "lora_only"}),
    Method("lora embedding", "LoraConfig", lambda at: {"r": 3, "target_modules": [at["embed"], *at["qkv"]]}, True),
    Method("rslora", "LoraConfig", lambda at: {
        "r": 9, "lora_alpha": 4, "use_rslora": True, "target_modules": linear(at)}),
    Method("rslora patterns", "LoraConfig", lambda at: {
        "r": 4, "use_rslora": True, "target_modules": linear(at), "rank_pattern": {at["up"]: 16},
        "alpha_pattern": {at["down"]: 5}}),
    Method("dora", "LoraConfig", lambda at: {"r": 4, "use_dora": True, "target_modules": linear(at)}),
    Method("dora rslora", "LoraConfig", lambda at: {
        "r": 4, "use_dora": True, "use_rslora": True, "target_modules": [at["down"]]}),
    Method("adalora", "AdaLoraConfig", lambda at: {
        "init_r": 6, "target_r": 4, "lora_alpha": 5, "total_step": 10, "target_modules": linear(at)}),
    Method("loha", "LoHaConfig", lambda at: {"r": 4, "alpha": 6, "target_modules": linear(at)}),
    Method("loha patterns", "LoHaConfig", lambda at: {
        "r": 3, "alpha": 6, "target_modules": linear(at), "rank_pattern": {at["up"]: 5},
        "alpha_pattern": {at["up"]: 9}}),
    Method("lokr", "LoKrConfig", lambda at: {"r": 4, "alpha": 6, "target_modules": linear(at)}),
    Method("lokr both", "LoKrConfig", lambda at: {
        "r": 2, "alpha": 3, "decompose_both": True, "decompose_factor": 16, "target_modules": linear(at)}),
    Method("krona", "LoKrConfig", lambda at: {
        "r": 512, "alpha": 512, "decompose_factor": 8, "target_modules": linear(at)}),
    Method("vera", "VeraConfig", lambda at: {"r": 8, "target_modules": [at["down"]]}),
    Method("vera seed", "VeraConfig", lambda at: {
        "r": 8, "target_modules": [at["down"]], "save_projection": False, "projection_prng_key": 11}),
    Method("ia3", "IA3Config", lambda at: {"target_modules": linear(at), "feedforward_modules": [at["down"]]}),
    Method("ln tuning", "LNTuningConfig", lambda at: {"target_modules": [at["norm"]]}),
    Method("modules to save", "LoraConfig", lambda at: {
        "target_modules": at["qkv"], "modules_to_save": [at["norm"], at["head"]]}, True),
    Method("trainable tokens", "TrainableTokensConfig", lambda at: {
        "target_modules": [at["embed"]], "token_indices": [TOKENS[0], TOKENS[7], 999]}, True),
    Method("lora and tokens", "LoraConfig", lambda at: {
        "target_modules": at["qkv"], "trainable_token_indices": {at["embed"]: TOKENS[:5]}}, True),
]  # fmt: skip


class Base:
    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.places = family, PLACES[family]
        self.folder = folder / "base"
        case = next(case for case in CASES if case.family == family)
        self.model = make_reference(case, self.folder)
        self.bound = case.bound  # of llama.cpp's logits for the plain model


def skip_what_peft_cannot_do(base: Base, method: Method) -> None:
    if base.family == "gpt2" and method.config in ("LoHaConfig", "LoKrConfig"):
        pytest.skip("peft has no LoHa and LoKr for gpt2's layers")


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(request.param, tmp_path_factory.mktemp("base"))


def adapted(base: Base, method: Method, folder: Path, seed: int = 1) -> Any:
    """peft's model with random values in everything it trains, saved to `folder`."""
    import peft
    import torch

    torch.manual_seed(seed)
    config = getattr(peft, method.config)(**method.options(base.places))
    model = peft.get_peft_model(copy.deepcopy(base.model), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            around = 1.0 if any(part in name for part in ("ia3_l", "norm", "ln_", "magnitude")) else 0.0
            if "magnitude" in name:  # norms of rows: keep their size
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
            else:
                parameter.copy_(around + 0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, **method.save)
    return model.eval()


def relative_error(found: Path, wanted: Path) -> dict[str, float]:
    ours, theirs = reference.float_tensors(found), reference.float_tensors(wanted)
    assert ours.keys() == theirs.keys()
    return {name: float(np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max()) for name in ours}


def logits(model: Any) -> NDArray[np.float32]:
    import torch

    with torch.no_grad():
        values: NDArray[np.float32] = model(torch.tensor([TOKENS])).logits[0].float().numpy()
    return values


def deviation(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    return float(np.abs(found - wanted).max() / wanted.std())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_merged_equals_peft(base: Base, method: Method, tmp_path: Path) -> None:
    skip_what_peft_cannot_do(base, method)
    model = adapted(base, method, tmp_path / "adapter")
    convert(base.folder, tmp_path / "merged.gguf", quant="F32", adapters=[tmp_path / "adapter"])
    wanted = logits(model)
    assert deviation(logits(base.model), wanted) > 0.01, "the adapter does nothing"
    assert deviation(reference.llama_logits(tmp_path / "merged.gguf", TOKENS), wanted) <= base.bound
    if method.forward:
        return
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "by-peft")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base.folder / name, tmp_path / "by-peft")
    convert(tmp_path / "by-peft", tmp_path / "by-peft.gguf", quant="F32")
    errors = relative_error(tmp_path / "merged.gguf", tmp_path / "by-peft.gguf")
    assert max(errors.values()) <= RELATIVE, max(errors, key=lambda name: errors[name])


@pytest.mark.parametrize("name", ["lora patterns", "dora", "krona", "ia3", "modules to save"])
def test_a_gguf_base_gives_the_same_file(base: Base, name: str, tmp_path: Path) -> None:
    method = next(method for method in METHODS if method.name == name)
    skip_what_peft_cannot_do(base, method)
    adapted(base, method, tmp_path / "adapter")
    convert(base.folder, tmp_path / "base.gguf", quant="F32")
    convert(base.folder, tmp_path / "merged.gguf", quant="F32", adapters=[tmp_path / "adapter"])
    convert(tmp_path / "base.gguf", tmp_path / "from-gguf.gguf", quant="F32", adapters=[tmp_path / "adapter"])
    assert max(relative_error(tmp_path / "from-gguf.gguf", tmp_path / "merged.gguf").values()) <= 1e-6


def test_several_adapters_with_weights(base: Base, tmp_path: Path) -> None:
    """W + 0.5·Δ1 − 2·Δ2, each Δ from peft's own merge of one adapter alone."""
    methods = [method for method in METHODS if method.name in ("rslora", "dora" if base.family == "gpt2" else "lokr")]
    convert(base.folder, tmp_path / "plain.gguf", quant="F32")
    plain = reference.float_tensors(tmp_path / "plain.gguf")
    wanted = {name: values.astype(np.float64) for name, values in plain.items()}
    given = []
    for seed, (method, weight) in enumerate(zip(methods, (0.5, -2.0), strict=True)):
        folder = tmp_path / f"adapter{seed}"
        adapted(base, method, folder, seed).merge_and_unload().save_pretrained(tmp_path / f"peft{seed}")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(base.folder / name, tmp_path / f"peft{seed}")
        convert(tmp_path / f"peft{seed}", tmp_path / f"peft{seed}.gguf", quant="F32")
        for name, values in reference.float_tensors(tmp_path / f"peft{seed}.gguf").items():
            wanted[name] += weight * (values.astype(np.float64) - plain[name])
        given.append((folder, weight))
    convert(base.folder, tmp_path / "merged.gguf", quant="F32", adapters=given)
    for name, values in reference.float_tensors(tmp_path / "merged.gguf").items():
        assert np.abs(values - wanted[name]).max() <= RELATIVE * np.abs(wanted[name]).max(), name


def old_layout(folder: Path) -> None:
    """Keys as peft wrote them years ago: the adapter's name in them, in a pickle."""
    import torch
    from safetensors.torch import load_file

    stored = load_file(folder / "adapter_model.safetensors")
    renamed = {key.replace(".lora_A.weight", ".lora_A.default.weight").replace(
        ".lora_B.weight", ".lora_B.default.weight"): value for key, value in stored.items()}  # fmt: skip
    torch.save(renamed, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def mlx_layout(folder: Path) -> None:
    """Keys, transposition and scale of mlx-lm's adapters.safetensors."""
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "adapter_config.json").read_text())
    names = {"lora_A": "lora_a", "lora_B": "lora_b"}
    renamed = {}
    for key, value in load_file(folder / "adapter_model.safetensors").items():
        module, part, _ = key.removeprefix("base_model.model.").rsplit(".", 2)
        renamed[f"{module}.{names[part]}"] = value.T.contiguous()
    (folder / "adapter_model.safetensors").unlink()
    save_file(renamed, folder / "adapters.safetensors")
    scale = config["lora_alpha"] / config["r"]
    settings = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": {"rank": config["r"], "scale": scale}}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def no_module_names(folder: Path) -> None:
    """What some trainers leave out: optional fields, and `null` for lists."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    kept = {key: config[key] for key in ("peft_type", "r", "lora_alpha", "target_modules", "base_model_name_or_path")}
    path.write_text(json.dumps(kept | {"unsloth_version": "2026.1", "rank_pattern": None}))


@pytest.mark.parametrize("layout", [old_layout, mlx_layout, no_module_names], ids=lambda f: f.__name__)
def test_other_layouts_give_the_same_file(base: Base, layout: Callable[[Path], None], tmp_path: Path) -> None:
    if layout is mlx_layout and base.family == "gpt2":
        pytest.skip("mlx-lm's gpt2 has matrices outputs first, so its adapters don't fit the checkpoint")
    adapted(base, METHODS[0], tmp_path / "adapter")
    convert(base.folder, tmp_path / "wanted.gguf", quant="F32", adapters=[tmp_path / "adapter"])
    layout(tmp_path / "adapter")
    convert(base.folder, tmp_path / "found.gguf", quant="F32", adapters=[tmp_path / "adapter"])
    assert max(relative_error(tmp_path / "found.gguf", tmp_path / "wanted.gguf").values()) <= 1e-6


def test_resized_embeddings_and_added_tokens(base: Base, tmp_path: Path) -> None:
    """The adapter carries the larger embedding and the tokenizer that goes with it."""
    import peft
    import torch
    from tokenizers import Tokenizer

    model = copy.deepcopy(base.model)
    n_vocab = model.config.vocab_size + 3
    model.resize_token_embeddings(n_vocab, mean_resizing=False)
    at = base.places
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=at["qkv"], modules_to_save=[at["embed"], at["head"]])
    adapter = peft.get_peft_model(model, config)
    for _, parameter in adapter.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapter.save_pretrained(tmp_path / "adapter")
    tokenizer = Tokenizer.from_file(str(base.folder / "tokenizer.json"))
    start = tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<added_{i}>" for i in range(n_vocab - start)])
    tokenizer.save(str(tmp_path / "adapter" / "tokenizer.json"))
    shutil.copy(base.folder / "tokenizer_config.json", tmp_path / "adapter")
    convert(base.folder, tmp_path / "merged.gguf", quant="F32", adapters=[tmp_path / "adapter"])
    tokens = [*TOKENS[:40], n_vocab - 1, n_vocab - 3, *TOKENS[40:]]
    with torch.no_grad():
        wanted = adapter.eval()(torch.tensor([tokens])).logits[0].numpy()
    assert deviation(reference.llama_logits(tmp_path / "merged.gguf", tokens), wanted) <= base.bound
    assert reference.llama_ids(tmp_path / "merged.gguf", ["<added_1>"], parse_special=True) == [[start + 1]]


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        ("PromptTuningConfig", {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}, "no weight to merge"),
        ("PrefixTuningConfig", {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}, "no weight to merge"),
        ("PromptEncoderConfig", {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}, "no weight to merge"),
        ("LoraConfig", {"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"}, "--adapter-only"),
    ],
)
def test_what_cannot_be_merged_says_why(
    base: Base, config: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    import peft

    made = getattr(peft, config)(**options | ({"target_modules": base.places["qkv"]} if "Lora" in config else {}))
    peft.get_peft_model(copy.deepcopy(base.model), made).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=reason):
        convert(base.folder, tmp_path / "merged.gguf", quant="F32", adapters=[tmp_path / "adapter"])
    assert not (tmp_path / "merged.gguf").exists()
