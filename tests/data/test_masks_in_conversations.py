"""Conversations with masks: rows whose answers have `[SEG]` within sentences, over several turns, or decline."""

import json
import re

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from fixtures.tiny_models import llava_sam

from data_scripts import load_sources
from lisa_hf import LisaDataCollator
from lisa_hf.data.masks import Mask, decode_mask, encode_mask
from lisa_hf.data.mixture import EvaluationDataset, MixtureDataset
from lisa_hf.data.prompts import evaluation_questions, sample_questions
from lisa_hf.data.rows import make_row
from lisa_hf.evaluation.counts import count_generated
from lisa_hf.evaluation.predict import cut_prompts
from lisa_hf.model.pipeline_lisa import Answer


SIZE = (40, 60)
TURNS = ["What is broken?", "The wheel [SEG] and the lamp [SEG] are.", "The door?", "There is none."]
MESSAGES = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, TURNS)]


def mask(index: int) -> np.ndarray:
    pixels = np.zeros(SIZE, dtype=bool)
    pixels[:, 10 * index : 10 * index + 5] = True
    return pixels


def talk_row(messages=MESSAGES, num_masks=2):
    targets = [{"rle": encode_mask(mask(index))} for index in range(num_masks)]
    return make_row("image.jpg", "image", "talk", "conversation", targets=targets, messages=messages)


def test_an_answer_has_a_mask_per_seg():
    assert [target["phrases"] for target in talk_row()["targets"]] == [["mask 1"], ["mask 2"]]
    assert talk_row(MESSAGES[2:], num_masks=0)["targets"] == []
    with pytest.raises(ValueError, match="expected messages and 2 targets, one per .SEG. .* got 1 targets"):
        talk_row(num_masks=1)


def test_training_learns_all_turns_and_evaluation_asks_each():
    (question,) = sample_questions(talk_row(), np.random.default_rng(0))
    assert [message["content"][-1]["text"] for message in question.messages] == TURNS
    assert question.masks == [Mask.from_rle(encode_mask(mask(index))) for index in range(2)]
    first, second = evaluation_questions(talk_row())
    assert first.masks == question.masks and second.masks == []
    assert [message["content"][-1]["text"] for message in second.messages] == TURNS
    assert second.messages[1]["is_context"] and "is_context" not in second.messages[3]


@pytest.fixture
def load(tmp_path):
    """Loads the rows of a source, as its configuration in YAML says."""
    (tmp_path / "photos").mkdir()
    PIL.Image.new("RGB", SIZE[::-1]).save(tmp_path / "photos" / "a.jpg")
    for index in range(2):
        PIL.Image.fromarray(mask(index)).save(tmp_path / "photos" / f"{index}.png")

    def rows(text: str):
        ((name, options),) = yaml.safe_load(text).items()
        (loaded,) = load_sources({name: options | {"cache_dir": str(tmp_path / "cache")}}, str(tmp_path)).values()
        return loaded

    return rows


def test_json_lines_of_conversations(load, tmp_path):
    records = [
        {"image": "a.jpg", "messages": MESSAGES, "masks": ["0.png", "1.png"]},
        {"image": "a.jpg", "messages": MESSAGES[2:]},
    ]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, records)))
    rows = load("talk: {builder: image_folder, questions: talk.jsonl, images: photos, masks: photos, split: train}")
    assert rows["task"] == ["conversation"] * 2
    assert [(decode_mask(target["rle"]) == mask(index)).all() for index, target in enumerate(rows[0]["targets"])] == [
        *(True, True)
    ]
    records[0]["masks"].pop()
    (tmp_path / "wrong.jsonl").write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(ValueError, match="line 1.*2 targets, one per .SEG."):
        load("talk: {builder: image_folder, questions: wrong.jsonl, images: photos, masks: photos, split: train}")


@pytest.mark.parametrize("kind", ["rle", "image"])
def test_columns_of_conversations_with_masks(load, tmp_path, kind):
    if kind == "rle":
        masks = [[encode_mask(mask(index)) for index in range(2)], []]
    else:
        masks = [[(tmp_path / "photos" / f"{index}.png").read_bytes() for index in range(2)], []]
    columns = {"image": [str(tmp_path / "photos" / "a.jpg")] * 2, "turns": [MESSAGES, MESSAGES[2:]], "mask": masks}
    table = datasets.Dataset.from_dict(columns)
    if kind == "image":
        table = table.cast_column("mask", datasets.List(datasets.Image()))
    (tmp_path / "hub").mkdir()
    table.to_parquet(tmp_path / "hub" / "train.parquet")
    rows = load("talk: {builder: hub, path: hub, messages_column: turns, split: train}")
    assert [len(row["targets"]) for row in rows] == [2, 0] and rows["task"] == ["conversation"] * 2
    assert (decode_mask(rows[0]["targets"][1]["rle"]) == mask(1)).all()


def test_drawn_scenes_as_conversations(load):
    rows = load("talk: {builder: shapes, conversations: true, num_train_scenes: 40, image_size: 64, split: train}")
    assert set(rows["task"]) == {"conversation"}
    answers = [message["content"] for row in rows for message in row["messages"][1::2]]
    counts = {answer.count("[SEG]") for answer in answers}
    assert counts == {0, 1, 2} and any("There is no" in answer and "[SEG]" in answer for answer in answers)
    for row in rows:
        named = [target["phrases"][0] for target in row["targets"]]
        text = " ".join(message["content"] for message in row["messages"][1::2])
        assert [f"The {name} is [SEG]." in text for name in named] == [True] * len(named)
        refused = re.findall(r"There is no (\w+) ", text)
        assert len({*refused}) == len(refused) and not {*refused} & {name.split()[0] for name in named}
    assert 0.4 < sum(answer.count("There is no") for answer in answers) / sum(map(len, map(names_of, rows))) < 0.6


def names_of(row) -> list[str]:
    """What the questions of a drawn scene ask for."""
    asked = (message["content"] for message in row["messages"][::2])
    return [name for text in asked for name in re.findall(r"the (\w+ \w+) (?:in|and)", text)]


@pytest.mark.parametrize("packing", [False, True])
def test_batches_learn_and_are_scored_per_target(load, packing):
    """Every `[SEG]` of a conversation has its mask in training; in evaluation every turn is a separate row."""
    model, processor = llava_sam()
    rows = load("talk: {builder: shapes, conversations: true, num_train_scenes: 6, image_size: 64, split: train}")
    mixture = MixtureDataset({"talk": rows}, length=4)
    batch = LisaDataCollator(processor, packing=packing)([mixture[index] for index in range(4)])
    del batch["meta"]
    labels = batch.get("shift_labels", batch["labels"] if "labels" in batch else None)
    assert (labels == processor.seg_token_id).sum() == sum(len(masks) for masks in batch["mask_labels"])
    assert torch.isfinite(model(**batch).loss)

    evaluation = EvaluationDataset(rows)
    batch = LisaDataCollator(processor)([evaluation[0], evaluation[1]])
    assert len(batch["input_ids"]) == 8 and batch["image_indices"].tolist() == [0] * 4 + [1] * 4
    due = (batch["labels"] == processor.seg_token_id).sum(1)
    assert due.tolist() == [len(question.masks) for item in (0, 1) for question in evaluation[item]["questions"]]
    prompts = cut_prompts(batch, processor)
    for row, item in enumerate([0] * 4 + [1] * 4):
        question = evaluation[item]["questions"][row % 4]
        prompt = processor.apply_chat_template(question.messages[:-1], add_generation_prompt=True, tokenize=False)
        expected = processor(evaluation[item]["image"], prompt)["input_ids"][0]
        assert prompts["input_ids"][row][prompts["attention_mask"][row] == 1].equal(expected)
    perfect = [
        torch.stack([torch.from_numpy(mask.draw()) == 1 for mask in question.masks])
        if question.masks
        else torch.zeros((0, 64, 64), dtype=torch.bool)
        for item in (0, 1)
        for question in evaluation[item]["questions"]
    ]
    answers = [Answer("", masks, torch.ones(len(masks))) for masks in perfect]
    counts = count_generated(batch, answers, processor.seg_token_id)
    assert counts["generated_intersections"].equal(counts["generated_unions"])
