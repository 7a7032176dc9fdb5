"""Drawn scenes for all four tasks: a dataset that needs no download.

    from data_scripts import load_source
    rows = load_source("shapes", split="train", num_train_scenes=2000, image_size=128, seed=0)

A scene has two to five shapes in named colors on a mottled background. Scene i is a pure function of (seed, split, i),
so a larger dataset begins with the scenes of a smaller one. Each scene is one row:

- semantic: every shape is a "red circle", a "circle" and a "red object"; a phrase may have several targets.
- referring: phrases that locate a shape relative to another one: "circle above the red star".
- reasoning: a question about shapes and colors in the real world, with an explanation.
- vqa: a conversation about the scene, without masks.
"""

import dataclasses
import itertools
import re

import cv2
import numpy as np

from lisa_hf.data.masks import encode_mask
from lisa_hf.data.rows import make_row

from .source import SourceBuilder, SourceConfig


SPLITS = ("train", "validation")
TASK_PROPORTIONS = {"semantic": 0.4, "referring": 0.3, "reasoning": 0.2, "vqa": 0.1}

COLORS = {
    "red": (205, 30, 35),
    "yellow": (245, 220, 30),
    "green": (40, 160, 60),
    "blue": (40, 85, 215),
    "purple": (125, 40, 160),
    "white": (245, 245, 245),
}


def _polygon(num_corners: int, radii: tuple[float, ...] = (1.0,), turn: float = 0.0) -> np.ndarray:
    """Return the corners of a polygon around the origin, shape `(num_corners, 2)`. Their distances repeat `radii`."""
    angles = np.arange(num_corners) * 2 * np.pi / num_corners - np.pi / 2 + turn
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.resize(radii, num_corners)[:, None]


OUTLINES = {  # in the unit circle
    "circle": _polygon(64),
    "square": _polygon(4, turn=np.pi / 4),
    "triangle": _polygon(3),
    "star": _polygon(10, radii=(1.0, 0.45)),
}
NUMBERS = ("no", "one", "two", "three", "four", "five")


@dataclasses.dataclass(frozen=True)
class Concept:
    """Common knowledge about some shapes or colors (`names`): questions that they answer, and the reason."""

    names: tuple[str, ...]
    questions: tuple[str, ...]
    reason: str


# "colour" stays in the texts of rows: another spelling would change the vocabulary and the quick start's results.
CONCEPTS = (
    Concept(
        ("circle",),
        ("Which object could roll away?", "What would roll down a hill?", "What could be used as a wheel?"),
        "a circle is round and rolls",
    ),
    Concept(
        ("triangle",),
        ("What has three corners?", "Which object could be the roof of a house?", "What looks like a pyramid?"),
        "a triangle has three corners",
    ),
    Concept(
        ("square",),
        ("What has four equal sides?", "Which object could be used as a tile?", "What looks like a box?"),
        "a square has four equal sides",
    ),
    Concept(
        ("star",),
        ("What can be seen in the sky at night?", "Which object belongs on top of a tree?", "What has five points?"),
        "a star has five points",
    ),
    Concept(
        ("red",),
        ("What has the colour of blood?", "Which object could be a ripe tomato?", "What tells drivers to stop?"),
        "blood is red",
    ),
    Concept(
        ("yellow",),
        ("What has the colour of a banana?", "Which object could be a lemon?", "What is coloured like the sun?"),
        "a banana is yellow",
    ),
    Concept(
        ("green",),
        ("What has the colour of grass?", "Which object could be a frog?", "What is coloured like a leaf?"),
        "grass is green",
    ),
    Concept(
        ("blue",),
        ("What has the colour of the sea?", "Which object could be a lake?", "What is coloured like a clear sky?"),
        "the sea is blue",
    ),
    Concept(
        ("purple",),
        ("What has the colour of grapes?", "Which object could be a plum?", "What is coloured like lavender?"),
        "grapes are purple",
    ),
    Concept(
        ("white",),
        ("What has the colour of snow?", "Which object could be a glass of milk?", "What is coloured like salt?"),
        "snow is white",
    ),
)

_TEMPLATE_WORDS = "object How many are there There is What colour shape Is Yes No It They because and The the a . , ?"


@dataclasses.dataclass
class Item:
    """A drawn shape. Lengths are fractions of the image's side; `mask`, shape `(S, S)`, bool, holds its pixels."""

    color: str
    shape: str
    x: float
    y: float
    radius: float
    turn: float
    mask: np.ndarray | None = None

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def phrases(self) -> list[str]:
        return [self.name, self.shape, f"{self.color} object"]


ABSENT_SHARE = 0.5  # share of absent shapes among those that conversations with masks ask for
ONE_SHAPE_SHARE = 0.7  # share of their questions about one shape

RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
MARGIN = 0.12  # smallest distance, as a fraction of the side, that decides a relation

WORDS = sorted(
    {
        word
        for text in (
            *(text for concept in CONCEPTS for text in (*concept.questions, concept.reason)),
            *(*COLORS, *OUTLINES, *(f"{shape}s" for shape in OUTLINES), *NUMBERS, *RELATIONS),
            _TEMPLATE_WORDS,
        )
        for word in re.findall(r"\w+|[^\w\s]", text)
    }
)
"""Every word and punctuation mark of the rows' texts, for a word-level tokenizer."""


def draw_items(rng: np.random.Generator) -> list[Item]:
    """Draw a layout of two to five shapes that do not touch."""
    items = []
    num_items = rng.choice([2, 3, 4, 5], p=[0.2, 0.35, 0.3, 0.15])
    for _ in range(20 * num_items):
        if len(items) == num_items:
            break
        color, shape = str(rng.choice(list(COLORS))), str(rng.choice(list(OUTLINES)))
        if items and rng.random() < 0.4:  # without look-alikes, the shape or color alone identifies an item
            twin = items[rng.integers(len(items))]
            color, shape = (color, twin.shape) if rng.random() < 0.6 else (twin.color, shape)
        radius = rng.uniform(0.12, 0.28)
        x, y = rng.uniform(radius, 1 - radius, size=2)
        if all(np.hypot(x - other.x, y - other.y) > 1.05 * (radius + other.radius) for other in items):
            items.append(Item(color, shape, x, y, radius, turn=rng.uniform(-0.35, 0.35)))
    return items


def draw_scene(rng: np.random.Generator, image_size: int) -> tuple[np.ndarray, list[Item]]:
    """Draw a picture, shape `(S, S, 3)`, uint8 RGB, and its items with their masks."""
    items = draw_items(rng)
    # Draw the outlines with four samples per pixel and axis.
    side = 4 * image_size
    cover = np.zeros((side, side), dtype=np.uint8)
    for number, item in enumerate(items, start=1):
        turn = np.array([[np.cos(item.turn), np.sin(item.turn)], [-np.sin(item.turn), np.cos(item.turn)]])
        outline = ((OUTLINES[item.shape] @ turn) * item.radius + (item.x, item.y)) * side
        cv2.fillPoly(cover, [np.round(outline).astype(np.int32)], number)
    shares = np.stack(
        [
            cv2.resize((cover == number).astype(np.float32), (image_size, image_size), interpolation=cv2.INTER_AREA)
            for number in range(len(items) + 1)
        ]
    )
    # A pixel belongs to the shape that covers most of it, so masks never overlap.
    owner = shares.argmax(axis=0)
    for number, item in enumerate(items, start=1):
        item.mask = owner == number

    picture = shares[0][..., None] * _shade(rng, rng.uniform(60, 170) + rng.uniform(-12, 12, size=3), 15, image_size)
    for share, item in zip(shares[1:], items):
        color = np.array(COLORS[item.color]) + rng.uniform(-8, 8, size=3)
        picture += share[..., None] * _shade(rng, color, 8, image_size)
    blotches = cv2.resize(rng.normal(0, 5, size=(12, 12, 3)), (image_size, image_size), interpolation=cv2.INTER_CUBIC)
    grain = rng.normal(0, 2, size=(image_size, image_size, 1))
    return np.clip(np.round(picture + blotches + grain), 0, 255).astype(np.uint8), items


def _shade(rng: np.random.Generator, color: np.ndarray, strength: float, image_size: int) -> np.ndarray:
    """Return a color that brightens by 2 x `strength` in some direction, shape `(S, S, 3)`, float."""
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.linspace(-1, 1, image_size)
    light = (np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None]) * strength
    return color + light[..., None]


def referring_phrases(items: list[Item]) -> list[tuple[str, Item]]:
    """Return all phrases that locate exactly one item of a kind relative to an item with a unique name."""
    names = [item.name for item in items]
    found = []
    for anchor, (relation, direction) in itertools.product(items, RELATIONS.items()):
        others = [item for item in items if item is not anchor]
        if names.count(anchor.name) > 1:
            continue
        for noun in sorted({phrase for item in others for phrase in item.phrases}):
            group = [item for item in others if noun in item.phrases]
            verdicts = [_relation_holds(item, anchor, direction) for item in group]
            if verdicts.count(True) == 1 and None not in verdicts:
                found.append((f"{noun} {relation} the {anchor.name}", group[verdicts.index(True)]))
    return found


def _relation_holds(item: Item, anchor: Item, direction: tuple[int, int]) -> bool | None:
    """Return whether the item lies in the direction (x, y) of the anchor, or None if people might disagree."""
    dx, dy = item.x - anchor.x, item.y - anchor.y
    along, across = dx * direction[0] + dy * direction[1], abs(dx * direction[1]) + abs(dy * direction[0])
    if along >= MARGIN and along >= 0.6 * across:
        return True
    return False if along <= 0 else None


def _list_names(items: list[Item]) -> str:
    """Return the names of items for a sentence: "the red circle and the blue stars"."""
    names = [item.name for item in items]
    parts = [
        f"the {name}" if names.count(name) == 1 else f"the {item.color} {item.shape}s"
        for name, item in dict(zip(names, items)).items()
    ]
    return " and ".join(parts)


def draw_conversation(rng: np.random.Generator, items: list[Item]) -> list[dict[str, str]]:
    """Draw two questions about counts, colors, shapes and presence, with their answers."""
    shapes, colors = [item.shape for item in items], [item.color for item in items]
    turns = []
    for shape in (str(rng.choice(shapes)), str(rng.choice(list(OUTLINES)))):
        count = shapes.count(shape)
        noun = f"is one {shape}" if count == 1 else f"are {NUMBERS[count]} {shape}s"
        turns.append((f"How many {shape}s are there?", f"There {noun}."))
    for item in items:
        if shapes.count(item.shape) == 1:
            turns.append((f"What colour is the {item.shape}?", f"The {item.shape} is {item.color}."))
        if colors.count(item.color) == 1:
            turns.append((f"What shape is the {item.color} object?", f"The {item.color} object is a {item.shape}."))
    names = {item.name for item in items}
    for name in (str(rng.choice(sorted(names))), f"{rng.choice(list(COLORS))} {rng.choice(list(OUTLINES))}"):
        answer = f"Yes, there is a {name}." if name in names else f"No, there is no {name}."
        turns.append((f"Is there a {name}?", answer))
    chosen = rng.permutation(len(turns))[:2]
    return [
        {"role": role, "content": content}
        for turn in chosen
        for role, content in zip(("user", "assistant"), turns[turn])
    ]


def _draw_conversation_with_masks(rng: np.random.Generator, items: list[Item]) -> dict | None:
    """Draw four questions about one or two shapes each, half of which are absent. None without two names.

    An absent shape has a color that no shape in the scene has. A vision tower as small as the quick start's learns
    colors within a few hundred steps, but pairs of a shape and a color not within a thousand.
    """
    names = list(dict.fromkeys(item.name for item in items))
    absent_colors = [color for color in COLORS if color not in {item.color for item in items}]
    # One of each color: otherwise, one answer would give away another without the image.
    absent = [f"{color} {rng.choice(list(OUTLINES))}" for color in absent_colors]
    if len(names) < 2:
        return None
    names, absent = rng.permutation(names).tolist(), rng.permutation(absent).tolist()  # each is asked for once
    messages, targets = [], []
    for _ in range(4):
        # A model first has to learn to answer about one shape.
        number = 1 if rng.random() < ONE_SHAPE_SHARE else 2
        asked = []
        for _ in range(number):
            choices = absent if rng.random() < ABSENT_SHARE else names
            if choices := choices or absent or names:
                asked.append(choices.pop())
        if not asked:
            break
        sentences = []
        for name in asked:
            found = [item.mask for item in items if item.name == name]
            sentences.append(f"The {name} is [SEG]." if found else f"There is no {name}.")
            targets += [{"phrases": [name], "rle": encode_mask(np.any(found, axis=0))}] if found else []
        messages.append({"role": "user", "content": f"Please segment the {' and the '.join(asked)} in this image."})
        messages.append({"role": "assistant", "content": " ".join(sentences)})
    return {"messages": messages, "targets": targets}


def _annotate(rng: np.random.Generator, task: str, items: list[Item]) -> dict | None:
    """Return the columns of the scene's row that depend on the task, or None if the scene does not suit it."""
    if task == "vqa":
        return {"messages": draw_conversation(rng, items)}
    rles = {id(item): encode_mask(item.mask) for item in items}
    if task == "conversation":
        return _draw_conversation_with_masks(rng, items)
    if task == "semantic":
        return {"targets": [{"phrases": [name], "rle": rles[id(item)]} for item in items for name in item.phrases]}
    if task == "referring":
        found = referring_phrases(items)
        targets = []
        for item in items:
            phrases = [phrase for phrase, which in found if which is item]
            if phrases:
                targets.append({"phrases": rng.permutation(phrases)[:3].tolist(), "rle": rles[id(item)]})
        return {"targets": targets} if targets else None
    answers = [[item for item in items if {item.shape, item.color} & {*concept.names}] for concept in CONCEPTS]
    suitable = [pair for pair in zip(CONCEPTS, answers) if 0 < len(pair[1]) < len(items)]
    if not suitable:
        return None
    concept, answer = suitable[rng.integers(len(suitable))]
    subject = "It is" if len(answer) == 1 else "They are"
    rle = encode_mask(np.any([item.mask for item in answer], axis=0))
    return {
        "targets": [{"phrases": rng.permutation(concept.questions).tolist(), "rle": rle}],
        "is_sentence": True,
        "explanation": f"{subject} {_list_names(answer)} because {concept.reason}.",
    }


def make_scene_row(seed: int, split: str, index: int, image_size: int, is_conversation: bool = False) -> dict:
    """Make the row of scene `index`, a pure function of the arguments."""
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    task = str(rng.choice(list(TASK_PROPORTIONS), p=list(TASK_PROPORTIONS.values())))
    if is_conversation:
        task = "conversation"
    columns = None
    while columns is None:  # ends soon: more than half of all scenes suit any task
        picture, items = draw_scene(rng, image_size)
        columns = _annotate(rng, task, items) if len(items) > 1 else None
    _, png = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    return make_row(png.tobytes(), image_id=f"{split}-{index:06d}", source="shapes", task=task, **columns)


@dataclasses.dataclass
class ShapesConfig(SourceConfig):
    """Options of the drawn scenes.

    Args:
        num_train_scenes: Number of scenes in the split train.
        num_validation_scenes: Number of scenes in the split validation.
        image_size: Side of the square images in pixels.
        seed: Seed of all random draws.
        conversations: Whether all rows are conversations with masks, instead of the four tasks of LISA.
    """

    num_train_scenes: int = 2000
    num_validation_scenes: int = 200
    image_size: int = 128
    seed: int = 0
    conversations: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.image_size < 32:
            raise ValueError(f"image_size: expected at least 32 pixels, to tell shapes apart, got {self.image_size}.")
        if min(self.num_train_scenes, self.num_validation_scenes) < 1:
            raise ValueError(
                f"expected one scene per split or more, got {self.num_train_scenes=}, {self.num_validation_scenes=}."
            )


class Shapes(SourceBuilder):
    """Drawn scenes of colored shapes with semantic, referring, reasoning and VQA rows. Splits: train, validation."""

    BUILDER_CONFIG_CLASS = ShapesConfig
    SOURCE = "shapes"

    def __init__(self, data_dir=None, **kwargs):
        super().__init__(**kwargs)  # no files are read, so the directory must not change the cache

    def annotation_files(self, data_dir):
        return []

    def read_records(self, data_dir):
        num_scenes = {"train": self.config.num_train_scenes, "validation": self.config.num_validation_scenes}
        return {split: [(split, index) for index in range(num_scenes[split])] for split in SPLITS}

    def make_row(self, record):
        split, index = record
        return make_scene_row(self.config.seed, split, index, self.config.image_size, self.config.conversations)
