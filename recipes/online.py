"""Online InSPO, which the paper names as future work (section 7): the policy makes its own pairs.

    python -m recipes.online rounds --dry_run
    python -m recipes.online rounds --endpoint http://127.0.0.1:8000/v1 \\
        --serve "vllm serve {model} --port 8000 --data-parallel-size 8"
    python -m recipes.online rounds --size miniature --seeds 0,1,2,3,4

In every round the last round's policy gives n answers to each prompt, a reward model scores them,
the best and the worst of each prompt become a pair, and the next policy is trained on these pairs
from the last one, which is also its reference. Each round is measured on other prompts: the reward
of one answer each, and how often it beats the start's; in the small world also by its exact win
rate. --endpoint samples by a server; --serve starts it for each policy and ends it.
"""

import contextlib
import shlex
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import NamedTuple

from jobs.cli import UserError, flag
from recipes import cost
from recipes.steps import RecipeFlags, cell, main, seeds_of


class Size(NamedTuple):
    """All that differs between a node and a laptop."""

    model: str
    parameters: float
    reward_model: str
    prompts: str
    test: str
    limit: int  # prompts of a round
    test_limit: int
    n: int  # answers to a prompt
    rounds: int
    train: dict  # flags of train.py beyond its defaults
    sampling: dict  # flags of generate.py
    exact: bool  # whether win rates are known exactly


SIZES = {
    "full": Size(
        model="meta-llama/Meta-Llama-3-8B-Instruct",
        parameters=8.03e9,
        reward_model="RLHFlow/ArmoRM-Llama3-8B-v0.1",
        prompts="princeton-nlp/llama3-ultrafeedback-armorm",
        test="princeton-nlp/llama3-ultrafeedback-armorm:test",
        limit=20_000,
        test_limit=1000,
        n=5,
        rounds=3,
        train={"epochs": 1, "eval_pairs": 0},
        sampling={"max_new_tokens": 2048},
        exact=False,
    ),
    "miniature": Size(
        model="assets/start",
        parameters=0.9e6,
        reward_model="assets/reward",
        prompts="recipes/miniature/questions.jsonl",  # the world's 20
        test="recipes/miniature/questions.jsonl",
        limit=20,
        test_limit=20,
        n=16,
        rounds=5,
        train={"steps": 8, "batch": 10, "lr": 1e-4, "max_len": 256, "eval_pairs": 0},
        sampling={"max_new_tokens": 32},
        exact=True,
    ),
}


@dataclass(frozen=True)
class Flags(RecipeFlags):
    losses: str = flag("dpo,ins_dpo", "objectives to compare, with commas between them")
    rounds: int | None = flag(None, "rounds; default: by size")
    endpoint: str | None = flag(None, "OpenAI-compatible server that samples")
    serve: str | None = flag(None, "command that starts it, {model} being the policy's directory")


def rounds(lab, s):
    """Reward and win rate of every round, by objective."""
    size, losses, seeds = SIZES[s.size], s.losses.split(","), seeds_of(s)
    if s.serve and not s.endpoint:
        raise UserError("--serve needs --endpoint, where its server will answer")
    found, n = {}, s.rounds or size.rounds  # {(loss, round): [{measure: figure} per seed]}
    for loss in losses:
        for seed in seeds:
            policy, name = size.model, "start"
            for k in range(1 + n):
                if k:
                    name = f"{loss}-seed{seed}/round{k}"
                    policy = one_round(lab, s, loss, policy, name, seed)
                found.setdefault((loss, k), []).append(measured(lab, s, policy, name, seed))
    lab.tell("rounds", [row_of(found, losses, k) for k in range(1 + n)])


def one_round(lab, s, loss, policy, name, seed):
    """Sample, score, pair and train -> the directory of the next policy."""
    size = SIZES[s.size]
    asked = size.limit * size.n
    flags = {"data": size.prompts, "limit": size.limit, "n": size.n, "seed": seed}
    said = sample(lab, s, f"{name}/answers.jsonl", policy, asked, **flags)
    flags = {"model": size.reward_model, "answers": said}
    hours = cost.scoring(size.parameters, asked)
    pairs = lab.evaluate(f"{name}/pairs.jsonl", "best_of", hours, **flags)
    hours = cost.training(size.parameters, size.limit, 1, loss, validation=0)
    flags = {"loss": loss, "model": policy, "data": pairs, "seed": seed} | size.train
    return lab.train(f"{name}/run", hours, **flags) / "final"


def measured(lab, s, policy, name, seed):
    """{measure: figure} of a policy; a win is a higher reward than the start's answer has."""
    size = SIZES[s.size]
    flags = {"data": size.test, "limit": size.test_limit, "seed": seed}
    said = {
        place: sample(lab, s, f"{place}/test-seed{seed}.jsonl", model, size.test_limit, **flags)
        for place, model in {"start": size.model, name: policy}.items()
    }
    against = said["start"] if name != "start" else None
    flags = {"model": size.reward_model, "answers": said[name], "against": against}
    scores = lab.evaluate(f"{name}/reward-seed{seed}.json", "reward", **flags)
    found = {"reward": lab.read(scores, "answers", "reward")}
    if against:
        found["RM win rate"] = lab.read(scores, "win_rate")
    if size.exact:
        world = lab.evaluate(f"{name}/world.json", "world", model=policy)
        found["exact win rate"] = lab.read(world, "plain", "separable", "win_rate")
    return found


def sample(lab, s, file, model, asked, /, **flags):
    """generate.py, `asked` answers; by the server where there is one."""
    flags |= {"model": model, "endpoint": s.endpoint} | SIZES[s.size].sampling
    new = lab.plan is not None and not (lab.out / file).exists()
    with served(s.serve, model, s.endpoint) if s.serve and new else contextlib.nullcontext():
        return lab.generate(file, 0 if s.endpoint else cost.sampling(asked), **flags)


@contextlib.contextmanager
def served(command, model, endpoint, patience=1800):
    """Runs a server's command while the block does; waits until it lists its models."""
    words = shlex.split(command.replace("{model}", shlex.quote(str(model))))
    with subprocess.Popen(words) as server:
        try:
            for _ in range(patience):
                if answers(endpoint):
                    break
                if server.poll() is not None:
                    raise UserError(f"--serve ended with status {server.returncode}: {command}")
                time.sleep(1)
            else:
                raise UserError(f"--endpoint {endpoint} does not answer: {command}")
            yield
        finally:
            server.terminate()


def answers(endpoint):
    """Whether a server is up, whatever it says."""
    try:
        urllib.request.urlopen(f"{endpoint.rstrip('/')}/models", timeout=10).close()
    except urllib.error.HTTPError:
        pass
    except OSError:
        return False
    return True


def row_of(found, losses, k):
    """A row of the table: round k of each loss, and how the last differs from the first."""
    row = {"round": str(k)}
    for measure in found[losses[0], k][0]:
        scale = 1 if measure == "reward" else 100
        columns = {loss: [seed[measure] for seed in found[loss, k]] for loss in losses}
        row |= {f"{loss} {measure}": cell(values, scale) for loss, values in columns.items()}
    exact = [[seed.get("exact win rate") for seed in found[loss, k]] for loss in losses]
    if len(losses) > 1 and None not in exact[0]:  # seed by seed, so that what both share cancels
        gaps = [b - a for a, b in zip(exact[0], exact[-1], strict=True)]
        row[f"{losses[-1]} - {losses[0]}"] = cell(gaps, 100)
    return row


RECIPES = {"rounds": rounds}

if __name__ == "__main__":
    main("online", RECIPES, Flags, __doc__)
