"""Reads a dialogue, however it is written, into messages {role, content}.

A text is a user turn; a transcript of hh-rlhf, or messages as JSON or Python text, are messages; so
are {from, value} and LLaMA-Factory's pairs of texts. What a message holds beside its text is read
or refused by name. Which columns hold dialogues is layouts.py's.
"""

import ast
import contextlib
import json
import re
from itertools import chain, cycle

from jobs.cli import UserError
from pairs.columns import account, squeezed

ROLES = {"system": "system", "user": "user", "human": "user", "prompter": "user"}
ROLES |= dict.fromkeys(("assistant", "gpt", "model"), "assistant") | {"tool": "tool"}
HH = "\n\nHuman:"  # opens a transcript of Anthropic's hh-rlhf
# how messages, or a history of pairs of texts, begin as JSON or as Python writes them
MESSAGES, TURNS = re.compile(r"\s*(\[\s*)?\{\s*['\"]"), re.compile(r"\s*\[\s*\[")


def as_messages(value, where):
    """Any form of a dialogue -> messages; a text is a user turn, a transcript or JSON of them."""
    if isinstance(value, str):
        messages = parsed(value, where)
        if messages is value:
            return [{"role": "user", "content": value}]
        opened = value.startswith(HH) and not messages[-1]["content"]  # "…\n\nAssistant:"
        value = messages[:-1] if opened else messages
    if isinstance(value, dict) and {"role", "from"} & value.keys():
        value = [value]
    if not isinstance(value, list):
        raise UserError(f"{where}: expected text or messages, found {type(value).__name__}")
    messages = []
    for item in value:
        as_is = type(item) is dict and len(item) == 2 and item.get("role") in ROLES.values()
        fine = as_is and isinstance(item.get("content"), str)
        messages += [item] if fine else turns_of(item, where)
    return messages


def turns_of(item, where):
    """One item of a list of messages -> messages: {role, content}, {from, value}, or two texts.

    An assistant's may have `tool_calls`, a tool's `name` and `tool_call_id`, as OpenAI's have.
    """
    if isinstance(item, list | tuple) and len(item) == 2 and texts_alone(list(item)):
        return interleaved(item[:1], item[1:])  # LLaMA-Factory's history
    content, role, calls = None, None, None
    if isinstance(item, dict):
        content = item["content"] if "content" in item else item.get("value")
        role, calls = item["role"] if "role" in item else item.get("from"), item.get("tool_calls")
    if calls and role == "assistant" and content is None:
        content = ""
    if isinstance(content, list) and content and all(map(is_text_part, content)):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise UserError(f"{where}: a message needs a role and a text content: {item!r:.80}")
    if (known := ROLES.get(role.lower() if isinstance(role, str) else None)) is None:
        raise UserError(f"{where}: unknown role {role!r:.40}")
    more = {"assistant": ("tool_calls",), "tool": ("name", "tool_call_id")}.get(known, ())
    if len(item) > 2:
        read = ("role", "from", "content", "value", *more)
        account(item, read, (content,), f"{where}: of a message")
    if calls and not (isinstance(calls, list) and all(map(is_call, calls))):
        cure = "expected a list of {function: {name, arguments}}"
        raise UserError(f"{where}: tool_calls is {calls!r:.80}; {cure}")
    return [{"role": known, "content": content} | {k: item[k] for k in more if item.get(k)}]


def is_call(call):
    """Whether this is a call of a tool, as OpenAI's messages have it."""
    function = call.get("function") if isinstance(call, dict) else None
    named = isinstance(function, dict) and isinstance(function.get("name"), str)
    return named and isinstance(function.get("arguments", {}), dict | str)


def is_text_part(part):
    """Whether a part of a content is text, and nothing else."""
    filled = {k for k, v in part.items() if v} if isinstance(part, dict) else ()
    return "text" in filled and filled <= {"type", "text"} and isinstance(part["text"], str)


def all_said(message):
    """All that a message says: its text, and the tools that it calls."""
    calls = message.get("tool_calls")
    return message["content"] + (json.dumps(calls, ensure_ascii=False) if calls else "")


def texts_alone(value):
    """Whether this is a list of texts, and no empty one."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def interleaved(questions, answers):
    """Texts of the user and of the assistant -> messages, in turn."""
    turns = chain.from_iterable(zip(questions, answers, strict=True))
    roles = cycle(("user", "assistant"))
    return [{"role": r, "content": text} for r, text in zip(roles, turns, strict=False)]


def parsed(value, where, opening=MESSAGES):
    """A text that is a transcript, or messages as JSON or Python writes them -> list; else as is.

    opening: TURNS for a history of pairs of texts.
    """
    if isinstance(value, str) and value.startswith(HH):
        return parse_hh(value)
    if not isinstance(value, str) or not opening.match(value):
        return value
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            found, keys = read(value.strip()), ({"role", "content"}, {"from", "value"})
            if isinstance(found, dict):  # one message; an answer in JSON may have other roles
                found = [found] if str(found.get("role", found.get("from"))) in ROLES else "?"
            if opening is TURNS or all(set(m) >= keys[0] or set(m) >= keys[1] for m in found):
                return found
    if re.match(r"\s*\[\s*\{\s*'(role|content|from|value)':", value):
        raise UserError(f"{where}: messages as text, neither JSON nor Python: {value!r:.40}")
    return value


def parse_hh(text):
    """Anthropic's hh-rlhf transcript -> messages."""
    parts = re.split(r"\n\n(Human|Assistant):", text)[1:]
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": ROLES[who.lower()], "content": content.strip()} for who, content in turns]


def dialogue(answer, where):
    """A whole dialogue, or its last message -> (what stands before the answer, its text)."""
    messages = as_messages(answer, where)
    if not messages or messages[-1]["role"] != "assistant":
        fault = "the dialogue does not end with an answer"
        raise UserError(f"{where}: {fault}; the last message must be the assistant's answer")
    if "tool_calls" in messages[-1]:
        raise UserError(f"{where}: the answer calls tools; only what stands before it may")
    return messages[:-1], messages[-1]["content"]


def joined(prompt, before):
    """What the prompt and the dialogues of the answers say together; None where they contradict."""
    if before[: len(prompt)] == prompt:
        return before
    if prompt[0]["role"] == "system" and before and before[0]["role"] != "system":
        behind = joined(prompt[1:], before) if prompt[1:] else before
        return behind and prompt[:1] + behind
    said = [(m["role"], squeezed(all_said(m))) for m in before]
    if all((m["role"], squeezed(all_said(m))) in said for m in prompt):
        return before  # whole dialogues beside their first or last question
    for shared in range(min(len(prompt), len(before)), 0, -1):
        if prompt[-shared:] == before[:shared]:
            return prompt + before[shared:]
    follows = not before or {prompt[-1]["role"], before[0]["role"]} == {"user", "assistant"}
    return prompt + before if follows else None
