"""Numbers in words: MB and MiB told apart, intervals, signs."""

from __future__ import annotations

import math


def digits(value: float, significant: int = 3) -> str:
    """A number with so many significant digits and grouped thousands.

    >>> digits(0.0123456), digits(98765.4), digits(-2.5), digits(1.5e-7)
    ('0.0123', '98,765', '−2.50', '1.50e−7')
    """
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-4 or size >= 1e15:
        mantissa, _, exponent = f"{value:.{significant - 1}e}".partition("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    decimals = max(0, significant - 1 - math.floor(math.log10(size)))
    return f"{value:,.{decimals}f}".replace("-", "−")


def whole(value: float) -> str:
    """An integer with grouped thousands; other numbers with three digits."""
    return f"{value:,}".replace("-", "−") if isinstance(value, int) else digits(value)


def large(value: float) -> str:
    """A count with k, M or G (powers of 1000).

    >>> large(25_557_032), large(5_350_000_000), large(640)
    ('25.6 M', '5.35 G', '640')
    """
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= factor:
            scale = 1e3 if letter == "k" else factor
            return f"{digits(value / scale)} {letter}"
    return whole(value)


def megabytes(value: float) -> str:
    """Bytes in MB (10^6), or in kB (10^3) below a tenth of one.

    >>> megabytes(2_530_000), megabytes(9_188), megabytes(-2_530_000)
    ('2.53 MB', '9.19 kB', '−2.53 MB')
    """
    return f"{digits(value / 1e6)} MB" if abs(value) >= 1e5 else f"{digits(value / 1e3)} kB"


def mebibytes(value: float) -> str:
    """Bytes in MiB (2^20), or in KiB (2^10) where MB would be kB."""
    return f"{digits(value / 2**20)} MiB" if abs(value) >= 1e5 else f"{digits(value / 2**10)} KiB"


def quantity(value: float, unit: str) -> str:
    """A value with its unit; percentages with two decimals.

    >>> quantity(98.519, "%"), quantity(-0.001, "%"), quantity(212.4, "g"), quantity(91324, "B")
    ('98.52 %', '0.00 %', '212.4 g', '91.3 kB')
    """
    if unit == "%":
        said = f"{value:.2f} %".replace("-", "−")
        return said.removeprefix("−") if said == "−0.00 %" else said
    if unit == "B":
        return megabytes(value)
    return f"{digits(value, 4)} {unit}".rstrip()


def difference(value: float, unit: str) -> str:
    """A signed difference; percentages differ in points.

    >>> difference(-0.37, "%"), difference(2.5, "g")
    ('−0.37 points', '+2.500 g')
    """
    sign = "−" if value < 0 else "+" if value > 0 else "±"
    if unit == "%":
        return f"{sign}{abs(value):.2f} points"
    return f"{sign}{quantity(abs(value), unit)}"


_ACRONYMS = {"iou": "IoU", "miou": "mIoU", "map": "mAP", "r2": "R²"} | {
    a.lower(): a for a in ("MAE", "MSE", "RMSE", "MAPE", "AUC", "AUROC", "PSNR", "SSIM", "WER", "CER", "BLEU", "F1")
}  # fmt: skip


def heading(name: str) -> str:
    """The name of a metric as a heading: a plain word with a capital, what is known as an acronym as one, all else as it is.

    >>> heading("accuracy"), heading("mae"), heading("mAP"), heading("error of the angle")
    ('Accuracy', 'MAE', 'mAP', 'Error of the angle')
    """
    return _ACRONYMS.get(name, name[:1].upper() + name[1:] if name.islower() else name)


def interval(low: float | None, high: float | None, unit: str, *, signed: bool = False) -> str:
    """Both ends of an interval; "" where there is none.

    >>> interval(97.1, 99.25, "%"), interval(-0.9, 0.2, "%", signed=True)
    ('97.10 to 99.25 %', '−0.90 to +0.20 points')
    """
    if low is None or high is None:
        return ""
    ends = [difference(v, unit) if signed else quantity(v, unit) for v in (low, high)]
    tail = ends[1].rpartition(" ")[2]
    first = ends[0].removesuffix(f" {tail}") if ends[0].endswith(f" {tail}") else ends[0]
    return f"{first} to {ends[1]}"


def times(value: float) -> str:
    """A factor.

    >>> times(12.345), times(1.5)
    ('× 12.3', '× 1.50')
    """
    return f"× {digits(value)}"
