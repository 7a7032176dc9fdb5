"""An initialization from which a tiny LISA trains within minutes on a CPU.

transformers draws all weights with one small standard deviation, which suits wide models and long runs. In a narrow
model the signal fades from layer to layer, and two things are learned late: what a question asks for, because prompts
hardly differ at first, and shapes, because a vision transformer must first learn that neighboring patches matter.
"""

import math

import torch
from torch import nn
from transformers.models.sam.modeling_sam import SamVisionAttention

from ..model.modeling_lisa import LisaForConditionalGeneration


@torch.no_grad()
def initialize_weights(model: LisaForConditionalGeneration) -> None:
    """Initialize the weights of a LLaVA + SAM LISA in place."""
    # Each layer keeps the scale of its input (LeCun et al., "Efficient BackProp", 1998, section 4.6).
    scale_by_fan_in(model)
    # The mask encoder starts as a convolutional network.
    encoder = model.mask_model.vision_encoder
    scale_by_fan_in(encoder, gain=0.7)
    encoder.pos_embed.normal_(std=0.1)
    for layer in encoder.layers:
        attend_to_neighbors(layer.attn)
    for layer in (model.seg_projector.linear_1, model.seg_projector.linear_2):
        layer.reset_parameters()
        layer.weight.mul_(2)
    # The image starts at zero and words near zero, so that prompts depend on the words of the question first.
    model.vlm.base_model.multi_modal_projector.linear_2.weight.zero_()
    model.get_input_embeddings().weight.mul_(0.05)


def scale_by_fan_in(model: nn.Module, gain: float = 1.0) -> None:
    """Draw the weights of linear and convolutional layers with standard deviation gain / sqrt(number of inputs)."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.normal_(std=gain / math.sqrt(module.weight[0].numel()))
        elif isinstance(module, nn.ConvTranspose2d):  # with stride = kernel, an output sees one input position
            module.weight.normal_(std=gain / math.sqrt(module.in_channels))


def attend_to_neighbors(attention: SamVisionAttention, sharpness: float = 1.5) -> None:
    """Initialize SAM's attention as a convolution: each head attends halfway between a patch and one neighbor.

    The heads' offsets o lie on a circle, (+-0.5, +-0.5) patches for four heads. The logits fall with the squared
    distance from the offset, (d - o)^2 = d^2 - 2 o d + const, which SAM's relative positions express through the bias
    of the query: d^2 and d are the first features of the relative position, -1 and 2 o those of the query. As in
    ConViT (d'Ascoli et al., arXiv 2103.10697, section 3), this is only a start; all of it is trained.

    Args:
        attention: Attention with relative positions and at least 4 features per head.
        sharpness: Decrease of the logits per squared patch of distance.
    """
    num_heads = attention.num_attention_heads
    angles = math.pi / 4 + torch.arange(num_heads) * 2 * math.pi / num_heads  # [num_heads]
    query_bias = attention.qkv.bias.view(3, num_heads, -1)[0].zero_()  # [num_heads, head_dim]
    for axis, (offsets, relative_position) in enumerate(
        [(angles.sin(), attention.rel_pos_h), (angles.cos(), attention.rel_pos_w)]
    ):
        side = (len(relative_position) + 1) // 2  # relative_position: [2 * side - 1, head_dim]
        distances = torch.arange(len(relative_position)) - (side - 1.0)
        relative_position.zero_()
        # Divided by the side here and multiplied there, so that all of these weights have an ordinary scale.
        relative_position[:, 2 * axis] = distances**2 / side
        relative_position[:, 2 * axis + 1] = distances / math.sqrt(side)
        query_bias[:, 2 * axis] = -sharpness * side
        query_bias[:, 2 * axis + 1] = 2 * sharpness * math.sqrt(0.5 * side) * offsets
