"""Choose between the two backends of an image processor, Pillow and torchvision.

transformers has most image processors twice, with a Pillow and a torchvision backend, and loads whichever is
installed. The two resize differently (SAM: up to 0.0175 standard deviations of a pixel). Weights were trained with one
of them, so the backend is part of a checkpoint. It is named by the image processor's type, in published checkpoints
and in ours: `...Fast` is torchvision, `...Pil` is Pillow.
"""

import os

import transformers
from transformers import AutoImageProcessor, BaseImageProcessor, ProcessorMixin
from transformers.image_processing_backends import TorchvisionBackend
from transformers.utils import is_torchvision_available


_TORCHVISION_IS_MISSING = "expected torchvision for {}, got an environment without it. Run `pip install torchvision`."


def image_processor_type(image_processor: BaseImageProcessor) -> str:
    """Return the type name to save for an image processor, which includes its backend."""
    name = type(image_processor).__name__
    return f"{name}Fast" if isinstance(image_processor, TorchvisionBackend) else name


def image_processor_class(name: str) -> type[BaseImageProcessor]:
    """Return the class of an image processor type in a checkpoint, with the backend that the type names.

    A plain name means Pillow if transformers has that backend, as before transformers 5, when most checkpoints were
    published, and in LISA checkpoints saved before their types named a backend.

    Args:
        name: The checkpoint's `image_processor_type`, such as `"SamImageProcessorPil"`.

    Raises:
        ValueError: If transformers has no such image processor, or torchvision is needed and not installed.
    """
    names_torchvision = str(name).endswith("Fast")
    base = str(name).removesuffix("Fast").removesuffix("Pil")
    class_name = base if names_torchvision or not hasattr(transformers, f"{base}Pil") else f"{base}Pil"
    # Without torchvision, a plain name gives a placeholder or, with only a warning, Pillow's class.
    is_placeholder = getattr(getattr(transformers, class_name, None), "is_dummy", False)
    if (names_torchvision or is_placeholder) and not is_torchvision_available():
        raise ValueError(_TORCHVISION_IS_MISSING.format(name))
    return transformers_class(class_name, BaseImageProcessor)


def load_image_processor(path: str | os.PathLike, **kwargs) -> BaseImageProcessor:
    """Load an image processor with the backend named by its checkpoint; Sam's and SamHQ's always with Pillow.

    Args:
        path: Directory or Hub id, of an image processor or of a processor that has one.
        kwargs: Arguments of `from_pretrained`.

    Raises:
        ValueError: If the backend is not installed, see [`image_processor_class`].
    """
    config, _ = BaseImageProcessor.get_image_processor_dict(path, **kwargs)
    # Configurations from before 2023 have no type: transformers infers it from the model's.
    name = config.get("image_processor_type") or type(AutoImageProcessor.from_pretrained(path, **kwargs)).__name__
    if name == "SamImageProcessorFast":
        name = "SamImageProcessorPil"  # what the published weights were trained with, whoever saved them again
    return image_processor_class(name).from_dict(config)


def load_vlm_processor(processor_class: type, path: str | os.PathLike, **kwargs) -> ProcessorMixin:
    """Load the processor of a VLM, with the image processor backend named by its checkpoint.

    Args:
        processor_class: Class of the processor, or `AutoProcessor`.
        path: Directory or Hub id.
        kwargs: Arguments of `from_pretrained`.

    Raises:
        ValueError: If torchvision is needed and not installed.
    """
    image_processor = load_image_processor(path, **kwargs)
    try:
        processor = processor_class.from_pretrained(path, **kwargs)
    except ImportError as error:
        if is_torchvision_available():
            raise
        # The video processors of Qwen, InternVL and others have no other backend.
        raise ValueError(_TORCHVISION_IS_MISSING.format(f"the processor of {path}")) from error
    processor.image_processor = image_processor
    return processor


def transformers_class(name: str, base: type) -> type:
    """Return a transformers class named by a checkpoint. Nothing else is looked up or called for a checkpoint."""
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(
            f"expected the name of a {base.__name__} of transformers in processor_config.json, got '{name}'. Download "
            "the checkpoint again, from a source that you trust."
        )
    return found
