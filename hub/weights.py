"""Hugging Face directories in and out: config.json, safetensors, tokenizer files, chat template.

Only safetensors, never pickle. Weights are read by slices, so that a sharded caller never holds
more than its own part, and written as a stream of bounded files. Nothing here knows a model: what
its tensors and fields are called is model.py's and families/'s.
"""

import dataclasses
import hashlib
import os
import re
import shutil
from pathlib import Path

import huggingface_hub
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from jobs.cli import UserError
from jobs.files import checksum, read_json, write_json


def pinned(s):
    """Settings in which --revision R with --model ID has become --model ID@R, the hub's notation.

    So has --ref_model or --ref of the same id: what is made of the model says which one it was.
    """
    if (revision := getattr(s, "revision", None)) is None or f"{s.model}".endswith(f"@{revision}"):
        return s
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", s.model or "") and not Path(s.model).exists()
    if not hub or getattr(s, "endpoint", None):
        raise UserError(f"--revision {revision}: --model {s.model} is no hub id, which it pins")
    flags = [f for f in ("model", "ref_model", "ref") if getattr(s, f, None) == s.model]
    return dataclasses.replace(s, **dict.fromkeys(flags, f"{s.model}@{revision}"))


def fetch(ranks, source, flag):
    """Directory of a model, downloaded by rank 0 first and then found by all (on every node)."""
    ranks.share(lambda: resolve(source, flag))
    return resolve(source, flag)


def resolve(source, flag="--model"):
    """A local directory, or a hub id or ID@REVISION, which is downloaded -> Path."""
    if Path(source).exists():
        refuse_other_kinds(Path(source), flag)
        return Path(source)
    if not (found := re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", str(source))):
        raise UserError(f"{flag} {source}: no such directory")
    try:
        name, revision = found.groups()
        wanted = {"allow_patterns": ["*.safetensors", "*.json", "*.jinja"], "revision": revision}
        found = Path(huggingface_hub.snapshot_download(name, **wanted))
    except Exception as error:  # the hub client raises some twenty kinds; all mean: not reachable
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        fault = f"no such directory, and the hub did not serve it: {reason}"
        raise UserError(f"{flag} {source}: {fault}") from error
    refuse_other_kinds(found, flag)
    return found


def refuse_other_kinds(path, flag):
    """UserError for an adapter, a GGUF, a run directory, a checkpoint or a single file."""
    config, adapter = path / "config.json", path / "adapter_config.json"
    inner = [file.parent for file in path.glob("*/config.json")]
    inner = sorted([*inner, *(file.parent for file in path.glob("snapshots/*/config.json"))])
    if adapter.exists():  # also beside whole weights: transformers would add it to its base
        base = read_json(adapter).get("base_model_name_or_path")
        fault = f"an adapter (LoRA) of {base}, not a whole model; merge it: "
        fault += "peft's AutoPeftModelForCausalLM.from_pretrained, merge_and_unload, "
        fault += "save_pretrained, and copy the tokenizer's files beside the weights"
    elif path.suffix == ".gguf" or not config.exists() and any(path.glob("*.gguf")):
        fault = "a GGUF, quantised for llama.cpp; take the safetensors that it was made from"
    elif path.is_file():
        fault = "a file; give the directory that holds config.json and *.safetensors"
    elif (path / "state.json").exists() and any(path.glob("rank-*.safetensors")):
        fault = "a checkpoint of train.py; `python evaluate.py extract` makes a model of it"
    elif config.exists() and "settings" in read_json(config) or not config.exists() and inner:
        named = [d for d in inner if d.name in ("final", "best")][::-1] or inner
        cure = f"its models: {', '.join(map(str, named))}" if named else "it has no model yet"
        fault = f"a folder around models, as a run of train.py makes it; {cure}"
    else:
        return
    raise UserError(f"{flag} {path} is {fault}")


class ConfigFields:
    """A config.json that notes what was read of it, so that nothing is passed over in silence."""

    # fields that change no logits of ours: bookkeeping, initialisation, dropout, generation
    HARMLESS = re.compile(
        r"_.*|transformers_version|(torch_)?dtype|use_cache|(pad|bos|eos|unk|sep|cls)_token(_id)?"
        r"|initializer_range|initializer_factor|max_position_embeddings|pretraining_tp"
        r"|(attention|hidden|classifier)_dropout|rope_theta"
        r"|name_or_path|architectures|problem_type|num_labels|id2label|label2id|finetuning_task"
        r"|task_specific_params|tokenizer_class|model_name|return_dict|output_\w+|torchscript"
        r"|cache_implementation|is_decoder|unsloth_\w+|max_length|min_length|do_sample|num_beams"
        r"|temperature|top_k|top_p|repetition_penalty|length_penalty|num_return_sequences"
    )
    LLAMA3 = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    ROPE = {"default": [], "linear": ["factor"], "llama3": LLAMA3}  # rope_type -> what it needs

    def __init__(self, raw, where):
        self.raw, self.where, self.seen = raw, where, set()

    def get(self, name, default=None):
        self.seen.add(name)
        return self.raw.get(name, default)

    def need(self, name):
        if (value := self.get(name)) is None:
            raise UserError(f"{self.where}: no {name}; not a whole config.json")
        return value

    def size(self, name, default=None):
        """How many there are of something: a whole number, at least one."""
        value = self.need(name) if default is None else self.get(name) or default
        if type(value) is not int or value < 1:
            raise UserError(f"{self.where}: {name} is {value!r}, not a whole number above 0")
        return value

    def one_of(self, name, default, *others):
        value = self.get(name) or default
        return value if value in (default, *others) else self.refuse(name, value)

    def rope(self, theta="rope_theta", share=1.0):
        """Rotary settings in both spellings: rope_theta + rope_scaling, or rope_parameters.

        theta: the field of the base; share: of a head that rotates, 1 where no other may be said.
        """
        new, old = self.get("rope_parameters"), self.get("rope_scaling")
        rope = {"rope_theta": self.get(theta, 10000.0), "partial_rotary_factor": share}
        rope |= new or old or {}
        kind = rope.setdefault("rope_type", rope.pop("type", "default"))  # type: its older name
        if kind not in self.ROPE:
            self.refuse("rope_type", kind)
        if missing := [name for name in self.ROPE[kind] if name not in rope]:
            raise UserError(f"{self.where}: rope_type {kind!r} without {missing[0]}")
        for name in rope.keys() - {"rope_type", "rope_theta", *self.LLAMA3}:
            if rope[name] and (name != "partial_rotary_factor" or share == 1 != rope[name]):
                self.refuse(f"rope_parameters: {name}", rope[name])
        return rope | {"partial_rotary_factor": rope["partial_rotary_factor"] or share}

    def positions(self, rope):
        """How many positions the model was made for, or None where it does not say.

        Linear scaling (and yarn, dynamic) stretches what max_position_embeddings says, unless it
        names another original; llama3's says what came of it. As vLLM reads it.
        """
        if (said := self.get("max_position_embeddings")) is None:
            return None
        said = self.size("max_position_embeddings")
        if rope["rope_type"] in ("default", "llama3"):
            return said
        return max(said, int(rope.get("original_max_position_embeddings", said) * rope["factor"]))

    def refuse(self, name, value, cure=""):
        raise UserError(f"{self.where}: {name} {value!r} is not supported{cure}")

    def refuse_rest(self):
        """UserError for a field that nobody read, unless it is harmless or switched off."""
        for name, value in self.raw.items():
            if value and name not in self.seen and not self.HARMLESS.fullmatch(name):
                cure = "; delete the field if it does not change what the model computes"
                self.refuse(name, value, cure)


class Weights:
    """The safetensors files of a directory, read tensor by tensor or by slices of their rows."""

    FLOATS = ("F64", "F32", "F16", "BF16")  # what a weight may be stored as
    # buffers of old checkpoints, which config.json implies
    BUFFERS = re.compile(r".*\.(rotary_emb\.inv_freq|attention\.(masked_)?bias)")
    PICKLE = "is a pickle, which can run code when it is loaded. If you trust it: "
    PICKLE += "transformers' from_pretrained, then save_pretrained"

    def __init__(self, directory):
        self.directory = directory = Path(directory)
        index = directory / "model.safetensors.index.json"
        where = _weight_map(index) if index.exists() else {}
        names = sorted(set(where.values())) or ["model.safetensors"]
        self.files, self._open = [directory / name for name in names], {}
        for file in self.files:
            if not file.exists():
                cure = "weights must be safetensors files"
                if pickles := sorted([*directory.glob("*.bin"), *directory.glob("*.pt*")]):
                    cure += f", and {pickles[0].name} {self.PICKLE}"
                raise UserError(f"{directory}: no {file.name}; {cure}")
            try:
                opened = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise UserError(f"{file}: not readable as safetensors: {error}") from error
            for name in opened.keys():  # noqa: SIM118
                if self._open.setdefault(name, opened) is not opened:
                    raise UserError(f"{file}: tensor {name} is in another file too")
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
        if (found := tuple(tensor.get_shape())) != tuple(shape):
            raise UserError(f"{self.directory}: {name} is {found}, expected {tuple(shape)}")
        if tensor.get_dtype() not in self.FLOATS:
            kinds = f"{tensor.get_dtype()}, not one of {', '.join(self.FLOATS)}"
            raise UserError(f"{self.directory}: {name} is stored as {kinds}; use plain weights")
        return tensor[rows]

    def refuse_rest(self, used):
        """UserError for tensors that are not used, as of another architecture."""
        unused = self._open.keys() - set(used)
        if rest := sorted(name for name in unused if not self.BUFFERS.fullmatch(name)):
            fault = f"{len(rest)} tensors too many for its config.json, {rest[0]} for one"
            cure = "is it of another architecture, or an adapter?"
            raise UserError(f"{self.directory}: {fault}; {cure}")

    def digest(self):
        """sha256 over the content of all files."""
        sums = "".join(map(checksum, self.files))
        return hashlib.sha256(bytes.fromhex(sums)).hexdigest()


def _weight_map(index):
    """{tensor name: file name} of model.safetensors.index.json."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{index}: no weight_map; not an index of safetensors files")
    for file in where.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index}: names {file!r}, which is no file beside it")
    return where


def write_directory(directory, source, tensors, dtype, template=None, fields=(), shard_bytes=5e9):
    """Writes a HF directory.

    source: the HF directory it came from, whose config.json, tokenizer and generation files are
    taken over; tensors: iterable of (name, full tensor), consumed one by one; template: text of the
    chat template; fields: of config.json that change; shard_bytes: largest weight file.
    """
    directory, source = Path(directory), Path(source)
    directory.mkdir(parents=True, exist_ok=True)
    side = "tokenizer.json tokenizer.model tokenizer_config.json added_tokens.json vocab.json"
    side += " merges.txt special_tokens_map.json generation_config.json"
    for name in side.split():
        if (source / name).exists():
            shutil.copyfile(source / name, directory / name)
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
        settings = read_json(directory / "tokenizer_config.json")  # some programs look there
        write_json(directory / "tokenizer_config.json", settings | {"chat_template": template})
    raw = read_json(source / "config.json") | {"dtype": str(dtype).removeprefix("torch.")}
    raw.pop("torch_dtype", None)  # its older spelling
    write_json(directory / "config.json", raw | dict(fields))
    _write_shards(directory, ((name, t.to("cpu", dtype)) for name, t in tensors), shard_bytes)


def _write_shards(directory, named, shard_bytes):
    """Streams tensors into files of bounded size; several files get an index."""
    shards, held = [], {}  # {name: bytes} of each file, and {name: tensor} of the next

    def flush():
        file = directory / f"shard-{len(shards)}.safetensors"  # of how many is not known yet
        save_file(held, file, metadata={"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in held.items()})
        held.clear()

    for name, tensor in named:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > shard_bytes:
            flush()
        held[name] = tensor.contiguous()
    flush()
    n, weight_map = len(shards), {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{n:05d}.safetensors" if n > 1 else "model.safetensors"
        os.replace(directory / f"shard-{i}.safetensors", directory / file)
        weight_map |= dict.fromkeys(names, file)
    if n > 1:
        total = sum(sum(names.values()) for names in shards)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)
