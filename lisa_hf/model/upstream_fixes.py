"""Workarounds for transformers and PEFT: the version that needs each, its symptom, and when to remove it.

To find out whether one is still needed, make it do nothing and run the test that it names.
"""

from contextlib import contextmanager

from torch import nn


class UpstreamFixesMixin:
    """Defaults of [`~transformers.PreTrainedModel`] that break a model made of two others."""

    # Version: peft 0.21.
    # Symptom: with tied embeddings, PEFT trains copies of embeddings and vocabulary projection that drift apart. It
    #   looks for tied keys of sub-modules only if the outermost class has a mapping; transformers' default is None.
    # Remove when: PEFT reads `all_tied_weights_keys`; tests/training/test_trainable.py.
    _tied_weights_keys = {}

    def save_pretrained(self, save_directory, save_original_format: bool = False, **kwargs):
        """Like transformers', but keys are saved as they are in memory.

        Version: transformers 5.23.
        Symptom: the default `save_original_format=True` renames the keys of the nested VLM. Trainer resumes with a
            plain `load_state_dict`, which does not rename them back, so that the VLM silently stays untrained.
        Remove when: Trainer loads checkpoints with key conversion;
            tests/model/test_modeling.py::test_checkpoint_keys_are_those_in_memory.
        """
        super().save_pretrained(save_directory, save_original_format=save_original_format, **kwargs)


def drop_absent_no_split_modules(model: nn.Module) -> None:
    """Keep only those names in `model._no_split_modules` whose class is in the model.

    Version: transformers 5.23 with accelerate 1.15.
    Symptom: FSDP stops with "Could not find the transformer layer class CLIPTextEmbeddings in the model": CLIP's
        vision tower also names the layers of CLIP's text encoder, which no VLM contains.
    Remove when: accelerate skips absent classes; tests/recipes/test_launchers.py.
    """
    model._no_split_modules &= {type(module).__name__ for module in model.modules()}


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
    Symptom: `save_pretrained` leaves `legacy` out, so that a reloaded tokenizer gives other ids after `[SEG]`.
    Remove when: `tokenizer_config.json` contains it; tests/model/test_processing.py.
    """
    tokenizer.init_kwargs["legacy"] = tokenizer.legacy


@contextmanager
def patched_sam_hq_decoder(decoder: nn.Module):
    """Make `SamHQMaskDecoder` compute the masks of the published SAM-HQ inside this context.

    Version: transformers 5.23.
    Symptom: other masks than SAM-HQ's own code. The decoder drops the image embeddings that its transformer returns
        and upscales those that went in, with rows and columns exchanged.
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
