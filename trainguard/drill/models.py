r"""The drill's victims: small models for 8 to 64 pixel images, and any timm model by name. All eat images in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Standardised(nn.Module):
    r"""A model behind a fixed standardisation, so that images stay in [0, 1] everywhere else.

    Args:
        net: classifier of standardised images.
        mean: (C,) mean of the training images.
        std: (C,) their standard deviation.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", mean.to(torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", std.to(torch.float32).clamp_min(1e-3).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        r"""(B, C, H, W) in [0, 1] to (B, K) logits."""
        return self.net((images - self.mean) / self.std)


class ResNet9(nn.Module):
    r"""The nine-layer residual network of fast CIFAR training (Page 2018)."""

    def __init__(self, num_classes: int, in_channels: int = 3, width: int = 16) -> None:
        super().__init__()
        w = width
        self.body = nn.Sequential(
            _conv(in_channels, w),
            _conv(w, 2 * w),
            _Halve(),
            _Residual(2 * w),
            _conv(2 * w, 4 * w),
            _Halve(),
            _conv(4 * w, 8 * w),
            _Halve(),
            _Residual(8 * w),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(8 * w, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        r"""(B, C, H, W) to (B, K) logits."""
        return self.head(self.body(images))


class PreActResNet18(nn.Module):
    r"""ResNet-18 with pre-activation blocks (He et al. 2016b), 3x3 stem; the model of PBE's Table 1."""

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False)]
        width = 64
        for stage in (64, 128, 256, 512):
            layers += [_PreActBlock(width, stage, 1 if stage == 64 else 2), _PreActBlock(stage, stage, 1)]
            width = stage
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(512), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(512, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        r"""(B, C, H, W) to (B, K) logits."""
        return self.head(self.body(images))


class PlainCNN(nn.Module):
    r"""Six convolutions and two linear layers, without any normalisation, shortcut or average: 32 pixels or fewer."""

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = in_channels
        for stage in (32, 64, 96):
            layers += [
                nn.Conv2d(width, stage, 3, 1, 1),
                nn.ReLU(),
                nn.Conv2d(stage, stage, 3, 1, 1),
                nn.ReLU(),
                _Halve(),
            ]
            width = stage
        self.body = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(4), nn.Flatten(), nn.Dropout(0.3))
        self.hidden = nn.Linear(16 * width, 128)
        self.head = nn.Linear(128, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        r"""(B, C, H, W) to (B, K) logits."""
        return self.head(F.relu(self.hidden(self.body(images))))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(_conv(width, width), _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class _Halve(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2) if min(x.shape[2:]) > 1 else x


class _PreActBlock(nn.Module):
    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width_in), nn.BatchNorm2d(width_out)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        same = stride == 1 and width_in == width_out
        self.shortcut = None if same else nn.Conv2d(width_in, width_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        return skip + self.conv2(F.relu(self.norm2(self.conv1(out))))


def _conv(width_in: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width_in, width_out, 3, 1, 1, bias=False), nn.BatchNorm2d(width_out), nn.ReLU(True))


def _resnet(name: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    model = _timm(name, num_classes, in_channels, image_size)
    if image_size <= 64:
        model.conv1 = nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return model


def _mobilenetv2(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    model = _timm("mobilenetv2_100", num_classes, in_channels, image_size)
    if image_size <= 64:  # the CIFAR form leaves out the first two of five halvings
        strided = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
        for layer in strided[:2]:
            layer.stride = (1, 1)
    return model


def _vit(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    sizes = [size for size in range(1, image_size + 1) if image_size % size == 0]  # that leave no border unseen
    return VisionTransformer(
        img_size=image_size,
        patch_size=min(sizes, key=lambda size: (abs(size - image_size / 8), -size)),
        in_chans=in_channels,
        num_classes=num_classes,
        embed_dim=192,
        depth=6,
        num_heads=3,
    )


def _timm(name: str, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise ValueError(
            f"model {name!r} is neither one of {', '.join(sorted(MODELS))} nor a timm model: see timm.list_models()"
        )
    options: dict = {"pretrained": False, "num_classes": num_classes, "in_chans": in_channels}
    try:
        return timm.create_model(name, img_size=image_size, **options)
    except TypeError:  # convolutional models take any size and no img_size
        return timm.create_model(name, **options)


MODELS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "resnet9": lambda k, c, s: ResNet9(k, c, 16),
    "resnet9-wide": lambda k, c, s: ResNet9(k, c, 32),
    "resnet18": lambda k, c, s: _resnet("resnet18", k, c, s),
    "resnet34": lambda k, c, s: _resnet("resnet34", k, c, s),
    "preact_resnet18": lambda k, c, s: PreActResNet18(k, c),
    "mobilenetv2": _mobilenetv2,
    "vit": _vit,
    "cnn": lambda k, c, s: PlainCNN(k, c),
}


def build(name: str, num_classes: int, in_channels: int = 3, image_size: int = 32) -> nn.Module:
    r"""A fresh, untrained model.

    Args:
        name: a key of `MODELS`, or any timm model. ResNets and MobileNetV2 take their CIFAR form (3x3 stem, fewer
            halvings) up to 64 pixels; the ViT has 8 x 8 patches (of 4 pixels at 32), or as many as come near, width
            192, depth 6; `"cnn"` has no normalisation at all.
        num_classes: width of the output.
        in_channels: channels of the images.
        image_size: shorter side of the images in pixels.

    Raises:
        ValueError: no such model.
    """
    maker = MODELS.get(name)
    return maker(num_classes, in_channels, image_size) if maker else _timm(name, num_classes, in_channels, image_size)
