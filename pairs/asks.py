"""Reads what is to be asked: prompts, questions of benchmarks, drafts to refine, pairs."""

import sys
from typing import NamedTuple

from jobs.cli import UserError
from pairs.layouts import prompt_of, to_pair
from pairs.messages import as_messages
from pairs.read import Drops, data_files, records

# what an answer's row keeps of its question
KEPT = ("uid", "question_id", "prompt_id", "subset", "category", "dataset", "reference")


class Ask(NamedTuple):
    """What is asked: a dialogue that ends with a user turn, and what else is known of it."""

    prompt: list
    draft: str | None = None  # to refine, where it is known
    turns: list = []  # further user turns, each behind an answer; never written to
    about: dict = {}  # the question's KEPT columns, for the answer's row; never written to
    where: str = ""  # "file:row"


def read_asks(source, limit=None):
    """Prompts of a file, glob or hub id -> list of Ask, one per row, in file order.

    A row is a preference pair in any layout that pairs.read_pairs takes, or has a `prompt` (text or
    messages) or an `instruction` (text) alone, or is a question of a published benchmark (`turns`).
    A text to refine is taken where it is there, as `draft` or (of answers) as `answer`. Rows that
    are no usable pair are left out, and reported.
    """
    drops, asks = Drops(), []
    for where, record in (row for file in data_files(source) for row in records(file)):
        if len(asks) == limit:
            break
        prompt, turns = read_prompt(record, where, drops)
        if prompt is not None:
            draft = record.get("draft", record.get("answer"))
            asks.append(Ask(prompt, draft, turns, about_of(record), where))
    if drops.rules:
        print(f"{source}: dropped {drops}", file=sys.stderr)
    if not asks:
        raise UserError(f"{source}: no prompts")
    return asks


def about_of(record):
    """What a row tells of its question: its KEPT columns."""
    return {name: record[name] for name in KEPT if record.get(name) is not None}


def read_prompt(record, where, drops):
    """One record -> (messages that end with a user turn, further user turns); None when dropped."""
    if not isinstance(record, dict) or {"chosen", "messages"} & record.keys():
        pair = to_pair(record, where, drops, need_rejected=False)
        return pair and pair.prompt, []
    value = record.get("turns", record.get("prompt", record.get("instruction")))
    if value is None:
        cure = "expected prompt, instruction or chosen, or a benchmark's turns"
        raise UserError(f"{where}: columns {sorted(record)}; {cure}")
    turns = []
    if isinstance(value, list) and value and not isinstance(value[0], dict):
        value, *turns = value  # MT-Bench: a list of texts
    elif "turns" in record:
        value, *turns = [turn.get("content") for turn in value]  # Arena-Hard v0.1: of {content}
    if not all(isinstance(turn, str) for turn in turns):
        raise UserError(f"{where}: turns must be texts, or objects with a text `content`")
    whole = not turns and "turns" not in record  # with its system text, history and input
    messages = prompt_of(record, where) if whole else as_messages(value, where)
    if not messages or messages[-1]["role"] != "user":
        raise UserError(f"{where}: a prompt must end with a user turn")
    return messages, turns
