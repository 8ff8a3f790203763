"""A server may be slow, broken or gone: nothing that came is lost, and the same command goes on."""

import base64
import email.utils
import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest
from chat_server import ChatServer

import generate
from hub.endpoint import Endpoint, RequestRefused, retry_after, together
from jobs.cli import UserError

HELLO = [{"role": "user", "content": "hello"}]


def client(server, **options):
    options = {"timeout": 60, "retries": 3, "pause": 0.01} | options
    return Endpoint(server.url, "m", **options)


@pytest.mark.parametrize("fault", [429, 500, 503, 408, "hang", "drop", "garbage", "empty"])
def test_what_passes_is_tried_again(fault):
    hasty = {"timeout": 0.3, "retries": 9} if fault == "hang" else {}
    with ChatServer(trouble=[fault, fault]) as server:
        reply = client(server, **hasty).chat(HELLO, temperature=0.5, seed=3)
    assert reply == ("echo hello", True, 7, 3)
    tries = len(server.bodies)  # two in vain, each as the first
    assert tries >= 3 if hasty else tries == 3  # to the hasty a busy machine hangs once more
    sent = {"model": "m", "messages": HELLO, "stream": False, "temperature": 0.5, "seed": 3}
    assert server.bodies == [sent] * tries


@pytest.mark.parametrize("fault", [500, "drop", "garbage"])
def test_what_does_not_pass_is_told(fault):
    with ChatServer(trouble=[fault] * 10) as server:
        with pytest.raises(UserError, match="gave up after 4 tries"):
            client(server).chat(HELLO)
        assert len(server.bodies) == 4


def test_a_server_that_is_not_there():
    with ChatServer() as server:
        pass
    with pytest.raises(UserError, match="gave up after 2 tries .ConnectError"):
        client(server, retries=1).chat(HELLO)


def test_retry_after_is_waited_for():
    with ChatServer(trouble=[429]) as server:
        server.retry_after = "0.4"
        client(server).chat(HELLO)
    assert server.times[1] - server.times[0] >= 0.4
    assert Endpoint("http://h/v1", "m")._pause(3, 0.4) == 0.4  # and no longer


def test_retry_after_as_a_date_or_nonsense(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1e9)
    assert retry_after(email.utils.formatdate(1e9 + 30, usegmt=True)) == 30
    assert retry_after("2.5") == 2.5 and retry_after("-1") == 0
    assert retry_after(None) is None and retry_after("soon") is None


def test_pauses_double():
    endpoint = Endpoint("http://h/v1", "m", pause=1.0)
    pauses = [endpoint._pause(n, None) for n in range(1, 12)]
    for n, pause in enumerate(pauses):
        assert min(2**n, 120) / 2 <= pause <= min(2**n, 120)


def test_a_refusal_is_of_one_request_a_wrong_key_of_all():
    with ChatServer(trouble=[400, "ok", 401]) as server:
        endpoint = client(server)
        with pytest.raises(RequestRefused, match="HTTP 400: .*told to say 400"):
            endpoint.chat(HELLO)
        assert endpoint.chat(HELLO).text == "echo hello"
        with pytest.raises(UserError, match="HTTP 401 for m"):
            endpoint.chat(HELLO)
    assert len(server.bodies) == 3


# As OpenAI, Mistral and Amazon word it; the last is no fault of the option itself.
MAX_TOKENS = {"message": "Unsupported parameter: 'max_tokens' is not supported with this model. "
              "Use 'max_completion_tokens' instead.", "param": "max_tokens"}  # fmt: skip
TEMPERATURE = {"message": "Unsupported value: 'temperature' does not support 0 with this model. "
               "Only the default (1) value is supported."}  # fmt: skip
SEED = {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"],
                    "msg": "Extra inputs are not permitted"}]}  # fmt: skip
BOTH = {"message": "`temperature` and `top_p` cannot both be specified for this model."}
TOO_LARGE = {"message": "max_tokens is too large: 9. This model supports at most 4."}


def strict(messages, body):
    """A reasoning model's server: it refuses one option after the other."""
    if "max_tokens" in body:
        return MAX_TOKENS
    if "top_p" in body and "temperature" in body:
        return BOTH
    if "temperature" in body:
        return TEMPERATURE
    return SEED if "seed" in body else "yes"


def test_options_that_a_server_refuses_are_left_out_from_then_on(capsys):
    options = {"temperature": 0.0, "top_p": 0.9, "max_tokens": 9, "seed": 1}
    with ChatServer(strict) as server:
        endpoint = client(server)
        assert endpoint.chat(HELLO, **options).text == "yes"
        assert len(server.bodies) == 5
        with ThreadPoolExecutor(4) as pool:
            assert {r.text for r in pool.map(lambda _: endpoint.chat(HELLO, **options), range(8))}
    assert len(server.bodies) == 5 + 8, "refused once, not once a request"
    sent = {"model": "m", "messages": HELLO, "stream": False, "max_completion_tokens": 9}
    assert server.bodies[-1] == sent
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 4 and "asked with max_completion_tokens instead" in told[0]
    assert [line for line in told if "asked without it" in line and "temperature" in line]


def test_threads_that_learn_at_once_all_get_their_answer(capsys):
    with ChatServer(strict) as server:
        work = partial(client(server).chat, HELLO, max_tokens=9)
        with ThreadPoolExecutor(6) as pool:
            assert {f.result().text for f in [pool.submit(work) for _ in range(6)]} == {"yes"}
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("message", [
    "`temperature` must be strictly positive", "`temperature` is deprecated for this model",
    "Invalid value for 'temperature'", "'temperature' is not available"])  # fmt: skip
def test_a_value_that_a_server_refuses_is_left_out_too(message):
    """As text-generation-inference, newer Claude models and proxies say it."""
    with ChatServer(lambda m, body: {"message": message} if "temperature" in body else "yes") as s:
        assert client(s).chat(HELLO, temperature=0.0, seed=1).text == "yes"
        assert s.bodies[-1].keys() == {"model", "messages", "stream", "seed"}


DEEPSEEK = {"message": "Invalid max_tokens value, the valid range of max_tokens is [1, 4]"}


@pytest.mark.parametrize("fault", [TOO_LARGE, DEEPSEEK, {"message": "the prompt is not supported"}])
def test_a_refusal_of_something_else_changes_no_option(fault, capsys):
    with ChatServer(lambda messages, body: fault) as server:
        with pytest.raises(RequestRefused, match="too large|not supported|valid range"):
            client(server).chat(HELLO, max_tokens=9)
        assert len(server.bodies) == 1 and not capsys.readouterr().err


@pytest.mark.parametrize(
    "reason, finished",
    [("stop", True), ("length", False), ("content_filter", False), ("eos_token", True)],
)
def test_a_reply_says_whether_it_is_whole(reason, finished):
    with ChatServer(lambda messages, body: ("so", reason)) as server:
        assert client(server).chat(HELLO).finished == finished


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    with ChatServer() as server:
        client(server).chat(HELLO)
    assert server.headers[0]["Authorization"] == "Bearer sesame"


@pytest.mark.parametrize(
    "url, name",
    [("http://h:1", "http://h:1/v1"), ("http://h/x/", "http://h/x")]
    + [("https://me:pass%40word@h:1", "https://h:1/v1"), ("http://me:p@ss@h/x", "http://h/x")],
)
def test_addresses(url, name):
    assert Endpoint(url, "m").name == name


@pytest.mark.parametrize("concurrency", [1, 3])
def test_together_yields_all_that_ended_before_it_raises(concurrency):
    failing = threading.Event()

    def work(n):
        if n == 4:
            failing.set()
            raise UserError("four")
        if n > 4:  # on its way beside the fourth, if at all
            failing.wait(60)
            time.sleep(0.01)
        return n * n

    seen = []
    with pytest.raises(UserError, match="four"):
        for item, square in together(work, range(1000), concurrency):
            assert square == item * item
            seen.append(item)
    assert {0, 1, 2, 3} <= set(seen) and 4 not in seen and len(seen) < 500
    assert concurrency > 1 or seen == [0, 1, 2, 3]


# ----------------------------------------------------------------------------- generate.py


@pytest.fixture
def ask(tmp_path, monkeypatch, call):
    """ask(server, *flags) runs generate.py with 20 questions against a server."""
    file, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"question {i}?"}) + "\n" for i in range(20)))
    monkeypatch.setattr(
        generate,
        "Endpoint",
        lambda url, model, timeout, retries: Endpoint(url, model, timeout, retries, pause=0.01),
    )

    def go(server, *flags):
        words = ["--model", "m", "--data", file, "--out", out, "--retries", 3]
        words += ["--endpoint", server.url, "--timeout", 60, "--concurrency", 3]
        call(generate, *words, *flags)

    go.out, go.part = out, tmp_path / "answers.jsonl.part0"
    return go


def rows(file):
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def test_a_password_goes_to_the_server_and_nowhere_else(ask, capsys):
    """Not into rows, and not into errors: of a wrong key, a wrong address, a dead server."""
    with ChatServer(trouble=["ok"] * 20 + [401] * 3) as server:
        url = server.url.replace("://", "://me:sesame@")
        ask(server, "--endpoint", url)
        ask(server, "--endpoint", server.url)  # the same run, with nothing left to ask
        found = rows(ask.out)
        ask.out.unlink()
        for address in (url, "me:sesame@h"):
            with pytest.raises(SystemExit):
                ask(server, "--endpoint", address)
    with pytest.raises(SystemExit):
        ask(server, "--endpoint", url, "--retries", 0)
    basic = f"Basic {base64.b64encode(b'me:sesame').decode()}"
    assert server.headers[0]["Authorization"] == basic
    assert {row["endpoint"] for row in found} == {server.url} and len(found) == 20
    said = capsys.readouterr()
    assert said.err.count("--endpoint ") == 3 and "sesame" not in said.out + said.err
    assert not any("sesame" in file.read_text() for file in ask.out.parent.iterdir())


def test_every_question_is_asked_once_with_the_papers_sampling(ask):
    three = threading.Barrier(3)

    def reply(messages, body):
        question = messages[-1]["content"]
        if question in ("question 0?", "question 1?", "question 2?"):
            three.wait(60)  # the first three are asked at once, or it breaks
        return f"echo {question}"

    with ChatServer(reply) as server:
        ask(server, "--seed", 5)
    found = rows(ask.out)
    assert [r["answer"] for r in found] == [f"echo question {i}?" for i in range(20)]
    assert all(r["usage"] == [7, 3] and r["seed"] == 5 and r["finished"] for r in found)
    assert {(b["temperature"], b["top_p"], b["max_tokens"]) for b in server.bodies} == {
        (0.7, 0.95, 2048)
    }
    assert len(server.bodies) == len({b["seed"] for b in server.bodies}) == 20  # of its own
    assert server.most_at_once == 3  # and no more: bounded


def test_a_bumpy_server_loses_nothing(ask):
    trouble = [429, 500, "ok", "hang", "drop", "garbage", "ok", 503, "empty", "ok", "drop", 429]
    with ChatServer(trouble=trouble) as server:
        ask(server, "--retries", len(trouble), "--timeout", 0.5)
    assert [r["answer"] for r in rows(ask.out)] == [f"echo question {i}?" for i in range(20)]


def test_a_server_that_dies_midway_is_taken_up_again(ask, capsys):
    """Answered rows are kept, none is asked again, and the file is as if nothing had happened."""
    with ChatServer(trouble=["ok"] * 8 + ["die"]) as server, pytest.raises(SystemExit):
        ask(server)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "gave up" in error and "the same command goes on" in error
    kept = {row["index"] for row in rows(ask.part)}
    assert len(kept) == 8 and not ask.out.exists()
    with open(ask.part, "ab") as f:
        f.write(b'{"index": 19, "prom')  # and it was killed while it wrote
    with ChatServer() as healthy:  # at another address, which is no other run
        ask(healthy)
    assert [r["answer"] for r in rows(ask.out)] == [f"echo question {i}?" for i in range(20)]
    asked = {b["messages"][0]["content"] for b in healthy.bodies}
    assert asked == {f"question {i}?" for i in set(range(20)) - kept}
    assert not ask.part.exists()


def test_a_refused_question_is_told_and_the_others_kept(ask, capsys):
    with ChatServer(trouble=["ok", 400]) as server:
        with pytest.raises(SystemExit):
            ask(server, "--concurrency", 1)
        assert "refused 1 of 20 prompts, as number 2: HTTP 400" in capsys.readouterr().err
        assert len(rows(ask.part)) == 19
        ask(server)
        assert len(server.bodies) == 21
    assert [r["answer"] for r in rows(ask.out)] == [f"echo question {i}?" for i in range(20)]


def test_a_refusal_holds_nothing_back():
    ended = [(2, "c"), (0, "a"), (3, "d")]  # 1 was refused
    assert list(generate.in_order(ended, range(4))) == ["a", "c", "d"]


def test_the_modes_by_messages(ask):
    with ChatServer() as server:
        ask(server, "--mode", "refine", "--instruction", "another", "--limit", 1)
    draft, refined = (b["messages"] for b in server.bodies)
    another = {"role": "user", "content": "please generate another response"}
    assert refined == [*draft, {"role": "assistant", "content": "echo question 0?"}, another]
    (row,) = rows(ask.out)
    assert row["draft"] == "echo question 0?" and row["answer"] == f"echo {another['content']}"
    assert row["usage"] == [14, 6] and server.bodies[0]["seed"] != server.bodies[1]["seed"]
    ask.out.unlink()
    with ChatServer() as server:
        ask(server, "--mode", "instruct", "--limit", 1)
    (sent,) = server.bodies
    assert sent["messages"][0]["content"] == "question 0?\nplease generate a better response"


# ----------------------------------------------------------------------------- a real server


@contextmanager
def transformers_serve(model):
    """`transformers serve MODEL` in fp32 on a free port of 127.0.0.1 -> its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    main = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    words = [sys.executable, "-c", main, "serve", str(model), "--host", "127.0.0.1"]
    words += ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(words, env=env, **pipes)
    try:
        for _ in range(1200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, "transformers serve has ended"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=600)


@pytest.mark.slow
def test_transformers_serve_answers_as_our_sampler(smollm2, tmp_path, call):
    """Greedy answers, refined ones too, from a real server and from our own cache."""
    for package in ("transformers", "fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    data = tmp_path / "prompts.jsonl"
    asked = ["Name three colours.", "Why is the sky blue?", "Write a haiku about the sea."]
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
    flags = ["--model", smollm2, "--data", data, "--temperature", 0, "--max_new_tokens", 12]
    flags += ["--mode", "refine", "--dtype", "fp32"]
    answers = []
    with transformers_serve(smollm2) as url:
        for i, more in enumerate((["--endpoint", url, "--concurrency", 2], [])):
            call(generate, *flags, "--out", tmp_path / f"{i}.jsonl", *more)
            answers.append([(r["draft"], r["answer"]) for r in rows(tmp_path / f"{i}.jsonl")])
    assert answers[0] == answers[1] and all(a and b for a, b in answers[0])
    usage = [r["usage"] for r in rows(tmp_path / "0.jsonl")]
    assert [out for _, out in usage] == [24, 24, 24]
