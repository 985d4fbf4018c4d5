"""The commands as a user types them, end to end on a small corpus: results, resuming, and bad input."""

import json
import pathlib
import shlex

import numpy as np
import pytest

from recalign_jax import cli, gin_config
from recalign_jax.checkpoint import saved, stacking
from recalign_jax.commands import eval, train
from tests.corpora import prepare_shop

USERS, ITEMS, LENGTH = 60, 40, 8
TINY = ("--gin_file", "gin_configs/models/t5_tiny.gin")
FINETUNE = (*TINY, "--gin_file", "gin_configs/runs/finetune.gin")
pytestmark = pytest.mark.usefixtures("fast_compilation")

FAST = (
    *("--gin.TRAIN_STEPS=6", "--gin.BATCH_SIZE=4", "--gin.LOG_PERIOD=2", "--gin.CHECKPOINT_PERIOD=3"),
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 128, 'targets': 32}",
    *("--gin.InputOptions.window=64", "--gin.InputOptions.data_shards=2"),  # less to render before the first step
)


class Shop:
    """A prepared corpus with a vocabulary, and the commands over it."""

    def __init__(self, folder: pathlib.Path, capsys):
        self.folder, self._capsys = folder, capsys
        self.vocabulary = f"--gin.VOCABULARY={folder / 'words.model'}"

    def __call__(self, command: str, *arguments: str, status: int = 0) -> dict:
        """Runs a command with --json; returns its object, or with status 2 or 1 the error message."""
        self._capsys.readouterr()
        assert cli.main([command, "--data_dir", str(self.folder), *arguments, "--json"]) == status
        output = self._capsys.readouterr()
        return json.loads(output.out.splitlines()[-1]) if status == 0 else {"error": output.err}

    def train(self, model_dir: str, *arguments: str, task: str = "shop_retrieval_aligned_token", status: int = 0):
        where = (f"--gin.MODEL_DIR={self.folder / model_dir}", f"--gin.MIXTURE_OR_TASK_NAME={task}", self.vocabulary)
        return self("train", *FINETUNE, *FAST, *where, *arguments, status=status)

    def params(self, model_dir: str, step: int) -> list[np.ndarray]:
        import jax

        path = str(self.folder / model_dir / "checkpoints" / str(step))
        shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in saved.read_arrays(path).items()}
        return jax.tree.leaves(jax.device_get(saved.load_params(path, stacking.unflatten(shapes))[0]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    random = np.random.default_rng(0)
    interactions = [
        (f"user{user}", f"thing{item}", time)
        for user in range(USERS)
        for time, item in enumerate(random.permutation(ITEMS)[:LENGTH])
    ]
    adjectives, nouns = (
        ("red", "small", "old", "loud", "soft"),
        ("kettle", "drum", "lamp", "chair", "boat", "hat", "map", "cup"),
    )
    items = [{"item_id": f"thing{n}", "title": f"{adjectives[n % 5]} {nouns[n % 8]}"} for n in range(ITEMS)]
    prepare_shop(folder, interactions, items, 120)
    return folder


@pytest.fixture
def shop(folder, capsys):
    return Shop(folder, capsys)


@pytest.fixture(scope="module")
def trained(folder):
    """A model of six steps that several tests look at."""
    arguments = (
        "--gin.MIXTURE_OR_TASK_NAME=shop_retrieval_aligned_token",
        f"--gin.VOCABULARY={folder / 'words.model'}",
    )
    model_dir = folder / "trained"
    assert (
        cli.main(["train", "--data_dir", str(folder), *FINETUNE, *FAST, *arguments, f"--gin.MODEL_DIR={model_dir}"])
        == 0
    )
    return model_dir


def eval_arguments(trained: pathlib.Path, shop: Shop) -> tuple[str, ...]:
    return (
        *(*TINY, "--gin_file", "gin_configs/runs/eval.gin", shop.vocabulary),
        *("--gin.TASK_NAME=shop_retrieval_token", f"--gin.CHECKPOINT_PATH={trained}"),
    )


# What a run may change when it is resumed.


@pytest.mark.parametrize(
    ("bindings", "follows"),
    [
        ([], False),
        ([("SCHEDULE", "inverse_sqrt")], False),
        ([("SCHEDULE", "linear_warmup_cosine")], True),
        ([("make_schedule.kind", "linear_warmup_cosine")], True),
        ([("SCHEDULE", "linear_warmup_cosine"), ("make_schedule.kind", "constant")], False),
    ],
)
def test_the_length_of_a_run_counts_where_its_learning_rate_follows_it(bindings, follows):
    gin_config.parse(["gin_configs/runs/finetune.gin"], [*bindings, ("InputOptions.workers", "2")])
    identity = train.run_identity([])
    assert ("TRAIN_STEPS" in identity) == follows
    assert "BATCH_SIZE" in identity
    assert "InputOptions.workers" not in identity


# What the commands give.


def test_train_evaluates_logs_and_reports(shop):
    result = shop.train("with_evaluation", "--gin.EVAL_PERIOD=4", "--gin.NUM_BEAMS=10", "--gin.MAX_EVAL_USERS=20")
    assert result["step"] == 6
    assert np.isfinite(result["loss"])
    assert 0 < result["packing_efficiency"] <= 1
    assert result["tokens_per_second"] > 0
    model_dir = pathlib.Path(result["model_dir"])
    records = [json.loads(line) for line in (model_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 6]
    for name in ("validation_loss", "validation_recall@10"):
        assert [record["step"] for record in records if name in record] == [4, 6]
    last = records[-1]
    assert last["validation_ndcg@10_low"] <= last["validation_ndcg@10"] <= last["validation_ndcg@10_high"]
    assert last["validation_users"] == 20
    logged = set().union(*records)
    assert {f"loss/shop_{family}_token" for family in ("retrieval", "mim", "mlm")} <= logged
    assert "T5Config.emb_dim = 64" in (model_dir / "config.gin").read_text()
    assert list(model_dir.glob("events.out.tfevents*"))
    assert [path.name for path in (model_dir / "tries").iterdir()] == ["shop_token.npz"]


def test_train_ends_with_what_to_type_next(shop, trained, capsys):
    """The command that is printed evaluates the model; here with few beams."""
    where = (f"--gin.MODEL_DIR={trained}", "--gin.MIXTURE_OR_TASK_NAME=shop_retrieval_aligned_token", shop.vocabulary)
    capsys.readouterr()
    assert cli.main(["train", "--data_dir", str(shop.folder), *FINETUNE, *FAST, *where]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("Next: recalign "))
    assert command[0] == "eval"
    assert f"--gin_file={TINY[1]}" in command
    assert "--gin.HISTORY_LENGTH=20" not in command
    assert cli.main([*command, "--gin.MAX_EVAL_USERS=3", "--gin.NUM_BEAMS=10"]) == 0


def test_what_to_type_next_has_the_prompts_and_the_model_of_the_training(shop):
    def command(*bindings: str) -> list[str]:
        given = [("VOCABULARY", "words.model"), *(binding.removeprefix("--gin.").split("=", 1) for binding in bindings)]
        gin_config.parse(["gin_configs/models/t5_tiny.gin", "gin_configs/runs/finetune.gin"], given)
        return eval.evaluation_command(["gin_configs/models/t5_tiny.gin"], str(shop.folder), "run/best")

    changed = ("--gin.HISTORY_LENGTH=5", "--gin.ITEM_FIELDS=('brand',)", "--gin.T5Config.mlp_dim=32")
    changed += ("--gin.TaskOptions.test_negatives=9", "--gin.T5Config.relative_attention_max_distance=64")
    changed += ("--gin.RATING_HISTORY=False", "--gin.SCORES=trie", "--gin.EVALUATION_WORDING=held_out")
    found = command("--gin.MIXTURE_OR_TASK_NAME=shop_all_token", *changed, "--gin.MAX_EVAL_USERS=9")
    assert found[:4] == ["recalign", "eval", "--data_dir", str(shop.folder)]
    assert {"--gin.TASK_NAME=shop_all_token", "--gin.CHECKPOINT_PATH=run/best", *changed} <= set(found)
    assert not any("MAX_EVAL_USERS" in part or "MESH" in part for part in found)
    for name in ("shop_mim_token", "task_of_a_module"):  # nothing that `recalign eval` evaluates
        assert command(f"--gin.MIXTURE_OR_TASK_NAME={name}") == []
    direct = command("--gin.train.mixture_or_task_name=shop_all_token")
    assert "--gin.TASK_NAME=shop_all_token" in direct


def test_evaluating_with_other_prompts_is_told_of(shop, trained, capsys):
    few = ("--gin.MAX_EVAL_USERS=3", "--gin.NUM_BEAMS=10")
    others = ("--gin.TaskOptions.history_length=5", "--gin.ITEM_FIELDS=('brand',)", "--gin.RATING_HISTORY=False")
    capsys.readouterr()
    assert cli.main(["eval", "--data_dir", str(shop.folder), *eval_arguments(trained, shop), *few, *others]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "was trained with HISTORY_LENGTH 20; here it is 5" in told
    assert "was trained with ITEM_FIELDS (); here it is ('brand',)" in told
    assert "was trained with RATING_HISTORY True; here it is False" in told


def test_train_lowers_the_loss(shop):
    result = shop.train("longer", "--gin.TRAIN_STEPS=60", "--gin.OPTIMIZER=adamw", "--gin.LEARNING_RATE=0.003")
    records = [json.loads(line) for line in (shop.folder / "longer" / "metrics.jsonl").read_text().splitlines()]
    assert result["loss"] < 0.7 * records[0]["loss"]


def test_quickstart_configuration(shop):
    files = ("--gin_file", "gin_configs/experiments/quickstart.gin", "--gin.BATCH_SIZE=8", "--gin.WARMUP_STEPS=1")
    task = ("--gin.MIXTURE_OR_TASK_NAME=shop_retrieval_aligned_token", f"--gin.MODEL_DIR={shop.folder / 'quick'}")
    # The vocabulary of so small a corpus spells the prompt out.
    longer = ("--gin.TASK_FEATURE_LENGTHS={'inputs': 80, 'targets': 8}", *FAST[-2:])
    assert shop("train", *files, *task, shop.vocabulary, "--gin.TRAIN_STEPS=2", *longer)["step"] == 2


@pytest.mark.parametrize("task", ["shop_mim_token", "shop_retrieval_aligned"])
def test_train_other_tasks(shop, task):
    assert shop.train(task, "--gin.TRAIN_STEPS=1", task=task)["step"] == 1


def test_eval(shop, trained):
    output = shop.folder / "evaluated"
    more = ("--gin.TASK_NAME=shop_all_token", "--gin.NUM_BEAMS=10", f"--gin.OUTPUT_DIR={output}")
    result = shop("eval", *eval_arguments(trained, shop), *more)
    values = result["retrieval"]
    assert values["users"] == result["ranking"]["users"] == USERS
    assert set(values) >= {"recall@5", "recall@10", "ndcg@5", "ndcg@10", "recall@10_unfiltered", "ndcg@10_unfiltered"}
    assert 0 <= values["recall@5"] <= values["recall@10"] <= 1
    low, high = values["intervals"]["recall@10"]
    assert low <= values["recall@10"] <= high
    assert result["step"] == 6
    assert json.loads((output / "metrics.json").read_text()) == result
    assert {path.name for path in output.iterdir()} == {"metrics.json", "retrieval.parquet", "ranking.parquet"}


def test_infer_writes_valid_items_that_the_user_does_not_have(shop, trained):
    output = shop.folder / "out"
    arguments = (*TINY, "--gin_file", "gin_configs/runs/infer.gin", shop.vocabulary, f"--gin.OUTPUT_DIR={output}")
    task = ("--gin.TASK_NAME=shop_retrieval_token", f"--gin.CHECKPOINT_PATH={trained}", "--gin.SPLIT=all")
    result = shop("infer", *arguments, *task, "--gin.NUM_BEAMS=15")
    rows = [json.loads(line) for line in pathlib.Path(result["output"]).read_text().splitlines()]
    assert result["users"] == len({row["user"] for row in rows}) == len(rows) == USERS
    bought = {}
    for line in (shop.folder / "raw" / "interactions.tsv").read_text().splitlines()[1:]:
        user, item, _ = line.split("\t")
        bought.setdefault(user, set()).add(item)
    for row in rows:
        assert len(set(row["items"])) == len(row["items"]) == len(row["titles"]) == 10
        assert not bought[row["user"]] & set(row["items"])
        assert set(row["items"]) <= {f"thing{n}" for n in range(ITEMS)}
        assert row["scores"] == sorted(row["scores"], reverse=True)


def test_baseline_popularity_is_what_counting_gives(shop):
    values = shop("baseline", "--corpus", "shop", "--method", "popularity")["retrieval"]
    sequences, counts = {}, dict.fromkeys((f"thing{n}" for n in range(ITEMS)), 0)
    for line in (shop.folder / "raw" / "interactions.tsv").read_text().splitlines()[1:]:
        user, item, _ = line.split("\t")
        sequences.setdefault(user, []).append(item)
    for sequence in sequences.values():
        for item in sequence[:-2]:
            counts[item] += 1
    # Ties may stand in any order: the rank of a target lies between the counts of better and of no worse items.
    least = most = 0
    for sequence in sequences.values():
        rivals = [counts[item] for item in counts if item not in sequence]
        better = sum(rival > counts[sequence[-1]] for rival in rivals)
        no_worse = sum(rival >= counts[sequence[-1]] for rival in rivals)
        least += no_worse < 10
        most += better < 10
    assert least / USERS <= values["recall@10"] <= most / USERS


def test_inspect(shop):
    assert shop("inspect", "--corpus", "shop")["statistics"]["interactions"] == USERS * LENGTH
    result = shop(
        "inspect",
        "--corpus",
        "shop",
        "--task",
        "retrieval",
        "-n",
        "2",
        "--vocabulary",
        str(shop.folder / "words.model"),
    )
    assert len(result["samples"]) == 2
    assert result["examples"] == USERS * (LENGTH - 3)
    assert all(sample["inputs"] and sample["targets"] for sample in result["samples"])


def test_inspect_finds_a_vocabulary(shop, monkeypatch):
    arguments = ("--corpus", "shop", "--task", "shop_mim_token", "--split", "validation", "-n", "1")
    assert "recalign vocab" in shop("inspect", *arguments, status=2)["error"]
    monkeypatch.setenv("RECALIGN_VOCABULARY", str(shop.folder / "words.model"))
    from_environment = shop("inspect", *arguments)["samples"]
    monkeypatch.delenv("RECALIGN_VOCABULARY")
    shop("vocab", "--corpus", "shop", "--size", "104")
    # That of another corpus, whose name begins so, is none of this one's.
    (shop.folder / "vocabularies" / "shop_second_100.model").write_bytes(b"of another corpus")
    assert len(shop("inspect", *arguments)["samples"]) == len(from_environment) == 1


# Resuming.


def test_resuming_gives_the_same_parameters_bit_for_bit(shop, trained):
    shop.train("stopped", "--gin.TRAIN_STEPS=4")
    shop.train("stopped")
    for uninterrupted, resumed in zip(shop.params("trained", 6), shop.params("stopped", 6), strict=True):
        np.testing.assert_array_equal(uninterrupted, resumed)
    steps = [json.loads(line)["step"] for line in (shop.folder / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_resuming_with_other_values_is_refused(shop, trained):
    error = shop.train("trained", "--gin.LEARNING_RATE=0.5", "--gin.TRAIN_STEPS=9", status=2)["error"]
    assert "LEARNING_RATE: 0.001 then, 0.5 now" in error


def test_a_finished_run_is_left_alone(shop, trained):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    assert shop.train("trained")["step"] == 6
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()} == before


# Bad input: exit status 2, one message, no trace of a half-done run.


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gin.TRIAN_STEPS=5"], "Did you mean 'TRAIN_STEPS'?"),
        (["--gin.MIXTURE_OR_TASK_NAME=shop_retreival"], "Did you mean 'shop_retrieval'?"),
        (["--gin.MIXTURE_OR_TASK_NAME=shopp_retrieval"], "no prepared corpus"),
        (["--gin.MIXTURE_OR_TASK_NAME=shop_rating"], "has no ratings"),
        (["--gin.BATCH_SIZE=0"], "BATCH_SIZE"),
        (["--gin.MODEL_DIR=gs://bucket/run"], "MODEL_DIR is gs://bucket/run: must be a folder"),
        (["--gin.MODEL_DIR="], "MODEL_DIR is needed"),
        (["--gin.OPTIMIZER=None"], "make_optimizer.name is None"),
        (["--gin.TRAIN_STEPS=0"], "TRAIN_STEPS is 0"),
        (["--gin.EVAL_PERIOD=None"], "TrainOptions.eval_period is None: must be a whole number."),
        (["--gin.PROFILE=10"], "TrainOptions.profile is 10: must be several values"),
        (["--gin.ITEM_FIELDS=brand"], "TaskOptions.item_fields is 'brand': must be several values"),
        (["--gin.TASK_FEATURE_LENGTHS={'inputs': 80}"], "must name inputs and targets"),
        (["--gin.EVAL_PERIOD=2", "--gin.NUM_BEAMS=5"], "5 beams may not find so many"),
        (["--gin.NEGATIVES=unifrom"], "Did you mean 'uniform'"),
        (["--gin.VOCABULARY=/nowhere/x.model"], "/nowhere/x.model"),
        (["--gin.OPTIMIZER=adamm"], "Did you mean 'adamw'?"),
        (["--gin.REMAT=most"], "remat"),
        (["--gin.LOSS_NORMALIZATION=rows"], "LOSS_NORMALIZATION"),
        (["--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 8}"], "TASK_FEATURE_LENGTHS"),
        (["--gin_file", "gin_configs/runs/finetun.gin"], "Did you mean 'gin_configs/runs/finetune.gin'?"),
        (["--gin.MESH={'data': 3}"], "3"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_bad_training_input(shop, arguments, says):
    error = shop.train("never", *arguments, status=2)["error"]
    assert says in error
    assert "Traceback" not in error
    assert "configurable" not in error
    assert not (shop.folder / "never").exists()


def test_bad_evaluation_input(shop, trained):
    good = eval_arguments(trained, shop)
    for changes, says in [
        ((f"--gin.CHECKPOINT_PATH={shop.folder}",), "No checkpoint"),
        (("--gin.TASK_NAME=shop_mim_token",), "shop_retrieval_token"),
        (("--gin.SCORES=tree",), "Did you mean 'trie'?"),
        (("--gin.SPLIT=train",), "SPLIT"),
        (("--gin.MAX_EVAL_USERS=0",), "number of users to evaluate is 0"),
        (("--gin.TASK_NAME=shop_retrieval",), "items as token"),
        (("--gin_file", "gin_configs/models/t5_mini.gin"), "parameter"),
    ]:
        assert says in shop("eval", *good, *changes, status=2)["error"]


def test_unknown_command(capsys):
    assert cli.main(["trian"]) == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err
