"""What is trained, merging LoRA, and adapters on disk."""

from types import SimpleNamespace

import pytest
import torch
from fixtures.tiny_models import (
    SIDE,
    llava_config,
    make_model,
    qwen2_5_vl_sam,
    sam_config,
    text_config,
    vision_config,
)
from fixtures.tiny_training import Items, build_model, collate, copy_state
from fixtures.vlms import vlm_sam, vlm_sam_with_processor
from peft import PeftModel
from transformers import AutoConfig, AutoModel
from transformers.utils import is_torchvision_available

from lisa_hf import LisaConfig, LisaForConditionalGeneration
from lisa_hf.evaluation.predict import cut_prompts
from lisa_hf.training.arguments import TRAINABLE_PARTS, LisaTrainingArguments
from lisa_hf.training.trainable import (
    allow_unused_weights,
    find_parts,
    find_unused_weights,
    merge_lora,
    prepare_for_training,
    trainable_summary,
)


PARTS = ["seg_projector", "mask_decoder", "embeddings", "multi_modal_projector"]


def adapted_model(tied: bool = False):
    """A model with LoRA whose trained weights are all away from their start, and its processor."""
    model, processor = build_model(tie_word_embeddings=tied)
    model = prepare_for_training(model, PARTS, lora_r=4)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.05)
    return model.eval(), processor


def outputs(model, processor) -> dict[str, torch.Tensor]:
    """Teacher-forced logits and masks, and masks of generated answers in which every third token is a `[SEG]`."""
    batch = collate(processor, [Items()[index] for index in range(4)])
    vision = {key: batch[key] for key in ("pixel_values", "mask_pixel_values", "image_indices")}

    def answer(row, ids):
        return [processor.seg_token_id] if len(ids) % 3 == 0 else [10, 11]

    with torch.no_grad():
        forward = model(**batch, output_logits=True)
        options = {"max_new_tokens": 6, "do_sample": False, "prefix_allowed_tokens_fn": answer}
        generated = model.generate(**vision, **cut_prompts(batch, processor), **options)
    assert len(generated.low_res_masks) >= 2 * len(batch["input_ids"])
    return {
        "logits": forward.logits[batch["attention_mask"].bool()],
        "pred_masks": torch.cat([masks.flatten() for masks in forward.pred_masks]),
        "sequences": generated.sequences,
        "generated_masks": generated.low_res_masks,
        "seg_row_indices": generated.seg_row_indices,
    }


def assert_outputs_close(found: dict, expected: dict, tolerance: float):
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert (found[name] - value).abs().max() <= tolerance, name


@pytest.mark.parametrize("tied", [False, True])
def test_merged_equals_unmerged_also_from_disk(tied, tmp_path):
    model, processor = adapted_model(tied)
    fresh, _ = build_model(tie_word_embeddings=tied)
    start = outputs(fresh.eval(), processor)
    unmerged = outputs(model, processor)
    assert (unmerged["logits"] - start["logits"]).abs().max() > 0.1
    assert (unmerged["pred_masks"] - start["pred_masks"]).abs().max() > 0.01

    merged = merge_lora(model)
    assert not isinstance(merged, PeftModel)
    assert copy_state(merged).keys() == copy_state(fresh).keys()
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == tied
    in_memory = outputs(merged, processor)
    assert_outputs_close(in_memory, unmerged, 1e-5)

    merged.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(merged)
    assert_outputs_close(outputs(loaded, processor), in_memory, 0.0)


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_and_fully_trained_parts_reload_exactly(tied, tmp_path):
    model, processor = adapted_model(tied)
    model.save_pretrained(tmp_path)
    base, _ = build_model(tie_word_embeddings=tied)
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    expected, found = copy_state(model), copy_state(loaded)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert_outputs_close(outputs(loaded.eval(), processor), outputs(model, processor), 0.0)


@pytest.mark.parametrize("lora_r", [0, 4])
def test_tied_embeddings_stay_tied_in_training(lora_r):
    model, processor = build_model(tie_word_embeddings=True)
    model = prepare_for_training(model, ["embeddings"], lora_r).train()
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    model(**collate(processor, [Items()[0]])).loss.backward()
    optimizer.step()
    assert torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    plain, _ = build_model()
    assert not torch.equal(plain.get_input_embeddings().weight, plain.get_output_embeddings().weight)
    merged = merge_lora(model)
    assert torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)


@pytest.mark.parametrize("tied", [False, True])
def test_nobody_is_warned_of_what_is_as_it_should_be(tied, recwarn):
    model = make_model(vlm_config(llava_config(tie_word_embeddings=tied, text=TEXT)))
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    prepare_for_training(model, ["embeddings"], lora_r=4)
    false = ("tie_word_embeddings", "is_gradient_checkpointing")
    assert not [warning for warning in recwarn if any(text in str(warning.message) for text in false)]


def test_lora_is_in_the_language_model_alone(tiny):
    model, _ = tiny
    # The vision tower and the mask model have layers of these names too.
    elsewhere = {name for name, _ in model.named_modules() if name.endswith(("q_proj", "v_proj"))}
    assert any("vision_tower" in name for name in elsewhere)
    assert any("mask_decoder" in name for name in elsewhere)
    model = prepare_for_training(model, ["seg_projector"], lora_r=4, lora_target_modules=["q_proj", "v_proj"])
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    prefix = "base_model.model.vlm.model.language_model.layers"
    assert adapted == {f"{prefix}.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")}


def test_parts_cover_the_model_without_overlap(tiny):
    model, _ = tiny
    parts = find_parts(model)
    assert set(parts) == set(TRAINABLE_PARTS)
    owners = {name: [] for name, _ in model.named_parameters()}
    for part, paths in parts.items():
        for name in owners:
            if any(name.startswith(path + ".") for path in paths):
                owners[name].append(part)
    shared = {tuple(parts) for parts in owners.values() if len(parts) > 1}
    assert shared == {("embeddings", "language_model")}  # the input embeddings are a layer of the language model
    without_part = {name.split(".")[1] for name, parts in owners.items() if not parts}
    assert without_part == {"shared_image_embedding", "prompt_encoder"}


@pytest.mark.parametrize("lora_r", [0, 4])
def test_heads_without_a_loss_are_frozen(lora_r, tiny):
    model = prepare_for_training(tiny[0], ["mask_decoder"], lora_r)
    heads = ("iou_prediction_head", *(f"output_hypernetworks_mlps.{index}" for index in (1, 2, 3)))
    decoder = {name: weight for name, weight in model.named_parameters() if "mask_decoder" in name}
    for head in heads:
        weights = [weight for name, weight in decoder.items() if f".{head}." in name]
        assert weights and not any(weight.requires_grad for weight in weights)
    trained = [name for name, weight in decoder.items() if weight.requires_grad]
    assert any("upscale_conv1" in name for name in trained)
    assert any("output_hypernetworks_mlps.0" in name for name in trained)


def test_errors(tiny):
    with pytest.raises(ValueError, match="expected no language_model with LoRA, got it with lora_r 4.*lora_r 0"):
        prepare_for_training(tiny[0], ["language_model"], lora_r=4)
    with pytest.raises(ValueError, match="expected layers of the language model, which are q_proj, .*, got query"):
        prepare_for_training(tiny[0], ["seg_projector"], lora_r=4, lora_target_modules=["query"])


@pytest.mark.parametrize("lora_r", [0, 4])
def test_a_vision_tower_trains_as_far_as_it_is_used(lora_r):
    """Whatever trains has a gradient, else DDP would wait for it."""
    model, processor = build_model()
    model.config.vlm_config.vision_feature_layer = -2  # of two layers, the first one
    model = prepare_for_training(model, ["vision_tower", "multi_modal_projector"], lora_r).train()
    model(**collate(processor, [Items()[0]])).loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None] == []
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad and "vision_tower" in name}
    assert any("layers.0." in name for name in trained) and any("patch_embedding" in name for name in trained)
    assert not any("layers.1." in name or "post_layernorm" in name for name in trained)


def vlm_config(vlm: dict) -> LisaConfig:
    """The configuration of a LISA of this VLM; `[SEG]` is 50."""
    mask_config = AutoConfig.for_model(**sam_config())
    return LisaConfig(vlm_config=AutoConfig.for_model(**vlm), mask_config=mask_config, seg_token_id=50)


SIGLIP = vision_config("siglip_vision_model")
TEXT = {"vocab_size": 128, "pad_token_id": 0}
# Name: a VLM of 128 tokens, of which 120 is the image's; image tokens; what is not used of its vision tower.
VISION_TOWERS = {
    "llava-siglip": (
        {
            **llava_config(vision=SIGLIP, text=TEXT),
            "image_token_index": 120,
            "vision_feature_select_strategy": "full",
        },
        *(16, ("head.", "post_layernorm.")),
    ),
    "internvl": (
        {
            "model_type": "internvl",
            "image_token_id": 120,
            "vision_config": vision_config("internvl_vision", image_size=[32, 32], patch_size=[8, 8]),
            "text_config": text_config(model_type="llama", **TEXT),
        },
        *(4, ()),
    ),
    "internvl before its last layer": (
        {
            "model_type": "internvl",
            "image_token_id": 120,
            "vision_feature_layer": -2,
            "vision_config": vision_config(
                "internvl_vision", image_size=[32, 32], patch_size=[8, 8], use_mean_pooling=False
            ),
            "text_config": text_config(model_type="llama", **TEXT),
        },
        *(4, ("encoder.layer.1.", "layernorm.")),
    ),
    "gemma3": (
        {
            "model_type": "gemma3",
            "image_token_index": 120,
            "mm_tokens_per_image": 4,
            "vision_config": SIGLIP,
            "text_config": text_config(model_type="gemma3_text", head_dim=16, query_pre_attn_scalar=16, **TEXT),
        },
        *(4, ("head.",)),
    ),
}


@pytest.mark.parametrize("lora_r", [0, 4])
@pytest.mark.parametrize("name", VISION_TOWERS)
def test_what_a_vision_tower_has_beyond_its_features_is_frozen(name, lora_r):
    """Whatever trains has a gradient, and no more is frozen than what has none."""
    vlm, num_tokens, unused = VISION_TOWERS[name]
    model = prepare_for_training(
        make_model(vlm_config(vlm)), ["seg_projector", "vision_tower", "multi_modal_projector"], lora_r
    ).train()
    ids = torch.tensor([[1, *[120] * num_tokens, 7, 9, 50, 2]])
    size = torch.tensor([[SIDE, SIDE]])
    model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=torch.where(torch.arange(ids.shape[1]) > num_tokens + 2, ids, -100),
        token_type_ids=(ids == 120).long() if vlm["model_type"] == "gemma3" else None,
        pixel_values=torch.randn(1, 3, 32, 32),
        image_indices=torch.tensor([0]),
        mask_pixel_values=torch.randn(1, 3, SIDE, SIDE),
        original_sizes=size,
        reshaped_input_sizes=size,
        mask_labels=[torch.ones(1, SIDE, SIDE)],
    ).loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None] == []
    tower = {
        path.split("vision_tower.")[1].replace("modules_to_save.default.", ""): weight.requires_grad
        for path, weight in model.named_parameters()
        if "vision_tower." in path and ".original_module." not in path
    }
    frozen = {path for path, trains in tower.items() if not trains}
    assert frozen == {path for path in tower if path.startswith(unused)}
    assert all(any(path.startswith(module) for path in tower) for module in unused)


LAYERS = {"num_hidden_layers": 1}
VISION_LAYERS = {"vision_config": {"depth": 1}, "text_config": LAYERS}
# VLM: its configuration, its vision tower, and its projector.
PARTS_OF_VLMS = {
    "qwen2_vl": (VISION_LAYERS, ["visual"], ["visual.merger"]),
    "qwen3_vl": (VISION_LAYERS, ["visual"], ["visual.merger", "visual.deepstack_merger_list"]),
    "emu3": ({"text_config": LAYERS, "vocabulary_map": {"<image>": 5, "<|extra_200|>": 6}}, [], []),
    "chameleon": ({**LAYERS, "vocabulary_map": {"<image>": 5}}, [], []),
    "gemma4_unified": ({"text_config": LAYERS, "vision_config": {}}, [], ["embed_vision"]),
    "janus": ({"text_config": LAYERS, "vision_config": LAYERS}, ["vision_model"], ["aligner"]),
    "qwen2_5_omni_thinker": (
        {**VISION_LAYERS, "audio_config": {"encoder_layers": 1}},
        *(["visual"], ["visual.merger"]),
    ),
}


@pytest.mark.parametrize("model_type", PARTS_OF_VLMS)
def test_parts_of_vlms(model_type):
    """None is the language model by mistake, nor hears sound or makes images. What a VLM lacks is refused."""
    fields, vision_tower, projector = PARTS_OF_VLMS[model_type]
    with torch.device("meta"):
        model = LisaForConditionalGeneration(vlm_config({"model_type": model_type, **fields}))
    parts = find_parts(model)
    assert [path.removeprefix("vlm.model.") for path in parts["vision_tower"]] == vision_tower
    assert [path.removeprefix("vlm.model.") for path in parts["multi_modal_projector"]] == projector
    for part, paths in (("vision_tower", vision_tower), ("multi_modal_projector", projector)):
        if paths:
            prepare_for_training(model, [part], lora_r=0)
            trained = {path for path, weight in model.named_parameters() if weight.requires_grad}
            assert trained and all(path.startswith(tuple(parts[part])) for path in trained)
        else:
            with pytest.raises(ValueError, match=f"trainable: expected parts of .*, got {part}. Remove what it"):
                prepare_for_training(model, [part], lora_r=0)


def test_a_list_of_projectors_trains():
    """PEFT saves modules that are trained in full, but no list of them."""
    model = prepare_for_training(vlm_sam("granite4_vision"), ["multi_modal_projector"], lora_r=4)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad and ".lora_" not in name}
    for number in range(2):
        path = f"layerwise_projectors.{number}.modules_to_save.default."
        assert any(path in name for name in trained)


@pytest.mark.skipif(not is_torchvision_available(), reason="HunyuanVL's processor needs it")
def test_weights_that_some_images_leave_unused_are_named(caplog):
    """DDP stops at a weight without a gradient, unless it looks for them in each step."""
    model, processor = vlm_sam_with_processor("hunyuan_vl")
    model = prepare_for_training(model, ["vision_tower"], lora_r=4)
    (name,) = find_unused_weights(model, processor)
    assert name.endswith("patch_merger.image_sep")
    args = SimpleNamespace(world_size=2, shards_weights=False, should_log=True, device="cpu")
    args.ddp_find_unused_parameters = False
    allow_unused_weights(model, processor, args)
    assert args.ddp_find_unused_parameters and "1 weights" in caplog.text and name in caplog.text

    # Let images use it: those that are no squares, then all.
    merger = model.vlm.model.vision_tower.patch_merger
    for uses in (lambda height, width: height != width, lambda height, width: True):
        handle = merger.register_forward_hook(
            lambda _, args, size, output, uses=uses: output + merger.image_sep if uses(*size["size"]) else output,
            with_kwargs=True,
        )
        assert find_unused_weights(model, processor) == ([] if uses(1, 1) else [name])
        handle.remove()


def test_a_projector_inside_the_vision_tower_trains_with_it():
    model = qwen2_5_vl_sam()
    model = prepare_for_training(model, ["vision_tower", "multi_modal_projector"], lora_r=4)
    assert all(
        weight.requires_grad
        for path, weight in model.named_parameters()
        if ".visual." in path and ".original_module." not in path
    )


def test_a_projector_inside_the_vision_tower_has_its_own_rate_and_row(tmp_path):
    model = prepare_for_training(qwen2_5_vl_sam(), ["vision_tower", "multi_modal_projector"], lora_r=0)
    args = LisaTrainingArguments(
        str(tmp_path), part_learning_rates={"vision_tower": 1e-5, "multi_modal_projector": 1e-4}, use_cpu=True
    )
    rows = {line.split()[0]: line.split() for line in trainable_summary(model, args).splitlines()}
    merger = sum(weight.numel() for path, weight in model.named_parameters() if ".merger." in path)
    tower = sum(weight.numel() for path, weight in model.named_parameters() if ".visual." in path)
    assert rows["multi_modal_projector"][1:] == [f"{merger:,}", f"{merger:,}", "float32", "0.0001"]
    assert rows["vision_tower"][1:] == [f"{tower - merger:,}", f"{tower - merger:,}", "float32", "1e-05"]


def test_everything_trains_in_full():
    model, processor = build_model()
    model = prepare_for_training(model, list(TRAINABLE_PARTS), lora_r=0).train()
    model(**collate(processor, [Items()[0]])).loss.backward()
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None] == []
    known = ("prompt_encoder", "shared_image_embedding", "iou_prediction_head", "hypernetworks_mlps", "post_layernorm")
    assert all(any(name in path for name in known) for path in frozen)


def test_dora_trains_directions_and_lengths_apart():
    model, processor = build_model()
    start = outputs(model.eval(), processor)
    model = prepare_for_training(model, ["seg_projector"], lora_r=4, use_dora=True).eval()
    assert_outputs_close(outputs(model, processor), start, 1e-5)
    lengths = [weight for name, weight in model.named_parameters() if "lora_magnitude_vector" in name]
    assert len(lengths) == 4 and all(weight.requires_grad and weight.dim() == 1 for weight in lengths)
    with torch.no_grad():
        for weight in lengths:
            weight.mul_(1.5)
    unmerged = outputs(model, processor)
    assert (unmerged["logits"] - start["logits"]).abs().max() > 0.1
    assert_outputs_close(outputs(merge_lora(model), processor), unmerged, 1e-5)


def test_summary_counts_what_trains(tiny, tmp_path):
    size = sum(weight.numel() for weight in tiny[0].parameters())
    model = prepare_for_training(tiny[0], PARTS, lora_r=4)
    trained = {name: weight.numel() for name, weight in model.named_parameters() if weight.requires_grad}
    args = LisaTrainingArguments(str(tmp_path), learning_rate=3e-4, part_learning_rates={"embeddings": 1e-5})
    header, *lines, last = [line.split() for line in trainable_summary(model, args).splitlines()]
    rows = {row[0]: row for row in lines}
    lora = sum(count for name, count in trained.items() if ".lora_" in name)
    assert rows["lora"] == ["lora", f"{lora:,}", f"{lora:,}", "float32", "0.0003"]
    assert rows["embeddings"][1] == rows["embeddings"][2] and rows["embeddings"][-1] == "1e-05"
    assert rows["language_model"][1] == "0" and rows["language_model"][-1] == "float32"  # no rate
    decoder = sum(count for name, count in trained.items() if "mask_decoder" in name)
    assert rows["mask_decoder"][1] == f"{decoder:,}" and rows["mask_decoder"][2] != f"{decoder:,}"
    assert last[:3] == ["sum", f"{sum(trained.values()):,}", f"{size + lora:,}"]
