"""AlpacaEval's figures: the published leaderboard, scikit-learn's fit, values by hand."""

import csv
import json

import numpy as np
import pytest

from conftest import shared_data
from evals import alpaca
from evals.alpaca import annotations_in, choose_penalty, features, length_controlled
from evals.results import gather
from evals.stats import logistic, sigmoid
from jobs.cli import UserError, parse

NONE = ["--difficulty=none", "--gamed=none"]


def run_alpaca(file, *words, out=None):
    words = [f"--annotations={file}", *words, *([f"--out={out}"] if out else [])]
    alpaca.alpaca(parse(alpaca.AlpacaFlags, "", list(map(str, words))))
    return json.loads(out.read_text())["models"] if out else None


def annotation(i, preference, model_length=10, baseline_length=10):
    return {"instruction": f"q{i}", "generator_1": "base", "output_1": "x" * baseline_length,
            "generator_2": "ours", "output_2": "y" * model_length,
            "preference": preference}  # fmt: skip


# ----------------------------------------------------------------------------- published figures


def test_the_published_leaderboard(tmp_path):
    """Of every model at hand the win rate, its standard error, and LC to what own folds allow."""
    data = shared_data("alpaca_eval")
    files = [
        f"--difficulty={data / 'instruction_difficulty.csv'}",
        f"--gamed={data / 'gamed.csv.gz'}",
    ]
    words = [data / "annotations.csv.gz", "--resamples=0", *files]
    found = run_alpaca(*words, out=tmp_path / "out.json")
    with open(data / "leaderboard.csv") as f:
        published = list(csv.DictReader(f))
    assert len(published) == len(found) == 25

    def gaps(column, read):
        return [abs(read(found[row["model"]]) - float(row[column])) for row in published]

    assert max(gaps("win_rate", lambda r: r["win_rate"][0])) < 1e-6
    assert max(gaps("standard_error", lambda r: r["standard_error"])) < 1e-6
    controlled = gaps("length_controlled_winrate", lambda r: r["length_controlled_winrate"])
    assert np.median(controlled) < 0.02 and max(controlled) < 0.2


def test_the_interval_is_wider_than_that_of_the_predictions():
    """The refit interval of LC is about as wide as the raw one's; the predictions' is half."""
    data = shared_data("alpaca_eval")
    model = gather(annotations_in(str(data / "annotations.csv.gz")), "")[0][
        "OpenHermes-2.5-Mistral-7B"
    ]
    difficulty = alpaca.read_difficulty(str(data / "instruction_difficulty.csv"))
    gamed = alpaca.read_gamed(str(data / "gamed.csv.gz"), difficulty)
    result = alpaca.leaderboard_row(model, difficulty, gamed, resamples=60, seed=0)
    mean, low, high = result["length_controlled_winrate"]
    assert low < mean < high
    assert 0.6 < (high - low) / (2 * 1.96 * result["standard_error"]) < 2


# ----------------------------------------------------------------------------- the fit


def draws(seed, n=400):
    rng = np.random.default_rng(seed)
    x = features(rng.integers(10, 900, n) * 1.0, rng.integers(10, 900, n) * 1.0, rng.normal(size=n))
    y = sigmoid(x @ [1.0, 0.5, -0.3] + rng.normal(size=n))
    return x, y, rng.choice([0.1, 1.0], n)


def test_logistic_equals_scikit_learn():
    """On soft labels, which scikit-learn wants as two weighted rows each."""
    linear = pytest.importorskip("sklearn.linear_model")
    x, y, weight = draws(0)
    twice, labels = np.concatenate([x, x]), np.repeat([1, 0], len(y))
    weights = np.concatenate([weight * y, weight * (1 - y)])
    for penalty in alpaca.PENALTIES:
        peer = linear.LogisticRegression(C=1 / penalty, l1_ratio=1, solver="liblinear", tol=1e-9,
                                         fit_intercept=False, max_iter=10_000)  # fmt: skip
        peer.fit(twice, labels, sample_weight=weights)
        np.testing.assert_allclose(logistic(x, y, weight, penalty), peer.coef_[0], atol=1e-5)


def test_folds_are_those_of_scikit_learn(monkeypatch):
    """Read off the rows that each fit is given, whose only feature is their number."""
    selection = pytest.importorskip("sklearn.model_selection")
    rows, fitted = np.arange(12.0), []
    spy = lambda x, *args: fitted.append(set(x[:, 0])) or np.zeros(1)  # noqa: E731
    monkeypatch.setattr(alpaca, "logistic", spy)
    choose_penalty(rows[:, None], rows % 2, np.ones(12))
    theirs = [set(train) for train, _ in selection.GroupKFold(5).split(rows, groups=rows)]
    n = len(alpaca.PENALTIES)
    assert fitted == [train for train in theirs for _ in range(n)]


def test_logistic_at_its_minimum():
    """The subgradient condition: |gradient| = l1 where w is not 0, and less where it is."""
    x, y, weight = draws(1)
    for l1 in (0.0, 0.5, 20.0, 1e4):
        w = logistic(x, y, weight, l1)
        pull = x.T @ (weight * (sigmoid(x @ w) - y))
        np.testing.assert_allclose(pull[w != 0], -l1 * np.sign(w[w != 0]), atol=1e-3)
        assert (np.abs(pull[w == 0]) <= l1 + 1e-3).all()
    assert not w.any()


def test_one_feature_by_hand():
    """Only an intercept, three of four won: logit log 3; and l1 takes 4 (3/4 - sigmoid w) = l1."""
    x, y, weight = np.ones((4, 1)), np.array([1.0, 1.0, 1.0, 0.0]), np.ones(4)
    assert logistic(x, y, weight)[0] == pytest.approx(np.log(3))
    assert sigmoid(logistic(x, y, weight, l1=0.5)[0]) == pytest.approx(3 / 4 - 0.5 / 4)
    assert np.isfinite(logistic(x, np.ones(4), weight)).all()  # no maximum: it stops


def test_length_alone_is_taken_out():
    """A judge that looks at nothing but length, of a model that writes more: LC is about 50."""
    rng = np.random.default_rng(0)
    length, base = rng.integers(300, 1000, 805) * 1.0, rng.integers(100, 900, 805) * 1.0
    x = features(length, base, np.zeros(805))
    wins = (rng.random(805) < sigmoid(-3 * x[:, 0])) * 1.0
    controlled, _ = length_controlled(x, wins, (np.zeros((0, 3)), np.zeros(0)))
    assert wins.mean() > 0.6 and controlled == pytest.approx(50, abs=6)


def test_the_penalty_is_strong_where_there_is_nothing_to_learn():
    x, _, weight = draws(2)
    noise = np.random.default_rng(3).integers(0, 2, len(x)) * 1.0
    x, y, _ = draws(2)
    assert choose_penalty(x, y, weight) < choose_penalty(x, noise, weight)


# ----------------------------------------------------------------------------- files


def test_annotations_by_hand(tmp_path, capsys):
    """Preferences 2, 1.25, 0 (a draw) and null: wins 1, 0.25, 0.5."""
    file = tmp_path / "annotations.json"
    rows = [annotation(i, p, 5 + i, 7) for i, p in enumerate([2, 1.25, 0, None])]
    file.write_text(json.dumps(rows))
    found = run_alpaca(file, "--max_missing=0.25", *NONE, out=tmp_path / "out.json")["ours"]
    assert found["win_rate"][0] == pytest.approx(100 * 1.75 / 3)
    assert (found["n"], found["n_wins"], found["n_draws"], found["n_losses"]) == (3, 1, 1, 1)
    assert found["values"] == {"0": 100, "1": 25, "2": 50, "3": None}
    assert found["avg_length"] == 6.5
    assert "ours: 1 of 4 missing or faulty: 1 null" in capsys.readouterr().out


def test_faulty_verdicts_are_counted_by_kind(tmp_path):
    verdicts = [1.5, None, float("nan"), "much better", 3, True, 2, 2]
    rows = [annotation(i, verdict) | {"index": i % 7} for i, verdict in enumerate(verdicts)]
    (tmp_path / "annotations.json").write_text(json.dumps(rows))
    models, drops = gather(annotations_in(str(tmp_path / "annotations.json")), "")
    counts = {rule: len(where) for rule, where in drops["ours"].rules.items()}
    assert counts == {"null": 1, "unparsable": 4, "doubled": 1}
    shares = [share for share, *_ in models["ours"].values()]
    assert np.nansum(shares) == 1.5 and len(shares) == 7


def table_file(tmp_path, name, rows):
    file = tmp_path / name
    file.write_text("\n".join(rows) + "\n")
    return file


def test_missing_questions_count_against_the_difficulties(tmp_path):
    hard = table_file(
        tmp_path, "hard.csv", ["index,instruction_difficulty", "0,0.5", "1,1", "2,-1"]
    )
    rows = ["model,index,preference,len_model,len_baseline", "m,0,2,10,20", "m,2,1,10,11"]
    words = [f"--difficulty={hard}", "--gamed=none", "--resamples=0"]
    with pytest.raises(
        UserError, match=r"m: 33.3% missing or faulty \(1 without a row \(question 1"
    ):
        run_alpaca(table_file(tmp_path, "rows.csv", rows), *words)
    rows.append("m,3,2,10,20")
    with pytest.raises(UserError, match="no difficulty for question 3"):
        run_alpaca(table_file(tmp_path, "rows.csv", rows), *words)


def test_gamed_rows_of_the_hub_have_their_differences_scaled_already(tmp_path):
    hub = ["index,model,preference,std_delta_len,instruction_difficulty", "1,a,0.25,0.5,9"]
    local = ["model,index,preference_minus_1,len_model,len_baseline", "a,0,0,3,7", "a,1,0.25,5,8"]
    x, y = alpaca.read_gamed(str(table_file(tmp_path, "hub.csv", hub)), {1: 2.0})
    np.testing.assert_allclose(x, [[np.tanh(0.5), 2, 0]])
    x, y = alpaca.read_gamed(str(table_file(tmp_path, "own.csv", local)), {0: 1.0, 1: 2.0})
    np.testing.assert_allclose(x[:, 0], np.tanh(np.array([4, 3]) / np.std([4, 3], ddof=1)))
    assert y.tolist() == [0, 0.25]


@pytest.mark.parametrize("content, message", [
    ("[]", "no annotations"),
    ("[[1]]", ":1: no annotation"),
    (json.dumps([{"instruction": "q", "output": "a"}]), ":1: no annotation .*expected output_1"),
    (json.dumps([annotation(0, None)]), "ours: 100.0% missing or faulty"),
    (json.dumps([annotation(0, 2)]), None),
])  # fmt: skip
def test_errors(tmp_path, content, message):
    file = tmp_path / "annotations.json"
    file.write_text(content)
    if message is None:  # one row is few, and fits
        return run_alpaca(file, "--resamples=5", *NONE)
    with pytest.raises(UserError, match=message):
        run_alpaca(file, *NONE)
