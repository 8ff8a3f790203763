"""Text is rendered as transformers renders it, and cut at the template's own seams."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from chat_templates import (
    CHATML,
    DIALOGUES,
    END,
    GEMMA,
    LLAMA3,
    MISTRAL,
    SPECIAL,
    ZEPHYR,
    write_checkpoint,
)
from dialogues import say
from transformers import AutoTokenizer

from data import Dataset, Limits
from hub import template as template_file
from hub.template import Template, bounded, open_template, with_suffix
from jobs.cli import UserError
from losses import recipe
from pairs.layouts import Pair


@pytest.fixture
def make(tmp_path):
    """make(template, ...) -> Template of a checkpoint that has this chat template."""
    return lambda template, *args, **settings: Template(
        write_checkpoint(tmp_path, template, *args, **settings)
    )


# ----------------------------------------------------------------------------- as transformers


def check_against_transformers(directory):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    ours = Template(directory)
    refused = 0
    for messages in DIALOGUES:
        for generation in (False, True):
            options = {"add_generation_prompt": generation}
            try:
                text = theirs.apply_chat_template(messages, tokenize=False, **options)
            except Exception:  # raised by the template, and then by ours too
                refused += 1
                with pytest.raises(UserError, match="the chat template refuses"):
                    ours.render(messages, generation)
                continue
            assert ours.render(messages, generation) == text
            ids = theirs.apply_chat_template(messages, tokenize=True, **options)["input_ids"]
            assert ours.encode([text])[0].tolist() == ids
    return refused


@pytest.mark.parametrize("name", END)
def test_rendering_equals_transformers_byte_for_byte(name, tmp_path):
    refused = check_against_transformers(write_checkpoint(tmp_path, END[name][0]))
    assert refused == (2 if name in ("mistral", "mistral, first", "gemma") else 0)  # a system turn


def test_a_real_checkpoint_renders_as_in_transformers(smollm2):
    assert check_against_transformers(smollm2) == 0


def test_the_file_wins_over_the_configuration_as_in_transformers(tmp_path):
    directory = write_checkpoint(tmp_path, ZEPHYR)
    (directory / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    check_against_transformers(directory)
    assert Template(directory).source == CHATML


def test_of_several_templates_the_default_is_taken(make):
    named = [{"name": "rag", "template": ZEPHYR}, {"name": "default", "template": CHATML}]
    assert make(named).source == CHATML


def test_special_tokens_may_be_written_out(make):
    eos = {"__type": "AddedToken", "content": "<|eot_id|>", "special": True}
    template = make(MISTRAL, bos_token=None, eos_token=eos)
    assert template.render(say("Hi", "Yo")) == "[INST] Hi [/INST] Yo<|eot_id|>"
    assert template.end == "<|eot_id|>"


def test_a_system_turn_is_folded_into_the_first_user_turn(tmp_path):
    directory = write_checkpoint(tmp_path, GEMMA)
    with pytest.raises(UserError, match="no system role; --fold_system puts"):
        Template(directory).render(say("Hi", system="Be brief"))
    folded = Template(directory, fold_system=True)
    text = folded.render(say("Hi", "Yo", "Why?", system="Be brief"))
    assert text == folded.render(say("Be brief\n\nHi", "Yo", "Why?"))
    with pytest.raises(UserError, match="refuses: there is no system role$"):
        folded.render([{"role": "system", "content": "alone"}])


def test_a_system_turn_behind_the_question_does_not_take_its_place(make):
    template, brief = make(CHATML), {"role": "system", "content": "Be brief."}
    dialogue = [brief, brief | {"content": "Rhyme."}, *say("a", "b", "Why? " * 40), brief]
    (ids,) = template.encode([template.render(dialogue, generation=True)])
    text = template.decode(template.shortened(dialogue, ids, 150), skip_special=False)
    assert text.startswith(template.render(dialogue[:2])) and "Why? " in text
    assert text.endswith(template.render([brief], generation=True)) and "assistant\nb" not in text


IN_PARTS = (  # as Idefics and LLaVA have it; `content` as a text would be left out in silence
    "{% for m in messages %}{{ m['role'] + ':' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def test_a_template_that_knows_parts_alone_gets_parts(make):
    template, dialogue = make(IN_PARTS), say("Hi", "Yo")
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]}
             for m in dialogue]  # fmt: skip
    theirs = AutoTokenizer.from_pretrained(template.directory)
    wanted = theirs.apply_chat_template(parts, return_dict=True)["input_ids"]
    assert template.joined(dialogue[:1], "Yo").tolist() == wanted
    assert make(IN_PARTS.replace("['type'] ==", ".type ==").replace("part['text']", "part.text"))
    with pytest.raises(UserError, match="the chat template leaves out what messages say"):
        make("{% for m in messages %}{{ m['role'] + eos_token }}{% endfor %}")


# ----------------------------------------------------------------------------- seams


@pytest.mark.parametrize("name", END)
def test_the_end_of_turn_is_found(name, make):
    """What closes an answer, without the newline or space that some templates put behind it."""
    template, end = make(END[name][0]), END[name][1]
    assert template.end == end
    assert template.decode(template.end_ids, skip_special=False) == end
    answer = template.answer(say("Hi"), "Hello")
    assert answer.strip() == "Hello" + end and answer.endswith(end)


@pytest.mark.parametrize("name", [name for name in END if name != "modern"])  # it numbers turns
@pytest.mark.parametrize("answer", ["Hello", "Say <|im_end|>", "two\n\nlines ", ""])
def test_prompt_answer_turn_and_answer_join_to_the_whole_dialogue(name, answer, make):
    template, first = make(END[name][0]), say("Hi")
    second = [*first, *say("", answer)[1:], *say("Again")]
    prompt = template.render(first, generation=True)
    joined = prompt + template.answer(first, answer) + template.turn("Again")
    assert joined == template.render(second, generation=True)
    joined += template.answer(second, "Bye", closed=False)
    assert joined == template.render([*second, *say("", "Bye")[1:]])


def test_a_turn_by_eye(make):
    """IFSR's refining turn: what follows the rejected answer's end token."""
    better = "please generate a better response"
    chatml = f"\n<|im_start|>user\n{better}<|im_end|>\n<|im_start|>assistant\n"
    assert make(CHATML).turn(better) == chatml
    assert make(MISTRAL).turn(better) == f"[INST] {better} [/INST]"


def test_the_instruction_becomes_a_suffix_of_the_question():
    messages = say("Hi", "Hello", "Why?", system="Be brief")
    assert with_suffix(messages, "better") == say("Hi", "Hello", "Why?\nbetter", system="Be brief")
    assert messages[-1]["content"] == "Why?"


def test_a_joined_dialogue_is_the_paths_of_a_dataset(make):
    """The ids that training scores an answer with, up to the end token and without what follows."""
    template, messages = make(CHATML), say("Hi ab", "a", "b?")
    pair = Pair(messages, "ab Hello <|im_end|>", "No", "f:1")
    dataset = Dataset([pair], template, recipe("dpo"), Limits(1000, 1.0), "better")
    segments, _ = dataset.path(0, dataset.recipe.paths[0])
    joined = template.joined(messages, pair.chosen)
    assert joined.tolist() == np.concatenate(segments).tolist()
    assert joined[-1] == template.end_ids[-1]


def test_no_merge_crosses_from_prompt_to_answer(make):
    """The tokenizer joins "ab"; a prompt's last "a" and an answer's first "b" stay apart."""
    template = make("{% for m in messages %}{{ m.content }}{% endfor %}")
    prompt, answer = template.encode(
        [template.render(say("a"), True), template.answer(say("a"), "b")]
    )
    assert np.concatenate([prompt, answer]).tolist() != template.encode(["ab</s>"])[0].tolist()
    assert template.decode(prompt) == "a" and template.decode(answer) == "b"


def test_no_bos_is_doubled(make):
    """The template writes it, and the tokenizer would put another in front of every text."""
    template = make(LLAMA3)
    prompt, answer = template.encode([template.render(say("Hi"), True), "Hello"])
    (bos,) = template.encode(["<s>"])[0]
    assert prompt.tolist().count(bos) == 1 and bos not in answer


def test_a_template_without_an_end_of_turn_ends_answers_with_the_eos_token(make):
    template = make("{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}")
    assert template.answer(say("Hi"), "Hello") == "assistant: Hello </s>"
    with pytest.raises(UserError, match="no end of turn; name an eos_token"):
        make(template.source, eos_token=None)


def test_an_answer_stands_alone_where_the_template_rewrites_the_prompt(make):
    """Thinking templates open the reply with what the finished answer does not show."""
    template = make(CHATML.replace("assistant\\n", "assistant\\n<think></think>"))
    assert template.answer(say("Hi"), " Hello ") == "Hello<|im_end|>"


REASONED = "<think>\nTwo and two.\n</think>\n\nFour"


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "deepseek_r1_distill", "gptoss"])
def test_templates_that_think(name, tmp_path):
    """Published ones: the whole dialogue is transformers' text, but for a block opened at the end.

    A prompt may open the reasoning that the finished dialogue leaves out: an answer goes on behind
    it, with its own reasoning or with none.
    """
    transformers, trl = pytest.importorskip("transformers"), pytest.importorskip("trl")
    source = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    directory = write_checkpoint(tmp_path, source.read_text(encoding="utf-8"))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(directory), Template(directory)
    question, opened = say("2 + 2?"), ours.render(say("2 + 2?"), True).endswith("<think>\n")
    for text in ("Four", REASONED):
        dialogue = [*question, *say("", text)[1:]]
        prompt = ours.render(question, generation=True)
        answer = ours.answer(question, text)
        whole = theirs.apply_chat_template(dialogue, tokenize=False)
        if name == "deepseek_r1_distill":
            assert answer == f"{text.removeprefix('<think>')}{ours.end}".lstrip("\n") or (
                answer == f"\n</think>\n\n{text}{ours.end}"
            )
        else:
            assert whole.startswith(prompt + answer)
        more = [*dialogue, *say("Sure?")]
        shown = theirs.apply_chat_template(more, tokenize=False, add_generation_prompt=True)
        followed = ours.answer(question, text, followed=True)
        if opened:  # the block stays open in the prompt, so it is closed
            assert followed == f"\n</think>\n\nFour{ours.end}"
        else:
            assert prompt + followed + ours.turn("Sure?") == shown


def test_a_context_answer_is_written_as_an_earlier_turn(tmp_path):
    """Reasoning is trained, but is no context: a template of Qwen3's kind takes it out."""
    strip = "(m.content if loop.last else m.content.split('</think>')[-1] | trim)"
    directory = write_checkpoint(tmp_path, CHATML.replace("m['content']", strip))
    template, rule = Template(directory), recipe("ifsr_dpo")
    pair = Pair(say("2 + 2?"), REASONED, REASONED.replace("Four", "Five"), "f:1")
    data = Dataset([pair], template, rule, Limits(1000, 1.0), "better")
    (_, *rest), _ = data.path(0, rule.paths[0])
    context, _, target = (template.decode(ids, skip_special=False) for ids in rest)
    assert (context, target) == ("Five<|im_end|>", f"{REASONED}<|im_end|>")
    ask = template.joined(pair.prompt, pair.rejected, followed=True)
    assert template.decode(ask, skip_special=False).endswith("assistant\nFive<|im_end|>")


def test_a_cut_context_answer_ends_as_an_earlier_turn_does(tmp_path):
    """gpt-oss: the last answer ends by one token, earlier ones by another, which `turn` holds."""
    last = "loop.last and m['role'] == 'assistant'"
    ends = CHATML.replace("'<|im_end|>'", f"('</s>' if {last} else '<|im_end|>')")
    template, rule = Template(write_checkpoint(tmp_path, ends)), recipe("ifsr_dpo")
    pair = Pair(say("Hi"), "Yes", "No, not at all", "f:1")
    for cap, shown in ((1.0, "No, not at all"), (0.01, "No")):
        data = Dataset([pair], template, rule, Limits(300, cap), "better")
        (_, *rest), _ = data.path(0, rule.paths[0])
        text = template.decode([i for ids in rest for i in ids], skip_special=False)
        assert text.startswith(f"{shown}<|im_end|>\n<|im_start|>user\n")
        assert text.endswith("assistant\nYes</s>")


def test_base_models_get_the_documented_fallback(make, capsys):
    template = make(None)
    assert open_template(template.directory).fallback
    told = f"{template.directory} has no chat template: using the plain one\n"
    assert capsys.readouterr().err == told
    assert template.fallback and not make(CHATML).fallback
    prompt = template.render(say("Hi"), generation=True)
    assert prompt == "<s>\n<|user|>\nHi\n<|assistant|>\n"
    assert template.answer(say("Hi"), "Hello") == "Hello</s>"
    assert template.turn("Again") == "\n<|user|>\nAgain\n<|assistant|>\n"


# ----------------------------------------------------------------------------- separators


@pytest.mark.parametrize(
    "tokens, chosen",
    [
        ([], "\n\n"),
        (["<|begin_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"],
         "<|reserved_special_token_0|>"),
        (["<unused0>", "<unused1>"], "<unused0>"),
        (["<|reserved_1|>"], "<|reserved_1|>"),
    ],
)  # fmt: skip
def test_the_separator_is_the_first_reserved_token_or_a_blank_line(tokens, chosen, make):
    assert make(CHATML, SPECIAL + tokens).separator() == chosen


def test_a_reserved_token_that_ends_answers_is_no_separator(make):
    template = make(MISTRAL, [*SPECIAL, "<unused0>", "<unused1>"], eos_token="<unused0>")
    assert template.separator() == "<unused1>"


def test_a_separator_that_ends_generation_is_refused(make):
    pairs, limits = [Pair(say("Hi"), "Yes", "No", "f:1")], Limits(100, 0.4)
    with pytest.raises(UserError, match="--sep '<|im_end|>' holds the token that ends generation"):
        Dataset(pairs, make(CHATML), recipe("ins_dpo"), limits, "better", sep="<|im_end|>")


# ----------------------------------------------------------------------------- strangers' templates


@pytest.mark.parametrize("broken", ["{% for m in messages %}", "{{ m | nofilter }}", "{% foo %}"])
def test_a_broken_template_is_told(broken, make):
    with pytest.raises(UserError, match="the chat template is broken"):
        make(broken)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append('more') }}",
        "{{ messages[0].update(role='system') }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_the_sandbox_lets_a_template_reach_nothing_but_its_messages(attack, make):
    with pytest.raises(UserError, match="the chat template refuses"):
        make(attack + CHATML)


@pytest.mark.parametrize("wrong", ["{{ 1 + 'a' }}", "{{ 1 / 0 }}", "{{ messages[9].content }}"])
def test_a_template_that_fails_is_told_in_one_line(wrong, make):
    with pytest.raises(UserError, match="the chat template refuses") as error:
        make(wrong + CHATML)
    assert "\n" not in str(error.value)


def test_a_directory_without_a_fast_tokenizer_is_told(tmp_path):
    with pytest.raises(UserError, match="no tokenizer.json; save the tokenizer in its fast form"):
        Template(tmp_path)


def test_broken_settings_are_told(tmp_path):
    (write_checkpoint(tmp_path, CHATML) / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="tokenizer_config.json: broken JSON"):
        Template(tmp_path)


def test_a_broken_tokenizer_is_told(tmp_path):
    (write_checkpoint(tmp_path, CHATML) / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="tokenizer.json: not readable as a tokenizer"):
        Template(tmp_path)


# ----------------------------------------------------------------------------- hostile templates

HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(40) }}",
    "constant": "{{ 'a' * 10 ** 12 }}",
    "text": "{{ bos_token.ljust(10 ** 12) }}",
    "doubling": "{% set n = namespace(x='aaaaaaaa') %}"
    "{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "number": "{% set n = 10 %}{{ n ** (n ** n) }}",
    "output": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nesting": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "attributes": "{{ messages.__class__.__mro__[-1].__subclasses__() }}",
    "files": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_stopped_in_one_line(name, tmp_path, monkeypatch):
    """At a fifth of a second or 256 MB here, else at five seconds or 512 MB; they would not end."""
    monkeypatch.setattr(template_file, "bounded", lambda: bounded(0.2, 2**28))
    directory = tiny.build(tmp_path, template=HOSTILE[name])
    with pytest.raises(UserError, match="the chat template") as caught:
        Template(directory).render([{"role": "user", "content": "u"}])
        raise AssertionError("it was rendered")
    assert str(directory) in str(caught.value)


def test_the_bounds_are_lifted_again():
    with pytest.raises(TimeoutError), bounded(0.05):
        while True:
            pass
    # in a process of its own: this one may hold so much freed memory that nothing new is mapped
    program = (
        "from hub.template import bounded\n"
        "try:\n    with bounded(nbytes=2**26):\n        bytearray(2**28)\n"
        "except MemoryError as error:\n    print(error)\n"
        "print(len(bytearray(2**28)) == 2**28)"
    )
    root = Path(__file__).parents[2]
    told = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert told.stdout.splitlines() == ["it takes more than 64 MB of memory", "True"], told.stderr
    time.sleep(0.1)  # no alarm is left
