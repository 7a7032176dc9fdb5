"""What `recipes/convert_weights.py` rejects and lists, what it leaves on disk, and how much memory it needs."""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from fixtures.golden_model import (
    convert,
    converted_directory,
    load_json,
    original_directory,
    original_state_dict,
    training_state_dict,
    write_shards,
)
from fixtures.original_checkpoints import (
    CLIP,
    language_model,
    linear_projector,
    sam_vit_b,
    write_7b,
    write_llava,
    write_zero_checkpoint,
)
from fixtures.paths import ROOT
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModel

from lisa_hf.conversion import saving
from lisa_hf.export import save_records
from lisa_hf.training.arguments import ModelArguments
from lisa_hf.training.build import build_config_and_processor
from lisa_hf.training.run_record import find_run_record


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["model", "vlm"])
def test_originals_are_refused_with_the_command_that_converts_them(tmp_path, argument):
    write_llava(tmp_path / "llava", {}, {}, mm_vision_tower=str(CLIP))
    write_llava(tmp_path / "llava-delta", {}, {}, mm_vision_tower=str(CLIP))
    write_zero_checkpoint(tmp_path / "ckpt_model", training_state_dict())
    expected = {
        original_directory(): "lisa --checkpoint {} --output",
        tmp_path / "llava": "llava --checkpoint {} --output",
        tmp_path / "llava-delta": "llava-delta --checkpoint {} --base LLAMA --output",
        tmp_path / "ckpt_model": "lisa-train --checkpoint {} --base LLAVA --output",
    }
    for path, command in expected.items():
        arguments = {"model": {"model": str(path)}, "vlm": {"vlm": str(path), "mask_model": "sam"}}[argument]
        with pytest.raises(ValueError) as refused:
            build_config_and_processor(ModelArguments(**arguments))
        assert f"`python recipes/convert_weights.py {command.format(path)} OUTPUT`" in str(refused.value)


def test_an_original_mask_model_is_refused_with_its_command(sam_file):
    arguments = ModelArguments(vlm=str(converted_directory()), mask_model=str(sam_file))
    with pytest.raises(ValueError, match=r"recipes/convert_weights.py sam --checkpoint .*sam\.pth --output"):
        build_config_and_processor(arguments)


WRONG_SAM = {  # changed tensors, None removes one; message
    "unknown": ({"extra.weight": torch.zeros(1), "more.bias": torch.zeros(1)}, r"'extra\.weight', 'more\.bias'"),
    "missing": (
        {"image_encoder.blocks.3.mlp.lin1.bias": None, "mask_decoder.iou_token.weight": None},
        r"2 tensors are missing: .*vision_encoder\.layers\.3\.mlp\.lin1\.bias.*mask_decoder\.iou_token\.weight",
    ),
    "misshapen": (
        {"image_encoder.neck.0.weight": torch.zeros(32, 31, 1, 1)},
        r"vision_encoder\.neck\.conv1\.weight has shape \(32, 31, 1, 1\) instead of \(32, 32, 1, 1\)",
    ),
    "no geometry": ({"image_encoder.pos_embed": None}, r"The checkpoint has no image_encoder\.pos_embed"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_SAM.values(), ids=WRONG_SAM)
def test_wrong_tensors_of_sam_are_listed(sam_file, fail, change, message):
    torch.save({name: value for name, value in (sam_vit_b() | change).items() if value is not None}, sam_file)
    assert re.search(message, fail("sam", "--checkpoint", sam_file))


def test_unknown_and_missing_tensors_of_lisa_are_listed(tmp_path, fail):
    directory = Path(shutil.copytree(original_directory(), tmp_path / "lisa"))
    arguments = ("lisa", "--checkpoint", directory, "--vision_tower", CLIP)
    state_dict = {name: tensor for name, tensor in original_state_dict().items() if "vision_tower" not in name}
    write_shards(state_dict | {"model.mm_projector.4.bias": torch.zeros(1), "extra": torch.zeros(1)}, directory)
    assert re.search(r"'model\.mm_projector\.4\.bias', 'extra'", fail(*arguments))
    gone = {"model.text_hidden_fcs.0.2.bias", "model.layers.1.mlp.up_proj.weight"}
    write_shards({name: tensor for name, tensor in state_dict.items() if name not in gone}, directory)
    message = fail(*arguments)
    assert "2 tensors are missing" in message
    assert "seg_projector.linear_2.bias" in message and "layers.1.mlp.up_proj.weight" in message


def test_missing_shards_and_tensors_are_named(tmp_path, fail):
    state_dict = language_model(640) | linear_projector()
    write_llava(tmp_path / "llava", state_dict, {}, mm_vision_tower=str(CLIP), mm_use_im_start_end=False)
    index = tmp_path / "llava" / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.gone.weight"] = "pytorch_model-00001-of-00002.bin"
    index.write_text(json.dumps(content))
    arguments = ("llava", "--checkpoint", tmp_path / "llava")
    assert "model.gone.weight" in fail(*arguments)
    shard = tmp_path / "llava" / "pytorch_model-00002-of-00002.bin"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert f"{shard} cannot be read" in fail(*arguments)
    shard.unlink()
    assert f"{shard} is missing" in fail(*arguments)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_pickles_are_not_executed(sam_file, fail, monkeypatch):
    monkeypatch.chdir(sam_file.parent)
    torch.save({"image_encoder.pos_embed": Malicious()}, sam_file)
    assert "cannot be read" in fail("sam", "--checkpoint", sam_file)
    assert not Path("executed").exists()
    torch.save({"model": sam_vit_b()}, sam_file)
    assert "['model']" in fail("sam", "--checkpoint", sam_file)


@pytest.mark.parametrize("file", ["bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"])
def test_zero_pickles_are_not_executed(tmp_path, fail, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    write_zero_checkpoint(tmp_path / "ckpt_model", training_state_dict())
    shard = tmp_path / "ckpt_model" / "global_step10" / file
    torch.save(torch.load(shard) | {"client_state": Malicious()}, shard)
    message = fail("lisa-train", "--checkpoint", tmp_path / "ckpt_model")
    assert "could run code" in message and "mkdir" in message
    assert not Path("executed").exists()


def test_missing_and_converted_checkpoints_are_refused(fail):
    message = fail("lisa", "--checkpoint", "xinlai/LISA-7B-v1")
    assert "got xinlai/LISA-7B-v1, which does not exist" in message and "hf download" in message
    message = fail("lisa", "--checkpoint", converted_directory())
    assert "['LisaForConditionalGeneration']" in message and "needs no conversion" in message


def write_llava_delta(directory: Path) -> None:
    base, delta = language_model(640), language_model(640) | linear_projector()
    delta |= {name: torch.full_like(tensor, 0.01) for name, tensor in base.items() if "layers.0" not in name}
    write_llava(directory, delta, {}, mm_vision_tower=str(CLIP), mm_use_im_start_end=False)


@pytest.fixture
def originals(tmp_path, sam_file):
    """One original of every source, by the source's name."""
    state_dict = language_model(640) | linear_projector()
    write_llava(tmp_path / "llava", state_dict, {}, mm_vision_tower=str(CLIP), mm_use_im_start_end=False)
    write_llava_delta(tmp_path / "difference")
    torch.save(training_state_dict(), tmp_path / "pytorch_model.bin")
    return {
        "sam": sam_file,
        "llava": tmp_path / "llava",
        "llava-delta": tmp_path / "difference",
        "lisa": original_directory(),
        "lisa-train": tmp_path / "pytorch_model.bin",
    }


def test_a_wrong_source_is_refused_with_the_right_one(originals, fail):
    for recognized, checkpoint in originals.items():
        for given in originals.keys() - {recognized}:
            if (given, recognized) != ("lisa-train", "lisa"):  # merged, or trained without LoRA
                message = fail(given, "--checkpoint", checkpoint, "--base", originals["llava"])
                assert f"expected `{recognized}` for this checkpoint, got `{given}`" in message


def test_auto_recognizes_every_source(originals, tmp_path, capsys, fail):
    assert "--base: expected the directory of the LLaMA" in fail("auto", "--checkpoint", originals["llava-delta"])
    write_zero_checkpoint(tmp_path / "ckpt_model", training_state_dict())
    recognized = {originals[source]: source for source in ("sam", "llava", "lisa", "lisa-train")}
    for index, (checkpoint, source) in enumerate((recognized | {tmp_path / "ckpt_model": "lisa-train"}).items()):
        base = ("--base", original_directory()) if source == "lisa-train" else ()
        output = tmp_path / f"{index}"
        convert("auto", "--checkpoint", checkpoint, *base, "--vision_tower", CLIP, "--output", output)
        assert f"Source: {source}," in capsys.readouterr().out and (output / "config.json").is_file()


def test_auto_refuses_what_is_no_original(sam_file, fail):
    torch.save({"weight": torch.zeros(1)}, sam_file)
    message = fail("auto", "--checkpoint", sam_file)
    assert "expected the tensors of an original LLaVA, SAM or LISA, got ['weight']" in message


# ---- on disk --------------------------------------------------------------------------------------------------------


def test_output_that_exists_is_kept(sam_file, output, capsys):
    output.mkdir()
    (output / "mine").touch()
    with pytest.raises(SystemExit):
        convert("sam", "--checkpoint", sam_file, "--output", output)
    assert "exists and is not empty" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["mine"]


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_it_leaves_nothing(sam_file, output, monkeypatch, signal_number):
    def save_half(tensors, path, metadata):
        path.write_bytes(b"half")
        signal.raise_signal(signal_number)

    monkeypatch.setattr(saving, "save_file", save_half)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        convert("sam", "--checkpoint", sam_file, "--output", output)
    assert list(output.parent.iterdir()) == [sam_file]


def test_what_a_killed_run_left_is_replaced(sam_file, output):
    incomplete = output.with_name("converted.incomplete")
    incomplete.mkdir()
    (incomplete / "model.safetensors").write_bytes(b"half")
    convert("sam", "--checkpoint", sam_file, "--output", output)
    assert sorted(output.parent.iterdir()) == [output, sam_file]


def test_a_disk_that_forgets_is_noticed(sam_file, fail, monkeypatch):
    def save_zeros(tensors, path, metadata):
        save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, path, metadata)

    monkeypatch.setattr(saving, "save_file", save_zeros)
    message = fail("sam", "--checkpoint", sam_file)
    assert "differs from what was written" in message and "vision_encoder.pos_embed" in message


def test_shards_and_index(output, monkeypatch):
    monkeypatch.setattr(saving, "MAX_SHARD_SIZE", "300KB")
    convert("lisa", "--checkpoint", original_directory(), "--vision_tower", CLIP, "--output", output)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    names = set()
    for shard in set(index["weight_map"].values()):
        with safe_open(output / shard, "pt") as tensors:
            names |= set(tensors.keys())
    assert names == set(index["weight_map"]) and len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] > 1e6
    model, info = AutoModel.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    rows = model.get_input_embeddings().weight
    vocab_size = load_json("model_config")["vocab_final"]
    assert torch.equal(rows[:vocab_size], original_state_dict()["model.embed_tokens.weight"])
    assert not rows[vocab_size:].any()


def test_what_the_authors_say_of_the_training_data_is_kept(output, capsys):
    convert("lisa", "--checkpoint", original_directory(), "--vision_tower", CLIP, "--output", output)
    record = find_run_record(output)
    assert record["converted_from"] == str(original_directory()) and record["data"]["train"] == []
    assert "v1 were trained on both ReasonSeg train and val" in record["training_data"]
    assert record["training_data"] in capsys.readouterr().out
    # An exported model and its card keep it.
    save_records(output, output, "me/mine")
    card = (output / "README.md").read_text()
    assert record["training_data"] in card and "All arguments" not in card and "| data | split |" not in card
    shared = record | {"converted_from": f"<local>/{original_directory().name}"}  # without directories of this machine
    assert find_run_record(output) == shared


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_does_not_depend_on_the_number_of_layers(tmp_path):
    """Measured: 4.2 GB with four layers (2 GB of weights) and with eight (3.6 GB)."""
    command, peaks = ROOT / "recipes" / "convert_weights.py", {}
    for num_layers in (4, 8):
        directory, output = tmp_path / f"layers-{num_layers}", tmp_path / f"converted-{num_layers}"
        write_7b(directory, num_layers)
        process = os.posix_spawn(
            sys.executable,
            [sys.executable, str(command), "llava", "--checkpoint", str(directory), "--output", str(output)],
            os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        _, status, usage = os.wait4(process, 0)
        assert status == 0
        peaks[num_layers] = usage.ru_maxrss / 2**20  # GB: Linux counts in kB
    assert peaks[8] < 1.1 * peaks[4] and peaks[8] < 6, peaks
