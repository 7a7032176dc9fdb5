"""lisa_hf: teach any Hugging Face vision-language model to answer with segmentation masks."""

import logging
import sys
from importlib.metadata import version
from importlib.util import find_spec


# transformers imports torchvision if it is installed, and fails deep inside if it was built for another torch.
if find_spec("torchvision"):
    try:
        import torchvision  # noqa: F401
    except Exception as error:
        sys.tracebacklimit = 0  # one line: there is nothing to debug in the code that imports this package
        raise ImportError(
            f"expected a torchvision that matches torch {version('torch')}, got torchvision {version('torchvision')} "
            f"({error}). Install the pair that constraints.txt names, from one index: pip install torch torchvision."
        ) from None

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .data.collator import LisaDataCollator
from .model.configuration_lisa import LisaConfig
from .model.modeling_lisa import LisaForConditionalGeneration
from .model.pipeline_lisa import ReasoningSegmentationPipeline
from .model.processing_lisa import LisaProcessor
from .training.trainer import LisaTrainer


# accelerate imports DeepSpeed if it is installed, even to save a model, and DeepSpeed would warn about a missing GPU.
# To ask here whether one is missing would break CUDA in forked processes, such as those of `notebook_launcher`.
logging.getLogger("DeepSpeed").addFilter(lambda record: "unable to detect it" not in record.getMessage())

AutoConfig.register("lisa", LisaConfig)
AutoModel.register(LisaConfig, LisaForConditionalGeneration)
AutoModelForImageTextToText.register(LisaConfig, LisaForConditionalGeneration)
AutoProcessor.register(LisaConfig, LisaProcessor)
PIPELINE_REGISTRY.register_pipeline("reasoning-segmentation", ReasoningSegmentationPipeline, pt_model=AutoModel)
# Saved models carry copies of these, so that they load where this package is not installed.
LisaConfig.register_for_auto_class()
LisaForConditionalGeneration.register_for_auto_class("AutoModel")
LisaProcessor.register_for_auto_class()

__all__ = ["LisaConfig", "LisaDataCollator", "LisaForConditionalGeneration", "LisaProcessor", "LisaTrainer"]
