"""Training: one readable loop for any model of the protocol."""

from infini.train.loop import train
from infini.train.settings import TrainSettings

__all__ = ["TrainSettings", "train"]
