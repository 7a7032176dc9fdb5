"""lisa_hf: teach any Hugging Face vision-language model to answer with segmentation masks."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .data.collator import LisaDataCollator
from .model.configuration_lisa import LisaConfig
from .model.modeling_lisa import LisaForConditionalGeneration
from .model.pipeline_lisa import ReasoningSegmentationPipeline
from .model.processing_lisa import LisaProcessor
from .training.trainer import LisaTrainer


AutoConfig.register("lisa", LisaConfig)
AutoModel.register(LisaConfig, LisaForConditionalGeneration)
AutoModelForImageTextToText.register(LisaConfig, LisaForConditionalGeneration)
AutoProcessor.register(LisaConfig, LisaProcessor)
PIPELINE_REGISTRY.register_pipeline("reasoning-segmentation", ReasoningSegmentationPipeline, pt_model=AutoModel)
# What a saved model needs in order to load where this package is not installed.
LisaConfig.register_for_auto_class()
LisaForConditionalGeneration.register_for_auto_class("AutoModel")
LisaProcessor.register_for_auto_class()

__all__ = ["LisaConfig", "LisaDataCollator", "LisaForConditionalGeneration", "LisaProcessor", "LisaTrainer"]
