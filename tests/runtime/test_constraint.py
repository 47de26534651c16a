"""Answers of a given form on the real model: valid, repeatable, the same with and without guesses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import edgellm
from edgellm import GenerationError, Model, SamplingParams
from edgellm.constraint import schema_text
from tests.runtime.test_cli import edgellm as command

ASK = [{"role": "user", "content": "Invent something and describe it as JSON."}]


def text(**limits: int) -> dict[str, Any]:
    return {"type": "string", "maxLength": 12, **limits}


def thing(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


SCHEMAS: dict[str, dict[str, Any]] = {
    "flat": thing(name=text(), age={"type": "integer", "minimum": 0, "maximum": 99}),
    "enum": thing(colour={"enum": ["red", "green", "blue"]}, size={"enum": [1, 2, 3]}),
    "nested": thing(a=thing(b=thing(c={"type": "boolean"}, d=text()))),
    "array": thing(tags={"type": "array", "items": text(), "minItems": 1, "maxItems": 3}),
    "pattern": thing(code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}),
    "union": thing(value={"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "null"}, text()]}),
    "optional": {
        "type": "object",
        "properties": {"x": text(), "y": {"type": "boolean"}},
        "additionalProperties": False,
    },
    "objects": {"type": "array", "items": thing(id={"type": "integer", "maximum": 99, "minimum": 0}), "maxItems": 2},
    "reference": {
        "$defs": {"point": thing(x={"type": "integer", "minimum": 0, "maximum": 9})},
        **thing(from_={"$ref": "#/$defs/point"}, to={"$ref": "#/$defs/point"}),
    },
    "constant": thing(kind={"const": "edge"}, on={"type": "boolean"}),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_validate_at_any_temperature(model: Model, name: str) -> None:
    for seed, temperature in enumerate((0.0, 0.8, 1.5)):
        params = SamplingParams(max_tokens=200, temperature=temperature, seed=seed, schema=SCHEMAS[name])
        completion = edgellm_complete(model, params)
        assert completion.finish_reason == "stop"
        jsonschema.validate(json.loads(completion.text), SCHEMAS[name])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hundred_answers_validate(model: Model) -> None:
    for seed in range(20):
        for schema in SCHEMAS.values():
            params = SamplingParams(max_tokens=300, temperature=1.0, top_p=1.0, min_p=0.0, seed=seed, schema=schema)
            jsonschema.validate(json.loads(edgellm_complete(model, params).text), schema)


def edgellm_complete(model: Model, params: SamplingParams, draft: str = "auto") -> edgellm.Completion:
    return model.complete(model.chat_tokens(ASK), params, draft=draft)


def test_what_is_forced_is_guessed_and_changes_nothing(model: Model) -> None:
    params = SamplingParams(max_tokens=100, schema=thing(description=text(), manufacturer=text(), availability=text()))
    plain, guessed = (edgellm_complete(model, params, draft) for draft in ("off", "ngram"))
    assert list(json.loads(guessed.text)) == list(json.loads(plain.text))
    assert plain.stats.drafted == 0


def test_regular_expressions_and_lark(model: Model) -> None:
    params = SamplingParams(max_tokens=40, regex=r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", edgellm_complete(model, params).text)
    params = SamplingParams(max_tokens=40, lark='start: "yes" | "no" | "perhaps " NUMBER\nNUMBER: /[0-9]/')
    assert re.fullmatch(r"yes|no|perhaps \d", edgellm_complete(model, params).text)


def test_penalties_and_stop_strings_go_with_a_form(model: Model) -> None:
    params = SamplingParams(max_tokens=60, schema=SCHEMAS["flat"], repeat_penalty=1.3, temperature=0.7, seed=2)
    jsonschema.validate(json.loads(edgellm_complete(model, params).text), SCHEMAS["flat"])
    stopped = edgellm_complete(model, SamplingParams(max_tokens=60, schema=SCHEMAS["flat"], stop=('"age"',)))
    assert stopped.text.startswith('{"name": ')
    assert '"age"' not in stopped.text


def test_a_pydantic_model_is_a_schema() -> None:
    class Like:
        """What Pydantic's classes have."""

        @staticmethod
        def model_json_schema() -> dict[str, Any]:
            return SCHEMAS["flat"]

    assert json.loads(schema_text(Like)) == SCHEMAS["flat"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"schema": "{no json"}, "not JSON"),
        ({"schema": [1]}, "not a list"),
        ({"schema": 5}, "not int"),
        ({"schema": {"type": "no-such-type"}}, "form can't be used"),
        ({"regex": "("}, "form can't be used"),
        ({"lark": "start: nothing_defined"}, "form can't be used"),
    ],
)
def test_forms_that_cannot_be_used(model: Model, params: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        edgellm_complete(model, SamplingParams(max_tokens=5, **params))
    assert model.complete("Hello", SamplingParams(max_tokens=2)).token_ids


def test_only_one_form_at_a_time() -> None:
    with pytest.raises(ValueError, match="schema and regex"):
        SamplingParams(schema={}, regex="a")


def test_schemas_on_the_command_line(model_path: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMAS["enum"]), encoding="utf-8")
    result = command("run", model_path, "A thing as JSON.", "--schema", schema, "-n", "60")
    jsonschema.validate(json.loads(result.stdout), SCHEMAS["enum"])
    for bad in (tmp_path / "none.json", tmp_path):
        failed = command("run", model_path, "A thing.", "--schema", bad)
        assert (failed.returncode, failed.stderr.count(b"\n")) == (3, 1)
