"""The record of a run: what is written can be read, and a resumed run forgets what it will do again."""

import json
import struct

import pytest
from tensorboardX.proto import event_pb2

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


def events(folder):
    """Those of the newest TensorBoard file: records of length, checksum, event, checksum."""
    data, found = max(folder.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns).read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return found


@pytest.mark.parametrize(("kept", "first"), [(2, 11), (0, 0)])
def test_tensorboard_forgets_them_too(written, kept, first):
    """It hides what earlier files have from the step on that a file begins with."""
    for file in written.glob("events.out.tfevents.*"):
        file.unlink()
    log.RunLog(str(written), log.read(str(written))[:kept]).close()
    starts = [event.step for event in events(written) if event.session_log.status == event_pb2.SessionLog.START]
    assert starts == [first]


def test_a_line_that_a_kill_cut_short_is_left_out(written):
    with (written / log.METRICS_FILE).open("a") as file:
        file.write(json.dumps({"step": 30, "loss": 0.1})[:-4])
    assert [record["step"] for record in log.read(str(written))] == [1, 10, 20]
    log.RunLog(str(written), log.read(str(written))).close()
    assert len((written / log.METRICS_FILE).read_text().splitlines()) == 3
