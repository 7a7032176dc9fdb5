"""`pipeline("reasoning-segmentation")` with the package installed; without it, see `test_remote_code.py`."""

import PIL.ExifTags
import PIL.Image
import pytest
import torch
from fixtures.tiny_models import FAMILIES, image
from transformers import pipeline

from lisa_hf.evaluation.predict import answer_questions
from lisa_hf.model.conversation_text import user_message


SIZES = [(40, 60), (64, 64), (50, 24)]  # (height, width)
QUESTIONS = ["What is red?", "What is the red circle in this image? Answer.", "?"]


def only_seg(processor) -> dict:
    """Answers of `[SEG]` and the end token alone, so that they differ in their number of masks."""
    allowed = torch.tensor([processor.seg_token_id, processor.tokenizer.eos_token_id])
    keep = [lambda _, scores: torch.full_like(scores, -torch.inf).index_copy(1, allowed, scores[:, allowed])]
    return {"max_new_tokens": 3, "generate_kwargs": {"logits_processor": keep, "min_new_tokens": 1}}


@pytest.mark.parametrize(
    "family", ["llava-sam", "idefics3-sam"]
)  # the latter's images differ in their number of tiles
def test_a_batch_gives_what_its_rows_give(family):
    model, processor = FAMILIES[family]()
    pipe = pipeline("reasoning-segmentation", model=model, processor=processor)
    options = only_seg(processor)
    inputs = [{"image": image(*size), "question": question} for size, question in zip(SIZES, QUESTIONS)]
    single = [pipe(row["image"], question=row["question"], **options) for row in inputs]
    assert all(len(answer["masks"]) for answer in single)
    for answers in (pipe(inputs, batch_size=2, **options), list(pipe(iter_of(inputs), batch_size=3, **options))):
        assert len(answers) == 3
        for answer, expected, size in zip(answers, single, SIZES):
            assert answer["text"] == expected["text"]
            assert answer["masks"].dtype == torch.bool and answer["masks"].shape[1:] == size
            assert (
                answer["masks"] != expected["masks"]
            ).float().mean().nan_to_num() < 1e-3  # padding rounds otherwise
            torch.testing.assert_close(answer["scores"], expected["scores"], rtol=0, atol=1e-4)
            assert len(answer["scores"]) == len(answer["masks"]) == answer["text"].count("[SEG]")


def iter_of(rows):
    yield from rows


def test_one_question_about_several_files_from_a_directory(tmp_path):
    model, processor = FAMILIES["llava-sam"]()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    paths = []
    for index, size in enumerate(SIZES):
        image(*size).save(tmp_path / f"{index}.png")
        paths.append(str(tmp_path / f"{index}.png"))
    pipe = pipeline("reasoning-segmentation", model=str(tmp_path / "model"))  # the package's own code needs no trust
    answers = pipe(paths, question=QUESTIONS[0], max_new_tokens=4)
    for answer, size in zip(answers, SIZES, strict=True):
        (expected,) = answer_questions(model, processor, image(*size), [[user_message(QUESTIONS[0])]], 4)
        assert answer["text"] == expected.text and torch.equal(answer["masks"], expected.masks)


def test_a_turned_photo_is_answered_upright(tmp_path):
    model, processor = FAMILIES["llava-sam"]()
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    image(40, 60).save(tmp_path / "upright.png")
    image(40, 60).transpose(PIL.Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    pipe = pipeline("reasoning-segmentation", model=model, processor=processor)
    paths = [str(tmp_path / "upright.png"), str(tmp_path / "turned.png")]
    upright, turned = pipe(paths, question="?", **only_seg(processor))
    assert upright["masks"].shape[1:] == (40, 60) and len(upright["masks"])
    assert torch.equal(upright["masks"], turned["masks"])


def test_threshold_is_of_the_logits():
    model, processor = FAMILIES["llava-sam"]()
    seg = torch.tensor(processor.seg_token_id)
    options = {"logits_processor": [lambda _, scores: scores.index_fill(1, seg, 99)]}
    pipe = pipeline("reasoning-segmentation", model=model, processor=processor, generate_kwargs=options)
    low, high = (
        pipe(image(40, 60), question="?", max_new_tokens=1, mask_threshold=threshold) for threshold in (-1e4, 1e4)
    )
    assert low["masks"].all() and len(high["masks"]) and not high["masks"].any()


def test_what_is_wrong_is_said():
    model, processor = FAMILIES["llava-sam"]()
    pipe = pipeline("reasoning-segmentation", model=model, processor=processor)
    with pytest.raises(ValueError, match="'image' and 'question', got Image"):
        pipe(image(40, 60))
    with pytest.raises(ValueError, match="got one of \\['image'\\]"):
        pipe({"image": image(40, 60)})
    with pytest.raises(ValueError, match="expected `max_new_tokens` or `mask_threshold`, got top_p"):
        pipe(image(40, 60), question="?", top_p=0.5)
