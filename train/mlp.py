"""A fully connected network with or without normalization, to study normalization without convolutions."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from train.preact_resnet import NormFactory, check_order, normalize_and_activate


class MLP(nn.Module):
    """Linear layers, each followed by normalization and ReLU, and a linear head.

    Args:
        norm_layer: `norm_layer(num_channels)` returns a normalization of (N, num_channels, 1, 1).
        num_classes: number of outputs.
        in_channels, image_size: channels, and height and width, of the images.
        widths: width of each hidden layer.
        order: "bn_relu" or "relu_bn".
        dropout: dropout probability after every hidden layer.
        init_std: standard deviation of the initial weights; He initialization by default.

    Raises:
        ValueError: no widths, or one below 1; an unknown order.
    """

    has_fixed_size = True  # of its input, also in evaluation

    def __init__(
        self,
        norm_layer: NormFactory,
        *,
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 32,
        widths: Sequence[int] = (100, 100, 100),
        order: str = "bn_relu",
        dropout: float = 0.0,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise ValueError(f"widths must name at least one layer, each of at least 1, got {list(widths)}")
        sizes = [in_channels * image_size**2, *widths]
        self.norms = nn.ModuleList(norm_layer(size) for size in sizes[1:])
        check_order(order, self.norms[0])
        has_bias = next(self.norms.parameters(), None) is None
        pairs = pairwise(sizes)
        self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out, bias=has_bias) for fan_in, fan_out in pairs)
        self.head = nn.Linear(sizes[-1], num_classes)
        self.order = order
        self.dropout = nn.Dropout(dropout)
        for layer in [*self.layers, self.head]:
            initialize_(layer, init_std)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, num_classes) of images (N, in_channels, H, W); N may be 0."""
        x = x.flatten(1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = normalize_and_activate(norm, layer(x)[:, :, None, None], self.order).flatten(1)
            x = self.dropout(x)
        return self.head(x)


def initialize_(layer: nn.Linear | nn.Conv2d, init_std: float | None = None) -> None:
    """Draw the weights of a layer from a normal distribution, He's by default, and set its bias to 0."""
    if init_std is None:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    else:
        nn.init.normal_(layer.weight, std=init_std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
