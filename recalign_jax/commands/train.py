"""`recalign train`: trains a model, or goes on where MODEL_DIR stopped."""

import argparse
import dataclasses
import functools
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import gin
import jax

from recalign_jax import files, gin_config, partitioning, terminal
from recalign_jax.checkpoint import locations
from recalign_jax.checkpoint.initial import load_base, load_initial
from recalign_jax.commands import trained_on
from recalign_jax.commands.common import EVALUATED, make_evaluation, model_config
from recalign_jax.commands.eval import evaluation_command
from recalign_jax.corpus.corpus import data_dir_or_default
from recalign_jax.errors import InputError
from recalign_jax.evaluation import report
from recalign_jax.model import t5
from recalign_jax.model.lora import LoraOptions
from recalign_jax.recommender import DecodingOptions, save_trie
from recalign_jax.training import preemption
from recalign_jax.training.input_pipeline import InputOptions
from recalign_jax.training.memory import Job
from recalign_jax.training.optimizer import handed_schedule, make_optimizer
from recalign_jax.training.preemption import Preemption
from recalign_jax.training.step import StepOptions, check_divides
from recalign_jax.training.train import Evaluator, TrainOptions, train
from seqio_tasks import components as task_components
from seqio_tasks import task_names
from seqio_tasks import vocabulary as vocabularies
from seqio_tasks.components import CorpusTask
from seqio_tasks.specs import TaskSpec

USES_GIN = True

# What may differ when a run is resumed: where it lies, how long it goes on, and how often it reports.
MAY_CHANGE = (
    *("MODEL_DIR", "TRAIN_STEPS", "EVAL_PERIOD", "CHECKPOINT_PERIOD", "LOG_PERIOD", "KEEP_CHECKPOINTS"),
    *("MAX_EVAL_USERS", "NUM_BEAMS", "EVAL_BATCH_SIZE", "MAX_INPUT_TOKENS", "SCORES", "EVALUATION_WORDING"),
    *("VOCABULARY", "BEST_METRIC", "EARLY_STOPPING", "PROFILE", "RESUME_CHANGED"),
    # The same arithmetic in another order: not the same bits, but the same run on other devices.
    *("MESH", "REMAT", "GRADIENT_ACCUMULATION", "LOGITS_CHUNKS", "InputOptions.workers"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All that a run is stands in gin."""
    del parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Trains as gin says."""
    with preemption.handled() as told_to_leave:
        result = train_command(args.data_dir, told_to_leave)
    terminal.say(f"Trained to step {result['step']}, loss {result['loss']:.4f}.")
    checkpoint = result["model_dir"]
    if best := result.get("best"):
        checkpoint = f"{checkpoint}/{locations.BEST}"
        terminal.say(f"Best: {best['metric']} {best['value']:.4f} at step {best['step']}, {checkpoint}")
    if command := evaluation_command(args.gin_file, args.data_dir, checkpoint):
        terminal.next_step(*command)
    return result


@gin.configurable("train", module="recalign")
def train_command(
    data_dir: str | None,
    told_to_leave: Preemption,
    model_dir: str | None = None,
    mixture_or_task_name: str | None = None,
    mixture_or_task_module: str | None = None,
    vocabulary: str | None = None,
    initial_checkpoint: str | None = None,
    evaluate_recommendations: bool = True,
) -> dict[str, Any]:
    """Puts the parts of a run together, and trains.

    Args:
      data_dir: where corpora are.
      told_to_leave: tells of SIGTERM.
      model_dir: MODEL_DIR.
      mixture_or_task_name: what to train on, as it is called in the SeqIO registry.
      mixture_or_task_module: a Python module to import first, that registers tasks of its own; without one, a task or
        mixture of prepared corpora.
      vocabulary: a SentencePiece model, see `vocabularies.find`.
      initial_checkpoint: what a new run starts from, see `load_initial`; None starts from random parameters.
      evaluate_recommendations: whether the mixture's recommendation tasks are evaluated on the validation split,
        beside the loss.
    """
    mixture_or_task_name = gin_config.required(
        "MIXTURE_OR_TASK_NAME", mixture_or_task_name, "movielens_retrieval_aligned_token"
    )
    model_dir = str(files.local_folder("MODEL_DIR", gin_config.required("MODEL_DIR", model_dir, "DIR")))
    vocabulary = vocabularies.find(gin_config.required("VOCABULARY", vocabulary, "PATH"), data_dir)

    if initial_checkpoint is not None:
        initial_checkpoint = str(initial_checkpoint)  # a folder may be called 2024
    options, input_options = TrainOptions(model_dir=model_dir), InputOptions()
    if mixture_or_task_module is None:
        components = task_components.of_corpora(mixture_or_task_name, vocabulary, data_dir)
    else:
        import_tasks(mixture_or_task_module, vocabulary, data_dir)
        components = task_components.registered(mixture_or_task_name, input_options.task_feature_lengths)
    task_specs = [component.spec for component, _ in components if isinstance(component, CorpusTask)]
    mesh = partitioning.make_mesh(options.mesh)
    step_options = StepOptions()
    check_divides(step_options, input_options.batch_size, input_options.task_feature_lengths["targets"], mesh)
    config = model_config(max(component.num_tokens for component, _ in components))
    evaluators = []
    if evaluate_recommendations and options.eval_period:
        partitioning.check_batch_size("EVAL_BATCH_SIZE", DecodingOptions().batch_size, mesh)
        evaluators = [make_evaluator(spec, config, mesh, prefix) for spec, prefix in evaluated(task_specs)]
    words = vocabularies.load(vocabulary)
    identity: dict[str, Any] = run_identity(task_specs) | {"vocabulary": words.fingerprint}
    initial_params, base, lora_options = None, None, LoraOptions()
    check = functools.partial(trained_on.check_start, task_specs, words, bool(lora_options.rank))
    if lora_options.rank:
        if initial_checkpoint is None:
            raise InputError("LORA_RANK needs something to adapt: --gin.INITIAL_CHECKPOINT=PATH.")
        values = gin_config.snapshot()
        if "adafactor" in values.get("OPTIMIZER", "") and "adafactor.multiply_by_parameter_scale" not in values:
            terminal.warn(
                "Adafactor's steps are relative to a parameter's size and new adapters are zero, so they would hardly "
                "learn: use --gin.OPTIMIZER=adamw."
            )
        shapes = partitioning.with_shardings(t5.abstract_params(config), mesh)
        base, told = load_base(initial_checkpoint, config, options.seed, shapes, check)
        identity.pop("INITIAL_CHECKPOINT", None)  # the path in `base` is whole, and has a fingerprint beside it
        # JSON has no tuples.
        identity |= {"base": told, "lora": dataclasses.asdict(lora_options) | {"targets": list(lora_options.targets)}}
    elif initial_checkpoint is not None:
        initial_params = functools.partial(load_initial, initial_checkpoint, config, options.seed, check=check)
    result = train(
        options,
        Job(config, make_optimizer(), mesh, step_options, input_options, lora_options),
        components,
        evaluators,
        identity=identity,
        preemption=told_to_leave,
        initial_params=initial_params,
        base=base,
        schedule=handed_schedule(),
    )
    if jax.process_index() == 0:
        for spec in {(spec.corpus.name, spec.catalog.item_format): spec for spec in task_specs}.values():
            save_trie(spec, model_dir)
    return result


def import_tasks(module: str, vocabulary: str, data_dir: str | None) -> None:
    """Imports a module that registers tasks of its own with SeqIO.

    It may call `seqio_tasks.register()` for all corpora of the data directory.

    Raises:
      InputError: when there is no such module, or it can't be imported.
    """
    os.environ["RECALIGN_DATA_DIR"] = str(data_dir_or_default(data_dir))
    os.environ["RECALIGN_VOCABULARY"] = vocabulary
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where a user's own module lies
    importlib.import_module("seqio_tasks.tasks")  # first: it keeps TensorFlow off the devices
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(f"MIXTURE_OR_TASK_MODULE {module!r} can't be imported: {error}. It is looked for in the "
                         "current folder and on PYTHONPATH.") from None  # fmt: skip
    except SyntaxError as error:  # of which gin would keep neither file nor line
        raise InputError(
            f"MIXTURE_OR_TASK_MODULE {module!r}: {error.filename}, line {error.lineno}: {error.msg}."
        ) from None
    except ImportError as error:
        raise InputError(f"MIXTURE_OR_TASK_MODULE {module!r} can't be imported: {error}.") from None


def evaluated(task_specs: list[TaskSpec]) -> Iterator[tuple[TaskSpec, str]]:
    """The tasks of a mixture that recommend, and what the names of their figures begin with."""
    places = {(spec.corpus.name, spec.catalog.item_format) for spec in task_specs}
    for spec in task_specs:
        if spec.family in EVALUATED:
            place = f"{task_names.with_format(spec.corpus.name, spec.catalog.item_format)}_" if len(places) > 1 else ""
            yield spec, f"validation_{place}" + ("" if spec.family == "retrieval" else f"{spec.wordings}_")


def run_identity(task_specs: list[TaskSpec]) -> dict[str, str]:
    """What a resumed run must have in common with the one that it resumes: gin values and fingerprints."""
    values = gin_config.snapshot()
    may_change = set(MAY_CHANGE)
    kind = values.get("make_schedule.kind", "")
    if "linear_warmup" in values.get(kind.removeprefix("%"), kind):
        may_change.remove("TRAIN_STEPS")  # the learning rate falls towards the last step
    return {name: value for name, value in values.items() if name not in may_change} | trained_on.task_fingerprints(
        task_specs
    )


def make_evaluator(spec: TaskSpec, config: Any, mesh: jax.sharding.Mesh, prefix: str) -> Evaluator:
    """A task on the validation split, as an evaluator for the train loop."""
    evaluation = make_evaluation(spec, "validation", t5.graph(config), mesh)

    def evaluator(params: Any) -> Iterator[tuple[str, float]]:
        for name, value in report.logged(evaluation(params)):
            yield prefix + name, value

    return evaluator
