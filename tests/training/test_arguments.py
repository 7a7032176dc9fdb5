"""Arguments: the YAML file, the command line that overrides it, and one clear line per mistake."""

import dataclasses
import io
import re
import subprocess
import sys

import pytest
from accelerate import ParallelismConfig
from fixtures.paths import ROOT
from fixtures.recipes import run_here
from transformers.trainer_utils import SaveStrategy

from lisa_hf.errors import report_user_errors
from lisa_hf.training.arguments import DataArguments, LisaTrainingArguments, ModelArguments, parse_arguments
from lisa_hf.training.parser import RENAMED


CONFIG = """
vlm_config: {model_type: llava, text_config: {rms_norm_eps: 1e-5, hidden_size: 64}}
mask_config:
  model_type: sam
trainable: [seg_projector, language_model]
ce_loss_weight: 2
sources:
  shapes: 1.5
  reason_seg: {weight: 9, split: test}
eval_sources: {reason_seg: {split: test}, shapes: {}}
learning_rate: 5e-4
max_steps: 20
save_strategy: no
lr_scheduler_kwargs: {min_lr: 1e-6}
metric_for_best_model: null
"""


@pytest.fixture
def parse(tmp_path):
    def parse(config, *argv):
        path = tmp_path / "recipe.yaml"
        path.write_text(config)
        return parse_arguments(["--output_dir", str(tmp_path), "--config", str(path), *argv])

    return parse


@pytest.fixture
def fails(parse, capsys):
    def fails(config, *argv):
        """The line that a mistake gives on stderr."""
        with pytest.raises(SystemExit) as error:
            parse(config, *argv)
        assert error.value.code == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "error: " in message
        return message

    return fails


def test_file_gives_every_kind_of_value(parse):
    model_args, data_args, training_args = parse(CONFIG)
    assert model_args.vlm_config == {"model_type": "llava", "text_config": {"rms_norm_eps": 1e-5, "hidden_size": 64}}
    assert model_args.trainable == ["seg_projector", "language_model"] and model_args.ce_loss_weight == 2.0
    assert data_args.sources == {
        "shapes": {"weight": 1.5, "split": "train"},
        "reason_seg": {"weight": 9, "split": "test"},
    }
    assert data_args.eval_sources == {"reason_seg": {"split": "test"}, "shapes": {"split": "validation"}}
    assert training_args.learning_rate == 5e-4 and training_args.max_steps == 20
    assert training_args.save_strategy == SaveStrategy.NO and training_args.lr_scheduler_kwargs == {"min_lr": 1e-6}
    assert training_args.metric_for_best_model is None
    # what the file leaves out keeps its default
    assert model_args.lora_target_modules == ["q_proj", "v_proj"] and data_args.on_bad_row == "skip"
    assert not training_args.remove_unused_columns


@pytest.mark.parametrize(("metric", "greater_is_better"), [("giou", True), ("shapes_ciou", True), ("loss", False)])
def test_the_metric_decides_which_model_is_best(metric, greater_is_better, tmp_path):
    args = LisaTrainingArguments(output_dir=str(tmp_path), metric_for_best_model=metric, use_cpu=True)
    assert args.greater_is_better is greater_is_better


@pytest.mark.parametrize("before", [True, False])
def test_command_line_wins_on_either_side_of_the_file(tmp_path, before):
    overrides = [*"--learning_rate 1e-3 --trainable --max-steps=-1 --use_cpu --sources".split(), "{refcoco+: 5e-1}"]
    (tmp_path / "recipe.yaml").write_text(CONFIG)
    config = ["--config", str(tmp_path / "recipe.yaml")]
    model_args, data_args, training_args = parse_arguments([*overrides, *config] if before else [*config, *overrides])
    assert training_args.learning_rate == 1e-3 and training_args.max_steps == -1 and training_args.use_cpu
    assert model_args.trainable == [] and model_args.ce_loss_weight == 2.0
    assert data_args.sources == {"refcoco+": {"weight": 0.5, "split": "train"}}


def test_null_on_the_command_line_clears_what_the_file_sets(parse):
    cleared = ("--vlm_config", "null", "--mask_config=null", "--metric_for_best_model", "loss")
    model_args, _, training_args = parse(CONFIG, "--model", "outputs/mine", *cleared)
    assert (model_args.model, model_args.vlm_config, model_args.mask_config) == ("outputs/mine", None, None)
    assert training_args.metric_for_best_model == "loss"


def test_null_clears_mappings_lists_and_options(parse):
    cleared = "sources: null\ntrainable: null\neval_sources: {shapes: {split: null}}\n"
    model_args, data_args, _ = parse("model: some/model\n" + cleared)
    assert (data_args.sources, model_args.trainable) == ({}, [])
    assert data_args.eval_sources == {"shapes": {"split": "validation"}}
    cleared = ("--sources", "null", "--eval_sources=null", "--trainable", "null")
    model_args, data_args, _ = parse(CONFIG, *cleared)
    assert (data_args.sources, data_args.eval_sources, model_args.trainable) == ({}, {}, [])


def test_device_and_dtype_are_spelled_alike_everywhere(parse, capsys):
    options = {"predict": 2, "chat": 2, "demo": 2, "export": 1, "convert_weights": 1}
    for recipe, number in options.items():
        with pytest.raises(SystemExit):
            run_here(f"{recipe}.py", "--help")
        printed = capsys.readouterr().out
        assert "--dtype" in printed and "bfloat16" in printed
        assert ("--device DEVICE" in printed) == (number == 2)
    model_args, _, training_args = parse("model: some/model", "--device", "cpu", "--dtype", "auto")
    assert model_args.dtype is None and training_args.use_cpu
    assert parse("model: some/model", "--dtype", "bfloat16")[0].dtype == "bfloat16"


def test_help_is_quick_and_lists_ours_first():
    """Timed by what it imports: transformers' TrainingArguments take seconds."""
    code = f"import runpy, sys; sys.argv[1:] = ['--help']; sys.path.insert(0, {str(ROOT / 'recipes')!r})\ntry:\n"
    code += f"    runpy.run_path({str(ROOT / 'recipes' / 'train.py')!r}, run_name='__main__')\n"
    code += "finally:\n    print({'torch', 'transformers', 'datasets', 'lisa_hf'} & set(sys.modules), file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert result.stderr == "set()\n"
    names = [name for cls in (ModelArguments, DataArguments, LisaTrainingArguments) for name in cls.__annotations__]
    listed = re.findall(r"^  --(\w+) ", result.stdout, re.MULTILINE)
    assert [name for name in listed if name not in ("config", "device")] == names
    text = " ".join(result.stdout.split())
    assert " --thinking {off,on} Whether" in text and "(q_proj v_proj)" in text


def test_help_of_all_has_groups(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help-all"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    headings = ["Arguments for the model", "--lora_r", "Arguments for the data", "--sources", "--part_learning_rates"]
    places = [printed.index(text) for text in (*headings, "\ntransformers' TrainingArguments:", "--learning_rate")]
    assert places == sorted(places)


def test_weights_are_given_or_lisa_s(parse):
    assert parse(CONFIG)[1].weights == {"shapes": 1.5, "reason_seg": 9}
    assert parse_arguments(["--model", "some/model", "--sources", "{a: , b: {split: val}}"])[1].weights is None


def test_command_line_alone():
    model_args, data_args, _ = parse_arguments(["--model", "some/model", "--eval_sources", '{"shapes": null}'])
    assert model_args.model == "some/model" and data_args.eval_sources == {"shapes": {"split": "validation"}}


@pytest.mark.parametrize(
    "line, expected",
    [
        ("lerning_rate: 1", "got `lerning_rate`. Did you mean `learning_rate`?"),
        ("learning_rates: {lora: 1e-4}", "got `learning_rates`. Did you mean `part_learning_rates`?"),
        ("config: other.yaml", "expected the name of an argument, got `config`. Did you mean"),
        (
            "learning_rate: fast",
            "learning_rate: argument --learning_rate/--learning-rate: invalid float value: 'fast'",
        ),
        ("learning_rate: [1, 2]", "learning_rate: expected no further value, got `2`"),
        ("learning_rate: {peak: 1}", "invalid float value: '{\"peak\": 1}'"),
        ("learning_rate: []", "learning_rate: argument --learning_rate/--learning-rate: expected one argument"),
        ("num_questions:", "num_questions: expected a value, got null"),
        ("max_steps: 1.5", "invalid int value: '1.5'"),
        ("bf16: perhaps", "Truthy value expected: got perhaps"),
        ("on_bad_row: stop", "invalid choice: 'stop' (choose from"),
        ("eval_sources: shapes", "expected a mapping such as {name: value}, got `shapes`"),
    ],
)
def test_mistake_in_the_file_names_file_line_and_key(fails, line, expected):
    message = fails(f"model: some/model\n{line}\n")
    assert "recipe.yaml, line 2: " in message and expected in message


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "recipe.yaml: expected a mapping of arguments, got nothing"),
        ("- model", "recipe.yaml: expected a mapping of arguments, got a sequence"),
        ("model: [a", 'recipe.yaml", line'),
        ("model: a: b", "mapping values are not allowed here"),
        ("model: a\nseed: 1\nmodel: b", 'expected each key once, got `model` again in "'),
        ("sources: {a: 1, a: 2}", "expected each key once, got `a` again"),
    ],
)
def test_file_that_is_no_mapping(fails, text, expected):
    assert expected in fails(text)


def test_file_that_is_not_in_utf_8(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_bytes("model: a".encode("utf-16"))
    with pytest.raises(SystemExit):
        parse_arguments(["--config", str(tmp_path / "recipe.yaml")])
    assert "recipe.yaml: expected YAML in UTF-8, got other bytes" in capsys.readouterr().err


def test_renamed_arguments_exist():
    classes = (ModelArguments, DataArguments, LisaTrainingArguments)
    arguments = {field.name for dataclass_type in classes for field in dataclasses.fields(dataclass_type)}
    assert set(RENAMED.values()) <= arguments and not RENAMED.keys() & arguments


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--lora-alfa", "4"], "got `--lora-alfa`. Did you mean `lora_alpha`?"),
        (["--lr", "3e-4"], "got `--lr`. Did you mean `learning_rate`?"),  # LISA's name; lora_r is nearer
        (["--batch_size=2"], "got `--batch_size`. Did you mean `per_device_train_batch_size`?"),
        (["--learn", "4"], "expected the name of an argument, got `--learn`. Did you mean"),  # no abbreviations
        (["stray"], "expected no further value, got `stray`"),
        (["--device", "tpu"], "--device: expected a kind of device on this machine, such as"),
        (["--dtype", "bf16"], "--dtype: invalid choice: 'bf16'"),
        (["--max_steps", "many"], "argument --max_steps/--max-steps: invalid int value: 'many'"),
        (["--sources", "{a: "], "expected a mapping in YAML or JSON, got `{a: `"),
        (["--config", "absent.yaml"], "No such file or directory: 'absent.yaml'"),
        (
            ["--trainable", "mask_encode"],
            "got `mask_encode`. Did you mean `mask_encoder`?",
        ),
        (["--vlm", "a"], "expected one of model, vlm and vlm_config, got model and vlm"),
        (["--sources", "{a: 0}"], "sources: a: expected a weight above 0, got 0"),
        (["--sources", "{a: 1, b: }"], "sources: expected a weight for each of them or for none, got none for"),
        (["--streaming", "--num_train_items", "9"], "num_train_items: expected none with streaming"),
        (["--streaming", "--max_steps", "-1"], "max_steps: expected the number of steps with streaming"),
        (
            ["--per_device_train_batch_size", "0"],
            "per_device_train_batch_size: expected a number from 1",
        ),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps: expected a number from 1 to inf"),
        (["--accelerator_config", '{"split_batches": true}'], "expected neither split_batches nor dispatch_batches"),
        (["--sources", "{a: [b]}"], "sources: a: expected a mapping of options, got ['b']"),
        (["--eval_sources", "{a: 2}"], "eval_sources: a: expected no weight, got 2"),
        (["--eval_sources", "{a: {on_bad_row: skip}}"], "eval_sources: a: expected no on_bad_row, got skip"),
        (["--num_questions", "0"], "num_questions: expected a number from 1 to inf, got 0"),
        (["--logging_steps", "0"], "logging strategy"),  # transformers' own check
        (["--accelerator_config", '{"dispatch": false}'], "unexpected keyword argument 'dispatch'"),
        (
            ["--part_learning_rates", "{mask_encoder: 1e-4}"],
            "expected parts that train (seg_projector, mask_decoder, embeddings, lora), got mask_encoder",
        ),
        (
            ["--load_in_4bit", "--deepspeed", f"{ROOT}/ds_configs/zero3.json"],
            "expected neither with ZeRO-3 and FSDP, got one",
        ),
    ],
)
def test_mistake_on_the_command_line(fails, argv, expected):
    assert expected in fails("model: some/model", *argv)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({}, "expected one of model, vlm and vlm_config, got none of them"),
        ({"vlm": "a"}, "expected one of model, mask_model and mask_config, got none of them"),
        ({"vlm": "a", "vlm_config": {}, "mask_model": "b"}, "got vlm and vlm_config"),
        ({"vlm_config": {"width": 8}, "mask_config": {"model_type": "sam"}}, "expected the key `model_type`, got"),
        ({"vlm": "a", "mask_model": "b", "language_model": "c"}, "language_model: expected vlm_config with it"),
        ({"model": "a", "lora_dropout": 2.0}, "lora_dropout: expected a number from 0 to 1, got 2.0"),
        ({"model": "a", "load_in_4bit": True, "lora_r": 0}, "load_in_4bit: expected lora_r above 0 with it"),
        ({"model": "a", "load_in_4bit": True, "load_in_8bit": True}, "expected one of them, got both"),
        ({"model": "a", "load_in_8bit": True, "use_dora": True}, "use_dora: expected load_in_4bit with it"),
        (
            {"model": "a", "load_in_4bit": True, "trainable": ["vision_tower"]},
            "trainable: expected no quantized parts, got vision_tower",
        ),
        (
            {"vlm_config": {"model_type": "llava"}, "mask_config": {"model_type": "sam"}, "load_in_4bit": True},
            "expected a pretrained VLM, got vlm_config",
        ),
    ],
)
def test_model_arguments_that_contradict_each_other(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        ModelArguments(**arguments)


@pytest.mark.parametrize(
    "rates, expected",
    [
        ({"lora": -1.0}, "part_learning_rates: lora: expected a number from 0, got -1"),
        ({"decoder": 1e-4}, "part_learning_rates: .*got `decoder`. Did you mean `mask_decoder`"),
    ],
)
def test_dataclasses_validate_without_the_parser(rates, expected, tmp_path):
    with pytest.raises(ValueError, match=expected):
        LisaTrainingArguments(output_dir=str(tmp_path), part_learning_rates=rates)
    with pytest.raises(ValueError, match="explanatory_probability: expected a number from 0 to 1"):
        DataArguments(explanatory_probability=1.5)


def test_a_tracker_that_is_not_installed_is_one_line(capsys):
    message = "WandbCallback requires wandb to be installed. Run `pip install wandb`."  # transformers' own
    with pytest.raises(SystemExit), report_user_errors():
        raise RuntimeError(message)
    assert capsys.readouterr().err.endswith(f"error: {message}\n")
    with pytest.raises(RuntimeError, match="a bug"), report_user_errors():
        raise RuntimeError("a bug")


def test_an_error_of_an_object_store_is_one_line(capsys):
    error = type("NoCredentialsError", (Exception,), {"__module__": "botocore.exceptions"})
    with pytest.raises(SystemExit), report_user_errors():
        raise error("Unable to locate credentials")
    assert capsys.readouterr().err.endswith("error: the storage of a URL: Unable to locate credentials\n")


def test_parallelism_that_divides_one_image_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="expected every process to have its own images, got cp_size 2"):
        LisaTrainingArguments(tmp_path, parallelism_config=ParallelismConfig(cp_size=2))
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")  # as the launcher does
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    with pytest.raises(ValueError, match="expected every process to have its own images, got tp_size 2"):
        LisaTrainingArguments(tmp_path)


def test_output_shows_characters_that_its_encoding_lacks(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    with report_user_errors():
        print("坏.jpg", flush=True)
    assert stream.buffer.getvalue().strip() == rb"\u574f.jpg"
