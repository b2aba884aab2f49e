"""The chat page in a real Chromium, as somebody uses it: by mouse, by keyboard, on a phone, without a network.

Needs Chromium and playwright; HYBRIDLM_AXE names axe-core's axe.min.js for the accessibility scan, HYBRIDLM_SHOTS a
folder for pictures of the page.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
from tests.server.scripted import THINKING, scripted_engine, serving

from hybridlm.server.settings import Settings

pytestmark = pytest.mark.browser
CHROMIUM = os.environ.get("HYBRIDLM_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")

ANSWER = """## A plan

Take **three** steps, *in order*:

1. Read `config.json`
2. Write the loop
3. Measure

```python
def step(x):
    return x ** 2
```

| a | b |
|---|---|
| 1 | 2 |

See [the page](https://example.org) <script>alert(1)</script> [no](javascript:alert(2))."""


def script(history):
    last = history.rsplit("<|im_start|>", 1)[-1]
    if "long" in last:
        return "yes " * 400
    return ANSWER if "plan" in last else "You said: " + last.split("\n", 1)[1].removesuffix("<|im_end|>\n")


@pytest.fixture(scope="module")
def server():
    engines = {"m": scripted_engine(script), "base": lambda: scripted_engine(None, None),
               "thinker": lambda: scripted_engine(lambda _: "let me see\n</think>\n\nIt is 12.", THINKING)}
    with serving(engines, Settings(request_seconds=60)) as s:
        yield s


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no Chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, server, **options):
    # The page's policy forbids eval, which playwright's waiting uses.
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, "bypass_csp": True, **options})
    context.set_default_timeout(10_000)
    page = context.new_page()
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.goto(server.url)
    page.wait_for_function("document.querySelectorAll('#model option').length === 3")
    page.problems = problems
    try:
        page.evaluate("() => { const s = JSON.parse(localStorage.getItem('hybridlm.settings') || '{}');"
                      "s.temperature = 0; localStorage.setItem('hybridlm.settings', JSON.stringify(s)); }")
        page.reload()
        page.wait_for_function("document.querySelectorAll('#model option').length === 3")
        yield page
        assert not [p for p in problems if "Failed to load resource" not in p and "ERR_INTERNET" not in p], problems
    finally:
        context.close()


def shot(page, name):
    if folder := os.environ.get("HYBRIDLM_SHOTS"):
        page.wait_for_timeout(200)
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def say(page, text):
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def done(page, count):
    page.wait_for_function(f"document.querySelectorAll('li.assistant .stats').length === {count}", timeout=40_000)


def answers(page):
    return page.locator("li.assistant .body").all_inner_texts()


def test_send_stream_and_markdown(browser, server):
    with opened(browser, server) as page:
        say(page, "make a plan")
        done(page, 1)
        body = page.locator("li.assistant .body")
        assert body.locator("h3, h2").first.inner_text() == "A plan"
        assert body.locator("ol li").count() == 3 and body.locator("strong").inner_text() == "three"
        assert "return x ** 2" in body.locator("pre").inner_text() and body.locator("td").count() == 2
        assert body.locator("script").count() == 0 and "<script>" in body.inner_text()
        assert body.locator("a").count() == 1
        stats = page.locator(".stats").inner_text()
        assert "tokens/s" in stats and "first after" in stats and "written" in stats
        assert "2,048" in page.locator("#context-text").inner_text()
        say(page, "and then?")
        done(page, 2)
        assert answers(page)[1] == "You said: and then?"
        reused = int(page.locator(".stats").nth(1).inner_text().split(" reused")[0].replace(",", ""))
        assert reused > 100  # the first turn was not read again
        shot(page, "desktop-light")


def test_stop_keeps_what_came(browser, server):
    with opened(browser, server) as page:
        say(page, "a long one")
        page.wait_for_function("document.querySelector('li.assistant .body').innerText.length > 20")
        page.get_by_role("button", name="Stop").click()
        page.wait_for_selector("li.assistant >> text=stopped")
        text = answers(page)[0]
        assert text.startswith("yes yes") and len(text) < 1500
        page.wait_for_timeout(300)
        assert answers(page)[0] == text and server.loaded("m").scheduler.active == 0
        say(page, "go on")
        done(page, 2)


def test_edit_and_regenerate(browser, server):
    with opened(browser, server) as page:
        for n, text in enumerate(("one " * 60, "two", "three"), 1):
            say(page, text)
            done(page, n)
        page.locator("li.user").nth(1).hover()
        page.get_by_role("button", name="Edit this message").nth(1).click()
        page.get_by_label("Edit your message").fill("zwei")
        page.get_by_role("button", name="Send again").click()
        done(page, 2)
        assert page.locator("li.user .body").all_inner_texts()[1:] == ["zwei"]
        assert answers(page)[1] == "You said: zwei"
        reused = int(page.locator(".stats").nth(1).inner_text().split(" reused")[0].replace(",", ""))
        assert reused > 150  # resumed from the checkpoint before the edit
        page.get_by_role("button", name="Regenerate").last.click()
        page.wait_for_function("document.querySelectorAll('.waiting').length === 0")
        done(page, 2)
        assert answers(page)[1] == "You said: zwei"


def test_reload_export_import_delete(browser, server):
    with opened(browser, server) as page:
        say(page, "remember this")
        done(page, 1)
        page.get_by_role("button", name="New conversation").click()
        say(page, "another")
        done(page, 1)
        page.reload()
        page.wait_for_selector("#chats li:nth-child(2)")
        page.get_by_role("button", name="remember this", exact=True).click()
        assert answers(page) == ["You said: remember this"]
        with page.expect_download() as download:
            page.get_by_role("button", name="Export JSON").click()
        file = download.value.path()
        data = json.loads(Path(file).read_text())
        assert [c["messages"][0]["content"] for c in data["conversations"]] == ["another", "remember this"]
        page.locator("#chats li").nth(0).hover()
        page.get_by_role("button", name="Delete another").click()
        page.get_by_role("button", name="Delete remember this").click()
        assert answers(page) == []
        page.set_input_files("#import-file", file)
        page.wait_for_function("document.querySelectorAll('#chats .open').length >= 2")
        page.get_by_role("button", name="another", exact=True).click()
        assert answers(page) == ["You said: another"]


def test_a_server_that_is_gone_and_comes_back(browser, server):
    with opened(browser, server) as page:
        page.context.set_offline(True)
        say(page, "anybody?")
        page.wait_for_selector("li.assistant .error")
        assert "cannot be reached" in page.locator(".error").inner_text()
        page.context.set_offline(False)
        page.get_by_role("button", name="Try again").click()
        done(page, 1)
        assert answers(page) == ["You said: anybody?"]


def test_keyboard_only(browser, server):
    with opened(browser, server) as page:
        page.locator(".skip").focus()
        assert page.locator(".skip").bounding_box()["y"] >= 0  # shown once it has the focus
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "input"
        page.keyboard.type("line one")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("a long line two")
        page.keyboard.press("Enter")
        page.wait_for_function("document.querySelector('li.assistant .body').innerText.length > 20")
        page.keyboard.press("Escape")
        page.wait_for_selector("li.assistant >> text=stopped")
        assert page.locator("li.user .body").inner_text() == "line one\na long line two"
        seen = []
        for _ in range(30):
            page.keyboard.press("Tab")
            seen.append(page.evaluate("document.activeElement.getAttribute('aria-label') || "
                                      "document.activeElement.innerText || document.activeElement.id"))
            if seen[-1] == "Settings":
                break
        page.keyboard.press("Enter")
        page.keyboard.type("Answer in French.")
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.id") == "open-settings" and page.locator("#settings").is_hidden()
        page.keyboard.press("Enter")
        assert page.locator("#system").input_value() == "Answer in French."


def test_thoughts_and_completion_mode(browser, server):
    with opened(browser, server) as page:
        page.get_by_label("Model", exact=True).select_option("thinker")
        say(page, "5+7")
        done(page, 1)
        assert page.locator("details.thoughts summary").inner_text() == "Thoughts"
        assert answers(page)[0].endswith("It is 12.")
        page.get_by_role("button", name="New conversation").click()
        page.get_by_label("Model", exact=True).select_option("base")
        page.wait_for_selector("#document:visible")
        assert page.get_by_role("button", name="Continue").is_visible() and page.locator("#input").is_hidden()
        page.locator("#document").fill("the cat sat")
        page.get_by_role("button", name="Continue").click()
        page.wait_for_selector("#document-stats .stats")
        text = page.locator("#document").input_value()
        assert text.startswith("the cat sat") and len(text) > 20
        shot(page, "completion")
        page.get_by_role("button", name="Undo").click()
        assert page.locator("#document").input_value() == "the cat sat"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(browser, server, scheme):
    phone = {"viewport": {"width": 390, "height": 760}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True,
             "color_scheme": scheme}
    with opened(browser, server, **phone) as page:
        shot(page, f"phone-{scheme}-empty")
        say(page, "make a plan")
        done(page, 1)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        shot(page, f"phone-{scheme}")
        page.get_by_role("button", name="Conversations", exact=True).tap()
        page.wait_for_timeout(250)
        assert page.locator("#chats .open").first.is_visible()
        shot(page, f"phone-{scheme}-side")
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Settings", exact=True).tap()
        shot(page, f"phone-{scheme}-settings")
        assert page.locator("#temperature").is_visible()


def test_a_key_is_asked_for(browser):
    with serving({"m": scripted_engine(script)}, Settings(api_keys=("secret",))) as s:
        context = browser.new_context(bypass_csp=True)
        page = context.new_page()
        page.goto(s.url)
        page.wait_for_selector("#key-dialog[open]")
        page.get_by_label("API key").fill("secret")
        page.keyboard.press("Enter")
        page.wait_for_function("document.querySelectorAll('#model option').length === 1")
        say(page, "hello")
        done(page, 1)
        context.close()


def test_nothing_from_elsewhere_is_loaded_and_the_policy_holds(browser, server):
    context = browser.new_context()
    page = context.new_page()
    asked, problems = [], []
    page.on("request", lambda r: asked.append(r.url))
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.goto(server.url)
    page.locator("#model option").nth(2).wait_for(state="attached")
    say(page, "make a plan")
    page.locator("li.assistant .stats").wait_for()
    assert page.locator(".reuse i").first.evaluate("node => node.getBoundingClientRect().width") > 1
    assert not problems and all(url.startswith(server.url) for url in asked)
    page.evaluate("() => { const s = document.createElement('img'); s.src = 'http://127.0.0.1:1/x.png';"
                  "document.body.append(s); }")
    page.wait_for_timeout(200)
    assert any("Content Security Policy" in p for p in problems)
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_accessibility_scan(browser, server, scheme, width):
    axe = os.environ.get("HYBRIDLM_AXE")
    if not axe:
        pytest.skip("HYBRIDLM_AXE names no axe.min.js")
    options = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    with opened(browser, server, **options) as page:
        def scan(what):
            page.add_script_tag(path=axe)
            page.wait_for_timeout(300)
            found = page.evaluate("async () => (await axe.run()).violations")
            assert not found, (what, [(v["id"], v["impact"], [n["html"][:150] for n in v["nodes"]]) for v in found])

        scan("empty")
        say(page, "make a plan")
        done(page, 1)
        shot(page, f"plan-{width}-{scheme}")
        scan("a conversation")
        page.get_by_role("button", name="Settings", exact=True).click()
        scan("settings")
        shot(page, f"settings-{width}-{scheme}")
        page.keyboard.press("Escape")
        page.get_by_label("Model", exact=True).select_option("base")
        page.wait_for_selector("#document:visible")
        scan("completion")
