"""Does `triton_launch.launch` start the binary that Triton would choose, with the same arguments? No GPU is needed.

    python tests/kept_binaries.py        # the number of launches compared; not under TRITON_INTERPRET

A driver that launches nothing stands in for CUDA's, and nothing is compiled: only Triton's choice is compared.
"""

import itertools
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

started: list[tuple[Any, ...]] = []  # binary, grid, arguments


class Binary(CompiledKernel):
    """What Triton returns for a choice; it records its launches."""

    def __init__(self, source: Any, **_: Any) -> None:
        self.src, self.name, self.module, self.function, self.packed_metadata = source, "", 1, self, None
        self._run = lambda x, y, z, stream, function, metadata, launch, enter, leave, *rest: started.append(
            (self, (x, y, z), rest)
        )


class Driver:
    """Device 0 of CUDA."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def same(a: Any, b: Any) -> bool:
    return a is b or (not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor) and a == b)


def compare(launch: Any, kernel: Any, grid: tuple[int, int], *arguments: Any, **constexprs: Any) -> int:
    """Launch twice, and once through Triton's own search; return 1 if a kept binary was started."""
    before = len(triton_launch._binaries)
    launch(kernel, grid, *arguments, **constexprs)
    is_kept = len(triton_launch._binaries) == before
    launch(kernel, grid, *arguments, **constexprs)
    kernel[grid](*arguments, **constexprs)
    *ours, (binary, size, rest) = started[-3:]
    for own, own_size, own_rest in ours:
        assert own is binary, f"{kernel.__name__}: another binary for {arguments} {constexprs}"
        assert own_size == size
        assert len(own_rest) == len(rest)
        assert all(same(*pair) for pair in zip(own_rest, rest, strict=True)), f"{own_rest} != {rest}"
    return is_kept


def training_pass(x: torch.Tensor, parameter: torch.dtype, turn: int) -> None:
    """Run the ops with options that depend on `turn`, and views that start in the middle of their storage."""

    def per_channel(offset: int) -> torch.Tensor:
        return torch.ones(x.shape[1] + offset, dtype=parameter)[offset:]

    weight, bias = (None if turn // bit % 2 else per_channel(turn % 3 if turn % 8 > 3 else 0) for bit in (1, 2))
    batches = torch.zeros((), dtype=torch.int64) if turn % 5 else None
    running = Running(per_channel(0), per_channel(turn % 2), batches, None if turn % 3 == 0 else 0.1)
    mask = torch.ones(x.shape[0], 1, *x.shape[2:], dtype=torch.bool) if turn % 2 else None
    residual = torch.ones_like(x) if turn % 3 else None
    epilogue = Epilogue(residual, mask, ("relu", "silu", "identity")[turn % 3])
    packed = triton_launch.pack_stats(x, mask)
    eps = (1e-5, 0, 1e-3)[turn % 3]  # 0 is an int
    _, count, channels = triton_launch.normalize(
        x, packed, weight, bias, epilogue, eps=eps, ranks=1, running=None if turn % 7 == 6 else running
    )
    output_mask = OutputMask(weight=turn % 2 == 0, bias=True, dy=residual is not None)
    grad_output = torch.ones(x.numel() + 1, dtype=x.dtype)[turn % 2 :][: x.numel()].as_strided(x.shape, x.stride())
    reduced = triton_launch.backward_reduce(grad_output, x, channels, epilogue, output_mask)
    triton_launch.backward_elemt(grad_output, x, channels, epilogue, reduced, count=count)


if __name__ == "__main__":
    driver.set_active(Driver())
    triton.compiler.compile = Binary

    from syncbn.backends import triton_launch
    from syncbn.statistics import Epilogue, OutputMask, Running

    original, total, kept = triton_launch.launch, 0, 0

    def counted(*arguments: Any, **constexprs: Any) -> None:
        global total, kept
        kept += compare(original, *arguments, **constexprs)
        total += 1

    triton_launch.launch = counted
    shapes = ((2, 8, 4, 4), (3, 5, 7), (4, 16), (2, 1, 3, 3), (16, 2048), (1, 3, 300, 300), (8, 6, 2, 2, 2))
    dtypes = ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float16))
    for turn, (shape, (dtype, parameter), offset) in enumerate(itertools.product(shapes, dtypes, (0, 1, 8))):
        for channels_last in (False, True):
            x = torch.ones(torch.Size(shape).numel() + offset, dtype=dtype)[offset:].view(shape)
            if channels_last:
                x = x.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
            training_pass(x, parameter, turn + channels_last)
    print(total, kept)
