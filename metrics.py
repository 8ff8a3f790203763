"""What a run reports: OUT/metrics.jsonl, and OUT/curves.png drawn from it."""

import json
from pathlib import Path


class Metrics:
    """OUT/metrics.jsonl, one line per step, validation and reference pass; and curves.png of it."""

    def __init__(self, s, ranks, step):
        self.file, self.active = Path(s.out) / "metrics.jsonl", ranks.first
        if self.active and self.file.exists():
            lines = self.file.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if self._precedes(json.loads(line), step)]
            self.file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    @staticmethod
    def _precedes(line, step):
        """A run that resumes after `step` repeats what came later, its validation included."""
        at = line.get("step", -1)
        return at < step or (at == step and "loss" in line)

    def write(self, metrics):
        if self.active:
            with open(self.file, "a", encoding="utf-8") as f:
                f.write(json.dumps(metrics) + "\n")

    def plot(self):
        """Loss, accuracy and margin over steps (InSPO Figure 2)."""
        if not self.active:
            return
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        lines = [json.loads(x) for x in self.file.read_text(encoding="utf-8").splitlines()]
        figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
        for axis, name in zip(axes, ("loss", "accuracy", "margin"), strict=True):
            for key, style in ((name, "-"), (f"eval_{name}", "o-"), (f"eval_plain_{name}", "s--")):
                points = [(x["step"], x[key]) for x in lines if key in x]
                if points:
                    axis.plot(*zip(*points, strict=True), style, ms=3.5, lw=1.2, label=key)
            axis.set(title=name, xlabel="step")
            axis.grid(alpha=0.3)
            if axis.has_data():
                axis.legend(frameon=False, fontsize=8)
        figure.savefig(self.file.with_name("curves.png"), dpi=120)
        plt.close(figure)
