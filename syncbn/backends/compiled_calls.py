"""How `compiled` calls what torch.compile makes: through torch.compile once for given sizes, then the code itself.

To find the code that fits, torch.compile spends 0.1 ms on every call, and 0.5 ms where activations have pushed its data
out of the cache (AMD EPYC, torch 2.14.1). Sizes, strides, dtypes and devices of all operands tell as much.
"""

import threading
import types
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

# What two sums share, dy, is computed for each of them: written to memory it would cost more than the reads it saves.
INDUCTOR_OPTIONS: Any = {"realize_reads_threshold": 64, "realize_opcount_threshold": 1000}

MAX_CALLS = 4096  # known sizes; a training run has some dozens

is_available = True

Kernel = Callable[..., Any]  # takes tensors, sequences of them, and what is compiled in; returns one or several tensors


class Made(NamedTuple):
    """A call that torch.compile has made."""

    code: Callable[..., Sequence[Tensor]]
    operands: Sequence[Any]  # tensors and sizes
    results: Sequence[Tensor]


class Call(NamedTuple):
    """Compiled code for known sizes."""

    code: Callable[..., Sequence[Tensor]]
    operands: tuple[int | None, ...]  # positions among the tensors of the arguments; None for a size
    sizes: tuple[int, ...]
    results: tuple[int | None, ...] | int  # positions among what the code returns

    def of(self, tensors: Sequence[Tensor]) -> Any:
        """Return what the kernel would return for arguments with these tensors."""
        sizes = iter(self.sizes)
        results = self.code(*[next(sizes) if at is None else tensors[at] for at in self.operands])
        if isinstance(self.results, int):
            return results[self.results]
        return tuple([None if at is None else results[at] for at in self.results])


_calls: dict[tuple[Any, ...], Call] = {}
_last = threading.local()


def run(kernel: Kernel, *args: Any, given: Sequence[Any] | None = None) -> Any:
    """Return what `kernel` returns, from compiled code where there can be any.

    Args:
        kernel: a function of tensors, sequences of them, and values that are compiled in.
        args: its arguments.
        given: tensors and values from which types, devices, dtypes, sizes and strides of all arguments follow, and all
            values that are compiled in; the arguments themselves by default.
    """
    if not is_available:
        return kernel(*args)
    known = args if given is None else given
    key = (kernel, torch.get_num_threads(), torch.is_inference_mode_enabled(), *[_exactly(item) for item in known])
    call = _calls.get(key)
    try:
        if call is not None:
            return call.of(_tensors(args))
        args = tuple(map(_unrelated, args))
        results, made = _through_torch_compile(kernel, args)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        _give_up(error)
        return kernel(*args)
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError):
        return kernel(*args)  # a mode or a stance under which nothing may be compiled: this call goes without
    call = _call(_tensors(args), results, made)
    if call is not None:
        if len(_calls) >= MAX_CALLS:
            _calls.clear()
        _calls[key] = call
    return results


def forget() -> None:
    """Let the next calls go through torch.compile again."""
    _calls.clear()


def _give_up(error: Exception) -> None:
    global is_available
    is_available = False
    reason = " ".join(str(error).split("\n")[:2])
    warnings.warn(f"syncbn runs without compiled kernels: torch.compile failed, {reason}", stacklevel=2)


def _exactly(item: Any) -> Any:
    """Return all that code for `item` depends on."""
    if isinstance(item, Tensor):
        return type(item), item.device, item.dtype, item.shape, item.stride()
    return tuple([_exactly(part) for part in item]) if isinstance(item, list | tuple) else item


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    """Return the tensors among the arguments, in order."""
    found: list[Tensor] = []
    for argument in args:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, list | tuple):
            found += _tensors(argument)
    return found


def _unrelated(argument: Any) -> Any:
    """Return plain tensors for parameters, whose sizes would be compiled in, and for views, guarded by their base."""
    if isinstance(argument, Tensor):
        return argument.data
    return tuple(map(_unrelated, argument)) if isinstance(argument, list | tuple) else argument


def _call(tensors: Sequence[Tensor], results: Any, made: Made | None) -> Call | None:
    """Return how to make a call of the kernel again; None where tensors are special or were exchanged on the way."""
    if made is None or not all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors):
        return None
    code, operands, returned = made
    places = {id(tensor): at for at, tensor in enumerate(tensors)}
    found = {id(tensor): at for at, tensor in enumerate(returned)}
    wanted = [results] if isinstance(results, Tensor) else results
    is_known = all(isinstance(o, int) or id(o) in places for o in operands)
    if len(places) < len(tensors) or not is_known or not all(r is None or id(r) in found for r in wanted):
        return None
    at = tuple(found.get(id(result)) for result in wanted)
    return Call(
        code,
        tuple(places.get(id(operand)) for operand in operands),
        tuple(operand for operand in operands if isinstance(operand, int)),
        at[0] if isinstance(results, Tensor) and at[0] is not None else at,
    )


def _through_torch_compile(kernel: Kernel, args: Sequence[Any]) -> tuple[Any, Made | None]:
    """Return what the kernel returns, and how its code was called."""
    compiled = _compiled(kernel, tuple(map(_variant, args)))
    try:
        try:
            return compiled(*args), getattr(_last, "made", None)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            with torch._dynamo.config.patch(recompile_limit=64):
                return compiled(*args), getattr(_last, "made", None)
    finally:
        _last.made = None


def _variant(argument: Any) -> Any:
    """Return what code for `argument` depends on besides sizes."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.dim()
    return tuple(map(_variant, argument)) if isinstance(argument, list | tuple) else argument


@cache
def _compiled(kernel: Kernel, variant: tuple[Any, ...]) -> Kernel:
    """Return a compiled copy of `kernel`, one for each variant: dynamo limits how many a function may have."""
    assert isinstance(kernel, types.FunctionType)
    copied = types.FunctionType(
        kernel.__code__.replace(co_name=f"{kernel.__name__}_{_compiled.cache_info().currsize}"),
        kernel.__globals__,
        kernel.__name__,
    )
    return torch.compile(copied, dynamic=True, fullgraph=True, backend=_inductor)


def _inductor(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Kernel:
    """Return the graph compiled, noting how it is called."""
    code = torch._inductor.compile(graph, example_inputs, options=INDUCTOR_OPTIONS)

    def call(*operands: Any) -> Any:
        results = code(*operands)
        _last.made = Made(code, operands, results)
        return results

    return call
