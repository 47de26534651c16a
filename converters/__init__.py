"""Checkpoint → GGUF, and back. numpy only; torch where a pickle needs it.

convert(source, out, quant="Q4_K_M") -> Receipt
plan(source, quant="Q4_K_M") -> Plan
to_checkpoint(gguf, folder) -> folder
describe(path) -> dict
"""

# The functions have the names of their modules: importing them here, and not lazily, is what makes
# `converters.convert` the function.
from converters.convert import convert, plan
from converters.describe import describe
from converters.plan import Plan
from converters.receipt import Receipt
from converters.to_checkpoint import to_checkpoint

__all__ = ["Plan", "Receipt", "convert", "describe", "plan", "to_checkpoint"]
