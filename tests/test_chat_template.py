"""Chat templates: rendered as transformers renders them, and harmless whatever they try."""

import resource
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tenfold.chat_template import CPU_SECONDS, MEMORY_MEGABYTES, ChatTemplate
from tenfold.errors import TenfoldError
from tenfold.tokenizer import Tokenizer, load_tokenizer, train_bpe

TEMPLATES = sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'Der "Wetterbericht" <heute> & morgen',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "où?"},
                "days": {"type": ["integer", "null"]},
                "units": {"type": "array", "items": {"type": "string", "enum": ["°C", "°F"]}},
            },
            "required": ["city"],
        },
    },
}
CALL = {
    "id": "abcdef123",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Zürich"}},
}

SYSTEM = {"role": "system", "content": "  Antworte kurz. \n"}
USER = {"role": "user", "content": "Hi <b>there</b> 👋\n  indented"}
REPLY = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello & welcome"}
AGAIN = {"role": "user", "content": "Zürich?"}
CALLS = {"role": "assistant", "content": None, "reasoning": "look it up", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "abcdef123", "content": '{"temp": 21.5}'}
FINAL = {"role": "assistant", "thinking": "easy", "content": "21.5 °C"}

CONVERSATIONS = {
    "one message": [USER],
    "system": [SYSTEM, USER],
    "several turns": [SYSTEM, USER, REPLY, AGAIN],
    "ends with an answer": [USER, REPLY, AGAIN, FINAL],
    "a tool is called": [USER, REPLY, AGAIN, CALLS, RESULT],
    "and its result used": [SYSTEM, USER, CALLS, RESULT, FINAL, AGAIN],
    "a role that none has": [{"role": "critic", "content": "Boo"}, USER],
    "two of one role": [USER, USER],
    "a result of no call": [USER, RESULT],
}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    raw = train_bpe(iter(["the cat sat on the mat"] * 9), 300)
    raw.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end|>", "[INST]"])
    Tokenizer(raw, SPECIAL).save(folder)
    return folder


def both(folder: Path, template: Path) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    (folder / "chat_template.jinja").write_text(template.read_text())
    return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


def outcome(render: Any, messages: Sequence[object], **options: object) -> str:
    try:
        return str(render(messages, tokenize=False, **options))
    except Exception as error:
        return f"refused: {' '.join(str(error).split())[-40:]}"


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda file: file.stem)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_rendered_as_transformers_renders_it(vocabulary: Path, template: Path, name: str) -> None:
    ours, theirs = both(vocabulary, template)
    messages = CONVERSATIONS[name]
    for options in (
        {},
        {"add_generation_prompt": True},
        {"tools": [WEATHER, WEATHER], "add_generation_prompt": True},
        {"enable_thinking": False, "reasoning_effort": "high", "bos_token": "<other>"},
    ):
        got = outcome(ours.apply_chat_template, messages, **options)
        assert got == outcome(theirs.apply_chat_template, messages, **options)
        if not got.startswith("refused"):
            ids = ours.apply_chat_template(messages, **options)
            assert ids == theirs.apply_chat_template(messages, **options)["input_ids"]


def test_every_template_renders_most_conversations(vocabulary: Path) -> None:
    """Else the test above would compare refusals."""
    for template in TEMPLATES:
        ours, _ = both(vocabulary, template)
        texts = [outcome(ours.apply_chat_template, messages) for messages in CONVERSATIONS.values()]
        assert sum(text.startswith("refused") for text in texts) <= 4
        assert len(set(texts)) >= 6


def render(template: str, **variables: Any) -> str:
    return ChatTemplate({"default": template}, "the model").render([USER], **variables)


def refusal(template: str) -> str:
    with pytest.raises(TenfoldError) as caught:
        render(template)
    message = str(caught.value)
    assert message.startswith("the model: chat template: ") and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% if %}", "line 1"),
        ("\n{{ x", "line 2"),
        ("{{ 'a' | nonsense }}", "nonsense"),
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{{ ''.__class__ }}", "__class__"),
        ("{{ messages.__class__.__mro__ }}", "__class__"),
        ("{{ dict.mro() }}", "mro"),
        ("{{ '{0.__class__}'.format(messages) }}", "__class__"),
        ("{{ lipsum.__globals__['os'].system('id') }}", "__globals__"),
        ("{{ messages.append(1) }}", "append"),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{{ absent.field }}", "undefined"),
        ("{{ 1 / 0 }}", "zero"),
        ("{% for i in range(10**9) %}x{% endfor %}", "range"),
        ("{{ 'a' * 10**10 }}", "memory"),
        (
            "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "memory",
        ),
        ("{{ '%1000000000d' | format(1) }}", "memory"),
        ("{{ 'x' * 17 * 2**20 }}", "million characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "without end"),
        ("{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}", "without end"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_templates_end_in_a_line(template: str, words: str) -> None:
    assert words in refusal(template)


def processor_seconds() -> float:
    """Of worker processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_a_template_without_end_is_ended_on_any_thread() -> None:
    """Nested loops, and one operation that Python cannot interrupt; those after them are served."""
    nested = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    before = processor_seconds()
    with ThreadPoolExecutor(2) as pool:
        loop = pool.submit(refusal, nested)
        power = pool.submit(refusal, "{{ ((9**9999999) ** 99) | string }}")
        assert f"more than {CPU_SECONDS} seconds" in loop.result()
        assert f"more than {CPU_SECONDS} seconds" in power.result()
    assert render("{{ messages[0].content }}") == USER["content"]
    assert processor_seconds() - before < 2 * CPU_SECONDS + 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and other systems do not hold to the limit")
def test_memory_is_bounded() -> None:
    from tenfold import chat_template

    for hungry in (
        "{{ 'a' * 10**10 }}",
        "{{ [messages] * 10**9 }}",
        "{{ range(99999) | map('center', 99999) | list }}",
    ):
        assert f"more than {MEMORY_MEGABYTES} MB" in refusal(hungry)
    assert chat_template._worker.process
    status = Path(f"/proc/{chat_template._worker.process.pid}/status").read_text()
    peak_kilobytes = int(status.partition("VmHWM:")[2].split()[0])
    assert peak_kilobytes / 1024 < MEMORY_MEGABYTES


def test_interrupted_between_request_and_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to one conversation must never reach the next."""
    from tenfold import chat_template

    def interrupted(worker: subprocess.Popen[bytes], request: bytes) -> bytes:
        assert worker.stdin
        worker.stdin.write(request + b"\n")
        worker.stdin.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chat_template._worker, "exchange", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render("secret")
    assert render("next") == "next"


def test_a_forked_process_has_a_renderer_of_its_own() -> None:
    """It must not wait for the parent's, which is busy when it forks."""
    code = """if True:
        import os, signal, threading, time
        from tenfold.chat_template import ChatTemplate
        from tenfold.errors import TenfoldError
        def render(text):
            return ChatTemplate({"default": text}, "").render([{"role": "user"}])
        def be_busy():
            try:
                render("{{ ((9**9999999) ** 99) | string }}")
            except TenfoldError:
                pass
        assert render("before") == "before"
        thread = threading.Thread(target=be_busy)
        thread.start()
        time.sleep(0.2)
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            os._exit(render("child") != "child")
        assert os.waitpid(child, 0)[1] == 0
        thread.join()
        assert render("after") == "after"
    """
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, timeout=90)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("messages", [[], ["hi"], [["role", "user"]]])
def test_messages_that_are_none_are_refused(messages: Any) -> None:
    with pytest.raises(TenfoldError, match="messages must be"):
        ChatTemplate({"default": "x"}, "").render(messages)


def test_what_is_no_json_is_refused() -> None:
    looped: dict[str, Any] = {"role": "user"}
    looped["content"] = looped
    for content in ({1, 2}, object(), looped):
        with pytest.raises(TenfoldError, match="JSON"):
            ChatTemplate({"default": "x"}, "").render([{"role": "user", "content": content}])


def test_a_tokenizer_without_a_template_says_so() -> None:
    with pytest.raises(TenfoldError, match="no chat template"):
        Tokenizer(train_bpe(iter([]), 300)).apply_chat_template([USER])


def test_tool_use_has_its_own_template_where_there_is_one() -> None:
    named = ChatTemplate({"default": "plain", "tool_use": "tools"}, "")
    assert [named.render([USER], tools) for tools in (None, [], [WEATHER])] == ["plain", "tools", "tools"]
    with pytest.raises(TenfoldError, match="only rag"):
        ChatTemplate({"rag": "x"}, "").render([USER])
