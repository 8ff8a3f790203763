"""Leaves out pairs that a Llama-Guard-style model calls unsafe; its verdicts are kept on disk.

A verdict is the probability that a dialogue is unsafe, or nan where the guard's chat template
refuses it. Verdicts are kept in `.FILE.guard` beside each data file (or in the cache's folder,
where that is read-only), so that the model runs once: before a run on many GPUs let
`python evaluate.py describe --guard …` do it on one. The model is families/llama_guard.py.
"""

import hashlib
import json
import math
import os
from collections import defaultdict
from pathlib import Path

from jobs.files import Store
from pairs.token_cache import cache_folder


def without_unsafe(pairs, guard, threshold, drops):
    """Pairs of which neither dialogue is unsafe with a probability over `threshold`.

    guard: guard.identity is a digest of all that decides its verdicts; guard(dialogues, label)
    takes {key: messages} and yields (key, probability of unsafe). The others go to `drops`.
    """
    verdicts, reasons = judged(pairs, guard), []
    for pair in pairs:
        unsafe = [verdicts[dialogue_key(messages)] for messages in dialogues(pair)]
        if any(map(math.isnan, unsafe)):
            reasons.append("the guard's template refuses the dialogue")
        else:
            reasons.append("unsafe" if max(unsafe) > threshold else None)
    return drops.sift(pairs, reasons)


def judged(pairs, guard):
    """{key of a dialogue: probability of unsafe}; the guard is asked where one is not known."""
    verdicts, files = {}, defaultdict(dict)
    for pair in pairs:
        file = pair.where.rpartition(":")[0]
        files[file] |= {dialogue_key(messages): messages for messages in dialogues(pair)}
    for file, asked in files.items():
        store = verdict_store(file, guard.identity)
        missing = {key: messages for key, messages in asked.items() if key not in store}
        for key, unsafe in guard(missing, f"guard {os.path.basename(file)}"):
            store[key] = unsafe  # as they come, so that a stopped run goes on
        verdicts |= store
    return verdicts


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
