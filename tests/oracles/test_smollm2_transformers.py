"""The exported folder in transformers against llama.cpp on the GGUFs: tokenizer, logits, greedy answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from converters.tokenizers.corpus import sample_texts
from tests.converters import reference

pytestmark = pytest.mark.slow

QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain gravity to a child in two sentences.",
    "List three fruits that are red.",
    "def fibonacci(n):",
    "Translate 'good morning' to German.",
    "What is 17 + 25?",
    "Why is the sky blue?",
    "Name a famous painter and one of their works.",
    "Summarize: The quick brown fox jumps over the lazy dog.",
    "Tell me a long story about a lighthouse keeper.",
    "Explain step by step how bread is made.",
    "Describe the water cycle in detail.",
    "Write a letter to a friend about a journey by train.",
)
N_ANSWER = 32
# Both sides compute in float32, in different orders. In units of the logits' standard deviation, over 300 positions:
# measured 1e-4 at most, 4e-6 root mean square.
BOUND = 1e-3
# The source's Q4_1 weights are the same numbers, but llama.cpp rounds activations to 8 bits for them. Measured: 0.063
# root mean square, and the same likeliest token at 93 % of the positions (of a text that is no prose).
QUANTIZED_RMS = 0.1
QUANTIZED_SAME_TOP = 0.9


@pytest.fixture(scope="module")
def transformer(smollm2_folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer) as anyone would load them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(smollm2_folder)


@pytest.fixture(scope="module")
def tokens(transformer: tuple[Any, Any]) -> list[int]:
    text = " ".join(sample_texts()[:120])
    return list(transformer[1](text, add_special_tokens=False)["input_ids"])[:300]


@pytest.fixture(scope="module")
def expected(transformer: tuple[Any, Any], tokens: list[int]) -> NDArray[np.float32]:
    import torch

    with torch.no_grad():
        return np.asarray(transformer[0](torch.tensor([tokens])).logits[0])


def test_every_weight_was_found(smollm2_folder: Path, transformer: tuple[Any, Any]) -> None:
    from transformers import AutoModelForCausalLM

    _, report = AutoModelForCausalLM.from_pretrained(smollm2_folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    model, tokenizer = transformer
    assert type(model).__name__ == "LlamaForCausalLM"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2


def test_logits_agree_with_the_f32_gguf(smollm2_f32: Path, tokens: list[int], expected: NDArray[np.float32]) -> None:
    ours = reference.llama_logits(smollm2_f32, tokens)
    assert len(tokens) == 300
    error = np.abs(ours - expected) / expected.std()
    assert error.max() < BOUND
    assert np.sqrt((error**2).mean()) < BOUND / 20
    assert (ours.argmax(1) == expected.argmax(1)).mean() >= 0.99


def test_logits_agree_with_the_quantized_source(
    smollm2: Path, tokens: list[int], expected: NDArray[np.float32]
) -> None:
    source = reference.llama_logits(smollm2, tokens)
    error = np.abs(source - expected)
    assert np.sqrt((error**2).mean()) / expected.std() < QUANTIZED_RMS
    assert (source.argmax(1) == expected.argmax(1)).mean() >= QUANTIZED_SAME_TOP


def test_greedy_answers_agree(smollm2_f32: Path, transformer: tuple[Any, Any]) -> None:
    """Word for word. A different token is forgiven only where transformers' own two best logits lie so close
    together that the measured difference between the two libraries decides."""
    import torch

    model, tokenizer = transformer
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    answers = reference.llama_greedy(smollm2_f32, prompts, N_ANSWER, stop=tokenizer.eos_token_id)
    theirs = _generate(model, prompts, tokenizer.eos_token_id)
    equal = 0  # of those that don't end before the last token
    for prompt, ours, expected in zip(prompts, answers, theirs, strict=True):
        equal += ours == expected and len(expected) == N_ANSWER
        if ours != expected:
            first = next(i for i, (a, b) in enumerate(zip(ours, expected, strict=False)) if a != b)
            with torch.no_grad():
                logits = model(torch.tensor([prompt + expected[:first]])).logits[0, -1]
            assert logits[expected[first]] - logits[ours[first]] < 2 * BOUND * logits.std()
    assert equal >= 8


def _generate(model: Any, prompts: list[list[int]], eos: int) -> list[list[int]]:
    """transformers' greedy answers, all prompts side by side, up to and with the end token."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[eos] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=N_ANSWER, do_sample=False, eos_token_id=eos, pad_token_id=eos
        )
    answers = [row[longest:].tolist() for row in out]
    return [answer[: answer.index(eos) + 1] if eos in answer else answer for answer in answers]
