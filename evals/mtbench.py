"""Computes MT-Bench scores, by turn and by category, from judgments of single answers.

A judge scores each of two turns from 1 to 10 and writes [[7]]; the score of a model is the mean
over all turns of all questions (Zheng et al. 2023, arXiv 2306.05685). FastChat writes one row
{question_id, model, turn, score, judgment} per turn, and score -1 where the text had none.

Its pairwise judgments {question_id, model_1, model_2, turn, g1_winner, g2_winner} are read too: the
score of "A against B" is A's share of wins, where a turn is won by who won both games, and else a
tie, which is half a win (FastChat's win_rate_adjusted).

Intervals: 95%, by the bootstrap over questions, both turns together.
"""

from dataclasses import dataclass

import numpy as np

from evals.results import collect, read_grade, rows_of, save_results, table
from evals.stats import ratio_of_sums
from jobs.cli import UserError, VerdictFlags, flag, require
from pairs.layouts import number

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem",
              "humanities")  # fmt: skip
PAIR = ("model_1", "model_2")
FIRST = 81  # ten questions per category, 81 to 160


@dataclass(frozen=True)
class MtbenchFlags(VerdictFlags):
    judgments: str | None = flag(None, "judgment files, a path or glob: jsonl of turns' scores")
    questions: str | None = flag(None, "file with categories; default: MT-Bench's 81 to 160")
    resamples: int = flag(10_000, "of the bootstrap over questions")


def score_of(row):
    """One judgment -> (score, None), or (None, what is wrong)."""
    given, text = row.get("score"), row.get("judgment")
    score = number(given)
    if given is None and isinstance(text, str) and text.strip():
        score = read_grade(text)
    elif given is None:
        return None, "null"
    return (score, None) if score is not None and 0 <= score <= 10 else (None, "unparsable")


def judged_turns(pattern):
    """What results.gather takes."""
    for where, row in rows_of(pattern, "--judgments"):
        names = [row.get(name) for name in (PAIR if "g1_winner" in row else ("model",))]
        if not {"question_id", "turn"} <= row.keys() or not all(isinstance(n, str) for n in names):
            raise UserError(f"{where}: expected question_id, model, turn and score")
        key = (str(row["question_id"]), row["turn"])
        if len(names) == 1:
            yield names[0], key, score_of(row), where
            continue
        winners, share = {row["g1_winner"], row.get("g2_winner")}, dict.fromkeys(PAIR)
        fault = "null" if None in winners else "unparsable"
        if winners <= {*PAIR, "tie"}:  # 1, 1/2 or 0: a turn is won by who won both games
            tie, fault = "tie" in winners or len(winners) == 2, None
            share = {us: 0.5 if tie else float(us in winners) for us in PAIR}
        for us, them in (PAIR, PAIR[::-1]):
            yield f"{row[us]} against {row[them]}", key, (share[us], fault), where


def category_of(questions):
    """{question: category}: of a question file, or MT-Bench's own."""
    if questions is None:
        return {str(FIRST + i): CATEGORIES[i // 10] for i in range(10 * len(CATEGORIES))}
    rows = rows_of(questions, "--questions")
    return {str(row.get("question_id")): str(row.get("category", "-")) for _, row in rows}


def mean_scores(scores, categories, seed, resamples):
    """{(question, turn): score} of one model -> everything the tables show of it, a dict."""
    every, turns, parts, unread = {}, {}, {}, set()  # the first three: {question: its scores}
    for (question, turn), score in scores.items():
        part = parts.setdefault(categories.get(question, "other"), {})
        for group in (every, turns.setdefault(turn, {}), part):
            if score is None:
                unread.add(question)
            else:
                group.setdefault(question, []).append(score)
    order = [*CATEGORIES, *(name for name in parts if name not in CATEGORIES)]

    def mean(group):  # over turns, questions resampled whole
        sums = [(sum(given), len(given)) for given in group.values()]
        return ratio_of_sums(*zip(*sums, strict=True), seed, resamples) if sums else None

    return {
        "n": sum(map(len, every.values())),
        "score": mean(every),
        "turns": {str(turn): mean(turns[turn]) for turn in sorted(turns)},
        "categories": {name: mean(parts[name]) for name in order if name in parts},
        "values": {q: None if q in unread else float(np.mean(every[q])) for q, _ in scores},
    }


def mtbench(s):
    """Print MT-Bench scores of every model in --judgments: overall, by turn, by category."""
    require(s, "judgments")
    models = collect(judged_turns(s.judgments), s, "score")
    how = (category_of(s.questions), s.seed, s.resamples)
    results = {model: mean_scores(scores, *how) for model, scores in models.items()}
    order = sorted(results, key=lambda model: -results[model]["score"].mean)
    for parts, prefix in (("turns", "turn "), ("categories", "")):
        rows = []
        for model in order:
            found, row = results[model], {"model": model}
            if parts == "turns":
                row |= {"n": found["n"], "score": found["score"]}
            means = found[parts].items()
            rows.append(row | {f"{prefix}{name}": mean and mean.mean for name, mean in means})
        print(table(rows, ".2f"))
    save_results(s.out, {"command": "mtbench", "seed": s.seed, "models": results})
