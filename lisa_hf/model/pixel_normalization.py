"""Rescale and normalize pixels last, on the model's device: until then they are uint8, a quarter of the bytes."""

from functools import lru_cache

import PIL.Image
import torch


def holds_uint8_pixels(name: str, value) -> bool:
    """Return whether an input of a model contains pixels that still have to be rescaled and normalized."""
    return "pixel_values" in name and isinstance(value, torch.Tensor) and value.dtype == torch.uint8


@lru_cache
def normalizes_last(image_processor) -> bool:
    """Return whether pixels are rescaled and normalized after everything else, so that it can be done later.

    Some image processors pad, crop or rearrange the normalized pixels; a trial shows which.
    """
    images = [PIL.Image.linear_gradient("L").convert("RGB").resize(size) for size in ((160, 120), (90, 300))]
    try:
        raw = image_processor(images, do_rescale=False, do_normalize=False, return_tensors="pt")
        expected = image_processor(images, return_tensors="pt")
    except ValueError:  # images of different sizes have different numbers of crops, or not all sizes are allowed
        return False
    names = [name for name in raw if holds_uint8_pixels(name, raw[name])]
    others = [name for name in raw if isinstance(raw[name], torch.Tensor) and name not in names]
    return (
        len(names) > 0
        and all(raw[name].dim() == 4 and raw[name].shape == expected[name].shape for name in names)
        and all(expected[name].dtype == torch.float32 for name in names)
        and all(
            torch.allclose(normalize(raw[name], image_processor), expected[name], rtol=0, atol=1e-5) for name in names
        )
        # Another tensor of pixels may have been normalized with different numbers.
        and all(torch.equal(raw[name], expected[name]) for name in others)
    )


def normalize(pixels: torch.Tensor, image_processor) -> torch.Tensor:
    """Rescale and normalize `(B, 3, H, W)` uint8 to float32, like the image processor."""
    pixels = pixels.float()
    if image_processor.do_rescale:
        pixels *= image_processor.rescale_factor
    if image_processor.do_normalize:
        mean, std = torch.tensor([image_processor.image_mean, image_processor.image_std], device=pixels.device)
        pixels.sub_(mean[:, None, None]).div_(std[:, None, None])
    return pixels


def clear_padding(pixels: torch.Tensor, image_sizes: torch.Tensor) -> None:
    """Zero, in place, everything to the right of and below images `(B, 3, S, S)` with sizes (H, W), `(B, 2)`."""
    sizes = image_sizes.to(pixels.device)
    rows, columns = (torch.arange(side, device=pixels.device) for side in pixels.shape[-2:])
    is_image = (rows[:, None] < sizes[:, 0, None, None]) & (columns < sizes[:, 1, None, None])  # [B, S, S]
    pixels *= is_image[:, None]
