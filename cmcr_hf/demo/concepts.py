"""The concepts of the synthetic world: things that have a look and a sound."""

from __future__ import annotations

from dataclasses import dataclass

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (208, 44, 40),
    "orange": (238, 132, 36),
    "yellow": (240, 206, 60),
    "green": (66, 156, 70),
    "blue": (52, 98, 204),
    "purple": (132, 66, 172),
    "pink": (238, 132, 176),
    "brown": (134, 86, 50),
    "grey": (142, 144, 150),
    "white": (236, 236, 230),
    "black": (44, 44, 50),
}


@dataclass(frozen=True)
class Concept:
    """Name one thing, the words said of it and the colours it is drawn in.

    `nouns` are count nouns, the plain one first. `verbs` finish "a bell ..." in the third person; `noises` name the
    sound ("the ringing of a bell").
    """

    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    noises: tuple[str, ...]
    colours: tuple[str, ...]


_PAINTED = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "grey", "white", "black")

CONCEPTS: dict[str, Concept] = {
    "bee": Concept(
        ("bee", "bumblebee", "honeybee"),
        ("buzzes", "hums", "drones"),
        ("buzzing", "humming", "droning"),
        ("yellow", "orange", "brown", "white"),
    ),
    "bell": Concept(
        ("bell", "church bell", "hand bell"),
        ("rings", "chimes", "tolls"),
        ("ringing", "chiming", "tolling"),
        _PAINTED,
    ),
    "bird": Concept(
        ("bird", "songbird", "sparrow"),
        ("chirps", "sings", "tweets"),
        ("chirping", "song", "tweeting"),
        _PAINTED,
    ),
    "car": Concept(
        ("car", "motor car", "automobile"),
        ("revs its engine", "idles", "drives off"),
        ("engine", "revving", "motor"),
        _PAINTED,
    ),
    "clock": Concept(
        ("clock", "wall clock", "alarm clock"),
        ("ticks", "ticks and tocks", "counts the seconds"),
        ("ticking", "tick and tock", "clockwork"),
        _PAINTED,
    ),
    "dog": Concept(
        ("dog", "puppy", "hound"),
        ("barks", "yaps", "woofs"),
        ("barking", "yapping", "woofing"),
        ("orange", "brown", "grey", "white", "black", "yellow"),
    ),
    "drum": Concept(
        ("drum", "bass drum", "snare drum"),
        ("beats", "thumps", "pounds"),
        ("beat", "thumping", "pounding"),
        _PAINTED,
    ),
    "fire": Concept(
        ("fire", "campfire", "bonfire"),
        ("crackles", "burns", "pops and crackles"),
        ("crackling", "burning", "popping"),
        ("red", "orange", "yellow", "blue"),
    ),
    "frog": Concept(
        ("frog", "toad", "bullfrog"),
        ("croaks", "ribbits", "croaks in the pond"),
        ("croaking", "ribbit", "croak"),
        ("green", "brown", "yellow", "orange", "blue", "grey"),
    ),
    "guitar": Concept(
        ("guitar", "acoustic guitar", "six-string guitar"),
        ("strums", "plays a tune", "is plucked"),
        ("strumming", "plucking", "strings"),
        _PAINTED,
    ),
    "helicopter": Concept(
        ("helicopter", "chopper", "rotorcraft"),
        ("chops the air", "hovers", "flies over"),
        ("rotor", "blades", "chopping"),
        _PAINTED,
    ),
    "kettle": Concept(
        ("kettle", "tea kettle", "teapot"),
        ("whistles", "boils", "steams"),
        ("whistling", "boiling", "steam"),
        _PAINTED,
    ),
    "rain": Concept(
        ("rain cloud", "rain shower", "rainstorm"),
        ("patters", "pours", "drizzles"),
        ("pattering", "pouring", "drizzle"),
        ("grey", "white", "blue", "purple", "black"),
    ),
    "sea": Concept(
        ("sea wave", "ocean wave", "breaker"),
        ("crashes", "rolls in", "washes ashore"),
        ("surf", "crashing", "swell"),
        ("blue", "green", "grey", "purple"),
    ),
    "siren": Concept(
        ("siren", "police siren", "ambulance siren"),
        ("wails", "blares", "howls"),
        ("wailing", "blaring", "howling"),
        ("red", "blue", "orange", "yellow", "purple", "green"),
    ),
    "telephone": Concept(
        ("telephone", "phone", "desk phone"),
        ("trills", "calls", "rings and rings"),
        ("trilling", "ring tone", "calling"),
        _PAINTED,
    ),
    "train": Concept(
        ("train", "steam train", "locomotive"),
        ("chugs", "puffs along", "rolls over the rails"),
        ("chugging", "puffing", "whistle and wheels"),
        _PAINTED,
    ),
    "windmill": Concept(
        ("windmill", "wind wheel", "old mill"),
        ("creaks in the wind", "turns in the wind", "whooshes"),
        ("wind", "whooshing", "creaking sails"),
        _PAINTED,
    ),
}


def named_concept(concept: str) -> Concept:
    """Return the concept of this name, or raise ValueError."""
    if concept not in CONCEPTS:
        raise ValueError(f"Unknown concept {concept!r}. Expected one of: {', '.join(CONCEPTS)}.")
    return CONCEPTS[concept]
