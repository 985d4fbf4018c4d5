"""Gets MovieLens-100K into a folder: from GroupLens if its server answers, else the copy inside recbole 1.2.1.

`recalign prepare --source movielens` reads both layouts; a folder that holds one of them already stays as it is.
Terms of the data: GroupLens' README (research use, acknowledgement, no redistribution).
"""

import argparse
import hashlib
import http.client
import io
import os
import pathlib
import subprocess
import sys
import tempfile
import urllib.request
import zipfile

URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
MD5 = "0e33842e24a9c977be4e0107933c0723"
# The interactions come last: they tell `recalign prepare` which layout a folder has, and so it has a whole one or none.
PUBLISHED = [f"ml-100k/{name}" for name in ("README", "u.genre", "u.item", "u.data")]

PACKAGE, SHA256 = "recbole==1.2.1", "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
PACKAGED = [f"recbole/dataset_example/ml-100k/ml-100k.{kind}" for kind in ("item", "inter")]

TIMEOUT_SECONDS = 15


def from_grouplens() -> bytes:
    """The publisher's archive."""
    with urllib.request.urlopen(URL, timeout=TIMEOUT_SECONDS) as response:
        archive = response.read()
    if hashlib.md5(archive).hexdigest() != MD5:
        raise OSError(f"{URL} is not the archive that GroupLens published: its md5 differs")
    return archive


def from_registry() -> bytes:
    """The package's wheel, without its dependencies."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--only-binary=:all:", "--dest", folder, PACKAGE], check=True, stdout=sys.stderr)
        [wheel] = pathlib.Path(folder).glob("*.whl")
        archive = wheel.read_bytes()
    if hashlib.sha256(archive).hexdigest() != SHA256:
        raise OSError(f"{PACKAGE} is not the package that this script knows: its sha256 differs")
    return archive


def unpack(archive: bytes, members: list[str], output: pathlib.Path) -> None:
    """Writes the named members, and no other, into `output`, without their folders, one after the other."""
    output.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        for member in members:
            target = output / pathlib.PurePosixPath(member).name
            aside = target.with_name(f".{target.name}.part")
            aside.write_bytes(files.read(member))
            os.replace(aside, target)


def is_whole(output: pathlib.Path) -> bool:
    """Whether the folder holds all files of one of the layouts."""
    names = ([pathlib.PurePosixPath(member).name for member in members] for members in (PUBLISHED, PACKAGED))
    return any(all((output / name).is_file() for name in layout) for layout in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=pathlib.Path, help="folder to put the files in")
    output = parser.parse_args().output
    if is_whole(output):
        print(f"{output} holds MovieLens-100K already.", file=sys.stderr)
        return
    try:
        unpack(from_grouplens(), PUBLISHED, output)
    except (http.client.HTTPException, OSError) as error:  # of which URLError is one
        print(f"GroupLens' server can't be used ({error}); taking the copy in {PACKAGE}.", file=sys.stderr)
        try:
            unpack(from_registry(), PACKAGED, output)
        except (subprocess.CalledProcessError, OSError) as second:
            raise SystemExit(f"MovieLens-100K can't be had: {second}") from error


if __name__ == "__main__":
    main()
