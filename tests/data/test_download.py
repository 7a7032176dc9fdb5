"""Downloads from a server that breaks off, lies, or sends unwanted content."""

import errno
import hashlib
import io
import shutil
import tarfile
import threading
import zipfile
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from filelock import FileLock
from fixtures.recipes import prepare_data

from data_scripts import SOURCES
from data_scripts import download as downloads
from data_scripts.download import MANUAL_STEPS, WEB_FILES, WebFile, download


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
        self.content_type = "application/octet-stream"

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
        self.send_header("Content-Type", server.content_type)
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


def test_a_file_that_changed_is_not_joined_to_the_part_of_the_old_one(photos, tmp_path):
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
    with pytest.raises(OSError, match=f"expected {claim} bytes, but the server sent a different number"):
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
    with pytest.raises(OSError, match="expected the md5 .*, got"):
        download(["photos"], tmp_path)
    assert kept(tmp_path) == [] and not (tmp_path / "coco").exists()


def test_the_other_files_go_on_when_one_is_gone(photos, monkeypatch, tmp_path):
    gone = WebFile(photos.url("gone.zip"), {"gone": "coco/gone"})
    monkeypatch.setitem(WEB_FILES, "photos", [gone, *WEB_FILES["photos"]])
    with pytest.raises(OSError, match="1 of 2 files failed. .*gone.zip: .*404"):
        download(["photos"], tmp_path)
    assert_photos(tmp_path)


def test_a_web_page_is_not_taken_for_a_file(photos, monkeypatch, tmp_path):
    photos.contents["refs.json"] = b"<html>Please sign in</html>"
    photos.content_type = "text/html; charset=utf-8"
    monkeypatch.setitem(WEB_FILES, "photos", [WebFile(photos.url("refs.json"), "refer_seg/refs.json")])
    with pytest.raises(OSError, match="refs.json: the server sent a web page"):
        download(["photos"], tmp_path)
    assert not (tmp_path / "refer_seg").exists()


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
        with pytest.raises(OSError, match="photos.zip: the disk is full. Free some space and start again"):
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
    with pytest.raises(OSError, match=r"expected 'train2017' in the archive, got .*'set'.*1234-x.zip' by hand"):
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
        with pytest.raises(OSError, match="Another download into .* is running"):
            download(["photos"], tmp_path)


def test_every_source_has_links_or_a_step():
    assert WEB_FILES.keys() <= {"coco", *SOURCES} and MANUAL_STEPS.keys() <= SOURCES.keys()
    with_page = {name for name, builder in SOURCES.items() if builder.DOWNLOAD_PAGE}
    assert with_page == {*WEB_FILES, *MANUAL_STEPS} - {"coco"}
    urls = {file.url for files in WEB_FILES.values() for file in files}
    assert all(url.startswith(("http://", "https://")) for url in urls)
    for file in (file for files in WEB_FILES.values() for file in files if file.checksum):
        algorithm, digest = file.checksum.split(":")
        assert len(bytes.fromhex(digest)) == hashlib.new(algorithm).digest_size


def test_download_from_the_command_line(photos, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(WEB_FILES, "ade20k", WEB_FILES["photos"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sources: {mapillary: 1, scenes: {builder: ade20k, weight: 1}}\neval_sources: {ade20k: }\n")
    status, out, _ = prepare_data(capsys, "download", "--config", recipe, "--data_dir", tmp_path / "data")
    assert status == 0
    assert_photos(tmp_path / "data")
    assert "mapillary: needs a manual step. See https://www.mapillary.com/dataset/vistas" in out
    assert str(tmp_path / "data" / "mapillary") in out


def test_a_failed_download_is_one_line(photos, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(WEB_FILES, "ade20k", [WebFile(photos.url("gone.zip"), {"gone": "gone"})])
    status, _, err = prepare_data(capsys, "download", "ade20k", "--data_dir", tmp_path / "data")
    assert status == 2
    assert "prepare_data.py: error: 1 of 1 files failed. " in err.splitlines()[-1] and "404" in err.splitlines()[-1]
