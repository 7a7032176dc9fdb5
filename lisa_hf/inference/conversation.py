"""A conversation about one image, in several turns, with streamed text and masks that stay."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import PIL.Image
import torch
from transformers import Cache, StoppingCriteriaList, TextIteratorStreamer

from ..model.images import load_image
from ..model.mask_backbone import encode_images
from ..model.modeling_lisa import LisaForConditionalGeneration
from ..model.pipeline_lisa import Answer, read_answers
from ..model.processing_lisa import LisaProcessor


@dataclass
class Turn:
    """A question and the model's answer: text, with a mask per `[SEG]`."""

    question: str
    answer: Answer


def _message(role: str, text: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}


class Conversation:
    """Successive questions about one image, each answered with knowledge of the earlier turns.

        conversation = Conversation(model, processor, "photo.jpg")
        for text in conversation.ask("What is red?"):
            print(text, end="")
        conversation.turns[-1].answer.masks

    The image is encoded once, and earlier turns stay in the language model's KV cache.

    Args:
        model: A LISA in evaluation mode.
        processor: The model's processor.
        image: The image, in any form that [`load_image`] takes.
        max_new_tokens: Longest answer, in tokens.

    Attributes:
        image: The image, upright, in RGB.
        turns: The turns so far, a list of [`Turn`].
    """

    def __init__(
        self, model: LisaForConditionalGeneration, processor: LisaProcessor, image, max_new_tokens: int = 256
    ):
        self.model = model
        self.processor = processor
        self.image: PIL.Image.Image = load_image(image)
        self.max_new_tokens = max_new_tokens
        self.turns: list[Turn] = []
        self._image_inputs = processor.preprocess_images([self.image])
        self._is_stopped = threading.Event()  # for the last answer
        self._answering = threading.Lock()
        self._cache: Cache | None = None
        self._cached_ids = torch.empty(0, dtype=torch.int64)  # [L], tokens in the cache

    def ask(self, question: str, **generate_kwargs) -> Iterator[str]:
        """Ask a question, and yield the answer's text piece by piece while it is generated.

        After the last piece, `turns` has one more turn. Closing the iterator stops the answer; the part generated so
        far becomes the turn's answer.

        Args:
            question: The question, without an image token.
            generate_kwargs: Further arguments of [`LisaForConditionalGeneration.generate`].
        """
        prompt = self.processor.apply_chat_template(
            self.messages(question), add_generation_prompt=True, tokenize=False
        )
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stop()  # an answer whose iterator was abandoned without closing it
        is_stopped = self._is_stopped = threading.Event()
        with ThreadPoolExecutor(max_workers=1) as executor:
            answer = executor.submit(self._answer, prompt, streamer, is_stopped, generate_kwargs)
            answer.add_done_callback(lambda _: streamer.end())  # after an error too
            try:
                yield next(streamer, "").lstrip()
                yield from streamer
            finally:  # even if the caller closes the iterator
                is_stopped.set()
                self.turns.append(Turn(question, answer.result()))

    def stop(self) -> None:
        """Stop the current answer at its next token. May be called from any thread."""
        self._is_stopped.set()

    def messages(self, question: str) -> list[dict]:
        """Return the chat messages up to a question."""
        messages = []
        for turn in self.turns:
            messages += [_message("user", turn.question), _message("assistant", turn.answer.text)]
        messages.append(_message("user", question))
        messages[0]["content"].insert(0, {"type": "image"})
        return messages

    def _answer(
        self, prompt: str, streamer: TextIteratorStreamer, is_stopped: threading.Event, generate_kwargs: dict
    ) -> Answer:
        """Generate the answer to a prompt after the previous one has ended, reusing the cache of their prefix."""
        with self._answering:
            return self._generate(prompt, streamer, is_stopped, generate_kwargs)

    def _generate(
        self, prompt: str, streamer: TextIteratorStreamer, is_stopped: threading.Event, generate_kwargs: dict
    ) -> Answer:
        def should_stop(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
            return torch.full((len(input_ids),), is_stopped.is_set(), device=input_ids.device)  # [N]

        # 1. The image, once.
        features = self._image_inputs.cached_features
        if "image_embeddings" not in features:
            pixels = self._image_inputs.inputs.pop("mask_pixel_values")  # [1, 3, S, S]
            pixels = pixels.to(self.model.device, self.model.dtype)
            with torch.no_grad():
                features["image_embeddings"] = encode_images(self.model.mask_model, pixels)
        # 2. The answer.
        inputs = self.processor(self._image_inputs, prompt).to(self.model.device)
        output = self.model.generate(
            **inputs,
            past_key_values=self._reusable_cache(inputs["input_ids"][0].cpu()),
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([should_stop]),
            **{"max_new_tokens": self.max_new_tokens, "do_sample": False, **generate_kwargs},
        )
        # 3. What the next answer can start from. The last token was sampled, but not read.
        self._cache, self._cached_ids = output.past_key_values, output.sequences[0, :-1].cpu()
        return read_answers(self.processor, inputs, output)[0]

    def _reusable_cache(self, input_ids: torch.Tensor) -> Cache | None:
        """Crop the cache to the prefix of a prompt `(L,)`; return None if the image is not part of it."""
        cache, self._cache = self._cache, None
        if cache is None:
            return None
        # Leave at least one token to read.
        length = min(len(self._cached_ids), len(input_ids) - 1)
        is_equal = self._cached_ids[:length] == input_ids[:length]
        num_equal = int(is_equal.long().cumprod(0).sum())
        image_positions = (input_ids == self.model.config.vlm_config.image_token_id).nonzero()
        if num_equal <= int(image_positions.max()):
            return None
        try:
            cache.crop(num_equal - len(self._cached_ids))
        except RuntimeError:  # layers with a full window or a recurrent state cannot be rolled back
            return None
        return cache
