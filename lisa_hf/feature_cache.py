"""Features of frozen encoders, computed once per image and kept on disk instead of in every epoch.

The mask model's image encoder is the largest part of a step, and in LISA it never learns. An entry is a safetensors
file in bfloat16. Its directory is named by the encoders' weights and the preprocessing, the file by the pixels of the
image: whatever changes gives another name. An entry that is cut off is computed again, and many processes may write.
"""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import TrainingArguments

from .mask_backbone import encode_images
from .mixture import load_image, undecoded
from .processing_lisa import LisaProcessor
from .vlm_backbone import split_vision_inputs


logger = logging.getLogger(__name__)

EMBEDDINGS, VISION_FEATURES = "image_embeddings", "vision_features"  # arguments of the model's forward
PIXELS = {EMBEDDINGS: "mask_pixel_values", VISION_FEATURES: "pixel_values"}  # what they stand for


@dataclass
class FeatureCache:
    """Entries of one set of encoders. See [`build_feature_cache`].

    Args:
        directory: of the entries, made for these encoders and this preprocessing.
    """

    directory: Path

    def path(self, image: PIL.Image.Image) -> Path:
        pixels = hashlib.sha256(repr(image.size).encode() + image.convert("RGB").tobytes()).hexdigest()
        return self.directory / pixels[:2] / f"{pixels}.safetensors"

    def load(self, image: PIL.Image.Image) -> dict[str, torch.Tensor] | None:
        """The entry of an image; None if there is none or it is damaged."""
        try:
            return load_file(self.path(image))
        except (FileNotFoundError, SafetensorError):
            return None

    def save(self, path: Path, features: dict[str, torch.Tensor]) -> None:
        """Writes an entry whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        try:
            save_file({name: tensor.contiguous() for name, tensor in features.items()}, unfinished)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def put_into(self, batch: dict, images: list[PIL.Image.Image]) -> None:
        """Replaces the pixels of a batch by features, in place, if there is an entry for each of its images."""
        entries = [self.load(image) for image in images]
        if None in entries:
            return
        if any(name.startswith(EMBEDDINGS) for name in entries[0]):
            batch[EMBEDDINGS] = _join(entries, EMBEDDINGS)
            del batch[PIXELS[EMBEDDINGS]]
        if VISION_FEATURES in entries[0]:
            batch[VISION_FEATURES] = [entry[VISION_FEATURES] for entry in entries]
            del batch[PIXELS[VISION_FEATURES]]


def build_feature_cache(
    directory: str,
    model: nn.Module,
    processor: LisaProcessor,
    rows: dict[str, Dataset],
    args: TrainingArguments,
    limit_gb: float | None = None,
) -> FeatureCache:
    """Computes what is missing for the images of `rows`; each process takes its share, and a second call resumes.

    Args:
        model: as it will be trained; of its two encoders the frozen ones are cached.
        rows: training rows by source, of `lisa_hf.schema.FEATURES`.
        limit_gb: what all entries may take, in GB; images beyond it are encoded in every step, as without a cache.

    Raises:
        ValueError: no encoder is frozen, the disk is too small, or encoders are sharded and some images would be left
            out: processes that encode and processes that do not would wait for each other for ever.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    encoders = _frozen_encoders(model)
    if not encoders:
        raise ValueError("feature_cache: expected a frozen encoder, but both of them are in `trainable`")
    cache = FeatureCache(Path(directory) / _fingerprint(encoders, processor))
    model.to(args.device)
    was_training = model.training
    model.eval()
    images = _Images(list(rows.values()), cache, processor)
    if len(images):
        num_images = _fitting_images(images, model, list(encoders), cache, limit_gb, is_sharded=args.shards_weights)
        share = torch.utils.data.Subset(images, range(args.process_index, num_images, args.world_size))
        loader = DataLoader(share, batch_size=None, num_workers=args.dataloader_num_workers)
        for path, inputs in tqdm(loader, desc="Encoding images", unit="image", disable=args.process_index > 0):
            if inputs is not None:
                cache.save(path, _encode(model, inputs, list(encoders)))
    model.train(was_training)
    if args.world_size > 1:
        torch.distributed.barrier()
    return cache


class _Images(torch.utils.data.Dataset):
    """Where the entry of an image belongs, and the model's inputs if it is not there. Unreadable images are left to
    the training, which says which they are and counts them."""

    def __init__(self, sources: list[Dataset], cache: FeatureCache, processor: LisaProcessor):
        self.rows = torch.utils.data.ConcatDataset([undecoded(rows) for rows in sources])
        self.cache, self.processor = cache, processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Path | None, dict | None]:
        try:
            image = load_image(self.rows[index])
        except ValueError:
            return None, None
        path = self.cache.path(image)
        return path, None if self.cache.load(image) else dict(self.processor(images=image))


def _fitting_images(images: _Images, model, names: list[str], cache: FeatureCache, limit_gb, is_sharded: bool) -> int:
    """How many images fit, by the size of one entry; what all of them take is said first."""
    # Encoders see all images in one size; only VLMs that cut images into tiles give more features for larger ones.
    example = PIL.Image.new("RGB", (640, 480))
    features = _encode(model, dict(images.processor(images=example)), names)
    size = sum(tensor.numel() * tensor.element_size() for tensor in features.values()) / 1e9
    existing = next((parent for parent in cache.directory.absolute().parents if parent.exists()), Path("/"))
    present = sum(1 for _ in cache.directory.glob("*/*.safetensors"))
    free = shutil.disk_usage(existing).free / 1e9
    needed = size * len(images)
    logger.info(
        "Feature cache %s: %d images of %.2f MB, %.2f GB in all (%d are there, %.1f GB are free).",
        *(cache.directory, len(images), size * 1e3, needed, present, free),
    )
    if limit_gb is not None and needed > limit_gb:
        num_images = int(limit_gb / size)
        if is_sharded:
            raise ValueError(
                f"feature_cache_limit_gb: expected {needed:.1f} or more, found {limit_gb}: with sharded encoders "
                "either all images are cached or none"
            )
        logger.warning("The limit of %g GB holds %d of %d images.", limit_gb, num_images, len(images))
    else:
        num_images = len(images)
    missing = size * max(num_images - present, 0)
    if missing > free:
        raise ValueError(
            f"feature_cache: {cache.directory} needs {missing:.1f} GB more and its disk has {free:.1f} GB free; give "
            "another directory or a feature_cache_limit_gb"
        )
    return num_images


@torch.no_grad()
def _encode(model: nn.Module, inputs: dict, names: list[str]) -> dict[str, torch.Tensor]:
    """The entry of one image from the processor's output for it."""
    inputs = {name: value.to(model.device) for name, value in inputs.items() if torch.is_tensor(value)}
    features = {}
    if EMBEDDINGS in names:
        embeddings = encode_images(model.mask_model, inputs[PIXELS[EMBEDDINGS]].to(model.mask_model.dtype))
        features |= _split(EMBEDDINGS, embeddings)
    if VISION_FEATURES in names:
        vision_inputs, _ = split_vision_inputs(model.vlm, inputs, torch.zeros(1, dtype=torch.long))
        output = model.vlm.base_model.get_image_features(**vision_inputs, return_dict=True).pooler_output
        features[VISION_FEATURES] = output[0] if isinstance(output, (list, tuple)) else output
    return {name: tensor.to("cpu", torch.bfloat16) for name, tensor in features.items()}


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


def _fingerprint(encoders: dict[str, list[nn.Module]], processor: LisaProcessor) -> str:
    """A name for weights and preprocessing: the same only if every bit of them is."""
    digest = hashlib.sha256(json.dumps(processor.to_dict(), sort_keys=True, default=str).encode())
    for name, modules in encoders.items():
        digest.update(name.encode())
        for module in modules:
            digest.update(repr(module).encode())
            for key, tensor in module.state_dict().items():
                digest.update(f"{key} {tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _split(name: str, embeddings) -> dict[str, torch.Tensor]:
    """Embeddings of one image in a form of [`encode_images`] as a flat dict: `name`, or `name.0`, `name.1.0`, ..."""
    if isinstance(embeddings, torch.Tensor):
        return {name: embeddings[0]}
    parts = (_split(f"{name}.{index}", part) for index, part in enumerate(embeddings))
    return {key: tensor for part in parts for key, tensor in part.items()}


def _join(entries: list[dict[str, torch.Tensor]], name: str):
    """The embeddings of several images in the form that [`_split`] took."""
    if name in entries[0]:
        return torch.stack([entry[name] for entry in entries])
    indices = {int(key.removeprefix(f"{name}.").split(".")[0]) for key in entries[0] if key.startswith(f"{name}.")}
    return [_join(entries, f"{name}.{index}") for index in sorted(indices)]
