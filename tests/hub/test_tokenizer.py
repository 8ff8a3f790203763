"""Tokens that stand beside tokenizer.json get the ids, flags and names that transformers gives."""

import json

import pytest
import tiny
from real_tokenizers import fetched

import train
from hub.template import Template
from hub.tokenizer import read_tokenizer
from jobs.cli import UserError
from jobs.files import write_json

TURN, STOP = "<|turn|>", "<|stop|>"
CHAT = "{% for m in messages %}<|turn|>{{ m.role }} {{ m.content }}<|stop|>{% endfor %}"
CHAT += "{% if add_generation_prompt %}<|turn|>assistant {% endif %}"


def token(text, **flags):
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"content": text} | plain | {"special": True} | flags


def listed(*tokens):
    """added_tokens_decoder of tokens behind tokenizer.json's 259."""
    return {str(259 + n): t for n, t in enumerate(tokens)}


CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
BOTH = {TURN: 259, STOP: 260}
# kind -> {file: what it holds}; every one makes both tokens known
BESIDE = {
    "in added_tokens_decoder": {CONFIG: {"added_tokens_decoder": listed(token(TURN), token(STOP))}},
    "named by a text": {CONFIG: {"eos_token": STOP, "bos_token": TURN}},
    "named by an object": {CONFIG: {"eos_token": token(STOP) | {"__type": "AddedToken"},
                                    "extra_special_tokens": [TURN]}},
    "additional": {CONFIG: {"additional_special_tokens": [TURN, STOP]}},
    "extra": {CONFIG: {"extra_special_tokens": [TURN, STOP]}},
    "extra with names": {CONFIG: {"extra_special_tokens": {"turn_token": TURN, "stop": STOP}}},
    "of a name of their own": {CONFIG: {"turn_token": TURN, "stop_token": STOP}},
    "in the map": {MAP: {"eos_token": {"content": STOP}, "bos_token": TURN}},
    "additional in the map": {MAP: {"eos_token": STOP, "additional_special_tokens": [TURN]}},
    "extra in both": {CONFIG: {"extra_special_tokens": [TURN]},
                      MAP: {"extra_special_tokens": [TURN, {"content": STOP}]}},
    "extra with names in the map": {MAP: {"extra_special_tokens": {"a": TURN, "b": STOP}}},
    "the map wins": {CONFIG: {"eos_token": TURN}, MAP: {"eos_token": STOP, "pad_token": TURN}},
    "the map does not count": {CONFIG: {"added_tokens_decoder": listed(token(TURN), token(STOP)),
                                        "eos_token": STOP}, MAP: {"eos_token": TURN}},
    "in added_tokens.json": {ADDED: BOTH},
    "in added_tokens.json, named": {ADDED: BOTH, CONFIG: {"eos_token": STOP}},
    "in added_tokens.json, named in the map": {ADDED: BOTH, MAP: {"eos_token": STOP}},
    "added_tokens.json does not count": {
        ADDED: {STOP: 259, TURN: 260},
        CONFIG: {"added_tokens_decoder": listed(token(TURN), token(STOP))}},
    "in added_tokens.json, beside old ones": {ADDED: BOTH | {"<|im_end|>": 258}},
    "not special": {CONFIG: {"added_tokens_decoder": listed(
        token(TURN, special=False), token(STOP, special=False, normalized=True))}},
    "not special, but named": {CONFIG: {"eos_token": STOP, "added_tokens_decoder": listed(
        token(TURN), token(STOP, special=False))}},
    "with bare flags": {CONFIG: {"added_tokens_decoder": listed(
        {"content": TURN}, {"content": STOP, "special": True})}},
    "at another id than in tokenizer.json": {ADDED: BOTH | {"<|im_end|>": 270}},
    "that strip": {CONFIG: {"added_tokens_decoder": listed(
        token(TURN, rstrip=True), token(STOP, lstrip=True))}},
    "of single words": {CONFIG: {"added_tokens_decoder": listed(
        token(TURN, single_word=True), token(STOP))}},
    "with other flags than in tokenizer.json": {CONFIG: {"added_tokens_decoder": {
        "257": token("<|im_start|>", rstrip=True), **listed(token(TURN), token(STOP))}}},
    "that are part of the vocabulary": {CONFIG: {"eos_token": "e", "bos_token": TURN,
                                                 "extra_special_tokens": [STOP]}},
    "with null for some": {CONFIG: {"bos_token": None, "eos_token": STOP, "pad_token": TURN}},
}  # fmt: skip
TEXTS = ["<|turn|>user Hi <|stop|>", " a <|turn|> b <|stop|> c", "x<|turn|>y <|im_start|> we",
         "<|TURN|>", "the end<|im_end|>"]  # fmt: skip


def write(directory, files, template=CHAT):
    tiny.write_tokenizer(directory, template)
    for name, content in files.items():
        file = directory / name
        before = json.loads(file.read_text()) if file.exists() else {}
        write_json(file, before | content)
    return directory


@pytest.mark.parametrize("kind", BESIDE)
def test_tokens_beside_tokenizer_json_are_read_as_transformers_reads_them(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    write(tmp_path, BESIDE[kind])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours, names = read_tokenizer(tmp_path)
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], text
    added = {n: str(t) for n, t in theirs.added_tokens_decoder.items()}
    assert {n: str(t) for n, t in ours.get_added_tokens_decoder().items()} == added
    assert names == theirs.special_tokens_map
    assert {259, 260} <= added.keys() and {added[259], added[260]} == {TURN, STOP}


@pytest.mark.parametrize("kind", [k for k in BESIDE if "vocabulary" not in k])
def test_a_dialogue_of_such_tokens_has_the_ids_that_transformers_gives(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    write(tmp_path, BESIDE[kind])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So."}]
    ours = Template(tmp_path)
    whole = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ours.joined(messages[:1], "So.").tolist() == whole
    assert ours.end_ids.tolist() == [theirs.convert_tokens_to_ids(STOP)]


@pytest.mark.parametrize("package", ["llama3", "qwen3"])
def test_published_tokens_may_stand_beside_the_file_as_well(package, tmp_path):
    """All that can be moved from a published tokenizer.json to added_tokens_decoder."""
    if (place := fetched(package)) is None:
        pytest.skip(f"{package}'s tokenizer is not here: python tests/tools/real_tokenizers.py")
    spec = json.loads((place / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((place / CONFIG).read_text(encoding="utf-8"))
    added, vocab = spec["added_tokens"], spec["model"]["vocab"]
    moved = [t for t in added if t["content"] not in vocab]
    spec["added_tokens"] = [t for t in added if t["content"] in vocab]
    decoder = {str(t.pop("id")): t for t in moved}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    write_json(tmp_path / CONFIG, settings | {"added_tokens_decoder": decoder})
    (ours, names), (theirs, expected) = read_tokenizer(tmp_path), read_tokenizer(place)
    assert ours.get_vocab() == theirs.get_vocab() and names == expected and decoder
    pairs = zip(ours.get_added_tokens_decoder().items(), theirs.get_added_tokens_decoder().items(),
                strict=True)  # fmt: skip
    assert all((n, repr(t)) == (m, repr(u)) for (n, t), (m, u) in pairs)


@pytest.mark.parametrize(
    "files, told",
    [
        ({CONFIG: {"added_tokens_decoder": {"300": token(TURN)}}}, "'<|turn|>' has id 300.*259"),
        ({ADDED: {TURN: 270}}, "'<|turn|>' has id 270, behind tokenizer.json comes 259"),
        ({CONFIG: {"added_tokens_decoder": {"259": 7}}}, "is of the wrong kind"),
        ({CONFIG: {"added_tokens_decoder": {"x": token(TURN)}}}, "is of the wrong kind"),
        ({CONFIG: {"extra_special_tokens": [7]}}, "is of the wrong kind"),
        ({CONFIG: {"eos_token": {"text": TURN}}}, "is of the wrong kind"),
        ({ADDED: {TURN: "a"}}, "is of the wrong kind"),
    ],
)
def test_an_id_that_would_be_made_up_and_what_is_no_token_are_told_in_one_line(
    files, told, tmp_path
):
    with pytest.raises(UserError, match=told.replace("|", r"\|")) as caught:
        read_tokenizer(write(tmp_path, files))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


# ----------------------------------------------------------------------------- the embedding


@pytest.fixture
def small(tmp_path):
    """small(vocab_size, files, template) -> a tokenizer beside the config of such a model."""

    def make(vocab, files, template=CHAT):
        write_json(tmp_path / "config.json", {"vocab_size": vocab})
        return write(tmp_path, files, template)

    return make


LISTED = BESIDE["in added_tokens_decoder"]


def test_a_token_beyond_the_embedding_is_told_where_it_can_appear(small):
    """Control tokens by the template, when it is read; others by the first text that has one."""
    with pytest.raises(UserError, match=r"'<\|stop\|>' has id 260, but the model 260 embeddings"):
        Template(small(260, LISTED))
    assert Template(small(261, LISTED)).end == STOP
    unused = Template(small(259, LISTED, tiny.CHATML))  # as Gemma 3's image token
    assert len(unused.encode([unused.render([{"role": "user", "content": STOP}])])[0]) > 10
    plain = {CONFIG: {"added_tokens_decoder": listed(token(TURN, special=False))}}
    letters = Template(small(259, plain, tiny.CHATML))
    letters.encode(["a turn"])
    with pytest.raises(UserError, match=r"'<\|turn\|>' has id 259, but the model 259 embeddings"):
        letters.encode(["Hello", "a <|turn|>"])


def test_a_run_on_ids_beyond_the_embedding_ends_before_it_computes(flags, ended, tmp_path):
    """Also where the same tokens are cached, from a model that has the embeddings."""
    words = {"data": flags["data"], "steps": 1, "batch": 4, "max_len": 256, "loss": "dpo"}
    for vocab, expected in ((261, 0), (260, 2)):
        model = tiny.build(tmp_path / f"model{vocab}", tiny.LLAMA | {"vocab_size": vocab})
        write(model, LISTED)
        given = words | {"model": model, "out": tmp_path / f"out{vocab}"}
        _, told, status = ended(train, *(f"--{k}={v}" for k, v in given.items()))
        assert status == expected
    assert told.startswith("error: ") and told.count("\n") == 1 and "'<|stop|>' has id 260" in told
