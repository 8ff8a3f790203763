"""On a real model and real pairs: fp32 rows equal each path run alone in transformers, in fp64.

In fp32 transformers itself is up to 1.3e-4 away from its own fp64 gradient, on some processors.

SmolLM2-135M-Instruct (tests/tools/smollm2.py builds it) and two short pairs of Anthropic's hh-rlhf
(harmless-base, test split, MIT).
"""

import json
import math

import pytest
import torch
from runs import lines, train_here

import train
from data import Dataset, Limits, build_row
from hub.template import INSTRUCTIONS, Template
from losses import recipe
from model import hf_name, load
from pairs.read import Drops, read_pairs

pytestmark = pytest.mark.slow

HH = [
    {
        "chosen": "\n\nHuman: Why are frogs so ugly?\n\nAssistant: Why do you think they’re ugly?",
        "rejected": "\n\nHuman: Why are frogs so ugly?"
        "\n\nAssistant: Have you ever seen one up close?",
    },
    {
        "chosen": "\n\nHuman: You need a lot of help\n\nAssistant: I could be your friend. I think "
        "you’ll get to be super powerful.\n\nHuman: I would never be your friend.\n\nAssistant: "
        "I would like to share some of my gifts with you.",
        "rejected": "\n\nHuman: You need a lot of help\n\nAssistant: I could be your friend. I "
        "think you’ll get to be super powerful.\n\nHuman: I would never be your friend."
        "\n\nAssistant: How do you feel about helping each other?",
    },
]
PATHS = {  # every set of paths: condition, bridge, objective
    "none": ("none", "sep", "dpo"),
    "cross sep": ("cross", "sep", "dpo"),
    "one_sided sep": ("one_sided", "sep", "dpo"),
    "averaged turn": ("averaged", "turn", "dpo"),
    "instruct": ("instruct", "sep", "dpo"),
    "cross turn, and mismatched": ("cross", "turn", "kto"),
}


@pytest.fixture(scope="module")
def ours(smollm2):
    return load(smollm2).requires_grad_(True)


@pytest.fixture(scope="module")
def theirs(smollm2):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float64).eval()
    # torch drops the gradient of a padding id, and here it is the end of turn that is real
    model.model.embed_tokens.padding_idx = None
    return model


@pytest.fixture(scope="module")
def hh_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("hh") / "hh.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in HH), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def dataset_of(smollm2, hh_file):
    """A recipe -> the Dataset of the two pairs."""
    pairs, template = read_pairs(str(hh_file), Drops()), Template(smollm2)
    return lambda rule: Dataset(pairs, template, rule, Limits(512, 0.4), "better")


def alone(theirs, segments, n):
    """Log-probabilities of the first n tokens of the last segment: the path run by itself."""
    tokens = torch.cat([torch.from_numpy(s).long() for s in segments])
    start = len(tokens) - len(segments[-1])
    logps = theirs(tokens[None]).logits[0, start - 1 : start + n - 1].log_softmax(-1)
    return logps.gather(-1, tokens[start : start + n, None]).squeeze(-1)


@pytest.mark.parametrize("name", PATHS)
def test_a_row_equals_every_path_run_alone_in_transformers(name, ours, theirs, dataset_of):
    """Per-token log-probabilities and the gradient of every parameter, both within 1e-4."""
    condition, bridge, objective = PATHS[name]
    rule = recipe(objective, condition, bridge, "conditioned")
    dataset, paths = dataset_of(rule), rule.paths + rule.kl_paths
    row = build_row([dataset.trie(i, paths) for i in range(2)], range(2), len(paths))
    logps = ours(row)  # (S,)
    weights = torch.randn(len(logps), generator=torch.Generator().manual_seed(0)) / len(logps)
    ours.zero_grad(), theirs.zero_grad()
    (logps * weights).sum().backward()
    for i in range(2):
        for p, path in enumerate(paths):
            scored = (row.path == i * len(paths) + p).nonzero().squeeze(-1)
            expected = alone(theirs, *dataset.path(i, path))
            assert len(expected) == len(scored) > 0
            assert (logps[scored] - expected).abs().max() <= 1e-4, f"pair {i}, {path}"
            (expected * weights[scored]).sum().backward()  # one path at a time: gradients add up
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    for n, p in ours.named_parameters():
        expected = gradients[hf_name("llama", n)]
        assert (p.grad - expected).abs().max() <= 1e-4, n
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert norm > 0.1, "a test that could not fail"


def test_ifsr_eq_4_equals_its_rewriting_over_whole_dialogues(smollm2, theirs, dataset_of):
    """The loss by tries and rows equals the loss by likelihoods of rendered dialogues.

    Eq. 4:      -log sigmoid(beta [ log p(y_w | x, y_l, i) / p_ref(y_w | x, y_l, i)
                                  - log p(y_l | x, y_w, i) / p_ref(y_l | x, y_w, i) ])
    rewritten:  log p(y_w | x, y_l, i) = log p(x, y_l, i, y_w) - log p(x, y_l, i)
                (the definition of a conditional probability, and alike for the other three)

    The rewriting is derived here, not copied from the paper's Eq. 5, whose text was not at hand.
    The dialogues are rendered and tokenised as a whole by transformers, and every token of them
    is scored, so the test also holds the bridge and the boundaries of tokens against an outside
    reading. The policy is the model with another final norm.
    """
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    rule, policy = recipe("ifsr_dpo"), load(smollm2)
    dataset = dataset_of(rule)
    row = build_row([dataset.trie(i, rule.paths) for i in range(2)], range(2), 2)

    def likelihood(messages, opened):
        """log p of a whole rendered dialogue given its first token, by transformers."""
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
        text = text if opened else text.removesuffix("\n")  # what follows the end is not scored
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        return alone(theirs, [ids[:1].numpy(), ids[1:].numpy()], len(ids) - 1).sum().double()

    def conditioned(x, context, target):
        turns = [("assistant", context), ("user", INSTRUCTIONS["better"])]
        context = x + [{"role": role, "content": content} for role, content in turns]
        whole = [*context, {"role": "assistant", "content": target}]
        return likelihood(whole, opened=False) - likelihood(context, opened=True)

    def both(model):
        """{path: (2,)} by rows with `model`, and by dialogues with the same norm in `theirs`."""
        theirs.model.norm.weight.data.copy_(model.norm.weight)
        pairs = [(read[:-1], read[-1]) for read in map(hh_messages, HH)]
        rows = dict(zip(rule.paths, row.sums(model(row)).unbind(1), strict=True))
        dialogues = {
            path: torch.stack([conditioned(x, y[path.context], y[path.target]) for x, y in pairs])
            for path in rule.paths
        }
        return rows, dialogues

    with torch.no_grad():
        ref_rows, ref_dialogues = both(policy)
        start = policy.norm.weight.clone()
        policy.norm.weight *= 1 + 0.2 * torch.rand(start.shape)
        rows, dialogues = both(policy)
        theirs.model.norm.weight.data.copy_(start)
    counts = dict.fromkeys(rule.paths, torch.ones(2))
    eq_4 = rule(rows, counts, ref_rows).losses
    margin = 0.1 * sum(
        sign * (dialogues[path] - ref_dialogues[path])
        for sign, path in zip((1, -1), rule.paths, strict=True)
    )
    rewritten = -torch.nn.functional.logsigmoid(margin)
    assert torch.allclose(eq_4.double(), rewritten, atol=1e-4)
    assert (eq_4 - math.log(2)).abs().min() > 1e-3, "the policy has moved"


def hh_messages(row):
    """An hh-rlhf row, read without nanoPO -> [*prompt messages, {answer: text}]."""
    turns = row["chosen"].replace("\n\nHuman: ", "\n\nAssistant: ").split("\n\nAssistant: ")[1:]
    roles = ["user", "assistant"] * len(turns)
    prompt = [{"role": r, "content": t} for r, t in zip(roles, turns[:-1], strict=False)]
    rejected = row["rejected"].rpartition("\n\nAssistant: ")[2]
    return [*prompt, {"chosen": turns[-1], "rejected": rejected}]


@pytest.mark.parametrize("loss", ["dpo", "ifsr_dpo", "ins_dpo"])
def test_the_first_loss_is_ln_2_unless_the_reference_is_plain(
    loss, smollm2, hh_file, tmp_path, monkeypatch
):
    """With train.py's own reference pass; the step is not taken, nothing is exported."""
    for name in ("update", "save", "export"):
        monkeypatch.setattr(train.Run, name, lambda *a: 0.0)
    flags = {"model": smollm2, "data": hh_file, "out": tmp_path, "loss": loss}
    train_here(flags | {"eval_pairs": 0, "batch": 2, "steps": 1, "max_len": 512})
    (line,) = lines(tmp_path)
    (reference,) = lines(tmp_path, "reference_pairs")
    assert line["pairs"] == reference["reference_pairs"] == 2
    distance = abs(line["loss"] - math.log(2))
    assert distance < 1e-5 if loss != "ins_dpo" else distance > 1e-2
