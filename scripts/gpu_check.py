"""Does everything work on a real GPU? One command checks the Triton backend on a CUDA device, then benchmarks it.

    python scripts/gpu_check.py --output benchmarks/gpu                  # about 15 minutes, half of it the benchmark
    python scripts/gpu_check.py --parts contract cuda_graph              # only these
    TRITON_INTERPRET=1 python scripts/gpu_check.py --device cpu --output /tmp/dry       # dry run without a GPU, tiny

On CUDA every part runs in a separate process, so that a part that breaks the device does not affect the others. The
output directory receives log.txt, summary.md, results.json and kernels_gpu.csv, which accumulate over several calls.
The exit status is 0 if no part of this call failed.
It needs torch and Triton, but not Hydra, pytest or an installed syncbn.

Last answer (NVIDIA H200, torch 2.11.0+cu130, Triton 3.6.0, 664a4f9): every part passes; benchmarks/gpu/summary.md.
"""

import argparse
import contextlib
import copy
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]  # also runs without installation

import bench_kernels  # noqa: E402
import contract  # noqa: E402
from contract import Case  # noqa: E402

import syncbn  # noqa: E402
from syncbn import backends  # noqa: E402
from syncbn.backends import triton_launch  # noqa: E402

MARK = "RESULT "
LIMITS_S = {"contract": 420, "large": 300, "sanitizer": 400, "compile": 240, "benchmark": 540}
LIMIT_S = 180
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
LARGE_BYTES = 60e9


class Skipped(Exception):
    """A part does not apply here; the message gives the reason."""


def environment(device: str) -> str:
    """Return the versions and the device."""
    if device == "cuda":
        smi = shutil.which("nvidia-smi")
        print(subprocess.run([smi], capture_output=True, text=True).stdout if smi else "nvidia-smi is not there")
    found = bench_kernels.versions(device) | {"python": sys.version.split()[0], "numpy": np.__version__}
    return ", ".join(f"{name} {value}" for name, value in found.items())


def contract_of_the_steps(device: str) -> str:
    """The contract test, then larger activations in every dtype and layout, with the real block sizes."""
    cases = list(contract.CASES)
    shapes = ((16, 96, 28, 28), (64, 37, 7, 7), (5, 130, 33, 31), (300, 257), (3, 24, 9, 10, 11), (40, 2048, 2, 3))
    for turn, (shape, (index, dtype)) in enumerate(itertools.product(shapes, enumerate(HALF_AND_SINGLE))):
        activation = ("relu", "silu", "leaky_relu", "identity")[turn % 4]
        cases.append(Case(shape, dtype, turn % 2 == 0, activation, mask=index == 1, residual=index != 0))
    if device == "cpu":
        cases = contract.CASES[:2]
    failures = []
    for case in cases:
        try:
            contract.check_training_step(triton_launch, case, device)
        except Exception:
            traceback.print_exc(file=sys.stdout)
            failures.append(str(case))
    assert not failures, f"{len(failures)} of {len(cases)} cases failed: {'; '.join(failures[:6])}"
    return f"{len(cases)} cases equal the oracle"


def accuracy(device: str) -> str:
    """The variance keeps six digits at any mean and scale."""
    shape = (16, 64, 56, 56) if device == "cuda" else (4, 2, 9, 8)
    errors = {}
    for mean, std in ((0, 1), (1e2, 1), (1e3, 1), (1e4, 1), (1, 1e-4), (0, 1e-5), (0.1, 1e-5)):
        errors[f"{mean:g}, {std:g}"] = contract.check_variance(triton_launch, mean, std, shape, device)
    print(errors)
    assert max(errors.values()) < 1e-6, f"relative error of the variance by mean, std: {errors}"
    return f"largest relative error of the variance {max(errors.values()):.1e}"


def determinism(device: str) -> str:
    """Equal input gives equal bits."""
    shape = (32, 64, 56, 56) if device == "cuda" else (3, 4, 5, 6)
    for channels_last in (False, True):
        tensors = torch.randn(2, *shape, device=device)
        x, grad_output = (contract.in_layout(t, channels_last=channels_last) for t in tensors)
        step = bench_kernels._our_sequence(x, grad_output)
        for first, second in zip(step(), step(), strict=True):
            assert torch.equal(first, second)
    return "two passes agree bit for bit in both layouts"


def layers(device: str) -> str:
    """Layers and units on one rank, in float32 on Triton, equal those in float64 in plain PyTorch."""
    with backend("triton"):
        assert backends.select(torch.empty(2, 3, device=device)) is triton_launch
        actual = contract.train_layers(0, (5,), torch.float32, device)
    with backend("torch"):
        contract.compare_layers(actual, contract.train_layers(0, (5,), torch.float64, device))
    return f"{len(contract.LAYERS)} layers, two steps each"


def no_host_sync(device: str) -> str:
    """Forward and backward never wait for the device."""
    only_on_cuda(device)
    layer = syncbn.SyncBatchNorm(64, activation="relu", momentum=None, device=device)
    x = torch.randn(8, 64, 14, 14, device=device, requires_grad=True)
    residual, grad_output = torch.randn(2, *x.shape, device=device)
    mask = torch.ones(8, 1, 14, 14, dtype=torch.bool, device=device)
    unit = unit_of(64).to(device)

    def step() -> None:
        layer(x).backward(grad_output)
        layer(x, residual, mask).backward(grad_output)
        unit(x).backward(grad_output)

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "sync debug mode raises nothing"


def cuda_graph(device: str) -> str:
    """Forward, backward and the running statistics are captured, and replayed on other data."""
    only_on_cuda(device)
    for momentum in (0.1, None):
        check_capture(lambda m=momentum: syncbn.SyncBatchNorm(16, activation="relu", momentum=m), device)
    check_capture(lambda: unit_of(16), device)
    return (
        "layer and unit: outputs, gradients and running statistics of replays equal eager ones, momentum 0.1 and None"
    )


def gloo_ranks(device: str) -> str:
    """Two gloo ranks that share the device give the same results as one process in float64."""
    for sizes in ((3, 2), (4, 0)):
        spawn(_gloo_layers, sizes, device)
    return "splits (3, 2) and (4, 0)"


def gloo_against_torch(device: str) -> str:
    """Two gloo ranks that share the device give the same results as torch.nn.SyncBatchNorm."""
    only_on_cuda(device)
    spawn(_gloo_against_torch, (6, 3), device)
    return "outputs, gradients and running statistics in both layouts, uneven ranks"


def nccl(device: str) -> str:
    """Our collectives run on one NCCL rank, eager and captured in a CUDA graph, without changing the results."""
    only_on_cuda(device)
    if not dist.is_nccl_available():
        raise Skipped("this torch has no NCCL")
    with tempfile.TemporaryDirectory() as folder, all_reducing_alone():
        dist.init_process_group(
            "nccl", init_method=f"file://{folder}/store", rank=0, world_size=1, timeout=timedelta(seconds=60)
        )
        try:
            actual = contract.train_layers(0, (5,), torch.float32, device)
            check_capture(lambda: syncbn.SyncBatchNorm(16, activation="relu"), device)
        finally:
            dist.destroy_process_group()
    with backend("torch"):
        contract.compare_layers(actual, contract.train_layers(0, (5,), torch.float64, device))
    return "float64 all-reduces of one rank, eager and captured"


def compiled(device: str) -> str:
    """torch.compile compiles the layer to one graph of plain operations, whose results equal Triton's."""
    only_on_cuda(device)
    layer, twin = (syncbn.SyncBatchNorm(32, activation="silu", device=device) for _ in range(2))
    run = torch.compile(layer, fullgraph=True)
    for size in (8, 5, 7):
        x, grad_output = torch.randn(2, size, 32, 14, 14, device=device)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        ys = run(leaves[0]), twin(leaves[1])
        for y in ys:
            y.backward(grad_output)
        torch.testing.assert_close(*ys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)
    return "three batch sizes equal eager Triton"


def large(device: str) -> str:
    """Tensors of more than 2^31 values give correct results."""
    only_on_cuda(device)
    free, _ = torch.cuda.mem_get_info()
    if free < LARGE_BYTES:
        raise Skipped(f"{free / 1e9:.0f} GB are free, {LARGE_BYTES / 1e9:.0f} GB needed")
    shape = (2, 16, 2**26 + 96)
    for layout in ("contiguous", "channels_last"):
        x, grad_output = bench_kernels.Case(shape, "bfloat16", layout).tensors(device)
        bench_kernels.check({"ours": bench_kernels._our_sequence(x, grad_output)}, x, grad_output)
        del x, grad_output
        torch.cuda.empty_cache()
    return f"{'x'.join(map(str, shape))} bfloat16 equals float64 in both layouts"


def sanitizer(device: str) -> str:
    """compute-sanitizer's memcheck reports no error in a part of the contract test."""
    only_on_cuda(device)
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        raise Skipped("compute-sanitizer is not installed")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, __file__, "--part", "few_cases"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=LIMITS_S["sanitizer"] - 20
    )
    text = result.stdout + result.stderr
    print(text[-6000:])
    if "Device not supported" in text:
        raise Skipped("compute-sanitizer does not support this device")
    assert result.returncode == 0, f"exit status {result.returncode}"
    return next((line.strip("= ") for line in text.splitlines() if "ERROR SUMMARY" in line), "no errors")


def few_cases(device: str) -> str:
    """Run the cases that `sanitizer` checks."""
    cases = [
        Case(mask=True, needs_y=True),
        Case(channels_last=True, mask=True, activation="silu"),
        Case(dtype=torch.bfloat16, split=(3, 0, 4)),
        Case((5, 130, 33, 31)),
    ]
    for case in cases:
        contract.check_training_step(triton_launch, case, device)
    return f"{len(cases)} cases"


def benchmark(device: str) -> str:
    """Run scripts/bench_kernels.py."""
    arguments = ["--device", device, "--csv", str(OUTPUT / "kernels_gpu.csv")]
    if device == "cpu":
        arguments += ["--shapes", "3x4x5x5", "--dtypes", "float32", "--rounds", "1"]
    lines = bench_kernels.run(bench_kernels.parse(arguments))
    return "; ".join(lines) or "dry run"


def loading(device: str) -> str:
    """Batches that are copied ahead and files that the device decodes equal those on the host."""
    try:
        from torchvision.transforms import v2

        from train import images
        from train.augment import Normalize
        from train.datasets import ClassFolders
        from train.loader import ImageLoader
        from train.samplers import Collate, GlobalBatchSampler, PreparedImages
    except ImportError as error:
        raise Skipped(f"the trainer's packages are missing: {error}") from None
    batches = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, picture in enumerate(_pictures(40)):
            path = Path(folder, f"class{number % 2}", f"{number}.jpg")
            path.parent.mkdir(exist_ok=True)
            picture.save(path)
        for name, where, decoder in (
            ("host", "cpu", "torchvision"),
            ("copied", device, "torchvision"),
            ("decoded", device, "gpu"),
        ):
            data = ClassFolders(folder, 3)
            data.loader = images.reader(3, decoder)
            sampler = GlobalBatchSampler(len(data), 8, rank=0, world_size=1, shuffle=True)
            own = ImageLoader(
                PreparedImages(data, [v2.RandomResizedCrop(64, antialias=True), v2.RandomHorizontalFlip()]),
                Collate((3, 64, 64)), check=lambda *_: None, device=torch.device(where),
                decode_channels=3 if decoder == "gpu" else None, batch_sampler=sampler, num_workers=2,
            )  # fmt: skip
            normalize = Normalize([0.4, 0.5, 0.6], [0.2] * 3)
            batches[name] = [(normalize(pixels).cpu(), labels.cpu()) for pixels, labels in own]
    decoded = 0.0
    for (pixels, labels), (copied, its), (other, its_own) in zip(*batches.values(), strict=True):
        assert torch.equal(labels, its)
        assert torch.equal(labels, its_own)
        torch.testing.assert_close(copied, pixels, rtol=1e-6, atol=1e-6)
        decoded = max(decoded, (other - pixels).abs().mean().item() * 0.2 * 255)
    assert decoded < 3, f"pixels decoded on the device differ by {decoded:.2f} of 255 on average"
    return f"copied batches equal those on the host; pixels decoded on the device differ by {decoded:.2f} of 255"


PARTS: dict[str, Callable[[str], str]] = {
    "environment": environment, "contract": contract_of_the_steps, "accuracy": accuracy, "determinism": determinism,
    "layers": layers, "no_host_sync": no_host_sync, "cuda_graph": cuda_graph, "gloo_ranks": gloo_ranks,
    "gloo_against_torch": gloo_against_torch, "nccl": nccl, "compile": compiled, "large": large,
    "sanitizer": sanitizer, "loading": loading, "benchmark": benchmark,
}  # fmt: skip
OUTPUT = ROOT / "benchmarks" / "gpu"


def _pictures(count: int) -> Iterator[Any]:
    """Yield smooth images of 240 x 320 pixels."""
    from PIL import Image

    for seed in range(count):
        small = np.random.default_rng(seed).integers(256, size=(8, 10, 3), dtype=np.uint8)
        yield Image.fromarray(small).resize((320, 240), Image.Resampling.BICUBIC)


def unit_of(num_features: int) -> syncbn.NormActConv:
    """Return norm, ReLU and a 3x3 convolution as one unit, with output like its input."""
    norm = syncbn.SyncBatchNorm(num_features, activation="relu")
    return syncbn.NormActConv(norm, nn.Conv2d(num_features, num_features, 3, padding=1))


def only_on_cuda(device: str) -> None:
    """Skip the part if there is no GPU."""
    if device != "cuda":
        raise Skipped("needs CUDA")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Make every call use one backend."""
    before = os.environ.get(backends.ENVIRONMENT_VARIABLE)
    os.environ[backends.ENVIRONMENT_VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[backends.ENVIRONMENT_VARIABLE]
        else:
            os.environ[backends.ENVIRONMENT_VARIABLE] = before


@contextlib.contextmanager
def all_reducing_alone() -> Iterator[None]:
    """Make a group of one rank communicate as if it had two."""
    original = syncbn.collectives.group_size
    syncbn.collectives.group_size = lambda group: 2
    try:
        yield
    finally:
        syncbn.collectives.group_size = original


def check_capture(make_layer: Callable[[], nn.Module], device: str) -> None:
    """Capture a training step, replay it on three batches, and compare with the same steps taken eagerly."""
    layer = make_layer().to(device)
    twin = copy.deepcopy(layer)
    x = torch.randn(8, 16, 9, 7, device=device, requires_grad=True)
    grad_output = torch.randn(x.shape, device=device)

    def step(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        y = layer(x)
        return y, *torch.autograd.grad(y, [x, *layer.parameters()], grad_output)

    state = {name: value.clone() for name, value in layer.state_dict().items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(layer, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a thread of NCCL queries the device meanwhile
        captured = step(layer, x)
    layer.load_state_dict(state)
    for _ in range(3):
        batch = torch.randn_like(x, requires_grad=False) * 2 + 1
        with torch.no_grad():
            x.copy_(batch)
        graph.replay()
        for actual, expected in zip(captured, step(twin, batch.requires_grad_()), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict(), rtol=1e-6, atol=1e-6)


def spawn(rank_main: Callable[..., None], sizes: tuple[int, ...], device: str) -> None:
    """Run a function on one gloo rank per entry of `sizes`."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (rank_main, f"{folder}/store", sizes, device)
        torch.multiprocessing.spawn(_rank, arguments, nprocs=len(sizes), join=True)


def _rank(rank: int, rank_main: Callable[..., None], store: str, sizes: tuple[int, ...], device: str) -> None:
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=len(sizes), timeout=timedelta(seconds=60)
    )
    rank_main(rank, sizes, device)
    dist.barrier()
    dist.destroy_process_group()


def _gloo_layers(rank: int, sizes: tuple[int, ...], device: str) -> None:
    with backend("triton"):
        actual = contract.train_layers(rank, sizes, torch.float32, device)
    with backend("torch"):
        contract.compare_layers(actual, contract.train_layers(rank, sizes, torch.float64, device))


def _gloo_against_torch(rank: int, sizes: tuple[int, ...], device: str) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        results = []
        for kind in (syncbn.SyncBatchNorm, nn.SyncBatchNorm):
            torch.manual_seed(rank)
            layer = kind(32).to(device)
            x, grad_output = torch.randn(2, sizes[rank], 32, 14, 14, device=device)
            x = (x + rank).contiguous(memory_format=layout).requires_grad_()
            y = layer(x)
            y.backward(grad_output)
            results.append([y.detach(), x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean,
                            layer.running_var])  # fmt: skip
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def run_part(name: str, device: str) -> dict[str, Any]:
    """Run one part; return its status, duration and message."""
    started = time.monotonic()
    try:
        torch.manual_seed(0)
        torch.backends.cudnn.allow_tf32 = False  # float32 convolutions are compared with float64 ones
        torch.backends.cudnn.deterministic = True
        status, text = "pass", (PARTS | {"few_cases": few_cases})[name](device)
    except Skipped as reason:
        status, text = "skip", str(reason)
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        status, text = "FAIL", f"{type(error).__name__}: {error}".strip().split("\n")[0][:300]
    return {"part": name, "status": status, "seconds": round(time.monotonic() - started, 1), "text": text}


def run_apart(name: str, device: str) -> tuple[dict[str, Any], str]:
    """Run one part in a separate process; return its result and its output."""
    command = [sys.executable, "-u", __file__, "--part", name, "--device", device, "--output", str(OUTPUT)]
    started = time.monotonic()
    try:
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMITS_S.get(name, LIMIT_S)
        )
        output, reason = result.stdout, f"ended with exit status {result.returncode}"
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        reason = f"stopped after {error.timeout:.0f} s"
    marked = [line for line in output.splitlines() if line.startswith(MARK)]
    if marked:
        return json.loads(marked[-1].removeprefix(MARK)), output
    seconds = round(time.monotonic() - started, 1)
    return {"part": name, "status": "FAIL", "seconds": seconds, "text": f"the process {reason}"}, output


def run_here(name: str, device: str) -> tuple[dict[str, Any], str]:
    """Run one part in this process; return its result and its output."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        result = run_part(name, device)
    return result, text.getvalue()


def main(arguments: list[str] | None = None) -> int:
    """Run the parts one after the other; return the exit status."""
    global OUTPUT
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--part", help=argparse.SUPPRESS)  # set for the process of one part
    options = parser.parse_args(arguments)
    OUTPUT = options.output
    if options.device == "cuda" and not torch.cuda.is_available():
        print("expected a CUDA device, got none: run this on a machine with a GPU, or --device cpu for a dry run")
        return 2
    if options.part is not None:
        result = run_part(options.part, options.device)
        print(MARK + json.dumps(result), flush=True)
        return int(result["status"] == "FAIL")

    OUTPUT.mkdir(parents=True, exist_ok=True)
    known = OUTPUT / "results.json"
    earlier = json.loads(known.read_text()) if known.exists() else []
    results: list[dict[str, Any]] = []
    with (OUTPUT / "log.txt").open("a") as log:
        for name in options.parts:
            result, output = (run_apart if options.device == "cuda" else run_here)(name, options.device)
            results.append(result)
            log.write(f"===== {name}\n{output}\n{json.dumps(result)}\n")
            log.flush()
            print(f"{result['status']:5}{name:20}{result['seconds']:7.1f} s  {result['text']}", flush=True)
            kept = [result for result in earlier if result["part"] not in {own["part"] for own in results}]
            known.write_text(json.dumps([*kept, *results], indent=1))
            (OUTPUT / "summary.md").write_text(_table([*kept, *results]))
    return int(any(result["status"] == "FAIL" for result in results))


def _table(results: list[dict[str, Any]]) -> str:
    lines = [f"| {r['part']} | {r['status']} | {r['seconds']} | {r['text'].replace('|', '/')} |" for r in results]
    return "\n".join(["| part | status | seconds | |", "|---|---|---|---|", *lines, ""])


if __name__ == "__main__":
    sys.exit(main())
