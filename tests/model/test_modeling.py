"""LisaForConditionalGeneration: forward, losses, gradients, saving and loading, on tiny random models."""

import copy
import doctest
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from fixtures.tiny_models import (
    FAMILIES,
    SIDE,
    conversation,
    gemma3_sam,
    image,
    llava_sam,
    llava_sam2,
    qwen2_5_vl_sam,
    sam_config,
)
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMaskGeneration,
    AutoProcessor,
)

from lisa_hf import LisaConfig, LisaForConditionalGeneration, LisaProcessor
from lisa_hf.model import losses, modeling_lisa
from lisa_hf.model.losses import chunked_cross_entropy, logits_at, mask_losses, sampled_mask_losses
from lisa_hf.model.mask_backbone import BIAS_SIZE, UNTRAINED_DECODER_MODULES, encode_images
from lisa_hf.model.upstream_fixes import patched_sam_hq_decoder


# Rows that share images, in no order; several [SEG] in an answer, one in a user's turn, and an image without masks.
SIZES = [(40, 60), (64, 32), (50, 50)]
IMAGE_INDICES = [1, 0, 1, 2]
MASKS_PER_ROW = [2, 1, 1, 0]
MASKS_PER_IMAGE = [1, 3, 0]
CONVERSATIONS = [
    conversation("What is the red circle?", "Sure, [SEG] and [SEG].", "Is @ red?", "It is red."),
    conversation("What is it?", "It is [SEG]."),
    conversation("What is the circle?", "The circle.", "Sure?", "Sure, it is [SEG]."),
    conversation("Is it red?", "It is."),
]


def masks_for(counts, sizes=SIZES, seed: int = 0) -> list[torch.Tensor]:
    """Random labels with 0, 1 and 255, `(M_b, H_b, W_b)` per image."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([0, 1, 255], dtype=torch.uint8)
    return [values[torch.randint(0, 3, (n, *size), generator=generator)] for n, size in zip(counts, sizes)]


def encode(processor, *args) -> dict:
    """As the processor, with `[SEG]` in the place of "@": it would escape what a user writes."""
    batch = processor.encode_conversations(*args)
    ids = batch["input_ids"]
    ids[ids == processor.tokenizer.convert_tokens_to_ids("@")] = processor.seg_token_id
    return batch


def make_batch(processor, rows=range(4)) -> dict:
    """The batch of some of the rows above, with the images that they are about."""
    used = sorted({IMAGE_INDICES[row] for row in rows})
    batch = encode(
        processor,
        [image(*SIZES[index], seed=index) for index in used],
        [CONVERSATIONS[row] for row in rows],
        [used.index(IMAGE_INDICES[row]) for row in rows],
    )
    masks = masks_for(MASKS_PER_IMAGE)
    return {**batch, "mask_labels": [masks[index] for index in used]}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]()


def gradients(model) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def decodes_nothing(name: str) -> bool:
    return any(f".{module}." in name for module in UNTRAINED_DECODER_MODULES)


# ---- forward and backward -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["forward", "generate"])
def test_examples_of_docstrings_run(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, processor = llava_sam()
    model.save_pretrained("my-lisa")
    processor.save_pretrained("my-lisa")
    image(40, 60).save("photo.jpg")
    docstring = getattr(LisaForConditionalGeneration, method).__doc__.replace("```\n", "\n")
    example = doctest.DocTestParser().get_doctest(docstring, {}, method, None, 0)
    assert len(example.examples) > 5
    assert doctest.DocTestRunner().run(example).failed == 0


def test_forward_has_the_documented_shapes(family):
    model, processor = family
    batch = make_batch(processor)
    output = model(**batch)
    num_rows, length = batch["input_ids"].shape
    hidden_size, prompt_size = model.config.hidden_size, model.config.mask_config.prompt_encoder_config.hidden_size
    assert output.last_hidden_state.shape == (num_rows, length, hidden_size)
    assert [mask.shape for mask in output.pred_masks] == [(m, *size) for m, size in zip(MASKS_PER_IMAGE, SIZES)]
    assert output.low_res_masks.shape[0] == len(output.iou_scores) == 4 and output.low_res_masks.dim() == 3
    assert output.seg_embeddings.shape == (4, prompt_size)
    assert output.logits is None
    assert output.loss.dim() == 0 and output.loss.isfinite()
    parts = output.ce_loss + output.mask_bce_loss + output.mask_dice_loss
    torch.testing.assert_close(output.loss, parts, rtol=1e-6, atol=0)
    assert min(output.ce_loss, output.mask_bce_loss, output.mask_dice_loss) > 0


def test_gradients_reach_everything_that_answers(family):
    model, processor = family
    batch = make_batch(processor)
    model.train()
    model.mask_model.vision_encoder.requires_grad_(False)
    output = model(**batch)
    assert output.pred_masks is None  # they cost an upsampling that training has no use for
    output.loss.backward()
    for name, gradient in gradients(model).items():
        if name.startswith("mask_model.mask_decoder") and decodes_nothing(name):
            assert gradient is None or not gradient.any(), name
        elif name.startswith(("seg_projector", "mask_model.mask_decoder")) or ("vlm" in name and "vision" not in name):
            assert gradient is not None and gradient.any(), name
        elif name.startswith("mask_model.vision_encoder"):
            assert gradient is None, name
    vision_tower = [gradient for name, gradient in gradients(model).items() if "vlm" in name and "vision" in name]
    assert any(gradient is not None and gradient.any() for gradient in vision_tower)

    model.mask_model.vision_encoder.requires_grad_(True)
    model(**batch).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.mask_model.vision_encoder.parameters())


def test_checkpointing_changes_no_gradient():
    model, processor = llava_sam()
    batch = make_batch(processor)
    model.train()
    model(**batch).loss.backward()
    expected = copy.deepcopy(gradients(model))
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model(**batch).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_rows_share_their_image(family):
    """Rows about one image equal rows that each have a copy of it, and each image is encoded once."""
    model, processor = family
    encoded = {"vlm": 0, "mask": 0}
    tower = getattr(model.vlm.base_model, "vision_tower", None) or model.vlm.base_model.vision_model

    def count(key):
        def hook(_, args, kwargs):
            encoded[key] += len(args[0] if args else kwargs["pixel_values"])

        return hook

    tower.register_forward_pre_hook(count("vlm"), with_kwargs=True)
    model.mask_model.vision_encoder.register_forward_pre_hook(count("mask"), with_kwargs=True)

    shared_batch = make_batch(processor)
    shared = model(**shared_batch)
    crops = shared_batch["pixel_values"].flatten(0, -4).flatten(1).any(1).sum().item()  # idefics3 pads with zeros
    assert encoded == {"vlm": crops, "mask": 3}

    masks = shared_batch["mask_labels"]
    row_masks = [masks[1][:2], masks[0], masks[1][2:], masks[2]]
    repeated_batch = encode(processor, [image(*SIZES[index], seed=index) for index in IMAGE_INDICES], CONVERSATIONS)
    repeated = model(**repeated_batch, mask_labels=row_masks)
    assert encoded["mask"] == 3 + 4 and encoded["vlm"] > 2 * crops
    for name in ("loss", "ce_loss", "mask_bce_loss", "mask_dice_loss", "last_hidden_state"):
        torch.testing.assert_close(shared[name], repeated[name], rtol=1e-5, atol=1e-5, msg=name)
    by_image = [2, 0, 1, 3]  # the masks of image 0 (row 1), then those of image 1 (rows 0 and 2)
    torch.testing.assert_close(shared.low_res_masks, repeated.low_res_masks[by_image], rtol=0, atol=1e-5)
    torch.testing.assert_close(shared.pred_masks[1][2], repeated.pred_masks[2][0], rtol=0, atol=1e-5)


def direct_hidden_states(model, processor) -> torch.Tensor:
    """What the VLM itself computes from one image per row: no sharing, no precomputed features."""
    batch = encode(processor, [image(*SIZES[index], seed=index) for index in IMAGE_INDICES], CONVERSATIONS)
    ours = {"labels", "image_indices", "mask_pixel_values", "original_sizes", "reshaped_input_sizes"}
    inputs = {name: value for name, value in batch.items() if name not in ours}
    return model.vlm(**inputs, output_hidden_states=True).hidden_states[-1]


def test_prompts_are_the_states_that_predict_seg(family):
    model, processor = family
    batch = make_batch(processor)
    output = model(**batch)
    hidden_states = direct_hidden_states(model, processor)
    torch.testing.assert_close(output.last_hidden_state, hidden_states, rtol=0, atol=1e-5)

    # Rows 1, 0 and 2 hold the masks of images 0 and 1; the [SEG] of row 0's user does not count.
    ids = batch["input_ids"]
    positions = [(ids[row] == model.config.seg_token_id).nonzero().flatten().tolist() for row in range(4)]
    assert [len(found) for found in positions] == [2 + 1, 1, 1, 0]
    seg = [(1, positions[1][0]), (0, positions[0][0]), (0, positions[0][1]), (2, positions[2][0])]
    expected = model.seg_projector(torch.stack([hidden_states[row, position - 1] for row, position in seg]))
    torch.testing.assert_close(output.seg_embeddings, expected, rtol=0, atol=1e-5)
    at_seg = model.seg_projector(torch.stack([hidden_states[row, position] for row, position in seg]))
    assert (output.seg_embeddings - at_seg).abs().max() > 0.01


def test_masks_are_the_mask_models_own(family, monkeypatch):
    """The public forward of transformers' mask model gives the same masks when its prompt encoder returns ours."""
    model, processor = family
    batch = make_batch(processor)
    output = model(**batch)
    encoder_forward = model.mask_model.prompt_encoder.forward
    prompt = {}

    def prompt_encoder(*args, **kwargs):
        _, dense = encoder_forward(*args, **kwargs)
        return prompt["embedding"][None, None, None], dense

    monkeypatch.setattr(model.mask_model.prompt_encoder, "forward", prompt_encoder)
    for number, image_index in enumerate([0, 1, 1, 1]):
        prompt["embedding"] = output.seg_embeddings[number]
        is_hq = model.config.mask_config.model_type == "sam_hq"
        with patched_sam_hq_decoder(model.mask_model.mask_decoder) if is_hq else nullcontext():
            expected = model.mask_model(
                pixel_values=batch["mask_pixel_values"][image_index : image_index + 1],
                input_points=torch.zeros(1, 1, 1, 2),
                input_labels=torch.ones(1, 1, 1, dtype=torch.int),
                multimask_output=False,
            )
        torch.testing.assert_close(output.low_res_masks[number], expected.pred_masks[0, 0, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(output.iou_scores[number], expected.iou_scores[0, 0, 0], rtol=0, atol=1e-5)
    assert (output.low_res_masks[1] - output.low_res_masks[3]).abs().max() > 1e-3  # prompts matter


def qwen_batch() -> tuple[dict, list[list[int]]]:
    """Handmade inputs of [`qwen2_5_vl_sam`]: three images of different grids, four rows padded on the left."""
    generator = torch.Generator().manual_seed(0)
    grids = [[1, 4, 8], [1, 8, 4], [1, 4, 4]]
    rows = [
        [62, *[60] * (grids[index][1] * grids[index][2] // 4), 63, *range(3, 3 + length), 50]
        for index, length in zip(IMAGE_INDICES, (5, 9, 3, 7))
    ]
    longest = max(map(len, rows))
    input_ids = torch.tensor([[2] * (longest - len(row)) + row for row in rows])
    num_patches = [height * width for _, height, width in grids]
    batch = {
        "input_ids": input_ids,
        "attention_mask": (input_ids != 2).long(),
        "mm_token_type_ids": (input_ids == 60).long(),
        "pixel_values": torch.randn(sum(num_patches), 3 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor(grids),
        "image_indices": torch.tensor(IMAGE_INDICES),
        "mask_pixel_values": torch.randn(3, 3, SIDE, SIDE, generator=generator),
        "original_sizes": torch.tensor([[SIDE, SIDE]] * 3),
        "reshaped_input_sizes": torch.tensor([[SIDE, SIDE]] * 3),
    }
    return batch, num_patches


def test_qwen_positions_follow_the_image_of_the_row():
    model = qwen2_5_vl_sam()
    batch, num_patches = qwen_batch()
    pixels = batch["pixel_values"].split(num_patches)
    expected = model.vlm.model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        mm_token_type_ids=batch["mm_token_type_ids"],
        pixel_values=torch.cat([pixels[index] for index in IMAGE_INDICES]),
        image_grid_thw=batch["image_grid_thw"][IMAGE_INDICES],
    ).last_hidden_state
    real = batch["attention_mask"].bool()
    output = model(**batch, labels=batch["input_ids"], mask_labels=masks_for([1, 2, 1], [(SIDE, SIDE)] * 3))
    torch.testing.assert_close(output.last_hidden_state[real], expected[real], rtol=0, atol=1e-5)
    output.loss.backward()
    assert model.seg_projector.linear_1.weight.grad.any()

    prompts = {name: batch[name][:, :-1] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    generated = model.generate(
        **{**batch, **prompts}, max_new_tokens=2, logits_processor=[lambda _, s: s.index_fill(1, torch.tensor(50), 99)]
    )
    first = generated.low_res_masks[0::2]  # row by row; the model's own order is image by image
    torch.testing.assert_close(first[[1, 0, 2, 3]], output.low_res_masks, rtol=0, atol=1e-4)


# ---- masks and [SEG] ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_positions", [0, 1, 7])
def test_cross_entropy_in_chunks_equals_cross_entropy_at_once(num_positions, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_SIZE", 3)
    logits = torch.randn(num_positions, 11, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.arange(num_positions)
    loss, expected = chunked_cross_entropy(logits, labels), F.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, expected)))


def test_batch_without_masks(family):
    """Loss parts of 0; projector and decoder stay in the graph with gradients of 0, as DDP needs."""
    model, processor = family
    batch = make_batch(processor, rows=[3])
    assert [len(masks) for masks in batch["mask_labels"]] == [0]
    model.train()
    output = model(**batch, output_masks=True)
    assert output.mask_bce_loss == 0 and output.mask_dice_loss == 0
    assert output.loss == output.ce_loss > 0
    assert output.low_res_masks.shape[0] == len(output.seg_embeddings) == 0
    assert [mask.shape for mask in output.pred_masks] == [(0, 50, 50)]
    with_masks = copy.deepcopy(model)
    with_masks(**make_batch(processor)).loss.backward()
    output.loss.backward()
    expected = gradients(with_masks)
    for name, gradient in gradients(model).items():
        if name.startswith(("seg_projector", "mask_model.mask_decoder")):
            assert (gradient is None) == (expected[name] is None), name
            assert gradient is None or not gradient.any(), name


def test_rows_without_labels_give_a_ce_loss_of_zero():
    model, processor = llava_sam()
    batch = make_batch(processor, rows=[3])
    batch["labels"] = torch.full_like(batch["labels"], -100)
    output = model(**batch)
    assert output.loss == output.ce_loss == 0
    output.loss.backward()
    assert all(g is None or g.isfinite().all() for g in gradients(model).values())


def test_wrong_number_of_masks_raises():
    model, processor = llava_sam()
    batch = make_batch(processor)
    batch["mask_labels"] = masks_for([1, 2, 0])
    with pytest.raises(
        ValueError,
        match=r"one mask per \[SEG\], got 2 masks for the 3 .*image 1 \(rows \[0, 2\]\)\. Give the masks in",
    ):
        model(**batch)
    batch["mask_labels"] = masks_for([1, 3, 1])
    with pytest.raises(ValueError, match=r"got 1 masks for the 0 .*image 2 \(rows \[3\]\)"):
        model(**batch)
    batch["mask_labels"] = masks_for([1, 3])
    with pytest.raises(ValueError, match="got 2 for 3 images"):
        model(**batch)


def test_rows_and_images_must_match():
    model, processor = llava_sam()
    batch = make_batch(processor)
    without = {name: value for name, value in batch.items() if name != "image_indices"}
    with pytest.raises(ValueError, match="got 4 rows and 3 images.*image_indices"):
        model(**without)
    batch["input_ids"] = batch["input_ids"].clone()
    batch["input_ids"][3, batch["input_ids"][3] == model.config.vlm_config.image_token_id] = 5
    with pytest.raises(ValueError, match=r"got \[16, 16, 0\] tokens .* 3 images and 48 features"):
        model(**batch)


@pytest.mark.parametrize("size", [2**22, 2 * 64**2, 3 * 8 * 64])
@pytest.mark.parametrize("name", ["llava-sam", "llava-sam_hq"])
def test_chunked_attention_equals_attention_at_once(name, size, monkeypatch):
    """All at once; some heads at a time; some rows of the image as well."""
    model, processor = FAMILIES[name]()
    encoder = model.mask_model.vision_encoder
    for parameter in encoder.parameters():
        parameter.data.normal_(std=0.3)  # relative positions are zero in a new model
    global_layers = [layer.attn for layer in encoder.layers if layer.window_size == 0]
    assert global_layers
    pixels = make_batch(processor)["mask_pixel_values"]
    monkeypatch.setitem(BIAS_SIZE, "cpu", size)
    found = encoder(pixels).last_hidden_state
    for attention in global_layers:
        del attention.forward
    torch.testing.assert_close(found, encoder(pixels).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_image_embeddings_replace_pixels(family):
    model, processor = family
    batch = make_batch(processor)
    with torch.no_grad():  # with gradients, attention rounds differently
        expected = model(**batch)
        embeddings = encode_images(model.mask_model, batch.pop("mask_pixel_values"))
        output = model(**batch, image_embeddings=embeddings)
    torch.testing.assert_close(output.low_res_masks, expected.low_res_masks, rtol=0, atol=1e-6)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-6, atol=0)


# ---- losses ---------------------------------------------------------------------------------------------------------


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


# ---- saving and loading ---------------------------------------------------------------------------------------------


def assert_same_weights(actual, expected):
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different


def test_save_and_load(family, tmp_path):
    model, processor = family
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is LisaForConditionalGeneration and type(loaded_processor) is LisaProcessor
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is LisaForConditionalGeneration
    assert_same_weights(loaded, model)
    assert loaded.config.seg_token_id == model.config.seg_token_id
    assert type(loaded.config.vlm_config) is type(model.config.vlm_config)

    batch = make_batch(processor)
    loaded_batch = make_batch(loaded_processor)
    assert batch.keys() == loaded_batch.keys()
    for name in batch.keys() - {"mask_labels"}:
        assert torch.equal(batch[name], loaded_batch[name]), name
    expected, output = model(**batch), loaded(**loaded_batch)
    assert torch.equal(output.loss, expected.loss) and torch.equal(output.low_res_masks, expected.low_res_masks)


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_checkpoint_keys_are_those_in_memory(tmp_path, tie_word_embeddings):
    """Trainer resumes with a plain `load_state_dict`: a renamed key would leave its tensor untrained, silently."""
    model, _ = llava_sam(tie_word_embeddings)
    model.save_pretrained(tmp_path)
    fresh, _ = llava_sam(tie_word_embeddings)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(1)
    result = fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    tied = set(model.all_tied_weights_keys)
    assert not result.unexpected_keys and set(result.missing_keys) <= tied
    assert ("vlm.lm_head.weight" in tied) == tie_word_embeddings
    assert_same_weights(fresh, model)

    loaded = LisaForConditionalGeneration.from_pretrained(tmp_path)
    assert_same_weights(loaded, model)
    is_tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert is_tied == tie_word_embeddings


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_resized_vocabulary_reloads(tmp_path, tie_word_embeddings):
    model, processor = llava_sam(tie_word_embeddings)
    size = len(processor.tokenizer) + 3
    model.resize_token_embeddings(size)
    assert model.config.get_text_config().vocab_size == model.config.vlm_config.text_config.vocab_size == size
    model.save_pretrained(tmp_path)
    loaded = LisaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().weight.shape == loaded.get_output_embeddings().weight.shape == (size, 32)
    assert_same_weights(loaded, model)
    assert model(**make_batch(processor), output_logits=True).logits.shape[-1] == size


def test_generation_config_is_kept(tmp_path):
    """Gemma's end of turn, for one, is an end token in `generation_config.json` and nowhere else."""
    model, _ = gemma3_sam()
    model.vlm.generation_config.eos_token_id = [2, 77]
    model.vlm.generation_config.update(do_sample=True, top_k=7)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.vlm.generation_config.eos_token_id == [2, 77] and loaded.vlm.generation_config.top_k == 7
    assert loaded.generation_config is loaded.vlm.generation_config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_joining_two_pretrained_models(tmp_path, dtype):
    original, processor = llava_sam()
    original.vlm.generation_config.max_new_tokens = 5
    original.vlm.to(getattr(torch, dtype)).save_pretrained(tmp_path / "vlm")
    original.mask_model.save_pretrained(tmp_path / "sam")
    processor.vlm_processor.save_pretrained(tmp_path / "vlm")
    processor.mask_image_processor.save_pretrained(tmp_path / "sam")

    joined_processor = LisaProcessor.from_vlm_mask_model_pretrained(tmp_path / "vlm", tmp_path / "sam")
    joined = LisaForConditionalGeneration.from_vlm_mask_model_pretrained(
        tmp_path / "vlm", tmp_path / "sam", seg_token_id=joined_processor.seg_token_id
    )
    assert {parameter.dtype for parameter in joined.parameters()} == {getattr(torch, dtype)}
    assert_same_weights(joined.vlm, AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm"))
    assert_same_weights(joined.vlm, original.vlm)
    sam = AutoModelForMaskGeneration.from_pretrained(tmp_path / "sam", dtype=dtype)
    assert_same_weights(joined.mask_model, sam)
    assert joined.generation_config.max_new_tokens == 5
    assert joined.config.seg_token_id == processor.seg_token_id
    assert not joined.training and not any(parameter.is_meta for parameter in joined.parameters())
    assert joined.seg_projector.linear_1.weight.std() > 0.01  # drawn anew, as PyTorch draws

    joined.seg_projector.load_state_dict(original.seg_projector.state_dict())
    expected, output = original.float()(**make_batch(processor)), joined(**make_batch(joined_processor))
    torch.testing.assert_close(output.loss.float(), expected.loss, rtol=1e-6 if dtype == "float32" else 0.03, atol=0)
    output.loss.backward()
    assert joined.seg_projector.linear_1.weight.grad.any()

    joined.save_pretrained(tmp_path / "lisa")
    loaded = AutoModel.from_pretrained(tmp_path / "lisa")
    assert loaded.dtype == getattr(torch, dtype)
    assert_same_weights(loaded, joined)


def test_sam2_never_swaps_the_trained_mask():
    assert not llava_sam2()[0].mask_model.mask_decoder.dynamic_multimask_via_stability
    assert LisaConfig(mask_config=sam_config()).mask_config.prompt_encoder_config.image_size == SIDE
