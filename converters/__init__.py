"""Checkpoint → GGUF, and back. numpy only; torch where a pickle or a distillation needs it.

convert(source, out, quant="Q4_K_M") -> Receipt
plan(source, quant="Q4_K_M") -> Plan
export_adapter(base, adapters, out) -> AdapterReceipt
to_checkpoint(gguf, folder) -> folder
describe(path) -> dict
distil(source, out, n_blocks=6, minutes=20) -> Distilled
"""

# The functions have the names of their modules: importing them here, and not lazily, is what makes
# `converters.convert` the function.
from converters.adapters.lora_gguf import AdapterReceipt, export_adapter
from converters.convert import convert, plan
from converters.describe import describe
from converters.drafts.distil import Distilled, distil
from converters.plan import Plan
from converters.receipt import Receipt
from converters.to_checkpoint import to_checkpoint

__all__ = [
    "AdapterReceipt",
    "Distilled",
    "Plan",
    "Receipt",
    "convert",
    "describe",
    "distil",
    "export_adapter",
    "plan",
    "to_checkpoint",
]
