"""LisaForConditionalGeneration.forward: shapes, gradients, prompts and masks, on tiny random models."""

import copy
import doctest
from contextlib import nullcontext

import pytest
import torch
from fixtures.shared_images import (
    CONVERSATIONS,
    IMAGE_INDICES,
    MASKS_PER_IMAGE,
    SIZES,
    encode,
    gradients,
    make_batch,
    masks_for,
)
from fixtures.tiny_models import FAMILIES, SIDE, image, llava_sam, qwen2_5_vl_sam

from lisa_hf import LisaForConditionalGeneration
from lisa_hf.model.mask_backbone import BIAS_SIZE, UNTRAINED_DECODER_MODULES, encode_images
from lisa_hf.model.upstream_fixes import patched_sam_hq_decoder


def decodes_nothing(name: str) -> bool:
    return any(f".{module}." in name for module in UNTRAINED_DECODER_MODULES)


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
