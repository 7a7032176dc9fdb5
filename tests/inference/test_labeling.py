"""Many images through a model: interruptions leave no trace, and labeling tools' readers read what is written."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from fixtures.tiny_models import FAMILIES, image

from data_scripts import load_source
from lisa_hf.data.masks import decode_mask
from lisa_hf.inference.annotation_files import (
    _write_pictures,
    annotation_paths,
    answer_record,
    record_masks,
    to_coco,
    write_annotations,
)
from lisa_hf.inference.labeling import (
    find_images,
    label_images,
    open_output_dir,
    questions_by_image,
    read_questions,
    read_records,
)
from lisa_hf.model.generation_lisa import LisaGenerationMixin
from lisa_hf.model.pipeline_lisa import Answer


QUESTIONS = [{"question": "What is the red circle?", "label": "circle"}, {"question": "Is it?"}]


@pytest.fixture
def photos(tmp_path):
    """Five photos of several sizes in two directories, and a file that is none."""
    directory = tmp_path / "photos"
    (directory / "more").mkdir(parents=True)
    for index, name in enumerate(["a.png", "b.png", "c.png", "more/a.png", "more/d.JPG"]):
        image(30 + index, 40, seed=index).save(directory / name, "PNG")
    (directory / "broken.png").write_bytes(b"no picture")
    (directory / "notes.txt").write_text("not an image either")
    return directory


@pytest.fixture
def answer_with_masks(monkeypatch):
    """A tiny model; its answers have a `[SEG]` at every third position."""
    model, processor = FAMILIES["llava-sam"]()
    end, seg = model.vlm.generation_config.eos_token_id, model.config.seg_token_id
    original = LisaGenerationMixin.generate

    def choose(input_ids, scores):
        is_third = input_ids.shape[1] % 3 == 0
        scores[:, [seg, end]] = -99
        scores[:, seg] += 200 * is_third
        return scores

    def generate(self, *args, **kwargs):
        return original(self, *args, **kwargs | {"logits_processor": [choose]})

    monkeypatch.setattr(LisaGenerationMixin, "generate", generate)
    return model, processor


def label(model_and_processor, photos, output_dir, batch_size=2):
    images = find_images([str(photos)])
    output_dir.mkdir(exist_ok=True)
    questions = questions_by_image(images, QUESTIONS)
    return images, label_images(*model_and_processor, images, questions, output_dir, batch_size, max_new_tokens=4)


def test_images_are_found_by_file_directory_pattern_and_address(photos):
    names = ["a.png", "b.png", "broken.png", "c.png", "more/a.png", "more/d.JPG"]
    assert list(find_images([str(photos)])) == names
    (photos / "phone.HEIC").write_bytes(b"not read here, but named")
    assert list(find_images([str(photos)])) == [*names, "phone.HEIC"]
    (photos / "camera.mpo").write_bytes(b"")
    (photos / ".ipynb_checkpoints").mkdir()
    for hidden in ("._a.png", ".ipynb_checkpoints/a-checkpoint.png"):
        (photos / hidden).write_bytes(b"left by a system")
    assert list(find_images([str(photos)])) == sorted([*names, "phone.HEIC", "camera.mpo"])
    assert find_images([str(photos / "a.png")]) == {"a.png": str(photos / "a.png")}
    assert list(find_images([str(photos / "?.png"), str(photos / "more"), "http://host/x.jpg"])) == [
        *("a.png", "b.png", "c.png", "more/a.png", "more/d.JPG", "http://host/x.jpg")
    ]
    with pytest.raises(ValueError, match="got none at .*nowhere"):
        find_images([str(photos / "nowhere")])


def test_questions_are_read_and_assigned(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "All?"}\n\n{"question": "One?", "image": "b.png", "label": "one"}\n', "utf-8")
    asked = questions_by_image({"a.png": "/a.png", "b.png": "/b.png"}, read_questions(path))
    assert [[question["question"] for question in questions] for questions in asked.values()] == [
        ["All?"],
        ["All?", "One?"],
    ]
    with pytest.raises(ValueError, match="got one about b.png"):
        questions_by_image({"a.png": "/a.png"}, read_questions(path))
    for empty in (" ", None, 5):
        with pytest.raises(ValueError, match="expected a question of at least one word"):
            questions_by_image({"a.png": "/a.png"}, [{"question": empty}])
    path.write_text(json.dumps({"question": "Wo?"}), "utf-8-sig")  # as Notepad saves it
    assert read_questions(path) == [{"question": "Wo?"}]
    path.write_text('{"question": "All?"}\n{"text": "?"}\n', "utf-8")
    with pytest.raises(ValueError, match="questions.jsonl, line 2: expected an object with `question`"):
        read_questions(path)
    path.write_text("What?\n", "utf-8")
    with pytest.raises(ValueError, match="line 1: expected JSON"):
        read_questions(path)


def test_an_interrupted_run_ends_as_an_undisturbed_one(answer_with_masks, photos, tmp_path, capsys):
    _, expected = label(answer_with_masks, photos, tmp_path / "whole")
    assert "broken.png: skipped: expected an image that can be read" in capsys.readouterr().out
    assert [record["image"] for record in expected[:4]] == ["a.png", "a.png", "b.png", "b.png"]
    assert "error" in expected[4] and len(expected) == 12
    # Two batches were written, the second one not to its end.
    lines = (tmp_path / "whole" / "predictions.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "predictions.1.jsonl").write_text("".join(lines[:4]), "utf-8")
    (tmp_path / "cut" / "predictions.0.jsonl").write_text(lines[8] + lines[9] + lines[10][:60], "utf-8")
    _, records = label(answer_with_masks, photos, tmp_path / "cut")
    assert records == expected
    assert [path.name for path in sorted((tmp_path / "cut").iterdir())] == ["predictions.jsonl"]
    assert list(read_records(tmp_path / "cut").values()) == expected


def test_a_mended_image_is_added(answer_with_masks, photos, tmp_path):
    label(answer_with_masks, photos, tmp_path / "out")
    image(20, 20).save(photos / "broken.png")
    _, records = label(answer_with_masks, photos, tmp_path / "out")
    assert all("text" in record for record in records)


def test_other_settings_do_not_mix(tmp_path):
    output_dir = tmp_path / "out"
    open_output_dir(output_dir, {"model": "a", "batch_size": "1"}, {}, overwrite=False)
    records = [{"image": "a.png", "question": question, "text": "", "masks": []} for question in "ab"]
    (output_dir / "predictions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (output_dir / "mine.txt").write_text("")
    open_output_dir(output_dir, {"model": "a", "batch_size": "1"}, {}, overwrite=False)
    with pytest.raises(ValueError, match="got others: model"):
        open_output_dir(output_dir, {"model": "b", "batch_size": "1"}, {}, overwrite=False)
    open_output_dir(output_dir, {"model": "b", "batch_size": "1"}, {}, overwrite=True)
    assert sorted(path.name for path in output_dir.iterdir()) == ["mine.txt", "settings.json"]


def test_a_single_answer_makes_room_for_the_next(answer_with_masks, photos, tmp_path):
    images, output_dir = {"a.png": str(photos / "a.png")}, tmp_path / "out"
    for question, num_tokens in (("What is it?", 8), ("Is it?", 4)):
        questions = questions_by_image(images, [{"question": question}])
        open_output_dir(output_dir, {"questions": questions}, {}, overwrite=False)
        records = label_images(*answer_with_masks, images, questions, output_dir, max_new_tokens=num_tokens)
        write_annotations("masks", records, images, output_dir)
        (record,) = records
        assert record["question"] == question
        assert len(list(output_dir.glob("mask_*.png"))) == len(record["masks"]) > 0


def test_corrected_labels_are_kept(answer_with_masks, photos, tmp_path):
    images, records = label(answer_with_masks, photos, tmp_path / "out")
    assert write_annotations("labelme", records, images, tmp_path / "out") == []
    assert write_annotations("labelme", records, images, tmp_path / "out", keep_edited=True) == []
    corrected = tmp_path / "out" / "a.json"
    corrected.write_text("mine")
    assert write_annotations("labelme", records, images, tmp_path / "out", keep_edited=True) == [corrected]
    assert corrected.read_text() == "mine"


@pytest.mark.parametrize("format", ["labelme", "coco"])
def test_our_builders_read_what_is_written(answer_with_masks, photos, tmp_path, format):
    for path in [*photos.glob("more/*"), photos / "broken.png"]:
        path.unlink()
    images, records = label(answer_with_masks, photos, tmp_path / "out")
    write_annotations(format, records, images, tmp_path / "out")
    if format == "coco":
        options = {"builder": "coco_instances", "annotations": str(tmp_path / "out" / "instances.json")}
    else:
        for name in ("predictions.jsonl", "settings.json"):
            (tmp_path / "out" / name).unlink(missing_ok=True)
        options = {"builder": "labelme", "annotations": str(tmp_path / "out")}
    rows = load_source(format, images=str(photos), **options)
    assert len(rows) == 3
    for row, name in zip(rows, ("a.png", "b.png", "c.png")):
        expected = [
            (record["label"], mask)
            for record in records
            for mask in record_masks(record)
            if record["image"] == name and mask.any()
        ]
        assert expected
        found = [(target["phrases"][0], decode_mask(target["rle"]) == 1) for target in row["targets"]]
        assert [label for label, _ in found] == [label for label, _ in expected]
        assert all(np.array_equal(mask, other) for (_, mask), (_, other) in zip(found, expected))


def test_images_that_would_share_a_file_are_refused(tmp_path):
    images = {"a.png": "/a.png", "b.png": "/b.png", "a.jpg": "/a.jpg"}
    assert annotation_paths("coco", images, 3, tmp_path)
    with pytest.raises(ValueError, match="got a.png and a.jpg. Rename one"):
        annotation_paths("labelme", images, 3, tmp_path)


def test_boxes_and_areas_of_coco():
    masks = np.zeros((2, 5, 7), dtype=bool)
    masks[0, 1:4, 2:4] = True
    record = answer_record("a.png", "Where?", Answer("", torch.from_numpy(masks), torch.tensor([0.5, 0.25])))
    (annotation,) = to_coco([record])["annotations"]  # an empty mask is none
    assert (annotation["bbox"], annotation["area"], annotation["score"]) == ([2, 1, 2, 3], 6, 0.5)


def test_the_overlay_of_a_large_photo_is_reduced(tmp_path):
    photo = PIL.Image.new("RGB", (3000, 1000))
    masks = np.zeros((1, 1000, 3000), dtype=bool)
    masks[:, :, :1500] = True
    _write_pictures(tmp_path, photo, masks)
    assert photo.size == PIL.Image.open(tmp_path / "mask_0.png").size == (3000, 1000)
    overlay = np.asarray(PIL.Image.open(tmp_path / "overlay.png"))
    assert overlay.shape == (683, 2048, 3) and overlay[:, :1023].any() and not overlay[:, 1025:].any()


def test_masks_are_pictures(answer_with_masks, photos, tmp_path):
    images, records = label(answer_with_masks, photos, tmp_path / "out")
    write_annotations("masks", records, images, tmp_path / "out")
    mask = np.asarray(PIL.Image.open(tmp_path / "out" / "more" / "a.png" / "question_1" / "mask_0.png"))
    (record,) = [record for record in records if record["image"] == "more/a.png" and record["question"] == "Is it?"]
    assert np.array_equal(mask, record_masks(record)[0])
    assert PIL.Image.open(tmp_path / "out" / "a.png" / "question_0" / "overlay.png").size == (40, 30)
