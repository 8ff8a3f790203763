"""Every objective has the value its paper gives it, pulls the right way, and stays finite."""

import math
from itertools import product

import pytest
import torch

import losses
from losses import CONDITIONS, OBJECTIVES, PRESETS, Objective, Path, recipe

LN2, LN3 = math.log(2), math.log(3)
W, L = Path(None, "chosen"), Path(None, "rejected")
BOTH = [name for name in PRESETS if len(recipe(name).objective.answers) == 2]


def t(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


def close(got, want, tolerance=1e-5):
    torch.testing.assert_close(got, torch.as_tensor(want).to(got), rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------------- by hand


def test_dpo_by_hand():
    """S_w - R_w = -10 + 12 = 2, S_l - R_l = -9 + 8 = -1, margin 0.1 (2 + 1) = 0.3.

    -log sigmoid(0.3) = log(1 + e^-0.3) = 0.554355, of the swapped pair 0.854355; labels that are
    wrong one time in ten give 0.9 * 0.554355 + 0.1 * 0.854355 = 0.584355.
    """
    pair = t(-10.0), t(-9.0), t(-12.0), t(-8.0)
    close(losses.dpo(*pair), t(0.554355))
    close(losses.dpo(*pair, label_smoothing=0.1), t(0.584355))


def test_ipo_by_hand():
    """The gap of 3 misses the target 1 / (2 * 0.1) = 5 by 2; squared, 4."""
    close(losses.ipo(t(-10.0), t(-9.0), t(-12.0), t(-8.0)), t(4.0))


def test_rdpo_by_hand():
    """DPO's margin 0.3, and the chosen answer shorter by 2 tokens: 0.3 - 0.1 * 2 = 0.1.

    log(1 + e^-0.1) = 0.644397. With the lengths exchanged 0.5 and 0.474077: a long winner has
    less left to learn.
    """
    pair = t(-10.0), t(-9.0), t(-12.0), t(-8.0)
    close(losses.rdpo(*pair, t(4.0), t(6.0)), t(0.644397))
    close(losses.rdpo(*pair, t(6.0), t(4.0)), t(0.474077))


def test_ld_dpo_by_hand():
    """Log-ratios of (1, 2, 4) and of (3): beyond the shared first token 0.5 (2 + 4) = 3 remain.

    0.1 ((1 + 3) - 3) = 0.1, log(1 + e^-0.1) = 0.644397. With alpha 1 it is DPO's 0.1 (7 - 3) = 0.4.
    """
    chosen, rejected = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[3.0, 0.0]])
    pair = chosen - 5, rejected - 5, torch.full((1, 3), -5.0), torch.full((1, 2), -5.0)
    pair[1][:, 1] = pair[3][:, 1] = 0
    lengths = t(3.0), t(1.0)
    close(losses.ld_dpo(*pair, *lengths), t(0.644397))
    sums = [values.sum(1) for values in pair]
    close(losses.ld_dpo(*pair, *lengths, alpha=1.0), losses.dpo(*sums))


def test_simpo_by_hand():
    """2 * (-0.5) - 2 * (-1.5) - 1 = 1, log(1 + e^-1) = 0.313262; gamma is not divided by beta."""
    close(losses.simpo(t(-0.5), t(-1.5), beta=2.0, gamma=1.0), t(0.313262))


def test_orpo_by_hand():
    """e^A of 1/2 and 1/4: odds 1 and 1/3, odds ratio 3, its sigmoid 3/4.

    ln 2 + 0.1 ln(4/3) = 0.693147 + 0.028768 = 0.721915.
    """
    close(losses.orpo(t(math.log(0.5)), t(math.log(0.25)), lam=0.1), t(0.721915))


def test_cpo_by_hand():
    """0.1 (-10 + 12) = 0.2, log(1 + e^-0.2) = 0.598139, and 0.1 * 2 for the likelihood."""
    close(losses.cpo(t(-10.0), t(-12.0), t(-2.0)), t(0.798139))


def test_slic_by_hand():
    """A gap of 0.4 misses delta = 1 by 0.6, a gap of 2 by nothing; 0.1 * 2 for the likelihood."""
    close(losses.slic(t(-10.0, -10.0), t(-10.4, -12.0), t(-2.0, -2.0)), t(0.8, 0.2))


def test_rrhf_by_hand():
    """Ranked wrongly by 0.5: 0.5 + 2; ranked rightly: the likelihood's 2 alone."""
    close(losses.rrhf(t(-2.0, -2.0), t(-1.5, -3.0)), t(2.5, 2.0))


def test_kto_by_hand():
    """With z = 2 and beta = 0.1, log-ratios of 2 + 10 ln 3 stand ln 3 from z: sigmoid(ln 3) = 3/4.

    That is the right side for the chosen answer, which loses 1/4, and the wrong one for the
    rejected, which loses 3/4. Weighted by 2 and 4: 0.5 + 3.
    """
    pair = t(2 + 10 * LN3), t(2 + 10 * LN3), t(0.0), t(0.0)
    close(losses.kto(*pair, kl=t(2.0)), t(1.0))
    close(losses.kto(*pair, kl=t(2.0), lambda_w=2.0, lambda_l=4.0), t(3.5))


def test_sft_is_per_target_token_of_the_batch():
    """Answers of 3 and 1 tokens with sums -6 and -4: 10 / 4, not the mean of the means, 3."""
    out = recipe("sft")({W: t(-6.0, -4.0)}, {W: t(3.0, 1.0)}, {})
    close(out.losses.sum() / out.units.sum(), 2.5)


def test_reward_by_hand():
    """Scores apart by ln 3: -log(3/4) = 0.287682."""
    close(losses.reward(t(1 + LN3), t(1.0)), t(0.287682))


# ----------------------------------------------------------------------------- recipes


def step(rule, seed=0, n=4, at_start=False):
    """Random sums (with gradient), counts, reference and z of n pairs, as a recipe takes them.

    By token where it asks for that: every path of an answer has as many.
    at_start: before the first step, when policy and reference agree on every path.
    """
    g = torch.Generator().manual_seed(seed)
    paths = losses.unique([*rule.paths, *rule.reference_paths])
    targets = [p.target for p in paths]
    counts = {a: torch.randint(1, 20, (n,), generator=g).float() for a in dict.fromkeys(targets)}
    counts = {p: counts[p.target] for p in paths}
    sums = {p: -2 * counts[p] * torch.rand(n, generator=g) for p in paths}
    noise = {p: 0 if at_start else torch.randn(n, generator=g) for p in paths}
    reference = {p: sums[p] + noise[p] for p in paths}
    if rule.objective.by_token:
        sums, reference = ({p: spread(v[p], counts[p]) for p in paths} for v in (sums, reference))
    sums = {p: sums[p].clone().requires_grad_() for p in rule.paths}
    return sums, counts, reference, [t(0.0 if at_start else 0.7)] * len(rule.views)


def spread(sums, counts):
    """(n,) sums -> (n, 20) tokens, of which the first `counts` are equal and the rest are 0."""
    return (sums / counts)[:, None] * (torch.arange(20) < counts[:, None])


def test_presets_score_the_paths_of_the_papers():
    """The table of the design, row by row: what is scored, and what the reference scores."""
    w, l = ("chosen", "rejected"), ("rejected", "chosen")

    def table(name, **choice):
        rule = recipe(name, **choice)
        return list(map(str, rule.paths)), list(map(str, rule.reference_paths)), rule.bridge

    plain = [f"{answer}|prompt" for answer in w]
    cross = ["|".join(w), "|".join(l)]
    assert table("dpo") == (plain, plain, "sep")
    assert table("ins_dpo") == (cross, plain, "sep")  # InSPO Algorithm 1, line 4
    assert table("ifsr_dpo") == (cross, cross, "turn")  # IFSR Eq. 4
    assert table("ins_simpo") == (cross, [], "sep")
    assert table("irft") == (["chosen|prompt", "chosen|rejected"], [], "turn")
    assert table("sft") == (["chosen|prompt"], [], "sep")
    assert table("dpo", condition="averaged")[0] == plain + cross
    assert table("dpo", condition="one_sided")[0] == ["chosen|rejected", "rejected|rejected"]
    assert table("dpo", condition="instruct")[0] == [f"{answer}|instruct" for answer in w]
    assert table("ifsr_kto")[1] == [*cross, "mismatched|rejected", "mismatched|chosen"]
    assert table("ins_kto")[1] == [*plain, "mismatched|prompt"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_composes_with_every_choice(name):
    choices = product(CONDITIONS, ("sep", "turn"), ("plain", "conditioned"))
    for condition, bridge, reference in choices:
        rule = recipe(name, condition, bridge, reference)
        sums, counts, ref, kl = step(rule)
        out = rule(sums, counts, ref, kl)
        (out.losses.sum() / out.units.sum()).backward()
        assert out.losses.shape == out.units.shape == (4,)
        assert all(values.grad.isfinite().all() for values in sums.values())
        assert set(out.rewards) == set(rule.objective.answers)
        assert all(r.isfinite().all() and not r.requires_grad for r in out.rewards.values())


def test_a_preset_is_its_three_choices():
    spelled = recipe("simpo", condition="cross", bridge="sep", reference="plain")
    preset = recipe("ins_simpo")
    same = ("objective", "condition", "bridge", "reference", "hyper", "paths")
    assert all(getattr(preset, field) == getattr(spelled, field) for field in same)
    given = step(preset)
    assert torch.equal(preset(*given).losses, spelled(*given).losses)


def test_an_explicit_hyperparameter_wins_and_none_is_the_default():
    assert recipe("ins_dpo", beta=None).hyper == {"beta": 0.1, "label_smoothing": 0.0}
    assert recipe("ins_dpo", beta=0.0).hyper["beta"] == 0.0


@pytest.mark.parametrize(
    "name, hyper, told",
    [
        ("dppo", {}, "--loss dppo: unknown objective; choose from dpo, ipo"),
        ("dpo", {"gamma": 1.0}, "--gamma does not apply to --loss dpo; its flags are: --beta"),
        ("irft", {"beta": 0.1}, "--beta does not apply to --loss irft; its flags are: none"),
    ],
)
def test_mistakes_are_told(name, hyper, told):
    with pytest.raises(ValueError, match=told):
        recipe(name, **hyper)


def unclear(chosen, rejceted, *, kappa=1.0):
    return -kappa * (chosen - rejceted)


def unset(chosen, *, kappa):
    return -kappa * chosen


@pytest.mark.parametrize(
    "row, told",
    [
        (
            (("rejcted", "chosen"),),
            "--condition new: .'rejcted', 'chosen'. is no pair of contexts, of ch",
        ),
        ((("rejected",),), "--condition new: .'rejected',. is no pair of contexts, of"),
        (("rejected", "chosen"), "--condition new: 'rejected' is no .*; one is None, chosen"),
        ((None, None), "--condition new: None is no pair of contexts"),
        (Objective(unclear), "--loss new: unknown input rejceted; known are chosen, rejected, me"),
        (Objective(unset), "losses.unset: kappa needs a number as default"),
    ],
)
def test_a_row_that_would_go_wrong_in_silence_is_told_at_once(row, told, monkeypatch):
    rows = OBJECTIVES if isinstance(row, Objective) else CONDITIONS
    monkeypatch.setitem(rows, "new", row)
    monkeypatch.setitem(PRESETS, "new", losses.Preset("new"))
    with pytest.raises(ValueError, match=told):
        recipe("new") if rows is OBJECTIVES else recipe("dpo", "new")


@pytest.mark.parametrize("choice", [{"condition": "crss"}, {"reference": "plian"}])
def test_an_unknown_choice_is_told(choice):
    ((flag, value),) = choice.items()
    with pytest.raises(ValueError, match=f"--{flag} {value}: unknown; choose from"):
        recipe("ins_dpo", **choice)


HANDED = {  # what a recipe makes of S_w = -10, S_l = -9, R_w = -12, R_l = -8, |y_w| = 4, |y_l| = 6
    "dpo": lambda: losses.dpo(t(-10.0), t(-9.0), t(-12.0), t(-8.0)),
    "rdpo": lambda: losses.rdpo(t(-10.0), t(-9.0), t(-12.0), t(-8.0), t(4.0), t(6.0)),
    "simpo": lambda: losses.simpo(t(-2.5), t(-1.5)),
    "orpo": lambda: losses.orpo(t(-2.5), t(-1.5)),
    "cpo": lambda: losses.cpo(t(-10.0), t(-9.0), t(-2.5)),
    "slic": lambda: losses.slic(t(-10.0), t(-9.0), t(-2.5)),
    "rrhf": lambda: losses.rrhf(t(-2.5), t(-1.5)),
}


@pytest.mark.parametrize("name", HANDED)
def test_a_recipe_hands_over_sums_means_and_lengths(name):
    sums, counts = {W: t(-10.0), L: t(-9.0)}, {W: t(4.0), L: t(6.0)}
    out = recipe(name)(sums, counts, {W: t(-12.0), L: t(-8.0)})
    close(out.losses, HANDED[name]())


# ----------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("name", ["dpo", "ifsr_dpo"])
def test_loss_before_the_first_step_is_ln_2(name):
    """Policy and reference agree on the same paths: every margin is 0."""
    rule = recipe(name)
    out = rule(*step(rule, at_start=True))
    assert torch.equal(out.losses, t(LN2).expand(4))


def test_loss_of_ins_dpo_before_the_first_step_is_not_ln_2():
    """Its reference does not see the other answer (InSPO Algorithm 1, line 4)."""
    rule = recipe("ins_dpo")
    assert not torch.isclose(rule(*step(rule, at_start=True)).losses, t(LN2)).any()


@pytest.mark.parametrize("name", ["kto", "ifsr_kto"])
def test_kto_at_zero_log_ratio_is_a_half_per_side(name):
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        rule = recipe(name, lambda_w=weights[0], lambda_l=weights[1])
        out = rule(*step(rule, at_start=True))
        assert torch.equal(out.losses, t(0.5).expand(4))


def test_averaged_kto_is_the_mean_of_two_losses_each_with_its_own_z():
    """By a loop over single numbers, and over kto on each of the two conditions alone."""
    rules = {c: recipe("ifsr_kto", c) for c in ("averaged", "none", "cross")}
    g, n = torch.Generator().manual_seed(0), 5
    every = [*rules["averaged"].paths, *rules["averaged"].kl_paths]
    sums, ref = ({p: 9 * torch.randn(n, generator=g) for p in every} for _ in range(2))
    z = {c: rule.kl(sums, ref) for c, rule in rules.items()}
    contexts = {"none": [None], "cross": ["rejected", "chosen"]}
    for (c, shown), found in zip(contexts.items(), z["averaged"], strict=True):
        paths = [Path(context, "mismatched") for context in shown]
        ratios = [(sums[p][i] - ref[p][i]).item() for p in paths for i in range(n)]
        close(found, max(0.0, sum(ratios) / len(ratios)))
        assert z[c] == [found]
    counts = {p: torch.ones(n) for p in every}
    both = {c: rule(sums, counts, ref, z[c]).losses for c, rule in rules.items()}
    close(both["averaged"], (both["none"] + both["cross"]) / 2)
    assert z["none"] != z["cross"] and max(*z["none"], *z["cross"]) > 0


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("condition", ["none", "cross", "averaged", "instruct"])
def test_swapping_w_and_l_negates_every_margin(name, condition):
    """In every condition but one_sided, which is about the rejected answer alone."""
    swap = {"chosen": "rejected", "rejected": "chosen"}
    rule = recipe(name, condition)
    sums, counts, reference, kl = step(rule)

    def swapped(values):
        return {p: values[Path(swap.get(p.context, p.context), swap.get(p.target, p.target))]
                for p in values}  # fmt: skip

    before = rule(sums, counts, reference, kl).rewards
    after = rule(swapped(sums), swapped(counts), swapped(reference), kl).rewards
    margin = before["chosen"] - before["rejected"]
    assert torch.equal(after["chosen"] - after["rejected"], -margin)
    assert (margin != 0).all()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_the_chosen_answer_is_pulled_up_and_the_rejected_down(name, condition):
    """d loss / d log-prob: never positive for the chosen, never negative for the rejected.

    IPO does so short of its target; a small tau puts it at 1 / (2 tau) = 500, out of reach here.
    """
    ipo = "tau" in recipe(name).objective.defaults
    rule = recipe(name, condition, tau=1e-3 if ipo else None)
    for seed in range(5):
        sums, counts, reference, kl = step(rule, seed)
        rule(sums, counts, reference, kl).losses.sum().backward()
        for path, values in sums.items():
            sign = 1 if path.target == "chosen" else -1
            assert (sign * values.grad <= 0).all(), path


MONOTONE = {  # which way the loss goes when an argument grows and all others stay
    "dpo": {"chosen": -1, "rejected": 1, "ref_chosen": 1, "ref_rejected": -1},
    "rdpo": {"chosen": -1, "rejected": 1, "ref_chosen": 1, "ref_rejected": -1}
    | {"len_chosen": -1, "len_rejected": 1},
    "simpo": {"mean_chosen": -1, "mean_rejected": 1},
    "orpo": {"mean_chosen": -1, "mean_rejected": 1},
    "cpo": {"chosen": -1, "rejected": 1, "mean_chosen": -1},
    "slic": {"chosen": -1, "rejected": 1, "mean_chosen": -1},
    "rrhf": {"mean_chosen": -1, "mean_rejected": 1},
    "kto": {"chosen": -1, "rejected": 1, "ref_chosen": 1, "ref_rejected": -1},
    "sft": {"chosen": -1},
    "reward": {"chosen": -1, "rejected": 1},
}


@pytest.mark.parametrize("name", MONOTONE)
def test_monotone_in_each_argument(name, for_all):
    """Never against the sign, and with it somewhere (a hinge is flat beyond its margin)."""
    objective = OBJECTIVES[name]
    assert MONOTONE[name].keys() == {*objective.inputs} - {"kl"}
    moved = dict.fromkeys(MONOTONE[name], False)

    def check(rng):
        values = {n: -(10 ** rng.uniform(-2, 1)) for n in objective.inputs}
        values |= {n: float(rng.randint(1, 50)) for n in values if n.startswith("len_")}
        values |= {"kl": rng.uniform(0, 3)} if "kl" in values else {}
        for argument, sign in MONOTONE[name].items():
            more = values | {argument: values[argument] * (2 if "len" in argument else 0.5)}
            before, after = (
                objective.loss(*(torch.tensor(v, dtype=torch.float64) for v in x.values())).item()
                for x in (values, more)
            )
            assert sign * (after - before) >= 0, (argument, values)
            moved[argument] |= after != before

    for_all(check)
    assert all(moved.values()), moved


def test_ipo_beyond_its_target_pulls_back():
    chosen = t(6.0).requires_grad_()
    losses.ipo(chosen, t(0.0), t(0.0), t(0.0), tau=0.1).backward()
    close(chosen.grad, t(2.0))  # 2 (6 - 5)


@pytest.mark.parametrize("name", BOTH)
def test_averaged_is_half_the_loss_each(name):
    """InSPO section 5.3 (iv)."""
    rule = recipe(name, "averaged")
    sums, counts, reference, kl = step(rule)
    none, cross = (recipe(name, c)(sums, counts, reference, kl[:1]) for c in ("none", "cross"))
    both = rule(sums, counts, reference, kl)
    close(both.losses, (none.losses + cross.losses) / 2)
    close(both.rewards["chosen"], (none.rewards["chosen"] + cross.rewards["chosen"]) / 2)
    assert both.units.tolist() == [1.0] * 4


def test_irft_averages_over_the_tokens_of_both_views():
    rule = recipe("irft")
    sums, counts, _, _ = step(rule)
    out = rule(sums, counts, {})
    close(out.losses, -sum(sums.values()))
    assert torch.equal(out.units, sum(counts.values()))


def test_implicit_rewards():
    """beta (S - R); beta S without a reference; beta A where the objective is one of means."""
    sums, counts = {W: t(-6.0), L: t(-8.0)}, {W: t(2.0), L: t(4.0)}
    reference = {W: t(-7.0), L: t(-4.0)}
    for name, w, l in [("dpo", 0.1, -0.4), ("cpo", -0.6, -0.8), ("simpo", -6.0, -4.0)]:
        rewards = recipe(name)(sums, counts, reference).rewards
        close(rewards["chosen"], t(w))
        close(rewards["rejected"], t(l))


# ----------------------------------------------------------------------------- extremes

LOGPS = (-1e4, -1.0, -1e-4, 0.0)  # impossible, usual, near certain, certain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_extreme_inputs_give_finite_losses_and_gradients(name, dtype):
    """Every combination of impossible, certain and equal answers; lengths of one token."""
    objective = OBJECTIVES[name]
    columns = zip(*product(LOGPS, repeat=4), strict=True)
    values = [torch.tensor(column, dtype=dtype, requires_grad=True) for column in columns]
    one, kl = torch.ones(len(values[0]), dtype=dtype), torch.tensor(0.0, dtype=dtype)
    known = dict(zip(("chosen", "rejected", "ref_chosen", "ref_rejected"), values, strict=True))
    known |= {"mean_chosen": values[0], "mean_rejected": values[1]}
    known |= {"len_chosen": one, "len_rejected": one, "kl": kl}
    known |= {f"{name}_tokens": value[:, None] for name, value in known.items() if value.ndim}
    out = objective.loss(*(known[name] for name in objective.inputs))
    out.sum().backward()
    assert out.dtype == dtype and out.isfinite().all()
    for value in values[: len(objective.answers)]:
        assert value.grad.isfinite().all()


def test_log_odds_keep_their_precision(for_all):
    """logit(e^A) against float64, from nearly impossible to nearly certain."""

    def check(rng):
        mean = -(10 ** rng.uniform(-5, 3))
        exact = mean - math.log(-math.expm1(mean))
        close(losses._log_odds(t(mean)), t(exact), 1e-4)

    for_all(check)


def test_logistic_losses_of_a_pair_and_its_swap_differ_by_the_margin(for_all):
    """-log sigmoid(m) + log sigmoid(-m) = -m, whatever the log-probabilities."""

    def check(rng):
        w, l, ref_w, ref_l = (t(rng.uniform(-1e3, 0)) for _ in range(4))
        margin = 0.1 * ((w - ref_w) - (l - ref_l))
        close(losses.dpo(w, l, ref_w, ref_l) - losses.dpo(l, w, ref_l, ref_w), -margin)
        close(losses.simpo(w, l, gamma=0.0) - losses.simpo(l, w, gamma=0.0), -2 * (w - l))
        close(losses.reward(w, l) - losses.reward(l, w), -(w - l))

    for_all(check)
