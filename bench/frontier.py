"""Is a conditioned form ahead of plain training anywhere? The frontier in the small world.

    python -m bench.frontier            every run, some hours on two cores; goes on where it stopped
    python -m bench.frontier --report   only the pages again, from docs/frontier.json; all tables

What a policy wins costs divergence from the start, so forms are compared along their frontiers:
exact win rate (bench/small_world.py) against exact KL, over learning rates, beta and steps. A run
keeps its learning rate (--schedule constant) and is measured after SHARES of its steps, so that one
run is one curve. Two readings, over five seeds, of differences to plain on the same seeds:

    within KL k     the best win rate of any point of the form's curves with a KL of at most k.
                    Between two points a curve is a line over sqrt(KL), as it nearly is from the
                    start on; over KL it bends, and sparse points would lose to dense ones
    own best        at the setting and share with the form's highest plain win rate in the mirrored
                    world, the mean of three seeds of its own: the validation preference

At one setting, the best of most forms of dpo, these are then tried in other worlds: with other
preferences (assets/world.py; under two judges the answer shown says who judges), from a start that
has seen no further attempts, with labels turned around, with fewer pairs that are seen more often,
and with more.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from assets import world
from assets.build import as_jsonl
from bench import frontier_report
from bench.measuring import ROOT
from bench.small_world import BATCH, FORMS, form, measure, read_results, run_all, train_stage
from bench.small_world import Job as Asked
from evals.extract import ExtractFlags, extract
from generate import load_model
from jobs.cli import flag, parse
from jobs.cli import run as run_command

COMPARED = [name for name in FORMS if name != "one-sided"]
STEPS, SHARES = 48, (0.125, 0.25, 0.5, 1.0)
SEEDS, VALIDATION_SEEDS = range(5), range(100, 103)
SETTINGS = {  # base: (lr, beta) of each curve
    "dpo": ((1e-4, 0.1), (2.5e-4, 0.1), (6e-4, 0.1), (2.5e-4, 0.5)),
    "simpo": ((2.5e-4, 2.0), (6e-4, 2.0)),
    "kto": ((2.5e-4, 0.1), (6e-4, 0.1)),
}
COMMON = 2.5e-4, 0.5  # of every form in the other worlds, so that none has a better curve to be on
VARIED = (  # the other worlds, as Job's fields
    {"kind": "intransitive"},
    {"start": "start-single"},  # has seen single answers only
    {"flipped": 0.2},
    {"pairs": 144},
    {"kind": world.TWO_JUDGES, "pairs": 2304, "steps": 192},  # 48 steps teach no form anything
    {"pairs": 288},
    {"flipped": 0.1},
    {"pairs": 4032, "steps": 336, "lr": 1e-4},
)


class Job(NamedTuple):
    """One run: its flags, and the world that its pairs come from."""

    base: str
    form: str
    lr: float
    beta: float
    seed: int
    kind: str = "separable"
    flipped: float = 0.0  # share of labels turned around
    pairs: int = BATCH * STEPS
    steps: int = STEPS
    start: str = "start"  # of the embedded ones


@dataclass(frozen=True)
class FrontierFlags:
    """Flags."""

    out: str = flag("runs/frontier", "where results are kept")
    workers: int = flag(2, "runs side by side, of one thread each")
    report: bool = flag(False, "only write the report again")


def grid(seed, kind):
    """Every form of every base at every setting."""
    for base, settings in SETTINGS.items():
        for name in COMPARED:
            for setting in settings:
                yield Job(base, name, *setting, seed, kind)


def validation_jobs():
    return [job for seed in VALIDATION_SEEDS for job in grid(seed, world.MIRRORED)]


def own_best(known):
    """{(base, form): (lr, beta, place in SHARES)} of the highest plain win rate in validation."""
    wins = {}  # of each setting, by seed and share
    for job in validation_jobs():
        wins.setdefault((job.base, job.form, job.lr, job.beta), []).append(known[job]["plain"])
    best = {}
    for (*key, lr, beta), rates in wins.items():
        mean = np.mean(rates, axis=0)
        one = mean.max(), (lr, beta, int(mean.argmax()))
        best[tuple(key)] = max(one, best.get(tuple(key), one))
    return {key: where for key, (_, where) in best.items()}


def varied_jobs():
    for fields in VARIED:
        for name in COMPARED:
            yield from (Job("dpo", name, *COMMON, seed)._replace(**fields) for seed in SEEDS)


def pairs_of(job):
    """The pairs of a job, some of their labels turned around."""
    rng = np.random.default_rng((job.seed, 3))
    for row in world.sample_pairs(job.pairs, job.seed, job.kind):
        if rng.random() < job.flipped:
            row = row | {"chosen": row["rejected"], "rejected": row["chosen"]}
        yield row


def run(job):
    """Train one curve and measure its points -> the job's result, a list by SHARES per measure."""
    stage = form(job.base, job.form, job.lr)._replace(steps=job.steps)
    asked = Asked((), job.start, job.kind, job.seed, (stage,))
    with tempfile.TemporaryDirectory() as work:
        data, out = Path(work) / "pairs.jsonl", Path(work) / "run"
        data.write_text(as_jsonl(pairs_of(job)))
        flags = {"beta": job.beta, "schedule": "constant", "keep": round(1 / SHARES[0])}
        flags |= {"save_every": round(SHARES[0] * job.steps)}
        train_stage(stage, ROOT / "assets" / job.start, data, out, job.seed, **flags)
        points = []
        for share in SHARES:
            model = Path(work) / f"share-{share}"
            extract(ExtractFlags(str(out), round(share * job.steps), str(model)))
            points.append(measure(asked, load_model(model, "fp32", "cpu")[0]))
    names = ("plain", "shown", "refined", "kl", "shown_kl", "mass")
    return {"job": job} | {name: [round(point[name], 5) for point in points] for name in names}


def main():
    s = parse(FrontierFlags, __doc__.splitlines()[0])
    file = Path(s.out) / "results.jsonl"
    known = read_results(file, Job)
    jobs = [*validation_jobs(), *(x for n in SEEDS for x in grid(n, "separable")), *varied_jobs()]
    if not s.report:
        known = run_all(jobs, file, known, s.workers, run)
    if known:  # where the runs were made; elsewhere the kept values serve
        frontier_report.save({job: known[job] for job in jobs if job in known}, own_best(known))
    print(frontier_report.write())


if __name__ == "__main__":
    run_command(main)
