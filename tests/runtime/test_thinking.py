"""Thinking apart from answers: tags in pieces, tags that aren't meant, templates that drop it or open it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.chat.template import ChatTemplate
from edgellm.chat.thinking import ThinkingSplitter, opened_thinking, split_thinking

CASES = {
    "plain answer": ("", "plain answer"),
    "  led by spaces": ("", "  led by spaces"),
    "<think>why</think>because": ("why", "because"),
    "<think>\nwhy\nso\n</think>\n\nbecause\n": ("why\nso", "because\n"),
    "\n<thinking> a < b </thinking> c": ("a < b", "c"),
    "<think></think>\n\nempty": ("", "empty"),
    "<think>never ends": ("never ends", ""),
    "<think>ends in a part </thi": ("ends in a part </thi", ""),
    "<thin": ("", "<thin"),
    "<b>no</b> <think>not thinking</think>": ("", "<b>no</b> <think>not thinking</think>"),
    "<think>a</think>b <think>c</think>": ("a", "b <think>c</think>"),
    "<think>a</thinking> b</think> c": ("a</thinking> b", "c"),
    "": ("", ""),
}


@pytest.mark.parametrize("text", CASES)
def test_whole_messages(text: str) -> None:
    assert split_thinking(text) == CASES[text]


@given(st.sampled_from(list(CASES)), st.lists(st.integers(0, 4), max_size=40))
def test_pieces_of_any_size_give_the_same(text: str, sizes: list[int]) -> None:
    splitter, parts, at = ThinkingSplitter(), [], 0
    for size in sizes:
        parts += splitter.add(text[at : at + size])
        at += size
    parts += [*splitter.add(text[at:]), *splitter.flush()]
    thought = "".join(part.text for part in parts if part.is_thinking)
    assert (thought, "".join(part.text for part in parts if not part.is_thinking)) == CASES[text]


@given(st.text("<think>/ab \n", max_size=30))
def test_nothing_but_tags_and_spaces_is_lost(text: str) -> None:
    thought, answer = split_thinking(text)
    kept = "".join((thought + answer).split())
    assert kept in {"".join(text.split()), "".join(text.split()).replace("<think>", "", 1).replace("</think>", "", 1)}


def test_what_is_sure_is_shown_at_once() -> None:
    splitter = ThinkingSplitter()
    assert splitter.add("<th") == []
    assert [tuple(part) for part in splitter.add("ink>so ")] == [("so", True)]
    assert [tuple(part) for part in splitter.add("it </")] == [(" it", True)]
    assert [tuple(part) for part in splitter.add("think> is")] == [("is", False)]


@pytest.mark.parametrize(
    ("prompt", "opening"),
    [
        ("<|im_start|>assistant\n<think>\n", "<think>\n"),
        ("<|assistant|><thinking>", "<thinking>"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", ""),
        ("user: <think> what\nassistant:", ""),
        ("", ""),
    ],
)
def test_templates_that_open_the_thinking(prompt: str, opening: str) -> None:
    assert opened_thinking(prompt) == opening


REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def test_a_template_that_drops_earlier_thinking_gets_the_tags_it_looks_for() -> None:
    template = ChatTemplate(REASONING)
    content = opened_thinking(template.render([{"role": "user", "content": "2 + 2"}])) + "let me see\n</think>\n\n4"
    messages = [
        {"role": "user", "content": "2 + 2"},
        {"role": "assistant", "content": content},
        {"role": "user", "content": "and 3?"},
    ]
    rendered = template.render(messages)
    assert "let me see" not in rendered
    assert "<|im_start|>assistant\n4<|im_end|>" in rendered
