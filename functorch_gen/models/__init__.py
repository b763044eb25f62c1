"""Networks: each takes parameters and tensors, and knows nothing of the objective it is trained with."""

from functorch_gen.models.autoencoder import Autoencoder, ConvAutoencoder, EncoderDecoder
from functorch_gen.models.cnn import CNN, BasicBlock, ConvBlock
from functorch_gen.models.dcgan import DCGANDiscriminator, DCGANGenerator, PlainResBlock
from functorch_gen.models.gpt import GPT, GPTBlock
from functorch_gen.models.labels import check_labels, drop_labels
from functorch_gen.models.lstm import LSTMModel
from functorch_gen.models.resnet import ResNet
from functorch_gen.models.transformer import TransformerBlock
from functorch_gen.models.unet import Remat, ResBlock, SpatialAttention, Stage, UNet
from functorch_gen.models.vit import ViT

__all__ = [
    "CNN",
    "GPT",
    "Autoencoder",
    "BasicBlock",
    "ConvAutoencoder",
    "ConvBlock",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "EncoderDecoder",
    "GPTBlock",
    "LSTMModel",
    "PlainResBlock",
    "Remat",
    "ResBlock",
    "ResNet",
    "SpatialAttention",
    "Stage",
    "TransformerBlock",
    "UNet",
    "ViT",
    "check_labels",
    "drop_labels",
]
