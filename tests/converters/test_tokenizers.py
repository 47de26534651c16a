"""Tokenizers of every supported kind: ids of llama.cpp on the GGUF against `tokenizers`, and the way back."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from converters import convert, to_checkpoint
from converters.tokenizers.corpus import sample_texts
from converters.tokenizers.read import read_vocabulary
from converters.tokenizers.vocabulary import TokenType, fit
from edgellm.errors import TokenizerError
from tests.converters import reference, tiny
from tests.converters.command import refused, run

Copy = Callable[[Path], Path]
TEXTS = sample_texts()


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def assert_same_ids(gguf: Path, folder: Path, texts: list[str] = TEXTS, normalizer: bool = True) -> None:
    """llama.cpp on the GGUF gives what the folder's tokenizer.json gives, with and without special tokens."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if not normalizer:
        tokenizer.normalizer = None
    for special in (False, True):
        ours = reference.llama_ids(gguf, texts, add_special=special, parse_special=True)
        theirs = [list(e.ids) for e in tokenizer.encode_batch(texts, add_special_tokens=special)]
        assert [(t, a, b) for t, a, b in zip(texts, ours, theirs, strict=True) if a != b] == []


# llama.cpp's own expressions for these two leave combining marks (\\p{M}) out of words
MARKS_DIFFER = ("tekken", "gpt-4o")


@pytest.mark.parametrize("pre", [pre for pre in tiny.PRE_TOKENIZERS if pre not in MARKS_DIFFER])
def test_every_pre_tokenizer(tiny_llama: Path, copy_of: Copy, pre: str, tmp_path: Path) -> None:
    folder = copy_of(tiny_llama)
    tiny.add_tokenizer(folder, pre)
    out, back = tmp_path / "out.gguf", tmp_path / "back"
    receipt = convert(folder, out, quant="Q8_0")
    assert reference.metadata(out)["tokenizer.ggml.pre"] == pre
    texts = [*TEXTS, "<|im_start|>user\n1234<|im_end|>\n", "a<|im_end|>b<|endoftext|> c"]
    if pre == "qwen2":  # its NFC normalization has no counterpart, and the receipt says so
        assert any("normalizes text (NFC), llama.cpp doesn't" in note for note in receipt.notes)
    assert_same_ids(out, folder, texts, normalizer=pre != "qwen2")
    to_checkpoint(out, back)
    assert_same_ids(out, back, texts, normalizer=pre != "qwen2")
    ours, theirs = (json.loads((f / "tokenizer.json").read_text()) for f in (back, folder))
    assert ours["model"]["vocab"] == theirs["model"]["vocab"]
    assert [tuple(m) for m in ours["model"]["merges"]] == [tuple(m) for m in theirs["model"]["merges"]]


@pytest.mark.parametrize("pre", MARKS_DIFFER)
def test_what_llama_cpp_splits_otherwise_is_counted(tiny_llama: Path, copy_of: Copy, pre: str, tmp_path: Path) -> None:
    """Text without combining marks gets the same ids; with them it may not, and that doesn't pass unnoticed."""
    folder = copy_of(tiny_llama)
    tiny.add_tokenizer(folder, pre)
    receipt = convert(folder, tmp_path / "out.gguf", quant="Q8_0")
    # llama.cpp has the whole O200K pattern under this name only
    expected = {"tekken": "tekken", "gpt-4o": "granite-embed-multi-97m"}[pre]
    assert reference.metadata(tmp_path / "out.gguf")["tokenizer.ggml.pre"] == expected
    assert (pre == "gpt-4o") == any("all equal" in check for check in receipt.checks)
    assert (pre == "tekken") == any("with combining marks" in check for check in receipt.checks)
    without = [text for text in TEXTS if not any(unicodedata.category(c).startswith("M") for c in text)]
    assert len(without) > 400
    assert_same_ids(tmp_path / "out.gguf", folder, without)
    to_checkpoint(tmp_path / "out.gguf", tmp_path / "back")
    theirs, ours = (Tokenizer.from_file(str(f / "tokenizer.json")) for f in (folder, tmp_path / "back"))
    assert [e.ids for e in ours.encode_batch(TEXTS)] == [e.ids for e in theirs.encode_batch(TEXTS)]


def test_a_pre_tokenizer_is_told_from_its_neighbours(tiny_llama: Path, copy_of: Copy, tmp_path: Path) -> None:
    """cl100k's expression without ignore_merges is smaug-bpe; qwen2 splits digits one by one."""
    folder = copy_of(tiny_llama)
    tiny.add_tokenizer(folder, "llama-bpe")
    edit_json(folder / "tokenizer.json", lambda t: t["model"].update(ignore_merges=False))
    convert(folder, tmp_path / "out.gguf", quant="Q8_0")
    assert reference.metadata(tmp_path / "out.gguf")["tokenizer.ggml.pre"] == "smaug-bpe"
    assert_same_ids(tmp_path / "out.gguf", folder)


def test_unknown_pre_tokenizer(tiny_llama: Path, copy_of: Copy, tmp_path: Path) -> None:
    folder = copy_of(tiny_llama)
    pattern = {"type": "Split", "pattern": {"Regex": r"\d+|\D+"}, "behavior": "Isolated", "invert": False}
    edit_json(folder / "tokenizer.json", lambda t: t["pre_tokenizer"]["pretokenizers"].__setitem__(0, pattern))
    out = tmp_path / "out.gguf"
    refused(run("convert", folder, "-o", out), 3, "doesn't know", r"\\d+|\\D+", "--pre")
    assert not out.exists()
    # a wrong name is found out by comparing ids
    refused(run("convert", folder, "-o", out, "--pre", "gpt-2"), 3, "the checkpoint's own tokenizer as", "--pre")
    assert not out.exists()
    # and one that llama.cpp doesn't know, by loading
    refused(run("convert", folder, "-o", out, "--pre", "nonsense"), 3, "nonsense")
    assert list(tmp_path.glob("out*")) == []


def test_pre_override(tiny_llama: Path, copy_of: Copy, tmp_path: Path) -> None:
    folder = copy_of(tiny_llama)
    # the same splits in words the table doesn't have: ByteLevel with trim_offsets is the same, two Digits aren't known
    digits = {"type": "Digits", "individual_digits": True}
    edit_json(folder / "tokenizer.json", lambda t: t["pre_tokenizer"]["pretokenizers"].insert(0, digits))
    with pytest.raises(TokenizerError, match="doesn't know"):
        convert(folder, tmp_path / "out.gguf", quant="Q8_0")
    convert(folder, tmp_path / "out.gguf", quant="Q8_0", pre="smollm")
    assert_same_ids(tmp_path / "out.gguf", folder)


def test_added_tokens(copy_of: Copy, tmp_path: Path) -> None:
    """A fine-tune's added tokens, special and not; more embedding rows than tokens."""
    tiny.make_model(tmp_path / "model", vocab_size=1024)
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    from tokenizers import AddedToken

    tokenizer.add_special_tokens([AddedToken("<|tool|>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    out = tmp_path / "out.gguf"
    receipt = convert(tmp_path / "model", out, quant="Q8_0")
    assert "21 embedding rows have no token; they are marked unused" in receipt.notes
    metadata = reference.metadata(out)
    assert metadata["tokenizer.ggml.tokens"][1000:1004] == ["<|tool|>", "<think>", "</think>", "[PAD1003]"]
    types = metadata["tokenizer.ggml.token_type"]
    assert types[:4] == [TokenType.CONTROL] * 3 + [TokenType.NORMAL]
    assert types[1000:] == [TokenType.CONTROL] + [TokenType.USER_DEFINED] * 2 + [TokenType.UNUSED] * 21
    texts = [*TEXTS, "<think>12 + 30</think> 42<|tool|>x", "<think><think>", "a <|tool|> b", "[PAD1003] 1"]
    assert_same_ids(out, tmp_path / "model", texts)
    # the non-special ones count in plain text as well, the special one doesn't
    plain = reference.llama_ids(out, ["<think>a<|tool|>"])[0]
    assert plain[0] == 1001
    assert 1000 not in plain
    to_checkpoint(out, tmp_path / "back")
    assert_same_ids(out, tmp_path / "back", texts)
    convert(tmp_path / "back", tmp_path / "again.gguf", quant="Q8_0")
    assert reference.metadata(tmp_path / "again.gguf")["tokenizer.ggml.token_type"] == types


def test_tokenizer_larger_than_the_embedding(tmp_path: Path) -> None:
    tiny.make_model(tmp_path / "model", vocab_size=990)
    out = tmp_path / "out.gguf"
    refused(run("convert", tmp_path / "model", "-o", out), 3, "the tokenizer has 1000 tokens", "only 990 rows")
    assert not out.exists()


def test_ids_that_nobody_has(tiny_llama: Path, copy_of: Copy, tmp_path: Path) -> None:
    folder = copy_of(tiny_llama)

    def remove(tokenizer: dict[str, Any]) -> None:
        token = next(t for t, i in tokenizer["model"]["vocab"].items() if i == 999)
        del tokenizer["model"]["vocab"][token]
        tokenizer["model"]["merges"] = [m for m in tokenizer["model"]["merges"] if "".join(m) != token]
        tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 998, "content": "<|again|>"})

    edit_json(folder / "tokenizer.json", remove)
    vocabulary = fit(read_vocabulary(folder, {}), 1000)
    assert vocabulary.tokens[998:] == ["<|again|>", "[PAD999]"]
    assert vocabulary.types[998:] == [TokenType.CONTROL, TokenType.UNUSED]


def test_token_text_that_stands_twice(tiny_llama: Path, copy_of: Copy, tmp_path: Path) -> None:
    """llama.cpp aborts on it; the second becomes an unused entry."""
    folder = copy_of(tiny_llama)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    twin = next(t for t, i in tokenizer["model"]["vocab"].items() if i == 500)
    last = next(t for t, i in tokenizer["model"]["vocab"].items() if i == 999)

    def repeat(tokenizer: dict[str, Any]) -> None:
        del tokenizer["model"]["vocab"][last]
        tokenizer["model"]["merges"] = [m for m in tokenizer["model"]["merges"] if "".join(m) != last]
        tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 999, "content": twin})

    edit_json(folder / "tokenizer.json", repeat)
    vocabulary = fit(read_vocabulary(folder, {}), 1000)
    assert (vocabulary.tokens[500], vocabulary.tokens[999]) == (twin, "[REPEAT999]")
    assert vocabulary.types[999] == TokenType.UNUSED
    assert "1 tokens repeat another's text; they are marked unused" in vocabulary.notes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["model"].update(type="Bloom"), "is a Bloom tokenizer; supported are BPE, Unigram and WordPiece"),
        (lambda t: t["model"].update(vocab=[]), "no vocabulary table"),
        (lambda t: t.pop("model"), "no vocabulary table"),
        (lambda t: t["model"]["vocab"].update(bad=-1), "id -1; it is damaged"),
        (lambda t: t["model"]["vocab"].update(bad="7"), "id '7'; it is damaged"),
        (lambda t: t["model"]["vocab"].update(bad=10**9), "ids up to 1000000000"),
        (lambda t: t["model"]["merges"].append("a"), "which is no pair"),
        (lambda t: t["model"]["merges"].append(["a", 3]), "which is no pair"),
        (lambda t: t.update(pre_tokenizer=None), "doesn't know"),
        (lambda t: t.update(pre_tokenizer="x"), "damaged"),
        (lambda t: t.update(added_tokens=[{"content": "x"}]), "id None; it is damaged"),
        (lambda t: t.update(added_tokens=["x"]), "damaged"),
    ],
)
def test_damaged_tokenizer_json(
    tiny_llama: Path, copy_of: Copy, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    folder = copy_of(tiny_llama)
    edit_json(folder / "tokenizer.json", change)
    with pytest.raises(TokenizerError, match=said):
        read_vocabulary(folder, {})


def test_no_tokenizer(tiny_llama: Path, copy_of: Copy, tmp_path: Path) -> None:
    folder = copy_of(tiny_llama)
    (folder / "tokenizer.json").unlink()
    refused(
        run("convert", folder, "-o", tmp_path / "o.gguf"),
        3,
        "no tokenizer.json, tekken.json or tokenizer.model",
        "copy the",
    )
