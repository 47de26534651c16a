"""Answers of Harmony, Gemma 4 and Magistral in pieces of every size, and what templates get of earlier answers."""

from __future__ import annotations

import json
from collections.abc import Iterator

import llguidance
import pytest

from edgellm.chat.answers import AnswerForm, read_whole
from edgellm.chat.channels import KNOWN, Translation, find_channels
from edgellm.chat.template import ChatTemplate, prompt_of
from edgellm.config import SamplingParams
from edgellm.generation import GenerationResponse, GenerationStats
from edgellm.text import ControlMarker
from tests.chat.test_tools import weather

HARMONY = r"""
{%- if tools %}{{- '<|start|>developer<|message|>' + (tools | tojson) + '<|end|>' }}{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' and '<|channel|>' in m.content %}{{- raise_exception('channels') }}{%- endif %}
    {%- if m.thinking %}
        {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
    {%- endif %}
    {%- for call in m.tool_calls or [] %}
        {{- '<|start|>assistant to=functions.' + call.function.name + '<|channel|>commentary json<|message|>' }}
        {{- (call.function.arguments | tojson) + '<|call|>' }}
    {%- endfor %}
    {%- if not m.tool_calls %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}
""".strip()
GEMMA = "{{ '<|channel>' }}"
MAGISTRAL = "{{ '[THINK]' }}"

ANSWERS = [
    (
        HARMONY,
        "<|channel|>analysis<|message|>Two < three.<|end|><|start|>assistant<|channel|>final<|message|>Yes <|x|>.",
        "<think>Two < three.</think>Yes <|x|>.",
    ),
    (HARMONY, "<|channel|>final<|message|>Yes.", "Yes."),
    (HARMONY, "<|channel|>analysis<|message|>cut off", "<think>cut off"),
    (HARMONY, "<|channel|>commentary<|message|>I'll look.<|end|><|start|>assistant", "I'll look."),
    (GEMMA, "<|channel>thought\nHm.\n<channel|>Yes.", "<think>Hm.\n</think>Yes."),
    (GEMMA, "Yes. <|channel", "Yes. <|channel"),
    (MAGISTRAL, "[THINK]Hm.[/THINK]Yes [1].", "<think>Hm.</think>Yes [1]."),
    (MAGISTRAL, "[/THINK]Yes.", "Yes."),
    ("<think>", "<|channel|>final", "<|channel|>final"),
]


@pytest.mark.parametrize(("template", "answer", "expected"), ANSWERS)
def test_answers_come_in_the_common_form(template: str, answer: str, expected: str) -> None:
    assert read_whole(answer, template) == expected
    channels = find_channels(template)
    for size in (1, 2, 5):
        if channels is not None:
            translation = Translation(channels)
            pieces = [translation.add(answer[i : i + size]) for i in range(0, len(answer), size)]
            assert "".join(pieces) + translation.flush() == expected


def test_thinking_is_shown_as_it_comes() -> None:
    translation = Translation(KNOWN[0])
    assert translation.add("<|channel|>analysis<|message|>Let me") == "<think>Let me"
    assert translation.add(" see <") == " see "
    assert translation.add("b") == "<b"


def responses(*pieces: str) -> Iterator[GenerationResponse]:
    for i, piece in enumerate(pieces):
        yield GenerationResponse(piece, (i,), (False,), "stop" if i == len(pieces) - 1 else None, GenerationStats())


@pytest.mark.parametrize(
    "call",
    [
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}',
        '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Rome"}',
    ],
)
def test_a_call_after_thinking(call: str) -> None:
    form = AnswerForm(HARMONY, [weather], "auto", lambda text: [])
    pieces = ["<|channel|>analysis<|message|>Hm.<|end|>", "<|start|>assistant", *call.partition("func"), ""]
    read = list(form.read(responses(*pieces)))  # type: ignore[arg-type]
    assert "".join(response.text for response in read) == "<think>Hm.</think>"
    assert [len(response.tool_calls) for response in read] == [0] * (len(pieces) - 1) + [1]
    assert json.loads(read[-1].tool_calls[0]["function"]["arguments"]) == {"city": "Rome"}


def test_a_call_that_must_come_is_written_as_the_template_writes_it() -> None:
    tokenizer = llguidance.LLTokenizer("byte")
    params = AnswerForm(HARMONY, [weather], "required", lambda text: []).params(None)
    assert params is not None
    assert params.lark is not None
    matcher = llguidance.LLMatcher(tokenizer, params.lark)
    call = ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}'
    assert matcher.consume_tokens(tokenizer.tokenize_bytes(call.encode()))
    assert matcher.is_accepting()


def test_the_marks_are_seen_and_only_where_they_are_needed() -> None:
    params = AnswerForm(HARMONY, (), "auto", lambda text: []).params(SamplingParams(shown_tokens=("<|end|>", "x")))
    assert params is not None
    assert params.shown_tokens == ("<|end|>", "x", "<|channel|>", "<|message|>", "<|start|>")
    assert AnswerForm("<think>", (), "auto", lambda text: []).params(None) is None


class Words:
    """A vocabulary with a few control tokens."""

    bos, adds_bos = 0, False
    control_tokens = {"<|channel|>": (False, False), "<|end|>": (False, False)}  # noqa: RUF012

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        return list(text.encode())

    def text(self, token: int) -> str:
        return ""


def test_earlier_answers_are_given_with_their_thinking_apart() -> None:
    template = ChatTemplate(HARMONY)
    call = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "user", "content": "<think>a</think>"},
        {"role": "assistant", "content": "<think>Hm.</think>Yes."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "<think>So.</think>", "tool_calls": [call]},
    ]
    prompt, _ = prompt_of(template, ControlMarker(Words()), messages, (), False)
    assert prompt == (
        "<|start|>user<|message|><think>a</think><|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|message|>Yes.<|end|>"
        "<|start|>user<|message|>And?<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>So.<|end|>"
        '<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>'
    )
    assert messages[1]["content"] == "<think>Hm.</think>Yes."
