"""The chat page as a person has it, in Debian's Chromium: `make test-page` fetches what these tests need."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from argonne.serve.engine import Engine
from tests.serve.serving import Running, Scripted, make_engine, running, scripted
from tests.tour import ROOT

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser
CHROMIUM, AXE = "/usr/bin/chromium", ROOT / ".cache" / "axe.min.js"
CHAT = "/v1/chat/completions"
SAID, OTHER = "Hello, this is what I say.", "And this is another."
THOUGHT = "<think>\none and one\nare two\n</think>\n\nThe answer is 2."
PLANTED = '<script>alert(1)</script><img src=x onerror="alert(2)">\n```html\n<b onclick="alert(3)">bold</b>\n```\n&amp;'


class Waiting(Scripted):
    """Says a few tokens and waits, until `gate` is open, with those that follow."""

    def __init__(self, engine: Engine, text: str) -> None:
        super().__init__(engine, text)
        self.gate = threading.Event()

    def forward(self, **inputs: Any) -> Any:
        if self.calls >= 8 and inputs["input_ids"].shape[1] == 1:
            assert self.gate.wait(60)
        return super().forward(**inputs)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return make_engine(tmp_path_factory.mktemp("chat") / "it")


@pytest.fixture(scope="module")
def server(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    base = make_engine(tmp_path_factory.mktemp("base") / "base", chat=False)
    texts = {"says": SAID, "other": OTHER, "thinks": THOUGHT, "plants": PLANTED}
    with running({**{name: scripted(engine, text) for name, text in texts.items()}, "base": base}) as made:
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A page that was opened, all it asked for, and what to do with it."""

    def __init__(self, page: Page) -> None:
        self.page, self.urls, self.problems, self.bodies = page, [], [], []
        page.on("request", self._asked)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("dialog", lambda dialog: self.problems.append(dialog.message))
        page.on("console", lambda one: self.problems.append(one.text) if one.type in ("error", "warning") else None)

    def _asked(self, request: Any) -> None:
        self.urls.append(request.url)
        if request.url.endswith(CHAT):
            self.bodies.append(json.loads(request.post_data))

    def choose(self, model: str, beside: str = "") -> None:
        self.page.select_option("#model", model)
        self.page.select_option("#beside", beside)

    def send(self, text: str) -> None:
        """Ask, and wait until the answers have ended."""
        self.page.fill("#question", text)
        self.page.press("#question", "Enter")
        self.rest()

    def rest(self) -> None:
        self.page.wait_for_selector('#talk[data-running="false"] .turn')

    def said(self) -> list[str]:
        return self.page.locator(".said").all_inner_texts()

    def lists(self, titles: list[str]) -> None:
        """These conversations are kept, or come to be."""
        from playwright.sync_api import expect

        expect(self.page.locator("button.open")).to_have_text(titles)

    def setting(self, name: str, value: str) -> None:
        self.page.fill(f"#{name}", value)
        self.page.press(f"#{name}", "Tab")

    def accessible(self) -> None:
        found = self.page.evaluate("axe.run({rules: {'target-size': {enabled: true}}})")
        told = [(one["id"], [node["html"] for node in one["nodes"]]) for one in found["violations"]]
        assert told == []
        assert len(found["passes"]) > 10

    def fits(self) -> None:
        room = "one => [one.scrollWidth, one.clientWidth]"
        for selector in ("html", "#talk", "header", "dialog[open]"):
            for found in self.page.query_selector_all(selector):
                wide, wanted = found.evaluate(room)
                assert wide == wanted, selector


Open = Callable[..., Visit]


@pytest.fixture
def visit(browser: Browser, server: Running) -> Iterator[Open]:
    """Opens a page; what it asks for must be this server's, and it may not complain."""
    opened: list[tuple[Visit, str, str]] = []

    def open_page(at: Running = server, *, complains: str = "^$", **how: Any) -> Visit:
        context = browser.new_context(**how)
        context.set_default_timeout(20_000)
        context.add_init_script(path=AXE)
        made = Visit(context.new_page())
        opened.append((made, at.url, complains))
        made.page.goto(at.url)
        made.page.wait_for_selector("#model option, #notice:not(:empty)", state="attached")
        return made

    yield open_page
    for made, url, complains in opened:
        made.page.context.close()
        assert made.urls
        assert all(one.startswith((f"{url}/", "blob:")) for one in made.urls), made.urls
        assert [problem for problem in made.problems if not re.search(complains, problem)] == []


@contextmanager
def waiting(engine: Engine) -> Iterator[tuple[Running, Waiting]]:
    model = Waiting(engine, SAID * 4)
    with running({"waits": Engine(model, engine.tokenizer, engine.folder)}) as made:
        try:
            yield made, model
        finally:
            model.gate.set()
            made.until_idle()


# ------------------------------------------------------------------------------------------------- a conversation


def test_a_question_is_answered_and_the_next_one_carries_the_conversation(visit: Open) -> None:
    here = visit()
    here.send("Hello")
    here.send("And then?")
    assert here.said() == [SAID, SAID]
    assert here.page.locator(".question").all_inner_texts() == ["Hello", "And then?"]
    asked = here.bodies[-1]
    assert [(one["role"], one["content"]) for one in asked["messages"]] == [
        ("user", "Hello"),
        ("assistant", SAID),
        ("user", "And then?"),
    ]
    assert set(asked) == {"model", "messages", "stream", "stream_options"}  # no setting was touched
    assert re.search(r"^\d+ tokens · [\d.]+ tokens/s · context \d+ of 1,024$", here.page.inner_text(".foot .facts"))
    assert here.page.inner_text("#status").startswith(f"says: {SAID}")


def test_the_answer_is_shown_while_it_grows_and_escape_and_the_button_stop_it(visit: Open, engine: Engine) -> None:
    for stop in ("Escape", "button"):
        with waiting(engine) as (slow, model):
            here = visit(slow)
            here.page.fill("#question", "Hello")
            here.page.click("#send")
            here.page.wait_for_selector(".said:has-text('Hel')")
            assert here.page.get_attribute(".answer", "aria-busy") == "true"
            assert here.page.inner_text("#status") == ""  # not every token is read out
            if stop == "Escape":
                here.page.keyboard.press("Escape")
            else:
                here.page.click("#stop")
            here.rest()
            model.gate.set()
            slow.until_idle()
            assert SAID.startswith(here.said()[0])
            assert here.page.inner_text(".foot .facts").startswith("stopped · about ")
            assert here.page.evaluate("document.activeElement.id") == "question"


def test_regenerate_keeps_the_answer_before_and_asks_the_model_that_is_chosen_now(visit: Open) -> None:
    here = visit()
    here.send("Hello")
    here.choose("other")
    here.page.click("text=Regenerate")
    here.rest()
    assert here.said() == [OTHER]
    assert here.bodies[0]["messages"] == here.bodies[1]["messages"]
    here.page.click("[aria-label='Answer before this one']")
    assert here.said() == [SAID]
    assert here.page.inner_text(".answer h3") == "says"
    assert here.page.evaluate("document.activeElement.getAttribute('aria-label')") == "Answer after this one"
    here.send("More")  # what is shown is what the model is told
    assert here.bodies[-1]["messages"][1]["content"] == SAID


def test_an_edited_question_is_asked_anew_and_what_followed_stays_in_a_copy(visit: Open) -> None:
    here = visit()
    for text in ("First", "Second"):
        here.send(text)
    here.page.click("[aria-label='Edit question 1']")
    here.page.keyboard.press("Escape")
    assert here.page.locator(".question").all_inner_texts() == ["First", "Second"]
    here.page.click("[aria-label='Edit question 1']")
    here.page.fill("[aria-label='Edit the question']", "Changed")
    here.page.click("text=Ask again")
    here.rest()
    assert here.bodies[-1]["messages"] == [{"role": "user", "content": "Changed"}]
    assert here.page.locator(".question").all_inner_texts() == ["Changed"]
    here.page.click("text=First (before an edit)")
    assert here.page.locator(".question").all_inner_texts() == ["First", "Second"]


def test_settings_are_sent_as_they_are_set_and_what_is_wrong_is_told(visit: Open) -> None:
    here = visit()
    here.page.click("#open-settings")
    here.page.fill("#system", "Be brief.")
    wanted = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "max_tokens": 4,
        "seed": 7,
    }
    for name, value in wanted.items():
        here.setting(name, str(value))
    here.setting("top_k", "-1")
    assert here.page.inner_text("#top_k-wrong") == "Found -1, expected a whole number, 0 or more. It is not used."
    assert here.page.get_attribute("#top_k", "aria-invalid") == "true"
    here.page.click(".close")
    assert here.page.inner_text("#open-settings") == "Settings (7 set)"
    here.send("Hello")
    sent = here.bodies[-1]
    assert {name: sent[name] for name in wanted} == wanted
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert here.page.inner_text(".foot .facts").startswith("cut: the most tokens were reached")
    here.page.reload()
    here.page.click("#open-settings")
    assert here.page.input_value("#seed") == "7"
    here.page.click("#defaults")
    here.page.click(".close")
    here.send("Again")
    assert not {*wanted} & {*here.bodies[-1]}


def test_two_models_answer_one_question_side_by_side_each_in_its_own_conversation(visit: Open) -> None:
    here = visit()
    here.choose("says", "other")
    here.send("Hello")
    here.send("More")
    assert here.said() == [SAID, OTHER] * 2
    boxes = [here.page.locator(".answer").nth(place).bounding_box() for place in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]
    told = {body["model"]: body["messages"][1]["content"] for body in here.bodies[2:]}
    assert told == {"says": SAID, "other": OTHER}
    here.page.set_viewport_size({"width": 360, "height": 700})
    boxes = [here.page.locator(".answer").nth(place).bounding_box() for place in (0, 1)]
    assert boxes[0]["x"] == boxes[1]["x"]
    here.fits()


def test_thoughts_are_folded_away_and_go_back_as_thoughts(visit: Open) -> None:
    here = visit()
    here.choose("thinks")
    here.send("1 + 1")
    assert here.said() == ["The answer is 2."]
    assert here.page.inner_text(".thinking summary").startswith("Thought for ")
    assert not here.page.is_visible(".thinking .text")
    here.page.click(".thinking summary")
    assert here.page.inner_text(".thinking .text") == "one and one\nare two"
    here.send("More")
    assert here.bodies[-1]["messages"][1]["reasoning_content"] == "one and one\nare two"


def test_planted_markup_and_script_stay_text(visit: Open) -> None:
    here = visit()
    here.choose("plants")
    here.page.click("#open-settings")
    here.page.fill("#system", PLANTED)
    here.page.click(".close")
    here.send(PLANTED)
    here.page.reload()  # as it comes back from what was kept
    here.page.wait_for_selector(".said")
    text = here.page.inner_text(".said")
    for piece in ('<script>alert(1)</script><img src=x onerror="alert(2)">', '<b onclick="alert(3)">bold</b>', "&amp;"):
        assert piece in text
        assert piece in here.page.inner_text(".question")
    assert here.page.inner_text(".said pre") == '<b onclick="alert(3)">bold</b>'
    assert here.page.locator("main :is(script, img, b, style, iframe, a)").count() == 0


def test_even_a_faulty_page_could_not_make_text_markup(visit: Open) -> None:
    here = visit(complains="This document requires 'TrustedHTML'|Content Security Policy|Content-Security-Policy")
    for way in ("document.body.innerHTML = '<b>x</b>'", "document.body.insertAdjacentHTML('beforeend', '<b>x</b>')"):
        assert (
            here.page.evaluate(f"(() => {{ try {{ {way}; return 'done' }} catch (error) {{ return error.name }} }})()")
            == "TypeError"
        )


# ------------------------------------------------------------------------------------------------- keeping


def test_a_reload_keeps_conversations_and_deleting_them_is_asked(visit: Open) -> None:
    here = visit()
    here.choose("says", "other")
    here.send("First")
    here.page.click("#new")
    here.choose("says")
    here.send("Second")
    here.page.reload()
    here.page.wait_for_selector(".turn")
    here.lists(["Second", "First"])
    here.page.click("button.open:has-text('First')")
    assert here.said() == [SAID, OTHER]
    assert here.page.input_value("#beside") == "other"
    with here.page.expect_download() as download:
        here.page.click("#export")
    kept = json.loads(Path(download.value.path()).read_text())["conversations"]
    assert {one["title"] for one in kept} == {"First", "Second"}
    assert kept[0]["turns"][0]["columns"][0]["tries"][0]["content"] == SAID
    here.page.click("[aria-label='Delete First']")
    here.page.keyboard.press("Escape")
    here.lists(["Second", "First"])
    here.page.click("[aria-label='Delete First']")
    here.page.click("#yes")
    here.lists(["Second"])
    here.page.click("#delete-all")
    here.page.click("#yes")
    here.lists([])
    here.page.reload()
    here.lists([])


def test_what_was_said_when_the_page_was_left_is_there_when_it_comes_back(visit: Open, engine: Engine) -> None:
    with waiting(engine) as (slow, model):
        here = visit(slow)
        here.page.fill("#question", "Hello")
        here.page.keyboard.press("Enter")
        here.page.wait_for_selector(".said:has-text('Hel')")
        here.page.reload()
        here.page.wait_for_selector(".turn")
        model.gate.set()
        assert here.said()[0].startswith("Hel")
        assert here.page.inner_text(".foot .facts").startswith("cut: the page was left")


def test_a_full_storage_is_told_and_the_conversation_goes_on(visit: Open) -> None:
    here = visit()
    here.page.evaluate(
        "for (let size = 2 ** 22, n = 0; size > 0.5; n++) "
        "try { localStorage.setItem('other' + n, 'x'.repeat(size)) } catch { size /= 2 }"
    )
    here.send("Hello")
    assert "storage is full" in here.page.inner_text("#notice")
    assert here.said() == [SAID]


def test_another_tab_sees_what_this_one_writes(visit: Open) -> None:
    here = visit()
    with here.page.context.expect_page():
        here.page.evaluate("window.open(location.href, '_blank', 'noopener')")
    other = next(page for page in here.page.context.pages if page is not here.page)
    other.wait_for_selector("#model option", state="attached")
    here.send("Hello")
    other.click("button.open")
    assert other.inner_text(".said") == SAID


# ------------------------------------------------------------------------------------------------- what goes wrong


def test_a_server_that_wants_a_key_is_told_and_the_key_goes_when_the_tab_does(visit: Open, engine: Engine) -> None:
    with running({"says": scripted(engine, SAID)}, key="secret") as locked:
        here = visit(locked, complains="status of 401")
        assert "wants an API key" in here.page.inner_text("#notice")
        here.accessible()
        here.page.click("text=Enter the key")
        assert here.page.evaluate("document.activeElement.id") == "key"
        here.setting("key", "wrong")
        here.page.click(".close")
        assert "wants an API key" in here.page.inner_text("#notice")
        here.page.click("text=Enter the key")
        here.setting("key", "secret")
        here.page.wait_for_selector("#model option", state="attached")
        here.page.click(".close")
        here.send("Hello")
        assert here.said() == [SAID]
        assert "secret" not in here.page.evaluate("JSON.stringify(localStorage)")


def test_errors_stand_in_the_conversation_in_plain_words_and_can_be_tried_again(visit: Open, engine: Engine) -> None:
    with running({"says": scripted(engine, SAID)}) as made:
        here = visit(made, complains="Failed to load resource")
        told = {"error": {"message": "as it is told", "code": None}}

        def answer_with(status: int) -> None:
            how = {"status": status, "headers": {"retry-after": "3"}, "json": told}
            here.page.unroute("**" + CHAT)
            here.page.route("**" + CHAT, lambda route: route.fulfill(**how))

        answer_with(503)
        here.send("Hello")
        assert "is about to end and takes no more questions. Try again in 3 s." in here.page.inner_text(".trouble")
        assert "is about to end" in here.page.inner_text("#status")
        here.accessible()
        for status, words in ((429, "too many answers wait already. Try again in 3 s."), (500, "as it is told")):
            answer_with(status)
            here.page.click("button:has-text('Try again')")
            here.page.wait_for_selector(f".trouble:has-text('{words}')")
        here.page.unroute("**" + CHAT)
        here.page.context.set_offline(True)
        here.page.click("button:has-text('Try again')")
        here.page.wait_for_selector(".trouble:has-text('cannot be reached')")
        here.page.context.set_offline(False)
        cut = 'data: {"choices": [{"delta": {"content": "Half an"}, "finish_reason": null}]}\n\n'
        here.page.route("**" + CHAT, lambda route: route.fulfill(content_type="text/event-stream", body=cut))
        here.page.click("button:has-text('Try again')")
        here.page.wait_for_selector(".trouble:has-text('connection ended before')")
        assert here.said() == ["Half an"]
        here.page.unroute("**" + CHAT)
        here.page.click("button:has-text('Try again')")
        here.page.wait_for_selector(f".said:has-text('{SAID}')")
        assert not here.page.is_visible(".trouble")
        assert [len(body["messages"]) for body in here.bodies] == [1] * 6


def test_a_full_context_is_told_and_the_oldest_question_can_be_left_out(visit: Open, engine: Engine) -> None:
    with running({"says": scripted(engine, SAID)}, context=100) as small:
        here = visit(small, complains="status of 400")
        for number in range(9):
            here.send(f"Question {number}")
            if here.page.is_visible(".trouble"):
                break
        assert "no longer fits into what the model can read at once" in here.page.inner_text(".trouble >> visible=true")
        before = len(here.bodies[-1]["messages"])
        here.page.click("text=Leave the oldest question out and try again")
        here.rest()
        assert len(here.bodies[-1]["messages"]) == before - 2
        assert here.page.inner_text(".cut") == "What stands above is no longer sent to the model."


def test_a_base_model_is_shown_as_what_it_is(visit: Open, tmp_path: Path) -> None:
    with running({"base": make_engine(tmp_path / "base", chat=False)}) as made:
        here = visit(made)
        here.page.wait_for_selector("text=No model to chat with")
        assert here.page.is_disabled("#model option")
        assert here.page.is_disabled("#send")


# ------------------------------------------------------------------------------------------------- for everybody


def test_all_of_it_by_keyboard(visit: Open) -> None:
    here = visit()
    press = here.page.keyboard.press

    def tab_to(selector: str, back: bool = False) -> None:
        for _ in range(60):
            if here.page.evaluate("selector => document.activeElement.matches(selector)", selector):
                outline = here.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline == "solid", selector
                return
            press("Shift+Tab" if back else "Tab")
        raise AssertionError(selector)

    tab_to("#question")
    here.page.keyboard.type("One")
    press("Shift+Enter")
    here.page.keyboard.type("two")
    press("Enter")
    here.rest()
    assert here.page.inner_text(".question") == "One\ntwo"
    tab_to(".foot button", back=True)
    tab_to("[aria-label='Edit question 1']", back=True)
    press("Enter")
    here.page.keyboard.type("Zero ")
    press("Enter")
    here.rest()
    tab_to("#open-settings", back=True)
    press("Enter")
    tab_to("#temperature")
    here.page.keyboard.type("0")
    press("Tab")
    press("Escape")
    assert here.page.evaluate("document.activeElement.id") == "open-settings"
    tab_to("#beside", back=True)
    here.page.keyboard.type("other")
    tab_to("#new")
    press("Enter")
    tab_to("#question")
    here.page.keyboard.type("Both")
    press("Enter")
    here.rest()
    assert here.said() == [SAID, OTHER]
    assert here.bodies[-1]["temperature"] == 0
    tab_to("[aria-label='Delete Both']", back=True)
    press("Enter")
    tab_to("#yes")
    press("Enter")
    here.lists(["One twoZero"])
    tab_to(".skip", back=True)
    press("Enter")
    assert here.page.evaluate("document.activeElement.id") == "question"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_no_barrier_is_found_and_nothing_is_wider_than_the_page(width: int, scheme: str, visit: Open) -> None:
    here = visit(viewport={"width": width, "height": 720}, color_scheme=scheme, has_touch=width < 800)
    paper = here.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", paper)[0]) < 128) == (scheme == "dark")
    here.accessible()
    here.fits()
    here.choose("thinks", "plants")
    here.send("What? " + "a" * 200)
    here.page.click("text=Regenerate")
    here.rest()
    here.page.click(".thinking summary")
    here.accessible()
    here.fits()
    here.page.click("[aria-label='Edit question 1']")
    here.accessible()
    here.fits()
    if width < 800:
        assert not here.page.is_visible("#list")
        here.page.click("#menu")
        here.accessible()
        here.page.keyboard.press("Escape")
        assert not here.page.is_visible("#list")
    here.page.click("#open-settings")
    here.setting("temperature", "5")
    here.accessible()
    here.fits()
    here.page.click(".close")
    if width < 800:
        here.page.click("#menu")
    here.page.click("#delete-all")
    here.accessible()


def test_a_chosen_theme_goes_before_the_systems_and_stays(visit: Open) -> None:
    here = visit(color_scheme="light")
    here.page.click("#open-settings")
    here.page.select_option("#theme", "dark")
    here.page.reload()
    assert here.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"


def test_who_wants_no_motion_gets_none(visit: Open, engine: Engine) -> None:
    for motion, expected in (("reduce", "none"), ("no-preference", "pulse")):
        here = visit(reduced_motion=motion)
        here.send("Hello")
        name = "getComputedStyle(document.querySelector('.waiting')).animationName"
        here.page.evaluate("document.querySelector('.waiting').hidden = false")
        assert here.page.evaluate(name) == expected


def test_what_is_typed_stays_while_an_answer_runs_and_a_deleted_conversation_stays_deleted(
    visit: Open, engine: Engine
) -> None:
    with waiting(engine) as (slow, model):
        here = visit(slow)
        here.page.fill("#question", "Hello")
        here.page.press("#question", "Enter")
        here.page.wait_for_selector(".said:has-text('Hel')")
        here.page.fill("#question", "Not yet")
        here.page.press("#question", "Enter")
        assert here.page.input_value("#question") == "Not yet"
        here.page.click("[aria-label='Delete Hello']")
        here.page.click("#yes")
        here.lists([])
        model.gate.set()
        slow.until_idle()
        here.page.reload()
        here.page.wait_for_selector(".empty")
        here.lists([])
