"""What a run is measured on, as flags: a model, pairs, their limits, and the device."""

import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from smollm2 import smollm2_dir  # noqa: E402

from bench.checkpoints import published, write_noise  # noqa: E402
from bench.lengths import MIXES, write_pairs  # noqa: E402
from bench.measuring import DTYPES  # noqa: E402
from jobs.cli import flag  # noqa: E402


@dataclass
class Workload:
    """Flags that commands inherit."""

    model: str | None = flag(
        None, "HF directory; default: SmolLM2-135M, see tests/tools/smollm2.py"
    )
    shape: str | None = flag(None, "instead: noise in a shape of bench/shapes, or small")
    data: str = flag("../shared/data/hh-harmless-test.jsonl.gz", "preference pairs")
    mix: str | None = flag(None, "instead: synthetic pairs of this length mix", tuple(MIXES))
    pairs: int = flag(32, "pairs of the dataset")
    max_len: int = flag(1024, "tokens of a path")
    dtype: str = flag("fp32", "of the computation", tuple(DTYPES))
    device: str = flag("cpu", "where", ("cpu", "cuda"))

    @contextmanager
    def ready(self):
        """(model directory, pairs file), written where --shape or --mix ask for noise."""
        with tempfile.TemporaryDirectory() as scratch:
            model, data = self.model, self.data
            if model is None and self.shape:
                model = write_noise(Path(scratch) / "model", published(self.shape))
            model = model or smollm2_dir(build=True)
            if self.mix:
                data = write_pairs(Path(scratch) / "p.jsonl", MIXES[self.mix], self.pairs, model)
            yield model, data

    def train_flags(self, model, data):
        """What train.py is told of all this."""
        limits = {"limit": self.pairs, "max_len": self.max_len}
        return limits | {"model": model, "data": data, "dtype": self.dtype, "device": self.device}
