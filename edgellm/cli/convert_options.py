"""What `edgellm convert` can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

SourcePath: TypeAlias = Annotated[Path, typer.Argument(help="Checkpoint folder, or a GGUF to requantize or turn back.")]
Out: TypeAlias = Annotated[
    Path | None, typer.Option("-o", "--out", help="GGUF to write [default: SOURCE-QUANT.gguf here].")
]
Quant: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--quant",
        "-q",
        help="Recipe: F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q4_K_M Q4_0 IQ4_NL …, or auto: chosen for this machine's memory "
        "[default: Q4_K_M].",
    ),
]
MaxSize: TypeAlias = Annotated[
    str | None,
    typer.Option("--max-size", metavar="SIZE", help="Budget instead of a recipe: at most 85MB, 2.5GB … of file."),
]
MaxKLD: TypeAlias = Annotated[
    float | None,
    typer.Option("--max-kld", help="Budget: the smallest file this close to the original (mean KL divergence)."),
]
MinSpeed: TypeAlias = Annotated[
    float | None, typer.Option("--min-speed", help="Budget: at least so many tokens per second on this machine.")
]
Types: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--type", metavar="REGEX=TYPE", help="Type for tensors whose name matches; repeatable."),
]
Pre: TypeAlias = Annotated[
    str | None, typer.Option(help="llama.cpp's name of the pre-tokenizer, if it isn't recognized.")
]
Adapters: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="DIR[:WEIGHT]", help="Adapter (LoRA …) to merge first; repeatable."),
]
ToCheckpoint: TypeAlias = Annotated[
    Path | None, typer.Option("--to-checkpoint", metavar="DIR", help="Write the GGUF as a checkpoint folder instead.")
]
MergeBase: TypeAlias = Annotated[
    str | None,
    typer.Option("--merge-base", help="For QLoRA: merge into the base as it is (fp16), or as trained (dequant)."),
]
Rank: TypeAlias = Annotated[
    int, typer.Option(min=1, help="With --adapter-only: rank for what is no low-rank product by itself (DoRA).")
]
Calibrate: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="FILE|self", help="Collect an importance matrix on a text, or on one the model writes."),
]
Imatrix: TypeAlias = Annotated[Path | None, typer.Option(help="Use this importance matrix (llama.cpp's file).")]
SaveImatrix: TypeAlias = Annotated[
    Path | None, typer.Option("--save-imatrix", help="Also write the collected matrix as llama.cpp's file.")
]
SaveGram: TypeAlias = Annotated[
    Path | None, typer.Option("--save-gram", metavar="DIR", help="Also write the inputs' Gram matrices, as .npy files.")
]
Memory: TypeAlias = Annotated[
    str, typer.Option(metavar="SIZE", help="What calibration may take for matrices at a time: 8GB, 500MB.")
]
Compensate: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--compensate/--no-compensate", help="Make up for rounding errors on that text [default: with --calibrate]."
    ),
]
Effort: TypeAlias = Annotated[int, typer.Option(min=1, max=5, help="How much of the text that looks at.")]
ReceiptLevel: TypeAlias = Annotated[
    str,
    typer.Option(
        help="full: measure the result against the original; fast: check it; off; auto: full if disk and time allow."
    ),
]
ReceiptText: TypeAlias = Annotated[
    str | None, typer.Option("--receipt-text", metavar="FILE|self", help="What to measure on, not our own text.")
]
Report: TypeAlias = Annotated[
    Path | None, typer.Option(metavar="FILE.html", help="Write a page about the result: figures, a map of errors.")
]
AdapterOnly: TypeAlias = Annotated[
    bool, typer.Option("--adapter-only", help="Write the adapters as a GGUF for --lora instead of merging them.")
]
Dtype: TypeAlias = Annotated[str, typer.Option(help="Number type of that folder: f32 (exact), bf16, f16.")]
DryRun: TypeAlias = Annotated[bool, typer.Option("--dry-run", help="Show the whole plan, write nothing.")]
Force: TypeAlias = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Resume: TypeAlias = Annotated[
    bool, typer.Option("--resume", help="Keep what an interrupted conversion had finished, and go on.")
]
Threads: TypeAlias = Annotated[int, typer.Option(min=0, help="Threads; 0 = all cores.")]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
