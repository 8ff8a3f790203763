"""Renders dialogues by a checkpoint's chat template and tokenises the text.

Prompt and answer are rendered together and tokenised apart, with no special tokens added, so that
no merge crosses the boundary and no BOS is doubled. Their ids join to those that transformers gives
the whole dialogue. Apart from merges, one thing stands against that: SentencePiece's tokenizers
(Llama 2, Mistral, Gemma) put a mark before a text, "The" becomes "▁The". So `encode` is told what
stands before, encodes it again in front of the text and takes its ids away.

What the template writes is control, what a message says is text: "<|im_end|>" inside an answer
becomes the ids of its letters, never the end token. (transformers' apply_chat_template makes it the
control token: such a row ends a turn that it does not end.) `render` puts a mark, SHIELD, into such
text, and `encode` reads marked text by a copy of the tokenizer in which control tokens have names
that no text holds. Text without a special token's name goes the plain way.

A template is a program from strangers. jinja2's sandbox keeps it from files and attributes, not
from `range` in `range` or from `"a" * 10 ** 10`: `bounded` limits its time and memory.
"""

import json
import re
import signal
import sys
import threading
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from pathlib import Path

import jinja2
import jinja2.ext
import numpy as np
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hub.tokenizer import read_tokenizer
from jobs.cli import UserError
from jobs.files import ASSETS, read_json, read_text

LINUX = sys.platform == "linux"
if LINUX:
    import resource  # Windows has none

INSTRUCTIONS = {  # IFSR's refining instructions (section 3.1, Table 6)
    "better": "please generate a better response",
    "another": "please generate another response",
    "worse": "please generate a worse response",
}
LONGEST = 10**7  # characters of a rendered dialogue
SHIELD = "\ufdd0"  # a noncharacter of Unicode: marks the text of a special token inside a message
PROBE = "qzx-answer-qzx"  # stands for an answer when the template is asked what it puts around one
PROBE_DIALOGUE = [{"role": "user", "content": "u"}, {"role": "assistant", "content": PROBE}]
STARTS = ("A", " A", "\nA", "é", ".")  # of texts: does a tokenizer encode them alike behind others?
INSIDE = "\ufdd1"  # another noncharacter, which no merge joins to what follows it

# Of models that were published without a template, by model_type (OASST's reward models); `plain`
# for base models, after HALOs' legacy form: a role line, the text, the end token; and what
# --fold_system puts in front: what the template then gets as `messages`.
OWN_TEMPLATES = {f.stem: f.read_text().strip() for f in (ASSETS / "templates").glob("*.jinja")}


class Refused(UserError):
    """The template refuses a dialogue (a system turn, turns that do not alternate, …)."""

    def __init__(self, directory, reason):
        super().__init__(f"{directory}: the chat template refuses: {reason}")
        self.reason = reason


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` renders its body, as in transformers."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Template:
    """A checkpoint's tokenizer and chat template, with transformers' semantics (sandboxed jinja2).

    end: the end-of-turn text that closes an answer ("<|im_end|>", "<|eot_id|>", …), told by a probe
    dialogue; fallback: True when the checkpoint has no template of its own.
    """

    def __init__(self, directory, fold_system=False):
        self.directory = Path(directory)
        self.tokenizer, tokens = read_tokenizer(self.directory)
        added = self.tokenizer.get_added_tokens_decoder().values()
        self._control = sorted((t.content for t in added if t.special), key=len, reverse=True)
        self._named = re.compile("|".join(map(re.escape, self._control)) or r"(?!)")
        files = (self.directory / f"{n}config.json" for n in ("tokenizer_", ""))
        settings, config = map(read_json, files)
        vocab = config.get("vocab_size")  # rows of the embedding, which may be padded
        self.vocab = vocab if isinstance(vocab, int) else None  # model.py tells of nonsense
        self.special = {"bos_token": "", "eos_token": ""} | tokens
        source = self._find(settings, config.get("model_type"))
        self.fallback, self.source = source is None, source or OWN_TEMPLATES["plain"]
        self.folds = OWN_TEMPLATES["fold_system"] * fold_system
        self.source = self.folds + self.source
        self._template = self._compile()
        self._seams = {"": []}  # what stands before a text -> its ids if they change that text's
        for self._in_parts in (False, True):  # some know contents as lists of parts alone
            try:
                probe = self.render(PROBE_DIALOGUE)
            except Refused as error:
                if self._in_parts or "str object" not in error.reason:
                    raise
                continue
            if PROBE in probe:
                break
        else:
            raise UserError(f"{directory}: the chat template leaves out what messages say")
        self.encode([probe])  # tells of control tokens that the model has not
        after = probe.rpartition(PROBE)[2]
        if probe == self.render(PROBE_DIALOGUE, generation=True):  # may always open a reply
            after = after[: next(self._named.finditer(after), re.search("$", after)).end()]
        self.end = after.strip() or self.special["eos_token"]
        if not self.end:
            cure = "name an eos_token in tokenizer_config.json"
            raise UserError(f"{directory}: no end of turn; {cure}")
        (self.end_ids,) = self.encode([self.end], behind=PROBE)

    def _find(self, settings, kind):
        """chat_template.jinja, else tokenizer_config.json's (maybe a list), its kind's, or None."""
        file = self.directory / "chat_template.jinja"
        if file.exists():
            return read_text(file)
        value = settings.get("chat_template")
        if isinstance(value, list):
            value = {t["name"]: t["template"] for t in value}.get("default")
        return value or OWN_TEMPLATES.get(kind)

    def _compile(self):
        """The template as a program, with the functions that transformers gives it."""

        def raise_exception(message):
            raise jinja2.TemplateError(message)

        tags = [jinja2.ext.loopcontrols, GenerationTag]
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=tags)
        env.filters["tojson"] = lambda x, **o: json.dumps(x, **{"ensure_ascii": False} | o)
        env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        env.globals["raise_exception"] = raise_exception
        try:
            with bounded():  # constants are folded, however large
                return env.from_string(self.source)
        except Exception as error:  # RecursionError, MemoryError, …
            raise UserError(f"{self.directory}: the chat template is broken: {error}") from error

    def render(self, messages, generation=False):
        """Messages -> text; generation=True opens the assistant's reply.

        Byte for byte what transformers renders, but for SHIELD inside the text of special tokens
        that messages hold. Raises Refused, in one line, where the template refuses the messages.
        """
        said = [self._shield(m["content"]) for m in messages]
        tools = [text for m, text in zip(messages, said, strict=True) if m["role"] == "tool"]
        tools += [c["function"]["name"] for m in messages for c in m.get("tool_calls", ())]
        said = [[{"type": "text", "text": t}] for t in said] if self._in_parts else said
        calls = [{k: self._shield(m[k]) for k in ("tool_calls",) if k in m} for m in messages]
        messages = [m | {"content": text} | more
                    for m, text, more in zip(messages, said, calls, strict=True)]  # fmt: skip
        known = {"messages": messages, "tools": None, "documents": None} | self.special
        try:
            with bounded():
                text = self._template.render(known, add_generation_prompt=generation)
            if len(text) > LONGEST:
                raise ValueError(f"its text is longer than {LONGEST} characters")
            if not all(word in text for word in re.findall(r"\w+", " ".join(tools))):
                raise ValueError("it leaves out tool calls, or what tools say")
            return text
        except Exception as error:  # a template is a program: TypeError, OverflowError, its own …
            reason, roles = " ".join(str(error).split()), [m["role"] for m in messages[:1]]
            if roles == ["system"] and not self.folds:
                reason += "; --fold_system puts a system turn into the user's"
            raise Refused(self.directory, reason) from error

    def _shield(self, text):
        """Mark the names of special tokens in what a message says, behind their first letter.

        text: or lists and objects of texts, as a tool's arguments.
        """
        if isinstance(text, list):
            return [self._shield(item) for item in text]
        if isinstance(text, dict):
            return {key: self._shield(item) for key, item in text.items()}
        if not isinstance(text, str):
            return text
        return self._named.sub(lambda m: m[0][0] + SHIELD + m[0][1:], text)

    def answer(self, messages, text, closed=True, prompt=None, followed=False):
        """The text of an answer as the template writes it behind the rendered prompt.

        Ends with `end` if closed, and with whatever white space the template puts after it if not.
        prompt: `messages` as rendered, where that is at hand. followed: as it stands before `turn`,
        where templates that think leave reasoning out, or end it otherwise.
        """
        prompt = self.render(messages, generation=True) if prompt is None else prompt
        said = [*messages, {"role": "assistant", "content": text}]
        more = [{"role": "user", "content": PROBE}] * followed
        whole = self.render([*said, *more], generation=followed)
        if followed:
            whole = whole.removesuffix(self.turn(PROBE))
        thinks = re.search(r"<think>\s*$", prompt)
        if not whole.startswith(prompt) and thinks and whole.startswith(prompt[: thinks.start()]):
            # The reply opens a block of reasoning, of which the finished dialogue shows nothing: it
            # is closed behind what the answer has of it, and empty before another turn.
            said = re.sub(r"^\s*(<think>\s*</think>)?\s*", "", whole[thinks.start() :])
            reasoning = "" if followed else self._shield(text).rpartition("</think>")[0]
            whole = prompt + reasoning.rpartition("<think>")[2].strip("\n")
            whole += f"\n</think>\n\n{said}"
        if not whole.startswith(prompt):  # a template that rewrites what came before
            return self._shield(text).strip() + self.end
        answer = whole[len(prompt) :]
        if followed:
            return answer
        if self.end not in answer:  # a template without an end of turn
            answer += self.end
        return answer[: answer.rindex(self.end) + len(self.end)] if closed else answer

    @cached_property
    def ends_in_turn(self):
        """Whether `end` also closes an earlier answer; else `turn` opens with what does."""
        return self.answer(PROBE_DIALOGUE[:1], PROBE, followed=True).endswith(self.end)

    @cached_property
    def rewrites(self):
        """Whether an answer that another turn follows is written otherwise than the last one."""
        texts, question = (PROBE, f"<think>\n{PROBE}\n</think>\n\n{PROBE}"), PROBE_DIALOGUE[:1]
        return any(self.answer(question, t) != self.answer(question, t, followed=True)
                   for t in texts)  # fmt: skip

    def joined(self, messages, answer, followed=False):
        """Ids of a dialogue up to the end token of its answer: the prompt's, then the answer's.

        followed: as in `answer`.
        """
        prompt = self.render(messages, generation=True)
        answer = self.answer(messages, answer, prompt=prompt, followed=followed)
        answer = self.encode([answer], behind=self.opening)
        return np.concatenate(self.encode([prompt]) + answer)

    @cached_property
    def opening(self):
        """What stands before an answer, from the question's last character on."""
        question = [{"role": "user", "content": PROBE}]
        return PROBE[-1] + self.render(question, generation=True).rpartition(PROBE)[2]

    def turn(self, instruction):
        """What stands between a closed answer and the next reply when the user asks for another."""
        asked = [*PROBE_DIALOGUE, {"role": "user", "content": instruction}]
        text = self.render(asked, generation=True)
        return text.partition(PROBE)[2].lstrip().removeprefix(self.end)

    def encode(self, texts, behind=""):
        """Texts -> list of (n,) int32 arrays, no special tokens added.

        In a text that `render` marked, marked names of special tokens are text, others control.
        behind: the end of what stands before each of them, "" at the beginning of a dialogue. Where
        a merge joins the two, that text keeps its ids, and these are what else would follow it.
        """
        texts, before = list(texts), self._seam(behind)
        if not len(before):
            return self._ids(texts)
        encoded = self._ids(behind + text for text in texts)
        for i, ids in enumerate(encoded):
            if behind == INSIDE or np.array_equal(ids[: len(before)], before):
                encoded[i] = ids[len(before) :]
            else:
                (encoded[i],) = self.encode([texts[i]], INSIDE)
        return encoded

    def _seam(self, behind):
        """Ids of a text, if a text behind it has others than alone (a mark less); else none."""
        if behind not in self._seams:
            (before,), behinds = self._ids([behind]), self._ids(behind + text for text in STARTS)
            changed = any(
                [*before, *own] != [*both] and [*before] == [*both[: len(before)]]
                for both, own in zip(behinds, self._ids(STARTS), strict=True)
            )
            self._seams[behind] = before if changed else []
        return self._seams[behind]

    def alike(self, a, b):
        """Whether a text has the same ids behind a and behind b."""
        return str(self.encode(STARTS, a)) == str(self.encode(STARTS, b))

    def _ids(self, texts):
        """Texts, each at the beginning -> their ids, marked names of special tokens as text."""
        texts = list(texts)
        encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        for i, text in enumerate(texts):
            if SHIELD in text:
                text = self._named.sub(lambda m: SHIELD + m[0], text)
                text = re.sub(f"{SHIELD}(?!{self._named.pattern})", "", text)
                encoded[i] = self._literal.encode(text, add_special_tokens=False)
        return [self._embedded(np.array(e.ids, dtype=np.int32)) for e in encoded]

    def _embedded(self, ids):
        """The ids, each of which must have a row in the model's embedding; else UserError."""
        if self.vocab is not None and (beyond := ids.max(initial=-1)) >= self.vocab:
            token = f"the tokenizer's {self.tokenizer.id_to_token(beyond)!r} has id {beyond}"
            fault = f"{self.directory}: {token}, but the model {self.vocab} embeddings"
            cure = "resize them, or mend the tokenizer"
            raise UserError(f"{fault} (vocab_size in config.json); {cure}")
        return ids

    def shortened(self, messages, ids, room):
        """A dialogue of these ids -> at most `room` ids, or none where no question would be left.

        Whole turns go from the left, then tokens from the middle of the question. What the template
        opens with (BOS, a system turn, the question's header) and the reply's opening stay.
        """
        roles = [m["role"] for m in messages]
        first = next((i for i, role in enumerate(roles) if role != "system"), 0)
        last = len(roles) - 1 - (roles[::-1].index("user") if "user" in roles else 0)
        system, turns, (question, *rest) = messages[:first], messages[first:last], messages[last:]
        while len(ids) > room and turns:
            users = (i for i, m in enumerate(turns) if i and m["role"] == "user")
            turns = turns[next(users, len(turns)) :]  # to the next question: roles still alternate
            dialogue = [*system, *turns, question, *rest]
            ids = self.encode([self.render(dialogue, generation=True)])[0]
        if len(ids) <= room:
            return ids
        probe = self.render([*system, question | {"content": PROBE}, *rest], generation=True)
        (probe,) = self.encode([probe])
        n = min(len(ids), len(probe))
        head = np.append(ids[:n] != probe[:n], True).argmax()  # tokens that open both
        tail = np.append(ids[::-1][:n] != probe[::-1][:n], True).argmax()
        kept = room - head - tail  # tokens of the question
        last = tail + kept // 2
        return np.concatenate([ids[: room - last], ids[len(ids) - last :]]) if kept > 0 else ids[:0]

    def lengths(self, texts):
        """Tokens of each text, as a message says it."""
        return [len(ids) for ids in self.encode(map(self._shield, texts))]

    @cached_property
    def _literal(self):
        """The tokenizer with SHIELD in front of every special token's name."""
        spec = json.loads(self.tokenizer.to_str())
        named = {name: SHIELD + name for name in self._control}
        for token in spec["added_tokens"]:
            token["content"] = named.get(token["content"], token["content"])
        model = spec["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {named.get(t, t): i for t, i in model["vocab"].items()}
        else:  # Unigram: [piece, score]
            model["vocab"] = [[named.get(t, t), score] for t, score in model["vocab"]]
        if "unk_token" in model:
            model["unk_token"] = named.get(model["unk_token"], model["unk_token"])
        return tokenizers.Tokenizer.from_str(json.dumps(spec))

    def decode(self, ids, skip_special=True):
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def separator(self):
        """InSPO's separator: a reserved special token that nothing else uses, else a blank line."""
        reserved = re.compile(r"reserved_special_token|^<unused|^<extra_id|^<\|?reserved")
        named = (t.content for _, t in sorted(self.tokenizer.get_added_tokens_decoder().items()))
        return next((t for t in named if reserved.search(t) and t != self.end), "\n\n")


def open_template(directory, fold_system=False):
    """The Template of a checkpoint; says on stderr where it has none and the plain one is used."""
    template = Template(directory, fold_system)
    if template.fallback:
        print(f"{directory} has no chat template: using the plain one", file=sys.stderr)
    return template


def with_suffix(messages, instruction):
    """IFSR's (x, i): the instruction as a suffix of the last user turn."""
    n = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=len(messages) - 1)
    asked = messages[n] | {"content": f"{messages[n]['content']}\n{instruction}"}
    return [*messages[:n], asked, *messages[n + 1 :]]


@contextmanager
def bounded(seconds=5.0, nbytes=2**29):
    """Raises TimeoutError after so many seconds, MemoryError for so many bytes more than before.

    Time is bounded on the main thread only (signals go there), memory on Linux only.
    """

    def stop(number, frame):
        raise TimeoutError(f"it takes more than {seconds:g} seconds")

    timed = hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread()
    handler = timed and signal.signal(signal.SIGALRM, stop)
    before = LINUX and resource.getrlimit(resource.RLIMIT_AS)  # (soft, hard)
    try:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        if LINUX:
            with open("/proc/self/statm", "rb", buffering=0) as f:  # pages of the address space
                now = int(f.read().split()[0]) * resource.getpagesize()
            finite = [limit for limit in before if limit != resource.RLIM_INFINITY]
            resource.setrlimit(resource.RLIMIT_AS, (min([now + nbytes, *finite]), before[1]))
        yield
    except MemoryError as error:
        raise MemoryError(f"it takes more than {nbytes // 2**20} MB of memory") from error
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
        if LINUX:
            resource.setrlimit(resource.RLIMIT_AS, before)
