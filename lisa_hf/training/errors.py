"""How the recipes end when something is wrong that their user can mend: with one line, and no stack trace."""

import logging
import sys
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from tqdm import tqdm


logger = logging.getLogger(__name__)


@contextmanager
def report_user_errors():
    """Turns what is wrong with the user's input or machine into one line on stderr and exit code 2: `ValueError`,
    `OSError`, `SafetensorError`.

    So it does with the death of a loader worker and with a tracker that is not installed, which torch and transformers
    report as a `RuntimeError`. The line goes to stderr, the trace to the debug log.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error):
            error = OSError(
                f"a loader worker has died ({error}). Most often the host's memory was full: lower "
                "dataloader_num_workers, or ask for more memory"
            )
        elif isinstance(error, RuntimeError) and "to be installed" not in str(error):  # a tracker of `report_to`
            raise
        logger.debug("The full trace:", exc_info=True)
        # A loader worker hands its trace over as text; its last line is the error.
        text = str(error).strip().splitlines()[-1] if "Original Traceback" in str(error) else str(error)
        tqdm.write(f"{Path(sys.argv[0]).name}: error: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(2)
