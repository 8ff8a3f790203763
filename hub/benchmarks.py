"""Benchmarks as they are published: questions in, answer files out, exactly as their tools read.

    jsonl         generate.py's own rows: {prompt, answer, …}, whatever the questions were
    alpaca_eval   AlpacaEval 2: a JSON list of {instruction, output, generator, dataset, datasplit};
                  `alpaca_eval --model_outputs FILE`
    arena_hard    Arena-Hard-auto: jsonl of {uid, ans_id, model, messages, tstamp, metadata}, to lie
                  in data/BENCH/model_answer/NAME.jsonl
    mt_bench      MT-Bench (FastChat): jsonl of {question_id, answer_id, model_id, choices, tstamp},
                  to lie in data/mt_bench/model_answer/NAME.jsonl

The questions of each, and any file of prompts or pairs, can be asked in the format of any other.
"""

import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from hub.template import Template
from jobs.cli import UserError
from jobs.files import read_lines, replace, to_line
from pairs.layouts import as_messages, to_pair
from pairs.read import Drops
from pairs.sources import data_files, records

ABOUT = ("uid", "question_id", "prompt_id", "subset", "category", "dataset", "reference")

# ----------------------------------------------------------------------------- questions


@dataclass
class Ask:
    """What is asked: a dialogue that ends with a user turn, and what else is known of it."""

    prompt: list
    draft: str | None = None  # to refine, where it is known
    turns: list = field(default_factory=list)  # further user turns, each behind an answer
    about: dict = field(default_factory=dict)  # the question's ABOUT columns, for the answer's row

    def is_of(self, row):
        """Whether a row answers this Ask: the turns are the same, but for answers between them."""
        asked, n = row.get("prompt"), len(self.prompt)
        users = [{"role": "user", "content": turn} for turn in self.turns]
        return isinstance(asked, list) and asked[:n] + asked[n + 1 :: 2] == self.prompt + users


def read_asks(source, limit=None):
    """Prompts of a file, glob or hub id -> list of Ask, one per row, in file order.

    A row is anything that pairs.read_pairs takes, or has a `prompt` (text or messages) or an
    `instruction` (text) alone, or is a question of a benchmark (`turns`); `draft` is taken where it
    is there. Rows that are no usable pair are left out, and reported.
    """
    drops, asks = Drops(), []
    for where, record in (row for file in data_files(source) for row in records(file)):
        if len(asks) == limit:
            break
        prompt, turns = read_prompt(record, where, drops)
        if prompt is not None:
            asks.append(Ask(prompt, record.get("draft"), turns, about_of(record)))
    if drops.rules:
        print(f"{source}: dropped {drops}", file=sys.stderr)
    if not asks:
        raise UserError(f"{source}: no prompts")
    return asks


def about_of(record):
    """What a row tells of its question: its ABOUT columns."""
    return {name: record[name] for name in ABOUT if record.get(name) is not None}


def read_prompt(record, where, drops):
    """One record -> (messages that end with a user turn, further user turns); None when dropped."""
    if not isinstance(record, dict) or {"chosen", "messages"} & record.keys():
        pair = to_pair(record, where, drops, need_rejected=False)
        return pair and pair.prompt, []
    value = record.get("turns", record.get("prompt", record.get("instruction")))
    if value is None:
        columns = f"{where}: columns {sorted(record)}"
        cure = "expected prompt, instruction or chosen, or a benchmark's turns"
        raise UserError(f"{columns}; {cure}")
    turns = []
    if isinstance(value, list) and value and not isinstance(value[0], dict):
        value, *turns = value  # MT-Bench: a list of texts
    elif "turns" in record:
        value, *turns = [turn.get("content") for turn in value]  # Arena-Hard v0.1: of {content}
    if not all(isinstance(turn, str) for turn in turns):
        raise UserError(f"{where}: turns must be texts, or objects with a text `content`")
    messages = as_messages(value, where)
    if not messages or messages[-1]["role"] != "user":
        raise UserError(f"{where}: a prompt must end with a user turn")
    return messages, turns


def transcript(messages):
    """Messages as one text: a single user turn as it is, a dialogue as hh-rlhf writes it."""
    if [m["role"] for m in messages] == ["user"]:
        return messages[0]["content"]
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    return "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in messages)


# ----------------------------------------------------------------------------- answer files


class Writer(NamedTuple):
    """What a row of an answer file takes beside the answer: the model's name, and counts."""

    name: str
    time: float  # seconds since 1970
    tokens: object = None  # text -> number of tokens

    def alpaca_eval(self, n, row):
        return {
            "instruction": transcript(row["prompt"]),
            "output": row["answer"],
            "generator": self.name,
            "dataset": row.get("dataset", ""),
            "datasplit": "eval",
        }

    def arena_hard(self, n, row):
        return {
            "uid": question_id(row),
            "ans_id": self._answer_id(row),
            "model": self.name,
            "messages": [
                *row["prompt"],
                {"role": "assistant", "content": {"answer": row["answer"]}},
            ],
            "tstamp": self.time,
            "metadata": {"token_len": self.tokens(row["answer"])} | markdown_counts(row["answer"]),
        }

    def mt_bench(self, n, row):
        number = row.get("question_id", row.get("prompt_id"))
        first = len(row["prompt"]) - 2 * (row.get("turns", 1) - 1)  # of our answers in the prompt
        turns = [m["content"] for m in row["prompt"][first::2]] + [row["answer"]]
        return {
            "question_id": number if isinstance(number, int) else n + 1,
            "answer_id": self._answer_id(row),
            "model_id": self.name,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": self.time,
        }

    def _answer_id(self, row):
        """22 letters, as shortuuid's are, but told by the content."""
        return digest([self.name, row["prompt"], row["answer"], row.get("seed")])[:22]


FORMATS = {  # name: (how many questions the published sets have, whether rows are lines)
    "jsonl": (None, True),
    "alpaca_eval": ((805,), False),
    "arena_hard": ((500, 750), True),
    "mt_bench": ((80,), True),
}


def write_answers(file, form, rows_file, name, tokens=None):
    """Native rows, in their order -> FILE in the format `form`, written aside and renamed."""
    rows = [json.loads(line) for line in read_lines(rows_file)]
    writer = Writer(name, os.path.getmtime(rows_file), tokens)
    written = [getattr(writer, form)(n, row) for n, row in enumerate(rows)]
    sizes, lines = FORMATS[form]
    if len(rows) not in sizes:
        usual = " or ".join(map(str, sizes))
        print(f"{file}: {len(rows)} answers; the published {form} has {usual}", file=sys.stderr)
    write_rows(file, written, lines)


def write_rows(file, rows, lines):
    """Rows as jsonl, or else as one JSON list, written aside and renamed."""
    whole = [json.dumps(rows, indent=2, ensure_ascii=False).encode() + b"\n"]
    try:
        replace(file, map(to_line, rows) if lines else whole)
    except OSError as error:
        raise UserError(f"--out {file}: {error.strerror}") from error


def question_id(row):
    """The id of a row's question, or where it has none 16 letters told by its prompt."""
    known = (row[name] for name in ("uid", "question_id", "prompt_id") if name in row)
    return next(known, None) or digest(row["prompt"])[:16]


def digest(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def refuse_twins(asks, source):
    """UserError where two Asks, or answers, have one id: Arena-Hard's files could not hold both."""
    seen = {}
    for n, ask in enumerate(asks, 1):
        name = question_id({"prompt": ask.prompt} | ask.about)
        if name in seen:
            raise UserError(f"{source}: questions {seen[name]} and {n} have the same id {name}")
        seen[name] = n


# ----------------------------------------------------------------------------- style counts


def markdown_counts(text):
    """Headers, lists and bold of an answer outside code fences, by kind, as Arena-Hard counts them.

    A fence is three backticks, no backtick inside, and three more; what it holds is taken out
    wherever in the answer it stands, and the backticks stay.
    """
    for block in re.findall(r"```([^`]*)```", text):
        text = text.replace(block, "")

    def count(pattern):
        return len(re.findall(pattern, text, re.MULTILINE))

    return {
        "header_count": {f"h{n}": count(rf"^#{{{n}}}\s") for n in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


def token_counter(model):
    """text -> number of tokens, by gpt-4o's tokenizer as Arena-Hard counts them.

    Where tiktoken is missing, or cannot fetch it, by that of `model`, a local directory; says so.
    """
    try:
        import tiktoken

        encoder = tiktoken.encoding_for_model("gpt-4o")
        return lambda text: len(encoder.encode(text, disallowed_special=()))
    except Exception as error:  # not installed, or one of requests' many when it cannot be fetched
        fault = f"{type(error).__name__}: {error}".splitlines()[0]
    if not (Path(model) / "tokenizer.json").exists():
        raise UserError(
            "--format arena_hard counts tokens as gpt-4o: pip install tiktoken, with a network at "
            f"its first use ({fault})"
        )
    print(
        f"token_len is counted by {model}'s tokenizer, not by gpt-4o's ({fault}); Arena-Hard's "
        "add_markdown_info.py counts anew",
        file=sys.stderr,
    )
    template = Template(model)
    return lambda text: len(template.encode([text])[0])
