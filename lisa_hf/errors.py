"""Messages about mistakes that a user can correct: one line without a stack trace, and the nearest valid name."""

import difflib
import logging
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError
from tqdm import tqdm


logger = logging.getLogger(__name__)


@contextmanager
def report_user_errors():
    """Turn errors of the user's input or machine into one line on stderr and exit code 2.

    These are `ValueError`, `OSError` and `SafetensorError`, a weights file with code in it, and what torch and
    transformers raise as `RuntimeError`: a dead loader worker, a tracker that is not installed, and weights of other
    sizes than their configuration's. The stack trace goes to the debug log. Ctrl-C is one line and code 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        tqdm.write(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)  # as shells say it
    except (OSError, RuntimeError, SafetensorError, UnpicklingError, ValueError) as error:
        if isinstance(error, UnpicklingError):
            error = ValueError(
                "expected a file of tensors alone, got one with other objects, which could run code when they are "
                "read and were not read. Get the file as safetensors from someone you trust."
            )
        elif isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
            error = ValueError(
                "expected weights of the sizes in config.json, got others, see the report above. Restore the "
                "config.json that belongs to the weights."
            )
        elif isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error):
            error = OSError(
                f"a loader worker died ({error}). Most often the host's memory is full: lower "
                "dataloader_num_workers, or request more memory."
            )
        elif isinstance(error, RuntimeError) and "to be installed" not in str(error):  # a tracker of `report_to`
            raise
        logger.debug("The full trace:", exc_info=True)
        # A loader worker's error carries its stack trace as text, whose last line is the error.
        text = str(error).strip().splitlines()[-1] if "Original Traceback" in str(error) else str(error)
        tqdm.write(f"{Path(sys.argv[0]).name}: error: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(2)


def nearest_name(name: str, names: Iterable[str]) -> str:
    """Return the valid name that is most similar to an unknown one."""
    return difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
