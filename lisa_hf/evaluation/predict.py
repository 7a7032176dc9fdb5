"""Ask a LISA model about images: text and masks, masks of a whole batch, or a contact sheet."""

import PIL.Image
import torch
from torch.nn.utils.rnn import pad_sequence

from ..data.masks import compact_mask_labels, draw_mask_labels
from ..data.mixture import EvaluationDataset
from ..model.losses import IGNORE_INDEX
from ..model.modeling_lisa import LisaForConditionalGeneration
from ..model.packing import TEXT_INPUTS
from ..model.pipeline_lisa import Answer, answer_prompts
from ..model.processing_lisa import LisaProcessor
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
        conversations: Lists of messages that end with the user's turn, see [`user_message`].
        max_new_tokens: Longest answer, in tokens.
    """
    prompts = [
        processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        for messages in conversations
    ]
    return answer_prompts(
        model, processor, [image], prompts, image_indices=[0] * len(prompts), max_new_tokens=max_new_tokens
    )


def generate_masks(
    model: LisaForConditionalGeneration, processor: LisaProcessor, batch: dict, max_new_tokens: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Answer the first question of every row of a training batch, greedily.

    Args:
        model: A LISA, which may be sharded over processes.
        processor: The model's processor.
        batch: Inputs of N rows with their answers, as `forward` takes them.
        max_new_tokens: Longest answer, in tokens.

    Returns:
        N bool tensors `(M_n, H, W)`, the masks in each answer at its image's size, and their numbers `(N,)`.
    """
    images = {name: value for name, value in batch.items() if name not in (*TEXT_INPUTS, "labels", "mask_labels")}
    output = model.generate(**images, **cut_prompts(batch, processor), max_new_tokens=max_new_tokens, do_sample=False)
    masks = processor.post_process_masks(
        output.low_res_masks,
        batch["original_sizes"],
        batch["reshaped_input_sizes"],
        output.seg_row_indices,
        batch["image_indices"],
    )
    return masks, torch.bincount(output.seg_row_indices, minlength=len(masks))


def cut_prompts(batch: dict, processor: LisaProcessor) -> dict[str, torch.Tensor]:
    """Cut the rows of a training batch before their first answer: text inputs `(N, L)`, padded on the left."""
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


def draw_predictions(
    model: LisaForConditionalGeneration,
    processor: LisaProcessor,
    dataset: EvaluationDataset,
    max_new_tokens: int = 256,
    titles: dict[tuple[int, int], str] | None = None,
) -> PIL.Image.Image:
    """Draw generated answers to questions of a dataset on a contact sheet.

    Args:
        model: A LISA.
        processor: The model's processor.
        dataset: Evaluation items.
        max_new_tokens: Longest answer, in tokens.
        titles: Titles of the questions to draw, by the numbers of item and question. By default the first questions of
            the first twelve items are drawn, without a title.
    """
    if titles is None:
        titles = {(index, 0): "" for index in range(min(12, len(dataset)))}
    predictions = []
    for (index, number), title in titles.items():
        item = dataset[index]
        question = item["questions"][number]
        labels = compact_mask_labels(question.masks, item["ignore"])
        prompt = question.messages[:-1]
        (answer,) = answer_questions(model, processor, item["image"], [prompt], max_new_tokens)
        predictions.append(
            Prediction(
                image=item["image"],
                question=prompt[-1]["content"][-1]["text"].strip(),
                answer=answer.text,
                masks=answer.masks.numpy(),
                mask_labels=draw_mask_labels(*labels, item["original_size"]).numpy(),
                title=title,
            )
        )
    return contact_sheet(predictions)
