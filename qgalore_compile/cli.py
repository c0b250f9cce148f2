"""The command `qgalore`."""

from __future__ import annotations

import errno
import inspect
import io
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from qgalore_compile.training.config import TrainConfig, settings
from qgalore_compile.training.setting import Setting

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


def _parameter(name: str, setting: Setting) -> inspect.Parameter:
    """Of a function that Typer makes a command of; None is an option that was not given."""
    kind: Any = Literal[setting.key.choices] if setting.key.choices else setting.key.type
    flag = setting.key.type is bool and "/" not in setting.switch
    shown = typer.Option(*filter(None, [setting.switch]), help=setting.help, rich_help_panel=setting.panel)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=False if flag else None,
        annotation=Annotated[kind if flag else kind | None, shown],
    )


def _with_options(of: Mapping[str, Setting]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a function of ``**options`` the signature that Typer reads."""

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        parameters = [_parameter(name, setting) for name, setting in of.items()]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorated


@app.command()
@_with_options(settings())
def train(**options: Any) -> None:
    """Train a LLaMA on bytes of text, and say whether it beats a bigram model.

    Options without a default here take it from the preset, which holds the values of the Q-GaLore paper.

    Exit status: 0 the model beats the bigram model, 1 it does not, 2 a wrong option, unusable data or a machine that
    cannot do it, 70 a bug, 74 a full disk or other output that cannot be written. A run that is stopped is saved after
    the step in progress, to be continued with `--resume`: 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP, 141 a broken pipe.
    """
    with user_errors():
        # Here, not at the top: Dynamo and matplotlib take seconds to import, and --help needs neither.
        from qgalore_compile.training.pretrain import pretrain, resumed_config
        from qgalore_compile.training.stopping import at_once, handled, ignore_broken_pipe

        _print_what_the_encoding_has()
        ignore_broken_pipe()
        with handled(at_once):
            config = resumed_config(**options) if options["resume"] else TrainConfig.from_preset(**options)
            status = pretrain(config).exit_status
        raise typer.Exit(status)


@app.command(name="compile")
def compile_(
    target: Annotated[str, typer.Option(help="GPU: sm_80, sm_89, sm_90, sm_100, sm_120 or gfx942.")],
    preset: Annotated[str, typer.Option(help=settings()["preset"].key.help)],
    out: Annotated[str, typer.Option(help="Folder for sources, PTX, machine code and kernels.csv.")],
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of weights and activations.")] = "bfloat16",
    tf32: Annotated[bool, typer.Option("--tf32", help="Let float32 products use tensor cores.")] = False,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences of a step. [default: the preset's]")] = None,
    seq: Annotated[int | None, typer.Option(min=1, help="Tokens of a sequence. [default: the preset's]")] = None,
    weight_format: Annotated[str | None, typer.Option(help=settings()["weight_format"].help)] = None,
    projector_format: Annotated[str | None, typer.Option(help=settings()["projector_format"].help)] = None,
    moments: Annotated[str | None, typer.Option(help=settings()["moments"].help)] = None,
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
                        preset,
                        target,
                        out,
                        dtype=dtype,
                        tf32=tf32,
                        batch=batch,
                        seq=seq,
                        weight_format=weight_format,
                        projector_format=projector_format,
                        moments=moments,
                        progress=lambda kernel: status.update(f"compiling {kernel}"),
                    )
            except CompileError as error:
                _fail(str(error))
            console.print(table(rows, target, preset))
        raise typer.Exit(int(any(row.spills for row in rows)))


@app.command()
def plan(
    preset: Annotated[str, typer.Option(help=settings()["preset"].key.help)],
    batch: Annotated[int | None, typer.Option(help="Sequences of a micro-batch. [default: the preset's]")] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens of a sequence. [default: the preset's]")] = None,
    budget: Annotated[str | None, typer.Option(help="Memory to keep to, such as 16GB: what to change is said.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of weights and activations.")] = "bfloat16",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where the step would run.")] = "cuda",
    vocab_size: Annotated[int | None, typer.Option(help=settings()["vocab_size"].help)] = None,
    tied: Annotated[bool, typer.Option("--tied", help="Share embedding and head.")] = False,
    rank: Annotated[int | None, typer.Option(help=settings()["rank"].help)] = None,
    rule: Annotated[str | None, typer.Option(help=settings()["rule"].help)] = None,
    weight_format: Annotated[str | None, typer.Option(help=settings()["weight_format"].help)] = None,
    projector_format: Annotated[str | None, typer.Option(help=settings()["projector_format"].help)] = None,
    moments: Annotated[str | None, typer.Option(help=settings()["moments"].help)] = None,
    nonfinite: Annotated[str | None, typer.Option(help=settings()["nonfinite"].help)] = None,
    plot: Annotated[str | None, typer.Option(help="Draw it into this .png or .svg.")] = None,
) -> None:
    """Say what training a preset would take in memory, beside other ways to train it, without making the model.

    Weights and states are exact, activations a model of what the compiler stores, the process an estimate.

    Exit status: 0 it keeps to the budget, 1 it does not, 2 a wrong option, 70 a bug.
    """
    options = dict(locals())  # first statement: the parameters above, most of which are TrainConfig's
    with user_errors():
        from qgalore_compile.training.forecast import forecast

        options.pop("plot")
        found = forecast(TrainConfig.from_preset(**{**options, "tied": tied or None}), compare=True)
        for line in found.lines():
            typer.echo(line)
        if plot is not None:
            found.plot(plot)
        raise typer.Exit(int(budget is not None and not found.fits))


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
