"""Ask a LISA model about images: text and masks, or a contact sheet of them."""

import PIL.Image

from ..data.masks import compact_mask_labels, draw_mask_labels
from ..data.mixture import EvaluationDataset
from ..model.modeling_lisa import LisaForConditionalGeneration
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
    """Answers conversations about one image, greedily; the image is encoded once.

    Args:
        conversations: lists of messages that end with the user's turn; the first turn holds the image part.
    """
    prompts = [
        processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        for messages in conversations
    ]
    return answer_prompts(
        model, processor, [image], prompts, image_indices=[0] * len(prompts), max_new_tokens=max_new_tokens
    )


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
        labels = compact_mask_labels(question.masks, item["ignore"])
        prompt = question.messages[:1]
        (answer,) = answer_questions(model, processor, item["image"], [prompt], max_new_tokens)
        predictions.append(
            Prediction(
                image=item["image"],
                question=prompt[0]["content"][-1]["text"].strip(),
                answer=answer.text,
                masks=answer.masks.numpy(),
                mask_labels=draw_mask_labels(*labels, item["original_size"]).numpy(),
                title=title,
            )
        )
    return contact_sheet(predictions)
