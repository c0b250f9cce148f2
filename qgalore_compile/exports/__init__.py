"""``qg.export``: a trained model as safetensors, in float or in 4 bits with low-rank compensation of the error.

====================  =================================================================================================
file                  what it does
====================  =================================================================================================
model.py              ``export``: what is asked, refused or planned, before anything is written
tensors.py            the tensors of a model, each once; what has no form in a file
safetensors_file.py   safetensors written one weight at a time, in shards, with their index
quantised.py          the names and the description of a 4-bit file; ``load_quantised``
low_rank.py           ``lorc`` and ``eora``: a low-rank product in the place of an error
calibration.py        second moments of the inputs of linear layers
run_folder.py         ``qgalore export``: the model in the folder of a run
====================  =================================================================================================
"""

from qgalore_compile.exports.low_rank import LowRank, eora, lorc
from qgalore_compile.exports.model import export
from qgalore_compile.exports.quantised import load_quantised

__all__ = ["LowRank", "eora", "export", "load_quantised", "lorc"]
