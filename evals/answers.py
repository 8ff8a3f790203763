"""Reads answer files of every format, and joins two of them by what was asked.

A row is of any format that generate.py writes (hub/benchmarks.py), or a preference pair, whose
chosen answer is taken. Its `subset`, `category` or `dataset` names the part it belongs to.
"""

from collections import Counter
from typing import NamedTuple

from evals.results import rows_of
from hub.benchmarks import ANSWER_FORMATS, json_digest, question_id, transcript
from jobs.cli import UserError
from pairs.asks import about_of, read_asks
from pairs.layouts import to_pair
from pairs.messages import as_messages
from pairs.read import Drops

CHOSEN = "chosen"  # the name of who gave the chosen answers of pairs


class Answer(NamedTuple):
    """An answer to all that was said before it, and what its file tells of it."""

    prompt: list  # messages
    text: str
    about: dict = {}  # the question's KEPT columns, and which turn is answered; never written to
    where: str = ""  # "file:row", for errors
    name: str | None = None  # the model's
    draft: str | None = None  # that the last answer refines

    @property
    def _first(self):
        """How many messages stand before the model's own first answer."""
        return len(self.prompt) - 2 * (self.about.get("turn", 1) - 1)

    @property
    def question(self):
        """What was asked, without the model's own earlier answers: the same for every model."""
        return self.prompt[: self._first] + self.prompt[self._first + 1 :: 2]

    @property
    def said(self):
        """The answer's text; in a later turn, the dialogue from the model's first answer on."""
        dialogue = [*self.prompt[self._first :], message("assistant", self.text)]
        return transcript(dialogue).lstrip("\n") if len(dialogue) > 1 else self.text

    @property
    def subset(self):
        names = (self.about.get(column) for column in ("subset", "category", "dataset"))
        return next((name for name in names if isinstance(name, str)), "")


def read_answers(file, flag, questions=None):
    """Answer files in any of the ANSWER_FORMATS, or the chosen answers of pairs -> list of Answer.

    questions: a question file, which tells category and reference by id, and of which an mt_bench
    file, whose rows hold ids alone, needs the turns. Several turns become one Answer each. Pairs
    that cannot be used are left out, and reported.
    """
    drops, asks, answers = Drops(), read_asks(questions) if questions else [], []
    asks = {question_id(ask.prompt, ask.about): ask for ask in asks}
    for where, row in rows_of(file, flag):
        answers += answered(row, where, asks, drops)
    if drops.rules:
        print(f"{flag} {file}: dropped {drops}")
    if not answers:
        raise UserError(f"{flag} {file}: no answers")
    return answers


def answered(row, where, asks, drops):
    """One row of an answer file -> its Answers, one per turn that was answered here."""
    about = about_of(row)
    ask = asks.get(question_id(None, about))
    try:
        dialogue, turns, name = dialogue_of(row, where, ask, drops)
        places = range(len(dialogue) + 1 - 2 * turns, len(dialogue), 2)  # of the model's answers
        if not all(isinstance(dialogue[n]["content"], str) for n in places):
            raise TypeError
    except (LookupError, TypeError, ValueError) as error:
        fault = f"{where}: columns {sorted(row)} are no answer"
        cure = f"expected a row of {', '.join(ANSWER_FORMATS)}, or a pair"
        raise UserError(f"{fault}; {cure}") from error
    about = (ask.about if ask else {}) | about
    draft = row["draft"] if isinstance(row.get("draft"), str) else None
    return [
        Answer(dialogue[:n], dialogue[n]["content"], about | {"turn": turn}, where, name, draft)
        for turn, n in enumerate(places, 1)
    ]


def dialogue_of(row, where, ask, drops):
    """A row's (messages, the last an answer; turns that were answered here; the model's name)."""
    if "choices" in row:  # FastChat's, which holds the answers alone
        texts, name = row["choices"][0]["turns"], row["model_id"]
        if ask is None:
            cure = "--questions FILE has no such id; or read the .rows.jsonl beside the file"
            raise UserError(f"{where}: give the questions: {cure}")
        dialogue = list(ask.prompt)
        for turn, text in enumerate(texts):
            dialogue += [message("user", ask.turns[turn - 1])] if turn else []
            dialogue.append(message("assistant", text))
        return dialogue, len(texts), name
    if isinstance(row.get("messages"), list) and "uid" in row:
        *prompt, last = row["messages"]
        text, name = last["content"]["answer"], row["model"]
    elif "chosen" in row:
        pair = to_pair(row, where, drops, need_rejected=False)
        if pair is None:
            return [], 0, None
        prompt, text, name = pair.prompt, pair.chosen, CHOSEN
    elif "answer" in row:
        prompt, text, name = row["prompt"], row["answer"], row.get("model")
    else:
        prompt, text, name = row["instruction"], row["output"], row.get("generator")
    if not (prompt := as_messages(prompt, where)):
        raise ValueError
    return [*prompt, message("assistant", text)], row.get("turns", 1), name


def message(role, content):
    return {"role": role, "content": content}


def read_both(file, flag):
    """A pair file -> (chosen, rejected), two lists of Answer, and the Drops."""
    chosen, rejected, drops = [], [], Drops()
    for where, row in rows_of(file, flag):
        pair = to_pair(row, where, drops)
        if pair is not None:
            chosen.append(Answer(pair.prompt, pair.chosen, about_of(row), where, CHOSEN))
            rejected.append(Answer(pair.prompt, pair.rejected, about_of(row), where, "rejected"))
    if not chosen:
        raise UserError(f"{flag} {file}: no usable pairs; dropped: {drops}")
    return chosen, rejected, drops


def question_ids(answers):
    """A name for each answer's question, the same in every file: a digest, and #k for the k-th."""
    seen, names = Counter(), []
    for answer in answers:
        name = json_digest(answer.question)[:16]
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return names


def align(answers, others, flag):
    """`others` in the order of `answers`, joined by prompt; `flag` is what errors call others.

    The k-th answer to a prompt meets the k-th in others. UserError where there is none, and where
    others has more of them, unless they are pairs, whose prompts may come again.
    """
    ids, places = question_ids(answers), dict(zip(question_ids(others), others, strict=True))
    wanted = dict(zip(ids, answers, strict=True))
    if missing := [answer for name, answer in wanted.items() if name not in places]:
        lacking = f"{missing[0].where}, and so of {len(missing)} of {len(answers)}"
        cure = "answer them, or take them out"
        raise UserError(f"{flag} has no answer to the prompt of {lacking}; {cure}")
    for name, other in places.items():
        first = name.partition("#")[0]
        if name not in wanted and first in wanted and other.name != CHOSEN:
            times = sum(key.startswith(first) for key in places)
            fault = f"{other.where}: same prompt as {places[first].where}"
            told = f"{flag} has {times} answers to the prompt of {wanted[first].where}"
            raise UserError(f"{fault}; {told}")
    return [places[name] for name in ids]
