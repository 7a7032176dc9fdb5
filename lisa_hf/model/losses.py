"""Losses of [`LisaForConditionalGeneration`]: cross-entropy of the text, binary cross-entropy and dice of masks."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


IGNORE_INDEX = -100  # of labels, as everywhere in transformers
MASK_IGNORE_INDEX = 255  # of mask labels: pixels that are neither object nor background
CHUNK_SIZE = 1024  # positions whose logits exist in float32 at the same time
BACKGROUND_LOGIT = -1e4  # gives a background pixel exactly 0 in both losses and their gradients
DICE_EPSILON = 1e-3  # LISA divides numerator and denominator by 1000 before it adds 1e-6
OVERSAMPLE_RATIO, IMPORTANCE_SAMPLE_RATIO = 3, 0.75  # of sampled pixels, as in PointRend and Mask2Former


def chunked_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the cross-entropy, summed over positions, in float32.

    Args:
        logits: Scores of the vocabulary, `(T, V)` in any dtype.
        labels: Token ids, `(T,)` int64.

    Returns:
        Float32 scalar.
    """
    # With a vocabulary of 152,000 the float32 copies of 1024 positions take 1.9 GB. They are created chunk by chunk,
    # and again in the backward pass. The vocabulary projection itself stays one call: ZeRO-3 needs the same number of
    # calls on each rank.
    chunks = zip(logits.split(CHUNK_SIZE), labels.split(CHUNK_SIZE))
    return sum(checkpoint(_cross_entropy, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def mask_losses(mask_logits: torch.Tensor, mask_labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute both mask losses on all pixels of the masks of one image.

    Args:
        mask_logits: Logits at the size of the labels, `(M, H, W)` float.
        mask_labels: 1 object, 0 background, 255 neither, `(M, H, W)`. Pixels of 255 are excluded from both losses
            (LISA trained them as background).

    Returns:
        Two float32 scalars: the mean binary cross-entropy of each mask, and the dice loss of each mask, summed over
        the masks.
    """
    logits = mask_logits.flatten(1).float()  # [M, P], P = H * W
    labels = mask_labels.flatten(1)
    ignored = labels == MASK_IGNORE_INDEX
    # Filled without `ignored.any()`, which would synchronize with the GPU.
    return _pixel_losses(logits.masked_fill(ignored, BACKGROUND_LOGIT), labels, ignored)


def sampled_mask_losses(
    mask_logits: torch.Tensor, mask_labels: torch.Tensor, num_points: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute both mask losses at sampled pixels, chosen as in Mask2Former (arXiv 2112.01527, section 3.3).

    Of three times `num_points` random pixels of a mask, those with logits closest to 0 become three quarters of the
    points; the others are random again. Mask2Former's points may lie between pixels. Here they are pixels, so that
    labels are never interpolated and 255 is excluded. A mask with at most `num_points` pixels contributes all of them.

    Args:
        mask_logits: Logits that cover the image, at any size, `(M, h, w)`. They are interpolated only at the points.
        mask_labels: 1 object, 0 background, 255 neither, `(M, H, W)`.
        num_points: Number of pixels per mask.

    Returns:
        Two float32 scalars, as [`mask_losses`].
    """
    size, num_pixels = mask_labels.shape[1:], mask_labels.shape[1:].numel()
    labels = mask_labels.flatten(1)  # [M, H * W]

    def random_pixels(number: int) -> torch.Tensor:
        return torch.randint(num_pixels, (len(labels), number), device=mask_logits.device)  # [M, number]

    if num_points >= num_pixels:
        pixels = torch.arange(num_pixels, device=mask_logits.device).expand(len(labels), -1)
    else:
        # The most uncertain of many candidates; ignored pixels count as certain.
        with torch.no_grad():
            candidates = random_pixels(OVERSAMPLE_RATIO * num_points)
            certainty = logits_at(mask_logits, candidates, size).abs()
            certainty = certainty.masked_fill(labels.gather(1, candidates) == MASK_IGNORE_INDEX, torch.inf)
            uncertain = certainty.topk(int(IMPORTANCE_SAMPLE_RATIO * num_points), largest=False).indices
        num_random = num_points - uncertain.shape[1]
        pixels = torch.cat([candidates.gather(1, uncertain), random_pixels(num_random)], dim=1)  # [M, num_points]

    labels = labels.gather(1, pixels)
    ignored = labels == MASK_IGNORE_INDEX
    logits = logits_at(mask_logits, pixels, size).masked_fill(ignored, BACKGROUND_LOGIT)
    return _pixel_losses(logits, labels, ignored)


def _pixel_losses(
    logits: torch.Tensor, labels: torch.Tensor, ignored: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both losses of `(M, P)` pixels, summed over the masks; logits of ignored pixels must be `BACKGROUND_LOGIT`."""
    targets = (labels == 1).float()
    num_pixels = labels.shape[1] - ignored.sum(1)  # [M]
    bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1) / num_pixels.clamp(min=1)
    probabilities = logits.sigmoid()
    overlap = 2 * (probabilities * targets).sum(1)
    dice = 1 - (overlap + DICE_EPSILON) / (probabilities.sum(1) + targets.sum(1) + DICE_EPSILON)
    return bce.sum(), dice.sum()


def logits_at(mask_logits: torch.Tensor, pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Interpolate mask logits at some pixels of the image.

    Args:
        mask_logits: Logits that cover the image, at any size, `(M, h, w)`.
        pixels: Indices into the image's pixels, row by row, `(M, P)` int64.
        size: (H, W) of the image.

    Returns:
        `(M, P)` float32: what bilinear `F.interpolate` to `size` gives at these pixels.
    """
    height, width = size
    # grid_sample's coordinates run from -1 to 1 over the image; those of a pixel are at its center.
    x, y = (pixels % width + 0.5) / width, (pixels // width + 0.5) / height
    grid = 2 * torch.stack([x, y], dim=-1) - 1  # [M, P, 2]
    sampled = F.grid_sample(mask_logits[:, None].float(), grid[:, None], padding_mode="border", align_corners=False)
    return sampled[:, 0, 0]  # from [M, 1, 1, P]


def check_mask_counts(mask_labels: list, masks_per_image: list[int], image_indices: torch.Tensor) -> None:
    """Check that each image has as many masks as there are `[SEG]` in the answers about it.

    Args:
        mask_labels: One tensor `(M_b, H_b, W_b)` per image.
        masks_per_image: The number of `[SEG]` in the answers about each image.
        image_indices: Row to image, `(N,)` int64.

    Raises:
        ValueError: The counts differ.
    """
    counts = [len(masks) for masks in mask_labels]
    if len(counts) != len(masks_per_image):
        raise ValueError(
            f"expected one entry of mask_labels per image, got {len(counts)} for {len(masks_per_image)} images. Give "
            "an image without masks an empty tensor (0, H, W)."
        )
    for image, (expected, found) in enumerate(zip(masks_per_image, counts)):
        if found != expected:
            rows = (image_indices == image).nonzero().flatten().tolist()
            raise ValueError(
                f"expected one mask per [SEG], got {found} masks for the {expected} [SEG] tokens in the answers about "
                f"image {image} (rows {rows}). Give the masks in the order of the answers; if a text was cut at "
                "`max_length`, raise it."
            )
