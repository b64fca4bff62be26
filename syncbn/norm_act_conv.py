"""Norm, activation and the convolutions that read it as one unit, for modules and for tensors.

In training the unit keeps its input alone for backward, not the activated tensor too, and its all-reduce in backward
runs while the gradients of the convolutions' weights are computed. Wherever that is not possible (`_is_one_function`
says where), the modules are called one after the other, with the same result.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.activations import ACTIVATIONS, check_activation, name_of
from syncbn.collectives import release_peers
from syncbn.convolution import CLASSES, Geometry, check_operands, convolve, dtype_of, geometry_of, resolve
from syncbn.function import NormActConvFunction
from syncbn.functional import check_per_channel, most_common_size, normalize_over_group, running_of, sync_batch_norm
from syncbn.groups import Group, checked, group_size
from syncbn.module import (
    BatchNorm,
    SyncBatchNorm,
    SyncBatchNorm1d,
    SyncBatchNorm2d,
    SyncBatchNorm3d,
    normalize_batch,
)
from syncbn.statistics import Epilogue
from syncbn.transforms import is_transformed

_TORCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_OWN_NORMS = (BatchNorm, SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d)
# private names of torch: hooks of a module, of all modules, and of a tensor
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


class NormActConv(nn.Module):
    """`conv(activation(norm(input)))` for each of the convolutions, in training as one autograd Function.

    Half of the activations that a norm and a convolution keep for backward are not kept, and the gradients of the
    convolutions' weights are computed while the norm's all-reduce is under way. state_dict: `norm.*`, `convs.0.*`, ...

    The modules are called one after the other, with the same result, in evaluation, under `torch.compile`, tracing,
    exporters and `torch.func`; where one of them has hooks, a parametrization or a forward of its own, or a parameter
    of several convolutions has hooks; for norms other than batch normalization; and for paddings other than equally
    many zeros on both sides.

    Args:
        norm: a batch normalization of torch or of syncbn with C channels, whose fused activation is applied; or any
            other module in front of the activation, None for none.
        convs: one or more nn.Conv1d, 2d or 3d with C input channels.
        activation: as of `SyncBatchNorm`, for a norm without one.

    Raises:
        TypeError: at construction, for an argument that is no such module. In a forward pass, for a residual or a mask
            in front of which there is no layer of syncbn.
        ValueError: at construction, for other channels than the norm's, an unknown activation or two of them. In a
            forward pass as `SyncBatchNorm`; in one Function also, on every rank of the group, for an input that one of
            the convolutions does not take.
    """

    def __init__(self, norm: nn.Module | None, *convs: nn.Module, activation: str = "identity") -> None:
        super().__init__()
        _check_modules(norm, convs, activation)
        num_features = getattr(norm, "num_features", None)
        for conv in convs:
            if isinstance(norm, _BatchNorm) and num_features and conv.in_channels not in (0, num_features):  # 0 is lazy
                raise ValueError(
                    f"expected convolutions of the {num_features} channels of the norm, got {conv.in_channels} in "
                    f"{conv}"
                )
        self.norm = nn.Identity() if norm is None else norm
        self.convs = nn.ModuleList(convs)
        self.activation = activation

    def forward(
        self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """Return the output of the convolution, or a tuple with that of each.

        Args:
            input: (N, C, *S).
            residual: like `input`, added in front of the activation; for the layers of syncbn.
            mask: bool, broadcastable to (N, 1, *S), for the layers of syncbn; see there.
        """
        outputs = call_fused(self.norm, self.convs, input, residual, mask, activation=self.activation)
        return outputs[0] if len(outputs) == 1 else outputs

    def extra_repr(self) -> str:
        """Return the activation, if the unit adds one."""
        return f"activation={self.activation}" if self.activation != "identity" else ""

    def __prepare_scriptable__(self) -> None:  # torch.jit.script calls it
        raise TypeError(
            "expected torch's own layers for torch.jit.script, got a NormActConv: use torch.jit.trace or torch.export, "
            "which take the model as it is"
        )


def call_fused(
    norm: nn.Module | None,
    convs: Iterable[nn.Module],
    input: Tensor,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    activation: str = "identity",
) -> tuple[Tensor, ...]:
    """Return `conv(activation(norm(input)))` of each convolution: `NormActConv` for modules that live elsewhere.

    Arguments and errors are those of `NormActConv` and of its forward.
    """
    convs = tuple(convs)
    _check_modules(norm, convs, activation)
    extras = {name: t for name, t in (("residual", residual), ("mask", mask)) if t is not None}
    if extras and not isinstance(norm, BatchNorm):
        raise TypeError(
            f"expected a layer of syncbn in front of a {' and a '.join(extras)}, got {type(norm).__name__}: use "
            "syncbn.BatchNorm or syncbn.SyncBatchNorm"
        )
    fused = None if norm is None or isinstance(input, Proxy) else _fused(norm, convs, input, residual, mask)
    if norm is not None and fused is not None:
        own, convolutions = fused
        epilogue = Epilogue(residual, mask, activation if own == "identity" else own)
        outputs: tuple[Tensor, ...] = normalize_batch(norm, input, epilogue, apply=_function_of(*convolutions))
        return outputs
    if norm is not None:
        input = norm(_with_gradient(norm, convs, input, residual), **extras)
    y = ACTIVATIONS[activation].apply(input)
    return tuple(conv(y) for conv in convs)


class Convolution(NamedTuple):
    """A convolution for `sync_norm_act_conv`: arguments of torch.nn.functional.conv1d, 2d and 3d."""

    weight: Tensor
    bias: Tensor | None = None
    stride: int | Sequence[int] = 1
    padding: int | Sequence[int] | str = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1

    def geometry(self) -> Geometry:
        """Return one number for each spatial dimension.

        Raises:
            ValueError: the padding is "same" and needs more zeros on one side.
        """
        found = resolve(self.weight.shape[2:], self.stride, self.padding, self.dilation, self.groups)
        if found is None:
            raise ValueError(
                f"expected equally many zeros on both sides, got padding='same' for a weight of {self.weight.shape}: "
                "pad the input first"
            )
        return found


def sync_norm_act_conv(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    convolutions: Sequence[Convolution],
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    process_group: Group = None,
    *,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str = "identity",
) -> tuple[Tensor, ...]:
    """Return the output of each convolution of `activation(bn(input) + residual)`: `NormActConv` for tensors.

    Args:
        convolutions: that read the activated tensor, at least one.
        others: as of `sync_batch_norm`.

    Raises:
        ValueError: as `sync_batch_norm`; also for convolutions that do not take the input. In training on every rank.
    """
    tensors = {"weight": weight, "running_mean": running_mean, "bias": bias, "running_var": running_var}
    size = most_common_size(input, list(tensors.values()))
    group = process_group if isinstance(process_group, str) else checked(process_group)
    with release_peers(group, size, tensors=(weight, input)) if training else nullcontext():  # sends errors alone
        if not convolutions:
            raise ValueError("expected at least one convolution, got none: call sync_batch_norm")
        geometries = [convolution.geometry() for convolution in convolutions]
        parameters = [tensor for convolution in convolutions for tensor in convolution[:2]]
        if isinstance(input, Tensor):
            check_operands(input, geometries, parameters)
    dtype = _common_dtype(input, parameters, (weight, bias, residual)) if training else None
    options: dict[str, Any] = {"residual": residual, "mask": mask, "activation": activation}
    if dtype is None:
        y = sync_batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps, process_group, **options
        )
        return convolve(y, geometries, parameters, None)
    with release_peers(group, size, tensors=(weight, input)) as peers:
        peers.announce(input, weight, bias)
        check_activation(activation)
        check_per_channel(input, tensors)
        running = running_of(running_mean, running_var, None, momentum)
        outputs: tuple[Tensor, ...] = normalize_over_group(
            peers, input, weight, bias, Epilogue(**options), num_features=None, eps=eps, running=running,
            apply=_function_of(geometries, parameters, dtype),
        )  # fmt: skip
        return outputs


def activation_of(norm: nn.Module) -> str | None:
    """Return the activation that a norm applies, None for a module of which that is not known.

    Known are the layers of torch and of syncbn, and timm's BatchNormAct2d, converted or not.
    """
    kind: Any = type(norm)
    if kind in _TORCH_NORMS:
        return "identity"
    if kind in _OWN_NORMS:
        return norm.activation  # type: ignore[return-value]
    plain = norm.unsynced_class if isinstance(norm, SyncBatchNorm) else kind
    if plain is None or plain.__name__ != "BatchNormAct2d" or not plain.__module__.startswith("timm."):
        return None
    return name_of(norm.act) if type(norm.drop) is nn.Identity and is_plain(norm.act) else None  # type: ignore[arg-type]


def is_plain(module: nn.Module) -> bool:
    """Return whether a call of the module runs the forward of its class and no hooks of its own."""
    return "forward" not in vars(module) and not any(getattr(module, name) for name in _HOOKS)


def _check_modules(norm: Any, convs: tuple[Any, ...], activation: str) -> None:
    """Raise TypeError or ValueError, as `NormActConv` says."""
    if norm is not None and not isinstance(norm, nn.Module):
        raise TypeError(f"expected norm to be a module or None, got {type(norm).__name__}")
    if not convs or not all(isinstance(conv, CLASSES) for conv in convs):
        found = ", ".join(type(conv).__name__ for conv in convs) or "none"
        raise TypeError(f"expected one or more nn.Conv1d, nn.Conv2d or nn.Conv3d after the norm, got {found}")
    check_activation(activation)
    own = None if norm is None or activation == "identity" else activation_of(norm)
    if own not in (None, "identity"):
        raise ValueError(f"expected one activation, got {own} in the norm and activation={activation!r}: drop one")


def _fused(
    norm: nn.Module, convs: tuple[nn.Module, ...], input: Any, residual: Any, mask: Any
) -> tuple[str, tuple[list[Geometry], list[Tensor | None], torch.dtype]] | None:
    """Return the norm's own activation and the convolutions, if the unit can be one Function; otherwise None."""
    activation = activation_of(norm) if norm.training else None
    if activation is None or not _is_called_plainly(norm):
        return None
    geometries: list[Geometry] = []
    parameters: list[Tensor | None] = []
    for conv in convs:
        geometry = geometry_of(conv) if type(conv) in CLASSES and _is_called_plainly(conv) else None
        if geometry is None:
            return None
        geometries.append(geometry)
        parameters += [conv.weight, conv.bias]  # type: ignore[list-item]
    # the hooks of a parameter would run, with None, also where no loss reads the output of its convolution
    if len(convs) > 1 and any(getattr(p, name) for p in parameters if p is not None for name in _TENSOR_HOOKS):
        return None
    dtype = _common_dtype(input, parameters, (norm.weight, norm.bias, residual))  # type: ignore[arg-type]
    return None if dtype is None else (activation, (geometries, parameters, dtype))


def _function_of(geometries: Sequence[Geometry], parameters: Sequence[Tensor | None], dtype: torch.dtype) -> Any:
    """Return what `normalize_over_group` may call in place of `SyncBatchNormFunction.apply`."""

    def apply(x: Tensor, *others: Any) -> Any:
        check_operands(x, geometries, parameters)
        return NormActConvFunction.apply(x, *others, tuple(geometries), dtype, *parameters)

    return apply


def _is_called_plainly(module: nn.Module) -> bool:
    """Return whether a call of the module runs the forward of its class and nothing else."""
    return is_plain(module) and not any(getattr(torch_module, name) for name in _GLOBAL_HOOKS)


def _with_gradient(norm: nn.Module, convs: tuple[nn.Module, ...], input: Any, residual: Any) -> Any:
    """Return the input, with a gradient that nobody reads if the norm would otherwise have no backward pass.

    On a rank that runs the unit as one Function, the convolutions' gradients make the norm communicate in backward.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not torch.is_grad_enabled():
        return input
    if not isinstance(norm, SyncBatchNorm) or not norm.training or group_size(norm.process_group) == 1:
        return input
    is_plain_input = type(input) is Tensor and input.is_floating_point() and not is_transformed(input)
    own = [input, residual, *norm.parameters()]
    if not is_plain_input or any(t is not None and t.requires_grad for t in own):
        return input
    return input.detach().requires_grad_() if any(p.requires_grad for c in convs for p in c.parameters()) else input


def _common_dtype(
    input: Any, parameters: Sequence[Tensor | None], others: Sequence[Tensor | None]
) -> torch.dtype | None:
    """Return the dtype in which convolutions of the input compute, None if the unit cannot be one Function.

    It cannot for subclasses of tensors, under transforms of torch.func and forward-mode AD, and in graphs.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not isinstance(input, Tensor):
        return None
    known = [tensor for tensor in (input, *parameters, *others) if tensor is not None]
    if not all(type(tensor) in (Tensor, nn.Parameter) for tensor in known) or is_transformed(*known):
        return None
    if input.dim() < 2 or input.shape[1] == 0 or any(weight is None for weight in parameters[::2]):
        return None  # the modules say what is wrong
    return dtype_of(input)[0]
