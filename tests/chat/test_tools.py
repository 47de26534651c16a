"""Tool calls: schemas of functions, the forms of families, what is read of an answer, and the loop, all scripted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import llguidance
import pytest

from edgellm.chat.template import ChatTemplate
from edgellm.chat.tool_forms import FORMATS, HeldBack, find_format, read_calls
from edgellm.chat.tool_schema import tool_schema, tool_schemas
from edgellm.chat.tools import Toolbox, check_rendered, with_arguments_read
from edgellm.config import SamplingParams
from edgellm.errors import GenerationError
from edgellm.generation import GenerationResponse, GenerationStats
from edgellm.tools import run_tools
from tests.chat.templates import BY_FORM, HERMES
from tests.chat.test_tool_schema import weather

FORM = {form.name: form for form in FORMATS}


MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "How is the weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "123456789", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rōme"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "123456789", "name": "weather", "content": "fine"},
]


@pytest.mark.parametrize("name", BY_FORM)
def test_templates_show_tools_calls_and_results(name: str) -> None:
    """The form is told from the template; the call it writes is one that is read again."""
    template = ChatTemplate(BY_FORM[name])
    form = find_format(template.source)
    assert form.name == name
    schemas = tool_schemas([weather])
    asked = template.render(MESSAGES[:1], tools=schemas)
    check_rendered(asked, template.render(MESSAGES[:1]), schemas)
    assert json.dumps("Forecast the weather of a city.") in asked
    text = template.render(with_arguments_read(MESSAGES), tools=schemas)
    assert text.index("fine") > text.index("Rōme")
    begin = text.rindex(form.begin) if form.begin else text.rindex('{"name"')
    ends = [form.end] if form.end else ["<|im_end|>", "[TOOL_RESULTS]"]
    end = next(at for mark in ends if (at := text.find(mark, begin)) > 0)
    _, (call,) = read_calls(text[begin:end] + form.end, form, schemas)
    assert call["function"] == MESSAGES[1]["tool_calls"][0]["function"]


@pytest.mark.parametrize(
    "template",
    ["{{ messages }}", "<tool_call>{{ call }}</tool_call>", '{"name": "x"}'],
)
def test_templates_without_a_form_that_is_known(template: str) -> None:
    with pytest.raises(GenerationError, match="no form of tool calls"):
        find_format(template)


def test_a_template_that_leaves_tools_out_is_refused() -> None:
    with pytest.raises(GenerationError, match="no place for tools"):
        check_rendered("How is the weather?", "How is the weather?", tool_schemas([weather]))
    with pytest.raises(GenerationError, match="no place for tools"):
        check_rendered("You have tools.", "", tool_schemas([weather]))


def tool(name: str, **properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


F = tool(
    "f",
    a={"type": "integer"},
    t={"type": "string"},
    e={"enum": ["1", "2"]},
    n={"anyOf": [{"enum": ["1", "2"]}, {"type": "null"}]},
    o={"type": "object"},
)
G = tool("g")

CALLS = [
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}', "", [("f", '{"a": 1}')]),
    (
        "hermes",
        'Look:\n<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>{"name": "g"}</tool_call>',
        "Look:\n",
        [("f", "{}"), ("g", "{}")],
    ),
    ("hermes", '<tool_call>[{"name": "f"}, {"name": "g"}]</tool_call>', "", [("f", "{}"), ("g", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
    ("hermes", "<tool_call>f(1)</tool_call> so", "<tool_call>f(1)</tool_call> so", []),
    (
        "hermes",
        '<tool_call>{"name": 1}</tool_call><tool_call>{"name": "f"}</tool_call>',
        '<tool_call>{"name": 1}</tool_call>',
        [("f", "{}")],
    ),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": "é"}, "id": "x"}]', "", [("f", '{"a": "é"}')]),
    ("mistral", 'Yes. [TOOL_CALLS] [{"name": "f"}, {"name": "g"}]', "Yes. ", [("f", "{}"), ("g", "{}")]),
    ("mistral", '[TOOL_CALLS][{"name": "f"}, 5]', '[TOOL_CALLS][{"name": "f"}, 5]', []),
    ("mistral", "[TOOL_CALLS][]", "[TOOL_CALLS][]", []),
    ("mistral-args", '[TOOL_CALLS]f[ARGS]{"a": 1}', "", [("f", '{"a": 1}')]),
    (
        "mistral-args",
        '[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{}[TOOL_CALLS]g[ARGS]{"b": [1]}',
        "",
        [("f", "{}"), ("g", '{"b": [1]}')],
    ),
    ("mistral-args", "[TOOL_CALLS]f[ARGS]{", "[TOOL_CALLS]f[ARGS]{", []),
    ("llama3", '{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    ("llama3", '\n<|python_tag|>{"name": "f", "parameters": {}}', "\n", [("f", "{}")]),
    ("llama3", '{"name": "Bob", "age": 5}', '{"name": "Bob", "age": 5}', []),
    ("llama3", '{"name": "f", "parameters": {}} and more', '{"name": "f", "parameters": {}} and more', []),
    ("llama3", '<|python_tag|>f.call(query="x")', '<|python_tag|>f.call(query="x")', []),
    ("llama3", "Just text.", "Just text.", []),
    (
        "functions",
        "I look.\n<tool_call>\n<function=f>\n<parameter=t>\n12 < 13\nand on\n</parameter>\n<parameter=a>\n12\n"
        "</parameter>\n</function>\n</tool_call>",
        "I look.\n",
        [("f", '{"t": "12 < 13\\nand on", "a": 12}')],
    ),
    (
        "functions",
        "<tool_call><function=f><parameter=e>1</parameter></function></tool_call>\n<tool_call>\n<function=g>\n</function>\n",
        "",
        [("f", '{"e": "1"}'), ("g", "{}")],
    ),
    (
        "functions",
        "<tool_call><function=f><parameter=n>2</parameter><parameter=e>2</parameter></function></tool_call>",
        "",
        [("f", '{"n": "2", "e": "2"}')],
    ),
    (
        "functions",
        "<tool_call><function=f><parameter=n>null</parameter><parameter=t>null</parameter></function></tool_call>",
        "",
        [("f", '{"n": null, "t": "null"}')],
    ),
    ("functions", "<tool_call>\nf\n</tool_call>", "<tool_call>\nf\n</tool_call>", []),
    ("functions", "<tool_call><function=f><parameter=a>x y</parameter></function>", "", [("f", '{"a": "x y"}')]),
    (
        "keys",
        "<tool_call>f\n<arg_key>t</arg_key>\n<arg_value>7</arg_value>\n<arg_key>o</arg_key>\n"
        '<arg_value>{"x": [1]}</arg_value>\n</tool_call><tool_call>g</tool_call>',
        "",
        [("f", '{"t": "7", "o": {"x": [1]}}'), ("g", "{}")],
    ),
    ("keys", "<tool_call>\n</tool_call>", "<tool_call>\n</tool_call>", []),
    ("phi", '<|tool_call|>{"name": "f", "arguments": {"a": 1}}<|/tool_call|>', "", [("f", '{"a": 1}')]),
    ("phi", '<|tool_call|>[{"name": "f"}, {"name": "g"}]<|/tool_call|>', "", [("f", "{}"), ("g", "{}")]),
    ("granite", 'So: <|tool_call|>[{"name": "f", "arguments": {"t": "x"}}]', "So: ", [("f", '{"t": "x"}')]),
    ("granite", "<|tool_call|>nothing", "<|tool_call|>nothing", []),
    (
        "keywords",
        "<|tool_call_start|>[f(a=1, t='it\\'s'), g()]<|tool_call_end|>Done.",
        "Done.",
        [("f", '{"a": 1, "t": "it\'s"}'), ("g", "{}")],
    ),
    ("keywords", '<|tool_call_start|>[f(o={"x": true, "y": null})]', "", [("f", '{"o": {"x": true, "y": null}}')]),
    ("keywords", '<|tool_call_start|>[{"name": "f", "arguments": {"a": 2}}]<|tool_call_end|>', "", [("f", '{"a": 2}')]),
    ("keywords", "<|tool_call_start|>[f(1)]<|tool_call_end|>", "<|tool_call_start|>[f(1)]<|tool_call_end|>", []),
    ("keywords", "<|tool_call_start|>[f(a=g())]", "<|tool_call_start|>[f(a=g())]", []),
    ("keywords", "<|tool_call_start|>[f(a=1", "<|tool_call_start|>[f(a=1", []),
    (
        "gemma",
        '<|tool_call>call:f{a:1,o:{x:[true,<|"|>a, b: "c"<|"|>]},t:<|"|><|"|>}<tool_call|>'
        "<|tool_call>call:g{}<tool_call|>",
        "",
        [("f", '{"a": 1, "o": {"x": [true, "a, b: \\"c\\""]}, "t": ""}'), ("g", "{}")],
    ),
    ("gemma", "<|tool_call>call:f{a:<tool_call|>", "<|tool_call>call:f{a:<tool_call|>", []),
    ("lines", "<function_calls>f(a=-1)\ng()</function_calls>", "", [("f", '{"a": -1}'), ("g", "{}")]),
    ("lines", "<function_calls></function_calls>", "<function_calls></function_calls>", []),
]


@pytest.mark.parametrize(("name", "answer", "text", "calls"), CALLS)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_taken_out_of_the_text_however_it_comes(
    name: str, answer: str, text: str, calls: list[tuple[str, str]], size: int
) -> None:
    held = HeldBack(FORM[name])
    shown = "".join(held.add(answer[i : i + size]) for i in range(0, len(answer), size))
    rest, found = read_calls(held.rest, FORM[name], [F, G])
    assert shown + rest == text
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in found] == calls
    assert all(len(call["id"]) == 9 and call["id"].isalnum() and call["type"] == "function" for call in found)
    assert len({call["id"] for call in found}) == len(found)


def test_text_before_a_call_is_shown_at_once() -> None:
    held = HeldBack(FORM["hermes"])
    assert held.add("Let me see <to") == "Let me see "
    assert held.add("ol") == ""
    assert held.add("s>, no. <tool_call>") == "<tools>, no. "
    assert held.add("{") == ""
    assert held.rest == "<tool_call>{"


def answers(*pieces: str) -> Iterator[GenerationResponse]:
    for i, piece in enumerate(pieces):
        yield GenerationResponse(piece, (i,), (False,), "stop" if i == len(pieces) - 1 else None, GenerationStats())


def toolbox(choice: str = "auto", template: str = HERMES, **ids: int) -> Toolbox:
    """ids: of markers that are tokens."""
    known = {"<tool_call>": ids.get("begin"), "[TOOL_CALLS]": ids.get("begin"), "[ARGS]": ids.get("args")}

    def tokenize(text: str) -> list[int]:
        token = known.get(text)
        return list(range(len(text))) if token is None else [token]

    return Toolbox([weather, no_arguments], choice, template, tokenize)


def no_arguments() -> str:
    """Nothing to say."""
    return "nothing"


def test_a_stream_keeps_every_token_and_its_last_response_has_the_calls() -> None:
    pieces = ["Wait", ".<tool", '_call>{"name": "weather", "arguments": {"city": "Rome"}}', "</tool_call>", ""]
    read = list(toolbox().read(answers(*pieces)))  # type: ignore[arg-type]
    assert [response.text for response in read] == ["Wait", ".", "", "", ""]
    assert [response.token_ids for response in read] == [(i,) for i in range(5)]
    assert [len(response.tool_calls) for response in read] == [0, 0, 0, 0, 1]
    assert json.loads(read[-1].tool_calls[0]["function"]["arguments"]) == {"city": "Rome"}


def test_closing_the_changed_stream_closes_the_one_below() -> None:
    below = answers("a", "b")
    stream = toolbox().read(below)  # type: ignore[arg-type]
    next(stream)
    stream.close()
    assert list(below) == []


def test_choices() -> None:
    assert toolbox().params(None).lark is None
    assert "<tool_call>" in toolbox().params(SamplingParams(shown_tokens=("x",))).shown_tokens
    assert toolbox().params(SamplingParams(shown_tokens=("x",))).shown_tokens[0] == "x"
    with pytest.raises(GenerationError, match=r"'forecast'.*auto, none, required, or one of weather, no_arguments"):
        toolbox("forecast")
    with pytest.raises(GenerationError, match="given form"):
        toolbox("required").params(SamplingParams(regex="a"))


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("hermes", r'"<tool_call>" "\n{\"name\": \"weather\", \"arguments\": " arguments_0 "}\n" "</tool_call>"'),
        ("mistral", r'"[TOOL_CALLS]" "[{\"name\": \"weather\", \"arguments\": " arguments_0 "}]"'),
        ("mistral-args", '"[TOOL_CALLS]" "weather" "[ARGS]" arguments_0'),
        ("llama3", r'"{\"name\": \"weather\", \"parameters\": " arguments_0 "}"'),
        ("phi", r'"<|tool_call|>" "{\"name\": \"weather\", \"arguments\": " arguments_0 "}" "<|/tool_call|>"'),
        ("granite", r'"<|tool_call|>" "[{\"name\": \"weather\", \"arguments\": " arguments_0 "}]"'),
    ],
)
def test_the_grammar_of_a_call(name: str, first: str) -> None:
    lines = toolbox("required", BY_FORM[name]).grammar().splitlines()
    assert lines[0] == "start: call_0 | call_1"
    assert lines[1] == f"call_0: {first}"
    assert json.loads(lines[2].removeprefix("arguments_0: %json "))["required"] == ["city"]
    named = toolbox("no_arguments", BY_FORM[name]).grammar().splitlines()
    assert (named[0], len(named)) == ("start: call_1", 3)


ARGUMENTS: list[dict[str, Any]] = [
    {"city": 'New York "City"\n<b>', "days": 3, "unit": "C", "of": "sun"},
    {"city": "Rōme"},
    {"city": "", "of": None},
]


@pytest.mark.parametrize(
    "name", ["hermes", "llama3", "mistral-args", "functions", "keys", "phi", "granite", "keywords", "lines", "gemma"]
)
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_what_a_template_writes_is_what_its_grammar_asks_for(name: str, arguments: dict[str, Any]) -> None:
    """The template's own rendering of a call, byte by byte against llguidance; and read back it is the same call."""
    form = FORM[name]
    call = {"id": "123456789", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    text = ChatTemplate(BY_FORM[name]).render(messages, tools=tool_schemas([weather]))
    written = text[text.rindex(form.begin or '{"name"') :].split("<|im_end|>")[0]
    if form.end:
        written = written[: written.index(form.end) + len(form.end)]
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, toolbox("weather", BY_FORM[name]).grammar())
    written_tokens = tokenizer.tokenize_bytes(written.encode())
    assert matcher.validate_tokens(written_tokens) == len(written_tokens), matcher.get_error()
    matcher.consume_tokens(written_tokens)
    assert matcher.is_accepting()
    _, (read,) = read_calls(written, form, tool_schemas([weather]))
    assert json.loads(read["function"]["arguments"]) == arguments


def test_markers_that_are_tokens_are_asked_for_as_tokens() -> None:
    grammar = toolbox("weather", BY_FORM["mistral-args"], begin=9, args=32).grammar()
    assert 'call_0: <[9]> "weather" <[32]> arguments_0' in grammar


class Scripted:
    """A model whose answers are written down."""

    def __init__(self, *rounds: Sequence[str]) -> None:
        self.rounds = list(rounds)
        self.asked: list[tuple[list[dict[str, Any]], str]] = []

    def chat(self, messages: Any, params: Any = None, *, tools: Any, tool_choice: str) -> Any:
        self.asked.append((list(messages), tool_choice))
        box = Toolbox(tools, tool_choice, HERMES, lambda text: [])
        return box.read(answers(*self.rounds.pop(0)))  # type: ignore[arg-type]


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def test_the_loop_calls_functions_until_an_answer_asks_for_nothing() -> None:
    model = Scripted(["Hm. ", call("weather", city="Rome", days=2) + call("no_arguments")], ["It is", " sunny."])
    heard: list[str] = []
    done = run_tools(
        model,
        [{"role": "user", "content": "Weather?"}],
        [weather, no_arguments],
        tool_choice="required",
        on_response=lambda response: heard.append(response.text),
    )
    assert (done.text, done.finished) == ("It is sunny.", True)
    assert [message["role"] for message in done.messages] == ["assistant", "tool", "tool", "assistant"]
    assert done.messages[1]["content"] == "sun in Rome for 2 days"
    assert done.messages[1]["tool_call_id"] == done.messages[0]["tool_calls"][0]["id"]
    assert done.messages[2]["content"] == "nothing"
    assert "".join(heard) == "Hm. It is sunny."
    assert [choice for _, choice in model.asked] == ["required", "auto"]
    assert model.asked[1][0] == [{"role": "user", "content": "Weather?"}, *done.messages[:3]]


def test_what_goes_wrong_in_a_tool_is_told_to_the_model() -> None:
    def divide(a: float, b: float) -> float:
        return a / b

    model = Scripted([call("divide", a=1, b=0) + call("divide", a=1) + call("fly") + call("divide", a=1, b=4)], ["So."])
    done = run_tools(model, [{"role": "user", "content": "x"}], [divide])
    results = [message["content"] for message in done.messages if message["role"] == "tool"]
    assert results[0].startswith("error: ZeroDivisionError: ")
    assert "TypeError: missing a required argument: 'b'" in results[1]
    assert results[2] == "error: there is no tool 'fly'; there are divide"
    assert results[3] == "0.25"


def test_a_model_that_never_ends_is_stopped() -> None:
    model = Scripted(*[[call("no_arguments")]] * 5)
    done = run_tools(model, [{"role": "user", "content": "x"}], [no_arguments], max_rounds=3)
    assert not done.finished
    assert len(model.asked) == 3
    assert [message["role"] for message in done.messages] == ["assistant", "tool"] * 3


def test_the_loop_takes_functions_only() -> None:
    with pytest.raises(GenerationError, match="run_tools takes functions"):
        run_tools(Scripted([""]), [], [tool_schema(weather)])  # type: ignore[list-item]
