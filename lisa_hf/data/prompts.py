"""LISA's question and answer templates, and how a row becomes conversations.

The texts are protocol data: released LISA checkpoints were trained on exactly these strings, so a missing space or a
changed case costs accuracy. They mirror LISA's `utils/utils.py` and its data sets (arXiv 2308.00692). The image is a
content part of its own in the first user turn; the line break that LISA writes after `<image>` belongs to the chat
template. Nothing here touches pixels: masks stay run-length encoded (`lisa_hf/data/rows.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..model.processing_lisa import user_message
from .masks import Mask, merge_masks


SHORT_QUESTIONS = (
    "Can you segment the {phrase} in this image?",
    "Please segment the {phrase} in this image.",
    "What is {phrase} in this image? Please respond with segmentation mask.",
    "What is {phrase} in this image? Please output segmentation mask.",
)
LONG_QUESTIONS = (
    "{phrase} Please respond with segmentation mask.",
    "{phrase} Please output segmentation mask.",
)
EXPLANATORY_QUESTIONS = (
    "{phrase} Please output segmentation mask and explain why.",
    "{phrase} Please output segmentation mask and explain the reason.",
    "{phrase} Please output segmentation mask and give some explanation.",
)
ANSWERS = (
    "It is [SEG].",
    "Sure, [SEG].",
    "Sure, it is [SEG].",
    "Sure, the segmentation result is [SEG].",
    "[SEG].",
)
# The leading space is LISA's: it validates with "<image>\n What is ...", unlike in training.
EVALUATION_SHORT_QUESTION = " What is {phrase} in this image? Please output segmentation mask."
EVALUATION_LONG_QUESTION = " {phrase} Please output segmentation mask."
EVALUATION_ANSWER = "[SEG]."

IMAGE_PLACEHOLDER = "<image>"


@dataclass
class Question:
    """One conversation about one image.

    Args:
        messages (`list[dict]`): Chat messages `{"role", "content"}`; content is a list of parts, `{"type": "image"}`
            then `{"type": "text", "text": ...}` in the first user turn, one text part in every other turn.
        masks (`list[Mask]`): One per `[SEG]` of the assistant turns, in their order. Empty for a conversation without
            masks.
        is_first_text (`bool`): Whether LISA validates with this question, too; see [`evaluation_questions`].
    """

    messages: list[dict]
    masks: list[Mask] = field(default_factory=list)
    is_first_text: bool = True


def sample_questions(
    row: dict,
    rng: np.random.Generator,
    num_questions: int = 3,
    explanatory_probability: float = 0.1,
    merge_instances: bool = True,
) -> list[Question]:
    """Draw the training questions of a row as LISA does: one conversation per question.

    A semantic row draws among its classes, then one of the interchangeable phrases of each. A referring or reasoning
    row draws among its phrases, so that one object may be asked for in several ways. A row with an explanation answers
    all of its questions in one way: with the explanation alone and no mask (probability `explanatory_probability`),
    else with a mask alone or with a mask and the explanation (half each). A VQA row gives its whole conversation.

    Args:
        row (`dict`): A row of `lisa_hf.data.rows.FEATURES`; its image is not looked at.
        rng (`np.random.Generator`): The only source of randomness.
        num_questions (`int`): The most questions to draw, without replacement.
        explanatory_probability (`float`): In [0, 1].
        merge_instances (`bool`): Whether the mask of a phrase is the union of all targets that carry it. `False`
            takes one target per question, as LISA.

    Returns:
        `list[Question]`: At most `num_questions`; empty if the row has no phrase.
    """
    if row["task"] == "vqa":
        return [_conversation(row["messages"])]

    explain = text_only = False
    if row["explanation"]:
        text_only = rng.random() < explanatory_probability
        explain = not text_only and rng.random() < 0.5

    choices = _choices(row, merge_instances)
    questions, asked = [], set()
    for index in rng.permutation(len(choices)):
        if len(questions) == num_questions:
            break
        target, phrases = choices[index]
        if merge_instances:
            # Two classes may share one of their names ("red object"): its union is asked for once.
            phrases = [phrase for phrase in phrases if phrase not in asked]
        if not phrases:
            continue
        phrase = _draw(phrases, rng)
        asked.add(phrase)
        text = phrase.strip()
        if text_only:
            questions.append(_question(text, row["explanation"]))
            continue
        answer = _draw(ANSWERS, rng)
        if explain:
            text = _draw(EXPLANATORY_QUESTIONS, rng).format(phrase=text)
            answer = f"{answer} {row['explanation']}"
        elif row["is_sentence"]:
            text = _draw(LONG_QUESTIONS, rng).format(phrase=text)
        else:
            text = _draw(SHORT_QUESTIONS, rng).format(phrase=text.lower())
        questions.append(_question(text, answer, _mask(row, target, phrase, merge_instances)))
    return questions


def evaluation_questions(row: dict, merge_instances: bool = True, all_texts: bool = False) -> list[Question]:
    """The questions that LISA validates with: one fixed prompt, nothing drawn.

    A referring row is asked once for every expression of every target, a reasoning row once per target with its first
    phrase, a semantic row once per class with its first phrase, a VQA row for the answer to its first turn.

    Args:
        row (`dict`): A row of `lisa_hf.data.rows.FEATURES`; its image is not looked at.
        merge_instances (`bool`): As in [`sample_questions`].
        all_texts (`bool`): Ask with every phrase instead. The questions above are those with `is_first_text`.

    Returns:
        `list[Question]`: Their last message is the expected answer, `"[SEG]."` where a mask is due.
    """
    if row["task"] == "vqa":
        return [_conversation(row["messages"][:2])]

    choices = []
    for target in row["targets"]:
        for index, phrase in enumerate(target["phrases"]):
            is_first = index == 0 or row["task"] == "referring"
            if is_first or all_texts:
                choices.append((target, phrase, is_first))
    if merge_instances:
        by_phrase = {}
        for target, phrase, is_first in choices:
            by_phrase[phrase] = (target, phrase, is_first or (phrase in by_phrase and by_phrase[phrase][2]))
        choices = list(by_phrase.values())
    questions = []
    for target, phrase, is_first in choices:
        text = phrase.strip()
        if row["is_sentence"]:
            text = EVALUATION_LONG_QUESTION.format(phrase=text)
        else:
            # LISA lower-cases referring expressions here, and every phrase in training, but not ReasonSeg's texts.
            text = text if row["task"] == "reasoning" else text.lower()
            text = EVALUATION_SHORT_QUESTION.format(phrase=text)
        question = _question(text, EVALUATION_ANSWER, _mask(row, target, phrase, merge_instances))
        question.is_first_text = is_first
        questions.append(question)
    return questions


def _choices(row: dict, merge_instances: bool) -> list[tuple[dict, list[str]]]:
    """What a training question can be about: targets, each with the phrases it may be called by in that question."""
    if row["task"] == "semantic":
        choices = [(target, target["phrases"]) for target in row["targets"]]
    else:
        choices = [(target, [phrase]) for target in row["targets"] for phrase in target["phrases"]]
    if merge_instances:
        choices = list({frozenset(phrases): (target, phrases) for target, phrases in choices}.values())
    return choices


def _mask(row: dict, target: dict, phrase: str, merge_instances: bool) -> Mask:
    # LISA asks for a class and trains on one of its instances (PACO, PASCAL-Part); the union is what the text says.
    if not merge_instances:
        return Mask.from_rle(target["rle"])
    masks = [Mask.from_rle(other["rle"]) for other in row["targets"] if phrase in other["phrases"]]
    return merge_masks(masks) if len(masks) > 1 else masks[0]


def _draw(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[rng.integers(len(options))]


def _question(text: str, answer: str, *masks: Mask) -> Question:
    messages = [
        user_message(text),
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    return Question(messages=messages, masks=list(masks))


def _conversation(turns: list[dict]) -> Question:
    """A recorded conversation: the image moves to the front of the first user turn, wherever its placeholder stood."""
    messages = []
    for turn in turns:
        text = turn["content"]
        if IMAGE_PLACEHOLDER in text:
            text = text.replace(IMAGE_PLACEHOLDER, "").strip()
        image = [] if messages else [{"type": "image"}]
        messages.append({"role": turn["role"], "content": [*image, {"type": "text", "text": text}]})
    return Question(messages=messages)
