"""Published chat templates: our text and ids are transformers', but for special tokens in messages.

What a message says is text, so a special token's name inside it gives the ids of its letters.
transformers makes it the control token: there the ids differ on purpose, the text only by marks.
"""

from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from chat_templates import DIALOGUES, write_checkpoint
from dialogues import say

from hub.template import SHIELD, Refused, Template, with_suffix
from losses import recipe
from pairs.layouts import Pair

PUBLISHED = Path(__file__).parent / "data" / "templates"
HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"]
TOKENS = {  # template -> bos and eos as the model's tokenizer_config.json has them, further control
    "llama-3": ({"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, HEADERS),
    "llama-3.1": ({"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, HEADERS),
    "mistral-v0.2": ({"bos_token": "<s>", "eos_token": "</s>"}, ["<unk>"]),
    "qwen2": ({"bos_token": None, "eos_token": "<|im_end|>"}, ["<|endoftext|>", "<|im_start|>"]),
    "gemma-2": (
        {"bos_token": "<bos>", "eos_token": "<eos>"},
        ["<start_of_turn>", "<end_of_turn>", "<unused0>"],
    ),
    "zephyr": ({"bos_token": "<s>", "eos_token": "</s>"}, ["<unk>"]),
    "chatml": ({"bos_token": "<s>", "eos_token": "<|im_end|>"}, ["<|im_start|>"]),
    "smollm2": (
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        ["<|endoftext|>", "<jupyter_output>"],
    ),
}
END = {"llama-3": "<|eot_id|>", "llama-3.1": "<|eot_id|>", "gemma-2": "<end_of_turn>",
       "mistral-v0.2": "</s>", "zephyr": "</s>"}  # fmt: skip
ROLES = ("user", "assistant", "system")
PIECES = ["Hi", " a", "b ", "\n", "\n\n", "é", "\u2028", "{{ x }}", "{% if", "'", '"', "\\n", "<|",
          "|>", "</think>", "[INST]", "assistant", "🙂", "\t", "<", "&amp;"]  # fmt: skip


def checkpoint(directory, name):
    """A directory with a published template, its model's special tokens and a byte tokenizer."""
    tokens, more = TOKENS[name]
    text = (PUBLISHED / f"{name}.jinja").read_bytes().decode()
    special = sorted({"<s>", *more, *filter(None, tokens.values())})
    return write_checkpoint(directory, text, special, **tokens)


@pytest.fixture(scope="module", params=TOKENS)
def both(request, tmp_path_factory):
    """(our Template, transformers' tokenizer) of a published template."""
    transformers = pytest.importorskip("transformers")
    directory = checkpoint(tmp_path_factory.mktemp("published"), request.param)
    return Template(directory), transformers.AutoTokenizer.from_pretrained(directory)


def control_ids(template):
    added = template.tokenizer.get_added_tokens_decoder()
    return {i for i, token in added.items() if token.special}


def controls(template, ids):
    """How often each control token occurs."""
    known = control_ids(template)
    return Counter(i for i in ids.tolist() if i in known)


def check(both, messages, generation):
    """Text and ids as transformers', or refused by both; True when it was rendered."""
    ours, theirs = both
    options, given = {"add_generation_prompt": generation}, messages
    if ours._in_parts:  # of a text such a template says nothing, or fails
        given = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
    try:
        text = theirs.apply_chat_template(given, tokenize=False, **options)
    except Exception:  # raised inside the template
        with pytest.raises(Refused):
            ours.render(messages, generation)
        return False
    rendered = ours.render(messages, generation)
    assert rendered.replace(SHIELD, "") == text
    if rendered == text:  # no message names a special token
        ids = theirs.apply_chat_template(given, tokenize=True, **options)["input_ids"]
        assert ours.encode([rendered])[0].tolist() == ids
        return True
    ids = ours.encode([rendered])[0]
    assert ours.decode(ids, skip_special=False) == text
    innocent = [m | {"content": "x"} for m in messages]
    written = controls(ours, ours.encode([ours.render(innocent, generation)])[0])
    assert controls(ours, ids) == written  # those that the template writes, and no more
    return True


# ----------------------------------------------------------------------------- text and ids


def test_hand_made_dialogues(both, request):
    name = request.node.callspec.params["both"]
    system_in_the_middle = [*say("a", "b"), {"role": "system", "content": "s"}, *say("c")]
    crooked = [say("a", "b")[::-1], say("a") * 2, system_in_the_middle]
    cases = [(d, g) for d in [*DIALOGUES, *crooked] for g in (False, True)]
    refused = sum(not check(both, dialogue, generation) for dialogue, generation in cases)
    strict = {"gemma-2": 8, "mistral-v0.2": 6}  # a system turn (Gemma only), a turn out of order
    assert refused == strict.get(name, 0)


def test_fuzzed_dialogues(both):
    """Any roles in any order, any text, special tokens' names in some of them."""
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    names = both[0]._control
    text = st.lists(st.sampled_from(PIECES + names) | st.text(max_size=5), max_size=6).map("".join)
    text = text.filter(lambda t: SHIELD not in t)
    free = st.lists(st.tuples(st.sampled_from(ROLES), text), min_size=1, max_size=5)
    turns = st.lists(text, min_size=1, max_size=5).map(lambda texts: say(*texts))
    asked = st.tuples(turns, text).map(lambda t: say(system=t[1]) + t[0])

    @hypothesis.settings(max_examples=80, deadline=None, database=None, derandomize=True)
    @hypothesis.given(free.map(_messages) | turns | asked, st.booleans())
    def case(messages, generation):
        check(both, messages, generation)

    case()


def _messages(turns):
    return [{"role": role, "content": text} for role, text in turns]


def test_the_end_of_turn(both, request):
    name = request.node.callspec.params["both"]
    assert both[0].end == END.get(name, "<|im_end|>")


def test_templates_that_trl_knows(tmp_path):
    """Whatever its release ships, newer ones included: same text, or both refuse."""
    transformers = pytest.importorskip("transformers")
    trl = find_spec("trl") or pytest.skip("TRL is not installed")
    files = sorted(Path(trl.origin).parent.glob("chat_templates/*.jinja"))
    theirs = transformers.AutoTokenizer.from_pretrained(write_checkpoint(tmp_path, "x"))
    same = 0
    for file in files:
        theirs.chat_template = file.read_text(encoding="utf-8")
        write_checkpoint(tmp_path, theirs.chat_template)
        same += _same_text(tmp_path, theirs)
    assert files and same >= 2 * len(files)


def _same_text(directory, theirs):
    """How many dialogues are rendered by both alike."""
    try:
        ours = Template(directory)
    except Refused:  # the probe dialogue itself: then transformers must refuse it too
        with pytest.raises(Exception):  # noqa: B017
            theirs.apply_chat_template(say("u", "a"), tokenize=False)
        return 0
    return sum(check((ours, theirs), d, g) for d in DIALOGUES for g in (False, True))


# ----------------------------------------------------------------------------- what messages say


def test_special_tokens_in_messages_are_text(both):
    """In prompts and in answers, for every special token, also glued together and cut short."""
    ours, theirs = both
    for name in [*ours._control, *map("".join, zip(ours._control, ours._control, strict=True))]:
        for text in (name, f"Say {name} now", name[:-1], f"<{name}>", f"{name}\n"):
            dialogues = say(text), say("Hi", text), say("Hi", "Yo", text)
            rendered = [check(both, d, d[-1]["role"] == "user") for d in dialogues]
            assert all(rendered)
            ids = ours.encode([ours.answer(say("Hi"), text)])[0]
            (innocent,) = ours.encode([ours.answer(say("Hi"), "x")])
            assert controls(ours, ids) == controls(ours, innocent)
            plain = theirs(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
            assert ours.lengths([text]) == [len(plain)]
            assert ours.encode([ours._shield(text)])[0].tolist() == plain


def test_special_tokens_in_pairs_are_text(both):
    """As in training: prompt, chosen and rejected of a Dataset hold only the template's control."""
    from data import Dataset, Limits

    ours, _ = both
    limits, rule = Limits(10**4, 1.0), recipe("ifsr_dpo")
    hostile = "".join(ours._control) + " and " + ours.end
    pairs = [Pair(say(text), f"yes {text}", f"no {text}", "f:1") for text in (hostile, "x")]
    data = Dataset(pairs, ours, rule, limits, "better")
    example, innocent = data.examples
    for part in ("prompt", "chosen", "rejected"):
        ids = getattr(example, part)
        assert controls(ours, ids) == controls(ours, getattr(innocent, part))
        assert hostile in ours.decode(ids, skip_special=False)
    assert example.chosen[-len(ours.end_ids) :].tolist() == ours.end_ids.tolist()


def test_special_tokens_are_text_with_a_real_tokenizer(smollm2):
    """SmolLM2's byte-pair merges: ids of a name in an answer are transformers' of split text."""
    transformers = pytest.importorskip("transformers")
    both = Template(smollm2), transformers.AutoTokenizer.from_pretrained(smollm2)
    ours, theirs = both
    for name in ours._control:
        for text in (name, f"Say {name} now", f"({name})\n"):
            plain = theirs(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
            assert ours.encode([ours._shield(text)])[0].tolist() == plain
            assert check(both, say("Hi", text), False) and check(both, say(text), True)


# ----------------------------------------------------------------------------- tools

CALL = {
    "type": "function",
    "function": {"name": "find_city", "arguments": {"query": "Ulm <|im_end|>"}},
}
TOOLED = [
    *say("Where is Ulm?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "find_city", "content": "in Germany"},
]


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "llama3_1"])
def test_calls_of_tools_are_written_as_transformers_writes_them(name, tmp_path):
    """Byte for byte, but for the marks; a special token's name in an argument is text."""
    transformers = pytest.importorskip("transformers")
    trl = find_spec("trl") or pytest.skip("TRL is not installed")
    file = Path(trl.origin).parent / "chat_templates" / f"{name}.jinja"
    if not file.exists():
        pytest.skip(f"this TRL has no {name}.jinja")
    text, special = (
        file.read_text(encoding="utf-8"),
        ["<s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"],
    )
    directory = write_checkpoint(tmp_path, text, special, eos_token="<|im_end|>")
    ours, theirs = Template(directory), transformers.AutoTokenizer.from_pretrained(directory)
    asked = [*TOOLED, *say("u", "a", "And Bern?")[2:]]
    for dialogue in (TOOLED, asked):
        rendered = ours.render(dialogue, generation=True)
        wanted = theirs.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True)
        assert rendered.replace(SHIELD, "") == wanted and rendered != wanted
    assert TOOLED[1]["tool_calls"] == [CALL], "what was given is not changed"


def test_a_template_that_leaves_out_what_tools_say_is_refused(tmp_path):
    """ChatML's, say, writes the text of every turn and no call."""
    directory = checkpoint(tmp_path, "chatml")
    with pytest.raises(Refused, match="leaves out tool calls"):
        Template(directory).render(TOOLED, generation=True)


def test_the_instruction_stands_behind_the_users_last_turn():
    x = with_suffix([*TOOLED], "better")
    assert x[0]["content"] == "Where is Ulm?\nbetter" and x[1:] == TOOLED[1:]
