"""Convert published LISA-like models to `LisaForConditionalGeneration`: keys of LLaVA, SAM and the projector.

A layout has everything that distinguishes these models: the names of the tensors and the prompt protocol. SESAME,
LISA++ and READ use LISA's.
"""

import copy
import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPVisionConfig

from ..model.configuration_lisa import LisaConfig
from ..model.modeling_lisa import LisaForConditionalGeneration
from ..model.processing_lisa import SEG_TOKEN, LisaProcessor
from ..model.self_check import check_against_vlm
from ..model.similarity_points import PointOptions
from .key_tables import Shapes, nest
from .lazy_tensors import LazyTensor
from .llava import (
    LLAVA_KEY_TABLE,
    add_vision_tower,
    convert_llava_tensors,
    generation_config,
    llava_config,
    llava_processor,
    load_original_tokenizer,
    load_vision_settings,
    read_original_config,
    render_template,
    untrained_tokens,
)
from .sam import SAM_KEY_TABLE, sam_config, sam_image_processor
from .saving import ConvertedModel, build_without_weights


logger = logging.getLogger(__name__)

LISA_KEY_TABLE = [
    *nest(LLAVA_KEY_TABLE, "", "vlm."),
    *nest(SAM_KEY_TABLE, "model.visual_model.", "mask_model."),
    (r"model\.text_hidden_fcs\.0\.0\.(weight|bias)", r"seg_projector.linear_1.\1"),
    (r"model\.text_hidden_fcs\.0\.2\.(weight|bias)", r"seg_projector.linear_2.\1"),
]

# In LISA v0, SAM and the projector are in separate files next to the LLaVA.
LISA_V0_KEY_TABLE = [
    *nest(LLAVA_KEY_TABLE, "", "vlm."),
    *nest(SAM_KEY_TABLE, "visual_model.", "mask_model."),
    (r"text_hidden_fcs\.0\.0\.(weight|bias)", r"seg_projector.linear_1.\1"),
    (r"text_hidden_fcs\.0\.2\.(weight|bias)", r"seg_projector.linear_2.\1"),
]

GLAMM_KEY_TABLE = [
    *nest(LLAVA_KEY_TABLE, "", "vlm."),
    *nest(SAM_KEY_TABLE, "model.grounding_encoder.", "mask_model."),
    (r"model\.text_hidden_fcs\.0\.0\.(weight|bias)", r"seg_projector.linear_1.\1"),
    (r"model\.text_hidden_fcs\.0\.2\.(weight|bias)", r"seg_projector.linear_2.\1"),
    (r"model\.region_encoder\..*", None),  # for questions about boxes, which are not supported here
]


# From READ's code for its 13B model; its other numbers are the defaults.
READ_13B_POINTS = PointOptions(count=60, positive=0.6, negative=0.2, stride=1)
READ_13B_WIDTH = 5120


@dataclass(frozen=True)
class LisaLayout:
    """Layout and prompt protocol of a published model.

    Args:
        key_table: Table from the original's names to those of the converted model.
        sam_prefix: Prefix of the names of the original's SAM.
        tokens: Tokens that the original's code adds to LLaVA's, in order.
        chat_template: Name of the template that the original was trained with.
    """

    key_table: list
    sam_prefix: str
    tokens: tuple[str, ...]
    chat_template: str


# By name in `recipes/convert_weights.py`.
LISA_LAYOUTS = {
    # The template is the default of the original's scripts for all its checkpoints, including those on Llama 2.
    "lisa": LisaLayout(LISA_KEY_TABLE, "model.visual_model.", (SEG_TOKEN, "<im_start>", "<im_end>"), "llava_v1"),
    "lisa-v0": LisaLayout(
        LISA_V0_KEY_TABLE, "visual_model.", (SEG_TOKEN, "<im_patch>", "<im_start>", "<im_end>"), "lisa_v0"
    ),
    "glamm": LisaLayout(
        GLAMM_KEY_TABLE,
        "model.grounding_encoder.",
        ("<im_start>", "<im_end>", "<bbox>", "<point>", SEG_TOKEN, "<p>", "</p>"),
        "glamm",
    ),
}

# Fields that the scripts set by default in the configuration of the LLaVA that they start from.
TRAINING_CONFIG = {"mm_use_im_start_end": True, "mm_vision_tower": "openai/clip-vit-large-patch14"}


def convert_lisa(
    tensors: dict[str, LazyTensor],
    directory: Path,
    vision_tower: str | None = None,
    chat_template: str | None = None,
    layout: LisaLayout = LISA_LAYOUTS["lisa"],
) -> ConvertedModel:
    """Convert an original LISA to `LisaForConditionalGeneration` with its processor.

    Args:
        tensors: Tensors of `LISAForCausalLM` or a model like it, LoRA merged, with or without its CLIP tower.
        directory: Directory with `config.json` and tokenizer of the LISA, or of the LLaVA that its training started
            from.
        vision_tower: Directory or Hub id of the CLIP tower; by default the one named in `config.json`.
        chat_template: Name of one of this package's templates, or a Jinja file; by default the layout's.
        layout: Layout of the tensors and its prompt protocol.

    Raises:
        ValueError: If the self-check fails, on a small random model with this configuration and processor.
    """
    # Read settings and tokenizer.
    original_config = read_original_config(directory)
    if layout is LISA_LAYOUTS["glamm"]:
        original_config["mm_use_im_start_end"] = True  # according to its code, whatever its configuration says
    if "train_mask_decoder" not in original_config:  # a LLaVA's, from before the training
        original_config |= TRAINING_CONFIG
    vision_tower = vision_tower or original_config.get("mm_vision_tower")
    vision_config, image_processor = load_vision_settings(vision_tower)
    tokenizer = load_original_tokenizer(
        directory, list(layout.tokens), Shapes.of(tensors)["model.embed_tokens.weight"][0]
    )
    tensors = add_vision_tower(tensors, vision_tower)
    # Build the model without weights, then rename the original's tensors to its own.
    config = lisa_config(original_config, tensors, vision_config, tokenizer, layout.sam_prefix)
    model = build_without_weights(LisaForConditionalGeneration, config)
    model.generation_config = generation_config(config.vlm_config, config.suppress_tokens)
    template = render_template(chat_template or layout.chat_template, original_config)
    processor = LisaProcessor(
        vlm_processor=llava_processor(config.vlm_config, tokenizer, image_processor, template),
        mask_image_processor=sam_image_processor(config.mask_config.vision_config.image_size),
    )
    if "READForCausalLM" in (original_config.get("architectures") or []):
        config.similarity_points = read_points(config)
    config.answer_end_token_id = processor.template.answer_end_token_id
    check_against_vlm(_small_model(config), processor)
    return ConvertedModel(
        model=model,
        tensors=convert_llava_tensors(tensors, len(tokenizer), layout.key_table, prefix="vlm."),
        processor=processor,
    )


def read_points(config: LisaConfig) -> dict:
    """Return the point options of a READ, which are only in its code and differ between 7B and 13B."""
    options = READ_13B_POINTS if config.hidden_size == READ_13B_WIDTH else PointOptions()
    logger.info("Points in addition to [SEG]: %s", options)
    return dataclasses.asdict(options)


def _small_model(config: LisaConfig) -> LisaForConditionalGeneration:
    """Return a random model that takes the same inputs, with two narrow layers in each of its three parts."""
    config = copy.deepcopy(config)
    for part in (config.vlm_config.text_config, config.vlm_config.vision_config, config.mask_config.vision_config):
        part.update({"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2})
        part.update({"intermediate_size": 64, "mlp_dim": 64, "num_key_value_heads": 2, "head_dim": 16})
    with torch.random.fork_rng(devices=[]):
        return LisaForConditionalGeneration(config)


def lisa_config(
    original_config: dict, state_dict: dict, vision_config: CLIPVisionConfig, tokenizer, sam_prefix: str
) -> LisaConfig:
    """Return the configuration of the converted model; arguments as in [`llava_config`] and [`LisaLayout`]."""
    sam_state = {key[len(sam_prefix) :]: value for key, value in state_dict.items() if key.startswith(sam_prefix)}
    return LisaConfig(
        vlm_config=llava_config(original_config, state_dict, vision_config, tokenizer),
        mask_config=sam_config(sam_state),
        seg_token_id=tokenizer.convert_tokens_to_ids(SEG_TOKEN),
        suppress_tokens=untrained_tokens(state_dict, tokenizer),
    )
