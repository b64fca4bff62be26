"""scripts/gpu_check.py and scripts/bench_kernels.py to the extent that they run without a GPU."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import bench_kernels
import gpu_check


@pytest.mark.usefixtures("interpreter")
def test_a_dry_run_passes_and_leaves_a_log_a_summary_and_rows(tmp_path, capsys):
    parts = ["environment", "contract", "accuracy", "determinism", "cuda_graph", "loading", "benchmark"]
    assert gpu_check.main(["--device", "cpu", "--output", str(tmp_path), "--parts", *parts]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(result["part"], result["status"]) for result in results] == [
        (part, "skip" if part == "cuda_graph" else "pass") for part in parts
    ]
    assert "| contract | pass |" in (tmp_path / "summary.md").read_text()
    assert "===== benchmark" in (tmp_path / "log.txt").read_text()
    with (tmp_path / "kernels_gpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["candidate"] for row in rows} >= {"copy", "local batch_norm + ReLU", "ours + ReLU", "ours, fused"}
    assert all(float(row["ms"]) > 0 for row in rows)


@pytest.mark.usefixtures("interpreter")
def test_a_part_that_fails_is_reported_and_the_others_run(tmp_path, monkeypatch, capsys):
    def broken(device: str) -> str:
        raise AssertionError("expected this")

    monkeypatch.setitem(gpu_check.PARTS, "contract", broken)
    arguments = ["--device", "cpu", "--output", str(tmp_path), "--parts"]
    assert gpu_check.main([*arguments, "environment"]) == 0
    assert gpu_check.main([*arguments, "contract", "nccl"]) == 1
    results = json.loads((tmp_path / "results.json").read_text())  # of both calls
    assert [(result["part"], result["status"]) for result in results] == [
        ("environment", "pass"), ("contract", "FAIL"), ("nccl", "skip"),
    ]  # fmt: skip
    assert results[1]["text"] == "AssertionError: expected this"
    assert "in broken" in (tmp_path / "log.txt").read_text()


@pytest.mark.usefixtures("interpreter")
def test_without_a_gpu_it_says_so_and_fails(capsys):
    assert gpu_check.main([]) == 2
    assert "expected a CUDA device, got none" in capsys.readouterr().out


def test_a_part_whose_process_dies_or_hangs_fails(tmp_path, monkeypatch):
    for script, text in (("import os; os._exit(3)", "exit status 3"), ("import time; time.sleep(60)", "stopped after")):
        path = tmp_path / "part.py"
        path.write_text(f"print('so far', flush=True)\n{script}\n")
        monkeypatch.setattr(gpu_check, "__file__", str(path))
        monkeypatch.setattr(gpu_check, "LIMIT_S", 2)
        result, output = gpu_check.run_apart("determinism", "cuda")
        assert result["status"] == "FAIL"
        assert text in result["text"]
        assert "so far" in output


def test_the_benchmark_refuses_an_inexact_candidate_of_ours_and_names_another():
    case = bench_kernels.Case((6, 3, 4), "float32", "contiguous")
    x, grad_output = case.tensors("cpu")

    def right() -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x.clone().requires_grad_()
        y = torch.nn.functional.batch_norm(leaf, None, None, training=True).relu()
        return y.detach(), torch.autograd.grad(y, leaf, grad_output)[0]

    assert bench_kernels.check({"ours, right": right, "right": right}, x, grad_output) == {}
    for wrong, kind in ((lambda: (right()[0] * 1.01, right()[1]), "output"), (lambda: (right()[0], x), "gradient")):
        with pytest.raises(AssertionError, match=f"ours: {kind} of channel 0 is .* off beyond rounding"):
            bench_kernels.check({"ours": wrong}, x, grad_output)
        faults = bench_kernels.check({"ours": right, "other": wrong}, x, grad_output)
        assert list(faults) == ["other"]
        assert faults["other"].startswith(f"other: {kind} of channel 0 is ")


def test_the_summary_states_the_bars():
    case = bench_kernels.Case((64, 1024, 32, 32), "float32", "contiguous")
    times = {"copy": 0.9, bench_kernels.TORCH_SYNC: 2.0, bench_kernels.OURS: 1.0}
    faster = {"copy": 0.95, bench_kernels.TORCH_SYNC: 8.0, bench_kernels.OURS: 1.0}
    lines = bench_kernels.summary([(case, {"kernel": times}), (case, {"kernel": faster})])
    assert lines[0].startswith("kernel: 4.00x torch's SyncBN + ReLU on average, 2.00x at least")
    assert lines[1].startswith("kernel: 90% of the copy's bandwidth at least")


def test_tuning_times_every_kernel_by_block_size_and_restores_it(tmp_path, monkeypatch, triton_launch, capsys):
    monkeypatch.setattr(bench_kernels, "TUNED", [(64, 4, 1), (32, 4, 1)])
    chosen = triton_launch.TILE_ELEMENTS
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = ["--device", device, "--tune", "--shapes", "3x4x5", "--dtypes", "float32", "--rounds", "1"]
    bench_kernels.run(bench_kernels.parse([*arguments, "--csv", str(tmp_path / "tuned.csv")]))
    with (tmp_path / "tuned.csv").open() as file:
        names = {row["candidate"] for row in csv.DictReader(file)}
    kernels = ("stats", "elemt", "reduce", "backward elemt")
    assert names == {"copy", *(f"{size}/4/1 {kernel}" for size in (64, 32) for kernel in kernels)}
    assert chosen == triton_launch.TILE_ELEMENTS
