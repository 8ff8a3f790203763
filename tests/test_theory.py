"""The papers' mathematics as running code; docs/theory.md walks through it in the same order.

A finite world: K answers to one prompt, and a preference table prefer[a, b] = P(y_a > y_b | x) with
prefer + prefer.T = 1. A policy is a table of log-probabilities of the answer, one row per context:
row b is pi(. | x, y_b), and a last row, PROMPT, is pi(. | x), the policy that is deployed.

Legend: K answers, a answer given, b answer shown, ref (K,) the reference policy pi_ref(. | x).
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from data import Dataset, Limits, Pair
from losses import Path, recipe
from model import load
from rows import build_row
from template import Template

PROMPT = -1


def logit(p):
    return np.log(p) - np.log1p(-p)


PSI = {
    "identity": lambda p: p,
    "logit": logit,
    "cube": lambda p: p**3,
    "odds": lambda p: p / (1 - p),
}

# InSPO Proposition 3.1: the table behind the paper's five numbers, as reconstructed from them.
EXAMPLE = np.array(
    [  # y1    y2    y3    y4
        [0.50, 0.50, 0.90, 0.20],
        [0.50, 0.50, 0.56, 0.56],
        [0.10, 0.44, 0.50, 0.50],
        [0.80, 0.44, 0.50, 0.50],
    ]
)
CIRCLE = np.array([[0.5, 0.8, 0.2], [0.2, 0.5, 0.8], [0.8, 0.2, 0.5]])  # rock, paper, scissors
EVEN, UNEVEN = np.array([0, 0, 0.5, 0.5]), np.array([0, 0, 0.9, 0.1])


def bradley_terry(utility):
    """(K,) utilities -> (K, K): the separable case, one number per answer explains it all."""
    utility = np.asarray(utility, dtype=float)
    return 1 / (1 + np.exp(utility[None, :] - utility[:, None]))


def random_world(rng, size=3):
    """A coarse random table, so that ties occur, and a reference that can say every answer."""
    prefer = np.full((size, size), 0.5)
    for a, b in itertools.combinations(range(size), 2):
        prefer[a, b] = rng.randint(1, 9) / 10
        prefer[b, a] = (
            10 - round(10 * prefer[a, b])
        ) / 10  # the very float that randint would give
    weights = np.array([rng.randint(1, 9) for _ in range(size)], dtype=float)
    return prefer, weights / weights.sum()


def blind(prefer, ref, psi):
    """(K,) E_{b ~ ref} psi(P(y_a > y_b)) of always answering y_a without seeing y_b."""
    return psi(prefer) @ ref


def value(policy, prefer, ref, psi):
    """E_{b ~ ref, a ~ policy[b]} psi(P(y_a > y_b)); policy (K, K), a row per answer shown."""
    return np.einsum("b,ba,ab->", ref, policy, psi(prefer))


def one_hot(replies):
    return np.eye(len(replies))[list(replies)]


# ----------------------------------------------------------------------------- Proposition 3.1


def test_proposition_3_1_the_best_unconditioned_policy_depends_on_psi():
    """y1 beats y3 and y4 with 0.9 and 0.2, y2 beats both with 0.56; pi_ref says each half the time.

    Psi = identity: (0.9 + 0.2) / 2 = 0.55 < 0.56, so y2 is best.
    Psi = logit: (2.197 - 1.386) / 2 = 0.41 > 0.24 = logit 0.56, so y1 is best.
    """
    by_identity, by_logit = (blind(EXAMPLE, EVEN, PSI[name]) for name in ("identity", "logit"))
    assert by_identity[:2].round(2).tolist() == [0.55, 0.56] and by_identity.argmax() == 1
    assert by_logit[:2].round(2).tolist() == [0.41, 0.24] and by_logit.argmax() == 0


def test_proposition_3_1_the_best_unconditioned_policy_depends_on_the_reference():
    """The same table, Psi = identity; pi_ref says y3 in nine of ten cases instead of five.

    0.9 * 0.9 + 0.1 * 0.2 = 0.83 > 0.56: y1 is best now, and y2 was above.
    """
    values = blind(EXAMPLE, UNEVEN, PSI["identity"])
    assert values[:2].round(2).tolist() == [0.83, 0.56] and values.argmax() == 0


# ----------------------------------------------------------------------------- Theorem 3.2


def test_theorem_3_2_on_that_table():
    """Shown y3, answer y1 (0.9); shown y4, answer y2 (0.56)? No: y1 0.2, y2 0.56, y4 0.5, so yes.

    The same replies are best in all three settings above, and each time they are worth more than
    the best single answer: (0.9 + 0.56) / 2 = 0.73 > 0.56; 1.22 > 0.41; 0.81 + 0.056 > 0.83.
    """
    settings = [("identity", EVEN, 0.73), ("logit", EVEN, 1.22), ("identity", UNEVEN, 0.866)]
    for name, ref, worth in settings:
        psi = PSI[name]
        assert psi(EXAMPLE).argmax(0)[2:].tolist() == [0, 1]
        best = value(one_hot(EXAMPLE.argmax(0)), EXAMPLE, ref, psi)
        assert best == pytest.approx(worth, abs=5e-3) and best > blind(EXAMPLE, ref, psi).max()


def test_theorem_3_2_pi_star_depends_neither_on_psi_nor_on_the_reference(for_all):
    """The objective is linear in pi(. | x, y_b), so some deterministic policy is optimal. All K^K
    of them are tried: the set of optimal ones is the same for every increasing Psi and every
    pi_ref that can say every answer, because each context's reply can be chosen on its own."""

    def check(rng):
        prefer, ref = random_world(rng)
        replies = list(itertools.product(range(3), repeat=3))
        found = []
        for psi, reference in itertools.product(PSI.values(), (ref, np.full(3, 1 / 3))):
            values = np.array([value(one_hot(r), prefer, reference, psi) for r in replies])
            found.append(np.flatnonzero(values > values.max() - 1e-9).tolist())
        assert all(optimal == found[0] for optimal in found)

    for_all(check)


def test_theorem_3_2_pi_star_is_never_worse_than_the_best_unconditioned_policy(for_all):
    """max inside the mean is at least max outside; equal if and only if one answer is a best reply
    to every answer."""

    def check(rng):
        prefer, ref = random_world(rng, size=4)
        universal = (prefer == prefer.max(0)).all(1).any()
        for psi in PSI.values():
            gain = (
                value(one_hot(prefer.argmax(0)), prefer, ref, psi) - blind(prefer, ref, psi).max()
            )
            assert gain > -1e-12 and (gain < 1e-9) == universal

    for_all(check)


def test_theorem_3_2_is_an_equality_in_the_separable_case(for_all):
    """P = sigmoid(u_a - u_b): the answer of highest u is the best reply to all, whatever is shown."""

    def check(rng):
        prefer = bradley_terry([rng.uniform(-2, 2) for _ in range(4)])
        _, ref = random_world(rng, size=4)
        for psi in PSI.values():
            best = value(one_hot(prefer.argmax(0)), prefer, ref, psi)
            assert best == pytest.approx(blind(prefer, ref, psi).max())

    for_all(check)


# ----------------------------------------------------------------------------- Theorem 4.1, Eq. 7


def gibbs(reward, ref, beta):
    """pi(a | b) = ref(a) exp(reward[a, b] / beta) / Z(b), as (K, K) rows b, and Z (K,)."""
    weight = ref * np.exp(reward.T / beta)  # (K shown, K given)
    return weight / weight.sum(1, keepdims=True), weight.sum(1)


def kl(p, q):
    return (p * np.log(p / q)).sum(-1)


def test_theorem_4_1_the_gibbs_policy_solves_eq_7(for_all):
    """Eq. 7 for one context: J(pi) = E_pi[r] - beta KL(pi, ref), and r = beta log(gibbs Z / ref), so

        J(pi) = beta log Z - beta KL(pi, gibbs)

    for every pi: the maximum is beta log Z, at gibbs alone. Its E[r] misses the maximum of
    Theorem 3.2 by at most beta log(1 / min ref), the price of the KL to a deterministic reply.
    """

    def check(rng):
        prefer, ref = random_world(rng)
        reward, beta = PSI[rng.choice(list(PSI))](prefer), rng.uniform(0.05, 2)
        best, z = gibbs(reward, ref, beta)
        pi = np.array([[rng.uniform(0.01, 1) for _ in range(3)] for _ in range(3)])
        pi /= pi.sum(1, keepdims=True)
        objective = (pi * reward.T).sum(1) - beta * kl(pi, ref)
        np.testing.assert_allclose(objective, beta * np.log(z) - beta * kl(pi, best), atol=1e-9)
        short = reward.max(0) - (best * reward.T).sum(1)
        assert (short <= beta * np.log(1 / ref.min()) + 1e-9).all()

    for_all(check)


# ----------------------------------------------------------------------------- Theorem 4.1, Eq. 9


def population(name, table, ref, prefer, beta=1.0):
    """`--loss NAME` on infinitely many pairs: (mean loss, (K(K-1),) margins of the pairs).

    table: (K + 1, K) logits of the policy, contexts in rows. Every pair of different answers is
    equally often compared, and a wins with prefer[a, b]; the losses are the project's own.
    """
    logps, prefer = table.log_softmax(-1), torch.as_tensor(prefer)
    a, b = (torch.tensor(side) for side in pairs(len(prefer)))
    index, chosen_recipe = {"chosen": a, "rejected": b}, recipe(name, beta=beta)
    rows = index | {None: torch.full_like(a, len(prefer))}
    sums = {p: logps[rows[p.context], index[p.target]] for p in chosen_recipe.paths}
    log_ref = torch.as_tensor(ref).log()
    reference = {p: log_ref[index[p.target]] for p in chosen_recipe.reference_paths}
    out = chosen_recipe(sums, {p: torch.ones_like(s) for p, s in sums.items()}, reference)
    margins = out.rewards["chosen"] - out.rewards["rejected"]
    return (prefer[a, b] * out.losses).sum() / prefer[a, b].sum(), margins


def pairs(size):
    """Every ordered pair of different answers, as two index lists."""
    return zip(*itertools.permutations(range(size), 2), strict=True)


def target(prefer):
    """(K(K-1),) the preference probabilities in the order of the margins."""
    return torch.as_tensor(prefer)[tuple(torch.tensor(side) for side in pairs(len(prefer)))]


def floor(prefer):
    """The least loss of any margins: the mean entropy of a comparison."""
    p = target(prefer)
    return -(p * p.log()).mean() - ((1 - p) * (1 - p).log()).mean()


def descend(name, ref, prefer, beta=1.0, start=None, steps=1500, rate=3.0):
    """Plain gradient descent on the policy's table, from pi_ref in every context."""
    size = len(prefer)
    table = torch.as_tensor(ref).log().repeat(size + 1, 1) if start is None else start.clone()
    for _ in range(steps):
        table.requires_grad_()
        loss, _ = population(name, table, ref, prefer, beta)
        (grad,) = torch.autograd.grad(loss, table)
        table = (table - rate * grad).detach()
    return table


def as_table(policy):
    """(K, K) probabilities, rows b -> logits, with a uniform row for the prompt alone."""
    return torch.tensor(np.vstack([policy, np.full(len(policy), 1 / len(policy))])).log()


TABLES = {"separable": bradley_terry([0.0, 0.7, 1.5]), "intransitive": CIRCLE}
REF = np.array([0.5, 0.3, 0.2])


@pytest.mark.parametrize("kind", TABLES)
def test_theorem_4_1_minimising_eq_9_reproduces_the_preference_probabilities(kind):
    """E[-log sigmoid(m)] = -P log sigmoid(m) - (1 - P) log sigmoid(-m) for the margin m of a pair,
    m = beta log(pi(a|b) / ref(a)) - beta log(pi(b|a) / ref(b)), is least where sigmoid(m) = P.
    A conditioned table can reach any margins, so also those of rock, paper, scissors."""
    table = descend("ins_dpo", REF, TABLES[kind])
    loss, margins = population("ins_dpo", table, REF, TABLES[kind])
    torch.testing.assert_close(margins.sigmoid(), target(TABLES[kind]), atol=1e-5, rtol=0)
    assert loss == pytest.approx(floor(TABLES[kind]).item(), abs=1e-9)


def test_eq_9_leaves_half_of_the_policy_open():
    """Unknowns: K rows of K - 1 free probabilities, K(K-1). Equations: one margin per unordered
    pair, K(K-1)/2. The Jacobian of the margins has that rank, so as many directions stay free."""
    for size in (2, 3, 4, 5):
        table = torch.randn(size, size, generator=torch.manual_seed(size), dtype=torch.float64)
        a, b = (torch.tensor(side) for side in pairs(size))

        def log_policy(table):
            return table.log_softmax(-1).flatten()

        def margins(table, a=a, b=b):
            return table.log_softmax(-1)[b, a] - table.log_softmax(-1)[a, b]

        unknowns, equations = (
            torch.linalg.matrix_rank(torch.autograd.functional.jacobian(f, table).flatten(1))
            for f in (log_policy, margins)
        )
        assert (unknowns, equations) == (size * (size - 1), size * (size - 1) // 2)


def test_eq_9_cannot_tell_pi_star_from_a_policy_that_repeats_what_it_is_shown():
    """Rock, paper, scissors, pi_ref uniform, beta = 0.1, odds o = 4^(1/beta). Let pi answer b with
    what beats it with probability s, with what it beats with s / o, and repeat b otherwise: then
    pi(a|b) / pi(b|a) = o where a beats b, so sigmoid(m) = P whatever s is, for s below o / (o + 1).

    s = 0.999 is all but pi* and wins 80%; s = 0.001 repeats b and wins 50%: same loss, the least.
    """
    beta, uniform = 0.1, np.full(3, 1 / 3)
    win_rates = []
    for s in (0.999, 0.001):
        beats, beaten = s * (CIRCLE.T > 0.5), s * 4 ** (-1 / beta) * (CIRCLE.T < 0.5)
        policy = beats + beaten + np.diag(1 - (beats + beaten).sum(1))
        loss, margins = population("ins_dpo", as_table(policy), uniform, CIRCLE, beta)
        torch.testing.assert_close(margins.sigmoid(), target(CIRCLE))
        assert loss == pytest.approx(floor(CIRCLE).item(), abs=1e-12)
        win_rates.append(value(policy, CIRCLE, uniform, PSI["identity"]))
    assert win_rates == pytest.approx([0.8, 0.5], abs=1e-3)


def test_eq_9_does_not_mention_the_deployed_policy():
    """No term of Eq. 9 is pi(. | x): in a table its row stays where it was, and what a language
    model's prompt-only answers gain, they gain through shared weights. `averaged` does move it."""
    for name, moves in (("ins_dpo", False), ("ifsr_dpo", False), ("dpo", True)):
        table = descend(name, REF, TABLES["separable"], steps=5).softmax(-1)
        assert (not torch.allclose(table[PROMPT], torch.tensor(REF))) == moves


def test_the_gibbs_solution_of_eq_7_minimises_eq_9_where_z_does_not_depend_on_the_context():
    """The margin of the Gibbs policy is r(a|b) - r(b|a) + beta log Z(a) - beta log Z(b): unlike
    DPO's, the two normalisers belong to different contexts and stay.

    Separable, r = logit P = u_a - u_b: Z(b) is proportional to exp(-u_b / beta), half of
    r(a|b) - r(b|a) = 2 (u_a - u_b) goes, and the margin is logit P: a minimiser. In general not:
    EXAMPLE's margins for r = logit P / 2, whose differences are logit P, miss by what Z says.
    """
    a, b = (list(side) for side in pairs(4))
    separable = bradley_terry([0.0, 0.7, 1.5, -0.4])
    for prefer, scale, exact in ((separable, 1, True), (EXAMPLE, 0.5, False)):
        ref, reward = np.array([0.1, 0.2, 0.3, 0.4]), scale * logit(prefer)
        policy, z = gibbs(reward, ref, beta=0.5)
        _, margins = population("ins_dpo", as_table(policy), ref, prefer, beta=0.5)
        expected = reward[a, b] - reward[b, a] + 0.5 * np.log(z[a] / z[b])
        np.testing.assert_allclose(margins.numpy(), expected, atol=1e-12)
        assert np.allclose(margins.numpy(), logit(prefer)[a, b], atol=0.05) == exact


# ----------------------------------------------------------------------------- plain DPO


def test_plain_dpo_has_one_optimum_and_the_reference_is_in_it():
    """On a separable table DPO's minimiser is the KL-regularised optimum ref(a) exp(u_a / beta) / Z
    (Rafailov et al., Eq. 4): K - 1 unknowns, so any start leads to it, and another pi_ref elsewhere.
    """
    utility, beta = torch.tensor([0.0, 0.7, 1.5], dtype=torch.float64), 2.0
    start = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64).repeat(4, 1)
    optima = []
    for ref in (REF, REF[::-1].copy()):
        optimum = (torch.tensor(ref).log() + utility / beta).softmax(-1)
        for begin in (None, start):
            table = descend("dpo", ref, TABLES["separable"], beta, begin)
            torch.testing.assert_close(table[PROMPT].softmax(-1), optimum, atol=1e-5, rtol=0)
        optima.append(optimum)
    assert (optima[0] - optima[1]).abs().max() > 0.1


def test_plain_dpo_learns_nothing_from_rock_paper_scissors():
    """Margins u_a - u_b sum to 0 around the circle and logit P to 3 ln 4; the best fit is 0 each:
    the policy is pi_ref, the loss ln 2. Eq. 9 gets down to the entropy of 0.8 (tested above)."""
    table = descend("dpo", REF, CIRCLE, start=torch.randn(4, 3, dtype=torch.float64))
    loss, margins = population("dpo", table, REF, CIRCLE)
    assert margins.abs().max() < 1e-5 and loss == pytest.approx(math.log(2), abs=1e-9)
    torch.testing.assert_close(table[PROMPT].softmax(-1), torch.tensor(REF), atol=1e-5, rtol=0)
    assert floor(CIRCLE) < math.log(2) - 0.1


# ----------------------------------------------------------------------------- IFSR Eq. 4 and 5


def dialogue_terms(model, template, question, first, second, instruction):
    """log pi(first | x), log pi(i | x, first) and log pi(first, i, second | x), of one dialogue that
    the template renders in one piece; the end tokens count with the answers before them."""
    turns = [("user", question), ("assistant", first), ("user", instruction), ("assistant", second)]
    messages = [{"role": role, "content": content} for role, content in turns]
    whole = template.render(messages)
    prompt = template.render(messages[:1], generation=True)
    texts = [prompt, prompt + first + template.end, template.render(messages[:3], generation=True)]
    ids = template.encode([*texts, whole[: whole.rindex(template.end) + len(template.end)]])
    assert all((ids[-1][: len(part)] == part).all() for part in ids)
    tokens = torch.tensor(ids[-1]).long()
    logps = model.logits(tokens[None, :-1])[0].double().log_softmax(-1)
    logps = logps.gather(-1, tokens[1:, None]).squeeze(-1)  # entry k belongs to token k + 1
    x, y, i, end = (len(part) - 1 for part in ids)
    return torch.stack([logps[x:y].sum(), logps[y:i].sum(), logps[x:end].sum()])


@pytest.mark.parametrize(
    "model_dir", ["tiny_model_dir", pytest.param("smollm2", marks=pytest.mark.slow)]
)
def test_ifsr_eq_4_equals_eq_5(model_dir, request):
    """log pi(y_w | x, y_l, i) = log pi(y_l, i, y_w | x) - log pi(y_l | x) - log pi(i | x, y_l), the
    chain rule along the dialogue. So Eq. 4's margin is that of the whole dialogues, plus plain
    DPO's margin log pi(y_w | x) - log pi(y_l | x), plus log pi(i | x, y_w) - log pi(i | x, y_l),
    each against pi_ref. Eq. 4 comes from the packed trie and `--loss ifsr_dpo`, the rewriting from
    the plain causal model on dialogues as the checkpoint's template writes them."""
    directory = request.getfixturevalue(model_dir)
    template, model, stage = Template(directory), load(directory), recipe("ifsr_dpo")
    question, chosen, rejected = "What colour is snow?", "Snow is white.", "Who knows, ask a cat!"
    pair = Pair([{"role": "user", "content": question}], chosen, rejected, "here")
    data = Dataset([pair], template, stage, Limits(1024, 0.4), "better")
    row = build_row([data.trie(0, stage.paths)], [0], len(stage.paths))

    def measure():
        sums = dict(zip(stage.paths, row.sums(model(row).double()).T, strict=True))
        dialogue = (model, template, question)
        w_first = dialogue_terms(*dialogue, chosen, rejected, data.instruction)
        l_first = dialogue_terms(*dialogue, rejected, chosen, data.instruction)
        return sums, w_first, l_first

    ref_sums, ref_w, ref_l = measure()
    torch.manual_seed(0)
    for parameter in model.parameters():  # a policy that has moved away from pi_ref
        parameter += 0.05 * parameter.std() * torch.randn_like(parameter)
    sums, w_first, l_first = measure()
    counts = dict(zip(stage.paths, row.counts().T, strict=True))
    out = stage(sums, counts, ref_sums)
    plain, instruction, joint = (w_first - ref_w) - (l_first - ref_l)
    margin = 0.1 * (-joint + plain + instruction)
    assert abs(margin) > 1e-3 and Path("rejected", "chosen") in sums
    torch.testing.assert_close(out.losses[0], -logsigmoid(margin), atol=1e-4, rtol=0)
