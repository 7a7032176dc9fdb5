"""LisaProcessor around the processors of many VLM families: the inputs of each row equal those of the VLM's own."""

import pytest
import torch
from fixtures.published import PUBLISHED_VLMS, write_published_processor
from fixtures.tiny_models import conversation, image, make_model, sam_config, sam_image_processor, text_config
from fixtures.tiny_models import vision_config as tiny_vision_config
from fixtures.vlms import PROCESSOR_TYPES
from tiny_vlms import tiny_vlm_processor
from transformers import AutoConfig
from transformers.utils import is_torchvision_available

from lisa_hf import LisaConfig, LisaProcessor


pytestmark = pytest.mark.skipif(not is_torchvision_available(), reason="their video processors need torchvision")

PICTURES = [image(60, 40, seed=1), image(32, 64, seed=2)]
CONVERSATIONS = [
    conversation("What is it?", "It is [SEG]."),
    conversation("What is the red circle?", "Sure, it is [SEG].", "Sure?", "It is red."),
    conversation("The circle of a circle and the red circle?", "[SEG] and [SEG]."),
]
IMAGE_INDICES = [1, 0, 1]
TEXT_INPUTS = {"input_ids", "attention_mask", "labels"}


def build_processor(family: str) -> LisaProcessor:
    if family == "smolvlm":
        pytest.importorskip("num2words")
    return LisaProcessor(tiny_vlm_processor(family), sam_image_processor())


def starts_of_labels(labels: torch.Tensor) -> list[int]:
    """Positions of the first tokens of answers."""
    is_label = labels != -100
    return (is_label[1:] & ~is_label[:-1]).nonzero().flatten().add(1).tolist()


def own_inputs(processor: LisaProcessor, text: str, picture) -> dict:
    """What the VLM's own processor makes of one row."""
    kwargs = {"text": [text], "return_tensors": "pt", "add_special_tokens": False}
    try:
        return processor.vlm_processor(images=[[picture]], **kwargs)
    except ValueError:  # GOT-OCR 2
        return processor.vlm_processor(images=[picture], **kwargs)


@pytest.mark.parametrize("family", PROCESSOR_TYPES)
def test_each_row_is_what_the_vlms_own_processor_makes(family):
    """Two images of different sizes, three prompts."""
    assert_rows_are_the_vlms_own(build_processor(family))


@pytest.mark.parametrize("name", PUBLISHED_VLMS)
def test_each_row_is_what_a_published_vlms_processor_makes(name, tmp_path):
    if "SmolVLM2" in name:
        pytest.importorskip("num2words")
    write_published_processor(name, tmp_path / "vlm")
    sam_image_processor().save_pretrained(tmp_path / "sam")
    processor = LisaProcessor.from_vlm_mask_model_pretrained(tmp_path / "vlm", tmp_path / "sam")
    assert_rows_are_the_vlms_own(processor)


def assert_rows_are_the_vlms_own(processor: LisaProcessor) -> None:
    prompts = [processor.apply_chat_template(row[:1], add_generation_prompt=True) for row in CONVERSATIONS]
    inputs = processor(PICTURES, prompts, IMAGE_INDICES)
    for row, (prompt, index) in enumerate(zip(prompts, IMAGE_INDICES)):
        own = own_inputs(processor, prompt, PICTURES[index])
        real = inputs["attention_mask"][row].bool()
        for name in [name for name in own if name == "input_ids" or name.endswith("token_type_ids")]:
            assert torch.equal(inputs[name][row][real], torch.as_tensor(own[name])[0]), name
        vision = {name for name in own if not name.endswith("token_type_ids")} - TEXT_INPUTS
        assert vision <= inputs.keys()

    # Images: each one's numbers, in their order, but for what pads them to the size of the largest.
    for name in vision:
        owns = [own_inputs(processor, prompts[0], picture)[name] for picture in PICTURES]
        padding = inputs[name].numel() - sum(own.numel() for own in owns)
        assert padding >= 0, name
        found, expected = inputs[name].double().sum(), sum(own.double().sum() for own in owns)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, msg=name)
        if padding == 0:
            # MiniCPM puts the patches of all images into one entry.
            sizes = enumerate(zip(*(own.shape for own in owns)))
            joined = torch.cat(owns, dim=next((axis for axis, lengths in sizes if len(set(lengths)) > 1), 0))
            assert torch.equal(inputs[name].flatten(), joined.flatten()), name


@pytest.mark.parametrize("family", PROCESSOR_TYPES)
def test_training_sees_what_generation_sees(family):
    """A row is the prompt and the answers; compact pixels become those of generation."""
    processor = build_processor(family)
    image_inputs = processor.preprocess_images(PICTURES, do_normalize=False)
    batch = processor.encode_conversations(image_inputs, CONVERSATIONS, IMAGE_INDICES)
    processor.normalize_pixels(batch)
    turns = [(number, end) for number, row in enumerate(CONVERSATIONS) for end in range(1, len(row), 2)]
    prompts = [processor.apply_chat_template(CONVERSATIONS[n][:end], add_generation_prompt=True) for n, end in turns]
    inputs = processor(PICTURES, prompts, [IMAGE_INDICES[n] for n, _ in turns], padding_side="right")
    runs = [(row, start) for row, labels in enumerate(batch["labels"]) for start in starts_of_labels(labels)]
    answers = ("ItisSEG.<end>", "Sure,itisSEG.<end>", "Itisred.<end>", "SEGandSEG.<end>")
    for turn, ((row, start), answer) in enumerate(zip(runs, answers, strict=True)):
        prompt = inputs["input_ids"][turn][inputs["attention_mask"][turn].bool()]
        assert torch.equal(batch["input_ids"][row][:start], prompt)
        assert batch["image_indices"][row] == inputs["image_indices"][turn]
        labels = batch["labels"][row][start:]
        learned = processor.tokenizer.decode(labels[: (labels == -100).int().argmax() if -100 in labels else None])
        assert "".join(learned.split()) == answer.replace("SEG", "[SEG]")
    for name in inputs.keys() - {"input_ids", "attention_mask", "image_indices"}:
        if not name.endswith("token_type_ids"):
            assert batch[name].dtype == inputs[name].dtype, name
            torch.testing.assert_close(batch[name], inputs[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "family, reason",
    [("fuyu", "takes a text with the image token .*, got FuyuProcessor"), ("shieldgemma2", "keeps one text per text")],
)
def test_a_processor_that_does_not_make_one_text_of_one_image_is_refused(family, reason):
    processor = LisaProcessor(tiny_vlm_processor(family), sam_image_processor())
    with pytest.raises(ValueError, match=f"^expected a VLM whose processor {reason}"):
        processor(PICTURES[0], f"<s>{processor.image_token} What is it?")


def test_another_tensor_of_pixels_is_normalized_too():
    """Step 3.7 sees an image and tiles of it. Tiles of 0 to 255 would train without an error."""
    processor = build_processor("step3p7")
    compact = processor.preprocess_images(PICTURES, do_normalize=False).inputs
    processor.normalize_pixels(compact)
    assert compact["pixel_values_local"].numel() and compact["pixel_values_local"].abs().max() < 5
    assert compact["pixel_values_local"].dtype == torch.float32


def test_type_ids_of_paligemma_hide_the_answers_future():
    """Its type ids are 0 on the prompt, which sees all of itself, and 1 on answers, which see what is before them."""
    vlm_processor = tiny_vlm_processor("paligemma")
    processor, tokenizer = LisaProcessor(vlm_processor, sam_image_processor()), vlm_processor.tokenizer
    vlm_config = AutoConfig.for_model(
        "paligemma",
        image_token_index=vlm_processor.image_token_id,
        hidden_size=32,
        projection_dim=32,
        vision_config={**tiny_vision_config("siglip_vision_model"), "projection_dim": 32, "vision_use_head": False},
        text_config=text_config(tokenizer, model_type="gemma", head_dim=16),
    )
    model = make_model(
        LisaConfig(
            vlm_config=vlm_config,
            mask_config=AutoConfig.for_model(**sam_config()),
            seg_token_id=processor.seg_token_id,
        )
    )
    messages = conversation("What is it?", "It is red [SEG].")
    batch = processor.encode_conversations(PICTURES[:1], [messages])
    answer = (batch["labels"][0] != -100).nonzero().flatten()
    types = batch["token_type_ids"][0]
    assert not types[: answer[0]].any() and types[answer[0] :].all()
    # The prompt is as PaliGemma writes it: the token of the beginning after the image, a line break at the end.
    prompt = tokenizer.decode(batch["input_ids"][0][: answer[0]])
    assert "<image><s>" in prompt and prompt.endswith("<start>assistant\n\n")

    def states(position: int) -> torch.Tensor:
        """States before another token at a position minus those before the batch's."""
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        changed["input_ids"][0, position] = 5
        with torch.no_grad():
            return (model(**changed).last_hidden_state - model(**batch).last_hidden_state)[0, :position].abs().max()

    assert states(answer[-1]) == 0
    assert states(answer[0] - 1) > 1e-3  # within the prompt, the future is seen
