"""Shows that a change of the code has changed no number, by running every command before and after.

    python tests/tools/frozen.py record FILE.json     # before the change
    python tests/tools/frozen.py compare FILE.json    # after it: every run is equal or DIFFERENT

Every run is a command line of train.py, generate.py or evaluate.py, started in the checkout (--root
DIR; default: the one that this file lies in), so the code under it may be rearranged freely. What
is kept of a run: its standard output, its result files, and of a training run the metrics, digests
of the exported weights and of the last checkpoint, and the exported config. Values are bitwise, so
they hold on one kind of machine with one version of torch; FILE says which. Left out are times,
memory, pictures, caches and the echo of flags; paths become the words ROOT and WORK.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from safetensors import deserialize

# ----------------------------------------------------------------------------- what is run

STEPS = "--steps 6 --batch 8 --limit 100 --eval_pairs 16 --eval_every 3"
START = "--model assets/start --lr 3e-4 --max_len 256"
PLAIN_LOSSES = ("ins_dpo", "dpo", "ipo", "orpo", "cpo", "slic", "rrhf", "ifsr_kto", "irft")
TRAIN = {loss: f"--loss {loss}" for loss in PLAIN_LOSSES} | {
    "resumed": "--loss ins_dpo --resume",  # the run ins_dpo as it was after step 3
    "two_processes": "--loss ins_dpo",
    "compiled": "--loss ins_dpo --compile",
    "checkpointed": "--loss ins_dpo --checkpoint_activations",
    "bf16": "--loss ins_dpo --dtype bf16",
    "cut": "--loss ins_dpo --max_len 28 --no-score_eos",
    "ref_model": "--loss ins_dpo --ref_model assets/start-single",
    "no_context_grad": "--loss ins_dpo --context_grad false",
    "no_context_grad_turn": "--loss simpo --condition averaged --bridge turn --context_grad false",
    "dpo_instruct": "--loss dpo --condition instruct",
    "rdpo_one_sided": "--loss rdpo --condition one_sided",
    "simpo_sep": "--loss simpo --condition averaged --bridge sep",
    "simpo_turn": "--loss simpo --condition averaged --bridge turn",
    "sft": f"--loss sft {START} --data assets/world/sft.jsonl",
    "reward": f"--loss reward {START} --data assets/world/pairs.jsonl",
}

ASK = "--model assets/start --max_new_tokens 24 --temperature 0.7 --seed 3 --name ours"
TEST = "--data assets/world/test.jsonl"
MODES = ("plain", "instruct", "refine")
GENERATE = {mode: f"{TEST} --limit 6 --mode {mode}" for mode in MODES}
GENERATE |= {f"{mode}_greedy": f"{GENERATE[mode]} --temperature 0" for mode in MODES} | {
    "alpaca_eval": "--data {given}/questions.jsonl --format alpaca_eval",
    "arena_hard": "--data {given}/questions.jsonl --format arena_hard",
    "mt_bench": "--data {given}/turns.jsonl --format mt_bench",
    "prompt": "--prompt 'What do bees make?'",
}

PLAIN, REFINE = "{work}/generate_plain.json", "{work}/generate_refine.json"
MODELS = "--model assets/start-single --ref assets/start"
JUDGE = "judge --model the-judge --endpoint {judge}"
TURNS = "--questions {given}/turns.jsonl --answers {work}/generate_mt_bench.json"
EVALUATE = {
    "reward": f"reward --model assets/reward --answers {PLAIN} --against {REFINE}",
    "reward_pairs": "reward --model assets/reward --pairs assets/world/test.jsonl --limit 60",
    "pairs": f"pairs --loss ins_dpo {MODELS} {TEST} --limit 60",
    "pairs_simpo": f"pairs --loss simpo --model assets/start {TEST} --limit 60",
    "world": "world --model assets/start-single --shown turn",
    "alpaca": "alpaca --annotations {given}/annotations.jsonl --difficulty {given}/difficulty.csv "
    "--gamed {given}/gamed.csv --resamples 50 --max_missing 0.2",
    "arena": "arena --judgments {given}/games.jsonl --answers {given}/styles.jsonl --baseline base "
    "--control both --resamples 50",
    "compare": "compare --a {given}/seed*.json --b {given}/other.json --max_missing 0.2",
    "report": f"report --results {{work}}/evaluate_reward.json,{{given}}/other.json "
    f"--answers {PLAIN},{REFINE} --run {{given}}",
    "context": f"context --model assets/start {TEST} --limit 40",
    "next_token": f"next_token --model assets/start {TEST} --limit 4",
    "attention": f"attention {MODELS} {TEST} --limit 4",
    "judge": f"judge --model assets/start --max_new_tokens 4 --answers {PLAIN} --against {REFINE}",
    "judge_alpaca_eval": f"{JUDGE} --answers {PLAIN} --against {REFINE}",
    "judge_arena_hard": f"{JUDGE} --answers {PLAIN} --against {REFINE} --format arena_hard",
    "judge_mt_bench": f"{JUDGE} {TURNS} --format mt_bench",
    "judge_mt_bench_pair": f"{JUDGE} {TURNS} --against {{given}}/theirs.jsonl "
    "--format mt_bench_pair",
    "mtbench": "mtbench --judgments {work}/evaluate_judge_mt_bench.json,"
    "{work}/evaluate_judge_mt_bench_pair.json --max_missing 0.9",
    "runs": "runs {given}",
    "describe": "describe --data assets/world/pairs.jsonl --model assets/start --limit 200",
    "plan": "plan --model bench/shapes/llama-3.2-1b",
}
MOVED = {"describe": "data.py describe", "plan": "train.py --plan"}  # what evaluate.py took over
SUFFIX = {"evaluate_report": ".html", "evaluate_runs": ".png"}  # of what is written; else .json


def commands(root):
    """{name: words of the command line}, in the order in which they are run."""
    words = [sys.executable, "evaluate.py", "--help"]
    known = subprocess.run(words, cwd=root, capture_output=True, text=True).stdout
    lines = {f"train_{name}": f"train.py {STEPS} {flags}" for name, flags in TRAIN.items()}
    launcher = "-m torch.distributed.run --standalone --nproc-per-node=2"
    lines["train_two_processes"] = f"{launcher} {lines['train_two_processes']}"
    lines |= {f"generate_{name}": f"generate.py {ASK} {flags}" for name, flags in GENERATE.items()}
    for name, flags in EVALUATE.items():
        moved = name in MOVED and not re.search(rf"\b{name}\b", known)
        flags = flags.replace(name, MOVED[name], 1) if moved else f"evaluate.py {flags}"
        lines[f"evaluate_{name}"] = flags
    lines = {name: f"{line} --out {{out}}" for name, line in lines.items()}
    lines["evaluate_plan"] = lines["evaluate_plan"].removesuffix(" --out {out}")
    return {name: [sys.executable, *shlex.split(line)] for name, line in lines.items()}


def with_needed(names, todo):
    """These runs, and those whose files they read."""
    wanted = set(names)
    for name in reversed(todo):
        if name in wanted:
            wanted |= set(re.findall(r"\{work\}/(\w+)", " ".join(todo[name])))
            wanted |= {"train_ins_dpo"} if name == "train_resumed" else set()
    return wanted


# ----------------------------------------------------------------------------- what it is given


def write_inputs(given):
    """Small fixed files in the forms that the commands read, the same ones each time."""
    asked = ["What do bees make?", "Who wrote Hamlet?", "When do owls hunt?", "Which animal barks?"]
    questions = [{"uid": f"{n:016x}", "category": "facts", "dataset": "world", "prompt": question}
                 for n, question in enumerate(asked)]  # fmt: skip
    turns = [{"question_id": 81 + 10 * n, "category": "facts", "turns": [question, "And why?"],
              "reference": ["Honey.", "They do."]} for n, question in enumerate(asked)]  # fmt: skip
    theirs = [{"question_id": 81 + 10 * n, "model_id": "theirs",
               "choices": [{"index": 0, "turns": [f"one {n}", f"two {n}"]}]}
              for n in range(len(asked))]  # fmt: skip
    metrics = [{"step": n, "loss": 0.7 - n / 100, "grad_norm": 1.5, "pairs": 8, "seconds": 0.25}
               for n in range(1, 5)]  # fmt: skip
    metrics += [{"step": 4, "eval_loss": 0.6, "eval_accuracy": 0.7, "eval_plain_margin": 0.03}]
    rows = {"questions": questions, "turns": turns, "theirs": theirs, "metrics": metrics}
    for name, content in (rows | verdicts()).items():
        write(given / f"{name}.jsonl", content)
    lines = ["index,instruction_difficulty", *(f"{n},{n * 7 % 11 / 4 - 1}" for n in range(40))]
    (given / "difficulty.csv").write_text("\n".join(lines) + "\n")
    lines = ["model,index,preference_minus_1,len_model,len_baseline"]
    lines += [f"concise,{n},{n * 3 % 4 / 4},{9 + n * 5 % 13},{40 + n}" for n in range(40)]
    (given / "gamed.csv").write_text("\n".join(lines) + "\n")
    for name, shift in (("seed1", 0.25), ("seed2", 0.4), ("other", 0)):
        values = {f"q{n}": n * 7 % 10 / 8 + shift * (n % 3) for n in range(20)} | {"q20": None}
        content = {"n": 20, "score": [0.5, 0.4, 0.6], "values": values}
        write(given / f"{name}.json", [{"command": "arena", "models": {"m": content}}])


def verdicts():
    """{name: rows} of verdicts as AlpacaEval and Arena-Hard keep them; some are none."""
    lengths = [(30 + 17 * n % 41, 20 + 29 * n % 67) for n in range(40)]
    annotations = [
        {"output_1": "x" * a, "generator_2": "ours", "output_2": "y" * b,
         "preference": {8: None, 4: 0, 3: 1.25}.get(n % 9, 1 + (b > a + 7 * n % 31))}
        for n, (a, b) in enumerate(lengths)
    ]  # fmt: skip
    labels = ["A>B", "B>A", "B>>A", "A=B", "A>>B"]
    games = [
        {"uid": f"q{q}", "model": model,
         "games": [{"score": labels[(q * 3 + len(model) + k * 2) % 5]} for k in range(2)]}
        for model in ("good", "bad") for q in range(12)
    ]  # fmt: skip
    styles = [
        {"uid": f"q{q}", "model": model, "metadata": {
            "token_len": 50 + 37 * (q + 5 * m) % 90, "header_count": {"h1": q * m % 3},
            "list_count": {"ordered": q % 4}, "bold_count": {"**": (q + m) % 5}}}
        for m, model in enumerate(("base", "good", "bad")) for q in range(12)
    ]  # fmt: skip
    return {"annotations": annotations, "games": games, "styles": styles}


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Judge(BaseHTTPRequestHandler):
    """An OpenAI-compatible server whose verdict and grade are told by what it is asked."""

    VERDICTS = ("A>>B", "A>B", "A=B", "B>A", "B>>A", "none")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        told = hashlib.sha256(json.dumps(body["messages"]).encode()).digest()
        text = f"Rating: [[{1 + told[0] % 10}]]\n[[{self.VERDICTS[told[1] % 6]}]]"
        message = {"role": "assistant", "content": text}
        reply = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                 "usage": {"prompt_tokens": 7, "completion_tokens": 3}}  # fmt: skip
        payload = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args):
        pass


# ----------------------------------------------------------------------------- running


def environment(work):
    """One thread, no GPU, no network; caches in the work folder, so that nothing old is used."""
    ours = ("NANOPO_", "TORCHINDUCTOR_", "OPENAI_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    env |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return env | {"NANOPO_CACHE": f"{work}/cache", "TMPDIR": f"{work}/tmp"}


def run_all(root, only):
    """{name: what is kept of the run} of all runs, or of some and those that they need."""
    todo = commands(root)
    if unknown := set(only) - set(todo):
        raise SystemExit(f"--only {', '.join(sorted(unknown))}: unknown; runs: {', '.join(todo)}")
    wanted, found = with_needed(only or todo, todo), {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="frozen-") as folder:
        work = Path(folder).resolve()
        places = {"work": work, "given": work / "given", "root": root}
        places["judge"] = f"http://127.0.0.1:{server.server_address[1]}/v1"
        for place in ("given", "tmp"):
            (work / place).mkdir()
        write_inputs(work / "given")
        for name in filter(wanted.__contains__, todo):
            start = time.monotonic()
            found[name] = run(name, todo[name], places)
            seconds = time.monotonic() - start
            print(f"ran {name} in {seconds:.1f} s {found[name].get('failed', '')}", flush=True)
    return found


def run(name, words, places):
    """Run one command -> what is kept of it; {"failed": why} or {"skipped": why} otherwise."""
    root, work = places["root"], places["work"]
    out = work / name if name.startswith("train") else work / (name + SUFFIX.get(name, ".json"))
    if name == "train_compiled" and not shutil.which(os.environ.get("CXX", "g++")):
        return {"skipped": "no C++ compiler"}
    if name == "train_resumed" and (work / "train_ins_dpo").exists():
        stop_at_half(work / "train_ins_dpo", out)
    words = [word.format(out=out, **places) for word in words]
    try:
        done = subprocess.run(words, cwd=root, env=environment(work), text=True,
                              capture_output=True, timeout=900)  # fmt: skip
        if done.returncode:
            return {"failed": f"exit status {done.returncode}: {done.stderr.strip()[-300:]}"}
        files = sorted(work.glob(f"{name}.*"))
        kept = trained(out) if out.is_dir() else {file.name: read(file) for file in files}
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    said = re.sub(r" {2,}", "  ", done.stdout)  # the width of a table is that of a path in it
    kept["said"] = re.sub(r"[\d.]+ MB", "N MB", said).splitlines()  # a page's size
    return tidy(kept, {str(work): "WORK", str(root): "ROOT"})


def stop_at_half(whole, out):
    """A copy of a finished run as it was when it had saved step 3, of 6."""
    shutil.copytree(whole, out)
    for left in ("final", "best", "checkpoints/step-6"):
        shutil.rmtree(out / left, ignore_errors=True)


# ----------------------------------------------------------------------------- what is kept


def trained(out):
    """Metrics, exported config and digests of weights, rounded for export and as trained."""
    return {
        "metrics": read(out / "metrics.jsonl"),
        "weights": digest([out / "final" / "model.safetensors"], named=True),
        "state": digest(sorted(out.glob("checkpoints/step-6/*.safetensors")), named=False),
        "config": read(out / "final" / "config.json"),
    }


def digest(files, named):
    """One sha256 of all tensors; without names it does not matter what a checkpoint calls them."""
    tensors = []
    for file in files:
        for name, tensor in deserialize(file.read_bytes()):
            content = hashlib.sha256(bytes(tensor["data"])).hexdigest()
            tensors.append([name if named else "", tensor["dtype"], tensor["shape"], content])
    return hashlib.sha256(json.dumps(sorted(tensors)).encode()).hexdigest()


def read(file):
    """A result file's rows or object; the cells of a page's tables; None of pictures and caches."""
    if file.suffix == ".png" or file.name.endswith(".cache.jsonl"):
        return None
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".html":
        return re.findall(r"<t[dh]\b[^>]*>(.*?)</t[dh]>", text, re.DOTALL)
    try:
        return json.loads(text)
    except ValueError:  # rows
        return [json.loads(line) for line in text.split("\n") if line]


def tidy(value, paths):
    """Without times, memory, places, and the echo of all flags, which new flags would join."""
    if isinstance(value, dict):
        left_out = re.compile(r"(^|_)seconds$|_per_second$|^memory|^tstamp$|^settings$")
        return {tidy(k, paths): tidy(v, paths) for k, v in value.items() if not left_out.search(k)}
    if isinstance(value, list):
        return [tidy(entry, paths) for entry in value]
    if isinstance(value, str):
        for path, word in paths.items():
            value = value.replace(path, word)
    return value


# ----------------------------------------------------------------------------- comparing


def difference(was, now, place):
    """Where two contents first differ, as text, or None; numbers count with all their digits."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in was | now:
            if key not in was or key not in now:
                return f"{place}.{key} is {'new' if key in now else 'gone'}"
            if found := difference(was[key], now[key], f"{place}.{key}"):
                return found
    elif isinstance(was, list) and isinstance(now, list):
        for n, (a, b) in enumerate(zip(was, now, strict=False)):
            if found := difference(a, b, f"{place}[{n}]"):
                return found
        if len(was) != len(now):
            return f"{place}: {len(was)} entries before, {len(now)} now"
    elif repr(was) != repr(now):
        return f"{place}: {str(was)[:200]!r} before, {str(now)[:200]!r} now"
    return None


def compare(before, now):
    """Print one line per run; whether all are equal."""
    equal = True
    for name, found in now.items():
        was = before.get(name, {})
        fields = ["failed"] if "failed" in found else was | found
        faults = [difference(was.get(f, "-"), found.get(f, "-"), f) for f in fields]
        faults = [fault for fault in faults if fault]
        if "skipped" in was | found:
            print(f"{name}: skipped")
        else:
            equal = equal and not faults
            print(f"{name}: DIFFERENT: {'; '.join(faults)}" if faults else f"{name}: equal")
    return equal


def check_resumed(runs):
    """A run that was resumed must equal the same run in one piece; else it counts as failed."""
    if "train_resumed" in runs:
        parts = [{k: v for k, v in runs[name].items() if k != "said"}
                 for name in ("train_ins_dpo", "train_resumed")]  # fmt: skip
        if fault := difference(*parts, "against the run in one piece: "):
            runs["train_resumed"].setdefault("failed", fault)


def machine():
    """What bitwise values depend on: versions of the packages that compute, and the processor."""
    info, wanted = Path("/proc/cpuinfo"), r"^(?:cpu family|model|model name)\s*: (.*)$"
    found = re.findall(wanted, info.read_text(), re.MULTILINE)[:3] if info.exists() else []
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "tokenizers")}
    return versions | {"processor": " ".join(found) or platform.processor()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2])
    parser.add_argument("--only", default="", help="names of runs, with commas between")
    args = parser.parse_args()
    start = time.monotonic()
    now = run_all(args.root.resolve(), list(filter(None, args.only.split(","))))
    check_resumed(now)
    seconds, cpu = time.monotonic() - start, sum(os.times()[2:4])  # of the children
    print(f"{len(now)} runs in {seconds:.0f} s, {cpu:.0f} s of processor time")
    if args.action == "record":
        if failed := [name for name, found in now.items() if "failed" in found]:
            raise SystemExit(f"nothing recorded: {', '.join(failed)} failed")
        content = {"machine": machine(), "runs": now}
        args.file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return
    before = json.loads(args.file.read_text())
    if before["machine"] != machine():
        print(f"recorded on {before['machine']}, this is {machine()}: last digits may differ")
    raise SystemExit(0 if compare(before["runs"], now) else 1)


if __name__ == "__main__":
    main()
