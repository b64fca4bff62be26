"""torch.func, forward-mode derivatives and batched gradients in training equal those on the whole batch."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import syncbn

SPLITS = {"one": (7,), "two": (3, 4), "three": (4, 0, 3)}
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


class Elementary(nn.BatchNorm1d):
    """The formula in elementary operations: torch's own layer has no third derivative."""

    def forward(self, x):
        dims = [0, *range(2, x.dim())]
        centred = x - x.mean(dims, keepdim=True)
        normalized = centred / (centred.square().mean(dims, keepdim=True) + self.eps).sqrt()
        shape = (1, -1, *[1] * (x.dim() - 2))
        return normalized * self.weight.view(shape) + self.bias.view(shape)


def network(norm=nn.BatchNorm1d, **options) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 3, 2),
        norm(3, **options),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(9, 4),
        norm(4, **options),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.double()


def data() -> tuple[torch.Tensor, ...]:
    """Return the whole batch, a tangent of it, cotangents of the output and three batches of these."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((7, 2, 4), (7, 2, 4), (7, 4), (7, 4, 3))
    return tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)


def derivatives(model: nn.Module, x, tangent, cotangent, cotangents) -> dict[str, tuple[str, torch.Tensor]]:
    """Return derivatives of all kinds, and whether the whole is their sum over ranks, or ranks hold parts of it."""
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(2)
    direction = {n: torch.randn(p.shape, dtype=p.dtype, generator=generator) for n, p in parameters.items()}

    def output(parameters, x=x):
        return functional_call(model, parameters, (x,))

    def loss(parameters, x=x):
        return (output(parameters, x).tanh() * cotangent).sum()

    def losses(parameters):
        return torch.einsum("nc,nck->k", output(parameters).tanh(), cotangents)

    def flat(values) -> torch.Tensor:
        return torch.cat([value.flatten() for value in values.values()])

    def product(parameters):
        return jvp(grad(loss), (parameters,), (direction,))[1]

    x_grad = x.clone().requires_grad_()
    y = output(parameters, x_grad)
    found = {
        "grad": ("sum", flat(grad(loss)(parameters))),
        "grad of x": ("part", grad(loss, argnums=1)(parameters, x)),
        "vjp": ("sum", flat(vjp(output, parameters)[1](cotangent)[0])),
        "jvp": ("part", jvp(output, (parameters,), (direction,))[1]),
        "jvp of x": ("part", jvp(lambda x: output(parameters, x), (x,), (tangent,))[1]),
        "jacrev": ("sum", torch.cat([j.flatten(1) for j in jacrev(losses)(parameters).values()], dim=1)),
        "jacfwd": ("part", torch.cat([j.flatten(2) for j in jacfwd(output)(parameters).values()], dim=2)),
        "forward over reverse": ("sum", flat(product(parameters))),
        "third": (
            "sum",
            flat(grad(lambda p: sum((v * direction[n]).sum() for n, v in product(p).items()))(parameters)),
        ),
        "vmap of the weight": (
            "part",
            vmap(lambda s: output(parameters | {"5.weight": s}), out_dims=1)(torch.ones(2, 4).double()),
        ),
        "is_grads_batched": (
            "part",
            torch.autograd.grad(y, x_grad, cotangents.movedim(2, 0), is_grads_batched=True, retain_graph=True)[
                0
            ].movedim(0, 1),
        ),
        "vmap of grad": (
            "part",
            vmap(lambda c: torch.autograd.grad(y, x_grad, c, retain_graph=True)[0], 2, 1)(cotangents),
        ),
    }
    with forward_ad.dual_level():
        dual = output(parameters, forward_ad.make_dual(x, tangent))
        found["forward mode"] = ("part", forward_ad.unpack_dual(dual).tangent)
    return {name: (kind, value.detach()) for name, (kind, value) in found.items()}


def on_ranks(split: tuple[int, ...]) -> dict[str, tuple[str, torch.Tensor]]:
    part = slice(sum(split[: dist.get_rank()]), sum(split[: dist.get_rank() + 1]))
    model = syncbn.convert_sync_batchnorm(network(track_running_stats=False))
    return derivatives(model, *(values[part] for values in data()))


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_derivatives_equal_those_of_one_process_on_the_whole_batch(split):
    expected = derivatives(network(norm=Elementary, track_running_stats=False), *data())
    ranks = run_ranks(len(split), on_ranks, split)
    for name, (kind, value) in expected.items():
        parts = [rank[name][1] for rank in ranks]
        whole = torch.cat(parts) if kind == "part" else torch.stack(parts).sum(0)
        torch.testing.assert_close(whole, value, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
        assert value.abs().max() > 1e-3


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_an_ensemble_under_vmap_trains_as_each_of_its_networks(activation):
    def networks():
        torch.manual_seed(0)
        return [
            syncbn.SyncBatchNorm(3, momentum=momentum, activation=activation, dtype=torch.float64, temperature=0.5)
            for momentum in (0.1, 0.1)
        ]

    x, residual = torch.randn(2, 2, 5, 3, 4, dtype=torch.float64)
    mask = torch.rand(2, 5, 1, 4) < 0.7
    alone, together = networks(), networks()
    expected = [layer(*call) for layer, *call in zip(alone, x, residual, mask, strict=True)]
    parameters, buffers = stack_module_state(together)
    base = copy.deepcopy(together[0]).to("meta")

    def call(parameters, buffers, *args):
        return functional_call(base, (parameters, buffers), args)

    y = vmap(call)(parameters, buffers, x, residual, mask)
    torch.testing.assert_close(y, torch.stack(expected), **TOLERANCE)
    for name, values in buffers.items():
        torch.testing.assert_close(values, torch.stack([layer.state_dict()[name] for layer in alone]), **TOLERANCE)


def test_statistics_move_once_for_each_forward_pass_of_a_transform():
    model, twin = syncbn.convert_sync_batchnorm(network()), network()
    x = data()[0]
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return functional_call(model, parameters, (x,)).square().sum()

    for transform in (grad, jacrev, jacfwd, hessian, lambda f: grad(lambda p: grad(f)(p)["5.weight"].sum())):
        transform(loss)(parameters)
        twin(x)
        torch.testing.assert_close(model.state_dict(), twin.state_dict(), **TOLERANCE)


def test_buffers_that_are_passed_are_moved_too():
    model, twin = syncbn.convert_sync_batchnorm(network()), network()
    state = {name: value.clone() for name, value in model.named_buffers()}
    grad(lambda p, b: functional_call(model, (p, b), (data()[0],)).sum())(dict(model.named_parameters()), state)
    twin(data()[0])
    torch.testing.assert_close(state, dict(twin.named_buffers()), **TOLERANCE)
    assert model[1].num_batches_tracked == 0


def test_one_set_of_running_statistics_for_many_batches_is_refused():
    layer = syncbn.SyncBatchNorm(3)
    with pytest.raises(
        ValueError, match=r"for each call of SyncBatchNorm under torch\.func\.vmap, got one for all: pass"
    ):
        vmap(layer)(torch.randn(2, 5, 3))
    assert layer.num_batches_tracked == 0
    layer.eval()
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(vmap(layer)(x), torch.stack([layer(x[0]), layer(x[1])]))


@pytest.mark.parametrize("masked", [False, True])
def test_one_value_per_channel_is_refused_as_it_is_without_a_transform(masked):
    layer = syncbn.SyncBatchNorm(3)
    x, mask = (
        (torch.randn(4, 3), torch.tensor([[True], [False], [False], [False]])) if masked else (torch.randn(1, 3), None)
    )
    with pytest.raises(ValueError, match="expected more than 1 value per channel when training, got 1"):
        grad(lambda x: layer(x, mask=mask).sum())(x)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("training", [True, False])
def test_transforms_agree_with_autograd_for_every_layout(layout, training):
    layer = syncbn.SyncBatchNorm(6, activation="leaky_relu", dtype=torch.float64)
    layer.running_mean.uniform_()
    layer.train(training)
    x, cotangent = torch.randn(2, 4, 6, 5, 1, dtype=torch.float64)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        x = x.transpose(1, 3).contiguous().transpose(1, 3)
    x.requires_grad_()
    expected = torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), cotangent)

    def loss(x, weight, bias):
        return (functional_call(layer, {"weight": weight, "bias": bias}, (x,)) * cotangent).sum()

    found = grad(loss, argnums=(0, 1, 2))(x.detach(), layer.weight.detach(), layer.bias.detach())
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_a_cotangent_with_a_tangent_gives_the_derivative_of_the_gradient():
    layer = syncbn.SyncBatchNorm(3, activation="silu", dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    cotangent, tangent = torch.randn(2, 5, 3, dtype=torch.float64)
    y = layer(x)
    with forward_ad.dual_level():
        (dual,) = torch.autograd.grad(y, x, forward_ad.make_dual(cotangent, tangent), retain_graph=True)
        found = forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(found, torch.autograd.grad(y, x, tangent)[0], **TOLERANCE)


def refusals() -> list[str]:
    rank, layer = dist.get_rank(), syncbn.SyncBatchNorm(3, dtype=torch.float64)
    x = torch.randn(4 + rank, 3, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def squares(parameters):
        return functional_call(layer, parameters, (x,)).square()

    def fail_on_rank_1(parameters):
        return functional_call(layer, parameters, (x.float() if rank == 1 else x,)).sum()

    y = layer(x.requires_grad_())
    calls = [
        lambda: vmap(layer)(torch.randn(2, 4, 3, dtype=torch.float64)),
        lambda: vmap(grad(lambda x: layer(x).sum()))(torch.randn(2, 4, 3, dtype=torch.float64)),
        lambda: jacrev(lambda x: layer(x))(x),  # 12 and 15 outputs
        lambda: torch.autograd.grad(y, x, torch.ones(2 + rank, *y.shape, dtype=y.dtype), is_grads_batched=True),
        lambda: grad(fail_on_rank_1)(parameters),
        lambda: jvp(fail_on_rank_1, (parameters,), (parameters,)),
    ]
    messages = []
    for call in calls:
        try:
            call()
            messages.append("accepted")
        except ValueError as error:
            messages.append(str(error))
        grad(lambda p: squares(p).sum())(parameters)  # the group is usable
    return messages


def test_what_has_no_meaning_on_several_ranks_is_refused_on_every_rank():
    first, second = run_ranks(2, refusals)
    for message in (first[0], first[1], second[0], second[1]):
        assert message.startswith("expected one batch in each call of SyncBatchNorm on 2 ranks, got torch.func.vmap")
        assert "syncbn.revert_sync_batchnorm" in message
    assert (
        "expected vmap over equally many derivatives on all 2 ranks of the group, got 12 here and 27 in all" in first[2]
    )
    assert "got 15 here" in second[2]
    assert "got 2 here and 5 in all" in first[3]
    for index in (4, 5):
        assert "got a refusal from another rank" in first[index]
        assert "expected input of torch.float64" in second[index]


@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_batched_gradients_have_derivatives(activation):
    layer = syncbn.SyncBatchNorm(3, activation=activation, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    cotangents = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    inputs = [x, layer.weight, cotangents]

    def second(grads):
        return torch.autograd.grad((grads.pow(3)).sum(), inputs)

    y = layer(x)
    (together,) = torch.autograd.grad(y, x, cotangents, is_grads_batched=True, create_graph=True)
    alone = torch.stack([torch.autograd.grad(y, x, c, create_graph=True)[0] for c in cotangents])
    torch.testing.assert_close(together, alone, **TOLERANCE)
    torch.testing.assert_close(second(together), second(alone), **TOLERANCE)


def test_a_transform_may_surround_a_backward_pass_of_an_outer_graph():
    layer = syncbn.SyncBatchNorm(3, activation="silu", dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    cotangent, tangent = torch.randn(2, 5, 3, dtype=torch.float64)
    y = layer(x)

    def pull(cotangent):
        return torch.autograd.grad(y, x, cotangent, retain_graph=True)[0]

    found = jvp(pull, (cotangent,), (tangent,))
    torch.testing.assert_close(found, (pull(cotangent), pull(tangent)), **TOLERANCE)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_batched_gradients_for_every_layout(layout, training):
    layer = syncbn.SyncBatchNorm(3, dtype=torch.float64).train(training)
    x = torch.randn(2, 3, 4, 2, dtype=torch.float64)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        x = x.transpose(0, 3).contiguous().transpose(0, 3)
    together, alone = (torch.autograd.functional.jacobian(layer, x, vectorize=v) for v in (True, False))
    torch.testing.assert_close(together, alone, **TOLERANCE)


def test_a_network_is_linearized():
    model = nn.Sequential(nn.Linear(3, 3), syncbn.SyncBatchNorm(3, track_running_stats=False)).double()
    x, tangent = torch.randn(2, 4, 3, dtype=torch.float64)
    y, f = torch.func.linearize(model, x)
    torch.testing.assert_close((y, f(tangent)), jvp(model, (x,), (tangent,)), **TOLERANCE)
