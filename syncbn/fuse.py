"""fuse(model): norm-activation-convolution chains that torch.fx finds become one unit each; the parameters stay.

In the rewritten graph a unit is a call of `norm_act_conv` on the modules themselves, so that their names, hooks and
modes stay, and the modules decide at each call whether they run as one autograd Function.
"""

import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.activations import name_of
from syncbn.convolution import CLASSES, geometry_of
from syncbn.norm_act_conv import activation_of, call_fused

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
    The result shares all parameters, buffers and hooks with the model, and has the same state_dict keys in the same
    order. Convert before or after; both may be converted, reverted and switched to evaluation. `fusion_report(result)`
    says what was fused, and why anything was not.

    A chain is a BatchNorm of torch, of syncbn or of timm; nothing, or an activation of `SyncBatchNorm`, as module or
    function, in place or not; and one or more nn.Conv1d, 2d or 3d that are the only ones to read it.

    Args:
        model: that torch.fx can trace. Python code in its forward is fixed as it runs in the model's present mode.

    Raises:
        TypeError: torch.fx cannot trace the model; nothing has changed.
    """
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:
        raise TypeError(
            f"expected a model that torch.fx can trace, got {type(error).__name__}: {error}; give fuse the part that "
            "can be traced (a backbone, say), or build the model of NormActConv"
        ) from error
    modules = dict(model.named_modules())
    report = FusionReport({}, {})
    own = _keep_all(graph, modules)
    for node in list(graph.nodes):
        name = str(node.target)
        norm = modules.get(name) if node.op == "call_module" else None
        if isinstance(norm, _BatchNorm):
            found = _chain(node, norm, modules)
            if isinstance(found, str):
                report.left[name] = found
            else:
                _rewrite(graph, found, own)
                names = ", ".join(str(reader.target) for reader in found.readers)
                report.fused[name] = names if found.name == "identity" else f"{found.name} -> {names}"
    for name, module in modules.items():
        if isinstance(module, _BatchNorm) and name not in report.fused and name not in report.left:
            report.left[name] = "it is not called in the forward pass that torch.fx traced"
    graph.lint()
    fused = fx.GraphModule(model, graph, type(model).__name__)
    fused.train(model.training)
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
    """Records a call of a batch normalization or a convolution as one node, also of classes outside of torch."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (_BatchNorm, *CLASSES)) or super().is_leaf_module(m, module_qualified_name)


class _Chain(NamedTuple):
    norm: fx.Node
    name: str  # of the activation that follows the norm, "identity" for none and for a norm that activates
    nodes: list[fx.Node]  # between the norm and the readers
    readers: list[fx.Node]


def _chain(node: fx.Node, norm: _BatchNorm, modules: dict[str, nn.Module]) -> _Chain | str:
    """Return the chain that starts with a norm, or why there is none."""
    own = activation_of(norm)
    if own is None:
        return f"{type(norm).__name__} does something else than normalize and activate"
    if len(node.args) != 1 or node.kwargs:
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
        if len(reader.args) != 1 or reader.kwargs:
            return f"{reader.target} takes more than one input"
        if geometry_of(conv) is None:
            return f"{reader.target} pads with other values than zeros, or by different amounts on both sides"
    return _Chain(node, name, nodes, readers) if readers else "nothing reads its output"


def _activation_name(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """Return the name of the activation that a node computes, None if it is none."""
    if node.op == "call_module":
        return name_of(modules[str(node.target)]) if len(node.args) == 1 and not node.kwargs else None
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


def _keep_all(graph: fx.Graph, modules: dict[str, nn.Module]) -> dict[str, fx.Node]:
    """Refer to every module with a state at the start of the graph, in the order of the model.

    The new model then has them under the same names and in the same order, also after it is copied.
    """
    own: dict[str, fx.Node] = {}
    first: Callable[[], Any] = lambda: graph.inserting_before(next(iter(graph.nodes)))  # noqa: E731
    with first():
        for name, module in modules.items():
            if name and (module._parameters or module._buffers):
                own[name] = graph.create_node("get_attr", name)
    return own


def _rewrite(graph: fx.Graph, chain: _Chain, own: dict[str, fx.Node]) -> None:
    """Replace the nodes of a chain by one call."""
    last = chain.nodes[-1] if chain.nodes else chain.norm
    convs = [own[str(reader.target)] for reader in chain.readers]
    with graph.inserting_after(last):
        call = graph.call_function(norm_act_conv, (own[str(chain.norm.target)], convs, chain.norm.args[0], chain.name))
    for index, reader in enumerate(chain.readers):
        with graph.inserting_before(reader):
            reader.replace_all_uses_with(graph.call_function(operator.getitem, (call, index)))
        graph.erase_node(reader)
    for node in reversed([chain.norm, *chain.nodes]):
        graph.erase_node(node)
