"""The VGG networks (Simonyan & Zisserman 2015, arXiv 1409.1556), with the layers, names and weights of torchvision.

The default encoder is vgg16. This module does not import torchvision, which takes longer to import than PyTorch.
"""

from collections import OrderedDict
from collections.abc import Iterator

from torch import Tensor, nn

from captionlib.data.images.decoding import Preprocessing

__all__ = ["VGG_PREPROCESSING", "VGG_URLS", "VGG_WEIGHTS", "truncate_vgg"]

# The number of convolutions before each max pooling, and the channels of their outputs.
_CONVOLUTIONS = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
_CHANNELS = (64, 128, 256, 512, 512)

VGG_WEIGHTS = "IMAGENET1K_V1"
"""torchvision's name of the weights in `VGG_URLS`. For vgg16, torchvision also has other weights."""

VGG_URLS = {
    name.partition("-")[0]: f"https://download.pytorch.org/models/{name}.pth"
    for name in (
        *("vgg11-8a719046", "vgg13-19584684", "vgg16-397923af", "vgg19-dcbb9e9d"),
        *("vgg11_bn-6002323d", "vgg13_bn-abd245e5", "vgg16_bn-6c64b313", "vgg19_bn-c79401a0"),
    )
}
"""URL of the weights of each network."""

VGG_PREPROCESSING = Preprocessing(256, 224, "bilinear", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


class _Truncated(nn.Sequential):
    """Returns a dictionary, as torchvision's feature extractors do."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"features": super().forward(images)}  # type: ignore[no-untyped-call]


def truncate_vgg(name: str, node: str) -> nn.Module | None:
    """Builds a network of `VGG_URLS` up to and including a node such as `classifier.4`; None if the node is unknown."""
    groups = {group: nn.Sequential() for group in ("features", "avgpool", "flatten", "classifier")}
    for group, layer in _create_layers(name):
        groups[group].append(layer)
        layer_name = f"{group}.{len(groups[group]) - 1}" if group in {"features", "classifier"} else group
        if layer_name == node:
            return _Truncated(OrderedDict[str, nn.Module](groups)).eval()
    return None


def _create_layers(name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yields the group and the module of each layer. Creates the last layers, which are large, only if needed."""
    network, _, normalization = name.partition("_")
    channels = 3
    for count, size in zip(_CONVOLUTIONS[network], _CHANNELS, strict=True):
        for _ in range(count):
            yield "features", nn.Conv2d(channels, size, kernel_size=3, padding=1)
            if normalization:
                yield "features", nn.BatchNorm2d(size)
            yield "features", nn.ReLU(inplace=True)
            channels = size
        yield "features", nn.MaxPool2d(kernel_size=2, stride=2)
    yield "avgpool", nn.AdaptiveAvgPool2d(7)
    yield "flatten", nn.Flatten()
    for inputs, outputs in ((7 * 7 * channels, 4096), (4096, 4096)):
        yield "classifier", nn.Linear(inputs, outputs)
        yield "classifier", nn.ReLU(inplace=True)
        yield "classifier", nn.Dropout()
    yield "classifier", nn.Linear(4096, 1000)
