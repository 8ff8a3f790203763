"""Data preparation, timed: read, tokenise, plan and pack; again from the cache; and TRL beside it.

    python bench/data_preparation.py --source hh-harmless-test.jsonl.gz --sizes 15000,30000,60000

The pairs are as long as UltraFeedback's (log-normal: prompts of about 180 tokens on average,
answers of about 280); their texts are joined from the turns of --source, so that the tokenizer does
real work. Every stage runs in a process of its own, so that its peak memory is its own; times are
without imports. TRL prepares the first --peer_pairs of the same file (DPOTrainer's own preparation:
template, tokenise, truncate), in one process, as by default. Figures: docs/data.md.
"""

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from jobs.cli import UserError, flag, parse, require, run  # noqa: E402
from pairs.read import Drops, read_pairs  # noqa: E402


@dataclass
class Settings:
    """Every flag."""

    model: str = flag("~/.cache/nanopo/smollm2-135m-instruct", "HF directory: its tokenizer")
    source: str | None = flag(None, "preference data whose turns the texts are made of")
    sizes: str = flag("60000", "pairs in the file; several, joined by commas, one after the other")
    peer_pairs: int = flag(1000, "pairs that TRL prepares; 0: without TRL")
    loss: str = flag("ins_dpo", "objective whose paths are laid out")
    max_len: int = flag(4096, "tokens of every single path")
    out: str = flag("bench/out/data_preparation.json", "where the figures go")
    stage: str | None = flag(None, "internal: the one stage to run in this process")
    file: str | None = flag(None, "internal: the file of pairs")


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
        for i in range(n):
            texts = {part: text(*length) for part, length in LENGTHS.items()}
            asked = {"role": "user", "content": texts["prompt"]}
            row = {"prompt": texts["prompt"], "prompt_id": str(i)}
            for name in ("chosen", "rejected"):
                row[name] = [asked, {"role": "assistant", "content": texts[name]}]
            f.write(json.dumps(row | {"score_chosen": 8.0, "score_rejected": 6.0}) + "\n")


# ----------------------------------------------------------------------------- the stages


def ours(s):
    """What train.py does before its model: prepare, size every pair, plan and pack an epoch."""
    from data import Plan, pack
    from hub.template import Template
    from losses import recipe
    from train import TrainFlags as Train
    from train import load_data

    start, cpu = time.time(), time.process_time()
    rule = recipe(s.loss)
    t = Train(model=s.model, data=s.file, max_len=s.max_len, loss=s.loss)
    sets, lines = load_data(t, Template(os.path.expanduser(s.model)), rule)
    prepared = time.time()
    train = sets["train"]
    sizes = [train.size(i, rule.paths) for i in range(len(train))]
    plan = Plan(len(train), 128, 0, 1.0)
    row_tokens = max(8192, max(sizes))
    rows = [pack([sizes[i] for i in plan.pairs(t)], row_tokens) for t in range(plan.steps)]
    end, n_rows = time.time(), sum(map(len, rows))
    return {
        "cpu_seconds": time.process_time() - cpu,
        "pairs": sum(map(len, sets.values())),
        "tokens": int(sum(len(d.examples.ids) for d in sets.values())),
        "read_and_tokenise_seconds": prepared - start,
        "plan_and_pack_seconds": end - prepared,
        "seconds": end - start,
        "rows": n_rows,
        "fill": sum(sizes) / (n_rows * row_tokens),
        "report": lines,
    }


def trl(s):
    """DPOTrainer's preparation of the first pairs of the file, up to its constructor's end."""
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(s.model))
    with open(s.file, encoding="utf-8") as f:
        rows = [json.loads(line) for line, _ in zip(f, range(s.peer_pairs), strict=False)]
    data = Dataset.from_list([{k: r[k] for k in ("chosen", "rejected")} for r in rows])
    small = LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8,
                        num_hidden_layers=1, num_attention_heads=1)  # fmt: skip
    options = {"max_length": s.max_len, "report_to": [], "use_cpu": True, "bf16": False}
    start, cpu = time.time(), time.process_time()
    with tempfile.TemporaryDirectory() as out:
        LlamaForCausalLM(small).save_pretrained(out)  # TRL loads policy and reference by path
        config = DPOConfig(output_dir=out, **options)
        trainer = DPOTrainer(out, None, config, train_dataset=data, processing_class=tokenizer)
    seconds, cpu = time.time() - start, time.process_time() - cpu
    return {"pairs": len(trainer.train_dataset), "seconds": seconds, "cpu_seconds": cpu}


STAGES = {"first": ours, "cached": ours, "trl": trl}


def stage(s, name, file, tokens):
    """One stage in its own process -> its figures, with its peak memory in GB."""
    flags = asdict(s) | {"stage": name, "file": str(file)}
    words = [w for k, v in flags.items() if v is not None for w in (f"--{k}", str(v))]
    env = os.environ | {"NANOPO_TOKENS": str(tokens), "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, __file__, *words]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"stage {name} failed")
    return json.loads(done.stdout.splitlines()[-1])


def measure(s):
    """(size, stage, figures), as they come."""
    sizes = [int(size) for size in s.sizes.split(",")]
    for size in sizes:
        with tempfile.TemporaryDirectory() as scratch:
            file, tokens = Path(scratch) / "pairs.jsonl", Path(scratch) / "tokens"
            write_pairs(file, size, s.source)
            peer = size == sizes[-1] and s.peer_pairs
            for name in STAGES if peer else ("first", "cached"):
                yield size, name, stage(s, name, file, tokens)


def main():
    s = parse(Settings, __doc__.splitlines()[0])
    if s.stage:
        figures = STAGES[s.stage](s)
        figures["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(figures))
        return
    require(s, "source")
    print("| file | stage | pairs | seconds | CPU seconds | CPU ms per pair | peak GB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    results = []
    Path(s.out).parent.mkdir(parents=True, exist_ok=True)
    for size, name, r in measure(s):
        each = r["cpu_seconds"] / r["pairs"] * 1000
        print(f"| {size} | {name} | {r['pairs']} | {r['seconds']:.1f} | {r['cpu_seconds']:.1f} "
              f"| {each:.2f} | {r['peak_gb']:.2f} |", flush=True)  # fmt: skip
        results.append({"file": size, "stage": name} | r)
        Path(s.out).write_text(json.dumps({"settings": asdict(s), "results": results}, indent=1))


if __name__ == "__main__":
    run(main)
