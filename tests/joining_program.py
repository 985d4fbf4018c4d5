"""Stands for a command that runs on devices: joins the others, meets them, and does what it is told.

python tests/joining_program.py MODE WHO FLAGS: process WHO does what MODE says.
"""

import os
import pathlib
import signal
import sys
import time
import types

from recalign_jax import cli, distributed, terminal
from recalign_jax.errors import InputError, Preempted, RunError


def restore(model_dir):
    """The step that is restored where processes see different things.

    damaged: one can't read the metadata of step 3, another the arrays of step 2; lagging: one doesn't see step 3 yet;
    altered: one reads other parameters of step 3 than were saved.
    """
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from recalign_jax import partitioning
    from recalign_jax.checkpoint import locations, saved, training

    shape = jax.ShapeDtypeStruct(
        (4,), np.float32, sharding=partitioning.batch_sharding(partitioning.make_mesh({"data": -1}))
    )
    broken = {who: "3/metadata", 1 - who: "2/params"}[jax.process_index()] if mode == "damaged" else "none"
    it_is_who = jax.process_index() == who
    if mode == "lagging" and it_is_who:
        locations.steps = lambda model_dir: [2, 1]
    read_metadata, restore = saved.read_metadata, ocp.StandardCheckpointHandler.restore

    def metadata(folder):
        if f"{folder.name}/metadata" == broken:
            raise saved.DamagedCheckpoint(f"Checkpoint {folder} is damaged, says one.")
        return read_metadata(folder)

    def arrays(handler, directory, args):
        if str(directory).endswith(broken):
            raise OSError("a stale file handle")
        tree = restore(handler, directory, args=args)
        altered = mode == "altered" and it_is_who and str(directory).endswith("3/params")
        return jax.tree.map(lambda leaf: leaf + 1, tree) if altered else tree

    saved.read_metadata, ocp.StandardCheckpointHandler.restore = metadata, arrays
    with training.open_checkpoints(model_dir) as checkpoints:
        restored = training.restore_newest(checkpoints, {"a": shape}, (shape,), lambda metadata: None)
    terminal.warn(f"process {jax.process_index()} is at step {restored.step}")
    return restored.step


def run(args):
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    total = int(multihost_utils.process_allgather(np.asarray(jax.process_index() + 1)).sum())
    terminal.say("said by one")
    if mode == "apart":
        folder = f"{os.environ['MODEL_DIR']}_{jax.process_index() == who}"
        distributed.SEEN_SECONDS = 1.0
        distributed.check_shared("MODEL_DIR", pathlib.Path(folder))
    if mode in ("damaged", "lagging", "altered"):
        return {"step": restore(os.environ["MODEL_DIR"])}
    if mode == "preempted":
        raise Preempted("saved")
    if jax.process_index() == who:
        if mode == "late":
            time.sleep(2)
        elif mode == "input_error":
            raise InputError("no such thing")
        elif mode == "run_error":
            raise RunError("it broke")
        elif mode == "bug":
            raise ZeroDivisionError("a bug")
        elif mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    if mode != "late":
        multihost_utils.sync_global_devices("the others wait here")
    return {"processes": jax.process_count(), "total": total}


if __name__ == "__main__":
    mode, who = sys.argv[1], int(sys.argv[2])
    command = types.ModuleType("recalign_jax.commands.infer")
    command.add_arguments, command.run = lambda parser: None, run
    sys.modules[command.__name__] = command
    sys.exit(cli.main(["infer", "--json", *sys.argv[3:]]))
