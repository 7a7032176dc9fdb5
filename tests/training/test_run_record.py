"""`run.json`: what a run was started with, for a run of the recipe and for resuming it."""

import json
from importlib.metadata import version

import pytest
from accelerate import Accelerator
from fixtures.rows import dataset, image_file, segmentation_row

from lisa_hf.data.image_keys import name_key, read_image_keys
from lisa_hf.data.mixture import EvaluationDataset, MixtureDataset
from lisa_hf.data.streaming import StreamingMixtureDataset
from lisa_hf.training import run_record
from lisa_hf.training.arguments import DataArguments, LisaTrainingArguments, ModelArguments
from lisa_hf.training.run_record import RUN_RECORD, read_run_record, write_run_record


@pytest.fixture
def write(tmp_path):
    image = image_file(tmp_path / "image.png")
    rows = {name: dataset(*[segmentation_row(name, 0, image)] * 3) for name in ("reason_seg", "shapes")}

    def write(directory="run", model="somebody/lisa", streaming=False, **training):
        model_args = ModelArguments(model=str(model), trainable=["seg_projector"])
        data_args = DataArguments(
            sources={"reason_seg": {"weight": 3, "split": "val"}, "shapes": 1}, eval_sources={"shapes": {}}
        )
        training_args = LisaTrainingArguments(output_dir=str(tmp_path / directory), use_cpu=True, **training)
        Accelerator(cpu=True)  # as the trainer of a run has made one
        if streaming:
            sources = {name: some.to_iterable_dataset() for name, some in rows.items()}
            train_dataset = StreamingMixtureDataset(sources, weights=data_args.weights)
        else:
            train_dataset = MixtureDataset(rows, length=8, weights=data_args.weights)
        evaluation = {"shapes": EvaluationDataset(rows["shapes"])}
        write_run_record(model_args, data_args, training_args, train_dataset, evaluation)
        return read_run_record(tmp_path / directory)

    return write


def test_record_tells_arguments_data_and_versions(write):
    record = write(learning_rate=5e-4, hub_token="secret")
    assert record["versions"]["transformers"] == version("transformers")
    assert {"python", "torch", "cuda", "tokenizers", "lisa-hf"} <= record["versions"].keys()
    assert record["hardware"] == {"device": "cpu", "num_processes": 1, "num_machines": 1}
    assert record["launcher"] == {"distributed_type": "NO", "zero_stage": None}
    assert record["arguments"]["model"]["trainable"] == ["seg_projector"]
    assert record["arguments"]["training"]["learning_rate"] == 5e-4
    assert "secret" not in json.dumps(record)
    first, second = record["data"]["train"]
    assert (first["source"], first["split"], first["weight"], first["num_rows"]) == ("reason_seg", "val", 0.75, 3)
    assert (second["split"], second["weight"]) == ("train", 0.25)
    assert first["fingerprint"] != second["fingerprint"]
    assert first["fingerprint"] == write()["data"]["train"][0]["fingerprint"]  # the same rows
    (evaluation,) = record["data"]["eval"]
    assert evaluation["split"] == "validation" and "weight" not in evaluation


def test_stream_has_no_number_of_rows(write):
    first = write(streaming=True)["data"]["train"][0]
    assert first["num_rows"] is None and first["fingerprint"] is None and first["weight"] == 0.75


def test_resumed_run_keeps_the_records_of_its_earlier_starts(write):
    write(learning_rate=1e-3)
    write(learning_rate=2e-3, resume_from_checkpoint="auto")
    record = write(learning_rate=3e-3, resume_from_checkpoint="auto")
    rates = [start["arguments"]["training"]["learning_rate"] for start in (*record["earlier_starts"], record)]
    assert rates == [1e-3, 2e-3, 3e-3]
    assert not write(learning_rate=4e-3)["earlier_starts"]  # started over


def test_record_of_the_model_that_a_run_continues(write, tmp_path):
    assert write("first")["continues"] is None
    record = write("second", model=tmp_path / "first")
    assert record["continues"] == read_run_record(tmp_path / "first")


def test_images_that_a_model_has_seen_are_kept(write, tmp_path):
    write("first")
    (key,) = read_image_keys(tmp_path / "first")["shapes"]
    assert read_image_keys(tmp_path / "first").keys() == {"reason_seg", "shapes"}
    assert key == name_key(str(tmp_path / "image.png"))
    write("second", model=tmp_path / "first", streaming=True)  # which has no images to list
    assert read_image_keys(tmp_path / "second")["shapes"] == [key]
    write("second", streaming=True)  # another run, started over
    assert read_image_keys(tmp_path / "second") == {}


def test_images_of_a_resumed_run_are_not_listed_again(write, tmp_path, monkeypatch):
    write()
    keys = read_image_keys(tmp_path / "run")
    monkeypatch.setattr(run_record, "image_keys", None)
    write(resume_from_checkpoint="auto")
    found = read_image_keys(tmp_path / "run")
    assert found.keys() == keys.keys() and all((found[name] == keys[name]).all() for name in keys)
    with pytest.raises(TypeError):
        write()  # started over


def test_damaged_record_is_named(tmp_path):
    assert read_run_record(tmp_path) is None
    (tmp_path / RUN_RECORD).write_text('{"started": ')
    with pytest.raises(ValueError, match=f"{RUN_RECORD}: expected JSON"):
        read_run_record(tmp_path)
