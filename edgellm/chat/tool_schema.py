"""Tools as templates want them, OpenAI's shape: given so, or made of a Python function's hints and docstring."""

from __future__ import annotations

import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, Union

from edgellm.errors import GenerationError

Schema: TypeAlias = dict[str, Any]
Tool: TypeAlias = Callable[..., object] | Mapping[str, Any]

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TYPES: Mapping[object, str] = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def tool_schema(tool: Tool) -> Schema:
    """{"type": "function", "function": {"name", "description", "parameters": JSON Schema}} of a function, or checked.

    Hints that are understood: str, int, float, bool, None, list, dict, Literal, enums, unions, Annotated[hint, "what it
    is"]. GenerationError says what is wrong with a tool, or which hint can't be turned into a schema.
    """
    if isinstance(tool, Mapping):
        return _checked(tool)
    if callable(tool):
        return _checked({"type": "function", "function": _of_function(tool)})
    raise GenerationError(f"a tool is a function or an OpenAI-shaped schema, not {type(tool).__name__}")


def tool_schemas(tools: Sequence[Tool]) -> list[Schema]:
    """Of each. GenerationError also where two have the same name."""
    schemas = [tool_schema(tool) for tool in tools]
    names = [schema["function"]["name"] for schema in schemas]
    if len(set(names)) < len(names):
        raise GenerationError(f"two tools have the same name; there are {', '.join(names)}")
    return schemas


def _checked(tool: Mapping[str, Any]) -> Schema:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, Mapping):
        raise GenerationError('a tool\'s schema is {"type": "function", "function": {"name": …, "parameters": …}}')
    name, parameters = function.get("name"), function.get("parameters", {"type": "object", "properties": {}})
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise GenerationError(f"a tool's name has 1 to 64 letters, digits, _ or -, unlike {name!r}")
    if not isinstance(parameters, Mapping):
        raise GenerationError(f"the parameters of the tool {name} are a JSON Schema, not {type(parameters).__name__}")
    described = {"description": "", **function, "parameters": parameters}
    try:
        copied: Schema = json.loads(json.dumps({"type": "function", "function": described}))
    except (TypeError, ValueError, RecursionError) as exc:
        raise GenerationError(f"the tool {name} can't be written as JSON: {exc}") from exc
    return copied


def _of_function(function: Callable[..., object]) -> Schema:
    name = getattr(function, "__name__", type(function).__name__)
    try:
        hints = typing.get_type_hints(function, include_extras=True)
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError, NameError) as exc:
        raise GenerationError(f"the hints of the tool {name} can't be read: {exc}; give its schema instead") from exc
    properties, required = {}, []
    for parameter in parameters:
        where = f"parameter {parameter.name} of the tool {name}"
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise GenerationError(f"the {where} has no name to give it by; give the tool's schema instead")
        if parameter.name not in hints:
            raise GenerationError(f"the {where} has no type hint; add one, or give the tool's schema")
        properties[parameter.name] = _of_hint(hints[parameter.name], where)
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    described = inspect.cleandoc(function.__doc__ or "").split("\n\n")[0]
    return {"name": name, "description": " ".join(described.split()), "parameters": schema}


def _of_hint(hint: Any, where: str) -> Schema:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        texts = [one for one in arguments[1:] if isinstance(one, str)]
        return {**_of_hint(arguments[0], where), **({"description": texts[0]} if texts else {})}
    if isinstance(hint, type) and hint in _TYPES:
        return {"type": _TYPES[hint]}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_of_hint(one, where) for one in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [member.value for member in hint]}
    if (origin or hint) in (list, Sequence, set, tuple) and (len(arguments) < 2 or arguments[1] is Ellipsis):
        return {"type": "array", **({"items": _of_hint(arguments[0], where)} if arguments else {})}
    if (origin or hint) in (dict, Mapping) and (not arguments or arguments[0] is str):
        return {"type": "object", **({"additionalProperties": _of_hint(arguments[1], where)} if arguments else {})}
    if hint is Any:
        return {}
    raise GenerationError(f"the hint {hint!r} of the {where} can't become a schema; give the tool's schema instead")
