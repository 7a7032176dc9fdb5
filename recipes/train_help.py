"""Print train.py's own arguments from their source code, because importing it takes seconds."""

import argparse
import ast
import re
from pathlib import Path


ARGUMENTS = Path(__file__).parents[1] / "lisa_hf" / "training" / "arguments.py"
GROUPS = {"ModelArguments": "model", "DataArguments": "data", "LisaTrainingArguments": "training"}
EPILOG = (
    "All arguments of transformers' TrainingArguments work too: --output_dir, --max_steps, --learning_rate, "
    "--per_device_train_batch_size, --save_steps, --resume_from_checkpoint, --report_to, ... --help-all lists them."
)


def print_help(description: str) -> None:
    """Print the arguments that `lisa_hf.training.arguments` defines, by dataclass."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--config FILE] [--NAME VALUE ...]",
        description=description,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--help-all", action="store_true", help="also list the arguments of transformers, and exit")
    parser.add_argument("--config", metavar="FILE", help="YAML file whose keys are the names of the arguments")
    parser.add_argument("--device", metavar="DEVICE", help="kind of device: cpu, cuda, mps, ...")
    constants = {}
    for node in ast.parse(ARGUMENTS.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            constants[node.targets[0].id] = _value(node.value, {})
        elif isinstance(node, ast.ClassDef) and node.name in GROUPS:
            group = parser.add_argument_group(GROUPS[node.name], ast.get_docstring(node).splitlines()[0])
            for field in (item for item in node.body if isinstance(item, ast.AnnAssign)):
                options = {keyword.arg: _value(keyword.value, constants) for keyword in field.value.keywords}
                group.add_argument(
                    f"--{field.target.id}",
                    metavar=_metavar(field.annotation),
                    help=options["help"].replace("%", "%%") + _default(options),
                )
    parser.print_help()


def _value(node: ast.expr, constants: dict):
    """Evaluate a literal, the result of a factory, or a string with constants in it."""
    return eval(compile(ast.Expression(node.body if isinstance(node, ast.Lambda) else node), "", "eval"), constants)


def _metavar(annotation: ast.expr) -> str:
    """Return `str` for `str | None`, `str ...` for `list[str]` and `{off,on}` for `Literal["off", "on"]`."""
    text = ast.unparse(annotation).removesuffix(" | None")
    text = re.sub(r"Literal\[(.*)\]", lambda match: "{" + re.sub("[' ]", "", match[1]) + "}", text)
    return re.sub(r"list\[(.*)\]", r"\1 ...", text)


def _default(options: dict) -> str:
    default = options.get("default", options.get("default_factory"))
    if default in (None, dict, False):
        return ""
    return f" ({' '.join(default) if isinstance(default, list) else default})"


if __name__ == "__main__":
    print_help(__doc__)
