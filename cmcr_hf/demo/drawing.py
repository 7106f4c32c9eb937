"""Draw pictures of the concepts: 64 x 64 pixels, procedural, different at every draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from .concepts import COLOURS, named_concept

IMAGE_SIZE = 64
_SUPERSAMPLING = 2

Colour = tuple[int, int, int]
Point = tuple[float, float]

_INK = (26, 24, 28)
_PAPER = (240, 238, 230)


class _Pen:
    """Draw in the object's coordinates, x right and y down in [-1, 1], through one affine map."""

    def __init__(self, image: Image.Image, generator: np.random.Generator) -> None:
        self.canvas = ImageDraw.Draw(image)
        self.random = generator
        side = image.width
        scale = side * generator.uniform(0.30, 0.46)
        angle = generator.normal(0.0, 0.14)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        shear = np.array([[1.0, generator.normal(0.0, 0.08)], [0.0, 1.0]])
        mirror = generator.choice([-1.0, 1.0])
        stretch = np.diag([mirror * generator.uniform(0.88, 1.12), generator.uniform(0.88, 1.12)])
        self.matrix = scale * turn @ shear @ stretch
        self.centre = side / 2 + generator.uniform(-0.13, 0.13, size=2) * side
        self.outline_width = int(generator.integers(1, 4))

    def _map(self, points: Sequence[Point] | np.ndarray) -> list[Point]:
        return [(x, y) for x, y in (np.asarray(points, dtype=float) @ self.matrix.T + self.centre).tolist()]

    def polygon(self, points: Sequence[Point] | np.ndarray, fill: Colour, *, outlined: bool = True) -> None:
        if outlined:
            self.canvas.polygon(self._map(points), fill=fill, outline=_INK, width=self.outline_width)
        else:
            self.canvas.polygon(self._map(points), fill=fill)

    def box(self, left: float, top: float, right: float, bottom: float, fill: Colour) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], fill)

    def oval(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: Colour,
        *,
        tilt: float = 0.0,
        outlined: bool = True,
    ) -> None:
        """Draw an ellipse of these half axes, turned by `tilt` radians."""
        ring = _RING * (width, height)
        turn = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
        self.polygon(ring @ turn + (x, y), fill, outlined=outlined)

    def line(self, points: Sequence[Point] | np.ndarray, fill: Colour, width: float) -> None:
        """Draw a line `width` units of the object wide."""
        pixels = max(1, round(width * float(np.sqrt(abs(np.linalg.det(self.matrix))))))
        self.canvas.line(self._map(points), fill=fill, width=pixels, joint="curve")


_RING = np.stack([np.cos(np.linspace(0, 2 * np.pi, 29)[:-1]), np.sin(np.linspace(0, 2 * np.pi, 29)[:-1])], axis=1)


def _arc(x: float, y: float, width: float, height: float, start: float, stop: float) -> np.ndarray:
    """Return 14 points on an ellipse between two angles in radians; y is down."""
    angles = np.linspace(start, stop, 14)
    return np.stack([x + width * np.cos(angles), y + height * np.sin(angles)], axis=1)


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (int(np.clip(channel * factor + 12 * (factor > 1), 0, 255)) for channel in colour)
    return red, green, blue


def _jitter(colour: Colour, generator: np.random.Generator, spread: float = 14.0) -> Colour:
    red, green, blue = np.clip(np.array(colour) + generator.normal(0, spread, 3), 0, 255).astype(int).tolist()
    return red, green, blue


def draw(concept: str, generator: np.random.Generator, *, colour: str | None = None) -> Image.Image:
    """Draw one picture of a concept.

    Place, scale, rotation, shape, background, clutter and pixel noise are random. `colour` is a name of `COLOURS` for
    the object's body, drawn from the concept's own colours if absent.

    Returns an RGB image of 64 x 64 pixels.
    """
    words = named_concept(concept)
    name = colour or words.colours[int(generator.integers(len(words.colours)))]
    return photograph(name, generator, lambda image, body: _DRAWINGS[concept](_Pen(image, generator), body))


def photograph(
    colour: str,
    generator: np.random.Generator,
    paint: Callable[[Image.Image, Colour], None],
    *,
    studio: bool = False,
) -> Image.Image:
    """Take a picture of what `paint` puts into an image in a body colour: an RGB image of 64 x 64 pixels.

    Background, clutter behind and in front, pixel noise and the tint of `colour`, a name of `COLOURS`, are random.
    `paint` changes an image of twice the size. In a `studio`, the background is a pale grey that darkens downwards,
    there is no clutter behind and seldom a speck in front, and less noise.
    """
    if colour not in COLOURS:
        raise ValueError(f"Unknown colour {colour!r}. Expected one of: {', '.join(COLOURS)}.")
    body = _jitter(COLOURS[colour], generator)
    image = _backdrop(generator) if studio else _background(generator)
    if not studio:
        _clutter(image, generator, int(generator.integers(0, 5)), 0.05, 0.16)
    paint(image, body)
    _clutter(image, generator, int(generator.integers(0, 3)) // (2 if studio else 1), 0.02, 0.06)
    small = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    noise = generator.normal(0.0, generator.uniform(0.0, 5.0 if studio else 12.0), (IMAGE_SIZE, IMAGE_SIZE, 3))
    return Image.fromarray(np.clip(np.asarray(small) + noise, 0, 255).astype(np.uint8))


def _background(generator: np.random.Generator) -> Image.Image:
    side = IMAGE_SIZE * _SUPERSAMPLING
    top = generator.uniform(70, 235, 3)
    kind = generator.integers(3)
    if kind == 0:
        bottom = top
        blend = np.zeros(side)
    elif kind == 1:
        bottom = generator.uniform(70, 235, 3)
        blend = np.linspace(0, 1, side)
    else:
        bottom = generator.uniform(60, 200, 3)
        blend = (np.arange(side) > side * generator.uniform(0.5, 0.85)).astype(float)
    rows = top + blend[:, None] * (bottom - top)
    pixels = np.broadcast_to(rows[:, None, :], (side, side, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    return image.transpose(Image.Transpose.ROTATE_90) if kind == 1 and generator.random() < 0.5 else image


def _backdrop(generator: np.random.Generator) -> Image.Image:
    side = IMAGE_SIZE * _SUPERSAMPLING
    top = generator.uniform(200, 245) + generator.normal(0, 4, 3)
    rows = top - np.linspace(0, generator.uniform(0, 40), side)[:, None]
    return Image.fromarray(np.broadcast_to(rows[:, None, :], (side, side, 3)).clip(0, 255).astype(np.uint8))


def _clutter(image: Image.Image, generator: np.random.Generator, count: int, smallest: float, largest: float) -> None:
    canvas = ImageDraw.Draw(image)
    for _ in range(count):
        x, y = generator.uniform(0, image.width, 2)
        radius = generator.uniform(smallest, largest) * image.width
        red, green, blue = generator.integers(0, 256, 3).tolist()
        fill = (red, green, blue)
        kind = generator.integers(4)
        if kind == 0:
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        elif kind == 1:
            canvas.rectangle((x - radius, y - radius / 2, x + radius, y + radius / 2), fill=fill)
        elif kind == 2:
            canvas.regular_polygon((x, y, radius), 3, rotation=int(generator.integers(360)), fill=fill)
        else:
            canvas.line((x - radius, y, x + radius, y + radius), fill=fill, width=3)


def _bee(pen: _Pen, body: Colour) -> None:
    length = pen.random.uniform(0.68, 0.85)
    lift = pen.random.uniform(0.45, 0.65)
    for x, tilt in ((-0.25, -0.35), (0.2, 0.3)):
        pen.oval(x, -lift, 0.24, 0.42, (214, 228, 240), tilt=tilt)
    pen.polygon([(-length + 0.08, -0.14), (-length - 0.22, 0.05), (-length + 0.08, 0.2)], _INK)
    pen.oval(0, 0.05, length, 0.45, body)
    for x in np.linspace(-0.5, 0.25, int(pen.random.integers(3, 5))):
        half = 0.45 * np.sqrt(1 - (x / length) ** 2)
        pen.line([(x, 0.05 - half), (x + 0.06, 0.05), (x, 0.05 + half)], _INK, 0.13)
    pen.oval(length - 0.08, 0.0, 0.25, 0.28, (52, 42, 36))
    pen.oval(length + 0.02, -0.08, 0.07, 0.08, _PAPER)
    for reach in (0.0, 0.2):
        pen.line([(length - 0.05, -0.25), (length + reach, -0.55)], _INK, 0.06)


def _bell(pen: _Pen, body: Colour) -> None:
    waist = pen.random.uniform(0.36, 0.5)
    flare = pen.random.uniform(0.66, 0.86)
    pen.oval(0, -0.78, 0.16, 0.16, _shade(body, 0.7))
    pen.oval(pen.random.uniform(-0.15, 0.15), 0.62, 0.18, 0.18, _shade(body, 0.55))
    half = [(0.12, -0.7), (waist * 0.75, -0.55), (waist, -0.2), (waist + 0.08, 0.2), (flare, 0.48), (flare, 0.6)]
    pen.polygon([*half, *[(-x, y) for x, y in reversed(half)]], body)
    pen.line([(-waist - 0.06, 0.2), (waist + 0.06, 0.2)], _shade(body, 0.6), 0.08)
    pen.line([(-waist * 0.5, -0.35), (-waist * 0.65, 0.1)], _shade(body, 1.4), 0.1)


def _bird(pen: _Pen, body: Colour) -> None:
    plump = pen.random.uniform(0.34, 0.46)
    for x in (-0.1, 0.12):
        pen.line([(x, 0.35), (x, 0.85), (x + 0.14, 0.88)], (120, 80, 30), 0.07)
    tail = pen.random.uniform(-0.35, 0.25)
    pen.polygon([(-0.45, 0.0), (-1.05, tail), (-0.95, 0.3), (-0.4, 0.25)], _shade(body, 0.75))
    pen.oval(0, 0.1, 0.62, plump, body, tilt=-0.2)
    pen.polygon([(0.72, -0.45), (1.12, -0.32), (0.72, -0.2)], (236, 160, 40))
    pen.oval(0.52, -0.35, 0.3, 0.28, body)
    pen.oval(0.6, -0.42, 0.09, 0.09, _PAPER)
    pen.oval(0.62, -0.42, 0.045, 0.045, _INK)
    pen.oval(-0.12, 0.08, 0.36, 0.2, _shade(body, 0.65), tilt=pen.random.uniform(0.0, 0.7))


def _car(pen: _Pen, body: Colour) -> None:
    roof = pen.random.uniform(-0.55, -0.35)
    back = pen.random.uniform(-0.72, -0.5)
    pen.polygon([(back, 0.0), (back + 0.2, roof), (0.25, roof), (0.52, 0.0)], body)
    glass = (190, 220, 240)
    pen.polygon([(back + 0.12, -0.03), (back + 0.26, roof + 0.1), (-0.14, roof + 0.1), (-0.14, -0.03)], glass)
    pen.polygon([(-0.04, -0.03), (-0.04, roof + 0.1), (0.2, roof + 0.1), (0.4, -0.03)], glass)
    pen.polygon([(-0.95, 0.38), (-0.95, 0.02), (0.55, -0.02), (0.98, 0.1), (1.0, 0.38)], body)
    pen.oval(0.9, 0.17, 0.08, 0.08, (250, 240, 160))
    for x in (-0.55, 0.55):
        pen.oval(x, 0.4, 0.24, 0.24, (36, 36, 40))
        pen.oval(x, 0.4, 0.1, 0.1, (190, 190, 190))


def _clock(pen: _Pen, body: Colour) -> None:
    for x in (-0.5, 0.5):
        pen.line([(x * 0.8, 0.6), (x * 1.2, 0.95)], _INK, 0.12)
    pen.oval(0, 0, 0.85, 0.85, body)
    face = pen.random.uniform(0.6, 0.72)
    pen.oval(0, 0, face, face, _PAPER)
    for angle in np.arange(12) * np.pi / 6:
        direction = np.array([np.cos(angle), np.sin(angle)])
        pen.line([tuple(direction * face * 0.8), tuple(direction * face * 0.95)], _INK, 0.06)
    for reach, width in ((0.5, 0.12), (0.78, 0.08)):
        angle = pen.random.uniform(0, 2 * np.pi)
        pen.line([(0, 0), (reach * face * np.cos(angle), reach * face * np.sin(angle))], _INK, width)


def _dog(pen: _Pen, body: Colour) -> None:
    wag = pen.random.uniform(-0.75, -0.3)
    dark = _shade(body, 0.6)
    pen.line([(-0.6, -0.05), (-0.85, -0.2), (-0.95, wag)], body, 0.14)
    for x in (-0.52, -0.3, 0.2, 0.42):
        pen.box(x - 0.08, 0.2, x + 0.08, 0.85, body)
    pen.oval(-0.05, 0.1, 0.66, pen.random.uniform(0.26, 0.34), body)
    pen.oval(0.55, -0.35, 0.34, 0.3, body)
    pen.oval(0.84, -0.25, 0.24, 0.15, _shade(body, 1.15))
    pen.oval(1.02, -0.3, 0.08, 0.07, _INK)
    pen.oval(0.62, -0.45, 0.06, 0.06, _INK)
    pen.oval(0.34, -0.28, 0.13, pen.random.uniform(0.28, 0.38), dark, tilt=pen.random.uniform(-0.1, 0.4))


def _drum(pen: _Pen, body: Colour) -> None:
    top = pen.random.uniform(-0.4, -0.2)
    bottom = pen.random.uniform(0.4, 0.65)
    pen.oval(0, bottom, 0.72, 0.26, _shade(body, 0.8))
    pen.box(-0.72, top, 0.72, bottom, body)
    pen.oval(0, bottom, 0.7, 0.24, body, outlined=False)
    count = int(pen.random.integers(4, 7)) * 2 + 1
    zigzag = [(x, top + 0.25 if i % 2 else bottom + 0.1) for i, x in enumerate(np.linspace(-0.7, 0.7, count))]
    pen.line(zigzag, _PAPER, 0.06)
    pen.oval(0, top, 0.72, 0.26, _PAPER)
    for x in (-1.0, 1.0):
        start, stop = (x * pen.random.uniform(0.8, 1.0), top - 0.65), (x * 0.15, top - 0.02)
        pen.line([start, stop], (150, 100, 50), 0.09)
        pen.oval(*stop, 0.09, 0.08, (210, 170, 110))


def _fire(pen: _Pen, body: Colour) -> None:
    for y, slope in ((0.72, 0.14), (0.72, -0.14)):
        pen.line([(-0.8, y - slope), (0.8, y + slope)], (104, 64, 34), 0.2)

    def flame(size: float, colour: Colour) -> None:
        tips = pen.random.uniform(0.8, 1.15, 3)
        points = np.array(
            [
                (-0.3, 0.65),
                (-0.62, 0.2),
                (-0.5, -0.45 * tips[0]),
                (-0.25, -0.1),
                (0.02, -1.0 * tips[1]),
                (0.25, -0.15),
                (0.48, -0.5 * tips[2]),
                (0.64, 0.2),
                (0.32, 0.65),
            ]
        )
        points = (points - (0, 0.65)) * size + (0, 0.65) + pen.random.normal(0, 0.03, points.shape)
        pen.polygon(points, colour, outlined=size == 1.0)

    flame(1.0, body)
    flame(0.68, _shade(body, 1.25))
    flame(0.4, (252, 244, 190))


def _frog(pen: _Pen, body: Colour) -> None:
    wide = pen.random.uniform(0.72, 0.88)
    for x in (-1.0, 1.0):
        pen.oval(x * wide * 0.85, 0.52, 0.3, 0.2, _shade(body, 0.75), tilt=-0.5 * x)
        pen.oval(x * 0.4, 0.72, 0.24, 0.1, _shade(body, 0.85))
    pen.oval(0, 0.15, wide, 0.56, body)
    for x in (-0.42, 0.42):
        pen.oval(x, -0.42, 0.25, 0.25, body)
        pen.oval(x, -0.44, 0.16, 0.16, _PAPER)
        pen.oval(x + pen.random.uniform(-0.06, 0.06), -0.44, 0.08, 0.09, _INK)
    smile = pen.random.uniform(0.15, 0.3)
    pen.line(_arc(0, 0.08, wide * 0.7, smile, 0.1, np.pi - 0.1), _INK, 0.08)
    pen.oval(0, 0.5, 0.35, 0.16, _shade(body, 1.3), outlined=False)


def _guitar(pen: _Pen, body: Colour) -> None:
    lower = pen.random.uniform(0.44, 0.52)
    lean = pen.random.uniform(-0.5, 0.5)
    turn = np.array([[np.cos(lean), -np.sin(lean)], [np.sin(lean), np.cos(lean)]])
    pen.matrix = pen.matrix @ turn
    pen.oval(0, 0.55, lower, 0.42, body)
    pen.oval(0, 0.05, lower * 0.76, 0.32, body)
    pen.oval(0, 0.3, lower * 0.6, 0.3, body, outlined=False)
    pen.oval(0, 0.16, 0.15, 0.15, _INK)
    pen.box(-0.09, -0.95, 0.09, 0.1, (92, 58, 36))
    pen.box(-0.15, -1.2, 0.15, -0.92, _shade(body, 0.6))
    pen.box(-0.2, 0.6, 0.2, 0.68, (60, 40, 30))
    for x in (-0.04, 0.04):
        pen.line([(x, -1.0), (x, 0.62)], _PAPER, 0.025)


def _helicopter(pen: _Pen, body: Colour) -> None:
    pen.polygon([(-0.2, -0.12), (-1.05, -0.22), (-1.05, -0.08), (-0.2, 0.2)], body)
    pen.polygon([(-0.95, -0.2), (-1.15, -0.5), (-1.0, -0.5), (-0.82, -0.18)], _shade(body, 0.7))
    pen.line([(0.15, -0.2), (0.15, -0.55)], _INK, 0.09)
    tip = pen.random.uniform(0.0, 0.1)
    span = pen.random.uniform(0.85, 1.1)
    pen.line([(0.15 - span, -0.55 - tip), (0.15 + span, -0.55 + tip)], _INK, 0.09)
    pen.oval(0.2, 0.05, 0.58, pen.random.uniform(0.32, 0.4), body)
    pen.polygon([*_arc(0.2, 0.05, 0.5, 0.3, -1.25, 0.1), (0.35, 0.08)], (190, 222, 242))
    for x in (-0.05, 0.45):
        pen.line([(x, 0.35), (x, 0.62)], _INK, 0.06)
    pen.line([(-0.4, 0.62), (0.75, 0.62), (0.85, 0.54)], _INK, 0.08)


def _kettle(pen: _Pen, body: Colour) -> None:
    wide = pen.random.uniform(0.52, 0.64)
    pen.line(_arc(0, -0.3, wide * 0.8, pen.random.uniform(0.5, 0.65), np.pi, 2 * np.pi), _INK, 0.12)
    pen.polygon([(0.3, 0.35), (0.4, 0.05), (0.85, -0.4), (1.05, -0.3), (0.62, 0.5)], body)
    left = [(-wide, 0.68), (-wide - 0.06, 0.3), (-wide * 0.6, -0.32)]
    pen.polygon([*left, *[(-x, y) for x, y in reversed(left)]], body)
    pen.oval(0, -0.33, wide * 0.55, 0.1, _shade(body, 0.75))
    pen.oval(0, -0.46, 0.1, 0.09, _INK)
    pen.line([(-wide * 0.75, 0.45), (-wide * 0.55, 0.0)], _shade(body, 1.4), 0.1)
    for x in (0.95, 1.12):
        wave = [(x + 0.06 * np.sin(4 * y + x), -0.5 - y) for y in np.linspace(0, 0.45, 6)]
        pen.line(wave, _PAPER, 0.07)


def _rain(pen: _Pen, body: Colour) -> None:
    slant = pen.random.uniform(0.05, 0.3)
    water = _jitter((70, 130, 220), pen.random)
    for row, y in enumerate((0.1, 0.45, 0.78)):
        for x in np.arange(-0.7, 0.8, 0.34) + 0.15 * (row % 2) + pen.random.normal(0, 0.03):
            pen.line([(x, y), (x - slant, y + 0.24)], water, 0.08)
    puffs = ((-0.5, -0.25, 0.36), (0.0, -0.45, 0.45), (0.48, -0.25, 0.38))
    for outlined in (True, False):
        for x, y, radius in puffs:
            size = radius * (1.0 if outlined else 0.9)
            pen.oval(x, y, size, size * 0.85, body, outlined=outlined)
    pen.oval(0, -0.12, 0.72, 0.22, body, outlined=False)


def _sea(pen: _Pen, body: Colour) -> None:
    x = np.linspace(-4, 4, 90)
    period = pen.random.uniform(0.75, 1.2)
    level = pen.random.uniform(-0.45, -0.1)
    for row in range(4):
        phase = pen.random.uniform(0, 2 * np.pi)
        # A power of a half sine has round troughs and sharp crests, as breakers have.
        crest = level + 0.4 * row - pen.random.uniform(0.22, 0.4) * (1 - np.abs(np.sin(x * np.pi / period + phase)))
        surface = np.stack([x, crest], axis=1)
        water = np.concatenate([surface, [(4.0, 5.0), (-4.0, 5.0)]])
        pen.polygon(water, _shade(body, 1.1 - 0.13 * row), outlined=False)
        pen.line(surface, _PAPER, 0.09)


def _siren(pen: _Pen, body: Colour) -> None:
    wide = pen.random.uniform(0.42, 0.55)
    high = pen.random.uniform(0.65, 0.85)
    glow = _shade(body, 1.35)
    for angle in np.linspace(np.pi + 0.15, 2 * np.pi - 0.15, int(pen.random.integers(5, 8))):
        inner, outer = np.array([wide + 0.15, high + 0.1]), np.array([wide + 0.45, high + 0.42])
        direction = np.array([np.cos(angle), np.sin(angle)])
        pen.line([tuple(direction * inner + (0, 0.35)), tuple(direction * outer + (0, 0.35))], glow, 0.12)
    pen.polygon([*_arc(0, 0.0, wide, high - 0.35, np.pi, 2 * np.pi), (wide, 0.4), (-wide, 0.4)], body)
    pen.polygon([(-0.12, 0.4), (-0.12, 0.0), (0.12, 0.0), (0.12, 0.4)], _PAPER)
    pen.box(-wide - 0.15, 0.38, wide + 0.15, 0.68, (58, 58, 66))


def _telephone(pen: _Pen, body: Colour) -> None:
    top = pen.random.uniform(0.38, 0.5)
    pen.polygon([(-top, -0.3), (top, -0.3), (0.8, 0.65), (-0.8, 0.65)], body)
    pen.oval(0, 0.2, 0.34, 0.32, _PAPER)
    for angle in np.arange(0, 2 * np.pi, np.pi / 4):
        pen.oval(0.22 * np.cos(angle), 0.2 + 0.21 * np.sin(angle), 0.06, 0.06, _INK, outlined=False)
    sag = pen.random.uniform(0.12, 0.28)
    handset = _shade(body, 0.72)
    pen.line(_arc(0, -0.4, 0.75, sag, np.pi, 2 * np.pi), _INK, 0.3)
    pen.line(_arc(0, -0.4, 0.75, sag, np.pi, 2 * np.pi), handset, 0.2)
    for x in (-0.78, 0.78):
        pen.oval(x, -0.32, 0.22, 0.2, handset)


def _train(pen: _Pen, body: Colour) -> None:
    front = pen.random.uniform(0.75, 0.92)
    for index in range(int(pen.random.integers(2, 4))):
        radius = 0.13 + 0.05 * index
        pen.oval(0.55 - 0.32 * index, -0.78 - 0.08 * index, radius * 1.2, radius, (224, 224, 226))
    pen.polygon([(0.42, -0.2), (0.36, -0.6), (0.72, -0.6), (0.66, -0.2)], _INK)
    pen.box(-0.2, -0.25, front, 0.3, body)
    pen.box(-0.92, -0.62, -0.2, 0.3, _shade(body, 0.75))
    pen.box(-0.75, -0.46, -0.38, -0.12, (196, 224, 240))
    pen.box(-1.0, 0.26, front + 0.1, 0.42, (60, 58, 62))
    pen.polygon([(front, 0.3), (front + 0.28, 0.68), (front - 0.05, 0.68)], (84, 80, 84))
    for x in np.linspace(-0.7, 0.6, int(pen.random.integers(3, 5))):
        pen.oval(x, 0.52, 0.2, 0.2, (150, 40, 40))
        pen.oval(x, 0.52, 0.07, 0.07, _PAPER)


def _windmill(pen: _Pen, body: Colour) -> None:
    width = pen.random.uniform(0.26, 0.36)
    pen.polygon([(-width * 0.65, -0.2), (width * 0.65, -0.2), (width * 1.25, 1.0), (-width * 1.25, 1.0)], body)
    pen.polygon([(-width * 0.8, -0.18), (0, -0.55), (width * 0.8, -0.18)], _shade(body, 0.6))
    pen.box(-0.1, 0.68, 0.1, 1.0, (84, 54, 36))
    start = pen.random.uniform(0, np.pi / 2)
    reach = pen.random.uniform(0.78, 0.95)
    for angle in start + np.arange(4) * np.pi / 2:
        along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
        hub = np.array([0.0, -0.25])
        root, end = hub + along * 0.18, hub + along * reach
        pen.polygon(np.array([root, end, end + across * 0.24, root + across * 0.2]), _PAPER)
        pen.line([tuple(hub), tuple(hub + along * reach)], (80, 56, 40), 0.06)
    pen.oval(0, -0.25, 0.08, 0.08, _INK)


_DRAWINGS: dict[str, Callable[[_Pen, Colour], None]] = {
    "bee": _bee,
    "bell": _bell,
    "bird": _bird,
    "car": _car,
    "clock": _clock,
    "dog": _dog,
    "drum": _drum,
    "fire": _fire,
    "frog": _frog,
    "guitar": _guitar,
    "helicopter": _helicopter,
    "kettle": _kettle,
    "rain": _rain,
    "sea": _sea,
    "siren": _siren,
    "telephone": _telephone,
    "train": _train,
    "windmill": _windmill,
}
