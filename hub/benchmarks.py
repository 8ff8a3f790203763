"""Writes answers in the files of published benchmarks, exactly as their own tools read them.

    jsonl         generate.py's own rows: {prompt, answer, …}, whatever the questions were
    alpaca_eval   AlpacaEval 2: a JSON list of {instruction, output, generator, dataset, datasplit};
                  `alpaca_eval --model_outputs FILE`
    arena_hard    Arena-Hard-auto: jsonl of {uid, ans_id, model, messages, tstamp, metadata}, to lie
                  in data/BENCH/model_answer/NAME.jsonl
    mt_bench      MT-Bench (FastChat): jsonl of {question_id, answer_id, model_id, choices, tstamp},
                  to lie in data/mt_bench/model_answer/NAME.jsonl

Any questions (pairs.asks.read_asks) can be answered in the format of any benchmark.
"""

import hashlib
import json
import os
import re
import sys
from pathlib import Path

from hub.template import Template
from jobs.cli import UserError
from jobs.files import out_file, read_lines, replace, to_line, write_json


def transcript(messages):
    """Messages as one text: a single user turn as it is, a dialogue as hh-rlhf writes it."""
    if [m["role"] for m in messages] == ["user"]:
        return messages[0]["content"]
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    return "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in messages)


def answer_row(form, n, row, name, time, tokens):
    """generate.py's row of answer n as the file of a benchmark has it.

    name: the model's; time: seconds since 1970; tokens: text -> number of tokens, for arena_hard.
    """
    prompt, answer = row["prompt"], row["answer"]
    if form == "alpaca_eval":
        return {
            "instruction": transcript(prompt),
            "output": answer,
            "generator": name,
            "dataset": row.get("dataset", ""),
            "datasplit": "eval",
        }
    # 22 letters, as shortuuid's are, but told by the content
    answer_id = json_digest([name, prompt, answer, row.get("seed")])[:22]
    if form == "arena_hard":
        return {
            "uid": question_id(prompt, row),
            "ans_id": answer_id,
            "model": name,
            "messages": [*prompt, {"role": "assistant", "content": {"answer": answer}}],
            "tstamp": time,
            "metadata": {"token_len": tokens(answer)} | markdown_counts(answer),
        }
    number = row.get("question_id", row.get("prompt_id"))
    first = len(prompt) - 2 * (row.get("turns", 1) - 1)  # of our answers in the prompt
    return {
        "question_id": number if isinstance(number, int) else n + 1,
        "answer_id": answer_id,
        "model_id": name,
        "choices": [{"index": 0, "turns": [m["content"] for m in prompt[first::2]] + [answer]}],
        "tstamp": time,
    }


# name: how many questions the published sets have
ANSWER_FORMATS = {"jsonl": (), "alpaca_eval": (805,), "arena_hard": (500, 750), "mt_bench": (80,)}


def write_answers(file, form, rows_file, name, tokens=None):
    """Native rows, in their order -> FILE in the format `form`, written aside and renamed."""
    rows = [json.loads(line) for line in read_lines(rows_file)]
    time = os.path.getmtime(rows_file)
    if len(rows) not in ANSWER_FORMATS[form]:
        usual = " or ".join(map(str, ANSWER_FORMATS[form]))
        print(f"{file}: {len(rows)} answers; the published {form} has {usual}", file=sys.stderr)
    rows = [answer_row(form, n, row, name, time, tokens) for n, row in enumerate(rows)]
    write_rows(file, rows, lines=form != "alpaca_eval")


def write_rows(file, rows, lines):
    """Rows as jsonl, or else as one JSON list, written aside and renamed."""
    with out_file(file):
        replace(file, map(to_line, rows)) if lines else write_json(file, rows)


def question_id(prompt, about):
    """The id of a question among its columns, or where it has none 16 letters told by its text."""
    known = (about[name] for name in ("uid", "question_id", "prompt_id") if name in about)
    return next(known, None) or json_digest(prompt)[:16]


def json_digest(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def refuse_twins(asks, source):
    """UserError where two Asks, or answers, have one id: Arena-Hard's files could not hold both."""
    seen = {}
    for n, ask in enumerate(asks, 1):
        name = question_id(ask.prompt, ask.about)
        if name in seen:
            raise UserError(f"{source}: questions {seen[name]} and {n} have the same id {name}")
        seen[name] = n


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
        cure = f"pip install tiktoken, with a network at its first use ({fault})"
        raise UserError(f"--format arena_hard counts tokens as gpt-4o: {cure}")
    cure = "Arena-Hard's add_markdown_info.py counts anew"
    told = f"token_len is counted by {model}'s tokenizer, not by gpt-4o's ({fault}); {cure}"
    print(told, file=sys.stderr)
    template = Template(model)
    return lambda text: len(template.encode([text])[0])
