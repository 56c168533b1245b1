"""
ResNet and MobileNetV2 for small images, as networks of timm.

timm's own variants divide the sides of an image by 32 and begin with a stride of 2, so little is left of 24 x 24 pixels. These
are built from the same blocks with any number of stages. Importing this module registers them with timm, and transformers'
`timm_wrapper` then builds them from a config:

    {"model_type": "timm_wrapper", "architecture": "resnet_for_small_images", "model_args": {"depths": [1, 1, 1]}, …}

`loading` imports this module for every config of `timm_wrapper`.
"""

import functools
from collections.abc import Iterable

from timm.models import register_model
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.efficientnet import EfficientNet
from torch import nn


GIVEN_BY_TIMM = {
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "cache_dir",
}  # `create_model` passes them to every network


def check_given_by_timm(arguments: Iterable[str]) -> None:
    """
    Raises:
        TypeError: the config has a `model_args` that no network takes, such as a misspelt one.
    """
    unknown = sorted(set(arguments) - GIVEN_BY_TIMM)
    if unknown:
        raise TypeError(f"the network has no argument {unknown[0]!r}")


@register_model
def resnet_for_small_images(
    pretrained: bool = False,
    hidden_sizes: tuple[int, ...] = (16, 32, 64),
    depths: tuple[int, ...] = (2, 2, 2),
    stem_stride: int = 1,
    num_classes: int = 10,
    **of_timm,
) -> ByobNet:
    """
    ResNet of basic blocks (He et al., CVPR 2016): `(batch, 3, height, width) -> (batch, num_classes)`.

    Args:
        pretrained: timm's argument, without effect.
        hidden_sizes: channels of each stage. The stem, a 3 x 3 convolution, has those of the first stage.
        depths: blocks of each stage. All stages but the first halve height and width.
    """
    check_given_by_timm(of_timm)
    stages = tuple(
        ByoBlockCfg(type="basic", d=depth, c=channels, s=1 if index == 0 else 2)
        for index, (channels, depth) in enumerate(zip(hidden_sizes, depths, strict=True))
    )
    network = ByobNet(ByoModelCfg(blocks=stages, stem_chs=hidden_sizes[0], stem_pool=""), num_classes=num_classes)
    network.stem.conv.stride = (stem_stride, stem_stride)
    return network


@register_model
def mobilenetv2_for_small_images(
    pretrained: bool = False,
    blocks: tuple[tuple[str, ...], ...] = (("ds_r1_k3_s1_c8",), ("ir_r2_k3_s2_e6_c16",), ("ir_r2_k3_s2_e6_c32",)),
    stem_size: int = 16,
    num_features: int = 128,
    stem_stride: int = 1,
    num_classes: int = 10,
    **of_timm,
) -> EfficientNet:
    """
    MobileNetV2 (Sandler et al., CVPR 2018): `(batch, 3, height, width) -> (batch, num_classes)`.

    Args:
        pretrained: timm's argument, without effect.
        blocks: the stages in timm's words: `ds` is a depthwise-separable block, `ir` an inverted residual; `r2` is repeated
            twice, `k3` the kernel size, `s2` the stride of the first, `e6` the expansion, `c16` the channels.
        stem_size: channels of the stem, a 3 x 3 convolution.
        num_features: channels of the last 1 x 1 convolution.
    """
    check_given_by_timm(of_timm)
    network = EfficientNet(
        decode_arch_def([list(stage) for stage in blocks]),
        num_classes=num_classes,
        num_features=num_features,
        stem_size=stem_size,
        fix_stem=True,
        round_chs_fn=functools.partial(round_channels, divisor=8),
        act_layer=nn.ReLU6,
    )
    network.conv_stem.stride = (stem_stride, stem_stride)
    return network
