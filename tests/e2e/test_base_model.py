"""The base models that ship: their sizes, their names, and that they draw what captions say."""

import re

import pytest

from tav_jax.pretrained.hub import SHIPPED
from tav_jax.pretrained.model import load_model
from tav_jax.worlds import text_to_image


@pytest.mark.parametrize(("name", "most_bytes"), [("tiny-scenes", 12e6), ("tiny-figures", 15e6)])
def test_a_model_is_found_by_its_name_and_is_small(name, most_bytes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unet = load_model(name).unet
    assert unet.config.attention_scope == "sparse_causal"
    assert sum(value.size for value in unet.params.values()) <= 6e6
    files = [path for path in SHIPPED[name].rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < most_bytes
    assert SHIPPED[name] / "README.md" in files, "its model card"


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(
    ("world", "count", "attributes", "least"),
    [("tiny-scenes", 40, 4, 0.9), ("figures", 20, 5, 0.7)],
)
def test_images_show_what_captions_say(world, count, attributes, least, capsys, tmp_path):
    sheet = tmp_path / "sheet.png"
    arguments = ["--world", world, "--count", str(count), "--sheet", str(sheet)]
    assert text_to_image.main(arguments) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "subject" in line]
    assert len(lines) == 2
    for line in lines:
        shares = [float(share) for share in re.findall(r"0\.\d+|1\.\d+", line)]
        assert len(shares) == attributes
        assert min(shares) >= least, line
    assert sheet.is_file()


def test_a_model_that_is_not_there_ends_in_a_line(capsys):
    assert text_to_image.main(["--model", "/no/such/folder"]) == 1
    assert "/no/such/folder" in capsys.readouterr().err
