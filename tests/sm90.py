"""Compile for sm_90, without a GPU, every kernel that the launcher would start for given activations.

    python tests/sm90.py        # one line of JSON for each distinct binary; not under TRITON_INTERPRET

Launches are recorded on tensors without data; block sizes, alignment and dtypes are those of a real launch.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from syncbn.backends import triton_launch
from syncbn.statistics import Epilogue, OutputMask, Running

SHAPES = [  # those of the benchmark
    (32, 64, 112, 112), (128, 64, 56, 56), (32, 256, 56, 56), (64, 512, 28, 28), (64, 1024, 14, 14), (64, 2048, 7, 7),
    (1, 32, 192, 192, 192), (4096, 2048),
]  # fmt: skip
TYPES = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.uint8: "*u8", torch.int64: "*i64",
}  # fmt: skip
OPTIONS = ("num_warps",)


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, int]
    arguments: dict[str, Any]  # by name, including constexprs

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, torch.Tensor)}


def record(monkeypatch_launch: Any, step: Any) -> list[Launch]:
    """Return the launches of `step()` without running them."""
    launches: list[Launch] = []

    def launch(kernel: Any, grid: tuple[int, int], *arguments: Any, **constexprs: Any) -> None:
        launches.append(Launch(kernel, grid, dict(zip(kernel.arg_names, arguments, strict=False)) | constexprs))

    original = triton_launch.launch
    monkeypatch_launch(launch)
    try:
        step()
    finally:
        monkeypatch_launch(original)
    return launches


def training_pass(x: torch.Tensor, *, activation: str = "relu", residual: bool = False, mask: bool = False) -> None:
    """Run the ops of forward and backward as the Function does, on tensors like x."""
    C = x.shape[1]
    weight, bias = torch.empty(2, C, device=x.device).unbind()
    running = Running(
        torch.empty_like(weight), torch.empty_like(bias), torch.zeros((), dtype=torch.int64, device=x.device), 0.1
    )
    own_mask = torch.ones(x.shape[0], 1, *x.shape[2:], dtype=torch.bool, device=x.device) if mask else None
    epilogue = Epilogue(torch.empty_like(x) if residual else None, own_mask, activation)
    packed = triton_launch.pack_stats(x, own_mask)
    y, count, channels = triton_launch.normalize(x, packed, weight, bias, epilogue, eps=1e-5, ranks=2, running=running)
    grad_output = torch.empty_like(y)
    output_mask = OutputMask(weight=True, bias=True, dy=residual)
    reduced = triton_launch.backward_reduce(grad_output, x, channels, epilogue, output_mask)
    triton_launch.backward_elemt(grad_output, x, channels, epilogue, reduced, count=count)


def without_data(shape: tuple[int, ...], dtype: torch.dtype, *, channels_last: bool) -> torch.Tensor:
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


def source_of(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """Return the kernel with the types, constants and alignments of a launch, and its compile options."""
    signature, constants, attrs, options = {}, {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                attrs[(index,)] = [["tt.divisibility", 16]]
        elif value is None or parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, float):
            signature[parameter.name] = "fp64"
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
    for name in OPTIONS:
        if name in launch.arguments:
            options[name] = launch.arguments[name]
    return ASTSource(launch.kernel, signature, constants, attrs), options


def resources(launch: Launch) -> dict[str, Any]:
    """Compile, and return the kernel's name, blocks, registers per thread, bytes of stack (spills) and of each load."""
    source, options = source_of(launch)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {name: int(re.search(rf"\b{name}:(\d+)", text.stdout).group(1)) for name in ("REG", "STACK", "LOCAL")}
    blocks = {
        name: launch.arguments.get(name) for name in ("BLOCK_C", "BLOCK_S", "ALIGN_C", "ALIGN_S", "CHANNELS_LAST")
    }
    widths = sorted({int(width or 1) * int(bits) // 8 for width, bits in
                     re.findall(r"ld\.global(?:\.L1::\w+)?(?:\.v(\d))?\.b(\d+)", compiled.asm["ptx"])})  # fmt: skip
    x = launch.arguments.get("x_ptr")
    found["x_bytes"] = None if x is None else x.element_size()
    return {"kernel": launch.kernel.__name__, **blocks, **found, "load_bytes": widths}


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """Return one launch for each binary: kernel, dtypes, and constants, which have upper-case names."""
    found: dict[Any, Launch] = {}
    for launch in launches:
        key = [
            (name, value.dtype if isinstance(value, torch.Tensor) else value)
            for name, value in launch.arguments.items()
            if name in OPTIONS or name.isupper() or value is None or isinstance(value, torch.Tensor)
        ]
        sizes = ("N", "C")
        found.setdefault((launch.kernel.__name__, *(pair for pair in key if pair[0] not in sizes)), launch)
    return list(found.values())


def launches_of_the_benchmark() -> list[Launch]:
    """Return a pass for each shape, dtype and layout, one with all fusions, and one of 2^32 values."""
    found = []
    for shape, extras in (
        ((64, 512, 28, 28), {"residual": True, "mask": True, "activation": "silu"}),
        ((2, 64, 2**25), {}),
    ):
        x = without_data(shape, torch.bfloat16, channels_last=False)
        found += record(
            lambda f: setattr(triton_launch, "launch", f), lambda x=x, extras=extras: training_pass(x, **extras)
        )
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for channels_last in (False, True):
                x = without_data(shape, dtype, channels_last=channels_last)
                found += record(lambda f: setattr(triton_launch, "launch", f), lambda x=x: training_pass(x))
    return found


if __name__ == "__main__":
    for launch in distinct(launches_of_the_benchmark()):
        print(json.dumps(resources(launch)))
