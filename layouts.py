"""The layouts of published preference data, recognised by their columns: one record -> one pair.

`LAYOUTS` is the table: first row whose columns a record has. A layout's function gives the fields
of a pair as they lie, or raises `Dropped` with the rule; what the fields may hold (text, messages,
hh-rlhf transcripts, whole dialogues) is worked out once, in `to_pair`. Two layouts look at all
records of a source before they know their pairs: SHP (a cap per prompt) and oasst1 (trees).
"""

import hashlib
import os
import random
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from cli import UserError
from template import SHIELD


@dataclass
class Pair:
    """prompt: messages up to the answer; chosen, rejected: texts; where: "file:row" for errors;
    margin: score of chosen minus score of rejected, where the data has scores."""

    prompt: list
    chosen: str
    rejected: str | None
    where: str
    margin: float | None = None


class Fields(NamedTuple):
    """The parts of a pair as they lie. prompt None: it stands inside the answers."""

    prompt: object
    chosen: object
    rejected: object
    margin: float | None = None


class Dropped(Exception):
    """This record gives no pair; the message is the rule that says why."""


# ----------------------------------------------------------------------------- one record, one pair


def plain(record):
    """prompt (or question, input, instruction; with a `system` text), chosen, rejected."""
    names = ("prompt", "question", "input", "instruction")
    prompt = next((record[name] for name in names if record.get(name) is not None), None)
    if isinstance(prompt, str) and isinstance(record.get("system"), str) and record["system"]:
        turns = (("system", record["system"]), ("user", prompt))
        prompt = [{"role": role, "content": text} for role, text in turns]
    return Fields(prompt, record["chosen"], record.get("rejected"), score_margin(record))


def princeton(record):
    """chosen is the best and rejected the worst of the generations under a reward model."""
    scores = [s for s in record["all_rm_scores"] or () if isinstance(s, int | float)]
    margin = max(scores) - min(scores) if scores else None
    return Fields(record["prompt"], record["chosen"], record["rejected"], margin)


def argilla(record):
    answers = record["chosen_response"], record["rejected_response"]
    return Fields(record["instruction"], *answers, score_margin(record))


def openbmb(record):
    """The best completion against a random one with a lower score, drawn by the instruction."""
    completions = record["completions"]
    if not isinstance(completions, list) or not isinstance(record["instruction"], str):
        raise Dropped("no completions")
    rated = [(rating(c), c.get("response")) for c in completions if isinstance(c, dict)]
    rated = [(score, text) for score, text in rated if score is not None]
    best = max(rated, key=lambda r: r[0], default=None)
    lower = [r for r in rated if r[0] < best[0]] if best else []
    if not lower:
        raise Dropped("no lower-rated completion")
    digest = hashlib.sha256(record["instruction"].encode("utf-8", "replace")).digest()
    worse = lower[int.from_bytes(digest[:8]) % len(lower)]
    return Fields(record["instruction"], best[1], worse[1], best[0] - worse[0])


def rating(completion):
    """A completion's overall score, else the mean of its aspects' ratings, else None."""
    if (score := number(completion.get("overall_score"))) is not None:
        return score
    aspects = completion.get("annotations")
    aspects = list(aspects.values()) if isinstance(aspects, dict) else []
    ratings = [number(a.get("Rating")) for a in aspects if isinstance(a, dict)]
    ratings = [r for r in ratings if r is not None]
    return sum(ratings) / len(ratings) if ratings else None


def number(value):
    """int, float or a text of one -> float; else None ("N/A" occurs)."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def score_margin(record):
    """score_chosen - score_rejected, under any of the published names; None without scores."""
    for form in ("score_{}", "{}_score", "{}_avg_rating", "{}_rating", "{}-rating"):
        w, l = (number(record.get(form.format(a))) for a in ("chosen", "rejected"))
        if w is not None and l is not None:
            return w - l
    return None


def messages_only(record):
    """A finished dialogue: its last message is the target (supervised training)."""
    return Fields(None, record["messages"], None)


# ----------------------------------------------------------------------------- many records


SHP_RATIO, SHP_PAIRS = 2.0, 5


def shp(rows):
    """Stanford Human Preferences, after HALOs: of the training split pairs with a score ratio of at
    least 2, and at most 5 random pairs per prompt; other splits whole. labels 1: A is better."""
    kept, places = {}, defaultdict(list)
    for where, r in rows:
        train = not re.search(r"(^|[/_-])(test|validation)[-./_]", where)
        ratio = number(r.get("score_ratio"))
        if train and ratio is not None and ratio < SHP_RATIO:
            yield where, "score ratio under 2"
        elif r["labels"] not in (0, 1):
            yield where, "no label"
        else:
            answers = r["human_ref_A"], r["human_ref_B"]
            kept[where] = Fields(r["history"], *(answers if r["labels"] == 1 else answers[::-1]))
            if train:
                places[str(r["history"])].append(where)
    surplus = set()
    for group in places.values():
        taken = random.Random(0).sample(group, min(SHP_PAIRS, len(group)))
        surplus |= set(group) - set(taken)
    for where, fields in kept.items():
        yield where, "over 5 pairs of a prompt" if where in surplus else fields


def oasst(rows):
    """OpenAssistant trees, after HALOs: English; each ranked answer loses against the sibling
    one rank above it; the prompt is the path from the root. Ranked user turns give no pair."""
    rows = list(rows)
    message = {r["message_id"]: r for _, r in rows}
    ranked = {(r["parent_id"], r.get("rank")): r for _, r in rows if r.get("rank") is not None}
    for where, r in rows:
        better = None
        if r["role"] != "assistant":
            rule = "a user's message"
        elif r.get("lang", "en") != "en":
            rule = "not English"
        elif not isinstance(r.get("rank"), int | float):
            rule = "no rank"
        elif r["rank"] == 0:
            rule = "best of its siblings"
        else:
            better, rule = ranked.get((r["parent_id"], r["rank"] - 1)), "no sibling a rank above"
        path = better and path_to_root(message, r)
        if better and path is None:
            rule = "its parent is missing"
        yield where, Fields(path, better["text"], r["text"]) if path else rule


def path_to_root(message, node):
    """Messages from the root to the node's parent; None where the tree is broken."""
    path, roles = [], {"prompter": "user", "assistant": "assistant"}
    while node["parent_id"] is not None:
        node = message.get(node["parent_id"])
        if node is None or len(path) > len(message) or node["role"] not in roles:
            return None
        path.append({"role": roles[node["role"]], "content": node["text"]})
    return path[::-1]


# ----------------------------------------------------------------------------- the table


class Layout(NamedTuple):
    """columns: what a record must have; read: record -> Fields; gather: rows -> (where, Fields or
    the rule that drops the row)."""

    name: str
    columns: tuple
    read: Callable | None = None
    gather: Callable | None = None


LAYOUTS = (
    Layout("oasst1", ("message_id", "parent_id", "text", "role"), gather=oasst),
    Layout("SHP", ("history", "human_ref_A", "human_ref_B", "labels"), gather=shp),
    Layout("UltraFeedback", ("instruction", "completions"), openbmb),
    Layout("argilla", ("instruction", "chosen_response", "rejected_response"), argilla),
    Layout("princeton-nlp", ("prompt", "chosen", "rejected", "all_rm_scores"), princeton),
    Layout("chosen, rejected", ("chosen",), plain),
    Layout("messages", ("messages",), messages_only),
)


def recognise(record, where):
    """The layout of a record by its columns; UserError where none fits."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object with named columns")
    for layout in LAYOUTS:
        if all(column in record for column in layout.columns):
            return layout
    raise UserError(
        f"{where}: columns {sorted(record)}; expected chosen and rejected, with or without prompt"
        ", or another layout of docs/data.md"
    )


def to_pair(record, where, drops, need_rejected=True):
    """One record -> Pair, or None when dropped (and counted)."""
    layout = recognise(record, where)
    if layout.read is None:
        raise UserError(f"{where}: {layout.name} is read as a whole file, not by the row")
    if need_rejected and layout.columns[0] in ("chosen", "messages") and "rejected" not in record:
        raise UserError(
            f"{where}: columns {sorted(record)}; expected chosen and rejected, "
            "with or without prompt"
        )
    try:
        return make_pair(layout.read(record), where, need_rejected)
    except Dropped as rule:
        return drops.add(str(rule), where)


def make_pair(fields, where, need_rejected=True):
    """Fields as they lie -> Pair. Raises Dropped with the rule, or UserError for wrong types."""
    prompt, chosen, rejected, margin = fields
    if chosen is None or (rejected is None and need_rejected):
        raise Dropped("empty answer")
    if isinstance(chosen, str) and prompt is None and not is_hh(chosen):
        prompt, chosen, rejected = common_prefix(chosen, rejected, where)
    x_w, chosen = dialogue(prompt, chosen, where)
    x_l, rejected = dialogue(prompt, rejected, where) if rejected is not None else (x_w, None)
    if x_w != x_l:
        raise Dropped("prompts differ")
    if not any(message["content"].strip() for message in x_w):
        raise Dropped("no prompt")
    if not chosen.strip() or (rejected is not None and not rejected.strip()):
        raise Dropped("empty answer")
    if chosen == rejected:
        raise Dropped("identical answers")
    if not all(map(is_text, [m["content"] for m in x_w] + [chosen, rejected or ""])):
        raise Dropped("broken text")
    return Pair(x_w, chosen, rejected, where, margin)


def is_text(text):
    """No lone surrogate, which no tokenizer takes, no NUL, and not the mark of template.py."""
    if "\0" in text or SHIELD in text:
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ----------------------------------------------------------------------------- dialogues


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
