"""What is fuzzed: small real inputs, one file of which gets damaged, and what is then done with them."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.mutate import damaged

JSON_FILES = (".json", ".jinja")


@dataclass(frozen=True)
class Target:
    """A folder, the files in it that may be damaged, and how often it is chosen."""

    folder: Path
    files: tuple[str, ...]
    act: str
    weight: int = 1


def build(root: Path) -> None:
    """Make every input once, in folders of `root`."""
    from tests.converters import tiny, trained
    from tests.oracles.families import make_reference
    from tests.oracles.family_cases import CASES

    for case in CASES:
        if case.name in ("llama-2", "llama-3", "gemma3-1", "phi3-2", "gpt-oss-1", "qwen35-1", "bert-1", "granitemoe-1"):
            make_reference(case, root / f"family-{case.name}")
    tiny.make_model(root / "llama", num_hidden_layers=1, hidden_size=64, intermediate_size=64, vocab_size=1000)
    _index(root / "llama", root / "sharded")
    _pickled(root / "llama", root / "pickled")
    _adapter(root / "llama", root / "adapter")
    trained.unigram(root / "tokenizer-unigram")
    trained.wordpiece(root / "tokenizer-wordpiece")
    trained.sentencepiece_model(root / "tokenizer-spm", "bpe")
    (root / "tokenizer-spm" / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    _tekken(root / "tokenizer-tekken")
    from converters import convert

    (root / "gguf").mkdir()
    convert(root / "llama", root / "gguf" / "model.gguf", quant="Q8_0")


def _index(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder)
    os.rename(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    from converters.sources.safetensors_file import read_tensors

    names = read_tensors(folder / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _pickled(source: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    shutil.copytree(source, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _adapter(source: Path, folder: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], use_dora=True)
    peft.get_peft_model(model, config).save_pretrained(folder)


def _tekken(folder: Path) -> None:
    import base64

    folder.mkdir()
    vocabulary = [
        {"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None} for i in range(256)
    ]
    vocabulary += [
        {"rank": 256 + i, "token_bytes": base64.b64encode(text.encode()).decode(), "token_str": text}
        for i, text in enumerate((" t", "he", " the", "in", "er"))
    ]
    pattern = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?" \
              r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" \
              r"|\s*[\r\n]+|\s+(?!\S)|\s+"  # fmt: skip
    config = {"pattern": pattern, "num_vocab_tokens": 261, "default_vocab_size": 271, "default_num_special_tokens": 10,
              "version": "v7"}  # fmt: skip
    (folder / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocabulary}))


def find(root: Path) -> list[Target]:
    """The targets in a root that `build` filled."""
    small = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    targets = [
        Target(root / "llama", (*small, "model.safetensors"), "plan", 12),
        Target(root / "sharded", ("model.safetensors.index.json", "model-00001-of-00001.safetensors"), "plan", 4),
        Target(root / "pickled", ("pytorch_model.bin",), "plan", 2),
        Target(root / "adapter", ("adapter_config.json", "adapter_model.safetensors"), "merge", 6),
        Target(root / "gguf", ("model.gguf",), "gguf", 12),
        Target(root / "llama", ("quantized",), "quantized", 3),
        Target(root / "llama", small, "convert", 1),
    ]
    targets += [Target(path, ("config.json",), "plan", 2) for path in sorted(root.glob("family-*"))]
    files = {
        "unigram": "tokenizer.json",
        "wordpiece": "tokenizer.json",
        "spm": "tokenizer.model",
        "tekken": "tekken.json",
    }
    targets += [Target(root / f"tokenizer-{kind}", (file,), "vocabulary", 3) for kind, file in files.items()]
    return targets


def prepare(root: Path, seed: int, number: int, work: Path) -> tuple[Target, Path]:
    """The damaged input of a case, in a folder of its own: links to the whole files, and the one that isn't."""
    rng = random.Random(f"{seed}/{number}")
    targets = find(root)
    target = rng.choices(targets, [t.weight for t in targets])[0]
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for path in target.folder.iterdir():
        if path.is_file():
            os.link(path, work / path.name)
    name = rng.choice([file for file in target.files if (target.folder / file).exists()] or ["config.json"])
    content = (target.folder / name).read_bytes()
    (work / name).unlink()
    if target.act == "quantized":
        config = json.loads(content)
        config["quantization_config"] = rng.choice(_QUANTIZED)
        content = json.dumps(config).encode()
    if rng.random() < 0.01:
        (work / name).mkdir()
    elif rng.random() < 0.99:
        (work / name).write_bytes(damaged(content, rng, name.endswith(JSON_FILES)))
    return target, work


_QUANTIZED: tuple[dict[str, Any], ...] = (
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False},
    {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True},
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    {"quant_method": "compressed-tensors", "format": "pack-quantized",
     "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}}},
    {"quant_method": "mxfp4"},
)  # fmt: skip


def act(target: Target, folder: Path, base: Path, load: Callable[[Path], None]) -> None:
    """Do with a damaged input what a user would. `load` loads a GGUF in another process."""
    import converters
    from converters.sources import open_source
    from converters.tokenizers.read import read_vocabulary
    from converters.tokenizers.vocabulary import fit

    if target.act in ("plan", "quantized"):
        converters.describe(folder)
        planned = converters.plan(folder)
        source = open_source(folder)
        fit(read_vocabulary(folder, source.config), planned.sizes["n_vocab"])
        for tensor in list(source.tensors.values())[:3]:
            tensor.read()
    elif target.act == "convert":
        converters.convert(folder, folder / "out.gguf", quant="Q4_0", n_threads=1)
    elif target.act == "merge":
        converters.describe(folder)
        converters.convert(base, folder / "out.gguf", quant="F16", adapters=[folder], n_threads=1)
        converters.export_adapter(base, [(folder, 1.0)], folder / "lora.gguf", measure=False)
    elif target.act == "vocabulary":
        from converters.verify import reference_encoder

        config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 1600, "bos_token_id": 1, "eos_token_id": [2]}
        fit(read_vocabulary(folder, config), 1600)
        encode = reference_encoder(folder)
        if encode is not None:
            encode("The quick brown fox, 123 ▁ <s>")
    else:
        _act_on_gguf(folder)
        load(folder / "model.gguf")


def _act_on_gguf(folder: Path) -> None:
    import converters
    from edgellm.errors import EdgeLLMError
    from edgellm.gguf_header import read_header

    read_header(folder / "model.gguf")
    for action in (
        lambda: converters.plan(folder / "model.gguf"),
        lambda: converters.to_checkpoint(folder / "model.gguf", folder / "checkpoint"),
    ):
        try:
            action()
        except EdgeLLMError:
            continue
