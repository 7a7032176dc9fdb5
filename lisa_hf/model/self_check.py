"""Check that LISA sees and computes the same as its VLM alone, instead of silently training on something else."""

import PIL.Image
import torch
import torch.nn.functional as F

from .conversation_text import user_message
from .losses import IGNORE_INDEX
from .modeling_lisa import LisaForConditionalGeneration
from .processing_lisa import SEG_TOKEN, LisaProcessor
from .vlm_backbone import record_states
from .vlm_text_layout import is_vision_input


QUESTION, ANSWER = "What is in this image?", f"It is {SEG_TOKEN}, and there is more of it."
NUM_LOGITS = 16  # positions whose logits are computed, each as large as the vocabulary
# Maximum relative differences between equal computations: in float32, and in fewer bits or with quantized weights.
TOLERANCE, HALF_TOLERANCE = 1e-4, 1e-2


@torch.no_grad()
def check_against_vlm(model: LisaForConditionalGeneration, processor: LisaProcessor) -> None:
    """Compare LISA with its VLM alone on one image with a question and an answer, in three forward passes.

    1. Token ids, type ids and vision inputs: those of the training row, truncated before the answer, against those
       from the VLM's own processor for the question. Ids must be equal, floats within the tolerance below.
    2. States of two rows that differ only in the last token of the answer: before it, they must be the same.
    3. States and loss of the question: [`LisaForConditionalGeneration.forward`] against the VLM's own forward on its
       own processor's output. The loss of the least likely tokens tells whether logits are the VLM's own.

    Both sides of 2 and 3 are computed on tensors of the same shapes, so that rounding is the same. The state of each
    position may differ by `TOLERANCE` of its norm, and the loss as much, if the computation is in float32, else by
    `HALF_TOLERANCE`: bfloat16, float16, autocast, and weights in 8 and 4 bits, which compute in these.

    Weights, modes and random states do not change. With sharded weights, all processes must call this.

    Args:
        model: A LISA, which may contain LoRA, on any device.
        processor: Processor of the model.

    Raises:
        ValueError: If something differs: a VLM, processor or chat template that LISA uses in another way than its own.
    """
    training_modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # A compiled encoder would be compiled for this image only.
        with torch.compiler.set_stance("force_eager"):
            difference = _find_difference(model, processor)
    finally:
        for module, mode in training_modes:
            module.training = mode
    if difference is not None:
        raise ValueError(
            f"Self-check: expected {type(model.vlm).__name__} to see and compute the same within LISA as alone, got "
            f"{difference}. Choose another VLM or, if you passed a `chat_template`, omit it. Please report this "
            "line with your version of transformers."
        )


def _find_difference(model: LisaForConditionalGeneration, processor: LisaProcessor) -> str | None:
    """Return what differs, and by how much, or None."""
    # 1. Inputs
    vlm, device = model.vlm, model.vlm.device
    messages = [user_message(QUESTION), {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}]
    batch = _training_inputs(processor, messages, device)
    own = _own_inputs(processor, messages[0], device)
    length = own["input_ids"].shape[1]
    if difference := _input_difference(_cut_rows(batch, length), own):
        return difference
    batch = {
        name: value.to(vlm.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }

    # 2. Two rows about the image that differ in the last token of the answer. FSDP needs this first: the whole model's
    #    forward before that of one of its modules.
    pair = {name: value if is_vision_input(name) else torch.cat([value, value]) for name, value in batch.items()}
    pair["image_indices"] = torch.zeros(2, dtype=torch.long, device=device)
    pair["input_ids"][1, -1] = batch["input_ids"][0, length]
    states = model(**pair, output_masks=False).last_hidden_state[:, :-1]  # [2, L - 1, hidden_size]
    tolerance = _tolerance(states)
    if not (difference := _relative_difference(*states)) <= tolerance:
        return f"states that differ by {difference:.2g} of their norm between two rows with the same tokens so far"

    # 3. States of the question, and the loss of its last positions. The VLM gets the pixels of training, which differ
    # from its processor's by rounding, because bfloat16 would make it visible.
    question = _cut_rows(batch, length)
    is_read = torch.zeros_like(own["input_ids"], dtype=torch.bool)
    is_read[:, -NUM_LOGITS:] = True
    with record_states(vlm, is_read.nonzero(as_tuple=True), model.config.states_at) as states:
        logits = vlm(**{name: question[name] for name in own}, use_cache=False).logits[0].float()  # [T, V]
    if model.config.suppress_tokens:  # only in LISA
        logits[:, model.config.suppress_tokens] = torch.finfo(logits.dtype).min
    # Some VLMs forbid tokens with the lowest possible number.
    least_likely = logits.where(logits > -1e30, torch.inf).argmin(dim=1)  # [T]
    question["shift_labels"] = torch.full_like(question["input_ids"], IGNORE_INDEX).masked_scatter(
        is_read, least_likely
    )
    output = model(**question, output_masks=False)
    if not (difference := _relative_difference(output.last_hidden_state, states[0])) <= tolerance:
        return f"states of the same question that differ by {difference:.2g} of their norm"
    loss, expected = output.ce_loss.item(), model.config.ce_loss_weight * F.cross_entropy(logits, least_likely).item()
    if not abs(loss - expected) <= tolerance * expected:
        return f"logits of the same question whose loss is {loss:.5g} instead of {expected:.5g}"
    return None


def _training_inputs(processor: LisaProcessor, messages: list[dict], device: torch.device) -> dict:
    """Return the row of a conversation as in training: uint8 pixels, which are normalized on the device."""
    image_inputs = processor.preprocess_images(_test_image(), do_normalize=False)
    batch = _to_device(processor.encode_conversations(image_inputs, [messages]), device)
    processor.normalize_pixels(batch)
    return batch


def _own_inputs(processor: LisaProcessor, question: dict, device: torch.device) -> dict:
    """Return the output of the VLM's own processor for a question, called like transformers' `apply_chat_template`."""
    prompt = processor.apply_chat_template([question], add_generation_prompt=True)
    bos = processor.tokenizer.bos_token
    kwargs = {"add_special_tokens": False} if bos and prompt.startswith(bos) else {}
    own = processor.vlm_processor(images=[_test_image()], text=[prompt], return_tensors="pt", **kwargs)
    own.pop("labels", None)  # PaliGemma's
    return _to_device(own, device)


def _test_image() -> PIL.Image.Image:
    """Return an image with colors that differ everywhere, large enough to be split into crops."""
    horizontal, radial = PIL.Image.linear_gradient("L").rotate(90), PIL.Image.radial_gradient("L")
    return PIL.Image.merge("RGB", [PIL.Image.linear_gradient("L"), horizontal, radial]).resize((1024, 768))


def _to_device(inputs: dict, device: torch.device) -> dict:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def _cut_rows(batch: dict, length: int) -> dict:
    """Return a batch without labels whose rows are truncated to `length` tokens."""
    cut = {name: value if is_vision_input(name) else value[:, :length] for name, value in batch.items()}
    del cut["labels"]
    return cut


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
    found, expected = found.float(), expected.float()
    # A state may be zero: that of a padding token in a model with random weights.
    norms = expected.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return ((found - expected).norm(dim=-1) / norms).max().item()
