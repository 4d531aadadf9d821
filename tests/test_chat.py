"""`tenfold chat` as a person meets it."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_cli import run
from test_generation import Scripted, model_of

from tenfold.chat import Chat, talk
from tenfold.chat_template import ChatTemplate
from tenfold.checkpoint import save_model
from tenfold.engine.generation import Generation
from tenfold.errors import TenfoldError
from tenfold.sampling import SamplingParams
from tenfold.tokenizer import END_OF_TEXT, Tokenizer, train_bpe

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'forbidden' %}{{ raise_exception('not that') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    raw = train_bpe(iter(["the cat sat on the mat [user] [assistant] [system]"] * 9), 300)
    special = {"eos_token": END_OF_TEXT}
    return Tokenizer(raw, special, chat_template=ChatTemplate({"default": TEMPLATE}, "toy"))


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "m"
    save_model(model_of(max_position_embeddings=256), folder, tokenizer)
    return folder


def chat_of(tokenizer: Tokenizer, answers: list[str], context: int = 2048, system: str | None = None) -> Chat:
    """With a model that gives these answers, whatever it is asked."""
    tokens = [token for answer in answers for token in [*tokenizer.encode(answer), tokenizer.eos_token_id]]
    model = Scripted(tokens, tokenizer.vocab_size)
    model.config = model.config.model_copy(update={"max_position_embeddings": context})
    return Chat(model, tokenizer, SamplingParams(temperature=0, max_tokens=20), system, "toy")


def say(monkeypatch: pytest.MonkeyPatch, chat: Chat, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    talk(chat)


def test_answers_are_shown_and_remembered(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = chat_of(tokenizer, ["the cat", "☕ sat"], system="be brief")
    say(monkeypatch, chat, "hi", "", "and?")
    assert capsys.readouterr().out == "the cat\n☕ sat\n"
    assert [(m["role"], m["content"]) for m in chat.messages] == [
        ("system", "be brief"),
        ("user", "hi"),
        ("assistant", "the cat"),
        ("user", "and?"),
        ("assistant", "☕ sat"),
    ]


def test_the_model_reads_the_whole_conversation(tokenizer: Tokenizer) -> None:
    chat = chat_of(tokenizer, ["the cat"], system="be brief")
    chat.keep(chat.answer("hi").finish().text)
    read = tokenizer.decode(chat.answer("and?").prompt_ids).replace(END_OF_TEXT, "|")
    assert read == "[system]be brief|[user]hi|[assistant]the cat|[user]and?|[assistant]"


def test_reset_keeps_the_system_message_and_exit_ends(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = chat_of(tokenizer, ["the cat", "sat"], system="be brief")
    say(monkeypatch, chat, "hi", "/reset", "yo", " /exit ", "never read")
    assert [m["content"] for m in chat.messages] == ["be brief", "yo", "sat"]
    assert "anew" in capsys.readouterr().err


def test_old_turns_make_room_and_that_is_said(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = chat_of(tokenizer, ["the cat", "sat", "on", "the mat"], context=64, system="brief")
    say(monkeypatch, chat, "one", "two", "three", "four")
    out, err = capsys.readouterr()
    assert out.split("\n")[:4] == ["the cat", "sat", "on", "the mat"]
    kept = [m["content"] for m in chat.messages]
    assert kept[0] == "brief" and kept[-2:] == ["four", "the mat"] and "one" not in kept
    assert [m["role"] for m in chat.messages[1:]] == ["user", "assistant"] * ((len(kept) - 1) // 2)
    assert "oldest turns dropped, to fit the model's context: 1)" in err
    assert len(tokenizer.apply_chat_template(chat.messages)) <= 64


def test_a_message_that_cannot_fit_or_is_refused_is_taken_back(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = chat_of(tokenizer, ["the cat"], context=64)
    say(monkeypatch, chat, "long " * 99, "forbidden", "lone \udcff", "hi")
    out, err = capsys.readouterr()
    assert [m["content"] for m in chat.messages] == ["hi", "the cat"]
    assert "max_position_embeddings" in err and "not that" in err and "Unicode" in err
    assert "the cat" in out


def test_ctrl_c_stops_the_answer_only(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = chat_of(tokenizer, ["the cat sat on the mat", "sat"])
    model = chat._model
    assert isinstance(model, Scripted)
    rest = iter([*tokenizer.encode("sat"), tokenizer.eos_token_id])

    def pressed() -> Iterator[int]:
        yield from tokenizer.encode("the cat")
        raise KeyboardInterrupt

    model.tokens = pressed()
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    talk(chat)
    model.tokens = rest
    say(monkeypatch, chat, "again")
    assert [m["content"] for m in chat.messages] == ["hi", "the cat", "again", "sat"]
    assert capsys.readouterr().out == "the cat\nsat\n"


def test_only_the_final_channel_is_remembered(tokenizer: Tokenizer) -> None:
    chat = chat_of(tokenizer, [])
    chat.keep("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hello")
    assert chat.messages == [{"role": "assistant", "content": "Hello"}]


def test_any_token_that_ends_a_turn_ends_the_answer(tokenizer: Tokenizer) -> None:
    """Also where only the tokenizer's files name it; and a prompt may be ids."""
    cat, sat = tokenizer.encode("cat")[0], tokenizer.encode(" sat")[0]
    ends = Tokenizer(tokenizer.raw, {"eos_token": END_OF_TEXT}, ends=[sat])
    for prompt in ("the", tokenizer.encode("the")):
        model = Scripted([cat, sat, cat], tokenizer.vocab_size)
        generation = Generation(model, ends, prompt, SamplingParams(temperature=0)).finish()
        assert (generation.tokens, generation.finish_reason) == ([cat], "stop")
        assert generation.prompt_ids == tokenizer.encode("the")


def test_one_message_on_the_command_line(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    options = ("--message", "the cat", "--system", "be brief", "--max-tokens", 8, "--temperature", 0)
    status, plain, err = run(capsys, "chat", folder, *options)
    assert status == 0, err
    _, out, _ = run(capsys, "chat", folder, *options, "--json")
    found = json.loads(out)
    assert set(found) == {"text", "tokens", "prompt_tokens", "finish_reason", "usage"}
    assert plain == found["text"] + "\n"


def test_a_conversation_on_the_command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n/reset\nthe cat\n"))
    status, out, err = run(capsys, "chat", folder, "--max-tokens", 8, "--temperature", 0)
    assert status == 0 and "anew" in err
    half = len(out) // 2
    assert out[:half] == out[half:] != ""


def test_what_chat_refuses(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    save_model(model_of(), tmp_path / "plain", Tokenizer(train_bpe(iter([]), 300)))
    for arguments, words in (
        (("chat", tmp_path / "plain"), "tenfold generate"),
        (("chat", folder, "--json"), "--message"),
        (("chat", folder, "--message", "forbidden"), "not that"),
        (("chat", folder, "--message", "long " * 99), "max_position_embeddings"),
        (("chat", tmp_path / "nowhere"), "nowhere"),
    ):
        status, _, err = run(capsys, *arguments)
        assert status == 2 and words in err and err.count("\n") == 1


def test_a_model_without_a_template_cannot_be_talked_to() -> None:
    with pytest.raises(TenfoldError, match="no chat template"):
        Chat(model_of(), Tokenizer(train_bpe(iter([]), 300)), SamplingParams(), None, "toy")
