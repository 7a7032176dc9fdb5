"""Items become batches: their content, what is skipped, and what is rejected."""

import io

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Image
from fixtures.tiny_models import FAMILIES, image
from fixtures.tiny_training import IMAGE_SIZE, MASKS_DUE, Items, collate, make_item
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import SamImageProcessorPil

from lisa_hf import LisaDataCollator
from lisa_hf.data.collator import BatchMeta, expand_batch
from lisa_hf.data.images import load_row_image, reduce_decoding
from lisa_hf.data.masks import Mask, compact_mask_labels, draw_mask_labels, encode_mask
from lisa_hf.data.prompts import evaluation_questions
from lisa_hf.data.rows import FEATURES, make_row
from lisa_hf.model.processing_lisa import TextTooLongError


def with_long_question(item: dict, number: int, words: int = 40) -> dict:
    """Makes one question of an item so long that its `[SEG]` lies behind those of all others."""
    item["questions"][number].messages[0]["content"][1]["text"] += " Why?" * words
    return item


@pytest.fixture
def processor(tiny):
    return tiny[1]


@pytest.fixture
def max_length(processor) -> int:
    """Longest row of the first eight items."""
    return LisaDataCollator(processor)(list(Items(8)))["input_ids"].shape[1]


def test_batch(processor):
    items = list(Items(6))
    batch = LisaDataCollator(processor)(items)
    rows = [(index, question) for index, item in enumerate(items) for question in item["questions"]]
    num_images, num_rows = len(items), len(rows)
    assert batch.keys() == {
        *("input_ids", "attention_mask", "labels", "image_indices", "pixel_values"),
        *("mask_pixel_values", "original_sizes", "reshaped_input_sizes", "mask_labels", "meta"),
    }
    assert batch["pixel_values"].shape == batch["mask_pixel_values"].shape == (num_images, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["image_indices"].tolist() == [index for index, _ in rows]
    assert batch["original_sizes"].tolist() == [[item["image"].height, item["image"].width] for item in items]

    tokenizer = processor.tokenizer
    assert len(batch["input_ids"]) == num_rows
    for row, (_, question) in enumerate(rows):
        supervised = batch["labels"][row] != -100
        assert torch.equal(batch["labels"][row][supervised], batch["input_ids"][row][supervised])
        answer = question.messages[1]["content"][0]["text"]
        # "[SEG]" swallows the spaces around it.
        text = tokenizer.decode(batch["labels"][row][supervised])
        assert text.replace(" ", "") == answer.replace(" ", "") + tokenizer.eos_token
        assert (batch["labels"][row] == processor.seg_token_id).sum() == len(question.masks)
        assert not supervised[batch["attention_mask"][row] == 0].any()


def test_masks_are_in_the_order_of_the_seg_tokens_and_ignored_where_nothing_else_is_said(processor):
    items = [make_item(index, due) for index, due in enumerate(MASKS_DUE[:6])]
    assert {item["ignore"] is None for item in items} == {True, False}
    batch = LisaDataCollator(processor)(items)
    for item, masks in zip(items, batch["mask_labels"], strict=True):
        expected = [mask.draw() == 1 for question in item["questions"] for mask in question.masks]
        assert masks.dtype == torch.uint8
        assert masks.shape == (len(expected), item["image"].height, item["image"].width)
        for mask, target in zip(masks.numpy(), expected):
            ignore = np.zeros_like(target) if item["ignore"] is None else item["ignore"].draw() == 1
            assert (mask == np.where(target, 1, np.where(ignore, 255, 0))).all()
        assert (masks == 255).any() == (item["ignore"] is not None and len(masks) > 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_compact_batch_expands_to_the_plain_one(name):
    _, processor = FAMILIES[name]()
    items = [make_item(index, due) for index, due in enumerate(MASKS_DUE[:6])]
    plain = collate(processor, items)
    compact = collate(processor, items, compact=True)
    assert compact["mask_pixel_values"].dtype == torch.uint8
    # Idefics3 pads images with zeros after it has normalized them.
    assert (compact["pixel_values"].dtype == torch.uint8) == (name != "idefics3-sam")
    expanded = expand_batch(compact, processor)
    assert expanded.keys() == plain.keys() and expand_batch(plain, processor) is plain
    for key, value in plain.items():
        if key.endswith("pixel_values"):
            assert expanded[key].dtype == torch.float32
        torch.testing.assert_close(expanded[key], value, rtol=0, atol=1e-6)


def test_text_too_long_for_its_seg_stops(processor, max_length):
    items = [make_item(0, [1]), with_long_question(make_item(1, [1, 1]), 1)]
    with pytest.raises(
        TextTooLongError,
        match=rf"image_1 of drawn: .*max_length={max_length} tokens.*lose a \[SEG\].*Raise max_length",
    ):
        LisaDataCollator(processor, max_length)(items)
    LisaDataCollator(processor, max_length + 200)(items)


def test_text_too_long_for_its_seg_is_skipped_and_counted(processor, max_length, caplog):
    collator = LisaDataCollator(processor, max_length, on_bad_row="skip")
    items = [
        make_item(0, [1]),
        with_long_question(make_item(1, [1, 1, 0]), 1),
        with_long_question(make_item(2, [1]), 0),
        make_item(3, [0]),
    ]
    items[3]["num_skipped"] = 2
    batch = collator(items)
    assert batch["meta"] == BatchMeta(["drawn"] * 3, ["image_0", "image_1", "image_3"], num_skipped=2 + 2)
    assert batch["image_indices"].tolist() == [0, 1, 1, 2]
    assert batch["original_sizes"].tolist() == [
        [item["image"].height, item["image"].width] for item in (items[0], items[1], items[3])
    ]
    kept = [items[1]["questions"][0], items[1]["questions"][2]]
    assert [len(masks) for masks in batch["mask_labels"]] == [1, 1, 0]
    masks = [mask for question in kept for mask in question.masks]
    expected = draw_mask_labels(*compact_mask_labels(masks, items[1]["ignore"]), items[1]["original_size"])
    assert torch.equal(batch["mask_labels"][1], expected)
    assert collator(items[:1])["meta"].num_skipped == 0
    assert "image_1 of drawn" in caplog.text and "image_2 of drawn" in caplog.text

    with pytest.raises(TextTooLongError):
        collator([items[2]])


def test_reasoning_while_thinking_is_off_is_refused_or_skipped(processor, caplog):
    items = [make_item(0, [1]), make_item(1, [1, 1])]
    items[1]["questions"][0].messages[1]["reasoning_content"] = "It is round."
    with pytest.raises(ValueError, match="image_1 of drawn: .*thinking is off, got 'It is round.'"):
        LisaDataCollator(processor)(items)
    batch = LisaDataCollator(processor, on_bad_row="skip")(items)
    assert batch["meta"].num_skipped == 1 and batch["image_indices"].tolist() == [0, 1]
    assert "Skipped a question about image_1 of drawn: expected answers without reasoning_content" in caplog.text


def test_text_without_a_seg_at_its_end_is_cut(processor, max_length):
    (item,) = (make_item(0, [0]),)
    item["questions"][0].messages[1]["content"][0]["text"] += " The answer is red." * 40
    whole = LisaDataCollator(processor)([item])
    cut = LisaDataCollator(processor, max_length)([item])
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(cut[name], whole[name][:, :max_length])
    assert whole["input_ids"].shape[1] > max_length


def test_mask_of_another_size_names_its_image(processor):
    item = make_item(0, [1])
    item["questions"][0].masks[0] = Mask((7, 9), np.array([0, 63], dtype=np.int32))
    height, width = item["image"].height, item["image"].width
    with pytest.raises(ValueError, match=rf"image_0 of drawn: .* \[{height}, {width}\] .*got one of \[7, 9\]"):
        LisaDataCollator(processor)([item])


def photo_item(height: int, width: int, min_decoded_edge: int | None) -> dict:
    """An item about a JPEG, with two masks."""
    file = io.BytesIO()
    image(height, width).save(file, format="JPEG")
    masks = np.random.default_rng(0).random((2, height, width)) < 0.5
    targets = [{"phrases": [f"circle {index}"], "rle": encode_mask(mask)} for index, mask in enumerate(masks)]
    row = make_row(file.getvalue(), "photo", "photos", "semantic", targets=targets)
    (row,) = Dataset.from_list([row], features=FEATURES).cast_column("image", Image(decode=False))
    return {
        **load_row_image(row, min_decoded_edge=min_decoded_edge),
        **{"image_id": "photo", "source": "photos", "ignore": None},
        "questions": evaluation_questions(row),
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_photo_of_reduced_scale_has_the_sizes_and_masks_of_the_full_one(name):
    model, processor = FAMILIES[name]()
    full, reduced = (collate(processor, [photo_item(240, 320, edge)]) for edge in (None, 64))
    for key in ("original_sizes", "reshaped_input_sizes", "mask_labels"):
        torch.testing.assert_close(reduced[key], full[key], rtol=0, atol=0)
    assert not torch.equal(reduced["mask_pixel_values"], full["mask_pixel_values"])
    # The model refuses a text whose image tokens are not as many as the image's features.
    assert model(**reduced).loss.isfinite()


@given(
    edges=st.tuples(st.integers(40, 400), st.integers(40, 400)),
    min_decoded_edge=st.integers(8, 64),
    side=st.integers(16, 64),
)
@settings(max_examples=100, deadline=None)
def test_reduced_scale_does_not_change_what_sam_resizes_to(edges, min_decoded_edge, side):
    processor = SamImageProcessorPil(size={"longest_edge": side}, pad_size={"height": side, "width": side})
    file = io.BytesIO()
    PIL.Image.new("RGB", edges).save(file, format="JPEG")
    full, reduced = PIL.Image.open(file), PIL.Image.open(file)
    reduce_decoding(reduced, min_decoded_edge)
    assert processor(reduced)["reshaped_input_sizes"] == processor(full)["reshaped_input_sizes"]


def test_unknown_setting():
    with pytest.raises(ValueError, match="on_bad_row: expected 'raise' or 'skip', got 'ignore'"):
        LisaDataCollator(None, on_bad_row="ignore")


@pytest.mark.parametrize("compact", [False, True])
def test_batches_are_the_same_from_loader_workers(processor, compact):
    items = Items(8)
    items.items[5]["num_skipped"] = 3
    collator = LisaDataCollator(processor, compact=compact)
    here = list(DataLoader(items, batch_size=4, collate_fn=collator))
    there = list(DataLoader(items, batch_size=4, collate_fn=collator, num_workers=2))
    for batch, expected in zip(there, here, strict=True):
        assert batch.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(batch[name], value)
            elif isinstance(value, list):
                assert all(torch.equal(mask, other) for mask, other in zip(batch[name], value, strict=True))
            else:
                assert batch[name] == value
    assert [batch["meta"].num_skipped for batch in there] == [0, 3]
