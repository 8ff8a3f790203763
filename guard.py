"""The safety filter: pairs that a Llama-Guard-style model calls unsafe are left out.

Such a model is a language model whose chat template wraps a dialogue in its policy and asks for
"safe" or "unsafe". The verdict is a number, the probability of "unsafe" against "safe" as the first
word of its answer; it needs no sampling. Verdicts are stored in `FILE.guard.jsonl` beside each
data file (or in the cache's folder, where that is read-only), so that the model runs once.
"""

import hashlib
import json
import os
from collections import defaultdict
from pathlib import Path

import torch

from cli import UserError, progress
from rows import build_row, lay_out
from tokens import folder
from weights import Weights, resolve


def safe(pairs, source, threshold, drops, device="auto"):
    """Pairs of which neither dialogue is unsafe with a probability over `threshold`.

    source: HF directory or hub id of the guard. The others are added to `drops`.
    """
    directory = resolve(source, "--guard")
    known = Verdicts(Weights(directory).digest())
    files = defaultdict(list)
    for pair in pairs:
        files[pair.where.rpartition(":")[0]].append(pair)
    judge, flagged = None, set()
    for file, group in files.items():
        verdicts = known.read(file)
        missing = {key(d): d for p in group for d in dialogues(p) if key(d) not in verdicts}
        if missing:
            judge = judge or Guard(directory, device)
            verdicts |= known.write(file, judge(missing, file))
        unsafe = (p for p in group if max(verdicts[key(d)] for d in dialogues(p)) > threshold)
        flagged |= {pair.where for pair in unsafe}
    for pair in pairs:
        if pair.where in flagged:
            drops.add("unsafe", pair.where)
    return [pair for pair in pairs if pair.where not in flagged]


def dialogues(pair):
    """The dialogue with each of its answers."""
    answers = (pair.chosen, pair.rejected)
    return [[*pair.prompt, {"role": "assistant", "content": a}] for a in answers if a is not None]


def key(messages):
    return hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:32]


class Verdicts:
    """{key of a dialogue: probability of unsafe} by data file, for one guard model."""

    def __init__(self, model):
        self.model = model

    def _places(self, file):
        """Beside the data, else in the cache."""
        name = hashlib.sha256(os.path.realpath(file).encode()).hexdigest()[:16]
        return Path(f"{file}.guard.jsonl"), folder() / "guard" / f"{name}.jsonl"

    def read(self, file):
        """Verdicts of this guard; a line cut off by a crash is skipped."""
        found = {}
        for place in filter(Path.exists, self._places(file)):
            for line in place.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    if row["model"] == self.model:
                        found[row["dialogue"]] = float(row["unsafe"])
                except (ValueError, KeyError, TypeError):
                    continue
        return found

    def write(self, file, verdicts):
        """Append (key, probability) as they come, so that a stopped run goes on; -> as a dict."""
        found = {}
        with self._open(file) as f:
            for dialogue, unsafe in verdicts:
                found[dialogue] = unsafe
                row = {"dialogue": dialogue, "unsafe": round(unsafe, 6), "model": self.model}
                f.write(json.dumps(row) + "\n")
        return found

    def _open(self, file):
        beside, cached = self._places(file)
        try:
            return beside.open("a", encoding="utf-8", buffering=1)
        except OSError:
            cached.parent.mkdir(parents=True, exist_ok=True)
            return cached.open("a", encoding="utf-8", buffering=1)


class Guard:
    """A language model that answers "safe" or "unsafe"."""

    def __init__(self, directory, device):
        from generate import load_model

        self.model, self.template = load_model(directory, device=device, name="--guard")
        self.words = self._words()

    def _words(self):
        """First ids of "safe" and "unsafe", (1,) arrays; UserError where they are the same."""
        words = [ids[:1] for ids in self.template.encode(["safe", "unsafe"])]
        if words[0].tolist() == words[1].tolist():
            raise UserError("--guard: its tokenizer gives safe and unsafe the same first token")
        return words

    @torch.no_grad()
    def __call__(self, missing, label):
        """{key: dialogue} -> (key, probability of unsafe), one after the other."""
        device = next(self.model.parameters()).device
        with progress(f"guard {os.path.basename(label)}", len(missing), "dialogue") as bar:
            for name, messages in missing.items():
                text = self.template.render(messages, generation=True)
                prompt = self.template.encode([text])[0]
                ends = [([prompt, word], 1) for word in self.words]
                row = build_row([lay_out(ends)], [0], 2).to(device)
                safe, unsafe = row.sums(self.model(row))[0].tolist()
                bar.update()
                yield name, torch.tensor(unsafe - safe).sigmoid().item()
