"""How OpenMP threads wait for each other; imported before torch, whose OpenMP reads it on loading.

By default a thread that waits spins for milliseconds. Where other programs want the cores, it
spins while the one that it waits for has none: a step took a hundred times as long. To sleep at
once costs an idle machine a sixth. So: spin for some microseconds, then sleep.
"""

import os

SPINS = {"GOMP_SPINCOUNT": "4000", "KMP_BLOCKTIME": "1"}  # libgomp (Linux); libomp (macOS), in ms

if not {"OMP_WAIT_POLICY", *SPINS} & os.environ.keys():  # what the user has chosen holds
    os.environ.update(SPINS)
