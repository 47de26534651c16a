"""Small random-weight models of the real classes, with a small real tokenizer, made by the reference libraries."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from converters.tokenizers.corpus import sample_texts

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# as the families' own tokenizer.json files have them, written out independently of the converter's table
REGEXES = {
    "llama-bpe": CL100K,
    "qwen2": CL100K.replace(r"\p{N}{1,3}", r"\p{N}"),
    "tekken": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "gpt-4o": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
PRE_TOKENIZERS = ("smollm", "gpt-2", *REGEXES)
SMALL = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


@cache
def byte_level_tokenizer(pre: str = "smollm") -> str:
    """tokenizer.json of a byte-level BPE trained on the corpus: 1000 tokens, three of them control tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in REGEXES)
    steps = {"smollm": [pre_tokenizers.Digits(individual_digits=True), byte_level], "gpt-2": [byte_level]}.get(pre)
    if steps is None:
        steps = [pre_tokenizers.Split(Regex(REGEXES[pre]), "isolated"), byte_level]
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_texts() * 3, trainer)
    if pre == "llama-bpe":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=[("<|endoftext|>", 0)]
        )
    return str(tokenizer.to_str())


def add_tokenizer(folder: Path, pre: str = "smollm", **tokenizer_config: Any) -> None:
    (folder / "tokenizer.json").write_text(byte_level_tokenizer(pre), encoding="utf-8")
    config = {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "chat_template": CHATML,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config | tokenizer_config), encoding="utf-8")


def make_model(folder: Path, family: str = "llama", *, pre: str = "smollm", seed: int = 0, **config: Any) -> Any:
    """Save a random model of transformers' class for `family` and return it (float32, eval)."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config_class = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig}[family]
    model_class = {"llama": transformers.LlamaForCausalLM, "mistral": transformers.MistralForCausalLM}[family]
    model = model_class(config_class(**(SMALL | {"bos_token_id": 0, "eos_token_id": 2} | config))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # norms and biases are initialized to constants, which would hide mistakes
            scale = 0.3 if parameter.ndim == 1 else 0.08
            parameter.copy_(torch.randn_like(parameter) * scale + (1.0 if "norm" in name else 0.0))
    model.save_pretrained(folder)
    add_tokenizer(folder, pre)
    return model
