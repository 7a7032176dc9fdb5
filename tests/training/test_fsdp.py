"""Several processes share a model: what each one loads, holds and saves with FSDP2; tensor parallelism."""

import json
import os
import pickle

import load_memory
import pytest
import torch
from fixtures.tiny_training import ENGINES, LISA_PARTS, Items, build_model, collate
from workers.fsdp_worker import answer, build, run_processes, train_sharded
from workers.launching import launch

from lisa_hf.conversion.checkpoints import open_checkpoint
from lisa_hf.conversion.fsdp_checkpoints import FSDP_DIRECTORY
from lisa_hf.export import restore_model
from lisa_hf.training.arguments import ModelArguments
from lisa_hf.training.checkpointing import find_fault


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


@pytest.mark.parametrize(("tied", "dtype"), [(False, None), pytest.param(True, "bfloat16", marks=pytest.mark.slow)])
def test_each_process_loads_its_rows_of_the_same_model(tied, dtype, tmp_path):
    adaptation = {"trainable": LISA_PARTS, "lora_r": 4, "lora_dropout": 0.0}
    model_args = ModelArguments(**save_halves(tmp_path, tied), dtype=dtype, **adaptation)
    model, _ = build(model_args)
    expected = dict(model.named_parameters(remove_duplicate=False))
    processes = train_sharded(tmp_path, model_args)
    for found in processes:
        assert found["weights"].keys() == expected.keys()
        assert [name for name, weight in expected.items() if not torch.equal(weight, found["weights"][name])] == []
        names = {}
        for name, weight in expected.items():
            names.setdefault(weight, []).append(name)
        assert found["ties"] == list(names.values())
        assert any("lm_head" in " ".join(tie) for tie in found["ties"] if len(tie) > 1) == tied
        assert found["is_sharded"]
        assert found["losses"] == processes[0]["losses"]


def test_shards_resume_on_another_number_of_processes_and_export_in_one(tmp_path):
    adaptation = {"trainable": [*LISA_PARTS, "language_model"], "lora_r": 0}
    model_args = ModelArguments(**save_halves(tmp_path, tied=True), **adaptation)
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
    options |= {"learning_rate": 1e-2, "lr_scheduler_type": "linear"}
    two, _ = train_sharded(tmp_path, model_args, **options)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert not list(checkpoint.glob("*.safetensors")) and find_fault(checkpoint) is None
    # Put together in one process, as export.py does
    exported = dict(restore_model(checkpoint.with_name("checkpoint-3"))[0].named_parameters())
    assert exported.keys() == two["trained"].keys()
    assert [name for name, weight in two["trained"].items() if not torch.equal(weight, exported[name])] == []
    # Losses continue, with AdamW's moments and the data order, even in a run that saves whole weights.
    options["fsdp_config"] = ENGINES["fsdp2"]["fsdp_config"] | {"fsdp_state_dict_type": "FULL_STATE_DICT"}
    (one,) = train_sharded(tmp_path, model_args, num_ranks=1, **options, resume_from_checkpoint=str(checkpoint))
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-5) and len(set(one["losses"])) == 3


@pytest.mark.slow
def test_host_memory_of_loading_is_a_share_and_a_file(tmp_path, monkeypatch):
    """With LoRA, whose copy of the embeddings is whole until it is sharded."""
    monkeypatch.setitem(load_memory.VLM["text_config"], "num_hidden_layers", 6)
    load_memory.make_model(tmp_path)
    for num_processes in (2, 4):
        arguments = ("--model", tmp_path, "--output_dir", tmp_path / "run")
        output = launch(load_memory.__file__, *arguments, launcher="fsdp2", num_processes=num_processes)
        report = json.loads(output[output.index("{\n") : output.rindex("}") + 1])
        assert max(process["peak"] for process in report["processes"]) <= report["bound"]


def test_a_description_of_shards_that_would_run_code_is_refused(tmp_path):
    (tmp_path / FSDP_DIRECTORY).mkdir()
    with open(tmp_path / FSDP_DIRECTORY / ".metadata", "wb") as file:
        pickle.dump(os.getcwd, file)
    with pytest.raises(ValueError, match=r"expected a description of tensors .*, got posix.getcwd"):
        open_checkpoint(tmp_path)


def test_tensor_parallelism_answers_as_one_process(tmp_path):
    model, processor = build_model()
    model.save_pretrained(tmp_path / "model")
    batch = collate(processor, Items(2).items)
    prompt = {name: batch[name][:1] for name in ("pixel_values", "mask_pixel_values")}
    prompt["input_ids"] = batch["input_ids"][:1, batch["attention_mask"][0].bool()]
    with torch.no_grad():
        expected = model.eval()(**batch)
    sequences = model.generate(**prompt, max_new_tokens=4, do_sample=False).sequences
    for found in run_processes(answer, tmp_path, 2, dict(batch), prompt):
        for name in ("low_res_masks", "last_hidden_state"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
        assert torch.equal(found["sequences"], sequences)
        assert found["num_held"] < 0.8 * sum(weight.numel() for weight in model.vlm.parameters())
