"""The page of `python -m tav_jax.demo` in a real browser, from an upload to the downloads.

It needs Gradio (the extra `demo`), playwright (the extra `browser`) and the system's Chromium.
"""

import os
import shutil
import signal
import socket
import threading
import time
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import quote

import pytest

from tav_jax.runs.adapters import read_adapter
from tav_jax.video.read import read_all_frames

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

# Without these it asks its maker's servers at every start.
SILENT = ["disable-background-networking", "disable-component-update", "disable-sync"]
OPTIONS = [f"--{name}" for name in ("no-sandbox", "disable-gpu", "disable-quic", *SILENT)]
PATIENCE = 600_000  # milliseconds
# Each of them would open the page to others, if it were obeyed.
HOSTILE = {
    "GRADIO_SHARE": "1",
    "GRADIO_SERVER_NAME": "0.0.0.0",
    "GRADIO_ALLOWED_PATHS": "/",
    "GRADIO_SSR_MODE": "1",
    "GRADIO_MCP_SERVER": "1",
    "GRADIO_NUM_WORKERS": "2",
    "GRADIO_ROOT_PATH": "/elsewhere",
    "COLAB_RELEASE_TAG": "release-colab-external",
    "KAGGLE_KERNEL_RUN_TYPE": "Interactive",
}
SCRIPT = "<script>document.title='ran'</script><img src=x onerror=document.title='ran'>"
LONG = ("a cat, " * 1_430)[:9_990]
STEPS = 20_000  # which no machine has done before the test cancels them


class Server:
    """The demo in a process of its own.

    Args:
        process: It.
        port: Where it listens.
        folder: Its folder.
    """

    def __init__(self, process, port: int, folder: Path):
        self.process, self.port, self.folder = process, port, folder
        self.address = f"http://127.0.0.1:{port}/"
        self.lines: list[str] = []
        for stream in (process.stdout, process.stderr):
            threading.Thread(target=lambda s=stream: self.lines.extend(s), daemon=True).start()

    def wait_for(self, text: str) -> None:
        while not any(text in line for line in self.lines):
            assert self.process.poll() is None, "".join(self.lines)
            time.sleep(0.2)

    def status(self, path: str, **headers: str) -> int:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request("GET", path, headers=headers)
        return connection.getresponse().status

    def file(self, path: object) -> int:
        return self.status(f"/gradio_api/file={quote(str(path))}")


@pytest.fixture
def server(start, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tmp_path / "demo"
    options = ["--output-dir", folder, "--port", port, "--max-upload-mb", 1]
    process = start("-m", "tav_jax.demo", *options, environment=HOSTILE)
    served = Server(process, port, folder)
    served.wait_for("serving http://127.0.0.1")
    return served


@pytest.fixture
def open_page():
    """Opens the page in a browser's window of its own."""
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=OPTIONS, timeout=PATIENCE)

        def new(server, **options):
            context = browser.new_context(**options)
            context.set_default_timeout(PATIENCE)
            page = context.new_page()
            page.asked = []
            page.on("request", lambda request: page.asked.append(request.url))
            page.goto(server.address)
            page.locator("#frames img").first.wait_for()
            return page

        yield new
        browser.close()


def listening_addresses(pid: int) -> set[str]:
    """Returns the addresses at which a process listens, as /proc/net has them."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(descriptor))
        except FileNotFoundError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in inodes:
                found.add(words[1])
    return found


def status_of(page, box: str) -> str:
    return page.locator(f"#{box} textarea").input_value()


def wait_for_status(page, box: str, text: str) -> None:
    page.wait_for_function(
        "([box, text]) => document.querySelector(`#${box} textarea`).value.includes(text)",
        arg=[box, text],
    )


def fill(page, field: str, text: object) -> None:
    page.locator(f"#{field} :is(textarea, input)").first.fill(str(text))


def download(page, link, folder: Path) -> Path:
    with page.expect_download() as started:
        link.click()
    file = folder / started.value.suggested_filename
    started.value.save_as(file)
    return file


def prepare_page(page, material, steps: int) -> None:
    """Uploads the clip and writes what a tuning of the small model needs."""
    page.locator("#clip input").click()
    page.get_by_role("option", name="a clip of mine").click()
    page.locator("#upload input[type=file]").set_input_files(material.clip)
    page.locator("#upload").get_by_text("moving square").first.wait_for()
    page.get_by_role("button", name="Settings").click()
    fill(page, "model", material.model)
    page.locator("#model input").press("Enter")
    page.wait_for_function("() => document.querySelector('#steps input').value === '500'")
    page.get_by_role("button", name="Frames").first.click()
    for field, value in {"size": 32, "steps": steps, "sampling-steps": 3, "count": 4}.items():
        fill(page, field, value)
        page.locator(f"#{field} input").first.press("Enter")
    fill(page, "caption", f"{SCRIPT} is moving")
    page.wait_for_function("() => document.querySelectorAll('#frames img').length === 4")


def test_the_whole_path_from_an_upload_to_the_downloads(server, open_page, material, tmp_path):
    [address] = listening_addresses(server.process.pid)
    assert address == f"0100007F:{server.port:04X}", "loopback only"
    page = open_page(server, accept_downloads=True)
    prepare_page(page, material, STEPS)
    fill(page, "preview-prompt", "")
    page.locator("#tune").click()
    wait_for_status(page, "tuning", "tuning: step")

    # Another page waits, and leaves the queue.
    other = open_page(server)
    other.locator("#sample").click()
    wait_for_status(other, "sampling", "tune on a clip first")
    other.locator("#tune").click()
    wait_for_status(other, "tuning", "waiting: 1 job is before this one")
    other.locator("#cancel").click()
    wait_for_status(other, "tuning", "cancelled before it began")

    page.locator("#cancel").click()
    wait_for_status(page, "tuning", "is saved; Tune goes on from there")
    assert page.locator("#loss :is(canvas, svg)").count() > 0
    [run] = (server.folder / "runs").iterdir()
    saved = max(int(path.name) for path in (run / "checkpoints").iterdir())
    assert f"step {saved} of {STEPS}" in status_of(page, "tuning")

    fill(page, "steps", saved + 10)
    fill(page, "preview-prompt", "a ball is moving")
    page.locator("#tune").click()
    wait_for_status(page, "tuning", f"tuned: {saved + 10} steps")
    page.locator("#preview video").wait_for()
    page.wait_for_function(
        "text => document.querySelector('#tuning textarea').value === text",
        arg=f"tuned: {saved + 10} steps",
    )
    assert f"going on from {run / 'checkpoints' / str(saved)}" in "".join(server.lines)

    fill(page, "prompts", f"{SCRIPT}\n{LONG}")
    page.locator("#sample").click()
    wait_for_status(page, "sampling", "sampled 2 of 2")
    assert page.title() == "Tune-A-Video", "prompts and captions stay text"
    assert page.locator("main script, main img[src=x]").count() == 0
    page.wait_for_function("() => document.querySelector('#beside video').videoWidth === 512")
    links = page.locator("#videos a[download]")
    assert links.count() == 4
    beside = download(page, links.last, tmp_path)
    assert read_all_frames(beside).shape == (4, 256, 512, 3)

    page.locator("#make-adapter").click()
    link = page.locator("#adapter a[download]")
    link.wait_for()
    adapter = read_adapter(download(page, link, tmp_path))
    assert adapter.step == saved + 10
    assert adapter.inverted is not None
    own = (server.address, "data:", "blob:")
    assert not [url for url in (*page.asked, *other.asked) if not url.startswith(own)]

    # No other files, whatever the environment says.
    assert server.file(run / "config.yaml") == 200
    secret = tmp_path / "secret.txt"
    secret.write_text("not to be served")
    for path in (secret, "/etc/passwd", material.model / "unet/config.json", Path(__file__)):
        assert server.file(path) == 403
    assert server.file("https://example.com/") == 403
    assert server.status("/", Host="stranger.example") == 400

    # The step of a run that is being tuned is saved.
    fill(page, "steps", STEPS)
    page.locator("#tune").click()
    wait_for_status(page, "tuning", f"of {STEPS}")
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(600) == 128 + signal.SIGINT
    server_said = "".join(server.lines)
    assert "Traceback" not in server_said
    assert max(int(path.name) for path in (run / "checkpoints").iterdir()) > saved + 10
    assert "SIGINT: saved" in server_said


def test_mistakes_are_told_in_words(server, open_page, tmp_path):
    page = open_page(server)
    fill(page, "model", tmp_path / "<b>none</b>")
    page.locator("#model input").press("Enter")
    page.locator("#tune").click()
    wait_for_status(page, "tuning", "error: pretrained_model_path: ")
    assert "<b>none</b>" in status_of(page, "tuning")

    page.locator("#clip input").click()
    page.get_by_role("option", name="a clip of mine").click()
    broken = tmp_path / "broken <i>clip.mp4"
    broken.write_bytes(b"no video")
    page.locator("#upload input[type=file]").set_input_files(broken)
    page.wait_for_function("() => document.querySelector('#wrong textarea')?.value.length > 0")
    assert page.locator("#upload i, #wrong i").count() == 0
    assert "Traceback" not in "".join(server.lines)


def test_a_file_over_the_limit_is_refused_by_the_server(server):
    for size, status in ((2**10, 200), (2**21, 413)):
        head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
        connection = HTTPConnection("127.0.0.1", server.port, timeout=600)
        form = {"Content-Type": "multipart/form-data; boundary=x"}
        body = head + bytes(size) + b"\r\n--x--\r\n"
        connection.request("POST", "/gradio_api/upload", body, form)
        assert connection.getresponse().status == status
    [kept] = (server.folder / "uploads").rglob("a.mp4")
    assert kept.stat().st_size == 2**10


def test_the_page_fits_a_phone_in_light_and_dark(server, open_page, tmp_path):
    for scheme in ("light", "dark"):
        phone = {"viewport": {"width": 360, "height": 640}, "color_scheme": scheme}
        page = open_page(server, has_touch=True, **phone)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, "nothing is cut off"
        page.screenshot(path=tmp_path / f"phone-{scheme}.png", full_page=True)
