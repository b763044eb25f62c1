"""Layers: frozen descriptions with torch.nn's names, fields and initial distributions."""

from functorch_gen.nn.attention import attention
from functorch_gen.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from functorch_gen.nn.cells import GRUCell, LSTMCell, RNNCell
from functorch_gen.nn.conv import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from functorch_gen.nn.dropout import Dropout
from functorch_gen.nn.embedding import Embedding, FourierFeatures, SinusoidalFeatures
from functorch_gen.nn.init import fan_in_uniform, init_affine, xavier_uniform
from functorch_gen.nn.linear import Identity, Linear
from functorch_gen.nn.multihead import MultiHeadAttention
from functorch_gen.nn.norm import GroupNorm, LayerNorm, RMSNorm
from functorch_gen.nn.parts import Bound, draws, init_parts, init_state_parts, is_stateful, name_key
from functorch_gen.nn.recurrent import GRU, LSTM, RNN
from functorch_gen.nn.sequential import MLP, Function, Sequential
from functorch_gen.nn.spectral_norm import SpectralNorm

__all__ = [
    "GRU",
    "LSTM",
    "MLP",
    "RNN",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
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
    "GRUCell",
    "GroupNorm",
    "Identity",
    "LSTMCell",
    "LayerNorm",
    "Linear",
    "MultiHeadAttention",
    "RMSNorm",
    "RNNCell",
    "Sequential",
    "SinusoidalFeatures",
    "SpectralNorm",
    "attention",
    "draws",
    "fan_in_uniform",
    "init_affine",
    "init_parts",
    "init_state_parts",
    "is_stateful",
    "name_key",
    "xavier_uniform",
]
