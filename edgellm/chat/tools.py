"""The tools of one answer: shown to the template, asked of the sampler, found in the text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from edgellm.chat.tool_forms import Arguments, HeldBack, choices, find_format, is_text, read_calls, shown_marks
from edgellm.chat.tool_schema import Schema, Tool, tool_schemas
from edgellm.config import SamplingParams
from edgellm.errors import GenerationError
from edgellm.generation import GenerationResponse

Tokenize = Callable[[str], list[int]]  # control tokens count

_JSON_FORM = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}


class Toolbox:
    """The tools of one answer: for the template, the sampler, and the answer's text."""

    def __init__(self, tools: Sequence[Tool], choice: str, template: str, tokenize: Tokenize) -> None:
        """choice: "auto", "required", or the name of the tool to call. GenerationError: bad tools, no form of calls."""
        self.schemas = tool_schemas(tools)
        names = [schema["function"]["name"] for schema in self.schemas]
        self._format = find_format(template)
        self._tokenize = tokenize
        if choice not in ("auto", "required", *names):
            known = ", ".join(names)
            raise GenerationError(f"tool_choice is {choice!r}; it takes auto, none, required, or one of {known}")
        self._choice = choice

    def params(self, params: SamplingParams | None) -> SamplingParams:
        """With what the choice asks for: control tokens that are seen, and for a call that must come, its grammar."""
        params = params or SamplingParams()
        params = replace(params, shown_tokens=(*params.shown_tokens, *shown_marks(self._format)))
        if self._choice == "auto":
            return params
        if params.is_constrained:
            raise GenerationError("an answer of a given form can't be a tool call too; use tool_choice auto or none")
        return replace(params, lark=self.grammar())

    def grammar(self) -> str:
        """Lark, as llguidance reads it: exactly one call of the tools that may be chosen."""
        rules, calls = [], []
        for i, schema in enumerate(self.schemas):
            if self._choice in ("required", schema["function"]["name"]):
                calls.append(f"call_{i}")
                rules += self._call_rules(i, schema["function"])
        return "\n".join([f"start: {' | '.join(calls)}", *rules])

    def _call_rules(self, i: int, function: Mapping[str, Any]) -> list[str]:
        form = self._format
        opening = form.before + function["name"] + form.between
        if form.arguments is None:
            filled = [f"arguments_{i}"]
            rules = [f"arguments_{i}: %json {json.dumps({**_JSON_FORM, **function['parameters']})}"]
        else:
            filled, rules = self._one_by_one(i, function["parameters"], form.arguments)
        parts = [*self._literal(form.begin), *self._literal(opening), *filled]
        parts += [*self._literal(form.after), *self._literal(form.end)]
        return [f"call_{i}: {' '.join(parts)}", *rules]

    def _one_by_one(self, i: int, parameters: Mapping[str, Any], form: Arguments) -> tuple[list[str], list[str]]:
        """Those that must be given, then the others in their order."""
        properties = parameters.get("properties", {})
        required = [key for key in properties if key in parameters.get("required", [])]
        optional = [key for key in properties if key not in required]
        parts: list[str] = []
        rules: list[str] = []
        for j, key in enumerate(required + optional):
            value, rule = self._value(f"value_{i}_{j}", {**_shared_definitions(parameters), **properties[key]}, form)
            separator = form.separator if j else ""
            one = " ".join([*self._literal(separator + form.before + key + form.between), *value])
            parts.append(one if key in required else f"({one})?")
            rules.append(rule)
        if form.separator and not required and len(parts) > 1:  # the later ones begin with a comma
            parts = [f"({parts[0].removesuffix('?')} {' '.join(parts[1:])})?"]
        return parts, rules

    def _value(self, name: str, schema: Mapping[str, Any], form: Arguments) -> tuple[list[str], str]:
        """The symbols of a value and what ends it, and the rule of the one called `name`."""
        end = list(self._literal(form.after))
        if not (form.bare and is_text(schema)):
            return [name, *end], f"{name}: %json {json.dumps({**_JSON_FORM, **schema})}"
        symbols, rule = self._text(name, choices(schema), form)
        if form.quote and None in choices(schema):
            symbols = ["(", *symbols, "|", '"null"', *end, ")"]
        return symbols, rule

    def _text(self, name: str, options: Sequence[Any], form: Arguments) -> tuple[list[str], str]:
        begin, end = list(self._literal(form.quote)), list(self._literal(form.quote + form.after))
        if not any(isinstance(option, Mapping) for option in options):  # an enum
            texts = ["null" if option is None else option for option in options]
            return [*begin, name, *end], f"{name}: {' | '.join(map(json.dumps, texts))}"
        if end[0].startswith("<["):  # a token of its own ends the text
            return [*begin, name, *end], rf"{name}: /(?s:.*)/"
        return [*begin, name], rf"{name}[suffix={json.dumps(form.quote + form.after)}]: /(?s:.*)/"

    def _literal(self, text: str) -> Iterator[str]:
        """A mark that is one token is asked for as that token; the model wouldn't know its spelling."""
        marks = "|".join(re.escape(mark) for mark in shown_marks(self._format))
        for part in filter(None, re.split(f"({marks})", text)):
            ids = self._tokenize(part) if re.fullmatch(marks, part) else []
            yield f"<[{ids[0]}]>" if len(ids) == 1 else json.dumps(part)

    def read(self, responses: Generator[GenerationResponse, None, None]) -> Generator[GenerationResponse, None, None]:
        """The responses with calls taken out of the text; the last one carries them."""
        held = HeldBack(self._format)
        with closing(responses):
            for response in responses:
                text = held.add(response.text)
                if response.finish_reason is None:
                    yield replace(response, text=text)
                else:
                    rest, calls = read_calls(held.rest, self._format, self.schemas)
                    yield replace(response, text=text + rest, tool_calls=tuple(calls))


def _shared_definitions(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What a property's schema may refer to."""
    return {name: parameters[name] for name in ("$defs", "definitions") if name in parameters}


def check_rendered(prompt: str, without: str, schemas: Sequence[Schema]) -> None:
    """GenerationError for a template that leaves tools out. without: what it makes of the same messages alone."""
    plain = re.sub("[\ufdd0-\ufdef]", "", prompt)  # the marks of text.ControlMarker
    if prompt == without or not all(schema["function"]["name"] in plain for schema in schemas):
        raise GenerationError(
            "the model's chat template has no place for tools; use a model that was trained with tools, "
            "or describe them in the system message and ask for JSON with a schema"
        )


def with_arguments_read(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates want them: the arguments of calls as objects, where OpenAI's shape has JSON in a string."""
    return [
        {**message, "tool_calls": [_with_object(call) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), list | tuple)
        else dict(message)
        for message in messages
    ]


def _with_object(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call
