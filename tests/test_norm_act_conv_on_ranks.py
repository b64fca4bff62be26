"""NormActConv on gloo ranks: as one process on the whole batch, one collective each way, no rank left waiting."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn import collectives, function
from train.preact_resnet import preact_resnet

SPLITS = {
    1: {"whole": (9,)},
    2: {"even": (4, 5), "uneven": (1, 8), "empty": (0, 9)},
    3: {"uneven": (1, 2, 6), "empty": (0, 9, 0)},
    4: {"uneven": (1, 4, 2, 2), "empty": (5, 0, 0, 4)},
}


class Case(NamedTuple):
    shape: tuple[int, ...]  # of a sample
    convs: Callable[[], list[nn.Module]]
    layout: torch.memory_format = torch.contiguous_format


CASES = {
    "NCHW": Case(
        (4, 5, 6), lambda: [nn.Conv2d(4, 5, 3, padding=1, stride=2), nn.Conv2d(4, 5, 1, stride=2, bias=False)]
    ),
    "NHWC": Case((4, 5, 6), lambda: [nn.Conv2d(4, 8, 3, groups=4)], torch.channels_last),
    "NCL": Case((4, 7), lambda: [nn.Conv1d(4, 3, 3, padding="same", dilation=2)]),
    "NCDHW": Case((4, 2, 4, 3), lambda: [nn.Conv3d(4, 3, 2)]),
    "large": Case((4, 128, 256), lambda: [nn.Conv2d(4, 2, 1)]),  # the CPU backend
}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def own_part(tensor: torch.Tensor, split: tuple[int, ...]) -> torch.Tensor:
    return tensor[sum(split[: dist.get_rank()]) : sum(split[: dist.get_rank() + 1])]


def plain_unit(case: Case) -> nn.ModuleDict:
    torch.manual_seed(0)
    norm = NORMS[len(case.shape) - 1](4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return nn.ModuleDict({"norm": norm, "convs": nn.ModuleList(case.convs())}).double()


def batch(case: Case, samples: int = 9) -> torch.Tensor:
    x = torch.randn(samples, *case.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x + torch.arange(samples).view(-1, *[1] * len(case.shape))  # the mean differs between ranks
    return x.to(memory_format=case.layout)


def whole_batch_step(case: Case) -> dict[str, torch.Tensor]:
    """Return outputs, gradients and buffers of torch's layers in one process."""
    modules, x = plain_unit(case), batch(case).requires_grad_()
    y = F.silu(modules["norm"](x))
    outputs = [conv(y) for conv in modules["convs"]]
    return results(modules, x, outputs, [cotangent(t) for t in outputs])


def cotangent(like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(9, *like.shape[1:], dtype=torch.float64, generator=generator)


def results(modules, x, outputs, cotangents) -> dict[str, torch.Tensor]:
    named = {"x": x, **dict(modules.named_parameters())}
    grads = torch.autograd.grad(outputs, list(named.values()), cotangents)
    found = {f"output {index}": y.detach() for index, y in enumerate(outputs)}
    return found | {f"grad of {n}": g for n, g in zip(named, grads, strict=True)} | dict(modules.named_buffers())


def steps_on_ranks(split: tuple[int, ...]) -> dict[str, dict[str, torch.Tensor]]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    found = {}
    for name, case in CASES.items():
        plain = plain_unit(case)
        unit = syncbn.NormActConv(syncbn.convert_sync_batchnorm(plain["norm"]), *plain["convs"], activation="silu")
        x = own_part(batch(case), split).detach().clone().requires_grad_()
        outputs = unit(x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert outputs[0].grad_fn.name() == "NormActConvFunctionBackward"
        found[name] = results(unit, x, outputs, [own_part(cotangent(y), split) for y in outputs])
    return found


@pytest.mark.parametrize("ranks, split", [(n, name) for n, names in SPLITS.items() for name in names])
def test_the_unit_equals_torchs_layers_on_the_whole_batch(ranks, split):
    found = run_ranks(ranks, steps_on_ranks, SPLITS[ranks][split])
    for name, case in CASES.items():
        for key, expected in whole_batch_step(case).items():
            parts = [rank[name][key] for rank in found]
            if key.startswith("output") or key == "grad of x":
                actual = torch.cat(parts)
            elif key.startswith("grad"):
                actual = sum(parts)
            else:
                assert all(torch.equal(part, parts[0]) for part in parts)
                actual = parts[0]
            scale = max(1, expected.abs().max().item())
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9 * scale, msg=lambda m, k=key: f"{k}: {m}")


# --- training tools, on networks made of units


def network(fused: bool) -> nn.Module:
    torch.manual_seed(0)
    return preact_resnet(20, nn.BatchNorm2d, num_classes=3, width=4, image_size=8, fused=fused).double()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 8, 3, 8, 8, dtype=torch.float64, generator=generator), torch.arange(24).view(3, 8) % 3


def train(model: nn.Module, x: torch.Tensor, target: torch.Tensor, scale: float, *, accumulate: bool = False) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for index, (images, classes) in enumerate(zip(x, target, strict=True)):
        if accumulate and index < 2 and isinstance(model, DistributedDataParallel):
            with model.no_sync():
                (F.cross_entropy(model(images), classes, reduction="sum") * scale).backward()
            continue
        (F.cross_entropy(model(images), classes, reduction="sum") * scale).backward()
        if not accumulate or index == 2:
            optimizer.step()
            optimizer.zero_grad()


def prepared(how: str, model: nn.Module) -> nn.Module:
    if how == "frozen convolutions":
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.requires_grad_(False)
    if how == "frozen norms":
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.requires_grad_(False)
    return model


class CheckpointedStages(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.model.stem(x)
        for stage in self.model.stages:
            x = checkpoint(stage, x, use_reentrant=False)
        return self.model.head(F.relu(self.model.norm(x)).mean((2, 3)))


DDP_OPTIONS = {
    "static graph": {"static_graph": True},
    "find unused": {"find_unused_parameters": True},
    "bucket views": {"gradient_as_bucket_view": True},
}


def train_on_ranks(how: str, split: tuple[int, ...]) -> dict[str, torch.Tensor]:
    model = prepared(how, syncbn.convert_sync_batchnorm(network(fused=how != "unfused")))
    wrapped: nn.Module = CheckpointedStages(model) if how == "checkpointed" else model
    if how.startswith("fsdp"):
        mesh = init_device_mesh("cpu", (len(split),))
        for stage in model.stages:
            fully_shard(stage, mesh=mesh, reshard_after_forward="reshard" in how)
        fully_shard(model, mesh=mesh, reshard_after_forward="reshard" in how)
    else:
        wrapped = DistributedDataParallel(wrapped, **DDP_OPTIONS.get(how, {}))
    x, target = (tensor.transpose(0, 1) for tensor in data())
    own = [own_part(tensor, split).transpose(0, 1) for tensor in (x, target)]
    train(wrapped, *own, scale=len(split) / 8, accumulate=how == "no_sync")
    return {name: v.full_tensor() if hasattr(v, "full_tensor") else v for name, v in model.state_dict().items()}


@pytest.mark.parametrize(
    "how",
    [
        "plain", "unfused", "static graph", "find unused", "bucket views", "no_sync", "checkpointed",
        "frozen convolutions", "frozen norms", "fsdp", "fsdp, reshard",
    ],
)  # fmt: skip
def test_a_network_of_units_trains_as_one_process_with_torchs_layers(how):
    split = (3, 5)
    expected = prepared(how, network(fused=False))
    train(expected, *data(), scale=1 / 8, accumulate=how == "no_sync")
    for state in run_ranks(2, train_on_ranks, how, split):
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def fsdp_in_bfloat16() -> list[bool]:
    model = syncbn.convert_sync_batchnorm(network(fused=True).float())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
    x, target = data()
    F.cross_entropy(model(x[0].float()).float(), target[0]).backward()
    return [bool(p.grad.full_tensor().isfinite().all()) and p.grad.dtype == torch.float32 for p in model.parameters()]


def test_fsdp2_in_mixed_precision_has_gradients_in_float32():
    for finite in run_ranks(2, fsdp_in_bfloat16):
        assert all(finite)


# --- second derivatives


def gradient_penalty(x: torch.Tensor, *, synchronize: bool) -> list[torch.Tensor]:
    modules = plain_unit(CASES["NCHW"])
    x = x.clone().requires_grad_()
    if synchronize:
        norm = syncbn.convert_sync_batchnorm(modules["norm"])
        outputs = syncbn.NormActConv(norm, *modules["convs"], activation="silu")(x)
    else:
        y = F.silu(modules["norm"](x))
        outputs = tuple(conv(y) for conv in modules["convs"])
    value = sum(output.pow(3).sum() for output in outputs)
    grads = torch.autograd.grad(value, [x, modules["convs"][0].weight], create_graph=True)
    total = dist.nn.functional.all_reduce(grads[1]) if synchronize else grads[1]
    ranks = dist.get_world_size() if synchronize else 1
    penalty = grads[0].square().sum() + total.square().sum() / ranks
    leaves = [x, *modules.parameters()]
    found = torch.autograd.grad(penalty, leaves, allow_unused=True, materialize_grads=True)
    return [found[0], *(collectives.all_reduce_(g.clone(), None) if synchronize else g for g in found[1:])]


def penalty_on_ranks(split: tuple[int, ...]) -> list[torch.Tensor]:
    return gradient_penalty(own_part(batch(CASES["NCHW"]), split), synchronize=True)


@pytest.mark.parametrize("split", [(9,), (2, 7), (4, 0, 5)], ids=str)
def test_second_derivatives_equal_those_of_one_process(split):
    ranks = run_ranks(len(split), penalty_on_ranks, split)
    expected = gradient_penalty(batch(CASES["NCHW"]), synchronize=False)
    torch.testing.assert_close(torch.cat([found[0] for found in ranks]), expected[0], rtol=1e-9, atol=1e-9)
    for found in ranks:
        for actual, wanted in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


# --- collectives


class Events:
    """Records, while active, when the normalization's collective starts and ends, and weight gradients."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        start, weights = collectives._start_all_reduce_, function.grads_of_parameters

        def recorded_start(values, group, *, async_op):
            self.names.append("start" if async_op else "start and wait")
            complete = start(values, group, async_op=async_op)

            def recorded():
                self.names.append("wait")
                return complete()

            return recorded if async_op else complete

        def recorded_weights(*args):
            self.names.append("weight gradients")
            return weights(*args)

        monkeypatch.setattr(collectives, "_start_all_reduce_", recorded_start)
        monkeypatch.setattr(function, "grads_of_parameters", recorded_weights)


def events_of(needs: dict[int, tuple[str, ...]], used: dict[int, int]) -> list[str]:
    """Return what a unit does on this rank, which needs these gradients and reads this output."""
    unit = syncbn.NormActConv(syncbn.SyncBatchNorm(4, activation="relu"), *CASES["NCHW"].convs())
    x = torch.randn(3, 4, 5, 6)
    for name, leaf in {"x": x, **dict(unit.named_parameters())}.items():
        leaf.requires_grad_(name in needs[dist.get_rank()])
    with pytest.MonkeyPatch.context() as monkeypatch:
        events = Events(monkeypatch)
        unit(x)[used[dist.get_rank()]].square().sum().backward()
    return events.names


ALL = ("x", "norm.weight", "norm.bias", "convs.0.weight", "convs.0.bias", "convs.1.weight")


@pytest.mark.parametrize("needed", [*itertools.combinations(ALL, 1), ALL[3:], ALL[:3]], ids=str)
def test_ranks_that_need_different_gradients_or_outputs_stay_in_step(needed):
    expected = ["start and wait", "start", "weight gradients", "wait"]
    for used in ({0: 0, 1: 0}, {0: 0, 1: 1}):
        assert run_ranks(2, events_of, {0: ALL, 1: needed}, used) == [expected, expected]


def fails(where: str) -> tuple[str, str, list[float]]:
    """Let rank 1 raise; return the error of this rank and, of a collective afterwards, the sum."""
    unit = syncbn.NormActConv(syncbn.SyncBatchNorm(4, activation="relu"), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1))
    x = torch.randn(3, 4, 5, 6, requires_grad=True)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if dist.get_rank() == 1:

            def broken(*_):
                raise MemoryError("no room")

            if where == "channels":
                x = torch.randn(3, 5, 5, 6)
            elif where == "dtype":
                x = torch.ones(3, 4, 5, 6, dtype=torch.int64)
            elif where == "nothing":
                x = None
            elif where == "kernel":
                x = torch.randn(3, 4, 2, 2)
            elif where == "dimensions":
                x = torch.randn(3, 4, 5)
            elif where == "convolution":
                unit.convs.double()
            elif where == "statistics":
                monkeypatch.setattr("syncbn.backends.torch_ops.pack", broken)
            elif where == "input gradient":
                monkeypatch.setattr(function, "grad_of_input", broken)
            elif where == "weight gradient":
                monkeypatch.setattr(function, "grads_of_parameters", broken)
        kind = message = "nothing"
        try:
            sum(y.square().sum() for y in unit(x)).backward()
        except Exception as error:
            kind, message = type(error).__name__, str(error)
    return kind, message, collectives.all_reduce_(torch.ones(1), None).tolist()


@pytest.mark.parametrize(
    "where",
    ["channels", "dtype", "nothing", "kernel", "dimensions", "convolution", "statistics", "input gradient"],
)
def test_an_error_before_the_collective_raises_on_every_rank(where):
    (kind, message, total), (other, _, _) = run_ranks(2, fails, where)
    assert (kind, other) == ("PeerError", "ValueError")
    assert "another rank of the group" in message
    assert total == [2]


def test_an_error_in_a_weight_gradient_leaves_no_rank_waiting():
    (kind, _, total), (other, message, other_total) = run_ranks(2, fails, "weight gradient")
    assert (kind, other) == ("nothing", "MemoryError")
    assert message == "no room"
    assert total == other_total == [2]


class TwoUnits(nn.Module):
    """Two units that one rank may run in another order, or of which it may skip one."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.a, self.b = (
            syncbn.NormActConv(syncbn.SyncBatchNorm(4, activation="relu"), nn.Conv2d(4, 4, 1)) for _ in range(2)
        )
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.order:
            x = self.get_submodule(name)(x)
        return x


def desynchronize(order: str) -> tuple[str, str]:
    model = TwoUnits(order if dist.get_rank() == 1 else "ab")
    x = torch.randn(3, 4, 5, 6, requires_grad=True)
    try:
        with syncbn.detect_desync(2.0):
            model(x).sum().backward()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.parametrize("order", ["ba", "a"])
def test_detect_desync_names_the_norm_of_the_unit(order):
    for kind, message in run_ranks(2, desynchronize, order):
        assert kind == "DesyncError"
        assert "b.norm" in message
    assert all(kind == "nothing" for kind, _ in run_ranks(2, desynchronize, "ab"))


def fails_in_functional_form(where: str) -> tuple[str, list[float]]:
    conv = syncbn.Convolution(torch.ones(2, 4, 1, 1))
    x: torch.Tensor | None = torch.randn(3, 4, 5, 5)
    convolutions = [conv]
    if dist.get_rank() == 0:
        x = None if where == "input" else x
        convolutions = {
            "none": [], "padding": [conv._replace(padding="full")], "channels": [conv._replace(groups=2)],
        }.get(where, convolutions)  # fmt: skip
    try:
        syncbn.sync_norm_act_conv(x, torch.zeros(4), torch.ones(4), None, None, convolutions, True)
        kind = "nothing"
    except Exception as error:
        kind = type(error).__name__
    return kind, collectives.all_reduce_(torch.ones(1), None).tolist()


@pytest.mark.parametrize("where", ["input", "none", "padding", "channels"])
def test_bad_arguments_of_the_functional_form_on_one_rank_raise_on_every_rank(where):
    assert run_ranks(2, fails_in_functional_form, where) == [("ValueError", [2.0]), ("PeerError", [2.0])]


def trains_with_hooks_on_rank_0(where: str) -> tuple[torch.Tensor, list[float]]:
    """A unit whose norm needs no gradient runs as one Function on rank 1 and module by module on rank 0."""
    torch.manual_seed(0)
    unit = syncbn.NormActConv(syncbn.SyncBatchNorm(4, affine=False), nn.Conv2d(4, 3, 3)).double()
    if dist.get_rank() == 0:
        unit.get_submodule(where).register_forward_hook(lambda *_: None)
    for _ in range(2):
        unit(torch.randn(2, 4, 5, 5, dtype=torch.float64)).square().sum().backward()
    return unit.norm.running_var, collectives.all_reduce_(torch.ones(1), None).tolist()


@pytest.mark.parametrize("where", ["norm", "convs.0"])
def test_a_rank_that_runs_the_modules_in_turn_stays_in_step(where):
    (first, total), (second, other) = run_ranks(2, trains_with_hooks_on_rank_0, where)
    assert torch.equal(first, second)
    assert total == other == [2]


def pairs() -> bool:
    group, _ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
    unit = syncbn.NormActConv(syncbn.SyncBatchNorm(4, momentum=1.0, process_group=group), nn.Conv2d(4, 4, 1))
    x = torch.full((2, 4, 3, 3), float(dist.get_rank()), requires_grad=True)
    unit(x).sum().backward()
    return bool(((unit.norm.running_mean - (1 + dist.get_rank() % 2)).abs() < 1e-6).all())


def test_a_unit_synchronizes_over_the_group_of_its_norm():
    assert run_ranks(4, pairs) == [True] * 4
