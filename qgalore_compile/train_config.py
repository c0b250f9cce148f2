"""What ``qgalore_compile.pretrain.pretrain`` takes, under the name that programs know it by."""

from qgalore_compile.training.config import TrainConfig

__all__ = ["TrainConfig"]
