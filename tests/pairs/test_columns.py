"""Every filled column is read, or is about the row, or stops the run by its name."""

import itertools
import json
import re
from pathlib import Path

import pytest
from dialogues import GOOD, reply, say, write_rows
from published import PUBLISHED

from jobs.cli import UserError
from pairs.columns import kind_of, texts_in
from pairs.read import Drops, read_pairs

TEXT = "A sentence that nothing else says."
DOC = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")


def read(directory, *rows, **options):
    return read_pairs(write_rows(directory, rows), drops := Drops(), **options), drops


MISSED = {  # a column that nobody reads, beside a good pair
    "tools": [{"type": "function", "function": {"name": "weather"}}],
    "context": TEXT,
    "passage": TEXT,
    "initial_reason_steps": TEXT,
    "previous_answer": TEXT,
    "chat_history": [["Hi", "Hello"]],
    "history": TEXT,
    "images": [{"bytes": b"x", "path": None}],
    "reasoning": TEXT,
    "response_prefix": "The",
    "question": "Another question?",
    "messages": say("Hi", "Hello", "Why?"),
    "标题": "哪个平底锅适合煎蛋",
}


@pytest.mark.parametrize("column", MISSED)
def test_a_column_that_would_be_missed_stops_with_its_name(column, tmp_path):
    rows = [GOOD | {column: MISSED[column]}]
    file = write_rows(tmp_path, rows, "a.parquet" if column == "images" else "a.jsonl")
    with pytest.raises(UserError, match=rf":1: column {column} \(.*--ignore_columns {column}"):
        read_pairs(file, Drops())
    (pair,) = read_pairs(file, Drops(), ignore=f"x,{column}")
    assert (pair.prompt, pair.chosen, pair.rejected) == (say("Why?"), "So.", "No.")


@pytest.mark.parametrize(
    "column, value",
    [("prompt_id", TEXT), ("source", TEXT), ("topic", "cooking"), ("messages", say("Why?", "So.")),
     ("raw_responses", [TEXT]), ("num_turns", 3), ("history", []), ("tools", None)],
)  # fmt: skip
def test_what_tells_of_the_row_or_was_read_already_is_passed(column, value, tmp_path):
    (pair,), drops = read(tmp_path, GOOD | {column: value})
    assert pair.prompt == say("Why?") and set(drops.unread) == (
        {column} if value and column != "num_turns" else set()
    )


def test_no_prompt_is_invented_where_another_column_could_hold_it(tmp_path):
    row = {"chosen": "Why? So.", "rejected": "Why? No.", "id": "7"}
    assert read(tmp_path, row)[0][0].prompt == say("Why?")
    with pytest.raises(UserError, match="column title"):
        read(tmp_path, row | {"title": "Why"})


@pytest.mark.parametrize("column", ["problem", "text", "turns", "prompts", "context_messages"])
def test_a_prompt_under_another_name_is_named_and_not_dropped(column, tmp_path):
    answers = {"chosen": "So.", "rejected": "No."}
    for value in ("Why is it so?", ["Why"], say("Why")):
        with pytest.raises(UserError, match=f"column {column} .* would not be read"):
            read(tmp_path, answers | {column: value})
    with pytest.raises(UserError, match="1 no prompt"):
        read(tmp_path, answers | {"source": "A page of the web"})


MESSAGE = {"role": "assistant", "content": "So."}


@pytest.mark.parametrize("write", [
    lambda answer: json.dumps(say("Why?") + [answer], indent=2), lambda answer: f"\n {[answer]}",
    json.dumps, lambda answer: str({"from": "gpt", "value": answer["content"]})])  # fmt: skip
def test_messages_written_as_text_are_messages_however_they_are_spaced(write, tmp_path):
    row = {"chosen": write(MESSAGE), "rejected": write(MESSAGE | {"content": "No."})}
    (pair,), _ = read(tmp_path, {"prompt": "Why?"} | row)
    assert pair[:3] == (say("Why?"), "So.", "No.")


def test_an_answer_in_json_is_a_text(tmp_path):
    job = '{"role": "cook", "content": "eggs"}'
    (pair,), _ = read(tmp_path, {"prompt": "A job as JSON?", "chosen": job, "rejected": "No."})
    assert pair.chosen == job


def test_keys_of_messages_are_columns_too(tmp_path):
    with pytest.raises(UserError, match="of a message: column thinking"):
        read(tmp_path, GOOD | {"prompt": [say("Why?")[0] | {"thinking": TEXT}]})
    assert read(tmp_path, GOOD | {"prompt": [say("Why?")[0] | {"num_tokens": 2, "id": "a b"}]})[0]


CALLS = [{"id": "1", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}]
CALLED = [*say("Rain?"), {"role": "assistant", "content": None, "tool_calls": CALLS}]
SAID = {"role": "tool", "content": "no rain", "name": "weather", "tool_call_id": "1"}


def test_what_tools_are_asked_and_say_is_part_of_the_prompt(tmp_path):
    """The chat template writes it, or refuses: tests/hub/test_published_templates.py."""
    for prompt in ([*CALLED, SAID], json.dumps([*CALLED, SAID])):
        (pair,), _ = read(tmp_path, GOOD | {"prompt": prompt})
        assert pair.prompt == [CALLED[0], CALLED[1] | {"content": ""}, SAID]
    whole = [*CALLED, SAID, {"role": "assistant", "content": "No."}]
    (pair,), _ = read(tmp_path, {"chosen": whole, "rejected": [*whole[:-1], *say("", "Yes.")[1:]]})
    assert pair.prompt[1:] == [CALLED[1] | {"content": ""}, SAID] and pair.chosen == "No."


def test_calls_that_could_not_be_trained_on_are_refused(tmp_path):
    with pytest.raises(UserError, match="the answer calls tools"):
        read(tmp_path, {"chosen": CALLED, "rejected": CALLED})
    odd = CALLED[1] | {"tool_calls": [{"name": "weather"}]}
    with pytest.raises(UserError, match="tool_calls is .*; expected a list of"):
        read(tmp_path, GOOD | {"prompt": [CALLED[0], odd, SAID]})


def test_rendered_prompts_are_said_with_their_number(tmp_path, capsys):
    rendered = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    read(tmp_path, GOOD, *[GOOD | {"prompt": f"{i} {rendered}"} for i in range(3)])
    assert re.search("3 pairs hold control tokens of a chat template", capsys.readouterr().err)


ONE = {  # columns that hold what is asked, each with a text of its own
    name: f"What does {name} say here?"
    for name in ("prompt", "question", "instruction", "input", "query", "context", "system",
                 "system_prompt", "background", "passage", "title", "persona")
}  # fmt: skip
ONE |= {
    name: [{"role": "user", "content": f"What does {name} say here?"}]
    for name in ("messages", "conversations", "conversation", "trajectory", "dialogue")
}
ONE["history"] = [["What was before this one?", "That was the one before."]]
ONE["tools"] = [{"function": {"name": "a_tool", "description": "It does what it does."}}]
ANSWERS = [
    {"chosen": "This is the good one.", "rejected": "This is the bad one."},
    {"chosen": reply("This is the good one."), "rejected": reply("This is the bad one.")},
    {"chosen": say("Who asks what?", "The good one."), "rejected": say("Who asks what?", "Bad.")},
    {"response_a": "This is the good one.", "response_b": "This is the bad one.", "winner": "a"},
    {"response_j": "This is the good one.", "response_k": "This is the bad one."},
    {"answers": [{"text": "The good one.", "score": 2}, {"text": "The bad one.", "score": 1}]},
]


def test_any_columns_together_are_read_whole_or_refused_by_one_of_their_names(for_all, tmp_path):
    """Of random known columns, some filled: what is read holds the text of every filled one."""

    def check(rng):
        answers = rng.choice(ANSWERS)
        names = rng.sample(sorted(ONE), rng.randrange(5))
        about = {n: TEXT for n in rng.sample(("id", "source", "chosen_model", "rationale"), 2)}
        row = {n: ONE[n] if rng.random() < 0.8 else None for n in names} | answers | about
        row = dict(sorted(row.items(), key=lambda _: rng.random()))
        file = write_rows(tmp_path, [row])
        filled = {n for n in names if row[n] is not None}
        try:
            (pair,) = read_pairs(file, Drops())
        except UserError as error:
            said = str(error)
            named = set(re.findall(r"\w+", re.split(r"expected| not ", said.split(":1: ")[-1])[0]))
            assert named & (filled | set(answers)) or "no prompt" in said or "is None" in said, said
            return
        said = "\n".join([*(m["content"] for m in pair.prompt), pair.chosen, pair.rejected])
        for text in itertools.chain.from_iterable(texts_in(row[n]) for n in filled):
            assert text in said, (text, row)

    for_all(check)


def test_the_table_of_the_page_names_every_layout_that_is_tested():
    table = DOC[DOC.index("| dataset, whose card") : DOC.index("**No column is passed over")]
    listed = {
        name.strip()
        for row in table.splitlines()[2:]
        if row
        for name in row.split("|")[1].split(",")
    }
    own = {"a file of one's own", "a data frame's csv"}
    assert listed == PUBLISHED.keys() - own


def test_the_last_word_of_a_name_decides():
    names = ("prompt_id", "source_prompt", "chosenModel", "title", "system")
    kinds = ["about", "context", "about", "text", "context"]
    assert list(map(kind_of, names)) == kinds
