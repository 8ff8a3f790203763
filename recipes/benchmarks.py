"""AlpacaEval 2, Arena-Hard and MT-Bench as steps: answers, verdicts, scores; and the judge's flags.

    judges = Benchmarks(lab, s, {"max_new_tokens": 2048})
    found = judges.alpaca("llama3/dpo", run / "best")          # {"LC": [mean, low, high], "WR": …}

In miniature the questions are a few of the small world's (miniature/), and the baseline is the
embedded start. Verdicts under our own judge prompts are no leaderboard numbers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jobs.cli import UserError, flag
from recipes import cost
from recipes.steps import RecipeFlags


class Benchmark(NamedTuple):
    """Questions, and who answered them before: files, hub ids or (hub dataset, file)."""

    questions: object
    answers: int  # that a model has to give
    baseline: object = None  # or the HF directory of a model that has yet to answer
    named: str | None = None  # what the baseline is called in its file


ARENA, ARENA_01 = "lmarena-ai/arena-hard-auto", "data/arena-hard-v0.1"
BASELINE = ("tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline.json")
HERE = Path("recipes/miniature")
BENCHMARKS = {
    "full": {
        "alpaca_eval": Benchmark("tatsu-lab/alpaca_eval:eval", 805, BASELINE),
        "arena_hard": Benchmark(
            (ARENA, f"{ARENA_01}/question.jsonl"),
            500,
            (ARENA, f"{ARENA_01}/model_answer/gpt-4-0314.jsonl"),
            "gpt-4-0314",
        ),
        "mt_bench": Benchmark("HuggingFaceH4/mt_bench_prompts", 160),
    },
    "miniature": {
        "alpaca_eval": Benchmark(HERE / "alpaca.jsonl", 4, "assets/start"),
        "arena_hard": Benchmark(HERE / "arena.jsonl", 4, "assets/start", "baseline"),
        "mt_bench": Benchmark(HERE / "mt_bench.jsonl", 4),
    },
}
JUDGES = {  # of AlpacaEval 2 and Arena-Hard, of MT-Bench
    "full": ("gpt-4-1106-preview", "gpt-4o,gpt-4"),
    "miniature": ("judge", "judge,grader"),
}
ALPACA = {  # flags of evaluate.py alpaca: own questions have no published difficulties
    "full": {},
    "miniature": {"difficulty": "none", "gamed": "none", "resamples": 50},
}


@dataclass(frozen=True)
class JudgeFlags(RecipeFlags):
    endpoint: str | None = flag(None, "OpenAI-compatible server of the judges")
    judge: str | None = flag(None, "its name for the judge; default: GPT-4 Turbo, 1106 preview")
    graders: str | None = flag(None, "its names for MT-Bench's; default: gpt-4o,gpt-4")


class Benchmarks:
    """Steps over a Lab; s: JudgeFlags; sampling: flags of generate.py.

    A name is a path within OUT, whose last part is what the benchmark's files call the model.
    Figures are [mean, low, high], or NaN in the plan.
    """

    def __init__(self, lab, s, sampling):
        self.lab, self.s, self.sampling = lab, s, sampling
        self.known, (judge, graders) = BENCHMARKS[s.size], JUDGES[s.size]
        self.judge, self.graders = s.judge or judge, (s.graders or graders).split(",")

    # -- answers

    def fetched(self, source):
        """A file or hub id as it is; (hub dataset, file) downloaded."""
        if not isinstance(source, tuple):
            return source
        folder = self.lab.out / "benchmarks"
        words = ["hf", "download", *source, "--repo-type", "dataset", "--local-dir", folder]
        return self.lab.step(f"benchmarks/{source[1]}", words)

    def answers(self, form, name, model, **how):
        """A model's answers to a benchmark, in its format -> file; how: flags of generate.py."""
        bench, ending = self.known[form], "json" if form == "alpaca_eval" else "jsonl"
        flags = {"model": model, "data": self.fetched(bench.questions), "format": form}
        flags |= {"name": Path(name).name} | self.sampling | how
        return self.lab.generate(f"{name}/{form}.{ending}", cost.sampling(bench.answers), **flags)

    def baseline(self, form):
        """The answers that a benchmark compares with -> file."""
        source = self.known[form].baseline
        if isinstance(source, tuple):
            return self.fetched(source)
        return self.answers(form, "benchmarks/baseline", source)

    # -- verdicts and scores

    def verdicts(self, name, form, answers, against, /, judge=None, **flags):
        """Judged answers: in both orders against others, or graded where against is None."""
        if not self.s.endpoint and not self.s.dry_run:
            raise UserError("--endpoint URL of the judges' server is missing")
        flags |= {"answers": answers, "against": against, "format": form}
        flags |= {"model": judge or self.judge, "endpoint": self.s.endpoint}
        return self.lab.evaluate(name, "judge", **flags)

    def alpaca(self, name, model, **how):
        """AlpacaEval 2, in percent -> {"LC": length-controlled, "WR": plain win rate}."""
        said, against = (
            self.answers("alpaca_eval", name, model, **how),
            self.baseline("alpaca_eval"),
        )
        verdicts = self.verdicts(f"{name}/annotations.json", "alpaca_eval", said, against)
        return self.win_rates(f"{name}/alpaca.json", verdicts, Path(name).name, ALPACA[self.s.size])

    def validation(self, name, model, pairs, n):
        """The same on n prompts of a pairs file, against their chosen answers; LC is a number."""
        flags = {"model": model, "data": pairs, "format": "alpaca_eval", "name": Path(name).name}
        flags |= self.sampling
        said = self.lab.generate(f"{name}/validation.json", cost.sampling(n), **flags)
        verdicts = self.verdicts(f"{name}/validation-verdicts.json", "alpaca_eval", said, pairs)
        flags = {"difficulty": "none", "gamed": "none", "resamples": 0}
        return self.win_rates(f"{name}/validation-score.json", verdicts, Path(name).name, flags)

    def win_rates(self, file, verdicts, named, flags):
        found = self.lab.evaluate(file, "alpaca", annotations=verdicts, **flags)
        keys = {"LC": "length_controlled_winrate", "WR": "win_rate"}
        return {column: self.lab.read(found, "models", named, key) for column, key in keys.items()}

    def arena(self, file, models):
        """Arena-Hard: {name: model} -> {name: {"AH WR": mean of all games, "AH SC": controlled}}.

        Of all models together, since style control standardises style over their games.
        """
        against, answers, verdicts = self.baseline("arena_hard"), [], []
        for name, model in models.items():
            answers.append(self.answers("arena_hard", name, model))
            where = f"{name}/arena-verdicts.jsonl"
            verdicts.append(self.verdicts(where, "arena_hard", answers[-1], against))
        flags = {"judgments": ",".join(map(str, verdicts))}
        flags |= {"answers": ",".join(map(str, [*answers, against])), "control": "both"}
        flags |= {"baseline": self.known["arena_hard"].named}
        found, keys = self.lab.evaluate(file, "arena", **flags), ("score", "controlled")
        scores = {
            name: [self.lab.read(found, "models", Path(name).name, key) for key in keys]
            for name in models
        }
        return {name: dict(zip(("AH WR", "AH SC"), of, strict=True)) for name, of in scores.items()}

    def mt_bench(self, name, model):
        """MT-Bench: the mean grade of both turns -> {"MT GRADER": …}."""
        said, questions = self.answers("mt_bench", name, model), self.known["mt_bench"].questions
        own, found = self.s.size == "miniature", {}  # MT-Bench's own categories need no file
        for grader in self.graders:
            file, named = f"{name}/mtbench-{grader.replace('/', '-')}", Path(name).name
            flags = {"judge": grader, "questions": questions}
            grades = self.verdicts(f"{file}.jsonl", "mt_bench", said, None, **flags)
            flags = {"judgments": grades, "questions": questions if own else None}
            scores = self.lab.evaluate(f"{file}.json", "mtbench", **flags)
            found[f"MT {grader}"] = self.lab.read(scores, "models", named, "score")
        return found
