"""Makes what a training run left into one directory that anyone loads, with a model card, and pushes it to the Hub.

    python recipes/export.py outputs/mine --output exports/mine
    python recipes/export.py outputs/mine/checkpoint-500 --output exports/mine --dtype bf16 --push-to-hub NAME

LoRA is merged and ZeRO's pieces are put together. If RUN is the output directory of a run without a final model, its
newest complete checkpoint is taken. The directory appears when everything is written. A new repository of the Hub is
private unless `--public` is given; if the upload is interrupted, the command that it prints goes on.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import torch

from lisa_hf.conversion.saving import whole_directory
from lisa_hf.errors import report_user_errors
from lisa_hf.export import find_checkpoint, push_to_hub, restore_model, save_adapter, save_model, save_records


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="output directory of a training run, or a checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="new directory")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; by default that of the training")
    parser.add_argument("--adapter-only", action="store_true", help="LoRA and fully trained parts, without the base")
    parser.add_argument("--evaluation", type=Path, metavar="DIR", help="output of recipes/eval.py, for the card")
    parser.add_argument("--push-to-hub", metavar="NAME", help="repository that gets the directory, made if need be")
    parser.add_argument("--public", action="store_true", help="the new repository is for everybody to see")
    return parser.parse_args()


def main():
    args = parse_arguments()
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout)
    logging.getLogger("lisa_hf").setLevel(logging.INFO)
    with report_user_errors():
        checkpoint = find_checkpoint(args.run)
        dtype = DTYPES.get(args.dtype)
        model_id = args.push_to_hub or args.output.name
        with whole_directory(args.output) as directory:
            if args.adapter_only:
                save_adapter(checkpoint, directory, dtype)
            else:
                save_model(*restore_model(checkpoint), directory, dtype)
            save_records(checkpoint, directory, model_id, args.adapter_only, args.evaluation)
        if args.evaluation:
            evaluated = json.loads((args.evaluation / "evaluation.json").read_text())["model"]
            if Path(evaluated).resolve() not in (args.run.resolve(), checkpoint.resolve()):
                logging.warning("The card shows figures of %s, of which this model must be a copy.", evaluated)
        print(f"Exported {checkpoint}: {args.output.resolve()}")
        if args.push_to_hub:
            private = "" if args.public else " --private"
            print(f"Uploading. If it is interrupted: hf upload {args.push_to_hub} {args.output}{private}")
            print(f"Done: {push_to_hub(args.output, args.push_to_hub, private=not args.public)}")


if __name__ == "__main__":
    main()
