"""The model before quantization, as a GGUF that llama.cpp runs: what statistics and receipts are taken from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path

from converters.plan import Plan
from converters.prepare import Inputs, metadata_of, plan_of
from converters.produce import produce
from converters.writer import Writer, journal_path, partial_path
from edgellm.errors import CheckpointError
from edgellm.gguf_header import vouched
from edgellm.measure.scoring import OnProgress, Sample


class Original:
    """A GGUF in F16 beside `out`; made when `path` is first asked for, gone when it is closed.

    It has the name of a partial file all its life: what a kill leaves of it is nobody's model. A GGUF source is its own
    original. samples: texts as its tokens, kept by those who read them.
    """

    def __init__(self, inputs: Inputs, out: Path, n_threads: int = 0, on_progress: OnProgress | None = None) -> None:
        self._inputs, self._n_threads, self._on_progress = inputs, n_threads, on_progress
        self._out = out.with_name(f"{out.name}.original")
        self._opened = ExitStack()
        self.samples: dict[str, list[Sample]] = {}
        for left in (partial_path(self._out), journal_path(partial_path(self._out))):  # of an attempt that was killed
            with suppress(OSError):
                left.unlink()

    def close(self) -> None:
        """Remove it. Twice is fine."""
        self._opened.close()

    @cached_property
    def path(self) -> Path:
        """Where it is. CheckpointError for weights that can't be stored, OutputError where there is no room."""
        if self._inputs.is_gguf:
            return self._inputs.source.path
        try:
            return self._write(self._planned)
        except CheckpointError:
            return self._write(plan_of(self._inputs, "F32"))  # beyond F16's range

    @cached_property
    def _planned(self) -> Plan:
        return plan_of(self._inputs, "F16")

    @property
    def n_bytes(self) -> int:
        """What it takes on disk."""
        return self._inputs.source.n_bytes if self._inputs.is_gguf else self._planned.n_bytes

    def _write(self, planned: Plan) -> Path:
        written = scratch(self._inputs, planned, self._out, self._n_threads, self._on_progress)
        return self._opened.enter_context(written)


@contextmanager
def scratch(
    inputs: Inputs, planned: Plan, out: Path, n_threads: int = 0, on_progress: OnProgress | None = None
) -> Iterator[Path]:
    """A plan written beside `out` under the name of a partial file, which is gone afterwards."""
    metadata, _ = metadata_of(inputs, planned)
    with Writer(out, planned.architecture, metadata, planned.tensors) as writer:
        write_tensors(writer, planned, n_threads, on_progress)
        path = writer.finish(lasting=False)
        with vouched(path):
            yield path  # never committed: leaving the writer removes the file


def write_tensors(writer: Writer, planned: Plan, n_threads: int, on_progress: OnProgress | None) -> None:
    """All tensors of a plan that the writer doesn't have yet."""
    done = sum(tensor.n_bytes for tensor in planned.tensors[: writer.n_kept])
    for tensor, pieces in produce(planned.tensors[writer.n_kept :], planned.sizes, n_threads):
        if on_progress:
            on_progress(tensor.name, done, planned.n_bytes)
        writer.write(tensor, pieces)
        done += tensor.n_bytes
    if on_progress:
        on_progress("", done, planned.n_bytes)
