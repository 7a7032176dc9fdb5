"""Features of frozen encoders, computed once per image and kept on disk instead of in every epoch.

The mask model's image encoder is the largest part of a step, and in LISA it never learns. An entry is a safetensors
file in bfloat16. Its directory is named by the encoders' weights and the preprocessing, the entry by the bytes of the
image's file: whatever changes gives another name, and an image with an entry need not be decoded. An entry that is cut
off is computed again, and many processes may write.
"""

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import ChainDataset, ConcatDataset, DataLoader, Subset
from tqdm import tqdm
from transformers import BatchFeature, TrainingArguments

from ..files import atomic_file
from ..model.mask_backbone import encode_images
from ..model.processing_lisa import LisaProcessor
from ..model.vlm_backbone import split_vision_inputs
from .images import load_row_image, read_file, undecoded


logger = logging.getLogger(__name__)

EMBEDDINGS, VISION_FEATURES = "image_embeddings", "vision_features"  # arguments of the model's forward
PIXELS = {EMBEDDINGS: "mask_pixel_values", VISION_FEATURES: "pixel_values"}  # what they stand for
# What the model and its texts need to know of an image whose features are given.
KNOWN_INPUTS = ("original_sizes", "reshaped_input_sizes", "image_grid_thw")
FORMAT = b"2"  # of an entry; another one has another directory


@dataclass
class FeatureCache:
    """Entries of one set of encoders. See [`build_feature_cache`].

    Args:
        directory: of the entries, made for these encoders and this preprocessing.
        is_complete: whether they are of both encoders, so that the pixels of an image with an entry are not needed.
    """

    directory: Path
    is_complete: bool

    def path(self, file: bytes) -> Path:
        """Where the entry of an image file belongs."""
        name = hashlib.sha256(file).hexdigest()
        return self.directory / name[:2] / f"{name}.safetensors"

    def load(self, file: bytes) -> dict[str, Any] | None:
        """The entry of an image file; None if there is none or it is damaged.

        It has the features and, as [`LisaProcessor.encode_images`] gives them for the image, `KNOWN_INPUTS`,
        `image_text` and `type_id_names`.
        """
        try:
            with safe_open(self.path(file), framework="pt") as entry:
                return {name: entry.get_tensor(name) for name in entry.keys()} | json.loads(entry.metadata()["texts"])
        except (FileNotFoundError, SafetensorError):
            return None

    def has(self, path: Path) -> bool:
        """Whether there is a whole entry, by the length that its header tells; its features are not read."""
        try:
            with safe_open(path, framework="pt"):
                return True
        except (FileNotFoundError, SafetensorError):
            return False

    def save(self, path: Path, tensors: dict[str, torch.Tensor], texts: dict) -> None:
        """Writes an entry whole or not at all.

        Raises:
            ValueError: the disk is full, or the directory cannot be written.
        """
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as incomplete:
                save_file(tensors, incomplete, metadata={"texts": json.dumps(texts)})
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"feature_cache: cannot write to {self.directory}: {error}. Make room and start again, which goes on "
                "behind the entries that are there, or give another directory or a feature_cache_limit_gb."
            ) from error


def join_entries(entries: list[dict[str, Any]]) -> tuple[dict, dict]:
    """What B entries know of their images.

    Returns:
        What [`LisaProcessor.encode_images`] gives beside pixels; and the features, as the model's forward takes them.
    """
    known = {"image_texts": [entry["image_text"] for entry in entries], "type_id_names": entries[0]["type_id_names"]}
    known |= {name: torch.stack([entry[name] for entry in entries]) for name in KNOWN_INPUTS if name in entries[0]}
    features = {}
    if any(name.startswith(EMBEDDINGS) for name in entries[0]):
        features[EMBEDDINGS] = _join(entries, EMBEDDINGS)
    if VISION_FEATURES in entries[0]:
        features[VISION_FEATURES] = [entry[VISION_FEATURES] for entry in entries]
    return known, features


def build_feature_cache(
    directory: str,
    model: nn.Module,
    processor: LisaProcessor,
    rows: dict[str, Dataset] | dict[str, IterableDataset],
    args: TrainingArguments,
    limit_gb: float | None = None,
    min_decoded_edge: int | None = None,
) -> FeatureCache:
    """Computes what is missing for the images of `rows`; each process takes its share, and a second call resumes.

    Every row is read once before the training, also those of streams: whether an image has an entry is then the same
    for all processes, whoever draws it.

    Args:
        model: as it will be trained; of its two encoders the frozen ones are cached.
        rows: training rows by source, of `lisa_hf.data.rows.FEATURES`.
        args: `per_device_train_batch_size` images are encoded at a time and `dataloader_num_workers` read them.
        limit_gb: what all entries may take, in GB; images beyond it are encoded in every step, as without a cache.
        min_decoded_edge: as the mixture's, which it is for: images are encoded as it decodes them.

    Raises:
        ValueError: no encoder is frozen, the disk is too small or full, or encoders are sharded and some images would
            be left out: processes that encode and processes that do not would wait for each other for ever.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    encoders = _frozen_encoders(model)
    if not encoders:
        raise ValueError("feature_cache: expected a frozen encoder, but both of them are in `trainable`")
    fingerprint = _fingerprint(encoders, [processor.to_dict(), min_decoded_edge])
    cache = FeatureCache(Path(directory) / fingerprint, is_complete=len(encoders) == len(PIXELS))
    model.to(args.device)
    was_training = model.training
    model.eval()
    sources = [undecoded(source) for source in rows.values()]
    names = list(encoders)
    num_images = _fitting_images(sources, processor, model, names, cache, limit_gb, is_sharded=args.shards_weights)
    loader = DataLoader(
        _share(sources, num_images, args.process_index, args.world_size),
        batch_size=args.per_device_train_batch_size,
        collate_fn=partial(_missing_images, cache=cache, processor=processor, min_decoded_edge=min_decoded_edge),
        num_workers=args.dataloader_num_workers,
    )
    progress = tqdm(desc="Feature cache", unit="image", total=num_images, disable=args.process_index > 0)
    num_seen = 0
    for num_rows, paths, inputs, texts in loader:
        if paths:
            entries = _encode(model, processor, inputs, texts, names)
            for path, entry, text in zip(paths, entries, texts, strict=True):
                cache.save(path, entry, text)
        progress.update(num_rows * args.world_size)
        num_seen += num_rows * args.world_size
        if num_images is not None and num_seen >= num_images:
            break
    progress.close()
    model.train(was_training)
    if args.world_size > 1:
        torch.distributed.barrier()
    return cache


def _share(sources: list[Dataset] | list[IterableDataset], num_images: int | None, rank: int, num_ranks: int):
    """The rows that one process looks at: of the first `num_images`, or its part of all streams."""
    if isinstance(sources[0], Dataset):
        return Subset(ConcatDataset(sources), range(rank, num_images, num_ranks))
    return ChainDataset([split_dataset_by_node(source, rank, num_ranks) for source in sources])


def _missing_images(
    rows: list[dict], cache: FeatureCache, processor: LisaProcessor, min_decoded_edge: int | None
) -> tuple[int, list, dict, list]:
    """What to encode of some rows.

    Unreadable images are left to the training, which says which they are and counts them.

    Returns:
        The number of rows; for the images without an entry: its paths, compact inputs of both encoders, and texts.
    """
    images = {}
    for row in rows:
        try:
            path = cache.path(read_file(row))
            if path not in images and not cache.has(path):
                images[path] = load_row_image(row, min_decoded_edge=min_decoded_edge)
        except (ValueError, OSError, TypeError):
            continue
    if not images:
        return len(rows), [], {}, []
    inputs = processor.encode_images([image["image"] for image in images.values()], do_normalize=False)
    inputs["original_sizes"] = [image["original_size"] for image in images.values()]
    image_texts, type_id_names = inputs.pop("image_texts"), inputs.pop("type_id_names")
    texts = [{"image_text": text, "type_id_names": type_id_names} for text in image_texts]
    return len(rows), list(images), dict(BatchFeature(inputs, tensor_type="pt")), texts


def _fitting_images(
    sources: list, processor: LisaProcessor, model, names: list[str], cache: FeatureCache, limit_gb, is_sharded: bool
) -> int | None:
    """How many images fit, by the size of one entry; None: all of a stream. What they take is said first."""
    # Encoders see all images in one size; only VLMs that cut images into tiles give more features for larger ones.
    example = processor.encode_images([PIL.Image.new("RGB", (640, 480))], do_normalize=False)
    texts = [{"image_text": example.pop("image_texts")[0], "type_id_names": example.pop("type_id_names")}]
    (entry,) = _encode(model, processor, BatchFeature(example, tensor_type="pt"), texts, names)
    size = sum(tensor.numel() * tensor.element_size() for tensor in entry.values()) / 1e9
    existing = next((parent for parent in cache.directory.absolute().parents if parent.exists()), Path("/"))
    present = sum(1 for _ in cache.directory.glob("*/*.safetensors"))
    free = shutil.disk_usage(existing).free / 1e9
    is_stream = isinstance(sources[0], IterableDataset)
    num_images = None if is_stream else sum(len(rows) for rows in sources)
    needed = float("inf") if is_stream else size * num_images
    logger.info(
        "Feature cache %s: %s of %.2f MB, %s in all (%d are there, %.1f GB are free).",
        cache.directory,
        "images of streams" if is_stream else f"{num_images} images",
        size * 1e3,
        "how many GB is not known" if is_stream else f"{needed:.2f} GB",
        present,
        free,
    )
    if limit_gb is not None and needed > limit_gb:
        if is_sharded:
            raise ValueError(
                f"feature_cache_limit_gb: expected {needed:.1f} or more, found {limit_gb}: with sharded encoders "
                "either all images are cached or none"
            )
        num_images = int(limit_gb / size)
        logger.warning("The limit of %g GB holds %d images.", limit_gb, num_images)
    missing = 0 if num_images is None else size * max(num_images - present, 0)
    if missing > free:
        raise ValueError(
            f"feature_cache: {cache.directory} needs {missing:.1f} GB more and its disk has {free:.1f} GB free; give "
            "another directory or a feature_cache_limit_gb"
        )
    return num_images


@torch.no_grad()
def _encode(
    model: nn.Module, processor: LisaProcessor, inputs: dict, texts: list[dict], names: list[str]
) -> list[dict]:
    """The tensors of each image's entry.

    Args:
        inputs: compact, of B images, as the processor gives them.
        texts: B times `image_text`, whose image tokens tell how many of the VLM's features are of which image.
    """
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    processor.normalize_pixels(inputs)
    entries = [{name: inputs[name][index] for name in KNOWN_INPUTS if name in inputs} for index in range(len(texts))]
    if EMBEDDINGS in names:
        embeddings = encode_images(model.mask_model, inputs[PIXELS[EMBEDDINGS]].to(model.mask_model.dtype))
        for index, entry in enumerate(entries):
            entry |= _split(EMBEDDINGS, embeddings, index)
    if VISION_FEATURES in names:
        indices = torch.arange(len(texts), device=model.device)
        vision_inputs, _ = split_vision_inputs(model.vlm, inputs, indices)
        output = model.vlm.base_model.get_image_features(**vision_inputs, return_dict=True).pooler_output
        if isinstance(output, torch.Tensor):  # (crops, tokens, width) of all images
            ids = processor.tokenizer([text["image_text"] for text in texts], add_special_tokens=False)["input_ids"]
            num_tokens = [row.count(model.vlm.config.image_token_id) for row in ids]
            output = output.split([number * len(output) // sum(num_tokens) for number in num_tokens])
        for entry, features in zip(entries, output, strict=True):
            entry[VISION_FEATURES] = features
    # Copies, since safetensors saves no tensors that share memory.
    return [
        {
            name: tensor.to("cpu", torch.bfloat16 if tensor.is_floating_point() else tensor.dtype, copy=True)
            for name, tensor in entry.items()
        }
        for entry in entries
    ]


def _frozen_encoders(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules, by the feature they make, that have nothing to learn."""
    backbone = model.vlm.base_model
    language_model = backbone.get_decoder()
    encoders = {EMBEDDINGS: [model.mask_model.vision_encoder]}
    # Qwen3-VL's features also enter the language model's layers, which an entry does not hold.
    if model.config.vlm_config.model_type != "qwen3_vl":
        encoders[VISION_FEATURES] = [child for child in backbone.children() if child is not language_model]
    return {
        name: modules
        for name, modules in encoders.items()
        if not any(parameter.requires_grad for module in modules for parameter in module.parameters())
    }


def _fingerprint(encoders: dict[str, list[nn.Module]], preprocessing: list) -> str:
    """A name for weights and preprocessing: the same only if every bit of them is."""
    digest = hashlib.sha256(FORMAT + json.dumps(preprocessing, sort_keys=True, default=str).encode())
    for name, modules in encoders.items():
        digest.update(name.encode())
        for module in modules:
            digest.update(repr(module).encode())
            for key, tensor in module.state_dict().items():
                digest.update(f"{key} {tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _split(name: str, embeddings, index: int) -> dict[str, torch.Tensor]:
    """One image's embeddings, of a form of [`encode_images`], as a flat dict: `name`, or `name.0`, `name.1.0`, ..."""
    if isinstance(embeddings, torch.Tensor):
        return {name: embeddings[index]}
    parts = (_split(f"{name}.{number}", part, index) for number, part in enumerate(embeddings))
    return {key: tensor for part in parts for key, tensor in part.items()}


def _join(entries: list[dict[str, torch.Tensor]], name: str):
    """The embeddings of several images in the form that [`_split`] took."""
    if name in entries[0]:
        return torch.stack([entry[name] for entry in entries])
    indices = {int(key.removeprefix(f"{name}.").split(".")[0]) for key in entries[0] if key.startswith(f"{name}.")}
    return [_join(entries, f"{name}.{index}") for index in sorted(indices)]
