"""Fetches published raw data: `recalign prepare --source movielens --download ml-1m`.

TensorFlow Datasets' download manager does the work: it shows progress, tries again where a server is busy, and checks
the checksums that it has on record, which it has for five sizes of MovieLens. Where there is none the publisher has
published none; the sha256 of each file that was read stands in `corpus.json` in any case.
"""

import pathlib
import re
import shutil
import stat
import urllib.parse
import zipfile
import zlib
from collections.abc import Sequence

from recalign_jax import errors, files, terminal

_GROUPLENS = "https://files.grouplens.org/datasets/movielens/{}.zip"
_SNAP = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"
_UCSD = "https://mcauleylab.ucsd.edu/public_datasets/data/"
_MOVIELENS = ("ml-100k", "ml-1m", "ml-10m", "ml-20m", "ml-25m", "ml-32m", "ml-latest-small", "ml-latest")
_DOMAIN = "DOMAIN"

# Source -> name -> addresses. DOMAIN stands for one that the publisher has, as `2014/Beauty`.
DOWNLOADS: dict[str, dict[str, tuple[str, ...]]] = {
    "movielens": {name: (_GROUPLENS.format(name),) for name in _MOVIELENS},
    "amazon": {
        "2014/DOMAIN": (f"{_SNAP}reviews_DOMAIN_5.json.gz", f"{_SNAP}meta_DOMAIN.json.gz"),
        "2018/DOMAIN": (
            f"{_UCSD}amazon_v2/categoryFilesSmall/DOMAIN_5.json.gz",
            f"{_UCSD}amazon_v2/metaFiles2/meta_DOMAIN.json.gz",
        ),
        "2023/DOMAIN": (
            f"{_UCSD}amazon_2023/raw/review_categories/DOMAIN.jsonl.gz",
            f"{_UCSD}amazon_2023/raw/meta_categories/meta_DOMAIN.jsonl.gz",
        ),
        "2023_5core/DOMAIN": (
            f"{_UCSD}amazon_2023/benchmark/5core/rating_only/DOMAIN.csv.gz",
            f"{_UCSD}amazon_2023/raw/meta_categories/meta_DOMAIN.jsonl.gz",
        ),
    },
}
_SECONDS_TO_CONNECT = 20


def fetch(source: str, name: str, data_dir: pathlib.Path) -> pathlib.Path:
    """Returns the folder `DATA_DIR/downloads/SOURCE/NAME` with the files, downloaded unless it is there already.

    Args:
      source: a key of DOWNLOADS.
      name: a key of DOWNLOADS[source], with a domain for DOMAIN.
      data_dir: where corpora are.

    Raises:
      InputError: unknown names, no connection, a wrong checksum, an archive with members that lead out of the folder.
        Then nothing is left behind.
    """
    urls = _urls(source, name)
    folder = data_dir / "downloads" / source / name.replace("/", "_")
    if folder.is_dir():
        terminal.say(f"Using {folder}, downloaded before.")
        return folder
    with files.atomic_directory(folder) as aside:
        scratch = aside / ".download"
        for url, path in zip(urls, _download(urls, scratch), strict=True):
            if url.endswith(".zip"):
                _unzip(url, path, aside)
            else:
                path.rename(aside / url.rpartition("/")[2])
        shutil.rmtree(scratch)
    terminal.say(f"Downloaded to {folder}. Its publisher's terms of use apply.")
    return folder


def _urls(source: str, name: str) -> tuple[str, ...]:
    if source not in DOWNLOADS:
        known = ", ".join(DOWNLOADS)
        raise errors.InputError(f"--source {source} has no downloads ({known} have). Give its folder with --input.")
    known_names = DOWNLOADS[source]
    if name in known_names and _DOMAIN not in name:
        return known_names[name]
    kind, _, domain = name.partition("/")
    if domain != _DOMAIN and re.fullmatch(r"\w+", domain, re.ASCII) and f"{kind}/{_DOMAIN}" in known_names:
        return tuple(url.replace(_DOMAIN, domain) for url in known_names[f"{kind}/{_DOMAIN}"])
    hint = errors.did_you_mean(name, known_names)
    raise errors.InputError(f"--source {source} has no download {name!r}. There are: {', '.join(known_names)}.{hint}")


def _download(urls: Sequence[str], folder: pathlib.Path) -> list[pathlib.Path]:
    import requests
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import checksums, download_manager, util

    known = checksums.get_all_url_infos()
    for url in urls:
        _check_answers(url)
        if url not in known:
            terminal.say(f"No checksum of {url} is published; its sha256 will stand in corpus.json.")
    try:
        manager = tfds.download.DownloadManager(download_dir=folder)
        return [pathlib.Path(path) for path in manager.download(list(urls))]
    except download_manager.NonMatchingChecksumError:
        raise errors.InputError(
            f"{' or '.join(urls)} has another checksum than TensorFlow Datasets has on record: it was damaged on its "
            "way, or its publisher has changed it. Nothing was kept. Try again, or fetch it by hand and use --input."
        ) from None
    except (OSError, requests.RequestException, util.DownloadError) as error:
        raise _unreachable(" and ".join(urls), error) from None


def _check_answers(url: str) -> None:
    """Says in seconds that there is no way to a server; the download manager would try for minutes."""
    import requests

    try:
        answer = requests.head(url, allow_redirects=True, timeout=_SECONDS_TO_CONNECT)
    except requests.RequestException as error:
        host = urllib.parse.urlsplit(url).hostname
        raise _unreachable(url, f"no answer from {host}: {type(error).__name__}") from None
    if answer.status_code == requests.codes.not_found:
        raise _unreachable(url, "not found")


def _unreachable(url: str, error: object) -> errors.InputError:
    return errors.InputError(
        f"{url} cannot be downloaded ({error}). Fetch it by hand, unpack it if it is a .zip, and give its folder with "
        "--input instead of --download."
    )


def _unzip(url: str, archive: pathlib.Path, folder: pathlib.Path) -> None:
    """Unpacks an archive; a single folder that holds all of it is left out. Looks at all members before it writes."""
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if not member.is_dir()]
            paths = [_inside(url, member) for member in members]
            tops = {path.parts[0] for path in paths}
            if len(tops) == 1 and all(len(path.parts) > 1 for path in paths):
                paths = [path.relative_to(path.parts[0]) for path in paths]
            with terminal.progress(f"Unpacking {url.rpartition('/')[2]}", len(members), "files") as advance:
                for member, path in zip(members, paths, strict=True):
                    target = folder / path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with opened.open(member) as packed, target.open("xb") as unpacked:
                        shutil.copyfileobj(packed, unpacked)
                    advance()
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, OSError) as error:
        raise errors.InputError(f"{url} cannot be unpacked ({error}). Nothing was kept.") from None


def _inside(url: str, member: zipfile.ZipInfo) -> pathlib.PurePosixPath:
    """Returns where a member goes; InputError if that is outside the folder, or if it is no plain file."""
    path = pathlib.PurePosixPath(member.filename.replace("\\", "/"))
    kind = stat.S_IFMT(member.external_attr >> 16)
    if path.is_absolute() or ".." in path.parts or ":" in member.filename or not path.parts:
        raise errors.InputError(f"{url} holds {member.filename!r}, which leads out of its folder. Nothing was kept.")
    if kind not in (0, stat.S_IFREG):
        raise errors.InputError(f"{url} holds {member.filename!r}, which is no plain file. Nothing was kept.")
    return path
