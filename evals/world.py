"""Computes exact win rates in the embedded small world: `python evaluate.py world --model DIR`.

The world (assets/world.py) has Q = 20 questions with A = 16 answers each, and preferences that are
known in closed form. So a policy's win rate needs no judge and no sampling: it follows from the
probabilities of the 16 answers.
"""

from dataclasses import dataclass

from assets import world as small_world
from data import BRIDGES, Dataset, Limits, lay_out, path_sums
from evals.results import save_results
from generate import load_model
from jobs.cli import CheckpointFlags, InstructionFlags, flag, require
from jobs.files import ASSETS
from losses import Path, recipe
from pairs.layouts import Pair


@dataclass(frozen=True)
class WorldFlags(CheckpointFlags, InstructionFlags):
    start: str = flag(str(ASSETS / "start"), "the opponent: HF directory")
    shown: str | None = flag(None, "also show the opponent's answer by this bridge", tuple(BRIDGES))
    out: str | None = flag(None, "json file for the numbers and all probabilities")


def world(s):
    """Print exact win rates in the embedded small world, and what could be reached."""
    require(s, "model")
    start = world_probabilities(*load_model(s.start, "fp32", "cpu", name="--start"))
    loaded = load_model(s.model, "fp32", "cpu")  # model and template
    policies = {"plain": world_probabilities(*loaded)}
    if s.shown:
        policies["shown"] = world_probabilities(*loaded, s.shown, s.instruction)
    results = {"model": s.model, "start": s.start}
    for name, policy in policies.items():
        mass = policy.sum(-1).mean()
        print(f"{name}: the world's answers have {mass:.1%} of the probability")
        results[name] = {"mass": float(mass), "probabilities": policy.tolist()}
        for kind in small_world.KINDS:
            rate = small_world.expected_win_rate(policy, start, kind)
            best = small_world.best_win_rate(start, kind, shown=name == "shown")
            print(f"  {kind:13} win rate {rate:.1%} against the start; the best is {best:.1%}")
            results[name][kind] = {"win_rate": rate, "best": best}
    save_results(s.out, results)


def tell_win_rate(directory, start):
    """Print the exact separable win rate against the start of a run, before it and after it."""
    before, after = (world_probabilities(*load_model(d, "fp32", "cpu")) for d in (start, directory))
    rates = [small_world.expected_win_rate(p, before, "separable") for p in (before, after)]
    told = "exact win rate against the start: before {:.1%}, after {:.1%}"
    print(told.format(*rates), flush=True)


def world_probabilities(model, template, bridge=None, instruction="better"):
    """pi(answer | question) of all 16 answers to every question -> (Q, A), exact.

    With a bridge: (Q, A, A), entry [q, b, a] being the probability of a behind b.
    """
    pairs, n = [], len(small_world.CHOICES)
    for question in small_world.questions():
        x, said = [{"role": "user", "content": question}], small_world.answers(question)
        # the other answer, which may be shown, is the one before; the first one's is the last
        pairs += [Pair(x, answer, said[k - 1], question) for k, answer in enumerate(said)]
    rule = recipe("dpo", "cross" if bridge else "none", bridge)
    dataset = Dataset(pairs, template, rule, Limits(4096, 0.4), instruction)
    path, tries = Path("rejected" if bridge else None, "chosen"), []
    for first in range(0, len(dataset), n):  # a trie per question, or per question and answer shown
        own = [dataset.path(i, path) for i in range(first, first + n)]
        shown = own[1:] + own[:1] if bridge else own[:1]  # in the order of the answers shown
        for (*context, _), _ in shown:
            tries.append(lay_out([([*context, answer], k) for (*_, answer), k in own]))
    logps, _ = path_sums(model, tries.__getitem__, list(map(len, tries)), n, label="world")
    return small_world.answer_probabilities(logps.view((-1, n, n) if bridge else (-1, n)).numpy())
