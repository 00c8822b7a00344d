"""A scale and a zero point: derived, beside the zero point that the talk gives, and what each loses."""

from __future__ import annotations

import torch

import paredown as pare
from paredown.quantize.facts import numerics_facts
from paredown.recipes import digits
from paredown.report import numerics_figures as drawn
from talk import nets
from talk.page import Column, Figure, Formula, Heading, Page, Setting, Table, Text


def build(setting: Setting) -> Page:
    """The facts of `paredown numerics`, of the arithmetic and of the digits network."""
    program = nets.program(setting)
    facts = numerics_facts(program, digits.calibration_batches(), name="digits", worst=1)
    mapped, demo = facts["mapping"], facts["granularity"]
    low, high = mapped["range"]
    return Page(
        title="A scale and a zero point",
        told=(
            "6.8e38, the range of FP32, into 256 values; but network weights sit in a narrow range around zero, so a scale and a zero point save it.",
            "scale = (fmax − fmin) / (qmax − qmin); zero point = (fmax + fmin) / 2; Q = F / scale + zero point.",
        ),
        parts=(
            Text(text=_whole_range(program)),
            _ranges(program),
            Heading(text="The derivation"),
            Text(text="Whole numbers q from qmin to qmax stand for real numbers x, evenly spaced, so by a straight line:"),
            Formula(text="x̂ = s · (q − z)"),
            Text(text="It must send qmin to low and qmax to high. The difference of these two equations gives the scale, as in the talk:"),
            Formula(text="high − low = s · (qmax − qmin),  so  s = (high − low) / (qmax − qmin)"),
            Text(text="Put into the first of them, and rounded, because 0 must have a code of its own (padding and ReLU make exact zeros):"),
            Formula(text="low = s · (qmin − z),  so  z = qmin − round(low / s)"),
            Formula(text="q = clamp(round(x / s) + z, qmin, qmax)"),
            _figure(drawn.staircase(mapped["affine"], low, high, "affine"), f"Affine, {mapped['bits']} bits, range {low:g} … {high:g}"),
            _figure(drawn.staircase(mapped["symmetric"], low, high, "symmetric"), "Symmetric: z = 0, as weights have it; levels below the range are never used"),
            Heading(text="The two zero points"),
            *(_figure(drawn.two_zero_points(z["rows"], z["codes"], low, high), f"x̂ − x over the range, codes {z['codes'][0]} … {z['codes'][1]}") for z in mapped["zero_points"]),
            _zero_points(mapped["zero_points"], low, high),
            Heading(text="Bits and granularity"),
            _figure(drawn.bits_chart(demo["weights"]["sqnr_db"], "one scale per …"), demo["weights"]["what"]),
            *(_figure(drawn.histogram_with_grid(w), f"The layer that loses most: {w['of']} of {w['name']}, with the levels of a {w['bits']}-bit grid") for w in facts["model"]["worst"]),
            _layers(facts["model"]["layers"]),
        ),
        differ=(
            "The talk’s scale is right. Its zero point is a number in the unit of x, the middle of the range, but Q = F/s + z adds it to codes. So a part of the range has no codes, and 0 is not exact unless the middle happens to be whole.",
            "With symmetric weights, fmin = −fmax, the talk’s zero point is 0 and so is the right one for codes −127 … 127: the slip goes unseen there.",
            "Fewer bits: each costs 20·log₁₀2 = 6.02 dB. Finer scales give some of it back, where sizes are uneven.",
        ),
        shortened=f"the network was trained for {nets.base_epochs(setting)} epochs." if setting.quick else "",
    )  # fmt: skip


def _figure(image: drawn.Image, caption: str) -> Figure:
    return Figure(caption=caption, mark="counted", alt=image.alt, source=image.source)


def _whole_range(program: pare.Program) -> str:
    """What is left of the weights where 256 codes have to reach over all of float32."""
    top = torch.finfo(torch.float32).max
    step = 2 * top / 255
    largest = max(float(t.detach().abs().max()) for t in program.state.values() if t.dim() > 1)
    return (
        f"From −{top:.3g} to {top:.3g} are {2 * top:.2g}. In 255 equal steps each is {step:.2g} wide, and all weights of this network, of which none is larger than "
        f"{largest:.2g}, get one and the same code. Over their own range a step is {2 * largest / 255:.1g} wide."
    )


def _ranges(program: pare.Program) -> Table:
    rows = []
    for name, tensor in program.state.items():
        if tensor.dim() > 1:
            w = tensor.detach()
            rows.append(
                (name, float(w.min()), float(w.max()), float(w.std()), float(100 * (w.abs() < 0.5).float().mean()))
            )
    return Table(
        caption="Weights of the trained digits network",
        columns=(
            Column(title="Weight"),
            *(Column(title=t, mark="counted") for t in ("Smallest", "Largest", "Standard deviation", "Within ±½, %")),
        ),
        rows=rows,
    )


def _zero_points(cases: list[dict], low: float, high: float) -> Table:
    return Table(
        caption=f"The range {low:g} … {high:g} on 8-bit codes, 10,001 values",
        columns=(
            Column(title="Codes"), Column(title="Rule"), Column(title="z", mark="counted"), Column(title="Largest error", mark="counted"),
            Column(title="Root mean square error", mark="counted"), Column(title="Of the range cut off, %", mark="counted", form=".1f"),
        ),
        rows=[
            (f"{case['codes'][0]} … {case['codes'][1]}", row["rule"], row["zero_point"], row["largest_error"], row["root_mean_square_error"], 100 * row["clipped_share"])
            for case in cases for row in case["rows"]
        ],
    )  # fmt: skip


def _layers(layers: list[dict]) -> Table:
    def at(one: dict, of: str, granularity: str, bits: str) -> float | str:
        found = one[of] and one[of][granularity][bits]
        return "–" if found is None else found

    return Table(
        caption="Signal to quantization noise in dB in every layer of the digits network, simulated in PyTorch; higher is better",
        columns=(
            Column(title="Layer"), Column(title="Weight, 8 bits, per tensor", mark="measured", form=".1f"), Column(title="per channel", mark="measured", form=".1f"),
            Column(title="Weight, 4 bits, per channel", mark="measured", form=".1f"), Column(title="What enters, 8 bits", mark="measured", form=".1f"),
        ),
        rows=[(one["name"], at(one, "weight", "tensor", "8"), at(one, "weight", "channel", "8"), at(one, "weight", "channel", "4"), at(one, "activation", "tensor", "8")) for one in layers],
    )  # fmt: skip
