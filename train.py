"""Train a language model from preference pairs: `torchrun train.py --loss ins_dpo`.

Reads top to bottom: flags, set-up (read, clean, hold out, tokenise, plan, load, reference), the
optimizer step, validation, and the loop, which is Algorithm 1 of InSPO. One process or many make no
difference to the numbers: which pairs make up a step is fixed by the plan (data.Plan), and a step's
loss is a sum over its pairs divided by their number, however they fall on rows and ranks.

What no reader of the algorithm needs lies in jobs/: processes and sharding, checkpoints, metrics,
the run directory.

Legend: N pairs of a dataset, B pairs of a row, P paths per pair, S scored tokens of a row.
"""

import jobs.waiting  # noqa: F401  # isort: skip  (before torch loads OpenMP)
import dataclasses
import hashlib
import itertools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import losses
from data import Dataset, Plan, build_row, pack, plain_paths
from hub import weights
from hub.template import Template
from hub.tokenizer import refuse_other_ids
from jobs import checkpoint, cli, processes, rundir
from jobs.cli import UserError, as_user_error, flag, progress, run
from jobs.files import ASSETS, written_whole
from jobs.processes import Ranks, Stopped
from kernels import chains, check, detached, flex, memory
from losses import by_path, summed, unique
from model import export, load_weights, outline, path_limit, read_config, stored_dtype
from pairs.cleaning import CleaningFlags, clean
from pairs.read import Drops, hold_out, parse_sources, read_pairs, told_of_held
from pairs.token_cache import cache_key, cached

# ----------------------------------------------------------------------------- flags

# InSPO D.1, where a flag is not given; the embedded default brings its own.
PAPER = {"lr": 5e-7, "batch": 128, "epochs": 3.0}  # and 4,096 tokens, if the model has positions
EMBEDDED = {"lr": 3e-4, "batch": 32, "steps": 60, "max_len": 256}
BOTH = {"warmup": 0.1, "schedule": "cosine", "final_lr": 0.1, "weight_decay": 0.01, "clip": 1.0}
SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class TrainFlags(cli.RunFlags, CleaningFlags, cli.PathFlags, cli.DataFlags, cli.ModelFlags):
    """Every flag. None: decided by the objective, the data or the device, and then printed."""

    loss: str = flag("ins_dpo", "objective; README: the table, and when to take a plain one")
    model: str | None = flag(None, "HF directory or hub id[@REVISION]; default: the embedded model")
    eval_data: str | None = flag(None, "validation pairs; default: --eval_pairs held out of --data")
    eval_revision: str | None = flag(None, "as --data_revision, of --eval_data; default: the same")
    ref_model: str | None = flag(None, "reference model; default: --model")
    condition: str | None = flag(
        None, "what an answer stands behind; none where `evaluate.py context` finds that strange",
        tuple(losses.CONDITIONS),
    )  # fmt: skip
    reference: str | None = flag(None, "paths of the reference", losses.REFERENCES)
    steps: int | None = flag(None, "optimizer steps; default: by --epochs", least=1)
    epochs: float | None = flag(None, "passes over the data (default 3)", above=0)
    batch: int | None = flag(None, "pairs per step, of all ranks (128; with few pairs 16)", least=1)
    lr: float | None = flag(None, "peak learning rate (5e-7; for 0.1-1B 1e-5 to 5e-5)", above=0)
    warmup: float | None = flag(None, "share of the steps with rising lr (0.1; 0: none)", below=1)
    schedule: str | None = flag(None, "of lr after it (cosine); linear ends at 0", SCHEDULES)
    final_lr: float | None = flag(None, "share of lr that the cosine ends at (0.1)", most=1)
    weight_decay: float | None = flag(None, "AdamW weight decay (0.01)")
    clip: float | None = flag(None, "largest gradient norm (1; 0: no clipping)")
    seed: int = flag(0, "order of the pairs and hold-out")
    eval_pairs: int | None = flag(None, "validation pairs; default: 1000, at most a tenth")
    eval_every: int | None = flag(None, "steps between validations; default: run / 10", least=1)
    context_grad: bool = flag(True, "false: contexts only run forward (cheaper, but not exact)")


def resolve_flags(s, kind):
    """Computes (settings with every default filled in that needs no data, whether embedded).

    kind: "cuda" or "cpu". UserError for flags that contradict each other, before anything is read.
    """
    if s.model is not None and s.data is None:
        raise UserError(f"--model {s.model} needs --data: a file, a glob or a hub dataset id")
    embedded = s.model is None and s.data is None
    world = ASSETS / "world"
    defaults = {"model": str(ASSETS / "start"), "data": str(world / "pairs.jsonl")}
    defaults |= BOTH | (EMBEDDED | {"eval_data": str(world / "test.jsonl")} if embedded else PAPER)
    length = ("steps", "epochs") if s.steps is not None or s.epochs is not None else ()  # is given
    defaults = {k: v for k, v in defaults.items() if getattr(s, k) is None and k not in length}
    defaults |= {"eval_revision": s.eval_revision or s.data_revision} | processes.by_device(s, kind)
    return dataclasses.replace(s, **defaults), embedded


# ----------------------------------------------------------------------------- set-up: the data


def load_data(s, template, recipe, ranks=None):
    """Reads and tokenises once -> ({"train": Dataset, "validation": Dataset}, report lines).

    Rank 0 does the work and the others map its token cache; where it cannot be written, each rank
    does it. All of them run the guard.
    """
    guard, share = None, ranks.share if ranks else lambda work: work()
    if s.guard:
        from families.llama_guard import Guard

        source = weights.fetch(ranks, s.guard, "--guard") if ranks else s.guard
        guard = Guard(source, s.device, chains.attend)
        if ranks and ranks.world > 1:
            share = (shared := processes.SharedWork(ranks, guard.verdicts)).lead
            guard.judge = shared if ranks.first else guard.verdicts

    def make(shown=False):
        sets, lines = read_and_tokenise(s, template, recipe, guard, shown)
        return {name: dataset.stored() for name, dataset in sets.items()}, lines

    sets, lines = cached(lambda: data_key(s, template, recipe, guard), make, share)
    how = (s, (), template, recipe)
    return {name: Dataset.of(*how, stored=x, seed=s.seed) for name, x in sets.items()}, lines


def data_key(s, template, recipe, guard):
    """Digest of all that decides the tokens. A guard counts by its weights, not its path."""
    sources = parse_sources(s.data, s.data_revision)
    sources += parse_sources(s.eval_data, s.eval_revision) if s.eval_data else []
    names = ["eval_data", "eval_pairs", "max_len", "draft_cap", "score_eos", "instruction", "sep"]
    names += [f.name for flags in (CleaningFlags, cli.DataFlags) for f in dataclasses.fields(flags)]
    choices = {name: getattr(s, name) for name in (*names, "seed")}
    decides = [recipe.paths, recipe.bridge, recipe.objective.head, recipe.objective.answers]
    choices |= {"guard": guard and guard.identity, "recipe": str(decides)}
    return cache_key([file for files, _ in sources for file in files], template, choices)


def read_and_tokenise(s, template, recipe, guard=None, shown=False):
    """Read, clean, hold out, tokenise -> as load_data. shown: with a progress bar."""
    in_context = any(path.context in ("chosen", "rejected") for path in recipe.paths)
    how = in_context or recipe.objective.answers == ("chosen", "rejected"), s.bad_rows
    drops, cleaned, left, rules = Drops(), Drops(), Drops(), CleaningFlags.of(s)
    pairs = read_pairs(s.data, drops, s.limit, *how, s.data_revision, s.ignore_columns)
    lines = [f"read {len(pairs)} pairs from {s.data}; dropped: {drops}"]
    if rules != CleaningFlags():
        pairs = clean(pairs, rules, template, cleaned, guard)
        lines.append(f"cleaned: {len(pairs)} pairs; dropped: {cleaned}")
    if s.eval_data:
        held = read_pairs(s.eval_data, left, s.eval_pairs, *how, s.eval_revision, s.ignore_columns)
    else:
        n = min(1000, len(pairs) // 10) if s.eval_pairs is None else s.eval_pairs
        pairs, held = hold_out(pairs, n, s.seed)
    lines.append(told_of_held(pairs, held, s.eval_data or s.data, left))
    sets = {"train": Dataset.of(s, pairs, template, recipe, shown=shown, seed=s.seed)}
    if held:
        sets["validation"] = Dataset.of(s, held, template, recipe, seed=s.seed)
    return sets, [*lines, *(f"{name}: {dataset.report()}" for name, dataset in sets.items())]


def fit_to_data(s, ranks, recipe, sets, plan):
    """Computes the settings that depend on the data: row length, and how often to validate."""
    held, r = sets.get("validation"), recipe
    paths = unique([*r.paths, *r.reference_paths, *r.kl_paths, *plain_paths(r)])
    # a row holds whole tries, so at least the longest one; a multiple of 128 suits the kernels
    longest = max(d.size(i, paths) for d in sets.values() for i in range(len(d)))
    room = max(8192 if ranks.kind == "cuda" else 2048, -(-longest // 128) * 128)
    if longest > (s.row_tokens or room):
        fault = f"--row_tokens {s.row_tokens}: the longest pair takes {longest} tokens"
        raise UserError(f"{fault}; raise it or lower --max_len")
    eval_every = s.eval_every or max(1, plan.steps // 10)
    found = {"eval_every": eval_every, "save_every": s.save_every or eval_every}
    if not s.eval_data and s.eval_pairs is None:
        found["eval_pairs"] = len(held) + held.drops.total if held else 0
    return dataclasses.replace(s, row_tokens=s.row_tokens or room, **found)


# ----------------------------------------------------------------------------- set-up: the run


def main():
    s = weights.pinned(rundir.read_flags(TrainFlags, __doc__.splitlines()[0]))
    with Ranks(s.device) as ranks:
        train(s, ranks)


def train(s, ranks):
    """One run, from its flags to OUT/final; UserError for what a user can put right."""
    asked, (s, embedded) = s, resolve_flags(s, ranks.kind)
    with as_user_error():
        hyper = {name: getattr(s, name) for name in cli.HYPER}
        recipe = losses.recipe(s.loss, s.condition, s.bridge, s.reference, **hyper)
    try:
        with rundir.open_out(s, ranks) as out:
            s = dataclasses.replace(s, out=out)
            fit(s, ranks, recipe, asked)
            if embedded and ranks.first and recipe.objective.head == "logps":
                from evals.world import tell_win_rate

                tell_win_rate(Path(out) / "final", s.model)
            ranks.say(f"saved: {Path(out) / 'final'}")
    except OSError as error:  # a full disk, a lost mount: one line
        raise UserError(f"{error.filename or s.out}: {error.strerror}; then --resume") from error


def fit(s, ranks, recipe, asked):
    """Set up, train, export. asked: the flags as they were given, for config.json."""
    source = weights.fetch(ranks, s.model, "--model")
    reference_source = weights.fetch(ranks, s.ref_model, "--ref_model") if s.ref_model else source
    outline(source, recipe.objective.head, new_head=True)  # what is wrong with it is told now
    if reference_source != source:
        outline(reference_source, "logps", "--ref_model")
        refuse_other_ids(source, reference_source, "--ref_model")
    s = dataclasses.replace(s, max_len=path_limit(s.max_len, source, reference_source))
    template = Template(source, s.fold_system)
    if template.fallback:
        ranks.say(f"{s.model} has no chat template: using the plain one of assets/templates")

    # the data: read, cleaned, held out, tokenised; and which pairs make up which step
    sets, lines = load_data(s, template, recipe, ranks)
    ranks.say("\n".join(lines))
    plan = Plan(len(sets["train"]), s.batch, s.seed, s.epochs or 0.0, s.steps)
    config = read_config(source)[1]
    s = fit_to_data(s, ranks, recipe, sets, plan)
    s = dataclasses.replace(s, **memory.fit_to_memory(s, config, ranks))
    rundir.show(s, ranks, recipe, plan)
    ranks.share(lambda: rundir.check_config(s, ranks.say))
    ranks.say(memory.shortage(s, config, ranks))

    # the model, and the reference's log-probabilities, computed once
    model = build_model(s, ranks, source, recipe.objective.head)
    ranks.say("\n".join(rundir.advise(s, plan, sum(p.numel() for p in model.parameters()))))
    sources = {source, reference_source}  # one, where the policy is its own reference
    digests = ranks.share(lambda: {x: weights.Weights(x).digest() for x in sources})
    of = (digests[source], digests[reference_source], sets)
    owner = ranks.share(lambda: checkpoint.owner_of(s, recipe, *of))
    job = Run(s, ranks, recipe, model, owner, sets, plan)
    # another run's is refused here
    found = checkpoint.newest(job.saver.directory, owner, ranks.say) if s.resume else None
    if ranks.kind in check.KINDS:
        row = next(job.rows(job.train, plan.pairs(0), recipe.paths))
        ranks.say(check.check_kernels(model, row, s, ranks))
    ranks.deferred = True  # from here on a signal waits for the next place to save or stop
    reference = job.score_reference(reference_source, digests[reference_source])
    if found:
        job.state |= checkpoint.restore(*found, model, job.optimizer)
    first = job.state["step"]
    if first == 0:
        job.check_start()
    elif first > plan.steps:
        raise UserError(f"--steps {plan.steps}: {first} are done already")
    # OUT holds a run from here on
    facts = {"ranks": ranks.world, "hyper": recipe.hyper, "steps": plan.steps}
    ranks.share(lambda: rundir.write_config(s, asked, **facts))
    metrics = rundir.Metrics(s, ranks, first)
    if reference:
        metrics.write(reference)

    loop(job, metrics, template, first)
    job.export("final", template)
    metrics.close()


def build_model(s, ranks, source, head):
    """Builds on the meta device, shards, and lets each rank read only its slices of the weights.

    So that an 8B model loads without any rank ever holding 8B.
    """
    model = outline(source, head, new_head=True)
    model.attend = (flex if s.attention == "flex" else chains).attend
    if not s.context_grad:  # an inexact gradient (InSPO D.5)
        model.states = detached.states
    processes.shard(model, s, ranks)
    load_weights(model, source, processes.local_part)
    return model


class Run:
    """The model in training, and what is computed with it.

    sets: {"train": Dataset, perhaps "validation": Dataset}. reference: {set's name: {path: (N,)}},
    the reference's log-probabilities by pair and path, so that no shuffling can misplace them.
    """

    def __init__(self, s, ranks, recipe, model, owner, sets, plan):
        self.s, self.ranks, self.recipe, self.model, self.plan = s, ranks, recipe, model, plan
        self.sets, self.train, self.validation = sets, sets["train"], sets.get("validation")
        adam = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": s.weight_decay}
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, fused=True, **adam)
        r, self.by_token = recipe, recipe.objective.by_token
        self.plain = plain_paths(r)  # prompt only: what is deployed, validated beside the others
        self.validation_paths = unique([*r.paths, *self.plain, *r.kl_paths, *r.reference_paths])
        # What the reference must score. Validation pairs in the very tries of `validate`, so that
        # policy and reference round alike, and a plain policy that has not moved has margin 0.
        self.wanted, self.reference = {}, {}
        self.reference_file = Path(s.out) / "reference.safetensors"
        if r.objective.head == "logps" and len(r.objective.answers) == 2:
            paths = {"train": r.reference_paths, "validation": self.validation_paths}
            self.wanted = {name: paths[name] for name in sets if paths[name]}
        # what a checkpoint carries beside weights and moments
        self.state = {"step": 0, "best": math.inf, "best_step": None}
        self.saver = checkpoint.Saver(Path(s.out) / "checkpoints", owner, s.keep, ranks.say)

    # -- rows, and their values without gradient

    def rows(self, dataset, pairs, paths):
        """This rank's share of the rows that hold these pairs; equally many on every rank."""
        # FSDP gathers parameters on all ranks together: a row more on one would wait for ever
        sizes, length = [dataset.size(i, paths) for i in pairs], 0
        if self.s.attention == "flex":
            packed, length = flex.pack_alike(sizes, self.s.row_tokens, self.ranks.world)
        else:
            packed = pack(sizes, self.s.row_tokens, self.ranks.world)
        for row in packed[self.ranks.rank :: self.ranks.world]:
            tries = [dataset.trie(pairs[j], paths) for j in row]
            yield build_row(tries, row, len(paths), length).to(self.ranks.device)

    @torch.no_grad()
    def score(self, model, dataset, pairs, paths, label=None, by_token=False):
        """(len(pairs), P) log-probabilities of whole paths, on every rank, without gradient.

        by_token: (len(pairs), P, T) those of their tokens, 0 behind the last.
        label: of a progress bar, for a pass over a whole dataset, which a signal may end.
        """
        parts, hidden = [], label is None or not self.ranks.first
        shape = [int(self.counts(dataset, pairs, paths).max())] if by_token else []
        with progress(label, len(pairs), "pair", hidden, leave=False) as bar:
            for block in [pairs[i : i + 256] for i in range(0, len(pairs), 256)]:
                out = torch.zeros(len(block), len(paths), *shape, device=self.ranks.device)
                for row in self.rows(dataset, block, paths):
                    values = model(row)  # (S,), then (B, P) or (B, P, T)
                    out[row.pairs] = row.by_token(values, *shape) if by_token else row.sums(values)
                    bar.update(len(row.pairs) * self.ranks.world)
                for unit in (*model.blocks, model):  # as no backward does after this forward
                    unit.reshard()
                parts.append(self.ranks.sum(out))  # a pair is 0 on every rank but one
                if label and self.ranks.most(self.ranks.stopping)[0]:
                    raise Stopped
        return torch.cat(parts)

    def counts(self, dataset, pairs, paths):
        """(len(pairs), P) number of scored tokens."""
        counts = [[dataset.path(i, path)[1] for path in paths] for i in pairs]
        return torch.tensor(counts, dtype=torch.float32, device=self.ranks.device)

    # -- the reference, scored once before step 0 (Algorithm 1, line 4)

    def score_reference(self, source, digest):
        """Fill self.reference from OUT/reference.safetensors, or compute it and write that file.

        source, digest: directory and sha256 of the reference's weights. The policy itself is the
        reference before its first step; --ref_model is loaded beside it and then let go. Returns
        {reference_seconds, reference_pairs}, or None where nothing had to be computed. UserError
        for a log-probability that is not finite, with its pair.
        """
        if not self.wanted:
            return None
        ranks, file, start = self.ranks, self.reference_file, time.monotonic()
        key = ranks.share(lambda: self.reference_key(digest))
        tensors, metrics = ranks.share(lambda: checkpoint.read_keyed(file, key, ranks.say)), None
        if not tensors:
            model, tensors = self.model, {}
            if self.s.ref_model is not None:
                model = build_model(self.s, ranks, source, "logps")
            for name, paths in self.wanted.items():
                every = model, self.sets[name], range(len(self.sets[name])), paths
                values = self.score(*every, f"reference {name}", "reference" in self.by_token)
                if len(bad := (~values.isfinite()).nonzero()):
                    where = self.sets[name].examples[bad[0, 0].item()].where
                    raise UserError(f"{where}: its reference log-probability is not finite")
                tensors[name] = values.cpu()
            ranks.share(lambda: checkpoint.write_keyed(tensors, file, key))
            seconds, n = time.monotonic() - start, sum(map(len, tensors.values()))
            metrics = {"reference_seconds": round(seconds, 3), "reference_pairs": n}
        for name, paths in self.wanted.items():
            self.reference[name] = by_path(tensors[name].to(ranks.device), paths)
        return metrics

    def reference_key(self, digest):
        """sha256 of all that the reference log-probabilities depend on."""
        sha = hashlib.sha256(digest.encode())
        form = [self.s.dtype, self.s.attention, self.s.score_eos]
        sha.update(json.dumps(form + ["by token"] * ("reference" in self.by_token)).encode())
        for name, paths in self.wanted.items():
            sha.update(json.dumps([str(path) for path in paths]).encode())
            for i, path in itertools.product(range(len(self.sets[name])), paths):
                for segment in self.sets[name].path(i, path)[0]:
                    sha.update(segment.tobytes())
        return sha.hexdigest()

    def reference_of(self, name, pairs=slice(None)):
        """{path: (len(pairs),)} under the reference; empty where nothing of this set is wanted."""
        return {path: values[pairs] for path, values in self.reference.get(name, {}).items()}

    def check_start(self):
        """Before step 1 the policy is the reference, so on the same paths they must agree.

        UserError where they do not: a wrong reference, dropout, or a forward pass that is broken.
        Nothing is compared where the reference is another model or the objective has none.
        """
        paths = self.recipe.reference_paths
        if "train" not in self.wanted or self.s.ref_model is not None:
            return
        pairs = self.plan.pairs(0)
        sums = self.score(self.model, self.train, pairs, paths)  # (batch, P)
        known = self.reference_of("train", pairs)
        reference = torch.stack([summed(known[path]) for path in paths], 1)  # (batch, P)
        counts = self.counts(self.train, pairs, paths).clamp(min=1)  # (batch, P)
        gap = ((sums - reference).abs() / counts).max().item()
        if not gap <= (5e-2 if self.s.dtype == "bf16" else 1e-3):
            fault = f"step 0: policy and reference differ by {gap:.3g} nats per token"
            cure = f"remove {self.reference_file} and start again"
            raise UserError(f"{fault} where they must agree; {cure}")
        self.ranks.say(f"step 0: policy and reference agree within {gap:.1g} nats per token")

    # -- one optimizer step

    def learning_rate(self, step):
        """Linear warm-up from 1e-8, then a cosine to final_lr times the peak (InSPO D.1).

        Or, by --schedule, linear to 0 behind the last step (TRL's default, IFSR's), or constant.
        """
        s, warm = self.s, min(round(self.s.warmup * self.plan.steps), self.plan.steps - 1)
        if step < warm:
            return 1e-8 + (s.lr - 1e-8) * step / warm
        done = (step - warm) / max(1, self.plan.steps - warm)  # share of the schedule, 0 to 1
        cosine = s.final_lr + (1 - s.final_lr) * 0.5 * (1 + math.cos(math.pi * done))
        return s.lr * {"cosine": cosine, "linear": 1 - done, "constant": 1.0}[s.schedule]

    def step(self, step, stopping):
        """One optimizer step on the plan's pairs. Returns (metrics, whether any rank must stop)."""
        start = time.monotonic()
        pairs, paths, kl = self.plan.pairs(step), self.recipe.paths, None
        if kl_paths := self.recipe.kl_paths:  # KTO's z: over all pairs, by a pass without gradient
            sums = by_path(self.score(self.model, self.train, pairs, kl_paths), kl_paths)
            kl = self.recipe.kl(sums, self.reference_of("train", pairs))
        units = len(pairs)  # what the step's loss is divided by: pairs, or target tokens
        if self.recipe.objective.per == "token":
            units = self.counts(self.train, pairs, paths).sum()
        totals = torch.zeros(6, device=self.ranks.device)  # loss, wins, rewards, tokens, stop
        rows = list(self.rows(self.train, pairs, paths))
        for k, row in enumerate(rows):
            processes.reduce_gradients(self.model, self.ranks.world, k == len(rows) - 1)
            totals[:5] += self.backward(row, pairs, paths, kl, units)
        totals[5] = stopping  # rides along, so that all ranks decide alike
        loss, wins, chosen, rejected, tokens, stop = self.ranks.sum(totals).tolist()
        norm, n = self.update(step, loss), len(pairs)
        line = {"step": step + 1, "epoch": round(self.plan.epoch(step), 4), "loss": loss}
        if "rejected" in self.recipe.objective.answers:
            line |= {"accuracy": wins / n, "margin": (chosen - rejected) / n}
            line |= {"rejected_reward": rejected / n}
        line |= {"chosen_reward": chosen / n, "lr": self.learning_rate(step)}
        line |= {"grad_norm": norm, "pairs": n, "tokens": int(tokens)}
        held, longest = self.ranks.most(  # of the fullest process, of the longest row
            processes.peak_memory(self.ranks.kind), max(len(row.tokens) for row in rows)
        )
        fill = tokens / (len(rows) * self.ranks.world * longest)  # the rest is padding, or waiting
        seconds = time.monotonic() - start
        line |= {"row_fill": round(fill, 4), "seconds": round(seconds, 4)}
        line |= {"pairs_per_second": round(n / seconds, 2)}
        line |= {"tokens_per_second": round(tokens / seconds, 2)}
        return line | {"memory_gib": round(held, 3)}, stop > 0

    def backward(self, row, pairs, paths, kl, units):
        """Forward and backward of one row -> (5,) loss, accuracy, rewards, tokens, summed."""
        numbers = [pairs[j] for j in row.pairs]  # the row counts within the step
        gathered = row.by_token if "policy" in self.by_token else row.sums
        logps, counts = by_path(gathered(self.model(row)), paths), by_path(row.counts(), paths)
        out = self.recipe(logps, counts, self.reference_of("train", numbers), kl)  # of B pairs
        loss = out.losses.sum() / units  # this row's share of the step's loss
        (loss * self.ranks.world).backward()  # FSDP averages over ranks; a step's loss is a sum
        chosen = out.rewards["chosen"]  # (B,), as are wins
        rejected = out.rewards.get("rejected", chosen)  # where there is none, it is not shown
        wins, tokens = (chosen > rejected).float(), sum(b - a for a, b in row.spans if row.pairs)
        tokens = torch.tensor(float(tokens), device=loss.device)
        return torch.stack((loss.detach(), wins.sum(), chosen.sum(), rejected.sum(), tokens))

    def update(self, step, loss):
        """Clip and apply the gradient; refuse a non-finite one before it touches the weights."""
        # clip_grad_norm_ with one Inf would make that element NaN and all others 0, and AdamW would
        # keep both in its moments: so the norm is looked at first
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # over all shards
        if not (math.isfinite(loss) and torch.isfinite(norm)):
            fault = f"step {step + 1}: loss {loss}, gradient norm {norm.item()}"
            cure = "Lower --lr or look at the data, then --resume"
            raise UserError(f"{fault}; the weights are unchanged. {cure}")
        clip_grads_with_norm_(parameters, self.s.clip or math.inf, norm)  # 0: no clipping
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm.item()

    # -- validation

    def validate(self, step):
        """Loss, accuracy and margin on the validation pairs; also of the plain policy."""
        start, dataset, recipe = time.monotonic(), self.validation, self.recipe
        pairs, paths = range(len(dataset)), self.validation_paths
        how = {"label": "validate", "by_token": "policy" in self.by_token}
        logps = by_path(self.score(self.model, dataset, pairs, paths, **how), paths)
        counts = by_path(self.counts(dataset, pairs, paths), paths)  # {path: (N,)}
        reference = self.reference_of("validation")
        # z over all validation pairs at once, where a step has that of its batch
        out = recipe(logps, counts, reference, recipe.kl(logps, reference))  # of N pairs
        line = {"step": step, "eval_loss": (out.losses.sum() / out.units.sum()).item()}
        if "rejected" in recipe.objective.answers:
            margin = out.rewards["chosen"] - out.rewards["rejected"]  # (N,)
            line |= {"eval_accuracy": (margin > 0).float().mean().item()}
            line |= {"eval_margin": margin.mean().item()}
            # the plain policy, prompt only, is what gets deployed: does training carry over to it?
            known = {path: summed(values) for path, values in reference.items()}
            w, l = (summed(logps[path]) - known.get(path, 0) for path in self.plain)  # (N,) each
            scale = recipe.scale if recipe.objective.uses_reference else 0.1  # DPO's beta
            margin = scale * (w - l) if recipe.objective.head == "logps" else w - l
            line |= {"eval_plain_accuracy": (margin > 0).float().mean().item()}
            line |= {"eval_plain_margin": margin.mean().item()}
        return line | {"eval_seconds": round(time.monotonic() - start, 3)}

    # -- what is left behind

    def export(self, name, template):
        """OUT/<name>: a HF directory, written aside and renamed when whole."""
        dtype = stored_dtype(template.directory)  # the checkpoint's own, whatever the masters are
        tensors = processes.whole_tensors(self.model, dtype)
        if self.ranks.first:
            final, config = Path(self.s.out) / name, self.model.config
            with checkpoint.resumable(final), written_whole(final) as aside:
                export(aside, config, tensors, template.directory, dtype, template.source)
        else:
            list(tensors)  # sends its rows
        self.ranks.share(lambda: None)  # until rank 0 has written

    def save(self, step, metrics):
        """OUT/checkpoints/step-N, written in the background from a copy made here."""
        metrics.flush()  # a checkpoint says that the lines of its steps are there
        self.state["step"] = step
        self.saver.save(self.model, self.optimizer, self.state)


# ----------------------------------------------------------------------------- the loop


def loop(job, metrics, template, first):
    """Algorithm 1 of InSPO: sample pairs, condition, one gradient step; validate, save, repeat."""
    s, ranks, plan = job.s, job.ranks, job.plan
    begun, done = min(first * s.batch, plan.total), first
    bar = progress(s.loss, plan.total, "pair", not ranks.first, initial=begun, smoothing=0.1)
    with bar:
        try:
            for step in range(first, plan.steps):
                if step % s.eval_every == 0:  # on resuming again: no signal may lose a validation
                    validate(job, metrics, template, step)
                line, stop = job.step(step, ranks.stopping)
                metrics.write(line)
                bar.update(line["pairs"])
                bar.set_postfix({k: f"{line[k]:.4g}" for k in ("loss", "accuracy") if k in line})
                done = step + 1
                if stop and done < plan.steps:
                    raise Stopped
                if done % s.save_every == 0 or done == plan.steps:
                    job.save(done, metrics)
            validate(job, metrics, template, plan.steps)
            job.saver.wait()
        except Stopped:  # a signal: save what is done, and say so
            if job.state["step"] != done:
                job.save(done, metrics)
            job.saver.wait()
            ranks.say(f"stopped by a signal after step {done}; --resume goes on from here")
            dist.barrier()
            raise SystemExit(ranks.exit_status) from None


def validate(job, metrics, template, step):
    """Validate, write and print it, and keep the best model; the start is not a result."""
    if not job.validation:
        return
    line = job.validate(step)
    metrics.write(line)
    names = [k for k in line if k not in ("step", "eval_seconds") and rundir.measured(line, k)]
    shown = [f"{k} {line[k]:.4f}" for k in names]
    job.ranks.say(f"step {step}: {', '.join(shown)}")
    if step > 0 and line["eval_loss"] < job.state["best"]:
        job.state |= {"best": line["eval_loss"], "best_step": step}
        job.export("best", template)
    metrics.plot()


if __name__ == "__main__":
    run(main)
