"""Downloads, from a server on this machine: what arrives, and that nothing is left where something is wrong."""

import hashlib
import http.server
import io
import socket
import stat
import threading
import zipfile

import pytest
from tensorflow_datasets.core.download import checksums, downloader

from recalign_jax.corpus import download
from recalign_jax.corpus.sources import amazon, movielens
from recalign_jax.errors import InputError
from tests import source_files


def zipped(members: dict[str, str], links: tuple[str, ...] = ()) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK if name in links else stat.S_IFREG) << 16
            archive.writestr(info, content)
    return packed.getvalue()


GOOD = zipped(
    {
        "ml-1m/ratings.dat": source_files.RATINGS_DAT,
        "ml-1m/movies.dat": source_files.MOVIES_DAT,
        "ml-1m/README": "terms",
    }
)


@pytest.fixture
def serve(monkeypatch):
    """Serves `contents` (path -> bytes); `serve.url` is its address."""
    contents: dict[str, bytes] = {}
    requested: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self._answer(b"")

        def do_GET(self):
            requested.append(self.path)
            self._answer(contents.get(self.path, b""))

        def _answer(self, body):
            found = self.path in contents
            self.send_response(200 if found else 404)
            if self.command == "GET":
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    urls = {"ml-1m": (f"{url}/ml-1m.zip",)}
    pairs = {"2014/DOMAIN": (f"{url}/reviews_DOMAIN_5.json.gz", f"{url}/meta_DOMAIN.json.gz")}
    monkeypatch.setattr(download, "DOWNLOADS", {"movielens": urls, "amazon": pairs})
    yield contents, requested, url
    server.shutdown()
    server.server_close()


def register(monkeypatch, url: str, content: bytes) -> None:
    """Puts a checksum on TFDS's record."""
    info = checksums.UrlInfo(len(content), hashlib.sha256(content).hexdigest(), "ml-1m.zip")
    known = {**checksums.get_all_url_infos(), f"{url}/ml-1m.zip": info}
    monkeypatch.setattr(checksums, "get_all_url_infos", lambda: dict(known))


def test_an_archive_arrives_and_is_kept(tmp_path, serve, monkeypatch, capsys):
    contents, requested, url = serve
    contents["/ml-1m.zip"] = GOOD
    register(monkeypatch, url, GOOD)
    folder = download.fetch("movielens", "ml-1m", tmp_path)
    assert folder == tmp_path / "downloads" / "movielens" / "ml-1m"
    assert sorted(path.name for path in folder.iterdir()) == ["README", "movies.dat", "ratings.dat"]
    interactions, items, _ = source_files.read(folder, open_folder=movielens.open_folder)
    assert (len(interactions), len(items)) == (2, 2)
    assert "No checksum" not in capsys.readouterr().out
    assert download.fetch("movielens", "ml-1m", tmp_path) == folder
    assert requested == ["/ml-1m.zip"]


def test_files_of_a_domain_without_published_checksums(tmp_path, serve, capsys):
    contents, _, _ = serve
    scratch = source_files.put(
        tmp_path / "made", "reviews_Beauty_5.json.gz", source_files.lines(source_files.REVIEW_2014)
    )
    source_files.put(scratch, "meta_Beauty.json.gz", source_files.lines(source_files.META_2014, write=repr))
    for path in scratch.iterdir():
        contents[f"/{path.name}"] = path.read_bytes()
    folder = download.fetch("amazon", "2014/Beauty", tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in scratch.iterdir()
    }
    assert len(source_files.read(folder, open_folder=amazon.open_folder)[0]) == 1
    assert "No checksum of http://127.0.0.1" in capsys.readouterr().out


EVIL = {
    "absolute": (zipped({"/etc/cron.d/x": "x"}), "'/etc/cron.d/x', which leads out of its folder"),
    "parent": (zipped({"ml-1m/ratings.dat": "x", "ml-1m/../../../x": "x"}), "leads out of its folder"),
    "backslashes": (zipped({"a\\..\\..\\x": "x"}), "leads out of its folder"),
    "drive": (zipped({"C:/x": "x"}), "leads out of its folder"),
    "link": (zipped({"ml-1m/a": "/etc/passwd", "ml-1m/a/b": "x"}, links=("ml-1m/a",)), "which is no plain file"),
    "no archive": (b"<html>busy</html>", "cannot be unpacked (File is not a zip file)"),
    "cut": (GOOD[:-30], "cannot be unpacked"),
    "damaged member": (GOOD[:55] + b"\xff\xff\xff" + GOOD[58:], "cannot be unpacked"),
    "a file that is a folder, too": (zipped({"x/a": "", "x/a/b": ""}), "cannot be unpacked"),
}


@pytest.mark.parametrize("name", EVIL)
def test_evil_archives_leave_nothing(tmp_path, serve, name):
    contents, _, _ = serve
    contents["/ml-1m.zip"], reason = EVIL[name]
    data_dir = tmp_path / "data"
    with pytest.raises(InputError) as caught:
        download.fetch("movielens", "ml-1m", data_dir)
    assert reason in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert list((data_dir / "downloads" / "movielens").iterdir()) == []


def test_a_wrong_checksum_leaves_nothing(tmp_path, serve, monkeypatch):
    contents, _, url = serve
    contents["/ml-1m.zip"] = GOOD
    register(monkeypatch, url, GOOD + b" ")
    with pytest.raises(InputError, match=r"ml-1m\.zip has another checksum than TensorFlow Datasets has on record"):
        download.fetch("movielens", "ml-1m", tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_is_not_there(tmp_path, serve, monkeypatch):
    _, requested, _ = serve
    with pytest.raises(InputError, match=r"ml-1m\.zip cannot be downloaded \(not found\)\. Fetch it by hand.*--input"):
        download.fetch("movielens", "ml-1m", tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setitem(download.DOWNLOADS["movielens"], "ml-1m", (f"http://127.0.0.1:{port}/ml-1m.zip",))
    with pytest.raises(InputError, match=r"\(no answer from 127\.0\.0\.1: ConnectionError\)\. Fetch it"):
        download.fetch("movielens", "ml-1m", tmp_path)
    assert requested == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_server_that_breaks_off(tmp_path, serve, monkeypatch):
    contents, _, _ = serve
    contents["/ml-1m.zip"] = GOOD
    monkeypatch.setattr(downloader, "MAX_RETRIES", 0)
    monkeypatch.setattr(download, "_check_answers", lambda url: contents.clear())
    with pytest.raises(InputError, match=r"cannot be downloaded \(Failed to get url .* HTTP code: 404"):
        download.fetch("movielens", "ml-1m", tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("source", "name", "reason"),
    [
        ("tables", "x", "--source tables has no downloads (movielens, amazon have)"),
        ("movielens", "ml1m", "no download 'ml1m'. There are: ml-100k, ml-1m, ml-10m"),
        ("movielens", "ml1m", "Did you mean 'ml-1m'?"),
        ("amazon", "Beauty", "no download 'Beauty'. There are: 2014/DOMAIN"),
        ("amazon", "2014/DOMAIN", "no download '2014/DOMAIN'"),
        ("amazon", "2014/../x", "no download '2014/../x'"),
        ("amazon", "2099/Beauty", "no download '2099/Beauty'"),
    ],
)
def test_unknown_names(tmp_path, source, name, reason):
    with pytest.raises(InputError) as caught:
        download.fetch(source, name, tmp_path)
    assert reason in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_tfds_has_the_checksums_that_the_docs_promise():
    known = checksums.get_all_url_infos()
    checked = [name for name, urls in download.DOWNLOADS["movielens"].items() if set(urls) <= known.keys()]
    assert checked == ["ml-100k", "ml-1m", "ml-20m", "ml-25m", "ml-latest-small"]
