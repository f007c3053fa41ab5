"""The README's programs run as printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_programs_of_the_readme_run_as_printed(tmp_path):
    programs = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(programs) == 3
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    # Each program continues from the one before. The last uses both devices.
    done = subprocess.run(
        [sys.executable, "-c", "".join(programs)],
        cwd=tmp_path,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(2, 8, 64, 64, 3) uint8\n"
    for name in ("edits.png", "tuned/unet/config.json"):
        assert (tmp_path / name).is_file()
