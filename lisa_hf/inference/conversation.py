"""A conversation about one image, in several turns, with text that streams and masks that stay."""

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
    """A question, and the model's answer: text, and a mask per `[SEG]` in it."""

    question: str
    answer: Answer


def _message(role: str, text: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}


class Conversation:
    """Questions about one image in turn, each of which the model answers knowing the earlier ones.

        conversation = Conversation(model, processor, "photo.jpg")
        for text in conversation.ask("What is red?"):
            print(text, end="")
        conversation.turns[-1].answer.masks

    The image is encoded once, and what the language model has read of earlier turns stays in its KV cache.

    Args:
        model: A LISA in evaluation mode.
        processor: The model's processor.
        image: The image, of any kind that [`load_image`] takes.
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
        self._is_stopped = threading.Event()  # of the last answer
        self._answering = threading.Lock()
        self._cache: Cache | None = None
        self._cached_ids = torch.empty(0, dtype=torch.int64)  # [L], tokens that the cache holds

    def ask(self, question: str, **generate_kwargs) -> Iterator[str]:
        """Ask a question, and yield the answer's text piece by piece while it is generated.

        With the last piece, `turns` has one more turn. Closing the iterator stops the answer; what there is of it
        becomes the turn's answer.

        Args:
            question: The question, without image token.
            generate_kwargs: Further arguments of [`LisaForConditionalGeneration.generate`].
        """
        prompt = self.processor.apply_chat_template(
            self.messages(question), add_generation_prompt=True, tokenize=False
        )
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stop()  # an answer whose iterator was left and not closed
        is_stopped = self._is_stopped = threading.Event()
        with ThreadPoolExecutor(max_workers=1) as executor:
            answer = executor.submit(self._answer, prompt, streamer, is_stopped, generate_kwargs)
            answer.add_done_callback(lambda _: streamer.end())  # after an error too
            try:
                yield next(streamer, "").lstrip()
                yield from streamer
            finally:  # also if the caller closes the iterator
                is_stopped.set()
                self.turns.append(Turn(question, answer.result()))

    def stop(self) -> None:
        """Stop the answer that is being generated at its next token; it may be called from anywhere."""
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
        """Generate the answer to a prompt once the one before has ended, from the cache where both begin alike."""
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
        # 3. What the next answer can begin with. The last token was chosen, but not read.
        self._cache, self._cached_ids = output.past_key_values, output.sequences[0, :-1].cpu()
        return read_answers(self.processor, inputs, output)[0]

    def _reusable_cache(self, input_ids: torch.Tensor) -> Cache | None:
        """Cut the cache to the tokens that a prompt `(L,)` begins with; return None if the image is not among them."""
        cache, self._cache = self._cache, None
        if cache is None:
            return None
        # At least one token is left to read.
        length = min(len(self._cached_ids), len(input_ids) - 1)
        is_equal = self._cached_ids[:length] == input_ids[:length]
        num_equal = int(is_equal.long().cumprod(0).sum())
        image_positions = (input_ids == self.model.config.vlm_config.image_token_id).nonzero()
        if num_equal <= int(image_positions.max()):
            return None
        try:
            cache.crop(num_equal - len(self._cached_ids))
        except RuntimeError:  # layers with a full window or a running state cannot go back
            return None
        return cache
