"""Computes AlpacaEval 2: win rate and length-controlled win rate from annotation files.

    win rate   100 mean(p - 1) of the preferences p in [1, 2]; 0 stands for a draw, 1.5
    LC         Dubois et al. 2024 (arXiv 2404.04475). Per model a logistic regression of p - 1,
               logit = a tanh(delta / std(delta)) + b difficulty + c, delta = len_base - len_model
               in characters; then 100 mean sigmoid(b difficulty + c): equal lengths, a removed

The rows of two gamed baselines (concise and verbose GPT-4) join the fit with weight 0.1 each and
without c; the L1 penalty is chosen by grouped 5-fold cross-validation. The interval of LC comes
from refitting on resampled questions (upstream's standard error is that of the fitted predictions,
about half of it).

Legend: N questions, M rows of the gamed baselines.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from evals.results import gather, refuse, save_results, table
from evals.stats import estimate, interval, logistic, sigmoid
from jobs.cli import UserError, VerdictFlags, flag, progress, require
from pairs.layouts import number
from pairs.read import records

PENALTIES = 1 / np.logspace(-4, 4, 10)  # scikit-learn's C, as the weight of the L1 norm
GAMED_WEIGHT = 0.1  # lambda 0.2 over two baselines


@dataclass(frozen=True)
class AlpacaFlags(VerdictFlags):
    annotations: str | None = flag(None, "annotations.json of alpaca_eval, or csv of model,index,…")
    difficulty: str = flag("hub", "csv of index,instruction_difficulty; or hub, or none")
    gamed: str = flag("hub", "csv with the rows of the gamed baselines; or hub, or none")
    model: str | None = flag(None, "only this model of the file")
    resamples: int = flag(1000, "of the bootstrap that refits LC; 0 leaves its interval out")


def annotations_in(file):
    """Yields what results.gather takes of a file of annotations, json, jsonl or csv.

    A value is (share of a win in [0, 1] or NaN, length, baseline's length), in characters.
    UserError for unknown columns.
    """
    seen = Counter()  # rows of each model
    for where, row in records(file):
        try:
            if "len_model" in row:
                model, lengths = row["model"], (float(row["len_model"]), float(row["len_baseline"]))
            else:
                model, lengths = row["generator_2"], (len(row["output_2"]), len(row["output_1"]))
            preference, index = row["preference"], int(row.get("index", seen[model]))
        except (KeyError, TypeError, ValueError) as error:
            cure = "a csv of model, index, preference, len_model, len_baseline"
            fault = f"{where}: no annotation ({error}); expected output_1, output_2, generator_2, "
            raise UserError(f"{fault}preference, or {cure}") from error
        seen[model] += 1
        value, fault = number(preference), None
        if value is None or not (value == 0 or 1 <= value <= 2):
            value, fault = np.nan, "null" if preference in (None, "") else "unparsable"
        share = 0.5 if value == 0 else value - 1
        yield model, index, ((share, *lengths), fault), where


def published(source, name):
    """The file that --difficulty or --gamed names; "hub": this one of AlpacaEval's dataset."""
    if source != "hub":
        return source
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download("tatsu-lab/alpaca_eval", name, repo_type="dataset")
    except Exception as error:  # the hub client raises some twenty kinds: not reachable
        cure = "give a local file, or none: --difficulty none fits without the published "
        cure += "difficulties, as custom prompts need"
        raise UserError(f"the hub did not serve {name}: {cure}") from error


def read_difficulty(source):
    """{question index: difficulty}; None where there is none."""
    if source == "none":
        return None
    rows = records(published(source, "instruction_difficulty.csv"))
    return {int(r.get("index") or r[""]): float(r["instruction_difficulty"]) for _, r in rows}


def read_gamed(source, difficulty):
    """Features (M, 3) and preferences (M,) of the gamed baselines: AlpacaEval's df_gamed.csv, or
    model, index, preference_minus_1, len_model, len_baseline. Empty where there are none."""
    if source == "none" or difficulty is None:  # they answer AlpacaEval's questions
        return np.zeros((0, 3)), np.zeros(0)
    models = {}
    for _, row in records(published(source, "df_gamed.csv")):
        if scaled := "std_delta_len" in row:  # AlpacaEval's own
            delta, label = row["std_delta_len"], row["preference"]
        else:
            delta = float(row["len_baseline"]) - float(row["len_model"])
            label = row["preference_minus_1"]
        values = float(delta), difficulty[int(row["index"])], float(label)
        models.setdefault(row["model"], []).append(values)
    blocks = [np.array(rows).T for rows in models.values()]  # (3, rows of the model) each
    for delta, *_ in blocks:
        delta[:] = np.tanh(delta / (1 if scaled else delta.std(ddof=1)))
    delta, hard, label = np.concatenate(blocks, 1)
    return np.stack([delta, hard, np.zeros(len(hard))], 1), label


def features(length, baseline_length, difficulty):
    """(N, 3): tanh of the scaled difference of lengths, difficulty, 1."""
    delta = baseline_length - length
    spread = delta.std(ddof=1) if len(delta) > 1 else 0.0
    scaled = np.tanh(delta / spread) if spread else np.zeros(len(delta))
    return np.stack([scaled, difficulty, np.ones(len(delta))], 1)


def choose_penalty(x, y, weight, folds=5):
    """The L1 penalty with the least weighted log-loss on held-out folds.

    Row i from the end belongs to fold i % 5, as in scikit-learn's GroupKFold on groups of one size.
    With fewer rows than folds it is the weakest.
    """
    if len(y) < folds:
        return PENALTIES[-1]
    fold, losses = np.arange(len(y))[::-1] % folds, np.zeros(len(PENALTIES))
    for k in range(folds):
        train, test, w = fold != k, fold == k, None
        for n, penalty in enumerate(PENALTIES):  # strongest first: each starts from the last
            w = logistic(x[train], y[train], weight[train], penalty, w)
            z = x[test] @ w
            losses[n] += (weight[test] * (np.logaddexp(0, z) - y[test] * z)).mean()
    return PENALTIES[losses.argmin()]


def length_controlled(x, preference, gamed, penalty=None):
    """LC in percent, and the penalty: chosen by cross-validation where none is given.

    x: (N, 3) features; preference: (N,) in [0, 1], rows with NaN are predicted but not fitted;
    gamed: (features (M, 3), preferences (M,)).
    """
    known = ~np.isnan(preference)
    rows = np.concatenate([gamed[0], x[known]])
    labels = np.concatenate([gamed[1], preference[known]])
    weight = np.where(np.arange(len(labels)) < len(gamed[1]), GAMED_WEIGHT, 1.0)
    if penalty is None:
        penalty = choose_penalty(rows, labels, weight)
    w = logistic(rows, labels, weight, penalty)
    return 100 * sigmoid(x[:, 1:] @ w[1:]).mean(), penalty


def leaderboard_row(annotations, difficulty, gamed, resamples, seed):
    """A model's numbers as the leaderboard has them -> dict; intervals by resampling questions."""
    rows = {i: row for i, row in annotations.items() if row}
    p, *lengths = np.array(list(rows.values()), dtype=np.float64).T
    about = np.array([*lengths, [difficulty[i] if difficulty else 0.0 for i in rows]])  # (3, N)
    wins = 100 * p[~np.isnan(p)]
    controlled, penalty = length_controlled(features(*about), p, gamed)
    draws = np.random.default_rng(seed).integers(len(p), size=(resamples, len(p)))
    refits = [  # the penalty stays: choosing it anew costs 50 times as much
        length_controlled(features(*about[:, n]), p[n], gamed, penalty)[0] for n in draws
    ]
    return {
        "n": len(wins),
        "win_rate": estimate(wins, seed),
        "standard_error": float(wins.std(ddof=1) / len(wins) ** 0.5) if len(wins) > 1 else 0.0,
        "length_controlled_winrate": interval(controlled, refits) if refits else controlled,
        "penalty": float(penalty),
        "n_wins": int((wins > 50).sum()),
        "n_draws": int((wins == 50).sum()),
        "n_losses": int((wins < 50).sum()),
        "avg_length": float(np.mean(lengths[0])),
        "values": {str(i): number(100 * share) for i, (share, *_) in rows.items()},
    }


def alpaca(s):
    """Print AlpacaEval 2's win rate and length-controlled win rate of every model in a file."""
    require(s, "annotations")
    models, drops = gather(annotations_in(s.annotations), f"{s.annotations}: no annotations")
    if s.model is not None and s.model not in models:
        raise UserError(f"--model {s.model} is not in {s.annotations}; it has {', '.join(models)}")
    models = {s.model: models[s.model]} if s.model else models
    difficulty = read_difficulty(s.difficulty)
    gamed, results = read_gamed(s.gamed, difficulty), {}
    for model, rows in models.items():
        known = rows if difficulty is None else difficulty
        if unknown := sorted(i for i, row in rows.items() if row and i not in known):
            cure = "is a row doubled? --difficulty none is for custom prompts"
            raise UserError(f"{model}: no difficulty for question {unknown[0]}; {cure}")
        for i in sorted(known.keys() - rows.keys()):
            drops[model].add("without a row", f"question {i}")
        refuse(drops[model], len(known or rows), s.max_missing, model)
        if all(row is None or np.isnan(row[0]) for row in rows.values()):
            raise UserError(f"{model}: not one verdict")
    bar = {"iterable": models, "leave": False}
    for model in progress("fit", len(models), "model", len(models) == 1, **bar):
        results[model] = leaderboard_row(models[model], difficulty, gamed, s.resamples, s.seed)
    rows = [{
        "model": model, "n": r["n"], "win rate": r["win_rate"], "SE": r["standard_error"],
        "LC": r["length_controlled_winrate"],
        "won/drawn/lost": f"{r['n_wins']}/{r['n_draws']}/{r['n_losses']}",
        "length": r["avg_length"],
    } for model, r in results.items()]  # fmt: skip
    print(table(rows, {"win rate": ".2f", "SE": ".2f", "LC": ".2f", "length": ".0f"}))
    told = {"command": "alpaca", "seed": s.seed, "resamples": s.resamples}
    save_results(s.out, told | {"models": results})
