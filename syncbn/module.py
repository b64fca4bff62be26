"""SyncBatchNorm and its local twin: parameters, buffers, train/eval policy, running statistics."""

import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from syncbn import groups
from syncbn.activations import check_activation
from syncbn.checks import note_evaluation
from syncbn.collectives import release_peers
from syncbn.function import SyncBatchNormFunction
from syncbn.functional import evaluate, normalize_over_group, running_of
from syncbn.groups import LOCAL, Group
from syncbn.statistics import Epilogue

_GROUP_ATTRIBUTES = ("process_group", "unsynced_group")


class _RefusesReplacement:
    """The attribute `qconfig`, which a layer has only once it is set. Converters to torch's SyncBatchNorm ask for it.

    torch's, Lightning's (`Trainer(sync_batchnorm=True)`) and timm's replace every instance of torch's base class, ours
    included. Their common name is all that tells them from quantization tools, which ask for `qconfig` too.
    """

    def __get__(self, layer: Any, owner: Any) -> Any:
        if layer is not None and sys._getframe(1).f_code.co_name == "convert_sync_batchnorm":
            layer._refuse_replacement()
        if layer is None or "qconfig" not in vars(layer):
            raise AttributeError("qconfig")
        return vars(layer)["qconfig"]

    def __set__(self, layer: Any, value: Any) -> None:
        vars(layer)["qconfig"] = value

    def __delete__(self, layer: Any) -> None:
        if vars(layer).pop("qconfig", self) is self:
            raise AttributeError("qconfig")


class BatchNorm(_BatchNorm):
    """Batch normalization over this rank's batch, for input with any number of dimensions.

    `revert_sync_batchnorm` turns a layer that was constructed as `SyncBatchNorm` into this class. The arguments are the
    same, without `process_group`.
    """

    activation: str = "identity"
    temperature: float = 1.0
    qconfig = _RefusesReplacement()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str = "identity",
        temperature: float = 1.0,
    ) -> None:
        if num_features < 1 and not isinstance(self, LazyModuleMixin):
            raise ValueError(f"expected num_features of at least 1, got {num_features}")
        if eps < 0:
            raise ValueError(f"expected eps of at least 0, got {eps}")
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"expected momentum between 0 and 1, or None for a cumulative average, got {momentum}")
        _check_epilogue(activation, temperature)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:  # torch 2.11 has no such argument
            self.register_parameter("bias", None)
        self.activation = activation
        self.temperature = temperature

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return `activation(temperature * bn(input) + residual)`, like `input` in shape, dtype and memory format.

        Args:
            input: (N, C) to (N, C, D, H, W).
            residual: like `input`.
            mask: bool, broadcastable to (N, 1, *S); where False, values count as absent and the output is 0.
        """
        proxy: Any = next((t for t in (input, residual, mask) if isinstance(t, Proxy)), None)
        if proxy is not None:  # torch.fx traces torch's layers as one call; ours too
            if type(self).forward is not BatchNorm.forward:  # the call would run the code around this one again
                raise TypeError(
                    f"expected a layer that torch.fx traces as one call, got {type(self).__name__} with a forward of "
                    "its own: let is_leaf_module of the Tracer return True for it"
                )
            others = {"residual": residual, "mask": mask}
            return call_module(self, proxy, input, **{name: t for name, t in others.items() if t is not None})
        epilogue = Epilogue(residual, mask, self.activation)
        if not self.training and self.running_mean is not None:
            self._check_input_dim(input)
            note_evaluation(self._group())
            weight, buffers = self.weight, (self.running_mean, self.running_var)
            if isinstance(weight, Proxy):  # a trace in which the input is a buffer
                return call_module(self, weight, input)
            options: Any = {"num_features": self.num_features, "eps": self.eps, "temperature": self.temperature}
            return evaluate(input, weight, self.bias, epilogue, *buffers, **options)
        y: Tensor = normalize_batch(self, input, epilogue)
        return y

    def reset_parameters(self) -> None:
        """Set the running mean to 0, the running variance to 1, weight to 1 and bias to 0."""
        self.reset_running_stats()
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """Return the arguments; activation and temperature only if they are not the defaults."""
        text = super().extra_repr()
        text += f", activation={self.activation}" if self.activation != "identity" else ""
        return text + (f", temperature={self.temperature}" if self.temperature != 1 else "")

    def __prepare_scriptable__(self) -> None:  # torch.jit.script calls it
        raise TypeError(
            f"expected torch's own layers for torch.jit.script, got a {type(self).__name__}: call "
            "syncbn.revert_sync_batchnorm(model) first; torch.jit.trace and torch.export take the model as it is"
        )

    def _refuse_replacement(self) -> None:
        """Raise TypeError if torch's SyncBatchNorm cannot do what this layer does."""
        if self.activation != "identity" or self.temperature != 1:
            raise TypeError(
                f"expected a layer without activation and temperature to replace by torch's SyncBatchNorm, got {self}: "
                "use syncbn.convert_sync_batchnorm, which keeps both"
            )

    def _group(self) -> Group:
        return LOCAL

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # any number; `check_input` requires at least two


def normalize_batch(
    layer: Any, input: Tensor, epilogue: Epilogue, apply: Callable[..., Any] = SyncBatchNormFunction.apply
) -> Any:
    """Normalize with the statistics of the batch as the layer does, or a local one of torch's, by `apply`.

    Raises:
        ValueError: as `sync_batch_norm`.
    """
    is_ours = isinstance(layer, BatchNorm)
    group = layer._group() if layer.training and is_ours else LOCAL
    with release_peers(group, layer.num_features, layer=layer) as peers:
        weight, bias = layer.weight, layer.bias  # looked up once: attribute access of a module is slow
        if isinstance(weight, Proxy):
            return call_module(layer, weight, input)
        peers.announce(input, weight, bias)
        layer._check_input_dim(input)
        mean, var = layer.running_mean, layer.running_var
        if not is_ours and mean is not None:  # torch's layer, which saves them for backward, does not count the move
            mean, var = mean.data, var.data
        running = running_of(mean, var, layer.num_batches_tracked, layer.momentum)
        running = running if layer.training and layer.track_running_stats else None
        options = {"num_features": layer.num_features, "eps": layer.eps, "running": running, "apply": apply}
        temperature = layer.temperature if is_ours else 1.0
        return normalize_over_group(peers, input, weight, bias, epilogue, temperature=temperature, **options)


class SyncBatchNorm(BatchNorm):
    """Batch normalization over the batch of all ranks of a process group.

    A drop-in for `torch.nn.BatchNorm1d`, `2d`, `3d` and `torch.nn.SyncBatchNorm`: same arguments, same state_dict, on
    CPU (gloo) and CUDA (NCCL) alike. In training every rank of the group takes part in one all-reduce forward and one
    backward; ranks may hold different numbers of samples, or none. In evaluation nothing communicates.

    Gradients of weight and bias are sums over this rank, as for any parameter: DistributedDataParallel averages them.

    Args:
        num_features: C of an input (N, C) to (N, C, D, H, W).
        eps: added to the variance.
        momentum: weight of the batch in the running statistics, `running = (1 - momentum) * running + momentum * batch`
            (several texts use the reverse convention, 0.9); None for a cumulative average.
        affine: learn `weight` and `bias`.
        track_running_stats: keep running statistics; without them, evaluation uses the statistics of the local batch.
        process_group: the ranks that share statistics, or a DeviceMesh with one dimension; all ranks by default.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: with `affine`, learn `bias` beside `weight`.
        activation: identity, relu, leaky_relu (slope 0.01), silu, relu6, gelu or hardswish; its input is computed again
            in backward, not kept.
        temperature: factor on the normalized output, above 1 sharper, below 1 smoother; not part of the state_dict.

    Raises:
        ValueError: at construction, for an invalid argument. In a forward pass, for an invalid input; in training on
            every rank of the group, and also for any other error before the all-reduce or for a batch with one value
            per channel over all ranks.
        TypeError: `process_group` is not a process group.

    Source: Ioffe & Szegedy 2015, Algorithm 1; over all ranks as in Peng et al. 2018 (MegDet), section 3.
    """

    process_group: dist.ProcessGroup | None = None
    unsynced_class: type[_BatchNorm] | None = None  # the class before conversion, which revert restores
    unsynced_group: dist.ProcessGroup | None = None
    convert_sync_batchnorm: ClassVar[Callable[..., nn.Module]]  # defined in convert.py, which builds on this class

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | DeviceMesh | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str = "identity",
        temperature: float = 1.0,
    ) -> None:
        group = groups.checked(process_group)
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            activation=activation,
            temperature=temperature,
        )
        self.process_group = group

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {name: groups.reference_to(getattr(self, name)) for name in _GROUP_ATTRIBUTES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in _GROUP_ATTRIBUTES:
            setattr(self, name, groups.resolve(getattr(self, name)))

    def _refuse_replacement(self) -> None:
        """Raise TypeError: torch's converter would replace this layer, and drop its activation and temperature."""
        raise TypeError(
            f"expected a model without layers of syncbn to convert to torch.nn.SyncBatchNorm, got {self}: it is "
            "synchronized already, so leave out this conversion (in Lightning sync_batchnorm=True), or call "
            "syncbn.revert_sync_batchnorm(model) first"
        )

    def _group(self) -> Group:
        return self.process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if self.unsynced_class is not None and isinstance(input, Tensor):
            self.unsynced_class._check_input_dim(self, input)  # a former BatchNorm2d still wants (N, C, H, W)


class SyncBatchNorm1d(SyncBatchNorm, nn.BatchNorm1d):
    """The class of a converted `torch.nn.BatchNorm1d`, which code that filters by class still recognizes."""


class SyncBatchNorm2d(SyncBatchNorm, nn.BatchNorm2d):
    """The class of a converted `torch.nn.BatchNorm2d`, which code that filters by class still recognizes."""


class SyncBatchNorm3d(SyncBatchNorm, nn.BatchNorm3d):
    """The class of a converted `torch.nn.BatchNorm3d`, which code that filters by class still recognizes."""


class LazySyncBatchNorm(nn.LazyBatchNorm1d, SyncBatchNorm):
    """A `SyncBatchNorm` that takes `num_features` from its first input, and then becomes one.

    As for every lazy module, run one batch through the model before it is wrapped in DistributedDataParallel or its
    parameters are passed to an optimizer. Arguments as of `SyncBatchNorm`, without `num_features`.
    """

    cls_to_become = SyncBatchNorm  # type: ignore[assignment]

    def initialize_parameters(self, input: Tensor, *_: Any, **__: Any) -> None:
        """Take `num_features` from the input; torch calls this in front of the first forward pass."""
        initialize_lazy(self, super().initialize_parameters, input)

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | DeviceMesh | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str = "identity",
        temperature: float = 1.0,
    ) -> None:
        _check_epilogue(activation, temperature)
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.process_group = groups.checked(process_group)
        self.activation = activation
        self.temperature = temperature


def initialize_lazy(layer: Any, initialize: Callable[[Tensor], None], input: Any) -> None:
    """Call torch's method, and set `num_features` also where the state_dict had been loaded before.

    Raises:
        ValueError: the input has no channels; on this rank alone.
    """
    if not isinstance(input, Tensor) or input.dim() < 2:
        shape = tuple(input.shape) if isinstance(input, Tensor) else type(input).__name__
        raise ValueError(f"expected input of shape (N, C) or (N, C, ...), got {shape}: add the batch dimension")
    initialize(input)
    known = next((t for t in (layer.weight, layer.running_mean) if t is not None), None)
    layer.num_features = input.shape[1] if known is None else len(known)


def _check_epilogue(activation: str, temperature: float) -> None:
    check_activation(activation)
    if not temperature > 0:
        raise ValueError(f"expected temperature above 0, got {temperature}: 1 leaves the output as it is")


def call_module(layer: nn.Module, proxy: Proxy, *args: Any, **kwargs: Any) -> Any:
    """Record a call of the layer as one node of the graph that traces `proxy`.

    Raises:
        TypeError: the layer itself is the root of the trace.
    """
    tracer: Any = proxy.tracer
    path = tracer.path_of_module(layer)
    if not path:
        raise TypeError(
            f"expected a module that contains the {type(layer).__name__}, got the layer itself to trace: a graph calls "
            "layers by name, so trace torch.nn.Sequential(layer)"
        )
    return tracer.create_proxy("call_module", path, args, kwargs)
