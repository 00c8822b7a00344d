"""The table of thirteen networks: parameters, multiply-adds and megabytes, counted."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

import paredown as pare
from paredown.models import import_torchvision, load_model
from talk.page import Column, Page, Setting, Table, Text

TOLD = (
    # name, MODEL, side of the input, and as the talk has them: parameters in M, "GFLOPs", FLOPs per parameter, "MB"
    ("AlexNet", "torchvision:alexnet", 224, 61.0, 1.0, 16.4, 233),
    ("VGG-16", "torchvision:vgg16", 224, 138.0, 15.5, 112.3, 528),
    ("VGG-19", "torchvision:vgg19", 224, 144.0, 19.6, 136.1, 549),
    ("ResNet-18", "torchvision:resnet18", 224, 11.7, 1.8, 153.8, 44),
    ("ResNet-50", "torchvision:resnet50", 224, 25.6, 4.1, 160.2, 98),
    ("ResNet-101", "torchvision:resnet101", 224, 44.6, 7.6, 170.6, 167),
    ("ResNet-152", "torchvision:resnet152", 224, 60.2, 11.3, 187.5, 230),
    ("InceptionV3", "inception without its auxiliary head", 299, 23.8, 5.7, 239.3, 92),
    ("Xception", "timm:legacy_xception", 299, 22.9, 8.4, 366.3, 88),
    ("MobileNetV1", "timm:mobilenetv1_100", 224, 4.2, 0.57, 135.7, 16),
    ("MobileNetV2", "torchvision:mobilenet_v2", 224, 3.5, 0.3, 85.7, 14),
    ("EfficientNet-B0", "torchvision:efficientnet_b0", 224, 5.3, 0.39, 73.6, 20),
    ("EfficientNet-B7", "torchvision:efficientnet_b7", 600, 66.0, 37.0, 560.6, 255),
)


def build(setting: Setting) -> Page:
    """Every network captured and examined; nothing is run, so random weights do."""
    found = [(row, examined(row[1], row[2])) for row in TOLD]
    return Page(
        title="Two footprints: thirteen networks",
        told=(
            "Reduce memory and computation of **inference**, keep the accuracy. A table of thirteen networks with parameters in M, GFLOPs, "
            "FLOPs per parameter, and MB.",
        ),
        parts=(
            Table(
                caption="Memory. MB of the state_dict in float32: 10⁶ bytes, and MiB, 2²⁰ bytes",
                columns=(
                    Column(title="Network"), Column(title="Input"), Column(title="Parameters, M", mark="talk", form="g"),
                    Column(title="Parameters", mark="counted", bar=True), Column(title="Off by, %", mark="counted", form="+.2f"),
                    Column(title="“MB”", mark="talk", form="g"), Column(title="MiB", mark="counted", form=".1f"), Column(title="MB", mark="counted", form=".1f"),
                ),
                rows=[_memory(row, cost) for row, cost in found],
            ),
            Table(
                caption="Arithmetic of one image. FLOPs = 2 × MACs; what the talk calls FLOPs are MACs (multiply-adds)",
                columns=(
                    Column(title="Network"), Column(title="“GFLOPs”", mark="talk", form="g"), Column(title="GMACs", mark="counted", form=".3f", bar=True),
                    Column(title="GFLOPs", mark="counted", form=".3f"), Column(title="Off by, %", mark="counted", form="+.1f"),
                    Column(title="“FLOPs” per parameter", mark="talk", form="g"), Column(title="MACs per parameter", mark="counted", form=".1f", bar=True),
                    Column(title="FLOPs per parameter", mark="counted", form=".1f"),
                ),
                rows=[_arithmetic(row, cost) for row, cost in found],
            ),
            Text(text="What MACs per parameter are for, as a rule of thumb (not tested here): where they are few, moving the weights costs more than multiplying by them, and a smaller file is likely a faster one; where they are many, arithmetic counts."),
        ),
        differ=tuple(_differences(found)),
        not_tested=("The time that these networks take. MACs do not say it; see the pages on zeros and on tiles.", "Accuracy: all weights here are random."),
    )  # fmt: skip


def examined(model: str, side: int) -> pare.Cost:
    """The cost of one network for an image of side × side."""
    net = _inception() if model.startswith("inception") else load_model(model)[0]
    return pare.examine(pare.capture(net, torch.zeros(1, 3, side, side), train=False))


def _inception() -> nn.Module:
    import_torchvision()
    from torchvision.models import inception_v3

    return inception_v3(aux_logits=False, init_weights=False)


def _memory(row: tuple, cost: pare.Cost) -> tuple:
    name, _, side, parameters, _, _, size = row
    off = 100 * (cost.parameters / 1e6 / parameters - 1)
    return (
        name,
        f"3×{side}×{side}",
        parameters,
        cost.parameters,
        off,
        size,
        cost.state_dict_bytes / 2**20,
        cost.state_dict_bytes / 1e6,
    )


def _arithmetic(row: tuple, cost: pare.Cost) -> tuple:
    name, _, _, _, macs, per, _ = row
    counted = cost.macs / cost.parameters
    return (
        name,
        macs,
        cost.macs / 1e9,
        2 * cost.macs / 1e9,
        100 * (cost.macs / 1e9 / macs - 1),
        per,
        counted,
        2 * counted,
    )


def _differences(found: list[tuple[tuple, pare.Cost]]) -> Iterator[str]:
    """Worked out from the numbers, so that they are true of these."""
    far = [row[0] for row, cost in found if abs(cost.parameters / 1e6 / row[3] - 1) > 0.01]
    yield (
        f"Parameters: {len(found) - len(far)} of {len(found)} are within 1 % of what the talk prints, which is as many digits as it prints."
        + (f" Not so {', '.join(far)}, and we know no reason." if far else "")
    )
    uncounted = [row[0] for row, cost in found if cost.uncounted]
    yield (
        "Every operation with multiplications was counted."
        if not uncounted
        else f"Not all operations were counted in {', '.join(uncounted)}."
    )
    apart = [
        f"{row[0]} ({cost.macs / 1e9:.3g} against {row[4]:g})"
        for row, cost in found
        if abs(cost.macs / 1e9 / row[4] - 1) > 0.05
    ]
    yield f"Multiply-adds differ by more than 5 % for {', '.join(apart) or 'none'}. The talk calls MACs FLOPs; counted as two operations each, there are twice as many."
    alex = next(cost for row, cost in found if row[0] == "AlexNet")
    yield f"AlexNet’s 1.0 G is not what torchvision’s network of 61 M parameters does: {alex.macs / 1e9:.2f} G multiply-adds, so {alex.macs / alex.parameters:.1f} per parameter and not 16.4. The original, without groups, comes nearer (next page)."
    mebi = sum(
        abs(cost.state_dict_bytes / 2**20 - row[6]) < abs(cost.state_dict_bytes / 1e6 - row[6]) for row, cost in found
    )
    yield f"Its MB are nearer to MiB in {mebi} of {len(found)} rows. MB and MiB differ by 4.9 %."
