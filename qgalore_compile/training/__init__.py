"""``qgalore train`` and ``qgalore compile``.

====================  =================================================================================================
file                  what it does
====================  =================================================================================================
pretrain.py           the loop: steps, evaluation, checkpoints, Ctrl-C
run.py                model, optimizer and the compiled step of a run
config.py             what a run is asked to be; presets
setting.py            how a field of that is declared, checked, and shown as an option
llama.py              a LLaMA in plain PyTorch
data.py               bytes of a corpus
telemetry.py          progress, metrics, curves
first_step.py         the stages of the first step, as they are compiled
forecast.py           what a run will hold, told before it starts
schedule_plot.py      a picture of the refreshes
checkpoint_file.py    a checkpoint, verified whole before it is believed
saved_run.py          whether a run can go on from it
stopping.py           what ends a run from outside
machine.py            whether a machine can do it at all
ahead_of_time.py      a preset's kernels for a GPU, as a table
====================  =================================================================================================
"""
