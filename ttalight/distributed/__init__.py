"""Several processes: collectives that gradients flow through, and BatchNorm over all of them."""

from ttalight.distributed.collectives import average, gather_with_gradients, global_moments, rank_and_world_size

__all__ = ["average", "gather_with_gradients", "global_moments", "rank_and_world_size"]
