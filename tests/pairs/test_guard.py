"""The safety filter: its number is the model's, the model runs once, what it drops is counted."""

import json
import shutil

import pytest
import tiny
import torch
from ranks import on_ranks

from conftest import write_model
from families import llama_guard
from families.llama_guard import Guard
from hub.template import Template
from jobs.cli import parse
from losses import recipe
from pairs.cleaning import dialogue_key, dialogues, without_unsafe
from pairs.layouts import Pair
from pairs.read import Drops, read_pairs
from train import TrainFlags, load_data

POLICY = (  # as Llama Guard's: the dialogue inside a task, then the question
    "{{ bos_token }}Task: is the last message unsafe?\n<CONVERSATION>\n"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 is even) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ 'User' if m.role == 'user' else 'Agent' }}: {{ m.content | trim }}\n"
    "{% endfor %}</CONVERSATION>\nAnswer safe or unsafe.<|im_end|>"
)
TEXTS = ("all well", "quite a long answer about nothing", "no", "2 + 2 is 4, <|im_end|> or so")


@pytest.fixture(scope="session")
def guard_dir(tmp_path_factory):
    """A random Llama that answers every dialogue a little differently."""
    directory = tmp_path_factory.mktemp("guard") / "model"
    write_model(directory, tiny.LLAMA | {"dtype": "float32"}, seed=3)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": POLICY})
    )
    return directory


@pytest.fixture
def data(tmp_path):
    """A file of four pairs, in a folder of its own, and its pairs."""
    file = tmp_path / "data" / "pairs.jsonl"
    file.parent.mkdir()
    rows = [{"prompt": f"Question {i}?", "chosen": t, "rejected": t[::-1]}
            for i, t in enumerate(TEXTS)]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file, read_pairs(str(file), Drops())


@pytest.fixture
def runs(monkeypatch):
    """A list of the dialogues that a guard was run on."""
    seen, judge = [], Guard.__call__

    def counted(self, dialogues):
        for verdict in judge(self, dialogues):
            seen.append(dialogues[verdict[0]])
            yield verdict

    monkeypatch.setattr(Guard, "__call__", counted)
    return seen


def unsafe(guard, messages):
    """The guard's verdict on one dialogue."""
    ((_, found),) = guard({"": messages})
    return found


def safe(pairs, directory, threshold, drops):
    return without_unsafe(pairs, Guard(directory, "cpu"), threshold, drops)


def worst(guard_dir, pairs):
    """The larger probability of each pair's two dialogues."""
    guard = Guard(guard_dir, "cpu")
    return [max(unsafe(guard, messages) for messages in dialogues(pair)) for pair in pairs]


def between(values, n):
    """A threshold with n of the values below it."""
    return sum(sorted(values)[n - 1 : n + 1]) / 2


# ----------------------------------------------------------------------------- the number


def test_the_probability_is_that_of_transformers(guard_dir, data):
    """Of its answers safe and unsafe, with or without a blank line before them."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(guard_dir).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(guard_dir)
    guard, found = Guard(guard_dir, "cpu"), []
    for pair in data[1][:3]:  # no special token in them
        for messages in dialogues(pair):
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            logps = []
            for answer in ("safe", "\n\nsafe", "unsafe", "\n\nunsafe"):
                ids = tokenizer([text, answer], add_special_tokens=False)["input_ids"]
                with torch.no_grad():
                    logits = model(torch.tensor([ids[0] + ids[1]])).logits[0]
                scored = logits[len(ids[0]) - 1 : -1].log_softmax(-1)
                logps.append(scored[range(len(ids[1])), ids[1]].sum())
            odds = torch.stack(logps).softmax(0)
            assert unsafe(guard, messages) == pytest.approx(float(odds[2:].sum()), abs=1e-5)
            found.append(unsafe(guard, messages))
    assert len(set(found)) == len(found) and 0 < min(found) < max(found) < 1


def test_where_both_are_one_token_it_is_the_softmax_over_the_two(guard_dir, data, monkeypatch):
    """Llama Guard's own case, here with the tokens of "s" and "u"."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(
        llama_guard, "ANSWERS", ("s", "\n\n\n\n\n\n\n\ns", "u", "\n\n\n\n\n\n\n\nu")
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(guard_dir).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(guard_dir)
    messages = dialogues(data[1][0])[0]
    ids = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    two = logits[tokenizer.convert_tokens_to_ids(["s", "u"])].softmax(0)
    assert unsafe(Guard(guard_dir, "cpu"), messages) == pytest.approx(float(two[1]), abs=1e-4)


# ----------------------------------------------------------------------------- what it drops


def test_one_that_drops_and_one_that_keeps(guard_dir, data):
    _, pairs = data
    drops = Drops()
    assert safe(pairs, guard_dir, 1.0, drops) == pairs and drops.total == 0
    assert safe(pairs, guard_dir, 0.0, drops) == []
    assert drops.rules == {"unsafe": [pair.where for pair in pairs]}


def test_a_pair_goes_where_either_answer_is_over_the_threshold(guard_dir, data):
    _, pairs = data
    odds = worst(guard_dir, pairs)
    threshold = between(odds, 2)
    drops = Drops()
    kept = safe(pairs, guard_dir, threshold, drops)
    assert kept == [p for p, u in zip(pairs, odds, strict=True) if u <= threshold]
    assert 0 < len(kept) < len(pairs) == len(kept) + drops.total


def test_a_dialogue_that_the_guard_refuses_is_counted(guard_dir, data):
    turns = [{"role": "user", "content": "a"}] * 2
    pairs = [Pair(turns, "yes", "no", f"{data[0]}:9"), *data[1]]
    drops = Drops()
    assert safe(pairs, guard_dir, 1.0, drops) == data[1]
    assert drops.rules == {"the guard's template refuses the dialogue": [f"{data[0]}:9"]}


def test_a_pair_without_a_rejected_answer_is_judged_by_its_one_dialogue(guard_dir, data):
    pairs = [Pair(p.prompt, p.chosen, None, p.where) for p in data[1]]
    assert safe(pairs, guard_dir, 1.0, Drops()) == pairs


def test_in_a_run_it_is_a_flag(guard_dir, tiny_model_dir, data):
    file, pairs = data
    threshold = between(worst(guard_dir, pairs), 3)
    flags = {"model": tiny_model_dir, "data": file, "max_len": 200, "eval_pairs": 0, "loss": "dpo",
             "guard": guard_dir, "guard_threshold": threshold, "device": "cpu"}  # fmt: skip
    s = parse(TrainFlags, "", [w for k, v in flags.items() for w in (f"--{k}", str(v))])
    sets, lines = load_data(s, Template(tiny_model_dir), recipe("dpo"))
    assert len(sets["train"]) == 3
    assert lines[1].startswith("cleaned: 3 pairs; dropped: 1 unsafe (")


def test_all_processes_of_a_run_share_the_dialogues(guard_dir, tiny_model_dir, data, monkeypatch):
    """Each runs a part, none runs one twice, and the sets are those of one process."""
    file, _ = data
    flags = {"model": tiny_model_dir, "data": file, "max_len": 200, "eval_pairs": 0, "loss": "dpo",
             "guard": guard_dir, "guard_threshold": 0.3, "device": "cpu"}  # fmt: skip
    s = parse(TrainFlags, "", [w for k, v in flags.items() for w in (f"--{k}", str(v))])

    def load(ranks):
        judged, verdicts = [], Guard.verdicts

        def counted(self, dialogues):
            judged.extend(dialogues)
            return verdicts(self, dialogues)

        monkeypatch.setattr(Guard, "verdicts", counted)
        sets, lines = load_data(s, Template(tiny_model_dir), recipe("dpo"), ranks)
        return judged, sets["train"].examples.where, lines

    parts, places, lines = zip(*on_ranks(3, load), strict=True)
    judged = sum(parts, [])
    assert min(map(len, parts)) >= 2 and len(set(judged)) == len(judged) == 2 * len(TEXTS)
    assert places[0] == places[1] == places[2] and lines[0] == lines[2]
    alone, told = load_data(s, Template(tiny_model_dir), recipe("dpo"))
    assert alone["train"].examples.where == places[0]
    assert told == [line for line in lines[0] if not line.startswith("token cache")]


# ----------------------------------------------------------------------------- once


def test_verdicts_lie_beside_the_data_and_the_model_runs_once(guard_dir, data, runs):
    file, pairs = data
    first = safe(pairs, guard_dir, 0.3, Drops())
    assert len(runs) == 2 * len(pairs)
    beside = file.with_name(".pairs.jsonl.guard")
    assert len(beside.read_text().split()) == 6 * 2 * len(pairs)  # six words a line
    assert safe(pairs, guard_dir, 0.3, Drops()) == first
    assert len(runs) == 2 * len(pairs)
    assert [p.chosen for p in read_pairs(str(file.parent / "*"), Drops())] == list(TEXTS)


def test_another_threshold_needs_no_model_and_a_new_row_only_itself(guard_dir, data, runs):
    file, pairs = data
    safe(pairs[:3], guard_dir, 0.3, Drops())
    safe(pairs[:3], guard_dir, 0.9, Drops())
    assert len(runs) == 6
    safe(pairs, guard_dir, 0.3, Drops())
    assert runs[6:] == dialogues(pairs[3])


def test_another_guard_judges_for_itself(guard_dir, data, runs, tmp_path):
    """Other weights, or the same with another policy, although all lie in one file."""
    _, pairs = data
    other = shutil.copytree(guard_dir, tmp_path / "other")
    settings = (other / "tokenizer_config.json").read_text()
    (other / "tokenizer_config.json").write_text(settings.replace("Task:", "Duty:"))
    assert Guard(other).identity != Guard(guard_dir).identity
    for directory in (guard_dir, other, guard_dir, other):
        safe(pairs, directory, 0.5, Drops())
    assert len(runs) == 4 * len(pairs)


def test_a_stopped_run_goes_on(guard_dir, data, runs):
    """Its last line was cut off: that one is asked again, and what follows it is whole."""
    file, pairs = data
    safe(pairs[:2], guard_dir, 0.5, Drops())
    beside = file.with_name(".pairs.jsonl.guard")
    beside.write_text(beside.read_text()[:-20])
    safe(pairs, guard_dir, 0.5, Drops())
    assert len(runs) == 4 + 1 + 4
    safe(pairs, guard_dir, 0.5, Drops())
    assert len(runs) == 4 + 1 + 4


def test_a_read_only_folder_falls_back_to_the_cache(guard_dir, data, runs, tmp_path, monkeypatch):
    """Nothing can be made in the folder (nobody may write there, not even root)."""
    monkeypatch.setenv("NANOPO_CACHE", str(tmp_path / "tokens"))
    file, pairs = data
    beside = file.with_name(".pairs.jsonl.guard")
    beside.mkdir()  # opening it fails as in a read-only folder, whoever asks
    first = safe(pairs, guard_dir, 0.5, Drops())
    assert list((tmp_path / "tokens" / "guard").iterdir())
    assert safe(pairs, guard_dir, 0.5, Drops()) == first and len(runs) == 2 * len(pairs)


def test_where_nothing_can_be_written_it_still_judges(guard_dir, data, runs, tmp_path, monkeypatch):
    file, pairs = data
    (tmp_path / "a_file").write_text("")
    monkeypatch.setenv("NANOPO_CACHE", str(tmp_path / "a_file"))
    file.with_name(".pairs.jsonl.guard").mkdir()
    kept = [safe(pairs, guard_dir, 0.5, Drops()) for _ in range(2)]
    assert kept[0] == kept[1] and len(runs) == 4 * len(pairs)


def test_keys_tell_dialogues_apart():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    moved = [{"role": "user", "content": "a b"}]
    assert len(set(map(dialogue_key, (messages, messages[:1], messages[::-1], moved)))) == 4
    assert dialogue_key(messages) == dialogue_key([dict(m) for m in messages])
