"""The base model that ships: its size, its name, and that it draws what captions say."""

import re

import pytest

from tav_jax.pretrained.hub import SHIPPED
from tav_jax.pretrained.model import load_model
from tav_jax.worlds import text_to_image


def test_the_model_is_found_by_its_name_and_is_small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_model("tiny-scenes").unet.config.attention_scope == "sparse_causal"
    files = [path for path in SHIPPED["tiny-scenes"].rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    assert SHIPPED["tiny-scenes"] / "README.md" in files, "its model card"


@pytest.mark.usefixtures("optimized")
def test_images_show_what_captions_say(capsys, tmp_path):
    sheet = tmp_path / "sheet.png"
    arguments = ["--count", "40", "--guidance-scale", "3", "--sheet", str(sheet)]
    assert text_to_image.main(arguments) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "subject" in line]
    assert len(lines) == 2
    for line in lines:
        shares = [float(share) for share in re.findall(r"0\.\d+|1\.\d+", line)]
        assert len(shares) == 4
        assert min(shares) >= 0.9, line
    assert sheet.is_file()


def test_a_model_that_is_not_there_ends_in_a_line(capsys):
    assert text_to_image.main(["--model", "/no/such/folder"]) == 1
    assert "/no/such/folder" in capsys.readouterr().err
