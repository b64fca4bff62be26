"""`python -m train.export checkpoint=FILE format=FORMAT [output=FILE] [fold=true]`: export the network.

Formats: torch (a module that torch.load reads), torchscript, exported_program (torch.export), onnx. The file has plain
BatchNorm; fold=true folds each BatchNorm into the convolution before it, if there is one. The preprocessing is written
to a JSON file beside it. The command loads the file again and compares its outputs with the network's.

    python -m train.export checkpoint=outputs/RUN/checkpoints/best.ckpt format=onnx fold=true
"""

import copy
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

import syncbn
from syncbn.activations import MODULES
from train import commands
from train.commands import Run
from train.distenv import Refusal

SUFFIX = {"torch": ".pt", "torchscript": ".torchscript.pt", "exported_program": ".pt2", "onnx": ".onnx"}
TOLERANCE = 1e-5  # maximum error of the outputs, relative to the largest output


class _Activated(nn.Sequential):
    """A plain BatchNorm and the activation that was fused into it; `activation` tells the network not to add one."""

    activation: str


def export(options: DictConfig, run: Run) -> None:
    """Write the network and its preprocessing, and compare the outputs of the file with those of the network."""
    if not isinstance(options.fold, bool):
        raise Refusal(f"fold must be true or false, got {options.fold}")
    kind, checkpoint = options.format, Path(options.checkpoint)
    if kind not in SUFFIX:
        raise Refusal(f"format must be one of {', '.join(SUFFIX)}, got {kind}")
    _, model, data, classes = run
    output = Path(options.output or checkpoint.with_suffix(SUFFIX[kind]))
    if kind == "exported_program" and output.suffix != ".pt2":
        raise Refusal(f"output must end in .pt2 for format=exported_program, got output={output}")
    if output.is_dir():
        raise Refusal(f"output must be a file, but {output} is a directory")
    network = plain(model.network.float(), fold=options.fold)
    images = torch.randn(2, *data.collate.image_shape)
    output.parent.mkdir(parents=True, exist_ok=True)
    run_again = WRITERS[kind](network, images, output)
    with torch.no_grad():
        expected = model.network(images)
    error = float((run_again(images) - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not error < TOLERANCE:
        raise Refusal(f"{output} differs from the network by {error:.1e}, more than {TOLERANCE}: report this as a bug")
    preprocessing = {
        "input": ["N", *data.collate.image_shape],
        "values": "0 to 1 before normalization",
        "mean": data.normalize.mean,
        "std": data.normalize.std,
        "eval_transforms": [repr(transform) for transform in data.eval_transforms],
        "classes": classes,
        "format": kind,
        "checkpoint": str(checkpoint),
    }
    beside = output.with_name(f"{output.name}.json")
    beside.write_text(json.dumps(preprocessing, indent=2) + "\n")
    print(f"{output} (differs by {error:.1e}), preprocessing: {beside}")


def plain(network: nn.Module, fold: bool = False) -> nn.Module:
    """Return the network in eval mode as an FX graph of torch.nn modules; with `fold`, BatchNorm is folded."""
    network = copy.deepcopy(network).eval()
    syncbn.revert_sync_batchnorm(network)
    for name, module in list(network.named_modules()):
        if isinstance(module, syncbn.BatchNorm):
            parent = network.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], _without_fusion(module))
    graph = fx.symbolic_trace(network)
    return fuse(graph) if fold else graph


def _without_fusion(layer: syncbn.BatchNorm) -> nn.Module:
    norm = nn.BatchNorm2d(layer.num_features, layer.eps)
    norm.load_state_dict(layer.state_dict())
    with torch.no_grad():
        norm.weight.mul_(layer.temperature)
        norm.bias.mul_(layer.temperature)
    if layer.activation == "identity":
        return norm.eval()
    both = _Activated(norm, MODULES[layer.activation]())
    both.activation = layer.activation
    return both.eval()


def _write_torch(network: nn.Module, images: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    torch.save(network, path)
    return torch.no_grad()(torch.load(path, weights_only=False))


def _write_torchscript(network: nn.Module, images: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    torch.jit.save(torch.jit.trace(network, images), path)
    return torch.no_grad()(torch.jit.load(path))


def _write_exported_program(network: nn.Module, images: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    batch_axis: Any = {0: torch.export.Dim("batch", min=1)}
    torch.export.save(torch.export.export(network, (images,), dynamic_shapes=(batch_axis,)), path)
    return torch.no_grad()(torch.export.load(path).module())


def _write_onnx(network: nn.Module, images: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    try:
        import onnx
        from onnx.reference import ReferenceEvaluator
    except ImportError as error:
        raise Refusal("format=onnx needs the packages onnx and onnxscript: pip install onnx onnxscript") from error
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    batch_axis: Any = {0: torch.export.Dim("batch", min=1)}
    torch.onnx.export(
        network,
        (images,),
        str(path),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=(batch_axis,),
        external_data=False,
        verbose=False,
    )
    evaluator = ReferenceEvaluator(onnx.load(path))

    def run_again(images: Tensor) -> Tensor:
        (logits,) = evaluator.run(None, {"images": images.numpy()})
        return torch.from_numpy(logits)

    return run_again


WRITERS = {
    "torch": _write_torch,
    "torchscript": _write_torchscript,
    "exported_program": _write_exported_program,
    "onnx": _write_onnx,
}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    commands.main("export", export, __doc__)
