"""Llama-2-like tokenizers: SentencePiece BPE with byte fallback, as tokenizer.model and as tokenizer.json."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import edgellm
from converters import convert, to_checkpoint
from converters.tokenizers.corpus import sample_texts
from converters.tokenizers.vocabulary import TokenType
from tests.converters import reference, tiny
from tests.converters.command import refused, run

spm = pytest.importorskip("sentencepiece")
TEXTS = sample_texts()


@pytest.fixture(scope="module")
def model_file() -> bytes:
    """A tokenizer.model with Llama 2's options: no normalization, digits split, all white space kept."""
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS * 3 for line in text.splitlines() if line.strip()]),
        model_writer=out,
        vocab_size=900,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.99,
        minloglevel=2,
    )
    return out.getvalue()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spm") / "model"
    tiny.make_model(folder, vocab_size=900, bos_token_id=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


@pytest.fixture
def folder(weights: Path, model_file: bytes, tmp_path: Path) -> Path:
    """Weights and tokenizer.model, nothing more."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in weights.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "tokenizer.model").write_bytes(model_file)
    return folder


def test_tokenizer_model(folder: Path, model_file: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    receipt = convert(folder, out, quant="Q8_0")
    assert any(f"{len(sample_texts())} strings compared" in check for check in receipt.checks)
    processor = spm.SentencePieceProcessor(model_proto=model_file)
    assert reference.llama_ids(out, TEXTS) == [processor.EncodeAsIds(text) for text in TEXTS]
    metadata = reference.metadata(out)
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.tokens"] == [processor.IdToPiece(i) for i in range(900)]
    assert metadata["tokenizer.ggml.scores"] == [processor.GetScore(i) for i in range(900)]
    kinds = metadata["tokenizer.ggml.token_type"]
    assert kinds[:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
    assert kinds.count(TokenType.BYTE) == 256
    ids = [processor.EncodeAsIds(text) for text in TEXTS]
    with edgellm.load(out) as model:
        assert [model.detokenize(row) for row in ids] == [processor.DecodeIds(row) for row in ids]
        assert model.detokenize([1, *ids[0]], special=True) == f"<s> {TEXTS[0]}"


def test_back_to_tokenizer_json(folder: Path, model_file: bytes, tmp_path: Path) -> None:
    """The tokenizer.json we write for it gives SentencePiece's ids, and converts to a GGUF that does too."""
    convert(folder, tmp_path / "out.gguf", quant="Q8_0")
    back = to_checkpoint(tmp_path / "out.gguf", tmp_path / "back")
    processor = spm.SentencePieceProcessor(model_proto=model_file)
    expected = [processor.EncodeAsIds(text) for text in TEXTS]
    tokenizer = Tokenizer.from_file(str(back / "tokenizer.json"))
    theirs = [list(e.ids) for e in tokenizer.encode_batch(TEXTS, add_special_tokens=False)]
    assert [(t, a, b) for t, a, b in zip(TEXTS, theirs, expected, strict=True) if a != b] == []
    assert tokenizer.decode_batch(expected) == [processor.DecodeIds(row) for row in expected]
    convert(back, tmp_path / "again.gguf", quant="Q8_0")
    assert reference.llama_ids(tmp_path / "again.gguf", TEXTS) == expected
    bos = [processor.bos_id()]
    assert bos == [1]
    assert reference.llama_ids(tmp_path / "again.gguf", TEXTS, add_special=True) == [bos + row for row in expected]
    assert [list(e.ids) for e in tokenizer.encode_batch(TEXTS)] == [bos + row for row in expected]


def llama_2_tokenizer_json(processor: Any, legacy: bool) -> dict[str, Any]:
    """As transformers converts a tokenizer.model: every split of a piece into two pieces, by the piece's score.

    legacy: the space in front is put there by a normalizer, as in Llama 2's own file, else by Metaspace.
    """
    pieces = {processor.IdToPiece(i): i for i in range(processor.GetPieceSize())}
    merges: list[tuple[float, int, int, list[str]]] = []
    for piece, i in pieces.items():
        splits = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
        score = processor.GetScore(i)
        merges += [(-score, pieces[a], pieces[b], [a, b]) for a, b in splits if a in pieces and b in pieces]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": processor.IdToPiece(i), **flags} for i in range(3)],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]} if legacy else None,
        "pre_tokenizer": None if legacy else metaspace,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": pieces,
            "merges": [pair for *_, pair in sorted(merges)],
        },
    }


@pytest.mark.parametrize("legacy", [True, False])
def test_tokenizer_json_of_the_same_tokenizer(folder: Path, model_file: bytes, legacy: bool, tmp_path: Path) -> None:
    """Without tokenizer.model, from merges alone, the ids are SentencePiece's; Metaspace's beside leading spaces."""
    (folder / "tokenizer.model").unlink()
    processor = spm.SentencePieceProcessor(model_proto=model_file)
    content = llama_2_tokenizer_json(processor, legacy)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    receipt = convert(folder, tmp_path / "out.gguf", quant="Q8_0")
    assert any("a space at the beginning" in check for check in receipt.checks) is not legacy
    expected = [[1, *processor.EncodeAsIds(text)] for text in TEXTS]
    assert reference.llama_ids(tmp_path / "out.gguf", TEXTS, add_special=True) == expected
    metadata = reference.metadata(tmp_path / "out.gguf")
    assert metadata["tokenizer.ggml.add_space_prefix"]
    assert metadata["tokenizer.ggml.token_type"][:4] == [
        TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE,
    ]  # fmt: skip
    back = to_checkpoint(tmp_path / "out.gguf", tmp_path / "back")
    tokenizer = Tokenizer.from_file(str(back / "tokenizer.json"))
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [e.ids for e in tokenizer.encode_batch(TEXTS)] == [e.ids for e in theirs.encode_batch(TEXTS)]
    assert [t for t, e, i in zip(TEXTS, theirs.encode_batch(TEXTS), expected, strict=True) if e.ids != i] == (
        [] if legacy else [text for text in TEXTS if text.startswith(" ")]
    )


def test_added_tokens_beside_tokenizer_model(weights: Path, model_file: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny.make_model(folder, vocab_size=904)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(model_file)
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 900, "<old>": 901}))
    entries = {"901": {"content": "<think>", "special": False}, "2": {"content": "</s>", "special": True}}
    config = {"added_tokens_decoder": entries, "eos_token": "<|im_start|>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    out = tmp_path / "out.gguf"
    convert(folder, out, quant="Q8_0")
    metadata = reference.metadata(out)
    assert metadata["tokenizer.ggml.tokens"][900:] == ["<|im_start|>", "<think>", "[PAD902]", "[PAD903]"]
    assert metadata["tokenizer.ggml.token_type"][900:] == [
        TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED, TokenType.UNUSED,
    ]  # fmt: skip
    assert metadata["tokenizer.ggml.eos_token_id"] == 900
    ids = reference.llama_ids(out, ["a<think>b<|im_start|>"], parse_special=True, add_special=True)[0]
    assert {900, 901} <= set(ids)
    assert ids[0] != 1


def test_damaged_tokenizer_model(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"not a model")
    refused(run("convert", folder, "-o", tmp_path / "o.gguf"), 3, "is no SentencePiece model; copy it again")
    assert not (tmp_path / "o.gguf").exists()
