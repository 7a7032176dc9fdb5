"""LISA computes the same states, logits and answers as each VLM alone, whatever its encoder returns."""

import inspect
import json

import pytest
import torch
import torch.nn.functional as F
from fixtures.tiny_models import (
    LAYERS,
    SIDE,
    llava_config,
    llava_sam,
    sam_config,
    text_config,
    vision_config,
)
from fixtures.vlms import VLM_TYPES, vlm_sam
from transformers import AutoConfig, AutoModelForImageTextToText

from lisa_hf import LisaConfig, LisaForConditionalGeneration
from lisa_hf.model.vlm_backbone import (
    encode_images_apart,
    record_states,
    sizes_per_image,
    unsupported_reason,
    vision_inputs_of,
)


IMAGE_INDICES = [1, 0, 1]
ANSWERS = [[30, 50, 31], [32, 33, 50, 34], [35, 50, 36, 37, 38]]


def vision_inputs(model_type: str) -> tuple[list[dict], dict, list[list[int]]]:
    """Return the vision inputs of each of two images alone, those of both, and the runs of image tokens of each."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    if model_type == "minicpmv4_7":
        sizes = [torch.tensor([[8, 8]]), torch.tensor([[4, 12], [8, 8], [8, 8]])]  # in patches of 4 x 4 pixels
        singles = [{"pixel_values": random(1, 3, 4, 4 * int(s.prod(1).sum())), "target_sizes": s} for s in sizes]
        pixels = torch.cat([single["pixel_values"] for single in singles], dim=3)
        return singles, {"pixel_values": pixels, "target_sizes": torch.cat(sizes)}, [[4], [3, 4, 4]]
    if model_type == "hunyuan_vl":
        grids = torch.tensor([[1, 4, 6], [1, 8, 4]])  # in patches of 4 x 4 pixels
        singles = [{"pixel_values": random(int(g.prod()), 48), "image_grid_thw": g[None]} for g in grids]
        both = {name: torch.cat([single[name] for single in singles]) for name in singles[0]}
        return singles, both, [[2 * (3 + 1) + 2], [4 * (2 + 1) + 2]]
    if model_type == "emu3":
        sizes = torch.tensor([[32, 48], [48, 24]])
        singles = [{"pixel_values": random(1, 3, *size), "image_sizes": size[None]} for size in sizes]
        padded = [F.pad(s["pixel_values"], (0, 48 - w, 0, 48 - h)) for s, (h, w) in zip(singles, sizes.tolist())]
        return singles, {"pixel_values": torch.cat(padded), "image_sizes": sizes}, [[4 * (6 + 1)], [6 * (3 + 1)]]
    if model_type == "step3p7":
        tiles = [1, 3]
        singles = [
            {
                "pixel_values": random(1, 3, 32, 32),
                "pixel_values_local": random(count, 3, 16, 16),
                "num_local_patches": torch.tensor([count]),
            }
            for count in tiles
        ]
        both = {name: torch.cat([single[name] for single in singles]) for name in singles[0]}
        return singles, both, [[4 + count] for count in tiles]
    if model_type == "granite4_vision":
        both = {"pixel_values": random(2, 3, 3, 32, 32), "image_sizes": torch.tensor([[32, 32], [24, 56]])}
        return [{name: value[i : i + 1] for name, value in both.items()} for i in range(2)], both, [[36], [52]]
    if model_type == "granite_docling":
        real = torch.tensor([[True, False], [True, True]])
        both = {"pixel_values": random(2, 2, 3, 32, 32), "pixel_attention_mask": real}
        return [{name: value[i : i + 1] for name, value in both.items()} for i in range(2)], both, [[16], [32]]
    tokens, crops = (16, [1, 1]) if model_type == "paligemma" else (4, [1, 3])
    singles = [{"pixel_values": random(count, 3, 32, 32)} for count in crops]
    pixels = torch.cat([single["pixel_values"] for single in singles])
    return singles, {"pixel_values": pixels}, [[tokens * count] for count in crops]


def make_rows(model_type: str, model, runs: list[list[int]]) -> list[dict[str, list[int]]]:
    """Return three rows about two images, with as many text tokens before the answer as in the row before and two."""
    accepted = inspect.signature(model.vlm.forward).parameters
    rows = []
    for number, (index, answer) in enumerate(zip(IMAGE_INDICES, ANSWERS)):
        image_tokens = [token for length in runs[index] for token in [*[120] * length, 8]]
        prompt = [1, 5, 100, *image_tokens, 101, 7, *range(10, 13 + 2 * number)]
        ids = prompt + answer
        row = {"input_ids": ids, "labels": [-100] * len(prompt) + answer}
        if "mm_token_type_ids" in accepted:
            row["mm_token_type_ids"] = [int(token == 120) for token in ids]
        elif "token_type_ids" in accepted:  # PaliGemma: 1 is the answer
            row["token_type_ids"] = [0] * len(prompt) + [1] * len(answer)
        rows.append(row | {"attention_mask": [1] * len(ids)})
    return rows


def pad(rows: list[dict[str, list[int]]], left: bool = False) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values, fill):
        padding = [fill] * (longest - len(values))
        return padding + values if left else values + padding

    return {
        name: torch.tensor([padded(row[name], -100 if name == "labels" else 0) for row in rows]) for name in rows[0]
    }


def mask_inputs() -> dict:
    sizes = torch.tensor([[SIDE, SIDE]] * 2)
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return {"mask_pixel_values": pixels, "original_sizes": sizes, "reshaped_input_sizes": sizes}


@pytest.mark.parametrize("model_type", VLM_TYPES)
def test_states_logits_and_answers_are_the_vlms_own(model_type):
    model = vlm_sam(model_type)
    singles, both, runs = vision_inputs(model_type)
    rows = make_rows(model_type, model, runs)
    inputs = {**both, **mask_inputs(), "image_indices": torch.tensor(IMAGE_INDICES)}
    with torch.no_grad():
        output = model(**pad(rows), **inputs, output_logits=True)
        total = num_labels = 0
        for number, (row, index) in enumerate(zip(rows, IMAGE_INDICES)):
            single = {name: torch.tensor([value]) for name, value in row.items() if name != "labels"}
            with record_states(model.vlm) as states:
                own = model.vlm(**single, **singles[index]).logits[0]
            length = len(row["input_ids"])
            atol = 2e-5 * states[0].abs().max().item()
            torch.testing.assert_close(output.last_hidden_state[number, :length], states[0][0], rtol=0, atol=atol)
            torch.testing.assert_close(output.logits[number, :length], own, rtol=0, atol=1e-4)
            total += F.cross_entropy(own[:-1], torch.tensor(row["labels"][1:]), reduction="sum")
            num_labels += len(ANSWERS[number])
        # The loss is that of the VLM's own logits, also where only supervised positions are projected.
        torch.testing.assert_close(output.ce_loss, total / num_labels)
        torch.testing.assert_close(model(**pad(rows), **inputs).ce_loss, total / num_labels)

        prompts = [
            {name: value[: len(row["labels"]) - len(answer)] for name, value in row.items() if name != "labels"}
            for row, answer in zip(rows, ANSWERS)
        ]
        batch = pad(prompts, left=True)
        found = model.generate(**batch, **inputs, max_new_tokens=4, do_sample=False).sequences
        for number, (row, index) in enumerate(zip(prompts, IMAGE_INDICES)):
            single = {name: torch.tensor([value]) for name, value in row.items()}
            own = model.vlm.generate(**single, **singles[index], max_new_tokens=4, do_sample=False)
            answer = own[0, len(row["input_ids"]) :].tolist()
            assert found[number, batch["input_ids"].shape[1] :].tolist()[: len(answer)] == answer


@pytest.mark.parametrize("model_type", VLM_TYPES)
def test_features_of_each_image_replace_its_pixels(model_type):
    """As a feature cache keeps them: the whole output of the encoder, one image after the other."""
    model = vlm_sam(model_type)
    _, both, runs = vision_inputs(model_type)
    rows = make_rows(model_type, model, runs)
    inputs = {**pad(rows), **mask_inputs(), "image_indices": torch.tensor(IMAGE_INDICES)}
    with torch.no_grad():
        expected = model(**inputs, **both).last_hidden_state
        ids = pad([rows[1], rows[0]])["input_ids"]  # a row about each image
        features = encode_images_apart(model.vlm, ids, vision_inputs_of(model.vlm, both))
        assert len(features) == 2
        sizes = sizes_per_image(model.vlm, both, ids, torch.arange(2), num_images=2)
        sizes = {name: torch.cat(values) for name, values in sizes.items()}
        found = model(**inputs, **sizes, vision_features=features).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_caps_and_scales_of_logits_reach_the_loss():
    model = vlm_sam("paligemma")
    _, both, runs = vision_inputs("paligemma")
    inputs = {**pad(make_rows("paligemma", model, runs)), **both, **mask_inputs()}
    inputs["image_indices"] = torch.tensor(IMAGE_INDICES)
    capped = model(**inputs, output_logits=True)
    bare = model.vlm.lm_head(capped.last_hidden_state)
    assert bare.abs().max() > 2.0
    torch.testing.assert_close(capped.logits, 2.0 * torch.tanh(bare / 2.0))


BLIP = {
    "vision_config": {**LAYERS, "hidden_size": 32, "intermediate_size": 32, "image_size": 32, "patch_size": 8},
    "qformer_config": {**LAYERS, "hidden_size": 32, "intermediate_size": 32, "encoder_hidden_size": 32},
    "text_config": text_config(model_type="llama", vocab_size=128),
}


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_vocabulary_projection_of_its_own(is_tied, tmp_path):
    """InternVL3 and others say only of their language model whether it ties its embeddings: weights decide."""
    vlm = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(
            "internvl",
            vision_config=vision_config("internvl_vision", image_size=[32, 32], patch_size=[8, 8]),
            text_config=text_config(model_type="llama", vocab_size=128, tie_word_embeddings=False),
            tie_word_embeddings=is_tied,
        )
    )
    vlm.save_pretrained(tmp_path / "vlm")
    config = json.loads((tmp_path / "vlm" / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "vlm" / "config.json").write_text(json.dumps(config))
    llava_sam()[0].mask_model.save_pretrained(tmp_path / "sam")
    model = LisaForConditionalGeneration.from_vlm_mask_model_pretrained(
        str(tmp_path / "vlm"), str(tmp_path / "sam"), seg_token_id=50
    )
    model.resize_token_embeddings(130)
    model.save_pretrained(tmp_path / "lisa")
    for found in (model, LisaForConditionalGeneration.from_pretrained(tmp_path / "lisa")):
        projection, embeddings = found.get_output_embeddings().weight, found.get_input_embeddings().weight
        assert (projection is embeddings) == is_tied and len(projection) == len(embeddings) == 130
        assert torch.equal(projection[:128], vlm.lm_head.weight)
        assert torch.equal(embeddings[:128], vlm.get_input_embeddings().weight)


def test_a_grown_vocabulary_of_gemma4(tmp_path):
    """Its embeddings are tied, and each layer has more of them; all 262144 of the published ones are taken."""
    text = {"hidden_size_per_layer_input": 8, "vocab_size": 128, "vocab_size_per_layer_input": 128, "head_dim": 16}
    text = text_config(model_type="gemma4_text", global_head_dim=16, num_kv_shared_layers=0, **text)
    vision = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "head_dim": 16, "patch_size": 4}
    config = AutoConfig.for_model("gemma4", text_config=text, vision_config=vision, audio_config=None)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "vlm")
    llava_sam()[0].mask_model.save_pretrained(tmp_path / "sam")
    model = LisaForConditionalGeneration.from_vlm_mask_model_pretrained(
        str(tmp_path / "vlm"), str(tmp_path / "sam"), seg_token_id=128
    )
    model.resize_token_embeddings(129)
    model.save_pretrained(tmp_path / "lisa")
    for found in (model, LisaForConditionalGeneration.from_pretrained(tmp_path / "lisa")):
        language_model = found.vlm.model.language_model
        assert found.get_output_embeddings().weight is language_model.embed_tokens.weight
        assert len(language_model.embed_tokens.weight) == len(language_model.embed_tokens_per_layer.weight) == 129
        assert found.config.get_text_config().vocab_size == 129


@pytest.mark.parametrize(
    "vlm_config, reason",
    [
        ({"model_type": "git", **LAYERS, "vocab_size": 128, "hidden_size": 32}, "takes no precomputed features"),
        ({"model_type": "instructblip", **BLIP}, "depend on the question"),
        ({"model_type": "instructblipvideo", **BLIP}, "only videos"),
        ({"model_type": "blip-2", **BLIP}, "always encodes pixels itself"),
    ],
)
def test_vlms_that_cannot_work_are_refused(vlm_config, reason):
    config = LisaConfig(
        vlm_config=AutoConfig.for_model(**vlm_config),
        mask_config=AutoConfig.for_model(**sam_config()),
        seg_token_id=50,
    )
    with pytest.raises(ValueError, match=f"expected a VLM that answers token by token .*{reason}"):
        LisaForConditionalGeneration(config)


@pytest.mark.parametrize("model_type", ["evolla", "llama"])
def test_models_that_are_no_vlms_are_named(model_type):
    config = LisaConfig(
        vlm_config=AutoConfig.for_model(model_type), mask_config=AutoConfig.for_model(**sam_config()), seg_token_id=50
    )
    with pytest.raises(ValueError, match=f"expected a vision-language model .*, got '{model_type}'. Choose one, .*$"):
        LisaForConditionalGeneration(config)


def test_a_vlm_that_does_not_answer_token_by_token_is_refused():
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**llava_config()))
    assert unsupported_reason(model) is None

    class Diffusion(torch.nn.Module):
        def forward(self, input_ids, mm_encoder_outputs=None):
            raise NotImplementedError

    assert unsupported_reason(Diffusion()) == "it does not answer token by token"


def test_a_frozen_vision_tower_does_not_change_in_training():
    """Statistics of BatchNorm, as in FastVLM's tower, would drift although nothing there learns."""
    model = vlm_sam("paligemma")
    tower = model.vlm.model.vision_tower
    tower.norm = torch.nn.BatchNorm2d(3).eval()
    tower.register_forward_pre_hook(lambda module, args: (module.norm(args[0]), *args[1:]))
    tower.requires_grad_(False)
    _, both, runs = vision_inputs("paligemma")
    inputs = {**pad(make_rows("paligemma", model, runs)), **both, **mask_inputs()}
    inputs["image_indices"] = torch.tensor(IMAGE_INDICES)
    expected = model(**inputs).last_hidden_state
    found = model.train()(**inputs).last_hidden_state
    assert model.training and model.vlm.model.language_model.training and not tower.training
    assert tower.norm.num_batches_tracked == 0
    torch.testing.assert_close(found, expected)
    tower.requires_grad_(True)
    assert model.train().vlm.model.vision_tower.norm.training
