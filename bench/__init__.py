"""Measurements: speed, memory, and the small world. One command per question, from the root:

    python -m bench.pairs_per_second --help

Each prints Markdown tables and writes one JSON file with the machine, versions, commit and the
figures of every single run (`--out`, by default under bench/out/, which git ignores). The
contenders of a table run in turn, in fresh processes; tables show medians.
"""

import sys
import time
from pathlib import Path

BEGUN = time.perf_counter()  # before torch and everything else is imported

# tiny.py and smollm2.py, which write the models that the tests run on
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "tools"))
