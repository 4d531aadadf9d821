"""Hub ids against a small hub of our own, asked by processes that the environment steers."""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tenfold.checkpoint import save_model
from tenfold.config import ModelConfig
from tenfold.engine.generation import Generation
from tenfold.engine.loading import load_model_and_tokenizer
from tenfold.errors import TenfoldError
from tenfold.hub import resolve
from tenfold.model.transformer import Transformer
from tenfold.sampling import SamplingParams
from tenfold.tokenizer import Tokenizer, train_bpe

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
NEEDED = {
    *WEIGHTS, "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer.model", "spiece.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja",
}  # fmt: skip
USELESS = {
    "README.md", "pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors",
    "metal/model.bin", "onnx/model.onnx", "original/config.json", "training_args.bin",
}  # fmt: skip
REPOSITORIES = {
    repo: {name: name.encode() for name in files}
    for repo, files in {
        "some/model": NEEDED | USELESS,
        "some/old": {"config.json", "pytorch_model-1.bin", "pytorch_model.bin.index.json", "rust_model.ot"},
        "some/gguf": {
            "tiny-Q4_0.gguf",
            "sub/tiny-Q8_0.gguf",
            "big-00001-of-00002.gguf",
            "big-00002-of-00002.gguf",
            "README.md",
        },
        "some/data": {"README.md"},
    }.items()
}
"""The files of each; most hold their own name."""
REFUSALS = {"some/gated": (403, "GatedRepo"), "some/secret": (401, "RepoNotFound"), "some/broken": (500, "")}


@dataclass
class Hub:
    """A server that speaks what of the hub's API a download needs, and remembers what it was asked for."""

    url: str
    cache: Path
    commit: str = COMMIT
    asked: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)

    def run(self, code: str, *arguments: str, **environment: str) -> str:
        """What a new process prints; its TenfoldError, if it ends in one."""
        self.asked.clear()
        own = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=os.environ | own | environment,
            capture_output=True,
            text=True,
            timeout=30,
        )
        if done.returncode:
            name, _, message = done.stderr.splitlines()[-1].partition(": ")
            assert name == "tenfold.errors.TenfoldError", done.stderr
            raise TenfoldError(message)
        return done.stdout

    def resolve(self, *arguments: str, **environment: str) -> Path:
        code = "import sys; from tenfold.hub import resolve; print(resolve(*sys.argv[1:]))"
        return Path(self.run(code, *arguments, **environment).strip())

    @property
    def fetched(self) -> set[str]:
        """Files whose content was asked for."""
        return {
            path.partition(f"/resolve/{self.commit}/")[2]
            for path in self.asked
            if path.startswith("GET /some/")
        }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        self.hub.tokens.add(self.headers.get("Authorization"))
        path = self.path.partition("?")[0].removeprefix("/api/models").strip("/")
        path += "/revision/main" * (path.count("/") == 1)
        owner, name, verb, revision, *file = path.split("/")
        repo = f"{owner}/{name}"
        files = REPOSITORIES.get(repo, {})
        if repo in REFUSALS:
            self.reply(b"", *REFUSALS[repo])
        elif not files:
            self.reply(b"", 404, "RepoNotFound")
        elif revision not in ("main", self.hub.commit):
            self.reply(b"", 404, "RevisionNotFound")
        elif verb == "revision":
            siblings = [{"rfilename": name} for name in files]
            self.reply(json.dumps({"id": repo, "sha": self.hub.commit, "siblings": siblings}).encode())
        elif verb == "tree":
            listing = [
                {"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files
            ]
            self.reply(json.dumps(listing).encode())
        else:
            self.reply(files["/".join(file)])

    def reply(self, body: bytes, status: int = 200, error: str = "") -> None:
        self.send_response(status)
        self.send_header("X-Repo-Commit", self.hub.commit)
        self.send_header("X-Error-Code", error)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.hub = Hub(f"http://127.0.0.1:{server.server_port}", tmp_path / "hf")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield Handler.hub
    server.shutdown()
    server.server_close()


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_only_what_a_model_needs_is_fetched_and_only_once(hub: Hub) -> None:
    folder = hub.resolve("some/model")
    assert hub.fetched == names(folder) == NEEDED
    assert (folder / "config.json").read_text() == "config.json"

    assert hub.resolve("some/model") == folder
    assert hub.asked == []
    assert hub.resolve("some/model", HF_HUB_OFFLINE="1") == folder
    assert hub.resolve("some/model", "tokenizer", HF_ENDPOINT="http://127.0.0.1:9") == folder


def test_a_part_is_completed_when_more_is_asked_for(hub: Hub) -> None:
    folder = hub.resolve("some/model", "config")
    assert hub.fetched == {"config.json"}
    with pytest.raises(TenfoldError, match="HF_HUB_OFFLINE is set"):
        hub.resolve("some/model", HF_HUB_OFFLINE="1")

    hub.resolve("some/model", "tokenizer")
    assert {"tokenizer.json", "chat_template.jinja"} <= hub.fetched
    assert not any("model-" in name for name in hub.fetched)
    assert hub.resolve("some/model") == folder
    assert names(folder) == NEEDED


def test_pickled_weights_are_fetched_only_without_safetensors(hub: Hub) -> None:
    folder = hub.resolve("some/old")
    assert names(folder) == REPOSITORIES["some/old"].keys() - {"rust_model.ot"}
    hub.resolve("some/old")
    assert hub.asked == []


def test_one_gguf_file_of_a_repository(hub: Hub) -> None:
    file = hub.resolve("some/gguf/sub/tiny-Q8_0.gguf")
    assert file.read_text() == "sub/tiny-Q8_0.gguf"
    assert hub.fetched == {"sub/tiny-Q8_0.gguf"}
    assert hub.resolve("some/gguf/sub/tiny-Q8_0.gguf@main") == file
    assert hub.asked == []


def test_a_gguf_model_in_parts_comes_whole(hub: Hub) -> None:
    file = hub.resolve("some/gguf/big-00002-of-00002.gguf")
    assert file.name == "big-00002-of-00002.gguf"
    assert hub.fetched == {"big-00001-of-00002.gguf", "big-00002-of-00002.gguf"}


def test_what_a_cached_commit_lacks_is_looked_for_anew(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.resolve("some/gguf/tiny-Q4_0.gguf")
    monkeypatch.setitem(REPOSITORIES, "some/gguf", {"new.gguf": b"new"})
    hub.commit = "f" * 40
    assert hub.resolve("some/gguf/new.gguf").read_bytes() == b"new"


def test_a_revision_and_a_token_reach_the_hub(hub: Hub) -> None:
    folder = hub.resolve(f"some/model@{COMMIT}", HF_TOKEN="hf_secret")
    assert folder.name == COMMIT
    assert hub.tokens == {"Bearer hf_secret"}


def test_what_another_program_cached_file_by_file_serves_offline(hub: Hub) -> None:
    folder = hub.resolve("some/model")
    for listing in hub.cache.rglob(f"trees/{COMMIT}.json"):
        listing.unlink()
    assert hub.resolve("some/model", HF_HUB_OFFLINE="1") == folder


def test_a_hub_id_serves_wherever_a_path_does(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = train_bpe(iter(["some text"]), 300)
    config = ModelConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    save_model(Transformer(config), tmp_path / "tiny", Tokenizer(tokenizer))
    files = {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()}
    monkeypatch.setitem(REPOSITORIES, "some/tiny", files)
    tenfold = "from tenfold.cli import main; main()"

    found = json.loads(hub.run(tenfold, "inspect", "some/tiny", "--json"))
    assert found["total_params"] == config.num_params()
    assert hub.fetched == {"config.json"}

    options = ("--prompt", "some", "--max-tokens", "3", "--temperature", "0", "--json")
    from_hub = json.loads(hub.run(tenfold, "generate", "some/tiny", *options))
    assert hub.fetched == files.keys() - {"config.json"}
    params = SamplingParams(max_tokens=3, temperature=0)
    here = Generation(*load_model_and_tokenizer(tmp_path / "tiny"), "some", params)
    assert from_hub | {"usage": None} == here.finish().summary() | {"usage": None}


REFUSED = {
    "some/gated": "some/gated is gated: accept its terms at http.*HF_TOKEN",
    "some/secret": "some/secret: no such file or directory, nor a repository .* private",
    "some/typo": "some/typo: no such file or directory, nor a repository",
    "some/model@v9": "some/model has no revision v9",
    "some/gguf/tiny-Q4_1.gguf": r"has no file tiny-Q4_1.gguf \(did you mean tiny-Q4_0.gguf\?\)",
    "some/gguf": "no config.json; name one of its GGUF files: .*tiny-Q4_0.gguf",
    "some/data": "some/data has no config.json$",
    "some/broken": "some/broken: .*500.*hf download some/broken --local-dir DIR",
}


def test_refusals_are_said_in_words(hub: Hub) -> None:
    code = (
        "import sys; from tenfold.errors import TenfoldError; from tenfold.hub import resolve\n"
        "for hub_id in sys.argv[1:]:\n"
        "    try: resolve(hub_id)\n"
        "    except TenfoldError as error: print(error)"
    )
    said = hub.run(code, *REFUSED).splitlines()
    assert len(said) == len(REFUSED)
    for sentence, words in zip(said, REFUSED.values(), strict=True):
        assert re.search(words, sentence)


def test_a_refused_token_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REFUSALS, "some/model", (403, ""))
    with pytest.raises(TenfoldError, match=r"refused the access token; check HF_TOKEN"):
        hub.resolve("some/model")


@pytest.mark.parametrize(
    ("hub_id", "environment", "words"),
    [
        (
            "a/b",
            {"HF_HUB_OFFLINE": "1"},
            r"HF_HUB_OFFLINE is set.*hf download a/b --local-dir DIR`.*give DIR",
        ),
        ("a/b@v1", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "127.0.0.1:9 .*refused.*a/b --revision v1 --local"),
        ("a/b/c.gguf", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "hf download a/b c.gguf --.*give DIR/c.gguf"),
        ("a/b", {"HF_ENDPOINT": "no url"}, "cannot be fetched from no url"),
    ],
)
def test_without_a_hub_the_way_round_is_said_at_once(
    hub: Hub, hub_id: str, environment: dict[str, str], words: str
) -> None:
    start = time.monotonic()
    with pytest.raises(TenfoldError, match=words) as caught:
        hub.resolve(hub_id, **environment)
    assert time.monotonic() - start < 5
    assert str(hub.cache) in str(caught.value)


def test_a_hub_that_never_answers_is_given_up(hub: Hub) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TenfoldError, match="timed out"):
            hub.resolve("a/b", HF_ENDPOINT=url, HF_HUB_ETAG_TIMEOUT="1")


def test_what_is_there_as_a_path_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("some/model") == Path("some/model")
    assert resolve(tmp_path) == tmp_path


NO_IDS = [
    "nowhere", "/nowhere/at/all", "./some/model", "../some/model", "a/b/c", "a/b.gguf", "run/tokenizer.json",
    "a--b/c", "a/b..c", "a/b.git", "some/model@", "some /model", "a/" + "b" * 97, "some/model\0", "größe/x",
]  # fmt: skip


@pytest.mark.parametrize("text", NO_IDS)
def test_what_can_be_no_id_is_a_missing_path(text: str) -> None:
    with pytest.raises(TenfoldError, match=r"no such file or directory$"):
        resolve(text)


def test_a_name_too_long_for_a_path(tmp_path: Path) -> None:
    with pytest.raises(TenfoldError, match="File name too long"):
        resolve("x" * 5000)
