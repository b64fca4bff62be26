"""The ops on CUDA: four kernel launches forward, three backward. Layout, block sizes, grids and memory.

Forward reads x twice and writes y, backward reads x and grad_output twice and writes grad_input; the activation's
gradient is computed again in both backward kernels. No value is read back, so a CUDA graph can hold all of it.
`coefficients` are the float32 rows that `triton_kernels` describes, (5, C).
"""

import warnings
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton
from torch import Tensor
from torch.nn import Parameter

from syncbn.backends import triton_kernels
from syncbn.statistics import (
    Channels,
    Epilogue,
    OutputMask,
    Reduced,
    Running,
    match_layout,
    rounding_of_variance,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILE_ELEMENTS = 4096  # 16 per thread: two to four accesses of 16 bytes; half as many if accesses are narrow
TILE_WARPS = 8
TILE_STAGES = 1  # tiles in flight through shared memory; 1: directly into registers
ALIGNS = (8, 4, 2, 1)  # values per access; 4 at most for channels last, because each channel has its coefficients
NARROW = 4
MIN_ROW = 128  # least number of positions per channel in a tile, if there are as many
MAX_IDLE = 1.15  # lanes per value, up to which a block size is preferred over a smaller one
MERGE_ELEMENTS, MERGE_MIN_SPLITS = 1024, 128
CHANNELS_PER_PROGRAM = 256  # in gather_stats_kernel

# Per multiprocessor, which holds about four of these programs at a time.
REDUCE_PROGRAMS, REDUCE_MIN_TILES = 16, 4
ELEMT_PROGRAMS, ELEMT_MAX_TILES = 8, 8
MAX_GRID_Y = 65535
INT32_OFFSETS = INT32_SIZES = 2**31
ALIGNMENT = 16  # bytes; Triton builds other binaries for addresses that are no multiples of it
EXACT_COUNT = 2**24  # the count of a program is a float32

_binaries: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}  # of `launch`, with the constants in order


class Plan(NamedTuple):
    """Block sizes and grids for activations of one shape and layout."""

    sizes: tuple[int, int, int]  # N, C_units, S_units
    constexprs: dict[str, Any]
    reduce_grid: tuple[int, int]  # blocks of channels, splits
    reduce_tiles: int  # per program
    merge_grid: tuple[int, int]  # of the results of those programs
    merge_constexprs: dict[str, int]
    elemt_grid: tuple[int, int]
    elemt_tiles: int


def supports(x: Tensor) -> bool:
    """Return whether the kernels support x: float32 or half precision, contiguous or channels last."""
    is_plain = type(x) in (Tensor, torch.nn.Parameter) and x.dtype in DTYPES
    return is_plain and (x.is_contiguous() or _is_channels_last(x))


@lru_cache
def can_run(device: torch.device) -> bool:
    """Return whether a kernel can be built (with a C compiler) and launched on the device; if not, warn once.

    Only that is remembered: being out of memory is raised, on any rank, and the next call tries again. The other ranks
    run what they can: backends agree up to rounding.
    """
    try:
        packed = torch.zeros(3, dtype=torch.float64, device=device)
        gather_stats(packed, None, None, eps=1.0, ranks=1, running=None)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):  # Triton has no class for it
            raise
        reason = f"{type(error).__name__}: {error}".strip().split("\n")[0]
        rank = f"rank {dist.get_rank()}: " if dist.is_available() and dist.is_initialized() else ""
        warnings.warn(
            f"{rank}syncbn runs in plain PyTorch on {device}, Triton launches no kernels ({reason})", stacklevel=2
        )
        return False
    return True


def pack_stats(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the vector of this rank for the all-reduce, (2C + 1,) float64."""
    C = x.shape[1]
    if x.numel() == 0:
        return torch.zeros(2 * C + 1, dtype=torch.float64, device=x.device)
    plan = _plan_of(x)
    splits = plan.reduce_grid[1]
    packed = torch.empty(2 * C + 1, dtype=torch.float64, device=x.device)
    partials = torch.empty(splits, 3 * C + 1, dtype=torch.float32, device=x.device)
    launch(
        triton_kernels.stats_kernel,
        plan.reduce_grid,
        x, _flat_mask(mask, x), partials, *plan.sizes, plan.reduce_tiles,
        **plan.constexprs,
    )  # fmt: skip
    launch(triton_kernels.merge_stats_kernel, plan.merge_grid, partials, packed, C, splits, **plan.merge_constexprs)
    return packed


def normalize(
    x: Tensor,
    packed: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    epilogue: Epilogue,
    *,
    eps: float,
    ranks: int,
    running: Running | None,
) -> tuple[Tensor, Tensor, Channels]:
    """Return the output, the count of the group and the per-channel values; move the running statistics."""
    count, channels = gather_stats(packed, weight, bias, eps=eps, ranks=ranks, running=running)
    return elemt(x, channels, epilogue), count, channels


def gather_stats(
    packed: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, ranks: int, running: Running | None
) -> tuple[Tensor, Channels]:
    """Return the count of the group and the per-channel values; move the running statistics."""
    C = packed.shape[0] // 2
    mean, invstd = (torch.empty(C, dtype=torch.float64, device=packed.device) for _ in range(2))
    count = torch.empty((), dtype=torch.float64, device=packed.device)
    coefficients = torch.empty(5, C, dtype=torch.float32, device=packed.device)
    parameters = [None if parameter is None else parameter.contiguous() for parameter in (weight, bias)]
    buffers = [] if running is None else [tensor for tensor in running[:3] if tensor is not None]
    moved = [buffer.contiguous() for buffer in buffers]
    momentum = 0.0 if running is None else running.momentum or 0.0
    is_cumulative = running is not None and running.momentum is None and running.num_batches_tracked is not None
    launch(
        triton_kernels.gather_stats_kernel,
        (triton.cdiv(C, CHANNELS_PER_PROGRAM), 1),
        packed, mean, invstd, count, coefficients, *parameters, *moved, *[None] * (3 - len(moved)),
        eps, rounding_of_variance(ranks), momentum, C,
        CUMULATIVE=is_cumulative, BLOCK_C=CHANNELS_PER_PROGRAM,
    )  # fmt: skip
    torch.autograd.graph.increment_version(
        [buffer for buffer, own in zip(buffers, moved, strict=True) if own is buffer]
    )
    for buffer, own in zip(buffers, moved, strict=True):
        if own is not buffer:
            buffer.copy_(own)
    if is_cumulative:  # every program reads the number of batches, so none may write it
        assert running is not None
        assert running.num_batches_tracked is not None
        running.num_batches_tracked.add_(count > 1)
    return count, Channels(mean, invstd, weight, bias, coefficients)


def elemt(x: Tensor, channels: Channels, epilogue: Epilogue) -> Tensor:
    """Return the output, like x."""
    y = torch.empty_like(x)
    if x.numel():
        plan = _plan_of(x)
        launch(
            triton_kernels.elemt_kernel,
            plan.elemt_grid,
            x, _like(epilogue.residual, x), _flat_mask(epilogue.mask, x), channels.coefficients, y,
            *plan.sizes, plan.elemt_tiles,
            ACTIVATION=epilogue.activation, **plan.constexprs,
        )  # fmt: skip
    return y


def backward_reduce(
    grad_output: Tensor, x: Tensor, channels: Channels, epilogue: Epilogue, output_mask: OutputMask
) -> Reduced:
    """Return the sums of this rank and what is selected; dy only if it is selected."""
    C = x.shape[1]
    is_copy = epilogue.activation == "identity" and epilogue.mask is None  # dy is grad_output
    dy = torch.empty_like(x) if output_mask.dy and not is_copy else None
    y = torch.empty_like(x) if output_mask.y else None
    make = torch.empty if x.numel() else torch.zeros
    sums = make(2 * C + 1, dtype=torch.float64, device=x.device)
    grad_weight, grad_bias = (
        make(C, dtype=parameter.dtype, device=x.device) if is_needed and parameter is not None else None
        for parameter, is_needed in ((channels.weight, output_mask.weight), (channels.bias, output_mask.bias))
    )
    if x.numel():
        plan, coefficients = _plan_of(x), channels.coefficients
        splits = plan.reduce_grid[1]
        partials = torch.empty(splits, 2 * C, dtype=torch.float32, device=x.device)
        launch(
            triton_kernels.backward_reduce_kernel,
            plan.reduce_grid,
            _like(grad_output, x), x, _like(epilogue.residual, x), _flat_mask(epilogue.mask, x), coefficients, dy,
            y, partials, *plan.sizes, plan.reduce_tiles,
            ACTIVATION=epilogue.activation, **plan.constexprs,
        )  # fmt: skip
        launch(
            triton_kernels.merge_sums_kernel,
            plan.merge_grid,
            partials, coefficients, sums, grad_weight, grad_bias, C, splits,
            **plan.merge_constexprs,
        )  # fmt: skip
    return Reduced(sums, grad_weight, grad_bias, grad_output if output_mask.dy and is_copy else dy, y)


def backward_elemt(
    grad_output: Tensor, x: Tensor, channels: Channels, epilogue: Epilogue, reduced: Reduced, *, count: Tensor
) -> Tensor:
    """Return the gradient of x, like x; from dy if `backward_reduce` has written it."""
    grad_input = torch.empty_like(x)
    if reduced.dy is not None:
        grad_output, epilogue = reduced.dy, Epilogue(mask=epilogue.mask)
    if x.numel():
        plan = _plan_of(x)
        launch(
            triton_kernels.backward_elemt_kernel,
            plan.elemt_grid,
            _like(grad_output, x), x, _like(epilogue.residual, x), _flat_mask(epilogue.mask, x), channels.coefficients,
            count, reduced.sums, grad_input, *plan.sizes, plan.elemt_tiles,
            ACTIVATION=epilogue.activation, **plan.constexprs,
        )  # fmt: skip
    return grad_input


@lru_cache(maxsize=1024)
def plan(N: int, C: int, S: int, *, channels_last: bool, multiprocessors: int) -> Plan:
    """Choose block sizes and grids for (N, C, S), or for (S, C) if channels are adjacent in memory.

    Tiles are long in the direction that is contiguous in memory. A reduction uses few programs, because each writes 2C
    numbers; an elementwise op uses many short ones, so that the last wave of programs is short.
    """
    inner = C if channels_last else S
    align = next(size for size in ALIGNS if inner % size == 0 and (size <= NARROW or not channels_last))
    align_c, align_s = (align, 1) if channels_last else (1, align)
    elements = TILE_ELEMENTS if align >= NARROW else TILE_ELEMENTS // 2  # an address for each value takes registers
    if channels_last:
        block_c = min(triton.next_power_of_2(C), 64)
        block_s = elements // block_c
    else:
        block_s = _row(S, elements)
        block_c = min(elements // block_s, triton.next_power_of_2(C))
    c_blocks, tiles = triton.cdiv(C, block_c), N * triton.cdiv(S, block_s)
    splits = min(triton.cdiv(REDUCE_PROGRAMS * multiprocessors, c_blocks), triton.cdiv(tiles, REDUCE_MIN_TILES))
    reduce_tiles = min(triton.cdiv(tiles, splits), EXACT_COUNT // block_s)
    elemt_tiles = min(max(c_blocks * tiles // (ELEMT_PROGRAMS * multiprocessors), 1), ELEMT_MAX_TILES)
    elemt_tiles = max(elemt_tiles, triton.cdiv(tiles, MAX_GRID_Y))
    constexprs = {
        "ALIGN_C": align_c,
        "ALIGN_S": align_s,
        "CHANNELS_LAST": channels_last,
        "INT64": N * C * S + TILE_ELEMENTS * max(C, S) >= INT32_OFFSETS,  # some past the end are computed, not used
        "BLOCK_C": block_c,
        "BLOCK_S": block_s,
        "STAGES": TILE_STAGES,
        "num_warps": TILE_WARPS,
    }
    splits = triton.cdiv(tiles, reduce_tiles)
    return Plan(
        (N, C // align_c, S // align_s),
        constexprs,
        (c_blocks, splits),
        reduce_tiles,
        *_merge_blocks(C, splits),
        (c_blocks, triton.cdiv(tiles, elemt_tiles)),
        elemt_tiles,
    )


def _row(S: int, elements: int) -> int:
    """Return the number of positions per channel in a tile: large, but with few idle lanes at the end of a sample."""
    whole = triton.next_power_of_2(S)
    sizes = [size for size in (2**k for k in range(elements.bit_length() - 1, -1, -1)) if size <= whole]
    sizes = [size for size in sizes if size >= MIN_ROW] or sizes[:1]
    idle = {size: triton.cdiv(S, size) * size / S for size in sizes}
    return next((size for size in sizes if idle[size] <= MAX_IDLE), min(sizes, key=idle.__getitem__))


def _merge_blocks(C: int, splits: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid and block sizes of the kernels that merge the results of programs.

    The more results per channel, the fewer channels per program: with few programs the rest of the GPU is idle.
    """
    block_k = min(max(triton.next_power_of_2(splits), MERGE_MIN_SPLITS), MERGE_ELEMENTS)
    block_c = min(triton.next_power_of_2(C), MERGE_ELEMENTS // block_k)
    return (triton.cdiv(C, block_c), 1), {"BLOCK_C": block_c, "BLOCK_K": block_k}


def _plan_of(x: Tensor) -> Plan:
    return _plan_for(x.shape, x.stride(), x.device)


@lru_cache(maxsize=1024)
def _plan_for(shape: torch.Size, stride: tuple[int, ...], device: torch.device) -> Plan:
    N, C = shape[:2]
    positions = shape.numel() // C
    multiprocessors = multiprocessors_of(device)
    if C == 1:
        return plan(1, 1, positions, channels_last=False, multiprocessors=multiprocessors)
    if _is_channels_last(torch.empty_strided(shape, stride, device="meta")):
        return plan(1, C, positions, channels_last=True, multiprocessors=multiprocessors)
    return plan(N, C, positions // N, channels_last=False, multiprocessors=multiprocessors)


@lru_cache
def multiprocessors_of(device: torch.device) -> int:
    """Return the number of multiprocessors; that of an H100 for a device without any."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _is_channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.movedim(1, -1).is_contiguous()


def _like(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    return None if tensor is None else match_layout(tensor, x)


def _flat_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    if mask is None:
        return None
    return mask.expand(x.shape[0], 1, *x.shape[2:]).contiguous().view(torch.uint8)


def launch(kernel: Any, grid: tuple[int, int], *arguments: Any, **constexprs: Any) -> None:
    """Launch a kernel on the device of its first argument; every launch of this module goes through here.

    At each call Triton searches a binary for the types and constants of all arguments, for longer than most kernels
    run. Binaries are therefore kept by what selects them: device, dtypes, constants, and whether all addresses are
    multiples of 16 bytes and all sizes fit into 32 bits; for others, which are rare, Triton searches each time.
    """
    device = arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, *arguments, **constexprs)
        return
    addresses, largest, key = 0, 0, [id(kernel), device, *constexprs.values()]
    for argument in arguments:
        kind = type(argument)
        if kind is int:
            largest = max(largest, argument)
        elif kind is Tensor or kind is Parameter:
            addresses |= argument.data_ptr()
            key.append(argument.dtype)
        else:
            key.append(kind)
    is_usual = addresses % ALIGNMENT == 0 and largest < INT32_SIZES
    found = _binaries.get(tuple(key)) if is_usual else None
    if found is not None:
        binary, constants = found
        binary[*grid, 1](*arguments, *constants)
        return
    binary = kernel[grid](*arguments, **constexprs)
    if is_usual and binary is not None:  # the interpreter returns None
        _binaries[tuple(key)] = binary, [constexprs[name] for name in kernel.arg_names if name in constexprs]
