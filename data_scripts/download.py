"""Download the datasets that have direct links, and unpack them into LISA's directory layout.

    from data_scripts.download import download
    download(["ade20k", "refcoco"], "dataset")

A file is downloaded to `<data_dir>/.downloads`, where the next call resumes an interrupted download. It is unpacked
there and moved to its destination in one step, so files at their destination are complete and are not downloaded
again.
"""

import dataclasses
import errno
import hashlib
import logging
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import http_stream_backoff


logger = logging.getLogger(__name__)

# With compression, the file size would be unknown and downloads could not be resumed.
HEADERS = {"Accept-Encoding": "identity"}


@dataclasses.dataclass(frozen=True)
class WebFile:
    """A file on the web and its destination in the data directory.

    Args:
        url: Direct link.
        places: Destinations below the data directory, by path in the archive, at any depth. A single path for a file
            that is not an archive.
        checksum: Published checksum as "algorithm:digest", with an algorithm of `hashlib`.
    """

    url: str
    places: dict[str, str] | str
    checksum: str | None = None

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def targets(self, data_dir: Path) -> list[Path]:
        """Return the destinations in the data directory."""
        places = [self.places] if isinstance(self.places, str) else self.places.values()
        return [data_dir / place for place in places]


@dataclasses.dataclass(frozen=True)
class RemoteState:
    """What a server reports about a file: its size in bytes and its ETag or date, if known."""

    size: int | None
    validator: str


# Links as in the READMEs of LISA, COCO-Stuff, PACO, VLPart and gRefCOCO; checksums as in PACO's, and for the photos as
# in PaddlePaddle (COCO 2017), LAVIS (COCO 2014), torchvision (VOC) and GluonCV (ADE20K). The refCOCO servers
# are gone: LISA links to these copies.
COCO = "http://images.cocodataset.org"
ARCHIVED = "https://web.archive.org/web"
REFERIT = "bvisionweb1.cs.unc.edu/licheng/referit/data"
GREFCOCO = "https://huggingface.co/datasets/FudanCVL/gRefCOCO/resolve/main"

TRAIN2017 = WebFile(
    f"{COCO}/zips/train2017.zip", {"train2017": "coco/train2017"}, "md5:cced6f7f71b7629ddf16f17bbcfab6b2"
)
VAL2017 = WebFile(f"{COCO}/zips/val2017.zip", {"val2017": "coco/val2017"}, "md5:442b8da7639aecaf257c1dceb8ba8c80")
ANNOTATIONS2017 = WebFile(
    f"{COCO}/annotations/annotations_trainval2017.zip",
    {"annotations": "coco/annotations"},
    "md5:f4bbac642086de4f52a3fdda2de5fa2c",
)
TRAIN2014 = WebFile(
    f"{COCO}/zips/train2014.zip",
    {"train2014": "refer_seg/images/mscoco/images/train2014"},
    "md5:0da8c0bd3d6becc4dcb32757491aca88",
)


def _referit(date: str, name: str, refs: str) -> WebFile:
    places = {part: f"refer_seg/{name}/{part}" for part in (refs, "instances.json")}
    return WebFile(f"{ARCHIVED}/{date}/https://{REFERIT}/{name}.zip", places)


WEB_FILES = {
    "coco": [TRAIN2017, VAL2017, ANNOTATIONS2017],
    "ade20k": [
        WebFile(
            "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
            {"images": "ade20k/images", "annotations": "ade20k/annotations"},
            "sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7",
        )
    ],
    "cocostuff": [
        WebFile(
            "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip",
            {"train2017": "cocostuff/train2017"},
        ),
        TRAIN2017,
    ],
    "paco_lvis": [
        WebFile(
            "https://dl.fbaipublicfiles.com/paco/annotations/paco_lvis_v1.zip",
            {"paco_lvis_v1_train.json": "vlpart/paco/annotations/paco_lvis_v1_train.json"},
            "sha256:02ac4edb22c251e07853e6231d69aec3fad0a180f03de2f8c880650322debc80",
        ),
        TRAIN2017,
    ],
    "pascal_part": [
        WebFile(
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar",
            {"VOC2010": "vlpart/pascal_part/VOCdevkit/VOC2010"},
            "md5:da459979d0c395079b5c75ee67908abb",
        ),
        WebFile(
            "http://roozbehm.info/pascal-parts/trainval.tar.gz",
            {"Annotations_Part": "vlpart/pascal_part/Annotations_Part"},
        ),
    ],
    "refcoco": [_referit("20220413011718", "refcoco", "refs(unc).p"), TRAIN2014],
    "refcoco+": [_referit("20220413011656", "refcoco+", "refs(unc).p"), TRAIN2014],
    "refcocog": [_referit("20220413012904", "refcocog", "refs(umd).p"), TRAIN2014],
    "refclef": [
        _referit("20220413011817", "refclef", "refs(unc).p"),
        WebFile(
            f"{ARCHIVED}/20220515000000/http://{REFERIT}/images/saiapr_tc-12.zip",
            {"saiapr_tc-12": "refer_seg/images/saiapr_tc-12"},
        ),
    ],
    "grefcoco": [
        WebFile(f"{GREFCOCO}/grefs(unc).json", "refer_seg/grefcoco/grefs(unc).json"),
        WebFile(f"{GREFCOCO}/instances.json", "refer_seg/grefcoco/instances.json"),
        TRAIN2014,
    ],
    "llava_instruct": [
        WebFile(
            "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K/resolve/main/llava_instruct_150k.json",
            "llava_dataset/llava_instruct_150k.json",
        ),
        TRAIN2017,
    ],
}

# Steps that cannot be automated.
_REFS = "Download the refs from the Google Drive file that is linked there, and unpack them into {data_dir}/refer_seg."
MANUAL_STEPS = {
    "mapillary": "Sign in, accept the license and download Mapillary Vistas 2.0. Unpack it into {data_dir}/mapillary.",
    "reason_seg": (
        "Download the zip files from the Google Drive folder that is linked there, and unpack them into "
        "{data_dir}/reason_seg/ReasonSeg."
    ),
    "lisa_plus": (
        "Download the data.json of each dataset of the collection to {data_dir}/lisa_plus: that of "
        "LISA_Plus_Instance_Seg as instance_seg.json, that of LISA_Plus_COT as cot.json, and so on."
    ),
    "pascal_part": (
        "Turn the annotations into train.json with a clone of VLPart: python tools/pascal_part_mat2json.py "
        "--split train.txt --split_path {data_dir}/vlpart/pascal_part/VOCdevkit/VOC2010/ImageSets/Main "
        "--ann_path {data_dir}/vlpart/pascal_part/Annotations_Part "
        "--ann_out {data_dir}/vlpart/pascal_part/train.json"
    ),
    **{f"{name}refcoco{end}": _REFS for name in ("fp", "R-") for end in ("", "+", "g")},
    "muse": "Download the zip file from the Google Drive link there, and unpack it into {data_dir}/muse.",
}


def download(names: Sequence[str], data_dir: str | os.PathLike, num_threads: int = 4):
    """Download and unpack all files of the given sources that are not at their destination yet.

    Args:
        names: Keys of `WEB_FILES`.
        data_dir: Directory of all datasets, which is created if it does not exist.
        num_threads: Number of files to download and unpack at once.

    Raises:
        OSError: Before the first download, if the disk is too small or another download is running. After all others,
            if files could not be downloaded or unpacked.
    """
    data_dir = Path(data_dir).expanduser().absolute()
    files = [file for file in _files_of(names) if not all(map(_is_filled, file.targets(data_dir)))]
    if not files:
        logger.info("Everything with a direct link is in place in %s.", data_dir)
        return
    directory = data_dir / ".downloads"
    directory.mkdir(parents=True, exist_ok=True)
    try:
        # Pool threads are daemons, so Ctrl-C ends the process immediately, and the next call resumes.
        with FileLock(directory / ".lock", timeout=0), ThreadPool(num_threads) as pool:
            answers = list(zip(files, pool.map(_ask_server, files)))
            errors = [answer for _, answer in answers if isinstance(answer, str)]
            found = [(file, state) for file, state in answers if isinstance(state, RemoteState)]
            _check_disk(found, directory, num_threads)
            jobs = [(file, state, directory, data_dir) for file, state in found]
            errors += filter(None, pool.imap_unordered(_download_one, jobs))
    except Timeout as error:
        raise OSError(f"Another download into {str(data_dir)!r} is running. Wait for it, or stop it.") from error
    if errors:
        raise OSError(f"{len(errors)} of {len(files)} files failed. " + " ".join(errors))


def _files_of(names: Sequence[str]) -> list[WebFile]:
    # Several sources share their photos.
    return list({file.url: file for name in names for file in WEB_FILES[name]}.values())


def _is_filled(target: Path) -> bool:
    return any(target.iterdir()) if target.is_dir() else target.exists()


def _ask_server(file: WebFile) -> RemoteState | str:
    """Return what the server reports about a file, or an error message."""
    # GET without reading the body: it follows the same redirects as the download.
    try:
        with http_stream_backoff("GET", file.url, headers=HEADERS, timeout=30, max_retries=2) as response:
            response.raise_for_status()
            headers = response.headers
    except Exception as error:  # of any kind in httpx
        return f"{file.url}: {error}."
    if headers.get("Content-Type", "").startswith("text/html"):
        return f"{file.url}: the server sent a web page instead of the file."
    size = headers.get("Content-Length")
    return RemoteState(int(size) if size else None, headers.get("ETag") or headers.get("Last-Modified") or "")


def _check_disk(found: list[tuple[WebFile, RemoteState]], directory: Path, num_threads: int):
    """Log what will be downloaded, and raise if the disk is too small."""
    for file, state in found:
        logger.info("%10s  %s", _gigabytes(state.size) if state.size else "?", file.url)
    sizes = [state.size or 0 for _, state in found]
    paths = [path for file, state in found for path in _paths(file, state, directory)]
    present = sum(path.stat().st_size for path in paths if path.exists())
    # An unpacked archive is at least as large as the archive itself, which is removed afterwards.
    needed = sum(sizes) + sum(sorted(sizes)[-num_threads:]) - present
    free = shutil.disk_usage(directory).free
    logger.info("%10s  in total, %s already downloaded", _gigabytes(sum(sizes)), _gigabytes(present))
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"Downloading and unpacking takes at least {_gigabytes(needed)}, but only {_gigabytes(free)} are free. "
            "Make room, choose another data_dir, or download fewer sources at once",
            str(directory),
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _paths(file: WebFile, state: RemoteState, directory: Path) -> tuple[Path, Path]:
    """Return the paths of the complete and the partial file, which differ for each version on the server."""
    version = hashlib.sha256(f"{file.url}\n{state}".encode()).hexdigest()[:8]
    return directory / f"{version}-{file.name}", directory / f"{version}-{file.name}.part"


def _download_one(job: tuple[WebFile, RemoteState, Path, Path]) -> str | None:
    """Download a file to its destination. Errors are returned as a message, so that other downloads continue."""
    file, state, directory, data_dir = job
    try:
        whole = fetch(file, state, directory)
        if isinstance(file.places, str):
            _move(whole, data_dir / file.places)
        else:
            unpack(whole, {name: data_dir / place for name, place in file.places.items()})
        return None
    except Exception as error:  # from httpx, zipfile, tarfile, zlib, the operating system, ...
        logger.debug("The full trace:", exc_info=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return f"{file.url}: the disk is full. Free some space and start again; downloaded data is kept."
        return f"{file.url}: {error}"


def fetch(file: WebFile, state: RemoteState, directory: Path) -> Path:
    """Download a file, or the rest of it, and check its size and checksum.

    Returns:
        Path of the file in the directory.

    Raises:
        OSError: If the connection fails repeatedly, or the file is not the expected one.
    """
    whole, part = _paths(file, state, directory)
    if whole.exists():
        return whole
    headers = dict(HEADERS)
    if state.validator and not state.validator.startswith("W/"):
        headers["If-Range"] = state.validator  # a changed file is sent from the start
    with open(part, "ab") as stream:
        if state.size is None or stream.tell() > state.size:
            stream.truncate(0)
        try:
            http_get(
                file.url,
                stream,
                resume_size=os.path.getsize(part),
                headers=headers,
                expected_size=state.size,
                displayed_filename=file.name,
            )
        except OSError as error:
            if error.errno is not None or isinstance(error, (ConnectionError, HfHubHTTPError)):
                raise
            part.unlink()
            raise OSError(
                f"expected {state.size} bytes, but the server sent a different number. The file changed, or a proxy "
                "answered instead. Start again."
            ) from error
    if file.checksum:
        algorithm, _, expected = file.checksum.partition(":")
        with open(part, "rb") as stream:
            found = hashlib.file_digest(stream, algorithm).hexdigest()
        if found != expected:
            part.unlink()
            raise OSError(f"expected the {algorithm} {expected}, got {found}. Start again.")
    os.replace(part, whole)
    return whole


def unpack(archive: Path, places: dict[str, Path]):
    """Unpack a zip or tar archive, move the wanted parts to their destinations, and remove the archive.

    Args:
        archive: Path of the archive.
        places: Destinations by path in the archive, at any depth. Existing destinations are kept.

    Raises:
        OSError: If the archive is damaged, contains a path that leads out of it, or lacks a wanted part.
    """
    staging = archive.with_name(archive.name + ".unpacked")
    shutil.rmtree(staging, ignore_errors=True)
    logger.info("Unpacking %s", archive.name.partition("-")[2])
    try:
        if zipfile.is_zipfile(archive):
            _check_zip(archive)
            shutil.unpack_archive(archive, staging, "zip")
        else:
            shutil.unpack_archive(archive, staging, "gztar" if archive.suffix == ".gz" else "tar", filter="data")
        for name, place in places.items():
            if not _is_filled(place):
                _move(_find(staging, name), place)
    except (EOFError, shutil.ReadError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        archive.unlink()
        raise OSError(f"the archive is damaged ({error}). Start again.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    archive.unlink()


def _check_zip(archive: Path):
    with zipfile.ZipFile(archive) as content:
        names = content.namelist()
        size = sum(member.file_size for member in content.infolist())
    for name in names:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts:
            raise zipfile.BadZipFile(f"it names the file {name!r}, which leads out of it")
    if size > shutil.disk_usage(archive.parent).free:
        raise OSError(errno.ENOSPC, f"Unpacking takes {_gigabytes(size)}", str(archive))


def _find(directory: Path, name: str) -> Path:
    wanted = PurePosixPath(name).parts
    found = [path for path in directory.rglob(wanted[-1]) if path.parts[-len(wanted) :] == wanted]
    # macOS adds files with the same names to archives.
    found = [path for path in found if "__MACOSX" not in path.parts]
    if not found:
        raise OSError(
            f"expected {name!r} in the archive, got {sorted(os.listdir(directory))}. Unpack "
            f"{str(directory).removesuffix('.unpacked')!r} by hand."
        )
    return min(found, key=lambda path: len(path.parts))


def _move(path: Path, target: Path):
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, target)
