"""Models on accelerators, on one or spread over two, compute what they compute on the CPU.

No accelerator is needed: tensors claim to be on one, see `fixtures.claimed_devices`, or are fake.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map
from fixtures.claimed_devices import ClaimedDevices, claimed_device
from fixtures.packed_batches import make_family, make_prompts
from fixtures.tiny_models import FAMILIES, conversation, image
from fixtures.tiny_training import Items, collate
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lisa_hf import LisaForConditionalGeneration
from lisa_hf.inference import conversation as conversation_module
from lisa_hf.model.losses import chunked_cross_entropy, mask_losses, sampled_mask_losses
from lisa_hf.model.mask_backbone import decode_prompts, encode_images, select_images, upscale_masks
from lisa_hf.model.packing import resolve_packing
from lisa_hf.model.pipeline_lisa import answer_prompts


def spread(model) -> dict[str, int]:
    """Return the `device_map` that "auto" makes for two devices, of which the first holds a third of the weights."""
    size = sum(weight.nbytes for weight in model.parameters())
    memory = {0: size // 3, 1: size}
    return infer_auto_device_map(model, memory, no_split_module_classes=model._no_split_modules)


PLACES = {
    "one": lambda model: {"": "cuda:0"},
    "halves": lambda model: {"vlm": "cuda:0", "mask_model": "cuda:1", "seg_projector": "cuda:1"},
    "spread": spread,
}


def put(batch: dict) -> dict:
    """Put the tensors of a batch, but not those in lists, on the first device."""
    return {name: value.to(0) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def test_tensors_that_lie_apart_do_not_meet():
    with ClaimedDevices() as devices:
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        for mix in (
            lambda: here + there,
            lambda: torch.stack([here.sum(), there.sum()]),
            lambda: here[torch.tensor([0], device="cuda")],
            lambda: there + there.to("cuda:1"),
        ):
            with pytest.raises(RuntimeError, match="expected all tensors on one device"):
                mix()
        with pytest.raises(TypeError, match="on the CPU"):
            there.numpy()
        assert (there + here.sum()).device == there.view(3, 1).device == there.new_zeros(1).device == there.device
        assert there.device == torch.device("cuda:0") and there.cpu().device == here.device
        assert int(there.sum()) == 3 and there[there > 0].tolist() == [1, 1, 1]
        assert [wait.split()[0] for wait in devices.waits] == ["to", "_local_scalar_dense", "index", "tolist"]


def inputs_of(model, processor):
    batch = collate(processor, Items(4).items, packing=resolve_packing(model.config, True))
    texts = [
        processor.apply_chat_template(conversation(question), add_generation_prompt=True, tokenize=False)
        for question in ("What is the red circle?", "Is it?", "What is it, and what is red?")
    ]
    return batch, {"images": [image(40, 60), image(64, 32)], "prompts": texts, "image_indices": [0, 0, 1]}


def say_seg(model) -> dict:
    """Arguments of `generate` for an answer of two `[SEG]`."""

    def choose(input_ids, scores):
        return scores.index_fill(1, torch.tensor(model.config.seg_token_id, device=scores.device), 99)

    return {"max_new_tokens": 2, "logits_processor": [choose]}


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equal_losses_masks_and_answers(family, places):
    model, processor = FAMILIES[family]()
    batch, questions = inputs_of(model, processor)

    expected, answers = model(**batch), answer_prompts(model, processor, **questions, **say_seg(model))
    with ClaimedDevices():
        dispatch_model(model, PLACES[places](model), force_hooks=True)
        found = model(**put(batch))
        found_answers = answer_prompts(model, processor, **questions, **say_seg(model))
        assert found.loss.device == torch.device("cuda:0")
    assert found.loss == expected.loss
    assert all(map(torch.equal, found.pred_masks, expected.pred_masks))
    for answer, correct in zip(found_answers, answers, strict=True):
        assert answer.text == correct.text and len(correct.masks)
        assert torch.equal(answer.masks, correct.masks) and torch.equal(answer.scores, correct.scores)
        assert claimed_device(answer.masks) == torch.device("cpu")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma4"])
@torch.no_grad()
def test_positions_and_masks_of_packed_rows(family):
    model, batch, packed_batch = make_family(family)
    prompts = make_prompts(batch)
    expected = model(**packed_batch).loss, model.generate(**prompts, max_new_tokens=2, do_sample=False).sequences
    with ClaimedDevices():
        dispatch_model(model, spread(model), force_hooks=True)
        packed_batch, prompts = put(packed_batch), put(prompts)
        assert model(**packed_batch).loss == expected[0]
        sequences = model.generate(**prompts, max_new_tokens=2, do_sample=False).sequences
    assert torch.equal(sequences, expected[1])


@pytest.mark.parametrize("options", [{"similarity_points": {"count": 4}}, {"video_mask_decoding": True}], ids=str)
@torch.no_grad()
def test_prompts_beside_seg(options):
    model, processor = FAMILIES["llava-sam2" if "video_mask_decoding" in options else "llava-sam"]()
    for name, value in options.items():
        setattr(model.config, name, value)
    batch, questions = inputs_of(model, processor)
    expected = model(**batch)
    with ClaimedDevices():
        dispatch_model(model, PLACES["halves"](model), force_hooks=True)
        found = model(**put(batch))
        answer_prompts(model, processor, **questions, max_new_tokens=2)
    assert torch.equal(found.low_res_masks, expected.low_res_masks)


class SameThread(ThreadPoolExecutor):
    """Run at once what would run in a thread: torch's modes are those of one thread."""

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


def test_turns_of_a_conversation(monkeypatch):
    monkeypatch.setattr(conversation_module, "ThreadPoolExecutor", SameThread)
    model, processor = FAMILIES["llava-sam"]()

    def talk():
        talk = conversation_module.Conversation(model, processor, image(40, 60), max_new_tokens=3)
        for question in ("What is the red circle?", "Is it?"):
            list(talk.ask(question))
        return [turn.answer.text for turn in talk.turns]

    expected = talk()
    with ClaimedDevices():
        dispatch_model(model, spread(model), force_hooks=True)
        assert talk() == expected


@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
def test_an_offloaded_mask_model_is_refused(tmp_path):
    model, processor = FAMILIES["llava-sam"]()
    model.save_pretrained(tmp_path)
    place = {"vlm": "cpu", "mask_model": "disk", "seg_projector": "cpu"}
    model = LisaForConditionalGeneration.from_pretrained(tmp_path, device_map=place, offload_folder=tmp_path)
    with pytest.raises(ValueError, match="device_map: expected the whole mask model on a device"):
        answer_prompts(model, processor, [image(40, 60)], ["<image>"], max_new_tokens=1)


@contextmanager
def cuda_autocast(dtype):
    """`torch.autocast("cuda")`, which does nothing without a GPU."""
    torch.set_autocast_dtype("cuda", dtype)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llava-sam", "llava-sam_hq", "llava-sam2"])
def test_losses_are_float32_in_half_precision(family, dtype):
    """CUDA casts, and refuses, other operations than the CPU. Fake tensors tell without computing."""
    mask_model = FAMILIES[family]()[0].mask_model
    with FakeTensorMode(), cuda_autocast(dtype):
        for module in mask_model.modules():
            for name, weight in module._parameters.items():
                module._parameters[name] = weight if weight is None else nn.Parameter(torch.empty(weight.shape).cuda())
            for name, buffer in module._buffers.items():
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype).cuda()
        images = encode_images(mask_model, torch.empty(2, 3, 64, 64, device="cuda"))
        images = select_images(images, torch.zeros(3, dtype=torch.long, device="cuda"), mask_model.dtype)
        masks, _ = decode_prompts(mask_model, images, torch.empty(3, 32, device="cuda", dtype=dtype))
        assert masks.dtype == dtype
        labels = torch.empty(3, 100, 70, device="cuda", dtype=torch.uint8)
        logits, targets = torch.empty(5, 300, device="cuda", dtype=dtype), torch.zeros(5, dtype=torch.long).cuda()
        losses = [
            *mask_losses(upscale_masks(masks, (64, 40), (100, 70), 64), labels),
            *sampled_mask_losses(masks, labels, 50),
            chunked_cross_entropy(logits, targets),
        ]
    assert {loss.dtype for loss in losses} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_gpu_computes_what_the_cpu_does(family):
    model, processor = FAMILIES[family]()
    batch, questions = inputs_of(model, processor)
    expected, answers = model(**batch), answer_prompts(model, processor, **questions, **say_seg(model))
    model.to(0)
    found, found_answers = model(**put(batch)), answer_prompts(model, processor, **questions, **say_seg(model))
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-3)  # convolutions round to TF32
    for answer, correct in zip(found_answers, answers, strict=True):
        assert answer.text == correct.text
        assert (answer.masks == correct.masks).float().mean() > 0.99
