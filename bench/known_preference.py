"""Which form should one use? SmolLM2-135M-Instruct under preferences known in closed form.

    python -m bench.known_preference            every run, hours on two cores; a run that is done
                                                is kept, so it may be stopped and started again
    python -m bench.known_preference --report   docs/known_preference.{json,png} and the table in
                                                docs/results.md from what is done so far

The controlled setting of the DPO paper (section 6): the start answers each of 208 short prompts,
which a seed draws from the 600 of bench/prompts.py, four times. The two answers of which P is
farthest from 1/2 are the pair (so a label has P 0.89 on average; of two samples it would be 0.70),
labelled at random by a known P(y > y' | x):

    separable       Bradley-Terry on the sentiment of a lexicon (VADER, Hutto and Gilbert 2014)
    intransitive    three observable classes of a text, length, sentiment and form, each of which
                    beats the next and loses to the one after, as rock, paper and scissors do

A run is train.py's own: one pass over 160 pairs, the same in the same order for every form, at each
of RATES, since at one rate a conditioned form moves less. Then the policy answers 200 other prompts
by fresh samples at temperature 1, which four samples of the start meet under the known P, so no
judge is needed:

    plain       expected win rate of prompt-only answers: what gets deployed
    shown       the same when the policy is asked to better the very answer that it is to beat, by
                the bridge of its training, on every second prompt
    refined     the same when it is asked to better an answer of its own: IFSR's stage III
    reward      mean sentiment of the plain answers; kl and length: mean
                log pi - log start, in nats, and tokens of every second one

    held        cross-entropy of the known P of 48 pairs held out, under the implicit reward (DPO's
                beta) of the prompt-only policy: what chooses a form's learning rate
"""

import json
import re
import tempfile
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from smollm2 import smollm2_dir

import train
from bench import known_preference_report
from bench.prompts import prompts
from bench.small_world import ranks, read_results, run_all, workers
from data import Dataset, Limits, path_sums
from generate import Answers, Ask, Dialogue, Sampling, load_model, stop_ids
from jobs.cli import flag, parse
from jobs.cli import run as run_command
from jobs.files import to_line, write_json
from losses import recipe
from pairs.layouts import Pair

KINDS = ("separable", "intransitive")
SEEDS, TEST_SEED = range(3), 10**6
RATES = (6e-5, 1.2e-4)
TAKEN, HELD = 208, 48  # prompts of a seed, and how many of their pairs are held out
BATCH, BETA, ANSWERS = 8, 0.1, 50
SAMPLES = 4  # answers of the start to a prompt
DRAW = Sampling(max_new_tokens=32, temperature=1.0, top_p=1.0)  # the policy itself, unsharpened
FORMS = {  # name: stages of (--loss, --condition, --bridge, share of the pass over the pairs)
    "plain": (("dpo", None, None, 1.0),),
    "ins": (("ins_dpo", None, None, 1.0),),
    "ins turn": (("ins_dpo", None, "turn", 1.0),),
    "averaged": (("ins_dpo", "averaged", "turn", 1.0),),
    "ifsr": (("ifsr_dpo", None, None, 1.0),),
    "irft, ifsr": (("irft", None, None, 0.5), ("ifsr_dpo", None, None, 0.5)),
}


class Job(NamedTuple):
    """One policy: what raters prefer, and how it is trained."""

    kind: str
    form: str
    seed: int
    lr: float


@dataclass(frozen=True)
class KnownPreferenceFlags:
    """Flags."""

    out: str = flag("runs/known_preference", "where results are kept")
    model: str | None = flag(None, "the start; default: SmolLM2-135M-Instruct of the cache")
    workers: int = flag(2, "runs side by side, of one thread each")
    report: bool = flag(False, "only write the report")


# ----------------------------------------------------------------------------- preferences


@cache
def lexicon():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def sentiment(text):
    """Of a text, from -1 (all negative) to 1."""
    return lexicon().polarity_scores(text)["compound"]


def classes(text):
    """(3,) classes 0, 1 or 2 of a text by length, sentiment and form."""
    words, feeling = len(text.split()), sentiment(text)
    form = 0 if re.search(r"\b(I|my|me|we|our)\b", text) else 1 if "," in text else 2
    return np.array([(words > 18) + (words > 24), (feeling > -0.05) + (feeling > 0.4), form])


def prefers(kind, first, second):
    """P(first > second) of two texts."""
    if kind == "separable":
        edge = 4 * (sentiment(first) - sentiment(second))
    else:  # class c beats class c + 1, of three in a ring
        ahead = (classes(second) - classes(first)) % 3  # 0: equal, 1: beats it, 2: is beaten
        edge = 1.5 * ((ahead == 1).sum() - (ahead == 2).sum())
    return 1 / (1 + np.exp(-edge))


def win_rates(kind, answers, others):
    """(N,) expected wins of one text against another, prompt by prompt."""
    return np.array([prefers(kind, a, b) for a, b in zip(answers, others, strict=True)])


# ----------------------------------------------------------------------------- sampling, scoring


def as_prompt(text):
    return [{"role": "user", "content": text}]


def sample(model, template, texts, seed, drafts=None, bridge="turn"):
    """One answer to each prompt, in their order; drafts: texts to be bettered, behind a bridge."""
    sampling = DRAW._replace(stop_ids=stop_ids(template))
    asks = [Ask(as_prompt(text), draft) for text, draft in
            zip(texts, drafts or [None] * len(texts), strict=True)]  # fmt: skip
    mode = "refine" if drafts else "plain"
    dialogues = [Dialogue(ask, n, mode, seed=seed) for n, ask in enumerate(asks)]
    rows = dict(Answers(model, template, sampling, ANSWERS, bridge=bridge)(dialogues))
    return [rows[n]["answer"] for n in range(len(asks))]


def logps(model, template, texts, answers):
    """(N,) log pi(answer | prompt), and (N,) tokens; both without the end token, which a sample
    that was cut has not drawn. An answer of no token counts 0.
    """
    rule, found = recipe("sft"), np.zeros((2, len(texts)))
    own = [n for n, answer in enumerate(answers) if answer.strip()]
    pairs = [Pair(as_prompt(texts[n]), answers[n], None, str(n)) for n in own]
    limits = Limits(1024, 0.4, score_eos=False)
    dataset = Dataset(pairs, template, rule, limits, "better")
    sizes = [dataset.size(i, rule.paths) for i in range(len(dataset))]
    sums = path_sums(model, lambda i: dataset.trie(i, rule.paths), sizes, 1)
    found[:, [int(where) for where in dataset.examples.where]] = [x[:, 0].numpy() for x in sums]
    return found


# ----------------------------------------------------------------------------- one run


def opened(directory):
    return load_model(directory, "bf16", "cpu")


def asked(seed):
    """The prompts that a seed's pairs answer; of TEST_SEED and above: those of the test."""
    if seed >= TEST_SEED:
        return prompts()["test"]
    order = np.random.default_rng((seed, 2)).permutation(len(prompts()["train"]))
    return [prompts()["train"][n] for n in order[:TAKEN]]


def start_samples(s, seed, number):
    """The start's answers to the prompts of a seed, made once: a text per prompt."""
    file = Path(s.out) / f"start-{seed}-{number}.json"
    if not file.exists():
        model, template = opened(s.model)
        write_json(file, sample(model, template, asked(seed), 10 * seed + number))
    return json.loads(file.read_text(encoding="utf-8"))


def labelled(s, kind, seed):
    """The pairs of one seed: rows {prompt, chosen, rejected}, both of them the start's own."""
    samples = zip(*(start_samples(s, seed, n) for n in range(SAMPLES)), strict=True)
    rng, rows = np.random.default_rng((seed, 1)), []
    for x, answers in zip(asked(seed), samples, strict=True):
        both = list(combinations(dict.fromkeys(y for y in answers if y.strip()), 2))
        draw = rng.random()  # also where a pair is left out
        if both:
            y, z = max(both, key=lambda pair: abs(prefers(kind, *pair) - 0.5))
            y, z = (y, z) if draw < prefers(kind, y, z) else (z, y)
            rows.append({"prompt": x, "chosen": y, "rejected": z})
    return rows


def run(s, job):
    """Train the job's stages and measure the policy -> the job's result."""
    rows, result = labelled(s, job.kind, job.seed), {"job": job}
    rows, held = rows[HELD:], rows[:HELD]
    with tempfile.TemporaryDirectory(dir=s.out) as work:
        model, first = s.model, 0
        for n, (loss, condition, bridge, share) in enumerate(FORMS[job.form]):
            last = first + round(share * len(rows))
            data, out = Path(work) / f"pairs-{n}.jsonl", Path(work) / f"stage-{n}"
            data.write_bytes(b"".join(map(to_line, rows[first:last])))
            flags = {"loss": loss, "condition": condition, "bridge": bridge, "lr": job.lr}
            flags |= {"model": str(model), "data": str(data), "out": str(out), "seed": job.seed}
            flags |= {"batch": BATCH, "epochs": 1.0, "max_len": 512, "eval_pairs": 0, "keep": 1}
            flags |= {"device": "cpu", "dtype": "bf16", "save_every": 10**6}
            train.train(train.TrainFlags(**flags), ranks())
            model, first = out / "final", last
        policy, template = opened(model)
    start, _ = opened(s.model)
    result["held"] = foresight(job.kind, start, policy, template, held)
    return result | measure(s, job, start, policy, template)


def foresight(kind, start, policy, template, held):
    """Cross-entropy of the known P of held-out pairs under the plain policy's implicit reward."""
    texts, margin = [row["prompt"] for row in held], 0
    for name, sign in (("chosen", 1), ("rejected", -1)):
        answers = [row[name] for row in held]
        own, its = (logps(model, template, texts, answers)[0] for model in (policy, start))
        margin = margin + sign * BETA * (own - its)
    p = np.array([prefers(kind, row["chosen"], row["rejected"]) for row in held])
    return float((p * np.logaddexp(0, -margin) + (1 - p) * np.logaddexp(0, margin)).mean())


def measure(s, job, start, policy, template):
    """The numbers at the head of this file, on the test prompts."""
    texts, seed = prompts()["test"], TEST_SEED + 1 + job.seed
    others = [start_samples(s, TEST_SEED, n) for n in range(SAMPLES)]
    answers = {"plain": sample(policy, template, texts, seed)}
    few, half = texts[::2], [other[::2] for other in others]
    for view, drafts in (("shown", half[0]), ("refined", answers["plain"][::2])):
        answers[view] = sample(policy, template, few, seed, drafts, bridge_of(job))
    wins = {}  # {view: by prompt}
    for view, met in (("plain", others), ("shown", half[:1]), ("refined", half)):
        each = [win_rates(job.kind, answers[view], other) for other in met]
        wins[view] = np.mean(each, axis=0).round(4).tolist()
    own, tokens = logps(policy, template, few, answers["plain"][::2])
    its, _ = logps(start, template, few, answers["plain"][::2])
    return {
        "wins": wins,
        "reward": float(np.mean([sentiment(text) for text in answers["plain"]])),
        "kl": float((own - its).mean()),
        "length": float(tokens.mean()),
        "examples": {view: texts[:3] for view, texts in answers.items()},
    }


def bridge_of(job):
    """What stands before and after the answer to better: as in the form's last stage."""
    loss, condition, bridge, _ = FORMS[job.form][-1]
    rule = recipe(loss, condition, bridge)
    return "turn" if rule.condition == "none" else rule.bridge


# ----------------------------------------------------------------------------- all runs


def all_jobs():
    """Rate by rate, so that a table can be drawn before all are done."""
    return [Job(kind, form, seed, lr)
            for lr in RATES for kind in KINDS for seed in SEEDS for form in FORMS]  # fmt: skip


def main():
    s = parse(KnownPreferenceFlags, __doc__.splitlines()[0])
    s = replace(s, model=str(s.model or smollm2_dir(build=True)))
    file = Path(s.out) / "results.jsonl"
    known = read_results(file, Job)
    if not s.report:
        # samples of the start, which the runs share
        first = [(seed, n) for seed in (*SEEDS, TEST_SEED) for n in range(SAMPLES)]
        file.parent.mkdir(parents=True, exist_ok=True)
        with workers(s.workers, file.parent / "log") as pool:
            list(pool.map(partial(start_samples, s), *zip(*first, strict=True)))
        known = run_all(all_jobs(), file, known, s.workers, partial(run, s))
    print(known_preference_report.write(known))


if __name__ == "__main__":
    run_command(main)
