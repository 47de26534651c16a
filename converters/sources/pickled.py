""".bin checkpoints: torch pickles, opened with `weights_only=True`, never any other way.

torch reads only the skeleton (names, shapes, strides, where in the file each storage lies); the numbers are then
read one tensor at a time with plain file reads, so that memory doesn't grow with the checkpoint.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.sources import SourceTensor
from converters.sources.safetensors_file import to_float32
from edgellm.errors import CheckpointError

# torch type → (our name for it, numpy type of the same width)
_DTYPES: Mapping[str, tuple[str, str]] = {
    "float64": ("F64", "<f8"),
    "float32": ("F32", "<f4"),
    "float16": ("F16", "<f2"),
    "bfloat16": ("BF16", "<u2"),
    "float8_e4m3fn": ("F8_E4M3", "u1"),
    "float8_e5m2": ("F8_E5M2", "u1"),
    "float8_e8m0fnu": ("F8_E8M0", "u1"),
    "int64": ("I64", "<i8"),
    "int32": ("I32", "<i4"),
    "int16": ("I16", "<i2"),
    "int8": ("I8", "i1"),
    "uint8": ("U8", "u1"),
    "bool": ("BOOL", "?"),
}
# where training scripts put the weights in what they save
_NESTED = ("state_dict", "model", "model_state_dict", "module")


def read_pickled(path: Path) -> dict[str, SourceTensor]:
    """The tensors of a .bin file. A pickle that holds anything but weights is refused, not executed."""
    try:
        import torch
    except ImportError as exc:
        raise CheckpointError(
            f'{path.name} is a torch pickle and torch is not installed; `pip install "edgellm[torch]"`, '
            "or save the model as safetensors"
        ) from exc
    try:
        with warnings.catch_warnings():  # torch warns about pickles of other versions, and then refuses them or not
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="meta", weights_only=True)
    except Exception as exc:  # torch raises RuntimeError, UnpicklingError, EOFError, ValueError … for bad files
        raise CheckpointError(f"{path} {_reason(exc)}") from exc
    found = [content, *(content.get(key) for key in _NESTED)] if isinstance(content, dict) else []
    tables = [s for s in found if isinstance(s, dict) and s and all(isinstance(t, torch.Tensor) for t in s.values())]
    if not tables:
        raise CheckpointError(f"{path} holds no table of tensors (a state dict); save the model's state_dict()")
    return {str(name): _tensor(path, str(name), tensor) for name, tensor in tables[0].items()}


def _reason(exc: Exception) -> str:
    if "weights_only" in str(exc).lower() or "WeightsUnpickler" in str(exc):
        return "is not a weights-only pickle: it would run code when loaded; save the model as safetensors"
    return f"cannot be read by torch ({(str(exc) or type(exc).__name__).splitlines()[0][:120]}); copy it again"


def _tensor(path: Path, name: str, tensor: Any) -> SourceTensor:
    torch_dtype = str(tensor.dtype).removeprefix("torch.")
    if torch_dtype not in _DTYPES:
        raise CheckpointError(f"{path}: tensor {name} has type {torch_dtype}, which isn't supported")
    dtype, stored = _DTYPES[torch_dtype]
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None:
        raise CheckpointError(f"{path} has torch's format from before 1.6; load and save it once with a newer torch")
    item = np.dtype(stored).itemsize
    strides = tuple(step * item for step in tensor.stride())
    offset = start + tensor.storage_offset() * item
    where = (path, name, stored, tuple(tensor.shape), strides, offset)
    read, read_stored = partial(_read, dtype, *where), partial(_read_stored, *where)
    return SourceTensor(name, tuple(tensor.shape), dtype, tensor.numel() * item, read, read_stored)


def _read(dtype: str, *where: Any) -> NDArray[np.float32]:
    return to_float32(_read_stored(*where), dtype)


def _read_stored(
    path: Path,
    name: str,
    stored: str,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    offset: int,
    k: int = 0,
    n: int = 1,
) -> NDArray[Any]:
    item = np.dtype(stored).itemsize
    span = 1 + sum((size - 1) * (step // item) for size, step in zip(shape, strides, strict=True)) if all(shape) else 0
    try:
        raw = np.fromfile(path, dtype=stored, count=span, offset=offset)
    except OSError as exc:
        raise CheckpointError(f"cannot read tensor {name} in {path}: {exc.strerror or exc}") from exc
    if raw.size != span:
        raise CheckpointError(f"{path} is cut off inside tensor {name}; copy it again")
    view = np.lib.stride_tricks.as_strided(raw, shape, strides, writeable=False)
    if n > 1:
        view = np.split(view, n)[k]
    return np.ascontiguousarray(view)
