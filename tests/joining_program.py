"""Stands for a command that runs on devices: joins the others, meets them, and does what it is told.

python tests/joining_program.py MODE WHO FLAGS: process WHO does what MODE says.
"""

import os
import signal
import sys
import time
import types

from recalign_jax import cli, terminal
from recalign_jax.errors import InputError, Preempted, RunError


def run(args):
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    total = int(multihost_utils.process_allgather(np.asarray(jax.process_index() + 1)).sum())
    terminal.say("said by one")
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
