"""Computes IFSR's Tables 2 and 7: what the context of an answer does to its probability.

    context      loss of y+, variance of its tokens' probabilities, and variance of the next
                 token's distribution over the vocabulary, by what stands before it (Table 2, and
                 InSPO's separators beside it)
    next_token   which token comes next in the answer, behind four prompts (Table 7)

In the signs of the paper, y+ is the chosen answer, ỹ the pseudo response (the rejected one), i the
refining instruction: ↑ for a better, ⁰ for another, ↓ for a worse response. Without ỹ it is a
suffix of the question, behind ỹ a user turn of its own. Of the paper only the names of these
quantities were at hand; what is averaged over what here, the functions say.

Legend: N pairs, P contexts, V vocabulary.
"""

from dataclasses import dataclass
from itertools import pairwise
from os.path import commonprefix
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import losses
from data import Dataset, Limits, lay_out, scored_rows, trie_size
from evals.results import save_results, table
from evals.stats import estimate
from generate import load_model
from jobs.cli import DataFlags, ModelFlags, ResultFlags, UserError, flag, progress, require
from model import ScoredLogps, path_limit, soft_cap
from pairs.read import Drops, read_pairs


class Context(NamedTuple):
    """What stands between the question x and the answer y+."""

    shows: str | None  # as in losses.Path: nothing, "instruct" or the "rejected" answer
    instruction: str = "better"
    bridge: str = "turn"
    sep: str | None = None  # None: the tokenizer's own separator


PROMPT_PARTS = ("first", "x", "ỹ", "i", "y+")
INSTRUCTED = {  # IFSR Table 2
    "x": Context(None),
    "x,i↑": Context("instruct"),
    "x,ỹ,i↑": Context("rejected"),
    "x,i⁰": Context("instruct", "another"),
    "x,i↓": Context("instruct", "worse"),
}
SHOWN = {"x,ỹ,i⁰": Context("rejected", "another"), "x,ỹ,i↓": Context("rejected", "worse")}


class View(NamedTuple):
    """A pair whose chosen answer stands behind several contexts."""

    where: str  # "file:row"
    paths: list  # (segments, scored tokens) per context
    spans: list  # {part: (start, end)} per context: tokens along the path


class Views(list):
    """The View of each pair. Nothing is cut, so that the same tokens are compared everywhere:
    `drops` counts the pairs with a path of more than max_len tokens, which are left out."""

    def __init__(self, pairs, template, contexts, max_len):
        self.contexts, datasets = contexts, {}
        for options in dict.fromkeys(c[1:] for c in contexts.values()):
            instruction, bridge, sep = options  # one Dataset serves all contexts that agree here
            rule, limits = losses.recipe("dpo", "instruct", bridge), Limits(10**9, 1.0)
            datasets[options] = Dataset(pairs, template, rule, limits, instruction, sep, shown=True)
        columns = [(c.shows, datasets[c[1:]]) for c in contexts.values()]
        self.drops = Drops(columns[0][1].drops.rules)  # the same ones in all
        views = [view_of(columns, i) for i in range(len(columns[0][1]))]
        sizes = [max(sum(map(len, segments)) for segments, _ in view.paths) for view in views]
        over = f"over --max_len {max_len}"
        self += self.drops.sift(views, (over if size > max_len else None for size in sizes))
        if not self:
            raise UserError(f"no pair is left: {self.drops}")


def view_of(columns, i):
    """Pair i under contexts, each given by what it shows and its data.Dataset -> View.

    Prompts are cut in two where the instruction sets in, so that a trie holds x once. The parts
    are `first` (where attention that is not needed goes), x, ỹ and i if they are there, with
    what the template writes around them, and y+.
    """
    examples, paths, spans = [dataset.examples[i] for _, dataset in columns], [], []
    agree = [len(commonprefix([e.prompt.tolist(), e.instruct.tolist()])) for e in examples]
    for (shows, dataset), example, same in zip(columns, examples, agree, strict=True):
        (prompt, *rest), scored = dataset.path(i, losses.Path(shows, "chosen"))
        segments = [prompt[: min(agree)], prompt[min(agree) :], *rest]
        end = sum(map(len, segments))
        start = end - len(segments[-1])
        asked = {None: start, "instruct": same, "rejected": len(example.prompt)}[shows]
        shown = asked + (len(example.rejected) if shows == "rejected" else 0)
        parts = zip(PROMPT_PARTS, pairwise((0, 1, asked, shown, start, end)), strict=True)
        spans.append({part: (a, b) for part, (a, b) in parts if a < b})
        paths.append((segments, scored))
    return View(examples[0].where, paths, spans)


@dataclass(frozen=True)
class AnalysisFlags(ModelFlags, DataFlags, ResultFlags):
    max_len: int | None = flag(None, "longest path; default: 2048, or the model's limit", least=1)
    out: str | None = flag(None, "json file for the numbers; a figure goes beside it as png")


def open_views(s, template, contexts):
    """Reads --data, says what was left out -> Views."""
    drops = Drops()
    pairs = read_pairs(s.data, drops, s.limit, True, s.bad_rows, s.data_revision, s.ignore_columns)
    limit = path_limit(s.max_len, template.directory, most=2048)
    views = Views(pairs, template, contexts, limit)
    told = f"compared: {len(views)} pairs, dropped: {views.drops}"
    print(f"{s.data}: {len(pairs)} pairs read, dropped: {drops}; {told}")
    return views


@dataclass(frozen=True)
class ContextFlags(AnalysisFlags):
    sep: str | None = flag(None, "one more separator to look at")
    row_tokens: int | None = flag(None, "tokens per row; default: 8192, on a CPU 2048", least=1)


def context(s):
    """Loss and spread of the chosen answers under what may stand before them (IFSR Table 2)."""
    require(s, "model", "data")
    model, template = load_model(s.model, s.dtype, s.device, fold=s.fold_system)
    contexts = INSTRUCTED | SHOWN | separated(template, s.sep)
    views = open_views(s, template, contexts)
    measured = token_statistics(model, views, s.row_tokens)  # {measure: (N, P)}
    rows, results = [], {"model": s.model, "data": s.data, "n": len(views), "contexts": {}}
    results["tokens"] = [view.paths[0][1] for view in views]
    for p, name in enumerate(contexts):
        numbers = {}
        for measure, of in measured.items():
            numbers[measure] = estimate(of[:, p], s.seed)
            numbers[f"{measure} - x"] = estimate(of[:, p] - of[:, 0], s.seed)
        rows.append({"context": name} | numbers)
        results["contexts"][name] = numbers | {"losses": measured["loss"][:, p].tolist()}
    forms = {"loss": ".3f", "loss - x": "+.3f", "variance": ".4f", "variance - x": "+.4f",
             "over vocabulary": ".3g", "over vocabulary - x": "+.2g"}  # fmt: skip
    print(table(rows, forms))
    save_results(s.out, results | {"pairs": [view.where for view in views]})


def separated(template, sep=None):
    """ỹ between separators (InSPO): the tokenizer's own, a blank line, --sep, and none at all."""
    texts = dict.fromkeys(t for t in (template.separator(), "\n\n", sep) if t is not None)
    named = {f"x,sep,ỹ,sep; sep {s!r}": Context("rejected", bridge="sep", sep=s) for s in texts}
    return named | {"x,ỹ": Context("rejected", bridge="sep", sep="")}  # no mark around it


def token_statistics(model, views, row_tokens=None):
    """Of every pair's y+ under every context: {measure: (N, P)}.

    Over the T tokens of one answer, its end token included, with p_t the probability of token t
    and q_t(v) that of any token v of the vocabulary in its place:

        loss              -1/T sum_t log p_t, in nats
        variance          of p_t from token to token: 1/T sum_t p_t^2 - (1/T sum_t p_t)^2
        over vocabulary   of q_t from entry to entry: 1/T sum_t [1/V sum_v q_t(v)^2 - 1/V^2]
    """
    sizes, n_paths = [trie_size(view.paths) for view in views], len(views.contexts)
    means = torch.zeros(4, len(views), n_paths, dtype=torch.float64)
    sized = (lambda n: lay_out(views[n].paths), sizes, n_paths)  # a trie per pair
    for items, row, found in scored_rows(Distributions(model), *sized, row_tokens, "contexts"):
        (logps, squares), counts = found.double(), row.counts().double()
        values = (-logps, logps.exp(), (2 * logps).exp(), squares)
        for mean, value in zip(means, values, strict=True):
            mean[items] = (row.sums(value) / counts).cpu()
    loss, p, p_squared, squares = means.numpy()
    size = model.config.vocab
    spreads = (p_squared - p**2).clip(min=0), squares / size - 1 / size**2
    return {"loss": loss, "variance": spreads[0], "over vocabulary": spreads[1]}


class Distributions:
    """A model that also tells of the tokens that are not the label, for scored_rows.

    Row -> (2, S): the label's log-probability, and the sum of all tokens' squared probabilities.
    """

    def __init__(self, model):
        self.model, self.embed = model, model.embed

    def __call__(self, row):
        model, weight, cap = self.model, self.model.head_weight, self.model.config.logit_cap
        x = model.norm(model.states(model, row))  # (S, D)
        logps = ScoredLogps.apply(x, weight, row.label, cap)
        few = x.split(max(1, ScoredLogps.LOGITS // len(weight)))  # or all logits exist at once
        probs = (soft_cap(F.linear(part, weight), cap).float().softmax(-1) for part in few)
        return torch.stack([logps, torch.cat([p.square().sum(-1) for p in probs])])


@dataclass(frozen=True)
class NextTokenFlags(AnalysisFlags):
    ref: str | None = flag(None, "another model, say before training, that is asked the same")
    draft: bool = flag(False, "show ỹ, and bring the instruction in a second turn")
    parts: bool = flag(False, "instead of three instructions: x, x,ỹ, x,i and x,ỹ,i (Table 7)")
    prefix: str = flag("", "text that the answer begins with, before the token in question")
    top: int = flag(10, "tokens in the table", least=1)
    show: int = flag(1, "pairs whose table is printed; --out holds all")


def next_token(s):
    """Distribution of the next token behind x and what may follow it (IFSR Table 7)."""
    require(s, "model", "data")
    shows = (None, "rejected" if s.draft else "instruct")
    contexts = {k: c for k, c in (INSTRUCTED | SHOWN).items() if c.shows in shows}
    if s.parts:
        contexts = {k: INSTRUCTED[k] for k in ("x", "x,i↑", "x,ỹ,i↑")}
        contexts |= {"x,ỹ": Context("rejected", bridge="sep", sep="")}
    results = next_of(s, contexts, "model")
    if s.ref:  # read by its own tokenizer
        results["ref"] = next_of(s, contexts, "ref")
    save_results(s.out, results)


def next_of(s, contexts, flagged):
    """Prints and returns what the model of one flag says next: {model, …, contexts, pairs}."""
    name, how = getattr(s, flagged), {"fold": s.fold_system, "name": f"--{flagged}"}
    model, template = load_model(name, s.dtype, s.device, **how)
    views = open_views(s, template, contexts)
    (prefix,), device = template.encode([s.prefix], template.opening), model.embed.weight.device
    pairs, measures, bar = [], [], {"iterable": views, "leave": False}
    for n, view in enumerate(progress("next token", len(views), "pair", **bar)):
        logps, tops = [], {}  # {context: [(token's text, probability)]}, the likeliest first
        for context, (segments, _) in zip(contexts, view.paths, strict=True):
            ids = torch.from_numpy(np.concatenate([*segments[:-1], prefix]).astype(np.int64))
            logits = model.logits(ids[None].to(device))[0, -1].float()
            logps.append(logits.log_softmax(-1).cpu())  # (V,)
            values, ids = logps[-1].topk(min(s.top, len(logps[-1])))
            texts = [template.decode([i], skip_special=False) for i in ids]
            tops[context] = list(zip(texts, values.exp().tolist(), strict=True))
        pairs.append({"pair": view.where, "top": tops})
        measures.append(spread(torch.stack(logps)))
        if n < s.show:
            words = [[f"{text!r} {p:.3f}" for text, p in top] for top in tops.values()]
            rows = zip(map(str, range(1, s.top + 1)), *words, strict=False)
            lines = table([dict(zip(("", *tops), row, strict=True)) for row in rows])
            print(f"\n{view.where}\n{lines}")
    numbers = {}
    for context, columns in zip(contexts, np.array(measures).transpose(2, 1, 0), strict=True):
        both = [estimate(values, s.seed) for values in columns]  # (N,) values each
        numbers[context] = dict(zip(("entropy", "distance"), both, strict=True))
    rows = [{"prompt": context} | both for context, both in numbers.items()]
    lines = table(rows, {"entropy": ".3f", "distance": ".3f"})
    print(f"\n{name}: entropy in nats, total variation distance from x\n{lines}")
    about = {"model": name, "data": s.data, "n": len(views), "prefix": s.prefix}
    return about | {"contexts": numbers, "pairs": pairs}


def spread(logps):
    """(P, V) -> entropy of each row, and its total variation distance from the first: (2, P)."""
    p = logps.exp()
    entropy = -(p * logps).nansum(-1)  # 0 log 0 = 0
    return torch.stack([entropy, (p - p[0]).abs().sum(-1) / 2]).tolist()
