"""Hugging Face directories in and out: what is written is what was read, and others can load it."""

import json
import shutil

import huggingface_hub
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import model as model_file
from conftest import write_model
from data import build_row, lay_out
from hub import weights
from jobs.cli import UserError
from jobs.files import write_json
from model import Transformer, config_of, load, load_weights, read_config

FP32 = tiny.LLAMA | {"dtype": "float32"}


def export(model, source, directory, shard_bytes=5 * 10**9):
    """What train.py does at the end of a run."""
    named = ((n, p.detach()) for n, p in model.named_parameters())
    model_file.export(
        directory, model.config, named, source, torch.float32, tiny.CHATML, shard_bytes=shard_bytes
    )
    return directory


def tensors_of(directory):
    return {k: t for f in directory.glob("*.safetensors") for k, t in load_file(f).items()}


def as_reward_model(directory):
    """The language model in `directory` with a random scalar head on top, unsaved."""
    raw, _ = read_config(directory)
    model = Transformer(config_of(raw | {"architectures": ["LlamaForSequenceClassification"]}))
    load_weights(model, directory)
    assert not model.score.weight.any(), "a new head starts at reward 0"
    torch.nn.init.normal_(model.score.weight)
    return model.eval()


# ----------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 20_000])
@pytest.mark.parametrize("tied", [True, False])
def test_saved_tensors_equal_the_loaded_ones_byte_for_byte(tied, shard_bytes, tmp_path):
    source = write_model(tmp_path / "a", FP32 | {"tie_word_embeddings": tied})
    out = export(load(source), source, tmp_path / "b", shard_bytes)
    before, after = tensors_of(source), tensors_of(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert ("lm_head.weight" in after) == (not tied), "a tied head is stored once"
    assert load(out).state_dict().keys() == load(source).state_dict().keys()


def test_a_sharded_save_has_bounded_files_and_a_true_index(tiny_model_dir, tmp_path):
    out = export(load(tiny_model_dir), tiny_model_dir, tmp_path / "out", shard_bytes=20_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    n = len(files)
    assert n > 2 and not (out / "model.safetensors").exists()
    assert files == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    assert {f.name for f in out.glob("*.safetensors")} == set(files)
    for file in files:
        held = load_file(out / file)
        assert sorted(held) == sorted(k for k, f in index["weight_map"].items() if f == file)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= 20_000
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(out).values())


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 20_000])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_an_export_with_equal_logits(tied, shard_bytes, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = write_model(tmp_path / "a", FP32 | {"tie_word_embeddings": tied})
    out = export(load(source), source, tmp_path / "b", shard_bytes)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True
    )
    assert theirs.dtype == torch.float32, "config.json names the dtype of the weights"
    assert not any(report.values()), report
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert (theirs(tokens).logits - load(source).logits(tokens)).abs().max() <= 1e-4


def test_transformers_loads_a_reward_head_with_equal_rewards(tiny_model_dir, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = as_reward_model(tiny_model_dir)
    out = export(model, tiny_model_dir, tmp_path / "out")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert theirs.num_labels == 1
    tokens = torch.arange(10, 50)
    row = build_row([lay_out([([tokens.numpy()], 1)], score="last")], [0], 1)
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0, 0]
        assert torch.allclose(model(row)[0], expected, atol=1e-5)
        assert torch.equal(load(out)(row), model(row)), "and we load our own"


def test_transformers_reads_the_exported_template_and_generation_settings(tiny_model_dir, tmp_path):
    transformers = pytest.importorskip("transformers")
    out = export(load(tiny_model_dir), tiny_model_dir, tmp_path / "out")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n"
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert (generation.temperature, generation.eos_token_id) == (0.7, 258)


def test_side_files_travel_and_the_template_stands_in_both_places(tiny_model_dir, tmp_path):
    source = shutil.copytree(tiny_model_dir, tmp_path / "source")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    write_json(source / "tokenizer_config.json", settings | {"chat_template": None})
    out = export(load(source), source, tmp_path / "out")
    for name in ("tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert (out / "chat_template.jinja").read_text() == tiny.CHATML
    written = json.loads((out / "tokenizer_config.json").read_text())
    assert written == settings | {"chat_template": tiny.CHATML}


def test_exported_weights_have_the_dtype_that_config_names(tiny_model_dir, tmp_path):
    model = load(tiny_model_dir)
    named = ((n, p.detach()) for n, p in model.named_parameters())
    model_file.export(tmp_path, model.config, named, tiny_model_dir, torch.bfloat16)
    assert {t.dtype for t in tensors_of(tmp_path).values()} == {torch.bfloat16}
    raw, _ = read_config(tmp_path)
    assert raw["dtype"] == "bfloat16" and "torch_dtype" not in raw


def test_a_model_whose_config_names_no_architecture_is_exported(tmp_path):
    source = write_model(tmp_path / "a", {k: v for k, v in FP32.items() if k != "architectures"})
    raw, _ = read_config(export(load(source), source, tmp_path / "b"))
    assert raw["architectures"] == ["LlamaForCausalLM"]


def test_only_the_rows_asked_for_are_read(tiny_model_dir):
    """How a sharded caller loads; the last of many ranks may hold no row at all."""
    stored, name = weights.Weights(tiny_model_dir), "model.norm.weight"
    whole = stored.read(name, (32,))
    assert torch.equal(stored.read(name, (32,), slice(8, 20)), whole[8:20])
    assert stored.read(name, (32,), slice(32, 32)).shape == (0,)


# ----------------------------------------------------------------------------- what can be wrong


@pytest.fixture
def broken(tiny_model_dir, tmp_path):
    """A copy of the model in three shards, to be damaged."""
    return export(load(tiny_model_dir), tiny_model_dir, tmp_path / "copy", shard_bytes=30_000)


def missing_shard(directory):
    sorted(directory.glob("*.safetensors"))[1].unlink()
    return "model-00002"


def truncated_shard(directory):
    file = sorted(directory.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-10])
    return "model-00002.*not readable as safetensors"


def missing_tensor(directory):
    change_first(directory, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    return "model.embed_tokens.weight is missing"


def wrong_shape(directory):
    def cut(tensors):
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:, :31].clone()

    change_first(directory, cut)
    return r"model.embed_tokens.weight is \(260, 31\), expected \(260, 32\)"


def only_pickle(directory):
    for file in (*directory.glob("*.safetensors"), directory / "model.safetensors.index.json"):
        file.unlink()
    torch.save({}, directory / "pytorch_model.bin")
    return "no model.safetensors; weights must be safetensors"


def no_config(directory):
    (directory / "config.json").unlink()
    return "no config.json"


def broken_config(directory):
    (directory / "config.json").write_text("{")
    return "config.json.*JSON"


def broken_index(directory):
    (directory / "model.safetensors.index.json").write_text("{")
    return "model.safetensors.index.json.*JSON"


def change_first(directory, change):
    """Rewrite the shard that holds the embedding."""
    file = sorted(directory.glob("*.safetensors"))[0]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def index_of_absent_tensors(directory):
    change_index(directory, lambda where: where | {"model.none.weight": min(where.values())})
    return "model.none.weight is missing from model-00001"


def index_without_a_map(directory):
    write_json(directory / "model.safetensors.index.json", {"metadata": {}})
    return "index.json: no weight_map"


def index_of_files_elsewhere(directory):
    change_index(directory, lambda where: where | {"model.norm.weight": "../x.safetensors"})
    return "'../x.safetensors', which is no file beside it"


def tensor_in_two_files(directory):
    name = "model.norm.weight"
    last = load_file(sorted(directory.glob("*.safetensors"))[-1])
    change_first(directory, lambda tensors: tensors.update({name: last[name]}))
    return f"{name} is in another file too"


def extra_tensor(directory):
    change_first(directory, lambda t: t.update({"model.adapter.lora_A.weight": torch.ones(3)}))
    return "1 tensors too many for its config.json, model.adapter.lora_A.weight"


def integer_tensor(directory):
    def quantise(tensors):
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(torch.int8)

    change_first(directory, quantise)
    return "model.embed_tokens.weight is stored as I8"


def header_of_garbage(directory):
    sorted(directory.glob("*.safetensors"))[0].write_bytes(b"\xff" * 64)
    return "model-00001.*not readable as safetensors"


def untied_head(directory):
    change_first(directory, lambda t: t.update({"lm_head.weight": torch.ones(260, 32)}))
    return "lm_head.weight differs from the embedding"


def remote_code(directory):
    change_config(directory, {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}})
    return "auto_map .* asks for code of its own, which is never run"


def quantised(directory):
    change_config(directory, {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    return "quantization_config .* is not supported"


def cut_config(directory):
    raw = json.loads((directory / "config.json").read_text())
    raw.pop("num_attention_heads")
    write_json(directory / "config.json", raw)
    return "no num_attention_heads; not a whole config.json"


def config_of_wrong_kinds(directory):
    change_config(directory, {"num_hidden_layers": "2"})
    return "num_hidden_layers is '2', not a whole number above 0"


def config_without_sense(directory):
    change_config(directory, {"rope_scaling": 8.0})
    return "a field is of the wrong kind: .*float"


def change_index(directory, change):
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    write_json(file, index | {"weight_map": change(index["weight_map"])})


def change_config(directory, changes):
    raw = json.loads((directory / "config.json").read_text())
    write_json(directory / "config.json", raw | changes)


STRANGE = [index_of_absent_tensors, index_without_a_map, index_of_files_elsewhere, extra_tensor]
STRANGE += [tensor_in_two_files, integer_tensor, header_of_garbage, untied_head, remote_code]
STRANGE += [quantised, cut_config, config_of_wrong_kinds, config_without_sense]
DAMAGE = [missing_shard, truncated_shard, missing_tensor, wrong_shape, only_pickle, no_config]


@pytest.mark.parametrize("damage", [*DAMAGE, broken_config, broken_index, *STRANGE])
def test_a_damaged_directory_is_told_in_one_line(damage, broken):
    load(broken)  # whole so far
    message = damage(broken)
    with pytest.raises(UserError, match=message) as caught:
        load(broken)
    assert str(broken) in str(caught.value) and "\n" not in str(caught.value)


def test_a_pickle_is_refused_with_the_way_out(broken):
    only_pickle(broken)
    with pytest.raises(UserError, match="pytorch_model.bin is a pickle.*save_pretrained"):
        load(broken)


def test_a_head_that_equals_the_tied_embedding_and_old_buffers_do_no_harm(broken):
    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    tokens, before = torch.arange(40)[None], load(broken)
    change_first(broken, add)
    assert torch.equal(load(broken).logits(tokens), before.logits(tokens))


def test_the_digest_changes_with_the_weights_alone(tiny_model_dir, broken):
    before = weights.Weights(broken).digest()
    (broken / "README.md").write_text("another file")
    assert weights.Weights(broken).digest() == before
    change_first(broken, lambda tensors: tensors["model.embed_tokens.weight"][0].add_(1e-3))
    assert weights.Weights(broken).digest() != before


# ----------------------------------------------------------------------------- other kinds


def write_adapter(directory, **base):
    write_json(directory / "adapter_config.json", {"peft_type": "LORA"} | base)


def write_run(directory, *models):
    write_json(directory / "config.json", {"settings": {}, "versions": {}})
    for name in models:
        (directory / name).mkdir()
        write_json(directory / name / "config.json", tiny.LLAMA)


def write_checkpoint(directory):
    write_json(directory / "state.json", {"step": 3})
    (directory / "rank-0.safetensors").write_bytes(b"")


def write_snapshot(directory):
    (directory / "snapshots" / "0a1b").mkdir(parents=True)
    write_json(directory / "snapshots" / "0a1b" / "config.json", tiny.LLAMA)


OTHER_KINDS = {  # what a directory holds -> what is told
    "an adapter": (
        lambda d: write_adapter(d, base_model_name_or_path="some/base"),
        r"an adapter \(LoRA\) of some/base.*merge_and_unload",
    ),
    "an adapter beside a model": (
        lambda d: (write_adapter(d), write_json(d / "config.json", tiny.LLAMA)),
        "an adapter",
    ),
    "a gguf": (lambda d: (d / "model-q4.gguf").write_bytes(b"GGUF"), "a GGUF.*safetensors"),
    "a run": (lambda d: write_run(d, "best", "final"), "a folder.*its models: .*/final, .*/best$"),
    "a run with its best alone": (lambda d: write_run(d, "best"), "a folder.*its models: .*/best$"),
    "a run that has not ended": (write_run, "a folder.*it has no model yet"),
    "a checkpoint": (write_checkpoint, "a checkpoint of train.py.*evaluate.py extract"),
    "the hub's cache": (write_snapshot, "a folder.*its models: .*/snapshots/0a1b$"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_what_is_near_to_a_model_is_named_with_the_way_out(kind, tmp_path):
    write, told = OTHER_KINDS[kind]
    write(tmp_path)
    with pytest.raises(UserError, match=f"^--ref_model {tmp_path} is {told}") as caught:
        weights.resolve(tmp_path, "--ref_model")
    assert "\n" not in str(caught.value)


def test_an_adapter_of_the_hub_is_named_too(tmp_path, monkeypatch):
    write_adapter(tmp_path, base_model_name_or_path="some/base")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    with pytest.raises(UserError, match="an adapter"):
        weights.resolve("someone/an-adapter")


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors"])
def test_a_file_is_no_model_directory(name, tmp_path):
    (tmp_path / name).write_bytes(b"")
    told = "is a GGUF" if name == "model.gguf" else "is a file; give the directory"
    with pytest.raises(UserError, match=told):
        weights.resolve(tmp_path / name)


# ----------------------------------------------------------------------------- hub ids


def test_a_hub_id_is_downloaded_without_pickles(tiny_model_dir, monkeypatch):
    asked = []

    def snapshot(name, allow_patterns, revision):
        asked.append((name, allow_patterns))
        assert revision == "v1.0"
        return str(tiny_model_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert weights.resolve("someone/a-model@v1.0") == tiny_model_dir
    (name, patterns), *rest = asked
    assert name == "someone/a-model" and not rest
    assert "*.safetensors" in patterns and not any("bin" in p or "py" in p for p in patterns)


def test_a_directory_wins_over_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "someone" / "a-model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert str(weights.resolve("someone/a-model")) == "someone/a-model"


def test_an_unreachable_hub_is_told_in_one_line(monkeypatch):
    def snapshot(*args, **kwargs):
        raise ConnectionError("no route to host\nand many more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(UserError, match="--ref_model someone/a-model.*no route") as caught:
        weights.resolve("someone/a-model", "--ref_model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["no/such/directory", "./nowhere", "nowhere"])
def test_what_is_neither_directory_nor_hub_id_is_told_without_asking_the_hub(source, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UserError, match=f"--model {source}: no such directory"):
        weights.resolve(source)
