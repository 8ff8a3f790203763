"""Evaluate a model: `python evaluate.py COMMAND --help` lists the flags of a command.

Scores and log-probabilities come from rows, as in training. Brackets hold 95% bootstrap intervals
over prompts or pairs (evals/stats.py).

Legend: N answers or pairs, P paths, Q questions, A answers of a question.
"""

import jobs.waiting  # noqa: F401  # isort: skip  (before torch loads OpenMP)
import dataclasses
import hashlib
import importlib
import math
import os
import sys
from dataclasses import dataclass
from functools import partial

import numpy as np

from data import Dataset, lay_out, path_sums
from evals.answers import align, question_ids, read_answers, read_both
from evals.results import refuse, save_results, table
from evals.rewardbench import sections
from evals.stats import estimate, win_rate
from generate import load_model
from hub.benchmarks import json_digest, write_rows
from hub.tokenizer import refuse_other_ids
from hub.weights import Weights, pinned, resolve
from jobs import cli
from jobs.cli import UserError, as_user_error, flag, parse, require, run
from jobs.files import Store, read_json
from losses import by_path, recipe
from model import path_limit
from pairs.layouts import number
from pairs.read import Drops, read_pairs


@dataclass(frozen=True)
class ScoreFlags(cli.ModelFlags, cli.VerdictFlags):
    model: str | None = flag(None, "reward model: HF directory or hub id")
    answers: str | None = flag(None, "rows of prompt, answer (or instruction, output)")
    pool: str = flag("last", "token of the score; not_pad: last no padding", ("last", "not_pad"))
    limit: int | None = flag(None, "only the first N answers", least=1)
    row_tokens: int | None = flag(None, "tokens per row; default: 8192, on a CPU 2048", least=1)
    cache: str | None = flag(None, "directory of scores to keep, by model and tokens")
    max_missing: float = flag(0.0, "largest share of scores that are no number", most=1)


@dataclass(frozen=True)
class RewardFlags(ScoreFlags):
    against: str | None = flag(None, "answers to the same prompts, or pairs: the chosen answers")
    pairs: str | None = flag(None, "instead of answers: how often the chosen beats the rejected")


def evaluate_reward(s):
    """Score answers by a reward model, and count wins against others, or of chosen answers."""
    require(s, "model", *(() if s.pairs else ("answers",)))
    sides = read_sides(s)
    # Both sides at once, so that the same answer on both is scored once and ties: in another row
    # its score might differ in the last bit, and count as a win.
    every = [answer for _, rows in sides for answer in rows]
    scores = scored(s, every)  # (sides x N,)
    scores = np.split(scores, len(sides))  # (N,) each
    found = [side_results(*side, own, s) for side, own in zip(sides, scores, strict=True)]
    results = {"command": "reward", "model": s.model, "seed": s.seed}
    results |= zip(("answers", "against"), found, strict=False)
    # what `evaluate.py compare` pairs, question by question
    shared = ("n", "reward", "std", "values")
    results["models"] = {side["file"]: {key: side[key] for key in shared} for side in found}
    if len(sides) == 2:
        results |= compare_sides(*sides, *scores, s)
    save_results(s.out, results)


def read_sides(s):
    """[(what it is, list of Answer)] of the one or two sides that are to be scored."""
    if s.pairs:
        if s.answers or s.against:
            raise UserError("give either --pairs, or --answers with or without --against")
        *sides, drops = read_both(s.pairs, "--pairs")
        print(f"{s.pairs}: {len(sides[0])} pairs read, dropped: {drops}")
        names = (f"{s.pairs} chosen", f"{s.pairs} rejected")
        return [(name, rows[: s.limit]) for name, rows in zip(names, sides, strict=True)]
    answers = read_answers(s.answers, "--answers")[: s.limit]
    if not s.against:
        return [(s.answers, answers)]
    others = align(answers, read_answers(s.against, "--against"), f"--against {s.against}")
    return [(s.answers, answers), (s.against, others)]


def scored(s, answers):
    """(N,) scores of answers under --model, those in --cache first."""
    model, template = load_model(s.model, s.dtype, s.device, head="reward", fold=s.fold_system)
    cache = open_scores(s.cache, model, template.directory) if s.cache else {}
    return reward_scores(model, template, answers, s.pool, s.row_tokens, cache)


def side_results(file, rows, scores, s):
    """Mean, spread and every score of one side; scores that are no number are counted."""
    drops, fine = Drops(), np.isfinite(scores)  # (N,)
    for n in np.flatnonzero(~fine):
        drops.add("without a finite score", rows[n].where)
    refuse(drops, len(rows), s.max_missing, file)
    if not fine.any():
        raise UserError(f"{file}: not one finite score")
    mean = estimate(scores[fine], s.seed)
    std = float(scores[fine].std(ddof=1)) if fine.sum() > 1 else 0.0
    print(f"{file}: {len(rows)} answers, reward {mean:.4f}, std {std:.4f}")
    values = [number(score) for score in scores]  # None for what is not finite: JSON has no NaN
    ids = dict(zip(question_ids(rows), values, strict=True))
    return {"file": file, "n": len(rows), "reward": mean, "std": std,
            "scores": values, "values": ids}  # fmt: skip


def compare_sides(ours, theirs, our_scores, their_scores, s):
    """Win rate, ties and difference where both have scores, over all and by subset."""
    fine = np.isfinite(our_scores) & np.isfinite(their_scores)  # (N,)
    if not fine.any():
        raise UserError(f"{ours[0]}, {theirs[0]}: no question with two scores")
    wins, ties = win_rate(our_scores[fine], their_scores[fine], s.seed)
    # question by question, so that what makes a question easy for both cancels
    gap = estimate(our_scores[fine] - their_scores[fine], s.seed)
    print(f"{'accuracy' if s.pairs else 'win rate'} {wins:.1%}, {ties} ties; difference {gap:+.4f}")
    # pairs name their subset on both sides, answer files often on one alone
    names = np.array([a.subset or b.subset for a, b in zip(ours[1], theirs[1], strict=True)])
    subsets = by_subset(our_scores, their_scores, names, fine, s.seed)
    found = {"win_rate": wins, "ties": ties, "difference": gap, "subsets": subsets}
    if s.pairs:
        found["sections"] = sections(names[fine], our_scores[fine] > their_scores[fine], s.seed)
    return found


def by_subset(ours, theirs, names, fine, seed):
    """Print and return {subset: {n, win_rate, ties, reward}}; names: (N,), "" belongs to none."""
    parts, rows = {}, []
    for name in filter(None, dict.fromkeys(names.tolist())):
        part = fine & (names == name)
        if part.any():
            n, mean = int(part.sum()), float(ours[part].mean())
            rate, ties = win_rate(ours[part], theirs[part], seed)
            parts[name] = {"n": n, "win_rate": rate, "ties": ties, "reward": mean}
            rows.append({"subset": name, "n": n, "win rate": rate, "ties": ties, "reward": mean})
    if parts:  # every subset weighs the same, however many questions it has
        mean = np.mean([part["win_rate"].mean for part in parts.values()])
        rows.append({"subset": "mean of the subsets", "win rate": mean})
        print(table(rows, {"win rate": ".1%", "reward": ".4f"}))
    return parts


def open_scores(folder, model, source):
    """Store of FOLDER/<digest of the model>.jsonl: {digest of an answer's tokens: score}."""
    weight = model.embed.weight  # bf16, or another device, gives slightly other scores
    identity = Weights(source).digest().encode() + (source / "config.json").read_bytes()
    identity += f"{weight.dtype} {weight.device.type}".encode()
    file = os.path.join(folder, f"{hashlib.sha256(identity).hexdigest()}.jsonl")
    return Store(file, ("tokens", "score"), "--cache")


def reward_scores(model, template, answers, pool="last", row_tokens=None, cache=None):
    """(N,) scores of answers under a reward model, rendered as `--loss reward` trains it.

    pool: "last" reads the score at the last token; "not_pad" at the last one whose id is not the
    config's pad_token_id, as transformers does even where the template itself ends with that id.
    cache: {digest of an answer's tokens: score}, asked first.
    """
    known = {} if cache is None else cache
    ids = template.encode(template.render(a.prompt, generation=True) for a in answers)
    # closed=False: with all that the template writes behind the answer, as in training
    texts = [template.answer(a.prompt, a.text, closed=False) for a in answers]
    ids += template.encode(texts, behind=template.opening)
    if pool == "not_pad":
        pad = read_json(template.directory / "config.json").get("pad_token_id")
        if pad is not None:  # without the padding at their ends
            ids = [x[: np.flatnonzero(x != pad).max(initial=-1) + 1] for x in ids]
    pairs = list(zip(ids[: len(answers)], ids[len(answers) :], strict=True))
    most = model.config.positions or math.inf
    if long := sum(len(x) + len(y) > most for x, y in pairs):
        told = f"{long} of {len(pairs)} dialogues are longer than the reward model's {most} "
        told += "positions: scored whole, as transformers does without truncation"
        print(told, file=sys.stderr)
    # a score is kept by the tokens that it depends on, so equal answers are scored once
    keys = [hashlib.sha256(x.tobytes() + b"|" + y.tobytes()).hexdigest() for x, y in pairs]
    first = {key: n for n, key in enumerate(keys) if key not in known}
    if first:
        # a trie of one path each, whose only scored token is its last
        new = [pairs[n] for n in first.values()]
        tries = [lay_out([([x, y], len(y))], "last") for x, y in new]
        sizes = list(map(len, tries))
        sums, _ = path_sums(model, tries.__getitem__, sizes, 1, row_tokens, "reward")  # (N, 1)
        for key, value in zip(first, sums[:, 0].tolist(), strict=True):
            known[key] = value
    return np.array([known[key] for key in keys], dtype=np.float64)


@dataclass(frozen=True)
class BestOfFlags(ScoreFlags):
    answers: str | None = flag(None, "files of generate.py --n K, or of several models; commas")
    out: str | None = flag(None, "jsonl file of pairs, which train.py --data reads")


def evaluate_best_of(s):
    """Make pairs of the best and the worst of several answers, by a reward model."""
    require(s, "model", "answers", "out")
    answers = read_answers(s.answers, "--answers")[: s.limit]
    scores = scored(s, answers)  # (N,)
    side_results(s.answers, answers, scores, s)  # tells of them, and counts what is no number
    questions, drops, rows = {}, Drops(), []
    for answer, value in zip(answers, scores.tolist(), strict=True):
        # by all that stands before the answer: second turns lie behind different first answers
        where, ranked = questions.setdefault(json_digest(answer.prompt), (answer.where, []))
        if answer.text.strip() and np.isfinite(value):
            ranked.append((value, answer))
    for where, ranked in questions.values():
        ranked.sort(key=lambda pair: pair[0])
        if len(ranked) < 2:
            drops.add("fewer than two answers with text and score", where)
        elif ranked[0][0] == ranked[-1][0]:
            drops.add("all answers score the same", where)
        else:
            (low, worst), (high, best) = ranked[0], ranked[-1]
            pair = {"prompt": best.prompt, "chosen": best.text, "rejected": worst.text}
            rows.append(pair | {"score_chosen": high, "score_rejected": low})
    told = f"{len(answers)} answers to {len(questions)} questions: {len(rows)} pairs"
    print(f"{told}, dropped: {drops}")
    if not rows:
        raise UserError(f"{s.answers}: no pair; generate.py --n K gives K answers per question")
    high, low = (np.mean([row[f"score_{side}"] for row in rows]) for side in ("chosen", "rejected"))
    print(f"{s.out}: reward of the best {high:.4f}, of the worst {low:.4f}")
    write_rows(s.out, rows, lines=True)


@dataclass(frozen=True)
class PairsFlags(cli.ModelFlags, cli.DataFlags, cli.PathFlags, cli.ResultFlags):
    model: str | None = flag(None, "the policy: HF directory or hub id")
    ref: str | None = flag(None, "the reference, if the objective has one: where training started")
    loss: str = flag("ins_dpo", "objective whose implicit reward is read; the README has the table")
    beta: float | None = flag(None, "scale of the margins; default: the objective's")


def readings(s):
    """{name: losses.Recipe}: the ways to read a pair's implicit reward, and the recipe of all.

    With a reference: plain, cross with the reference on the prompt alone (InSPO's) and on the same
    paths (IFSR's). Objectives without one have the policy's own log-probabilities: plain, cross.
    """
    with as_user_error():  # "averaged" has the plain and the conditioned paths
        every = recipe(s.loss, "averaged", s.bridge, "conditioned", beta=s.beta)
    if every.objective.head != "logps" or "rejected" not in every.objective.answers:
        raise UserError(f"--loss {s.loss} gives a pair no margin; choose a preference objective")
    if not every.objective.uses_reference:
        cross = {"cross": "conditioned"}
    elif s.ref is None:
        fault = f"--loss {s.loss} needs --ref, the model that training started from"
        raise UserError(f"{fault}; --loss simpo or cpo reads log-probabilities alone")
    else:
        cross = {"cross, plain reference": "plain", "cross, same paths": "conditioned"}
    # the paths of all these readings are among those of `every`, and each is scored once
    rules = {"plain": dataclasses.replace(every, condition="none")}
    for name, reference in cross.items():
        rules[name] = dataclasses.replace(every, condition="cross", reference=reference)
    return rules, every


def pair_logps(model, dataset, paths, row_tokens=None, label="score"):
    """Log-probabilities of these paths of a data.Dataset: {Path: (N,)} sums and token counts."""
    sizes = [dataset.size(i, paths) for i in range(len(dataset))]
    trie = partial(dataset.trie, paths=paths)
    found = path_sums(model, trie, sizes, len(paths), row_tokens, label)  # two of (N, P)
    return [by_path(values, paths) for values in found]


def evaluate_pairs(s):
    """Tell how often, and by what margin, the implicit reward of a policy prefers the chosen."""
    require(s, "model", "data")
    rules, every = readings(s)
    drops = Drops()
    rows = read_pairs(s.data, drops, s.limit, True, s.bad_rows, s.data_revision, s.ignore_columns)
    directories = [resolve(s.model)]
    if every.objective.uses_reference:
        directories.append(resolve(s.ref, "--ref"))
        refuse_other_ids(*directories, "--ref")
    s = dataclasses.replace(s, max_len=path_limit(s.max_len, *directories))
    model, template = load_model(s.model, s.dtype, s.device, fold=s.fold_system)
    dataset = Dataset.of(s, rows, template, every, shown=True)
    print(f"{s.data}: {len(rows)} pairs read, dropped: {drops}; scored: {dataset.report()}")
    sums, counts = pair_logps(model, dataset, every.paths, s.row_tokens, "policy")
    del model  # one model in memory at a time
    reference = {}
    if every.objective.uses_reference:
        other, _ = load_model(s.ref, s.dtype, s.device, name="--ref")
        reference, _ = pair_logps(other, dataset, every.paths, s.row_tokens, "reference")
    results = {"model": s.model, "ref": s.ref, "loss": s.loss, "bridge": every.bridge}
    results |= {"hyper": every.hyper, "n": len(dataset)}
    for name, rule in rules.items():
        rewards = rule.rewards(sums, counts, reference)
        margin = (rewards["chosen"] - rewards["rejected"]).double().numpy()  # (N,)
        # a tie is no win: a model that cannot tell answers apart has accuracy 0, not 50%
        accuracy, mean = estimate(margin > 0, s.seed), estimate(margin, s.seed)
        print(f"{name:24} accuracy {accuracy:.1%}   margin {mean:+.4f}")
        results[name] = {"accuracy": accuracy, "margin": mean, "margins": margin.tolist()}
    save_results(s.out, results | {"pairs": [example.where for example in dataset.examples]})


COMMANDS = ("reward", "pairs", "best_of", "world", "alpaca", "arena", "mtbench", "compare",
            "report", "context", "next_token", "attention", "judge", "runs", "describe", "plan",
            "extract")  # fmt: skip


def find_command(name):
    """(flags dataclass, function) of a command: NameFlags and NAME of evals/NAME.py.

    The module is imported only now, so that no command waits for what another one needs.
    """
    if name not in COMMANDS:
        raise UserError(f"unknown command {name}; the commands are {', '.join(COMMANDS)}")
    flags = f"{name.title().replace('_', '')}Flags"
    if name in ("reward", "best_of", "pairs"):  # those of this file
        return globals()[flags], globals()[f"evaluate_{name}"]
    home = importlib.import_module(f"evals.{'context' if name == 'next_token' else name}")
    return getattr(home, flags), getattr(home, name)


def main():
    name, *argv = sys.argv[1:] or ["(none)"]
    if name in ("-h", "--help"):
        print(__doc__.splitlines()[0], end="\n\n")
        for command in COMMANDS:
            print(f"{command:12}{find_command(command)[1].__doc__.splitlines()[0]}")
    else:
        flags, command = find_command(name)
        command(pinned(parse(flags, command.__doc__, argv, name)))


if __name__ == "__main__":
    run(main)
