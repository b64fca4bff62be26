"""Device code of the Triton backend: seven kernels for both layouts. Shapes, grids and memory: `triton_launch`.

Activations are (N, C, S), contiguous; with CHANNELS_LAST they are (1, C, S) with the channels adjacent in memory.
A program works on tiles of (BLOCK_C, BLOCK_S). Its first index is a block of channels; its second index selects
`tiles_per_program` consecutive blocks of positions, counted through all samples. Arithmetic on activations is float32,
across programs float64. Nothing is added atomically, so equal input gives equal bits.

`coefficients` are float32, five rows of C: pivot, pivot_error, invstd, scale, shift. The pivot is the mean rounded to
float32 and pivot_error is pivot - mean, so that `x - pivot` is exact where x is near the mean, at any mean/std.
"""

# mypy: disable-error-code="no-untyped-def"

import math

import triton
import triton.language as tl

from syncbn import activations

SLOPE = tl.constexpr(activations.LEAKY_RELU_SLOPE)
SQRT_HALF, NORMAL_PEAK = tl.constexpr(0.5**0.5), tl.constexpr((2 * math.pi) ** -0.5)

# Sizes change from batch to batch, so none of them selects another binary. ALIGN_C and ALIGN_S give the alignment.
SIZES = ["N", "C_units", "S_units", "tiles_per_program", "C", "splits"]


@triton.jit(do_not_specialize=SIZES)
def stats_kernel(
    x_ptr,
    mask_ptr,  # uint8 (N, S) or None
    partials_ptr,  # (splits, 3C + 1): pivot, sum(x - pivot), sum((x - pivot)^2), count
    N,
    C_units,
    S_units,
    tiles_per_program,
    ALIGN_C: tl.constexpr,
    ALIGN_S: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write the count and the sums of this program's tiles about a pivot, the mean of its first tile.

    The pivot is at most sqrt(tiles) standard deviations off the mean of all tiles, so that few bits cancel.
    """
    C, S = C_units * ALIGN_C, S_units * ALIGN_S
    c, inside = _channels(C, INT64, BLOCK_C)
    split = tl.program_id(1)
    first, last, s_blocks = _tiles(split, N, S, tiles_per_program, INT64, BLOCK_S)
    count = tl.full((), 0, tl.int32)
    pivot = tl.zeros((BLOCK_C,), tl.float32)
    offset = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    square = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    for tile in tl.range(first, last, num_stages=STAGES):
        n, s, valid = _positions(tile, s_blocks, mask_ptr, S, BLOCK_S)
        offsets = _offsets(n, c, s, C, S, CHANNELS_LAST)
        x = tl.load(x_ptr + offsets, mask=inside[:, None] & valid[None, :], other=0).to(tl.float32)
        if mask_ptr is not None:
            here = tl.sum(valid.to(tl.int32), 0)
        else:
            here = tl.minimum(S - tile % s_blocks * BLOCK_S, BLOCK_S).to(tl.int32)
        if (count == 0) & (here > 0):
            pivot = tl.sum(x, 1) / here
            pivot = tl.where(tl.abs(pivot) < float("inf"), pivot, 0.0)  # x - inf would be NaN
        centred = tl.where(valid[None, :], x - pivot[:, None], 0.0)
        offset += centred
        square += centred * centred
        count += here

    row_ptr = partials_ptr + split * (3 * C + 1)
    tl.store(row_ptr + c, pivot, mask=inside)
    tl.store(row_ptr + C + c, tl.sum(offset, 1), mask=inside)
    tl.store(row_ptr + 2 * C + c, tl.sum(square, 1), mask=inside)
    tl.store(row_ptr + 3 * C, count.to(tl.float32), mask=tl.program_id(0) == 0)


@triton.jit(do_not_specialize=SIZES)
def merge_stats_kernel(
    partials_ptr,  # (splits, 3C + 1), of stats_kernel
    packed_ptr,  # (2C + 1) for the wire
    C,
    splits,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Merge the statistics of all programs and pack them for the all-reduce."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    common = tl.load(partials_ptr + c, mask=inside, other=0).to(tl.float64)
    count = tl.zeros((BLOCK_K,), tl.float64)
    offset = tl.zeros((BLOCK_K, BLOCK_C), tl.float64)
    square = tl.zeros((BLOCK_K, BLOCK_C), tl.float64)
    for start in range(0, splits, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        exists = (k < splits)[:, None] & inside[None, :]
        row_ptr = partials_ptr + k * (3 * C + 1)
        own = tl.load(row_ptr + 3 * C, mask=k < splits, other=0).to(tl.float64)
        pivot = tl.load(row_ptr[:, None] + c[None, :], mask=exists, other=0).to(tl.float64)
        first = tl.load(row_ptr[:, None] + C + c[None, :], mask=exists, other=0).to(tl.float64)
        second = tl.load(row_ptr[:, None] + 2 * C + c[None, :], mask=exists, other=0).to(tl.float64)
        shift = tl.where(own[:, None] > 0, pivot - common[None, :], 0.0)  # sums about the common pivot from here on
        count += own
        offset += first + own[:, None] * shift
        square += second + shift * (2.0 * first + own[:, None] * shift)
    total = tl.sum(count, 0)
    mean_offset = tl.sum(offset, 0) / tl.maximum(total, 1.0)
    mean = tl.where(total > 0, common + mean_offset, 0.0)
    M2 = tl.sum(square, 0) - total * mean_offset * mean_offset
    M2 = tl.where(M2 < 0, 0.0, M2)
    tl.store(packed_ptr, total, mask=tl.program_id(0) == 0)
    tl.store(packed_ptr + 1 + c, total * mean, mask=inside)
    tl.store(packed_ptr + 1 + C + c, M2 + total * mean * mean, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def gather_stats_kernel(
    packed_ptr,  # (2C + 1), summed over ranks
    mean_ptr,  # float64, as the next two
    invstd_ptr,
    count_ptr,
    coefficients_ptr,
    weight_ptr,
    bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    num_batches_tracked_ptr,
    eps: tl.float64,
    rounding: tl.float64,  # of the variance, relative to mean^2
    momentum: tl.float64,
    C,
    CUMULATIVE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Derive all per-channel values from the result of the all-reduce, and move the running averages."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    count = tl.load(packed_ptr)
    divisor = tl.where(count < 1, 1.0, count)  # NaN stays
    mean = tl.load(packed_ptr + 1 + c, mask=inside, other=0) / divisor
    var = tl.load(packed_ptr + 1 + C + c, mask=inside, other=0) / divisor - mean * mean
    var = tl.where(var <= rounding * mean * mean, 0.0, var)  # NaN stays
    shifted = var + eps
    invstd = tl.where(shifted == 0, 0.0, 1.0 / tl.sqrt(tl.where(shifted == 0, 1.0, shifted)))
    tl.store(mean_ptr + c, mean, mask=inside)
    tl.store(invstd_ptr + c, invstd, mask=inside)
    tl.store(count_ptr, count, mask=tl.program_id(0) == 0)

    pivot = mean.to(tl.float32)
    pivot_error = pivot.to(tl.float64) - mean
    scale = invstd
    if weight_ptr is not None:
        scale = scale * tl.load(weight_ptr + c, mask=inside, other=0).to(tl.float64)
    shift = pivot_error * scale
    if bias_ptr is not None:
        shift = shift + tl.load(bias_ptr + c, mask=inside, other=0).to(tl.float64)
    tl.store(coefficients_ptr + c, pivot, mask=inside)
    tl.store(coefficients_ptr + C + c, pivot_error.to(tl.float32), mask=inside)
    tl.store(coefficients_ptr + 2 * C + c, invstd.to(tl.float32), mask=inside)
    tl.store(coefficients_ptr + 3 * C + c, scale.to(tl.float32), mask=inside)
    tl.store(coefficients_ptr + 4 * C + c, shift.to(tl.float32), mask=inside)

    if running_mean_ptr is not None:
        writable = tl.where(inside, count, 0.0) > 1  # not for an empty batch, nor for the NaN of a rank that refuses
        if CUMULATIVE:
            momentum = 1.0 / (tl.load(num_batches_tracked_ptr) + 1).to(tl.float64)
        _update_running(running_mean_ptr, mean, momentum, c, writable)
        _update_running(running_var_ptr, var * (count / tl.maximum(count - 1, 1.0)), momentum, c, writable)
        if num_batches_tracked_ptr is not None and not CUMULATIVE:
            batches = tl.load(num_batches_tracked_ptr) + (count > 1).to(tl.int64)
            tl.store(num_batches_tracked_ptr, batches, mask=tl.program_id(0) == 0)


@triton.jit(do_not_specialize=SIZES)
def elemt_kernel(
    x_ptr,
    residual_ptr,
    mask_ptr,
    coefficients_ptr,
    y_ptr,
    N,
    C_units,
    S_units,
    tiles_per_program,
    ACTIVATION: tl.constexpr,
    ALIGN_C: tl.constexpr,
    ALIGN_S: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write the output."""
    C, S = C_units * ALIGN_C, S_units * ALIGN_S
    c, inside = _channels(C, INT64, BLOCK_C)
    pivot = tl.load(coefficients_ptr + c, mask=inside, other=0)[:, None]
    scale = tl.load(coefficients_ptr + 3 * C + c, mask=inside, other=0)[:, None]
    shift = tl.load(coefficients_ptr + 4 * C + c, mask=inside, other=0)[:, None]
    first, last, s_blocks = _tiles(_reversed(), N, S, tiles_per_program, INT64, BLOCK_S)
    for tile in tl.range(first, last, num_stages=STAGES):
        n, s, valid = _positions(tile, s_blocks, mask_ptr, S, BLOCK_S)
        offsets = _offsets(n, c, s, C, S, CHANNELS_LAST)
        readable = inside[:, None] & valid[None, :]
        x = tl.load(x_ptr + offsets, mask=readable, other=0).to(tl.float32)
        z = (x - pivot) * scale + shift
        if residual_ptr is not None:
            z += tl.load(residual_ptr + offsets, mask=readable, other=0).to(tl.float32)
        y = _activate(z, ACTIVATION)
        if mask_ptr is not None:
            y = tl.where(valid[None, :], y, 0.0)
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside[:, None] & (s < S)[None, :])


@triton.jit(do_not_specialize=SIZES)
def backward_reduce_kernel(
    grad_output_ptr,
    x_ptr,
    residual_ptr,
    mask_ptr,
    coefficients_ptr,
    dy_ptr,  # the gradient in front of the activation, where the residual needs it; or None
    y_ptr,  # the output of forward, where a convolution needs it; or None
    partials_ptr,  # (splits, 2C): sum_dy, sum(dy * (x - pivot))
    N,
    C_units,
    S_units,
    tiles_per_program,
    ACTIVATION: tl.constexpr,
    ALIGN_C: tl.constexpr,
    ALIGN_S: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write both sums over this program's tiles, and dy and y where they are needed."""
    C, S = C_units * ALIGN_C, S_units * ALIGN_S
    c, inside = _channels(C, INT64, BLOCK_C)
    pivot = tl.load(coefficients_ptr + c, mask=inside, other=0)[:, None]
    scale = tl.load(coefficients_ptr + 3 * C + c, mask=inside, other=0)[:, None]
    shift = tl.load(coefficients_ptr + 4 * C + c, mask=inside, other=0)[:, None]
    split = tl.program_id(1)
    first, last, s_blocks = _tiles(split, N, S, tiles_per_program, INT64, BLOCK_S)
    sum_dy = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    sum_dy_xmu = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    for tile in tl.range(first, last, num_stages=STAGES):
        n, s, valid = _positions(tile, s_blocks, mask_ptr, S, BLOCK_S)
        offsets = _offsets(n, c, s, C, S, CHANNELS_LAST)
        readable = inside[:, None] & valid[None, :]
        x = tl.load(x_ptr + offsets, mask=readable, other=0).to(tl.float32)
        dy = tl.load(grad_output_ptr + offsets, mask=readable, other=0).to(tl.float32)
        writable = inside[:, None] & (s < S)[None, :]
        if ACTIVATION != "identity" or y_ptr is not None:
            z = (x - pivot) * scale + shift
            if residual_ptr is not None:
                z += tl.load(residual_ptr + offsets, mask=readable, other=0).to(tl.float32)
            if y_ptr is not None:
                y = _activate(z, ACTIVATION)
                if mask_ptr is not None:
                    y = tl.where(valid[None, :], y, 0.0)
                tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=writable)
            if ACTIVATION != "identity":
                dy = _activate_backward(dy, z, ACTIVATION)
        if mask_ptr is not None:
            dy = tl.where(valid[None, :], dy, 0.0)
        if dy_ptr is not None:
            rounded = dy.to(dy_ptr.dtype.element_ty)
            tl.store(dy_ptr + offsets, rounded, mask=writable)
            dy = rounded.to(tl.float32)
        sum_dy += dy
        sum_dy_xmu += dy * (x - pivot)
    row_ptr = partials_ptr + split * 2 * C
    tl.store(row_ptr + c, tl.sum(sum_dy, 1), mask=inside)
    tl.store(row_ptr + C + c, tl.sum(sum_dy_xmu, 1), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def merge_sums_kernel(
    partials_ptr,  # (splits, 2C), of backward_reduce_kernel
    coefficients_ptr,
    sums_ptr,  # (2C + 1) for the wire: 0, sum_dy, sum_dy_xmu
    grad_weight_ptr,
    grad_bias_ptr,
    C,
    splits,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Merge the sums of all programs, and derive the gradients of weight and bias."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    first = tl.zeros((BLOCK_K, BLOCK_C), tl.float64)
    second = tl.zeros((BLOCK_K, BLOCK_C), tl.float64)
    for start in range(0, splits, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        exists = (k < splits)[:, None] & inside[None, :]
        row_ptr = partials_ptr + k * 2 * C
        first += tl.load(row_ptr[:, None] + c[None, :], mask=exists, other=0).to(tl.float64)
        second += tl.load(row_ptr[:, None] + C + c[None, :], mask=exists, other=0).to(tl.float64)
    pivot_error = tl.load(coefficients_ptr + C + c, mask=inside, other=0).to(tl.float64)
    invstd = tl.load(coefficients_ptr + 2 * C + c, mask=inside, other=0).to(tl.float64)
    sum_dy = tl.sum(first, 0)
    sum_dy_xmu = tl.sum(second, 0) + sum_dy * pivot_error
    tl.store(sums_ptr, 0.0, mask=tl.program_id(0) == 0)
    tl.store(sums_ptr + 1 + c, sum_dy, mask=inside)
    tl.store(sums_ptr + 1 + C + c, sum_dy_xmu, mask=inside)
    if grad_weight_ptr is not None:
        tl.store(grad_weight_ptr + c, _rounded(sum_dy_xmu * invstd, grad_weight_ptr), mask=inside)
    if grad_bias_ptr is not None:
        tl.store(grad_bias_ptr + c, _rounded(sum_dy, grad_bias_ptr), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def backward_elemt_kernel(
    grad_output_ptr,
    x_ptr,
    residual_ptr,
    mask_ptr,
    coefficients_ptr,
    count_ptr,
    sums_ptr,  # (2C + 1), summed over ranks
    grad_input_ptr,
    N,
    C_units,
    S_units,
    tiles_per_program,
    ACTIVATION: tl.constexpr,
    ALIGN_C: tl.constexpr,
    ALIGN_S: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write the gradient of x."""
    C, S = C_units * ALIGN_C, S_units * ALIGN_S
    c, inside = _channels(C, INT64, BLOCK_C)
    pivot = tl.load(coefficients_ptr + c, mask=inside, other=0)[:, None]
    pivot_error = tl.load(coefficients_ptr + C + c, mask=inside, other=0)[:, None]
    invstd = tl.load(coefficients_ptr + 2 * C + c, mask=inside, other=0)[:, None]
    scale = tl.load(coefficients_ptr + 3 * C + c, mask=inside, other=0)[:, None]
    shift = tl.load(coefficients_ptr + 4 * C + c, mask=inside, other=0)[:, None]
    count = tl.load(count_ptr).to(tl.float32)
    divisor = tl.where(count < 1, 1.0, count)
    mean_dy = tl.load(sums_ptr + 1 + c, mask=inside, other=0).to(tl.float32)[:, None] / divisor
    mean_dy_xmu = tl.load(sums_ptr + 1 + C + c, mask=inside, other=0).to(tl.float32)[:, None] / divisor
    slope = -scale * invstd * (invstd * mean_dy_xmu)
    offset = slope * pivot_error - scale * mean_dy
    first, last, s_blocks = _tiles(_reversed(), N, S, tiles_per_program, INT64, BLOCK_S)
    for tile in tl.range(first, last, num_stages=STAGES):
        n, s, valid = _positions(tile, s_blocks, mask_ptr, S, BLOCK_S)
        offsets = _offsets(n, c, s, C, S, CHANNELS_LAST)
        readable = inside[:, None] & valid[None, :]
        centred = tl.load(x_ptr + offsets, mask=readable, other=0).to(tl.float32) - pivot
        dy = tl.load(grad_output_ptr + offsets, mask=readable, other=0).to(tl.float32)
        if ACTIVATION != "identity":
            z = centred * scale + shift
            if residual_ptr is not None:
                z += tl.load(residual_ptr + offsets, mask=readable, other=0).to(tl.float32)
            dy = _activate_backward(dy, z, ACTIVATION)
        grad_input = centred * slope + offset + dy * scale
        if mask_ptr is not None:
            grad_input = tl.where(valid[None, :], grad_input, 0.0)
        rounded = grad_input.to(grad_input_ptr.dtype.element_ty)
        tl.store(grad_input_ptr + offsets, rounded, mask=inside[:, None] & (s < S)[None, :])


@triton.jit
def _channels(C, INT64: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the channel indices of this program, and which of them are below C."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    if INT64:
        c = c.to(tl.int64)
    return c, inside


@triton.jit
def _reversed():
    """Return the second index of this program, counted from the end: the values read last are still in the cache."""
    return tl.num_programs(1) - 1 - tl.program_id(1)


@triton.jit
def _tiles(split, N, S, tiles_per_program, INT64: tl.constexpr, BLOCK_S: tl.constexpr):
    """Return the first tile of this program, the one after its last, and the number of tiles in a sample."""
    if INT64:
        split = split.to(tl.int64)
    s_blocks = tl.cdiv(S, BLOCK_S)
    first = split * tiles_per_program
    return first, tl.minimum(first + tiles_per_program, N * s_blocks), s_blocks


@triton.jit
def _positions(tile, s_blocks, mask_ptr, S, BLOCK_S: tl.constexpr):
    """Return the sample of a tile, its positions, and which of these are inside the sample and not masked."""
    n = tile // s_blocks
    s = (tile % s_blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    valid = s < S
    if mask_ptr is not None:
        valid = tl.load(mask_ptr + n * S + s, mask=valid, other=0) != 0
    return n, s, valid


@triton.jit
def _offsets(n, c, s, C, S, CHANNELS_LAST: tl.constexpr):
    """Return the memory offsets of the elements of a tile, (BLOCK_C, BLOCK_S)."""
    return s[None, :] * C + c[:, None] if CHANNELS_LAST else (n * C + c)[:, None] * S + s[None, :]


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """Return the activation of z; NaN stays NaN."""
    if ACTIVATION == "relu":
        z = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z > 0, z, z * SLOPE)
    elif ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    elif ACTIVATION == "relu6":
        z = tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))
    elif ACTIVATION == "gelu":
        z = z * 0.5 * (1.0 + tl.erf(z * SQRT_HALF))
    elif ACTIVATION == "hardswish":
        z = tl.where(z <= -3, 0.0, tl.where(z >= 3, z, z * (z + 3.0) * (1.0 / 6.0)))
    else:
        tl.static_assert(ACTIVATION == "identity")
    return z


@triton.jit
def _activate_backward(dy, z, ACTIVATION: tl.constexpr):
    """Return dy times the derivative of the activation at z."""
    if ACTIVATION == "relu":
        dy = tl.where(z <= 0, 0.0, dy)
    elif ACTIVATION == "leaky_relu":
        dy = tl.where(z > 0, dy, dy * SLOPE)
    elif ACTIVATION == "relu6":
        dy = tl.where((z <= 0) | (z >= 6), 0.0, dy)
    elif ACTIVATION == "gelu":
        dy = dy * (0.5 * (1.0 + tl.erf(z * SQRT_HALF)) + z * tl.exp(z * z * -0.5) * NORMAL_PEAK)
    elif ACTIVATION == "hardswish":
        dy = tl.where(z <= -3, 0.0, tl.where(z >= 3, dy, dy * (z * (1.0 / 3.0) + 0.5)))
    else:
        tl.static_assert(ACTIVATION == "silu")
        sigmoid = tl.sigmoid(z)
        dy = dy * sigmoid * (1.0 + z * (1.0 - sigmoid))
    return dy


@triton.jit
def _rounded(values, like_ptr):
    """Return float64 values in the element type of a pointer."""
    if like_ptr.dtype.element_ty != tl.float64:
        values = values.to(tl.float32).to(like_ptr.dtype.element_ty)
    return values


@triton.jit
def _update_running(running_ptr, batch, momentum, c, writable):
    """Move a running average towards the batch."""
    running = tl.load(running_ptr + c, mask=writable, other=0).to(tl.float64)
    tl.store(running_ptr + c, _rounded(running + momentum * (batch - running), running_ptr), mask=writable)
