"""The columns of the matrix: checks of what LISA must do with a VLM, on a tiny random model of any type."""

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from unittest import mock

import PIL.Image
import torch
from matrix_models import (
    ANSWERS,
    IMAGE_INDICES,
    Model,
    as_float32,
    make_lisa,
    mask_inputs,
    mask_labels,
    pad,
    random_image,
)
from tiny_vlms import (
    IMAGE_TOKEN_ID,
    MASK_MODELS,
    family_options,
    tiny_mask_config,
    tiny_mask_image_processor,
    tiny_vlm_config,
    tiny_vlm_processor,
)

from lisa_hf import LisaConfig, LisaForConditionalGeneration, LisaProcessor
from lisa_hf.model.packing import pack_rows, packing_unsupported_reason
from lisa_hf.model.vlm_backbone import (
    encode_images_apart,
    image_encoder,
    map_token_fields,
    record_states,
    sizes_per_image,
    vision_inputs_of,
)
from lisa_hf.training.trainable import find_parts, prepare_for_training


TOLERANCE, PACKING_TOLERANCE = 2e-4, 1e-5  # relative to the largest number, or to 1
PROCESSOR_IMAGE_SIZES = [(60, 40), (32, 64)]
QUESTIONS = ["What is it?", "What is the red circle?", "The circle of a circle and the red circle?"]
SPOKEN_ANSWERS = ["It is [SEG].", "Sure, it is [SEG].", "[SEG] and [SEG]."]
DEFAULT_PARTS = ("seg_projector", "mask_decoder", "embeddings")
VISION_PARTS = ("vision_tower", "multi_modal_projector")
# Prefixes of the errors that tell users in one sentence what does not work.
REFUSALS = ("expected a VLM", "expected a vision-language model", "expected a chat template", "lora_target_modules:")


class Refused(Exception):
    """LISA reports that it does not support this, and why."""


class Wrong(Exception):
    """LISA computes something different from the VLM."""


def run_checks(model_type: str) -> Iterator[tuple[str, str]]:
    """Run all checks of a VLM type and yield each column with "ok", "refused: why", "fail: why" or "wrong: what"."""
    models = []
    verdict = judge(lambda: models.append(Model(model_type)))
    yield "construct", verdict
    for column, check in CHECKS.items():
        if column in ("processor", "mask_models"):
            yield column, verdict if verdict.startswith("refused") else judge(partial(check, model_type))
        else:
            yield column, judge(partial(check, models[0])) if models else verdict


def judge(check: Callable) -> str:
    """Run a check and return "ok", or what it raised."""
    try:
        check()
    except Refused as error:
        return f"refused: {error}"
    except Wrong as error:
        return f"wrong: {error}"
    except Exception as error:
        message = " ".join(str(error).split())
        if message.startswith(REFUSALS):
            return f"refused: {message}"
        return f"fail: {type(error).__name__}: {message[:200]}"
    return "ok"


def require_close(name: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    if found.shape != expected.shape:
        raise Wrong(f"{name} of the shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    difference, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= tolerance * max(1.0, largest):
        raise Wrong(f"{name} differ by up to {difference:.2g} of {largest:.2g}")


# ---- checks of the model --------------------------------------------------------------------------------------------


def check_forward(model: Model) -> None:
    """Two rows about one image in training mode have a finite loss."""
    batch = model.batch([0, 2], [0, 0])
    loss = model.lisa.train()(**batch, mask_labels=mask_labels(2)).loss
    model.lisa.eval()
    if not loss.isfinite():
        raise Wrong(f"a loss of {loss.item()}")


def check_backward(model: Model) -> None:
    """Gradients reach the language model and all of the `[SEG]` projector."""
    lisa = copy.deepcopy(model.lisa).train()
    lisa(**model.batch([0, 2], [0, 0]), mask_labels=mask_labels(2)).loss.backward()
    language_model = lisa.get_submodule(find_parts(lisa)["language_model"][0])
    gradients = [p.grad for p in language_model.parameters() if p.grad is not None and p.grad.any()]
    if not gradients or not all(gradient.isfinite().all() for gradient in gradients):
        raise Wrong("no finite gradient in the language model")
    if not all(p.grad is not None and p.grad.any() for p in lisa.seg_projector.parameters()):
        raise Wrong("no gradient in seg_projector")


@torch.no_grad()
def check_equality(model: Model) -> None:
    """States of rows about two images of different sizes are those of the VLM called alone on each row."""
    found = model.lisa(**model.batch()).last_hidden_state
    for number, (states, _) in enumerate(_own_outputs(model)):
        require_close(f"states of row {number}", found[number, : len(states)], states)


@torch.no_grad()
def check_logits(model: Model) -> None:
    """Logits of the same rows are those of the VLM."""
    found = model.lisa(**model.batch(), output_logits=True).logits
    for number, (_, logits) in enumerate(_own_outputs(model)):
        require_close(f"logits of row {number}", found[number, : len(logits)], logits)


def _own_outputs(model: Model) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield states and logits of each row from the VLM alone, without padding."""
    singles, _, rows = model.inputs
    for row, index in zip(rows, IMAGE_INDICES):
        inputs = {name: value[None] for name, value in row.items() if name != "labels"}
        with record_states(model.vlm) as states:
            logits = model.vlm(**inputs, **copy.deepcopy(singles[index]), use_cache=False).logits[0]
        yield states[0][0], logits


@torch.no_grad()
def check_generate(model: Model) -> None:
    """Answers to left-padded prompts are those of the VLM to each prompt alone."""
    singles, both, rows = model.inputs
    prompts = [
        {name: value[: -len(answer)] for name, value in row.items() if name != "labels"}
        for row, answer in zip(rows, ANSWERS)
    ]
    batch = {**pad(prompts, side="left"), **both, **mask_inputs(2), "image_indices": torch.tensor(IMAGE_INDICES)}
    options = {"max_new_tokens": 5, "do_sample": False}
    sequences = model.lisa.generate(**copy.deepcopy(batch), **options).sequences
    found = sequences[:, batch["input_ids"].shape[1] :]
    for number, (prompt, index) in enumerate(zip(prompts, IMAGE_INDICES)):
        inputs = {name: value[None] for name, value in prompt.items()}
        own = model.vlm.generate(**inputs, **copy.deepcopy(singles[index]), **options)
        answer = own[0, len(prompt["input_ids"]) :]
        if not torch.equal(found[number, : len(answer)], answer):
            raise Wrong(f"the answer {found[number].tolist()} instead of {answer.tolist()}")


@torch.no_grad()
def check_save(model: Model) -> None:
    """A saved and loaded model computes the same."""
    expected = model.lisa(**model.batch()).last_hidden_state
    with tempfile.TemporaryDirectory() as directory:
        model.lisa.save_pretrained(directory)
        loaded = LisaForConditionalGeneration.from_pretrained(directory).eval()
    require_close("states", loaded(**model.batch()).last_hidden_state, expected, tolerance=1e-5)


@torch.no_grad()
def check_packing(model: Model) -> None:
    """Packed questions have the same loss as separate rows."""
    if reason := packing_unsupported_reason(model.lisa.config):
        raise Refused(reason)
    batch = {**model.batch([1, 0, 2], [0, 1, 1]), "mask_labels": mask_labels(1, 2)}
    packed = pack_rows(batch, IMAGE_TOKEN_ID, pad_token_id=0)
    require_close("losses", model.lisa(**packed).loss, model.lisa(**batch).loss, PACKING_TOLERANCE)


@torch.no_grad()
def check_cached_features(model: Model) -> None:
    """Features of each image, as stored in a feature cache, replace its pixels."""
    expected = model.lisa(**model.batch()).last_hidden_state
    _, both, rows = model.inputs
    ids = pad([rows[1], rows[0]])["input_ids"]  # one row per image
    features = encode_images_apart(model.vlm, ids, vision_inputs_of(model.vlm, both))
    sizes = sizes_per_image(model.vlm, both, ids, torch.arange(2), num_images=2)
    batch = {name: value for name, value in model.batch().items() if name not in both}
    batch |= {name: torch.cat(values) for name, values in sizes.items()}
    require_close("states", model.lisa(**batch, vision_features=features).last_hidden_state, expected, 1e-5)


def check_train(model: Model) -> None:
    """With LISA's defaults, and with the image side trained too, each trained weight gets a gradient.

    LoRA is only in the language model. Weights of the image side that do not affect an image's features need no
    gradient: training tells DDP to look for them.
    """
    parts = find_parts(model.lisa)
    vision = [part for part in VISION_PARTS if parts[part]]
    for trainable in ([*DEFAULT_PARTS], [*DEFAULT_PARTS, *vision]):
        lisa = prepare_for_training(copy.deepcopy(model.lisa), trainable).train()
        base = lisa.get_base_model()
        base(**model.batch([0, 2], [0, 0]), mask_labels=mask_labels(2)).loss.backward()
        weights = {name: weight for name, weight in lisa.named_parameters() if weight.requires_grad}
        without = {name: weight for name, weight in weights.items() if weight.grad is None}
        towers = tuple(f"base_model.model.{path}." for part in VISION_PARTS for path in parts[part])
        if adapted := [name for name in weights if ".lora_" in name and name.startswith(towers)]:
            raise Wrong(f"LoRA in {adapted[0]}")
        unused = _unused_in_features(base.vlm, model.inputs[0][1], without) if trainable != [*DEFAULT_PARTS] else set()
        if missing := without.keys() - unused:
            raise Wrong(f"{len(missing)} trained weights get no gradient, such as {min(missing)}")


def _unused_in_features(vlm, vision: dict, weights: dict) -> set[str]:
    """Return the names of the weights that do not affect the features of an image."""
    output = image_encoder(vlm).get_image_features(**vision_inputs_of(vlm, vision), return_dict=True)
    features = []
    map_token_fields(output, lambda value: features.extend(value if isinstance(value, (list, tuple)) else [value]))
    total = sum(feature.float().sum() for feature in features)
    gradients = torch.autograd.grad(total, weights.values(), allow_unused=True) if weights else ()
    return {name for name, gradient in zip(weights, gradients) if gradient is None}


# ---- checks of a processor and of mask models -----------------------------------------------------------------------


def check_processor(model_type: str) -> None:
    """For two images of different sizes, training and generation see what the VLM's own processor makes.

    Compares token ids, type ids and pixels of the prompt, labels, states through the training path (pixels normalized
    on the device), and answers.
    """
    processor, lisa = make_processor_and_lisa(model_type, "sam")
    sizes = family_options(model_type).get("image_sizes", PROCESSOR_IMAGE_SIZES)
    images = [random_image(*size, seed) for seed, size in enumerate(sizes, start=1)]
    conversations = [conversation(*turn) for turn in zip(QUESTIONS, SPOKEN_ANSWERS)]
    prompts = [processor.apply_chat_template(row[:1], add_generation_prompt=True) for row in conversations]
    inputs = processor.preprocess_images(images, do_normalize=False)
    batch = dict(processor.encode_conversations(inputs, conversations, IMAGE_INDICES))
    processor.normalize_pixels(batch)
    generation_batch = {name: as_float32(value) for name, value in processor(images, prompts, IMAGE_INDICES).items()}
    batch = {name: as_float32(value) for name, value in batch.items()}
    with torch.no_grad():
        states = lisa(**copy.deepcopy(batch)).last_hidden_state
        options = {"max_new_tokens": 3, "do_sample": False}
        answers = lisa.generate(**copy.deepcopy(generation_batch), **options).sequences
    for row, (prompt, index) in enumerate(zip(prompts, IMAGE_INDICES)):
        own = own_inputs(processor, prompt, images[index])
        length = own["input_ids"].shape[1]
        _require_own_tokens(processor, batch, row, own)
        with torch.no_grad(), record_states(lisa.vlm) as own_states:
            lisa.vlm(**copy.deepcopy(own), use_cache=False)
        require_close(f"states of row {row}", states[row, :length], own_states[0][0])
        with torch.no_grad():
            own_answer = lisa.vlm.generate(**copy.deepcopy(own), **options)[0, length:]
        found = answers[row, generation_batch["input_ids"].shape[1] :][: len(own_answer)]
        if not torch.equal(found, own_answer):
            raise Wrong(f"the answer {found.tolist()} instead of {own_answer.tolist()}")
    owns = [own_inputs(processor, prompts[0], image) for image in images]
    _require_own_pixels(batch, owns, vision_inputs_of(lisa.vlm, owns[0]))


def _require_own_tokens(processor: LisaProcessor, batch: dict, row: int, own: dict) -> None:
    """Compare a row's prompt with that of the VLM's own processor, and its labels with the answer."""
    length = own["input_ids"].shape[1]
    for name in [name for name in own if name == "input_ids" or name.endswith("token_type_ids")]:
        if name not in batch or not torch.equal(batch[name][row, :length], torch.as_tensor(own[name])[0]):
            raise Wrong(f"{name} of row {row}")
    labels = batch["labels"][row]
    learned = "".join(processor.tokenizer.decode(labels[labels != -100]).split())
    if learned != "".join(f"{SPOKEN_ANSWERS[row]}<end>".split()):
        raise Wrong(f"labels {learned!r} of the answer {SPOKEN_ANSWERS[row]!r}")


def _require_own_pixels(batch: dict, owns: list[dict], names: Iterable[str]) -> None:
    """Compare the images' pixels, in any order, with those of the VLM's own processor."""
    for name in names:
        if "pixel" in name and isinstance(batch[name], torch.Tensor):
            own = torch.cat([own[name].flatten() for own in owns]).float().sort().values
            found = batch[name].flatten().float().sort().values
            if len(own) == len(found):  # nothing is padded
                require_close(name, found, own)


def make_processor_and_lisa(model_type: str, mask_model: str) -> tuple[LisaProcessor, LisaForConditionalGeneration]:
    """Return the processor of a VLM and a mask model type, and a LISA with its vocabulary."""
    try:
        vlm_processor = tiny_vlm_processor(model_type)
    except KeyError:
        raise Refused("expected a VLM with a processor in transformers' mapping, got none") from None
    processor = LisaProcessor(vlm_processor, tiny_mask_image_processor(mask_model))
    config = LisaConfig(
        vlm_config=tiny_vlm_config(model_type, vlm_processor),
        mask_config=tiny_mask_config(mask_model),
        seg_token_id=processor.seg_token_id,
    )
    return processor, make_lisa(config)


def conversation(question: str, answer: str) -> list[dict]:
    return [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def own_inputs(processor: LisaProcessor, prompt: str, image: PIL.Image.Image) -> dict:
    """Return the output of the VLM's own processor for one prompt."""
    kwargs = {"text": [prompt], "return_tensors": "pt", "add_special_tokens": False}
    try:
        own = processor.vlm_processor(images=[[image]], **kwargs)
    except ValueError:  # GOT-OCR 2
        own = processor.vlm_processor(images=[image], **kwargs)
    return {name: as_float32(value) for name, value in own.items() if name != "labels"}


def check_mask_models(model_type: str) -> None:
    """With each family of mask models, gradients reach its decoder, and masks are those of its own forward."""
    for mask_model in MASK_MODELS:
        model = Model(model_type, mask_model)
        side = model.lisa.config.mask_config.prompt_encoder_config.image_size
        batch = {**model.batch(), **mask_inputs(2, side)}
        output = model.lisa(**batch, mask_labels=mask_labels(1, 2, side=side))
        output.loss.backward()
        if not any(p.grad is not None and p.grad.any() for p in model.lisa.mask_model.mask_decoder.parameters()):
            raise Wrong(f"no gradient in the mask decoder of {mask_model}")
        if mask_model != "sam_hq":  # its decoder is fixed, see upstream_fixes.py
            _require_own_masks(model.lisa.mask_model, output, batch, mask_model)


@torch.no_grad()
def _require_own_masks(mask_model, output, batch: dict, name: str) -> None:
    encode = mask_model.prompt_encoder.forward
    for number, index in enumerate(sorted(IMAGE_INDICES)):
        prompt = output.seg_embeddings[number][None, None, None]
        with mock.patch.object(mask_model.prompt_encoder, "forward", lambda *a, **k: (prompt, encode(*a, **k)[1])):
            own = mask_model(pixel_values=batch["mask_pixel_values"][[index]], multimask_output=False)
        require_close(f"masks of {name}", output.low_res_masks[number], own.pred_masks[0, 0, 0], 1e-5)


CHECKS = {
    "forward": check_forward,
    "backward": check_backward,
    "equality": check_equality,
    "generate": check_generate,
    "save": check_save,
    "logits": check_logits,
    "processor": check_processor,
    "packing": check_packing,
    "cached_features": check_cached_features,
    "train": check_train,
    "mask_models": check_mask_models,
}
