"""Networks: each takes parameters and tensors, and knows nothing of the objective it is trained with."""

from functorch_gen.models.unet import Remat, ResBlock, SpatialAttention, Stage, UNet, check_labels, drop_labels

__all__ = ["Remat", "ResBlock", "SpatialAttention", "Stage", "UNet", "check_labels", "drop_labels"]
