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

from evals.results import collect, rows_of, save_results, table
from evals.stats import ratio_of_sums
from evals.verdicts import read_grade
from jobs.cli import UserError, flag, require
from jobs.flags import VerdictFlags
from pairs.layouts import number

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem",
              "humanities")  # fmt: skip
PAIR = ("model_1", "model_2")
FIRST = 81  # ten questions per category, 81 to 160


@dataclass(frozen=True)
class MtbenchFlags(VerdictFlags):
    judgments: str | None = flag(None, "judgment files, a path or glob: jsonl of turns' scores")
    questions: str | None = flag(
        None, "question file with categories; default: MT-Bench's 81 to 160"
    )
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
    """What results.gather takes, of all files."""
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


def mean_score(scores, seed, resamples):
    """{(question, turn): score} -> Estimate of the mean over turns, questions resampled whole."""
    by_question = {}
    for (question, _), score in scores.items():
        if score is not None:
            by_question.setdefault(question, []).append(score)
    sums = [(sum(given), len(given)) for given in by_question.values()]
    return ratio_of_sums(*zip(*sums, strict=True), seed, resamples) if sums else None


def mean_scores(scores, categories, seed, resamples):
    """Everything the tables show of one model -> dict."""
    turns, parts, by_question = {}, {}, {}
    for (question, turn), score in scores.items():
        turns.setdefault(turn, {})[question, turn] = score
        parts.setdefault(categories.get(question, "other"), {})[question, turn] = score
        by_question.setdefault(question, []).append(score)
    order = [*CATEGORIES, *(name for name in parts if name not in CATEGORIES)]

    def means(parts):
        return {name: mean_score(part, seed, resamples) for name, part in parts.items()}

    return {
        "n": sum(score is not None for score in scores.values()),
        "score": mean_score(scores, seed, resamples),
        "turns": {str(turn): mean for turn, mean in sorted(means(turns).items())},
        "categories": means({name: parts[name] for name in order if name in parts}),
        "values": {
            question: None if None in given else float(np.mean(given))
            for question, given in by_question.items()
        },
    }


def mtbench(s):
    """Print MT-Bench scores of every model in --judgments: overall, by turn, by category."""
    require(s, "judgments")
    none = f"--judgments {s.judgments}: no judgments"
    models = collect(judged_turns(s.judgments), s.max_missing, none, "score")
    categories = category_of(s.questions)
    results = {
        model: mean_scores(scores, categories, s.seed, s.resamples)
        for model, scores in models.items()
    }
    order = sorted(results, key=lambda model: -results[model]["score"].mean)
    print(table([
        {"model": m, "n": results[m]["n"], "score": f"{results[m]['score']:.2f}"}
        | {f"turn {t}": f"{v.mean:.2f}" if v else "-" for t, v in results[m]["turns"].items()}
        for m in order
    ]))  # fmt: skip
    print(table([
        {"model": m}
        | {c: f"{v.mean:.2f}" if v else "-" for c, v in results[m]["categories"].items()}
        for m in order
    ]))  # fmt: skip
    save_results(s.out, {"command": "mtbench", "seed": s.seed, "models": results})
