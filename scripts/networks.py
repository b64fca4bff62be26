"""The networks that benchmarks compare, and the candidates: the same parameters with each kind of normalization."""

from collections.abc import Callable
from typing import NamedTuple

import common
import torch
import torch._inductor.config
import torch.distributed as dist
from common import LOCAL
from torch import nn
from torch.nn import functional as F
from torchvision.models import get_model

import syncbn
from train.preact_resnet import preact_resnet

PREACT = "preact"
NUM_CLASSES = 100
FUSED = "syncbn, fused"
LOCAL_FUSED = "local BN, fused"
COMPILED = ", compiled"  # suffix of a name
_NAMES = (LOCAL, "syncbn", FUSED, "all-gather", "mean of squares", "torch SyncBN", LOCAL_FUSED)
COLOUR_OF = dict(zip(_NAMES, [*common.COLOURS, "#BBBBBB"], strict=True))


class Candidate(NamedTuple):
    """A kind of normalization and what is done with the network."""

    norm: Callable[[int], nn.Module]
    is_fused: bool = False
    is_compiled: bool = False

    def network(self, name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the network, whose parameters are the same for all candidates and ranks.

        Args:
            name: "preact" with a depth, for a pre-activation ResNet; or the name of a model of torchvision.
        """
        torch.manual_seed(0)
        if name.startswith(PREACT):
            depth = int(name.removeprefix(PREACT))
            model: nn.Module = preact_resnet(depth, self.norm, num_classes=NUM_CLASSES, fused=self.is_fused)
        else:
            model = replace_norms(get_model(name, num_classes=NUM_CLASSES), self.norm)
            model = syncbn.fuse(model) if self.is_fused else model
        model = model.to(device, dtype)
        return _compiled(model) if self.is_compiled else model


def candidates(device: torch.device, *, with_compile: bool = False) -> dict[str, Candidate]:
    """Return the candidates by name; compiled ones have no fused form, because fusing changes no graph."""
    found = {}
    for name, norm in common.norms(device).items():
        found[name] = Candidate(norm)
        if name == "syncbn":
            found[FUSED] = Candidate(norm, is_fused=True)
    if with_compile:
        found |= {name + COMPILED: Candidate(common.NORMS[name], is_compiled=True) for name in (LOCAL, "syncbn")}
    return found


def training_step(model: nn.Module, batch: int, image: int, device: torch.device) -> Callable[[], None]:
    """Return a function that makes one step with random images, which differ between ranks.

    It drops the gradients, and then runs forward, cross entropy, backward and SGD with momentum.
    """
    generator = torch.Generator().manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    images = torch.randn(batch, 3, image, image, generator=generator).to(device)
    labels = torch.randint(NUM_CLASSES, (batch,), generator=generator).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def replace_norms(model: nn.Module, norm: Callable[[int], nn.Module]) -> nn.Module:
    """Replace every nn.BatchNorm2d by `norm(num_features)` with the same parameters, in place; return the model."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.BatchNorm2d:
            replacement = norm(layer.num_features)
            replacement.load_state_dict(layer.state_dict())
            model.set_submodule(name, replacement)
    return model


def _compiled(model: nn.Module) -> nn.Module:
    torch._inductor.config.compile_threads = 1  # a pool of processes is of no use on few cores
    return torch.compile(model, dynamic=False)  # type: ignore[return-value]
