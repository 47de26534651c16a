"""Every kind of tokenizer, trained here: what it is taken for, llama.cpp's ids against the library's, the way back."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from converters.tokenizers.corpus import sample_texts
from converters.tokenizers.differences import known_difference
from converters.tokenizers.pretokenizer import PRE_TOKENIZERS, PreTokenizer, find_pre_tokenizer, identify
from converters.tokenizers.read import read_vocabulary
from converters.tokenizers.sentencepiece_proto import parse_sentencepiece
from converters.tokenizers.tekken import read_tekken
from converters.tokenizers.tokenizer_json import build_tokenizer_json
from converters.tokenizers.vocabulary import TokenType, Vocabulary, vocabulary_from_metadata, vocabulary_metadata
from edgellm.errors import TokenizerError
from tests.converters import trained
from tests.oracles.llama_vocab import Seen, llama_vocab, write_vocabulary

TEXTS = [text for text in sample_texts() if "\0" not in text]


def seen(folder: Path, vocabulary: Vocabulary, texts: list[str] = TEXTS) -> Seen:
    write_vocabulary(folder / "vocabulary.gguf", vocabulary)
    return llama_vocab(folder / "vocabulary.gguf", texts)


def differing(vocabulary: Vocabulary, ids: list[list[int]], expected: list[list[int]]) -> tuple[list[str], int]:
    """Texts with other ids for no known reason, and the number of those with one."""
    metadata = vocabulary_metadata(vocabulary)
    different = [text for text, a, b in zip(TEXTS, ids, expected, strict=True) if a != b]
    unknown = [text for text in different if known_difference(metadata, text) is None]
    return unknown, len(different) - len(unknown)


def library_ids(tokenizer: Tokenizer, texts: list[str] = TEXTS) -> list[list[int]]:
    """Ids without special tokens; Unicode normalization, which llama.cpp hasn't, left out."""
    if str(tokenizer.normalizer).startswith("NF"):
        tokenizer.normalizer = None
    tokenizer.encode_special_tokens = True
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def check_both_ways(folder: Path) -> tuple[Vocabulary, int]:
    """llama.cpp's ids are the tokenizer.json's, and those of the tokenizer.json made from the GGUF's metadata."""
    vocabulary = read_vocabulary(folder, {})
    ours = seen(folder, vocabulary)
    expected = library_ids(Tokenizer.from_file(str(folder / "tokenizer.json")))
    unknown, n_known = differing(vocabulary, ours.plain, expected)
    assert unknown == []
    back = build_tokenizer_json(vocabulary_from_metadata(vocabulary_metadata(vocabulary)))
    assert library_ids(Tokenizer.from_str(json.dumps(back))) == expected
    assert Tokenizer.from_str(json.dumps(back)).encode("a b").ids == llama_framed(ours, vocabulary, "a b")
    return vocabulary, n_known


def llama_framed(ours: Seen, vocabulary: Vocabulary, text: str) -> list[int]:
    return ours.framed[TEXTS.index(text)]


COMMON = "smollm", "gpt-2", "llama-bpe", "qwen2", "tekken", "deepseek-v3"


@pytest.mark.parametrize(
    "pre",
    [pytest.param(pre, id=pre.name, marks=[] if pre.name in COMMON else [pytest.mark.slow]) for pre in PRE_TOKENIZERS],
)
def test_every_pre_tokenizer(pre: PreTokenizer, tmp_path: Path) -> None:
    trained.byte_level(tmp_path, pre)
    vocabulary = read_vocabulary(tmp_path, {})
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", pre.name)
    assert find_pre_tokenizer(pre.name) is pre
    ours = seen(tmp_path, vocabulary)
    expected = library_ids(Tokenizer.from_file(str(tmp_path / "tokenizer.json")))
    unknown, n_known = differing(vocabulary, ours.plain, expected)
    assert unknown == []
    assert n_known <= {"tekken": 45, "tiny_aya": 3}.get(pre.name, 0)
    back = build_tokenizer_json(vocabulary)
    assert library_ids(Tokenizer.from_str(json.dumps(back))) == expected
    assert identify(back, "bos" in vocabulary.special) == pre.name
    assert ours.decoded == TEXTS


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t["pre_tokenizer"]["pretokenizers"].pop(0),
            "doesn't know: .*ByteLevel.*ignore_merges=False; .*--pre",
        ),
        (lambda t: t["pre_tokenizer"]["pretokenizers"].reverse(), "doesn't know"),
        (lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "doesn't know"),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), "normalizer=.*Lowercase"),
        (lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\p{L}+"), r"p\{L\}\+"),
    ],
)
def test_unknown_pipeline(change: Callable[[dict[str, Any]], Any], said: str, tmp_path: Path) -> None:
    """Whatever differs from the table is an error that shows it, unless --pre says what it is."""
    trained.byte_level(tmp_path, find_pre_tokenizer("qwen2"))
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(TokenizerError, match=said):
        read_vocabulary(tmp_path, {})
    assert read_vocabulary(tmp_path, {}, "gpt-2").pre == "gpt-2"


@pytest.mark.parametrize(
    "regex",
    [
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\r\n]*"
        "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ],
)
def test_other_spellings_of_a_pattern(regex: str) -> None:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed", "invert": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    pipeline = {"type": "Sequence", "pretokenizers": [{"type": "Sequence", "pretokenizers": [split]}, byte_level]}
    assert identify({"pre_tokenizer": pipeline, "model": {}}) == "qwen2"


@pytest.mark.parametrize(("options", "n_known"), [({}, 40), ({"lowercase": False}, 0), ({"strip_accents": False}, 0)])
def test_wordpiece(options: dict[str, bool], n_known: int, tmp_path: Path) -> None:
    trained.wordpiece(tmp_path, **options)
    vocabulary, n = check_both_ways(tmp_path)
    assert vocabulary.model == "bert"
    assert n <= n_known
    assert vocabulary.lowercase is options.get("lowercase", True)
    assert vocabulary.strip_accents is (vocabulary.lowercase and options.get("strip_accents", True))
    assert vocabulary.tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert vocabulary.types[:5] == [TokenType.CONTROL, TokenType.UNKNOWN, *[TokenType.CONTROL] * 3]


def test_unigram(tmp_path: Path) -> None:
    trained.unigram(tmp_path)
    vocabulary, n_known = check_both_ways(tmp_path)
    assert (vocabulary.model, vocabulary.add_bos, vocabulary.add_eos) == ("t5", True, True)
    assert n_known <= 12
    assert len(vocabulary.charsmap) > 1000
    assert vocabulary.remove_extra_whitespaces


@pytest.mark.parametrize(
    ("kind", "options", "model"),
    [
        ("bpe", {}, "llama"),
        ("bpe", {"add_dummy_prefix": False, "user_defined_symbols": ["<tool>", "1,0"]}, "llama"),
        ("unigram", {"byte_fallback": False}, "t5"),
        (
            "unigram",
            {"byte_fallback": False, "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
            "t5",
        ),
    ],
)
def test_sentencepiece(kind: str, options: dict[str, Any], model: str, tmp_path: Path) -> None:
    trained.sentencepiece_model(tmp_path, kind, **options)
    vocabulary = read_vocabulary(tmp_path, {})
    assert vocabulary.model == model
    ours = seen(tmp_path, vocabulary)
    expected = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).EncodeAsIds(TEXTS)
    unknown, n_known = differing(vocabulary, ours.plain, expected)
    assert unknown == []
    assert n_known <= (0 if kind == "bpe" else 6)
    if kind == "bpe":
        assert [text.removeprefix(" " if vocabulary.add_space_prefix else "") for text in ours.decoded] == TEXTS
        back = Tokenizer.from_str(json.dumps(build_tokenizer_json(vocabulary)))
        texts = [text for text in TEXTS if "1,0" not in text]  # the library puts a space after such a token too
        assert library_ids(back, texts) == SentencePieceProcessor(
            model_file=str(tmp_path / "tokenizer.model")
        ).EncodeAsIds(texts)


def test_sentencepiece_without_byte_pieces(tmp_path: Path) -> None:
    """llama.cpp aborts on a character it has no piece for."""
    trained.sentencepiece_model(tmp_path, "bpe", byte_fallback=False)
    with pytest.raises(TokenizerError, match="no byte pieces"):
        read_vocabulary(tmp_path, {})


def test_unigram_with_byte_pieces(tmp_path: Path) -> None:
    trained.sentencepiece_model(tmp_path, "unigram", byte_fallback=True)
    with pytest.raises(TokenizerError, match="spells unknown characters in bytes"):
        read_vocabulary(tmp_path, {})


@pytest.mark.parametrize("kind", ["char", "word"])
def test_sentencepiece_of_characters_or_words(kind: str, tmp_path: Path) -> None:
    trained.sentencepiece_model(tmp_path, kind, byte_fallback=False, use_all_vocab=True)
    with pytest.raises(TokenizerError, match="words or characters"):
        read_vocabulary(tmp_path, {})


def test_the_model_file_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    trained.sentencepiece_model(tmp_path, "bpe", user_defined_symbols=["<tool>"], control_symbols=["<ctl>"])
    path = tmp_path / "tokenizer.model"
    processor = SentencePieceProcessor(model_file=str(path))
    model = parse_sentencepiece(path.read_bytes())
    n = processor.GetPieceSize()
    assert [(text, score) for text, score, _ in model.pieces] == [
        (processor.IdToPiece(i), processor.GetScore(i)) for i in range(n)
    ]
    assert [kind == 3 for *_, kind in model.pieces] == [processor.IsControl(i) for i in range(n)]
    assert [kind == 6 for *_, kind in model.pieces] == [processor.IsByte(i) for i in range(n)]
    for end in range(0, len(path.read_bytes()), 997):
        try:
            parse_sentencepiece(path.read_bytes()[:end])
        except TokenizerError:
            continue


def test_tekken(tmp_path: Path) -> None:
    """A tekken.json made from a byte-level BPE gives that BPE's ids, moved by the special tokens."""
    trained.byte_level(tmp_path, find_pre_tokenizer("tekken"))
    source = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    letters = {letter: byte for byte, letter in _byte_letters().items()}
    pieces = [piece for piece, i in sorted(source["model"]["vocab"].items(), key=lambda item: item[1]) if i > 2]
    raw = sorted((bytes(letters[c] for c in piece) for piece in pieces), key=lambda piece: len(piece) > 1)
    folder = tmp_path / "tekken"
    folder.mkdir()
    pattern = find_pre_tokenizer("tekken").steps[0]["pattern"]["Regex"]
    content = {
        "config": {"pattern": pattern, "default_vocab_size": len(raw) + 20, "default_num_special_tokens": 20},
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(piece).decode()} for i, piece in enumerate(raw)],
    }
    (folder / "tekken.json").write_text(json.dumps(content), encoding="utf-8")
    vocabulary = read_tekken(folder, {})
    assert (vocabulary.pre, len(vocabulary.tokens), vocabulary.add_bos) == ("tekken", len(raw) + 20, True)
    assert len(vocabulary.merges or []) == len(raw) - 256
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    spelled = [[vocabulary.tokens[i] for i in ids] for ids in seen(folder, vocabulary).plain]
    expected = [[tokenizer.id_to_token(i) for i in ids] for ids in library_ids(tokenizer)]
    different = [text for text, a, b in zip(TEXTS, spelled, expected, strict=True) if a != b]
    metadata = vocabulary_metadata(vocabulary)
    assert [text for text in different if known_difference(metadata, text) is None] == []
    (folder / "tekken.json").write_text(json.dumps(content | {"vocab": content["vocab"][5:]}), encoding="utf-8")
    with pytest.raises(TokenizerError, match="lacks a byte"):
        read_tekken(folder, {})


def _byte_letters() -> dict[int, str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return dict(bytes_to_unicode())
