"""``qgalore train`` as a function: ``pretrain(TrainConfig(preset="tiny"))`` does what the command does."""

from qgalore_compile.training.config import TrainConfig
from qgalore_compile.training.pretrain import pretrain

__all__ = ["TrainConfig", "pretrain"]
