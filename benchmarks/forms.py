"""Answers of a given form against free ones.

    python benchmarks/forms.py [MODEL.gguf] [--rounds 5]

Schemas with long keys: what is forced costs almost nothing, as it is evaluated together. Tokens a second against a free
answer of as many tokens to the same request, in turns. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import edgellm
from edgellm import LoadParams, Model, SamplingParams
from edgellm.catalog.cards import resolve

TEXT = {"type": "string", "maxLength": 24}
NUMBER = {"type": "integer", "minimum": 0, "maximum": 999}


def thing(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS = {
    "contact": thing(
        first_name=TEXT, family_name=TEXT, street_and_house_number=TEXT, postal_code=NUMBER, email_address=TEXT
    ),
    "product": thing(
        product_name=TEXT,
        manufacturer_country={"enum": ["Germany", "Japan", "Brazil"]},
        price_in_euros=NUMBER,
        is_available_online={"type": "boolean"},
        delivery_time_in_days=NUMBER,
    ),
    "measurements": thing(
        temperature_in_degrees_celsius=NUMBER,
        relative_humidity_in_percent=NUMBER,
        atmospheric_pressure_in_hectopascal=NUMBER,
        wind_speed_in_kilometers_per_hour=NUMBER,
    ),
    "nested": thing(
        billing_address=thing(city_name=TEXT, country_code={"enum": ["DE", "FR", "US"]}),
        shipping_address=thing(city_name=TEXT, country_code={"enum": ["DE", "FR", "US"]}),
        payment_method={"enum": ["credit card", "bank transfer"]},
    ),
}


def speed(model: Model, name: str, n_tokens: int | None) -> tuple[float, int]:
    """Tokens a second after the first one, and how many. n_tokens: of a free answer; None for one of the form."""
    prompt = model.chat_tokens([{"role": "user", "content": f"Invent a {name} and give it as JSON."}])
    params = SamplingParams(max_tokens=n_tokens) if n_tokens else SamplingParams(max_tokens=300, schema=SCHEMAS[name])
    completion = model.complete(prompt, params)
    if not n_tokens:
        json.loads(completion.text)
    return completion.stats.decode_tokens_per_second, completion.stats.completion_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    path, ratios = options.model or resolve(None), dict[str, float]()
    with edgellm.load(path, LoadParams(n_ctx=1024)) as model:
        for name in SCHEMAS:
            _, n_tokens = speed(model, name, None)
            pairs = [(speed(model, name, None)[0], speed(model, name, n_tokens)[0]) for _ in range(options.rounds)]
            ratios[name] = round(median(a / b for a, b in pairs), 3)
            formed, free = (median(column) for column in zip(*pairs, strict=True))
            print(f"{name:<14} {n_tokens:3} tokens  {formed:6.1f} against {free:6.1f} tok/s  {ratios[name]:.2f} ×")
    print(json.dumps({"benchmark": "forms", "model": path.name, "ratios": ratios}))


if __name__ == "__main__":
    main()
