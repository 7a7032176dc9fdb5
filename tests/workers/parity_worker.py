"""Answer with converted models in a process without this package: with transformers and the models' own code.

    python -I tests/workers/parity_worker.py REQUESTS.pkl ANSWERS.pkl

REQUESTS is a dict of name to (function of this file, directory of the model, keyword arguments); see `test_parity.py`.
"""

import os
import pickle
import sys
from functools import cache


if "WITHOUT_TORCHVISION" in os.environ:  # see without_torchvision.py
    sys.modules["torchvision"] = None

import torch
from transformers import AutoModel, AutoProcessor


class NoPackage:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lisa_hf":
            raise ModuleNotFoundError(f"{name} is not here", name=name)


sys.meta_path.insert(0, NoPackage())


@cache
def load_processor(directory):
    return AutoProcessor.from_pretrained(directory, trust_remote_code=True)


def load_model(directory):
    model = AutoModel.from_pretrained(directory, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    return model


def encode(directory, images, conversations, max_length):
    """Ids and labels of each conversation alone, whole and, with `max_length`, cut: or the name of the error."""
    processor = load_processor(directory)

    def encode_row(conversation, **options):
        features = processor.encode_conversations(images, [conversation], **options)
        return features["input_ids"][0].tolist(), features["labels"][0].tolist()

    rows = []
    for conversation in conversations:
        rows.append({"whole": encode_row(conversation)})
        try:
            rows[-1]["cut"] = encode_row(conversation, max_length=max_length) if max_length else None
        except ValueError as error:
            rows[-1]["cut"] = type(error).__name__
    return rows


def encode_without_image(directory, messages):
    """What tokenizer and template make of a conversation, and which tokens are the assistant's."""
    processor = load_processor(directory)
    encoding = processor.tokenizer.apply_chat_template(
        messages, chat_template=processor.chat_template, return_dict=True, return_assistant_tokens_mask=True
    )
    return dict(encoding)


def forward(directory, images, conversations, image_indices, mask_labels):
    """Inputs, outputs and the norms of all gradients of a training batch."""
    model, processor = load_model(directory), load_processor(directory)
    inputs = processor.encode_conversations(images, conversations, image_indices=image_indices)
    outputs = model.train()(**inputs, mask_labels=mask_labels, output_logits=True, output_masks=True)
    outputs.loss.backward()
    norms = {name: 0.0 if p.grad is None else p.grad.norm().item() for name, p in model.named_parameters()}
    outputs = {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in outputs.items()}
    outputs["pred_masks"] = [masks.detach() for masks in outputs["pred_masks"]]
    return {"inputs": dict(inputs), "outputs": outputs, "gradient_norms": norms}


@torch.no_grad()
def generate(directory, image, prompt, output_embeddings):
    """Ids of the question and of the whole answer, and its masks' logits; with other output embeddings."""
    model, processor = load_model(directory), load_processor(directory)
    model.get_output_embeddings().weight[: len(output_embeddings)] = output_embeddings
    inputs = processor(image, prompt)
    outputs = model.generate(**inputs, do_sample=False, max_new_tokens=32)
    (masks,) = processor.post_process_masks(
        outputs.low_res_masks,
        inputs["original_sizes"],
        inputs["reshaped_input_sizes"],
        outputs.seg_row_indices,
        inputs["image_indices"],
        binarize=False,
    )
    return {"prompt": inputs["input_ids"][0].tolist(), "sequence": outputs.sequences[0].tolist(), "masks": masks}


if __name__ == "__main__":
    requests_file, answers_file = sys.argv[1:]
    with open(requests_file, "rb") as file:
        requests = pickle.load(file)
    answers = {
        name: globals()[function](directory, **kwargs) for name, (function, directory, kwargs) in requests.items()
    }
    with open(answers_file, "wb") as file:
        pickle.dump(answers, file)
