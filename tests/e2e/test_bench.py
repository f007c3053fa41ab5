"""`python -m tav_jax.bench`: what it prints, and that its metrics are of what they say."""

import json
import re
from importlib.util import find_spec

import pytest

from tav_jax.bench import __main__ as bench
from tav_jax.bench.programs import make_programs, random_networks

TINY = ["--network", "small", "--frames", "2", "--size", "32", "--repeats", "1"]
PROMISED = {"tune_step_ms", "guided_step_ms", "inversion_step_ms", "compile_s", "peak_bytes"}


def metrics(capsys, *arguments):
    assert bench.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_models_folder_is_measured_and_printed_as_json_alone(capsys):
    row = metrics(
        capsys, "--model", "tiny-scenes", "--frames", "2", "--size", "16", "--repeats", "1"
    )
    assert row.keys() >= PROMISED
    assert all(row[name] > 0 for name in PROMISED)
    assert (row["network"], row["frames"], row["width"]) == ("tiny-scenes", 2, 16)
    assert set(row["attention"].values()) == {"einsum"}
    assert row["gradient_checkpointing"] == "none"


def test_every_combination_has_a_row_and_a_point_in_the_plot(capsys, tmp_path):
    rows = metrics(
        capsys,
        *TINY[:2],
        *["--frames", "1,2", "--size", "32", "--repeats", "1", "--programs", "encode"],
        *["--attention-scope", "sparse_causal,full", "--plot", str(tmp_path / "plot.png")],
    )
    assert [(row["frames"], row["attention_scope"]) for row in rows] == [
        (1, "sparse_causal"),
        (1, "full"),
        (2, "sparse_causal"),
        (2, "full"),
    ]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_people_get_a_table(capsys):
    assert bench.main([*TINY, "--programs", "decode"]) == 0
    said = capsys.readouterr().out
    assert "2 frames of 32x32, sparse_causal" in said
    assert "planned GB" in said
    assert "decode" in said


def test_a_trace_says_which_operations_take_longest(capsys, tmp_path):
    arguments = [*TINY, "--programs", "encode", "--profile", str(tmp_path)]
    profile = metrics(capsys, *arguments)["encode_profile"]
    shares = [operation["share"] for operation in profile["largest"]]
    assert len(shares) > 3
    assert shares == sorted(shares, reverse=True)
    assert 0.5 < sum(shares) < 1.001
    assert sum(profile["ms_by_kind"].values()) == pytest.approx(profile["busy_ms"], rel=0.01)
    assert list(tmp_path.glob("encode/**/*.trace.json.gz"))

    assert bench.main(arguments) == 0
    said = capsys.readouterr().out
    assert profile["largest"][0]["name"] in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "p", "--size", "32,64"], "--profile: .* one value to each flag"),
        (["--size", "36"], r"--size \[36\]: this model takes multiples of 8"),
        (["--repeats", "0"], "--repeats 0: expected 1 or more"),
        (["--model", "no-such-model"], "no folder 'no-such-model'"),
        (["--aot", "v9x:7"], "--aot v9x:7: .*expected h100 or h200, or a TPU slice"),
        (["--dump-hlo", "hlo", "--frames", "1,2"], "--dump-hlo: .* one value to each flag"),
        pytest.param(
            ["--aot", "h100"],
            r"--aot h100: .* needs pip install '\.\[aot-cuda\]'",
            marks=pytest.mark.skipif(find_spec("jax_cuda12_plugin") is not None, reason="is there"),
        ),
        pytest.param(
            ["--aot", "h100", "--chips", "9"],
            "--chips 9: h100 has 1 to 8",
            marks=pytest.mark.skipif(find_spec("jax_cuda12_plugin") is None, reason="needs it"),
        ),
    ],
)
def test_mistakes_end_in_a_line(capsys, arguments, message):
    assert bench.main(arguments) == 1
    assert re.search(message, capsys.readouterr().err)


def test_more_frames_cost_in_proportion_or_squared():
    def flops(frames, scope):
        networks = random_networks("small", "float32", only_shapes=True)
        networks = networks.with_unet_config(attention_scope=scope)
        programs = make_programs(networks, frames=frames, height=256, width=256)
        return programs["inversion_step"].flops()

    # What one more frame adds: the same each time, and one part that grows with the frames.
    four, eight, twelve = (flops(frames, "sparse_causal") for frames in (4, 8, 12))
    assert twelve - eight == pytest.approx(eight - four, rel=0.01)
    four, eight, twelve = (flops(frames, "full") for frames in (4, 8, 12))
    assert twelve - eight > 1.2 * (eight - four)


@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs pip install '.[tpu]'")
def test_a_step_compiles_for_a_tpu_that_is_not_here(bench_report):
    # 32x32 latents, so that the finest level has enough tokens for the kernel.
    row = bench_report(
        *("--aot", "v5e:2x2", "--network", "small", "--frames", "2", "--size", "256"),
        *("--programs", "inversion_step", "--gradient-checkpointing", "full"),
    )
    assert row["attention"]["32x32"] == "fused"
    assert row["attention"]["16x16"] == "einsum"
    assert 10e6 < row["inversion_step_planned_bytes"] < 2e9
