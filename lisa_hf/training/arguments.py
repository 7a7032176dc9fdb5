"""Arguments of the recipes: three dataclasses, read from a YAML file and the command line.

    python recipes/train.py --config recipes/configs/quickstart.yaml --learning_rate 1e-4 --sources "{shapes: 1.0}"

As in trl and the alignment-handbook, the keys of the file are the names of the arguments, and the command line wins
over the file. A value in the file means what the same text means on the command line, so `5e-4` is a number and `no` a
string. Mappings are written in YAML or JSON in both places. Whatever is wrong is said in one line, with exit code 2.
"""

import dataclasses
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from .parser import ArgumentParser, nearest


logger = logging.getLogger(__name__)

# Arguments that become keys of the model's configuration, where they are given.
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
    """Which model is built or loaded, and which parts of it learn.

    Either `model`, or one of `vlm` and `vlm_config` together with one of `mask_model` and `mask_config`.
    """

    model: str | None = field(default=None, metadata={"help": "LISA model to continue from: Hub id or path."})
    vlm: str | None = field(default=None, metadata={"help": "Vision-language model to start from: Hub id or path."})
    mask_model: str | None = field(default=None, metadata={"help": "SAM-family model to start from: Hub id or path."})
    vlm_config: dict | None = field(
        default=None, metadata={"help": "Configuration, with `model_type`, of a VLM with random weights."}
    )
    mask_config: dict | None = field(
        default=None, metadata={"help": "Configuration, with `model_type`, of a mask model with random weights."}
    )
    language_model: str | None = field(
        default=None,
        metadata={"help": "Language model whose weights go into the VLM of `vlm_config`: Hub id or path."},
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer: Hub id or path; default: the VLM's."})
    chat_template: str | None = field(
        default=None, metadata={"help": "`llava_v1`, `llava_llama_2` or a Jinja file; default: the VLM's."}
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA in the language model; 0: no LoRA."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout probability at the input of LoRA."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"],
        metadata={"help": "Linear layers of the language model that get LoRA, by the last part of their name."},
    )
    use_dora: bool = field(default=False, metadata={"help": "DoRA instead of LoRA: directions and lengths apart."})
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Hold the VLM's frozen weights in 8 bits; needs bitsandbytes."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Hold the VLM's frozen weights in 4 bits (QLoRA); needs bitsandbytes."}
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = field(default="nf4", metadata={"help": "The 16 values of 4 bits."})
    bnb_4bit_use_double_quant: bool = field(
        default=True, metadata={"help": "Hold the scales of 4-bit weights in 8 bits, as QLoRA."}
    )
    bnb_4bit_compute_dtype: str | None = field(
        default=None, metadata={"help": "Type in which 4-bit weights are multiplied; default: dtype, else bfloat16."}
    )
    trainable: list[str] = field(
        default_factory=lambda: ["seg_projector", "mask_decoder", "embeddings"],
        metadata={"help": f"Parts that are trained in full, among {', '.join(TRAINABLE_PARTS)}."},
    )
    ce_loss_weight: float | None = field(
        default=None, metadata={"help": "Weight of the text's cross entropy; default: the model's (1.0, as LISA)."}
    )
    mask_bce_loss_weight: float | None = field(
        default=None, metadata={"help": "Weight of the masks' cross entropy; default: the model's (2.0, as LISA)."}
    )
    mask_dice_loss_weight: float | None = field(
        default=None, metadata={"help": "Weight of the masks' dice loss; default: the model's (0.5, as LISA)."}
    )
    mask_loss_points: int | None = field(
        default=None,
        metadata={
            "help": "Train the mask losses on so many pixels of each mask, most of them where the model is unsure, as "
            "Mask2Former does with 12544: less memory and time with photos; default: the model's (0: all, as LISA)."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention of the VLM: sdpa, eager, flash_attention_2 (no packing), flex_attention, ...; default: "
            "transformers' choice."
        },
    )
    dtype: str | None = field(
        default=None,
        metadata={"help": "Type in which weights are loaded (float32, bfloat16, ...); default: as saved."},
    )

    def __post_init__(self):
        for pair in (("vlm", "vlm_config"), ("mask_model", "mask_config")):
            given = [name for name in ("model", *pair) if getattr(self, name) is not None]
            if len(given) != 1:
                raise ValueError(
                    f"expected one of model, {pair[0]} and {pair[1]}, found {' and '.join(given) or 'none of them'}"
                    + (f"; `--{given[-1]} null` clears what a file sets" if given else "")
                )
        if (self.vlm_config is None) != (self.mask_config is None):
            raise ValueError("vlm_config and mask_config: expected both (a model from nothing) or none, found one")
        for name in ("vlm_config", "mask_config"):
            config = getattr(self, name)
            if config is not None and "model_type" not in config:
                raise ValueError(f"{name}: expected a `model_type` among its keys, found {list(config)}")
        if self.language_model is not None and self.vlm_config is None:
            raise ValueError("language_model: expected beside vlm_config only, since a loaded VLM brings its own")
        for part in self.trainable:
            if part not in TRAINABLE_PARTS:
                raise ValueError(f"trainable: unknown part `{part}`, {nearest(part, TRAINABLE_PARTS)}")
        for name in ("use_dora", "load_in_8bit", "load_in_4bit"):
            if getattr(self, name) and self.lora_r == 0:
                raise ValueError(f"{name}: expected beside lora_r above 0, found lora_r 0")
        if self.load_in_8bit or self.load_in_4bit:
            self._check_quantization()
        for name in ("lora_r", *LOSS_OPTIONS):
            _check_range(self, name, 0)
        _check_range(self, "lora_dropout", 0, 1)

    @property
    def adaptation(self) -> dict:
        """What `prepare_for_training` takes of them."""
        names = ("trainable", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora")
        return {name: getattr(self, name) for name in names}

    def _check_quantization(self):
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_8bit, load_in_4bit: expected one of them, found both")
        if self.load_in_8bit and self.use_dora:
            raise ValueError(
                "use_dora: expected load_in_4bit beside it, found load_in_8bit, which PEFT cannot join to it"
            )
        if self.vlm_config is not None:
            raise ValueError(
                "vlm_config: expected no load_in_8bit and load_in_4bit beside it: random weights must train"
            )
        if quantized := [part for part in self.trainable if part in QUANTIZED_PARTS]:
            raise ValueError(
                f"trainable: {', '.join(quantized)} cannot train, since load_in_8bit and load_in_4bit hold "
                f"{', '.join(QUANTIZED_PARTS)} in few bits. Leave one of the two out"
            )


@dataclass
class DataArguments:
    """What the model is trained and evaluated on.

    After initialisation, each value of `sources` is a mapping with `weight`, `split` and the builder's own options,
    each value of `eval_sources` one with `split` and the builder's own options.
    """

    data_dir: str | None = field(default=None, metadata={"help": "Directory of the data sets."})
    sources: dict = field(
        default_factory=dict,
        metadata={
            "help": "Training sources, e.g. {reason_seg: 1, shapes: {weight: 9, split: train}}: each has its weight's "
            "share of the items, by default LISA's: semantic, referring, vqa and reasoning 9 : 3 : 3 : 1, and the "
            "sources of a kind alike; other keys are options of the source's builder."
        },
    )
    eval_sources: dict = field(
        default_factory=dict,
        metadata={
            "help": "Evaluation sources, e.g. {reason_seg: {split: validation}}, which is also the default split."
        },
    )
    num_questions: int = field(default=3, metadata={"help": "Questions sampled about one image."})
    explanatory_probability: float = field(
        default=0.1, metadata={"help": "Share of reasoning questions that ask for an explanation, where there is one."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest text row, in tokens with the image's; default: the model's limit."}
    )
    on_bad_row: Literal["skip", "raise"] = field(
        default="skip", metadata={"help": "What to do about an unreadable image or mask: skip and count it, or stop."}
    )
    min_decoded_edge: int | None = field(
        default=None,
        metadata={
            "help": "Decode a training JPEG at 1/2, 1/4 or 1/8 of its size if that divides both edges and leaves the "
            "longer one so many pixels: less time for large photos, slightly other pixels. 1024 suits SAM; a VLM "
            "whose image tokens grow with the photo (Qwen, Idefics3) sees a smaller one. Default: in full, as in "
            "evaluation."
        },
    )
    exclude_refer_val: bool = field(
        default=False,
        metadata={
            "help": "Train without the COCO photos in a val or test split of the refer sources in data_dir, in all "
            "sources on COCO photos."
        },
    )
    packing: bool = field(
        default=True, metadata={"help": "Let questions about an image share one row where VLM and attention allow it."}
    )
    feature_cache: str | None = field(
        default=None,
        metadata={
            "help": "Directory of frozen encoders' features, computed once per training image, also of streams."
        },
    )
    feature_cache_limit_gb: float | None = field(default=None, metadata={"help": "GB that it may take; default: all."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Make the training rows while they are read, instead of preparing them; needs max_steps."},
    )
    num_train_items: int | None = field(
        default=None, metadata={"help": "Items (images with questions) per epoch; default: the rows of all sources."}
    )
    max_eval_items: int | None = field(
        default=None, metadata={"help": "Evaluate on the first so many rows of each source; default: all."}
    )

    def __post_init__(self):
        self.sources = _complete_options(self, "sources", {"weight": None, "split": "train"})
        unweighted = [name for name, options in self.sources.items() if options["weight"] is None]
        if 0 < len(unweighted) < len(self.sources):
            raise ValueError(f"sources: expected a weight for each of them or for none, found none for {unweighted}")
        if self.streaming and self.num_train_items is not None:
            raise ValueError("num_train_items: expected none with streaming, which has no end; give max_steps")
        self.eval_sources = _complete_options(self, "eval_sources", {"split": "validation"})
        for name, options in self.eval_sources.items():
            if options.get("on_bad_row", "raise") != "raise":
                raise ValueError(
                    f"eval_sources: {name}: expected no on_bad_row, found {options['on_bad_row']}: a score over fewer "
                    "rows is another score"
                )
        _check_range(self, "feature_cache_limit_gb", 0)
        for name in ("num_questions", "max_length", "min_decoded_edge", "num_train_items", "max_eval_items"):
            _check_range(self, name, 1)
        _check_range(self, "explanatory_probability", 0, 1)

    @property
    def weights(self) -> dict[str, float] | None:
        """Weights of the training sources by their names, or None for LISA's."""
        weights = {name: options["weight"] for name, options in self.sources.items()}
        return None if None in weights.values() else weights


@dataclass
class LisaTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments`, with the defaults that LISA needs and its own settings."""

    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "Keep False: the collator needs columns that the model's forward does not take."},
    )
    metric_for_best_model: str | None = field(default="giou", metadata={"help": "Metric that chooses the best model."})
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether more of that metric is better."})
    train_sampling_strategy: str = field(
        default="sequential",
        metadata={
            "help": "Order of the items; those of a mixture are random draws already, so they come in sequence."
        },
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Keep False: every process uses all weights that train in every step, also without a mask."},
    )
    hub_private_repo: bool | None = field(
        default=True, metadata={"help": "Whether a new repository of push_to_hub is private."}
    )
    part_learning_rates: dict = field(
        default_factory=dict,
        metadata={
            "help": "Learning rates of parts, e.g. {lora: 3e-4, mask_decoder: 1e-4}: of `lora` and those that "
            "`trainable` may name; the others take learning_rate."
        },
    )
    muon_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of Muon for the weight matrices of the parts trained in full, about 0.02 for a "
            "model from nothing; the other weights then take AdamW. Default: `optim` for all of them."
        },
    )
    compile_mask_encoder: bool = field(
        default=False,
        metadata={
            "help": "Compile the mask model's image encoder, whose input is always of one shape; the first step then "
            "takes a minute more. (`torch_compile` is the whole model, whose shapes change with every batch.)"
        },
    )
    max_nonfinite_steps: int = field(
        default=10,
        metadata={"help": "Steps without finite loss and gradients that a run may leave out; one more stops it."},
    )
    eval_generate: bool = field(
        default=False, metadata={"help": "Evaluate with generated answers too, not only with the true text given."}
    )
    generation_max_new_tokens: int = field(default=64, metadata={"help": "Longest generated answer, in tokens."})
    dry_run: bool = field(
        default=False,
        metadata={"help": "Only look at some of the data, make one step and one checkpoint, and say what came out."},
    )

    def __post_init__(self):
        if self.dry_run:
            self.max_steps = self.logging_steps = self.save_steps = 1
            self.save_strategy, self.eval_strategy, self.load_best_model_at_end = "steps", "no", False
            self.report_to, self.resume_from_checkpoint, self.max_nonfinite_steps = "none", None, 0
            self.output_dir = str(Path(self.output_dir or ".", "dry_run"))  # what is in output_dir stays as it is
        super().__post_init__()
        if self.accelerator_config.split_batches or self.accelerator_config.dispatch_batches:
            raise ValueError(
                "accelerator_config: expected neither split_batches nor dispatch_batches: the rows and images of a "
                "batch differ in number, so that it cannot be cut"
            )
        self.accelerator_config.dispatch_batches = False
        if self.muon_learning_rate is not None:
            if self.part_learning_rates or self.deepspeed_plugin or self.shards_weights:
                raise ValueError(
                    "muon_learning_rate: expected neither part_learning_rates beside it, nor DeepSpeed or FSDP, which "
                    "cut the matrices that Muon needs whole"
                )
            if self.optim not in ("adamw_torch", "adamw_torch_fused"):
                raise ValueError(f"optim: expected adamw_torch(_fused) beside muon_learning_rate, found {self.optim}")
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16: expected a GPU, found none; on CPU it would do nothing. Take bf16, or neither.")
        if self.enable_jit_checkpoint:
            raise ValueError(
                "enable_jit_checkpoint: expected false: recipes/train.py saves and stops on SIGTERM and SIGUSR1 "
                "anyway, at a step that all processes agree on"
            )
        if self.deepspeed_plugin is not None:
            # Under ZeRO-3, transformers would cut weights while a model is made, and neither building from parts nor
            # PEFT's copies of whole modules can be done on pieces. Trainer sets this again and cuts the whole model.
            unset_hf_deepspeed_config()
        for part, rate in self.part_learning_rates.items():
            if part not in ("lora", *TRAINABLE_PARTS):
                raise ValueError(
                    f"part_learning_rates: unknown part `{part}`, {nearest(part, ('lora', *TRAINABLE_PARTS))}"
                )
            if not isinstance(rate, (int, float)) or rate < 0:
                raise ValueError(f"part_learning_rates: {part}: expected a number from 0, found {rate!r}")
        _check_range(self, "muon_learning_rate", 0)
        _check_range(self, "max_nonfinite_steps", 0)
        _check_range(self, "generation_max_new_tokens", 1)

    @property
    def shards_weights(self) -> bool:
        """Whether each process holds a piece of the weights alone: ZeRO-3 and FSDP, of which the launcher may tell."""
        stage = self.deepspeed_plugin.zero_stage if self.deepspeed_plugin else 0
        return stage == 3 or bool(self.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"


def parse_arguments(argv: list[str] | None = None) -> tuple[ModelArguments, DataArguments, LisaTrainingArguments]:
    """Reads the file given by `--config`, if any, then the command line over it.

    Args:
        argv: The command line without the program's name; default: `sys.argv[1:]`.

    Raises:
        SystemExit: With code 2, after one line on stderr: an unknown key or flag (with the nearest valid name), a
            value of a wrong type, a missing or malformed file, values that contradict each other.
    """
    parser = ArgumentParser((ModelArguments, DataArguments, LisaTrainingArguments), allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file whose keys are the names of the arguments.")
    try:
        config = parser.parse_args(argv).config
        values = vars(parser.parse_args(argv, parser.parse_config(config) if config else None))
        del values["config"]
        model_args, data_args, training_args = parser.parse_dict(values)
        _check_together(model_args, training_args)
        return model_args, data_args, training_args
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")


def parse_data_arguments(path: str) -> DataArguments:
    """Reads what a recipe (a YAML file) says about data, on a machine that need not be able to train.

    Raises:
        OSError: If the file cannot be read.
        ValueError: As [`parse_arguments`], also for what is not about data: an unknown key, a value of a wrong type.
    """
    parser = ArgumentParser((ModelArguments, DataArguments, LisaTrainingArguments), allow_abbrev=False)
    try:
        values = vars(parser.parse_config(path))
        return DataArguments(**{field.name: values[field.name] for field in dataclasses.fields(DataArguments)})
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(str(error) if path in str(error) else f"{path}: {error}") from error


def _check_together(model_args: ModelArguments, training_args: LisaTrainingArguments):
    if training_args.shards_weights and (model_args.load_in_8bit or model_args.load_in_4bit):
        raise ValueError(
            "load_in_8bit, load_in_4bit: expected none with ZeRO-3 and FSDP, which cut weights; use ZeRO-2"
        )
    trained = [*model_args.trainable, *(["lora"] if model_args.lora_r else [])]
    if frozen := [part for part in training_args.part_learning_rates if part not in trained]:
        raise ValueError(f"part_learning_rates: {', '.join(frozen)} does not train; what does: {', '.join(trained)}")


def _complete_options(arguments: DataArguments, field_name: str, defaults: dict) -> dict[str, dict]:
    completed = {}
    for name, options in getattr(arguments, field_name).items():
        if isinstance(options, (int, float)):
            options = {"weight": options}
        if not isinstance(options, dict | None):
            raise ValueError(f"{field_name}: {name}: expected a mapping of options, found {options!r}")
        completed[name] = defaults | (options or {})
        weight = completed[name].get("weight")
        if weight is not None and "weight" not in defaults:
            raise ValueError(f"{field_name}: {name}: expected no weight, found {weight}: every row is evaluated")
        if weight is not None and not (isinstance(weight, (int, float)) and weight > 0):
            raise ValueError(f"{field_name}: {name}: expected a weight above 0, found {weight!r}")
    return completed


def _check_range(arguments, name: str, low: float, high: float = float("inf")):
    value = getattr(arguments, name)
    if value is not None and not low <= value <= high:
        raise ValueError(f"{name}: expected a number from {low} to {high}, found {value}")
