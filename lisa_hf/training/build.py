"""Build a config, a processor, a model and datasets from the recipes' arguments.

This is the only place where models are built. A training run calls the functions in this order:

    config, processor = build_config_and_processor(model_args, train_rows)
    model = build_for_training(model_args, config, training_args)
    train_dataset, eval_datasets = build_datasets(train_rows, eval_rows, data_args, training_args)
"""

import copy
import itertools
import json
from pathlib import Path

import PIL.Image
import torch
from accelerate import init_empty_weights
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import is_bitsandbytes_available

from ..chat_templates import load_chat_template
from ..conversion.fsdp_checkpoints import is_fsdp_checkpoint
from ..conversion.original_formats import raise_if_original_format
from ..data.feature_cache import FeatureCache
from ..data.mixture import EvaluationDataset, MixtureDataset
from ..data.streaming import StreamingMixtureDataset
from ..errors import nearest_name, refuse_damaged_files
from ..from_scratch.configuration import tiny_config_and_processor
from ..from_scratch.initialization import initialize_weights
from ..from_scratch.tokenizer import add_template_tokens, row_texts, train_tokenizer
from ..model.configuration_lisa import LisaConfig
from ..model.modeling_lisa import LisaForConditionalGeneration, keep_random_state
from ..model.processing_lisa import LisaProcessor
from ..model.vlm_backbone import raise_if_not_vlm
from .arguments import LOSS_OPTIONS, DataArguments, LisaTrainingArguments, ModelArguments
from .run_record import RUN_RECORD
from .trainable import prepare_for_training
from .zero import disable_zero3_init, shard_new_weights, zero3_init


def build_config_and_processor(
    model_args: ModelArguments, train_rows: dict[str, Dataset] | dict[str, IterableDataset] | None = None
) -> tuple[LisaConfig, LisaProcessor]:
    """Build the config and the processor of the model that the arguments name: everything except the weights.

    Args:
        model_args: Arguments that name a LISA model, a VLM and a mask model, or the configs of randomly initialized
            ones.
        train_rows: Rows by source. Their texts train a tokenizer if a randomly initialized model names none.

    Raises:
        ValueError: A checkpoint has another architecture or an original format, is an adapter without its base, or its
            image processor lacks one of `image_processor_kwargs`.
    """
    chat_template = load_chat_template(model_args.chat_template)
    with refuse_damaged_files(model_args.source):
        config, processor = _build_config_and_processor(model_args, chat_template, train_rows)
    if model_args.thinking is not None:
        processor.thinking = model_args.thinking == "on"
    config.answer_end_token_id = processor.template.answer_end_token_id
    if model_args.image_processor_kwargs:
        _replace_image_options(processor, model_args.image_processor_kwargs)
    return config, processor


def _build_config_and_processor(
    model_args: ModelArguments, chat_template: str | None, train_rows: dict | None
) -> tuple[LisaConfig, LisaProcessor]:
    if model_args.model is not None:
        config, processor = _load_lisa_config(model_args.model), _load_processor(model_args.model)
        processor.chat_template = chat_template or processor.chat_template
    elif model_args.vlm is not None:
        raise_if_original_format(model_args.vlm)
        raise_if_original_format(model_args.mask_model)
        vlm_config = _load_vlm_config(model_args.vlm)
        raise_if_not_vlm(vlm_config)  # otherwise transformers lists all models, or misses processor files
        processor = LisaProcessor.from_vlm_mask_model_pretrained(model_args.vlm, model_args.mask_model, chat_template)
        config = LisaConfig(
            vlm_config=vlm_config,
            mask_config=AutoConfig.from_pretrained(model_args.mask_model),
            seg_token_id=processor.seg_token_id,
        )
        # Some VLMs have more embeddings than tokens, so the vocabulary grows only if the new tokens do not fit.
        text_config = config.vlm_config.get_text_config()
        text_config.vocab_size = max(text_config.vocab_size, len(processor.tokenizer))
    else:
        if model_args.tokenizer:
            tokenizer = _load_tokenizer(model_args.tokenizer)
        else:
            tokenizer = train_tokenizer(itertools.chain.from_iterable(map(row_texts, (train_rows or {}).values())))
            add_template_tokens(tokenizer)
        config, processor = tiny_config_and_processor(
            model_args.vlm_config, model_args.mask_config, tokenizer, chat_template, model_args.language_model
        )
    return config, processor


def build_model(
    model_args: ModelArguments, config: LisaConfig, device_map: str | None = None, empty: bool = False
) -> LisaForConditionalGeneration:
    """Build the model that the arguments name, and load or initialize its weights.

    Args:
        model_args: Arguments for the weights, their dtype and quantization, the attention and the loss weights.
        config: Config from [`build_config_and_processor`].
        device_map: Device of pretrained weights. Default: the GPU if they are quantized, else the CPU.
        empty: Whether to build the model on the meta device, where weights take no memory.
    """
    if empty:
        model = _build_empty_model(model_args, config)
    elif model_args.model is not None or model_args.vlm is not None:
        with refuse_damaged_files(model_args.source):
            model = _load_pretrained_model(model_args, config, device_map)
    else:
        with disable_zero3_init():
            model = _initialize_model(model_args, config)
    attention = model_args.attn_implementation
    # The other kernels need as much memory as the default, and may need a GPU that is missing.
    if attention and (attention == "eager" or not empty):
        try:
            # The mask model keeps SDPA, the fastest attention that SAM has.
            model.vlm.set_attn_implementation(attention)
        except (ImportError, ValueError) as error:
            raise ValueError(f"attn_implementation '{attention}' is not available: {error}") from error
    model.config.answer_end_token_id = config.answer_end_token_id
    for name in LOSS_OPTIONS:
        if getattr(model_args, name) is not None:
            setattr(model.config, name, getattr(model_args, name))
    return model


def build_for_training(
    model_args: ModelArguments, config: LisaConfig, training_args: LisaTrainingArguments
) -> LisaForConditionalGeneration | PeftModel:
    """Build the model and choose what trains. With ZeRO-3, no process holds more than a shard of pretrained weights.

    Args:
        model_args: See [`build_model`].
        config: Config from [`build_config_and_processor`].
        training_args: Arguments that name the engine.
    """
    with zero3_init(training_args):
        model = build_model(model_args, config)
        shard_new_weights(model)
        model = prepare_for_training(model, **model_args.adaptation)
        shard_new_weights(model)
    return model


def load_lisa(path: str, **kwargs) -> tuple[LisaForConditionalGeneration, LisaProcessor]:
    """Load a LISA model and its processor for inference.

    Args:
        path: Directory or Hub id.
        kwargs: Of `from_pretrained` (`dtype`, `attn_implementation`, ...).

    Raises:
        ValueError: The checkpoint has another architecture or an original format, or is an adapter without its base.
    """
    with refuse_damaged_files(path):
        _load_lisa_config(path)
        model, processor = LisaForConditionalGeneration.from_pretrained(path, **kwargs), _load_processor(path)
    return model, processor


def _load_processor(path: str) -> LisaProcessor:
    """Load a processor, and try it on a picture: some of its options are read then alone."""
    processor = LisaProcessor.from_pretrained(path)
    processor.preprocess_images(PIL.Image.new("RGB", (32, 32)))
    return processor


def load_vlm(path: str, **kwargs) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a VLM and its processor, possibly out of a LISA.

    Args:
        path: Directory or Hub id.
        kwargs: Of `from_pretrained` (`dtype`, `attn_implementation`, ...).
    """
    if AutoConfig.from_pretrained(path).model_type != LisaConfig.model_type:
        return AutoModelForImageTextToText.from_pretrained(path, **kwargs), AutoProcessor.from_pretrained(path)
    model, processor = load_lisa(path, **kwargs)
    return model.vlm, unwrap_vlm_processor(processor)


def unwrap_vlm_processor(processor: LisaProcessor) -> ProcessorMixin:
    """Return the processor of the VLM, with LISA's chat template."""
    processor.vlm_processor.chat_template = processor.chat_template or processor.vlm_processor.chat_template
    return processor.vlm_processor


def build_datasets(
    train_rows: dict[str, Dataset] | dict[str, IterableDataset],
    eval_rows: dict[str, Dataset],
    data_args: DataArguments,
    training_args: LisaTrainingArguments,
) -> tuple[MixtureDataset | StreamingMixtureDataset, dict[str, EvaluationDataset]]:
    """Build the mixture to train on and, for each evaluation source, the dataset to evaluate on."""
    if not train_rows:
        raise ValueError("sources: expected at least one training source, got none")
    options = {
        "weights": data_args.weights,
        "seed": training_args.data_seed if training_args.data_seed is not None else training_args.seed,
        "num_questions": data_args.num_questions,
        "explanatory_probability": data_args.explanatory_probability,
        "on_bad_row": data_args.on_bad_row,
        "min_decoded_edge": data_args.min_decoded_edge,
    }
    if data_args.feature_cache is not None:
        options["feature_cache"] = FeatureCache(
            data_args.feature_cache, data_args.feature_cache_limit_gb, data_args.min_decoded_edge
        )
    if data_args.streaming:
        train_dataset = StreamingMixtureDataset(
            train_rows, rank=training_args.process_index, num_ranks=training_args.world_size, **options
        )
    else:
        length = data_args.num_train_items or sum(len(rows) for rows in train_rows.values())
        train_dataset = MixtureDataset(train_rows, length, **options)
    return train_dataset, {name: EvaluationDataset(rows) for name, rows in eval_rows.items()}


def _load_vlm_config(path: str) -> PreTrainedConfig:
    """Load a VLM's config. Unless it says otherwise, it ties the embeddings if its language model does."""
    config, (values, _) = AutoConfig.from_pretrained(path), PreTrainedConfig.get_config_dict(path)
    tied = getattr(config.get_text_config(), "tie_word_embeddings", None)
    if tied is not None and "tie_word_embeddings" not in values:
        config.tie_word_embeddings = tied  # as in the weights of InternVL3; transformers' default is True
    return config


def _load_lisa_config(path: str) -> LisaConfig:
    directory = Path(path)
    if not (directory / "config.json").exists():
        export = f"`python recipes/export.py {path} --output DIRECTORY`"
        if (directory / "adapter_config.json").exists():
            raise ValueError(
                f"{path}: expected a whole model, got a LoRA adapter. Resume its training with "
                f"`resume_from_checkpoint`, or merge it into its base: {export}."
            )
        if (directory / RUN_RECORD).exists():
            raise ValueError(
                f"{path}: expected a finished run, got one without its final model. Finish it with "
                f"`--resume_from_checkpoint auto`, or export its newest checkpoint: {export}."
            )
    if is_fsdp_checkpoint(directory):
        raise ValueError(
            f"{path}: expected a whole model, got FSDP shards. Resume their training with "
            f"`resume_from_checkpoint`, or merge them: `python recipes/export.py {path} --output DIRECTORY`."
        )
    raise_if_original_format(path)
    config = AutoConfig.from_pretrained(path)
    if not isinstance(config, LisaConfig):
        raise ValueError(
            f"{path}: expected a 'lisa' checkpoint, got '{config.model_type}'. To start a LISA model from a "
            "vision-language model, pass it as `vlm`, and a SAM-family model as `mask_model`."
        )
    return config


def _load_pretrained_model(
    model_args: ModelArguments, config: LisaConfig, device_map: str | None
) -> LisaForConditionalGeneration:
    kwargs = {"device_map": device_map}
    if model_args.dtype:
        kwargs["dtype"] = model_args.dtype
    if model_args.load_in_8bit or model_args.load_in_4bit:
        kwargs["quantization_config"] = _quantization_config(model_args)
    if model_args.model is not None:
        return LisaForConditionalGeneration.from_pretrained(model_args.model, **kwargs)
    model = LisaForConditionalGeneration.from_vlm_mask_model_pretrained(
        model_args.vlm, model_args.mask_model, seg_token_id=config.seg_token_id, **kwargs
    )
    vocab_size = config.get_text_config().vocab_size
    if vocab_size > model.get_input_embeddings().num_embeddings:
        with keep_random_state():  # in shards, tied weights are drawn twice
            model.resize_token_embeddings(vocab_size)
    return model


def _initialize_model(model_args: ModelArguments, config: LisaConfig) -> LisaForConditionalGeneration:
    model = LisaForConditionalGeneration(config)
    if model_args.language_model is None:
        initialize_weights(model)
    else:
        # Only the language model is pretrained; transformers initializes the rest.
        language_model = AutoModelForCausalLM.from_pretrained(model_args.language_model)
        language_model.resize_token_embeddings(config.get_text_config().vocab_size)
        model.vlm.base_model.language_model.load_state_dict(language_model.base_model.state_dict())
        model.get_output_embeddings().load_state_dict(language_model.get_output_embeddings().state_dict())
        model.tie_weights()
    return model.to(getattr(torch, model_args.dtype)) if model_args.dtype else model


def _build_empty_model(model_args: ModelArguments, config: LisaConfig) -> LisaForConditionalGeneration:
    # Qwen3-VL's configuration has a dtype for its language model only.
    saved = (config.vlm_config.dtype, config.get_text_config().dtype, config.dtype)
    dtype = next((dtype for dtype in (model_args.dtype, *saved) if dtype), torch.float32)
    with init_empty_weights():
        model = LisaForConditionalGeneration(copy.deepcopy(config))  # models modify their config
    model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    model.tie_weights()
    return model


def _quantization_config(model_args: ModelArguments) -> BitsAndBytesConfig:
    if not is_bitsandbytes_available():
        raise ValueError(
            "load_in_8bit, load_in_4bit: expected bitsandbytes to be installed, got no such package. Install it with "
            "`pip install bitsandbytes`."
        )
    return BitsAndBytesConfig(
        load_in_8bit=model_args.load_in_8bit,
        load_in_4bit=model_args.load_in_4bit,
        bnb_4bit_quant_type=model_args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model_args.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=model_args.bnb_4bit_compute_dtype or model_args.dtype or "bfloat16",
    )


def _replace_image_options(processor: LisaProcessor, options: dict) -> None:
    """Replace the VLM's image processor with one that has other options."""
    image_processor = processor.vlm_processor.image_processor
    known = image_processor.valid_kwargs.__annotations__
    for name in options:
        if name not in known:
            raise ValueError(
                f"image_processor_kwargs: expected options of {type(image_processor).__name__}, got `{name}`. Did you "
                f"mean `{nearest_name(name, known)}`?"
            )
    # As JSON, like a checkpoint's: the old options have special types.
    values = json.loads(image_processor.to_json_string()) | options
    processor.vlm_processor.image_processor = type(image_processor)(**values)


def _load_tokenizer(path: str):
    """Load a tokenizer from the Hub, a directory, or a sentencepiece file (`tokenizer.model`) of the Llama family."""
    if Path(path).is_file():
        return LlamaTokenizer.from_pretrained(str(Path(path).parent), vocab_file=path)
    return AutoTokenizer.from_pretrained(path)
