"""Arguments of the recipes: three dataclasses, read from a YAML file and the command line.

    python recipes/train.py --config recipes/configs/quickstart.yaml --learning_rate 1e-4 --sources "{shapes: 1.0}"

As in trl and the alignment-handbook, the keys of the file are the names of the arguments, and the command line
overrides the file. A value in the file means what the same text means on the command line: `5e-4` is a number and `no`
a string. Mappings are written in YAML or JSON in both places. Any mistake is reported in one line with exit code 2.
"""

import dataclasses
import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import yaml
from accelerate import ParallelismConfig
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..data.rows import OnBadRow
from ..errors import check_name
from .fsdp import allow_fsdp_on_cpu, is_fsdp_requested
from .parser import ArgumentParser


# Model arguments that become keys of the model's config if they are given.
LOSS_OPTIONS = ("ce_loss_weight", "mask_bce_loss_weight", "mask_dice_loss_weight", "mask_loss_points")
TRAINABLE_PARTS = (
    "seg_projector",
    "mask_decoder",
    "embeddings",
    "vision_tower",
    "multi_modal_projector",
    "mask_encoder",
    "language_model",
)
QUANTIZED_PARTS = ("vision_tower", "multi_modal_projector", "language_model")  # by load_in_8bit and load_in_4bit


@dataclass
class ModelArguments:
    """Arguments for the model: what to build or load, and which parts to train.

    Expects either `model`, or one of `vlm` and `vlm_config` together with one of `mask_model` and `mask_config`.
    """

    model: str | None = HfArg(default=None, help="LISA model to continue from: Hub id or path.")
    vlm: str | None = HfArg(default=None, help="Vision-language model to start from: Hub id or path.")
    mask_model: str | None = HfArg(default=None, help="SAM-family model to start from: Hub id or path.")
    vlm_config: dict | None = HfArg(default=None, help="Config, with `model_type`, of a randomly initialized VLM.")
    mask_config: dict | None = HfArg(default=None, help="Config of a randomly initialized mask model.")
    language_model: str | None = HfArg(
        default=None, help="Language model whose weights initialize the VLM of `vlm_config`: Hub id or path."
    )
    tokenizer: str | None = HfArg(default=None, help="Tokenizer: Hub id or path. Default: the VLM's.")
    chat_template: str | None = HfArg(
        default=None, help="`llava_v1`, `llava_llama_2`, `llava_1_5` or a Jinja file. Default: the VLM's."
    )
    thinking: Literal["off", "on"] | None = HfArg(
        default=None,
        help="Whether the model may think before it answers, if the chat template has this choice; rows may then have "
        "a reasoning_content to train on. Default: the model's (off).",
    )
    image_processor_kwargs: dict = HfArg(
        default_factory=dict,
        help="Options of the VLM's image processor that replace its checkpoint's and are saved with the model, e.g. "
        "{max_pixels: 1048576} for Qwen's VLMs.",
    )
    lora_r: int = HfArg(default=8, help="Rank of LoRA in the language model; 0 disables LoRA.")
    lora_alpha: int = HfArg(default=16, help="LoRA is scaled by lora_alpha / lora_r.")
    lora_dropout: float = HfArg(default=0.05, help="Dropout probability of LoRA's input.")
    lora_target_modules: list[str] = HfArg(
        default_factory=lambda: ["q_proj", "v_proj"],
        help="Linear layers of the language model to add LoRA to, by the last part of their name.",
    )
    use_dora: bool = HfArg(default=False, help="Use DoRA instead of LoRA.")
    load_in_8bit: bool = HfArg(default=False, help="Quantize the frozen weights of the VLM to 8 bits.")
    load_in_4bit: bool = HfArg(default=False, help="Quantize the frozen weights of the VLM to 4 bits (QLoRA).")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = HfArg(default="nf4", help="Data type of 4-bit weights.")
    bnb_4bit_use_double_quant: bool = HfArg(default=True, help="Quantize the scales of 4-bit weights to 8 bits.")
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = HfArg(
        default=None, help="Dtype in which 4-bit weights are multiplied. Default: dtype, else bfloat16."
    )
    trainable: list[str] = HfArg(
        default_factory=lambda: ["seg_projector", "mask_decoder", "embeddings"],
        help=f"Parts that are trained in full, among {', '.join(TRAINABLE_PARTS)}.",
    )
    ce_loss_weight: float | None = HfArg(
        default=None, help="Weight of the text's cross-entropy. Default: the model's (1.0, as in LISA)."
    )
    mask_bce_loss_weight: float | None = HfArg(
        default=None, help="Weight of the masks' cross-entropy. Default: the model's (2.0, as in LISA)."
    )
    mask_dice_loss_weight: float | None = HfArg(
        default=None, help="Weight of the masks' dice loss. Default: the model's (0.5, as in LISA)."
    )
    mask_loss_points: int | None = HfArg(
        default=None,
        help="Number of pixels sampled per mask for the losses, mostly uncertain ones (Mask2Former: 12544). "
        "Default: the model's (0: all pixels, as in LISA).",
    )
    attn_implementation: str | None = HfArg(
        default=None, help="Attention of the VLM: sdpa, eager, flash_attention_2 (no packing), flex_attention, ..."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = HfArg(
        default=None, help="Dtype of the loaded weights. Default (auto): as saved."
    )

    def __post_init__(self):
        if self.dtype == "auto":
            self.dtype = None
        for pair in (("vlm", "vlm_config"), ("mask_model", "mask_config")):
            given = [name for name in ("model", *pair) if getattr(self, name) is not None]
            if len(given) != 1:
                found = " and ".join(given) or "none of them"
                hint = f" Clear what a file sets with `--{given[-1]} null`." if given else ""
                raise ValueError(f"expected one of model, {pair[0]} and {pair[1]}, got {found}.{hint}")
        if (self.vlm_config is None) != (self.mask_config is None):
            raise ValueError(
                "vlm_config, mask_config: expected both (a randomly initialized model) or neither, got one of them."
            )
        for name in ("vlm_config", "mask_config"):
            config = getattr(self, name)
            if config is not None and "model_type" not in config:
                raise ValueError(f"{name}: expected the key `model_type`, got {list(config)}.")
        if self.language_model is not None and self.vlm_config is None:
            raise ValueError("language_model: expected vlm_config with it, got a pretrained VLM, which has its own.")
        for part in self.trainable:
            check_name("trainable", part, TRAINABLE_PARTS)
        for name in ("lora_r", *LOSS_OPTIONS):
            _check_range(self, name, 0)
        _check_range(self, "lora_dropout", 0, 1)
        for name in ("use_dora", "load_in_8bit", "load_in_4bit"):
            if getattr(self, name) and self.lora_r == 0:
                raise ValueError(f"{name}: expected lora_r above 0 with it, got 0.")
        if self.load_in_8bit or self.load_in_4bit:
            self._check_quantization()

    def _check_quantization(self):
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_8bit, load_in_4bit: expected one of them, got both.")
        if self.load_in_8bit and self.use_dora:
            raise ValueError("use_dora: expected load_in_4bit with it, got load_in_8bit, which PEFT cannot combine.")
        if self.vlm_config is not None:
            raise ValueError("load_in_8bit, load_in_4bit: expected a pretrained VLM, got vlm_config.")
        if quantized := [part for part in self.trainable if part in QUANTIZED_PARTS]:
            raise ValueError(
                f"trainable: expected no quantized parts, got {', '.join(quantized)}. Remove them, or load_in_8bit "
                "and load_in_4bit."
            )

    @property
    def source(self) -> str:
        """What the model is built from, for messages."""
        return self.model or " and ".join(filter(None, (self.vlm, self.mask_model))) or "vlm_config, mask_config"

    @property
    def adaptation(self) -> dict:
        """Arguments of `prepare_for_training`."""
        names = ("trainable", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora")
        return {name: getattr(self, name) for name in names}


@dataclass
class DataArguments:
    """Arguments for the data to train and evaluate on.

    After initialization, each value of `sources` is a mapping with `weight`, `split` and the options of the source's
    builder, and each value of `eval_sources` one with `split` and the options of the builder.
    """

    data_dir: str | None = HfArg(default=None, help="Directory of the datasets.")
    sources: dict = HfArg(
        default_factory=dict,
        help="Training sources, e.g. {reason_seg: 1, shapes: {weight: 9, split: train}}. A weight is a share of the "
        "items; without weights: semantic, referring, vqa and reasoning sources 9 : 3 : 3 : 1, as in LISA.",
    )
    eval_sources: dict = HfArg(
        default_factory=dict,
        help="Evaluation sources, e.g. {reason_seg: {split: val}}. Default split: validation.",
    )
    num_questions: int = HfArg(default=3, help="Number of questions to sample about each image.")
    explanatory_probability: float = HfArg(
        default=0.1, help="Probability that a reasoning question asks for an explanation, if there is one."
    )
    max_length: int | None = HfArg(
        default=None, help="Maximum tokens of a row, including image tokens. Default: the model's limit."
    )
    on_bad_row: OnBadRow = HfArg(
        default="skip", help="Whether to raise at a bad record, image, mask or question, or to skip and count it."
    )
    min_decoded_edge: int | None = HfArg(
        default=None,
        help="Minimum pixels of the longer edge when large training JPEGs are decoded at 1/2, 1/4 or 1/8.",
    )
    exclude_refer_val: bool = HfArg(
        default=False, help="Exclude COCO photos of the refer sources' val and test splits from all training sources."
    )
    packing: bool = HfArg(
        default=True, help="Pack questions about an image into one row if the VLM and its attention allow it."
    )
    feature_cache: str | None = HfArg(
        default=None, help="Directory for cached features of frozen encoders, computed once per training image."
    )
    feature_cache_limit_gb: float | None = HfArg(default=None, help="Maximum size of the feature cache in GB.")
    streaming: bool = HfArg(default=False, help="Stream training rows; needs max_steps.")
    num_train_items: int | None = HfArg(
        default=None, help="Number of items (images with questions) per epoch. Default: the rows of all sources."
    )
    max_eval_items: int | None = HfArg(
        default=None, help="Number of rows of each source to evaluate, from the start. Default: all."
    )

    def __post_init__(self):
        self.sources = _complete_options(self, "sources", {"weight": None, "split": "train"})
        unweighted = [name for name, options in self.sources.items() if options["weight"] is None]
        if 0 < len(unweighted) < len(self.sources):
            raise ValueError(f"sources: expected a weight for each of them or for none, got none for {unweighted}.")
        if self.streaming and self.num_train_items is not None:
            raise ValueError(
                f"num_train_items: expected none with streaming, got {self.num_train_items}. A stream is endless, set "
                "max_steps."
            )
        self.eval_sources = _complete_options(self, "eval_sources", {"split": "validation"})
        for name, options in self.eval_sources.items():
            if options.get("on_bad_row", "raise") != "raise":
                raise ValueError(
                    f"eval_sources: {name}: expected no on_bad_row, got {options['on_bad_row']}. Scores over fewer "
                    "rows cannot be compared."
                )
        _check_range(self, "feature_cache_limit_gb", 0)
        for name in ("num_questions", "max_length", "min_decoded_edge", "num_train_items", "max_eval_items"):
            _check_range(self, name, 1)
        _check_range(self, "explanatory_probability", 0, 1)

    @property
    def weights(self) -> dict[str, float] | None:
        """Weights of the training sources by name, or None for LISA's."""
        weights = {name: options["weight"] for name, options in self.sources.items()}
        return None if None in weights.values() else weights


@dataclass
class LisaTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` and a few more; the recipes set LISA's values."""

    # The collator needs columns that the model's forward does not accept.
    remove_unused_columns: bool = HfArg(default=False, help="Keep False: the collator needs all columns.")
    metric_for_best_model: str | None = HfArg(default="giou", help="Metric that selects the best model.")
    # The items of a mixture are random draws already.
    train_sampling_strategy: str = HfArg(default="sequential", help="Order in which items are drawn.")
    # Every process uses all trained weights in every step, even without a mask, except with some VLMs.
    ddp_find_unused_parameters: bool | None = HfArg(
        default=False, help="Keep False: train.py sets it if some images leave weights unused."
    )
    hub_private_repo: bool | None = HfArg(default=True, help="Whether push_to_hub creates a private repository.")
    part_learning_rates: dict = HfArg(
        default_factory=dict,
        help="Learning rates of `lora` and parts in `trainable`, e.g. {lora: 3e-4, mask_decoder: 1e-4}.",
    )
    muon_learning_rate: float | None = HfArg(
        default=None,
        help="Learning rate of Muon, about 0.02 for randomly initialized models, for the matrices of parts trained in "
        "full; AdamW trains the rest. Default: no Muon.",
    )
    compile_mask_encoder: bool = HfArg(
        default=False, help="Compile the mask model's image encoder, whose input shapes never change."
    )
    max_nonfinite_steps: int = HfArg(
        default=10, help="Maximum number of skipped steps without finite loss and gradients; one more stops the run."
    )
    eval_generate: bool = HfArg(default=False, help="Evaluate generated answers as well as teacher-forced ones.")
    generation_max_new_tokens: int = HfArg(default=64, help="Maximum tokens of a generated answer.")
    overwrite_output_dir: bool = HfArg(
        default=False,
        help="Start over in an output_dir with an earlier run: remove its checkpoints, replace its model.",
    )
    dry_run: bool = HfArg(default=False, help="Check some of the data, run one step, save one checkpoint, and report.")

    def __post_init__(self):
        if self.dry_run:
            self.max_steps = self.logging_steps = self.save_steps = 1
            self.save_strategy, self.eval_strategy, self.load_best_model_at_end = "steps", "no", False
            self.report_to, self.resume_from_checkpoint, self.max_nonfinite_steps = "none", None, 0
            self.overwrite_output_dir = True
            # Leaves output_dir unchanged; this names a temporary directory.
            self.output_dir = str(Path(self.output_dir or ".", "dry_run.incomplete"))
        self._initialize_devices()
        self._check_engine()
        # A batch has different numbers of rows and images, so accelerate must not slice it.
        self.accelerator_config.dispatch_batches = False
        if self.deepspeed_plugin is not None:
            # With ZeRO-3, transformers would shard every model, even those that one process needs in full.
            # `zero3_init` sets this when a model is built for training, and Trainer sets it again.
            unset_hf_deepspeed_config()
        for part, rate in self.part_learning_rates.items():
            check_name("part_learning_rates", part, ("lora", *TRAINABLE_PARTS))
            if not isinstance(rate, (int, float)) or rate < 0:
                raise ValueError(f"part_learning_rates: {part}: expected a number from 0, got {rate!r}.")
        _check_range(self, "muon_learning_rate", 0)
        _check_range(self, "max_nonfinite_steps", 0)
        for name in (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            "generation_max_new_tokens",
        ):
            _check_range(self, name, 1)

    def __getstate__(self) -> dict:
        """Omit the token: Trainer pickles its arguments into every checkpoint, which may be shared."""
        return self.__dict__ | {"hub_token": None}

    def _initialize_devices(self):
        has_fsdp, is_distributed = is_fsdp_requested(self.fsdp), "LOCAL_RANK" in os.environ
        shards_on_cpus = has_fsdp and is_distributed and (self.use_cpu or not torch.accelerator.is_available())
        use_cpu = self.use_cpu
        if shards_on_cpus:
            self.use_cpu = False  # would turn FSDP off
        with allow_fsdp_on_cpu() if shards_on_cpus else nullcontext():
            super().__post_init__()
        self.use_cpu = use_cpu
        if has_fsdp:
            # Each process loads its own rows. With this option, from_pretrained would give some those of the first
            # process.
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
            (self.fsdp_plugin_args or {})["cpu_ram_efficient_loading"] = False

    def _check_engine(self):
        if self.device.type == "cpu":  # otherwise DeepSpeed, which accelerate imports, warns about a missing GPU
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if self.accelerator_config.split_batches or self.accelerator_config.dispatch_batches:
            raise ValueError(
                "accelerator_config: expected neither split_batches nor dispatch_batches, got one of them. A batch "
                "cannot be sliced, because its rows and images differ in number."
            )
        self._check_parallelism()
        if self.muon_learning_rate is not None:
            if self.part_learning_rates or self.deepspeed_plugin or self.shards_weights:
                raise ValueError(
                    "muon_learning_rate: expected neither part_learning_rates nor DeepSpeed nor FSDP with it, got one "
                    "of them. Muon needs whole matrices."
                )
            if self.optim not in ("adamw_torch", "adamw_torch_fused"):
                raise ValueError(f"optim: expected adamw_torch(_fused) with muon_learning_rate, got {self.optim}.")
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16: expected a GPU, got a CPU, on which it has no effect. Use bf16, or neither.")
        if self.enable_jit_checkpoint:
            raise ValueError(
                "enable_jit_checkpoint: expected false, got true. recipes/train.py already saves and stops on SIGTERM "
                "and SIGUSR1, at a step that all processes agree on."
            )

    def _check_parallelism(self):
        is_set = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true"
        config = self.parallelism_config or (ParallelismConfig() if is_set else None)
        sizes = {name: getattr(config, name, 1) for name in ("tp_size", "cp_size", "sp_size")}
        if found := [f"{name} {size}" for name, size in sizes.items() if size > 1]:
            raise ValueError(
                f"parallelism_config: expected every process to have its own images, got {', '.join(found)}. The "
                "losses are divided by the labels and masks of all processes, which tensor, context and sequence "
                "parallelism would count several times. Shard the weights instead, with ZeRO-3 or FSDP."
            )

    @property
    def shards_weights(self) -> bool:
        """Whether each process holds only a shard of the weights: ZeRO-3 or FSDP, even if set by the launcher."""
        stage = self.deepspeed_plugin.zero_stage if self.deepspeed_plugin else 0
        return stage == 3 or is_fsdp_requested(self.fsdp)


def parse_arguments(argv: list[str] | None = None) -> tuple[ModelArguments, DataArguments, LisaTrainingArguments]:
    """Parse the file given by `--config`, if any, and the command line, which overrides it.

    Args:
        argv: Command line without the program's name. Default: `sys.argv[1:]`.

    Raises:
        SystemExit: After one line on stderr, with code 2: an unknown key or flag (with the nearest valid name), a
            value of a wrong type, a missing or malformed file, or values that contradict each other.
    """
    parser = ArgumentParser((ModelArguments, DataArguments, LisaTrainingArguments), allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file whose keys are the names of the arguments.")
    parser.add_argument("--device", help="Kind of device: cpu, cuda, mps, ... Default: the fastest, see `use_cpu`.")
    try:
        config = parser.parse_args(argv).config
        values = vars(parser.parse_args(argv, parser.parse_config(config) if config else None))
        del values["config"]
        if device := values.pop("device"):
            values["use_cpu"] = device == "cpu"
        model_args, data_args, training_args = parser.parse_dict(values)
        _check_together(model_args, data_args, training_args, device)
        return model_args, data_args, training_args
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")


def parse_data_arguments(path: str) -> DataArguments:
    """Parse the data arguments of a YAML file, even on a machine that cannot run its training.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file has an unknown key or a value of a wrong type, even for other arguments.
    """
    parser = ArgumentParser((ModelArguments, DataArguments, LisaTrainingArguments), allow_abbrev=False)
    try:
        values = vars(parser.parse_config(path))
        return DataArguments(**{field.name: values[field.name] for field in dataclasses.fields(DataArguments)})
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(str(error) if path in str(error) else f"{path}: {error}") from error


def _check_together(
    model_args: ModelArguments, data_args: DataArguments, training_args: LisaTrainingArguments, device: str | None
):
    if data_args.streaming and training_args.max_steps < 0:
        raise ValueError("max_steps: expected the number of steps with streaming, got none. A stream is endless.")
    if device and training_args.device.type != device:
        raise ValueError(
            f"--device: expected a kind of device on this machine, such as {training_args.device.type}, got {device}. "
            "To choose among several of a kind, set CUDA_VISIBLE_DEVICES."
        )
    if training_args.shards_weights and (model_args.load_in_8bit or model_args.load_in_4bit):
        raise ValueError(
            "load_in_8bit, load_in_4bit: expected neither with ZeRO-3 and FSDP, got one. Quantized weights cannot be "
            "sharded, use ZeRO-2."
        )
    trained = [*model_args.trainable, *(["lora"] if model_args.lora_r else [])]
    if frozen := [part for part in training_args.part_learning_rates if part not in trained]:
        raise ValueError(
            f"part_learning_rates: expected parts that train ({', '.join(trained)}), got {', '.join(frozen)}."
        )


def _check_range(arguments, name: str, low: float, high: float = float("inf")):
    value = getattr(arguments, name)
    if value is not None and not low <= value <= high:
        raise ValueError(f"{name}: expected a number from {low} to {high}, got {value}.")


def _complete_options(arguments: DataArguments, field_name: str, defaults: dict) -> dict[str, dict]:
    """Return the options of each source as a mapping; a number is shorthand for the weight."""
    completed = {}
    for name, options in getattr(arguments, field_name).items():
        if isinstance(options, (int, float)):
            options = {"weight": options}
        if not isinstance(options, dict | None):
            raise ValueError(f"{field_name}: {name}: expected a mapping of options, got {options!r}.")
        completed[name] = defaults | {key: value for key, value in (options or {}).items() if value is not None}
        weight = completed[name].get("weight")
        if weight is not None and "weight" not in defaults:
            raise ValueError(f"{field_name}: {name}: expected no weight, got {weight}. Every row is evaluated.")
        if weight is not None and not (isinstance(weight, (int, float)) and weight > 0):
            raise ValueError(f"{field_name}: {name}: expected a weight above 0, got {weight!r}.")
    return completed
