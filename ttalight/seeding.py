"""Seeds for random draws that are keyed by what they are for, not by what was drawn before."""

from __future__ import annotations

import hashlib
import os

import torch

__all__ = ["derive_seed", "global_generators", "global_seed"]


def derive_seed(*key: int | str) -> int:
    """Return a 63-bit seed that depends on every part of a key.

    Draws keyed this way are the same whatever ran before them, so methods share views, ranks agree and a resumed run
    repeats the uninterrupted one.

    Args:
        key: Integers and strings, for example ``(seed, "view", domain, batch, step)``.

    Returns:
        An integer in [0, 2**63).
    """
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def global_seed() -> int:
    """Return the seed that ``seed_everything`` set, the same on every process; 0 where none was set."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def global_generators(device: torch.device) -> list[torch.Generator]:
    """Return the global generators that networks on a device draw from."""
    if device.type != "cuda":
        return [torch.default_generator]
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[index]]
