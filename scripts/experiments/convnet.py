"""A plain convolutional network, the smallest thing that shows what a norm does."""

from collections.abc import Sequence

from torch import Tensor, nn

from train.mlp import initialize_
from train.preact_resnet import NormFactory


class ConvNet(nn.Module):
    """A plain network of 3x3 convolutions, each with a norm and ReLU, then the mean over pixels and a linear head.

    Args:
        norm_layer: `norm_layer(num_channels)` returns a normalization.
        num_classes: number of outputs.
        in_channels: channels of the images.
        depths: convolutions of each stage, the first one with stride 2.
        first_stride: stride of the first convolution of the network.
        width: channels of the first stage; every stage doubles them.
        init_std: standard deviation of the initial weights; He initialization by default.
        dropout: dropout probability after every stage.
    """

    def __init__(
        self,
        norm_layer: NormFactory,
        *,
        num_classes: int,
        in_channels: int = 3,
        depths: Sequence[int] = (1, 1, 1),
        first_stride: int = 2,
        width: int = 16,
        init_std: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        has_bias = next(norm_layer(width).parameters(), None) is None
        layers: list[nn.Module] = []
        channels = in_channels
        for stage, depth in enumerate(depths):
            for index in range(depth):
                stride = 1 if index else 2 if stage else first_stride
                convolution = nn.Conv2d(channels, width * 2**stage, 3, stride, padding=1, bias=has_bias)
                channels = convolution.out_channels
                layers += [convolution, norm_layer(channels), nn.ReLU()]
            layers += [nn.Dropout(dropout)] * bool(dropout)
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                initialize_(module, init_std)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, num_classes) of images (N, in_channels, H, W)."""
        return self.head(self.features(x).mean((2, 3)))
