"""A tiny random LISA of any VLM type, and batches for it that need no processor."""

import copy
import inspect

import numpy as np
import PIL.Image
import torch
from tiny_vlms import (
    IMAGE_END_ID,
    IMAGE_START_ID,
    IMAGE_TOKEN_ID,
    SEG_TOKEN_ID,
    family_options,
    tiny_image_processor,
    tiny_mask_config,
    tiny_vlm_config,
)
from torch.nn.utils.rnn import pad_sequence

from lisa_hf import LisaConfig, LisaForConditionalGeneration
from lisa_hf.model.vlm_backbone import image_encoder, map_token_fields, vision_inputs_of


IMAGE_INDICES = [1, 0, 1]
ANSWERS = [[30, SEG_TOKEN_ID, 31], [32, 33, SEG_TOKEN_ID, 34], [35, SEG_TOKEN_ID, 36, 37, 38]]
IMAGE_SIZES = [(32, 32), (24, 56)]
MASK_SIDE = 64


@torch.no_grad()
def make_lisa(config: LisaConfig) -> LisaForConditionalGeneration:
    """Initialize a model, the same at every call and without zeros, which would hide what passes through them."""
    torch.manual_seed(0)
    model = LisaForConditionalGeneration(config)
    for parameter in model.parameters():
        if not parameter.any() or not parameter.isfinite().all():
            parameter.normal_(std=0.2)
    return model.eval()


def random_image(height: int, width: int, seed: int) -> PIL.Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return PIL.Image.fromarray(blocks).resize((width, height), PIL.Image.Resampling.NEAREST)


class Model:
    """A LISA of a VLM type, with two images of different sizes from the type's image processor and three rows.

    The rows are about images 1, 0 and 1, with token ids as any processor would write them: no processor is needed.
    """

    def __init__(self, model_type: str, mask_model: str = "sam"):
        self.model_type = model_type
        self.lisa = make_lisa(
            LisaConfig(
                vlm_config=tiny_vlm_config(model_type),
                mask_config=tiny_mask_config(mask_model),
                seg_token_id=SEG_TOKEN_ID,
            )
        )
        self.vlm = self.lisa.vlm
        self._inputs = None

    @property
    def inputs(self) -> tuple[list[dict], dict, list[dict]]:
        """Vision inputs of each image alone and of both, and the rows; created once."""
        if self._inputs is None:
            sizes = family_options(self.model_type).get("image_sizes", IMAGE_SIZES)
            images = [random_image(*size, seed) for seed, size in enumerate(sizes, start=1)]
            singles = [self._vision_inputs([image]) for image in images]
            runs = [self._image_token_runs(single) for single in singles]
            rows = [self._row(number, runs[index]) for number, index in enumerate(IMAGE_INDICES)]
            self._inputs = singles, self._vision_inputs(images), rows
        return copy.deepcopy(self._inputs)

    def batch(self, rows: list[int] = (0, 1, 2), indices: list[int] = IMAGE_INDICES) -> dict:
        """Return a padded batch of some of the rows, about both images or, if all indices are 0, about image 1."""
        singles, both, all_rows = self.inputs
        vision = both if any(indices) else singles[1]
        images = {"image_indices": torch.tensor(indices), **mask_inputs(2 if any(indices) else 1)}
        return {**pad([all_rows[row] for row in rows]), **vision, **images}

    def _vision_inputs(self, images: list[PIL.Image.Image]) -> dict:
        if self.model_type == "fuyu":  # its image processor needs the text
            pixels = torch.stack([torch.from_numpy(np.array(image.resize((32, 32)))) for image in images]) / 255
            patches = pixels.unflatten(1, (4, 8)).unflatten(3, (4, 8)).permute(0, 1, 3, 2, 4, 5)  # [B, 4, 4, 8, 8, 3]
            return {"pixel_values": patches.flatten(1, 2).flatten(2)}
        image_processor = tiny_image_processor(self.model_type)
        try:
            outputs = image_processor([[image] for image in images], return_tensors="pt")
        except (ValueError, TypeError, AttributeError):
            outputs = image_processor(images, return_tensors="pt")
        names = set(inspect.signature(self.vlm.forward).parameters) | vision_inputs_of(self.vlm, outputs).keys()
        return {name: as_float32(value) for name, value in outputs.items() if name in names}

    @torch.no_grad()
    def _image_token_runs(self, vision: dict) -> list[int]:
        """Return the lengths of the runs of image tokens of an image: one, or one per crop if features are a list."""
        encoder = image_encoder(self.vlm)
        output = encoder.get_image_features(**vision_inputs_of(self.vlm, vision), return_dict=True)
        features = []
        map_token_fields(output, features.append)
        first = features[0]
        if isinstance(first, (list, tuple)):
            return [part.shape[:-1].numel() for part in first]
        return [first.shape[:-1].numel()]

    def _row(self, number: int, runs: list[int]) -> dict:
        accepted = inspect.signature(self.vlm.forward).parameters
        image = [id for length in runs for id in [*[IMAGE_TOKEN_ID] * length, 8]]
        prompt = [1, 5, 100, IMAGE_START_ID, *image, 101, IMAGE_END_ID, 7, *range(10, 13 + 2 * number)]
        ids = prompt + ANSWERS[number]
        row = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        row["labels"] = [-100] * len(prompt) + ANSWERS[number]
        for name in ("mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids"):
            if name in accepted:
                row[name] = [int(id == IMAGE_TOKEN_ID) for id in ids]
        if self.model_type == "paligemma":  # 1 is the answer
            row["token_type_ids"] = [0] * len(prompt) + [1] * len(ANSWERS[number])
        return {name: torch.tensor(values) for name, values in row.items()}


def as_float32(value):
    is_half = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.float() if is_half else value


def pad(rows: list[dict], side: str = "right") -> dict:
    return {
        name: pad_sequence(
            [row[name] for row in rows],
            batch_first=True,
            padding_value=-100 if name == "labels" else 0,
            padding_side=side,
        )
        for name in rows[0]
    }


def mask_inputs(num_images: int, side: int = MASK_SIDE) -> dict:
    pixels = torch.randn(num_images, 3, side, side, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[side, side]] * num_images)
    return {"mask_pixel_values": pixels, "original_sizes": sizes, "reshaped_input_sizes": sizes}


def mask_labels(*counts: int, side: int = MASK_SIDE) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 2, (count, side, side), generator=generator) for count in counts]
