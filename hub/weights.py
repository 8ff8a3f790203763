"""Hugging Face directories in and out: config.json, safetensors, tokenizer files, chat template.

Only safetensors, never pickle. Weights are read by slices, so that a sharded caller never holds
more than its own part, and written as a stream of bounded files.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from families import FAMILIES, Config, hf_name
from jobs.cli import UserError
from jobs.files import parse_json, write_json


def pin(s):
    """--revision R with --model ID is --model ID@R, the hub's own notation; changes s, returns it.

    So is --ref_model or --ref of the same id. Whatever is made of the model then also says which
    one it was. UserError where --model is no hub id.
    """
    if (revision := getattr(s, "revision", None)) is None:
        return s
    model = s.model
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", model or "") and not Path(model).exists()
    if not hub or getattr(s, "endpoint", None):
        raise UserError(f"--revision {revision}: --model {model} is no hub id, which it pins")
    for flag in ("model", "ref_model", "ref"):
        if getattr(s, flag, None) == model:
            setattr(s, flag, f"{model}@{revision}")
    return s


def resolve(source, flag="--model"):
    """A local directory, or a hub id (downloaded: safetensors, tokenizer and configs) -> Path.

    ID@REVISION: a branch, tag or commit on the hub, else its main branch.
    """
    if Path(source).is_dir():
        return Path(source)
    if not (found := re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", str(source))):
        raise UserError(f"{flag} {source}: no such directory")
    import huggingface_hub

    try:
        name, revision = found.groups()
        patterns = ["*.safetensors", "*.json", "*.jinja"]
        options = {"allow_patterns": patterns, "revision": revision}
        return Path(huggingface_hub.snapshot_download(name, **options))
    except Exception as error:  # the hub client raises some twenty kinds; all mean: not reachable
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{flag} {source}: no such directory, and the hub did not serve it: {reason}"
        ) from error


def read_config(directory):
    """config.json of a HF directory -> (raw dict, Config)."""
    file = Path(directory) / "config.json"
    if not file.exists():
        raise UserError(f"{directory}: no config.json; not a Hugging Face model directory")
    raw = parse_json(file.read_text(encoding="utf-8"), str(file))
    return raw, Config.from_hf(raw, str(file))


class Weights:
    """The safetensors files of a directory, read tensor by tensor or by slices of their rows."""

    FLOATS = ("F64", "F32", "F16", "BF16")  # what a weight may be stored as

    def __init__(self, directory):
        self.directory = Path(directory)
        index = self.directory / "model.safetensors.index.json"
        where = _weight_map(index) if index.exists() else {}
        names = sorted(set(where.values())) or ["model.safetensors"]
        self.files = [self.directory / name for name in names]
        for file in self.files:
            if not file.exists():
                raise UserError(f"{self.directory}: no {file.name}; {_no_weights(self.directory)}")
        self._open = {}
        for file in self.files:
            try:
                opened = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise UserError(f"{file}: not readable as safetensors: {error}") from error
            for name in opened.keys():  # noqa: SIM118
                if name in self._open:
                    raise UserError(f"{file}: tensor {name} is in another file too")
                self._open[name] = opened
        if absent := sorted(where.keys() - self._open.keys()):
            missing = f"{absent[0]} is missing from {where[absent[0]]}"
            raise UserError(f"{index}: tensor {missing}; download the files again")

    def __contains__(self, name):
        return name in self._open

    def read(self, name, shape, rows=slice(None)):
        """Rows of one tensor, which must have the given full shape; UserError if it does not."""
        if name not in self:
            raise UserError(f"{self.directory}: tensor {name} is missing")
        tensor = self._open[name].get_slice(name)
        if tuple(tensor.get_shape()) != tuple(shape):
            found = tuple(tensor.get_shape())
            raise UserError(f"{self.directory}: {name} is {found}, expected {tuple(shape)}")
        if tensor.get_dtype() not in self.FLOATS:
            kinds = f"{tensor.get_dtype()}, not one of {', '.join(self.FLOATS)}"
            raise UserError(f"{self.directory}: {name} is stored as {kinds}; use plain weights")
        return tensor[rows]

    # buffers of old checkpoints, which config.json implies
    BUFFERS = re.compile(r".*\.(rotary_emb\.inv_freq|attention\.(masked_)?bias)")

    def refuse_rest(self, used, spare=()):
        """UserError for tensors that are neither used nor spare, as of another architecture."""
        rest = [n for n in self._open if n not in used and n not in spare]
        if rest := sorted(n for n in rest if not self.BUFFERS.fullmatch(n)):
            raise UserError(
                f"{self.directory}: {len(rest)} tensors too many for its config.json, {rest[0]} "
                "for one; is it of another architecture, or an adapter?"
            )

    def digest(self):
        """sha256 over the content of all files."""
        sha = hashlib.sha256()
        for file in self.files:
            with open(file, "rb") as f:
                sha.update(hashlib.file_digest(f, "sha256").digest())
        return sha.hexdigest()


def _weight_map(index):
    """{tensor name: file name} of model.safetensors.index.json."""
    content = parse_json(index.read_text(encoding="utf-8"), str(index))
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not where:
        raise UserError(f"{index}: no weight_map; not an index of safetensors files")
    for file in where.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index}: names {file!r}, which is no file beside it")
    return where


def _no_weights(directory):
    """What to do about a directory without its safetensors files."""
    if not (pickles := sorted([*directory.glob("*.bin"), *directory.glob("*.pt*")])):
        return "weights must be safetensors files"
    return (
        f"weights must be safetensors files, and {pickles[0].name} is a pickle, which can run code "
        "when it is loaded. If you trust it: transformers' from_pretrained, then save_pretrained"
    )


def load_weights(model, directory, local=lambda parameter: (parameter, slice(None))):
    """Fill the model's parameters from a HF directory.

    local(parameter) -> (tensor, rows): the part to fill and which rows of the whole it is. A
    sharded caller hands in its shards, so that no process ever reads more than its slices.
    """
    (_, config), weights = read_config(directory), Weights(directory)
    names = {name: hf_name(model.config.family, name) for name, _ in model.named_parameters()}
    head = hf_name(model.config.family, "head.weight")  # may be there, and not be used
    unused = model.config.tied or model.config.head == "reward"
    weights.refuse_rest(names.values(), [head] if unused else ())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            theirs = names[name]
            tensor, rows = local(parameter)
            if name == "score.weight" and config.head != "reward":
                tensor.zero_()  # a new reward head on a language model starts at r = 0
            else:
                tensor.copy_(weights.read(theirs, parameter.shape, rows))
            if name == "embed.weight" and model.config.tied and head in weights:
                _check_tied(tensor, weights, head, parameter.shape, rows)


def _check_tied(embedding, weights, head, shape, rows):
    if not torch.equal(embedding, weights.read(head, shape, rows).to(embedding)):
        raise UserError(
            f"{weights.directory}: {head} differs from the embedding, but config.json says "
            "tie_word_embeddings; set it to false there"
        )


SIDE_FILES = (  # what travels with the weights, unchanged
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)


def save(directory, config, tensors, source, dtype, template=None, shard_bytes=5 * 10**9):
    """Write a HF directory that transformers and vLLM load.

    config: Config of the model; tensors: iterable of (our name, full tensor), consumed one by one;
    source: the HF directory it came from (config.json, tokenizer and generation files are taken
    over); template: chat template text to store; shard_bytes: largest weight file.
    """
    directory, source = Path(directory), Path(source)
    directory.mkdir(parents=True, exist_ok=True)
    for name in SIDE_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, directory / name)
    _write_template(directory, template)
    raw, _ = read_config(source)
    raw |= {"dtype": str(dtype).removeprefix("torch.")}
    raw.pop("torch_dtype", None)  # its older spelling
    if config.score == "linear":  # OASST's and ArmoRM's classes keep their names
        kind = "ForSequenceClassification" if config.head == "reward" else "ForCausalLM"
        raw |= {"architectures": [FAMILIES[config.family].stem + kind]}
    if config.head == "reward":
        raw |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    write_json(directory / "config.json", raw)
    named = ((hf_name(config.family, name), t.to("cpu", dtype)) for name, t in tensors)
    _write_shards(directory, named, shard_bytes)


def _write_template(directory, template):
    """The chat template, both as a file and in tokenizer_config.json."""
    if template is None:
        return
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    file = directory / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    write_json(file, settings | {"chat_template": template})


def _write_shards(directory, named, shard_bytes):
    """Stream tensors into files of bounded size; several files get an index."""
    shards, held, size = [], {}, 0
    for name, tensor in named:
        if held and size + tensor.nbytes > shard_bytes:
            shards.append(_flush(directory, held, len(shards)))
            held, size = {}, 0
        held[name] = tensor.contiguous()
        size += tensor.nbytes
    shards.append(_flush(directory, held, len(shards)))
    if len(shards) == 1:
        os.replace(directory / shards[0][0], directory / "model.safetensors")
        return
    weight_map, total = {}, 0
    for i, (file, names, nbytes) in enumerate(shards):
        final = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(directory / file, directory / final)
        weight_map |= dict.fromkeys(names, final)
        total += nbytes
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)


def _flush(directory, tensors, number):
    file = f"shard-{number}.safetensors"
    save_file(tensors, directory / file, metadata={"format": "pt"})
    return file, list(tensors), sum(t.nbytes for t in tensors.values())
