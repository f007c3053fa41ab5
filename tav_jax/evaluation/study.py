"""A preference study: one page that shows pairs of videos blindly, and the table of its answers.

The questions are those of the paper's user study (Wu et al. 2023, arXiv:2212.11565, section 4):
which video has the better quality, and which is more faithful to the prompt. Each pair has the same
source and prompt. A pair's winner is what most of its raters have chosen.
"""

import base64
import csv
import hashlib
import io
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tav_jax.errors import UserError
from tav_jax.evaluation.examples import Example, raise_all
from tav_jax.reading import read_text
from tav_jax.video.pages import data_url, fill_page, write_page

PAGE = Path(__file__).with_name("study.html")
MARK = "/*study*/"  # where the page's data goes

QUESTIONS = {
    "quality": "Which video has the better quality?",
    "faithfulness": "Which video shows better what the text says?",
}
COLUMNS = ("study", "rater", "pair", "prompt", "question", "left", "right", "answer")
SIDES = ("left", "right")
MOST_BYTES = 200 * 2**20  # of a page; browsers keep a page's text several times


class Pair(NamedTuple):
    """Two videos of one source and prompt, as they are shown."""

    left: Example
    right: Example


def make_pairs(examples: Sequence[Example], seed: int) -> list[Pair]:
    """Return the pairs of a study in random order, each with its sides in random order.

    The first system is compared with each other one on every clip and prompt that both have.

    Raises:
        UserError: There are no two systems, or they have no clip and prompt in common.
    """
    by_system: dict[str, dict[tuple[str, str], Example]] = {}
    for example in examples:
        by_system.setdefault(example.system, {})[example.clip, example.prompt] = example
    first, *others = by_system.values()
    if not others:
        raise UserError("--study: it compares systems; there is one, name another one too")
    pairs = [Pair(first[key], other[key]) for other in others for key in first if key in other]
    if not pairs:
        raise UserError(
            f"--study: {', '.join(by_system)} have no clip and prompt in common, so that no two "
            "videos can be compared"
        )
    draw = random.Random(seed)
    draw.shuffle(pairs)
    return [Pair(*draw.sample(pair, 2)) for pair in pairs]


def write_study(path: Path, pairs: Sequence[Pair], seed: int, fps: float) -> str:
    """Write the page, which needs no other file and no network; return the study's name.

    Args:
        path: The HTML file.
        pairs: What is compared.
        seed: The seed of the pairs' order, which is recorded.
        fps: The rate of videos that are given as folders of images.

    Raises:
        UserError: The page would be too large for browsers.
    """
    # Each once: the first system's videos are in a pair with each other system's.
    files = dict.fromkeys(one.video for one in itertools.chain.from_iterable(pairs))
    videos = {video: data_url(video, fps) for video in files}
    if (size := sum(map(len, videos.values()))) > MOST_BYTES:
        raise UserError(
            f"--study: the videos take {size / 2**20:.0f} MB, a page at most "
            f"{MOST_BYTES / 2**20:.0f}; make several studies"
        )
    names = list(videos)
    study = {
        "seed": seed,
        "questions": QUESTIONS,
        "pairs": [
            {
                "prompt": pair.left.prompt,
                "left": names.index(pair.left.video),
                "right": names.index(pair.right.video),
                # Not to be read by chance by those who rate.
                "systems": base64.b64encode(
                    json.dumps([pair.left.system, pair.right.system]).encode()
                ).decode(),
            }
            for pair in pairs
        ],
        "videos": list(videos.values()),
    }
    text = json.dumps(study)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    # A script of JSON ends at the first tag that closes it, whatever the quotes.
    data = json.dumps({"study": name, **study}).replace("<", "\\u003c")
    write_page(path, fill_page(PAGE, {MARK: data}))
    return name


@dataclass(frozen=True)
class Answer:
    """What a rater has chosen for one question about one pair."""

    rater: str
    pair: int
    question: str
    left: str
    right: str
    answer: str

    @property
    def chosen(self) -> str:
        """Return the system that was chosen."""
        return self.left if self.answer == "left" else self.right


def read_answers(files: Sequence[Path]) -> tuple[str, list[Answer]]:
    """Return the name of the study and the answers of all its raters.

    Raises:
        UserError: A file is no export of the page, files are of different studies, or a rater has
            answered a question twice. All problems are listed.
    """
    problems: list[str] = []
    found: dict[tuple[str, int, str], Answer] = {}
    studies: dict[str, Path] = {}
    for file in files:
        for line, row in _rows(file, problems):
            studies.setdefault(row["study"], file)
            key = (row["rater"], int(row["pair"]), row["question"])
            if key in found:
                problems.append(f"{file}, line {line}: this rater has answered it before")
            found[key] = Answer(*key, row["left"], row["right"], row["answer"])
    if len(studies) > 1:
        listed = ", ".join(f"{file} (study {name})" for name, file in studies.items())
        problems.insert(0, f"--answers: files of different studies: {listed}")
    sides: dict[int, tuple[str, str]] = {}
    for one in found.values():
        if sides.setdefault(one.pair, (one.left, one.right)) != (one.left, one.right):
            problems.append(f"--answers: pair {one.pair} is of different systems in two files")
    if not (problems or found):
        problems.append("--answers: there are no answers in these files")
    raise_all(problems)
    return next(iter(studies)), list(found.values())


def _rows(file: Path, problems: list[str]) -> list[tuple[int, dict[str, str]]]:
    """Return the rows of an export with their lines; add what is wrong to the problems."""
    try:
        reader = csv.DictReader(io.StringIO(read_text(file)))
        header = tuple(reader.fieldnames or ())
        rows = [(reader.line_num, row) for row in reader]
    except (UserError, OSError, csv.Error) as error:
        problems.append(f"--answers: {error}")
        return []
    if header != COLUMNS:
        problems.append(f"--answers: {file} is no export of a study: its columns are not {COLUMNS}")
        return []
    good = []
    for line, row in rows:
        if (
            None in row
            or None in row.values()
            or not (row["pair"].isdecimal() and row["pair"].isascii() and len(row["pair"]) < 10)
            or row["question"] not in QUESTIONS
            or row["answer"] not in SIDES
        ):
            problems.append(f"{file}, line {line}: no answer of a study")
        else:
            good.append((line, row))
    return good


class Preference(NamedTuple):
    """How often one system was preferred to another, for one question.

    Args:
        question: A key of `QUESTIONS`.
        system: The first system.
        other: The other one.
        share: Share of pairs whose majority preferred the first; a tie counts as half.
        low: Lower end of the share's 95 % interval (Wilson 1927).
        high: Its upper end.
        pairs: Number of pairs.
        ties: Pairs without a majority.
        agreement: Share of the pairs of raters who gave the same answer; None without such.
        kappa: Fleiss' kappa, the agreement beyond chance; None where it has no meaning.
    """

    question: str
    system: str
    other: str
    share: float
    low: float
    high: float
    pairs: int
    ties: int
    agreement: float | None
    kappa: float | None


def preferences(answers: Sequence[Answer]) -> list[Preference]:
    """Return the study's table, a row for each question and each two systems."""
    groups: dict[tuple[str, str, str], dict[int, list[str]]] = {}
    for one in answers:
        first, second = sorted((one.left, one.right))
        votes = groups.setdefault((one.question, first, second), {})
        votes.setdefault(one.pair, []).append(one.chosen)
    return [
        _preference(*key, [Counter(chosen) for chosen in votes.values()])
        for key, votes in sorted(groups.items())
    ]


def _preference(question: str, system: str, other: str, votes: list[Counter[str]]) -> Preference:
    ties = sum(count[system] == count[other] for count in votes)
    wins = sum(count[system] > count[other] for count in votes) + ties / 2
    low, high = wilson(wins, len(votes))
    same, kappa = agreement([(count[system], count[other]) for count in votes])
    return Preference(
        question, system, other, wins / len(votes), low, high, len(votes), ties, same, kappa
    )


def wilson(successes: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927).

    Args:
        successes: How often something was so.
        n: Of how many.
        z: Quantile of the normal distribution.
    """
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def agreement(votes: Sequence[tuple[int, int]]) -> tuple[float | None, float | None]:
    """Return how often two raters agree, and Fleiss' kappa (Fleiss 1971).

    Args:
        votes: For each pair of videos, how many raters chose the one and the other system.
    """
    several = [pair for pair in votes if sum(pair) > 1]
    if not several:
        return None, None
    same = [sum(n * (n - 1) for n in pair) / (sum(pair) * (sum(pair) - 1)) for pair in several]
    observed = sum(same) / len(same)
    total = sum(map(sum, several))
    by_chance = sum((sum(column) / total) ** 2 for column in zip(*several, strict=True))
    return observed, (observed - by_chance) / (1 - by_chance) if by_chance < 1 else None


def preference_table(rows: Sequence[Preference], raters: int) -> str:
    """Return the study's table as Markdown."""
    head = "question|preferred|to|share of pairs|95 % interval|pairs|ties|raters agree|kappa"
    lines = [f"| {' | '.join(head.split('|'))} |", "|" + "---|" * (head.count("|") + 1)]
    for row in rows:
        if row.share >= 0.5:
            better, worse, share, low, high = row.system, row.other, row.share, row.low, row.high
        else:
            better, worse, share = row.other, row.system, 1 - row.share
            low, high = 1 - row.high, 1 - row.low
        same = "-" if row.agreement is None else f"{100 * row.agreement:.0f} %"
        kappa = "-" if row.kappa is None else f"{row.kappa:.2f}"
        lines.append(
            f"| {row.question} | {better} | {worse} | {100 * share:.2f} % | {100 * low:.1f} to "
            f"{100 * high:.1f} % | {row.pairs} | {row.ties} | {same} | {kappa} |"
        )
    return "\n".join(lines) + f"\n\nMajority of {raters} raters for each pair.\n"
