"""Rows from others may name files: only those of the dataset and of `data_dir` are read."""

import functools
import http.server
import io
import os
import threading

import datasets
import numpy as np
import PIL.Image
import pytest

from data_scripts import load_source, make_builder
from data_scripts.parquet import write_parquet
from lisa_hf.data.images import load_row_image, undecoded


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


MASK = png(np.eye(4, 6, dtype=np.uint8))
PHOTO = png(np.zeros((4, 6, 3), np.uint8))


@pytest.fixture
def load(tmp_path):
    """Load a Parquet file of one row with an image at the given path, in a directory next to a secret."""
    (tmp_path / "data" / "rows").mkdir(parents=True)
    for path in ("secret.png", "data/photo.png", "data/rows/own.png"):
        (tmp_path / path).write_bytes(PHOTO)

    def load(image_path: str | None, mask_path: str | None = None, **options):
        image = {"bytes": PHOTO if image_path is None else None, "path": image_path}
        mask = {"bytes": MASK if mask_path is None else None, "path": mask_path}
        table = datasets.Dataset.from_dict({"image": [image], "mask": [mask], "phrases": ["it"]})
        table.to_parquet(tmp_path / "data" / "rows" / "train.parquet")
        options = {"builder": "hub", "path": str(tmp_path / "data" / "rows" / "*.parquet")} | options
        return load_source("mine", cache_dir=str(tmp_path / "cache"), **options)

    return load


@pytest.fixture
def server(tmp_path):
    """Serve PHOTO, and count the requests."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self, body=b""):
            requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(PHOTO)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = functools.partialmethod(do_HEAD, body=PHOTO)

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/photo.png", requests
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "form", ["{}/secret.png", "file://{}/secret.png", "../../secret.png", "{}/data/../secret.png"]
)
def test_files_outside_of_the_data_are_not_read(load, tmp_path, form, streaming):
    path = form.format(tmp_path)
    for paths in ((path, None), (None, path)):
        for options in ({}, {"data_dir": str(tmp_path / "data"), "allow_urls": True}):
            with pytest.raises(ValueError, match="expected an image in the row, or a file in .*, got .*secret"):
                list(load(*paths, streaming=streaming, **options))


@pytest.mark.parametrize("archive", ["zip://a.png::{}/secret.zip", "local://a.png::{}/data/photo.png"])
def test_files_of_archives_outside_of_the_data_are_not_read(load, tmp_path, archive):
    with pytest.raises(ValueError, match="expected an image in the row"):
        load(archive.format(tmp_path), data_dir=str(tmp_path / "data"))


def test_files_of_the_data_are_read(load, tmp_path):
    data_dir = str(tmp_path / "data")
    for path, options in [
        ("own.png", {}),
        (str(tmp_path / "data" / "rows" / "own.png"), {}),
        ("photo.png", {"data_dir": data_dir}),
        (str(tmp_path / "data" / "photo.png"), {"data_dir": data_dir}),
        (None, {}),
    ]:
        (row,) = undecoded(load(path, **options))
        assert load_row_image(row)["original_size"] == [4, 6]


def test_a_skipped_row_asks_no_server(load, server):
    url, requests = server
    with pytest.raises(ValueError, match="Set `allow_urls: true`"):
        load(url)
    with pytest.raises(ValueError, match="Set `allow_urls: true`"):
        load(None, mask_path=url)
    with pytest.raises(ValueError, match="expected at most 1%"):
        load(url, on_bad_row="skip")
    assert not requests


def test_urls_are_read_and_converted_if_they_are_allowed(load, server, tmp_path, monkeypatch):
    url, requests = server
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    rows = load(url, allow_urls=True)
    assert load_row_image(undecoded(rows)[0])["original_size"] == [4, 6] and requests
    write_parquet(rows, tmp_path / "converted", "train")
    (row,) = undecoded(datasets.load_dataset(str(tmp_path / "converted"), split="train"))
    assert row["image"]["bytes"] == PHOTO


def test_paths_in_converted_rows_are_checked_too(load, tmp_path):
    rows = undecoded(load(None))
    rows = rows.map(lambda row: {"image": {"bytes": None, "path": str(tmp_path / "secret.png")}})
    rows.to_parquet(tmp_path / "data" / "rows" / "again.parquet")
    with pytest.raises(ValueError, match="expected an image in the row"):
        load(None, path=str(tmp_path / "data" / "rows" / "again.parquet"))


def test_rows_follow_a_file_that_changed_on_a_web_server(load, tmp_path):
    load(None)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "data" / "rows")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{httpd.server_port}/train.parquet"
        hashes = []
        for seconds in (1, 1, 2):  # same size, another time
            os.utime(tmp_path / "data" / "rows" / "train.parquet", (seconds, seconds))
            hashes.append(make_builder("mine", builder="hub", path=url, cache_dir=str(tmp_path / "cache")).hash)
        httpd.shutdown()
    assert hashes[0] == hashes[1] != hashes[2]
