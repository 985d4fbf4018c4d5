"""The benchmarks beside T5X, of start-up and of the machine's limit: what they count, and how they take turns."""

import sys

import numpy as np
import pytest

from benchmarks import machine_limit, startup, train_t5x, train_t5x_ours, turns
from recalign_jax.model import flops
from recalign_jax.model.config import T5Config

CONFIG = T5Config(
    emb_dim=16, num_heads=2, head_dim=12, num_encoder_layers=3, num_decoder_layers=2, mlp_dim=40, vocab_size=128
)


def test_products_are_all_that_a_step_has():
    """Their FLOPs, by the letters of each product, are those that are counted of a step."""
    total = 0
    for einsum, left, right, times in machine_limit.products(CONFIG, 3, 20, 8):
        letters, _, _ = einsum.partition("->")
        sizes: dict[str, int] = {}
        for names, shape in zip(letters.split(","), (left, right), strict=True):
            for name, size in zip(names, shape, strict=True):
                assert sizes.setdefault(name, size) == size
        total += times * 2 * int(np.prod(list(sizes.values())))
    assert 3 * total == flops.train_step_flops(CONFIG, 3, 20, 8)


def test_a_program_answers_when_it_is_asked():
    program = "from benchmarks import turns; print('told'); turns.serve({'a': 1}, {'q': lambda: {'b': 2}})"
    with turns.side([sys.executable, "-c", program]) as (ready, ask):
        assert ready == {"a": 1}
        assert [ask("q"), ask("q")] == [{"b": 2}] * 2


def test_a_program_that_fails_says_why():
    program = turns.side([sys.executable, "-c", "raise OSError('no such file here')"])
    with pytest.raises(SystemExit, match="no such file here"), program:
        pass


def test_what_a_pipeline_feeds_is_counted():
    batch = {"encoder_segment_ids": np.asarray([[1, 1, 2, 0], [1, 2, 3, 0]])}
    found = turns.feed([batch, batch])
    assert (found["samples"], found["encoder_efficiency"]) == (10, 0.75)


def test_a_turn_of_our_pipeline_is_a_cycle_of_its_windows():
    batches = iter([({"number": n}, np.asarray([[n // 3 * 2, 0], [0, 0]])) for n in range(20)])
    found = train_t5x_ours.cycles(batches, 2)
    assert [[batch["number"] for batch in next(found)] for _ in range(2)] == [[0, 1, 2, 3], [4, 5, 6]]


def test_ratios_are_medians_of_rounds_without_the_first():
    seconds = {"ours": iter([100.0, 1, 2, 4] * 3), "t5x": iter([1.0, 6, 6, 6] * 3)}

    counts = {"tokens": 10, "steps": 1, "samples": 4, "encoder_efficiency": 0.5}

    def side(name):
        return lambda question: counts | {"seconds": next(seconds[name])}

    found = train_t5x.compare({name: side(name) for name in seconds}, 3)
    assert (found["ratio"], found["ratio_step"], found["ratio_input"]) == (3.0, 3.0, 3.0)
    assert (found["ours_tokens_per_second"], found["t5x_samples_per_second"]) == (5.0, 0.667)


def test_marks_are_seen_and_the_program_is_ended(tmp_path):
    program = f"import time; print('one', flush=True); open({str(tmp_path / 'two')!r}, 'w'); time.sleep(60)"
    marks = {"said": lambda told: "one" in told, "written": lambda told: (tmp_path / "two").exists()}
    times = startup.until([sys.executable, "-c", program], {}, marks)
    assert 0 < times["said"] <= times["written"] < 30
    with pytest.raises(SystemExit, match=r"ended before .*never"):
        startup.until([sys.executable, "-c", "print('one')"], {}, {"never": lambda told: False})


def test_positions_begin_anew_in_every_segment():
    segments = np.asarray([[1, 1, 1, 2, 2, 0], [1, 2, 3, 3, 3, 3]])
    expected = [[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]]
    np.testing.assert_array_equal(train_t5x_ours.positions(segments), expected)
