"""What the talk's reading list names and this book leaves for later: not tested, each with what there is already."""

from __future__ import annotations

from talk.page import Column, Page, Setting, Table

LATER = (
    (
        "Block-sparse kernels (OpenAI)",
        "products that skip blocks of zeros",
        "masks of any block; torch’s BSR and its break-even, on the page “Which zeros speed up what”",
    ),
    (
        "Tiles and waves of a GPU",
        "a tile that is half empty costs as much as a full one; so does a last wave of tiles",
        "the same effect on a processor, on the page “Tiles and alignment”",
    ),
    (
        "Pruning of large language models",
        "SparseGPT, Wanda and their kin on decoders",
        "the criteria `wanda` and `obs`, and `update: obs`, on networks of this size",
    ),
    (
        "MobileLLM",
        "deep and thin decoders below a billion parameters, shared embeddings and layers",
        "tied weights are counted, pruned and exported once",
    ),
    (
        "The era of 1-bit LLMs",
        "weights −1, 0, 1 in all linear layers",
        "the schemes `ternary` and `binary`, trained in simulation, packed on disk; on the page “Dynamic, static and trained quantization” of the full book",
    ),
    (
        "QuEST",
        "training with 1 to 4 bits in weights and activations from the start",
        "`w4a4` from trained weights, in kernels of 8 bits; on the same page",
    ),
)


def build(setting: Setting) -> Page:
    """Six subjects, none of them measured here."""
    return Page(
        title="Left for later",
        told=("The reading list begins with a survey of pruning and quantization (arXiv 2101.09671) and PyTorch’s own pages on both, whose methods are on the pages before this one.", "It ends with block sparsity, the architecture of GPUs and tiled products, pruning of large language models, MobileLLM, 1-bit LLMs, and QuEST.",),
        parts=(
            Table(
                caption="None of these was measured for this book",
                columns=(Column(title="Subject"), Column(title="What it is"), Column(title="What is there already"), Column(title="Its claims")),
                rows=[(*row, None) for row in LATER],
            ),
        ),
        differ=("Nothing was measured, so nothing can be compared.",),
        not_tested=tuple(row[0] for row in LATER),
    )  # fmt: skip
