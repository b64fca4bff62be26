"""What every test shares: one thread, a fixed seed, and uninitialized memory filled with NaN."""

import pytest
import torch


@pytest.fixture(autouse=True)
def reproducible():
    """Seed, use one thread, and have `torch.empty` return NaN so that a read before a write shows."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
