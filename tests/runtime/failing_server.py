"""`nanoflow-serve` with a planted fault: `failing_server.py FAULT RANK STEP [flags]`.

The third argument is the step at which the rank's runner fails; ranks read it from the environment.
"""

from __future__ import annotations

import os
import signal
import sys
import time

VARIABLE = "PLANTED_FAULT"


def plant():
    """Replace `ModelRunner.launch` on the rank that is to fail."""
    from nanoflow_tune.runtime.model_runner import ModelRunner

    kind, rank, at_step = os.environ[VARIABLE].split()
    launch, steps = ModelRunner.launch, [0]

    def failing(self, inputs):
        steps[0] += 1
        if steps[0] == int(at_step) and self.weights.rank == int(rank):
            if kind == "memory":
                import torch

                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return launch(self, inputs)

    ModelRunner.launch = failing


if __name__ == "__main__":
    os.environ[VARIABLE] = " ".join(sys.argv[1:4])
    del sys.argv[1:4]
    from nanoflow_tune.runtime.server import main

    plant()
    sys.exit(main())
elif VARIABLE in os.environ:
    plant()  # spawned ranks import the parent's main module
