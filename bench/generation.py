"""Tokens per second of this project's sampler and of transformers' generate, greedy, same model.

    python bench/generation.py                                 # SmolLM2-135M on hh-rlhf prompts
    python bench/generation.py --device cuda --dtype bf16 --static --shape llama-3.2-1b --mix hh

Both decode the same prompts at each batch size and stop where the model does, or at
--max_new_tokens. transformers takes a padded batch at a time; here a sequence that ends makes room
for the next, so with more prompts than the batch there is less waiting. A run before the counted
ones warms up. *Equal* counts the answers that agree token for token: in fp32 all should, unless two
logits are equal to within rounding; in bf16 not all do, since a batch's size moves the rounding.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from bench import measuring  # noqa: E402
from bench.measuring import DTYPES, table  # noqa: E402
from bench.workload import Workload  # noqa: E402
from generate import Sampling, sample  # noqa: E402
from hub.template import Template  # noqa: E402
from jobs.cli import UserError, flag, parse, run  # noqa: E402
from model import load  # noqa: E402
from pairs.read import Drops, read_pairs  # noqa: E402


@dataclass
class Settings(Workload):
    """Flags; of the pairs the prompts are asked."""

    pairs: int = flag(64, "prompts; of a batch of one, an eighth of them")
    batches: str = flag("1,16,64", "batch sizes")
    max_new_tokens: int = flag(64, "length of an answer that does not end by itself")
    static: bool = flag(False, "also transformers with its static, compiled cache")
    repeat: int = flag(3, "runs of each contender, in turn")
    out: str = flag("bench/out/generation.json", "where the figures go")


def prompts_of(s, template, data):
    """Rendered and tokenised prompts, as lists of ids."""
    pairs = read_pairs(str(data), Drops(), s.pairs)
    texts = [template.render(pair.prompt, generation=True) for pair in pairs]
    return [ids.tolist() for ids in template.encode(texts)]


def ours(s, directory, stop_ids):
    """answer(prompts, batch) -> token ids, by generate.py."""
    model = load(directory, DTYPES[s.dtype], s.device)
    sampling = Sampling(s.max_new_tokens, temperature=0, stop_ids=frozenset(stop_ids))
    return lambda prompts, batch: sample(model, prompts, sampling, batch=batch)


def theirs(s, directory, stop_ids, static=False):
    """The same by transformers, a left-padded batch at a time; answers are cut where they end."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise UserError(f"{error}: pip install -r requirements-dev.txt") from error

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[s.dtype]).to(s.device)
    options = {"do_sample": False, "max_new_tokens": s.max_new_tokens, "top_p": None}
    options |= {"eos_token_id": list(stop_ids), "pad_token_id": stop_ids[0], "temperature": None}
    options |= {"cache_implementation": "static"} if static else {}

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


def measure(answer, prompts, batch):
    """Tokens per second, and the answers."""
    start = time.perf_counter()
    answers = answer(prompts, batch)
    seconds = time.perf_counter() - start
    return {"tokens_per_second": sum(map(len, answers)) / seconds, "answers": answers}


def compare(contenders, prompts, batch, repeat):
    """{contender: figures of each run}, all on the same prompts at one batch size."""
    few = prompts if batch > 1 else prompts[: max(1, len(prompts) // 8)]
    for answer in contenders.values():
        answer(few[:batch], batch)
    runs = {name: [] for name in contenders}
    for _ in range(repeat):
        for name, answer in contenders.items():
            runs[name].append(measure(answer, few, batch))
    return runs


def rows(by_batch):
    """Lines of the table: medians, the ratio, and how many answers are equal."""
    for batch, runs in by_batch.items():
        here = runs["here"][0]["answers"]
        speed = {
            name: statistics.median(x["tokens_per_second"] for x in figures)
            for name, figures in runs.items()
        }
        for name, figures in runs.items():
            answers = figures[0]["answers"]
            equal = sum(a == b for a, b in zip(here, answers, strict=True))
            same = None if name == "here" else f"{equal} of {len(here)}"
            tokens = sum(map(len, answers))
            yield batch, name, speed[name], f"{speed['here'] / speed[name]:.2f}x", tokens, same


def main():
    s = parse(Settings, __doc__.splitlines()[0])
    with s.ready() as (directory, data):
        template = Template(directory)
        prompts, stop_ids = prompts_of(s, template, data), template.end_ids.tolist()[:1]
        contenders = {"here": ours(s, directory, stop_ids)}
        contenders["transformers"] = theirs(s, directory, stop_ids)
        if s.static:
            contenders["transformers, static cache"] = theirs(s, directory, stop_ids, static=True)
        batches = [int(batch) for batch in s.batches.split(",")]
        found = {b: compare(contenders, prompts, b, s.repeat) for b in batches}
    headers = ("batch", "contender", "tokens/s", "here over it", "tokens", "equal answers")
    lines = list(rows(found))
    speeds = {
        f"batch {batch}, {name}": [figures["tokens_per_second"] for figures in run]
        for batch, runs in found.items()
        for name, run in runs.items()
    }
    figures = {"tokens_per_second": speeds, "table": [headers, *lines]}
    measuring.tell(s, figures, table(headers, lines))


if __name__ == "__main__":
    run(main)
