"""LISA as a model of lmms-eval, which measures how well it still chats on VLM tasks.

    pip install "lisa-hf[lmms-eval]"
    lmms-eval --model lisa --model_args pretrained=exports/mine,dtype=bfloat16 --tasks mme --batch_size 1

lmms-eval finds it through the entry point in setup.cfg. It answers in text, one question at a time and greedily; masks
are ignored. Written for lmms-eval 0.7.
"""

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from ..evaluation.predict import answer_questions
from ..model.modeling_lisa import LisaForConditionalGeneration
from ..model.processing_lisa import LisaProcessor
from .arguments import fastest_device


MANIFEST = ModelManifest(model_id="lisa", chat_class_path="lisa_hf.inference.lmms_eval_model.LmmsEvalLisa")


class LmmsEvalLisa(lmms):
    """A LISA for lmms-eval.

    Args:
        pretrained: Directory or Hub id of a LISA, such as an export of recipes/export.py.
        device: Device of the model. Default: the GPU, if there is one.
        dtype: Dtype of its weights.
        batch_size: 1.
    """

    is_simple = False

    def __init__(
        self, pretrained: str, device: str | None = None, dtype: str = "auto", batch_size: int | str = 1, **kwargs
    ):
        super().__init__()
        if kwargs or int(batch_size) != 1:
            raise ValueError(
                "expected the model_args pretrained, device and dtype, and a batch_size of 1, got "
                f"{', '.join(kwargs) or f'a batch_size of {batch_size}'}."
            )
        device = device or fastest_device()
        self.processor = LisaProcessor.from_pretrained(pretrained)
        self.model = LisaForConditionalGeneration.from_pretrained(pretrained, dtype=dtype).to(device).eval()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        answers = []
        for request in tqdm(requests, desc="lisa", disable=self.rank != 0):
            _, to_messages, options, doc_id, task, split = request.args
            messages = ChatMessages(messages=to_messages(self.task_dict[task][split][doc_id]))
            answers.append(self._answer(messages, options, f"{task}, document {doc_id}"))
        return answers

    def _answer(self, messages: ChatMessages, options: dict, where: str) -> str:
        images, videos, audios = messages.extract_media()
        if len(images) != 1 or videos or audios:
            raise ValueError(
                f"{where}: expected one image, got {len(images)} images, {len(videos)} videos and {len(audios)} "
                "sounds. Choose a task about single images."
            )
        if options.get("do_sample") or options.get("temperature"):
            raise ValueError(f"{where}: expected greedy decoding, got {options}. Set do_sample=false, temperature=0.")
        # One message has the image before its text, as in training.
        conversation = [
            {
                "role": message.role,
                "content": [
                    *({"type": "image"} for content in message.content if content.type == "image"),
                    *({"type": "text", "text": part.text} for part in message.content if part.type == "text"),
                ],
            }
            for message in messages.messages
        ]
        image = images[0].convert("RGB")
        max_new_tokens = options.get("max_new_tokens", 1024)
        (answer,) = answer_questions(self.model, self.processor, image, [conversation], max_new_tokens)
        text = answer.text
        for end in options.get("until") or ():
            text = text.split(end)[0] if end else text
        return text.strip()

    def loglikelihood(self, requests: list[Instance]):
        raise NotImplementedError(
            "LISA answers in lmms-eval, and gives no likelihoods. Choose tasks of generate_until."
        )

    def generate_until_multi_round(self, requests: list[Instance]):
        raise NotImplementedError("LISA answers single questions in lmms-eval. Choose tasks of generate_until.")
