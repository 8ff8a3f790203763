"""Turns a record of published preference data into a pair; its layout is known by its columns.

`layout_of` tells the shape by the names of columns: a preferred and another answer (`plain`), two
answers and who won (`two_answers`), a list of answers with scores (`listed`). Its `read` gives the
parts as they lie, raises `Dropped` where there is no pair, and UserError where a value is not what
the layout says. What the parts may be (text, messages, transcripts, whole dialogues) messages.py
tells, and `make_pair` asks it once. Two datasets look at all records of a source before they know
their pairs: SHP (a cap per prompt) and oasst1 (trees). docs/data.md has the rules.
"""

import contextlib
import hashlib
import json
import math
import os
import random
import re
from collections import defaultdict
from functools import lru_cache, partial
from itertools import product
from typing import NamedTuple

from hub.template import SHIELD
from jobs.cli import UserError
from pairs.columns import account, kind_of, texts_in
from pairs.messages import (
    TURNS,
    all_said,
    as_messages,
    dialogue,
    interleaved,
    joined,
    parsed,
    texts_alone,
)

SCORES = ("score_{}", "{}_score", "{}_avg_rating", "{}_rating", "{}-rating", "rating_{}")
SCORES += ("reward_{}", "{}_reward")
# NUL, lone surrogates, which no tokenizer takes, and the mark of hub/template.py
BROKEN = re.compile(f"[\0\ud800-\udfff{SHIELD}]")
# what a chat template writes: prompts that were rendered before hold it
RENDERED = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|eot_id|>", "<|user|>", "[INST]")
RENDERED += ("<|assistant|>", "<|system|>", "<|prompter|>", "<start_of_turn>", "<extra_id_1>")
RENDERED += ("\nAssistant:", "### Response:")


class Pair(NamedTuple):
    """A prompt and two answers to it, of which `chosen` is preferred."""

    prompt: list  # messages up to the answer; in a raw pair None where it stands in the answers
    chosen: str
    rejected: str | None  # None in supervised data
    where: str  # "file:row", for errors
    margin: float | None = None  # score of chosen minus that of rejected, if there are any


class Dropped(Exception):
    """This record gives no pair; the message is the reason, which is counted."""


# What is asked stands in the first of these that is filled, behind a history and a system text.
ASKED = ("prompt", "question", "instruction", "input", "query", "messages", "conversations")
ASKED += ("conversation", "dialogue", "dialog", "context", "trajectory", "history")
SYSTEM = ("system", "system_prompt", "system_message")
# Names of the answers: a form, with the words for the preferred and the other one, or two sides.
FORMS = ("{}", "{}_response", "response_{}", "{}_answer", "answer_{}", "{}_output", "output_{}")
FORMS += ("{}_completion", "completion_{}", "{}_messages", "{}_conversation", "conversation_{}")
FORMS += ("response{}", "answer{}", "output{}", "completion{}", "conv_{}")
PREFERRED = (("chosen", "rejected"), ("accepted", "rejected"), ("preferred", "dispreferred"))
PREFERRED += (("preferred", "non_preferred"), ("better", "worse"), ("j", "k"))
SIDES = (("0", "1"), ("1", "2"), ("a", "b"), ("A", "B"))
LISTS = ("completions", "answers", "responses", "candidates")
GRADED = ("overall_preference", "preference_strength")  # below 0: the first answer is better
CHOICES = ("better_response_id", "winner", "preference", "preferred", "better")
IN_LIST = ("response", "answer", "text", "content", "completion", "output")  # in a list of answers


class Raw(NamedTuple):
    """A pair as its columns hold it: text, messages, transcripts, whole dialogues."""

    prompt: list | None  # messages; None where it stands in the answers
    chosen: object
    rejected: object
    where: str
    margin: float | None = None
    used: tuple = ()  # names of the columns that were read


def asked(record, where, answers=()):
    """(messages before the answers or None, names of the columns that hold them)."""
    found, systems = askable(tuple(record), answers)
    found = [name for name in found if record[name] is not None]
    names = next(([name] for name in found if not is_blank(record[name])), found[:1])
    value = record[names[0]] if names else None
    if isinstance(value, dict) and "role" not in value and "from" not in value:
        told = [v for k, v in value.items() if v and kind_of(k) != "about" and v is not True]
        value = told[0] if len(told) == 1 else value  # webgpt's question, OpenAI's input
    details = record.get("input")
    if names == ["instruction"] and isinstance(value, str) and isinstance(details, str) and details:
        value, names = f"{value}\n{details}", ["instruction", "input"]
    messages = [] if is_blank(value) else as_messages(value, where)
    if "history" in found and "history" not in names:
        history = parsed(record["history"], where, TURNS)
        if isinstance(history, list) and history:
            messages, names = as_messages(history, where) + messages, [*names, "history"]
    for name in systems:
        if (text := record[name]) and isinstance(text, str):
            turn = [{"role": "system", "content": text}]
            messages = messages if messages[:1] == turn else turn + messages
            names = [*names, name]
    return messages if names else None, tuple(names)


def prompt_of(record, where):
    """The messages of a question alone; every filled column of it is accounted for."""
    messages, names = asked(record, where)
    account(record, (*names, "draft"), [m["content"] for m in messages or ()], where)
    return messages


@lru_cache(4096)
def askable(columns, answers):
    """The columns that may hold what is asked, and those that may hold a system text."""
    found = [name for name in ASKED if name in columns and name not in answers]
    return found, [name for name in SYSTEM if name in columns]


def is_blank(value):
    return not value or (isinstance(value, str) and not value.strip())


def plain(record, where, chosen, rejected=None):
    """Reads a preferred answer and another one, from the columns of these names."""
    w, l = record[chosen], rejected and record[rejected]
    answers = (chosen, rejected) if rejected else (chosen,)
    if texts_alone(w) and texts_alone(l):  # reward-bench-2: right answers and wrong ones
        rated = [(1, text) for text in w] + [(0, text) for text in l]
        return best_and_a_worse(record, where, rated, answers)._replace(margin=None)
    prompt, names = asked(record, where, answers)
    return Raw(prompt, w, l, where, score_margin(record, where), (*answers, *names))


def two_answers(record, where, first, second, sides):
    """Reads two answers, of which another column says which is preferred."""
    chosen, margin = verdict(record, where, *sides, (first, second))
    names = (first, second, *(name for name in CHOICES if name in record))
    prompt, before = asked(record, where, names)
    answers = record[first], record[second]
    turns = [as_texts(value) for value in (record.get("prompt"), *answers)]
    if all(turns):  # arena-human-preference-55k: a list of each one's turns
        if len(set(map(len, turns))) > 1:
            raise Dropped("prompts differ")
        prompt, answers = None, [interleaved(turns[0], said) for said in turns[1:]]
    return Raw(prompt, answers[chosen], answers[1 - chosen], where, margin, (*names, *before))


def as_texts(value):
    """A list of texts, or JSON of one -> the list, null as an empty text; else None."""
    if isinstance(value, str) and value.startswith(('["', "[null")):
        with contextlib.suppress(ValueError):
            value = [text or "" for text in json.loads(value)]
    return value if texts_alone(value) else None


def verdict(record, where, a, b, columns):
    """Which of two answers is preferred, 0 or 1, and by how much (or None); Dropped for a tie."""
    name = next((name for name in (*GRADED, *CHOICES) if name in record), None)
    value, margin = record.get(name), None
    if name and value in (None, ""):
        raise Dropped("no preference")
    if name in GRADED:
        difference = margin = -score(value, name, where)
    elif name:
        told = str(value).lower().removesuffix(".0")
        if re.search(r"tie|both|equal|draw", told):
            raise Dropped("tie")
        told = re.sub(r"^(model|response|answer|output|completion|assistant)?[ _]?", "", told)
        if told not in (a.lower(), b.lower()):
            raise UserError(f"{where}: {name} is {value!r:.40}; expected {a}, {b} or a tie")
        difference = 1 if told == a.lower() else -1
    elif "winner_model_a" in record:  # arena-human-preference-55k
        won = [score(record.get(f"winner_model_{x}"), "winner_model", where) or 0 for x in "ab"]
        difference = won[0] - won[1]
    else:
        found = (score_margin(record, where, names) for names in ((a, b), columns))
        difference = margin = next((m for m in found if m is not None), None)
        if margin is None:
            cure = f"expected one of {', '.join((*GRADED, *CHOICES))}, or a score of each"
            raise UserError(f"{where}: no column says which answer is preferred; {cure}")
    if difference == 0:
        raise Dropped("tie")
    return int(difference < 0), margin and abs(margin)


def listed(record, where, column):
    """Reads a list of answers with a score or rank each, as UltraFeedback's completions."""
    items = record[column]
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise UserError(f"{where}: {column} is {items!r:.40}; expected a list of objects")
    rated = [(rating(i), next((i[n] for n in IN_LIST if i.get(n)), None)) for i in items]
    raw = best_and_a_worse(record, where, [r for r in rated if r[0] is not None], (column,))
    return raw._replace(margin=None) if "rank" in items[0] else raw


def best_and_a_worse(record, where, rated, used):
    """The best of rated answers against a random one with a lower rating -> Raw."""
    prompt, names = asked(record, where, used)
    if prompt is None and not names:
        name = next((name for name in ASKED if name in record), "prompt")
        raise UserError(f"{where}: {name} is {record.get(name)!r:.40}; expected text")
    best = max(rated, key=lambda r: r[0], default=None)
    lower = [r for r in rated if r[0] < best[0]]
    if not lower:
        raise Dropped("no lower-rated completion")
    # drawn by the question, so that it is the same wherever the record lies
    question = record[names[0]]
    question = question if isinstance(question, str) else json.dumps(prompt)
    digest = hashlib.sha256(question.encode("utf-8", "replace")).digest()
    worse = lower[int.from_bytes(digest[:8]) % len(lower)]
    return Raw(prompt, best[1], worse[1], where, best[0] - worse[0], (*used, *names))


def rating(item):
    """An answer's score, else its rank (0 or 1 is best), else the mean of its aspects' ratings."""
    for name in ("overall_score", "score", "pm_score", "rating", "reward"):
        if (found := number(item.get(name))) is not None:
            return found
    if (rank := number(item.get("rank"))) is not None:
        return -rank
    aspects = item.get("annotations")
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


def score_margin(record, where, names=("chosen", "rejected")):
    """Score of the first minus that of the second, under any of the published names; else None."""
    scores = record.get("all_rm_scores")  # princeton-nlp's: chosen is the best, rejected the worst
    if scores is not None and not isinstance(scores, list):
        raise UserError(f"{where}: all_rm_scores is {scores!r:.40}; expected a list of numbers")
    found = [score(s, "all_rm_scores", where) for s in scores or ()]
    if found and None not in found:
        return max(found) - min(found)
    for w, l in score_columns(names, tuple(record)):
        w, l = score(record.get(w), w, where), score(record.get(l), l, where)
        if w is not None and l is not None:
            return w - l
    return None


@lru_cache(4096)
def score_columns(names, columns):
    pairs = [[form.format(name) for name in names] for form in SCORES]
    return [pair for pair in pairs if set(pair) & set(columns)]  # also one without the other


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
    answers = answers if record["labels"] == 1 else answers[::-1]
    return Raw(as_messages(record["history"], where), *answers, where)


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
    if record["role"] not in ("prompter", "assistant"):
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
            yield Raw(path, better.text, m.text, m.where)


def path_to_root(by_id, m):
    """Messages from the root to the parent of m; None where the tree is broken."""
    path = []
    while m.parent is not None:
        m = by_id.get(m.parent)
        if m is None or len(path) > len(by_id):
            return None
        path.append({"role": "user" if m.role == "prompter" else m.role, "content": m.text})
    return path[::-1]


# name: (columns that a record must have, read, gather), of layouts that look at all records first
# read: (record, where) -> what gather takes; gather: (all of it, drops) -> yields Raws
TABLES = {
    "oasst1": (("message_id", "parent_id", "text", "role"), oasst, ranked_siblings),
    "SHP": (("history", "human_ref_A", "human_ref_B", "labels"), shp, at_most_five),
}


@lru_cache(4096)
def layout_of(columns, need_rejected):
    """(name, read, gather) of records with these columns, or None.

    read: (record, where) -> Raw; gather: None where rows stand alone.
    """
    has = set(columns)
    for name, (needed, read, gather) in TABLES.items():
        if has.issuperset(needed):
            return name, read, gather
    if has >= {"instruction", "completions"}:
        return "a list of answers", partial(listed, column="completions"), None
    pairs = [(f.format(w), g.format(l)) for f in FORMS for g in (f, *FORMS) for w, l in PREFERRED]
    pairs += [(name, "rejected_response") for name in ("response", "messages", "conversations")]
    pairs += [("messages", "rejected_messages")]
    for chosen, rejected in pairs:
        if chosen in has and rejected in has:
            return "chosen, rejected", partial(plain, chosen=chosen, rejected=rejected), None
    for form, sides in product(FORMS[1:], SIDES):
        first, second = map(form.format, sides)
        if first in has and second in has:
            read = partial(two_answers, first=first, second=second, sides=sides)
            return "two answers and a preference", read, None
    for column in LISTS:
        if column in has and has.intersection(ASKED):
            return "a list of answers", partial(listed, column=column), None
    for column in ("chosen", "messages", "conversations"):
        if column in has and not need_rejected:  # supervised
            return column, partial(plain, chosen=column), None


def recognise(record, where, need_rejected=True):
    """(name, read, gather) of a record's layout, by its columns; UserError where none fits."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object with named columns")
    if found := layout_of(tuple(record), need_rejected):
        return found
    cure = "chosen and rejected, with or without prompt, or another layout of docs/data.md"
    raise UserError(f"{where}: columns {sorted(record)}; expected {cure}")


def to_pair(record, where, drops, need_rejected=True):
    """Makes the Pair of one record; None where there is none, which is counted in `drops`."""
    name, read, gather = recognise(record, where, need_rejected)
    if gather:
        raise UserError(f"{where}: {name} is read as a whole file, not by the row")
    try:
        return one_pair(read, record, where, drops, need_rejected)
    except Dropped as reason:
        return drops.add(str(reason), where)


def one_pair(read, record, where, drops, need_rejected, ties=True):
    """The Pair of a record that stands alone; every filled column of it is accounted for."""
    raw = read(record, where)
    try:
        pair = make_pair(raw, need_rejected, ties)
    except Dropped as reason:
        if str(reason) == "no prompt":  # unless a column of another name has it
            said = texts_in([raw.chosen, raw.rejected])
            account(record, raw.used, said, where, invented=raw.prompt is None)
        raise
    said = [message["content"] for message in pair.prompt] + [pair.chosen, pair.rejected or ""]
    invented = raw.prompt is None and isinstance(parsed(raw.chosen, where), str)
    drops.unread |= dict.fromkeys(account(record, raw.used, said, where, invented))
    if is_rendered("\n".join(said)):
        drops.rendered.append(where)
    return pair


def is_rendered(text):
    """Whether it holds a control token. One character is found much faster than a word."""
    return any(c in text for c in "|[_:") and any(t in text for t in RENDERED)


def make_pair(raw, need_rejected=True, ties=True):
    """Makes the Pair of a Raw; raises Dropped, or UserError for wrong types.

    ties: whether identical answers will do. They prefer nothing, but an evaluation counts them.
    """
    if raw.chosen is None or (raw.rejected is None and need_rejected):
        raise Dropped("empty answer")
    prompt, chosen, rejected = unfolded(raw)
    if not any(m["role"] == "user" and m["content"].strip() for m in prompt):
        raise Dropped("no prompt")
    if not chosen.strip() or (rejected is not None and not rejected.strip()):
        raise Dropped("empty answer")
    texts = "\n".join([*map(all_said, prompt), chosen, rejected or ""])
    if "\0" in texts or not (texts.isascii() or BROKEN.search(texts) is None):
        raise Dropped("broken text")
    if chosen == rejected and not ties:
        raise Dropped("identical answers")
    if prompt[-1]["role"] == "assistant":
        fault = f"what is asked in {', '.join(raw.used)} ends with the assistant's own turn"
        raise UserError(f"{raw.where}: {fault}; give it as a part of the answers")
    return Pair(prompt, chosen, rejected, raw.where, raw.margin)


def unfolded(raw):
    """(prompt messages, chosen text, rejected text) of a Raw, whatever holds them."""
    prompt, where = raw.prompt, raw.where
    chosen, rejected = (parsed(answer, where) for answer in (raw.chosen, raw.rejected))
    if isinstance(chosen, str) and prompt is None:
        if not isinstance(rejected, str):
            raise UserError(f"{where}: without `prompt`, a `chosen` text needs a `rejected` text")
        shared = os.path.commonprefix([chosen, rejected])  # split at the last white space in it
        cut = max(shared.rfind(" "), shared.rfind("\n")) + 1
        return as_messages(chosen[:cut].rstrip(), where), chosen[cut:], rejected[cut:]
    said = []  # what stands before the answer, by each of the answers that is a dialogue
    if not isinstance(chosen, str):
        before, chosen = dialogue(chosen, where)
        said = [before]
    if not isinstance(rejected, str | None):
        before, rejected = dialogue(rejected, where)
        said += [before]
    if said[1:] and said[0] != said[1]:
        raise Dropped("prompts differ")
    if said and said[0] and not any(message["content"].strip() for message in said[0]):
        raise Dropped("no prompt")
    if prompt and prompt[-1]["role"] == "assistant" and prompt[-1]["content"] in (chosen, rejected):
        prompt = prompt[:-1]  # a whole dialogue beside the answers
    if not said or not prompt:
        return (said[0] if said else prompt) or [], chosen, rejected
    if (whole := joined(prompt, said[0])) is None:
        fault = f"columns {', '.join(raw.used)} do not hold one dialogue"
        raise UserError(f"{where}: {fault}; leave out what is amiss by --ignore_columns")
    return whole, chosen, rejected
