"""Random numbers: one seed from several numbers, a temporary seed, and the state of all generators."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def mix(*numbers: int) -> int:
    """Return one seed for several numbers, without the collisions of their sum."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 25)
    return seed


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch on every device of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed torch's CPU generator with these numbers within the block, and restore its state afterwards."""
    with torch.random.fork_rng(devices=()):
        # `torch.manual_seed` also seeds every accelerator, which takes longer than an augmentation
        torch.default_generator.manual_seed(mix(*numbers))
        yield


def get_state() -> dict[str, Any]:
    """Return the state of every generator of this process, in types that `torch.load(weights_only=True)` reads."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (str(name), np.array(keys).tolist(), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_state(state: dict[str, Any]) -> None:
    """Restore the state that `get_state` returned."""
    name, keys, *rest = state["numpy"]
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
