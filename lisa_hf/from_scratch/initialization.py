"""Random weights from which a small LISA learns within minutes, on a CPU.

transformers draws all weights with one small deviation, which suits wide models and long runs. In a narrow one the
signal fades from layer to layer, and two things are learned late: what a question asks for, since prompts hardly
differ at first, and shapes, for which a vision transformer must find out that neighbouring patches matter.
"""

import math

import torch
from torch import nn
from transformers.models.sam.modeling_sam import SamVisionAttention

from ..model.modeling_lisa import LisaForConditionalGeneration


@torch.no_grad()
def initialize_weights(model: LisaForConditionalGeneration):
    """Draws the weights of a LLaVA + SAM LISA anew, in place.

    - Every layer keeps the size of its input (LeCun et al., "Efficient BackProp", 1998, section 4.6).
    - The mask encoder starts as a convolutional network, see [`look_at_neighbours`].
    - What the language model knows of the image starts at zero, and its word embeddings near zero, so that a prompt
      depends on the words of the question first.
    """
    scale_by_fan_in(model)
    encoder = model.mask_model.vision_encoder
    scale_by_fan_in(encoder, gain=0.7)
    encoder.pos_embed.normal_(std=0.1)
    for layer in encoder.layers:
        look_at_neighbours(layer.attn)
    for layer in (model.seg_projector.linear_1, model.seg_projector.linear_2):
        layer.reset_parameters()
        layer.weight.mul_(2)
    model.vlm.base_model.multi_modal_projector.linear_2.weight.zero_()
    model.get_input_embeddings().weight.mul_(0.05)


def scale_by_fan_in(model: nn.Module, gain: float = 1.0):
    """Draws the weights of linear and convolutional layers with a deviation of gain / sqrt(number of inputs)."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.normal_(std=gain / math.sqrt(module.weight[0].numel()))
        elif isinstance(module, nn.ConvTranspose2d):  # of stride = kernel: each output sees one input position
            module.weight.normal_(std=gain / math.sqrt(module.in_channels))


def look_at_neighbours(attention: SamVisionAttention, sharpness: float = 1.5):
    """Starts SAM's attention as a convolution: each head looks from a patch to a point half-way to a neighbour.

    The heads' offsets lie on a circle, (+-0.5, +-0.5) patches for four of them. Attention falls off with the squared
    distance from the offset, (d - o)^2 = d^2 - 2 o d + const, which SAM's relative positions express through the bias
    of the query: d^2 and d are the first features of the relative position, -1 and 2 o those of the query. As in
    ConViT (d'Ascoli et al., arXiv 2103.10697, section 3) it is only a start, from which everything is learned.

    Args:
        attention: with relative positions and at least 4 features per head.
        sharpness: what a squared distance of 1 patch takes off the logits.
    """
    num_heads = attention.num_attention_heads
    angles = math.pi / 4 + torch.arange(num_heads) * 2 * math.pi / num_heads
    query_bias = attention.qkv.bias.view(3, num_heads, -1)[0].zero_()
    for axis, (offsets, relative_position) in enumerate(
        [(angles.sin(), attention.rel_pos_h), (angles.cos(), attention.rel_pos_w)]
    ):
        side = (len(relative_position) + 1) // 2
        distances = torch.arange(len(relative_position)) - (side - 1.0)
        relative_position.zero_()
        # Divided by the side here and multiplied there, so that all of these weights are of ordinary size.
        relative_position[:, 2 * axis] = distances**2 / side
        relative_position[:, 2 * axis + 1] = distances / math.sqrt(side)
        query_bias[:, 2 * axis] = -sharpness * side
        query_bias[:, 2 * axis + 1] = 2 * sharpness * math.sqrt(0.5 * side) * offsets
