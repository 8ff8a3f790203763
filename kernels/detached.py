"""Computes scored states without a gradient through contexts (InSPO D.5): cheaper, and inexact.

Values are those of model.scored_states. The gradient passes only through tokens that predict a
scored one. What these see besides runs forward only, and they attend to its recorded keys and
values as to constants: about half the work of a cross-conditioned pair.

Legend: T row tokens, S scored tokens, D width.
"""

import torch
import torch.nn.functional as F

from kernels import chains
from model import scored_states


def states(model, row):
    """(S, D) residual stream at row.source, whose gradient takes contexts as constants."""
    if not torch.is_grad_enabled():
        return scored_states(model, row)
    # (T,) bools; tokens on which nothing scored depends are in none of them
    predicts = torch.zeros_like(row.tokens, dtype=torch.bool)
    predicts[row.source if len(row.source) else 0] = True  # an empty row must reach all weights
    context = ~predicts & _above(predicts, row.until)  # what these see besides
    needed = context | _above(context, row.until)  # all that the context itself sees
    with torch.no_grad():
        recorded = chains.attend(row, model.config, needed)
        for rule in recorded:
            rule.keep = context[needed]
        model.hidden(row.tokens[None, needed], row.positions[None, needed], recorded)
    rules = chains.attend(row, model.config, context, predicts)
    for rule, above in zip(rules, recorded, strict=True):
        rule.before = above.kept
    x = model.hidden(row.tokens[None, predicts], row.positions[None, predicts], rules)[0]
    return x[(predicts.cumsum(0) - 1)[row.source]]  # where each source lies among `predicts`


def _above(flags, until):
    """Whether a token has a flagged one below it in its subtree."""
    count = F.pad(flags.cumsum(0), (1, 0))
    return count[until] > count[1:]
