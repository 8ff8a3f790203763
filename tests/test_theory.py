"""The papers' mathematics as running code; docs/theory.md walks through it in the same order.

A finite world: K answers to one prompt and a preference table, prefer[a, b] = P(y_a > y_b | x) with
prefer + prefer.T = 1. A conditioned policy is a table, row b is pi(. | x, y_b); where a further row
is kept, PROMPT, it is pi(. | x), the policy that is deployed.
Legend: K answers, a the answer given, b the answer shown, ref (K,) the reference pi_ref(. | x).
"""

import itertools

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from data import Dataset, Limits, build_row, lay_out
from hub.template import Template
from losses import recipe
from model import load
from pairs.layouts import Pair

PROMPT, REAL = -1, pytest.param("smollm2", marks=pytest.mark.slow)
PSI = {"identity": lambda p: p, "logit": lambda p: np.log(p / (1 - p)), "exp": np.exp}

# Rows and columns y1 to y4; reconstructed from the five numbers of InSPO Proposition 3.1.
EXAMPLE = np.array([[50, 50, 90, 20], [50, 50, 56, 56], [10, 44, 50, 50], [80, 44, 50, 50]]) / 100
EVEN, UNEVEN = np.array([0, 0, 0.5, 0.5]), np.array([0, 0, 0.9, 0.1])
CIRCLE = np.array([[5, 8, 2], [2, 5, 8], [8, 2, 5]]) / 10  # rock, paper, scissors
REF, AWAY = np.array([0.5, 0.3, 0.2]), np.array([2.0, -1.0, 0.5])  # a pi_ref; logits to start at


def bradley_terry(utility):
    """(K,) utilities -> (K, K): the separable case, one number per answer explains everything."""
    return 1 / (1 + np.exp(np.subtract.outer(utility, utility).T))


SEPARABLE = bradley_terry([0.0, 0.7, 1.5])


def random_world(rng, size=3):
    """A coarse random table, so that ties occur, and a reference that can say every answer."""
    prefer = np.full((size, size), 0.5)
    for a, b in itertools.combinations(range(size), 2):
        tenths = rng.randint(1, 9)
        prefer[a, b], prefer[b, a] = tenths / 10, (10 - tenths) / 10
    weights = np.array([rng.randint(1, 9) for _ in range(size)])
    return prefer, weights / weights.sum()


def blind(prefer, ref, psi):
    """(K,) E_{b ~ ref} psi(P(y_a > y_b)): what it is worth to answer y_a without seeing y_b."""
    return psi(prefer) @ ref


def value(policy, prefer, ref, psi):
    """E_{b ~ ref, a ~ policy[b]} psi(P(y_a > y_b)) of a conditioned policy (K, K)."""
    return np.einsum("b,ba,ab->", ref, policy, psi(prefer))


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=0, atol=tolerance)


def always(replies):
    """The deterministic policy that answers y_b with replies[b]."""
    return np.eye(len(replies))[list(replies)]


# ----------------------------------------------------------------------------- InSPO section 3


def test_proposition_3_1_the_best_unconditioned_policy_depends_on_psi():
    """y1 beats y3 and y4 with 0.9 and 0.2, y2 beats both with 0.56; pi_ref says each half the time.

    Psi = identity: (0.9 + 0.2) / 2 = 0.55 < 0.56, so y2 is best.
    Psi = logit: (2.197 - 1.386) / 2 = 0.41 > 0.24 = logit 0.56, so y1 is best."""
    by_identity, by_logit = (blind(EXAMPLE, EVEN, PSI[name]) for name in ("identity", "logit"))
    assert by_identity[:2].round(2).tolist() == [0.55, 0.56] and by_identity.argmax() == 1
    assert by_logit[:2].round(2).tolist() == [0.41, 0.24] and by_logit.argmax() == 0


def test_proposition_3_1_the_best_unconditioned_policy_depends_on_the_reference():
    """The same table, Psi = identity, but pi_ref says y3 nine times in ten instead of five times:
    0.9 * 0.9 + 0.1 * 0.2 = 0.83 > 0.56, so now y1 is best."""
    values = blind(EXAMPLE, UNEVEN, PSI["identity"])
    assert values[:2].round(2).tolist() == [0.83, 0.56] and values.argmax() == 0


def test_theorem_3_2_on_that_table():
    """Shown y3, y1 is the best reply (0.9); shown y4, it is y2 (0.56): in all three settings above,
    and each time worth more than the best single answer. (0.9 + 0.56) / 2 = 0.73 > 0.56;
    (2.197 + 0.241) / 2 = 1.22 > 0.41; 0.9 * 0.9 + 0.1 * 0.56 = 0.87 > 0.83."""
    settings = [("identity", EVEN, 0.73), ("logit", EVEN, 1.22), ("identity", UNEVEN, 0.87)]
    for name, ref, worth in settings:
        replies = PSI[name](EXAMPLE).argmax(0)
        best = value(always(replies), EXAMPLE, ref, PSI[name])
        assert replies[2:].tolist() == [0, 1] and best.round(2) == worth
        assert best > blind(EXAMPLE, ref, PSI[name]).max()


def test_theorem_3_2_pi_star_depends_neither_on_psi_nor_on_the_reference(for_all):
    """The objective is linear in each pi(. | x, y_b), so some deterministic policy is optimal. All
    K^K of them are tried: the same ones are optimal for every increasing Psi and every pi_ref that
    can say every answer, because the reply to each y_b is chosen on its own."""

    def check(rng):
        (prefer, ref), optimal = random_world(rng), set()
        for psi, reference in itertools.product(PSI.values(), (ref, np.full(3, 1 / 3))):
            every = map(always, itertools.product(range(3), repeat=3))
            values = np.array([value(policy, prefer, reference, psi) for policy in every])
            optimal.add(tuple(np.flatnonzero(values > values.max() - 1e-9)))
        assert len(optimal) == 1

    for_all(check)


def test_theorem_3_2_pi_star_is_never_worse_than_the_best_unconditioned_policy(for_all):
    """A mean of maxima is at least the maximum of means. They are equal if and only if one answer
    is a best reply to every answer; in the separable case the one of highest utility is."""

    def check(rng):
        prefer, ref = random_world(rng, size=4)
        separable = bradley_terry([rng.uniform(-2, 2) for _ in ref])
        for psi, table in itertools.product(PSI.values(), (prefer, separable)):
            best = value(always(table.argmax(0)), table, ref, psi)
            gain = best - blind(table, ref, psi).max()
            universal = np.isclose(table, table.max(0)).all(1).any()
            assert gain > -1e-12 and (gain < 1e-9) == universal
            assert universal or table is prefer

    for_all(check)


def test_theorem_3_2_needs_a_strictly_increasing_psi():
    """A step at P = 1/2 is increasing, too, but not strictly: 0.9 and 0.6 are worth the same, so
    the answer that loses to y1 more often is as optimal as pi*."""
    prefer = np.array([[0.5, 0.7, 0.9], [0.3, 0.5, 0.6], [0.1, 0.4, 0.5]])
    best, other = always(prefer.argmax(0)), always([0, 0, 1])
    step = lambda p: (p > 0.5).astype(float)  # noqa: E731
    for psi, same in ((step, True), *((psi, False) for psi in PSI.values())):
        worth = [value(policy, prefer, REF, psi) for policy in (best, other)]
        assert np.isclose(*worth) == same and worth[0] >= worth[1] - 1e-12


# ----------------------------------------------------------------------------- InSPO section 4


def test_eq_6_holds_only_under_indifference(for_all):
    """q = r - beta log Z antisymmetric (P + P' = 1), and every sum_y ref e^(q/beta) = 1: the mean
    of these sums is sum sum ref ref cosh(q/beta), above 1 unless q = 0 where ref ref' > 0."""

    def check(rng):
        n, beta = rng.randint(2, 5), rng.uniform(0.1, 2)
        _, ref = random_world(rng, n)
        half = [[rng.choice([-1, 1]) * rng.uniform(0.1, 2) for _ in range(n)] for _ in range(n)]
        half = np.triu(half, 1)
        for q in (half - half.T, 0 * half):  # q[a, b]: a is given, b is shown
            sums = ref @ np.exp(q / beta)  # (K,)
            mean = ref @ np.cosh(q / beta) @ ref
            close(sums @ ref, mean, 1e-9 * mean)
            assert (mean > 1 + 1e-9) == q.any() and sums.max() > 1 - 1e-9

    for_all(check)


def gibbs(reward, ref, beta):
    """pi(a | b) = ref(a) exp(reward[a, b] / beta) / Z(b), rows b, and Z (K,)."""
    weight = ref * np.exp(reward.T / beta)  # (K shown, K given)
    return weight / weight.sum(1, keepdims=True), weight.sum(1)


def test_theorem_4_1_the_gibbs_policy_solves_eq_7(for_all):
    """Eq. 7 in one context: J(pi) = E_pi[r] - beta KL(pi, ref). With r = beta log(gibbs Z / ref),
    J(pi) = beta log Z - beta KL(pi, gibbs) for every pi: the maximum is at gibbs alone. Its E[r]
    misses Theorem 3.2's maximum by at most beta log(1 / min ref), the KL that a deterministic reply
    costs, so beta -> 0 leads to pi*. At beta > 0 the optimum does depend on pi_ref again."""

    def check(rng):
        prefer, ref = random_world(rng)
        reward, beta = PSI[rng.choice(list(PSI))](prefer), rng.uniform(0.05, 2)
        best, z = gibbs(reward, ref, beta)
        pi = np.array([[rng.uniform(0.01, 1) for _ in range(3)] for _ in range(3)])
        pi /= pi.sum(1, keepdims=True)
        objective = (pi * (reward.T - beta * np.log(pi / ref))).sum(1)
        close(objective, beta * (np.log(z) - (pi * np.log(pi / best)).sum(1)), 1e-9)
        missed = reward.max(0) - (best * reward.T).sum(1)
        assert (missed <= beta * np.log(1 / ref.min()) + 1e-9).all()
        assert (ref == ref[0]).all() or (best != gibbs(reward, np.roll(ref, 1), beta)[0]).any()

    for_all(check)


def pairs(size):
    """Every ordered pair (a, b) of different answers, as two index tensors (K(K-1),)."""
    return torch.tensor(list(itertools.permutations(range(size), 2))).T


def population(name, table, ref, prefer, beta=1.0):
    """Infinitely many pairs: (mean loss, (K(K-1),) margins of the ordered pairs). name: "LOSS" or
    "LOSS CONDITION"; table: (K + 1, K) the policy's logits, contexts in rows, PROMPT last. Pairs
    are equally frequent, a wins with prefer[a, b], and the losses are the project's own. Shown an
    answer, the reference says something else than ref: Eq. 9 must not use that."""
    a, b = pairs(len(prefer))
    logps, weight = table.log_softmax(-1), torch.as_tensor(prefer)[a, b]
    run, index = recipe(*name.split(), beta=beta), {"chosen": a, "rejected": b}
    row = index | {None: torch.full_like(a, PROMPT)}
    sums = {path: logps[row[path.context], index[path.target]] for path in run.paths}
    shown = ref * np.arange(1, len(ref) + 1)
    log_ref = torch.tensor(np.log([shown / shown.sum()] * len(ref) + [ref]))  # (K + 1, K)
    reference = {p: log_ref[row[p.context], index[p.target]] for p in run.reference_paths}
    out = run(sums, {path: torch.ones_like(a) for path in sums}, reference)
    margins = out.rewards["chosen"] - out.rewards["rejected"]
    return (weight * out.losses).sum() / weight.sum(), margins


def target(prefer):
    """(P of each ordered pair, the least population loss of any margins)."""
    p = torch.as_tensor(prefer)[*pairs(len(prefer))]
    return p, -2 * (p * p.log()).mean().item()  # over both orders: the entropy of a comparison


def descend(name, ref, prefer, beta=1.0, start=None, steps=300):
    """Plain gradient descent on the policy's logits, all rows from pi_ref if not from start."""
    table = torch.tensor(np.tile(np.log(ref) if start is None else start, (len(ref) + 1, 1)))
    for _ in range(steps):
        loss, _ = population(name, table.requires_grad_(), ref, prefer, beta)
        table = (table - 3 / beta**2 * torch.autograd.grad(loss, table)[0]).detach()
    return table


def as_table(policy):
    """(K, K) probabilities, rows b -> (K + 1, K) logits; the PROMPT row is uniform."""
    return torch.tensor(np.vstack([policy, np.ones(len(policy))])).log()


def test_theorem_4_1_minimising_eq_9_reproduces_the_preference_probabilities():
    """A pair costs -P log sigmoid(m) - (1 - P) log sigmoid(-m) on average, least at sigmoid(m) = P;
    m = beta log(pi(a|b) / ref(a)) - beta log(pi(b|a) / ref(b)). The contexts differ, so the margins
    need not come from one utility, and descent reaches even those of rock, paper, scissors. Where
    it starts decides which of the minimisers it finds."""
    for prefer in (SEPARABLE, CIRCLE):
        tables = [descend("ins_dpo", REF, prefer, start=start) for start in (None, AWAY)]
        for table in tables:
            loss, margins = population("ins_dpo", table, REF, prefer)
            probabilities, least = target(prefer)
            close(margins.sigmoid(), probabilities)
            close(loss, least, 1e-9)
        assert abs(tables[0].softmax(-1) - tables[1].softmax(-1)).max() > 0.1


def test_eq_9_has_half_as_many_equations_as_unknowns():
    """K rows of K - 1 free probabilities, and one margin per unordered pair: the Jacobian of the
    margins has rank K(K-1)/2 on a space of K(K-1) dimensions, and as many directions stay free."""
    for size in (2, 3, 4, 5):
        a, b = pairs(size)
        table = torch.randn(size, size, generator=torch.manual_seed(size), dtype=torch.float64)
        policy = torch.autograd.functional.jacobian(lambda t: t.log_softmax(-1), table)  # (K,K,K,K)
        margins = policy[b, a] - policy[a, b]  # (K(K-1), K, K)
        assert torch.linalg.matrix_rank(policy.reshape(size**2, -1)) == size * (size - 1)
        assert torch.linalg.matrix_rank(margins.flatten(1)) == size * (size - 1) // 2


def test_eq_9_cannot_tell_pi_star_from_a_policy_that_repeats_what_it_is_shown():
    """Rock, paper, scissors, pi_ref uniform, beta = 0.1, odds o = 4^(1/beta). Let pi answer b with
    what beats it with probability s, with what it beats with s / o, and else repeat b. Where a
    beats b, pi(a|b) / pi(b|a) = o, so sigmoid(m) = P for every s up to o / (o + 1).
    s = 0.999 is all but pi* and wins 80%; s = 0.001 repeats b and wins 50%: the same loss."""
    uniform, (probabilities, least) = np.full(3, 1 / 3), target(CIRCLE)
    for s, win_rate in ((0.999, 0.8), (0.001, 0.5)):
        policy = s * (CIRCLE.T > 0.5) + s * 4**-10 * (CIRCLE.T < 0.5)
        policy += np.diag(1 - policy.sum(1))
        loss, margins = population("ins_dpo", as_table(policy), uniform, CIRCLE, beta=0.1)
        close(margins.sigmoid(), probabilities, 1e-12)
        close(loss, least, 1e-12)
        close(value(policy, CIRCLE, uniform, PSI["identity"]), win_rate, 1e-3)
    found = descend("ins_dpo", uniform, CIRCLE, beta=0.1)[:PROMPT].softmax(-1).numpy()
    close(value(found, CIRCLE, uniform, PSI["identity"]), 0.8, 1e-3)  # thanks to its start, pi_ref


def test_eq_9_does_not_mention_the_deployed_policy():
    """No term of Eq. 9 is pi(. | x): in a table its row stays at pi_ref. What a language model's
    prompt-only answers gain, they gain through shared weights; `averaged` trains them too."""
    for name in ("ins_dpo", "ifsr_dpo", "dpo", "ins_dpo averaged"):
        deployed = descend(name, REF, SEPARABLE, steps=5)[PROMPT].softmax(-1).numpy()
        assert np.allclose(deployed, REF) == (name in ("ins_dpo", "ifsr_dpo"))


def test_the_gibbs_policy_of_eq_7_need_not_minimise_eq_9():
    """Its margin is r(a|b) - r(b|a) + beta log Z(a) - beta log Z(b): unlike in DPO the normalisers
    belong to two contexts and do not cancel. They vanish by symmetry (CIRCLE, r = logit P / 2), or
    undo the double count of r (separable, r = logit P: Z(b) ~ exp(-u_b / beta)). In EXAMPLE with
    r = logit P / 2, where r(a|b) - r(b|a) = logit P as wanted, the margins come out elsewhere."""
    beta = 0.5
    for prefer, scale, exact in ((CIRCLE, 0.5, True), (SEPARABLE, 1, True), (EXAMPLE, 0.5, False)):
        a, b = pairs(len(prefer)).numpy()
        ref, reward = np.full(len(prefer), 1 / len(prefer)), scale * PSI["logit"](prefer)
        policy, z = gibbs(reward, ref, beta)
        margins = population("ins_dpo", as_table(policy), ref, prefer, beta)[1].numpy()
        close(margins, reward[a, b] - reward[b, a] + beta * np.log(z[a] / z[b]), 1e-9)
        assert (abs(margins - PSI["logit"](prefer)[a, b]).max() < 1e-9) == exact
    assert (a[4], b[4]) == (1, 2) and margins[4] < 0 < PSI["logit"](EXAMPLE)[1, 2]  # wrong side


# ----------------------------------------------------------------------------- plain DPO


def test_plain_dpo_has_one_optimum_and_pi_ref_is_in_it():
    """Where utilities u explain the table, DPO's minimiser is the KL-regularised optimum
    ref(a) exp(u_a / beta) / Z (Rafailov et al. 2023, Eq. 4). K - 1 unknowns: every start leads
    there, and another pi_ref leads elsewhere."""
    beta, optima = 2.0, []
    for ref in (REF, REF[::-1].copy()):
        optima.append(gibbs(np.array([[0.0], [0.7], [1.5]]), ref, beta)[0][0])
        for start in (None, AWAY):
            table = descend("dpo", ref, SEPARABLE, beta, start)
            close(table[PROMPT].softmax(-1), optima[-1])
    assert abs(optima[0] - optima[1]).max() > 0.1


def test_plain_dpo_learns_nothing_from_rock_paper_scissors():
    """Its margins sum to 0 around the circle, logit P to 3 ln 4, so the best fit is 0 each: the
    policy is pi_ref and the loss ln 2, where Eq. 9 reaches the entropy of 0.8."""
    table = descend("dpo", REF, CIRCLE, start=AWAY)
    loss, _ = population("dpo", table, REF, CIRCLE)
    close(table[PROMPT].softmax(-1), REF)
    close(loss, np.log(2), 1e-9)
    assert target(CIRCLE)[1] < np.log(2) - 0.1


# ----------------------------------------------------------------------------- IFSR Eq. 4 and 5


def dialogue_terms(model, template, *texts):
    """log pi(first | x), log pi(i | x, first), log pi(first, i, second | x) of x, first, i, second,
    a dialogue that the template renders in one piece; end tokens count with their answers."""
    turns = zip(("user", "assistant") * 2, texts, strict=True)
    messages = [{"role": role, "content": text} for role, text in turns]
    x, opened = (template.render(messages[:n], generation=True) for n in (1, 3))
    whole = template.render(messages).rpartition(template.end)[0] + template.end
    ids = template.encode([x, x + texts[1] + template.end, opened, whole])
    assert all((ids[-1][: len(part)] == part).all() for part in ids)
    tokens = torch.tensor(ids[-1]).long()
    logps = model.logits(tokens[None, :-1])[0].double().log_softmax(-1)
    logps = logps.gather(-1, tokens[1:, None]).squeeze(-1)  # entry k is of token k + 1
    i, j, k, end = (len(part) - 1 for part in ids)
    return torch.stack([logps[i:j].sum(), logps[j:k].sum(), logps[i:end].sum()])


@pytest.mark.parametrize("name", ["tiny_model_dir", REAL])
def test_ifsr_eq_4_equals_eq_5(name, request):
    """log pi(y_w | x, y_l, i) = log pi(y_l, i, y_w | x) - log pi(y_l | x) - log pi(i | x, y_l), the
    chain rule along the dialogue. Eq. 4's margin is therefore that of the two dialogues, plus plain
    DPO's log pi(y_w | x) - log pi(y_l | x), plus log pi(i | x, y_w) - log pi(i | x, y_l), each
    against pi_ref. Left: the packed trie and `--loss ifsr_dpo`. Right: the plain causal model on
    whole dialogues as the checkpoint's own template writes them."""
    directory = request.getfixturevalue(name)
    template, model, run = Template(directory), load(directory), recipe("ifsr_dpo", beta=0.1)
    x, y_w, y_l = "What colour is snow?", "Snow is white.", "Who knows, ask a cat!"
    pair = Pair([{"role": "user", "content": x}], y_w, y_l, "here")
    data = Dataset([pair], template, run, Limits(1024, 0.4), "better")
    row = build_row([data.trie(0, run.paths)], [0], len(run.paths))

    def measure():
        sums = dict(zip(run.paths, row.sums(model(row)).double().T, strict=True))
        w_first = dialogue_terms(model, template, x, y_w, data.instruction, y_l)
        l_first = dialogue_terms(model, template, x, y_l, data.instruction, y_w)
        return sums, w_first - l_first

    reference, ref_terms = measure()
    torch.manual_seed(0)
    for parameter in model.parameters():  # a policy that has moved away from pi_ref
        parameter += 0.05 * parameter.abs().mean() * torch.randn_like(parameter)
    sums, terms = measure()
    out = run(sums, {path: torch.ones(1) for path in sums}, reference)
    plain, instruction, dialogues = terms - ref_terms
    margin = 0.1 * (plain + instruction - dialogues)  # dialogues: w first minus l first
    assert abs(margin) > 1e-3
    close(out.losses, -logsigmoid(margin).reshape(1), 1e-5)


def test_the_skewness_of_weights_is_bounded_by_their_variance(for_all):
    """(w - mean)^3 <= (w - mean)^2 for weights in [0, 1], so the skewness is at most 1 / sigma: for
    the variance that IFSR's section 5 prints, 5.02e-3, at most 14.1, where it prints 62.14."""

    def check(rng):
        weights = np.array([rng.random() ** rng.choice([1, 9, 99]) for _ in range(50)])
        gap = weights - weights.mean()
        # not divided by sigma^3, which may be too small for a float
        assert (gap**3).mean() <= weights.var() * (1 + 1e-12)

    for_all(check)
    assert round(1 / 5.02e-3**0.5, 1) == 14.1 < 62.14


def test_ifsr_eq_5_as_printed_has_no_term_of_the_instruction(tiny_model_dir):
    """With i in front, x i y_l y_w, it is given and never predicted: log pi(y_w | x, i, y_l) =
    log pi(y_l, y_w | x, i) - log pi(y_l | x, i). So the margin is that of the two orders, plus
    plain DPO's with the instruction in the prompt. Left: the packed trie. Right: plain causal."""
    template, model = Template(tiny_model_dir), load(tiny_model_dir)
    run = recipe("dpo", "instruct")
    pair = Pair([{"role": "user", "content": "Which is cold?"}], "Snow is.", "A stove!", "here")
    example = Dataset([pair], template, run, Limits(1024, 0.4), "better").examples[0]
    xi, w, l = example.instruct, example.chosen, example.rejected
    row = build_row([lay_out([([xi, l, w], len(w)), ([xi, w, l], len(l))])], [0], 2)
    behind = row.sums(model(row))[0].double()  # log pi(y_w | x, i, y_l), log pi(y_l | x, i, y_w)

    def terms(first, second):
        """log pi(first, second | x, i), log pi(first | x, i)."""
        ids = torch.tensor([*xi, *first, *second]).long()
        logps = model.logits(ids[None, :-1])[0].double().log_softmax(-1)
        logps = logps.gather(-1, ids[1:, None]).squeeze(-1)[len(xi) - 1 :]
        return logps.sum(), logps[: len(first)].sum()

    (both_l, first_l), (both_w, first_w) = terms(l, w), terms(w, l)
    close(behind[0] - behind[1], (both_l - both_w) + (first_w - first_l), 1e-4)
