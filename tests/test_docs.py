"""What the pages for readers say exists: links, files, commands, flags, macros; and docs/ builds as a site."""

import functools
import pathlib
import re
import subprocess
import sys

import pytest

from recalign_jax import cli

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(ROOT.glob("docs/*.md"))]
ROOMS = ("recalign_jax", "seqio_tasks", "gin_configs", "launch", "benchmarks", "tests", "docs", ".ci")
# Files of a run and of an example.
OTHERS = {"config.gin", "my_tasks.py"}
page_by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page: pathlib.Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def code(page: pathlib.Path) -> list[str]:
    """What a page shows as code, in blocks and in lines; a continued line is one."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^    (\S.*)", prose(page), flags=re.MULTILINE)
    return [*"\n".join(blocks).splitlines(), *indented, *re.findall(r"`([^`]+)`", prose(page).replace("\n", " "))]


def anchors(page: pathlib.Path) -> set[str]:
    """Those that a code host gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@page_by_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" not in target:
            name, _, anchor = target.partition("#")
            other = page.parent / name if name else page
            assert other.is_file(), target
            assert not anchor or anchor in anchors(other), target


@functools.cache
def project_files() -> set[str]:
    return {path.name for room in ROOMS for path in (ROOT / room).rglob("*")}


@page_by_page
def test_files_exist(page):
    for line in code(page):
        for path in re.findall(rf"(?<![\w/.-])(?:{'|'.join(map(re.escape, ROOMS))})/[\w./*-]*", line):
            assert list(ROOT.glob(path.rstrip("/."))), line
        if re.fullmatch(r"\w+\.(py|gin|sh|sbatch|md)", line) and line not in OTHERS:
            assert (ROOT / line).is_file() or line in project_files(), line


@functools.cache
def defined(script: str) -> list[str]:
    """The flags that a script or a command adds, as patterns read off its source: importing it would take seconds."""
    files = [script]
    if script.startswith("recalign_jax/commands/"):
        files += ["recalign_jax/cli.py", "recalign_jax/gin_config.py", "recalign_jax/distributed.py"]
    if script.startswith("benchmarks/"):
        files += [path.relative_to(ROOT).as_posix() for path in ROOT.glob("benchmarks/*.py")]
    sources = [(ROOT / name).read_text(encoding="utf-8") for name in files]
    return [re.sub(r"{\w+}", r"\\w+", flag) for source in sources for flag in re.findall(r'"(--[\w{}]+)"', source)]


@functools.cache
def macros() -> set[str]:
    """Those of the gin files, and one of T5X."""
    files = ROOT.glob("gin_configs/**/*.gin")
    found = {name for path in files for name in re.findall(r"^([A-Z_]+) =", path.read_text(), flags=re.MULTILINE)}
    return found | {"EVALUATOR_NUM_EXAMPLES"}


@page_by_page
def test_commands_flags_and_macros_exist(page):
    programs = r"(?:\brecalign ([a-z]+)\b|((?:benchmarks|tests|launch)/\w+\.py))([^#|;]*)"
    for line in code(page):
        for command, script, arguments in re.findall(programs, line):
            assert not command or command in cli.COMMANDS, line
            known = "|".join(defined(script or f"recalign_jax/commands/{command}.py"))
            for flag in re.findall(r"(?<= )--\w+\b(?!\.)", arguments):
                assert re.fullmatch(known, flag), line
        assert "m t5x." in line or set(re.findall(r"--gin\.([A-Z_]+)\b(?!\.)", line)) <= macros(), line


def test_the_site_builds_and_asks_no_other_host(tmp_path):
    """As launch/docs.sh builds it: a broken link, or a page that the navigation lacks, fails."""
    for library in ("furo", "myst_parser"):
        pytest.importorskip(library, reason="pip install -e '.[docs]' builds the site")
    [line] = re.findall(r"python -m (sphinx .*)", (ROOT / "launch/docs.sh").read_text(encoding="utf-8"))
    places = {"build/doctrees": str(tmp_path / "doctrees"), "site": str(tmp_path / "site")}
    command = [sys.executable, "-m", *(places.get(word, word) for word in line.split())]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for page in (tmp_path / "site").glob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?!a\b)[^>]*\b(?:src|href|srcset)="?(?:https?:)?//', text), page.name
    for style in (tmp_path / "site").rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", text), style.name
