"""Generate answers: `python generate.py --model DIR --prompt TEXT` or `--data FILE --out FILE`.

IFSR's three ways to ask for an answer (section 3.1), x the dialogue and i the instruction:

    plain       x -> y
    instruct    x, i -> y             i as a suffix of the last user turn
    refine      x, y', i -> y         a draft y' (generated as in plain, or the row's `draft`) and
                                      one more user turn i, joined token by token as in training

A question of several turns (MT-Bench) is asked so at each of them, behind the answers before. The
tokens come from sampling.py, or the answers from a server (endpoint.py); benchmarks.py has the
file formats, journal.py what a killed run leaves.
"""

import os
import sys
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers.decoders import DecodeStream

from hub.benchmarks import FORMATS, Ask, read_asks, refuse_twins, token_counter, write_answers
from hub.endpoint import Endpoint, Refused, public, together
from hub.template import INSTRUCTIONS, Template, with_suffix
from hub.weights import pin, read_config, resolve
from jobs.cli import UserError, flag, parse, progress, run
from jobs.files import Shared, read_json, to_line
from model import load
from sampling import Sampling, Sequence, complete

# ----------------------------------------------------------------------------- the three modes

MODES = ("plain", "instruct", "refine")


class Job:
    """An Ask on its way: the row that it becomes, and its number among all prompts."""

    def __init__(self, ask, number):
        self.ask, self.number = ask, number
        self.row = {"prompt": ask.prompt} | ask.about
        if ask.turns:
            self.row["turns"] = 1 + len(ask.turns)

    @property
    def turn(self):
        """How many turns have been answered and left behind."""
        return (len(self.row["prompt"]) - len(self.ask.prompt)) // 2

    @property
    def draft(self):
        """The draft that the question brought along, which is one of its first answer."""
        return self.ask.draft if self.turn == 0 else None

    def answered(self, text, finished):
        """Take an answer; returns whether it was that of the last turn.

        The prompt of the finished row is all that was said before the last answer.
        """
        self.row |= {"answer": text, "finished": self.row.get("finished", True) and finished}
        if self.turn == len(self.ask.turns):
            return True
        if "draft" in self.row:
            self.row.setdefault("earlier_drafts", []).append(self.row.pop("draft"))
        self.row["prompt"] = [
            *self.row["prompt"],
            {"role": "assistant", "content": text},
            {"role": "user", "content": self.ask.turns[self.turn]},
        ]
        return False


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
    static: bool = False  # cache, for a compiled step

    def __call__(self, asks, numbers=None, on_token=None):
        """Yield one row {prompt, answer, [draft,] finished, …} per Ask, in their order."""
        numbers = range(len(asks)) if numbers is None else numbers
        return in_order(self.numbered(asks, numbers, on_token), numbers)

    def numbered(self, asks, numbers, on_token=None):
        """Yield (number, row) as answers end.

        Turn t of Ask n draws its random numbers from (seed, n, 2 t), its refinement from
        (seed, n, 2 t + 1). on_token(stage, token) hears the tokens, with stage "draft" or "answer".
        """
        jobs = [Job(ask, n) for ask, n in zip(asks, numbers, strict=True)]
        queue = deque(self._first(job, on_token) for job in jobs)
        for seq in complete(self.model, queue, self.sampling, self.batch, self.static):
            stage, job = seq.tag
            text = self.template.decode(seq.answer)
            if stage == "draft":  # its refinement goes first, so that rows end nearly in order
                job.row["draft"] = text
                ids = [*seq.prompt, *seq.answer, *self.template.end_ids, *self._turn()]
                queue.appendleft(self._sequence(ids, 1, "answer", job, on_token))
            elif job.answered(text, seq.finished):
                yield job.number, job.row
            else:
                queue.appendleft(self._first(job, on_token))

    def _first(self, job, on_token):
        """The first sequence that a turn of a Job needs."""
        prompt = job.row["prompt"]
        if self.mode == "instruct":
            prompt = with_suffix(prompt, self.instruction)
        texts = [self.template.render(prompt, generation=True)]
        if self.mode != "refine":
            return self._sequence(self._ids(texts), 0, "answer", job, on_token)
        if job.draft is None:
            return self._sequence(self._ids(texts), 0, "draft", job, on_token)
        job.row["draft"] = job.draft
        texts.append(self.template.answer(prompt, job.draft))
        ids = [*self._ids(texts), *self._turn()]
        return self._sequence(ids, 1, "answer", job, on_token)

    def _ids(self, texts):
        """Texts, each tokenised on its own, joined."""
        return [int(i) for ids in self.template.encode(texts) for i in ids]

    def _turn(self):
        return self._ids([self.template.turn(self.instruction)])

    def _sequence(self, ids, refined, stage, job, on_token):
        hear = on_token and (lambda token: on_token(stage, token))
        seed = (self.seed, job.number, 2 * job.turn + refined)
        return Sequence(ids, seed, hear, (stage, job))


def in_order(numbered, numbers):
    """(number, row) as they end -> rows in the order of `numbers`, each as soon as it can."""
    waiting, held = iter(numbers), {}
    wanted = next(waiting, None)
    for number, row in numbered:
        held[number] = row
        while wanted in held:
            yield held.pop(wanted)
            wanted = next(waiting, None)
    yield from (held[number] for number in sorted(held))  # behind one that a server refused


@dataclass
class RemoteAnswers:
    """The same three modes, asked of an Endpoint by messages; `concurrency` Asks at a time."""

    endpoint: Endpoint
    sampling: Sampling
    mode: str = "plain"
    instruction: str = INSTRUCTIONS["better"]
    seed: int = 0
    concurrency: int = 8

    def __post_init__(self):
        self.refused = []  # (number, what the server said)

    def numbered(self, asks, numbers):
        """Yield (number, row) as answers end; an Ask that the server refuses goes to `refused`."""
        jobs = [Job(ask, n) for ask, n in zip(asks, numbers, strict=True)]
        for job, refusal in together(self._answer, jobs, self.concurrency):
            if refusal is None:
                yield job.number, job.row
            else:
                self.refused.append((job.number, refusal))

    def _answer(self, job):
        """Ask turn after turn -> None, or why the server refuses."""
        try:
            while True:
                prompt = job.row["prompt"]
                if self.mode == "instruct":
                    prompt = with_suffix(prompt, self.instruction)
                elif self.mode == "refine":
                    draft = job.draft
                    job.row["draft"] = self._chat(prompt, job, 0).text if draft is None else draft
                    said = [("assistant", job.row["draft"]), ("user", self.instruction)]
                    prompt = prompt + [{"role": who, "content": text} for who, text in said]
                reply = self._chat(prompt, job, int(self.mode == "refine"))
                if job.answered(reply.text, reply.finished):
                    return None
        except Refused as refusal:
            return str(refusal)

    def _chat(self, messages, job, refined):
        """One request; its seed is told by the same numbers that the own sampler draws from."""
        numbers = (self.seed, job.number, 2 * job.turn + refined)
        reply = self.endpoint.chat(
            messages,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            max_tokens=self.sampling.max_new_tokens,
            seed=int(np.random.SeedSequence(numbers).generate_state(1)[0] >> 1),  # 31 bits
        )
        told = (reply.tokens_in, reply.tokens_out)
        if None not in told:  # a server may leave its counts out
            job.row["usage"] = [
                a + b for a, b in zip(job.row.get("usage", (0, 0)), told, strict=True)
            ]
        return reply


# ----------------------------------------------------------------------------- the command line


@dataclass
class Settings:
    """Every flag."""

    model: str | None = flag(None, "HF directory or hub id, or the --endpoint's name for it")
    revision: str | None = flag(None, "branch, tag or commit of --model on the hub")
    prompt: str | None = flag(None, "one question; its answer streams to the terminal")
    data: str | None = flag(None, "questions, prompts or pairs: a file, a glob or a hub id")
    mode: str = flag("plain", "what is asked", MODES)
    instruction: str = flag("better", "refining instruction: better, another, worse, or your text")
    out: str | None = flag(None, "file, continued if it is there; default: standard output")
    format: str = flag("jsonl", "of --out; README has them", tuple(FORMATS))
    name: str | None = flag(None, "what the benchmark's file calls the model; default: --model")
    temperature: float = flag(0.7, "of the softmax; 0 takes the likeliest token")
    top_p: float = flag(0.95, "mass of the nucleus that tokens are drawn from")
    max_new_tokens: int = flag(2048, "longest answer")
    seed: int = flag(0, "random numbers: prompt i draws from (seed, i)")
    batch: int = flag(16, "sequences at work at once")
    limit: int | None = flag(None, "only the first N prompts")
    dtype: str | None = flag(None, "default: bf16 on CUDA, else fp32", ("bf16", "fp32"))
    device: str = flag("auto", "where to run", ("auto", "cpu", "cuda"))
    compile: bool = flag(False, "static cache and compiled steps: for long answers on CUDA")
    endpoint: str | None = flag(None, "OpenAI-compatible server, as http://127.0.0.1:8000/v1")
    concurrency: int = flag(8, "questions that --endpoint has at once")
    timeout: float = flag(600.0, "seconds that --endpoint may take for one answer")
    retries: int = flag(8, "further tries of a request before --endpoint is given up")


def check(s, world=1):
    """Raise UserError for flags that make no sense."""
    if s.model is None:
        raise UserError("--model is missing; give a Hugging Face directory or a hub id")
    if (s.prompt is None) == (s.data is None):
        raise UserError("give either --prompt TEXT or --data FILE")
    if s.temperature < 0 or not 0 < s.top_p <= 1:
        raise UserError("--temperature must not be negative, --top_p must be in (0, 1]")
    for name in ("max_new_tokens", "batch", "limit", "concurrency"):
        if getattr(s, name) is not None and getattr(s, name) < 1:
            raise UserError(f"--{name} {getattr(s, name)}: must be at least 1")
    if not s.out and (s.format != "jsonl" or world > 1):
        raise UserError("--out FILE is needed for a benchmark's format and for several processes")
    if s.format == "alpaca_eval" and not s.out.endswith(".json"):
        raise UserError(f"--out {s.out}: alpaca_eval reads .json files alone")
    if s.endpoint and world > 1:
        raise UserError("--endpoint wants a single process; --concurrency N asks N at once")


def load_model(directory, dtype=None, device="auto", head="logps", name="--model"):
    """HF directory or hub id -> (Transformer, Template); UserError if it has another head."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is available")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
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


def open_rows(s, asks, rank, world):
    """The rows of --out, to go on with. UserError if it holds rows of another run.

    In any format but jsonl they lie in OUT.rows.jsonl, with seeds and settings, beside OUT itself.
    """
    settings = recorded(s)

    def check(where, n, row):
        row = row if isinstance(row, dict) else {}
        faults = [name for name, value in settings.items() if row.get(name) != value]
        if s.endpoint and row.get("endpoint"):  # a server may have moved since
            faults = [name for name in faults if name != "endpoint"]
        faults = faults if asks[n].is_of(row) else ["prompt", *faults]
        if faults:
            fault = f"{where}: of another run ({faults[0]} differs)"
            raise UserError(f"{fault}; move the file away")

    return Shared(rows_file(s), len(asks), check, rank, world)


def rows_file(s):
    return s.out if s.format == "jsonl" else f"{s.out}.rows.jsonl"


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


def answerer(s, mode="plain", instruction="better", static=False):
    """What answers: the own sampler with --model loaded, or the server at --endpoint."""
    instruction = INSTRUCTIONS.get(instruction, instruction)
    if s.endpoint:
        endpoint = Endpoint(s.endpoint, s.model, s.timeout, s.retries)
        sampling = Sampling(s.max_new_tokens, s.temperature, s.top_p)
        return RemoteAnswers(endpoint, sampling, mode, instruction, s.seed, s.concurrency)
    model, template = load_model(s.model, s.dtype, s.device)
    sampling = Sampling(s.max_new_tokens, s.temperature, s.top_p, stop_ids(template))
    return Answers(model, template, sampling, mode, instruction, s.seed, s.batch, static)


def recorded(s):
    """What a row says of how it came about."""
    names = ("model", "mode", "seed", "temperature", "top_p", "max_new_tokens")
    settings = {name: getattr(s, name) for name in names}
    if s.mode != "plain":
        settings["instruction"] = INSTRUCTIONS.get(s.instruction, s.instruction)
    return settings | ({"endpoint": public(s.endpoint)} if s.endpoint else {})


def produce(s, asks, numbers, store):
    """Answer these of the Asks: into the store, else to standard output in their order.

    An answer to --prompt streams to the terminal as well; a server's is printed when it is whole.
    """
    settings, one = recorded(s), s.prompt is not None
    answers = answerer(s, s.mode, s.instruction, s.compile)
    stream = Stream(answers.template) if one and not s.endpoint else None
    numbered = answers.numbered([asks[n] for n in numbers], numbers, *filter(None, [stream]))
    if store is None:
        numbered = enumerate(in_order(numbered, numbers))
    hidden, done, cut, empty = one or (store and store.rank), len(asks) - len(numbers), 0, 0
    with progress("generate", len(asks), "answer", hidden, initial=done) as bar:
        for n, row in numbered:
            bar.update()
            cut, empty = cut + (not row["finished"]), empty + (not row["answer"])
            if store:
                store.append(n, row | settings)
            elif not one:
                sys.stdout.buffer.write(to_line(row | settings))
                sys.stdout.buffer.flush()
            if one and not stream:
                print(row["answer"])
    if stream:
        stream.close()
    for count, fault in ((cut, "were cut at --max_new_tokens"), (empty, "are empty")):
        if count:
            print(f"{count} answers {fault}", file=sys.stderr)
    if s.endpoint and answers.refused:
        number, said = min(answers.refused)
        raise UserError(
            f"the server refused {len(answers.refused)} of {len(numbers)} prompts, "
            f"as number {number + 1}: {said}; the other answers are kept"
        )


def main():
    s = pin(parse(Settings, __doc__.splitlines()[0]))
    rank, world = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    check(s, world)
    if s.prompt is not None:
        asks = [Ask([{"role": "user", "content": s.prompt}])]
    else:
        asks = read_asks(s.data, s.limit)
    tokens = None
    if s.format == "arena_hard":
        refuse_twins(asks, s.data or "--prompt")
        tokens = token_counter(s.model)
    store = open_rows(s, asks, rank, world) if s.out else None
    numbers = store.mine if store else list(range(len(asks)))
    if numbers:
        produce(s, asks, numbers, store)
    if store and store.join() and s.format != "jsonl":
        write_answers(s.out, s.format, rows_file(s), s.name or s.model, tokens)


if __name__ == "__main__":
    run(main)
