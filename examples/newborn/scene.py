"""A synthetic twin of newborn anthropometry: pictures of a body beside a board of known size, with its weight in grams.

What is in a picture comes from a seed alone, so the data need no download and can be made again. A body has a length,
widths, a head and limbs; its weight is its volume times its density, plus noise that no picture shows:

    weight = 1.03 g/cm³ × volume(length, widths, head, limbs) + N(0, 80 g)

so the best possible predictor is off by 80 × √(2/π) = 63.8 g on average, whatever its size: `IRREDUCIBLE_MAE`. A camera looks down
from a distance that differs from picture to picture; only the board (40 cm × 4 cm, always) tells how large the body is. Light, cloth,
skin, pose and the place in the picture differ as well. Lengths are cm until the camera turns them into pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
DENSITY = 1.03
"""g/cm³, of a body."""
NOISE = 80.0
"""Standard deviation of what no picture shows, g."""
IRREDUCIBLE_MAE = NOISE * math.sqrt(2 / math.pi)
"""Mean absolute error of a predictor that knows every dimension of the body, g."""
BOARD = (40.0, 4.0)
"""Length and width of the measuring board beside the body, cm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """One newborn, cm."""

    length: float
    head: float
    """Diameter."""
    trunk: tuple[float, float, float]
    """Length, width and depth of an ellipsoid; the depth is not in the picture, but goes with the width."""
    arm: tuple[float, float]
    """Length and thickness of a cylinder with round ends."""
    leg: tuple[float, float]

    @property
    def volume(self) -> float:
        """cm³: a sphere, an ellipsoid and four capsules."""
        length, width, depth = self.trunk
        limbs = sum(2 * math.pi / 4 * t**2 * (long - t / 3) for long, t in (self.arm, self.leg))
        return math.pi / 6 * (self.head**3 + length * width * depth) + limbs

    @property
    def expected_weight(self) -> float:
        """g, without what no picture shows."""
        return DENSITY * self.volume


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """How a picture was taken."""

    across: float
    """What it shows from side to side, cm: it grows with the camera's distance."""
    light: float
    """In the middle; 1 leaves the colours as they are."""


def body(random: np.random.Generator) -> Body:
    """One of a population: 49 ± 2.2 cm, and fuller or thinner by 8 % at the same length."""
    length = float(np.clip(random.normal(49, 2.2), 42, 56))
    full = float(np.exp(random.normal(0, 0.08)))
    width = 0.25 * length * full * float(np.exp(random.normal(0, 0.03)))
    return Body(
        length=length,
        head=float(random.normal(0.224, 0.006)) * length,
        trunk=(0.45 * length, width, 0.8 * width),
        arm=(0.33 * length, 0.070 * length * full),
        leg=(0.37 * length, 0.094 * length * full),
    )


def weight_of(some: Body, random: np.random.Generator) -> float:
    """What the scales say, g."""
    return some.expected_weight + float(random.normal(0, NOISE))


def picture(some: Body, size: int, random: np.random.Generator) -> tuple[NDArray[np.uint8], View]:
    """[size, size, 3], the body and the board on a cloth, from above; and how it was taken."""
    across = random.uniform(66, 84)
    scale = size / across  # pixels per cm
    turn, middle = random.uniform(-0.3, 0.3), size / 2 + random.uniform(-0.03, 0.03, 2) * size
    y, x = np.mgrid[0:size, 0:size].astype(np.float64)
    x, y = (x - middle[0]) / scale, (y - middle[1]) / scale  # cm from the navel
    u, v = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)  # v runs down the body
    skin = np.array([0.86, 0.62, 0.50]) * random.uniform(0.55, 1.1)
    cloth = np.array([random.uniform(0.2, 0.6), random.uniform(0.4, 0.8), random.uniform(0.5, 0.95)])
    image = np.broadcast_to(cloth, (size, size, 3)) * (1 + 0.06 * random.normal(size=(size, size, 1)))
    image = _board(image, x, y, scale, random)
    for cover in _parts(some, u, v, random):
        edge = np.clip(cover * scale + 0.5, 0, 1)[..., None]  # half a pixel of soft edge
        shade = np.clip(0.8 + 0.2 * np.minimum(cover, 3) / 3, 0, 1)[..., None]
        image = image * (1 - edge) + skin * shade * edge
    slope = random.normal(0, 0.12, 2)
    light = random.uniform(0.75, 1.2)
    shine = light * (1 + slope[0] * x / 40 + slope[1] * y / 40)
    image = image * shine[..., None] + random.normal(0, 0.02, image.shape)
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8), View(across=across, light=light)


def _parts(some: Body, u: Floats, v: Floats, random: np.random.Generator) -> list[Floats]:
    """How far inside each part every pixel lies, cm; negative outside."""
    long, width, _ = some.trunk
    top = -long / 2
    parts = [_capsule(u, v, (s * 0.4 * width, top + 2.0), random.uniform(0.2, 1.3) * s, *some.arm) for s in (-1, 1)]
    parts += [_capsule(u, v, (s * 0.25 * width, -top - 1.5), random.uniform(0.0, 0.5) * s, *some.leg) for s in (-1, 1)]
    radius = np.sqrt((u / (width / 2)) ** 2 + (v / (long / 2)) ** 2)
    parts.append((1 - radius) * width / 2)
    parts.append(some.head / 2 - np.hypot(u, v - (top - 0.42 * some.head)))
    return parts


def _capsule(u: Floats, v: Floats, start: tuple[float, float], angle: float, long: float, thick: float) -> Floats:
    """A cylinder with round ends from `start`, its axis `angle` away from straight down."""
    reach = long - thick
    along = (u - start[0]) * math.sin(angle) + (v - start[1]) * math.cos(angle)
    at = np.clip(along, 0, reach)
    inside: Floats = thick / 2 - np.hypot(u - start[0] - at * math.sin(angle), v - start[1] - at * math.cos(angle))
    return inside


def _board(image: Floats, x: Floats, y: Floats, scale: float, random: np.random.Generator) -> Floats:
    """A white board with a dark line every 5 cm, left or right of the body."""
    side, turn = random.choice((-1, 1)), random.uniform(-0.08, 0.08)
    x, y = x - side * random.uniform(21, 24), y - random.uniform(-6, 6)
    across, along = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    inside = np.minimum(BOARD[1] / 2 - np.abs(across), BOARD[0] / 2 - np.abs(along))
    edge = np.clip(inside * scale + 0.5, 0, 1)[..., None]
    dark = (np.abs((along / 5 + 0.5) % 1 - 0.5) < 0.1)[..., None]
    return image * (1 - edge) + np.where(dark, 0.15, 0.95) * edge


def scenes(count: int, size: int, seed: int) -> tuple[NDArray[np.uint8], Floats, Floats, Floats, Floats]:
    """(pictures [count, size, size, 3], weights in g, weights without their noise in g, across in cm, light) of as many newborns.

    Each newborn has a stream of random numbers of its own: the first thousand of two thousand are the same thousand.
    """
    streams = [np.random.default_rng([seed, i]) for i in range(count)]
    bodies = [body(r) for r in streams]
    weights = np.array([weight_of(b, r) for b, r in zip(bodies, streams, strict=True)])
    taken = [picture(b, size, r) for b, r in zip(bodies, streams, strict=True)]
    return (
        np.stack([image for image, _ in taken]), weights, np.array([b.expected_weight for b in bodies]),
        np.array([view.across for _, view in taken]), np.array([view.light for _, view in taken]),
    )  # fmt: skip
