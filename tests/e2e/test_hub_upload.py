"""`convert --push`: a model with its card for the Hub, shown or uploaded."""

import base64
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

from tav_jax import convert
from tav_jax.runs.adapters import portable, read_adapter
from tav_jax.runs.hub_upload import model_card
from tav_jax.runs.run import Run

REPO = "someone/square-is-moving"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload of small files asks for; it keeps what it is sent."""

    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        known = self.headers.get("Authorization") == "Bearer hf_right"
        if self.path != "/api/whoami-v2":
            self.answer(404, {"error": "not found"})
        elif known:
            self.answer(200, {"type": "user", "name": "someone"})
        else:
            self.answer(401, {"error": "Invalid username or password."})

    def do_POST(self):
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        if self.headers.get("Transfer-Encoding") == "chunked":
            while count := int(self.rfile.readline(), 16):
                body += self.rfile.read(count)
                self.rfile.readline()
        address = f"http://{self.headers['Host']}/{REPO}"
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer(200, {"url": address})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
            self.answer(200, {"files": modes})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[line["value"]["path"]] = content
            self.answer(
                200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{address}/commit/0"}
            )
        else:
            self.answer(200, {"message": "ok"})

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.created, server.files = [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def front_matter(card):
    _, matter, body = card.split("---\n", 2)
    return yaml.safe_load(matter), body


def test_a_dry_run_shows_the_card_and_the_files(finished_run, cli):
    done = cli(convert, finished_run.folder, "--push", REPO, "--dry-run")
    assert done.status == 0, done.err
    matter, body = front_matter(done.out)
    assert matter["training_prompt"] == "a square is moving"
    assert "tune-a-video" in matter["tags"]
    assert "base_model" not in matter, "the base is a folder of this machine"
    assert str(finished_run.folder.parent) not in done.out
    assert f"--adapter {REPO}" in body
    for file in ("README.md", "adapter.safetensors", "config.yaml", "samples/contact-sheet.png"):
        assert f"\n{file}: " in body
    assert "nothing was uploaded" in body


def test_the_card_names_a_base_model_of_the_hub_and_escapes_prompts(finished_run):
    config = Run.open(finished_run.folder).config
    prompt = "<script>alert(1)</script> | [a](http://b) *c*\n---\nlicense: mit"
    config = replace(
        portable(config),
        pretrained_model_path="CompVis/stable-diffusion-v1-4",
        train_data=replace(config.train_data, prompt=prompt),
        validation_data=replace(config.validation_data, prompts=(prompt,)),
    )
    card = model_card(config, [], form="adapter", repo=REPO, scores={"CLIP score": 26.5})
    matter, body = front_matter(card)
    assert matter["base_model"] == "CompVis/stable-diffusion-v1-4"
    assert matter["base_model_relation"] == "adapter"
    assert matter["license"] == "creativeml-openrail-m"
    assert matter["training_prompt"] == " ".join(prompt.split())
    assert "<script" not in body
    assert "[a](" not in body
    assert "| CLIP score | 26.5 |" in body


def test_it_is_uploaded(finished_run, hub, start, tmp_path):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    environment = {
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": "hf_right",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    command = ("-m", "tav_jax.convert", finished_run.folder, "--push", REPO, "--private")
    out, err = start(*command, environment=environment).communicate(timeout=600)
    assert f"uploaded to {endpoint}/{REPO}" in out, err
    assert hub.created == [{"name": "square-is-moving", "organization": "someone"} | hub.created[0]]
    assert hub.created[0].get("private") or hub.created[0].get("visibility") == "private"
    assert set(hub.files) >= {"README.md", "adapter.safetensors", "config.yaml"}
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(hub.files["adapter.safetensors"])
    assert read_adapter(path).step == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--push", "name"), "a repository is named USER/NAME"),
        (("--push", REPO, "--to", "unet"), "uploads --to adapter or --to pipeline"),
        (("--push", REPO, "--to", "adapter", "x.safetensors"), "and writes no OUT"),
        ((), "nothing to write"),
        (("--push", REPO), "the Hub does not know who you are"),
    ],
)
def test_what_cannot_be_uploaded_is_said_at_once(finished_run, cli, arguments, message):
    done = cli(convert, finished_run.folder, *arguments)
    assert done.status == 1
    assert message in done.err
