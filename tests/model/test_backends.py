"""The image processor backend is part of a checkpoint: the same pixels with torchvision installed and without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from fixtures.tiny_models import FAMILIES, conversation, image, llava_sam
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, SamImageProcessor, SamImageProcessorPil
from transformers.utils import is_torchvision_available

from lisa_hf import LisaProcessor
from lisa_hf.model.image_processor_backends import image_processor_class


TESTS = Path(__file__).parents[1]
OTHER_ENVIRONMENT = "SAVED_BY_OTHER_ENVIRONMENT"  # environment variable: a directory
needs_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="torchvision is not installed")


def torchvision_llava_sam():
    """Both image processors with the torchvision backend, as a user may choose."""
    model, processor = llava_sam()
    processor.vlm_processor.image_processor = CLIPImageProcessor(**processor.vlm_processor.image_processor.to_dict())
    processor.mask_image_processor = SamImageProcessor(**processor.mask_image_processor.to_dict())
    return model, processor


def encode(processor) -> dict[str, torch.Tensor]:
    """Inputs of images that are resized by all kinds of factors."""
    pictures = [image(40, 60), image(97, 31, seed=1), image(150, 201, seed=2)]
    return dict(processor.encode_conversations(pictures, [conversation("What?", "Sure, [SEG].")] * 3))


def save_processors(directory: Path) -> None:
    """Saves the processor of each family, and what it makes of some images."""
    families = FAMILIES | ({"torchvision": torchvision_llava_sam} if is_torchvision_available() else {})
    for name, build in families.items():
        _, processor = build()
        processor.save_pretrained(directory / name)
        save_file(encode(processor), directory / name / "expected.safetensors")


def assert_processors_load_equal(directory: Path) -> None:
    """Each processor makes the same of the images to the bit, or is refused as it needs torchvision."""
    for path in sorted(directory.iterdir()):
        types = (path / "processor_config.json").read_text()
        if "ImageProcessorFast" in types and not is_torchvision_available():
            with pytest.raises(
                ValueError, match="^expected torchvision for .*Fast, got an environment without it. Run "
            ):
                LisaProcessor.from_pretrained(path)
            continue
        inputs, expected = encode(LisaProcessor.from_pretrained(path)), load_file(path / "expected.safetensors")
        assert inputs.keys() == expected.keys()
        for key in expected:
            assert torch.equal(inputs[key], expected[key]), (path.name, key)


def test_saved_processors_load_equal(tmp_path):
    save_processors(tmp_path)
    assert_processors_load_equal(tmp_path)


@pytest.mark.skipif(OTHER_ENVIRONMENT not in os.environ, reason="runs within `test_without_torchvision`")
def test_processors_of_another_environment_load_equal():
    assert_processors_load_equal(Path(os.environ[OTHER_ENVIRONMENT]) / "with")
    save_processors(Path(os.environ[OTHER_ENVIRONMENT]) / "without")


@needs_torchvision
def test_without_torchvision(tmp_path):
    """Parity, saving and loading, and what one environment saved loads in the other."""
    save_processors(tmp_path / "with")
    tests = ["test_backends.py", "test_parity.py", "test_parity_of_parts.py", "test_remote_code.py"]
    saving = ("test_save_and_load", "test_joining_two_pretrained_models")
    tests += [f"test_modeling_saving.py::{name}" for name in saving]
    tests += [f"test_processing.py::{name}" for name in ("test_round_trip_keeps_template_and_tokens",)]
    process = subprocess.run(
        [sys.executable, TESTS / "workers" / "without_torchvision.py", "-q", "-p", "no:cacheprovider"]
        + [str(TESTS / "model" / name) for name in tests],
        env=os.environ | {OTHER_ENVIRONMENT: str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stdout[-5000:]
    assert_processors_load_equal(tmp_path / "without")


# Types of published checkpoints, and of ours.
TYPES = {
    "SamImageProcessor": "SamImageProcessorPil",
    "CLIPImageProcessor": "CLIPImageProcessorPil",
    "CLIPImageProcessorPil": "CLIPImageProcessorPil",
    "CLIPImageProcessorFast": "CLIPImageProcessor",
    "Qwen2VLImageProcessor": "Qwen2VLImageProcessorPil",
    "Qwen2VLImageProcessorFast": "Qwen2VLImageProcessor",
    "GotOcr2ImageProcessorFast": "GotOcr2ImageProcessor",
    "Sam2ImageProcessor": "Sam2ImageProcessor",  # SAM 2 and 3 have torchvision's alone
    "Sam2ImageProcessorFast": "Sam2ImageProcessor",
    "Sam3ImageProcessorFast": "Sam3ImageProcessor",
    "Emu3ImageProcessor": "Emu3ImageProcessor",  # Pillow's alone
}


@pytest.mark.parametrize("name", TYPES)
def test_type_names_the_backend(name):
    if is_torchvision_available() or TYPES[name].endswith("Pil") or name.startswith("Emu3"):
        assert image_processor_class(name).__name__ == TYPES[name]
        return
    with pytest.raises(ValueError, match=f"^expected torchvision for {name}, got .* Run `pip install torchvision`"):
        image_processor_class(name)


@needs_torchvision
@pytest.mark.parametrize("image_type", ["CLIPImageProcessor", "CLIPImageProcessorFast"])
def test_published_checkpoints_choose_the_backend(image_type, tmp_path):
    """The VLM's as its type says, SAM's always Pillow's."""
    _, processor = llava_sam()
    processor.vlm_processor.save_pretrained(tmp_path / "vlm")
    config = json.loads((tmp_path / "vlm" / "processor_config.json").read_text())
    config["image_processor"]["image_processor_type"] = image_type
    (tmp_path / "vlm" / "processor_config.json").write_text(json.dumps(config))
    SamImageProcessor(size={"longest_edge": 64}).save_pretrained(tmp_path / "sam")
    for name in ("SamImageProcessor", "SamImageProcessorFast"):
        config = json.loads((tmp_path / "sam" / "preprocessor_config.json").read_text())
        (tmp_path / "sam" / "preprocessor_config.json").write_text(json.dumps(config | {"image_processor_type": name}))
        joined = LisaProcessor.from_vlm_mask_model_pretrained(tmp_path / "vlm", tmp_path / "sam")
        assert type(joined.vlm_processor.image_processor).__name__ == TYPES[image_type]
        assert type(joined.mask_image_processor) is SamImageProcessorPil


def test_processors_saved_without_a_backend_are_pillows(tmp_path):
    """So the first LISA checkpoints were saved, where torchvision was not installed."""
    _, processor = llava_sam()
    processor.save_pretrained(tmp_path)
    config = (tmp_path / "processor_config.json").read_text()
    assert config.count("ImageProcessorPil") == 2
    (tmp_path / "processor_config.json").write_text(config.replace("ImageProcessorPil", "ImageProcessor"))
    inputs, expected = encode(LisaProcessor.from_pretrained(tmp_path)), encode(processor)
    assert all(torch.equal(inputs[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"vlm_processor_class": "AutoModelForCausalLM"}, "ProcessorMixin .*got 'AutoModelForCausalLM'"),
        ({"mask_image_processor": {"image_processor_type": "pipeline"}}, "BaseImageProcessor .*got 'pipeline'"),
        ({"image_processor": {"image_processor_type": "LisaProcessor"}}, "BaseImageProcessor .*got 'LisaProcessor'"),
    ],
)
def test_only_processors_are_built_from_names(change, expected, tmp_path, monkeypatch):
    _, processor = llava_sam()
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps(config | change))
    monkeypatch.setattr(transformers, "pipeline", lambda *_, **__: pytest.fail("called"))
    with pytest.raises(ValueError, match=f"^expected the name of a {expected}.*source that you trust.$"):
        LisaProcessor.from_pretrained(tmp_path)
