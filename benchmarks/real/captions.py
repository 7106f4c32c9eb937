"""Captions made from labels: the phrases of every class, and the sentences they stand in while the sources train."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

# How a listener may word each class of ESC-50. A name with several classes, such as "bird", is a phrase of each.
SOUND_PHRASES = {
    "dog": "dog|dogs|a dog barks|dogs barking|a dog is barking|a barking dog|a dog yaps and growls|a puppy barks",
    "rooster": "rooster|a rooster crows|a rooster crowing|a crowing rooster|a cock crows at dawn|a chicken crows",
    "pig": "pig|pigs|a pig oinks|a pig grunts|pigs oinking|pigs squeal|a hog snorts|a grunting pig",
    "cow": "cow|cows|a cow moos|a mooing cow|cows mooing|cattle low|a cow bellows|an ox bellows",
    "frog": "frog|frogs|a frog croaks|frogs croaking|a croaking frog|a toad croaks|frogs chirp at night",
    "cat": "cat|cats|a cat meows|a cat meowing|a meowing cat|a kitten mews|a cat cries and hisses|a cat purrs",
    "hen": (
        "hen|a hen clucks|hens clucking|a chicken clucks|chickens cackle|rooster|a rooster and hens on a farm|poultry"
    ),
    "insects": "insect|insects|insects buzzing|an insect buzzes|a fly buzzes|flies buzz around|a bee hums|bees swarm",
    "sheep": "sheep|a sheep bleats|sheep bleating|a lamb baas|a goat bleats|a bleating sheep|a flock of sheep",
    "crow": "crow|bird|birds|a crow caws|crows cawing|a bird squawks|a cawing bird|a raven croaks",
    "rain": "rain|rain falls|it is raining|raindrops patter on a roof|heavy rain pours down|rainfall|a rain shower",
    "sea waves": (
        "sea|sea waves|ocean waves|waves crash on the shore|waves break on a beach|the surf of the ocean|the sea"
    ),
    "crackling fire": (
        "crackling fire|a fire crackles|fire burning|flames crackle|a campfire|wood burns in a fireplace"
    ),
    "crickets": (
        "crickets|insect|insects|crickets chirping|a cricket chirps|insects chirp at night|cicadas|grasshoppers"
    ),
    "chirping birds": (
        "chirping birds|bird|birds|birds chirping|a bird sings|birds singing|birds tweet|a songbird chirps"
    ),
    "water drops": "water drops|water dripping|a dripping tap|drops of water fall|water drips into a sink|drip",
    "wind": "wind|wind blows|strong wind|wind howling|a gust of wind|a windy storm|wind rushes past",
    "pouring water": (
        "pouring water|water is poured|water pours into a glass|filling a cup with liquid|liquid being poured"
    ),
    "toilet flush": "toilet flush|a toilet flushes|flushing a toilet|water swirls down a toilet|a toilet is flushed",
    "thunderstorm": "thunderstorm|thunder|thunder rumbles|a clap of thunder|lightning and thunder|a thunder storm",
    "crying baby": "crying baby|a baby cries|a baby crying|an infant wails|a child cries|a newborn baby screams",
    "sneezing": "sneezing|a person sneezes|someone sneezes|a man sneezing|a sneeze|achoo",
    "clapping": "clapping|people clap|applause|a crowd applauds|an audience claps|hands clapping",
    "breathing": "breathing|a person breathes|heavy breathing|someone inhales and exhales|deep breaths|panting",
    "coughing": "coughing|a person coughs|a man coughing|someone coughs|a cough|clearing the throat",
    "footsteps": (
        "footsteps|someone walks|a person walking|steps on a floor|walking on gravel|shoes on stairs|running feet"
    ),
    "laughing": "laughing|people laugh|laughter|a man laughs|a woman giggles|a child laughing|someone chuckles",
    "brushing teeth": "brushing teeth|someone brushes their teeth|a toothbrush scrubs|tooth brushing|a toothbrush",
    "snoring": "snoring|a person snores|a man snoring|someone snores while sleeping|a snoring sleeper",
    "drinking sipping": "drinking|sipping|someone sips a drink|a person drinks and swallows|slurping|gulping a drink",
    "door wood knock": "door knock|a knock on a door|someone knocks|knocking on wood|a person knocks at a wooden door",
    "mouse click": "mouse click|clicking a mouse|a computer mouse clicks|clicks of a computer mouse|mouse clicking",
    "keyboard typing": (
        "keyboard|keyboard typing|typing on a keyboard|someone types on a computer|"
        "keys of a computer keyboard|a typewriter|a laptop keyboard clicks"
    ),
    "door wood creaks": "door creaks|a creaking door|a door squeaks open|a wooden door creaking|squeaky hinges",
    "can opening": "can opening|a can is opened|opening a soda can|a beer can hisses open|a can of drink pops open",
    "washing machine": (
        "washing machine|a washing machine runs|laundry spinning|a washer hums|a spinning washing machine"
    ),
    "vacuum cleaner": "vacuum cleaner|a vacuum cleaner runs|vacuuming|a vacuum hums|someone vacuums a carpet|a hoover",
    "clock alarm": "alarm clock|clock|an alarm clock rings|a clock alarm beeps|a digital alarm beeping|a clock rings",
    "clock tick": "clock|a clock ticks|ticking clock|clock tick|tick tock of a clock|a watch ticks|a clock ticking",
    "glass breaking": "glass breaking|glass shatters|breaking glass|a window breaks|a bottle smashes|glass is broken",
    "helicopter": (
        "helicopter|a helicopter flies|helicopter blades|a helicopter hovers overhead|rotor blades chop|a chopper"
    ),
    "chainsaw": "chainsaw|a chainsaw cuts wood|a chainsaw revs|sawing a tree with a chainsaw|a power saw buzzes",
    "siren": (
        "siren|police car|a police siren|a siren wails|an ambulance siren|the siren of a police car|"
        "an emergency vehicle|a police car drives past with its siren on|a fire truck"
    ),
    "car horn": (
        "car horn|car|cars|a car honks|a car honks its horn|honking cars|a vehicle horn beeps|a car in traffic"
    ),
    "engine": (
        "engine|car|an engine runs|a car engine|a car idles|a motor revs|an engine idling|a car accelerates|"
        "a truck engine"
    ),
    "train": (
        "train|a train passes|a train on the tracks|a train horn|a railway train clatters|a locomotive|a steam train"
    ),
    "church bells": "church bells|a church bell rings|bells ringing|bells toll|church bells chime|a bell tolls",
    "airplane": (
        "airplane|an airplane flies overhead|a plane passes|an aircraft takes off|a jet flies by|a propeller plane"
    ),
    "fireworks": "fireworks|fireworks explode|fireworks burst and crackle|firecrackers pop|a fireworks display",
    "hand saw": "hand saw|sawing wood|someone saws wood by hand|a hand saw cuts wood|a saw scrapes on wood",
}
SOUND_TEMPLATES = (
    "{}", "{}", "{}", "the sound of {}", "a recording of {}", "{} in the background", "{} nearby",
    "{} in the distance", "{} loudly", "{} repeatedly", "{} can be heard", "{} continuously", "a loud {}",
    "a faint {}", "{} then silence",
)  # fmt: skip
IMAGE_TEMPLATES = (
    "{}", "{}", "a {}", "a photo of a {}", "a photo of the {}", "a picture of a {}", "an image of {}", "a small {}",
    "a close-up photo of a {}", "a blurry photo of a {}", "a large {}", "one {} in the picture", "two {}",
    "the {} outside", "a black and white photo of a {}", "a bright photo of a {}", "this is a {}",
)  # fmt: skip
# The same sentences in both spaces, around the name of a concept.
NAME_TEMPLATES = (
    "{}", "a {}", "the {}", "one {}", "a small {}", "a large {}", "a {} nearby", "a {} in the distance",
    "this is a {}", "there is a {}", "a {} outside", "a {} in the background",
)  # fmt: skip
# Share of training captions that get words of an unrelated real one.
FILLER_RATE = 0.5
# Words of phrases that tell nothing of a class.
FUNCTION_WORDS = """
a an the of and or in on at to by with from for its their is are be being been it this that there as
into while then one two someone person people man men woman women past down up out off around open
can
"""


def words(text: str) -> list[str]:
    """Split a text into lower-case words."""
    return re.findall(r"[a-z]+", text.lower())


def image_phrases(label_text: str, concept: str) -> list[str]:
    """Return the phrases of a class of images: the synonyms of its label, and its concept if it has one.

    The concept comes as often as all synonyms together.
    """
    synonyms = [synonym.strip() for synonym in label_text.split(",") if synonym.strip()]
    return synonyms + [concept] * len(synonyms) if concept else synonyms


class Captioner:
    """Draw training captions of classes: a phrase in a template, at times amid words of an unrelated real caption.

    The unrelated words teach a text tower which words of a real caption to pass over. Captions with a word of any
    phrase are left out of them.

    Args:
        phrases: of every class; a phrase that several classes share is true of each of them.
        templates: sentences with one `{}`.
        captions: real captions.
    """

    def __init__(self, phrases: Sequence[Sequence[str]], templates: Sequence[str], captions: Sequence[str]) -> None:
        self.phrases = phrases
        self.templates = templates
        content = {word for group in phrases for phrase in group for word in words(phrase)}
        content -= set(words(FUNCTION_WORDS))
        split = [words(caption) for caption in captions]
        self.fillers = [caption for caption in split if caption and content.isdisjoint(caption)]
        self._classes: dict[str, set[int]] = {}
        for index, group in enumerate(phrases):
            for phrase in group:
                self._classes.setdefault(phrase, set()).add(index)

    def draw(self, generator: random.Random) -> tuple[list[str], list[set[int]]]:
        """Return a caption a class, and the classes that each caption is true of."""
        texts, classes = [], []
        for group in self.phrases:
            phrase = generator.choice(group)
            text = generator.choice(self.templates).format(phrase)
            if self.fillers and generator.random() < FILLER_RATE:
                filler = generator.choice(self.fillers)
                start = generator.randrange(len(filler))
                part = " ".join(filler[start : start + generator.randint(2, 8)])
                text = f"{text} {part}" if generator.random() < 0.5 else f"{part} {text}"
            texts.append(text)
            classes.append(self._classes[phrase])
        return texts, classes
