"""The safety filter: pairs that a Llama-Guard-style model calls unsafe are left out.

Such a model is a language model whose chat template wraps a dialogue in its policy and asks for
"safe" or "unsafe". The verdict is a number, the probability that its answer is "unsafe" rather than
"safe"; it needs no sampling. Verdicts are stored in `.FILE.guard` beside each data file (or in
the cache's folder, where that is read-only), so that the model runs once: before a run on many GPUs
let `python evaluate.py describe --guard …` do it on one.
"""

import contextlib
import hashlib
import json
import math
import os
from collections import defaultdict
from pathlib import Path

import torch

from data import build_row, lay_out
from hub.template import Refused, Template
from hub.weights import Weights, resolve
from jobs.cli import progress
from pairs.token_cache import folder


def safe(pairs, source, threshold, drops, device="auto"):
    """Pairs of which neither dialogue is unsafe with a probability over `threshold`.

    source: HF directory or hub id of the guard. The others are added to `drops`.
    """
    verdicts, kept = judged(pairs, source, device), []
    for pair in pairs:
        unsafe = [verdicts[key(dialogue)] for dialogue in dialogues(pair)]
        if any(map(math.isnan, unsafe)):
            drops.add("the guard's template refuses the dialogue", pair.where)
        elif max(unsafe) > threshold:
            drops.add("unsafe", pair.where)
        else:
            kept.append(pair)
    return kept


def judged(pairs, source, device):
    """{key of a dialogue: probability of unsafe}; the model is loaded where one is not known."""
    store, verdicts, judge = Verdicts(identity(source)), {}, None
    files = defaultdict(list)
    for pair in pairs:
        files[pair.where.rpartition(":")[0]].append(pair)
    for file, group in files.items():
        verdicts |= store.read(file)
        missing = {key(d): d for p in group for d in dialogues(p) if key(d) not in verdicts}
        if missing:
            judge = judge or Guard(source, device)
            verdicts |= store.write(file, judge(missing, file))
    return verdicts


def identity(source):
    """sha256 of what decides a guard's verdicts: weights, configuration, tokenizer and template."""
    directory = resolve(source, "--guard")
    sha = hashlib.sha256(Weights(directory).digest().encode())
    sha.update((directory / "config.json").read_bytes())
    sha.update((directory / "tokenizer.json").read_bytes())
    sha.update(Template(directory).source.encode())
    return sha.hexdigest()


def dialogues(pair):
    """The dialogue with each of its answers."""
    answers = (pair.chosen, pair.rejected)
    return [[*pair.prompt, {"role": "assistant", "content": a}] for a in answers if a is not None]


def key(messages):
    return hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:32]


class Verdicts:
    """Probabilities of unsafe by data file, for one guard model (its `identity`)."""

    def __init__(self, model):
        self.model = model

    def _places(self, file):
        """Beside the data, hidden so that no glob takes it for data; else in the cache."""
        name = hashlib.sha256(os.path.realpath(file).encode()).hexdigest()[:16]
        beside = Path(file).with_name(f".{Path(file).name}.guard")
        return beside, folder() / "guard" / f"{name}.jsonl"

    def read(self, file):
        """{key: probability} of this guard; a line cut off by a crash is skipped."""
        lines, found = [], {}
        for place in self._places(file):
            with contextlib.suppress(OSError):  # most often: there is none
                lines += place.read_text(encoding="utf-8").splitlines()
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                if row["model"] == self.model:
                    found[row["dialogue"]] = float(row["unsafe"])
        return found

    def write(self, file, verdicts):
        """Append (key, probability) as they come, so that a stopped run goes on; -> as a dict."""
        found = {}
        with self._open(file) as f:
            f.write("\n")  # behind a line that was cut off
            for dialogue, unsafe in verdicts:
                found[dialogue] = unsafe
                row = {"dialogue": dialogue, "unsafe": unsafe, "model": self.model}
                f.write(json.dumps(row) + "\n")
        return found

    def _open(self, file):
        """The file to append to, in the first place that can be written; else one that forgets."""
        for place in self._places(file):
            with contextlib.suppress(OSError):
                place.parent.mkdir(parents=True, exist_ok=True)
                return place.open("a", encoding="utf-8", buffering=1)
        return open(os.devnull, "w", encoding="utf-8")


class Guard:
    """A language model that answers "safe" or "unsafe"."""

    ANSWERS = ("safe", "\n\nsafe", "unsafe", "\n\nunsafe")  # some open with a blank line

    def __init__(self, directory, device):
        from generate import load_model

        self.model, self.template = load_model(directory, device=device, name="--guard")
        self.answers = self.template.encode(self.ANSWERS)

    @torch.no_grad()
    def __call__(self, missing, label):
        """{key: dialogue} -> (key, probability of unsafe), one after the other."""
        with progress(f"guard {os.path.basename(label)}", len(missing), "dialogue") as bar:
            for name, messages in missing.items():
                yield name, self.unsafe(messages)
                bar.update()

    def unsafe(self, messages):
        """Probability that the answer begins with "unsafe" rather than "safe".

        nan where the guard's template refuses the dialogue.
        """
        try:
            text = self.template.render(messages, generation=True)
        except Refused:
            return math.nan
        prompt = self.template.encode([text])[0]
        paths = [([prompt, answer], len(answer)) for answer in self.answers]
        device = next(self.model.parameters()).device
        row = build_row([lay_out(paths)], [0], len(paths)).to(device)
        logps = row.sums(self.model(row))[0]  # (4,)
        return logps.softmax(0)[2:].sum().item()
