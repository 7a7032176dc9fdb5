"""Workarounds for transformers, PEFT and safetensors: the version that needs each, its symptom, and when to remove it.

To find out whether one is still needed, disable it and run the test that it names.
"""

import os
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from torch import nn


class UpstreamFixesMixin:
    """Defaults of [`~transformers.PreTrainedModel`] that break a model composed of two others."""

    # Version: peft 0.21.
    # Symptom: with tied embeddings, PEFT trains copies of embeddings and vocabulary projection that drift apart. It
    #   looks for tied keys of sub-modules only if the outermost class has a mapping; transformers' default is None.
    # Remove when: PEFT reads `all_tied_weights_keys`; tests/training/test_trainable.py.
    _tied_weights_keys = {}

    def save_pretrained(self, save_directory, save_original_format: bool = False, **kwargs):
        """Like transformers' method, but with keys saved as in memory.

        Version: transformers 5.23.
        Symptom: the default `save_original_format=True` renames the keys of the nested VLM. Trainer resumes with a
            plain `load_state_dict`, which does not rename them back, so that the VLM silently stays untrained.
        Remove when: Trainer loads checkpoints with key conversion;
            tests/model/test_modeling_saving.py::test_checkpoint_keys_are_those_in_memory.
        """
        super().save_pretrained(save_directory, save_original_format=save_original_format, **kwargs)
        share_weights_files(Path(save_directory))

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed, by the name that PEFT reads.

        Version: transformers 5.23 with peft 0.21.
        Symptom: every run with LoRA warns that `is_gradient_checkpointing` is deprecated, which the user never wrote.
        Remove when: PEFT reads `is_activation_checkpointing`; tests/training/test_trainable.py.
        """
        return self.is_activation_checkpointing


def share_weights_files(directory: Path) -> None:
    """Give the weights files of a directory the permissions that any new file has.

    Version: safetensors 0.8.
    Symptom: only the owner can read `*.safetensors`, whatever the umask, so nobody else on a cluster, in a container
        or in a group can load a model that was trained, converted or exported.
    Remove when: safetensors' issue 782 is closed; tests/recipes/test_export.py::test_others_can_read_weights.
    """
    umask = os.umask(0o077)  # it can be read only by setting it
    os.umask(umask)
    for path in directory.glob("*.safetensors"):
        with suppress(PermissionError):  # of another user, or on a file system without permissions
            path.chmod(0o666 & ~umask)


def drop_absent_no_split_modules(model: nn.Module) -> None:
    """Keep only those names in `model._no_split_modules` whose class is in the model.

    Version: transformers 5.23 with accelerate 1.15.
    Symptom: FSDP stops with "Could not find the transformer layer class CLIPTextEmbeddings in the model": CLIP's
        vision tower also names the layers of CLIP's text encoder, which no VLM contains.
    Remove when: accelerate skips absent classes; tests/recipes/test_launchers.py.
    """
    model._no_split_modules &= {type(module).__name__ for module in model.modules()}


def separate_batch_entries(vlm: nn.Module) -> None:
    """Make each row and image of a batch independent of the others in HunYuanVL and Emu3, in place.

    Version: transformers 5.23.
    Symptom: the states of a row depend on its position in the batch, or on the sizes of the other images. HunYuanVL
        numbers images over all rows, and the number is a position; Emu3's convolutions see the padding of an image.
    Remove when: `HunYuanVLModel.get_rope_index` begins with 0 in each row, and `Emu3Model.get_image_features` cuts
        images to their `image_sizes`; tests/model/test_vlms.py::test_states_logits_and_answers_are_the_vlms_own.
    """
    model = vlm.base_model
    if vlm.config.model_type == "hunyuan_vl":
        model.get_rope_index = partial(_rope_index_of_rows, model.get_rope_index)
    elif vlm.config.model_type == "emu3":
        model.get_image_features = partial(_features_of_cut_images, model.get_image_features)


def _rope_index_of_rows(get_rope_index, input_ids, mm_token_type_ids, image_grid_thw, attention_mask):
    """Return positions `(axes, N, L)` and deltas `(N, 1)` of N rows, each about the next image of `image_grid_thw`."""
    masks = [None] * len(input_ids) if attention_mask is None else attention_mask.split(1)
    rows = zip(input_ids.split(1), mm_token_type_ids.split(1), image_grid_thw.split(1), masks, strict=True)
    positions, deltas = zip(*(get_rope_index(*row) for row in rows))
    return torch.cat(positions, dim=1), torch.cat(deltas)


def _features_of_cut_images(get_image_features, pixel_values, image_sizes, **kwargs):
    """Return the output of `get_image_features`, with each image encoded without its padding."""
    images = zip(pixel_values.split(1), image_sizes.split(1), image_sizes.tolist())
    outputs = [
        get_image_features(pixels[:, :, :height, :width], size, **kwargs) for pixels, size, (height, width) in images
    ]
    for name in ("image_tokens", "pooler_output"):
        outputs[0][name] = [entry for output in outputs for entry in output[name]]
    return outputs[0]


def keep_loaded_tying(vlm: nn.Module, vocabulary_projection: nn.Module) -> None:
    """Set in the configuration of a loaded VLM whether its vocabulary projection is tied to its embeddings.

    Version: transformers 5.23.
    Symptom: a VLM whose configuration gives `tie_word_embeddings` only for its language model (InternVL3, Mistral
        Small 3.1) counts as tied. Loading keeps weights apart that differ in the checkpoint, but the next
        `tie_weights` or `resize_token_embeddings` replaces the vocabulary projection with the embeddings.
    Remove when: `resize_token_embeddings` keeps it; tests/model/test_vlms.py::test_a_vocabulary_projection_of_its_own.
    """
    if vocabulary_projection.weight is not vlm.get_input_embeddings().weight:
        for config in (vlm.config, vlm.config.get_text_config()):
            config.tie_word_embeddings = False


def saved_custom_pipelines(module_name: str, custom_pipelines: dict | None) -> dict:
    """Return the pipelines named in a saved configuration if the caller is remote code, and none in this package.

    Version: transformers 5.23.
    Symptom: `pipeline("reasoning-segmentation", ...)` asks for `trust_remote_code=True` although the installed package
        has registered the task, because an entry of the configuration takes precedence over the registry.
    Remove when: the registry takes precedence; tests/model/test_pipeline.py.
    """
    is_remote_code = module_name.startswith("transformers_modules.")
    return (custom_pipelines or {}) if is_remote_code else {}


def keep_llama_legacy(tokenizer) -> None:
    """Make a `LlamaTokenizer` save `legacy`, which decides how the text after a special token is split.

    Version: transformers 5.23.
    Symptom: `save_pretrained` omits `legacy`, so a reloaded tokenizer gives different ids after `[SEG]`.
    Remove when: `tokenizer_config.json` contains it; tests/model/test_processing.py.
    """
    tokenizer.init_kwargs["legacy"] = tokenizer.legacy


@contextmanager
def patched_sam_hq_decoder(decoder: nn.Module):
    """Make `SamHQMaskDecoder` compute the masks of the published SAM-HQ inside this context.

    Version: transformers 5.23.
    Symptom: different masks from SAM-HQ's own code. The decoder drops the image embeddings that its transformer
        returns and upscales the input ones, with rows and columns swapped.
    Remove when: it upscales the transformer's output; tests/conversion/test_convert_sam.py.
    """
    attended = []
    hooks = [
        decoder.transformer.register_forward_hook(lambda module, args, output: attended.append(output[1])),
        decoder.upscale_conv1.register_forward_pre_hook(
            lambda module, args: attended.pop().transpose(2, 3).reshape(args[0].shape)
        ),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
