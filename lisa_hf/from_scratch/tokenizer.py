"""A small tokenizer trained on the texts of a run, so that a question about a phrase is only a few tokens."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from ..data.prompts import ANSWERS, EXPLANATORY_QUESTIONS, LONG_QUESTIONS, SHORT_QUESTIONS
from ..model.processing_lisa import SEG_TOKEN


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: a frequent word is one token, and any other text can be spelled."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def add_template_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """Add one token for each text that LISA's templates put before a phrase, after it, and before `[SEG]`.

    A small model attends evenly at first and would overlook a phrase of two tokens among the twenty of a template.
    """
    questions = [text.split("{phrase}") for text in (*SHORT_QUESTIONS, *LONG_QUESTIONS, *EXPLANATORY_QUESTIONS)]
    texts = {text for before, after in questions for text in (before.rstrip(), after)}
    texts |= {text.split(SEG_TOKEN)[0].strip() for text in ANSWERS}
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in sorted(texts - {""})])


def row_texts(rows) -> Iterable[str]:
    """Yield all texts of a source's rows, for [`train_tokenizer`]."""
    # Roughly as often as training uses these words; a word seen only once is not worth a token.
    yield from ["USER: ASSISTANT:"] * 100
    for row in rows.remove_columns("image"):
        yield from (phrase for target in row["targets"] for phrase in target["phrases"])
        yield from (message["content"] for message in row["messages"])
        if row["explanation"]:
            yield row["explanation"]
