"""LisaConfig: a vision-language model (VLM), a SAM-family mask model and what connects them."""

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import logging

from .upstream_fixes import saved_custom_pipelines


logger = logging.get_logger(__name__)

# Code of `pipeline("reasoning-segmentation")` for environments without this package.
CUSTOM_PIPELINES = {
    "reasoning-segmentation": {"impl": "pipeline_lisa.ReasoningSegmentationPipeline", "pt": ["AutoModel"]}
}


# Mask models whose encoder returns a feature pyramid and whose image processor stretches images to a square.
FEATURE_PYRAMID_MODELS = ("sam2", "sam3_tracker", "edgetam")
SUPPORTED_MASK_MODELS = ("sam", "sam_hq", *FEATURE_PYRAMID_MODELS)
# SAM 2, SAM 3 and EdgeTAM are published as video models, which contain an image model.
IMAGE_MODEL_TYPES = {"sam2_video": "sam2", "sam3_tracker_video": "sam3_tracker", "edgetam_video": "edgetam"}

PARTS = ("vision_config", "prompt_encoder_config", "mask_decoder_config")  # of each of these models

SEG_STATES = ("predicting", "own", "own_before_norm")


def image_mask_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of the image model for the published configuration of a mask model.

    Args:
        config: Configuration of an image model, which is returned, or of a video model. Build the model from the
            returned one: the decoder reads its options only once.
    """
    vision_config = getattr(config, "vision_config", None)
    if isinstance(vision_config, dict):  # `model_type` is one that has none: the parts say what the model is
        model_type = str(vision_config.get("model_type")).removesuffix("_vision_model")
        logger.warning(
            "A mask model of type %s has the parts of %s, and is used as such.", config.model_type, model_type
        )
        config = AutoConfig.for_model(model_type, **{name: getattr(config, name, None) for name in PARTS})
    config = getattr(config, "tracker_config", config)  # sam3_video is a detector and a tracker
    if config.model_type in IMAGE_MODEL_TYPES:
        parts = {}
        for name in PARTS:
            parts[name] = getattr(config, name).to_dict()
            if name != "vision_config":  # the image model has its own classes for these
                del parts[name]["model_type"]
        model_type = IMAGE_MODEL_TYPES[config.model_type]
        config = AutoConfig.for_model(model_type, **parts, initializer_range=config.initializer_range)
    if config.model_type in FEATURE_PYRAMID_MODELS:
        # In evaluation, the decoder would replace an unstable single mask with one of its other three. LISA trains
        # only the single mask, so this would return untrained masks.
        config.mask_decoder_config.dynamic_multimask_via_stability = False
    return config


class LisaConfig(PreTrainedConfig):
    """Configuration of [`LisaForConditionalGeneration`].

    Args:
        vlm_config: Configuration, or dict with `model_type`, of any image-text-to-text model in transformers.
        mask_config: Configuration, or dict with `model_type`, of a SAM-family model: `sam`, `sam_hq`, `sam2`,
            `sam3_tracker` or `edgetam`. That of a video model (`sam2_video`, `sam3_video`, `sam3_tracker_video`,
            `edgetam_video`) is replaced with the image model's.
        seg_token_id: Id of `[SEG]`. The hidden state that predicts it becomes a mask (LISA, section 3.2).
        answer_end_token_id: Id of the token that ends answers in the chat template. Generation stops there, in
            addition to the ids in the VLM's generation config, which may have a different end (Qwen3.5) or none.
        ce_loss_weight, mask_bce_loss_weight, mask_dice_loss_weight: Weights of the three losses; the defaults are
            those of LISA's training script.
        mask_loss_points: Number of pixels per mask that the mask losses are computed on, see [`sampled_mask_losses`]
            (Mask2Former: 12544). The default, 0, uses all pixels, as LISA does.
        seg_state: Hidden state that becomes a mask's prompt: "predicting", the one that predicts `[SEG]` (LISA);
            "own", that of `[SEG]` itself (Sa2VA), which is missing if an answer is cut off there; "own_before_norm",
            the same before the language model's last norm (Sa2VA on Qwen3-VL).
        video_mask_decoding: Whether masks are decoded like SAM 2's video model decodes a frame without points (Sa2VA):
            with the prompt after two padding points, as the best mask by estimated IoU, resized first to the mask
            model's input and then to the image.
        similarity_points: Options for choosing points that prompt the mask decoder in addition to `[SEG]` (READ):
            fields of [`PointOptions`]. None for no points.
        suppress_tokens: Ids whose logits are minus infinity in loss and generation, for tokens that a conversion
            appended to the vocabulary (`<image>`, `<pad>`) and that the original model could not predict.
    """

    model_type = "lisa"
    sub_configs_defaults = {
        "vlm_config": SubConfigSpec(config_class=AutoConfig, model_type="llava"),
        "mask_config": SubConfigSpec(config_class=AutoConfig, model_type="sam"),
    }

    vlm_config: dict | PreTrainedConfig | None = None
    mask_config: dict | PreTrainedConfig | None = None
    seg_token_id: int | None = None
    answer_end_token_id: int | None = None
    ce_loss_weight: float = 1.0
    mask_bce_loss_weight: float = 2.0
    mask_dice_loss_weight: float = 0.5
    mask_loss_points: int = 0
    seg_state: str = "predicting"
    video_mask_decoding: bool = False
    similarity_points: dict | None = None
    suppress_tokens: list[int] | None = None

    def __post_init__(self, custom_pipelines: dict | None = None, **kwargs):
        if self.seg_state not in SEG_STATES:
            raise ValueError(f"seg_state: expected one of {', '.join(SEG_STATES)}, got '{self.seg_state}'. Name one.")
        self.custom_pipelines = saved_custom_pipelines(__name__, custom_pipelines)
        super().__post_init__(**kwargs)
        self.mask_config = image_mask_config(self.mask_config)
        # PEFT asks the whole model, and without this would warn about embeddings that are not tied at all.
        self.tie_word_embeddings = getattr(self.vlm_config, "tie_word_embeddings", False)

    def to_dict(self) -> dict:
        return {**super().to_dict(), "custom_pipelines": CUSTOM_PIPELINES}

    @property
    def states_at(self) -> str:
        """Where [`record_states`] finds the states that become masks."""
        return "before_norm" if self.seg_state == "own_before_norm" else "projection"

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """Return the language model's configuration, where transformers looks for sizes and cache settings."""
        return self.vlm_config.get_text_config(*args, **kwargs)

    @property
    def hidden_size(self) -> int:
        """The width of the language model, from which DeepSpeed computes its "auto" values."""
        return self.get_text_config().hidden_size
