"""Answer questions about many images: in batches, on several processes, and resumable after an interruption."""

import glob
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import PIL.Image
from accelerate import PartialState
from tqdm import tqdm

from ..files import atomic_file
from ..model.conversation_text import user_message
from ..model.images import load_image
from ..model.modeling_lisa import LisaForConditionalGeneration
from ..model.pipeline_lisa import answer_prompts
from ..model.processing_lisa import LisaProcessor
from .annotation_files import answer_record


# Suffixes of images in a directory. Unreadable ones, such as .heic without a Pillow plugin, are reported.
SUFFIXES = {".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"}
SUFFIXES |= {".heic", ".heif"}


def find_images(sources: list[str]) -> dict[str, str]:
    """Find the images of files, directories, patterns and URLs, in a fixed order.

    Args:
        sources: Paths, glob patterns and URLs. Directories are searched recursively, without hidden files: macOS puts
            `._a.jpg` next to a.jpg on other disks, and Jupyter keeps copies of files.

    Returns:
        Paths and URLs by name. The name of a file is its path relative to the deepest directory that contains all of
        them.

    Raises:
        ValueError: If a source has no image.
    """
    urls = [source for source in sources if source.startswith(("http://", "https://"))]
    paths = []
    for source in sources:
        if source in urls:
            continue
        path = Path(source).expanduser()
        if path.is_file():
            found = [path]
        elif path.is_dir():
            found = sorted(file for file in path.rglob("*") if _is_visible_image(file.relative_to(path)))
        else:
            found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
        if not found:
            raise ValueError(f"--image: expected a file, a directory or a pattern of images, got none at {source!r}.")
        paths += [Path(os.path.abspath(file)) for file in found]
    root = os.path.commonpath([path.parent for path in paths]) if paths else ""
    return {path.relative_to(root).as_posix(): str(path) for path in paths} | {url: url for url in urls}


def _is_visible_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.parts)


def read_questions(path: Path) -> list[dict[str, str]]:
    """Read questions from a JSON Lines file: `question`, and optionally `label` and `image`.

    Args:
        path: The file. A `label` is the name of the masks in labeling tools, by default the question. A question with
            the name of an `image` is asked about that image only, otherwise about all.

    Raises:
        ValueError: If a line has another form.
    """
    questions = []
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            question = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: expected JSON, got {error}.") from error
        names = question.keys() if isinstance(question, dict) else []
        if "question" not in names or set(names) - {"question", "label", "image"}:
            raise ValueError(
                f"{path}, line {number}: expected an object with `question` and optionally `label` and `image`, got "
                f"{line.strip()[:100]}."
            )
        questions.append(question)
    return questions


def questions_by_image(images: dict[str, str], questions: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Return the questions about each image, without images that have none.

    Raises:
        ValueError: If a question is empty or names an unknown image.
    """
    for question in questions:
        if not (isinstance(question["question"], str) and question["question"].strip()):
            raise ValueError(f"expected a question of at least one word, got {question['question']!r}.")
    if unknown := {question.get("image", "") for question in questions} - {"", *images}:
        raise ValueError(
            f"expected questions about one of the images ({', '.join(list(images)[:3])}, ...), got one about "
            f"{min(unknown)}. An image's name is its path relative to the directory that holds all images."
        )
    asked = {name: [question for question in questions if question.get("image", name) == name] for name in images}
    return {name: questions for name, questions in asked.items() if questions}


def open_output_dir(
    output_dir: Path, settings: dict[str, Any], images: dict[str, str], overwrite: bool, planned: Iterable[Path] = ()
) -> bool:
    """Create the directory of the answers, or check that existing answers were made with the same settings.

    Args:
        output_dir: The directory.
        settings: What answers depend on, as JSON values.
        images: Paths and URLs by name, to view the answers later. They may move between two runs.
        overwrite: Whether to replace answers with other settings, and files that are not answers. A single answer,
            from a first try, is always replaced.
        planned: Files that will be written next to the answers.

    Returns:
        Whether there are answers with the same settings, which are kept.

    Raises:
        ValueError: If there are answers with other settings, or files where answers will be written.
    """
    path, is_same = output_dir / "settings.json", False
    if not path.exists() and not overwrite:
        for file in (*planned, output_dir / "predictions.jsonl"):
            if file.exists():
                raise ValueError(
                    f"expected no file at the path of an answer, got {file}. Name another --output_dir, or replace "
                    "it with --overwrite."
                )
    if path.exists():
        known = json.loads(path.read_text("utf-8"))
        records = read_records(output_dir)
        changed = [name for name in settings if known.get(name) != settings[name]]
        if changed and not overwrite and len(records) > 1:
            raise ValueError(
                f"expected the settings with which the predictions in {output_dir} were made, got others: "
                f"{', '.join(changed)}. Name another --output_dir, or replace them with --overwrite."
            )
        is_same = not (changed or overwrite)
        if not is_same:
            num_masks = max((len(record.get("masks", ())) for record in records.values()), default=0)
            old = [output_dir / f"mask_{index}.png" for index in range(num_masks)] if len(records) == 1 else []
            old += [output_dir / "overlay.png"] if old else []
            for file in [*old, *output_dir.glob("predictions*.jsonl"), path]:
                file.unlink(missing_ok=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as incomplete:
        incomplete.write_text(json.dumps(settings | {"images": images}, ensure_ascii=False), "utf-8")
    return is_same


def label_images(
    model: LisaForConditionalGeneration,
    processor: LisaProcessor,
    images: dict[str, str],
    questions: dict[str, list[dict[str, str]]],
    output_dir: Path,
    batch_size: int = 1,
    max_new_tokens: int = 256,
) -> list[dict[str, Any]]:
    """Write answers to questions about images to `predictions.jsonl`, resuming an interrupted run.

    A batch has the same images in every run and on any number of processes, and is answered as a whole, so the result
    equals that of an uninterrupted run. Unreadable images are reported and skipped; the next run retries them.

    Args:
        model: A LISA in evaluation mode.
        processor: The model's processor.
        images: Paths and URLs by name, see [`find_images`].
        questions: Questions about each image, see [`questions_by_image`].
        output_dir: Directory of `predictions.jsonl`. Until all processes are done, each has its own file there.
        batch_size: Number of images in a batch, each with all its questions.
        max_new_tokens: Longest answer, in tokens.

    Returns:
        One record per question, see [`answer_record`], in the order of the images; on the main process only.
    """
    state = PartialState()
    names = list(questions)
    batches = [names[start : start + batch_size] for start in range(0, len(names), batch_size)]
    known = read_records(output_dir)
    state.wait_for_everyone()  # before anything is written: all processes must find the same batches to do
    todo = [batch for batch in batches if not all(_is_answered(known, name, questions[name]) for name in batch)]
    mine = todo[state.process_index :: state.num_processes]
    progress = tqdm(total=sum(map(len, mine)), unit="image", disable=not state.is_local_main_process)
    with (
        progress,
        open(output_dir / f"predictions.{state.process_index}.jsonl", "a", encoding="utf-8") as file,
        ThreadPoolExecutor(max_workers=1) as executor,
    ):
        file.write("\n" * (file.tell() > 0))  # a killed process may have left an incomplete line
        # The next batch's images are read while the model answers.
        loading = [executor.submit(_read_images, [images[name] for name in batch]) for batch in mine[:1]]
        for number, batch in enumerate(mine):
            opened = loading.pop().result()
            if number + 1 < len(mine):
                loading.append(executor.submit(_read_images, [images[name] for name in mine[number + 1]]))
            records = _answer_batch(model, processor, batch, opened, questions, max_new_tokens)
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
            file.flush()
            progress.update(len(batch))
    state.wait_for_everyone()
    if not state.is_main_process:
        return []
    return _merge_records(output_dir, questions)


def read_records(output_dir: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Read the answers in a directory by image and question, without the incomplete lines of killed processes."""
    records = {}
    for path in sorted(output_dir.glob("predictions*.jsonl")):
        for line in path.read_text("utf-8").split("\n"):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            key = record["image"], record["question"]
            if "text" in record or key not in records:  # an unreadable image may have been answered later
                records[key] = record
    return records


def _is_answered(records: dict, image: str, questions: list[dict[str, str]]) -> bool:
    return all("text" in records.get((image, question["question"]), {}) for question in questions)


def _read_images(sources: list[str]) -> list[PIL.Image.Image | ValueError]:
    """Read images. Unreadable ones are represented by their errors."""

    def read(source: str) -> PIL.Image.Image | ValueError:
        try:
            return load_image(source)
        except ValueError as error:
            return error

    return list(map(read, sources))


def _answer_batch(
    model, processor, names: list[str], opened: list, questions: dict[str, list[dict]], max_new_tokens: int
) -> list[dict[str, Any]]:
    """Return the records of all questions about a batch of images."""
    asked, records = [], []  # (index of the image, question)
    for name, image in zip(names, opened):
        if isinstance(image, ValueError):
            tqdm.write(f"{name}: skipped: {image}")
            records += [
                {"image": name, "question": question["question"], "error": str(image)} for question in questions[name]
            ]
        else:
            asked += [(name, image, question) for question in questions[name]]
    if not asked:
        return records
    readable = {name: image for name, image, _ in asked}
    prompts = [
        processor.apply_chat_template([user_message(question["question"])], add_generation_prompt=True, tokenize=False)
        for _, _, question in asked
    ]
    answers = answer_prompts(
        model,
        processor,
        list(readable.values()),
        prompts,
        image_indices=[list(readable).index(name) for name, _, _ in asked],
        max_new_tokens=max_new_tokens,
    )
    return records + [
        answer_record(name, question["question"], answer, question.get("label"))
        for (name, _, question), answer in zip(asked, answers)
    ]


def _merge_records(output_dir: Path, questions: dict[str, list[dict]]) -> list[dict[str, Any]]:
    """Merge the files of all processes into one, in order, and remove them."""
    known = read_records(output_dir)
    records = [known[name, question["question"]] for name in questions for question in questions[name]]
    with atomic_file(output_dir / "predictions.jsonl") as incomplete:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        incomplete.write_text("".join(lines), "utf-8")
    for path in output_dir.glob("predictions.*.jsonl"):
        path.unlink()
    return records
