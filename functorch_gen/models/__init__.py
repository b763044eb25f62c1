"""Networks: each takes parameters and tensors, and knows nothing of the objective it is trained with."""

from functorch_gen.models.cnn import CNN, BasicBlock, ConvBlock
from functorch_gen.models.gpt import GPT, GPTBlock
from functorch_gen.models.labels import check_labels, drop_labels
from functorch_gen.models.lstm import LSTMModel
from functorch_gen.models.unet import Remat, ResBlock, SpatialAttention, Stage, UNet

__all__ = [
    "CNN",
    "GPT",
    "BasicBlock",
    "ConvBlock",
    "GPTBlock",
    "LSTMModel",
    "Remat",
    "ResBlock",
    "SpatialAttention",
    "Stage",
    "UNet",
    "check_labels",
    "drop_labels",
]
