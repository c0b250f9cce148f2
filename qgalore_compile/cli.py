"""The command `qgalore`."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Annotated, Literal

import typer
from rich.console import Console

USER_ERROR = 2
INTERRUPTED = 130

app = typer.Typer(
    name="qgalore",
    help="Train LLaMA models with Q-GaLore, each training step compiled as one graph.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a bug's traceback is for bug reports: plain
    rich_markup_mode="markdown",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qgalore-compile {metadata.version('qgalore-compile')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@contextmanager
def user_errors() -> Iterator[None]:
    """Print what the user can repair as one red line and exit with status 2; a bug keeps its traceback.

    A ValueError counts as the user's if this package raised it: its messages are written for that.
    """
    try:
        yield
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped at once; the last checkpoint, if any, is as it was", style="red")
        raise typer.Exit(INTERRUPTED) from None
    except OSError as error:  # no such file, no permission, disk full: its message names the file
        _fail(str(error))
    except ValueError as error:
        if not _raised_here(error):
            raise
        _fail(str(error))


def _raised_here(error: ValueError) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module: str = frames[-1].f_globals.get("__name__", "")
    return module.split(".")[0] == "qgalore_compile"


def _fail(message: str) -> None:
    Console(stderr=True).print(f"error: {message}", style="red", soft_wrap=True, markup=False, highlight=False)
    raise typer.Exit(USER_ERROR)


MODEL, STEP, OUTPUT = "Model and data", "Training step", "Run and output"


@app.command()
def train(
    preset: Annotated[
        str | None, typer.Option(help="tiny, 35m, 60m, 130m, 350m, 1b or 7b. [default: tiny]", rich_help_panel=MODEL)
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text file or folder to train on. [default: the source of the Python standard library]",
            rich_help_panel=MODEL,
        ),
    ] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens (bytes) of a sequence.", rich_help_panel=MODEL)] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences of a micro-batch.", rich_help_panel=MODEL)] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Micro-batches of a step. [default: 1]", rich_help_panel=MODEL)
    ] = None,
    tied: Annotated[
        bool | None,
        typer.Option("--tied/--untied", help="Share embedding and head. [default: untied]", rich_help_panel=MODEL),
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Rows of embedding and head, at least 256. [default: 256]", rich_help_panel=MODEL)
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="Of weights and activations. [default: float32]", rich_help_panel=MODEL),
    ] = None,
    optimizer: Annotated[
        Literal["qgalore", "galore", "adamw"] | None,
        typer.Option(
            help="qgalore: INT8 weights, INT4 projectors, 8-bit moments; galore: the same in float; adamw: full rank. "
            "[default: qgalore]",
            rich_help_panel=STEP,
        ),
    ] = None,
    backend: Annotated[
        Literal["qgalore", "inductor", "eager"] | None,
        typer.Option(help="What compiles the step; eager compiles nothing. [default: qgalore]", rich_help_panel=STEP),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.", rich_help_panel=STEP)] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the projection.", rich_help_panel=STEP)] = None,
    update_proj_gap: Annotated[
        int | None, typer.Option(help="Steps between two refreshes of a subspace, at first.", rich_help_panel=STEP)
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="α, on the projected update. [default: 0.25]", rich_help_panel=STEP)
    ] = None,
    refresh: Annotated[
        Literal["svd", "randomized", "power"] | None,
        typer.Option(help="How a subspace is computed. [default: randomized]", rich_help_panel=STEP),
    ] = None,
    power_iterations: Annotated[
        int | None, typer.Option(help="Of --refresh randomized. [default: 1]", rich_help_panel=STEP)
    ] = None,
    moments_on_refresh: Annotated[
        Literal["keep", "reset", "rotate"] | None,
        typer.Option(help="What becomes of the moments in a new subspace. [default: keep]", rich_help_panel=STEP),
    ] = None,
    similarity: Annotated[
        Literal["subspace", "official"] | None,
        typer.Option(help="How two subspaces are compared. [default: subspace]", rich_help_panel=STEP),
    ] = None,
    max_gap: Annotated[
        int | None,
        typer.Option(
            help="Most steps between two refreshes. [default: 16 gaps; official: no limit]", rich_help_panel=STEP
        ),
    ] = None,
    stagger: Annotated[
        bool | None,
        typer.Option(
            "--stagger/--no-stagger",
            help="Spread refreshes over steps, a cheap projector standing in at first. [default: stagger]",
            rich_help_panel=STEP,
        ),
    ] = None,
    trigger: Annotated[
        Literal["similarity", "energy"] | None,
        typer.Option(
            help="What refreshes a subspace: a gap that similarities stretch, or a projector that catches too little "
            "of the gradient. [default: similarity]",
            rich_help_panel=STEP,
        ),
    ] = None,
    energy_threshold: Annotated[
        float | None,
        typer.Option(
            help="For --trigger energy: too little is below this part of what it caught at first. [default: 0.8]",
            rich_help_panel=STEP,
        ),
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Decoupled, not on norms. [default: 0]", rich_help_panel=STEP)
    ] = None,
    max_grad_norm: Annotated[
        float | None, typer.Option(help="Clip to this global norm. [default: no clipping]", rich_help_panel=STEP)
    ] = None,
    nonfinite: Annotated[
        Literal["skip_step", "skip_parameter"] | None,
        typer.Option(
            help="What a gradient that is not finite stops; skip_parameter takes less memory. [default: skip_step]",
            rich_help_panel=STEP,
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the optimizer.", rich_help_panel=OUTPUT)] = None,
    out: Annotated[
        str | None,
        typer.Option(
            help="Folder of checkpoint, metrics and curves. [default: runs/PRESET-OPTIMIZER-BACKEND]",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the checkpoint in --out.", rich_help_panel=OUTPUT)
    ] = False,
    seed: Annotated[
        int | None, typer.Option(help="Of weights, batches and rounding. [default: 0]", rich_help_panel=OUTPUT)
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, … [default: cpu]", rich_help_panel=OUTPUT)] = None,
    eval_every: Annotated[
        int | None, typer.Option(help="Steps between evaluations. [default: 50]", rich_help_panel=OUTPUT)
    ] = None,
    eval_tokens: Annotated[
        int | None, typer.Option(help="Bytes that an evaluation reads. [default: 32768]", rich_help_panel=OUTPUT)
    ] = None,
    log_every: Annotated[
        int | None,
        typer.Option(help="Steps between lines, where output is no terminal. [default: 10]", rich_help_panel=OUTPUT),
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints. [default: 100]", rich_help_panel=OUTPUT)
    ] = None,
) -> None:
    """Train a LLaMA on bytes of text, and say whether it beats a bigram model.

    Options without a default here take it from the preset, which holds the values of the Q-GaLore paper.

    Exit status: 0 the model beats the bigram model, 1 it does not, 2 a wrong option or unusable data, 130 stopped by
    Ctrl-C (the run is saved: continue it with `--resume`).
    """
    options = dict(locals())  # first statement: exactly the parameters above, which are the fields of TrainConfig
    # Here, not at the top: Dynamo and matplotlib take seconds to import, and --help needs neither.
    from qgalore_compile.pretrain import pretrain, resumed_config
    from qgalore_compile.train_config import TrainConfig

    with user_errors():
        config = resumed_config(**options) if resume else TrainConfig.from_preset(**options)
        raise typer.Exit(pretrain(config).exit_status)


@app.command(name="compile")
def compile_(
    target: Annotated[str, typer.Option(help="GPU: sm_80, sm_89, sm_90, sm_100, sm_120 or gfx942.")],
    preset: Annotated[str, typer.Option(help="tiny, 35m, 60m, 130m, 350m, 1b or 7b.")],
    out: Annotated[str, typer.Option(help="Folder for sources, PTX, machine code and kernels.csv.")],
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of weights and activations.")] = "bfloat16",
    tf32: Annotated[bool, typer.Option("--tf32", help="Let float32 products use tensor cores.")] = False,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences of a step. [default: the preset's]")] = None,
    seq: Annotated[int | None, typer.Option(min=1, help="Tokens of a sequence. [default: the preset's]")] = None,
) -> None:
    """Compile the GPU kernels of a preset's training step, on a machine that needs no GPU, and look into them.

    Exit status: 0 every kernel compiled and keeps its values in registers, 1 one spills, 2 a wrong option, or a kernel
    that does not compile.
    """
    from qgalore_compile.ahead_of_time import compile_ahead, table
    from qgalore_compile.kernels.ahead import CompileError

    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    with user_errors():
        try:
            with console.status("tracing the step") as status:
                rows = compile_ahead(
                    preset, target, out, dtype=dtype, tf32=tf32, batch=batch, seq=seq,
                    progress=lambda kernel: status.update(f"compiling {kernel}"),
                )  # fmt: skip
        except CompileError as error:
            _fail(str(error))
        console.print(table(rows, target, preset))
        raise typer.Exit(int(any(row.spills for row in rows)))


def main() -> None:
    """Entry point of the command `qgalore`."""
    app()


if __name__ == "__main__":
    sys.exit(app())
