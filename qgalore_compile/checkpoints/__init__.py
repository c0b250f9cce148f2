"""Models and training from files, and back: other people's checkpoints, and one's own to go on from.

====================  =================================================================================================
file                  what it does
====================  =================================================================================================
pretrained.py         ``qg.load_pretrained``: a float checkpoint streamed into a quantised model
saved.py              ``qg.save``, ``qg.load``: a model and its optimizer in one file, to go on from bit for bit
other_optimizers.py   optimizers of PyTorch and of others, loaded whole or not at all
tree.py               nested values as JSON and tensors, and back
====================  =================================================================================================
"""

from qgalore_compile.checkpoints.pretrained import load_pretrained
from qgalore_compile.checkpoints.saved import load, save

__all__ = ["load", "load_pretrained", "save"]
