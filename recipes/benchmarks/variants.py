"""The original's training step, and the features that make it cheaper, one by one."""

from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn.functional as F
from models import SEG_TOKEN_ID
from peft import PeftModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionSdpaAttention

from lisa_hf.model.losses import IGNORE_INDEX, mask_losses
from lisa_hf.model.mask_backbone import (
    decode_prompts,
    encode_images,
    padded_side,
    select_images,
    upscale_masks,
    use_chunked_attention,
)
from lisa_hf.model.modeling_lisa import LisaForConditionalGeneration
from lisa_hf.model.packing import packed_inputs


@dataclass(frozen=True)
class Features:
    """Differences from the original's step. Added one by one in this order, they lead to this project's step.

    Args:
        sdpa: Attention in fused kernels; the original materialized all scores.
        images_once: The vision tower runs once per image, not once per question.
        labels_only: The vocabulary projection and the `[SEG]` projector run on labeled positions, not on all.
        packing: The questions about an image share its prefix.
        mask_batch: All images are encoded, and all masks decoded, in one call instead of image by image.
        chunked_attention: SAM's relative positions are computed chunk by chunk, see [`use_chunked_attention`].
        no_recomputation: No activation checkpointing.
    """

    sdpa: bool = False
    images_once: bool = False
    labels_only: bool = False
    packing: bool = False
    mask_batch: bool = False
    chunked_attention: bool = False
    no_recomputation: bool = False

    @classmethod
    def ladder(cls) -> dict[str, "Features"]:
        """Return the variants from the original to this project, each named after the feature that it adds."""
        names = [field.name for field in fields(cls)]
        steps = {f"+ {name}": cls(**dict.fromkeys(names[: count + 1], True)) for count, name in enumerate(names)}
        return {"reference": cls(), **steps}


BASELINES = {"reference": Features(), "reference_sdpa": Features(sdpa=True)}


def configure(lisa: LisaForConditionalGeneration, features: Features) -> None:
    """Set the features that modules decide: attention and activation checkpointing."""
    lisa.vlm.set_attn_implementation("sdpa" if features.sdpa else "eager")
    forward = (SamVisionSdpaAttention if features.sdpa else SamVisionAttention).forward
    for layer in lisa.mask_model.vision_encoder.layers:
        layer.attn.forward = partial(forward, layer.attn)
    if features.chunked_attention:
        use_chunked_attention(lisa.mask_model)
    if features.no_recomputation:
        lisa.activation_checkpointing_disable()
    else:
        lisa.activation_checkpointing_enable({"use_reentrant": False})


def step_loss(model: PeftModel, batch: dict, features: Features) -> torch.Tensor:
    """Compute the loss of a step with some of the features.

    Args:
        batch: A batch of separate rows, or, with `packing`, of one packed row per image.
    """
    lisa = model.get_base_model()
    hidden_states = _hidden_states(lisa, batch, features)  # [N, L, hidden_size]
    targets = batch.get("shift_labels", F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX))
    is_seg = targets == SEG_TOKEN_ID  # [N, L]
    project = lisa.vlm.get_output_embeddings()
    if features.labels_only:
        labeled = targets != IGNORE_INDEX
        loss = F.cross_entropy(project(hidden_states[labeled]).float(), targets[labeled])
        prompts = lisa.seg_projector(hidden_states[is_seg])  # [M, C]
    else:
        logits = project(hidden_states).float()[:, :-1]  # [N, L - 1, V], in float32 as in the original
        loss = F.cross_entropy(logits.flatten(0, 1), targets[:, :-1].flatten(), ignore_index=IGNORE_INDEX)
        prompts = lisa.seg_projector(hidden_states)[is_seg]
    return loss + _mask_loss(lisa, batch, prompts, features)


def _hidden_states(lisa: LisaForConditionalGeneration, batch: dict, features: Features) -> torch.Tensor:
    backbone, rows, pixels = lisa.vlm.base_model, batch["image_indices"], batch["pixel_values"]
    with torch.no_grad():  # the vision tower is frozen
        if features.images_once:
            vision = backbone.get_image_features(pixels, return_dict=True).pooler_output
            vision = [vision[image] for image in rows.tolist()]
        else:
            vision = backbone.get_image_features(pixels[rows], return_dict=True).pooler_output
    text = {"attention_mask": batch["attention_mask"]}
    if features.packing:
        text = packed_inputs(lisa.vlm, batch["input_ids"], batch["attention_mask"], batch["segment_ids"], {})
    return backbone(
        input_ids=batch["input_ids"],
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=vision)},
        use_cache=False,
        **text,
    ).last_hidden_state


def _mask_loss(
    lisa: LisaForConditionalGeneration, batch: dict, prompts: torch.Tensor, features: Features
) -> torch.Tensor:
    """Both weighted mask losses; the prompts `(M, C)` are those of one image after the other."""
    counts = [len(labels) for labels in batch["mask_labels"]]
    images = list(range(len(counts)))
    bce = dice = 0.0
    # Groups of images that pass through encoder and decoder together.
    for group in [images] if features.mask_batch else [[image] for image in images]:
        embeddings = encode_images(lisa.mask_model, batch["mask_pixel_values"][group])
        group_counts = [counts[image] for image in group]
        owners = torch.arange(len(group)).repeat_interleave(torch.tensor(group_counts)).to(prompts.device)
        own_prompts, prompts = prompts.split([len(owners), len(prompts) - len(owners)])
        masks, _ = decode_prompts(lisa.mask_model, select_images(embeddings, owners, embeddings.dtype), own_prompts)
        for image, image_masks in zip(group, masks.split(group_counts)):
            sizes = batch["reshaped_input_sizes"][image].tolist(), batch["original_sizes"][image].tolist()
            full_size_masks = upscale_masks(image_masks, *sizes, padded_side(lisa.config.mask_config))
            image_bce, image_dice = mask_losses(full_size_masks, batch["mask_labels"][image])
            bce, dice = bce + image_bce, dice + image_dice
    return (lisa.config.mask_bce_loss_weight * bce + lisa.config.mask_dice_loss_weight * dice) / sum(counts)
