"""LisaProcessor: the VLM's own processor and the mask model's image processor, as one."""

import os
from dataclasses import dataclass, field
from functools import lru_cache, partial

import PIL.Image
import torch
from transformers import AddedToken, AutoProcessor, BatchFeature, LlamaTokenizer, ProcessorMixin

from .conversation_text import ChatTemplate, ConversationError, Row, tokenize
from .image_processor_backends import (
    image_processor_class,
    image_processor_type,
    load_image_processor,
    load_vlm_processor,
    transformers_class,
)
from .images import load_image
from .losses import IGNORE_INDEX
from .mask_backbone import upscale_masks
from .pixel_normalization import clear_padding, holds_uint8_pixels, normalize, normalizes_last
from .upstream_fixes import keep_llama_legacy
from .vlm_text_layout import (
    TYPE_IDS,
    TextLayout,
    call_vlm_processor,
    find_text_layout,
    is_vision_input,
    split_expanded_text,
)


SEG_TOKEN = "[SEG]"
IMAGE_TOKENS = ("<im_start>", "<im_end>")  # around the image in LISA's templates


class TextTooLongError(ConversationError):
    """Raised if a conversation is longer than `max_length` and truncating it would lose a `[SEG]` or the image."""


def add_tokens(tokenizer, tokens=(SEG_TOKEN,), lstrip: bool = True) -> None:
    """Add tokens so that they behave as in LISA's slow tokenizer.

    They absorb the spaces around them, so that `[SEG].` is one `[SEG]`, and are ordinary text for
    `decode(skip_special_tokens=True)`.

    Args:
        tokenizer: Tokenizer to add them to.
        tokens: Tokens to add.
        lstrip: Whether they absorb the spaces before them.
    """
    tokenizer.add_tokens([AddedToken(token, lstrip=lstrip, rstrip=True, normalized=False) for token in tokens])


@dataclass
class ImageInputs:
    """Output of [`LisaProcessor.preprocess_images`] for B images, before the texts about them are known.

    Args:
        inputs: Inputs of the model by name: the VLM's vision inputs (one entry per image), `mask_pixel_values`
            `(B, 3, S, S)`, `original_sizes` and `reshaped_input_sizes` `(B, 2)`.
        image_texts: Replacements for the image token in texts about each image, with one token per image feature; B
            str.
        type_id_names: Names of the VLM's per-token type ids, such as `mm_token_type_ids`.
        cached_features: `image_embeddings` and `vision_features` from a feature cache, which replace pixels.
    """

    inputs: dict[str, torch.Tensor]
    image_texts: list[str]
    type_id_names: list[str]
    cached_features: dict = field(default_factory=dict)


class LisaProcessor(ProcessorMixin):
    """Turn images and texts into the inputs of [`LisaForConditionalGeneration`].

        image_inputs = processor.preprocess_images(images)
        batch = processor.encode_conversations(image_inputs, conversations, image_indices)  # training
        batch = processor(image_inputs, prompts, image_indices)  # generation

    Both also accept the images themselves.

    Args:
        vlm_processor: Processor of the VLM, whose tokenizer knows `[SEG]` (see [`add_tokens`]).
        mask_image_processor: Image processor of the mask model.
        chat_template: Jinja template of conversations. Default: the VLM processor's own.
        thinking: Whether the model may think before it answers, in both training and generation, if the template has
            this choice. Answers may then have a `reasoning_content` to train on.
    """

    def __init__(self, vlm_processor=None, mask_image_processor=None, chat_template=None, thinking: bool = False):
        chat_template = chat_template or vlm_processor.chat_template or vlm_processor.tokenizer.chat_template
        super().__init__(mask_image_processor=mask_image_processor, chat_template=chat_template)
        self.thinking = thinking
        self.vlm_processor = vlm_processor
        self.tokenizer = vlm_processor.tokenizer
        if isinstance(self.tokenizer, LlamaTokenizer):
            keep_llama_legacy(self.tokenizer)
        if getattr(vlm_processor, "image_token", None) is None:
            raise ValueError(
                "expected a VLM whose texts have an image token, so that an answer can be about an image in a "
                f"conversation, got {type(vlm_processor).__name__}. Choose another VLM."
            )
        self.seg_token_id = self.tokenizer.convert_tokens_to_ids(SEG_TOKEN)
        if self.seg_token_id is None or self.seg_token_id == self.tokenizer.unk_token_id:
            raise ValueError(f"expected a tokenizer that knows {SEG_TOKEN}, got one that does not. Use `add_tokens`.")

    # ---- loading and saving -----------------------------------------------------------------------------------------

    @classmethod
    def from_vlm_mask_model_pretrained(cls, vlm: str, mask_model: str, chat_template: str | None = None):
        """Build the processor of a new LISA model.

        The tokenizer gets `[SEG]` and, if the chat template has them, `<im_start>` and `<im_end>`.

        Args:
            vlm: Hub id or directory of the VLM.
            mask_model: Hub id or directory of the mask model.
            chat_template: Jinja template of conversations. Default: the VLM's own.

        Raises:
            ValueError: If an image processor needs torchvision, which is not installed.
        """
        vlm_processor = load_vlm_processor(AutoProcessor, vlm)
        chat_template = chat_template or vlm_processor.chat_template or vlm_processor.tokenizer.chat_template
        tokenizer = vlm_processor.tokenizer
        prompt = ChatTemplate(tokenizer, chat_template).example_prompt
        # An answer's first [SEG] must not absorb the line break that ends many prompts: generation starts after it.
        add_tokens(tokenizer, lstrip=not prompt[-1].isspace())
        known = tokenizer.get_vocab()
        add_tokens(tokenizer, [token for token in IMAGE_TOKENS if token in chat_template and token not in known])
        return cls(
            vlm_processor=vlm_processor,
            mask_image_processor=load_image_processor(mask_model),
            chat_template=chat_template,
        )

    def to_dict(self) -> dict:
        """Return the content of `processor_config.json`: that of the VLM's processor and that of the mask model's."""
        # Both processors share one file at the root: a sub-folder for the VLM's would hide its tokenizer from
        # AutoTokenizer.
        processor_dict = self.vlm_processor.to_dict() | super().to_dict()
        processor_dict["vlm_processor_class"] = type(self.vlm_processor).__name__
        # transformers writes the same type for both backends, so it loads whichever is installed.
        for name, image_processor in (
            ("image_processor", self.vlm_processor.image_processor),
            ("mask_image_processor", self.mask_image_processor),
        ):
            processor_dict[name]["image_processor_type"] = image_processor_type(image_processor)
        return processor_dict

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Save the VLM's processor, then this one, whose `processor_config.json` replaces the VLM's."""
        self.vlm_processor.save_pretrained(save_directory)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Load a saved LISA processor, with the image processor backends that it was saved with.

        Args:
            pretrained_model_name_or_path: Hub id or directory of a LISA model.
            kwargs: Arguments of `ProcessorMixin.from_pretrained`.

        Raises:
            ValueError: If it is not a LISA processor, names classes that are not processors, or needs torchvision and
                that is not installed.
        """
        processor_dict, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "vlm_processor_class" not in processor_dict:
            raise ValueError(
                f"expected a LisaProcessor in {pretrained_model_name_or_path}, got a "
                f"{processor_dict.get('processor_class', 'processor')}. For a new model from a VLM and a mask model "
                "do `LisaProcessor.from_vlm_mask_model_pretrained`."
            )
        vlm_class = transformers_class(processor_dict["vlm_processor_class"], ProcessorMixin)
        mask_processor = processor_dict["mask_image_processor"]
        return cls(
            vlm_processor=load_vlm_processor(vlm_class, pretrained_model_name_or_path, **kwargs),
            mask_image_processor=image_processor_class(mask_processor["image_processor_type"])(**mask_processor),
            chat_template=processor_dict.get("chat_template"),
            thinking=processor_dict.get("thinking", False),
        )

    # ---- images -----------------------------------------------------------------------------------------------------

    def preprocess_images(
        self,
        images,
        original_sizes: list[list[int]] | None = None,
        do_normalize: bool = True,
        cached: ImageInputs | None = None,
        **kwargs,
    ) -> ImageInputs:
        """Preprocess B images for the VLM and the mask model, each image once, however many texts are about it.

        Args:
            images: Image or list of B images, of any kind that [`load_image`] takes; nested lists of one are accepted.
            original_sizes: (H, W) of each image file, if an image is a reduced copy of it. Default: the images' sizes.
            do_normalize: Whether to rescale and normalize pixels here. Otherwise they stay uint8 `(B, 3, H, W)`, a
                quarter of the bytes, for [`normalize_pixels`] on the model's device. If a VLM's processor pads or
                rearranges normalized pixels, all of this still happens here.
            cached: Entries of a feature cache for these images. Features replace the pixels of their encoder, and with
                the features of both encoders the images are not even decoded.
            kwargs: Arguments of the VLM's processor.

        Raises:
            ValueError: If there is no image, or one cannot be read.
        """
        if images is None:
            raise ValueError("expected at least one image, got none. Every text is about an image: pass `images`.")
        features = {} if cached is None else cached.cached_features
        if "vision_features" in features and "image_embeddings" in features:
            return cached
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        images = [load_image(image[0] if isinstance(image, (list, tuple)) else image) for image in images]
        if "vision_features" in features:
            inputs, image_texts, type_id_names = dict(cached.inputs), cached.image_texts, cached.type_id_names
        else:
            inputs, image_texts, type_id_names = self.preprocess_for_vlm(images, do_normalize, **kwargs)
        if "image_embeddings" in features:
            inputs = {**cached.inputs, **inputs}
        else:
            inputs |= self.preprocess_for_mask_model(images, original_sizes, do_normalize)
        return ImageInputs(inputs, image_texts, type_id_names, features)

    def preprocess_for_vlm(
        self, images: list[PIL.Image.Image], do_normalize: bool = True, **kwargs
    ) -> tuple[dict, list[str], list[str]]:
        """Return the VLM's vision inputs of B RGB images, and `image_texts` and `type_id_names` of [`ImageInputs`]."""
        if not do_normalize and normalizes_last(self.vlm_processor.image_processor):
            kwargs |= {"do_rescale": False, "do_normalize": False}
        # A question about each image reveals its vision inputs and the text that replaces the image token.
        question, layout = self.template.example_prompt, self._text_layout()
        outputs, texts = call_vlm_processor(self.vlm_processor, images, question, layout.takes_nested_images, **kwargs)
        inputs = {name: value for name, value in outputs.items() if is_vision_input(name)}
        image_texts = [split_expanded_text(text, question, self.image_token)[1] for text in texts]
        return inputs, image_texts, [name for name in outputs if name.endswith(TYPE_IDS)]

    def preprocess_for_mask_model(
        self,
        images: list[PIL.Image.Image],
        original_sizes: list[list[int]] | None = None,
        do_normalize: bool = True,
    ) -> dict:
        """Return `mask_pixel_values`, `original_sizes` and `reshaped_input_sizes` of B RGB images."""
        raw = {} if do_normalize else {"do_rescale": False, "do_normalize": False}
        mask_inputs = self.mask_image_processor(images, **raw)
        # SAM 2 and later stretch images to a square, so their processors do not report sizes.
        square = [self.mask_image_processor.size["height"], self.mask_image_processor.size["width"]]
        inputs = {
            "mask_pixel_values": mask_inputs["pixel_values"],
            "original_sizes": original_sizes or [[image.height, image.width] for image in images],
            "reshaped_input_sizes": mask_inputs.get("reshaped_input_sizes", [square] * len(images)),
        }
        return dict(BatchFeature(inputs, tensor_type="pt"))

    def normalize_pixels(self, batch: dict) -> None:
        """Rescale and normalize, in place and on their device, the pixels that [`preprocess_images`] left as uint8."""
        for name in [name for name in batch if holds_uint8_pixels(name, batch[name])]:
            if name == "mask_pixel_values":
                batch[name] = normalize(batch[name], self.mask_image_processor)  # [B, 3, S, S]
                # SAM pads the image with zeros after normalizing it.
                clear_padding(batch[name], batch["reshaped_input_sizes"])
            else:
                batch[name] = normalize(batch[name], self.vlm_processor.image_processor)  # [B, 3, H, W]

    # ---- texts ------------------------------------------------------------------------------------------------------

    def __call__(
        self, images, text=None, image_indices=None, padding_side: str = "left", return_tensors: str = "pt", **kwargs
    ) -> BatchFeature:
        """Prepare B images and N prompts for [`LisaForConditionalGeneration.generate`].

        Args:
            images: [`ImageInputs`], or images as in [`preprocess_images`].
            text: Prompt or list of N prompts, each with the VLM's image token once. Without it, only the images'
                inputs are returned.
            image_indices: Index of each prompt's image, N ints. Default: prompt n is about image n.
            padding_side: "left" for generation, "right" for training.
            return_tensors: Type of the text inputs, as transformers names it.
            kwargs: Arguments of the VLM's processor.

        Returns:
            The VLM's vision inputs (one entry per image), its text inputs `(N, L)`, `image_indices` `(N,)`,
            `mask_pixel_values` `(B, 3, S, S)`, `original_sizes` and `reshaped_input_sizes` `(B, 2)`.

        Raises:
            ValueError: If images and texts do not match.
        """
        image_inputs = images if isinstance(images, ImageInputs) else self.preprocess_images(images, **kwargs)
        text_inputs = {}
        if text is not None:
            rows = [Row(text) for text in ([text] if isinstance(text, str) else text)]
            text_inputs = self._encode_rows(image_inputs, rows, image_indices, padding_side)
            del text_inputs["labels"]
        batch = BatchFeature(text_inputs, tensor_type=return_tensors)
        batch.update(image_inputs.inputs | image_inputs.cached_features)
        return batch

    def encode_conversations(
        self,
        images,
        conversations: list[list[dict]],
        image_indices: list[int] | None = None,
        max_length: int | None = None,
        padding_side: str = "right",
    ) -> BatchFeature:
        """Prepare B images and finished conversations for training, with labels on the assistant's turns.

        The tokens before an answer are those that generation starts from: the prompt of the previous turns. If a chat
        template renders these turns differently once others follow, a conversation becomes several rows, each with the
        answers that share a prompt.

        Args:
            images: [`ImageInputs`], or images as in [`preprocess_images`].
            conversations: Lists of messages (`role`, `content`), each with one image.
            image_indices: Index of each conversation's image. Default: conversation n is about image n.
            max_length: Maximum length of a row in tokens, including image tokens. Longer rows are truncated.
            padding_side: "right", or "left" without a `max_length`.

        Returns:
            Outputs of [`__call__`], and `labels` `(N, L)` int64: -100 outside the assistant's turns, each of which
            ends with the template's end token, or else the tokenizer's. Rows are in the order of the conversations and
            their turns.

        Raises:
            TextTooLongError: If truncating at `max_length` would lose a `[SEG]` of an answer or the image.
            ConversationError: If the chat template does not write an answer, or its reasoning, verbatim.
            ValueError: If images and texts do not match, or the chat template does not accept such messages.
        """
        image_inputs = images if isinstance(images, ImageInputs) else self.preprocess_images(images)
        image_indices = range(len(conversations)) if image_indices is None else image_indices
        if len(image_indices) != len(conversations):
            raise ValueError(
                f"expected the index of an image for each conversation, got {len(image_indices)} indices and "
                f"{len(conversations)} conversations. Pass one per conversation."
            )
        layout = self._text_layout()
        rows, row_images = [], []
        for messages, index in zip(conversations, image_indices):
            new_rows = self.template.rows(messages)
            if layout.prompt_suffix or layout.type_ids_mark_answers:  # PaliGemma treats all of a prompt alike
                new_rows = [part for row in new_rows for part in row.split()]
            rows += new_rows
            row_images += [index] * len(new_rows)
        text_inputs = self._encode_rows(image_inputs, rows, row_images, padding_side)
        if max_length is not None and len(text_inputs["input_ids"][0]) > max_length:
            self._truncate(text_inputs, max_length, padding_side)
        batch = BatchFeature(text_inputs, tensor_type="pt")
        batch.update(image_inputs.inputs | image_inputs.cached_features)
        return batch

    @property
    def image_token(self) -> str:
        """The token that represents the image in a text."""
        # Qianfan-OCR has one token for the image in a text and another one for each of its features.
        token = getattr(self.vlm_processor, "image_placeholder_token", self.vlm_processor.image_token)
        return str(token)

    @property
    def template(self) -> ChatTemplate:
        """The chat template, which renders the same prompts for training and generation."""
        return _chat_template(
            self.tokenizer, self.chat_template, self.thinking, self._image_tokens, len(self.tokenizer)
        )

    @property
    def image_token_id(self) -> int:
        """Id of the token that represents each image feature in a row; Janus' processor knows only its text."""
        token_id = getattr(self.vlm_processor, "image_token_id", None)
        return self.tokenizer.convert_tokens_to_ids(self.vlm_processor.image_token) if token_id is None else token_id

    @property
    def image_token_ids(self) -> list[int]:
        """Ids of all tokens that the VLM's processor writes for an image."""
        return sorted({self.image_token_id, *self.vlm_processor.image_token_ids} - {None})

    @property
    def _image_tokens(self) -> tuple[str, ...]:
        return self.image_token, *self.tokenizer.convert_ids_to_tokens(self.image_token_ids)

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        """Return the text of conversations, like `ProcessorMixin.apply_chat_template`, as training sees it.

        Special tokens in user texts are escaped with a mark, which makes [`__call__`] tokenize them as letters.

        Args:
            conversation: List of messages, or a list of such lists.
            chat_template: Jinja template. Default: the processor's.
            kwargs: Arguments of `ProcessorMixin.apply_chat_template`, and variables of the template.
        """
        template = self.template
        if chat_template is not None:
            template = ChatTemplate(self.tokenizer, chat_template, self.thinking, self._image_tokens, (SEG_TOKEN,))
        template.example_prompt  # noqa: B018  raises if the template fails or never ends
        is_batch = isinstance(conversation[0], (list, tuple))
        conversation = [template.prepare(row) for row in conversation] if is_batch else template.prepare(conversation)
        return super().apply_chat_template(
            conversation, chat_template=template.jinja, **{**template.variables, **kwargs}
        )

    def _text_layout(self) -> TextLayout:
        return find_text_layout(self.vlm_processor, self.template.example_prompt, self.image_token)

    def _encode_rows(
        self, image_inputs: ImageInputs, rows: list[Row], image_indices: list[int] | None, padding_side: str
    ) -> dict[str, list]:
        """Tokenize texts, each with the tokens of its image in place of the image token.

        Returns:
            The text inputs, `labels` and `image_indices`. There may be more rows than were passed, see [`tokenize`].
        """
        image_token, num_images = self.image_token, len(image_inputs.image_texts)
        image_indices = list(range(len(rows))) if image_indices is None else [int(index) for index in image_indices]
        counts = [row.text[: row.prompt_end].count(image_token) for row in rows]
        if set(counts) - {1} or len(image_indices) != len(rows) or max(image_indices) >= num_images:
            raise ValueError(
                f"expected the image token {image_token} once in each text and an image for it, got {counts} image "
                f"tokens in {len(rows)} texts, image_indices {image_indices} and {num_images} images. Pass one index "
                "per text."
            )
        # 1. Texts with what the VLM's processor adds to them.
        layout = self._text_layout()
        rows = [
            _expand_row(row, image_token, image_inputs.image_texts[index], layout)
            for row, index in zip(rows, image_indices)
        ]
        # 2. Tokens.
        bos = self.tokenizer.bos_token
        add_special_tokens = not (bos and rows[0].text.startswith(bos))  # some templates write it themselves
        groups = tokenize(self.tokenizer, rows, add_special_tokens)
        image_indices = [index for index, group in zip(image_indices, groups) for _ in group]
        rows = [row for group in groups for row in group]
        # 3. Rows of equal length.
        length = max(len(row.ids) for row in rows)
        pad = partial(_pad, length=length, side=padding_side)
        text_inputs = {
            "input_ids": [pad(row.ids, self.tokenizer.pad_token_id) for row in rows],
            "attention_mask": [pad([1] * len(row.ids), 0) for row in rows],
            "labels": [pad(row.labels(), IGNORE_INDEX) for row in rows],
        }
        # 4. Type ids, as from the VLM's processor.
        for name in image_inputs.type_id_names:
            if name == TYPE_IDS and layout.type_ids_mark_answers:
                answer_starts = [row.row.prompt_end for row in rows]
                text_inputs[name] = [
                    pad([int(begin >= start) for begin, _ in row.offsets], 0)
                    for row, start in zip(rows, answer_starts)
                ]
            else:
                create = getattr(self.vlm_processor, f"create_{name}", self.vlm_processor.create_mm_token_type_ids)
                text_inputs[name] = create(text_inputs["input_ids"])
        text_inputs["image_indices"] = image_indices
        return text_inputs

    def _truncate(self, text_inputs: dict, max_length: int, padding_side: str) -> None:
        """Truncate rows, in place, to `max_length` tokens."""
        if padding_side == "left":
            raise ValueError(
                'expected padding_side="right" for a `max_length`, which truncates rows on the right, got "left".'
            )
        image_token_ids = set(self.image_token_ids)
        for row, (ids, labels) in enumerate(zip(text_inputs["input_ids"], text_inputs["labels"])):
            if self.seg_token_id in labels[max_length:] or image_token_ids.intersection(ids[max_length:]):
                raise TextTooLongError(
                    f"Row {row}: expected at most max_length={max_length} tokens, got "
                    f"{sum(text_inputs['attention_mask'][row])}, and truncating would lose a {SEG_TOKEN} or the "
                    f"image. Raise max_length or shorten the text: '...{self.tokenizer.decode(ids[-60:])}'."
                )
        for name in text_inputs.keys() - {"image_indices"}:
            text_inputs[name] = [row[:max_length] for row in text_inputs[name]]

    # ---- outputs ----------------------------------------------------------------------------------------------------

    def post_process_masks(
        self,
        low_res_masks: torch.Tensor,
        original_sizes: torch.Tensor,
        reshaped_input_sizes: torch.Tensor,
        seg_row_indices: torch.Tensor | None = None,
        image_indices: torch.Tensor | None = None,
        mask_threshold: float = 0.0,
        binarize: bool = True,
    ) -> list[torch.Tensor]:
        """Upscale masks to the original sizes, row by row.

        Args:
            low_res_masks: Logits `(M, h, w)` from [`LisaForConditionalGeneration.generate`].
            original_sizes: (H, W) of the image files, `(B, 2)`.
            reshaped_input_sizes: (H, W) of the images after the resize for the mask model, `(B, 2)`.
            seg_row_indices: Row of each mask, `(M,)`. Default: mask m belongs to row m.
            image_indices: Image of each row, `(N,)`. Default: row n is about image n.
            mask_threshold: Logit above which a pixel belongs to the mask.
            binarize: Whether to apply the threshold. Otherwise logits are returned.

        Returns:
            List of N tensors `(M_n, H, W)`, bool (or float32 logits).

        Raises:
            ValueError: If a mask belongs to a row that `image_indices` does not have.
        """
        if image_indices is None:
            image_indices = torch.arange(len(original_sizes))
        if seg_row_indices is None:
            seg_row_indices = torch.arange(len(low_res_masks))
        if len(seg_row_indices) and seg_row_indices.max() >= len(image_indices):
            raise ValueError(
                f"expected image_indices of at least {seg_row_indices.max() + 1} rows, got {len(image_indices)} rows. "
                "Pass one per sequence; with `num_return_sequences=k` that is `image_indices.repeat_interleave(k)`."
            )
        pad_size = self.mask_image_processor.pad_size
        side = pad_size["height"] if pad_size else None
        masks = []
        for row, image in enumerate(image_indices.tolist()):
            row_masks = low_res_masks[seg_row_indices == row]
            size, original_size = reshaped_input_sizes[image].tolist(), original_sizes[image].tolist()
            if len(row_masks) == 0:
                full = low_res_masks.new_zeros((0, *original_size), dtype=torch.float32)
            else:
                full = upscale_masks(row_masks, size, original_size, side)
            masks.append(full > mask_threshold if binarize else full)
        return masks

    @property
    def model_input_names(self) -> list[str]:
        own = ["image_indices", "mask_pixel_values", "original_sizes", "reshaped_input_sizes"]
        return list(self.vlm_processor.model_input_names) + own


@lru_cache
def _chat_template(tokenizer, jinja: str, thinking: bool, image_tokens: tuple[str, ...], _) -> ChatTemplate:
    """Return a chat template, created once; the last argument changes with the tokenizer's vocabulary."""
    return ChatTemplate(tokenizer, jinja, thinking, image_tokens, answer_tokens=(SEG_TOKEN,))


def _expand_row(row: Row, image_token: str, image_text: str, layout: TextLayout) -> Row:
    """Return a row with what a VLM's processor adds: the tokens of its image, and text around the prompt."""
    before, after = row.text[: row.prompt_end].split(image_token)
    prompt = layout.prefix + before + image_text + after + layout.prompt_suffix
    shift = len(prompt) - row.prompt_end
    answers = [(start + shift, end + shift) for start, end in row.answers]
    return Row(prompt + row.text[row.prompt_end :], answers)


def _pad(values: list[int], padding: int, length: int, side: str) -> list[int]:
    filler = [padding] * (length - len(values))
    return filler + values if side == "left" else values + filler
