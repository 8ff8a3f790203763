"""The modes ask as in training, and answers come as they were asked for."""

import json
import subprocess
import sys
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import tiny
from chat_templates import GEMMA
from dialogues import say

import data
import generate
from conftest import write_model
from data import BRIDGES, Bridge, Dataset, Limits
from generate import Answers, Ask, Dialogue, Sampling, Stream, complete, in_order, read_asks
from hub.template import Template
from jobs.cli import UserError
from losses import Path as LossPath
from losses import recipe
from model import load
from pairs.layouts import Pair

ROOT = Path(__file__).parent.parent
GREEDY = Sampling(max_new_tokens=20, temperature=0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(directory):
    return load(directory)


@pytest.fixture(scope="module")
def template(directory):
    return Template(directory)


# ----------------------------------------------------------------------------- the modes


PATHS = {"plain": LossPath(None, "chosen"), "instruct": LossPath("instruct", "chosen")}
PATHS["refine"] = LossPath("rejected", "chosen")
BRIDGED = BRIDGES | {"quoted": Bridge("Another answer:\n", "\nA better one:\n", ended=False)}


@pytest.mark.parametrize("mode, bridge", [("plain", "turn"), ("instruct", "turn"),
                                          *(("refine", bridge) for bridge in BRIDGED)])  # fmt: skip
def test_a_mode_asks_as_its_path_was_trained(template, mode, bridge, monkeypatch):
    """The prompt's ids are those that training puts before the scored answer."""
    monkeypatch.setattr(data, "BRIDGES", BRIDGED)
    condition = {"plain": "none", "instruct": "instruct", "refine": "cross"}[mode]
    rule = recipe("dpo", condition=condition, bridge=bridge)
    pair = Pair(say("Why?"), "Because.", "So what.", "here")
    dataset = Dataset([pair], template, rule, Limits(512, 0.4), "better")
    segments, _ = dataset.path(0, PATHS[mode])
    answers = Answers(None, template, GREEDY, bridge=bridge)
    seq = answers.sequence(Dialogue(Ask(pair.prompt, "So what."), 0, mode))
    assert seq.prompt == np.concatenate(segments[:-1]).tolist()


def answered(answers, asks, numbers=None, mode="plain"):
    """The rows of Asks in their order."""
    numbers = range(len(asks)) if numbers is None else numbers
    dialogues = [Dialogue(ask, n, mode) for ask, n in zip(asks, numbers, strict=True)]
    return list(in_order(answers(dialogues), numbers))


def test_refine_joins_its_own_draft(model, template, monkeypatch):
    """x, the draft's ids as they were sampled, the end of turn, the turn; draft as in plain."""
    seen = []
    spy = lambda *args: (seen.append(seq) or seq for seq in complete(*args))  # noqa: E731
    monkeypatch.setattr(generate, "complete", spy)
    sampling = Sampling(12, temperature=1.0)
    asks = [Ask(say("Why?")), Ask(say("What else is there to be said?"))]
    plain = answered(Answers(model, template, sampling, batch=1), asks)
    drafts = {tuple(seq.prompt): seq.answer for seq in seen}
    seen.clear()
    rows = answered(Answers(model, template, sampling, batch=2), asks, mode="refine")
    assert [row["draft"] for row in rows] == [row["answer"] for row in plain]
    turn = template.encode([template.turn("please generate a better response")])[0].tolist()
    joined = [[*x, *y, *template.end_ids, *turn] for x, y in drafts.items()]
    refined = [seq for seq in seen if seq.tag[0] == "answer"]
    assert sorted(joined) == sorted(seq.prompt for seq in refined)
    assert {seq.seed for seq in refined} == {(0, 0, 1, 0), (0, 1, 1, 0)}  # not the draft's


def test_refine_puts_its_own_draft_between_separators(model, template):
    answers = Answers(model, template, Sampling(12, temperature=1.0), bridge="sep", sep=" ### ")
    first = answers.sequence(dialogue := Dialogue(Ask(say("Why?")), 0, "refine"))
    (first,) = complete(model, deque([first]), answers.sampling)
    dialogue.take(template.decode(first.answer), True)
    told = template.decode(answers.sequence(dialogue, first).prompt, skip_special=False)
    asked = template.render(say("Why?"), generation=True)
    assert told == f"{asked} ### {dialogue.row['draft']} ### "


def test_rows_come_in_order(model, template):
    """Though the second of three ends first."""
    asks = [Ask(say(text)) for text in ("first", "second", "third")]
    sampling = Sampling(15, temperature=1.0, stop_ids=frozenset(range(0, 256, 20)))
    rows = answered(Answers(model, template, sampling, batch=2), asks, range(5, 8))
    assert [row["prompt"] for row in rows] == [ask.prompt for ask in asks]
    later = answered(Answers(model, template, sampling, batch=1), asks[1:], range(6, 8))
    assert later == rows[1:]


def test_a_stream_waits_for_whole_characters(template, capsys):
    stream, text = Stream(template), "é 🇫🇷, naïve"
    for token in template.encode([text])[0]:
        stream("answer", int(token))
    stream.close()
    assert capsys.readouterr().out == text + "\n"


# ----------------------------------------------------------------------------- prompts


def test_prompts_are_read_from_every_layout(tmp_path):
    hh = "\n\nHuman: a?\n\nAssistant: "
    rows = [
        {"prompt": "a?"},
        {"prompt": say("a?"), "draft": "a!"},
        {"instruction": "a?", "output": "old answer", "generator": "x"},
        {"prompt": "a?", "chosen": "b", "rejected": "c"},
        {"chosen": [*say("a?"), {"role": "assistant", "content": "b"}]},
        {"chosen": hh + "b", "rejected": hh + "c"},
        {"prompt": hh},
        {"prompt": hh, "chosen": "b", "rejected": "c"},
        {"prompt": "a?"},
    ]
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asks = read_asks(str(file))
    assert [ask.prompt for ask in asks] == [say("a?")] * len(rows)
    assert [ask.draft for ask in asks] == [None, "a!"] + [None] * 7
    assert len(read_asks(str(file), limit=3)) == 3


def test_a_question_is_read_with_all_that_its_row_holds(tmp_path):
    rows = [
        {"instruction": "Translate.", "input": "Katze", "system": "Be brief."},
        {"prompt": "Which?", "history": [["Can cats swim?", "Some do."]], "id": "a b"},
    ]
    file = tmp_path / "asks.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = (ask.prompt for ask in read_asks(str(file)))
    assert first == say("Translate.\nKatze", system="Be brief.")
    assert second == say("Can cats swim?", "Some do.", "Which?")
    file.write_text(json.dumps(rows[1] | {"context": "A text to look at."}) + "\n")
    with pytest.raises(UserError, match="column context"):
        read_asks(str(file))


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "a?"}, "expected prompt, instruction or chosen"),
        ({"prompt": [{"role": "assistant", "content": "hello"}]}, "end with a user turn"),
        ({"prompt": 7}, "expected text or messages"),
        (["a?"], "expected an object"),
    ],
)
def test_a_bad_prompt_is_named(tmp_path, row, message):
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps({"prompt": "fine"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"bad.jsonl:2: .*{message}"):
        read_asks(str(file))


# ----------------------------------------------------------------------------- the command


@pytest.fixture
def command(directory, tmp_path, call):
    """command(*flags) runs generate.py in this process."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"question {i}?"}) + "\n" for i in range(5)))

    def go(*flags):
        call(generate, "--model", directory, "--max_new_tokens", 8, *flags)

    go.data, go.out = file, tmp_path / "deep" / "answers.jsonl"
    return go


def read_rows(file):
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


@pytest.mark.parametrize("mode", generate.MODES)
def test_each_mode_runs(directory, command, mode):
    flags = ["--model", directory, "--data", command.data, "--max_new_tokens", 6, "--mode", mode]
    flags += ["--limit", 3, "--batch", 2, "--instruction", "another", "--out", command.out]
    script = [sys.executable, str(ROOT / "generate.py"), *map(str, flags)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = read_rows(command.out)
    assert [row["prompt"] for row in rows] == [say(f"question {i}?") for i in range(3)]
    expected = {"prompt", "answer", "finished", "model", "mode", "seed"}
    expected |= {"temperature", "top_p", "max_new_tokens"}
    expected |= {"plain": set(), "instruct": {"instruction"}, "refine": {"instruction", "draft"}}[
        mode
    ]
    assert all(set(row) == expected and row["mode"] == mode for row in rows)


def test_a_draft_of_the_users_own_is_refined(command, capsys):
    """--draft beside --prompt; in a file the column draft, or the answers of an earlier run."""
    refine = ["--out", command.out, "--mode", "refine"]
    command("--prompt", "Why?", "--draft", "So what.", *refine, "--bridge", "sep")
    (row,) = read_rows(command.out)
    assert row["draft"] == "So what." and row["answer"] and row["bridge"] == "sep"
    for words, fault in ((["--draft", "No."], "draft"), (["--draft", "So what."], "bridge")):
        with pytest.raises(SystemExit):
            command("--prompt", "Why?", *words, *refine, *["--bridge", "sep"] * (fault == "draft"))
        assert f"of another run ({fault} differs)" in capsys.readouterr().err
    command.out.unlink()
    rows = [{"prompt": "a?", "answer": "A."}, {"prompt": "b?", "answer": "B.", "draft": "b"}]
    rows = [*rows, {"prompt": "c?"}]
    command.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command("--data", command.data, *refine)
    found = [row["draft"] for row in read_rows(command.out)]
    assert found[:2] == ["A.", "b"] and len(found) == 3
    assert "2 of 3 drafts are the data's" in capsys.readouterr().err
    command.data.write_text(json.dumps({"prompt": "a?", "answer": 7}))
    with pytest.raises(SystemExit):
        command("--data", command.data, "--mode", "refine")
    assert "prompts.jsonl:1: its draft is 7; expected text" in capsys.readouterr().err
    command("--data", command.data)  # asked plainly, it is a column as any other


def test_a_file_is_continued(command):
    command("--data", command.data, "--out", command.out)
    whole = command.out.read_bytes()
    command("--data", command.data, "--out", command.out)  # complete: nothing to do
    assert command.out.read_bytes() == whole
    third = whole.find(b"\n", whole.find(b"\n") + 1) + 1
    command.out.write_bytes(whole[: third + 40])  # killed while the third row was written
    command("--data", command.data, "--out", command.out)
    assert command.out.read_bytes() == whole


@pytest.mark.parametrize("mode", ["plain", "refine"])
def test_several_answers_per_question(command, mode, capsys):
    """Each from numbers of its own, the first as if it were alone, and a cut file is continued."""
    flags = ["--data", command.data, "--limit", 2, "--temperature", 1, "--mode", mode]
    single, out = command.out.with_name("one.jsonl"), ["--out", command.out]
    command(*flags, "--out", single)
    command(*flags, "--n", 3, *out)
    rows, whole = read_rows(command.out), command.out.read_bytes()
    assert [row.pop("sample") for row in rows] == [0, 1, 2] * 2
    assert rows[::3] == read_rows(single)
    assert len({row["answer"] for row in rows}) == 6
    command.out.write_bytes(whole[: len(whole) // 2])
    command(*flags, "--n", 3, *out)
    assert command.out.read_bytes() == whole
    for n, message in (
        (1, "6 rows for 2 prompts"),
        (4, "jsonl:4: of another run (prompt differs)"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            command(*flags, "--n", n, *out)
        assert message in capsys.readouterr().err


def test_several_answers_to_one_prompt_are_printed_in_order(command, capfd):
    """Not streamed, or those of one batch would run into each other."""
    ask = ["--prompt", "Why?", "--temperature", 1, "--n", 3]
    command(*ask, "--out", command.out)
    capfd.readouterr()
    command(*ask)
    answers = [row["answer"] for row in read_rows(command.out)]
    assert capfd.readouterr().out == "".join(f"{answer}\n" for answer in answers)


def test_a_file_of_another_run_is_left_alone(command, capsys):
    command("--data", command.data, "--out", command.out)
    whole = command.out.read_bytes()
    for flags, message in (
        (["--seed", 1], "jsonl:1: of another run (seed differs)"),
        (["--mode", "instruct"], "jsonl:1: of another run (mode differs)"),
        (["--limit", 2], "5 rows for 2 prompts"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            command("--data", command.data, "--out", command.out, *flags)
        assert message in capsys.readouterr().err
        assert command.out.read_bytes() == whole
    command.data.write_text('{"prompt": "another question"}\n' * 5)
    with pytest.raises(SystemExit):
        command("--data", command.data, "--out", command.out)
    assert "prompt differs" in capsys.readouterr().err


def test_rows_go_to_standard_output(command, capfd):
    command("--data", command.data, "--limit", 2)
    rows = [json.loads(line) for line in capfd.readouterr().out.split("\n")[:-1]]
    assert [row["prompt"] for row in rows] == [say("question 0?"), say("question 1?")]


def test_a_single_prompt_streams_its_answer(command, capfd):
    """What is printed is what the same command writes as `answer`, and the draft goes aside."""
    ask = ["--prompt", "Why?", "--mode", "refine", "--temperature", 1, "--seed", 1]
    command(*ask, "--out", command.out)
    (row,) = read_rows(command.out)
    capfd.readouterr()
    command(*ask)
    printed = capfd.readouterr()
    whole = row["answer"].rstrip("\ufffd")  # a character that never became whole is not shown
    assert printed.out.rstrip("\n").startswith(whole) and len(whole) > 3
    assert row["draft"].rstrip("\ufffd") in printed.err and row["draft"][:3] != whole[:3]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt", "a", "--data", "b"], "either --prompt TEXT or --data FILE"),
        ([], "either --prompt TEXT or --data FILE"),
        (["--prompt", ""], "either --prompt TEXT or --data FILE"),
        (["--prompt", "a", "--bridge", "sep"], "--draft and --bridge are for --mode refine"),
        (["--data", "b", "--mode", "refine", "--draft", "c"], "in --data it is a column"),
        (
            ["--prompt", "a", "--mode", "refine", "--bridge", "sep", "--endpoint", "http://x/v1"],
            "--bridge sep: a chat server knows turns alone",
        ),
        (["--prompt", "a", "--top_p", "0"], "--top_p 0.0: must be above 0"),
        (["--prompt", "a", "--batch", "0"], "--batch 0: must be at least 1"),
        (["--prompt", "a", "--n", "0"], "--n 0: must be at least 1"),
        (["--prompt", "a", "--n", "2", "--temperature", "0"], "--temperature 0 knows but one"),
        (["--data", "prompts", "--n", "2", "--format", "mt_bench", "--out", "x"], "one answer per"),
        (["--prompt", "a", "--model", "no/where/at/all"], "--model no/where/at/all: no such"),
        (["--data", "no-such-file.jsonl"], "no such file"),
        (["--data", "prompts", "--out", "/dev/null/x"], "--out /dev/null/x: "),
    ],
)
def test_errors_are_one_line(command, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        command(*[str(command.data) if flag == "prompts" else flag for flag in flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_a_reward_model_does_not_answer(tmp_path, command, capsys):
    reward = write_model(tmp_path / "reward", tiny.REWARD)
    with pytest.raises(SystemExit):
        command("--model", reward, "--prompt", "a")
    assert "is a reward model; a language model is needed" in capsys.readouterr().err


def test_answers_end_at_the_models_positions_and_a_prompt_beyond_them_is_named(
    tmp_path, command, capsys
):
    model = write_model(tmp_path / "short", tiny.LLAMA | {"max_position_embeddings": 60})
    short = ["--model", model, "--data", command.data, "--max_new_tokens", 100]
    for mode in ("plain", "refine"):  # which asks once more, and has no room for it
        command(*short, "--mode", mode, "--out", tmp_path / mode)
        told = " answers were cut at --max_new_tokens or the model's 60 positions"
        assert told in capsys.readouterr().err
        cut = [len(row["answer"]) for row in read_rows(tmp_path / mode) if not row["finished"]]
        assert cut and (max(cut) <= 60 - 30) and (min(cut) > 0) == (mode == "plain")
    command.data.write_text('{"prompt": "a"}\n{"prompt": "' + 60 * "b" + '"}\n')
    with pytest.raises(SystemExit) as stop:
        command(*short)
    told = capsys.readouterr()
    assert stop.value.code == 2 and told.out == "" and told.err.count("\n") == 1
    assert f"{command.data}:2: 79 tokens, and the model has 60 positions" in told.err


def test_a_row_that_the_template_refuses_is_named_and_its_system_turn_can_be_folded(
    ended, tmp_path
):
    """Gemma's template has no system turn."""
    directory, file = tiny.build(tmp_path / "model", template=GEMMA), tmp_path / "asks.jsonl"
    rows = [{"prompt": "a"}, {"prompt": say("b", system="Be brief.")}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["--model", directory, "--data", file, "--max_new_tokens", 1, "--device", "cpu"]
    _, err, status = ended(generate, *words)
    assert status == 2 and "asks.jsonl:2: " in err and "refuses: there is no system role" in err
    assert "--fold_system puts a system turn into the user's" in err
    out, _, status = ended(generate, *words, "--fold_system")
    assert status == 0 and len(out.splitlines()) == 2
