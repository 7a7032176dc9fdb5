"""Turn conversations into text: what generation sees before each answer, the answer, and the token that ends it.

A chat template may render a turn differently once others follow: some drop earlier thoughts, some show a thought only
in the last turn. So the text before an answer is always the template's prompt for the previous turns, from which
generation starts, and never what the template makes of the finished conversation.
"""

import datetime
import re
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import jinja2
import jinja2.nodes
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .losses import IGNORE_INDEX


# Private-use characters, which no text needs. Two are placeholders for an answer and a thought, to see what a template
# writes around them. The third marks where a text is split before tokenization, so that a user's `[SEG]` becomes
# letters.
ANSWER_MARK, THOUGHT_MARK, CUT_MARK = "\U0010f000", "\U0010f001", "\U0010f002"
IMAGE_PLACEHOLDER = "<image>"
RENDER_SECONDS = 20  # for a template's first text, which takes milliseconds
RENDER_BYTES = 2**30  # of memory
_MEMORY_LOCK = threading.Lock()
MAX_PROMPT = 100_000  # characters of a short question, with what the template writes around it
# Names in chat templates of the variable that lets the model think before it answers.
THINKING_VARIABLES = ("enable_thinking", "thinking")
# The date that templates insert as today: with the real one, a model would never again see a text it was trained on.
TODAY = datetime.date(2025, 1, 1)


class ConversationError(ValueError):
    """Raised for a conversation that cannot be trained on, although others can."""


def user_message(text: str) -> dict:
    """Return the chat message that asks about an image."""
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": leave_out_placeholder(text)}]}


def leave_out_placeholder(text: str) -> str:
    """Return a text without `<image>`, a placeholder in many datasets: a message has a separate part for the image."""
    return text.replace(IMAGE_PLACEHOLDER, "").strip() if IMAGE_PLACEHOLDER in text else text


# ---- what users write -----------------------------------------------------------------------------------------------


def replace_surrogates(text: str) -> str:
    """Return a text with "\ufffd" for lone surrogates, which JSON can spell but no tokenizer accepts."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def token_pattern(tokens: Iterable[str]) -> re.Pattern:
    """Return a zero-width pattern that matches where one of the tokens begins."""
    # A single-character token cannot be split; such a padding token ("!") is also ordinary text.
    tokens = [token for token in tokens if len(token) > 1]
    first = "".join(sorted({re.escape(token[0]) for token in tokens}))
    return re.compile(f"(?=[{first}])(?={'|'.join(map(re.escape, tokens))})" if tokens else "(?!)")


def escape_tokens(text: str, pattern: re.Pattern) -> str:
    """Mark where to split a text so that no token of a [`token_pattern`] is found in it, see [`tokenize`]."""
    text = replace_surrogates(text).replace(ANSWER_MARK, "")
    cuts = [match.start() + 1 for match in pattern.finditer(text)]
    return CUT_MARK.join(text[start:end] for start, end in zip([0, *cuts], [*cuts, None]))


# ---- text -----------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A text of the language model.

    Args:
        text: A prompt, or prompts and answers in turn.
        answers: Characters (start, end) of the answers, each with the token that ends it.
    """

    text: str
    answers: list[tuple[int, int]] = field(default_factory=list)

    @property
    def prompt_end(self) -> int:
        """The number of characters before the first answer."""
        return self.answers[0][0] if self.answers else len(self.text)

    def split(self) -> list["Row"]:
        """Return one row per answer, each with everything before it."""
        return [Row(self.text[:end], [(start, end)]) for start, end in self.answers] or [self]

    def cut(self) -> "Row":
        """Return a row truncated before its only answer."""
        ((start, end),) = self.answers
        return Row(self.text[:start] + CUT_MARK + self.text[start:], [(start + 1, end + 1)])


class ChatTemplate:
    """A chat template, together with the tokenizer of its texts.

    Args:
        tokenizer: Tokenizer of the language model.
        jinja: The template.
        thinking: Whether the model may think before it answers, if the template has this choice.
        image_tokens: Tokens that a VLM's processor replaces or writes for images.
        answer_tokens: Special tokens that answers may have. All others are escaped, and these too in other messages.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        jinja: str,
        thinking: bool = False,
        image_tokens: tuple[str, ...] = (),
        answer_tokens: tuple[str, ...] = (),
    ):
        if isinstance(jinja, dict):  # several, by name
            jinja = jinja.get("default")
        if not isinstance(jinja, str):
            raise ValueError(
                "expected a model with a chat template, got one without. Pass `chat_template`: the name of one of "
                "LISA's, such as llava_v1, or a file."
            )
        self.tokenizer = tokenizer
        date_call = r"strftime_now\(\s*(['\"])(.*?)\1\s*\)"
        self.jinja = re.sub(date_call, lambda call: repr(TODAY.strftime(call[2])), jinja)
        self.thinking = thinking
        self.variables = {name: thinking for name in THINKING_VARIABLES if name in _find_variables(jinja)}
        # Tokens that are more than their letters: special ones, and others that the template writes (`<think>`),
        # except Gemma's tokens for whitespace.
        added = tokenizer.added_tokens_decoder.values()
        tokens = {token.content for token in added if token.special or token.content in jinja}
        tokens |= {*tokenizer.all_special_tokens, *image_tokens}
        self.special_tokens = {token for token in tokens - {*answer_tokens} if not token.isspace()}
        self.in_answers = token_pattern(self.special_tokens)
        self.in_others = token_pattern(self.special_tokens | {*answer_tokens})

    def prepare(self, messages: list[dict]) -> list[dict]:
        """Return messages that any template can render: content as parts, special tokens in texts escaped."""
        return [self._prepare(message) for message in messages]

    def _prepare(self, message: dict) -> dict:
        is_answer = message["role"] == "assistant"
        pattern = self.in_answers if is_answer else self.in_others
        parts = message["content"]
        if isinstance(parts, str):  # some templates drop strings
            parts = [{"type": "text", "text": parts}]
        parts = [part | {"text": escape_tokens(part["text"], pattern)} if "text" in part else part for part in parts]
        text = "".join(part.get("text", "") for part in parts)
        if is_answer:  # some templates write only the first part of an answer
            parts = [{"type": "text", "text": text}]
        takes_string = message["role"] == "system" and self._takes_system_string
        message = {**message, "content": text if takes_string else parts}
        if message.get("reasoning_content"):
            message["reasoning_content"] = escape_tokens(message["reasoning_content"], self.in_others)
        return message

    @cached_property
    def _takes_system_string(self) -> bool:
        """Whether the template writes a string as system message; it may then print parts as Python (Gemma 4)."""
        try:
            return ANSWER_MARK in self.render([{"role": "system", "content": ANSWER_MARK}, user_message("?")])
        except ValueError:
            return False

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """Return the text of prepared messages."""
        try:
            (text,), _ = render_jinja_template(
                conversations=[messages],
                chat_template=self.jinja,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_tokens_map,
                **self.variables,
            )
        except Exception as error:  # a text-only template adds a list to a string; others divide by zero
            raise ValueError(
                f"expected a chat template that takes messages with parts of content (text, image), got the error "
                f"'{str(error) or type(error).__name__}'. Pass another `chat_template`."
            ) from error
        return text

    @cached_property
    def example_prompt(self) -> str:
        """The prompt of a question about an image.

        Raises:
            ValueError: If the template does not finish within `RENDER_SECONDS`, or takes more than `RENDER_BYTES`.
                Templates come with models and are not trusted.
        """
        results: list[str | ValueError] = []

        def render():
            try:
                results.append(self.render([user_message("?")], add_generation_prompt=True))
            except ValueError as error:
                results.append(error)

        thread = threading.Thread(target=render, daemon=True)
        with limited_memory(RENDER_BYTES):
            thread.start()
            thread.join(RENDER_SECONDS)
        if not results:
            raise ValueError(
                f"expected a chat template that writes a question within {RENDER_SECONDS} seconds, got one that does "
                "not. Pass another `chat_template`."
            )
        if isinstance(results[0], ValueError):
            raise results[0]
        if len(results[0]) > MAX_PROMPT:
            raise ValueError(
                f"expected a chat template that writes a question in {MAX_PROMPT} characters at most, got "
                f"{len(results[0])}. Pass another `chat_template`."
            )
        return results[0]

    def rows(self, messages: list[dict]) -> list[Row]:
        """Return the rows that train the answers of a conversation, except those with `is_context`.

        This is one row if the prompt of each answer repeats the previous answers. Otherwise, as with templates that
        show a thought only in the last turn, an answer gets a separate row.

        Raises:
            ConversationError: If the template does not write an answer, or its reasoning, verbatim.
            ValueError: If the template does not accept such messages, or drops all answers.
        """
        messages = self.prepare(messages)
        rows = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or message.get("is_context"):
                continue
            prompt, answer = self._split_turn(messages[: index + 1])
            answers = [(len(prompt), len(prompt) + len(answer))]
            if rows and prompt.startswith(rows[-1].text):
                answers = rows.pop().answers + answers
            rows.append(Row(prompt + answer, answers))
        return rows or [Row(self.render(messages))]

    def _split_turn(self, messages: list[dict]) -> tuple[str, str]:
        """Return the prompt of the last message, and the text of that message up to the token that ends it."""
        prompt, text = self.render(messages[:-1], add_generation_prompt=True), self.render(messages)
        before, after = prompt, self.after_answer
        if not (text.startswith(before) and text.endswith(after)):
            # The finished turn does not start like its prompt, which may have an empty thought (Gemma 4) or different
            # whitespace (LLaVA-OneVision).
            before, after = self._text_around_answer(messages)
        answer = text[len(before) : len(text) - len(after)]
        self._check_answer(answer, messages[-1])
        return prompt, answer + self.answer_end

    def _check_answer(self, answer: str, message: dict) -> None:
        """Raise a [`ConversationError`] unless the text of an answer contains what its message says."""
        reasoning = message.get("reasoning_content") or ""
        if reasoning and not self.thinking:
            raise ConversationError(
                f"expected answers without reasoning_content while thinking is off, got {reasoning[:60]!r}. Set "
                "`thinking: on` to train on it, or remove it."
            )
        for name, text in (("content", message["content"][0]["text"]), ("reasoning_content", reasoning)):
            if text.strip() not in answer:
                raise ConversationError(
                    f"expected a chat template that writes an answer's {name} verbatim, got {answer!r} for {text!r}. "
                    "Change the text, or pass another `chat_template`."
                )

    def _text_around_answer(self, messages: list[dict]) -> tuple[str, str]:
        """Return what the template writes before and after the content of the last message."""
        marked = {**messages[-1], "content": [{"type": "text", "text": ANSWER_MARK}]}
        text = self.render([*messages[:-1], marked])
        if text.count(ANSWER_MARK) != 1:
            raise ValueError(
                "expected a chat template that writes what the assistant says, got one that drops or repeats "
                "it. Pass another `chat_template`."
            )
        before, after = text.split(ANSWER_MARK)
        return before, after

    @cached_property
    def after_answer(self) -> str:
        """What the template writes after the content of the last answer."""
        return self._text_around_answer([user_message("?"), {"role": "assistant"}])[1]

    @cached_property
    def answer_end(self) -> str:
        """End of an answer: the template's text up to its first special token, or the tokenizer's end token."""
        text = self.after_answer
        ends = [text.find(token) + len(token) for token in self.special_tokens if token in text]
        if not ends and self.tokenizer.eos_token is None:
            raise ValueError(
                "expected a token that ends answers, got none: the chat template writes no special token after them, "
                "and the tokenizer has no `eos_token`. Pass another `chat_template`."
            )
        return text[: min(ends)] if ends else self.tokenizer.eos_token

    @cached_property
    def answer_end_token_id(self) -> int:
        """Id of the token that ends an answer, where generation must stop."""
        return self.tokenizer(self.answer_end, add_special_tokens=False)["input_ids"][-1]

    @cached_property
    def _thought_end(self) -> str:
        """Last word before the content of an answer with a thought, or one that the model must write; else ""."""
        before, _ = self._text_around_answer(
            [user_message("?"), {"role": "assistant", "reasoning_content": THOUGHT_MARK}]
        )
        start = (
            before.rpartition(THOUGHT_MARK)[2] if THOUGHT_MARK in before else before.removeprefix(self.example_prompt)
        )
        return start.split()[-1] if start.split() and start != before else ""

    def read_answer(self, ids: list[int]) -> tuple[str, str]:
        """Return the thought and the text of a generated answer, without special tokens."""
        end = self._thought_end
        token = self.tokenizer.added_tokens_encoder.get(end)
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        if token in ids:  # it may be one that decoding skips
            thought, text = decode(ids[: ids.index(token)]), decode(ids[ids.index(token) + 1 :])
        else:
            thought, text = "", decode(ids)
            if end and end in text:
                thought, _, text = text.partition(end)
        return thought.strip(), text.strip()


@contextmanager
def limited_memory(num_bytes: int) -> Iterator[None]:
    """Raise a `MemoryError` in all threads of this process that take more memory in this context; on Linux alone."""
    statistics = Path("/proc/self/statm")
    if not statistics.exists():
        yield
        return
    import resource  # which Windows lacks

    with _MEMORY_LOCK:  # another thread would take this limit for the one to restore
        limits = soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = int(statistics.read_text().split()[0]) * resource.getpagesize() + num_bytes
        infinite = resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_AS, (limit if soft == infinite else min(limit, soft), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)


def _find_variables(template: str) -> set[str]:
    """Return the names of the variables that a template reads."""
    template = re.sub(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}", "", template)  # a tag specific to transformers
    try:
        parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except (jinja2.TemplateSyntaxError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise ValueError(f"expected a chat template in Jinja, got '{error}' in line {line}. Correct it.") from error
    if parsed.find(jinja2.nodes.Pow):  # nothing stops Python while it computes one
        raise ValueError("expected a chat template without powers (`**`), got one with them. Pass another.")
    # Not `find_undeclared_variables`, which computes what is constant, of any size.
    return {name.name for name in parsed.find_all(jinja2.nodes.Name)}


# ---- tokens ---------------------------------------------------------------------------------------------------------


@dataclass
class TokenizedRow:
    """A row, its token ids, and the characters (start, end) of each token."""

    row: Row
    ids: list[int]
    offsets: list[tuple[int, int]]

    @property
    def joins_prompt_and_answer(self) -> bool:
        """Whether a token has characters of a prompt and of its answer."""
        ends = self._ends
        for answer_start, _ in self.row.answers:
            first = bisect_right(ends, answer_start)  # the first token that ends after it
            # Some tokenizers exclude the space before a word from its offsets: it begins where the last token ends.
            if first < len(ends) and (ends[first - 1] if first else 0) < answer_start:
                return True
        return False

    def labels(self) -> list[int]:
        """Return the ids of the answers' tokens, and -100 for the others."""
        ends = self._ends
        starts = [start for start, _ in self.offsets[: len(ends)]]
        labels = [IGNORE_INDEX] * len(self.ids)
        for answer_start, answer_end in self.row.answers:
            answer = slice(bisect_right(ends, answer_start), bisect_left(starts, answer_end))
            labels[answer] = self.ids[answer]
        return labels

    @property
    def _ends(self) -> list[int]:
        """Ends of the tokens, without trailing tokens that have no characters."""
        ends = [end for _, end in self.offsets]
        while ends and ends[-1] == 0:
            ends.pop()
        return ends


def tokenize(
    tokenizer: PreTrainedTokenizerBase, rows: list[Row], add_special_tokens: bool
) -> list[list[TokenizedRow]]:
    """Tokenize rows. No token crosses a [`CUT_MARK`], or the border between a prompt and its answer.

    Returns:
        The resulting rows for each row: one, or one per answer if a prompt and its answer would share a token.
    """
    encoding = tokenizer(
        [row.text for row in rows], add_special_tokens=add_special_tokens, return_offsets_mapping=True
    )
    groups = []
    for row, ids, offsets in zip(rows, encoding["input_ids"], encoding["offset_mapping"]):
        tokenized = TokenizedRow(row, ids, offsets)
        if CUT_MARK in row.text:
            tokenized = _tokenize_pieces(tokenizer, tokenized)
        if tokenized.joins_prompt_and_answer:
            # Generation starts from the prompt's own tokens.
            parts = [TokenizedRow(part.cut(), ids, offsets) for part in row.split()]
            groups.append([_tokenize_pieces(tokenizer, part) for part in parts])
        else:
            groups.append([tokenized])
    return groups


def _tokenize_pieces(tokenizer: PreTrainedTokenizerBase, whole: TokenizedRow) -> TokenizedRow:
    """Tokenize the pieces of a text with cuts, after the leading tokens that are not part of its characters."""
    num_added = next((index for index, (_, end) in enumerate(whole.offsets) if end > 0), 0)
    ids, offsets = list(whole.ids[:num_added]), list(whole.offsets[:num_added])
    position = 0
    for piece in whole.row.text.split(CUT_MARK):
        piece_ids, piece_offsets = _tokenize_piece(tokenizer, piece, is_first=position == 0)
        ids += piece_ids
        offsets += [(position + start, position + end) for start, end in piece_offsets]
        position += len(piece) + 1
    return TokenizedRow(whole.row, ids, offsets)


def _tokenize_piece(tokenizer: PreTrainedTokenizerBase, piece: str, is_first: bool) -> tuple[list, list]:
    """Return the ids of a piece, and the characters (start, end) of each."""
    options = {"add_special_tokens": False, "return_offsets_mapping": True}
    if not is_first:
        # SentencePiece puts a space before a text, but not after a line break.
        line_break = tokenizer("\n", add_special_tokens=False)["input_ids"]
        encoding = tokenizer("\n" + piece, **options)
        if encoding["input_ids"][: len(line_break)] == line_break:
            offsets = encoding["offset_mapping"][len(line_break) :]
            return encoding["input_ids"][len(line_break) :], [(start - 1, end - 1) for start, end in offsets]
    encoding = tokenizer(piece, **options)
    return encoding["input_ids"], encoding["offset_mapping"]
