"""What an interrupted distillation leaves beside its output, and goes on from: one safetensors file, no pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from converters.drafts.labels import Labelled, pack, unpack
from converters.drafts.student import as_arrays
from edgellm.errors import OutputError

if TYPE_CHECKING:
    from converters.drafts.train import Training

_MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


def state_path(out: Path) -> Path:
    """Beside the output, which has a partial file of its own while it is written."""
    return out.with_name(f"{out.name}.distil.partial")


def save_labels(path: Path, identity: str, learned: Sequence[Labelled], tried: Sequence[Labelled]) -> None:
    """The labels alone, before there is a training. OutputError where there is no room."""
    _write(path, _labels(learned, tried), {"identity": identity})


def save_state(
    path: Path, identity: str, learned: Sequence[Labelled], tried: Sequence[Labelled], training: Training
) -> None:
    """Labels, weights, the best weights, the optimizer's moments and progress. OutputError where there is no room."""
    arrays = _labels(learned, tried)
    arrays |= {f"now.{name}": values for name, values in as_arrays(training.student.weights).items()}
    arrays |= {f"best.{name}": values for name, values in training.best.items()}
    for name, weight in training.student.weights.items():
        for moment in _MOMENTS if weight in training.optimizer.state else ():
            arrays[f"{moment}.{name}"] = training.optimizer.state[weight][moment].numpy()
    progress = json.dumps(training.progress.as_dict())
    _write(path, arrays, {"identity": identity, "progress": progress})


def _labels(learned: Sequence[Labelled], tried: Sequence[Labelled]) -> dict[str, Any]:
    parts = {"learned": pack(learned), "tried": pack(tried)}
    return {f"{name}.{key}": values for name, packed in parts.items() for key, values in packed.items()}


def _write(path: Path, arrays: dict[str, Any], metadata: dict[str, str]) -> None:
    new = path.with_name(f"{path.name}.new")
    try:
        save_file({name: np.ascontiguousarray(values) for name, values in arrays.items()}, new, metadata)
        os.replace(new, path)
    except (OSError, SafetensorError) as exc:
        new.unlink(missing_ok=True)
        raise OutputError(f"cannot keep the training in {path}: {exc}; make room there") from exc


class State:
    """An earlier run's, read. OutputError where there is none, or it belongs to another distillation."""

    def __init__(self, path: Path, identity: str) -> None:
        if not path.is_file():
            raise OutputError(f"there is no {path.name} to go on from; leave out --resume")
        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
                self._arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as exc:
            raise OutputError(f"{path} is damaged ({exc}); delete it and start anew") from exc
        if metadata.get("identity") != identity:
            raise OutputError(
                f"{path.name} is of another model, text, seed or number of blocks; start anew without --resume"
            )
        self._progress = metadata.get("progress")

    @property
    def labels(self) -> tuple[list[Labelled], list[Labelled]]:
        """(to learn from, held out)."""
        learned, tried = (unpack(self._under(f"{name}.")) for name in ("learned", "tried"))
        return learned, tried

    def restore(self, training: Training) -> None:
        """Bring a new training to where the earlier one was; nothing where that hadn't begun."""
        import torch

        from converters.drafts.train import Progress, Trial

        if self._progress is None:
            return
        now, best = self._under("now."), self._under("best.")
        training.best = best
        found = json.loads(self._progress)
        training.progress = Progress(**{**found, "trials": [Trial(**trial) for trial in found["trials"]]})
        moments = {moment: self._under(f"{moment}.") for moment in _MOMENTS}
        with torch.no_grad():
            for name, weight in training.student.weights.items():
                weight.copy_(torch.from_numpy(now[name]))
                if name in moments[_MOMENTS[0]]:
                    step = torch.tensor(float(training.progress.step))
                    arrays = {moment: torch.from_numpy(moments[moment][name].copy()) for moment in _MOMENTS}
                    training.optimizer.state[weight] = {"step": step, **arrays}

    def _under(self, prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): a for name, a in self._arrays.items() if name.startswith(prefix)}
