"""Token ids and texts of a real tokenizer: llama.cpp on the source GGUF, on ours, and `tokenizers` on the export."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from converters.tokenizers.corpus import sample_texts
from tests.converters import reference

CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
# letters of many scripts, digits, marks, symbols, white space, beyond the BMP
RANGES = ((32, 126), (160, 591), (768, 879), (880, 1327), (1424, 1791), (2304, 2431), (3585, 3675), (4304, 4351),
          (8192, 8303), (8352, 8399), (8704, 8959), (12352, 12543), (19968, 20991), (44032, 44543), (65281, 65374),
          (120120, 120223), (127744, 128591))  # fmt: skip


def random_texts(n: int, seed: int) -> list[str]:
    """Strings over assigned characters of many scripts, with runs of digits, spaces and newlines among them."""
    source = random.Random(seed)
    out = []
    for _ in range(n):
        pieces = []
        for _ in range(source.randint(1, 12)):
            low, high = source.choice(RANGES)
            pieces.append("".join(chr(source.randint(low, high)) for _ in range(source.randint(1, 6))))
            pieces.append(source.choice(("", "", " ", "  ", "\n", "\t", "\r\n", "123", "2026", "'s", "'LL", "...")))
        out.append("".join(pieces))
    return out


TEXTS = list(dict.fromkeys([*sample_texts(), *random_texts(300, seed=5)]))


@pytest.fixture(scope="module")
def exported(smollm2_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))


def test_there_are_enough_texts() -> None:
    assert len(TEXTS) >= 700
    assert not any(token in text for text in TEXTS for token in CONTROL)


def test_ids_of_plain_text(smollm2: Path, smollm2_f32: Path, exported: Tokenizer) -> None:
    source = reference.llama_ids(smollm2, TEXTS)
    ours = reference.llama_ids(smollm2_f32, TEXTS)
    assert [text for text, a, b in zip(TEXTS, source, ours, strict=True) if a != b] == []
    library = [list(encoding.ids) for encoding in exported.encode_batch(TEXTS, add_special_tokens=False)]
    assert [text for text, a, b in zip(TEXTS, library, ours, strict=True) if a != b] == []


def test_ids_with_control_tokens_in_the_text(smollm2: Path, smollm2_f32: Path, exported: Tokenizer) -> None:
    around = TEXTS[::5]
    texts = [
        f"{CONTROL[i % 3]}{text}{CONTROL[(i + 1) % 3]}\n{CONTROL[(i + 2) % 3]} {text[::-1]}"
        for i, text in enumerate(around)
    ]
    texts += ["<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "<|im_start|><|im_end|><|im_end|>", "<|im_en"]
    source = reference.llama_ids(smollm2, texts, parse_special=True)
    ours = reference.llama_ids(smollm2_f32, texts, parse_special=True)
    assert ours == source
    library = [list(encoding.ids) for encoding in exported.encode_batch(texts, add_special_tokens=False)]
    assert [text for text, a, b in zip(texts, library, ours, strict=True) if a != b] == []
    assert all({1, 2, 0} <= set(ids) for ids in ours[: len(around)])


def test_bos_and_eos_as_the_source_adds_them(smollm2: Path, smollm2_f32: Path, exported: Tokenizer) -> None:
    texts = TEXTS[:20]
    source = reference.llama_ids(smollm2, texts, add_special=True)
    assert reference.llama_ids(smollm2_f32, texts, add_special=True) == source
    assert [list(encoding.ids) for encoding in exported.encode_batch(texts)] == source


def test_texts_come_back(smollm2: Path, smollm2_f32: Path, exported: Tokenizer) -> None:
    ids = reference.llama_ids(smollm2_f32, TEXTS)
    assert reference.llama_texts(smollm2_f32, ids) == TEXTS
    assert reference.llama_texts(smollm2, ids) == TEXTS
    assert exported.decode_batch(ids, skip_special_tokens=False) == TEXTS


def test_every_single_token_has_the_sources_text(smollm2: Path, smollm2_f32: Path, exported: Tokenizer) -> None:
    every = [[i] for i in range(exported.get_vocab_size())]
    assert len(every) == 49152
    for special in (True, False):
        ours = reference.llama_texts(smollm2_f32, every, special)
        assert ours == reference.llama_texts(smollm2, every, special)
        theirs = exported.decode_batch(every, skip_special_tokens=not special)
        assert [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b] == []
