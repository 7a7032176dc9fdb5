"""From the recipes' arguments to a model, its processor and the data sets."""

from collections.abc import Iterable
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, LlamaTokenizer, PreTrainedConfig
from transformers.utils import is_bitsandbytes_available

from ..chat_templates import load_chat_template
from ..data.mixture import EvaluationDataset, MixtureDataset
from ..data.streaming import StreamingMixtureDataset
from ..from_scratch.initialization import initialize_weights
from ..from_scratch.models import add_template_tokens, build_config_and_processor, build_model, train_tokenizer
from ..model.configuration_lisa import LisaConfig
from ..model.modeling_lisa import LisaForConditionalGeneration
from ..model.processing_lisa import LisaProcessor
from .arguments import LOSS_OPTIONS, DataArguments, LisaTrainingArguments, ModelArguments


def refuse_original(path: str) -> None:
    """Raises a `ValueError` that names the conversion command if a directory, file or Hub id is an original's."""
    local = Path(path)
    if local.is_file():
        source = "sam" if local.suffix == ".pth" else "lisa-train"
    elif (local / "latest").is_file() and not (local / "trainer_state.json").is_file():
        source = "lisa-train"  # a ZeRO checkpoint, and none of Trainer's
    else:
        try:
            config, _ = PreTrainedConfig.get_config_dict(path)
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise OSError(f"There is no model in {path}, neither as a directory nor on the Hub: {reason}") from error
        if "mm_vision_select_layer" not in config:
            return
        source = "lisa" if "train_mask_decoder" in config else "llava"
        if source == "llava" and "delta" in local.name.lower():
            source = "llava-delta"
    download, checkpoint = "", path
    if not local.exists():
        download, checkpoint = f"hf download {path} --local-dir DIRECTORY && ", "DIRECTORY"
    base = {"llava-delta": " --base LLAMA", "lisa-train": " --base LLAVA"}.get(source, "")
    raise ValueError(
        f"{path} is in an original's format, expected transformers'. Convert it: `{download}python "
        f"recipes/convert_weights.py {source} --checkpoint {checkpoint}{base} --output OUTPUT`, and give OUTPUT."
    )


def load_lisa(path: str, **kwargs) -> tuple[LisaForConditionalGeneration, LisaProcessor]:
    """Loads a LISA model and its processor from a directory or the Hub.

    Args:
        kwargs: of `from_pretrained` (`dtype`, `attn_implementation`, ...).

    Raises:
        ValueError: the checkpoint is of another architecture, in an original's format, or an adapter without its
            base.
    """
    load_lisa_config(path)
    return LisaForConditionalGeneration.from_pretrained(path, **kwargs), LisaProcessor.from_pretrained(path)


def load_lisa_config(path: str) -> LisaConfig:
    """The configuration of a LISA model; raises what [`load_lisa`] raises."""
    if (Path(path) / "adapter_config.json").exists() and not (Path(path) / "config.json").exists():
        raise ValueError(
            f"{path} holds a LoRA adapter, not a whole model. Resume its training with `resume_from_checkpoint`, or "
            f"make a whole model of it: `python recipes/export.py {path} --output DIRECTORY`."
        )
    refuse_original(path)
    config = AutoConfig.from_pretrained(path)
    if not isinstance(config, LisaConfig):
        raise ValueError(
            f"{path} is a '{config.model_type}' checkpoint, expected 'lisa'. To start a LISA model from a "
            "vision-language model give it as `vlm`, and a SAM-family model as `mask_model`."
        )
    return config


def load_model_and_processor(
    arguments: ModelArguments, texts: Iterable[str] = (), device_map: str | None = None
) -> tuple[LisaForConditionalGeneration, LisaProcessor]:
    """Loads or builds what the arguments name, see [`load_config_and_processor`] and [`load_model`]."""
    config, processor = load_config_and_processor(arguments, texts)
    return load_model(arguments, config, processor, device_map), processor


def load_config_and_processor(
    arguments: ModelArguments, texts: Iterable[str] = ()
) -> tuple[LisaConfig, LisaProcessor]:
    """What the model will look like, and its processor: everything but the weights.

    Args:
        texts: what a tokenizer is made from if a model from nothing names none.

    Raises:
        ValueError: a checkpoint is of another architecture, in an original's format, or an adapter without its base.
    """
    chat_template = load_chat_template(arguments.chat_template)
    if arguments.vlm_config is not None:
        if arguments.tokenizer:
            tokenizer = load_tokenizer(arguments.tokenizer)
        else:
            tokenizer = train_tokenizer(texts)
            add_template_tokens(tokenizer)
        return build_config_and_processor(
            arguments.vlm_config, arguments.mask_config, tokenizer, chat_template, arguments.language_model
        )
    if arguments.model is not None:
        config, processor = load_lisa_config(arguments.model), LisaProcessor.from_pretrained(arguments.model)
        processor.chat_template = chat_template or processor.chat_template
        return config, processor
    refuse_original(arguments.vlm)
    refuse_original(arguments.mask_model)
    processor = LisaProcessor.from_vlm_mask_model_pretrained(arguments.vlm, arguments.mask_model, chat_template)
    config = LisaConfig(
        vlm_config=AutoConfig.from_pretrained(arguments.vlm),
        mask_config=AutoConfig.from_pretrained(arguments.mask_model),
        seg_token_id=processor.seg_token_id,
    )
    text_config = config.vlm_config.get_text_config()
    text_config.vocab_size = max(text_config.vocab_size, len(processor.tokenizer))
    return config, processor


def load_model(
    arguments: ModelArguments, config: LisaConfig, processor: LisaProcessor, device_map: str | None = None
) -> LisaForConditionalGeneration:
    """Loads the weights that the arguments name: of a LISA model, of a VLM and a mask model, or random ones.

    Args:
        config, processor: from [`load_config_and_processor`].
        device_map: where pretrained weights are put; by default weights in few bits on the GPU, others on the CPU.
    """
    kwargs = {"device_map": device_map}
    if arguments.dtype:
        kwargs["dtype"] = arguments.dtype
    if arguments.load_in_8bit or arguments.load_in_4bit:
        kwargs["quantization_config"] = quantization_config(arguments)
    if arguments.model is not None:
        model = LisaForConditionalGeneration.from_pretrained(arguments.model, **kwargs)
    elif arguments.vlm is not None:
        model = LisaForConditionalGeneration.from_vlm_mask_model_pretrained(
            arguments.vlm, arguments.mask_model, seg_token_id=processor.seg_token_id, **kwargs
        )
        if len(processor.tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(processor.tokenizer))
    else:
        model = build_model(config, arguments.language_model)
        if arguments.language_model is None:
            initialize_weights(model)
        if arguments.dtype:
            model.to(getattr(torch, arguments.dtype))
    if arguments.attn_implementation:
        choose_attention(model, arguments.attn_implementation)
    set_loss_options(model.config, arguments)
    return model


def set_loss_options(config: LisaConfig, arguments: ModelArguments) -> None:
    """Weights of the loss parts and points of masks, where the arguments give them."""
    for name in LOSS_OPTIONS:
        if getattr(arguments, name) is not None:
            setattr(config, name, getattr(arguments, name))


def choose_attention(model: LisaForConditionalGeneration, name: str) -> None:
    """Sets the attention of the VLM, its vision tower included; the mask model keeps SDPA, the fastest that SAM has.

    Raises:
        ValueError: it is unknown, not installed, or not made for this VLM.
    """
    try:
        model.vlm.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise ValueError(f"attn_implementation: {name} cannot be had: {error}") from error


def quantization_config(arguments: ModelArguments) -> BitsAndBytesConfig:
    """How the VLM's frozen weights are held; the defaults are QLoRA's (arXiv 2305.14314).

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if not is_bitsandbytes_available():
        raise ValueError(
            "load_in_8bit and load_in_4bit need bitsandbytes, which is not here: pip install bitsandbytes"
        )
    return BitsAndBytesConfig(
        load_in_8bit=arguments.load_in_8bit,
        load_in_4bit=arguments.load_in_4bit,
        bnb_4bit_quant_type=arguments.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=arguments.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=arguments.bnb_4bit_compute_dtype or arguments.dtype or "bfloat16",
    )


def load_tokenizer(path: str):
    """A tokenizer from the Hub, a directory, or one sentencepiece file (`tokenizer.model`) of the Llama family."""
    if Path(path).is_file():
        return LlamaTokenizer.from_pretrained(str(Path(path).parent), vocab_file=path)
    return AutoTokenizer.from_pretrained(path)


def build_datasets(
    train_rows: dict[str, Dataset] | dict[str, IterableDataset],
    eval_rows: dict[str, Dataset],
    data_args: DataArguments,
    training_args: LisaTrainingArguments,
):
    """The mixture to train on and, per source, the data set to evaluate on."""
    settings = {
        "weights": data_args.weights,
        "seed": training_args.data_seed if training_args.data_seed is not None else training_args.seed,
        "num_questions": data_args.num_questions,
        "explanatory_probability": data_args.explanatory_probability,
        "on_bad_row": data_args.on_bad_row,
        "min_decoded_edge": data_args.min_decoded_edge,
    }
    if data_args.streaming:
        train_dataset = StreamingMixtureDataset(
            train_rows, rank=training_args.process_index, num_ranks=training_args.world_size, **settings
        )
    else:
        length = data_args.num_train_items or sum(len(rows) for rows in train_rows.values())
        train_dataset = MixtureDataset(train_rows, length, **settings)
    return train_dataset, {name: EvaluationDataset(rows) for name, rows in eval_rows.items()}
