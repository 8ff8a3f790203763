"""Measures the peer: pairs per second of plain DPO in TRL's DPOTrainer.

TRL at its fastest: no activation checkpointing (on by default), no saving, logging or
reporting, fused AdamW, padding kept small by length-grouped batches and a length-sorted reference
pass, on a CPU with freed memory kept as train.py keeps it; with --no-tuned as it comes.
Padding-free batches need FlashAttention, and this version of TRL has them switched off. On a CPU
its fused head pushes every position through the vocabulary, prompt and padding included.
Pairs are read by nanoPO's own reader, so that both contenders get the same ones.

Wall-clock covers the reference log-probabilities, after one forward to warm up, and the training
steps after the first `uncounted`; not imports, loading or tokenising. Option names: TRL 1.16
`DPOConfig`, transformers 5.23 `TrainingArguments`.
"""

import os
import tempfile
import time
from dataclasses import dataclass

from jobs.cli import UserError
from jobs.processes import keep_freed_memory, peak_memory
from pairs.read import Drops, read_pairs

os.environ.setdefault("TQDM_DISABLE", "1")


@dataclass(frozen=True)
class TrlFlags:
    """Settings of one measurement."""

    model: str  # Hugging Face directory of a chat model
    data: str
    pairs: int  # the first of the file
    batch: int  # pairs per optimizer step
    micro: int  # pairs per forward (per_device_train_batch_size)
    steps: int  # counted
    uncounted: int  # steps before them
    device: str
    dtype: str  # fp32; bf16: autocast over fp32 weights; bf16_pure: also weights and moments
    max_len: int  # tokens of prompt and answer; the end is cut off
    precompute: bool = True  # reference log-probabilities before training, not in each step
    tuned: bool = True  # no activation checkpointing, batches of alike lengths; False: defaults
    compile: bool = False  # TrainingArguments.torch_compile


def conversational(pairs, tokenizer):
    """nanoPO pairs -> TRL's explicit conversational rows, plus `length` in tokens."""
    rows = []
    for pair in pairs:
        row, texts = {"prompt": pair.prompt}, []
        for side in ("chosen", "rejected"):
            row[side] = [{"role": "assistant", "content": getattr(pair, side)}]
            texts.append(tokenizer.apply_chat_template(pair.prompt + row[side], tokenize=False))
        row["length"] = max(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
        rows.append(row)
    return rows


def timed_trainer():
    """DPOTrainer that keeps the reference pass's seconds, and what training saw when."""
    from trl import DPOTrainer

    class Timed(DPOTrainer):
        def __init__(self, *args, **kwargs):
            self.reference_seconds, self.begun, self.pairs, self.padded_tokens = 0.0, [], 0, 0
            super().__init__(*args, **kwargs)

        def _precompute_ref_logps(self, *args, **kwargs):
            start = time.perf_counter()
            result = super()._precompute_ref_logps(*args, **kwargs)
            self.reference_seconds += time.perf_counter() - start
            return result

        def training_step(self, model, inputs, *args, **kwargs):
            self.begun.append((time.perf_counter(), self.pairs))  # of a micro-batch
            self.pairs += len(inputs["input_ids"]) // 2
            self.padded_tokens += inputs["attention_mask"].numel()
            return super().training_step(model, inputs, *args, **kwargs)

    return Timed


TUNED = {  # the rest of DPOConfig's defaults is fast
    "activation_checkpointing": False,
    "train_sampling_strategy": "group_by_length",
    "remove_unused_columns": False,  # it would remove `length` before the sampler looks for it
}


def config(s, out):
    """The flags as TRL's DPOConfig, everything off that is not training."""
    from trl import DPOConfig

    return DPOConfig(
        **(TUNED if s.tuned else {}),
        output_dir=out,
        use_cpu=s.device == "cpu",
        bf16=s.dtype == "bf16",
        torch_compile=s.compile,
        per_device_train_batch_size=s.micro,
        gradient_accumulation_steps=s.batch // s.micro,
        max_steps=s.uncounted + s.steps,
        max_length=s.max_len,
        precompute_ref_log_probs=s.precompute,
        learning_rate=5e-7,
        beta=0.1,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=s.device == "cuda",
    )


def trainer_of(s, out):
    """The trainer with its model and pairs, reference log-probabilities computed if asked for."""
    import datasets
    import torch
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(s.model)
    weights = torch.bfloat16 if s.dtype == "bf16_pure" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(s.model, dtype=weights)
    warm_up(model.to(s.device), s)
    rows = conversational(read_pairs(s.data, Drops(), limit=s.pairs), tokenizer)
    if s.tuned:  # TRL runs the reference pass in the order of the dataset
        rows.sort(key=lambda row: row["length"])
    data = {"train_dataset": datasets.Dataset.from_list(rows), "processing_class": tokenizer}
    return timed_trainer()(model=model, args=config(s, out), **data)


def warm_up(model, s):
    """One forward: libraries and memory pools are there before the reference pass is timed."""
    import torch

    ids = torch.zeros(s.micro, 64, dtype=torch.long, device=s.device)
    with torch.no_grad(), torch.autocast(s.device, enabled=s.dtype == "bf16"):
        model(ids)


def measure(**flags):
    """Train, and return pairs per second with the reference pass, tokens per pair, peak GiB."""
    s = TrlFlags(**flags)
    if s.batch % s.micro:
        raise UserError(f"--batch {s.batch} is not a multiple of --micro {s.micro}")
    if s.tuned and s.device == "cpu":
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as out:
        trainer = trainer_of(s, out)
        trainer.train()
        ended = time.perf_counter()
    began, skipped = trainer.begun[s.uncounted * s.batch // s.micro]
    reference = trainer.reference_seconds / len(trainer.train_dataset) if s.precompute else 0.0
    per_pair = (ended - began) / (trainer.pairs - skipped) + reference
    return {
        "pairs_per_second": 1 / per_pair,
        "reference_seconds_per_pair": reference,
        "tokens_per_pair": trainer.padded_tokens / trainer.pairs,
        "peak_gib": peak_memory(s.device),
    }
