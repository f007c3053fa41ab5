"""The page of a run, and one page that compares several: HTML that needs no other file.

Texts become elements' texts, which ElementTree escapes; nothing is put together from strings.
"""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, tostring

from tav_jax.errors import UserError
from tav_jax.files import megabytes
from tav_jax.reading import why_not_a_file
from tav_jax.runs.charts import Line, line_chart, running_mean
from tav_jax.runs.report import Edit, Report, flat_settings
from tav_jax.text import printable
from tav_jax.video.pages import Embedded, Source, embed_videos, fill_page, write_page

PAGE = Path(__file__).with_name("report.html")
TITLE, CONTENT = "<!--title-->", "<!--content-->"
MARK = '<meta name="generator" content="tav_jax.report">'  # by which our pages are known
MOST_BYTES = 10_000_000
MOST_SETTINGS = 500_000  # characters of a config.yaml; it is beside the page anyway
COLOURS = 8  # styles of lines in the page

ARROWS = {"more": "\N{UPWARDS ARROW}", "less": "\N{DOWNWARDS ARROW}"}
ARROWS_SAY = f"{ARROWS['more']} more is better, {ARROWS['less']} less is better."
STAGES = {
    "read": "read the clip",
    "load": "load the model",
    "encode": "encode clip and caption",
    "compile": "compile the step",
    "tune": "tune",
    "checkpoint": "save checkpoints",
    "invert": "invert the clip",
    "sample": "sample edits",
    "decode": "decode edits",
    "write": "write videos",
}
MAIN_SETTINGS = (
    "pretrained_model_path",
    "train_data.video_path",
    "learning_rate",
    "lr_scheduler",
    "trainable_modules",
    "mixed_precision",
    "attention_scope",
    "seed",
    "validation_data.sampler",
    "validation_data.num_inference_steps",
    "validation_data.guidance_scale",
    "validation_data.negative_prompt",
    "validation_data.use_inv_latent",
)

Child = Element | str | None


def write_report(path: Path, reports: Sequence[Report]) -> str:
    """Write the page of one run, or one that compares several; return a note on its videos.

    Args:
        path: The file. A page of ours is replaced.
        reports: What it shows.

    Raises:
        UserError: Another file has that name, or it cannot be written.
    """
    require_ours(path)
    make = _single if len(reports) == 1 else _comparison
    sources, edits = _videos(reports)
    title = reports[0].config.train_data.prompt if len(reports) == 1 else "Runs compared"

    def page(embedded: Sequence[Embedded], note: str) -> str:
        shown = dict(zip([*sources, *edits], embedded, strict=True))
        body = make(reports, lambda key: shown[key])
        if note:
            body.insert(1, element("p", note, cls="note"))
        content = "".join(tostring(part, "unicode", method="html") for part in body)
        return fill_page(PAGE, {TITLE: _escaped(title), CONTENT: content})

    videos = [*sources.values(), *edits.values()]
    # What is left for videos: the page without them, each with the longest reason to be missing.
    rest = len(page([Embedded(None, "-" * 320)] * len(videos), "-" * 200).encode())
    embedded, note = embed_videos(videos, MOST_BYTES - rest)
    write_page(path, page(embedded, note))
    return note


def require_ours(path: Path) -> None:
    """Raise `UserError` if a file is there that is no page of ours."""
    problem = why_not_a_file(path)
    if problem == "No such file":
        return
    if problem is None:
        with path.open("rb") as file:
            if MARK.encode() in file.read(2000):
                return
    raise UserError(f"{path}: it is there already and no report of a run; rename it")


Key = tuple[int, str, str]  # number of the run, the edit's prompt and file; both empty: its clip


def _videos(reports: Sequence[Report]) -> tuple[dict[Key, Source], dict[Key, Source]]:
    """Return the clips and the edits of all runs."""
    clips, edits = {}, {}
    for number, report in enumerate(reports):
        if report.source is not None:
            clips[number, "", ""] = Source(None, report.source, report.fps)
        for edit in report.edits:
            edits[_key(number, edit)] = Source(edit.video, None, report.fps)
    return clips, edits


def _key(number: int, edit: Edit) -> Key:
    return number, edit.prompt, str(edit.video)


Look = Callable[[Key], Embedded]


def _single(reports: Sequence[Report], look: Look) -> list[Element]:
    (report,) = reports
    data = report.config.train_data
    done = f"{report.steps_done} of {report.config.max_train_steps} steps"
    facts = [
        report.name,
        f"{report.config.pretrained_model_path}",
        f"{data.n_sample_frames} frames of {data.width}x{data.height}",
        done,
        _date(report),
    ]
    header = element(
        "header",
        element("h1", data.prompt, cls="text"),
        element("p", *[element("span", fact) for fact in facts if fact], cls="facts"),
    )
    grid = element("div", cls="grid")
    grid.append(_clip(report, 0, look))
    for edit in report.edits:
        grid.append(_edit(report, 0, edit, look))
    videos = element("section", _controls(), grid, cls="videos")
    if not report.edits:
        videos.append(element("p", "There are no edits yet.", cls="note"))
    return [
        header,
        videos,
        *_curves(reports),
        *_scores(report),
        *_costs(report),
        _commands(report, "Commands"),
        _settings(report),
    ]


def _comparison(reports: Sequence[Report], look: Look) -> list[Element]:
    captions = dict.fromkeys(report.config.train_data.prompt for report in reports)
    prompts = list(dict.fromkeys(edit.prompt for report in reports for edit in report.edits))
    header = element(
        "header",
        element("h1", f"{len(reports)} runs compared"),
        element("p", *[element("span", caption, cls="text") for caption in captions], cls="facts"),
    )
    head = element("tr", element("th", "run"), element("th", "clip"))
    for prompt in prompts:
        head.append(element("th", element("div", prompt, cls="text"), scope="col"))
    body = element("tbody")
    for number, report in enumerate(reports):
        done = f"{report.steps_done} of {report.config.max_train_steps} steps"
        name = element("th", element("i", cls=f"key {_style(number)}"), scope="row")
        name.extend([element("span", report.name), element("small", done)])
        row = SubElement(body, "tr")
        clip = _clip(report, number, look, with_prompt=len(captions) > 1)
        row.extend([name, element("td", clip)])
        for prompt in prompts:
            edits = [edit for edit in report.edits if edit.prompt == prompt]
            cell = [_edit(report, number, edit, look, with_prompt=False) for edit in edits]
            row.append(element("td", *cell) if cell else element("td", "-"))
    table = element("table", element("thead", head), body, cls="runs")
    videos = element("section", _controls(), element("div", table, cls="wide"), cls="videos")
    return [
        header,
        videos,
        *_differences(reports),
        *_curves(reports),
        *_compared_scores(reports),
        *_compared_costs(reports),
        *[_commands(report, f"Commands: {report.name}") for report in reports],
    ]


def _date(report: Report) -> str:
    return "" if report.last_logged is None else f"{report.last_logged:%Y-%m-%d %H:%M} UTC"


def _controls() -> Element:
    scrubber = element("input", type="range", id="scrubber", min="0", max="0", value="0", step="1")
    scrubber.set("aria-label", "frame of all videos")
    return element(
        "div",
        element("button", "Play", type="button", id="play"),
        scrubber,
        element("output", id="frame"),
        cls="controls",
    )


def _clip(report: Report, number: int, look: Look, *, with_prompt: bool = True) -> Element:
    caption = report.config.train_data.prompt if with_prompt else ""
    shown = (
        Embedded(None, f"cannot be read: {report.no_source}")
        if report.source is None
        else look((number, "", ""))
    )
    return _figure(report, shown, "clip", caption, kind="clip")


def _edit(
    report: Report, number: int, edit: Edit, look: Look, *, with_prompt: bool = True
) -> Element:
    figure = _figure(
        report, look(_key(number, edit)), edit.prompt, edit.prompt if with_prompt else "", "edit"
    )
    if edit.note:
        figure.append(element("p", edit.note, cls="text small"))
    return figure


def _figure(report: Report, shown: Embedded, label: str, caption: str, kind: str) -> Element:
    height, width = report.size
    shape = f"aspect-ratio: {width} / {height}"
    if shown.url is None:
        video = element("p", f"This video is {shown.reason}", cls="missing text", style=shape)
        if shown.reason.startswith("cannot"):
            video.text = f"This video {shown.reason}"
    else:
        video = element("video", src=shown.url, style=shape, preload="auto")
        video.set("playsinline", "")
        video.set("muted", "")
        video.set("data-fps", f"{report.fps:g}")
        video.set("aria-label", printable(label))
    figure = element("figure", video, cls=f"video {kind}")
    if kind == "clip":
        figure.append(element("p", "the clip", cls="tag"))
    if caption:
        figure.append(element("figcaption", caption, cls="text"))
    return figure


def _style(number: int) -> str:
    return f"c{number % COLOURS}"


def _curves(reports: Sequence[Report]) -> list[Element]:
    logged = [(n, r) for n, r in enumerate(reports) if len(r.metrics["step"])]
    if not logged:
        return []
    losses, legend = [], {}
    for number, report in logged:
        steps, loss = report.metrics["step"], report.metrics["loss"]
        mean, count = running_mean(loss)
        if len(reports) == 1:
            losses.append(Line(steps, loss, "faint"))
            legend = {"each step": "faint", f"mean of {count} steps": _style(0)}
        else:
            legend[report.name] = _style(number)
        losses.append(Line(steps, mean, _style(number)))
    rates = [Line(r.metrics["step"], r.metrics["lr"], _style(n)) for n, r in logged]
    title = "loss" if len(reports) == 1 else "loss, running mean"
    charts = element("div", line_chart(title, losses, legend), cls="charts")
    charts.append(line_chart("learning rate", rates))
    return [element("section", element("h2", "Loss and learning rate"), charts)]


def _scores(report: Report) -> list[Element]:
    names = report.metric_names()
    if not names:
        return []
    rows = [[edit.prompt, *(_score(edit, name) for name in names)] for edit in report.edits]
    if len(report.edits) > 1:
        rows.append(["mean", *(_mean(report, name) for name in names)])
    table = _table(["prompt", *(_metric(name, report) for name in names)], rows)
    return [
        element("section", element("h2", "Scores"), table, element("p", ARROWS_SAY, cls="note"))
    ]


def _compared_scores(reports: Sequence[Report]) -> list[Element]:
    names = list(dict.fromkeys(name for report in reports for name in report.metric_names()))
    if not names:
        return []
    rows = [[report.name, *(_mean(report, name) for name in names)] for report in reports]
    head = ["run", *(_metric(name, reports[0]) for name in names)]
    title = element("h2", "Scores, means over edits")
    return [element("section", title, _table(head, rows), element("p", ARROWS_SAY, cls="note"))]


def _metric(name: str, report: Report) -> str:
    return f"{name} {ARROWS[report.better[name]]}"


def _score(edit: Edit, name: str) -> str:
    return _number(edit.scores[name]) if name in edit.scores else "-"


def _mean(report: Report, name: str) -> str:
    values = [edit.scores[name] for edit in report.edits if name in edit.scores]
    return _number(sum(values) / len(values)) if values else "-"


def _number(value: float) -> str:
    return f"{value:.{2 if abs(value) >= 10 else 4}f}"


def _costs(report: Report) -> list[Element]:
    if not report.stages:
        return []
    total = sum(stage.seconds for stage in report.stages)
    has_peaks = any(stage.peak_bytes is not None for stage in report.stages)
    rows = element("tbody")
    for stage in report.stages:
        share = stage.seconds / total if total else 0.0
        bar = element("div", cls="bar", style=f"width: {100 * share:.1f}%")
        row = SubElement(rows, "tr")
        row.append(element("td", STAGES.get(stage.name, stage.name)))
        row.append(element("td", _seconds(stage.seconds), cls="number"))
        row.append(element("td", bar, cls="bars"))
        if has_peaks:
            row.append(element("td", _bytes(stage.peak_bytes), cls="number"))
    titles = element("tr", element("th", "stage"), element("th", "time", cls="number"))
    titles.append(element("th", "share", cls="bars"))
    if has_peaks:
        titles.append(element("th", "most memory until then", cls="number"))
    head = element("thead", titles)
    table = element("div", element("table", head, rows, cls="costs"), cls="wide")
    return [
        element(
            "section",
            element("h2", "Time and memory"),
            element("p", ". ".join(_summary(report)) + "."),
            table,
        )
    ]


def _summary(report: Report) -> list[str]:
    """Return sentences on a run's time and memory."""
    said = [f"{_seconds(sum(stage.seconds for stage in report.stages))} in all"]
    if report.seconds_per_step is not None:
        said.append(f"A step took {_seconds(report.seconds_per_step)} (median)")
    if report.planned_bytes is not None:
        said.append(f"The compiler planned {_bytes(report.planned_bytes)} for it")
    if (peak := _peak(report)) is not None:
        said.append(f"Most memory in use: {_bytes(peak)}")
    return said


def _peak(report: Report) -> int | None:
    peaks = [stage.peak_bytes for stage in report.stages if stage.peak_bytes is not None]
    return max(peaks, default=None)


def _compared_costs(reports: Sequence[Report]) -> list[Element]:
    rows = []
    for report in reports:
        total, step = sum(stage.seconds for stage in report.stages), report.seconds_per_step
        rows.append(
            [
                report.name,
                _seconds(total) if report.stages else "-",
                "-" if step is None else _seconds(step),
                _bytes(report.planned_bytes),
                _bytes(_peak(report)),
            ]
        )
    head = ["run", "time in all", "a step (median)", "planned for a step", "most memory"]
    return [element("section", element("h2", "Time and memory"), _table(head, rows))]


def _seconds(value: float) -> str:
    if value >= 5400:
        return f"{value / 3600:.1f} h"
    if value >= 90:
        return f"{value / 60:.1f} min"
    return f"{value:.1f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def _bytes(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else megabytes(float(size))


def _differences(reports: Sequence[Report]) -> list[Element]:
    settings = [flat_settings(report.config) for report in reports]
    names = [name for name in settings[0] if len({repr(one[name]) for one in settings}) > 1]
    if not names:
        return []
    rows = [
        [report.name, *(_value(one[name]) for name in names)]
        for report, one in zip(reports, settings, strict=True)
    ]
    return [element("section", element("h2", "What differs"), _table(["run", *names], rows))]


def _value(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if text and value is not None else "-"


def _commands(report: Report, title: str) -> Element:
    folder = report.run.folder.absolute()
    again = f"output_dir={folder.with_name(f'{folder.name}-again')}"
    config = str(report.run.config_file.absolute())
    commands = {
        "Repeat this run": ["tune", "--config", config, again],
        "Sample more prompts": ["sample", "--run", str(folder), "--prompt", "..."],
    }
    if not report.metric_names():
        commands["Score the edits, before this page is written again"] = [
            "evaluate",
            "--run",
            str(folder),
        ]
    section = element("section", element("h2", title))
    for what, words in commands.items():
        section.append(element("p", what))
        line = shlex.join(["python", "-m", f"tav_jax.{words[0]}", *words[1:]])
        section.append(element("pre", line, cls="command"))
    return section


def _settings(report: Report) -> Element:
    flat = flat_settings(report.config)
    rows = [[name.rpartition(".")[2], _value(flat[name])] for name in MAIN_SETTINGS]
    text = report.config_text
    if len(text) > MOST_SETTINGS:
        text = f"They are too long for this page; {report.run.config_file} has them."
    return element(
        "section",
        element("h2", "Settings"),
        _table(["key", "value"], rows),
        element("details", element("summary", "all of config.yaml"), element("pre", text)),
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Element:
    """Return a table. A cell that is a number stands to the right."""
    body = element("tbody")
    for row in rows:
        first, *rest = row
        cells = [element("td", element("div", value, cls="text")) for value in rest]
        body.append(element("tr", element("th", element("div", first, cls="text")), *cells))
    names = element("thead", element("tr", *[element("th", name) for name in head]))
    return element("div", element("table", names, body), cls="wide")


def element(tag: str, *children: Child, cls: str = "", **attributes: str) -> Element:
    """Return an element. Text that could turn or hide other text is written as escapes."""
    made = Element(tag, ({"class": cls} if cls else {}) | attributes)
    for child in children:
        if isinstance(child, str):
            assert not len(made)  # a text comes first
            made.text = (made.text or "") + printable(child)
        elif child is not None:
            made.append(child)
    return made


def _escaped(text: str) -> str:
    """Return the HTML of a text."""
    return tostring(element("b", text), "unicode", method="html")[len("<b>") : -len("</b>")]
