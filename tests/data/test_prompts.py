"""Questions and answers: the texts of the original (tests/golden/datasets.json), and how they are drawn."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from fixtures.paths import GOLDEN

from lisa_hf.data.masks import Mask, encode_mask
from lisa_hf.data.prompts import evaluation_questions, sample_questions
from lisa_hf.data.rows import make_row
from lisa_hf.model.conversation_text import CUT_MARK


GOLDEN = json.loads((GOLDEN / "datasets.json").read_text(encoding="utf-8"))
# Enough for every golden text to turn up: the rarest comes in one draw of thirteen.
NUM_DRAWS = 600
EXPLANATIONS = {
    "c_expl.jpg": "The knife can be used to cut food because it is sharp.",
    "a_utf8.jpg": "The stove keeps the food warm.",
}


def mask(index):
    """A mask that no other index has."""
    array = np.zeros((4, 64), dtype=np.uint8)
    array[:2, index] = 1
    return Mask.from_rle(encode_mask(array))


def target(index, *phrases):
    return {"phrases": list(phrases), "rle": mask(index).to_rle()}


def row(task, *targets, **kwargs):
    return make_row("image.jpg", "image", "test", task, targets=targets, **kwargs)


def texts(question):
    """The question and the answer, after a check that they are laid out as chat messages."""
    user, assistant = question.messages
    assert [user["role"], assistant["role"]] == ["user", "assistant"]
    image, text = user["content"]
    (answer,) = assistant["content"]
    assert image == {"type": "image"} and text["type"] == answer["type"] == "text"
    assert answer["text"].count("[SEG]") == len(question.masks)
    return text["text"], answer["text"]


def draw_many(row, num_draws=NUM_DRAWS, **kwargs):
    return [sample_questions(row, np.random.default_rng([7, seed]), **kwargs) for seed in range(num_draws)]


def golden_rows():
    for source, record in GOLDEN.items():
        if source.startswith(("sem_seg", "refer_seg", "reason_seg")):
            for image, expected in record["images"].items():
                yield pytest.param(source, image, expected, id=f"{source}-{image.rsplit('/', 1)[-1]}")


def row_of_golden(source, image, expected):
    """The row that a builder would make: phrases that had the same masks in the original are one target."""
    groups = {}
    for phrase, masks in expected["phrases"].items():
        key = tuple(mask["sha1_raw_uint8"] for mask in masks if mask["area"] is not None)
        groups.setdefault(key or ("no mask",), []).append(phrase)
    keys = [(sha, phrases) for shas, phrases in groups.items() for sha in shas]
    targets = [target(index, *phrases) for index, (_, phrases) in enumerate(keys)]
    if source.startswith("reason_seg"):
        explained = not source.endswith("explanatory=-1")
        return row(
            "reasoning",
            *targets,
            is_sentence=next(iter(expected["phrases"])).endswith("?"),
            explanation=EXPLANATIONS.get(image.rsplit("/", 1)[-1]) if explained else None,
        )
    return row("semantic" if source.startswith("sem_seg") else "referring", *targets)


@pytest.mark.parametrize("source, image, expected", list(golden_rows()))
def test_training_texts_are_those_of_the_original(source, image, expected):
    """Exactly the questions and answers that the original produced, for all phrases of the image."""
    probability = 1.0 if source.endswith("explanatory=1.0") else 0.1
    draws = draw_many(row_of_golden(source, image, expected), explanatory_probability=probability)
    drawn = [texts(question) for questions in draws for question in questions]

    assert {"<image>\n" + question for question, _ in drawn} == set(itertools.chain(*expected["questions"].values()))
    assert {answer + "</s>" for _, answer in drawn} == set(expected["answers"])
    assert {len(questions) for questions in draws} == set(expected["conversation_counts"])
    assert {sum(len(question.masks) for question in questions) for questions in draws} == set(expected["mask_counts"])


@pytest.mark.parametrize("source", [source for source in GOLDEN["val"] if GOLDEN["val"][source]["items"]])
def test_evaluation_texts_are_those_of_the_original(source):
    rows = {
        "w_cp1252.jpg": row("reasoning", target(0, "Who’s the “winner” in this café?"), is_sentence=True),
        "v_utf8.jpg": row("reasoning", target(0, "the object that tells time", "second text never used in val")),
    }
    # The sentences as they stand in the annotations, with their capitals and stray spaces.
    sentences = {
        "refcoco|unc|val": {1: ["nobody"], 2: ["two men", "both MEN "], 3: [" lady"]},
        "refcoco|unc|testA": {2: ["dog ab"], 3: ["woman in red"]},
        "refcoco+|unc|testB": {3: ["woman b"]},
        "refcocog|umd|val": {1: ["a man"]},
        "refcocog|umd|test": {3: ["a lady"]},
    }.get(source, {})
    rows |= {f"COCO_train2014_{number:012d}.jpg": row("referring", target(0, *s)) for number, s in sentences.items()}
    rows["113.jpg"] = row("referring", target(0, "tree val"))

    for image, expected in GOLDEN["val"][source]["items"].items():
        questions = evaluation_questions(rows[image.rsplit("/", 1)[-1]])
        asked = ["USER: <image>\n{} ASSISTANT: {}</s>".format(*texts(question)) for question in questions]
        assert asked == ["USER: " + text.split("USER: ")[1] for text in expected["conversations"]]
        assert len(questions) == len(expected["masks"])


@pytest.mark.parametrize("image", GOLDEN["vqa/llava_instruct_150k"]["images"])
def test_vqa_conversations_are_those_of_the_original(image):
    messages = {
        "000000000001.jpg": [
            "<image>\nWhat are the colors of the bus?",
            "The bus is white and red.",
            "Where is it?",
            "In the city.",
        ],
        "000000000002.jpg": ["Describe the following image.\n<image>", "A dog runs."],
        "000000000003.jpg": ["<image>\nWhy?", "Because."],
    }[image.rsplit("/", 1)[-1]]
    roles = itertools.cycle(["user", "assistant"])
    vqa = row("vqa", messages=[{"role": role, "content": text} for role, text in zip(roles, messages)])
    (question,) = sample_questions(vqa, np.random.default_rng(0))

    assert question.masks == []
    assert [[part["type"] for part in message["content"]] for message in question.messages] == (
        [["image", "text"]] + [["text"]] * (len(messages) - 1)
    )
    rendered = "".join(
        f"USER: {text}" if message["role"] == "user" else f" ASSISTANT: {text}</s>"
        for message in question.messages
        for text in ["".join("<image>\n" if p["type"] == "image" else p["text"] for p in message["content"])]
    )
    (expected,) = GOLDEN["vqa/llava_instruct_150k"]["images"][image]["conversations"]
    assert rendered == expected[expected.index("USER: ") :]

    (first_turn,) = evaluation_questions(vqa)
    assert first_turn.messages == question.messages[:2] and first_turn.masks == []


def test_targets_that_share_a_phrase_are_merged_unless_asked_not_to():
    # "cup" is one class with two instances; "handle" is another.
    phrases = ("cup", "the cup")
    two_cups = row("semantic", target(0, *phrases), target(1, *phrases), target(2, "handle"))

    for questions in draw_many(two_cups, num_draws=40):
        masks = {texts(question)[0].count("cup"): question.masks[0].draw() for question in questions}
        assert len(questions) == 2
        assert masks[1][:, :2].sum() == 4 and masks[1].sum() == 4
        assert masks[0][:, 2].sum() == 2 and masks[0].sum() == 2
    for questions in draw_many(two_cups, num_draws=40, merge_instances=False):
        assert sorted(question.masks[0].run_ends[1] for question in questions) == sorted(
            mask(index).run_ends[1] for index in range(3)
        )

    merged, handle = evaluation_questions(two_cups)
    assert texts(merged)[0] == " What is cup in this image? Please output segmentation mask."
    assert merged.masks[0].draw().sum() == 4 and handle.masks == [mask(2)]
    assert len(evaluation_questions(two_cups, merge_instances=False)) == 3


def test_a_phrase_of_several_targets_takes_all_of_them_also_where_their_other_phrases_differ():
    dogs = row("reasoning", target(0, "pets", "dog"), target(1, "animals", "pets"))

    for questions in draw_many(dogs, num_draws=40):
        areas = {
            next(p for p in ("pets", "dog", "animals") if p in texts(q)[0]): q.masks[0].draw().sum() for q in questions
        }
        assert areas == {"pets": 4, "dog": 2, "animals": 2}
    assert [question.masks[0].draw().sum() for question in evaluation_questions(dogs)] == [4, 2]


def plain(question) -> str:
    return repr((question.messages, question.masks, question.phrase, sorted(question.texts)))


def test_evaluation_with_all_texts_marks_those_that_lisa_asks():
    rows = [
        (row("reasoning", target(0, "pets", "dog"), target(1, "animals", "pets")), 2),
        (row("semantic", target(0, "cup", "plate"), target(1, "mug", "plate"), target(2, "plate")), 3),
        (row("referring", target(0, "left", "the left one"), target(1, "right", "left")), 4),
    ]
    for example, num_first in rows:
        phrases = [phrase for target in example["targets"] for phrase in target["phrases"]]
        for merge_instances in (True, False):
            asked = evaluation_questions(example, merge_instances)
            everything = evaluation_questions(example, merge_instances, texts=("all",))
            # The same questions, maybe in another order, and more.
            first = [question for question in everything if "first" in question.texts]
            assert sorted(map(plain, first)) == sorted(map(plain, asked))
            assert len(everything) == len(set(phrases) if merge_instances else phrases)
            if not merge_instances:
                assert len(first) == num_first


def test_a_name_that_two_classes_share_is_asked_for_once():
    names = [("red object", "cup"), ("plate", "red object"), ("red object",)]
    objects = row("semantic", *[target(index, *phrases) for index, phrases in enumerate(names)])

    drawn = [[texts(question)[0].split(" in this")[0] for question in q] for q in draw_many(objects, num_draws=200)]
    assert all(sum("red object" in text for text in questions) <= 1 for questions in drawn)
    assert {len(questions) for questions in drawn} == {2, 3}


def test_draws_are_uniform_and_without_replacement():
    five = row("semantic", *[target(index, f"class{index}") for index in range(5)])
    classes, templates = Counter(), Counter()
    for questions in draw_many(five, num_draws=1500):
        indices = [int(texts(question)[0].split("class")[1][0]) for question in questions]
        assert len(set(indices)) == 3
        assert [question.masks for question in questions] == [[mask(index)] for index in indices]
        classes.update(indices)
        templates.update(texts(question)[0].split("class")[0] for question in questions)
    # 1500 images x 3 of 5 classes: 900 each, with a standard deviation of 19. "What is" begins two of four templates.
    assert all(abs(classes[index] - 900) < 100 for index in range(5))
    assert abs(templates["What is "] - 2250) < 200 and abs(templates["Please segment the "] - 1125) < 150


def test_explanations_come_in_the_original_proportions_and_one_way_per_image():
    explained = row("reasoning", target(0, "a", "b", "c", "d"), explanation="Because.")
    ways = Counter()
    for questions in draw_many(explained, num_draws=1500):
        (way,) = {
            "text" if not q.masks else "both" if texts(q)[1].endswith("[SEG]. Because.") else "mask" for q in questions
        }
        ways[way] += 1
    assert abs(ways["text"] - 150) < 60 and abs(ways["mask"] - 675) < 100 and abs(ways["both"] - 675) < 100


def test_the_number_of_questions_is_a_setting():
    five = row("semantic", *[target(index, f"class{index}") for index in range(5)])
    for num_questions, expected in ((1, 1), (4, 4), (9, 5)):
        assert len(sample_questions(five, np.random.default_rng(0), num_questions=num_questions)) == expected


def test_a_phrase_with_braces_is_text():
    (question,) = evaluation_questions(row("referring", target(0, "the {x} of {phrase}")))
    assert texts(question)[0] == " What is the {x} of {phrase} in this image? Please output segmentation mask."


def test_seg_in_a_users_answer_has_no_mask():
    """It is escaped, so that it becomes letters and not a token without a mask."""
    explained = row(
        "reasoning", target(0, "What breaks?"), is_sentence=True, explanation="The handle [SEG] is cracked [SEG]."
    )
    answers = {texts(question)[1].replace(CUT_MARK, "|") for q in draw_many(explained, 60) for question in q}
    assert "The handle [|SEG] is cracked [|SEG]." in answers
    assert any(answer.endswith("[SEG]. The handle [|SEG] is cracked [|SEG].") for answer in answers)
    turns = [{"role": "user", "content": "What is [SEG]?"}, {"role": "assistant", "content": "[SEG] is a token."}]
    (question,) = sample_questions(row("vqa", messages=turns), np.random.default_rng(0))
    assert question.masks == [] and "[SEG]" not in question.messages[1]["content"][0]["text"]


@pytest.mark.parametrize("phrase", ["<image>\nWhat is red?", "What is red?\n<image>"])
def test_the_placeholder_of_an_image_is_left_out(phrase):
    (question,) = evaluation_questions(row("reasoning", target(0, phrase), is_sentence=True))
    assert question.messages[0]["content"][0] == {"type": "image"}
    assert "<image>" not in texts(question)[0] and "What is red?" in texts(question)[0]


def test_reasoning_belongs_to_its_answer():
    turns = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "Red.", "reasoning_content": "It looks so."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    (question,) = sample_questions(row("vqa", messages=turns), np.random.default_rng(0))
    assert [message.get("reasoning_content") for message in question.messages] == [None, "It looks so.", None, None]
