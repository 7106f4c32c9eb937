"""Solids of those concepts of the sounds world that have a shape of their own: things that look, sound and stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from PIL import Image

from .meshes import Mesh, ball, box, extruded, joined, revolved, tube
from .solids import cloud_of, picture_of


def build(concept: str, generator: np.random.Generator) -> Mesh:
    """Build one thing of a concept, of random proportions: a mesh within the unit ball, y up, its front towards z."""
    if concept not in BUILDERS:
        raise ValueError(f"No solid of {concept!r}. Expected one of: {', '.join(BUILDERS)}.")
    return BUILDERS[concept](generator).unit()


def sample_cloud(concept: str, generator: np.random.Generator, points: int = 512) -> np.ndarray:
    """Build one thing of a concept and return a cloud of its surface, see `cloud_of`."""
    return cloud_of(build(concept, generator), generator, points)


def render(concept: str, generator: np.random.Generator, colour: str | None = None) -> Image.Image:
    """Build one thing of a concept and return a picture of it, see `picture_of`."""
    return picture_of(build(concept, generator), generator, colour)


def _bell(random: np.random.Generator) -> Mesh:
    mouth, height, waist = random.uniform(0.65, 0.85), random.uniform(1.0, 1.3), random.uniform(0.35, 0.45)
    profile = [(0.0, height), (0.22, 0.97 * height), (waist, 0.75 * height), (0.5, 0.3 * height), (mouth, 0.0)]
    angles = np.arange(10) * 2 * np.pi / 10
    loop = np.stack([0.14 * np.cos(angles), height + 0.12 + 0.14 * np.sin(angles), 0 * angles], axis=1)
    clapper = ball(0.13).moved(y=-0.03).toned(0.5)
    return joined(revolved(profile), clapper, tube(loop, 0.04, across=(0, 0, 1), closed=True).toned(0.6))


def _bird(random: np.random.Generator) -> Mesh:
    length, span = random.uniform(0.75, 0.95), random.uniform(0.8, 1.2)
    body = replace(ball(0.38), vertices=ball(0.38).vertices * (length / 0.38, 1, 1))
    head = ball(random.uniform(0.22, 0.28)).moved(x=length * 0.9, y=0.35)
    beak = revolved([(0.09, 0.0), (0.0, 0.35)], 8).turned("z", -np.pi / 2).moved(x=length * 0.9 + 0.22, y=0.33)
    wing = np.array([(0.35, 0.0), (-0.35, 0.0), (-0.3, span)])
    lift = random.uniform(0.2, 0.8)
    wings = [
        extruded(wing * (1, side), 0.06).turned("x", np.pi / 2).turned("x", -side * lift).moved(y=0.15).toned(0.8)
        for side in (-1, 1)
    ]
    tail = extruded(np.array([(0.0, 0.12), (-0.6, 0.3), (-0.6, -0.3), (0.0, -0.12)]), 0.05)
    return joined(body, head, beak.toned(0.55), *wings, tail.turned("x", np.pi / 2).moved(x=-length * 0.8).toned(0.8))


def _car(random: np.random.Generator) -> Mesh:
    length, width, height = random.uniform(1.9, 2.3), random.uniform(0.8, 0.95), random.uniform(0.35, 0.45)
    back, front = random.uniform(0.3, 0.45) * length, random.uniform(0.15, 0.25) * length
    roof = np.array([(-back, 0.0), (front + 0.2, 0.0), (front, 0.42), (-back + 0.15, 0.42)])
    cabin = extruded(roof, 0.85 * width).moved(y=height / 2).toned(0.75)
    wheel = _disc(random.uniform(0.22, 0.27), 0.16).turned("x", np.pi / 2).toned(0.35)
    wheels = [
        wheel.moved(along * length * 0.31, -height / 2, across * width / 2) for along in (-1, 1) for across in (-1, 1)
    ]
    return joined(box(length, height, width), cabin, *wheels).turned("y", random.choice([0, np.pi]))


def _clock(random: np.random.Generator) -> Mesh:
    face = _disc(1.0, random.uniform(0.3, 0.45)).turned("x", np.pi / 2)
    front = 0.3
    parts = [face]
    for reach, angle in ((0.8, random.uniform(0, 2 * np.pi)), (0.5, random.uniform(0, 2 * np.pi))):
        hand = box(0.1, reach, 0.06).moved(y=reach / 2).turned("z", angle)
        parts.append(hand.moved(z=front).toned(0.35))
    for side in (-1, 1):
        parts.append(ball(0.32).moved(side * 0.6, 1.0, 0).toned(0.8))
        parts.append(box(0.12, 0.45, 0.12).turned("z", side * 0.5).moved(side * 0.65, -1.0, 0).toned(0.55))
    return joined(*parts)


def _dog(random: np.random.Generator) -> Mesh:
    length, height, leg = random.uniform(1.1, 1.5), random.uniform(0.45, 0.55), random.uniform(0.45, 0.6)
    parts = [box(length, height, 0.5).moved(y=leg + height / 2)]
    parts += [
        box(0.16, leg, 0.16).moved(along * (length / 2 - 0.1), leg / 2, across * 0.17).toned(0.8)
        for along in (-1, 1)
        for across in (-1, 1)
    ]
    nose, crown = length / 2 + 0.15, leg + height + 0.25
    parts += [
        box(0.5, 0.45, 0.45).moved(nose, crown),
        box(0.35, 0.22, 0.28).moved(nose + 0.4, crown - 0.1).toned(0.75),
    ]
    parts += [box(0.1, 0.3, 0.14).moved(nose - 0.1, crown + 0.3, side * 0.16).toned(0.6) for side in (-1, 1)]
    tail = box(0.5, 0.1, 0.1).turned("z", random.uniform(0.5, 1.1)).moved(-length / 2 - 0.15, leg + height + 0.15)
    return joined(*parts, tail.toned(0.8)).turned("y", random.choice([0, np.pi]))


def _drum(random: np.random.Generator) -> Mesh:
    height = random.uniform(0.7, 1.1)
    parts = [_disc(1.0, height).moved(y=-height / 2)]
    angles = np.arange(20) * 2 * np.pi / 20
    for y in (0.0, -height):
        rim = np.stack([1.03 * np.cos(angles), 0 * angles + y, 1.03 * np.sin(angles)], axis=1)
        parts.append(tube(rim, 0.07, closed=True).toned(0.6))
    for side in (-1, 1):
        stick = np.stack([np.linspace(0.2, 1.4, 5) * side, np.linspace(0.15, 0.8, 5), np.full(5, 0.3)], axis=1)
        parts += [tube(stick, 0.05, across=(0, 0, 1)).toned(0.75), ball(0.11).moved(*stick[0]).toned(0.45)]
    return joined(*parts)


def _guitar(random: np.random.Generator) -> Mesh:
    lower, upper, depth = random.uniform(0.55, 0.65), random.uniform(0.38, 0.46), random.uniform(0.18, 0.28)
    neck = random.uniform(1.0, 1.3)
    top = lower + 1.6 * upper
    parts = [_disc(radius, depth).turned("x", np.pi / 2).moved(y=y) for radius, y in ((lower, 0.0), (upper, 0.75))]
    hole = _disc(0.2, 0.04).turned("x", np.pi / 2).moved(y=0.4, z=depth / 2 + 0.02).toned(0.3)
    board = box(0.16, neck, 0.1).moved(y=top + neck / 2 - 0.2, z=depth / 2).toned(0.6)
    head = box(0.28, 0.35, 0.09).moved(y=top + neck - 0.1, z=depth / 2).toned(0.5)
    return joined(*parts, hole, board, head).turned("z", random.uniform(-0.5, 0.5))


def _helicopter(random: np.random.Generator) -> Mesh:
    length, blades, blade = random.uniform(0.7, 0.85), int(random.integers(2, 5)), random.uniform(1.1, 1.4)
    cabin = replace(ball(0.45), vertices=ball(0.45).vertices * (length / 0.45, 1, 1))
    boom = box(1.3, 0.16, 0.14).moved(x=-length - 0.5, y=0.12).toned(0.8)
    mast = box(0.1, 0.3, 0.1).moved(y=0.55).toned(0.5)
    start = random.uniform(0, 2 * np.pi)
    rotor = [
        box(blade, 0.05, 0.14).moved(x=blade / 2, y=0.7).turned("y", start + 2 * np.pi * index / blades).toned(0.55)
        for index in range(blades)
    ]
    rear = [box(0.08, 0.6, 0.05).turned("z", angle).moved(-length - 1.1, 0.2, 0.12).toned(0.5) for angle in (0.3, 1.9)]
    skids = [box(1.3, 0.07, 0.07).moved(0.0, -0.6, side * 0.4).toned(0.5) for side in (-1, 1)]
    return joined(cabin, boom, mast, *rotor, *rear, *skids).turned("y", random.choice([0, np.pi]))


def _kettle(random: np.random.Generator) -> Mesh:
    wide, height = random.uniform(0.62, 0.75), random.uniform(0.75, 1.0)
    body = [(0.0, 0.0), (0.9 * wide, 0.0), (wide, 0.3 * height), (0.55 * wide, height), (0.0, 1.03 * height)]
    steps = np.linspace(0, 1, 6)
    spout = np.stack([wide * 0.8 + 0.5 * steps, 0.35 * height + 0.65 * height * steps**1.5, 0 * steps], axis=1)
    angles = np.linspace(0.1 * np.pi, 0.9 * np.pi, 10)
    arch = np.stack([0.75 * wide * np.cos(angles), 0.75 * height + 0.7 * np.sin(angles), 0 * angles], axis=1)
    parts = [
        revolved(body),
        tube(spout, 0.1, across=(0, 0, 1)).toned(0.85),
        tube(arch, 0.06, across=(0, 0, 1)).toned(0.5),
        ball(0.1).moved(y=height + 0.08).toned(0.5),
    ]
    return joined(*parts).turned("y", random.choice([0, np.pi]) + random.uniform(-0.5, 0.5))


def _telephone(random: np.random.Generator) -> Mesh:
    width, depth = random.uniform(1.1, 1.4), random.uniform(0.8, 1.0)
    slope = np.array([(-depth / 2, 0.0), (depth / 2, 0.0), (depth / 2, 0.2), (-depth / 2, 0.75)])
    # The outline lies in depth and height: the low side is the front.
    base = extruded(slope, width).turned("y", -np.pi / 2)
    dial = _disc(0.3, 0.12).turned("x", 0.5).moved(y=0.5, z=0.12).toned(0.5)
    reach = width / 2 + 0.15
    bar = np.stack([np.linspace(-reach, reach, 5), np.full(5, 1.0), np.full(5, -depth / 4)], axis=1)
    ends = [ball(0.2).moved(side * reach, 0.92, -depth / 4).toned(0.65) for side in (-1, 1)]
    return joined(base, dial, tube(bar, 0.1).toned(0.65), *ends)


def _train(random: np.random.Generator) -> Mesh:
    length, radius = random.uniform(1.2, 1.5), random.uniform(0.3, 0.36)
    boiler = _disc(radius, length).turned("z", np.pi / 2).moved(x=length / 2)
    cab = box(0.6, random.uniform(0.95, 1.15), 0.75).moved(x=-length / 2 - 0.1, y=0.2).toned(0.85)
    roof = box(0.75, 0.08, 0.9).moved(x=-length / 2 - 0.1, y=0.8).toned(0.5)
    chimney = revolved([(0.1, 0.0), (0.1, 0.4), (0.18, 0.55)], 12).moved(length * 0.35, radius * 0.8, 0).toned(0.5)
    frame = box(length + 0.9, 0.12, 0.6).moved(x=-0.15, y=-radius).toned(0.5)
    wheel = _disc(0.26, 0.08).turned("x", np.pi / 2).toned(0.4)
    wheels = [
        wheel.moved(along * length * 0.4 - 0.1, -radius - 0.15, side * 0.33)
        for along in (-1, 0, 1)
        for side in (-1, 1)
    ]
    return joined(boiler, cab, roof, chimney, frame, *wheels).turned("y", random.choice([0, np.pi]))


def _windmill(random: np.random.Generator) -> Mesh:
    height, wide, reach = random.uniform(1.5, 1.9), random.uniform(0.42, 0.55), random.uniform(0.8, 1.0)
    tower = revolved([(wide, 0.0), (0.6 * wide, height), (0.0, height + 0.35)], 14)
    start = random.uniform(0, np.pi / 2)
    sails = [
        box(0.24, reach, 0.04)
        .moved(x=0.08, y=reach / 2 + 0.1)
        .turned("z", start + index * np.pi / 2)
        .moved(y=height, z=0.7 * wide)
        .toned(0.65)
        for index in range(4)
    ]
    return joined(tower, ball(0.1).moved(y=height, z=0.7 * wide).toned(0.4), *sails)


def _disc(radius: float, height: float) -> Mesh:
    """Return a closed cylinder about the origin, upright."""
    return revolved([(0.0, -height / 2), (radius, -height / 2), (radius, height / 2), (0.0, height / 2)])


BUILDERS: dict[str, Callable[[np.random.Generator], Mesh]] = {
    "bell": _bell,
    "bird": _bird,
    "car": _car,
    "clock": _clock,
    "dog": _dog,
    "drum": _drum,
    "guitar": _guitar,
    "helicopter": _helicopter,
    "kettle": _kettle,
    "telephone": _telephone,
    "train": _train,
    "windmill": _windmill,
}
