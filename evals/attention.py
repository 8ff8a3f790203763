"""What the parts of a prompt get of the attention while the chosen answer y+ is read.

    attention    mass, variance and skewness by layer, before and after training (IFSR Figure 4)

The contexts are analysis.py's: x,i (the instruction i as a suffix of the question x) and x,ỹ,i (it
follows the pseudo response ỹ in a turn of its own). Of the paper only the names of these three
quantities were at hand; what is averaged over what here, `attention_statistics` says.

Legend: N pairs, P contexts, L layers, H heads, K key/value heads, C head width, T tokens of the
trie, S of them that predict y+.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import build_row, lay_out
from evals.context import Context, Settings, open_views
from evals.results import save, table
from evals.stats import estimate
from generate import load_model
from jobs.cli import UserError, flag, progress, require
from kernels import chains
from model import visible

MEASURES = ("mass", "variance", "skewness")
PARTS = ("first", "x", "ỹ", "i", "y+")


@dataclass
class AttentionSettings(Settings):
    """Every flag of `evaluate.py attention`."""

    ref: str | None = flag(None, "the model before training, to be compared with --model")
    instruction: str = flag("better", "refining instruction: better, another, worse, or your text")


def attention(s):
    """What the parts of a prompt get of the attention while y+ is read, by layer."""
    require(s, "model", "data")
    if s.out and Path(s.out).suffix == ".png":
        raise UserError(f"--out {s.out}: name the json file; the figure goes beside it")
    contexts = {
        "x,i": Context("instruct", s.instruction),
        "x,ỹ,i": Context("rejected", s.instruction),
    }
    flags = {"before": "ref", "after": "model"} if s.ref else {"after": "model"}
    found, views = {}, None
    for name, of in flags.items():
        model, template = load_model(getattr(s, of), s.dtype, s.device, name=f"--{of}")
        views = views or open_views(s, template, contexts)
        found[name] = attention_statistics(model, views, name)
        del model  # one model in memory at a time
    averages, rows = compare(found, contexts, s.seed)
    print(table(rows))
    results = {"model": s.model, "ref": s.ref, "data": s.data, "n": len(views)}
    layers = {name: by_layer(values, contexts) for name, values in found.items()}
    save(s.out, results | {"means": averages, "layers": layers, "pairs": views.where()})
    if s.out:
        draw(layers, Path(s.out).with_suffix(".png"))


class Watched:
    """An attention rule that also keeps its weights.

    A rule is linear in the values, y = A v, so that handed the columns of the identity as values it
    gives A, whatever it does to queries and keys: as many at a time as a head is wide.
    """

    def __init__(self, rule, queries):
        self.rule, self.queries = rule, queries

    def __call__(self, q, k, v):
        size, width = v.shape[2:]
        eye = torch.eye(size, dtype=v.dtype, device=v.device)
        eye = F.pad(eye, (0, -size % width))  # (T, T rounded up)
        columns = (part.expand_as(v) for part in eye.split(width, 1))  # (1, K, T, C)
        parts = [self.rule(q, k, c)[0, :, self.queries] for c in columns]  # (H, S, C)
        self.weights = torch.cat(parts, -1)[..., :size]  # (H, S, T)
        return self.rule(q, k, v)


@torch.no_grad()
def attention_statistics(model, views, label):
    """(N, P, L, parts, measures) of the attention of the S tokens that predict y+; NaN: no such.

    Of one query and head: `mass` is the sum of its weights on a part of the context; `variance`
    (population) and `skewness` (third standardised moment) are those of the weights within the
    part, token by token. Each is averaged over heads and queries. Of y+ itself, which grows from
    query to query, there is the mass only.
    """
    device = model.embed.weight.device
    shape = (len(views), len(views.contexts), model.config.n_layers, len(PARTS), len(MEASURES))
    found = np.full(shape, np.nan)
    with progress(f"attention {label}", len(views), "pair", leave=False) as bar:
        for n in range(len(views)):
            row = build_row([lay_out(views.paths(n))], [n], shape[1]).to(device)
            rules = chains.attend(row, model.config)
            rules = [Watched(rule, row.source) for rule in rules]
            model.hidden(row.tokens[None], row.positions[None], rules)
            sees = visible(row.until, row.positions)
            for p, spans in enumerate(views.spans(n)):
                scored = row.path == p  # (S,)
                keys = sees[row.source[scored][-1]].nonzero()[:, 0]  # the path, in its order
                for layer, rule in enumerate(rules):
                    weights = rule.weights[:, scored][..., keys].double()  # (H, S of p, keys)
                    for part, (a, b) in spans.items():
                        found[n, p, layer, PARTS.index(part)] = moments(weights[..., a:b], part)
            bar.update()
    return found


def moments(weights, part):
    """(H, S, keys of one part) -> its mass, variance and skewness, averaged over H and S."""
    mass = weights.sum(-1).mean()
    if part in ("first", "y+"):
        return mass.item(), math.nan, math.nan
    away = weights - weights.mean(-1, keepdim=True)
    variance = away.square().mean(-1)
    skewness = away.pow(3).mean(-1) / variance.pow(1.5)  # NaN where all weights are equal
    return mass.item(), variance.mean().item(), skewness.nanmean().item()


def there(values):
    """Yield (context, part, measure) of (N, P, L, parts, measures) that have no NaN, as numbers."""
    missing = np.isnan(values).any((0, 2))  # (P, parts, measures)
    return np.argwhere(~missing.transpose(0, 2, 1))[:, [0, 2, 1]].tolist()


def compare(found, contexts, seed):
    """Means over layers, and after training less before: as a list of numbers and as table rows."""
    averages, rows, names = [], [], list(contexts)
    for p, i, m in there(sum(found.values())):
        means = {name: values[:, p, :, i, m].mean(1) for name, values in found.items()}  # (N,)
        row = {"context": names[p], "measure": MEASURES[m], "part": PARTS[i]}
        numbers = {name: estimate(mean, seed) for name, mean in means.items()}
        text = {name: f"{number:.4g}" for name, number in numbers.items()}
        if len(means) == 2:
            numbers["change"] = estimate(means["after"] - means["before"], seed)
            text["change"] = f"{numbers['change']:+.2g}"
        averages.append(row | numbers)
        rows.append(row | text)
    return averages, rows


def by_layer(values, contexts):
    """(N, P, L, parts, measures) -> {context: {measure: {part: [L means over pairs]}}}."""
    layers = {name: {measure: {} for measure in MEASURES} for name in contexts}
    names = list(contexts)
    for p, i, m in there(values):
        layers[names[p]][MEASURES[m]][PARTS[i]] = values[:, p, :, i, m].mean(0).tolist()
    return layers


def draw(layers, file):
    """By layer, a row of panels per context, a colour per part: {before, after: by_layer(…)}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    contexts = list(layers["after"])
    size = (13, 3.4 * len(contexts))
    figure, axes = plt.subplots(len(contexts), 3, figsize=size, layout="constrained")
    for row, name in zip(axes, contexts, strict=True):
        for axis, measure in zip(row, MEASURES, strict=True):
            for when, style in (("before", "--"), ("after", "-")):
                for part, values in layers.get(when, {name: {measure: {}}})[name][measure].items():
                    colour = f"C{PARTS.index(part)}"
                    axis.plot(values, style, color=colour, lw=1.3, label=f"{part} {when}")
            axis.set(title=f"{name}: {measure}", xlabel="layer")
            axis.grid(alpha=0.3)
        row[1].set_yscale("log")
        row[0].legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(file, dpi=120)
    plt.close(figure)
