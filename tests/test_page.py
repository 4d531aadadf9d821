"""The page at /, used as people use it, in headless Chromium."""

import re
import shutil
from collections.abc import Callable, Iterator

import pytest
from page_server import FakeServer
from scripted_engine import ScriptedEngine
from test_server import served

sync_api = pytest.importorskip("playwright.sync_api")
Browser, Page, expect = sync_api.Browser, sync_api.Page, sync_api.expect

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")

# Without these it asks the outside for updates, which has nothing to do with the page.
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET += " --disable-component-update --disable-sync"

# Of a machine that has much else to do.
expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server
        server.shutdown()


@pytest.fixture
def visit(browser: Browser, server: FakeServer) -> Iterator[Callable[..., Page]]:
    """Opens the page of a server. In the end no page may have asked another origin for anything, or
    complained of anything that `expected` does not name."""
    visited: list[tuple[Page, list[str], list[str]]] = []

    def open_page(url: str, expected: str = "$^", width: int = 1280, **context: object) -> Page:
        page = browser.new_context(viewport={"width": width, "height": 800}, **context).new_page()
        outside: list[str] = []
        complaints: list[str] = []

        def asked(request: sync_api.Request) -> None:
            if not request.url.startswith((url, "data:")):
                outside.append(request.url)

        def said(message: sync_api.ConsoleMessage) -> None:
            if message.type in ("error", "warning") and not re.search(expected, message.text):
                complaints.append(message.text)

        page.on("request", asked)
        page.on("console", said)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        visited.append((page, outside, complaints))
        page.goto(url)
        return page

    yield open_page
    for page, outside, complaints in visited:
        page.context.close()
        assert not outside
        assert not complaints


def ask(page: Page, text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")


def finished(page: Page) -> None:
    expect(page.get_by_role("button", name=re.compile("Regenerate|Try again"))).to_be_visible()


def figure(page: Page, name: str) -> str:
    line = page.locator("dl div", has_text=name)
    return line.locator("dd").first.inner_text()


def grid(page: Page) -> str:
    """What the canvas shows."""
    return page.locator("canvas").evaluate("canvas => canvas.toDataURL()")


def test_conversation(visit, server):
    page = visit(server.url)
    empty = grid(page)
    ask(page, "What is a mixture of experts?")
    finished(page)
    expect(page.locator(".assistant .text")).to_have_text(server.text, use_inner_text=True)
    assert grid(page) != empty
    assert re.fullmatch(r"[\d,.]+ tokens/s", figure(page, "Speed"))
    assert figure(page, "Memory") == "3.71 GiB of 4.00 GiB"
    assert figure(page, "Experts found in memory") == "97.2 %"
    assert figure(page, "Read from disk") == "83.0 MiB"
    assert figure(page, "Cost so far") == "0.000210"
    expect(page.get_by_role("heading", name="18.5 % of the parameters")).to_be_visible()
    ask(page, "And for a child?")
    finished(page)
    messages = server.requests[-1]["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == server.text
    assert figure(page, "Cost so far") == "0.000420"


def test_with_the_server(visit):
    text = "the cat sat on the mat, and the dog looked on. café ☕"
    engine = ScriptedEngine(text, delay=0.01)
    with served(engine, price_per_hour=3.6, api_key=["secret"]) as url:
        page = visit(f"{url}/", expected="401|429|ERR_")
        page.get_by_label("API key").fill("secret")
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_text("ready")
        ask(page, "hello")
        finished(page)
        assert page.locator(".token").all_inner_texts() == words(engine, text)
        page.locator(".token").nth(3).hover()
        expect(page.locator("#readout")).to_contain_text("1 expert")
        assert re.fullmatch(r"[\d.]+", figure(page, "Cost so far"))
        engine.delay = 1
        page.get_by_role("button", name="Regenerate").click()
        expect(page.locator(".token").first).to_be_attached()
        page.keyboard.press("Escape")
        expect(page.locator(".foot")).to_contain_text("stopped")
        for _ in range(50):
            if not engine.running:
                break
            page.wait_for_timeout(100)
        assert not engine.running
        engine.room = 0
        ask(page, "hello")
        expect(page.get_by_role("alert")).to_contain_text("its queue is full. Try again in 1 s.")


def words(engine: ScriptedEngine, text: str) -> list[str]:
    return [engine.tokenizer.decode([i]) for i in engine.tokenizer.encode(text, add_special_tokens=False)]


def test_grid_moves_with_every_token(visit, server):
    server.delay = 0.05
    page = visit(server.url)
    ask(page, "Go on")
    seen = set()
    for count in (3, 9, 15):
        expect(page.locator(".token").nth(count)).to_be_attached()
        seen.add(grid(page))
    assert len(seen) == 3
    page.get_by_role("button", name="All so far").click()
    expect(page.locator("#readout")).to_contain_text("of 1,024 experts made these")


def test_escape_stops(visit, server):
    server.delay = 0.05
    page = visit(server.url)
    ask(page, "Go on")
    expect(page.locator(".token").nth(5)).to_be_attached()
    page.keyboard.press("Escape")
    expect(page.locator(".foot")).to_contain_text("stopped")
    assert server.cancelled.wait(5), "the server was not told"
    part = page.locator(".assistant .text").inner_text()
    assert part and server.text.startswith(part)
    page.get_by_role("button", name="Send").click(trial=True)
    server.delay = 0
    ask(page, "Go on")
    finished(page)
    assert figure(page, "Cost so far") == "more than 0.000210"


def test_regenerate(visit, server):
    page = visit(server.url)
    ask(page, "Go on")
    finished(page)
    server.text = "Something else."
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".assistant .text")).to_have_text("Something else.")
    assert page.locator(".turn").count() == 2
    assert server.requests[0]["messages"] == server.requests[1]["messages"]


def test_tokens_by_mouse_and_by_keyboard(visit, server):
    page = visit(server.url)
    ask(page, "Go on")
    finished(page)
    page.locator(".token").nth(12).hover()
    expect(page.locator("#readout")).to_contain_text("128 experts")
    hovered, readout = grid(page), page.locator("#readout").inner_text()
    page.mouse.move(0, 0)
    page.locator(".assistant .text").focus()
    page.keyboard.press("Home")
    for _ in range(12):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#readout")).to_have_text(readout)
    assert grid(page) == hovered
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#readout")).not_to_have_text(readout)
    page.locator("canvas").hover(position={"x": 100, "y": 50})
    expect(page.locator("#readout")).to_contain_text("Layer ")
    made = re.findall(r"expert \d+: made (\d+) of \d+ tokens", page.locator("#readout").inner_text())
    assert page.locator(".token.by").count() == int(made[0])


def test_settings_are_sent_and_kept(visit, server):
    page = visit(server.url)
    page.get_by_role("button", name="Settings").first.click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Most tokens").fill("99999")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Done").click()
    page.reload()
    ask(page, "Go on")
    finished(page)
    sent = server.requests[-1]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (sent["temperature"], sent["max_tokens"], sent["seed"]) == (0, 4096, 7)
    assert sent["return_experts"] and sent["stream_options"] == {"include_usage": True}


def test_shift_enter_is_a_new_line(visit, server):
    page = visit(server.url)
    box = page.get_by_label("Your message")
    box.fill("one")
    box.press("Shift+Enter")
    box.press_sequentially("two")
    assert not server.requests
    box.press("Enter")
    finished(page)
    assert server.requests[-1]["messages"][-1]["content"] == "one\ntwo"


HOSTILE = "<img src=x onerror=alert(1)><script>document.title='gone'</script>&lt; \u202e \x00 𝄞 " + "w" * 3000


def test_hostile_text_stays_text(visit, server):
    server.text, server.delay = HOSTILE, 0
    page = visit(server.url, width=390)
    ask(page, HOSTILE)
    finished(page)
    assert page.locator(".assistant .text").evaluate("body => body.textContent") == HOSTILE
    assert page.locator("main img, main script").count() == 0
    assert page.title() != "gone"
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_text_of_tokens_may_come_late(visit, server, monkeypatch):
    """As a server tells them that holds back what could be a stop string; and parts of characters."""
    told = [
        (["<think>"], ""),
        (["Caf"], "Ca"),
        (["\ufffd"], "f"),
        (["\ufffd", " ☕"], "é ☕"),
        ([" end", "."], ""),
        (["<|end|>"], " end."),
    ]

    def events(chat: bool):
        for tokens, text in told:
            routes = [[len(text)]] * server.layers
            tenfold = {"tokens": [{"id": 1, "text": t, "experts": routes} for t in tokens]}
            yield {"choices": [{"delta": {"content": text}, "finish_reason": None}], "tenfold": tenfold}

    monkeypatch.setattr(server, "events", events)
    page = visit(server.url)
    ask(page, "Go on")
    finished(page)
    assert page.locator(".token").all_inner_texts() == ["Caf", "é", " ☕", " end", "."]


@pytest.mark.parametrize("layers, experts", [(4, 8), (16, 64), (48, 128), (58, 256)])
def test_phone(visit, server, layers, experts):
    server.layers, server.experts = layers, experts
    page = visit(server.url, width=390, has_touch=True, is_mobile=True, device_scale_factor=3)
    ask(page, "Go on")
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    strip = page.locator("canvas").bounding_box()
    assert strip["width"] <= 390 and strip["height"] <= 120
    page.locator(".token").nth(8).tap()
    expect(page.locator("#readout")).to_contain_text(f"{layers * 8:,} experts")
    expect(page.locator("dl")).not_to_be_visible()
    page.locator("summary").tap()
    expect(page.locator("dl")).to_be_visible()


def test_dense_model(visit, server):
    server.layers = server.experts = 0
    page = visit(server.url)
    ask(page, "Go on")
    finished(page)
    expect(page.get_by_text("This model is dense")).to_be_visible()
    expect(page.locator("canvas")).not_to_be_visible()


def test_without_template_the_text_goes_on(visit, server):
    server.template = False
    page = visit(server.url)
    expect(page.get_by_text("This model has no chat template")).to_be_visible()
    ask(page, "Once upon a time")
    finished(page)
    ask(page, "And then")
    finished(page)
    assert server.requests[0]["prompt"] == "Once upon a time"
    assert server.requests[1]["prompt"] == f"Once upon a time{server.text} And then"


def test_key(visit, server):
    server.key = "right"
    page = visit(server.url, expected="401")
    page.get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_text("It did not accept that key.")).to_be_visible()
    page.get_by_label("API key").fill("right")
    page.keyboard.press("Enter")
    ask(page, "Go on")
    finished(page)
    page.reload()
    expect(page.locator("#status")).to_have_text("ready")
    assert "right" not in page.evaluate("JSON.stringify(localStorage)")


def test_no_key(visit, server):
    server.key = "right"
    page = visit(server.url, expected="401")
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("answers only those who have its key")).to_be_visible()


@pytest.mark.parametrize(
    "prompt, message, text",
    [
        ("queue", "The server is busy: its queue is full. Try again in 3 s.", False),
        ("fail", "The server gave up on this answer: The disk no longer answers.", True),
        ("break", "The connection was lost before the answer was complete.", True),
    ],
)
def test_troubles(visit, server, prompt, message, text):
    page = visit(server.url, expected="429|ERR_")
    ask(page, prompt)
    expect(page.get_by_role("alert")).to_contain_text(message)
    assert bool(page.locator(".assistant .text").inner_text()) == text
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_contain_text(message)
    assert len(server.requests) == 2
    ask(page, "Better now")
    finished(page)
    assert [m["role"] for m in server.requests[-1]["messages"]] in (["user"], ["user", "assistant", "user"])


def test_server_stops_and_comes_back(visit, server):
    page = visit(server.url, expected="ERR_CONNECTION_REFUSED")
    expect(page.locator("#status")).to_have_text("ready")
    page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
    ask(page, "Are you there?")
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer.")
    expect(page.locator("#status")).to_have_text("no connection")
    page.unroute("**/v1/**")
    page.get_by_role("button", name="Try again").click()
    finished(page)
    expect(page.locator("#status")).to_have_text("ready")


def test_theme(visit, server):
    page = visit(server.url, color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.get_by_role("button", name="Colours").click()
    light = page.evaluate(ground)
    assert light == "rgb(255, 255, 255)" != dark
    page.reload()
    assert page.evaluate(ground) == light
