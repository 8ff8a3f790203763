"""Accounts for every filled column of a record: it is read, tells nothing of the text, or stops.

A model that is trained on less than the row holds is trained on another question, and nothing
shows it. So a column that no layout reads must be one of three: *about* the row, by its name (an
id, a score, a source, another answer); a short label; or text that what was read holds already.
Any other is refused by name. Names are read by their words: `prompt_id` is an id, `chat_history` a
history. docs/data.md.
"""

import re
from functools import lru_cache

from jobs.cli import UserError

# Words of names that tell of a row, and of other answers than those of the pair.
ABOUT_A_ROW = """
    id ids uuid hash sha md index idx key url link source sources origin dataset datasets subset
    split domain category categories language lang license author authors annotator annotators
    date time timestamp tstamp utc created updated version model models judge score scores
    rating ratings rank ranks ranking reward rewards margin preference preferences strength
    winner label labels labelling labeling tag tags status meta metadata info stats moderation
    safe safety harm toxic toxicity quality difficulty critique critiques rationale rationales
    explanation feedback annotation annotations review reviews comment comments logps logprobs
    token tokens length len count num probability confidence flag embedding emojis detoxify
    principle principles quotes order generation generations response responses answer answers
    output outputs completion completions chosen rejected accepted solution correct incorrect
    truth config configs
"""
# Words of names that tell of what stands before an answer: these hold no mere label.
CONTEXT = """
    prompt prompts question questions instruction instructions query input inputs context
    contexts history background prefix preamble previous prior initial preceding past trajectory
    system persona tool tools function functions image images video videos audio document documents
    passage passages message messages conversation conversations dialogue dialogues dialog
"""
ABOUT_A_ROW, CONTEXT = (set(re.findall(r"\w+", text)) for text in (ABOUT_A_ROW, CONTEXT))
LABEL = re.compile(r"[\w.:/+#@%-]{0,64}", re.ASCII)  # a sentence has spaces, or is not ASCII
NUMBERS = (int, float, bool)
NOT_SAID = ("role", "from", "type")  # in messages


@lru_cache(None)
def kind_of(column):
    """Tells "about", "context" or "text", by the words of a column's name."""
    split = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", column).lower()
    words = [word for word in re.findall(r"[^\W\d_]+", split) if len(word) > 1]
    if words and words[-1] in CONTEXT:  # a compound is what its last word says
        return "about" if words[0] in ("generation", "labelling", "labeling") else "context"
    if words and words[-1] not in ABOUT_A_ROW and CONTEXT.intersection(words):
        return "context"
    previous = {"previous", "prior", "initial", "preceding", "past"}.intersection(words)
    return "context" if previous else "about" if ABOUT_A_ROW.intersection(words) else "text"


@lru_cache(4096)
def not_read(columns, used):
    return [(column, kind_of(column)) for column in columns if column not in used]


def texts_in(value):
    """Yields every text inside a value, whatever holds it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from () if key in NOT_SAID else texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_in(inner)
    elif value is not None and not isinstance(value, bool | int | float):
        yield repr(value)  # bytes, a date


def squeezed(text):
    return " ".join(text.split())


def account(record, used, said, where, invented=False):
    """Names of filled columns that are not read; UserError for one that would be missed.

    used: names of the columns that were read. said: the texts that were made of them. invented:
    the prompt is a guess, so that even a label might be the real one.
    """
    names, turns = [], None
    for column, kind in not_read(tuple(record), used):
        value = record[column]
        if not value or value.__class__ in NUMBERS:
            continue
        names.append(column)
        if kind == "about" or value in [record.get(name) for name in used]:
            continue
        if turns is None:
            turns = [squeezed(text) for text in said]
        for text in map(squeezed, texts_in(value)):
            held = text in turns or (text.count(" ") > 1 and any(text in turn for turn in turns))
            label = kind == "text" and not invented and LABEL.fullmatch(text)
            if text and not held and not label:
                cure = f"docs/data.md has the names that are; else --ignore_columns {column}"
                raise UserError(
                    f"{where}: column {column} ({text!r:.40}) would not be read; {cure}"
                )
    return names
