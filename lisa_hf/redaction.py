"""Remove secrets from messages and records, and paths of this machine from what is shared."""

import os
import re
import shlex
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import get_token


REDACTED = "<REDACTED>"
LOCAL = "<local>"  # replaces the directory of a path; no Hub id starts like this
SECRET_NAME = r"(?:token|api_?key|access_?key|secret|password|passwd|signature|credentials?)"
SECRETS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"()\bhf_[A-Z0-9]{16,}",
        r"(://)[^/\s@]+(?=@)",  # https://user:password@server
        # --hub_token VALUE, without the quotation mark that ends it in a shell's command line
        rf"(--[\w-]*{SECRET_NAME}(?:=|\s+))(?:(?:'[^']*'|\"[^\"]*\")+|\S+?(?=[\"']?(?:\s|$)))",
        rf"([?&;\s][\w-]*{SECRET_NAME}=)[^\s&;\"']{{8,}}",  # https://server/file?token=VALUE
        rf"([{{,]\s*[\"']?[\w-]*{SECRET_NAME}[\"']?\s*:\s*[\"']?)[^\s\"',}}]{{8,}}",  # {token: VALUE}
    )
]
_ROOT = r"(?:~[\w.-]*|[A-Za-z]:)?[/\\]"
LOCAL_PATH = re.compile(  # absolute, or below a home directory: between quotes, or up to a space, a comma, a bracket
    rf"""(?<="){_ROOT}[^"]+(?=")|(?<='){_ROOT}[^']+(?=')|(?<![^\s=,'"(\[{{]){_ROOT}[^\s,'"\])}}]+"""
)


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
    """Return a value, or a structure of them, with absolute paths, which reveal user names, reduced to their last
    part.

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
