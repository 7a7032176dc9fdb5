"""Published models of LISA's kind, converted: their own code's numbers, and every way a model is used."""

import pytest
import torch
from fixtures.golden_model import GOLDEN, convert, golden_image
from fixtures.published_seg import assert_as_recorded, write_lisa_v0, write_sesame
from fixtures.recipes import run_here
from transformers import AutoModel, AutoProcessor, pipeline


ORIGINALS = {  # how it is written, the source that `auto` finds, options
    "sesame": (write_sesame, "lisa", ("--vision_tower", GOLDEN / "clip_tiny")),
    "lisa_v0": (write_lisa_v0, "lisa-v0", ("--vision_tower", GOLDEN / "clip_tiny")),
}


@pytest.fixture(scope="module", params=ORIGINALS)
def converted(request, tmp_path_factory):
    """The name of an original, the directory of its conversion, and the source that was found."""
    directory = tmp_path_factory.mktemp(request.param)
    write, source, options = ORIGINALS[request.param]
    write(directory / "original")
    convert("auto", "--checkpoint", directory / "original", *options, "--output", directory / "converted")
    return request.param, directory / "converted"


def test_numbers_of_the_originals_own_code(converted):
    name, directory = converted
    assert_as_recorded(directory, name)


def test_evaluated_trained_exported_and_asked(converted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, directory = converted
    sources = "{shapes: {num_train_scenes: 1, num_validation_scenes: 2, image_size: 64}}"
    options = ("--output_dir", tmp_path / "scores", "--generation_max_new_tokens", 2, "--use_cpu", "true")
    run_here("eval.py", directory, "--eval_sources", sources, *options)
    assert list((tmp_path / "scores").glob("*.json"))
    # A step of training, because an export is a run's.
    options = ("--max_steps", 1, "--per_device_train_batch_size", 1, "--save_strategy", "no", "--report_to", "none")
    options += ("--output_dir", tmp_path / "run", "--use_cpu", "true", "--eval_strategy", "no")
    run_here("train.py", "--model", directory, "--sources", sources, *options)
    run_here("export.py", tmp_path / "run", "--output", tmp_path / "exported")
    model = AutoModel.from_pretrained(tmp_path / "exported").eval()
    pipe = pipeline(
        "reasoning-segmentation", model=model, processor=AutoProcessor.from_pretrained(tmp_path / "exported")
    )
    seg = torch.tensor(model.config.seg_token_id)
    only_seg = {"logits_processor": [lambda _, scores: scores.index_fill(1, seg, 1e4)]}
    answer = pipe(golden_image(0), question="What is red?", max_new_tokens=2, generate_kwargs=only_seg)
    assert answer["masks"].shape == (2, 93, 131)
