"""Chat templates: the Jinja source a GGUF carries, rendered in a sandbox the way transformers renders it.

The source comes from whoever made the file, so it runs in Jinja's immutable sandbox: no attribute access to
Python's insides, no changing of values, ranges capped at 100,000. A template that loops for ever on purpose is
not stopped.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgellm.chat.channels import find_channels, without_thinking
from edgellm.errors import GenerationError
from edgellm.text import ControlMarker

if TYPE_CHECKING:
    from edgellm.chat.tool_schema import Tool

Message = Mapping[str, Any]


class ChatTemplate:
    """A compiled template. GenerationError if the source isn't valid Jinja."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = _environment().from_string(source)
        except (TemplateError, RecursionError, ValueError) as exc:
            raise GenerationError(f"the model's chat template can't be read: {exc}; use raw prompts instead") from exc

    def render(self, messages: Sequence[Message], *, tools: Sequence[Message] = (), answer_follows: bool = True) -> str:
        """The prompt text for `messages`, ending where the assistant's answer begins, or where the last one ends."""
        variables = {"messages": messages, "add_generation_prompt": answer_follows, "tools": tools or None}
        try:
            return self._template.render(**variables, documents=None, **self._tokens)
        except Exception as exc:  # a template can fail with anything: a TypeError inside it is its own bug
            raise GenerationError(f"the model's chat template refused these messages: {_one_line(exc)}") from exc


def prompt_of(
    template: ChatTemplate, marker: ControlMarker, messages: Sequence[Message], tools: Sequence[Tool], answer: bool
) -> tuple[str, str]:
    """The prompt's text and the mark within what must not become a control token, as `ControlMarker.encode` takes it.

    GenerationError: bad messages or tools, or a template that refuses them or has no place for tools.
    """
    checked = check_messages(messages)
    if find_channels(template.source) is not None:
        checked = without_thinking(checked)
    if not tools and not any("tool_calls" in message for message in checked):
        marked, mark = marker.mark(checked, template.source)
        return template.render(marked, answer_follows=answer), mark
    from edgellm.chat.tool_schema import tool_schemas
    from edgellm.chat.tools import check_rendered, with_arguments_read

    schemas = tool_schemas(tools)
    (marked, marked_tools), mark = marker.mark((with_arguments_read(checked), schemas), template.source)
    prompt = template.render(marked, tools=marked_tools, answer_follows=answer)
    if schemas:
        check_rendered(prompt, template.render(marked, answer_follows=answer), schemas)
    return prompt, mark


def find_template(metadata: Mapping[str, Any]) -> str:
    """The chat template in a GGUF's metadata. GenerationError if there is none: a base model can't chat."""
    source = metadata.get("tokenizer.chat_template")
    if not isinstance(source, str) or not source.strip():
        raise GenerationError(
            "this model carries no chat template, so it is likely a base model and can't chat; "
            "use `edgellm run --raw` or model.complete(), or convert it with a template"
        )
    return source


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """OpenAI-shaped messages as the templates expect them, text parts joined. GenerationError says which is wrong."""
    if isinstance(messages, str) or not messages:
        raise GenerationError('messages must be a non-empty list such as [{"role": "user", "content": "Hello"}]')
    return [_check_message(i, message) for i, message in enumerate(messages)]


def _check_message(i: int, message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise GenerationError(f"message {i} is {type(message).__name__}, not a dict with role and content")
    role = message.get("role")
    # some templates build a control token around the role: it must not bring parts of one
    if not isinstance(role, str) or not role.replace("_", "").replace("-", "").isalnum():
        raise GenerationError(f"message {i} has the role {role!r}; use system, user, assistant or tool")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    elif isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_text_part(i, part) for part in content)
    elif not isinstance(content, str):
        raise GenerationError(f"message {i} ({role}) has no text in its content")
    return {**message, "content": content}


def _text_part(i: int, part: Any) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise GenerationError(f"message {i} has a part of type {kind!r}; only text parts can be used")
    return str(part["text"])


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's part for training; for us it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it without ClassVar

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, LoopControls]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _one_line(exc: Exception) -> str:
    return " ".join(str(exc).split()) or type(exc).__name__
