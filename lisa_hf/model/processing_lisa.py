"""LisaProcessor: the VLM's own processor, whatever it is, beside the mask model's image processor."""

import os
import re
from collections.abc import Collection
from functools import lru_cache

import PIL.Image
import torch
import transformers
from transformers import (
    AddedToken,
    AutoImageProcessor,
    AutoProcessor,
    BaseImageProcessor,
    BatchFeature,
    LlamaTokenizer,
    ProcessorMixin,
)
from transformers.image_processing_backends import TorchvisionBackend
from transformers.utils import is_torchvision_available
from transformers.utils.chat_template_utils import render_jinja_template

from .images import load_image
from .losses import IGNORE_INDEX
from .mask_backbone import upscale_masks
from .upstream_fixes import keep_llama_legacy


SEG_TOKEN = "[SEG]"
IMAGE_TOKENS = ("<im_start>", "<im_end>")  # around the image in LISA's templates
TYPE_ID_NAMES = ("token_type_ids", "mm_token_type_ids")
TEXT_INPUT_NAMES = ("input_ids", "attention_mask", *TYPE_ID_NAMES, "labels", "text_replacement_offsets")


class TextTooLongError(ValueError):
    """A conversation is longer than `max_length`, and cutting it would cut a `[SEG]` or the image off."""


def add_tokens(tokenizer, tokens=(SEG_TOKEN,), lstrip: bool = True) -> None:
    """Adds tokens the way LISA's slow tokenizer treats them: they swallow the spaces around them, so that `[SEG].` is
    one `[SEG]`, and they are ordinary text for `decode(skip_special_tokens=True)`. Without `lstrip` they leave the
    spaces before them."""
    tokenizer.add_tokens([AddedToken(token, lstrip=lstrip, rstrip=True, normalized=False) for token in tokens])


# ---- image processors and their backends ----------------------------------------------------------------------------
#
# transformers has most image processors twice, with the Pillow and with the torchvision backend, and loads whichever
# is installed. The two resize differently (SAM: up to 0.0175 standard deviations of a pixel). Weights were trained on
# one of them, so the backend is part of a checkpoint. The image processor's type names it, in published checkpoints as
# in ours: `...Fast` is torchvision, `...Pil` is Pillow.


_TORCHVISION_IS_MISSING = "expected torchvision for {}, got an environment without it. Do `pip install torchvision`."


def image_processor_type(image_processor: BaseImageProcessor) -> str:
    """Return the type to save for an image processor, which names its backend."""
    name = type(image_processor).__name__
    return f"{name}Fast" if isinstance(image_processor, TorchvisionBackend) else name


def image_processor_class(image_processor_type: str) -> type[BaseImageProcessor]:
    """Return the class of an image processor type, with the backend that the type names.

    A plain name means Pillow where transformers has it: it did so before transformers 5, when most checkpoints were
    published, and in LISA checkpoints that were saved before their types named a backend.

    Args:
        image_processor_type: Value of this key in a checkpoint, such as `"SamImageProcessorPil"`.

    Raises:
        ValueError: If transformers has no such image processor, or torchvision is needed and not installed.
    """
    base = str(image_processor_type).removesuffix("Fast").removesuffix("Pil")
    names_torchvision = str(image_processor_type).endswith("Fast")
    name = base if names_torchvision or not hasattr(transformers, f"{base}Pil") else f"{base}Pil"
    # Without torchvision, the plain name gives a placeholder or, with no more than a warning, Pillow's class.
    if not is_torchvision_available():
        if names_torchvision or getattr(getattr(transformers, name, None), "is_dummy", False):
            raise ValueError(_TORCHVISION_IS_MISSING.format(image_processor_type))
    return _transformers_class(name, BaseImageProcessor)


def load_image_processor(path: str | os.PathLike, **kwargs) -> BaseImageProcessor:
    """Load an image processor with the backend that its checkpoint names; Sam's and SamHQ's always with Pillow.

    Args:
        path: Directory or Hub id, of an image processor or of a processor that has one.
        kwargs: Arguments of `from_pretrained`.

    Raises:
        ValueError: If the backend is not installed, see [`image_processor_class`].
    """
    config, _ = BaseImageProcessor.get_image_processor_dict(path, **kwargs)
    # Configurations from before 2023 have no type: transformers knows it from the model's.
    name = config.get("image_processor_type") or type(AutoImageProcessor.from_pretrained(path, **kwargs)).__name__
    if name == "SamImageProcessorFast":
        name = "SamImageProcessorPil"  # what the published weights were trained on, whoever saved them again
    return image_processor_class(name).from_dict(config)


def load_vlm_processor(processor_class: type, path: str | os.PathLike, **kwargs) -> ProcessorMixin:
    """Load the processor of a VLM, with the image processor backend that its checkpoint names.

    Args:
        processor_class: Class of the processor, or `AutoProcessor`.
        path: Directory or Hub id.
        kwargs: Arguments of `from_pretrained`.

    Raises:
        ValueError: If torchvision is needed and not installed.
    """
    image_processor = load_image_processor(path, **kwargs)
    try:
        processor = processor_class.from_pretrained(path, **kwargs)
    except ImportError as error:
        if is_torchvision_available():
            raise
        # The video processors of Qwen, InternVL and others have no other backend.
        raise ValueError(_TORCHVISION_IS_MISSING.format(f"the processor of {path}")) from error
    processor.image_processor = image_processor
    return processor


def _transformers_class(name: str, base: type) -> type:
    """Return a class of transformers that a checkpoint names. Nothing else is looked up or called for a checkpoint."""
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(
            f"expected the name of a {base.__name__} of transformers in processor_config.json, got '{name}'. Download "
            "the checkpoint again, from a source that you trust."
        )
    return found


def user_message(text: str) -> dict:
    """Return the chat message that asks about an image."""
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}


class LisaProcessor(ProcessorMixin):
    """Turns images and texts into the inputs of [`LisaForConditionalGeneration`].

    Args:
        vlm_processor: the processor of the VLM; its tokenizer must know `[SEG]` (see [`add_tokens`]).
        mask_image_processor: the image processor of the mask model.
        chat_template: Jinja template of conversations; by default the VLM processor's own.
    """

    def __init__(self, vlm_processor=None, mask_image_processor=None, chat_template=None):
        chat_template = chat_template or vlm_processor.chat_template or vlm_processor.tokenizer.chat_template
        super().__init__(mask_image_processor=mask_image_processor, chat_template=chat_template)
        self.vlm_processor = vlm_processor
        self.tokenizer = vlm_processor.tokenizer
        if isinstance(self.tokenizer, LlamaTokenizer):
            keep_llama_legacy(self.tokenizer)
        self.seg_token_id = self.tokenizer.convert_tokens_to_ids(SEG_TOKEN)
        if self.seg_token_id is None or self.seg_token_id == self.tokenizer.unk_token_id:
            raise ValueError(f"The tokenizer does not know {SEG_TOKEN}: call `add_tokens(tokenizer)` first.")

    # ---- loading and saving -----------------------------------------------------------------------------------------

    @classmethod
    def from_vlm_mask_model_pretrained(cls, vlm: str, mask_model: str, chat_template: str | None = None):
        """Builds the processor of a new LISA model from two Hub ids or directories.

        The tokenizer gets `[SEG]` and, if the chat template has them, `<im_start>` and `<im_end>`.
        """
        vlm_processor = load_vlm_processor(AutoProcessor, vlm)
        chat_template = chat_template or vlm_processor.chat_template or vlm_processor.tokenizer.chat_template
        prompt = vlm_processor.apply_chat_template(
            [user_message("?")], chat_template=chat_template, add_generation_prompt=True, tokenize=False
        )
        # An answer's first [SEG] must not swallow the line break that ends many prompts: generation starts behind it.
        tokenizer = vlm_processor.tokenizer
        add_tokens(tokenizer, lstrip=not prompt[-1].isspace())
        known = tokenizer.get_vocab()
        add_tokens(tokenizer, [token for token in IMAGE_TOKENS if token in chat_template and token not in known])
        return cls(
            vlm_processor=vlm_processor,
            mask_image_processor=load_image_processor(mask_model),
            chat_template=chat_template,
        )

    def to_dict(self) -> dict:
        # Both processors share one file at the root: a sub-folder for the VLM's would hide its tokenizer from
        # AutoTokenizer.
        processor_dict = self.vlm_processor.to_dict() | super().to_dict()
        processor_dict["vlm_processor_class"] = type(self.vlm_processor).__name__
        # transformers writes the same type for both backends, and so loads whichever is installed.
        for name, image_processor in (
            ("image_processor", self.vlm_processor.image_processor),
            ("mask_image_processor", self.mask_image_processor),
        ):
            processor_dict[name]["image_processor_type"] = image_processor_type(image_processor)
        return processor_dict

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        self.vlm_processor.save_pretrained(save_directory)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        processor_dict, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "vlm_processor_class" not in processor_dict:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a {processor_dict.get('processor_class', 'processor')}, not a "
                "LisaProcessor. For a new model from a VLM and a mask model use "
                "`LisaProcessor.from_vlm_mask_model_pretrained`."
            )
        vlm_class = _transformers_class(processor_dict["vlm_processor_class"], ProcessorMixin)
        mask_processor = processor_dict["mask_image_processor"]
        return cls(
            vlm_processor=load_vlm_processor(vlm_class, pretrained_model_name_or_path, **kwargs),
            mask_image_processor=image_processor_class(mask_processor["image_processor_type"])(**mask_processor),
            chat_template=processor_dict.get("chat_template"),
        )

    # ---- images and texts -------------------------------------------------------------------------------------------

    def __call__(
        self, images, text=None, image_indices=None, padding_side: str = "left", return_tensors: str = "pt", **kwargs
    ) -> BatchFeature:
        """Prepares B images and N prompts for [`LisaForConditionalGeneration.generate`].

        Args:
            images: PIL image, or list of B of them (one nested list per conversation is accepted too).
            text: prompt or list of N prompts, each with the VLM's image token once. Without it, only the images'
                inputs are returned.
            image_indices: list of N ints, row to image; by default row n is about image n.
            padding_side: "left" for generation; "right" for training.

        Returns:
            The VLM's vision inputs (one entry per image), its text inputs (N, L), `image_indices` (N,),
            `mask_pixel_values` (B, 3, S, S), `original_sizes` and `reshaped_input_sizes` (B, 2).
        """
        features, _ = self._encode(images, text, image_indices, padding_side, **kwargs)
        return BatchFeature(features, tensor_type=return_tensors)

    def encode_images(
        self, images: list[PIL.Image.Image], do_normalize: bool = True, skip: Collection[str] = (), **kwargs
    ) -> dict:
        """The part of a batch that follows from its B images alone.

        Args:
            do_normalize: False leaves pixels uint8 `(B, 3, H, W)` as the resize gives them,
                for [`normalize_pixels`] on the model's device: a quarter of the bytes. A VLM's processor that pads or
                rearranges what it has normalised does all of it here.
            skip: "pixel_values" or "mask_pixel_values" leaves out what the VLM's or the mask model's processor gives.

        Returns:
            As [`__call__`] without a text, and two more, for the texts about the images: `image_texts`, list of B str
            that take the place of the image token, and `type_id_names`, the type ids that the VLM takes of each token.
        """
        images = [load_image(image) for image in images]
        raw = {} if do_normalize else {"do_rescale": False, "do_normalize": False}
        features = {}
        if "pixel_values" not in skip:
            # A text of nothing but the placeholder shows what the VLM's processor makes of each image: its vision
            # inputs and the text that the placeholder becomes. So an image is processed once, whatever is asked of it.
            probe = self.vlm_processor(
                images=[[image] for image in images],
                text=[self.vlm_processor.image_token] * len(images),
                return_text_replacement_offsets=True,
                **(raw if raw and _normalizes_last(self.vlm_processor.image_processor) else {}),
                **kwargs,
            )
            features |= {key: value for key, value in probe.items() if key not in TEXT_INPUT_NAMES}
            features["image_texts"] = [offsets[0]["replacement"] for offsets in probe["text_replacement_offsets"]]
            features["type_id_names"] = [name for name in TYPE_ID_NAMES if name in probe]
        if "mask_pixel_values" not in skip:
            mask_inputs = self.mask_image_processor(images, **raw)
            features["mask_pixel_values"] = mask_inputs["pixel_values"]
            features["original_sizes"] = [[image.height, image.width] for image in images]
            # SAM 2's processor stretches images to its square and therefore reports no sizes.
            stretched = [[self.mask_image_processor.size["height"], self.mask_image_processor.size["width"]]]
            features["reshaped_input_sizes"] = mask_inputs.get("reshaped_input_sizes", stretched * len(images))
        return features

    def normalize_pixels(self, batch: dict) -> None:
        """Rescales and normalises, in place, what [`encode_images`] left as uint8, on the device where it is."""
        for name, image_processor in (
            ("pixel_values", self.vlm_processor.image_processor),
            ("mask_pixel_values", self.mask_image_processor),
        ):
            if name in batch and batch[name].dtype == torch.uint8:
                batch[name] = _normalize(batch[name], image_processor)
                if name == "mask_pixel_values":  # SAM pads the image with zeros after it is normalised
                    pixels, sizes = batch[name], batch["reshaped_input_sizes"].to(batch[name].device)
                    rows, columns = (torch.arange(side, device=pixels.device) for side in pixels.shape[-2:])
                    is_image = (rows[:, None] < sizes[:, 0, None, None]) & (columns < sizes[:, 1, None, None])
                    pixels *= is_image[:, None]

    def encode_conversations(
        self,
        images,
        conversations,
        image_indices=None,
        max_length: int | None = None,
        padding_side: str = "right",
    ) -> BatchFeature:
        """Prepares B images and N finished conversations for training, with labels on the assistant's turns.

        Args:
            images: list of B PIL images, or what [`encode_images`] made of them.
            conversations: list of N lists of messages (`role`, `content`), each with one image.
            image_indices: list of N ints, row to image.
            max_length: longest row in tokens, image tokens included; longer rows lose their end.

        Returns:
            As [`__call__`], plus `labels` (N, L) int64: -100 outside of the assistant's turns, end token included.

        Raises:
            TextTooLongError: cutting at `max_length` would cut a `[SEG]` of an answer or the image off.
            ValueError: the chat template changes earlier turns when later ones are added, so that the assistant's
                turns cannot be found.
        """
        texts, spans = zip(*(self._render_with_spans(messages) for messages in conversations))
        features, offsets = self._encode(images, list(texts), image_indices, padding_side)
        labels = [
            self._labels(ids, row_offsets, row_spans)
            for ids, row_offsets, row_spans in zip(features["input_ids"], offsets, self._shift(spans, offsets))
        ]
        features["labels"] = labels
        if max_length is not None and len(labels[0]) > max_length:
            self._truncate(features, max_length, padding_side)
        return BatchFeature(features, tensor_type="pt")

    def _encode(self, images, text, image_indices, padding_side, **kwargs):
        if isinstance(images, dict):
            features = dict(images)
        else:
            if not isinstance(images, (list, tuple)):
                images = [images]
            images = [image[0] if isinstance(image, (list, tuple)) else image for image in images]
            if not all(isinstance(image, PIL.Image.Image) for image in images):
                raise ValueError(
                    "Every row is about an image: expected PIL images, got "
                    f"{[type(image).__name__ for image in images]}."
                )
            features = self.encode_images(images, **kwargs)
        image_texts, type_id_names = features.pop("image_texts"), features.pop("type_id_names")
        if text is None:
            return features, None

        text = [text] if isinstance(text, str) else list(text)
        image_indices = list(range(len(text))) if image_indices is None else [int(index) for index in image_indices]
        counts = [row.count(self.vlm_processor.image_token) for row in text]
        if set(counts) - {1} or len(image_indices) != len(text) or max(image_indices) >= len(image_texts):
            raise ValueError(
                f"Every text must hold the image token {self.vlm_processor.image_token} once and point to an image; "
                f"got {counts} image tokens in {len(text)} texts, image_indices {image_indices} and "
                f"{len(image_texts)} images."
            )
        text, replaced = self.vlm_processor.get_text_with_replacements(
            text, images_replacements=[image_texts[index] for index in image_indices]
        )
        bos = self.tokenizer.bos_token
        encoding = self.tokenizer(
            text,
            add_special_tokens=not (bos and text[0].startswith(bos)),
            padding=True,
            padding_side=padding_side,
            return_offsets_mapping=True,
            return_attention_mask=True,
        )
        features["input_ids"], features["attention_mask"] = encoding["input_ids"], encoding["attention_mask"]
        for name in type_id_names:
            features[name] = self.vlm_processor.create_mm_token_type_ids(encoding["input_ids"])
        features["image_indices"] = image_indices
        return features, [
            {"tokens": tokens, "span": row[0]["span"], "new_span": row[0]["new_span"]}
            for tokens, row in zip(encoding["offset_mapping"], replaced)
        ]

    # ---- labels -----------------------------------------------------------------------------------------------------

    def _render(self, messages, **kwargs) -> tuple[list[str], list]:
        return render_jinja_template(
            conversations=[messages],
            chat_template=self.chat_template,
            **kwargs,
            **self.tokenizer.special_tokens_map,
        )

    def _render_with_spans(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation and the character spans of the assistant's turns in it.

        A template with `{% generation %}` says where they are. Otherwise each turn is what it adds to the text of the
        turns before it, the generation prompt included.
        """
        if re.search(r"\{%-?\s*generation\s*-?%\}", self.chat_template):
            (text,), (spans,) = self._render(messages, return_assistant_tokens_mask=True)
            return text, [tuple(span) for span in spans]
        (text,), _ = self._render(messages)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            (before,), _ = self._render(messages[:index], add_generation_prompt=True)
            (after,), _ = self._render(messages[: index + 1])
            if not (after.startswith(before) and text.startswith(after.rstrip())):
                raise ValueError(
                    "This chat template rewrites earlier turns when a turn is added, so the assistant's turns cannot "
                    "be found in its text. Wrap what the assistant says in `{% generation %}` and `{% endgeneration "
                    "%}` and pass the template as `chat_template`."
                )
            spans.append((len(before), len(after.rstrip())))
        return text, spans

    @staticmethod
    def _shift(spans, offsets):
        """Moves spans behind the image placeholder by what its expansion added."""
        for row_spans, row in zip(spans, offsets):
            end, gained = row["span"][1], row["new_span"][1] - row["span"][1]
            yield [tuple(char + gained if char >= end else char for char in span) for span in row_spans]

    @staticmethod
    def _labels(input_ids, offsets, spans) -> list[int]:
        labels = [IGNORE_INDEX] * len(input_ids)
        for position, (start, end) in enumerate(offsets["tokens"]):
            if any(start < span_end and end > span_start for span_start, span_end in spans):
                labels[position] = input_ids[position]
        return labels

    def _truncate(self, features: dict, max_length: int, padding_side: str) -> None:
        """Cuts rows at their end, in place, to `max_length` tokens."""
        keep = slice(0, max_length)
        if padding_side == "left":
            raise ValueError('`max_length` cuts the end of rows; it needs padding_side="right".')
        image_token_ids = set(self.vlm_processor.image_token_ids)
        for row, (ids, labels) in enumerate(zip(features["input_ids"], features["labels"])):
            if self.seg_token_id in labels[max_length:] or image_token_ids.intersection(ids[max_length:]):
                raise TextTooLongError(
                    f"Row {row} has {sum(features['attention_mask'][row])} tokens and max_length={max_length} would "
                    f"cut a {SEG_TOKEN} or the image off. Raise max_length or shorten the text: "
                    f"'...{self.tokenizer.decode(ids[-60:])}'."
                )
        for name in ("input_ids", "attention_mask", "labels", *TYPE_ID_NAMES):
            if name in features:
                features[name] = [row[keep] for row in features[name]]

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
        """Masks at the original sizes, row by row.

        Args:
            low_res_masks: `(M, h, w)` logits, as [`LisaForConditionalGeneration.generate`] returns them.
            original_sizes, reshaped_input_sizes: `(B, 2)`, as this processor returns them.
            seg_row_indices: `(M,)`, mask to row; by default mask m belongs to row m.
            image_indices: `(N,)`, row to image; by default row n is about image n.
            mask_threshold: of the logits.
            binarize: False returns the logits.

        Returns:
            List of N tensors `(M_n, H, W)`, bool (or float32 logits).

        Raises:
            ValueError: a mask belongs to a row that `image_indices` does not have.
        """
        if image_indices is None:
            image_indices = torch.arange(len(original_sizes))
        if seg_row_indices is None:
            seg_row_indices = torch.arange(len(low_res_masks))
        if len(seg_row_indices) and seg_row_indices.max() >= len(image_indices):
            raise ValueError(
                f"A mask belongs to row {seg_row_indices.max()}, but image_indices has {len(image_indices)} rows. "
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
def _normalizes_last(image_processor) -> bool:
    """Whether pixels are rescaled and normalised after everything else, so that it can be done later as well.

    Some image processors pad, cut or rearrange the normalised pixels; which, is found by trying.
    """
    images = [PIL.Image.linear_gradient("L").convert("RGB").resize(size) for size in ((160, 120), (90, 300))]
    raw = image_processor(images, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    expected = image_processor(images, return_tensors="pt")["pixel_values"]
    if raw.dtype != torch.uint8 or raw.dim() != 4:
        return False
    return torch.allclose(_normalize(raw, image_processor), expected, rtol=0, atol=1e-5)


def _normalize(pixels: torch.Tensor, image_processor) -> torch.Tensor:
    """`(B, 3, H, W)` uint8 to float32, as the image processor does it."""
    pixels = pixels.float()
    if image_processor.do_rescale:
        pixels *= image_processor.rescale_factor
    if image_processor.do_normalize:
        mean, std = (
            torch.tensor(values, device=pixels.device).view(-1, 1, 1)
            for values in (image_processor.image_mean, image_processor.image_std)
        )
        pixels.sub_(mean).div_(std)
    return pixels
