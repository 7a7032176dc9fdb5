"""Features of frozen encoders, computed once per image and kept on disk instead of in every epoch.

    cache = FeatureCache("cache", min_decoded_edge=args.min_decoded_edge)
    dataset = MixtureDataset(rows, length, feature_cache=cache)
    cache.build(model, processor, rows, args)  # before the first item is read

The mask model's image encoder is the largest part of a step, and in LISA it is never trained. An entry is a
safetensors file in bfloat16. Its directory is named after the encoders' weights and the preprocessing, and the entry
after the bytes of the image file: any change gives another name, and an image with an entry need not be decoded.
Truncated entries are recomputed, and several processes may write at the same time. A mark
says which rows were read by a finished build, so that the next one does not read their images again.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
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
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import ChainDataset, ConcatDataset, DataLoader, Subset
from tqdm import tqdm
from transformers import TrainingArguments

from ..files import atomic_file
from ..model.mask_backbone import encode_images
from ..model.processing_lisa import ImageInputs, LisaProcessor
from ..model.vlm_backbone import (
    TOKEN_FIELDS,
    encode_images_apart,
    image_encoder,
    sizes_per_image,
    vision_inputs_of,
    vision_tower,
)
from .images import load_row_image, read_file, undecoded


logger = logging.getLogger(__name__)

EMBEDDINGS, VISION_FEATURES = "image_embeddings", "vision_features"  # arguments of the model's forward
# What the model needs to know about an image whose pixels are replaced by features, in addition to the VLM's sizes and
# grids.
KNOWN_INPUTS = ("original_sizes", "reshaped_input_sizes")
VLM_SIZES = "vlm_sizes"
FORMAT = b"3"  # of an entry; each format has its own directory


class FeatureCache:
    """Compute the features of frozen encoders once, and look them up by the bytes of an image file.

    Args:
        root: Directory of all caches. Each combination of encoders and preprocessing has its own subdirectory.
        limit_gb: Maximum size of all entries in GB. Images beyond it are encoded in every step, as without a cache.
            Default: no limit.
        min_decoded_edge: Value of the mixture, so that images are encoded as it decodes them.
    """

    def __init__(self, root: str | Path, limit_gb: float | None = None, min_decoded_edge: int | None = None):
        self.root = Path(root)
        self.limit_gb = limit_gb
        self.min_decoded_edge = min_decoded_edge
        # Set by `build`, from the encoders:
        self.directory: Path | None = None
        self.feature_names: list[str] = []

    @property
    def is_complete(self) -> bool:
        """Whether entries have the features of both encoders, so that the pixels of their images are not needed."""
        return len(self.feature_names) == 2

    # ---- entries ----------------------------------------------------------------------------------------------------

    def path(self, file: bytes) -> Path:
        """Return the path of an image file's entry."""
        name = hashlib.sha256(file).hexdigest()
        return self.directory / name[:2] / f"{name}.safetensors"

    def load(self, file: bytes) -> dict[str, Any] | None:
        """Return the entry of an image file, or None if it does not exist or is damaged.

        An entry has features, `KNOWN_INPUTS` and the VLM's sizes (tensors of one image), `image_text` and
        `type_id_names`. Its `vision_features` are nested fields that hold the names of tensors.
        """
        try:
            with safe_open(self.path(file), framework="pt") as entry:
                return {name: entry.get_tensor(name) for name in entry.keys()} | json.loads(entry.metadata()["texts"])
        except (FileNotFoundError, SafetensorError):
            return None

    def has(self, path: Path) -> bool:
        """Return whether a complete entry exists, from the length in its header and without reading its features."""
        try:
            with safe_open(path, framework="pt"):
                return True
        except (FileNotFoundError, SafetensorError):
            return False

    def save(self, path: Path, entry: dict[str, Any]) -> None:
        """Write an entry completely or not at all.

        Raises:
            ValueError: If the disk is full or the directory cannot be written.
        """
        tensors = {name: value.contiguous() for name, value in entry.items() if isinstance(value, torch.Tensor)}
        texts = {name: value for name, value in entry.items() if name not in tensors}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as incomplete:
                save_file(tensors, incomplete, metadata={"texts": json.dumps(texts)})
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"feature_cache: expected free space in {self.directory}, got {error}. Free some space and start "
                "again, which keeps the existing entries, or set another directory or a feature_cache_limit_gb."
            ) from error

    # ---- building ---------------------------------------------------------------------------------------------------

    def build(
        self,
        model: nn.Module,
        processor: LisaProcessor,
        rows: dict[str, Dataset] | dict[str, IterableDataset],
        args: TrainingArguments,
    ) -> None:
        """Compute the missing entries of the images of `rows`, divided among the processes; a second call resumes.

        All rows are read, including those of streams, unless an earlier build has read the same prepared rows and the
        entries are no fewer and no smaller than they were then.

        Args:
            model: Model as it will be trained. Its frozen encoders are cached.
            processor: Its processor.
            rows: Training rows by source, of `lisa_hf.data.rows.FEATURES`: all, or those that will be drawn. Images of
                others are encoded in every step.
            args: Training arguments: `per_device_train_batch_size` images are encoded at a time, and
                `dataloader_num_workers` read them.

        Raises:
            ValueError: If no encoder is frozen, the disk is too small or full, or encoders are sharded and some images
                would have no entry: processes that encode would deadlock with those that do not.
        """
        model = model.get_base_model() if isinstance(model, PeftModel) else model
        model.to(args.device)
        was_training = model.training
        model.eval()
        encoders = _frozen_encoders(model)
        if VISION_FEATURES in encoders and (reason := _uncacheable_reason(model, processor)):
            logger.warning("Feature cache: the VLM encodes images in every step, because %s.", reason)
            del encoders[VISION_FEATURES]
        if not encoders:
            raise ValueError(
                "feature_cache: expected a frozen encoder, got encoders that are in `trainable` or cannot be cached. "
                "Freeze one, or omit feature_cache."
            )
        self.feature_names = list(encoders)
        self.directory = self.root / _fingerprint(
            encoders, [processor.to_dict(), self.min_decoded_edge, _vision_settings(model.config.vlm_config)]
        )
        sources = [undecoded(source) for source in rows.values()]
        num_images = self._count_fitting_images(sources, model, processor, args.shards_weights)
        mark = self._mark(sources, num_images)
        # Processes that have an entry and others that do not would wait for each other if encoders are sharded.
        if mark is not None and not args.shards_weights and self._is_marked(mark, args):
            logger.info("Feature cache: an earlier run has read these images.")
            model.train(was_training)
            return

        self._encode_missing(model, processor, sources, num_images, args)
        model.train(was_training)
        if args.world_size > 1:
            torch.distributed.barrier()
        if mark is not None and args.process_index == args.world_size - 1:
            mark.parent.mkdir(parents=True, exist_ok=True)  # without entries, it does not exist yet
            with atomic_file(mark) as path:
                path.write_text(json.dumps(self._measure()), encoding="utf-8")

    def _encode_missing(
        self,
        model: nn.Module,
        processor: LisaProcessor,
        sources: list,
        num_images: int | None,
        args: TrainingArguments,
    ) -> None:
        """Compute the missing entries of this process's share.

        Args:
            sources: Prepared rows, all or none of them streams.
            num_images: Number of rows to read, over all processes; None for streams, which are read to their end.
        """
        # 1. This process's share of the first `num_images` images, or of all streams
        if isinstance(sources[0], Dataset):
            share = Subset(ConcatDataset(sources), range(args.process_index, num_images, args.world_size))
        else:
            share = ChainDataset(
                [split_dataset_by_node(source, args.process_index, args.world_size) for source in sources]
            )
        # 2. Loader workers read and preprocess images without an entry; this process encodes them
        loader = DataLoader(
            share,
            batch_size=args.per_device_train_batch_size,
            collate_fn=partial(self._preprocess_missing, processor=processor),
            num_workers=args.dataloader_num_workers,
        )
        progress = tqdm(desc="Feature cache", unit="image", total=num_images, disable=args.process_index > 0)
        num_seen = 0
        for num_rows, paths, image_inputs in loader:
            if paths:
                for path, entry in zip(paths, self._encode(model, processor, image_inputs), strict=True):
                    self.save(path, entry)
            num_seen += num_rows * args.world_size
            progress.update(num_rows * args.world_size)
            if num_images is not None and num_seen >= num_images:
                break
        progress.close()

    def _mark(self, sources: list, num_images: int | None) -> Path | None:
        """Return the file that is there once these rows were read; None for streams, which may change unnoticed."""
        if num_images is None or isinstance(sources[0], IterableDataset):
            return None
        names = json.dumps([num_images, *(rows._fingerprint for rows in sources)])
        return self.directory / f"{hashlib.sha256(names.encode()).hexdigest()[:16]}.json"

    def _is_marked(self, mark: Path, args: TrainingArguments) -> bool:
        """Return whether all processes see a mark, and entries as many and as large as then."""
        try:
            expected = json.loads(mark.read_text(encoding="utf-8"))
            is_marked = all(now >= then for now, then in zip(self._measure(), expected))
        except (FileNotFoundError, ValueError):
            is_marked = False
        if args.world_size == 1:
            return is_marked
        # On disks of their own, only some see it: those that go on would wait forever for those that build.
        everywhere = torch.tensor(int(is_marked), device=args.device)
        torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN)
        return bool(everywhere)

    def _measure(self) -> tuple[int, int]:
        """Return the number of entries and their bytes."""
        sizes = [path.stat().st_size for path in self.directory.glob("*/*.safetensors")]
        return len(sizes), sum(sizes)

    def _preprocess_missing(
        self, rows: list[dict], processor: LisaProcessor
    ) -> tuple[int, list[Path], ImageInputs | None]:
        """Return the number of rows, and the paths and uint8 inputs of their images without an entry.

        Unreadable images are left to training, which reports and counts them.
        """
        images = {}
        for row in rows:
            try:
                path = self.path(read_file(row))
                if path not in images and not self.has(path):
                    images[path] = load_row_image(row, min_decoded_edge=self.min_decoded_edge)
            except (ValueError, OSError, TypeError):
                continue
        if not images:
            return len(rows), [], None
        image_inputs = processor.preprocess_images(
            [image["image"] for image in images.values()],
            [image["original_size"] for image in images.values()],
            do_normalize=False,
        )
        return len(rows), list(images), image_inputs

    @torch.no_grad()
    def _encode(self, model: nn.Module, processor: LisaProcessor, image_inputs: ImageInputs) -> list[dict[str, Any]]:
        """Return the entries of B images, from their uint8 inputs."""
        inputs, num_images = _device_inputs(model, processor, image_inputs), len(image_inputs.image_texts)
        tensors = [{name: inputs[name][i] for name in KNOWN_INPUTS if name in inputs} for i in range(num_images)]
        if EMBEDDINGS in self.feature_names:
            embeddings = encode_images(model.mask_model, inputs["mask_pixel_values"].to(model.mask_model.dtype))
            for index in range(num_images):
                tensors[index] |= dict(_flatten(EMBEDDINGS, embeddings, index))
        texts = [
            {"image_text": text, "type_id_names": image_inputs.type_id_names} for text in image_inputs.image_texts
        ]
        if VISION_FEATURES in self.feature_names:
            ids, vision_inputs = _image_ids(model, processor, image_inputs), vision_inputs_of(model.vlm, inputs)
            indices = torch.arange(num_images, device=model.device)
            for name, sizes in sizes_per_image(model.vlm, vision_inputs, ids, indices, num_images).items():
                for entry, size in zip(tensors, sizes, strict=True):
                    entry[f"{VLM_SIZES}.{name}"] = size
            for entry, text, fields in zip(tensors, texts, encode_images_apart(model.vlm, ids, vision_inputs)):
                text[VISION_FEATURES] = _name_tensors(fields, entry)
        # Copies, because safetensors refuses to save tensors that share memory.
        return [
            {
                name: tensor.to("cpu", torch.bfloat16 if tensor.is_floating_point() else tensor.dtype, copy=True)
                for name, tensor in entry.items()
            }
            | text
            for entry, text in zip(tensors, texts, strict=True)
        ]

    def _count_fitting_images(self, sources: list, model, processor: LisaProcessor, is_sharded: bool) -> int | None:
        """Return how many images fit, estimated from the size of one entry, and log it; None means all of a stream."""
        # Most encoders resize all images to one size; only VLMs that use tiles give more features for larger images.
        example = processor.preprocess_images(PIL.Image.new("RGB", (640, 480)), do_normalize=False)
        (entry,) = self._encode(model, processor, example)
        size = sum(tensor.nbytes for tensor in entry.values() if isinstance(tensor, torch.Tensor)) / 1e9
        existing = next((parent for parent in self.directory.absolute().parents if parent.exists()), Path("/"))
        present = sum(1 for _ in self.directory.glob("*/*.safetensors"))
        free = shutil.disk_usage(existing).free / 1e9
        is_stream = isinstance(sources[0], IterableDataset)
        num_images = None if is_stream else sum(len(rows) for rows in sources)
        needed = float("inf") if is_stream else size * num_images
        logger.info(
            "Feature cache %s: %s of %.2f MB, %s in total (%d exist, %.1f GB are free).",
            self.directory,
            "images of streams" if is_stream else f"{num_images} images",
            size * 1e3,
            "an unknown number of GB" if is_stream else f"{needed:.2f} GB",
            present,
            free,
        )
        if self.limit_gb is not None and needed > self.limit_gb:
            if is_sharded:
                raise ValueError(
                    f"feature_cache_limit_gb: expected {needed:.1f} or more, because sharded encoders need entries "
                    f"for all images or none, got {self.limit_gb}. Raise it, or omit feature_cache."
                )
            num_images = int(self.limit_gb / size)
            logger.warning("The limit of %g GB holds %d images.", self.limit_gb, num_images)
        missing = 0 if num_images is None else size * max(num_images - present, 0)
        if missing > free:
            raise ValueError(
                f"feature_cache: expected {missing:.1f} GB of free disk for {self.directory}, got {free:.1f} GB. Set "
                "another directory or a feature_cache_limit_gb."
            )
        return num_images


def join_entries(entries: list[dict[str, Any]]) -> ImageInputs:
    """Return the image inputs stored in B entries, instead of calling [`LisaProcessor.preprocess_images`]."""
    features = {}
    if any(name.startswith(EMBEDDINGS) for name in entries[0]):
        features[EMBEDDINGS] = _stack(entries, EMBEDDINGS)
    if VISION_FEATURES in entries[0]:
        features[VISION_FEATURES] = [_find_tensors(entry[VISION_FEATURES], entry) for entry in entries]
    inputs = {name: torch.stack([entry[name] for entry in entries]) for name in KNOWN_INPUTS}
    for name in entries[0]:
        if name.startswith(f"{VLM_SIZES}."):
            inputs[name.removeprefix(f"{VLM_SIZES}.")] = torch.cat([entry[name] for entry in entries])
    return ImageInputs(
        inputs=inputs,
        image_texts=[entry["image_text"] for entry in entries],
        type_id_names=entries[0]["type_id_names"],
        cached_features=features,
    )


def _frozen_encoders(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the modules of each frozen encoder, keyed by the feature that they compute."""
    backbone = image_encoder(model.vlm)
    language_model = backbone.get_decoder()
    vision = [child for child in backbone.children() if language_model not in set(child.modules())]
    # Parameters of the backbone itself, such as LLaVA-NeXT's `image_newline`, also affect the features.
    vision.append(nn.ParameterList(backbone.parameters(recurse=False)))
    encoders = {EMBEDDINGS: [model.mask_model.vision_encoder], VISION_FEATURES: vision}
    return {
        name: modules
        for name, modules in encoders.items()
        if not any(parameter.requires_grad for module in modules for parameter in module.parameters())
    }


def _uncacheable_reason(model: nn.Module, processor: LisaProcessor) -> str | None:
    """Return why outputs of the VLM's frozen image encoder cannot replace images, or None. Encodes two images."""
    if vision_tower(model.vlm) is None:
        return "it has no image encoder separate from its language model"
    outputs = []
    for picture in (PIL.Image.new("RGB", (640, 480)), PIL.Image.linear_gradient("L").convert("RGB")):
        image_inputs = processor.preprocess_images(picture, do_normalize=False)
        vision_inputs = vision_inputs_of(model.vlm, _device_inputs(model, processor, image_inputs))
        outputs += encode_images_apart(model.vlm, _image_ids(model, processor, image_inputs), vision_inputs)
    _, tensors = _split_tensors(outputs)
    if any(tensor.requires_grad for tensor in tensors.values()):
        return "its features depend on weights that are trained"
    for name in outputs[0].keys() - {*TOKEN_FIELDS} if isinstance(outputs[0], dict) else ():
        (first, first_tensors), (second, second_tensors) = (_split_tensors(output[name]) for output in outputs)
        if first != second or not all(map(torch.equal, first_tensors.values(), second_tensors.values())):
            return f"`{name}`, which its encoder returns too, differs from image to image"
    return None


def _split_tensors(fields) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return nested fields with their tensors replaced by names, and these tensors by name."""
    tensors = {}
    return _name_tensors(fields, tensors), tensors


def _device_inputs(model: nn.Module, processor: LisaProcessor, image_inputs: ImageInputs) -> dict:
    """Return the inputs of B images on the model's device, with float pixels."""
    inputs = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for name, value in image_inputs.inputs.items()
    }
    processor.normalize_pixels(inputs)
    return inputs


def _image_ids(model: nn.Module, processor: LisaProcessor, image_inputs: ImageInputs) -> torch.Tensor:
    """Return a row of token ids for each of B images, `(B, L)`."""
    ids = processor.tokenizer(image_inputs.image_texts, add_special_tokens=False)["input_ids"]
    return pad_sequence(list(map(torch.tensor, ids)), batch_first=True, padding_value=-1).to(model.device)


def _vision_settings(config) -> dict:
    """Return a VLM's configuration without its language model, such as `vision_feature_layer`."""

    def without_places(fields: dict) -> dict:
        # Where a configuration was loaded from, and by which version, does not change features.
        return {
            name: without_places(value) if isinstance(value, dict) else value
            for name, value in fields.items()
            if name not in ("text_config", "_name_or_path", "transformers_version", "dtype")
        }

    return without_places(config.to_dict())


def _fingerprint(encoders: dict[str, list[nn.Module]], preprocessing: list) -> str:
    """Return a name for weights and preprocessing that is the same only if every bit of them is the same."""
    digest = hashlib.sha256(FORMAT + json.dumps(preprocessing, sort_keys=True, default=str).encode())
    for name, modules in encoders.items():
        digest.update(name.encode())
        for module in modules:
            digest.update(repr(module).encode())
            for key, tensor in module.state_dict().items():
                digest.update(f"{key} {tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _name_tensors(fields, entry: dict[str, torch.Tensor]):
    """Move the tensors of nested fields into an entry and return the fields with names in their place."""
    if isinstance(fields, torch.Tensor):
        name = f"{VISION_FEATURES}.{len(entry)}"
        entry[name] = fields
        return name
    if isinstance(fields, dict):
        return {key: _name_tensors(value, entry) for key, value in fields.items()}
    if isinstance(fields, (list, tuple)):
        return [_name_tensors(value, entry) for value in fields]
    return fields


def _find_tensors(fields, entry: dict[str, Any]):
    """Undo [`_name_tensors`]."""
    if isinstance(fields, str):
        return entry[fields]
    if isinstance(fields, dict):
        return {key: _find_tensors(value, entry) for key, value in fields.items()}
    return [_find_tensors(value, entry) for value in fields] if isinstance(fields, list) else fields


def _flatten(name: str, embeddings, index: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield an image's nested embeddings ([`encode_images`]) as `name`, or `name.0`, `name.1.0`, ..."""
    if isinstance(embeddings, torch.Tensor):
        yield name, embeddings[index]
        return
    for number, part in enumerate(embeddings):
        yield from _flatten(f"{name}.{number}", part, index)


def _stack(entries: list[dict[str, torch.Tensor]], name: str):
    """Return the embeddings of several images, nested as before [`_flatten`]."""
    if name in entries[0]:
        return torch.stack([entry[name] for entry in entries])
    numbers = {int(key.removeprefix(f"{name}.").split(".")[0]) for key in entries[0] if key.startswith(f"{name}.")}
    return [_stack(entries, f"{name}.{number}") for number in sorted(numbers)]
