"""Messages about mistakes that a user can correct: one line without a stack trace, and the nearest valid name."""

import difflib
import logging
import sys
from collections.abc import Collection, Iterable
from contextlib import contextmanager, suppress
from json import JSONDecodeError
from pathlib import Path
from pickle import UnpicklingError
from typing import NoReturn

from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from tqdm import tqdm

from .redaction import redact


logger = logging.getLogger(__name__)

# Of fsspec's file systems for S3, Google Cloud and Azure: their errors, of credentials for instance, have own classes.
STORAGE_LIBRARIES = ("botocore", "gcsfs", "google", "azure")


@contextmanager
def report_user_errors():
    """Report errors caused by the user's input or machine as one line on stderr, with exit code 2.

    These are `ValueError`, `OSError`, `MemoryError` and `SafetensorError`, a weights file with code in it, and what
    torch and transformers raise as `RuntimeError`: a dead loader worker, a tracker that is not installed, and weights
    of other sizes than their configuration's. The stack trace goes to the debug log. Ctrl-C is one line and code 130.

    Neither that line nor the log holds secrets, see [`redact`]. Output shows characters that its encoding lacks as
    escapes, as stderr always does: the name of an image must not end a run.
    """
    with suppress(AttributeError):  # notebooks have streams of their own
        sys.stdout.reconfigure(errors="backslashreplace")
    for name in (None, "datasets", "huggingface_hub", "transformers"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_redact_log)
    try:
        yield
    except KeyboardInterrupt:
        tqdm.write(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)  # the shells' code for Ctrl-C
    except (MemoryError, OSError, RuntimeError, SafetensorError, UnpicklingError, ValueError) as error:
        if isinstance(error, MemoryError):
            error = OSError(f"the host's memory is full ({error}). Process less at once, or request more memory.")
        elif isinstance(error, UnpicklingError):
            error = ValueError(
                "expected a file with tensors only, got one with other objects, which could run code when they are "
                "read and were not read. Get the file as safetensors from someone you trust."
            )
        elif isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
            error = ValueError(
                "expected weights of the sizes in config.json, got other sizes, see the report above. Restore the "
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
        # A loader worker's error contains its stack trace as text, with the error in the last line.
        text = str(error).strip().splitlines()[-1] if "Original Traceback" in str(error) else str(error)
        _exit_with(text)
    except Exception as error:
        if type(error).__module__.split(".")[0] not in STORAGE_LIBRARIES:
            raise
        logger.debug("The full trace:", exc_info=True)
        _exit_with(f"the storage of a URL: {error}")


def _exit_with(text: str):
    tqdm.write(f"{Path(sys.argv[0]).name}: error: {redact(' '.join(text.split()))}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def refuse_damaged_files(path: str | Path):
    """Raise a `ValueError` for whatever reading damaged or hostile files of a model raises in this context.

    The libraries that read them expect what a library wrote. Other files end in an `AttributeError`, a `KeyError`, ...

    Args:
        path: Directory or Hub id of the model.
    """
    try:
        yield
    except (JSONDecodeError, UnicodeDecodeError) as error:
        _raise_damaged(path, error)
    except (MemoryError, OSError, SafetensorError, UnpicklingError, ValueError):
        raise  # with a message for users
    except HTTPError as error:  # such as a timeout; HfHubHTTPError is also an OSError
        raise OSError(f"{path}: expected an answer from the Hub, got {type(error).__name__}. Try again.") from error
    except ImportError as error:  # of a quantization, for example
        raise ValueError(f"{path}: expected a package that is not installed: {error}. Install it.") from error
    except Exception as error:
        if isinstance(error, NameError | RuntimeError) and not isinstance(error, RecursionError):
            raise  # of the machine, or a bug
        _raise_damaged(path, error)


def _raise_damaged(path: str | Path, error: Exception) -> NoReturn:
    reason = " ".join(str(error).split())[:300]
    raise ValueError(
        f"{path}: expected files of a model that transformers can read, got {type(error).__name__}: {reason}. Check "
        "its configuration files, or download it again from a source that you trust."
    ) from error


def _redact_log(record: logging.LogRecord) -> bool:
    record.msg, record.args = redact(record.getMessage()), ()
    return True


def nearest_name(name: str, names: Iterable[str]) -> str:
    """Return the valid name that is most similar to an unknown one."""
    return difflib.get_close_matches(name, names, n=1, cutoff=0)[0]


def check_name(option: str, name: str, known: Collection[str]) -> None:
    """Raise a `ValueError` with the nearest valid name unless an option's name is a known one."""
    if name not in known:
        raise ValueError(
            f"{option}: expected names among {', '.join(known)}, got `{name}`. Did you mean "
            f"`{nearest_name(name, known)}`?"
        )
