"""Check that LISA sees and computes what its VLM does alone, before it trains on something else without an error."""

import PIL.Image
import torch
from torch import nn

from .conversation_text import user_message
from .modeling_lisa import LisaForConditionalGeneration
from .processing_lisa import SEG_TOKEN, LisaProcessor
from .vlm_backbone import record_states
from .vlm_text_layout import is_vision_input


QUESTION, ANSWER = "What is in this image?", f"It is {SEG_TOKEN}, and there is more of it."
# Largest relative differences of equal computations: in float32, and in fewer bits or with quantized weights.
TOLERANCE, HALF_TOLERANCE = 1e-4, 1e-2


@torch.no_grad()
def check_against_vlm(model: LisaForConditionalGeneration, processor: LisaProcessor) -> None:
    """Compare LISA with its VLM alone on one image with a question and an answer, in three forward passes.

    1. Token ids, type ids and vision inputs: what training makes of the row, cut before the answer, with what the
       VLM's own processor makes of the question. Ids are equal, floats to `TOLERANCE`.
    2. States and logits of this question: [`LisaForConditionalGeneration.forward`] with the VLM's own forward on its
       own processor's output.
    3. States before the last token of the answer: they do not change with it, as in generation.

    Both sides of 2 and 3 are computed on tensors of the same shapes, so that rounding is the same too. Each position
    may differ by `TOLERANCE` of its norm if weights and computation are float32, else by `HALF_TOLERANCE`.

    Weights, modes and random numbers stay as they are. With sharded weights, all processes must call this.

    Args:
        model: A LISA, which may contain LoRA, on any device.
        processor: Its processor.

    Raises:
        ValueError: If something differs: a VLM, processor or chat template that LISA uses in another way than its own.
    """
    training_modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # A compiled encoder would be compiled for this image alone.
        with torch.compiler.set_stance("force_eager"):
            difference = _find_difference(model, processor)
    finally:
        for module, mode in training_modes:
            module.training = mode
    if difference is not None:
        raise ValueError(
            f"Self-check: expected {type(model.vlm).__name__} to see and compute within LISA what it does alone, got "
            f"{difference}. Choose another VLM or, if you passed a `chat_template`, leave it out. Please report this "
            "line with your version of transformers."
        )


def _find_difference(model: LisaForConditionalGeneration, processor: LisaProcessor) -> str | None:
    """Return what differs, and by how much, or None."""
    # 1. Inputs
    messages = [user_message(QUESTION), {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}]
    batch = _training_inputs(processor, messages, model.vlm)
    own = _own_inputs(processor, messages[0], model.vlm)
    length = own["input_ids"].shape[1]
    question = {name: value if is_vision_input(name) else value[:, :length] for name, value in batch.items()}
    if difference := _input_difference(question, own):
        return difference

    # 2. States and logits of the question. FSDP needs the whole model's forward before that of a module in it.
    output = model(**question, output_masks=False)
    with record_states(model.vlm) as states:
        logits = model.vlm(**own, use_cache=False).logits
    tolerance = _tolerance(states[0])
    if (suppressed := model.config.suppress_tokens) is not None:  # in LISA alone
        logits[..., suppressed] = output.logits[..., suppressed]
    for name, found, expected in (("states", output.last_hidden_state, states[0]), ("logits", output.logits, logits)):
        if not (difference := _relative_difference(found, expected)) <= tolerance:
            return f"{name} of the same question that differ by {difference:.2g} of their norm"

    # 3. Two rows about the image that differ in the last token of the answer
    pair = {name: value if is_vision_input(name) else torch.cat([value, value]) for name, value in batch.items()}
    pair["image_indices"] = torch.zeros(2, dtype=torch.long, device=model.vlm.device)
    pair["input_ids"][1, -1] = batch["input_ids"][0, length]
    states = model(**pair, output_masks=False).last_hidden_state[:, :-1]  # [2, L - 1, hidden_size]
    if not (difference := _relative_difference(*states)) <= tolerance:
        return f"states that change by {difference:.2g} of their norm with a later token of the answer"
    return None


def _training_inputs(processor: LisaProcessor, messages: list[dict], vlm: nn.Module) -> dict[str, torch.Tensor]:
    """Return the row of a conversation as training makes it: uint8 pixels, which are normalized on the device."""
    image_inputs = processor.preprocess_images(_test_image(), do_normalize=False)
    batch = processor.encode_conversations(image_inputs, [messages])
    del batch["labels"]
    batch = {name: value.to(vlm.device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    processor.normalize_pixels(batch)
    return {name: _cast(value, vlm) for name, value in batch.items()}


def _own_inputs(processor: LisaProcessor, question: dict, vlm: nn.Module) -> dict[str, torch.Tensor]:
    """Return what the VLM's own processor makes of a question, called as transformers' `apply_chat_template` does."""
    prompt = processor.apply_chat_template([question], add_generation_prompt=True)
    bos = processor.tokenizer.bos_token
    kwargs = {"add_special_tokens": False} if bos and prompt.startswith(bos) else {}
    own = processor.vlm_processor(images=[_test_image()], text=[prompt], return_tensors="pt", **kwargs)
    own.pop("labels", None)  # PaliGemma's
    return {name: _cast(value, vlm) for name, value in own.items()}


def _test_image() -> PIL.Image.Image:
    """Return a photo's size of colors that differ everywhere, large enough to be cut into crops."""
    horizontal, radial = PIL.Image.linear_gradient("L").rotate(90), PIL.Image.radial_gradient("L")
    return PIL.Image.merge("RGB", [PIL.Image.linear_gradient("L"), horizontal, radial]).resize((1024, 768))


def _cast(value, vlm: nn.Module):
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(vlm.device, vlm.dtype if value.is_floating_point() else None)


def _input_difference(found: dict, expected: dict) -> str | None:
    """Return which input of the VLM differs, and by how much, or None."""
    for name, own in expected.items():
        if name not in found:
            return f"no `{name}`"
        value, own = torch.as_tensor(found[name]), torch.as_tensor(own)
        if value.shape != own.shape:
            return f"`{name}` of the shape {tuple(value.shape)} instead of {tuple(own.shape)}"
        tolerance = _tolerance(own) if own.is_floating_point() else 0
        if (
            own.numel()
            and not (difference := (value.float() - own.float()).abs().max()) <= tolerance * own.abs().max()
        ):
            return f"`{name}` that differ by up to {difference:.3g}"
    return None


def _tolerance(states: torch.Tensor) -> float:
    is_half = states.dtype != torch.float32 or torch.is_autocast_enabled(states.device.type)
    return HALF_TOLERANCE if is_half else TOLERANCE


def _relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference of a position, relative to its norm; nan if one is not finite."""
    # Some VLMs forbid tokens by the lowest of all logits, whose square is infinite.
    found, expected = found.float().clamp(min=-1e6), expected.float().clamp(min=-1e6)
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
