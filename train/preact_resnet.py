"""Pre-activation residual networks: norm-ReLU-convolution units around an unmodified identity.

Source: He et al. 2016, Identity Mappings in Deep Residual Networks, figure 1(b), table 4 and the appendix. As in
torchvision the stride of a bottleneck is on its 3x3 convolution; shortcuts that change shape are 1x1 convolutions.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

import syncbn

NormFactory = Callable[[int], nn.Module]
SMALL_IMAGE = 64  # pixels per side; up to this size the 7x7 stem and its pooling would leave too few pixels


def normalize_and_activate(norm: nn.Module, x: Tensor, order: str = "bn_relu") -> Tensor:
    """Return relu(norm(x)), or norm(relu(x)) for the order "relu_bn"; a fused activation replaces the ReLU."""
    if order == "relu_bn":
        return norm(x.relu())
    return norm(x) if _activates(norm) else norm(x).relu()


def _activates(norm: nn.Module) -> bool:
    return getattr(norm, "activation", "identity") != "identity"


def check_order(order: str, norm: nn.Module) -> None:
    """Raise ValueError for an unknown order, or for "relu_bn" with a norm that has a fused activation."""
    if order not in ("bn_relu", "relu_bn"):
        raise ValueError(f"order must be bn_relu or relu_bn, got {order}")
    if order == "relu_bn" and _activates(norm):
        raise ValueError(
            "order=relu_bn activates before the norm, and this norm activates after it: set norm.activation=identity"
        )


def convolve_activated(
    norm: nn.Module, x: Tensor, *convolutions: nn.Module, order: str = "bn_relu", fused: bool = True
) -> tuple[Tensor, ...]:
    """Return each convolution of relu(norm(x)); with `fused` as one unit that does not keep the activated tensor."""
    if fused and order == "bn_relu":
        return syncbn.call_fused(norm, convolutions, x, activation="identity" if _activates(norm) else "relu")
    activated = normalize_and_activate(norm, x, order)
    return tuple(convolution(activated) for convolution in convolutions)


class _PreActUnit(nn.Module):
    """A residual unit; a subclass adds the branch.

    Args:
        in_channels: channels of the input.
        width: channels of the 3x3 convolutions; the output has `width * expansion`.
        stride: of the unit, 1 or 2.
        norm_layer: `norm_layer(num_channels)` returns a new normalization.
        conv_bias: whether the convolutions have a bias, for norms without one.
        share_preactivation: whether the shortcut also takes the activated input, as in the first unit of a network;
            always true in a unit that changes the shape.
        order: "bn_relu", or "relu_bn" to normalize after the activation.
        dropout: dropout probability before the last convolution.
        fused: whether norm, ReLU and the convolutions that read them are one unit (`syncbn.NormActConv`).
    """

    expansion: int
    conv1: nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        norm_layer: NormFactory,
        *,
        conv_bias: bool = False,
        share_preactivation: bool = False,
        order: str = "bn_relu",
        dropout: float = 0.0,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.order, self.fused = order, fused
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        out_channels = width * self.expansion
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=conv_bias)
        self.share_preactivation = share_preactivation or self.shortcut is not None
        self.norm1 = norm_layer(in_channels)
        self.add_branch(in_channels, width, stride, norm_layer, conv_bias)

    def add_branch(self, in_channels: int, width: int, stride: int, norm_layer: NormFactory, bias: bool) -> None:
        """Create the layers between the first ReLU and the addition."""
        raise NotImplementedError

    def branch(self, x: Tensor) -> Tensor:
        """Return the residual for the output of the first convolution."""
        raise NotImplementedError

    def convolve(self, norm: nn.Module, x: Tensor, *convolutions: nn.Module) -> tuple[Tensor, ...]:
        """Return each convolution of the normalized and activated x."""
        return convolve_activated(norm, x, *convolutions, order=self.order, fused=self.fused)

    def last(self, norm: nn.Module, x: Tensor) -> Tensor:
        """Return the last convolution of the normalized and activated x, behind the dropout."""
        if not isinstance(self.dropout, nn.Identity):
            return self.last_convolution(self.dropout(normalize_and_activate(norm, x, self.order)))
        return self.convolve(norm, x, self.last_convolution)[0]

    @property
    def last_convolution(self) -> nn.Conv2d:
        """The convolution before the addition."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return shortcut + residual: (N, in_channels, H, W) to (N, width * expansion, H / stride, W / stride)."""
        identity = x
        if self.shortcut is not None:
            hidden, identity = self.convolve(self.norm1, x, self.conv1, self.shortcut)
        elif self.share_preactivation:  # the addition reads the activated tensor too
            identity = normalize_and_activate(self.norm1, x, self.order)
            hidden = self.conv1(identity)
        else:
            (hidden,) = self.convolve(self.norm1, x, self.conv1)
        return identity + self.branch(hidden)


class PreActBlock(_PreActUnit):
    """Two 3x3 convolutions, each after norm and ReLU."""

    expansion = 1

    def add_branch(self, in_channels: int, width: int, stride: int, norm_layer: NormFactory, bias: bool) -> None:
        """Create 3x3 and 3x3; the first has the stride."""
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=bias)
        self.norm2 = norm_layer(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=bias)

    def branch(self, x: Tensor) -> Tensor:
        """Return the residual for the output of the first convolution."""
        return self.last(self.norm2, x)

    @property
    def last_convolution(self) -> nn.Conv2d:
        """The convolution before the addition."""
        return self.conv2


class PreActBottleneck(_PreActUnit):
    """A 1x1, a 3x3 and a 1x1 convolution, each after norm and ReLU."""

    expansion = 4

    def add_branch(self, in_channels: int, width: int, stride: int, norm_layer: NormFactory, bias: bool) -> None:
        """Create 1x1, 3x3 and 1x1; the 3x3 has the stride."""
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=bias)
        self.norm2 = norm_layer(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=bias)
        self.norm3 = norm_layer(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=bias)

    def branch(self, x: Tensor) -> Tensor:
        """Return the residual for the output of the first convolution."""
        return self.last(self.norm3, *self.convolve(self.norm2, x, self.conv2))

    @property
    def last_convolution(self) -> nn.Conv2d:
        """The convolution before the addition."""
        return self.conv3


class PreActResNet(nn.Module):
    """Stem, stages of units that double the width and halve the image, final norm-ReLU, mean over pixels, linear.

    Args:
        block: `PreActBlock` or `PreActBottleneck`.
        units: units in each stage.
        width: channels of the first stage before the block's expansion.
        norm_layer: `norm_layer(num_channels)` returns a new normalization. If it has no parameters, the
            convolutions have a bias.
        num_classes: number of outputs.
        in_channels: channels of the images.
        small_stem: a 3x3 convolution with stride 1; otherwise 7x7 with stride 2 and 3x3 max pooling with stride 2.
        order: "bn_relu" as published, or "relu_bn".
        dropout: dropout probability before the last convolution of a unit.
        fused: whether norm, ReLU and the convolutions that read them are one unit (`syncbn.NormActConv`), which keeps
            half as much for backward and waits less; parameters and their names are the same without it. Not for
            "relu_bn", the last convolution with dropout, and a ReLU that an addition reads too.
        zero_init: start the last convolution of every unit at 0, so that the network starts as its shortcuts. No
            norm follows it here; with post-activation the last norm's weight starts at 0 instead (Goyal et al. 2017).
    """

    def __init__(
        self,
        block: type[_PreActUnit],
        units: Sequence[int],
        width: int,
        norm_layer: NormFactory,
        *,
        num_classes: int,
        in_channels: int = 3,
        small_stem: bool = True,
        order: str = "bn_relu",
        dropout: float = 0.0,
        fused: bool = True,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        sample = norm_layer(width)
        check_order(order, sample)
        self.order = order
        conv_bias = next(sample.parameters(), None) is None
        self.stem = _stem(in_channels, width, small_stem, conv_bias)
        stages, channels = [], width
        for stage, count in enumerate(units):
            stage_width = width * 2**stage
            blocks = []
            for unit in range(count):
                blocks.append(
                    block(
                        channels,
                        stage_width,
                        2 if stage > 0 and unit == 0 else 1,
                        norm_layer,
                        conv_bias=conv_bias,
                        share_preactivation=stage == unit == 0,
                        order=order,
                        dropout=dropout,
                        fused=fused,
                    )
                )
                channels = stage_width * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.norm = norm_layer(channels)
        self.head = nn.Linear(channels, num_classes)
        self.apply(_initialize)
        if zero_init:
            for module in self.modules():
                if isinstance(module, _PreActUnit):
                    nn.init.zeros_(module.last_convolution.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, num_classes) of images (N, in_channels, H, W); N may be 0."""
        features = normalize_and_activate(self.norm, self.stages(self.stem(x)), self.order)
        return self.head(features.mean((2, 3)))


class _Form(NamedTuple):
    """One published depth: its unit, the number of units per stage, and the width of the first stage."""

    block: type[_PreActUnit]
    units: tuple[int, ...]
    width: int


FORMS = {
    18: _Form(PreActBlock, (2, 2, 2, 2), 64),
    34: _Form(PreActBlock, (3, 4, 6, 3), 64),
    50: _Form(PreActBottleneck, (3, 4, 6, 3), 64),
    101: _Form(PreActBottleneck, (3, 4, 23, 3), 64),
    152: _Form(PreActBottleneck, (3, 8, 36, 3), 64),
    200: _Form(PreActBottleneck, (3, 24, 36, 3), 64),
    20: _Form(PreActBlock, (3, 3, 3), 16),
    56: _Form(PreActBlock, (9, 9, 9), 16),
    110: _Form(PreActBlock, (18, 18, 18), 16),
    164: _Form(PreActBottleneck, (18, 18, 18), 16),
}


def preact_resnet(
    depth: int,
    norm_layer: NormFactory,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: int = 224,
    width: int | None = None,
    order: str = "bn_relu",
    dropout: float = 0.0,
    fused: bool = True,
    zero_init: bool = False,
) -> PreActResNet:
    """Return the network of a published depth.

    Args:
        depth: 18, 34, 50, 101, 152 or 200 (four stages), or 20, 56, 110 or 164 (three stages, for small images).
        image_size: pixels per side; up to 64 the stem keeps the resolution (depth 18 is then PreAct-18 for CIFAR).
        width: channels of the first stage, if not the published 64 or 16.
        order, dropout, fused, zero_init: see `PreActResNet`.

    Raises:
        ValueError: the depth is not one of these.
    """
    if depth not in FORMS:
        raise ValueError(f"depth must be one of {sorted(FORMS)}, got {depth}: use `PreActResNet` for other stages")
    form = FORMS[depth]
    return PreActResNet(
        form.block,
        form.units,
        form.width if width is None else width,
        norm_layer,
        num_classes=num_classes,
        in_channels=in_channels,
        small_stem=len(form.units) == 3 or image_size <= SMALL_IMAGE,
        order=order,
        dropout=dropout,
        fused=fused,
        zero_init=zero_init,
    )


def _stem(in_channels: int, width: int, small: bool, bias: bool) -> nn.Module:
    if small:
        return nn.Conv2d(in_channels, width, 3, padding=1, bias=bias)
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=bias), nn.MaxPool2d(3, stride=2, padding=1)
    )


def _initialize(module: nn.Module) -> None:
    """He initialization of convolutions; all biases of convolutions and of the head start at 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
