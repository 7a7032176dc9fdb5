"""A LISA in lmms-eval, on a task of three images. Skipped if lmms-eval is not installed."""

import datasets
import numpy as np
import PIL.Image
import pytest


pytest.importorskip("lmms_eval.evaluator")
from lmms_eval.evaluator import simple_evaluate  # noqa: E402
from lmms_eval.models import MODEL_REGISTRY_V2  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402

from lisa_hf.evaluation.predict import answer_questions  # noqa: E402
from lisa_hf.inference.lmms_eval_model import MANIFEST, LmmsEvalLisa  # noqa: E402
from lisa_hf.model.conversation_text import user_message  # noqa: E402


TASK = """
task: tiny_photos
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {rows}}}, token: false}}
test_split: test
output_type: generate_until
doc_to_visual: !function tiny_photos.images
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def test_a_task_of_lmms_eval_is_answered_as_here(tiny, tmp_path):
    model, processor = tiny
    model.eval().save_pretrained(tmp_path / "lisa")
    processor.save_pretrained(tmp_path / "lisa")
    rng = np.random.default_rng(0)
    photos = [PIL.Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)) for _ in range(3)]
    questions = ["What is it?", "Which color?", "Where is it?"]
    expected = [
        answer_questions(model, processor, photo, [[user_message(question)]], max_new_tokens=6)[0].text.strip()
        for photo, question in zip(photos, questions)
    ]
    assert any(expected)
    rows = datasets.Dataset.from_dict({"image": photos, "question": questions, "answer": [*expected[:2], "else"]})
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny_photos.yaml").write_text(TASK.format(rows=tmp_path / "rows.parquet"))
    (tmp_path / "tasks" / "tiny_photos.py").write_text("def images(doc):\n    return [doc['image'].convert('RGB')]\n")

    MODEL_REGISTRY_V2.register_manifest(MANIFEST, overwrite=True)
    results = simple_evaluate(
        model="lisa",
        model_args=f"pretrained={tmp_path / 'lisa'}",
        tasks=["tiny_photos"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks")),
        batch_size=1,
        device="cpu",
        log_samples=True,
    )
    samples = sorted(results["samples"]["tiny_photos"], key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"][0] for sample in samples] == expected
    assert results["results"]["tiny_photos"]["exact_match,none"] == pytest.approx(2 / 3)


def test_what_it_cannot_do_is_said(tiny, tmp_path):
    model, processor = tiny
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="batch_size of 1, got a batch_size of 4"):
        LmmsEvalLisa(str(tmp_path), batch_size=4)
    with pytest.raises(ValueError, match="got max_length"):
        LmmsEvalLisa(str(tmp_path), max_length=4)
    lisa = LmmsEvalLisa(str(tmp_path), device="cpu")
    with pytest.raises(NotImplementedError, match="no likelihoods"):
        lisa.loglikelihood([])
