"""How to proceed: which layers need compression, is the file as large as its tensors, and what a target size asks."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch import nn

import paredown as pare
from paredown.examine import file_size, shrink_to, state_size
from paredown.models import load_model
from talk.page import Column, Heading, Page, Setting, Table, Text

MODEL, TARGET = "torchvision:resnet18", 20_000_000
NEXT = (
    ("Prune by L1 or L2, structured or not, by masks of one’s own", "Three ways to prune a matrix"),
    ("Curves for the ceiling of accuracy; dense models of similar size", "The pruning recipe: curve and sweet spot"),
    ("Quantize: dynamic, static, QAT", "Dynamic, static and trained quantization"),
)


def build(setting: Setting) -> Page:
    """ResNet-18 on random weights: sizes do not depend on them."""
    net, _ = load_model(MODEL)
    cost = pare.examine(pare.capture(net, torch.zeros(1, 3, 224, 224), train=False))
    layers = [layer for layer in cost.layers if layer.macs]
    largest = max(layers, key=lambda layer: layer.parameter_bytes)
    busiest = max(layers, key=lambda layer: layer.macs)
    fixed = cost.state_dict_bytes - cost.parameter_bytes
    plan = shrink_to(cost, TARGET, fixed_bytes=fixed)
    sizes = _files(net, setting.folder)
    return Page(
        title="How to proceed: examine",
        told=(
            "Examine the architecture: which layers need compression, as bar charts. Sanity check: **file size == state_dict size**. Use the target size to decide.",
            "Then prune (L1, L2, structured or not, masks of one’s own; curves for the ceiling of accuracy; dense models of similar size). Then quantize (dynamic, static, QAT).",
        ),
        parts=(
            Heading(text="Which layers"),
            Table(
                caption=f"{MODEL.partition(':')[2]}, one image of 224×224: layers with multiplications. {cost.parameters:,} parameters and {cost.macs:,} MACs in all",
                columns=(
                    Column(title="Layer"), Column(title="Output"), Column(title="Parameter bytes", mark="counted", bar=True),
                    Column(title="MACs", mark="counted", bar=True), Column(title="Activation bytes", mark="counted", bar=True),
                ),
                rows=[(x.name, "×".join(map(str, x.output_shape[1:])), x.parameter_bytes, x.macs, x.activation_bytes) for x in layers],
            ),
            Heading(text="Is the file as large as its tensors"),
            Table(
                caption=f"The state_dict needs {state_size(net.state_dict()).unique_bytes:,} bytes. Four ways to save it, and what examine says of the file, without unpickling it",
                columns=(Column(title="Saved as"), Column(title="Bytes of the file", mark="measured"), Column(title="Bytes of its tensors", mark="counted"), Column(title="Alarm")),
                rows=sizes,
            ),
            Heading(text="What a target size asks"),
            Text(text=f"For a file of {TARGET / 1e6:g} MB: cut the largest layers down to one common cap, {plan.cap_bytes:,} bytes, so that the fewest layers are touched. It says where to aim; layers shrink together with their neighbours, so pruning decides."),
            Table(
                caption=f"{len(plan.layers)} of {len(layers)} layers must shrink in float32. In INT8 the weights take a quarter: {cost.parameter_bytes / 4 / 1e6:.1f} MB, before scales",
                columns=(Column(title="Layer"), Column(title="Bytes", mark="counted"), Column(title="Cut down to", mark="estimated"), Column(title="Remains, %", mark="estimated", form=".0f", bar=True)),
                rows=[(x.name, x.parameter_bytes, x.to_bytes, 100 * x.remains) for x in plan.layers],
            ),
            Heading(text="And then"),
            Table(caption="Where this book follows each of the next steps", columns=(Column(title="Step"), Column(title="Page")), rows=NEXT),
        ),
        differ=(
            f"The two bar charts name different layers: most bytes are in `{largest.name}`, most multiplications in `{busiest.name}`. Which layers need compression depends on which footprint is too large.",
            "The sanity check is an equality only up to a header. A file that is much larger holds something else: an optimizer, a view of a bigger tensor, masks. examine says which.",
        ),
        not_tested=("Time per layer. The page on tiles shows why bytes and MACs do not tell it.",),
    )  # fmt: skip


def _files(net: nn.Module, folder: Path) -> list[tuple[str, int, int | None, str]]:
    """A state_dict as safetensors and as .pt, with an optimizer, and with a view of a larger tensor."""
    state = net.state_dict()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    safetensors.torch.save_file(state, folder / "net.safetensors")
    torch.save(state, folder / "net.pt")
    torch.save({"model": state, "optimizer": optimizer.state_dict()}, folder / "checkpoint.pt")
    wide = torch.zeros(4000, 512)
    torch.save({**state, "fc.weight": wide[:1000]}, folder / "view.pt")
    named = {
        "safetensors": "net.safetensors",
        ".pt": "net.pt",
        ".pt with its optimizer": "checkpoint.pt",
        ".pt with a view of a larger tensor": "view.pt",
    }
    rows = []
    for told, name in named.items():
        found = file_size(folder / name)
        rows.append((told, found.file_bytes, found.tensor_bytes, "; ".join(found.alarms) or "none"))
        (folder / name).unlink()  # four times the weights, and no page needs them again
    return rows
