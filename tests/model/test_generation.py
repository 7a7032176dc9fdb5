"""LisaForConditionalGeneration.generate: its masks equal those of a teacher-forced pass over the generated answers."""

import pytest
import torch
from fixtures.packed_batches import QWEN_LIKE, VLMS, make_family, make_prompts, qwen_prompt
from fixtures.tiny_models import FAMILIES, ForceTokens, conversation, image, llava_sam

from lisa_hf.evaluation.predict import answer_questions
from lisa_hf.model.conversation_text import user_message
from lisa_hf.model.mask_backbone import encode_images
from lisa_hf.model.packing import attention_types


SIZES = [(40, 60), (64, 32)]
IMAGE_INDICES = [1, 0, 1]
QUESTIONS = ["What is the red circle?", "Is it?", "What is it, and what is the circle?"]
SEG = -1  # in the scripted answers below
NUM_STEPS = 5
ANSWERS = [[None, SEG, None, SEG, None], [None, None, None, None, None], [SEG, None, None, None, None]]


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]()


vlm_families = pytest.mark.parametrize("family", ["llava-sam", "idefics3-sam", "gemma3-sam"], indirect=True)


def prompts(processor, rows=range(3), image_indices=IMAGE_INDICES):
    used = sorted({image_indices[row] for row in rows})
    return processor(
        images=[image(*SIZES[index], seed=index) for index in used],
        text=[processor.apply_chat_template(conversation(QUESTIONS[row]), add_generation_prompt=True) for row in rows],
        image_indices=[used.index(image_indices[row]) for row in rows],
    )


def generate(model, inputs, answers=ANSWERS, **kwargs):
    seg, end = model.config.seg_token_id, model.vlm.generation_config.eos_token_id
    script = ForceTokens(
        prompt_length=inputs["input_ids"].shape[1],
        answers=[[seg if token == SEG else token for token in answer] for answer in answers],
        never=[seg, *(end if isinstance(end, list) else [end])],
    )
    return model.generate(**inputs, logits_processor=[script], max_new_tokens=NUM_STEPS, **kwargs)


def teacher_forced(model, inputs, sequences, copies: int = 1):
    """A forward pass over generated sequences; its masks, in the order of the sequences' rows, and their rows."""
    num_new = sequences.shape[1] - inputs["input_ids"].shape[1]
    batch = dict(inputs)
    batch["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, num_new), value=1)
    if "token_type_ids" in inputs:
        batch["token_type_ids"] = torch.nn.functional.pad(inputs["token_type_ids"], (0, num_new))
    for name in {"attention_mask", "token_type_ids", "image_indices"} & batch.keys():
        batch[name] = batch[name].repeat_interleave(copies, dim=0)
    masks = model(**{**batch, "input_ids": sequences}).low_res_masks
    rows = (sequences == model.config.seg_token_id).nonzero()[:, 0]
    by_image = torch.argsort(batch["image_indices"][rows], stable=True)
    return masks[torch.argsort(by_image)], rows


def test_masks_equal_those_of_a_teacher_forced_pass(family):
    """Two [SEG] in an answer, none, one; two rows about one image; prompts padded on the left."""
    model, processor = family
    inputs = prompts(processor)
    assert not inputs["attention_mask"].all()
    output = generate(model, inputs)
    assert output.sequences.shape == (3, inputs["input_ids"].shape[1] + NUM_STEPS)
    assert output.seg_row_indices.tolist() == [0, 0, 2]
    masks, rows = teacher_forced(model, inputs, output.sequences)
    assert rows.tolist() == [0, 0, 2]
    torch.testing.assert_close(output.low_res_masks, masks, rtol=0, atol=1e-4)
    scale = output.low_res_masks.std()
    assert (output.low_res_masks[0] - output.low_res_masks[1]).abs().max() > 0.01 * scale  # the comparison means much
    assert len(output.iou_scores) == len(output.seg_embeddings) == 3

    sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
    full = processor.post_process_masks(
        output.low_res_masks, *sizes, output.seg_row_indices, inputs["image_indices"], binarize=False
    )
    assert [mask.shape for mask in full] == [(2, 64, 32), (0, 40, 60), (1, 64, 32)]
    binary = processor.post_process_masks(
        output.low_res_masks, *sizes, output.seg_row_indices, inputs["image_indices"]
    )
    assert all(torch.equal(mask, logits > 0) for mask, logits in zip(binary, full))


@vlm_families
def test_answers_without_seg(family):
    model, processor = family
    inputs = prompts(processor)
    output = generate(model, inputs, answers=[[None] * NUM_STEPS] * 3)
    assert not (output.sequences == model.config.seg_token_id).any()
    num_masks, height, width = output.low_res_masks.shape
    assert num_masks == 0 and height > 0 and width > 0
    assert len(output.seg_row_indices) == len(output.seg_embeddings) == len(output.iou_scores) == 0
    masks = processor.post_process_masks(
        output.low_res_masks,
        inputs["original_sizes"],
        inputs["reshaped_input_sizes"],
        output.seg_row_indices,
        inputs["image_indices"],
    )
    assert [mask.shape for mask in masks] == [(0, 64, 32), (0, 40, 60), (0, 64, 32)]
    assert {mask.dtype for mask in masks} == {torch.bool}


@vlm_families
def test_a_batch_equals_single_calls(family):
    """Padding on the left, and other images and rows in the batch, change no answer."""
    model, processor = family
    inputs = prompts(processor)
    output = generate(model, inputs)
    for row in range(3):
        single_inputs = prompts(processor, rows=[row])
        assert single_inputs["attention_mask"].all()
        single = generate(model, single_inputs, answers=[ANSWERS[row]])
        assert torch.equal(single.sequences[0, -NUM_STEPS:], output.sequences[row, -NUM_STEPS:])
        masks = output.low_res_masks[output.seg_row_indices == row]
        torch.testing.assert_close(single.low_res_masks, masks, rtol=0, atol=1e-4)


@vlm_families
@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_beams": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_return_sequences": 2, "do_sample": True},
    ],
    ids=["beams", "several-beams", "samples"],
)
def test_beams_and_several_answers(family, kwargs):
    model, processor = family
    inputs = prompts(processor)
    torch.manual_seed(0)
    output = generate(model, inputs, **kwargs)
    copies = kwargs.get("num_return_sequences", 1)
    assert len(output.sequences) == 3 * copies
    assert len(output.low_res_masks) == 3 * copies
    masks, rows = teacher_forced(model, inputs, output.sequences, copies)
    assert torch.equal(rows, output.seg_row_indices)
    torch.testing.assert_close(output.low_res_masks, masks, rtol=0, atol=1e-4)
    if copies > 1:
        assert not torch.equal(output.sequences[0], output.sequences[1])
        sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        with pytest.raises(ValueError, match="got 3 rows.*repeat_interleave"):
            processor.post_process_masks(output.low_res_masks, *sizes, output.seg_row_indices, inputs["image_indices"])


def test_beam_search_reads_the_beams_own_states(monkeypatch):
    """Beams change places, so a token's state is not in the row where its beam ends."""
    model, processor = llava_sam()
    inputs = prompts(processor)
    beams = {}
    vlm_generate = model.vlm.generate
    monkeypatch.setattr(model.vlm, "generate", lambda **kwargs: beams.setdefault("output", vlm_generate(**kwargs)))
    output = generate(model, inputs, [[None, None, SEG, None, SEG]] * 3, num_beams=3, num_return_sequences=3)
    origins = beams["output"].beam_indices[output.sequences[:, -NUM_STEPS:] == model.config.seg_token_id]
    assert origins.tolist() != output.seg_row_indices.tolist()
    masks, _ = teacher_forced(model, inputs, output.sequences, copies=3)
    torch.testing.assert_close(output.low_res_masks, masks, rtol=0, atol=1e-4)


@vlm_families
def test_generation_uses_the_cache(family):
    """The language model sees the prompt once, in two parts if rows share the first, and then one token per row and
    step; each image is encoded once."""
    model, processor = family
    inputs = prompts(processor)
    base = model.vlm.base_model
    language_model = base.text_model if hasattr(base, "text_model") else base.language_model
    tower = base.vision_model if hasattr(base, "vision_model") else base.vision_tower
    steps, encodings = [], {"vlm": 0, "mask": 0}
    language_model.register_forward_pre_hook(
        lambda _, args, kwargs: steps.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    tower.register_forward_pre_hook(lambda *_: encodings.update(vlm=encodings["vlm"] + 1))
    model.mask_model.vision_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: encodings.update(mask=encodings["mask"] + len((*args, *kwargs.values())[0])),
        with_kwargs=True,
    )
    generate(model, inputs)
    prompt, answers = steps[: 1 - NUM_STEPS], steps[1 - NUM_STEPS :]
    assert len(prompt) <= 2 and sum(prompt) == inputs["input_ids"].shape[1] and answers == [1] * (NUM_STEPS - 1)
    assert encodings == {"vlm": 1, "mask": 2}


def test_precomputed_image_embeddings(family):
    model, processor = family
    inputs = prompts(processor)
    expected = generate(model, inputs)
    with torch.no_grad():
        embeddings = encode_images(model.mask_model, inputs.pop("mask_pixel_values"))
    output = generate(model, {**inputs, "image_embeddings": embeddings})
    torch.testing.assert_close(output.low_res_masks, expected.low_res_masks, rtol=0, atol=1e-6)


def test_end_token_ends_an_answer():
    """A [SEG] before the end counts; what pads a shorter answer does not."""
    model, processor = llava_sam()
    inputs = prompts(processor)
    end = processor.tokenizer.eos_token_id
    output = generate(model, inputs, [[SEG, end, SEG, SEG, SEG], [5, SEG, 6, SEG, 7], [end, SEG, SEG, SEG, SEG]])
    assert output.seg_row_indices.tolist() == [0, 1, 1]
    masks, _ = teacher_forced(model, inputs, output.sequences)
    torch.testing.assert_close(output.low_res_masks, masks, rtol=0, atol=1e-4)


@pytest.mark.parametrize("own_end", [None, 2, [2, 3]])
def test_the_chat_templates_end_token_ends_an_answer_too(own_end):
    """Qwen3.5's config names another end token than its chat template writes."""
    model, processor = llava_sam()
    model.vlm.generation_config.eos_token_id = own_end
    model.config.answer_end_token_id = 7
    answers = [[SEG, 7, SEG, SEG, SEG], [5, SEG, 6, SEG, 8], [8, 9, 7, SEG, SEG]]
    output = generate(model, prompts(processor), answers)
    assert output.seg_row_indices.tolist() == [0, 1, 1]


def test_a_pad_token_outside_of_the_vocabulary():
    """SmolVLM's configuration has one. Rows that end early are filled all the same."""
    model, processor = llava_sam()
    model.generation_config.pad_token_id = len(processor.tokenizer) + 100
    inputs = prompts(processor)
    start, end = inputs["input_ids"].shape[1], model.generation_config.eos_token_id
    sequences = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, prefix_allowed_tokens_fn=lambda row, ids: [end if row else 10]
    ).sequences
    assert sequences[:, start:].tolist() == [[10] * 3, [end] * 3, [end] * 3]


def test_padding_on_the_right_raises():
    model, processor = llava_sam()
    texts = [processor.apply_chat_template(conversation(q), add_generation_prompt=True) for q in QUESTIONS[:2]]
    inputs = processor([image(*size) for size in SIZES], texts, padding_side="right")
    with pytest.raises(ValueError, match='padded on the left.*on the right.*padding_side="left"'):
        model.generate(**inputs, max_new_tokens=1)


def test_suppressed_tokens_are_never_generated():
    model, processor = llava_sam()
    inputs = prompts(processor)

    def answers():
        return model.generate(**inputs, max_new_tokens=NUM_STEPS).sequences[:, inputs["input_ids"].shape[1] :]

    said = answers().unique().tolist()
    model.config.suppress_tokens = said
    assert not set(said) & set(answers().unique().tolist())


def test_answer_questions():
    """Text and masks about one image, in the model's mode and out of it."""
    model, processor = llava_sam()
    picture = image(40, 60)
    seg, lm_head = model.config.seg_token_id, model.vlm.lm_head
    lm_head.register_forward_hook(lambda _, inputs, logits: logits.index_fill(-1, torch.tensor(seg), 99.0))
    model.train()
    answers = answer_questions(model, processor, picture, [[user_message(q)] for q in QUESTIONS], max_new_tokens=2)
    assert model.training
    assert [answer.text for answer in answers] == ["[SEG][SEG]"] * 3
    assert [answer.masks.shape for answer in answers] == [(2, 40, 60)] * 3
    assert answers[0].masks.dtype == torch.bool


@pytest.mark.parametrize("family", ["llava-sam", "idefics3-sam"], indirect=True)
def test_questions_about_an_image_share_its_prefix(family):
    """The language model reads system prompt and image once for all questions, and answers the same."""
    model, processor = family
    index = [1] * 3  # one image, three questions of different lengths
    inputs = prompts(processor, image_indices=index)
    read = []
    hook = model.vlm.base_model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: read.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    shared = generate(model, inputs)
    num_image_tokens = int((inputs["input_ids"][0] == model.config.vlm_config.image_token_id).sum())
    (prefix_rows, prefix_length), (question_rows, question_length) = read[:2]
    assert (prefix_rows, question_rows) == (1, 3) and prefix_length > num_image_tokens
    assert prefix_length + question_length == inputs["input_ids"].shape[1]
    hook.remove()

    assert torch.equal(shared.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    number = 0
    for row, answer in enumerate(ANSWERS):
        single = generate(model, prompts(processor, [row], index), [answer])
        assert torch.equal(single.sequences[0, -NUM_STEPS:], shared.sequences[row, -NUM_STEPS:])
        masks = shared.low_res_masks[number : number + len(single.low_res_masks)]
        torch.testing.assert_close(masks, single.low_res_masks, rtol=0, atol=1e-4)
        number += len(masks)
    assert number == len(shared.low_res_masks) == 3


@pytest.mark.parametrize("name", ["gemma3", *QWEN_LIKE, *VLMS])
def test_every_family_that_packs_shares_prefixes(name, monkeypatch):
    """Three images, of which two have several questions; what a row is told of its image goes with the prefix."""
    model, batch, _ = make_family(name)
    inputs = make_prompts(batch)
    text_config = model.config.get_text_config()
    read = []
    model.vlm.base_model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: read.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    answers = [[None, SEG, None, SEG, None]] * 6
    if "sliding_attention" in attention_types(text_config):  # a gap would take up the window
        generate(model, inputs, answers)
        assert read[0] == 6
        text_config.sliding_window = 1024
    read.clear()
    shared = generate(model, inputs, answers)
    assert read[:2] == [3, 6]

    monkeypatch.setattr(type(model), "_prefill_shared_prefix", lambda *args: None)
    read.clear()
    separate = generate(model, inputs, answers)
    assert read[0] == 6
    assert torch.equal(shared.sequences, separate.sequences)
    torch.testing.assert_close(shared.low_res_masks, separate.low_res_masks, rtol=0, atol=1e-4)
    assert separate.low_res_masks.std() > 0.01


@pytest.mark.parametrize("name", QWEN_LIKE)
def test_two_conversations_in_turn_keep_their_positions(name):
    """M-RoPE's positions after an image depend on its size, and here the sizes differ."""
    model, batch, _ = make_family(name)
    options = {"max_new_tokens": NUM_STEPS, "min_new_tokens": NUM_STEPS}
    first = model.generate(**qwen_prompt(batch, 0), **options)
    model.generate(**qwen_prompt(batch, 5), **options)
    prompt = qwen_prompt(batch, 0, [*first.sequences[0, -NUM_STEPS:].tolist(), 6, 7, 11])
    continued = model.generate(**prompt, **options, past_key_values=first.past_key_values)
    assert torch.equal(continued.sequences, model.generate(**prompt, **options).sequences)
