"""Turn a conversation into text, find the answers in it, and label their tokens."""

import re
from functools import lru_cache

from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from .losses import IGNORE_INDEX


def user_message(text: str) -> dict:
    """Return the chat message that asks about an image."""
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}


def render(tokenizer, chat_template: str, messages: list[dict], **kwargs) -> tuple[str, list]:
    """Return the text of a conversation and the character spans of its `{% generation %}` blocks."""
    template = {"chat_template": chat_template, **tokenizer.special_tokens_map}
    (text,), spans = render_jinja_template(conversations=[messages], **template, **kwargs)
    return text, spans


@lru_cache
def render_question(vlm_processor: ProcessorMixin, chat_template: str) -> str:
    """Return the prompt of a question, once for all batches."""
    return render(vlm_processor.tokenizer, chat_template, [user_message("?")], add_generation_prompt=True)[0]


def render_with_spans(tokenizer, chat_template: str, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a conversation and the character spans of the assistant's turns in it.

    A template with `{% generation %}` gives the spans. Without it, a turn is what it adds to the text of the turns
    before it and the generation prompt.
    """
    if re.search(r"\{%-?\s*generation\s*-?%\}", chat_template):
        text, (spans,) = render(tokenizer, chat_template, messages, return_assistant_tokens_mask=True)
        return text, [tuple(span) for span in spans]
    text, _ = render(tokenizer, chat_template, messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, _ = render(tokenizer, chat_template, messages[:index], add_generation_prompt=True)
        after, _ = render(tokenizer, chat_template, messages[: index + 1])
        if not (after.startswith(before) and text.startswith(after.rstrip())):
            raise ValueError(
                "expected a chat template that keeps earlier turns as they are, got one that rewrites earlier "
                "turns when a turn is added, so the assistant's turns cannot be found. Wrap what the assistant "
                "says in `{% generation %}` and `{% endgeneration %}` and pass the template as `chat_template`."
            )
        spans.append((len(before), len(after.rstrip())))
    return text, spans


def shift(position: int, insertions: list[tuple[int, int]]) -> int:
    """Return where a character of a text is after insertions, see [`make_labels`]."""
    return position + sum(length for start, length in insertions if start <= position)


def make_labels(
    input_ids: list[int],
    offsets: list[tuple[int, int]],
    spans: list[tuple[int, int]],
    insertions: list[tuple[int, int]],
) -> list[int]:
    """Return the ids of the tokens that overlap one of the spans, and -100 for the others.

    Args:
        offsets: Characters (start, end) of each token, in the text after insertions.
        spans: Characters (start, end) of the assistant's turns, in the text before insertions.
        insertions: Positions before insertions, each with the number of characters inserted before it.
    """
    spans = [[shift(position, insertions) for position in span] for span in spans]
    return [
        token if any(start < span_end and end > span_start for span_start, span_end in spans) else IGNORE_INDEX
        for token, (start, end) in zip(input_ids, offsets)
    ]
