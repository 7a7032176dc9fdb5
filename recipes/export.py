"""Export a training run to one directory that loads without this package, with a model card; push it to the Hub.

    python recipes/export.py outputs/mine --output exports/mine
    python recipes/export.py outputs/mine/checkpoint-500 --output exports/mine --dtype bfloat16 --push_to_hub NAME

LoRA is merged and ZeRO shards are consolidated; the output of DeepSpeed's zero_to_fp32.py in a checkpoint's directory
works too. A run without a final model is exported from its newest complete checkpoint. The directory appears once
everything is written. A new repository on the Hub is private unless `--public` is given. If the upload is interrupted,
the printed command resumes it.
"""

import argparse
import logging
import sys
from pathlib import Path

from lisa_hf.conversion.saving import DTYPES
from lisa_hf.errors import report_user_errors
from lisa_hf.export import (
    check_records,
    export_model,
    find_consolidated,
    find_newest_model,
    push_to_hub,
    save_adapter,
    save_records,
)
from lisa_hf.files import atomic_directory


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="output directory of a training run, a checkpoint, or weights in it"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new directory to write")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype of the weights (auto: as in training)")
    parser.add_argument(
        *("--adapter_only", "--adapter-only"),
        action="store_true",
        help="export LoRA and the fully trained parts without the base model",
    )
    parser.add_argument("--evaluation", type=Path, metavar="DIR", help="output of recipes/eval.py for the model card")
    parser.add_argument("--push_to_hub", "--push-to-hub", metavar="NAME", help="repository to upload to")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    return parser.parse_args()


def main():
    args = parse_arguments()
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout)
    logging.getLogger("lisa_hf").setLevel(logging.INFO)
    with report_user_errors():
        # 1. Find the final model, or the newest complete checkpoint, or that of consolidated weights.
        checkpoint = find_consolidated(args.run)
        consolidated = args.run if checkpoint else None
        checkpoint = checkpoint or find_newest_model(args.run)
        check_records(checkpoint, args.evaluation)
        # 2. Write the model, its processor, and its records: all or nothing.
        dtype = DTYPES[args.dtype]
        model_id = args.push_to_hub or args.output.name
        with atomic_directory(args.output) as directory:
            if args.adapter_only:
                save_adapter(checkpoint, directory, dtype, consolidated)
            else:
                export_model(checkpoint, directory, dtype, consolidated)
            save_records(checkpoint, directory, model_id, args.adapter_only, args.evaluation)
        print(f"Exported {consolidated or checkpoint}: {args.output.resolve()}")
        # 3. Upload the directory.
        if args.push_to_hub:
            private = "" if args.public else " --private"
            print(f"Uploading. If it is interrupted: hf upload {args.push_to_hub} {args.output}{private}")
            print(f"Done: {push_to_hub(args.output, args.push_to_hub, private=not args.public)}")


if __name__ == "__main__":
    main()
