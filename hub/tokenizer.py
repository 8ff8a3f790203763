"""Reads a checkpoint's tokenizer as transformers does: tokenizer.json, and the tokens beside it.

Special tokens may stand in tokenizer.json, in tokenizer_config.json (`added_tokens_decoder` with
their ids, `eos_token`, `extra_special_tokens`, …), or in files of older versions:
special_tokens_map.json and added_tokens.json, which count where there is no added_tokens_decoder.
"""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.pre_tokenizers import Metaspace

from jobs.cli import UserError
from jobs.files import read_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json")  # fmt: skip
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_tokenizer(directory):
    """Path -> (tokenizers.Tokenizer without padding or truncation, {"eos_token": its text, …}).

    UserError for files that cannot be read, and for a token whose id stands nowhere but in a list
    that does not fit tokenizer.json: any id given to it would be made up.
    """
    file = directory / TOKENIZER_FILES[0]
    if not file.exists():
        raise UserError(f"{directory}: no tokenizer.json; save the tokenizer in its fast form")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # what tokenizers raises is nothing more special
        raise UserError(f"{file}: not readable as a tokenizer: {error}") from error
    build_anew(tokenizer, directory)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    known = tokenizer.get_added_tokens_decoder()
    try:
        listed, special, names = tokens_beside(directory, known)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        fault = f"{directory}: a special token of tokenizer_config.json or of the files beside it"
        raise UserError(f"{fault} is of the wrong kind: {error}") from error
    flags = {repr(token) for token in known.values()}  # the same name with other flags gets these
    more = {t.content: t for _, t in sorted(listed.items()) if repr(t) not in flags}
    # those without an id are part of the vocabulary, or get the next free one
    own = {token.content for token in known.values()}
    more |= {text: t for text, t in special.items() if text not in own and text not in more}
    for text in more.keys() & set(names.values()):
        more[text].special = True
    new = {n: t.content for n, t in listed.items() if tokenizer.token_to_id(t.content) is None}
    tokenizer.add_tokens(list(more.values()))
    for number, text in new.items():
        if (found := tokenizer.token_to_id(text)) != number:
            fault = f"{directory}: {text!r} has id {number}, behind tokenizer.json comes {found}"
            raise UserError(f"{fault}; save the tokenizer again, in its fast form")
    return tokenizer, names


def build_anew(tokenizer, directory):
    """Changes a tokenizer of class LlamaTokenizer as transformers 5 does, which builds it anew.

    Whatever normalizer tokenizer.json has, no mark is put before a text that begins with a space.
    """
    settings = read_json(directory / "config.json") | read_json(directory / TOKENIZER_FILES[1])
    kind = (settings.get("tokenizer_class") or "").removesuffix("Fast")
    steps = f"{tokenizer.pre_tokenizer} {tokenizer.decoder}"
    as_it_lies = settings.get("model_type") in ("mistral", "mixtral", "phi3")
    if kind == "LlamaTokenizer" and not as_it_lies and "ByteLevel" not in steps:
        scheme = "always" if settings.get("legacy") else "first"
        scheme = "never" if settings.get("add_prefix_space") is False else scheme
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = Metaspace(prepend_scheme=scheme, split=False)


def tokens_beside(directory, known):
    """What stands beside tokenizer.json; known: ids of the added tokens that it has itself.

    -> ({id: AddedToken}, {text: AddedToken} of special ones, {"eos_token": text, …} of named ones).
    """
    _, settings, beside, added = (read_json(directory / name) for name in TOKENIZER_FILES)
    extra = [extra_tokens(settings)]
    if old := "added_tokens_decoder" not in settings:
        settings, extra = settings | beside, [*extra, extra_tokens(beside)]
    # those of NAMED first: new ones get their ids in this order
    named = {name: settings.get(name) for name in NAMED}
    named |= {name: value for name, value in settings.items() if name.endswith("_token")}
    for group in (group for group in extra if isinstance(group, dict)):
        named |= group
    extra = [token for group in extra if not isinstance(group, dict) for token in group]
    named = {k: added_token(v) for k, v in named.items() if not isinstance(v, bool | None)}
    special = {token.content: token for token in (*named.values(), *map(added_token, extra))}
    if old:
        added = {n: text for text, n in added.items() if n not in known}
        ids = {int(n): AddedToken(text, special=text in special) for n, text in added.items()}
    else:
        ids = settings["added_tokens_decoder"].items()
        ids = {int(n): added_token(token, False) for n, token in ids}
    return ids, special, {name: token.content for name, token in named.items()}


def extra_tokens(settings):
    """A list of tokens, or an object of named ones, by its newer or its older name."""
    return settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []


def added_token(value, special=True):
    """A text, or an object of `content` and flags -> AddedToken; special: if it does not say."""
    if isinstance(value, str):
        return AddedToken(value, special=special)
    flags = {name: value[name] for name in FLAGS if name in value}
    return AddedToken(value["content"], **{"special": special} | flags)


def refuse_other_ids(directory, other, flag):
    """UserError unless both HF directories mean the same tokens by the same ids.

    A larger embedding, padded, does no harm.
    """
    ours, theirs = (read_tokenizer(Path(d))[0].get_vocab() for d in (directory, other))
    sizes = [read_json(Path(d) / "config.json").get("vocab_size") for d in (directory, other)]
    if wrong := [token for token in ours | theirs if ours.get(token) != theirs.get(token)]:
        fault = f"{wrong[0]!r} has id {theirs.get(wrong[0])}, not {ours.get(wrong[0])}"
    elif sizes[1] < min(sizes[0], 1 + max(ours.values())):
        fault = f"it has {sizes[1]} embeddings, not {sizes[0]}"
    else:
        return
    raise UserError(f"{flag} {other}: {fault} as in {directory}; the same ids must be the same")
