"""Train a LLaMA with Q-GaLore, the whole step compiled as one graph: what `qgalore train` does.

    python examples/pretrain.py                                    # preset tiny, on the standard library's source
    python examples/pretrain.py --preset 60m --data my_texts/
    python examples/pretrain.py --optimizer adamw --backend eager  # the full-rank baseline
    python examples/pretrain.py --help

The pieces, for a program of your own, are in `qgalore_compile.training`: `.pretrain` (the loop, checkpoints, Ctrl-C),
`.run` (model, optimizer and the compiled step), `.data`, `.llama`, `.telemetry`; `own_step.py` beside this file is the
shortest form.
"""

import typer

from qgalore_compile.cli import train

if __name__ == "__main__":
    typer.run(train)
