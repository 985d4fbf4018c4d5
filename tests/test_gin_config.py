"""gin: names and values as a person types them, errors that say what to do, and the project's own files."""

import argparse
import ast
import pathlib
import re

import gin
import pytest

from recalign_jax import gin_config
from recalign_jax.errors import InputError
from recalign_jax.training.input_pipeline import InputOptions

TEXT = """
STEPS = 10
DIR = None
LENGTHS = {'inputs': 512, 'targets': 128}
SIZE = %STEPS

InputOptions.batch_size = %SIZE
InputOptions.task_feature_lengths = %LENGTHS
"""


@pytest.fixture
def file(tmp_path) -> str:
    path = tmp_path / "run.gin"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Files of the project are found from any folder."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


@gin.configurable(module="tests")
def show(value=None):
    """What gin makes of a value."""
    return value


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], []),
        (["--gin.STEPS=3"], [("STEPS", "3")]),
        (["--gin.STEPS", "3", "--gin.DIR=/a=b"], [("STEPS", "3"), ("DIR", "/a=b")]),
        (["--gin.STEPS", "-3"], [("STEPS", "-3")]),
        (["--gin.DIR="], [("DIR", "")]),
        (["--gin.DIR=/two words"], [("DIR", "/two words")]),
        (["--gin.DIR", "/two words"], [("DIR", "/two words")]),
        (["--gin.LENGTHS={'inputs': 9, 'targets': 9}"], [("LENGTHS", "{'inputs': 9, 'targets': 9}")]),
        (["--gin.STEPS=1", "--gin.STEPS=2"], [("STEPS", "1"), ("STEPS", "2")]),
    ],
)
def test_bindings_on_the_command_line(arguments, expected):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    gin_config.add_arguments(parser)
    parser.add_argument("--json", action="store_true")
    for around in (["--json", "--gin_file", "a.gin", *arguments], [*arguments, "--gin_file", "a.gin", "--json"]):
        args, left = parser.parse_known_args(around)
        assert gin_config.bindings_of(left) == expected
        assert args.gin_file == ["a.gin"]
        assert args.json


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gni.STEPS=3"], "Unknown argument '--gni.STEPS=3'"),
        (["STEPS=3"], "Unknown argument 'STEPS=3'"),
        (["--gin.STEPS"], "--gin.STEPS needs a value"),
        (["--gin.STEPS", "--gin.DIR=x"], "--gin.STEPS needs a value"),
    ],
)
def test_arguments_that_are_no_bindings(arguments, message):
    with pytest.raises(InputError, match=message):
        gin_config.bindings_of(arguments)


# Values.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("200", 200),
        ("-3", -3),
        ("0.001", 0.001),
        ("True", True),
        ("None", None),
        ("'quoted'", "quoted"),
        ('"quoted"', "quoted"),
        ("'/data/my_run'", "/data/my_run"),
        ("'2026_11_22'", "2026_11_22"),
        ("'my_run' and 'more", "'my_run' and 'more"),
        ("(1, 'a')", (1, "a")),
        ("{'data': 1, 'fsdp': -1}", {"data": 1, "fsdp": -1}),
        ("%STEPS", 10),
        ("[%STEPS, 'x', (%STEPS,)]", [10, "x", (10,)]),
        # Everything else is a string as it stands.
        ("/tmp/run 1", "/tmp/run 1"),
        ("gs://bucket/run", "gs://bucket/run"),
        ("amazon_beauty_retrieval", "amazon_beauty_retrieval"),
        ("it's", "it's"),
        ('say "it\'s"', 'say "it\'s"'),
        ("007", "007"),
        ("true", "true"),
        ("a#b", "a#b"),
        ("C:\\new\\table", "C:\\new\\table"),
        ("", ""),
        ("100 %", "100 %"),
        ("Schönes % @ {", "Schönes % @ {"),
    ],
)
def test_values(file, text, value):
    gin_config.parse([file], [("DIR", text), ("show.value", "%DIR")])
    assert show() == value
    assert type(show()) is type(value)


def test_bindings_stand_above_files_and_later_ones_above_earlier(file, tmp_path):
    second = tmp_path / "second.gin"
    second.write_text(f"include '{file}'\nSTEPS = 20\n")
    gin_config.parse([file], [])
    assert InputOptions() == InputOptions(batch_size=10)
    gin_config.parse([str(second)], [])
    assert InputOptions().batch_size == 20
    gin_config.parse([file, str(second)], [("STEPS", "30"), ("STEPS", "40")])
    assert InputOptions().batch_size == 40
    gin_config.parse([file], [("InputOptions.batch_size", "8"), ("InputOptions.window", "99")])
    assert InputOptions() == InputOptions(batch_size=8, window=99)
    gin_config.parse([], [])
    assert InputOptions() == InputOptions()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("STEPS", "0.5"),
        ("STEPS", "None"),
        ("STEPS", "%DIR"),
        ("LENGTHS", "{}"),
        ("LENGTHS", "None"),
        ("DIR", "{'a': 1}"),
    ],
)
def test_values_that_may_replace_each_other(file, name, value):
    gin_config.parse([file], [(name, value)])
    assert gin_config.snapshot()[name] == value


def test_snapshot_and_names(file):
    gin_config.parse([file], [("STEPS", "7"), ("DIR", "/tmp/a run"), ("InputOptions.window", "64")])
    expected = {
        "STEPS": "7",
        "DIR": "'/tmp/a run'",
        "SIZE": "%STEPS",
        "LENGTHS": "{'inputs': 512, 'targets': 128}",
        "InputOptions.batch_size": "%SIZE",
        "InputOptions.task_feature_lengths": "%LENGTHS",
        "InputOptions.window": "64",
    }
    assert gin_config.snapshot() == expected
    assert set(gin_config.names()) == set(expected)


def test_a_snapshot_does_not_break_long_values(file):
    long = {f"name {number}": list(range(20)) for number in range(40)}
    gin_config.parse([file], [("LENGTHS", repr(long)), ("DIR", "word " * 500)])
    assert ast.literal_eval(gin_config.snapshot()["LENGTHS"]) == long
    assert gin_config.snapshot()["DIR"] == repr("word " * 500)


def test_folders_stay_what_they_are(file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    gin_config.parse([file], [("DIR", "~/runs")])
    assert gin_config.snapshot()["DIR"] == "'/home/ada/runs'"
    for given in ("2026_11_22", "2026", "2026.1", "2026.10", "1e5", "1E5", "+5", "0x10", "5j", "runs/~"):
        gin_config.parse([file], [("DIR", given)])
        assert gin_config.required("DIR", gin.query_parameter("%DIR"), "") == given
    for given, expected in (("10_000", 10_000), ("1e3", 1000.0)):
        gin_config.parse([file], [("STEPS", given)])
        assert gin.query_parameter("%STEPS") == expected
    gin_config.parse([file], [("show.value", "1e-3")])
    assert show() == 0.001


# Errors.


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("STEP", "3", r"Unknown gin name 'STEP'.*Did you mean 'STEPS'\? Defined: DIR, LENGTHS, SIZE, STEPS\."),
        ("InputOptions.bach_size", "3", r"bach_size.*Did you mean 'InputOptions.batch_size'"),
        ("InputOption.batch_size", "3", r"No configurable matching 'InputOption'.*Did you mean"),
        ("DIR", "@nothing()", r"--gin\.DIR=@nothing\(\): No configurable matching reference"),
        ("DIR", "%STEP", r"Unknown gin name 'STEP': it is used.*Did you mean 'STEPS'"),
        ("InputOptions.window", "%NOTHING", r"Unknown gin name 'NOTHING': it is used, but nothing defines it"),
        ("DIR", "{1, 2}", r"--gin\.DIR=\{1, 2\}: "),
        ("LENGTHS", "{'inputs': 256, targets: 64}", r"--gin\.LENGTHS=.*token 'targets'"),
        ("LENGTHS", "{'inputs': 256", r"--gin\.LENGTHS=\{'inputs': 256: "),
        ("InputOptions.", "3", r"--gin\.InputOptions\.=3: "),
        ("STEPS", "1O0", r"--gin\.STEPS=1O0: not a value of the kind that it replaces, 10\."),
        ("STEPS", "{'inputs': 1}", r"not a value of the kind that it replaces, 10\."),
        ("LENGTHS", "512", r"not a value of the kind that it replaces, \{'inputs': 512, 'targets': 128\}\."),
    ],
)
def test_bad_bindings(file, name, value, message):
    with pytest.raises(InputError, match=message) as caught:
        gin_config.parse([file], [(name, value)])
    assert "\n" not in str(caught.value)
    # The next parse starts anew.
    gin_config.parse([file], [("STEPS", "3")])
    assert InputOptions().batch_size == 3


def test_a_binding_without_any_file():
    with pytest.raises(InputError, match=r"Defined: none \(give a --gin_file\)"):
        gin_config.parse([], [("STEPS", "3")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("STEPS = \n", r"run\.gin.*line 1"),
        ("STEPS = 3\nSTEPS 4\n", r"run\.gin.*line 2"),
        ("STEPS = 'open\n", r"run\.gin"),
        ("LENGTHS = {'inputs': 3\n", r"run\.gin"),
        ("\nInputOptions.steps = 3\n", r"run\.gin.*no.* parameter named 'steps'.*line 2|run\.gin.*'steps'.*line 2"),
        ("Nothing.steps = 3\n", r"run\.gin.*No configurable matching 'Nothing'.*line 1"),
        ("include 'no/such/file.gin'\n", r"run\.gin.*no/such/file\.gin"),
        ("import recalign_jax.no_such_module\n", r"run\.gin.*no_such_module"),
        ("SIZE = %STEPS\n", r"Unknown gin name 'STEPS': it is used"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "run.gin"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        gin_config.parse([str(path)], [])
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named_with_its_nearest():
    with pytest.raises(
        InputError, match=r"gin_configs/runs/finetun\.gin.*Did you mean 'gin_configs/runs/finetune\.gin'"
    ):
        gin_config.parse(["gin_configs/runs/finetun.gin"], [])


def test_required():
    assert gin_config.required("MODEL_DIR", "x", "DIR") == "x"
    with pytest.raises(InputError, match=r"MODEL_DIR is needed: --gin\.MODEL_DIR=DIR"):
        gin_config.required("MODEL_DIR", None, "DIR")


# The project's files.

# Those for T5X are parsed by T5X, see test_t5x_bridge.py.
FILES = [file for file in gin_config.known_files() if "/t5x/" not in file]
MODELS = [file for file in FILES if "/models/" in file]
RUNS = [file for file in FILES if "/runs/" in file]


@pytest.fixture(scope="module")
def commands():
    """What the gin files of the commands configure."""
    from recalign_jax.commands import baseline, eval, infer, train

    return baseline, eval, infer, train


def closure(file: str) -> str:
    """The text of a file and of all that it includes, without comments."""
    text = (gin_config.PROJECT_ROOT / file).read_text(encoding="utf-8")
    included = re.findall(r"^include '(.+)'$", text, re.MULTILINE)
    return "\n".join([*map(closure, included), re.sub(r"#.*", "", text)])


def macros_in(text: str) -> set[str]:
    return set(re.findall(r"^([A-Z][A-Z0-9_]*) *=", text, re.MULTILINE))


def test_known_files():
    assert {"gin_configs/runs/finetune.gin", "gin_configs/models/t5_tiny.gin"} <= set(FILES)
    assert all((gin_config.PROJECT_ROOT / file).is_file() for file in FILES)
    assert pathlib.Path.cwd() != gin_config.PROJECT_ROOT


@pytest.mark.parametrize("file", FILES)
def test_every_file_parses(commands, file):
    gin_config.parse([file], [])
    assert gin_config.names()


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_goes_with_every_run(commands, model, run):
    gin_config.parse([model, run], [])
    model_macros, run_macros = (macros_in(closure(file)) for file in (model, run))
    assert not model_macros & run_macros
    bound = gin_config.names()
    assert {*model_macros, *run_macros} == {name for name in bound if "." not in name}
    assert "T5Config.emb_dim" in bound


@pytest.mark.parametrize("file", FILES)
def test_every_macro_of_a_file_is_used(file):
    """In the file, in those that it includes, or (a domain's) in the runs that it is for."""
    companions = "".join(map(closure, RUNS)) if "/domains/" in file else ""
    used = set(re.findall(r"%([A-Z][A-Z0-9_]*)", closure(file) + companions))
    assert macros_in(closure(file)) <= used


@pytest.mark.parametrize("file", FILES)
def test_every_file_begins_with_what_it_does_its_command_and_what_to_expect(file):
    text = (gin_config.PROJECT_ROOT / file).read_text(encoding="utf-8")
    header = "\n".join(re.match(r"((?:#.*\n)+)", text)[1].splitlines())
    assert re.search(r"^#   recalign \w+", header, re.MULTILINE)
    assert f"--gin_file {file}" in header
    assert "Expect" in header
    command = re.search(r"recalign \w+ .*?(?:[^\\]\n)", header.replace("\\\n#", ""))[0]
    for named in re.findall(r"--gin_file (\S+)", command):
        assert named in FILES
    named = re.findall(r"--gin\.(\w+)=", command)
    defined = macros_in("\n".join(closure(other) for other in re.findall(r"--gin_file (\S+)", command)))
    assert set(named) <= defined
