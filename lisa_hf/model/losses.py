"""The losses of [`LisaForConditionalGeneration`]."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


IGNORE_INDEX = -100  # of labels, as everywhere in transformers
MASK_IGNORE_INDEX = 255  # of mask labels: pixels that count neither as object nor as background
CHUNK_SIZE = 1024  # positions whose logits exist in float32 at a time
# An image's masks are made at its original size at once up to so many pixels, about 100 MB with what the loss keeps.
MASK_PIXELS = 2**22
BACKGROUND_LOGIT = -1e4  # at which both losses and their gradients are exactly 0 for a background pixel
OVERSAMPLING, IMPORTANCE = 3, 0.75  # of sampled pixels, as in PointRend and Mask2Former


def chunked_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of `(T, V)` logits and `(T,)` labels, summed, in float32.

    With a vocabulary of 152 k the float32 copies of 1024 positions are 1.9 GB; they are made chunk by chunk, in the
    backward pass once more. The projection to the vocabulary stays one call, as ZeRO-3 needs equally many per rank.
    """
    chunks = zip(logits.split(CHUNK_SIZE), labels.split(CHUNK_SIZE))
    return sum(checkpoint(_chunk_loss, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks)


def _chunk_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def mask_losses(mask_logits: torch.Tensor, mask_labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-pixel cross-entropy and dice loss of the masks of one image, each summed over the masks.

    Args:
        mask_logits: `(M, H, W)` float.
        mask_labels: `(M, H, W)`, 1 object, 0 background, 255 neither: such pixels are left out of both losses
            (LISA trained them as background).

    Returns:
        Two float32 scalars: sum over masks of the mean binary cross-entropy, and of the dice loss. LISA divides
        numerator and denominator of the dice loss by 1000 before it adds 1e-6, which is an epsilon of 1e-3.
    """
    logits = mask_logits.flatten(1).float()
    labels = mask_labels.flatten(1)
    ignored = labels == MASK_IGNORE_INDEX
    # Photos have millions of pixels, so the masks are touched as few times as possible.
    logits = logits.masked_fill(ignored, BACKGROUND_LOGIT) if ignored.any() else logits
    return _sum_losses(logits, labels, ignored)


def _sum_losses(logits: torch.Tensor, labels: torch.Tensor, ignored: torch.Tensor):
    """[`mask_losses`] of `(M, P)` logits, those of ignored pixels being `BACKGROUND_LOGIT`."""
    targets = (labels == 1).float()
    num_pixels = labels.shape[1] - ignored.sum(1)
    bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1) / num_pixels.clamp(min=1)
    probabilities = logits.sigmoid()
    overlap = 2 * (probabilities * targets).sum(1)
    dice = 1 - (overlap + 1e-3) / (probabilities.sum(1) + targets.sum(1) + 1e-3)
    return bce.sum(), dice.sum()


def full_size_mask_losses(
    low_res_masks: torch.Tensor, mask_labels: torch.Tensor, upscale: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`mask_losses`] of one image's masks `(M, h, w)` at the size `(M, H, W)` of its labels, which `upscale` makes.

    The masks of a large photo exist at its own size one or some at a time, here and in the backward pass.
    """

    def losses(masks, labels):
        return mask_losses(upscale(masks), labels)

    if mask_labels.numel() <= MASK_PIXELS:
        return losses(low_res_masks, mask_labels)
    at_once = max(1, MASK_PIXELS // mask_labels[0].numel())
    parts = zip(low_res_masks.split(at_once), mask_labels.split(at_once))
    parts = [checkpoint(losses, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return tuple(map(sum, zip(*parts)))


def sampled_mask_losses(
    masks: torch.Tensor, mask_labels: torch.Tensor, num_points: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`mask_losses`] at some pixels of each mask, chosen as in Mask2Former (arXiv 2112.01527, section 3.3).

    Three times `num_points` pixels of a mask are drawn at random; three quarters of the points are those among them
    whose logits are nearest to 0, the others are random again. Mask2Former's points lie anywhere between pixels; here
    they are pixels, so that labels are never mixed and 255 is left out. Where there are no more pixels, all are taken.

    Args:
        masks: `(M, h, w)` logits that cover the image, at any size.
        mask_labels: `(M, H, W)`, as in [`mask_losses`]; the logits are interpolated at these pixels alone.
        num_points: pixels per mask.
    """
    size, num_pixels = mask_labels.shape[1:], mask_labels.shape[1:].numel()
    labels = mask_labels.flatten(1)

    def draw(number: int) -> torch.Tensor:
        return torch.randint(num_pixels, (len(masks), number), device=masks.device)

    if num_points >= num_pixels:
        pixels = torch.arange(num_pixels, device=masks.device).expand(len(masks), -1)
    else:
        with torch.no_grad():
            candidates = draw(OVERSAMPLING * num_points)
            certainty = logits_at(masks, candidates, size).abs()
            certainty = certainty.masked_fill(labels.gather(1, candidates) == MASK_IGNORE_INDEX, torch.inf)
            uncertain = certainty.topk(int(IMPORTANCE * num_points), largest=False).indices
        pixels = torch.cat([candidates.gather(1, uncertain), draw(num_points - uncertain.shape[1])], dim=1)
    labels = labels.gather(1, pixels)
    ignored = labels == MASK_IGNORE_INDEX
    # Without asking whether there is one, for which a GPU would have to be waited for.
    return _sum_losses(logits_at(masks, pixels, size).masked_fill(ignored, BACKGROUND_LOGIT), labels, ignored)


def logits_at(masks: torch.Tensor, pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """`masks` `(M, h, w)`, resized to `size` (H, W), at `pixels` `(M, P)`, indices row by row: `(M, P)` float32."""
    height, width = size
    x, y = (pixels % width + 0.5) / width, (pixels // width + 0.5) / height
    grid = 2 * torch.stack([x, y], dim=-1) - 1
    # At the centres of pixels this is what bilinear F.interpolate computes.
    return F.grid_sample(masks[:, None].float(), grid[:, None], padding_mode="border", align_corners=False)[:, 0, 0]


def check_mask_counts(mask_labels: list, masks_per_image: list[int], image_indices: torch.Tensor) -> None:
    """Raises `ValueError` unless each image has as many masks as there are `[SEG]` in the answers about it."""
    expected = [len(masks) for masks in mask_labels]
    if expected == masks_per_image:
        return
    if len(expected) != len(masks_per_image):
        raise ValueError(f"mask_labels has {len(expected)} entries for {len(masks_per_image)} images.")
    image = next(i for i, count in enumerate(masks_per_image) if count != expected[i])
    rows = (image_indices == image).nonzero().flatten().tolist()
    raise ValueError(
        f"Image {image} (rows {rows}) has {masks_per_image[image]} [SEG] tokens in its answers but "
        f"{expected[image]} masks. Give one mask per [SEG], in the order of the answers; if a text was cut at "
        "`max_length`, raise it."
    )
