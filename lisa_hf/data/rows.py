"""The one row format of every data set, and the codec of its masks.

A row is one image with everything that is annotated on it. Masks stay compressed COCO run-length encodings (RLE: a
dict of `size` [H, W] and `counts` bytes) from the builder to the collator, which decodes the few that were sampled.
"""

from collections.abc import Sequence
from typing import Any

from datasets import Features, Image, List, Value

from .masks import RLE_FEATURES, rle_size


TASKS = ("semantic", "referring", "reasoning", "vqa")


FEATURES = Features(
    {
        "image": Image(),
        "image_id": Value("string"),
        "source": Value("string"),
        "task": Value("string"),
        # One target per annotation; its phrases are interchangeable. Targets that share a phrase are wanted together.
        "targets": List({"phrases": List(Value("string")), "rle": RLE_FEATURES}),
        "ignore": RLE_FEATURES,
        "is_sentence": Value("bool"),
        "explanation": Value("string"),
        "messages": List({"role": Value("string"), "content": Value("string")}),
    }
)


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
    """Makes one row that fits `FEATURES`.

    Args:
        image: Path of the image file, or the encoded file itself (for images that are made, not stored).
        image_id: Name of the image within its source, for messages and for joining results.
        source: Name of the data set, as `data_scripts.load_source` knows it.
        task: One of `TASKS`. A "vqa" row has `messages`, every other row has `targets`.
        targets: Dicts of `phrases` (list of str, at least one) and `rle`, all of one size.
        ignore: RLE of the pixels that count neither as target nor as background, of the targets' size.
        is_sentence: Whether the phrases are whole questions instead of names.
        explanation: Why the targets answer the phrases.
        messages: Chat turns: dicts of `role` ("user" and "assistant" in turn, beginning with "user") and `content`.

    Raises:
        ValueError: If the parts contradict each other; the message names the source and the image.
    """
    where = f"Row {image_id!r} of {source!r}"
    if task not in TASKS:
        raise ValueError(f"{where}: the task is one of {TASKS}, but found {task!r}.")
    if task == "vqa" and (targets or not messages):
        raise ValueError(
            f"{where}: a vqa row has messages and no targets, but found {len(messages)} messages and "
            f"{len(targets)} targets."
        )
    if task != "vqa" and (messages or not targets):
        raise ValueError(
            f"{where}: a {task} row has targets and no messages, but found {len(targets)} targets and "
            f"{len(messages)} messages."
        )
    for index, target in enumerate(targets):
        phrases = target["phrases"]
        if isinstance(phrases, str) or not phrases or not all(isinstance(p, str) and p.strip() for p in phrases):
            raise ValueError(f"{where}: target {index} needs a list of non-empty phrases, but found {phrases!r}.")
    sizes = {rle_size(rle) for rle in [target["rle"] for target in targets] + ([ignore] if ignore else [])}
    if len(sizes) > 1:
        raise ValueError(f"{where}: all masks of a row have the image's size, but found the sizes {sorted(sizes)}.")
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"{where}: messages are pairs of user and assistant turns, but found the roles {roles}.")
    return {
        "image": {"path": image, "bytes": None} if isinstance(image, str) else {"path": None, "bytes": image},
        "image_id": image_id,
        "source": source,
        "task": task,
        "targets": [{"phrases": list(target["phrases"]), "rle": target["rle"]} for target in targets],
        "ignore": ignore,
        "is_sentence": is_sentence,
        "explanation": explanation,
        "messages": [{"role": message["role"], "content": message["content"]} for message in messages],
    }
