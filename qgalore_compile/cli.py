"""The command `qgalore`."""

from __future__ import annotations

import errno
import io
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from typing import Annotated, Literal

import typer
from rich.console import Console

USER_ERROR = 2
BUG, CANNOT_WRITE = 70, 74  # sysexits' EX_SOFTWARE and EX_IOERR

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
    """End with what the user can repair as one red line and its exit status; a bug keeps its traceback.

    A ValueError counts as the user's if this package raised it: its messages are written for that.
    """
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt as stopped:
        name = getattr(stopped, "signal", "SIGINT")
        _say(f"stopped at once by {name}; the last checkpoint, if any, is as it was")
        raise typer.Exit(128 + signal.Signals[name]) from None
    except Exception as error:
        found = next((found for each in _chain(error) if (found := _in_words(each)) is not None), None)
        if found is None:
            _say(traceback.format_exc() + "\nthis is a bug of qgalore-compile, which the lines above tell of")
            raise typer.Exit(BUG) from None
        status, words = found
        _fail(words, status)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised from: compilers wrap what stopped them."""
    seen: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in seen:
        yield at
        seen.append(at)
        at = getattr(at, "inner_exception", None) or at.__cause__


def _in_words(error: BaseException) -> tuple[int, str] | None:
    """Exit status and sentence for what is no bug; by name where a class would have to be imported with torch."""
    classes = {each.__name__ for each in type(error).__mro__}
    text = str(error).split("\n\n")[0].strip()
    if isinstance(error, OSError):  # no such file, no permission, disk full
        if error.errno == errno.EPIPE:
            return 128 + signal.SIGPIPE, "the output cannot be written (Broken pipe)"
        named = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else text
        return (CANNOT_WRITE if "SavingError" in classes or error.errno in _NO_ROOM else USER_ERROR), named
    if isinstance(error, MemoryError) or "OutOfMemoryError" in classes or any(sign in text for sign in _NO_MEMORY):
        return USER_ERROR, f"not enough memory ({text.splitlines()[0] if text else 'no words'}); take less at a time"
    if isinstance(error, ValueError) and _raised_here(error):
        return USER_ERROR, text
    if "InvalidCxxCompiler" in classes or ("ShortenTraceback" in classes and _is_ours(type(error).__module__)):
        return USER_ERROR, text  # no compiler; an error that this package's backend hands through Dynamo
    return None


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_NO_MEMORY = ("DefaultCPUAllocator: ", "CUDA out of memory", "can't allocate memory")


def _raised_here(error: ValueError) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and _is_ours(frames[-1].f_globals.get("__name__", ""))


def _is_ours(module: str) -> bool:
    return module.split(".")[0] == "qgalore_compile"


def _say(message: str) -> None:
    with suppress(OSError, SystemExit):  # nobody takes it: the exit status still tells
        Console(stderr=True).print(message, style="red", soft_wrap=True, markup=False, highlight=False)


def _fail(message: str, status: int = USER_ERROR) -> None:
    _say(f"error: {message}")
    raise typer.Exit(status)


def _print_what_the_encoding_has() -> None:
    """A terminal or a pipe that is not UTF-8 gets question marks, and no traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


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

    Exit status: 0 the model beats the bigram model, 1 it does not, 2 a wrong option, unusable data or a machine that
    cannot do it, 70 a bug, 74 a full disk or other output that cannot be written. A run that is stopped is saved after
    the step in progress, to be continued with `--resume`: 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP, 141 a broken pipe.
    """
    options = dict(locals())  # first statement: exactly the parameters above, which are the fields of TrainConfig
    with user_errors():
        # Here, not at the top: Dynamo and matplotlib take seconds to import, and --help needs neither.
        from qgalore_compile.training.config import TrainConfig
        from qgalore_compile.training.pretrain import pretrain, resumed_config
        from qgalore_compile.training.stopping import at_once, handled, ignore_broken_pipe

        _print_what_the_encoding_has()
        ignore_broken_pipe()
        with handled(at_once):
            config = resumed_config(**options) if resume else TrainConfig.from_preset(**options)
            status = pretrain(config).exit_status
        raise typer.Exit(status)


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
    that does not compile, 70 a bug, 130 stopped by Ctrl-C.
    """
    with user_errors():
        from qgalore_compile.kernels.triton.ahead import CompileError
        from qgalore_compile.training.ahead_of_time import compile_ahead, table
        from qgalore_compile.training.stopping import at_once, handled

        console = Console()
        if not console.is_terminal:
            console = Console(width=180)
        with handled(at_once):
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


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="Folder of a run: --out of `qgalore train`.")],
    out: Annotated[str, typer.Argument(help="Folder to write, or one file, if it ends in .safetensors.")],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of what is stored as floats.")
    ] = "bfloat16",
    bits: Annotated[int | None, typer.Option(help="4: codes for the blocks' linear layers. [default: floats]")] = None,
    group_size: Annotated[int, typer.Option(help="Elements of a row that share a scale and an offset.")] = 128,
    compensation: Annotated[
        Literal["lorc", "eora"] | None,
        typer.Option(help="A low-rank product for what the codes lose: nearest to the error, or weighed by inputs."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of that product.")] = None,
    data: Annotated[str | None, typer.Option(help="Text to calibrate eora on. [default: the run's own]")] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Of that text, for calibration.")] = 128,
    max_shard_size: Annotated[str, typer.Option(help="Of one file in a folder, as 5GB or 500MiB.")] = "5GB",
) -> None:
    """Write the model of a run as safetensors, for `LlamaForCausalLM.from_pretrained` or, with `--bits 4`, as codes.

    Exit status: 0 it is written, 2 a wrong option, no run there or files in the way, 70 a bug, 74 a full disk, 130
    stopped by Ctrl-C.
    """
    options = dict(locals())  # first statement: the parameters above, which are those of export_run
    with user_errors():
        from qgalore_compile.exports.run_folder import export_run

        for path in export_run(options.pop("run"), options.pop("out"), **options):
            typer.echo(f"{path}  {path.stat().st_size / 1e6:,.2f} MB")


def main() -> None:
    """Entry point of the command `qgalore`."""
    _print_what_the_encoding_has()
    app()


if __name__ == "__main__":
    main()
