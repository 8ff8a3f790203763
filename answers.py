"""Answer files, read as they lie, and joined by their prompts.

A row holds prompt and answer (as generate.py writes it), instruction and output (AlpacaEval), or
a preference pair, whose chosen answer is taken. `subset`, `category` or `dataset` names its part.
"""

import hashlib
import json
import os
from collections import Counter
from typing import NamedTuple

from cli import UserError
from layouts import as_messages, to_pair
from pairs import Drops
from sources import records


class Answer(NamedTuple):
    prompt: list  # messages
    text: str
    subset: str = ""


def read_answers(file, name):
    """Rows of an answer or pair file -> list of Answer."""
    answers = []
    for where, row in rows_of(file, name):
        prompt = row.get("prompt", row.get("instruction"))
        text = row.get("answer", row.get("output"))
        if text is None and "chosen" in row:
            drops = Drops()
            pair = to_pair(row, where, drops, need_rejected=False)
            if pair is None:
                raise UserError(f"{where}: no usable pair: {drops}")
            prompt, text = pair.prompt, pair.chosen
        if prompt is None or not isinstance(text, str):
            raise UserError(
                f"{where}: expected prompt and answer, instruction and output, or a pair"
            )
        answers.append(Answer(as_messages(prompt, where), text, subset_of(row)))
    if not answers:
        raise UserError(f"{name} {file}: no answers")
    return answers


def read_both(file, name):
    """A pair file -> (chosen, rejected), two lists of Answer, and the Drops."""
    chosen, rejected, drops = [], [], Drops()
    for where, row in rows_of(file, name):
        pair = to_pair(row, where, drops)
        if pair is not None:
            chosen.append(Answer(pair.prompt, pair.chosen, subset_of(row)))
            rejected.append(Answer(pair.prompt, pair.rejected, subset_of(row)))
    if not chosen:
        raise UserError(f"{name} {file}: no usable pairs; dropped: {drops}")
    return chosen, rejected, drops


def rows_of(file, name):
    """Yield ("file:row", dict); anything else as row becomes an empty one."""
    if not os.path.isfile(file):
        raise UserError(f"{name} {file}: no such file")
    for where, row in records(file):
        yield where, row if isinstance(row, dict) else {}


def subset_of(row):
    found = row.get("subset", row.get("category", row.get("dataset")))
    return found if isinstance(found, str) else ""


def align(answers, s):
    """The answers of --against in the order of --answers; UserError if a prompt has none."""
    others = read_answers(s.against, "--against")
    wanted, found = ([json.dumps(a.prompt) for a in rows] for rows in (answers, others))
    if found[: len(wanted)] == wanted:
        return others[: len(wanted)]
    counts = Counter(found)
    for n, prompt in enumerate(wanted, 1):
        if counts[prompt] != 1:
            times = f"has {counts[prompt]} answers" if counts[prompt] else "has no answer"
            raise UserError(f"--against {s.against} {times} to the prompt of {s.answers}:{n}")
    by_prompt = dict(zip(found, others, strict=True))
    return [by_prompt[prompt] for prompt in wanted]


def question_ids(answers):
    """A name for each answer's prompt, equal in every file: a digest, and #k from the k-th on."""
    seen, names = Counter(), []
    for answer in answers:
        digest = hashlib.sha256(json.dumps(answer.prompt).encode()).hexdigest()[:16]
        seen[digest] += 1
        names.append(digest if seen[digest] == 1 else f"{digest}#{seen[digest]}")
    return names
