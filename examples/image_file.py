"""Images of your own, from an .npz file, checked before a model is trained on them."""

import numpy as np
import torch
from torch import Tensor

import functorch_gen as fg


def load(path: str) -> dict[str, Tensor]:
    """Images (n, c, h, w), float32, and labels (n,) of the arrays ``images`` and ``labels``."""
    with np.load(path) as file:
        missing = {"images", "labels"} - set(file)
        if missing:
            raise KeyError(f"images: expected arrays images and labels in {path}, got no {missing.pop()}")
        data = {"image": torch.from_numpy(file["images"]).float(), "label": torch.from_numpy(file["labels"]).long()}
    if data["image"].ndim != 4 or len(data["image"]) != len(data["label"]):
        got = tuple(data["image"].shape), tuple(data["label"].shape)
        raise ValueError(f"images: expected shapes (n, c, h, w) and (n,) in {path}, got {got}")
    fg.train.check_data(data, name=path)
    return data
