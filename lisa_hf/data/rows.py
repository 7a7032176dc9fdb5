"""The row format that all datasets share, and what to do with a row that cannot be used.

A row is one image with all of its annotations. Its masks stay compressed COCO run-length encodings (RLE), see
[`~masks.Mask`].
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from datasets import Features, Image, List, Value

from ..model.conversation_text import replace_surrogates
from ..model.processing_lisa import SEG_TOKEN
from .masks import RLE_FEATURES, rle_size


TASKS = ("semantic", "referring", "reasoning", "vqa", "conversation")

FEATURES = Features(
    {
        "image": Image(),
        "image_id": Value("string"),
        "source": Value("string"),
        "task": Value("string"),
        # One target per annotation; its phrases are interchangeable. A phrase refers to all targets that have it.
        "targets": List({"phrases": List(Value("string")), "rle": RLE_FEATURES}),
        "ignore": RLE_FEATURES,
        "is_sentence": Value("bool"),
        "explanation": Value("string"),
        # The reasoning of an assistant's message, or None.
        "messages": List({"role": Value("string"), "content": Value("string"), "reasoning_content": Value("string")}),
    }
)

# What to do with a record, row or question that cannot be used: "raise" stops at the first one, "skip" logs and counts
# it. Builders read records, the mixture opens the images and masks of rows, the collator encodes questions.
OnBadRow = Literal["raise", "skip"]


def check_on_bad_row(on_bad_row: str) -> None:
    """Raise a `ValueError` unless the value is one of `OnBadRow`."""
    if on_bad_row not in get_args(OnBadRow):
        raise ValueError(f"on_bad_row: expected 'raise' or 'skip', got {on_bad_row!r}.")


def make_row(
    image: str | bytes,
    image_id: str,
    source: str,
    task: str,
    targets: Sequence[dict[str, Any]] = (),
    ignore: dict[str, Any] | None = None,
    is_sentence: bool = False,
    explanation: str | None = None,
    messages: Sequence[dict[str, str]] = (),
) -> dict[str, Any]:
    """Make one row of `FEATURES`.

    Args:
        image: Path of the image file, or the bytes of an encoded image.
        image_id: Name of the image, unique within its source.
        source: Name of the dataset, as `data_scripts.load_source` knows it.
        task: One of `TASKS`. A "vqa" row has `messages`, a "conversation" row has `messages` and a target for each
            `[SEG]` of its answers, every other row has `targets`.
        targets: Dicts of `phrases` (list of str, at least one; a conversation needs none) and `rle`, all of the same
            size.
        ignore: RLE of the pixels that count neither as target nor as background, of the same size as the targets.
        is_sentence: Whether the phrases are complete questions instead of names.
        explanation: Why the targets answer the phrases.
        messages: Chat turns, alternating between user and assistant: dicts of `role`, `content` and, to train on an
            answer's reasoning, `reasoning_content`.

    Raises:
        ValueError: If the arguments contradict each other. The message names the source and the image.
    """
    where = f"Row {image_id!r} of {source!r}"
    if task not in TASKS:
        raise ValueError(f"{where}: expected a task among {TASKS}, got {task!r}.")
    num_masks = 0
    if task == "conversation":
        num_masks = count_masks(messages, where)
        targets = [{"phrases": [f"mask {number}"]} | target for number, target in enumerate(targets, start=1)]
    expected = {
        "vqa": bool(messages) and not targets,
        "conversation": bool(messages) and len(targets) == num_masks,
    }.get(task, bool(targets) and not messages)
    if not expected:
        what = {"vqa": "messages and no targets", "conversation": f"messages and {num_masks} targets, one per [SEG]"}
        raise ValueError(
            f"{where}: expected {what.get(task, 'targets and no messages')} in a {task} row, got {len(targets)} "
            f"targets and {len(messages)} messages."
        )
    for index, target in enumerate(targets):
        phrases = target["phrases"]
        if isinstance(phrases, str) or not phrases or not all(isinstance(p, str) and p.strip() for p in phrases):
            raise ValueError(f"{where}: expected a list of non-empty phrases for target {index}, got {phrases!r}.")
    sizes = {rle_size(rle) for rle in [target["rle"] for target in targets] + ([ignore] if ignore else [])}
    if len(sizes) > 1:
        raise ValueError(f"{where}: expected all masks to have the size of the image, got the sizes {sorted(sizes)}.")
    if task == "vqa":
        _check_roles(messages, where)
    return {
        "image": {"path": image, "bytes": None} if isinstance(image, str) else {"path": None, "bytes": image},
        "image_id": image_id,
        "source": source,
        "task": task,
        "targets": [
            {"phrases": [replace_surrogates(phrase) for phrase in target["phrases"]], "rle": target["rle"]}
            for target in targets
        ],
        "ignore": ignore,
        "is_sentence": is_sentence,
        "explanation": explanation and replace_surrogates(explanation),
        "messages": [_make_message(message) for message in messages],
    }


def count_masks(messages: Any, where: str) -> int:
    """Return how many masks a conversation asks for: the number of `[SEG]` in its answers.

    Args:
        messages: As in [`make_row`].
        where: Beginning of error messages.

    Raises:
        ValueError: If these are no pairs of messages with text.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{where}: expected messages, a list of `role` and `content`, got {messages!r:.100}.")
    _check_roles(messages, where)
    for message in messages:
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise ValueError(
                f"{where}: expected text as the `content` of every message, got {message['content']!r:.100} of the "
                f"{message['role']}."
            )
    return sum(message["content"].count(SEG_TOKEN) for message in messages if message["role"] == "assistant")


def _check_roles(messages: Sequence[dict[str, str]], where: str):
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"{where}: expected pairs of user and assistant messages, got the roles {roles}.")


def _make_message(message: dict[str, str]) -> dict[str, str | None]:
    names = FEATURES["messages"].feature
    return {name: message.get(name) and replace_surrogates(message[name]) for name in names}


def describe_row(row: dict[str, Any]) -> str:
    """Return what identifies a row in an error message: image, source and file."""
    path = (row["image"] or {}).get("path")
    return f"Row {row['image_id']!r} of {row['source']!r}" + (f" (file {path})" if path else "")
