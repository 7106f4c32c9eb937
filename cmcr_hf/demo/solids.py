"""The kinds of the shapes world: things of random proportions, seen as pictures and felt as clouds of points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from .concepts import COLOURS
from .drawing import Colour, photograph
from .meshes import Mesh, ball, box, extruded, joined, project, revolved, rotation, surface_points, tube


@dataclass(frozen=True)
class Kind:
    """Name one kind of thing: count `nouns`, the plain one first, and the function that builds one."""

    nouns: tuple[str, ...]
    build: Callable[[np.random.Generator], Mesh]


def build(kind: str, generator: np.random.Generator) -> Mesh:
    """Build one thing of a kind, of random proportions: a mesh within the unit ball, y up, its front towards z."""
    return named_kind(kind).build(generator).unit()


def sample_cloud(kind: str, generator: np.random.Generator, points: int = 512) -> np.ndarray:
    """Build one thing of a kind and return a cloud of its surface, see `cloud_of`."""
    return cloud_of(build(kind, generator), generator, points)


def render(kind: str, generator: np.random.Generator, colour: str | None = None) -> Image.Image:
    """Build one thing of a kind and return a picture of it, see `picture_of`."""
    return picture_of(build(kind, generator), generator, colour)


def cloud_of(mesh: Mesh, generator: np.random.Generator, points: int = 512) -> np.ndarray:
    """Scan a thing: `(points, 3)` float32, y up, spread evenly over its surface.

    The thing is turned about the vertical by any angle, tilted a little, 0.6 to 1.2 in radius and off the origin; the
    points have some noise, and of three clouds in ten one side is cut off.
    """
    if points < 1:
        raise ValueError(f"Expected at least one point, got points={points}.")
    share = generator.uniform(0.7, 0.9) if generator.random() < 0.3 else 1.0
    cloud = surface_points(mesh, int(np.ceil(points / share)), generator)
    towards = generator.normal(size=3)
    kept = np.sort(np.argsort(cloud @ towards, kind="stable")[:points])
    cloud = cloud[kept] + generator.normal(0, generator.uniform(0.003, 0.02), (points, 3))
    turn = (
        rotation("x", generator.normal(0, 0.08))
        @ rotation("z", generator.normal(0, 0.08))
        @ rotation("y", generator.uniform(0, 2 * np.pi))
    )
    placed = generator.uniform(0.6, 1.2) * cloud @ turn.T + generator.uniform(-0.2, 0.2, 3)
    return placed.astype(np.float32)


def picture_of(mesh: Mesh, generator: np.random.Generator, colour: str | None = None) -> Image.Image:
    """Photograph a thing from in front and above: an RGB image of 64 x 64 pixels.

    View, light, place, size, background, clutter and pixel noise are random. `colour` is a name of `COLOURS`, drawn
    at random if absent.
    """
    name = colour or list(COLOURS)[int(generator.integers(len(COLOURS)))]

    def paint(image: Image.Image, body: Colour) -> None:
        view = (
            rotation("z", generator.normal(0, 0.07))
            @ rotation("x", generator.uniform(0.25, 0.6))
            @ rotation("y", generator.uniform(-0.6, 0.6))
        )
        seen = mesh.vertices @ view.T
        low, high = seen.min(axis=0), seen.max(axis=0)
        # Framed by what is seen: many things are long and thin, and small in a frame that holds their unit ball.
        seen -= (low + high) / 2
        scale = image.width * generator.uniform(0.75, 0.95) / (high - low)[:2].max()
        x, y = image.width * generator.uniform(0.47, 0.53, 2)
        light = generator.uniform((-0.6, 0.5, 0.5), (0.6, 1.2, 1.2))
        mask, brightness = project(
            replace(mesh, vertices=seen),
            image.width,
            scale=scale,
            centre=(x, y),
            light=light / np.linalg.norm(light),
            ambient=generator.uniform(0.25, 0.45),
        )
        pixels = np.array(image)
        pixels[mask] = np.clip(1.15 * brightness[:, None] * body, 0, 255)
        image.paste(Image.fromarray(pixels))

    return photograph(name, generator, paint, studio=True)


def _aeroplane(random: np.random.Generator) -> Mesh:
    length, radius = random.uniform(1.7, 2.2), random.uniform(0.12, 0.18)
    nose = [(0.0, 0.0), (0.6, 0.06), (1.0, 0.18), (1.0, 0.7), (0.5, 0.92), (0.15, 1.0), (0.0, 1.0)]
    body = revolved([(radius * r, length * h) for r, h in nose], 14).turned("z", np.pi / 2).moved(x=length / 2)
    span, sweep, chord = random.uniform(1.8, 2.4), random.uniform(0.1, 0.5), random.uniform(0.3, 0.45)
    half = np.array([(0.0, 0.0), (-chord, 0.0), (-sweep - chord * 0.75, span / 2), (-sweep - chord * 0.2, span / 2)])
    wings = [extruded(half * (1, side), 0.05).turned("x", np.pi / 2) for side in (-1, 1)]
    tail = [
        extruded(half * (0.6, 0.38 * side), 0.05).turned("x", np.pi / 2).moved(x=-length * 0.36) for side in (-1, 1)
    ]
    fin = extruded(half * (0.75, random.uniform(0.4, 0.5)), 0.05).moved(x=-length * 0.34, y=radius * 0.6)
    return joined(
        body,
        *[wing.moved(x=length * 0.12, y=-radius * 0.3).toned(0.85) for wing in wings],
        *[part.toned(0.85) for part in (*tail, fin)],
    )


def _ball(random: np.random.Generator) -> Mesh:
    mesh = ball(1.0)
    return replace(mesh, vertices=mesh.vertices * (1, random.uniform(0.9, 1.1), 1))


def _bottle(random: np.random.Generator) -> Mesh:
    radius, neck = random.uniform(0.26, 0.36), random.uniform(0.09, 0.13)
    shoulder, top = random.uniform(0.85, 1.1), random.uniform(1.7, 1.95)
    glass = revolved(
        [
            (0.0, 0.0),
            (radius, 0.0),
            (radius, shoulder),
            (radius * 0.85, shoulder + 0.12),
            (neck, shoulder + 0.35),
            (neck, top),
        ]
    )
    cap = revolved([(neck * 1.3, top - 0.12), (neck * 1.3, top + 0.05), (0.0, top + 0.05)]).toned(0.45)
    return joined(glass, cap)


def _box(random: np.random.Generator) -> Mesh:
    return box(*random.uniform(0.75, 1.3, 3)).turned("y", random.uniform(-0.3, 0.3))


def _chair(random: np.random.Generator) -> Mesh:
    width, depth, seat = random.uniform(0.8, 1.0), random.uniform(0.75, 0.95), random.uniform(0.75, 0.95)
    back = random.uniform(0.85, 1.1)
    parts = [box(width, 0.12, depth).moved(y=seat)]
    parts += _legs(width, depth, seat, 0.11)
    if random.random() < 0.5:
        parts.append(box(width, back, 0.1).moved(y=seat + back / 2, z=-depth / 2 + 0.05).toned(0.85))
    else:
        for x in np.linspace(-width / 2 + 0.06, width / 2 - 0.06, int(random.integers(2, 5))):
            parts.append(box(0.11, back, 0.09).moved(x, seat + back / 2, -depth / 2 + 0.05))
        parts.append(box(width, 0.3, 0.1).moved(y=seat + back - 0.15, z=-depth / 2 + 0.05).toned(0.85))
    return joined(*parts)


def _cone(random: np.random.Generator) -> Mesh:
    return revolved([(0.0, 0.0), (1.0, 0.0), (0.0, random.uniform(1.6, 2.6))])


def _cylinder(random: np.random.Generator) -> Mesh:
    height = random.uniform(1.3, 3.0)
    return revolved([(0.0, 0.0), (1.0, 0.0), (1.0, height), (0.0, height)])


def _ladder(random: np.random.Generator) -> Mesh:
    width, height = random.uniform(0.55, 0.8), random.uniform(1.9, 2.4)
    rails = [box(0.1, height, 0.1).moved(x=side * width / 2) for side in (-1, 1)]
    heights = np.linspace(-height / 2 + 0.15, height / 2 - 0.15, int(random.integers(5, 9)))
    rungs = [box(width, 0.08, 0.08).moved(y=y).toned(0.8) for y in heights]
    return joined(*rails, *rungs).turned("x", -random.uniform(0.05, 0.4))


def _lamp(random: np.random.Generator) -> Mesh:
    height, foot = random.uniform(1.5, 2.0), random.uniform(0.35, 0.5)
    wide, narrow, shade = random.uniform(0.5, 0.65), random.uniform(0.2, 0.35), random.uniform(0.45, 0.65)
    stand = revolved([(0.0, 0.0), (foot, 0.0), (foot, 0.07), (0.05, 0.12), (0.05, height)], 14).toned(0.55)
    return joined(stand, revolved([(wide, height - shade), (narrow, height + 0.05)]))


def _mug(random: np.random.Generator) -> Mesh:
    radius, height, taper = random.uniform(0.5, 0.62), random.uniform(1.0, 1.3), random.uniform(0.8, 1.0)
    inside = 0.85 * radius
    cup = revolved([(0.0, 0.0), (radius * taper, 0.0), (radius, height), (inside, height)])
    hollow = revolved([(inside, height), (inside * taper, 0.15), (0.0, 0.15)]).toned(0.7)
    angles = np.linspace(-0.5 * np.pi, 0.5 * np.pi, 10)
    reach, half = random.uniform(0.4, 0.55), random.uniform(0.3, 0.38) * height
    path = np.stack([radius * 0.9 + reach * np.cos(angles), height / 2 + half * np.sin(angles), 0 * angles], axis=1)
    # In view from in front, to the left or to the right.
    side = random.choice([0, np.pi]) + random.uniform(-0.5, 0.5)
    return joined(cup, hollow, tube(path, 0.09, across=(0, 0, 1)).turned("y", side).toned(0.85))


def _pyramid(random: np.random.Generator) -> Mesh:
    mesh = revolved([(0.0, 0.0), (1.0, 0.0), (0.0, random.uniform(0.9, 1.4))], 4)
    return mesh.turned("y", random.uniform(0, np.pi / 2))


def _ring(random: np.random.Generator) -> Mesh:
    angles = np.arange(28) * 2 * np.pi / 28
    path = np.stack([np.cos(angles), 0 * angles, np.sin(angles)], axis=1)
    return tube(path, random.uniform(0.14, 0.3), closed=True).turned("x", random.uniform(0.1, 0.9))


def _snowman(random: np.random.Generator) -> Mesh:
    radii = random.uniform(0.55, 0.65), random.uniform(0.4, 0.47), random.uniform(0.27, 0.32)
    heights = np.cumsum([0.0, 0.8 * (radii[0] + radii[1]), 0.85 * (radii[1] + radii[2])])
    parts = [ball(radius).moved(y=height) for radius, height in zip(radii, heights, strict=True)]
    nose = revolved([(0.07, 0.0), (0.0, 0.32)], 8).turned("x", np.pi / 2)
    parts.append(nose.moved(y=heights[2], z=radii[2] * 0.9).toned(0.6))
    if random.random() < 0.7:
        brim, hat = radii[2] * 1.2, radii[2] * 0.75
        hat_profile = [(0.0, 0.0), (brim, 0.0), (hat, 0.03), (hat, random.uniform(0.25, 0.4)), (0.0, 0.35)]
        parts.append(revolved(hat_profile).moved(y=heights[2] + radii[2] * 0.75).toned(0.35))
    return joined(*parts)


def _spring(random: np.random.Generator) -> Mesh:
    turns, height = random.uniform(3.5, 5.5), random.uniform(1.8, 2.6)
    angles = np.linspace(0, 2 * np.pi * turns, int(14 * turns))
    path = np.stack([0.6 * np.cos(angles), height * (angles / angles[-1] - 0.5), 0.6 * np.sin(angles)], axis=1)
    return tube(path, random.uniform(0.07, 0.11))


def _staircase(random: np.random.Generator) -> Mesh:
    count, width = int(random.integers(3, 6)), random.uniform(0.9, 1.5)
    rise, tread = random.uniform(0.28, 0.4), random.uniform(0.3, 0.45)
    steps = [
        box(tread, rise * (step + 1), width).moved(x=tread * step, y=rise * (step + 1) / 2) for step in range(count)
    ]
    # To climb from the left or from the right, seen from in front.
    return joined(*steps).turned("y", random.choice([0, np.pi]))


def _star(random: np.random.Generator) -> Mesh:
    angles = np.pi / 2 + np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2, random.uniform(0.36, 0.5), 1.0)
    return extruded(np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1), random.uniform(0.2, 0.4))


def _table(random: np.random.Generator) -> Mesh:
    width, depth, height = random.uniform(1.5, 2.1), random.uniform(0.95, 1.3), random.uniform(0.8, 1.05)
    if random.random() < 0.3:
        wide = random.uniform(0.7, 0.9)
        top = revolved([(0.0, 0.0), (wide, 0.0), (wide, 0.12), (0.0, 0.12)]).moved(y=height)
        return joined(top, *_legs(1.15 * wide, 1.15 * wide, height, 0.12))
    return joined(box(width, 0.12, depth).moved(y=height), *_legs(width - 0.1, depth - 0.1, height, 0.12))


def _tree(random: np.random.Generator) -> Mesh:
    trunk, wide = random.uniform(0.35, 0.55), random.uniform(0.6, 0.75)
    parts = [revolved([(0.0, 0.0), (0.12, 0.0), (0.12, trunk + 0.2)], 10).toned(0.5)]
    count = int(random.integers(2, 5))
    for level in range(count):
        radius = wide * (1 - 0.75 * level / count)
        bottom = trunk + 1.4 * level / count
        parts.append(revolved([(0.0, bottom), (radius, bottom), (0.0, bottom + 1.9 / count)], 16))
    return joined(*parts)


def _legs(width: float, depth: float, height: float, thickness: float) -> list[Mesh]:
    return [
        box(thickness, height, thickness)
        .moved(across * (width - thickness) / 2, height / 2, along * (depth - thickness) / 2)
        .toned(0.75)
        for across in (-1, 1)
        for along in (-1, 1)
    ]


KINDS: dict[str, Kind] = {
    "aeroplane": Kind(("aeroplane", "airplane", "jet plane"), _aeroplane),
    "ball": Kind(("ball", "sphere", "globe"), _ball),
    "bottle": Kind(("bottle", "flask", "wine bottle"), _bottle),
    "box": Kind(("box", "cuboid", "crate"), _box),
    "chair": Kind(("chair", "seat", "dining chair"), _chair),
    "cone": Kind(("cone", "round cone", "traffic cone"), _cone),
    "cylinder": Kind(("cylinder", "drum", "canister"), _cylinder),
    "ladder": Kind(("ladder", "leaning ladder", "rung ladder"), _ladder),
    "lamp": Kind(("lamp", "floor lamp", "standing lamp"), _lamp),
    "mug": Kind(("mug", "cup", "coffee mug"), _mug),
    "pyramid": Kind(("pyramid", "square pyramid", "pointed monument"), _pyramid),
    "ring": Kind(("ring", "hoop", "torus"), _ring),
    "snowman": Kind(("snowman", "snow figure", "man of snow"), _snowman),
    "spring": Kind(("spring", "coil", "helix"), _spring),
    "staircase": Kind(("staircase", "stairway", "flight of steps"), _staircase),
    "star": Kind(("star", "five-pointed star", "starlet"), _star),
    "table": Kind(("table", "desk", "dining table"), _table),
    "tree": Kind(("tree", "fir tree", "pine"), _tree),
}


def named_kind(kind: str) -> Kind:
    """Return the kind of this name, or raise ValueError."""
    if kind not in KINDS:
        raise ValueError(f"Unknown kind {kind!r}. Expected one of: {', '.join(KINDS)}.")
    return KINDS[kind]
