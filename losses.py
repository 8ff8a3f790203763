"""The objectives of InSPO and IFSR: pure functions of log-probabilities, and the table of names.

Each objective takes (B,) tensors, one entry per preference pair (x, y_w, y_l), and gives (B,)
losses. Its positional arguments say what it needs, in these names:

    chosen, rejected            S   sum of the answer's token log-probabilities under the policy
    mean_chosen, mean_rejected  A   their mean per token
    ref_chosen, ref_rejected    R   the sum under the reference model
    len_chosen, len_rejected    |y| number of scored tokens
    kl                          z   KTO's reference point, one number for the whole batch and view

and, of T tokens, (B, T) tensors with 0 behind the last token of an answer:

    chosen_tokens, rejected_tokens          log-probability of each token under the policy
    ref_chosen_tokens, ref_rejected_tokens  the same under the reference, cached where it is asked

Its keyword arguments are its hyperparameters, with the papers' defaults; they are also the
command-line flags. No objective can tell log pi(y_w | x) from log pi(y_w | x, y_l): on which
*path* a log-probability was taken is decided by the condition (CONDITIONS below), so that

    InSPO  ins_dpo   = dpo on the cross paths, reference on the prompt alone    (Eq. 14-15, Table 1)
    IFSR   ifsr_dpo  = dpo on the cross paths, reference on the same paths      (Eq. 4)

InSPO's bidirectional variant (appendix C.3) is the same formula as `ins_dpo`: both answers are
already learnt behind each other.

Objectives over whole next-token distributions (the sequential KL divergence of TDPO, Zeng et al.
2024) need what no argument has: the reference's logits. They are too large to be cached, V numbers
a token, so such a fork runs the reference beside the policy in train.Run.backward, and lets the
chunked head of model.py reduce both to one number per scored token.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid

# ----------------------------------------------------------------------------- objectives


def dpo(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1, label_smoothing=0.0):
    """-log sigmoid(beta [(S_w - R_w) - (S_l - R_l)])            (DPO, Rafailov et al. 2023, Eq. 7)

    A larger beta keeps the policy nearer to the reference. With label_smoothing e the labels are
    taken to be wrong with probability e: (1-e) loss + e loss of the swapped pair (cDPO).
    """
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def ipo(chosen, rejected, ref_chosen, ref_rejected, *, tau=0.1):
    """((S_w - R_w) - (S_l - R_l) - 1/(2 tau))^2                   (IPO, Azar et al. 2023, Eq. 17)

    The log-ratio gap is regressed to 1/(2 tau): a larger tau keeps nearer to the reference.
    """
    # no sigmoid: the loss grows again beyond its target, so certain labels do not drive the
    # policy away without end, as they do DPO's
    gap = (chosen - ref_chosen) - (rejected - ref_rejected)
    return (gap - 1 / (2 * tau)) ** 2


def rdpo(
    chosen, rejected, ref_chosen, ref_rejected, len_chosen, len_rejected, *, beta=0.1, alpha=0.1
):
    """-log sigmoid(beta [(S_w - R_w) - (S_l - R_l)] + alpha (|y_w| - |y_l|))
    (R-DPO, Park et al. 2024, Eq. 9, in the sign of InSPO Table 1)

    A pair whose chosen answer is the longer one counts as partly won already, so length is
    rewarded less; a larger alpha pushes harder against length. Lengths are scored tokens, so
    alpha 0.1 means that ten more tokens weigh as much as a margin of 1.
    """
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -logsigmoid(margin + alpha * (len_chosen - len_rejected))


def ld_dpo(chosen_tokens, rejected_tokens, ref_chosen_tokens, ref_rejected_tokens,
           len_chosen, len_rejected, *, beta=0.1, alpha=0.5):  # fmt: skip
    """DPO in which the tokens beyond the length of the pair's other answer count alpha times
    (LD-DPO, Liu et al. 2024, arXiv:2409.06411)

    A longer answer cannot win by its length alone; alpha 1 is DPO, 0 leaves those tokens out.
    """
    shared = torch.minimum(len_chosen, len_rejected)[:, None]  # (B, 1)

    def weighted(tokens, ref_tokens):  # (B, T) each -> (B,)
        place = torch.arange(tokens.shape[1], device=tokens.device)  # (T,)
        return (tokens - ref_tokens).where(place < shared, alpha * (tokens - ref_tokens)).sum(1)

    chosen = weighted(chosen_tokens, ref_chosen_tokens)
    return -logsigmoid(beta * (chosen - weighted(rejected_tokens, ref_rejected_tokens)))


def simpo(mean_chosen, mean_rejected, *, beta=2.0, gamma=1.0):
    """-log sigmoid(beta A_w - beta A_l - gamma)                (SimPO, Meng et al. 2024, Eq. 6)

    gamma is the margin that the chosen answer must win by; it is not divided by beta.
    """
    return -logsigmoid(beta * (mean_chosen - mean_rejected) - gamma)


def orpo(mean_chosen, mean_rejected, *, lam=0.1):
    """-A_w - lam log sigmoid(logit(e^{A_w}) - logit(e^{A_l}))    (ORPO, Hong et al. 2024, Eq. 6-7)

    lam weighs the odds ratio against the likelihood of the chosen answer.
    """
    return -mean_chosen - lam * logsigmoid(_log_odds(mean_chosen) - _log_odds(mean_rejected))


def _log_odds(mean_logp):
    """logit(e^A) = A - log(1 - e^A), kept finite where the answer is certain (A = 0)."""
    # e^0 has infinite odds; expm1 keeps digits that 1 - e^A loses where A is near 0
    mean_logp = mean_logp.clamp(max=-1e-6)
    return mean_logp - torch.log(-torch.expm1(mean_logp))


def cpo(chosen, rejected, mean_chosen, *, beta=0.1, lam=0.1):
    """-log sigmoid(beta (S_w - S_l)) - lam A_w                      (CPO, Xu et al. 2024, Eq. 5)

    DPO with a uniform reference, and a likelihood term of weight lam that keeps it in place.
    """
    return -logsigmoid(beta * (chosen - rejected)) - lam * mean_chosen


def slic(chosen, rejected, mean_chosen, *, delta=1.0, lam=0.1):
    """max(0, delta - (S_w - S_l)) - lam A_w                  (SLiC-HF, Zhao et al. 2023, Eq. 1)"""
    return (delta - (chosen - rejected)).clamp(min=0) - lam * mean_chosen


def rrhf(mean_chosen, mean_rejected, *, lam=1.0):
    """max(0, A_l - A_w) - lam A_w                              (RRHF, Yuan et al. 2023, Eq. 2-4)

    The paper adds both terms as they are: lam 1. Its published code, and so InSPO's baseline,
    weighs the ranking term 100 times the likelihood: lam 0.01, and 100 times the loss.
    """
    return (mean_rejected - mean_chosen).clamp(min=0) - lam * mean_chosen


def kto(chosen, rejected, ref_chosen, ref_rejected, kl, *, beta=0.1, lambda_w=1.0, lambda_l=1.0):
    """lambda_w (1 - sigmoid(beta (S_w - R_w - z))) + lambda_l (1 - sigmoid(beta (z - (S_l - R_l))))
    (KTO, Ethayarajh et al. 2024, Eq. 8)

    z = max(0, mean log-ratio of mismatched answers), taken over the whole batch without gradient;
    with `averaged` each of the two losses has a z of its own.
    """
    # each answer is held against z alone, so unpaired data would do as well
    wins = torch.sigmoid(beta * (chosen - ref_chosen - kl))
    losses = torch.sigmoid(beta * (kl - (rejected - ref_rejected)))
    return lambda_w * (1 - wins) + lambda_l * (1 - losses)


def sft(chosen):
    """-S_w, later divided by the target tokens of the global batch (maximum likelihood)."""
    return -chosen


def reward(chosen, rejected):
    """-log sigmoid(r_w - r_l) on a scalar head             (Bradley-Terry; InstructGPT, Eq. 1)"""
    return -logsigmoid(chosen - rejected)


# ----------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Objective:
    """One row of the table: the function, what one unit of it is, and the head that it reads."""

    loss: Callable
    per: str = "pair"  # the step's loss is the mean over its pairs, or over its target tokens
    head: str = "logps"  # values are token log-probabilities, or one scalar "reward" per answer

    @cached_property
    def inputs(self):
        """Names of the (B,) arguments that the function takes."""
        # what stands before the `*` of the signature
        return tuple(inspect.getfullargspec(self.loss).args)

    @cached_property
    def defaults(self):
        """Hyperparameters and their default values: numbers, as they become flags."""
        known, names = self.loss.__kwdefaults__ or {}, inspect.getfullargspec(self.loss).kwonlyargs
        if faults := [n for n in names if not isinstance(known.get(n), int | float)]:
            raise ValueError(f"losses.{self.loss.__name__}: {faults[0]} needs a number as default")
        return known

    @property
    def uses_reference(self):
        # the function itself says so: no list of reference-free objectives to keep in step
        return any(name.startswith("ref_") for name in self.inputs)

    @cached_property
    def by_token(self):
        """Which log-probabilities are asked for by token: those of "policy", of "reference"."""
        asked = [name for name in self.inputs if name.endswith("_tokens")]
        return {"reference" if name.startswith("ref_") else "policy" for name in asked}

    @property
    def answers(self):
        """Which of the pair's answers are scored: both, or the chosen one alone."""
        both = {"rejected", "mean_rejected", "rejected_tokens"} & set(self.inputs)
        return ("chosen", "rejected") if both else ("chosen",)


# what a function may ask for
INPUTS = ("chosen", "rejected", "mean_chosen", "mean_rejected", "ref_chosen", "ref_rejected",
          "len_chosen", "len_rejected", "kl", "chosen_tokens", "rejected_tokens",
          "ref_chosen_tokens", "ref_rejected_tokens")  # fmt: skip

OBJECTIVES = {
    "dpo": Objective(dpo),
    "ipo": Objective(ipo),
    "rdpo": Objective(rdpo),
    "ld_dpo": Objective(ld_dpo),
    "simpo": Objective(simpo),
    "orpo": Objective(orpo),
    "cpo": Objective(cpo),
    "slic": Objective(slic),
    "rrhf": Objective(rrhf),
    "kto": Objective(kto),
    "sft": Objective(sft, per="token"),
    "reward": Objective(reward, head="reward"),
}


def hyperparameters():
    """Computes {name: {objective: default}} over the table, in its order: one flag per name."""
    found = {}
    for name, objective in OBJECTIVES.items():
        for hyper, default in objective.defaults.items():
            found.setdefault(hyper, {})[name] = default
    return found


class Path(NamedTuple):
    """log pi(target | prompt, context). `context` is None, an answer, or the instruction."""

    context: str | None
    target: str

    def __str__(self):
        return f"{self.target}|{self.context or 'prompt'}"


CONTEXTS = (None, "chosen", "rejected", "instruct")
REFERENCES = ("plain", "conditioned")  # on the prompt alone, or on the policy's paths

# What stands between prompt and answer: one (context of chosen, context of rejected) per view.
# The loss is the mean over views.
CONDITIONS = {
    "none": ((None, None),),  # DPO and friends
    "cross": (("rejected", "chosen"),),  # each sees the other: InSPO Eq. 14-15, IFSR Eq. 4
    "one_sided": (("rejected", "rejected"),),  # InSPO section 5.3 (ii)
    "averaged": ((None, None), ("rejected", "chosen")),  # InSPO section 5.3 (iv)
    "instruct": (("instruct", "instruct"),),  # IFSR without the pseudo response
    "averaged_instruct": ((None, None), ("instruct", "instruct")),  # and its stage I without it
}


class Preset(NamedTuple):
    """What `--loss NAME` stands for; --condition, --bridge and --reference override it."""

    objective: str
    condition: str = "none"
    bridge: str = "sep"
    reference: str = "conditioned"


PRESETS = {name: Preset(name) for name in OBJECTIVES}
# sft and reward have no pair of log-probabilities whose contexts could be crossed
for _name in [name for name in OBJECTIVES if name not in ("sft", "reward")]:
    PRESETS[f"ins_{_name}"] = Preset(_name, "cross", "sep", "plain")  # InSPO Table 1
    PRESETS[f"ifsr_{_name}"] = Preset(_name, "cross", "turn", "conditioned")  # IFSR Eq. 4
PRESETS["irft"] = Preset("sft", "averaged", "turn")  # IFSR stage I


class PairLosses(NamedTuple):
    """The step's loss is losses.sum() / units.sum(), over all rows and ranks."""

    losses: torch.Tensor  # (B,) differentiable
    units: torch.Tensor  # (B,) pairs or target tokens
    rewards: dict  # answer -> (B,) implicit reward, detached


@dataclass(frozen=True)
class Recipe:
    """A resolved objective: which paths are scored, and what their log-probabilities become."""

    name: str
    objective: Objective
    condition: str
    bridge: str
    reference: str
    hyper: dict = field(default_factory=dict)

    @cached_property
    def views(self):
        """One dict {answer: Path} per view of the condition."""
        contexts = CONDITIONS[self.condition]  # ((context of chosen, context of rejected), …)
        answers = self.objective.answers  # where chosen stands alone, zip ends behind it
        return [{a: Path(c, a) for c, a in zip(view, answers, strict=False)} for view in contexts]

    @property
    def paths(self):
        """The policy's paths, each once."""
        return unique(path for view in self.views for path in view.values())

    @property
    def kl_paths(self):
        """A mismatched answer behind each context, for KTO's reference point; else none."""
        if "kl" not in self.objective.inputs:
            return []
        return unique(path for view in self.views for path in self._mismatched(view))

    def _mismatched(self, view):
        """The other pair's answer stands where this pair's would, behind the same contexts."""
        return unique(Path(path.context, "mismatched") for path in view.values())

    def reference_path(self, path):
        """The path on which the reference scores what the policy scores on `path`."""
        # plain: InSPO, Algorithm 1, line 4; conditioned: IFSR Eq. 4
        return path if self.reference == "conditioned" else Path(None, path.target)

    @property
    def reference_paths(self):
        """The paths that the reference pass must compute; empty without a reference."""
        if not self.objective.uses_reference:
            return []
        # KTO's z is a log-ratio too, so its mismatched answers have a reference as well
        return unique(self.reference_path(path) for path in self.paths + self.kl_paths)

    def kl(self, logps, reference):
        """KTO's z of each view, from values of the kl_paths: the mean log-ratio, at least 0.

        Without gradient: the caller hands in detached values. None where the loss has no z.
        """
        if not self.kl_paths:
            return None

        def ratios(view):
            paths = self._mismatched(view)
            return torch.stack(
                [summed(logps[p]) - summed(reference[self.reference_path(p)]) for p in paths]
            )

        return [ratios(view).mean().clamp(min=0) for view in self.views]

    def __call__(self, logps, counts, reference, kl=None):
        """Losses of B pairs.

        logps, reference: {Path: (B,) sums, or (B, T) by token} under policy and reference; counts:
        {Path: (B,)} scored tokens; kl: KTO's z of each view. Returns PairLosses.
        """
        names, views = self.objective.inputs, self._known(logps, counts, reference)
        for known, z in zip(views, kl or [None] * len(views), strict=True):
            known["kl"] = z
        losses = sum(self.objective.loss(*map(known.get, names), **self.hyper) for known in views)
        rewards = self.rewards(logps, counts, reference)
        # likelihood counts every target token alike, however they fall on pairs and views
        if self.objective.per == "token":
            units = sum(counts[path] for view in self.views for path in view.values())
            return PairLosses(losses, units, rewards)
        return PairLosses(losses / len(views), torch.ones_like(losses), rewards)

    def _known(self, logps, counts, reference):
        """{name: (B,) or (B, T)} of each view: all that a function may ask for, but z."""
        views = []
        for view in self.views:
            views.append(known := {})
            for answer, path in view.items():
                n = counts[path]
                known |= _named(answer, logps[path], n)  # from here on blind to the path
                known |= {f"mean_{answer}": known[answer] / n, f"len_{answer}": n}
                if self.objective.uses_reference:
                    known |= _named(f"ref_{answer}", reference[self.reference_path(path)], n)
        return views

    def rewards(self, logps, counts, reference):
        """{answer: (B,)} the implicit reward of each, the mean over the views, detached."""
        views = self._known(logps, counts, reference)
        found = {a: [self._reward(known, a) for known in views] for a in self.objective.answers}
        return {answer: sum(values) / len(values) for answer, values in found.items()}

    @property
    def scale(self):
        """What the implicit reward is scaled by: beta, or IPO's tau, or 1."""
        return self.hyper.get("beta", self.hyper.get("tau", 1.0))

    def _reward(self, known, answer):
        """The implicit reward: beta (S - R), without a reference beta S, or beta A."""
        if self.objective.uses_reference:
            value = known[answer] - known[f"ref_{answer}"]
        else:
            whole = {"chosen", "chosen_tokens"} & set(self.objective.inputs)
            value = known[answer] if whole else known[f"mean_{answer}"]
        # for metrics alone: no gradient
        return self.scale * value.detach()


def summed(logps):
    """Sums of log-probabilities that may be given by token: (B,) or (B, T) -> (B,)."""
    return logps if logps.ndim == 1 else logps.sum(1)


def _named(name, logps, counts):
    """{name: (B,) sums}, and by token where logps are, as wide as the longest of these answers."""
    if logps.ndim == 1:
        return {name: logps}
    longest = int(counts.max()) if len(counts) else 0  # a row may be empty
    return {name: summed(logps), f"{name}_tokens": logps[:, :longest]}


def by_path(values, paths):
    """(B, P) -> {path: (B,)}, or (B, P, T) -> {path: (B, T)}."""
    return dict(zip(paths, values.unbind(1), strict=True))


def unique(items):
    """The items in order, each once."""
    return list(dict.fromkeys(items))


def _check(name, objective, condition, reference):
    """ValueError for what no table has, and for a row of them that could go wrong in silence."""
    if unknown := [x for x in objective.inputs if x not in INPUTS]:
        known = ", ".join(INPUTS)
        raise ValueError(f"--loss {name}: unknown input {unknown[0]}; known are {known}")
    choices = {"condition": (condition, CONDITIONS), "reference": (reference, REFERENCES)}
    for flag, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"--{flag} {value}: unknown; choose from {', '.join(known)}")
    for view in CONDITIONS[condition]:
        if not isinstance(view, tuple) or len(view) != 2 or not {*view} <= {*CONTEXTS}:
            fault = f"{view!r} is no pair of contexts, of chosen and rejected; one is "
            raise ValueError(f"--condition {condition}: {fault}{', '.join(map(str, CONTEXTS))}")


def recipe(name, condition=None, bridge=None, reference=None, **hyper):
    """Resolve `--loss NAME`, its overrides and hyperparameters (None: the table's value).

    Raises ValueError for an unknown name, a hyperparameter that the objective does not have, or a
    row of the tables that names something unknown.
    """
    if name not in PRESETS:
        raise ValueError(f"--loss {name}: unknown objective; choose from {', '.join(PRESETS)}")
    overrides = {"condition": condition, "bridge": bridge, "reference": reference}
    preset = PRESETS[name]._replace(**{key: value for key, value in overrides.items() if value})
    objective = OBJECTIVES[preset.objective]
    _check(name, objective, preset.condition, preset.reference)
    # None: the flag was not given, so the table's default holds
    given = {key: value for key, value in hyper.items() if value is not None}
    for key in given:
        if key not in objective.defaults:
            known = ", ".join(f"--{k}" for k in objective.defaults) or "none"
            raise ValueError(f"--{key} does not apply to --loss {name}; its flags are: {known}")
    return Recipe(name, objective, *preset[1:], objective.defaults | given)
