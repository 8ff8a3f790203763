"""Generate answers: `python generate.py --model DIR --prompt TEXT` or `--data FILE --out FILE`.

IFSR's three ways to ask for an answer (section 3.1), x the dialogue and i the instruction:

    plain       x -> y
    instruct    x, i -> y             i as a suffix of the last user turn
    refine      x, y', i -> y         a draft y' (generated as in plain, or the row's `draft`) and
                                      one more user turn i, joined token by token as in training

The tokens come from sampling.py.
"""

import json
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers.decoders import DecodeStream

from cli import UserError, flag, parse, progress, run
from layouts import as_messages, to_pair
from model import load
from pairs import Drops
from sampling import Sampling, Sequence, complete
from sources import data_files, records
from template import INSTRUCTIONS, Template, parse_json, read_json, with_suffix
from weights import read_config, resolve

# ----------------------------------------------------------------------------- the three modes

MODES = ("plain", "instruct", "refine")


@dataclass
class Ask:
    """What is asked: a dialogue that ends with a user turn, and the draft to refine, if known."""

    prompt: list
    draft: str | None = None


@dataclass
class Answers:
    """Answers in one of the three modes, and the tokenizer's side of it."""

    model: torch.nn.Module
    template: Template
    sampling: Sampling
    mode: str = "plain"
    instruction: str = INSTRUCTIONS["better"]
    seed: int = 0
    batch: int = 16

    def __call__(self, asks, first=0, on_token=None):
        """Yield one row {prompt, answer, [draft,] finished} per Ask, in their order.

        Ask n draws its random numbers from (seed, first + n), its refinement from those and 1.
        on_token(stage, token) hears the tokens, with stage "draft" or "answer".
        """
        rows = [{"prompt": ask.prompt} for ask in asks]
        queue = deque()
        for n, ask in enumerate(asks):
            queue.append(self._first(ask, rows[n], (self.seed, first + n), on_token))
        written = 0
        for seq in complete(self.model, queue, self.sampling, self.batch):
            stage, row = seq.tag
            if stage == "draft":  # its refinement goes first, so that rows end nearly in order
                row["draft"] = self.template.decode(seq.answer)
                ids = [*seq.prompt, *seq.answer, *self.template.end_ids, *self._turn()]
                queue.appendleft(self._sequence(ids, (*seq.seed, 1), "answer", row, on_token))
                continue
            row |= {"answer": self.template.decode(seq.answer), "finished": seq.finished}
            while written < len(rows) and "finished" in rows[written]:
                yield rows[written]
                written += 1

    def _first(self, ask, row, seed, on_token):
        """The first sequence that an Ask needs."""
        prompt = ask.prompt
        if self.mode == "instruct":
            prompt = with_suffix(prompt, self.instruction)
        texts = [self.template.render(prompt, generation=True)]
        if self.mode != "refine":
            return self._sequence(self._ids(texts), seed, "answer", row, on_token)
        if ask.draft is None:
            return self._sequence(self._ids(texts), seed, "draft", row, on_token)
        row["draft"] = ask.draft
        texts.append(self.template.answer(ask.prompt, ask.draft))
        ids = [*self._ids(texts), *self._turn()]
        return self._sequence(ids, (*seed, 1), "answer", row, on_token)

    def _ids(self, texts):
        """Texts, each tokenised on its own, joined."""
        return [int(i) for ids in self.template.encode(texts) for i in ids]

    def _turn(self):
        return self._ids([self.template.turn(self.instruction)])

    def _sequence(self, ids, seed, stage, row, on_token):
        hear = on_token and (lambda token: on_token(stage, token))
        return Sequence(ids, seed, hear, (stage, row))


# ----------------------------------------------------------------------------- the command line


@dataclass
class Settings:
    """Every flag."""

    model: str | None = flag(None, "HF directory or hub id")
    prompt: str | None = flag(None, "one question; its answer streams to the terminal")
    data: str | None = flag(None, "prompts: a file of prompt, instruction or pairs, or a glob")
    mode: str = flag("plain", "what is asked", MODES)
    instruction: str = flag("better", "refining instruction: better, another, worse, or your text")
    out: str | None = flag(None, "jsonl file, continued if it is there; default: standard output")
    temperature: float = flag(0.7, "of the softmax; 0 takes the likeliest token")
    top_p: float = flag(0.95, "mass of the nucleus that tokens are drawn from")
    max_new_tokens: int = flag(2048, "longest answer")
    seed: int = flag(0, "random numbers: prompt i draws from (seed, i)")
    batch: int = flag(16, "sequences at work at once")
    limit: int | None = flag(None, "only the first N prompts")
    dtype: str | None = flag(None, "default: bf16 on CUDA, else fp32", ("bf16", "fp32"))
    device: str = flag("auto", "where to run", ("auto", "cpu", "cuda"))


def check(s):
    """Raise UserError for flags that make no sense."""
    if s.model is None:
        raise UserError("--model is missing; give a Hugging Face directory or a hub id")
    if (s.prompt is None) == (s.data is None):
        raise UserError("give either --prompt TEXT or --data FILE")
    if s.temperature < 0 or not 0 < s.top_p <= 1:
        raise UserError("--temperature must not be negative, --top_p must be in (0, 1]")
    for name in ("max_new_tokens", "batch", "limit"):
        if getattr(s, name) is not None and getattr(s, name) < 1:
            raise UserError(f"--{name} {getattr(s, name)}: must be at least 1")


def load_model(directory, dtype=None, device="auto", head="logps", name="--model"):
    """HF directory or hub id -> (Transformer, Template); UserError if it has another head."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is available")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype or ("bf16" if device == "cuda" else "fp32")
    directory = resolve(directory, name)
    _, config = read_config(directory)
    if config.head != head:
        kinds = {"logps": "a language model", "reward": "a reward model"}
        raise UserError(f"{name} {directory} is {kinds[config.head]}; {kinds[head]} is needed")
    template = Template(directory)
    if template.fallback:
        print(f"{directory} has no chat template: using the plain one", file=sys.stderr)
    return load(directory, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], device), template


def stop_ids(template):
    """Ids that end an answer: eos_token_id of both configs, and the template's end of turn."""
    ids = list(template.end_ids) if len(template.end_ids) == 1 else []
    for name in ("generation_config.json", "config.json"):
        eos = read_json(template.directory / name).get("eos_token_id")
        ids += eos if isinstance(eos, list) else [] if eos is None else [eos]
    return frozenset(int(i) for i in ids)


def read_asks(source, limit=None):
    """Prompts of a file, glob or hub id -> list of Ask, one per row, in file order.

    A row is anything that pairs.read_pairs takes, or has a `prompt` (text or messages) or an
    `instruction` (text) alone; `draft` is taken where it is there. Rows that are no usable pair
    are left out, and reported.
    """
    drops, asks = Drops(), []
    for where, record in (row for file in data_files(source) for row in records(file)):
        if len(asks) == limit:
            break
        prompt = read_prompt(record, where, drops)
        if prompt is not None:
            asks.append(Ask(prompt, record.get("draft")))
    if drops.rules:
        print(f"{source}: dropped {drops}", file=sys.stderr)
    if not asks:
        raise UserError(f"{source}: no prompts")
    return asks


def read_prompt(record, where, drops):
    """One record -> messages that end with a user turn, or None when dropped."""
    if not isinstance(record, dict) or {"chosen", "messages"} & record.keys():
        pair = to_pair(record, where, drops, need_rejected=False)
        return pair and pair.prompt
    value = record.get("prompt", record.get("instruction"))
    if value is None:
        columns = sorted(record)
        raise UserError(f"{where}: columns {columns}; expected prompt, instruction or chosen")
    messages = as_messages(value, where)
    if not messages or messages[-1]["role"] != "user":
        raise UserError(f"{where}: a prompt must end with a user turn")
    return messages


def open_rows(out, asks, settings):
    """Open --out to go on -> (binary file, how many rows a former run left there).

    A last line that was cut off is removed; UserError if the rows answer something else.
    """
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        file = open(out, "a+b")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from error
    file.seek(0)
    lines = file.read().split(b"\n")
    file.truncate(sum(len(line) + 1 for line in lines[:-1]))
    if len(lines) - 1 > len(asks):
        raise UserError(f"{out}: {len(lines) - 1} rows for {len(asks)} prompts; move it away")
    for n, (line, ask) in enumerate(zip(lines[:-1], asks, strict=False), 1):
        row = parse_json(line, f"{out}:{n}")
        for key, value in ({"prompt": ask.prompt} | settings).items():
            if not isinstance(row, dict) or row.get(key) != value:
                raise UserError(f"{out}:{n}: of another run ({key} differs); move the file away")
    return file, len(lines) - 1


class Stream:
    """Prints tokens as they come: an answer to standard output, a draft to standard error."""

    def __init__(self, template):
        self.tokenizer, self.stage, self.file = template.tokenizer, None, None

    def __call__(self, stage, token):
        if stage != self.stage:
            self.close()
            self.stage, self.file = stage, sys.stderr if stage == "draft" else sys.stdout
            self.text = DecodeStream(skip_special_tokens=True)  # waits for whole characters
        print(self.text.step(self.tokenizer, token) or "", end="", file=self.file, flush=True)

    def close(self):
        if self.file:
            print(file=self.file, flush=True)


def main():
    s = parse(Settings, __doc__.splitlines()[0])
    check(s)
    one = s.prompt is not None
    asks = [Ask([{"role": "user", "content": s.prompt}])] if one else read_asks(s.data, s.limit)
    names = ("model", "mode", "seed", "temperature", "top_p", "max_new_tokens")
    settings = {name: getattr(s, name) for name in names}
    instruction = INSTRUCTIONS.get(s.instruction, s.instruction)
    settings |= {} if s.mode == "plain" else {"instruction": instruction}
    file, done = open_rows(s.out, asks, settings) if s.out else (sys.stdout.buffer, 0)
    model, template = load_model(s.model, s.dtype, s.device)
    sampling = Sampling(s.max_new_tokens, s.temperature, s.top_p, stop_ids(template))
    answers = Answers(model, template, sampling, s.mode, instruction, s.seed, s.batch)
    stream = Stream(template) if one else None
    unfinished = 0
    with progress("generate", len(asks), "answer", one, initial=done) as bar:
        for row in answers(asks[done:], done, stream):
            bar.update()
            unfinished += not row["finished"]
            if s.out or not one:
                file.write(json.dumps(row | settings, ensure_ascii=False).encode() + b"\n")
                file.flush()
    if one:
        stream.close()
    if unfinished:
        print(f"{unfinished} answers were cut at --max_new_tokens", file=sys.stderr)


if __name__ == "__main__":
    run(main)
