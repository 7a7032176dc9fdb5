"""Ask a LISA model about images: text and masks, or a contact sheet of them."""

from dataclasses import dataclass

import PIL.Image
import torch

from .collator import mask_labels
from .mixture import EvaluationDataset
from .modeling_lisa import LisaForConditionalGeneration
from .processing_lisa import LisaProcessor
from .visualization import Prediction, contact_sheet


@dataclass
class Answer:
    """Text of an answer and its masks, `(M, H, W)` bool at the image's size, one per `[SEG]` in the text."""

    text: str
    masks: torch.Tensor


def answer_questions(
    model: LisaForConditionalGeneration,
    processor: LisaProcessor,
    image: PIL.Image.Image,
    conversations: list[list[dict]],
    max_new_tokens: int = 256,
) -> list[Answer]:
    """Answers conversations about one image, greedily; the image is encoded once.

    Args:
        conversations: lists of messages that end with the user's turn; the first turn holds the image part.
    """
    prompts = [
        processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        for messages in conversations
    ]
    inputs = processor(images=image, text=prompts, image_indices=[0] * len(prompts)).to(model.device)
    was_training = model.training
    model.eval()
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    model.train(was_training)
    masks = processor.post_process_masks(
        output.low_res_masks,
        inputs["original_sizes"],
        inputs["reshaped_input_sizes"],
        output.seg_row_indices,
        inputs["image_indices"],
    )
    texts = processor.tokenizer.batch_decode(
        output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [Answer(text=text.strip(), masks=row.cpu()) for text, row in zip(texts, masks)]


def question_messages(question: str) -> list[dict]:
    """The conversation that asks one question about an image."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def draw_predictions(
    model: LisaForConditionalGeneration,
    processor: LisaProcessor,
    dataset: EvaluationDataset,
    max_new_tokens: int = 256,
    titles: dict[tuple[int, int], str] | None = None,
) -> PIL.Image.Image:
    """A contact sheet of generated answers.

    Args:
        titles: of the questions to draw, by the numbers of item and question; by default the first question of each of
            the first twelve items, without a title.
    """
    if titles is None:
        titles = {(index, 0): "" for index in range(min(12, len(dataset)))}
    predictions = []
    for (index, number), title in titles.items():
        item = dataset[index]
        question = item["questions"][number]
        prompt = question.messages[:1]
        (answer,) = answer_questions(model, processor, item["image"], [prompt], max_new_tokens)
        predictions.append(
            Prediction(
                image=item["image"],
                question=prompt[0]["content"][-1]["text"].strip(),
                answer=answer.text,
                masks=answer.masks.numpy(),
                mask_labels=mask_labels(item, [question]).numpy(),
                title=title,
            )
        )
    return contact_sheet(predictions)
