"""The initialization of tiny models: where attention looks, the scale of the signal, the length of templates."""

import pytest
import torch
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from lisa_hf.data.prompts import LONG_QUESTIONS, SHORT_QUESTIONS
from lisa_hf.from_scratch.initialization import attend_to_neighbors, scale_by_fan_in
from lisa_hf.from_scratch.tokenizer import add_template_tokens, train_tokenizer


@pytest.mark.parametrize("num_heads", [4, 8])
def test_each_head_attends_to_a_neighbor_of_its_own(num_heads):
    config = SamVisionConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=num_heads,
        image_size=72,
        patch_size=8,
        global_attn_indexes=[0],
        attn_implementation="eager",
    )
    attention = SamVisionEncoder(config).eval().layers[0].attn
    with torch.no_grad():
        attend_to_neighbors(attention)
        _, weights = attention(torch.zeros(1, 9, 9, 64))
    # Where the middle patch (4, 4) of the 9 x 9 looks on average, as seen from itself.
    middle = weights.view(num_heads, 81, 9, 9)[:, 40]
    places = torch.arange(9.0) - 4
    offsets = torch.stack([(middle.sum(2) * places).sum(1), (middle.sum(1) * places).sum(1)], dim=1)
    assert offsets.norm(dim=1) == pytest.approx(torch.full((num_heads,), 0.5**0.5), abs=0.02)
    assert torch.pdist(offsets).min() > 0.5
    assert (middle * ((places[:, None] ** 2 + places**2) > 8)).sum() < 0.01 * num_heads


def test_layers_keep_the_size_of_their_input():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 256, 8, stride=8, bias=False),
        torch.nn.ConvTranspose2d(256, 64, 2, stride=2, bias=False),
        torch.nn.Flatten(2),
        torch.nn.Linear(64, 128, bias=False),
    )
    with torch.no_grad():
        scale_by_fan_in(layers)
        values = torch.randn(8, 3, 32, 32)
        for layer in layers:
            values = layer(values)
            assert values.std().item() == pytest.approx(1, abs=0.1)


def test_a_template_is_short():
    tokenizer = train_tokenizer(["red circle"] * 10)
    add_template_tokens(tokenizer)
    for template in (*SHORT_QUESTIONS, *LONG_QUESTIONS):
        text = template.format(phrase="red circle")
        tokens = tokenizer.tokenize(text)
        assert len(tokens) <= 5  # the phrase and what stands before and after it
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
