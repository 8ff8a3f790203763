"""Evaluate a model: `python evaluate.py COMMAND --help` lists the flags of a command.

    reward    score answers with a reward model, and count wins against other answers
    pairs     accuracy and margin of the implicit reward on preference pairs: of the plain policy,
              which is what gets deployed, and of the cross-conditioned one, which was trained
    world     exact win rate in the embedded small world (assets/world.py)

Scores and log-probabilities come from rows, as in training. Brackets hold 95% bootstrap intervals
over prompts or pairs (stats.py).

Legend: N answers or pairs, P paths, Q questions, A answers of a question.
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from cli import UserError, flag, parse, progress, run
from data import Dataset, Limits
from generate import load_model
from layouts import Pair, as_messages
from losses import Path, recipe
from pairs import Drops, read_pairs
from rows import build_row, lay_out, pack, trie_size
from settings import ASSETS
from sources import records
from stats import estimate, win_rate
from template import read_json
from weights import write_json

# ----------------------------------------------------------------------------- scores from rows


@torch.no_grad()
def score(model, trie, sizes, n_paths, row_tokens=None, label="score"):
    """Sums of the scored values of N items, and how many were scored: (N, P) and (N, P), on CPU.

    trie(n) makes the rows.Trie of item n, of sizes[n] tokens. row_tokens: longest row, unless one
    item is longer.
    """
    device = model.embed.weight.device
    row_tokens = row_tokens or (8192 if device.type == "cuda" else 2048)
    sums = torch.zeros(len(sizes), n_paths)
    counts = torch.zeros_like(sums)
    with progress(label, len(sizes), "item", leave=False) as bar:
        for items in pack(sizes, max(row_tokens, *sizes)):
            row = build_row([trie(n) for n in items], items, n_paths).to(device)
            sums[items], counts[items] = row.sums(model(row)).cpu(), row.counts().cpu()
            bar.update(len(items))
    return sums, counts


def score_pairs(model, dataset, paths, row_tokens=None, label="score"):
    """Log-probabilities of these paths of a data.Dataset: {Path: (N,)} sums and token counts."""
    sizes = [dataset.size(i, paths) for i in range(len(dataset))]

    def trie(i):
        return dataset.trie(i, paths)

    columns = score(model, trie, sizes, len(paths), row_tokens, label)
    return [dict(zip(paths, values.unbind(1), strict=True)) for values in columns]


# ----------------------------------------------------------------------------- reward


class Answer(NamedTuple):
    prompt: list  # messages
    text: str


@dataclass
class RewardSettings:
    """Every flag of `evaluate.py reward`."""

    model: str | None = flag(None, "reward model: HF directory or hub id")
    answers: str | None = flag(None, "rows of prompt, answer (or instruction, output)")
    against: str | None = flag(None, "answers to the same prompts, to be beaten")
    pool: str = flag(
        "last",
        "read the score at the last token, or as transformers at the last that is no padding id",
        ("last", "not_pad"),
    )
    limit: int | None = flag(None, "only the first N answers")
    row_tokens: int | None = flag(None, "tokens per row; default: 8192 on CUDA, else 2048")
    seed: int = flag(0, "of the bootstrap")
    dtype: str | None = flag(None, "default: bf16 on CUDA, else fp32", ("bf16", "fp32"))
    device: str = flag("auto", "where to run", ("auto", "cpu", "cuda"))
    out: str | None = flag(None, "json file for the numbers and every score")


def reward(s):
    """Score --answers, and --against where given; print and write what came out."""
    require(s, "model", "answers")
    answers = read_answers(s.answers, "--answers")[: s.limit]
    others = align(answers, s) if s.against else None
    model, template = load_model(s.model, s.dtype, s.device, head="reward")
    results = {"model": s.model}
    for name, rows in (("answers", answers), ("against", others)):
        if rows is not None:
            scores = reward_scores(model, template, rows, s.pool, s.row_tokens)
            mean, std = (
                estimate(scores, s.seed),
                float(scores.std(ddof=1)) if len(rows) > 1 else 0.0,
            )
            print(f"{getattr(s, name)}: {len(rows)} answers, reward {mean:.4f}, std {std:.4f}")
            file = {"file": getattr(s, name), "n": len(rows)}
            results[name] = file | {"reward": mean, "std": std, "scores": scores.tolist()}
    if others is not None:
        ours, theirs = (np.array(results[name]["scores"]) for name in ("answers", "against"))
        wins, ties = win_rate(ours, theirs, s.seed)
        gap = estimate(ours - theirs, s.seed)
        print(f"win rate {wins:.1%}, {ties} ties; difference {gap:+.4f}")
        results |= {"win_rate": wins, "ties": ties, "difference": gap}
    save(s.out, results)


def read_answers(file, name):
    """Rows as generate.py writes them, or AlpacaEval's -> list of Answer."""
    if not os.path.isfile(file):
        raise UserError(f"{name} {file}: no such file")
    answers = []
    for where, record in records(file):
        row = record if isinstance(record, dict) else {}
        prompt = row.get("prompt", row.get("instruction"))
        text = row.get("answer", row.get("output"))
        if prompt is None or not isinstance(text, str):
            raise UserError(f"{where}: expected prompt and answer, or instruction and output")
        answers.append(Answer(as_messages(prompt, where), text))
    if not answers:
        raise UserError(f"{name} {file}: no answers")
    return answers


def align(answers, s):
    """The answers of --against in the order of --answers; UserError if a prompt has none."""
    others = read_answers(s.against, "--against")
    wanted, found = ([json.dumps(a.prompt) for a in rows] for rows in (answers, others))
    if found[: len(wanted)] == wanted:
        return others[: len(wanted)]
    counts = Counter(found)
    for n, prompt in enumerate(wanted, 1):
        if counts[prompt] != 1:
            times = f"has {counts[prompt]} answers" if counts[prompt] else "has no answer"
            raise UserError(f"--against {s.against} {times} to the prompt of {s.answers}:{n}")
    by_prompt = dict(zip(found, others, strict=True))
    return [by_prompt[prompt] for prompt in wanted]


def reward_scores(model, template, answers, pool="last", row_tokens=None):
    """(N,) scores of answers under a reward model, rendered as `--loss reward` trains it.

    pool: "last" reads the score at the last token; "not_pad" at the last one whose id is not the
    config's pad_token_id, as transformers does even where the template itself ends with that id.
    """
    texts = [template.render(a.prompt, generation=True) for a in answers]
    texts += [template.answer(a.prompt, a.text, closed=False) for a in answers]
    ids = template.encode(texts)
    if pool == "not_pad":
        pad = read_json(template.directory / "config.json").get("pad_token_id")
        ids = [trim(x, pad) for x in ids] if pad is not None else ids
    paths = [
        [([x, y], len(y))] for x, y in zip(ids[: len(answers)], ids[len(answers) :], strict=True)
    ]
    sizes = [trie_size(path) for path in paths]
    sums, _ = score(model, lambda n: lay_out(paths[n], "last"), sizes, 1, row_tokens, "reward")
    return sums[:, 0].double().numpy()


def trim(ids, pad):
    """ids without what equals `pad` at their end."""
    kept = np.flatnonzero(ids != pad)
    return ids[: kept[-1] + 1] if len(kept) else ids[:0]


# ----------------------------------------------------------------------------- pairs


@dataclass
class PairsSettings:
    """Every flag of `evaluate.py pairs`."""

    model: str | None = flag(None, "the policy: HF directory or hub id")
    ref: str | None = flag(None, "the reference, if the objective has one: where training started")
    data: str | None = flag(None, "jsonl, json, parquet, glob or hub dataset id[:split]")
    loss: str = flag("ins_dpo", "objective whose implicit reward is read; the README has the table")
    bridge: str | None = flag(None, "between a context answer and what follows", ("sep", "turn"))
    beta: float | None = flag(None, "scale of the margins; default: the objective's")
    instruction: str = flag("better", "refining instruction: better, another, worse, or your text")
    sep: str | None = flag(None, "InSPO's separator; default: a reserved token, else a blank line")
    max_len: int = flag(4096, "tokens of every single path")
    draft_cap: float = flag(0.4, "share of max_len that a rejected context answer may take")
    limit: int | None = flag(None, "only the first N pairs")
    row_tokens: int | None = flag(None, "tokens per row; default: 8192 on CUDA, else 2048")
    seed: int = flag(0, "of the bootstrap")
    dtype: str | None = flag(None, "default: bf16 on CUDA, else fp32", ("bf16", "fp32"))
    device: str = flag("auto", "where to run", ("auto", "cpu", "cuda"))
    out: str | None = flag(None, "json file for the numbers and every margin")


def readings(s):
    """{name: losses.Recipe}: the ways to read a pair's implicit reward, and the recipe of all.

    With a reference: plain, cross with the reference on the prompt alone (InSPO's) and on the same
    paths (IFSR's). Objectives without one have the policy's own log-probabilities: plain, cross.
    """
    every = recipe(s.loss, "averaged", s.bridge, "conditioned", beta=s.beta)
    if every.objective.head != "logps" or "rejected" not in every.objective.answers:
        raise UserError(f"--loss {s.loss} gives a pair no margin; choose a preference objective")
    if not every.objective.uses_reference:
        cross = {"cross": "conditioned"}
    elif s.ref is None:
        raise UserError(
            f"--loss {s.loss} needs --ref, the model that training started from; "
            "--loss simpo or cpo reads log-probabilities alone"
        )
    else:
        cross = {"cross, plain reference": "plain", "cross, same paths": "conditioned"}
    rules = {"plain": dataclasses.replace(every, condition="none")}
    for name, reference in cross.items():
        rules[name] = dataclasses.replace(every, condition="cross", reference=reference)
    return rules, every


def pairs(s):
    """Score every path of every pair once per model, and read the margins off."""
    require(s, "model", "data")
    rules, every = readings(s)
    drops = Drops()
    rows = read_pairs(s.data, drops, s.limit)
    model, template = load_model(s.model, s.dtype, s.device)
    limits = Limits(s.max_len, s.draft_cap)
    dataset = Dataset(rows, template, every, limits, s.instruction, s.sep, shown=True)
    print(f"{s.data}: {len(rows)} pairs read, dropped: {drops}; scored: {dataset.report()}")
    vocab = model.config.vocab
    sums, counts = score_pairs(model, dataset, every.paths, s.row_tokens, "policy")
    del model  # one model in memory at a time
    reference = {}
    if every.objective.uses_reference:
        other, _ = load_model(s.ref, s.dtype, s.device, name="--ref")
        if other.config.vocab != vocab:
            raise UserError(f"--ref {s.ref}: its vocabulary is not that of {s.model}")
        reference, _ = score_pairs(other, dataset, every.paths, s.row_tokens, "reference")
    results = {"model": s.model, "ref": s.ref, "loss": s.loss, "bridge": every.bridge}
    results |= {"hyper": every.hyper, "n": len(dataset)}
    for name, rule in rules.items():
        margin = margins(rule, sums, counts, reference)
        accuracy, mean = estimate(margin > 0, s.seed), estimate(margin, s.seed)
        print(f"{name:24} accuracy {accuracy:.1%}   margin {mean:+.4f}")
        results[name] = {"accuracy": accuracy, "margin": mean, "margins": margin.tolist()}
    save(s.out, results | {"pairs": [example.where for example in dataset.examples]})


def margins(rule, sums, counts, reference):
    """(N,) implicit reward of the chosen less that of the rejected answer, under one recipe."""
    rewards = rule(sums, counts, reference, kl=0.0).rewards
    return (rewards["chosen"] - rewards["rejected"]).double().numpy()


# ----------------------------------------------------------------------------- world


@dataclass
class WorldSettings:
    """Every flag of `evaluate.py world`."""

    model: str | None = flag(None, "HF directory")
    start: str = flag(str(ASSETS / "start"), "the opponent: HF directory")
    shown: str | None = flag(
        None,
        "also show the policy the opponent's answer first, behind this bridge",
        ("sep", "turn"),
    )
    instruction: str = flag("better", "refining instruction: better, another, worse, or your text")
    out: str | None = flag(None, "json file for the numbers and all probabilities")


def world(s):
    """Print exact win rates under both kinds of preference, and what could be reached."""
    require(s, "model")
    from assets.world import KINDS, best_win_rate, expected_win_rate

    start = world_probabilities(*load_model(s.start, "fp32", "cpu", name="--start"))
    model, template = load_model(s.model, "fp32", "cpu")
    views = {"plain": world_probabilities(model, template)}
    if s.shown:
        views["shown"] = world_probabilities(model, template, s.shown, s.instruction)
    results = {"model": s.model, "start": s.start}
    for view, policy in views.items():
        mass = policy.sum(-1).mean()
        print(f"{view}: the world's answers have {mass:.1%} of the probability")
        results[view] = {"mass": float(mass), "probabilities": policy.tolist()}
        for kind in KINDS:
            rate = expected_win_rate(policy, start, kind)
            best = best_win_rate(start, kind, shown=view == "shown")
            print(f"  {kind:13} win rate {rate:.1%} against the start; the best is {best:.1%}")
            results[view][kind] = {"win_rate": rate, "best": best}
    save(s.out, results)


def world_win_rate(directory, start, kind="separable"):
    """Exact probability that the model's answer beats the start's; both are HF directories."""
    from assets.world import expected_win_rate

    policies = (world_probabilities(*load_model(d, "fp32", "cpu")) for d in (directory, start))
    return expected_win_rate(*policies, kind)


def world_probabilities(model, template, bridge=None, instruction="better"):
    """pi(answer | question) of all 16 answers to every question -> (Q, A), exact.

    With a bridge: (Q, A, A), entry [q, b, a] being the probability of a behind b.
    """
    from assets.world import answer_probabilities, answers, questions

    n, tries = len(answers(questions()[0])), world_tries(template, bridge, instruction)
    sums, _ = score(model, tries.__getitem__, list(map(len, tries)), n, label="world")
    return answer_probabilities(sums.view((-1, n, n) if bridge else (-1, n)).numpy())


@functools.lru_cache(maxsize=4)
def world_tries(template, bridge=None, instruction="better"):
    """One rows.Trie per question, or with a bridge per question and answer shown: its paths end in
    the 16 answers. Kept, since many models share a template."""
    from assets.world import answers, questions

    pairs = [  # the same answer in both places: as what is said and as what is shown
        Pair([{"role": "user", "content": question}], answer, answer, question)
        for question in questions()
        for answer in answers(question)
    ]
    rule = recipe("dpo", "cross" if bridge else "none", bridge)
    dataset = Dataset(pairs, template, rule, Limits(4096, 0.4), instruction)
    n, shown, tries = len(answers(questions()[0])), "rejected" if bridge else None, []
    for first in range(0, len(dataset), n):
        ends = [dataset.path(first + a, Path(None, "chosen")) for a in range(n)]
        for b in range(n if bridge else 1):
            context = dataset.path(first + b, Path(shown, "chosen"))[0][:-1]
            tries.append(lay_out([([*context, segments[-1]], k) for segments, k in ends]))
    return tries


# ----------------------------------------------------------------------------- the command line

COMMANDS = {
    "reward": (RewardSettings, reward),
    "pairs": (PairsSettings, pairs),
    "world": (WorldSettings, world),
}


def require(s, *names):
    for name in names:
        if getattr(s, name) is None:
            raise UserError(f"--{name} is missing")


def save(file, results):
    """Write the numbers as JSON, if a file is wanted; an Estimate becomes [mean, low, high]."""
    if file:
        try:
            pathlib.Path(file).parent.mkdir(parents=True, exist_ok=True)
            write_json(file, results)
        except OSError as error:
            raise UserError(f"--out {file}: {error.strerror}") from error


def main():
    name, *argv = sys.argv[1:] or ["(none)"]
    if name in ("-h", "--help"):
        print(__doc__)
    elif name not in COMMANDS:
        raise UserError(f"unknown command {name}; the commands are {', '.join(COMMANDS)}")
    else:
        settings, command = COMMANDS[name]
        command(parse(settings, f"evaluate.py {name}: {command.__doc__}", argv))


if __name__ == "__main__":
    run(main)
