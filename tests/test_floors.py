"""The house: rooms import from lower floors only, no two files import each other, and the command line is light."""

import ast
import pathlib
import statistics
import subprocess
import sys
import time

import pytest

from recalign_jax import cli

ROOT = pathlib.Path(__file__).resolve().parents[1]
ROOMS = (
    {  # 0: what everything may use; one room
        *("recalign_jax.errors", "recalign_jax.files", "recalign_jax.terminal", "recalign_jax.gin_config"),
        *("recalign_jax.partitioning", "recalign_jax.distributed", "recalign_jax.roll_call", "recalign_jax.__init__"),
    },
    {"recalign_jax.corpus", "recalign_jax.model", "recalign_jax.metrics", "recalign_jax.hardware", "recalign_jax.host"},
    {"seqio_tasks", "recalign_jax.decoding", "recalign_jax.checkpoint"},
    {"recalign_jax.evaluation", "recalign_jax.inference", "recalign_jax.recommender"},
    {"recalign_jax.training"},
    {"recalign_jax.baselines", "recalign_jax.reporting"},
    {"recalign_jax.cli", "recalign_jax.commands"},
)
ONE_ROOM_FLOORS = (0, 6)
HEAVY = ("jax", "tensorflow", "tensorflow_datasets", "seqio", "transformers", "torch", "flax", "orbax", "grain")


def files() -> dict[str, pathlib.Path]:
    """Module -> file; a package's own file is PACKAGE.__init__."""
    paths = [*(ROOT / "recalign_jax").rglob("*.py"), *(ROOT / "seqio_tasks").rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(paths)}


def room_of(module: str) -> tuple[int, str]:
    for floor, rooms in enumerate(ROOMS):
        for room in rooms:
            if module == room or module.startswith(room + "."):
                return floor, "one room" if floor in ONE_ROOM_FLOORS else room
    raise AssertionError(f"{module} stands on no floor: name its room here")


def imports_of(path: pathlib.Path, known: dict[str, pathlib.Path]) -> set[str]:
    """The project's modules that a file imports, also late, inside functions."""

    def module(name: str) -> str | None:
        return name if name in known else f"{name}.__init__" if f"{name}.__init__" in known else None

    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {module(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {module(f"{node.module}.{alias.name}") or module(node.module) for alias in node.names}
    return {name for name in found if name}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = files()
    return {module: imports_of(path, known) for module, path in known.items()}


def test_the_oracle_sees_imports(graph):
    assert "recalign_jax.errors" in graph["recalign_jax.gin_config"]
    assert "recalign_jax.corpus.corpus" in graph["seqio_tasks.specs"]
    assert "seqio_tasks.tasks" in graph["seqio_tasks.__init__"]  # inside a function


def test_rooms_import_lower_floors_only(graph):
    wrong = []
    for module, imported in graph.items():
        floor, room = room_of(module)
        for other in imported:
            other_floor, other_room = room_of(other)
            if other_room != room and other_floor >= floor:
                wrong.append(f"{module} (floor {floor}) imports {other} (floor {other_floor})")
    assert wrong == []


def test_every_room_of_the_design_is_known():
    rooms = {room for floor in ROOMS for room in floor}
    for room in rooms:
        path = ROOT.joinpath(*room.split("."))
        assert path.is_dir() or path.with_suffix(".py").is_file(), f"{room} does not exist"


def test_no_files_import_each_other(graph):
    """Depth first: a module met again while it is still open closes a cycle."""
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_packages_files_hold_no_code():
    """But for the one public function of seqio_tasks, which T5X users call."""
    for module, path in files().items():
        if module.endswith(".__init__") and not module.startswith("seqio_tasks"):
            kinds = [type(node) for node in ast.parse(path.read_text(encoding="utf-8")).body]
            assert kinds in ([], [ast.Expr], [ast.Expr, ast.Assign]), module  # a docstring, the version


# The command line.


def test_every_command_has_its_module():
    for name in cli.COMMANDS:
        tree = ast.parse((ROOT / "recalign_jax" / "commands" / f"{name}.py").read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert {"add_arguments", "run"} <= functions, name


def imported_by(statement: str) -> set[str]:
    """The heavy packages that are loaded after a statement, in a process of its own."""
    code = f"import sys; {statement}; print('loaded', *(name for name in {HEAVY} if name in sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return set(output.splitlines()[-1].split()[1:])


def test_the_command_line_is_light():
    assert imported_by("import recalign_jax.cli") == set()
    assert imported_by("from recalign_jax import cli; cli.main(['--help'])") == set()


def test_corpus_and_samples_need_no_framework():
    modules = ("recalign_jax.corpus.corpus", "recalign_jax.corpus.catalog", "seqio_tasks.samples", "seqio_tasks.specs")
    assert imported_by(f"import {', '.join(modules)}") == set()


def test_help_answers_in_half_a_second():
    command = [sys.executable, "-m", "recalign_jax.cli", "--help"]
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        seconds.append(time.monotonic() - start)
    assert statistics.median(seconds) < 0.5
    assert all(name in result.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "status", "stream", "text"),
    [
        (["--help"], 0, "out", "usage: recalign <command>"),
        ([], 2, "out", "usage: recalign <command>"),
        (["--version"], 0, "out", "0."),
        (["trian"], 2, "err", "recalign: unknown command 'trian'. Did you mean 'train'? See recalign --help."),
    ],
)
def test_main(capsys, arguments, status, stream, text):
    assert cli.main(arguments) == status
    assert text in getattr(capsys.readouterr(), stream)


def test_an_error_is_one_message_and_a_status(capsys, tmp_path):
    assert cli.main(["baseline", "--data_dir", str(tmp_path), "--corpus", "nothing", "--method", "popularity"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("recalign baseline: No corpus 'nothing'")
    assert len(error.splitlines()) == 1
