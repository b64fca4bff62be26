"""Benchmarks run with small arguments, and their results are correct where the right value is known."""

import csv
import functools
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from syncbn import reference

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))  # from there a script imports the others

import accuracy_numerics
import bench_layer
import bench_memory
import bench_model
import bench_overlap
import common
import networks
import scaling_model


def run_script(main, tmp_path, *arguments: str) -> list[dict[str, str]]:
    """Run a script and return the rows it wrote; its picture can be read."""
    main([*arguments, "--csv", str(tmp_path / "rows.csv"), "--plot", str(tmp_path / "plot.png")])
    assert matplotlib.image.imread(tmp_path / "plot.png").std() > 0
    return read_rows(tmp_path / "rows.csv")


@pytest.mark.parametrize("script", [accuracy_numerics, bench_layer, bench_model, bench_overlap, scaling_model])
def test_a_picture_is_drawn_from_the_rows_that_are_kept(script, tmp_path):
    script.main(["--draw", "--plot", str(tmp_path / "plot.png")])
    assert matplotlib.image.imread(tmp_path / "plot.png").std() > 0


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --- shared code


def whole_batch_step(norm: str) -> list[np.ndarray]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    layer = common.NORMS[norm](3).double()
    torch.nn.init.uniform_(layer.weight, 1, 2, torch.Generator().manual_seed(9))
    x, grad_output = (torch.randn(4, 3, 5, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    x.requires_grad_()
    y = layer(x)
    y.backward(grad_output)
    parts = [common.whole_batch(part.detach()) for part in (x, grad_output, y, x.grad)]
    sums = [common.whole_batch(part[None]).sum(0) for part in (layer.weight.grad, layer.bias.grad)]
    rest = [layer.weight.detach(), layer.running_mean, layer.running_var]
    return [part.numpy() for part in (*parts, *sums, *rest)]


def whole_batch_steps() -> list[list[np.ndarray]]:
    return [whole_batch_step(norm) for norm in ("all-gather", "mean of squares")]


def test_each_baseline_is_batch_normalization_of_the_whole_batch():
    for found in (step for steps in run_ranks(2, whole_batch_steps) for step in steps):
        x, grad_output, y, grad_input, grad_weight, grad_bias, weight, running_mean, running_var = found
        oracle = reference.batch_norm(x, weight=weight)
        gradients = reference.batch_norm_backward(grad_output, x, weight=weight)
        running = reference.RunningStats(np.zeros(3), np.ones(3))
        running = reference.update_running_stats(running, mean=oracle.mean, var=oracle.var, count=oracle.count)
        np.testing.assert_allclose(y, oracle.output, rtol=0, atol=1e-10)
        for actual, expected in zip((grad_input, grad_weight, grad_bias), gradients, strict=True):
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-9)
        np.testing.assert_allclose(running_mean, running.running_mean, rtol=0, atol=1e-12)
        np.testing.assert_allclose(running_var, running.running_var, rtol=0, atol=1e-10)


def traffic_of_a_call_that_waits() -> tuple[list[int], list[float]]:
    with common.Traffic() as traffic:
        dist.all_reduce(torch.zeros(5))
        dist.all_gather([torch.zeros(3), torch.zeros(3)], torch.zeros(3))
        dist.all_gather_into_tensor(torch.zeros(8), torch.zeros(4))
        dist.all_reduce(torch.zeros(2, dtype=torch.float64), async_op=True).wait()
    dist.all_reduce(torch.zeros(7))
    return traffic.sizes, traffic.seconds


def test_traffic_records_the_bytes_and_the_time_of_each_collective():
    for sizes, seconds in run_ranks(2, traffic_of_a_call_that_waits):
        assert sizes == [5 * 4, 3 * 4, 4 * 4, 2 * 8]
        assert len(seconds) == 4
        assert min(seconds) > 0


def test_in_turns_returns_the_median_of_all_rounds_but_the_first(monkeypatch):
    durations = iter([100, 100, 5, 1, 1, 1, 3, 9])  # step a, step b, and so on
    monkeypatch.setattr(common, "milliseconds", lambda step, device: next(durations))
    found = common.in_turns({"a": lambda: None, "b": lambda: None}, 3, torch.device("cpu"))
    assert found == {"a": 3, "b": 1}


def test_rows_are_appended_and_other_columns_refused(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    common.append_rows(path, [{"a": 1, "b": 0.1234567}])
    common.append_rows(path, [{"a": 2, "b": 3.0}])
    assert read_rows(path) == [{"a": "1", "b": "0.12346"}, {"a": "2", "b": "3"}]
    with pytest.raises(SystemExit, match=r"expected the columns \['a', 'c'\] .* got \['a', 'b'\]"):
        common.append_rows(path, [{"a": 1, "c": 2}])


# --- the layer and the model


def test_bench_layer_counts_the_bytes_of_the_formula(tmp_path):
    arguments = [
        "--rounds",
        "1",
        "--ranks",
        "1",
        "2",
        "--shapes",
        "4x6x3x3",
        "--world-shape",
        "4x6x3x3",
        "--no-compile",
    ]
    rows = run_script(bench_layer.main, tmp_path, *arguments)
    assert {(row["ranks"], row["layout"]) for row in rows} == {
        (ranks, layout) for ranks in "12" for layout in bench_layer.LAYOUTS
    }
    assert all(float(row["ratio"]) == 1 for row in rows if row["candidate"] == "local BN + ReLU")
    assert {row["candidate"] for row in read_rows(tmp_path / "ops_cpu.csv")} > {"copy", "plain pack stats"}
    found = {(r["candidate"], r["ranks"]): r for r in read_rows(tmp_path / "world_cpu.csv")}
    expected = {
        "local BN + ReLU": (0, 0),
        "syncbn + ReLU": (2, 2 * 8 * (2 * 6 + 1)),
        "syncbn, fused ReLU": (2, 2 * 8 * (2 * 6 + 1)),
        "all-gather + ReLU": (2, 4 * (2 * 6 + 1) + 4 * 2 * 6),
        "mean of squares + ReLU": (2, 4 * 2 * 6 + 4 * 2 * 6),
    }
    for candidate, (calls, size) in expected.items():
        row = found[candidate, "2"]
        assert (int(row["calls"]), int(row["bytes"])) == (calls, size)
        assert found[candidate, "1"]["bytes"] == "0"
        assert float(row["collectives_ms"]) <= float(row["ms"])


@pytest.mark.slow
def test_bench_layer_checks_the_compiled_layer_too():
    x, grad_output = torch.randn(2, 4, 6, 3, 3)
    layer = bench_layer.candidates(6)[bench_layer.COMPILED]
    bench_layer.check(bench_layer.COMPILED, layer, x, grad_output)
    assert bench_layer.COMPILED not in bench_layer.candidates(6, with_compile=False)


def test_bench_layer_refuses_a_layer_that_computes_something_else():
    x, grad_output = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    wrong = torch.nn.Sequential(torch.nn.BatchNorm2d(4, eps=0.1), torch.nn.ReLU())
    with pytest.raises(AssertionError, match="off the oracle"):
        bench_layer.check("wrong", wrong, x, grad_output)


def test_bench_model_measures_every_candidate(tmp_path):
    arguments = ["--networks", "preact20", "--ranks", "2", "--batch", "2", "--image", "8", "--rounds", "1"]
    rows = run_script(bench_model.main, tmp_path, *arguments)
    assert {row["network"] for row in rows} == {"preact20"}
    found = {row["candidate"]: row for row in rows}
    assert list(found) == ["local BN", "syncbn", "syncbn, fused", "all-gather", "mean of squares"]
    channels = [m.num_features for m in plain("preact20").modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for name in ("syncbn", "syncbn, fused"):
        assert int(found[name]["calls"]) == 2 * len(channels)
        assert int(found[name]["bytes"]) == sum(2 * 8 * (2 * c + 1) for c in channels)
    assert found["local BN"]["calls"] == "0"


@pytest.mark.slow
def test_bench_model_times_compiled_networks_in_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # seconds, not minutes
    arguments = ["--networks", "preact20", "--ranks", "1", "--batch", "4", "--image", "16", "--rounds", "1"]
    rows = run_script(bench_model.main, tmp_path, *arguments, "--compile")
    found = {row["candidate"]: row for row in rows}
    assert list(found)[-2:] == ["local BN, compiled", "syncbn, compiled"]
    assert float(found["local BN"]["ratio"]) == 1
    assert found["syncbn, compiled"]["calls"] == ""


def plain(network: str) -> torch.nn.Module:
    return networks.Candidate(torch.nn.BatchNorm2d).network(network, torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is for machines without a GPU")
def test_bench_model_says_that_a_gpu_is_missing(tmp_path):
    with pytest.raises(SystemExit, match="expected a GPU for each of 1 ranks, got 0"):
        run_script(bench_model.main, tmp_path, "--device", "cuda", "--ranks", "1")


def test_bench_model_refuses_a_network_that_computes_something_else():
    wrong = networks.Candidate(lambda c: torch.nn.BatchNorm2d(c, eps=1e-3))
    with pytest.raises(AssertionError, match="off plain BatchNorm"):
        bench_model.check("wrong", wrong, "preact20", 8, torch.device("cpu"))


def test_bench_model_refuses_a_compiled_network_with_other_gradients():
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    for model in models:
        model(torch.randn(4, 3)).sum().backward()
    with pytest.raises(AssertionError, match="wrong: gradients off those without compilation"):
        bench_model.check_gradients("wrong", *models)
    bench_model.check_gradients("right", models[0], models[0])


def check_networks_of_torchvision() -> None:
    for network in ("resnet50", "densenet121"):
        candidate = networks.candidates(torch.device("cpu"))[networks.FUSED]
        bench_model.check(networks.FUSED, candidate, network, 64, torch.device("cpu"))


def test_fused_networks_of_torchvision_normalize_over_the_batch_of_all_ranks():
    run_ranks(2, check_networks_of_torchvision)


def test_candidates_have_the_same_parameters_and_other_norms():
    for network in ("preact20", "densenet121"):
        expected = plain(network)
        for candidate in networks.candidates(torch.device("cpu")).values():
            model = candidate.network(network, torch.device("cpu"))
            kinds = {type(m) for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}
            assert kinds == {type(candidate.norm(1))}
            for actual, parameter in zip(model.parameters(), expected.parameters(), strict=True):
                assert torch.equal(actual, parameter)


# --- memory


class KeepsItsInputAndOutput(torch.nn.Module):
    def forward(self, x):
        return (x.exp() * x).view(-1) * 2  # exp saves its output, the product both factors, the view nothing


def test_saved_bytes_counts_every_storage_once():
    x = torch.randn(5, 7, requires_grad=True)
    assert bench_memory.saved_bytes(KeepsItsInputAndOutput(), x) == 2 * x.nbytes
    assert bench_memory.saved_bytes(KeepsItsInputAndOutput(), x.detach()) == 0


def test_parameters_are_not_counted():
    x = torch.randn(5, 7, requires_grad=True)  # so that the weight is saved as well
    assert bench_memory.saved_bytes(torch.nn.Linear(7, 3), x) == x.nbytes


@pytest.mark.slow
def test_a_fused_layer_keeps_its_input_and_per_channel_values_alone(tmp_path):
    arguments = ["--shape", "8x16x12x12", "--networks", "preact50", "--batch", "2", "--image", "64"]
    bench_memory.main([*arguments, "--csv", str(tmp_path / "rows.csv")])
    rows = read_rows(tmp_path / "rows.csv")
    found = {(r["candidate"], r["case"], r["dtype"]): int(r["bytes"]) for r in rows}
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        tensor, per_channel = 8 * 16 * 12 * 12 * size, 64 * (16 + 1)
        assert tensor < found["syncbn, fused", "alone", dtype] <= tensor + per_channel
        assert 2 * tensor < found["syncbn", "alone", dtype] <= 2 * tensor + per_channel
        assert 2 * tensor < found["local BN", "alone", dtype] <= 2 * tensor + per_channel
    of_networks = {row["candidate"]: row for row in read_rows(tmp_path / "rows_networks.csv")}
    assert list(of_networks) == [*networks.candidates(torch.device("cpu")), "local BN, fused"]
    assert all(int(row["peak"]) > int(row["kept"]) > 0 for row in of_networks.values())
    assert 0.54 < float(of_networks["syncbn, fused"]["kept_ratio"]) < 0.56


def allocate_and_free() -> None:
    first = torch.empty(1000, dtype=torch.uint8)
    second = torch.empty(500, dtype=torch.uint8)
    del first
    third = torch.empty(700, dtype=torch.uint8)
    assert len(second) + len(third) == 1200


def test_the_peak_of_a_step_is_what_it_has_allocated_at_one_time():
    assert bench_memory.peak_bytes(allocate_and_free, torch.device("cpu")) == 1500


def test_the_peak_of_a_training_step_contains_activations_and_gradients_but_no_earlier_allocation():
    kept = [torch.empty(10**6)]
    weight = torch.zeros(1000, 1000, requires_grad=True)
    x = torch.ones(1, 1000)

    def step() -> None:
        kept.clear()
        (x @ weight).sum().backward()

    peak = bench_memory.peak_bytes(step, torch.device("cpu"))
    assert weight.grad.nbytes < peak < weight.grad.nbytes + 5 * x.nbytes


# --- accuracy


def test_relative_errors_finds_the_errors_that_were_made():
    x, grad_output = accuracy_numerics.batch(10.0, torch.float64, (4, 3, 5, 5))
    oracle = reference.batch_norm(x.numpy())
    gradients = reference.batch_norm_backward(grad_output.numpy(), x.numpy())
    actual = {
        "mean": oracle.mean * 1.01,
        "var": oracle.var * np.array([1, 1.001, 1]),
        "y": oracle.output,
        "grad_input": np.full_like(gradients.grad_input, np.nan),
    }
    errors = accuracy_numerics.relative_errors(actual, x, grad_output)
    assert errors["mean"] == pytest.approx(0.01, rel=1e-6)
    assert errors["var"] == pytest.approx(0.001, rel=1e-6)
    assert errors["y"] == 0
    assert errors["grad_input"] == math.inf


def test_ours_stays_accurate_where_the_mean_of_squares_does_not(tmp_path):
    arguments = ["--ranks", "1", "2", "--shape", "4x3x8x8", "--ratios", "1", "1e4", "--dtypes", "float32"]
    rows = run_script(accuracy_numerics.main, tmp_path, *arguments)
    found = {(r["candidate"], r["ranks"], r["dtype"], float(r["mean_over_std"])): r for r in rows}
    for ranks in "12":
        for quantity in accuracy_numerics.QUANTITIES:
            assert float(found["syncbn", ranks, "float32", 1e4][quantity]) < accuracy_numerics.BAR
        assert float(found["mean of squares", ranks, "float32", 1e4]["var"]) > 1e-2
        assert float(found["mean of squares", ranks, "float32", 1.0]["var"]) < 1e-5
    assert ("local BN", "2", "float32", 1.0) not in found


# --- the model of scaling

FABRIC = scaling_model.Fabric(10, scaling_model.Link(1, 1), scaling_model.Link(5, 0.5))  # 1 GB/s: 1000 bytes per us


def test_an_all_reduce_costs_what_its_steps_cost():
    node, world = scaling_model.Group(4, 1), scaling_model.Group(8, 2)
    assert scaling_model.ring_us(FABRIC, node, 4000) == 10 + 6 * 1 + 6 * 1
    assert scaling_model.ring_us(FABRIC, world, 4000) == 10 + (10 * 1 + 4 * 5) + 14 * 1
    assert scaling_model.tree_us(FABRIC, node, 4000) == 10 + 2 * (3 * 1 + 4)
    assert scaling_model.tree_us(FABRIC, world, 4000) == 10 + 2 * (3 * 1 + 1 * 5 + 8)
    assert scaling_model.one_shot_us(FABRIC, node, 4000) == 10 + 1 + 3 * 4
    assert scaling_model.one_shot_us(FABRIC, world, 4000) == 10 + 5 + 4 * 8
    assert scaling_model.all_gather_us(FABRIC, world, 4000) == 10 + (6 * 1 + 1 * 5) + 7 * 8


def test_a_link_is_recovered_from_the_times_of_a_ring_of_two():
    link = scaling_model.Link(300, 2)
    fabric, pair = scaling_model.Fabric(0, link, link), scaling_model.Group(2, 1)
    times = [(c, scaling_model.all_gather_us(fabric, pair, 8 * (2 * c + 1))) for c in (64, 1024, 65536)]
    assert scaling_model.fit_link(times) == pytest.approx(link, rel=1e-6)


def test_the_layers_are_those_of_the_networks_and_of_what_fuse_finds():
    for name, layers, channels, fused in (("resnet50", 53, 26560, 32), ("preact50", 49, 22720, 48)):
        found = scaling_model.network(name).layers
        assert (len(found), sum(layer.num_channels for layer in found)) == (layers, channels)
        assert sum(layer.hiding_flops > 0 for layer in found) == fused


def test_a_layer_hides_behind_the_convolutions_that_read_it():
    first = scaling_model.network("preact50").layers[0]  # a 1x1 convolution to 64 channels, the shortcut to 256
    assert first == (64, 2 * 64 * (64 + 256) * 56 * 56)
    flops = scaling_model.network("resnet50").flops
    assert flops == pytest.approx(3 * 2 * 4.089e9, rel=0.02)  # multiply-adds of torchvision's ResNet-50, all layers


def test_hiding_saves_no_more_than_the_all_reduces_and_than_the_weight_gradients():
    machine = lambda group: scaling_model.Machine(FABRIC, FABRIC)  # noqa: E731
    free, bound, without = (
        scaling_model.predict_hidden("preact50", 64, 8, machine, 32, tflops) for tflops in (1e-9, 60, 1e9)
    )
    assert without["world, backward hidden"] == pytest.approx(without["world"], rel=1e-6)
    final_us = scaling_model.Machine(FABRIC, FABRIC).all_reduce_us(scaling_model.Group(64, 8), 8 * (2 * 2048 + 1))
    assert free["world, backward hidden"] == pytest.approx(free["world"] / 2 + final_us / 1e3, rel=1e-6)
    assert free["world, backward hidden"] < bound["world, backward hidden"] < bound["world"]


def test_the_model_predicts_more_for_more_ranks_and_is_compared_with_gloo(tmp_path):
    rows = run_script(scaling_model.main, tmp_path, *["--ranks", "2", "--channels", "8", "64", "--rounds", "2"])
    world = [float(row["world"]) for row in rows if row["per_node"] == "8"]
    assert world == sorted(world)
    assert len(set(world)) == len(scaling_model.GPUS)
    assert len({row["node"] for row in rows if row["per_node"] == "8"}) == 1
    hidden = read_rows(tmp_path / "rows_hidden.csv")
    assert [row["world"] for row in hidden if row["network"] == "resnet50"] == [row["world"] for row in rows]
    assert all(float(row["world, backward hidden"]) < float(row["world"]) for row in hidden)
    gloo = read_rows(tmp_path / "rows_gloo.csv")
    assert [(row["ranks"], row["channels"]) for row in gloo] == [("2", "8"), ("2", "64")]
    assert {int(row["cores"]) for row in gloo} == {len(os.sched_getaffinity(0))}


# --- overlap


def seconds_of_delayed_calls() -> list[float]:
    values, parts = torch.ones(3), [torch.zeros(3), torch.zeros(3)]
    found = []
    with bench_overlap.Delayed(0.2) as delay:
        for run in (
            lambda: dist.all_reduce(values),
            lambda: dist.all_gather(parts, values, async_op=True).wait(),
            lambda: dist.all_gather(parts, values, async_op=True),
        ):
            start = time.perf_counter()
            work = run()
            found.append(time.perf_counter() - start)
    start = time.perf_counter()
    work.wait()
    assert delay.calls == 3
    assert values.tolist() == [2, 2, 2]
    return [*found, time.perf_counter() - start]


def test_a_delayed_collective_makes_those_wait_who_wait_for_it():
    for synchronous, waited, started, rest in run_ranks(2, seconds_of_delayed_calls):
        assert synchronous >= 0.2
        assert waited >= 0.2
        assert started + rest >= 0.2


def test_growth_is_the_median_difference_of_rounds_in_units_of_the_delays():
    assert bench_overlap.growth([12.0, 25.0, 31.0], [10.0, 20.0, 30.0], 4.0) == 0.5
    assert bench_overlap.growth([1.0], [1.0], 0.0) is None


def test_bench_overlap_delays_every_collective_of_backward_once(tmp_path):
    arguments = ["--network", "preact20", "--batch", "2", "--image", "16", "--fractions", "0", "1", "--rounds", "1"]
    rows = run_script(bench_overlap.main, tmp_path, *arguments)
    assert [row["candidate"] for row in rows] == ["syncbn", "syncbn", "syncbn, fused", "syncbn, fused"]
    norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in plain("preact20").modules())
    assert {int(row["calls"]) for row in rows} == {norms}
    assert [row["growth"] == "" for row in rows] == [True, False, True, False]
    assert float(rows[1]["delay_ms"]) == float(rows[1]["unit_ms"]) > 0


def test_bench_overlap_needs_a_run_without_delay(tmp_path):
    with pytest.raises(SystemExit, match=r"expected 0 among --fractions, got \[1.0\]"):
        run_script(bench_overlap.main, tmp_path, "--fractions", "1")


# --- torch's own tests

SABOTAGE = """
import runpy, sys
import syncbn.statistics
syncbn.statistics.unbiased = lambda var, count: var
sys.argv = ["torch_tests.py"]
runpy.run_path("scripts/torch_tests.py", run_name="__main__")
"""


def run_torch_tests(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1])
    return run.returncode, run.stdout


@pytest.mark.slow
def test_torchs_own_tests_of_batch_normalization_pass():
    code, output = run_torch_tests("scripts/torch_tests.py")
    passed, differs, failed = (int(n) for n in re.search(r"(\d+) passed, (\d+) differs, (\d+) failed", output).groups())
    assert (code, failed) == (0, 0), output
    assert passed >= 48
    assert differs == 7
    page = (Path(__file__).parents[1] / "docs" / "differences.md").read_text()
    assert all(word in page for word in ("has_sync_bn", "eps=0", "all_gather", "num_batches_tracked"))


@pytest.mark.slow
def test_torchs_own_tests_notice_a_wrong_variance():
    code, output = run_torch_tests("-c", SABOTAGE)
    assert code == 1
    line = next(line for line in output.splitlines() if "Diff_Input_Sizes_Running_V" in line)
    assert "failed" in line
