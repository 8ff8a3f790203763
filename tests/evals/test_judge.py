"""Judges see both orders, are read as the benchmarks read them, and are asked nothing twice."""

import json
import re

import pytest
from chat_server import ChatServer

import evaluate
import generate
from conftest import write_model
from evals import arena, mtbench
from evals.judge import Prompt
from evals.results import VERDICTS, read_grade, read_verdict
from hub import endpoint
from jobs.cli import UserError
from jobs.files import ASSETS

COMPARE, GRADE = ((ASSETS / "judge" / f"{name}.txt").read_text() for name in ("compare", "grade"))
PROMPTS = [f"question {i}?" for i in range(6)]


@pytest.fixture
def files(tmp_path):
    """Answers of two models: ours is good to questions 0 to 3, theirs to 3 to 5."""
    for name, good in (("ours", range(4)), ("theirs", range(3, 6))):
        rows = [
            {"prompt": p, "answer": f"{name} {'good' if i in good else 'bad'}", "model": name}
            for i, p in enumerate(PROMPTS)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


@pytest.fixture
def judge(files, monkeypatch, call):
    """judge(server, *flags) runs `evaluate.py judge` on them."""
    slow = endpoint.Endpoint
    quick = lambda *args: slow(*args, pause=0.01)  # noqa: E731
    monkeypatch.setattr(generate, "Endpoint", quick)

    def go(server, *flags):
        words = ["judge", "--model", "the-judge", "--out", files / "verdicts"]
        words += ["--answers", files / "ours.jsonl", "--retries", 3, "--timeout", 60]
        words += ["--endpoint", server.url] if server else []
        call(evaluate, *words, *flags)
        return files / "verdicts"

    go.files = files
    return go


@pytest.fixture
def evaluated(call, capsys):
    """evaluated(*words): what `evaluate.py WORDS` prints."""

    def go(*words):
        capsys.readouterr()
        call(evaluate, *words)
        return capsys.readouterr().out

    return go


def against(judge):
    return "--against", judge.files / "theirs.jsonl"


def parts(messages):
    """(question, answer of A, answer of B) of a default prompt."""
    return re.fullmatch(
        r"=== Request ===\n(.*)\n\n=== Answer of A ===\n(.*)\n\n=== Answer of B ===\n(.*)\n\n"
        r"=== End of B's answer ===\nWhich answer is better\?",
        messages[-1]["content"],
    ).groups()


def fair(messages, body):
    """A judge with taste: far better for good against bad, else a tie."""
    _, a, b = parts(messages)
    a, b = "good" in a, "good" in b
    return "Because.\n[[A=B]]" if a == b else "Clear.\n[[A>>B]]" if a else "Clear.\n[[B>>A]]"


def rows(file):
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


# ----------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    "text, label",
    [
        ("[[A>>B]]", "A>>B"),
        ("first [[A>B]], no: [[B>A]]", "B>A"),  # the last counts
        ("[[a=b]]", "A=B"),
        ("[[B=A]]", "A=B"),
        ("[[A<B]]", "B>A"),
        ("[[B<<A]]", "A>>B"),
        ("[[A<<B]]", "B>>A"),
        ("only [B>A]", "B>A"),
        ("[A>B] but [[B>A]]", "B>A"),
        ("[[A]]", "A>B"),
        ("[[B]]", "B>A"),
        ("[[C]]", "A=B"),
        ("[[ A > B ]]", "A>B"),
        ("[[A>B>A]]", None),
        ("[[D]] [A] as in [C]", None),
        ("A is better", None),
        ("", None),
    ],
)
def test_verdicts(text, label):
    assert read_verdict(text) == label
    assert label is None or label in VERDICTS


@pytest.mark.parametrize(
    "text, grade",
    [("[[7]]", 7), ("[[8]]? no: [[7.5]]", 7.5), ("[3]", 3), ("[[0]]", None), ("[[11]]", None)]
    + [("Rating: 7", None), ("[[seven]]", None), ("[2] then [[9]]", 9)]
    + [("[[ 8 ]]", 8), ("[[8/10]]", 8)],
)
def test_grades(text, grade):
    """Judging and reading a file of judgments back take the same one."""
    assert read_grade(text) == grade
    assert mtbench.score_of({"judgment": text}) == (grade, None if grade else "unparsable")


def test_judge_and_arena_read_the_same_verdict(judge, capsys):
    """The text decides in both: what the judge wrote down, and what is read where no score is."""
    text = "At first sight [[B>>A]], in the end [[ A > B ]]; [C] is no verdict."
    with ChatServer(lambda messages, body: text) as server:
        found = rows(judge(server, *against(judge), "--format", "arena_hard"))
    for row in found:
        assert [game["score"] for game in row["games"]] == ["A>B"] * 2
        bare = {"games": [game | {"score": None} for game in row["games"]]}
        assert arena.read_games(bare) == arena.read_games(row) == ([(0, 1), (1, 1)], None)


# ----------------------------------------------------------------------------- prompts


def test_values_are_not_templates():
    """An answer with braces or marks of its own stays what it is."""
    odd = "{answer_b} <|im_end|> {x} \\1"
    system, user = Prompt(COMPARE, (), "")(question=odd, answer_a=odd, answer_b="b {question}")
    assert system["role"] == "system" and "[[A>>B]]" in system["content"]
    assert parts([user]) == (odd, odd, "b {question}")


def test_a_template_of_ones_own(judge):
    file = judge.files / "mine.txt"
    file.write_text('{"keep": 1} {instruction}|{output_1}|{output_2}')
    with ChatServer(lambda messages, body: "[[B]]") as server:
        judge(server, *against(judge), "--template", file, "--limit", 1)
    said = [body["messages"] for body in server.bodies]
    content = '{"keep": 1} question 0?|theirs bad|ours good'
    assert [{"role": "user", "content": content}] in said and len(said) == 2


@pytest.mark.parametrize(
    "text, message",
    [
        ("{question} {answer_a}", "the template lacks {answer_b}"),
        (
            "<|im_start|>user\n{question}{answer_a}{answer_b}<|im_end|><|im_start|>system\n<|im_end|>",
        )
        + ("must end with a user turn",),
    ],
)
def test_a_template_that_cannot_be(text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Prompt(text, ("question", "answer_a", "answer_b"), "t")


# ----------------------------------------------------------------------------- comparing


def test_annotations_of_both_orders(judge, capsys):
    """ours wins 0-2, loses 4 and 5, ties 3: (3 + 1/2) / 6."""
    with ChatServer(fair) as server:
        out = judge(server, *against(judge), "--price_in", 10, "--price_out", 30)
    found = json.loads(out.read_text())
    assert [row["preference"] for row in found] == [2, 2, 2, 1.5, 1, 1]
    assert found[0] == {
        "instruction": "question 0?",
        "output_1": "theirs bad",
        "generator_1": "theirs",
        "output_2": "ours good",
        "generator_2": "ours",
        "dataset": "",
        "annotator": "the-judge",
        "preference": 2.0,
        "raw_completion": ["Clear.\n[[B>>A]]", "Clear.\n[[A>>B]]"],
    }
    orders = {parts(body["messages"]) for body in server.bodies}
    assert {("question 0?", "theirs bad", "ours good")} < orders and len(orders) == 12
    assert {("question 0?", "ours good", "theirs bad")} < orders
    assert {body["temperature"] for body in server.bodies} == {0.0}
    said = capsys.readouterr().out
    assert "win rate 58.3% [" in said and "both orders agree on 100.0%" in said
    # 12 judgments of 7 tokens in and 3 out: 84 * 10 + 36 * 30 millionths
    assert "tokens: 84 in, 36 out; cost $0.0019" in said


def test_arena_hard_games(judge):
    with ChatServer(fair) as server:
        found = rows(judge(server, *against(judge), "--format", "arena_hard", "--name", "new"))
    first = found[0]
    assert list(first) == ["uid", "category", "judge", "model", "baseline", "games"]
    assert (first["model"], first["baseline"], first["judge"]) == ("new", "theirs", "the-judge")
    # in game 1 the baseline is A, in game 2 the model: what show_result.py counts on
    assert [game["score"] for game in first["games"]] == ["B>>A", "A>>B"]
    assert parts(first["games"][0]["prompt"]) == ("question 0?", "theirs bad", "ours good")
    assert first["games"][0]["judgment"] == {"answer": "Clear.\n[[B>>A]]"}
    assert [game["score"] for game in found[4]["games"]] == ["A>>B", "B>>A"]
    assert len({row["uid"] for row in found}) == 6


def test_a_judge_that_always_likes_the_last_is_seen_through(judge, capsys):
    with ChatServer(lambda messages, body: "[[B>A]]") as server:
        out = judge(server, *against(judge))
    assert {row["preference"] for row in json.loads(out.read_text())} == {1.5}
    said = capsys.readouterr().out
    assert "both orders agree on 0.0%; the answer shown last won 100.0%" in said


def test_an_unread_or_refused_verdict_is_no_tie(judge, capsys):
    with ChatServer(trouble=["ok", 400], reply=lambda messages, body: "[[A>B]]") as server:
        out = judge(server, *against(judge), "--concurrency", 1, "--limit", 2)
    assert [row["preference"] for row in json.loads(out.read_text())] == [None, 1.5]
    said = capsys.readouterr().out
    assert "2 questions, 1 unread" in said and "1 failed" in said
    assert "judgment 2 failed: HTTP 400" in said and "the same command asks again" in said
    with ChatServer(lambda messages, body: "who knows") as server:  # the refused one is asked again
        found = rows(judge(server, *against(judge), "--limit", 2, "--format", "arena_hard"))
    assert len(server.bodies) == 1
    assert [game["score"] for game in found[0]["games"]] == ["A>B", None]


def test_nothing_is_asked_twice(judge, capsys):
    with ChatServer(fair) as server:
        out = judge(server, *against(judge), "--limit", 4)
        assert len(server.bodies) == 8
        judge(server, *against(judge))
        assert len(server.bodies) == 12
        whole = out.read_text()
        judge(server, *against(judge), "--price_in", 1)
        assert len(server.bodies) == 12 and out.read_text() == whole
        assert "0 replies now" in capsys.readouterr().out.splitlines()[-2]
        judge(server, *against(judge), "--temperature", 0.5)  # another judge, in effect
        assert len(server.bodies) == 24


def test_a_dying_judge_is_taken_up_again(judge, capsys):
    with ChatServer(fair, ["ok"] * 5 + ["die"]) as server, pytest.raises(SystemExit):
        judge(server, *against(judge), "--concurrency", 2)
    assert "gave up" in capsys.readouterr().err
    cache = judge.files / "verdicts.cache.jsonl"
    assert len(rows(cache)) == 5 and not (judge.files / "verdicts").exists()
    with open(cache, "ab") as f:
        f.write(b'{"key": "to')
    with ChatServer(fair) as server:
        out = judge(server, *against(judge))
    assert len(server.bodies) == 7
    assert [row["preference"] for row in json.loads(out.read_text())] == [2, 2, 2, 1.5, 1, 1]


def test_against_the_chosen_answers(judge):
    pairs = judge.files / "pairs.jsonl"
    made = [{"prompt": p, "chosen": "a good one", "rejected": "x"} for p in PROMPTS[::-1]]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in made))
    with ChatServer(fair) as server:
        found = json.loads(judge(server, "--against", pairs).read_text())
    assert {row["generator_1"] for row in found} == {"chosen"}
    assert [row["preference"] for row in found] == [1.5] * 4 + [1, 1]


def test_a_missing_or_doubled_answer_is_named(judge, capsys):
    file = judge.files / "theirs.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    for kept, message in (
        (lines[:4], "ours.jsonl:5, and so of 2 of 6; answer them"),
        (lines + lines[:1], "theirs.jsonl:7: same prompt as"),
    ):
        file.write_text("".join(kept))
        with pytest.raises(SystemExit):
            judge(None, *against(judge))
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--against is missing"),
        (["--format", "mt_bench", "--against", "x"], "grades single answers"),
        (["--against", "nowhere.jsonl"], "--against nowhere.jsonl: no such file"),
        (["--against", "theirs", "--template", "nowhere"], "--template nowhere: not readable"),
    ],
)
def test_flags_that_make_no_sense(judge, capsys, flags, message):
    with pytest.raises(SystemExit):
        judge(None, *[judge.files / "theirs.jsonl" if f == "theirs" else f for f in flags])
    assert message in capsys.readouterr().err


# ----------------------------------------------------------------------------- grading


def test_grades_of_both_turns(judge):
    """The second is graded behind the first, against the reference of its own turn."""
    answers, questions = judge.files / "mt.jsonl", judge.files / "question.jsonl"
    question = {"question_id": 81, "turns": ["one?", "two?"], "category": "math"}
    questions.write_text(json.dumps(question | {"reference": ["r1", "r2"]}) + "\n")
    choices = [{"index": 0, "turns": ["first", "second"]}]
    answers.write_text(json.dumps({"question_id": 81, "model_id": "m", "choices": choices}) + "\n")
    with ChatServer(lambda messages, body: "So so. [[6]]") as server:
        flags = ["--answers", answers, "--format", "mt_bench", "--questions", questions]
        found = rows(judge(server, *flags))
    keys = ["question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"]
    assert [list(row) for row in found] == [keys] * 2
    assert [(r["question_id"], r["model"], r["score"], r["turn"]) for r in found] == [
        (81, "m", 6, 1),
        (81, "m", 6, 2),
    ]
    first, second = (row["user_prompt"] for row in found)
    for text, values in (
        (first, ("one?", "first", "r1")),
        (second, ("\n\nHuman: one?\n\nAssistant: first\n\nHuman: two?", "second", "r2")),
    ):
        names = ("question", "answer", "reference")
        filled = Prompt(GRADE, (), "")(**dict(zip(names, values, strict=True)))
        assert text == filled[-1]["content"]


def test_pairs_of_both_turns(judge, evaluated):
    """The new model is liked for "good": it wins turn 1 whatever its place, the base turn 2 of 82;
    turn 2 of 81 goes to the one shown last, a tie. As FastChat shows them: (1 + 1 + .5 + 0) / 4."""
    questions = [{"question_id": q, "turns": ["one?", "two?"]} for q in (81, 82)]
    said = {"new": [["good", "hm"], ["good", "hm"]], "base": [["ah", "oh"], ["ah", "good"]]}
    files = {name: judge.files / f"{name}.jsonl" for name in ("questions", *said)}
    files["questions"].write_text("".join(json.dumps(q) + "\n" for q in questions))
    for name, dialogues in said.items():
        found = [{"question_id": q, "model_id": name, "choices": [{"index": 0, "turns": turns}]}
                 for q, turns in zip((81, 82), dialogues, strict=True)]  # fmt: skip
        files[name].write_text("".join(json.dumps(row) + "\n" for row in found))

    def liked(messages, body):
        last = [text.split("\n\n===")[0].split()[-1]
                for text in messages[-1]["content"].split("===\n")[2:4]]  # fmt: skip
        return "[[A]]" if last[0] == "good" else "[[B]]"

    with ChatServer(liked) as server:
        flags = ["--answers", files["new"], "--against", files["base"], "--format"]
        flags += ["mt_bench_pair", "--questions", files["questions"]]
        found = rows(judge(server, *flags))
    assert [(r["question_id"], r["turn"], r["g1_winner"], r["g2_winner"]) for r in found] == [
        (81, 1, "model_2", "model_2"), (81, 2, "model_2", "model_1"),
        (82, 1, "model_2", "model_2"), (82, 2, "model_1", "model_1"),
    ]  # fmt: skip
    assert [(r["model_1"], r["model_2"]) for r in found] == [("base", "new")] * 4
    asked = found[1]["g1_user_prompt"]
    assert "Human: one?\n\nHuman: two?" in asked
    assert "Assistant: ah\n\nHuman: two?\n\nAssistant: oh" in asked
    assert "Assistant: good\n\nHuman: two?\n\nAssistant: hm" in asked
    file = judge.files / "verdicts"
    told = evaluated("mtbench", "--judgments", file, "--resamples", 20)
    assert re.search(r"new against base +4 +0\.62 .* 1\.00 .* 0\.25", told)
    assert re.search(r"base against new +4 +0\.38 ", told)


@pytest.mark.parametrize("bad", [("", "length"), ("", "stop"), ("[[A>B]] since", "length")])
def test_a_reply_that_is_empty_or_cut_is_no_verdict_and_asked_again(judge, capsys, bad):
    """As where hidden reasoning takes all the tokens. One of four, then all of them."""
    replies = [bad, "[[A>B]]", "[[B>A]]", "[[A>B]]"]
    with ChatServer(lambda messages, body: replies.pop(0)) as server:
        flags = [*against(judge), "--limit", 2, "--concurrency", 1]
        out = judge(server, *flags)
        assert [row["preference"] for row in json.loads(out.read_text())] == [None, 2.0]
        fault = "cut at --max_new_tokens" if bad[1] == "length" else "empty"
        said = capsys.readouterr().out
        assert f"judgment 1 failed: its reply is {fault}" in said and "1 failed" in said
        assert len(rows(judge.files / "verdicts.cache.jsonl")) == 3
        replies += ["[[B>A]]"]
        assert json.loads(judge(server, *flags).read_text())[0]["preference"] == 2.0
        out.unlink()
        replies += [bad] * 4
        with pytest.raises(SystemExit) as stop:
            judge(server, *flags, "--temperature", 0.5)
    said = capsys.readouterr().err
    assert stop.value.code and f"no judgment came; number 1: its reply is {fault}" in said
    assert not out.exists()


def test_an_empty_reply_that_was_kept_before_is_asked_again(judge):
    with ChatServer(fair) as server:
        judge(server, *against(judge), "--limit", 1)
        cache = judge.files / "verdicts.cache.jsonl"
        cache.write_text("".join(json.dumps(row | {"text": " "}) + "\n" for row in rows(cache)))
        judge(server, *against(judge), "--limit", 1)
    assert len(server.bodies) == 4


def test_where_every_request_is_refused_the_exit_status_says_so(judge, capsys):
    with ChatServer(trouble=[400] * 12) as server, pytest.raises(SystemExit) as stop:
        judge(server, *against(judge))
    assert stop.value.code and "number 1: HTTP 400: " in capsys.readouterr().err
    assert not (judge.files / "verdicts").exists()


def test_a_local_judge(judge, tmp_path, capsys, monkeypatch):
    """A random model has no verdicts to give, but is asked, counted and remembered."""
    model = write_model(tmp_path / "judge")
    flags = ["--model", model, "--max_new_tokens", 4, "--limit", 2, *against(judge)]
    with pytest.raises(SystemExit):
        judge(None, *flags)
    assert "number 1: its reply is cut at --max_new_tokens" in capsys.readouterr().err
    take = generate.Sequence.take  # as if the fourth token were its last by itself
    enough = lambda seq, *drawn: take(seq, *drawn) and not setattr(seq, "finished", True)  # noqa: E731
    monkeypatch.setattr(generate.Sequence, "take", enough)
    found = json.loads(judge(None, *flags).read_text())
    assert [row["preference"] for row in found] == [None, None]
    said = capsys.readouterr().out
    asked = json.loads((judge.files / "verdicts.cache.jsonl").read_text().splitlines()[0])
    assert asked["tokens"][0] > 800 and "2 questions, 2 unread" in said and "4 replies now" in said
    judge(None, *flags)
    assert "0 replies now" in capsys.readouterr().out


# ----------------------------------------------------------------------------- read back


def test_the_leaderboards_read_what_the_judge_wrote(judge, evaluated):
    """Ours wins questions 0 to 2, ties 3, loses 4 and 5: 58.3% with a tie as half; Arena-Hard's
    strong verdicts weigh three times a tie, so (3 * 3 + 0.5) / (5 * 3 + 1) = 59.4%."""
    with ChatServer(fair) as server:
        file = judge(server, *against(judge))
        arena = judge.files / "arena.jsonl"
        judge(server, *against(judge), "--format", "arena_hard", "--out", arena)
    json_file = judge.files / "annotations.json"
    json_file.write_bytes(file.read_bytes())
    hub = ("--difficulty", "none", "--gamed", "none", "--resamples", 0)
    assert "58.3" in evaluated("alpaca", "--annotations", json_file, *hub)
    told = evaluated("arena", "--judgments", arena, "--resamples", 20)
    assert "59.4" in told and "ours" in told
