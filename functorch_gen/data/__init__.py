"""Data as batches that a key determines: order, sampling, augmentation, text, files."""

from functorch_gen.data.augment import affine, cutmix, mixup, random_affine, random_crop, random_erase, random_flip
from functorch_gen.data.epochs import batch_indices, batches, epoch_batches
from functorch_gen.data.images import ImageFolder, image_folder
from functorch_gen.data.loader import TreeDataset, collate, loader
from functorch_gen.data.memory_mapped import create_arrays, open_arrays, save_arrays
from functorch_gen.data.sampling import balanced_weights, weighted_indices
from functorch_gen.data.text import ByteTokenizer, CharTokenizer
from functorch_gen.data.windows import windows

__all__ = [
    "ByteTokenizer",
    "CharTokenizer",
    "ImageFolder",
    "TreeDataset",
    "affine",
    "balanced_weights",
    "batch_indices",
    "batches",
    "collate",
    "create_arrays",
    "cutmix",
    "epoch_batches",
    "image_folder",
    "loader",
    "mixup",
    "open_arrays",
    "random_affine",
    "random_crop",
    "random_erase",
    "random_flip",
    "save_arrays",
    "weighted_indices",
    "windows",
]
