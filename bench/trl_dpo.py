"""The peer: TRL's DPOTrainer, plain DPO, timed in pairs per second.

    python bench/trl_dpo.py --model DIR --data hh.jsonl.gz --pairs 32 --batch 16 --micro 4

TRL at its fastest: no activation checkpointing (on by default), no saving, logging or
reporting, fused AdamW, padding kept small by length-grouped batches and a length-sorted reference
pass, on a CPU with freed memory kept as train.py keeps it; with --no-tuned as it comes.
Padding-free batches need FlashAttention, and this version of TRL has them switched off. On a CPU
its fused head pushes every position through the vocabulary, prompt and padding included.
Pairs are read by nanoPO's own reader, so that both contenders get the same ones.

Wall-clock covers the reference log-probabilities, after one forward to warm up, and the training
steps after the first `--warmup`; not imports, loading or tokenising, of which the latter two are
reported apart. The last line of stdout is one JSON object. Option names: TRL 1.16 `DPOConfig`,
transformers 5.23 `TrainingArguments`.
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.cli import UserError, flag, parse, run  # noqa: E402
from jobs.processes import (
    keep_freed_memory,  # noqa: E402
    peak_memory,  # noqa: E402
)
from pairs.read import Drops, read_pairs  # noqa: E402

os.environ.setdefault("TQDM_DISABLE", "1")


@dataclass
class Settings:
    """Flags of one measurement."""

    model: str = flag(None, "Hugging Face directory of a chat model")
    data: str = flag("../shared/data/hh-harmless-test.jsonl.gz", "preference pairs")
    pairs: int = flag(32, "pairs in the dataset: the first of the file")
    batch: int = flag(16, "pairs per optimizer step")
    micro: int = flag(4, "pairs per forward (per_device_train_batch_size)")
    steps: int | None = flag(None, "optimizer steps; None: one pass over the pairs")
    warmup: int = flag(1, "steps before them that are not counted")
    device: str = flag("cpu", "where", ("cpu", "cuda"))
    dtype: str = flag(
        "fp32",
        "bf16: autocast over fp32 weights; bf16_pure: bf16 weights and optimizer state",
        choices=["fp32", "bf16", "bf16_pure"],
    )
    precompute: bool = flag(True, "reference log-probabilities before training, not in each step")
    max_len: int = flag(1024, "tokens of prompt and answer; the end is cut off")
    tuned: bool = flag(True, "no activation checkpointing, batches of alike lengths; no: defaults")
    compile: bool = flag(False, "TrainingArguments.torch_compile")
    beta: float = flag(0.1, "DPO's beta")
    lr: float = flag(5e-7, "learning rate")
    seed: int = flag(0, "order of the pairs")


def conversational(pairs, tokenizer):
    """nanoPO pairs -> TRL's explicit conversational rows, plus `length` in tokens."""
    rows = []
    for pair in pairs:
        row = {"prompt": pair.prompt}
        for side in ("chosen", "rejected"):
            row[side] = [{"role": "assistant", "content": getattr(pair, side)}]
        texts = [
            tokenizer.apply_chat_template(pair.prompt + row[side], tokenize=False)
            for side in ("chosen", "rejected")
        ]
        row["length"] = max(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
        rows.append(row)
    return rows


def timed_trainer():
    """DPOTrainer with a stopwatch: `seconds` by phase, and counts of what training saw."""
    from trl import DPOTrainer

    class Timed(DPOTrainer):
        def __init__(self, *args, **kwargs):
            self.seconds = {"tokenise": 0.0, "reference": 0.0}
            self.step_starts, self.pairs, self.tokens, self.padded_tokens = [], 0, 0, 0
            super().__init__(*args, **kwargs)

        def _prepare_dataset(self, *args, **kwargs):
            return self._timed("tokenise", super()._prepare_dataset, *args, **kwargs)

        def _precompute_ref_logps(self, *args, **kwargs):
            return self._timed("reference", super()._precompute_ref_logps, *args, **kwargs)

        def _timed(self, phase, function, *args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[phase] += time.perf_counter() - start
            return result

        def training_step(self, model, inputs, *args, **kwargs):
            self.step_starts.append((time.perf_counter(), self.pairs))  # of a micro-batch
            self.pairs += len(inputs["input_ids"]) // 2
            self.tokens += int(inputs["attention_mask"].sum())
            self.padded_tokens += inputs["attention_mask"].numel()
            return super().training_step(model, inputs, *args, **kwargs)

    return Timed


TUNED = {  # the rest of DPOConfig's defaults is fast
    "activation_checkpointing": False,
    "train_sampling_strategy": "group_by_length",
    "remove_unused_columns": False,  # it would remove `length` before the sampler looks for it
}


def config(settings, steps, out):
    """The settings as TRL's DPOConfig, everything off that is not training."""
    from trl import DPOConfig

    return DPOConfig(
        **(TUNED if settings.tuned else {}),
        output_dir=out,
        use_cpu=settings.device == "cpu",
        bf16=settings.dtype == "bf16",
        torch_compile=settings.compile,
        per_device_train_batch_size=settings.micro,
        gradient_accumulation_steps=settings.batch // settings.micro,
        max_steps=settings.warmup + steps,
        max_length=settings.max_len,
        precompute_ref_log_probs=settings.precompute,
        learning_rate=settings.lr,
        beta=settings.beta,
        seed=settings.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=settings.device == "cuda",
    )


def measure(settings):
    """Train, and return the figures: seconds by phase, pairs per second, peak memory."""
    import datasets
    import torch
    import transformers
    import trl

    if settings.tuned and settings.device == "cpu":
        keep_freed_memory()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    steps = settings.steps or settings.pairs // settings.batch
    pairs = read_pairs(settings.data, Drops(), limit=settings.pairs)
    start = time.perf_counter()
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings.model)
    weights = torch.bfloat16 if settings.dtype == "bf16_pure" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(settings.model, dtype=weights)
    loaded = time.perf_counter()
    warm_up(model.to(settings.device), settings)
    rows = conversational(pairs, tokenizer)
    if settings.tuned:  # TRL runs the reference pass in the order of the dataset
        rows.sort(key=lambda row: row["length"])
    sorted_by = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        trainer = timed_trainer()(
            model=model,
            args=config(settings, steps, out),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        ready = time.perf_counter()
        result = trainer.train()
        ended = time.perf_counter()
    began, skipped = trainer.step_starts[settings.warmup * settings.batch // settings.micro]
    seconds = trainer.seconds
    reference_pairs = len(trainer.train_dataset) if settings.precompute else 0
    reference = seconds["reference"] / reference_pairs if reference_pairs else 0.0
    per_pair = (ended - began) / (trainer.pairs - skipped) + reference
    inside = seconds["tokenise"] + seconds["reference"]
    return {
        "contender": "trl",
        **asdict(settings),
        "steps": steps,
        "pairs_per_second": 1 / per_pair,
        "train_seconds": ended - began,
        "reference_seconds_per_pair": reference,
        "trained_pairs": trainer.pairs - skipped,
        "tokens": trainer.tokens,
        "padded_tokens": trainer.padded_tokens,
        "cut_pairs": sum(row["length"] > settings.max_len for row in rows),
        "load_seconds": (loaded - start) + (ready - sorted_by) - inside,
        "tokenise_seconds": (sorted_by - loaded) + seconds["tokenise"],
        "peak_gib": peak_memory(settings.device),
        "loss": result.training_loss,
        "load_average": os.getloadavg()[0],  # far above the threads: others used the machine too
        "threads": torch.get_num_threads(),
        "versions": {m.__name__: m.__version__ for m in (trl, transformers, torch)},
    }


def warm_up(model, settings):
    """One forward: libraries and memory pools are there before the reference pass is timed."""
    import torch

    ids = torch.zeros(settings.micro, 64, dtype=torch.long, device=settings.device)
    with torch.no_grad(), torch.autocast(settings.device, enabled=settings.dtype == "bf16"):
        model(ids)


def main():
    settings = parse(Settings, __doc__.splitlines()[0])
    if settings.model is None or not Path(settings.model).is_dir():
        raise UserError(f"--model {settings.model}: not there; tests/tools/smollm2.py builds one")
    if settings.batch % settings.micro:
        raise UserError(f"--batch {settings.batch} is not a multiple of --micro {settings.micro}")
    if settings.pairs < settings.batch:
        raise UserError(f"--pairs {settings.pairs} is less than one --batch {settings.batch}")
    try:
        figures = measure(settings)
    except ImportError as error:
        raise UserError(f"{error}: pip install -r requirements-dev.txt") from error
    print(json.dumps(figures))


if __name__ == "__main__":
    run(main)
