"""IFSR (Findings of EMNLP 2025, 1329): every table and figure of its experiments.

    python -m recipes.ifsr table3 --dry_run                  # what would be run, and for how long
    python -m recipes.ifsr table3 --endpoint https://api.openai.com/v1
    python -m recipes.ifsr table3 --size miniature --seeds 0,1,2
    python -m recipes.ifsr table2 --start DIR --pairs PAIRS --test PAIRS     # on your own

x is the prompt, i the refining instruction, y+ the chosen answer, ỹ the rejected one and ŷ the
policy's own. The stages, of which I, II and III can be left out:

    start -> sft -> I: irft, (x -> y+) and (x, ỹ, i -> y+) -> dpo -> II: ifsr_dpo -> III: x, ŷ, i

Each trains one epoch, 32 sequences a step, by a linear schedule without warm-up, without weight
decay. The reference of II is the model that II starts from. Scores are those of a reward model, and
win rates a judge's against the chosen answers, on the first 2,000 test prompts, of --samples
answers each. Without --endpoint there is no judge, and the win rate is the reward model's alone.

What the paper leaves open, and how it is read here: irft has the rate of sft, and batches of half
as many pairs, each giving two sequences; paths of up to 2,048 tokens, of which prompts of the test
have 960 and answers 512 (Pythia has 2,048 positions); temperature 0.7 and top-p 0.95. Tables 1 and
2 ask the instruct models of InSPO; Table 4 is Llama-3, Table 9 Pythia; Tables 5 and 6 are Llama-3;
Figure 3 and Tables 7 and 10 take the models of UltraBin; Table 7's question, whose answer begins
with "A fence", is of our own words; Figures 4 and 6 show the first and the next test prompts; a
score increase in Figure 5 is over the sft model of the same training data. The recipes:
"""

import html
import itertools
import math
import shlex
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from assets import world
from jobs.cli import UserError, flag
from jobs.files import out_file, read_json
from recipes import cost
from recipes.benchmarks import Benchmarks, JudgeFlags
from recipes.steps import cell, main, seeds_of, selected, words_of

# ----------------------------------------------------------------------------- what is run


class Model(NamedTuple):
    path: str  # HF directory or hub id
    parameters: float


class Data(NamedTuple):
    """Preference pairs, as train.py takes them."""

    train: str
    test: str
    lr: float | None = None  # of sft and irft
    pairs: int = 0  # of a training set, about: for the plan's hours alone
    known: str | None = None  # the preference of assets/world.py that they follow


class Size(NamedTuple):
    """All that differs between the paper's size and a laptop's."""

    models: dict
    instructed: dict  # models of Tables 1 and 2, which nobody trains
    data: dict
    general: str  # of these the data of Figure 3 and Tables 7 and 10
    reward_model: Model
    train: dict  # flags of train.py
    sampling: dict  # flags of generate.py
    prompts: int
    max_prompt: int
    prefix: str  # Table 7: what the answer begins with, and to what
    fence: str
    harness: dict  # flags of lm_eval


SCHEDULE = {"schedule": "linear", "warmup": 0, "weight_decay": 0, "eval_pairs": 0}
SIZES = {
    "full": Size(
        models={
            "llama3": Model("meta-llama/Meta-Llama-3-8B", 8.03e9),
            "pythia": Model("EleutherAI/pythia-2.8b", 2.78e9),
        },
        instructed={
            "llama3-instruct": Model("meta-llama/Meta-Llama-3-8B-Instruct", 8.03e9),
            "mistral-instruct": Model("mistralai/Mistral-7B-Instruct-v0.2", 7.24e9),
        },
        data={
            "oasst": Data("OpenAssistant/oasst1", "OpenAssistant/oasst1:validation", 5e-6, 17_000),
            "ultrabin": Data("HuggingFaceH4/ultrafeedback_binarized",
                             "HuggingFaceH4/ultrafeedback_binarized:test_prefs", 5e-6, 61_000),
            "shp": Data("stanfordnlp/SHP", "stanfordnlp/SHP:test", 5e-6, 90_000),
            "hh": Data("Anthropic/hh-rlhf", "Anthropic/hh-rlhf:test", 5e-7, 160_000),
        },
        general="ultrabin",
        reward_model=Model("OpenAssistant/oasst-rm-2-pythia-6.9b-epoch-1", 6.9e9),
        train={"lr": 5e-7, "epochs": 1, "batch": 32, "max_len": 2048} | SCHEDULE
        | {"checkpoint_activations": True},
        sampling={"max_new_tokens": 512},
        prompts=2000,
        max_prompt=960,
        prefix="A fence",
        fence="recipes/miniature/fence.jsonl",
        harness={"tasks": "mmlu,gsm8k,humaneval", "num_fewshot": 1, "batch_size": "auto",
                 "confirm_run_unsafe_code": True},
    ),
    "miniature": Size(
        models={"start-single": Model("assets/start-single", 0.9e6),
                "start": Model("assets/start", 0.9e6)},
        instructed={"start": Model("assets/start", 0.9e6)},
        data={
            "separable": Data("assets/world/pairs.jsonl", "assets/world/test.jsonl", 1e-3,
                              known="separable"),
            "intransitive": Data("assets/world/pairs-intransitive.jsonl",
                                 "assets/world/test.jsonl", 1e-3, known="intransitive"),
        },
        general="separable",
        reward_model=Model("assets/reward", 0.9e6),
        train={"lr": 3e-4, "steps": 2, "batch": 16, "max_len": 256, "limit": 200, "keep": 1}
        | SCHEDULE,
        sampling={"max_new_tokens": 32},
        prompts=20,
        max_prompt=64,
        prefix="Hello!",
        fence="assets/world/test.jsonl",
        harness={"tasks": "small_world_facts", "include_path": "bench/lm_eval", "device": "cpu"},
    ),
}  # fmt: skip
INSTRUCTIONS = ("better", "another", "worse")
ROMAN = ("I", "II", "III")
ALL, FIRST = slice(None), slice(1)


@dataclass(frozen=True)
class Flags(JudgeFlags):
    models: str | None = flag(None, "only these of llama3, pythia; default: the paper's")
    datasets: str | None = flag(None, "only these of oasst, ultrabin, shp, hh; default: all four")
    losses: str = flag("kto,cpo,orpo,simpo", "of Tables 4 and 9, with commas between them")
    samples: int = flag(3, "sampling seeds of every policy", least=1)
    prompts: int | None = flag(None, "test prompts; default: 2000", least=1)
    train: str = flag("", "flags of train.py for every stage, as 'batch=8 dtype=bf16 steps=20'")
    start: str | None = flag(None, "a model of your own, instead of --models")
    pairs: str | None = flag(None, "preference pairs of your own, instead of --datasets")
    test: str | None = flag(None, "what is asked after training on --pairs")


class Policy(NamedTuple):
    """A model and where in OUT its answers go."""

    path: object
    place: str
    parameters: float


def chain(loss="dpo", one=None, two=None):
    """Training as [(objective, its flags)]; one, two: those of stages I and II, None for none."""
    stages = [("sft", {}), ("irft", one), (loss, {}), (f"ifsr_{loss}", two)]
    return [(name, flags) for name, flags in stages if flags is not None]


def combinations(loss="dpo"):
    """{"I II -": (chain, mode of generate.py)} of the eight that leave stages out."""
    found = {}
    for here in itertools.product((False, True), repeat=3):
        name = " ".join(n if there else "-" for n, there in zip(ROMAN, here, strict=True))
        one, two = ({} if there else None for there in here[:2])
        found[name] = chain(loss, one, two), "refine" if here[2] else "plain"
    return found


class Study:
    """The steps that IFSR's tables share, as methods over a Lab, flags and their Size.

    models: a field of Size; which of them, and whether one data set or all, where no flag tells.
    """

    def __init__(self, lab, s, models="models", which=ALL, general=False):
        self.lab, self.s, self.size, self.seeds = lab, s, SIZES[s.size], seeds_of(s)
        known, data = getattr(self.size, models), self.size.data
        if (s.pairs is None) != (s.test is None):
            raise UserError("--pairs and --test come together")
        self.models = selected("--models", s.models, known, list(known)[which])
        self.data = selected(
            "--datasets", s.datasets, data, [self.size.general] if general else data
        )
        if s.start:
            self.models = {Path(s.start).name: Model(s.start, 0)}
        if s.pairs:
            self.data = {"own": Data(s.pairs, s.test)}
        self.judges, self.judged = Benchmarks(lab, s, self.size.sampling), s.endpoint or s.dry_run
        self.n = s.prompts or self.size.prompts

    def policy(self, model, data, stages, seed):
        """Trains the stages of a chain, each from the one before -> the last one's Policy."""
        start, of = self.models[model], self.data[data]
        last, name = start.path, ""
        for loss, flags in stages:
            about = {"loss": loss, "model": last, "data": of.train, "seed": seed} | self.size.train
            if of.lr and loss in ("sft", "irft"):
                about["lr"] = of.lr
            about |= dict(word.split("=", 1) for word in shlex.split(self.s.train)) | flags
            if loss == "irft":  # two sequences of each pair
                about["batch"] = max(1, int(about["batch"]) // 2)
                about |= {"steps": 2 * int(about["steps"])} if "steps" in about else {}
            hours = cost.training(start.parameters, of.pairs, 1, loss, flags.get("condition"), 0)
            name += "-".join([loss, *(f"{k}{v}" for k, v in flags.items())]) + "-"
            place = f"{model}/{data}/{name}seed{seed}"
            last = self.lab.train(place, hours, **about) / "final"
        return Policy(last, place, start.parameters)

    # -- what is asked, and what is made of the answers

    def prompts(self, data):
        """A data set's test prompts, each once, with a pair of it."""
        about = {"data": self.data[data].test, "model": next(iter(self.size.models.values())).path}
        if self.s.start:
            about["model"] = self.s.start
        about |= {"prompts": self.n, "max_prompt": self.size.max_prompt}
        name = f"data/{data}"
        words = ["python", "-m", "recipes.prepare", *words_of(about | {"out": self.lab.out / name})]
        return self.lab.step(f"{name}/test.jsonl", words)

    def asked(self, policy, data, mode, seed, instruction="better"):
        """Answers to the test prompts, and what they are called; refined are the plain ones."""
        name = f"{policy.place}/{data}-{mode}-{instruction}-{seed}"
        about = {"model": policy.path, "data": self.prompts(data), "mode": mode, "seed": seed}
        if mode == "refine":
            about["data"], _ = self.asked(policy, data, "plain", seed)
        if mode != "plain":
            about["instruction"] = instruction
        hours = cost.sampling(self.n)
        return self.lab.generate(f"{name}.jsonl", hours, **about | self.size.sampling), name

    def scored(self, said, name, against):
        """The reward model's scores of answers, and of what they are held against -> a file."""
        flags = {"model": self.size.reward_model.path, "answers": said, "against": against}
        flags["cache"] = self.lab.out / "scores"
        hours = cost.scoring(self.size.reward_model.parameters, self.n)
        return self.lab.evaluate(f"{name}-reward.json", "reward", hours, **flags)

    def judgment(self, said, name, against):
        """A judge's win rate of answers -> [mean, low, high] in percent."""
        flags = {"name": "answers"}  # what the file of verdicts calls them
        file = f"{name}-verdicts.json"
        verdicts = self.judges.verdicts(file, "alpaca_eval", said, against, **flags)
        flags = {"difficulty": "none", "gamed": "none", "resamples": 0}
        return self.judges.win_rates(f"{name}-judge.json", verdicts, "answers", flags)["WR"]

    def measured(self, policy, data, mode="plain", instruction="better", first=False):
        """[{measure: figure} per sampling seed] of a policy's answers.

        A win is one against the chosen answer, or, with first, against the plain one.
        """
        found = []
        for seed in range(self.s.samples):
            said, name = self.asked(policy, data, mode, seed, instruction)
            against = self.asked(policy, data, "plain", seed)[0] if first else self.prompts(data)
            beaten = against if said != against else None
            scores = self.scored(said, name, beaten)
            found.append({"reward": self.lab.read(scores, "answers", "reward")})
            if beaten:
                found[-1]["RM win rate"] = self.lab.read(scores, "win_rate")
                if self.judged:
                    found[-1]["win rate"] = self.judgment(said, name, against)
        return found

    def exact(self, model, policy, data, mode):
        """{"exact win rate": that against the start's plain answers} in the small world."""
        kind = self.data[data].known
        if not kind:
            return {}
        place = {"start": f"{model}/world.json", "policy": f"{policy.place}/world.json"}
        about = {"start": self.models[model].path, "shown": "turn"}
        of = {"start": self.models[model].path, "policy": policy.path}
        worlds = {k: self.lab.evaluate(place[k], "world", model=of[k], **about) for k in place}
        if self.lab.plan is None:
            return {"exact win rate": math.nan}
        start, plain, shown = (
            np.array(self.lab.read(worlds[who], how, "probabilities"))
            for who, how in (("start", "plain"), ("policy", "plain"), ("policy", "shown"))
        )
        # of the model's own first answers b, each as often as it is given
        said = np.einsum("qb,qba->qa", plain, shown) if mode == "refine" else plain
        return {"exact win rate": world.expected_win_rate(said, start, kind)}

    def columns(self, model, stages, mode, name="{}", exact=False, **how):
        """{"DATA MEASURE": Cell} of what a chain makes of a model, data set by data set."""
        row = {}
        for data in self.data:
            seeds = []
            for seed in self.seeds:
                policy = self.policy(model, data, stages, seed)
                known = self.exact(model, policy, data, mode) if exact else {}
                seeds.append([m | known for m in self.measured(policy, data, mode, **how)])
            row |= cells(name.format(data), seeds)
        return row


def cells(name, seeds):
    """[[{measure: figure} per sampling seed] per training seed] -> {"NAME MEASURE": Cell}.

    Its seeds are those of training; with one of them, those of sampling.
    """
    if len(seeds) > 1:
        seeds = [[mean_of(samples) for samples in seeds]]
    scale = {"RM win rate": 100, "exact win rate": 100}  # the judge's is in percent
    (rows,) = seeds
    return {f"{name} {m}": cell([row[m] for row in rows], scale.get(m, 1)) for m in rows[0]}


def mean_of(samples):
    """[{measure: number or [mean, low, high]}] -> one of them, the mean."""
    return {m: np.mean([sample[m] for sample in samples], 0).tolist() for m in samples[0]}


# ----------------------------------------------------------------------------- the tables


def table1(lab, s):
    """x; x, i; x, ŷ, i asked of off-the-shelf models: score, and win rate against the first."""
    study, rows = Study(lab, s, "instructed"), []
    for model, of in study.models.items():
        policy = Policy(of.path, f"instructed/{model}", of.parameters)
        for name, mode in (("x", "plain"), ("x,i", "instruct"), ("x,ŷ,i", "refine")):
            row = {"asked": f"{model}: {name}"}
            for data in study.data:
                row |= cells(data, [study.measured(policy, data, mode, first=True)])
            rows.append(row)
    lab.tell("table1", rows)


def table2(lab, s):
    """Loss of y+ and variance of next-token distributions, behind x and four more contexts."""
    study, rows = Study(lab, s, "instructed"), []
    measures = {  # two quantities that are both called variance
        "loss": "loss",
        "over vocabulary": "variance over the vocabulary",
        "variance": "variance of labels",
    }
    contexts = {"x": "x", "x,i": "x,i↑", "x,ỹ,i": "x,ỹ,i↑", "x,i⁰": "x,i⁰", "x,i↓": "x,i↓"}
    for model, of in study.models.items():
        files = {}
        for data in study.data:
            flags = {"model": of.path, "data": study.prompts(data)}
            hours = cost.scoring(of.parameters, 5 * study.n)
            name = f"instructed/{model}/{data}-context.json"
            files[data] = lab.evaluate(name, "context", hours, **flags)
        for name, context in contexts.items():
            row = {"y+ behind": f"{model}: {name}"}
            for (data, file), (key, told) in itertools.product(files.items(), measures.items()):
                row[f"{data} {told}"] = cell([lab.read(file, "contexts", context, key)])
            rows.append(row)
    lab.tell("table2", rows)


def stages_table(lab, study, name, losses, exact=False):
    """The eight combinations of stages, of every model and objective -> OUT/NAME.json."""
    rows = []
    for model, loss in itertools.product(study.models, losses):
        for told, how in combinations(loss).items():
            row = study.columns(model, *how, exact=exact)
            rows.append({"stages": f"{model} {loss}: {told}"} | row)
    lab.tell(name, rows)


def table3(lab, s):
    """The eight combinations of stages I, II and III, two models on four data sets."""
    stages_table(lab, Study(lab, s), "table3", ["dpo"], exact=True)


def table4(lab, s):
    """The same over kto, cpo, orpo and simpo, Llama-3."""
    stages_table(lab, Study(lab, s, which=FIRST), "table4", s.losses.split(","))


def table5(lab, s):
    """Without ỹ in stage I, without ỹ in stage II, without ŷ in stage III."""
    study, rows = Study(lab, s, which=FIRST), []
    variants = {
        "all": (chain("dpo", {}, {}), "refine"),
        "I without ỹ": (chain("dpo", {"condition": "averaged_instruct"}, {}), "refine"),
        "II without ỹ": (chain("dpo", {}, {"condition": "instruct"}), "refine"),
        "III without ŷ": (chain("dpo", {}, {}), "instruct"),
    }
    for model, (name, how) in itertools.product(study.models, variants.items()):
        rows.append({"stages": f"{model}: {name}"} | study.columns(model, *how))
    lab.tell("table5", rows)


def table6(lab, s):
    """The instruction better, another or worse, in training and in inference."""
    study, rows = Study(lab, s, which=FIRST), []
    for model, trained in itertools.product(study.models, INSTRUCTIONS):
        row = {"trained with": f"{model}: {trained}"}
        same = {"instruction": trained}
        for asked in INSTRUCTIONS:
            how = {"name": f"{{}} {asked}", "instruction": asked}
            row |= study.columns(model, chain("dpo", same, same), "refine", **how)
        rows.append(row)
    lab.tell("table6", rows)


def table9(lab, s):
    """Table 4 with Pythia."""
    stages_table(lab, Study(lab, s, which=slice(1, None)), "table9", s.losses.split(","))


def two_models(study):
    """(model, data, Policy after dpo alone, Policy after I, dpo and II), of the first seed."""
    model, data, seed = next(iter(study.models)), next(iter(study.data)), study.seeds[0]
    policies = (study.policy(model, data, c, seed) for c in (chain(), chain("dpo", {}, {})))
    return model, data, *policies


def table7(lab, s):
    """What comes next behind "A fence": x; x, ỹ; x, i; x, ỹ, i of the dpo and the IFSR model."""
    study = Study(lab, s, which=FIRST, general=True)
    *_, plain, ifsr = two_models(study)
    flags = {"model": ifsr.path, "ref": plain.path, "data": study.size.fence, "limit": 1}
    flags |= {"parts": True, "prefix": study.size.prefix, "top": 10}
    file = lab.evaluate(f"{ifsr.place}/next_token.json", "next_token", **flags)
    if lab.plan is None:
        return
    columns = {"x": "x", "x,ỹ": "x,ỹ", "x,i": "x,i↑", "x,ỹ,i": "x,ỹ,i↑"}
    found, numbers = read_json(file), {}
    rows = [{"next": str(rank + 1)} for rank in range(10)]
    for (who, of), (name, context) in itertools.product(
        (("dpo", found["ref"]), ("ifsr", found)), columns.items()
    ):
        for row, (text, p) in zip(rows, of["pairs"][0]["top"][context], strict=True):
            row[f"{who} {name}"] = f"{text!r} {p:.3f}"
        for measure, (mean, *_) in of["contexts"][context].items():
            numbers.setdefault(measure, {"next": measure})[f"{who} {name}"] = f"{mean:.3f}"
    lab.tell("table7", rows + list(numbers.values()), prefix=study.size.prefix)


def table10(lab, s):
    """MMLU, GSM8K and HumanEval, one example shown, by lm-evaluation-harness."""
    study, rows = Study(lab, s, which=FIRST, general=True), []
    if find_spec("lm_eval") is None and not s.dry_run:
        cure = "pip install lm_eval==0.4.13; --dry_run prints its commands"
        raise UserError(f"lm-evaluation-harness is not installed: {cure}")
    chains = {"sft": chain()[:1], "dpo": chain(), "ifsr": chain("dpo", {}, {})}
    for model, (name, stages) in itertools.product(study.models, chains.items()):
        row, seeds = {"model": f"{model}: {name}"}, []
        for seed in study.seeds:
            policy = study.policy(model, next(iter(study.data)), stages, seed)
            of = {"model": "hf", "model_args": f"pretrained={policy.path}"} | study.size.harness
            of |= {"apply_chat_template": True, "output_path": lab.out / policy.place / "lm_eval"}
            words = ["env", "HF_ALLOW_CODE_EVAL=1", "lm_eval", "run", *words_of(of)]
            folder = lab.step(f"{policy.place}/lm_eval", words)
            seeds.append(harness_scores(folder, of["tasks"]) if lab.plan else {})
        if lab.plan:
            row |= {task: cell([scores[task] for scores in seeds], 100) for task in seeds[0]}
        rows.append(row)
    lab.tell("table10", rows)


def harness_scores(folder, tasks):
    """{task: its first measure} of the newest file that lm_eval left in a folder."""
    file = max(folder.rglob("results_*.json"), key=lambda file: file.stat().st_mtime)
    results, found = read_json(file)["results"], {}
    for task in tasks.split(","):
        numbers = {k: v for k, v in results[task].items() if isinstance(v, int | float)}
        names = [k for k in numbers if "stderr" not in k and not k.startswith("sample")]
        found[task] = numbers[names[0]]
    return found


# ----------------------------------------------------------------------------- the figures


def figure3(lab, s):
    """AlpacaEval 2 of the eight combinations of stages, two models."""
    study, rows = Study(lab, s, general=True), []
    for model, (told, (stages, mode)) in itertools.product(study.models, combinations().items()):
        found = []
        for seed in study.seeds:
            policy = study.policy(model, next(iter(study.data)), stages, seed)
            how = {"seed": seed, "mode": mode}
            found.append(study.judges.alpaca(f"{policy.place}/{mode}", policy.path, **how))
        row = {name: cell([scores[name] for scores in found]) for name in found[0]}
        rows.append({"stages": f"{model}: {told}"} | row)
    lab.tell("figure3", rows)


def attention_of(lab, s, name, shown):
    """Draws how the last query's attention moved over the prompts of `shown`, and tells of all."""
    study = Study(lab, s, which=FIRST, general=True)
    model, data, plain, ifsr = two_models(study)
    flags = {"model": ifsr.path, "ref": plain.path, "data": study.prompts(data)}
    hours = cost.scoring(ifsr.parameters, 2 * study.n)
    file = lab.evaluate(f"{ifsr.place}/attention.json", "attention", hours, **flags)
    if lab.plan is None:
        return
    found, rows = read_json(file), {}
    for mean in found["means"]:
        if mean["part"] == "prompt":
            row = rows.setdefault(mean["context"], {"prompt": mean["context"]})
            for who, when in (("dpo", "before"), ("ifsr", "after"), ("change", "change")):
                row[f"{mean['measure']} {who}"] = cell([mean[when]])
    draw_texts(found, shown, lab.out / f"{name}.html")
    lab.tell(name, list(rows.values()), model=model, data=data, n=found["n"])


def draw_texts(found, shown, file):
    """Prompts as a page: red where the trained model attends more than the dpo model, blue where
    less, full colour at a factor of e or more; each token's log ratio under the mouse."""
    style = "body{max-width:60em;margin:2em auto}pre{white-space:pre-wrap;font:15px/1.7 sans-serif}"
    parts = [f"<!doctype html><meta charset=utf-8><style>{style}</style>"]
    for n, (context, texts) in itertools.product(shown, found["prompts"].items()):
        if n >= len(texts):
            continue
        before, after = (found["last_query"][when][context][n] for when in ("before", "after"))
        parts.append(f"<h3>{html.escape(found['pairs'][n])}: {context}</h3><pre>")
        for text, a, b in zip(texts[n], before, after, strict=True):
            ratio = math.log(max(b, 1e-12) / max(a, 1e-12))
            colour = "220,40,40" if ratio > 0 else "40,80,220"
            style = f"background:rgba({colour},{min(abs(ratio), 1):.2f})"
            parts.append(f'<span style="{style}" title="{ratio:+.2f}">{html.escape(text)}</span>')
        parts.append("</pre>")
    with out_file(file):
        file.write_text("".join(parts), encoding="utf-8")


def figure4(lab, s):
    """Attention from the last token of a prompt, IFSR over dpo, drawn over a test prompt."""
    attention_of(lab, s, "figure4", [0])


def figure6(lab, s):
    """The same, drawn over the next four test prompts."""
    attention_of(lab, s, "figure6", [1, 2, 3, 4])


def figure5(lab, s):
    """Trained on one data set, asked about another: score increase over the sft model."""
    study, grid = Study(lab, s, which=FIRST), []
    model, names = next(iter(study.models)), list(study.data)
    for trained in names:
        row = {"trained on": trained}
        for asked in names:
            seeds = []
            for seed in study.seeds:
                ifsr = study.policy(model, trained, chain("dpo", {}, {}), seed)
                sft, samples = study.policy(model, trained, chain()[:1], seed), []
                for k in range(s.samples):
                    said, name = study.asked(ifsr, asked, "refine", k)
                    plain, _ = study.asked(sft, asked, "plain", k)
                    file = study.scored(said, f"{name}-over-sft", plain)
                    samples.append({"increase": lab.read(file, "difference")})
                seeds.append(samples)
            row[asked] = cells("", seeds)[" increase"]
        grid.append(row)
    if lab.plan:
        draw_grid(grid, names, lab.out / "figure5.png")
    lab.tell("figure5", grid, model=model)


def draw_grid(grid, names, file):
    """Rows of Cells as coloured squares with their numbers."""
    figure = Figure(figsize=(1.3 * len(names) + 2, len(names) + 1.5), layout="constrained")
    axis, values = figure.subplots(), [[row[name].mean for name in names] for row in grid]
    axis.imshow(values, cmap="RdBu_r", norm="linear")
    axis.set(xlabel="asked about", ylabel="trained on")
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(names)), names)
    for (y, row), (x, _) in itertools.product(enumerate(values), enumerate(names)):
        axis.text(x, y, f"{row[x]:+.2f}", ha="center", va="center")
    figure.savefig(file, dpi=120)


RECIPES = {
    recipe.__name__: recipe
    for recipe in (table1, table2, table3, table4, table5, table6, table7, table9, table10,
                   figure3, figure4, figure5, figure6)
}  # fmt: skip

if __name__ == "__main__":
    main("ifsr", RECIPES, Flags, __doc__)
