"""Losses of LisaForConditionalGeneration: cross-entropy, mask losses, sampled points, global counts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fixtures.shared_images import gradients, make_batch, masks_for
from fixtures.tiny_models import FAMILIES, llava_sam

from lisa_hf.model import losses, modeling_lisa
from lisa_hf.model.losses import chunked_cross_entropy, logits_at, mask_losses, sampled_mask_losses


@pytest.mark.parametrize("num_positions", [0, 1, 7])
def test_cross_entropy_in_chunks_equals_cross_entropy_at_once(num_positions, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_SIZE", 3)
    logits = torch.randn(num_positions, 11, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.arange(num_positions)
    loss, expected = chunked_cross_entropy(logits, labels), F.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, expected)))


def test_ignored_pixels_change_nothing():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 20, 30, generator=generator, requires_grad=True)
    (labels,) = masks_for([3], [(20, 30)])
    labels[2] = 255
    bce, dice = mask_losses(logits, labels)
    (bce + dice).backward()
    ignored = labels == 255
    assert not logits.grad[ignored].any() and logits.grad[~ignored].all()
    other = torch.where(ignored, torch.randn(3, 20, 30, generator=generator) * 9, logits)
    for before, after in zip((bce, dice), mask_losses(other, labels)):
        torch.testing.assert_close(before, after, rtol=1e-6, atol=0)

    # The arithmetic, on the pixels that count alone. A mask of nothing but ignored pixels costs nothing.
    expected = {"bce": 0, "dice": 0}
    for mask_logits, mask_labels in zip(logits[:2], labels[:2]):
        valid = mask_labels != 255
        targets = mask_labels[valid].float()
        probabilities = mask_logits[valid].sigmoid()
        expected["bce"] += F.binary_cross_entropy_with_logits(mask_logits[valid], targets)
        overlap = 2 * (probabilities * targets).sum()
        expected["dice"] += 1 - (overlap + 1e-3) / (probabilities.sum() + targets.sum() + 1e-3)
    torch.testing.assert_close(bce, expected["bce"], rtol=1e-5, atol=0)
    torch.testing.assert_close(dice, expected["dice"], rtol=1e-5, atol=1e-6)


def test_masks_of_large_photos_in_parts_are_masks_at_once(monkeypatch):
    model, processor = FAMILIES["llava-sam"]()
    batch = make_batch(processor)
    expected = model(**batch).loss
    expected.backward()
    before = gradients(model)
    model.zero_grad()
    monkeypatch.setattr(modeling_lisa, "MASK_PIXELS", 100)
    loss = model(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, before[name], rtol=1e-4, atol=1e-7, msg=name)


def test_losses_at_all_pixels_are_the_losses_of_masks():
    generator = torch.Generator().manual_seed(0)
    masks = torch.randn(3, 16, 20, generator=generator, requires_grad=True)
    (labels,) = masks_for([3], [(30, 25)])
    resized = F.interpolate(masks[:, None], (30, 25), mode="bilinear")[:, 0]
    expected, found = mask_losses(resized, labels), sampled_mask_losses(masks, labels, num_points=30 * 25)
    for one, other in zip(expected, found):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)
    one, other = (torch.autograd.grad(sum(losses), masks)[0] for losses in (expected, found))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_sampled_losses(monkeypatch):
    """Random points give the loss of all pixels on average; by importance they are where the model is unsure."""
    generator = torch.Generator().manual_seed(0)
    masks = 5 * torch.randn(2, 16, 16, generator=generator)
    (labels,) = masks_for([2], [(64, 64)])
    dense = mask_losses(F.interpolate(masks[:, None], (64, 64), mode="bilinear")[:, 0], labels)

    def sample(num_points: int, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.stack(sampled_mask_losses(masks, labels, num_points))

    assert torch.equal(sample(50, seed=1), sample(50, seed=1)) and not torch.equal(
        sample(50, seed=1), sample(50, seed=2)
    )
    chosen = []
    monkeypatch.setattr(losses, "_pixel_losses", lambda logits, labels, _: chosen.append((logits, labels)))
    torch.manual_seed(0)
    sampled_mask_losses(masks, labels, 400)
    (logits, labels_of_points), uniform = chosen.pop(), logits_at(masks, torch.arange(4096).expand(2, -1), (64, 64))
    important = labels_of_points[:, :300]
    assert logits.shape == labels_of_points.shape == (2, 400) and (important != 255).all()
    logits = logits.masked_fill(labels_of_points == 255, 0)
    assert logits[:, :300].abs().max() < uniform.abs().quantile(0.45) < logits[:, 300:].abs().max()
    monkeypatch.undo()
    monkeypatch.setattr(losses, "IMPORTANCE_SAMPLE_RATIO", 0)
    average = torch.stack([sample(400, seed) for seed in range(200)]).mean(0)
    torch.testing.assert_close(average, torch.stack(dense), rtol=0.01, atol=0)


def test_points_are_sampled_in_training_alone():
    model, processor = FAMILIES["llava-sam"]()
    batch = make_batch(processor)
    dense = model.train()(**batch).mask_bce_loss
    model.config.mask_loss_points = 200
    sampled = model(**batch)
    assert sampled.mask_bce_loss != dense
    sampled.loss.backward()
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients(model).values())
    assert model.eval()(**batch).mask_bce_loss == dense


def test_global_counts_make_parts_of_a_batch_add_up():
    """Two unequal halves (10 to 20 labels, 4 and 0 masks) with the counts of the whole give its loss and gradients."""
    model, processor = llava_sam()
    model.double()
    whole = make_batch(processor)
    model(**whole).loss.backward()
    expected, expected_loss = copy.deepcopy(gradients(model)), model(**whole).loss
    model.zero_grad()
    num_items = (whole["labels"][:, 1:] != -100).sum()
    halves = [make_batch(processor, rows) for rows in ([0, 1, 2], [3])]
    losses = [model(**half, num_items_in_batch=num_items, num_masks_in_batch=4).loss for half in halves]
    assert losses[1] > 0
    torch.testing.assert_close(sum(losses), expected_loss, rtol=1e-6, atol=0)
    sum(losses).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-6, msg=name)
    assert abs(sum(model(**half).loss for half in halves) - expected_loss) > 0.1  # their own counts do not


def test_loss_weights():
    model, processor = llava_sam()
    batch = make_batch(processor)
    default = model(**batch)
    model.config.ce_loss_weight, model.config.mask_bce_loss_weight, model.config.mask_dice_loss_weight = 0.5, 3.0, 2.0
    output = model(**batch)
    for part, factor in (("ce_loss", 0.5), ("mask_bce_loss", 1.5), ("mask_dice_loss", 4.0)):
        torch.testing.assert_close(output[part], default[part] * factor)


def test_output_logits():
    model, processor = llava_sam()
    batch = make_batch(processor)
    output = model(**batch, output_logits=True)
    logits = output.logits
    assert logits.shape == (*batch["input_ids"].shape, len(processor.tokenizer))
    ce_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(output.ce_loss, ce_loss)
    del batch["labels"], batch["mask_labels"]
    unlabeled = model(**batch)
    assert unlabeled.loss is None and len(unlabeled.low_res_masks) == 5  # also the [SEG] of the user: no labels
    torch.testing.assert_close(unlabeled.logits, logits)


def test_suppressed_tokens_are_never_predicted():
    model, processor = llava_sam()
    batch = make_batch(processor, rows=[3])
    likely = model(**batch, output_logits=True).logits[0, -3:].argmax(-1).unique().tolist()
    plain = model(**batch).ce_loss
    suppressed_model, _ = llava_sam(suppress_tokens=likely)
    output = suppressed_model(**batch, output_logits=True)
    output.loss.backward()
    assert output.ce_loss < plain and output.ce_loss.isfinite()
    assert not set(likely) & set(output.logits.argmax(-1).flatten().tolist())
    assert not suppressed_model.vlm.lm_head.weight.grad[likely].any()
