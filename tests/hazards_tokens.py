"""Tiny nets, one per structural hazard: embeddings, recurrence, signatures, Hugging Face. See hazards.py."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hazards import HAZARDS, Hazard, Inputs, Net, conv, hazard, image, random, tokens, words

# --------------------------------------------------------------------------------------------- embeddings and recurrence


@hazard(tokens, free=7)
def transpose_tied() -> nn.Module:
    """An autoencoder whose decoder is the encoder's transpose."""

    def run(m: Any, x: Tensor) -> Tensor:
        return F.linear(F.relu(m.a(x)), m.a.weight.t(), m.bias)

    return Net(run, a=nn.Linear(5, 7), bias=nn.Parameter(torch.zeros(5)))


@hazard(words, free=14)
def tied_embedding() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.table(x)
        return F.linear(y + m.b(F.gelu(m.a(y))), m.table.weight)

    return Net(run, table=nn.Embedding(11, 8), a=nn.Linear(8, 6), b=nn.Linear(6, 8))


@hazard(words, free=8 + 8 + 6)
def embedding_bags() -> nn.Module:
    """Rows added up by their number in the batch, which is a count of the input's elements."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(F.relu(m.a(m.mean(x)) + m.b(m.largest(x))))

    return Net(
        run,
        mean=nn.EmbeddingBag(11, 8, mode="mean"),
        largest=nn.EmbeddingBag(11, 8, mode="max"),
        a=nn.Linear(8, 6),
        b=nn.Linear(8, 6),
        head=nn.Linear(6, 3),
    )


@hazard(words, free=8)
def positions_looked_up() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.norm(m.table(x) + m.place(m.ids[:, : x.shape[1]]) + m.kind(torch.zeros_like(x))))

    net = Net(
        run,
        table=nn.Embedding(11, 8, padding_idx=0),
        place=nn.Embedding(9, 8),
        kind=nn.Embedding(2, 8),
        norm=nn.LayerNorm(8),
        head=nn.Linear(8, 3),
    )
    net.register_buffer("ids", torch.arange(9)[None], persistent=False)
    return net


@hazard(tokens, free=6 + 4 + 5, double=False)
def lstm() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        y, (h, _) = m.cell(m.inner(x))
        return m.head(m.after(y[:, -1])) + m.other(h[-1])

    return Net(
        run,
        inner=nn.Linear(5, 6),
        cell=nn.LSTM(6, 4, num_layers=2, batch_first=True),
        after=nn.Linear(4, 5),
        head=nn.Linear(5, 3),
        other=nn.Linear(4, 3),
    )


@hazard(tokens, free=6 + 4, double=False)
def gru() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.cell(m.inner(x))[0])

    return Net(
        run, inner=nn.Linear(5, 6), cell=nn.GRU(6, 4, bidirectional=True, batch_first=True), head=nn.Linear(8, 3)
    )


@hazard(lambda b: ((random(b, 6, 5), random(b, 4)), {}), free=5, spaces=1, because=("initial state",))
def recurrent_started() -> nn.Module:
    """The first state comes from outside: its size is the user's."""

    class Started(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.cell, self.head = nn.Linear(5, 5), nn.GRU(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, start: Tensor) -> Tensor:
            return self.head(self.cell(self.inner(x).transpose(0, 1), start[None])[0].transpose(0, 1))

    return Started()


@hazard(tokens, free=6 + 4, spaces=2, double=False)
def projected() -> nn.Module:
    """What an LSTM gives is a projection of its hidden units, in both directions and layers."""

    def run(m: Any, x: Tensor) -> Tensor:
        y, (h, c) = m.cell(x)
        return m.head(y[:, -1]) + m.last(h[-1]) + m.memory(c[0])

    cell = nn.LSTM(5, 6, num_layers=2, bidirectional=True, batch_first=True, proj_size=4)
    return Net(run, cell=cell, head=nn.Linear(8, 3), last=nn.Linear(4, 3), memory=nn.Linear(6, 3))


@hazard(tokens, free=4 + 5, spaces=2)
def learned_start() -> nn.Module:
    """Two simple recurrent layers without biases; the first one starts from learned states."""

    def run(m: Any, x: Tensor) -> Tensor:
        y, _ = m.first(x, m.start.expand(2, x.shape[0], 4))
        _, h = m.second(y, x.new_zeros(1, x.shape[0], 5))
        return m.head(h[0])

    first = nn.RNN(5, 4, nonlinearity="relu", bias=False, bidirectional=True, batch_first=True)
    second = nn.RNN(8, 5, batch_first=True, bias=False)
    return Net(run, first=first, second=second, head=nn.Linear(5, 3), start=nn.Parameter(torch.ones(2, 1, 4)))


@hazard(tokens, free=4 + 6 + 5, spaces=3, double=False)
def cells() -> nn.Module:
    """One step at a time: the states go from step to step, and the user's code may write their first size down."""

    def run(m: Any, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 4)
        g = r = None
        for step in range(3):
            h, c = m.lstm(x[:, step], (h, c))
            g = m.gru(h, g)
            r = m.rnn(g, r)
        return m.head(r) + m.memory(c)

    return Net(
        run,
        lstm=nn.LSTMCell(5, 4),
        gru=nn.GRUCell(4, 6),
        rnn=nn.RNNCell(6, 5),
        head=nn.Linear(5, 3),
        memory=nn.Linear(4, 3),
    )


# ----------------------------------------------------------------------------------------------- signatures and outputs


class _TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 6), nn.Linear(4, 6), nn.Linear(6, 5)
        self.one, self.two = nn.Linear(5, 2), nn.Linear(6, 3)

    def forward(self, picture: Tensor, numbers: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = F.relu(self.a(picture)).mean((2, 3)) * self.b(numbers)
        y = self.c(x)
        return self.one(y), [self.two(x), y[:, :2].sum(1)]


@hazard(lambda b: ((random(b, 3, 8, 8), random(b, 4)), {}))
def several_inputs() -> nn.Module:
    return _TwoInputs()


class _Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, *, scale: Tensor | None = None, features: bool = False) -> dict[str, Tensor]:
        y = F.relu(self.a(x))
        if scale is not None:
            y = y * scale
        z = self.b(y)
        return {"logits": self.c(z), **({"features": z} if features else {})}


@hazard(lambda b: ((random(b, 6, 5),), {"scale": random(b, 6, 1)}), free=13)
def dict_output() -> nn.Module:
    return _Keywords()


@hazard(lambda b: ((), {"features": True, "x": random(b, 6, 5)}), free=7)
def keyword_inputs() -> nn.Module:
    return _Keywords()


@hazard(tokens, free=7)
def none_in_output() -> nn.Module:
    def run(m: Any, x: Tensor) -> Any:
        return m.b(F.relu(m.a(x))), None, {"aux": (None, x.mean(1))}

    return Net(run, a=nn.Linear(5, 7), b=nn.Linear(7, 3))


@hazard(tokens, free=7, unused=("spare", "idle.weight", "idle.bias"))
def unused_parameters() -> nn.Module:
    return Net(
        lambda m, x: m.b(F.relu(m.a(x))),
        a=nn.Linear(5, 7),
        b=nn.Linear(7, 3),
        spare=nn.Parameter(torch.zeros(7)),
        idle=nn.Linear(7, 7),
    )


@hazard(tokens, free=7, unused=("a.weight",))
def frozen() -> nn.Module:
    net = Net(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(5, 7), b=nn.Linear(7, 3))
    net.a.weight.requires_grad_(False)
    return net


class _Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head, self.aux = conv(3, 6), conv(6, 5), conv(5, 3), conv(6, 2)

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.a(x))
        out = self.head(F.relu(self.b(y)))
        return (out, self.aux(y)) if self.training else out


@hazard(image, free=11)
def auxiliary_head() -> nn.Module:
    """A head that only train mode runs (GoogLeNet, Inception): it must follow the pruned channels all the same."""
    return _Auxiliary()


@hazard(tokens)
def hidden_output() -> nn.Module:
    """A hidden layer that is also returned must stay whole."""

    def run(m: Any, x: Tensor) -> Any:
        y = F.relu(m.a(x))
        return m.c(m.b(y)), y

    return Net(run, a=nn.Linear(5, 7), b=nn.Linear(7, 6), c=nn.Linear(6, 3))


# --------------------------------------------------------------------------------------------------------- Hugging Face


def mend_torchvision() -> None:
    """Let a torchvision that was built for another torch be imported: its own operators are missing, its models are not."""
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        _KEPT.append(library)
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_KEPT: list[Any] = []

if importlib.util.find_spec("transformers") is not None:
    _SMALL: dict[str, Any] = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 12,
    }

    def _sentence(batch: int) -> Inputs:
        (ids,), _ = words(batch)
        mask = torch.ones_like(ids)
        mask[:, -2:] = 0
        return (), {"input_ids": ids, "attention_mask": mask}

    @hazard(_sentence, stochastic=True, double=False, unused=("pooler.dense.weight", "pooler.dense.bias"))
    def bert() -> nn.Module:
        mend_torchvision()
        from transformers import BertConfig, BertModel

        return BertModel(BertConfig(vocab_size=11, max_position_embeddings=8, **_SMALL), add_pooling_layer=False)

    @hazard(_sentence, stochastic=True, double=False)
    def distilbert() -> nn.Module:
        mend_torchvision()
        from transformers import DistilBertConfig, DistilBertForSequenceClassification

        return DistilBertForSequenceClassification(
            DistilBertConfig(
                vocab_size=11, max_position_embeddings=8, dim=8, n_layers=1, n_heads=2, hidden_dim=12, num_labels=3
            )
        )

    @hazard(lambda b: ((), {"pixel_values": random(b, 3, 8, 8)}), double=False)
    def vit() -> nn.Module:
        mend_torchvision()
        from transformers import ViTConfig, ViTForImageClassification

        return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **_SMALL))


__all__ = ["HAZARDS", "Hazard"]
