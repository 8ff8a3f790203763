"""Computes Arena-Hard scores, raw and style-controlled, from verdicts on a model and a baseline.

A judge sees each question twice, with the two answers in both orders; its verdict is [[A>>B]],
[[A>B]], [[A=B]], [[B>A]] or [[B>>A]]. As arena-hard-auto counts them:

    games     the baseline stands as A in the first game and as B in the second
    score     mean over all games of 1 for a win, 1/2 for a tie, 0; a strong verdict counts thrice
    control   Bradley-Terry, P(model wins) = sigmoid(skill + style · weights): style holds what
              differs between the two answers, (a - b) / (a + b) of their tokens, and
              (a - b) / (a + b + 1) of the headers, lists and bold texts per token, each
              standardised over all games of all models. Controlled score: sigmoid(skill)

Standardised style has mean 0 over the games that were judged, so with one model the published
control removes nothing: its games *are* the mean. `equal style` is the same fit read where both
answers have the same style. Without style the Bradley-Terry fit equals the score.

Intervals: 95%, by the bootstrap over questions (upstream: over games, which come in dependent
pairs, and 90%). Legend: Q questions, M models, G games, S style columns, R resamples.
"""

from dataclasses import dataclass

import numpy as np

from evals.results import VERDICTS, collect, read_verdict, rows_of, save_results, table, to_label
from evals.stats import interval, logistic, ratio_of_sums, resample, sigmoid
from jobs.cli import UserError, VerdictFlags, flag, progress, require
from pairs.layouts import number

STYLE = ("token_len", "header_count", "list_count", "bold_count")
CONTROLS = {"none": [], "length": [0], "markdown": [1, 2, 3], "both": [0, 1, 2, 3]}


@dataclass(frozen=True)
class ArenaFlags(VerdictFlags):
    judgments: str | None = flag(None, "judgment files, a path or glob: jsonl of model, games")
    control: str = flag("none", "style columns of the Bradley-Terry fit", tuple(CONTROLS))
    answers: str | None = flag(None, "answer files of all models and the baseline; for --control")
    baseline: str | None = flag(None, "the baseline's name in --answers; for --control")
    category: str | None = flag(None, "only questions of this category, say hard_prompt")
    resamples: int = flag(1000, "of the bootstrap over questions")


def read_games(row):
    """One judgment -> ([(score of the model, weight)] of two games, None), or (None, fault)."""
    games, read = row.get("games"), []
    if not isinstance(games, list) or [type(game) for game in games] != [dict, dict]:
        return None, "incomplete"
    for game in games:
        label, text = game.get("score"), game.get("judgment")
        text = text.get("answer") if isinstance(text, dict) else text
        if label is None and not (isinstance(text, str) and text.strip()):
            return None, "null"
        label = read_verdict(text) if label is None else to_label(str(label))
        if label is None:
            return None, "unparsable"
        read.append(VERDICTS[label])  # (score of A, weight)
    (score, weight), second = read
    return [(1 - score, weight), second], None


def judged_games(pattern, category):
    """What results.gather takes."""
    for where, row in rows_of(pattern, "--judgments"):
        question = row.get("uid", row.get("question_id"))
        if question is None or not isinstance(row.get("model"), str):
            raise UserError(f"{where}: expected uid or question_id, model and games")
        if category is None or row.get("category") == category:
            yield row["model"], str(question), read_games(row), where


def read_style(pattern, control):
    """{model: {question: (4,) tokens, headers, lists, bold}} of answer files in Arena-Hard's form.

    Only the columns that `control` asks for must be there, and the tokens.
    """
    styles, needed = {}, {0, *CONTROLS[control]}
    for where, row in rows_of(pattern, "--answers"):
        meta, question = row.get("metadata"), row.get("uid", row.get("question_id"))
        meta = meta if isinstance(meta, dict) else {}
        counts = [count(meta.get(name)) for name in STYLE]
        if missing := [STYLE[i] for i in sorted(needed) if counts[i] is None]:
            raise UserError(f"{where}: metadata without {', '.join(missing)}; --control needs it")
        model = row.get("model", row.get("model_id"))
        styles.setdefault(model, {})[str(question)] = np.array([c or 0.0 for c in counts])
    return styles


def count(value):
    """A count, or the sum of its kinds ({"h1": 2, "h2": 1} -> 3); None where there is none."""
    if isinstance(value, dict):
        value = sum(number(v) or 0 for v in value.values())
    return number(value)


def style_difference(ours, theirs):
    """(…, 4), (…, 4) counts -> (…, 4): relative difference of tokens and of markdown per token."""
    a, b = np.maximum(ours[..., :1], 1), np.maximum(theirs[..., :1], 1)  # an empty answer: 1 token
    length = (a - b) / (a + b)
    a, b = ours[..., 1:] / a, theirs[..., 1:] / b
    return np.concatenate([length, (a - b) / (a + b + 1)], -1)


def style_of_games(battles, s):
    """(G, S) standardised style columns that --control selects, and (S,) where style is equal."""
    styles = read_style(s.answers, s.control)
    if s.baseline not in styles:
        raise UserError(f"--baseline {s.baseline}: --answers has {', '.join(map(str, styles))}")
    sides = []
    models, questions, _, weight = battles
    for model, question in zip(models.tolist(), questions.tolist(), strict=True):
        for name in (model, s.baseline):
            if question not in styles.get(name, {}):
                raise UserError(f"--answers {s.answers}: no answer of {name} to {question}")
        sides.append((styles[model][question], styles[s.baseline][question]))
    ours, theirs = np.array(sides).swapaxes(0, 1)
    columns = style_difference(ours, theirs)[:, CONTROLS[s.control]]
    mean = np.average(columns, axis=0, weights=weight)
    spread = np.average((columns - mean) ** 2, axis=0, weights=weight) ** 0.5
    spread[spread == 0] = 1.0  # a column that never differs says nothing
    return (columns - mean) / spread, -mean / spread


def game_columns(models):
    """{model: {question: games}} -> model, question, score, weight of every game: four of (G,)."""
    rows = [
        (model, question, score, float(weight))
        for model, questions in models.items()
        for question, games in questions.items()
        for score, weight in games or ()
    ]
    return [np.array(column) for column in zip(*rows, strict=True)]


def bradley_terry(battles, names, style, equal, seed=0, resamples=0):
    """Skills of all models against the baseline, whose skill is 0, fitted with the style columns.

    battles: of game_columns; style: (G, S); equal: (S,) the style columns of equal answers. Returns
    {"controlled": {name: Estimate}, "equal_style": {…}} and the (S,) style weights.
    """
    models, questions, score, weight = battles
    skills = models[:, None] == np.array(names)  # (G, M): who plays
    x = np.concatenate([skills, style], 1)  # (G, M + S): the style columns are the last S
    questions, place = np.unique(questions, return_inverse=True)

    def fit(counts, start=None):
        w = logistic(x, score, weight * counts[place], start=start)
        skill, pull = w[: len(names)], w[len(names) :]
        return w, np.stack([sigmoid(skill), sigmoid(skill + equal @ pull)])  # (2, M)

    w, scores = fit(np.ones(len(questions)))
    bar = {"iterable": resample(len(questions), seed, resamples), "leave": False}
    refits = [fit(counts, w)[1] for counts in progress("Bradley-Terry", resamples, "fit", **bar)]
    spans = np.stack(refits or [scores])  # (R, 2, M)
    views = {
        view: {name: interval(scores[v, m], spans[:, v, m]) for m, name in enumerate(names)}
        for v, view in enumerate(("controlled", "equal_style"))
    }
    return views, w[len(names) :]


def arena(s):
    """Print Arena-Hard scores of every model in --judgments, and style-controlled ones."""
    require(s, "judgments", *(["answers", "baseline"] if s.control != "none" else []))
    only = "" if s.category is None else f" of category {s.category}"
    models = collect(judged_games(s.judgments, s.category), s, "verdict", only)
    results = {}
    for model, rows in models.items():
        # per question its games' wins and weights, summed; None where there is no verdict
        sums = {q: g and (sum(x * w for x, w in g), sum(w for _, w in g)) for q, g in rows.items()}
        known = [both for both in sums.values() if both]
        score = ratio_of_sums(*zip(*known, strict=True), s.seed, s.resamples)
        means = {q: both and both[0] / both[1] for q, both in sums.items()}
        results[model] = {"n": len(known), "score": score, "values": means}
    if s.control != "none":
        battles = game_columns(models)
        columns = style_of_games(battles, s)
        views, pull = bradley_terry(battles, list(models), *columns, s.seed, s.resamples)
        for view, scores in views.items():
            for model, score in scores.items():
                results[model][view] = score
        named = zip((STYLE[i] for i in CONTROLS[s.control]), pull.tolist(), strict=True)
        print("style weights: " + ", ".join(f"{name} {value:+.3f}" for name, value in named))
    order = sorted(results, key=lambda model: -results[model]["score"].mean)
    rows = []
    for model in order:
        shown = {k.replace("_", " "): v for k, v in results[model].items() if k != "values"}
        rows.append({"model": model} | shown)
    print(table(rows, ".1%"))
    told = {"command": "arena", "seed": s.seed, "control": s.control}
    save_results(s.out, told | {"models": results})
