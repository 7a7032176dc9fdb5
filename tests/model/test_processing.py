"""LisaProcessor: texts, labels, images and masks, for several families and chat templates."""

import json
import shutil
from functools import cache

import pytest
import torch
from fixtures.golden_model import GOLDEN
from fixtures.tiny_models import (
    FAMILIES,
    GEMMA3_TEMPLATE,
    IDEFICS3_TEMPLATE,
    SIDE,
    conversation,
    idefics3_sam,
    image,
    llava_sam,
    sam_image_processor,
    tiny_tokenizer,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor

from lisa_hf import LisaProcessor
from lisa_hf.chat_templates import CHAT_TEMPLATES, load_chat_template
from lisa_hf.model.processing_lisa import TextTooLongError


CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% for part in message.content %}{% if part.type == 'image' %}{{ '<image>' }}{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VICUNA_TEMPLATE = (  # a system line, and the end token without a line break
    "{{ 'A chat. ' }}{% for message in messages %}{% if message.role == 'user' %}{{ 'USER: ' }}{% else %}{{ ' ' }}"
    "{% endif %}{% for part in message.content %}{% if part.type == 'image' %}{{ '<image>\n' }}{% else %}"
    "{{ part.text }}{% endif %}{% endfor %}"
    "{% if message.role == 'user' %}{{ ' ASSISTANT:' }}{% else %}{{ eos_token }}{% endif %}{% endfor %}"
)
# Name: template, and what an assistant's turn adds after its text. All of it is learned.
TEMPLATES = {
    "llava_1_5": (load_chat_template("llava_1_5"), "</s>"),
    "llava_v1": (load_chat_template("llava_v1"), "</s>"),
    "lisa_v0": (load_chat_template("lisa_v0"), "</s>"),
    "glamm": (load_chat_template("glamm"), "</s>"),
    "llava_llama_2": (load_chat_template("llava_llama_2"), " </s>"),
    "vicuna": (VICUNA_TEMPLATE, "</s>"),
    "sa2va_internvl": (load_chat_template("sa2va_internvl").replace("<IMG_CONTEXT>", "<image>"), "<|im_end|>"),
    "chatml": (CHATML_TEMPLATE, "<|im_end|>"),
    "gemma": (GEMMA3_TEMPLATE.replace("<start_of_image>", "<image>"), "<end_of_turn>"),
    "idefics3": (IDEFICS3_TEMPLATE, "<end_of_utterance>"),
}
NUM_IMAGE_TOKENS = 16
ANSWERS = ("Sure, [SEG].", "[SEG].", "It is red.", "No.", "[SEG] and [SEG], and the circle is [SEG]")


@pytest.fixture(scope="module")
def vlm_and_mask_directories(tmp_path_factory):
    """What `from_vlm_mask_model_pretrained` reads: the processors of a VLM and of a mask model, without `[SEG]`."""
    root = tmp_path_factory.mktemp("processors")
    special_tokens = ("<im_start>", "<im_end>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>")
    tokenizer = tiny_tokenizer(
        {"image_token": "<image>", "end_of_utterance": "<end_of_utterance>"}
        | {f"token_{number}": token for number, token in enumerate(special_tokens)}
    )
    vlm_processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHATML_TEMPLATE,
    )
    vlm_processor.save_pretrained(root / "vlm")
    sam_image_processor().save_pretrained(root / "sam")
    return root / "vlm", root / "sam"


@pytest.fixture(params=TEMPLATES)
def template(request, vlm_and_mask_directories):
    """A processor with one of the templates, and what that adds to an answer."""
    chat_template, end = TEMPLATES[request.param]
    return LisaProcessor.from_vlm_mask_model_pretrained(*vlm_and_mask_directories, chat_template=chat_template), end


@pytest.fixture(scope="module")
def llava():
    return llava_sam()


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]()


def labeled_runs(processor, ids: torch.Tensor, labels: torch.Tensor) -> list[str]:
    """Texts of the runs of labels, without spaces: `[SEG]` absorbs those around it."""
    runs, previous = [], -100
    for token, label in zip(ids.tolist(), labels.tolist()):
        assert label in (-100, token)
        if label != -100:
            runs = [*runs, []] if previous == -100 else runs
            runs[-1].append(label)
        previous = label
    return ["".join(processor.tokenizer.decode(run).split()) for run in runs]


# ---- labels ---------------------------------------------------------------------------------------------------------


def test_chat_templates_of_the_package_are_all_tested():
    assert {path.stem for path in CHAT_TEMPLATES.glob("*.jinja")} <= TEMPLATES.keys()


def test_labels_are_the_assistants_turns(template):
    processor, end = template
    turns = [
        ("What is it?", "Sure, [SEG] and [SEG].", "Is the [SEG] red?", "It is red."),
        ("What is the circle?", "No."),
    ]
    batch = processor.encode_conversations([image(20, 30), image(30, 20)], [conversation(*row) for row in turns])
    for row, ids, labels, mask in zip(turns, batch["input_ids"], batch["labels"], batch["attention_mask"]):
        expected = ["".join((answer + end).split()) for answer in row[1::2]]
        assert labeled_runs(processor, ids, labels) == expected
        assert (ids == processor.tokenizer.convert_tokens_to_ids("<image>")).sum() == NUM_IMAGE_TOKENS
        assert (labels[mask == 0] == -100).all()
    seg_token_id = processor.seg_token_id
    assert (batch["input_ids"] == seg_token_id).sum(1).tolist() == [2, 0]
    assert (batch["labels"] == seg_token_id).sum(1).tolist() == [2, 0]


@pytest.mark.parametrize("answer", ANSWERS)
def test_generation_continues_where_training_begins(template, answer):
    """A prompt's tokens and the labels are the whole of the training tokens; but for a line break behind the end."""
    processor, _ = template
    messages = conversation("What is the red circle?", answer)
    training = processor.encode_conversations([image(20, 30)], [messages])
    text = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
    prompt = processor([image(20, 30)], text)["input_ids"][0].tolist()
    ids, labels = training["input_ids"][0].tolist(), training["labels"][0].tolist()
    assert ids[: len(prompt)] == prompt
    learned = [label for label in labels if label != -100]
    assert ids[len(prompt) : len(prompt) + len(learned)] == learned
    assert labels[: len(prompt)] == [-100] * len(prompt)
    assert not processor.tokenizer.decode(ids[len(prompt) + len(learned) :]).strip()


def test_padding_on_the_left_moves_labels_too(llava):
    _, processor = llava
    conversations = [conversation("What?", "Sure, [SEG]."), conversation("What is the red circle?", "It is red.")]
    pictures = [image(20, 30), image(30, 20)]
    right = processor.encode_conversations(pictures, conversations)
    left = processor.encode_conversations(pictures, conversations, padding_side="left")
    assert not torch.equal(left["labels"], right["labels"])
    for row in range(2):
        real = [batch["attention_mask"][row].bool() for batch in (left, right)]
        for name in ("input_ids", "labels"):
            assert torch.equal(left[name][row][real[0]], right[name][row][real[1]])


# ---- truncation -----------------------------------------------------------------------------------------------------


def test_truncation_cuts_tails_but_never_a_seg(llava):
    _, processor = llava
    conversations = [
        conversation("What is it?", "It is [SEG].", "Is [SEG] the circle?", "It is red. " * 9),
        conversation("What is it?", "Sure, [SEG]."),
    ]
    pictures = [image(20, 30), image(30, 20)]
    whole = processor.encode_conversations(pictures, conversations)
    length = whole["input_ids"].shape[1]
    cut = processor.encode_conversations(pictures, conversations, max_length=length - 20)
    assert cut["input_ids"].shape == cut["labels"].shape == cut["attention_mask"].shape == (2, length - 20)
    assert torch.equal(cut["labels"], whole["labels"][:, : length - 20])
    assert torch.equal(
        processor.encode_conversations(pictures, conversations, max_length=length)["labels"], whole["labels"]
    )

    last_seg = (whole["labels"] == processor.seg_token_id).nonzero()[:, 1].max().item()
    processor.encode_conversations(pictures, conversations, max_length=last_seg + 1)
    with pytest.raises(
        TextTooLongError, match=rf"Row \d: expected at most max_length={last_seg} tokens.*\[SEG\].*Raise"
    ):
        processor.encode_conversations(pictures, conversations, max_length=last_seg)
    with pytest.raises(ValueError, match='padding_side="right"'):
        processor.encode_conversations(pictures, conversations, max_length=last_seg, padding_side="left")


@pytest.mark.parametrize("name", ["llava-sam", "idefics3-sam", "gemma3-sam"])
def test_truncation_never_cuts_an_image(name):
    model, processor = FAMILIES[name]()
    messages = [conversation("What is it?", "It is red.")]
    ids = processor.encode_conversations([image(20, 30)], messages)["input_ids"][0]
    last = (ids == model.config.vlm_config.image_token_id).nonzero().max().item()
    assert processor.encode_conversations([image(20, 30)], messages, max_length=last + 1)["labels"].max() == -100
    with pytest.raises(TextTooLongError, match=f"max_length={last} .*image"):
        processor.encode_conversations([image(20, 30)], messages, max_length=last)


# ---- images and texts -----------------------------------------------------------------------------------------------


def test_inputs_are_those_of_the_vlms_own_processor(family):
    """One call of the VLM's processor with an image per row; only that here two rows share one."""
    model, processor = family
    pictures = [image(40, 60), image(64, 32, seed=1)]
    image_indices = [1, 0, 1]
    texts = [
        processor.apply_chat_template(conversation(question), add_generation_prompt=True)
        for question in ("What is it?", "The circle?", "What is the red circle, and is it?")
    ]
    inputs = processor(pictures, texts, image_indices)
    expected = processor.vlm_processor(
        images=[[pictures[index]] for index in image_indices],
        text=list(texts),
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    for name, value in expected.items():
        per_row = name in ("input_ids", "attention_mask", "token_type_ids")
        ours = inputs[name] if per_row else inputs[name][image_indices]
        assert torch.equal(ours, value), name
    own = {"image_indices", "mask_pixel_values", "original_sizes", "reshaped_input_sizes"}
    assert inputs.keys() == expected.keys() | own
    assert inputs.keys() <= {*processor.model_input_names, "token_type_ids"}
    assert inputs["mask_pixel_values"].shape == (2, 3, SIDE, SIDE)
    assert inputs["original_sizes"].tolist() == [[40, 60], [64, 32]]
    assert inputs["image_indices"].tolist() == image_indices
    num_features = [
        len(f.flatten(0, -2))
        for f in model.vlm.base_model.get_image_features(
            **{name: expected[name] for name in ("pixel_values", "pixel_attention_mask") if name in expected},
            return_dict=True,
        ).pooler_output
    ]
    image_tokens = (inputs["input_ids"] == model.config.vlm_config.image_token_id).sum(1)
    assert image_tokens.tolist() == num_features


def test_images_may_differ_in_their_number_of_tokens():
    model, processor = idefics3_sam()
    batch = processor.encode_conversations(
        [image(40, 60), image(64, 32)], [conversation("What?", "No."), conversation("What?", "No.")]
    )
    counts = (batch["input_ids"] == model.config.vlm_config.image_token_id).sum(1).tolist()
    assert counts == [4 * (2 * 2 + 1), 4 * (2 * 1 + 1)]
    runs = [labeled_runs(processor, *row) for row in zip(batch["input_ids"], batch["labels"])]
    assert runs == [["No.<end_of_utterance>"]] * 2


def test_wrong_number_of_images_raises(llava):
    _, processor = llava
    pictures = [image(20, 30), image(30, 20)]
    with pytest.raises(ValueError, match=r"image token <image> once.*got \[1, 0\] image tokens in 2 texts"):
        processor(pictures, ["<image> What?", "What?"])
    with pytest.raises(ValueError, match=r"got \[2\] image tokens in 1 texts"):
        processor(pictures, "<image><image> What?")
    with pytest.raises(ValueError, match=r"image_indices \[0, 2\] and 2 images"):
        processor(pictures, ["<image> What?"] * 2, image_indices=[0, 2])
    with pytest.raises(ValueError, match=r"image_indices \[0\] and 2 images"):
        processor(pictures, ["<image> What?"] * 2, image_indices=[0])
    with pytest.raises(ValueError, match="expected at least one image, got none"):
        processor(None, "What?")
    with pytest.raises(ValueError, match="expected at least one image, got none"):
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": "What?"}]}], tokenize=True, return_dict=True
        )


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_images_of_any_mode_become_rgb(llava, mode):
    _, processor = llava
    picture = image(20, 30).convert(mode)
    inputs, expected = processor(picture), processor(picture.convert("RGB"))
    assert inputs.keys() == {"pixel_values", "mask_pixel_values", "original_sizes", "reshaped_input_sizes"}
    for name in expected:
        assert torch.equal(inputs[name], expected[name]), name


@pytest.mark.parametrize("name", ["llava-sam", "idefics3-sam", "gemma3-sam"])
def test_apply_chat_template_tokenizes(name):
    _, processor = FAMILIES[name]()
    pictures = [image(40, 60), image(64, 32)]
    questions = ["What is it?", "What is the red circle, and is it?"]
    conversations = [conversation(question) for question in questions]
    expected = processor(
        pictures, [processor.apply_chat_template(messages, add_generation_prompt=True) for messages in conversations]
    )
    for messages, picture in zip(conversations, pictures):
        messages[0]["content"][0]["image"] = picture
    kwargs = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    inputs = processor.apply_chat_template(conversations, **kwargs)
    assert inputs.keys() == expected.keys()
    for key in expected:
        assert torch.equal(inputs[key], expected[key]), key
    single = processor.apply_chat_template(conversations[1], **kwargs)
    assert torch.equal(single["input_ids"][0], expected["input_ids"][1][expected["attention_mask"][1].bool()])


# ---- masks ----------------------------------------------------------------------------------------------------------


def test_post_process_masks_equals_the_models_own(family):
    model, processor = family
    batch = processor.encode_conversations(
        [image(40, 60), image(64, 32), image(30, 30)],
        [conversation("What?", "[SEG] and [SEG]."), conversation("What?", "No."), conversation("What?", "[SEG].")],
    )
    output = model(**batch)
    sizes = batch["original_sizes"], batch["reshaped_input_sizes"]
    masks = processor.post_process_masks(
        output.low_res_masks, *sizes, torch.tensor([0, 0, 2]), batch["image_indices"], binarize=False
    )
    assert [mask.shape for mask in masks] == [(2, 40, 60), (0, 64, 32), (1, 30, 30)]
    for mask, expected in zip(masks, output.pred_masks):
        torch.testing.assert_close(mask, expected, rtol=0, atol=1e-6)
    one_each = processor.post_process_masks(output.low_res_masks[:1], *(size[:1] for size in sizes))
    assert torch.equal(one_each[0], output.pred_masks[0][:1] > 0)
    assert 0 < one_each[0].float().mean() < 1
    strict = processor.post_process_masks(output.low_res_masks[:1], *(s[:1] for s in sizes), mask_threshold=1e9)
    assert not strict[0].any()


@cache
def tiny_processor() -> LisaProcessor:
    return llava_sam()[1]


@settings(max_examples=40, deadline=None)
@given(height=st.integers(8, 200), width=st.integers(8, 200))
def test_sizes_and_masks_fit_any_image(height, width):
    """The long side becomes the mask model's; a mask that marks positions comes back with them in place."""
    processor = tiny_processor()
    inputs = processor(image(height, width))
    assert inputs["original_sizes"].tolist() == [[height, width]]
    (reshaped,) = inputs["reshaped_input_sizes"].tolist()
    assert max(reshaped) == SIDE
    assert all(abs(new - old * SIDE / max(height, width)) <= 0.5 for new, old in zip(reshaped, (height, width)))
    padding = inputs["mask_pixel_values"][0, :, reshaped[0] :]
    assert not padding.any() and inputs["mask_pixel_values"][0, :, : reshaped[0], : reshaped[1]].any()

    # Logits that say where they are, in pixels of the mask model's input.
    centers = (torch.arange(32) + 0.5) * SIDE / 32
    positions = torch.stack([centers[:, None].expand(32, 32), centers.expand(32, 32)])
    (masks,) = processor.post_process_masks(
        positions, inputs["original_sizes"], inputs["reshaped_input_sizes"], torch.tensor([0, 0]), binarize=False
    )
    assert masks.shape == (2, height, width)
    rows = (torch.arange(height) + 0.5) * reshaped[0] / height
    columns = (torch.arange(width) + 0.5) * reshaped[1] / width
    # At the borders there is nothing to interpolate with: half a pixel of the low resolution, and of the high.
    assert (masks[0] - rows[:, None]).abs().max() <= 1.5 and (masks[1] - columns).abs().max() <= 1.5


# ---- saving and loading ---------------------------------------------------------------------------------------------


def test_round_trip_keeps_template_and_tokens(vlm_and_mask_directories, tmp_path):
    processor = LisaProcessor.from_vlm_mask_model_pretrained(*vlm_and_mask_directories)
    assert processor.chat_template == CHATML_TEMPLATE  # the VLM's own
    processor.chat_template = VICUNA_TEMPLATE
    processor.save_pretrained(tmp_path)
    loaded = LisaProcessor.from_pretrained(tmp_path)
    assert loaded.chat_template == VICUNA_TEMPLATE
    loaded.save_pretrained(tmp_path / "again")
    for name in ("processor_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / name).read_text()
    assert type(loaded.mask_image_processor) is type(processor.mask_image_processor)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_tokens_to_ids("[SEG]") == loaded.seg_token_id == processor.seg_token_id
    for text in ("assistant\n[SEG].", "Sure, [SEG] and [SEG] ."):
        assert tokenizer(text)["input_ids"] == processor.tokenizer(text)["input_ids"]


@pytest.fixture(scope="module")
def llama_vlm_directory(vlm_and_mask_directories, tmp_path_factory):
    """A VLM as the Hub has them: the slow LLaMA tokenizer, which splits the text behind a token in the old way."""
    directory = tmp_path_factory.mktemp("llama") / "vlm"
    shutil.copytree(vlm_and_mask_directories[0], directory, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "tokenizer" / name, directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    assert config["legacy"] is True
    image_token = {"image_token": "<image>"}
    config |= {"pad_token": "</s>", "extra_special_tokens": image_token}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_token_ids_survive_saving_and_loading(llama_vlm_directory, vlm_and_mask_directories, tmp_path):
    template, _ = TEMPLATES["llava_v1"]
    processor = LisaProcessor.from_vlm_mask_model_pretrained(
        llama_vlm_directory, vlm_and_mask_directories[1], chat_template=template
    )
    texts = ["USER: a [SEG] b.</s>two  spaces ASSISTANT: [SEG].\nthen", "<im_start><image><im_end>\nWhat is it?"]
    expected = processor.tokenizer(texts)["input_ids"]
    for directory in (tmp_path / "once", tmp_path / "twice"):
        processor.save_pretrained(directory)
        processor = LisaProcessor.from_pretrained(directory)
        assert processor.tokenizer(texts)["input_ids"] == expected
        assert AutoTokenizer.from_pretrained(directory)(texts)["input_ids"] == expected


def test_tokens_around_the_image_are_added_where_the_template_has_them(llama_vlm_directory, vlm_and_mask_directories):
    for name, expected in (("llava_v1", 3), ("llava_1_5", 1)):
        plain = AutoTokenizer.from_pretrained(llama_vlm_directory)
        processor = LisaProcessor.from_vlm_mask_model_pretrained(
            llama_vlm_directory, vlm_and_mask_directories[1], chat_template=TEMPLATES[name][0]
        )
        assert len(processor.tokenizer) == len(plain) + expected
        tokens = processor.tokenizer.convert_ids_to_tokens(range(len(plain), len(processor.tokenizer)))
        assert tokens == ["[SEG]", "<im_start>", "<im_end>"][:expected]
    # Those that the VLM has stay where they are.
    known = AutoTokenizer.from_pretrained(vlm_and_mask_directories[0])
    processor = LisaProcessor.from_vlm_mask_model_pretrained(*vlm_and_mask_directories, TEMPLATES["llava_v1"][0])
    assert len(processor.tokenizer) == len(known) + 1


def test_what_is_no_lisa_processor_is_refused(vlm_and_mask_directories, llava):
    vlm, _ = vlm_and_mask_directories
    with pytest.raises(ValueError, match="expected a LisaProcessor in .*, got a LlavaProcessor.*from_vlm_mask_model"):
        LisaProcessor.from_pretrained(vlm)
    with pytest.raises(ValueError, match=r"knows \[SEG\], got one that does not. Use `add_tokens"):
        LisaProcessor(LlavaProcessor.from_pretrained(vlm), llava[1].mask_image_processor)


def test_pictures_are_not_changed(llava):
    picture = Image.new("RGBA", (30, 20), (9, 9, 9, 0))
    llava[1](picture)
    assert picture.mode == "RGBA" and picture.size == (30, 20)
