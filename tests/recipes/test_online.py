"""Online InSPO in the small world: sample, score, pair, train, round by round."""

import json
import re
import sys
from pathlib import Path

import pytest
from chat_server import ChatServer

from assets import world
from evals.world import world_probabilities
from generate import load_model
from jobs.cli import UserError
from jobs.rundir import Metrics
from recipes import online, steps


def start(*words):
    """python -m recipes.online rounds WORDS…"""
    before, sys.argv = sys.argv, ["online", "rounds", "--size", "miniature", *map(str, words)]
    try:
        steps.main("online", online.RECIPES, online.Flags, online.__doc__)
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Two rounds of ins_dpo, one seed."""
    folder = tmp_path_factory.mktemp("online")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metrics, "plot", lambda self: None)
        start("--losses", "ins_dpo", "--rounds", 2, "--out", folder)
    return folder


def test_each_round_starts_from_the_last_one_and_its_pairs(out):
    settings = [
        json.loads((out / f"ins_dpo-seed0/round{k}/run/config.json").read_text())["settings"]
        for k in (1, 2)
    ]
    assert settings[0]["model"] == "assets/start"
    assert settings[1]["model"] == str(out / "ins_dpo-seed0/round1/run/final")
    for k, s in enumerate(settings, 1):
        assert s["data"] == str(out / f"ins_dpo-seed0/round{k}/pairs.jsonl")
        pairs = [json.loads(line) for line in Path(s["data"]).read_text().splitlines()]
        assert 10 < len(pairs) <= 20  # 20 questions; few have 16 answers of one score
        assert all(pair["score_chosen"] > pair["score_rejected"] for pair in pairs)


def test_the_table_has_the_exact_win_rate_of_every_round(out):
    rows = json.loads((out / "rounds.json").read_text())["rows"]
    rates = [row["ins_dpo exact win rate"]["mean"] for row in rows]
    assert [row["round"] for row in rows] == ["0", "1", "2"]
    assert rates[0] == pytest.approx(50) and rates[2] > 55  # the reward model knows the world
    start, last = (
        world_probabilities(*load_model(model, "fp32", "cpu"))
        for model in ("assets/start", out / "ins_dpo-seed0/round2/run/final")
    )
    assert rates[2] == pytest.approx(100 * world.expected_win_rate(last, start, "separable"))
    assert "ins_dpo RM win rate" not in rows[0] and rows[2]["ins_dpo RM win rate"]["mean"] > 30


def test_it_goes_on_where_it_stopped(out, monkeypatch, capsys):
    """A round that lacks its last file is taken up there: nothing before it is made again."""
    (out / "ins_dpo-seed0/round2/world.json").unlink()
    start("--losses", "ins_dpo", "--rounds", 2, "--out", out)
    told = re.findall(r"^[\d:]{8} \d+/\d+ (.*)$", capsys.readouterr().out, re.M)
    assert told == ["ins_dpo-seed0/round2/world.json"]


def test_a_server_samples_and_is_started_for_each_policy(tmp_path, monkeypatch):
    """--serve is begun before a file that is to be sampled, with the policy, and ended after it."""
    log = tmp_path / "served"
    monkeypatch.setattr(Metrics, "plot", lambda self: None)
    said = iter(range(10**6))

    def reply(messages, body):
        asked.append(body["model"])
        return f"Hello! Answer {next(said)}."

    asked = []
    with ChatServer(reply) as server:
        words = ["--losses", "dpo", "--rounds", 1, "--endpoint", server.url]
        serve = f"sh -c 'echo {{model}} >> {log}; exec sleep 60'"
        start(*words, "--serve", serve, "--out", tmp_path / "out")
    last = str(tmp_path / "out/dpo-seed0/round1/run/final")
    # the start's test answers, the round's 20 x 16, and the next policy's test answers
    assert log.read_text().split() == ["assets/start", "assets/start", last]
    assert asked == ["assets/start"] * (20 + 320) + [last] * 20


def test_a_server_that_ends_is_told(tmp_path):
    told = pytest.raises(UserError, match="--serve ended with status 3: sh -c 'exit 3'")
    with told, online.served("sh -c 'exit 3'", "m", "http://127.0.0.1:9/v1"):
        pass
