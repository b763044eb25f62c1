"""Batches of examples in an order that a key determines."""

from functorch_gen.data.epochs import batch_indices, batches

__all__ = ["batch_indices", "batches"]
