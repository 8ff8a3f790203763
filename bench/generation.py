"""Tokens per second of this project's sampler and of transformers' generate, greedy, same model.

    python -m bench.generation                                 # SmolLM2-135M on hh-rlhf prompts
    python -m bench.generation --device cuda --dtype bf16 --shape llama-3.2-1b --mix hh

Both decode the same prompts at each batch size and stop where the model does, or at
--max_new_tokens. transformers takes a padded batch at a time; here a sequence that ends makes room
for the next, so with more prompts than the batch there is less waiting. A run before the counted
ones warms up. *Equal* counts the answers that agree token for token: in fp32 all should, unless two
logits are equal to within rounding; in bf16 not all do, since a batch's size moves the rounding.
"""

import time
from collections import deque
from dataclasses import dataclass

import torch

from bench import measuring
from bench.inputs import WorkloadFlags
from bench.measuring import DTYPES, median, table, times, whole_numbers
from generate import Sampling, Sequence, complete
from hub.template import Template
from jobs.cli import UserError, flag, parse, run
from kernels import chains
from model import load
from pairs.read import Drops, read_pairs


def sample(model, prompts, sampling, seed=0, batch=16):
    """Lists of ids in, lists of ids out, in the same order; prompt i draws from (seed, i)."""
    sequences = [Sequence(list(prompt), (seed, i)) for i, prompt in enumerate(prompts)]
    deque(complete(model, deque(sequences), sampling, batch), maxlen=0)  # to the end
    return [seq.answer for seq in sequences]


@dataclass(frozen=True)
class GenerationFlags(WorkloadFlags):
    """Flags; of the pairs the prompts are asked."""

    pairs: int = flag(64, "prompts; of a batch of one, an eighth of them")
    batches: str = flag("1,16,64", "batch sizes")
    max_new_tokens: int = flag(64, "length of an answer that does not end by itself")
    repeat: int = flag(3, "runs of each contender, in turn")
    out: str = flag("bench/out/generation.json", "where the figures go")


def ours(s, directory, stop_ids):
    """answer(prompts, batch) -> token ids, by this project's sampler."""
    model = load(directory, DTYPES[s.dtype], s.device)
    model.attend = chains.attend
    sampling = Sampling(s.max_new_tokens, temperature=0, stop_ids=frozenset(stop_ids))
    return lambda prompts, batch: sample(model, prompts, sampling, batch=batch)


def theirs(s, directory, stop_ids):
    """The same by transformers, a left-padded batch at a time; answers are cut where they end."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise UserError(f"{error}: pip install -r requirements-dev.txt") from error

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[s.dtype]).to(s.device)
    options = {"do_sample": False, "max_new_tokens": s.max_new_tokens, "top_p": None}
    options |= {"eos_token_id": list(stop_ids), "pad_token_id": stop_ids[0], "temperature": None}

    @torch.no_grad()
    def answer(prompts, batch):
        answers = []
        for group in (prompts[i : i + batch] for i in range(0, len(prompts), batch)):
            longest = max(map(len, group))
            rows = [[stop_ids[0]] * (longest - len(ids)) + ids for ids in group]
            seen = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in group]
            ids, mask = (torch.tensor(x, device=s.device) for x in (rows, seen))
            found = model.generate(ids, attention_mask=mask, **options)[:, longest:].tolist()
            answers += [until_stop(row, stop_ids) for row in found]
        return answers

    return answer


def until_stop(ids, stop_ids):
    """The ids before the first that ends generation."""
    return ids[: next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))]


def compare(contenders, prompts, batch, repeat):
    """({contender: tokens per second of each run}, {contender: answers}) at one batch size."""
    few = prompts if batch > 1 else prompts[: max(1, len(prompts) // 8)]
    answers = {name: answer(few[:batch], batch) for name, answer in contenders.items()}

    def measure(name):
        start = time.perf_counter()
        answers[name] = contenders[name](few, batch)
        seconds = time.perf_counter() - start
        return {"tokens_per_second": sum(map(len, answers[name])) / seconds}

    measures = {name: lambda name=name: measure(name) for name in contenders}
    return measuring.in_turn(measures, repeat), answers


def rows(batch, runs, answers):
    """Lines of the table: medians, the ratio, and how many answers are equal."""
    speed = {name: median(figures)["tokens_per_second"] for name, figures in runs.items()}
    for name, found in answers.items():
        equal = sum(a == b for a, b in zip(answers["here"], found, strict=True))
        same = None if name == "here" else f"{equal} of {len(found)}"
        ratio = times(speed["here"], speed[name])
        yield batch, name, speed[name], ratio, sum(map(len, found)), same


def main():
    s = parse(GenerationFlags, __doc__.splitlines()[0])
    lines, figures = [], {}
    with s.ready() as (directory, data):
        template = Template(directory)
        asked = [pair.prompt for pair in read_pairs(data, Drops(), s.pairs)]
        texts = [template.render(messages, generation=True) for messages in asked]
        prompts, stop_ids = [x.tolist() for x in template.encode(texts)], template.end_ids.tolist()
        contenders = {"here": ours, "transformers": theirs}
        contenders = {name: make(s, directory, stop_ids[:1]) for name, make in contenders.items()}
        for batch in whole_numbers(s.batches):
            figures[f"batch {batch}"], answers = compare(contenders, prompts, batch, s.repeat)
            lines += rows(batch, figures[f"batch {batch}"], answers)
    headers = ("batch", "contender", "tokens/s", "here over it", "tokens", "equal answers")
    measuring.tell(s, figures, table(headers, lines))


if __name__ == "__main__":
    run(main)
