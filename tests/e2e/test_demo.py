"""The page of `python -m tav_jax.demo` in a real browser, from an upload to the downloads.

It needs Gradio (the extra `demo`), playwright (the extra `browser`) and the system's Chromium.
"""

import os
import signal
import socket
import threading
import time
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import quote

import pytest

from tav_jax.demo import __main__ as demo
from tav_jax.runs.adapters import read_adapter
from tav_jax.video.read import read_all_frames

pytest.importorskip("gradio")
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
        self._readers = [
            threading.Thread(target=self.lines.extend, args=(stream,), daemon=True)
            for stream in (process.stdout, process.stderr)
        ]
        for reader in self._readers:
            reader.start()

    def wait_for(self, text: str) -> None:
        """Waits until the server has said something."""
        while True:
            is_over = not any(reader.is_alive() for reader in self._readers)
            if any(text in line for line in self.lines):
                return
            assert not is_over, "".join(self.lines)
            time.sleep(0.2)

    def status(self, method: str, path: str, body: bytes | None = None, **headers: str) -> int:
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=600)) as connection:
            connection.request(method, path, body, headers)
            return connection.getresponse().status

    def file(self, path: object) -> int:
        return self.status("GET", f"/gradio_api/file={quote(str(path))}")


@pytest.fixture(scope="module")
def server(start_once, tmp_path_factory):
    """One for all tests of this file; the last of them ends it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("demo")
    options = ["--output-dir", folder, "--port", port, "--max-upload-mb", 1]
    process = start_once("-m", "tav_jax.demo", *options, environment=HOSTILE)
    served = Server(process, port, folder)
    served.wait_for("serving http://127.0.0.1")
    return served


@pytest.fixture
def open_page(new_context, server):
    """Opens the page in a browser's window of its own."""

    def new(**options):
        page = new_context(**options).new_page()
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(server.address)
        page.locator("#frames img").first.wait_for()
        return page

    return new


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


def newest_step(run: Path) -> int:
    return max(int(path.name) for path in (run / "checkpoints").iterdir())


def prepare_page(page, material) -> None:
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
    # Those of test_demo_jobs.py: what one of them compiles the other loads.
    values = {"size": 32, "steps": STEPS, "learning-rate": 0.003, "sampling-steps": 3, "count": 3}
    for field, value in values.items():
        fill(page, field, value)
        page.locator(f"#{field} input").first.press("Enter")
    fill(page, "caption", f"{SCRIPT} is moving")
    fill(page, "preview-prompt", "")
    page.wait_for_function("() => document.querySelectorAll('#frames img').length === 3")


def test_nothing_listens_beyond_loopback_whatever_the_environment_says(server):
    assert listening_addresses(server.process.pid) == {f"0100007F:{server.port:04X}"}
    assert server.status("GET", "/", Host="stranger.example") == 400


def test_an_address_that_cannot_be_listened_at_is_refused(server, cli, tmp_path):
    for host in ("127.0.0.1", "256.1.1.1", "http://127.0.0.1", "a..b"):
        options = ["--host", host, "--port", server.port]
        done = cli(demo, *options, "--output-dir", tmp_path / "other")
        assert done.status == 1
        assert f"error: {' '.join(map(str, options))}: cannot be listened at: " in done.err
    assert not (tmp_path / "other").exists()


def test_no_other_file_is_served(server, material, tmp_path):
    kept = server.folder / "runs" / "kept.txt"
    kept.parent.mkdir(exist_ok=True)
    secret = tmp_path / "secret.txt"
    for file in (kept, secret):
        file.write_text("text")
    assert server.file(kept) == 200
    for path in (secret, "/etc/passwd", material.model / "unet/config.json", Path(__file__)):
        assert server.file(path) == 403
    assert server.file("https://example.com/") == 403
    kept.unlink()


def test_a_file_over_the_limit_is_refused_by_the_server(server):
    for name, size, status in (("small.mp4", 2**10, 200), ("large.mp4", 2**21, 413)):
        head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        body = head.encode() + bytes(size) + b"\r\n--x--\r\n"
        form = {"Content-Type": "multipart/form-data; boundary=x"}
        assert server.status("POST", "/gradio_api/upload", body, **form) == status
    [kept] = (server.folder / "uploads").rglob("small.mp4")
    assert kept.stat().st_size == 2**10
    assert not list(server.folder.rglob("large.mp4"))


def test_a_phone_shows_it_all_and_mistakes_are_told_in_words(server, open_page, tmp_path):
    page = open_page(has_touch=True, viewport={"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") == 360, "nothing is cut off"
    ends = "all => all.map(one => one.getBoundingClientRect().right)"
    assert max(page.locator("#frames img").evaluate_all(ends)) < 360
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


def test_the_whole_path_from_an_upload_to_the_downloads(server, open_page, material, tmp_path):
    closed, page = open_page(), open_page(accept_downloads=True)
    page.locator("#sample").click()
    wait_for_status(page, "sampling", "tune on a clip first")
    for one in (closed, page):
        prepare_page(one, material)

    # One page tunes. The other waits and leaves the queue, then waits until the first is closed.
    closed.locator("#tune").click()
    wait_for_status(closed, "tuning", "tuning: step")
    page.locator("#tune").click()
    wait_for_status(page, "tuning", "waiting: 1 job is before this one")
    assert page.locator("#tune").is_disabled(), "Gradio would ignore it"
    page.locator("#cancel").click()
    wait_for_status(page, "tuning", "cancelled before it began")
    page.locator("#tune").click()
    wait_for_status(page, "tuning", "waiting: 1 job is before this one")
    closed.close()
    wait_for_status(page, "tuning", f"of {STEPS}")
    [run] = (server.folder / "runs").iterdir()
    server.wait_for(f"going on from {run / 'checkpoints'}")

    page.locator("#cancel").click()
    wait_for_status(page, "tuning", "is saved; Tune goes on from there")
    assert page.locator("#loss :is(canvas, svg)").count() > 0
    saved = newest_step(run)
    assert f"step {saved} of {STEPS}" in status_of(page, "tuning")

    end = f"tuned: {saved + 10} steps"
    fill(page, "steps", saved + 10)
    fill(page, "preview-prompt", "a ball is moving")
    page.locator("#tune").click()
    page.locator("#preview video").wait_for()
    page.wait_for_function(
        "text => document.querySelector('#tuning textarea').value === text", arg=end
    )
    server.wait_for(f"going on from {run / 'checkpoints' / str(saved)}")

    fill(page, "prompts", f"{SCRIPT}\n{LONG}")
    page.locator("#sample").click()
    wait_for_status(page, "sampling", "sampled 2 of 2")
    assert page.title() == "Tune-A-Video", "prompts and captions stay text"
    assert page.locator("main script, main img[src=x]").count() == 0
    page.wait_for_function("() => document.querySelector('#beside video').videoWidth === 512")
    links = page.locator("#videos a[download]")
    assert links.count() == 4
    beside = download(page, links.last, tmp_path)
    assert read_all_frames(beside).shape == (3, 256, 512, 3)

    page.locator("#make-adapter").click()
    link = page.locator("#adapter a[download]")
    link.wait_for()
    adapter = read_adapter(download(page, link, tmp_path))
    assert adapter.step == saved + 10
    assert adapter.inverted is not None
    own = (server.address, "data:", "blob:")
    assert not [url for url in (*closed.asked, *page.asked) if not url.startswith(own)]

    # Ctrl-C saves the step of a run that is being tuned.
    fill(page, "steps", STEPS)
    page.locator("#tune").click()
    wait_for_status(page, "tuning", f"of {STEPS}")
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(600) == 128 + signal.SIGINT
    assert newest_step(run) > saved + 10
    server.wait_for("SIGINT: saved")
    assert "Traceback" not in "".join(server.lines)
