"""Scores without gradient, over all ranks; and those of the reference, computed once.

Legend: N pairs of a dataset, P paths.
"""

import hashlib
import json
import os
import time

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from jobs.checkpoint import flush
from jobs.cli import UserError, progress
from jobs.processes import Stopped, reshard
from rows import build_row, pack


def by_path(values, paths):
    """(B, P) -> {path: (B,)}."""
    return dict(zip(paths, values.unbind(1), strict=True))


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


class Scorer:
    """Rows of this rank, and the values of whole datasets. s: settings.Settings."""

    def __init__(self, s, ranks):
        self.s, self.ranks = s, ranks

    def rows(self, dataset, pairs, paths):
        """This rank's share of the rows that hold these pairs; equally many on every rank."""
        packed = pack([dataset.size(i, paths) for i in pairs], self.s.row_tokens, self.ranks.world)
        for row in packed[self.ranks.rank :: self.ranks.world]:
            numbers = [pairs[j] for j in row]
            tries = [dataset.trie(i, paths) for i in numbers]
            pad_to = self.s.row_tokens if self.s.attention == "flex" else 0  # its one length
            yield build_row(tries, row, len(paths), pad_to).to(self.ranks.device)

    @torch.no_grad()
    def score(self, model, dataset, pairs, paths, tick=lambda pairs: None):
        """(len(pairs), P) sums of scored values, on every rank; no gradient. tick: progress."""
        out = torch.zeros(len(pairs), len(paths), device=self.ranks.device)
        for row in self.rows(dataset, pairs, paths):
            out[row.pairs] = row.sums(model(row))
            tick(len(row.pairs) * self.ranks.world)
        reshard(model)
        return self.ranks.sum(out)

    def score_all(self, model, dataset, paths, label):
        """The same over a whole dataset, in blocks, with a progress bar; a signal ends it."""
        everything, hidden = range(len(dataset)), not self.ranks.first
        blocks = [everything[i : i + 256] for i in everything[::256]]
        with progress(label, len(dataset), "pair", hidden, leave=False) as bar:
            parts = []
            for block in blocks:
                parts.append(self.score(model, dataset, block, paths, bar.update))
                if self.ranks.agree_to_stop():
                    raise Stopped
        return torch.cat(parts)

    def counts(self, dataset, pairs, paths):
        """(len(pairs), P) number of scored tokens."""
        counts = [[dataset.path(i, path)[1] for path in paths] for i in pairs]
        return torch.tensor(counts, dtype=torch.float32, device=self.ranks.device)


class Reference:
    """Log-probabilities under the reference model, which never changes: scored once, kept on disk.

    wanted: {name: (Dataset, paths)}. Values are kept by pair and path, so no shuffling can
    misplace them.
    """

    def __init__(self, scorer, wanted):
        self.scorer, self.wanted = scorer, wanted
        self.values = {}  # id(dataset) -> {path: (N,)}

    def prepare(self, file, digest, get_model):
        """Read the cache `file`, or score everything and write it.

        digest: sha256 of the reference model's weights; get_model() gives the model itself. Returns
        {reference_seconds, reference_pairs}, or None where nothing had to be computed. UserError
        where a log-probability is not finite, with the pair it belongs to.
        """
        if not self.wanted:
            return None
        scorer, ranks, start = self.scorer, self.scorer.ranks, time.monotonic()
        key = ranks.share(lambda: reference_key(scorer.s, self.wanted.values(), digest))
        tensors = found = ranks.share(lambda: read_reference(file, key, ranks.say))
        if not found:
            model = get_model()
            tensors = {
                name: scorer.score_all(model, dataset, paths, f"reference {name}").cpu()
                for name, (dataset, paths) in self.wanted.items()
            }
            self.check(tensors)
            ranks.share(lambda: write_reference(tensors, file, key))
        for name, (dataset, paths) in self.wanted.items():
            self.values[id(dataset)] = by_path(tensors[name].to(ranks.device), paths)
        if found:
            return None
        n = sum(len(dataset) for dataset, _ in self.wanted.values())
        return {"reference_seconds": round(time.monotonic() - start, 3), "reference_pairs": n}

    def check(self, tensors):
        """UserError for the first pair whose reference log-probability is not finite."""
        for name, (dataset, _) in self.wanted.items():
            if len(bad := (~tensors[name].isfinite()).any(1).nonzero()):
                where = dataset.examples[bad[0].item()].where
                raise UserError(f"{where}: its reference log-probability is not finite")

    def of(self, dataset, pairs=slice(None)):
        """{path: values} of these pairs of a dataset; empty where nothing was wanted of it."""
        return {path: v[pairs] for path, v in self.values.get(id(dataset), {}).items()}


def reference_key(s, wanted, digest):
    """What the reference log-probabilities depend on, as one digest."""
    sha = hashlib.sha256(digest.encode())
    sha.update(json.dumps([s.dtype, s.attention, s.score_eos]).encode())
    for dataset, paths in wanted:
        sha.update(json.dumps([str(path) for path in paths]).encode())
        for i in range(len(dataset)):
            for path in paths:
                for segment in dataset.path(i, path)[0]:
                    sha.update(segment.tobytes())
    return sha.hexdigest()


def write_reference(tensors, file, key):
    """Write the cache aside, flush it, and give it its name."""
    aside = file.with_name(f".{file.name}")
    try:
        save_file(tensors, aside, metadata={"key": key, "sha256": content_digest(tensors)})
    except SafetensorError as error:
        raise UserError(
            f"{file} could not be written: {error}; mend that, then --resume"
        ) from error
    flush(aside)
    os.replace(aside, file)


def content_digest(tensors):
    """sha256 of the values: safetensors would read a flipped bit without a word."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(tensors[name].numpy().tobytes())
    return sha.hexdigest()


def read_reference(file, key, say):
    """{dataset name: (N, P)} from the cache, or None; says so when it belongs to something else."""
    if not file.exists():
        return None
    fault = "belongs to other weights, data or settings"
    try:
        with safe_open(file, "pt") as cached:
            known = cached.metadata() or {}
            if known.get("key") == key:
                tensors = {name: cached.get_tensor(name) for name in sorted(cached.keys())}
                if known.get("sha256") == content_digest(tensors):
                    return tensors
                fault = "is damaged"
    except SafetensorError:
        fault = "is damaged"
    say(f"{file} {fault}; computing it again")
    return None
