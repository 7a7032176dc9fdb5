"""`recipes/export.py`: from a finished or unfinished run to a directory that answers the same anywhere."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import PIL.Image
import pytest
import torch
import transformers
import yaml
from fixtures.golden_model import converted_directory
from fixtures.recipes import RUN, TINY, run_here
from fixtures.tiny_training import make_trainer
from fixtures.without_package import NO_PACKAGE
from huggingface_hub import ModelCard, parse_eval_result_entries
from safetensors import safe_open
from workers import export_worker
from workers.launching import launch

from lisa_hf import export
from lisa_hf.conversion.zero_checkpoints import open_zero_checkpoint
from lisa_hf.evaluation.benchmarks import write_evaluation
from lisa_hf.training import engine_change
from lisa_hf.training.arguments import ModelArguments
from lisa_hf.training.trainable import prepare_for_training


# LoRA on a converted LISA, all weights of one, and LoRA on weights and a tokenizer that are nowhere on disk.
RUNS = {
    "lora": {"model": None, **RUN},
    "full": {"model": None, "lora_r": 0, **RUN},
    "from_nothing": TINY | RUN | {"trainable": ["mask_decoder"], "eval_generate": True},
}


def write_recipe(path: Path, **arguments) -> Path:
    if "model" in arguments:
        arguments["model"] = str(converted_directory())
    path.write_text(yaml.safe_dump(arguments))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`runs(name)`: the directory of one of the `RUNS`, with `run` and `answers.safetensors`; trained once."""
    made = {}

    def make(name: str) -> Path:
        if name not in made:
            directory = made[name] = tmp_path_factory.mktemp(name)
            recipe = write_recipe(directory / "recipe.yaml", **RUNS[name])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(datasets.config, "HF_DATASETS_CACHE", directory / "cache")
                export_worker.train(
                    directory / "answers.safetensors", "--config", recipe, "--output_dir", directory / "run"
                )
        return made[name]

    return make


@pytest.fixture
def command(tmp_path, capsys):
    """Exports a run of `RUNS` or a directory to `out` in this process; returns what was printed, or the error."""

    def run(directory: Path, *options, output: Path = tmp_path / "out", fails: bool = False) -> str:
        try:
            run_here("export.py", directory, "--output", output, *options)
            failed = False
        except SystemExit:
            failed = True
        out, err = capsys.readouterr()
        assert failed == fails, err
        return err if fails else out

    return run


# ---- round trips ----------------------------------------------------------------------------------------------------

FRESH = (
    NO_PACKAGE
    + """
import sys

import torch
from safetensors.torch import load_file

from transformers import AutoModel, AutoProcessor, pipeline

picture, *arguments = sys.argv[1:]
for directory, answers in zip(arguments[::2], arguments[1::2]):
    model = AutoModel.from_pretrained(directory, trust_remote_code=True).eval()
    AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    tensors = load_file(answers)
    inputs = {name.removeprefix("inputs."): value for name, value in tensors.items() if name.startswith("inputs.")}
    with torch.no_grad():
        masks = model(**inputs).low_res_masks
    difference = (masks - tensors["low_res_masks"]).abs().max().item()
    assert len(masks) and difference <= 1e-4, (directory, difference)
    pipe = pipeline("reasoning-segmentation", model=directory, trust_remote_code=True)
    answer = pipe(picture, question="What is red?", max_new_tokens=3)
    assert answer["masks"].shape[1:] == (40, 60), answer
"""
)


def check_in_a_fresh_process(directory: Path, exports: dict[Path, Path]):
    """Loads exported models without this package and compares their masks, to 1e-4, with those of the training."""
    PIL.Image.effect_noise((60, 40), 100).save(directory / "picture.png")
    environment = {"HF_MODULES_CACHE": directory / "modules", "HF_HOME": directory / "home", "HF_HUB_OFFLINE": "1"}
    arguments = [path for pair in exports.items() for path in pair]
    process = subprocess.run(
        [sys.executable, "-I", "-c", FRESH, directory / "picture.png", *arguments],
        cwd=directory,
        env=os.environ | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]


def test_round_trips(runs, command, tmp_path):
    exports = {}
    for name in RUNS:
        # Without its final model, as after an interruption: the newest checkpoint counts.
        shutil.copytree(runs(name) / "run", tmp_path / name / "run")
        (tmp_path / name / "run" / "model.safetensors").unlink()
        assert "checkpoint-5" in command(tmp_path / name / "run", output=tmp_path / f"{name}-out")
        exports[tmp_path / f"{name}-out"] = runs(name) / "answers.safetensors"
    for directory in exports:
        assert not {"optimizer.pt", "training_args.bin", "adapter_config.json"} & set(os.listdir(directory))
    check_in_a_fresh_process(tmp_path, exports)


def test_adapter_alone_is_restored_on_its_base(runs, command, tmp_path):
    command(runs("lora") / "run" / "checkpoint-5", "--adapter_only")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    model, _ = export.restore_model(tmp_path / "out")
    assert export_worker.largest_difference(model, runs("lora") / "answers.safetensors") <= 1e-4
    assert "restore_model" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ValueError, match="adapter_config.json of a LoRA run, got none"):
        export.save_adapter(runs("full") / "run" / "checkpoint-5", tmp_path / "none")


def test_a_checkpoint_with_an_adapter_is_evaluated_beside_its_base(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = json.dumps({"shapes": {"num_train_scenes": 1, "num_validation_scenes": 1, "image_size": 64}})
    options = ("--eval_sources", sources, "--use_cpu", "true", "--eval_generate", "false", "--base_model")
    run_here("eval.py", runs("lora") / "run" / "checkpoint-5", *options, "--output_dir", "out")
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["text"]["base_model"].endswith("checkpoint-5 without its adapter")
    assert written["text"]["perplexity"] != written["text"]["perplexity_of_base"] >= 1
    assert written["benchmarks"]["shapes"]["protocols"]["lisa"]["num_questions"] > 0
    with pytest.raises(SystemExit):  # a model without an adapter needs a name
        run_here("eval.py", runs("full") / "run", *options, "--output_dir", "none")
    assert not (tmp_path / "none").exists()


def test_final_model_in_shards_of_another_type(runs, command, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MAX_SHARD_SIZE", "200KB")
    # The final model is taken: it is as new as the newest checkpoint.
    assert f"Exported {runs('lora') / 'run'}:" in command(runs("lora") / "run", "--dtype", "bfloat16")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 2
    for shard in shards:
        with safe_open(tmp_path / "out" / shard, "pt") as tensors:
            dtypes = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}
        assert dtypes == {"BF16"}
    model, _ = export.restore_model(tmp_path / "out")
    assert export_worker.largest_difference(model.float(), runs("lora") / "answers.safetensors") < 0.5


@pytest.mark.parametrize("name", ["full", "lora"])
@pytest.mark.parametrize("kind", ["all", "trained", "trained, in shards"])
def test_weights_that_deepspeed_consolidated(name, kind, runs, command, tmp_path, monkeypatch):
    """As zero_to_fp32.py writes them: the names of the engine's module, and with an option what trained alone."""
    shutil.copytree(runs(name) / "run", tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-5"
    arguments = json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]["model"]
    base = prepare_for_training(export.restore_base(checkpoint), **ModelArguments(**arguments).adaptation)
    engine_change.load_weights(base, checkpoint)
    trained = {n for n, parameter in base.named_parameters() if parameter.requires_grad}
    state = {n: value.clone() for n, value in base.state_dict().items() if kind == "all" or n in trained}
    for file in checkpoint.glob("*model.safetensors"):
        file.unlink()
    if kind == "all":
        torch.save(state, source := checkpoint / "pytorch_model.bin")
    else:
        (source := checkpoint / "consolidated").mkdir()
        names = sorted(state)
        parts = [names] if kind == "trained" else [names[:3], names[3:]]
        files = ["pytorch_model.bin"] if len(parts) == 1 else ["pytorch_model-1.bin", "pytorch_model-2.bin"]
        for file, part in zip(files, parts):
            torch.save({n: state[n] for n in part}, source / file)
        if len(parts) > 1:
            index = {"weight_map": {n: file for file, part in zip(files, parts) for n in part}}
            (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    command(source)
    model, _ = export.restore_model(tmp_path / "out")
    assert export_worker.largest_difference(model, runs(name) / "answers.safetensors") <= 1e-4
    assert "| steps | 5 |" in (tmp_path / "out" / "README.md").read_text()
    if kind == "trained":  # a weight that trained is not there: it must not stay the base's
        torch.save(dict(list(state.items())[:-1]), source / "pytorch_model.bin")
        assert "missing" in command(source, output=tmp_path / "less", fails=True)


def test_consolidated_weights_elsewhere_are_refused(tmp_path, command):
    torch.save({}, tmp_path / "pytorch_model.bin")
    for source in (tmp_path, tmp_path / "pytorch_model.bin"):
        assert "in the checkpoint that they were made from" in command(source, fails=True)


# ---- interrupted and damaged ----------------------------------------------------------------------------------------


def truncate(file: Path) -> Path:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file


def test_incomplete_checkpoints_are_passed_over_and_named(runs, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(runs("full") / "run", run)
    assert export.find_newest_model(run) == run  # the final model
    damaged = truncate(run / "model.safetensors")
    with caplog.at_level(logging.WARNING, logger="lisa_hf"):
        assert export.find_newest_model(run) == run / "checkpoint-5"
        assert str(damaged) in caplog.text and "truncated" in caplog.text
        truncate(run / "checkpoint-5" / "model.safetensors")
        assert export.find_newest_model(run) == run / "checkpoint-4"
        assert f"{run / 'checkpoint-5'} is skipped: expected " in caplog.text
        (run / "checkpoint-4" / "manifest.json").unlink()  # killed while it saved
        assert export.find_newest_model(run) == run / "checkpoint-2"
        assert "checkpoint-4 is skipped: it has no manifest.json" in caplog.text
    assert export.find_newest_model(run / "checkpoint-4") == run / "checkpoint-4"  # named, and its weights are whole
    (run / "checkpoint-5" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="checkpoint-5: expected a checkpoint file"):
        export.find_newest_model(run / "checkpoint-5")  # named, so nothing else will do
    shutil.rmtree(run / "checkpoint-2")
    with pytest.raises(ValueError, match="a complete checkpoint-N in it, got neither"):
        export.find_newest_model(run)


def test_nothing_is_left_of_an_export_that_fails(runs, command, tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_records", no_space)
    assert "error: [Errno 28] No space left" in command(runs("full") / "run", fails=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    assert "out, which exists and is not empty" in command(runs("full") / "run", fails=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_what_the_card_needs_is_looked_for_before_weights_are_written(runs, command, tmp_path, monkeypatch):
    shutil.copytree(runs("full") / "run" / "checkpoint-5", tmp_path / "alone" / "checkpoint-5")
    (tmp_path / "alone" / "checkpoint-5" / "run.json").unlink(missing_ok=True)
    monkeypatch.setattr(export, "export_model", lambda *_: pytest.fail("weights were written"))
    assert "expected the run.json of its run" in command(tmp_path / "alone" / "checkpoint-5", fails=True)
    assert "expected the evaluation.json" in command(runs("full") / "run", "--evaluation", tmp_path, fails=True)


def test_others_can_read_weights(runs, command, tmp_path):
    command(runs("lora") / "run")
    command(runs("lora") / "run" / "checkpoint-5", "--adapter_only", output=tmp_path / "adapter")
    weights = [path for top in (tmp_path, runs("lora"), runs("full")) for path in top.rglob("*model*.safetensors")]
    assert {path.name for path in weights} == {"model.safetensors", "adapter_model.safetensors"}
    umask = os.umask(0o022)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in weights} == {0o666 & ~umask}


def test_adapter_without_a_record_of_its_base(runs, tmp_path):
    shutil.copytree(runs("lora") / "run" / "checkpoint-5", tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5" / "run.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="expected the run.json of its run"):
        export.restore_model(tmp_path / "checkpoint-5")


# ---- model card and Hub ---------------------------------------------------------------------------------------------


def test_model_card_tells_the_run(runs, command, tmp_path):
    command(runs("from_nothing") / "run")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    metrics = json.loads((runs("from_nothing") / "run" / "eval_results.json").read_text())
    found = {(result.metric_name, result.dataset_split): result.metric_value for result in card.data.eval_results}
    assert found["gIoU (lisa)", "validation"] == pytest.approx(100 * metrics["eval_giou"], abs=1e-2)
    assert found["cIoU (generated)", "validation"] == pytest.approx(100 * metrics["eval_generated_ciou"], abs=1e-2)
    settings = ("learning_rate | 0.001", "trainable | mask_decoder", "steps | 5", "images per step | 1")
    for line in ("shapes | train | 100.0% | 12", *settings):
        assert f"| {line} |" in card.text
    assert f"| shapes | validation | lisa | {100 * metrics['eval_giou']:.2f} |" in card.text
    assert "Trained from random weights" in card.text and "Trained on the split" not in card.text
    assert PIL.Image.open(tmp_path / "out" / "predictions.png").width > 1000 and "](predictions.png)" in card.text
    code = card.text.split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
    assert 'model="out"' in code


def test_model_card_tells_which_step_the_weights_and_the_sheet_come_from(runs, command, tmp_path):
    shutil.copytree(runs("from_nothing") / "run", tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["arguments"]["training"]["load_best_model_at_end"] = True
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    (tmp_path / "run" / "trainer_state.json").write_text(json.dumps(state | {"best_global_step": 2}))
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "run" / "predictions" / "step-4.png")
    command(tmp_path / "run")
    assert "| weights | step 2, the best by giou |" in (tmp_path / "out" / "README.md").read_text()
    command(tmp_path / "run" / "checkpoint-4", output=tmp_path / "four")
    card = (tmp_path / "four" / "README.md").read_text()
    assert "| weights |" not in card and "| steps | 4 |" in card and "](predictions.png)" in card
    assert PIL.Image.open(tmp_path / "four" / "predictions.png").size == (4, 4)


def test_model_card_of_a_run_on_a_test_split_and_of_bases(runs, tmp_path):
    record = json.loads((runs("lora") / "run" / "run.json").read_text())
    source = {"source": "reason_seg", "split": "val", "weight": 0.25, "num_rows": None, "fingerprint": None}
    record["directory"] = str(tmp_path)
    earlier = record | {"data": {"train": [source], "eval": []}}
    (tmp_path / "sam").mkdir()
    ModelCard("---\nlicense: apache-2.0\n---\n").save(tmp_path / "sam" / "README.md")
    record["arguments"]["model"] |= {"model": None, "vlm": "somebody/vlm", "mask_model": "sam"}
    record["earlier_starts"] = [earlier]
    shutil.copytree(runs("lora") / "run" / "checkpoint-5", tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    export.save_records(tmp_path / "run", tmp_path, "me/mine", is_adapter=False)
    card = ModelCard.load(tmp_path / "README.md")
    assert "**Trained on the split val of reason_seg**" in card.text
    assert "| reason_seg | val | 25.0% | streamed |" in card.text
    assert "- sam: apache-2.0" in card.text
    assert "- [somebody/vlm](https://huggingface.co/somebody/vlm): license not recorded here" in card.text
    assert card.data.base_model == ["somebody/vlm"] and card.data.license == "other"
    assert "Not evaluated." in card.text  # checkpoint-5 has no metrics


def test_model_card_shows_an_evaluation_on_benchmarks(runs, command, tmp_path):
    evaluation = tmp_path / "evaluation"
    metrics = {f"{name}{end}": 0.5 for name in ("giou", "ciou") for end in ("", "_low", "_high")}
    result = {"builder": "reason_seg", "split": "val", "protocols": {"lisa": metrics | {"num_questions": 7}}}
    assert "evaluation: expected the evaluation.json" in command(
        runs("full") / "run", "--evaluation", evaluation, fails=True
    )
    hub = result | {"builder": "hub", "path": "somebody/benchmark", "split": "test", "num_items": 7}
    benchmarks = {"reason_seg_val": result, "mine": result, "somebody--benchmark": hub}
    overlap = {"reason_seg_val": {"shapes": 0}, "somebody--benchmark": {"shapes": 5}, "mine": None}
    content = {"model": "outputs/mine", "environments": [{"date": "2026-01-31"}], "train_overlap": overlap}
    write_evaluation(evaluation, content | {"benchmarks": benchmarks})
    PIL.Image.new("RGB", (4, 4)).save(evaluation / "predictions_reason_seg_val.png")
    command(runs("full") / "run", "--evaluation", evaluation)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| reason_seg_val | lisa | 7 | 50.0 (50.0 to 50.0) |" in card and "| mine (val) | lisa |" in card
    assert "](predictions_reason_seg_val.png)" in card
    assert (tmp_path / "out" / "predictions_reason_seg_val.png").exists()
    # Images that the model has seen, and the metrics where the Hub looks for them.
    assert "The model was trained on images of somebody--benchmark, which has 7: shapes 5." in card
    assert "trained on images of reason_seg_val" not in card
    listed = ModelCard.load(tmp_path / "out" / "README.md").data.eval_results
    found = {(entry.dataset_type, entry.dataset_split, entry.metric_name): entry.metric_value for entry in listed}
    assert found["somebody/benchmark", "test", "gIoU (lisa)"] == found["reason_seg", "val", "cIoU (lisa)"] == 50
    assert "- `lisa`: LISA, arXiv 2308.00692, `validate` in train_ds.py" in card
    (path,) = (tmp_path / "out" / ".eval_results").iterdir()
    (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("somebody/benchmark", "default", 50.0)
    assert entry.date == "2026-01-31" and entry.notes == "gIoU by the protocol lisa; cIoU 50.00"


class RecordingApi:
    """Stands in for HfApi and keeps what would be sent."""

    calls = []

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        return SimpleNamespace(repo_id=f"me/{repo_id}", __str__=lambda: repo_id)

    def upload_folder(self, folder_path, **options):
        files = {path.name: path.stat().st_size for path in Path(folder_path).iterdir()}
        self.calls.append(("upload_folder", files, options))


@pytest.mark.parametrize("adapter_only", [False, True])
@pytest.mark.parametrize("public", [False, True])
def test_push_sends_the_directory_to_a_private_repository(
    adapter_only, public, runs, command, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(RecordingApi, "calls", [])
    monkeypatch.setattr(export, "HfApi", RecordingApi)
    options = ["--adapter-only"] * adapter_only + ["--public"] * public
    printed = command(runs("lora") / "run" / "checkpoint-5", "--push-to-hub", "mine", *options)
    (_, name, created), (_, files, uploaded) = RecordingApi.calls
    assert (name, created["repo_type"], created["private"]) == ("mine", "model", not public)
    assert uploaded == {"repo_id": "me/mine", "repo_type": "model"}
    assert set(files) == set(os.listdir(tmp_path / "out")) and all(files.values())
    assert {"README.md", "run.json", "tokenizer.json"} <= set(files)
    assert ("adapter_model.safetensors" in files) == adapter_only
    assert ("model.safetensors" in files) == ("modeling_lisa.py" in files) == (not adapter_only)
    assert "hf upload mine" in printed and ("--private" in printed) == (not public)
    card = (tmp_path / "out" / "README.md").read_text()
    assert ('snapshot_download("mine")' if adapter_only else 'model="mine"') in card
    # Nothing tells of this machine, except the base without which the adapter is nothing.
    texts = {file.name: file.read_text() for file in (tmp_path / "out").iterdir() if file.suffix in (".json", ".md")}
    places = [str(path) for path in (converted_directory().parent, runs("lora"), Path.cwd())]
    telling = {name for name, text in texts.items() if any(place in text for place in places)}
    assert telling == ({"run.json", "adapter_config.json"} if adapter_only else set())
    assert ("where alone it can be loaded" in caplog.text) == adapter_only


def test_trainer_pushes_its_card_to_a_private_repository(tiny, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(RecordingApi, "calls", [])
    monkeypatch.setattr(transformers.trainer, "hf_api", RecordingApi)
    model, processor = tiny
    trainer = make_trainer(prepare_for_training(model, ["seg_projector"]), processor, tmp_path / "run")
    shutil.copy(runs("lora") / "run" / "run.json", tmp_path / "run")
    trainer.push_to_hub()
    (_, name, created), (_, files, _) = RecordingApi.calls
    assert name == "run" and created["private"]
    assert {"README.md", "run.json", "adapter_model.safetensors"} <= set(files)
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert "| shapes | train | 100.0% | 12 |" in card.text and card.data.to_dict()["library_name"] == "peft"


# ---- sharded weights ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("lora_r", [0, 8])
def test_round_trip_of_fsdp_on_two_processes(lora_r, command, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    recipe = write_recipe(tmp_path / "recipe.yaml", **RUNS["lora"] | {"lora_r": lora_r, "save_steps": 5})
    run, answers = tmp_path / "run", tmp_path / "answers.safetensors"
    arguments = (answers, "--config", recipe, "--output_dir", run, "--use_cpu", "false")
    launch(export_worker.__file__, *arguments, launcher="fsdp2")
    command(run, output=tmp_path / "final")  # what the run itself saved at its end
    command(run / "checkpoint-5", output=tmp_path / "checkpoint")
    check_in_a_fresh_process(tmp_path, dict.fromkeys((tmp_path / "final", tmp_path / "checkpoint"), answers))


@pytest.mark.slow
@pytest.mark.parametrize("lora_r", [0, 8])
@pytest.mark.parametrize(("stage", "gather"), [(2, True), (3, True), (3, False)])
def test_round_trip_of_zero_on_two_processes(stage, gather, lora_r, command, tmp_path, monkeypatch):
    zero = {"stage": stage, "allgather_bucket_size": 5e7, "reduce_bucket_size": 5e7}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = gather
    auto = dict.fromkeys(
        ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
    )
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero, **auto}))
    recipe = write_recipe(tmp_path / "recipe.yaml", **RUNS["lora"] | {"lora_r": lora_r, "save_steps": 5})
    run, answers = tmp_path / "run", tmp_path / "answers.safetensors"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    arguments = (answers, "--config", recipe, "--output_dir", run, "--deepspeed", tmp_path / "zero.json")
    launch(export_worker.__file__, *arguments)
    command(run, output=tmp_path / "final")  # what the run itself saved at its end
    command(run / "checkpoint-5", output=tmp_path / "checkpoint")
    # The pieces alone, as if the run had been interrupted before the whole weights were written.
    for name in ("model.safetensors", export.ADAPTER_WEIGHTS):
        (run / "checkpoint-5" / name).unlink(missing_ok=True)
    command(run / "checkpoint-5", output=tmp_path / "pieces")
    exports = dict.fromkeys((tmp_path / "final", tmp_path / "checkpoint", tmp_path / "pieces"), answers)
    check_in_a_fresh_process(tmp_path, exports)

    script = [sys.executable, "zero_to_fp32.py", ".", tmp_path / "script"]
    subprocess.run(script, cwd=run / "checkpoint-5", check=True, capture_output=True, timeout=300)
    weights = torch.load(tmp_path / "script" / "pytorch_model.bin", weights_only=True)
    expected = open_zero_checkpoint(run / "checkpoint-5")
    assert weights.keys() == expected.keys() and all(torch.equal(weights[n], expected[n].load()) for n in weights)
    exports = {}
    for name, option in (("whole", []), ("part", ["--exclude_frozen_parameters"])):
        script = [sys.executable, "zero_to_fp32.py", ".", name, *option]
        subprocess.run(script, cwd=run / "checkpoint-5", check=True, capture_output=True, timeout=300)
        command(run / "checkpoint-5" / name, output=tmp_path / name)
        exports[tmp_path / name] = answers
    check_in_a_fresh_process(tmp_path, exports)
