"""Every objective that TRL has too gives the value of TRL's own loss code.

The trainers' loss computations are fed with log-probabilities, through a stand-in for the model.
Where TRL's convention differs from the papers', the test states the difference and converts it.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import losses
from losses import Path, recipe

N_PROMPT, N_PAIRS = 2, 6
ANSWERS = ("chosen", "rejected")
ALONE = [[i] for i in range(N_PAIRS)]  # steps of one pair
STEPS = [*ALONE, list(range(N_PAIRS))]  # and of all


def draw_batch(seed=0):
    """(policy, reference): {answer: one (n_i,) tensor of token log-probabilities per pair}."""
    g = torch.Generator().manual_seed(seed)
    policy, reference = {}, {}
    for answer in (*ANSWERS, "mismatched"):
        lengths = torch.randint(1, 12, (N_PAIRS,), generator=g).tolist()
        reference[answer] = [-0.6 - 3 * torch.rand(n, generator=g) for n in lengths]
        policy[answer] = [x - 0.5 + torch.rand(len(x), generator=g) for x in reference[answer]]
    return policy, reference


POLICY, REFERENCE = draw_batch()


def sums(rows, pairs):
    return torch.stack([rows[i].sum() for i in pairs])


def means(rows, pairs):
    return torch.stack([rows[i].mean() for i in pairs])


def ours(name, pairs, kl=None, **hyper):
    """Our loss of a step of these pairs."""
    values = [
        {Path(None, a): sums(side[a], pairs) for a in ANSWERS} for side in (POLICY, REFERENCE)
    ]
    counts = {Path(None, a): torch.tensor([len(POLICY[a][i]) for i in pairs]) for a in ANSWERS}
    out = recipe(name, **hyper)(values[0], counts, values[1], kl)
    return out.losses.sum() / out.units.sum()


def agree(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------- TRL, without set-up


class Logps:
    """A model for TRL: what stands where the token ids should be are the log-probabilities."""

    training, is_gradient_checkpointing = True, False

    def __call__(self, input_ids, **_):
        logps = input_ids[:, 1:]
        rest = torch.zeros_like(logps)
        return SimpleNamespace(log_probs=logps, entropy=rest, mean_logits=rest, is_top1=rest > 1)


def trainer(cls, **attributes):
    """A TRL trainer without its set-up: only what its loss computation reads."""
    self = object.__new__(cls)
    gather = lambda x: x  # noqa: E731
    self.accelerator = SimpleNamespace(device="cpu", gather=gather, gather_for_metrics=gather)
    self._metrics = {"train": defaultdict(list)}
    self.model, self.aux_loss_enabled, self.precompute_ref_logps = Logps(), False, True
    self._tp_size, self._total_train_tokens = 1, 0
    vars(self).update(attributes)
    return self


def padded(rows):
    """Answers behind a prompt: "ids" (B, T) that are log-probabilities, and their mask (B, T)."""
    width = N_PROMPT + max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, N_PROMPT : N_PROMPT + len(row)] = row
        mask[i, N_PROMPT : N_PROMPT + len(row)] = 1
    return {"input_ids": ids, "completion_mask": mask, "attention_mask": mask}


def trl_dpo(pairs, loss_type, beta=0.1, label_smoothing=0.0, ld_alpha=None, reference=None):
    self = trainer(
        pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer,
        beta=beta,
        label_smoothing=label_smoothing,
        loss_types=[loss_type],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
        ld_alpha=ld_alpha,
        use_weighting=False,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        ref_model=reference,
        precompute_ref_logps=reference is None,
    )
    inputs = padded([POLICY[a][i] for a in ANSWERS for i in pairs])
    if reference is None:
        inputs |= {f"ref_{a}_logps": sums(REFERENCE[a], pairs) for a in ANSWERS}
    return self._compute_loss(self.model, inputs, return_outputs=False)


def trl_without_reference(cls, pairs, per_answer, **attributes):
    """The loss of TRL's CPO and ORPO trainers; per_answer: `sums` or `means`."""
    self = trainer(cls, **attributes)
    chosen, rejected = (per_answer(POLICY[a], pairs) for a in ANSWERS)
    nll = -torch.cat([POLICY["chosen"][i] for i in pairs]).mean()
    self.concatenated_forward = lambda model, inputs: (chosen, rejected, chosen, rejected, nll)
    return self.get_batch_loss_metrics(None, {})[0]


def trl_cpo(pairs, per_answer, **attributes):
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    attributes |= {"alpha": 0.0, "label_smoothing": 0.0}
    return trl_without_reference(cpo.CPOTrainer, pairs, per_answer, **attributes)


# ----------------------------------------------------------------------------- the same values


@pytest.mark.parametrize("pairs", STEPS, ids=str)
def test_dpo_and_sft(pairs):
    agree(ours("dpo", pairs, beta=0.3), trl_dpo(pairs, "sigmoid", beta=0.3))
    agree(ours("sft", pairs), trl_dpo(pairs, "sft"))


@pytest.mark.parametrize("pairs", ALONE, ids=str)
def test_dpo_with_label_smoothing(pairs):
    """TRL keeps cDPO's smoothing in `aot`, which is DPO where it has nothing to sort: on a pair."""
    theirs = trl_dpo(pairs, "aot", beta=0.3, label_smoothing=0.1)
    agree(ours("dpo", pairs, beta=0.3, label_smoothing=0.1), theirs)


@pytest.mark.parametrize("pairs", STEPS, ids=str)
def test_ld_dpo(pairs):
    """TRL's ld_alpha is alpha. Its reference is run beside the policy: a stand-in as well."""
    rows = padded([REFERENCE[a][i] for a in ANSWERS for i in pairs])["input_ids"]
    reference = lambda **_: SimpleNamespace(log_probs=rows[:, 1:])  # noqa: E731
    theirs = trl_dpo(pairs, "sigmoid", beta=0.3, ld_alpha=0.4, reference=reference)
    sides = [{a: padded([side[a][i] for i in pairs])["input_ids"][:, N_PROMPT:] for a in ANSWERS}
             for side in (POLICY, REFERENCE)]  # fmt: skip
    tokens = [{Path(None, a): rows for a, rows in side.items()} for side in sides]
    counts = {Path(None, a): torch.tensor([len(POLICY[a][i]) for i in pairs]) for a in ANSWERS}
    out = recipe("ld_dpo", beta=0.3, alpha=0.4)(tokens[0], counts, tokens[1])
    agree(out.losses.mean(), theirs)


@pytest.mark.parametrize("pairs", STEPS, ids=str)
def test_ipo(pairs):
    """TRL divides each log-ratio by the answer's length, Azar et al. and InSPO do not: fed with
    means in the place of sums, ours is theirs. Their beta is tau."""
    per_token = [means(side[a], pairs) for side in (POLICY, REFERENCE) for a in ANSWERS]
    agree(losses.ipo(*per_token, tau=0.2).mean(), trl_dpo(pairs, "ipo", beta=0.2))


@pytest.mark.parametrize("pairs", STEPS, ids=str)
def test_kto(pairs):
    """TRL averages over answers, we over pairs of two answers: ours is twice theirs."""
    self = trainer(
        pytest.importorskip("trl.trainer.kto_trainer").KTOTrainer,
        beta=0.2,
        desirable_weight=1.5,
        undesirable_weight=0.5,
        loss_type="kto",
        calculate_KL=True,
    )
    answers = [(a, i) for a in ANSWERS for i in pairs]
    inputs = padded([POLICY[a][i] for a, i in answers])
    inputs |= {f"KL_{k}": v for k, v in padded([POLICY["mismatched"][i] for i in pairs]).items()}
    inputs["label"] = torch.tensor([a == "chosen" for a, _ in answers])
    inputs["ref_logps"] = torch.stack([REFERENCE[a][i].sum() for a, i in answers])
    inputs["ref_KL_logps"] = sums(REFERENCE["mismatched"], pairs)
    theirs = self._compute_loss(self.model, inputs, return_outputs=False)

    borrowed = Path(None, "mismatched")
    kl = recipe("kto").kl(*({borrowed: sums(x["mismatched"], pairs)} for x in (POLICY, REFERENCE)))
    agree(ours("kto", pairs, kl, beta=0.2, lambda_w=1.5, lambda_l=0.5), 2 * theirs)
    agree(float(kl[0]), self._metrics["train"]["kl"][0])


@pytest.mark.parametrize("pairs", STEPS, ids=str)
def test_simpo(pairs):
    """TRL divides gamma by beta and multiplies by it again: not divided, as here."""
    theirs = trl_cpo(pairs, means, loss_type="simpo", beta=2.5, simpo_gamma=0.7, cpo_alpha=0.0)
    agree(ours("simpo", pairs, beta=2.5, gamma=0.7), theirs)


@pytest.mark.parametrize("pairs", ALONE, ids=str)
def test_cpo(pairs):
    """TRL's likelihood term is a mean over the batch's tokens, ours over pairs of means over
    tokens (InSPO Table 1): the same on one pair. Its cpo_alpha is lam."""
    theirs = trl_cpo(pairs, sums, loss_type="sigmoid", beta=0.2, cpo_alpha=0.3)
    agree(ours("cpo", pairs, beta=0.2, lam=0.3), theirs)


@pytest.mark.parametrize("pairs", ALONE, ids=str)
def test_slic(pairs):
    """TRL's hinge is max(0, 1 - beta gap): SLiC's for delta = 1/beta, divided by delta."""
    theirs = trl_cpo(pairs, sums, loss_type="hinge", beta=0.2, cpo_alpha=0.3)
    agree(ours("slic", pairs, delta=5.0, lam=0.3 * 5) / 5, theirs)


@pytest.mark.parametrize("pairs", ALONE, ids=str)
def test_orpo(pairs):
    """TRL's beta is lam. Its likelihood term runs over prompt and answer, the paper's (and ours)
    over the answer: the stand-in hands TRL the answer's."""
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer
    theirs = trl_without_reference(orpo, pairs, means, beta=0.25)
    agree(ours("orpo", pairs, lam=0.25), theirs)


def test_reward():
    cls = pytest.importorskip("trl.trainer.reward_trainer").RewardTrainer
    self = trainer(cls, args=SimpleNamespace(center_rewards_coefficient=None))
    chosen, rejected = torch.tensor([0.3, -2.0, 5.0]), torch.tensor([0.1, 1.0, 5.0])
    scores = SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None])
    theirs = self.compute_loss(lambda **_: scores, {"attention_mask": torch.ones(6, 1)})
    agree(losses.reward(chosen, rejected).mean(), theirs)
