"""Computes IFSR's Figures 4 and 6: how attention falls on a prompt, before and after training.

Mass, variance and skewness of the weights by layer and part of the prompt while y+ is read, with
y+ behind x,i and behind x,ỹ,i (signs and reservations as in evals/context.py). The part `prompt` is
another reading: all of it, from its last token, in the last layer, after the mean over heads.

Legend: N pairs, P contexts, L layers, H heads, K key/value heads, C head width, T tokens of the
trie, S of them that predict y+.
"""

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch

from data import build_row, lay_out
from evals.context import PROMPT_PARTS, AnalysisFlags, Context, open_views
from evals.results import figure_file, out_file, save_results, table
from evals.stats import estimate
from generate import load_model
from jobs.cli import InstructionFlags, flag, progress, require
from kernels import chains
from model import visible

MEASURES = ("mass", "variance", "skewness")


@dataclass(frozen=True)
class AttentionFlags(AnalysisFlags, InstructionFlags):
    ref: str | None = flag(None, "the model before training, to be compared with --model")


def attention(s):
    """What a prompt's parts get of the attention while y+ is read, by layer (IFSR Figure 4)."""
    require(s, "model", "data")
    figure = s.out and figure_file(s.out)
    contexts = {"x,i": Context("instruct", s.instruction)}
    contexts["x,ỹ,i"] = Context("rejected", s.instruction)
    flags = {"before": "ref", "after": "model"} if s.ref else {"after": "model"}
    columns, last, views = {}, {}, None  # columns: {when: {(context, measure, part): (N, L)}}
    for name, of in flags.items():
        how = {"name": f"--{of}", "fold": s.fold_system}
        model, template = load_model(getattr(s, of), s.dtype, s.device, **how)
        views = views or open_views(s, template, contexts)
        every, last[name] = attention_statistics(model, views, name)
        columns[name] = {k: v for k, v in every.items() if not np.isnan(v).any()}
        del model  # one model in memory at a time
    means = []  # Estimates of the means over layers
    for name in columns["after"]:
        if all(name in found for found in columns.values()):
            of = {when: found[name].mean(1) for when, found in columns.items()}  # (N,)
            if s.ref:
                of["change"] = of["after"] - of["before"]
            row = dict(zip(("context", "measure", "part"), name, strict=True))
            means.append(row | {when: estimate(mean, s.seed) for when, mean in of.items()})
    print(table(means, {"before": ".4g", "after": ".4g", "change": "+.2g"}))
    results = {"model": s.model, "ref": s.ref, "data": s.data, "n": len(views), "means": means}
    results["layers"] = {  # {when: {"context measure part": [L means over pairs]}}
        when: {" ".join(name): values.mean(0).tolist() for name, values in of.items()}
        for when, of in columns.items()
    }
    prompts = results["prompts"] = {c: [] for c in contexts}  # {context: [[a token's text]]}
    for view, (p, c) in itertools.product(views, enumerate(contexts)):
        ids = np.concatenate(view.paths[p][0][:-1])
        prompts[c].append([template.decode([i], skip_special=False) for i in ids])
    results["last_query"] = last
    save_results(s.out, results | {"pairs": [view.where for view in views]})
    if figure:
        with out_file(figure):
            draw_layers(columns, list(contexts), figure)


class Watched:
    """An attention rule that also keeps its weights.

    A rule is linear in the values, y = A v, so that handed the columns of the identity as values it
    gives A, whatever it does to queries and keys: as many at a time as a head is wide.
    """

    def __init__(self, rule, queries):
        self.rule, self.queries = rule, queries

    def __call__(self, q, k, v):
        size, width = v.shape[2:]
        eye = torch.eye(size, -(-size // width) * width, dtype=v.dtype, device=v.device)
        columns = (part.expand_as(v) for part in eye.split(width, 1))  # (1, K, T, C)
        parts = [self.rule(q, k, c)[0, :, self.queries] for c in columns]  # (H, S, C)
        self.weights = torch.cat(parts, -1)[..., :size]  # (H, S, T)
        return self.rule(q, k, v)


def attention_statistics(model, views, label):
    """Attention of the S tokens that predict y+: {(context, measure, part): (N, L)}, and the last
    query's weights, {context: [[one per token of the prompt] per pair]}.

    Of one query and head: `mass` is the sum of its weights on a part of the context; `variance`
    (population) and `skewness` (third standardised moment) are those of the weights within the
    part, token by token. Each is averaged over heads and queries. Of y+ itself, which grows from
    query to query, there is the mass only. NaN stands for what is not there.
    """
    device, shape = model.embed.weight.device, (len(views), model.config.n_layers)
    found, last = defaultdict(lambda: np.full(shape, np.nan)), {c: [] for c in views.contexts}
    bar = {"iterable": views, "leave": False}
    for n, view in enumerate(progress(f"attention {label}", len(views), "pair", **bar)):
        row = build_row([lay_out(view.paths)], [n], len(views.contexts)).to(device)
        rules = [Watched(rule, row.source) for rule in chains.attend(row, model.config)]
        model.hidden(row.tokens[None], row.positions[None], rules)
        sees = visible(row.until, row.positions)
        for p, (context, spans) in enumerate(zip(views.contexts, view.spans, strict=True)):
            scored = row.path == p  # (S,)
            keys = sees[row.source[scored][-1]].nonzero()[:, 0]  # the path, in its order
            for layer, rule in enumerate(rules):
                weights = rule.weights[:, scored][..., keys].double()  # (H, S of p, keys)
                for part, (a, b) in spans.items():
                    values = moments(weights[..., a:b], part)
                    for measure, value in zip(MEASURES, values, strict=True):
                        found[context, measure, part][n, layer] = value
            # the first token of y+ is predicted by the last one of the prompt
            weights = weights[:, 0, : spans["y+"][0]].mean(0)  # of the last layer: (prompt,)
            last[context].append(weights.tolist())
            for measure, value in zip(MEASURES[1:], moments(weights, "prompt")[1:], strict=True):
                found[context, measure, "prompt"][n] = value
    return found, last


def moments(weights, part):
    """(H, S, keys of one part) -> its mass, variance and skewness, averaged over H and S."""
    mass = weights.sum(-1).mean()
    if part in ("first", "y+"):
        return mass.item(), math.nan, math.nan
    away = weights - weights.mean(-1, keepdim=True)
    variance = away.square().mean(-1)
    skewness = away.pow(3).mean(-1) / variance.pow(1.5)  # NaN where all weights are equal
    return mass.item(), variance.mean().item(), skewness.nanmean().item()


def draw_layers(columns, contexts, file):
    """Means over pairs by layer: a row of panels per context, a colour per part."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(13, 3.4 * len(contexts)), layout="constrained")
    panels = figure.subplots(len(contexts), len(MEASURES)).flat
    axes = dict(zip(itertools.product(contexts, MEASURES), panels, strict=True))
    for when, found in columns.items():
        for (context, measure, part), values in found.items():
            look = {"lw": 1.3, "linestyle": "--" if when == "before" else "-"}
            if part in PROMPT_PARTS:  # not the last layer's alone
                look |= {"color": f"C{PROMPT_PARTS.index(part)}", "label": f"{part} {when}"}
                axes[context, measure].plot(values.mean(0), **look)
    for (context, measure), axis in axes.items():
        scale = "log" if measure == "variance" else "linear"
        axis.set(title=f"{context}: {measure}", xlabel="layer", yscale=scale)
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)  # there is no layer 0.5
    lines = {line.get_label(): line for axis in axes.values() for line in axis.lines}
    names = sorted(lines, key=lambda name: PROMPT_PARTS.index(name.split()[0]))  # a part a column
    look = {"frameon": False, "ncols": len(PROMPT_PARTS)}
    figure.legend(map(lines.get, names), names, loc="outside lower center", **look)
    figure.savefig(file, dpi=120)
