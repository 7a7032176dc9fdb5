"""FSDP2: what each process loads and holds."""

import pytest
import torch
from fixtures.tiny_training import LISA_PARTS, build_model
from workers.fsdp_worker import build, load_sharded

from lisa_hf.training.arguments import ModelArguments


def save_halves(directory, tied: bool):
    """Both halves, the VLM's in several files and without room for new tokens."""
    model, processor = build_model(tie_word_embeddings=tied)
    model.resize_token_embeddings(model.get_input_embeddings().num_embeddings - 3)
    model.vlm.save_pretrained(directory / "vlm", max_shard_size="60KB")
    processor.vlm_processor.chat_template = processor.chat_template
    processor.vlm_processor.save_pretrained(directory / "vlm")
    model.mask_model.save_pretrained(directory / "mask_model")
    processor.mask_image_processor.save_pretrained(directory / "mask_model")
    assert len(list((directory / "vlm").glob("*.safetensors"))) > 3
    return {"vlm": str(directory / "vlm"), "mask_model": str(directory / "mask_model")}


@pytest.mark.parametrize(
    ("tied", "dtype", "adaptation"),
    [
        (False, None, {"trainable": LISA_PARTS, "lora_r": 4}),
        (True, "bfloat16", {"trainable": LISA_PARTS, "lora_r": 4}),
        pytest.param(True, None, {"trainable": [*LISA_PARTS, "language_model"], "lora_r": 0}, marks=pytest.mark.slow),
    ],
)
def test_each_process_loads_its_rows_of_the_same_model(tied, dtype, adaptation, tmp_path):
    model_args = ModelArguments(**save_halves(tmp_path, tied), dtype=dtype, lora_dropout=0.0, **adaptation)
    model, _ = build(model_args)
    expected = dict(model.named_parameters(remove_duplicate=False))
    processes = load_sharded(tmp_path, model_args)
    for found in processes:
        assert found["weights"].keys() == expected.keys()
        assert [name for name, weight in expected.items() if not torch.equal(weight, found["weights"][name])] == []
        names = {}
        for name, weight in expected.items():
            names.setdefault(weight, []).append(name)
        assert found["ties"] == list(names.values())
        assert any("lm_head" in " ".join(tie) for tie in found["ties"] if len(tie) > 1) == tied
        assert found["is_sharded"]
        assert found["loss"] == processes[0]["loss"]
