"""Ask a LISA model about images: text and masks, masks of a whole batch, or a contact sheet."""

import numpy as np
import PIL.Image
import torch
from torch.nn.utils.rnn import pad_sequence

from ..data.masks import compact_mask_labels, draw_mask_labels
from ..data.mixture import EvaluationDataset
from ..data.prompts import Question
from ..model.losses import IGNORE_INDEX
from ..model.modeling_lisa import LisaForConditionalGeneration
from ..model.packing import TEXT_INPUTS
from ..model.pipeline_lisa import Answer, answer_prompts, read_answers
from ..model.processing_lisa import LisaProcessor
from .predictions import QuestionPrediction, iterate_questions
from .visualization import Prediction, contact_sheet


def answer_questions(
    model: LisaForConditionalGeneration,
    processor: LisaProcessor,
    image: PIL.Image.Image,
    conversations: list[list[dict]],
    max_new_tokens: int = 256,
) -> list[Answer]:
    """Answer conversations about one image, greedily; the image is encoded once.

    Args:
        model: A LISA.
        processor: The model's processor.
        image: The image that all conversations are about.
        conversations: Lists of messages that end with a user turn, see [`user_message`].
        max_new_tokens: Longest answer, in tokens.
    """
    prompts = [
        processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        for messages in conversations
    ]
    return answer_prompts(
        model, processor, [image], prompts, image_indices=[0] * len(prompts), max_new_tokens=max_new_tokens
    )


def generate_answers(
    model: LisaForConditionalGeneration, processor: LisaProcessor, batch: dict, max_new_tokens: int, image_embeddings
) -> list[Answer]:
    """Answer the first question of every row of a training batch, greedily.

    Args:
        model: A LISA, which may be sharded over processes.
        processor: The model's processor.
        batch: Inputs of N rows with their answers, as `forward` takes them.
        max_new_tokens: Longest answer, in tokens.
        image_embeddings: Outputs of the mask model's encoder, see [`LisaOutput`].

    Returns:
        N answers, with masks at the sizes of their images.
    """
    replaced = (*TEXT_INPUTS, "labels", "mask_labels", "mask_pixel_values")
    images = {name: value for name, value in batch.items() if name not in replaced}
    prompts = cut_prompts(batch, processor)
    output = model.generate(
        **images, **prompts, image_embeddings=image_embeddings, max_new_tokens=max_new_tokens, do_sample=False
    )
    return read_answers(processor, batch | prompts, output)


def cut_prompts(batch: dict, processor: LisaProcessor) -> dict[str, torch.Tensor]:
    """Truncate the rows of a training batch before their first answer: text inputs `(N, L)`, padded on the left."""
    is_answer = batch["labels"] != IGNORE_INDEX  # [N, L]
    lengths = torch.where(is_answer.any(1), is_answer.long().argmax(1), batch["attention_mask"].sum(1)).tolist()
    padding_values = {"input_ids": processor.tokenizer.pad_token_id}  # others: 0
    prompts = {}
    for name in TEXT_INPUTS:
        if name in batch:
            # pad_sequence pads on the right, generation needs padding on the left: pad reversed rows.
            rows = [row[:length].flip(0) for row, length in zip(batch[name], lengths)]
            padded = pad_sequence(rows, batch_first=True, padding_value=padding_values.get(name, 0))
            prompts[name] = padded.flip(1)
    return prompts


def draw_answers(
    model: LisaForConditionalGeneration,
    processor: LisaProcessor,
    dataset: EvaluationDataset,
    max_new_tokens: int = 256,
) -> PIL.Image.Image:
    """Draw generated answers to the first questions of the first twelve items of a dataset on a contact sheet.

    Args:
        model: A LISA.
        processor: The model's processor.
        dataset: Evaluation items.
        max_new_tokens: Longest answer, in tokens.
    """
    predictions = []
    for index in range(min(12, len(dataset))):
        item = dataset[index]
        question = item["questions"][0]
        (answer,) = answer_questions(model, processor, item["image"], [question.messages[:-1]], max_new_tokens)
        predictions.append(_drawn(item, question, answer.text, answer.masks.numpy()))
    return contact_sheet(predictions)


def draw_predictions(
    dataset: EvaluationDataset, predictions: dict[str, QuestionPrediction], titles: dict[str, str]
) -> PIL.Image.Image:
    """Draw previously predicted answers of a model on a contact sheet.

    Args:
        dataset: Evaluation items.
        predictions: Answers by question id, see [`read_predictions`].
        titles: Titles of the questions to draw, by question id.
    """
    drawn = {}
    for index, (_, _, questions) in enumerate(iterate_questions(dataset)):
        for name, question in questions.items():
            if name in titles:
                item, masks = dataset[index], [mask.draw() for mask in predictions[name].masks]
                masks = np.array(masks, dtype=bool).reshape(-1, *item["original_size"])
                drawn[name] = _drawn(item, question, predictions[name].text, masks, titles[name])
    return contact_sheet([drawn[name] for name in titles])


def _drawn(item: dict, question: Question, text: str, masks: np.ndarray, title: str = "") -> Prediction:
    labels = compact_mask_labels(question.masks, item["ignore"])
    return Prediction(
        image=item["image"],
        question=question.prompt,
        answer=text,
        masks=masks,
        mask_labels=draw_mask_labels(*labels, item["original_size"]).numpy(),
        title=title,
    )
