"""Fixtures for all tests: one thread, a fixed seed, uninitialized memory filled with NaN, Triton's interpreter."""

import os

import numpy
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are defined, and inherited by ranks


@pytest.fixture(autouse=True)
def reproducible():
    """Seed, use one thread, and fill `torch.empty` with NaN, so that a read before a write becomes visible."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fake_group():
    """A group of two ranks whose collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.fixture
def device() -> str:
    """The device of the kernels: the accelerator, or the CPU under the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def interpreter(device):
    """Kernels run on the CPU."""
    triton = pytest.importorskip("triton")
    if device == "cuda":
        pytest.skip("scripts/gpu_check.py checks this on CUDA")
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version < (3, 7) and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip("the interpreter of Triton 3.6 needs numpy before 2.4")


@pytest.fixture
def triton_launch(request, device):
    """The Triton backend, if it can run here."""
    if device == "cpu":
        request.getfixturevalue("interpreter")
    pytest.importorskip("triton")
    from syncbn.backends import triton_launch

    return triton_launch


@pytest.fixture
def small_tiles(triton_launch, monkeypatch):
    """The Triton backend with tiles so small that little data needs several programs of several tiles each."""
    monkeypatch.setattr(triton_launch, "TILE_ELEMENTS", 64)
    monkeypatch.setattr(triton_launch, "MIN_ROW", 8)
    monkeypatch.setattr(triton_launch, "REDUCE_MIN_TILES", 3)
    monkeypatch.setattr(triton_launch, "MERGE_ELEMENTS", 8)
    monkeypatch.setattr(triton_launch, "MERGE_MIN_SPLITS", 2)
    monkeypatch.setattr(triton_launch, "CHANNELS_PER_PROGRAM", 4)
    monkeypatch.setattr(triton_launch, "multiprocessors_of", lambda device: 1)
    triton_launch.plan.cache_clear()
    yield triton_launch
    triton_launch.plan.cache_clear()
