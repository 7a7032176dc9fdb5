"""Preparing data: downloads from a server that misbehaves, the check, the sheets, and Parquet with equal rows."""

import errno
import functools
import hashlib
import io
import runpy
import shutil
import sys
import tarfile
import threading
import zipfile
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import yaml
from filelock import FileLock
from test_data_scripts import TREE
from test_recipes import ROOT
from test_sources import NAMES

from data_scripts import SOURCES, load_source, parquet
from data_scripts import download as downloads
from data_scripts.download import MANUAL_STEPS, WEB_FILES, WebFile, download
from data_scripts.parquet import write_card, write_parquet
from lisa_hf.schema import FEATURES, encode_mask, make_row
from lisa_hf.visualization import COLOURS, IGNORE_COLOUR, preview_sheet


PHOTOS = {
    "set/photos/a.jpg": b"a" * 3000,
    "set/photos/b.jpg": b"b" * 100_000,
    "__MACOSX/photos": b"",
    "set/x.txt": b"",
}


def make_zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def make_tar(files: dict[str, bytes], mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """Serves `contents` by path, knows Range and If-Range, and misbehaves as its attributes say."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.contents = {}
        self.requests = []  # (path, Range or None) of every request of which the body was read
        self.bytes_per_request = None  # breaks off after so many bytes of the body
        self.ignores_range = False
        self.claims = {}  # the Content-Length by path, if it is a lie

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, path = self.server, self.path.lstrip("/")
        if path not in server.contents:
            self.send_error(404)
            return
        content = server.contents[path]
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        start, asked = 0, self.headers.get("Range")
        if asked and not server.ignores_range and self.headers.get("If-Range", etag) == etag:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        body = content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", server.claims.get(path, len(body)))
        self.send_header("ETag", etag)
        self.end_headers()
        try:
            self.wfile.write(body[: server.bytes_per_request])
        except ConnectionError:
            return  # The client asked for the headers only.
        server.requests.append((path, asked))
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.close_session()
    # So much of what was received is written at once, and lost when the server breaks off.
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    # What huggingface_hub waits between two attempts.
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda seconds: None)
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()
    huggingface_hub.close_session()


@pytest.fixture
def photos(server, monkeypatch):
    """A source "photos" of one zip file, which belongs into `<data_dir>/coco/photos`."""
    server.contents["photos.zip"] = content = make_zip(PHOTOS)
    checksum = f"md5:{hashlib.md5(content).hexdigest()}"
    file = WebFile(server.url("photos.zip"), {"photos": "coco/photos"}, checksum)
    monkeypatch.setitem(WEB_FILES, "photos", [file])
    return server


def assert_photos(data_dir):
    found = {path.name: path.read_bytes() for path in (data_dir / "coco/photos").iterdir()}
    assert found == {"a.jpg": b"a" * 3000, "b.jpg": b"b" * 100_000}
    assert [path.name for path in (data_dir / ".downloads").iterdir() if path.name != ".lock"] == []


def kept(data_dir):
    return sorted(path.name.partition("-")[2] for path in (data_dir / ".downloads").iterdir() if path.name != ".lock")


# Downloads


@pytest.mark.parametrize("name, mode", [("x.zip", None), ("x.tar", "w"), ("x.tar.gz", "w:gz")])
def test_archives_are_unpacked_to_their_place_once(server, monkeypatch, tmp_path, name, mode):
    server.contents[name] = make_tar(PHOTOS, mode) if mode else make_zip(PHOTOS)
    monkeypatch.setitem(WEB_FILES, "photos", [WebFile(server.url(name), {"set/photos": "coco/photos"})])
    download(["photos"], tmp_path)
    assert_photos(tmp_path)
    num_requests = len(server.requests)
    download(["photos"], tmp_path)
    assert len(server.requests) == num_requests


def test_sources_share_files_and_plain_files_are_moved(photos, monkeypatch, tmp_path):
    photos.contents["refs(unc).json"] = b"[]"
    plain = WebFile(photos.url("refs(unc).json"), "refer_seg/refs(unc).json")
    monkeypatch.setitem(WEB_FILES, "refs", [plain, *WEB_FILES["photos"]])
    download(["photos", "refs"], tmp_path)
    assert_photos(tmp_path)
    assert (tmp_path / "refer_seg/refs(unc).json").read_bytes() == b"[]"
    assert sum(path == "photos.zip" for path, _ in photos.requests) <= 2  # one asks for the size


def test_a_server_that_breaks_off_is_asked_for_the_rest(photos, tmp_path):
    photos.bytes_per_request = 40_000
    download(["photos"], tmp_path)
    assert_photos(tmp_path)
    assert {"bytes=40000-", "bytes=80000-"} <= {asked for _, asked in photos.requests}


def test_a_later_call_goes_on_where_an_earlier_one_ended(photos, monkeypatch, tmp_path):
    (file,) = WEB_FILES["photos"]

    def die(url, stream, **kwargs):
        stream.write(photos.contents["photos.zip"][:50_000])
        raise ConnectionError("the cable is out")

    with monkeypatch.context() as patch:
        patch.setattr(downloads, "http_get", die)
        with pytest.raises(OSError, match=r"1 of 1 files failed. http://127.*photos.zip: the cable is out"):
            download(["photos"], tmp_path)
    assert kept(tmp_path) == ["photos.zip.part"] and not (tmp_path / "coco").exists()
    download(["photos"], tmp_path)
    assert_photos(tmp_path)
    assert ("photos.zip", "bytes=50000-") in photos.requests


def test_a_server_that_ignores_range_sends_all_again(photos, tmp_path):
    photos.ignores_range = True
    content = photos.contents["photos.zip"]
    (file,) = WEB_FILES["photos"]
    state = downloads._ask_server(file)
    _, part = downloads._paths(file, state, tmp_path)
    part.write_bytes(b"?" * 50_000)
    assert downloads.fetch(file, state, tmp_path).read_bytes() == content


def test_a_file_that_changed_is_not_joined_to_the_part_of_the_old_one(photos, monkeypatch, tmp_path):
    (file,) = WEB_FILES["photos"]
    file = WebFile(file.url, file.places)
    state = downloads._ask_server(file)
    _, part = downloads._paths(file, state, tmp_path)
    part.write_bytes(photos.contents["photos.zip"][:50_000])
    photos.contents["photos.zip"] = changed = photos.contents["photos.zip"].replace(b"b" * 60_000, b"c" * 60_000)
    # Asked before the change: If-Range makes the server send all of it.
    assert downloads.fetch(file, state, tmp_path).read_bytes() == changed
    # Asked after it: another part.
    assert downloads._paths(file, downloads._ask_server(file), tmp_path)[1] != part


@pytest.mark.parametrize("claim", [100, 10_000_000])
def test_a_wrong_size_is_an_error_and_nothing_is_kept(photos, monkeypatch, tmp_path, claim):
    answer = downloads._ask_server

    def outdated(file):
        return downloads.RemoteState(claim, answer(file).validator)

    monkeypatch.setattr(downloads, "_ask_server", outdated)
    with pytest.raises(OSError, match=f"expected {claim} bytes, but the server sent another number"):
        download(["photos"], tmp_path)
    assert kept(tmp_path) == [] and not (tmp_path / "coco").exists()


def test_a_server_that_never_sends_all_is_an_error_and_the_part_is_kept(photos, tmp_path):
    photos.contents["photos.zip"] = photos.contents["photos.zip"][:60_000]
    photos.claims["photos.zip"] = 103_000
    with pytest.raises(OSError, match="photos.zip: "):
        download(["photos"], tmp_path)
    assert not (tmp_path / "coco").exists()


def test_a_wrong_checksum_is_an_error_and_nothing_is_kept(photos, tmp_path):
    photos.contents["photos.zip"] = make_zip({"set/photos/a.jpg": b"forged"})
    with pytest.raises(OSError, match="expected the md5 .*, but found"):
        download(["photos"], tmp_path)
    assert kept(tmp_path) == [] and not (tmp_path / "coco").exists()


def test_the_other_files_go_on_when_one_is_gone(photos, monkeypatch, tmp_path):
    gone = WebFile(photos.url("gone.zip"), {"gone": "coco/gone"})
    monkeypatch.setitem(WEB_FILES, "photos", [gone, *WEB_FILES["photos"]])
    with pytest.raises(OSError, match="1 of 2 files failed. .*gone.zip: .*404"):
        download(["photos"], tmp_path)
    assert_photos(tmp_path)


Usage = namedtuple("Usage", "total used free")


def test_a_small_disk_is_said_before_anything_is_fetched(photos, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6 - 150_000, 150_000))
    with pytest.raises(OSError, match="takes at least 0.00 GB, but only 0.00 GB are free.*Make room"):
        download(["photos"], tmp_path)
    assert kept(tmp_path) == []


def test_a_disk_that_fills_up_keeps_what_was_fetched(photos, monkeypatch, tmp_path):
    def fill_up(url, stream, **kwargs):
        stream.write(photos.contents["photos.zip"][:50_000])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(downloads, "http_get", fill_up)
        with pytest.raises(OSError, match="photos.zip: the disk is full. Make room and start again"):
            download(["photos"], tmp_path)
    assert kept(tmp_path) == ["photos.zip.part"]
    download(["photos"], tmp_path)
    assert_photos(tmp_path)


def test_a_killed_unpacking_is_not_taken_for_done(photos, monkeypatch, tmp_path):
    unpack_archive = shutil.unpack_archive

    def die_halfway(archive, staging, *args, **kwargs):
        unpack_archive(archive, staging, *args, **kwargs)
        (staging / "set/photos/b.jpg").unlink()
        raise KeyboardInterrupt

    archive = tmp_path / ".downloads/1234-photos.zip"
    archive.parent.mkdir()
    archive.write_bytes(photos.contents["photos.zip"])
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "unpack_archive", die_halfway)
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # A killed process does not clean up.
        with pytest.raises(KeyboardInterrupt):
            downloads.unpack(archive, {"photos": tmp_path / "coco/photos"})
    assert not (tmp_path / "coco").exists() and archive.exists()
    downloads.unpack(archive, {"photos": tmp_path / "coco/photos"})
    assert_photos(tmp_path)


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "photos/../../evil.txt", "photos\\..\\..\\evil.txt"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_do_not_leave_their_directory(tmp_path, kind, name):
    files = {"photos/a.jpg": b"a", name: b"evil"}
    archive = tmp_path / "downloads" / f"1234-x.{kind}"
    archive.parent.mkdir()
    archive.write_bytes(make_zip(files) if kind == "zip" else make_tar(files, "w"))
    if kind == "tar" and (name.startswith("/") or "\\" in name):
        # The tar filter strips the slash; a backslash is an ordinary character.
        downloads.unpack(archive, {"photos": tmp_path / "coco/photos"})
    else:
        with pytest.raises(OSError, match="the archive is damaged .*evil.txt"):
            downloads.unpack(archive, {"photos": tmp_path / "coco/photos"})
        assert not archive.exists() and not (tmp_path / "coco").exists()
    assert not list(tmp_path.rglob("evil.txt"))
    assert not (tmp_path.parent / "evil.txt").exists()


@pytest.mark.parametrize("damage", [lambda data: data[:60_000], lambda data: data.replace(b"bbbb", b"bbbc", 1)])
def test_a_damaged_archive_is_removed(tmp_path, damage):
    archive = tmp_path / "1234-x.zip"
    archive.write_bytes(damage(make_zip(PHOTOS)))
    with pytest.raises(OSError, match="the archive is damaged"):
        downloads.unpack(archive, {"photos": tmp_path / "coco/photos"})
    assert list(tmp_path.iterdir()) == []


def test_an_archive_without_what_is_wanted_is_kept(tmp_path):
    archive = tmp_path / "1234-x.zip"
    archive.write_bytes(make_zip(PHOTOS))
    with pytest.raises(OSError, match=r"expected 'train2017' in the archive, but found .*'set'.*1234-x.zip' by hand"):
        downloads.unpack(archive, {"train2017": tmp_path / "coco/train2017"})
    assert list(tmp_path.iterdir()) == [archive]


def test_what_is_in_its_place_stays(tmp_path):
    archive = tmp_path / "1234-x.zip"
    archive.write_bytes(make_zip(PHOTOS))
    (tmp_path / "coco/photos").mkdir(parents=True)
    (tmp_path / "coco/photos/mine.jpg").write_bytes(b"mine")
    downloads.unpack(archive, {"photos": tmp_path / "coco/photos", "x.txt": tmp_path / "x.txt"})
    assert [path.name for path in (tmp_path / "coco/photos").iterdir()] == ["mine.jpg"]
    assert (tmp_path / "x.txt").exists()


def test_two_downloads_at_once_are_refused(photos, tmp_path):
    (tmp_path / ".downloads").mkdir()
    with FileLock(tmp_path / ".downloads/.lock"):
        with pytest.raises(OSError, match="Another download into .* is at work"):
            download(["photos"], tmp_path)


def test_every_source_has_links_or_a_step():
    assert WEB_FILES.keys() <= {"coco", *SOURCES} and MANUAL_STEPS.keys() <= SOURCES.keys()
    assert {name for name, builder in SOURCES.items() if builder.DOWNLOAD_PAGE} == {*WEB_FILES, *MANUAL_STEPS} - {
        "coco"
    }
    urls = {file.url for files in WEB_FILES.values() for file in files}
    assert all(url.startswith(("http://", "https://")) for url in urls)
    for file in (file for files in WEB_FILES.values() for file in files if file.checksum):
        algorithm, digest = file.checksum.split(":")
        assert len(bytes.fromhex(digest)) == hashlib.new(algorithm).digest_size


# The command line


def run(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the script, in this process."""
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / "recipes" / "prepare_data.py"), run_name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code or 0
    return status, *capsys.readouterr()


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "path", list(sys.path))
    return functools.partial(run, monkeypatch, capsys)


def test_download_from_the_command_line(cli, photos, monkeypatch, tmp_path):
    monkeypatch.setitem(WEB_FILES, "ade20k", WEB_FILES["photos"])
    status, out, _ = cli("download", "ade20k", "mapillary", "--data_dir", tmp_path / "data")
    assert status == 0
    assert_photos(tmp_path / "data")
    assert "mapillary: a step is left to you. See https://www.mapillary.com/dataset/vistas" in out
    assert str(tmp_path / "data" / "mapillary") in out


def test_a_failed_download_is_one_line(cli, photos, monkeypatch, tmp_path):
    monkeypatch.setitem(WEB_FILES, "ade20k", [WebFile(photos.url("gone.zip"), {"gone": "gone"})])
    status, _, err = cli("download", "ade20k", "--data_dir", tmp_path / "data")
    assert status == 2
    assert "prepare_data.py: error: 1 of 1 files failed. " in err.splitlines()[-1] and "404" in err.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["check"], "expected the names of sources, or --config"),
        (["check", "refcoco", "--config", "x.yaml"], "expected the names of sources, or --config"),
        (["check", "refcocoo"], "found refcocoo"),
        (["check", "coco"], "found coco"),
        (["check", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["download", "refcoco"], "--data_dir: expected the directory"),
    ],
)
def test_wrong_arguments_are_one_line(cli, arguments, message):
    status, _, err = cli(*arguments)
    assert status == 2 and len(err.splitlines()) == 1 and message in err


# Check


def write_recipe(path, **values):
    path.write_text(yaml.safe_dump({"learning_rate": 1e-3, **values}))
    return path


def test_check_of_a_complete_mixture(cli, tmp_path):
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        data_dir=str(TREE),
        sources={"ade20k": 9, "refcoco": {"weight": 3}},
        eval_sources={"reason_seg": {"split": "val"}},
    )
    status, out, _ = cli("check", "--config", recipe)
    assert status == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for line in (
        "ade20k: ready",
        "train 2 rows, 20210 published",
        "images 2 of 2 found",
        "page http://sceneparsing.csail.mit.edu",
        "licence Images: non-commercial research and education; annotations: BSD-3-Clause.",
        "3 of 3 are ready.",
    ):
        assert line in lines, out
    assert not any(line.startswith("train") for line in lines[lines.index("reason_seg: ready") :])


def test_check_names_what_is_missing(cli, tmp_path):
    tree = shutil.copytree(TREE, tmp_path / "dataset")
    (tree / "coco/train2017/000000000001.jpg").unlink()
    (tree / "coco/train2017/000000000002.jpg").write_bytes(b"")
    (tree / "vlpart/paco/annotations/paco_lvis_v1_train.json").unlink()
    recipe = write_recipe(tmp_path / "recipe.yaml", sources={"cocostuff": 9, "refcoco": 3, "paco_lvis": 3})
    status, out, _ = cli("check", "--config", recipe, "--data_dir", tree)
    assert status == 1
    assert "cocostuff: NOT READY" in out and "0 of 2 found" in out
    assert "000000000001.jpg" in out and "000000000002.jpg" in out
    assert "paco_lvis: NOT READY" in out and "paco_lvis_v1_train.json" in out
    assert out.splitlines()[-1] == "1 of 3 are ready. Not: cocostuff, paco_lvis"


def test_check_of_names_looks_at_all_splits(cli):
    status, out, _ = cli("check", "refcoco", "mapillary", "--data_dir", TREE)
    assert status == 0
    assert "testA" in out and "2 of 2 are ready." in out


# Preview


def has_text(sheet, colour):
    return (np.asarray(sheet) == colour).all(axis=-1).any()


def test_a_preview_shows_masks_and_phrases_in_one_colour():
    mask = np.zeros((60, 80), dtype=np.uint8)
    mask[10:30, 10:30] = 1
    image = io.BytesIO()
    PIL.Image.new("RGB", (80, 60), "white").save(image, "PNG")
    masks = {"nothing": np.zeros_like(mask), "box": mask}
    targets = [{"phrases": [name], "rle": encode_mask(mask)} for name, mask in masks.items()]
    row = make_row(image.getvalue(), "1", "mine", "semantic", targets, ignore=encode_mask(np.flip(mask).copy()))
    sheet = preview_sheet([row], columns=1, side=160)
    assert sheet.size == (12 + 160 + 10 + 160 + 12, 12 + 120 + 4 * 18 + 6 + 12)
    overlay = np.asarray(sheet.crop((182, 12, 342, 132)))
    for (x, y), colour in {(40, 40): COLOURS[0], (120, 80): IGNORE_COLOUR, (80, 60): (255, 255, 255)}.items():
        np.testing.assert_allclose(overlay[y, x], 127.5 + np.array(colour) / 2, atol=1)
    assert (np.asarray(sheet.crop((12, 12, 172, 132))) == 255).all()
    assert has_text(sheet, COLOURS[0]) and has_text(sheet, COLOURS[1]) and not has_text(sheet, COLOURS[2])


def test_a_preview_says_what_cannot_be_shown(tmp_path):
    target = {"phrases": ["box"], "rle": encode_mask(np.ones((6, 8), dtype=np.uint8))}
    image = io.BytesIO()
    PIL.Image.new("RGB", (80, 60), "white").save(image, "PNG")
    rows = [make_row(source, "1", "mine", "semantic", [target]) for source in ("nowhere.jpg", image.getvalue())]
    red = (np.asarray(preview_sheet(rows)) == (255, 0, 0)).all(axis=-1)
    assert red[:, : red.shape[1] // 2].any() and red[:, red.shape[1] // 2 :].any()


def test_preview_writes_a_sheet_per_source(cli, tmp_path):
    status, out, _ = cli(
        "preview", "ade20k", "llava_instruct", "--data_dir", TREE, "--output_dir", tmp_path / "sheets"
    )
    assert status == 0 and "ade20k: 2 of 2 rows" in out
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == [
        "ade20k_train.png",
        "llava_instruct_train.png",
    ]
    assert PIL.Image.open(tmp_path / "sheets/ade20k_train.png").width == 1336


# Convert


@pytest.fixture
def load(tmp_path):
    def load(name, data_dir=TREE, **kwargs):
        rows = load_source(name, str(data_dir), cache_dir=str(tmp_path / "cache"), **kwargs)
        return rows.cast_column("image", datasets.Image(decode=False))

    return load


@pytest.fixture
def open_parquet(tmp_path):
    """Rows of a converted source, streamed; the image as bytes."""

    def open_parquet(directory, name, split="train"):
        rows = datasets.load_dataset(
            str(directory), name, split=split, streaming=True, cache_dir=str(tmp_path / "cache")
        )
        assert rows.features == FEATURES
        return without_paths(rows.cast_column("image", datasets.Image(decode=False)))

    return open_parquet


def without_paths(rows):
    rows = [dict(row) for row in rows]
    for row in rows:
        image = row["image"]
        row["image"] = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
    return rows


@pytest.mark.parametrize("name", [*NAMES, "pascal_part", "reason_seg"])
def test_parquet_gives_equal_rows(load, open_parquet, tmp_path, name):
    rows = load(name)
    paths = write_parquet(rows, tmp_path / "parquet" / name, "train", max_shard_size="1KB")
    assert len(paths) == len(rows)  # No image is smaller than a shard.
    write_card(tmp_path / "parquet", {name: "none"})
    assert open_parquet(tmp_path / "parquet", name) == without_paths(rows)
    assert open_parquet(tmp_path / "parquet" / name, None) == without_paths(rows)


def test_a_shard_holds_many_rows_and_their_order_is_kept(load, open_parquet, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ROWS_PER_GROUP", 4)
    rows = load("shapes", num_train_scenes=30, num_validation_scenes=1, image_size=32)
    paths = write_parquet(rows, tmp_path / "parquet/shapes", "train", max_shard_size="20KB")
    assert 2 < len(paths) < 20
    assert open_parquet(tmp_path / "parquet/shapes", None) == without_paths(rows)


def test_finished_shards_are_not_written_again(load, tmp_path):
    rows = load("cocostuff")
    first, second = paths = write_parquet(rows, tmp_path, "train", max_shard_size="1KB")
    before = first.stat().st_mtime_ns
    second.unlink()
    assert write_parquet(rows, tmp_path, "train", max_shard_size="1KB") == paths
    assert first.stat().st_mtime_ns == before and second.exists()


def test_a_killed_conversion_leaves_nothing_that_looks_whole(load, open_parquet, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ROWS_PER_GROUP", 1)
    rows = load("cocostuff")
    embed, calls = parquet.embed_table_storage, []

    def die(table):
        calls.append(table)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return embed(table)

    with monkeypatch.context() as patch:
        patch.setattr(parquet, "embed_table_storage", die)
        patch.setattr(parquet, "thread_map", lambda function, items, **kwargs: [function(item) for item in items])
        with pytest.raises(KeyboardInterrupt):
            write_parquet(rows, tmp_path / "parquet/cocostuff", "train")
    assert [path.suffix for path in (tmp_path / "parquet/cocostuff/data").iterdir()] == [".part"]
    write_parquet(rows, tmp_path / "parquet/cocostuff", "train")
    assert [path.suffix for path in (tmp_path / "parquet/cocostuff/data").iterdir()] == [".parquet"]
    assert open_parquet(tmp_path / "parquet/cocostuff", None) == without_paths(rows)


def test_shards_of_other_rows_or_sizes_are_replaced(load, open_parquet, tmp_path):
    tree = shutil.copytree(TREE, tmp_path / "dataset")
    other = write_parquet(load("cocostuff", tree), tmp_path / "parquet/x", "val")
    write_parquet(load("cocostuff", tree), tmp_path / "parquet/x", "train", max_shard_size="1KB")
    write_parquet(load("cocostuff", tree), tmp_path / "parquet/x", "train")
    assert open_parquet(tmp_path / "parquet/x", None) == without_paths(load("cocostuff", tree))
    path = tree / "coco/train2017" / Path(load("cocostuff", tree)[0]["image"]["path"]).name
    path.write_bytes(path.read_bytes() + b"more")
    write_parquet(load("cocostuff", tree), tmp_path / "parquet/x", "train")
    assert open_parquet(tmp_path / "parquet/x", None)[0]["image"].endswith(b"more")
    assert other[0].exists()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_missing_image_is_said_before_anything_is_written(load, tmp_path, damage):
    tree = shutil.copytree(TREE, tmp_path / "dataset")
    damage(tree / "coco/train2017/000000000001.jpg")
    with pytest.raises(ValueError, match="000000000001.jpg' is empty or not there. Restore it"):
        write_parquet(load("llava_instruct", tree), tmp_path / "parquet", "train")
    assert not list((tmp_path / "parquet/data").iterdir())


def test_convert_and_push_from_the_command_line(cli, open_parquet, load, monkeypatch, tmp_path):
    calls = {}
    for method in ("create_repo", "upload_folder"):
        record = functools.partial(lambda method, *args, **kwargs: calls.update({method: kwargs}), method)
        monkeypatch.setattr(huggingface_hub.HfApi, method, record)
    output_dir = tmp_path / "parquet"
    arguments = ["--data_dir", TREE, "--output_dir", output_dir, "--push_to_hub", "me/rows"]
    status, out, _ = cli("convert", "refcoco+", "grefcoco", *arguments)
    assert status == 0 and f'load_dataset("{output_dir}", "grefcoco", split="' in out
    for name in ("refcoco+", "grefcoco"):
        for split, rows in load(name, split=None).items():
            assert open_parquet(output_dir, name, split) == without_paths(rows)
    assert "- refcoco+: The expressions: Apache-2.0" in (output_dir / "README.md").read_text()
    assert calls["create_repo"] == {"repo_id": "me/rows", "repo_type": "dataset", "private": True, "exist_ok": True}
    assert (calls["upload_folder"]["repo_id"], calls["upload_folder"]["folder_path"]) == ("me/rows", output_dir)
    allowed = calls["upload_folder"]["allow_patterns"]
    files = [str(path.relative_to(output_dir)) for path in output_dir.rglob("*") if path.is_file()]
    assert sorted(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allowed)) == sorted(files)


def test_convert_of_a_recipe_takes_its_splits(cli, open_parquet, tmp_path):
    recipe = write_recipe(
        tmp_path / "r.yaml", data_dir=str(TREE), sources={"refcoco": 1}, eval_sources={"refcoco": {"split": "testA"}}
    )
    status, _, _ = cli("convert", "--config", recipe, "--output_dir", tmp_path / "parquet")
    assert status == 0
    names = sorted(path.name.partition("-")[0] for path in (tmp_path / "parquet/refcoco/data").iterdir())
    assert names == ["testA", "train"]
    assert open_parquet(tmp_path / "parquet", "refcoco", "testA")
