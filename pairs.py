"""Preference pairs, read as they lie.

A pair (x, y_w, y_l) comes as one record of a file in any of these layouts:

    explicit   prompt, chosen, rejected: strings or lists of {role, content} messages
    implicit   chosen, rejected with the prompt inside: messages, or strings with a common prefix
    hh-rlhf    chosen, rejected as "\\n\\nHuman: ...\\n\\nAssistant: ..." dialogues
    sft        prompt and chosen alone, or `messages`, where the objective scores no rejected answer
"""

import glob
import gzip
import math
import os
import re
import zlib
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from cli import UserError
from template import parse_json

HOLD_OUT = 2**32 - 1  # the seed's stream for the hold-out, apart from those of the epochs

# ----------------------------------------------------------------------------- reading


@dataclass
class Pair:
    """prompt: messages up to the answer; chosen, rejected: texts; where: "file:row" for errors."""

    prompt: list
    chosen: str
    rejected: str | None
    where: str


class Drops:
    """Pairs left out, by rule, with where they stand; nothing is dropped without a count."""

    def __init__(self):
        self.rules = defaultdict(list)

    def add(self, rule, where):
        self.rules[rule].append(where)

    def __str__(self):
        rules = (
            f"{len(where)} {rule} ({', '.join(where[:2])}{', …' if len(where) > 2 else ''})"
            for rule, where in self.rules.items()
        )
        return "; ".join(rules) or "none"


def read_pairs(source, drops, limit=None, need_rejected=True, revision=None):
    """All pairs of a file, glob or hub dataset id (`id` or `id:split`), in their order.

    limit: stop after that many. Pairs whose two prompts differ, or with an empty answer, are
    added to `drops`. revision: branch, tag or commit on the hub. Raises UserError for a
    missing file, a broken row, unknown columns, a score that is NaN or infinite.
    """
    pairs = []
    for file in data_files(source, revision):
        for where, record in records(file):
            if limit is not None and len(pairs) >= limit:
                return pairs
            pair = to_pair(record, where, drops, need_rejected)
            if pair is not None:
                pairs.append(pair)
    if not pairs:
        raise UserError(f"{source}: no usable pairs; dropped: {drops}")
    return pairs


def data_files(source, revision=None):
    """Local path, glob, or hub dataset id -> list of local files."""
    if os.path.isfile(source):
        return [source]
    if found := sorted(filter(os.path.isfile, glob.glob(source))):
        return found
    name, _, split = source.partition(":")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not re.search(r"\.(jsonl?|gz|parquet)$", name):
        return hub_files(name, split, revision)
    raise UserError(f"--data {source}: no such file; give a path, a glob or a hub dataset id")


def hub_files(name, split, revision=None):
    """Download the files of one split of a hub dataset; by default train_prefs, else train."""
    import huggingface_hub

    try:
        where = {"repo_type": "dataset", "revision": revision}
        listed = huggingface_hub.HfApi().list_repo_files(name, **where)
        files = [f for f in listed if f.endswith((".parquet", ".jsonl", ".jsonl.gz", ".json"))]
        splits = [split] if split else ["train_prefs", "train"]
        for wanted in splits:
            pattern = re.compile(rf"(^|[/_-]){re.escape(wanted)}([-./]|$)")
            if chosen := [f for f in files if pattern.search(f)]:
                cached = huggingface_hub.hf_hub_download
                return [cached(name, f, **where) for f in chosen]
    except Exception as error:  # the hub client raises some twenty kinds; all mean: not reachable
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--data {name}: not a file, and the hub did not serve it: {reason}"
        ) from error
    raise UserError(f"--data {name}: no files of split {' or '.join(splits)} among {files[:5]}")


def records(file):
    """Yield ("file:row", dict) for jsonl, jsonl.gz, json and parquet; rows count from 1."""
    try:
        yield from _records(file)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{file}: not readable: {error}") from error


def _records(file):
    if file.endswith(".parquet"):
        import pyarrow.parquet

        try:
            batches = pyarrow.parquet.ParquetFile(file).iter_batches()
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from ((f"{file}:{n}", row) for n, row in enumerate(rows, 1))
        except pyarrow.ArrowException as error:
            raise UserError(f"{file}: not readable as parquet: {error}") from error
    elif file.endswith(".json"):
        with open(file, encoding="utf-8") as f:
            rows = parse_json(f.read(), file)
        if not isinstance(rows, list):
            raise UserError(f"{file}: expected a list of records, found {type(rows).__name__}")
        yield from ((f"{file}:{n}", row) for n, row in enumerate(rows, 1))
    else:
        opened = gzip.open if file.endswith(".gz") else open
        with opened(file, "rt", encoding="utf-8", newline="\n") as f:
            for n, line in enumerate(f, 1):
                if line.strip():
                    yield f"{file}:{n}", parse_json(line, f"{file}:{n}")


def to_pair(record, where, drops, need_rejected=True):
    """One record -> Pair, or None when dropped (and counted)."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object with named columns")
    chosen, rejected = record.get("chosen", record.get("messages")), record.get("rejected")
    if chosen is None or (rejected is None and need_rejected):
        raise UserError(
            f"{where}: columns {sorted(record)}; expected chosen and rejected, "
            "with or without prompt"
        )
    for column, value in record.items():
        refuse_no_number(column, value, where)
    prompt = record.get("prompt")
    if isinstance(chosen, str) and prompt is None and not is_hh(chosen):
        prompt, chosen, rejected = common_prefix(chosen, rejected, where)
    x_w, chosen = dialogue(prompt, chosen, where)
    x_l, rejected = dialogue(prompt, rejected, where) if rejected is not None else (x_w, None)
    if x_w != x_l:
        return drops.add("prompts differ", where)
    if not any(message["content"].strip() for message in x_w):
        return drops.add("no prompt", where)
    if not chosen.strip() or (rejected is not None and not rejected.strip()):
        return drops.add("empty answer", where)
    return Pair(x_w, chosen, rejected, where)


def refuse_no_number(column, value, where):
    """UserError for a score that is NaN or infinite: then nobody knows which answer won."""
    scores = value if isinstance(value, list) else [value]
    for score in scores if re.search("score|rating|reward", column) else ():
        if isinstance(score, float) and not math.isfinite(score):
            raise UserError(f"{where}: {column} is {score}; expected a finite number or null")


def dialogue(prompt, answer, where):
    """(prompt, answer) in any layout -> (prompt messages, answer text)."""
    if isinstance(answer, str):
        if prompt is None:
            messages = parse_hh(answer)
            if not messages or messages[-1]["role"] != "assistant":
                raise UserError(f"{where}: the dialogue does not end with an answer")
        else:
            return as_messages(prompt, where), answer
    else:
        messages = as_messages(answer, where)
        if not messages or messages[-1]["role"] != "assistant":
            raise UserError(f"{where}: the last message must be the assistant's answer")
        if len(messages) == 1 and prompt is not None:
            messages = as_messages(prompt, where) + messages
    return messages[:-1], messages[-1]["content"]


def as_messages(value, where):
    """A string is one user turn; a list must hold {role, content} with string contents."""
    if isinstance(value, str):
        messages = parse_hh(value) if is_hh(value) else [{"role": "user", "content": value}]
        opened = messages[-1:] == [{"role": "assistant", "content": ""}]  # "…\n\nAssistant:"
        return messages[:-1] if opened else messages
    if not isinstance(value, list):
        raise UserError(f"{where}: expected text or messages, found {type(value).__name__}")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UserError(f"{where}: a message needs a role and a text content: {message!r:.80}")
        if message.get("role") not in ("system", "user", "assistant"):
            raise UserError(f"{where}: unknown role {message.get('role')!r}")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def is_hh(text):
    return text.startswith("\n\nHuman:")


def parse_hh(text):
    """Anthropic's hh-rlhf transcript -> messages."""
    parts = re.split(r"\n\n(Human|Assistant):", text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[who], "content": content.strip()} for who, content in turns]


def common_prefix(chosen, rejected, where):
    """Two whole texts -> (prompt, chosen, rejected), split at the last white space they share."""
    if not isinstance(rejected, str):
        raise UserError(f"{where}: without `prompt`, a `chosen` text needs a `rejected` text")
    shared = os.path.commonprefix([chosen, rejected])
    cut = max(shared.rfind(" "), shared.rfind("\n")) + 1
    return chosen[:cut].rstrip(), chosen[cut:], rejected[cut:]


def hold_out(pairs, n, seed):
    """Split off n random pairs for validation -> (train, held out)."""
    if n >= len(pairs):
        raise UserError(f"--eval_pairs {n} leaves nothing of {len(pairs)} pairs to train on")
    order = np.random.default_rng((seed, HOLD_OUT)).permutation(len(pairs))
    held = set(order[:n].tolist())
    train = [pair for i, pair in enumerate(pairs) if i not in held]
    return train, [pairs[i] for i in sorted(held)]
