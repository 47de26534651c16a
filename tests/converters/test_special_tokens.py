"""Special tokens and chat templates from every file transformers keeps them in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converters import convert, to_checkpoint
from converters.tokenizers.read import read_vocabulary
from tests.converters import reference, tiny

Copy = Callable[[Path], Path]
BOS, START, END = 0, 1, 2  # of the tiny tokenizer


@pytest.fixture
def folder(tiny_llama: Path, copy_of: Copy) -> Path:
    """A checkpoint without any of the small JSON files beside tokenizer.json."""
    folder = copy_of(tiny_llama)
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
    return folder


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def special(folder: Path, **config: Any) -> dict[str, int]:
    return dict(read_vocabulary(folder, config).special)


def test_ids_of_the_config(folder: Path) -> None:
    assert special(folder) == {}
    assert special(folder, bos_token_id=0, eos_token_id=2, pad_token_id=1) == {"bos": 0, "eos": 2, "pad": 1}
    assert special(folder, bos_token_id=None, eos_token_id=-1, pad_token_id=5000) == {}


def test_texts_of_the_tokenizer_come_before_ids_of_the_config(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>"})
    assert special(folder, bos_token_id=0, eos_token_id=0) == {"bos": START, "eos": END, "eot": 0}
    write(folder, "special_tokens_map.json", {"unk_token": "<|endoftext|>", "bos_token": "<|endoftext|>"})
    assert special(folder) == {"bos": START, "eos": END, "unk": BOS}


def test_several_ends(folder: Path) -> None:
    """Llama 3.1's three: eos by name, eom by its text, eot what is left."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 1000, "content": "<|eom_id|>"})
    write(folder, "tokenizer.json", tokenizer)
    write(folder, "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    write(folder, "generation_config.json", {"eos_token_id": [BOS, 1000, END]})
    assert special(folder, eos_token_id=END) == {"eos": END, "eom": 1000, "eot": BOS}
    write(folder, "generation_config.json", {"eos_token_id": [END]})
    assert special(folder) == {"eos": END}


def test_list_of_ends_reaches_llama_cpp_and_comes_back(folder: Path, tmp_path: Path) -> None:
    write(folder, "tokenizer_config.json", {"eos_token": "<|im_end|>", "chat_template": tiny.CHATML})
    write(folder, "generation_config.json", {"eos_token_id": [END, BOS]})
    convert(folder, tmp_path / "out.gguf", quant="Q8_0")
    metadata = reference.metadata(tmp_path / "out.gguf")
    assert (metadata["tokenizer.ggml.eos_token_id"], metadata["tokenizer.ggml.eot_token_id"]) == (END, BOS)
    from llama_cpp import llama_cpp as api

    with reference.vocabulary(tmp_path / "out.gguf") as vocab:
        assert {i for i in range(1000) if api.llama_vocab_is_eog(vocab, i)} >= {END, BOS}
    to_checkpoint(tmp_path / "out.gguf", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"] == [END, BOS]
    assert json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"


@pytest.mark.parametrize(
    ("config", "post_processor", "expected"),
    [
        ({}, None, (False, False)),
        ({"add_bos_token": True}, None, (True, False)),
        ({"add_bos_token": True, "add_eos_token": True}, None, (True, True)),
        ({"add_bos_token": False}, ["<|endoftext|>", "A"], (True, False)),
        ({}, ["<|endoftext|>", "A", "<|im_end|>"], (True, True)),
        ({"add_bos_token": True}, ["A", "<|im_end|>"], (False, True)),
    ],
)
def test_what_encoding_adds(
    folder: Path, config: dict[str, Any], post_processor: list[str] | None, expected: tuple[bool, bool]
) -> None:
    """The post-processor decides where there is one."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    if post_processor:
        single = [
            {"Sequence": {"id": "A", "type_id": 0}} if p == "A" else {"SpecialToken": {"id": p, "type_id": 0}}
            for p in post_processor
        ]
        template = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
        byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
        tokenizer["post_processor"] = {"type": "Sequence", "processors": [byte_level, template]}
    write(folder, "tokenizer.json", tokenizer)
    write(folder, "tokenizer_config.json", {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", **config})
    vocabulary = read_vocabulary(folder, {})
    assert (vocabulary.add_bos, vocabulary.add_eos) == expected


def test_templates_of_every_place(folder: Path) -> None:
    assert read_vocabulary(folder, {}).templates == {}
    write(folder, "chat_template.json", {"chat_template": "older"})
    assert read_vocabulary(folder, {}).templates == {"default": "older"}
    write(folder, "tokenizer_config.json", {"chat_template": "string"})
    assert read_vocabulary(folder, {}).templates == {"default": "string"}
    entries = [{"name": "default", "template": "listed"}, {"name": "rag", "template": "R"}, {"name": "broken"}, 5]
    write(folder, "tokenizer_config.json", {"chat_template": entries})
    assert read_vocabulary(folder, {}).templates == {"default": "listed", "rag": "R"}
    (folder / "chat_template.jinja").write_text("jinja\n{{ 'ü' }}", encoding="utf-8")
    assert read_vocabulary(folder, {}).templates == {"default": "jinja\n{{ 'ü' }}", "rag": "R"}
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    expected = {"default": "jinja\n{{ 'ü' }}", "rag": "R", "tool_use": "T"}
    assert read_vocabulary(folder, {}).templates == expected


def test_templates_go_there_and_back(folder: Path, tmp_path: Path) -> None:
    text = tiny.CHATML + "\n{# kept to the last space #}  \n"
    (folder / "chat_template.jinja").write_bytes(text.encode())
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    receipt = convert(folder, tmp_path / "out.gguf", quant="Q8_0")
    assert not any("chat template" in note for note in receipt.notes)
    metadata = reference.metadata(tmp_path / "out.gguf")
    assert metadata["tokenizer.chat_template"] == text
    assert metadata["tokenizer.chat_template.tool_use"] == "T"
    assert metadata["tokenizer.chat_templates"] == ["tool_use"]
    back = to_checkpoint(tmp_path / "out.gguf", tmp_path / "back")
    assert (back / "chat_template.jinja").read_bytes() == text.encode()
    assert (back / "additional_chat_templates" / "tool_use.jinja").read_text() == "T"


def test_missing_template_is_noted(folder: Path, tmp_path: Path) -> None:
    receipt = convert(folder, tmp_path / "out.gguf", quant="Q8_0")
    assert any("no chat template" in note for note in receipt.notes)


def test_template_that_transformers_renders(folder: Path, tmp_path: Path) -> None:
    """The exported folder's template gives transformers the prompt the checkpoint's own gives."""
    from transformers import AutoTokenizer

    tiny.add_tokenizer(folder)
    convert(folder, tmp_path / "out.gguf", quant="Q8_0")
    back = to_checkpoint(tmp_path / "out.gguf", tmp_path / "back")
    chat = [{"role": "user", "content": "Hi 123"}, {"role": "assistant", "content": "Yes"}]
    ours, theirs = (
        AutoTokenizer.from_pretrained(f).apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        for f in (back, folder)
    )
    assert ours == theirs
    assert ours[0] == START
