"""A saved model loads and answers with its own copy of the code, in a process without this package."""

import os
import subprocess
import sys

import torch
from fixtures.tiny_models import conversation, image, llava_sam
from fixtures.without_package import NO_PACKAGE
from safetensors.torch import load_file

from lisa_hf import LisaForConditionalGeneration


CODE = {
    *("configuration_lisa.py", "conversation_text.py", "generation_lisa.py", "image_processor_backends.py"),
    *("images.py", "losses.py"),
    *("mask_backbone.py", "modeling_lisa.py", "packing.py", "pipeline_lisa.py", "processing_lisa.py"),
    *("upstream_fixes.py", "vlm_backbone.py", "vlm_text_layout.py"),
}
SCRIPT = (
    NO_PACKAGE
    + """
import os
import sys

if "WITHOUT_TORCHVISION" in os.environ:  # see without_torchvision.py
    sys.modules["torchvision"] = None
import torch
from PIL import Image
from safetensors.torch import save_file

from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

directory, picture, text, results = sys.argv[1:]
config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
model = AutoModel.from_pretrained(directory, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
for part in (config, model, model.config, processor):
    assert type(part).__module__.startswith("transformers_modules."), type(part)
inputs = processor(Image.open(picture), text)
seg = torch.tensor(config.seg_token_id)
only_seg = {"logits_processor": [lambda _, scores: scores.index_fill(1, seg, 99)]}
output = model.generate(**inputs, max_new_tokens=2, **only_seg)
sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
(masks,) = processor.post_process_masks(output.low_res_masks, *sizes, output.seg_row_indices)
pipe = pipeline("reasoning-segmentation", model=directory, trust_remote_code=True)
assert type(pipe).__module__.startswith("transformers_modules."), type(pipe)
answer = pipe(picture, question="What is it?", max_new_tokens=2, generate_kwargs=only_seg)
assert answer["text"] == "[SEG][SEG]" and torch.equal(answer["masks"], masks), answer
forward = model(**inputs)
tensors = {"masks": masks, "sequences": output.sequences, "low_res_masks": output.low_res_masks}
tensors |= {"logits": forward.logits, "input_ids": inputs["input_ids"], "pixel_values": inputs["pixel_values"]}
save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, results)
model.save_pretrained(directory + "-again")
processor.save_pretrained(directory + "-again")
"""
)


def test_saved_model_runs_without_the_package(tmp_path):
    model, processor = llava_sam()
    directory, picture, results = tmp_path / "model", tmp_path / "picture.png", tmp_path / "results.safetensors"
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    assert CODE <= {path.name for path in directory.iterdir()}
    image(40, 60).save(picture)
    text = processor.apply_chat_template(conversation("What is it?"), add_generation_prompt=True)

    # Isolated (-I): neither PYTHONPATH nor this directory is on the path, and its module cache is its own.
    environment = {"HF_MODULES_CACHE": tmp_path / "modules", "HF_HOME": tmp_path / "home", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, directory, picture, text, results],
        cwd=tmp_path,
        env=os.environ | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert any((tmp_path / "modules").rglob("modeling_lisa.py"))

    inputs = processor(image(40, 60), text)
    seg = torch.tensor(model.config.seg_token_id)
    output = model.generate(
        **inputs, max_new_tokens=2, logits_processor=[lambda _, scores: scores.index_fill(1, seg, 99)]
    )
    (masks,) = processor.post_process_masks(
        output.low_res_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"], output.seg_row_indices
    )
    theirs = load_file(results)
    assert theirs["masks"].shape == (2, 40, 60)
    for name, tensor in {"masks": masks, **inputs, **output, "logits": model(**inputs).logits}.items():
        if name in theirs:
            torch.testing.assert_close(theirs.pop(name), tensor, rtol=0, atol=1e-5, msg=name)
    assert not theirs

    # Saved once more, by the copy of the code, it is the same model with the same code.
    again = tmp_path / "model-again"
    for name in CODE:
        assert (again / name).read_text() == (directory / name).read_text(), name
    reloaded = LisaForConditionalGeneration.from_pretrained(again).state_dict()
    assert all(torch.equal(reloaded[name], tensor) for name, tensor in model.state_dict().items())
