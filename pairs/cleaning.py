"""Leaves out pairs by InSPO's cleaning rules (appendix D.2); what is dropped is counted.

Each rule is a flag, off by default; the paper has answers of 32 to 2048 tokens.

A guard's verdict is the probability that a dialogue is unsafe, or nan where its chat template
refuses it. Verdicts are kept in `.FILE.guard` beside each data file (or in the cache's folder,
where that is read-only), so that the model runs once. All processes of a run share the work
(train.load_data). The model is families/llama_guard.py.
"""

import hashlib
import json
import math
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from jobs.cli import UserError, flag, progress
from jobs.files import Store
from pairs.messages import all_said
from pairs.token_cache import cache_folder


@dataclass(frozen=True)
class CleaningFlags:
    """Rules that leave pairs out, all of them off by default."""

    dedup: bool = flag(False, "leave out exact duplicates")
    max_answer: int | None = flag(None, "no pairs with an answer over so many tokens", least=1)
    min_answer: int | None = flag(None, "leave out pairs with both answers under so many tokens")
    min_margin: float | None = flag(None, "no pairs with a smaller score difference", least=-1e9)
    guard: str | None = flag(None, "leave out what this Llama-Guard-style model calls unsafe")
    guard_threshold: float = flag(0.5, "probability of unsafe that leaves a pair out", most=1)

    @classmethod
    def of(cls, s):
        """These flags alone, of a command that inherits them."""
        return cls(**{name: getattr(s, name) for name in cls.__dataclass_fields__})


def clean(pairs, rules, template, drops, guard=None):
    """The pairs that pass all rules, cheap rules first; the others are added to `drops`.

    rules: CleaningFlags. Lengths are in tokens of `template` (hub.template.Template) without the
    end token. guard: the model that --guard names, as below. UserError where nothing is left.
    """
    if rules.dedup:
        pairs = drops.sift(pairs, duplicates(pairs))
    if (least := rules.min_margin) is not None:
        passes = (pair.margin is None or pair.margin >= least for pair in pairs)
        pairs = drops.sift(pairs, (None if p else f"margin under {least:g}" for p in passes))
    if rules.max_answer is not None or rules.min_answer is not None:
        pairs = drops.sift(pairs, wrong_lengths(pairs, rules, template))
    if guard is not None:
        pairs = without_unsafe(pairs, guard, rules.guard_threshold, drops)
    if not pairs:
        raise UserError(f"no pair is left after cleaning; dropped: {drops}")
    return pairs


def duplicates(pairs):
    """Yields a reason, or None for the first pair of equal ones and the copies a weight made."""
    seen = {}
    for pair in pairs:
        prompt = tuple((m["role"], all_said(m)) for m in pair.prompt)
        first = seen.setdefault((prompt, pair.chosen, pair.rejected), pair.where)
        yield None if first == pair.where else "duplicate"


def wrong_lengths(pairs, rules, template):
    """Yields a reason where an answer is over max_answer tokens, or both are under min_answer."""
    for start in range(0, len(pairs), 512):
        block = pairs[start : start + 512]
        lengths = template.lengths(t for pair in block for t in (pair.chosen, pair.rejected or ""))
        for longer in map(max, lengths[::2], lengths[1::2]):
            long = rules.max_answer is not None and longer > rules.max_answer
            short = longer < (rules.min_answer or 0)
            reason = f"both answers under {rules.min_answer} tokens" if short else None
            yield f"answer over {rules.max_answer} tokens" if long else reason


def without_unsafe(pairs, guard, threshold, drops):
    """Pairs of which neither dialogue is unsafe with a probability over `threshold`.

    guard: guard.identity is a digest of all that decides its verdicts; guard(dialogues) takes
    {key: messages} and yields (key, probability of unsafe). The others go to `drops`.
    """
    files, verdicts, reasons = defaultdict(dict), {}, []
    for pair in pairs:
        file = pair.where.rpartition(":")[0]
        files[file] |= {dialogue_key(messages): messages for messages in dialogues(pair)}
    for file, asked in files.items():
        store = verdict_store(file, guard.identity)
        missing = {key: messages for key, messages in asked.items() if key not in store}
        with progress(f"guard {os.path.basename(file)}", len(missing), "dialogue") as bar:
            for key, unsafe in guard(missing):
                store[key] = unsafe  # as they come, so that a stopped run goes on
                bar.update()
        verdicts |= store
    for pair in pairs:
        unsafe = [verdicts[dialogue_key(messages)] for messages in dialogues(pair)]
        reasons.append("unsafe" if max(unsafe) > threshold else None)
        if any(map(math.isnan, unsafe)):
            reasons[-1] = "the guard's template refuses the dialogue"
    return drops.sift(pairs, reasons)


def dialogues(pair):
    """The dialogue with each of its answers."""
    answers = (pair.chosen, pair.rejected)
    return [[*pair.prompt, {"role": "assistant", "content": a}] for a in answers if a is not None]


def dialogue_key(messages):
    return hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:32]


def verdict_store(file, identity):
    """One guard's verdicts on a data file, as a dict that is kept beside it or in the cache."""
    columns = ("dialogue", "unsafe")
    # hidden, so that no glob takes it for data
    beside = Store(Path(file).with_name(f".{Path(file).name}.guard"), columns, model=identity)
    if beside.file:
        return beside
    name = hashlib.sha256(os.path.realpath(file).encode()).hexdigest()[:16]
    store = Store(cache_folder("guard") / f"{name}.jsonl", columns, model=identity)
    dict.update(store, beside | store)  # in memory alone
    return store
