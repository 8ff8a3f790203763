"""Train a language model from preference pairs: `torchrun train.py --loss ins_dpo`.

Reads top to bottom: the set-up, then the loop over what step.py computes. One process or many make
no difference to the numbers: which pairs make up a step is fixed by the plan (rows.py), and a
step's loss is a sum over its pairs divided by their number.
"""

from pathlib import Path

import torch.distributed as dist

from data import plain_paths
from evals import plan as memory
from hub import weights
from hub.template import Template
from jobs.cli import UserError, as_user_error, parse, progress, run
from jobs.metrics import Metrics
from jobs.processes import Ranks, Stopped, build_model
from losses import recipe, unique
from prepare import prepare
from rows import Plan
from settings import HYPER, Settings, check_config, open_out, resolve, write_config
from step import Run

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
    s = weights.pin(parse(Settings, __doc__.splitlines()[0]))
    if s.plan:
        return memory.show(s)
    with Ranks(s.device) as ranks:
        train(s, ranks)


def train(s, ranks):
    """One run, from its settings to OUT/final; UserError for what a user can put right."""
    embedded = resolve(s, ranks.kind)
    with as_user_error():
        rule = recipe(
            s.loss, s.condition, s.bridge, s.reference, **{name: getattr(s, name) for name in HYPER}
        )
    try:
        with open_out(s, ranks):
            fit(s, ranks, rule)
            if embedded:
                report_world(s, ranks)
            ranks.say(f"saved: {Path(s.out) / 'final'}")
    except OSError as error:  # a full disk, a lost mount: one line
        raise UserError(f"{error.filename or s.out}: {error.strerror}; then --resume") from error


def fit(s, ranks, rule):
    """Set up, train, export."""
    source = fetch(ranks, s.model, "--model")
    other = s.ref_model is not None
    reference_source = fetch(ranks, s.ref_model, "--ref_model") if other else source
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
    check_config(s, ranks)

    model = build_model(s, ranks, source, rule.objective.head)
    digest, ref_digest = ranks.share(lambda: digests(source, reference_source))
    job = Run(s, ranks, rule, model, digest, train_set, validation, plan)
    ranks.deferred = True  # from here on a signal waits for the next place to save or stop
    reference = job.prepare_reference(reference_source, ref_digest)
    first = job.resume() if s.resume else 0
    if first == 0:
        job.check_start()
    write_config(s, ranks, {"hyper": rule.hyper, "steps": plan.steps})  # OUT holds a run from here
    metrics = Metrics(s, ranks, first)
    if reference:
        metrics.write(reference)
    loop(job, metrics, template, first)
    job.export("final", template)
    metrics.close()


def digests(*sources):
    """sha256 of the weights of each directory, each read once."""
    known = {source: weights.Weights(source).digest() for source in set(sources)}
    return [known[source] for source in sources]


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
                    metrics.flush()
                    job.save(done)
            validate(job, metrics, template, plan.steps)
            job.saver.wait()
        except Stopped:
            stop_here(job, metrics, done)


def stop_here(job, metrics, done):
    """After a signal: save what is done, say so, end well."""
    metrics.flush()
    if job.saved_at != done and done > 0:
        job.save(done)
    job.saver.wait()
    job.ranks.say(f"stopped by a signal after step {done}; --resume goes on from here")
    dist.barrier()
    raise SystemExit(0)


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
        job.best, job.best_step = line["eval_loss"], step
        job.export("best", template)
    metrics.plot()


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
