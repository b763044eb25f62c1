"""Layers: frozen descriptions with torch.nn's names, fields and initial distributions."""

from functorch_gen.nn.attention import MultiHeadAttention, attention
from functorch_gen.nn.conv import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from functorch_gen.nn.dropout import Dropout
from functorch_gen.nn.embedding import Embedding, FourierFeatures, SinusoidalFeatures
from functorch_gen.nn.init import fan_in_uniform, init_affine, xavier_uniform
from functorch_gen.nn.linear import Identity, Linear
from functorch_gen.nn.norm import GroupNorm, LayerNorm, RMSNorm
from functorch_gen.nn.parts import Bound, draws, init_parts, init_state_parts, name_key
from functorch_gen.nn.sequential import MLP, Function, Sequential

__all__ = [
    "MLP",
    "Bound",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Dropout",
    "Embedding",
    "FourierFeatures",
    "Function",
    "GroupNorm",
    "Identity",
    "LayerNorm",
    "Linear",
    "MultiHeadAttention",
    "RMSNorm",
    "Sequential",
    "SinusoidalFeatures",
    "attention",
    "draws",
    "fan_in_uniform",
    "init_affine",
    "init_parts",
    "init_state_parts",
    "name_key",
    "xavier_uniform",
]
