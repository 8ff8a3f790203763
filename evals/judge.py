"""Lets a model judge answers: `python evaluate.py judge --answers A --against B --model JUDGE`.

The judge is a server (--endpoint) or a local model. It sees each pair in both orders, for judges
favour a place, and its texts are kept by content, so that nothing is asked, or paid for, twice:
the same command goes on where a run was cut off. Files that it writes, as their tools do:

    alpaca_eval   annotations.json: output_1 is --against, output_2 --answers; preference 1 to 2
    arena_hard    model_judgment/JUDGE/MODEL.jsonl: game 1 has --against as A, game 2 --answers
    mt_bench      FastChat's single-answer grades: a score of 1 to 10 per turn, -1 where there is
                  none; nothing is compared, so --against is not taken
    mt_bench_pair FastChat's pairwise judgments: --against is model_1, A in the first game; in a
                  second turn the judge sees each model's own dialogue

A verdict that cannot be read is null in the file, counted, and no tie.
"""

import re
import time
from dataclasses import dataclass

import numpy as np

from evals.answers import align, read_answers
from evals.results import VERDICTS, read_grade, read_verdict
from evals.stats import estimate
from generate import Ask, Dialogue, answerer
from hub.benchmarks import json_digest, question_id, refuse_twins, transcript, write_rows
from hub.weights import Weights, resolve
from jobs.cli import EndpointFlags, ModelFlags, SamplingFlags, UserError, flag, progress, require
from jobs.files import ASSETS, Store, read_text

VERDICT_FORMATS = ("alpaca_eval", "arena_hard", "mt_bench", "mt_bench_pair")
# what AlpacaEval's and Arena-Hard's templates call things
NAMES = {"instruction": "question", "output_1": "answer_a", "output_2": "answer_b"}


class Prompt:
    """A judge's template: {question}, {answer_a}, {answer_b}, or {answer} and {reference}.

    ChatML marks make its messages; without them all of it is one user turn. Other braces stay.
    """

    def __init__(self, text, needs, where):
        parts = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", text, re.DOTALL)
        self.parts = parts or [("user", text)]
        if self.parts[-1][0] != "user":
            raise UserError(f"{where}: the template must end with a user turn")
        found = {named(name) for _, part in self.parts for name in re.findall(r"\{(\w+)\}", part)}
        if missing := [name for name in needs if name not in found]:
            raise UserError(f"{where}: the template lacks {{{missing[0]}}}")

    def __call__(self, **values):
        def fill(match):
            return str(values.get(named(match[1]), match[0]))

        filled = ((role, re.sub(r"\{(\w+)\}", fill, text)) for role, text in self.parts)
        return [{"role": role, "content": text} for role, text in filled]


def named(name):
    return NAMES.get(name.lower(), name.lower())


def ask_judge(s, prompts):
    """Dialogues -> the judge's text on each, None where there is none; asked; failed.

    What it has said already is kept, by content, and not asked; a text that is empty or cut short
    is no verdict and not kept. asked: [tokens in, tokens out] of what was asked now, None where a
    server does not tell; failed: (number, why it has no text). UserError if not one has a text.
    """
    known = Store(s.cache or f"{s.out}.cache.jsonl", ("key", "text", "tokens"), "--cache")
    model = s.model if s.endpoint else Weights(resolve(s.model)).digest()
    identity, asked, failed = [model, s.temperature, s.top_p, s.max_new_tokens, s.seed], [], []
    keys, none = [json_digest([identity, prompt]) for prompt in prompts], ("", None)
    new = {key: n for n, key in enumerate(keys) if not known.get(key, none)[0].strip()}
    if new:
        answers = answerer(s)
        dialogues = [Dialogue(Ask(prompts[n]), n, seed=s.seed) for n in new.values()]
        with progress("judge", len(keys), "verdict", initial=len(keys) - len(new)) as bar:
            for n, row in answers(dialogues):
                tokens = row.get("usage")
                if not s.endpoint:  # by the local judge's own tokenizer
                    texts = [answers.template.render(row["prompt"], generation=True), row["answer"]]
                    tokens = [len(ids) for ids in answers.template.encode(texts)]
                asked.append(tokens)
                if row["finished"] and row["answer"].strip():
                    known[keys[n]] = (row["answer"], tokens)
                else:  # as from a model whose hidden reasoning took all the tokens
                    fault = "cut at --max_new_tokens" if not row["finished"] else "empty"
                    failed.append((n, f"its reply is {fault}"))
                bar.update()
        failed += getattr(answers, "refused", [])
    texts = [known.get(key, none)[0] for key in keys]
    if not any(map(str.strip, texts)):
        raise UserError(f"no judgment came; number {min(failed)[0] + 1}: {min(failed)[1]}")
    return [text if text.strip() else None for text in texts], asked, failed


def verdict_row(s, ours, theirs, games, wins):
    """Two games of a question as a row of the file of s.format; wins: of who is shown as B."""
    models = s.against_name or theirs.name or s.against, s.name or ours.name or s.answers
    if s.format == "alpaca_eval":
        return {
            "instruction": transcript(ours.question),
            "output_1": theirs.said,
            "generator_1": models[0],
            "output_2": ours.said,
            "generator_2": models[1],
            "dataset": ours.about.get("dataset", ""),
            "annotator": s.model,
            # 1 and the mean win over both orders, ties half; null unless both are read
            "preference": None if None in wins else 1 + (wins[0] + 1 - wins[1]) / 2,
            "raw_completion": [game and game["judgment"]["answer"] for game in games],
        }
    question = question_id(ours.prompt, ours.about)
    if s.format == "arena_hard":
        category = ours.about.get("category", "custom")
        row = {"uid": question, "category": category, "judge": s.model}
        return row | {"model": models[1], "baseline": models[0], "games": games}
    row = {"question_id": question, "model_1": models[0], "model_2": models[1]}
    for n, (a, b) in enumerate((("model_1", "model_2"), ("model_2", "model_1"))):
        row[f"g{n + 1}_winner"] = {None: "error", 0.0: a, 0.5: "tie", 1.0: b}[wins[n]]
    row["judge"] = [s.model, "pair-v2" if ours.about["turn"] == 1 else "pair-v2-multi-turn"]
    for n, game in enumerate(games, 1):
        row[f"g{n}_user_prompt"] = game and game["prompt"][-1]["content"]
        row[f"g{n}_judgment"] = game and game["judgment"]["answer"]
    return row | {"turn": ours.about["turn"], "tstamp": time.time()}


@dataclass(frozen=True)
class JudgeFlags(ModelFlags, SamplingFlags, EndpointFlags):
    model: str | None = flag(None, "the judge: HF directory, hub id, or --endpoint's name for it")
    answers: str | None = flag(None, "answers in any format that generate.py writes")
    against: str | None = flag(None, "answers to the same prompts, or pairs: their chosen answers")
    format: str = flag("alpaca_eval", "of --out", VERDICT_FORMATS)
    out: str | None = flag(None, "file of verdicts")
    questions: str | None = flag(None, "question file: categories, references; MT-Bench's turns")
    template: str | None = flag(None, "file of your own prompt; default: of assets/judge")
    name: str | None = flag(None, "model's name in --out; default: as --answers has it")
    against_name: str | None = flag(None, "baseline's name in --out; default: as --against has it")
    cache: str | None = flag(None, "jsonl of all that judges said; default: OUT.cache.jsonl")
    price_in: float = flag(0.0, "dollars per million tokens that the judge reads")
    price_out: float = flag(0.0, "dollars per million tokens that it writes")
    limit: int | None = flag(None, "only the first N answers", least=1)
    temperature: float = flag(0.0, "of the judge; 0 takes the likeliest token")
    top_p: float = flag(1.0, "mass of the nucleus that its tokens are drawn from", above=0, most=1)
    seed: int = flag(0, "of the judge and of the bootstrap")


def judge(s):
    """Let --model compare --answers with --against, or grade them; write verdicts, print rates."""
    single = s.format == "mt_bench"  # nothing is compared
    require(s, "model", "answers", "out", *([] if single else ["against"]))
    if single and s.against:
        raise UserError("--format mt_bench grades single answers; leave --against out")
    where = s.template or ASSETS / "judge" / ("grade.txt" if single else "compare.txt")
    needs = ("question", "answer") if single else ("question", "answer_a", "answer_b")
    prompt = Prompt(read_text(where, f"--template {where}"), needs, f"--template {where}")
    answers = read_answers(s.answers, "--answers", s.questions)[: s.limit]
    if s.format == "arena_hard":
        refuse_twins(answers, s.answers)
    if single:
        prompts = []
        for row in answers:
            told = dict(enumerate(row.about.get("reference") or [], 1))  # by turn
            told = told.get(row.about["turn"], "(none)")
            prompts.append(prompt(question=transcript(row.prompt), answer=row.text, reference=told))
    else:
        others = read_answers(s.against, "--against", s.questions)
        sides = list(zip(answers, align(answers, others, f"--against {s.against}"), strict=True))
        prompts = [  # two games per question, --against first as A and then as B
            prompt(question=transcript(ours.question), answer_a=a.said, answer_b=b.said)
            for ours, theirs in sides
            for a, b in ((theirs, ours), (ours, theirs))
        ]
    texts, *spent = ask_judge(s, prompts)
    rows = graded(s, answers, prompts, texts) if single else compared(s, sides, prompts, texts)
    write_rows(s.out, rows, lines=s.format != "alpaca_eval")
    report_cost(s, *spent, len(prompts))


def compared(s, sides, prompts, texts):
    """The judge's texts on two games per question -> rows of the file."""
    games, wins, rows = [], [], []
    for text, asked in zip(texts, prompts, strict=True):
        label = read_verdict(text or "")
        game = {"score": label, "judgment": {"answer": text}, "prompt": asked}
        games.append(None if text is None else game)
        wins.append(1 - VERDICTS[label][0] if label else None)  # of B, a strong verdict as any
    report_games(s, wins)
    for n, (ours, theirs) in enumerate(sides):
        both = slice(2 * n, 2 * n + 2)  # games of this question
        rows.append(verdict_row(s, ours, theirs, games[both], wins[both]))
    return rows


def graded(s, answers, prompts, texts):
    """The judge's text on each answer -> rows as FastChat's single-answer judgments."""
    grades = [read_grade(text or "") for text in texts]
    read = [score for score in grades if score is not None]
    print(f"{s.answers}: {len(grades)} answers, {len(grades) - len(read)} unread")
    if read:
        print(f"mean grade {estimate(read, s.seed):.2f}")
    return [
        {
            "question_id": question_id(row.prompt, row.about),
            "model": s.name or row.name or s.answers,
            "judge": [s.model, "single-v1" if row.about["turn"] == 1 else "single-v1-multi-turn"],
            "user_prompt": asked[-1]["content"],
            "judgment": text,
            "score": -1 if score is None else score,
            "turn": row.about["turn"],
            "tstamp": time.time(),
        }
        for row, asked, text, score in zip(answers, prompts, texts, grades, strict=True)
    ]


def report_games(s, wins):
    """Prints the win rate, and how much the order of the answers mattered."""
    games = np.array(wins, float).reshape(-1, 2)  # (questions, orders)
    wins = games[np.isfinite(games).all(1)]
    unread = len(games) - len(wins)
    print(f"{s.answers} against {s.against}: {len(games)} questions, {unread} unread")
    if not len(wins):
        return
    shares = (wins[:, 0] + 1 - wins[:, 1]) / 2  # of --answers, which is B first and then A
    rate, ties = estimate(shares, s.seed), int((shares == 0.5).sum())
    print(f"win rate {rate:.1%}, ties as half; {ties} of {len(wins)} undecided over both orders")
    agree = (wins.sum(1) == 1).mean()
    print(f"both orders agree on {agree:.1%}; the answer shown last won {wins.mean():.1%}")


def report_cost(s, asked, failed, n):
    """Prints tokens and dollars of this run; what came from the cache costs nothing."""
    told = [tokens for tokens in asked if tokens is not None]
    tokens_in, tokens_out = (sum(column) for column in zip(*told, strict=True)) if told else (0, 0)
    dollars = (tokens_in * s.price_in + tokens_out * s.price_out) / 1e6
    print(f"{n} judgments: {len(asked)} replies now, {len(failed)} failed, others known")
    untold = f", {len(asked) - len(told)} untold" if len(told) < len(asked) else ""
    print(f"tokens: {tokens_in} in, {tokens_out} out{untold}; cost ${dollars:.4f}")
    if failed:
        number, why = min(failed)
        print(f"judgment {number + 1} failed: {why}; the same command asks again")
