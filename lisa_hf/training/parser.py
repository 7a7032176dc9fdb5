"""Parser of the recipes' arguments: transformers' dataclass parser, plus YAML files with the same meaning."""

import dataclasses
import json
import re
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterable
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from ..errors import nearest_name


# Former argument names, and those of LISA's train_ds.py, with their current names.
RENAMED = {
    "learning_rates": "part_learning_rates",
    "version": "vlm",
    "vision_pretrained": "mask_model",
    "conv_type": "chat_template",
    "precision": "bf16",
    "device": "use_cpu",
    "model_max_length": "max_length",
    "train_mask_decoder": "trainable",
    "dataset": "sources",
    "sem_seg_data": "sources",
    "refer_seg_data": "sources",
    "vqa_data": "sources",
    "reason_seg_data": "sources",
    "sample_rates": "sources",
    "val_dataset": "eval_sources",
    "no_eval": "eval_sources",
    "dataset_dir": "data_dir",
    "exclude_val": "exclude_refer_val",
    "num_classes_per_sample": "num_questions",
    "explanatory": "explanatory_probability",
    "log_base_dir": "output_dir",
    "exp_name": "output_dir",
    "vis_save_path": "output_dir",
    "epochs": "max_steps",
    "steps_per_epoch": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "val_batch_size": "per_device_eval_batch_size",
    "grad_accumulation_steps": "gradient_accumulation_steps",
    "workers": "dataloader_num_workers",
    "lr": "learning_rate",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "bce_loss_weight": "mask_bce_loss_weight",
    "dice_loss_weight": "mask_dice_loss_weight",
    "resume": "resume_from_checkpoint",
    "auto_resume": "resume_from_checkpoint",
    "start_epoch": "resume_from_checkpoint",
    "print_freq": "logging_steps",
}


class _YamlLoader(yaml.SafeLoader):
    """Loader that reads `5e-4` as a number, and rejects duplicate keys."""

    def compose_mapping_node(self, anchor):
        node, keys = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if key.value in keys:
                raise yaml.composer.ComposerError(
                    None, None, f"expected each key once, got `{key.value}` again", key.start_mark
                )
            keys.add(key.value)
        return node


# PyYAML follows YAML 1.1, where a float needs a dot: 5e-4 would be a string. YAML 1.2 and JSON read it as a number.
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class ArgumentParser(HfArgumentParser):
    """HfArgumentParser that accepts mappings and empty lists, reads YAML, and raises `ValueError` for any mistake."""

    def __init__(self, dataclass_types, **kwargs):
        super().__init__(dataclass_types, usage="%(prog)s [--config FILE] [--NAME VALUE ...]", **kwargs)
        self.add_argument("--help-all", action="help", help="Print this, and exit.")
        # List arguments of this package first, by dataclass, then inherited ones.
        for dataclass_type in dataclass_types:
            self._group(dataclass_type.__doc__.splitlines()[0].rstrip("."), dataclass_type.__annotations__)
        self._group("transformers' TrainingArguments", self._hints())

    def _group(self, title: str, names: Iterable[str]):
        group, others = self.add_argument_group(title), []
        for action in self._optionals._group_actions:
            (group._group_actions if action.dest in names else others).append(action)
        self._optionals._group_actions = others

    def add_argument(self, *flags, **kwargs):
        if kwargs.get("nargs") == "+":
            kwargs["nargs"] = "*"
        if kwargs.get("type") is dict:
            kwargs["type"] = _mapping
        return super().add_argument(*flags, **kwargs)

    def error(self, message: str):
        raise ValueError(message)

    def parse_args(self, args=None, namespace=None) -> Namespace:
        args = list(sys.argv[1:] if args is None else args)
        cleared = self._take_nulls(args)
        namespace, unknown = self.parse_known_args(args, namespace)
        vars(namespace).update(cleared)
        if unknown and unknown[0].startswith("--"):
            flag = unknown[0].split("=")[0]
            raise self._unknown_name(flag, flag.lstrip("-").replace("-", "_"))
        if unknown:
            raise ValueError(f"expected no further value, got `{unknown[0]}`.")
        return namespace

    def parse_config(self, path: str) -> Namespace:
        """Return the namespace of all arguments, their defaults overridden by the YAML file at `path`."""
        try:
            with open(path, encoding="utf-8") as stream:
                root = yaml.compose(stream, Loader=_YamlLoader)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected YAML in UTF-8, got other bytes ({error}).") from error
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(f"{path}: expected a mapping of arguments, got {f'a {root.id}' if root else 'nothing'}.")
        namespace, hints = self.parse_args([]), self._hints()
        for key_node, node in root.value:
            key, where = key_node.value, f"{path}, line {key_node.start_mark.line + 1}"
            if key not in hints:
                raise ValueError(f"{where}: {self._unknown_name(key, str(key))}")
            if node.tag == "tag:yaml.org,2002:null":
                if not _can_be_cleared(hints[key]):
                    raise ValueError(f"{where}: {key}: expected a value, got null.")
                setattr(namespace, key, _cleared(hints[key]))
                continue
            # A value is parsed from its command-line form.
            is_list = isinstance(node, yaml.SequenceNode)
            tokens = [f"--{key}", *map(_as_text, node.value)] if is_list else [f"--{key}={_as_text(node)}"]
            try:
                self.parse_args(tokens, namespace)
            except ValueError as error:
                raise ValueError(f"{where}: {key}: {error}") from error
        return namespace

    def _take_nulls(self, args: list[str]) -> dict[str, Any]:
        """Remove `--key null`, which clears a value set by a file, from `args`; return the keys and their values."""
        hints = self._hints()
        optional = {f"--{name}": name for name, hint in hints.items() if _can_be_cleared(hint)}
        cleared = {}
        for index in reversed(range(len(args))):
            flag, _, value = args[index].partition("=")
            is_pair = args[index] in optional and args[index + 1 : index + 2] == ["null"]
            if flag in optional and (is_pair or value == "null"):
                del args[index : index + 1 + is_pair]
                cleared[optional[flag]] = _cleared(hints[optional[flag]])
        return cleared

    def _hints(self) -> dict[str, Any]:
        """Return the type of every argument by its name."""
        hints = {}
        for dataclass_type in self.dataclass_types:
            types = get_type_hints(dataclass_type)
            hints |= {field.name: types[field.name] for field in dataclasses.fields(dataclass_type) if field.init}
        return hints

    def _unknown_name(self, found: str, name: str) -> ValueError:
        suggestion = RENAMED.get(name) or nearest_name(name, self._hints())
        return ValueError(f"expected the name of an argument, got `{found}`. Did you mean `{suggestion}`?")


def _can_be_cleared(hint: Any) -> bool:
    return type(None) in get_args(hint) or (get_origin(hint) or hint) in (dict, list)


def _cleared(hint: Any) -> Any:
    """Return the meaning of null: None if the argument is optional, else an empty mapping or list."""
    return None if type(None) in get_args(hint) else (get_origin(hint) or hint)()


def _as_text(node: yaml.Node) -> str:
    """Return the command-line form of a YAML value."""
    if isinstance(node, yaml.ScalarNode):
        return node.value
    # Nested values become JSON, which TrainingArguments parses itself, and which is also YAML.
    return json.dumps(yaml.load(yaml.serialize(node), Loader=_YamlLoader))


def _mapping(text: str) -> dict:
    try:
        value = yaml.load(text, Loader=_YamlLoader)
    except yaml.YAMLError as error:
        raise ArgumentTypeError(f"expected a mapping in YAML or JSON, got `{text}`.") from error
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"expected a mapping such as {{name: value}}, got `{text}`.")
    return value
