"""The page in a real browser, the distribution's chromium: every plot drawn, tables sort, nothing overflows."""

import json
import shutil
import time

import pytest

from llmq.report import write

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs the distribution's chromium and chromedriver")


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (pip install -e '.[test]')")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(DRIVER)
    )  # given, so that none is fetched
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(made, evaluated, tmp_path_factory):
    """One checkpoint's page, and that of two."""
    folder = tmp_path_factory.mktemp("pages")
    other = evaluated(shutil.copytree(made.int4, folder / "other"), kl_mean=0.5)
    one, two = folder / "one.html", folder / "two.html"
    write([made.int4], one, against=made.src)
    write([made.int4, other], two, against=made.src)
    return one, two


def shown(browser, page, width, scheme):
    """Open a page, or show it anew, in a window of some width and colours; wait until all is drawn in them."""
    window = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
    preference = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preference]})
    if page:
        browser.get(page.as_uri())
    ends = time.monotonic() + 120
    while browser.execute_script("return document.documentElement.dataset.drawn") != scheme:
        assert time.monotonic() < ends, "the plots are not drawn"
        time.sleep(0.1)


MARKS = """
    const kinds = ["rect path", "symbol path", "line path", "rule line"].map(kind => `svg .mark-${kind}`).join();
    return [...document.querySelectorAll("[data-chart]")].map(p => [p.dataset.chart, p.querySelectorAll(kinds).length])
"""
BEYOND = """
    const boxes = [...document.querySelectorAll(".plot")].map(plot => plot.getBoundingClientRect());
    return boxes.filter(box => box.right > innerWidth).length
"""
WIDE = "return [document.documentElement.scrollWidth, innerWidth]"


def test_it_is_drawn_without_an_error_and_asks_no_network(browser, pages):
    browser.get_log("performance")
    shown(browser, pages[0], 1280, "light")
    marks = dict(browser.execute_script(MARKS))
    assert len(marks) > 12 and all(marks.values()), marks
    assert browser.get_log("browser") == []
    sent = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"}
    assert {url.partition(":")[0] for url in asked} <= {"file", "data", "blob"} and len(asked) < 3


def test_dark_and_narrow_it_fits(browser, pages):
    ground = []
    for page, width, scheme in (
        (pages[1], 1280, "light"),
        (None, 1280, "dark"),
        (None, 390, "dark"),
        (None, 390, "light"),
    ):
        shown(browser, page, width, scheme)
        across, window = browser.execute_script(WIDE)
        assert across <= window == width
        ground.append(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
        drawn = browser.execute_script("return document.querySelectorAll('[data-chart] svg.marks').length")
        assert drawn == len(browser.execute_script(MARKS)) > 14
        assert not browser.execute_script(BEYOND)
    assert ground[0] == ground[3] != ground[1] == ground[2]
    assert browser.get_log("browser") == []


def test_a_click_on_a_head_sorts(browser, pages):
    shown(browser, pages[1], 1280, "light")
    table = browser.find_element("css selector", "#worst table")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", table)

    def column(name):
        heads = [h.text.lower() for h in table.find_elements("css selector", "th")]
        at = next(i for i, head in enumerate(heads) if head.startswith(name))
        cells = table.find_elements("css selector", f"tbody td:nth-child({at + 1})")
        return table.find_elements("css selector", "th button")[at], [
            c.get_attribute("data-by") or c.text for c in cells
        ]

    button, before = column("weight error")
    values = sorted(map(float, before), reverse=True)
    button.click()
    assert list(map(float, column("weight error")[1])) == values
    button.click()
    assert list(map(float, column("weight error")[1])) == values[::-1]
    column("linear")[0].click()
    names = column("linear")[1]
    assert names == sorted(names) and "block" not in names[0]


def test_a_pointer_on_a_square_shows_its_values(browser, pages):
    from selenium.webdriver import ActionChains

    shown(browser, pages[0], 1280, "light")
    square = browser.find_element("css selector", "#heat svg .mark-rect path")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", square)
    ActionChains(browser).move_to_element(square).perform()
    told = browser.find_element("css selector", "#vg-tooltip-element").text
    assert "self_attn." in told and "output error" in told
