"""What is not trusted runs no code: a payload in each place where a checkpoint is read, that would leave a mark.

Beside these: pickles of original checkpoints and of ZeRO (`conversion/test_convert_weights.py`), names of classes
(`model/test_backends.py`), pickles of annotations (`data/test_sources.py`), archives (`data/test_download.py`), paths
and URLs in rows (`data/test_hub.py`) and in annotations (`data/test_export_formats.py`), polygons
(`data/test_segmentation.py`), damaged annotations (`data/test_damaged_annotations.py`).
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from fixtures.tiny_training import Items, build_model, make_item, make_trainer

from data_scripts import load_source
from lisa_hf import export
from lisa_hf.model.conversation_text import user_message
from lisa_hf.training.arguments import parse_data_arguments
from lisa_hf.training.build import load_lisa
from lisa_hf.training.checkpointing import MANIFEST, write_manifest
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


CODE = f"import os\nos.mkdir({MARK!r})\n"


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "processor_config.json", "custom_generate"])
def test_code_beside_the_weights(directory, name):
    """A model of ours is loaded by the installed package, whatever code lies beside it."""
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


def test_a_recipe_is_plain_yaml():
    Path("recipe.yaml").write_text(f"sources: !!python/object/apply:os.mkdir [{MARK}]\n")
    with pytest.raises((ValueError, yaml.YAMLError)):
        parse_data_arguments("recipe.yaml")
