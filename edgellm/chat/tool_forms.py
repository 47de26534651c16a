"""The forms in which families of models write tool calls, and how each is read.

The form is told from the chat template's text, as it is the template that shows it to the model. A call that can't be
read stays text: nothing of an answer is lost.
"""

from __future__ import annotations

import ast
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgellm.chat.tool_schema import Schema
from edgellm.errors import GenerationError
from edgellm.text import overlap

Call = dict[str, Any]
Named = Mapping[str, Mapping[str, Any]]  # name of a tool → its schema's "function"


@dataclass(frozen=True)
class ToolFormat:
    """How a family writes a call. sign: a regular expression for its template's text.

    begin, end: around every call, or list of calls; without an end a call goes on to the answer's, and without a
    beginning the answer is the call's JSON and nothing else. read: the calls between them as {"name", "arguments"};
    None for what can't be read. before, between, after: around name and arguments of a call that is asked for.
    marks: what may be tokens of their own within a call.
    """

    name: str
    sign: str
    begin: str
    end: str
    read: Callable[[str, Named], list[Any]]
    before: str
    between: str
    after: str
    arguments: Arguments | None = None  # where they aren't one JSON object
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arguments:
    """Arguments one by one: before + key + between + value + after. Texts stand as they are, between `quote`, where
    `bare`, otherwise as JSON.
    """

    before: str
    between: str
    after: str
    separator: str = ""
    bare: bool = True
    quote: str = ""


def read_json(content: str, _tools: Named) -> list[Any]:
    """{"name": …, "arguments": {…}} or a list of such."""
    found = _json(content)
    return found if isinstance(found, list) and found else [found]


def read_named(content: str, tools: Named) -> list[Any]:
    """Mistral's: name[ARGS]{…}, with a number of the call perhaps; or the older list."""
    named = _NEWER_MISTRAL.match(content)
    if named:
        return [{"name": named[1], "arguments": _json(content[named.end() :])}]
    found = _json(content)
    return found if isinstance(found, list) and found else [None]


def read_harmony(content: str, _tools: Named) -> list[Any]:
    """gpt-oss's: name<|channel|>commentary json<|message|>{…}, or the channel before the name."""
    found = re.match(
        r"(?s)\s*([\w.-]+)(?:<\|channel\|>commentary)?\s*(?:<\|constrain\|>)?\w*<\|message\|>(.*)", content
    )
    return [found and {"name": found[1], "arguments": _json(found[2])}]


def read_gemma(content: str, _tools: Named) -> list[Any]:
    """Gemma 4's: call:name{key:<|"|>text<|"|>,other:1}."""
    found = re.fullmatch(r"(?s)\s*call:([\w.-]+)(\{.*\})\s*", content)
    if found is None:
        return [None]
    parts = found[2].split(_GEMMA_QUOTE)  # every second one is a text
    bare = [re.sub(r"([{,]\s*)([A-Za-z_][\w-]*)\s*:", r'\1"\2":', part) for part in parts]
    texts = [json.dumps(part) if i % 2 else bare[i] for i, part in enumerate(parts)]
    return [{"name": found[1], "arguments": _json("".join(texts))}]


def read_functions(content: str, tools: Named) -> list[Any]:
    """Qwen3-Coder's and Qwen3.5's: <function=name><parameter=key>value</parameter></function>."""
    found = re.fullmatch(r"(?s)\s*<function=([^>\n]+)>(.*?)(?:</function>)?\s*", content)
    if found is None:
        return [None]
    keys = re.findall(r"(?s)<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", found[2])
    return [_typed(found[1].strip(), keys, tools)]


def read_keys(content: str, tools: Named) -> list[Any]:
    """GLM's: name<arg_key>key</arg_key><arg_value>value</arg_value>."""
    name, _, rest = content.partition("<arg_key>")
    keys = re.findall(r"(?s)<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", "<arg_key>" + rest)
    return [_typed(name.strip(), [(key.strip(), value) for key, value in keys], tools) if name.strip() else None]


def read_python(content: str, _tools: Named) -> list[Any]:
    """LFM2's and OLMo 3's: calls with keywords as Python writes them, as a list or one a line; or JSON."""
    try:
        statements = ast.parse(content.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return read_json(content, _tools)
    calls: list[ast.AST] = []
    for statement in statements:
        value = statement.value if isinstance(statement, ast.Expr) else statement
        calls += value.elts if isinstance(value, ast.List) else [value]
    read = [_python_call(call) for call in calls]
    return read if any(read) else read_json(content, _tools)


def _python_call(call: ast.AST) -> Any:
    if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
        return None
    try:
        arguments = {keyword.arg: _python_value(keyword.value) for keyword in call.keywords}
        return {"name": ast.unparse(call.func), "arguments": arguments}
    except (ValueError, TypeError, RecursionError, MemoryError):
        return None


def _python_value(value: ast.expr) -> Any:
    """A literal, with JSON's names for three of them."""
    named = {"true": True, "false": False, "null": None}

    class Names(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            return ast.Constant(named[node.id]) if node.id in named else node

    found = ast.literal_eval(Names().visit(value))
    json.dumps(found)  # sets, bytes and complex numbers are no arguments
    return found


def _typed(name: str, keys: Sequence[tuple[str, str]], tools: Named) -> dict[str, Any]:
    """Values that stand as plain text: what the tool's schema calls a text stays one, anything else is read as JSON."""
    properties = tools.get(name, {}).get("parameters", {}).get("properties", {})
    return {"name": name, "arguments": {key: _value(text, properties.get(key)) for key, text in keys}}


def _value(text: str, schema: Any) -> Any:
    options = choices(schema)
    if text.strip() == "null" and (None in options or not is_text(schema)):
        return None
    read = None if is_text(schema) else _json(text.strip())
    return text if read is None else read


def is_text(schema: Any) -> bool:
    """Whether a schema takes nothing but text, and null perhaps."""
    options = [option for option in choices(schema) if option is not None]
    return bool(options) and all(
        isinstance(option, str) or (isinstance(option, Mapping) and option.get("type") == "string")
        for option in options
    )


def choices(schema: Any) -> list[Any]:
    """What a schema takes: the values of its enum, None for null, or a schema."""
    if not isinstance(schema, Mapping):
        return []
    if isinstance(schema.get("anyOf"), list):
        return [found for option in schema["anyOf"] for found in choices(option)]
    if isinstance(schema.get("enum"), list):
        return list(schema["enum"])
    if "const" in schema:
        return [schema["const"]]
    return [None if schema.get("type") == "null" else schema]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


_GEMMA_QUOTE = '<|"|>'
_NEWER_MISTRAL = re.compile(r"\s*([A-Za-z0-9_-]+)(?:\[CALL_ID\][A-Za-z0-9]+)?\[ARGS\]")
_PYTHON_TAG = "<|python_tag|>"  # Llama 3 writes it before some calls
_GLM_MARKS = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
_XML = Arguments("<parameter=", ">\n", "\n</parameter>\n")
_KEYS = Arguments("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n")
_KEYWORDS = Arguments("", "=", "", separator=", ", bare=False)
_GEMMA = Arguments("", ":", "", separator=",", quote=_GEMMA_QUOTE)
_NAME, _ARGUMENTS = '{"name": "', '", "arguments": '
_TAGS = "<tool_call>", "</tool_call>"
_LFM_TAGS = "<|tool_call_start|>", "<|tool_call_end|>"
_OLMO_TAGS = "<function_calls>", "</function_calls>"
_CALLS = "[TOOL_CALLS]"

# The first whose sign is in the template. Hermes' is also Qwen's, Granite 4's and others'.
FORMATS = (
    ToolFormat(
        "functions",
        r"(?s)<tool_call>.*<function=",
        *_TAGS,
        read_functions,
        "\n<function=",
        ">\n",
        "</function>\n",
        _XML,
    ),
    ToolFormat("keys", r"(?s)<tool_call>.*<arg_key>", *_TAGS, read_keys, "", "\n", "", _KEYS, _GLM_MARKS),
    ToolFormat("hermes", r"""(?s)<tool_call>.*\\?"name\\?":""", *_TAGS, read_json, "\n" + _NAME, _ARGUMENTS, "}\n"),
    ToolFormat("mistral-args", r"(?s)\[TOOL_CALLS\].*\[ARGS\]", _CALLS, "", read_named, "", "[ARGS]", ""),
    ToolFormat("mistral", r"\[TOOL_CALLS\]", _CALLS, "", read_named, "[" + _NAME, _ARGUMENTS, "}]"),
    ToolFormat(
        "harmony",
        r"<\|channel\|>",
        " to=functions.",
        "",
        read_harmony,
        "",
        "<|channel|>commentary json<|message|>",
        "",
        marks=("<|channel|>", "<|constrain|>", "<|message|>"),
    ),
    ToolFormat(
        "gemma",
        r"<\|tool_call>",
        "<|tool_call>",
        "<tool_call|>",
        read_gemma,
        "call:",
        "{",
        "}",
        _GEMMA,
        (_GEMMA_QUOTE,),
    ),
    ToolFormat("phi", r"<\|/tool_call\|>", "<|tool_call|>", "<|/tool_call|>", read_json, _NAME, _ARGUMENTS, "}"),
    ToolFormat("granite", r"<\|tool_call\|>", "<|tool_call|>", "", read_json, "[" + _NAME, _ARGUMENTS, "}]"),
    ToolFormat("keywords", r"<\|tool_(list|call)_start\|>", *_LFM_TAGS, read_python, "[", "(", ")]", _KEYWORDS),
    ToolFormat("lines", r"<function_calls>", *_OLMO_TAGS, read_python, "", "(", ")", _KEYWORDS),
    ToolFormat("llama3", r'"name": function name, "parameters"', "", "", read_json, _NAME, '", "parameters": ', "}"),
)


def find_format(template: str) -> ToolFormat:
    """GenerationError where the template shows no form that is known here."""
    for known in FORMATS:
        if re.search(known.sign, template):
            return known
    raise GenerationError(
        "the model's chat template shows no form of tool calls that edgellm can read; use a model whose template has "
        f"one ({', '.join(known.name for known in FORMATS)}), or ask for JSON with a schema"
    )


def shown_marks(form: ToolFormat) -> tuple[str, ...]:
    """The control tokens that an answer's text must show for calls to be found in it."""
    return tuple(filter(None, (form.begin or _PYTHON_TAG, form.end, "[ARGS]", "[CALL_ID]", *form.marks)))


class HeldBack:
    """Text goes on until a call may have begun; `rest` is all from there."""

    def __init__(self, form: ToolFormat) -> None:
        self._begin = form.begin or _PYTHON_TAG
        self._whole_is_call = not form.begin
        self._shown = False  # anything but spaces
        self._found = False
        self.rest = ""

    def add(self, text: str) -> str:
        """What can be shown now."""
        self.rest += text
        if self._found or self._may_be_json():
            return ""
        cut = self.rest.find(self._begin)
        self._found = cut >= 0
        if not self._found:
            cut = len(self.rest) - overlap(self.rest, self._begin)
        shown, self.rest = self.rest[:cut], self.rest[cut:]
        self._shown = self._shown or bool(shown.strip())
        return shown

    def _may_be_json(self) -> bool:
        """The answer may be a call and nothing else: it begins with a brace, or not at all yet."""
        return self._whole_is_call and not self._shown and self.rest.lstrip()[:1] in ("", "{")


def read_calls(text: str, form: ToolFormat, schemas: Sequence[Schema] = ()) -> tuple[str, list[Call]]:
    """(what isn't a call, the calls). schemas: of the tools, for the types of values, and as a bare JSON object is a
    call only if it names one.
    """
    tools = {schema["function"]["name"]: schema["function"] for schema in schemas}
    if not form.begin:
        return _whole_text(text, tools)
    if form.end:
        return _between_marks(text, form, tools)
    return _after_mark(text, form, tools)


def _between_marks(text: str, form: ToolFormat, tools: Named) -> tuple[str, list[Call]]:
    """begin … end, any number; the last may lack its end."""
    calls: list[Call] = []
    begin, end = re.escape(form.begin), re.escape(form.end)

    def take(found: re.Match[str]) -> str:
        read = [_call(one) for one in form.read(found[1], tools)]
        good = [call for call in read if call is not None]
        if not good or len(good) < len(read):
            return found[0]
        calls.extend(good)
        return ""

    rest = re.sub(rf"(?s){begin}(.*?)(?:{end}|(?={begin})|\Z)", take, text)
    return ("" if calls and not rest.strip() else rest), calls


def _after_mark(text: str, form: ToolFormat, tools: Named) -> tuple[str, list[Call]]:
    """begin and what follows it up to the next, any number; all of them or none."""
    before, found, after = text.partition(form.begin)
    if not found:
        return text, []
    read = [_call(one) for piece in after.split(form.begin) for one in form.read(piece, tools)]
    good = [call for call in read if call is not None]
    return (before, good) if len(good) == len(read) else (text, [])


def _whole_text(text: str, tools: Named) -> tuple[str, list[Call]]:
    """Llama 3's: one JSON object, and behind a python tag nothing else either."""
    before, tag, after = text.partition(_PYTHON_TAG)
    call = _call(_json(after if tag else text))
    if call is None or call["function"]["name"] not in tools:
        return text, []
    return (before if tag else ""), [call]


def _call(content: Any) -> Call | None:
    """OpenAI's shape of {"name", "arguments" or "parameters"}; None for anything else."""
    if not isinstance(content, Mapping) or not isinstance(content.get("name"), str):
        return None
    arguments = content.get("arguments", content.get("parameters", {}))
    arguments = _json(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, Mapping):
        return None
    function = {"name": content["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
    # nine letters or digits: what Mistral's templates insist on
    return {"id": secrets.token_hex(5)[:9], "type": "function", "function": function}
