"""Runs experiments. A step is a command line, as a user would type it, and the file that it leaves.

    def table(lab, s):
        run = lab.train("dpo", loss="dpo", model="DIR", data="pairs.jsonl")  # -> OUT/dpo
        said = lab.generate("answers.jsonl", model=run / "best", data="questions.jsonl")
        found = lab.evaluate("scores.json", "reward", model="RM", answers=said)
        score = cell([lab.read(found, "answers", "reward")])  # one value per seed
        lab.tell("table", [{"method": "dpo", "score": score}])

    main("NAME", {"table": table}, RecipeFlags, __doc__)    # in recipes/NAME.py

    python -m recipes.NAME table                      # all of it
    python -m recipes.NAME table --dry_run            # the commands and their GPU hours
    python -m recipes.NAME table --size miniature     # the same steps on a laptop

A recipe is an ordinary function. It is gone through twice: first as a plan, in which nothing is
started and `read` gives NaN, so that steps and GPU hours are known beforehand; then in earnest. A
step whose file is there is passed over, so the same command goes on where it stopped; one that
fails ends the recipe with its command and the end of its log (OUT/logs). What made each file stands
in OUT/steps.jsonl: a file that another command left is refused, never taken for this one's.
"""

import contextlib
import dataclasses
import importlib
import math
import shlex
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evals.results import table
from evals.stats import t_interval
from jobs.cli import UserError, flag, parse, run
from jobs.files import Store, out_file, read_json, write_json

# the papers' figures: {paper: {table: {row: {column: figure}}}}
PAPERS = read_json(Path(__file__).with_name("paper.json"))
# flags that say where and how fast a step runs, not what it computes
MAY_CHANGE = ("--endpoint", "--concurrency")


@dataclass(frozen=True)
class RecipeFlags:
    """What every recipe takes."""

    size: str = flag("full", "full: the paper's; miniature: a laptop's", ("full", "miniature"))
    seeds: str = flag("0", "seeds, with commas between them")
    gpus: int = flag(8, "GPUs of the node")
    out: str | None = flag(None, "directory of all files; default: runs/PAPER-SIZE")
    dry_run: bool = flag(False, "print the commands and their GPU hours; start nothing")
    one_process: bool | None = flag(None, "no new process for each step; default: in miniature")


class Lab:
    """Goes through a recipe's steps, knows what they left, writes the tables.

    paper: a key of recipes/paper.json. plan: the Lab that has gone through the same recipe before;
    without one, this is that Lab, and nothing is started, read or written.
    """

    def __init__(self, paper, s, plan=None):
        self.paper, self.s, self.out, self.plan = paper, s, Path(s.out), plan
        self.small = s.size == "miniature"
        self.one_process = self.small if s.one_process is None else s.one_process
        self.steps = {}  # {file: (command line, GPU hours)}, each once, in order
        if plan:
            self.known = Store(self.out / "steps.jsonl", ("file", "command", "seconds"), "--out")

    # -- a method per command; names are paths within OUT; a flag that is None is left out

    def train(self, name, hours=0.0, /, **flags):
        """train.py --out OUT/name -> that directory; done when its `final` is there."""
        flags |= {"out": self.out / name, "resume": True}  # a run that was cut off goes on
        words = [*self.launcher(), "train.py", *words_of(flags)]
        return self.step(f"{name}/final", words, hours).parent

    def generate(self, name, hours=0.0, /, **flags):
        """generate.py --out OUT/name -> that file."""
        launcher = ["python"] if flags.get("endpoint") else self.launcher()
        words = [*launcher, "generate.py", *words_of(flags | {"out": self.out / name})]
        return self.step(name, words, hours)

    def evaluate(self, name, command, hours=0.0, /, **flags):
        """evaluate.py COMMAND --out OUT/name -> that file."""
        words = ["python", "evaluate.py", command, *words_of(flags | {"out": self.out / name})]
        return self.step(name, words, hours)

    def launcher(self):
        many = ["torchrun", "--standalone", "--nproc-per-node", self.s.gpus]
        return many if self.s.gpus > 1 and not self.small else ["python"]

    def step(self, name, words, hours=0.0):
        """Runs any command line that leaves OUT/name, unless that is there -> OUT/name."""
        file, words = self.out / name, [*map(str, words)]
        again, _ = self.steps.setdefault(name, (words, hours))
        if again != words:
            raise UserError(f"{name}: of two commands, {shlex.join(again)} and {shlex.join(words)}")
        if self.plan is None or again is not words:  # what two parts of a recipe share runs once
            return file
        if file.exists():
            made, _ = self.known.get(name, (essence(words), 0))
            if made != essence(words):
                fault = f"{file} was made by another command, {shlex.join(made)}"
                raise UserError(f"{fault}; move it away or choose another --out")
            return file
        done = f"{len(self.steps)}/{len(self.plan.steps)}"
        print(time.strftime("%H:%M:%S"), done, name, flush=True)
        start, log = time.monotonic(), self.out / "logs" / f"{name.replace('/', '_')}.log"
        with out_file(file), out_file(log), open(log, "w", encoding="utf-8") as opened:
            print(shlex.join(words), file=opened, flush=True)
            here = self.one_process and words[0] == "python"
            status = (run_here if here else run_process)(words, opened)
        if status or not file.exists():
            end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-8:])
            fault = f"step {name} failed with exit status {status}: {shlex.join(words)}"
            raise UserError(f"{fault}\n{end}\nall of it: {log}; the same command goes on here")
        self.known[name] = essence(words), round(time.monotonic() - start, 3)
        return file

    # -- what steps left

    def read(self, file, *keys):
        """A value of a JSON file that a step left; NaN in the plan."""
        value = math.nan if self.plan is None else read_json(Path(file))
        for key in () if self.plan is None else keys:
            value = value[key]
        return value

    def seconds(self, file):
        """How long the step took that left a file; NaN in the plan."""
        return math.nan if self.plan is None else self.known[str(file.relative_to(self.out))][1]

    def best(self, scores):
        """The key of the highest of {key: score}; in the plan, the first."""
        return next(iter(scores)) if self.plan is None else max(scores, key=scores.get)

    def tell(self, name, rows, **more):
        """Writes OUT/name.json and prints it as a table; rows: {column: text or Cell} each.

        Behind "|" stands the paper's figure, a dash where we have none.
        """
        if self.plan is None:
            return
        paper, printed, plain = PAPERS.get(self.paper, {}).get(name, {}), [], []
        for row in rows:
            known = paper.get(next(iter(row.values())), {})  # the first column names the row
            cells = {column: v for column, v in row.items() if isinstance(v, Cell)}
            texts = {column: str(v) for column, v in cells.items()}
            if self.paper in PAPERS:
                texts = {f"{c} | paper": f"{v} | {known.get(c, '-')}" for c, v in texts.items()}
            printed.append({c: v for c, v in row.items() if c not in cells} | texts)
            plain.append(row | {column: dataclasses.asdict(v) for column, v in cells.items()})
        about = {"table": name, "settings": dataclasses.asdict(self.s)} | more
        about |= {"rows": plain, "paper": paper}
        write_json(self.out / f"{name}.json", about)
        print(f"\n{table(printed)}\n{self.out / name}.json", flush=True)


@dataclass(frozen=True)
class Cell:
    """A figure: mean over seeds, their standard deviation, and a 95% interval.

    Where a seed's figure has an interval of its own, over questions, it is the mean of these; else
    Student's t-interval of the mean over seeds. None where there is one seed and no interval.
    """

    mean: float
    spread: float | None
    low: float | None
    high: float | None
    seeds: list

    def __str__(self):
        spread = f" ± {self.spread:.3g}" if self.spread is not None else ""
        bounds = f" [{self.low:.4g}, {self.high:.4g}]" if self.low is not None else ""
        return f"{self.mean:.4g}{spread}{bounds}"


def cell(values, scale=1.0):
    """A number or [mean, low, high] per seed -> Cell, of `scale` times that."""
    rows = np.array([v if isinstance(v, list) else [v] for v in values], dtype=float) * scale
    means, n = rows[:, 0], len(rows)
    spread = float(means.std(ddof=1)) if n > 1 else None
    low, high = rows[:, 1:].mean(0).tolist() or (None, None)
    if low is None and n > 1:
        _, low, high = t_interval(means)
    return Cell(float(means.mean()), spread, low, high, means.tolist())


def words_of(flags):
    """{"lr": 1e-3, "resume": True, "limit": None} -> ["--lr", "0.001", "--resume"]"""
    words = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def essence(words):
    """A command line from its script on, without what may change between two starts."""
    first = next((n for n, word in enumerate(words) if word.endswith(".py") or word == "-m"), 0)
    pairs = zip(["", *words], words, strict=False)
    kept = [w for before, w in pairs if not {before, w} & {*MAY_CHANGE}]
    return kept[first:]


def run_process(words, log):
    """Runs a command line, its output going to an open file -> exit status."""
    start = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}
    words = [sys.executable, *start[words[0]], *words[1:]] if words[0] in start else words
    return subprocess.run(words, stdout=log, stderr=subprocess.STDOUT).returncode


def run_here(words, log):
    """The same of a `python` command in this process, sparing seconds of imports -> exit status."""
    name, *argv = words[2:] if words[1] == "-m" else words[1:]
    before, handlers = sys.argv, {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            sys.argv = [name, *argv]
            run(importlib.import_module(name.removesuffix(".py")).main)
            return 0
        except SystemExit as stop:
            return stop.code or 0
        except Exception:
            traceback.print_exc()
            return 1
        finally:
            sys.argv = before
            for number, handler in handlers.items():  # train.py's own, which wait for its next step
                signal.signal(number, handler)


def seeds_of(s):
    """--seeds -> list of int."""
    try:
        return [int(seed) for seed in s.seeds.split(",")]
    except ValueError as error:
        raise UserError(f"--seeds {s.seeds}: numbers, with commas between them") from error


def selected(flagged, names, known, default):
    """The values of a flag, with commas between them -> {name: known[name]}; None: the default."""
    wanted = names.split(",") if names else default
    if unknown := [name for name in wanted if name not in known]:
        raise UserError(f"{flagged} {unknown[0]}: choose from {', '.join(known)}")
    return {name: known[name] for name in wanted}


def main(paper, recipes, settings, doc):
    """The entry point of recipes/PAPER.py; recipes: {name: function of (Lab, flags)}."""

    def go():
        name, *argv = sys.argv[1:] or ["--help"]
        if name in ("-h", "--help"):
            told = [f"{name:12}{about.__doc__.splitlines()[0]}" for name, about in recipes.items()]
            return print(doc, *told, sep="\n")
        if name not in recipes:
            raise UserError(f"unknown recipe {name}; there are {', '.join(recipes)}")
        s = parse(settings, recipes[name].__doc__, argv)
        s = dataclasses.replace(s, out=s.out or f"runs/{paper}-{s.size}")
        plan = Lab(paper, s)
        recipes[name](plan, s)
        hours = sum(hours for _, hours in plan.steps.values())
        for words, cost in plan.steps.values() if s.dry_run else ():
            told = f"  # {cost:.1f} GPU hours" if cost and s.size == "full" else ""
            print(shlex.join(words) + told)
        told = f", about {hours:.1f} GPU hours" if s.size == "full" else ""
        print(f"{len(plan.steps)} steps{told}")
        if not s.dry_run:
            recipes[name](Lab(paper, s, plan), s)

    run(go)
