"""LISA's question and answer templates, and the conversations made from a row.

The templates mirror LISA's `utils/utils.py` and its datasets (arXiv 2308.00692). Released LISA checkpoints were
trained on exactly these strings, so a missing space or a different case costs accuracy. The image is a separate
content part of the first user message; the line break that LISA writes after `<image>` is part of the chat template.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..model.conversation_text import escape_tokens, leave_out_placeholder, token_pattern, user_message
from ..model.processing_lisa import SEG_TOKEN
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
# LISA validates with a leading space, "<image>\n What is ...", and trains without it.
EVALUATION_SHORT_QUESTION = " What is {phrase} in this image? Please output segmentation mask."
EVALUATION_LONG_QUESTION = " {phrase} Please output segmentation mask."
EVALUATION_ANSWER = "[SEG]."

SEG_PATTERN = token_pattern([SEG_TOKEN])

# Which texts an evaluation protocol asks:
# - "first": the first text of each target, and every referring expression, as in LISA's validation;
# - "all": every text;
# - "one_per_object": the first text of each target;
# - "normalized": the same in lowercase, without leading or trailing punctuation, as in Seg-Zero.
TEXTS = ("first", "all", "one_per_object", "normalized")
PUNCTUATION = '."?!'


@dataclass
class Question:
    """A conversation about one image.

    Args:
        messages: Chat messages `{"role", "content"}`. Content is a list of parts: `{"type": "image"}` and
            `{"type": "text", "text": ...}` in the first user message, one text part in all others. An assistant
            message with `"is_context": True` is given, not trained on.
        masks: One mask per `[SEG]` of the assistant messages that are trained on, in order.
        phrase: Text of the question before it was inserted into a template; empty in a conversation.
        texts: Those of `TEXTS` that include this text.
    """

    messages: list[dict]
    masks: list[Mask] = field(default_factory=list)
    phrase: str = ""
    texts: frozenset[str] = frozenset(TEXTS)

    @property
    def prompt(self) -> str:
        """The text of the last user message."""
        return self.messages[-2]["content"][-1]["text"].strip()


def sample_questions(
    row: dict,
    rng: np.random.Generator,
    num_questions: int = 3,
    explanatory_probability: float = 0.1,
    merge_instances: bool = True,
) -> list[Question]:
    """Draw the training questions of a row as LISA does, one conversation per question.

    - Semantic rows: draw classes, and one of the interchangeable phrases of each.
    - Referring and reasoning rows: draw phrases, so several questions may be about the same object.
    - Rows with an explanation: answer all questions in the same way, with the explanation alone and no mask
      (probability `explanatory_probability`), with a mask alone, or with a mask and the explanation (half of the
      remaining probability each).
    - VQA rows and conversations with masks: return the whole conversation.

    Args:
        row: Row of `lisa_hf.data.rows.FEATURES`. Its image is not read.
        rng: Generator of all random draws.
        num_questions: Maximum number of questions, drawn without replacement.
        explanatory_probability: Probability in [0, 1] of an explanation without a mask.
        merge_instances: Whether the mask of a phrase is the union of all targets that have it. `False` uses one target
            per question, as LISA does.

    Returns:
        At most `num_questions` questions. The list is empty if the row has no phrase.

    Raises:
        ValueError: If a mask of a question is damaged.
    """
    if row["messages"]:
        return [_conversation(row)]

    explain = text_only = False
    explanation = escape_tokens(row["explanation"] or "", SEG_PATTERN)  # a `[SEG]` there has no mask
    if explanation:
        text_only = rng.random() < explanatory_probability
        explain = not text_only and rng.random() < 0.5

    choices = _choices(row, merge_instances)
    questions, asked = [], set()
    for index in rng.permutation(len(choices)):
        if len(questions) == num_questions:
            break
        target, phrases = choices[index]
        if merge_instances:
            # Ask only once for a phrase that two classes share, such as "red object": its mask is their union.
            phrases = [phrase for phrase in phrases if phrase not in asked]
        if not phrases:
            continue
        phrase = _draw(phrases, rng)
        asked.add(phrase)
        text = phrase.strip()
        if text_only:
            questions.append(_question(text, explanation))
            continue
        answer = _draw(ANSWERS, rng)
        if explain:
            text = _draw(EXPLANATORY_QUESTIONS, rng).format(phrase=text)
            answer = f"{answer} {explanation}"
        elif row["is_sentence"]:
            text = _draw(LONG_QUESTIONS, rng).format(phrase=text)
        else:
            text = _draw(SHORT_QUESTIONS, rng).format(phrase=text.lower())
        questions.append(_question(text, answer, _mask(row, target, phrase, merge_instances)))
    return questions


def evaluation_questions(
    row: dict, merge_instances: bool = True, texts: Collection[str] = ("first",)
) -> list[Question]:
    """Return LISA's validation questions, which use one fixed template.

    - Referring rows: every expression of every target.
    - Reasoning rows: the first phrase of every target.
    - Semantic rows: the first phrase of every class.
    - VQA rows: the first question of the conversation.
    - Conversations with masks: every question, after the true answers to those before it.

    Args:
        row: Row of `lisa_hf.data.rows.FEATURES`. Its image is not read.
        merge_instances: Whether the mask of a phrase is the union of all targets that have it.
        texts: Which of `TEXTS` to ask. The questions above are "first".

    Returns:
        Questions whose last message is the expected answer, `"[SEG]."` if a mask is expected.

    Raises:
        ValueError: If a mask of a question is damaged.
    """
    if row["messages"]:
        turns = _split_turns(_conversation(row))
        return turns[:1] if row["task"] == "vqa" else turns

    questions = {}
    for number, target in enumerate(row["targets"]):
        for index, phrase in enumerate(target["phrases"]):
            for text, among in _wordings(phrase.strip(), index, row):
                if not among & set(texts):
                    continue
                # Instances with the same name are asked for together; otherwise each text of each target counts.
                key = (phrase, text) if merge_instances else (number, index, text)
                if key in questions:
                    questions[key].texts |= among
                else:
                    question = _question(text, EVALUATION_ANSWER, _mask(row, target, phrase, merge_instances))
                    question.phrase, question.texts = phrase.strip(), among
                    questions[key] = question
    for question in questions.values():
        if question.texts == {"normalized"}:
            question.phrase = _normalize(question.phrase)
    return list(questions.values())


def _wordings(phrase: str, index: int, row: dict) -> list[tuple[str, frozenset[str]]]:
    """Return the wordings of a target's phrase with this index, each with those of `TEXTS` that include it."""
    among = {"all"}
    if index == 0 or row["task"] == "referring":
        among.add("first")
    if index == 0:
        among.add("one_per_object")
    if row["is_sentence"]:
        template = EVALUATION_LONG_QUESTION
    else:
        # As in LISA, which lowercases every phrase in training and referring expressions here, but not ReasonSeg's.
        template, phrase = EVALUATION_SHORT_QUESTION, phrase if row["task"] == "reasoning" else phrase.lower()
    wordings = {template.format(phrase=phrase): among}
    if index == 0:
        wordings.setdefault(template.format(phrase=_normalize(phrase)), set()).add("normalized")
    return [(text, frozenset(among)) for text, among in wordings.items()]


def _normalize(text: str) -> str:
    return text.lower().strip(PUNCTUATION)


def _choices(row: dict, merge_instances: bool) -> list[tuple[dict, list[str]]]:
    """Return the possible subjects of training questions: pairs of a target and its phrases."""
    if row["task"] == "semantic":
        choices = [(target, target["phrases"]) for target in row["targets"]]
    else:
        choices = [(target, [phrase]) for target in row["targets"] for phrase in target["phrases"]]
    if merge_instances:
        choices = list({frozenset(phrases): (target, phrases) for target, phrases in choices}.values())
    return choices


def _mask(row: dict, target: dict, phrase: str, merge_instances: bool) -> Mask:
    # In PACO and PASCAL-Part, LISA asks for a class but trains on one of its instances. The text refers to all of
    # them.
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


def _conversation(row: dict) -> Question:
    """Return a recorded conversation, with the image moved from its placeholder to the front of the first message."""
    messages = []
    for turn in row["messages"]:
        text = leave_out_placeholder(turn["content"])
        if turn["role"] == "assistant" and row["task"] == "vqa":
            text = escape_tokens(text, SEG_PATTERN)  # it has no mask
        image = [] if messages else [{"type": "image"}]
        message = {"role": turn["role"], "content": [*image, {"type": "text", "text": text}]}
        if turn.get("reasoning_content"):
            message["reasoning_content"] = turn["reasoning_content"]
        messages.append(message)
    return Question(messages, masks=[Mask.from_rle(target["rle"]) for target in row["targets"]])


def _split_turns(conversation: Question) -> list[Question]:
    """Return one question per turn, with the previous turns as its context."""
    turns, num_masks = [], 0
    for end in range(2, len(conversation.messages) + 1, 2):
        *context, question, answer = conversation.messages[:end]
        context = [message | {"is_context": True} for message in context]
        first, num_masks = num_masks, num_masks + answer["content"][0]["text"].count(SEG_TOKEN)
        turns.append(Question([*context, question, answer], conversation.masks[first:num_masks]))
    return turns
