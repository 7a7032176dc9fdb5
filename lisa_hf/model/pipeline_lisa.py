"""`pipeline("reasoning-segmentation")`: an image and a question in, text, masks and scores out.

    pipe = pipeline("reasoning-segmentation", model=DIR, trust_remote_code=True)
    pipe("photo.jpg", question="What could be used to open it?")

This file travels to the Hub as remote code.
"""

from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from transformers import Pipeline

from .conversation_text import user_message
from .images import load_image


@dataclass
class Answer:
    """Text of an answer, and one mask per `[SEG]` in it.

    Args:
        text: Answer of the language model.
        masks: Masks at the size of the upright image, `(M, H, W)` bool.
        scores: The mask decoder's own estimate of each mask's IoU, `(M,)` float. LISA does not train it.
        reasoning: Thoughts of the model before its answer; empty unless it may think, see [`LisaProcessor`].
    """

    text: str
    masks: torch.Tensor
    scores: torch.Tensor
    reasoning: str = ""


def answer_prompts(
    model,
    processor,
    images: list[Image],
    prompts: list[str],
    image_indices: list[int] | None = None,
    mask_threshold: float = 0.0,
    max_new_tokens: int = 256,
    do_sample: bool = False,
    **kwargs,
) -> list[Answer]:
    """Answer N prompts about B images, which are encoded once each.

    Args:
        model: A [`LisaForConditionalGeneration`].
        processor: Its [`LisaProcessor`].
        images: B images, of any kind that [`load_image`] takes.
        prompts: N texts from the chat template, which end where the answer begins.
        image_indices: Index of each prompt's image, N ints. Default: prompt n is about image n.
        mask_threshold: Logit above which a pixel belongs to a mask.
        max_new_tokens: Length of the longest answer in tokens.
        do_sample: Whether to sample the answers instead of decoding them greedily.
        kwargs: Arguments of [`LisaForConditionalGeneration.generate`].
    """
    inputs = processor(images=images, text=prompts, image_indices=image_indices).to(model.device)
    was_training = model.training
    model.eval()
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=do_sample, **kwargs)
    model.train(was_training)
    return read_answers(processor, inputs, output, mask_threshold)


def read_answers(processor, inputs: dict, output, mask_threshold: float = 0.0) -> list[Answer]:
    """Return the answers in the output of [`LisaForConditionalGeneration.generate`].

    Args:
        processor: The model's [`LisaProcessor`].
        inputs: Output of the processor for N prompts.
        output: Output of `generate` for them.
        mask_threshold: Logit above which a pixel belongs to a mask.
    """
    masks = processor.post_process_masks(
        output.low_res_masks,
        inputs["original_sizes"],
        inputs["reshaped_input_sizes"],
        output.seg_row_indices,
        inputs["image_indices"],
        mask_threshold,
    )
    answers = []
    for row, ids in enumerate(output.sequences[:, inputs["input_ids"].shape[1] :].tolist()):
        reasoning, text = processor.template.read_answer(ids)
        scores = output.iou_scores[output.seg_row_indices == row].float().cpu()
        answers.append(Answer(text, masks[row].cpu(), scores, reasoning))
    return answers


class ReasoningSegmentationPipeline(Pipeline):
    """Answer questions about images with text and masks.

    A call takes an image (path, URL, PIL image, ..., see [`load_image`]) or a list of images, and a `question`. It
    also takes dicts of `image` and `question`: one, or a list, generator or dataset, answered `batch_size` at a time.
    It returns a dict of `text`, `masks`, `scores` and `reasoning` per question, see [`Answer`].

    Args:
        max_new_tokens: Length of the longest answer in tokens.
        mask_threshold: Logit above which a pixel belongs to a mask.
        generate_kwargs: Dict of further arguments of [`LisaForConditionalGeneration.generate`].
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False

    def __call__(self, inputs, question: str | None = None, **kwargs):
        if question is not None:
            images = inputs if isinstance(inputs, list) else [inputs]
            questions = [{"image": image, "question": question} for image in images]
            inputs = questions if isinstance(inputs, list) else questions[0]
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, max_new_tokens=None, mask_threshold=None, generate_kwargs=None, **unknown):
        if unknown:
            raise ValueError(
                f"expected `max_new_tokens` or `mask_threshold`, got {', '.join(unknown)}. Pass other arguments of "
                "`generate` in the dict `generate_kwargs`."
            )
        given = {"max_new_tokens": max_new_tokens, "mask_threshold": mask_threshold}
        given = {name: value for name, value in given.items() if value is not None}
        return {}, given | (generate_kwargs or {}), {}

    def preprocess(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(inputs, dict) or inputs.keys() != {"image", "question"}:
            raise ValueError(
                "expected an image and a question, or a dict of 'image' and 'question', got "
                f"{f'one of {list(inputs)}' if isinstance(inputs, dict) else type(inputs).__name__}. Pass "
                "`question='...'`."
            )
        messages = [user_message(inputs["question"])]
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # `_forward` creates the tensors from a whole batch: only the processor knows how to combine images and rows.
        return {"image": load_image(inputs["image"]), "prompt": prompt}

    def _forward(self, batch: dict[str, Any], **kwargs) -> dict[str, Any]:
        images, prompts = batch["image"], batch["prompt"]
        if isinstance(prompts, str):  # not collated: batch_size is 1
            (answer,) = answer_prompts(self.model, self.processor, [images], [prompts], **kwargs)
            return {"answer": answer}
        return {"answer": answer_prompts(self.model, self.processor, images, prompts, **kwargs)}

    def postprocess(self, outputs: dict[str, Answer]) -> dict[str, Any]:
        return vars(outputs["answer"])
