"""Turns a record of published preference data into a pair; its layout is known by its columns.

`LAYOUTS` is the table: the first row whose columns a record has. Its `read` gives the parts of a
pair as they lie, raises `Dropped` where there is no pair, and UserError where a value is not what
the layout says. What the parts may be (text, messages, hh-rlhf transcripts, whole dialogues) is
worked out once, in `make_pair`. Two layouts look at all records of a source before they know their
pairs: SHP (a cap per prompt) and oasst1 (trees). docs/data.md has the rules.
"""

import hashlib
import math
import os
import random
import re
from collections import defaultdict
from functools import partial
from typing import NamedTuple

from hub.template import SHIELD
from jobs.cli import UserError

SCORES = ("score_{}", "{}_score", "{}_avg_rating", "{}_rating", "{}-rating", "rating_{}")
ROLES = {"prompter": "user", "assistant": "assistant"}  # in oasst1
HH = "\n\nHuman:"  # opens a transcript of Anthropic's hh-rlhf
# NUL, lone surrogates, which no tokenizer takes, and the mark of hub/template.py
BROKEN = re.compile(f"[\0\ud800-\udfff{SHIELD}]")


class Pair(NamedTuple):
    """A prompt and two answers to it, of which `chosen` is preferred."""

    prompt: list  # messages up to the answer; in a raw pair None where it stands in the answers
    chosen: str
    rejected: str | None  # None in supervised data
    where: str  # "file:row", for errors
    margin: float | None = None  # score of chosen minus that of rejected, if there are any


class Dropped(Exception):
    """This record gives no pair; the message is the reason, which is counted."""


def plain(record, where, end=""):  # end: of the names of the answers' columns
    """Reads prompt (or question, or instruction and input; with `system`), chosen, rejected."""
    names = ("prompt", "question", "instruction", "input")
    prompt = next((record[name] for name in names if record.get(name) is not None), None)
    task, details = record.get("instruction"), record.get("input")
    if prompt is task and isinstance(task, str) and isinstance(details, str) and details:
        prompt = f"{task}\n{details}"
    if isinstance(prompt, str) and isinstance(record.get("system"), str) and record["system"]:
        turns = {"system": record["system"], "user": prompt}
        prompt = [{"role": role, "content": text} for role, text in turns.items()]
    answers = record[f"chosen{end}"], record.get(f"rejected{end}")
    return Pair(prompt, *answers, where, score_margin(record, where))


def openbmb(record, where):
    """Reads UltraFeedback: the best completion against a random one with a lower score."""
    instruction, completions = record["instruction"], record["completions"]
    if not isinstance(instruction, str):
        raise UserError(f"{where}: instruction is {instruction!r:.40}; expected text")
    if not isinstance(completions, list) or not all(isinstance(c, dict) for c in completions):
        raise UserError(f"{where}: completions is {completions!r:.40}; expected a list of objects")
    rated = [(r, c.get("response")) for c in completions if (r := rating(c)) is not None]
    best = max(rated, key=lambda r: r[0], default=None)
    lower = [r for r in rated if r[0] < best[0]]
    if not lower:
        raise Dropped("no lower-rated completion")
    # drawn by the instruction, so that it is the same wherever the record lies
    digest = hashlib.sha256(instruction.encode("utf-8", "replace")).digest()
    worse = lower[int.from_bytes(digest[:8]) % len(lower)]
    return Pair(instruction, best[1], worse[1], where, best[0] - worse[0])


def rating(completion):
    """A completion's overall score, else the mean rating of its aspects, else None."""
    if (overall := number(completion.get("overall_score"))) is not None:
        return overall
    aspects = completion.get("annotations")
    aspects = aspects.values() if isinstance(aspects, dict) else ()
    found = (number(aspect.get("Rating")) for aspect in aspects if isinstance(aspect, dict))
    ratings = [rating for rating in found if rating is not None]
    return sum(ratings) / len(ratings) if ratings else None


def number(value):
    """A finite number, or a text of one -> float; else None ("N/A" occurs)."""
    try:
        value = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def score(value, name, where):
    """A score -> float, None for null; UserError also for NaN, which passes every comparison."""
    if (found := number(value)) is None and value is not None:
        raise UserError(f"{where}: {name} is {value!r:.40}; expected a finite number or null")
    return found


def score_margin(record, where):
    """Score of chosen minus that of rejected, under any of the published names; else None."""
    scores = record.get("all_rm_scores")  # princeton-nlp's: chosen is the best, rejected the worst
    if scores is not None and not isinstance(scores, list):
        raise UserError(f"{where}: all_rm_scores is {scores!r:.40}; expected a list of numbers")
    found = [score(s, "all_rm_scores", where) for s in scores or ()]
    if found and None not in found:
        return max(found) - min(found)
    for form in SCORES:
        names = form.format("chosen"), form.format("rejected")
        w, l = (score(record.get(name), name, where) for name in names)
        if w is not None and l is not None:
            return w - l
    return None


def shp(record, where):
    """Reads Stanford Human Preferences: labels 1 says that answer A is better, 0 that B is.

    After HALOs, a training pair needs a score ratio of at least 2.
    """
    if record["labels"] not in (0, 1):
        raise UserError(f"{where}: labels is {record['labels']!r:.40}; expected 0 or 1")
    if for_training(where):
        if (ratio := score(record.get("score_ratio"), "score_ratio", where)) is None:
            raise UserError(f"{where}: no score_ratio; it decides whether a pair is taken")
        if ratio < 2:
            raise Dropped("score ratio under 2")
    answers = record["human_ref_A"], record["human_ref_B"]
    return Pair(record["history"], *(answers if record["labels"] == 1 else answers[::-1]), where)


def for_training(where):
    """Whether neither the file's name nor its folder says test or validation."""
    folder, name = os.path.split(where)
    other = re.search(r"(^|[_-])(test|validation)[._-]", name)
    return not other and os.path.basename(folder) not in ("test", "validation")


def at_most_five(pairs, drops):
    """Keeps 5 training pairs of each prompt, drawn at random (after HALOs)."""
    places = defaultdict(list)
    for pair in (pair for pair in pairs if for_training(pair.where)):
        places[str(pair.prompt)].append(pair.where)
    taken = [random.Random(0).sample(g, min(5, len(g))) for g in places.values()]
    surplus = set().union(*places.values()).difference(*taken)
    for pair in pairs:
        if pair.where in surplus:
            drops.add("over 5 pairs of a prompt", pair.where)
        else:
            yield pair


class Message(NamedTuple):
    """A node of a tree. parent: None at its root; rank: 0 is the best of its siblings."""

    id: str
    parent: str | None
    role: str
    text: str
    lang: str
    rank: float | None
    where: str


def oasst(record, where):
    """Reads a record of OpenAssistant's oasst1, a flat table of trees -> Message."""
    values = [record[name] for name in ("message_id", "parent_id", "role", "text")]
    values += [record.get("lang") or "en"]
    for name, value in zip(Message._fields, values, strict=False):
        if not isinstance(value, str) and (name, value) != ("parent", None):
            raise UserError(f"{where}: the message's {name} is {value!r:.40}; expected text")
    if record["role"] not in ROLES:
        raise UserError(f"{where}: unknown role {record['role']!r:.40}")
    rank = record.get("rank")
    missing = isinstance(rank, float) and math.isnan(rank)  # so pandas writes a null
    return Message(*values, None if missing else score(rank, "rank", where), where)


def ranked_siblings(messages, drops):
    """Makes pairs of OpenAssistant's trees: an answer loses against the sibling one rank above it.

    After HALOs: English only; the prompt is the path from the root; ranked user turns give no pair.
    """
    by_id, by_rank = {}, {}
    for m in messages:
        if m.lang == "en":
            by_id.setdefault(m.id, m)
            by_rank.setdefault((m.parent, m.role, m.rank), m)
    for m in messages:
        better = m.rank and by_rank.get((m.parent, m.role, m.rank - 1))
        path = path_to_root(by_id, m)
        reasons = {
            "a user's message": m.role != "assistant",
            "not English": m.lang != "en",
            "no rank": m.rank is None,
            "best of its siblings": m.rank == 0,
            "no sibling a rank above": not better,
            "its parent is missing": not path,
        }
        if reason := next((name for name, holds in reasons.items() if holds), None):
            drops.add(reason, m.where)
        else:
            yield Pair(path, better.text, m.text, m.where)


def path_to_root(by_id, m):
    """Messages from the root to the parent of m; None where the tree is broken."""
    path = []
    while m.parent is not None:
        m = by_id.get(m.parent)
        if m is None or len(path) > len(by_id):
            return None
        path.append({"role": ROLES[m.role], "content": m.text})
    return path[::-1]


argilla = partial(plain, end="_response")
# (name, columns that a record must have, read, gather)
# read: (record, where) -> raw Pair, or what `gather` takes
# gather: (what `read` gave for all records, drops) -> yields raw Pairs; None where rows stand alone
LAYOUTS = (
    ("oasst1", ("message_id", "parent_id", "text", "role"), oasst, ranked_siblings),
    ("SHP", ("history", "human_ref_A", "human_ref_B", "labels"), shp, at_most_five),
    ("UltraFeedback", ("instruction", "completions"), openbmb, None),
    ("argilla", ("instruction", "chosen_response", "rejected_response"), argilla, None),
    ("chosen, rejected", ("chosen", "rejected"), plain, None),
)
SUPERVISED = (  # where there need be no rejected answer
    ("chosen", ("chosen",), plain, None),
    ("messages", ("messages",), lambda row, where: Pair(None, row["messages"], None, where), None),
)


def recognise(record, where, need_rejected=True):
    """(name, read, gather) of a record's layout, by its columns; UserError where none fits."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object with named columns")
    for name, columns, read, gather in LAYOUTS if need_rejected else LAYOUTS + SUPERVISED:
        if all(column in record for column in columns):
            return name, read, gather
    cure = "chosen and rejected, with or without prompt, or another layout of docs/data.md"
    raise UserError(f"{where}: columns {sorted(record)}; expected {cure}")


def to_pair(record, where, drops, need_rejected=True):
    """Makes the Pair of one record; None where there is none, which is counted in `drops`."""
    name, read, gather = recognise(record, where, need_rejected)
    if gather:
        raise UserError(f"{where}: {name} is read as a whole file, not by the row")
    try:
        return make_pair(read(record, where), need_rejected)
    except Dropped as reason:
        return drops.add(str(reason), where)


def make_pair(raw, need_rejected=True, ties=True):
    """Makes the Pair of a raw one; raises Dropped, or UserError for wrong types.

    ties: whether identical answers will do. They prefer nothing, but an evaluation counts them.
    """
    prompt, chosen, rejected, where, margin = raw
    if chosen is None or (rejected is None and need_rejected):
        raise Dropped("empty answer")
    if isinstance(chosen, str) and prompt is None and not chosen.startswith(HH):
        if not isinstance(rejected, str):
            raise UserError(f"{where}: without `prompt`, a `chosen` text needs a `rejected` text")
        shared = os.path.commonprefix([chosen, rejected])  # split at the last white space in it
        cut = max(shared.rfind(" "), shared.rfind("\n")) + 1
        prompt, chosen, rejected = chosen[:cut].rstrip(), chosen[cut:], rejected[cut:]
    x_w, chosen = dialogue(prompt, chosen, where)
    x_l, rejected = dialogue(prompt, rejected, where) if rejected is not None else (x_w, None)
    if x_w != x_l:
        raise Dropped("prompts differ")
    if not any(message["content"].strip() for message in x_w):
        raise Dropped("no prompt")
    if not chosen.strip() or (rejected is not None and not rejected.strip()):
        raise Dropped("empty answer")
    if any(map(BROKEN.search, [*(m["content"] for m in x_w), chosen, rejected or ""])):
        raise Dropped("broken text")
    if chosen == rejected and not ties:
        raise Dropped("identical answers")
    return Pair(x_w, chosen, rejected, where, margin)


def dialogue(prompt, answer, where):
    """(prompt, answer) in any layout -> (prompt messages, answer text)."""
    if isinstance(answer, str):
        if prompt is not None:
            return as_messages(prompt, where), answer
        messages, fault = parse_hh(answer), "the dialogue does not end with an answer"
    else:
        messages = as_messages(answer, where)
        fault = "the last message must be the assistant's answer"
        if len(messages) == 1 and prompt is not None:
            messages = as_messages(prompt, where) + messages
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError(f"{where}: {fault}")
    return messages[:-1], messages[-1]["content"]


def as_messages(value, where):
    """A string is one user turn; a list must hold {role, content} with string contents."""
    if isinstance(value, str):
        messages = parse_hh(value) if value.startswith(HH) else [{"role": "user", "content": value}]
        opened = messages[-1:] == [{"role": "assistant", "content": ""}]  # "…\n\nAssistant:"
        return messages[:-1] if opened else messages
    if not isinstance(value, list):
        raise UserError(f"{where}: expected text or messages, found {type(value).__name__}")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UserError(f"{where}: a message needs a role and a text content: {message!r:.80}")
        if (role := message.get("role")) not in ("system", "user", "assistant"):
            raise UserError(f"{where}: unknown role {role!r}")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def parse_hh(text):
    """Anthropic's hh-rlhf transcript -> messages."""
    parts = re.split(r"\n\n(Human|Assistant):", text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[who], "content": content.strip()} for who, content in turns]
