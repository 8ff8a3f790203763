"""The ids of every path are those that transformers gives the whole dialogue.

A SentencePiece tokenizer puts a mark before a text, and before what follows a control token, so a
prompt, an answer and a bridge cannot be encoded each by itself.
"""

import json
from pathlib import Path

import pytest
from chat_templates import CHATML, LLAMA3, MISTRAL, ZEPHYR
from dialogues import say
from real_tokenizers import KINDS, LLAMA_2, checkpoint, mismatches
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Metaspace

from conftest import shared_data
from data import Dataset, Limits, read_pairs
from hub.template import SHIELD, Template
from jobs.cli import UserError
from losses import recipe
from pairs.layouts import Pair

TEXTS = ["The dog barks.", "Which animal barks?", "the cat and the dog", "a ab abc", "é!"]
PAIRS = [
    Pair(say("Which animal barks?"), "The dog.", " the cat", "f:1"),
    Pair(say("a", "b", " and\nthe cat? "), "\nbarks", "é, the dog!", "f:2"),
    Pair(say("The dog"), "", "a ab", "f:3"),
]
TEMPLATES = {"Llama 2": LLAMA_2, "Mistral": MISTRAL, "Zephyr": ZEPHYR, "ChatML": CHATML,
             "Llama 3": LLAMA3}  # fmt: skip
SPECIAL = ["<s>", "</s>"]
MORE = {"plain": SPECIAL, "marked": [*SPECIAL, "[INST]", "[/INST]", "<|im_start|>", "<|im_end|>",
        "<|assistant|>", "<|end_header_id|>", "<unused0>"]}  # fmt: skip


def prepend(tokenizer):
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)


def metaspace(scheme, split=True):
    def marks(tokenizer):
        tokenizer.pre_tokenizer = Metaspace(prepend_scheme=scheme, split=split)

    return marks


def prefix_space(tokenizer):
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(True), decoders.ByteLevel()


MARKS = {"Prepend": prepend, "always": metaspace("always"), "first": metaspace("first", False),
         "ByteLevel": prefix_space}  # fmt: skip


def write(directory, template, marks, special=SPECIAL, unigram=False, **settings):
    """A checkpoint's directory with a small tokenizer of SentencePiece's kind."""
    directory.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.Unigram() if unigram else models.BPE(byte_fallback=True))
    marks(tokenizer)
    names = [AddedToken(name, special=True, normalized=False) for name in special]
    common = {"vocab_size": 400, "special_tokens": ["<unk>", *names], "show_progress": False}
    trainer = trainers.UnigramTrainer(unk_token="<unk>", **common) if unigram else None
    letters = sorted({*"".join(TEXTS), "\n", *map(chr, range(33, 127)), "▁"})
    trainer = trainer or trainers.BpeTrainer(initial_alphabet=letters, **common)
    tokenizer.train_from_iterator([*TEXTS, *letters * unigram] * 3, trainer)
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template} | settings
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | settings
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


@pytest.mark.parametrize("special", MORE)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("marks", MARKS)
def test_ids_of_every_path_are_those_of_the_whole_text(marks, name, special, tmp_path):
    pytest.importorskip("transformers")
    directory = write(tmp_path, TEMPLATES[name], MARKS[marks], MORE[special])
    counts, first = mismatches(directory, PAIRS)
    assert not any(counts.values()), first


def test_they_are_with_a_unigram_model(tmp_path):
    pytest.importorskip("transformers")
    directory = write(tmp_path, LLAMA_2, metaspace("always"), MORE["marked"], unigram=True)
    counts, first = mismatches(directory, PAIRS)
    assert not any(counts.values()), first


@pytest.mark.parametrize(
    "settings", [{"legacy": True}, {"legacy": False}, {"add_prefix_space": False}, {}]
)
def test_a_llama_tokenizer_is_built_anew_as_transformers_does(settings, tmp_path):
    """Its normalizer in tokenizer.json would put a second mark before " [INST]"."""
    transformers = pytest.importorskip("transformers")
    for kind in ("llama", "mistral", None):
        settings |= {"tokenizer_class": "LlamaTokenizer"}
        directory = write(tmp_path, MISTRAL, prepend, unk_token="<unk>", **settings)
        config = {"model_type": kind} if kind else {}
        (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
        theirs, ours = transformers.AutoTokenizer.from_pretrained(directory), Template(directory)
        for text in ("<s> The dog</s> the", " a", "dog", "<s>dog</s>\n"):
            ids = theirs(text, add_special_tokens=False)["input_ids"]
            assert ours.encode([text])[0].tolist() == ids, (kind, text)


def test_a_text_has_no_mark_behind_another(tmp_path):
    """By eye: the answer's "The" opens no text, and marked names of control tokens are text."""
    ours = Template(write(tmp_path, MISTRAL, prepend))
    names = ours.tokenizer.id_to_token
    inside, alone = ours.encode(["dog"], behind="[/INST]"), ours.encode(["dog"])
    assert [names(i) for i in inside[0]] == ["dog"] and names(alone[0][0]).startswith("▁")
    (ids,) = ours.encode([f"dog<{SHIELD}/s></s>"], behind="[/INST]")
    assert [names(i) for i in ids] == ["dog", "<", "/", "s", ">", "</s>"]
    joined = ours.joined(say("a"), "The </s>")
    assert [names(i) for i in joined[-5:]] == ["<", "/", "s", ">", "</s>"]
    assert ours.decode(joined).endswith("[/INST] The </s>")


def test_a_tokenizer_without_marks_encodes_nothing_twice(tiny_model_dir):
    ours = Template(tiny_model_dir)
    assert not any(len(ours._seam(text)) for text in (ours.opening, ours.end, "dog", "\n\n"))


@pytest.mark.parametrize("kind", KINDS)
def test_published_tokenizers(kind, tmp_path):
    """On real pairs; a blank line as separator may merge with the full stop before it."""
    pytest.importorskip("transformers")
    if not (template := KINDS[kind][1]) or isinstance(template, Path) and not template.exists():
        pytest.skip(f"no template {template}") if template else None
    if checkpoint(tmp_path, kind) is None:
        pytest.skip(f"no tokenizer of {kind}: python tests/tools/real_tokenizers.py")
    pairs = list(read_pairs(str(shared_data("hh-harmless-test.jsonl.gz"))))[:4]
    counts, first = mismatches(tmp_path, pairs)
    merged = counts.pop("sep")
    assert not any(counts.values()), first
    assert not merged or first.startswith("sep: ") and "'ĊĊ'" in first


def test_tokens_that_the_bridge_changes_are_not_compared_with_the_prompts(tmp_path):
    """Token by token, a plain reference would hold an answer's first token against another."""
    template = Template(write(tmp_path, CHATML, prepend, MORE["marked"]))
    told, limits = "--loss ins_ld_dpo .*--reference conditioned", Limits(10**6, 1.0)
    for name, reference in (("ins_dpo", None), ("ins_ld_dpo", "conditioned")):
        data = Dataset(PAIRS, template, recipe(name, None, "sep", reference), limits, "better")
        assert "target" in data.places  # or this test could not fail
    with pytest.raises(UserError, match=told):
        Dataset(PAIRS, template, recipe("ins_ld_dpo"), limits, "better")
