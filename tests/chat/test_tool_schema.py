"""Schemas of functions: from hints, defaults and docstrings, and what is refused."""

from __future__ import annotations

import enum
from typing import Annotated, Any, Literal

import pytest

from edgellm.chat.tool_schema import tool_schema, tool_schemas
from edgellm.errors import GenerationError


class Unit(enum.Enum):
    CELSIUS = "C"
    FAHRENHEIT = "F"


def weather(
    city: Annotated[str, "Where."], days: int = 1, unit: Unit = Unit.CELSIUS, of: Literal["sun", "rain"] | None = None
) -> str:
    """Forecast the weather
    of a city.

    More that the model needn't know.
    """
    return f"{of or 'sun'} in {city} for {days} days"


def test_a_function_is_its_own_schema() -> None:
    assert tool_schema(weather) == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Forecast the weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Where."},
                    "days": {"type": "integer"},
                    "unit": {"enum": ["C", "F"]},
                    "of": {"anyOf": [{"enum": ["sun", "rain"]}, {"type": "null"}]},
                },
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }


def test_containers_in_hints() -> None:
    def tool(a: list[int], b: dict[str, float], c: tuple[str, ...], d: list, e: dict, f: Any, g: bool) -> None:  # type: ignore[type-arg]
        pass

    assert tool_schema(tool)["function"]["parameters"]["properties"] == {
        "a": {"type": "array", "items": {"type": "integer"}},
        "b": {"type": "object", "additionalProperties": {"type": "number"}},
        "c": {"type": "array", "items": {"type": "string"}},
        "d": {"type": "array"},
        "e": {"type": "object"},
        "f": {},
        "g": {"type": "boolean"},
    }


def no_hint(a) -> None:  # type: ignore[no-untyped-def]
    pass


def star(*a: int) -> None:
    pass


def odd(a: complex) -> None:
    pass


def unknown(a: "Nowhere") -> None:  # type: ignore[name-defined]  # noqa: F821, UP037
    pass


@pytest.mark.parametrize(
    ("tool", "said"),
    [
        (5, "a function or an OpenAI-shaped schema, not int"),
        ({}, "schema is"),
        ({"type": "function", "function": {"name": "a b"}}, "letters, digits, _ or -, unlike 'a b'"),
        ({"type": "function", "function": {"name": "a", "parameters": 5}}, "are a JSON Schema, not int"),
        ({"type": "function", "function": {"name": "a", "parameters": {"x": {1, 2}}}}, "can't be written as JSON"),
        (no_hint, "parameter a of the tool no_hint has no type hint"),
        (star, "has no name to give it by"),
        (odd, "complex.*can't become a schema"),
        (unknown, "can't be read.*Nowhere"),
    ],
)
def test_tools_that_are_none(tool: Any, said: str) -> None:
    with pytest.raises(GenerationError, match=said) as caught:
        tool_schema(tool)
    assert "\n" not in str(caught.value)


def test_two_tools_of_one_name() -> None:
    with pytest.raises(GenerationError, match="same name"):
        tool_schemas([weather, weather])
