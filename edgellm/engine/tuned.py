"""What `edgellm tune` found for a model on this machine: where it is kept, and what it does to the load parameters.

One JSON file for each (machine, model) in the user's cache folder. The machine is its CPU, the cores this process may
use and the version of llama.cpp; the model is the size of its file and a hash of samples of it. So nothing measured is
used where it doesn't hold, and looking for it takes some milliseconds, however large the model.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args

from edgellm.catalog.partners import fingerprint
from edgellm.config import DEFAULT_KV_TYPE, DEFAULT_LOAD_MODE, KVType, LoadMode, LoadParams, physical_cpu_count
from edgellm.errors import OutputError
from edgellm.native import library
from edgellm.whole_file import whole_file

if TYPE_CHECKING:
    from edgellm.native.context import Context

logger = logging.getLogger(__name__)

_FORMAT = 1
_CPUINFO = 8 << 10  # characters: the first core's lines; the kernel writes only what is read


@dataclass(frozen=True)
class Attention:
    """A kind of KV cache that was measured."""

    kv_type: KVType
    flash_attn: bool


@dataclass(frozen=True)
class Tuning:
    """The settings found best. attention: fastest first, so that a caller who chose one half gets the best other half.

    verify_cost: number of tokens evaluated together → cost in plain steps. measured: figures for people, JSON.
    """

    n_threads: int
    n_batch: int
    load_mode: LoadMode
    attention: tuple[Attention, ...]
    verify_cost: Mapping[int, float] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)


def settle(params: LoadParams, tuning: Tuning | None) -> LoadParams:
    """`params` with what its caller left open taken from the tuning, if there is one and it is wanted."""
    if tuning is None or not params.tuned:
        return params
    kv_type, flash_attn = params.kv_type, params.flash_attn
    for found in tuning.attention:
        if kv_type in (None, found.kv_type) and flash_attn in (None, found.flash_attn):
            kv_type, flash_attn = found.kv_type, found.flash_attn
            break
    return replace(
        params,
        n_threads=params.n_threads or tuning.n_threads,
        n_batch=params.n_batch or tuning.n_batch,
        kv_type=kv_type,
        flash_attn=flash_attn,
        load_mode=params.load_mode or tuning.load_mode,
    )


def settings_in_force(context: Context, params: LoadParams, tuning: Tuning | None) -> Mapping[str, Any]:
    """Of a context made with the settled `params`. flash_attn None: llama.cpp chose."""
    return MappingProxyType(
        {
            "n_ctx": context.n_ctx,
            "n_threads": context.n_threads,
            "n_batch": context.n_batch,
            "kv_type": params.kv_type or DEFAULT_KV_TYPE,
            "flash_attn": params.flash_attn,
            "load_mode": params.load_mode or DEFAULT_LOAD_MODE,
            "tuned": tuning is not None,
        }
    )


def tuning_for(path: Path) -> Tuning | None:
    """What was found for this model here; None where nothing was, or the file can't be used (which is logged)."""
    if not _has_any():
        return None
    file = tuning_file(path)
    try:
        content = json.loads(file.read_bytes())
        if (content["format"], content["machine"], content["model"]) != (_FORMAT, machine(), fingerprint(path)):
            raise ValueError("it is of another machine, model or version")
        return _from_json(content["tuning"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        logger.warning("%s isn't used: %s; `edgellm tune` makes it again", file, exc)
        return None


def save(path: Path, tuning: Tuning) -> Path:
    """Keep it for the model at `path`, in place of what was there. Returns the file. OutputError: can't be written."""
    file = tuning_file(path)
    content = {"format": _FORMAT, "machine": machine(), "model": fingerprint(path), "tuning": asdict(tuning)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as out:
            out.write(json.dumps(content, indent=1).encode())
    except OSError as exc:
        raise OutputError(f"cannot write {file}: {exc.strerror or exc}; the measurements are lost") from exc
    return file


def forget(path: Path) -> bool:
    """Remove what is kept for this model on this machine. Returns whether there was anything."""
    file = tuning_file(path)
    try:
        file.unlink()
    except FileNotFoundError:
        return False
    except OSError as exc:
        raise OutputError(f"cannot remove {file}: {exc.strerror or exc}") from exc
    return True


def tuning_file(path: Path) -> Path:
    return _folder() / f"{fingerprint(path)[:24]}-{machine()[:16]}.json"


def machine() -> str:
    """A hash of all of this machine that what was measured depends on."""
    facts = [_cpu(), str(os.cpu_count()), str(physical_cpu_count()), sys.platform, library.version()]
    return _sha256("\0".join(facts).encode())


def _from_json(found: Mapping[str, Any]) -> Tuning:
    """Checked like a stranger's. ValueError, KeyError, TypeError: not what `save` writes."""
    attention = tuple(Attention(**one) for one in found["attention"])
    ok = (
        all(one.kv_type in get_args(KVType) and isinstance(one.flash_attn, bool) for one in attention)
        and found["load_mode"] in get_args(LoadMode)
        and all(isinstance(found[key], int) and 0 < found[key] <= 1 << 16 for key in ("n_threads", "n_batch"))
    )
    cost = {int(n): float(steps) for n, steps in found["verify_cost"].items()}
    if not ok or not all(n > 0 and 0 < steps < 1e6 for n, steps in cost.items()):
        raise ValueError("its values make no sense")
    return Tuning(
        n_threads=found["n_threads"],
        n_batch=found["n_batch"],
        load_mode=found["load_mode"],
        attention=attention,
        verify_cost=cost,
        measured=found["measured"],
    )


def _folder() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("edgellm") / "tuning"


def _has_any() -> bool:
    """Most people never tune: a look at the folder spares them the hashing."""
    with suppress(OSError), os.scandir(_folder()) as entries:
        return any(True for _ in entries)
    return False


def _sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def _cpu() -> str:
    """The CPU's name, and where Linux tells them its features."""
    if sys.platform == "linux":
        with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = file.read(_CPUINFO).partition("\n\n")[0].splitlines()
            wanted = ("vendor_id", "cpu family", "model", "flags", "features", "cpu implementer", "cpu part")
            return "\n".join(line for line in lines if line.lower().startswith(wanted))
    if sys.platform == "darwin":
        from edgellm.engine.machine import sysctl_text  # with `platform`, which a start elsewhere doesn't wait for

        return sysctl_text("machdep.cpu.brand_string")
    return os.environ.get("PROCESSOR_IDENTIFIER", "")
