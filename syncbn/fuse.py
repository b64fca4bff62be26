"""fuse(model): norm-activation-convolution chains that torch.fx finds become one unit each; the parameters stay.

In the rewritten graph a unit is a call of `norm_act_conv` on the modules themselves, so that their names, hooks and
modes stay, and the modules decide at each call whether they run as one autograd Function.
"""

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.activations import name_of
from syncbn.convolution import CLASSES, geometry_of
from syncbn.norm_act_conv import activation_of, call_fused, is_plain

REPORT = "_fusion_report"  # attribute of the result, which a pickle keeps, and key of `meta`, which a deep copy keeps

_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu6: "relu6", F.silu: "silu",
    F.gelu: "gelu", F.hardswish: "hardswish", F.leaky_relu: "leaky_relu",
}  # fmt: skip
_METHODS = {"relu": "relu", "relu_": "relu"}
_DEFAULTS = {"inplace": (True, False), "negative_slope": (0.01,), "approximate": ("none",)}


class FusionReport(NamedTuple):
    """What `fuse` did with each batch normalization of a model, by name; print it."""

    fused: dict[str, str]  # the activation and the convolutions that became one unit with it
    left: dict[str, str]  # why not

    def __str__(self) -> str:
        """Return a line for each normalization."""
        lines = [f"{len(self.fused)} of {len(self.fused) + len(self.left)} batch normalizations fused"]
        lines += [f"  {name} -> {chain}" for name, chain in self.fused.items()]
        return "\n".join(lines + [f"  {name}: left, {reason}" for name, reason in self.left.items()])


def fuse(model: nn.Module) -> fx.GraphModule:
    """Return the model with each chain of norm, activation and convolutions as one `NormActConv`.

    Half of what such a chain keeps for backward is not kept, and in backward its all-reduce runs beside convolutions.
    The result shares all modules, parameters and buffers with the model, and has the same state_dict keys in the same
    order. Convert before or after; both may be converted, reverted and switched to evaluation. `fusion_report(result)`
    says what was fused, and why anything was not.

    A chain is a BatchNorm of torch, of syncbn or of timm; nothing, or an activation of `SyncBatchNorm`, as module or
    function, in place or not; and one or more nn.Conv1d, 2d or 3d that are the only ones to read it. Containers with
    hooks are called as they are, so chains inside them stay.

    The forward code of the model and its containers is fixed as it runs in the present mode, with optional arguments
    at their defaults and activation checkpointing inside it left out; other methods are not part of the result.

    Args:
        model: that torch.fx can trace.

    Raises:
        TypeError: torch.fx cannot trace the model, or would leave out hooks or a forward of its own, or a part that
            switches autocast or gradients; nothing has changed.
    """
    if not is_plain(model):
        raise TypeError(
            f"expected a model whose call is the forward of its class, got a {type(model).__name__} with hooks or a "
            "forward of its own, which torch.fx would leave out: register hooks on the result"
        )
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:
        raise TypeError(
            f"expected a model that torch.fx can trace, got {type(error).__name__}: {error}; give fuse the part that "
            "can be traced (a backbone, say), or build the model of NormActConv"
        ) from error
    modules = dict(model.named_modules(remove_duplicate=False))
    report = FusionReport({}, {})
    own = _keep_all(graph, model, modules)
    for name, calls in _calls_of_norms(graph, modules).items():
        found = [_chain(node, modules[name], modules) for node in calls]
        reason = next((chain for chain in found if isinstance(chain, str)), None)
        if reason is not None:
            report.left[name] = reason
            continue
        for chain in found:
            assert isinstance(chain, _Chain)
            report.fused[name] = _described_unit(chain.name, [reader.target for reader in chain.readers])
            _rewrite(graph, chain, own)
    for node in graph.find_nodes(op="call_function", target=norm_act_conv):  # also those of an earlier call of fuse
        norm, convs, _, activation = node.args
        report.fused.setdefault(str(norm.target), _described_unit(activation, [conv.target for conv in convs]))
    _explain_others(report, tracer.called_as_they_are, dict(model.named_modules()))
    graph.lint()
    fused = fx.GraphModule(model, graph, type(model).__name__)
    for name, module in fused.named_modules():  # containers that torch.fx made
        module.training = modules[name].training
    fused.meta[REPORT] = report
    setattr(fused, REPORT, report)
    return fused


def fusion_report(model: nn.Module) -> FusionReport:
    """Return what `fuse` did when it made the model.

    Raises:
        ValueError: the model is not a result of `fuse`.
    """
    report = getattr(model, REPORT, None) or getattr(model, "meta", {}).get(REPORT)
    if not isinstance(report, FusionReport):
        raise ValueError(f"expected a model that syncbn.fuse returned, got {type(model).__name__}")
    return report


def norm_act_conv(norm: nn.Module, convs: Iterable[nn.Module], input: Any, activation: str) -> tuple[Tensor, ...]:
    """Call the unit; when torch.fx traces it again, record the call as it is."""
    if not isinstance(input, fx.Proxy):
        return call_fused(norm, convs, input, activation=activation)
    tracer: Any = input.tracer
    own = [
        tracer.create_proxy("get_attr", tracer.path_of_module(m), (), {}) if isinstance(m, nn.Module) else m
        for m in (norm, *convs)
    ]
    outputs: Any = tracer.create_proxy("call_function", norm_act_conv, (own[0], own[1:], input, activation), {})
    return tuple(outputs[index] for index in range(len(own) - 1))


class _Tracer(fx.Tracer):
    """Records a call of a batch normalization, a convolution or a container with hooks as one node.

    torch.fx records neither context managers nor which branch an optional argument has decided.
    """

    def __init__(self) -> None:
        super().__init__()
        self.modes = _modes()
        self.called_as_they_are: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if not is_plain(m):
            self.called_as_they_are.append(module_qualified_name)
            return True
        return isinstance(m, (_BatchNorm, *CLASSES)) or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            raise TypeError(
                "its forward switches gradients, inference mode or autocast, which torch.fx does not record"
            )
        return super().create_node(*args, **kwargs)

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        function, arguments = super().create_args_for_root(*args, **kwargs)
        return function, [self._at_default(argument) for argument in arguments]

    def _at_default(self, argument: Any) -> Any:
        """Return the default of an optional argument."""
        if not isinstance(argument, fx.Proxy) or not argument.node.args:
            return argument
        (default,) = argument.node.args
        if default is not None and not isinstance(default, (bool, int, float, str)):
            return argument
        name = str(argument.node.target)
        self.create_proxy("call_function", require_default, (argument, default, name), {})
        return default


def require_default(value: Any, default: Any, name: str) -> None:
    """Raise ValueError if an optional argument of a fused model has another value than the one that it is fixed at."""
    if value is not default and value != default:
        raise ValueError(f"expected {name}={default!r}, at which syncbn.fuse has fixed this argument, got {value!r}")


def _modes() -> tuple[Any, ...]:
    """Return what context managers of torch change."""
    autocast = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


class _Chain(NamedTuple):
    norm: fx.Node
    name: str  # of the activation that follows the norm, "identity" for none and for a norm that activates
    nodes: list[fx.Node]  # between the norm and the readers
    readers: list[fx.Node]


def _calls_of_norms(graph: fx.Graph, modules: dict[str, nn.Module]) -> dict[str, list[fx.Node]]:
    """Return the calls of each batch normalization by its name."""
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_module"):
        if isinstance(modules[str(node.target)], _BatchNorm):
            calls.setdefault(str(node.target), []).append(node)
    return calls


def _chain(node: fx.Node, norm: nn.Module, modules: dict[str, nn.Module]) -> _Chain | str:
    """Return the chain that starts with a norm, or why there is none."""
    own = activation_of(norm)
    if own is None:
        return f"{type(norm).__name__} does something else than normalize and activate"
    if _input_of(node) is None:
        return "it takes more than one input"
    name, nodes, last = "identity", [], node
    while len(last.users) == 1:
        (follower,) = last.users
        kind = _activation_name(follower, modules)
        if kind is None or (kind != "identity" and (own, name) != ("identity", "identity")):
            break
        name = name if kind == "identity" else kind
        nodes.append(follower)
        last = follower
    readers = list(last.users)
    for reader in readers:
        conv = modules.get(str(reader.target)) if reader.op == "call_module" else None
        if not isinstance(conv, CLASSES):
            return f"it is read by {_described(reader, modules)}, which is no convolution"
        if type(conv) not in CLASSES:
            return f"{reader.target} is a {type(conv).__name__}, not one of torch's convolutions"
        if _input_of(reader) is None:
            return f"{reader.target} takes more than one input"
        if geometry_of(conv) is None:
            return f"{reader.target} pads with other values than zeros, or by different amounts on both sides"
    return _Chain(node, name, nodes, readers) if readers else "nothing reads its output"


def _input_of(node: fx.Node) -> Any:
    """Return the only argument of a call of a module, None if there are others."""
    if len(node.args) == 1 and not node.kwargs:
        return node.args[0]
    return node.kwargs["input"] if not node.args and list(node.kwargs) == ["input"] else None


def _activation_name(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """Return the name of the activation that a node computes, None if it is none."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return name_of(module) if is_plain(module) and _input_of(node) is not None else None
    name = _METHODS.get(str(node.target)) if node.op == "call_method" else _FUNCTIONS.get(node.target)
    if name is None or node.op not in ("call_method", "call_function"):
        return None
    options = dict(node.kwargs)
    if len(node.args) > 1:
        positional = {"leaky_relu": ["negative_slope", "inplace"], "gelu": []}.get(name, ["inplace"])
        if len(node.args) - 1 > len(positional):
            return None
        options |= dict(zip(positional, node.args[1:], strict=False))
    return name if all(value in _DEFAULTS.get(key, ()) for key, value in options.items()) else None


def _described(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "call_module":
        return f"{node.target} ({type(modules[str(node.target)]).__name__})"
    target: Any = node.target
    return "the output" if node.op == "output" else getattr(target, "__name__", str(target))


def _described_unit(activation: str, convs: Iterable[Any]) -> str:
    names = ", ".join(str(name) for name in convs)
    return names if activation == "identity" else f"{activation} -> {names}"


def _explain_others(report: FusionReport, called_as_they_are: list[str], modules: dict[str, nn.Module]) -> None:
    """Say why the norms that have no node in the graph were left."""
    for name, module in modules.items():
        if not isinstance(module, _BatchNorm) or name in report.fused or name in report.left:
            continue
        around = next((outer for outer in called_as_they_are if name.startswith(f"{outer}.")), None)
        report.left[name] = (
            "it is not called in the forward pass that torch.fx traced"
            if around is None
            else f"it is inside {around}, which has hooks or a forward of its own"
        )


def _keep_all(graph: fx.Graph, model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, fx.Node]:
    """Refer to every parameter of the model and every module with a state at the start of the graph, in their order.

    The new model then has them under the same names and in the same order, also after it is copied.
    """
    names = [name for name, _ in model.named_parameters(recurse=False, remove_duplicate=False)]
    names += [name for name, _ in model.named_buffers(recurse=False, remove_duplicate=False)]
    names += [name for name, module in modules.items() if name and (module._parameters or module._buffers)]
    with graph.inserting_before(next(iter(graph.nodes))):
        return {name: graph.create_node("get_attr", name) for name in names}


def _rewrite(graph: fx.Graph, chain: _Chain, own: dict[str, fx.Node]) -> None:
    """Replace the nodes of a chain by one call, where the norm is: its input may be overwritten behind it."""
    convs = [own[str(reader.target)] for reader in chain.readers]
    with graph.inserting_after(chain.norm):
        arguments = own[str(chain.norm.target)], convs, _input_of(chain.norm), chain.name
        call = graph.call_function(norm_act_conv, arguments)
    for index, reader in enumerate(chain.readers):
        with graph.inserting_before(reader):
            reader.replace_all_uses_with(graph.call_function(operator.getitem, (call, index)))
        graph.erase_node(reader)
    for node in reversed([chain.norm, *chain.nodes]):
        graph.erase_node(node)
