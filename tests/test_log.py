"""The record of a run: what is written can be read, and a resumed run forgets what it will do again."""

import json

import pytest

from recalign_jax.training import log


@pytest.fixture
def written(tmp_path):
    run = log.RunLog(str(tmp_path), [])
    for step in (1, 10, 20):
        run.write(step, {"loss": 1 / step, "loss/shop_mim": 2.0})
    run.close()
    return tmp_path


def test_records_are_read_back(written):
    assert log.read(str(written)) == [{"step": step, "loss": 1 / step, "loss/shop_mim": 2.0} for step in (1, 10, 20)]
    assert list(written.glob("events.out.tfevents.*"))
    assert log.read(str(written / "nothing")) == []


def test_a_resumed_run_forgets_later_steps(written):
    run = log.RunLog(str(written), log.read(str(written))[:2])
    assert [record["step"] for record in log.read(str(written))] == [1, 10]
    run.write(25, {"loss": 0.5})
    assert log.read(str(written))[-1] == {"step": 25, "loss": 0.5}  # readable while the run goes on
    assert run.records == log.read(str(written))
    run.close()
    assert [path.name for path in written.iterdir() if path.name.startswith(".")] == []


def test_a_line_that_a_kill_cut_short_is_left_out(written):
    with (written / log.METRICS_FILE).open("a") as file:
        file.write(json.dumps({"step": 30, "loss": 0.1})[:-4])
    assert [record["step"] for record in log.read(str(written))] == [1, 10, 20]
    log.RunLog(str(written), log.read(str(written))).close()
    assert len((written / log.METRICS_FILE).read_text().splitlines()) == 3
