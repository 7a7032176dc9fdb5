"""The recipes as a user runs them: subprocesses, files on disk, one clear line per mistake."""

import dataclasses
import json
import logging
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from fixtures.golden_model import converted_directory
from fixtures.paths import REAL_SAMPLES, ROOT, STORIES
from fixtures.recipes import SHAPES, run, run_here, write_config
from transformers import AutoModel, AutoProcessor

import lisa_hf  # noqa: F401  registers the classes
from data_scripts import SOURCES
from lisa_hf.chat_templates import load_chat_template
from lisa_hf.evaluation.protocols import PROTOCOL_VERSION, PROTOCOLS
from lisa_hf.training.arguments import DataArguments, LisaTrainingArguments, ModelArguments, parse_arguments


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A model that the training recipe made, LoRA merged."""
    directory = tmp_path_factory.mktemp("trained")
    result = run("train.py", "--config", write_config(directory / "tiny.yaml"), "--output_dir", "run", cwd=directory)
    assert result.stdout.splitlines()[-1].startswith("Done.") and str(directory / "run") in result.stdout
    return directory / "run"


def test_training_leaves_a_model_figures_and_a_sheet(trained):
    model, processor = AutoModel.from_pretrained(trained), AutoProcessor.from_pretrained(trained)
    assert type(model).__name__ == "LisaForConditionalGeneration"
    assert processor.seg_token_id == model.config.seg_token_id
    assert not any("lora" in name for name in model.state_dict())
    figures = json.loads((trained / "eval_results.json").read_text())
    assert {"eval_giou", "eval_generated_giou", "eval_generated_false_seg_rate"} <= figures.keys()
    assert json.loads((trained / "run.json").read_text())["data"]["train"][0]["num_rows"] == SHAPES["num_train_scenes"]
    sheet = PIL.Image.open(trained / "predictions.png")
    assert sheet.width > 1000 and np.asarray(sheet).std() > 10


def test_evaluate_gives_the_figures_of_the_training(trained, tmp_path):
    run(
        "eval.py",
        trained,
        "--eval_sources",
        json.dumps({"shapes": SHAPES}),
        "--output_dir",
        tmp_path / "figures",
        "--generation_max_new_tokens",
        "8",
        "--use_cpu",
        "true",
        cwd=tmp_path,
    )
    written = json.loads((tmp_path / "figures" / "evaluation.json").read_text())
    assert written["model"] == str(trained)
    assert set(written["benchmarks"]) <= {"shapes", "shapes_short", "shapes_long"}
    result = written["benchmarks"]["shapes"]
    assert (result["builder"], result["split"], result["num_items"]) == ("shapes", "validation", 3)
    trained_figures = json.loads((trained / "eval_results.json").read_text())
    for protocol, prefix in (("lisa", ""), ("generated", "generated_")):
        for name in ("giou", "ciou", "giou_low", "ciou_high", "p@0.5"):
            figures = result["protocols"][protocol]
            assert figures[name] == pytest.approx(trained_figures[f"eval_{prefix}{name}"], rel=1e-4), name
    assert figures["seg_rate"] == trained_figures["eval_generated_seg_rate"]
    assert (tmp_path / "figures" / "predictions_shapes.png").exists()


def test_evaluations_say_which_images_the_model_has_seen(trained, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    sources = {"new": {"builder": "shapes", **SHAPES}, "old": {"builder": "shapes", "split": "train", **SHAPES}}
    arguments = ("--eval_sources", json.dumps(sources), "--use_cpu", "true", "--eval_generate", "false")
    run_here("eval.py", trained, *arguments, "--max_eval_items", "2", "--output_dir", "out")
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["train_overlap"] == {"new": {"shapes": 0}, "old": {"shapes": 2}}
    assert "trained on images of old, which has 2: shapes 2." in caplog.text
    assert "None of the 2 images of new is in the training data (shapes)." in caplog.text
    (environment,) = written["environments"]
    assert environment["device"] == "cpu" and environment["protocol_version"] == PROTOCOL_VERSION
    assert {"date", "git_commit", "seed", "num_processes"} <= environment.keys() and "torch" in environment["versions"]


def test_evaluation_measures_what_the_training_cost_the_texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = converted_directory()  # compared with itself
    arguments = ("--eval_sources", json.dumps({"shapes": SHAPES}), "--use_cpu", "true", "--eval_generate", "false")
    run_here("eval.py", model, *arguments, "--max_eval_items", "1", "--base_model", model, "--output_dir", "out")
    text = json.loads((tmp_path / "out" / "evaluation.json").read_text())["text"]
    assert text["perplexity"] == text["perplexity_of_base"] >= 1 and 0 < text["num_answers"] <= 6


def test_benchmarks_by_protocol(trained, tmp_path):
    tree = ROOT / "tests" / "golden" / "tree" / "dataset"
    benchmarks = ("reason_seg_val", "refcoco_val", "grefcoco_val")
    arguments = (
        "--data_dir",
        tree,
        "--benchmarks",
        *benchmarks,
        "--generation_max_new_tokens",
        4,
        "--use_cpu",
        "true",
    )
    printed = run("eval.py", trained, *arguments, cwd=tmp_path).stdout
    output_dir = tmp_path / "outputs" / "evaluate" / trained.name
    assert (output_dir / "evaluation.md").read_text() in printed and str(output_dir) in printed
    results = json.loads((output_dir / "evaluation.json").read_text())["benchmarks"]
    assert list(results) == ["reason_seg_val", "reason_seg_val_short", "reason_seg_val_long", *benchmarks[1:]]
    # One photo is asked for by a phrase with a second text, which LISA never asks, and one by a sentence.
    questions = {
        name: {protocol: figures["num_questions"] for protocol, figures in result["protocols"].items()}
        for name, result in results.items()
    }
    assert questions["reason_seg_val"] == {"lisa": 2, "generated": 2, "all_texts": 3, "generated_all_texts": 3}
    assert questions["reason_seg_val_short"] == {"lisa": 1, "generated": 1, "all_texts": 2, "generated_all_texts": 2}
    assert questions["reason_seg_val_long"] == {"lisa": 1, "generated": 1}
    # As many as LISA asks, one of them about nobody.
    golden = json.loads((ROOT / "tests" / "golden" / "datasets.json").read_text())["val"]["refcoco|unc|val"]
    asked = sum(len(item["conversations"]) for item in golden["items"].values())
    assert questions["refcoco_val"] == {"lisa": asked, "generated": asked}
    assert results["refcoco_val"]["builder"] == "refcoco" and results["refcoco_val"]["num_items"] == golden["len"]
    assert {"n_acc", "t_acc"} <= results["refcoco_val"]["protocols"]["lisa"].keys()
    assert "n_acc" not in results["grefcoco_val"]["protocols"]["lisa"]
    for name in benchmarks:
        assert PIL.Image.open(output_dir / f"predictions_{name}.png").width > 1000


def evaluation(directory: Path) -> tuple[dict, str]:
    """Results and predictions that eval.py wrote."""
    results = json.loads((directory / "evaluation.json").read_text())["benchmarks"]
    predictions = directory / "predictions_mine.jsonl"
    return results, predictions.read_text() if predictions.exists() else ""


def test_a_file_of_predictions_scores_as_its_model_and_an_evaluation_goes_on(
    trained, tmp_path, caplog, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    data = ["--eval_sources", json.dumps({"mine": {"builder": "shapes", **SHAPES}}), "--use_cpu", "true"]
    model = [str(trained), "--generation_max_new_tokens", "8", *data]
    run_here("eval.py", *model, "--protocols", *PROTOCOLS, "--output_dir", "whole")
    results, predictions = evaluation(tmp_path / "whole")
    assert results["mine"]["protocols"].keys() == PROTOCOLS.keys()
    # 1. Scored alone, to the last bit.
    run_here("eval.py", "--predictions", "whole", *data, "--protocols", *PROTOCOLS, "--output_dir", "scored")
    assert evaluation(tmp_path / "scored") == (results, "")
    scores = [(tmp_path / name / "scores_mine.jsonl").read_text() for name in ("whole", "scored")]
    assert scores[0] == scores[1] and len(scores[0].splitlines()) > 20
    # 2. Killed while it wrote its second image.
    lines = predictions.splitlines(keepends=True)
    images = [json.loads(line)["image_id"] for line in lines]
    second = images.index(next(image for image in images if image != images[0]))
    (tmp_path / "whole" / "predictions_mine.jsonl").unlink()
    parts = tmp_path / "whole" / "predictions_mine.incomplete"
    parts.mkdir()
    (parts / "0.jsonl").write_text("".join([*lines[:second], lines[second][:40]]))
    written = json.loads((tmp_path / "whole" / "evaluation.json").read_text())
    (tmp_path / "whole" / "evaluation.json").write_text(json.dumps(written | {"benchmarks": {}}))
    run_here("eval.py", *model, "--protocols", *PROTOCOLS, "--output_dir", "whole")
    assert "1 of 3 images are answered already" in caplog.text
    assert evaluation(tmp_path / "whole") == (results, predictions) and not parts.exists()
    # 3. With other settings, or when nothing is left to do.
    assert "got whole with a complete one" in fail(capsys, *model, "--protocols", *PROTOCOLS, "--output_dir", "whole")
    assert "(protocols, eval_generate)" in fail(capsys, *model, "--eval_generate", "false", "--output_dir", "whole")
    changed = ("--max_eval_items", "2", "--bf16", "true", "--attn_implementation", "eager", "--dtype", "bfloat16")
    found = fail(capsys, *model, *changed, "--output_dir", "whole")
    assert "(protocols, max_eval_items, dtype, attn_implementation, precision)" in found
    os.utime(trained / "model.safetensors")  # trained again
    assert "(weights)" in fail(capsys, *model, "--protocols", *PROTOCOLS, "--output_dir", "whole")


def fail(capsys, *arguments, script: str = "eval.py") -> str:
    """Return the line with which a recipe ends."""
    with pytest.raises(SystemExit, match="2"):
        run_here(script, *arguments)
    return capsys.readouterr().err.splitlines()[-1]


def test_compare_tells_which_model_is_better(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = ["--eval_sources", json.dumps({"mine": {"builder": "shapes", **SHAPES}}), "--use_cpu", "true"]
    run_here("eval.py", "--export_questions", "questions.jsonl", *data)
    questions = [json.loads(line) for line in Path("questions.jsonl").read_text().splitlines()]
    height, width = np.asarray(PIL.Image.open(questions[0]["image"])).shape[:2]
    everything = {"size": [height, width], "counts": [0, height * width]}
    for name, masks in (("nothing", []), ("everything", [everything])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(line | {"masks": masks}) + "\n" for line in questions))
        run_here("eval.py", "--predictions", f"{name}.jsonl", *data)
    run_here("compare.py", "outputs/evaluate/scored_nothing", "outputs/evaluate/scored_everything", "--output", "r.md")
    report = Path("r.md").read_text()
    assert report in capsys.readouterr().out
    assert "| 3 / 0 / 0 | p = 0.25 |" in report and "evaluated differently" not in report
    # Answers that are refused leave nothing behind.
    Path("few.jsonl").write_text(json.dumps(questions[0] | {"masks": []}) + "\n")
    assert "expected a prediction for each of" in fail(capsys, "--predictions", "few.jsonl", *data)
    assert not Path("outputs/evaluate/scored_few").exists()
    run_here("eval.py", "--predictions", "nothing.jsonl", *data, "--max_eval_items", "2", "--output_dir", "two")
    nothing = "outputs/evaluate/scored_nothing"
    assert "expected two evaluations of the same questions" in fail(capsys, nothing, "two", script="compare.py")
    assert "expected the evaluation.json" in fail(capsys, nothing, "three", script="compare.py")


def test_unknown_benchmark_names_the_nearest(tmp_path):
    result = run("eval.py", "model", "--benchmarks", "reasonseg_val", cwd=tmp_path, check=False)
    assert_one_line(result, "reasonseg_val", "Did you mean `reason_seg_val`?", "refcoco_testA")


def test_arguments_that_would_change_nothing_are_refused(capsys):
    for argument in ("--load_in_4bit", "--lora-r=4"):
        name = argument.replace("-", "_").strip("_").partition("=")[0]
        assert f"--{name}: expected of a model's arguments only --dtype and" in fail(capsys, "model", argument)


def test_an_earlier_evaluation_is_kept(tmp_path):
    (tmp_path / "evaluation.json").write_text("mine")
    arguments = ("eval.py", "model", "--eval_sources", "{shapes: {}}", "--output_dir", tmp_path)
    assert_one_line(run(*arguments, cwd=tmp_path, check=False), "without an earlier evaluation", "--overwrite")
    assert (tmp_path / "evaluation.json").read_text() == "mine"
    result = run(*arguments, "--overwrite", cwd=tmp_path, check=False)  # fails at the model, which does not exist
    assert "earlier evaluation" not in result.stderr and result.returncode == 2
    assert (tmp_path / "evaluation.json").read_text() == "mine"  # it is not replaced by nothing


def test_predict_prints_the_answer_and_writes_masks(trained, tmp_path):
    PIL.Image.fromarray(np.full((40, 60, 3), 200, dtype=np.uint8)).save(tmp_path / "scene.png")
    result = run(
        "predict.py",
        trained,
        "--image",
        "scene.png",
        "--question",
        "What is red?",
        "--max_new_tokens",
        8,
        cwd=tmp_path,
    )
    output_dir = tmp_path / "outputs" / "predict"
    assert str(output_dir) in result.stdout
    assert PIL.Image.open(output_dir / "overlay.png").size == (60, 40)


@pytest.mark.skipif(not (REAL_SAMPLES.is_dir() and STORIES.is_dir()), reason="needs the real samples and stories260K")
def test_real_samples_train_and_evaluate(tmp_path):
    run(
        "train.py",
        "--config",
        ROOT / "recipes" / "configs" / "real_samples.yaml",
        "--data_dir",
        REAL_SAMPLES,
        "--language_model",
        STORIES,
        "--tokenizer",
        STORIES / "tokenizer.model",
        "--output_dir",
        tmp_path / "run",
        "--use_cpu",
        "true",
        cwd=tmp_path,
    )
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert state["global_step"] == 20 and np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    figures = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert figures["eval_num_masks"] == 4  # one question about each ReasonSeg val photo


def make_reason_seg(directory: Path) -> Path:
    """Four photos in ReasonSeg's layout, the first of which is no image."""
    images = directory / "reason_seg" / "ReasonSeg" / "train"
    images.mkdir(parents=True)
    for index in range(4):
        noise = np.random.default_rng(index).integers(0, 255, (120, 160, 3), dtype=np.uint8)
        PIL.Image.fromarray(noise).save(images / f"{index}.jpg")
        shape = {"label": "target", "points": [[5, 5], [30, 5], [30, 30]]}
        (images / f"{index}.json").write_text(
            json.dumps({"shapes": [shape], "text": ["the thing"], "is_sentence": False})
        )
    data = (images / "0.jpg").read_bytes()
    (images / "0.jpg").write_bytes(data[: len(data) // 2])  # header intact, pixels cut off
    return directory


def assert_one_line(result: subprocess.CompletedProcess, *parts: str):
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    (line,) = (line for line in result.stderr.splitlines() if ": error: " in line)
    for part in parts:
        assert part in line, line


def test_a_short_run_caches_the_images_that_it_draws(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", "datasets_cache")
    config = write_config(tmp_path / "tiny.yaml", feature_cache="cache", eval_sources={})
    run_here("train.py", "--config", config, "--output_dir", "run", "--max_steps", 1)
    assert 0 < len(list(Path("cache").glob("*/*/*"))) <= 2  # one step of two images, of 12
    run_here("train.py", "--config", config, "--output_dir", "again", "--max_steps", 1)
    assert "an earlier run has read these images" in caplog.text


def test_unknown_key_names_the_nearest(tmp_path):
    config = write_config(tmp_path / "typo.yaml", learning_rte=1e-3)
    result = run("train.py", "--config", config, cwd=tmp_path, check=False)
    assert_one_line(result, "typo.yaml", "learning_rte", "learning_rate")


def test_missing_data_directory_names_what_was_looked_for(tmp_path):
    config = write_config(tmp_path / "c.yaml", sources={"reason_seg": 1}, eval_sources=None, data_dir="nowhere")
    result = run("train.py", "--config", config, cwd=tmp_path, check=False)
    assert_one_line(result, "nowhere", "reason_seg/ReasonSeg")


def test_unreadable_image_stops_or_is_skipped_and_counted(tmp_path):
    data_dir = make_reason_seg(tmp_path / "data")
    config = write_config(
        tmp_path / "c.yaml",
        sources={"reason_seg": 1},
        eval_sources=None,
        data_dir=str(data_dir),
        eval_generate=False,
        max_steps=8,
        dataloader_num_workers=1,
    )
    arguments = ("train.py", "--config", config, "--output_dir", tmp_path / "run")
    stopped = run(*arguments, "--on_bad_row", "raise", cwd=tmp_path, check=False)
    assert_one_line(stopped, "0.jpg", "expected an image that can be read")
    run(*arguments, "--on_bad_row", "skip", "--resume_from_checkpoint", "auto", cwd=tmp_path)
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["log_history"][-2]["num_skipped_rows"] >= 1


def test_text_too_long_never_loses_a_seg(tmp_path):
    config = write_config(tmp_path / "c.yaml", max_length=12, on_bad_row="raise", eval_sources=None)
    result = run("train.py", "--config", config, cwd=tmp_path, check=False)
    assert_one_line(result, "max_length=12", "[SEG]")


def test_checkpoint_of_another_architecture(trained, tmp_path):
    model = AutoModel.from_pretrained(trained)
    model.vlm.save_pretrained(tmp_path / "llava")
    result = run(
        "predict.py", tmp_path / "llava", "--image", ROOT / "README.md", "--question", "?", cwd=tmp_path, check=False
    )
    assert_one_line(result, "--image: expected an image that can be read", "README.md")
    result = run("eval.py", tmp_path / "llava", "--eval_sources", "{shapes: {}}", cwd=tmp_path, check=False)
    assert_one_line(result, "llava", "expected a 'lisa' checkpoint", "mask_model")


# ---- the files ---------------------------------------------------------------------------------------------------

RECIPES = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The command line wins over what this machine may lack.
    arguments = ["--config", str(path), "--bf16", "false", "--use_cpu", "true"]
    model_args, data_args, training_args = parse_arguments(arguments)
    load_chat_template(model_args.chat_template)
    for name, options in (*data_args.sources.items(), *data_args.eval_sources.items()):
        fields = dataclasses.fields(SOURCES[options.get("builder") or name].BUILDER_CONFIG_CLASS)
        assert options.keys() <= {"builder", "split", "weight", *(field.name for field in fields)}
    assert training_args.output_dir == f"outputs/{path.stem}"

    header = path.read_text().split("\n\n")[0].replace("\n#", "")
    if model_args.vlm_config is None:
        assert (
            "accelerate launch" in header
            and f"--config recipes/configs/{path.name}" in header
            and "Hardware: " in header
        )
        num_gpus, product = re.search(r"batch: (\d+) GPUs? x .*? = (\d+) images", header).groups()
        batch = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
        assert int(num_gpus) * batch == int(product)


def test_the_table_of_recipes_and_of_the_original_s_flags():
    text = (ROOT / "docs" / "backbones.md").read_text()
    assert sorted(re.findall(r"^\| \[`.*?`\]\(../recipes/configs/(\w+\.yaml)\)", text, re.MULTILINE)) == [
        path.name for path in RECIPES
    ]
    text = (ROOT / "docs" / "from_lisa.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(("| `--", "| in the code"))]
    assert len(rows) > 25
    keys = {key for _, here in rows for key in re.findall(r"`(\w+)(?:: [^`]*)?`", here)}
    arguments = (ModelArguments, DataArguments, LisaTrainingArguments)
    assert keys - {field.name for cls in arguments for field in dataclasses.fields(cls)} == {"mask_decoder"}


def test_dry_run_tells_of_data_and_one_step_and_leaves_nothing(tmp_path):
    config = write_config(tmp_path / "c.yaml", num_questions=2, max_steps=50)
    points = ("--mask_loss_points", 50)
    result = run("train.py", "--config", config, "--output_dir", tmp_path / "run", "--dry_run", *points, cwd=tmp_path)
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("shapes "))
    _, items, rows, masks, low, _, high = line.split()
    assert (items, rows) == ("12", "12") and 0 < int(masks) <= 24 and int(low) <= int(high)
    assert "<image> x 4 " in result.stdout and result.stdout.count("[[") == 2  # two questions, packed
    assert "Self-check: the VLM computes the same within LISA as alone" in result.stderr
    assert "Dry run: one step (loss " in result.stdout and "MiB) succeeded." in result.stdout
    assert not list((tmp_path / "run").rglob("*.safetensors"))
