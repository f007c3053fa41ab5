"""Write notebooks/tav_jax.ipynb from notebooks/edit_a_video.py, a script in the percent format.

python launch/notebook.py
"""

from pathlib import Path

import nbformat

# Not tav_jax.py: the folder of a running notebook comes first where Python looks for packages.
SCRIPT = Path(__file__).parents[1] / "notebooks/edit_a_video.py"
NOTEBOOK = SCRIPT.with_name("tav_jax.ipynb")
MARKDOWN = "[markdown]"


def notebook_of(script: str) -> nbformat.NotebookNode:
    """Return the notebook of a script, whose cells begin with `# %%` or `# %% [markdown]`."""
    notebook = nbformat.v4.new_notebook()
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    for number, cell in enumerate(script.split("# %%")[1:]):
        kind, _, text = cell.partition("\n")
        if kind.strip() == MARKDOWN:
            lines = [line.removeprefix("#").removeprefix(" ") for line in text.splitlines()]
            made = nbformat.v4.new_markdown_cell("\n".join(lines).strip())
        else:
            made = nbformat.v4.new_code_cell(text.strip())
        made.id = f"cell-{number}"  # the same each time, so that a diff shows what has changed
        notebook.cells.append(made)
    return notebook


if __name__ == "__main__":
    nbformat.write(notebook_of(SCRIPT.read_text()), NOTEBOOK)
