"""Data preparation, timed: read, tokenise, plan and pack; again from the cache; and TRL beside it.

    python -m bench.data_preparation --source hh-harmless-test.jsonl.gz --sizes 15000,30000,60000

The pairs are as long as UltraFeedback's (log-normal: prompts of about 180 tokens on average,
answers of about 280); their texts are joined from the turns of --source, so that the tokenizer does
real work. Every stage runs in a process of its own, so that its peak memory is its own; times are
without imports. TRL prepares the first --peer_pairs of the same file (DPOTrainer's own preparation:
template, tokenise, truncate), in one process, as by default.
"""

import json
import os
import random
import tempfile
import time
from dataclasses import dataclass

import losses
from bench import measuring
from bench.measuring import fresh, whole_numbers
from data import Plan, pack
from hub.template import Template
from jobs.cli import flag, parse, require, run
from jobs.processes import peak_memory
from pairs.read import Drops, read_pairs
from train import TrainFlags, load_data


@dataclass(frozen=True)
class PreparationFlags:
    """Every flag."""

    model: str = flag("~/.cache/nanopo/smollm2-135m-instruct", "HF directory: its tokenizer")
    source: str | None = flag(None, "preference data whose turns the texts are made of")
    sizes: str = flag("60000", "pairs in the file; several, joined by commas, one after the other")
    peer_pairs: int = flag(1000, "pairs that TRL prepares; 0: without TRL")
    loss: str = flag("ins_dpo", "objective whose paths are laid out")
    max_len: int = flag(4096, "tokens of every single path")
    out: str = flag("bench/out/data_preparation.json", "where the figures go")


# ----------------------------------------------------------------------------- the pairs

CHARACTERS = 4.3  # per token, about, of this text under this tokenizer
LENGTHS = {"prompt": (100, 1.1), "chosen": (220, 0.75), "rejected": (210, 0.75)}  # median, spread


def write_pairs(file, n, source):
    """n pairs in the layout of ultrafeedback_binarized; their texts are turns of `source`, joined
    at random to log-normal lengths."""
    pairs = read_pairs(source, Drops())
    turns = [m["content"] for pair in pairs for m in pair.prompt]
    turns += [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]
    rng = random.Random(0)

    def text(median, spread):
        size, words = int(CHARACTERS * median * rng.lognormvariate(0, spread)), ""
        while len(words) < max(8, min(size, 40000)):
            words += rng.choice(turns) + "\n\n"
        return words[: max(8, size)].strip()

    with open(file, "w", encoding="utf-8") as f:
        for _ in range(n):
            texts = {part: text(*length) for part, length in LENGTHS.items()}
            asked, row = {"role": "user", "content": texts["prompt"]}, {"prompt": texts["prompt"]}
            for name in ("chosen", "rejected"):
                row[name] = [asked, {"role": "assistant", "content": texts[name]}]
            f.write(json.dumps(row) + "\n")


# ----------------------------------------------------------------------------- the stages


def ours(model, file, loss, max_len):
    """What train.py does before its model: tokenise, size every pair, plan and pack an epoch."""
    start, cpu = time.time(), time.process_time()
    recipe = losses.recipe(loss)
    flags = TrainFlags(model=model, data=file, max_len=max_len, loss=loss)
    sets, _ = load_data(flags, Template(model), recipe)
    train = sets["train"]
    sizes = [train.size(i, recipe.paths) for i in range(len(train))]
    plan, row_tokens = Plan(len(train), 128, 0, 1.0), max(8192, max(sizes))
    for step in range(plan.steps):
        pack([sizes[i] for i in plan.pairs(step)], row_tokens)
    seconds, cpu = time.time() - start, time.process_time() - cpu
    return told(sum(map(len, sets.values())), seconds, cpu)


def trl(model, file, n, max_len):
    """DPOTrainer's preparation of the first pairs of the file, up to its constructor's end."""
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    with open(file, encoding="utf-8") as f:
        rows = [json.loads(line) for line, _ in zip(f, range(n), strict=False)]
    data = Dataset.from_list([{k: r[k] for k in ("chosen", "rejected")} for r in rows])
    small = LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8,
                        num_hidden_layers=1, num_attention_heads=1)  # fmt: skip
    options = {"max_length": max_len, "report_to": [], "use_cpu": True, "bf16": False}
    start, cpu = time.time(), time.process_time()
    with tempfile.TemporaryDirectory() as out:
        LlamaForCausalLM(small).save_pretrained(out)  # TRL loads policy and reference by path
        config = DPOConfig(output_dir=out, **options)
        trainer = DPOTrainer(out, None, config, train_dataset=data, processing_class=tokenizer)
    seconds, cpu = time.time() - start, time.process_time() - cpu
    return told(len(trainer.train_dataset), seconds, cpu)


def told(pairs, seconds, cpu):
    """The figures of a stage."""
    figures = {"pairs": pairs, "seconds": seconds, "cpu_seconds": cpu}
    return figures | {"ms": 1e3 * cpu / pairs, "peak_gib": peak_memory("cpu")}


def measure(s):
    """{size of the file and stage: figures}, each of a process of its own."""
    sizes, found = whole_numbers(s.sizes), {}
    given = {"model": os.path.expanduser(s.model), "max_len": s.max_len}
    for size in sizes:
        with tempfile.TemporaryDirectory() as scratch:
            given["file"] = f"{scratch}/pairs.jsonl"
            write_pairs(given["file"], size, s.source)
            env = {"NANOPO_CACHE": f"{scratch}/cache", "TOKENIZERS_PARALLELISM": "true"}
            for stage in ("first", "cached"):
                ours = {**given, "loss": s.loss}
                found[f"{size}, {stage}"] = fresh("data_preparation.ours", env=env, **ours)
            if size == sizes[-1] and s.peer_pairs:
                peer = {**given, "n": s.peer_pairs}
                found[f"{size}, TRL"] = fresh("data_preparation.trl", env=env, **peer)
    return found


def main():
    s = parse(PreparationFlags, __doc__.splitlines()[0])
    require(s, "source")
    found = measure(s)
    headers = ("file, stage", "pairs", "seconds", "CPU seconds", "CPU ms per pair", "peak GiB")
    lines = [(name, *figures.values()) for name, figures in found.items()]
    measuring.tell(s, found, measuring.table(headers, lines))


if __name__ == "__main__":
    run(main)
