"""Benchmark files hold exactly what the benchmarks' own tools read and write."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from chat_server import ChatServer
from runs import _start

import generate
from conftest import write_model
from evals.answers import read_answers
from generate import Ask, read_asks
from hub.benchmarks import markdown_counts, token_counter, transcript
from jobs.cli import UserError
from jobs.files import read_lines
from pairs.messages import as_messages

ROOT = Path(__file__).parents[2]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


QUESTIONS = {
    "alpaca_eval": [
        {"instruction": f"Say {i}.", "output": "old", "generator": "x", "dataset": "helpful_base"}
        for i in range(5)
    ],
    "arena_hard": [
        {"uid": f"{i:016x}", "category": "hard_prompt", "subcategory": "c", "prompt": f"Say {i}."}
        for i in range(5)
    ],
    "mt_bench": [
        {
            "question_id": 81 + i,
            "category": "writing",
            "turns": [f"Say {i}.", "Again, please."],
            "reference": [f"{i}", f"{i} {i}"],
        }
        for i in range(5)
    ],
}


def write(file, rows):
    if file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def answer(directory, tmp_path, call):
    """answer(form, *flags): generate.py asks the questions of a benchmark in its format."""

    def go(form, *flags):
        suffix = "json" if form == "alpaca_eval" else "jsonl"
        data = write(tmp_path / f"{form}_questions.{suffix}", QUESTIONS[form])
        out = tmp_path / f"{form}.{suffix}"
        words = ["--model", directory, "--data", data, "--format", form, "--out", out]
        call(generate, *words, "--max_new_tokens", 6, "--name", "ours", *flags)
        return out

    return go


def load(file):
    if file.suffix == ".json":
        return json.loads(file.read_text())
    return [json.loads(line) for line in read_lines(file)]


# ----------------------------------------------------------------------------- formats


@pytest.mark.parametrize("mode", generate.MODES)
def test_alpaca_eval(answer, mode):
    out = answer("alpaca_eval", "--mode", mode, "--seed", 3)
    rows, native = load(out), load(Path(f"{out}.rows.jsonl"))
    assert [row["instruction"] for row in rows] == [f"Say {i}." for i in range(5)]
    for row, its in zip(rows, native, strict=True):
        expected = {"instruction": its["prompt"][0]["content"], "output": its["answer"]}
        expected |= {"generator": "ours", "dataset": "helpful_base", "datasplit": "eval"}
        assert row == expected
        assert its["seed"] == 3 and its["mode"] == mode and its["temperature"] == 0.7


def test_arena_hard(answer, monkeypatch):
    monkeypatch.setattr(generate, "token_counter", lambda model: len)
    rows = load(answer("arena_hard"))
    for i, row in enumerate(rows):
        keys = ["uid", "ans_id", "model", "messages", "tstamp", "metadata"]
        assert list(row) == keys  # as gen_answer.py writes them
        assert row["uid"] == f"{i:016x}" and row["model"] == "ours" and len(row["ans_id"]) == 22
        text = row["messages"][1]["content"]["answer"]
        assert row["messages"] == [
            user(f"Say {i}."),
            {"role": "assistant", "content": {"answer": text}},
        ]
        assert row["metadata"] == {"token_len": len(text)} | markdown_counts(text)
    assert len({row["ans_id"] for row in rows}) == 5


def test_mt_bench_sees_its_first_answer(directory, tmp_path, answer):
    """The second turn is asked behind the first answer, with random numbers of its own."""
    out = answer("mt_bench")
    rows, native = load(out), load(Path(f"{out}.rows.jsonl"))
    for i, (row, its) in enumerate(zip(rows, native, strict=True)):
        assert list(row) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
        assert row["question_id"] == 81 + i and row["model_id"] == "ours"
        first, second = row["choices"][0]["turns"]
        assert row["choices"][0]["index"] == 0
        assert its["prompt"] == [user(f"Say {i}."), assistant(first), user("Again, please.")]
        assert its["answer"] == second and its["turns"] == 2 and its["reference"][1] == f"{i} {i}"
        assert first != second
    model, template = generate.load_model(str(directory))
    sampling = generate.Sampling(6, 0.7, 0.95, generate.stop_ids(template))
    answers = generate.Answers(model, template, sampling)
    ((_, alone),) = answers([generate.Dialogue(Ask([user("Say 2.")]), 2)])
    assert alone["answer"] == rows[2]["choices"][0]["turns"][0]


def test_mt_bench_refined_at_each_turn(tmp_path, call):
    """By a server, which can tell what it was asked: both drafts are refined, and kept."""
    data = write(tmp_path / "q.jsonl", QUESTIONS["mt_bench"][:1])
    flags = ["--model", "m", "--data", data, "--format", "mt_bench", "--mode", "refine"]
    said = iter(["draft 1", "answer 1", "draft 2", "answer 2"])
    with ChatServer(lambda messages, body: next(said)) as server:
        flags += ["--endpoint", server.url, "--out", tmp_path / "out.jsonl"]
        call(generate, *flags)
    better, first = user("please generate a better response"), user("Say 0.")
    second = [first, assistant("answer 1"), user("Again, please.")]
    assert [body["messages"] for body in server.bodies] == [
        [first],
        [first, assistant("draft 1"), better],
        second,
        [*second, assistant("draft 2"), better],
    ]
    (row,), (native,) = load(tmp_path / "out.jsonl"), load(tmp_path / "out.jsonl.rows.jsonl")
    assert row["choices"][0]["turns"] == ["answer 1", "answer 2"]
    assert native["earlier_drafts"] == ["draft 1"] and native["draft"] == "draft 2"
    assert len({body["seed"] for body in server.bodies}) == 4


def test_questions_of_every_layout(tmp_path):
    rows = [
        {"question_id": "q", "turns": [{"content": "a?"}]},  # Arena-Hard v0.1
        {"prompt_id": 7, "prompt": ["a?", "b?"]},  # MT-Bench as it lies on the hub
        {"uid": "u", "prompt": "a?"},
    ]
    asks = read_asks(str(write(tmp_path / "q.jsonl", rows)))
    assert [ask.prompt for ask in asks] == [[user("a?")]] * 3
    assert [ask.turns for ask in asks] == [[], ["b?"], []]
    assert [ask.about for ask in asks] == [{"question_id": "q"}, {"prompt_id": 7}, {"uid": "u"}]


def test_twins_are_refused(answer, monkeypatch, capsys):
    monkeypatch.setitem(QUESTIONS, "arena_hard", QUESTIONS["arena_hard"][:1] * 2)
    with pytest.raises(SystemExit):
        answer("arena_hard")
    assert "questions 1 and 2 have the same id 0000000000000000" in capsys.readouterr().err


def test_a_dialogue_as_one_instruction_reads_back():
    messages = [user("a?"), assistant("b"), user("c?")]
    assert as_messages(transcript(messages), "here") == messages
    assert transcript([user("a?")]) == "a?"


def test_markdown_counts_by_hand():
    text = (
        "# One\n## Two\n### no#hash\n#no space\n1. first\n 22. second\n- a\n  * b\n+ c\n-d\n"
        "**bold** and __this__, **not\nthis**\n```py\n# comment\n- item\n**x**\n```\n"
    )
    counts = markdown_counts(text)
    assert counts["header_count"] == {"h1": 1, "h2": 1, "h3": 1, "h4": 0, "h5": 0, "h6": 0}
    assert counts["list_count"] == {"ordered": 2, "unordered": 3}
    assert counts["bold_count"] == {"**": 1, "__": 1}


def test_tokens_are_counted_by_the_own_tokenizer_where_need_be(directory, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert token_counter(str(directory))("bytes") == 5
    assert "not by gpt-4o's" in capsys.readouterr().err
    with pytest.raises(UserError, match="pip install tiktoken"):
        token_counter("gpt-9")


# ----------------------------------------------------------------------------- read back


@pytest.mark.parametrize("form", QUESTIONS)
def test_answer_files_read_back(answer, tmp_path, form, monkeypatch):
    monkeypatch.setattr(generate, "token_counter", lambda model: len)
    out = answer(form)
    questions = str(tmp_path / f"{form}_questions.jsonl") if form == "mt_bench" else None
    back = read_answers(str(out), "--answers", questions)
    native = read_answers(f"{out}.rows.jsonl", "--answers")
    assert [(a.prompt, a.text) for a in back] == [(a.prompt, a.text) for a in native]
    assert len(back) == (10 if form == "mt_bench" else 5)
    assert {a.name for a in back} == {"ours"}
    if form == "mt_bench":
        assert [a.about["turn"] for a in back] == [1, 2] * 5
        assert back[1].about["reference"] == ["0", "0 0"]


def test_the_chosen_answers_of_pairs(pairs_file):
    rows = read_answers(str(pairs_file), "--against")
    pair = json.loads(pairs_file.read_text().splitlines()[3])
    assert rows[3].prompt == [user(pair["prompt"])] and rows[3].text == pair["chosen"]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a?"}, "are no answer; expected a row of jsonl"),
        ({"instruction": "a?", "output": None}, "are no answer"),
        ({"question_id": 1, "model_id": "m", "choices": [{"turns": ["a"]}]}, "--questions FILE"),
        ({"prompt": "a?", "answer": "b", "turns": "c"}, "are no answer"),
        ([], "expected an object with named columns"),
    ],
)
def test_a_bad_answer_is_named(tmp_path, row, message):
    file = write(tmp_path / "bad.jsonl", [{"prompt": "a?", "answer": "b"}, row])
    with pytest.raises(UserError, match=f"bad.jsonl:2: .*{message}"):
        read_answers(str(file), "--answers")


# ----------------------------------------------------------------------------- parts


def test_two_processes_write_what_one_does(directory, tmp_path, answer):
    """torchrun, 2 processes; before it, one was killed amid its third row."""
    alone = answer("mt_bench", "--temperature", 0)
    whole, rows = load(alone), read_lines(f"{alone}.rows.jsonl")
    alone.unlink()
    Path(f"{alone}.rows.jsonl").unlink()
    indexed = [json.dumps({"index": i} | json.loads(rows[i])) for i in (3, 0)]
    Path(f"{alone}.rows.jsonl.part0").write_text("\n".join(indexed) + '\n{"index": 1, "pro')
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words += [str(ROOT / "generate.py"), *sys.argv[1:]]  # as the fixture has called it
    process = _start(words, stderr=subprocess.STDOUT)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    strip = [{k: v for k, v in row.items() if k != "tstamp"} for row in load(alone)]
    assert strip == [{k: v for k, v in row.items() if k != "tstamp"} for row in whole]
    assert read_lines(f"{alone}.rows.jsonl") == rows
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.parametrize(
    "flags, env, message",
    [
        (["--format", "mt_bench"], {}, "--out FILE is needed"),
        ([], {"WORLD_SIZE": "2"}, "--out FILE is needed"),
        (["--endpoint", "http://h", "--out", "x"], {"WORLD_SIZE": "2"}, "wants a single process"),
        (["--endpoint", "h:1"], {}, "--endpoint h:1: give the address"),
        (["--format", "alpaca_eval", "--out", "a.txt"], {}, "a.txt: alpaca_eval reads .json files"),
    ],
)
def test_flags_that_make_no_sense(monkeypatch, ended, pairs_file, flags, env, message):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    _, error, status = ended(generate, "--model", "m", "--data", pairs_file, *flags)
    assert status and message in error and error.count("\n") == 1
