"""Scores of many items in one process."""

import torch

from jobs.cli import progress
from rows import build_row, pack


@torch.no_grad()
def scored_rows(model, trie, sizes, n_paths, row_tokens=None, label="score"):
    """Yield (items, row, values) until each of N items has been scored in one process.

    trie(n) makes the rows.Trie of item n, of sizes[n] tokens. items: which of the N the row holds;
    values: (S,) what the model gives its scored tokens. row_tokens: longest row, unless one item
    is longer; None: by the device.
    """
    device = model.embed.weight.device
    row_tokens = row_tokens or (8192 if device.type == "cuda" else 2048)
    with progress(label, len(sizes), "item", leave=False) as bar:
        for items in pack(sizes, max(row_tokens, *sizes)):
            row = build_row([trie(n) for n in items], items, n_paths).to(device)
            yield items, row, model(row)
            bar.update(len(items))
