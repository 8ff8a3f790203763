"""Train a language model from preference pairs: `torchrun train.py --loss ins_dpo`.

Reads top to bottom: the run (reference pass, step, validation), the set-up, the loop. One process
or many make no difference to the numbers: which pairs make up a step is fixed by the plan
(rows.py), and a step's loss is a sum over its pairs divided by their number.
"""

import math
import os
import shutil
import signal
import time
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import checkpoint
import weights
from cli import UserError, parse, progress, run
from data import plain_paths
from losses import recipe, unique
from metrics import Metrics
from prepare import prepare
from ranks import Ranks, build_model
from rows import Plan
from scoring import Reference, Scorer, by_path
from settings import HYPER, Settings, open_out, resolve, write_config
from template import Template

# ----------------------------------------------------------------------------- the run


class Run:
    """The model in training, and what is computed with it."""

    def __init__(self, s, ranks, rule, model, train, validation, plan):
        self.s, self.ranks, self.rule, self.model, self.plan = s, ranks, rule, model, plan
        self.train, self.validation = train, validation
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=s.lr,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=s.weight_decay,
            fused=True,
        )
        self.scorer = Scorer(s, ranks)
        self.reference = Reference(self.scorer, self.wanted)
        self.best = math.inf

    @cached_property
    def plain(self):
        """The prompt-only paths: what is deployed, validated beside the conditioned ones."""
        return plain_paths(self.rule)

    @cached_property
    def validation_paths(self):
        """All that validation needs, in one trie per pair."""
        rule = self.rule
        return unique([*rule.paths, *self.plain, *rule.kl_paths, *rule.reference_paths])

    @cached_property
    def wanted(self):
        """{name: (dataset, paths)} that the reference must score.

        Validation pairs are scored in the very tries of `validate`, so that policy and reference
        round alike, and a plain policy that has not moved has margin 0 in bf16 too.
        """
        if self.rule.objective.head != "logps" or len(self.rule.objective.answers) < 2:
            return {}
        wanted = {
            "train": (self.train, self.rule.reference_paths),
            "validation": (self.validation, self.validation_paths),
        }
        return {name: (data, p) for name, (data, p) in wanted.items() if data is not None and p}

    def prepare_reference(self, source):
        """Score the reference: the model before its first step, or --ref_model, then let go."""

        def get_model():
            other = self.s.ref_model is not None
            return build_model(self.s, self.ranks, source, "logps") if other else self.model

        return self.reference.prepare(Path(self.s.out) / "reference.safetensors", source, get_model)

    def kl(self, sums, reference):
        """KTO's z: mean log-ratio of mismatched answers, at least 0. None for other objectives."""
        if not (paths := self.rule.kl_paths):
            return None
        ratios = [sums[path] - reference[self.rule.reference_path(path)] for path in paths]
        return torch.stack(ratios).mean().clamp(min=0)

    # -- one optimizer step

    def learning_rate(self, step):
        """Linear warm-up from 1e-8, then cosine to final_lr times the peak."""
        s, warm = self.s, max(1, round(self.s.warmup * self.plan.steps))
        if step < warm:
            return 1e-8 + (s.lr - 1e-8) * step / warm
        done = (step - warm) / max(1, self.plan.steps - warm)
        return s.lr * (s.final_lr + (1 - s.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))

    def step(self, step, stopping):
        """One optimizer step on the plan's pairs. Returns (metrics, whether any rank must stop)."""
        start = time.time()
        pairs, paths = self.plan.pairs(step), self.rule.paths
        kl = self.mismatched(pairs)
        units = len(pairs)
        if self.rule.objective.per == "token":
            units = self.scorer.counts(self.train, pairs, paths).sum()
        totals = torch.zeros(6, device=self.ranks.device)
        rows = list(self.scorer.rows(self.train, pairs, paths))
        for k, row in enumerate(rows):
            together = self.ranks.world > 1 or k == len(rows) - 1
            self.model.set_requires_gradient_sync(together)
            self.model.set_reshard_after_backward(together)
            totals[:5] += self.backward(row, pairs, paths, kl, units)
        totals[5] = stopping
        loss, accuracy, chosen, rejected, tokens, stop = self.ranks.sum(totals).tolist()
        norm = self.update(step, loss)
        metrics = {"step": step + 1, "epoch": round(self.plan.epoch(step), 4), "loss": loss}
        if "rejected" in self.rule.objective.answers:
            metrics |= {
                "accuracy": accuracy / len(pairs),
                "margin": (chosen - rejected) / len(pairs),
            }
            metrics |= {"rejected_reward": rejected / len(pairs)}
        metrics |= {"chosen_reward": chosen / len(pairs), "lr": self.learning_rate(step)}
        metrics |= {"grad_norm": norm, "pairs": len(pairs), "tokens": int(tokens)}
        return metrics | {"seconds": round(time.time() - start, 4)}, stop > 0

    def mismatched(self, pairs):
        """KTO's z over the pairs of this step, by a pass without gradient."""
        if not (paths := self.rule.kl_paths):
            return None
        sums = by_path(self.scorer.score(self.model, self.train, pairs, paths), paths)
        return self.kl(sums, self.reference.of(self.train, pairs))

    def backward(self, row, pairs, paths, kl, units):
        """Forward and backward of one row -> (5,) loss, accuracy, rewards, tokens, summed."""
        numbers = [pairs[j] for j in row.pairs]
        sums = by_path(row.sums(self.model(row)), paths)
        counts = by_path(row.counts(), paths)
        out = self.rule(sums, counts, self.reference.of(self.train, numbers), kl)
        loss = out.losses.sum() / units
        (loss * self.ranks.world).backward()  # FSDP averages over ranks; a step's loss is a sum
        chosen, rejected = out.rewards["chosen"], out.rewards.get("rejected")
        wins = torch.zeros_like(chosen) if rejected is None else (chosen > rejected).float()
        lost = torch.zeros_like(chosen) if rejected is None else rejected
        tokens = torch.tensor(float(sum(b - a for a, b in row.spans if row.pairs)))
        totals = (loss.detach(), wins.sum(), chosen.sum(), lost.sum(), tokens.to(loss.device))
        return torch.stack(totals)

    def update(self, step, loss):
        """Clip and apply the gradient; refuse a non-finite one before it touches the weights."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not (math.isfinite(loss) and torch.isfinite(norm)):
            raise UserError(
                f"step {step + 1}: loss {loss}, gradient norm {norm.item()}; the weights are "
                "unchanged. Lower --lr or look at the data, then --resume"
            )
        clip_grads_with_norm_(parameters, self.s.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm.item()

    # -- validation

    def validate(self, step):
        """Loss, accuracy and margin on the validation pairs; also of the plain policy."""
        start, dataset, rule = time.time(), self.validation, self.rule
        pairs, paths = range(len(dataset)), self.validation_paths
        sums = by_path(self.scorer.score_all(self.model, dataset, paths, "validate"), paths)
        counts = by_path(self.scorer.counts(dataset, pairs, paths), paths)
        reference = self.reference.of(dataset)
        out = rule(sums, counts, reference, self.kl(sums, reference))
        metrics = {"step": step, "eval_loss": (out.losses.sum() / out.units.sum()).item()}
        if "rejected" in rule.objective.answers:
            margin = out.rewards["chosen"] - out.rewards["rejected"]
            metrics |= {"eval_accuracy": (margin > 0).float().mean().item()}
            metrics |= {"eval_margin": margin.mean().item()}
            w, l = (sums[path] - reference.get(path, 0) for path in self.plain)
            scale = rule.scale if rule.objective.uses_reference else 0.1  # DPO's beta
            margin = scale * (w - l) if rule.objective.head == "logps" else w - l
            metrics |= {"eval_plain_accuracy": (margin > 0).float().mean().item()}
            metrics |= {"eval_plain_margin": margin.mean().item()}
        return metrics | {"eval_seconds": round(time.time() - start, 3)}

    # -- what is left behind

    def export(self, name, template):
        """OUT/<name>: a HF directory, written aside and renamed when whole."""
        final = Path(self.s.out) / name
        aside = final.with_name(f".{name}")
        raw, _ = weights.read_config(template.directory)
        dtype = getattr(torch, raw.get("dtype") or raw.get("torch_dtype") or "bfloat16")
        named = self.model.named_parameters()
        tensors = ((n, p.detach().full_tensor()) for n, p in named)
        if self.ranks.first:
            config = self.model.config
            shutil.rmtree(aside, ignore_errors=True)
            weights.save(aside, config, tensors, template.directory, dtype, template.source)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(aside, final)
        else:
            for _ in tensors:  # full_tensor is collective
                pass
        dist.barrier()

    def save(self, step):
        """OUT/checkpoints/step-N."""
        state = {"step": step, "best": self.best}
        directory = Path(self.s.out) / "checkpoints"
        checkpoint.save(directory, self.model, self.optimizer, state, self.s.keep)

    def resume(self):
        """Step to go on from: that of the newest whole checkpoint, or 0."""
        directory = Path(self.s.out) / "checkpoints"
        found = checkpoint.newest(directory, self.ranks.say)
        if found is None:
            self.ranks.say(f"no whole checkpoint in {directory}: starting at step 0")
            return 0
        path, state = found
        checkpoint.load(path, state, self.model, self.optimizer)
        self.best = state["best"]
        self.ranks.say(f"resuming from {path}")
        return state["step"]


# ----------------------------------------------------------------------------- set-up


def fetch(ranks, source, name):
    """Directory of a model, downloaded by rank 0 first and then found by all (on every node)."""
    ranks.share(lambda: weights.resolve(source, name))
    return weights.resolve(source, name)


def load_data(s, ranks, template, rule):
    """(train, eval) Datasets; eval is None without validation pairs."""
    sets, lines = prepare(s, template, rule, ranks)
    for line in lines:
        ranks.say(line)
    return sets["train"], sets.get("validation")


def choose_row_tokens(s, ranks, datasets, paths):
    """A row holds the longest pair; by default 8,192 tokens on CUDA and 2,048 elsewhere."""
    longest = max(dataset.size(i, paths) for dataset in datasets for i in range(len(dataset)))
    if s.row_tokens is None:
        s.row_tokens = max(8192 if ranks.kind == "cuda" else 2048, -(-longest // 128) * 128)
    if longest > s.row_tokens:
        raise UserError(
            f"--row_tokens {s.row_tokens}: the longest pair takes {longest} tokens; "
            "raise it or lower --max_len"
        )


# ----------------------------------------------------------------------------- the loop


def main():
    s = parse(Settings, __doc__.splitlines()[0])
    ranks = Ranks(s.device)
    try:
        train(s, ranks)
    finally:
        dist.destroy_process_group()


def train(s, ranks):
    embedded = resolve(s, ranks.kind)
    rule = recipe(
        s.loss, s.condition, s.bridge, s.reference, **{name: getattr(s, name) for name in HYPER}
    )
    open_out(s, ranks)
    source = fetch(ranks, s.model, "--model")
    reference_source = fetch(ranks, s.ref_model, "--ref_model") if s.ref_model else source
    template = Template(source)
    if template.fallback:
        ranks.say(f"{s.model} has no chat template: using the plain one of template.py")
    train_set, validation = load_data(s, ranks, template, rule)
    plan = Plan(len(train_set), s.batch, s.seed, s.epochs or 0.0, s.steps)
    s.eval_every = s.eval_every or max(1, plan.steps // 10)
    s.save_every = s.save_every or s.eval_every
    datasets = [d for d in (train_set, validation) if d is not None]
    paths = unique([*rule.paths, *rule.reference_paths, *rule.kl_paths, *plain_paths(rule)])
    choose_row_tokens(s, ranks, datasets, paths)
    show(s, ranks, rule, plan)
    write_config(s, ranks, {"hyper": rule.hyper, "steps": plan.steps})

    model = build_model(s, ranks, source, rule.objective.head)
    job = Run(s, ranks, rule, model, train_set, validation, plan)
    reference = job.prepare_reference(reference_source)
    first = job.resume() if s.resume else 0
    metrics = Metrics(s, ranks, first)
    if reference:
        metrics.write(reference)
    loop(job, metrics, template, first)
    job.export("final", template)
    metrics.plot()
    if embedded:
        report_world(s, ranks)
    ranks.say(f"saved: {Path(s.out) / 'final'}")


def loop(job, metrics, template, first):
    """Algorithm 1 of InSPO: sample pairs, condition, one gradient step; validate, save, repeat."""
    s, ranks, plan = job.s, job.ranks, job.plan
    stopping = StopSignal()
    begun = min(first * s.batch, plan.total)
    bar = progress(s.loss, plan.total, "pair", not ranks.first, initial=begun, smoothing=0.1)
    with bar:
        for step in range(first, plan.steps):
            if step % s.eval_every == 0:  # on resuming again: no signal may lose a validation
                validate(job, metrics, template, step)
            line, stop = job.step(step, stopping.caught)
            metrics.write(line)
            bar.update(line["pairs"])
            bar.set_postfix({k: f"{line[k]:.4g}" for k in ("loss", "accuracy") if k in line})
            done, last = step + 1, step + 1 == plan.steps
            if done % s.save_every == 0 or last or stop:
                job.save(done)
            if stop and not last:
                ranks.say(f"stopped by a signal after step {done}; --resume goes on from here")
                dist.barrier()
                raise SystemExit(0)
        validate(job, metrics, template, plan.steps)


def validate(job, metrics, template, step):
    """Validate, write and print it, and keep the best model; the start is not a result."""
    if not job.validation:
        return
    line = job.validate(step)
    metrics.write(line)
    shown = ", ".join(
        f"{k} {v:.4f}" for k, v in line.items() if k.startswith("eval") and "sec" not in k
    )
    job.ranks.say(f"step {step}: {shown}")
    if step > 0 and line["eval_loss"] < job.best:
        job.best = line["eval_loss"]
        job.export("best", template)
    metrics.plot()


class StopSignal:
    """Remembers SIGTERM and SIGINT, so that the run saves after its current step and ends."""

    def __init__(self):
        self.caught = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._catch)

    def _catch(self, number, frame):
        self.caught = True


def show(s, ranks, rule, plan):
    """Print the resolved settings, so that nothing that decides the run is implicit."""
    hyper = ", ".join(f"{k} {v:g}" for k, v in rule.hyper.items())
    ranks.say(
        f"{rule.name}: condition {rule.condition}, bridge {rule.bridge}, "
        f"reference {rule.reference if rule.objective.uses_reference else 'none'}, {hyper}\n"
        f"model {s.model}, {s.dtype}, {s.attention} on {ranks.world} x {ranks.kind}\n"
        f"{plan.steps} steps of {s.batch} pairs, lr {s.lr:g}, max_len {s.max_len}, "
        f"row_tokens {s.row_tokens}, seed {s.seed}; out {s.out}"
    )


def report_world(s, ranks):
    """The embedded default ends with exact win rates in the small world (assets/world.py)."""
    if not ranks.first:
        return
    from evaluate import world_win_rate

    out = Path(s.out) / "final"
    before, after = (world_win_rate(path, s.model) for path in (s.model, out))
    ranks.say(f"exact win rate against the start: before {before:.1%}, after {after:.1%}")


if __name__ == "__main__":
    run(main)
