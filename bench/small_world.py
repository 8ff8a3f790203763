"""Every objective in every form, compared where the truth is known: the embedded small world.

    python -m bench.small_world                 all of it, under an hour on two cores; goes on where
                                                it stopped; writes docs/small_world.{json,png}
                                                and the table in docs/results.md
    python -m bench.small_world --report        only writes these again, from docs/small_world.json,
                                                and prints all tables

A run is train.py's own: so many steps on pairs drawn from the world by the run's seed, with which
all runs of one seed see the same pairs in the same order. Nothing is sampled in judging: from the
16 answers' probabilities, bare, and behind each answer, follow (assets/world.py)

    plain      exact win rate of prompt-only answers against the start's: what gets deployed
    shown      the same when the policy sees the answer that it is to beat (InSPO Theorem 3.2)
    refined    the same when it sees an answer of its own: IFSR's stage III
    accuracy   how often the sign of the plain log-ratio agrees with a label, over all pairs
    kl         KL(policy || start) in nats, of prompt-only answers, other texts taken as one;
               shown_kl: of answers behind each of the 16, to the start's prompt-only answers
    length     mean tokens of a prompt-only answer, end token included
    mass       probability of the 16 answers

The learning rate of each base objective is the one of RATES with the highest plain win rate in the
mirrored world, taken in the worst of three forms: plain, `ins_` and `ifsr_`.
"""

import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import losses
import train
from assets import world
from assets.build import as_jsonl
from bench import small_world_report
from bench.measuring import ROOT
from evals.world import world_probabilities
from generate import load_model
from jobs.cli import flag, parse, progress
from jobs.cli import run as run_command
from jobs.processes import Ranks
from train import TrainFlags

STEPS, BATCH, SEEDS = 24, 12, range(5)
STARTS = ("start", "start-single")
TEACH = 1e-3  # learning rate of the stages that teach by likelihood
RATES = (2e-4, 4e-4, 8e-4, 1.6e-3)
BASES = ("dpo", "ipo", "rdpo", "simpo", "orpo", "cpo", "kto", "slic", "rrhf")
FORMS = {  # name: (prefix of --loss, --condition, --bridge); None: the preset's
    "plain": ("", None, None),
    "ins": ("ins_", None, None),
    "ins turn": ("ins_", None, "turn"),
    "one-sided": ("ins_", "one_sided", None),
    "averaged": ("ins_", "averaged", None),
    "ifsr": ("ifsr_", None, None),
}


@dataclass(frozen=True)
class SmallWorldFlags:
    """Flags."""

    out: str = flag("runs/small_world", "where results are kept")
    workers: int = flag(2, "runs side by side, of one thread each")
    report: bool = flag(False, "only write the report again")


class Stage(NamedTuple):
    """One run of train.py: its flags."""

    loss: str
    lr: float
    condition: str | None = None
    bridge: str | None = None
    instruction: str = "better"
    steps: int = STEPS
    context_grad: bool = True


class Job(NamedTuple):
    """A chain of stages from an embedded start, and what it is called in the report."""

    name: tuple  # (table, row, column)
    start: str
    kind: str  # of preference
    seed: int
    stages: tuple


# ----------------------------------------------------------------------------- what is run


def form(base, name, lr):
    """A base objective in one of the FORMS."""
    prefix, condition, bridge = FORMS[name]
    return Stage(prefix + base, lr, condition, bridge)


def rate_jobs():
    """Every rate for every base, in the mirrored world, on a seed of its own."""
    for base in BASES:
        for lr in RATES:
            for name in ("plain", "ins", "ifsr"):
                stages = (form(base, name, lr),)
                yield Job(("rates", base, f"{lr:g}"), "start", world.MIRRORED, 100, stages)


def best_rates(results):
    """{base: lr} from the results {Job: result} of rate_jobs."""
    worst = {}
    for job, result in results.items():
        if job.name[0] == "rates":
            key = job.name[1], job.stages[0].lr
            worst[key] = min(worst.get(key, 1.0), result["plain"])
    return {base: max(RATES, key=lambda lr: worst[base, lr]) for base in BASES}


def form_jobs(rates, seed):
    """The comparison: every base in every form, from both starts, under both preferences."""
    for kind in world.KINDS:
        for start in STARTS:
            for name in FORMS:
                for base in BASES:
                    stages = (form(base, name, rates[base]),)
                    yield Job(("forms", base, name), start, kind, seed, stages)


def stage_jobs(rates, seed):
    """IFSR Table 3: its stages from the start that knows single answers. Without a stage its steps
    go to what it would follow, so all chains take equally many."""
    lr, twice = rates["dpo"], 2 * STEPS
    first = {
        "-": (Stage("sft", TEACH, steps=twice),),
        "I": (Stage("sft", TEACH), Stage("irft", TEACH)),
    }
    second = {
        "-": (Stage("dpo", lr, steps=twice),),
        "II": (Stage("dpo", lr), Stage("ifsr_dpo", lr)),
    }
    for a, teach in first.items():
        for b, prefer in second.items():
            yield Job(("stages", a, b), "start-single", "separable", seed, teach + prefer)


def instruction_jobs(rates, seed):
    """IFSR Table 6: what the second turn asks for, in training and in asking."""
    for start in STARTS:
        for instruction in ("better", "another", "worse"):
            stages = (Stage("ifsr_dpo", rates["dpo"], instruction=instruction),)
            yield Job(("instructions", instruction, "ifsr_dpo"), start, "separable", seed, stages)


# ----------------------------------------------------------------------------- one run


@cache
def ranks():
    """This process as the only rank; what runs would print is not shown."""
    alone = Ranks("cpu")
    alone.say = lambda text: None
    return alone


@cache
def start_of(name):
    """(template, plain probabilities (Q, A), answer lengths (Q, A)) of an embedded start."""
    model, template = load_model(ROOT / "assets" / name, "fp32", "cpu")
    texts = [answer + template.end for q in world.questions() for answer in world.answers(q)]
    lengths = np.array([len(ids) for ids in template.encode(texts)])
    policy = world_probabilities(model, template)
    return template, policy, lengths.reshape(policy.shape)


def train_stage(stage, start, data, out, seed, **more):
    """One run of train.py, in this process; more: flags beside the stage's."""
    flags = {"model": str(start), "data": str(data), "out": str(out), "seed": seed}
    flags |= {"batch": BATCH, "max_len": 256, "eval_pairs": 0, "device": "cpu"}
    train.train(TrainFlags(**flags | stage._asdict() | more), ranks())


def run(job):
    """Train the job's stages one after the other and measure the last -> the job's result."""
    cpu = time.process_time()
    with tempfile.TemporaryDirectory() as work:
        data, model = Path(work) / "pairs.jsonl", ROOT / "assets" / job.start
        data.write_text(as_jsonl(world.sample_pairs(STEPS * BATCH, job.seed, job.kind)))
        for n, stage in enumerate(job.stages):
            out = Path(work) / f"stage-{n}"
            train_stage(stage, model, data, out, job.seed, save_every=stage.steps)
            model = out / "final"
        policy, _ = load_model(model, "fp32", "cpu")
        result = {"job": job, **measure(job, policy)}
    return result | {"cpu_seconds": round(time.process_time() - cpu, 2)}


def measure(job, policy):
    """The numbers at the head of this file."""
    template, start, lengths = start_of(job.start)
    last = job.stages[-1]
    recipe = losses.recipe(last.loss, last.condition, last.bridge)
    bridge = recipe.bridge if recipe.condition != "none" else "turn"
    plain = world_probabilities(policy, template)  # (Q, A)
    shown = world_probabilities(policy, template, bridge, last.instruction)  # (Q, B, A)
    refined = np.einsum("qb,qba->qa", plain, shown)
    views = {"plain": plain, "shown": shown, "refined": refined}
    wins = {v: world.expected_win_rate(p, start, job.kind) for v, p in views.items()}
    return wins | {
        "accuracy": accuracy(np.log(plain) - np.log(start), job.kind),
        "kl": kl(plain, start),
        "shown_kl": kl(shown, start[:, None]),
        "length": float(((plain * lengths).sum(-1) / plain.sum(-1)).mean()),
        "mass": float(plain.sum(-1).mean()),
    }


def accuracy(ratio, kind):
    """Expected share of labels that the order of the log-ratios (Q, A) agrees with."""
    prefer = world.preference_matrix(world.questions()[0], kind)  # (A, A)
    agrees = np.where(ratio[:, :, None] > ratio[:, None, :], prefer, prefer.T)  # (Q, A, A)
    return float(agrees[:, ~np.eye(len(prefer), dtype=bool)].mean())


def kl(policy, start):
    """KL(policy || start) in nats, mean over all but the last axis; other texts count as one."""
    p, q = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (policy, start))
    p, q = np.maximum(p, 1e-12), np.maximum(q, 1e-12)
    return float((p * np.log(p / q)).sum(-1).mean())


def best_worlds():
    """{start and kind: {view: the best win rate that any policy could reach}}."""
    return {
        f"{start} {kind}": {
            view: round(world.best_win_rate(start_of(start)[1], kind, view == "shown"), 4)
            for view in ("plain", "shown")
        }
        for start in STARTS
        for kind in world.KINDS
    }


# ----------------------------------------------------------------------------- all runs


def run_all(jobs, file, known, n, run=run):
    """Run what is not known yet, side by side; every result is appended to `file` at once."""
    jobs = [job for job in jobs if job not in known]
    file.parent.mkdir(parents=True, exist_ok=True)
    bar = progress(file.stem, len(jobs), "run")
    with workers(n, file.parent / "log") as pool, bar, open(file, "a", encoding="utf-8") as out:
        for future in as_completed([pool.submit(run, job) for job in jobs]):
            result = future.result()
            known[result["job"]] = result
            out.write(json.dumps(result) + "\n")
            out.flush()
            bar.update()
    return known


def workers(n, log):
    """A pool of n processes of one thread each."""
    return ProcessPoolExecutor(n, get_context("spawn"), quiet, (log,))


def quiet(log):
    """A worker: one thread, no curves drawn, and its runs' own progress goes into a log."""
    torch.set_num_threads(1)
    train.rundir.Metrics.plot = lambda metrics: None  # a tenth of a run's time, looked at by nobody
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(out, 1), os.dup2(out, 2)


def read_results(file, kind):
    """{job: result} of the runs that are already done; kind: what makes a job of its fields."""
    known = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        result = json.loads(line)
        job = kind(*result["job"])
        known[job] = result | {"job": job}
    return known


def as_job(name, start, kind, seed, stages):
    """A Job as JSON has it, in lists."""
    return Job(tuple(name), start, kind, seed, tuple(Stage(*s) for s in stages))


def main():
    s = parse(SmallWorldFlags, __doc__.splitlines()[0])
    if not s.report:
        file = Path(s.out) / "results.jsonl"
        jobs = list(rate_jobs())
        known = run_all(jobs, file, read_results(file, as_job), s.workers)
        rates = best_rates(known)
        for kind_of_jobs in (form_jobs, stage_jobs, instruction_jobs):
            jobs += [job for seed in SEEDS for job in kind_of_jobs(rates, seed)]
        known = run_all(jobs, file, known, s.workers)
        settings = {"steps": STEPS, "batch": BATCH, "seeds": len(SEEDS), "best": best_worlds()}
        small_world_report.save({job: known[job] for job in jobs}, rates, settings)
    print(small_world_report.write())


if __name__ == "__main__":
    run_command(main)
