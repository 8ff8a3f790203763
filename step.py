"""The model in training: the reference pass, one optimizer step, validation, what must survive.

A step's loss is a sum over its pairs divided by their number, so neither the number of processes
nor the way its pairs fall on rows changes it. Legend: B pairs of a row.
"""

import math
import shutil
import time
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from data import plain_paths
from hub import weights
from jobs import checkpoint
from jobs.cli import UserError
from jobs.metrics import peak_memory
from jobs.processes import build_model
from losses import unique
from scoring import Reference, Scorer, by_path


class Run:
    """The model in training, and what is computed with it."""

    def __init__(self, s, ranks, rule, model, digest, train, validation, plan):
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
        self.best, self.best_step, self.saved_at = math.inf, None, None
        choices = (rule.name, rule.condition, rule.bridge, rule.reference, rule.hyper)
        owner = {"model": digest[:16], "objective": " ".join(map(str, choices))}
        self.saver = checkpoint.Saver(Path(s.out) / "checkpoints", owner, s.keep, ranks.say)

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

    def prepare_reference(self, source, digest):
        """Score the reference: the model before its first step, or --ref_model, then let go."""

        def get_model():
            other = self.s.ref_model is not None
            return build_model(self.s, self.ranks, source, "logps") if other else self.model

        return self.reference.prepare(Path(self.s.out) / "reference.safetensors", digest, get_model)

    def check_start(self):
        """Before step 1 the policy is the reference, so on the same paths they must agree.

        UserError where they do not: a wrong reference, dropout, or a forward pass that is broken.
        Nothing is compared where the reference is another model or the objective has none.
        """
        paths = self.rule.reference_paths
        if "train" not in self.wanted or self.s.ref_model is not None:
            return
        pairs = self.plan.pairs(0)
        sums = self.scorer.score(self.model, self.train, pairs, paths)
        reference = torch.stack([self.reference.of(self.train, pairs)[p] for p in paths], 1)
        counts = self.scorer.counts(self.train, pairs, paths).clamp(min=1)
        gap = ((sums - reference).abs() / counts).max().item()
        if not gap <= (5e-2 if self.s.dtype == "bf16" else 1e-3):
            raise UserError(
                f"step 0: policy and reference differ by {gap:.3g} nats per token where they must "
                f"agree; remove {Path(self.s.out) / 'reference.safetensors'} and start again"
            )
        self.ranks.say(f"step 0: policy and reference agree within {gap:.1g} nats per token")

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
        start = time.monotonic()
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
        fill = tokens / (len(rows) * self.ranks.world * self.s.row_tokens)
        return metrics | {"row_fill": round(fill, 4)} | self.speed(start, metrics), stop > 0

    def speed(self, start, metrics):
        """Seconds since `start`, what they did, and peak memory (GiB) of the fullest process."""
        seconds = time.monotonic() - start
        rates = {f"{k}_per_second": round(metrics[k] / seconds, 2) for k in ("pairs", "tokens")}
        memory = round(self.ranks.most(peak_memory(self.ranks.kind)), 3)
        return {"seconds": round(seconds, 4)} | rates | {"memory_gib": memory}

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
        start, dataset, rule = time.monotonic(), self.validation, self.rule
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
        return metrics | {"eval_seconds": round(time.monotonic() - start, 3)}

    # -- what is left behind

    def export(self, name, template):
        """OUT/<name>: a HF directory, written aside and renamed when whole."""
        final = Path(self.s.out) / name
        aside = final.with_name(f".{name}")
        raw, _ = weights.read_config(template.directory)
        dtype = getattr(torch, raw.get("dtype") or raw.get("torch_dtype") or "bfloat16")
        tensors = checkpoint.whole_tensors(self.model, dtype)
        if self.ranks.first:
            config = self.model.config
            shutil.rmtree(aside, ignore_errors=True)
            try:
                weights.save(aside, config, tensors, template.directory, dtype, template.source)
                for file in aside.iterdir():
                    checkpoint.flush(file)
                checkpoint.replace(aside, final)
            except (OSError, SafetensorError) as error:
                shutil.rmtree(aside, ignore_errors=True)
                raise UserError(
                    f"{final} could not be written: {error}; mend that, then --resume"
                ) from error
        else:
            list(tensors)  # sends its rows
        dist.barrier()

    def save(self, step):
        """OUT/checkpoints/step-N, written in the background from a copy made here."""
        state = {"step": step, "best": self.best, "best_step": self.best_step}
        self.saver.save(self.model, self.optimizer, state)
        self.saved_at = step

    def resume(self):
        """Step to go on from: that of the newest whole checkpoint, or 0."""
        directory, say = self.saver.directory, self.ranks.say
        found = checkpoint.newest(directory, self.saver.owner, say)
        if found is None:
            say(f"no whole checkpoint in {directory}: starting at step 0")
            return 0
        path, state = found
        checkpoint.load(path, state, self.model, self.optimizer)
        self.best, self.best_step, self.saved_at = state["best"], state["best_step"], state["step"]
        say(f"resuming from {path}")
        return state["step"]
