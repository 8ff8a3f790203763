"""Compares two models question by question, by the paired bootstrap.

Both sides are result files that evaluate.py wrote with --out: the same command, the same questions.
Several files of a side (a glob, or names with commas) are seeds of one model: a question's value
is their mean, and the means of the seeds are shown beside it. The interval of the difference is
that of the per-question differences, so what makes a question hard for both cancels.
"""

from dataclasses import dataclass

import numpy as np

from evals.results import files_of, read_results, refuse, save_results, table
from evals.stats import estimate
from jobs.cli import UserError, VerdictFlags, flag, require
from pairs.layouts import number
from pairs.read import Drops


@dataclass(frozen=True)
class CompareFlags(VerdictFlags):
    a: str | None = flag(None, "result files of one model: a path, a glob, or several with commas")
    b: str | None = flag(None, "result files of the other")
    model_a: str | None = flag(None, "which model of the files of --a; default: the first")
    model_b: str | None = flag(None, "which model of the files of --b; default: the first")


def read_side(text, model, name):
    """Result files of one model -> [{question: value or None}], one per seed, and their commands.

    Between the two {question: mean}, None where any seed has no value, of all questions of all.
    """
    seeds, commands = [], set()
    for file in files_of(text, name):
        content = read_results(file)
        models = content["models"]
        chosen = next(iter(models), None) if model is None else model
        if chosen not in models:
            raise UserError(f"{file}: no model {chosen}; it has {', '.join(models) or 'none'}")
        values = models[chosen].get("values") or {}
        seeds.append({question: number(value) for question, value in values.items()})
        commands.add(content.get("command"))
    columns = {q: [seed.get(q) for seed in seeds] for seed in seeds for q in seed}
    means = {q: None if None in v else float(np.mean(v)) for q, v in columns.items()}
    return seeds, means, commands


def compare(s):
    """Print how two models differ on the same questions, with a paired interval."""
    require(s, "a", "b")
    sides = [read_side(s.a, s.model_a, "--a"), read_side(s.b, s.model_b, "--b")]
    if len(commands := sides[0][2] | sides[1][2]) > 1:
        raise UserError(f"--a and --b come from different commands: {sorted(map(str, commands))}")
    means, drops, shared = {"a": sides[0][1], "b": sides[1][1]}, Drops(), []
    questions = means["a"] | means["b"]
    for question in questions:
        lacking = [name for name, of in means.items() if of.get(question) is None]
        if not lacking:
            shared.append(question)
            continue
        kind = "null" if question in means[lacking[0]] else "missing"  # a question counts once
        drops.add(f"{kind} in --{lacking[0]}", question)
    refuse(drops, len(questions), s.max_missing, "questions")
    if not shared:
        raise UserError(f"--a {s.a} and --b {s.b} share no question")
    values = np.array([[of[question] for question in shared] for of in means.values()])  # (2, N)
    rows, results = [], {"command": "compare", "n": len(shared), "seed": s.seed}
    for name, side, (seeds, *_) in zip("ab", values, sides, strict=True):
        found = [float(np.mean([seed[q] for q in shared])) for seed in seeds]
        results[name] = {"mean": estimate(side, s.seed), "seeds": found}
        about = {"side": name, "file": getattr(s, name), "n": len(shared)}
        text = {"seeds": " ".join(f"{mean:.4f}" for mean in found)}
        rows.append(about | results[name] | text)
    print(table(rows, ".4f"))
    gap = results["difference"] = estimate(values[0] - values[1], s.seed)
    counts = [int(compares(*values).sum()) for compares in (np.greater, np.equal, np.less)]
    results |= zip(("a_higher", "equal", "b_higher"), counts, strict=True)
    verdict = "differ" if gap.low > 0 or gap.high < 0 else "do not differ"
    of = f"{'/'.join(map(str, counts))} of {len(shared)}"
    print(f"a - b {gap:+.4f}: they {verdict} at 95%; a higher/equal/lower on {of}")
    nulls = {rule: len(where) for rule, where in drops.rules.items()}
    save_results(s.out, results | {"nulls": nulls})
