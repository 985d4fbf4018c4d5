"""Gets MovieLens-100K into a folder: from GroupLens if its server answers, else the copy inside recbole 1.2.1.

`recalign prepare --source movielens` reads both layouts. Terms of the data: GroupLens' README (research use,
acknowledgement, no redistribution).
"""

import argparse
import hashlib
import io
import pathlib
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile

URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
MD5 = "0e33842e24a9c977be4e0107933c0723"
PUBLISHED = [f"ml-100k/{name}" for name in ("u.data", "u.item", "u.genre", "README")]

PACKAGE, SHA256 = "recbole==1.2.1", "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
PACKAGED = [f"recbole/dataset_example/ml-100k/ml-100k.{kind}" for kind in ("inter", "item")]

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
    """Writes the named members, and no other, into `output`, without their folders."""
    output.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        for member in members:
            (output / pathlib.PurePosixPath(member).name).write_bytes(files.read(member))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=pathlib.Path, help="folder to put the files in")
    output = parser.parse_args().output
    try:
        unpack(from_grouplens(), PUBLISHED, output)
    except (urllib.error.URLError, OSError) as error:
        print(f"GroupLens' server can't be used ({error}); taking the copy in {PACKAGE}.", file=sys.stderr)
        try:
            unpack(from_registry(), PACKAGED, output)
        except (subprocess.CalledProcessError, OSError) as second:
            raise SystemExit(f"MovieLens-100K can't be had: {second}") from error


if __name__ == "__main__":
    main()
