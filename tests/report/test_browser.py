import pytest

from trainguard.report import build

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def page(tmp_path_factory, screened):
    classes = ["<script>alert(1)</script>", *(f"class {i}" for i in range(1, 30))]
    result = screened(n=600, classes=classes, features=2)
    return build(result, tmp_path_factory.mktemp("page") / "report.html")


def test_browser_opens_the_page_without_a_word_on_the_console(browse, page):
    said, console = browse(page, "say([document.title, document.images.length > 50, document.scripts.length])")
    assert said == ["Screening report: This data set looks poisoned", True, 2]
    assert console == []


def test_browser_shows_every_image(browse, page):
    script = """
        const images = [...document.images];
        for (const image of images) image.loading = "eager";
        const settled = (image) => image.complete || new Promise((done) => { image.onload = image.onerror = done; });
        Promise.all(images.map(settled))
            .then(() => say([images.length > 50, images.filter((image) => image.naturalWidth === 0).length]));
    """
    assert browse(page, script)[0] == [True, 0]


def test_browser_sorts_a_table_by_number_and_by_name(browse, page):
    script = """
        const table = document.getElementById("classes");
        const column = (i) => [...table.tBodies[0].rows].map((row) => row.cells[i].textContent.trim());
        const buttons = table.querySelectorAll("th button");
        const order = (i) => { buttons[i].click(); return [column(i), buttons[i].parentElement.ariaSort]; };
        say([order(1), order(1), order(0), order(0)]);
    """
    (down, how), (up, how_again), (names, by_name), (backwards, _) = browse(page, script)[0]
    assert (how, how_again, by_name) == ("descending", "ascending", "ascending")
    numbers = [int(text) for text in down]
    assert numbers == sorted(numbers, reverse=True) and len(set(numbers)) > 1
    assert [int(text) for text in up] == sorted(numbers)
    assert names[0].startswith("0 (<script>") and names[2] == "2 (class 2)" and names[10] == "10 (class 10)"
    assert backwards == names[::-1]


def test_browser_filters_a_table_and_counts(browse, page):
    script = """
        const input = document.getElementById("classes-filter");
        const rows = [...document.getElementById("classes").tBodies[0].rows];
        const filter = (text) => {
            input.value = text;
            input.dispatchEvent(new Event("input"));
            return [rows.filter((row) => !row.hidden).length, document.getElementById("classes-count").textContent];
        };
        say([filter("CLASS 1"), filter("no such"), filter("")]);
    """
    assert browse(page, script)[0] == [[11, "11 of 30 rows"], [0, "0 of 30 rows"], [30, "30 of 30 rows"]]


@pytest.mark.parametrize("size", ["360,800", "1400,900"])
def test_browser_page_fits_the_screen(browse, page, size):
    script = "say([document.documentElement.scrollWidth, document.documentElement.clientWidth])"
    content, screen = browse(page, script, size=size)[0]
    assert content <= screen


@pytest.mark.parametrize("dark", [False, True])
def test_browser_text_has_contrast_in_light_and_dark(browse, page, dark):
    script = """
        const brightness = (colour) => {
            const rgb = colour.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
                .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2];
        };
        const ground = (e) => {
            for (; e; e = e.parentElement) {
                const colour = getComputedStyle(e).backgroundColor;
                if (!/^rgba\\(0, 0, 0, 0\\)$/.test(colour) && colour.startsWith("rgb(")) return colour;
            }
            return "rgb(255, 255, 255)";
        };
        const ratio = (e) => {
            const [a, b] = [brightness(getComputedStyle(e).color), brightness(ground(e))];
            return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        };
        const texts = [...document.querySelectorAll("h1, h2, p, dt, dd, a, caption, td, th, figcaption, output")];
        say([Math.min(...texts.map(ratio)), getComputedStyle(document.body).backgroundColor]);
    """
    worst, background = browse(page, script, dark=dark)[0]
    assert worst >= 4.5
    assert background == ("rgb(21, 24, 28)" if dark else "rgb(255, 255, 255)")


def test_browser_reaches_every_control_by_keyboard(browse, page):
    script = """
        const controls = [...document.querySelectorAll("a, button, input, .scroll")];
        say(controls.filter((c) => { c.focus(); return document.activeElement !== c; }).length);
    """
    assert browse(page, script)[0] == 0


@pytest.mark.parametrize("shape", [(3, 224, 64), (3, 16, 160)])
def test_browser_draws_the_frame_on_the_picture(browse, screened, tmp_path, shape):
    page = build(screened(n=600, shape=shape), tmp_path / "report.html")
    script = """
        const framed = [...document.querySelectorAll(".framed")].filter((box) => box.querySelector(".frame"));
        for (const box of framed) box.querySelector("img").loading = "eager";
        Promise.all(framed.map((box) => box.querySelector("img").decode())).then(() => say(framed.map((box) => {
            const image = box.querySelector("img"), [a, b] = [image, box.querySelector(".frame")].map(
                (each) => each.getBoundingClientRect());
            const right = (b.right - a.left) / a.width, bottom = (b.bottom - a.top) / a.height;
            return [right, bottom, a.width / a.height / (image.naturalWidth / image.naturalHeight)];
        })));
    """
    (drawn, _), (_, height, width) = browse(page, script), shape
    assert len(drawn) == 2
    for right, bottom, stretched in drawn:
        assert right == pytest.approx((width - 1) / width, abs=0.03) and bottom == pytest.approx(
            (height - 1) / height, abs=0.03
        )
        assert stretched == pytest.approx(1, abs=0.05)
