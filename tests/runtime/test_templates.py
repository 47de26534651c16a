"""No text of a message becomes a control token, in the formats of many families: users', files', tools', answers'."""

from __future__ import annotations

from typing import Any

import pytest

from edgellm import Model
from edgellm.chat.template import ChatTemplate
from edgellm.text import ControlMarker
from tests.converters import tiny
from tests.runtime.test_text import CHATML, GEMMA, LLAMA3, TOOLS, CharVocab

SYSTEM_FIRST = "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}{% endif %}"

# each format as its family documents it, written for these tests: template, its control tokens
FORMATS: dict[str, tuple[str, tuple[str, ...]]] = {
    "chatml": (CHATML, ("<|im_start|>", "<|im_end|>")),
    "chatml of the tiny models": (tiny.CHATML, ("<|im_start|>", "<|im_end|>", "<|endoftext|>")),
    "llama 3": (LLAMA3, ("<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "gemma-like": (GEMMA, ("<s>", "<start>", "<end>")),
    "tools as json": (TOOLS, ("<|im_start|>", "<|im_end|>")),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ {'content': m.content} | tojson }}[/TOOL_RESULTS]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]"),
    ),
    "llama 2": (
        SYSTEM_FIRST + "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}{{ bos_token }}[INST] "
        "{% if loop.first and system is defined %}<<SYS>>\n{{ system }}<</SYS>>\n\n{% endif %}"
        "{{ m.content.strip() }} [/INST]{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>"),
    ),
    "phi": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}<|assistant|>\n",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>", "<|endoftext|>"),
    ),
    "deepseek": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
        "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}<｜Assistant｜><think>\n",
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    ),
    "harmony": (
        "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}<|start|>assistant",
        ("<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|return|>", "<|call|>"),
    ),
    "command": (
        "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>"
        "{{ {'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}.get(m.role, '<|SYSTEM_TOKEN|>') }}"
        "{{ m.content | trim }}<|END_OF_TURN_TOKEN|>{% endfor %}",
        ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
         "<|SYSTEM_TOKEN|>"),
    ),
    "granite": (
        "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n"
        "{% endfor %}",
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
    ),
}  # fmt: skip
BOS = {"gemma": "<bos>", "deepseek": "<｜begin▁of▁sentence｜>", "command": "<BOS_TOKEN>"}
EVERY_CONTROL = sorted({name for _, names in FORMATS.values() for name in names})
HOSTILE = [
    *EVERY_CONTROL,
    "".join(EVERY_CONTROL),
    *(f"x{name}{name[1:]}" for name in EVERY_CONTROL),
    *(name[:-1] for name in EVERY_CONTROL),
    *(name[1:] for name in EVERY_CONTROL),
]


class Vocab(CharVocab):
    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        super().__init__()


def encode(name: str, contents: tuple[str, str, str, str]) -> tuple[list[int], str]:
    """The control tokens of system, user, tool and assistant messages of these contents; and all other text."""
    source, names = FORMATS[name]
    marker = ControlMarker(Vocab(names))
    roles = ("system", "user", "tool", "assistant")
    messages: list[dict[str, Any]] = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    marked, mark = marker.mark([*messages, {"role": "user", "content": "x"}], source)
    bos, eos = BOS.get(name, "<s>"), "</s>" if "</s>" in names else "<|endoftext|>"
    ids = marker.encode(ChatTemplate(source, bos_token=bos, eos_token=eos).render(marked), mark)
    return [token for token in ids if token < 0], "".join(chr(token) for token in ids if token >= 0)


@pytest.mark.parametrize("name", FORMATS)
def test_text_of_any_message_stays_text(name: str) -> None:
    harmless, _ = encode(name, ("x", "x", "x", "x"))
    assert harmless
    for text in HOSTILE:
        file = f"notes.txt:\n\n{text} and more\n\nWhat does it say?"  # as /read puts it before a message
        for contents in ((text,) * 4, ("x", file, "x", "x"), ("x", "x", text, "x"), ("x", "x", "x", text)):
            controls, plain = encode(name, contents)
            assert controls == harmless, text
            assert not set(map(chr, range(0xFDD0, 0xFDF0))) & set(plain), text


@pytest.mark.parametrize("name", FORMATS)
def test_the_text_itself_is_not_changed(name: str) -> None:
    for control in EVERY_CONTROL:
        _, plain = encode(name, ("x", f"what is {control} for", "x", "x"))
        assert f"what is {control} for" in plain


@pytest.mark.parametrize("text", EVERY_CONTROL)
def test_on_models_with_templates_of_their_own(model: Model, tiny_chat: Model, text: str) -> None:
    for loaded in (model, tiny_chat):
        ends = [loaded.tokenize(name, special=True)[0] for name in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")]

        def controls(content: str, loaded: Model = loaded, ends: list[int] = ends) -> list[int]:
            roles = ("system", "user", "assistant", "user")
            return [i for i in loaded.chat_tokens([{"role": r, "content": content} for r in roles]) if i in ends]

        assert controls(f"notes.txt:\n\n{text}\n\nwhat is {text}?") == controls("x")
        assert text in loaded.detokenize(loaded.chat_tokens([{"role": "user", "content": text}]))
