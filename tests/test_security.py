"""Untrusted input runs no code: a payload in each place where a checkpoint is read, which would leave a trace.

In addition: pickles of original checkpoints and of ZeRO (`conversion/test_convert_weights.py`), names of classes
(`model/test_backends.py`), pickles of annotations (`data/test_bad_source_files.py`), archives
(`data/test_download.py`), paths and URLs in rows (`data/test_hub.py`) and in annotations (`data/export_formats/`),
polygons (`data/test_segmentation.py`), damaged annotations (`data/test_damaged_annotations.py`).
"""

import json
import logging
import os
import re
import shlex
import shutil
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from fixtures.tiny_training import Items, build_model, make_item, make_trainer
from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file

from data_scripts import load_source
from lisa_hf import LisaProcessor, export
from lisa_hf.data.mixture import MixtureDataset
from lisa_hf.errors import refuse_damaged_files, report_user_errors
from lisa_hf.model.conversation_text import limited_memory, user_message
from lisa_hf.redaction import redact
from lisa_hf.training import model_card
from lisa_hf.training.arguments import parse_arguments, parse_data_arguments
from lisa_hf.training.build import load_lisa
from lisa_hf.training.checkpointing import MANIFEST, write_manifest
from lisa_hf.training.model_card import (
    DATA_ARGUMENTS,
    MODEL_ARGUMENTS,
    TRAINING_ARGUMENTS,
    escape,
    write_model_card,
)
from lisa_hf.training.run_record import write_run_record
from lisa_hf.training.trainable import prepare_for_training


MARK = "executed"


class Payload:
    """An object whose pickle makes a directory where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (MARK,)


@pytest.fixture(autouse=True)
def nothing_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path(MARK).exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "model"
    model, processor = build_model()
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "model"))


def test_the_payload_leaves_a_mark_where_pickles_run():
    torch.save({"x": Payload()}, "file.pt")
    torch.load("file.pt", weights_only=False)
    assert Path(MARK).is_dir()
    Path(MARK).rmdir()


def test_weights_as_a_pickle(directory):
    (directory / "model.safetensors").unlink()
    torch.save({"x": Payload()}, directory / "pytorch_model.bin")
    with pytest.raises(Exception, match="(?i)weights_only|unsafe|unpickl"):
        load_lisa(str(directory))


ESCAPES = [
    "{{ cycler.__init__.__globals__.os.mkdir('executed') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ lipsum.__globals__['os'].mkdir('executed') }}",
    "{{ raise_exception.__globals__['__builtins__']['__import__']('os').mkdir('executed') }}",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_chat_template_that_leaves_its_sandbox(directory, escape):
    template = directory / "chat_template.jinja"
    template.write_text(escape + template.read_text())
    with pytest.raises(Exception, match="(?i)unsafe|undefined|not defined|has no"):
        _, processor = load_lisa(str(directory))
        messages = make_item(0, [1])["questions"][0].messages[:1]
        processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def test_a_chat_template_that_never_ends(directory, monkeypatch):
    monkeypatch.setattr("lisa_hf.model.conversation_text.RENDER_SECONDS", 0.2)
    loop = "{% for i in range(3000) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
    template = directory / "chat_template.jinja"
    template.write_text("{% if messages %}" + loop + "{% endif %}" + template.read_text())
    with pytest.raises(ValueError, match="within 0.2 seconds"):
        _, processor = load_lisa(str(directory))
        processor.apply_chat_template([user_message("?")], add_generation_prompt=True, tokenize=False)


BOMBS = {
    "{{ 'a' * 10**11 }}": "without powers",
    "{{ 'a' * 100000000000 }}": "MemoryError",
    "{% set x = namespace(y='a') %}{% for i in range(40) %}{% set x.y = x.y ~ x.y %}{% endfor %}": "MemoryError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{{ 1 / 0 }}": "division by zero",
    "{{ 'a' * 999999 }}": "100000 characters at most",
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited on Linux alone")
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_chat_template_that_takes_all_memory_or_fails(saved, bomb):
    processor = LisaProcessor.from_pretrained(saved)
    processor.chat_template = bomb + processor.chat_template
    with pytest.raises(ValueError, match=BOMBS[bomb]):
        processor.apply_chat_template([user_message("?")], add_generation_prompt=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited on Linux alone")
def test_threads_that_limit_memory_leave_no_limit():
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    is_inside = threading.Event()

    def first():
        with limited_memory(2**30):
            is_inside.set()
            time.sleep(0.05)

    def second():
        is_inside.wait()
        with limited_memory(2**30):
            time.sleep(0.1)

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_model_without_a_chat_template(directory):
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="expected a model with a chat template.* Pass `chat_template`"):
        load_lisa(str(directory))


def change_config(**changes):
    def change(directory: Path):
        config = json.loads((directory / "config.json").read_text())
        for path, value in changes.items():
            *parents, name = path.split("__")
            part = config
            for parent in parents:
                part = part[parent]
            part[name] = value
        (directory / "config.json").write_text(json.dumps(config))

    return change


def write(name: str, text: str):
    return lambda directory: (directory / name).write_text(text)


def index_elsewhere(name: str):
    def change(directory: Path):
        (directory / "model.safetensors").rename(directory.parent / "private.safetensors")
        write("model.safetensors.index.json", json.dumps({"weight_map": {"a": name}}))(directory)

    return change


def remove_weights(directory: Path):
    weights = load_file(directory / "model.safetensors")
    save_file(dict(list(weights.items())[1:]), directory / "model.safetensors", {"format": "pt"})


HOSTILE_FILES = {
    "index of a file elsewhere": (index_elsewhere("../private.safetensors"), "expected files in this directory"),
    "index of a file anywhere": (index_elsewhere("/etc/passwd"), "expected files in this directory"),
    "no index": (write("model.safetensors.index.json", "[]"), "expected an index"),
    "missing weights": (remove_weights, r"got no .* \(1 such\)"),
    "fewer layers than weights": (change_config(mask_config__vision_config__num_hidden_layers=0), "got also"),
    "layers": (change_config(vlm_config__text_config__num_hidden_layers=10**9), "at most 10000"),
    "code on the Hub": (change_config(attn_implementation="evil/kernel"), "not code on the Hub"),
    "code of a part": (change_config(attn_implementation={"vlm_config": "a/b"}), "not code on the Hub"),
    "quantization": (change_config(quantization_config={"quant_method": "gptq", "bits": 4}), "not installed"),
    "value": (change_config(vlm_config__text_config__num_attention_heads=0), "ZeroDivisionError"),
    "type": (change_config(vlm_config__text_config__hidden_size="x"), "'hidden_size' expected int"),
    "list": (write("processor_config.json", "[]"), "AttributeError"),
    "depth": (write("tokenizer_config.json", "[" * 100_000), "RecursionError"),
    "tokenizer": (write("tokenizer.json", '{"added_tokens": [], "model": {"type": "evil"}}'), "expected files of a"),
}


@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_damaged_and_hostile_files_are_named_in_a_sentence(directory, name):
    change, message = HOSTILE_FILES[name]
    change(directory)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(directory))}[^\n]*{message}[^\n]*\.$"):
        load_lisa(str(directory))


def test_a_hub_that_does_not_answer_is_no_damaged_model():
    with pytest.raises(OSError, match="owner/name: expected an answer from the Hub, got HTTPError"):
        with refuse_damaged_files("owner/name"):
            raise HTTPError("timed out")


CODE = f"import os\nos.mkdir({MARK!r})\n"


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "processor_config.json", "custom_generate"])
def test_code_beside_the_weights(directory, name):
    """Our models are loaded by the installed package, whatever code is next to them."""
    for module in ("configuration_lisa", "modeling_lisa", "processing_lisa", "evil"):
        (directory / f"{module}.py").write_text(CODE)
    if name == "custom_generate":
        (directory / name).mkdir()
        (directory / name / "generate.py").write_text(CODE)
    else:
        content = json.loads((directory / name).read_text())
        names = ("AutoConfig", "AutoModel", "AutoProcessor")
        auto_map = {"AutoTokenizer": ["evil.Evil", None]} | dict.fromkeys(names, "evil.Evil")
        (directory / name).write_text(json.dumps(content | {"auto_map": auto_map}))
    try:
        load_lisa(str(directory))
    except (OSError, ValueError):
        pass  # refused: also well


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints of a run of two steps with LoRA."""
    directory = tmp_path_factory.mktemp("run")
    make_adapter_trainer(directory).train()
    return directory


def make_adapter_trainer(directory):
    model, processor = build_model()
    model = prepare_for_training(model, ["mask_decoder"], lora_r=2)
    steps = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    return make_trainer(model, processor, directory, Items(4), **steps)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_state_of_a_checkpoint_that_is_resumed(checkpoints, tmp_path, name):
    checkpoint = Path(shutil.copytree(checkpoints / "checkpoint-1", tmp_path / "run" / "checkpoint-1"))
    assert (checkpoint / name).is_file()
    torch.save({"x": Payload()}, checkpoint / name)
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint)
    trainer = make_adapter_trainer(tmp_path / "run")
    if name == "training_args.bin":  # is never read
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return
    with pytest.raises(Exception, match="(?i)weights_only|unsafe|unpickl"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_an_adapter_as_a_pickle_that_is_exported(checkpoints, saved, tmp_path):
    checkpoint = Path(shutil.copytree(checkpoints / "checkpoint-1", tmp_path / "run" / "checkpoint-1"))
    (checkpoint / "adapter_model.safetensors").unlink()
    torch.save({"x": Payload()}, checkpoint / "adapter_model.bin")
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint)
    with pytest.raises((OSError, ValueError)):
        export.restore_model(checkpoint)


def test_a_builder_runs_from_the_recipe_alone(tmp_path):
    """Data cannot name one: only the option `builder` runs a file, and only one on this machine."""
    Path("evil.py").write_text(CODE)
    for name in ("evil.py:Evil", "https://example.org/evil.py:Evil", "hf://datasets/x/evil.py:Evil"):
        with pytest.raises((OSError, ValueError)):
            load_source(name, str(tmp_path))
        if "://" in name:
            with pytest.raises(FileNotFoundError, match="does not exist"):
                load_source("mine", str(tmp_path), builder=name)


# ---- model cards: text of others stays text -------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](https://evil.example)",
    "![seen](https://evil.example/pixel.png)",
    "x | y |\n| more | cells",
    "x\n\n# Heading",
    "# Heading",
    "x\n---\nlicense: mit\n---\n",
    "`code` **bold** ~~no~~",
    "--- \n- item",
    "{{ 7 * 7 }}{% raw %}",
    '"); import os; ("',
    "```\n<b>x</b>\n```",
]


def make_record(text: str) -> dict:
    row = {"source": text, "split": text, "num_rows": 1, "fingerprint": text, "weight": 1.0}
    model = dict.fromkeys((*MODEL_ARGUMENTS, "language_model", "model")) | {"vlm": text, "mask_model": "some/sam"}
    data = dict.fromkeys(DATA_ARGUMENTS)
    training = dict.fromkeys(TRAINING_ARGUMENTS) | {
        **{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 1, "optim": text},
        **{"load_best_model_at_end": True, "metric_for_best_model": text},
    }
    return {
        "directory": ".",
        "arguments": {"model": model | {"trainable": [text]}, "training": training, "data": data},
        "data": {"train": [row], "eval": [row]},
        "hardware": {"num_processes": 1, "device": text},
        "versions": {text: text},
        "git_commit": text,
        "continues": None,
        "earlier_starts": [],
    }


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_of_others_in_a_model_card(text, monkeypatch):
    """They come from the run.json and the cards of downloaded models, and from names of files."""
    monkeypatch.setattr(model_card, "_license", lambda model: text)

    def write(directory: str, text: str, name: str) -> str:
        Path(directory).mkdir()
        metrics = {f"eval_{metric}": 0.5 for metric in ("giou", "ciou", "giou_low", "giou_high", "num_masks")}
        Path(directory, "run.json").write_text(json.dumps(make_record(text)))
        Path(directory, "eval_results.json").write_text(json.dumps(metrics))
        Path(directory, "trainer_state.json").write_text('{"global_step": 2, "best_global_step": 1, "epoch": 1}')
        protocols = {"lisa": {"num_questions": 1} | {key.removeprefix("eval_"): 0.5 for key in metrics}}
        protocols["lisa"] |= {"ciou_low": 0.5, "ciou_high": 0.5}
        results = {text: {"builder": text, "split": text, "protocols": protocols}}
        Path(directory, "evaluation.json").write_text(json.dumps({"benchmarks": results}))
        Path(directory, "predictions_x](y.png").touch()
        write_model_card(Path(directory), Path(directory), name)
        return Path(directory, "README.md").read_text()

    def structure(card: str) -> Counter:
        """Count the elements that Markdown makes of a card; adjacent ones of the same kind count once."""
        _, _, body = card.removeprefix("---").partition("\n---\n")
        tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(body)
        kinds = Counter(token.type for token in tokens if token.type != "inline")
        children = [child for token in tokens for child in token.children or ()]
        kinds.update(child.type for child in children if child.type not in ("text", "text_special", "softbreak"))
        assert [token.content for token in tokens if token.type == "fence"][0].count("pipeline(") == 1
        return kinds

    harmless = write("harmless", "x y", "me/mine")
    card = write("hostile", text, text)
    assert structure(card) == structure(harmless)
    data = ModelCard(card).data.to_dict()
    assert data.keys() == ModelCard(harmless).data.to_dict().keys() and data["license"] == text
    compile(card.split("```python\n")[1].split("\n```")[0], "README.md", "exec")


# ---- secrets --------------------------------------------------------------------------------------------------------

TOKEN = "hf_" + "aB3" * 10
WANDB_KEY = "0123456789abcdef" * 2 + "01234567"
COMMAND = [
    "train.py",
    *("--hub_token", TOKEN, "--model", "x", "--generation_max_new_tokens", "64"),
    *("--sources", "{a: {path: 'https://me:open-sesame@server/a.parquet?token=open-sesame', api_key: open-sesame}}"),
]


@pytest.fixture
def secrets(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return (TOKEN, WANDB_KEY, "open-sesame")


def test_no_secret_in_the_record_of_a_run_nor_in_its_checkpoints(secrets, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", COMMAND)
    model_args, data_args, training_args = parse_arguments(
        [*COMMAND[1:], "--output_dir", str(tmp_path / "run"), "--run_name", WANDB_KEY, "--use_cpu"]
    )
    rows = load_source("shapes", None, num_train_scenes=1, num_validation_scenes=1, image_size=32)
    train_dataset = MixtureDataset({"a": rows}, 1)
    Accelerator(cpu=True)  # a trainer makes one
    write_run_record(model_args, data_args, training_args, train_dataset, {})
    torch.save(training_args, tmp_path / "run" / "training_args.bin")
    assert [secret for secret in secrets if secret in (tmp_path / "run" / "run.json").read_text()] == []
    assert TOKEN.encode() not in (tmp_path / "run" / "training_args.bin").read_bytes()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "--generation_max_new_tokens 64" in record["command"] and "server/a.parquet" in record["command"]
    assert record["arguments"]["data"]["sources"]["a"]["split"] == "train"


def test_no_secret_in_messages_nor_in_logs(secrets, capsys):
    text = " ".join(COMMAND) + f" {WANDB_KEY}"
    logger = logging.getLogger("lisa_hf.test")
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        with pytest.raises(SystemExit), report_user_errors():
            logger.warning("got %s", text)
            raise ValueError(f"expected a row of 63 tokens (an example), got {text}")
    finally:
        logging.getLogger().removeHandler(handler)
    printed = capsys.readouterr().err
    assert printed.count("server/a.parquet") == 2 and "a row of 63 tokens (an example)" in printed
    assert [secret for secret in secrets if secret in printed] == []


def test_no_secret_in_a_model_card(secrets):
    assert [secret for secret in secrets if secret in str(escape([COMMAND, " ".join(COMMAND), WANDB_KEY]))] == []


@pytest.mark.parametrize("value", ["plain", "x$y", "two words", "it's"])
@pytest.mark.parametrize("form", ["--hub_token {}", "--hub_token={}"])
def test_a_command_line_without_its_secret_can_still_be_read(form, value):
    arguments = form.split(" ")
    command = redact(shlex.join(["train.py", *[argument.format(value) for argument in arguments], "--bf16"]))
    assert value not in command and "'s" not in command
    assert shlex.split(command)[0] == "train.py" and shlex.split(command)[-1] == "--bf16"


def test_special_tokens_are_no_secrets():
    config = {"image_token": "IMAGETOKEN", "max_new_tokens": 64, "tokenizer": "some/tokenizer", "token": None}
    assert redact({"vlm_config": config}) == {"vlm_config": config}


def test_a_recipe_is_plain_yaml():
    Path("recipe.yaml").write_text(f"sources: !!python/object/apply:os.mkdir [{MARK}]\n")
    with pytest.raises((ValueError, yaml.YAMLError)):
        parse_data_arguments("recipe.yaml")
