"""Image files by the names in annotations: Windows paths, URLs, upload prefixes.

A name that leads to a file inside the directory is used as is. For a name from another machine, or in a folder that
does not exist, only the last part is used, and only if exactly one file has it: nothing outside the directory is
opened, and a missing file is never replaced with one from another folder.
"""

import functools
import os
import re
import unicodedata
from urllib.parse import parse_qs, unquote, urlsplit

import PIL.Image


OUTSIDE = re.compile(r"[/\\]|[A-Za-z]:[/\\]|\w+://")  # how absolute paths and URLs begin
# Label Studio prepends this to the names of uploaded files, writes "_" for spaces, and drops other characters.
UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-")
LEFT_OUT_OF_UPLOADS = re.compile(r"[^-\w.]")
# It truncates the path "upload/PROJECT/NAME" to 100 characters and makes the last ones, before the extensions, random.
CUT_UPLOAD = re.compile(r"^(?=.{84,91}$)(.*)_[A-Za-z0-9]{7}((?:\.[^.]*)+)$")


def is_image(name: str) -> bool:
    """Return whether a file is an image, by its extension."""
    return name.lower().endswith(tuple(PIL.Image.registered_extensions()))


def list_files(directory: str) -> list[str]:
    """Return the paths of all files in a directory, at any depth, in order.

    Hidden ones are skipped: macOS puts `._a.jpg` next to a.jpg on other disks, and Jupyter keeps copies of files.
    """
    found = []
    for folder, subfolders, names in os.walk(directory, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [os.path.join(folder, name) for name in names if not name.startswith(".")]
    return sorted(found)


def list_images(directory: str) -> list[str]:
    """Return the paths of all image files in a directory, see [`list_files`]."""
    return [path for path in list_files(directory) if is_image(path)]


def find_image(directory: str, name: str, version: str = "") -> tuple[str, bool]:
    """Find the image file that an annotation names.

    Args:
        directory: Directory of the images.
        name: Path in the style of any system, or URL. Its extension may be missing.
        version: Key that changes when the directory may have changed; its files are listed once per version.

    Returns:
        Path of the image, which need not exist if the name is a path inside the directory, and whether it was found by
        the last part of its name alone.

    Raises:
        ValueError: If the name leads outside the directory, and no file or several files have its last part.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"expected the name of an image file, got {name!r}.")
    direct = os.path.join(directory, *split_name(name))
    if _is_relative(name) and os.path.isfile(direct):
        return direct, False
    images = _images_by_name(directory, version)
    # Spreadsheets leave spaces around a name, and servers write "%20" for a space. `split_name` unescapes URLs.
    stripped = name.strip()
    forms = dict.fromkeys([name, stripped if _is_url(stripped) else unquote(stripped)])
    found = next(filter(None, (_find_by_last_part(directory, images, form) for form in forms)), [])
    if len(found) > 1:
        raise ValueError(
            f"expected one file for the image {name!r}, got {len(found)} in {directory!r}: {found[:3]}. Write paths "
            "relative to that directory into the annotations."
        )
    if found:
        return os.path.join(directory, found[0]), True
    if not _is_relative(name):
        raise ValueError(
            f"expected an image in {directory!r}, got {name!r}, which is outside it, and no image in there is "
            f"called {split_name(name)[-1]!r}. Put the images there, or name their directory."
        )
    return direct, False


def _is_relative(name: str) -> bool:
    """Return whether a name is a path that does not lead out of a directory."""
    return not OUTSIDE.match(name) and ".." not in split_name(name)


def _is_url(name: str) -> bool:
    """Return whether a name is a URL, or a path that Label Studio serves: `/data/local-files/?d=photos/a.jpg`."""
    return name.startswith(("http://", "https://", "file://")) or "?d=" in name


def _find_by_last_part(directory: str, images: dict[str, list[str]], name: str) -> list[str]:
    """Return the images that a name may mean, by its last part. The parts before it choose among several."""
    *folders, last = parts = split_name(name)
    found = images.get(_key(last), [])
    if not found and UPLOAD_PREFIX.match(last):
        found = _find_upload(images, last)
    if _is_relative(name) and os.path.isdir(os.path.join(directory, *folders)):
        return [path for path in found if os.path.dirname(path) == os.path.join("", *folders)]
    if len(found) > 1:
        end = "/" + "/".join(parts)
        longest = [path for path in found if end.endswith("/" + "/".join(split_name(path)))]
        found = longest or found
    return found


def split_name(name: str) -> list[str]:
    """Return the parts of a path or URL; for Label Studio's `/data/local-files/?d=photos/a.jpg`, those of `d`."""
    if _is_url(name):
        address = urlsplit(name)
        name = parse_qs(address.query).get("d", [unquote(address.path)])[0]
    return [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")] or [name]


def _find_upload(images: dict[str, list[str]], name: str) -> list[str]:
    """Return the images that Label Studio may have given this name on upload."""
    uploaded = UPLOAD_PREFIX.sub("", name)
    found = images.get(_upload_key(uploaded), [])
    cut = None if found else CUT_UPLOAD.match(name)
    if cut:
        begin, end = _upload_key(UPLOAD_PREFIX.sub("", cut[1])), _upload_key(cut[2])[1:]
        alike = [paths for key, paths in images.items() if key.startswith(begin) and key.endswith(end)]
        found = sorted({path for paths in alike for path in paths})
    return found


def _key(name: str) -> str:
    """Return the same key for names that are the same file on Windows and macOS."""
    return unicodedata.normalize("NFC", name).casefold()


def _upload_key(name: str) -> str:
    """Return the same key for a name and Label Studio's version of it. No name starts with its "/"."""
    return "/" + LEFT_OUT_OF_UPLOADS.sub("", name.replace(" ", "_")).casefold()


@functools.lru_cache(maxsize=8)
def _images_by_name(directory: str, version: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in list_images(directory):
        name, relative = os.path.basename(path), os.path.relpath(path, directory)
        for form in (name, os.path.splitext(name)[0]):
            # macOS writes accents as separate characters, which an upload drops.
            uploaded = {_upload_key(unicodedata.normalize(normal, form)) for normal in ("NFC", "NFD")}
            for key in (_key(form), *uploaded):
                found.setdefault(key, []).append(relative)
    return found
