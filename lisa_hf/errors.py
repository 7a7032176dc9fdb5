"""Messages about mistakes that a user can correct: one line without a stack trace, and the nearest valid name.

Also removes secrets from messages and records, and paths of this machine from what is shared.
"""

import difflib
import logging
import os
import re
import shlex
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from pickle import UnpicklingError
from typing import Any

from huggingface_hub import get_token
from safetensors import SafetensorError
from tqdm import tqdm


logger = logging.getLogger(__name__)

# Of fsspec's file systems for S3, Google Cloud and Azure: their errors, of credentials for instance, have own classes.
STORAGE_LIBRARIES = ("botocore", "gcsfs", "google", "azure")
REDACTED = "<REDACTED>"
LOCAL = "<local>"  # in the place of the directory of a path; no Hub id begins so
SECRET_NAME = r"(?:token|api_?key|access_?key|secret|password|passwd|signature|credentials?)"
SECRETS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"()\bhf_[A-Z0-9]{16,}",
        r"(://)[^/\s@]+(?=@)",  # https://user:password@server
        rf"(--[\w-]*{SECRET_NAME}(?:=|\s+))\S+",  # --hub_token VALUE
        rf"([?&;\s][\w-]*{SECRET_NAME}=)[^\s&;\"']{{8,}}",  # https://server/file?token=VALUE
        rf"([{{,]\s*[\"']?[\w-]*{SECRET_NAME}[\"']?\s*:\s*[\"']?)[^\s\"',}}]{{8,}}",  # {token: VALUE}
    )
]
_ROOT = r"(?:~[\w.-]*|[A-Za-z]:)?[/\\]"
LOCAL_PATH = re.compile(  # absolute, or below a home directory: between quotes, or up to a space, a comma, a bracket
    rf"""(?<="){_ROOT}[^"]+(?=")|(?<='){_ROOT}[^']+(?=')|(?<![^\s=,'"(\[{{]){_ROOT}[^\s,'"\])}}]+"""
)


@contextmanager
def report_user_errors():
    """Report errors caused by the user's input or machine as one line on stderr, with exit code 2.

    These are `ValueError`, `OSError` and `SafetensorError`, a weights file with code in it, and what torch and
    transformers raise as `RuntimeError`: a dead loader worker, a tracker that is not installed, and weights of other
    sizes than their configuration's. The stack trace goes to the debug log. Ctrl-C is one line and code 130.

    Neither that line nor the log holds secrets, see [`redact`].
    """
    for name in (None, "datasets", "huggingface_hub", "transformers"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_redact_log)
    try:
        yield
    except KeyboardInterrupt:
        tqdm.write(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)  # the shells' code for Ctrl-C
    except (OSError, RuntimeError, SafetensorError, UnpicklingError, ValueError) as error:
        if isinstance(error, UnpicklingError):
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


def redact(value: Any) -> Any:
    """Return a value, or a structure of them, with its secrets replaced: tokens, keys, passwords in URLs.

    Secrets are recognized by their form, by their name, and by being in an environment variable of such a name.
    """
    is_name = re.compile(rf"(?:.*_)?{SECRET_NAME}(?:_.*)?", re.IGNORECASE).fullmatch
    is_special_token = re.compile(r"(?:image|video|seg|bos|eos|pad|unk|cls|sep|mask)_token.*").fullmatch
    known = [item for name, item in os.environ.items() if is_name(name) and not item.startswith(os.sep)]
    known = [item for item in (*known, get_token() or "") if len(item) >= 8]

    def redacted(value: Any, is_secret: bool = False) -> Any:
        if isinstance(value, dict):
            return {
                key: redacted(item, bool(is_name(str(key)) and not is_special_token(str(key))))
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [redacted(item) for item in value]
        if not isinstance(value, str):
            return value
        if is_secret and re.fullmatch(r"[\w.+/=-]{8,}", value):
            return REDACTED
        for secret in known:
            value = value.replace(secret, REDACTED)
        for pattern in SECRETS:
            value = pattern.sub(rf"\g<1>{REDACTED}", value)
        return value

    return redacted(value)


def hide_local_paths(value: Any) -> Any:
    """Return a value, or a structure of them, in which of absolute paths, which tell names of users, the name is left.

    `/home/somebody/photos` becomes `<local>/photos`. What is under the key `command` is a shell's command line.
    """
    if isinstance(value, dict):
        return {
            key: shlex.join(hide_local_paths(shlex.split(item))) if key == "command" else hide_local_paths(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [hide_local_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    if os.path.isabs(value) and "\n" not in value:  # as a whole: it may have spaces
        return _hide_directory(value)
    return LOCAL_PATH.sub(lambda found: _hide_directory(found[0]), value)


def _hide_directory(path: str) -> str:
    if Path(path) == Path.home():
        return LOCAL
    return f"{LOCAL}/{PureWindowsPath(path).name}"  # it knows the separators of every system


def _redact_log(record: logging.LogRecord) -> bool:
    record.msg, record.args = redact(record.getMessage()), ()
    return True


def nearest_name(name: str, names: Iterable[str]) -> str:
    """Return the valid name that is most similar to an unknown one."""
    return difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
